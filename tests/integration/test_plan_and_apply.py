# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A plan of the fleet in one run, its shares in others: on real hosts, by the real ansible-playbook."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from hosts.fleet import ROOT, Fleet, Sweep

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.timeout(240),
    pytest.mark.skipif(os.geteuid() != 0, reason="test hosts need root"),
]

FEW = {"live": 2, "orphans": 2, "containers": 0, "running_orphans": 0, "zombies": 0}
QUICK = {"reap_min_age": 0, "reap_strike_interval": 0.1, "reap_max_percent": 100}
AWAY = {"ansible_port": 1}  # another port, so that no connection that is still open is used
KEY = "a key that is as long as it has to be, and longer"


def run(fleet: Fleet, playbook: str, *arguments: str, live: dict | None = None, tag: str = "", **variables) -> Sweep:
    """Run one of the playbooks with a list of this moment, and with a report of its own."""
    time.sleep(0.3)
    if live is not None or not tag:
        fleet.list_live(**dict({"generated_at": time.time() + 25}, **(live or {})))
    path = fleet.state / f"report{tag}.json"
    path.unlink(missing_ok=True)
    extra = dict(QUICK, reap_plan_key=KEY, reap_report_path=str(path), **variables)
    argv = [*fleet.sweep_argv("-e", json.dumps(extra), *arguments)[:-1], f"playbooks/{playbook}.yml"]
    done = subprocess.run(argv, cwd=ROOT, text=True, capture_output=True, timeout=120)
    return Sweep(done, json.loads(path.read_text()) if path.exists() else None)


def plan(fleet: Fleet, *arguments: str, **variables) -> Sweep:
    return run(fleet, "plan", *arguments, **dict({"reap_plan_path": place(fleet)}, **variables))


def apply(fleet: Fleet, *arguments: str, **variables) -> Sweep:
    return run(fleet, "reap", *arguments, **dict({"reap_plan": place(fleet)}, **variables))


def place(fleet: Fleet) -> str:
    return str(fleet.state / "signed.plan")


def struck(fleet: Fleet) -> tuple[str, str]:
    """Plant, and sweep once; return the names of the hosts."""
    fleet.plant(FEW)
    assert run(fleet, "reap").code == 0
    first, second = sorted(fleet.hosts())
    return first, second


def ledgers(fleet: Fleet) -> dict:
    return {host: fleet.ledger(host) for host in fleet.hosts()}


def removed(done: Sweep) -> set[str]:
    """Return "host vm_id" of all of which something was removed."""
    return {
        f"{host} {one['vm_id']}"
        for host, said in (done.report or {"hosts": {}})["hosts"].items()
        for one in said["outcomes"]
        if one["outcome"] == "reaped"
    }


def dead(fleet: Fleet, *hosts: str) -> set[str]:
    return {f"{host} {vm_id}" for host in hosts for vm_id in fleet.planted()[host]["orphans"]}


def said(done: Sweep) -> str:
    return " ".join(done.output.split())


def test_a_plan_of_the_fleet_is_applied_by_slices_at_once_and_only_once(pair: Fleet) -> None:
    first, second = struck(pair)
    path, before = Path(place(pair)), ledgers(pair)
    path.write_text("microvm.reaper.plan:1:an older:one")
    capped = plan(pair, reap_max_per_fleet=3)
    assert capped.code != 0 and "4 VMs would be reaped in this run" in said(capped), capped.output
    assert not path.exists()

    planned = plan(pair, reap_max_per_fleet=4)
    assert planned.code == 0 and "4 VMs on 2 hosts; it can be applied until" in said(planned), planned.output
    assert {one["outcome"] for one in planned.outcomes()} == {"would_reap"}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and KEY not in path.read_text()
    # A plan changes nothing, not even a strike.
    assert ledgers(pair) == before and pair.check("there") == []

    # In check mode it is shown and not spent.
    shown = apply(pair, "--check")
    assert {one["outcome"] for one in shown.outcomes()} == {"would_reap"} and ledgers(pair) == before

    # A slice knows nothing of the others: the caps are those that the plan passed.
    with ThreadPoolExecutor() as pool:
        slices = list(
            pool.map(lambda host: apply(pair, "--limit", host, tag=host, reap_max_per_fleet=1), (first, second))
        )
    assert [one.code for one in slices] == [0, 0], slices[0].output + slices[1].output
    assert [removed(one) for one in slices] == [dead(pair, first), dead(pair, second)]
    sealed = planned.report["sealed"]
    for host, one in zip((first, second), slices, strict=True):
        assert f"plan {sealed['plan']} of " in said(one) and "applied on 1 host of this run" in said(one)
        assert one.report["applied"]["plan"] == sealed["plan"]
        assert pair.ledger(host)["applied"] == {
            "plan": sealed["plan"], "made_at": sealed["made_at"], "epoch": sealed["manifest"]["epoch"],
        }  # fmt: skip
    assert pair.check("gone") == []

    again = apply(pair)
    assert again.code == 0 and "plan_spent" in again.output and not removed(again), again.output
    told = run(pair, "explain", "-e", "vm_id=" + pair.planted()[first]["orphans"][0])
    assert f"signed plan {sealed['plan']}" in said(told), told.output


def test_what_came_after_the_plan_is_left_and_goes_with_the_next(pair: Fleet) -> None:
    first, second = struck(pair)
    assert plan(pair).code == 0
    risen, remade = pair.planted()[first]["orphans"]
    jail = f"/srv/jailer/firecracker/{remade}"
    mounts = f"grep -o ' {jail}/[^ ]*' /proc/mounts | sort -r | xargs -r umount"
    done = pair.run(first, f"{mounts}; mv {jail} {jail}.old && cp -a {jail}.old {jail} && rm -r {jail}.old")
    assert done.returncode == 0, done.stderr
    planted = pair.planted()
    vms = [{"vm_id": vm_id, "host": host} for host, one in planted.items() for vm_id in one["live"]]
    dead_now = [{"vm_id": vm_id} for one in planted.values() for vm_id in one["tombstones"] if vm_id != risen]
    listed = {"vms": [*vms, {"vm_id": risen, "host": first}], "count": len(vms) + 1, "tombstones": dead_now}
    applied = apply(pair, live=listed)
    assert applied.code == 0, applied.output
    assert removed(applied) == dead(pair, second)
    # The same object in two sweeps by now; and the VM is dead once more.
    assert removed(apply(pair)) == set()
    assert plan(pair).code == 0
    assert removed(apply(pair)) == dead(pair, first)
    assert pair.check("gone") == []


def test_a_sweep_in_between_takes_nothing_from_a_plan_but_what_it_removed(pair: Fleet) -> None:
    first, second = struck(pair)
    assert plan(pair).code == 0
    swept = run(pair, "reap", "--limit", first)
    assert removed(swept) == dead(pair, first)
    applied = apply(pair, reap_waves=[1, "100%"])
    assert applied.code == 0 and removed(applied) == dead(pair, second), applied.output
    assert pair.check("gone") == []


def test_a_plan_that_is_not_to_be_trusted_stops_the_run_before_any_host_is_asked(pair: Fleet, tmp_path: Path) -> None:
    struck(pair)
    assert plan(pair).code == 0
    good, before = Path(place(pair)).read_text(), ledgers(pair)
    altered = tmp_path / "altered.plan"
    altered.write_text(good[:100] + ("B" if good[100] == "A" else "A") + good[101:])
    refusals = [
        ("plan_altered", {"reap_plan": str(altered)}),
        ("plan_altered", {"reap_plan_key": "another key that is as long as it has to be"}),
        ("plan_expired", {"reap_plan_max_age": 0.1}),
        ("plan_foreign", {"reap_realm": "other"}),
        ("plan_unreadable", {"reap_plan": str(tmp_path / "missing.plan")}),
        ("reap_plan_key is not given", {"reap_plan_key": ""}),
        ("plan_missing", {"reap_plan": "", "reap_plan_required": True}),
    ]
    for number, (why, changes) in enumerate(refusals):
        # Hosts that cannot be reached are not even tried.
        refused = apply(pair, "-e", json.dumps(AWAY), tag=str(number), **changes)
        assert refused.code == 2 and why in refused.output and "UNREACHABLE" not in refused.output, refused.output
        assert KEY not in refused.output
    # Nor is any where only some hosts are given a plan: the others would be swept without.
    some = tmp_path / "some.yml"
    some.write_text(yaml.safe_dump({"reap_hosts": {"hosts": {sorted(pair.hosts())[0]: {"reap_plan": place(pair)}}}}))
    halved = run(pair, "reap", "-i", str(some))
    assert halved.code == 2 and "must be the same for all hosts" in said(halved), halved.output
    assert ledgers(pair) == before and pair.check("there") == []
    # Its realm's list must not be older than the one that the plan was made from.
    stale = apply(pair, live={"epoch": 1})
    assert stale.code == 2 and "epoch_went_back" in stale.output, stale.output
    rotated = apply(pair, reap_plan_key=["the new key, which signs from now on", KEY])
    assert rotated.code == 0 and pair.check("gone") == [], rotated.output


def test_a_host_that_could_not_be_reached_has_no_part_in_the_plan(pair: Fleet, tmp_path: Path) -> None:
    first, second = struck(pair)
    away = tmp_path / "away.yml"
    away.write_text(yaml.safe_dump({"reap_hosts": {"hosts": {second: AWAY}}}))
    planned = plan(pair, "-i", str(away))
    assert planned.code == 4 and f"NOT IN THE PLAN: {second}, which could not be read" in planned.output, planned.output
    assert planned.report["sealed"]["unseen"] == [second]
    applied = apply(pair)
    assert applied.code == 0 and removed(applied) == dead(pair, first), applied.output
    assert f"{second}: nothing is removed (unseen)" in applied.output
    # There it was an ordinary sweep in all else.
    assert {strike["strikes"] for strike in pair.ledger(second)["strikes"].values()} == {2}
    assert plan(pair).code == 0 and removed(apply(pair)) == dead(pair, second)
    assert pair.check("gone") == []


def test_a_workflow_passes_the_plan_on_as_a_variable(pair: Fleet, tmp_path: Path) -> None:
    struck(pair)
    os.environ["ANSIBLE_SHOW_CUSTOM_STATS"] = "true"
    try:
        planned = plan(pair, reap_plan_path="", reap_plan_artifact=True)
    finally:
        del os.environ["ANSIBLE_SHOW_CUSTOM_STATS"]
    assert planned.code == 0, planned.output
    text = re.search(r'reap_plan"?: "?(microvm\.reaper\.plan:1:[^"\s]+)', planned.output)
    assert text, planned.output
    assert not Path(place(pair)).exists()
    applied = apply(pair, reap_plan=text[1])
    assert applied.code == 0 and pair.check("gone") == [], applied.output
