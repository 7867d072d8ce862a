# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The decision core lives through a fleet's troubles unharmed, and the simulator would tell if it did not."""

from __future__ import annotations

import random
import re

import pytest
from ansible_collections.microvm.reaper.plugins.plugin_utils import manifest

from simulator import faults, sweeper
from simulator.simulate import Failure, main, simulate


@pytest.mark.parametrize("seed", range(4))
def test_nothing_goes_wrong(seed):
    counts = simulate(5000, seed)
    # A world in which nothing happens would prove nothing.
    assert counts["reaped"] > 1000
    assert counts["stopped"] > 300


@pytest.mark.parametrize("fault", faults.FAULTS, ids=lambda fault: fault.__name__)
def test_a_planted_bug_is_found(fault, monkeypatch):
    fault(monkeypatch)
    with pytest.raises(Failure, match=r"^seed 0, after \d+ sweeps: "):
        simulate(10000, 0)


def test_a_failure_tells_its_story(monkeypatch, capsys):
    faults.a_migration_has_one_end(monkeypatch)
    monkeypatch.setattr("sys.argv", ["simulate.py", "--sweeps", "10000", "--seed", "0"])
    assert main() == 1
    told = capsys.readouterr().out
    assert told.startswith("seed 0\nseed 0, after ")
    assert re.search(r"\+ *\d+ s  v\d\d \(life \d+\) begins to move from h\d to h\d", told)
    assert "where the VM lives" in told.splitlines()[-1]


def test_the_same_seed_tells_the_same_story():
    assert simulate(600, 5) == simulate(600, 5)


def test_the_share_in_memory_is_that_of_the_index(tmp_path):
    chance = random.Random(3)
    for number in range(30):
        hosts = ["h1", "h2", "h3"] if chance.random() < 0.7 else None
        document = {
            "realm": "prod",
            "epoch": number,
            "generated_at": 1000,
            "complete": True,
            "hosts": hosts,
            "vms": [
                {
                    "vm_id": "v%d" % chance.randrange(12),
                    "host": chance.choice(["h1", "h2", "h3", None]),
                    "also_on": chance.choice([[], ["h2"], ["h3", "h1"]]),
                    "state": chance.choice([None, "running", "destroyed"]),
                }
                for _vm in range(chance.randrange(15))
            ],
            "tombstones": [{"vm_id": "v%d" % chance.randrange(12), "destroyed_at": 900} for _vm in range(5)],
        }
        lists = manifest.union([manifest.check(document, "cp", now=1005, max_age=600)])
        handle = manifest.handle(lists, str(tmp_path / ("%d.sqlite" % number)))
        ids = {"v%d" % chance.randrange(14) for _id in range(8)}
        for host in ("h1", "h4"):
            real = manifest.share(handle, host, ids)
            del real["index"], real["names_hosts"]
            assert real == sweeper.share(lists, host, ids)
