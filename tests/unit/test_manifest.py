# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What is believed of a list of live VMs. ``test_row_N_...`` are rows of the table of failures."""

from __future__ import annotations

import datetime
import os

import pytest
import yaml
from ansible_collections.microvm.reaper.plugins.plugin_utils import manifest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.builders import document

NOW = 1_800_000_010.0


def check(content, **others):
    return manifest.check(content, "test", **dict({"now": NOW, "max_age": 600}, **others))


def refusal(content, **others):
    with pytest.raises(manifest.ManifestError) as caught:
        check(content, **others)
    assert str(caught.value).startswith("test: ")
    return caught.value.code


def test_the_shape_of_what_is_believed():
    assert check(document(epoch=7, hosts=["h1", "h2"], tombstones=[{"vm_id": "v9", "destroyed_at": NOW - 30}])) == {
        "realm": "prod",
        "source": "test",
        "epoch": 7,
        "generated_at": NOW - 10,
        "age": 10.0,
        "count": 1,
        "proven": True,
        "unproven": None,
        "hosts": ["h1", "h2"],
        "vms": {"v1": ["h1"]},
        "tombstones": {"v9": 30.0},
        "budget": None,
    }


@pytest.mark.parametrize("content", [None, [], "", "[]", 5, [{"vm_id": "v1"}], {}])
def test_row_02_a_bare_list_is_no_manifest(content):
    assert refusal(content) == "not_a_manifest"


@pytest.mark.parametrize("key", ["realm", "generated_at", "complete", "vms"])
def test_row_02_what_is_missing_is_named(key):
    content = document()
    del content[key]
    with pytest.raises(manifest.ManifestError, match="the manifest has no %s" % key):
        check(content)


@pytest.mark.parametrize("complete", [False, None, "true", 1, "yes"])
def test_row_02_what_does_not_call_itself_complete(complete):
    assert refusal(document(complete=complete)) == "incomplete"


@pytest.mark.parametrize("count", [0, 2, "1", float("nan"), -1])
def test_row_02_the_count_is_off(count):
    assert refusal(document(count=count)) == "incomplete"
    assert check(document(count=1))["count"] == 1


def test_row_02_the_checksum_is_off():
    checksum = manifest.sha256(["v2", "v1", "v2"])
    # printf 'v1\nv2\n' | sha256sum
    assert checksum == "105b2c8d7bdd46426f2067ec234b1208c89b21bd3a1bd1c1d4c780264ab019b5"
    assert check(document([("v1", "h1"), ("v2", "h2")], sha256=checksum))["count"] == 2
    assert refusal(document([("v1", "h1")], sha256=checksum)) == "incomplete"


def test_row_01_an_empty_list_is_for_the_planner_to_judge():
    assert check(document(vms=()))["count"] == 0


def test_row_04_age():
    assert check(document(generated_at=NOW - 600))["age"] == 600
    assert refusal(document(generated_at=NOW - 601)) == "stale"
    assert check(document(generated_at=NOW + 30))["age"] == 0
    assert refusal(document(generated_at=NOW + 31)) == "from_the_future"
    with pytest.raises(manifest.ManifestError, match="generated 31 s in the future"):
        check(document(generated_at=NOW + 31))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf"), 10**400, True, None, "", [], "soon"])
def test_row_04_what_is_no_instant_is_no_fresh_manifest_either(number):
    assert refusal(document(generated_at=number)) == "not_a_manifest"


@pytest.mark.parametrize("epoch", [float("nan"), float("inf"), 10**400, True, "7", []])
def test_row_04_an_epoch_can_be_compared(epoch):
    assert refusal(document(epoch=epoch)) == "not_a_manifest"


def test_instants():
    for text in ("2027-01-15T08:00:00Z", "2027-01-15T08:00:00+00:00", "2027-01-15 10:00:00+02:00"):
        assert check(document(generated_at=text))["generated_at"] == 1_800_000_000
    for written in ("2027-01-15T08:00:00Z", "2027-01-15 10:00:00 +02:00"):
        read = yaml.safe_load("generated_at: %s" % written)["generated_at"]
        assert isinstance(read, datetime.datetime)
        assert check(document(generated_at=read))["generated_at"] == 1_800_000_000
    for naive in ("2027-01-15T08:00:00", "2027-01-15", yaml.safe_load("2027-01-15 08:00:00")):
        with pytest.raises(manifest.ManifestError, match="no time zone") as caught:
            check(document(generated_at=naive))
        assert caught.value.code == "not_a_manifest"
    assert refusal(document(generated_at=yaml.safe_load("2027-01-15"))) == "not_a_manifest"


def vm(**changes):
    return dict({"vm_id": "v1", "host": "h1"}, **changes)


@pytest.mark.parametrize(
    ("entry", "hosts"),
    [
        (vm(), ["h1"]),
        (vm(also_on=["h2"]), ["h1", "h2"]),
        (vm(also_on=None, state=None), ["h1"]),
        (vm(state="migrating", also_on=["h2", "h3"]), ["h1", "h2", "h3"]),
        (vm(state="paused"), ["h1"]),
        (vm(state="a state of tomorrow"), ["h1"]),
        (vm(host=None), []),
        (vm(host=None, also_on=["h2"]), []),
        ({"vm_id": "v1"}, []),
    ],
)
def test_row_10_any_state_that_is_not_terminal_protects_on_every_host_named(entry, hosts):
    assert check(document(vms=()) | {"vms": [entry]})["vms"] == {"v1": hosts}


@pytest.mark.parametrize("state", ["destroyed", "Destroyed", "deleted", "saga_unwound", "terminated"])
def test_terminal_states_are_tombstones(state):
    found = check(document(vms=()) | {"vms": [vm(state=state)], "count": 1})
    assert (found["vms"], found["tombstones"], found["count"]) == ({}, {"v1": None}, 0)
    found = check(document(vms=()) | {"vms": [vm(state=state), vm(host="h2")]})
    assert (found["vms"], found["tombstones"]) == ({"v1": ["h2"]}, {})
    assert check(document(vms=()) | {"vms": [vm(state=state)]}, terminal_states=["gone"])["vms"] == {"v1": ["h1"]}


def test_the_latest_end_counts():
    """An id that was used twice, or is in two sources: the platform may still be cleaning after the last of them."""
    ends = [{"vm_id": "v9", "destroyed_at": NOW - ago} for ago in (500, 5, 900)] + [{"vm_id": "v9"}]
    assert check(document(tombstones=ends))["tombstones"] == {"v9": 5.0}
    assert check(document(tombstones=[{"vm_id": "v9"}]))["tombstones"] == {"v9": None}
    one = check(document(tombstones=ends[:1]))
    other = check(document(vms=()) | {"vms": [vm(vm_id="v9", state="destroyed")]})
    for both in ([one, other], [other, one]):
        assert manifest.union(both)["tombstones"] == {"v9": 500.0}


def test_vms_of_the_same_host():
    listed = [("v1", "h1"), ("v2", "h2"), ("v3", "h1")]
    assert check(document(listed))["vms"] == {"v1": ["h1"], "v2": ["h2"], "v3": ["h1"]}


def test_row_05_a_host_that_is_not_in_the_hosts():
    assert refusal(document(hosts=["h2"])) == "unknown_host"
    stranger = document(vms=()) | {"vms": [vm(also_on=["h3"])], "hosts": ["h1"]}
    assert refusal(stranger) == "unknown_host"
    with pytest.raises(manifest.ManifestError, match="the VM v1 is on host 'h3'"):
        check(stranger)


@pytest.mark.parametrize(
    "content",
    [
        document(vms=()) | {"vms": {}},
        document(vms=()) | {"vms": "v1"},
        document(vms=()) | {"vms": ["v1"]},
        document(vms=()) | {"vms": [{}]},
        document(vms=()) | {"vms": [vm(vm_id=5)]},
        document(vms=()) | {"vms": [vm(vm_id="")]},
        document(vms=()) | {"vms": [vm(vm_id="-rf")]},
        document(vms=()) | {"vms": [vm(vm_id="../x")]},
        document(vms=()) | {"vms": [vm(vm_id="v1\n")]},
        document(vms=()) | {"vms": [vm(vm_id="{{ x }}")]},
        document(vms=()) | {"vms": [vm(vm_id="v" * 129)]},
        document(vms=()) | {"vms": [vm(host="")]},
        document(vms=()) | {"vms": [vm(host=["h1"])]},
        document(vms=()) | {"vms": [vm(host="h\ud800")]},
        document(vms=()) | {"vms": [vm(host="h\x1b[2J")]},
        document(vms=()) | {"vms": [vm(also_on="h2")]},
        document(vms=()) | {"vms": [vm(also_on=[None])]},
        document(vms=()) | {"vms": [vm(state=5)]},
        document(vms=()) | {"vms": [vm(state=["destroyed"])]},
        document(realm=None),
        document(realm="p\x00"),
        document(hosts="h1"),
        document(hosts={"h1": 1}),
        document(hosts=["h1", 2]),
        document(tombstones=5),
        document(tombstones={"v9": 1}),
        document(tombstones=["v9"]),
        document(tombstones=[{"vm_id": "v9", "destroyed_at": "yesterday"}]),
        document(tombstones=[{"vm_id": "v9", "destroyed_at": float("nan")}]),
    ],
)
def test_row_36_hostile_shapes_are_refused(content):
    assert refusal(content) == "not_a_manifest"


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ([], "test: a mapping was expected, not list"),
        (document(realm=5), "test: realm: a text"),
        (document(hosts=[5]), "test: hosts: a text"),
        (document(vms=()) | {"vms": [vm(), "v2"]}, "test: vms[1]: "),
        (document(vms=()) | {"vms": [vm(), vm(host=5)]}, "test: vms[1].host: a text"),
        (document(vms=()) | {"vms": [vm(), vm(host=5)], "hosts": ["h1"]}, "test: vms[1].host: a text"),
        (document(vms=()) | {"vms": [vm(), vm(host="h2")], "hosts": ["h1"]}, "test: the VM v1 is on host 'h2'"),
        (document(vms=()) | {"vms": [vm(), vm(also_on=[5])]}, "test: vms[1].host: a text"),
        (document(vms=()) | {"vms": [vm(), vm(also_on=5)]}, "test: vms[1]: 'also_on' must be a list"),
        (document(vms=()) | {"vms": [vm(), vm(state=5)]}, "test: vms[1].state: a text"),
        (document(tombstones=[{"vm_id": "v8"}, {"vm_id": "v9", "destroyed_at": "x"}]), "test: tombstones[1]: "),
    ],
)
def test_row_36_what_is_refused_is_named_by_its_place(content, place):
    with pytest.raises(manifest.ManifestError) as caught:
        check(content)
    assert str(caught.value).startswith(place)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("v1") | st.datetimes(),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.sampled_from(["vm_id", "host", "state", "also_on", "destroyed_at"]), inner, max_size=5),
    max_leaves=12,
)
KEYS = ["realm", "generated_at", "complete", "vms", "hosts", "epoch", "count", "sha256", "tombstones", "proven"]
KEYS.append("budget")


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS), JSON, max_size=4))
def test_whatever_a_source_returns_is_refused_or_believed(tmp_path_factory, changes):
    try:
        believed = manifest.union([check(document(vms=()) | changes)])
    except manifest.ManifestError:
        return
    path = tmp_path_factory.mktemp("index") / "m.sqlite"
    assert manifest.share(manifest.handle(believed, str(path)), "h1", {"v1"})["count"] == believed["count"]


# --- several sources -------------------------------------------------------------------------------------------------


def test_what_lives_in_any_source_lives():
    one = check(document([("v1", "h1")], hosts=["h1"], epoch=3, tombstones=[{"vm_id": "v2"}, {"vm_id": "v3"}]))
    other = dict(check(document([("v2", "h2")], hosts=["h2"], generated_at=NOW - 90)), source="other")
    both = manifest.union([one, other])
    assert (both["count"], both["hosts"], both["age"], both["generated_at"]) == (2, ["h1", "h2"], 90.0, NOW - 90)
    assert (both["tombstones"], both["epochs"], both["epoch"]) == ({"v3": None}, {"test": 3}, None)
    assert both["source"] == "test, other"


def test_one_source_alone_keeps_its_epoch():
    assert manifest.union([check(document(epoch=3))])["epoch"] == 3


def test_a_union_is_proven_and_knows_its_hosts_when_every_part_does():
    good, bare = check(document(hosts=["h1"])), check(document(proven=False))
    assert manifest.union([good, good])["proven"] is True
    assert (manifest.union([good, bare])["proven"], manifest.union([good, bare])["hosts"]) == (False, None)
    assert check(document(proven="yes"))["proven"] is False


def test_row_05_sources_of_different_realms():
    with pytest.raises(manifest.ManifestError, match="'prod'.*'staging'") as caught:
        manifest.union([check(document()), check(document(realm="staging"))])
    assert caught.value.code == "other_realm"


# --- a host's share --------------------------------------------------------------------------------------------------


def shares(tmp_path, content, host, ids, name="m.sqlite"):
    handle = manifest.handle(manifest.union([check(content)]), str(tmp_path / name))
    assert "vms" not in handle and "hosts" not in handle
    return manifest.share(handle, host, ids)


FLEET = {
    "vms": [vm(also_on=["h2"]), vm(vm_id="v2", host="h2"), vm(vm_id="v3", host=None), vm(vm_id="v4", host="h3")],
    "tombstones": [{"vm_id": "v5", "destroyed_at": NOW - 5}, {"vm_id": "v6"}, {"vm_id": "v4"}],
}
ALL = {"v1", "v2", "v3", "v4", "v5", "v9"}


def test_the_share_of_a_host(tmp_path):
    found = shares(tmp_path, document(hosts=["h1", "h2", "h3"]) | FLEET, "h1", ALL)
    assert (found["live"], found["elsewhere"]) == (["v1", "v3"], {"v2": ["h2"], "v4": ["h3"]})
    assert (found["tombstones"], found["host_known"], found["count"]) == ({"v5": 5.0}, True, 4)


def test_row_05_a_host_that_the_manifest_does_not_know(tmp_path):
    found = shares(tmp_path, document(hosts=["h1", "h2", "h3"]) | FLEET, "h4", ALL)
    assert (found["host_known"], found["live"]) == (False, ["v3"])


def test_row_10_where_hosts_are_not_named_a_vm_may_be_anywhere(tmp_path):
    found = shares(tmp_path, document() | FLEET, "h4", ALL)
    assert (found["host_known"], found["live"], found["elsewhere"]) == (True, ["v1", "v2", "v3", "v4"], {})


def test_more_ids_than_one_question_can_hold(tmp_path):
    ids = ["v%d" % number for number in range(1234)]
    content = document([(vm_id, "h1") for vm_id in ids], hosts=["h1", "h2"])
    assert shares(tmp_path, content, "h1", set(ids))["live"] == sorted(ids)
    assert shares(tmp_path, content, "h2", set(ids), "2.sqlite")["elsewhere"] == {vm_id: ["h1"] for vm_id in ids}
    dead = document(vms=(), tombstones=[{"vm_id": vm_id} for vm_id in ids])
    assert shares(tmp_path, dead, "h1", set(ids), "3.sqlite")["tombstones"] == dict.fromkeys(ids)


def test_a_path_may_have_any_characters(tmp_path):
    assert shares(tmp_path, document(), "h1", {"v1"}, "a ?#%41.sqlite")["live"] == ["v1"]


def test_an_index_is_for_its_owner_and_replaces_nothing(tmp_path):
    path = tmp_path / "m.sqlite"
    manifest.handle(manifest.union([check(document())]), str(path))
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(FileExistsError):
        manifest.handle(manifest.union([check(document())]), str(path))


def test_an_index_leaves_no_file_open(tmp_path):
    manifest.handle(manifest.union([check(document())]), str(tmp_path / "0"))
    before = os.listdir("/proc/self/fd")
    handle = manifest.handle(manifest.union([check(document())]), str(tmp_path / "1"))
    assert manifest.Index(handle["index"]).look_up({"v1"}, "h1", False)["live"] == ["v1"]
    assert os.listdir("/proc/self/fd") == before
