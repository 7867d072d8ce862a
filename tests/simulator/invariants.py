# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What must hold after every sweep, by what is true and not by what the reaper thinks."""

from __future__ import annotations

from ansible_collections.microvm.reaper.plugins.plugin_utils import manifest, planner
from unit.builders import TRAITS

from .story import Violation
from .sweeper import share
from .world import LAG

# An orphan is gone after this many honest sweeps that could have taken it: two strikes, and two in which it had to wait
# for something else of the sweep (what holds it, what runs in it).
CHANCES = 4


class Before:
    """What is kept of the world before a sweep, to compare."""

    def __init__(self, world):
        self.ledgers = {host: host.ledger for host in world.hosts}


def check(world, before, sweep):
    """Raise Violation when anything is not as it must be."""
    nothing_of_a_live_vm_is_reaped(world, sweep)
    check_mode_changes_nothing(before, sweep)
    caps_abort(sweep)
    orphans_go(world, sweep)


def nothing_of_a_live_vm_is_reaped(world, sweep):
    """Neither a thing of a VM that lives there, nor one that it runs on."""
    for host, thing in sweep.reaped:
        if thing.vm.lives_on(host):
            raise Violation("the %s was reaped on %s, where the VM lives" % (thing, host))
        for user in thing.used_by:
            if user.vm.lives_on(host) and user in host.things.values():
                raise Violation("the %s was reaped on %s, while the %s runs on it" % (thing, host, user))


def check_mode_changes_nothing(before, sweep):
    """Check mode removes nothing, and the ledger is the same one."""
    if sweep.check_mode:
        if sweep.reaped:
            raise Violation("check mode reaped the %s" % sweep.reaped[0][1])
        for host in sweep.plans:
            if host in sweep.carried_out and host.ledger is not before.ledgers[host]:
                raise Violation("check mode wrote the ledger of %s" % host)


def caps_abort(sweep):
    """A plan that takes more VMs than the cap takes nothing, not the first few."""
    for host, plan in sweep.plans.items():
        going = {
            vm_id
            for vm_id, family in plan["families"].items()
            if any(member["verdict"] == "confirmed" for member in family["resources"])
        }
        reaped = {thing.vm.vm_id for where, thing in sweep.reaped if where is host}
        if reaped and len(going) > sweep.policy["max_per_host"]:
            raise Violation("%d VMs were to go on %s, more than the cap, and some went" % (len(going), host))


def a_repeated_sweep_is_a_no_op(world, sweeper, sweep):
    """The same again at the same moment, where the first was not cut short: nothing to reap, nothing to remember."""
    document = sweeper.control_plane.history[-1]
    for host in sweep.carried_out - sweep.killed:
        lists = _union(document, world.now)
        plans = []
        for _time in range(2):
            facts = host.facts(world.now, [])
            ids = {resource["vm_id"] for entry in facts["kinds"].values() for resource in entry["resources"]}
            ids.update(token["vm_id"] for token in host.ledger["intents"])
            ids.update(strike["vm_id"] for strike in host.ledger["strikes"].values())
            policy = dict(sweep.policy, host=host.name)
            plan = planner.plan(facts, share(lists, host.name, ids), policy, TRAITS)
            if plan["refused"] or plan["reap"]:
                break
            plans.append(plan)
            sweeper.apply(host, plan, sweep)
        if len(plans) == 2 and plans[1]["ledger_changed"]:
            raise Violation("a sweep of %s that was repeated at once had something new to remember" % host)


def orphans_go(world, sweep):
    """What nobody lives by is gone after a few sweeps that could have taken it."""
    for host in sweep.carried_out | {host for host, plan in sweep.plans.items() if not plan["refused"]}:
        if not _could_reap(host, sweep):
            continue
        protected = {vm.vm_id for vm in world.vms if vm.alive or "host" in vm.known(world.now)}
        for thing in [*host.things.values(), *host.half.values()]:
            if thing.vm.vm_id in protected or _has_to_wait(world, host, thing):
                thing.chances = 0
            elif world.now - thing.last_chance >= 60:
                thing.chances += 1
                thing.last_chance = world.now
            if thing.chances > CHANCES:
                raise Violation("the %s on %s is an orphan and was not reaped in %d sweeps" % (thing, host, CHANCES))


def _could_reap(host, sweep):
    return (
        sweep.mood == "honest"
        and not (sweep.check_mode or sweep.stopped or sweep.unavailable[host])
        and host in sweep.plans
        and host not in sweep.killed
    )


def _has_to_wait(world, host, thing):
    family = [one for one in host.things.values() if one.vm.vm_id == thing.vm.vm_id]
    known = [vm.known(world.now) for vm in world.vms if vm.vm_id == thing.vm.vm_id]
    return (
        any(world.now - one.born < 60 + LAG for one in family)
        or any(one.runaway for one in family)
        or any(world.now - record["at"] < 60 + LAG for record in known if "at" in record)
        or _held(host, thing)
    )


def _held(host, thing):
    return any(user in host.things.values() for user in thing.used_by)


def _union(document, now):
    return manifest.union([manifest.check(document, "cp", now=now, max_age=float("inf"))])
