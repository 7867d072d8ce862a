#!/usr/bin/env python3
"""Measure what a sweep costs; bench/README.md says what is compared with what.

    bench.py              gather: the facts of a full host against the bare commands; exit 1 when a target is missed
    bench.py removal      the removal of 200 orphans against the bare commands
    bench.py planner      the plan of a host with 10,000 resources, and the index of 100,000 VMs

gather and removal start a test host with a kernel of its own, which needs root (see tests/hosts/hosts.py).
"""

import argparse
import ast
import contextlib
import json
import os
import random
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "collections"))

from ansible_collections.microvm.reaper.plugins.module_utils import ledger as ledgers  # noqa: E402
from ansible_collections.microvm.reaper.plugins.module_utils import resource as r  # noqa: E402
from ansible_collections.microvm.reaper.plugins.module_utils.all_kinds import TRAITS  # noqa: E402
from ansible_collections.microvm.reaper.plugins.module_utils.gather import pack  # noqa: E402
from ansible_collections.microvm.reaper.plugins.plugin_utils import facts as host_facts  # noqa: E402
from ansible_collections.microvm.reaper.plugins.plugin_utils import manifest as manifests  # noqa: E402
from ansible_collections.microvm.reaper.plugins.plugin_utils import planner, presets  # noqa: E402

HOSTS = [sys.executable, str(ROOT / "tests/hosts/hosts.py")]
MAX_RATIO = 1.5
MAX_MEMORY = 64 * 2**20
MIB = 2**20
LOAD = {"cgroups": 1000, "volumes": 200, "containers": 100, "processes": 3000}
REALM = "bench"
PRESETS = ["hyper", "obuilder"]
EACH = 50  # of four kinds: 200 orphans
UNCAPPED = {"max_per_host": 10**6, "max_percent_per_host": 100, "min_age": 0}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["gather", "removal", "planner"], default="gather")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there too")
    parser.add_argument("--repeat", type=int, default=15, metavar="N", help="how often to measure; default: 15")
    arguments = parser.parse_args()
    numbers, missed = {"gather": gather, "removal": removal, "planner": planning}[arguments.what](arguments.repeat)
    if arguments.json:
        arguments.json.write_text(json.dumps(numbers, indent=1) + "\n")
    for target in missed:
        print(f"missed: {target}")
    return 1 if missed else 0


# --- gather


def gather(repeat: int) -> tuple[dict, list[str]]:
    options = {"realm": REALM, "packed": True, "rules": presets.rules(PRESETS)}
    facts, empty = payload("microvm.reaper.vm_resource_facts", options), payload("ansible.builtin.ping", {})
    with loaded_host() as host:
        host.put("/run/facts.py", facts)
        host.put("/run/empty.py", empty)
        options = {"module": "/run/facts.py", "empty": "/run/empty.py", "repeat": repeat, "expected": host.expected}
        measured = host.on("gather", options)
    numbers = evaluate(measured)
    show(numbers)
    missed = []
    if numbers["ratio"] > MAX_RATIO:
        missed.append(f"ratio {numbers['ratio']:.2f}, at most {MAX_RATIO}")
    if numbers["resident"] > MAX_MEMORY:
        missed.append(f"memory {numbers['resident'] / MIB:.0f} MiB, at most {MAX_MEMORY // MIB}")
    return numbers, missed


def evaluate(measured: dict) -> dict:
    """Return the numbers that are shown, of medians; of several ways to do the same the fastest counts."""
    samples = measured.pop("samples")
    medians = {name: statistics.median(values) for name, values in samples.items()}
    bare: dict[str, float] = {}
    fastest: dict[str, str] = {}
    for name, seconds in medians.items():
        command, slash, _way = name.rpartition("/")
        if slash and seconds <= bare.get(command, seconds):
            bare[command], fastest[command] = seconds, name
    total = sum(bare.values())
    rounds = [
        seconds / sum(samples[name][turn] for name in fastest.values())
        for turn, seconds in enumerate(samples["module"])
    ]
    return {
        **measured,
        "module": medians["module"],
        "empty": medians["empty"],
        "python": medians["python"],
        "bare": bare,
        "bare_total": total,
        "ratio": medians["module"] / total,
        "rounds": rounds,
        "samples": samples,
    }


def show(numbers: dict) -> None:
    table("bare commands, one after the other", numbers["bare"], numbers["bare_total"])
    parts = {
        "an Ansible module that does nothing": numbers["empty"],
        "what ours does more": numbers["module"] - numbers["empty"],
    }
    table("vm_resource_facts", parts, numbers["module"])
    kinds = ", ".join(f"{name} {seconds}" for name, seconds in sorted(numbers["kinds"].items()) if seconds)
    started = sum(numbers["commands"].values())
    names = ", ".join(f"{count} x {name}" for name, count in sorted(numbers["commands"].items()))
    print(f"\nseconds by kind, inside it         {kinds}")
    print(f"external commands it starts        {started} ({names})")
    print(f"python3 -c pass, for orientation   {numbers['python']:.3f} s")
    print(
        f"memory charged by the kernel       {numbers['charged'] / MIB:.1f} MiB, shared pages once, its caches included"
    )
    print("\nWhat counts:")
    print(f"memory, sum of resident sizes      {numbers['resident'] / MIB:.1f} MiB, at most {MAX_MEMORY // MIB}")
    low, _median, high = statistics.quantiles(numbers["rounds"], n=4)
    print(f"ratio of the medians               {numbers['ratio']:.2f}, at most {MAX_RATIO}", end=" ")
    print(f"(half of the {len(numbers['rounds'])} rounds: {low:.2f} to {high:.2f})")


def table(title: str, rows: dict[str, float], total: float) -> None:
    print(f"\n{title}")
    for name, seconds in rows.items():
        print(f"  {name:36} {seconds:8.3f} s")
    print(f"  {'':36} {total:8.3f} s")


# --- the host


class Host:
    """The test host, loaded."""

    def __init__(self, state: str):
        self.state = state
        self.expected: dict[str, int] = {}

    def put(self, path: str, text: str) -> None:
        self._run(f"cat > {path}", text)

    def on(self, action: str, options: dict) -> dict:
        """Run an action of on_host.py there."""
        return json.loads(self._run(f"python3 /run/on_host.py {action} --options {shlex.quote(json.dumps(options))}"))

    def _run(self, command: str, text: str = "") -> str:
        argv = [*HOSTS, "exec", "--state", self.state, "bench", "--", command]
        done = subprocess.run(argv, input=text, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(f"{command.split(' --options')[0]} on the host: exit code {done.returncode}")
        return done.stdout


@contextlib.contextmanager
def loaded_host() -> Iterator[Host]:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("bench: ended by a signal"))  # and take the host down
    with contextlib.suppress(PermissionError):
        os.nice(-19)  # so that the host, which inherits it, is not measured by what else runs here
    with tempfile.TemporaryDirectory() as state:
        try:
            call([*HOSTS, "up", "--kind", "kernel", "--name", "bench", "--mem", "1500", "--state", state])
            host = Host(state)
            host.put("/run/on_host.py", (ROOT / "bench/on_host.py").read_text())
            print(", ".join(f"{count} {name}" for name, count in LOAD.items()) + ": made in ", end="", flush=True)
            begin = time.monotonic()
            host.expected = host.on("load", LOAD)
            print(f"{time.monotonic() - begin:.0f} s", flush=True)
            yield host
        finally:
            call([*HOSTS, "down", "--state", state])


def call(argv: list[str]) -> None:
    if subprocess.run(argv).returncode:
        sys.exit(f"failed: {shlex.join(argv)}")


def payload(module: str, arguments: dict) -> str:
    """Return the very file that Ansible sends to a host to run a module there, with these arguments.

    Ansible is made to run it here, with arguments with which it does nothing, and to leave the file behind.
    """
    harmless = {"ansible.builtin.ping": {"data": "pong"}, "microvm.reaper.reap": {"plan": {}, "rules": {}}}
    harmless["microvm.reaper.vm_resource_facts"] = {"realm": REALM, "rules": {}}
    with tempfile.TemporaryDirectory() as directory:
        environment = {
            "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
            "ANSIBLE_KEEP_REMOTE_FILES": "1",
            "ANSIBLE_PIPELINING": "0",
            "ANSIBLE_REMOTE_TMP": directory,
        }
        program = [str(Path(sys.executable).parent / "ansible"), "-i", "localhost,", "-c", "local", "localhost"]
        done = subprocess.run(
            [*program, "-m", module, "-a", json.dumps(harmless[module])],
            cwd=ROOT,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
        )
        files = list(Path(directory).glob("*/AnsiballZ_*.py"))
        if len(files) != 1:
            sys.exit(f"Ansible left no payload of {module}: {done.stdout}{done.stderr}")
        return with_arguments(files[0].read_text(), arguments)


def with_arguments(text: str, arguments: dict) -> str:
    """Replace the arguments of a payload; what Ansible itself passes along stays."""

    def replaced(matched: re.Match) -> str:
        parameters = json.loads(ast.literal_eval(matched[1]))
        kept = {key: value for key, value in parameters["ANSIBLE_MODULE_ARGS"].items() if key.startswith("_ansible_")}
        return f"params={json.dumps({'ANSIBLE_MODULE_ARGS': {**arguments, **kept}})!r},\n"

    text, count = re.subn(r"^params=(.*),\n", replaced, text, flags=re.MULTILINE)
    if count != 1:
        sys.exit("this version of Ansible makes payloads of another shape")
    return text


# --- removal


def removal(repeat: int) -> tuple[dict, list[str]]:
    rules = presets.rules(PRESETS)
    rounds = []
    with loaded_host() as host:
        host.put(
            "/run/facts.py",
            payload("microvm.reaper.vm_resource_facts", {"realm": REALM, "packed": True, "rules": rules}),
        )
        for number in range(max(1, repeat // 5)):
            before = ids(host.on("facts", {"module": "/run/facts.py"}))
            first = 10000 * (number + 1)
            orphans = {"cgroups": EACH, "volumes": EACH, "containers": EACH, "processes": 0, "first": first}
            host.on("load", orphans)
            plan = confirmed(host.on("facts", {"module": "/run/facts.py"}), before)
            host.put("/run/reap.py", payload("microvm.reaper.reap", {"plan": plan, "rules": rules}))
            rounds.append(host.on("removal", {"module": "/run/reap.py", "first": first + 5000, "count": EACH}))
            print(f"{len(plan['reap'])} removed: {rounds[-1]['outcomes']}")
    module = statistics.median(one["seconds"] for one in rounds)
    bare = statistics.median(one["bare"] for one in rounds)
    print(f"\nremoval of {4 * EACH} orphans by the module {module:.2f} s, by bare commands {bare:.2f} s", end=": ")
    print(f"ratio {module / bare:.2f}")
    return {"module": module, "bare": bare, "ratio": module / bare, "rounds": rounds}, []


def ids(facts: dict) -> set[str]:
    """Return the ids of all VMs that have something on the host."""
    kinds = host_facts.unpacked(facts)["kinds"]
    return {one["vm_id"] for kind in kinds.values() for one in kind["resources"]}


def confirmed(facts: dict, live: set[str]) -> dict:
    """Return the plan of a second sweep, an hour after the first."""
    facts = host_facts.unpacked(facts)
    policy = {"realm": REALM, "host": "bench", **UNCAPPED}
    first = planner.plan(facts, share(live), policy, TRAITS)
    later = dict(
        facts, ledger=dict(facts["ledger"], **first["ledger"]), boottime_seconds=facts["boottime_seconds"] + 3600
    )
    plan = planner.plan(later, share(live), policy, TRAITS)
    if len(plan["reap"]) != 4 * EACH:
        sys.exit(f"{len(plan['reap'])} planned to be removed: {plan['refused']}")
    return plan


def share(live: set[str]) -> dict:
    """Return what a proven manifest says of a host."""
    return {
        "realm": REALM,
        "source": "bench",
        "epoch": None,
        "epochs": {},
        "generated_at": time.time(),
        "age": 0.0,
        "count": len(live),
        "proven": True,
        "host_known": True,
        "live": sorted(live),
        "elsewhere": {},
        "tombstones": {},
    }


# --- planner


def planning(repeat: int) -> tuple[dict, list[str]]:
    """Measure the controller's part in memory: 2,500 VMs of four resources each, a tenth of them dead, of 100,000."""
    facts, live = made_up_facts(2500)
    packed = dict({key: value for key, value in facts.items() if key != "kinds"}, packed=pack(facts["kinds"]))
    vms = [(vm_id, ["h1"]) for vm_id in live] + [(f"other{number}", [f"h{number % 500}"]) for number in range(97750)]
    manifest = dict(share(live), count=len(vms), hosts=[f"h{number}" for number in range(500)], vms=vms)
    policy = {"realm": REALM, "host": "h1", **UNCAPPED}
    with tempfile.TemporaryDirectory() as directory:
        handle = manifests.handle(manifest, f"{directory}/handle.sqlite")
        unpacked = host_facts.unpacked(packed)
        wanted = host_facts.vm_ids(unpacked)
        of_host = manifests.share(handle, "h1", wanted)
        files = iter(range(10**6))
        resources = [one for kind in unpacked["kinds"].values() for one in kind["resources"]]
        alive = set(live)
        listed = [vm_id for vm_id, _hosts in vms]
        names = [f"v{number}" for number in range(100000)]
        steps: dict[str, Callable[[], object]] = {
            "plain difference of 10,000 resources": lambda: [one for one in resources if one["vm_id"] not in alive],
            "unpack and check the facts": lambda: host_facts.unpacked(packed),
            "share of the manifest": lambda: manifests.share(handle, "h1", wanted),
            "plan": lambda: planner.plan(unpacked, of_host, policy, TRAITS),
            "plain difference of 100,000 ids": lambda: set(names) - set(listed),
            "index of 100,000 VMs": lambda: manifests.Index.write(f"{directory}/{next(files)}.sqlite", manifest),
        }
        seconds = {name: statistics.median(clock(step) for _round in range(repeat)) for name, step in steps.items()}
        doomed = len(planner.plan(unpacked, of_host, policy, TRAITS)["reap"])
    of_plan = seconds["plain difference of 10,000 resources"]
    of_index = seconds["plain difference of 100,000 ids"]
    ratios = {name: value / (of_index if "100,000" in name else of_plan) for name, value in seconds.items()}
    for name, value in seconds.items():
        print(f"{name:40} {value * 1000:9.2f} ms {ratios[name]:8.1f} x")
    print(f"of {len(resources)} resources {doomed} are to be removed")
    return {"seconds": seconds, "ratios": ratios, "reap": doomed}, []


def clock(step: Callable[[], object]) -> float:
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def made_up_facts(vms: int) -> tuple[dict, set[str]]:
    """Return facts with four resources of each VM, seen once before, and the ids that are live."""
    every = [f"v{random.Random(number).randrange(10**12):012}" for number in range(vms)]
    live = {vm_id for number, vm_id in enumerate(every) if number % 10}
    kinds, strikes = {}, {}
    for kind in ("cgroup", "jail", "dm_thin", "zombie"):
        found = [
            r.resource(
                kind, f"/somewhere/{kind}/{vm_id}", vm_id, f"boot:{vm_id}", age_seconds=9000.0, details={"pool": "p"}
            )
            for vm_id in every
        ]
        kinds[kind] = {"status": "ok", "reason": None, "resources": found, "foreign": 0, "seconds": 0.1}
        for one in found:
            if one["vm_id"] not in live:
                strike = {"identity": one["identity"], "vm_id": one["vm_id"], "strikes": 1, "boot_id": "boot"}
                strikes[f"{kind} {one['name']}"] = dict(strike, first=1000.0, last=1000.0)
    ledger = dict(ledgers.empty(REALM), strikes=strikes)
    facts = {
        "realm": REALM,
        "boot_id": "boot",
        "machine_id": "m1",
        "boottime_seconds": 10000.0,
        "ledger": ledger,
        "ledger_problem": None,
        "generation": 0,
        "kinds": {
            **kinds,
            **{
                kind: {"status": "ok", "reason": None, "resources": [], "foreign": 0}
                for kind in TRAITS
                if kind not in kinds
            },
        },
    }
    return facts, live


if __name__ == "__main__":
    sys.exit(main())
