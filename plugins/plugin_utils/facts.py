# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Turns what a host returned into facts that the planner can rely on. A host may return anything."""

from __future__ import annotations

import base64
import binascii
import json
import zlib

from ..module_utils.resource import VM_ID

MAX_UNPACKED = 256 * 1024 * 1024
STATUSES = ("ok", "absent", "unavailable")


class FactsError(ValueError):
    """These are not the facts of vm_resource_facts; the text says what is wrong with them."""


def unpacked(facts):
    """Return the facts of one host as plain, checked structures.

    Accepts what ``vm_resource_facts`` returns, packed or not, also when wrapped as ``ansible_facts`` or as a
    registered result. Raises FactsError.
    """
    for wrapper in ("ansible_facts", "vm_resources"):
        if isinstance(facts, dict) and wrapper in facts:
            facts = facts[wrapper]
    if not isinstance(facts, dict):
        raise FactsError("facts must be the mapping that vm_resource_facts returns, not %s" % type(facts).__name__)
    missing = [key for key in ("realm", "boot_id", "boottime_seconds", "ledger") if key not in facts]
    if missing or "packed" not in facts and "kinds" not in facts:
        raise FactsError("not the facts of vm_resource_facts: no %s" % ", ".join(missing or ["kinds"]))
    kinds = _unpack(facts["packed"]) if "packed" in facts else facts["kinds"]
    for kind, entry in kinds.items():
        if entry.get("status") not in STATUSES:
            raise FactsError("kind %s: status %r is none of %s" % (kind, entry.get("status"), ", ".join(STATUSES)))
        for resource in entry["resources"]:
            _check(kind, resource)
    return dict(facts, kinds=kinds)


def vm_ids(facts):
    """Return all ids that unpacked facts name: in resources, in strikes and in intents."""
    found = {resource["vm_id"] for entry in facts["kinds"].values() for resource in entry["resources"]}
    found.update(strike["vm_id"] for strike in facts["ledger"]["strikes"].values())
    found.update(token["vm_id"] for token in facts["ledger"]["intents"])
    return found


def _unpack(packed):
    try:
        stream = zlib.decompressobj()
        data = stream.decompress(base64.b64decode(packed, validate=True), MAX_UNPACKED)
        if not stream.eof:
            raise ValueError("truncated, or larger than %d bytes" % MAX_UNPACKED)
        kinds = json.loads(data)
    except (binascii.Error, zlib.error, ValueError, TypeError, RecursionError) as err:
        raise FactsError("the packed facts cannot be read: %s" % err) from err
    if not isinstance(kinds, dict):
        raise FactsError("the packed facts are no mapping of kinds")
    return kinds


def _check(kind, resource):
    try:
        good = (
            resource["kind"] == kind
            and isinstance(resource["name"], str)
            and isinstance(resource["identity"], str)
            and VM_ID.fullmatch(resource["vm_id"])
            and isinstance(resource["in_use"], bool)
            and all(isinstance(holder["type"], str) and isinstance(holder["name"], str) for holder in resource["holders"])
            and (resource["age_seconds"] is None or resource["age_seconds"] >= 0)
        )
    except (KeyError, TypeError):
        good = False
    if not good:
        raise FactsError("kind %s: not a resource: %.300r" % (kind, resource))
