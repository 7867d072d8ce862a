# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What must hold after every batch, by what is true and not by what the reaper thinks."""

from __future__ import annotations

import datetime
import fnmatch
import re

from ansible_collections.microvm.reaper.plugins.plugin_utils import planner
from ansible_collections.microvm.reaper.plugins.plugin_utils.facts import vm_ids
from unit.builders import TRAITS

from .control_plane import HONEST
from .story import Violation
from .sweeper import CALM, Hands, listed, listed_anywhere, share
from .terms import CHANCES, LAG, REALM


def check(world, run, batch):
    """Raise Violation when anything is not as it must be."""
    if batch.reaped or batch.finished:
        touched = batch.reaped + batch.finished
        nothing_of_a_live_vm_is_reaped(batch)
        what_is_stopped_or_refused_reaps_nothing(batch, touched)
        no_proof_no_reap(batch, touched)
        what_is_listed_once_more_is_spared(batch, touched)
        pins_hold(world, batch, touched)
        strangers_are_left_alone(batch, touched)
        who_cannot_remember_must_not_reap(world, touched)
        a_latch_holds(world, batch, touched)
        strikes_and_hold_come_first(world, batch)
        what_runs_is_ended_by_policy(world, batch)
        host_caps_abort(batch, touched)
        fleet_caps_hold(run, batch, touched)
    check_mode_changes_nothing(batch)
    refusals_have_a_cause(world, batch)
    orphans_go(world, batch)


def nothing_of_a_live_vm_is_reaped(batch):
    """Neither a thing of a VM that lives there, nor one that it runs on."""
    for host, thing in batch.reaped:
        if thing.vm.lives_on(host):
            _violated("live", "the %s was reaped on %s, where the VM lives", thing, host)
        for user in thing.used_by:
            if user.vm.lives_on(host) and user in host.things.values():
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


def strikes_and_hold_come_first(world, batch):
    """What goes was seen dead before, as often as the policy asks, so far apart, and for so long."""
    terms = world.terms
    for host, thing in batch.reaped:
        now = batch.times[host]
        strikes = thing.strikes + (now - thing.last_strike >= terms.policy["strike_interval"])
        if strikes < terms.asked("strikes", thing.evidence):
            _violated("strikes", "the %s was reaped on %s after %d sweeps that could strike it", thing, host, strikes)
        if now - (now if thing.first_strike is None else thing.first_strike) < terms.asked("hold", thing.evidence):
            _violated("hold", "the %s was reaped on %s before its time", thing, host)


def what_runs_is_ended_by_policy(world, batch):
    """Something that runs is ended only on the evidence that the policy asks for."""
    running = world.terms.policy["running"]
    for host, thing, evidence in batch.stopped_things:
        if running == "never" or running == "tombstoned" != evidence:
            _violated("running", "the %s was ended on %s, %s; reap_running is %s", thing, host, evidence, running)


def host_caps_abort(batch, touched):
    """A plan that takes more VMs than the cap takes nothing, not the first few."""
    for host, plan in batch.plans.items():
        going = {
            vm_id
            for vm_id, family in plan["families"].items()
            if any(member["verdict"] == "confirmed" for member in family["resources"])
        }
        if len(going) > batch.policies[host]["max_per_host"] and any(where is host for where, _thing in touched):
            _violated("host cap", "%d VMs were to go on %s, more than the cap, and some went", len(going), host)


def fleet_caps_hold(run, batch, touched):
    """All batches of a run together never take more than the caps of the fleet."""
    run.reaped.update((host, thing.vm.vm_id) for host, thing in touched)
    going, live = len(run.reaped), batch.lists["count"]
    if going > batch.caps["max_per_fleet"]:
        _violated("fleet cap", "this run reaped %d VMs; max_per_fleet is %d", going, batch.caps["max_per_fleet"])
    percent = 100 * going / (live + going)
    if going > batch.caps["percent_floor"] and percent > batch.caps["max_percent"]:
        _violated("fleet cap", "this run reaped %d VMs, %d %%; max_percent is %d", going, percent, batch.caps[
            "max_percent"
        ])


def check_mode_changes_nothing(batch):
    """Check mode removes nothing, and the ledgers are the same."""
    if batch.check_mode:
        if batch.reaped or batch.finished:
            _violated("check mode", "check mode reaped the %s", (batch.reaped + batch.finished)[0][1])
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
    "host_cap": lambda batch, host, before: True,
}


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
    patience = terms.hold() + terms.policy["min_age"] + behind + LAG + terms.skew()
    alive = {vm.vm_id for vm in world.vms if vm.alive}
    for host, plan in batch.plans.items():
        if plan["refused"] or host in batch.refused:
            continue
        protected = alive | listed(batch, host) if host.things or host.half else ()
        could, now = _could_reap(world, batch, host), batch.times[host]
        for thing in [*host.things.values(), *host.half.values()]:
            if thing.vm.vm_id in protected or _has_to_wait(world, batch, host, thing):
                thing.chances, thing.dead_since = 0, None
            elif could and now - thing.last_chance >= terms.policy["strike_interval"]:
                thing.chances += 1
                thing.last_chance = now
                thing.dead_since = thing.dead_since or now
                if thing.chances > terms.strikes() + CHANCES and now - thing.dead_since > patience:
                    _violated(
                        "orphans", "the %s on %s is an orphan and was not reaped in %d sweeps", thing, host,
                        thing.chances,
                    )


def _could_reap(world, batch, host):
    plan = batch.plans[host]
    return (
        batch.mood == HONEST
        and batch.lists["proven"]
        and not batch.unavailable[host]
        and host not in batch.killed
        and host not in batch.failed
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
        or thing.identity in host.half and (thing.kind, thing.name) in host.things
        or vm_id in batch.spared.get(host, ())
    )


def _may_be_stopped(running, vm_id, lists):
    return lists["proven"] and (running == "confirmed" or running == "tombstoned" and vm_id in lists["tombstones"])


def _violated(name, text, *arguments):
    raise Violation(name, text % arguments)
