# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The decision core lives through a fleet's troubles unharmed, and the simulator would tell if it did not."""

from __future__ import annotations

import collections
import random
import re
import typing

import pytest
from ansible_collections.microvm.reaper.plugins.module_utils import ledger as ledgers
from ansible_collections.microvm.reaper.plugins.plugin_utils import applying, manifest, planner

from simulator import disks, faults, signed, simulate, sweeper

SWEEPS, PARTS = 200_000, 10


@pytest.mark.parametrize("part", range(PARTS))
def test_nothing_goes_wrong(part):
    counts = simulate.simulate(SWEEPS // PARTS, 100 + part)
    # A world in which nothing happens would prove nothing.
    assert counts["reaped"] > 1100
    for code in ("latched", "host_renamed", "machine_id_changed", "blind"):
        assert counts[code] > 100, code
    for code in ("shrunk", "host_cap", "realm_changed", "incomplete", "other_realm", "stale", "from_the_future"):
        assert counts[code] > 30, code
    for code in ("epoch_went_back", "host_unknown", "unknown_host", "unreachable", "fleet_cap", "cloned_machine_id"):
        assert counts[code] > 20, code
    assert counts["killed"] > 50
    assert counts["spared"] > 10
    assert counts["finished"] > 5
    assert counts["set_aside"] > 100
    assert counts["from_aside"] > 50
    assert counts["restored"] > 20
    assert counts["pressed"] > 2


@pytest.mark.parametrize("fault", faults.FAULTS, ids=lambda fault: fault.__name__)
def test_a_planted_bug_is_found(fault, monkeypatch):
    fault(monkeypatch)
    with pytest.raises(simulate.Failure, match=r"^seed \d+, after \d+ sweeps: "):
        simulate.simulate(10000, faults.SEEDS.get(fault, 0))


def test_a_failure_tells_a_short_story(monkeypatch, capsys):
    faults.a_migration_has_one_end(monkeypatch)
    monkeypatch.setattr("sys.argv", ["simulate.py", "--sweeps", "10000", "--seed", "0", "--jobs", "1"])
    assert simulate.main() == 1
    told = capsys.readouterr().out
    seed = re.match(r"seed 0\nseed (\d+), after \d+ sweeps: ", told)[1]
    assert re.search(r"\+\d+ s  (v\d\d).* begins to move from h\d to h\d\n(?s:.*) says .*\1 on h\d", told)
    assert len(told.splitlines()) < 60
    assert told.endswith("Again: make simulate SWEEPS=1 SEED=%s\n" % seed)
    assert simulate.main() == 1
    assert capsys.readouterr().out == told


def test_the_same_seed_lives_the_same_life():
    assert simulate.simulate(600, 5) == simulate.simulate(600, 5)


def test_the_seed_of_a_world_is_enough_to_repeat_it():
    second = list(zip(range(2), simulate.seeds(5), strict=False))[1][1]
    first, both, alone = collections.Counter(), collections.Counter(), collections.Counter()
    simulate.live_through(5, first)
    simulate.live_through(5, both)
    simulate.live_through(second, both)
    simulate.live_through(second, alone)
    assert both == first + alone


def test_processes_change_nothing(monkeypatch, capsys):
    lines = []
    for jobs in ("1", "2"):
        monkeypatch.setattr("sys.argv", ["simulate.py", "--sweeps", "1500", "--seed", "5", "--jobs", jobs])
        monkeypatch.setattr(simulate, "WORLDS_AT_ONCE", 1)
        assert simulate.main() == 0
        lines.append(capsys.readouterr().out.splitlines()[2])
    assert lines[0] == lines[1]


def test_the_disks_in_memory_are_those_of_files(tmp_path):
    class Files(disks.Disks):
        """The real ledger, and besides what the model has of it."""

        written: typing.ClassVar = {}

        def save(self, host, realm, ledger):
            place = str(tmp_path / host.name)
            if host.ledger["generation"] == 0:
                (tmp_path / host.name / realm / "ledger.json").unlink(missing_ok=True)
            elif host.ledger is not self.written.get(host):  # a clone, with the ledger of another
                ledgers.save(place, realm, dict(host.ledger, generation=host.ledger["generation"] - 1))
            assert ledgers.load(place, realm) == (host.ledger, None)
            self.written[host] = super().save(host, realm, ledger)
            assert ledgers.save(place, realm, ledger) == host.ledger
            return host.ledger

    for seed in (1, 3):
        in_memory, in_files = collections.Counter(), collections.Counter()
        simulate.live_through(seed, in_memory)
        simulate.live_through(seed, in_files, disks_class=Files)
        assert in_memory == in_files


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


# --- signed plans ------------------------------------------------------------------------------------------------

SEED_OF_SIGNED, SWEEPS_OF_SIGNED = 100, 20_000


def signed_sweeps():
    """Let worlds live in which a plan is signed in one run and applied in another; return how many shares were."""
    counts, sweepers = collections.Counter(), []

    def made(*arguments):
        sweepers.append(signed.SignedSweeper(*arguments))
        return sweepers[-1]

    for seed in simulate.seeds(SEED_OF_SIGNED):
        simulate.live_through(seed, counts, sweeper=made)
        if counts["sweeps"] > SWEEPS_OF_SIGNED:
            break
    return sum(one.applied for one in sweepers)


def test_whatever_happens_between_a_signed_plan_and_its_shares_all_of_it_holds():
    assert signed_sweeps() > 50


def test_the_simulator_finds_an_apply_that_takes_more_than_was_signed(monkeypatch):
    monkeypatch.setattr(applying, "_key", lambda act: act[2])  # the VM alone
    with pytest.raises(simulate.Failure, match="what is not in the plan"):
        signed_sweeps()


def test_the_simulator_finds_a_planner_that_withholds_nothing(monkeypatch):
    real = planner.plan
    monkeypatch.setattr(planner, "plan", lambda *arguments: real(*arguments[:4]))
    with pytest.raises(simulate.Failure, match="what is not in the plan|was not to apply"):
        signed_sweeps()


def test_the_simulator_finds_a_share_that_is_taken_twice(monkeypatch):
    monkeypatch.setattr(applying, "_is_spent", lambda *_arguments: False)
    with pytest.raises(simulate.Failure, match="applies the plan .* again"):
        signed_sweeps()
