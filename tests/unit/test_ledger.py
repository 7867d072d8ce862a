# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The ledger, in real files."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys

import pytest
from ansible_collections.microvm.reaper.plugins.module_utils import ledger as ledgers
from hypothesis import given, settings
from hypothesis import strategies as st

REALM = "prod"
STRIKE = {"identity": "i", "vm_id": "v1", "strikes": 1, "first": 1.0, "last": 1.0, "boot_id": "b"}
INTENT = {"kind": "dm_thin", "name": "n", "vm_id": "v1", "identity": "i", "details": {}}
ROOT = os.geteuid() == 0


def good(**changes):
    return dict(ledgers.empty(REALM), strikes={"cgroup a": STRIKE}, intents=[INTENT], **changes)


@pytest.fixture
def state(tmp_path):
    return str(tmp_path / "state")


def write(state, content):
    os.makedirs(os.path.join(state, REALM), mode=0o700)
    path = ledgers.path_of(state, REALM)
    with open(path, "wb") as stream:
        stream.write(content)
    return path


def test_a_host_without_a_ledger_remembers_nothing(state):
    assert ledgers.load(state, REALM) == (ledgers.empty(REALM), None)
    assert not os.path.exists(state)


def test_what_is_saved_is_loaded_one_generation_later(state):
    written = ledgers.save(state, REALM, good())
    assert written["generation"] == 1
    assert ledgers.load(state, REALM) == (written, None)
    assert ledgers.save(state, REALM, written)["generation"] == 2
    path = ledgers.path_of(state, REALM)
    assert [os.stat(one).st_mode & 0o777 for one in (path, os.path.dirname(path), state)] == [0o600, 0o700, 0o700]
    assert os.listdir(os.path.dirname(path)) == ["ledger.json"]


def test_realms_do_not_see_each_other(state):
    ledgers.save(state, REALM, good())
    assert ledgers.load(state, "staging") == (ledgers.empty("staging"), None)


@pytest.mark.parametrize("realm", ["", ".", "..", "a/b", "../x", "-a", "a b", "a\n", "a" * 65])
def test_a_realm_is_a_plain_name(state, realm):
    with pytest.raises(ledgers.LedgerError, match="realm"):
        ledgers.path_of(state, realm)


def test_the_old_one_stays_whole_until_the_new_one_is(state, monkeypatch):
    """Whatever step fails, a reader finds one of the two."""
    before = ledgers.save(state, REALM, good())
    for step in ("fsync", "rename"):

        def broken(*_arguments):
            raise OSError(errno.EIO, "Input/output error")

        with monkeypatch.context() as patch:
            patch.setattr(os, step, broken)
            with pytest.raises(ledgers.LedgerError, match="cannot write the ledger .*Input/output error"):
                ledgers.save(state, REALM, dict(before, strikes={}))
        assert ledgers.load(state, REALM) == (before, None)
    assert ledgers.save(state, REALM, before)["generation"] == 2


def test_row_32_the_new_file_is_on_the_disk_before_it_has_the_name(state, monkeypatch):
    calls = []
    for name in ("fsync", "rename"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, real=real: (calls.append(name), real(*a))[1])
    ledgers.save(state, REALM, good())
    assert calls == ["fsync", "rename", "fsync"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"{}",
        b"\xff\xfe",
        b"[" * 100000,
        json.dumps(dict(good(), version=2)).encode(),
        json.dumps(dict(good(), realm="staging")).encode(),
        json.dumps(dict(good(), generation=-1)).encode(),
        json.dumps(dict(good(), generation="1")).encode(),
        json.dumps(dict(good(), strikes=[])).encode(),
        json.dumps(dict(good(), strikes={"a b": dict(STRIKE, strikes="2")})).encode(),
        json.dumps(dict(good(), strikes={"a b": dict(STRIKE, last=float("nan"))})).encode(),
        json.dumps(dict(good(), strikes={"a b": dict(STRIKE, first=10**400)})).encode(),
        json.dumps(dict(good(), strikes={"a b": dict(STRIKE, vm_id="../x")})).encode(),
        json.dumps(dict(good(), intents={})).encode(),
        json.dumps(dict(good(), intents=[dict(INTENT, name=None)])).encode(),
        json.dumps(dict(good(), intents=[dict(INTENT, details=None)])).encode(),
        json.dumps(dict(good(), manifest={"epochs": [], "count": None})).encode(),
        json.dumps(dict(good(), manifest={"epochs": {"a": "x"}, "count": None})).encode(),
        json.dumps(dict(good(), manifest={"epochs": {}, "count": "x"})).encode(),
        json.dumps(dict(good(), host=5)).encode(),
    ],
)
def test_row_32_a_corrupt_ledger_is_kept_aside_and_strikes_start_again(state, content):
    path = write(state, content)
    ledger, problem = ledgers.load(state, REALM)
    assert ledger == ledgers.empty(REALM)
    assert "is corrupt" in problem and path in problem
    ledgers.save(state, REALM, ledger)
    assert ledgers.load(state, REALM)[1] is None
    with open(path + ".corrupt", "rb") as stream:
        assert stream.read() == content


@settings(max_examples=60, deadline=None)
@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from([*ledgers.empty(REALM), "epochs", "vm_id"]), inner, max_size=9),
    max_leaves=20,
))
def test_nothing_but_a_value_error_comes_of_a_strange_ledger(value):
    try:
        ledgers.checked(dict(good(), **value) if isinstance(value, dict) else value, REALM)
    except ValueError:
        pass


def test_a_ledger_that_cannot_be_read_is_an_error_and_not_an_empty_one(state):
    os.makedirs(ledgers.path_of(state, REALM))
    with pytest.raises(ledgers.LedgerError, match="cannot read"):
        ledgers.load(state, REALM)


def test_a_link_in_the_place_of_the_ledger_is_not_followed(state, tmp_path):
    path = write(state, b"")
    os.unlink(path)
    (tmp_path / "theirs").write_text(json.dumps(good()))
    os.symlink(tmp_path / "theirs", path)
    with pytest.raises(ledgers.LedgerError, match="cannot read"):
        ledgers.load(state, REALM)


def test_a_link_in_the_place_of_the_new_file_is_not_followed(state, tmp_path):
    write(state, json.dumps(good()).encode())
    victim = tmp_path / "victim"
    victim.write_text("precious")
    os.symlink(victim, ledgers.path_of(state, REALM) + ".new")
    with pytest.raises(ledgers.LedgerError):
        ledgers.save(state, REALM, good())
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("which", ["state", "realm"])
def test_directories_that_others_could_have_prepared_are_refused(state, tmp_path, which):
    ledgers.save(state, REALM, good())
    directory = {"state": state, "realm": os.path.join(state, REALM)}[which]
    os.chmod(directory, 0o770)
    with pytest.raises(ledgers.LedgerError, match="writable by nobody else.*0770"):
        ledgers.save(state, REALM, good())
    os.chmod(directory, 0o755)
    ledgers.save(state, REALM, good())
    if ROOT:
        os.chown(directory, 12345, 0)
        with pytest.raises(ledgers.LedgerError, match="belongs to uid 12345"):
            ledgers.save(state, REALM, good())
        os.chown(directory, 0, 0)
    os.rename(directory, str(tmp_path / "real"))
    os.symlink(tmp_path / "real", directory)
    with pytest.raises(ledgers.LedgerError, match="not a link"):
        ledgers.save(state, REALM, good())


def test_a_file_in_the_place_of_the_directory(state):
    with open(state, "w"):
        pass
    for use in (lambda: ledgers.save(state, REALM, good()), ledgers.Lock(state).__enter__):
        with pytest.raises(ledgers.LedgerError, match=state):
            use()


@pytest.mark.skipif(not ROOT, reason="mounts a file system")
def test_row_32_a_full_disk(state):
    os.mkdir(state)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k,mode=700", "none", state], check=False).returncode:
        pytest.skip("no right to mount")
    try:
        before = ledgers.save(state, REALM, good())
        many = {"cgroup %d" % number: STRIKE for number in range(2000)}
        with pytest.raises(ledgers.LedgerError, match="No space left on device"):
            ledgers.save(state, REALM, dict(before, strikes=many))
        assert ledgers.load(state, REALM) == (before, None)
        assert ledgers.save(state, REALM, before)["generation"] == 2
    finally:
        subprocess.run(["umount", state], check=True)


def test_row_32_a_read_only_place(state, monkeypatch):
    def read_only(*_arguments, **_named):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "makedirs", read_only)
    with pytest.raises(ledgers.LedgerError, match="Read-only file system"):
        ledgers.save(state, REALM, good())
    with pytest.raises(ledgers.LedgerError, match="Read-only file system"):
        ledgers.Lock(state).__enter__()


HOLD = """
import sys
sys.path.insert(0, "collections")
from ansible_collections.microvm.reaper.plugins.module_utils import ledger
with ledger.Lock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_row_29_one_reaper_at_a_time(state):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, state], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ledgers.Busy, match="another reaper"), ledgers.Lock(state):
            pass
        # Not even a reaper that is killed leaves its lock behind.
        other.kill()
        other.wait()
        with ledgers.Lock(state):
            pass
    with ledgers.Lock(state):
        pass
