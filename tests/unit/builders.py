"""Facts, shares of manifests and ledgers, as small as the thing that a test is about."""

from __future__ import annotations

import copy

from ansible_collections.microvm.reaper.plugins.module_utils import ledger as ledgers
from ansible_collections.microvm.reaper.plugins.module_utils import resource as r
from ansible_collections.microvm.reaper.plugins.plugin_utils import manifest, planner

REALM, HOST, MACHINE, BOOT = "prod", "h1", "m1", "boot-1"
# The traits of the real kinds (test_planner.py compares them), as data: no test of a decision needs the kinds.
TRAITS = {
    "container": {
        "order": 0,
        "stops": True,
        "depends_on": [],
        "resumes": False,
        "aside": "running",
        "takes": ["snapshot"],
    },
    "snapshot": {"order": 1, "stops": False, "depends_on": ["container"], "resumes": False, "aside": None, "takes": []},
    "jail": {"order": 2, "stops": False, "depends_on": ["cgroup"], "resumes": False, "aside": "always", "takes": []},
    "dm_thin": {
        "order": 3,
        "stops": False,
        "depends_on": ["cgroup", "container", "snapshot"],
        "resumes": True,
        "aside": "always",
        "takes": [],
    },
    "thin_id": {
        "order": 4,
        "stops": False,
        "depends_on": ["container", "snapshot", "dm_thin"],
        "resumes": False,
        "aside": None,
        "takes": [],
    },
    "cgroup": {"order": 5, "stops": True, "depends_on": [], "resumes": False, "aside": "running", "takes": []},
    "zombie": {"order": 6, "stops": False, "depends_on": [], "resumes": False, "aside": None, "takes": []},
}


def thing(kind, vm_id, *, name=None, identity=None, age=1000.0, **others):
    """Return a resource; its name is ``<vm_id>.<kind>`` unless given."""
    name = name or "%s.%s" % (vm_id, kind)
    return r.resource(kind, name, vm_id, identity or "id of %s" % name, age_seconds=age, **others)


def vms_of(entries):
    """Yield the VMs of a document one by one, whether they come so or in COLUMNS."""
    try:
        for entry in entries:
            if isinstance(entry, manifest.Columns):
                yield from (dict(zip(entry._fields, vm, strict=True)) for vm in zip(*entry, strict=True))
            else:
                yield entry
    finally:
        entries.close()


def policy(**changes):
    """Return a policy that plans at once where it may."""
    return dict({"realm": REALM, "host": HOST, "max_percent_per_host": 100, "hold": 0}, **changes)


def share(live=(), **changes):
    """Return a share; there is always one more VM alive, elsewhere, so that the list is not empty."""
    full = {
        "realm": REALM,
        "source": "test",
        "epoch": None,
        "epochs": {},
        "counts": {},
        "generated_at": 1_800_000_000.0,
        "age": 0.0,
        "count": len(live) + 1,
        "proven": True,
        "host_known": True,
        "live": list(live),
        "elsewhere": {},
        "tombstones": {},
    }
    return dict(full, **changes)


def facts(*things, now=1000.0, ledger=None, boot=BOOT, unavailable=(), absent=(), **changes):
    """Return unpacked facts of a host with these things, and with all kinds readable unless said otherwise."""
    kinds = {kind: {"status": "ok", "reason": None, "resources": [], "foreign": 0} for kind in TRAITS}
    for one in things:
        kinds[one["kind"]]["resources"].append(one)
    for kind in unavailable:
        kinds[kind].update(status="unavailable", reason="no answer")
    for kind in absent:
        kinds[kind].update(status="absent", reason="not here")
    full = {
        "realm": REALM,
        "boot_id": boot,
        "machine_id": MACHINE,
        "boottime_seconds": now,
        "ledger": ledger or ledgers.empty(REALM),
        "ledger_problem": None,
        "generation": 0,
        "kinds": kinds,
    }
    return dict(full, **changes)


def plan(host_facts, host_share=None, **changes):
    """Return the plan, and prove on the way that the inputs were not changed."""
    host_share = host_share or share()
    before = copy.deepcopy((host_facts, host_share))
    result = planner.plan(host_facts, host_share, policy(**changes), TRAITS)
    assert (host_facts, host_share) == before
    return result


def remembered(result, before=None):
    """Return the ledger that a host has after it was told ``result`` and nothing was reaped."""
    before = before or ledgers.empty(REALM)
    if not result["ledger_changed"]:
        return before
    return dict(before, **result["ledger"], generation=before["generation"] + 1)


def sweep_twice(*things, host_share=None, between=60.0, again=None, **changes):
    """Return the plan of a second sweep, ``between`` seconds after the first; ``again`` is what is there by then."""
    first = plan(facts(*things), host_share, **changes)
    later = things if again is None else again
    return plan(facts(*later, now=1000.0 + between, ledger=remembered(first)), host_share, **changes)


def names(result):
    """Return the names that a plan reaps, in order."""
    return [token["name"] for token in result["reap"]]


def verdicts(result):
    """Return ``{name: verdict}`` of all things of VMs that are not live."""
    return {one["name"]: one["verdict"] for family in result["families"].values() for one in family["resources"]}


def reasons(result, vm_id):
    """Return the codes of all reasons that the plan gives for a family and its members."""
    family = result["families"][vm_id]
    found = [family["reasons"]] + [one["reasons"] for one in family["resources"]]
    return {reason["code"] for some in found for reason in some}


def outcomes(tokens, result=r.REAPED):
    """Return the outcomes of a host on which every act came to ``result``."""
    return [r.outcome(token, result) for token in tokens]


def document(vms=(("v1", "h1"),), **changes):
    """Return a live manifest as a source would; without ``hosts``."""
    full = {
        "realm": REALM,
        "generated_at": 1_800_000_000,
        "complete": True,
        "vms": [{"vm_id": vm_id, "host": host} for vm_id, host in vms],
    }
    return dict(full, **changes)
