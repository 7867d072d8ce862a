# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A run of sweeps: the real planner, brake, manifest and acts, on facts of the model and with hands of the model."""

from __future__ import annotations

import contextlib

from ansible_collections.microvm.reaper.plugins.module_utils import acts
from ansible_collections.microvm.reaper.plugins.module_utils import resource as r
from ansible_collections.microvm.reaper.plugins.module_utils.ledger import LedgerError
from ansible_collections.microvm.reaper.plugins.plugin_utils import brake, manifest, planner
from ansible_collections.microvm.reaper.plugins.plugin_utils.facts import vm_ids

from . import actions, person
from .control_plane import HONEST
from .hands import Hands, Killed
from .terms import BEYOND, MAX_AGE, REALM, TRAITS

CAPS_LIFTED = {"max_per_fleet": BEYOND, "max_percent": 100, "percent_floor": 2}
UNDETECTABLE = ("glitch", "bare")
# Lies that a host sees through by what it remembers.
DETECTABLE = ("shrunk", "stale copy")


class Complete(dict):
    """A policy that complete_policy() has seen: it is the same for all hosts of a batch but for their names."""


@contextlib.contextmanager
def policies_are_completed_once():
    """Have the planner complete a policy once for a batch and not for each host of it."""
    real = planner.complete_policy

    def once(policy):
        return policy if isinstance(policy, Complete) else Complete(real(policy))

    planner.complete_policy = once
    try:
        yield
    finally:
        planner.complete_policy = real


class Batch:
    """What one batch of a run did, for the invariants to look at. ``names`` of its hosts and ``keep`` are the
    inventory's, as the run read them when it began."""

    def __init__(self, names, keep, check_mode, answers, caps):
        self.names, self.keep, self.check_mode, self.answers, self.caps = names, keep, check_mode, answers, caps
        self.mood, self.documents, self.lists, self.fetched = None, [], None, 0.0
        self.unavailable = {}
        # What the sources said when they were asked once more, and ``{host: {vm_id: why}}`` of what was spared then.
        self.once_more, self.spared = [], {}
        self.plans, self.policies = {}, {}
        # The signed plan of which this run applies a share, see signed.py.
        self.signed = None
        self.stopped, self.refused = None, {}
        # ``finished`` was half removed, ``aside`` was set aside now, ``from_aside`` earlier, and was removed now.
        self.reaped, self.finished, self.stopped_things = [], [], []
        self.aside, self.from_aside, self.restored = [], [], []
        self.times = {}
        self.carried_out, self.killed, self.failed = set(), set(), set()
        self.before, self.busy = {}, {}

    def touched(self):
        """Return ``[(host, thing)]`` of all that something was done to."""
        return self.reaped + self.finished + self.aside + self.from_aside


class Before:
    """What was true of a host when its facts were gathered."""

    def __init__(self, host, keep):
        self.ledger, self.bound, self.is_latched, self.gone = host.ledger, host.bound, host.is_latched, host.gone
        self.machine, self.pins = host.machine, [*keep, *host.pins]
        self.is_strange = bool(host.other_realms) and host.bound is None
        # Since when things wait, and how full it was where they lie.
        there = [*host.things.values(), *host.aside.values()]
        self.aside = {one: one.aside_since for one in there if one.aside_since is not None}
        self.full = dict(host.full)
        # Of how many VMs something could begin to go.
        begun = {token["vm_id"] for token in host.ledger["intents"] if "since" not in token}
        self.candidates = len(begun | {one.vm.vm_id for one in host.everything() if one.aside_since is None})


class Run:
    """The batches of one run, and how many VMs it was to reap and reaped."""

    def __init__(self):
        self.batches, self.before, self.reaped = [], brake.NOTHING_BEFORE, set()


class Weather:
    """What troubles a host in one batch, all drawn at once so that one trouble changes no other."""

    def __init__(self, trouble=1.0, is_killed=False, which=0.0):
        place, kinds = int(which * 60), list(TRAITS)
        self.is_silent = trouble < 0.02
        self.unavailable = []
        if 0.02 < trouble < 0.1:
            self.unavailable = sorted({kinds[place % 6], kinds[max(0, place // 10 - 2)]})
        self.busy = kinds[place // 10] if 0.1 < trouble < 0.13 else None
        # Whether, and at which act, the reaper is killed.
        self.killed_at = int(which * 4) if is_killed else None
        self.is_half_done = which * 4 % 1 < 0.8


CALM = Weather()


class Sweeper:
    """Runs sweeps over the hosts of a world. ``watch(run, batch)`` is called after each batch."""

    def __init__(self, world, control_plane, watch):
        self.world, self.control_plane, self.watch = world, control_plane, watch
        self.sweeps = 0
        self.is_unreliable = any(source.fails for source in world.terms.sources)

    def run(self, step, has):
        """Sweep all hosts, batch after batch; ``has(slot)`` tells what is not left out of this step."""
        world, run = self.world, Run()
        world.chance(step, 5)
        check_mode, long = world.random.random() < 0.08, world.random.random() < 0.03
        answers = person.Answers()
        if world.refusals and has(7):
            world.chance(step, 7)
            answers = person.answer(world, world.refusals)
        world.refusals, keep = {}, list(world.keep)
        world.is_swept = True
        for number, names in enumerate(_batches(world)):
            caps = CAPS_LIFTED if answers.lifted else world.terms.caps
            batch = Batch(names, keep, check_mode, answers, caps)
            run.batches.append(batch)
            self._batch(run, batch, step, 10 + 10 * number, has, long and has(8))
            self.watch(run, batch)
            if _ends(batch, world.terms.waves):
                break
        world.is_swept = False
        return run

    def _batch(self, run, batch, step, slot, has, is_long):
        """Gather, fetch, plan, brake, act; things happen in between. ``slot`` is the first of this batch."""
        world = self.world
        world.chance(step, slot)
        draw = world.random.random
        pauses = [3.0 * draw(), (900.0 if is_long else 3.0) * draw()]
        surprises = [draw() < 0.3 and has(slot + 1), draw() < 0.3 and has(slot + 4)]
        is_another = draw() < 0.04 and has(slot + 3)
        drawn = [(host, draw(), draw() < world.terms.killed, draw()) for host in batch.names]
        weather = {host: Weather(*draws) if has(6) else CALM for host, *draws in drawn}
        world.story.tell(
            "%s of %s", "check mode" if batch.check_mode else "sweep", ", ".join(batch.names.values())
        )
        facts = {}
        for host in batch.names:
            if world.now < host.away_until or weather[host].is_silent:
                world.story.tell("%s: no answer", host)
                batch.failed.add(host)
                continue
            kinds = batch.unavailable[host] = weather[host].unavailable
            if kinds:
                world.story.tell("%s: cannot read %s", host, ", ".join(kinds))
            batch.busy[host] = weather[host].busy
            facts[host] = self._facts(host, kinds)
            batch.times[host] = world.now
            batch.before[host] = Before(host, batch.keep)
        if not facts:
            return
        self.sweeps += len(facts)
        self._meanwhile(pauses[0], surprises[0], step, slot + 1)
        if world.mood != HONEST or self.is_unreliable:
            world.chance(step, slot + 2)
        self._plan(facts, batch)
        if not batch.stopped:
            self._brake(run, batch)
        self._tell(batch)
        if batch.stopped:
            world.refusals[None] = batch.stopped["code"]
            batch.failed.update(batch.names)
            return
        if is_another:
            world.chance(step, slot + 3)
            self._other_controller(batch)
        self._meanwhile(pauses[1], surprises[1], step, slot + 4)
        if has(slot + 5):
            self._recheck(batch, step, slot + 5)
        for host, plan in batch.plans.items():
            if world.now < host.away_until:
                batch.failed.add(host)
            else:
                self.carry_out(host, plan, batch, weather[host])

    def _facts(self, host, kinds):
        return host.facts(self.world.now, kinds)

    def _plan(self, facts, batch):
        world = self.world
        batch.fetched = world.now
        answers, batch.mood = self.control_plane.answers(batch.answers.needs_truth())
        try:
            batch.lists, batch.documents = fetch(answers, world.wall())
        except manifest.ManifestError as err:
            batch.stopped = {"code": err.code, "message": str(err)}
            return
        said = planner.complete_policy(dict(world.terms.policy, host="*", keep=batch.keep, **batch.answers.policy))
        for host, one in facts.items():
            policy = Complete(said, host=batch.names[host], adopt_host=host in batch.answers.adopted)
            batch.policies[host] = policy
            mine = share(batch.lists, batch.names[host], vm_ids(one))
            batch.plans[host] = self._decide(batch, host, (one, mine, policy, TRAITS))

    def _decide(self, _batch, _host, inputs):
        return planner.plan(*inputs)

    def _brake(self, run, batch):
        """What the action brake does: what must be known of earlier batches is carried on."""
        plans = {batch.names[host]: plan for host, plan in batch.plans.items()}
        batch.stopped, refused = brake.brake(plans, batch.caps, run.before)
        run.before = brake.so_far(run.before, plans, refused)
        batch.refused = {host: refused[name] for host, name in batch.names.items() if name in refused}
        for host, refusal in batch.refused.items():
            self.world.refusals[host] = refusal["code"]
            batch.failed.add(host)

    def _recheck(self, batch, step, slot):
        """What the action recheck does: the sources are asked once more about what is about to go."""
        going = {host: plan for host, plan in batch.plans.items() if plan["reap"] and host not in batch.refused}
        if not going:
            return
        self.world.chance(step, slot)
        answers, _mood = self.control_plane.answers(batch.answers.needs_truth())
        doomed = {token["vm_id"] for plan in going.values() for token in plan["reap"]}
        try:
            listed_now, batch.once_more = ask_once_more(answers, doomed, batch.lists, self.world.wall())
            batch.spared = brake.live_again(going, listed_now, batch.lists["hosts"] is None)
        except manifest.ManifestError as err:
            self.world.story.tell("asked once more, a source does not answer (%s)", err.code)
            batch.spared = {host: dict.fromkeys(doomed, err.code) for host in going}
        for host, spare in batch.spared.items():
            self.world.story.tell("%s: spared: %s", host, ", ".join(sorted(spare)))
            batch.plans[host], _outcomes = acts.spared(batch.plans[host], spare)

    def carry_out(self, host, plan, batch, weather):
        """What the module reap does with a plan: remember a latch, only look in check mode, else act."""
        refusal = batch.refused.get(host)
        hands = Hands(host, batch, weather, self.world)
        if refusal:
            if refusal["code"] == brake.LATCHED and not batch.check_mode:
                self._latch(host, refusal)
        elif batch.check_mode:
            acts.foresee(plan["reap"], hands)
        elif plan["reap"] or plan["ledger_changed"]:
            self.apply(host, plan, batch, hands)
        elif batch.mood == HONEST:
            host.heard_the_truth, host.learned_from_a_lie = batch.fetched, False

    def apply(self, host, plan, batch, hands):
        """Have acts.apply() carry out the plan, and keep account of what the host has to know by then."""
        before, self.world.acting = host.ledger, host
        try:
            acts.apply(plan, hands, host, REALM, sweep="s%d" % batch.fetched)
        except Killed:
            batch.killed.add(host)
            self._intend(host, plan)
        except LedgerError as err:
            batch.failed.add(host)
            self.world.story.tell("%s: %s", host, err)
        if host.ledger is before:
            return
        batch.carried_out.add(host)
        host.bound = (batch.names[host], plan["ledger"]["machine_id"])
        if batch.answers.policy.get("clear_latch"):
            host.is_latched = False
        live = listed(batch, host)
        self._strike(host, live, batch.times[host])
        if self.world.terms.holds:
            _wait(host, batch.times[host])
        host.gone = host.gone - listed_anywhere(batch)
        # Nobody knows how far a reaper came that was killed: it counts as if all had been removed.
        killed = plan["reap"] if host in batch.killed else ()
        host.gone.update(hands.gone, (token["vm_id"] for token in killed if token["evidence"] != r.ELSEWHERE))
        host.believed = batch.mood if batch.mood in DETECTABLE else None
        if batch.mood in UNDETECTABLE:
            host.learned_from_a_lie = True
        elif batch.mood == HONEST:
            host.heard_the_truth, host.learned_from_a_lie = batch.fetched, False

    def _intend(self, host, plan):
        """What a lost ledger had aside counts again from the intents on, which are of what is aside."""
        for token in plan["reap"]:
            thing = host.find(token["kind"], token["name"])
            if thing and thing.serial in host.aside and thing.aside_since is None:
                thing.aside_since, thing.forgotten = self.world.now, False

    def _strike(self, host, live, when):
        """Count the sweep for what it could strike."""
        interval = self.world.terms.policy["strike_interval"]
        for thing in host.things.values():
            if thing.vm.vm_id in live:
                thing.strikes, thing.first_strike, thing.last_strike = 0, None, -1e9
            elif thing.born <= when and when - thing.last_strike >= interval:
                thing.strikes, thing.last_strike = thing.strikes + 1, when
                thing.first_strike = when if thing.first_strike is None else thing.first_strike

    def _latch(self, host, refusal):
        try:
            acts.latch(refusal, host, REALM)
            host.is_latched = True
        except LedgerError:
            pass

    def _meanwhile(self, seconds, is_surprise, step, slot):
        self.world.wait(seconds)
        if is_surprise:
            self.world.chance(step, slot)
            actions.happen(self.world)

    def _other_controller(self, batch):
        """Another job sweeps one of the hosts between this one's facts and acts, with the same right to do so."""
        host = self.world.pick(batch.names)
        other = Batch({host: batch.names[host]}, batch.keep, False, person.Answers(), self.world.terms.caps)
        other.times[host] = self.world.now
        self._plan({host: self._facts(host, [])}, other)
        plan = other.plans.get(host)
        if plan and not plan["refused"] and not plan["reap"] and plan["ledger_changed"]:
            self.world.story.tell("another controller sweeps %s", host)
            self.apply(host, plan, other, Hands(host, other, CALM, self.world))

    def _tell(self, batch):
        """Tell what was decided."""
        story = self.world.story
        if not story.is_wanted:
            return
        if batch.stopped:
            story.tell("the batch is stopped (%s): %s", batch.stopped["code"], batch.stopped["message"])
            return
        for host, plan in batch.plans.items():
            refusal = batch.refused.get(host)
            story.tell("%s: %s", host, "refused (%(code)s): %(message)s" % refusal if refusal else _decided(plan))


def _wait(host, when):
    """Note since when things in their place wait, of which the ledger says so now."""
    ledger = host.ledger
    waiting = {(one["kind"], one["identity"]) for one in ledger["aside"]}
    begun = {(one["kind"], one["identity"]) for one in ledger["intents"]}
    for thing in host.things.values():
        key = thing.kind, thing.identity
        if key in waiting:
            thing.aside_since = when if thing.aside_since is None else thing.aside_since
        elif key not in begun:
            thing.aside_since = None


def fetch(answers, wall):
    """What sources.fetch() does with the answers of the sources; also return the documents that were accepted."""
    checked, accepted = [], []
    for source, document in answers:
        try:
            if document is None:
                raise manifest.ManifestError("unreachable", "%s: no answer" % source.name)
            checked.append(manifest.check(document, source.name, now=wall, max_age=MAX_AGE))
            accepted.append(document)
        except manifest.ManifestError:
            if source.required:
                raise
    if not checked:
        raise manifest.ManifestError("no_source", "none of the live sources answered")
    return manifest.union(checked), accepted


def ask_once_more(answers, vm_ids, lists, wall):
    """What sources.still_listed() does with the answers of the sources; also return what they said."""
    found, accepted = {}, []
    for source, document in answers:
        if source.name not in lists["counts"]:
            continue
        if document is None:
            raise manifest.ManifestError("unreachable", "%s: no answer" % source.name)
        listed_now = manifest.live_among(vm_ids, document, source.name, lists, now=wall, max_age=MAX_AGE)
        accepted.append(document)
        for vm_id, hosts in listed_now.items():
            manifest.add_place(found, vm_id, hosts)
    return found, accepted


def share(lists, host, ids):
    """What manifest.handle() and manifest.share() do together, without a file (a test compares them)."""
    live, elsewhere = set(), {}
    for vm_id in ids & lists["vms"].keys():
        where = lists["vms"][vm_id]
        if not where or host in where or lists["hosts"] is None:
            live.add(vm_id)
        else:
            elsewhere[vm_id] = where
    return dict(
        {key: value for key, value in lists.items() if key not in ("vms", "hosts")},
        live=sorted(live),
        elsewhere={vm_id: elsewhere[vm_id] for vm_id in sorted(elsewhere)},
        tombstones={vm_id: since for vm_id, since in lists["tombstones"].items() if vm_id in ids},
        host_known=lists["hosts"] is None or host in lists["hosts"],
        budget=manifest.budget_of(lists["budget"], host),
    )


def listed_anywhere(batch):
    """Return the ids that the accepted documents list on any host."""
    return {vm["vm_id"] for document in batch.documents for vm in document["vms"]}


def listed(batch, host, documents=None):
    """Return the ids that the accepted documents list on a host, read as a person would."""
    name, documents = batch.names[host], batch.documents if documents is None else documents
    everywhere = any("hosts" not in document for document in documents)
    return {
        vm["vm_id"]
        for document in documents
        for vm in document["vms"]
        if everywhere or name == vm["host"] or name in vm["also_on"]
    }


def _batches(world):
    """Return the batches of a run, each as ``{host: name}``; the inventory is read once."""
    sizes, names, batches = list(world.terms.batches), [(host, host.called) for host in world.hosts], []
    while names:
        size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
        batches.append(dict(names[:size]))
        names = names[size:]
    return batches


def _ends(batch, waves):
    """What Ansible does: a wave that is not clean is the last, and so is a batch in which every host failed."""
    return bool(batch.failed) if waves else len(batch.failed) == len(batch.names)


def _decided(plan):
    """Return the verdicts of a plan, as a sentence."""
    said = []
    for vm_id, family in plan["families"].items():
        members = {(one["verdict"], one["reasons"][0]["text"] if one["reasons"] else "") for one in family["resources"]}
        besides = "; ".join("%s: %s" % one for one in sorted(members) if one[1])
        reason = family["reasons"][-1]["text"] if family["reasons"] else ""
        strikes = ", %d strikes" % family["strikes"] if family["strikes"] else ""
        said.append("%s %s%s (%s%s)" % (vm_id, family["verdict"], strikes, reason, besides and "; " + besides))
    if plan["vms"]["live"]:
        said.append("%d live" % plan["vms"]["live"])
    going = sorted({token["vm_id"] for token in plan["reap"]})
    return "%s%s" % (", ".join(said) or "nothing", "; to be reaped: %s" % ", ".join(going) if going else "")
