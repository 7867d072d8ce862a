# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Evidence: bundles, their store on real file systems, hostile jails, and the process in the background."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import subprocess
import threading
import time
import types

import pytest
from ansible_collections.microvm.reaper.plugins.module_utils import acts, evidence, safe_read, safe_tree
from ansible_collections.microvm.reaper.plugins.module_utils import evidence_store as stores
from ansible_collections.microvm.reaper.plugins.module_utils import ledger as ledgers
from ansible_collections.microvm.reaper.plugins.module_utils import mounts as mount_table
from ansible_collections.microvm.reaper.plugins.module_utils import resource as r
from ansible_collections.microvm.reaper.plugins.module_utils.evidence_store import EvidenceError, Store
from ansible_collections.microvm.reaper.plugins.module_utils.kinds import jail
from ansible_collections.microvm.reaper.plugins.module_utils.probe import Host, ProbeError, boottime, read_text

REALM, SWEEP = "prod", "0123456789abcdef"
STRIKE = {"strikes": 2, "first": 1.0, "last": 1.0, "boot_id": "b"}
CLONE_NEWNS, MS_REC, MS_PRIVATE, MS_BIND = 0x20000, 16384, 1 << 18, 4096
libc = ctypes.CDLL(None, use_errno=True)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: mounts, device nodes, other users' files")


@pytest.fixture
def state(tmp_path):
    return str(tmp_path / "state")


@pytest.fixture
def namespace():
    """Put the test into a mount namespace of its own, and take it back afterwards."""
    before, directory = os.open("/proc/self/ns/mnt", os.O_RDONLY), os.getcwd()
    assert libc.unshare(CLONE_NEWNS) == 0
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    yield
    assert libc.setns(before, CLONE_NEWNS) == 0
    os.chdir(directory)
    os.close(before)


def mount(source, target, kind=None, flags=0, data=None):
    arguments = [os.fsencode(str(one)) if one is not None else None for one in (source, target, kind, data)]
    assert libc.mount(*arguments[:3], flags, arguments[3]) == 0, os.strerror(ctypes.get_errno())


def store(state, percent=50, max_bytes=1 << 30):
    return Store(state, REALM, percent, max_bytes)


def name(second, cause="absent", vm_id="v1"):
    return stores.name_of(1_800_000_000 + second, vm_id, cause, SWEEP)


def tar(*arguments):
    return subprocess.run(["tar", *arguments], check=True, capture_output=True).stdout


def filled(path, size):
    """Write a file of that size, or as large as the file system can take."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        while size > 0:
            size -= os.write(descriptor, b"x" * min(size, 4096))
    except OSError as err:
        assert err.errno == errno.ENOSPC
    finally:
        os.close(descriptor)


def bundles(state):
    """Return ``{vm_id: (metadata, {file name: text})}`` of all bundles, as tar itself unpacks them."""
    found = {}
    directory = os.path.join(state, REALM, "evidence")
    for one in sorted(os.listdir(directory)):
        path = os.path.join(directory, one)
        names = tar("-tzf", path).decode().split("\n")[:-1]
        assert names[0] == "metadata.json"
        texts = {member: tar("-xzOf", path, member) for member in names}
        metadata = json.loads(texts.pop("metadata.json"))
        found[metadata["vm_id"]] = metadata, {key: text.decode("utf-8", "replace") for key, text in texts.items()}
    return found


# --- the store


def test_names_are_safe_and_tell_what_keeps_the_order():
    made = stores.name_of(0, "a:b@c+d_e", "absent", SWEEP)
    assert made == "19700101T000000Z-a~b@c+d_e-absent-0123456789abcdef.tar.gz"
    assert stores.NAME.fullmatch(made)
    assert stores.NAME.fullmatch(stores.name_of(0, "x" + "9" * 127, "tombstoned", SWEEP))
    for wrong in [("../x", "absent", SWEEP), ("x/y", "absent", SWEEP), ("v", "other", SWEEP), ("v", "absent", "../x")]:
        with pytest.raises(EvidenceError, match="no name"):
            stores.name_of(0, *wrong)


def test_a_store_is_its_owners_only_and_nothing_half_written_is_left(state):
    with store(state) as one:
        one.write(name(0), b"x")
        with pytest.raises(EvidenceError, match="not a name"):
            one.write("../../etc/passwd", b"x")
    assert os.stat(one.path).st_mode & 0o777 == 0o700
    assert os.listdir(one.path) == [name(0)]
    assert os.stat(os.path.join(one.path, name(0))).st_mode & 0o777 == 0o600


def test_what_matters_least_is_dropped_first_and_the_oldest_of_it(state):
    causes = ["tombstoned", "tombstoned", "elsewhere", "elsewhere", "absent", "absent"]
    wanted = [name(second, cause) for second, cause in zip([5, 6, 3, 4, 1, 2], causes, strict=True)]
    with store(state) as one:
        for each in wanted:
            one.write(each, b"x" * 4000)
    for left in range(len(wanted), -1, -1):
        with store(state, max_bytes=left * 4096) as one:
            one.clean()
            assert one.names() == sorted(wanted[len(wanted) - left :])


def test_a_new_bundle_drops_what_matters_as_much_and_never_what_matters_more(state):
    with store(state, max_bytes=3 * 4096) as one:
        for each in (name(0), name(1), name(2, "elsewhere")):
            one.write(each, b"x")
        with pytest.raises(EvidenceError, match="no room for 1 bytes .*reap_evidence_percent"):
            one.write(name(3, "tombstoned"), b"x")
        assert one.names() == [name(0), name(1), name(2, "elsewhere")]
        one.write(name(4, "elsewhere"), b"x")
        assert one.names() == [name(0), name(1), name(4, "elsewhere")]
        one.write(name(5), b"x")
        one.write(name(6), b"x")
        assert one.names() == [name(1), name(5), name(6)]
        # One that would not fit in any case drops nothing, not even what it is to take the place of.
        for each in (name(7), name(1)):
            with pytest.raises(EvidenceError, match="no room"):
                one.write(each, b"x" * 5 * 4096)
        assert one.names() == [name(1), name(5), name(6)] == sorted(os.listdir(one.path))


def test_a_bundle_that_is_written_anew_takes_the_place_of_itself_only(state):
    with store(state, max_bytes=2 * 4096) as one:
        one.write(name(0), b"x")
        one.write(name(1), b"x")
        one.write(name(0), b"y" * 4096)
        assert one.names() == [name(0), name(1)]
        one.write(name(0), b"y" * 4097)
        assert one.names() == [name(0)] == os.listdir(one.path)


def test_there_are_never_more_bundles_than_can_be_listed_quickly(state, monkeypatch):
    monkeypatch.setattr(stores, "MAX_BUNDLES", 2)
    with store(state) as one:
        for second in range(4):
            one.write(name(second), b"x")
        assert one.names() == [name(2), name(3)] == sorted(os.listdir(one.path))


@needs_root
def test_what_is_not_ours_is_neither_counted_nor_touched(state):
    with store(state) as one:
        path = one.path
    foreign = ["notes.txt", name(0) + ".gpg", name(0).upper(), "..tar.gz"]
    for each in foreign:
        with open(os.path.join(path, each), "w") as stream:
            stream.write("x" * 10000)
    os.mkdir(os.path.join(path, name(1)))
    os.symlink("/etc/passwd", os.path.join(path, name(2)))
    with open(os.path.join(path, name(3)), "w") as stream:
        os.fchown(stream.fileno(), 12345, 12345)
    before = sorted(os.listdir(path))
    with store(state, max_bytes=0) as one:
        assert one.names() == []
        one.clean()
        with pytest.raises(EvidenceError, match="symbolic link"):
            one.metadata(name(2))
    assert sorted(os.listdir(path)) == before


def test_what_a_killed_reaper_left_half_written_goes_after_an_hour(state):
    with store(state) as one:
        path = one.path
    for second, age in ((0, 3000), (1, 4000)):
        with open(os.path.join(path, name(second) + ".new"), "w") as stream:
            os.utime(stream.fileno(), (time.time() - age, time.time() - age))
    with open(os.path.join(path, "other.new"), "w") as stream:
        os.utime(stream.fileno(), (0, 0))
    with store(state) as one:
        one.clean()
    assert sorted(os.listdir(path)) == sorted([name(0) + ".new", "other.new"])


def a_file(path, other):
    path.write_text("x")


def a_link(path, other):
    other.mkdir()
    path.symlink_to(other)


def open_to_all(path, other):
    path.mkdir()
    path.chmod(0o777)


@pytest.mark.parametrize(
    ("make", "why"), [(a_file, "in the way"), (a_link, "in the way"), (open_to_all, "writable by nobody else")]
)
def test_a_store_that_somebody_prepared_is_refused(tmp_path, state, make, why):
    with store(state) as one:
        os.rmdir(one.path)
    make(tmp_path / "state" / REALM / "evidence", tmp_path / "other")
    with pytest.raises(EvidenceError, match="cannot use the store of evidence .*evidence.*" + why):
        store(state)
    assert not (tmp_path / "other").exists() or os.listdir(tmp_path / "other") == []


@needs_root
def test_a_full_disk_fails_evidence_only_and_the_ledger_has_room_left(namespace, tmp_path):
    state = str(tmp_path / "state")
    os.mkdir(state, 0o700)
    mount("none", state, "tmpfs", data="size=1m,mode=0700")
    try:
        with store(state, percent=50) as one, pytest.raises(EvidenceError, match="no room"):
            for second in range(1000):
                one.write(name(0, vm_id="v%d" % second), os.urandom(600 * 1024))
        with store(state) as one:
            for second in range(100):
                one.write(name(second), os.urandom(20000))
        assert 16 < len(one.names()) < 30  # half of it
        filled(os.path.join(state, "filler"), 1 << 30)
        # Evidence that is there gives way, until there is room for the ledger again.
        outcomes, result = reaped(state, [token("cgroup/a")], kind("cgroup"))
        assert ([one["outcome"] for one in outcomes], result["written"]) == (["reaped"], 1)
        for each in os.listdir(one.path):
            os.unlink(os.path.join(one.path, each))
        free = os.statvfs(state).f_bavail * os.statvfs(state).f_frsize
        filled(os.path.join(state, "more"), free - 40000)
        outcomes, result = reaped(state, [token("cgroup/b", "v2")], kind("cgroup"))
        assert ([one["outcome"] for one in outcomes], result["written"]) == (["reaped"], 0)
        assert "no room" in result["failed"][0]
        assert [each for each in os.listdir(one.path) if each.endswith(".new")] == []
    finally:
        libc.umount2(state.encode(), 2)


@needs_root
def test_of_a_write_that_fails_nothing_is_left(namespace, tmp_path, monkeypatch):
    state = str(tmp_path / "state")
    os.mkdir(state, 0o700)
    mount("none", state, "tmpfs", data="size=64k,mode=0700")
    monkeypatch.setattr(Store, "_limit", lambda self: 1 << 30)
    with store(state) as one:
        one.write(name(0), b"x")
        for _try in range(2):
            with pytest.raises(EvidenceError, match="cannot write .*No space left"):
                one.write(name(0), b"x" * 100000)
        assert os.listdir(one.path) == [name(0)] == one.names()
    libc.umount2(state.encode(), 2)


# --- bundles of a sweep


def kind(its_name, **replaced):
    functions = {
        "inspect": lambda token, rules, host: None,
        "remove": lambda token, rules, host: r.outcome(token, r.REAPED),
        "witness": lambda token, rules, host: [seen(token)],
    }
    return types.SimpleNamespace(KIND=its_name, **dict(functions, **replaced))


def seen(token, text="all that there is\n"):
    return {"title": token["kind"], "source": "look at %s" % token["name"], "text": text}


def token(name, vm_id="v1", **changes):
    its_kind, _slash, own = name.partition("/")
    one = {"kind": its_kind, "name": own, "vm_id": vm_id, "identity": "id of " + own, "stop": False, "details": {}}
    return dict(one, parent=None, evidence="absent", **changes)


def plan(state, tokens):
    before = ledgers.load(state, REALM)[0]
    ledger = {key: before[key] for key in ("manifest", "intents", "aside")}
    strikes = {
        "%(kind)s %(name)s" % one: {key: one[key] for key in ("identity", "vm_id")} | STRIKE for one in tokens
    }
    return {
        "host": "rack1",
        "realm": REALM,
        "reap": tokens,
        "families": {
            one["vm_id"]: {"verdict": "confirmed", "strikes": 2, "reasons": [{"code": "absent", "text": "not listed"}]}
            for one in tokens
        },
        "manifest": {"source": "file live.json", "epoch": 7},
        "ledger": dict(ledger, host="rack1", machine_id="m1", strikes=strikes),
        "generation": before["generation"],
    }


def reaped(state, tokens, *kinds, rules=None, seconds=30.0, **options):
    """Carry out a plan with evidence; return the outcomes and what became of the evidence."""
    told = evidence.Evidence(state, REALM, options)
    with acts.Hands(rules or {}, Host(boottime() + seconds, state), kinds) as hands:
        outcomes = acts.apply(plan(state, tokens), hands, state, REALM, evidence=told)
    json.dumps(told.result())
    return outcomes, told.result()


def test_each_vm_has_a_bundle_that_says_what_there_was_and_why_it_went(state):
    tokens = [token("cgroup/a"), token("jail/b"), token("cgroup/c", "v2")]
    outcomes, result = reaped(state, tokens, kind("cgroup"), kind("jail"))
    assert {one["outcome"] for one in outcomes} == {"reaped"}
    assert (result["written"], result["failed"], result["background"]) == (2, [], None)
    metadata, texts = bundles(state)["v1"]
    expected = {"host": "rack1", "realm": REALM, "vm_id": "v1", "cause": "absent", "verdict": "confirmed", "strikes": 2}
    assert expected.items() <= metadata.items()
    assert (metadata["source"], metadata["epoch"], metadata["machine_id"]) == ("file live.json", 7, "m1")
    assert metadata["boot_id"] == read_text("/proc/sys/kernel/random/boot_id").strip()
    assert metadata["reasons"] == ["not listed"] and len(metadata["sweep"]) == 16
    assert metadata["resources"] == [
        {"kind": "cgroup", "name": "a", "identity": "id of a"}, {"kind": "jail", "name": "b", "identity": "id of b"},
    ]
    assert texts == {
        "01-cgroup.txt": "look at a\nall that there is\n", "02-jail.txt": "look at b\nall that there is\n",
    }
    assert list(bundles(state)["v2"][1]) == ["01-cgroup.txt"]
    # The journal of the same sweep has the same id.
    journal = [json.loads(line) for line in read_text(os.path.join(state, REALM, "journal.jsonl")).splitlines()]
    assert {entry["sweep"] for entry in journal} == {metadata["sweep"]}


def test_the_cause_is_that_which_matters_most_of_a_vm(state):
    tokens = [dict(token("cgroup/a"), evidence="elsewhere"), dict(token("jail/b"), evidence="tombstoned")]
    reaped(state, tokens + [dict(token("jail/c", "v2"), evidence="tombstoned")], kind("cgroup"), kind("jail"))
    assert {vm_id: metadata["cause"] for vm_id, (metadata, _texts) in bundles(state).items()} == {
        "v1": "elsewhere", "v2": "tombstoned",
    }


def test_no_evidence_is_kept_where_none_is_wanted_or_nothing_goes(state):
    with acts.Hands({}, Host(boottime() + 9), [kind("cgroup")]) as hands:
        acts.apply(plan(state, [token("cgroup/a")]), hands, state, REALM)
    assert reaped(state, [], kind("cgroup"))[1]["written"] == 0
    assert not os.path.exists(os.path.join(state, REALM, "evidence"))


def broken(token, rules, host):
    raise ProbeError("no such tool")


def wrong(token, rules, host):
    return [{}["title"]]


def test_what_could_not_be_read_is_text_in_the_same_place(state):
    tokens = [token("cgroup/a"), token("jail/b"), token("dm_thin/c")]
    silent = types.SimpleNamespace(KIND="dm_thin", remove=kind("x").remove)
    outcomes, result = reaped(state, tokens, kind("cgroup", witness=broken), kind("jail", witness=wrong), silent)
    assert ([one["outcome"] for one in outcomes], result["written"]) == (["reaped"] * 3, 1)
    assert bundles(state)["v1"][1] == {
        "01-cgroup.txt": "a\nnot read: no such tool", "02-jail.txt": "b\nnot read: KeyError: 'title'",
    }


def test_a_witness_that_hangs_costs_its_share_and_no_act(state):
    tokens = [token("cgroup/a"), token("jail/b"), token("cgroup/c", "v2"), token("jail/d", "v2"), token("cgroup/e")]
    hanging = kind("cgroup", witness=lambda *_all: time.sleep(60))
    begin = time.monotonic()
    outcomes, result = reaped(state, tokens, hanging, kind("jail"))
    assert time.monotonic() - begin < 4  # one share, of three, of five seconds
    assert ([one["outcome"] for one in outcomes], result["written"]) == (["reaped"] * 5, 2)
    for vm_id in ("v1", "v2"):
        texts = bundles(state)[vm_id][1]
        assert "to look at a cgroup hung" in texts["01-cgroup.txt"]
        assert "all that there is" in texts["02-jail.txt"]


def test_where_evidence_is_required_a_vm_without_any_is_left_alone_and_keeps_its_strikes(state):
    tokens = [token("cgroup/a"), token("jail/b", "v2"), token("jail/c")]
    tokens[2]["resume"] = True
    hanging = kind("cgroup", witness=lambda *_all: time.sleep(60))
    outcomes, result = reaped(state, tokens, hanging, kind("jail"), required=True)
    assert {(one["name"], one["outcome"]) for one in outcomes} == {
        ("a", "deferred"), ("b", "reaped"), ("c", "deferred"),
    }
    assert all("no evidence: to look at a cgroup hung" in one["message"] for one in outcomes if one["vm_id"] == "v1")
    ledger = ledgers.load(state, REALM)[0]
    assert sorted(ledger["strikes"]) == ["cgroup a", "jail c"]
    assert [one["name"] for one in ledger["intents"]] == ["c"]
    assert list(ledger["reaped"]) == ["v2"]


def test_what_an_earlier_sweep_has_set_aside_needs_no_second_bundle(state):
    held = token("jail/a", since=1.0, boot_id="b", sweep=SWEEP, state="aside", resume=True, step=r.REMOVE)
    outcomes, result = reaped(state, [held, token("jail/b", "v2")], kind("jail"), required=True)
    assert {one["outcome"] for one in outcomes} == {"reaped"} and result["written"] == 1
    assert list(bundles(state)) == ["v2"]


@pytest.mark.parametrize("required", [False, True])
def test_a_store_that_cannot_be_used_stops_nothing_unless_evidence_is_required(state, required):
    os.makedirs(os.path.join(state, REALM), 0o700)
    with open(os.path.join(state, REALM, "evidence"), "w"):
        pass
    outcomes, result = reaped(state, [token("cgroup/a"), token("cgroup/b", "v2")], kind("cgroup"), required=required)
    assert {one["outcome"] for one in outcomes} == {"deferred" if required else "reaped"}
    assert len(result["failed"]) == 1 and "in the way" in result["failed"][0]
    if required:
        assert "no evidence: cannot use the store" in outcomes[0]["message"]
        assert ledgers.load(state, REALM)[0]["reaped"] == {}


@pytest.mark.parametrize("required", [False, True])
@pytest.mark.parametrize("place", ["Worker", "packed", "name_of", "_Witnesses", "_about"])
def test_nothing_that_goes_wrong_with_evidence_stops_a_reap(state, monkeypatch, place, required):
    def fail(*_arguments):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(evidence, place, fail)
    outcomes, result = reaped(state, [token("cgroup/a")], kind("cgroup"), required=required)
    assert [one["outcome"] for one in outcomes] == ["deferred" if required else "reaped"]
    assert "Cannot allocate memory" in result["failed"][0] and result["written"] == 0


def test_what_goes_wrong_with_one_vm_is_its_own(state, monkeypatch):
    packed = evidence.packed

    def fail(metadata, sections):
        return packed(metadata, sections) if metadata["vm_id"] == "v2" else {}["x"]

    monkeypatch.setattr(evidence, "packed", fail)
    tokens = [token("cgroup/a"), token("cgroup/b", "v2"), token("cgroup/c", "v3")]
    outcomes, result = reaped(state, tokens, kind("cgroup"), required=True)
    assert [one["outcome"] for one in outcomes if one["vm_id"] == "v2"] == ["reaped"]
    assert result["failed"] == ["v1: KeyError: 'x'", "v3: KeyError: 'x'"] and list(bundles(state)) == ["v2"]


def slow(token, rules, host):
    time.sleep(0.2)
    return [seen(token)]


def test_evidence_takes_no_longer_than_it_may(state):
    tokens = [token("cgroup/%d" % number, "v%d" % number) for number in range(30)]
    begin = time.monotonic()
    told = evidence.Evidence(state, REALM, {"seconds": 2.0})
    with acts.Hands({}, Host(boottime() + 60), [kind("cgroup", witness=slow)]) as hands:
        assert told.take(plan(state, tokens), hands, SWEEP) == {}
    assert time.monotonic() - begin < 3
    result = told.result()
    assert result["written"] + result["skipped"] == 30 and 5 <= result["written"] - result["short"] <= 10
    left_out = [metadata["left_out"] for metadata, texts in bundles(state).values() if not texts]
    assert len(left_out) == result["short"] and all("reap_evidence_seconds" in why for why in left_out)


def test_where_it_is_required_no_vm_goes_for_which_there_was_no_time(state):
    tokens = [token("cgroup/%d" % number, "v%d" % number) for number in range(12)]
    told = evidence.Evidence(state, REALM, {"seconds": 1.0, "required": True})
    with acts.Hands({}, Host(boottime() + 60), [kind("cgroup", witness=slow)]) as hands:
        lacking = told.take(plan(state, tokens), hands, SWEEP)
    assert set(lacking) | set(bundles(state)) == {"v%d" % number for number in range(12)}
    assert lacking and not set(lacking) & set(bundles(state))
    assert told.result()["short"] == 0 and told.result()["skipped"] == len(lacking)


def test_what_a_bundle_has_already_is_not_written_again_each_sweep(state):
    busy = kind("cgroup", remove=lambda token, *_all: r.outcome(token, r.DEFERRED, "busy"))
    for _sweep in range(3):
        outcomes, result = reaped(state, [token("cgroup/a")], busy)
        assert outcomes[0]["outcome"] == "deferred"
    assert (result["written"], result["known"], len(bundles(state))) == (0, 1, 1)
    another = dict(token("cgroup/a"), identity="another one")
    assert reaped(state, [another], busy)[1]["written"] == 1


def test_a_bundle_without_what_there_was_no_time_for_is_not_all_there_is(state):
    told = evidence.Evidence(state, REALM, {})
    metadata = {"vm_id": "v1", "cause": "absent", "sweep": SWEEP, "seconds": 0}
    metadata["resources"] = [{"kind": "cgroup", "identity": "id of a"}]
    with store(state) as one:
        assert told._one(one, None, metadata, [token("cgroup/a")], spent=0.9) is None
    assert (told.result()["written"], told.result()["short"]) == (1, 1)
    assert reaped(state, [token("cgroup/a")], kind("cgroup"))[1]["written"] == 1


def test_a_bundle_holds_no_more_than_it_may_and_says_so(state):
    tokens = [token("cgroup/a"), token("jail/b")]
    large = kind("cgroup", witness=lambda token, *_all: [seen(token, "x" * 5000)])
    reaped(state, tokens, large, kind("jail"), bytes=1000)
    texts = bundles(state)["v1"][1]
    assert texts["01-cgroup.txt"].count("x") == 1000 and "cut: reap_evidence_bytes" in texts["01-cgroup.txt"]
    assert "cut" in texts["02-jail.txt"] and "all that" not in texts["02-jail.txt"]


def test_hostile_titles_sources_and_texts_are_only_text(state):
    hostile = "../../x\ny \ud800 \x1b[31m"
    reaped(state, [token("jail/b")], kind("jail", witness=lambda token, *_all: [
        {"title": hostile, "source": hostile, "text": hostile}]))
    (member, text), = bundles(state)["v1"][1].items()
    assert member == "01-.._.._x_y_31m.txt"
    assert text.split("\n")[0].startswith("../../x?y")


def test_an_id_that_is_none_makes_no_file(state):
    _outcomes, result = reaped(state, [token("cgroup/a"), dict(token("cgroup/b"), vm_id="../../../x")], kind("cgroup"))
    assert result["written"] == 1 and "no name for a bundle" in result["failed"][0]


# --- jails whose owner is hostile


@pytest.fixture
def base(tmp_path):
    path = tmp_path / "jailer"
    (path / "firecracker").mkdir(parents=True)
    return path


@pytest.fixture
def rules(base):
    names = "(?P<vm_id>v[a-z0-9]+)"
    globs = ["root/*.log", "root/logs/*"]
    return [{"base": str(base), "exec": "firecracker", "name": names, "evidence": globs}]


@pytest.fixture
def host():
    return Host(boottime() + 60)


def make(base, vm_id="v1"):
    path = base / "firecracker" / vm_id
    (path / "root" / "logs").mkdir(parents=True, exist_ok=True)
    (path / "root" / "firecracker.log").write_text("line 1\nline 2\n")
    return path


def jail_token(path, rules, host):
    found = {one["name"]: one for one in jail.collect(rules, host)["resources"]}[str(path)]
    return dict(found, stop=False, evidence="absent")


def witnessed(path, rules, host):
    return {one["title"]: one for one in jail.witness(jail_token(path, rules, host), rules, host)}


def test_a_jail_shows_its_tree_and_the_ends_of_its_logs(base, rules, host):
    path = make(base)
    (path / "root" / "logs" / "b.txt").write_text("x" * 70000 + "the end\n")
    (path / "root" / "secret.json").write_text("nobody asked for it")
    told = witnessed(path, rules, host)
    assert sorted(told) == ["jail-listing", "jail-log-root/firecracker.log", "jail-log-root/logs/b.txt"]
    assert "secret.json" in told["jail-listing"]["text"] and "nobody" not in json.dumps(told)
    log = told["jail-log-root/logs/b.txt"]
    assert log["text"].endswith("the end\n") and len(log["text"]) == jail.LOG_BYTES
    assert log["source"].endswith("cut: the first %d of its 70008 bytes are left out" % (70008 - jail.LOG_BYTES))
    log = told["jail-log-root/firecracker.log"]
    assert (log["source"], log["text"]) == ("%s/root/firecracker.log" % path, "line 1\nline 2\n")


def test_a_listing_is_bounded_in_length_and_depth(base, rules, host):
    path = make(base)
    (path / "root" / "/".join("abcdefghij")).mkdir(parents=True)
    for number in range(400):
        (path / ("file%03d" % number)).touch()
    lines = witnessed(path, rules, host)["jail-listing"]["text"].rstrip("\n").split("\n")
    assert len(lines) == jail.MAX_LISTED + 1 and lines[-1].startswith("... cut")
    for number in range(400):
        (path / ("file%03d" % number)).unlink()
    text = witnessed(path, rules, host)["jail-listing"]["text"]
    assert "root/a/b/c/d/e/..." in text and "root/a/b/c/d/e/f" not in text


@needs_root
def test_nothing_but_regular_files_of_the_jail_is_opened(namespace, base, rules, host, tmp_path):
    path = make(base)
    logs = path / "root" / "logs"
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("SECRET")
    (logs / "shadow").symlink_to("/etc/shadow")
    (logs / "dir").symlink_to(outside)
    os.mkfifo(logs / "fifo")
    os.mknod(logs / "mem", 0o600 | 0o020000, os.makedev(1, 1))
    os.mknod(logs / "tape", 0o600 | 0o060000, os.makedev(9, 200))
    os.link(outside / "precious", logs / "hard")
    (logs / "mounted").touch()
    mount(outside / "precious", logs / "mounted", None, MS_BIND)
    (path / "root" / "far").mkdir()
    mount(outside, path / "root" / "far", None, MS_BIND)
    with open(logs / "sparse", "wb") as stream:
        stream.truncate(1 << 40)
        stream.seek((1 << 40) - 4)
        stream.write(b"END\n")
    (logs / "we\nird \x1b[2J").write_text("ok")
    (path / "root" / "link.log").symlink_to("firecracker.log")
    told = witnessed(path, dict_rules(rules, ["root/*.log", "root/logs/*", "root/far/*"]), host)
    by_name = {title.rpartition("/")[2]: one["text"] for title, one in told.items() if title.startswith("jail-log")}
    assert by_name["shadow"].startswith("not read: not a regular file (type l)")
    assert by_name["dir"].startswith("not read: not a regular file (type l)")
    assert by_name["fifo"].startswith("not read: not a regular file (type p)")
    assert by_name["mem"].startswith("not read: not a regular file (type c)")
    assert by_name["hard"].startswith("not read: it has 2 names")
    assert "mounted" not in by_name and "precious" not in by_name
    assert by_name["sparse"].endswith("END\n") and len(by_name["sparse"]) == jail.LOG_BYTES
    listing = told["jail-listing"]["text"]
    assert "root/logs/shadow -> /etc/shadow" in listing and "root/far  (mounted" in listing
    assert "root/logs/we\\nird \\x1b[2J" in listing
    assert "SECRET" not in json.dumps(told) and len(told["jail-mounts"]["text"].splitlines()) == 2
    libc.umount2(os.fsencode(logs / "mounted"), 2)
    libc.umount2(os.fsencode(path / "root" / "far"), 2)


def dict_rules(rules, globs):
    return [dict(rule, evidence=globs) for rule in rules]


@needs_root
def test_a_mount_that_the_table_did_not_have_yet_is_not_entered(namespace, base, rules, tmp_path):
    path = make(base)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "a.log").write_text("SECRET")
    (path / "root" / "firecracker.log").unlink()
    (path / "root" / "logs" / "x").touch()
    before = mount_table.read()
    mount(tmp_path / "outside", path / "root" / "logs", None, MS_BIND)
    with safe_tree.Tree(str(base), ["firecracker", "v1"]) as tree:
        reader = safe_read.Reader(tree, before)
        assert reader.matching(["root/logs/*"], 10) == []
        assert "a.log" not in "\n".join(reader.listing(100, 6))
        with pytest.raises(safe_read.Unreadable, match="mounted"):
            reader.end_of(("root", "logs", "a.log"), 100)
    libc.umount2(os.fsencode(path / "root" / "logs"), 2)


def test_what_is_mounted_is_not_even_asked_what_it_is(base):
    path = make(base)
    (path / "root" / "logs" / "x").touch()
    point = mount_table.Mount(1, 0, "0:99", "/", str(path / "root" / "logs"), False, "nfs")
    with reader_of(base) as tree:
        reader = safe_read.Reader(tree, [point])
        assert any(line.startswith("?  root/logs") for line in reader.listing(100, 6))
        assert reader.matching(["root/logs/*", "root/l*/x", "root/logs", "root/l*"], 10) == []
        for names in (("root", "logs", "x"), ("root", "logs")):
            with pytest.raises(safe_read.Unreadable, match="mounted"):
                reader.end_of(names, 100)


def reader_of(base):
    return safe_tree.Tree(str(base), ["firecracker", "v1"])


def test_a_file_that_grows_while_it_is_read_is_cut_and_said(base):
    log = make(base) / "root" / "firecracker.log"
    with open(log, "wb") as stream:
        stream.truncate(200 << 20)
    stop = threading.Event()

    def grow():
        with open(log, "ab") as stream:
            while not stop.is_set():
                stream.write(b"more" * 100)
                stream.flush()

    writer = threading.Thread(target=grow)
    writer.start()
    try:
        with reader_of(base) as tree:
            data, notes = safe_read.Reader(tree, mount_table.read()).end_of(("root", "firecracker.log"), 100 << 20)
    finally:
        stop.set()
        writer.join()
    assert len(data) == 100 << 20
    assert any("it changed while it was read" in note for note in notes)


def test_a_file_that_is_truncated_while_it_is_read_is_said(base, monkeypatch):
    log = make(base) / "root" / "firecracker.log"
    read = safe_read._read
    monkeypatch.setattr(safe_read, "_read", lambda *arguments: os.truncate(log, 3) or read(*arguments))
    with reader_of(base) as tree:
        data, notes = safe_read.Reader(tree, mount_table.read()).end_of(("root", "firecracker.log"), 1000)
    assert data == b"lin"
    assert notes == ["cut: it ended after 3 bytes, it had 14 when it was opened",
                     "it changed while it was read: 14 bytes, then 3"]


def test_another_jail_of_the_same_name_is_no_evidence(base, rules, host):
    path = make(base)
    old = jail_token(path, rules, host)
    path.rename(base / "firecracker" / "v2")
    make(base)
    with pytest.raises(ProbeError, match="another jail"):
        jail.witness(old, rules, host)
    with pytest.raises(ProbeError, match="not below"):
        jail.witness(dict(old, name="/etc/v1"), rules, host)


@pytest.mark.parametrize("wrong", ["/etc/*", "../x", "root/../../x", "", "a//b"])
def test_globs_lead_nowhere_but_into_the_jail(rules, wrong):
    with pytest.raises(r.RuleError, match="globs relative to the jail"):
        jail.log_globs(dict_rules(rules, [wrong]))


# --- whole logs, in the background


def set_aside(base, path, rules, host):
    """Do what a reaper does that moves a jail aside; return its outcome."""
    one = jail_token(path, rules, host)
    place = base / ".microvm.reaper" / "abc" / "firecracker"
    place.mkdir(parents=True, mode=0o700)
    os.rename(path, place / path.name)
    return dict(r.outcome(one, r.SET_ASIDE), aside={"path": str(place / path.name)}), one


def followed(state, base, rules, host, monkeypatch, before=lambda: None, **options):
    """Take evidence of a jail and move it aside; start the background, which calls ``before`` first."""
    path = make(base)
    (path / "root" / "logs" / "long").write_text("".join("line %d\n" % number for number in range(50000)))
    (path / "root" / "logs" / "link").symlink_to("/etc/passwd")
    one = jail_token(path, rules, host)
    told = evidence.Evidence(state, REALM, options)
    with acts.Hands({"jail": rules}, host, [jail]) as hands:
        assert told.take(plan(state, [one]), hands, SWEEP) == {}
        outcome = set_aside(base, path, rules, host)[0]
        quiet = evidence._be_quiet
        monkeypatch.setattr(evidence, "_be_quiet", lambda: (before(), quiet()))
        told.follow([outcome])
    return told, outcome


def wait_until_over(state):
    """Wait until nobody holds the lock of the background."""
    with open(os.path.join(state, evidence.LOCK), "rb") as lock:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            try:
                return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                time.sleep(0.02)
    raise AssertionError("the lock is never free")


def test_whole_logs_are_copied_after_the_module_is_done(state, base, rules, host, monkeypatch):
    begin = time.monotonic()
    told, outcome = followed(state, base, rules, host, monkeypatch, lambda: time.sleep(1))
    assert time.monotonic() - begin < 0.9
    assert told.result()["background"] == "whole logs of 1 jails are being copied"
    assert bundles(state)["v1"][0]["logs"] == "their ends only"
    told.follow([outcome])
    assert "that of an earlier sweep goes on" in told.result()["background"]
    wait_until_over(state)
    metadata, texts = bundles(state)["v1"]
    assert metadata["logs"].startswith("whole")
    whole = texts[next(one for one in texts if one.endswith("whole-log-root_logs_long.txt"))].split("\n", 1)
    assert whole[0] == outcome["aside"]["path"] + "/root/logs/long"
    assert whole[1].startswith("line 0\n") and whole[1].endswith("line 49999\n")
    link = texts[next(one for one in texts if one.endswith("whole-log-root_logs_link.txt"))]
    assert "not read: not a regular file" in link
    assert "01-jail-listing.txt" in texts
    assert len(os.listdir(os.path.join(state, REALM, "evidence"))) == 1


def test_the_background_holds_nothing_but_its_own_lock(state, base, rules, host, monkeypatch, tmp_path):
    kept = os.pipe()

    def note():
        time.sleep(0.1)  # so that its parent has ended
        found = {"fds": [], "sid": os.getsid(0), "pid": os.getpid(), "ppid": os.getppid(), "cwd": os.getcwd()}
        for descriptor in os.listdir("/proc/self/fd"):
            with contextlib.suppress(FileNotFoundError):  # that of the listing
                found["fds"].append(os.readlink("/proc/self/fd/" + descriptor))
        (tmp_path / "note").write_text(json.dumps(found))

    with ledgers.Lock(state):
        followed(state, base, rules, host, monkeypatch, note)
    with ledgers.Lock(state):
        pass
    wait_until_over(state)
    found = json.loads((tmp_path / "note").read_text())
    lock = os.path.join(state, evidence.LOCK)
    assert set(found["fds"]) <= {"/dev/null", lock} and lock in found["fds"]
    assert found["sid"] not in (os.getsid(0), found["pid"]) and found["cwd"] == "/"
    assert found["ppid"] != os.getpid()  # whoever collects orphans collects it
    for descriptor in kept:
        os.close(descriptor)


def test_a_background_that_is_killed_leaves_the_bundle_as_it_was_and_the_lock_free(
    state, base, rules, host, monkeypatch, tmp_path
):
    def die():
        os.kill(os.getpid(), 9)

    followed(state, base, rules, host, monkeypatch, die)
    wait_until_over(state)
    assert bundles(state)["v1"][0]["logs"] == "their ends only"


def test_the_background_has_a_budget_and_keeps_the_ends(state, base, rules, host, monkeypatch):
    (base / "firecracker/v1/root/logs").mkdir(parents=True)
    with open(base / "firecracker/v1/root/a.log", "wb") as stream:
        stream.truncate(1 << 40)
    followed(state, base, rules, host, monkeypatch, bytes=1000)
    wait_until_over(state)
    texts = bundles(state)["v1"][1]
    # It is one that is enormous that is cut, not those beside it.
    assert [text for one, text in texts.items() if "whole-log-root_firecracker.log" in one][0].endswith("line 2\n")
    long = texts[max(one for one in texts if "whole-log-root_logs_long" in one)]
    first, rest = long.split("\n", 1)
    assert "cut: the first" in first and rest.endswith("line 49999\n")
    assert "cut: the first 1099511627776 of its" in texts[max(one for one in texts if "whole-log-root_a.log" in one)]
    whole = [text.split("\n", 1)[1] for one, text in texts.items() if "whole-log" in one]
    assert sum(map(len, whole)) == 1000


def test_a_path_outside_of_the_bases_is_not_looked_at(state, base, rules, host, tmp_path):
    outcome, _token = set_aside(base, make(base), rules, host)
    assert jail.logs_of(outcome, rules)[0] == os.path.realpath(base)
    for path in ("/etc/ssh", str(base), str(base) + "/../x", str(base) + "x/v1", "x" * len(str(base)) + "/v1", None):
        with pytest.raises(ProbeError, match="not below a configured jail base"):
            jail.logs_of(dict(outcome, aside={"path": path}), rules)


def test_the_background_is_the_last_to_get_processor_and_disk():
    read, write = os.pipe()
    if os.fork() == 0:
        evidence._be_quiet()
        priority = libc.syscall(252, 1, 0) if os.uname().machine == "x86_64" else evidence._IOPRIO_IDLE
        os.write(write, ("%d %d" % (os.nice(0), priority)).encode())
        os._exit(0)
    os.close(write)
    assert os.read(read, 100).split() == [b"19", b"%d" % evidence._IOPRIO_IDLE]
    os.close(read)
    os.wait()
