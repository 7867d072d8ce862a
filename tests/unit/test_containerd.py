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
def captured(request, daemon, monkeypatch):
    """A daemon that answers what a real one did, at that time; its address and namespace."""
    monkeypatch.setattr(containerd.time, "time", lambda: 1_795_330_000.0)
    answers = json.loads((CAPTURES / (request.param + ".json")).read_text())

    def answer(call, message, namespace):
        assert namespace == VERSIONS[request.param]
        # Recorded with a filter, by a label that we look for ourselves now; and without the images.
        call = next((key for key in answers if call == "content.v1.Content/List" and key.startswith(call)), call)
        if call == "images.v1.Images/List":
            return [b""]
        if call in answers:
            return [base64.b64decode(one) for one in answers[call]]
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
    assert len(fake.calls) == 6  # whatever their number; one more for each further lease


def test_hostile_snapshot_keys_never_match(captured):
    _fake, place = captured
    found = snapshot.collect([dict(place, name="(?s)(?P<vm_id>we).*")], Host())
    assert found["resources"] == []


class World:
    """The state of a daemon, changed by the calls we make."""

    def __init__(self):
        self.containers, self.tasks, self.snapshots, self.leases, self.blobs = {}, {}, {}, {}, []
        self.mounts = []
        self.images, self.expiry, self.strangers = [], {}, []
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
            single = ("tasks.v1.Tasks/List", "leases.v1.Leases/List", "images.v1.Images/List")
            return [b""] if call in single else self.elsewhere(call)
        self.on.pop(call, lambda: None)()
        ask, tell = containerd.CALLS[call]
        answers = getattr(self, service.split(".")[0] + "_" + method.lower())(decode(ask, message))
        return [encode(tell, one) for one in answers]

    def elsewhere(self, call):
        """What the namespace `other` answers."""
        if call == "namespaces.v1.Namespaces/List":
            return [encode(containerd.CALLS[call][1], {"namespaces": [{"name": "vms"}, {"name": "other"}]})]
        ours = call == "containers.v1.Containers/ListStream"
        return [encode(containerd.CALLS[call][1], {"container": one}) for one in self.strangers if ours]

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
        expiry = containerd.GC_EXPIRE
        labels = {one: {expiry: until} for one, until in self.expiry.items()}
        return [{"leases": [{"id": one, "labels": labels.get(one, {})} for one in self.leases]}]

    def leases_create(self, ask):
        assert ask["id"] and containerd.GC_EXPIRE in ask["labels"]
        self.done.append("create lease")
        self.leases[ask["id"]] = []
        return [{"lease": {"id": ask["id"], "labels": {}}}]

    def leases_delete(self, ask):
        assert ask["sync"]
        self.done.append("delete lease, and collect")
        del self.leases[ask["id"]]
        return [{}]

    def images_list(self, _ask):
        return [{"images": self.images}]

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
    monkeypatch.setattr(snapshot.mounts, "text", lambda _pid="self": mountinfo)
    one = token(world, snapshot, rules, "vms/overlayfs/s")
    assert result(snapshot.remove(one, rules, Host())) == ("deferred", [("mount", "/mnt/vm x")])


HERE = (
    "20 1 0:20 / / rw - ext4 /dev/vda rw\n"
    "22 20 0:21 / /proc rw shared:5 - proc proc rw\n"
    "90 20 0:50 / /a\\040b rw - overlay overlay rw,lowerdir=/l1:/l2,upperdir=/s/1/fs,workdir=/s/1/work\n"
    "91 20 0:51 / /b rw - overlay overlay rw,upperdir=/s/11/fs\n"
    "92 20 254:3 / /c rw shared:1 master:2 - ext4 /dev/mapper/pool-snap-3 rw\n"
    "garbage\n - \n"
)
# Another mount namespace: it has pivoted into /elsewhere, and a directory of a snapshot bound to /data.
THERE = "30 1 0:20 /elsewhere / rw - ext4 /dev/vda rw\n31 30 0:20 /s/2/fs/sub /data rw - ext4 /dev/vda rw\n"


def test_mount_points(monkeypatch):
    monkeypatch.setattr(snapshot.mounts, "text", lambda pid="self": THERE if pid == 2 else HERE)
    monkeypatch.setattr(snapshot.processes, "pids", lambda: [1, 2, 3])
    monkeypatch.setattr(snapshot.os, "readlink", lambda path: "mnt:" + ("2" if "/2/" in path else "1"))
    assert snapshot.mount_points({"/s/1"}, set()) == ["/a b"]
    assert snapshot.mount_points({"/s/2"}, set()) == ["/data"]
    assert snapshot.mount_points({"/s/3"}, set()) == []
    assert snapshot.mount_points(set(), {"254:3"}) == ["/c"]
    assert snapshot.mount_points({"/elsewhere"}, set()) == ["/"]
    assert snapshot.mount_points(set(), set()) == []


def test_a_process_that_ends_while_we_look_does_not_hide_those_of_its_namespace(monkeypatch):
    def text(pid="self"):
        if pid == 2:
            raise FileNotFoundError(pid)
        return THERE if pid == 3 else HERE

    monkeypatch.setattr(snapshot.mounts, "text", text)
    monkeypatch.setattr(snapshot.processes, "pids", lambda: [1, 2, 3])
    monkeypatch.setattr(snapshot.os, "readlink", lambda path: "mnt:" + ("2" if "/2/" in path or "/3/" in path else "1"))
    assert snapshot.mount_points({"/s/2"}, set()) == ["/data"]


def test_what_is_mounted_in_a_snapshot_holds_it(monkeypatch):
    """Whoever removes the directory removes what is in it."""
    inside = HERE + "93 20 0:60 / /s/5/fs/mnt rw - tmpfs tmpfs rw\n"
    monkeypatch.setattr(snapshot.mounts, "text", lambda _pid="self": inside)
    assert snapshot.mount_points({"/s/5"}, set()) == ["/s/5/fs/mnt"]


def spec(**more):
    return {"value": json.dumps(dict({"ociVersion": "1", "mounts": [{"source": "proc"}]}, **more))}


@pytest.mark.parametrize(
    ("given", "holds"),
    [
        (spec(), False),
        (None, False),
        (spec(mounts=[{"source": "/snap/5/fs"}]), True),
        (spec(mounts=[{"source": "/snap/5/fs/etc/x"}]), True),
        (spec(mounts=[{"source": "/snap/5"}]), True),
        (spec(mounts=[{"source": "/snap/55/fs"}, {"source": "/"}, {"source": "/snap"}]), False),
        (spec(mounts=[{"source": "overlay", "options": ["ro", "lowerdir=/x:/snap/5/fs"]}]), True),
        (spec(root={"path": "/snap/5/fs"}), True),
        (spec(root=None, mounts=None), False),
        ({"value": "{/snap/5/fs"}, True),
        ({"value": "[]"}, False),
        ({"value": '["/snap/5/fs"]'}, True),
    ],
)
def test_a_container_of_another_namespace_that_has_its_files_holds_it(world, given, holds):
    rules = [dict(world.place, name="(?P<vm_id>s)")]
    world.add_snapshot("s")
    world.mounts = [{"type": "bind", "source": "/snap/5/fs", "options": ["rw", "rbind"]}]
    open_socket(world)
    created = {"seconds": 1, "nanos": 1}
    world.strangers = [
        {"id": "x", "labels": {}, "snapshotter": "overlayfs", "snapshot_key": "s", "created_at": created, "spec": given}
    ]
    one = token(world, snapshot, rules, "vms/overlayfs/s")
    expected = ("deferred", [("container", "other/x")]) if holds else ("reaped", [])
    assert result(snapshot.remove(one, rules, Host())) == expected


def open_socket(world):
    """Where no socket is, there is no daemon whose namespaces could be listed."""
    pathlib.Path(world.address).touch()


def test_the_same_key_in_another_namespace_is_another_snapshot(world):
    rules = [dict(world.place, name="(?P<vm_id>s)")]
    world.add_snapshot("s")
    world.strangers = [{"id": "x", "labels": {}, "snapshotter": "overlayfs", "snapshot_key": "s"}]
    one = token(world, snapshot, rules, "vms/overlayfs/s")
    assert result(snapshot.remove(one, rules, Host())) == ("reaped", [])


NOW = 1_795_330_000  # 2026-11-22T06:46:40Z


@pytest.mark.parametrize(
    ("until", "is_over"),
    [
        ("2026-11-22T06:45:39Z", True),
        ("2026-11-22T06:45:40Z", False),  # a minute ago, not more
        ("2026-11-22T06:45:39.999999999Z", True),
        ("2026-11-22T07:45:39+01:00", True),
        ("2026-11-22T07:45:41+01:00", False),
        ("2026-11-22T01:15:39-05:30", True),
        ("2027-01-01T00:00:00Z", False),
        ("2026-13-22T06:45:39Z", False),
        ("2026-11-22", False),
        ("yesterday", False),
        ("", False),
        (None, False),
    ],
)
def test_when_a_lease_is_over(until, is_over):
    assert containerd.has_expired(until, NOW) is is_over


def leased(world, until):
    world.add_snapshot("s")
    world.leases["old"] = [{"id": "s", "type": "snapshots/overlayfs"}]
    world.expiry["old"] = until
    return [dict(world.place, name="(?P<vm_id>[a-z]+)")]


@pytest.fixture
def not_nudged(monkeypatch):
    monkeypatch.setattr(snapshot, "_nudged", set())


PAST, FUTURE = "2020-01-01T00:00:00Z", "2120-01-01T00:00:00Z"


def test_a_lease_that_is_over_is_for_containerd_to_collect(world, not_nudged):
    rules = leased(world, PAST)
    one = token(world, snapshot, rules, "vms/overlayfs/s")
    assert snapshot.inspect(one, rules, Host()) is None
    assert world.done == []
    world.on["leases.v1.Leases/Delete"] = lambda: world.leases.pop("old")
    assert result(snapshot.remove(one, rules, Host())) == ("reaped", [])
    assert world.done == ["create lease", "delete lease, and collect", "remove snapshot s"]


def test_what_containerd_collects_with_the_lease_is_reaped(world, not_nudged):
    rules = leased(world, PAST)
    one = token(world, snapshot, rules, "vms/overlayfs/s")
    world.on["leases.v1.Leases/Delete"] = lambda: (world.leases.pop("old"), world.snapshots.clear())
    found = snapshot.remove(one, rules, Host())
    assert (found["outcome"], found["bytes"]) == ("reaped", 4096)
    assert world.done == ["create lease", "delete lease, and collect"]


def test_containerd_is_asked_once_and_a_lease_that_stays_holds(world, not_nudged):
    rules = leased(world, PAST)
    world.add_snapshot("t")
    world.leases["old"].append({"id": "t", "type": "snapshots/overlayfs"})
    for name in ("s", "t"):
        one = token(world, snapshot, rules, "vms/overlayfs/" + name)
        assert result(snapshot.remove(one, rules, Host())) == ("deferred", [("lease", "old")])
    assert world.done == ["create lease", "delete lease, and collect"]


def test_nobody_is_nudged_for_what_something_else_holds(world, not_nudged):
    rules = leased(world, PAST)
    one = token(world, snapshot, rules, "vms/overlayfs/s")
    for hold in (lambda: world.add_snapshot("kid", parent="s"), lambda: world.leases.update(night=world.leases["old"])):
        hold()
        assert snapshot.remove(one, rules, Host())["outcome"] == "deferred"
    rules = leased(world, FUTURE)
    one = token(world, snapshot, rules, "vms/overlayfs/s")
    assert snapshot.remove(one, rules, Host())["outcome"] == "deferred"
    assert world.done == []


def test_images_and_back_references_hold_a_snapshot_while_they_are_there(world):
    rules = [dict(world.place, name="(?P<vm_id>s[0-9])")]
    label, back = "containerd.io/gc.ref.snapshot.overlayfs", "containerd.io/gc.bref."
    labels = [{}, {}, {back + "container": "box"}, {back + "container": "gone"}, {back + "content.x": "sha256:1"}]
    labels += [{back + "image": "busybox"}, {back + "snapshot.overlayfs/1": "s0"}, {back + "snapshot.zfs": "there"}]
    for number, one in enumerate(labels):
        world.add_snapshot("s%d" % number, labels=one)
    world.add_container("box")
    world.blobs = [{"digest": "sha256:1", "labels": {label + "/2": "s1"}}]
    world.images = [{"name": "busybox", "labels": {label: "s0"}}]
    found = {one["vm_id"]: one["holders"] for one in snapshot.collect(rules, Host())["resources"]}
    assert {name: [(one["type"], one["name"]) for one in holders] for name, holders in found.items()} == {
        "s0": [("image", "busybox")],
        "s1": [("image", "sha256:1")],
        "s2": [("container", "box")],
        "s3": [],
        "s4": [("content", "sha256:1")],
        "s5": [("image", "busybox")],
        "s6": [("snapshot.overlayfs", "s0")],
        "s7": [("snapshot.zfs", "there")],
    }


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


# --- evidence


def test_a_witness_tells_the_records(world):
    world.add_container("vm-a", status=2, labels={"owner": "\udcff"}, key="vm-a")
    world.containers["vm-a"]["image"] = "docker.io/library/x:1"
    world.add_snapshot("vm-a", parent="base")
    for kind, name, expected in (
        (container, "vms/vm-a", ('"image": "docker.io/library/x:1"', '"owner": "\\udcff"', '"pid": 42')),
        (snapshot, "vms/overlayfs/vm-a", ('"parent": "base"', '"seconds": 1000')),
    ):
        rules = [dict(world.place, name=VM)]
        one = token(world, kind, rules, name)
        (told,) = kind.witness(one, rules, Host())
        assert all(text in told["text"] for text in expected), told
        assert name in told["source"] and told["title"] == kind.KIND
        with pytest.raises(ProbeError, match="another " + kind.KIND):
            kind.witness(dict(one, identity="x"), rules, Host())
    assert world.done == []
