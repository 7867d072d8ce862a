# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""From what a host returned and a manifest to a plan: the one way that filters and actions share."""

from __future__ import annotations

import os
import tempfile

from ..module_utils.all_kinds import TRAITS
from . import manifest as manifests
from . import planner
from .facts import unpacked, vm_ids


def plan(facts, manifest, policy):
    """Return the plan of one host. ``manifest`` is a HANDLE or a whole DOCUMENT (see manifest.py)."""
    facts = unpacked(facts)
    wanted = planner.complete_policy(policy)["host"]
    return planner.plan(facts, _share(manifest, wanted, vm_ids(facts)), policy, TRAITS)


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
    return {vm_id for vm_id, _hosts in _checked(document)["vms"]}


def _checked(document):
    source = document.get("source") if isinstance(document, dict) else None
    return manifests.check(document, str(source or "manifest"), now=manifests.now(), max_age=float("inf"))


def _share(manifest, host, ids):
    if isinstance(manifest, dict) and "index" in manifest:
        return manifests.share(manifest, host, ids)
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "manifest.sqlite")
        return manifests.share(manifests.handle(manifests.union([_checked(manifest)]), path), host, ids)
