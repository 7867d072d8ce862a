# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The ladder: what can be taken back first, what cannot after the hold, and back again by undo()."""

from __future__ import annotations

import os
import pathlib
import stat
import subprocess
import time

import pytest
from ansible_collections.microvm.reaper.plugins.module_utils import acts, safe_tree
from ansible_collections.microvm.reaper.plugins.module_utils import journal as journals
from ansible_collections.microvm.reaper.plugins.module_utils import ledger as ledgers
from ansible_collections.microvm.reaper.plugins.module_utils import resource as r
from ansible_collections.microvm.reaper.plugins.module_utils.all_kinds import ORDER
from ansible_collections.microvm.reaper.plugins.module_utils.gather import collect_all
from ansible_collections.microvm.reaper.plugins.module_utils.kinds import jail
from ansible_collections.microvm.reaper.plugins.module_utils.probe import Host, boottime
from ansible_collections.microvm.reaper.plugins.plugin_utils import planner

from .builders import (
    BOOT,
    REALM,
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

HOLD = {"jail": 3600, "dm_thin": 3600, "snapshot": 3600}
JAIL = thing("jail", "v1")


def steps(result):
    return {token["name"]: token["step"] for token in result["reap"]}


def struck(*things):
    return remembered(plan(facts(*things), hold=HOLD))


def carried_out(result, before, now=1060.0, **how):
    """Return the ledger after everything in a plan was set aside."""
    moment = {"since": now, "boot_id": BOOT, "sweep": "s1"}
    done = [dict(one, **how) for one in outcomes(result["reap"], r.SET_ASIDE)]
    return acts.settled(remembered(result, before), result["reap"], done, moment)


def aside(*things, now=1060.0, hold=HOLD):
    """Return the ledger of a host on which these things have been set aside."""
    before = struck(*things)
    result = plan(facts(*things, now=now, ledger=before), hold=hold)
    assert set(steps(result).values()) == {"aside"}
    return carried_out(result, before, now)


# --- the planner -------------------------------------------------------------------------------------------------


def test_what_can_be_taken_back_comes_first_and_the_rest_after_the_hold():
    ledger = aside(JAIL)
    assert [(held["name"], held["state"], held["since"], held["sweep"]) for held in ledger["aside"]] == [
        ("v1.jail", "aside", 1060.0, "s1")
    ]
    early = plan(facts(now=4659.0, ledger=ledger), hold=HOLD)
    assert (names(early), early["counts"]["jail"]["aside"], early["ledger_changed"]) == ([], 1, False)
    late = plan(facts(now=4660.0, ledger=ledger), hold=HOLD)
    assert steps(late) == {"v1.jail": "remove"} and late["reap"][0]["resume"]
    assert late["reap"][0]["why"] == "it has been aside for 3600 s, and reap_hold is 3600"
    assert late["ledger"]["aside"] == []
    after = acts.settled(remembered(late, ledger), late["reap"], outcomes(late["reap"]), {})
    assert (after["aside"], after["intents"]) == ([], [])


def test_by_default_only_what_cannot_be_made_again_waits():
    things = [thing(kind, "v1") for kind in ("cgroup", "jail", "dm_thin", "container", "snapshot")]
    before = remembered(plan(facts(*things), hold=planner.DEFAULT_POLICY["hold"]))
    result = plan(facts(*things, now=1060.0, ledger=before), hold=planner.DEFAULT_POLICY["hold"])
    assert steps(result) == {
        "v1.container": "remove", "v1.cgroup": "remove", "v1.jail": "aside", "v1.dm_thin": "aside",
    }
    assert verdicts(result)["v1.snapshot"] == "held" and "hold" in reasons(result, "v1")


@pytest.mark.parametrize("changed", [
    {"live": ["v1"]},
    {"proven": False},
    {"keep": ["v1"]},
    {"alive": {"v1": "firecracker says so"}},
    {"unavailable": ["cgroup"]},
    {"unavailable": ["jail"]},
    {"again": thing("jail", "v1", name="v1.jail", identity="another")},
    {"young": thing("cgroup", "v1", age=3.0)},
])
def test_what_speaks_against_it_later_keeps_it(changed):
    ledger = aside(JAIL)
    late = {"now": 9000.0, "ledger": ledger}
    there = [changed[key] for key in ("again", "young") if key in changed]
    result = plan(
        facts(*there, **late, unavailable=changed.get("unavailable", ()), alive=changed.get("alive", {})),
        share(changed.get("live", ()), proven=changed.get("proven", True), elsewhere={}),
        hold=HOLD,
        keep=changed.get("keep", []),
        clear_latch=REALM,
    )
    assert result["refused"] is None
    assert "v1.jail" not in names(result)
    assert result["ledger"]["aside"] == ledger["aside"]


def test_row_35_what_was_set_aside_and_lives_latches_and_says_how_to_bring_it_back():
    ledger = aside(JAIL)
    assert list(ledger["reaped"]) == ["v1"]
    result = plan(facts(now=1100.0, ledger=ledger), share(["v1"]), hold=HOLD)
    assert result["refused"]["code"] == "latched"
    assert "playbooks/undo.yml -e vm_id=v1" in result["refused"]["message"]
    cleared = plan(facts(now=1100.0, ledger=ledger), share(["v1"]), hold=HOLD, clear_latch=REALM)
    assert "undo.yml -e vm_id=v1" in cleared["notices"][0]


def test_row_07_after_a_reboot_the_hold_begins_with_the_boot():
    ledger = aside(JAIL)
    booted = plan(facts(now=50.0, boot="boot-2", ledger=ledger), hold=HOLD)
    assert names(booted) == [] and booted["ledger"]["aside"][0]["since"] == 0
    ledger = remembered(booted, ledger)
    assert names(plan(facts(now=3599.0, boot="boot-2", ledger=ledger), hold=HOLD)) == []
    assert names(plan(facts(now=3600.0, boot="boot-2", ledger=ledger), hold=HOLD)) == ["v1.jail"]


def test_what_is_back_in_its_place_is_forgotten_and_struck_anew():
    result = plan(facts(JAIL, now=9000.0, ledger=aside(JAIL)), hold=HOLD)
    assert (names(result), result["ledger"]["aside"], verdicts(result)) == ([], [], {"v1.jail": "suspected"})


def test_what_is_back_is_forgotten_under_any_name():
    """By an undo that was killed, of a jail that was found aside after its ledger was lost."""
    found = thing("jail", "v1", name="aside/v1.jail", identity="a", details={"aside": True})
    ledger = aside(found)
    there = thing("jail", "v1", identity="a")
    assert plan(facts(there, now=1100.0, ledger=ledger), hold=HOLD)["ledger"]["aside"] == []
    assert plan(facts(found, now=1100.0, ledger=ledger), hold=HOLD)["ledger"]["aside"] == ledger["aside"]


def test_what_cannot_be_set_aside_waits_where_it_is():
    one = thing("snapshot", "v1")
    before = struck(one)
    waiting = plan(facts(one, now=1060.0, ledger=before), hold=HOLD)
    assert (names(waiting), waiting["ledger"]["aside"][0]["state"]) == ([], "waiting")
    assert (waiting["counts"]["snapshot"]["aside"], waiting["counts"]["snapshot"]["held"]) == (1, 0)
    ledger = remembered(waiting, before)
    same = plan(facts(one, now=1200.0, ledger=ledger), hold=HOLD)
    assert (names(same), same["ledger_changed"]) == ([], False)
    assert names(plan(facts(one, now=4660.0, ledger=ledger), hold=HOLD)) == ["v1.snapshot"]
    gone = plan(facts(now=4660.0, ledger=ledger), hold=HOLD)
    other = plan(facts(thing("snapshot", "v1", identity="x"), now=4660.0, ledger=ledger), hold=HOLD)
    assert gone["ledger"]["aside"] == other["ledger"]["aside"] == [] == names(other)
    assert plan(facts(one, now=4660.0, ledger=ledger), share(["v1"]), hold=HOLD)["ledger"]["aside"] == []
    unread = plan(facts(now=4660.0, ledger=ledger, unavailable=["snapshot"]), hold=HOLD)
    assert unread["ledger"]["aside"] == ledger["aside"]


def test_what_could_not_be_set_aside_waits_too():
    before = struck(JAIL)
    result = plan(facts(JAIL, now=1060.0, ledger=before), hold=HOLD)
    left = [dict(one, waits=True) for one in outcomes(result["reap"], r.DEFERRED)]
    ledger = acts.settled(remembered(result, before), result["reap"], left, {
        "since": 1061.0, "boot_id": BOOT, "sweep": "s1"})
    assert [held["state"] for held in ledger["aside"]] == ["waiting"]
    assert names(plan(facts(JAIL, now=4600.0, ledger=ledger), hold=HOLD)) == []
    assert steps(plan(facts(JAIL, now=4661.0, ledger=ledger), hold=HOLD)) == {"v1.jail": "remove"}


def test_what_runs_is_frozen_first_where_its_kind_waits():
    one = thing("cgroup", "v1", in_use=True)
    how = {"hold": 600, "running": "confirmed"}
    before = remembered(plan(facts(one), **how))
    first = plan(facts(one, now=1060.0, ledger=before), **how)
    assert [(token["step"], token["stop"]) for token in first["reap"]] == [("aside", False)]
    ledger = carried_out(first, before, in_sight=True)
    assert names(plan(facts(one, now=1100.0, ledger=ledger), **how)) == []
    last = plan(facts(one, now=1660.0, ledger=ledger), **how)
    assert [(token["step"], token["stop"]) for token in last["reap"]] == [("remove", True)]
    # One that is frozen and lives stays known, or nothing could thaw it.
    lives = plan(facts(one, now=1660.0, ledger=ledger), share(["v1"]), clear_latch=REALM, **how)
    assert lives["ledger"]["aside"] == ledger["aside"]


def test_what_a_frozen_process_uses_is_left_alone_until_that_ends():
    things = [thing("cgroup", "v1", in_use=True), thing("jail", "v1", in_use=True)]
    how = {"hold": {"cgroup": 600, "jail": 600}, "running": "confirmed"}
    before = remembered(plan(facts(*things), **how))
    first = plan(facts(*things, now=1060.0, ledger=before), **how)
    assert steps(first) == {"v1.cgroup": "aside"} and verdicts(first)["v1.jail"] == "held"
    ledger = carried_out(first, before, in_sight=True)
    then = plan(facts(*things, now=1100.0, ledger=ledger), **how)
    assert (names(then), then["ledger_changed"]) == ([], False)
    last = plan(facts(*things, now=1660.0, ledger=ledger), **how)
    assert steps(last) == {"v1.cgroup": "remove", "v1.jail": "aside"}


def test_a_container_waits_for_its_snapshot_which_would_go_with_it():
    container = thing("container", "v1", in_use=True)
    snapshot = thing("snapshot", "v1", holders=[r.holder("container", "v1.container", kind="container")])
    how = {"hold": HOLD, "running": "confirmed"}
    before = remembered(plan(facts(container, snapshot), **how))
    first = plan(facts(container, snapshot, now=1060.0, ledger=before), **how)
    # It has no hold of its own, so what runs in it ends; its record, which keeps the snapshot, stays.
    (token,) = first["reap"]
    assert (token["name"], token["step"], token["stop"]) == ("v1.container", "aside", True)
    stopped = [dict(one, waits=True) for one in outcomes(first["reap"], r.SET_ASIDE)]
    ledger = acts.settled(remembered(first, before), first["reap"], stopped, {
        "since": 1060.0, "boot_id": BOOT, "sweep": "s1"})
    container = dict(container, in_use=False)
    assert names(plan(facts(container, snapshot, now=4000.0, ledger=ledger), **how)) == []
    last = plan(facts(container, snapshot, now=4660.0, ledger=ledger), **how)
    assert steps(last) == {"v1.container": "remove", "v1.snapshot": "remove"}


def test_what_refers_to_something_and_that_go_together():
    """A container that waits keeps its snapshot, even if that has no hold of its own."""
    container = thing("container", "v1")
    snapshot = thing("snapshot", "v1", holders=[r.holder("container", "v1.container", kind="container")])
    how = {"hold": {"container": 90}}
    before = remembered(plan(facts(container, snapshot), **how))
    first = plan(facts(container, snapshot, now=1060.0, ledger=before), **how)
    assert (names(first), first["counts"]["snapshot"]["aside"]) == ([], 1)
    ledger = remembered(first, before)
    last = plan(facts(container, snapshot, now=1150.0, ledger=ledger), **how)
    assert steps(last) == {"v1.container": "remove", "v1.snapshot": "remove"}


def test_a_container_waits_while_the_snapshot_that_would_go_with_it_cannot_be_read():
    container = thing("container", "v1", in_use=True)
    how = {"hold": HOLD, "running": "confirmed"}
    before = remembered(plan(facts(container), **how))
    unread = plan(facts(container, now=1060.0, ledger=before, unavailable=["snapshot"]), **how)
    assert [(token["step"], token["stop"]) for token in unread["reap"]] == [("aside", True)]
    for changes in ({"absent": ["snapshot"]}, {}):
        assert steps(plan(facts(container, now=1060.0, ledger=before, **changes), **how)) == {"v1.container": "remove"}
    none = plan(facts(container, now=1060.0, ledger=before, unavailable=["snapshot"]), hold=0, running="confirmed")
    assert steps(none) == {"v1.container": "remove"}


def test_of_two_that_had_the_same_name_none_goes_before_the_hold_of_the_other():
    """They may be the same: an undo that was killed had brought it back, and it was set aside once more."""
    ledger = aside(thing("dm_thin", "v1"))
    again = thing("dm_thin", "v1", identity="activated anew")
    struck_again = remembered(plan(facts(again, now=4000.0, ledger=ledger), hold=HOLD), ledger)
    result = plan(facts(again, now=4060.0, ledger=struck_again), hold=HOLD)
    assert steps(result) == {"v1.dm_thin": "aside"}
    ledger = carried_out(result, struck_again, 4060.0)
    assert [held["since"] for held in ledger["aside"]] == [1060.0, 4060.0]
    assert names(plan(facts(now=7659.0, ledger=ledger), hold=HOLD)) == []
    last = plan(facts(now=7660.0, ledger=ledger), hold=HOLD)
    assert [token["since"] for token in last["reap"]] == [1060.0]
    assert [held["since"] for held in last["ledger"]["aside"]] == [4060.0]


def test_caps_count_what_begins_to_go_and_not_again_what_was_set_aside():
    things = [thing("jail", "v%d" % number) for number in range(12)]
    before = struck(*things)
    capped = plan(facts(*things, now=1060.0, ledger=before), hold=HOLD, max_per_host=11)
    assert capped["refused"]["code"] == "host_cap"
    result = plan(facts(*things, now=1060.0, ledger=before), hold=HOLD)
    assert len(result["begins"]) == 12
    ledger = carried_out(result, before)
    last = plan(facts(now=9000.0, ledger=ledger), hold=HOLD, max_per_host=1)
    assert (len(names(last)), last["begins"], last["refused"]) == (12, [], None)
    snapshots = [thing("snapshot", "v%d" % number) for number in range(12)]
    before = struck(*snapshots)
    assert plan(facts(*snapshots, now=1060.0, ledger=before), hold=HOLD, max_per_host=11)["refused"]
    assert len(plan(facts(*snapshots, now=1060.0, ledger=before), hold=HOLD)["begins"]) == 12


def test_under_pressure_the_older_half_does_not_wait():
    things = [thing("dm_thin", "v%d" % number, details={"place": "pool"}) for number in range(3)]
    ledger = ledgers.empty(REALM)
    for number, one in enumerate(things):
        before = remembered(plan(facts(one, now=1000.0 + number, ledger=ledger), hold=HOLD), ledger)
        ledger = carried_out(
            plan(facts(one, now=1100.0 + number, ledger=before), hold=HOLD), before, 1100.0 + number)
    assert len(ledger["aside"]) == 3

    def under(percent, **changes):
        full = facts(now=1300.0, ledger=ledger)
        full["kinds"]["dm_thin"]["places"] = {"pool": percent, "another": 100.0}
        return plan(full, hold=HOLD, **changes)

    assert names(under(89.9)) == []
    pressed = under(90.0)
    assert names(pressed) == ["v0.dm_thin", "v1.dm_thin"]
    assert "pool is 90 % full (reap_pressure is 90): of 3 that are aside there" in pressed["notices"][0]
    assert "goes before its time because pool is 90 % full" in pressed["reap"][0]["why"]
    assert names(under(50.0, pressure=50)) == ["v0.dm_thin", "v1.dm_thin"]


@pytest.mark.parametrize(("hold", "kind", "tombstoned", "seconds"), [
    (60, "cgroup", False, 60),
    ({"jail": 5}, "jail", True, 5),
    ({"jail": 5}, "cgroup", True, 0),
    ({"tombstoned": 7, "absent": 9}, "cgroup", True, 7),
    ({"tombstoned": 7, "absent": 9}, "cgroup", False, 9),
    ({"absent": 9, "jail": 5}, "jail", False, 5),
    ({"absent": 9, "jail": 5}, "zombie", False, 9),
    ({"jail": {"absent": 4}}, "jail", True, 0),
    ({"jail": {"absent": "4"}}, "jail", False, 4),
])
def test_how_long_something_waits(hold, kind, tombstoned, seconds):
    full = planner.complete_policy(policy(hold=hold))
    assert planner.complete_policy(full) == full
    judge = planner._Judge(facts(), share(tombstones={"v1": 99.0} if tombstoned else {}), full, {})
    assert judge.hold(kind, "v1") == seconds


# --- after a reaper that was killed ------------------------------------------------------------------------------


def killed(result, before):
    """Return the ledger of a host whose reaper was killed right after it had written its intents."""
    return dict(acts.begun(remembered(result, before), result["reap"]))


def test_row_30_killed_while_it_set_aside():
    before = struck(JAIL)
    ledger = killed(plan(facts(JAIL, now=1060.0, ledger=before), hold=HOLD), before)
    # It had moved the jail: that is not seen any more, and waits from now on.
    moved = plan(facts(now=1200.0, ledger=ledger), hold=HOLD)
    (held,) = moved["ledger"]["aside"]
    assert (held["since"], held["state"], moved["ledger"]["intents"], names(moved)) == (1200.0, "aside", [], [])
    # It had not.
    there = plan(facts(JAIL, now=1200.0, ledger=ledger), hold=HOLD)
    assert (there["ledger"]["aside"], there["ledger"]["intents"], steps(there)) == ([], [], {"v1.jail": "aside"})


def test_row_30_killed_while_it_removed_at_once_what_it_moves_before():
    before = remembered(plan(facts(JAIL)))
    result = plan(facts(JAIL, now=1060.0, ledger=before))
    assert steps(result) == {"v1.jail": "remove"}
    ledger = killed(result, before)
    # It had moved the jail, and perhaps removed a part of it: it goes, as what was set aside does.
    moved = plan(facts(now=1200.0, ledger=ledger))
    (token,) = moved["reap"]
    assert (token["step"], token["resume"], token["since"], moved["ledger"]["intents"]) == ("remove", True, 1200.0, [])
    # One that has a hold by now waits for it, and can be brought back.
    held = plan(facts(now=1200.0, ledger=ledger), hold=HOLD)
    assert (names(held), held["ledger"]["aside"][0]["state"]) == ([], "aside")
    # It had not come to it.
    there = plan(facts(JAIL, now=1200.0, ledger=ledger))
    assert (there["ledger"]["aside"], "resume" in there["reap"][0]) == ([], False)
    # Of a kind that is not moved nothing is out of its place.
    one = thing("snapshot", "v1")
    before = remembered(plan(facts(one)))
    ledger = killed(plan(facts(one, now=1060.0, ledger=before)), before)
    assert names(plan(facts(now=1200.0, ledger=ledger))) == []


def test_row_30_killed_while_it_removed_a_jail_that_had_waited_in_its_place():
    before = struck(JAIL)
    result = plan(facts(JAIL, now=1060.0, ledger=before), hold=HOLD)
    left = [dict(one, waits=True) for one in outcomes(result["reap"], r.DEFERRED)]
    moment = {"since": 1061.0, "boot_id": BOOT, "sweep": "s1"}
    before = acts.settled(remembered(result, before), result["reap"], left, moment)
    ledger = killed(plan(facts(JAIL, now=4661.0, ledger=before), hold=HOLD), before)
    assert [(one["state"], one["step"]) for one in ledger["intents"]] == [("waiting", "remove")]
    moved = plan(facts(now=4700.0, ledger=ledger), hold=HOLD)
    assert [(one["step"], one["resume"], one["since"]) for one in moved["reap"]] == [("remove", True, 1061.0)]
    there = plan(facts(JAIL, now=4700.0, ledger=ledger), hold=HOLD)
    assert [(one["step"], "resume" in one) for one in there["reap"]] == [("remove", False)]
    # Where it is cannot be told now.
    unread = plan(facts(now=4700.0, ledger=ledger, unavailable=["jail"]), hold=HOLD)
    assert [held["state"] for held in unread["ledger"]["aside"]] == ["waiting"]


def test_row_30_killed_while_it_froze():
    one, how = thing("cgroup", "v1", in_use=True), {"hold": 600, "running": "confirmed"}
    before = remembered(plan(facts(one), **how))
    ledger = killed(plan(facts(one, now=1060.0, ledger=before), **how), before)
    # Perhaps it is frozen: so it counts as that, and undo thaws it.
    result = plan(facts(one, now=1200.0, ledger=ledger), **how)
    assert [(held["state"], held["since"]) for held in result["ledger"]["aside"]] == [("aside", 1200.0)]
    assert names(result) == []


def test_row_30_killed_while_it_removed_what_was_aside_and_can_be_seen():
    ledger = aside(JAIL)
    ledger = killed(plan(facts(now=9000.0, ledger=ledger), hold=HOLD), ledger)
    seen = thing("jail", "v1", name="aside/v1", identity=JAIL["identity"], details={"aside": True})
    again = plan(facts(seen, now=9100.0, ledger=ledger), hold=HOLD)
    assert (steps(again), again["families"]) == ({"v1.jail": "remove"}, {})


def test_row_30_killed_while_it_removed_what_was_aside():
    ledger = aside(JAIL)
    ledger = killed(plan(facts(now=9000.0, ledger=ledger), hold=HOLD), ledger)
    again = plan(facts(now=9100.0, ledger=ledger), hold=HOLD)
    assert steps(again) == {"v1.jail": "remove"} and again["reap"][0]["since"] == 1060.0
    assert "resume" not in str(again["ledger"])


def test_row_30_killed_while_it_removed_what_had_waited_in_its_place():
    """A volume that could not be set aside, and was only deactivated: it is finished, and not forgotten."""
    one = thing("dm_thin", "v1")
    before = struck(one)
    result = plan(facts(one, now=1060.0, ledger=before), hold=HOLD)
    left = [dict(outcome, waits=True) for outcome in outcomes(result["reap"], r.DEFERRED)]
    moment = {"since": 1061.0, "boot_id": BOOT, "sweep": "s1"}
    waiting = acts.settled(remembered(result, before), result["reap"], left, moment)
    ledger = killed(plan(facts(one, now=9000.0, ledger=waiting), hold=HOLD), waiting)
    later = plan(facts(now=9100.0, ledger=ledger), hold=HOLD)
    assert steps(later) == {"v1.dm_thin": "remove"} and later["reap"][0]["resume"]
    assert later["begins"] == ["v1"]
    # Nor is it while it has to be put off.
    deferred = [dict(outcome, unfinished=True) for outcome in outcomes(later["reap"], r.DEFERRED)]
    after = acts.settled(remembered(later, ledger), later["reap"], deferred, {})
    assert steps(plan(facts(now=9200.0, ledger=after), hold=HOLD)) == {"v1.dm_thin": "remove"}
    lives = plan(facts(now=9100.0, ledger=ledger), share(["v1"]), hold=HOLD, clear_latch=REALM)
    assert (names(lives), lives["ledger"]["intents"]) == ([], ledger["intents"])
    # It had not come so far.
    there = plan(facts(one, now=9100.0, ledger=ledger), hold=HOLD)
    assert there["reap"][0]["since"] == 1061.0 and not there["reap"][0].get("resume")


def test_what_was_put_off_is_aside_as_before():
    ledger = aside(JAIL)
    late = plan(facts(now=9000.0, ledger=ledger), hold=HOLD)
    busy = acts.settled(remembered(late, ledger), late["reap"], outcomes(late["reap"], r.DEFERRED), {})
    assert busy["aside"] == ledger["aside"]
    spared, told = acts.spared(late, {"v1": "listed again"})
    assert (spared["reap"], spared["ledger"]["aside"], told[0]["outcome"]) == ([], ledger["aside"], r.DEFERRED)


# --- real jails --------------------------------------------------------------------------------------------------


@pytest.fixture
def host(tmp_path):
    return Sweeps(tmp_path)


class Sweeps:
    """Sweeps a directory of real jails by the real planner and the real acts."""

    def __init__(self, place):
        self.base = place / "jailer"
        (self.base / "fc").mkdir(parents=True)
        self.state = str(place / "state")
        self.rules = {"jail": [{"base": str(self.base), "exec": "fc", "name": "(?P<vm_id>v[a-z0-9]+)"}]}
        self.clock = 10000.0

    def make(self, vm_id):
        place = self.base / "fc" / vm_id
        (place / "root" / "run").mkdir(parents=True)
        (place / "root" / "disk").write_bytes(b"x" * 5000)
        os.chmod(place / "root" / "disk", 0o640)
        os.symlink("/etc/passwd", place / "root" / "link")
        os.mkfifo(place / "root" / "fifo")
        os.chmod(place, 0o711)
        for path in place.rglob("*"):
            os.utime(path, (1_600_000_000, 1_600_000_000), follow_symlinks=False)
        return place

    def facts(self):
        found = collect_all([jail], self.rules, Host(boottime() + 20))
        ledger, problem = ledgers.load(self.state, REALM)
        for one in found["jail"]["resources"]:
            one["age_seconds"] = None
        return dict(
            facts(now=self.clock, ledger=ledger, ledger_problem=problem, boot=Host(0).boot_id),
            kinds=dict(facts()["kinds"], **found),
        )

    def sweep(self, live=(), **changes):
        self.clock += 100
        how = dict({"hold": 3600, "pressure": 100}, **changes)
        result = plan(self.facts(), share(live), **how)
        assert not result["refused"], result["refused"]
        with acts.Hands(self.rules, Host(boottime() + 20, self.state), ORDER) as hands:
            done = acts.apply(result, hands, self.state, REALM, sweep="s%d" % self.clock)
        ledger = ledgers.load(self.state, REALM)[0]
        # The acts wrote down the real clock; the plans are made by that of the test.
        for held in ledger["aside"]:
            if held["since"] < 10000 or held["since"] > self.clock:
                held["since"] = self.clock
        if ledger["generation"]:
            ledgers.save(self.state, REALM, dict(ledger, generation=ledger["generation"] - 1))
        return {one["name"]: one["outcome"] for one in done}

    def undo(self, vm_id, until="2099-01-01"):
        with acts.Hands(self.rules, Host(boottime() + 20, self.state), ORDER) as hands:
            done = acts.undo(lambda held: held["vm_id"] == vm_id, hands, self.state, REALM, until)
        return {one["name"]: (one["outcome"], one["message"]) for one in done}


def tree(place):
    """Return all that there is below a directory: names, kinds, modes, owners, sizes, times, targets."""
    found = {}
    for path in [place, *sorted(place.rglob("*"))]:
        status = os.lstat(path)
        target = os.readlink(path) if stat.S_ISLNK(status.st_mode) else ""
        data = path.read_bytes() if stat.S_ISREG(status.st_mode) else b""
        found[str(path.relative_to(place))] = (
            status.st_mode, status.st_uid, status.st_gid, status.st_nlink, status.st_mtime_ns, status.st_ino,
            target, data,
        )
    return found


def test_a_jail_is_moved_aside_and_removed_after_the_hold(host):
    dead, live = host.make("v1"), host.make("v2")
    before, beside = tree(live), set(os.listdir(host.base / "fc"))
    assert host.sweep(["v2"]) == {}
    assert host.sweep(["v2"]) == {str(dead): "set_aside"}
    assert not dead.exists() and set(os.listdir(host.base / "fc")) == beside - {"v1"} | {jail.ASIDE}
    place = host.base / "fc" / jail.ASIDE
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    assert host.sweep(["v2"]) == {}
    host.clock += 3600
    assert host.sweep(["v2"]) == {str(dead): "reaped"}
    assert os.listdir(host.base / "fc") == ["v2"] and tree(live) == before
    assert ledgers.load(host.state, REALM)[0]["aside"] == []


def test_undo_brings_a_jail_back_exactly_as_it_was_and_pins_it(host):
    dead = host.make("v1")
    before = tree(dead)
    host.sweep()
    host.sweep()
    assert host.undo("v1") == {str(dead): ("restored", "")}
    assert tree(dead) == before and os.listdir(host.base / "fc") == ["v1"]
    assert ledgers.pins(host.state) == ["v1 until 2099-01-01"]
    ledger = ledgers.load(host.state, REALM)[0]
    assert (ledger["aside"], ledger["strikes"]) == ([], {})
    assert host.undo("v1") == {}
    told = journals.about(host.state, REALM, {"vm_id": "v1"})
    assert [(one["what"], one.get("step") or one.get("outcome")) for one in told["entries"]] == [
        ("intent", "aside"), ("outcome", "set_aside"), ("intent", "bring_back"), ("outcome", "restored"),
    ]
    assert told["broken"] is None


@pytest.mark.parametrize("is_done", [True, False])
def test_row_30_undo_brings_back_what_a_killed_reaper_had_set_aside_and_nobody_has_settled(host, is_done):
    """Where the VM lives the host is latched then, and no sweep writes its ledger any more."""
    dead = host.make("v1")
    before = tree(dead)
    host.sweep()
    ledger = ledgers.load(host.state, REALM)[0]
    host.sweep()
    (held,) = ledgers.load(host.state, REALM)[0]["aside"]
    token = {key: held[key] for key in held if key not in ("since", "boot_id", "sweep", "state")}
    os.unlink(ledgers.path_of(host.state, REALM))
    ledgers.save(host.state, REALM, acts.begun(ledger, [dict(token, step="aside", stop=False)]))
    if not is_done:
        (moved,) = (host.base / "fc" / jail.ASIDE).glob("*/v1")
        moved.rename(dead)
    assert [one["outcome"] for one in acts.foresee_undo(lambda held: True, host.state, REALM)] == ["would_restore"]
    assert host.undo("v1")[str(dead)][0] == "restored"
    assert tree(dead) == before and ledgers.pins(host.state) == ["v1 until 2099-01-01"]
    after = ledgers.load(host.state, REALM)[0]
    assert (after["aside"], after["intents"], after["strikes"]) == ([], [], {})


def test_row_30_undo_brings_back_what_a_killed_reaper_was_about_to_remove(host):
    dead = host.make("v1")
    before = tree(dead)
    host.sweep()
    host.sweep()
    ledger = ledgers.load(host.state, REALM)[0]
    (held,) = ledger["aside"]
    ledgers.save(host.state, REALM, acts.begun(dict(ledger, aside=[]), [
        dict(held, step="remove", stop=False, resume=True, why="")]))
    assert host.undo("v1")[str(dead)][0] == "restored"
    assert tree(dead) == before
    after = ledgers.load(host.state, REALM)[0]
    assert (after["aside"], after["intents"]) == ([], [])


def test_undo_has_nothing_to_do_with_a_removal_that_was_begun(host):
    dead = host.make("v1")
    host.sweep(hold=0)
    ledger = ledgers.load(host.state, REALM)[0]
    token = {"kind": "jail", "name": str(dead), "vm_id": "v1", "identity": "x", "details": {}, "stop": False}
    waiting = dict(token, since=1.0, boot_id="b", sweep="s", state="waiting", step="remove")
    ended = dict(token, step="aside", stop=True)
    ledgers.save(host.state, REALM, acts.begun(ledger, [dict(token, step="remove"), token, waiting, ended]))
    assert host.undo("v1") == {}


def test_undo_leaves_alone_what_took_the_place(host):
    dead = host.make("v1")
    host.sweep()
    host.sweep()
    dead.mkdir()
    assert host.undo("v1")[str(dead)][0] == "deferred"
    assert os.listdir(dead) == [] and ledgers.load(host.state, REALM)[0]["aside"]
    dead.rmdir()
    assert host.undo("v1")[str(dead)][0] == "restored"


def test_a_jail_that_was_moved_back_by_hand_or_by_an_undo_that_was_killed(host):
    dead = host.make("v1")
    host.sweep()
    host.sweep()
    (moved,) = (host.base / "fc" / jail.ASIDE).glob("*/v1")
    moved.rename(dead)
    assert host.undo("v1")[str(dead)] == ("restored", "it is where it was")


def test_row_32_what_is_aside_is_found_when_the_ledger_is_lost(host):
    dead = host.make("v1")
    host.sweep()
    host.sweep()
    os.unlink(ledgers.path_of(host.state, REALM))
    (moved,) = (host.base / "fc" / jail.ASIDE).glob("*/v1")
    assert host.sweep() == {}
    assert host.sweep() == {str(moved): "set_aside"}
    assert moved.exists()
    assert host.undo("v1")[str(moved)][0] == "restored" and dead.exists()
    os.unlink(os.path.join(host.state, "keep"))
    host.sweep()
    host.sweep()
    os.unlink(ledgers.path_of(host.state, REALM))
    host.sweep()
    host.sweep()
    host.clock += 3600
    assert set(host.sweep().values()) == {"reaped"} and os.listdir(host.base / "fc") == []


def test_row_30_a_reaper_that_was_killed_when_it_had_moved_them_is_followed_by_one_that_removes_them(host):
    dead, live = [host.make("v1"), host.make("v2"), host.make("v3")], host.make("v4")
    before = tree(live)
    assert host.sweep(["v4"], hold=0) == {}
    pid = os.fork()
    if pid == 0:
        try:
            acts.Hands._call = lambda hands, kind, act, argument: hands._work([kind, act, argument])
            jail._look_again = lambda jails: os._exit(9)
            host.sweep(["v4"], hold=0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    assert sorted(os.listdir(host.base / "fc")) == [jail.ASIDE, "v4"]
    assert [token["name"] for token in ledgers.load(host.state, REALM)[0]["intents"]] == [str(one) for one in dead]
    host.clock += 100
    assert host.sweep(["v4"], hold=0) == {str(one): "reaped" for one in dead}
    assert os.listdir(host.base / "fc") == ["v4"] and tree(live) == before
    ledger = ledgers.load(host.state, REALM)[0]
    assert (ledger["intents"], ledger["aside"]) == ([], [])


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
def test_a_jail_with_mounts_comes_back_with_them_and_one_that_is_a_mount_waits(host):
    dead, itself = host.make("v1"), host.base / "fc" / "v2"
    itself.mkdir()
    for place in (dead / "root" / "run", itself):
        if subprocess.run(["mount", "-t", "tmpfs", "none", place], check=False).returncode:
            pytest.skip("no right to mount")
    try:
        (dead / "root" / "run" / "inside").write_text("here")
        host.sweep()
        done = host.sweep()
        assert (done[str(dead)], done[str(itself)]) == ("set_aside", "deferred")
        states = {held["vm_id"]: held["state"] for held in ledgers.load(host.state, REALM)[0]["aside"]}
        assert states == {"v1": "aside", "v2": "waiting"}
        assert host.undo("v1")[str(dead)][0] == "restored"
        assert (dead / "root" / "run" / "inside").read_text() == "here"
        os.unlink(os.path.join(host.state, "keep"))
        host.clock += 3600
        assert host.sweep()[str(itself)] == "reaped"
        host.sweep()
        host.clock += 3600
        assert host.sweep()[str(dead)] == "reaped"
        assert str(host.base) not in pathlib.Path("/proc/self/mountinfo").read_text()
    finally:
        for line in pathlib.Path("/proc/self/mountinfo").read_text().splitlines()[::-1]:
            point = line.split()[4]
            if point.startswith(str(host.base)):
                subprocess.run(["umount", "-l", point], check=False)


def test_row_28_a_place_that_somebody_else_prepared_is_not_used(host):
    dead = host.make("v1")
    (host.base / "fc" / jail.ASIDE).mkdir(mode=0o777)
    os.chmod(host.base / "fc" / jail.ASIDE, 0o777)
    host.sweep()
    assert host.sweep() == {str(dead): "deferred"} and dead.exists()
    (host.base / "fc" / jail.ASIDE).rmdir()
    os.symlink("/tmp", host.base / "fc" / jail.ASIDE)
    host.clock += 100
    assert dead.exists()


def test_a_process_that_goes_in_while_it_is_moved_has_it_moved_back(host, monkeypatch):
    dead = host.make("v1")
    host.sweep()
    real, running = safe_tree.Tree.move_below, []

    def move_below(tree, *names):
        path = real(tree, *names)
        running.append(subprocess.Popen(["sleep", "60"], cwd=path))
        time.sleep(0.05)
        return path

    monkeypatch.setattr(safe_tree.Tree, "move_below", move_below)
    try:
        # Not in a child, which the change above would not reach.
        monkeypatch.setattr(acts.Hands, "_call", lambda hands, kind, act, token: hands._work([kind, act, token]))
        assert host.sweep() == {str(dead): "deferred"}
        assert dead.exists() and os.listdir(host.base / "fc") == ["v1"]
    finally:
        for one in running:
            one.kill()
            one.wait()


