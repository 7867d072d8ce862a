# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A share of a signed plan: what is done is what it wants and what an ordinary sweep of this moment wants too."""

from __future__ import annotations

import copy

import pytest
from ansible_collections.microvm.reaper.plugins.module_utils import acts
from ansible_collections.microvm.reaper.plugins.module_utils import ledger as ledgers
from ansible_collections.microvm.reaper.plugins.plugin_utils import applying, inputs, replaying
from ansible_collections.microvm.reaper.plugins.plugin_utils.signed_plan import act_of
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.builders import (
    BOOT,
    HOST,
    MACHINE,
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
    thing,
    verdicts,
)

MADE = 1_800_000_000.0
FAMILY = (thing("jail", "v1"), thing("cgroup", "v1"))
OTHER = (thing("jail", "v2"), thing("cgroup", "v2"))


def within(made, **changes):
    """Return the share that the signed plan of ``made`` has for the host."""
    whole = {"plan": "1f2e3d4c5b6a7988", "made_at": MADE, "epoch": 7, "now": MADE + 60, "absent": None}
    mine = {"machine_id": MACHINE, "acts": [act_of(token) for token in made["reap"]], "begins": made["begins"]}
    return dict(whole, **dict(mine, **changes))


def apply(host_facts, signed, host_share=None, **changes):
    """Return the plan of an apply, and prove that it takes nothing that the signed plan has not, and no sweep would."""
    host_share, mine = host_share or share(), policy(**changes)
    before = copy.deepcopy((host_facts, host_share, signed))
    result = applying.plan(host_facts, host_share, mine, TRAITS, signed)
    assert (host_facts, host_share, signed) == before
    ordinary = plan(host_facts, host_share, **changes)
    taken = [act_of(token) for token in result["reap"]]
    assert all(act in signed["acts"] for act in taken)
    assert all(act in [act_of(token) for token in ordinary["reap"]] for act in taken)
    assert set(result["begins"]) <= set(signed["begins"])
    if not result["refused"]:
        assert result["ledger"]["strikes"] == ordinary["ledger"]["strikes"]
    return result


def struck(*things, **changes):
    """Return the ledger of a host that was swept at 1000 with these things on it."""
    return remembered(plan(facts(*things), **changes))


def signed_at_1060(*things, **changes):
    return plan(facts(*things, now=1060.0, ledger=struck(*things, **changes)), **changes)


def test_the_same_host_a_little_later_takes_all_of_it_and_remembers_that():
    signed = within(signed_at_1060(*FAMILY))
    result = apply(facts(*FAMILY, now=1200.0, ledger=struck(*FAMILY)), signed)
    assert names(result) == ["v1.jail", "v1.cgroup"]
    assert result["ledger"]["applied"] == {"plan": "1f2e3d4c5b6a7988", "made_at": MADE, "epoch": 7}
    assert result["ledger_changed"]
    assert result["within"] == dict(result["ledger"]["applied"], state="applied", why=None)


def test_what_is_new_is_left_and_struck_as_in_any_sweep():
    signed = within(signed_at_1060(*FAMILY))
    both = (*FAMILY, *OTHER)
    result = apply(facts(*both, now=1200.0, ledger=struck(*both)), signed)
    assert names(result) == ["v1.jail", "v1.cgroup"]
    assert verdicts(result)["v2.jail"] == "held" and "not_in_plan" in reasons(result, "v2")
    assert result["ledger"]["strikes"]["jail v2.jail"]["strikes"] == 2
    # and goes with the next sweep
    later = facts(*OTHER, now=1300.0, ledger=remembered(result))
    assert names(plan(later)) == ["v2.jail", "v2.cgroup"]


def test_an_object_that_was_made_anew_keeps_its_whole_vm():
    signed = within(signed_at_1060(*FAMILY))
    anew = (thing("jail", "v1", identity="another"), FAMILY[1])
    assert names(apply(facts(*anew, now=1200.0, ledger=struck(*FAMILY)), signed)) == []
    # Not even when a sweep would take it by now: the plan does not have it.
    result = apply(facts(*anew, now=1200.0, ledger=struck(*anew)), signed)
    assert names(result) == [] and "not_in_plan" in reasons(result, "v1")


def test_a_vm_of_which_there_is_more_by_now_is_left_as_a_whole():
    signed = within(signed_at_1060(*FAMILY))
    more = (*FAMILY, thing("dm_thin", "v1"))
    assert names(apply(facts(*more, now=1200.0, ledger=struck(*more)), signed)) == []
    less = FAMILY[:1]
    assert names(apply(facts(*less, now=1200.0, ledger=struck(*less)), signed)) == ["v1.jail"]


def test_a_vm_that_is_listed_again_is_live():
    signed = within(signed_at_1060(*FAMILY, *OTHER))
    both = (*FAMILY, *OTHER)
    result = apply(facts(*both, now=1200.0, ledger=struck(*both)), signed, share(live=["v1"]))
    assert names(result) == ["v2.jail", "v2.cgroup"]
    assert "jail v1.jail" not in result["ledger"]["strikes"]


def test_what_runs_by_now_is_not_ended_where_the_plan_ends_nothing():
    signed = within(signed_at_1060(*FAMILY, running="confirmed"))
    runs = (FAMILY[0], thing("cgroup", "v1", in_use=True))
    result = apply(facts(*runs, now=1200.0, ledger=struck(*runs)), signed, running="confirmed")
    assert names(result) == []


def test_what_was_to_be_set_aside_is_not_removed_at_once():
    signed = within(signed_at_1060(*FAMILY, hold={"jail": 3600}))
    assert {act[4] for act in signed["acts"] if act[0] == "jail"} == {"aside"}
    result = apply(facts(*FAMILY, now=1200.0, ledger=struck(*FAMILY)), signed, hold=0)
    assert names(result) == []


def test_nothing_begins_to_wait_that_the_plan_does_not_begin():
    """What waits has been counted by the caps: it would go later without having been."""
    snapshot = thing("snapshot", "v2")
    both = (*FAMILY, snapshot)
    host = facts(*both, now=1200.0, ledger=struck(*both))
    hold = {"snapshot": 3600}
    assert plan(host, hold=hold)["ledger"]["aside"] != []
    result = apply(host, within(signed_at_1060(*FAMILY, hold=hold)), hold=hold)
    assert names(result) == ["v1.jail", "v1.cgroup"] and result["ledger"]["aside"] == []
    # Where the plan begins it, it does.
    result = apply(host, within(signed_at_1060(*both, hold=hold)), hold=hold)
    assert [held["name"] for held in result["ledger"]["aside"]] == ["v2.snapshot"]


def test_what_holds_something_that_is_left_is_left_too():
    """One VM less changes what becomes of another; that is then not in the plan any more."""
    held = thing("snapshot", "v2", holders=[{"type": "container", "name": "v1.container", "kind": "container"}])
    both = (thing("container", "v1"), held)
    signed = within(signed_at_1060(*both))
    result = apply(facts(*both, now=1200.0, ledger=struck(*both)), signed)
    assert names(result) == ["v1.container", "v2.snapshot"]
    more = (*both, thing("jail", "v1"))
    result = apply(facts(*more, now=1200.0, ledger=struck(*more)), signed)
    assert names(result) == []
    assert reasons(result, "v2") >= {"container"}


def test_what_is_aside_is_finished_only_where_the_plan_has_it():
    moved = thing("jail", "v1")
    first = plan(facts(moved, now=1060.0, ledger=struck(moved, hold=100)), hold=100)
    moment = {"since": 1060.0, "boot_id": BOOT, "sweep": "s"}
    aside = acts.settled(remembered(first), first["reap"], outcomes(first["reap"], "set_aside"), moment)
    assert [one["state"] for one in aside["aside"]] == ["aside"]
    due = facts(now=1200.0, ledger=aside)
    ordinary = plan(due, hold=100)
    assert names(ordinary) == ["v1.jail"] and ordinary["begins"] == []
    assert names(apply(due, within(ordinary), hold=100)) == ["v1.jail"]
    left = apply(due, within(plan(facts())), hold=100)
    assert names(left) == [] and left["ledger"]["aside"] == aside["aside"]


def test_what_a_killed_apply_has_begun_is_finished_by_the_next_plan_or_sweep_and_not_by_the_same():
    volume = thing("dm_thin", "v1")
    signed = within(signed_at_1060(volume))
    begun = apply(facts(volume, now=1200.0, ledger=struck(volume)), signed)
    killed = dict(acts.begun(remembered(begun), begun["reap"]), generation=2)
    assert killed["applied"]["plan"] == signed["plan"] and len(killed["intents"]) == 1
    after = facts(now=1300.0, ledger=killed)
    again = apply(after, signed)
    assert names(again) == [] and again["ledger"]["intents"] == killed["intents"]
    swept = plan(after)
    assert [(token["name"], token["resume"]) for token in swept["reap"]] == [("v1.dm_thin", True)]
    assert names(apply(after, within(swept, plan="next", made_at=MADE + 60))) == ["v1.dm_thin"]


# --- once, and only where it belongs -----------------------------------------------------------------------------


def ledger_with(applied, *things):
    return dict(struck(*things), applied=dict({"plan": "other", "made_at": MADE, "epoch": 7}, **applied))


@pytest.mark.parametrize(
    ("applied", "is_spent"),
    [
        ({"plan": "1f2e3d4c5b6a7988"}, True),
        ({"plan": "1f2e3d4c5b6a7988", "made_at": MADE + 86400}, True),
        ({"made_at": MADE}, True),
        ({"made_at": MADE + 50}, True),
        ({"made_at": MADE - 0.1}, False),
        ({"made_at": MADE + 90}, True),
        # A clock that was a day ahead once must not spend all plans of a day.
        ({"made_at": MADE + 90.1}, False),
    ],
)
def test_a_plan_is_applied_once_and_none_after_a_later_one(applied, is_spent):
    signed = within(signed_at_1060(*FAMILY))
    result = apply(facts(*FAMILY, now=1200.0, ledger=ledger_with(applied, *FAMILY)), signed)
    assert (names(result) == []) == is_spent
    if is_spent:
        assert result["within"]["state"] == "plan_spent" and "plan_spent" in reasons(result, "v1")
        assert result["ledger"].get("applied") is None  # it stays as it is: only what is said is written
        assert result["ledger"]["strikes"]["jail v1.jail"]["strikes"] == 2


@pytest.mark.parametrize("absent", ["idle", "refused", "unseen", "missing"])
def test_a_host_that_the_plan_has_nothing_for_is_swept_without_removals(absent):
    nothing = within(plan(facts()), absent=absent, machine_id=None)
    result = apply(facts(*FAMILY, now=1200.0, ledger=struck(*FAMILY)), nothing)
    assert names(result) == [] and "not_in_plan" in reasons(result, "v1")
    assert result["within"]["state"] == absent and "1f2e3d4c5b6a7988" in result["within"]["why"]
    assert result["ledger"]["strikes"]["jail v1.jail"]["strikes"] == 2 and result["ledger_changed"]
    assert "applied" not in result["ledger"]


def test_another_machine_of_the_same_name_gets_nothing():
    signed = within(signed_at_1060(*FAMILY), machine_id="another")
    result = apply(facts(*FAMILY, now=1200.0, ledger=struck(*FAMILY)), signed)
    assert names(result) == [] and "another machine" in result["within"]["why"]


def test_a_share_is_spent_also_where_nothing_else_changes():
    signed = within(signed_at_1060(*FAMILY, hold={"jail": 3600}))
    enough = remembered(plan(facts(*FAMILY, now=1100.0, ledger=struck(*FAMILY))), struck(*FAMILY))
    host = facts(*FAMILY, now=1200.0, ledger=enough)
    assert not plan(host)["ledger_changed"]
    assert apply(host, signed)["reap"] == [] and apply(host, signed)["ledger_changed"]


def test_a_refused_host_has_not_applied_it():
    signed = within(signed_at_1060(*FAMILY))
    host = facts(*FAMILY, now=1200.0, ledger=struck(*FAMILY))
    result = apply(host, signed, share(host_known=False))
    assert result["refused"]["code"] == "host_unknown"
    assert "applied" not in result["ledger"] and not result["ledger_changed"]


def test_the_caps_of_a_host_are_those_of_this_moment_and_of_all_that_would_go():
    """More dead VMs than a cap allows is more often a wrong list, whatever the plan had."""
    many = [thing("jail", "v%d" % number) for number in range(3)]
    signed = within(signed_at_1060(*many[:1]))
    result = apply(facts(*many, now=1200.0, ledger=struck(*many)), signed, max_per_host=2)
    assert result["refused"]["code"] == "host_cap" and result["reap"] == []


def test_a_host_that_has_and_remembers_nothing_any_more_stays_so():
    result = apply(facts(now=1200.0), within(signed_at_1060(*FAMILY)))
    assert not result["ledger_changed"] and result["ledger"]["host"] is None


def test_a_host_that_returns_strange_details_is_no_trouble():
    odd = thing("zombie", "v1", details={"how": {"a": [1]}, "unit": ["x"], "parent": "p"})
    signed = within(signed_at_1060(odd))
    assert names(apply(facts(odd, now=1200.0, ledger=struck(odd)), signed)) == ["v1.zombie"]


def test_it_ends_however_many_vms_depend_on_each_other(monkeypatch):
    rounds = []
    real = applying.planner.plan

    def counting(*arguments):
        rounds.append(1)
        return real(*arguments)

    monkeypatch.setattr(applying.planner, "plan", counting)
    # Each container holds the snapshot of the VM before; the first has something that the plan does not have.
    chain = [thing("container", "v000")]
    for number in range(1, 40):
        holder = {"type": "container", "name": "v%03d.container" % (number - 1), "kind": "container"}
        chain += [thing("container", "v%03d" % number), thing("snapshot", "v%03d" % number, holders=[holder])]
    signed = within(signed_at_1060(*chain))
    more = [*chain, thing("jail", "v000")]
    rounds.clear()
    result = applying.plan(facts(*more, now=1200.0, ledger=struck(*more)), share(), policy(), TRAITS, signed)
    assert len(rounds) <= applying.ROUNDS + 1
    assert "v000.container" not in names(result)
    assert all(act_of(token) in signed["acts"] for token in result["reap"])


def test_when_it_does_not_settle_all_is_left(monkeypatch):
    monkeypatch.setattr(applying, "ROUNDS", 1)
    signed = within(signed_at_1060(*FAMILY))
    both = (*FAMILY, *OTHER)
    result = apply(facts(*both, now=1200.0, ledger=struck(*both)), signed)
    assert names(result) == [] and result["begins"] == []


# --- whatever happens in between ---------------------------------------------------------------------------------

KINDS = ("container", "snapshot", "jail", "dm_thin", "cgroup", "zombie")
A_THING = st.tuples(
    st.sampled_from(["v1", "v2", "v3"]),
    st.sampled_from(KINDS),
    st.sampled_from(["one", "another"]),
    st.booleans(),
    st.sampled_from([None, "v1", "v2"]),
)


def things_of(drawn):
    found = {}
    for vm_id, kind, identity, in_use, holder in drawn:
        held = [{"type": "container", "name": "%s.container" % holder, "kind": "container"}] if holder else []
        holders = held if kind == "snapshot" else []
        found[(vm_id, kind)] = thing(kind, vm_id, identity=identity, in_use=in_use, holders=holders)
    return list(found.values())


@settings(max_examples=300, deadline=None)
@given(
    st.lists(A_THING, max_size=10),
    st.lists(A_THING, max_size=10),
    st.sets(st.sampled_from(["v1", "v2", "v3"])),
    st.sampled_from([0, 100, {"snapshot": 100}, {"jail": 100}]),
    st.sampled_from(["never", "confirmed"]),
    st.sampled_from([1060.0, 1200.0]),
)
def test_only_what_both_want_is_done(then, now, live, hold, running, moment):
    how = {"hold": hold, "running": running}
    before, after = things_of(then), things_of(now)
    signed = within(signed_at_1060(*before, **how))
    host = facts(*after, now=moment, ledger=struck(*before, *[one for one in after if one not in before], **how))
    result = apply(host, signed, share(live=sorted(live)), **how)
    assert {token["vm_id"] for token in result["reap"]}.isdisjoint(live)
    waits = {held["vm_id"] for held in result["ledger"]["aside"]}
    assert waits <= set(signed["begins"])


def test_the_plan_of_an_apply_is_made_again_from_what_was_saved():
    signed = within(signed_at_1060(*FAMILY))
    both = (*FAMILY, *OTHER)
    host = facts(*both, now=1200.0, ledger=struck(*both))
    record = inputs.record(HOST, host, share(), policy(), apply(host, signed), signed)
    again = replaying.replay(record)
    assert again["same"] and again["differences"] == []
    assert not replaying.replay({key: value for key, value in record.items() if key != "within"})["same"]


def test_an_ordinary_sweep_remembers_the_plan_that_was_applied():
    ledger = dict(ledger_with({"plan": "p"}, *FAMILY), generation=3)
    assert "applied" not in plan(facts(*FAMILY, now=1200.0, ledger=ledger))["ledger"]
    assert ledgers.checked(ledger, REALM)["applied"]["plan"] == "p"
