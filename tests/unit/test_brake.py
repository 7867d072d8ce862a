# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What stops a batch before the first removal anywhere in it."""

from __future__ import annotations

import pathlib

import pytest
import yaml
from ansible_collections.microvm.reaper.plugins.plugin_utils.brake import (
    DEFAULT_CAPS,
    NOTHING_BEFORE,
    brake,
    live_again,
    so_far,
)

DEFAULTS = pathlib.Path(__file__).resolve().parents[2] / "roles/reap/defaults/main.yml"


def plan(code=None, machine_id=None, dying=0, live=100):
    return {
        "reap": [{"vm_id": "v%d" % number} for number in range(dying) for _kind in ("cgroup", "jail")],
        "begins": ["v%d" % number for number in range(dying)],
        "manifest": {"count": live},
        "refused": {"code": code, "message": "because of %s" % code} if code else None,
        "ledger": {"machine_id": machine_id},
    }


def test_nothing_stops_a_batch_of_good_plans():
    assert brake({"h1": plan(), "h2": plan(machine_id="a"), "h3": plan(machine_id="b")}) == (None, {})
    assert brake({}) == (None, {})


@pytest.mark.parametrize("code", ["host_cap", "blind", "shrunk", "epoch_went_back", "other_realm"])
def test_row_34_what_speaks_of_the_live_source_or_of_a_cap_stops_all(code):
    abort, refused = brake({"h2": plan(code), "h1": plan(), "h3": plan(code)})
    assert abort["code"] == code
    assert abort["message"].startswith("h2: because of %s" % code)
    assert "h3" in abort["message"]
    assert sorted(refused) == ["h2", "h3"]
    assert brake({"h1": plan(code)})[0]["message"] == "h1: because of %s" % code


@pytest.mark.parametrize("code", ["host_unknown", "host_renamed", "machine_id_changed"])
def test_row_05_what_speaks_of_a_host_stops_only_that_host(code):
    abort, refused = brake({"h1": plan(code), "h2": plan()})
    assert (abort, list(refused)) == (None, ["h1"])


def test_row_05_clones():
    abort, refused = brake({"h1": plan(machine_id="a"), "h2": plan(machine_id="b"), "h3": plan(machine_id="a")})
    assert abort is None
    assert {host: one["code"] for host, one in refused.items()} == dict.fromkeys(("h1", "h3"), "cloned_machine_id")
    assert "h1 and h3" in refused["h1"]["message"]


def over_batches(*batches):
    """Return what brake() says of each batch of a run."""
    before, said = NOTHING_BEFORE, []
    for plans in batches:
        abort, refused = brake(plans, CAPS, before)
        before = so_far(before, plans, refused)
        said.append((abort and abort["code"], {host: one["code"] for host, one in refused.items()}))
    return said


def test_row_05_a_clone_of_a_host_of_an_earlier_batch():
    first, other, clone = {"h1": plan(machine_id="a")}, {"h2": plan(machine_id="b")}, {"h3": plan(machine_id="a")}
    assert over_batches(first, other, clone)[2] == (None, {"h3": "cloned_machine_id"})
    # A host that is asked again, and hosts that have none, are no clones.
    assert over_batches(first, first, {"h4": plan()}, {"h5": plan()})[1:] == [(None, {})] * 3
    before = so_far(NOTHING_BEFORE, first, {})
    assert "h1 and h3 have the same machine id a" in brake(clone, CAPS, before)[1]["h3"]["message"]


def test_row_35_a_latch_holds_for_the_batches_after_it():
    latched = {"h2": plan("latched", dying=2)}
    said = over_batches({"h1": plan(dying=2)}, latched, {"h3": plan(dying=2)}, {"h4": plan("blind")})
    assert said == [(None, {}), (None, {"h2": "latched"}), (None, {"h3": "latched"}), (None, {"h4": "latched"})]


def test_row_34_the_batches_of_a_run_are_added_up():
    ten = {"h1": plan(dying=10)}
    assert over_batches(ten, ten, {"h2": plan(dying=1)}) == [(None, {}), (None, {}), ("fleet_cap", {})]


CAPS = {"max_per_fleet": 20, "max_percent": 30, "percent_floor": 10}


@pytest.mark.parametrize(
    ("plans", "spent", "stopped"),
    [
        ({"h1": plan(dying=10), "h2": plan(dying=10)}, 0, None),
        ({"h1": plan(dying=10), "h2": plan(dying=11)}, 0, "reap_max_per_fleet=20"),
        ({"h1": plan(dying=1)}, 20, "20 of them in earlier batches"),
        ({"h1": plan(dying=6, live=14), "h2": plan(dying=5, live=14)}, 0, "beside 14 that live: 44 %"),
        ({"h1": plan(dying=10, live=1)}, 0, None),
        ({"h1": plan("machine_id_changed", dying=21)}, 0, None),
        ({"h1": plan(dying=12, live=28)}, 0, None),
        ({"h1": plan(dying=12, live=27)}, 0, "beside 27 that live: 30 %"),
        ({"h1": plan(dying=11, live=None)}, 0, "beside 0 that live: 100 %"),
        ({}, 5, None),
    ],
)
def test_row_34_the_fleet_has_a_cap_of_its_own_over_all_batches(plans, spent, stopped):
    abort, _refused = brake(plans, CAPS, dict(NOTHING_BEFORE, doomed=spent))
    assert (abort is None) == (stopped is None)
    if abort:
        assert abort["code"] == "fleet_cap"
        assert stopped in abort["message"]


def test_without_caps_those_of_the_role_hold():
    role = yaml.safe_load(DEFAULTS.read_text())
    assert {key: role["reap_" + key] for key in DEFAULT_CAPS} == DEFAULT_CAPS
    over = DEFAULT_CAPS["max_per_fleet"] + 1
    message = brake({"h1": plan(dying=over, live=100000)})[0]["message"]
    assert message.startswith("%d VMs would be reaped in this run, more than" % over)
    assert brake({"h1": plan(dying=over - 1, live=100000)}) == (None, {})


def test_row_35_a_latch_of_one_host_holds_for_all():
    abort, refused = brake({"h1": plan("latched"), "h2": plan(dying=1), "h3": plan("blind")}, CAPS)
    assert abort is None
    assert {host: one["code"] for host, one in refused.items()} == dict.fromkeys(["h1", "h2", "h3"], "latched")


def test_what_is_listed_after_all_is_spared_where_it_may_live():
    plans = {name: dict(plan(dying=3), host=host) for name, host in (("h1", "rack1"), ("h2", "rack2"))}
    found = live_again(plans, {"v0": ["rack1"], "v1": [], "v2": ["rack3"], "v9": ["rack1"]}, False)
    assert {host: sorted(one) for host, one in found.items()} == {"h1": ["v0", "v1"], "h2": ["v1"]}
    assert sorted(live_again(plans, {"v2": ["rack3"]}, True)) == ["h1", "h2"]
    assert live_again(plans, {}, True) == {}
    assert "live source lists" in found["h2"]["v1"]


def test_row_05_a_clone_that_has_a_reason_of_its_own_keeps_it():
    latched = {"h1": plan("latched", machine_id="m"), "h2": plan(machine_id="m"), "h3": plan()}
    assert {one["code"] for one in brake(latched)[1].values()} == {"latched"}
    capped = {"h1": plan("host_cap", machine_id="m"), "h2": plan(machine_id="m")}
    abort, refused = brake(capped)
    assert abort["code"] == "host_cap"
    assert (refused["h1"]["code"], refused["h2"]["code"]) == ("host_cap", "cloned_machine_id")
