# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Commands and reads with a deadline, in a child that can be abandoned.

A host's leftovers may hang whoever looks at them: a suspended dm device, a dead NFS server, a stopped daemon. So all
that may block runs in a child process; the parent waits until the deadline, kills the child and goes on without it.
A child in uninterruptible sleep ignores the kill: it is left behind, never waited for.
"""

from __future__ import annotations

import json
import os
import select
import signal
import time

# The one table of commands this collection runs on a host. Where a tool reads its messages from a catalogue we ask for
# the C locale, because a few of them are recognised by their text.
COMMANDS = {
    "dmsetup": ("dmsetup",),
    "thin_dump": ("thin_dump",),
}
PATH = "/usr/sbin:/usr/bin:/sbin:/bin:/usr/local/sbin:/usr/local/bin"
ENVIRONMENT = {"PATH": PATH, "LC_ALL": "C", "LANGUAGE": "C", "TZ": "UTC"}
MAX_OUTPUT = 64 * 1024 * 1024


class ProbeError(Exception):
    """Something on the host could not be read; the text says what and why."""


class Absent(ProbeError):
    """The host does not have it at all: no such tool, no such kernel feature. Nothing to reap there."""


class DeadlineExceeded(ProbeError):
    """It did not answer in time; the child was killed and abandoned."""


class Host:
    """What a kind may ask about the host it runs on, with the deadline of the module call it works for.

    ``deadline`` is an instant of the boot clock, in seconds.
    """

    def __init__(self, deadline):
        self.deadline = deadline
        self.started = boottime()
        self.boot_id = read_text("/proc/sys/kernel/random/boot_id").strip()

    def remaining(self):
        """Return the seconds left, never less than a tenth so that a call can fail in an orderly way."""
        return max(0.1, self.deadline - boottime())

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
    """Return up to ``limit`` bytes of a small kernel file as text; bytes that are not UTF-8 become U+FFFD."""
    with open(path, "rb") as stream:
        return stream.read(limit).decode("utf-8", "replace")


def find_command(command):
    """Return the absolute path of a command of the table, or raise Absent."""
    name = COMMANDS[command][0]
    for directory in PATH.split(":"):
        candidate = os.path.join(directory, name)
        if os.access(candidate, os.X_OK):
            return candidate
    raise Absent("%s is not installed (looked in %s)" % (name, PATH))


def run(argv, environment, timeout):
    """Run ``argv`` without a shell; return ``(rc, stdout, stderr)``. Raises DeadlineExceeded after ``timeout`` s."""
    out_read, out_write = os.pipe()
    err_read, err_write = os.pipe()
    pid = os.posix_spawn(
        argv[0],
        argv,
        environment,
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
            (os.POSIX_SPAWN_DUP2, out_write, 1),
            (os.POSIX_SPAWN_DUP2, err_write, 2),
        ],
    )
    os.close(out_write)
    os.close(err_write)
    out, err = _drain([out_read, err_read], time.monotonic() + timeout, pid, " ".join(argv))
    return _exit_code(pid), out.decode("utf-8", "replace"), err.decode("utf-8", "replace")


class Worker:
    """A forked child that calls ``function(item)`` for the items it is sent and answers with the results, as JSON.

    ``call(item, timeout)`` returns the result, or raises DeadlineExceeded (the child is then gone) or ProbeError with
    what the child died of. One child serves many items, so the cost of a fork is paid once.
    """

    def __init__(self, function):
        requests, self._send = os.pipe()
        self._receive, answers = os.pipe()
        self.is_gone = False
        self.pid = os.fork()
        if self.pid == 0:
            _serve(function, requests, answers)
        os.close(requests)
        os.close(answers)

    def call(self, item, timeout):
        """Send one item, return the child's result for it."""
        data = json.dumps(item).encode()
        try:
            _write_all(self._send, len(data).to_bytes(8, "big") + data)
        except BrokenPipeError:
            self.abandon()
            raise ProbeError("the child that should have done it ended early") from None
        return self.result(time.monotonic() + timeout)

    def result(self, deadline):
        """Wait for the answer to the item sent last; ``deadline`` is an instant of the monotonic clock."""
        header = self._read(8, deadline)
        answer = json.loads(self._read(int.from_bytes(header, "big"), deadline).decode())
        if "error" in answer:
            raise {"Absent": Absent, "DeadlineExceeded": DeadlineExceeded}.get(answer["type"], ProbeError)(
                answer["error"]
            )
        return answer["result"]

    def send(self, item):
        """Send one item without waiting, so that several workers can work at the same time; see result()."""
        data = json.dumps(item).encode()
        _write_all(self._send, len(data).to_bytes(8, "big") + data)

    def close(self):
        """End an idle child and collect it."""
        os.close(self._send)
        os.close(self._receive)
        os.waitpid(self.pid, 0)

    def abandon(self):
        """Kill the child, with all it started that stayed in its session, and do not wait for it."""
        self.is_gone = True
        _kill(self.pid)
        os.close(self._send)
        os.close(self._receive)
        os.waitpid(self.pid, os.WNOHANG)

    def _read(self, count, deadline):
        data = b""
        while len(data) < count:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._receive], [], [], left)[0]:
                self.abandon()
                raise DeadlineExceeded("no answer within the deadline; the child was abandoned")
            part = os.read(self._receive, min(1 << 20, count - len(data)))
            if not part:
                self.abandon()
                raise ProbeError("the child that should have done it ended without an answer")
            data += part
        return data


def _serve(function, requests, answers):
    """The child's side: answer until the parent closes the pipe. Never returns into the parent's code."""
    try:
        os.setsid()
        _close_all_but(requests, answers)
        with os.fdopen(requests, "rb") as stream:
            while True:
                header = stream.read(8)
                if len(header) < 8:
                    break
                item = json.loads(stream.read(int.from_bytes(header, "big")).decode())
                try:
                    answer = {"result": function(item)}
                except Exception as err:  # the parent must hear of anything, in words
                    answer = {"error": str(err) or repr(err), "type": type(err).__name__}
                    if not isinstance(err, (ProbeError, OSError)):
                        answer["error"] = "%s: %s" % (type(err).__name__, err)
                data = json.dumps(answer).encode("ascii")
                _write_all(answers, len(data).to_bytes(8, "big") + data)
    finally:
        os._exit(0)  # pylint: disable=disallowed-name


def _close_all_but(*wanted):
    """Close what was inherited: other children's pipes, whose end must be seen, and the lock, which must not outlive
    the module in a child that was abandoned."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2 and int(name) not in wanted:
            try:
                os.close(int(name))
            except OSError:
                pass  # the descriptor of the listing itself


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
            left = deadline - time.monotonic()
            ready = select.select(still_open, [], [], left)[0] if left > 0 else []
            if not ready:
                _kill(pid)
                os.waitpid(pid, os.WNOHANG)
                raise DeadlineExceeded("%s did not end in time and was abandoned" % what)
            for descriptor in ready:
                data = os.read(descriptor, 1 << 16)
                size += len(data)
                if size > MAX_OUTPUT:
                    _kill(pid)
                    os.waitpid(pid, os.WNOHANG)
                    raise ProbeError("%s printed more than %d bytes" % (what, MAX_OUTPUT))
                if data:
                    parts[descriptor].append(data)
                else:
                    still_open.remove(descriptor)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    return [b"".join(parts[descriptor]) for descriptor in descriptors]


def _exit_code(pid):
    status = os.waitpid(pid, 0)[1]
    return os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status)


def _kill(pid):
    """Kill the child and its session's process group; a child that is in D state stays, and we do not wait."""
    for kill in (os.killpg, os.kill):
        try:
            kill(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass
