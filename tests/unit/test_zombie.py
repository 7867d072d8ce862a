# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The zombie kind and processes.py on real zombies, whose parents are not of the reaper's own process tree."""

import contextlib
import json
import os
import signal
import threading
import time

import pytest
from ansible_collections.microvm.reaper.plugins.module_utils import mounts, processes
from ansible_collections.microvm.reaper.plugins.module_utils import resource as r
from ansible_collections.microvm.reaper.plugins.module_utils.kinds import cgroup, zombie
from ansible_collections.microvm.reaper.plugins.module_utils.probe import Absent, Host, ProbeError, boottime

ROOT = "microvm-reaper-test-zombie-%d" % os.getpid()


def unified():
    try:
        found = [mount for mount, version in cgroup.cgroup_mounts(mounts.read()) if version == 2]
    except Absent:
        return None
    return found[0] if found and os.geteuid() == 0 and os.access(found[0], os.W_OK) else None


needs_cgroup = pytest.mark.skipif(unified() is None, reason="needs root and a v2 cgroup hierarchy")


@pytest.fixture
def host():
    return Host(boottime() + 60)


@pytest.fixture(autouse=True)
def nobody_is_deaf():
    zombie._deaf.clear()
    yield
    zombie._deaf.clear()


@pytest.fixture
def family():
    """Start a process outside of our tree that has zombies; return its pid and theirs."""
    parents = []

    def start(count=1, when_reminded=None, name="vmm", inside=None):
        reader, writer = os.pipe()
        middle = os.fork()
        if middle == 0:
            if os.fork() == 0:
                _be_a_parent(writer, count, when_reminded, name, inside)
            os._exit(0)
        os.waitpid(middle, 0)
        os.close(writer)
        with os.fdopen(reader) as stream:
            pids = json.load(stream)
        parents.append(pids[0])
        return pids[0], pids[1:]

    yield start
    for pid in parents:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _be_a_parent(writer, count, when_reminded, name, inside):
    try:
        os.setsid()
        children = []
        for _number in range(count):
            child = os.fork()
            if child == 0:
                _put(inside)
                _be_called(name)
                os._exit(0)
            children.append(child)
        for child in children:
            os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        if when_reminded == "reap":
            signal.signal(signal.SIGCHLD, lambda *_arguments: [os.waitpid(child, 0) for child in children])
        _be_called("bad parent)")
        os.write(writer, json.dumps([os.getpid()] + children).encode())
        os.close(writer)
        while True:
            signal.pause()
    finally:
        os._exit(1)


def _put(path):
    if path:
        with open(os.path.join(path, "cgroup.procs"), "w") as stream:
            stream.write(str(os.getpid()))


def _be_called(name):
    with open("/proc/self/comm", "wb") as stream:
        stream.write(os.fsencode(name))


@pytest.fixture
def boxes(tmp_path):
    """A directory of pid files, and the rule for it."""

    def register(box, pid, content=None):
        (tmp_path / box).mkdir(exist_ok=True)
        (tmp_path / box / "shim.pid").write_text("%d\n" % pid if content is None else content)
        return tmp_path / box / "shim.pid"

    register.rules = [{"command": "vmm", "pid_file": str(tmp_path / "*" / "shim.pid")}]
    return register


def collected(rules, host):
    return {one["name"]: one for one in zombie.collect(rules, host)["resources"]}


def token(pid, rules, host):
    one = collected(rules, host)[str(pid)]
    return dict({key: one[key] for key in ("kind", "name", "vm_id", "identity", "details")}, stop=False)


def result(outcome):
    return None if outcome is None else outcome["outcome"]


def started(pid):
    return processes.stat(pid).started


def test_a_registered_zombie_is_found_with_all_that_tells_whose_it_is(family, boxes, host):
    parent, (pid, other) = family(2)
    boxes("box1", pid)
    boxes("box2", parent)
    found = zombie.collect(boxes.rules, host)
    assert [one["name"] for one in found["resources"]] == [str(pid)]
    assert found["foreign"] >= 1
    one = found["resources"][0]
    assert one["identity"] == "%s:%d:%d" % (host.boot_id, pid, started(pid))
    assert (one["vm_id"], one["parent"], one["in_use"], one["holders"]) == ("box1", str(parent), False, [])
    assert 0 <= one["age_seconds"] < 60
    assert one["details"] == {
        "command": "vmm",
        "parent": "%d bad parent)" % parent,
        "parent_unit": processes.unit(processes.read(parent, "cgroup")),
        "parent_identity": "%d:%d" % (parent, started(parent)),
        "parent_container": None,
        "parent_vm": None,
    }
    assert zombie.inspect(token(pid, boxes.rules, host), boxes.rules, host) is None
    assert str(other) not in collected(boxes.rules, host)


def test_a_parent_that_missed_the_signal_is_reminded_and_reaps(family, boxes, host):
    _parent, (pid,) = family(when_reminded="reap")
    boxes("box1", pid)
    one = token(pid, boxes.rules, host)
    outcome = zombie.remove(one, boxes.rules, host)
    assert (outcome["outcome"], outcome["message"], outcome["bytes"]) == (r.REAPED, "", 0)
    assert not os.path.exists("/proc/%d" % pid)
    assert result(zombie.remove(one, boxes.rules, host)) == r.ALREADY_GONE


def test_row_18_a_parent_that_does_not_react_is_blamed_and_nothing_claimed(family, boxes, host):
    parent, (pid,) = family()
    boxes("box1", pid)
    begin = time.monotonic()
    outcome = zombie.remove(token(pid, boxes.rules, host), boxes.rules, host)
    assert zombie.NUDGE_SECONDS <= time.monotonic() - begin < zombie.NUDGE_SECONDS + 1
    unit = processes.unit(processes.read(parent, "cgroup"))
    name = "%d bad parent)%s" % (parent, " (unit %s)" % unit if unit else "")
    assert outcome["outcome"] == r.DEFERRED
    assert outcome["message"] == "its parent %s does not reap it" % name
    parts = {"pid": parent, "command": "bad parent)", "unit": unit, "container": None, "mount_namespace": None}
    nothing = {"by": [], "fd": None, "image": None, "note": None}
    assert outcome["holders"] == [dict(r.holder("process", name), **parts, **nothing)]
    assert processes.stat(pid).state == "Z"
    assert processes.stat(parent).state == "S"


def test_a_parent_is_waited_for_once_however_many_zombies_it_has(family, boxes, host):
    _parent, pids = family(300)
    for pid in pids:
        boxes("box%d" % pid, pid)
    tokens = [token for token in collected(boxes.rules, host).values() if int(token["name"]) in pids]
    assert len(tokens) == 300
    begin = time.monotonic()
    outcomes = [zombie.remove(one, boxes.rules, host) for one in tokens[:40]]
    assert time.monotonic() - begin < zombie.NUDGE_SECONDS + 2
    assert {one["outcome"] for one in outcomes} == {r.DEFERRED}


def test_a_parent_that_is_stopped_is_said_to_be(family, boxes, host, monkeypatch):
    monkeypatch.setattr(zombie, "NUDGE_SECONDS", 0.1)
    parent, (pid,) = family(when_reminded="reap")
    boxes("box1", pid)
    one = token(pid, boxes.rules, host)
    os.kill(parent, signal.SIGSTOP)
    while processes.stat(parent).state != "T":
        time.sleep(0.01)
    outcome = zombie.remove(one, boxes.rules, host)
    assert (outcome["outcome"], "; it is stopped" in outcome["message"]) == (r.DEFERRED, True)


def test_row_12_13_another_process_with_the_same_pid_and_name_is_not_the_zombie(family, boxes, host, monkeypatch):
    parent, (pid,) = family(when_reminded="reap")
    boxes("box1", pid)
    one = token(pid, boxes.rules, host)
    reused = dict(one, identity="%s:%d:%d" % (host.boot_id, pid, started(pid) - 1))
    assert result(zombie.remove(reused, boxes.rules, host)) == r.IDENTITY_CHANGED
    assert result(zombie.remove(dict(one, identity=one["identity"].replace(host.boot_id, "other")), boxes.rules, host))
    assert processes.stat(pid).state == "Z"
    # The pid of the parent went to another process after it was read: that one gets no signal.
    sent = []
    monkeypatch.setattr(processes, "send", lambda *arguments: sent.append(arguments))
    zombie._remind(processes.stat(parent)._replace(started=1))
    assert sent == []
    zombie._remind(processes.stat(parent))
    assert [arguments[1:] for arguments in sent] == [(parent, signal.SIGCHLD)]


@pytest.mark.parametrize("name", ["", "x", "-1", "1.0", "12 ", "٣", "../1", "1" * 20])
def test_a_token_that_is_no_pid_touches_nothing(name, host, boxes):
    one = {"kind": "zombie", "name": name, "vm_id": "box1", "identity": "x", "stop": False}
    assert result(zombie.remove(one, boxes.rules, host)) == r.ALREADY_GONE


def test_a_zombie_that_no_rule_attributes_to_the_vm_any_more_is_refused(family, boxes, host):
    _parent, (pid,) = family(when_reminded="reap")
    file = boxes("box1", pid)
    one = token(pid, boxes.rules, host)
    assert result(zombie.remove(dict(one, vm_id="box2"), boxes.rules, host)) == r.FAILED
    file.write_text("1")
    assert result(zombie.remove(one, boxes.rules, host)) == r.FAILED
    assert processes.stat(pid).state == "Z"


def test_our_own_children_are_left_alone(boxes, host):
    pid = os.fork()
    if pid == 0:
        _be_called("vmm")
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    boxes("box1", pid)
    assert str(pid) not in collected(boxes.rules, host)
    one = {
        "kind": "zombie",
        "name": str(pid),
        "vm_id": "box1",
        "identity": "%s:%d:%d" % (host.boot_id, pid, started(pid)),
        "stop": False,
    }
    assert result(zombie.remove(one, boxes.rules, host)) == r.FAILED
    assert os.waitpid(pid, 0) == (pid, 0)


def test_a_process_whose_first_thread_has_ended_is_not_a_zombie():
    """It is shown in state Z, but its other threads go on."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        threading.Thread(target=lambda: (os.write(writer, b"1"), time.sleep(60))).start()
        import ctypes

        ctypes.CDLL(None).syscall(ctypes.c_long(60 if os.uname().machine == "x86_64" else 93), 0)
    try:
        os.read(reader, 1)
        deadline = time.monotonic() + 5
        while processes.stat(pid).state != "Z" and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (processes.stat(pid).state, processes.stat(pid).threads) == ("Z", 2)
        assert not processes.is_zombie(processes.stat(pid))
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(reader)
        os.close(writer)


def test_hostile_pid_files(family, boxes, host, tmp_path):
    _parent, pids = family(12)
    texts = [
        "%d %d" % (pids[0], pids[0]),
        "0x%x" % pids[1],
        "-%d" % pids[2],
        " " * 100 + str(pids[3]),
        "%d%s" % (pids[9], " " * 100),
        "٣",
        "",
    ]
    for number, text in enumerate(texts):
        boxes("bad%d" % number, 0, text)
    (tmp_path / "elsewhere").write_text(str(pids[4]))
    for name in ("link", "fifo", "dir", "linked dir"):
        (tmp_path / name).mkdir()
    (tmp_path / "link" / "shim.pid").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(tmp_path / "fifo" / "shim.pid")
    (tmp_path / "dir" / "shim.pid").mkdir()
    (tmp_path / "box link").symlink_to(tmp_path / "bad0")
    for name in ("a b", "$(x)", "{{ x }}", "-rf", "x\ny", os.fsdecode(b"v\xff")):
        boxes(name, pids[5])
    boxes("twice1", pids[6])
    boxes("twice2", pids[6])
    old = boxes("old", pids[7])
    os.utime(old, (time.time() - 3600, time.time() - 3600))
    boxes("good", 0, "  %d\n" % pids[8])
    assert {name: one["vm_id"] for name, one in collected(boxes.rules, host).items()} == {str(pids[8]): "good"}


def test_the_command_limits_what_is_found(family, boxes, host):
    _parent, (pid,) = family(name="a) Z 1 (b")
    boxes("box1", pid)
    assert collected(boxes.rules, host) == {}
    one = collected([dict(boxes.rules[0], command=".*b")], host)[str(pid)]
    assert one["details"]["command"] == "a) Z 1 (b"


def test_a_hostile_command_is_made_printable(family, boxes, host):
    _parent, (pid,) = family(name=os.fsdecode(b"\x1b[2J\n\xff{{x}}"))
    boxes("box1", pid)
    one = collected([dict(boxes.rules[0], command="(?s:.*)")], host)[str(pid)]
    assert one["details"]["command"] == "?[2J?\ufffd{{x}}"


@needs_cgroup
@pytest.mark.parametrize("is_removed", [False, True])
def test_a_zombie_is_attributed_by_its_cgroup_even_by_a_removed_one(family, host, is_removed, tmp_path):
    root = os.path.join(unified(), ROOT)
    os.makedirs(root + "/hyper/vabc/inner")
    rules = [{"cgroup_name": "(?P<vm_id>v[a-z]+)"}]
    try:
        _parent, (pid, other) = family(2, inside=root + "/hyper/vabc/inner")
        if is_removed:
            os.rmdir(root + "/hyper/vabc/inner")
            os.rmdir(root + "/hyper/vabc")
        found = collected(rules, host)
        assert {found[str(one)]["vm_id"] for one in (pid, other)} == {"vabc"}
        # With a pid file in the rule too, both have to name the same VM.
        for name, named in (("vabc", pid), ("vother", other)):
            (tmp_path / (name + ".pid")).write_text(str(named))
        both = [dict(rules[0], pid_file=str(tmp_path / "*.pid"))]
        assert list(collected(both, host)) == [str(pid)]
    finally:
        for directory, _below, _files in os.walk(root, topdown=False):
            os.rmdir(directory)


@pytest.fixture
def cgroups():
    """A directory for cgroups, removed with all below it."""
    root = os.path.join(unified(), ROOT + "-family")
    os.makedirs(root)
    yield root
    deadline = time.monotonic() + 5
    while os.path.exists(root) and time.monotonic() < deadline:
        try:
            for directory, _below, _files in os.walk(root, topdown=False):
                os.rmdir(directory)
        except OSError:
            time.sleep(0.05)


@needs_cgroup
def test_the_vm_is_told_in_whose_cgroup_the_parent_runs_itself(cgroups, family, host):
    os.makedirs(cgroups + "/vabc/inner")
    rules = [{"cgroup_name": "(?P<vm_id>v[a-z]+)"}]
    inside, (first,) = family(inside=cgroups + "/vabc/inner")
    _outside, (second,) = family(inside=cgroups + "/vabc/inner")
    _put_process(cgroups + "/vabc", inside)
    found = collected(rules, host)
    assert [found[str(pid)]["details"]["parent_vm"] for pid in (first, second)] == ["vabc", None]


def _put_process(path, pid):
    with open(os.path.join(path, "cgroup.procs"), "w") as stream:
        stream.write(str(pid))


@pytest.mark.parametrize("ends_first", [True, False])
def test_a_zombie_goes_with_its_parent_and_nobody_is_reminded(family, boxes, host, monkeypatch, ends_first):
    sent = []
    monkeypatch.setattr(processes, "send", lambda *arguments: sent.append(arguments))
    parent, (pid,) = family(when_reminded="reap")
    boxes("box1", pid)
    one = token(pid, boxes.rules, host)
    one["details"]["how"] = zombie.WITH_FAMILY
    if not ends_first:
        outcome = zombie.remove(one, boxes.rules, host)
        assert (outcome["outcome"], outcome["holders"][0]["note"]) == (r.DEFERRED, "it was not stopped with the VM")
    os.kill(parent, signal.SIGKILL)
    deadline = time.monotonic() + 5
    while processes.stat(parent) is not None and processes.stat(parent).state != "Z" and time.monotonic() < deadline:
        time.sleep(0.01)
    outcome = zombie.remove(one, boxes.rules, host)
    assert outcome["outcome"] == r.REAPED, outcome
    assert sent == []
    assert processes.stat(pid) is None


def test_a_zombie_that_its_parent_reaped_did_not_go_with_it(family, boxes, host):
    parent, (pid,) = family(when_reminded="reap")
    boxes("box1", pid)
    one = token(pid, boxes.rules, host)
    one["details"]["how"] = zombie.WITH_FAMILY
    os.kill(parent, signal.SIGCHLD)
    while processes.stat(pid) is not None:
        time.sleep(0.01)
    assert result(zombie.remove(one, boxes.rules, host)) == r.ALREADY_GONE


def test_who_has_inherited_a_zombie_and_does_not_reap_it_is_named(boxes, host, monkeypatch):
    """A process may be the one that inherits all that it has started, as the shims of containers are."""
    monkeypatch.setattr(zombie, "NUDGE_SECONDS", 0.2)
    reader, writer = os.pipe()
    middle = os.fork()
    if middle == 0:
        if os.fork() == 0:
            _inherit(writer)
        os._exit(0)
    os.waitpid(middle, 0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        keeper, parent, pid = json.load(stream)
    try:
        boxes("box1", pid)
        one = token(pid, boxes.rules, host)
        one["details"]["how"] = zombie.WITH_FAMILY
        assert one["details"]["parent_identity"].startswith("%d:" % parent)
        os.kill(parent, signal.SIGKILL)
        deadline = time.monotonic() + 5
        while processes.stat(pid).parent != keeper and time.monotonic() < deadline:
            time.sleep(0.01)
        outcome = zombie.remove(one, boxes.rules, host)
        (holder,) = outcome["holders"]
        assert (outcome["outcome"], holder["pid"], holder["note"]) == (r.DEFERRED, keeper, "it has inherited them")
    finally:
        os.kill(keeper, signal.SIGKILL)


def _inherit(writer):
    import ctypes

    try:
        os.setsid()
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
        parent = os.fork()
        if parent == 0:
            child = os.fork()
            if child == 0:
                _be_called("vmm")
                os._exit(0)
            os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
            os.write(writer, json.dumps([os.getppid(), os.getpid(), child]).encode())
            os.close(writer)
        os.close(writer)
        while True:
            signal.pause()
    finally:
        time.sleep(60)
        os._exit(1)


def test_the_innermost_cgroup_names_the_vm():
    names = r.Names("zombie", [{"name": "(?P<vm_id>v[a-z]+)"}])
    text = "5:devices:/\n1:name=systemd:/x.slice\n0::/vouter/a:b/vinner/run (deleted)\n"
    assert zombie.vm_id_of_cgroup(text, names) == "vinner"
    assert zombie.vm_id_of_cgroup("0::/vabc (deleted)\n", names) == "vabc"
    assert zombie.vm_id_of_cgroup("0::/\n", names) is None
    assert zombie.vm_id_of_cgroup("", names) is None


@pytest.mark.parametrize(
    "rule",
    [
        {},
        {"command": "x"},
        {"pid_file": "relative/*"},
        {"pid_file": "/no/star"},
        {"pid_file": "/two/*/stars*"},
        {"pid_file": "/a/../*"},
        {"command": "(", "pid_file": "/x/*"},
        {"cgroup_name": "no group"},
    ],
)
def test_a_rule_that_cannot_be_used_is_refused(rule, host):
    with pytest.raises(r.RuleError):
        zombie.collect([rule], host)


def test_pid_files_right_below_the_root_and_with_a_name_around_the_star():
    assert zombie._split_glob("/*")[0] == "/"
    directory, pattern, below = zombie._split_glob("/run/vm-*.d/a/pid")
    assert (directory, below) == ("/run", ["a", "pid"])
    assert pattern.fullmatch("vm-x.y.d").group(1) == "x.y"
    assert not pattern.fullmatch("vm-xzd")


# processes.py


def test_a_command_may_look_like_the_rest_of_the_line():
    text = "42 (a) Z 7 (b)) S 1 42 42 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 3 0 987654 0 0\n"
    assert processes.parse_stat(text) == processes.Stat(42, "a) Z 7 (b)", "S", 1, 3, 987654)


def test_a_process_is_aged_by_the_boot_clock():
    pid = os.fork()
    if pid == 0:
        time.sleep(60)
        os._exit(0)
    try:
        time.sleep(0.3)
        assert 0.25 <= processes.age_seconds(processes.stat(pid)) < 5
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert processes.stat(pid) is None


@pytest.mark.parametrize("python", ["3.9 and later", "3.8"])
def test_row_12_a_signal_reaches_the_pinned_process_or_nobody(python, monkeypatch):
    if python == "3.8":
        monkeypatch.delattr(os, "pidfd_open", raising=False)
        monkeypatch.delattr(signal, "pidfd_send_signal", raising=False)
    pid = os.fork()
    if pid == 0:
        time.sleep(60)
        os._exit(0)
    pinned = processes.pin(pid)
    assert pinned is not None
    assert not os.get_inheritable(pinned)
    processes.send(pinned, pid, signal.SIGTERM)
    assert os.waitpid(pid, 0) == (pid, signal.SIGTERM)
    with pytest.raises(ProcessLookupError):
        processes.send(pinned, pid, signal.SIGTERM)
    os.close(pinned)
    with pytest.raises(ProcessLookupError):
        processes.pin(pid)


def test_the_unit_of_a_process():
    assert processes.unit("1:name=systemd:/\n0::/system.slice/hyper.service/worker\n") == "hyper.service"
    assert processes.unit("0::/user.slice/x.scope\n") == "x.scope"
    assert processes.unit("0::/a/b\n") is None
    assert processes.unit("") is None


def test_the_lineage_ends_at_init():
    assert processes.lineage(os.getpid())[:2] == [os.getpid(), os.getppid()]
    assert processes.lineage(os.getpid())[-1] == 1 or os.getppid() == 0


def test_a_witness_tells_what_is_left_of_it_and_who_does_not_wait(family, boxes, host):
    parent, (pid,) = family()
    boxes("box1", pid)
    one = token(pid, boxes.rules, host)
    (told,) = zombie.witness(one, boxes.rules, host)
    assert told["source"] == "/proc/%d/status" % pid
    assert "State:\tZ (zombie)" in told["text"] and "== parent %d bad parent) state S: " % parent in told["text"]
    with pytest.raises(ProbeError, match="gone"):
        zombie.witness(dict(one, identity=one["identity"] + "0"), boxes.rules, host)
