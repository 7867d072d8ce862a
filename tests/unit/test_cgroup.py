# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The cgroup kind on the cgroups of this machine, v1 and v2, below parents of a name of our own."""

import errno
import os
import pathlib
import signal
import subprocess
import time

import pytest
from ansible_collections.microvm.reaper.plugins.module_utils import mounts, processes
from ansible_collections.microvm.reaper.plugins.module_utils import resource as r
from ansible_collections.microvm.reaper.plugins.module_utils.kinds import cgroup
from ansible_collections.microvm.reaper.plugins.module_utils.probe import Absent, Host, ProbeError, Worker, boottime

CAPTURES = pathlib.Path(__file__).parent / "captures"
ROOT = "microvm-reaper-test-%d" % os.getpid()
RULES = [{"root": ROOT, "name": "(?P<vm_id>v[a-z2-7]+)"}]


def hierarchies():
    """Return ``[(name, mount point, version)]`` of those the tests use: v2, the v1 freezer and another v1 one."""
    try:
        found = [(os.path.basename(mount), mount, version) for mount, version in cgroup.cgroup_mounts(mounts.read())]
    except Absent:
        return []
    wanted = [one for one in found if one[2] == 2 or one[0] in ("freezer", "pids")]
    return [one for one in wanted if os.access(one[1], os.W_OK)]


HIERARCHIES = hierarchies()

needs_cgroups = pytest.mark.skipif(
    os.geteuid() != 0 or not HIERARCHIES, reason="needs root and a cgroup hierarchy that can be written to"
)


class Parent:
    """A cgroup of our own in one hierarchy, and what the tests put into it."""

    def __init__(self, mount, version):
        self.path = os.path.join(mount, ROOT)
        self.version = version
        self.started = []
        os.mkdir(self.path)

    def make(self, name):
        path = os.path.join(self.path, name)
        os.makedirs(path)
        return path

    def start(self, path, script="exec sleep 60"):
        process = subprocess.Popen(["/bin/sh", "-c", "read go; " + script], stdin=subprocess.PIPE)
        self.started.append(process)
        put(process.pid, path)
        process.stdin.close()
        return process

    def end(self):
        for state in pathlib.Path(self.path).glob("**/freezer.state"):
            state.write_text("THAWED")
        for process in self.started:
            process.kill()
            process.wait()
        deadline = time.monotonic() + 5
        for directory, _below, _files in os.walk(self.path, topdown=False):
            while os.path.exists(directory):
                for pid in cgroup._pids(directory):
                    os.kill(pid, signal.SIGKILL)
                try:
                    os.rmdir(directory)
                except OSError:
                    assert time.monotonic() < deadline
                    time.sleep(0.01)


def put(pid, path):
    with open(os.path.join(path, "cgroup.procs"), "w") as stream:
        stream.write(str(pid))


@pytest.fixture(params=HIERARCHIES, ids=[name for name, _mount, _version in HIERARCHIES])
def parent(request):
    made = Parent(*request.param[1:])
    yield made
    made.end()


@pytest.fixture
def host():
    return Host(boottime() + 60)


def collected(host, rules=RULES):
    return {one["name"]: one for one in cgroup.collect(rules, host)["resources"]}


def token(host, path, rules=RULES):
    one = collected(host, rules)[path]
    return dict({key: one[key] for key in ("kind", "name", "vm_id", "identity", "details")}, stop=False)


def result(outcome):
    return None if outcome is None else outcome["outcome"]


@needs_cgroups
def test_only_directories_with_the_name_of_a_vm_are_found(parent, host):
    path = parent.make("vabc")
    parent.make("other")
    parent.make("vdeep/vinner")
    found = cgroup.collect(RULES, host)
    assert sorted(one["name"] for one in found["resources"]) == [path, os.path.join(parent.path, "vdeep")]
    assert found["foreign"] == 1
    one = collected(host)[path]
    assert (one["vm_id"], one["in_use"], one["holders"]) == ("vabc", False, [])
    assert one["details"] == {"version": parent.version}
    assert one["identity"] == "%s:%d:%d" % (host.boot_id, os.stat(path).st_dev, os.stat(path).st_ino)
    assert one["age_seconds"] is None


@needs_cgroups
def test_an_empty_cgroup_is_removed_children_first(parent, host):
    path = parent.make("vabc")
    parent.make("vabc/jailer/deeper")
    parent.make("vabc/a b")
    one = token(host, path)
    assert cgroup.inspect(one, RULES, host) is None
    assert os.path.isdir(path)
    assert result(cgroup.remove(one, RULES, host)) == r.REAPED
    assert not os.path.exists(path)
    assert os.path.isdir(parent.path)
    for act in (cgroup.inspect, cgroup.remove):
        assert result(act(one, RULES, host)) == r.ALREADY_GONE
    assert cgroup.stop(dict(one, stop=True), RULES, host) is None


@needs_cgroups
def test_row_15_a_populated_cgroup_is_deferred_and_its_processes_named(parent, host):
    path = parent.make("vabc")
    process = parent.start(parent.make("vabc/inner"))
    assert collected(host)[path]["in_use"]
    one = token(host, path)
    for act in (cgroup.inspect, cgroup.remove):
        outcome = act(one, RULES, host)
        assert (outcome["outcome"], outcome["message"]) == (r.DEFERRED, "populated")
        assert [holder["name"].split()[0] for holder in outcome["holders"]] == [str(process.pid)]
    assert process.poll() is None


@needs_cgroups
@pytest.mark.parametrize("with_cgroup_kill", [True, False])
def test_row_15_stop_kills_all_that_runs_in_it(parent, host, with_cgroup_kill, monkeypatch):
    if not with_cgroup_kill:  # as on Linux before 5.14
        write = cgroup._write
        monkeypatch.setattr(cgroup, "_write", lambda one, name, data: name != "cgroup.kill" and write(one, name, data))
    path = parent.make("vabc")
    script = (
        "trap '' TERM INT HUP; for n in 1 2 3 4 5 6 7 8; do (while :; do sleep 0.01; done) & done; wait; exec sleep 60"
    )
    processes = [parent.start(path, script), parent.start(parent.make("vabc/inner"), "trap '' TERM; exec sleep 60")]
    outside = parent.start(parent.make("vother"))
    one = dict(token(host, path), stop=True)
    begin = time.monotonic()
    assert cgroup.stop(one, RULES, host) is None
    assert time.monotonic() - begin < cgroup.KILL_SECONDS
    assert [process.wait(1) for process in processes] == [-signal.SIGKILL] * 2
    assert outside.poll() is None
    assert result(cgroup.remove(one, RULES, host)) == r.REAPED


@needs_cgroups
@pytest.mark.skipif("freezer" not in [name for name, _m, _v in HIERARCHIES], reason="needs the v1 freezer")
def test_stop_ends_what_is_frozen_in_v1(host):
    made = Parent(*[one for one in HIERARCHIES if one[0] == "freezer"][0][1:])
    try:
        path = made.make("vabc")
        process = made.start(path)
        with open(path + "/freezer.state", "w") as stream:
            stream.write("FROZEN")
        assert cgroup.stop(dict(token(host, path), stop=True), RULES, host) is None
        assert process.wait(1) == -signal.SIGKILL
    finally:
        made.end()


@needs_cgroups
def test_zombies_do_not_count(parent, host):
    path = parent.make("vabc")
    process = parent.start(path, "exit 0")
    while "Z" not in pathlib.Path("/proc/%d/stat" % process.pid).read_text().rpartition(")")[2]:
        time.sleep(0.01)
    one = token(host, path)
    assert not collected(host)[path]["in_use"]
    assert result(cgroup.remove(one, RULES, host)) == r.REAPED


@needs_cgroups
def test_row_14_a_cgroup_made_again_with_the_same_name_is_another_one(parent, host):
    path = parent.make("vabc")
    one = token(host, path)
    os.rmdir(path)
    parent.make("vabc")
    process = parent.start(path)
    for act in (cgroup.inspect, cgroup.stop, cgroup.remove):
        assert result(act(dict(one, stop=act is cgroup.stop), RULES, host)) == r.IDENTITY_CHANGED
    assert process.poll() is None


@needs_cgroups
def test_a_cgroup_made_again_while_it_is_removed_stays(parent, host, monkeypatch):
    path = parent.make("vabc")
    parent.make("vabc/inner")
    one = token(host, path)
    descendants = cgroup._descendants

    def made_again(held):
        below = descendants(held)
        if held.startswith("/proc/self/fd") and os.path.exists(path + "/inner") and made_again.armed:
            os.rmdir(path + "/inner")
            os.rmdir(path)
            parent.make("vabc")
            made_again.armed = False
            return []
        return below

    made_again.armed = False
    monkeypatch.setattr(cgroup, "_descendants", made_again)
    monkeypatch.setattr(cgroup, "_refusal", lambda *_arguments: setattr(made_again, "armed", True))
    assert result(cgroup.remove(one, RULES, host)) == r.IDENTITY_CHANGED
    assert os.path.isdir(path)


@needs_cgroups
def test_a_process_that_was_listed_but_is_not_in_it_any_more_is_not_killed(parent):
    path, elsewhere = parent.make("vabc"), parent.make("vother")
    process = parent.start(elsewhere)
    cgroup._kill_members([process.pid], path)
    time.sleep(0.1)
    assert process.poll() is None


@needs_cgroups
def test_another_vms_cgroup_below_it_protects_it(parent, host):
    path = parent.make("vabc")
    inner = parent.make("vabc/shared/vother")
    expected = [r.holder("other_vm", inner)]
    assert collected(host)[path]["holders"] == expected
    one = token(host, path)
    for act in (cgroup.inspect, cgroup.stop, cgroup.remove):
        outcome = act(dict(one, stop=act is cgroup.stop), RULES, host)
        assert (outcome["outcome"], outcome["holders"]) == (r.DEFERRED, expected)
    assert os.path.isdir(inner)


@needs_cgroups
def test_row_16_systemds_units_are_never_removed(parent, host):
    rules = [{"root": ROOT, "name": "(?P<vm_id>v[a-z]+)[.]scope"}]
    path = parent.make("vabc.scope")
    one = token(host, path, rules)
    assert collected(host, rules)[path]["holders"] == [r.holder("systemd_unit", "vabc.scope")]
    assert result(cgroup.remove(one, rules, host)) == r.DEFERRED
    assert os.path.isdir(path)


@needs_cgroups
@pytest.mark.parametrize("who", ["itself", "its ancestor"])
@pytest.mark.parametrize("namespace", [cgroup.INITIAL_NAMESPACE, 0], ids=["initial", "other"])
def test_row_16_the_reaper_never_kills_the_cgroup_that_it_or_an_ancestor_is_in(
    parent, host, who, namespace, monkeypatch
):
    monkeypatch.setattr(cgroup, "INITIAL_NAMESPACE", namespace)
    path = parent.make("vabc")
    inner = parent.make("vabc/inner")
    one = dict(token(host, path), stop=True)

    def sweep(_item):
        if who == "itself":
            put(os.getpid(), inner)
            return [collected(host)[path]["holders"], cgroup.stop(one, RULES, host)]
        put(os.getpid(), inner)
        child = Worker(
            lambda _item: (
                put(os.getpid(), os.path.dirname(parent.path))
                or [collected(host)[path]["holders"], cgroup.stop(one, RULES, host)]
            )
        )
        return child.call(None, 10)

    worker = Worker(sweep)
    try:
        holders, outcome = worker.call(None, 10)
    finally:
        worker.abandon()
    assert holders == [r.holder("reaper", path)]
    assert (outcome["outcome"], outcome["holders"]) == (r.DEFERRED, holders)


@needs_cgroups
def test_row_36_hostile_names_are_foreign(parent, host):
    rules = [{"root": ROOT, "name": "(?P<vm_id>.*)"}]
    hostile = ["a b", "a'b", 'a"b', "$(reboot)", "{{ x }}", "-rf", "a\tb", "\u202ea", "a" * 200, os.fsdecode(b"v\xff")]
    for name in hostile:
        parent.make(name)
    parent.make("good")
    found = cgroup.collect(rules, host)
    assert [one["vm_id"] for one in found["resources"]] == ["good"]
    assert found["foreign"] == len(hostile)
    for name in hostile:
        one = {"kind": "cgroup", "name": os.path.join(parent.path, name), "vm_id": name, "identity": "x", "stop": True}
        assert result(cgroup.stop(one, rules, host)) == r.FAILED


@needs_cgroups
@pytest.mark.parametrize("tail", ["", "/", "/..", "/.", "/vabc/", "/vabc/vinner", "/../vabc", "/x/../vabc", "//vabc"])
def test_a_token_is_acted_on_only_by_its_own_name_right_below_a_root(parent, host, tail):
    parent.make("vabc/vinner")
    for vm_id in ("vabc", "vinner", "..", ".", ""):
        one = {"kind": "cgroup", "name": parent.path + tail, "vm_id": vm_id, "identity": "x", "stop": False}
        assert result(cgroup.remove(one, [{"root": ROOT, "name": "(?P<vm_id>.*)"}], host)) == r.FAILED


@needs_cgroups
def test_a_token_of_another_vm_is_refused(parent, host):
    one = dict(token(host, parent.make("vabc")), vm_id="vother")
    assert result(cgroup.remove(one, RULES, host)) == r.FAILED


@needs_cgroups
def test_row_38_what_vanishes_between_listing_and_reading_is_not_an_error(parent, host, monkeypatch):
    listed = cgroup._directories
    path = parent.make("vabc")

    def vanishing(directory):
        found = listed(directory)
        if directory == parent.path and os.path.exists(path):
            os.rmdir(path)
        return found

    monkeypatch.setattr(cgroup, "_directories", vanishing)
    assert cgroup.collect(RULES, host)["resources"] == []


@needs_cgroups
def test_what_vanishes_while_it_is_inspected_is_gone(parent, host, monkeypatch):
    path = parent.make("vabc")
    one = token(host, path)
    populated = cgroup._populated
    monkeypatch.setattr(cgroup, "_populated", lambda *where: os.rmdir(path) or populated(*where))
    assert result(cgroup.inspect(one, RULES, host)) in (None, r.ALREADY_GONE)
    assert result(cgroup.remove(one, RULES, host)) == r.ALREADY_GONE


@needs_cgroups
def test_a_child_that_somebody_else_removes_meanwhile_is_no_proof_that_all_is_gone(parent, host, monkeypatch):
    path = parent.make("vabc")
    one = token(host, path)
    descendants = cgroup._descendants
    listings = []

    def listed(held):
        listings.append(held)
        return descendants(held) + ([held + "/gone"] if len(listings) in (2, 3) else [])

    monkeypatch.setattr(cgroup, "_descendants", listed)
    assert result(cgroup.remove(one, RULES, host)) == r.REAPED
    assert not os.path.exists(path)


@needs_cgroups
def test_a_file_that_is_missing_is_no_proof_that_the_cgroup_is_gone(parent, host, monkeypatch):
    path = parent.make("vabc")
    one = token(host, path)

    def missing(path, *limit):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", path)

    monkeypatch.setattr(cgroup, "_populated", missing)
    with pytest.raises(FileNotFoundError):
        cgroup.remove(one, RULES, host)
    assert os.path.isdir(path)


@needs_cgroups
def test_a_cgroup_that_cannot_be_read_is_not_empty(parent, host, monkeypatch):
    parent.make("vabc")

    def unreadable(path, *limit):
        raise OSError(errno.EIO, "Input/output error", path)

    for reader in ("read_text", "read_once"):
        monkeypatch.setattr(cgroup, reader, unreadable)
    with pytest.raises(OSError, match="Input/output"):
        cgroup.collect(RULES, host)


@needs_cgroups
def test_a_root_that_is_not_there_has_no_resources(host):
    assert cgroup.collect([{"root": "microvm-reaper-not-there", "name": "(?P<vm_id>.*)"}], host) == {
        "resources": [],
        "foreign": 0,
    }


@pytest.mark.parametrize("root", ["", "/", "..", "a/../b", "a//b", "./a"])
def test_a_root_must_name_a_cgroup(root):
    with pytest.raises(r.RuleError, match="root"):
        cgroup.collect([{"root": root, "name": "(?P<vm_id>.*)"}], None)


def test_the_hierarchies_of_a_hybrid_machine():
    table = mounts.parse((CAPTURES / "mountinfo-linux-6.18-hybrid.txt").read_text())
    v1 = ["cpu", "cpuacct", "cpuset", "memory", "devices", "freezer", "blkio", "pids", "systemd"]
    expected = [("/sys/fs/cgroup/" + name, 1) for name in v1] + [("/sys/fs/cgroup/unified", 2)]
    assert cgroup.cgroup_mounts(table) == expected


def test_a_hierarchy_mounted_twice_counts_once_and_what_is_hidden_not_at_all():
    line = "%d 1 0:%d %s %s rw - cgroup2 cgroup2 rw\n"
    text = line % (1, 26, "/", "/sys/fs/cgroup") + line % (2, 26, "/", "/mnt/again")
    assert cgroup.cgroup_mounts(mounts.parse(text)) == [("/sys/fs/cgroup", 2)]
    text = line % (1, 26, "/../..", "/sys/fs/cgroup") + line % (2, 26, "/", "/sys/fs/cgroup")
    assert cgroup.cgroup_mounts(mounts.parse(text)) == [("/sys/fs/cgroup", 2)]
    assert mounts.parse(text)[0].root == "/../.."


def test_without_cgroups_the_kind_is_absent():
    with pytest.raises(Absent):
        cgroup.cgroup_mounts(mounts.parse("1 1 0:1 / / rw - ext4 /dev/vda rw\n"))


@needs_cgroups
def test_a_witness_tells_how_it_was_used_and_what_is_in_it(parent, host):
    path = parent.make("vabc")
    process = parent.start(parent.make("vabc/inner"))
    (told,) = cgroup.witness(token(host, path), RULES, host)
    assert (told["title"], told["source"]) == ("cgroup", path)
    wanted = "== cgroup.events\npopulated 1\n" if parent.version == 2 else "== cgroup.procs\n"
    assert wanted in told["text"]
    while processes.stat(process.pid)[1:3] != ("sleep", "S"):
        time.sleep(0.01)
    (told,) = cgroup.witness(token(host, path), RULES, host)
    assert "== process %d sleep state S: sleep 60\n" % process.pid in told["text"]
    assert not process.poll()


@needs_cgroups
def test_a_cgroup_made_again_is_no_evidence(parent, host):
    path = parent.make("vabc")
    old = token(host, path)
    os.rmdir(path)
    parent.make("vabc")
    with pytest.raises(ProbeError, match="another cgroup"):
        cgroup.witness(old, RULES, host)
    with pytest.raises(ProbeError, match="not below"):
        cgroup.witness(dict(old, name=parent.path), RULES, host)
