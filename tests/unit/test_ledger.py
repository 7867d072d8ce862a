# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The ledger, in real files."""

from __future__ import annotations

import errno
import json
import os
import stat
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


# What a host of this version keeps. Other versions have to understand it, or to call it corrupt.
ON_DISK = {
    "version": 1,
    "realm": "prod",
    "host": None,
    "machine_id": None,
    "generation": 1,
    "manifest": {"epochs": {}, "count": None, "counts": {}},
    "strikes": {"cgroup a": STRIKE},
    "intents": [INTENT],
    "aside": [],
    "reaped": {},
    "latch": None,
    "applied": None,
}


def test_what_lies_on_the_disk(state):
    ledgers.save(state, REALM, good())
    with open(ledgers.path_of(state, REALM)) as stream:
        assert stream.read() == json.dumps(ON_DISK, sort_keys=True)


def test_a_ledger_that_is_older_than_the_ladder_and_the_latch(state):
    new = ("host", "machine_id", "aside", "reaped", "latch", "applied")
    old = {key: value for key, value in ON_DISK.items() if key not in new}
    write(state, json.dumps(old).encode())
    assert ledgers.load(state, REALM) == (ON_DISK, None)


def test_a_ledger_is_of_the_realm_and_the_version_that_saves_it(state):
    saved = ledgers.save(state, "staging", dict(good(), version=0))
    assert ledgers.load(state, "staging") == (saved, None)


def test_what_was_never_saved_may_come_from_elsewhere():
    seen = {"epochs": {"a": 7, "b": 0.5}, "count": 9, "counts": {"a": 4, "b": 5}}
    full = good(manifest=seen, reaped={"v1": 1}, latch={"code": "c", "message": "m"})
    full["applied"] = {"plan": "1f2e", "made_at": 1_800_000_000.5, "epoch": None}
    assert ledgers.checked(full, REALM) == full


def test_a_ledger_of_before_what_is_remembered_today_is_good():
    older = good(manifest={"epochs": {"a": 7}, "count": 9})
    assert ledgers.checked(older, REALM)["manifest"] == {"epochs": {"a": 7}, "count": 9, "counts": {}}


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


@pytest.mark.parametrize("realm", ["a", "Prod", "EU-West_1.b", "7", "a" * 64])
def test_realms_that_are_plain_names(realm):
    assert ledgers.path_of("/s", realm) == "/s/%s/ledger.json" % realm


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

    def fsync(descriptor):
        status = os.fstat(descriptor)
        calls.append("sync the directory" if stat.S_ISDIR(status.st_mode) else "sync %d bytes" % status.st_size)

    rename = os.rename
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", lambda *names: (calls.append("rename"), rename(*names))[1])
    ledgers.save(state, REALM, good())
    size = os.path.getsize(ledgers.path_of(state, REALM))
    assert calls == ["sync %d bytes" % size, "rename", "sync the directory"]


def corrupt(**changes):
    return json.dumps(dict(good(), **changes)).encode()


def strike(**changes):
    return corrupt(strikes={"a b": dict(STRIKE, **changes)})


def remembered(**changes):
    return corrupt(manifest=dict({"epochs": {}, "count": None, "counts": {}}, **changes))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        (b"[]", "TypeError"),
        (b"null", "TypeError"),
        (b"{}", "KeyError: 'version'"),
        (b"\xff\xfe", "utf-8"),
        (b"[" * 100000, "recursion"),
        (corrupt(version=2), "version 2, not 1"),
        (corrupt(realm="staging"), "realm 'staging', not 'prod'"),
        (corrupt(generation=-1), "generation -1"),
        (corrupt(generation="1"), "generation '1'"),
        (corrupt(strikes=[]), "AttributeError"),
        (strike(strikes="2"), "a strike without a count"),
        (strike(boot_id=None), "a strike without a count or a boot id"),
        (strike(first=float("inf")), "a strike without its instants"),
        (strike(last=float("nan")), "a strike without its instants"),
        (strike(first=10**400), "OverflowError"),
        (strike(identity=None), "a strike without identity"),
        (strike(vm_id="../x"), "a strike without identity or vm_id"),
        (corrupt(intents={}), "intents is not a list"),
        (corrupt(intents=[dict(INTENT, name=None)]), "an intent without kind, name or identity"),
        (corrupt(intents=[dict(INTENT, vm_id="../x")]), "an intent without vm_id"),
        (corrupt(intents=[dict(INTENT, details=None)]), "an intent without vm_id or details"),
        (remembered(epochs=[]), "AttributeError"),
        (remembered(epochs={"a": "x"}), "TypeError"),
        (remembered(epochs={"a": float("inf")}), "an epoch that is no number"),
        (remembered(count="x"), "TypeError"),
        (remembered(count=float("nan")), "a count that is no number"),
        (corrupt(reaped={"../x": 1}), "a reaped VM without id"),
        (corrupt(reaped={"v1": float("inf")}), "a reaped VM without id or time"),
        (corrupt(applied={"plan": 7, "made_at": 1, "epoch": 1}), "an applied plan without id"),
        (corrupt(applied={"plan": "p", "made_at": -1, "epoch": 1}), "an applied plan without id or time"),
        (corrupt(applied={"plan": "p", "made_at": 1e300, "epoch": 1}), "an applied plan without id or time"),
        (corrupt(applied={"plan": "p", "made_at": float("nan"), "epoch": 1}), "an applied plan without id or time"),
        (corrupt(applied={"plan": "p", "made_at": 1, "epoch": float("inf")}), "an applied plan of an epoch"),
        (corrupt(applied={"plan": "p", "made_at": 1}), "KeyError: 'epoch'"),
        (corrupt(latch={"code": "c"}), "KeyError: 'message'"),
        (corrupt(latch={"code": None, "message": "m"}), "a latch without code"),
        (corrupt(latch={"code": "c", "message": None}), "a latch without code or message"),
        (corrupt(host=5), "host 5"),
        (corrupt(machine_id=[]), "machine_id []"),
    ],
)
def test_row_32_a_corrupt_ledger_is_kept_aside_and_strikes_start_again(state, content, said):
    path = write(state, content)
    ledger, problem = ledgers.load(state, REALM)
    assert ledger == ledgers.empty(REALM)
    assert "the ledger %s is corrupt (" % path in problem and said in problem
    ledgers.save(state, REALM, ledger)
    assert ledgers.load(state, REALM)[1] is None
    with open(path + ".corrupt", "rb") as stream:
        assert stream.read() == content


def test_a_ledger_may_be_as_large_as_the_limit_and_no_larger(state, monkeypatch):
    content = json.dumps(ON_DISK).encode()
    write(state, content)
    monkeypatch.setattr(ledgers, "MAX_BYTES", len(content))
    assert ledgers.load(state, REALM) == (ON_DISK, None)
    monkeypatch.setattr(ledgers, "MAX_BYTES", len(content) - 1)
    assert "larger than %d bytes" % (len(content) - 1) in ledgers.load(state, REALM)[1]


def test_the_pins_may_be_as_large_as_the_limit_and_no_larger(tmp_path, monkeypatch):
    (tmp_path / "keep").write_text("v1\nv2\n")
    assert ledgers.pins(str(tmp_path)) == ["v1", "v2"]
    monkeypatch.setattr(ledgers, "MAX_PINS_BYTES", 6)
    assert ledgers.pins(str(tmp_path)) == ["v1", "v2"]
    monkeypatch.setattr(ledgers, "MAX_PINS_BYTES", 5)
    # Bytes, and not letters: what is left unread may pin a VM.
    for text in ("v1\nv2\n", "# \u00fc\nv1"):
        (tmp_path / "keep").write_text(text, "utf-8")
        with pytest.raises(ledgers.LedgerError, match="keep are larger than 5 bytes"):
            ledgers.pins(str(tmp_path))


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


def test_realms_that_cannot_be_listed_are_an_error_and_not_none(state):
    with open(state, "w"):
        pass
    with pytest.raises(ledgers.LedgerError, match="cannot read %s: Not a directory" % state):
        ledgers.other_realms(state, REALM)


@pytest.mark.parametrize(
    ("number", "user", "named"),
    [(errno.EACCES, 1, True), (errno.EPERM, 1000, True), (errno.EIO, 1000, False), (errno.EACCES, 0, False)],
)
def test_the_right_that_is_missing_is_named_to_who_lacks_it(state, monkeypatch, number, user, named):
    def refused(*_arguments):
        raise OSError(number, "Reason")

    monkeypatch.setattr(os, "open", refused)
    monkeypatch.setattr(os, "geteuid", lambda: user)
    with pytest.raises(ledgers.LedgerError) as caught:
        ledgers.load(state, REALM)
    assert str(caught.value).partition(": Reason")[2] == ("; the reaper has to run as root (become)" if named else "")


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
    with pytest.raises(ledgers.LedgerError, match="not a file or a link"):
        ledgers.save(state, REALM, good())


def test_a_file_in_the_place_of_the_directory(state):
    with open(state, "w"):
        pass
    for use in (lambda: ledgers.save(state, REALM, good()), ledgers.Lock(state).__enter__):
        with pytest.raises(ledgers.LedgerError, match="%s is in the way: it must be a directory" % state):
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


def test_the_lock_is_for_its_owner_and_no_link(state, tmp_path):
    mask = os.umask(0)
    try:
        with ledgers.Lock(state) as lock:
            assert os.stat(lock.path).st_mode & 0o777 == 0o600
    finally:
        os.umask(mask)
    os.rename(lock.path, str(tmp_path / "theirs"))
    os.symlink(tmp_path / "theirs", lock.path)
    with pytest.raises(ledgers.LedgerError, match="cannot open the lock"):
        lock.__enter__()


def test_a_lock_that_cannot_be_had_is_not_a_busy_host(state, monkeypatch):
    def unable(*_arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(ledgers.fcntl, "flock", unable)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(ledgers.LedgerError, match="cannot lock .*No locks available") as caught:
        ledgers.Lock(state).__enter__()
    assert not isinstance(caught.value, ledgers.Busy)
    assert os.listdir("/proc/self/fd") == before
