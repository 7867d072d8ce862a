# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The policy restart_unit on a real systemd, in namespaces of its own, and on parents that really do not reap.

All the code under test runs in there, in a process of its own: in the machine's namespaces it would ask the machine's
systemd, where there is one.
"""

import json
import os
import pathlib
import re
import subprocess
import sys
import time

import pytest
from ansible_collections.microvm.reaper.plugins.module_utils import processes, units
from hosts.systemd import Systemd, needs_systemd

COLLECTIONS = pathlib.Path(__file__).resolve().parents[2] / "collections"

# A process that has a zombie called "vmm" and does not reap it; what it does besides is asked for by its arguments.
PARENT = r"""
import os, signal, subprocess, sys, time

def be_called(name):
    with open("/proc/self/comm", "w") as stream:
        stream.write(name)

signal.signal(signal.SIGCHLD, signal.SIG_DFL)
zombie = os.fork()
if zombie == 0:
    be_called("vmm")
    os._exit(0)
os.waitid(os.P_PID, zombie, os.WEXITED | os.WNOWAIT)
with open(sys.argv[1] + "/shim.pid", "w") as stream:
    stream.write(str(zombie))
for what in sys.argv[2:]:
    if what.startswith("in:"):  # run in a cgroup oneself
        os.makedirs(what[3:], exist_ok=True)
        with open(what[3:] + "/cgroup.procs", "w") as stream:
            stream.write("0")
        continue
    child = os.fork()
    if child == 0:
        if what.startswith("/"):  # a cgroup to run in
            os.makedirs(what, exist_ok=True)
            with open(what + "/cgroup.procs", "w") as stream:
                stream.write("0")
        elif what == "orphaned" and os.fork():
            os._exit(0)
        elif what == "registered":
            with open(sys.argv[1] + "/shim.pid", "w") as stream:
                stream.write("%d" % zombie)
            os.makedirs(sys.argv[1].rpartition("/")[0] + "/box2", exist_ok=True)
            with open(sys.argv[1].rpartition("/")[0] + "/box2/shim.pid", "w") as stream:
                stream.write(str(os.getpid()))
            be_called("vmm")
        time.sleep(1000)
    if what == "orphaned":
        os.waitpid(child, 0)
be_called("keeper")
while True:
    time.sleep(1000)
"""

# Does one act in there: collects, makes the token that the planner would make, and removes; prints what it came to.
DRIVER = r"""
import json, os, sys
ask = json.load(sys.stdin)
sys.path.insert(0, ask["collections"])
from ansible_collections.microvm.reaper.plugins.module_utils import probe, processes, units
from ansible_collections.microvm.reaper.plugins.module_utils.kinds import zombie

host = probe.Host(probe.boottime() + 60)
run, ran = probe.Host.run, []

def spying(self, command, *arguments, **more):
    ran.append([command, *arguments])
    return run(self, command, *arguments, **more)

probe.Host.run = spying
zombie.NUDGE_SECONDS = 0.3
units.RESTART_SECONDS = ask.get("restart_seconds", 15)
with open("/sys/fs/cgroup/%s/cgroup.procs" % ask["inside"], "w") as stream:
    stream.write("0")
found = {one["vm_id"]: one for one in zombie.collect(ask["rules"], host)["resources"]}
one = found["box1"]
details = dict(one["details"], **dict({"how": "restart_unit", "unit": one["details"]["parent_unit"]}, **ask["details"]))
token = dict({key: one[key] for key in ("kind", "name", "vm_id", "identity")}, details=details, stop=False)
outcomes = [zombie.remove(token, ask["rules"], host) for _again in range(ask.get("times", 1))]
print(json.dumps({"outcomes": outcomes, "ran": [words for words in ran if words[1] != "show"], "details": details}))
"""


@pytest.fixture(scope="module")
def systemd(tmp_path_factory):
    directory = tmp_path_factory.mktemp("systemd") / "units"
    directory.mkdir()
    (directory / "default.target").write_text("[Unit]\nDescription=Nothing\n")
    found = Systemd(directory)
    try:
        if not found.up():
            pytest.skip("no systemd in namespaces here: %s" % (directory.parent / "log").read_text()[-500:])
        yield found
    finally:
        found.down()


class World:
    """Units with a parent of a zombie in them, and what the reaper does for one."""

    def __init__(self, systemd, boxes):
        self.systemd = systemd
        self.boxes = boxes
        self.rules = [{"command": "vmm", "pid_file": "%s/*/shim.pid" % boxes}]
        self.started = []

    def start(self, *does, name="keeper.service", unit="", service=""):
        (self.boxes / "box1").mkdir(exist_ok=True)
        (self.boxes / "parent.py").write_text(PARENT)
        words = [sys.executable, self.boxes / "parent.py", self.boxes / "box1", *does]
        command = " ".join(map(str, words))
        text = "[Unit]\nDefaultDependencies=no\n%s\n[Service]\nExecStart=%s\n%s\n" % (unit, command, service)
        self.write(name, text)
        self.systemd.ctl("start", "--", name)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            pid = self.pid(name)
            if pid and pathlib.Path("/proc/%d/root/proc/%d/comm" % (self.systemd.init, pid)).read_text() == "keeper\n":
                return pid
            time.sleep(0.02)
        raise AssertionError("it did not come up")

    def write(self, name, text):
        (self.systemd.directory / name).write_text(text)
        self.systemd.ctl("daemon-reload")
        self.started.append(name)

    def pid(self, name="keeper.service"):
        return int(self.systemd.ctl("show", "--property=MainPID", "--value", "--", name))

    def reap(self, inside="init.scope", **more):
        """Let the reaper, in the cgroup ``inside``, act on the zombie; return its answer."""
        ask = dict({"collections": str(COLLECTIONS), "rules": self.rules, "inside": inside, "details": {}}, **more)
        return json.loads(self.systemd.run([sys.executable, "-c", DRIVER], input=json.dumps(ask)))

    def clean(self):
        for name in reversed(self.started):
            self.systemd.ctl("kill", "--signal=KILL", "--", name, check=False)
            self.systemd.ctl("stop", "--", name, check=False)
            self.systemd.ctl("reset-failed", "--", name, check=False)
            (self.systemd.directory / name).unlink()
        self.systemd.ctl("daemon-reload")


@pytest.fixture
def world(systemd, tmp_path):
    found = World(systemd, tmp_path)
    yield found
    found.clean()


@needs_systemd
def test_row_18_the_unit_of_a_parent_that_does_not_react_is_restarted(world):
    before = world.start()
    answer = world.reap()
    (outcome,) = answer["outcomes"]
    assert outcome["outcome"] == "reaped"
    assert outcome["message"] == (
        "unit keeper.service was restarted, because its process %d keeper did not reap it" % before
    )
    assert outcome["restarted"] == "keeper.service"
    assert answer["ran"] == [["systemctl", "restart", "--", "keeper.service"]]
    assert world.pid() not in (0, before)


def refused(world, answer, before, why, name="keeper.service"):
    (outcome,) = answer["outcomes"]
    assert (outcome["outcome"], answer["ran"]) == ("deferred", [])
    assert re.search(why, outcome["message"]), outcome["message"]
    assert re.search(why, outcome["holders"][0]["note"])
    assert "restarted" not in outcome
    assert world.pid(name) == before


@needs_systemd
@pytest.mark.parametrize("does", ["living", "orphaned"])
def test_a_unit_in_which_something_else_lives_is_not_restarted(world, does):
    before = world.start(does)
    refused(world, world.reap(), before, r"keeper.service was not restarted: \d+ .* would end with it")


@needs_systemd
def test_a_parent_whose_child_lives_elsewhere_is_not_restarted(world):
    """A supervisor may end its VMs on its way down, wherever they are."""
    before = world.start("/sys/fs/cgroup/elsewhere/vlive")
    refused(world, world.reap(), before, r"was not restarted: \d+ .* would end with it")


@needs_systemd
def test_what_is_left_of_the_confirmed_orphan_may_end_and_nothing_else_of_another(world):
    before = world.start("registered")
    refused(world, world.reap(details={"may_end": True}), before, r"\d+ vmm would end with it")  # it is box2's
    (world.boxes / "box1" / "shim.pid").rename(world.boxes / "box2" / "zombie")
    (world.boxes / "box2" / "shim.pid").rename(world.boxes / "living")
    # Now the two are of one VM, by two rules.
    for number, file in (("3", world.boxes / "box2" / "zombie"), ("4", world.boxes / "living")):
        (world.boxes / number / "box1").mkdir(parents=True)
        file.rename(world.boxes / number / "box1" / "shim.pid")
    world.rules = [dict(world.rules[0], pid_file="%s/%s/*/shim.pid" % (world.boxes, number)) for number in "34"]
    refused(world, world.reap(details={"may_end": False}), before, r"\d+ vmm would end with it")
    (outcome,) = world.reap(details={"may_end": True})["outcomes"]
    assert outcome["outcome"] == "reaped" and world.pid() != before


@needs_systemd
@pytest.mark.parametrize(("vm_id", "may_end", "goes"), [("vlive", True, False), ("box1", False, False),
                                                        ("box1", True, True)])
def test_a_parent_that_is_itself_of_a_vm_ends_only_with_it(world, vm_id, may_end, goes):
    before = world.start("in:/sys/fs/cgroup/system.slice/keeper.service/%s" % vm_id)
    world.rules.append({"command": "firecracker", "cgroup_name": "(?P<vm_id>v[a-z]+|box1)"})
    answer = world.reap(details={"may_end": may_end})
    if goes:
        assert answer["outcomes"][0]["outcome"] == "reaped" and world.pid() != before
    else:
        refused(world, answer, before, "the parent is itself of the VM %s" % vm_id)


@needs_systemd
def test_a_unit_that_holds_the_reaper_is_not_restarted(world):
    before = world.start()
    refused(world, world.reap(inside="system.slice/keeper.service"), before, "the reaper itself runs in it")


@needs_systemd
@pytest.mark.parametrize("relation", ["Requires", "BindsTo", "PartOf", "Requisite"])
def test_a_unit_that_would_take_others_with_it_is_not_restarted(world, relation):
    before = world.start()
    needed = "[Unit]\nDefaultDependencies=no\n%s=keeper.service\nAfter=keeper.service\n" % relation
    world.write("vm@1.service", needed + "[Service]\nExecStart=/bin/sleep 1000\n")
    world.systemd.ctl("start", "vm@1.service")
    vm = world.pid("vm@1.service")
    refused(world, world.reap(), before, r"vm@1.service would be stopped with it")
    assert world.pid("vm@1.service") == vm


@needs_systemd
@pytest.mark.parametrize("name", ["docker.service", "systemd-keeper.service", "user@1000.service", "dbus.service"])
def test_what_a_host_stands_on_is_never_restarted(world, name):
    before = world.start(name=name)
    refused(world, world.reap(), before, "%s is never restarted" % name, name)


@needs_systemd
def test_a_restart_that_would_spare_the_parent_is_not_tried(world):
    """Not the main process, and systemd ends no other."""
    (world.boxes / "box1").mkdir()
    (world.boxes / "parent.py").write_text(PARENT)
    script = "%s %s %s & exec sleep 1000" % (sys.executable, world.boxes / "parent.py", world.boxes / "box1")
    text = "[Unit]\nDefaultDependencies=no\n[Service]\nKillMode=process\nExecStart=/bin/sh -c '%s'\n" % script
    world.write("keeper.service", text)
    world.systemd.ctl("start", "keeper.service")
    while not (world.boxes / "box1" / "shim.pid").exists():
        time.sleep(0.02)
    time.sleep(0.2)
    refused(world, world.reap(), world.pid(), "with KillMode=process a restart does not end the parent")


@needs_systemd
def test_a_parent_that_is_another_one_than_planned_for_is_left_alone(world):
    before = world.start()
    for details in ({"parent_identity": "%d:1" % before}, {"unit": "other.service"}, {"parent_identity": None}):
        refused(world, world.reap(details=details), before, "the parent is another one, or runs elsewhere")


@needs_systemd
def test_a_unit_is_restarted_once_at_most(world):
    """It comes back with a zombie that has the old one's pid file; what it is tried for again is that of a new one."""
    world.start(service="ExecStop=/bin/false\nRestart=no")
    answer = world.reap(times=2)
    assert [one["outcome"] for one in answer["outcomes"]][0] == "reaped"
    assert len(answer["ran"]) == 1


@needs_systemd
def test_a_restart_that_takes_too_long_is_said_to_and_not_tried_again(world):
    world.start(service="ExecStop=/bin/sleep 4\nTimeoutStopSec=6")
    begin = time.monotonic()
    answer = world.reap(times=2, restart_seconds=0.5)
    assert time.monotonic() - begin < 4
    assert [one["outcome"] for one in answer["outcomes"]] == ["deferred", "deferred"]
    assert {one["holders"][0]["note"] for one in answer["outcomes"]} == {
        "unit keeper.service is being restarted, which takes longer than 0 s"
    }
    assert len(answer["ran"]) == 1


@needs_systemd
def test_a_restart_that_systemd_refuses_is_told(world):
    before = world.start(unit="RefuseManualStop=yes")
    answer = world.reap()
    (outcome,) = answer["outcomes"]
    assert outcome["outcome"] == "deferred" and world.pid() == before
    assert "unit keeper.service could not be restarted: " in outcome["message"]


# What needs no systemd


class Host:
    """A host whose systemctl answers what a test says."""

    def __init__(self, **properties):
        self.properties = properties
        self.ran = []

    def run(self, command, *arguments, timeout):
        self.ran.append(arguments[0])
        if arguments[0] == "show":
            return 0, "".join("%s=%s\n" % one for one in self.properties.items()), ""
        return 0, "", ""


GOOD = {"Id": "x.service", "LoadState": "loaded", "ActiveState": "active", "ControlGroup": "/system.slice/x.service",
        "KillMode": "control-group", "MainPID": "1", "CanStart": "yes"}


@pytest.fixture(autouse=True)
def nothing_was_restarted():
    units._restarted.clear()
    yield
    units._restarted.clear()


@pytest.mark.parametrize(
    ("properties", "why"),
    [
        (dict(GOOD, Id="y.service"), "systemd has it as y.service"),
        (dict(GOOD, LoadState="not-found"), "not-found"),
        (dict(GOOD, ActiveState="deactivating"), "deactivating"),
        (dict(GOOD, ControlGroup=""), "no cgroup of its own"),
        (dict(GOOD, ControlGroup="/"), "no cgroup of its own"),
        (dict(GOOD, ControlGroup="x"), "no cgroup of its own"),
        (dict(GOOD, CanStart="no"), "could not start it again"),
        (dict(GOOD, KillMode="none"), "does not end the parent"),
        (dict(GOOD, ConsistsOf="a.service b.path c.path d.path"), "a.service, b.path, c.path and 1 more"),
        (dict(GOOD, PropagatesStopTo="a.service"), "a.service would be stopped with it"),
        (GOOD, "is not in the cgroup /system.slice/x.service"),
        ({key: GOOD[key] for key in list(GOOD)[1:]}, "systemctl show: no Id"),
    ],
)
def test_what_systemd_says_against_it(properties, why):
    host = Host(**properties)
    parent = processes.stat(os.getpid())
    assert why in units.restart("x.service", parent, lambda process: True, host)
    assert host.ran == ["show"]


def test_a_parent_that_has_ended_meanwhile_is_nobodys_reason():
    host, parent = Host(**GOOD), processes.stat(os.getpid())
    why = units.restart("x.service", parent._replace(started=parent.started - 1), lambda process: True, host)
    assert why == "unit x.service was not restarted: its parent has ended meanwhile"
    gone = subprocess.Popen(["true"])
    gone.wait()
    why = units.restart("x.service", parent._replace(pid=gone.pid), lambda process: True, host)
    assert (why, host.ran) == ("its parent has ended meanwhile", ["show"])


@pytest.mark.parametrize(
    "unit",
    [
        "x.scope", "x.slice", "init.scope", "session-1.scope", "user@0.service", "-x.service", "x y.service",
        "../x.service", "systemd-logind.service", "", "x.service\n", "a" * 300 + ".service", "docker.service",
    ],
)
def test_what_is_no_service_of_its_own_is_not_even_asked_for(unit):
    host = Host(**GOOD)
    assert units.restart(unit, processes.stat(os.getpid()), lambda process: True, host)
    assert host.ran == []


def test_without_systemd_the_reason_is_told():
    class Without(Host):
        def run(self, command, *arguments, timeout):
            if command == "systemctl" and arguments[0] == "show":
                return 1, "", "System has not been booted with systemd as init system (PID 1). Can't operate.\n"
            raise AssertionError(arguments)

    why = units.restart("x.service", processes.stat(os.getpid()), lambda process: True, Without())
    assert why.startswith("unit x.service was not restarted: systemctl show: System has not been booted with systemd")
