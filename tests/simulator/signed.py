# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Sweeps of which many apply a signed plan, made in an earlier run: whatever happened in between must not matter."""

from __future__ import annotations

import random

from ansible_collections.microvm.reaper.plugins.plugin_utils import applying, planner, signed_plan

from .story import Violation
from .sweeper import Sweeper
from .terms import REALM


class SignedSweeper(Sweeper):
    """A sweeper of which a third of the batches only sign a plan, and a third apply an older one, maybe once more."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self._random = random.Random(self.world.terms.seed)
        self._plans, self._drawn = [], None
        self.applied = 0
        # Of each plan, what was begun by it: ``{plan: {(host, vm_id)}}``.
        self._begun = {}

    def _brake(self, run, batch):
        super()._brake(run, batch)
        if batch.stopped or not (batch.signed or batch.check_mode):
            return
        if batch.signed:
            self._count(batch)
            return
        plans = {batch.names[host]: plan for host, plan in batch.plans.items()}
        refused = {batch.names[host]: refusal for host, refusal in batch.refused.items()}
        how = {"plan_id": "p%d" % self.sweeps, "realm": REALM, "manifest": {}, "caps": batch.caps}
        if len(plans) == len(set(batch.names.values())):
            found = signed_plan.document(plans, refused, [], **how, now=self.world.wall(), max_age=3600)
            self._plans = [*self._plans[-2:], found]

    def _decide(self, batch, host, inputs):
        if batch.documents is not self._drawn:  # once for each batch
            self._drawn = batch.documents
            usable = [one for one in self._plans if one["made_at"] < self.world.wall()]
            what = self._random.random()
            batch.signed = self._random.choice(usable) if usable and what < 0.33 else None
            batch.check_mode = batch.check_mode or what > 0.67
        found = batch.signed
        if not found:
            return planner.plan(*inputs)
        share = found["hosts"].get(batch.names[host])
        within = {key: found[key] for key in ("plan", "made_at")}
        within.update(epoch=None, now=self.world.wall(), absent=None if share else "missing")
        return applying.plan(*inputs, dict(within, **(share or {"machine_id": None, "acts": [], "begins": []})))

    def _count(self, batch):
        """Only what is in the plan is done, each host takes its share once, and no more ever begins by a plan than its
        caps were judged for."""
        found = batch.signed
        begun = self._begun.setdefault(found["plan"], set())
        for host, plan in batch.plans.items():
            if host in batch.refused:
                continue
            share = found["hosts"].get(batch.names[host], {"acts": []})
            signed = {tuple(act[:5]) for act in share["acts"]}
            for token in plan["reap"]:
                if tuple(token[key] for key in ("kind", "name", "vm_id", "identity", "step")) not in signed:
                    raise Violation("signed", "%s takes what is not in the plan: %s" % (host, token))
            begun.update((batch.names[host], vm_id) for vm_id in plan["begins"])
            if plan["within"]["state"] == "applied":
                self.applied += bool(plan["reap"])
            elif plan["reap"] or plan["begins"]:
                raise Violation("signed", "%s was not to apply the plan, and takes %s" % (host, plan["reap"]))
            if plan["within"]["state"] == "applied" and (host.ledger.get("applied") or {}).get("plan") == found["plan"]:
                raise Violation("signed", "%s applies the plan %s again" % (host, found["plan"]))
        if len(begun) > found["budget"]["vms"]:
            raise Violation("signed", "%d VMs began to go by a plan for %d" % (len(begun), found["budget"]["vms"]))
