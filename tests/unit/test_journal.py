# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The journal, in real files, and as carrying out a plan writes it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import types

import pytest
from ansible_collections.microvm.reaper.plugins.module_utils import acts
from ansible_collections.microvm.reaper.plugins.module_utils import journal as journals
from ansible_collections.microvm.reaper.plugins.module_utils import ledger as ledgers
from ansible_collections.microvm.reaper.plugins.module_utils import resource as r
from ansible_collections.microvm.reaper.plugins.module_utils.probe import Host, boottime
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.builders import REALM, outcomes, sweep_twice, thing

ROOT = os.geteuid() == 0


@pytest.fixture
def state(tmp_path):
    return str(tmp_path / "state")


def note(state, *messages, sweep="s"):
    """Write one latch for each message: the smallest entry there is."""
    for message in messages:
        journals.Journal(state, REALM, sweep).latched(message)


def messages(state, **wanted):
    return [entry["message"] for entry in journals.about(state, REALM, wanted)["entries"]]


def content(state, generation=""):
    with open(journals.path_of(state, REALM) + generation, "rb") as stream:
        return stream.read()


def write(state, data):
    os.makedirs(os.path.join(state, REALM), mode=0o700)
    with open(journals.path_of(state, REALM), "wb") as stream:
        stream.write(data)


def write_outcomes(journal, some):
    """Write outcomes as a sweep does; return what could not be written."""
    problems = []
    with journal.writing(problems.append):
        for one in some:
            journal.outcome(one)
    return problems


# --- the file ----------------------------------------------------------------------------------------------------


def test_what_was_intended_and_what_came_of_it(state):
    plan = sweep_twice(thing("cgroup", "v1"), thing("jail", "v1"), thing("jail", "v2"))
    journal = journals.Journal(state, REALM, "s1")
    journal.intents(plan, plan["reap"])
    write_outcomes(journal, [dict(one, bytes=7, message="m") for one in outcomes(plan["reap"])])
    found = journals.about(state, REALM, {"vm_id": "v1"})
    assert not found["truncated"]
    assert [(entry["what"], entry["kind"]) for entry in found["entries"]] == [
        ("intent", "jail"), ("intent", "cgroup"), ("outcome", "jail"), ("outcome", "cgroup"),
    ]
    intent, outcome = found["entries"][1], found["entries"][3]
    for entry in (intent, outcome):
        assert re.fullmatch("[0-9a-f]{64}", entry.pop("previous"))
        assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ", entry.pop("time"))
        assert 0 <= boottime() - entry.pop("boottime") < 60
        assert len(entry.pop("boot_id")) == 36
    thing_itself = {"sweep": "s1", "kind": "cgroup", "name": "v1.cgroup", "vm_id": "v1"}
    assert intent == dict(
        thing_itself, what="intent", identity="id of v1.cgroup", step="remove", evidence="absent", strikes=2,
        source="test",
        reasons=["the live source does not list the VM"],
    )
    assert outcome == dict(thing_itself, what="outcome", outcome="reaped", bytes=7, message="m", reasons=[])
    by_name = journals.about(state, REALM, {"name": "v1.jail", "kind": "jail"})["entries"]
    assert [(entry["vm_id"], entry["name"]) for entry in by_name] == [("v1", "v1.jail")] * 2
    assert journals.about(state, REALM, {"name": "v1.jail", "kind": "cgroup"})["entries"] == []


def test_only_the_owner_reads_it_and_nothing_is_there_until_there_is_something_to_say(state):
    assert journals.about(state, REALM, {}) == {"entries": [], "truncated": False, "broken": None}
    journals.Journal(state, REALM).intents({}, [])
    assert not os.path.exists(state)
    note(state, "a")
    path = journals.path_of(state, REALM)
    assert [os.stat(one).st_mode & 0o777 for one in (path, os.path.dirname(path), state)] == [0o600, 0o700, 0o700]


def test_all_of_a_step_is_one_write_and_on_the_disk_before_it_returns(state, monkeypatch):
    calls = []
    for name in ("write", "fsync"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, real=real: (calls.append(name), real(*a))[1])
    plan = sweep_twice(thing("cgroup", "v1"), thing("jail", "v2"))
    journals.Journal(state, REALM).intents(plan, plan["reap"])
    assert calls == ["write", "fsync", "fsync"]  # the second one is the directory's: the file is new
    write_outcomes(journals.Journal(state, REALM), outcomes(plan["reap"]))
    assert calls[3:] == ["write", "write", "fsync"]


@pytest.mark.parametrize("torn", [b'{"what": "latched", "ti', b"\xff\x00", b"{", b'"'])
def test_a_torn_last_line_is_skipped_and_does_not_join_the_next(state, torn):
    note(state, "a")
    with open(journals.path_of(state, REALM), "ab") as stream:
        stream.write(torn)
    assert messages(state) == ["a"]
    note(state, "b")
    assert messages(state) == ["a", "b"]
    assert content(state).splitlines()[1] == torn


def test_a_whole_last_line_of_which_only_the_end_is_missing_counts_again(state):
    note(state, "a", "b")
    data = content(state)
    os.truncate(journals.path_of(state, REALM), len(data) - 1)
    note(state, "c")
    assert messages(state) == ["a", "b", "c"]


def test_it_cannot_grow_without_bound(state, monkeypatch):
    note(state, "m000")
    monkeypatch.setattr(journals, "MAX_BYTES", 10 * len(content(state)) + 50)
    note(state, *["m%03d" % number for number in range(1, 35)])
    assert sorted(os.listdir(os.path.join(state, REALM))) == ["journal.jsonl", "journal.jsonl.1"]
    assert len(content(state)) <= len(content(state, ".1")) <= journals.MAX_BYTES
    # The oldest are gone, the latest are there, in order over both files.
    assert messages(state) == ["m%03d" % number for number in range(20, 35)]


def test_what_is_larger_than_the_bound_is_written_all_the_same(state, monkeypatch):
    monkeypatch.setattr(journals, "MAX_BYTES", 10)
    note(state, "a", "b")
    assert (content(state, ".1").count(b"\n"), content(state).count(b"\n")) == (1, 1)


def test_a_reader_misses_nothing_when_the_files_change_places_under_it(state, monkeypatch):
    note(state, "a")
    real, path = os.open, journals.path_of(state, REALM)

    def rotating(name, *arguments, **named):
        if name == path + ".1":
            os.rename(path, path + ".1")
        return real(name, *arguments, **named)

    monkeypatch.setattr(os, "open", rotating)
    assert messages(state) == ["a"]


def test_the_latest_are_returned_and_that_there_are_more(state, monkeypatch):
    monkeypatch.setattr(journals, "MAX_ENTRIES", 3)
    note(state, "a", "b", "c")
    assert not journals.about(state, REALM, {})["truncated"]
    note(state, "d")
    assert journals.about(state, REALM, {})["truncated"] and messages(state) == ["b", "c", "d"]


# --- hostile content ---------------------------------------------------------------------------------------------

HOSTILE = ["a\nb", "\x1b[2J", "\ud800", "\u202e", "{{ x }}", '"}\n{"what": "latched", "message": "x"}', "é" * 3]


@pytest.mark.parametrize("text", HOSTILE)
def test_texts_are_data_and_the_file_is_ascii(state, text):
    one = dict(r.outcome({"kind": "jail", "name": text, "vm_id": "v1"}, r.FAILED, text))
    write_outcomes(journals.Journal(state, REALM), [one])
    assert content(state).isascii() and content(state).count(b"\n") == 1
    (entry,) = journals.about(state, REALM, {"vm_id": "v1"})["entries"]
    assert entry["message"] == entry["name"] == text.replace("\ud800", "?")
    entry["message"].encode()


def test_the_longest_entry_there_can_be_is_read_again(state):
    astral = "\U0001f480"
    token = {"kind": "jail", "name": astral * r.MAX_NAME, "vm_id": "v" * 128, "identity": astral * 9999}
    family = {"strikes": 2, "reasons": [{"code": "c", "text": astral * 9999}] * 99}
    plan = {"families": {token["vm_id"]: family}, "manifest": {"source": astral * 9999, "epoch": 1e300}}
    journals.Journal(state, REALM).intents(plan, [token])
    (entry,) = journals.about(state, REALM, {"vm_id": token["vm_id"]})["entries"]
    assert entry["name"] == token["name"]
    assert len(entry["reasons"]) == 4 and len(entry["source"]) < 600


def test_a_line_of_any_length_costs_no_memory_and_hides_nothing(state):
    note(state, "a")
    good = content(state)
    long = b'{"what": "latched", "message": "' + b"x" * (3 * journals.MAX_LINE) + b'", "time": "t"}\n'
    with open(journals.path_of(state, REALM), "wb") as stream:
        stream.write(long + good + b"y" * journals.MAX_LINE + good + good)
    assert messages(state) == ["a", "a"]


@pytest.mark.parametrize(
    "line",
    [b"[]", b"null", b"5", b"{}", b'{"what": "intent"}', b'{"what": ["intent"]}', b'{"what": "latched", "time": "t"}',
     b'{"what": "latched", "time": 5, "message": "m"}', b"[" * 100000, b"\xe9", b'{"what": "gone", "time": "t"}', b""],
)
def test_lines_that_are_no_entries_are_skipped(state, line):
    write(state, line + b"\n")
    note(state, "a")
    assert messages(state) == ["a"]


def test_what_a_later_version_writes_besides_is_left_out(state):
    note(state, "a")
    entry = dict(json.loads(content(state)), chain="c", bytes="many", boottime=float("nan"))
    os.unlink(journals.path_of(state, REALM))
    with open(journals.path_of(state, REALM), "w") as stream:
        stream.write(json.dumps(entry) + "\n")
    (found,) = journals.about(state, REALM, {})["entries"]
    assert set(found) == {"what", "time", "boot_id", "sweep", "previous", "message", "reasons"}


@settings(max_examples=60, deadline=None)
@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from([*journals.TEXTS, *journals.NUMBERS, "what", "reasons"]), inner, max_size=9),
    max_leaves=20,
))
def test_nothing_but_a_value_error_comes_of_a_strange_entry(value):
    for entry in (value, dict(value, what="latched") if isinstance(value, dict) else value):
        try:
            known = journals.checked(entry)
        except ValueError:
            continue
        assert all(isinstance(known[key], str) for key in journals.TEXTS if key in known)


# --- what is in the way ------------------------------------------------------------------------------------------


def link(path):
    os.symlink(path + ".victim", path)


@pytest.mark.parametrize("plant", [link, os.mkdir, os.mkfifo])
def test_what_lies_in_the_place_of_the_file_is_neither_followed_nor_waited_for(state, plant):
    os.makedirs(os.path.join(state, REALM), mode=0o700)
    path = journals.path_of(state, REALM)
    with open(path + ".victim", "w") as stream:
        stream.write("precious")
    plant(path)
    with pytest.raises(journals.JournalError, match=re.escape(path)):
        note(state, "a")
    with pytest.raises(journals.JournalError, match=re.escape(path)):
        messages(state)
    with open(path + ".victim") as stream:
        assert stream.read() == "precious"


def test_a_link_in_the_place_of_the_old_generation_is_replaced_and_not_followed(state, monkeypatch):
    note(state, "a")
    monkeypatch.setattr(journals, "MAX_BYTES", 10)
    path = journals.path_of(state, REALM)
    with open(path + ".victim", "w") as stream:
        stream.write("precious")
    os.symlink(path + ".victim", path + ".1")
    note(state, "b")
    with open(path + ".victim") as stream:
        assert stream.read() == "precious"
    assert messages(state) == ["a", "b"]


@pytest.mark.parametrize("which", ["state", "realm"])
def test_directories_that_others_could_have_prepared_are_refused(state, which):
    note(state, "a")
    os.chmod({"state": state, "realm": os.path.join(state, REALM)}[which], 0o770)
    with pytest.raises(ledgers.LedgerError, match="writable by nobody else"):
        note(state, "b")
    assert messages(state) == ["a"]


@pytest.mark.skipif(not ROOT, reason="mounts a file system")
def test_row_32_a_full_disk_takes_all_of_a_step_or_nothing(state):
    os.mkdir(state)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k,mode=700", "none", state], check=False).returncode:
        pytest.skip("no right to mount")
    try:
        note(state, "a")
        before = content(state)
        many = [{"kind": "jail", "name": "n%d" % number, "vm_id": "v1", "identity": "i"} for number in range(1000)]
        with pytest.raises(journals.JournalError, match="cannot write the journal .*No space left on device"):
            journals.Journal(state, REALM).intents({}, many)
        assert content(state) == before
    finally:
        subprocess.run(["umount", state], check=True)


# --- carrying out a plan -----------------------------------------------------------------------------------------


class Reaper:
    """Carries out plans with one kind, whose removals end as a test wants and find the journal as it is by then."""

    def __init__(self, state):
        self.state = state
        self.removed = state + ".removed"

    def apply(self, *things, result=r.REAPED, tell=lambda problem: None):
        plan = sweep_twice(*things)
        kind = types.SimpleNamespace(KIND="cgroup", remove=self._remove(result))
        with acts.Hands({}, Host(boottime() + 20.0), [kind]) as hands:
            plan["generation"] = ledgers.load(self.state, REALM)[0]["generation"]
            return acts.apply(plan, hands, self.state, REALM, tell)

    def _remove(self, result):
        def remove(token, rules, host):
            with open(self.removed, "a") as stream:
                entries = journals.about(self.state, REALM, {"name": token["name"]})["entries"]
                stream.write("%s after %s\n" % (token["name"], [entry["what"] for entry in entries]))
            return r.outcome(token, result, "m", bytes_given_back=7)

        return remove

    def done(self):
        if not os.path.exists(self.removed):
            return []
        with open(self.removed) as stream:
            return stream.read().splitlines()


@pytest.fixture
def reaper(state):
    return Reaper(state)


def test_intents_are_written_before_the_acts_and_outcomes_after(reaper, state):
    reaper.apply(thing("cgroup", "v1"), thing("cgroup", "v2"))
    assert reaper.done() == ["v1.cgroup after ['intent']", "v2.cgroup after ['intent']"]
    entries = journals.about(state, REALM, {"vm_id": "v2"})["entries"]
    assert [(entry["what"], entry.get("outcome")) for entry in entries] == [("intent", None), ("outcome", "reaped")]
    assert entries[0]["sweep"] == entries[1]["sweep"] and len(entries[0]["sweep"]) == 16
    assert entries[0]["reasons"] == ["the live source does not list the VM"]
    reaper.apply(thing("cgroup", "v2"), result=r.DEFERRED)
    again = journals.about(state, REALM, {"vm_id": "v2"})["entries"]
    assert [entry.get("outcome") for entry in again] == [None, "reaped", None, "deferred"]
    assert again[2]["sweep"] != again[0]["sweep"]


def test_a_sweep_that_reaps_nothing_writes_nothing(reaper, state):
    reaper.apply()
    assert ledgers.load(state, REALM)[0]["generation"] == 1
    assert not os.path.exists(journals.path_of(state, REALM))


def test_row_32_without_a_journal_nothing_is_removed(reaper, state):
    os.makedirs(journals.path_of(state, REALM), mode=0o700)
    with pytest.raises(ledgers.LedgerError, match="cannot write the journal .*; nothing was removed"):
        reaper.apply(thing("cgroup", "v1"))
    assert (reaper.done(), ledgers.load(state, REALM)[0]["generation"]) == ([], 0)


def test_row_32_what_was_done_is_told_when_the_journal_cannot_be_written_any_more(reaper, state, monkeypatch):
    def broken(*_arguments):
        raise journals.JournalError("cannot write the journal: No space left on device")

    monkeypatch.setattr(journals._File, "add", lambda file, entries, add=journals._File.add: (
        broken() if entries[0]["what"] == "outcome" else add(file, entries)))
    told = []
    assert [one["outcome"] for one in reaper.apply(thing("cgroup", "v1"), tell=told.append)] == ["reaped"]
    assert len(told) == 1 and "could not be written down" in told[0] and "No space left" in told[0]
    # The ledger was written all the same.
    assert ledgers.load(state, REALM)[0]["intents"] == []


def test_row_35_a_latch_is_noted_once(state):
    for message in ("first", "second"):
        acts.latch({"code": "latched", "message": message}, state, REALM)
    assert messages(state, vm_id="whoever") == ["first"]


def test_what_is_finished_for_an_earlier_sweep_says_so(state):
    plan = sweep_twice(thing("dm_thin", "v1"))
    journals.Journal(state, REALM).intents(dict(plan, families={}), [dict(plan["reap"][0], resume=True)])
    (entry,) = journals.about(state, REALM, {"vm_id": "v1"})["entries"]
    assert entry["reasons"] == ["an earlier sweep began to remove it and was cut short"]


def test_an_intent_names_the_signed_plan_that_is_applied(tmp_path):
    token = {"kind": "jail", "name": "n", "vm_id": "v1", "identity": "i", "step": "remove"}
    journal = journals.Journal(str(tmp_path), "prod", "s1")
    journal.intents({"within": {"plan": "1f2e"}}, [token])
    journal.intents({}, [token])
    entries = journals.about(str(tmp_path), "prod", {"vm_id": "v1"})["entries"]
    assert [entry.get("plan") for entry in entries] == ["1f2e", None]
