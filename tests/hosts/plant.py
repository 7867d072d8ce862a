#!/usr/bin/env python3
"""Plants on a test host what live and dead VMs have there, and checks later what became of it. Runs there, as root.

    plant.py plant --options '{"live": 25, "orphans": 25, ...}'  plant; print {"live": [...], "orphans": [...], ...}
    plant.py check --orphans there|gone|any                      exit 1 and say what is wrong
    plant.py left                                                print what there still is of the dead VMs, as a list
    plant.py clear                                               remove all of it, alive or dead, and the ledger

Planting clears the host first.

VMs of two systems. Of hyper: a cgroup, a jail with the VMM's program in it, with device-mapper a thin volume, and for
some a zombie. A live one has its VMM running: in its cgroup, chrooted into its jail, its volume open. Of obuilder: a
container with its snapshot, and layers of snapshots. A live one has a real task running.

Everything is real: the kernel's cgroups, containerd and runc, dm-thin, processes. What is live is remembered by pid and
start time, what has contents by checksum, so that the check sees any harm done to it.
"""

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

STATE = Path("/run/planted.json")
MEMORY = Path("/var/lib/microvm.reaper")
SENTINEL = Path("/srv/sentinel")
JAILS = Path("/srv/jailer")
POOL = "hyper-thinpool"
VOLUME_SECTORS = 8192
BASE32 = "abcdefghijklmnopqrstuvwxyz234567"
ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin:/opt/test", "LC_ALL": "C", "DM_DISABLE_UDEV": "1"}
DEFAULTS = {
    "seed": "0",
    "live": 4,
    "orphans": 4,
    "containers": 2,
    "running_orphans": 1,
    "zombies": 1,
    "hostile": False,
    "device_mapper": False,
    "cgroup_mount": "/sys/fs/cgroup",
    "cgroup_parent": "hyper",
    "namespace": "obuilder",
    "archive": "/opt/test/busybox.tar",
    "image": "localhost/busybox:test",
}
# What a tenant may call things (row 36). None of them is the id of a VM; all must survive a sweep, untouched.
HOSTILE_NAMES = ["a b", "it's", '"q"', "$(touch x)", "{{ 7*7 }}", "line\nfeed", "-rf", "x" * 250, "..x", "vABC", "~"]
HOSTILE_BYTES = [b"v\xff\xfe", b"\xe2\x28\xa1"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    plant = commands.add_parser("plant")
    plant.add_argument("--options", type=json.loads, default={})
    check = commands.add_parser("check")
    check.add_argument("--orphans", choices=["there", "gone", "any"], required=True)
    commands.add_parser("left")
    commands.add_parser("clear")
    arguments = parser.parse_args()
    if arguments.command in ("plant", "clear"):
        clear()
    if arguments.command == "clear":
        return 0
    if arguments.command == "left":
        print(json.dumps(Check(json.loads(STATE.read_text())).left()))
        return 0
    if arguments.command == "plant":
        print(json.dumps(in_a_daemon(dict(DEFAULTS, **arguments.options))))
        return 0
    problems = Check(json.loads(STATE.read_text())).all(arguments.orphans)
    print("\n".join(problems) or f"all as it should be: live untouched, orphans {arguments.orphans}")
    return 1 if problems else 0


# --- planting


def in_a_daemon(options: dict) -> dict:
    """Plant in a process that stays: it is the parent of the VMMs, as a platform's own daemon is."""
    read, write = os.pipe()
    if os.fork() == 0:
        os.setsid()
        os.close(read)
        daemon(options, write)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        text = answer.read()
    if not text.startswith("{"):
        sys.exit(f"planting failed: {text}")
    STATE.write_text(text)
    return json.loads(text)


def daemon(options: dict, answer: int) -> None:
    silence()
    try:
        planter = Planter(options)
        planted = planter.plant()
        planter.catch_up_with_children()
    except BaseException as err:  # noqa: BLE001 - whatever it is, the one who waits has to hear of it
        os.write(answer, f"{type(err).__name__}: {err} {getattr(err, 'stderr', '')}".encode())
        os._exit(1)
    os.write(answer, json.dumps(planted).encode())
    os.close(answer)
    while True:
        signal.pause()


def silence() -> None:
    null = os.open("/dev/null", os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)


class Planter:
    """Makes everything, and remembers what a check needs to know."""

    def __init__(self, options: dict):
        self.options = options
        self.cgroups = Path(options["cgroup_mount"], options["cgroup_parent"])
        self.live_processes: dict[str, str] = {}
        self.tasks: dict[str, int] = {}
        self.volumes: dict[str, str] = {}
        self.zombies: dict[str, str] = {}
        self.lost: list[int] = []
        self.hexes: dict[str, list[str]] = {"live": [], "orphans": []}
        self.thin_id = 0

    def plant(self) -> dict:
        SENTINEL.mkdir(parents=True)
        (SENTINEL / "precious").write_text("outside every jail\n")
        self.cgroups.mkdir(parents=True)
        if self.options["device_mapper"] and not Path("/dev/mapper", POOL).exists():
            command("mkpool", POOL, "768")
        live = [self.vm_id("l", n) for n in range(self.options["live"])]
        orphans = [self.vm_id("o", n) for n in range(self.options["orphans"])]
        for number, vm_id in enumerate(live):
            self.hyper(vm_id, running=True, stray=False, zombie=number < self.options["zombies"])
        needed = pool_used()
        for number, vm_id in enumerate(orphans):
            running = number < self.options["running_orphans"]
            self.hyper(vm_id, running=running, stray=True, zombie=number >= len(orphans) - self.options["zombies"])
        runs = self.obuilder() if self.options["containers"] else {"live": [], "orphans": []}
        if self.options["hostile"]:
            self.hostile()
        return {
            "options": self.options,
            "live": live + runs["live"] + self.hexes["live"],
            "orphans": orphans + runs["orphans"] + self.hexes["orphans"],
            "tombstones": orphans[: self.options["running_orphans"]],
            "processes": self.live_processes,
            "tasks": self.tasks,
            "volumes": self.volumes,
            "zombies": self.zombies,
            "trees": {vm_id: checksum(JAILS / "firecracker" / vm_id) for vm_id in live},
            "sentinel": checksum(SENTINEL),
            "pool_needed": needed,
            "thin_ids": self.thin_id,
            "daemon": process(os.getpid()),
            "cgroups": sorted(os.listdir(self.cgroups)),
            "jails": sorted(os.listdir(JAILS / "firecracker")),
        }

    def vm_id(self, letter: str, number: int) -> str:
        digest = hashlib.sha256(f"{self.options['seed']}{letter}{number}".encode()).digest()
        return "v" + letter + "".join(BASE32[byte % 32] for byte in digest[:12])

    def hyper(self, vm_id: str, *, running: bool, stray: bool, zombie: bool) -> None:
        leaf = self.cgroups / vm_id
        leaf.mkdir()
        jail = make_jail(vm_id, hostile=stray)
        volume = self.volume(vm_id, keep=not stray) if self.options["device_mapper"] else None
        if running:
            pid = start_vmm(leaf, jail, None if stray else volume, orphaned=stray)
            if not stray:
                self.live_processes[vm_id] = process(pid)
        if zombie:
            pid = start_vmm(leaf, jail, None, orphaned=False)
            os.kill(pid, signal.SIGKILL)
            wait_for(lambda: state(pid) == "Z", "a zombie")
            self.zombies[vm_id] = process(pid)
            if stray:
                self.lost.append(pid)

    def volume(self, vm_id: str, *, keep: bool) -> str:
        name = f"hyper-rw-{vm_id}"
        command("dmsetup", "message", POOL, "0", f"create_thin {self.thin_id}")
        table = f"0 {VOLUME_SECTORS} thin /dev/mapper/{POOL} {self.thin_id}"
        command("dmsetup", "create", name, "--table", table)
        self.thin_id += 1
        with open(f"/dev/mapper/{name}", "r+b", buffering=0) as device:
            device.write(hashlib.sha256(vm_id.encode()).digest() * 4096)
            os.fsync(device.fileno())
        if keep:
            self.volumes[vm_id] = file_checksum(f"/dev/mapper/{name}")
        return name

    def obuilder(self) -> dict:
        namespace, image = self.options["namespace"], self.options["image"]
        ctr(namespace, "images", "import", self.options["archive"])
        base = f"obuilder-base-{namespace}"
        ctr(namespace, "snapshots", "prepare", base)
        ctr(namespace, "snapshots", "commit", base + "-committed", base)
        runs: dict[str, list[str]] = {"live": [], "orphans": []}
        for number in range(2 * self.options["containers"]):
            of = "live" if number % 2 else "orphans"
            run = f"obuilder-run-{number}"
            runs[of].append(run)
            if of == "live":
                ctr(namespace, "run", "-d", image, run, "sleep", "1000000")
                rows = [line.split() for line in ctr(namespace, "tasks", "ls").splitlines()]
                self.tasks[run] = int(next(row[1] for row in rows if row[0] == run))
            else:
                ctr(namespace, "containers", "create", image, run, "sleep", "1000000")
            self.layers(of, f"{self.options['seed']}{of}{number}", base + "-committed")
        return runs

    def layers(self, of: str, text: str, base: str) -> None:
        """Make two layers, one on the other, as a build with two steps does."""
        parent = base
        for step in range(2):
            key = hashlib.sha256(f"{text}{step}".encode()).hexdigest()
            ctr(self.options["namespace"], "snapshots", "prepare", key, parent)
            ctr(self.options["namespace"], "snapshots", "commit", key + "-committed", key)
            parent = key + "-committed"
            self.hexes[of].append(key)

    def hostile(self) -> None:
        for place in (self.cgroups, JAILS / "firecracker"):
            for name in [*map(os.fsencode, HOSTILE_NAMES), *HOSTILE_BYTES]:
                with contextlib.suppress(OSError):  # cgroups may not have a line feed in their name
                    os.mkdir(os.path.join(os.fsencode(place), name))

    def catch_up_with_children(self) -> None:
        """From now on reap the zombies of dead VMs when SIGCHLD comes. Theirs came before; it is lost."""

        def reap(_signal: int, _frame: object) -> None:
            for pid in self.lost[:]:
                if os.waitpid(pid, os.WNOHANG)[0]:
                    self.lost.remove(pid)

        signal.signal(signal.SIGCHLD, reap)


def make_jail(vm_id: str, *, hostile: bool) -> Path:
    """Make what the jailer makes; a dead VM's has traps in it that lead out of the jail (row 28)."""
    root = JAILS / "firecracker" / vm_id / "root"
    (root / "run" / "deep" / "er").mkdir(parents=True)
    (root / "dev").mkdir()
    shutil.copy(shutil.which("busybox", path=ENVIRONMENT["PATH"]) or "/bin/busybox", root / "firecracker")
    (root / "firecracker").chmod(0o755)
    (root / "rootfs.img").write_bytes(vm_id.encode() * 1000)
    os.mknod(root / "dev" / "null", 0o600 | 0o020000, os.makedev(1, 3))
    if hostile:
        (root / "run" / "etc").symlink_to(SENTINEL)
        os.link(SENTINEL / "precious", root / "run" / "hard-link") if same_device(root, SENTINEL) else None
        os.mkfifo(root / "run" / "fifo")
        (root / "mnt").mkdir()
        command("mount", "--bind", str(SENTINEL), str(root / "mnt"))
    return root


def start_vmm(leaf: Path, jail: Path, volume: str | None, *, orphaned: bool) -> int:
    """Start a process called firecracker in the cgroup, chrooted into the jail, the volume open. Return its pid."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        if orphaned and os.fork():
            os._exit(0)
        os.setsid()
        (leaf / "cgroup.procs").write_text("0")
        if volume:
            os.set_inheritable(os.open(f"/dev/mapper/{volume}", os.O_RDWR), True)
        os.chroot(jail)
        os.chdir("/")
        os.write(write, str(os.getpid()).encode())
        os.close(write)
        os.execve("/firecracker", ["sleep", "1000000"], {})
    os.close(write)
    pid = int(os.read(read, 32))
    os.close(read)
    if orphaned:
        os.waitpid(child, 0)
    wait_for(lambda: Path(f"/proc/{pid}/comm").read_text().strip() == "firecracker", "the VMM")
    return pid


# --- checking


class Check:
    """Compares the host with what was planted."""

    def __init__(self, planted: dict):
        self.planted = planted
        self.options = planted["options"]
        self.cgroups = Path(self.options["cgroup_mount"], self.options["cgroup_parent"])

    def all(self, orphans: str) -> list[str]:
        return [*self.live(), *self.orphans(orphans), *self.untouched()]

    def live(self) -> list[str]:
        """Say what is wrong with the live VMs. Nothing may be, ever."""
        wrong = []
        for vm_id, known in self.planted["processes"].items():
            pid = known.split(":")[0]
            if process(int(pid)) != known:
                wrong.append(f"the VMM of the live {vm_id} is gone")
            if pid not in read(self.cgroups / vm_id / "cgroup.procs").split():
                wrong.append(f"the VMM of the live {vm_id} is not in its cgroup")
            if checksum(JAILS / "firecracker" / vm_id) != self.planted["trees"][vm_id]:
                wrong.append(f"the jail of the live {vm_id} has changed")
        for vm_id, known in self.planted["volumes"].items():
            if file_checksum(f"/dev/mapper/hyper-rw-{vm_id}") != known:
                wrong.append(f"the volume of the live {vm_id} has changed")
        running = {row[0]: row[1:] for row in map(str.split, self.ctr("tasks", "ls").splitlines())}
        for run, pid in self.planted["tasks"].items():
            if running.get(run) != [str(pid), "RUNNING"]:
                wrong.append(f"the task of the live {run} does not run: {running.get(run)}")
        names = set(self.names())
        wrong += [f"the {name} of the live VM is gone" for name in self.expected("live") if name not in names]
        return wrong

    def orphans(self, expected: str) -> list[str]:
        if expected == "any":
            return []
        there, wanted = self.left(), self.expected("orphans")
        if expected == "there":
            return [f"the {name} of a dead VM is gone too early" for name in wanted if name not in there]
        left = [f"the {name} of a dead VM is still there" for name in there]
        if pool_used() != self.planted["pool_needed"]:
            left.append(f"the pool has {pool_used()} blocks in use, and the live VMs {self.planted['pool_needed']}")
        dead = self.planted["orphans"]
        left += [f"still mounted: {point}" for point in mounts() if any(vm_id in point for vm_id in dead)]
        return left

    def left(self) -> list[str]:
        """Return the names of what there still is of the dead VMs."""
        names = set(self.names())
        return [name for name in self.expected("orphans") if name in names]

    def untouched(self) -> list[str]:
        wrong = [] if checksum(SENTINEL) == self.planted["sentinel"] else ["what lies outside the jails has changed"]
        gone = set(self.planted["orphans"])
        for key, place in (("cgroups", self.cgroups), ("jails", JAILS / "firecracker")):
            kept = [name for name in self.planted[key] if name not in gone]
            wrong += [f"{place}/{name!r} is gone" for name in kept if not os.path.lexists(place / name)]
        return wrong

    def expected(self, of: str) -> list[str]:
        """Return the names of all that the VMs have."""
        found = []
        for vm_id in self.planted[of]:
            if vm_id.startswith("v"):
                found += [f"cgroup {vm_id}", f"jail {vm_id}"]
                found += [f"volume hyper-rw-{vm_id}"] if self.options["device_mapper"] else []
                found += [f"zombie {self.planted['zombies'][vm_id]}"] if vm_id in self.planted["zombies"] else []
            elif vm_id.startswith("obuilder-run-"):
                found += [f"container {vm_id}", f"snapshot {vm_id}"]
            else:
                found.append(f"snapshot {vm_id}-committed")
        return found

    def names(self) -> list[str]:
        """Return what there is now, named in the same way, read with the host's own tools."""
        found = [f"cgroup {name}" for name in os.listdir(self.cgroups)]
        found += [f"jail {name}" for name in os.listdir(JAILS / "firecracker")]
        if self.options["device_mapper"]:
            found += [f"volume {line.split()[0]}" for line in command("dmsetup", "ls").splitlines()]
        found += [f"container {name}" for name in self.ctr("containers", "ls", "-q").split()]
        found += [f"snapshot {line.split()[0]}" for line in self.ctr("snapshots", "ls").splitlines()[1:]]
        pids = [known.split(":")[0] for known in self.planted["zombies"].values()]
        return found + [f"zombie {process(int(pid))}" for pid in pids if state(int(pid)) == "Z"]

    def ctr(self, *arguments: str) -> str:
        return ctr(self.options["namespace"], *arguments) if self.options["containers"] else ""


# --- clearing


def clear() -> None:
    """Remove all that was planted before, alive or dead, and what a reaper remembers of it."""
    planted = json.loads(STATE.read_text()) if STATE.exists() else None
    if planted:
        options = planted["options"]
        daemon = int(planted["daemon"].split(":")[0])
        if process(daemon) == planted["daemon"]:
            os.kill(daemon, signal.SIGKILL)
        clear_cgroups(Path(options["cgroup_mount"], options["cgroup_parent"]))
        if options["containers"]:
            clear_containerd(options["namespace"])
    for point in sorted((point for point in mounts() if point.startswith(f"{JAILS}/")), reverse=True):
        command("umount", point)
    if planted and planted["options"]["device_mapper"]:
        clear_volumes(planted["thin_ids"])
    for directory in (JAILS, SENTINEL, MEMORY):
        if directory.exists():
            shutil.rmtree(os.fsencode(directory))
    STATE.unlink(missing_ok=True)


def clear_cgroups(top: Path) -> None:
    if top.exists():
        (top / "cgroup.kill").write_text("1")
        wait_for(lambda: "populated 0" in read(top / "cgroup.events"), "the end of the planted processes")
    for directory, _names, _files in os.walk(os.fsencode(top), topdown=False):
        os.rmdir(directory)


def clear_containerd(namespace: str) -> None:
    for name in ctr(namespace, "tasks", "ls", "-q").split():
        ctr(namespace, "tasks", "rm", "--force", name)
    for name in ctr(namespace, "containers", "ls", "-q").split():
        ctr(namespace, "containers", "rm", name)
    rows = [line.split() for line in ctr(namespace, "snapshots", "ls").splitlines()[1:]]
    parents = {row[0]: row[1] if len(row) == 3 else "" for row in rows if not row[0].startswith("sha256:")}
    while parents:
        for leaf in set(parents) - set(parents.values()):
            ctr(namespace, "snapshots", "rm", leaf)
            del parents[leaf]


def clear_volumes(thin_ids: int) -> None:
    for line in command("dmsetup", "ls").splitlines():
        if line.startswith("hyper-rw-"):
            command("dmsetup", "remove", "--retry", line.split()[0])
    for number in range(thin_ids):
        with contextlib.suppress(RuntimeError):  # deleted already
            command("dmsetup", "message", POOL, "0", f"delete {number}")


# --- helpers


def command(*argv: str) -> str:
    done = subprocess.run(argv, env=ENVIRONMENT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(argv)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def ctr(namespace: str, *arguments: str) -> str:
    return command("ctr", "-n", namespace, *arguments)


def process(pid: int) -> str:
    """Return pid and start time, "" when there is no such process."""
    text = read(Path(f"/proc/{pid}/stat"))
    return f"{pid}:{text.rpartition(')')[2].split()[19]}" if text else ""


def state(pid: int) -> str:
    return read(Path(f"/proc/{pid}/stat")).rpartition(")")[2][1:2]


def read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def mounts() -> list[str]:
    return [line.split(" ")[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]


def pool_used() -> int:
    """Return how many data blocks the pool has given out."""
    if not Path("/dev/mapper", POOL).exists():
        return 0
    return int(command("dmsetup", "status", POOL).split()[5].split("/")[0])


def same_device(one: Path, other: Path) -> bool:
    return one.stat().st_dev == other.stat().st_dev


def file_checksum(path: str) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def checksum(tree: Path) -> str:
    """Return a checksum of all names, types, owners, modes, link targets and contents below a directory."""
    total = hashlib.sha256()
    for directory, names, files in os.walk(tree):
        names.sort()
        for name in sorted(names + files):
            path = Path(directory, name)
            status = path.lstat()
            total.update(repr((str(path), status.st_mode, status.st_uid, status.st_gid)).encode())
            if path.is_symlink():
                total.update(os.readlink(path).encode())
            elif path.is_file():
                total.update(path.read_bytes())
    return total.hexdigest()


def wait_for(condition, what: str, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {seconds} s for {what}")
        time.sleep(0.005)


if __name__ == "__main__":
    sys.exit(main())
