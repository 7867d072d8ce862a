#!/usr/bin/env python3
"""Measure what the controller does between the facts of a fleet and its plans; bench/README.md says what is counted.

    fleet.py plans DIRECTORY        plan the fleet that write() wrote there; print the numbers as JSON
    fleet.py difference DIRECTORY   the same for a plain difference of the ids
"""

from __future__ import annotations

import json
import random
import resource as rusage
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "collections"))

from ansible_collections.microvm.reaper.plugins.module_utils import ledger as ledgers  # noqa: E402
from ansible_collections.microvm.reaper.plugins.module_utils import resource as r  # noqa: E402
from ansible_collections.microvm.reaper.plugins.module_utils.all_kinds import TRAITS  # noqa: E402
from ansible_collections.microvm.reaper.plugins.module_utils.gather import pack  # noqa: E402
from ansible_collections.microvm.reaper.plugins.plugin_utils import facts as host_facts  # noqa: E402
from ansible_collections.microvm.reaper.plugins.plugin_utils import manifest as manifests  # noqa: E402
from ansible_collections.microvm.reaper.plugins.plugin_utils import planner, sources  # noqa: E402

REALM = "bench"
KINDS = ("cgroup", "jail", "dm_thin", "zombie")
UNCAPPED = {"max_per_host": 10**9, "max_percent_per_host": 100}
HOSTS, PER_HOST = 1000, 1000
PERCENT_DEAD = 1
MIB = 2**20
# What a fleet of a million VMs, and of as many resources, may cost on one core.
MAX_SECONDS, MAX_MEMORY, MAX_GROWTH, MAX_RATIO = 10.0, 1024 * MIB, 12.0, 8.0
# The facts and the plan of one host with so many resources.
ONE_HOST, MAX_ONE_HOST = 10000, 0.150


# --- what is made up


def facts(name: str, resources: int, percent_dead: float = PERCENT_DEAD) -> tuple[dict, list[str]]:
    """Return packed facts of a host with a VM for each resource, the dead ones struck before, and the ids that live."""
    chance = random.Random(name)
    every = [f"v{chance.randrange(10**12):012}" for _number in range(resources)]
    dead = set(every[: round(resources * percent_dead / 100)])
    kinds: dict[str, dict] = {
        kind: {"status": "ok", "reason": None, "resources": [], "foreign": 0, "seconds": 0.1} for kind in TRAITS
    }
    strikes = {}
    for number, vm_id in enumerate(every):
        kind = KINDS[number % len(KINDS)]
        details = {"pool": "p"} if kind == "dm_thin" else {}
        one = r.resource(kind, f"/{kind}/{vm_id}", vm_id, f"boot:{vm_id}", age_seconds=9000.5, details=details)
        kinds[kind]["resources"].append(one)
        if vm_id in dead:
            strike = {"identity": one["identity"], "vm_id": vm_id, "strikes": 1, "boot_id": "boot"}
            strikes[f"{kind} {one['name']}"] = dict(strike, first=1000.0, last=1000.0)
    found = {
        "realm": REALM,
        "boot_id": "boot",
        "machine_id": f"machine of {name}",
        "boottime_seconds": 10000.0,
        "ledger": dict(ledgers.empty(REALM), strikes=strikes, generation=1, host=name),
        "ledger_problem": None,
        "generation": 1,
        "packed": pack(kinds),
    }
    return found, [vm_id for vm_id in every if vm_id not in dead]


def write(directory: Path, hosts: int) -> None:
    """Write the facts of a fleet and the list of its live VMs, in no order, filled up to one VM for each resource."""
    names = [f"h{number}" for number in range(hosts)]
    vms = []
    with (directory / "facts.jsonl").open("w") as stream:
        for name in names:
            found, live = facts(name, PER_HOST)
            stream.write(json.dumps(found) + "\n")
            vms += [{"vm_id": vm_id, "host": name, "state": "running"} for vm_id in live]
    chance = random.Random(0)
    more = hosts * PER_HOST - len(vms)
    vms += [{"vm_id": f"other{number}", "host": chance.choice(names), "state": "paused"} for number in range(more)]
    chance.shuffle(vms)
    document = {"realm": REALM, "generated_at": time.time(), "complete": True, "epoch": 7, "hosts": names}
    (directory / "manifest.json").write_text(json.dumps({**document, "count": len(vms), "vms": vms}))


# --- what is measured


class Clock:
    """Seconds of processor time by what they were spent on."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str, step: Callable, *arguments: Any, **named: Any) -> Any:
        begin = time.process_time()
        try:
            return step(*arguments, **named)
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - begin


def plans(directory: Path) -> dict:
    """Make the plans of the fleet in ``directory``; return seconds by step, the largest memory, and how many go."""
    clock, doomed = Clock(), 0
    handle = _manifest(clock, directory)
    for packed in _facts(directory):
        policy = {"realm": REALM, "host": packed["ledger"]["host"], **UNCAPPED}
        found = clock("unpack and check the facts", host_facts.unpacked, packed)
        ids = clock("share of the list", host_facts.vm_ids, found)
        share = clock("share of the list", manifests.share, handle, policy["host"], ids)
        doomed += len(clock("plan", planner.plan, found, share, policy, TRAITS)["reap"])
    memory = rusage.getrusage(rusage.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": clock.seconds, "memory": memory, "reap": doomed}


def difference(directory: Path) -> dict:
    """Take the ids that live from those on each host, and nothing else: no plan can cost less."""
    clock, left = Clock(), 0
    document = json.loads((directory / "manifest.json").read_text())
    alive = clock("set of the live", lambda: {vm["vm_id"] for vm in document["vms"]})
    for packed in _facts(directory):
        kinds = host_facts.unpacked(packed)["kinds"].values()
        left += len(clock("difference", _difference, kinds, alive))
    return {"seconds": clock.seconds, "left": left}


def _difference(kinds: Iterable[dict], alive: set[str]) -> set[str]:
    return {one["vm_id"] for kind in kinds for one in kind["resources"]} - alive


def _manifest(clock: Clock, directory: Path) -> dict:
    source = [{"type": "file", "path": "manifest.json"}]
    context = {"realm": REALM, "now": time.time(), "directory": str(directory), "terminal_states": ["gone"]}
    index = str(directory / "index.sqlite")
    return clock("read and index the list", sources.fetch, source, context, index, max_age=600)


def _facts(directory: Path) -> Iterator[dict]:
    with (directory / "facts.jsonl").open() as stream:
        for line in stream:
            yield json.loads(line)


def of_fleet(hosts: int) -> dict:
    """Make up a fleet; return what plans() and difference() say of it, each in a process of its own."""
    with tempfile.TemporaryDirectory() as directory:
        write(Path(directory), hosts)
        return {what: _alone(what, directory) for what in ("plans", "difference")}


def _alone(what: str, directory: str) -> dict:
    done = subprocess.run([sys.executable, __file__, what, directory], stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def of_one_host(repeat: int) -> dict:
    """Return the median seconds of a host's facts and plan by the share of its VMs that are dead, in percent."""
    found = {}
    for percent in (PERCENT_DEAD, 10, 100):
        packed, live = facts("h1", ONE_HOST, percent)
        with tempfile.TemporaryDirectory() as directory:
            document = {"realm": REALM, "generated_at": time.time(), "complete": True, "hosts": ["h1"]}
            document["vms"] = [{"vm_id": vm_id, "host": "h1"} for vm_id in live] or [{"vm_id": "other", "host": "h1"}]
            handle = _manifest_of(document, directory)
            clocks = [Clock() for _round in range(repeat)]
            for clock in clocks:
                clock("all", _plan, packed, handle)
        found[percent] = statistics.median(clock.seconds["all"] for clock in clocks)
    return found


def _manifest_of(document: dict, directory: str) -> dict:
    checked = manifests.check(document, "bench", now=time.time(), max_age=float("inf"))
    return manifests.handle(manifests.union([checked]), f"{directory}/index.sqlite")


def _plan(packed: dict, handle: dict) -> dict:
    found = host_facts.unpacked(packed)
    share = manifests.share(handle, "h1", host_facts.vm_ids(found))
    return planner.plan(found, share, {"realm": REALM, "host": "h1", **UNCAPPED}, TRAITS)


# --- what is shown


def report(repeat: int) -> tuple[dict, list[str]]:
    """Measure and print; return all numbers and the targets that were missed."""
    alone = of_one_host(repeat)
    small, large = of_fleet(HOSTS // 10), of_fleet(HOSTS)
    steps, few = large["plans"]["seconds"], small["plans"]["seconds"]
    total, total_of_few = sum(steps.values()), sum(few.values())
    floor = sum(large["difference"]["seconds"].values())
    decided = steps["share of the list"] + steps["plan"]
    expected = HOSTS * PER_HOST * PERCENT_DEAD // 100
    if not large["plans"]["reap"] == large["difference"]["left"] == expected:
        sys.exit(f"{large['plans']['reap']} planned to be removed, not {expected}")
    print(f"{HOSTS} hosts with {PER_HOST} resources each, {HOSTS * PER_HOST} VMs on the list, {PERCENT_DEAD} % dead;")
    print("seconds of processor time, beside a tenth of it")
    for name, seconds in steps.items():
        print(f"  {name:36} {seconds:8.2f} s   {few[name]:8.2f} s")
    print(f"  {'':36} {total:8.2f} s   {total_of_few:8.2f} s")
    print(f"a plain difference of the same ids     {floor:8.2f} s")
    for percent, seconds in alone.items():
        print(f"one host, {ONE_HOST} resources, {percent:3} % dead {seconds * 1000:8.0f} ms")
    print("\nWhat counts:")
    memory = large["plans"]["memory"]
    targets = [
        ("seconds in all", total, MAX_SECONDS),
        ("memory in MiB", memory / MIB, MAX_MEMORY / MIB),
        ("growth of time, ten times the input", total / total_of_few, MAX_GROWTH),
        ("share and plan to plain difference", decided / floor, MAX_RATIO),
        ("one host, in milliseconds", alone[PERCENT_DEAD] * 1000, MAX_ONE_HOST * 1000),
    ]
    for name, value, most in targets:
        print(f"{name:38} {value:8.1f}, at most {most:.0f}")
    missed = [f"{name}: {value:.1f}, at most {most:.0f}" for name, value, most in targets if value > most]
    return {"one host": alone, "fleet": large, "a tenth": small}, missed


if __name__ == "__main__":
    print(json.dumps({"plans": plans, "difference": difference}[sys.argv[1]](Path(sys.argv[2]))))
