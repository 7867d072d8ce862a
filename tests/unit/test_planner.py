# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The decision. ``test_row_N_...`` are named after the rows of the table of failures in the documentation."""

from __future__ import annotations

import json
import random

import pytest
from ansible_collections.microvm.reaper.plugins.module_utils import acts, all_kinds
from ansible_collections.microvm.reaper.plugins.module_utils import ledger as ledgers
from ansible_collections.microvm.reaper.plugins.module_utils import resource as r
from ansible_collections.microvm.reaper.plugins.plugin_utils import planner
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.builders import (
    HOST,
    REALM,
    TRAITS,
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
    verdicts,
)


def test_the_traits_of_the_tests_are_those_of_the_kinds():
    assert all_kinds.TRAITS == TRAITS


def test_an_orphan_goes_after_two_strikes():
    first = plan(facts(thing("cgroup", "v1")))
    assert (names(first), verdicts(first)) == ([], {"v1.cgroup": "suspected"})
    second = plan(facts(thing("cgroup", "v1"), now=1060, ledger=remembered(first)))
    assert (names(second), verdicts(second)) == (["v1.cgroup"], {"v1.cgroup": "confirmed"})
    assert second["families"]["v1"]["strikes"] == 2
    assert reasons(second, "v1") == {"absent"}


def test_three_strikes_when_the_policy_asks_for_three():
    ledger = None
    for now, expected in ((1000, []), (1060, []), (1120, ["v1.cgroup"])):
        result = plan(facts(thing("cgroup", "v1"), now=now, ledger=ledger), strikes=3)
        ledger = remembered(result, ledger)
        assert names(result) == expected


def test_a_token_says_all_that_the_act_has_to_compare():
    result = sweep_twice(thing("cgroup", "v1", in_use=True, details={"a": 1}, parent="p"), running="confirmed")
    assert result["reap"] == [
        {
            "kind": "cgroup",
            "name": "v1.cgroup",
            "vm_id": "v1",
            "identity": "id of v1.cgroup",
            "parent": "p",
            "evidence": "absent",
            "step": "remove",
            "stop": True,
            "details": {"a": 1},
            "bytes": None,
        }
    ]


# --- refusals ----------------------------------------------------------------------------------------------------


def refused(result):
    """Return the code of a refusal, having checked that a refused host is left as it is."""
    assert result["reap"] == []
    assert result["ledger_changed"] is False
    return result["refused"] and result["refused"]["code"]


def struck(*things, **changes):
    """Return the ledger of a host that has seen these things once."""
    ledger = remembered(plan(facts(*things)))
    return dict(ledger, **changes)


def test_row_01_an_empty_list_is_blindness_and_not_an_empty_realm():
    orphan = thing("cgroup", "v1")
    ledger = struck(orphan)
    result = plan(facts(orphan, now=1060, ledger=ledger), share(count=0))
    assert refused(result) == "blind"
    assert result["ledger"]["strikes"] == ledger["strikes"]
    assert result["counts"]["cgroup"]["unknown"] == 1
    assert refused(plan(facts(orphan, now=1060, ledger=ledger), share(count=0), expect_empty="other")) == "blind"
    assert names(plan(facts(orphan, now=1060, ledger=ledger), share(count=0), expect_empty=REALM)) == ["v1.cgroup"]


def test_row_01_a_host_without_anything_does_not_learn_from_an_empty_list():
    ledger = dict(ledgers.empty(REALM), generation=1, manifest={"epochs": {}, "count": 500, "counts": {}})
    result = plan(facts(ledger=ledger), share(count=0, proven=False), max_shrink_percent=100)
    assert result["refused"] is None
    assert result["ledger"]["manifest"]["count"] == 500
    result = plan(facts(ledger=ledger), share(count=400, proven=False))
    assert result["ledger"]["manifest"]["count"] == 500
    result = plan(facts(ledger=ledger), share(count=0), expect_empty=REALM)
    assert result["ledger"]["manifest"]["count"] == 0


def test_row_02_an_unproven_list_earns_strikes_and_never_a_reap():
    orphan, unproven = thing("cgroup", "v1"), share(proven=False)
    result = sweep_twice(orphan, host_share=unproven)
    assert (names(result), verdicts(result)) == ([], {"v1.cgroup": "suspected"})
    assert "unproven" in reasons(result, "v1")
    assert result["ledger"]["strikes"]["cgroup v1.cgroup"]["strikes"] == 2
    assert names(plan(facts(orphan, now=1120, ledger=remembered(result)))) == ["v1.cgroup"]


def test_row_03_a_list_that_shrank_freezes_the_sweep():
    orphan = thing("cgroup", "v1")
    ledger = struck(orphan, manifest={"epochs": {}, "count": 100, "counts": {}})
    result = plan(facts(orphan, now=1060, ledger=ledger), share(count=49))
    assert refused(result) == "shrunk"
    assert result["ledger"]["strikes"] == ledger["strikes"]
    assert names(plan(facts(orphan, now=1060, ledger=ledger), share(count=50))) == ["v1.cgroup"]
    assert names(plan(facts(orphan, now=1060, ledger=ledger), share(count=49), max_shrink_percent=51)) == ["v1.cgroup"]


def test_row_03_a_handful_of_vms_may_go():
    ledger = struck(manifest={"epochs": {}, "count": 10, "counts": {}})
    assert plan(facts(ledger=ledger), share(count=1))["refused"] is None
    ledger = struck(manifest={"epochs": {}, "count": 11, "counts": {}})
    assert plan(facts(ledger=ledger), share(count=1))["refused"]["code"] == "shrunk"


def test_row_04_a_lower_epoch_is_never_accepted():
    orphan = thing("cgroup", "v1")
    ledger = struck(orphan, manifest={"epochs": {"a": 7, "b": 2}, "count": 2, "counts": {}})
    assert refused(plan(facts(orphan, now=1060, ledger=ledger), share(epochs={"a": 6, "b": 3}))) == "epoch_went_back"
    assert refused(plan(facts(orphan, now=1060, ledger=ledger), share(epochs={"a": 8, "b": 1}))) == "epoch_went_back"
    result = plan(facts(orphan, now=1060, ledger=ledger), share(epochs={"a": 7, "c": 1}))
    assert names(result) == ["v1.cgroup"]
    assert result["ledger"]["manifest"]["epochs"] == {"a": 7, "b": 2, "c": 1}


@pytest.mark.parametrize(
    ("code", "changed_facts", "changed_share", "changed_ledger"),
    [
        ("other_realm", {"realm": "staging"}, {}, {}),
        ("other_realm", {}, {"realm": "staging"}, {}),
        ("machine_id_changed", {}, {}, {"machine_id": "m2"}),
        ("machine_id_changed", {"machine_id": None}, {}, {}),
        ("host_renamed", {}, {}, {"host": "h2"}),
        ("host_unknown", {}, {"host_known": False}, {}),
    ],
)
def test_row_05_a_host_that_is_not_the_one_is_refused(code, changed_facts, changed_share, changed_ledger):
    orphan = thing("cgroup", "v1")
    ledger = struck(orphan, **changed_ledger)
    result = plan(facts(orphan, now=1060, ledger=ledger, **changed_facts), share(**changed_share))
    assert refused(result) == code
    assert names(plan(facts(orphan, now=1060, ledger=struck(orphan)))) == ["v1.cgroup"]


def test_row_05_what_has_nothing_of_vms_need_not_be_known():
    assert plan(facts(), share(host_known=False))["refused"] is None


def test_row_34_a_cap_stops_the_plan_and_does_not_shorten_it():
    orphans = [thing("cgroup", "v%d" % number) for number in range(4)]
    assert len(names(sweep_twice(*orphans, max_per_host=4))) == 4
    result = sweep_twice(*orphans, max_per_host=3)
    assert refused(result) == "host_cap"
    assert "4 VMs" in result["refused"]["message"]
    assert result["counts"]["cgroup"]["reap"] == 4


def test_row_34_percentages_say_nothing_about_a_handful():
    orphans = [thing("cgroup", "v%02d" % number) for number in range(11)]
    assert len(names(sweep_twice(*orphans[:10], max_percent_per_host=50))) == 10
    assert refused(sweep_twice(*orphans, max_percent_per_host=50)) == "host_cap"
    lives = [thing("cgroup", "w%02d" % number) for number in range(11)]
    alive = share(live=[one["vm_id"] for one in lives])
    assert len(names(sweep_twice(*orphans, *lives, host_share=alive, max_percent_per_host=50))) == 11
    assert refused(sweep_twice(*orphans, *lives, host_share=alive, max_percent_per_host=49)) == "host_cap"


def test_row_34_caps_count_vms_and_what_is_finished_for_an_earlier_reaper():
    family = [thing(kind, "v1") for kind in ("cgroup", "jail", "dm_thin")]
    assert len(names(sweep_twice(*family, max_per_host=1))) == 3
    intents = [dict(half_removed(), name="d%d" % n, vm_id="v%d" % n) for n in range(11)]
    ledger = dict(ledgers.empty(REALM), intents=intents)
    assert refused(plan(facts(ledger=ledger), max_per_host=10)) == "host_cap"
    assert refused(plan(facts(ledger=ledger), max_percent_per_host=99)) == "host_cap"


# --- strikes -----------------------------------------------------------------------------------------------------


def test_row_06_strikes_are_apart_by_the_boot_clock():
    orphan = thing("cgroup", "v1")
    assert names(sweep_twice(orphan, between=59.9)) == []
    assert names(sweep_twice(orphan, between=60)) == ["v1.cgroup"]
    assert names(sweep_twice(orphan, between=299, strike_interval=300)) == []
    assert names(sweep_twice(orphan, between=-500)) == []
    assert names(sweep_twice(orphan, between=0, strike_interval=0, min_age=0)) == []


def test_row_07_reboot_between_strikes():
    volatile, lasting = thing("cgroup", "v1", identity="boot-1 5"), thing("jail", "v2")
    ledger = struck(volatile, lasting)
    after = (thing("cgroup", "v1", identity="boot-2 5"), lasting)
    # The boot clock began anew, so what was counted on the old one must not be compared with it.
    early = plan(facts(*after, now=59, boot="boot-2", ledger=ledger))
    assert names(early) == []
    assert names(plan(facts(*after, now=60, boot="boot-2", ledger=remembered(early)))) == ["v2.jail"]
    assert names(plan(facts(*after, now=5000, boot="boot-2", ledger=ledger))) == ["v2.jail"]
    confirmed = remembered(sweep_twice(lasting), ledger)
    assert names(plan(facts(lasting, now=299, boot="boot-2", ledger=confirmed), strike_interval=300)) == []
    assert names(plan(facts(lasting, now=30, boot="boot-2", ledger=confirmed))) == []


def test_row_08_what_is_young_is_held_without_a_strike():
    result = sweep_twice(thing("cgroup", "v1", age=59.0))
    assert (names(result), reasons(result, "v1")) == ([], {"too_young"})
    assert result["ledger"]["strikes"] == {}


def test_row_08_one_young_member_holds_the_family():
    result = sweep_twice(thing("cgroup", "v1"), thing("jail", "v1", age=1.0))
    assert set(verdicts(result).values()) == {"held"}


def test_row_08_unknown_age_counts_from_when_it_was_first_seen():
    orphan = thing("cgroup", "v1", age=None)
    assert names(sweep_twice(orphan, min_age=61, between=60)) == []
    assert names(sweep_twice(orphan, min_age=61, between=61)) == ["v1.cgroup"]


def test_row_08_a_list_knows_nothing_of_what_came_after_it():
    """A list that is made every ten minutes does not name a VM that began since, in however many sweeps."""
    aged = share(age=500.0)
    newborn = sweep_twice(thing("cgroup", "v1", age=400.0), host_share=aged)
    assert (names(newborn), reasons(newborn, "v1")) == ([], {"too_young"})
    assert names(sweep_twice(thing("cgroup", "v1", age=None), host_share=aged, between=500)) == []
    assert names(sweep_twice(thing("cgroup", "v1", age=None), host_share=aged, between=560)) == ["v1.cgroup"]
    assert names(sweep_twice(thing("cgroup", "v1", age=560.0), host_share=aged, between=560)) == ["v1.cgroup"]


def test_row_09_what_was_destroyed_a_moment_ago_is_left_to_its_platform():
    result = sweep_twice(thing("cgroup", "v1"), host_share=share(tombstones={"v1": 59.0}))
    assert (names(result), reasons(result, "v1")) == ([], {"recently_destroyed"})
    assert names(sweep_twice(thing("cgroup", "v1"), host_share=share(tombstones={"v1": 60.0}))) == ["v1.cgroup"]
    assert names(sweep_twice(thing("cgroup", "v1"), host_share=share(tombstones={"v1": None}))) == ["v1.cgroup"]


def test_row_10_what_lives_here_is_left_alone_and_what_lives_elsewhere_is_not():
    left_behind, at_home = thing("cgroup", "v1"), thing("cgroup", "v2")
    result = sweep_twice(left_behind, at_home, host_share=share(live=["v2"], elsewhere={"v1": ["h2", "h3"]}))
    assert names(result) == ["v1.cgroup"]
    assert result["families"]["v1"]["reasons"] == [
        {"code": "elsewhere", "text": "the VM lives on h2, h3, not here"},
    ]
    assert "v2" not in result["families"]
    assert result["vms"]["live"] == 1


def test_row_11_a_live_id_protects_all_that_has_it():
    old, new = thing("jail", "v1", name="old"), thing("jail", "v1", name="new")
    assert names(sweep_twice(old, new, host_share=share(live=["v1"]))) == []


def test_row_11_seen_live_in_between_clears_the_strikes():
    orphan = thing("cgroup", "v1")
    seen_live = plan(facts(orphan, now=1060, ledger=struck(orphan)), share(live=["v1"]))
    assert seen_live["ledger"]["strikes"] == {}
    assert names(plan(facts(orphan, now=1120, ledger=remembered(seen_live)))) == []


def test_row_14_and_19_made_again_with_the_same_name_is_another_object():
    for kind in ("cgroup", "dm_thin"):
        result = sweep_twice(thing(kind, "v1"), again=[thing(kind, "v1", identity="other inode, other diskseq")])
        assert names(result) == []
        assert result["ledger"]["strikes"]["%s v1.%s" % (kind, kind)]["strikes"] == 1


def test_row_26_a_container_made_again_with_the_same_id():
    result = sweep_twice(thing("container", "v1"), again=[thing("container", "v1", identity="other CreatedAt")])
    assert names(result) == []


def test_the_same_object_under_another_id_starts_again():
    """The rules that make ids of names were changed between the sweeps."""
    result = sweep_twice(thing("cgroup", "v1", name="n"), again=[thing("cgroup", "v2", name="n", identity="id of n")])
    assert names(result) == []


def test_a_new_member_keeps_the_family_waiting():
    result = sweep_twice(thing("cgroup", "v1"), again=[thing("cgroup", "v1"), thing("jail", "v1")])
    assert (names(result), set(verdicts(result).values())) == ([], {"suspected"})


def test_strikes_of_what_is_gone_are_forgotten():
    assert plan(facts(ledger=struck(thing("cgroup", "v1"))))["ledger"]["strikes"] == {}


# --- kinds that could not be read ----------------------------------------------------------------------------------


def test_row_27_containerd_down_stops_what_depends_on_it_and_nothing_else():
    family = [thing(kind, "v1") for kind in ("container", "snapshot", "dm_thin", "cgroup", "jail")]
    before = struck(*family)
    visible = [one for one in family if one["kind"] != "container"]
    result = plan(facts(*visible, now=1060, ledger=before, unavailable=["container"]))
    assert names(result) == ["v1.jail", "v1.cgroup"]
    assert {name for name, verdict in verdicts(result).items() if verdict == "unknown"} == {"v1.snapshot", "v1.dm_thin"}
    unseen = "container v1.container"
    assert result["ledger"]["strikes"][unseen] == before["strikes"][unseen]
    # Absent is an answer: there is no containerd here.
    assert names(plan(facts(*visible, now=1060, ledger=before, absent=["container"]))) == [
        "v1.snapshot",
        "v1.jail",
        "v1.dm_thin",
        "v1.cgroup",
    ]


def test_row_27_strikes_of_an_unread_kind_are_kept_unless_the_vm_is_live():
    ledger = struck(thing("container", "v1"), thing("container", "v2"))
    result = plan(facts(ledger=ledger, unavailable=["container"]), share(live=["v2"]))
    assert list(result["ledger"]["strikes"]) == ["container v1.container"]


def test_row_27_a_new_member_that_is_seen_holds_the_family_even_if_it_cannot_be_judged():
    before = struck(thing("cgroup", "v1"), thing("dm_thin", "v1"))
    again = [thing("cgroup", "v1"), thing("dm_thin", "v1", identity="another")]
    assert names(plan(facts(*again, now=1060, ledger=before, unavailable=["container"]))) == []


def test_a_family_of_which_nothing_could_be_judged_loses_nothing():
    assert names(sweep_twice(thing("snapshot", "v1"))) == ["v1.snapshot"]
    ledger = struck(thing("snapshot", "v1"))
    result = plan(facts(thing("snapshot", "v1"), now=1060, ledger=ledger, unavailable=["container"]))
    assert (names(result), verdicts(result)) == ([], {"v1.snapshot": "unknown"})


def test_row_33_hosts_are_judged_one_by_one():
    """Nothing of another host is in a plan's inputs, so one that did not answer cannot change it."""
    assert sweep_twice(thing("cgroup", "v1"))["host"] == HOST


# --- what runs, what is held ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("running", "tombstones", "proven", "reaped"),
    [
        ("never", {"v1": 900.0}, True, False),
        ("tombstoned", {"v1": 900.0}, True, True),
        ("tombstoned", {}, True, False),
        ("confirmed", {}, True, True),
        ("confirmed", {"v1": 900.0}, True, True),
        ("confirmed", {"v1": 900.0}, False, False),
        ("tombstoned", {"v1": 900.0}, False, False),
    ],
)
def test_row_15_what_runs_dies_by_policy_only(running, tombstones, proven, reaped):
    family = [thing("cgroup", "v1", in_use=True), thing("jail", "v1")]
    result = sweep_twice(*family, host_share=share(tombstones=tombstones, proven=proven), running=running)
    assert names(result) == (["v1.jail", "v1.cgroup"] if reaped else [])
    assert [token["stop"] for token in result["reap"]] == ([False, True] if reaped else [])
    if not reaped:
        assert set(verdicts(result).values()) == {"disputed"}
        assert reasons(result, "v1") == {"running"}
        assert result["ledger"]["strikes"] == {}


def test_row_20_in_use_by_nothing_that_could_be_stopped():
    result = sweep_twice(thing("dm_thin", "v1", in_use=True), thing("jail", "v1"), running="confirmed")
    assert (names(result), reasons(result, "v1")) == (["v1.jail"], {"absent", "busy"})


def test_in_use_by_a_cgroup_that_is_stopped_first():
    family = [thing("dm_thin", "v1", in_use=True), thing("cgroup", "v1", in_use=True)]
    assert names(sweep_twice(*family, running="confirmed")) == ["v1.dm_thin", "v1.cgroup"]


def test_in_use_by_a_cgroup_that_is_itself_held():
    stuck = thing("cgroup", "v1", in_use=True, holders=[r.holder("process", "a shell of somebody")])
    result = sweep_twice(thing("dm_thin", "v1", in_use=True), stuck, running="confirmed")
    assert (names(result), reasons(result, "v1")) == ([], {"absent", "busy", "process"})


def held_by(one):
    return [r.holder(one["kind"], one["name"], kind=one["kind"])]


def test_row_25_holders_count_unless_they_go_themselves():
    container = thing("container", "v1")
    snapshot = thing("snapshot", "v1", holders=held_by(container))
    assert names(sweep_twice(container, snapshot)) == ["v1.container", "v1.snapshot"]
    leased = thing("snapshot", "v1", holders=[*held_by(container), r.holder("lease", "l1")])
    result = sweep_twice(container, leased)
    assert (names(result), reasons(result, "v1")) == (["v1.container"], {"absent", "lease"})
    # A holder that only looks like a resource that goes: without a kind it is none.
    assert names(sweep_twice(container, thing("snapshot", "v1", holders=[r.holder("container", "v1.container")]))) == [
        "v1.container"
    ]


def test_what_is_held_holds_in_turn():
    live = thing("container", "w")
    leaf = thing("snapshot", "v1", name="leaf", parent="middle", holders=held_by(live))
    middle = thing("snapshot", "v2", name="middle", parent="root", holders=held_by(leaf))
    root = thing("snapshot", "v3", name="root", holders=held_by(middle))
    result = sweep_twice(live, leaf, middle, root, host_share=share(live=["w"]))
    assert (names(result), verdicts(result)) == ([], {"leaf": "held", "middle": "held", "root": "held"})
    assert names(sweep_twice(live, leaf, middle, root)) == ["w.container", "leaf", "middle", "root"]


def test_what_is_busy_holds_too():
    busy = thing("dm_thin", "v1", in_use=True)
    other = thing("snapshot", "v2", holders=held_by(busy))
    assert names(sweep_twice(busy, other, running="confirmed")) == []


@pytest.mark.timeout(10)
def test_a_chain_of_ten_thousand_holders_is_no_matter():
    chain = [thing("snapshot", "v1", name="s0", holders=[r.holder("lease", "l")])]
    for number in range(1, 10000):
        chain.append(thing("snapshot", "v1", name="s%d" % number, holders=held_by(chain[-1])))
    assert names(sweep_twice(*chain)) == []


def test_strikes_may_depend_on_the_evidence():
    ledger, decided = ledgers.empty(REALM), []
    host_share = share(tombstones={"v1": 9000.0})
    for now in (1000.0, 1060.0, 1120.0, 1180.0):
        result = plan(facts(thing("cgroup", "v1"), thing("cgroup", "v2"), now=now, ledger=ledger), host_share,
                      strikes={"absent": 4})
        decided.append(names(result))
        ledger = remembered(result, ledger)
    assert decided == [[], ["v1.cgroup"], ["v1.cgroup"], ["v1.cgroup", "v2.cgroup"]]


def test_row_03_one_of_several_sources_that_falls_silent_is_noticed():
    remembered_counts = {"a": 40, "b": 40, "c": 3}
    ledger = struck(thing("cgroup", "v1"), manifest={"epochs": {}, "count": 83, "counts": remembered_counts})
    quiet = {"count": 78, "counts": {"a": 40, "b": 35, "c": 3}}
    result = plan(facts(ledger=ledger), share(**quiet))
    assert result["refused"] is None
    assert result["ledger"]["manifest"]["counts"] == quiet["counts"]
    silent = plan(facts(ledger=ledger), share(count=75, counts={"a": 40, "b": 0, "c": 35}))
    assert silent["refused"]["code"] == "shrunk" and "source b listed 40" in silent["refused"]["message"]
    # A source that is not there any more, or that never listed more than a handful, proves nothing.
    assert plan(facts(ledger=ledger), share(count=80, counts={"a": 80, "c": 0}))["refused"] is None
    unproven = plan(facts(ledger=ledger), share(count=80, counts={"a": 80}, proven=False))
    assert unproven["ledger"]["manifest"]["counts"] == remembered_counts


def test_row_18_zombies_by_policy():
    zombie = thing("zombie", "v1", parent="pid 7", in_use=False)
    assert names(sweep_twice(zombie)) == ["v1.zombie"]
    result = sweep_twice(zombie, zombies="report")
    assert (names(result), reasons(result, "v1")) == ([], {"absent", "zombie"})
    (left,) = result["families"]["v1"]["resources"]
    note = {"unit": None, "container": None, "image": None, "note": "reap_zombies is report"}
    assert left["holders"] == [dict(r.holder("process", "pid 7"), **note)]


def zombie_of(**details):
    parent = dict({"parent": "7 keeper", "parent_unit": None, "parent_vm": None, "parent_container": None}, **details)
    return thing("zombie", "v1", parent="7", details=parent)


@pytest.mark.parametrize("hostile", [{}, {"parent_unit": 7, "parent": ["x"], "parent_vm": {}}, {"parent_unit": "x"}])
@pytest.mark.parametrize("zombies", planner.ZOMBIE_POLICIES)
def test_row_36_a_host_may_say_anything_of_a_parent(hostile, zombies):
    zombie = thing("zombie", "v1", parent="7", details=hostile)
    sweep_twice(zombie, thing("cgroup", "v1", in_use=True), running="confirmed", zombies=zombies,
                zombies_restart_units=["x.service"])


@pytest.mark.parametrize(
    ("patterns", "unit", "running", "way"),
    [
        (["keeper.service"], "keeper.service", "never", {"unit": "keeper.service", "may_end": False}),
        (["x", "keep*@*.service"], "keeper@1.service", "confirmed", {"unit": "keeper@1.service", "may_end": True}),
        (["keeper.service"], "keeper.service", "tombstoned", {"unit": "keeper.service", "may_end": False}),
        (["keeper"], "keeper.service", "never", None),
        (["KEEPER.service"], "keeper.service", "never", None),
        (["*"], None, "never", None),
        (["*"], 7, "never", None),
    ],
)
def test_row_18_only_a_unit_that_is_named_may_be_restarted(patterns, unit, running, way):
    zombie = zombie_of(parent_unit=unit)
    result = sweep_twice(zombie, zombies="restart_unit", zombies_restart_units=patterns, running=running)
    added = dict(way, how="restart_unit") if way else {}
    assert [token["details"] for token in result["reap"]] == [dict(zombie["details"], **added)]
    # The list alone allows nothing.
    result = sweep_twice(zombie, zombies_restart_units=patterns, running=running)
    assert [token["details"] for token in result["reap"]] == [zombie["details"]]


STOPPED = thing("cgroup", "v1", in_use=True)
TASK = thing("container", "v1", in_use=True, details={"id": "c1"})
INSIDE = {"parent_vm": "v1"}


@pytest.mark.parametrize(
    ("details", "others", "goes"),
    [
        (INSIDE, [STOPPED], True),
        ({"parent_container": "c1"}, [TASK], True),
        ({"parent_container": "c2"}, [TASK], False),
        ({"parent_container": None}, [thing("container", "v1", in_use=True)], False),
        ({"parent_vm": "v2"}, [STOPPED, thing("cgroup", "v2", in_use=True)], False),
        ({}, [STOPPED], False),
        (INSIDE, [thing("cgroup", "v1")], False),
        (INSIDE, [thing("jail", "v1", in_use=True)], False),
        (INSIDE, [], False),
        # What would be stopped stays for a reason of its own.
        (INSIDE, [thing("cgroup", "v1", in_use=True, holders=[r.holder("systemd_unit", "x.scope")])], False),
    ],
)
def test_row_18_zombies_go_with_the_parent_that_is_stopped_with_their_vm(details, others, goes):
    zombie = zombie_of(**details)
    result = sweep_twice(zombie, *others, zombies="with_family", running="confirmed")
    assert ("v1.zombie" in names(result)) == goes
    if goes:
        assert names(result)[-1] == "v1.zombie"
        assert result["reap"][-1]["details"] == dict(zombie["details"], how="with_family")
    else:
        (left,) = [one for one in result["families"]["v1"]["resources"] if one["kind"] == "zombie"]
        assert left["verdict"] == "held"
        assert left["reasons"][0]["code"] == "zombie"
        assert left["reasons"][0]["text"].startswith("its parent 7 keeper")
        assert "is not stopped by this plan" in left["reasons"][0]["text"]


@pytest.mark.parametrize(("zombies", "goes"), [("with_family", True), ("notify_parent", False)])
@pytest.mark.parametrize("age", [1.0, None])
def test_what_makes_new_zombies_all_the_time_goes_when_its_zombies_go_with_it(zombies, goes, age):
    def new(number):
        return thing("zombie", "v1", name=str(number), age=age, parent="7", details=INSIDE)

    result = sweep_twice(STOPPED, new(1), again=(STOPPED, new(2)), zombies=zombies, running="confirmed")
    assert ("v1.cgroup" in names(result)) == goes


def test_zombies_do_not_make_their_family_go_sooner():
    """It is judged by the rest of it, as if there were no zombies."""
    old, young = zombie_of(**INSIDE), thing("cgroup", "v1", in_use=True, age=1.0)
    for one in (young, STOPPED):
        rules = {"zombies": "with_family", "running": "confirmed", "between": 59.0}
        assert names(sweep_twice(old, one, **rules)) == names(sweep_twice(one, **rules)) == []
    assert names(sweep_twice(old, STOPPED, zombies="with_family", running="never")) == []
    live = sweep_twice(old, STOPPED, zombies="with_family", running="confirmed", host_share=share(live=["v1"]))
    assert names(live) == []


def test_pins():
    result = sweep_twice(thing("cgroup", "v1"), thing("cgroup", "v2"), thing("cgroup", "w"), keep=["v*"])
    assert (names(result), reasons(result, "v1")) == (["w.cgroup"], {"pinned"})


# --- order and intents -----------------------------------------------------------------------------------------------


def test_the_order_of_removal():
    things = [thing(kind, "v1") for kind in sorted(TRAITS)]
    things += [
        thing("snapshot", "v2", name="a", parent=None),
        thing("snapshot", "v2", name="b", parent="a"),
        thing("snapshot", "v2", name="c", parent="b"),
        thing("snapshot", "v3", name="0", parent="a"),
    ]
    random.Random(7).shuffle(things)
    assert names(sweep_twice(*things)) == [
        "v1.container",
        "c",
        "0",
        "b",
        "a",
        "v1.snapshot",
        "v1.jail",
        "v1.dm_thin",
        "v1.cgroup",
        "v1.zombie",
    ]


def test_a_circle_of_parents_ends():
    ring = [thing("snapshot", "v1", name=name, parent=parent) for name, parent in (("a", "b"), ("b", "a"))]
    assert names(sweep_twice(*ring)) == ["a", "b"]


def half_removed(kind="dm_thin"):
    return {
        "kind": kind,
        "name": "v1.%s" % kind,
        "vm_id": "v1",
        "identity": "i",
        "parent": None,
        "stop": True,
        "details": {"thin_id": 5},
    }


def with_intent(**changes):
    return dict(ledgers.empty(REALM), host=HOST, machine_id="m1", intents=[dict(half_removed(), **changes)])


def test_row_30_what_an_earlier_reaper_began_is_finished():
    result = plan(facts(ledger=with_intent()))
    assert result["reap"] == [dict(half_removed(), stop=False, resume=True)]
    assert result["ledger"]["intents"] == []


def test_row_30_a_kind_that_shows_all_it_has_needs_no_intent():
    result = plan(facts(ledger=dict(ledgers.empty(REALM), intents=[half_removed("cgroup")])))
    assert (result["reap"], result["ledger"]["intents"]) == ([], [])


def test_row_30_what_is_still_there_is_judged_anew():
    result = plan(facts(thing("dm_thin", "v1", identity="i"), ledger=with_intent()))
    assert (names(result), result["ledger"]["intents"]) == ([], [])


def test_row_30_an_intent_waits_while_another_object_has_its_name():
    ledger = with_intent(identity="another volume")
    first = plan(facts(thing("dm_thin", "v1"), ledger=ledger))
    second = plan(facts(thing("dm_thin", "v1"), ledger=remembered(first, ledger), now=1060))
    assert names(second) == ["v1.dm_thin"]
    assert second["ledger"]["intents"] == ledger["intents"]


@pytest.mark.parametrize(
    ("things", "changed_share", "changed_policy", "changed_facts"),
    [
        ([], {}, {}, {"unavailable": ["dm_thin"]}),
        ([], {}, {}, {"unavailable": ["container"]}),
        ([], {}, {}, {"absent": ["dm_thin"]}),
        ([], {"live": ["v1"]}, {}, {}),
        ([], {"proven": False}, {}, {}),
        ([], {}, {"keep": ["v1"]}, {}),
        ([thing("cgroup", "v1", age=1.0)], {}, {}, {}),
        ([thing("cgroup", "v1", in_use=True)], {}, {}, {}),
        ([thing("cgroup", "v1")], {}, {}, {}),
    ],
)
def test_row_30_an_intent_waits_where_the_rest_of_the_vm_would(things, changed_share, changed_policy, changed_facts):
    result = plan(facts(*things, ledger=with_intent(), **changed_facts), share(**changed_share), **changed_policy)
    assert (result["reap"], result["ledger"]["intents"]) == ([], [half_removed()])


def test_row_30_two_of_the_same_name_are_finished_one_after_the_other():
    ledger = with_intent()
    ledger["intents"].append(half_removed() | {"identity": "an older one"})
    result = plan(facts(ledger=ledger))
    assert [token["identity"] for token in result["reap"]] == ["i"]
    assert [token["identity"] for token in result["ledger"]["intents"]] == ["an older one"]


def test_row_30_a_refused_host_keeps_its_intents():
    result = plan(facts(ledger=with_intent()), share(count=0))
    assert (refused(result), result["ledger"]["intents"]) == ("blind", [half_removed()])


def test_row_32_what_was_wrong_with_the_ledger_is_said():
    assert plan(facts(ledger_problem="the ledger x is corrupt"))["notices"] == ["the ledger x is corrupt"]


# --- the plan as a whole ---------------------------------------------------------------------------------------------


def test_a_host_with_nothing_to_do_has_nothing_to_remember():
    # Nothing is written on a host that never had anything of VMs: it may be a laptop, and we may not be root.
    assert plan(facts())["ledger_changed"] is False
    written = dict(ledgers.empty(REALM), generation=1)
    later = plan(facts(ledger=written))
    assert later["ledger_changed"] is True
    assert plan(facts(ledger=remembered(later, written)))["ledger_changed"] is False


def test_a_sweep_that_is_repeated_at_once_changes_nothing():
    orphan = thing("cgroup", "v1", in_use=True, holders=[r.holder("process", "shell")])
    second = sweep_twice(orphan, running="confirmed")
    third = plan(facts(orphan, now=9000, ledger=remembered(second)), running="confirmed")
    assert (third["reap"], third["ledger_changed"]) == ([], False)


def test_counts_of_kinds_and_vms():
    result = plan(
        facts(thing("cgroup", "v1"), thing("jail", "v1"), thing("cgroup", "w"), unavailable=["zombie"]),
        share(live=["w"]),
    )
    assert result["counts"]["cgroup"] == {
        "live": 1,
        "suspected": 1,
        "confirmed": 0,
        "disputed": 0,
        "held": 0,
        "unknown": 0,
        "foreign": 0,
        "status": "ok",
        "reap": 0,
        "aside": 0,
    }
    assert result["counts"]["zombie"]["status"] == "unavailable"
    assert {verdict: n for verdict, n in result["vms"].items() if n} == {"live": 1, "suspected": 1}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"realm": ""}, "realm"),
        ({"host": None}, "host"),
        ({"strikes": 1}, "reap_strikes"),
        ({"strikes": True}, "reap_strikes"),
        ({"adopt_host": "False"}, "reap_adopt_host must be true or false"),
        ({"min_age": "soon"}, "reap_min_age must be a number, at least 0, not 'soon'"),
        ({"strikes": "two"}, "reap_strikes must be a number, at least 2, not 'two'"),
        ({"strikes": {"absent": 1}}, "reap_strikes must be a number, at least 2, not 1"),
        ({"strikes": {"unproven": 2}}, "reap_strikes has values for unproven; the grades of evidence are tombstoned"),
        ({"strikes": [2]}, "reap_strikes"),
        ({"hold": -1}, "reap_hold"),
        ({"hold": {"tombstoned": float("nan")}}, "reap_hold"),
        ({"hold": {1: 5}}, "reap_hold has values for 1;"),
        ({"strike_interval": -1}, "reap_strike_interval"),
        ({"min_age": float("nan")}, "reap_min_age"),
        ({"max_percent_per_host": 101}, "reap_max_percent_per_host"),
        ({"max_percent_per_host": float("nan")}, "reap_max_percent_per_host"),
        ({"max_shrink_percent": -1}, "reap_max_shrink_percent"),
        ({"max_per_host": None}, "reap_max_per_host"),
        ({"running": "always"}, "reap_running"),
        ({"zombies": "kill"}, "reap_zombies"),
        ({"zombies": "restart_unit"}, "reap_zombies_restart_units names no unit that may be restarted"),
        ({"zombies_restart_units": "x.service"}, "reap_zombies_restart_units must be a list"),
        ({"zombies_restart_units": [""]}, "reap_zombies_restart_units must be a list"),
        ({"zombies_restart_units": [7]}, "reap_zombies_restart_units must be a list"),
        ({"keep": "v1"}, "reap_keep"),
        ({"keep": [1]}, "reap_keep"),
        ({"strike": 2}, "strike"),
    ],
)
def test_a_policy_that_cannot_be_meant_is_named(changes, named):
    with pytest.raises(planner.PolicyError, match=named):
        planner.complete_policy(policy(**changes))


# --- properties ------------------------------------------------------------------------------------------------------

IDS = ["v%d" % number for number in range(5)]
FEW = settings(max_examples=40, deadline=None)


@st.composite
def hosts(draw):
    """Return ``(facts, share, policy)`` of a host in any state."""
    things = []
    for kind in TRAITS:
        for number in range(draw(st.integers(0, 3))):
            name = "%s-%d" % (kind, number)
            others = [(one["kind"], one["name"]) for one in things]
            holders = [
                r.holder(kind_of, name_of, kind=draw(st.sampled_from([kind_of, None])))
                for kind_of, name_of in draw(st.lists(st.sampled_from(others), max_size=2) if others else st.just([]))
            ]
            parents = [one["name"] for one in things if one["kind"] == kind]
            things.append(
                thing(
                    kind,
                    draw(st.sampled_from(IDS)),
                    name=name,
                    identity=draw(st.sampled_from(["a", "b"])),
                    age=draw(st.sampled_from([None, 1.0, 100.0, 5000.0])),
                    in_use=draw(st.integers(0, 5)) == 0,
                    holders=holders,
                    parent=draw(st.sampled_from([None, *parents])),
                )
            )
    strikes = {
        "%s %s" % (one["kind"], one["name"]): {
            "identity": draw(st.sampled_from(["a", "a", "a", "b"])),
            "vm_id": one["vm_id"] if draw(st.integers(0, 9)) else "v0",
            "strikes": draw(st.integers(1, 2)),
            "first": (first := draw(st.sampled_from([0.0, 500.0, 990.0]))),
            "last": first,
            "boot_id": draw(st.sampled_from(["boot-1", "boot-1", "boot-0"])),
        }
        for one in things
        if draw(st.integers(0, 5))
    }
    begun = draw(st.lists(st.sampled_from(IDS), max_size=2))
    intents = [dict(half_removed(), name="x%d" % number, vm_id=vm_id) for number, vm_id in enumerate(begun)]
    ledger = dict(ledgers.empty(REALM), strikes=strikes, intents=intents)
    down = draw(st.lists(st.sampled_from(sorted(TRAITS)), max_size=1))
    live = draw(st.lists(st.sampled_from(IDS), unique=True, max_size=3))
    dead = draw(st.dictionaries(st.sampled_from(IDS), st.sampled_from([None, 1.0, 900.0])))
    seen = share(
        live=live,
        tombstones={vm_id: since for vm_id, since in dead.items() if vm_id not in live},
        proven=draw(st.integers(0, 9)) > 0,
        age=draw(st.sampled_from([0.0, 0.0, 50.0])),
    )
    rules = {"running": draw(st.sampled_from(planner.RUNNING_POLICIES)), "keep": draw(st.sampled_from([[], ["v4"]]))}
    return facts(*[one for one in things if one["kind"] not in down], ledger=ledger, unavailable=down), seen, rules


def keys(tokens):
    return {(token["kind"], token["name"]) for token in tokens}


@FEW
@given(hosts())
def test_only_what_was_struck_before_as_the_same_object_goes(host):
    host_facts, seen, rules = host
    for token in plan(host_facts, seen, **rules)["reap"]:
        if token.get("resume"):
            continue
        strike = host_facts["ledger"]["strikes"]["%(kind)s %(name)s" % token]
        assert (strike["identity"], strike["vm_id"]) == (token["identity"], token["vm_id"])


@FEW
@given(hosts())
def test_nothing_of_a_live_vm_goes_and_nothing_that_is_unproven_or_unreadable(host):
    host_facts, seen, rules = host
    result = plan(host_facts, seen, **rules)
    assert not {token["vm_id"] for token in result["reap"]} & set(seen["live"])
    assert seen["proven"] or not result["reap"]
    down = {kind for kind, entry in host_facts["kinds"].items() if entry["status"] == "unavailable"}
    for token in result["reap"]:
        assert not down & {token["kind"], *TRAITS[token["kind"]]["depends_on"]}


@FEW
@given(hosts())
def test_order_is_by_kind_and_children_first(host):
    result = plan(*host[:2], **host[2])
    place = {(token["kind"], token["name"]): number for number, token in enumerate(result["reap"])}
    orders = [TRAITS[token["kind"]]["order"] for token in result["reap"]]
    assert orders == sorted(orders)
    for token in result["reap"]:
        parent = (token["kind"], token["parent"])
        assert parent not in place or place[token["kind"], token["name"]] < place[parent]


@FEW
@given(hosts())
def test_whoever_holds_a_thing_that_goes_goes_too(host):
    host_facts, seen, rules = host
    going = keys(plan(host_facts, seen, **rules)["reap"])
    for entry in host_facts["kinds"].values():
        for one in entry["resources"]:
            if (one["kind"], one["name"]) in going:
                assert all((holder.get("kind"), holder["name"]) in going for holder in one["holders"])


@FEW
@given(hosts())
def test_a_plan_is_a_fixed_point(host):
    """Repeated at the same moment, with what it remembers, a plan reaps the same and has nothing more to remember."""
    host_facts, seen, rules = host
    first = plan(host_facts, seen, **rules)
    ledger = remembered(first, host_facts["ledger"])
    resumed = [token for token in first["reap"] if token.get("resume")]
    begun = [token for token in host_facts["ledger"]["intents"] if token["name"] in {one["name"] for one in resumed}]
    again = plan(dict(host_facts, ledger=dict(ledger, intents=ledger["intents"] + begun)), seen, **rules)
    assert again["reap"] == first["reap"]
    assert again["ledger"]["strikes"] == ledger["strikes"]


@FEW
@given(hosts())
def test_after_the_acts_there_is_nothing_left_to_do(host):
    host_facts, seen, rules = host
    first = plan(host_facts, seen, **rules)
    ledger = acts.settled(remembered(first, host_facts["ledger"]), first["reap"], outcomes(first["reap"]), {})
    going = keys(first["reap"])
    kinds = {
        kind: dict(entry, resources=[one for one in entry["resources"] if (kind, one["name"]) not in going])
        for kind, entry in host_facts["kinds"].items()
    }
    again = plan(dict(host_facts, ledger=ledger, kinds=kinds), seen, **rules)
    assert not keys(again["reap"]) & going


@FEW
@given(hosts(), st.sampled_from(IDS))
def test_one_more_live_vm_never_costs_anything_of_it(host, vm_id):
    host_facts, seen, rules = host
    dead = {one: since for one, since in seen["tombstones"].items() if one != vm_id}
    more = dict(seen, live=[*seen["live"], vm_id], tombstones=dead)
    before, after = plan(host_facts, seen, **rules), plan(host_facts, more, **rules)
    assert keys(after["reap"]) <= keys(before["reap"])
    assert vm_id not in {token["vm_id"] for token in after["reap"]}


@FEW
@given(hosts(), st.sampled_from(sorted(TRAITS)))
def test_one_more_kind_that_cannot_be_read_never_costs_anything(host, kind):
    """But for one: what cannot be seen cannot keep the rest of its family, whose own members were all seen dead."""
    host_facts, seen, rules = host
    down = {"status": "unavailable", "reason": "no answer", "resources": [], "foreign": 0}
    blind = dict(host_facts, kinds=dict(host_facts["kinds"], **{kind: down}))
    before, after = plan(host_facts, seen, **rules), plan(blind, seen, **rules)
    waiting = {one["vm_id"] for one in host_facts["kinds"][kind]["resources"]}
    added = {token["vm_id"] for token in after["reap"] if (token["kind"], token["name"]) not in keys(before["reap"])}
    assert added <= waiting


@FEW
@given(hosts(), st.randoms(use_true_random=False))
def test_the_same_inputs_give_the_same_plan_to_the_byte(host, chance):
    def shuffled(value):
        if isinstance(value, dict):
            items = [(key, shuffled(item)) for key, item in value.items()]
            chance.shuffle(items)
            return dict(items)
        return [shuffled(item) for item in value] if isinstance(value, list) else value

    host_facts, seen, rules = host
    mixed = shuffled(host_facts)
    for entry in mixed["kinds"].values():
        chance.shuffle(entry["resources"])
    one, other = plan(host_facts, seen, **rules), plan(mixed, shuffled(seen), **rules)
    assert json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def test_numbers_may_come_as_text():
    """Templates of ansible-core before 2.19 make texts of all numbers."""
    texts = {key: str(value) for key, value in planner.DEFAULT_POLICY.items() if type(value) is int}
    assert planner.complete_policy(policy(**dict(texts, max_per_host="7")))["max_per_host"] == 7
    assert planner.complete_policy(policy(strikes="3", hold="60"))["strikes"] == {"tombstoned": 3, "absent": 3}
