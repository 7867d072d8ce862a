#!/usr/bin/env python3
"""Measure what a sweep costs; bench/README.md says what is compared with what.

    bench.py              gather, planner and lists; exit 1 when a target is missed
    bench.py gather       the facts of a full host against the bare commands
    bench.py planner      the plans of a fleet with a million VMs against a plain difference of the ids
    bench.py lists        a million VMs from an API and from a database, against the bare clients
    bench.py removal      the removal of 200 orphans against the bare commands; without a target

gather and removal start a test host with a kernel of its own, which needs root (see tests/hosts/hosts.py).
"""

import argparse
import ast
import contextlib
import json
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import fleet
import lists

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "collections"))

from ansible_collections.microvm.reaper.plugins.module_utils.all_kinds import TRAITS  # noqa: E402
from ansible_collections.microvm.reaper.plugins.plugin_utils import facts as host_facts  # noqa: E402
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
    # Without choices: argparse of Python 3.11 does not find a list, the default, among them.
    parser.add_argument("what", nargs="*", metavar="{%s}" % ",".join(PARTS), default=["gather", "planner", "lists"])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there too")
    parser.add_argument("--repeat", type=int, default=15, metavar="N", help="how often to measure; default: 15")
    arguments = parser.parse_args()
    for what in set(arguments.what) - set(PARTS):
        parser.error(f"there is no {what}")
    numbers, missed = {}, []
    for what in arguments.what:
        print(f"\n=== {what}")
        numbers[what], failed = PARTS[what](arguments.repeat)
        missed += failed
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


PARTS = {"gather": gather, "planner": fleet.report, "lists": lists.report, "removal": removal}

if __name__ == "__main__":
    sys.exit(main())
