# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What lies in the state directory of a host: its ledger, its journal and its pins."""

from __future__ import annotations

import gzip
import io
import json
import os

from ansible_collections.microvm.reaper.plugins.module_utils import evidence_store, journal, ledger
from ansible_collections.microvm.reaper.plugins.module_utils.resource import VM_ID
from ansible_collections.microvm.reaper.plugins.plugin_utils import planner
from ansible_collections.microvm.reaper.plugins.plugin_utils.facts import FactsError, unpacked

from ..target import is_number, is_safe, scratch, target

REALM = "prod"


def _written(name, data):
    """Write a file of the realm; return the state directory."""
    directory = scratch() / "state"
    (directory / REALM).mkdir(parents=True, exist_ok=True)
    (directory / REALM / name).write_bytes(data)
    return str(directory)


@target(is_json=True)
def ledger_file(data):
    """load() never raises. What it takes has the types that a planner counts on, travels as JSON, and is taken again.

    What it does not take is an empty ledger and a problem in words; so is a ledger of which the end is missing.
    """
    directory = _written("ledger.json", data)
    found, problem = ledger.load(directory, REALM)
    if problem is not None:
        assert found == ledger.empty(REALM)
        return
    assert found["version"] == ledger.VERSION and found["realm"] == REALM and found["generation"] >= 0
    assert isinstance(found["generation"], int)
    for strike in found["strikes"].values():
        assert VM_ID.fullmatch(strike["vm_id"]) and isinstance(strike["identity"], str)
        assert isinstance(strike["strikes"], int) and is_number(strike["first"]) and is_number(strike["last"])
    for token in found["intents"]:
        assert VM_ID.fullmatch(token["vm_id"]) and all(isinstance(token[key], str) for key in ("kind", "name"))
    assert all(VM_ID.fullmatch(vm_id) and is_number(when) for vm_id, when in found["reaped"].items())
    assert all(map(is_number, found["manifest"]["epochs"].values()))
    counts = [found["manifest"]["count"], *found["manifest"]["counts"].values()]
    assert all(count is None or (is_number(count) and count >= 0) for count in counts)
    again = json.dumps(found)
    assert json.dumps(ledger.checked(json.loads(again), REALM)) == again
    cut = data.rstrip()[:-1]
    assert ledger.load(_written("ledger.json", cut), REALM)[1] is not None, "a ledger without its end was taken"


@target()
def pins(data):
    """Never raises. A line that names a VM first pins it; a host is not refused for how its pins are written."""
    directory = scratch() / "state"
    directory.mkdir(exist_ok=True)
    (directory / "keep").write_bytes(data)
    lines = ledger.pins(str(directory))
    for line in lines:
        assert line == line.strip() and line and "#" not in line and "\n" not in line
        found = planner._lenient_pin(line)
        assert found["pattern"] == line.split()[0] and (found["until"] is None or is_number(found["until"]))
    facts = {"realm": REALM, "boot_id": "b", "machine_id": None, "boottime_seconds": 1.0, "kinds": {}}
    try:
        unpacked(dict(facts, ledger=ledger.empty(REALM), pins=lines))
    except FactsError as err:
        raise AssertionError("the host would be refused for its pins") from err


@target(is_json=True)
def journal_file(data):
    """about() never raises. What it finds is safe to print and to store, and is an entry when it is looked at again."""
    directory = _written("journal.jsonl", data)
    found = journal.about(directory, REALM, {})["entries"]
    assert len(found) <= journal.MAX_ENTRIES
    for entry in found:
        assert journal.checked(json.loads(json.dumps(entry))) == entry
        assert all(is_number(value) or isinstance(value, (str, list)) for value in entry.values())
        assert all(value.encode("utf-8") or not value for value in entry.values() if isinstance(value, str))
    vm_id = found[0].get("vm_id") if found else "v1"
    for entry in journal.about(directory, REALM, {"vm_id": vm_id})["entries"]:
        assert entry.get("vm_id") == vm_id or entry["what"] == journal.LATCHED


@target(is_json=True)
def journal_chain(data):
    """Raises LedgerError only. What is added to whatever lies there is found again, and follows what was before it.

    A line of ours that is changed or left out is noticed, unless it is the last one or nothing is before it.
    """
    directory = _written("journal.jsonl", data)
    os.chmod(directory, 0o700)
    os.chmod(os.path.join(directory, REALM), 0o700)
    sweep = journal.Journal(directory, REALM, "sweep-1")
    before = journal.about(directory, REALM, {})
    for number in range(3):
        sweep.latched("v%d lives" % number)
    after = journal.about(directory, REALM, {})
    ours = [entry["message"] for entry in after["entries"][-3:]]
    assert ours == ["v0 lives", "v1 lives", "v2 lives"], ours
    if before["broken"] is None:
        assert after["broken"] is None, after["broken"]
    with open(journal.path_of(directory, REALM), "rb") as stream:
        lines = stream.read().split(b"\n")
    lines[-3] = lines[-3].replace(b"v1 lives", b"v9 lives")
    changed = journal.about(_written("journal.jsonl", b"\n".join(lines)), REALM, {})
    without = journal.about(_written("journal.jsonl", b"\n".join(lines[:-3] + lines[-2:])), REALM, {})
    assert changed["broken"] and without["broken"]


@target(is_json=True)
def journal_entry(data):
    """Raises ValueError only, whatever JSON a host returns as an entry."""
    try:
        entry = journal.checked(json.loads(data))
    except (ValueError, RecursionError):
        return
    assert journal.checked(entry) == entry
    assert is_safe("".join(c for c in entry.get("name", "") if c.isprintable()))


@target(max_length=8192)
def evidence_bundle(data):
    """Raises EvidenceError only, for bytes, and for bytes in a good gzip. What was packed is unpacked as it was."""
    for content in (data, gzip.compress(data, 1, mtime=0)):
        try:
            metadata, sections = evidence_store.unpacked(io.BytesIO(content), 1 << 16)
        except evidence_store.EvidenceError as err:
            assert str(err)
            continue
        assert isinstance(metadata, dict)
        assert sum(len(text) for _title, _source, text in sections) <= 1 << 16
    text = data.decode("latin-1")
    metadata = {"vm_id": "v1", "reasons": [text], "seconds": 5}
    whole = evidence_store.packed(metadata, [("jail", text[:80], data), ("cgroup", "x", text[:99])])
    again, sections = evidence_store.unpacked(io.BytesIO(whole), 1 << 20)
    assert again == metadata and sections[0][2] == data and len(sections) == 2
    for end in (len(whole) - 9, len(whole) // 2):
        try:
            cut = evidence_store.unpacked(io.BytesIO(whole[:end]), 1 << 20)
        except evidence_store.EvidenceError:
            continue
        assert cut == (again, sections), "a bundle that lost a part of it was taken"  # not only its checksum
