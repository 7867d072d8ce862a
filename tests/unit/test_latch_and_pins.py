# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What outlives a sweep: that something of a VM was removed, what a person wants left alone, and whose host it is."""

from __future__ import annotations

import pytest
from ansible_collections.microvm.reaper.plugins.module_utils import acts
from ansible_collections.microvm.reaper.plugins.module_utils import ledger as ledgers
from ansible_collections.microvm.reaper.plugins.module_utils import resource as r
from ansible_collections.microvm.reaper.plugins.plugin_utils import planner
from ansible_collections.microvm.reaper.plugins.plugin_utils.facts import FactsError, unpacked
from unit.builders import (
    HOST,
    REALM,
    facts,
    names,
    outcomes,
    plan,
    policy,
    reasons,
    remembered,
    share,
    sweep_twice,
    thing,
)


def after_reaping(*things, host_share=None, outcome=r.REAPED):
    """Return the ledger of a host on which these things were reaped."""
    result = sweep_twice(*things, host_share=host_share)
    assert result["reap"]
    ledger = remembered(result)
    return acts.settled(ledger, result["reap"], outcomes(result["reap"], outcome), {})


# --- the latch ---------------------------------------------------------------------------------------------------


def test_row_35_a_vm_that_was_reaped_and_lives_latches_until_a_person_clears_it():
    ledger = after_reaping(thing("cgroup", "v1"))
    assert list(ledger["reaped"]) == ["v1"]
    result = plan(facts(thing("cgroup", "v2"), now=5000, ledger=ledger), share(["v1"]))
    assert result["refused"]["code"] == "latched"
    for told in ("v1", "h1", "test", "reap_clear_latch=prod", "reap_reused_ids"):
        assert told in result["refused"]["message"]
    assert (names(result), result["ledger_changed"]) == ([], False)
    # The host is told, and from then on it holds whatever a list says.
    ledger = dict(ledger, latch=result["refused"])
    assert plan(facts(now=6000, ledger=ledger), share())["refused"] == result["refused"]
    cleared = plan(facts(thing("cgroup", "v2"), now=7000, ledger=ledger), share(["v1"]), clear_latch=REALM)
    assert cleared["refused"] is None
    assert (cleared["ledger"]["latch"], cleared["ledger"]["reaped"]) == (None, {})
    assert plan(facts(now=8000, ledger=remembered(cleared, ledger)), share(["v1"]))["refused"] is None


def test_clearing_names_the_realm():
    ledger = dict(ledgers.empty(REALM), latch={"code": "latched", "message": "m"})
    assert plan(facts(ledger=ledger), clear_latch="other")["refused"]["code"] == "latched"


def test_what_was_not_removed_proves_nothing():
    for outcome in (r.ALREADY_GONE, r.DEFERRED, r.FAILED, r.IDENTITY_CHANGED):
        assert after_reaping(thing("cgroup", "v1"), outcome=outcome)["reaped"] == {}


def test_a_vm_that_lived_elsewhere_may_come_back():
    there = share(elsewhere={"v1": ["h2"]})
    assert after_reaping(thing("cgroup", "v1"), host_share=there)["reaped"] == {}


def test_ids_that_are_used_again_do_not_latch():
    ledger = after_reaping(thing("cgroup", "v1"))
    result = plan(facts(now=5000, ledger=ledger), share(["v1"]), reused_ids=["x.*", "v[0-9]"])
    assert result["refused"] is None
    assert result["ledger"]["reaped"] == {}


def test_the_latest_are_remembered(monkeypatch):
    monkeypatch.setattr(ledgers, "MAX_REAPED", 2)
    tokens = [{"kind": "cgroup", "name": "c", "vm_id": "new"}]
    ledger = dict(ledgers.empty(REALM), reaped={"old": 1, "older": 0})
    settled = acts.settled(ledger, tokens, outcomes(tokens), {})
    assert set(settled["reaped"]) == {"new", "old"}


def test_a_host_remembers_ten_thousand():
    tokens = [{"kind": "cgroup", "name": "c", "vm_id": "new"}]
    ledger = dict(ledgers.empty(REALM), reaped={"v%d" % number: number for number in range(10000)})
    reaped = acts.settled(ledger, tokens, outcomes(tokens), {})["reaped"]
    assert len(reaped) == 10000
    assert set(ledger["reaped"]) - set(reaped) == {"v0"}


def test_the_module_remembers_a_latch_once(tmp_path):
    refusal = {"code": "latched", "message": "first"}
    acts.latch(refusal, str(tmp_path / "state"), REALM)
    acts.latch(dict(refusal, message="second"), str(tmp_path / "state"), REALM)
    ledger, problem = ledgers.load(str(tmp_path / "state"), REALM)
    assert (problem, ledger["latch"], ledger["generation"]) == (None, refusal, 1)


# --- pins --------------------------------------------------------------------------------------------------------


NOW = 1_800_000_000  # 2027-01-15, when the share of the tests was made


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("v1", True),
        ("v*", True),
        ("v2", False),
        ("v1 until 2027-01-15", True),
        ("v1 until 2027-01-14", False),
        ("  v1   until  2099-12-31 ", True),
    ],
)
def test_a_pin_holds_until_its_day_is_over(text, holds):
    by_policy = sweep_twice(thing("cgroup", "v1"), keep=[text])
    assert (names(by_policy) == []) == holds
    ledger = remembered(plan(facts(thing("cgroup", "v1"))))
    by_host = plan(facts(thing("cgroup", "v1"), now=1060, ledger=ledger, pins=[text]))
    assert (names(by_host) == []) == holds
    if holds:
        assert reasons(by_policy, "v1") == reasons(by_host, "v1") == {"pinned"}
        assert "reap_keep" in by_policy["families"]["v1"]["reasons"][0]["text"]
        assert "pin file" in by_host["families"]["v1"]["reasons"][0]["text"]


@pytest.mark.parametrize("text", ["v1 until tomorrow", "v1 forever", "v1 until", "", 5, None, ["v1"]])
def test_a_pin_of_the_policy_that_cannot_be_understood_is_refused(text):
    with pytest.raises(planner.PolicyError, match="reap_keep"):
        planner.complete_policy(policy(keep=[text]))


def test_a_pin_file_with_tabs_and_worse_pins_all_the_same(tmp_path):
    (tmp_path / "keep").write_bytes(b"v1\tuntil  2100-01-01\nv\x07 # bell\n\t\n")
    lines = ledgers.pins(str(tmp_path))
    assert lines == ["v1 until 2100-01-01", "v?"]
    ledger = remembered(plan(facts(thing("cgroup", "v1"), thing("cgroup", "v2"))))
    again = unpacked(facts(thing("cgroup", "v1"), thing("cgroup", "v2"), now=1060, ledger=ledger, pins=lines))
    assert names(plan(again)) == []


def test_a_pin_that_is_blank_is_refused():
    with pytest.raises(FactsError, match="'pins' is no list of texts"):
        unpacked(facts(pins=["v1", " "]))


def test_a_line_of_a_pin_file_that_cannot_be_understood_pins_all_the_same():
    ledger = remembered(plan(facts(thing("cgroup", "v1"))))
    assert names(plan(facts(thing("cgroup", "v1"), now=1060, ledger=ledger, pins=["v1 unitl 2020-01-01"]))) == []


def test_the_pin_file(tmp_path):
    assert ledgers.pins(str(tmp_path)) == []
    (tmp_path / "keep").write_bytes(b"# why\n\nv1\n v2* until 2030-01-01 # ticket 7\n\xff\n")
    assert ledgers.pins(str(tmp_path)) == ["v1", "v2* until 2030-01-01", "\ufffd"]
    (tmp_path / "keep").unlink()
    (tmp_path / "keep").symlink_to("/etc/passwd")
    with pytest.raises(ledgers.LedgerError, match="keep"):
        ledgers.pins(str(tmp_path))


# --- whose host it is --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ledger", "changes", "code"),
    [
        ({"machine_id": "m0"}, {}, "machine_id_changed"),
        ({"host": "h0"}, {}, "host_renamed"),
        ({}, {"other_realms": ["staging"]}, "realm_changed"),
    ],
)
def test_row_05_a_host_is_bound_until_it_is_adopted(ledger, changes, code):
    known = dict(ledgers.empty(REALM), **ledger)
    bound = facts(thing("cgroup", "v1"), ledger=known, **changes)
    assert plan(bound)["refused"]["code"] == code
    assert "reap_adopt_host" in plan(bound)["refused"]["message"]
    adopted = plan(bound, adopt_host=True)
    assert adopted["refused"] is None
    assert (adopted["ledger"]["machine_id"], adopted["ledger"]["host"]) == ("m1", "h1")


def test_a_host_of_two_realms_is_adopted_once():
    known = dict(ledgers.empty(REALM), generation=1, host=HOST)
    assert plan(facts(thing("cgroup", "v1"), ledger=known, other_realms=["staging"]))["refused"] is None


def test_other_realms_are_those_with_a_ledger(tmp_path):
    for realm in ("a", "b"):
        ledgers.save(str(tmp_path), realm, ledgers.empty(realm))
    (tmp_path / "c").mkdir()
    (tmp_path / "bad name").mkdir()
    assert ledgers.other_realms(str(tmp_path), "a") == ["b"]
    assert ledgers.other_realms(str(tmp_path / "missing"), "a") == []


def test_row_05_a_latch_of_its_batch_binds_a_host_to_no_realm():
    latched_by_others = dict(ledgers.empty(REALM), generation=1)
    result = plan(facts(thing("cgroup", "v1"), ledger=latched_by_others, other_realms=["staging"]))
    assert result["refused"]["code"] == "realm_changed"


def test_row_04_a_stale_copy_latches_nothing():
    seen = {"epochs": {"cp": 9}, "count": 5, "counts": {}}
    ledger = dict(ledgers.empty(REALM), generation=1, host=HOST, reaped={"v1": 1_799_999_000}, manifest=seen)
    assert plan(facts(ledger=ledger), share(live=["v1"], epochs={"cp": 8}))["refused"]["code"] == "epoch_went_back"
    assert plan(facts(ledger=ledger), share(live=["v1"], epochs={"cp": 9}))["refused"]["code"] == "latched"
    # One that holds is told first, whatever the list.
    held = dict(ledger, latch={"code": "latched", "message": "m"})
    assert plan(facts(ledger=held), share(epochs={"cp": 8}))["refused"]["message"] == "m"


def test_row_35_a_reaped_vm_that_lives_elsewhere_latches_too():
    ledger = dict(ledgers.empty(REALM), generation=1, host=HOST, reaped={"v1": 1_799_999_000})
    result = plan(facts(ledger=ledger), share(elsewhere={"v1": ["h7", "h9"]}))
    assert result["refused"]["code"] == "latched" and "lists it on h7, h9 now" in result["refused"]["message"]
    here = plan(facts(ledger=ledger), share(live=["v1"]))
    assert "lists it on this host now" in here["refused"]["message"]
    cleared = plan(facts(ledger=ledger), share(elsewhere={"v1": ["h7"]}), clear_latch=REALM)
    assert (cleared["refused"], cleared["ledger"]["reaped"]) == (None, {})
    assert plan(facts(ledger=ledger), share(elsewhere={"v2": ["h7"]}))["refused"] is None
