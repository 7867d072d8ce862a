# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What a sweep saves, and the plans made of it again."""

from __future__ import annotations

import gzip
import json
import zlib
from pathlib import Path

import pytest
from ansible_collections.microvm.reaper.plugins.module_utils.gather import pack
from ansible_collections.microvm.reaper.plugins.module_utils.resource import holder
from ansible_collections.microvm.reaper.plugins.plugin_utils import inputs, planner, planning, replaying
from ansible_collections.microvm.reaper.plugins.plugin_utils.brake import DEFAULT_CAPS
from ansible_collections.microvm.reaper.plugins.plugin_utils.manifest import check, handle, union
from ansible_collections.microvm.reaper.plugins.plugin_utils.variables import role_spec
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.builders import HOST, TRAITS, document, facts, plan, policy, remembered, share, thing

NOW = 1_800_000_000
SPEC = role_spec()
HOSTILE = ["{{ 7*7 }}", "$(id)\u202e", "a\nb: confirmed", "\ud800", "-rf '\"", "../../etc"]


def packed(host_facts):
    """Return facts as a host sends them."""
    return dict({key: value for key, value in host_facts.items() if key != "kinds"}, packed=pack(host_facts["kinds"]))


def saved(host_facts, host_share=None, host=HOST, **changes):
    """Return the record of a host, and prove on the way that it is plain JSON."""
    host_share, mine = host_share or share(), policy(host=host, **changes)
    made = planning.plan_of_share(packed(host_facts), host_share, mine)
    record = inputs.record(host, packed(host_facts), host_share, mine, made)
    assert json.loads(json.dumps(record)) == record
    return record


def of_second_sweep(*things, host_share=None, ledger_changes=(), **changes):
    """Return facts of a host that was swept a minute ago with the same things on it."""
    first = remembered(plan(facts(*things), host_share, **changes))
    return facts(*things, now=1060.0, ledger=dict(first, **dict(ledger_changes)))


def header(*records, **changes):
    names = [record["host"] for record in records]
    return dict(inputs.header("prod", dict(DEFAULT_CAPS), names, now=NOW), **changes)


@pytest.fixture
def write(tmp_path):
    """Return a function that writes batches of records to a file as a sweep does."""

    def write(*batches, **changes):
        path = inputs.new_file(tmp_path, "prod", NOW)
        for records in batches:
            inputs.append(path, [header(*records, **changes), *records])
        return path

    return write


def replay(path, **variables):
    return replaying.replay_all(inputs.Reader(path), replaying.changes(variables, SPEC))


def told(path, **variables):
    return replaying.text(replay(path, **variables), variables).splitlines()


# --- one host


THINGS = st.lists(
    st.builds(
        thing,
        st.sampled_from(sorted(TRAITS)),
        st.sampled_from(["v1", "v2", "v3", "v4"]),
        name=st.sampled_from(HOSTILE[:1] + ["a", "b", "c", "d", "e"]),
        age=st.none() | st.floats(0, 1e4),
        in_use=st.booleans(),
        holders=st.lists(st.builds(holder, st.just("process"), st.sampled_from(HOSTILE)), max_size=1),
    ),
    max_size=6,
    unique_by=lambda one: (one["kind"], one["name"]),
)
SHARES = st.builds(
    share,
    live=st.lists(st.sampled_from(["v1", "v2"]), unique=True),
    age=st.floats(0, 600),
    count=st.integers(0, 100),
    epochs=st.dictionaries(st.sampled_from(["a", "b"]), st.integers(0, 9)),
    proven=st.booleans(),
    tombstones=st.dictionaries(st.sampled_from(["v2", "v3"]), st.none() | st.floats(0, 1e4)),
)
CHANGES = st.fixed_dictionaries(
    {},
    optional={
        "strikes": st.integers(2, 4),
        "min_age": st.floats(0, 100),
        "running": st.sampled_from(planner.RUNNING_POLICIES),
        "max_per_host": st.integers(0, 3),
        "keep": st.lists(st.sampled_from(["v1", "v*", "v4 until 2030-01-01"])),
    },
)


@given(THINGS, SHARES, CHANGES, CHANGES)
@settings(deadline=None, max_examples=200)
def test_a_plan_is_made_again_to_the_byte_and_otherwise_as_another_policy_makes_it(things, its_share, before, after):
    host_facts = of_second_sweep(*things)
    record = json.loads(json.dumps(saved(host_facts, its_share, **before)))
    again = replaying.replay(record)
    assert (again["same"], again["differences"], again["then"]) == (True, [], again["now"])
    other = replaying.replay(record, after)
    expected = planner.plan(host_facts, its_share, dict(policy(**before), **after), TRAITS)
    assert other["now"] == inputs.decision(expected)
    assert other["same"] == (inputs.digest(expected) == record["plan_sha256"])
    assert bool(other["differences"]) == (other["then"] != other["now"])


def test_the_share_that_is_saved_is_that_of_the_index(tmp_path):
    list_of_vms = document([("v1", HOST), ("v2", "elsewhere"), ("v9", HOST)], tombstones=[{"vm_id": "v3"}])
    checked = check(dict(list_of_vms, hosts=[HOST, "elsewhere"]), "test", now=NOW + 5, max_age=60)
    index = handle(union([checked]), str(tmp_path / "index"))
    host_facts = packed(facts(*[thing("jail", "v%d" % number) for number in range(1, 5)]))
    found = planning.share(host_facts, index, policy())
    record = inputs.record(HOST, host_facts, found, policy(), planning.plan(host_facts, index, policy()))
    assert "index" not in record["share"] and str(tmp_path) not in json.dumps(record)
    assert (found["live"], found["elsewhere"]) == (["v1"], {"v2": ["elsewhere"]})
    assert replaying.replay(record)["same"]


OLD = {"age": 1000.0}
CASES = {
    "too young": ({"age": 30.0}, {"min_age": 10}, ["v12: held (too_young) -> confirmed, 1 of 1 reaped"]),
    "strikes": (OLD, {"strikes": 3}, ["v12: confirmed, 1 of 1 reaped -> suspected"]),
    "pinned": (OLD, {"keep": ["v1*"]}, ["v12: confirmed, 1 of 1 reaped -> held (pinned)"]),
    "running": (
        dict(OLD, in_use=True), {"running": "confirmed"}, ["v12: disputed (running) -> suspected"]
    ),
    "cap": (
        OLD,
        {"max_per_host": 0},
        [
            "the host: judged -> refused (host_cap): 1 VMs would be reaped on this host, more than reap_max_per_host=0",
            "v12: confirmed, 1 of 1 reaped -> confirmed, 0 of 1 reaped",
        ],
    ),
    "nothing": (OLD, {"min_age": 30}, []),
}  # fmt: skip


@pytest.mark.parametrize(("how", "changes", "said"), CASES.values(), ids=CASES)
def test_what_another_policy_decides_is_said(how, changes, said):
    # Young things earn no strike; let them have one from before, as if the policy had been another one then.
    host_facts = of_second_sweep(thing("cgroup", "v12", **how), min_age=0)
    assert replaying.replay(saved(host_facts), changes)["differences"] == said


def test_a_host_that_was_refused_may_be_judged_and_the_other_way_round():
    host_facts, empty = of_second_sweep(thing("cgroup", "v12")), share(count=0)
    refused = replaying.replay(saved(host_facts, empty), {"expect_empty": "prod"})["differences"]
    assert refused[0].startswith("the host: refused (blind): ") and refused[0].endswith(" -> judged")
    assert refused[1:] == ["v12: not judged -> confirmed, 1 of 1 reaped"]
    back = replaying.replay(saved(host_facts, empty, expect_empty="prod"), {"expect_empty": ""})["differences"]
    assert back[1:] == ["v12: confirmed, 1 of 1 reaped -> not judged"]


def test_a_removal_that_was_cut_short_is_said_too():
    intent = planning.plan_of_share(packed(of_second_sweep(thing("dm_thin", "v12"))), share(), policy())["reap"]
    host_facts = of_second_sweep(ledger_changes={"intents": intent})
    assert replaying.replay(saved(host_facts), {"keep": ["v12"]})["differences"] == [
        "v12: what was cut short is finished -> nothing to do"
    ]


# --- a file


def hosts(*names, things=1, **changes):
    """Return a record for each name, with so many VMs to be reaped; each a machine of its own."""
    dead = [thing("cgroup", "v%d" % number) for number in range(things)]
    return [
        saved(of_second_sweep(*dead, ledger_changes={"host": None, "machine_id": None}) | {"machine_id": name},
              share(count=50), host=name, **changes)
        for name in names
    ]  # fmt: skip


def test_a_sweep_is_replayed(write):
    result = replay(write(hosts("h1", "h2"), hosts("h3")))
    assert result["totals"]["then"] == result["totals"]["now"] == {"vms": 3, "resources": 3}
    assert (result["hosts"], result["differing"], result["missing"], result["cut_off"]) == (3, {}, [], False)
    assert told(write(hosts("h1", "h2"), hosts("h3"))) == [
        "microvm.reaper: replay of realm prod, saved 2027-01-15T08:00:00Z: 3 hosts in 2 batches",
        "all plans are the same, to the byte",
    ]


def test_another_policy_is_tried(write):
    assert told(write(hosts("h1", "h2"), check_mode=True), reap_strikes="3") == [
        "microvm.reaper: replay of realm prod, saved 2027-01-15T08:00:00Z in check mode: 2 hosts in 1 batch",
        "with reap_strikes=3: decided otherwise on 2 of 2 hosts",
        "h1: v0: confirmed, 1 of 1 reaped -> suspected",
        "h2: v0: confirmed, 1 of 1 reaped -> suspected",
        "to be reaped then: 2 VMs (2 resources); now: 0 VMs (0 resources)",
    ]


def test_the_brake_is_replayed_over_all_batches(write):
    batches = [hosts("h%d" % number, things=2) for number in range(3)]
    lines = told(write(*batches), reap_max_per_fleet=3)
    assert lines[2:] == [
        "batch 2: goes on -> stopped (fleet_cap): 4 VMs would be reaped in this run, 2 of them in earlier batches, more"
        " than reap_max_per_fleet=3",
        "batch 3: goes on -> not reached",
        "to be reaped then: 6 VMs (6 resources); now: 2 VMs (2 resources)",
    ]
    caps = dict(DEFAULT_CAPS, max_per_fleet=3)
    assert told(write(*batches, caps=caps), reap_max_per_fleet=10)[-1] == (
        "to be reaped then: 2 VMs (2 resources); now: 6 VMs (6 resources)"
    )
    percent = told(write([record for batch in batches for record in batch]), reap_percent_floor=5, reap_max_percent=10)
    assert "stopped (fleet_cap): 6 VMs would be reaped in this run, beside 50 that live: 10 %" in percent[2]


def test_hosts_that_only_the_brake_holds_back_are_said(write):
    first, second = hosts("h1", "h2")
    second["facts"]["machine_id"] = "h1"
    second["decision"]["ledger"]["machine_id"] = "h1"
    second["plan_sha256"] = inputs.digest(planning.plan_of_share(*[second[k] for k in ("facts", "share", "policy")]))
    lines = told(write([first, second]), reap_strikes=3)
    assert "batch 1: goes on without h1 (cloned_machine_id) without h2 (cloned_machine_id)" in lines
    assert lines[-1].startswith("to be reaped then: 0 VMs")


def test_another_version_is_named(write, monkeypatch):
    (record,) = hosts("h1")
    path = write([dict(record, plan_sha256="0" * 64)], version="0.0.9")
    result = replay(path)
    assert result["differing"] == {"h1": []}
    assert replaying.verdict(result) == (
        "1 of 1 plans are not as they were made (h1); the file was saved by version 0.0.9, this is version %s"
        % inputs.version()
    )
    lines = told(path)
    assert "by version 0.0.9 (this is %s)" % inputs.version() in lines[0]
    assert "h1: decided alike, but the plan is not the same to the byte" in lines
    same = replaying.verdict(replay(write([dict(record, plan_sha256="0" * 64)])))
    assert "the file or the collection was changed since: both are of version" in same


@pytest.mark.parametrize("name", HOSTILE)
def test_row_36_names_stay_data(tmp_path, name):
    path = inputs.new_file(tmp_path, name, NOW)
    assert path.startswith(str(tmp_path)) and "/" not in path[len(str(tmp_path)) + 1:]
    held = thing("jail", "v1", name="n" + name.replace("\n", "").replace("\ud800", "").replace("\u202e", ""))
    record = saved(of_second_sweep(held, ledger_changes={"host": None}), host=name)
    inputs.append(path, [header(record), record])
    assert replay(path)["differing"] == {}
    lines = replaying.text(replay(path, reap_strikes=3), {}).split("\n")
    assert len(lines) == 3 and all(line.isprintable() for line in lines)


def test_two_runs_of_one_second_have_a_file_each(tmp_path):
    paths = [inputs.new_file(tmp_path, "prod", NOW) for _run in range(3)]
    assert [path.rpartition("/")[2] for path in paths] == [
        "prod-2027-01-15T08-00-00Z%s.jsonl.gz" % suffix for suffix in ("", "-2", "-3")
    ]
    assert {Path(path).stat().st_mode & 0o777 for path in paths} == {0o600}


def test_the_order_of_keys_does_not_count():
    assert inputs.digest({"a": 1, "b": [2]}) == inputs.digest({"b": [2], "a": 1}) != inputs.digest({"a": 1, "b": [3]})


def test_a_part_that_fails_is_taken_back(write):
    path = write(hosts("h1"))
    before = Path(path).read_bytes()

    def failing():
        yield header()
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError):
        inputs.append(path, failing())
    assert Path(path).read_bytes() == before


def test_what_is_written_can_be_read_at_once(write):
    (record,) = hosts("h1")
    path = write()

    def watched():
        yield header(record, record)
        yield record
        reader = inputs.Reader(path)
        assert [line.get("host") for line in reader] == [None, "h1"] and reader.cut_off
        yield record

    inputs.append(path, watched())
    assert not replay(path)["cut_off"]


# --- files that are not whole, or none


def test_a_file_that_was_cut_off_anywhere_is_replayed_as_far_as_it_goes(write, tmp_path):
    whole = Path(write(hosts("h1", "h2"), hosts("h3"))).read_bytes()
    seen, wrong, cut = [], [], tmp_path / "cut"
    for length in range(len(whole) + 1):
        cut.write_bytes(whole[:length])
        try:
            result = replay(cut)
        except inputs.InputsError as err:
            wrong += [] if "nothing was saved" in str(err) else [str(err)]
        else:
            assert result["differing"] == {} and (result["cut_off"] or result["hosts"] in (2, 3))
            seen.append(result["hosts"])
    assert seen == sorted(seen) and set(seen) == {0, 1, 2, 3}
    # Of the two bytes by which gzip knows its own, one is not enough; once for each part.
    assert len(wrong) == 2 and all("Not a gzipped file (b'\\x1f')" in said for said in wrong)


def test_what_is_missing_is_said(write):
    path = write(hosts("h1", "h2", "h3"))
    whole = Path(path).read_bytes()
    Path(path).write_bytes(whole[:len(whole) * 2 // 3])
    assert told(path)[-1].startswith("INCOMPLETE: the run was cut off while it wrote this file, before it had saved h")


def spoilt(record, **changes):
    return dict(json.loads(json.dumps(record)), **changes)


(GOOD,) = hosts("h1")
FOREIGN = {
    "text": (b"no gzip", "not a file that reap_save_inputs wrote"),
    "no JSON": (gzip.compress(b"hello\n"), "line 1: not JSON"),
    "deep": (gzip.compress(b"[" * 100000 + b"\n"), "line 1: not JSON"),
    "a list": (gzip.compress(b"[]\n"), "line 1: not a file that reap_save_inputs wrote"),
    "no header": ([GOOD], "line 1: not a file that reap_save_inputs wrote: it does not begin"),
    "later": ([header(format=2, version="9.0")], "line 1: format 2, saved by version '9.0'"),
    "no caps": ([header(caps={})], "line 1: 'max_per_fleet' of the caps"),
    "no hosts": ([header(hosts=None)], "line 1: 'hosts' of the header"),
    "no facts": ([header(), {key: GOOD[key] for key in GOOD if key != "facts"}], "line 2: 'facts' of the record"),
    "facts of something": ([header(), GOOD, spoilt(GOOD, facts={"a": 1})], "line 3: host h1: not the facts"),
    "bad pack": ([header(), spoilt(GOOD, facts=dict(GOOD["facts"], packed="AAAA"))], "line 2: host h1: the packed"),
    "share of something": ([header(), spoilt(GOOD, share={})], "line 2: host h1: version"),
    "no such policy": ([header(), spoilt(GOOD, policy=policy(mood="good"))], "line 2: host h1: unknown key(s)"),
    "no decision": ([header(), spoilt(GOOD, decision={})], "line 2: host h1: version"),
    "odd decision": (
        [header(), spoilt(GOOD, decision=dict(GOOD["decision"], reap=[{"vm_id": []}]))], "line 2: host h1: version"
    ),
    "no count": (
        [header(), spoilt(GOOD, decision=dict(GOOD["decision"], manifest={"count": "few"}))], "line 2: host h1: version"
    ),
    "half a line": (gzip.compress(json.dumps(header()).encode() + b'\n{"host": "h'), "line 2: not JSON"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "words"), FOREIGN.values(), ids=FOREIGN)
def test_what_is_corrupt_or_foreign_is_named_with_its_line(tmp_path, content, words):
    path = tmp_path / "foreign.jsonl.gz"
    if isinstance(content, list):
        content = gzip.compress("".join(json.dumps(line) + "\n" for line in content).encode())
    path.write_bytes(content)
    with pytest.raises(inputs.InputsError) as error:
        replay(path)
    assert words in str(error.value) and str(path) in str(error.value)


def test_bytes_that_changed_are_noticed(write, tmp_path):
    whole = Path(write(hosts("h1", "h2"))).read_bytes()
    assert zlib.decompress(whole, 31)
    for place in range(20, len(whole), 7):
        damaged = tmp_path / "damaged"
        damaged.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1:])
        try:
            assert replay(damaged)["cut_off"]
        except inputs.InputsError as err:
            assert str(damaged) in str(err)


def test_no_file(tmp_path):
    with pytest.raises(inputs.InputsError, match="No such file"):
        replay(tmp_path / "none")


def test_a_directory_that_cannot_be_written(tmp_path):
    assert inputs.unwritable(tmp_path) is None and list(tmp_path.iterdir()) == []
    assert inputs.unwritable(tmp_path / "none") == "No such file or directory"


# --- changes


def test_every_variable_that_hosts_are_judged_by_can_be_changed():
    fixed = {"realm", "host"}
    judged = {"reap_" + key for key in {*planner.DEFAULT_POLICY, *DEFAULT_CAPS} - fixed}
    assert judged <= set(SPEC)
    given = {name: SPEC[name].get("default") for name in judged}
    meant = replaying.changes(given, SPEC)
    assert set(meant["policy"]) == set(planner.DEFAULT_POLICY) - fixed
    assert meant["caps"] == DEFAULT_CAPS


BAD = {
    "unknown": ({"reap_strikse": 3}, "unknown variable reap_strikse, did you mean reap_strikes"),
    "realm": ({"reap_realm": "x"}, "reap_realm cannot be changed afterwards"),
    "what is looked at": ({"reap_presets": ["hyper"]}, "reap_presets cannot be changed afterwards"),
    "wrong type": ({"reap_min_age": "long"}, "reap_min_age"),
    "wrong type of a cap": ({"reap_max_per_fleet": "many"}, "reap_max_per_fleet"),
    "no choice": ({"reap_running": "maybe"}, "reap_running"),
    "impossible": ({"reap_max_percent_per_host": 150}, "reap_max_percent_per_host must be a number, between 0 and 100"),
    "a pin": ({"reap_keep": ["a b"]}, "reap_keep: 'a b'"),
}


@pytest.mark.parametrize(("variables", "words"), BAD.values(), ids=BAD)
def test_changes_that_cannot_be_meant_are_named(variables, words):
    with pytest.raises(replaying.ReplayError) as error:
        replaying.changes(dict(variables, reap_zombies="report"), SPEC)
    assert words in str(error.value)
