#!/usr/bin/env python3
# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Run the decision core through the lives of many fleets and prove after every sweep what must hold.

    python tests/simulator/simulate.py --sweeps 1000000 --seed 7

A sweep here is one host's. The exit code is 1 when something did not hold: the story of it is then shrunk and told, and
the same seed tells the same story again.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import gc
import hashlib
import itertools
import os
import random
import sys
import time
import traceback
from pathlib import Path

if __package__ in (None, ""):
    ROOT = Path(__file__).resolve().parents[2]
    sys.path[:0] = [str(ROOT / "collections"), str(ROOT / "tests")]

from simulator import actions, disks, invariants, terms  # noqa: E402
from simulator.control_plane import HONEST, ControlPlane  # noqa: E402
from simulator.shrink import shrunk  # noqa: E402
from simulator.story import Story, Violation  # noqa: E402
from simulator.sweeper import Sweeper, policies_are_completed_once  # noqa: E402
from simulator.world import World  # noqa: E402

STEPS = 100
EARLY = 4
WORLDS_AT_ONCE = 40
# About 15 seconds; not a time, so that the story is the same on every machine.
SWEEPS_TO_SHRINK = 80_000


class Failure(Exception):
    """Something did not hold in the world of this seed; the text says what."""

    def __init__(self, seed, counts, violation):
        super().__init__("seed %d, after %d sweeps: %s" % (seed, counts["sweeps"], violation))
        self.seed, self.violation = seed, violation


def seeds(seed):
    """Return the seeds of the worlds that follow from one, which is the first of them."""
    return itertools.chain([seed], (_derived(seed, number) for number in itertools.count(1)))


def _derived(seed, number):
    return int.from_bytes(hashlib.sha256(b"%d %d" % (seed, number)).digest()[:5], "big")


def simulate(sweeps, seed, gaps=()):
    """Run worlds for at least so many sweeps of hosts; return counts. Raises Failure."""
    counts = collections.Counter()
    for one in seeds(seed):
        live_through(one, counts, gaps=gaps)
        if counts["sweeps"] >= sweeps:
            return counts
    raise AssertionError("there is always another seed")


def live_through(seed, counts, *, left_out=frozenset(), gaps=(), story=None, disks_class=disks.Disks, sweeper=Sweeper):
    """Let one world live, without the places ``{(step, slot)}`` that are left out. Raises Failure."""
    world = World(terms.terms(seed, gaps), story or Story())
    world.story.tell("a world of %s", world.terms)
    _furnish(world)
    sweeper = sweeper(world, ControlPlane(world), lambda run, batch: _watch(world, run, batch, counts))
    before = counts["sweeps"]
    gc.disable()  # a world is garbage as a whole, at its end
    try:
        with disks.disks_of(world, disks_class), policies_are_completed_once():
            for step in range(STEPS):
                _step(world, sweeper, step, lambda slot, step=step: (step, slot) not in left_out)
    except Exception as err:
        raise Failure(seed, {"sweeps": before + sweeper.sweeps}, _as_violation(err)) from err
    finally:
        gc.enable()
        counts["sweeps"] = before + sweeper.sweeps
        counts["restored"] += world.restored


def _as_violation(err):
    """Whatever is raised is a violation: a sweep that dies reaps nothing, today and for ever."""
    if isinstance(err, Violation):
        return err
    place = traceback.extract_tb(err.__traceback__)[-1]
    where = "%s:%d" % (Path(place.filename).name, place.lineno)
    return Violation("crash at " + where, "%s at %s: %s" % (type(err).__name__, where, err))


def _furnish(world):
    """Some worlds have a host that cannot have every kind."""
    if world.terms.seed % 4 == 0:
        world.hosts[-1].lacks = (("dm_thin",), ("container", "snapshot"))[world.terms.seed // 4 % 2]


# The slots of a step: 0 what is to come, 1 to 3 happenings, 4 the wait, 5 the sweep, 6 its troubles, 7 the person,
# 8 a long pause, 9 a repetition, and ten for each batch.


def _step(world, sweeper, step, has):
    # Mostly as on a schedule, sometimes at once again.
    world.chance(step, 0)
    seconds = (65.0, 65.0, 90.0, 300.0, 5.0, 125.0)[int(world.random.random() * 6)]
    happenings, is_repeated = int(world.random.random() * 4), world.random.random() < 0.1
    if has(4):
        world.wait(seconds)
    for slot in range(1, 1 + happenings):
        if has(slot):
            world.chance(step, slot)
            actions.happen(world, early=step < EARLY)
    if has(5):
        run = sweeper.run(step, has)
        if is_repeated and has(9):
            batch = run.batches[-1]
            is_fresh = world.now - batch.fetched < 10
            if is_fresh and batch.mood == HONEST and not (batch.check_mode or batch.stopped):
                invariants.a_repeated_sweep_is_a_no_op(world, sweeper, batch)
    if step % 8 == 0:
        world.forget_the_long_dead()


def _watch(world, run, batch, counts):
    counts["reaped"] += len(batch.reaped)
    counts["finished"] += len(batch.finished)
    counts["set_aside"] += len(batch.aside)
    counts["from_aside"] += len(batch.from_aside)
    counts["killed"] += len(batch.killed)
    counts["spared"] += len(batch.spared)
    if batch.stopped:
        counts[batch.stopped["code"]] += 1
    for refusal in batch.refused.values():
        counts[refusal["code"]] += 1
    counts["pressed"] += invariants.check(world, run, batch)


def told(failure, gaps=()):
    """Return the shrunk story of a failure, in words."""
    name, spent = failure.violation.name, collections.Counter()

    def violated(left_out):
        try:
            live_through(failure.seed, spent, left_out=left_out, gaps=gaps)
        except Failure as err:
            return err.violation.name == name
        return False

    places = [(step, slot) for step in range(STEPS) for slot in range(60)]
    left_out, is_least = shrunk(places, violated, lambda: spent["sweeps"] < SWEEPS_TO_SHRINK)
    story = Story(is_wanted=True)
    try:
        live_through(failure.seed, collections.Counter(), left_out=left_out, gaps=gaps, story=story)
    except Failure as err:
        steps = len({step for step, slot in places if slot == 5 and (step, slot) not in left_out})
        return "\n".join([
            str(failure),
            "",
            "The story, shrunk to %d runs%s:" % (steps, "" if is_least else ", and not all was tried"),
            str(story),
            "",
            "  => %s" % err.violation,
            "",
            "Again: make simulate SWEEPS=1 SEED=%d%s" % (failure.seed, "".join(" GAP='%s'" % gap for gap in gaps)),
        ])
    raise AssertionError("the shrunk story does not end as the long one did")


def _some_worlds(some, gaps):
    """Live through some worlds, in a process of its own; return ``(counts, Failure or None)``."""
    counts = collections.Counter()
    try:
        for one in some:
            live_through(one, counts, gaps=gaps)
    except Failure as err:
        return counts, (err.seed, err.violation.name, str(err.violation))
    return counts, None


def main():
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sweeps", type=int, default=100000, help="sweeps of single hosts (default %(default)s)")
    parser.add_argument("--seed", type=int, help="tell the story of this seed (default: a random one)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: one for each core)")
    parser.add_argument("--gap", action="append", default=[], choices=terms.GAPS, help="look into a known hole")
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(2**32) if options.seed is None else options.seed
    print("seed %d" % seed, flush=True)
    begin = time.monotonic()
    try:
        counts = _in_parallel(options, seed)
    except Failure as err:
        print(told(err, options.gap))
        return 1
    print("%d sweeps, nothing wrong (%.1f s)" % (counts.pop("sweeps"), time.monotonic() - begin))
    print(", ".join("%s %d" % item for item in sorted(counts.items()) if item[1]))
    return 0


def _in_parallel(options, seed):
    """Run the worlds in several processes; the first that fails, in the order of their seeds, is raised."""
    counts, worlds = collections.Counter(), seeds(seed)
    if options.jobs <= 1 or options.sweeps <= 1000:
        return simulate(options.sweeps, seed, options.gap)
    with concurrent.futures.ProcessPoolExecutor(options.jobs) as pool:
        def begin():
            return pool.submit(_some_worlds, list(itertools.islice(worlds, WORLDS_AT_ONCE)), options.gap)

        running = collections.deque(begin() for _job in range(2 * options.jobs))
        try:
            while counts["sweeps"] < options.sweeps:
                found, failed = running.popleft().result()
                counts += found
                if failed:
                    one, name, text = failed
                    raise Failure(one, counts, Violation(name, text))
                running.append(begin())
                if sys.stderr.isatty():
                    print("\r%d sweeps " % counts["sweeps"], end="", file=sys.stderr, flush=True)
        finally:
            pool.shutdown(cancel_futures=True)
            if sys.stderr.isatty():
                print("\r", end="", file=sys.stderr)
    return counts


if __name__ == "__main__":
    sys.exit(main())
