# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Firecracker's API sockets: a VM lives while something listens on its socket.

The socket lies in a jail, which belongs to an unprivileged user: whoever broke out of the VM may have planted it, and
answers as he likes. So nothing that is answered takes a life away. Nobody listening is the only proof of death that we
take; whatever else is odd, slow or in the way means that the VM may live, and says so.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import fnmatch
import io
import json
import os
import re
import socket
import stat
import time

from .. import processes, safe_tree
from .. import resource as r
from ..probe import Absent, ProbeError

TYPE = "firecracker"
OPTIONS = {
    "sockets": {
        "type": "list",
        "elements": "str",
        "default": ["/srv/jailer/*/{vm_id}/root/run/firecracker.socket"],
    },
}

VM_ID = "{vm_id}"
WILDCARDS = re.compile(r"[*?\[]")
REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n\r\n"
MAX_ANSWER = 1 << 16
MAX_SOCKETS = 200000
# All of so many sockets are asked, and then waited for together: as long as this, or a part of the time that is left.
AT_ONCE = 256
ANSWER_SECONDS = 2.0
# What it means that nobody listens: no such file, not in a directory, no socket, a socket that nobody has open.
NOBODY = (FileNotFoundError, NotADirectoryError, ConnectionRefusedError)

# ``base``: the part of the pattern before the first wildcard; ``above``: names and wildcards below it; ``entry``: a
# regular expression for the name that has the id; ``below``: what follows.
Pattern = collections.namedtuple("Pattern", "base above entry below")
Socket = collections.namedtuple("Socket", "vm_id base names path")


def check(options):
    """Raise RuleError for paths that are no patterns of sockets."""
    if not options["sockets"]:
        raise r.RuleError("sockets is empty: nothing would be looked at")
    for text in options["sockets"]:
        _pattern(text)


def alive(options, host):
    """Return the VMs on whose API sockets something listens, or may."""
    patterns = [_pattern(text) for text in options["sockets"]]
    if not any(_is_there(pattern.base) for pattern in patterns):
        raise Absent("there is no %s" % ", ".join(sorted({pattern.base for pattern in patterns})))
    sockets = [one for pattern in patterns for one in _sockets(pattern)]
    if len(sockets) > MAX_SOCKETS:
        raise ProbeError("%d API sockets, more than %d" % (len(sockets), MAX_SOCKETS))
    found = {}
    for begin in range(0, len(sockets), AT_ONCE):
        seconds = min(ANSWER_SECONDS, host.remaining() / 4)
        found.update(_ask(sockets[begin : begin + AT_ONCE], time.monotonic() + seconds))
    return found


# --- where sockets are


def _pattern(text):
    parts = text.split("/")[1:]
    here = [number for number, part in enumerate(parts) if VM_ID in part]
    if not re.match("/[^/]", text) or os.path.normpath(text) != text or text.count(VM_ID) != 1:
        raise r.RuleError("sockets: an absolute path with %s in it, once, was expected: %r" % (VM_ID, text))
    if WILDCARDS.search("".join(parts[here[0] :])):
        raise r.RuleError("sockets: no wildcard can be beside %s or after it: %r" % (VM_ID, text))
    fixed = next(number for number, part in enumerate(parts) if WILDCARDS.search(part) or number == here[0])
    before, after = parts[here[0]].split(VM_ID)
    entry = re.compile("%s(?P<vm_id>%s)%s" % (re.escape(before), r.VM_ID.pattern, re.escape(after)))
    return Pattern("/" + "/".join(parts[:fixed]), parts[fixed : here[0]], entry, parts[here[0] + 1 :])


def _is_there(path):
    try:
        os.stat(path)
    except NOBODY:
        return False
    return True


def _sockets(pattern):
    """Yield a Socket for every entry that has the name of a VM. The base is trusted; below it no link is followed."""
    levels = [[]]
    for part in pattern.above:
        levels = [
            names + [name] for names in levels for name in fnmatch.filter(_listed(pattern.base, names), part)
        ]
    for names in levels:
        for name in _listed(pattern.base, names):
            match = pattern.entry.fullmatch(name)
            if match:
                place = names + [name] + pattern.below
                yield Socket(
                    match.group("vm_id"), pattern.base, place, processes.printable(os.path.join(pattern.base, *place))
                )


def _listed(base, names):
    try:
        if not names:
            return sorted(os.listdir(base))
        with safe_tree.opened(base, names) as directory:
            return sorted(os.listdir(directory))
    except (FileNotFoundError, NotADirectoryError):
        return []


# --- who listens there


def _ask(sockets, deadline):
    """Yield ``(vm_id, why)`` of those on which something listens. All are asked before the first is waited for."""
    with contextlib.ExitStack() as stack:
        asked = []
        for one in sockets:
            connection = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC))
            connection.setblocking(False)
            try:
                _connect(connection, one)
                connection.sendall(REQUEST)
                asked.append((one, connection))
            except NOBODY:
                pass
            except OSError as err:
                yield one.vm_id, "its API socket %s cannot be asked, so it may live: %s" % (one.path, err.strerror)
        for one, connection in asked:
            yield from _said(one, _instance(connection, deadline))


def _said(one, instance):
    if instance is None:
        yield one.vm_id, "something listens on its API socket %s, without an answer that makes sense" % one.path
        return
    vm_id, state = instance
    yield one.vm_id, "its API socket %s answers (%s)" % (one.path, state)
    if vm_id != one.vm_id and r.VM_ID.fullmatch(vm_id):
        yield vm_id, "who answers on the API socket %s says that it is this VM" % one.path


def _connect(connection, one):
    """Raise one of NOBODY when nobody listens, another OSError when that is open."""
    place = _opened(one.base, one.names)
    try:
        # By descriptor: to what was opened, whatever is put in its place meanwhile; and no path is too long.
        connection.connect("/proc/self/fd/%d" % place)
    finally:
        os.close(place)


def _opened(base, names):
    """Return a descriptor of the socket, by no symbolic link below the base. It is a place only: nothing is opened."""
    place = os.open(base, safe_tree.PLACE & ~os.O_NOFOLLOW)
    try:
        for name in names:
            below = os.open(name, safe_tree.PLACE, dir_fd=place)
            os.close(place)
            place = below
            if stat.S_ISLNK(os.fstat(place).st_mode):
                raise OSError(errno.ELOOP, "a symbolic link is in the way")
        if not stat.S_ISSOCK(os.fstat(place).st_mode):
            raise FileNotFoundError(errno.ENOENT, "not a socket")
    except BaseException:
        os.close(place)
        raise
    return place


# --- what they answer


def _instance(connection, deadline):
    """Return ``(id, state)`` of the answer, None when there is none until the deadline, or none that makes sense."""
    import http.client  # half of what all else that a host imports costs, and most hosts do not need it

    try:
        response = http.client.HTTPResponse(_Answer(connection, deadline))  # type: ignore[arg-type]
        response.begin()
        content = json.loads(response.read())
        vm_id, state = content["id"], content["state"]
    except Exception:  # it may be anything, and must not keep us from asking the others
        return None
    if response.status != http.client.OK or not isinstance(vm_id, str) or not isinstance(state, str):
        return None
    return vm_id, processes.printable(state[:40])


class _Answer(io.RawIOBase):
    """What comes over a connection until the deadline, if it is not too much: what HTTPResponse takes for a socket."""

    def __init__(self, connection, deadline):
        super().__init__()
        self._connection = connection
        self._deadline = deadline
        self._left = MAX_ANSWER

    def makefile(self, _mode):
        return io.BufferedReader(self)

    def readable(self):
        return True

    def readinto(self, buffer):
        if not self._left:
            raise OSError(errno.EFBIG, "the answer is larger than %d bytes" % MAX_ANSWER)
        self._connection.settimeout(max(0.0, self._deadline - time.monotonic()))  # 0: what is there by now
        count = self._connection.recv_into(buffer, min(len(buffer), self._left))
        self._left -= count
        return count
