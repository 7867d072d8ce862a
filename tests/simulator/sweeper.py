# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A sweep: the real planner, brake, manifest and ledger code, on facts of the model and with hands of the model."""

from __future__ import annotations

import json

from ansible_collections.microvm.reaper.plugins.module_utils import acts
from ansible_collections.microvm.reaper.plugins.module_utils import resource as r
from ansible_collections.microvm.reaper.plugins.plugin_utils import brake, manifest, planner
from unit.builders import TRAITS

from . import actions
from .control_plane import MAX_AGE
from .world import REALM

CAPS = {"max_per_fleet": 1000, "max_percent": 100, "percent_floor": 4}
POLICY = {"realm": REALM, "reused_ids": [".*"], "max_per_host": 4, "max_percent_per_host": 80, "percent_floor": 4}
# A person who has looked, and lets one sweep through.
LIFTED = dict(POLICY, max_per_host=1000, max_percent_per_host=100, max_shrink_percent=100)


class Sweep:
    """What one sweep did, for the invariants to look at."""

    def __init__(self, check_mode, policy):
        self.check_mode, self.policy = check_mode, policy
        self.mood, self.fetched = None, 0.0
        self.unavailable = {}
        self.plans = {}
        self.stopped = None
        self.reaped = []
        self.carried_out = set()
        self.killed = set()


class Sweeper:
    """Runs sweeps over all hosts of a world."""

    def __init__(self, world, control_plane):
        self.world, self.control_plane = world, control_plane
        self.lift = False

    def sweep(self):
        """Gather, fetch, plan, brake, act; things happen in between."""
        world = self.world
        policy, self.lift = (LIFTED if self.lift else POLICY), False
        sweep = Sweep(world.random.random() < 0.1, policy)
        facts = {host: self._gather(host, sweep) for host in world.hosts}
        self._meanwhile()
        self._plan(facts, sweep)
        if sweep.stopped:
            self.lift = sweep.stopped["code"] in ("host_cap", "shrunk")
            world.story.tell("the sweep is stopped: %s", sweep.stopped["message"])
            return sweep
        if world.random.random() < 0.05:
            self._other_controller()
        self._meanwhile()
        for host, plan in sweep.plans.items():
            if not plan["refused"]:
                self.carry_out(host, plan, sweep)
        return sweep

    def carry_out(self, host, plan, sweep):
        """What the module reap does with a plan: only look in check mode, else act."""
        if not sweep.check_mode:
            if plan["reap"] or plan["ledger_changed"]:
                self.apply(host, plan, sweep)
            elif sweep.mood == "honest":
                host.heard_the_truth = sweep.fetched

    def apply(self, host, plan, sweep):
        """What acts.apply() does, on the model's host."""
        if host.ledger["generation"] != plan["generation"]:
            self.world.story.tell("%s: busy, another controller was here", host)
            return
        tokens, kept = plan["reap"], plan["ledger"]["intents"]
        ledger = save(host, dict(host.ledger, **dict(plan["ledger"], intents=kept + tokens)))
        sweep.carried_out.add(host)
        host.learned_from_a_glitch = sweep.mood == "glitch"
        if sweep.mood == "honest":
            host.heard_the_truth = sweep.fetched
        outcomes = []
        for token in tokens:
            if self.world.random.random() < (0.15 if token["kind"] == "dm_thin" else 0.02):
                self._killed(host, token, sweep)
                return
            outcomes.append(self._act(host, token, sweep))
        if tokens:
            save(host, acts.settled(ledger, kept, tokens, outcomes))

    def _gather(self, host, sweep):
        kinds = [kind for kind in TRAITS if self.world.random.random() < 0.03]
        sweep.unavailable[host] = kinds
        return host.facts(self.world.now, kinds)

    def _plan(self, facts, sweep):
        world = self.world
        sweep.fetched = world.now
        document, sweep.mood = self.control_plane.document(sweep.policy is LIFTED)
        try:
            checked = manifest.check(document, "cp", now=world.now, max_age=MAX_AGE)
        except manifest.ManifestError as err:
            sweep.stopped = {"code": err.code, "message": str(err)}
            return
        lists = manifest.union([checked])
        for host, one in facts.items():
            ids = {resource["vm_id"] for entry in one["kinds"].values() for resource in entry["resources"]}
            ids.update(strike["vm_id"] for strike in one["ledger"]["strikes"].values())
            ids.update(token["vm_id"] for token in one["ledger"]["intents"])
            policy = dict(sweep.policy, host=host.name)
            sweep.plans[host] = planner.plan(one, share(lists, host.name, ids), policy, TRAITS)
        sweep.stopped, refused = brake.brake({host.name: plan for host, plan in sweep.plans.items()}, CAPS)
        for host, plan in sweep.plans.items():
            plan["refused"] = plan["refused"] or refused.get(host.name)

    def _meanwhile(self):
        self.world.now += self.world.random.uniform(0.0, 3.0)
        if self.world.random.random() < 0.3:
            actions.happen(self.world, 1)

    def _other_controller(self):
        """Another job sweeps one of the hosts between this one's facts and acts, with the same right to do so."""
        other = Sweeper(self.world, self.control_plane)
        host = self.world.random.choice(self.world.hosts)
        one = Sweep(False, POLICY)
        facts = {host: host.facts(self.world.now, [])}
        other._plan(facts, one)
        plan = one.plans.get(host)
        if not one.stopped and plan and not plan["refused"] and not plan["reap"] and plan["ledger_changed"]:
            self.world.story.tell("another controller sweeps %s", host)
            other.apply(host, plan, one)

    def _killed(self, host, token, sweep):
        """The reaper is killed in the middle of an act: before it, or half way through."""
        thing = host.things.get((token["kind"], token["name"]))
        half = thing and thing.kind == "dm_thin" and thing.identity == token["identity"] and not host.in_use(thing)
        if half and self.world.random.random() < 0.8:
            host.drop(thing)
            host.half[thing.identity] = thing
            sweep.reaped.append((host, thing))
        sweep.killed.add(host)
        self.world.story.tell("%s: the reaper is killed at %s %s", host, token["kind"], token["name"])

    def _act(self, host, token, sweep):
        if token.get("resume"):
            thing = host.half.pop(token["identity"], None)
            if thing:
                self.world.story.tell("%s: %s is finished", host, thing)
                return r.outcome(token, r.REAPED)
            return r.outcome(token, r.ALREADY_GONE)
        thing = host.things.get((token["kind"], token["name"]))
        if thing is None:
            return r.outcome(token, r.ALREADY_GONE)
        if thing.identity != token["identity"]:
            return r.outcome(token, r.IDENTITY_CHANGED)
        if token["stop"]:
            thing.runaway = False
        if host.in_use(thing) and not token["stop"]:
            return r.outcome(token, r.DEFERRED)
        host.drop(thing)
        sweep.reaped.append((host, thing))
        self.world.story.tell("%s: %s is reaped", host, thing)
        return r.outcome(token, r.REAPED)


def save(host, ledger):
    """What ledger.save() does, but for the file: the generation goes up, and it is JSON in between."""
    host.ledger = json.loads(json.dumps(dict(ledger, generation=ledger["generation"] + 1)))
    return host.ledger


def share(lists, host, ids):
    """What manifest.handle() and manifest.share() do together, without a file (a test compares them)."""
    live, elsewhere = set(), {}
    for vm_id, where in lists["vms"]:
        if vm_id not in ids:
            continue
        if not where or host in where or lists["hosts"] is None:
            live.add(vm_id)
        else:
            elsewhere.setdefault(vm_id, set()).update(where)
    kept = ("realm", "source", "epoch", "epochs", "generated_at", "age", "count", "proven")
    return dict(
        {key: lists[key] for key in kept},
        live=sorted(live),
        elsewhere={vm_id: sorted(elsewhere[vm_id]) for vm_id in sorted(elsewhere) if vm_id not in live},
        tombstones={vm_id: since for vm_id, since in lists["tombstones"].items() if vm_id in ids},
        host_known=lists["hosts"] is None or host in lists["hosts"],
    )
