# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A host that sweeps itself: the timer that playbooks/schedule.yml installs, on a real systemd, with real leftovers.

The systemd has namespaces of its own and files that lie over those of this machine: nothing is installed here.
"""

import concurrent.futures
import json
import os
import re
import sys
import time

import pytest
from hosts.fleet import BIN, ROOT, write_list
from hosts.systemd import Systemd, needs_systemd

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(900)]

REALM, SERVICE, TIMER = "pull", "microvm-reaper.service", "microvm-reaper.timer"
LIBRARY, INVENTORY = "/usr/local/lib/microvm.reaper", "/etc/microvm.reaper/hosts.yml"
STATE = "/var/lib/microvm.reaper"
SECRET = "s3cret-of-the-hook"
# What systemd-analyze says of a unit from 0, that nothing can be done by, to 10. What is left is what the acts are made
# of: they need CAP_SYS_ADMIN, and the host's own mounts, devices and users; and who pulls needs the network.
EXPOSURE = 5.0
PREPARE = [
    # No file of this machine is changed: what is written goes to memory.
    "mount -t tmpfs none /mnt",
    *(
        "mkdir -p /mnt/{0}/new /mnt/{0}/work; mount -t overlay none"
        " -o lowerdir=/{1},upperdir=/mnt/{0}/new,workdir=/mnt/{0}/work /{1}".format(name.replace("/", "-"), name)
        for name in ("etc", "usr/local", "var/lib")
    ),
    "mount -t tmpfs none /etc/systemd/system",
    *("echo [Unit] > /etc/systemd/system/%s.target" % name for name in ("default", "sysinit", "basic", "timers")),
    *("echo DefaultDependencies=no >> /etc/systemd/system/%s.target" % name for name in ("sysinit", "basic")),
    "mkdir -p /run/systemd/system",
]
ALARM = "[Service]\nType=oneshot\nExecStart=/bin/sh -c 'echo %i >> {0}/alarms'\n"


class Host:
    """A host with a systemd, VMs dead and alive, and an inventory of its own on the controller."""

    def __init__(self, systemd, place):
        self.systemd, self.place = systemd, place
        self.jails = place / "jailer"
        self.run("mkdir -p /sys/fs/cgroup/hyper %s/firecracker %s/mine; chmod 755 %s" % (self.jails, LIBRARY, place))
        self.write("/etc/systemd/system/alarm@.service", ALARM.format(place))
        self.variables = {
            "reap_realm": REALM,
            "reap_presets": ["hyper"],
            "reap_kinds": ["cgroup", "jail", "zombie"],
            "reap_cgroup_roots": ["{{ 'hy' ~ 'per' }}"],
            "reap_jail_bases": [str(self.jails)],
            "reap_live_sources": [{"type": "file", "path": str(place / "live.json")}],
            "reap_webhook_headers": {"Authorization": SECRET},
            "reap_host_id": "rack1",
            "reap_strike_interval": 1,
            "reap_min_age": 0,
            "reap_hold": 0,
            "reap_schedule_on_calendar": "*-*-* 03:00",
            "reap_schedule_on_failure": "alarm@%n.service",
            "reap_schedule_ansible_playbook": str(BIN / "ansible-playbook"),
        }

    def run(self, script, **how):
        """Run a script of the shell on the host; return what it printed."""
        return self.systemd.run(["sh", "-ec", script], **how)

    def write(self, path, text):
        self.run("cat > %s" % path, input=text)
        self.systemd.ctl("daemon-reload")

    def play(self, *arguments, **changes):
        """Run playbooks/schedule.yml as a controller does; return its exit code and what it printed."""
        host = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}
        inventory = self.place / "inventory.yml"
        inventory.write_text(json.dumps({"all": {"hosts": {"one": dict(host, **dict(self.variables, **changes))}}}))
        argv = [BIN / "ansible-playbook", "-i", inventory, *arguments, ROOT / "playbooks/schedule.yml"]
        how = {"ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1", "ANSIBLE_PIPELINING": "1"}
        environment = dict(os.environ, **how)
        done = self.systemd.execute(list(map(str, argv)), timeout=600, cwd=ROOT, env=environment)
        assert SECRET not in done.stdout + done.stderr
        return done.returncode, done.stdout + done.stderr

    def sweep(self):
        """Start the service as the timer does; return the exit code of the sweep, and how it stands in one line."""
        self.systemd.execute(["systemctl", "start", SERVICE], timeout=600)
        return int(self.show("ExecMainStatus")), self.show("StatusText")

    def show(self, key, unit=SERVICE):
        return self.systemd.ctl("show", "--property=%s" % key, "--value", unit)

    def there(self, path):
        return self.systemd.execute(["test", "-e", path]).returncode == 0

    def list_live(self, vms=("vlive2",), dead=("vdead2",), host="rack1", **changes):
        """Write the list of live VMs; it is newer than all that was planted before."""
        document = {
            "realm": REALM, "generated_at": time.time() + 25, "complete": True, "hosts": [host],
            "vms": [{"vm_id": vm_id, "host": host} for vm_id in vms],
            "tombstones": [{"vm_id": vm_id} for vm_id in dead],
        }  # fmt: skip
        write_list(self.place / "live.json", dict(document, **changes))

    def plant(self, vm_id, *, runs):
        """Make a cgroup and a jail with something mounted in it; maybe a process of another user in both."""
        group, jail = "/sys/fs/cgroup/hyper/%s" % vm_id, self.jails / "firecracker" / vm_id / "root"
        self.run(
            f"mkdir -p {group} {jail}/run {jail}/etc; echo 1 > {jail}/rootfs; mount --bind /etc {jail}/etc;"
            f" mount -t tmpfs none {jail}/run; mkdir {jail}/run/deep; mount -t tmpfs none {jail}/run/deep"
        )
        if runs:
            self.run(
                "(echo $(exec sh -c 'echo $PPID') > %s/cgroup.procs; cd %s; exec setpriv --reuid 4321 --regid 4321"
                " --clear-groups sleep 1000) > /dev/null 2>&1 < /dev/null &" % (group, jail)
            )
            self.wait_for("grep -q . %s/cgroup.procs" % group)

    def left(self):
        """Return the ids of VMs that have a cgroup, a jail, or something mounted in one."""
        listed = self.run("ls -d /sys/fs/cgroup/hyper/v*/ %s/firecracker/*/; cat /proc/self/mountinfo" % self.jails,
                          check=False)
        return sorted(set(re.findall(r"/(v[a-z]+2)/", listed)))

    def wait_for(self, script, seconds=60):
        deadline = time.monotonic() + seconds
        while self.systemd.execute(["sh", "-ec", script]).returncode:
            assert time.monotonic() < deadline, script
            time.sleep(0.1)


@pytest.fixture(scope="module")
def systemd(tmp_path_factory):
    directory = tmp_path_factory.mktemp("pull")
    found = Systemd(directory / "units", PREPARE)
    found.unit_path = "/etc/systemd/system"
    try:
        assert found.up(), (directory / "log").read_text()[-2000:]
        yield found
    finally:
        found.down()


@pytest.fixture
def host(systemd, tmp_path):
    return Host(systemd, tmp_path)


@needs_systemd
def test_what_cannot_work_is_said_before_anything_is_changed(host):
    host.write("/run/old", "#!/bin/sh\necho 'ansible-playbook [core 2.14.18]'\n")
    host.run("chmod 755 /run/old")
    for changes, why in (
        ({"reap_schedule_ansible_playbook": "/nowhere/x"}, "/nowhere/x on this host is not there, does not run"),
        ({"reap_schedule_ansible_playbook": "/run/old"}, "/run/old on this host is ansible-core 2.14.18;"),
        ({"reap_schedule_on_calendar": "every day"}, "does not understand reap_schedule_on_calendar=every day"),
        ({"reap_clear_latch": REALM}, "reap_clear_latch is for one sweep that a person looks at"),
    ):
        code, output = host.play(**changes)
        assert code == 2, output
        assert why in " ".join(output.split()), output
        assert not host.there(INVENTORY) and not host.there("/etc/systemd/system/%s" % SERVICE)


@needs_systemd
def test_a_host_sweeps_itself(host):
    code, output = host.play("--check", "--diff")
    assert (code, host.run("ls %s" % LIBRARY).split(), host.there(INVENTORY)) == (0, ["mine"], False), output
    assert "+OnFailure=alarm@%n.service" in output and re.search(r"changed=[1-9]", output)
    host.run(f"mkdir -p {LIBRARY}/0.0.9-0123456789ab/x")

    code, output = host.play()
    assert code == 0, output
    assert "0.0.9" not in host.run("ls %s" % LIBRARY) and host.there(LIBRARY + "/mine")
    assert [host.show(key, TIMER) for key in ("ActiveState", "UnitFileState")] == ["active", "enabled"]
    assert host.run("stat -c '%%a %%U' %s" % INVENTORY).split() == ["600", "root"]
    assert SECRET in host.run("cat %s" % INVENTORY)
    code, output = host.play()
    assert code == 0 and "changed=0" in output, output

    # It is what systemd understands, and all that the acts leave room for is forbidden.
    verified = host.systemd.execute(["systemd-analyze", "verify", SERVICE, TIMER])
    assert (verified.returncode, verified.stdout + verified.stderr) == (0, "")
    analyzed = host.systemd.execute(
        ["systemd-analyze", "security", "--no-pager", "--threshold=%d" % (10 * EXPOSURE), SERVICE])
    assert analyzed.returncode == 0, analyzed.stdout[-300:]

    # vdead2 is dead and something runs in it, vgone2 is dead, vbusy2 is not known and somebody is in its jail.
    for vm_id, runs in (("vdead", True), ("vgone", False), ("vbusy", True), ("vlive", True)):
        host.plant(vm_id + "2", runs=runs)
    host.list_live()
    code, status = host.sweep()
    assert (code, len(host.left())) == (0, 4), host.systemd.run(["journalctl", "-u", SERVICE], check=False)
    assert "suspected" in status and "\n" not in status
    time.sleep(1.1)
    host.list_live()
    code, status = host.sweep()
    assert (code, host.left()) == (0, ["vbusy2", "vlive2"]), status
    assert re.search(r"^microvm.reaper: realm pull, 1 host, 1 VMs live by .*: 4 reaped", status), status
    assert "Status: \"microvm.reaper: realm pull" in host.systemd.ctl("status", SERVICE, check=False)

    # The host is refused: by a list that cannot be, by a source that stops the fleet, and where it has no source.
    for changes, code, why in (
        ({"vms": []}, 2, r"REFUSED \(blind\)"),
        ({"host": "rack2"}, 2, r"REFUSED \(host_unknown\)"),
        ({"realm": "other"}, 2, r"REFUSED \(other_realm\)"),
    ):
        host.list_live(**changes)
        assert host.sweep()[0] == code
        assert re.search(why, host.show("StatusText")), host.show("StatusText")
        assert host.show("Result") == "exit-code"
    host.wait_for("test $(wc -l < %s/alarms) = 3" % host.place)
    assert set((host.place / "alarms").read_text().split()) == {SERVICE}


    # And by what the source gives each host of a fleet that nobody sees whole.
    host.plant("vone2", runs=False)
    host.plant("vtwo2", runs=False)
    before = host.left()
    host.list_live(dead=["vone2", "vtwo2"], budget=1)
    assert host.sweep()[0] == 0
    time.sleep(1.1)
    for budget, why in ((0, "the budget of the live source file .* is 0"), ({"rack1": 1, "*": 9}, "budget of 1 VMs")):
        host.list_live(dead=["vone2", "vtwo2"], budget=budget)
        code, status = host.sweep()
        assert (code, host.left()) == (2, before)
        assert re.search("REFUSED .over_budget.: .*%s" % why, status), status
    host.list_live(dead=["vone2", "vtwo2"], budget={"rack1": 2, "*": 0})
    assert host.sweep()[0] == 0
    assert set(before) - set(host.left()) == {"vone2", "vtwo2"}


@needs_systemd
def test_absent_waits_for_a_sweep_and_takes_its_own(host):
    assert host.play()[0] == 0
    # A list that is not there yet: the sweep waits for it.
    live = host.place / "live.json"
    host.list_live()
    text = live.read_text()
    live.unlink()
    os.mkfifo(live)
    host.systemd.ctl("start", "--no-block", SERVICE)
    host.wait_for("systemctl show -p ActiveState --value %s | grep -qx activating" % SERVICE)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        removal = pool.submit(host.play, "-e", "reap_schedule_state=absent")
        host.wait_for("! systemctl is-active -q %s" % TIMER, 300)
        time.sleep(3)
        assert not removal.done() and host.there(INVENTORY)
        assert host.show("ActiveState") == "activating"
        live.write_text(text)
        code, output = removal.result(timeout=600)
    assert code == 0, output
    assert host.show("Result") in ("success", "")
    for path in (INVENTORY, "/etc/microvm.reaper", "/etc/systemd/system/" + SERVICE, "/etc/systemd/system/" + TIMER,
                 "/var/lib/systemd/timers/stamp-" + TIMER, "/etc/systemd/system/timers.target.wants/" + TIMER):
        assert not host.there(path), path
    assert host.run("ls %s" % LIBRARY).split() == ["mine"]
    assert host.there(STATE + "/%s/ledger.json" % REALM), "what the host remembers stays"
    assert host.show("LoadState") == "not-found"
    code, output = host.play("-e", "reap_schedule_state=absent")
    assert code == 0 and "changed=0" in output, output


def test_what_the_unit_takes_away_no_act_needs(kernel):
    """Volumes, containers, zombies and all others go by the hand of a Python that has the unit's capabilities only."""
    unit = (ROOT / "roles/reap/templates/microvm-reaper.service.j2").read_text()
    (named,) = re.findall(r"^CapabilityBoundingSet=(.*)", unit, re.MULTILINE)
    kept = ",".join("+" + name.lower().removeprefix("cap_") for name in named.split())
    caged = "#!/bin/sh\nexec setpriv --bounding-set=-all,%s --no-new-privs /usr/bin/python3 \"$@\"\n" % kept
    kernel.run("kern", "cat > /run/caged; chmod 755 /run/caged", input=caged, check=True)
    kernel.plant({"live": 3, "orphans": 3, "hostile": True})
    how = ["-e", "ansible_python_interpreter=/run/caged"]
    first = kernel.sweep(*how)
    assert first.code == 0, first.output
    time.sleep(1.1)
    kernel.list_live()
    second = kernel.sweep(*how)
    assert second.code == 0, second.output
    assert {one["kind"] for one in second.outcomes()} == {
        "cgroup", "container", "dm_thin", "jail", "snapshot", "zombie"}
    assert kernel.check("gone") == []
