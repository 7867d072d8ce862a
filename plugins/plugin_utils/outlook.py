# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Tells when a family will be confirmed, by asking the planner what it would say at later moments. Pure."""

from __future__ import annotations

from ..module_utils.all_kinds import TRAITS
from . import planner

MAX_SWEEPS = 100
HORIZON_SECONDS = 2**22  # 48 days


def to_come(facts, share, policy, vm_id):
    """Return ``(sweeps, seconds)`` after which the family is confirmed if everything stays as it is, None for never.

    The planner is asked at every moment at which it would say something new of the family, and is told each time what
    the sweep before would have remembered. Sweeps that can be left out do not count.
    """
    family = _Family(_only(facts, vm_id), share, policy, vm_id)
    needed = family.moments()
    for moment in needed[:-1]:
        fewer = [one for one in needed if one != moment]
        if family.is_confirmed_by(fewer):
            needed = fewer
    return (len(needed), needed[-1]) if needed else None


class _Family:
    """One family while everything stays as it is, at moments given in seconds from now."""

    def __init__(self, facts, share, policy, vm_id):
        self.facts = facts
        self.share = share
        self.policy = policy
        self.vm_id = vm_id

    def moments(self):
        """Return when sweeps would say something new, up to the first that confirms; empty when none ever does."""
        facts, found, moment = self.facts, [], 0
        while moment is not None and len(found) < MAX_SWEEPS:
            found.append(moment)
            swept = self._at(facts, moment)
            if self._is_confirmed(swept):
                return found
            facts = _remembering(facts, swept)
            moment = _next_change(lambda at, facts=facts: self._state(self._at(facts, at)), moment)
        return []

    def is_confirmed_by(self, moments):
        """Tell whether the last of these sweeps confirms it."""
        facts = self.facts
        for moment in moments:
            swept = self._at(facts, moment)
            facts = _remembering(facts, swept)
        return self._is_confirmed(swept)

    def _at(self, facts, moment):
        tombstones = {
            vm_id: since if since is None else since + moment
            for vm_id, since in self.share["tombstones"].items()
            if vm_id == self.vm_id
        }
        kinds = {
            kind: dict(entry, resources=[_aged(one, moment) for one in entry["resources"]])
            for kind, entry in facts["kinds"].items()
        }
        return planner.plan(
            dict(facts, kinds=kinds, boottime_seconds=facts["boottime_seconds"] + moment),
            dict(self.share, tombstones=tombstones, generated_at=self.share["generated_at"] + moment),
            self.policy,
            TRAITS,
        )

    def _is_confirmed(self, plan):
        return plan["families"][self.vm_id]["verdict"] == planner.CONFIRMED

    def _state(self, plan):
        family = plan["families"][self.vm_id]
        strikes = {key: strike["strikes"] for key, strike in plan["ledger"]["strikes"].items()}
        return family["verdict"], family["strikes"], strikes


def _remembering(facts, plan):
    return dict(facts, ledger=dict(facts["ledger"], **plan["ledger"]))


def _next_change(state, begin):
    """Return the first second after ``begin`` in which ``state(second)`` is another one, None for not soon."""
    same, step = begin, 1
    first = state(begin)
    while state(begin + step) == first:
        same, step = begin + step, step * 2
        if step > HORIZON_SECONDS:
            return None
    other = begin + step
    while other - same > 1:
        middle = (same + other) // 2
        same, other = (middle, other) if state(middle) == first else (same, middle)
    return other


def _only(facts, vm_id):
    """Return the facts as if nothing else were on the host. It changes no verdict of the family, and saves time."""
    kinds = {
        kind: dict(entry, resources=[one for one in entry["resources"] if one["vm_id"] == vm_id])
        for kind, entry in facts["kinds"].items()
    }
    return dict(facts, kinds=kinds)


def _aged(one, seconds):
    return one if one["age_seconds"] is None else dict(one, age_seconds=one["age_seconds"] + seconds)
