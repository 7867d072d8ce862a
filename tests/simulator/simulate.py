#!/usr/bin/env python3
# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Run the decision core through a fleet's life and prove after every sweep what must hold.

    python tests/simulator/simulate.py --sweeps 1000000 --seed 7

A sweep here is one host's. The exit code is 1 when something did not hold; the same seed tells the same story again.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path

if __package__ in (None, ""):
    ROOT = Path(__file__).resolve().parents[2]
    sys.path[:0] = [str(ROOT / "collections"), str(ROOT / "tests")]

from simulator import actions, invariants  # noqa: E402
from simulator.control_plane import ControlPlane  # noqa: E402
from simulator.story import Story, Violation  # noqa: E402
from simulator.sweeper import Sweeper  # noqa: E402
from simulator.world import World  # noqa: E402


class Failure(Exception):
    """A violation, with the seed and the story that led to it."""


def simulate(sweeps, seed, sweeper_class=Sweeper):
    """Run at least so many sweeps of hosts; return counts. Raises Failure."""
    chance, story = random.Random(seed), Story()
    world = World(chance, story)
    story.now = lambda: world.now
    sweeper = sweeper_class(world, ControlPlane(world))
    counts = {"sweeps": 0, "reaped": 0, "stopped": 0}
    try:
        while counts["sweeps"] < sweeps:
            _step(world, sweeper, counts)
    except Violation as err:
        raise Failure(
            "seed %d, after %d sweeps: %s\n%s\n  => %s" % (seed, counts["sweeps"], err, story, err)
        ) from err
    return counts


def _step(world, sweeper, counts):
    # Mostly as on a schedule, sometimes at once again.
    world.now += world.random.choice((65.0, 65.0, 90.0, 300.0, 5.0))
    actions.happen(world, world.random.randrange(4))
    before = invariants.Before(world)
    sweep = sweeper.sweep()
    invariants.check(world, before, sweep)
    if sweep.mood == "honest" and not sweep.check_mode and not sweep.stopped and world.random.random() < 0.1:
        invariants.a_repeated_sweep_is_a_no_op(world, sweeper, sweep)
    world.forget_the_long_dead()
    counts["sweeps"] += len(world.hosts)
    counts["reaped"] += len(sweep.reaped)
    counts["stopped"] += bool(sweep.stopped)


def main():
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sweeps", type=int, default=100000, help="sweeps of single hosts (default %(default)s)")
    parser.add_argument("--seed", type=int, help="tell the story of this seed (default: a random one)")
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(2**32) if options.seed is None else options.seed
    print("seed %d" % seed, flush=True)
    begin = time.monotonic()
    try:
        counts = simulate(options.sweeps, seed)
    except Failure as err:
        print(err)
        return 1
    print(
        "%(sweeps)d sweeps, %(reaped)d things reaped, %(stopped)d batches stopped, nothing wrong" % counts
        + " (%.1f s)" % (time.monotonic() - begin)
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
