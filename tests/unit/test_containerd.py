# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The kinds container and snapshot: on what real daemons answered, and against one that we can make do anything."""

from __future__ import annotations

import base64
import json
import os
import pathlib
import time

import pytest
from ansible_collections.microvm.reaper.plugins.module_utils import containerd, grpc
from ansible_collections.microvm.reaper.plugins.module_utils.kinds import container, snapshot
from ansible_collections.microvm.reaper.plugins.module_utils.probe import Absent, ProbeError
from ansible_collections.microvm.reaper.plugins.module_utils.protobuf import decode, encode
from ansible_collections.microvm.reaper.plugins.module_utils.resource import RuleError

CAPTURES = pathlib.Path(__file__).parent / "captures"
# What was asked was the same of both: four containers by `ctr run` and `ctr containers create`, one each running,
# paused, stopped and without a task; snapshots by `ctr snapshots prepare`, commit and view; one in a lease.
VERSIONS = {"containerd-1.6.20": "cap", "containerd-1.7.24": "rtcap", "containerd-2.1.9": "cap2"}
HOSTILE = 'we ird"\n$(x) {{ y }} é'
VM = r"vm-(?P<vm_id>[a-z]+)"


class Host:
    """A host on which nothing takes time."""

    def remaining(self):
        return 60.0


class Fake:
    """Stands for a daemon at the level of messages. ``answer`` is ``f(call, request, namespace) -> messages``."""

    def __init__(self, answer):
        self.answer = answer
        self.calls = []
        self.opened = 0
        self.usable = False

    def __call__(self, path, timeout):
        self.opened += 1
        self.usable = True
        return self

    def is_usable(self):
        return self.usable

    def forget(self):
        self.usable = False

    def call(self, method, request, timeout, metadata=()):
        assert method.startswith("containerd.services.")
        call = method[len("containerd.services.") :]
        self.calls.append(call)
        yield from self.answer(call, request, dict(metadata)["containerd-namespace"])


@pytest.fixture
def daemon(monkeypatch, tmp_path):
    """Return a function that puts a Fake at an address and returns both."""

    def make(answer):
        fake = Fake(answer)
        monkeypatch.setattr(grpc, "Connection", fake)
        monkeypatch.setattr(containerd, "_connections", {})
        return fake, str(tmp_path / "containerd.sock")

    return make


@pytest.fixture(params=sorted(VERSIONS))
def captured(request, daemon):
    """A daemon that answers what a real one did; its address and namespace."""
    answers = json.loads((CAPTURES / (request.param + ".json")).read_text())

    def answer(call, message, namespace):
        assert namespace == VERSIONS[request.param]
        return [base64.b64decode(one) for one in answers["%s %s" % (call, message.hex())]]

    fake, address = daemon(answer)
    return fake, {"namespace": VERSIONS[request.param], "address": address}


def by_name(found):
    return {one["name"].split("/", 1)[1]: one for one in found["resources"]}


def test_containers_of_a_real_daemon(captured):
    fake, place = captured
    found = container.collect([dict(place, name=VM)], Host())
    assert found["foreign"] == 0
    listed = by_name(found)
    assert {name: (one["vm_id"], one["in_use"], "pid" in one["details"]) for name, one in listed.items()} == {
        "vm-run": ("run", True, True),
        "vm-pause": ("pause", True, True),
        "vm-stop": ("stop", False, True),
        "vm-idle": ("idle", False, False),
    }
    assert fake.calls == ["containers.v1.Containers/ListStream", "tasks.v1.Tasks/List"]
    one = listed["vm-run"]
    namespace = place["namespace"]
    assert one["name"] == namespace + "/vm-run"
    before, nanoseconds = one["identity"].split(".")
    assert before.rpartition("/")[0] == namespace + "/vm-run" and len(nanoseconds) == 9
    assert one["details"]["snapshot_key"] == "vm-run" and one["details"]["snapshotter"] == "overlayfs"
    assert one["holders"] == [] and one["bytes"] is None and one["parent"] is None


def test_the_label_of_a_real_container(captured):
    _fake, place = captured
    found = container.collect([dict(place, label="vm")], Host())
    assert [(one["name"].split("/")[1], one["vm_id"]) for one in found["resources"]] == [("vm-run", "lab")]
    assert found["foreign"] == 3


def test_snapshots_of_a_real_daemon(captured):
    fake, place = captured
    rules = [
        dict(place, name=VM),
        dict(place, name="(?P<vm_id>obuilder-[0-9]+)(-committed)?", pinned=True),
        dict(place, name="(?P<vm_id>leased)"),
        dict(place, name="(?P<vm_id>sha256:.*)"),
        dict(place, name="(?s)(?P<vm_id>we).*"),
    ]
    found = snapshot.collect(rules, Host())
    listed = by_name(found)
    names = {name.partition("/")[2] for name in listed}
    image = next(name for name in names if name.startswith("sha256:"))
    assert names == {
        "vm-run", "vm-pause", "vm-stop", "vm-idle", "obuilder-1-committed", "obuilder-2", "leased", image
    }  # fmt: skip
    assert HOSTILE not in json.dumps(found)
    full = place["namespace"] + "/overlayfs/"
    holders = {name.partition("/")[2]: one["holders"] for name, one in listed.items()}
    assert holders["vm-run"] == [{"type": "container", "name": place["namespace"] + "/vm-run", "kind": "container"}]
    assert {"type": "child", "name": full + "obuilder-2", "kind": "snapshot"} in holders["obuilder-1-committed"]
    assert holders["obuilder-2"] == []
    assert holders["leased"] == [{"type": "lease", "name": "night"}, {"type": "label", "name": "containerd.io/gc.root"}]
    assert [one["type"] for one in holders[image]] == ["child"] * 4 + ["image"]
    assert listed["overlayfs/obuilder-2"]["parent"] == full + "obuilder-1-committed"
    assert listed["overlayfs/obuilder-1-committed"]["parent"] is None
    assert listed["overlayfs/obuilder-1-committed"]["identity"].endswith(":committed:")
    assert listed["overlayfs/obuilder-2"]["identity"].endswith(":active:obuilder-1-committed")
    assert len(fake.calls) == 5  # whatever their number; one more for each further lease


def test_hostile_snapshot_keys_never_match(captured):
    _fake, place = captured
    found = snapshot.collect([dict(place, name="(?s)(?P<vm_id>we).*")], Host())
    assert found["resources"] == []


class World:
    """The state of a daemon, changed by the calls we make."""

    def __init__(self):
        self.containers, self.tasks, self.snapshots, self.leases, self.blobs = {}, {}, {}, {}, []
        self.mounts = []
        self.done = []
        self.on = {}  # call -> a function to be called before it
        self.dies = True

    def add_container(self, name, seconds=1000, status=None, labels=None, key=""):
        self.containers[name] = {
            "id": name,
            "labels": labels or {},
            "snapshotter": "overlayfs",
            "snapshot_key": key,
            "created_at": {"seconds": seconds, "nanos": 5},
        }
        if status:
            self.tasks[name] = {"id": name, "pid": 42, "status": status}

    def add_snapshot(self, name, parent="", kind=2, seconds=1000, labels=None):
        created = {"seconds": seconds, "nanos": 5}
        self.snapshots[name] = {
            "name": name, "parent": parent, "kind": kind, "created_at": created, "labels": labels or {}
        }  # fmt: skip

    def answer(self, call, message, namespace):
        service, _slash, method = call.partition("/")
        if namespace != "vms":
            return [b""] if call in ("tasks.v1.Tasks/List", "leases.v1.Leases/List") else []
        self.on.pop(call, lambda: None)()
        ask, tell = containerd.CALLS[call]
        answers = getattr(self, service.split(".")[0] + "_" + method.lower())(decode(ask, message))
        return [encode(tell, one) for one in answers]

    @staticmethod
    def find(table, key):
        if key not in table:
            raise grpc.NotFound("%s: not found" % key)
        return table[key]

    def containers_liststream(self, _ask):
        return [{"container": one} for one in self.containers.values()]

    def containers_get(self, ask):
        return [{"container": self.find(self.containers, ask["id"])}]

    def containers_delete(self, ask):
        self.find(self.containers, ask["id"])
        self.done.append("delete container " + ask["id"])
        del self.containers[ask["id"]]
        return [{}]

    def tasks_list(self, _ask):
        return [{"tasks": list(self.tasks.values())}]

    def tasks_get(self, ask):
        return [{"process": self.find(self.tasks, ask["container_id"])}]

    def tasks_kill(self, ask):
        task = self.find(self.tasks, ask["container_id"])
        self.done.append("kill %s %d %d" % (ask["container_id"], ask["signal"], ask["all"]))
        if self.dies and task["status"] != containerd.PAUSED:
            task["status"] = containerd.STOPPED
        return [{}]

    def tasks_resume(self, ask):
        self.done.append("resume " + ask["container_id"])
        self.find(self.tasks, ask["container_id"])["status"] = containerd.STOPPED
        return [{}]

    def tasks_delete(self, ask):
        if self.find(self.tasks, ask["container_id"])["status"] != containerd.STOPPED:
            raise grpc.FailedPrecondition("task must be stopped before deletion")
        self.done.append("delete task " + ask["container_id"])
        del self.tasks[ask["container_id"]]
        return [{}]

    def snapshots_list(self, ask):
        return [{"info": list(self.snapshots.values())}] if ask["snapshotter"] == "overlayfs" else [{}]

    def snapshots_stat(self, ask):
        return [{"info": self.find(self.snapshots, ask["key"])}]

    def snapshots_mounts(self, ask):
        self.find(self.snapshots, ask["key"])
        return [{"mounts": self.mounts}]

    def snapshots_usage(self, ask):
        self.find(self.snapshots, ask["key"])
        return [{"size": 4096}]

    def snapshots_remove(self, ask):
        if any(one["parent"] == ask["key"] for one in self.snapshots.values()):
            raise grpc.FailedPrecondition("cannot remove snapshot with child")
        self.find(self.snapshots, ask["key"])
        self.done.append("remove snapshot " + ask["key"])
        del self.snapshots[ask["key"]]
        return [{}]

    def leases_list(self, _ask):
        return [{"leases": [{"id": name} for name in self.leases]}]

    def leases_listresources(self, ask):
        return [{"resources": self.find(self.leases, ask["id"])}]

    def content_list(self, _ask):
        return [{"info": self.blobs}]


@pytest.fixture
def world(daemon):
    one = World()
    one.fake, one.address = daemon(one.answer)
    one.place = {"namespace": "vms", "address": one.address}
    return one


def token(world, kind, rules, name, stop=False):
    found = [one for one in kind.collect(rules, Host())["resources"] if one["name"] == name]
    assert len(found) == 1
    return dict({key: found[0][key] for key in ("kind", "name", "vm_id", "identity", "details")}, stop=stop)


def result(found):
    return found and (found["outcome"], [(one["type"], one["name"]) for one in found["holders"]])


# --- containers


@pytest.mark.parametrize(
    ("status", "in_use"), [(None, False), (1, True), (2, True), (3, False), (4, True), (5, True), (9, True)]
)
def test_a_task_that_is_not_stopped_is_in_use(world, status, in_use):
    world.add_container("vm-a", status=status)
    (one,) = container.collect([dict(world.place, name=VM)], Host())["resources"]
    assert one["in_use"] is in_use


def test_a_task_whose_shim_does_not_tell_is_in_use(world):
    world.add_container("vm-a", status=2)
    world.tasks["vm-a"]["status"] = 0
    (one,) = container.collect([dict(world.place, name=VM)], Host())["resources"]
    assert one["in_use"]


def test_a_task_that_starts_between_the_two_lists_is_seen(world):
    world.add_container("vm-a")
    world.on["tasks.v1.Tasks/List"] = lambda: world.add_container("vm-a", status=2)
    (one,) = container.collect([dict(world.place, name=VM)], Host())["resources"]
    assert one["in_use"]


def test_age(world):
    world.add_container("vm-old", seconds=int(time.time()) - 100)
    world.add_container("vm-future", seconds=int(time.time()) + 100)
    world.add_container("vm-zero", seconds=-62135596800)
    found = container.collect([dict(world.place, name=VM)], Host())["resources"]
    ages = {one["vm_id"]: one["age_seconds"] for one in found}
    assert 99 <= ages["old"] <= 110
    assert ages["future"] is None and ages["zero"] is None


def test_a_namespace_that_does_not_exist_is_empty(world):
    world.add_container("vm-a")
    for kind in (container, snapshot):
        rules = [dict(world.place, namespace="other", name=VM)]
        assert kind.collect(rules, Host()) == {"resources": [], "foreign": 0}


def test_rules_hold_for_their_namespace_only(world):
    world.add_container("vm-a")
    rules = [dict(world.place, namespace="other", name=VM), dict(world.place, name="(?P<vm_id>x)")]
    assert container.collect(rules, Host()) == {"resources": [], "foreign": 1}


def test_inspect_and_remove_a_container(world):
    rules = [dict(world.place, name=VM)]
    world.add_container("vm-a")
    one = token(world, container, rules, "vms/vm-a")
    assert container.inspect(one, rules, Host()) is None
    assert result(container.remove(one, rules, Host())) == ("reaped", [])
    assert world.done == ["delete container vm-a"]
    for act in (container.inspect, container.remove):
        assert result(act(one, rules, Host())) == ("already_gone", [])
    assert container.stop(one, rules, Host()) is None


def test_a_running_container_is_not_removed(world):
    rules = [dict(world.place, name=VM)]
    world.add_container("vm-a", status=containerd.RUNNING)
    one = token(world, container, rules, "vms/vm-a", stop=True)
    assert container.inspect(one, rules, Host()) is None
    world.fake.calls.clear()
    for act, changed in ((container.inspect, dict(one, stop=False)), (container.remove, one)):
        assert result(act(changed, rules, Host())) == ("deferred", [("process", "42")])
    assert set(world.fake.calls) == {"containers.v1.Containers/Get", "tasks.v1.Tasks/Get"}


def test_a_task_started_right_before_the_removal_is_not_killed(world):
    rules = [dict(world.place, name=VM)]
    world.add_container("vm-a", status=containerd.STOPPED)
    one = token(world, container, rules, "vms/vm-a")
    world.on["tasks.v1.Tasks/Delete"] = lambda: world.add_container("vm-a", status=containerd.RUNNING)
    assert result(container.remove(one, rules, Host())) == ("deferred", [("process", "42")])
    assert world.done == []


@pytest.mark.parametrize("status", [containerd.CREATED, containerd.RUNNING, containerd.PAUSED, containerd.STOPPED])
def test_stop_and_remove(world, status):
    rules = [dict(world.place, name=VM)]
    world.add_container("vm-a", status=status)
    one = token(world, container, rules, "vms/vm-a", stop=True)
    assert container.stop(one, rules, Host()) is None
    assert result(container.remove(one, rules, Host())) == ("reaped", [])
    kill = [] if status == containerd.STOPPED else ["kill vm-a 9 1"]
    resume = ["resume vm-a"] if status == containerd.PAUSED else []
    assert world.done == kill + resume + ["delete task vm-a", "delete container vm-a"]


def test_a_paused_task_that_the_kill_thaws(world):
    """runc 1.1.15 does: then the task cannot be resumed, and says for a moment that it is paused."""
    rules = [dict(world.place, name=VM)]
    world.add_container("vm-a", status=containerd.PAUSED)
    one = token(world, container, rules, "vms/vm-a", stop=True)

    def thawed():
        world.tasks["vm-a"]["status"] = containerd.STOPPED
        raise grpc.CallError("container not paused")

    world.on["tasks.v1.Tasks/Resume"] = thawed
    assert container.stop(one, rules, Host()) is None
    assert world.done == ["kill vm-a 9 1", "delete task vm-a"]


def test_a_task_that_does_not_die(world, monkeypatch):
    monkeypatch.setattr(container, "STOP_SECONDS", 0.1)
    rules = [dict(world.place, name=VM)]
    world.add_container("vm-a", status=containerd.RUNNING)
    world.dies = False
    one = token(world, container, rules, "vms/vm-a", stop=True)
    assert result(container.stop(one, rules, Host())) == ("deferred", [("process", "42")])
    assert world.done == ["kill vm-a 9 1"]


def test_row_26_a_container_created_again_is_another_one(world):
    rules = [dict(world.place, name=VM)]
    world.add_container("vm-a", status=containerd.RUNNING)
    one = token(world, container, rules, "vms/vm-a", stop=True)
    world.add_container("vm-a", seconds=1001)
    for act in (container.inspect, container.stop, container.remove):
        assert result(act(one, rules, Host())) == ("identity_changed", [])
    assert world.done == []


def test_the_nanosecond_counts(world):
    rules = [dict(world.place, name=VM)]
    world.add_container("vm-a")
    one = token(world, container, rules, "vms/vm-a")
    world.containers["vm-a"]["created_at"]["nanos"] = 6
    assert result(container.remove(one, rules, Host())) == ("identity_changed", [])


@pytest.mark.parametrize(
    "rules",
    [
        [],
        [{"namespace": "vms", "name": VM}],
        [{"namespace": "vms", "name": VM, "address": "/elsewhere/containerd.sock"}],
    ],
)
def test_a_token_of_no_rule_is_refused(world, rules):
    world.add_container("vm-a")
    one = token(world, container, [dict(world.place, name=VM)], "vms/vm-a")
    for act in (container.inspect, container.stop, container.remove):
        assert result(act(one, rules, Host())) == ("failed", [])
    assert world.done == []


def test_a_token_must_name_the_vm_that_the_rules_give(world):
    rules = [dict(world.place, name=VM)]
    world.add_container("vm-a", labels={"vm": "b"})
    one = token(world, container, rules, "vms/vm-a")
    for changed, by in ((dict(one, vm_id="b"), rules), (one, [dict(world.place, label="vm")])):
        for act in (container.inspect, container.stop, container.remove):
            assert result(act(changed, by, Host())) == ("failed", [])
    assert world.done == []


def test_a_pinned_container_is_held(world):
    rules = [dict(world.place, name=VM)]
    world.add_container("vm-a", labels={"containerd.io/gc.root": "now"})
    (found,) = container.collect(rules, Host())["resources"]
    assert found["holders"] == [{"type": "label", "name": "containerd.io/gc.root"}]
    one = token(world, container, rules, "vms/vm-a")
    assert result(container.remove(one, rules, Host())) == ("deferred", [("label", "containerd.io/gc.root")])
    assert world.done == []


# --- snapshots


def test_row_25_everything_that_refers_to_a_snapshot_holds_it(world):
    rules = [dict(world.place, name="(?P<vm_id>s[0-9])")]
    for number in range(8):
        world.add_snapshot("s%d" % number, kind=3)
    world.add_container("box", key="s0")
    world.add_snapshot("kid", parent="s1")
    world.leases = {"night": [{"id": "s2", "type": "snapshots/overlayfs"}, {"id": "s7", "type": "snapshots/zfs"}]}
    world.snapshots["s3"]["labels"] = {"containerd.io/gc.root": "now"}
    label = "containerd.io/gc.ref.snapshot.overlayfs"
    world.blobs = [{"digest": "sha256:1", "labels": {label: "s4"}}]
    world.add_container("other", labels={label + "/x": "s5", label + "er": "s7"})
    world.snapshots["s6"]["labels"] = {label: "s0"}
    found = {one["vm_id"]: result(dict(one, outcome="")) for one in snapshot.collect(rules, Host())["resources"]}
    assert {name: holders for name, (_outcome, holders) in found.items()} == {
        "s0": [("container", "vms/box"), ("child", "vms/overlayfs/s6")],
        "s1": [("child", "vms/overlayfs/kid")],
        "s2": [("lease", "night")],
        "s3": [("label", "containerd.io/gc.root")],
        "s4": [("image", "sha256:1")],
        "s5": [("container", "vms/other")],
        "s6": [],
        "s7": [],
    }
    for number in range(6):
        one = token(world, snapshot, rules, "vms/overlayfs/s%d" % number)
        assert result(snapshot.remove(one, rules, Host())) == ("deferred", found["s%d" % number][1])
    assert world.done == []


def test_remove_leaf_first(world):
    rules = [dict(world.place, name="(?P<vm_id>v)(/.*)?")]
    world.add_snapshot("v/1/base", kind=3)
    world.add_snapshot("v/1", parent="v/1/base")
    base, leaf = (token(world, snapshot, rules, "vms/overlayfs/" + key) for key in ("v/1/base", "v/1"))
    assert result(snapshot.remove(base, rules, Host())) == ("deferred", [("child", "vms/overlayfs/v/1")])
    for one in (leaf, base):
        found = snapshot.remove(one, rules, Host())
        assert result(found) == ("reaped", []) and found["bytes"] == 4096
    assert world.done == ["remove snapshot v/1", "remove snapshot v/1/base"]
    assert result(snapshot.remove(leaf, rules, Host())) == ("already_gone", [])
    assert world.fake.opened == 1


def test_a_child_made_right_before_the_removal_holds(world):
    rules = [dict(world.place, name="(?P<vm_id>s)")]
    world.add_snapshot("s", kind=3)
    one = token(world, snapshot, rules, "vms/overlayfs/s")
    world.on["snapshots.v1.Snapshots/Remove"] = lambda: world.add_snapshot("kid", parent="s")
    found = snapshot.remove(one, rules, Host())
    assert result(found) == ("deferred", [("child", "vms/overlayfs/kid")])
    assert found["message"] == "cannot remove snapshot with child"


def test_a_snapshot_that_containerd_collects_meanwhile_is_gone(world):
    rules = [dict(world.place, name="(?P<vm_id>s)")]
    world.add_snapshot("s")
    one = token(world, snapshot, rules, "vms/overlayfs/s")
    for call in ("Mounts", "Remove"):
        world.add_snapshot("s")
        world.on["snapshots.v1.Snapshots/" + call] = world.snapshots.clear
        assert snapshot.remove(one, rules, Host())["outcome"] == "already_gone"


@pytest.mark.parametrize("changed", [{"seconds": 1001}, {"kind": 3}, {"parent": "other"}])
def test_another_snapshot_of_the_same_key(world, changed):
    rules = [dict(world.place, name="(?P<vm_id>s)")]
    world.add_snapshot("s")
    one = token(world, snapshot, rules, "vms/overlayfs/s")
    world.add_snapshot("s", **changed)
    assert result(snapshot.remove(one, rules, Host())) == ("identity_changed", [])
    assert world.done == []


def test_a_snapshot_of_another_snapshotter_is_not_ours(world):
    rules = [dict(world.place, name="(?P<vm_id>s)")]
    world.add_snapshot("s")
    one = token(world, snapshot, rules, "vms/overlayfs/s")
    for by in ([dict(rules[0], snapshotter="zfs")], [dict(rules[0], name="(?P<vm_id>t)")], [dict(rules[0], label="x")]):
        assert result(snapshot.remove(one, by, Host())) == ("failed", [])
    assert world.done == []


def test_rules_hold_for_their_snapshotter_only(world):
    world.add_snapshot("s")
    rules = [dict(world.place, name="(?P<vm_id>other)"), dict(world.place, name="(?P<vm_id>s)", snapshotter="zfs")]
    assert snapshot.collect(rules, Host()) == {"resources": [], "foreign": 1}


def test_a_mounted_snapshot_is_held(world, monkeypatch):
    rules = [dict(world.place, name="(?P<vm_id>s)")]
    world.add_snapshot("s")
    world.mounts = [{"type": "overlay", "source": "overlay", "options": ["lowerdir=/l", "upperdir=/snap/5/fs"]}]
    mountinfo = "1 0 0:1 / /mnt/vm\\040x rw - overlay overlay rw,lowerdir=/l,upperdir=/snap/5/fs,workdir=/w\n"
    monkeypatch.setattr(snapshot, "read_text", lambda _path, _limit: mountinfo)
    one = token(world, snapshot, rules, "vms/overlayfs/s")
    assert result(snapshot.remove(one, rules, Host())) == ("deferred", [("mount", "/mnt/vm\\040x")])


def test_mount_points():
    mountinfo = (
        "22 1 0:21 / /proc rw shared:5 - proc proc rw\n"
        "90 1 0:50 / /a rw - overlay overlay rw,lowerdir=/l1:/l2,upperdir=/s/1/fs,workdir=/s/1/work\n"
        "91 1 0:51 / /b rw - overlay overlay rw,upperdir=/s/11/fs\n"
        "92 1 254:3 / /c rw shared:1 master:2 - ext4 /dev/mapper/pool-snap-3 rw\n"
        "garbage\n - \n"
    )
    assert snapshot.mount_points(mountinfo, {"upperdir=/s/1/fs"}) == ["/a"]
    assert snapshot.mount_points(mountinfo, {"/dev/mapper/pool-snap-3"}) == ["/c"]
    assert snapshot.mount_points(mountinfo, set()) == []


def test_a_mount_is_found_by_a_name_that_the_kernel_has_to_escape():
    mountinfo = "90 1 0:50 / /a rw - overlay over\\011lay rw,upperdir=/the\\040disk/s/1\\134x/fs\n"
    assert snapshot.mount_points(mountinfo, {"upperdir=/the disk/s/1\\x/fs"}) == ["/a"]
    assert snapshot.mount_points(mountinfo, {"over\tlay"}) == ["/a"]


def test_usage_that_cannot_be_told_does_not_hinder(world):
    rules = [dict(world.place, name="(?P<vm_id>s)")]
    world.add_snapshot("s")
    one = token(world, snapshot, rules, "vms/overlayfs/s")

    def fail():
        raise ProbeError("no answer in time")

    world.on["snapshots.v1.Snapshots/Usage"] = fail
    found = snapshot.remove(one, rules, Host())
    assert result(found) == ("reaped", []) and found["bytes"] == 0


def test_a_lease_that_ends_meanwhile_is_no_error(world):
    world.add_snapshot("s")
    world.leases = {"night": []}
    world.on["leases.v1.Leases/ListResources"] = world.leases.clear
    assert len(snapshot.collect([dict(world.place, name="(?P<vm_id>s)")], Host())["resources"]) == 1


@pytest.mark.parametrize(
    "failing", ["containers.v1.Containers/ListStream", "leases.v1.Leases/List", "content.v1.Content/List"]
)
def test_what_cannot_be_listed_is_not_empty(world, failing):
    rules = [dict(world.place, name="(?P<vm_id>s)")]
    world.add_snapshot("s")
    one = token(world, snapshot, rules, "vms/overlayfs/s")

    def fail():
        raise ProbeError("unavailable")

    for act in (lambda: snapshot.collect(rules, Host()), lambda: snapshot.remove(one, rules, Host())):
        world.on[failing] = fail
        with pytest.raises(ProbeError):
            act()
    assert world.done == []


def test_row_37_the_number_of_objects_is_bounded(world, monkeypatch):
    monkeypatch.setattr(containerd, "MAX_OBJECTS", 10)
    for number in range(11):
        world.add_container("vm-%d" % number)
        world.add_snapshot("vm-%d" % number)
    for kind in (container, snapshot):
        with pytest.raises(ProbeError, match="more than 10 objects"):
            kind.collect([dict(world.place, name=VM)], Host())


# --- where, and whether anybody is there


def test_row_39_no_socket_and_no_directory_is_absent(tmp_path):
    for kind in (container, snapshot):
        with pytest.raises(Absent):
            kind.collect([{"namespace": "vms", "name": VM, "address": str(tmp_path / "none" / "c.sock")}], Host())


def test_no_socket_in_its_directory_is_unavailable(tmp_path):
    """A daemon that stops removes its socket; its containers run on."""
    for kind in (container, snapshot):
        with pytest.raises(ProbeError) as caught:
            kind.collect([{"namespace": "vms", "name": VM, "address": str(tmp_path / "c.sock")}], Host())
        assert not isinstance(caught.value, Absent)


def test_one_absent_address_does_not_hide_the_other(world, tmp_path):
    world.add_container("vm-a")
    rules = [dict(world.place, name=VM), dict(world.place, name=VM, address=str(tmp_path / "none" / "c.sock"))]
    assert len(container.collect(rules, Host())["resources"]) == 1


def test_no_rules_no_resources():
    for kind in (container, snapshot):
        assert kind.collect([], Host()) == {"resources": [], "foreign": 0}


@pytest.mark.parametrize(
    "rule",
    [
        {"namespace": "vms"},
        {"namespace": "vms", "name": "no group"},
        {"namespace": "vms/x", "name": VM},
        {"namespace": "*", "name": VM},
        {"namespace": "vms", "name": VM, "address": "unix:///run/containerd/containerd.sock"},
    ],
)
def test_rules_that_cannot_be_used(rule):
    with pytest.raises(RuleError):
        container.collect([rule], Host())
    with pytest.raises(RuleError):
        snapshot.collect([dict(rule, snapshotter="overlayfs")], Host())


def test_a_fork_opens_its_own_connection(world):
    """Two processes on one connection would read each other's answers."""
    rules = [dict(world.place, name=VM)]
    container.collect(rules, Host())
    pid = os.fork()
    if pid == 0:
        container.collect(rules, Host())
        os._exit(world.fake.opened)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 2
    assert world.fake.opened == 1
