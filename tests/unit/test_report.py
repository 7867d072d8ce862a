# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What a person reads."""

from __future__ import annotations

import json

import pytest
from ansible_collections.microvm.reaper.plugins.module_utils import resource as r
from ansible_collections.microvm.reaper.plugins.plugin_utils import report
from unit.builders import facts, outcomes, plan, share, sweep_twice, thing

MANIFEST = {"source": "file live.yml", "epoch": 7, "count": 12, "generated_at": 1_800_000_000.0, "index": "/tmp/x"}


def host(planned=None, **changes):
    full = dict.fromkeys(("busy", "error", "refused"))
    return dict(full, **dict({"plan": planned, "outcomes": [], "absent": {}, "unavailable": {}}, **changes))


def text(hosts, **how):
    return report.text("prod", how.pop("manifest", MANIFEST), hosts, **how)


def lines(hosts, **how):
    return text(hosts, **how).splitlines()


def test_a_quiet_sweep():
    quiet = plan(facts(thing("cgroup", "v1"), absent=["dm_thin"]), share(live=["v1"]))
    assert text({"h1": host(quiet, absent={"dm_thin": "the kernel has no device-mapper"})}) == (
        "microvm.reaper: realm prod, 1 host, 12 VMs live by file live.yml: nothing to reap\n"
        "h1: looked at cgroup, container, jail, snapshot, thin_id, zombie; not on this host: dm_thin (the kernel has no"
        " device-mapper)"
    )


def test_a_busy_sweep():
    held = thing("jail", "v3", holders=[r.holder("process", "77 (sh)")])
    first = sweep_twice(thing("cgroup", "v1"), thing("jail", "v2"), held)
    done = outcomes(first["reap"])
    done[0].update(outcome="failed", message="No space left on device")
    done[1].update(bytes=3 * 1024 * 1024)
    young = plan(facts(thing("cgroup", "v9"), unavailable=["container"]))
    hosts = {"h1": host(first, outcomes=done), "h2": host(young, unavailable={"container": "no answer"})}
    assert text(hosts) == "\n".join([
        "microvm.reaper: realm prod, 2 hosts, 12 VMs live by file live.yml: 1 reaped, 3.0 MiB given back, 1 suspected,"
        " 1 held, 1 failed",
        "HOST  KIND    LIVE  SUSPECTED  CONFIRMED  REAPED  ASIDE  HELD  FAILED  GIVEN BACK",
        "h1    cgroup     0          0          1       1      0     0       0     3.0 MiB",
        "h1    jail       0          0          1       0      0     1       1           -",
        "h2    cgroup     0          1          0       0      0     0       0           -",
        "h1: jail held (process): v3: held by process 77 (sh)",
        "h1: jail v2.jail FAILED: No space left on device",
        "h1: looked at cgroup, container, dm_thin, jail, snapshot, thin_id, zombie",
        "h2: looked at cgroup, dm_thin, jail, snapshot, thin_id, zombie; COULD NOT READ container (no answer)",
    ])


def of_parent(name, note=None):
    return dict(r.holder("process", name), pid=812, unit="containerd.service", image="y", note=note)


SHIM = "812 containerd-shim (unit containerd.service, container x, image y)"


def test_row_18_zombies_are_told_by_the_parent_that_does_not_reap_them():
    zombies = [thing("zombie", "v%d" % (number % 3), name=str(number), details={}) for number in range(15)]
    result = sweep_twice(*zombies)
    done = outcomes(result["reap"], r.DEFERRED)
    for number, one in enumerate(sorted(done, key=lambda one: int(one["name"]))):
        one["holders"] = [of_parent(SHIM) if number < 14 else of_parent("9 x", "it is stopped")]
    busy = dict(outcomes([dict(result["reap"][0], kind="jail")], r.DEFERRED)[0], holders=[r.holder("process", "5 y")])
    hosts = {"rack1": host(result, outcomes=[*done, busy])}
    assert lines(hosts)[-4:-1] == [
        "rack1: jail held (deferred): v0: deferred (process 5 y)",
        "rack1: 14 zombies of 3 VMs, their parent %s does not reap them" % SHIM,
        "rack1: 1 zombie of 1 VM, its parent 9 x does not reap it; it is stopped",
    ]
    document = report.as_json("prod", MANIFEST, hosts)["hosts"]["rack1"]
    assert document["zombies"] == [
        {"parent": of_parent(SHIM), "count": 14, "vms": ["v0", "v1", "v2"]},
        {"parent": of_parent("9 x", "it is stopped"), "count": 1, "vms": ["v2"]},
    ]


def test_zombies_that_the_policy_leaves_alone_are_told_with_it():
    details = {"parent": "7 keeper", "parent_unit": "k.service", "parent_container": None}
    zombies = [thing("zombie", "v1", name=name, details=details) for name in ("8", "9")]
    told = lines({"h1": host(sweep_twice(*zombies, zombies="report"))})
    why = "their parent 7 keeper (unit k.service) does not reap them; reap_zombies is report"
    assert "h1: 2 zombies of 1 VM, %s" % why in told
    assert not any("held (" in line for line in told)


def test_a_unit_that_was_restarted_is_told():
    result = sweep_twice(thing("zombie", "v1", details={}))
    done = dict(outcomes(result["reap"])[0], restarted="k.service", message="unit k.service was restarted, because x")
    assert "h1: unit k.service was restarted, because x" in lines({"h1": host(result, outcomes=[done])})


@pytest.mark.parametrize("note", [{"a": [1]}, 7, "x\ny", ["\x1b"]])
def test_row_36_a_parent_may_be_noted_with_anything(note):
    result = sweep_twice(thing("zombie", "v1", details={}))
    done = dict(outcomes(result["reap"], r.DEFERRED)[0], holders=[of_parent("7 x", note)])
    told = lines({"h1": host(result, outcomes=[done])})
    assert all(line.isprintable() for line in told) and any("7 x does not reap it; " in line for line in told)


def test_check_mode_says_so():
    result = sweep_twice(thing("cgroup", "v1"))
    told = text({"h1": host(result, outcomes=outcomes(result["reap"], r.WOULD_REAP))}, check_mode=True)
    assert "1 would be reaped" in told.splitlines()[0] and "nothing was changed" in told.splitlines()[0]


def test_what_is_not_proven_is_said():
    result = sweep_twice(thing("cgroup", "v1"), host_share=share(proven=False, unproven=["http x: no count"]))
    told = lines({"h1": host(result)}, manifest=dict(MANIFEST, unproven=["http x: no count"]))
    assert told[1] == "NOT PROVEN, so nothing is confirmed: http x: no count"
    assert result["families"]["v1"]["reasons"][-1] == {"code": "unproven", "text": "http x: no count"}


def test_a_batch_that_was_stopped():
    result = sweep_twice(thing("cgroup", "v1"), host_share=share(count=0))
    hosts = {"h1": host(result, refused=result["refused"]), "h2": host(plan(facts()))}
    told = lines(hosts, abort={"code": "blind", "message": "h1: no VM at all"}, manifest=None)
    assert "2 hosts, no list of live VMs: nothing was removed on any host" in told[0]
    assert told[1] == "STOPPED (blind): h1: no VM at all"


def test_what_a_refused_host_suspects_is_not_counted():
    capped = plan(facts(thing("cgroup", "v1"), thing("jail", "v2")))
    other = plan(facts(thing("cgroup", "v3")))
    refusal = {"code": "cloned_machine_id", "message": "h1 and h2 have the same machine id"}
    hosts = {"h1": host(capped, refused=refusal), "h2": host(other)}
    assert lines(hosts)[0].endswith("file live.yml: nothing to reap, 1 suspected, 1 host refused")
    assert lines(dict(hosts, h2=host(other, refused=refusal)))[0].endswith("nothing to reap, 2 hosts refused")
    assert lines(hosts, abort=refusal)[0].endswith("nothing was removed on any host")


def test_a_host_that_did_not_answer_is_told():
    told = lines({"h1": host(error="unreachable"), "h2": host(busy="another reaper works on this host")})
    assert "h1: unreachable" in told
    assert "h2: busy: another reaper works on this host" in told


def test_hosts_with_the_same_answer_share_a_line():
    told = lines({"h%d" % number: host(plan(facts())) for number in range(1, 6)})
    assert len(told) == 2


def test_a_thousand_lines_are_cut():
    result = sweep_twice(*[thing("cgroup", "v%d" % number) for number in range(100)], max_per_host=1000)
    told = lines({"h1": host(result, outcomes=outcomes(result["reap"], r.FAILED))})
    assert len(told) < 60
    assert any("60 more lines; reap_report_path has them all" in line for line in told)


HOSTILE = [
    "\x1b[2J\x1b[31mreaped",
    "a\nmicrovm.reaper: nothing to reap",
    "a\r",
    "a\x07\x00\x7f\x9b",
    "a\u202eb\u2028c",
    "\ud800\udcff",
    "%s%n%(x)s {{ 7*7 }} $(id) `id`",
    "x" * 5000,
]


@pytest.mark.parametrize("name", HOSTILE)
def test_row_36_nothing_that_a_terminal_obeys_is_printed(name):
    held = thing("jail", "v2", holders=[r.holder("process", name)])
    result = sweep_twice(thing("cgroup", "v1", name=name), held)
    done = [
        dict(outcomes(result["reap"])[0], outcome="failed", message=name, holders=[r.holder(name, name)]),
        dict(outcomes(result["reap"])[0], outcome="deferred", message=name, holders=[r.holder(name, name)]),
    ]
    bad = host(result, outcomes=done, error=name, busy=name, refused={"code": name, "message": name})
    told = text({"h1": dict(bad, absent={"dm_thin": name}, unavailable={"zombie": name})})
    assert all(line.isprintable() and len(line) < 1100 for line in told.split("\n"))
    told.encode("utf-8")
    shape = text({"h1": dict(bad, absent={"dm_thin": name}, unavailable={"zombie": name})}).count("\n")
    assert shape == text({"h1": dict(bad, absent={"dm_thin": "a"}, unavailable={"zombie": "a"})}).count("\n")
    json.dumps(report.as_json("prod", MANIFEST, {"h1": bad}))


GOOD = r.outcome({"kind": "cgroup", "name": "n", "vm_id": "v1"}, r.REAPED, bytes_given_back=1024)


@pytest.mark.parametrize(
    "junk",
    [
        None,
        "x",
        5,
        {},
        dict(GOOD, bytes="many"),
        dict(GOOD, holders=None),
        dict(GOOD, holders=["x"]),
        dict(GOOD, holders=[{"type": "process"}]),
        dict(GOOD, kind=[]),
        dict(GOOD, message=None),
        dict(GOOD, bytes=10**400),
        dict(GOOD, bytes=float("nan")),
        dict(GOOD, bytes=-1),
    ],
)
def test_a_host_that_returns_anything_does_not_spoil_the_report_of_the_others(junk):
    result = sweep_twice(thing("cgroup", "v1"))
    hosts = {"h1": host(result, outcomes=[GOOD, junk]), "h2": host(result, outcomes=[GOOD])}
    told = text(hosts)
    assert "2 reaped, 2.0 KiB given back" in told
    assert "h1: it returned 1 outcomes that are none" in told
    document = report.as_json("prod", MANIFEST, dict(hosts, h3=host(result, outcomes=junk)))
    assert document["hosts"]["h1"]["outcomes"] == [GOOD]
    json.dumps(document)


def test_one_outcome_that_is_in_no_list():
    hosts = {"h1": host(sweep_twice(thing("cgroup", "v1")), outcomes=GOOD)}
    assert "1 reaped, 1.0 KiB given back" in text(hosts)


def test_the_same_for_machines():
    result = sweep_twice(thing("cgroup", "v1"))
    document = report.as_json("prod", MANIFEST, {"h1": host(result, outcomes=outcomes(result["reap"]))})
    said = {key: MANIFEST[key] for key in ("source", "epoch", "count", "generated_at")}
    assert document["manifest"] == dict(said, unproven=None)
    assert document["kinds"]["h1"]["cgroup"]["reaped"] == 1
    assert document["hosts"]["h1"]["vms"]["confirmed"] == 1
    assert document["stopped"] is None


@pytest.mark.parametrize(
    ("count", "said"),
    [(0, "-"), (None, "-"), (1, "1 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (2**40, "1.0 TiB"), (2**52, "4096.0 TiB")],
)
def test_bytes_for_people(count, said):
    assert report.human_bytes(count) == said


def test_evidence_is_mentioned_when_something_is_wrong_with_it():
    planned = sweep_twice(thing("cgroup", "v1"))
    good = {"written": 1, "bytes": 9, "short": 0, "known": 0, "skipped": 0, "failed": [], "background": None}
    assert "evidence" not in text({"h1": host(planned, outcomes=outcomes(planned["reap"]), evidence=good)})
    bad = dict(good, short=2, skipped=3, failed=["cannot use the store of evidence /x", "v2: no room"])
    assert [line for line in lines({"h1": host(planned, evidence=bad)}) if "evidence" in line] == [
        "h1: evidence failed: cannot use the store of evidence /x (and 1 more)",
        "h1: no evidence of 3 VMs, reap_evidence_seconds was used up",
        "h1: only metadata as evidence of 2 VMs, reap_evidence_seconds was used up",
    ]
    for hostile in (None, 5, [], {"failed": 5}, {"failed": [{}], "short": "x", "skipped": None}):
        text({"h1": host(planned, evidence=hostile)})


def test_an_end_that_was_not_published_is_told():
    said = lines({"h1": host(sweep_twice(thing("cgroup", "v1")))}, unpublished="POST http://x: HTTP 500")
    assert said[1] == "NOT PUBLISHED: POST http://x: HTTP 500"
    assert report.as_json("prod", MANIFEST, {}, unpublished="why")["unpublished"] == "why"


def test_the_artifact_has_counts_only_and_adds_up_the_batches():
    first = sweep_twice(thing("cgroup", "v1"), thing("jail", "v2"))
    done = outcomes(first["reap"])
    done[0].update(bytes=3, outcome="failed", message="no")
    latched = {"code": "latched", "message": "v9 lives"}
    batch = {"h1": host(first, outcomes=done), "h2": host(first, refused=latched), "h3": host(error="unreachable")}
    counts = report.artifact("prod", batch, sweep="5", check_mode=True)
    sealed = report.artifact("prod", {}, sealed=dict(SIGNED, unseen=[], refused={}))
    assert (sealed["planned"], sealed["plan"]) == (True, SIGNED["plan"])
    assert report.artifact("prod", {}, opened=SIGNED)["plan"] == SIGNED["plan"]
    assert counts == {
        "realm": "prod", "sweep": "5", "check_mode": True, "planned": False, "plan": None, "hosts": 3, "errors": 1,
        "refused": {"latched": 1}, "stopped": None, "unpublished": False, "live": 0, "suspected": 0, "confirmed": 4,
        "reaped": 1, "aside": 0, "held": 0, "failed": 1, "already_gone": 0,
        "bytes": 3 + sum(one["bytes"] or 0 for one in done[1:]),
    }
    stop = {"code": "fleet_cap", "message": "\x1b[31m" + "too many" * 1000}
    both = report.artifact("prod", {"h4": host(refused=latched)}, before=counts, abort=stop, unpublished="timeout")
    assert (both["hosts"], both["reaped"], both["refused"], both["unpublished"]) == (4, 1, {"latched": 2}, True)
    assert both["stopped"]["code"] == "fleet_cap" and "\x1b" not in both["stopped"]["message"]
    last = report.artifact("prod", {"h%d" % n: host(first, outcomes=done) for n in range(5, 3005)}, before=both)
    assert last["hosts"] == 3004 and last["stopped"] == both["stopped"] and len(json.dumps(last)) < 2000


# --- signed plans ------------------------------------------------------------------------------------------------

SIGNED = {
    "plan": "1f2e3d4c5b6a7988",
    "made_at": 1_800_000_000.0,
    "expires_at": 1_800_003_600.0,
    "manifest": {"epoch": 7},
    "budget": {"vms": 1, "hosts": 2, "caps": {}},
}


def test_a_plan_is_shown_as_what_would_be_done_and_what_is_not_in_it():
    planned = sweep_twice(thing("cgroup", "v1"), thing("jail", "v1"), hold={"jail": 60})
    would = report.foreseen(planned)
    assert [(one["kind"], one["outcome"]) for one in would] == [("jail", "would_set_aside"), ("cgroup", "would_reap")]
    sealed = dict(SIGNED, path="/srv/p", unseen=["h7", "h8"], refused={"h9": "latched"})
    said = lines({"h1": host(planned, outcomes=would)}, sealed=sealed)
    assert said[0].endswith(": 1 would be reaped, 1 aside (a plan: nothing was changed)")
    assert said[1] == (
        "PLAN 1f2e3d4c5b6a7988 of 2027-01-15T08:00:00Z: 1 VM on 2 hosts; it can be applied until 2027-01-15T09:00:00Z;"
        " it is in /srv/p"
    )
    assert said[2:4] == ["NOT IN THE PLAN: h7 and h8, which could not be read", "NOT IN THE PLAN: h9, refused"]
    complete = lines({"h1": host(planned)}, sealed=dict(SIGNED, path="", unseen=[], refused={}))
    assert complete[1].endswith("until 2027-01-15T09:00:00Z") and "NOT IN" not in "".join(complete)


def applied(state, why, **changes):
    planned = dict(plan(facts()), within={"plan": "p", "made_at": 1.0, "epoch": 7, "state": state, "why": why})
    return host(planned, **changes)


def test_an_apply_says_which_plan_it_was_and_where_it_was_not_applied():
    hosts = {
        "h1": applied("applied", None),
        "h2": applied("idle", "nothing to do"),
        "h3": applied("plan_spent", "applied before"),
        "h4": applied("plan_spent", "applied before"),
        "h5": applied("unseen", "not read then"),
        "h6": applied("applied", None, refused={"code": "host_unknown", "message": "m"}),
        "h7": host(),
    }
    opened = dict(SIGNED, index="/tmp/plan.sqlite")
    assert lines(hosts, opened=opened)[1:4] == [
        "plan 1f2e3d4c5b6a7988 of 2027-01-15T08:00:00Z, by epoch 7: 1 VM on 2 hosts, applied on 1 host of this run",
        "h3 and h4: nothing is removed (plan_spent): applied before",
        "h5: nothing is removed (unseen): not read then",
    ]
    document = report.as_json("prod", MANIFEST, hosts, opened=opened)
    assert document["applied"] == SIGNED and document["sealed"] is None
    assert document["hosts"]["h3"]["within"]["state"] == "plan_spent" and document["hosts"]["h7"]["within"] is None
    assert "by epoch" not in lines(hosts, opened=dict(opened, manifest={"epoch": None}))[1]
