# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What /proc tells about processes, and signals that hit only the process they are meant for."""

from __future__ import annotations

import collections
import contextlib
import ctypes
import errno
import os
import signal

from . import mounts
from .probe import ProbeError, boottime

# ``started``: clock ticks since boot, which together with the pid and the boot id is the identity of a process.
Stat = collections.namedtuple("Stat", "pid command state parent threads started")

UNIT_SUFFIXES = (".service", ".scope")
_TICKS = os.sysconf("SC_CLK_TCK")
_PIDFD_SEND_SIGNAL, _PIDFD_OPEN = 424, 434  # the same on every architecture but alpha
_libc = ctypes.CDLL(None, use_errno=True)


def pids():
    """Return the pids of all processes."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def parse_stat(text):
    """Parse /proc/PID/stat. The command may hold anything, a closing parenthesis too: the last one ends it.

    Raises ProbeError.
    """
    head, _parenthesis, tail = text.rpartition(")")
    pid, _parenthesis, command = head.partition(" (")
    fields = tail.split()
    try:
        return Stat(int(pid), command, fields[0], int(fields[1]), int(fields[17]), int(fields[19]))
    except (ValueError, IndexError) as err:
        raise ProbeError("this is no /proc/PID/stat: %.200r" % text) from err


def ended():
    """Yield the Stat of every process that has no working directory any more: zombies, and few others.

    That link costs a quarter of what the kernel needs to write a stat, and most processes of a host are alive.
    """
    for pid in pids():
        try:
            os.readlink("/proc/%d/cwd" % pid)
        except OSError:  # also where we may not look
            process = stat(pid)
            if process is not None:
                yield process


def stat(pid):
    """Return the Stat of a process, None when there is none."""
    text = read(pid, "stat")
    return parse_stat(text) if text else None


def is_zombie(process):
    """Tell whether the whole process has ended: the first thread of one that goes on is shown in state Z as well."""
    return process.state == "Z" and process.threads <= 1


def read(pid, name):
    """Return a small file of /proc/PID as text, None when the process is gone. No buffering: it is read very often."""
    try:
        descriptor = os.open("/proc/%d/%s" % (pid, name), os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, ProcessLookupError):
        return None
    try:
        return os.read(descriptor, 1 << 16).decode("utf-8", "replace")
    except ProcessLookupError:
        return None
    finally:
        os.close(descriptor)


def age_seconds(process):
    """Return the seconds since a process started, by the boot clock."""
    return max(0.0, boottime() - process.started / _TICKS)


def label(process):
    """Return ``pid command`` of a Stat, fit to be printed."""
    return "%d %s" % (process.pid, printable(process.command))


def printable(text):
    """Return text that came from a process or a file name with everything replaced that is not printable."""
    return "".join(c if c.isprintable() and not "\ud800" <= c <= "\udfff" else "?" for c in text)


def described(pid):
    """Return a line on a process: its pid, name and state, where it waits, its command line."""
    process = stat(pid)
    if process is None:
        return "%d ended" % pid
    line = (read(pid, "cmdline") or "").rstrip("\0").replace("\0", " ")
    waits = (read(pid, "wchan") or "").strip("0\n") if process.state == "D" else ""
    return "%s state %s%s: %s" % (label(process), process.state, waits and " in " + waits, printable(line)[:4096])


def unit(cgroup):
    """Return the systemd unit that the text of /proc/PID/cgroup names, None when there is none."""
    for line in cgroup.split("\n"):
        for name in reversed(line.split(":", 2)[-1].split("/")):
            if name.endswith(UNIT_SUFFIXES):
                return printable(name)
    return None


def lineage(pid):
    """Return a pid, that of its parent, and so on up."""
    found = []
    while pid > 0 and pid not in found:
        found.append(pid)
        process = stat(pid)
        pid = process.parent if process else 0
    return found


def places(table):
    """Yield ``((pid, "root" | "cwd" | "exe"), path)`` of what every process but init has of each.

    ``table`` is our mount table: the root of a process in another mount namespace is given as it is seen from here.
    Raises ProbeError when a process does not let us see: what cannot be seen is not free.
    """
    here, namespace = mounts.by_device(table), os.readlink("/proc/self/ns/mnt")
    roots = {}
    for pid in pids():
        if pid == 1:  # runs the host, not a VM; and may be the one that even root may not look into
            continue
        try:
            for name in ("root", "cwd", "exe"):
                path = _link(pid, name)
                if path not in (None, "/"):
                    yield (pid, name), path
            its_namespace = _link(pid, "ns/mnt")
            if its_namespace in (None, namespace):
                continue
            key = its_namespace, _link(pid, "root")
            if key not in roots:
                roots[key] = [path for root in _root_mounts(pid) for path in mounts.seen_as(root, here)]
        except PermissionError as err:
            raise ProbeError("where process %d runs cannot be read (needs root and CAP_SYS_PTRACE)" % pid) from err
        for path in roots[key]:
            yield (pid, "root"), path


def pin(pid):
    """Return a pidfd, which no other process with that pid can get into; None where the kernel has none.

    Raises ProcessLookupError when the process is gone.
    """
    if hasattr(os, "pidfd_open"):  # Python 3.9
        with contextlib.suppress(_NotSupported):
            return _supported(os.pidfd_open, pid)
        return None
    descriptor = _libc.syscall(_PIDFD_OPEN, pid, 0)
    if descriptor >= 0:
        os.set_inheritable(descriptor, False)
        return descriptor
    if ctypes.get_errno() == errno.ESRCH:
        raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
    return None


def send(pinned, pid, signum):
    """Send a signal to the process that pin() gave ``pinned`` for. Raises ProcessLookupError when it is gone."""
    if pinned is None:
        os.kill(pid, signum)
    elif hasattr(signal, "pidfd_send_signal"):  # Python 3.9
        signal.pidfd_send_signal(pinned, signum)
    elif _libc.syscall(_PIDFD_SEND_SIGNAL, pinned, int(signum), None, 0) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


class _NotSupported(Exception):
    pass


def _supported(function, *arguments):
    try:
        return function(*arguments)
    except OSError as err:
        if err.errno in (errno.ENOSYS, errno.EPERM):  # an old kernel, or a container that filters the call
            raise _NotSupported from err
        raise


def _root_mounts(pid):
    """Return the mount that is the root of a process, the last one where several are stacked there."""
    try:
        return [mount for mount in mounts.read(pid) if mount.point == "/"][-1:]
    except (FileNotFoundError, ProcessLookupError):
        return []
    except OSError as err:
        if err.errno == errno.EINVAL:  # what the mountinfo of a process gives that has just ended
            return []
        raise


def _link(pid, name):
    """Return where a link of /proc/PID leads, None for a process that is gone, a zombie or of the kernel."""
    try:
        return os.readlink("/proc/%d/%s" % (pid, name))
    except (FileNotFoundError, ProcessLookupError):
        return None
