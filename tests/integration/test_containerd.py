# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The kinds container and snapshot on a host with a real containerd and runc, compared with what ctr says."""

from __future__ import annotations

import io
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import time

import pytest
from hosts import hosts

ROOT = pathlib.Path(__file__).resolve().parents[2]
HOSTS = ROOT / "tests" / "hosts" / "hosts.py"
PACKAGE = "ansible_collections/microvm/reaper/plugins/module_utils"
NAME = "containerd"
# Every version that README names, and the Debian suite that has it; the one of the hosts comes with them.
VERSIONS = {"1.6": "bookworm", "1.7": hosts.SUITE, "2": "sid"}

pytestmark = [pytest.mark.hosts, pytest.mark.skipif(os.geteuid() != 0, reason="test hosts need root")]

# Runs on the host: reads what to do, does it with the collection's own code, prints what it came to.
DRIVER = r"""
import json, sys, time
sys.path.insert(0, "/tmp/reaper")
from ansible_collections.microvm.reaper.plugins.module_utils import containerd, grpc, probe
from ansible_collections.microvm.reaper.plugins.module_utils.kinds import container, snapshot, zombie

opened = []
connect = grpc.Connection.__init__
grpc.Connection.__init__ = lambda self, *values: (opened.append(1), connect(self, *values))[1]
ask = json.load(sys.stdin)
kind = {"container": container, "snapshot": snapshot, "zombie": zombie}[ask["kind"]]
host = probe.Host(probe.boottime() + ask["seconds"])
begin = time.monotonic()
try:
    if ask["act"] == "collect":
        result = kind.collect(ask["rules"], host)
    elif ask["act"] == "lease":
        containerd.CALLS["leases.v1.Leases/AddResource"] = (
            {1: ("id", "text"), 2: ("resource", containerd.LEASED)}, {})
        client = containerd.clients("snapshot", ask["rules"], host)[0]
        client._call("leases.v1.Leases/AddResource", id=ask["lease"],
                     resource={"id": ask["key"], "type": "snapshots/overlayfs"})
        result = None
    else:
        result = [getattr(kind, ask["act"])(token, ask["rules"], host) for token in ask["tokens"]]
    answer = {"result": result}
except Exception as err:
    answer = {"error": type(err).__name__, "text": str(err)}
print(json.dumps(dict(answer, seconds=time.monotonic() - begin, connections=len(opened))))
"""


START = "containerd > /var/log/containerd.log 2>&1 & until ctr version > /dev/null; do sleep 0.1; done"


class Reaper:
    """A test host, seen through ctr and through the collection's code."""

    def __init__(self, state, programs=None):
        self.state = state
        if programs:
            self.shell("rm -f /usr/bin/containerd*; tar -C / -xf -", data=programs)
            self.shell(START)
        inventory = (state / "inventory.yml").read_text()
        self.namespace, self.image, self.archive = (
            re.search('test_%s: "(.*)"' % key, inventory).group(1)
            for key in ("containerd_namespace", "busybox_image", "busybox_archive")
        )
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            archive.add(ROOT / "plugins/module_utils", PACKAGE)
        self.shell("mkdir -p /tmp/reaper && tar -C /tmp/reaper -xf -", data=buffer.getvalue())
        self.shell("cat > /tmp/driver.py", data=DRIVER.encode())
        self.ctr("images import %s" % self.archive)

    def shell(self, command, data=b"", check=True):
        argv = [sys.executable, str(HOSTS), "exec", "--state", str(self.state), NAME, "--", command]
        done = subprocess.run(argv, input=data, capture_output=True, timeout=60, check=False)
        assert not check or done.returncode == 0, done.stderr.decode()
        return done.stdout.decode()

    def ctr(self, command, namespace=None, check=True):
        return self.shell("ctr -n %s %s" % (namespace or self.namespace, command), check=check)

    def run(self, name, options="", command="/bin/sleep 1000"):
        self.ctr("run -d %s %s %s %s" % (options, self.image, name, command))

    def tasks(self):
        """Return ``{container: status}`` by ctr."""
        return {line.split()[0]: line.split()[2] for line in self.ctr("tasks ls").splitlines()[1:]}

    def ask(self, kind, act, rules, seconds=30, **more):
        ask = dict(more, kind=kind, act=act, rules=rules, seconds=seconds)
        return json.loads(self.shell("python3 /tmp/driver.py", data=json.dumps(ask).encode()))

    def rule(self, name, **more):
        return [dict(more, namespace=self.namespace, name=name)]

    def collect(self, kind, rules, **more):
        answer = self.ask(kind, "collect", rules, **more)
        assert "error" not in answer, answer
        return {
            one["name"].split("/", 1 if kind == "container" else 2)[-1]: one for one in answer["result"]["resources"]
        }

    def act(self, kind, act, rules, resources, stop=False):
        """Return the outcomes of an act on resources that were collected before."""
        keys = ("kind", "name", "vm_id", "identity", "details")
        tokens = [dict({key: one[key] for key in keys}, stop=stop) for one in resources]
        answer = self.ask(kind, act, rules, tokens=tokens)
        assert "error" not in answer, answer
        return [
            one and (one["outcome"], [(each["type"], each["name"]) for each in one["holders"]])
            for one in answer["result"]
        ]


@pytest.fixture(scope="module", params=VERSIONS)
def reaper(request, tmp_path_factory):
    suite = VERSIONS[request.param]
    programs = None if suite == hosts.SUITE else programs_of(suite)
    state = tmp_path_factory.mktemp("containerd-host")
    command = [sys.executable, str(HOSTS)]
    up = [*command, "up", "--kind", "container", "--name", NAME, "--state", str(state)]
    try:
        subprocess.run([*up, "--no-containerd"] if programs else up, check=True)
        host = Reaper(state, programs)
        assert re.search(r"Server:\s+Version: +v?%s\b" % re.escape(request.param), host.ctr("version"))
        yield host
        for name in host.tasks():  # a frozen one would outlive the host
            host.ctr("tasks resume %s; ctr -n %s tasks kill -s 9 %s" % (name, host.namespace, name), check=False)
    finally:
        subprocess.run([*command, "down", "--state", str(state)], check=False)


def programs_of(suite):
    """Return the programs of a suite's containerd as a tar; skip where the suite cannot be had."""
    there = hosts.CACHE / ("containerd-" + suite)
    with hosts.locked(hosts.CACHE / ("containerd-%s.lock" % suite)):
        if not there.exists():
            new = there.with_suffix(".new")
            shutil.rmtree(new, ignore_errors=True)
            try:
                hosts.bootstrap(suite, "extract", ["containerd"], new)
            except hosts.HostsError as err:
                pytest.skip("containerd of Debian %s cannot be had: %s" % (suite, err))
            new.rename(there)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for path in [*(there / "usr/bin").glob("containerd*"), there / "usr/bin/ctr"]:
            archive.add(path, "usr/bin/" + path.name)
    return buffer.getvalue()


def seconds_of(created):
    """Return what containerd prints as a time, as our identities have it."""
    whole, _dot, fraction = created.rstrip("Z").partition(".")
    stamp = int(time.mktime(time.strptime(whole + " UTC", "%Y-%m-%dT%H:%M:%S %Z"))) - time.timezone
    return "%d.%s" % (stamp, fraction.ljust(9, "0"))


def test_it_sees_what_ctr_sees(reaper):
    reaper.run("see-run", "--label vm=seen")
    reaper.run("see-pause")
    reaper.ctr("tasks pause see-pause")
    reaper.run("see-stop")
    reaper.ctr("tasks kill -s 9 see-stop")
    reaper.ctr("containers create %s see-idle" % reaper.image)
    reaper.ctr("snapshots prepare see-base && ctr -n %s snapshots commit see-done see-base" % reaper.namespace)
    reaper.ctr("snapshots prepare see-child see-done")

    containers = reaper.collect("container", reaper.rule("(?P<vm_id>.*)"))
    assert sorted(containers) == sorted(reaper.ctr("containers ls -q").split())
    tasks = reaper.tasks()
    assert tasks["see-pause"] == "PAUSED" and tasks["see-stop"] == "STOPPED"
    for name, one in containers.items():
        info = json.loads(reaper.ctr("containers info " + name))
        assert one["identity"] == "%s/%s/%s" % (reaper.namespace, name, seconds_of(info["CreatedAt"]))
        assert one["details"]["snapshot_key"] == info["SnapshotKey"]
        assert one["in_use"] == (tasks.get(name, "STOPPED") != "STOPPED")
        assert 0 <= one["age_seconds"] < 300
    assert [
        one["vm_id"] for one in reaper.collect("container", [{"namespace": reaper.namespace, "label": "vm"}]).values()
    ] == ["seen"]

    snapshots = reaper.collect("snapshot", reaper.rule("(?P<vm_id>.*)"))
    listed = [line.split() for line in reaper.ctr("snapshots ls").splitlines()[1:]]
    assert sorted(snapshots) == sorted(line[0] for line in listed)
    for line in listed:
        key, parent, kind = line[0], line[1] if len(line) == 3 else None, line[-1]
        one = snapshots[key]
        info = json.loads(reaper.ctr("snapshots info " + key))
        full = "%s/overlayfs/" % reaper.namespace
        assert one["parent"] == (full + parent if parent else None)
        expected = "%s%s@%s:%s:%s" % (full, key, seconds_of(info["Created"]), kind.lower(), parent or "")
        assert one["identity"] == expected


ZOMBIE = """
for stat in /proc/[0-9]*/stat; do
    read -r pid command state parent rest < $stat && [ $state = Z ] && [ $parent = %s ] && echo $pid
done 2>/dev/null
true
"""


def test_row_18_a_parent_in_a_container_is_named_with_its_image(reaper):
    reaper.run("keeper", command="/bin/sh -c 'sleep 0.1 & exec sleep 1000'")
    parent = next(line.split()[1] for line in reaper.ctr("tasks ls").splitlines() if line.startswith("keeper "))
    deadline = time.monotonic() + 10
    while not (pid := reaper.shell(ZOMBIE % parent).strip()) and time.monotonic() < deadline:
        time.sleep(0.1)
    reaper.shell("mkdir -p /tmp/boxes/box1 && echo %s > /tmp/boxes/box1/pid" % pid)
    rules = [{"command": "sleep", "pid_file": "/tmp/boxes/*/pid"}]
    found = reaper.collect("zombie", rules)[pid]
    keys = ("kind", "name", "vm_id", "identity", "details")
    token = dict({key: found[key] for key in keys}, stop=False)
    (outcome,) = reaper.ask("zombie", "remove", rules, tokens=[token])["result"]
    (holder,) = outcome["holders"]
    assert outcome["outcome"] == "deferred"
    assert (holder["pid"], holder["container"], holder["image"]) == (int(parent), "keeper", reaper.image)
    assert "container keeper, image %s" % reaper.image in outcome["message"]
    assert holder["mount_namespace"]


def test_stop_and_remove(reaper):
    rules = reaper.rule("(?P<vm_id>stop-[a-z]+)")
    reaper.run("stop-run", command="/bin/sh -c 'sleep 1000 & sleep 1000'")
    reaper.run("stop-pause")
    reaper.ctr("tasks pause stop-pause")
    reaper.run("stop-done")
    reaper.ctr("tasks kill -s 9 stop-done")
    reaper.ctr("containers create %s stop-idle" % reaper.image)
    found = reaper.collect("container", rules)
    names = ["stop-run", "stop-pause", "stop-done", "stop-idle"]
    all_of_them = [found[name] for name in names]

    refused = reaper.act("container", "remove", rules, all_of_them[:2])
    assert [outcome for outcome, _holders in refused] == ["deferred", "deferred"]
    assert [holders[0][0] for _outcome, holders in refused] == ["process", "process"]
    assert re.fullmatch(r"\d+ sleep \(.*container stop-run.*\)", refused[0][1][0][1])
    assert reaper.tasks()["stop-run"] == "RUNNING"

    assert reaper.act("container", "stop", rules, all_of_them[:2], stop=True) == [None, None]
    assert not {"stop-run", "stop-pause"} & set(reaper.tasks())
    assert reaper.act("container", "remove", rules, all_of_them) == [("reaped", [])] * 4
    assert reaper.act("container", "remove", rules, all_of_them) == [("already_gone", [])] * 4
    assert not set(names) & set(reaper.ctr("containers ls -q").split())
    assert not set(names) & set(reaper.tasks())


def test_row_26_a_container_created_again(reaper):
    rules = reaper.rule("(?P<vm_id>again)")
    create = "containers create %s again" % reaper.image
    reaper.ctr(create)
    first = reaper.collect("container", rules)["again"]
    reaper.ctr("containers rm again")
    reaper.ctr(create)
    assert reaper.act("container", "remove", rules, [first]) == [("identity_changed", [])]
    assert "again" in reaper.ctr("containers ls -q").split()


def test_row_25_what_holds_a_snapshot(reaper):
    rules = reaper.rule("(?P<vm_id>hold-[a-z]+)", pinned=True)
    full = "%s/overlayfs/" % reaper.namespace
    for key in ("hold-active", "hold-lease", "hold-mount", "hold-free"):
        reaper.ctr("snapshots prepare %s %s" % (key, "see-done" if key == "hold-mount" else ""))
    reaper.ctr("snapshots commit hold-base hold-active")
    reaper.ctr("snapshots prepare hold-child hold-base")
    reaper.ctr("containers create %s hold-used" % reaper.image)  # its snapshot has its name
    reaper.ctr("leases create --id night")
    assert "error" not in reaper.ask("snapshot", "lease", rules, lease="night", key="hold-lease")
    mount = reaper.ctr("snapshots mounts /tmp/mnt hold-mount").strip()
    reaper.shell("mkdir -p /tmp/mnt && " + mount)

    found = reaper.collect("snapshot", rules)
    holders = {key: [(each["type"], each["name"]) for each in one["holders"]] for key, one in found.items()}
    assert holders == {
        "hold-base": [("child", full + "hold-child")],
        "hold-child": [],
        "hold-used": [("container", reaper.namespace + "/hold-used")],
        "hold-lease": [("lease", "night")],
        "hold-mount": [],
        "hold-free": [],
    }
    held = ["hold-base", "hold-used", "hold-lease", "hold-mount"]
    expected = [("deferred", holders[key]) for key in held[:3]] + [("deferred", [("mount", "/tmp/mnt")])]
    assert reaper.act("snapshot", "remove", rules, [found[key] for key in held]) == expected

    unpinned = reaper.rule("(?P<vm_id>hold-[a-z]+)")
    label = ("label", "containerd.io/gc.root")
    assert reaper.act("snapshot", "remove", unpinned, [found["hold-free"]]) == [("deferred", [label])]

    leaf_first = [found[key] for key in ("hold-free", "hold-child", "hold-base")]
    assert reaper.act("snapshot", "remove", rules, leaf_first) == [("reaped", [])] * 3
    reaper.shell("umount /tmp/mnt")
    reaper.ctr("leases delete --sync night")
    left = [found[key] for key in ("hold-mount", "hold-lease")]
    assert reaper.act("snapshot", "remove", rules, left) == [("reaped", [])] * 2
    keys = {line.split()[0] for line in reaper.ctr("snapshots ls").splitlines()[1:]}
    assert {key for key in keys if key.startswith("hold-")} == {"hold-used"}


def test_an_image_holds_its_layers(reaper):
    rules = reaper.rule("(?P<vm_id>sha256:.*)")
    (layer,) = reaper.collect("snapshot", rules).values()
    assert "image" in [each["type"] for each in layer["holders"]]


def directory_of(reaper, key, snapshotter="overlayfs"):
    """Return the directory with the files of a snapshot that has no parent."""
    mount = reaper.ctr("snapshots --snapshotter %s mounts /x %s" % (snapshotter, key))
    return re.search(r"mount -t bind (\S+) /x", mount).group(1)


def test_a_key_in_two_namespaces_is_two_snapshots(reaper):
    other = reaper.namespace + "-other"
    for namespace in (reaper.namespace, other):
        reaper.ctr("snapshots prepare twin", namespace=namespace)
    rules = reaper.rule("(?P<vm_id>twin)", pinned=True)
    # A container of the other namespace has the snapshot of the same name there.
    reaper.ctr("images import %s" % reaper.archive, namespace=other)
    reaper.ctr("containers create --snapshotter overlayfs %s twin-user" % reaper.image, namespace=other)
    (mine,) = reaper.collect("snapshot", rules).values()
    theirs = [dict(rules[0], namespace=other)]
    (one,) = reaper.collect("snapshot", theirs).values()
    assert (mine["name"], one["name"]) == (reaper.namespace + "/overlayfs/twin", other + "/overlayfs/twin")
    assert mine["identity"] != one["identity"]
    assert reaper.act("snapshot", "remove", theirs, [mine]) == [("failed", [])]
    assert reaper.act("snapshot", "remove", rules, [mine]) == [("reaped", [])]
    assert "twin" in reaper.ctr("snapshots ls", namespace=other).split()
    assert "twin" not in reaper.ctr("snapshots ls").split()


def test_content_that_two_namespaces_share_is_each_ones_own(reaper):
    names = [reaper.namespace + "-first", reaper.namespace + "-second"]
    for namespace in names:
        reaper.ctr("images import %s" % reaper.archive, namespace=namespace)
    reaper.ctr("images rm --sync %s" % reaper.image, namespace=names[0])
    rules = [{"namespace": names[0], "name": "(?P<vm_id>sha256:.*)"}]
    assert reaper.collect("snapshot", rules) == {}
    (layer,) = reaper.collect("snapshot", [dict(rules[0], namespace=names[1])]).values()
    assert "image" in [each["type"] for each in layer["holders"]]


@pytest.mark.parametrize("snapshotter", ["overlayfs", "native"])
def test_a_mount_in_a_mount_namespace_of_its_own_holds(reaper, snapshotter):
    key = "bound-" + snapshotter
    reaper.ctr("snapshots --snapshotter %s prepare %s" % (snapshotter, key))
    rules = reaper.rule("(?P<vm_id>%s)" % key, pinned=True, snapshotter=snapshotter)
    (one,) = reaper.collect("snapshot", rules).values()
    source = directory_of(reaper, key, snapshotter)
    reaper.shell(
        "mkdir -p %s/sub /tmp/point; setsid unshare -m --propagation private sh -c "
        "'mount --bind %s/sub /tmp/point; echo ready > /tmp/ready; exec sleep 1000' > /dev/null 2>&1 & "
        "echo $! > /tmp/pid; "
        "until [ -e /tmp/ready ]; do sleep 0.05; done; rm /tmp/ready" % (source, source)
    )
    assert "/tmp/point" not in reaper.shell("cat /proc/self/mountinfo")
    assert reaper.act("snapshot", "remove", rules, [one]) == [("deferred", [("mount", "/tmp/point")])]
    reaper.shell("kill $(cat /tmp/pid); while kill -0 $(cat /tmp/pid) 2> /dev/null; do sleep 0.05; done")
    # What is mounted in it would be removed with it.
    reaper.shell("mount -t tmpfs tmpfs %s/sub; touch %s/sub/precious" % (source, source))
    assert reaper.act("snapshot", "remove", rules, [one]) == [("deferred", [("mount", source + "/sub")])]
    assert reaper.shell("ls %s/sub" % source).split() == ["precious"]
    reaper.shell("umount %s/sub" % source)
    assert reaper.act("snapshot", "remove", rules, [one]) == [("reaped", [])]


def test_a_container_of_another_namespace_that_has_its_files_holds_it(reaper):
    other = reaper.namespace + "-user"
    reaper.ctr("images import %s" % reaper.archive, namespace=other)
    reaper.ctr("snapshots prepare lent")
    rules = reaper.rule("(?P<vm_id>lent)", pinned=True)
    (one,) = reaper.collect("snapshot", rules).values()
    mount = "type=bind,src=%s,dst=/lent,options=rbind:ro" % directory_of(reaper, "lent")
    reaper.ctr("containers create --mount %s %s user" % (mount, reaper.image), namespace=other)
    assert reaper.act("snapshot", "remove", rules, [one]) == [("deferred", [("container", other + "/user")])]
    reaper.ctr("containers rm user", namespace=other)
    assert reaper.act("snapshot", "remove", rules, [one]) == [("reaped", [])]


def test_a_lease_that_is_over_is_collected_by_its_owner(reaper):
    rules = reaper.rule("(?P<vm_id>over-[a-z]+)", pinned=True)
    expire = "containerd.io/gc.expire="
    soon = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 3600))
    just = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - 5))
    for key in ("over-pinned", "over-free", "over-later", "over-just"):
        reaper.ctr("snapshots prepare " + key)
    reaper.ctr("snapshots label over-free containerd.io/gc.root=")
    for lease, until, key in (
        ("later", soon, "over-later"),
        ("just", just, "over-just"),
        ("old", "2020-01-01T00:00:00Z", "over-pinned"),
        ("old", None, "over-free"),
    ):
        if until:
            reaper.ctr("leases create --id %s --expires 0s %s%s" % (lease, expire, until))
        assert "error" not in reaper.ask("snapshot", "lease", rules, lease=lease, key=key)

    def leases():
        return {line.split()[0] for line in reaper.ctr("leases ls").splitlines()[1:]}

    found = reaper.collect("snapshot", rules)
    holders = {key: [each["name"] for each in one["holders"]] for key, one in found.items()}
    assert holders == {"over-pinned": [], "over-free": [], "over-later": ["later"], "over-just": ["just"]}
    kept = [found["over-later"], found["over-just"]]
    held = [("deferred", [("lease", name)]) for name in ("later", "just")]
    assert reaper.act("snapshot", "remove", rules, kept) == held
    assert reaper.act("snapshot", "inspect", rules, [found["over-pinned"], found["over-free"]]) == [None, None]
    assert {"old", "just", "later"} <= leases()
    # The first one lets containerd collect; what nothing else holds goes with the lease then.
    assert reaper.act("snapshot", "remove", rules, [found["over-free"], found["over-pinned"]]) == [("reaped", [])] * 2
    assert "later" in leases() and not {"old", "just"} & leases()
    assert not any(name.startswith("microvm.reaper") for name in leases())
    keys = {line.split()[0] for line in reaper.ctr("snapshots ls").splitlines()[1:]}
    assert {key for key in keys if key.startswith("over-")} == {"over-later", "over-just"}
    assert reaper.act("snapshot", "remove", rules, [found["over-just"]]) == [("reaped", [])]


def test_a_namespace_or_snapshotter_that_is_not_there(reaper):
    nowhere = [{"namespace": "nowhere", "name": "(?P<vm_id>.*)"}]
    for kind in ("container", "snapshot"):
        answer = reaper.ask(kind, "collect", nowhere)
        assert answer["result"] == {"resources": [], "foreign": 0}
    answer = reaper.ask("snapshot", "collect", reaper.rule("(?P<vm_id>.*)", snapshotter="nosuch"))
    assert answer["error"] == "CallError" and "nosuch" in answer["text"]


def test_row_36_hostile_keys(reaper):
    keys = ['q"u\\o`te', "$(touch x) {{ y }}", "new\nline", "-dash", "é", "a/b/../c", "k" * 3000]
    namespace = "hostile"
    for key in keys:
        quoted = "'" + key.replace("'", "'\\''") + "'"
        reaper.ctr("snapshots prepare -- %s" % quoted, namespace=namespace)
    rules = [{"namespace": namespace, "name": "(?s)(?P<vm_id>[A-Za-z0-9]?).*", "label": "vm"}]
    assert reaper.ask("snapshot", "collect", rules)["result"] == {"resources": [], "foreign": len(keys)}
    rules = [{"namespace": namespace, "name": "(?s)(?P<vm_id>[a-z])?.+", "pinned": True}]
    found = reaper.collect("snapshot", rules)
    assert {one["vm_id"] for one in found.values()} == {"q", "a", "k"} - ({"k"} if len(keys[-1]) > 4096 else set())
    assert reaper.act("snapshot", "remove", rules, list(found.values())) == [("reaped", [])] * len(found)


def test_a_hundred_of_each(reaper):
    """What it costs, beside one ctr for each list; and that the cost in connections does not grow."""
    script = "for n in $(seq 100); do ctr -n %s containers create %s many-$n; done" % (reaper.namespace, reaper.image)
    reaper.shell(script)
    rules = reaper.rule("(?P<vm_id>many-[0-9]+)")
    took = {}
    for kind in ("container", "snapshot"):
        answer = reaper.ask(kind, "collect", rules)
        assert len(answer["result"]["resources"]) == 100 and answer["connections"] == 1
        took[kind] = answer["seconds"]
    took["ctr"] = float(
        reaper.shell(
            "python3 -c 'import os, time; b = time.time(); "
            'os.system("ctr -n %s containers ls -q > /dev/null; ctr -n %s snapshots ls > /dev/null"); '
            "print(time.time() - b)'" % (reaper.namespace, reaper.namespace)
        )
    )
    keys = ("kind", "name", "vm_id", "identity", "details")
    for kind in ("container", "snapshot"):
        resources = reaper.collect(kind, rules).values() if kind == "container" else answer["result"]["resources"]
        tokens = [dict({key: one[key] for key in keys}, stop=False) for one in resources]
        removed = reaper.ask(kind, "remove", rules, tokens=tokens)
        assert {one["outcome"] for one in removed["result"]} <= {"reaped", "already_gone"}
        assert removed["connections"] == 1
        took["remove 100 of " + kind] = removed["seconds"]
    print(took)
    assert took["container"] < 5 and took["snapshot"] < 5


# --- last: what breaks the daemon


def test_row_27_a_daemon_that_hangs_or_is_gone(reaper):
    rules = reaper.rule("(?P<vm_id>.*)")
    pid = reaper.shell("pidof containerd").strip()
    reaper.shell("kill -STOP %s" % pid)
    try:
        for kind in ("container", "snapshot"):
            answer = reaper.ask(kind, "collect", rules, seconds=1.5)
            assert answer["error"] == "DeadlineExceeded"
            assert answer["seconds"] < 3
    finally:
        reaper.shell("kill -CONT %s" % pid)
    assert reaper.collect("container", rules)

    reaper.shell("kill %s; while kill -0 %s 2> /dev/null; do sleep 0.1; done" % (pid, pid))
    for kind in ("container", "snapshot"):
        answer = reaper.ask(kind, "collect", rules)
        assert answer["error"] == "ProbeError", answer
    reaper.shell("rm -f /run/containerd/containerd.sock; mv /run/containerd /run/elsewhere")
    assert reaper.ask("container", "collect", rules)["error"] == "Absent"
    reaper.shell("mv /run/elsewhere /run/containerd")
    reaper.shell(START)
    assert reaper.collect("container", rules)["see-run"]["in_use"]
