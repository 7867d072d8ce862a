# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A host may return anything: it is facts or a FactsError."""

from __future__ import annotations

import base64
import copy
import json
import zlib

import pytest
from ansible_collections.microvm.reaper.plugins.module_utils.gather import pack
from ansible_collections.microvm.reaper.plugins.module_utils.resource import COLUMNS
from ansible_collections.microvm.reaper.plugins.plugin_utils import facts as module
from ansible_collections.microvm.reaper.plugins.plugin_utils import planning
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.builders import document, facts, policy, thing

GOOD = facts(thing("cgroup", "v1"), thing("jail", "v2"))


def packed(kinds=None):
    content = copy.deepcopy(GOOD)
    content["packed"] = pack(content.pop("kinds") if kinds is None else kinds)
    return content


@pytest.mark.parametrize("wrap", [lambda one: one, lambda one: {"vm_resources": one}, lambda one: {
    "changed": False, "ansible_facts": {"vm_resources": one}}])
def test_packed_or_not_wrapped_or_not(wrap):
    assert module.unpacked(wrap(GOOD)) == GOOD
    assert module.unpacked(wrap(packed()))["kinds"] == GOOD["kinds"]


def test_the_ids_that_facts_name():
    ledger = dict(GOOD["ledger"], strikes={"a b": {"vm_id": "v3"}}, intents=[{"vm_id": "v4"}])
    assert module.vm_ids(dict(GOOD, ledger=ledger)) == {"v1", "v2", "v3", "v4"}


def squeezed(data):
    return base64.b64encode(zlib.compress(data)).decode()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "not base64!",
        "é",
        None,
        5,
        [],
        base64.b64encode(b"not zlib").decode(),
        squeezed(b"{}")[:-8],
        squeezed(b""),
        squeezed(b"{"),
        squeezed(b"[]"),
        squeezed(b"null"),
        squeezed(b"\xff"),
        squeezed(b"[" * 200000),
        squeezed(b'{"cgroup": 1}'),
        squeezed(b'{"cgroup": {"status": "ok"}}'),
    ],
)
def test_packed_strings_that_are_none(text):
    with pytest.raises(module.FactsError):
        module.unpacked(dict(packed(), packed=text))


def test_a_bomb_is_not_unpacked(monkeypatch):
    monkeypatch.setattr(module, "MAX_UNPACKED", 1 << 16)
    with pytest.raises(module.FactsError, match="larger than 65536 bytes"):
        module.unpacked(dict(packed(), packed=squeezed(b" " * (1 << 24) + b"{}")))


@pytest.mark.parametrize("key", ["realm", "boot_id", "machine_id", "boottime_seconds", "ledger", "kinds"])
def test_what_is_missing_is_named(key):
    with pytest.raises(module.FactsError, match=key):
        module.unpacked({name: value for name, value in GOOD.items() if name != key})


@pytest.mark.parametrize(
    "changes",
    [
        {"realm": None},
        {"boot_id": 5},
        {"machine_id": ["m"]},
        {"boottime_seconds": "1"},
        {"boottime_seconds": float("nan")},
        {"boottime_seconds": -1},
        {"ledger_problem": {}},
        {"ledger": None},
        {"ledger": {}},
        {"ledger": dict(GOOD["ledger"], realm="staging")},
        {"ledger": dict(GOOD["ledger"], strikes={"a b": {}})},
        {"ledger": dict(GOOD["ledger"], intents=[{}])},
        {"kinds": []},
        {"kinds": {"cgroup": None}},
        {"kinds": {"cgroup": {"status": "fine", "resources": []}}},
        {"kinds": {"cgroup": {"status": ["ok"], "resources": []}}},
        {"kinds": {"cgroup": {"status": "ok", "resources": {}}}},
        {"kinds": {"cgroup": {"status": "ok", "reason": 5, "resources": []}}},
        {"kinds": {"cgroup": {"status": "ok", "foreign": "1", "resources": []}}},
        {"kinds": {"cgroup": {"status": "unavailable", "resources": [thing("cgroup", "v1")]}}},
        {"kinds": {"cgroup": {"status": "ok", "resources": [thing("cgroup", "v1"), thing("cgroup", "v1")]}}},
        {"kinds": {"jail": {"status": "ok", "resources": [thing("cgroup", "v1")]}}},
    ],
)
def test_facts_that_are_none(changes):
    with pytest.raises(module.FactsError):
        module.unpacked(dict(GOOD, **changes))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("kind", None),
        ("name", 5),
        ("name", ""),
        ("name", "a\nb"),
        ("name", "a\x1b[2J"),
        ("name", "a\ud800"),
        ("name", "a" * 5000),
        ("vm_id", None),
        ("vm_id", "../x"),
        ("vm_id", ["v1"]),
        ("identity", None),
        ("in_use", "no"),
        ("holders", None),
        ("holders", {}),
        ("holders", ""),
        ("holders", ["x"]),
        ("holders", [{"type": "process"}]),
        ("age_seconds", "1"),
        ("age_seconds", -1),
        ("age_seconds", float("nan")),
        ("age_seconds", 10**400),
        ("bytes", "many"),
        ("parent", 5),
        ("details", None),
    ],
)
def test_resources_that_are_none(key, value):
    bad = dict(thing("cgroup", "v1"), **{key: value})
    for content in (dict(GOOD, kinds={"cgroup": {"status": "ok", "resources": [bad]}}),):
        with pytest.raises(module.FactsError, match="cgroup"):
            module.unpacked(content)
    columns = {name: [one] for name, one in bad.items()}
    if key != "kind":  # which columns do not have
        with pytest.raises(module.FactsError, match="cgroup"):
            module.unpacked(dict(GOOD, kinds={"cgroup": {"status": "ok", "columns": columns}}))
    missing = {name: value for name, value in thing("cgroup", "v1").items() if name != key}
    with pytest.raises(module.FactsError, match="cgroup"):
        module.unpacked(dict(GOOD, kinds={"cgroup": {"status": "ok", "resources": [missing]}}))


@pytest.mark.parametrize("change", [{"age_seconds": []}, {"name": None}, {"bytes": [None, None]}, {"holders": "x"}])
def test_columns_that_do_not_fit_together(change):
    table = dict({key: [thing("cgroup", "v1")[key]] for key in COLUMNS}, **change)
    with pytest.raises(module.FactsError, match="kind cgroup: the column '%s'" % next(iter(change))):
        module.unpacked(dict(GOOD, kinds={"cgroup": {"status": "ok", "columns": table}}))


@pytest.mark.parametrize("table", [None, [], {}, {"name": []}])
def test_columns_that_are_none(table):
    with pytest.raises(module.FactsError, match="kind cgroup: no columns name, vm_id"):
        module.unpacked(dict(GOOD, kinds={"cgroup": {"status": "ok", "columns": table}}))


def test_the_value_that_is_bad_is_named():
    things = [thing("cgroup", "v%d" % number) for number in range(3)] + [thing("cgroup", "v3", name="a\x1bb")]
    with pytest.raises(module.FactsError, match=r"kind cgroup: 'name' of a resource cannot be 'a\\x1bb'"):
        module.unpacked(dict(GOOD, kinds={"cgroup": {"status": "ok", "resources": things}}))


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def places(value, path=()):
    """Yield the paths to everything in a nested structure."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


EVERY_PLACE = sorted((path for path in places(GOOD) if path), key=str)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(EVERY_PLACE), JUNK)
def test_with_anything_anywhere_there_is_a_plan_or_a_facts_error(path, junk):
    """Through the whole door: what passes must not make the planner stumble."""
    content = copy.deepcopy(GOOD)
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = junk
    try:
        plan = planning.plan(content, document(generated_at=1_700_000_000), policy())
    except module.FactsError:
        return
    json.dumps(plan)
