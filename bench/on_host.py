#!/usr/bin/env python3
"""The part of the benchmark that runs on a test host, as root. Standard library only.

on_host.py load --options JSON       make cgroups, volumes, containers with their snapshots, and processes
on_host.py gather --options JSON     measure the module against the bare commands; print JSON
on_host.py facts --options JSON      run the module; print its facts
on_host.py removal --options JSON    measure the removal of orphans against the bare commands; print JSON
"""

import argparse
import base64
import ctypes
import json
import os
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


def load(cgroups: int, volumes: int, containers: int, processes: int, first: int = 0) -> dict:
    """Make everything; containers bring their snapshot. Returns what each kind must be found to have."""
    ids = [vm_id(number) for number in range(first, first + max(cgroups, volumes))]
    PARENT.mkdir(exist_ok=True)
    for one in ids[:cgroups]:
        (PARENT / one).mkdir()
    if volumes and not Path("/dev/mapper", POOL).exists():
        run("mkpool", POOL, "768")
    for number, one in enumerate(ids[:volumes], first):
        run("dmsetup", "message", POOL, "0", f"create_thin {number}")
        run("dmsetup", "create", f"hyper-rw-{one}", "--table", f"0 8192 thin /dev/mapper/{POOL} {number}")
    if containers:
        run("ctr", "-n", NAMESPACE, "images", "import", "/opt/test/busybox.tar")
    for number in range(first, first + containers):
        run(
            "ctr",
            "-n",
            NAMESPACE,
            "containers",
            "create",
            "localhost/busybox:test",
            f"obuilder-run-{number}",
            "sleep",
            "9",
        )
    if processes:
        sleepers([PARENT / one for one in ids[:cgroups]] or [CGROUPS], processes)
    return {"cgroup": cgroups, "dm_thin": volumes, "container": containers, "snapshot": containers}


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


def removal(module: str, first: int, count: int) -> dict:
    """Remove ``count`` of each kind with the module, and as many more with bare commands in a shell loop."""
    seconds = timed(["python3", module], may_fail=True)
    outcomes: dict[str, int] = {}
    for one in json.loads(Path(OUTPUT).read_text())["outcomes"]:
        key = " ".join([one["kind"], one["outcome"], *one["message"].split()[:12]])
        outcomes[key] = outcomes.get(key, 0) + 1
    load(count, count, count, 0, first)
    lines = []
    for number in range(first, first + count):
        lines += [
            # Takes the snapshot along.
            f"ctr -n {NAMESPACE} containers rm obuilder-run-{number}",
            f"dmsetup remove --noudevsync hyper-rw-{vm_id(number)}",
            f"dmsetup message {POOL} 0 'delete {number}'",
            f"rmdir {PARENT}/{vm_id(number)}",
        ]
    script = Path("/dev/shm/bench-removal.sh")
    script.write_text("set -e\n" + "\n".join(lines) + "\n")
    bare = timed(["dash", str(script)])
    return {"seconds": seconds, "bare": bare, "outcomes": outcomes}


ACTIONS: dict[str, Callable[..., dict]] = {"load": load, "gather": gather, "facts": facts, "removal": removal}

if __name__ == "__main__":
    sys.exit(main())
