#!/usr/bin/env python3
"""Measure what a sweep costs; bench/README.md says what is compared with what.

    bench.py              gather, reap, planner and lists; exit 1 when a target is missed
    bench.py gather       the facts of a full host against the bare commands
    bench.py reap         the removal of 1,000 orphans against a playbook that loops, and against the bare commands
    bench.py planner      the plans of a fleet with a million VMs against a plain difference of the ids
    bench.py lists        a million VMs from an API and from a database, against the bare clients

gather and reap start a test host with a kernel of its own, which needs root (see tests/hosts/hosts.py).
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
import on_host

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "collections"))

from ansible_collections.microvm.reaper.plugins.module_utils.all_kinds import TRAITS  # noqa: E402
from ansible_collections.microvm.reaper.plugins.plugin_utils import facts as host_facts  # noqa: E402
from ansible_collections.microvm.reaper.plugins.plugin_utils import planner, presets  # noqa: E402

HOSTS = [sys.executable, str(ROOT / "tests/hosts/hosts.py")]
MAX_RATIO = 1.5
MIN_SPEED = 50
MAX_MEMORY = 64 * 2**20
MIB = 2**20
LOAD = {"cgroups": 1000, "volumes": 200, "containers": 100, "processes": 3000}
REALM = "bench"
PRESETS = ["hyper", "obuilder"]
# 1,000 orphans: a container brings its snapshot.
ORPHANS = {"cgroups": 300, "jails": 300, "volumes": 250, "containers": 75}
ALL_ORPHANS = sum(ORPHANS.values()) + ORPHANS["containers"]
LIVE = {"cgroups": 10, "jails": 10, "volumes": 10, "containers": 10, "processes": 30}
# What a playbook removes that loops; it would take most of an hour for all. Divides each count.
SAMPLE = 25
UNCAPPED = {"max_per_host": 10**6, "max_percent_per_host": 100, "min_age": 0, "hold": 0}
PLAYBOOK_OPTIONS = {
    "reap_realm": REALM,
    "reap_presets": PRESETS,
    "reap_strike_interval": 1,
    "reap_min_age": 0,
    "reap_hold": 0,
    "reap_max_per_host": 10**6,
    "reap_max_percent_per_host": 100,
    "reap_max_per_fleet": 10**6,
    "reap_max_percent": 100,
    "reap_deadline": 1800,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # Without choices: argparse of Python 3.11 does not find a list, the default, among them.
    parser.add_argument(
        "what", nargs="*", metavar="{%s}" % ",".join(PARTS), default=["gather", "reap", "planner", "lists"]
    )
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
    with loaded_host(LOAD) as host:
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
        self.played = ""  # what the last playbook said

    def put(self, path: str, text: str) -> None:
        self._run(f"cat > {path}", text)

    def on(self, action: str, options: dict) -> dict:
        """Run an action of on_host.py there."""
        return json.loads(self._run(f"python3 /run/on_host.py {action} --options {shlex.quote(json.dumps(options))}"))

    def play(self, playbook: str, variables: dict) -> float:
        """Run a playbook against the host; return the seconds that all of it took."""
        given = Path(self.state, "variables.json")
        given.write_text(json.dumps(variables))
        program = str(Path(sys.executable).parent / "ansible-playbook")
        argv = [program, "-i", f"{self.state}/inventory.yml", "-e", f"@{given}", playbook]
        environment = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg")}
        begin = time.monotonic()
        done = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True)
        seconds = time.monotonic() - begin
        self.played = done.stdout + done.stderr
        if done.returncode:
            sys.exit(f"{playbook}: exit code {done.returncode}\n{self.played[-3000:]}")
        return seconds

    def _run(self, command: str, text: str = "") -> str:
        argv = [*HOSTS, "exec", "--state", self.state, "bench", "--", command]
        done = subprocess.run(argv, input=text, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(f"{command.split(' --options')[0]} on the host: exit code {done.returncode}")
        return done.stdout


@contextlib.contextmanager
def loaded_host(load: dict) -> Iterator[Host]:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("bench: ended by a signal"))  # and take the host down
    with contextlib.suppress(PermissionError):
        os.nice(-19)  # so that the host, which inherits it, is not measured by what else runs here
    with tempfile.TemporaryDirectory() as state:
        try:
            call([*HOSTS, "up", "--kind", "kernel", "--name", "bench", "--mem", "1500", "--state", state])
            host = Host(state)
            host.put("/run/on_host.py", (ROOT / "bench/on_host.py").read_text())
            print(", ".join(f"{count} {name}" for name, count in load.items()) + ": made in ", end="", flush=True)
            begin = time.monotonic()
            host.expected = host.on("load", load)
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


# --- reap


def reap(repeat: int) -> tuple[dict, list[str]]:
    rounds, outcomes = [], []
    with loaded_host(LIVE) as host:
        reaping = Reaping(host)
        for number in range(max(1, repeat // 5)):
            rounds.append(reaping.round(number))
            outcomes.append(reaping.outcomes)
            measured = ", ".join(f"{name} {one:.1f}" for name, one in rounds[-1].items())
            print(f"round {number + 1}, seconds: {measured}", flush=True)
    speeds = [one["loop"] / one["sweep"] for one in rounds]
    ratios = [one["module"] / one["shell"] for one in rounds]
    numbers: dict = {
        "rounds": rounds,
        "outcomes": outcomes,
        "speeds": speeds,
        "speed": statistics.median(speeds),
        "ratios": ratios,
        "ratio": statistics.median(ratios),
    }
    show_reap(numbers)
    missed = []
    if numbers["speed"] < MIN_SPEED:
        missed.append(f"{numbers['speed']:.0f} times as fast as a playbook that loops, at least {MIN_SPEED}")
    if numbers["ratio"] > MAX_RATIO:
        missed.append(f"ratio to the bare removing commands {numbers['ratio']:.2f}, at most {MAX_RATIO}")
    return numbers, missed


class Reaping:
    """Plants orphans beside what lives, has them removed one way or another, and looks what is left each time."""

    def __init__(self, host: Host):
        self.host = host
        self.rules = presets.rules(PRESETS)
        self.first = 1000
        self.outcomes: dict[str, int] = {}
        host.put(
            "/run/facts.py",
            payload("microvm.reaper.vm_resource_facts", {"realm": REALM, "packed": True, "rules": self.rules}),
        )
        self.live = ids(host.on("facts", {"module": "/run/facts.py"}))
        self.state = host.on("state", {})

    def round(self, number: int) -> dict[str, float]:
        """Return the seconds of each way; which comes first changes from round to round."""
        ways = [self.module, self.shell, self.sweep, self.loop]
        turn = number % len(ways)
        found: dict[str, float] = {}
        for way in ways[turn:] + ways[:turn]:
            found |= way()
            self.first += 1000
            self.check(way.__name__)
        return dict(sorted(found.items()))

    def plant(self, share: int = 1) -> dict:
        """Plant orphans, a share of them; return what on_host.py calls them by."""
        options = {"first": self.first, **{name: count // share for name, count in ORPHANS.items()}}
        self.host.on("load", {**options, "processes": 0, "blocks": 1})
        return options

    def check(self, way: str) -> None:
        """Exit unless all that lives is as it was, to the file, and there is nothing else."""
        now = self.host.on("state", {})
        wrong = [
            f"{name}: {now.get(name, 'gone')}" for name in {*self.state, *now} if now.get(name) != self.state.get(name)
        ]
        if wrong:
            found = "\n".join(line[:200] for line in sorted(wrong)[:10])
            sys.exit(
                f"{self.host.played[-3000:]}\n"
                f"{len(wrong)} things are not as they were before the orphans were planted, after {way}:\n{found}"
            )

    def module(self) -> dict[str, float]:
        """The module call alone, on the host."""
        self.plant()
        plan = confirmed(self.host.on("facts", {"module": "/run/facts.py"}), self.live)
        arguments = {"plan": plan, "rules": self.rules, "deadline": PLAYBOOK_OPTIONS["reap_deadline"]}
        self.host.put("/run/reap.py", payload("microvm.reaper.reap", arguments))
        done = self.host.on("reap", {"module": "/run/reap.py"})
        self.outcomes = done["outcomes"]
        return {"module": done["seconds"]}

    def shell(self) -> dict[str, float]:
        """The bare commands, on the host."""
        by_kind = self.host.on("shell", self.plant())
        return {"shell": sum(by_kind.values()), **{f"shell {kind}": one for kind, one in by_kind.items()}}

    def sweep(self) -> dict[str, float]:
        """A whole sweep, the second: from the start of ansible-playbook to its end."""
        self.plant()
        time.sleep(5)  # what is younger than the list at the end of the facts is left alone
        return {"first sweep": self.swept(), "sweep": self.swept()}

    def swept(self) -> float:
        """Run the playbook once, with a list of this moment: it cannot know what is younger than itself."""
        live = Path(self.host.state, "live.json")
        vms = [{"vm_id": vm_id, "host": "bench"} for vm_id in sorted(self.live)]
        document = {"realm": REALM, "generated_at": time.time(), "complete": True, "count": len(vms), "vms": vms}
        live.write_text(json.dumps({**document, "hosts": ["bench"]}))
        source = {"type": "file", "path": str(live)}
        return self.host.play("playbooks/reap.yml", {**PLAYBOOK_OPTIONS, "reap_live_sources": [source]})

    def loop(self) -> dict[str, float]:
        """A playbook that loops, on a sample; what it takes for nothing is not multiplied."""
        sample = on_host.names(**self.plant(SAMPLE))
        nothing = self.host.play("bench/loop.yml", {name: [] for name in sample})
        some = self.host.play("bench/loop.yml", sample)
        return {"start": nothing, "sample": some, "loop": nothing + SAMPLE * (some - nothing)}


def show_reap(numbers: dict) -> None:
    rounds = numbers["rounds"]
    median = {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
    bare = {name.partition(" ")[2]: median[name] for name in median if name.startswith("shell ")}
    table("bare commands in a shell loop, on the host", bare, median["shell"])
    print(f"\nThe module reap, on the host        {median['module']:.3f} s for {ALL_ORPHANS} orphans")
    print(f"first sweep, ansible-playbook      {median['first sweep']:.1f} s")
    print(f"second sweep, ansible-playbook     {median['sweep']:.1f} s")
    print(
        f"a playbook that loops              {median['loop']:.0f} s, of {median['sample']:.1f} s for one {SAMPLE}th "
        f"of each kind, times {SAMPLE}; its start of {median['start']:.1f} s once"
    )
    print("\nWhat counts, medians of the ratios in each round:")
    print(
        f"times as fast as the loop          {numbers['speed']:.0f}, at least {MIN_SPEED}", between(numbers["speeds"])
    )
    print(f"ratio to the bare commands         {numbers['ratio']:.2f}, at most {MAX_RATIO}", between(numbers["ratios"]))


def between(values: list[float]) -> str:
    return f"({min(values):.2f} to {max(values):.2f} in {len(values)} rounds)"


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
    if len(plan["reap"]) != ALL_ORPHANS:
        sys.exit(f"{len(plan['reap'])} planned to be removed, not {ALL_ORPHANS}: {plan['refused']}")
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
        "counts": {"bench": len(live)},
        "proven": True,
        "host_known": True,
        "live": sorted(live),
        "elsewhere": {},
        "tombstones": {},
    }


PARTS = {"gather": gather, "planner": fleet.report, "lists": lists.report, "reap": reap}

if __name__ == "__main__":
    sys.exit(main())
