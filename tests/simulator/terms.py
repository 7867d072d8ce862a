# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What is settled of a world before it begins: its policy, its caps, its batches, and who lists its live VMs."""

from __future__ import annotations

import dataclasses
import random

from ansible_collections.microvm.reaper.plugins.plugin_utils import planner
from unit import builders

# What nobody names belongs to no VM of the model.
TRAITS = {kind: traits for kind, traits in builders.TRAITS.items() if kind != "thin_id"}

REALM = "prod"
# What the reaper relies on: a VM is on the list this many seconds after the first of its things at the latest, and the
# clocks of the control plane and of the controller agree within so many seconds, or differ so much that it refuses.
LAG = 30.0
SKEW = 15.0
MAX_AGE = 600.0
# An orphan is gone after this many honest sweeps that could have taken it, beside its strikes: two in which it had to
# wait for something else of the sweep (what holds it, what runs in it).
CHANCES = 2
BEYOND = 1000
# Holds of which some are longer than others, for some kinds, on some evidence; a third of the worlds have one of them.
HOLDS = (
    100,
    250,
    {"jail": 200, "dm_thin": 200, "snapshot": 200},
    {"jail": 100, "dm_thin": 300},
    {"absent": 300},
    {"tombstoned": 120, "absent": 30},
    {"jail": {"absent": 300, "tombstoned": 60}, "dm_thin": 200, "snapshot": {"absent": 150}, "container": 90},
    {"absent": 90, "cgroup": 200, "container": {"tombstoned": 150}, "snapshot": 250},
)
# Where things of a kind lie, which may get full.
PLACES = {"jail": "fs", "dm_thin": "pool"}
# Holes that are known and not closed yet (README.md). A world keeps out of them unless it is told to look there.
GAPS = ("skew",)


@dataclasses.dataclass(frozen=True)
class Source:
    """One live source. ``part``: all VMs, or those with an even or odd number; ``behind``: seconds that it lags."""

    name: str
    required: bool = True
    proven: bool = True
    part: int | None = None
    behind: float = 0.0
    fails: float = 0.0

    def knows(self, vm):
        """Tell whether it is for this source to list the VM."""
        return self.part is None or vm.number % 2 == self.part

    def __str__(self):
        words = [] if self.required else ["optional"]
        words += [] if self.proven else ["without proof"]
        words += [] if self.part is None else ["only %s VMs" % ("odd" if self.part else "even")]
        words += ["%d s behind" % self.behind] if self.behind else []
        return "%s%s" % (self.name, " (%s)" % ", ".join(words) if words else "")


@dataclasses.dataclass(frozen=True)
class Terms:
    """The terms of one world; ``batches`` are the sizes of a run's batches, the last one again and again."""

    seed: int
    hosts: int
    policy: dict
    caps: dict
    batches: tuple
    waves: bool
    sources: tuple
    names_hosts: bool
    ids_are_reused: bool
    flavour: int
    favourites: tuple
    killed: float
    gaps: frozenset = frozenset()

    def strikes(self):
        """Return how many strikes the most careful grade of evidence asks for."""
        return _most(self.policy["strikes"])

    @property
    def holds(self):
        """Tell whether anything waits in this world."""
        return bool(self.policy["hold"])

    def longest_hold(self):
        """Return how long the most careful of all waits."""
        return _most(self.policy["hold"])

    def hold(self, kind, is_tombstoned):
        """Return how long a thing of the kind waits, on this evidence."""
        hold, grade = self.policy["hold"], "tombstoned" if is_tombstoned else "absent"
        if isinstance(hold, dict) and kind in hold:
            hold = hold[kind]
        return hold.get(grade, 0) if isinstance(hold, dict) else hold

    def skew(self):
        """Return by how many seconds two clocks may differ without being noticed."""
        return 280.0 if "skew" in self.gaps else SKEW

    def asked(self, key, evidence):
        """Return the number that the policy asks for with this evidence."""
        value, grade = self.policy.get(key, 0), "tombstoned" if evidence == "tombstoned" else "absent"
        return value.get(grade, planner.DEFAULT_POLICY[key]) if isinstance(value, dict) else value

    def __str__(self):
        said = ", ".join("%s %s" % (key, value) for key, value in sorted(self.policy.items()) if key != "realm")
        caps = ", ".join("%s %s" % item for item in sorted(self.caps.items()))
        runs = "in waves of" if self.waves else "in batches of"
        return "%d hosts, sweeps %s %s\n  live sources: %s%s\n  policy: %s\n  caps of a run: %s" % (
            self.hosts,
            runs,
            ", ".join("all" if size >= BEYOND else str(size) for size in self.batches),
            ", ".join(map(str, self.sources)),
            "" if self.names_hosts else ", which do not say for which hosts they speak",
            said,
            caps,
        )


def terms(seed, gaps=()):
    """Return the terms of the world with this seed."""
    chance = random.Random("terms %d" % seed)
    reused = chance.random() < 0.6
    policy = {
        "realm": REALM,
        "reused_ids": [".*"] if reused else [],
        "strikes": chance.choice((2, 2, 2, 3)),
        "strike_interval": chance.choice((60, 60, 60, 45, 120)),
        "min_age": chance.choice((60, 60, 60, 90)),
        "running": chance.choice(("tombstoned", "tombstoned", "confirmed", "never")),
        "zombies": chance.choice(("notify_parent", "notify_parent", "report")),
        "max_per_host": chance.choice((2, 3, BEYOND)),
        "max_percent_per_host": chance.choice((60, 100)),
        "percent_floor": 2,
    }
    if chance.random() > 0.8:
        policy["strikes"] = {"tombstoned": 2, "absent": 3}
    # Of its own, so that a world without holds is what it was before there were any.
    chance.choice((1, 2, 3, 4))
    ladder = random.Random("ladder %d" % seed)
    policy["hold"] = ladder.choice(HOLDS) if ladder.random() < 1 / 3 else 0
    policy["pressure"] = ladder.choice((90, 75, 40))
    waves = chance.random() < 0.2
    return Terms(
        seed=seed,
        hosts=chance.choice((3, 5, 6)),
        policy=policy,
        caps={
            "max_per_fleet": chance.choice((3, 4, BEYOND)),
            "max_percent": chance.choice((40, 100)),
            "percent_floor": 2,
        },
        batches=(1, 2, BEYOND) if waves else chance.choice(((BEYOND,), (BEYOND,), (BEYOND,), (BEYOND,), (2,), (1,))),
        waves=waves,
        sources=_sources(chance),
        names_hosts=chance.random() < 0.85,
        ids_are_reused=reused,
        flavour=int(chance.random() * 3),
        # A world has its own troubles, more often than others: rare things have to meet.
        favourites=(chance.random(), chance.random(), chance.random()),
        killed=chance.choice((0.1, 0.2, 0.4)),
        gaps=frozenset(gaps),
    )


def _sources(chance):
    kind, behind = chance.random(), 30.0 + 300.0 * chance.random()
    if kind < 0.5:
        return (Source("cp"),)
    if kind < 0.7:
        return (Source("even", part=0, fails=0.02), Source("odd", part=1))
    if kind < 0.88:
        return (Source("cp"), Source("replica", required=chance.random() < 0.5, behind=behind, fails=0.1))
    if kind < 0.97:
        return (Source("cp"), Source("extra", required=False, proven=False, fails=0.6))
    return (Source("cp", proven=False),)


def _most(value):
    return max(map(_most, value.values())) if isinstance(value, dict) else value
