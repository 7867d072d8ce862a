# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Turns what a host returned into facts that the planner can rely on. A host may return anything."""

from __future__ import annotations

import base64
import binascii
import json
import math
import zlib

from ..module_utils import ledger as ledgers
from ..module_utils.resource import MAX_NAME, VM_ID

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
    missing = [key for key in ("realm", "boot_id", "machine_id", "boottime_seconds", "ledger") if key not in facts]
    if missing or "packed" not in facts and "kinds" not in facts:
        raise FactsError("not the facts of vm_resource_facts: no %s" % ", ".join(missing or ["kinds"]))
    kinds = _unpack(facts["packed"]) if "packed" in facts else facts["kinds"]
    if not isinstance(kinds, dict):
        raise FactsError("the facts are no mapping of kinds")
    ledger = _check_host(facts)
    for kind, entry in kinds.items():
        _check_kind(kind, entry)
    return dict(facts, ledger=ledger, kinds=kinds)


def vm_ids(facts):
    """Return all ids that unpacked facts name: in resources, and in the ledger."""
    found = {resource["vm_id"] for entry in facts["kinds"].values() for resource in entry["resources"]}
    found.update(strike["vm_id"] for strike in facts["ledger"]["strikes"].values())
    found.update(token["vm_id"] for token in facts["ledger"]["intents"])
    found.update(facts["ledger"]["reaped"])
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
    return kinds


def _check_host(facts):
    """Check what a host says of itself; return its ledger."""
    for key in ("realm", "boot_id"):
        if not isinstance(facts[key], str):
            raise FactsError("'%s' is no text: %.200r" % (key, facts[key]))
    for key in ("machine_id", "ledger_problem"):
        if facts.get(key) is not None and not isinstance(facts[key], str):
            raise FactsError("'%s' is no text: %.200r" % (key, facts[key]))
    for key in ("other_realms", "pins"):
        lines = facts.get(key, [])
        if not isinstance(lines, list) or not all(isinstance(line, str) and line.isprintable() for line in lines):
            raise FactsError("'%s' is no list of texts: %.200r" % (key, lines))
    if not _is_number(facts["boottime_seconds"]):
        raise FactsError("'boottime_seconds' is no number: %.200r" % facts["boottime_seconds"])
    try:
        return ledgers.checked(facts["ledger"], facts["realm"])
    except ValueError as err:
        raise FactsError("this is no ledger: %.300s" % err) from err


def _check_kind(kind, entry):
    if not isinstance(kind, str) or not isinstance(entry, dict):
        raise FactsError("kind %.200r: a mapping was expected" % (kind,))
    if entry.get("status") not in STATUSES:
        raise FactsError("kind %s: status %.200r is none of %s" % (kind, entry.get("status"), ", ".join(STATUSES)))
    if not isinstance(entry.get("reason"), (str, type(None))) or not isinstance(entry.get("foreign", 0), int):
        raise FactsError("kind %s: 'reason' must be a text and 'foreign' a number" % kind)
    if not isinstance(entry.get("resources"), list):
        raise FactsError("kind %s: no list of resources" % kind)
    if entry["status"] != "ok" and entry["resources"]:
        raise FactsError("kind %s: resources, although it is %s" % (kind, entry["status"]))
    names = set()
    for resource in entry["resources"]:
        _check(kind, resource)
        if resource["name"] in names:
            # A strike and an act belong to a name; of two things with one name neither could be told from the other.
            raise FactsError("kind %s: two resources are called %.200r" % (kind, resource["name"]))
        names.add(resource["name"])


def _check(kind, resource):
    try:
        good = (
            resource["kind"] == kind
            and isinstance(resource["name"], str)
            and 0 < len(resource["name"]) <= MAX_NAME
            and resource["name"].isprintable()
            and isinstance(resource["identity"], str)
            and VM_ID.fullmatch(resource["vm_id"])
            and isinstance(resource["in_use"], bool)
            and isinstance(resource["holders"], list)
            and all(isinstance(holder[key], str) for holder in resource["holders"] for key in ("type", "name"))
            and (resource["age_seconds"] is None or _is_number(resource["age_seconds"]))
            and (resource["bytes"] is None or _is_number(resource["bytes"]))
            and isinstance(resource["parent"], (str, type(None)))
            and isinstance(resource["details"], dict)
        )
    except (KeyError, TypeError):
        good = False
    if not good:
        raise FactsError("kind %s: not a resource: %.300r" % (kind, resource))


def _is_number(value):
    try:
        return isinstance(value, (int, float)) and math.isfinite(value) and value >= 0
    except OverflowError:
        return False
