# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""probe.py with real children: ones that hang, are stopped, die, or talk too much."""

import fcntl
import os
import signal
import time

import pytest
from ansible_collections.microvm.reaper.plugins.module_utils import probe
from ansible_collections.microvm.reaper.plugins.module_utils.probe import (
    Absent,
    DeadlineExceeded,
    Host,
    ProbeError,
    Worker,
    boottime,
)


@pytest.fixture
def worker():
    started = []

    def start(function):
        started.append(Worker(function))
        return started[-1]

    yield start
    for one in started:
        one.abandon()


def is_alive(pid):
    """Tell whether a process runs; one that ended and waits for its parent does not."""
    try:
        with open("/proc/%d/stat" % pid) as stream:
            return stream.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition, seconds=3.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in %s s" % seconds
        time.sleep(0.01)


def shell(script, timeout=10.0):
    return probe.run(["/bin/sh", "-c", script], probe.ENVIRONMENT, timeout)


def fail(err):
    raise err


def descriptors():
    return set(os.listdir("/proc/self/fd"))


# The worker


def test_one_child_serves_many_items(worker):
    child = worker(lambda item: [item, os.getpid()])
    assert [child.call(item, 5) for item in (1, "zwei", None)] == [[item, child.pid] for item in (1, "zwei", None)]
    assert child.pid != os.getpid()


def test_row_31_a_child_that_hangs_is_abandoned_at_the_deadline(worker):
    child = worker(lambda item: time.sleep(60))
    begin = time.monotonic()
    with pytest.raises(DeadlineExceeded, match="abandoned"):
        child.call(None, 0.3)
    assert 0.3 <= time.monotonic() - begin < 1.0
    assert child.is_gone
    wait_until(lambda: not is_alive(child.pid))


@pytest.mark.parametrize("size", [10, 3 << 20])
def test_a_child_that_is_stopped_is_abandoned_however_large_the_request(worker, size):
    child = worker(len)
    assert child.call("once", 5) == 4
    os.kill(child.pid, signal.SIGSTOP)
    begin = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        child.call("x" * size, 0.3)
    assert time.monotonic() - begin < 1.0
    wait_until(lambda: not is_alive(child.pid))


def test_an_answer_of_60_megabytes_arrives_whole_and_in_linear_time(worker):
    child = worker(lambda size: "x" * size)
    begin = time.monotonic()
    assert len(child.call(60 << 20, 30)) == 60 << 20
    assert time.monotonic() - begin < 10.0


@pytest.mark.parametrize("end", [lambda item: os._exit(3), lambda item: os.kill(os.getpid(), signal.SIGKILL)])
def test_a_child_that_dies_is_an_error_and_a_second_call_too(worker, end):
    child = worker(end)
    with pytest.raises(ProbeError, match="ended"):
        child.call(None, 5)
    with pytest.raises(ProbeError, match="abandoned before"):
        child.call(None, 5)


def test_a_child_that_died_between_two_calls_is_an_error(worker):
    child = worker(lambda item: item)
    child.call(1, 5)
    os.kill(child.pid, signal.SIGKILL)
    wait_until(lambda: not is_alive(child.pid))
    with pytest.raises(ProbeError, match="ended"):
        child.call(2, 5)


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (Absent("no such tool"), Absent, "no such tool"),
        (DeadlineExceeded("too slow"), DeadlineExceeded, "too slow"),
        (ProbeError("unreadable"), ProbeError, "unreadable"),
        (PermissionError(13, "Permission denied", "/x"), ProbeError, "[Errno 13] Permission denied: '/x'"),
        (KeyError("name"), ProbeError, "KeyError: 'name'"),
        (ValueError(), ProbeError, "ValueError: ValueError()"),
    ],
)
def test_what_the_function_raised_is_told_by_type_and_the_child_goes_on(worker, error, kind, text):
    child = worker(lambda item: fail(error) if item else "fine")
    with pytest.raises(ProbeError) as caught:
        child.call(True, 5)
    assert (type(caught.value), str(caught.value)) == (kind, text)
    assert child.call(False, 5) == "fine"


def test_a_result_that_is_not_json_is_an_error_in_words(worker):
    child = worker(lambda item: {1, 2} if item else "fine")
    with pytest.raises(ProbeError, match="TypeError.*set"):
        child.call(True, 5)
    assert child.call(False, 5) == "fine"


def test_text_that_was_not_utf8_survives_the_way_back(worker):
    assert worker(lambda item: os.fsdecode(b"a\xffb")).call(None, 5) == "a\udcffb"


def test_several_children_work_at_the_same_time(worker):
    children = [worker(lambda item: time.sleep(0.4) or item) for _number in range(4)]
    begin = time.monotonic()
    for number, child in enumerate(children):
        child.send(number)
    assert [child.result(begin + 5) for child in children] == [0, 1, 2, 3]
    assert time.monotonic() - begin < 1.0


def test_a_child_that_hangs_does_not_cost_another_its_answer(worker):
    hanging, finished = worker(lambda item: time.sleep(60)), worker(lambda item: "x" * (1 << 20))
    for child in (hanging, finished):
        child.send(None)
    deadline = time.monotonic() + 0.3
    with pytest.raises(DeadlineExceeded):
        hanging.result(deadline)
    assert len(finished.result(deadline)) == 1 << 20


def test_a_child_keeps_neither_the_lock_nor_the_output_of_the_module(worker, tmp_path):
    with open(tmp_path / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        child = worker(
            lambda item: {
                name: os.readlink("/proc/self/fd/" + name)
                for name in os.listdir("/proc/self/fd")
                if os.path.exists("/proc/self/fd/" + name)
            }
        )
        held = child.call(None, 5)
    assert str(tmp_path / "lock") not in held.values()
    assert [held[name] for name in "012"] == ["/dev/null"] * 3
    assert sum(target.startswith("pipe:") for target in held.values()) == 2
    with open(tmp_path / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_close_ends_an_idle_child_though_others_were_started_later(worker):
    first, _second = worker(lambda item: item), worker(lambda item: item)
    assert first.call(1, 5) == 1
    begin = time.monotonic()
    first.close()
    assert time.monotonic() - begin < 0.4
    assert not os.path.exists("/proc/%d" % first.pid)


def test_close_does_not_wait_for_a_child_that_is_busy(worker):
    child = worker(lambda item: time.sleep(60))
    child.send(None)
    begin = time.monotonic()
    child.close()
    assert time.monotonic() - begin < 1.5
    wait_until(lambda: not is_alive(child.pid))


def test_close_after_abandon_closes_nobody_elses_descriptors(worker):
    child = worker(lambda item: item)
    child.abandon()
    reused = os.pipe()
    child.close()
    child.abandon()
    for descriptor in reused:
        os.fstat(descriptor)
        os.close(descriptor)


def test_what_a_child_started_ends_with_it(worker, tmp_path):
    child = worker(lambda item: shell("echo $$ > %s; exec sleep 60" % item, 50))
    with pytest.raises(DeadlineExceeded):
        child.call(str(tmp_path / "pid"), 0.5)
    pid = int((tmp_path / "pid").read_text())
    wait_until(lambda: not is_alive(pid))


def test_no_descriptor_leaks():
    before = descriptors()
    for ending in (lambda item: item, lambda item: time.sleep(60), lambda item: os._exit(1)):
        child = Worker(ending)
        try:
            child.call(None, 0.1)
        except ProbeError:
            pass
        child.close()
    shell("exit 3")
    with pytest.raises(DeadlineExceeded):
        shell("exec sleep 60", 0.1)
    with pytest.raises(OSError):
        probe.run(["/nonexistent"], {}, 1)
    assert descriptors() == before


# Commands


def test_a_command_gives_code_output_and_errors_apart():
    assert shell("cat; echo out; echo err >&2; exit 7") == (7, "out\n", "err\n")
    assert shell("kill -9 $$")[0] == -9


def test_a_command_runs_in_the_c_locale_with_a_path_of_its_own(monkeypatch):
    monkeypatch.setenv("LD_PRELOAD", "/evil.so")
    monkeypatch.setitem(probe.COMMANDS, "env", ("env",))
    code, out, _err = Host(boottime() + 10).run("env", environment={"EXTRA": "1"})
    assert code == 0
    assert dict(line.split("=", 1) for line in out.splitlines()) == dict(probe.ENVIRONMENT, EXTRA="1")


def test_a_command_dies_of_a_broken_pipe_although_python_ignores_the_signal():
    assert shell("kill -PIPE $$; echo alive")[0] == -signal.SIGPIPE


@pytest.mark.parametrize("script", ["exec sleep 60", "exec >&- 2>&-; exec sleep 60", "kill -STOP $$"])
def test_a_command_that_does_not_end_is_abandoned(script):
    begin = time.monotonic()
    with pytest.raises(DeadlineExceeded, match="sh -c"):
        shell(script, 0.3)
    assert time.monotonic() - begin < 1.0


def test_the_deadline_of_the_host_counts_too(monkeypatch):
    monkeypatch.setitem(probe.COMMANDS, "sleep", ("sleep",))
    begin = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        Host(boottime() + 0.3).run("sleep", "60")
    assert time.monotonic() - begin < 1.0


def test_both_outputs_are_read_at_the_same_time():
    code, out, err = shell("head -c 3000000 /dev/zero >&2; head -c 3000000 /dev/zero")
    assert (code, len(out), len(err)) == (0, 3000000, 3000000)


def test_a_command_that_prints_without_end_is_abandoned(monkeypatch):
    monkeypatch.setattr(probe, "MAX_OUTPUT", 1 << 20)
    with pytest.raises(ProbeError, match="printed more than 1048576 bytes"):
        shell("exec cat /dev/zero")


def test_a_command_that_is_not_installed_is_absent(monkeypatch, tmp_path):
    (tmp_path / "tool").mkdir()
    monkeypatch.setattr(probe, "PATH", str(tmp_path))
    monkeypatch.setitem(probe.COMMANDS, "tool", ("tool",))
    with pytest.raises(Absent, match="tool is not installed"):
        probe.find_command("tool")


def test_text_is_read_to_its_end_or_to_the_limit(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * (probe.READ_SIZE + 10) + b"\xff")
    assert probe.read_text(str(path)) == "x" * (probe.READ_SIZE + 10) + "\ufffd"
    assert probe.read_text(str(path), probe.READ_SIZE + 1) == "x" * (probe.READ_SIZE + 1)
    assert probe.read_once(str(path)) == b"x" * 4096
