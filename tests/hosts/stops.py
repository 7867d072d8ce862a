"""Runs on a test host: kills the reaper at each step that matters, and looks what the next one does.

    stops.py CASE KINDS EVERY [PLACE]    print {"steps": N, "tried": [...], "problems": [...]}

A step is a call that changes something, or tells another process to: every one is counted, in the reaper and in its
children, and the reaper is killed, with the child that has got there, right before the step. The collection lies in
/tmp/reaper. CASE is remove, aside, finish or undo; KINDS are some of cgroup,jail,dm_thin, or container,snapshot; EVERY
is 1 for all steps, 3 for each third one; PLACE is where cgroups are made, a path below the mount of the v2 hierarchy,
or containerd's namespace. With containers, which are slow to make, the steps are what containerd is told to change,
before and after it has: those between are the same for all kinds.
"""

import contextlib
import hashlib
import json
import mmap
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, "/tmp/reaper")
from ansible_collections.microvm.reaper.plugins.module_utils import (
    acts,
    containerd,
    evidence,
    gather,
    probe,
    safe_tree,
)
from ansible_collections.microvm.reaper.plugins.module_utils import journal as journals
from ansible_collections.microvm.reaper.plugins.module_utils import ledger as ledgers
from ansible_collections.microvm.reaper.plugins.module_utils.all_kinds import ORDER, TRAITS
from ansible_collections.microvm.reaper.plugins.plugin_utils import planner

REALM = "stops"
STATE = "/var/lib/stops"
JAILS = Path("/srv/stops")
SENTINEL = Path("/srv/stops-sentinel")
KINDS = sys.argv[2].split(",")
EVERY = int(sys.argv[3])
PLACE = (sys.argv + ["stops"])[4]
MOUNT = next(line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines() if " - cgroup2 " in line)
CGROUPS = Path(MOUNT) / PLACE
POOL = "stops-pool"
IMAGES = Path("/run/thin") / POOL
ALL_RULES = {
    "cgroup": [{"root": PLACE, "name": "(?P<vm_id>v[a-z]+)"}],
    "jail": [{"base": str(JAILS), "exec": "fc", "name": "(?P<vm_id>v[a-z]+)", "evidence": ["root/*.log"]}],
    "dm_thin": [{"name": "stops-rw-(?P<vm_id>v[a-z]+)"}],
    "container": [{"namespace": PLACE, "name": "(?P<vm_id>v[a-z]+)"}],
    "snapshot": [{"namespace": PLACE, "name": "(?P<vm_id>v[a-z]+)"}],
}
RULES = {kind: ALL_RULES[kind] for kind in KINDS}
SHARE = {
    "realm": REALM, "source": "stops", "epoch": 1, "epochs": {}, "counts": {}, "generated_at": 1_800_000_000.0,
    "age": 0.0, "count": 1, "proven": True, "host_known": True, "live": ["vlive"], "elsewhere": {},
    "tombstones": {"vdead": 99999.0},
}
POLICY = {
    "realm": REALM, "host": "h", "strike_interval": 0.001, "min_age": 0, "max_percent_per_host": 100, "pressure": 100,
    "reused_ids": [".*"],
}
LADDER = dict.fromkeys(KINDS, 3600)
CTR = f"ctr --namespace {PLACE}"
IMAGE = ("/opt/test/busybox.tar", "localhost/busybox:test")
THIN_IDS = {"vlive": 1, "vdead": 2}


# --- planting


def sh(command, check=True):
    done = subprocess.run(["sh", "-ec", command], capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise RuntimeError(f"{command}: {done.stderr}")
    return done.stdout


def remove_pool():
    for name in sh("dmsetup ls --target thin | cut -f1", check=False).split():
        if name.startswith("stops-rw-"):
            sh(f"dmsetup remove --retry {name}", check=False)
    sh(f"dmsetup remove --retry {POOL}", check=False)
    for line in sh("losetup -a", check=False).splitlines():
        if str(IMAGES) in line:
            sh("losetup -d " + line.split(":")[0], check=False)
    shutil.rmtree(IMAGES, ignore_errors=True)


def plant(vm_id):
    """Make all that a VM has: a cgroup in which something runs, a jail with a log, a volume with data."""
    if "dm_thin" in KINDS:
        number = THIN_IDS[vm_id]
        sh(
            f"dmsetup message {POOL} 0 'create_thin {number}'; "
            f"dmsetup create stops-rw-{vm_id} --table '0 2048 thin /dev/mapper/{POOL} {number}'; dmsetup mknodes; "
            f"yes {vm_id} | head -c 200000 > /dev/mapper/stops-rw-{vm_id}; sync /dev/mapper/stops-rw-{vm_id}"
        )
    if "jail" in KINDS:
        plant_jail(vm_id)
    if "container" in KINDS:
        sh(f"{CTR} run --detach {IMAGE[1]} {vm_id} sleep 1000")
    running = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    if "cgroup" in KINDS:
        (CGROUPS / vm_id / "below").mkdir(parents=True)
        (CGROUPS / vm_id / "below" / "cgroup.procs").write_text(str(running.pid))
    return running


def plant_jail(vm_id):
    root = JAILS / "fc" / vm_id / "root"
    (root / "run").mkdir(parents=True)
    (root / "vm.log").write_text("started\n" * 50)
    os.symlink("/etc/passwd", root / "link")
    os.mkfifo(root / "run" / "fifo")
    os.chmod(root.parent, 0o710)


def clear():
    for root in (CGROUPS,):
        for path in sorted(root.glob("*"), reverse=True):
            if path.is_dir():
                with contextlib.suppress(OSError):
                    (path / "cgroup.freeze").write_text("0")
                    (path / "cgroup.kill").write_text("1")
                for _try in range(200):
                    with contextlib.suppress(OSError):
                        for below in sorted(path.rglob("*"), reverse=True):
                            if below.is_dir():
                                below.rmdir()
                        path.rmdir()
                        break
                    time.sleep(0.01)
    for vm_id, number in THIN_IDS.items() if "dm_thin" in KINDS else ():
        sh(f"dmsetup remove --retry stops-rw-{vm_id}; dmsetup message {POOL} 0 'delete {number}'", check=False)
    if "dm_thin" in KINDS:
        sh("dmsetup mknodes")
    for vm_id in THIN_IDS if "container" in KINDS else ():
        sh(f"{CTR} tasks rm --force {vm_id}; {CTR} containers rm {vm_id}; {CTR} snapshots rm {vm_id}", check=False)
    shutil.rmtree(JAILS, ignore_errors=True)
    shutil.rmtree(STATE, ignore_errors=True)


# --- looking


def tree(root):
    found = []
    for path in sorted(root.rglob("*")):
        status = os.lstat(path)
        data = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() and not path.is_symlink() else ""
        found.append([str(path), oct(status.st_mode), status.st_uid, status.st_ino, data])
    return found


def look(vm_id):
    """Return all that there is of a VM, by other means than the reaper's."""
    node, volume = f"/dev/mapper/stops-rw-{vm_id}", None
    if os.path.exists(node):
        look_at = f"dmsetup table {node}; dmsetup info -c --noheadings -o uuid,attr {node}; md5sum < {node}"
        volume = sh(f"{look_at}; stat -Lc '%a %u %g' {node}", check=False) or "a node without a device"
    container = None
    if "container" in KINDS:
        tasks = sh(f"{CTR} tasks ls | grep -w {vm_id}", check=False)
        container = tasks + sh(f"{CTR} containers info {vm_id}; {CTR} snapshots info {vm_id}", check=False)
    return {
        "container": container,
        "jail": tree(JAILS / "fc" / vm_id),
        "volume": volume,
        "cgroup": sorted(str(path) for path in CGROUPS.rglob("*") if path.is_dir() and vm_id in path.parts),
        "running": (CGROUPS / vm_id / "cgroup.events").read_text() if (CGROUPS / vm_id).exists() else None,
    }


def thin_ids():
    sh(f"dmsetup message {POOL} 0 reserve_metadata_snap")
    try:
        meta = sh(f"dmsetup table {POOL}").split()[3]
        xml = sh(f"thin_dump --metadata-snap --skip-mappings $(readlink -f /dev/block/{meta} || echo /dev/loop0)")
    finally:
        sh(f"dmsetup message {POOL} 0 release_metadata_snap")
    return sorted(int(line.split('dev_id="')[1].split('"')[0]) for line in xml.splitlines() if "dev_id=" in line)


def leaks():
    """Return what must never be left: our own metadata snapshot, mounts, locks that are held, odd files."""
    found = []
    if "dm_thin" in KINDS:
        status = sh(f"dmsetup status {POOL}").split()
        if status[6] != "-":
            found.append("a metadata snapshot is held: " + status[6])
    if str(JAILS) in Path("/proc/self/mountinfo").read_text():
        found.append("a mount is left")
    left = sorted(path.name for path in (JAILS / "fc").glob("*")) if (JAILS / "fc").exists() else []
    found += [f"left in the jails: {name}" for name in left if name not in ("vlive", "vdead", ".microvm.reaper")]
    return found


# --- the steps


class Steps:
    """Counts the steps of a process and its children, and kills at one of them."""

    def __init__(self, kill_at):
        self.kill_at = kill_at
        self.shared = mmap.mmap(-1, 16)
        self.names = []

    def count(self):
        return int.from_bytes(self.shared[:8], "big")

    def step(self):
        number = self.count() + 1
        self.shared[:8] = number.to_bytes(8, "big")
        if number == self.kill_at:
            os.kill(self.main, signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)

    def plant(self):
        self.main = os.getpid()
        if "container" in KINDS:
            self._wrap_calls()
        else:
            self._wrap_all()

    def _wrap_calls(self):
        real = containerd.Client._call

        def stepped(client, call, *rest, **request):
            changes = call.rpartition("/")[2] in ("Create", "Delete", "Kill", "Pause", "Remove", "Resume")
            if changes:
                self.step()
            answer = real(client, call, *rest, **request)
            if changes:
                self.step()
            return answer

        containerd.Client._call = stepped

    def _wrap_all(self):
        for name in ("write", "fsync", "rename", "mkdir", "rmdir", "unlink", "ftruncate", "posix_spawn", "replace"):
            self._wrap(os, name)
        self._wrap(safe_tree, "_call")
        import fcntl

        self._wrap(fcntl, "ioctl")
        real = os.open

        def opened(path, flags, *rest, **more):
            if flags & (os.O_CREAT | os.O_TRUNC):
                self.step()
            return real(path, flags, *rest, **more)

        os.open = opened

    def _wrap(self, module, name):
        real = getattr(module, name)

        def stepped(*arguments, **more):
            self.step()
            return real(*arguments, **more)

        setattr(module, name, stepped)


def sweep(hold):
    """Sweep this host once, as the playbook does."""
    facts = gather.gather(ORDER, RULES, REALM, STATE, 20.0)
    plan = planner.plan(facts, SHARE, dict(POLICY, hold=hold), TRAITS)
    assert not plan["refused"], plan["refused"]
    bad = {kind: one["reason"] for kind, one in facts["kinds"].items() if one["status"] != "ok"}
    assert not bad, bad
    host = probe.Host(probe.boottime() + 30.0, STATE)
    kept = evidence.Evidence(STATE, REALM, {})
    evidence.detached = lambda function, keep: None  # what goes on in the background has no place in the order of steps
    with acts.Hands(RULES, host, ORDER) as hands:
        return acts.apply(plan, hands, STATE, REALM, sweep="stops", evidence=kept)


def undo():
    host = probe.Host(probe.boottime() + 30.0, STATE)
    with acts.Hands(RULES, host, ORDER) as hands:
        return acts.undo(lambda held: True, hands, STATE, REALM, "")


def stopped(act, kill_at):
    """Do something in a process that is killed at a step; return how many steps it came to."""
    steps = Steps(kill_at)
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            steps.plant()
            act()
            os._exit(0)
        os._exit(3)
    status = os.waitpid(pid, 0)[1]
    if kill_at <= steps.count() and kill_at:
        assert os.WIFSIGNALED(status), (kill_at, steps.count(), status)
        time.sleep(0.02)  # a command that it had started goes on alone for as long as it takes
    else:
        assert status == 0, (kill_at, status)
    return steps.count()


def attempt(case, kill_at):
    """Play one case through with a kill at one step; return ``(steps, problems)``."""
    clear()
    running = [plant(vm_id) for vm_id in THIN_IDS]
    problems = []
    try:
        before = {vm_id: look(vm_id) for vm_id in THIN_IDS}
        assert sweep(LADDER) == []
        time.sleep(0.01)
        if case == "remove":
            steps = stopped(lambda: sweep(0), kill_at)
            after = sweep(0)
        elif case == "aside":
            steps = stopped(lambda: sweep(LADDER), kill_at)
            sweep(LADDER)
            sweep(LADDER)
            problems += [f"undo: {one}" for one in undo() if one["outcome"] not in ("restored", "already_gone")]
            if look("vdead") != before["vdead"]:
                problems.append(f"not brought back as it was: {look('vdead')} and not {before['vdead']}")
            after = [sweep(0), sweep(0)]
        elif case == "finish":
            sweep(dict(LADDER, cgroup=0) if "cgroup" in KINDS else LADDER)
            steps = stopped(lambda: sweep(0), kill_at)
            after = sweep(0)
        else:
            sweep(LADDER)
            steps = stopped(undo, kill_at)
            undo()
            if look("vdead") != before["vdead"]:
                problems.append(f"not brought back as it was: {look('vdead')} and not {before['vdead']}")
            after = [sweep(0), sweep(0)]
        problems += judge(before["vlive"], after)
    finally:
        for one in running:
            with contextlib.suppress(ProcessLookupError):
                one.kill()
            one.wait()
    return steps, problems


def judge(live, after):
    """Return what is wrong at the end: all of the dead VM has to be gone, all of the live one there."""
    found = leaks()
    if look("vlive") != live:
        found.append(f"the live VM was touched: {look('vlive')} and not {live}")
    gone = look("vdead")
    aside = JAILS / "fc" / ".microvm.reaper"
    if any(gone[key] for key in ("container", "jail", "volume", "cgroup")) or aside.exists():
        found.append(f"something is left: {gone} after {after}")
    if "dm_thin" in KINDS and thin_ids() != [THIN_IDS["vlive"]]:
        found.append(f"thin ids: {thin_ids()} after {after}")
    ledger, problem = ledgers.load(STATE, REALM)
    if problem or ledger["intents"] or ledger["aside"] or "vdead" in str(ledger["strikes"]):
        found.append(f"ledger: {problem} {ledger}")
    broken = journals.about(STATE, REALM, {})["broken"]
    if broken:
        found.append("journal: " + broken)
    if tree(SENTINEL) != sentinel:
        found.append("something outside was changed")
    return found


def main():
    global sentinel
    case = sys.argv[1]
    SENTINEL.mkdir(exist_ok=True)
    (SENTINEL / "file").write_text("precious")
    sentinel = tree(SENTINEL)
    os.environ.update(DM_DISABLE_UDEV="1", LC_ALL="C", PATH="/usr/sbin:/usr/bin:/sbin:/bin:/opt/test")
    CGROUPS.mkdir(parents=True, exist_ok=True)
    if "dm_thin" in KINDS:
        remove_pool()
        sh(f"mkpool {POOL} 64")
    if "container" in KINDS:
        sh(f"{CTR} images import {IMAGE[0]}")
    problems, tried = [], []
    try:
        steps, found = attempt(case, 0)
        problems += [f"undisturbed: {one}" for one in found]
        at = 1
        while not problems:
            steps, found = attempt(case, at)
            tried.append(at)
            problems += [f"killed at step {at}: {one}" for one in found]
            if steps < at:
                break
            at += EVERY
    finally:
        clear()
        if "dm_thin" in KINDS:
            remove_pool()
        with contextlib.suppress(OSError):
            CGROUPS.rmdir()
        if "container" in KINDS:
            sh(f"{CTR} images rm {IMAGE[1]}", check=False)
        shutil.rmtree(SENTINEL)
    print(json.dumps({"steps": steps, "tried": tried, "problems": problems}))


if __name__ == "__main__":
    main()
