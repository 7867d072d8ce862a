# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What must hold after every batch, by what is true and not by what the reaper thinks."""

from __future__ import annotations

import datetime
import fnmatch
import re

from ansible_collections.microvm.reaper.plugins.plugin_utils import planner
from ansible_collections.microvm.reaper.plugins.plugin_utils.facts import vm_ids

from .control_plane import HONEST
from .story import Violation
from .sweeper import CALM, Hands, listed, listed_anywhere, share
from .terms import CHANCES, LAG, PLACES, REALM, TRAITS


def check(world, run, batch):
    """Raise Violation when anything is not as it must be; return how many things did not wait to the end."""
    touched, pressed = batch.touched(), 0
    if touched:
        nothing_of_a_live_vm_is_reaped(batch)
        what_is_stopped_or_refused_reaps_nothing(batch, touched)
        no_proof_no_reap(batch, touched)
        what_is_listed_once_more_is_spared(batch, touched)
        pins_hold(world, batch, touched)
        strangers_are_left_alone(batch, touched)
        who_cannot_remember_must_not_reap(world, touched)
        a_latch_holds(world, batch, touched)
        strikes_come_first(world, batch)
        pressed = the_hold_comes_first(world, batch) if world.terms.holds else 0
        what_runs_is_ended_by_policy(world, batch)
        what_is_listed_is_left_alone(batch, touched)
        host_caps_abort(batch, touched)
        fleet_caps_hold(run, batch)
    if world.terms.holds:
        nothing_aside_is_lost(batch)
    check_mode_changes_nothing(batch)
    refusals_have_a_cause(world, batch)
    orphans_go(world, batch)
    return pressed


def nothing_of_a_live_vm_is_reaped(batch):
    """Neither a thing of a VM that lives there, nor one that it runs on, is removed, ended, frozen or set aside.

    What is aside of a VM that began to live there again stays too; nobody misses what one left there that moved away.
    """
    revived = [
        (host, one) for host, one in batch.from_aside if batch.before[host].aside.get(one, 0) < one.vm.revived
    ]
    for host, thing in batch.reaped + batch.aside + revived:
        if thing.vm.lives_on(host):
            _violated("live", "the %s was reaped on %s, where the VM lives", thing, host)
        for user in thing.used_by:
            if (user.vm is thing.vm or user.vm.lives_on(host)) and user in host.things.values():
                _violated("live", "the %s was reaped on %s, while the %s runs on it", thing, host, user)


def what_is_stopped_or_refused_reaps_nothing(batch, touched):
    """A batch that is stopped, and a host that is refused, are left alone as a whole."""
    for host, thing in touched:
        if batch.stopped:
            _violated("stopped", "the %s was reaped on %s although the batch was stopped", thing, host)
        if host in batch.refused or batch.plans[host]["refused"]:
            _violated("refused", "the %s was reaped on %s although that host was refused", thing, host)


def no_proof_no_reap(batch, touched):
    """A list that does not prove itself complete may earn strikes, never a removal."""
    if not all(document["complete"] and document["proven"] for document in batch.documents):
        _violated("proof", "the %s was reaped on %s on a list without proof", touched[0][1], touched[0][0])


def what_is_listed_once_more_is_spared(batch, touched):
    """What a source lists on a host immediately before the acts is left alone there, whatever lives under the id."""
    for host, thing in touched:
        if thing.vm.vm_id in listed(batch, host, batch.once_more):
            _violated("spared", "the %s was reaped on %s, where the VM was listed once more", thing, host)


def pins_hold(world, batch, touched):
    """What a person wants left alone is left alone, until the day that the pin names is over."""
    clock = world.now + max(0.0, world.cp_skew, world.controller_skew)
    for host, thing in touched:
        for line in batch.before[host].pins:
            pattern, _space, rest = line.partition(" ")
            day = re.fullmatch(r"until (\d{4}-\d\d-\d\d)", rest)
            end = datetime.datetime.fromisoformat(day[1] + "T00:00:00Z").timestamp() + 86400 if day else clock + 1
            if clock < end and fnmatch.fnmatchcase(thing.vm.vm_id, pattern):
                _violated("pin", "the %s was reaped on %s although it is pinned: %s", thing, host, line)


def strangers_are_left_alone(batch, touched):
    """A host with another name, machine or realm than it is bound to is left alone until a person adopts it."""
    accepted = [host for host, plan in batch.plans.items() if not plan["refused"] and plan["ledger"]["machine_id"]]
    machines = [batch.before[host].machine for host in accepted]
    for host, thing in touched:
        before = batch.before[host]
        itself = (batch.names[host], before.machine)
        if machines.count(before.machine) > 1:
            _violated("clone", "the %s was reaped on %s, which has the machine id of another host", thing, host)
        if host not in batch.answers.adopted and (before.is_strange or before.bound not in (None, itself)):
            _violated("stranger", "the %s was reaped on %s, which is not what it was, and nobody adopted", thing, host)


def who_cannot_remember_must_not_reap(world, touched):
    """A host that cannot write its ledger removes nothing."""
    for host, thing in touched:
        if world.now < host.full_until:
            _violated("disk", "the %s was reaped on %s, which cannot write its ledger", thing, host)


def a_latch_holds(world, batch, touched):
    """A VM that was reaped and lives stops the batch; every host that was told stops each batch after it."""
    if batch.answers.policy.get("clear_latch"):
        return
    for host, before in batch.before.items():
        again = _came_back(world, batch, host)
        if again or before.is_latched:
            why = "%s was reaped on %s and lives again" % (again[0], host) if again else "%s is latched" % host
            _violated("latch", "the %s was reaped on %s, although %s", touched[0][1], touched[0][0], why)


def _came_back(world, batch, host):
    if not batch.before[host].gone or world.terms.ids_are_reused:
        return []
    return sorted(batch.before[host].gone & listed_anywhere(batch))


def what_is_listed_is_left_alone(batch, touched):
    """Whatever the list has on a host keeps all that has its id there."""
    for host in {host for host, _thing in touched}:
        live = listed(batch, host)
        for where, thing in touched:
            if where is host and thing.vm.vm_id in live:
                _violated("listed", "the %s was reaped on %s, where the VM is listed", thing, host)


def strikes_come_first(world, batch):
    """What goes was seen dead before, as often as the policy asks, and so far apart."""
    terms = world.terms
    for host, thing in batch.reaped + batch.aside:
        now = batch.times[host]
        strikes = thing.strikes + (now - thing.last_strike >= terms.policy["strike_interval"])
        if strikes < terms.asked("strikes", thing.evidence):
            _violated("strikes", "the %s was reaped on %s after %d sweeps that could strike it", thing, host, strikes)


def the_hold_comes_first(world, batch):
    """What cannot be taken back is done when it has been aside for as long as the policy asks. Where it is full, the
    older half does not wait. Return how many did not.
    """
    early = []
    ended = [(host, thing) for host, thing, _evidence in batch.stopped_things]
    for host, thing in batch.reaped + batch.from_aside + ended:
        hold = world.terms.hold(thing.kind, thing.vm.vm_id in batch.lists["tombstones"])
        since = batch.before[host].aside.get(thing)
        if hold and since is None:
            _violated("hold", "the %s was reaped on %s without having been aside", thing, host)
        if hold and batch.times[host] - since < hold:
            early.append((host, thing))
    for host, thing in early:
        before, place = batch.before[host], PLACES.get(thing.kind)
        if place is None or before.full[place] < world.terms.policy["pressure"]:
            _violated("hold", "the %s was reaped on %s before its time", thing, host)
        there = [since for one, since in before.aside.items() if one.kind == thing.kind]
        older = sum(since < before.aside[thing] for since in there)
        together = sum(where is host and one.kind == thing.kind for where, one in early)
        if max(together, older + 1) > (len(there) + 1) // 2:
            _violated("pressure", "the %s was reaped on %s before its time, and is not of the older half", thing, host)
    return len(early)


def nothing_aside_is_lost(batch):
    """Whatever is aside or frozen is known, as long as no ledger was lost."""
    for host in batch.names:
        out = [thing for thing in host.aside.values() if not thing.forgotten]
        out += [thing for thing in host.things.values() if thing.frozen and not thing.forgotten]
        ledger = host.ledger
        known = {(one["kind"], one["identity"]) for one in ledger["aside"] + ledger["intents"]} if out else ()
        for thing in out:
            if (thing.kind, thing.identity) not in known:
                _violated("lost", "the %s on %s was set aside, and nobody knows that any more", thing, host)


def what_runs_is_ended_by_policy(world, batch):
    """Something that runs is ended only on the evidence that the policy asks for."""
    running = world.terms.policy["running"]
    for host, thing, evidence in batch.stopped_things:
        if running == "never" or running == "tombstoned" != evidence:
            _violated("running", "the %s was ended on %s, %s; reap_running is %s", thing, host, evidence, running)


def host_caps_abort(batch, touched):
    """A plan that takes more VMs than the cap takes nothing, not the first few."""
    for host, plan in batch.plans.items():
        waited = {(one.kind, one.name) for one in batch.before[host].aside}
        going = {
            vm_id
            for vm_id, family in plan["families"].items()
            for member in family["resources"]
            if member["verdict"] == "confirmed" and (member["kind"], member["name"]) not in waited
        }
        if len(going) > batch.policies[host]["max_per_host"] and any(where is host for where, _thing in touched):
            _violated("host cap", "%d VMs were to go on %s, more than the cap, and some went", len(going), host)


def fleet_caps_hold(run, batch):
    """All batches of a run together never take more than the caps of the fleet. What was aside was counted then."""
    begun = [(host, one) for host, one in batch.reaped + batch.aside if one not in batch.before[host].aside]
    run.reaped.update((host, thing.vm.vm_id) for host, thing in begun + batch.finished)
    going, live = len(run.reaped), batch.lists["count"]
    if going > batch.caps["max_per_fleet"]:
        _violated("fleet cap", "this run reaped %d VMs; max_per_fleet is %d", going, batch.caps["max_per_fleet"])
    percent = 100 * going / (live + going) if going else 0
    if going > batch.caps["percent_floor"] and percent > batch.caps["max_percent"]:
        _violated("fleet cap", "this run reaped %d VMs, %d %%; max_percent is %d", going, percent, batch.caps[
            "max_percent"
        ])


def check_mode_changes_nothing(batch):
    """Check mode removes nothing, and the ledgers are the same."""
    if batch.check_mode:
        if batch.touched():
            _violated("check mode", "check mode reaped the %s", batch.touched()[0][1])
        for host in batch.plans:
            if host in batch.carried_out and host.ledger is not batch.before[host].ledger:
                _violated("check mode", "check mode wrote the ledger of %s", host)


CAUSES = {
    "other_realm": lambda batch, host, before: any(document["realm"] != REALM for document in batch.documents),
    "realm_changed": lambda batch, host, before: before.is_strange,
    "machine_id_changed": lambda batch, host, before: before.bound and before.bound[1] != before.machine,
    "host_renamed": lambda batch, host, before: before.bound and before.bound[0] != batch.names[host],
    "host_unknown": lambda batch, host, before: batch.names[host] not in batch.lists["hosts"],
    "blind": lambda batch, host, before: batch.lists["count"] == 0,
    "epoch_went_back": lambda batch, host, before: batch.mood in ("stale copy", "export"),
    "shrunk": lambda batch, host, before: _is_less(batch.lists, before.ledger["manifest"]),
    "host_cap": lambda batch, host, before: _are_too_many(before.candidates, batch.policies[host]),
}


def _are_too_many(candidates, policy):
    """Tell whether so many VMs of which nothing is aside yet could be too many at once."""
    return candidates > min(policy["max_per_host"], policy["percent_floor"])


def _is_less(lists, remembered):
    counts = remembered["counts"]
    lost = any(count < counts.get(source, 0) for source, count in lists["counts"].items())
    return lost or lists["count"] < remembered["count"]


def refusals_have_a_cause(world, batch):
    """A host is refused only for what is true of it: a refusal that nothing ends would be a leak for ever."""
    for host, plan in batch.plans.items():
        code = plan["refused"] and plan["refused"]["code"]
        before = batch.before.get(host)
        if not code:
            continue
        if code == "latched":
            is_right = before.is_latched or _came_back(world, batch, host)
        else:
            is_right = CAUSES[code](batch, host, before)
        if not is_right:
            _violated("refusal", "%s was refused without a cause: %s", host, plan["refused"]["message"])


def a_repeated_sweep_is_a_no_op(world, sweeper, batch):
    """The same again at the same moment, where the first was not cut short: nothing to reap, nothing to remember."""
    for host in world.hosts:
        if host not in batch.carried_out - batch.killed:
            continue
        batch.times[host] = world.now
        plans = []
        for _time in range(2):
            facts = host.facts(world.now, [])
            policy = batch.policies[host]
            plan = planner.plan(facts, share(batch.lists, batch.names[host], vm_ids(facts)), policy, TRAITS)
            if plan["refused"] or plan["reap"]:
                break
            plans.append(plan)
            if len(plans) == 1:
                sweeper.apply(host, plan, batch, Hands(host, batch, CALM, world))
        if len(plans) == 2 and plans[1]["ledger_changed"]:
            _violated("no-op", "a sweep of %s that was repeated at once had something new to remember", host)


def orphans_go(world, batch):
    """What nobody lives by is gone after a few sweeps that could have taken it."""
    if batch.stopped or batch.check_mode:
        return
    terms = world.terms
    behind = max(source.behind for source in terms.sources)
    patience = terms.longest_hold() + terms.policy["min_age"] + behind + LAG + terms.skew()
    alive = {vm.vm_id for vm in world.vms if vm.alive}
    for host, plan in batch.plans.items():
        if plan["refused"] or host in batch.refused:
            continue
        everything = host.everything()
        protected = alive | listed(batch, host) if everything else ()
        could, now = _could_reap(world, batch, host), batch.times[host]
        if terms.holds and host in batch.killed:
            could = False
            for thing in everything:
                thing.chances, thing.dead_since = 0, None  # some begin to wait anew
        for thing in everything:
            if thing.vm.vm_id in protected or _has_to_wait(world, batch, host, thing):
                thing.chances, thing.dead_since = 0, None
            elif could and now - thing.last_chance >= terms.policy["strike_interval"]:
                thing.chances += 1
                thing.last_chance = now
                thing.dead_since = thing.dead_since or now
                is_aside = thing.serial in host.aside and not thing.forgotten
                strikes = 1 if is_aside else terms.strikes() + 2 * terms.holds
                if thing.chances > strikes + CHANCES and now - thing.dead_since > patience:
                    _violated(
                        "orphans", "the %s on %s is an orphan and was not reaped in %d sweeps", thing, host,
                        thing.chances,
                    )


def _could_reap(world, batch, host):
    plan = batch.plans[host]
    return (
        batch.mood == HONEST
        and batch.signed is None
        and batch.lists["proven"]
        and not batch.unavailable[host]
        and host not in batch.killed
        and host not in batch.failed
        and not batch.busy[host]
        and (host in batch.carried_out or not (plan["reap"] or plan["ledger_changed"]))
    )


def _has_to_wait(world, batch, host, thing):
    vm_id, policy, lists = thing.vm.vm_id, world.terms.policy, batch.lists
    slack = LAG + world.terms.skew()
    since = lists["tombstones"].get(vm_id)
    family = [one for one in host.things.values() if one.vm.vm_id == vm_id]
    return (
        any(batch.times[host] - one.born < policy["min_age"] + lists["age"] + slack for one in family)
        or since is not None and since < policy["min_age"] + slack
        or any(one.runaway for one in family) and not _may_be_stopped(policy["running"], vm_id, lists)
        or thing.kind == "zombie" and policy["zombies"] == "report"
        or any(fnmatch.fnmatchcase(vm_id, line.split()[0]) for line in batch.before[host].pins)
        or any(user in host.things.values() for user in thing.used_by)
        or (thing.serial in host.half or thing.serial in host.aside) and _waits_for_others(world, host, thing)
        or vm_id in batch.spared.get(host, ())
    )


def _waits_for_others(world, host, thing):
    """Tell whether what is out of sight waits for what has its name, or for others of its VM that are not due yet."""
    out_of_sight = [*host.half.values(), *host.aside.values()]
    return (
        (thing.kind, thing.name) in host.things
        or any(one is not thing and (one.kind, one.name) == (thing.kind, thing.name) for one in out_of_sight)
        or any(
            one.vm.vm_id == thing.vm.vm_id and one.chances <= world.terms.strikes() + CHANCES
            for one in host.things.values()
        )
    )


def _may_be_stopped(running, vm_id, lists):
    return lists["proven"] and (running == "confirmed" or running == "tombstoned" and vm_id in lists["tombstones"])


def _violated(name, text, *arguments):
    raise Violation(name, text % arguments)
