# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Every verdict, refusal and reason in sentences, and when a family will be confirmed."""

from __future__ import annotations

import ast
import inspect
import time

import pytest
from ansible.errors import AnsibleFilterError
from ansible_collections.microvm.reaper.plugins.filter.explain import explain as the_filter
from ansible_collections.microvm.reaper.plugins.module_utils import journal as journals
from ansible_collections.microvm.reaper.plugins.module_utils import ledger as ledgers
from ansible_collections.microvm.reaper.plugins.plugin_utils import brake, explaining, manifest, outlook, planner
from unit.builders import REALM, TRAITS, document, facts, plan, policy, remembered, share, thing

BOTH = ["h1", "h7"]
NOW = 1_800_000_000.0


def listed(*vms, age=0, **changes):
    """Return a list of live VMs that is so many seconds old; one more VM always lives on h7."""
    full = document([("other", "h7"), *vms], hosts=BOTH, generated_at=NOW - age)
    return dict(full, **changes)


def explain(host_facts, live=None, what="v1", journal=(), **changes):
    return explaining.explain(host_facts, live or listed(), policy(**changes), what, journal)


def said(*arguments, **changes):
    """Return the verdict and all sentences as one text."""
    found = explain(*arguments, **changes)
    return found["verdict"], " ".join(found["sentences"])


def struck(*things, **changes):
    """Return the ledger of a host that was swept once at 1000 s."""
    return remembered(plan(facts(*things), **changes))


def set_aside(kind="jail", state="aside"):
    """Return the ledger of a host on which a thing was set aside at 1060 s."""
    held = {"kind": kind, "name": "v1.%s" % kind, "vm_id": "v1", "identity": "id of v1.%s" % kind, "details": {}}
    held.update(since=1060.0, boot_id="boot-1", sweep="s1", state=state)
    return dict(ledgers.empty(REALM), aside=[held])


CGROUP = thing("cgroup", "v1")
VOLUME = thing("dm_thin", "v1")


# --- every verdict -----------------------------------------------------------------------------------------------

CASES = {
    "live": (
        (facts(CGROUP), listed(("v1", "h1"))), {},
        "live", ["nothing of it is touched", "the VM v1 lives here", "cgroup v1.cgroup, 1000 s old, not in use"],
    ),
    "absent, first look": (
        (facts(CGROUP),), {},
        "suspected", ["does not list the VM", "0 of the 2 strikes",
                      "confirmed by 2 more sweeps, the last 60 s from now"],
    ),
    "elsewhere": (
        (facts(CGROUP), listed(("v1", "h7"))), {},
        "suspected", ["the VM v1 lives on h7, not here"],
    ),
    "one strike": (
        (facts(CGROUP, now=1030, ledger=struck(CGROUP)),), {},
        "suspected", ["1 of the 2 strikes", "the latest of 30 s ago", "at least 60 s apart (reap_strike_interval)",
                      "confirmed by 1 more sweep, 30 s from now"],
    ),
    "tombstoned and held": (
        (facts(CGROUP, now=1070, ledger=struck(CGROUP)),
         listed(tombstones=[{"vm_id": "v1", "destroyed_at": NOW - 300}])), {"hold": 86400 * 3},
        "held", ["was destroyed 300 s ago", "waiting where it is for 0 s, and reap_hold is 259200"],
    ),
    "set aside": (
        (facts(now=1400, ledger=set_aside()),), {"hold": 3600},
        "held", ["jail v1.jail was set aside 340 s ago by the sweep s1. It is removed when reap_hold, 3600 s, is over",
                 "playbooks/undo.yml -e vm_id=v1 brings it back"],
    ),
    "set aside before a reboot": (
        (facts(now=1400, boot="boot-2", ledger=set_aside()),), {"hold": {"jail": 7200}},
        "held", ["v1.jail was set aside before the last boot", "reap_hold, 7200 s (2.0 hours), is over"],
    ),
    "left where it is": (
        (facts(CGROUP, now=1400, ledger=set_aside(state="waiting", kind="cgroup")),), {"hold": 3600},
        "suspected", ["cgroup v1.cgroup is left where it is, confirmed 340 s ago"],
    ),
    "to be set aside": (
        (facts(thing("jail", "v1"), now=1070, ledger=struck(thing("jail", "v1"))),), {"hold": 3600},
        "confirmed", ["The next sweep sets aside, in this order: jail v1.jail."],
    ),
    "confirmed": (
        (facts(CGROUP, thing("jail", "v1"), now=1070, ledger=struck(CGROUP, thing("jail", "v1"))),), {},
        "confirmed", ["the next sweep removes it", "in this order: jail v1.jail, cgroup v1.cgroup."],
    ),
    "disputed": (
        (facts(thing("cgroup", "v1", in_use=True)),), {},
        "disputed", ["in use (identity", "reap_running is tombstoned", "Waiting changes nothing"],
    ),
    "young": (
        (facts(thing("cgroup", "v1", age=5.0)),), {},
        "held", ["5 s old", "reap_min_age", "confirmed by 2 more sweeps, the last 115 s from now"],
    ),
    "of unknown age": (
        (facts(thing("cgroup", "v1", age=None)),), {},
        "suspected", ["of unknown age, which counts as young"],
    ),
    "just destroyed": (
        (facts(CGROUP), listed(tombstones=[{"vm_id": "v1", "destroyed_at": NOW - 5}])), {},
        "held", ["was destroyed 5 s ago", "reap_min_age says how long the platform",
                 "confirmed by 2 more sweeps, the last 115 s from now"],
    ),
    "destroyed, nobody knows when": (
        (facts(CGROUP), listed(tombstones=[{"vm_id": "v1"}])), {},
        "suspected", ["says that the VM v1 was destroyed."],
    ),
    "pinned for ever": (
        (facts(CGROUP),), {"keep": ["v*"]},
        "held", ["reap_keep names it (v*)", "the file 'keep'", "Waiting changes nothing"],
    ),
    "pinned until a day is over": (
        (facts(CGROUP),), {"keep": ["v1 until 2027-01-15"]},
        "held", ["reap_keep names it (v1)", "confirmed by 2 more sweeps, the last 57660 s (16.0 hours) from now"],
    ),
    "pinned by the host": (
        (facts(CGROUP, pins=["v1"]),), {},
        "held", ["the host's pin file names it (v1)"],
    ),
    "an unproven list": (
        (facts(CGROUP, now=1070, ledger=struck(CGROUP)), listed(proven=False)), {},
        "suspected", ["does not prove that its list is complete", "earns strikes and no removal",
                      "Waiting changes nothing"],
    ),
    "held by something": (
        (facts(thing("jail", "v1", holders=[{"type": "mount", "name": "/x"}]), now=1070,
               ledger=struck(thing("jail", "v1"))),), {},
        "held", ["held by mount /x", "It is held: held by mount /x. It goes in a sweep after that is gone"],
    ),
    "a zombie": (
        (facts(thing("zombie", "v1", parent="7 init"), now=1070, ledger=struck(thing("zombie", "v1"))),),
        {"zombies": "report"},
        "held", ["only its parent 7 init can reap it", "reap_zombies=notify_parent"],
    ),
    "in use by a stranger": (
        (facts(thing("jail", "v1", in_use=True), now=1070, ledger=struck(thing("jail", "v1"))),),
        {"running": "confirmed"},
        "held", ["by nothing that belongs to the VM", "Find out what uses it"],
    ),
    "what it depends on cannot be read": (
        (facts(VOLUME, now=1070, ledger=struck(VOLUME), unavailable=["container"]),), {},
        "unknown", ["container could not be read: no answer", "what could not be read is not free",
                    "nothing is known of such things of it: container (no answer)"],
    ),
    "refused": (
        (facts(CGROUP), listed(vms=[])), {},
        "refused", ["Refused (blind): ", "reap_expect_empty=prod", "cgroup v1.cgroup, 1000 s old"],
    ),
    "over the cap": (
        (facts(CGROUP, now=1070, ledger=struck(CGROUP)),), {"max_per_host": 0},
        "refused", ["Refused (host_cap): ", "reap_max_per_host=0",
                    "The VM is confirmed: the live source does not list"],
    ),
    "latched": (
        (facts(CGROUP, ledger=dict(ledgers.empty(REALM), latch={"code": "latched", "message": "clear me"})),), {},
        "refused", ["Refused (latched): clear me. Find out first whether the VM was alive"],
    ),
    "reaped": (
        (facts(ledger=dict(ledgers.empty(REALM), reaped={"v1": 1_800_000_000})),), {},
        "gone", ["nothing of it is on this host", "something of the VM was removed at 2027-01-15T08:00:00Z"],
    ),
    "begun and not finished": (
        (facts(ledger=dict(ledgers.empty(REALM), intents=[
            {"kind": "dm_thin", "name": "d", "vm_id": "v1", "identity": "i", "details": {}}])),), {},
        "gone", ["A sweep began to remove dm_thin d, and its end is not known"],
    ),
    "of a kind that cannot be read now": (
        (facts(ledger=struck(CGROUP), unavailable=["cgroup"]),), {},
        "gone", ["strikes of cgroup v1.cgroup, which is not to be seen now", "cgroup (no answer)"],
    ),
    "a corrupt ledger": (
        (facts(CGROUP, ledger_problem="the ledger x is corrupt"),), {},
        "suspected", ["the ledger x is corrupt."],
    ),
    "live, and nothing of it here": (
        (facts(), listed(("v1", "h1"))), {},
        "live", ["the VM v1 lives here"],
    ),
    "unheard of": (
        (facts(absent=["dm_thin"], unavailable=["jail"]),), {},
        "not_here", ["This host knows nothing of v1", "does not list the VM v1",
                     "Looked at: cgroup, container, snapshot",
                     "Not on this host: dm_thin (not here)", "Could not be read", "jail (no answer)"],
    ),
    "live by a list that says of no host that it speaks for it": (
        (facts(), listed(("v1", "h3"), hosts=None)), {},
        "not_here", ["it does not say for which hosts it speaks, so the VM counts as living here"],
    ),
}


@pytest.mark.parametrize(("arguments", "changes", "verdict", "words"), CASES.values(), ids=CASES)
def test_what_is_said(arguments, changes, verdict, words):
    live = next((one for one in arguments[1:] if isinstance(one, dict)), listed())
    if live.get("proven") is False:
        live = handle_of(live)
    found = explain(arguments[0], live, **changes)
    text = " ".join(found["sentences"])
    assert (found["host"], found["vm_id"], found["verdict"]) == ("h1", "v1", verdict)
    assert [word for word in words if word not in text] == [], text
    assert found["sentences"][0] == explaining.HEADLINES[verdict].format("v1")
    assert all(sentence.endswith(".") and ".." not in sentence for sentence in found["sentences"]), found["sentences"]


@pytest.fixture(autouse=True)
def _here_and_now(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "now", lambda: NOW)
    handle_of.place = tmp_path


def handle_of(live):
    """Return the HANDLE of a list; only a source can call one unproven."""
    checked = manifest.check(live, "test", now=manifest.now(), max_age=9e9)
    return manifest.handle(manifest.union([checked]), str(handle_of.place / "live.sqlite"))


def test_every_verdict_has_its_case():
    assert {case[2] for case in CASES.values()} == set(explaining.HEADLINES)
    assert set(explaining.HEADLINES) >= set(planner.VERDICTS)


def codes(module, function, place=0):
    """Return the codes that the source of a module passes to one of its functions, as texts or as constants."""
    calls = [node for node in ast.walk(ast.parse(inspect.getsource(module))) if isinstance(node, ast.Call)]
    given = [call.args[place] for call in calls if getattr(call.func, "id", "") == function]
    constants = {one.value for one in given if isinstance(one, ast.Constant)}
    return constants | {getattr(module, one.id) for one in given if isinstance(one, ast.Name) and one.id.isupper()}


def test_no_code_of_the_planner_or_the_brake_is_without_a_sentence():
    reasons = codes(planner, "_reason")
    assert {"too_young", "absent", "running"} <= reasons
    members = codes(planner, "_hold", place=1)
    assert members == {"zombie", "busy", "hold", "unmapped_thin_id"}
    assert reasons | members == set(explaining.REASONS)
    refusals = codes(planner, "_refusal")
    assert {"blind", "host_cap", "latched"} <= refusals
    of_the_brake = {*brake.BATCH_CODES, brake.LATCHED, "fleet_cap", "cloned_machine_id"}
    assert all('"%s"' % code in inspect.getsource(brake) for code in of_the_brake)
    assert refusals | of_the_brake == set(explaining.REFUSALS)


@pytest.mark.parametrize("code", explaining.REFUSALS)
def test_every_refusal_is_told_with_what_a_person_can_do(code):
    text = explaining.text("v1", {"h1": explain(facts(CGROUP))}, refused={"h1": {"code": code, "message": "because"}})
    assert "A sweep of these hosts leaves this one alone (%s): because. %s" % (code, explaining.REFUSALS[code]) in text


def test_strikes_of_an_earlier_boot_have_no_age():
    rebooted = facts(CGROUP, now=10, boot="boot-2", ledger=struck(CGROUP))
    text = said(rebooted)[1]
    assert "1 of the 2 strikes that are needed (reap_strikes)." in text and "ago" not in text


def test_strikes_of_what_is_seen_are_told_once():
    assert "not to be seen now" not in said(facts(CGROUP, now=1030, ledger=struck(CGROUP)))[1]


def test_on_a_host_that_is_refused_nothing_comes():
    other = thing("cgroup", "v2")
    text = said(facts(CGROUP, other, now=1070, ledger=struck(other)), max_per_host=0)[1]
    assert "The VM is suspected" in text and "If everything stays" not in text and "Waiting" not in text


# --- things, and names -------------------------------------------------------------------------------------------


def test_a_resource_is_explained_by_its_name_with_the_family_that_it_is_judged_with():
    things = [CGROUP, thing("jail", "v1", holders=[{"type": "mount", "name": "/x"}])]
    host = facts(*things, now=1070, ledger=struck(*things))
    verdict, text = said(host, what="v1.jail")
    assert verdict == "held" and "judged together with 1 more things of the VM v1" in text
    assert "On this host: cgroup" not in text
    assert said(host, what="v1.cgroup")[0] == said(host)[0] == "confirmed"


def test_a_name_that_is_also_the_id_of_a_vm_is_the_vm():
    both = [thing("container", "run-1", name="run-1"), thing("snapshot", "run-1", name="run-1-committed")]
    assert "snapshot run-1-committed" in said(facts(*both), what="run-1")[1]


def test_of_one_name_in_two_kinds_both_are_told():
    both = [thing("container", "v1", name="n"), thing("snapshot", "v1", name="n")]
    text = said(facts(*both), what="n")[1]
    assert "container n," in text and "snapshot n," in text


def test_what_was_reaped_is_known_by_its_name_too():
    found = explain(facts(), what="v1.cgroup", journal=[entry("intent"), entry("outcome", outcome="reaped")])
    assert (found["verdict"], found["vm_id"]) == ("gone", "v1")
    token = {"kind": "dm_thin", "name": "d", "vm_id": "v1", "identity": "i", "details": {}}
    found = explain(facts(ledger=dict(ledgers.empty(REALM), intents=[token])), what="d")
    assert (found["verdict"], found["vm_id"]) == ("gone", "v1")
    found = explain(facts(ledger=struck(CGROUP), unavailable=["cgroup"]), what="v1.cgroup")
    assert (found["verdict"], found["vm_id"]) == ("gone", "v1")


def test_kinds_that_were_not_looked_at_and_foreign_things():
    host = facts()
    del host["kinds"]["zombie"]
    host["kinds"]["jail"]["foreign"] = 3
    text = said(host)[1]
    assert "because of reap_kinds: zombie." in text and "no rule of reap_presets matches (jail)" in text


def test_a_kind_that_the_planner_does_not_know_is_no_crash():
    host = facts()
    host["kinds"]["strange"] = dict(host["kinds"]["jail"], resources=[dict(CGROUP, kind="strange")])
    assert said(host)[0] == "not_here"


def test_many_things_are_told_in_part():
    things = [thing("cgroup", "v1", name="c%03d" % number) for number in range(60)]
    text = said(facts(*things, now=1070, ledger=struck(*things)))[1]
    assert "And 10 more things of it are on this host." in text and "and 10 more." in text
    assert ("c049" in text, "c050" in text) == (True, False)


# --- the journal -------------------------------------------------------------------------------------------------


def entry(what, **changes):
    full = {
        "what": what, "time": "2026-11-22T03:10:00Z", "boottime": 1.0, "boot_id": "b", "sweep": "s1", "kind": "cgroup",
        "name": "v1.cgroup", "vm_id": "v1",
    }
    if what == journals.INTENT:
        full.update(evidence="absent", strikes=2, reasons=["the live source does not list the VM"], source="s", epoch=7)
    return dict(full, **changes)


def test_an_intent_and_its_outcome_are_one_sentence():
    verdict, text = said(facts(), journal=[entry("intent"), entry("outcome", outcome="reaped", bytes=2048, message="")])
    assert verdict == "gone"
    assert (
        "Journal, 2026-11-22T03:10:00Z, sweep s1: cgroup v1.cgroup was reaped and gave back 2.0 KiB, because the live "
        "source does not list the VM (2 strikes, the list of s, epoch 7)."
    ) in text


@pytest.mark.parametrize(
    ("outcome", "words"),
    [
        ("already_gone", "was gone already"),
        ("deferred", "was left, because it was busy (m)"),
        ("identity_changed", "another object has its name now (m)"),
        ("failed", "could not be removed (m)"),
        ("something_new", "came to something_new (m)"),
    ],
)
def test_every_outcome_has_words(outcome, words):
    assert words in said(facts(), journal=[entry("outcome", outcome=outcome, message="m", bytes=0)])[1]


def test_an_intent_without_an_outcome_and_without_reasons():
    text = said(facts(), journal=[entry("intent", reasons=[], strikes=None, source=None, epoch=None)])[1]
    assert "was about to be removed, and what came of that was not written down, because absent." in text


def test_sweeps_are_told_apart_and_the_oldest_summed_up():
    many = [entry("outcome", outcome="deferred", sweep="s%d" % number, time="t%d" % number) for number in range(25)]
    text = said(facts(), journal=many)[1]
    assert "The journal has 5 earlier acts on it." in text
    assert ("sweep s4:" in text, "sweep s5:" in text, "sweep s24:" in text) == (False, True, True)
    assert "more than 5 earlier" in said(facts(), journal={"entries": many, "truncated": True})[1]
    assert "more than 0 earlier" in said(facts(), journal={"entries": many[:1], "truncated": True})[1]


def test_the_latest_latch_is_told_where_something_is_known():
    latches = [entry("latched", message="first"), entry("latched", message="second")]
    text = said(facts(CGROUP), journal=latches)[1]
    assert "all reaping in the realm was latched: second." in text and "first" not in text
    assert said(facts(), journal=latches)[0] == "not_here"


def test_of_the_journal_only_what_is_asked_about_is_told():
    strange = [entry("outcome", outcome="reaped", vm_id="v2", name="n2")]
    assert "n2" not in said(facts(CGROUP), journal=strange)[1]
    assert said(facts(), what="n2", journal=strange)[0] == "gone"


@pytest.mark.parametrize("journal", [5, None, "x", {}, {"entries": None}, [5], [{"what": "intent"}], {"entries": [{}]}])
def test_a_journal_that_is_none_is_an_error_with_words(journal):
    with pytest.raises(AnsibleFilterError, match="microvm.reaper.explain: .*journal"):
        the_filter(facts(CGROUP), listed(), policy(), "v1", journal)


def test_the_filter_names_what_is_wrong_with_its_inputs():
    for arguments in (({}, listed(), policy()), (facts(), {}, policy()), (facts(), listed(), policy(strikes=1))):
        with pytest.raises(AnsibleFilterError, match="microvm.reaper.explain: "):
            the_filter(*arguments, "v1")
    assert the_filter(facts(CGROUP), listed(), policy(), 5)["verdict"] == "not_here"


# --- all hosts ---------------------------------------------------------------------------------------------------


def test_hosts_that_know_nothing_share_a_line():
    known, unknown = explain(facts(CGROUP)), explain(facts())
    text = explaining.text("v1", {"h2": known, "h1": unknown, "h3": unknown}, silent=["h9"])
    lines = text.splitlines()
    assert lines[0] == "microvm.reaper: why v1 was or was not reaped"
    assert lines[1] == "h2: suspected" and lines[2] == "  " + known["sentences"][0]
    assert lines[-2:] == ["h1 and h3: nothing known of it", "h9: could not be asked; see the failure above"]
    assert len(lines) == len(known["sentences"]) + 4


def test_when_nobody_knows_what_could_have_been_seen_is_told_once_for_all_that_looked_the_same():
    one, other = explain(facts()), explain(facts(unavailable=["jail"]))
    text = explaining.text("v1", {"h1": one, "h2": one, "h3": other})
    assert "h1 and h2: nothing known of it\n  " in text and text.count("Looked at") == 2


def test_what_stops_all_hosts_comes_first_and_is_not_repeated():
    refused = explain(facts(CGROUP), listed(vms=[]))
    refusal = plan(facts(CGROUP), share(count=0))["refused"]
    text = explaining.text("v1", {"h1": refused}, stopped=refusal, refused={"h1": refusal})
    assert text.splitlines()[1].startswith("NO SWEEP of these hosts removes anything (blind): ")
    assert text.count("reap_expect_empty=prod") == 2 and "leaves this one alone" not in text


def test_nothing_that_a_terminal_would_obey_is_printed():
    text = explaining.text("\x1b[2J", {"h1": dict(explain(facts()), sentences=["a\x1bb\nc"])})
    assert "\x1b" not in text and "a\\x1bb\\nc" in text


# --- the outlook is the planner's own ----------------------------------------------------------------------------


def truth(host_facts, moments, host_share, **changes):
    """Return the verdict of v1 after sweeps at these moments, by the planner."""
    ledger = host_facts["ledger"]
    for moment in moments:
        later = dict(host_facts, ledger=ledger, boottime_seconds=host_facts["boottime_seconds"] + moment)
        found = plan(later, host_share, **changes)
        ledger = remembered(found, ledger)
    return found["families"]["v1"]["verdict"]


@pytest.mark.parametrize(
    "changes",
    [{}, {"strikes": 5}, {"hold": 1000}, {"strikes": 3, "hold": 61}, {"strike_interval": 7}, {"min_age": 500},
     {"strike_interval": 0, "min_age": 0}],
)
@pytest.mark.parametrize("age", [None, 1e6])
def test_the_outlook_is_what_happens_and_no_sooner(changes, age):
    host, host_share = facts(thing("cgroup", "v1", age=age)), share()
    full = planner.complete_policy(policy(**changes))
    sweeps, seconds = outlook.to_come(host, host_share, full, "v1")
    # Sweeps every second are the most that can be done.
    assert truth(host, range(seconds + 1), host_share, **changes) == "confirmed"
    assert seconds == 0 or truth(host, range(seconds), host_share, **changes) != "confirmed"
    # So many are enough, when they come at the right time, and one less is not.
    interval = changes.get("strike_interval", 60) or 1
    some = [number * interval for number in range(sweeps - 1)]
    assert truth(host, [*some, max(seconds, sweeps * interval)], host_share, **changes) == "confirmed"
    assert truth(host, [*some[:-1], 10**6], host_share, **changes) != "confirmed"


def test_the_outlook_is_that_of_this_family_whatever_else_is_there():
    others = [thing("cgroup", "v%d" % number) for number in range(2, 40)]
    host = facts(CGROUP, *others, unavailable=["jail"], ledger=struck(*others, thing("jail", "v3")))
    full = planner.complete_policy(policy(max_per_host=0, max_percent_per_host=0))
    assert outlook.to_come(host, share(), full, "v1") == (2, 60)


def test_the_outlook_costs_what_the_family_costs():
    others = [thing("cgroup", "other%d" % number) for number in range(20000)]
    begin = time.process_time()
    outlook.to_come(facts(CGROUP, *others), share(), planner.complete_policy(policy(hold=10**6)), "v1")
    assert time.process_time() - begin < 1.0


def test_traits_of_the_tests_are_those_of_the_kinds():
    assert outlook.TRAITS == TRAITS


def test_a_journal_that_was_changed_is_told():
    journal = {"entries": [], "truncated": False, "broken": "line 3 of journal.jsonl does not follow"}
    verdict, told = said(facts(CGROUP), journal=journal)
    assert (verdict, told.count("The journal is not as it was written: line 3 of")) == ("suspected", 1)


def test_what_the_journal_says_of_the_ladder():
    entry = {"time": "2026-11-22T02:00:00Z", "sweep": "s1", "kind": "jail", "name": "v1.jail", "vm_id": "v1"}
    entries = [
        dict(entry, what="intent", step="aside"), dict(entry, what="outcome", outcome="set_aside"),
        dict(entry, what="intent", step="bring_back", sweep="s2"),
        dict(entry, what="outcome", outcome="restored", sweep="s2"),
        dict(entry, what="intent", step="aside", sweep="s3"),
    ]
    told = said(facts(CGROUP), journal=entries)[1]
    for words in ("sweep s1: jail v1.jail was set aside", "sweep s2: jail v1.jail was brought back",
                  "sweep s3: jail v1.jail was about to be set aside, and what came of that"):
        assert words in told


def test_signed_plans_are_named():
    applied = {"plan": "1f2e", "made_at": NOW, "epoch": 7}
    last = "The signed plan that was applied last on this host is 1f2e, made at 2027-01-15T08:00:00Z"
    told = said(facts(CGROUP, now=1060.0, ledger=dict(struck(CGROUP), applied=applied)))[1]
    assert last + ", by epoch 7." in told
    assert last + "." in said(facts(CGROUP, ledger=dict(struck(CGROUP), applied=dict(applied, epoch=None))))[1]
    assert "signed plan" not in said(facts(CGROUP, ledger=struck(CGROUP)))[1]
    acted = [entry("intent", reasons=["why"], plan="1f2e"), entry("outcome", outcome="reaped")]
    assert ", epoch 7, signed plan 1f2e)." in said(facts(CGROUP), journal=acted)[1]
