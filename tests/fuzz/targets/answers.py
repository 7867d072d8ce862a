# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What the modules return from a host, which may return anything, and what a sweep has saved of it."""

from __future__ import annotations

import base64
import gzip
import json
import zlib

from ansible_collections.microvm.reaper.plugins.module_utils.all_kinds import TRAITS
from ansible_collections.microvm.reaper.plugins.module_utils.resource import VM_ID
from ansible_collections.microvm.reaper.plugins.plugin_utils import facts as host_facts
from ansible_collections.microvm.reaper.plugins.plugin_utils import inputs, planner, planning, replaying, report

from ..target import is_number, is_safe, scratch, target

SHARE = {
    "realm": "prod",
    "source": "test",
    "epoch": 3,
    "epochs": {"test": 3},
    "counts": {"test": 9},
    "generated_at": 1_800_000_000.0,
    "age": 0.0,
    "count": 9,
    "proven": True,
    "host_known": True,
    "live": ["v1"],
    "elsewhere": {},
    "tombstones": {},
}
POLICY = {"realm": "prod", "host": "h1", "max_percent_per_host": 100}


@target(is_json=True)
def facts(data):
    """Raises FactsError only. A plan can be made of what is taken, of nothing that lives; it can be shown and saved."""
    try:
        said = json.loads(data)
    except (ValueError, RecursionError):
        return
    try:
        found = host_facts.unpacked(said)
    except host_facts.FactsError as err:
        assert str(err)
        return
    for entry in found["kinds"].values():
        names = [one["name"] for one in entry["resources"]]
        assert len(set(names)) == len(names), "an act on one would be told from none on another"
        for one in entry["resources"]:
            assert VM_ID.fullmatch(one["vm_id"]) and one["name"].isprintable()
            assert one["bytes"] is None or is_number(one["bytes"])
    assert all(VM_ID.fullmatch(vm_id) for vm_id in host_facts.vm_ids(found))
    kinds = {name: entry for name, entry in found["kinds"].items() if name in TRAITS}
    try:
        plan = planner.plan(dict(found, kinds=kinds), SHARE, POLICY, TRAITS)
    except planner.PolicyError:
        return
    assert all(token["vm_id"] != "v1" and VM_ID.fullmatch(token["vm_id"]) for token in plan["reap"])
    json.dumps(plan)
    _reported(plan, [])
    inputs.decision(plan)


@target()
def packed_facts(data):
    """Raises FactsError only. The bytes are the packing; of a packing that is taken no beginning is."""
    _unpacked(data.decode("latin-1"))
    if not _unpacked(base64.b64encode(data).decode("ascii")):
        # Of what is packed well the text is any.
        _unpacked(base64.b64encode(zlib.compress(data, 1)).decode("ascii"))
        return
    stream = zlib.decompressobj()
    stream.decompress(data)
    whole = len(data) - len(stream.unused_data)
    for end in (whole - 1, whole // 2):
        assert not _unpacked(base64.b64encode(data[:end]).decode("ascii")), "a packing that lost its end was taken"


def _unpacked(text):
    """Tell whether a text is taken."""
    try:
        host_facts.unpack(text)
    except host_facts.FactsError:
        return False
    return True


def _reported(plan, outcomes):
    hosts = {
        "h1": {
            "plan": plan,
            "outcomes": outcomes,
            "busy": None,
            "error": None,
            "refused": plan["refused"],
            "absent": {},
            "unavailable": {},
            "seconds": 1.0,
        }
    }
    text = report.text("prod", None, hosts)
    assert all(is_safe(line) and len(line) <= report.MAX_LINE + 3 for line in text.split("\n")), text
    json.dumps(report.as_json("prod", None, hosts))
    return text


PLAN = planning.plan_of_share(
    {
        "realm": "prod",
        "boot_id": "b",
        "machine_id": "m",
        "boottime_seconds": 1000.0,
        "ledger": {"version": 1, "realm": "prod", "generation": 0, "strikes": {}, "intents": [], "manifest": {},
                   "reaped": {}},
        "kinds": {kind: {"status": "ok", "reason": None, "foreign": 0, "resources": []} for kind in TRAITS},
    },
    SHARE,
    POLICY,
)


@target(is_json=True)
def outcomes(data):
    """Never raises. Whatever a host says that it did, the report is made, and commands no terminal."""
    try:
        said = json.loads(data)
    except (ValueError, RecursionError):
        return
    _reported(PLAN, said)


@target(is_json=True)
def saved_inputs(data):
    """Raises InputsError only: the bytes are the lines of a file. A replay of them says what it can or what is wrong.

    A file that lost its end is cut off, corrupt or empty; it never passes for a whole one.
    """
    path = scratch() / "inputs.jsonl.gz"
    whole = gzip.compress(data, 1, mtime=0)
    for content in (whole, whole[:-1], whole[: len(whole) // 2], data):
        path.write_bytes(content)
        reader = inputs.Reader(str(path))
        try:
            result = replaying.replay_all(reader, {"policy": {}, "caps": {}})
        except inputs.InputsError as err:
            assert str(err)
            continue
        assert content is whole or result["cut_off"], "a file that lost its end passed for a whole one"
        # It begins with a header, so it says what a summary needs.
        shown = replaying.text(result, {})
        assert all(is_safe(line) for line in shown.split("\n"))
        json.dumps(result)
