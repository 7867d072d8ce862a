"""Reading several kinds: none may hang, crash or hide another."""

from __future__ import annotations

import base64
import json
import os
import time
import types
import zlib

import pytest
from ansible_collections.microvm.reaper.plugins.module_utils import gather
from ansible_collections.microvm.reaper.plugins.module_utils.probe import Absent, Host, ProbeError, boottime
from ansible_collections.microvm.reaper.plugins.module_utils.resource import resource, rows


def kind(name, collect):
    """Return a kind that reads with ``collect()``."""
    return types.SimpleNamespace(KIND=name, collect=lambda rules, host: collect())


def nothing():
    return {"resources": [], "foreign": 0}


def one_with_its_pid():
    return {"resources": [{"pid": os.getpid()}], "foreign": 2}


def hang():
    time.sleep(60)


def die():
    os._exit(3)


def absent():
    raise Absent("no such thing here")


def refuse():
    raise ProbeError("not allowed")


def collect(*kinds, seconds=30.0):
    return gather.collect_all(list(kinds), {one.KIND: [{}] for one in kinds}, Host(boottime() + seconds))


def pid(entry):
    return entry["resources"][0]["pid"]


def test_no_kinds_are_no_work():
    assert collect() == {}


def test_what_was_found_comes_with_its_status_in_the_order_of_the_kinds():
    found = collect(kind("b", one_with_its_pid), kind("a", nothing))
    assert list(found) == ["b", "a"]
    assert found["b"]["status"] == "ok" and found["b"]["foreign"] == 2 and found["b"]["seconds"] >= 0
    assert found["a"] == dict(nothing(), seconds=found["a"]["seconds"], status="ok", reason=None)


def test_kinds_share_one_child():
    found = collect(kind("a", one_with_its_pid), kind("b", one_with_its_pid))
    assert pid(found["a"]) == pid(found["b"]) != os.getpid()


def test_a_kind_that_hangs_is_unavailable_and_holds_nobody_up(monkeypatch):
    monkeypatch.setattr(gather, "PATIENCE_SECONDS", 0.05)
    begin = time.monotonic()
    found = collect(kind("a", hang), kind("b", one_with_its_pid), kind("c", hang), kind("d", nothing), seconds=1.0)
    assert [one["status"] for one in found.values()] == ["unavailable", "ok", "unavailable", "ok"]
    assert "deadline" in found["a"]["reason"] and found["a"]["resources"] == []
    assert time.monotonic() - begin < 3.0


def test_a_kind_that_is_slow_is_waited_for_while_others_are_read(monkeypatch):
    monkeypatch.setattr(gather, "PATIENCE_SECONDS", 0.02)
    found = collect(kind("slow", lambda: time.sleep(0.3) or one_with_its_pid()), kind("quick", one_with_its_pid))
    assert [one["status"] for one in found.values()] == ["ok", "ok"]
    assert pid(found["slow"]) != pid(found["quick"])


def test_even_when_all_hang_each_gets_its_turn_before_the_deadline():
    begin = time.monotonic()
    found = collect(*[kind(name, hang) for name in "abcd"], kind("e", nothing), seconds=1.0)
    assert [one["status"] for one in found.values()] == ["unavailable"] * 4 + ["ok"]
    assert time.monotonic() - begin < 3.0


@pytest.mark.parametrize("seconds", [0, 0.1])
def test_a_kind_whose_child_dies_is_unavailable_and_takes_no_other_with_it(seconds):
    found = collect(kind("a", nothing), kind("b", lambda: time.sleep(seconds) or die()), kind("c", nothing))
    assert [one["status"] for one in found.values()] == ["ok", "unavailable", "ok"]
    assert "ended without an answer" in found["b"]["reason"]


def test_a_child_that_is_killed_while_idle_is_missed_by_the_next_kind_only(monkeypatch):
    class Doomed(gather.Worker):
        def send(self, item, timeout=10.0):
            if item == "b":
                os.kill(self.pid, 9)
                os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
            super().send(item, timeout)

    monkeypatch.setattr(gather, "Worker", Doomed)
    found = collect(kind("a", nothing), kind("b", nothing), kind("c", nothing))
    assert [one["status"] for one in found.values()] == ["ok", "unavailable", "ok"]


def test_absent_and_refused_are_told_apart():
    found = collect(kind("a", absent), kind("b", refuse), kind("c", nothing))
    assert [(one["status"], one["reason"]) for one in found.values()] == [
        ("absent", "no such thing here"),
        ("unavailable", "not allowed"),
        ("ok", None),
    ]


def test_more_than_can_be_leftovers_are_not_judged(monkeypatch):
    monkeypatch.setattr(gather, "MAX_RESOURCES", 1)
    found = collect(kind("a", lambda: {"resources": [{}, {}], "foreign": 0}))
    assert found["a"]["status"] == "unavailable" and "2 resources" in found["a"]["reason"]


def test_no_child_is_left_behind(monkeypatch):
    monkeypatch.setattr(gather, "PATIENCE_SECONDS", 0.02)
    before = children()
    collect(kind("a", nothing), kind("b", lambda: time.sleep(0.2) or nothing()), kind("c", nothing))
    assert children() == before


def children():
    with open("/proc/self/task/%d/children" % os.getpid()) as stream:
        return stream.read().split()


def test_packed_facts_are_the_same_facts(tmp_path):
    kinds = [
        kind("a", lambda: {"resources": [resource("a", "\u00e9\u2028\"'", "v1", "x", bytes_used=7)], "foreign": 1}),
        kind("b", refuse),
        kind("c", absent),
    ]
    rules = {"a": [{}], "b": [{}], "c": [{}], "d": []}
    plain = gather.gather(kinds, rules, "prod", str(tmp_path), 10.0)
    packed = gather.gather(kinds, rules, "prod", str(tmp_path), 10.0, packed=True)
    found = json.loads(zlib.decompress(base64.b64decode(packed.pop("packed"))))
    for name, entry in found.items():
        entry["resources"] = rows(name, entry.pop("columns"))
    for entries in (found, plain["kinds"]):
        entries["a"].pop("seconds")
    assert found == plain.pop("kinds")
    assert found["a"]["foreign"] == 1 and [one["name"] for one in found["a"]["resources"]] == ["\u00e9\u2028\"'"]
    assert [one["status"] for one in found.values()] == ["ok", "unavailable", "absent"]
    assert packed.keys() == plain.keys()
    again = json.loads(zlib.decompress(base64.b64decode(gather.pack(found))))
    assert {name: dict(entry, resources=rows(name, entry.pop("columns"))) for name, entry in again.items()} == found
