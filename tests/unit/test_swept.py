# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What may be concluded from a sweep, and when nothing may."""

from __future__ import annotations

import pytest
from ansible_collections.microvm.reaper.plugins.module_utils import ledger as ledgers
from ansible_collections.microvm.reaper.plugins.plugin_utils import swept
from unit.builders import REALM, facts, plan, share, thing


def said(host, *things, refused=None, brake=None, **changes):
    """Return what the steps of a sweep left on one host."""
    host_facts = facts(*things, **changes)
    decided = dict(plan(host_facts, share()), host=host + ".example")
    return {
        "gathered": {"ansible_facts": {"vm_resources": host_facts}},
        "plan": dict(decided, refused=refused),
        "brake": brake or {"refused": {}},
        "recheck": None,
    }


def test_the_ids_of_the_hosts_that_answered_by_the_names_of_the_control_plane():
    found, unanswered, realm = swept.seen(
        {"a": said("a", thing("cgroup", "v1"), thing("jail", "v1"), thing("jail", "v2")), "b": said("b")}, REALM
    )
    assert found == {"a.example": ["v1", "v2"], "b.example": []}
    assert (unanswered, realm) == ({}, REALM)


def test_what_is_half_removed_is_still_there_and_what_was_reaped_long_ago_is_not():
    token = {"kind": "jail", "name": "j", "vm_id": "v3", "identity": "i", "details": {}}
    ledger = dict(ledgers.empty(REALM), intents=[token], reaped={"v4": 1000})
    assert swept.seen({"a": said("a", ledger=ledger)})[0] == {"a.example": ["v3"]}


@pytest.mark.parametrize(
    "broken, reason",
    [
        ({"gathered": None}, "not swept"),
        ({"plan": None}, "not swept"),
        ({"brake": None}, "not swept"),
        ({"gathered": {"unreachable": True, "msg": "no route"}}, "could not be looked at: no route"),
        ({"gathered": {"failed": True, "msg": "boom"}}, "could not be looked at: boom"),
        (said("b", refused={"code": "host_unknown", "message": "m"}), "refused (host_unknown): m"),
        (said("b", brake={"refused": {"b": {"code": "cloned_machine_id", "message": "m"}}}), "cloned_machine_id"),
        (said("b", unavailable=["container"]), "container could not be read"),
        ({"gathered": {"ansible_facts": {"vm_resources": dict(facts(), kinds={})}}}, "nothing was looked at"),
    ],
)
def test_a_host_that_cannot_speak_is_left_out_with_the_reason(broken, reason):
    found, unanswered, _realm = swept.seen({"a": said("a"), "b": dict(said("b"), **broken)})
    assert found == {"a.example": []}
    assert list(unanswered) == ["b"]
    assert reason in unanswered["b"]


def test_hosts_that_did_not_answer_are_named_by_their_reasons():
    assert swept.report({"a": "x", "b": "y\x1b", "c": "x"}) == [
        "no record on a and c is settled: x",
        "no record on b is settled: y\\x1b",
    ]
    assert swept.report({}) == []


LATCH = {"code": "latched", "message": "a person has to look"}


@pytest.mark.parametrize(
    "broken, why",
    [
        ({"brake": {"failed": True, "msg": "stopped (fleet_cap): too many"}}, "fleet_cap"),
        ({"recheck": {"failed": True, "msg": "source gone"}}, "source gone"),
        (said("b", refused=LATCH), "latched on b: a person has to look"),
        (said("b", brake={"refused": {"b": LATCH}}), "latched on b"),
    ],
)
def test_a_sweep_that_was_stopped_or_latched_anywhere_says_nothing(broken, why):
    with pytest.raises(swept.SweepError, match=why):
        swept.seen({"a": said("a"), "b": dict(said("b"), **broken)})


def test_one_realm_and_one_name_for_each_host():
    other = said("b")
    other["plan"]["realm"] = "other"
    with pytest.raises(swept.SweepError, match="realm other and prod"):
        swept.seen({"a": said("a"), "b": other})
    with pytest.raises(swept.SweepError, match="realm prod, not of test"):
        swept.seen({"a": said("a")}, "test")
    with pytest.raises(swept.SweepError, match="a and b have the same reap_host_id"):
        swept.seen({"a": said("a"), "b": said("a")})


def test_no_host_that_answered_is_no_empty_fleet():
    with pytest.raises(swept.SweepError, match="no host answered .a: it was not swept"):
        swept.seen({"a": dict(said("a"), gathered=None)})
    with pytest.raises(swept.SweepError, match="no host answered"):
        swept.seen({})


def test_a_batch_does_not_speak_for_the_others():
    swept.refuse_batches(set())
    with pytest.raises(swept.SweepError, match="serial.* not b and c; .*playbooks/abandoned.yml"):
        swept.refuse_batches({"c", "b"})
