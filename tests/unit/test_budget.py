# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""How many VMs a host may begin to reap by the live source's own words: the brake of a fleet that nobody sees whole."""

from __future__ import annotations

import json
import os

import pytest
from ansible_collections.microvm.reaper.plugins.plugin_utils import manifest, planner, sources
from ansible_collections.microvm.reaper.plugins.plugin_utils.brake import brake, over_budget_now
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.builders import document, facts, plan, remembered, share, thing

NOW = 1_800_000_010.0
HOSTS = ["h1", "h2", "h3"]
NUMBERS = st.integers(0, 5)
BUDGETS = st.none() | st.dictionaries(st.sampled_from([*HOSTS, "*"]), NUMBERS)


def check(**changes):
    return manifest.check(document(**changes), "test", now=NOW, max_age=600)


# --- what is believed


@pytest.mark.parametrize(("said", "means"), [
    (0, {"*": 0}), (7, {"*": 7}), ({"h1": 2}, {"h1": 2}), ({"h1": 2, "*": 0}, {"h1": 2, "*": 0}), ({}, {}),
])  # fmt: skip
def test_a_number_is_that_of_each_host(said, means):
    assert check(budget=said)["budget"] == means


def test_a_list_without_a_budget_has_none():
    assert check()["budget"] is None
    assert manifest.budget_of(None, "h1") is None


@pytest.mark.parametrize("said", [
    None, -1, 1.0, 2.5, float("nan"), True, False, "3", "", [], [3], 10**9 + 1, 10**400,
    {"h1": -1}, {"h1": None}, {"h1": "3"}, {"h1": True}, {"h1": {}}, {"*": 1.5}, {7: 1}, {"h\n": 1}, {"": 1},
])  # fmt: skip
def test_what_is_no_budget_is_no_list(said):
    with pytest.raises(manifest.ManifestError) as caught:
        check(budget=said)
    assert caught.value.code == "not_a_manifest"
    assert str(caught.value).startswith("test: ") and "budget" in str(caught.value)


def test_a_budget_of_a_host_that_the_list_does_not_have():
    """By another name it would have the number of all others."""
    assert check(hosts=["h1"], budget={"h1": 1, "*": 2})["budget"] == {"h1": 1, "*": 2}
    with pytest.raises(manifest.ManifestError, match=r"test: the budget is of host 'h1\.example'") as caught:
        check(hosts=["h1"], budget={"h1.example": 0, "*": 5})
    assert caught.value.code == "unknown_host"


@settings(max_examples=300)
@given(st.lists(BUDGETS, max_size=4))
def test_of_several_sources_the_smallest_counts(budgets):
    joined = manifest.joined_budget(budgets)
    for host in [*HOSTS, "another"]:
        said = [one.get(host, one.get("*", 0)) for one in budgets if one is not None]
        assert manifest.budget_of(joined, host) == (min(said) if said else None)
    assert manifest.joined_budget(reversed(budgets)) == joined


@settings(max_examples=60, deadline=None)
@given(st.lists(BUDGETS, min_size=1, max_size=3))
def test_a_host_is_told_its_own(tmp_path_factory, budgets):
    path = tmp_path_factory.getbasetemp() / "budget.sqlite"
    path.unlink(missing_ok=True)
    collector = manifest.Collector(str(path))
    for number, one in enumerate(budgets):
        said = {} if one is None else {"budget": one}
        collector.add(document(**said), "s%d" % number, now=NOW, max_age=600)
    handle = collector.finish()
    assert "budget" not in handle, "10,000 hosts would be in it"
    for host in [*HOSTS, "another"]:
        expected = manifest.budget_of(manifest.joined_budget(budgets), host)
        assert manifest.share(handle, host, {"v1"})["budget"] == expected


# --- what is decided


def swept(count, budget, **changes):
    """Return the plan of the second of two sweeps of a host with so many dead VMs, and of a list with this budget."""
    things = [thing("cgroup", "v%d" % number) for number in range(count)]
    first = plan(facts(*things), share(budget=budget), **changes)
    return plan(facts(*things, now=1100.0, ledger=remembered(first)), share(budget=budget), **changes)


@settings(max_examples=60)
@given(st.integers(0, 6), st.none() | st.integers(0, 8))
def test_a_plan_is_as_it_was_or_refused_and_never_cut_short(count, budget):
    whole, found = swept(count, None), swept(count, budget)
    if budget is None or count <= budget:
        assert (found["refused"], found["reap"]) == (None, whole["reap"])
    else:
        assert (found["refused"]["code"], found["reap"], found["begins"]) == ("over_budget", [], [])


def test_a_host_over_its_budget_says_so():
    said = swept(3, 2)["refused"]["message"]
    assert said == "3 VMs would be reaped on this host, more than the budget of 2 VMs for each sweep of it that the " \
        "live source test gives"
    assert "the budget of the live source test is 0" in swept(3, 0)["refused"]["message"]


def test_the_host_caps_hold_below_the_budget():
    assert swept(3, 3, max_per_host=2)["refused"]["code"] == "host_cap"
    assert swept(3, 2, max_per_host=2)["refused"]["code"] == "over_budget"


HOLD = {"jail": 3600}


def aside(*vm_ids):
    """Return the ledger of a host on which the jails of these VMs are aside."""
    things = [thing("jail", vm_id) for vm_id in vm_ids]
    first = remembered(plan(facts(*things), hold=HOLD))
    result = plan(facts(*things, now=1060.0, ledger=first), hold=HOLD)
    assert [token["step"] for token in result["reap"]] == ["aside"] * len(vm_ids)
    held = [dict({key: value for key, value in token.items() if key not in planner.OF_A_PLAN}, since=1060.0,
                 boot_id=facts()["boot_id"], sweep=None, state="aside") for token in result["reap"]]
    return dict(remembered(result, first), aside=held, intents=[])


def test_what_was_begun_is_not_counted_again_but_0_stops_it_too():
    ledger = aside("v1", "v2")
    late = facts(now=9000.0, ledger=ledger)
    for budget in (None, 1, 2):
        result = plan(late, share(budget=budget), hold=HOLD)
        assert (result["refused"], len(result["reap"]), result["begins"]) == (None, 2, [])
    stopped = plan(late, share(budget=0), hold=HOLD)
    assert (stopped["refused"]["code"], stopped["reap"]) == ("over_budget", [])
    assert "0 VMs would be reaped on this host, and something of 2" in stopped["refused"]["message"]
    assert stopped["ledger"]["aside"] == ledger["aside"], "it can still be brought back"


def test_where_nothing_goes_0_refuses_nothing():
    assert plan(facts(), share(budget=0))["refused"] is None
    suspected = plan(facts(thing("cgroup", "v1")), share(budget=0))
    assert (suspected["refused"], suspected["vms"]["suspected"]) == (None, 1)


def test_a_batch_stops_where_one_of_its_hosts_is_over_its_budget():
    abort, _refused = brake({"h1": swept(3, 2), "h2": swept(1, 2)})
    assert abort["code"] == "over_budget"
    assert abort["message"].startswith("h1: 3 VMs would be reaped on this host, more than the budget of 2 VMs")


def test_what_the_source_takes_back_meanwhile_is_spared():
    plans = {name: dict(swept(2, None), host=host) for name, host in (("h1", "rack1"), ("h2", "rack2"))}
    assert over_budget_now(plans, None) == {}
    assert over_budget_now(plans, {"*": 2}) == {}
    found = over_budget_now(plans, {"*": 2, "rack2": 1})
    assert {host: sorted(one) for host, one in found.items()} == {"h2": ["v0", "v1"]}
    assert "a budget of 1 VMs for this host" in found["h2"]["v0"]
    assert sorted(over_budget_now(plans, {"rack2": 2})) == ["h1"]
    finishing = {"h1": dict(plans["h1"], begins=[])}
    assert over_budget_now(finishing, {"*": 1}) == {}
    assert sorted(over_budget_now(finishing, {"*": 0})) == ["h1"]
    assert over_budget_now({"h1": dict(plans["h1"], reap=[], begins=[])}, {"*": 0}) == {}


def test_it_is_asked_for_once_more_with_the_list(tmp_path):
    wanted = [{"type": "file", "path": "%d.json" % number} for number in range(2)]
    about = {"now": NOW, "directory": str(tmp_path), "terminal_states": manifest.TERMINAL_STATES}

    def tell(*budgets):
        for number, said in enumerate(budgets):
            (tmp_path / ("%d.json" % number)).write_text(json.dumps(document(**said)))
            os.utime(tmp_path / ("%d.json" % number), (NOW, NOW))

    tell({"budget": 9}, {})
    handle = sources.fetch(wanted, about, str(tmp_path / "index"), max_age=600)
    assert manifest.share(handle, "h1", set())["budget"] == 9
    tell({"budget": 9}, {"budget": {"h1": 0, "*": 20}})
    found, budget = sources.still_listed(wanted, about, {"v1"}, handle, max_age=600)
    assert found == {"v1": ["h1"]}
    assert [manifest.budget_of(budget, host) for host in ("h1", "h2")] == [0, 9]
    tell({}, {})
    assert sources.still_listed(wanted, about, {"v1"}, handle, max_age=600)[1] is None
