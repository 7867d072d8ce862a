#!/usr/bin/env python3
"""Watch the reaper at work: two throw-away hosts, VMs dead and alive on them, and sweeps until the dead are gone.

The hosts have kernels of their own, so all is real: cgroups, jails, thin volumes, containers, snapshots, zombies.
They are removed at the end, also when the demo is interrupted.
"""

import argparse
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "hosts"))

from fleet import Fleet, Sweep  # noqa: E402

MAX_SWEEPS = 5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--live", type=int, default=8, help="live VMs on each host, besides builds (default 8)")
    parser.add_argument("--dead", type=int, default=6, help="dead VMs on each host, besides builds (default 6)")
    parser.add_argument("--kind", choices=["kernel", "container"], default="kernel", help="default: kernel")
    arguments = parser.parse_args()
    # As an interrupt: so that the hosts are removed however the demo is ended.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("demo: ended by a signal"))
    with tempfile.TemporaryDirectory(prefix="reaper-demo-") as directory:
        fleet = Fleet(Path(directory))
        try:
            return show(fleet, arguments)
        except KeyboardInterrupt:
            return say("Interrupted.") or 130
        finally:
            say("Removing the hosts.")
            fleet.down()


def show(fleet: Fleet, arguments: argparse.Namespace) -> int:
    say(f"Starting two {arguments.kind} hosts (the first time their image is built, which takes a minute).")
    Fleet.up(fleet.state, **{arguments.kind: ["rack1", "rack2"]})
    say(
        f"Planting on each host: {arguments.live} live VMs and {arguments.dead} dead ones, two live builds in "
        "containers and two dead ones.\nOf one dead VM a process still runs; the live source calls this VM destroyed."
    )
    fleet.plant({"live": arguments.live, "orphans": arguments.dead, "containers": 2})
    time.sleep(2)  # what is two seconds old is old enough here; on real hosts it is a minute
    fleet.list_live()
    say("Looking first, with --check: nothing is changed, no strike recorded.")
    print(report_of(fleet.sweep("--check")))
    for number in range(1, MAX_SWEEPS + 1):
        fleet.list_live()
        say(f"Sweep {number}.")
        sweep = fleet.sweep()
        print(report_of(sweep))
        if sweep.code:
            print(sweep.output, file=sys.stderr)
            return 1
        counts = [kind for kinds in sweep.report["kinds"].values() for kind in kinds.values()]
        if not any(kind["suspected"] or kind["confirmed"] for kind in counts):
            break
        time.sleep(1.5)
    problems = fleet.check("gone")
    say("Looking at the hosts with their own tools (dmsetup, ctr, /proc, /sys).")
    print("\n".join(problems) or "Every live VM runs and its data is unharmed; everything of the dead ones is gone.")
    return bool(problems)


def report_of(sweep: Sweep) -> str:
    """Return the lines that the reaper itself printed."""
    lines = sweep.output.splitlines()
    begin = next((n for n, line in enumerate(lines) if line.startswith("microvm.reaper:")), None)
    if begin is None:
        return sweep.output
    end = next((n for n, line in enumerate(lines) if n > begin and not line.strip()), len(lines))
    return "\n".join(lines[begin:end])


def say(text: str) -> None:
    print(f"\n=== {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
