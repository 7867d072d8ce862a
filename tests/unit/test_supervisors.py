# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Supervisors on a host: servers that answer anything, sockets that anybody planted, and what becomes of their word."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
import types

import pytest
import yaml
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator
from ansible_collections.microvm.reaper.plugins.action import report
from ansible_collections.microvm.reaper.plugins.module_utils import all_supervisors, gather
from ansible_collections.microvm.reaper.plugins.module_utils import containerd as daemons
from ansible_collections.microvm.reaper.plugins.module_utils.probe import Absent, Host, ProbeError, boottime
from ansible_collections.microvm.reaper.plugins.module_utils.resource import RuleError
from ansible_collections.microvm.reaper.plugins.module_utils.supervisors import containerd, firecracker
from ansible_collections.microvm.reaper.plugins.modules import vm_resource_facts
from ansible_collections.microvm.reaper.plugins.plugin_utils import explaining, planning, sources, swept
from ansible_collections.microvm.reaper.plugins.plugin_utils import facts as module
from ansible_collections.microvm.reaper.plugins.plugin_utils.manifest import ManifestError
from unit import builders
from unit.builders import document, facts, plan, policy, reasons, remembered, share, sweep_twice, thing

INFO = {"app_name": "Firecracker", "id": "v1", "state": "Running", "vmm_version": "1.10.1"}
JAIL = "firecracker/%s/root/run"


def answer(body, status="200 OK"):
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = "HTTP/1.1 %s\r\nServer: Firecracker API\r\nContent-Length: %d\r\n\r\n" % (status, len(body))
    return head.encode() + body


@pytest.fixture
def jails(tmp_path, monkeypatch):
    """A jailer's directory, and servers in it."""
    monkeypatch.setattr(firecracker, "ANSWER_SECONDS", 0.5)
    with contextlib.ExitStack() as stack:
        yield Jails(tmp_path / "jailer", stack)


class Jails:
    def __init__(self, base, stack):
        self.base = base
        self.stack = stack
        self.asked = []
        base.mkdir()

    def run(self, vm_id):
        place = self.base / (JAIL % vm_id)
        place.mkdir(parents=True, exist_ok=True)
        return place

    def listen(self, vm_id, backlog=8):
        """Return a socket that listens where the API of the VM is."""
        listener = socket.socket(socket.AF_UNIX)
        self.stack.enter_context(listener)
        before = os.open(".", os.O_RDONLY)
        os.chdir(self.run(vm_id))  # a path of any length
        try:
            listener.bind("firecracker.socket")
        finally:
            os.fchdir(before)
            os.close(before)
        listener.listen(backlog)
        return listener

    def serve(self, vm_id, what):
        listener = self.listen(vm_id)

        def work():
            with contextlib.suppress(OSError):
                connection, _address = listener.accept()
                with connection:
                    self.asked.append(connection.recv(4096))
                    if callable(what):
                        what(connection)
                    else:
                        connection.sendall(what)
                        connection.recv(1)  # stays open, as Firecracker does

        threading.Thread(target=work, daemon=True).start()

    def alive(self, pattern="*/{vm_id}/root/run/firecracker.socket", seconds=30):
        options = {"sockets": [str(self.base / pattern)]}
        firecracker.check(options)
        return firecracker.alive(options, Host(boottime() + seconds))


def nobody(jails, vm_id):
    """Leave a socket on which nobody listens any more."""
    jails.listen(vm_id).close()


# --- Firecracker's API


def test_who_answers_lives_and_who_left_a_socket_does_not(jails):
    jails.serve("v1", answer(INFO))
    nobody(jails, "v2")
    jails.run("v3")
    path = jails.run("v1") / "firecracker.socket"
    assert jails.alive() == {"v1": "its API socket %s answers (Running)" % path}
    assert jails.asked == [b"GET / HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n\r\n"]


def test_who_answers_with_another_id_makes_both_live(jails):
    jails.serve("v1", answer(dict(INFO, id="v9", state="Paused")))
    found = jails.alive()
    assert found["v1"].endswith("answers (Paused)")
    assert found["v9"].startswith("who answers on the API socket") and "this VM" in found["v9"]
    assert len(found) == 2


def drip(connection):
    for byte in answer(INFO):
        connection.sendall(bytes([byte]))
        time.sleep(0.1)


def flood(connection):
    connection.sendall(answer(dict(INFO, state="x" * 10_000_000)))


ODD = {
    "html": answer(b"<html><body>200 OK</body></html>"),
    "no http": b"SSH-2.0-OpenSSH_9.2\r\n",
    "nothing, and closed": lambda connection: None,
    "reset": lambda connection: connection.shutdown(socket.SHUT_RDWR),
    "silence": lambda connection: time.sleep(3),
    "drip": drip,
    "10 MB": flood,
    "headers without end": lambda connection: connection.sendall(b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 99999),
    "one line without end": lambda connection: connection.sendall(b"HTTP/1.1 " + b"x" * 300_000),
    "continue without end": lambda connection: connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n" * 9999),
    "chunks that are none": answer(b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked") + b"-5\r\n",
    "a length that is none": answer(INFO).replace(b"Content-Length: ", b"Content-Length: -"),
    "cut off": answer(INFO)[:-5],
    "an error": answer({"fault_message": "x"}, "400 Bad Request"),
    "an error with an id": answer(dict(INFO, id="v9"), "500 Internal Server Error"),
    "a list": answer([INFO]),
    "null": answer(None),
    "a number": answer(7),
    "nested": answer(b"[" * 50_000),
    "no text": answer(b"\xff\xfe\x00"),
    "no id": answer({"state": "Running"}),
    "id of another type": answer(dict(INFO, id=["v9"])),
    "state of another type": answer(dict(INFO, id="v9", state={"a": 1})),
}


@pytest.mark.parametrize("what", ODD.values(), ids=ODD)
def test_whatever_it_answers_it_lives_and_nobody_else(jails, what):
    jails.serve("v1", what)
    begin = time.monotonic()
    found = jails.alive()
    assert time.monotonic() - begin < 1.5
    assert set(found) == {"v1"} and "something listens on its API socket" in found["v1"]


@pytest.mark.parametrize("name", ["", "../v9", "v 9", "v9\n", "{{ v9 }}", "a" * 200, "\ud800"])
def test_row_36_an_id_that_is_none_is_not_believed(jails, name):
    jails.serve("v1", answer(json.dumps(dict(INFO, id=name, state="Run\x1b[2J\nning")).encode()))
    found = jails.alive()
    assert set(found) == {"v1"} and found["v1"].endswith("answers (Run?[2J?ning)")


def test_a_vmm_that_is_stopped_lives(jails):
    """A real process, stopped by SIGSTOP: the kernel takes the connection for it."""
    listener = jails.listen("v1")
    pid = os.fork()
    if pid == 0:
        signal.pause()
        os._exit(0)
    try:
        listener.close()
        os.kill(pid, signal.SIGSTOP)
        assert "something listens" in jails.alive()["v1"]
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert jails.alive() == {}


def test_one_that_accepts_no_more_lives(jails):
    listener = jails.listen("v1", backlog=0)
    with contextlib.ExitStack() as stack:
        place = os.open(jails.run("v1") / "firecracker.socket", os.O_PATH)
        stack.callback(os.close, place)
        with pytest.raises(BlockingIOError):
            while True:  # until it has more callers than it listens for
                caller = stack.enter_context(socket.socket(socket.AF_UNIX))
                caller.setblocking(False)
                caller.connect("/proc/self/fd/%d" % place)
        assert "cannot be asked, so it may live: Resource temporarily unavailable" in jails.alive()["v1"]
    listener.close()


def test_all_are_asked_before_the_first_is_waited_for(jails, monkeypatch):
    for number in range(12):
        jails.serve("a%d" % number, lambda connection: time.sleep(5))
    jails.serve("z", answer(dict(INFO, id="z")))
    begin = time.monotonic()
    found = jails.alive()
    assert time.monotonic() - begin < 1.5
    assert len(found) == 13 and found["z"].endswith("answers (Running)")


def test_more_than_can_be_asked_at_once_are_asked_one_batch_after_the_other(jails, monkeypatch):
    monkeypatch.setattr(firecracker, "AT_ONCE", 2)
    for number in range(5):
        jails.serve("v%d" % number, answer(dict(INFO, id="v%d" % number)))
    nobody(jails, "v5")
    before = len(os.listdir("/proc/self/fd"))
    assert sorted(jails.alive()) == ["v0", "v1", "v2", "v3", "v4"]
    deadline = time.monotonic() + 5  # the servers, threads of this process, close their ends in their own time
    while len(os.listdir("/proc/self/fd")) > before:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_host_without_time_still_says_who_listens(jails):
    jails.serve("v1", lambda connection: time.sleep(5))
    begin = time.monotonic()
    assert set(jails.alive(seconds=0)) == {"v1"}
    assert time.monotonic() - begin < 0.4


# --- what may lie in a jail


@pytest.mark.parametrize("what", ["file", "directory", "fifo", "nothing"])
def test_what_is_no_socket_does_not_live_and_is_not_touched(jails, what, monkeypatch):
    path = jails.run("v1") / "firecracker.socket"
    if what == "file":
        path.write_text("x")
    elif what == "directory":
        path.mkdir()
    elif what == "fifo":
        os.mkfifo(path)
    monkeypatch.setattr(firecracker.socket, "socket", Untouched)
    assert jails.alive() == {}


class Untouched(socket.socket):
    def connect(self, address):
        raise AssertionError("connected to %s" % address)


def test_row_28_no_symbolic_link_in_a_jail_is_followed_and_each_is_named(jails, tmp_path):
    jails.serve("real", answer(INFO))
    socket_of_others = jails.run("real") / "firecracker.socket"
    (jails.run("v2") / "firecracker.socket").symlink_to(socket_of_others)
    jails.run("v3").rmdir()
    (jails.base / "firecracker/v3/root/run").symlink_to(jails.run("real"))
    (jails.base / "firecracker/v4").symlink_to(jails.base / "firecracker/real")
    found = jails.alive()
    assert len(jails.asked) == 1
    assert "answers" in found.pop("real") and found.pop("v1")
    assert set(found) == {"v2", "v3", "v4"}
    assert all("a symbolic link is in the way" in why and "it may live" in why for why in found.values())


def test_a_socket_that_is_swapped_for_a_link_is_not_followed(jails, tmp_path, monkeypatch):
    """What was looked at is what is connected to."""
    victim = jails.listen("victim")
    jails.serve("v1", answer(INFO))
    path = jails.run("v1") / "firecracker.socket"
    opened = firecracker._opened

    def swapping(base, names):
        place = opened(base, names)
        if "v1" in names:
            path.unlink()
            path.symlink_to(jails.run("victim") / "firecracker.socket")
        return place

    monkeypatch.setattr(firecracker, "_opened", swapping)
    assert jails.alive("firecracker/{vm_id}/root/run/firecracker.socket")["v1"].endswith("answers (Running)")
    victim.close()


def test_what_keeps_us_out_of_one_jail_does_not_keep_us_from_the_others(jails, monkeypatch):
    jails.serve("v1", answer(INFO))
    jails.run("v2")
    opened = firecracker._opened

    def refusing(base, names):
        if "v2" in names:
            raise PermissionError(13, "Permission denied")
        return opened(base, names)

    monkeypatch.setattr(firecracker, "_opened", refusing)
    found = jails.alive()
    assert "cannot be asked, so it may live: Permission denied" in found["v2"] and "answers" in found["v1"]


# --- where sockets are


def test_patterns(jails):
    jails.serve("v1", answer(INFO))
    (jails.base / "file").write_text("")
    (jails.base / "firecracker/not a vm/root/run").mkdir(parents=True)
    for pattern, found in {
        "*/{vm_id}/root/run/firecracker.socket": {"v1"},
        "fire*/{vm_id}/root/run/firecracker.socket": {"v1"},
        "firecracker/{vm_id}/root/run/firecracker.socket": {"v1"},
        "firecracker/v{vm_id}/root/run/firecracker.socket": {"1", "v1"},
        "qemu*/{vm_id}/root/run/firecracker.socket": set(),
        "firecracker/{vm_id}/root/run/other.socket": set(),
        "firecracker/v1/root/run/{vm_id}.socket": {"firecracker", "v1"},
    }.items():
        jails.stack.close()
        (jails.run("v1") / "firecracker.socket").unlink(missing_ok=True)
        jails.serve("v1", answer(INFO))
        assert set(jails.alive(pattern)) == found, pattern


def test_a_host_without_jails(jails):
    with pytest.raises(Absent, match="there is no .*/jailer/nothing"):
        jails.alive("nothing/*/{vm_id}/firecracker.socket")
    assert jails.alive() == {}


def test_too_many_sockets_are_a_fault(jails, monkeypatch):
    monkeypatch.setattr(firecracker, "MAX_SOCKETS", 1)
    jails.run("v1")
    jails.run("v2")
    with pytest.raises(ProbeError, match="2 API sockets, more than 1"):
        jails.alive()


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("srv/{vm_id}", "an absolute path"),
        ("/srv/x", "an absolute path"),
        ("", "an absolute path"),
        ("/srv/{vm_id}/{vm_id}", "once"),
        ("/srv/../{vm_id}", "an absolute path"),
        ("/srv/{vm_id}/../x", "an absolute path"),
        ("/srv//{vm_id}", "an absolute path"),
        ("/srv/{vm_id}/", "an absolute path"),
        ("//srv/{vm_id}", "an absolute path"),
        ("/srv/{vm_id}/*/x", "no wildcard"),
        ("/srv/{vm_id}*/x", "no wildcard"),
        ("/srv/{vm_id}/[a]", "no wildcard"),
    ],
)
def test_patterns_that_are_none(pattern, said):
    with pytest.raises(RuleError, match=said):
        firecracker.check({"sockets": [pattern]})


# --- containerd's tasks


class Daemon:
    """Stands for a client of containerd."""

    address = daemons.ADDRESS
    namespace = "vms"

    def __init__(self, tasks, containers=()):
        self.found = tasks
        self.listed = containers

    def tasks(self):
        return {name: {"id": name, "pid": 42, "status": status} for name, status in self.found.items()}

    def containers(self):
        return [{"id": name, "labels": labels} for name, labels in self.listed]


def tasks_of(monkeypatch, daemon, **options):
    options = dict({"namespaces": ["vms"]}, **options)
    containerd.check(options)
    monkeypatch.setattr(daemons, "clients", lambda kind, rules, host: [daemon])
    return containerd.alive(options, None)


ALL_STATES = {"v0": 0, "v1": daemons.CREATED, "v2": daemons.RUNNING, "v3": daemons.STOPPED, "v4": daemons.PAUSED,
              "v5": daemons.PAUSING, "v9": 9}  # fmt: skip


def test_a_task_that_has_not_stopped_lives(monkeypatch):
    found = tasks_of(monkeypatch, Daemon(ALL_STATES))
    assert set(found) == set(ALL_STATES) - {"v3"}
    assert found["v2"] == "the task vms/v2 of containerd runs (process 42)"
    assert "is paused" in found["v4"] and "does not say whether it runs" in found["v0"]


def test_ids_by_name_and_by_label(monkeypatch):
    daemon = Daemon(
        {"vm-a": 2, "vm-b": 2, "c": 2, "vm-gone": 2},
        [("vm-a", {"vm": "v1"}), ("vm-b", {}), ("c", {"vm": "v3"}), ("idle", {"vm": "v4"})],
    )
    assert set(tasks_of(monkeypatch, daemon, name="vm-(?P<vm_id>.*)")) == {"a", "b", "gone"}
    assert set(tasks_of(monkeypatch, daemon, label="vm")) == {"v1", "v3"}
    assert set(tasks_of(monkeypatch, daemon, label="vm", name="vm-.*")) == {"v1"}


@pytest.mark.parametrize(
    "options",
    [
        {"namespaces": []},
        {"namespaces": ["no such/name"]},
        {"namespaces": ["vms"], "name": "("},
        {"namespaces": ["vms"], "name": "vm-.*"},
        {"namespaces": ["vms"], "address": "containerd.sock"},
    ],
)
def test_options_of_containerd_that_are_none(options):
    with pytest.raises(RuleError):
        containerd.check(options)


# --- in gather


class Fake:
    def __init__(self, alive):
        self.alive = lambda options, host: alive()


def gathered(monkeypatch, tmp_path, packed=False, seconds=10.0, **supervisors):
    monkeypatch.setattr(all_supervisors, "BY_TYPE", {name: Fake(alive) for name, alive in supervisors.items()})
    entries = [{"type": name, "required": name != "optional"} for name in supervisors]
    return gather.gather([], {}, "prod", str(tmp_path), seconds, packed, entries)


def fail(err):
    raise err


def test_what_supervisors_say_comes_with_the_facts(monkeypatch, tmp_path):
    found = gathered(
        monkeypatch, tmp_path,
        one=lambda: {"v1": "one says so"}, two=lambda: {"v1": "two says so", "v2": "two says so"},
        none=lambda: fail(Absent("not here")), optional=lambda: fail(ProbeError("not allowed")),
    )  # fmt: skip
    assert found["alive"] == {"v1": "one says so", "v2": "two says so"}
    assert found["supervisors"] == {
        "one": {"status": "ok", "reason": None, "required": True},
        "two": {"status": "ok", "reason": None, "required": True},
        "none": {"status": "absent", "reason": "not here", "required": True},
        "optional": {"status": "unavailable", "reason": "not allowed", "required": False},
    }
    assert module.unpacked(found)["alive"] == found["alive"]


def test_packed_it_is_the_same(monkeypatch, tmp_path):
    found = gathered(monkeypatch, tmp_path, packed=True, one=lambda: {"v1": "because \u00e9"})
    assert isinstance(found["alive"], str)
    assert module.unpacked(found)["alive"] == {"v1": "because \u00e9"}
    assert gathered(monkeypatch, tmp_path)["supervisors"] == {}


def test_row_31_a_supervisor_that_hangs_or_dies_is_unavailable_and_takes_no_other_with_it(monkeypatch, tmp_path):
    monkeypatch.setattr(gather, "PATIENCE_SECONDS", 0.05)
    begin = time.monotonic()
    found = gathered(
        monkeypatch, tmp_path, seconds=1.0,
        hangs=lambda: time.sleep(60), dies=lambda: os._exit(3), lives=lambda: {"v1": "so"},
    )  # fmt: skip
    assert time.monotonic() - begin < 3.0
    assert {name: one["status"] for name, one in found["supervisors"].items()} == {
        "hangs": "unavailable", "dies": "unavailable", "lives": "ok",
    }  # fmt: skip
    assert found["alive"] == {"v1": "so"}


def test_more_vms_than_a_host_can_have_are_a_fault(monkeypatch, tmp_path):
    monkeypatch.setattr(gather, "MAX_RESOURCES", 1)
    found = gathered(monkeypatch, tmp_path, one=lambda: {"v1": "a", "v2": "a"})
    assert found["supervisors"]["one"]["reason"] == "2 VMs, more than 1"


def test_they_are_read_after_the_kinds(monkeypatch, tmp_path):
    marks = tmp_path / "marks"

    def mark(name, found):
        with marks.open("a") as stream:
            stream.write(name)
        return found

    monkeypatch.setattr(all_supervisors, "BY_TYPE", {"one": Fake(lambda: mark("s", {}))})
    kinds = [
        types.SimpleNamespace(KIND=name, collect=lambda rules, host: mark("k", {"resources": [], "foreign": 0}))
        for name in ("a", "b")
    ]
    entries = [{"type": "one", "required": True}]
    gather.gather(kinds, {"a": [{}], "b": [{}]}, "prod", str(tmp_path), 10.0, supervisors=entries)
    assert marks.read_text() == "kks"


# --- what the controller makes of it


WHY = "its API socket /x answers (Running)"
OK = {"status": "ok", "reason": None, "required": True}
GONE = dict(OK, status="unavailable", reason="timed out")


@pytest.mark.parametrize(
    "changes",
    [
        {"alive": None},
        {"alive": ["v1"]},
        {"alive": "not packed"},
        {"alive": {"../v1": "x"}},
        {"alive": {5: "x"}},
        {"alive": {"v1": None}},
        {"alive": {"v1": ""}},
        {"alive": {"v1": "a\nb"}},
        {"alive": {"v1": "a\x1b[2J"}},
        {"alive": {"v1": "a" * 5000}},
        {"alive": {"v1": ["x"]}},
        {"supervisors": None},
        {"supervisors": []},
        {"supervisors": {"x": None}},
        {"supervisors": {"x": dict(OK, status="fine")}},
        {"supervisors": {"x": dict(OK, status=["ok"])}},
        {"supervisors": {"x": dict(OK, reason=5)}},
        {"supervisors": {"x": dict(OK, required=1)}},
        {"supervisors": {"x": {"status": "ok", "reason": None}}},
        {"supervisors": {"a\nb": OK}},
    ],
)
def test_what_a_host_says_of_life_is_checked(changes):
    with pytest.raises(module.FactsError):
        module.unpacked(facts(**changes))


def test_a_host_cannot_flood_us_with_life(monkeypatch):
    monkeypatch.setattr(module, "MAX_ALIVE", 2)
    assert module.unpacked(facts(alive={"v1": "x", "v2": "x"}))
    with pytest.raises(module.FactsError, match="3 VMs, more than 2"):
        module.unpacked(facts(alive={"v1": "x", "v2": "x", "v3": "x"}))


def test_ids_that_live_are_asked_about():
    assert module.vm_ids(facts(thing("jail", "v1"), alive={"v2": "x"})) == {"v1", "v2"}


def test_what_lives_by_a_supervisor_is_disputed_and_gets_no_strike():
    things = [thing("jail", "v1"), thing("dm_thin", "v1"), thing("jail", "v2")]
    host = facts(*things, alive={"v1": WHY}, supervisors={"firecracker": OK})
    result = plan(host)
    assert result["families"]["v1"]["verdict"] == "disputed" and reasons(result, "v1") == {"running"}
    (reason,) = result["families"]["v1"]["reasons"]
    assert reason["text"] == "%s although the VM is absent; reap_running is tombstoned" % WHY
    assert {strike["vm_id"] for strike in result["ledger"]["strikes"].values()} == {"v2"}
    assert result["families"]["v2"]["verdict"] == "suspected"


def test_strikes_from_before_are_gone_once_it_is_seen_to_live():
    things = [thing("jail", "v1")]
    first = plan(facts(*things))
    result = plan(facts(*things, now=2000.0, ledger=remembered(first), alive={"v1": WHY}))
    assert result["reap"] == [] and result["ledger"]["strikes"] == {}


@pytest.mark.parametrize(
    ("running", "tombstones", "goes"),
    [
        ("never", {}, False),
        ("never", {"v1": 1000}, False),
        ("tombstoned", {}, False),
        ("tombstoned", {"v1": 1000}, True),
        ("confirmed", {}, True),
    ],
)
def test_the_policy_for_what_runs_is_that_for_what_lives(running, tombstones, goes):
    one = thing("jail", "v1")
    listed = share(tombstones=tombstones)
    first = plan(facts(one, alive={"v1": WHY}), listed, running=running)
    again = facts(one, now=2000.0, ledger=remembered(first), alive={"v1": WHY})
    assert bool(plan(again, listed, running=running)["reap"]) == goes
    unproven = share(tombstones=tombstones, proven=False)
    assert plan(again, unproven, running=running)["reap"] == []


def test_a_removal_that_was_cut_short_waits_while_the_vm_lives():
    dead = sweep_twice(thing("dm_thin", "v1"))
    (token,) = dead["reap"]
    ledger = dict(remembered(dead), intents=[token])
    later = {"now": 3000.0, "ledger": ledger}
    assert [one["resume"] for one in plan(facts(**later))["reap"]] == [True]
    waits = plan(facts(**later, alive={"v1": WHY}))
    assert waits["reap"] == [] and waits["ledger"]["intents"] == [token]


def test_row_27_a_required_supervisor_that_cannot_be_read_refuses_the_host():
    things = [thing("jail", "v1")]
    first = plan(facts(*things))
    said = {"now": 2000.0, "ledger": remembered(first)}
    result = plan(facts(*things, **said, supervisors={"containerd": OK, "firecracker": GONE}))
    assert result["refused"]["code"] == "supervisor_unavailable"
    message = result["refused"]["message"]
    assert "firecracker (timed out)" in message and "containerd" not in message
    assert result["reap"] == [] and not result["ledger_changed"] and result["notices"] == []
    for status in ("ok", "absent"):
        assert plan(facts(*things, **said, supervisors={"firecracker": dict(GONE, status=status)}))["reap"]
    assert plan(facts(supervisors={"firecracker": GONE}))["refused"] is None  # nothing to decide there


def test_an_optional_one_is_a_notice():
    things = [thing("jail", "v1")]
    first = plan(facts(*things))
    optional = {"firecracker": dict(GONE, required=False)}
    result = plan(facts(*things, now=2000.0, ledger=remembered(first), supervisors=optional))
    assert result["refused"] is None and len(result["reap"]) == 1
    assert result["notices"] == ["the supervisor firecracker (timed out) did not say who lives"]
    assert plan(facts(supervisors=optional))["notices"] == []  # nothing to decide there


def explained(host, what="v1"):
    listed = document([("v5", "h1")], generated_at=time.time(), hosts=["h1"])
    return explaining.explain(host, listed, policy(), what)


def test_the_explanation_says_so():
    one = explained(facts(thing("jail", "v1"), alive={"v1": WHY}))
    assert one["verdict"] == "disputed"
    assert "The VM is alive on this host: %s." % WHY in one["sentences"]
    elsewhere = explained(facts(alive={"v1": WHY}))
    assert "The VM is alive on this host: %s." % WHY in elsewhere["sentences"]
    lost = explained(facts(thing("jail", "v1"), supervisors={"firecracker": dict(GONE, required=False)}))
    assert "Could not say whether the VM lives: firecracker (timed out)." in lost["sentences"]


def test_the_report_names_what_was_not_read():
    supervisors = {"containerd": dict(GONE, status="absent"), "firecracker": GONE}
    unread = report._unread(facts(absent=["dm_thin"], supervisors=supervisors))
    assert unread == {
        "absent": {"dm_thin": "not here", "supervisor containerd": "timed out"},
        "unavailable": {"supervisor firecracker": "timed out"},
    }


def test_records_of_what_lives_are_not_settled():
    host = facts(thing("jail", "v1"), alive={"v2": WHY})
    done = {"gathered": host, "plan": plan(host), "brake": {"refused": {}}, "recheck": {}}
    assert swept.seen({"one": done})[0] == {"h1": ["v1", "v2"]}


# --- as live sources


FILE = {"type": "file", "path": "live.json"}


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ([{"type": "firecracker"}], "nothing but firecracker: on a host one sees who lives"),
        ([{"type": "firecracker"}, {"type": "containerd", "namespaces": ["a"]}], "nothing but firecracker, containerd"),
        ([FILE, {"type": "firecracker"}, {"type": "firecracker"}], "firecracker twice"),
        ([FILE, {"type": "containerd"}], r"reap_live_sources\[1\] \(containerd\): .*namespaces"),
        ([FILE, {"type": "containerd", "namespaces": []}], r"\[1\] \(containerd\): namespaces is empty"),
        ([FILE, {"type": "containerd", "namespaces": ["a"], "name": "x"}], r"\[1\] \(containerd\): .*no group"),
        ([FILE, {"type": "firecracker", "sockets": ["/x"]}], r"\[1\] \(firecracker\): sockets: an absolute path with"),
        ([FILE, {"type": "firecracker", "socket": "/x"}], r"\[1\] \(firecracker\): .*socket"),
    ],
)
def test_bad_configuration_is_named(wanted, said):
    with pytest.raises(ManifestError, match=said):
        sources.configured(wanted)


def test_they_are_not_fetched_and_not_asked_again(tmp_path):
    (tmp_path / "live.json").write_text(json.dumps(document([("v1", "h1")])))
    context = {"realm": "prod", "now": 1_800_000_010.0, "directory": str(tmp_path), "inventory": None}
    context["terminal_states"] = ["deleted"]
    wanted = [{"type": "firecracker"}, FILE, {"type": "containerd", "namespaces": ["a"]}]
    handle = sources.fetch(wanted, context, str(tmp_path / "index"), max_age=600)
    assert handle["answered"] == ["file live.json"]
    assert sources.still_listed(wanted, context, ["v1", "v2"], handle, max_age=600) == ({"v1": ["h1"]}, None)


def on_host():
    modules = {name: sources.importlib.import_module("%s.%s" % (sources.__name__, name)) for name in sources.types()}
    return sorted(name for name, source in modules.items() if getattr(source, "ON_HOST", False))


def test_the_role_hands_on_those_that_are_read_on_the_hosts():
    assert on_host() == sorted(all_supervisors.BY_TYPE)
    path = os.path.join(os.path.dirname(sources.__file__), "../../../roles/reap/vars/main.yml")
    with open(path, encoding="utf-8") as stream:
        assert str(on_host()) in yaml.safe_load(stream)["__reap_supervisors"]


def test_the_module_takes_what_the_sources_take():
    spec = {"supervisors": vm_resource_facts.get_argument_spec()["supervisors"]}
    for entry in ({"type": "firecracker"}, {"type": "containerd", "namespaces": ["a"], "label": "vm"}):
        done = ArgumentSpecValidator(spec).validate({"supervisors": [entry]})
        assert not done.error_messages
        (taken,) = done.validated_parameters["supervisors"]
        all_supervisors.BY_TYPE[entry["type"]].check(taken)
        ((_module, options),) = [one for one in sources.configured([FILE, entry]) if one[1]["type"] == entry["type"]]
        assert {key: taken[key] for key in options} == options and taken["required"] is True
    done = ArgumentSpecValidator(spec).validate({"supervisors": [{"type": "containerd"}]})
    assert "namespaces" in done.error_messages[0]


def test_the_planner_with_the_whole_door():
    host = facts(thing("jail", "v1"), alive={"v1": WHY}, supervisors={"firecracker": OK})
    result = planning.plan(host, document([("v5", "h1")], generated_at=time.time()), policy())
    assert result["families"]["v1"]["verdict"] == "disputed"
    assert builders.verdicts(result) == {"v1.jail": "disputed"}
