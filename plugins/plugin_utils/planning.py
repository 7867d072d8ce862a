# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""From what a host returned and a manifest to a plan: the one way that filters and actions share."""

from __future__ import annotations

import os
import tempfile

from ..module_utils.all_kinds import TRAITS
from . import applying, planner, signed_plan
from . import manifest as manifests
from .facts import unpacked, vm_ids


def plan(facts, manifest, policy, opened=None):
    """Return the plan of one host. ``manifest`` is a HANDLE or a whole DOCUMENT (see manifest.py).

    With ``opened``, the OPENED of signed_plan.py, it is the host's share of that.
    """
    facts = unpacked(facts)
    return _planned(facts, _share(facts, manifest, policy), policy, within(opened, policy))


def within(opened, policy):
    """Return the WITHIN of the host, see signed_plan.py; None without an OPENED plan."""
    return signed_plan.share_of(opened, planner.complete_policy(policy)["host"]) if opened else None


def share(facts, manifest, policy):
    """Return what plan() takes of the manifest for this host."""
    return _share(unpacked(facts), manifest, policy)


def judged(facts, manifest, policy, also=()):
    """Return ``(facts, share, plan)`` of one host; its share tells of the ids in ``also`` too."""
    facts = unpacked(facts)
    found = _share(facts, manifest, policy, also)
    return facts, found, planner.plan(facts, found, policy, TRAITS)


def plan_of_share(facts, share_of_host, policy, within_plan=None):
    """Return the plan of one host, of what share() returned for it, and maybe within()."""
    return _planned(unpacked(facts), share_of_host, policy, within_plan)


def _planned(facts, share_of_host, policy, within_plan):
    if within_plan is None:
        return planner.plan(facts, share_of_host, policy, TRAITS)
    return applying.plan(facts, share_of_host, policy, TRAITS, within_plan)


def orphans(facts, live):
    """Return the resources whose vm_id is not live; ``live`` is a list of ids or a DOCUMENT."""
    alive = {str(vm_id) for vm_id in live} if isinstance(live, (list, tuple, set)) else _ids(live)
    return [
        resource
        for kind in sorted(unpacked(facts)["kinds"].items())
        for resource in sorted(kind[1]["resources"], key=lambda resource: resource["name"])
        if resource["vm_id"] not in alive
    ]


def _ids(document):
    return set(manifests.check(document, _name(document), now=manifests.now(), max_age=float("inf"))["vms"])


def _name(document):
    source = document.get("source") if isinstance(document, dict) else None
    return str(source or "manifest")


def _share(facts, manifest, policy, also=()):
    host, ids = planner.complete_policy(policy)["host"], vm_ids(facts).union(also)
    if isinstance(manifest, dict) and "index" in manifest:
        return manifests.share(manifest, host, ids)
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "manifest.sqlite")
        collector = manifests.Collector(path)
        collector.add(manifest, _name(manifest), now=manifests.now(), max_age=float("inf"))
        return manifests.share(collector.finish(), host, ids)
