# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Joining sources one VM at a time, and asking them once more."""

from __future__ import annotations

import contextlib
import itertools
import json
import sqlite3

import pytest
from ansible_collections.microvm.reaper.plugins.plugin_utils import manifest, sources
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.builders import document

NOW = 1_800_000_010.0
HOSTS = ["h1", "h2", "h3"]
IDS = ["v%d" % number for number in range(8)]
SERIAL = itertools.count()


def collected(place, *documents):
    """Return the handle of the documents, whose VMs come one at a time."""
    collector = manifest.Collector(str(place / ("%d.sqlite" % next(SERIAL))))
    for number, one in enumerate(documents):
        collector.add(dict(one, vms=iter(one["vms"])), "s%d" % number, now=NOW, max_age=600)
    return collector.finish()


def in_memory(place, *documents):
    checked = [manifest.check(one, "s%d" % number, now=NOW, max_age=600) for number, one in enumerate(documents)]
    return manifest.handle(manifest.union(checked), str(place / ("%d.sqlite" % next(SERIAL))))


def shares(handle):
    """Return what any host can be told, without the place of the file."""
    told = {host: manifest.share(handle, host, set(IDS)) for host in [*HOSTS, "h4"]}
    return {host: {key: value for key, value in one.items() if key != "index"} for host, one in told.items()}


VMS = st.fixed_dictionaries(
    {"vm_id": st.sampled_from(IDS), "host": st.sampled_from([*HOSTS, None])},
    optional={
        "state": st.sampled_from([None, "running", "destroyed", "Deleted", "tomorrow's"]),
        "also_on": st.lists(st.sampled_from(HOSTS), max_size=2),
    },
)
TOMBSTONES = st.fixed_dictionaries(
    {"vm_id": st.sampled_from(IDS)}, optional={"destroyed_at": st.sampled_from([None, 1_800_000_000, 1_700_000_000])}
)


BUDGETS = st.integers(0, 9) | st.dictionaries(st.sampled_from([*HOSTS, "*"]), st.integers(0, 9))


@st.composite
def documents(draw):
    vms = draw(st.lists(VMS, max_size=8))
    changes = {"hosts": draw(st.sampled_from([None, HOSTS])), "tombstones": draw(st.lists(TOMBSTONES, max_size=4))}
    if draw(st.booleans()):
        changes["sha256"] = manifest.sha256(vm["vm_id"] for vm in vms)
    if draw(st.booleans()):
        changes.update(proven=False, unproven=draw(st.sampled_from([None, "no count"])))
    if draw(st.booleans()):
        changes["budget"] = draw(BUDGETS)
    return dict(document(), vms=vms, count=len(vms), epoch=draw(st.sampled_from([None, 4])), **changes)


def in_columns(document):
    """Return the document with its VMs in COLUMNS, two at a time."""
    vms = document["vms"]
    pages = [vms[begin:begin + 2] for begin in range(0, len(vms), 2)]
    columns = [manifest.Columns(*([vm.get(key) for vm in page] for key in manifest.Columns._fields)) for page in pages]
    return dict(document, vms=columns)


@settings(max_examples=150, deadline=None)
@given(st.lists(documents(), min_size=1, max_size=3))
def test_one_at_a_time_is_the_same_as_all_at_once(tmp_path_factory, several):
    place = tmp_path_factory.getbasetemp()
    expected = shares(in_memory(place, *several))
    assert shares(collected(place, *several)) == expected
    assert shares(collected(place, *map(in_columns, several))) == expected


# What one VM of many may look like, the hostile among them.
ODD = st.one_of(
    VMS,
    st.sampled_from([{"vm_id": "v1", "host": ""}, {"vm_id": "v1", "also_on": ()}, {"vm_id": "v1", "also_on": 0}]),
    st.fixed_dictionaries({
        "vm_id": st.sampled_from(["v1", "v2\n", "v\nv", "", "\n", "x" * 129, None, 7, "ü"]),
        "host": st.sampled_from(["h1", "h9", "h\n", None, 3, [], {}]),
        "state": st.sampled_from(["running", "destroyed", "\0", True, [], None]),
        "also_on": st.sampled_from([None, [], ["h1"], ["h9"], [None], "h1", {}, False]),
    }),
    st.sampled_from([None, "v1", [], {}]),
)


@settings(max_examples=400, deadline=None)
@given(st.lists(ODD, min_size=1, max_size=5), st.sampled_from([None, HOSTS]))
def test_a_page_is_judged_as_its_vms_are(vms, hosts):
    """What is looked at as a whole is what each VM alone would be; what is wrong is named by its own place."""
    try:
        alone = [manifest.check(dict(document(), vms=[vm], hosts=hosts), "s", now=NOW, max_age=600) for vm in vms]
    except manifest.ManifestError as err:
        number = next(number for number, vm in enumerate(vms) if is_refused(vm, hosts))
        with pytest.raises(manifest.ManifestError) as caught:
            manifest.check(dict(document(), vms=vms, hosts=hosts), "s", now=NOW, max_age=600)
        assert str(caught.value) == str(err).replace("vms[0]", "vms[%d]" % number)
        assert caught.value.code == err.code
    else:
        together = manifest.check(dict(document(), vms=vms, hosts=hosts), "s", now=NOW, max_age=600)
        joined = manifest.union(alone)
        assert (together["vms"], together["tombstones"]) == (joined["vms"], joined["tombstones"])


def is_refused(vm, hosts):
    try:
        manifest.check(dict(document(), vms=[vm], hosts=hosts), "s", now=NOW, max_age=600)
    except manifest.ManifestError:
        return True
    return False


MANY = dict(
    document(),
    vms=[{"vm_id": "v%d" % number, "host": "h1"} for number in range(5)] + [{"vm_id": "v9", "state": "destroyed"}],
)


# printf 'v%s\n' 0 1 2 3 4 9 | sha256sum
CHECKSUM = "862e3a917b3c881e2d4b1951e74e0e9f0d28ee2bfe9d8544db8ff75657d463e5"


@pytest.mark.parametrize("changes", [{"count": 6}, {"sha256": CHECKSUM}])
def test_all_pages_count(tmp_path, changes):
    pages = in_columns(dict(MANY, **changes))
    checked = manifest.check(dict(pages, vms=iter(pages["vms"])), "s", now=NOW, max_age=600)
    assert (checked["count"], sorted(checked["vms"]), checked["tombstones"]) == (5, IDS[:5], {"v9": None})
    handle = collected(tmp_path, pages)
    assert handle["count"] == 5

    def asked(*vm_ids):
        listed = dict(pages, vms=iter(pages["vms"]))
        return manifest.live_among(set(vm_ids), listed, "s", handle, now=NOW, max_age=600)

    assert asked("v4", "v7") == {"v4": ["h1"]}
    assert asked("v0", "v4", "v9") == {"v0": ["h1"], "v4": ["h1"]}


def test_what_is_here_is_written_once_and_kept_no_longer_than_said(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "KEPT", 4)
    vms = [{"vm_id": "v%d" % number, "host": "h%d" % (number % 2)} for number in range(9)]
    both = [in_columns(dict(document(), vms=vms)), in_columns(dict(document(), vms=vms[:3]))]
    handle = collected(tmp_path, *both)
    with contextlib.closing(sqlite3.connect(handle["index"])) as connection:
        rows = connection.execute("SELECT host, vm_ids, source FROM here").fetchall()
    assert rows == [
        ("h0", "v0\nv2\nv4", 0), ("h1", "v1\nv3\nv5", 0), ("h0", "v6\nv8", 0), ("h1", "v7", 0),
        ("h0", "v0\nv2", 1), ("h1", "v1", 1),
    ]


@pytest.fixture
def looked_at(monkeypatch):
    """The ids of the VMs that were looked at one by one."""
    real, found = manifest._Entries._vm, []
    monkeypatch.setattr(manifest._Entries, "_vm", lambda self, vm: found.append(vm["vm_id"]) or real(self, vm))
    monkeypatch.setattr(manifest, "PAGE", 3)
    return found


@pytest.mark.parametrize("shape", [lambda whole: whole, in_columns])
def test_a_plain_page_is_looked_at_as_a_whole(tmp_path, looked_at, shape):
    vms = [{"vm_id": "v0", "host": "h1"}, {"vm_id": "v1", "host": None}, {"vm_id": "v2", "host": "h2", "state": "odd"},
           {"vm_id": "v3", "host": "h1", "state": None}, {"vm_id": "v4", "host": "h9", "state": "destroyed"},
           {"vm_id": "v5", "state": "Destroyed"}, {"vm_id": "v6", "host": "h1", "also_on": None}]
    handle = collected(tmp_path, shape(dict(document(), vms=vms)))
    told = shares(handle)["h1"]
    assert (looked_at, handle["count"]) == ([], 5)
    assert (told["live"], sorted(told["tombstones"])) == (["v0", "v1", "v2", "v3", "v6"], ["v4", "v5"])


def test_only_of_a_page_with_something_special_each_is_looked_at(tmp_path, looked_at):
    vms = [{"vm_id": "v%d" % number, "host": "h1"} for number in range(8)]
    vms[4]["also_on"] = ["h2"]
    handle = collected(tmp_path, dict(document(), vms=vms, hosts=HOSTS))
    assert (looked_at, handle["count"]) == (["v3", "v4", "v5"], 8)
    assert {host: told["live"] for host, told in shares(handle).items()} == {
        "h1": IDS, "h2": ["v4"], "h3": [], "h4": [],
    }


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("hostile", ["v8\nv9", "v8\n", "\nv8", "\n", "v8\nv9\nv0", "", "-v8", ".."])
def test_row_36_an_id_that_could_pass_for_others_in_a_page(tmp_path, hostile, number):
    vms = [{"vm_id": "v%d" % each, "host": "h1"} for each in range(3)]
    vms[number]["vm_id"] = hostile
    for some in (vms, vms[number:number + 1]):
        with pytest.raises(manifest.ManifestError, match="cannot be the id of a VM"):
            collected(tmp_path, dict(document(), vms=some))


@pytest.mark.parametrize("kept", [0, 1, 2, 100])
def test_of_a_source_that_is_wrong_at_its_end_nothing_stays(tmp_path, monkeypatch, kept):
    monkeypatch.setattr(manifest, "KEPT", kept)
    collector = manifest.Collector(str(tmp_path / "index"))
    wrong = in_columns(dict(MANY, count=7, tombstones=[{"vm_id": "v8"}]))
    with pytest.raises(manifest.ManifestError, match="6 VMs are listed"):
        collector.add(dict(wrong, vms=iter(wrong["vms"])), "wrong", now=NOW, max_age=600)
    collector.add(document([("v7", "h2")]), "good", now=NOW, max_age=600)
    handle = collector.finish()
    told = shares(handle)["h1"]
    assert (handle["count"], told["live"], told["elsewhere"], told["tombstones"]) == (1, ["v7"], {}, {})


def test_what_is_wrong_on_a_later_page_is_named_by_its_place_on_the_list(tmp_path):
    vms = [{"vm_id": "v%d" % number, "host": "h1"} for number in range(2 * manifest.PAGE + 5)]
    vms[-2]["vm_id"] = "../x"
    place = "vms\\[%d\\]: '../x'" % (len(vms) - 2)
    with pytest.raises(manifest.ManifestError, match=place):
        collected(tmp_path, dict(document(), vms=vms))
    with pytest.raises(manifest.ManifestError, match=place):
        collected(tmp_path, in_columns(dict(document(), vms=vms)))


@pytest.mark.parametrize("count", [manifest.ROWS - 1, manifest.ROWS, manifest.ROWS + 1, manifest.PAGE + 1])
def test_of_many_rows_none_is_lost(tmp_path, count):
    vms = [{"vm_id": "v%d" % number, "host": "h%d" % (number % 3)} for number in range(count)]
    handle = collected(tmp_path, dict(document(), vms=vms))
    with contextlib.closing(sqlite3.connect(handle["index"])) as connection:
        assert connection.execute("SELECT COUNT(*) FROM vm").fetchone()[0] == handle["count"] == count
    found = manifest.share(handle, "h1", {vm["vm_id"] for vm in vms} | {"w1"})
    assert set(found["live"]) | set(found["elsewhere"]) == {vm["vm_id"] for vm in vms}
    assert found["elsewhere"] == {} or found["elsewhere"].keys().isdisjoint(found["live"])


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"count": 3}, "incomplete"),
        ({"sha256": "0" * 64}, "incomplete"),
        ({"complete": "yes"}, "incomplete"),
        ({"epoch": "new"}, "not_a_manifest"),
        ({"hosts": ["h2"]}, "unknown_host"),
        ({"generated_at": 1_700_000_000}, "stale"),
        ({"tombstones": [{"vm_id": None}]}, "not_a_manifest"),
        ({"proven": False, "unproven": "a\nb"}, "not_a_manifest"),
    ],
)
def test_row_02_what_is_wrong_at_the_end_is_wrong(tmp_path, changes, code):
    with pytest.raises(manifest.ManifestError) as caught:
        collected(tmp_path, document(**changes))
    assert caught.value.code == code


def test_what_is_said_at_the_end_counts(tmp_path):
    late = dict(document(), complete=None)

    def vms():
        yield {"vm_id": "v1", "host": "h1"}
        late.update(complete=True, count=1, epoch=9, proven=False, unproven="the pages changed")

    late["vms"] = vms()
    collector = manifest.Collector(str(tmp_path / "late"))
    collector.add(late, "api", now=NOW, max_age=600)
    handle = collector.finish()
    assert (handle["count"], handle["epochs"]) == (1, {"api": 9})
    assert (handle["proven"], handle["unproven"]) == (False, ["api: the pages changed"])


def test_a_source_that_fails_half_way_leaves_nothing(tmp_path):
    def cut_off():
        yield manifest.Columns(["v2", "v3"], ["h2", "h2"], [None, "destroyed"], [None, None])
        yield {"vm_id": "v4", "host": "h2"}
        raise manifest.ManifestError("incomplete", "the connection broke")

    collector = manifest.Collector(str(tmp_path / "m"))
    with pytest.raises(manifest.ManifestError, match="the connection broke"):
        collector.add(dict(document(realm="other"), vms=cut_off()), "bad", now=NOW, max_age=600)
    collector.add(document(), "good", now=NOW, max_age=600)
    handle = collector.finish()
    assert (handle["count"], handle["source"], handle["realm"]) == (1, "good", "prod")
    found = manifest.share(handle, "h2", {"v1", "v2", "v3"})
    assert (found["live"], found["tombstones"]) == (["v1"], {})


def test_what_is_no_list_of_vms(tmp_path):
    for nothing in (None, {}, "v1", 5, {"v1"}):
        with pytest.raises(manifest.ManifestError, match="'vms' must be a list"):
            manifest.check(dict(document(), vms=nothing), "s", now=NOW, max_age=600)


def test_what_was_begun_is_ended_whatever_came_of_it(tmp_path, monkeypatch):
    ended = []

    def vms(*some):
        try:
            yield from some
        finally:
            ended.append(True)

    module = sources.importlib.import_module(sources.__name__ + ".file")
    about = {"now": NOW, "directory": str(tmp_path), "terminal_states": manifest.TERMINAL_STATES}
    kept = []
    for some in ([{"vm_id": "v1"}], [{"vm_id": "../x"}, {"vm_id": "v2"}]):
        kept.append(dict(document(), vms=vms(*some)))
        monkeypatch.setattr(module, "fetch", lambda options, context: kept[-1])
        wanted = [{"type": "file", "path": "x", "required": False}]
        try:
            sources.fetch(wanted, about, str(tmp_path / ("%d.sqlite" % next(SERIAL))), max_age=600)
        except manifest.ManifestError:
            pass
        assert len(ended) == len(kept)
    assert ended == [True, True]


# --- asking once more --------------------------------------------------------------------------------------------


@pytest.fixture
def asked(tmp_path):
    """Return ``ask(first documents, documents now) -> still_listed()`` of files."""

    def ask(first, now, ids=("v1", "v2")):
        wanted = [{"type": "file", "path": "%d.json" % number, "required": not number} for number in range(len(first))]
        about = {"now": NOW, "directory": str(tmp_path), "terminal_states": manifest.TERMINAL_STATES}

        def write(some):
            for number, one in enumerate(some):
                (tmp_path / ("%d.json" % number)).write_text(one if isinstance(one, str) else json.dumps(one))

        write(first)
        handle = sources.fetch(wanted, about, str(tmp_path / ("%d.sqlite" % next(SERIAL))), max_age=600)
        write(now)
        return sources.still_listed(wanted, about, set(ids), handle, max_age=600)[0]

    return ask


def test_only_those_that_are_asked_about_are_told(asked):
    now = document([("v1", "h1"), ("v3", "h1")])
    assert asked([document()], [now]) == {"v1": ["h1"]}
    assert asked([document()], [document([("v3", "h1")])]) == {}
    gone = dict(document(), vms=[{"vm_id": "v1", "host": "h1", "state": "destroyed"}])
    assert asked([document()], [gone]) == {}


def test_all_places_of_all_sources_are_told(asked):
    first = [document(), document()]
    moving = dict(document(), vms=[{"vm_id": "v1", "host": "h1", "also_on": ["h2"]}])
    assert asked(first, [moving, document([("v1", "h3")])]) == {"v1": ["h1", "h2", "h3"]}
    nowhere = dict(document(), vms=[{"vm_id": "v1"}])
    assert asked(first, [moving, nowhere]) == asked(first, [nowhere, moving]) == {"v1": []}


def test_a_list_that_is_whole_is_believed_once_more(asked):
    now = document([("v1", "h1"), ("v2", "h1")], count=2, sha256=manifest.sha256(["v1", "v2"]))
    assert asked([document()], [now]) == {"v1": ["h1"], "v2": ["h1"]}


@pytest.mark.parametrize(
    ("first", "now", "said"),
    [
        ({}, {"realm": "other"}, "^file 0.json speaks for realm 'other' now"),
        ({"epoch": 5}, {"epoch": 4}, "^file 0.json was at epoch 5 and is at 4 now"),
        ({}, {"generated_at": 1_700_000_000}, "^file 0.json: the manifest is .* old, more than [^;]*$"),
        ({}, {"proven": False, "unproven": "no count"}, "^file 0.json: no count"),
        ({}, {"hosts": ["h2"]}, "^file 0.json: the VM v1 is on host 'h1'"),
        ({}, {"vms": [{"vm_id": "v1", "host": 5}]}, r"^file 0.json: vms\[0\].host: a text"),
    ],
)
def test_a_source_that_cannot_be_believed_now_is_named(asked, first, now, said):
    with pytest.raises(manifest.ManifestError, match=said):
        asked([document(**first)], [document() | now])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vms": [{"vm_id": "v1", "host": 5}]}, r"^s0: vms\[0\].host: a text"),
        ({"tombstones": [{"vm_id": "v9"}, {"vm_id": 5}]}, r"^s0: tombstones\[1\]: "),
        ({"proven": False, "unproven": 5}, "^s0: unproven: a text"),
    ],
)
def test_what_is_wrong_is_named_by_its_place(tmp_path, changes, said):
    with pytest.raises(manifest.ManifestError, match=said):
        collected(tmp_path, document() | changes)


def test_a_source_that_fails_in_the_end_leaves_no_tombstone(tmp_path):
    collector = manifest.Collector(str(tmp_path / "m"))
    dead = document(vms=(), tombstones=[{"vm_id": "v9", "destroyed_at": 1_700_000_000}], count=5)
    with pytest.raises(manifest.ManifestError, match="'count' is 5"):
        collector.add(dead, "bad", now=NOW, max_age=600)
    collector.add(document(), "good", now=NOW, max_age=600)
    assert manifest.share(collector.finish(), "h1", {"v9"})["tombstones"] == {}


@pytest.mark.parametrize(
    ("first", "now", "code"),
    [
        ({}, {"realm": "other"}, "other_realm"),
        ({"epoch": 5}, {"epoch": 4}, "epoch_went_back"),
        ({"epoch": 5}, {}, "epoch_went_back"),
        ({}, {"count": 7}, "incomplete"),
        ({}, {"proven": False}, "unproven"),
        ({}, {"sha256": "0" * 64}, "incomplete"),
        ({}, {"generated_at": 1_700_000_000}, "stale"),
    ],
)
def test_a_source_that_cannot_be_believed_now_is_told(asked, first, now, code):
    with pytest.raises(manifest.ManifestError) as caught:
        asked([document(**first)], [document(**now)])
    assert caught.value.code == code
    ids = {"sha256": manifest.sha256(["v1"])}
    assert asked([document(epoch=5)], [document(epoch=5, **ids)]) == {"v1": ["h1"]}


def test_a_source_that_cannot_be_asked_about_single_vms_is_read_again(asked, monkeypatch):
    module = sources.importlib.import_module(sources.__name__ + ".file")
    monkeypatch.setattr(module, "still_listed", lambda options, context, ids, epoch: None, raising=False)
    assert asked([document()], [document([("v2", "h2")])]) == {"v2": ["h2"]}
    monkeypatch.setattr(module, "still_listed", lambda options, context, ids, epoch: {"v1": sorted(ids)})
    assert asked([document()], [document([("v2", "h2")])]) == {"v1": ["v1", "v2"]}


def test_only_a_source_that_answered_has_to_answer_again(asked):
    assert asked([document(), "nothing"], [document(), "nothing"]) == {"v1": ["h1"]}
    with pytest.raises(manifest.ManifestError, match="is no YAML or JSON|was expected"):
        asked([document(), document()], [document(), "nothing"])
