# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The brakes that hold over batches and over time: the fleet's caps, waves, the latch, pins, and whose host it is."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from hosts.fleet import ROOT, Fleet, Sweep

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.timeout(180),
    pytest.mark.skipif(os.geteuid() != 0, reason="test hosts need root"),
]

FEW = {"live": 2, "orphans": 2, "containers": 0, "running_orphans": 0, "zombies": 0}
QUICK = {"reap_min_age": 0, "reap_strike_interval": 0.1}


def sweep(fleet: Fleet, *arguments: str, live: dict | None = None, **variables) -> Sweep:
    """Sweep with a list of this moment."""
    time.sleep(0.3)
    fleet.list_live(**dict({"generated_at": time.time() + 25}, **(live or {})))
    return fleet.sweep("-e", json.dumps(dict(QUICK, **variables)), *arguments, timeout=120)


def sweep_by(fleet: Fleet, directory: Path, keywords: dict, *, live: dict | None = None, **variables) -> Sweep:
    """Sweep by a playbook of somebody's own, whose play has these keywords."""
    play = {"hosts": "reap_hosts", "gather_facts": False, "roles": ["microvm.reaper.reap"], **keywords}
    (directory / "own.yml").write_text(yaml.safe_dump([play]))
    fleet.list_live(**dict({"generated_at": time.time() + 25}, **(live or {})))
    argv = fleet.sweep_argv("-e", json.dumps(dict(QUICK, **variables)))
    argv[argv.index("playbooks/reap.yml")] = str(directory / "own.yml")
    return Sweep(subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=120), None)


def in_batches_of_one(fleet: Fleet, directory: Path, **how) -> Sweep:
    return sweep_by(fleet, directory, {"serial": 1}, **how)


def test_row_34_the_fleet_cap_holds_over_batches_of_one(pair: Fleet) -> None:
    pair.plant(FEW)
    one_by_one = {"reap_waves": [1]}
    assert sweep(pair, **one_by_one).code == 0
    capped = sweep(pair, reap_max_per_fleet=3, **one_by_one)
    assert capped.code != 0 and "reap_max_per_fleet=3" in capped.output, capped.output
    assert "4 VMs would be reaped in this run, 2 of them in earlier batches" in capped.output.replace("\n", " ")
    # The first batch was within the cap; the second was stopped before its first removal.
    left = [host for host in pair.hosts() if pair.ledger(host)["reaped"] == {}]
    assert len(left) == 1
    assert sweep(pair, reap_max_per_fleet=4, **one_by_one).code == 0
    assert pair.check("gone") == []


def test_a_wave_begins_only_when_the_one_before_ended_clean(pair: Fleet) -> None:
    pair.plant(FEW)
    first, second = sorted(pair.hosts())
    assert sweep(pair).code == 0
    before = pair.ledger(second)
    known = sorted(set(pair.planted()) - {first})
    stopped = sweep(pair, live={"hosts": known, "vms": [], "count": 0}, reap_waves=[1, "100%"])
    assert stopped.code != 0 and first in stopped.output
    assert pair.ledger(second)["generation"] == before["generation"]
    assert sweep(pair, reap_waves=[1, "100%"]).code == 0
    assert pair.check("gone") == []


def test_row_35_a_reaped_vm_that_lives_stops_the_realm(pair: Fleet) -> None:
    pair.plant(FEW)
    sweep(pair), sweep(pair)
    assert pair.check("gone") == []
    first, second = sorted(pair.hosts())
    planted = pair.planted()
    risen = planted[first]["orphans"][0]
    vms = [{"vm_id": vm_id, "host": host} for host, one in planted.items() for vm_id in one["live"]]
    lists_it = {"vms": [*vms, {"vm_id": risen, "host": first}], "count": len(vms) + 1}
    latched = sweep(pair, live=lists_it)
    assert latched.code != 0 and "latched" in latched.output and risen in latched.output, latched.output
    # Both remember, and it holds when the list is the old one again.
    assert all(pair.ledger(host)["latch"]["code"] == "latched" for host in pair.hosts())
    assert sweep(pair, "--limit", second).code != 0
    assert sweep(pair, reap_clear_latch="test").code == 0
    assert sweep(pair).code == 0


def test_row_05_a_clone_in_another_batch(pair: Fleet, tmp_path: Path) -> None:
    pair.plant(FEW)
    first, second = sorted(pair.hosts())
    ids = {host: pair.run(host, "cat /etc/machine-id", check=True).stdout.strip() for host in (first, second)}
    adopt = {"reap_adopt_host": True}
    try:
        pair.run(second, f"echo {ids[first]} > /etc/machine-id", check=True)
        cloned = in_batches_of_one(pair, tmp_path, **adopt)
        said = " ".join(cloned.output.split())
        assert cloned.code == 2 and f"{first} and {second} have the same machine id {ids[first]}" in said, said
        assert pair.ledger(first)["strikes"] and not (pair.ledger(second) or {}).get("strikes")
    finally:
        pair.run(second, f"echo {ids[second]} > /etc/machine-id", check=True)
    assert in_batches_of_one(pair, tmp_path, **adopt).code == 0
    assert sweep(pair).code == 0
    assert pair.check("gone") == []


def test_row_04_an_older_copy_that_answers_a_later_batch(pair: Fleet, tmp_path: Path) -> None:
    """The hosts of that batch have never seen the newer one."""
    pair.plant(FEW)
    now = time.time() + 25
    for epoch, host in enumerate(sorted(pair.hosts(), reverse=True), start=10**6):
        pair.list_live(generated_at=now, epoch=epoch)
        (pair.state / "live.json").rename(pair.state / f"{host}.json")
    copy = f"cp {pair.state}/{{{{ inventory_hostname }}}}.json {pair.state}/live.json"
    answers = {"ansible.builtin.command": copy, "delegate_to": "localhost", "connection": "local"}
    done = sweep_by(pair, tmp_path, {"serial": 1, "pre_tasks": [answers]}, live={"epoch": 1})
    said = " ".join(done.output.split())
    assert done.code == 2 and "epoch_went_back" in said and "was at epoch 1000001 and is at 1000000 now" in said, said


@pytest.mark.parametrize("strategy", ["free", "host_pinned"])
def test_a_strategy_that_lets_hosts_go_on_alone_is_refused(pair: Fleet, tmp_path: Path, strategy: str) -> None:
    """By it run_once means once for each host, and the caps of the fleet would look at a part of it."""
    pair.plant(FEW)
    before = {host: pair.ledger(host) for host in pair.hosts()}
    done = sweep_by(pair, tmp_path, {"strategy": strategy})
    assert done.code == 2 and f"the strategy '{strategy}' lets each host go on alone" in done.output, done.output
    assert {host: pair.ledger(host) for host in pair.hosts()} == before


def test_pins_of_the_operator_and_of_a_host(pair: Fleet) -> None:
    pair.plant(FEW)
    first, second = sorted(pair.hosts())
    by_policy, by_host = pair.planted()[first]["orphans"][0], pair.planted()[second]["orphans"][0]
    keep = {"reap_keep": [by_policy]}
    sweep(pair, **keep)
    pair.run(second, f"echo '{by_host} until 2099-01-01 # a ticket' > /var/lib/microvm.reaper/keep", check=True)
    kept = sweep(pair, **keep)
    assert kept.code == 0 and "pin file" in kept.output and "reap_keep" in kept.output
    assert {one["vm_id"] for one in kept.outcomes()}.isdisjoint({by_policy, by_host})
    assert len(kept.outcomes()) > 0
    pair.run(second, "rm /var/lib/microvm.reaper/keep", check=True)
    sweep(pair), sweep(pair)
    assert pair.check("gone") == []


def test_row_05_another_realm_needs_a_word(pair: Fleet) -> None:
    pair.plant(FEW)
    sweep(pair)
    other = {"live": {"realm": "other"}, "reap_realm": "other"}
    refused = sweep(pair, **other)
    assert refused.code != 0 and "realm_changed" in refused.output and "reap_adopt_host" in refused.output
    assert sweep(pair, **other, reap_adopt_host=True).code == 0
    # The strike of the one realm is none in the other; from here on the host is known in both.
    assert pair.check("there") == []
    assert sweep(pair, **other).code == 0
    assert pair.check("gone") == []
    for host in pair.hosts():
        pair.run(host, "rm -r /var/lib/microvm.reaper/other", check=True)
