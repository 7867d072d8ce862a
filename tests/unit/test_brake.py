# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What stops a batch before the first removal anywhere in it."""

from __future__ import annotations

import pytest
from ansible_collections.microvm.reaper.plugins.plugin_utils.brake import BATCH_CODES, brake


def plan(code=None, machine_id=None):
    return {
        "refused": {"code": code, "message": "because of %s" % code} if code else None,
        "ledger": {"machine_id": machine_id},
    }


def test_nothing_stops_a_batch_of_good_plans():
    assert brake({"h1": plan(), "h2": plan(machine_id="a"), "h3": plan(machine_id="b")}) == (None, {})
    assert brake({}) == (None, {})


@pytest.mark.parametrize("code", BATCH_CODES)
def test_row_34_what_speaks_of_the_live_source_or_of_a_cap_stops_all(code):
    abort, refused = brake({"h2": plan(code), "h1": plan(), "h3": plan(code)})
    assert abort["code"] == code
    assert abort["message"].startswith("h2: because of %s" % code)
    assert "h3" in abort["message"]
    assert sorted(refused) == ["h2", "h3"]


@pytest.mark.parametrize("code", ["host_unknown", "host_renamed", "machine_id_changed"])
def test_row_05_what_speaks_of_a_host_stops_only_that_host(code):
    abort, refused = brake({"h1": plan(code), "h2": plan()})
    assert (abort, list(refused)) == (None, ["h1"])


def test_row_05_clones():
    abort, refused = brake({"h1": plan(machine_id="a"), "h2": plan(machine_id="b"), "h3": plan(machine_id="a")})
    assert abort is None
    assert {host: one["code"] for host, one in refused.items()} == dict.fromkeys(("h1", "h3"), "cloned_machine_id")
    assert "h1 and h3" in refused["h1"]["message"]
