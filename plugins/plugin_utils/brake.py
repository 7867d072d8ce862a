# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What stops a whole batch of hosts before the first delete on any of them. Pure."""

from __future__ import annotations

from .manifest import budget_of
from .words import enumerate_hosts

# A host refused for one of these says something about the live source or about the sweep, not about itself.
BATCH_CODES = ("host_cap", "over_budget", "blind", "shrunk", "epoch_went_back", "other_realm")
LATCHED = "latched"
DEFAULT_CAPS = {"max_per_fleet": 500, "max_percent": 30, "percent_floor": 10}
# The same as options of the steps that take them.
CAPS = {
    key: {"type": "float" if key == "max_percent" else "int", "default": most} for key, most in DEFAULT_CAPS.items()
}
# BEFORE: of the batches of a run before this one, how many VMs they were to reap, the refusal of a latch, and which
# host has which machine id.
NOTHING_BEFORE = {"doomed": 0, "latched": None, "machines": {}}


def brake(plans, caps=None, before=None):
    """Return ``(abort, refused)`` for ``{host: plan}`` of one batch.

    ``abort`` is None or the ``{code, message}`` that stops all hosts of the batch; ``refused`` maps single hosts that
    are to be left alone to theirs. ``caps`` are those of DEFAULT_CAPS or others, ``before`` is what so_far() returned
    for the batch before. A latch that one host remembers holds for all of them, and for all batches after them.
    """
    before = before or NOTHING_BEFORE
    refused = _clones(plans, before["machines"])
    # What a plan was refused for may stop the batch, which a clone does not.
    refused.update({host: plan["refused"] for host, plan in plans.items() if plan["refused"]})
    latched = _latched(refused) or before["latched"]
    if latched:
        return None, dict.fromkeys(plans, latched)
    aborting = [(host, one) for host, one in sorted(refused.items()) if one["code"] in BATCH_CODES]
    if not aborting:
        return _over_cap(plans, refused, caps or DEFAULT_CAPS, before["doomed"]), refused
    host, first = aborting[0]
    others = [other for other, _one in aborting[1:]]
    also = " (refused as well: %s)" % enumerate_hosts(others) if others else ""
    return {"code": first["code"], "message": "%s: %s%s" % (host, first["message"], also)}, refused


def so_far(before, plans, refused):
    """Return BEFORE for the next batch, of that of this batch, its plans and which of them brake() refused."""
    machines = {plan["ledger"]["machine_id"]: host for host, plan in plans.items() if plan["ledger"]["machine_id"]}
    return {
        "doomed": before["doomed"] + doomed(plans),
        "latched": before["latched"] or _latched(refused),
        "machines": dict(machines, **before["machines"]),
    }


def live_again(plans, listed, any_host_protects):
    """Return ``{host: {vm_id: why}}`` of the VMs in ``{host: plan}`` that were to be reaped and are listed after all.

    ``listed`` is ``{vm_id: [host]}`` as still_listed() of sources returns it, by the names that the plans call their
    hosts.
    """
    found = {}
    for host, plan in plans.items():
        for vm_id in sorted({token["vm_id"] for token in plan["reap"]} & set(listed)):
            if any_host_protects or not listed[vm_id] or plan["host"] in listed[vm_id]:
                found.setdefault(host, {})[vm_id] = "asked once more, the live source lists the VM here"
    return found


def over_budget_now(plans, budget):
    """Return ``{host: {vm_id: why}}`` of all that was to be reaped on hosts that may not take so much any more.

    ``budget`` is the BUDGET (see manifest.py) of the live sources when they were asked once more.
    """
    found = {}
    for host, plan in plans.items():
        most = budget_of(budget, plan["host"])
        if most is not None and plan["reap"] and (not most or len(plan["begins"]) > most):
            why = "asked once more, the live source has a budget of %d VMs for this host" % most
            found[host] = {token["vm_id"]: why for token in plan["reap"]}
    return found


def doomed(plans):
    """Return how many VMs the plans of a batch begin to reap, counted on each host. The rest was counted before."""
    return sum(len(plan["begins"]) for plan in plans.values())


def _latched(refused):
    return next((one for _host, one in sorted(refused.items()) if one["code"] == LATCHED), None)


def _over_cap(plans, refused, caps, spent):
    """Refuse what takes the whole run over the fleet's caps; the fleet is what the live source lists, and the dead."""
    going = spent + doomed({host: plan for host, plan in plans.items() if host not in refused})
    live = max([0] + [plan["manifest"]["count"] or 0 for plan in plans.values()])
    percent = 100 * going / (live + going) if going else 0
    before = ", %d of them in earlier batches" % spent if spent else ""
    if going > caps["max_per_fleet"]:
        said = "%d VMs would be reaped in this run%s, more than reap_max_per_fleet=%d"
        return {"code": "fleet_cap", "message": said % (going, before, caps["max_per_fleet"])}
    if going > caps["percent_floor"] and percent > caps["max_percent"]:
        said = "%d VMs would be reaped in this run%s, beside %d that live: %d %%, more than reap_max_percent=%d"
        return {"code": "fleet_cap", "message": said % (going, before, live, percent, caps["max_percent"])}
    return None


def _clones(plans, machines):
    """Refuse hosts that call themselves the same machine: the strikes of one would be believed of the other.

    Where the other was in an earlier batch, only this one is left to be refused.
    """
    hosts = {}
    for host, plan in sorted(plans.items()):
        machine_id = plan["ledger"]["machine_id"]
        if machine_id is not None:
            earlier = [machines[machine_id]] if machines.get(machine_id, host) != host else []
            hosts.setdefault(machine_id, earlier).append(host)
    return {
        host: {
            "code": "cloned_machine_id",
            "message": "%s have the same machine id %s; give each its own" % (enumerate_hosts(clones), machine_id),
        }
        for machine_id, clones in hosts.items()
        if len(clones) > 1
        for host in clones
        if host in plans
    }
