#!/usr/bin/env python3
"""The part of the benchmark that runs on a test host, as root. Standard library only.

on_host.py load --options JSON       make cgroups, jails, volumes, containers with their snapshots, and processes
on_host.py gather --options JSON     measure the module against the bare commands; print JSON
on_host.py facts --options JSON      run the module; print its facts
on_host.py state --options {}        print all that can be told of what load makes, to see later what became of it
on_host.py reap --options JSON       measure the removal of orphans by the module; print JSON
on_host.py shell --options JSON      measure the removal of orphans by the bare commands; print JSON
"""

import argparse
import base64
import ctypes
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
PARENT = CGROUPS / "hyper"
JAILER = Path("/srv/jailer")
JAILS = JAILER / "firecracker"
JAIL_DIRECTORIES = ("root", "root/dev", "root/run", "root/drives")
JAIL_FILES = 40
POOL = "hyper-thinpool"
NAMESPACE = "obuilder"
ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin:/opt/test", "LC_ALL": "C", "DM_DISABLE_UDEV": "1"}
DMSETUP = "dmsetup {} --manglename none --noudevsync"
INFO = "-c --noheadings --separator / -o major,minor,open,suspended,segments,name,uuid"
# The walks, as find would do them: nothing is known of the tree but its root.
WALK = """import os
def walk(path):
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                walk(entry.path)
            elif entry.name == "cgroup.events":
                file = os.open(entry.path, os.O_RDONLY)
                os.read(file, 4096)
                os.close(file)
walk({root!r})
"""
SCAN = """import os
for name in os.listdir("/proc"):
    if name.isdigit():
        try:
            file = os.open("/proc/" + name + "/stat", os.O_RDONLY)
        except FileNotFoundError:
            continue
        os.read(file, 4096)
        os.close(file)
"""
FORKED_ONLY = 1
OUTPUT = "/dev/shm/bench-output"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=list(ACTIONS))
    parser.add_argument("--options", type=json.loads, required=True)
    arguments = parser.parse_args()
    print(json.dumps(ACTIONS[arguments.what](**arguments.options)))
    return 0


# --- the load


def load(
    cgroups: int, volumes: int, containers: int, processes: int, jails: int = 0, first: int = 0, blocks: int = 0
) -> dict:
    """Make everything; containers bring their snapshot, volumes ``blocks`` that are written to. Returns what each kind
    must be found to have.
    """
    named = names(first, cgroups=cgroups, jails=jails, volumes=volumes, containers=containers)
    PARENT.mkdir(exist_ok=True)
    for path in named["cgroups"]:
        Path(path).mkdir()
    if jails and not JAILER.is_mount():
        JAILER.mkdir(exist_ok=True)
        run("mount", "-t", "tmpfs", "tmpfs", str(JAILER))
        JAILS.mkdir()
    for path in named["jails"]:
        make_jail(Path(path))
    if volumes and not Path("/dev/mapper", POOL).exists():
        run("mkpool", POOL, "768")
    for one in named["volumes"]:
        run("dmsetup", "message", POOL, "0", f"create_thin {one['thin_id']}")
        run("dmsetup", "create", one["name"], "--table", f"0 8192 thin /dev/mapper/{POOL} {one['thin_id']}")
        if blocks:
            fill(Path("/dev/mapper", one["name"]), blocks)
    if containers:
        run("ctr", "-n", NAMESPACE, "images", "import", "/opt/test/busybox.tar")
    for one in named["containers"]:
        run("ctr", "-n", NAMESPACE, "containers", "create", "localhost/busybox:test", one, "sleep", "9")
    if processes:
        sleepers([Path(path) for path in named["cgroups"]] or [CGROUPS], processes)
    made = {"cgroup": cgroups, "jail": jails, "dm_thin": volumes, "container": containers, "snapshot": containers}
    return {kind: count for kind, count in made.items() if count}


def names(first: int, cgroups: int, jails: int, volumes: int, containers: int) -> dict[str, list]:
    """Return what there is to be made or removed: one VM has a cgroup, a jail and a volume, or else a container."""
    ids = [vm_id(number) for number in range(first, first + max(cgroups, jails, volumes))]
    return {
        "cgroups": [str(PARENT / one) for one in ids[:cgroups]],
        "jails": [str(JAILS / one) for one in ids[:jails]],
        "volumes": [{"name": f"hyper-rw-{one}", "thin_id": first + n} for n, one in enumerate(ids[:volumes])],
        "containers": [f"obuilder-run-{number}" for number in range(first, first + containers)],
    }


def make_jail(path: Path) -> None:
    path.mkdir()
    for name in JAIL_DIRECTORIES:
        (path / name).mkdir()
    for number in range(JAIL_FILES):
        (path / JAIL_DIRECTORIES[number % len(JAIL_DIRECTORIES)] / f"file-{number}").write_bytes(b"x" * 1000)


def fill(device: Path, blocks: int) -> None:
    """Write to the first blocks of a volume, so that the pool has something to give back."""
    descriptor = os.open(device, os.O_WRONLY)
    try:
        os.write(descriptor, b"x" * (65536 * blocks))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def vm_id(number: int) -> str:
    """Return the n-th id of a VM of hyper: v and base32."""
    digits = ""
    for _place in range(12):
        number, digit = divmod(number, 32)
        digits = "abcdefghijklmnopqrstuvwxyz234567"[digit] + digits
    return "v" + digits


def sleepers(groups: list[Path], count: int) -> None:
    """Start processes that sleep, spread over the cgroups, each of a tenth of a megabyte. Their parent is init."""
    ready, told = os.pipe()
    if os.fork():
        os.close(told)
        if os.read(ready, 2) != b"ok":
            raise RuntimeError("the processes could not be started")
        return
    os.setsid()
    for descriptor in (0, 1, 2):
        os.dup2(os.open(os.devnull, os.O_RDWR), descriptor)
    for number in range(count):
        # A child is born in the cgroup of its parent.
        (groups[number * len(groups) // count] / "cgroup.procs").write_text("0")
        os.posix_spawn("/usr/bin/busybox", ["busybox", "sleep", "1000000"], {})
    (CGROUPS / "cgroup.procs").write_text("0")
    os.write(told, b"ok")
    os._exit(0)


def run(*argv: str) -> str:
    done = subprocess.run(argv, env=ENVIRONMENT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(argv)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


# --- gather


def bare_commands() -> dict[str, list[list[str]]]:
    """Return what a person would have to run to see the same, and for each the ways to do it."""
    python = ["python3", "-c"]
    return {
        "dmsetup info": [[*DMSETUP.format("info").split(), *INFO.split()]],
        "dmsetup table": [[*DMSETUP.format("table").split(), "--target", "thin"]],
        "dmsetup status of volumes": [[*DMSETUP.format("status").split(), "--noflush", "--target", "thin"]],
        "dmsetup status of pools": [[*DMSETUP.format("status").split(), "--noflush", "--target", "thin-pool"]],
        **{
            f"ctr {what} ls": [["ctr", "-n", NAMESPACE, what, "ls"]]
            for what in ("containers", "tasks", "snapshots", "leases")
        },
        "read every cgroup.events": [
            [*python, WALK.format(root=str(PARENT))],
            ["sh", "-c", f"cat {PARENT}/*/cgroup.events"],
            ["sh", "-c", f"find {PARENT} -name cgroup.events -exec cat {{}} +"],
        ],
        "read every /proc/PID/stat": [[*python, SCAN], ["sh", "-c", "cat /proc/[0-9]*/stat"]],
    }


def gather(module: str, empty: str, repeat: int, expected: dict[str, int]) -> dict:
    """Measure in turns, so that what else the machine does hits all alike. ``empty`` is a module that does nothing."""
    argv = ["python3", module]
    timed(argv)  # fills the caches, for both sides
    check(expected)
    samples: dict[str, list[float]] = {}
    for _round in range(repeat):
        samples.setdefault("module", []).append(timed(argv))
        check(expected)
        samples.setdefault("python", []).append(timed(["python3", "-c", "pass"]))
        samples.setdefault("empty", []).append(timed(["python3", empty]))
        for name, ways in bare_commands().items():
            for place, way in enumerate(ways):
                samples.setdefault(f"{name}/{place}", []).append(timed(way))
    memory = [peak_memory(argv) for _round in range(3)]
    return {
        "samples": samples,
        "resident": max(resident for resident, _charged in memory),
        "charged": max(charged for _resident, charged in memory),
        "commands": commands(argv),
        "kinds": {name: kind["seconds"] for name, kind in kinds().items()},
    }


def timed(argv: list[str], *, may_fail: bool = False) -> float:
    """Return the seconds that a command takes; what it prints goes to a file in memory."""
    with open(OUTPUT, "wb") as output:
        begin = time.monotonic()
        code = subprocess.Popen(argv, env=ENVIRONMENT, stdout=output, stderr=subprocess.DEVNULL).wait()
        seconds = time.monotonic() - begin
    if code and argv[0] != "sh" and not may_fail:  # cat complains of a process that ended meanwhile
        raise RuntimeError(f"{shlex.join(argv)}: exit code {code}: {Path(OUTPUT).read_text(errors='replace')[:1000]}")
    return seconds


def kinds() -> dict:
    facts = json.loads(Path(OUTPUT).read_text())["ansible_facts"]["vm_resources"]
    return json.loads(zlib.decompress(base64.b64decode(facts["packed"])))


def check(expected: dict[str, int]) -> None:
    """Raise unless the module has found all that was made: a fast empty answer is no success."""
    found = {
        name: len(kind["resources"]) if kind["status"] == "ok" else kind["reason"] for name, kind in kinds().items()
    }
    wrong = {name: found.get(name) for name, count in expected.items() if found.get(name) != count}
    if wrong:
        raise RuntimeError(f"expected {expected}, the module found {wrong}")


def peak_memory(argv: list[str]) -> tuple[int, int]:
    """Return two peaks in bytes: the sum of the resident sizes of the module's processes, by looking every millisecond
    or so, and what the kernel charged to a cgroup of their own, its caches included."""
    group = CGROUPS / "bench"
    group.mkdir()
    try:
        with open(OUTPUT, "wb") as output:
            command = ["sh", "-c", f"echo 0 > {group}/cgroup.procs; exec {shlex.join(argv)}"]
            process = subprocess.Popen(command, env=ENVIRONMENT, stdout=output)
        peak = 0
        while process.poll() is None:
            peak = max(peak, resident(group))
            time.sleep(0.001)
        return peak, int((group / "memory.peak").read_text())
    finally:
        wait_until(lambda: not (group / "cgroup.procs").read_text())
        group.rmdir()


def resident(group: Path) -> int:
    """Return the sum of the resident sizes of all processes in a cgroup."""
    found = set()
    for pid in (group / "cgroup.procs").read_text().split():
        try:
            # A child that is just about to start a program still runs on its parent's memory, and says the same.
            found.add(Path(f"/proc/{pid}/statm").read_text())
        except (FileNotFoundError, ProcessLookupError):
            continue
    return sum(int(line.split()[1]) for line in found) * os.sysconf("SC_PAGESIZE")


def commands(argv: list[str]) -> dict[str, int]:
    """Return how often which other program was started, by the kernel's process accounting."""
    account = ctypes.CDLL(None, use_errno=True).acct
    with tempfile.NamedTemporaryFile() as file:
        if account(file.name.encode()):
            raise OSError(ctypes.get_errno(), "process accounting")
        try:
            timed(argv)
        finally:
            account(None)
        data = file.read()
    found: dict[str, int] = {}
    for place in range(0, len(data), 64):
        record = data[place : place + 64]
        # Where the name stands depends on the version of the record.
        start = 48 if record[1] & 0xF == 3 else 36
        name = record[start : start + 16].split(b"\0")[0].decode(errors="replace")
        if not record[0] & FORKED_ONLY:
            found[name] = found.get(name, 0) + 1
    found.pop("python3")  # the module itself
    return found


def wait_until(condition, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("waited in vain")
        time.sleep(0.005)


# --- removal


def facts(module: str) -> dict:
    timed(["python3", module])
    return json.loads(Path(OUTPUT).read_text())["ansible_facts"]["vm_resources"]


def reap(module: str) -> dict:
    """Run the module with its plan; return the seconds and what came of it."""
    seconds = timed(["python3", module], may_fail=True)
    answer = json.loads(Path(OUTPUT).read_text())
    if "outcomes" not in answer:
        raise RuntimeError(answer.get("msg", "the module said nothing"))
    return {"seconds": seconds, "outcomes": counted(answer["outcomes"])}


def counted(outcomes: list[dict]) -> dict[str, int]:
    """Return how often which kind came to what."""
    found: dict[str, int] = {}
    for one in outcomes:
        key = " ".join([one["kind"], one["outcome"], *one["message"].split()[:12]])
        found[key] = found.get(key, 0) + 1
    return found


def shell(**of: int) -> dict:
    """Remove what names() lists, by scripts that look at nothing before or after. Returns the seconds of each kind."""
    named = names(**of)
    commands = {
        # Takes the snapshot along.
        "container": [f"ctr -n {NAMESPACE} containers rm {one}" for one in named["containers"]],
        "jail": [f"rm -rf {path}" for path in named["jails"]],
        "dm_thin": [
            f"dmsetup remove --noudevsync {one['name']}\ndmsetup message {POOL} 0 'delete {one['thin_id']}'"
            for one in named["volumes"]
        ],
        "cgroup": [f"rmdir {path}" for path in named["cgroups"]],
    }
    script = Path("/dev/shm/bench-removal.sh")
    seconds = {}
    for kind, lines in commands.items():
        script.write_text("set -e\n" + "\n".join(lines) + "\n")
        seconds[kind] = timed(["dash", str(script)])
    return seconds


def state() -> dict[str, str]:
    """Return a text for each thing that load() made and is there still, not equal for one that was touched."""
    found = {}
    for path in sorted(PARENT.rglob("*")):
        if path.is_dir():
            found[str(path)] = f"inode {path.stat().st_ino}, processes {(path / 'cgroup.procs').read_text().split()}"
    for path in sorted(JAILS.rglob("*")):
        status = path.stat()
        found[str(path)] = f"inode {status.st_ino}, changed {status.st_ctime_ns}"
    for line in run("dmsetup", "info", "-c", "--noheadings", "-o", "name,uuid,major,minor,open,attr").splitlines():
        name, _colon, rest = line.partition(":")
        minor = rest.split(":")[2]
        found[f"volume {name}"] = f"{rest}, sequence {Path(f'/sys/block/dm-{minor}/diskseq').read_text().strip()}"
    found |= {f"thin id {thin_id}": text for thin_id, text in thin_ids().items()}
    for what in ("containers", "snapshots"):
        for line in run("ctr", "-n", NAMESPACE, what, "ls").splitlines()[1:]:
            name = line.split()[0]
            found[f"{what} {name}"] = run("ctr", "-n", NAMESPACE, what, "info", name)
    return found


def thin_ids() -> dict[str, str]:
    """Return ``{thin id: what the pool's metadata say of it}``, active or not."""
    number = run("dmsetup", "table", POOL).split()[3]
    metadata = Path("/dev", Path("/sys/dev/block", number).resolve().name)
    run("dmsetup", "message", POOL, "0", "reserve_metadata_snap")
    try:
        text = run("thin_dump", "--metadata-snap", "--skip-mappings", str(metadata))
    finally:
        run("dmsetup", "message", POOL, "0", "release_metadata_snap")
    return dict(re.findall(r'<device dev_id="(\d+)" ([^>]*)>', text))


ACTIONS: dict[str, Callable[..., dict]] = {
    "load": load,
    "gather": gather,
    "facts": facts,
    "state": state,
    "reap": reap,
    "shell": shell,
}

if __name__ == "__main__":
    sys.exit(main())
