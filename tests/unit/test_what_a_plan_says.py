# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What people and the report read in a plan: the evidence, the numbers, and in every sentence what it is about."""

from __future__ import annotations

import pathlib
import time

import pytest
import yaml
from ansible_collections.microvm.reaper.plugins.module_utils import ledger as ledgers
from ansible_collections.microvm.reaper.plugins.module_utils import resource as r
from ansible_collections.microvm.reaper.plugins.plugin_utils import planner
from unit.builders import BOOT, REALM, facts, names, plan, policy, remembered, share, sweep_twice, thing

DEFAULTS = pathlib.Path(__file__).resolve().parents[2] / "roles/reap/defaults/main.yml"
MIDNIGHT = 1_799_971_200  # the end of 2027-01-14 in UTC


@pytest.fixture
def far_from_greenwich(monkeypatch):
    monkeypatch.setenv("TZ", "Pacific/Auckland")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def family(result, vm_id="v1"):
    return result["families"][vm_id]


# --- the plan as a whole -----------------------------------------------------------------------------------------


def test_a_plan_names_what_it_was_made_of():
    seen = share(epoch=7)
    result = plan(facts(thing("cgroup", "v1"), ledger=dict(ledgers.empty(REALM), generation=4)), seen)
    assert {key: result[key] for key in ("host", "realm", "generation", "refused", "notices")} == {
        "host": "h1",
        "realm": REALM,
        "generation": 4,
        "refused": None,
        "notices": [],
    }
    assert result["manifest"] == {"source": "test", "epoch": 7, "count": 1, "generated_at": 1_800_000_000.0}


def test_families_list_their_resources_in_the_order_of_removal_and_in_brief():
    result = plan(facts(thing("cgroup", "v1", bytes_used=5), thing("container", "v1"), thing("jail", "v1")))
    assert [one["kind"] for one in family(result)["resources"]] == ["container", "jail", "cgroup"]
    assert family(result)["resources"][2] == {
        "kind": "cgroup",
        "name": "v1.cgroup",
        "verdict": "suspected",
        "reasons": [],
        "bytes": 5,
        "holders": [],
    }


def test_all_of_a_kind_are_counted():
    host = facts(*[thing("cgroup", vm_id) for vm_id in ("v1", "v2", "v3", "w1", "w2")])
    host["kinds"]["cgroup"]["foreign"] = 3
    del host["kinds"]["jail"]["foreign"]
    result = plan(host, share(live=["w1", "w2"]))
    counted = result["counts"]["cgroup"]
    assert (counted["suspected"], counted["live"], counted["foreign"], counted["reap"]) == (3, 2, 3, 0)
    assert result["counts"]["jail"]["foreign"] == 0
    assert result["vms"] == {"live": 2, "suspected": 3, "confirmed": 0, "disputed": 0, "held": 0, "unknown": 0}


def test_of_a_refused_host_no_vm_is_judged():
    result = plan(facts(thing("cgroup", "v1")), share(count=0))
    assert (result["families"], set(result["vms"].values())) == ({}, {0})


def test_kinds_that_were_not_gathered_are_not_missed():
    host = facts(thing("cgroup", "v1"))
    host["kinds"] = {"cgroup": host["kinds"]["cgroup"]}
    assert list(family(plan(host))["resources"][0]["name"].split(".")) == ["v1", "cgroup"]


# --- evidence ------------------------------------------------------------------------------------------------------

DEAD = {"tombstones": {"v1": 900.0}}


@pytest.mark.parametrize(
    ("known", "evidence", "because", "token"),
    [
        (DEAD, "tombstoned", "tombstoned", "tombstoned"),
        ({}, "absent", "absent", "absent"),
        ({"elsewhere": {"v1": ["h2"]}}, "absent", "elsewhere", "elsewhere"),
    ],
)
def test_the_evidence_is_named_in_the_family_and_in_its_tokens(known, evidence, because, token):
    result = sweep_twice(thing("cgroup", "v1"), host_share=share(**known))
    assert family(result)["evidence"] == evidence
    assert [reason["code"] for reason in family(result)["reasons"]] == [because]
    assert "VM" in family(result)["reasons"][0]["text"]
    assert [one["evidence"] for one in result["reap"]] == [token]


@pytest.mark.parametrize(("known", "evidence"), [(DEAD, "tombstoned"), ({}, "absent"), ({"proven": False}, "unproven")])
@pytest.mark.parametrize("changes", [{"age": 1.0}, {"in_use": True}, {}])
def test_the_evidence_is_named_whatever_the_verdict(known, evidence, changes):
    result = plan(facts(thing("cgroup", "v1", **changes)), share(**known), running="never")
    assert family(result)["evidence"] == evidence


def test_what_waits_without_a_strike_has_none():
    assert family(sweep_twice(thing("cgroup", "v1", age=1.0)))["strikes"] == 0
    assert family(sweep_twice(thing("cgroup", "v1", age=None), min_age=61))["strikes"] == 1


# --- reasons -------------------------------------------------------------------------------------------------------


def held_by_lease():
    return [r.holder("lease", "l1")]


@pytest.mark.parametrize(
    ("one", "known", "rules", "code", "told"),
    [
        ({"age": 59.0}, {}, {}, "too_young", ["cgroup v1.cgroup is 59 s old", "reap_min_age is 60", "VMs is 0 s old"]),
        ({}, {"tombstones": {"v1": 59.0}}, {}, "recently_destroyed", ["destroyed 59 s ago"]),
        ({"in_use": True}, {}, {}, "running", ["v1.cgroup is in use", "is absent", "reap_running is tombstoned"]),
        ({}, {}, {"keep": ["v*"]}, "pinned", ["reap_keep names it (v*)"]),
        ({}, {"proven": False}, {}, "unproven", ["does not prove that its list is complete"]),
        ({}, {"proven": False, "unproven": ["a shrank", "b lags"]}, {}, "unproven", ["a shrank; b lags"]),
        ({"holders": held_by_lease()}, {}, {}, "lease", ["held by lease l1"]),
        ({"kind": "dm_thin", "in_use": True}, {}, {"running": "confirmed"}, "busy", ["it is in use"]),
        ({"kind": "zombie", "parent": "pid 7"}, {}, {"zombies": "report"}, "zombie", ["parent pid 7", "reap_zombies"]),
    ],
)
def test_a_reason_says_what_it_is_about(one, known, rules, code, told):
    orphan = thing(**{"kind": "cgroup", "vm_id": "v1", **one})
    found = family(sweep_twice(orphan, host_share=share(**known), **rules))
    reasons = found["reasons"] + found["resources"][0]["reasons"]
    text = next(reason["text"] for reason in reasons if reason["code"] == code)
    assert all(words in text for words in told)
    assert code != "pinned" or [text] == told


@pytest.mark.parametrize(("reason", "told"), [("no answer", "no answer"), (None, "unavailable"), ("", "unavailable")])
def test_what_cannot_be_judged_says_which_kind_failed_and_how(reason, told):
    host = facts(thing("snapshot", "v1"), unavailable=["container"])
    host["kinds"]["container"]["reason"] = reason
    assert family(plan(host))["resources"][0]["reasons"] == [
        {"code": "unreadable", "text": "container could not be read: %s" % told}
    ]


# --- refusals ------------------------------------------------------------------------------------------------------


def known(**manifest):
    empty = ledgers.empty(REALM)
    return dict(empty, generation=1, host="h1", machine_id="m1", manifest=dict(empty["manifest"], **manifest))


ELEVEN = [thing("cgroup", "v%02d" % number) for number in range(11)]


@pytest.mark.parametrize(
    ("changed_facts", "changed_share", "code", "told"),
    [
        ({"realm": "staging"}, {"realm": "lab"}, "other_realm", ["'prod'", "'staging'", "'lab'"]),
        ({"ledger": dict(known(), machine_id="m9")}, {}, "machine_id_changed", ["machine m9", "machine m1"]),
        ({"ledger": dict(known(), host="h9")}, {}, "host_renamed", ["'h9'", "'h1'"]),
        ({}, {"host_known": False}, "host_unknown", ["'h1'"]),
        ({}, {"count": 0}, "blind", ["reap_expect_empty=prod"]),
        ({"ledger": known(epochs={"a": 7})}, {"epochs": {"a": 6}}, "epoch_went_back", ["epoch 6", "seen epoch 7"]),
        (
            {"ledger": known(count=100)},
            {"count": 49},
            "shrunk",
            ["the live source listed 100 VMs", "lists 49 now", "(51 % fewer, reap_max_shrink_percent is 50)"],
        ),
        (
            {"other_realms": ["lab", "staging"], "ledger": ledgers.empty(REALM)},
            {},
            "realm_changed",
            ["for realm 'lab', 'staging' and never for 'prod'", "with reap_adopt_host=true"],
        ),
    ],
)
def test_a_refusal_says_what_was_compared(changed_facts, changed_share, code, told):
    result = plan(facts(thing("cgroup", "v1"), **dict({"ledger": known()}, **changed_facts)), share(**changed_share))
    assert result["refused"]["code"] == code
    assert all(words in result["refused"]["message"] for words in told)


def test_a_cap_says_how_many_of_how_many():
    result = sweep_twice(*ELEVEN, max_percent_per_host=60)
    assert result["refused"]["message"].startswith("11 of 11 VMs (100 %) ")
    assert "reap_max_percent_per_host=60" in result["refused"]["message"]


def test_a_latch_says_when_in_utc(far_from_greenwich):
    ledger = dict(known(), reaped={"v1": 1_800_000_000})
    told = plan(facts(thing("cgroup", "v2"), ledger=ledger), share(["v1"]))["refused"]["message"]
    assert " at 2027-01-15T08:00:00Z, " in told


def test_one_id_that_is_used_again_does_not_excuse_the_next():
    ledger = dict(known(), reaped={"job-1": 1, "v1": 2})
    result = plan(facts(thing("cgroup", "v2"), ledger=ledger), share(["job-1", "v1"]), reused_ids=["job-.*"])
    assert result["refused"]["code"] == "latched"
    assert "the VM v1 " in result["refused"]["message"]


# --- the policy ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"max_percent_per_host": 101}, "between 0 and 100, not 101"),
        ({"max_per_host": -1}, "at least 0, not -1"),
        ({"reused_ids": ["v[0-9"]}, "reap_reused_ids must be a list of regular expressions, not .*v.0-9"),
        ({"reused_ids": [5]}, "reap_reused_ids must be a list of regular expressions, not .5.:"),
    ],
)
def test_a_policy_that_cannot_be_meant_is_refused_with_its_value(changes, told):
    with pytest.raises(planner.PolicyError, match=told):
        planner.complete_policy(policy(**changes))


def test_without_a_policy_a_filter_does_what_the_role_does_by_default():
    role = yaml.safe_load(DEFAULTS.read_text())
    named = {key: value for key, value in planner.DEFAULT_POLICY.items() if key not in ("realm", "host")}
    assert {key: role["reap_" + key] for key in named} == named


def test_limits_of_a_policy_may_be_meant():
    full = planner.complete_policy(policy(max_percent_per_host=0, max_shrink_percent=100, max_per_host=0))
    assert (full["max_percent_per_host"], full["max_shrink_percent"], full["max_per_host"]) == (0, 100, 0)


def test_numbers_from_a_command_line_are_numbers():
    assert planner.complete_policy(policy(strikes="3"))["strikes"] == {"tombstoned": 3, "absent": 3}


def test_a_complete_policy_is_complete():
    full = planner.complete_policy(policy(keep=["v1 until 2027-01-14", "w*"]))
    assert planner.complete_policy(full) == full


def test_a_pin_ends_with_its_day_in_utc(far_from_greenwich):
    """The moment that counts is that of the sweep, which is the age of the list after the list was made."""
    for generated_at, age, pinned in ((MIDNIGHT - 1, 0.0, True), (MIDNIGHT, 0.0, False), (MIDNIGHT - 50, 100.0, False)):
        seen = share(generated_at=generated_at, age=age)
        result = sweep_twice(thing("cgroup", "v1"), host_share=seen, between=300, keep=["v1 until 2027-01-14"])
        assert (names(result) == []) == pinned


# --- strikes and intents -------------------------------------------------------------------------------------------


def test_the_third_strike_is_as_far_from_the_second_as_that_from_the_first():
    ledger = None
    for now, expected in ((1000, []), (1060, []), (1061, []), (1119, []), (1120, ["v1.cgroup"])):
        result = plan(facts(thing("cgroup", "v1"), now=now, ledger=ledger), strikes=3)
        ledger = remembered(result, ledger)
        assert names(result) == expected


def test_a_name_may_have_spaces():
    ledger = remembered(plan(facts(thing("container", "v1", name="a b c"))))
    result = plan(facts(ledger=ledger, unavailable=["container"]))
    assert result["ledger"]["strikes"] == ledger["strikes"]
    assert ledger["strikes"]["container a b c"]["boot_id"] == BOOT


def test_row_03_a_source_that_is_left_out_for_once_is_not_forgotten():
    ledger = known(count=80, counts={"a": 40, "b": 40})
    without = plan(facts(ledger=ledger), share(count=40, counts={"a": 40}))
    back = plan(facts(ledger=remembered(without, ledger)), share(count=42, counts={"a": 40, "b": 2}))
    assert back["refused"]["code"] == "shrunk"
    assert "source b listed 40 VMs" in back["refused"]["message"]


def test_an_intent_that_is_forgotten_does_not_hide_the_next():
    intent = {"kind": "dm_thin", "vm_id": "v1", "identity": "i", "parent": None, "stop": True, "details": {}}
    begun = [dict(intent, kind="cgroup", name="j"), dict(intent, name="d")]
    assert names(plan(facts(ledger=dict(ledgers.empty(REALM), intents=begun)))) == ["d"]
