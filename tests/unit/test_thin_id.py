# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The databases of containerd's devmapper snapshotter, as a real one wrote them; and who lets unmapped thin ids go."""

from __future__ import annotations

import base64
import gzip
import json
import os
import pathlib
import struct
import threading

import pytest
from ansible_collections.microvm.reaper.plugins.action.preflight import check
from ansible_collections.microvm.reaper.plugins.module_utils import bolt, devmapper
from ansible_collections.microvm.reaper.plugins.module_utils.probe import ProbeError
from ansible_collections.microvm.reaper.plugins.plugin_utils import presets
from ansible_collections.microvm.reaper.plugins.plugin_utils.planner import PolicyError, complete_policy
from ansible_collections.microvm.reaper.plugins.plugin_utils.variables import role_spec
from unit.builders import facts, plan, remembered, share, thing

CAPTURE = json.loads((pathlib.Path(__file__).parent / "captures/devmapper-containerd-1.7.24.json").read_text())
SMALL, LARGE = (gzip.decompress(base64.b64decode("".join(CAPTURE[key]))) for key in ("two devices", "62 devices"))
GIVEN = {"reap_realm": "prod", "reap_presets": ["hyper"], "reap_live_sources": [{"type": "file", "path": "/x"}]}


def ids(data):
    return devmapper.thin_ids(bolt.parse(data, "x.db"), "x.db")


def test_the_records_of_a_real_snapshotter():
    assert ids(SMALL) == (
        {1: "hyper-thinpool-snap-1", 2: "hyper-thinpool-snap-2"},
        {b"hyper-thinpool-snap-1", b"hyper-thinpool-snap-2"},
    )
    found, names = ids(LARGE)  # more than one page: branches
    assert sorted(found) == list(range(1, 63)) and len(names) == 62


def test_an_id_that_is_not_free_is_named_without_a_device_and_a_free_one_is_not():
    database = {b"devices": {}, b"device_ids": {b"1": b"\x00", b"2": b"\x01", b"3": b"\x02"}}
    assert ids_of(database) == {2, 3}
    database[b"devices"][b"p-snap-9"] = b'{"device_id": 1, "state": 15}'
    assert ids_of(database) == {1, 2, 3}


def ids_of(database):
    return set(devmapper.thin_ids(database, "x.db")[0])


@pytest.mark.parametrize(
    "database",
    [
        {},
        {b"devices": {}},
        {b"devices": b"", b"device_ids": {}},
        {b"devices": {b"a": b"{"}, b"device_ids": {}},
        {b"devices": {b"a": b"{}"}, b"device_ids": {}},
        {b"devices": {b"a": b"[1]"}, b"device_ids": {}},
        {b"devices": {b"a": {}}, b"device_ids": {}},
        {b"devices": {}, b"device_ids": {b"x": b"\x01"}},
    ],
)
def test_records_that_are_not_understood_are_no_empty_ones(database):
    with pytest.raises(ProbeError, match=r"x\.db"):
        devmapper.thin_ids(database, "x.db")


@pytest.mark.parametrize("size", [0, 10, 4096, 4100, 8192, 8200, 12288])
def test_a_database_that_was_cut_off(size):
    with pytest.raises(ProbeError, match=r"x\.db"):
        bolt.parse(SMALL[:size], "x.db")


def test_no_byte_of_a_database_makes_us_hang_or_crash():
    """Whatever is written into the pages that lead somewhere, it is read, or refused with its name."""
    for at in range(8192, 32768, 37):
        for value in (b"\xff" * 8, b"\x01" + bytes(7), bytes(8)):
            try:
                bolt.parse(SMALL[:at] + value + SMALL[at + 8 :], "x.db")
            except ProbeError as err:
                assert "x.db" in str(err)


def test_a_page_that_leads_to_itself():
    root = bolt._newest(LARGE, "x")[2] * 4096
    # The root becomes a branch whose only page is the root.
    branch = struct.pack("<QHHIIIQ", root // 4096, bolt.BRANCH, 1, 0, 16, 0, root // 4096)
    with pytest.raises(ProbeError, match="leads to itself"):
        bolt.parse(LARGE[:root] + branch + LARGE[root + len(branch) :], "x.db")


def nested(levels, page_number):
    """Return pages in one another, each with two buckets that both are the next page."""
    head, bucket = struct.pack("<QHHI", page_number, bolt.LEAF, 2, 0), struct.pack("<QQ", 0, 0)
    level = head + struct.pack("<IIII", bolt.IS_BUCKET, 32, 0, 0) + struct.pack("<IIII", bolt.IS_BUCKET, 16, 0, 0)
    return (level + bucket) * levels + struct.pack("<QHHI", page_number, bolt.LEAF, 0, 0)


@pytest.mark.parametrize(("levels", "why"), [(20, "longer than the file"), (200, "without an end")])
def test_buckets_in_buckets(levels, why):
    """2 ** 20 of them, if one believes it, in a file that has not so many bytes; and more of them than anybody has."""
    root = bolt._newest(SMALL, "x")[2] * 4096
    page = nested(levels, root // 4096)
    with pytest.raises(ProbeError, match=why):
        bolt.parse(SMALL[:root] + page + bytes(max(0, 32768 - root - len(page))), "x.db")


def test_the_newer_of_the_two_meta_pages_counts_if_it_is_whole():
    transaction, _size, root = bolt._newest(SMALL, "x")
    newer = transaction % 2 * 4096  # they are written in turn
    torn = SMALL[: newer + 72] + b"\x00" * 8 + SMALL[newer + 80 :]
    assert bolt._newest(torn, "x")[0] == transaction - 1
    both = torn[: 4096 - newer + 72] + b"\x00" * 8 + torn[4096 - newer + 80 :]
    with pytest.raises(ProbeError, match="no bolt database"):
        bolt.parse(both, "x.db")


def test_a_database_that_is_written_to_while_it_is_read(tmp_path, monkeypatch):
    path = tmp_path / "pool.db"
    path.write_bytes(SMALL)
    read, turns = bolt._all_of, []

    def written_meanwhile(descriptor, name):
        data = read(descriptor, name)
        turns.append(1)
        if len(turns) == 1:
            path.write_bytes(LARGE)
        return data

    monkeypatch.setattr(bolt, "_all_of", written_meanwhile)
    assert len(bolt.read(str(path))[b"devices"]) == 62 and len(turns) == 2


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pool.db")
    said = []

    def read():
        try:
            bolt.read(str(tmp_path / "pool.db"))
        except ProbeError as err:
            said.append(str(err))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(5)
    assert said and "no regular file" in said[0]
    with pytest.raises(ProbeError, match="cannot read the database"):
        bolt.read(str(tmp_path / "none.db"))


def test_a_database_is_found_where_it_is_open_where_it_lies_and_where_it_is_configured(tmp_path, monkeypatch):
    monkeypatch.setattr(devmapper, "PLACES", (str(tmp_path / "lib/*"),))
    monkeypatch.setattr(devmapper, "CONFIGURATIONS", (str(tmp_path / "etc/*.toml"),))
    for directory in ("lib/x", "lib/y", "etc", "else/io.containerd.snapshotter.v1.devmapper", "root", "open"):
        (tmp_path / directory).mkdir(parents=True)
    pools = ["lies", "open", "configured", "rooted", "none"]
    assert devmapper.named(pools, [], [], None) == {}
    for place in ("lib/x/lies.db", "open/open.db", "root/configured.db"):
        (tmp_path / place).write_bytes(SMALL)
    (tmp_path / "else/io.containerd.snapshotter.v1.devmapper/rooted.db").write_bytes(LARGE)
    with open(tmp_path / "open/open.db", "rb"):
        os.remove(tmp_path / "open/open.db")
        (tmp_path / "etc/a.toml").write_text(
            "root = \"%s\"\n  pool_name = 'rooted'\n# pool_name = \"none\"\n" % (tmp_path / "else")
        )
        (tmp_path / "etc/b.toml").write_text('pool_name="configured"\n\troot_path = "%s"\n' % (tmp_path / "root"))
        found = devmapper.named(pools, ["open"], [], None)
    assert {pool: len(ids) for pool, ids in found.items()} == {"lies": 2, "open": 2, "configured": 2, "rooted": 62}
    with pytest.raises(ProbeError, match="pool open has devices"):
        devmapper.named(pools, ["open"], [], None)
    (tmp_path / "root/configured.db").unlink()
    with pytest.raises(ProbeError, match=r"b\.toml gives pool configured to containerd"):
        devmapper.named(pools, [], [], None)


def struck(one):
    """Return the ledger of a host that has seen this once."""
    return remembered(plan(facts(one)))


THIN = thing("thin_id", "thin:p:7", name="p/7", age=None)


@pytest.mark.parametrize(
    ("value", "verdict", "goes"),
    [("false", "held", 0), ("report", "held", 0), ("true", "confirmed", 1), (True, "confirmed", 1), (False, "held", 0)],
)
def test_unmapped_thin_ids_go_only_where_the_policy_says_so(value, verdict, goes):
    result = plan(facts(THIN, now=1070, ledger=struck(THIN)), unmapped_thin_ids=value)
    (member,) = result["families"]["thin:p:7"]["resources"]
    assert (member["verdict"], len(result["reap"])) == (verdict, goes)
    if not goes:
        why = "unmapped thin id, reap_unmapped_thin_ids is %s" % str(value).lower()
        assert member["reasons"] == [{"code": "unmapped_thin_id", "text": why}]


@pytest.mark.parametrize("kind", ["container", "snapshot", "dm_thin", "thin_id"])
def test_every_view_must_have_been_readable(kind):
    result = plan(facts(THIN, now=1070, ledger=struck(THIN), unavailable=[kind]), unmapped_thin_ids="true")
    assert result["reap"] == []
    absent = plan(facts(THIN, now=1070, ledger=struck(THIN), absent=["container"]), share(), unmapped_thin_ids="true")
    assert len(absent["reap"]) == 1


def test_a_policy_of_another_word_is_refused():
    with pytest.raises(PolicyError, match="reap_unmapped_thin_ids must be one of false, report, true"):
        complete_policy({"realm": "r", "host": "h", "unmapped_thin_ids": "yes"})


def test_the_rules_name_the_pools():
    assert "thin_id" not in presets.rules(presets.known())
    found = presets.rules(["hyper"], thin_pools=["a", "b"], containerd_address="/x.sock")
    assert found["thin_id"] == [{"pool": "a", "address": "/x.sock"}, {"pool": "b", "address": "/x.sock"}]
    assert "thin_id" not in presets.rules(["hyper"], thin_pools=["a"], kinds=["dm_thin"])


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ({}, None),
        ({"reap_unmapped_thin_ids": False}, None),
        ({"reap_unmapped_thin_ids": True, "reap_thin_pools": ["a:1-b_c"]}, None),
        ({"reap_unmapped_thin_ids": "report", "reap_thin_pools": ["a"]}, None),
        ({"reap_unmapped_thin_ids": True}, "reap_unmapped_thin_ids is true, and reap_thin_pools is empty"),
        ({"reap_unmapped_thin_ids": "report"}, "reap_unmapped_thin_ids is report, and reap_thin_pools is empty"),
        ({"reap_unmapped_thin_ids": "maybe"}, "must be one of"),
        ({"reap_unmapped_thin_ids": True, "reap_thin_pools": ["a b"]}, "'a b' is not a name"),
        ({"reap_unmapped_thin_ids": True, "reap_thin_pools": ["a" * 120]}, "is not a name"),
    ],
)
def test_the_preflight_asks_for_the_pools(more, problem):
    problems = check(dict(GIVEN, **more), role_spec())
    assert len(problems) == (problem is not None) and (problem is None or problem in problems[0]), problems
