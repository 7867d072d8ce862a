# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Commands and reads with a deadline, in a child that can be abandoned.

A host's leftovers may hang whoever looks at them: a suspended dm device, a dead NFS server, a stopped daemon. So all
that may block runs in a child process; the parent waits until the deadline, kills the child and goes on without it.
A child in uninterruptible sleep ignores the kill: it is left behind, never waited for.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import json
import os
import select
import signal
import time

# The one table of commands this collection runs on a host. Where a tool reads its messages from a catalogue we ask for
# the C locale, because a few of them are recognised by their text.
COMMANDS = {
    "dmsetup": ("dmsetup",),
    "systemctl": ("systemctl",),
    "thin_dump": ("thin_dump",),
}
PATH = "/usr/sbin:/usr/bin:/sbin:/bin:/usr/local/sbin:/usr/local/bin"
ENVIRONMENT = {"PATH": PATH, "LC_ALL": "C", "LANGUAGE": "C", "TZ": "UTC"}
MAX_OUTPUT = 64 * 1024 * 1024
READ_SIZE = 1 << 16
RESULT = '{"result": '  # how the answer of a child begins that has one
CLOSE_SECONDS = 0.5
ANSWER_SECONDS = 5.0
CLOSED = -1


class ProbeError(Exception):
    """Something on the host could not be read; the text says what and why."""


class Absent(ProbeError):
    """The host does not have it at all: no such tool, no such kernel feature. Nothing to reap there."""


class DeadlineExceeded(ProbeError):
    """It did not answer in time; the child was killed and abandoned."""


class Host:
    """What a kind may ask about the host it runs on, with the deadline of the module call it works for.

    ``deadline`` is an instant of the boot clock, in seconds; ``state_dir`` where a kind may keep what must outlive it.
    """

    def __init__(self, deadline, state_dir=None):
        self.deadline = deadline
        self.state_dir = state_dir
        self.started = boottime()
        self.boot_id = read_text("/proc/sys/kernel/random/boot_id").strip()
        self._seen = {}

    def remaining(self):
        """Return the seconds left, never less than a tenth so that a call can fail in an orderly way."""
        return max(0.1, self.deadline - boottime())

    def once(self, what, function):
        """Return what ``function()`` returned when it was first asked for under this name: one look for many things."""
        if what not in self._seen:
            self._seen[what] = function()
        return self._seen[what]

    def run(self, command, *arguments, environment=None, timeout=10.0):
        """Run a command of the table; return ``(rc, stdout, stderr)`` as text.

        Raises Absent where the tool is not installed, DeadlineExceeded where it does not end in ``timeout`` seconds or
        before the host's deadline.
        """
        argv = [find_command(command)] + list(COMMANDS[command][1:]) + list(arguments)
        return run(argv, dict(ENVIRONMENT, **(environment or {})), min(timeout, self.remaining()))


def boottime():
    """Return seconds since boot, suspend included. The only clock that ages and strikes are measured with."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def read_text(path, limit=1 << 20):
    """Return up to ``limit`` bytes of a small kernel file as text; bytes that are not UTF-8 become U+FFFD.

    Thousands of them are read: a stream would cost three times as much, and a buffer of the size of the limit.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        data = part = os.read(descriptor, min(limit, READ_SIZE))
        while part and len(data) < limit:
            part = os.read(descriptor, min(limit - len(data), READ_SIZE))
            data += part
    finally:
        os.close(descriptor)
    return data.decode("utf-8", "replace")


def read_once(path):
    """Return what one read of a kernel file gives, as bytes: all of it, where the kernel writes it in one piece."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(descriptor, 4096)
    finally:
        os.close(descriptor)


def find_command(command):
    """Return the absolute path of a command of the table, or raise Absent."""
    name = COMMANDS[command][0]
    for directory in PATH.split(":"):
        candidate = os.path.join(directory, name)
        if os.path.isfile(candidate) and os.access(candidate, os.X_OK):
            return candidate
    raise Absent("%s is not installed (looked in %s)" % (name, PATH))


def run(argv, environment, timeout):
    """Run ``argv`` without a shell; return ``(rc, stdout, stderr)``. Raises DeadlineExceeded after ``timeout`` s."""
    deadline = time.monotonic() + timeout
    out_read, out_write = os.pipe()
    err_read, err_write = os.pipe()
    try:
        pid = os.posix_spawn(
            argv[0],
            argv,
            environment,
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
                (os.POSIX_SPAWN_DUP2, out_write, 1),
                (os.POSIX_SPAWN_DUP2, err_write, 2),
            ],
            setsigdef=[signal.SIGPIPE],  # Python ignores it, and a child would inherit that
        )
    except OSError:
        os.close(out_read)
        os.close(err_read)
        raise
    finally:
        os.close(out_write)
        os.close(err_write)
    what = " ".join(argv)
    out, err = _drain([out_read, err_read], deadline, pid, what)
    return _exit_code(pid, deadline, what), out.decode("utf-8", "replace"), err.decode("utf-8", "replace")


class Worker:
    """A forked child that calls ``function(item)`` for the items it is sent and answers with the results, as JSON.

    ``call(item, timeout)`` returns the result, or raises DeadlineExceeded (the child is then gone) or ProbeError with
    what the child died of. One child serves many items, so the cost of a fork is paid once.
    """

    def __init__(self, function):
        requests, self._send = os.pipe()
        self._receive, answers = os.pipe()
        fcntl.fcntl(self._send, fcntl.F_SETFL, os.O_NONBLOCK)
        self.is_gone = False
        self.pid = os.fork()
        if self.pid == 0:
            _serve(function, requests, answers)
        os.close(requests)
        os.close(answers)

    def call(self, item, timeout):
        """Send one item, return the child's result for it."""
        deadline = time.monotonic() + timeout
        self.send(item, timeout)
        return self.result(deadline)

    def result(self, deadline):
        """Wait for the answer to the item sent last; ``deadline`` is an instant of the monotonic clock.

        An answer that waits in the pipe counts even when the deadline went by while we waited for another child.
        """
        return json.loads(self.result_text(deadline))

    def result_text(self, deadline):
        """Return the result as result() does, but as the child wrote it, in JSON."""
        header = self._read(8, deadline)
        deadline = max(deadline, time.monotonic() + ANSWER_SECONDS)
        text = self._read(int.from_bytes(header, "big"), deadline).decode("ascii")
        if not text.startswith(RESULT):
            answer = json.loads(text)
            raise {"Absent": Absent, "DeadlineExceeded": DeadlineExceeded}.get(answer["type"], ProbeError)(
                answer["error"]
            )
        return text[len(RESULT) : -1]

    def send(self, item, timeout=10.0):
        """Send one item without waiting for its result, so that several workers can work at the same time."""
        self._must_be_there()
        deadline = time.monotonic() + timeout
        data = memoryview(_message(item))
        while data:
            # A child that does not read, because it hangs or is stopped, must not hang us once the pipe is full.
            if not _ready([], [self._send], deadline):
                self._give_up(DeadlineExceeded("it does not listen; the child was abandoned"))
            try:
                data = data[os.write(self._send, data) :]
            except BlockingIOError:
                continue
            except BrokenPipeError:
                self._give_up(ProbeError("the child that should have done it ended early"))

    def answers_within(self, seconds):
        """Tell whether the answer to the item sent last, or the child's end, comes within that time."""
        return self.is_gone or bool(_ready([self._receive], [], time.monotonic() + seconds))

    def close(self):
        """End an idle child and collect it. One that is not idle, or was abandoned already, is not waited for."""
        if self.is_gone:
            return
        os.close(self._send)
        self._send = CLOSED
        deadline = time.monotonic() + CLOSE_SECONDS
        while os.waitpid(self.pid, os.WNOHANG)[0] == 0:
            if time.monotonic() > deadline:
                self.abandon()
                return
            time.sleep(0.001)
        self._let_go()

    def abandon(self):
        """Kill the child, with all it started that stayed in its session, and do not wait for it."""
        if not self.is_gone:
            _kill(self.pid)
            self._let_go()
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self.pid, os.WNOHANG)

    def _let_go(self):
        self.is_gone = True
        for descriptor in (self._send, self._receive):
            if descriptor != CLOSED:
                os.close(descriptor)
        self._send = self._receive = CLOSED

    def _must_be_there(self):
        if self.is_gone:
            raise ProbeError("the child that should have done it was abandoned before")

    def _give_up(self, err):
        self.abandon()
        raise err from None

    def _read(self, count, deadline):
        self._must_be_there()
        data = bytearray()
        while len(data) < count:
            if not _ready([self._receive], [], deadline):
                self._give_up(DeadlineExceeded("no answer within the deadline; the child was abandoned"))
            part = os.read(self._receive, min(READ_SIZE, count - len(data)))
            if not part:
                self._give_up(ProbeError("the child that should have done it ended without an answer"))
            data += part
        return bytes(data)


def detached(function, *keep):
    """Have ``function()`` done by a process that nobody waits for, with the descriptors in ``keep`` and no other.

    It has a session of its own and the parent of orphans; it does not hold up whoever started us. What it raises is
    lost.
    """
    pid = os.fork()
    if pid:
        os.waitpid(pid, 0)
        return
    try:
        os.setsid()
        gc.freeze()
        _close_all_but(*keep)
        _detach_standard_streams()
        os.chdir("/")
        if os.fork() == 0:
            function()
    finally:
        os._exit(0)  # pylint: disable=disallowed-name


def in_a_child(work, seconds):
    """Return what ``work()`` returns, done in a child that is abandoned after so many seconds: DeadlineExceeded then.

    What its children do then ends with the act that they are at.
    """
    worker = Worker(lambda _item: work())
    try:
        return worker.call(None, seconds)
    finally:
        worker.close()


def _serve(function, requests, answers):
    """The child's side: answer until the parent closes the pipe. Never returns into the parent's code."""
    try:
        os.setsid()
        gc.freeze()  # or the collector would look at all that the parent has, and so copy it
        _close_all_but(requests, answers)
        _detach_standard_streams()
        with os.fdopen(requests, "rb") as stream:
            while True:
                header = stream.read(8)
                if len(header) < 8:
                    break
                item = json.loads(stream.read(int.from_bytes(header, "big")).decode())
                _write_all(answers, _answer(function, item))
    finally:
        os._exit(0)  # pylint: disable=disallowed-name


def _answer(function, item):
    try:
        return _message({"result": function(item)})
    except Exception as err:  # the parent must hear of anything, in words
        text = str(err) or repr(err)
        if not isinstance(err, (ProbeError, OSError)):
            text = "%s: %s" % (type(err).__name__, text)
        return _message({"error": text, "type": type(err).__name__})


def _message(content):
    data = json.dumps(content).encode("ascii")
    return len(data).to_bytes(8, "big") + data


def _close_all_but(*wanted):
    """Close what was inherited: other children's pipes, whose end must be seen, and the lock, which must not outlive
    the module in a child that was abandoned."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2 and int(name) not in wanted:
            with contextlib.suppress(OSError):  # the descriptor of the listing itself
                os.close(int(name))


def _detach_standard_streams():
    """Whoever started the module waits until its output is closed, and a child that was abandoned would hold it."""
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    if null > 2:
        os.close(null)


def _write_all(descriptor, data):
    view = memoryview(data)
    while view:
        written = os.write(descriptor, view)
        view = view[written:]


def _drain(descriptors, deadline, pid, what):
    """Read all descriptors to their end, or kill ``pid`` and raise."""
    parts = {descriptor: [] for descriptor in descriptors}
    still_open = list(descriptors)
    size = 0
    try:
        while still_open:
            ready = _ready(still_open, [], deadline)
            if not ready:
                _abandon(pid, DeadlineExceeded("%s did not end in time and was abandoned" % what))
            for descriptor in ready:
                data = os.read(descriptor, 1 << 16)
                size += len(data)
                if size > MAX_OUTPUT:
                    _abandon(pid, ProbeError("%s printed more than %d bytes" % (what, MAX_OUTPUT)))
                if data:
                    parts[descriptor].append(data)
                else:
                    still_open.remove(descriptor)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    return [b"".join(parts[descriptor]) for descriptor in descriptors]


def _ready(readable, writable, deadline):
    """Return the descriptors that can be read or written, or whose other end is closed; none: not by the deadline."""
    poll = select.poll()
    for descriptor in readable:
        poll.register(descriptor, select.POLLIN)
    for descriptor in writable:
        poll.register(descriptor, select.POLLOUT)
    left = max(0.0, deadline - time.monotonic())
    return [descriptor for descriptor, _events in poll.poll(left * 1000)]


def _exit_code(pid, deadline, what):
    """Return the exit code of a command that has closed its output, which it may do long before it ends."""
    pause = 0.0002
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status)
        if time.monotonic() > deadline:
            _abandon(pid, DeadlineExceeded("%s did not end in time and was abandoned" % what))
        time.sleep(pause)
        pause = min(pause * 2, 0.02)


def _abandon(pid, err):
    _kill(pid)
    os.waitpid(pid, os.WNOHANG)
    raise err


def _kill(pid):
    """Kill the child and its session's process group; a child that is in D state stays, and we do not wait."""
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(pid, signal.SIGKILL)
