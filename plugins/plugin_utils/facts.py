# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Turns what a host returned into facts that the planner can rely on. A host may return anything."""

from __future__ import annotations

import base64
import binascii
import collections
import json
import math
import zlib

from ..module_utils import ledger as ledgers
from ..module_utils.resource import COLUMNS, MAX_NAME, VM_ID, columns, rows

MAX_UNPACKED = 256 * 1024 * 1024
MAX_ALIVE = 1_000_000
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
    kinds = unpack(facts["packed"]) if "packed" in facts else facts["kinds"]
    if not isinstance(kinds, dict):
        raise FactsError("the facts are no mapping of kinds")
    ledger = _check_host(facts)
    found = dict(facts, ledger=ledger, kinds={kind: _checked_kind(kind, entry) for kind, entry in kinds.items()})
    return dict(found, **_checked_supervisors(facts))


def vm_ids(facts):
    """Return all ids that unpacked facts name: in resources, in the ledger, and by the supervisors."""
    found = {resource["vm_id"] for entry in facts["kinds"].values() for resource in entry["resources"]}
    found.update(strike["vm_id"] for strike in facts["ledger"]["strikes"].values())
    found.update(token["vm_id"] for key in ("intents", "aside") for token in facts["ledger"][key])
    found.update(facts["ledger"]["reaped"])
    found.update(facts.get("alive", ()))
    return found


def unpack(packed):
    """Return the JSON that ``squeezed()`` of gather.py made a text of; raises FactsError."""
    try:
        stream = zlib.decompressobj()
        data = stream.decompress(base64.b64decode(packed, validate=True), MAX_UNPACKED)
        if not stream.eof:
            raise ValueError("truncated, or larger than %d bytes" % MAX_UNPACKED)
        return json.loads(data)
    except (binascii.Error, zlib.error, ValueError, TypeError, RecursionError) as err:
        raise FactsError("the packed facts cannot be read: %s" % err) from err


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
        if not isinstance(lines, list) or not all(map(_is_line, lines)):
            raise FactsError("'%s' is no list of texts: %.200r" % (key, lines))
    if not _is_number(facts["boottime_seconds"]):
        raise FactsError("'boottime_seconds' is no number: %.200r" % facts["boottime_seconds"])
    try:
        return ledgers.checked(facts["ledger"], facts["realm"])
    except ValueError as err:
        raise FactsError("this is no ledger: %.300s" % err) from err


def _checked_supervisors(facts):
    """Return what a host says of its supervisors, ``{supervisors, alive}``; of a host that says nothing, nothing."""
    said = {key: facts[key] for key in ("supervisors", "alive") if key in facts}
    for name, entry in _mapping(said.get("supervisors", {}), "supervisors").items():
        if (
            not isinstance(name, str)
            or not name.isprintable()
            or not isinstance(entry, dict)
            or entry.get("status") not in STATUSES
            or not isinstance(entry.get("reason"), (str, type(None)))
            or not isinstance(entry.get("required"), bool)
        ):
            raise FactsError("supervisor %.200r: not a status with its reason: %.300r" % (name, entry))
    if isinstance(said.get("alive"), str):
        said["alive"] = unpack(said["alive"])
    alive = _mapping(said.get("alive", {}), "alive")
    if len(alive) > MAX_ALIVE:
        raise FactsError("'alive' has %d VMs, more than %d" % (len(alive), MAX_ALIVE))
    for are_good, values in ((_are_vm_ids, list(alive)), (_are_names, list(alive.values()))):
        if not are_good(values):
            raise FactsError("'alive' cannot have %.300r" % next(value for value in values if not are_good([value])))
    return said


def _mapping(value, name):
    if not isinstance(value, dict):
        raise FactsError("'%s' is no mapping: %.200r" % (name, value))
    return value


def _checked_kind(kind, entry):
    """Return the entry of one kind with its ``resources``, whether they came so or in ``columns``."""
    if not isinstance(kind, str) or not isinstance(entry, dict):
        raise FactsError("kind %.200r: a mapping was expected" % (kind,))
    if entry.get("status") not in STATUSES:
        raise FactsError("kind %s: status %.200r is none of %s" % (kind, entry.get("status"), ", ".join(STATUSES)))
    if not isinstance(entry.get("reason"), (str, type(None))) or not isinstance(entry.get("foreign", 0), int):
        raise FactsError("kind %s: 'reason' must be a text and 'foreign' a number" % kind)
    table = entry["columns"] if "columns" in entry else _columns(kind, entry.get("resources"))
    _check_columns(kind, table)
    places = entry.get("places", {})
    if not isinstance(places, dict) or not all(_is_text(name) and _is_number(full) for name, full in places.items()):
        raise FactsError("kind %s: 'places' must say how full places are, not %.300r" % (kind, places))
    if entry["status"] != "ok" and table["name"]:
        raise FactsError("kind %s: resources, although it is %s" % (kind, entry["status"]))
    rest = {key: value for key, value in entry.items() if key != "columns"}
    return dict(rest, resources=rows(kind, table) if "columns" in entry else entry["resources"])


def _columns(kind, resources):
    if not isinstance(resources, list):
        raise FactsError("kind %s: no list of resources" % kind)
    for resource in resources:
        if not isinstance(resource, dict) or resource.get("kind") != kind or not resource.keys() >= set(COLUMNS):
            raise FactsError("kind %s: not a resource: %.300r" % (kind, resource))
    return columns(resources)


def _check_columns(kind, table):
    if not isinstance(table, dict) or not table.keys() >= set(COLUMNS):
        raise FactsError("kind %s: no columns %s" % (kind, ", ".join(COLUMNS)))
    for key, are_good in _GOOD.items():
        values = table[key]
        if not isinstance(values, list) or len(values) != len(table["name"]):
            raise FactsError("kind %s: the column '%s' is no list as long as the others" % (kind, key))
        if not are_good(values):
            bad = next(value for value in values if not are_good([value]))
            raise FactsError("kind %s: '%s' of a resource cannot be %.300r" % (kind, key, bad))
    if len(set(table["name"])) < len(table["name"]):
        # A strike and an act belong to a name; of two things with one name neither could be told from the other.
        twice = collections.Counter(table["name"]).most_common(1)[0][0]
        raise FactsError("kind %s: two resources are called %.200r" % (kind, twice))


# Each tells of a whole column at once, or of a part of it, whether its values are good: a host has thousands.


def _are(types):
    return lambda values: all(issubclass(found, types) for found in set(map(type, values)))


def _are_names(values):
    return (
        _are(str)(values)
        and "".join(values).isprintable()
        and all(0 < length <= MAX_NAME for length in set(map(len, values)))
    )


def _are_vm_ids(values):
    return _are(str)(values) and all(map(VM_ID.fullmatch, set(values)))


def _are_numbers(values):
    return _are((int, float, type(None)))(values) and all(map(_is_number, set(values) - {None}))


def _are_holders(values):
    return _are(list)(values) and all(
        isinstance(holder, dict) and isinstance(holder.get("type"), str) and isinstance(holder.get("name"), str)
        for holders in filter(None, values)
        for holder in holders
    )


_GOOD = {
    "name": _are_names,
    "vm_id": _are_vm_ids,
    "identity": _are(str),
    "in_use": _are(bool),
    "holders": _are_holders,
    "age_seconds": _are_numbers,
    "bytes": _are_numbers,
    "parent": _are((str, type(None))),
    "details": _are(dict),
}


def _is_line(value):
    return isinstance(value, str) and value.isprintable() and bool(value.strip())


def _is_text(value):
    return isinstance(value, str) and value.isprintable()


def _is_number(value):
    try:
        return isinstance(value, (int, float)) and math.isfinite(value) and value >= 0
    except OverflowError:
        return False
