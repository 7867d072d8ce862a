# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Whole sweeps by ansible-playbook over real hosts in which something breaks: before a sweep, or in the middle of it.

The rows are those of docs/scenarios.md. Each test plants one fault, and in the end says well(): what is live is as it
was, what is dead is gone, and neither the fault nor a reaper has left anything behind.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hosts.fleet import BIN, ROOT, Fleet, Sweep
from integration.test_sweeps import QUICK, STATE, in_background, ledgers, listed, meanwhile, on, orphans, strikes, write
from integration.test_thin_id import FILL, TINY

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.timeout(150),
    pytest.mark.skipif(os.geteuid() != 0, reason="test hosts need root"),
]

FEW = {"live": 2, "orphans": 2, "containers": 0, "running_orphans": 0, "zombies": 0}
HOLD = {"jail": 3600, "dm_thin": 3600, "snapshot": 3600}
JAILS = "/srv/jailer/firecracker"
DM = "export DM_DISABLE_UDEV=1; "


# --- what is left of a fault, or of a reaper

LEAKS = r"""
import fcntl, glob, json, os, subprocess, sys, time

def told(path):
    try:
        with open(path, errors="replace") as stream:
            return stream.read()
    except OSError:
        return ""

# In a container the block devices are those of the machine, and anybody's.
OWN_KERNEL = "REAP_KIND=kernel" in told("/proc/cmdline").split()

def there():
    points = [line.split(" ")[4] for line in told("/proc/self/mountinfo").splitlines()]
    mounts = {"mounts": sorted(point for point in points if not point.startswith("/srv/jailer/"))}
    return mounts if not OWN_KERNEL else {
        **mounts,
        "loop devices": sorted(map(told, glob.glob("/sys/block/loop*/loop/backing_file"))),
        "devices": sorted(name for name in map(told, glob.glob("/sys/block/dm-*/dm/name")) if "hyper-rw-v" not in name),
    }

def reapers():
    found = []
    for pid in set(filter(str.isdigit, os.listdir("/proc"))) - {str(os.getpid())}:
        line = told("/proc/%s/cmdline" % pid).replace("\0", " ")
        if any(word in line for word in ("python", "ansible", "dmsetup", "thin_dump")) and "plant.py" not in line:
            found.append("a process is left: %s %s" % (pid, line))
    return found

def is_held(name):
    try:
        with open("/var/lib/microvm.reaper/" + name) as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False

if sys.argv[1] == "remember":
    json.dump(there(), open("/run/there.json", "w"))
    sys.exit()
end = time.monotonic() + 8  # evidence may still be packed in the background
while reapers() and time.monotonic() < end:
    time.sleep(0.1)
wrong = reapers()
before = json.load(open("/run/there.json"))
wrong += ["%s: %s and not %s" % (key, now, before[key]) for key, now in there().items() if now != before[key]]
wrong += [name + " is held" for name in ("lock", "thin-metadata-snapshots.lock") if is_held(name)]
notes = told("/var/lib/microvm.reaper/thin-metadata-snapshots.json")
wrong += ["a metadata snapshot is noted: " + notes] if notes not in ("", "{}") else []
if OWN_KERNEL:
    done = subprocess.run(["dmsetup", "status", "--target", "thin-pool"], capture_output=True, text=True)
    wrong += ["a metadata snapshot is held: " + line for line in done.stdout.splitlines() if line.split()[7:8] > ["-"]]
print("\n".join(wrong))
"""


def remember(fleet: Fleet) -> None:
    for host in fleet.hosts():
        on(fleet, host, "python3 - remember", input=LEAKS)


def well(fleet: Fleet, dead: str = "gone") -> list[str]:
    """Return what is wrong on any host: with what is live, dead or lies outside, or that a reaper has left behind."""
    problems = fleet.check(dead)
    for host in fleet.hosts():
        problems += [f"{host}: {line}" for line in on(fleet, host, "python3 - look", input=LEAKS).splitlines() if line]
    return problems


# --- sweeps and what happens to them


def struck(fleet: Fleet, **options) -> None:
    """Plant, and sweep once."""
    fleet.plant(dict(FEW, **options))
    remember(fleet)
    first = sweep(fleet)
    assert first.code == 0 and not first.outcomes(), first.output


def sweep(fleet: Fleet, *arguments: str, live: tuple[str, ...] = (), hold=0, times: int = 1, **variables) -> Sweep:
    """Sweep with a list of this moment in which ``live`` live on the first host too; return the last of several."""
    document = listed(fleet)
    vms = document["vms"] + [{"vm_id": vm_id, "host": document["hosts"][0]} for vm_id in live]
    write(fleet, dict(document, vms=vms, count=len(vms)))
    extra = json.dumps(dict(QUICK, reap_pressure=100, reap_hold=hold) | variables)
    return fleet.sweep(*arguments, "-e", extra, *["playbooks/reap.yml"] * (times - 1), timeout=100)


def undo(fleet: Fleet, *arguments: str) -> subprocess.CompletedProcess:
    argv = [str(BIN / "ansible-playbook"), "-i", f"{fleet.state}/inventory.yml", *arguments, "playbooks/undo.yml"]
    return subprocess.run(argv, cwd=ROOT, text=True, capture_output=True, timeout=100, check=False)


def results(swept: Sweep, kind: str) -> dict[str, str]:
    """Return ``{name: outcome}`` of a kind, without the directory or prefix that all have."""
    found = [one for one in swept.outcomes() if one["kind"] == kind]
    return {one["name"].rpartition("/")[2].replace("hyper-rw-", ""): one["outcome"] for one in found}


def flat(swept: Sweep) -> str:
    """Return the output of a sweep without its line breaks: warnings are folded."""
    return " ".join(swept.output.split())


@contextlib.contextmanager
def between(fault: Callable[[], object]) -> Iterator[dict]:
    """Give the variables with which a sweep does something in between: it has its plan, and did nothing yet.

    The end of VMs is published right before the first act, and whoever hears it may take his time.
    """
    errors: list[BaseException] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            with lock:  # who is impatient asks again, and waits again
                if not heard:
                    heard.append(True)
                    try:
                        fault()
                    except BaseException as err:
                        errors.append(err)
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_arguments: object) -> None:
            """Be quiet."""

    heard: list[bool] = []
    lock = threading.Lock()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield {"reap_webhook_url": f"http://127.0.0.1:{server.server_port}/"}
    finally:
        server.shutdown()
        server.server_close()
    assert heard and not errors, errors


@contextlib.contextmanager
def dmsetup_that(fleet: Fleet, case: str, does: str) -> Iterator[None]:
    """Have the dmsetup of the host do something first when its arguments are of a case."""
    script = f'#!/bin/sh\ncase "$*" in\n{case}) {does} ;;\nesac\nexec /opt/dmsetup "$@"\n'
    prepare = "test -e /opt/dmsetup || cp /usr/sbin/dmsetup /opt/dmsetup; cat > /opt/other; chmod 755 /opt/other"
    on(fleet, "kern", prepare, input=script)
    swap = "cp /opt/%s /usr/sbin/.new; mv /usr/sbin/.new /usr/sbin/dmsetup"
    with meanwhile(fleet, "kern", swap % "other", swap % "dmsetup"):
        yield


# --- thin pools


@contextlib.contextmanager
def more_pools(fleet: Fleet, make: str, name: str) -> Iterator[None]:
    """Make a pool of that name, for as long as the test takes."""
    # Whoever still waits for room, because a test failed, is given some, or nothing could be removed.
    remove = (
        f"of=$(dmsetup info -c --noheadings -o major,minor {name}); "
        "remove() { for one in $(dmsetup ls --target thin | cut -f1); do "
        'dmsetup table $one | grep -q " $of " && dmsetup remove $one; done; }; remove; '
        f'for id in 1 2; do dmsetup message {name} 0 "delete $id"; done; sleep 0.3; remove; '
        f"d=$(losetup -a | grep /run/thin/{name}/ | cut -d: -f1); dmsetup remove --retry {name}; losetup -d $d; "
        f"rm -r /run/thin/{name}"
    )
    with meanwhile(fleet, "kern", DM + make, DM + remove):
        yield


SMALL = """
echo 0 > /sys/module/dm_thin_pool/parameters/no_space_timeout
mkdir -p /run/thin/small; truncate -s 8M /run/thin/small/m; truncate -s 16M /run/thin/small/d
m=$(losetup -f --show /run/thin/small/m) d=$(losetup -f --show /run/thin/small/d)
dmsetup create small --table "0 32768 thin-pool $m $d 128 0 1 skip_block_zeroing"
for of in 1:vdeada 2:vdeadb 3:vlivez; do
    dmsetup message small 0 "create_thin ${of%:*}"
    dmsetup create hyper-rw-${of#*:} --table "0 32768 thin /dev/mapper/small ${of%:*}"
done
for of in vdeada vdeadb; do
    dd if=/dev/zero of=/dev/mapper/hyper-rw-$of bs=1M count=5 oflag=direct 2> /dev/null || exit 1
done
"""
# More than there is room for: the kernel lets it wait for room.
WRITE = """
dd if=/dev/urandom of=/run/written bs=1M count=8 2> /dev/null
setsid dd if=/run/written of=/dev/mapper/hyper-rw-vlivez bs=1M oflag=direct > /dev/null 2> /run/said < /dev/null &
for turn in $(seq 100); do dmsetup status small | grep -q out_of_data_space && exit 0; sleep 0.1; done; exit 1
"""


def test_row_23_a_pool_that_is_full_is_given_room_and_who_waits_for_it_goes_on(kernel: Fleet) -> None:
    """What is set aside gives nothing back; under pressure the older half of it is removed. Deletes need no room."""
    kernel.plant(dict(FEW, orphans=1))
    remember(kernel)
    with more_pools(kernel, SMALL, "small"):
        sweep(kernel, live=("vlivez",))
        on(kernel, "kern", DM + WRITE)
        aside = sweep(kernel, live=("vlivez",), hold=HOLD, reap_pressure=90)
        said = results(aside, "dm_thin")
        assert (said["vdeada"], said["vdeadb"]) == ("set_aside", "set_aside"), aside.output
        assert "out_of_data_space" in on(kernel, "kern", "dmsetup status small")
        pressed = sweep(kernel, live=("vlivez",), hold=HOLD, reap_pressure=90)
        gone = {vm_id for vm_id, one in results(pressed, "dm_thin").items() if one == "reaped"} & {"vdeada", "vdeadb"}
        assert pressed.code == 0 and len(gone) == 1, pressed.output
        on(kernel, "kern", "for i in $(seq 50); do grep -q copied /run/said && break; sleep 0.1; done")
        on(kernel, "kern", "cmp -n 8388608 /run/written /dev/mapper/hyper-rw-vlivez")
        assert " rw " in on(kernel, "kern", "dmsetup status small")
        last = sweep(kernel, live=("vlivez",))
        assert last.code == 0, last.output
        status = on(kernel, "kern", "dmsetup ls --target thin; dmsetup status small")
        assert "vdead" not in status and "128/256" in status and "vlivez" in status, status
    assert well(kernel) == []


def test_row_22_a_suspended_device_and_a_dmsetup_that_hangs_midway(kernel: Fleet) -> None:
    struck(kernel, orphans=3)
    suspended, *others = orphans(kernel, "kern")
    with (
        meanwhile(kernel, "kern", f"dmsetup suspend hyper-rw-{suspended}", f"dmsetup resume hyper-rw-{suspended}"),
        dmsetup_that(kernel, "*reserve_metadata_snap*", "kill -STOP $$"),
    ):
        begin = time.monotonic()
        hung = sweep(kernel, hold=HOLD, reap_deadline=30)
        assert time.monotonic() - begin < 40, hung.output
        said = results(hung, "dm_thin")
        assert suspended not in said and sorted(said) == sorted(others), hung.output
        # No more of device-mapper in this sweep, and all of the rest.
        assert set(said.values()) == {"deferred"}, hung.output
        assert set(results(hung, "cgroup").values()) == {"reaped"}, hung.output
        (volume,) = [
            one for one in hung.report["hosts"]["kern"]["families"][suspended]["resources"] if one["kind"] == "dm_thin"
        ]
        assert [holder["type"] for holder in volume["holders"]] == ["suspended"], volume
        assert [line for line in well(kernel, "any") if "process" in line] == []
    after = sweep(kernel, times=2)
    assert after.code == 0 and well(kernel) == [], after.output


def test_row_24_a_metadata_snapshot_of_somebody_else_keeps_the_pool_as_it_is(kernel: Fleet) -> None:
    struck(kernel)
    pool = "hyper-thinpool"
    message = "dmsetup message %s 0 %s_metadata_snap"
    with meanwhile(kernel, "kern", message % (pool, "reserve"), message % (pool, "release")):
        before = on(kernel, "kern", f"dmsetup status {pool}")
        for hold in (HOLD, 0):
            held = sweep(kernel, hold=hold)
            assert held.code == 0 and results(held, "dm_thin") == {}, held.output
            assert "its metadata snapshot is held by somebody else" in json.dumps(held.report)
        assert on(kernel, "kern", f"dmsetup status {pool}") == before
    after = sweep(kernel)
    assert after.code == 0 and set(results(after, "dm_thin").values()) == {"reaped"}, after.output
    assert well(kernel) == []


BROKEN = "".join(
    [
        TINY,
        FILL % (1, 2),
        "dmsetup create hyper-rw-vdeadc --table '0 65536 thin /dev/mapper/tiny 1'",
        "\n(%s) > /dev/null 2>&1; dmsetup status tiny | grep needs_check" % FILL % (3, 40),
    ]
)


def test_row_23_a_pool_that_needs_a_check_is_left_alone(kernel: Fleet) -> None:
    """Its only volume stays, with every block, while those of the pool beside it go."""
    kernel.plant(FEW)
    remember(kernel)
    with more_pools(kernel, BROKEN, "tiny"):
        before = on(kernel, "kern", "dmsetup status tiny; dmsetup table hyper-rw-vdeadc")
        done = sweep(kernel, times=2)
        assert done.code == 0 and set(results(done, "dm_thin")) == set(orphans(kernel, "kern")), done.output
        (volume,) = done.report["hosts"]["kern"]["families"]["vdeadc"]["resources"]
        assert volume["holders"] == [{"type": "pool", "name": "tiny: needs_check"}]
        assert on(kernel, "kern", "dmsetup status tiny; dmsetup table hyper-rw-vdeadc") == before
        on(kernel, "kern", DM + "dmsetup remove --retry hyper-rw-vdeadc")
    assert well(kernel) == []


# --- what is stuck

# Mounts a file system whose server takes what it is asked, and answers nothing but that it is there.
FUSE = r"""
import ctypes, os, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
os.makedirs("/srv/dead", exist_ok=True)
server = os.open("/dev/fuse", os.O_RDWR)
options = b"fd=%d,rootmode=40000,user_id=0,group_id=0,allow_other" % server
if libc.mount(b"dead", b"/srv/dead", b"fuse", 0, options) < 0:
    sys.exit(os.strerror(ctypes.get_errno()))
if os.fork():
    sys.exit()
os.setsid()
null = os.open("/dev/null", os.O_RDWR)
for descriptor in (0, 1, 2):
    os.dup2(null, descriptor)
open("/run/dead.pid", "w").write(str(os.getpid()))
while True:
    asked = os.read(server, 1 << 18)
    if struct.unpack_from("I", asked, 4)[0] == 26:
        body = struct.pack("IIIIHHII", 7, 31, 65536, 0, 16, 16, 65536, 1) + bytes(36)
        os.write(server, struct.pack("IiQ", 16 + len(body), 0, struct.unpack_from("Q", asked, 8)[0]) + body)
"""
# In the cgroup of one VM and the jail of another.
STICK = """
setsid sh -c 'echo 0 > {cgroup}/cgroup.procs; cd {jail}; exec cat /srv/dead/file' > /dev/null 2>&1 < /dev/null &
for turn in $(seq 50); do
    for pid in $(cat {cgroup}/cgroup.procs); do grep -q cat /proc/$pid/comm && sleep 0.3 && exit 0; done; sleep 0.1
done
exit 1
"""


def test_row_17_31_a_process_that_is_stuck_in_a_dead_file_system(kernel: Fleet) -> None:
    """It is in the cgroup of one dead VM and in the jail of another; and then there is a base on that file system."""
    struck(kernel, orphans=3, running_orphans=1)
    variables = kernel.hosts()["kern"]
    running, entered, other = orphans(kernel, "kern")
    cgroup = f"{variables['test_cgroup_mount']}/{variables['test_cgroup_parent']}/hyper/{running}"
    on(kernel, "kern", "modprobe fuse; cat > /run/dead.py; python3 /run/dead.py", input=FUSE)
    try:
        on(kernel, "kern", STICK.format(cgroup=cgroup, jail=f"{JAILS}/{entered}/root"))
        dead_base = sweep(kernel, reap_jail_bases=["/srv/jailer", "/srv/dead"], reap_deadline=6)
        assert "COULD NOT READ jail (" in dead_base.output and results(dead_base, "jail") == {}, dead_base.output
        assert results(dead_base, "cgroup") == {running: "deferred", entered: "reaped", other: "reaped"}
        begin = time.monotonic()
        done = sweep(kernel)
        assert done.code == 0 and time.monotonic() - begin < 30, done.output
        (left,) = [one for one in done.outcomes() if one["outcome"] == "deferred"]
        assert left["kind"] == "cgroup" and "SIGKILL" in left["message"], left
        assert [holder["command"] for holder in left["holders"]] == ["cat"], left
        assert "unkillable" in left["holders"][0]["name"], left
        assert results(done, "jail") == {running: "reaped", other: "reaped"}, done.output
        assert f"jail {JAILS}/{entered} is in use although the VM is absent" in flat(done), done.output
    finally:
        on(kernel, "kern", "kill -KILL $(cat /run/dead.pid); sleep 0.3; umount /srv/dead")
    # Now that nothing is in its jail any more, that needs to be seen twice.
    assert sweep(kernel, times=2).code == 0 and well(kernel) == []


def test_row_27_containerd_that_hangs_when_the_acts_begin(pair: Fleet) -> None:
    struck(pair, live=1, containers=1)
    with between(lambda: on(pair, "one", "kill -STOP $(pidof containerd)")) as variables:
        try:
            begin = time.monotonic()
            hung = sweep(pair, reap_deadline=8, **variables)
            assert hung.code == 2 and time.monotonic() - begin < 40, hung.output
        finally:
            on(pair, "one", "kill -CONT $(pidof containerd)")
    said = [(one["kind"], one["outcome"]) for one in hung.report["hosts"]["one"]["outcomes"]]
    assert {outcome for kind, outcome in said if kind in ("container", "snapshot")} == {"failed", "deferred"}, said
    # What containerd has nothing to do with goes, as far as there is time left.
    assert {outcome for kind, outcome in said if kind in ("cgroup", "jail")} <= {"reaped", "deferred"}, said
    assert pair.left("two") == [] and {"container", "snapshot"} <= {name.split()[0] for name in pair.left("one")}
    after = sweep(pair)
    assert after.code == 0 and well(pair) == [], after.output


# --- jails

# Whatever a tenant could put into its jail, and then exchanges it, as its user, as fast as it can.
TRAPS = """
cd {jail}/root
ln -s /etc etc; ln -s /etc/passwd passwd; ln -s ../../../../sentinel up
ln /srv/sentinel/precious hard 2> /dev/null || true
mkfifo -m 666 fifo2; mknod null c 1 3; mknod disk b 7 250
mkdir -p bound; mount --bind /srv/sentinel bound
ln -s /srv/sentinel link; for i in $(seq 200); do mkdir -p d$i/inner/deep; touch d$i/file; done
chown -hR nobody d[0-9]*; chown -h nobody . link; chmod 755 /srv /srv/jailer {jail}/.. {jail} .
"""
RACER = r"""
import ctypes, os, sys, time
libc = ctypes.CDLL(None)
end, jails = time.monotonic() + float(sys.argv[1]), [name.encode() for name in sys.argv[2:]]
os.setresuid(65534, 65534, 65534)
names = [(b"%s/root/d%d" % (jail, number), jail + b"/root/link") for number in range(1, 201) for jail in jails]
print("ready", flush=True)
swaps = 0
while time.monotonic() < end:
    for name, link in names:
        swaps += libc.renameat2(-100, name, -100, link, 2) == 0
        libc.renameat2(-100, name, -100, link, 2)
print(swaps)
"""


@pytest.mark.parametrize("hold", [0, HOLD], ids=["removed", "set aside first"])
def test_row_28_traps_in_jails_that_change_while_they_are_walked(pair: Fleet, hold) -> None:
    """Nothing outside changes, neither what the traps lead to nor how often it is linked, and the jails go."""
    struck(pair)
    etc = "find /etc -xdev -type f -exec md5sum {} + | sort | md5sum; stat -c '%a %u %g %h %n' /etc /etc/passwd"
    before = on(pair, "one", etc)
    jails = [f"{JAILS}/{vm_id}" for vm_id in orphans(pair, "one")]
    for jail in jails:
        on(pair, "one", TRAPS.format(jail=jail))
    with ThreadPoolExecutor() as pool:
        swaps = pool.submit(on, pair, "one", f"cd /; python3 - 10 {' '.join(jails)}", input=RACER)
        done = sweep(pair, hold=hold)
    assert int(swaps.result().split()[1]) > 100, swaps.result()
    expected = {"set_aside"} if hold else {"reaped", "deferred"}
    assert set(results(done, "jail").values()) <= expected and done.code == 0, done.output
    after = sweep(pair)
    assert after.code == 0 and on(pair, "one", etc) == before, after.output
    assert on(pair, "one", "stat -c %h /srv/sentinel/precious") == "1\n"
    assert well(pair) == []


def test_rows_14_19_38_what_is_made_again_or_goes_when_the_acts_begin(kernel: Fleet) -> None:
    """All of one VM is another object of the same name; all of another one is gone. Neither is an error."""
    struck(kernel, orphans=3)
    variables = kernel.hosts()["kern"]
    again, goes, other = orphans(kernel, "kern")
    cgroups = f"{variables['test_cgroup_mount']}/{variables['test_cgroup_parent']}/hyper"
    remove = "rmdir %s/{0}; umount %s/{0}/root/mnt; rm -r %s/{0}; " % (cgroups, JAILS, JAILS)
    fault = DM + (
        remove.format(again) + f"mkdir -p {cgroups}/{again} {JAILS}/{again}/root; "
        f"t=$(dmsetup table hyper-rw-{again}); dmsetup remove hyper-rw-{again}; "
        f'dmsetup create hyper-rw-{again} --table "$t"; ' + remove.format(goes) + f"dmsetup remove hyper-rw-{goes}"
    )
    with between(lambda: on(kernel, "kern", fault)) as hook:
        done = sweep(kernel, **hook)
    assert done.code == 0, done.output
    for kind in ("cgroup", "jail", "dm_thin"):
        assert results(done, kind) == {again: "identity_changed", goes: "already_gone", other: "reaped"}, done.output
    # The id of a volume that somebody else deactivated is not ours to delete: he may have set it aside.
    on(kernel, "kern", f"dmsetup message hyper-thinpool 0 'delete {kernel.planted()['kern']['thin_ids'] - 2}'")
    first = sweep(kernel)
    assert not first.outcomes() and strikes(kernel, "kern") == {1}, first.output
    assert sweep(kernel).code == 0 and well(kernel) == []


# The zombie of a dead VM is reaped, and its pid passes to what runs in the cgroup of a live one.
REUSE = r"""
import json, os, signal, time
planted = json.load(open("/run/planted.json"))
options, live = planted["options"], planted["live"][0]
pid = int(planted["zombies"][planted["orphans"][-1]].split(":")[0])
os.kill(int(planted["daemon"].split(":")[0]), signal.SIGCHLD)
while os.path.exists("/proc/%d" % pid):
    time.sleep(0.01)
null = os.open("/dev/null", os.O_RDWR)
for turn in range(1000):
    open("/proc/sys/kernel/ns_last_pid", "w").write(str(pid - 1))
    child = os.fork()
    if child == 0 and os.getpid() != pid:
        os._exit(0)
    if child == 0:
        os.setsid()
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        open("%s/%s/%s/cgroup.procs" % (options["cgroup_mount"], options["cgroup_parent"], live), "w").write("0")
        os.execv("/srv/jailer/firecracker/%s/root/firecracker" % live, ["sleep", "1000000"])
    if child == pid:
        break
    os.waitpid(child, 0)
time.sleep(0.1)
print(pid, open("/proc/%d/stat" % pid).read().split()[21])
"""


def test_rows_12_13_a_pid_that_passes_to_the_vmm_of_a_live_vm_when_the_acts_begin(pair: Fleet) -> None:
    struck(pair, zombies=1)
    said: list[str] = []
    with between(lambda: said.append(on(pair, "one", "python3 -", input=REUSE))) as hook:
        done = sweep(pair, **hook)
    pid, started = said[0].split()
    (zombie,) = [one for one in done.report["hosts"]["one"]["outcomes"] if one["kind"] == "zombie"]
    assert (zombie["name"], zombie["outcome"], done.code) == (pid, "identity_changed", 0), done.output
    assert on(pair, "one", f"cut -d' ' -f2,22 /proc/{pid}/stat").split() == ["(firecracker)", started]
    assert sweep(pair).outcomes() == []
    assert well(pair) == []
    assert on(pair, "one", f"cut -d' ' -f2,22 /proc/{pid}/stat").split() == ["(firecracker)", started]


# --- more than one at a time

# Waits until the reaper is in the middle of its acts, then ends the session by which it was started.
CUT = r"""
import contextlib, os, signal, time
end = time.monotonic() + 40
while not os.path.exists("/run/slow"):
    assert time.monotonic() < end, "no reaper came"
    time.sleep(0.05)
pid = int(open("/run/slow").read())
def stat(pid):
    head, _paren, tail = open("/proc/%d/stat" % pid).read().rpartition(")")
    return head.partition("(")[2], int(tail.split()[1])
while not stat(pid)[0].startswith("sshd"):
    pid = stat(pid)[1]
session = [pid]
while stat(stat(pid)[1])[0].startswith("sshd") and stat(stat(stat(pid)[1])[1])[0].startswith("sshd"):
    pid = stat(pid)[1]
    session.append(pid)
for pid in session:
    with contextlib.suppress(ProcessLookupError):  # an sshd ends by itself soon after the one below it
        os.kill(pid, signal.SIGKILL)
print("cut", session)
"""


def test_row_30_the_connection_breaks_in_the_middle_of_the_acts(kernel: Fleet, tmp_path: Path) -> None:
    """The reaper on the host goes on alone or dies; whatever it was, the next sweep comes to the same end."""
    struck(kernel, orphans=3)
    listed(kernel)
    slow = "echo $$ > /run/slow.new; mv /run/slow.new /run/slow; sleep 3"
    with meanwhile(kernel, "kern", "rm -f /run/slow", "rm -f /run/slow"), dmsetup_that(kernel, "*reserve*", slow):
        cut = in_background(kernel, tmp_path / "cut.json")
        said = on(kernel, "kern", "python3 -", input=CUT)
        busy = sweep(kernel)
        output = cut.communicate(timeout=60)[0]
        assert cut.returncode == 4 and "UNREACHABLE" in output and "cut" in said, output
        assert busy.code == 0, busy.output
        on(kernel, "kern", f"flock -w 30 {STATE}/lock true")
    done = sweep(kernel)
    assert done.code == 0 and kernel.ledger("kern")["intents"] == [], done.output
    assert well(kernel) == []


STOP_IT = r"""
import os, signal, sys, time
inode, end = os.stat("/var/lib/microvm.reaper/lock").st_ino, time.monotonic() + 40
while True:
    assert time.monotonic() < end, "no reaper came"
    rows = [line.split() for line in open("/proc/locks")]
    for pid in [int(row[4]) for row in rows if row[1] == "FLOCK" and row[5].endswith(":%d" % inode)]:
        os.kill(pid, signal.SIGSTOP)
        print(pid)
        sys.exit()
"""


def test_row_29_undo_waits_for_no_reaper_and_no_reaper_for_undo(pair: Fleet, tmp_path: Path) -> None:
    """While a reaper works on a host undo says so and changes nothing; what it wanted is gone then."""
    struck(pair, live=1)
    aside = sweep(pair, hold=HOLD)
    assert set(results(aside, "jail").values()) == {"set_aside"}, aside.output
    listed(pair)
    with ThreadPoolExecutor() as pool:
        stopper = pool.submit(on, pair, "one", "python3 -", input=STOP_IT)
        at_work = in_background(pair, tmp_path / "a.json", reap_hold=0)
        pid = int(stopper.result())
    try:
        before = ledgers(pair)["one"]
        wanted = undo(pair, "--limit", "one", "-e", f"sweep={aside.report['sweep']}")
        assert wanted.returncode == 0 and "another reaper works on this host" in wanted.stdout, wanted.stdout
        assert ledgers(pair)["one"] == before
    finally:
        on(pair, "one", f"kill -CONT {pid}")
    output = at_work.communicate(timeout=60)[0]
    assert at_work.returncode == 0, output
    assert "nothing of it is aside on this host" in undo(pair, "-e", f"sweep={aside.report['sweep']}").stdout
    assert well(pair) == []


# --- rights, and what a host does not have


def test_row_40_who_may_not_is_told_which_right_is_missing(pair: Fleet) -> None:
    """Row 39 too: a host without device-mapper has nothing of it to reap, which is no failure."""
    struck(pair)
    for host in pair.hosts():
        on(pair, host, "chmod 755 /run; id reader > /dev/null 2>&1 || useradd reader")
    before = ledgers(pair)
    done = sweep(pair, "-b", "--become-user=reader", "--become-method=su")
    assert done.code != 0 and not done.outcomes(), done.output
    assert "the reaper has to run as root" in flat(done) and STATE in flat(done), done.output
    assert ledgers(pair) == before and well(pair, "there") == []
    real = sweep(pair)
    assert real.code == 0, real.output
    has_it = os.path.exists("/sys/class/misc/device-mapper")  # the containers have this machine's kernel
    assert has_it or "dm_thin" in real.report["hosts"]["one"]["absent"], real.report
    assert well(pair) == []
