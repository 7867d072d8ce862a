# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Reads names and small files in a directory tree whose owner may be hostile and at work while we read.

As in safe_tree.py every step goes by one name below a descriptor and follows no link. What is mounted in the tree is
not entered, nor asked for anything: its server may be dead. A file is looked at before it is opened, because a device
may act on being opened; only a regular one is read, and what happens to it meanwhile is said.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import fnmatch
import os
import stat
import time

from . import mounts, safe_tree

MAX_DEPTH = 16
MAX_IN_DIRECTORY = 10000
READ_SIZE = 1 << 18
REOPEN = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
TYPES = {
    stat.S_IFREG: "-",
    stat.S_IFDIR: "d",
    stat.S_IFLNK: "l",
    stat.S_IFIFO: "p",
    stat.S_IFSOCK: "s",
    stat.S_IFBLK: "b",
    stat.S_IFCHR: "c",
}


class Unreadable(Exception):
    """It is not read, and the text says why."""


class Reader:
    """Reads below a safe_tree.Tree, which stays the caller's. ``table`` is our mount table."""

    def __init__(self, tree, table):
        self._top = tree.directory
        self._device = os.fstat(self._top).st_dev
        self._mount = safe_tree.mount_id(self._top)
        self._points = {
            tuple(mount.point[len(tree.path) + 1 :].split("/"))
            for mount in mounts.below(table, tree.path)
            if mount.point != tree.path
        }

    def listing(self, limit, depth):
        """Return lines as of ``ls -l``, breadth first, of at most ``limit`` entries; the last one says what was cut."""
        lines = []
        waiting: collections.deque = collections.deque([()])
        while waiting:
            names = waiting.popleft()
            for name, status in self._entries(names):
                if len(lines) >= limit:
                    return lines + ["... cut: there is more"]
                lines.append(_line(names + (name,), status, self._target(names + (name,), status)))
                if status is not None and stat.S_ISDIR(status.st_mode) and len(names) < depth - 1:
                    waiting.append(names + (name,))
                elif status is not None and stat.S_ISDIR(status.st_mode):
                    lines[-1] += "/..."
        return lines

    def matching(self, globs, limit):
        """Return the names, as tuples, of what the globs (relative to the tree) match; at most ``limit``, sorted."""
        found = []
        for pattern in globs:
            for names in self._matching((), pattern.split("/")):
                if names not in found:
                    found.append(names)
                if len(found) >= limit:
                    return sorted(found)
        return sorted(found)

    def size(self, names):
        """Return the size of a file as it is now, 0 of one that is gone."""
        try:
            return self._status(names).st_size
        except (OSError, Unreadable):
            return 0

    def end_of(self, names, limit):
        """Return ``(the last bytes of a regular file, notes)``; the notes say what is missing. Raises Unreadable."""
        with self._regular(names) as descriptor:
            size = os.fstat(descriptor).st_size
            start = max(0, size - limit)
            data = _read(descriptor, start, size)
            after = os.fstat(descriptor).st_size
        notes = ["cut: the first %d of its %d bytes are left out" % (start, size)] if start else []
        if len(data) < size - start:
            notes.append("cut: it ended after %d bytes, it had %d when it was opened" % (start + len(data), size))
        if after != size:
            notes.append("it changed while it was read: %d bytes, then %d" % (size, after))
        return data, notes

    def _matching(self, above, patterns):
        pattern, rest = patterns[0], patterns[1:]
        if above + (pattern,) in self._points:
            return
        try:
            names = self._names(above) if any(c in pattern for c in "*?[") else [pattern]
        except (OSError, Unreadable):
            return
        for name in sorted(name for name in names if fnmatch.fnmatchcase(name, pattern)):
            if rest:
                yield from self._matching(above + (name,), rest)
            elif self._is_there(above + (name,)):
                yield above + (name,)

    def _is_there(self, names):
        try:
            return names not in self._points and self._status(names) is not None
        except (OSError, Unreadable):
            return False

    def _entries(self, names):
        """Yield ``(name, status)`` of a directory's entries in order; no status for what a mount hides or is gone."""
        try:
            listed = sorted(self._names(names))
            with self._directory(names) as directory:
                for name in listed:
                    status = None
                    if names + (name,) not in self._points:
                        with contextlib.suppress(OSError):
                            status = os.stat(name, dir_fd=directory, follow_symlinks=False)
                    yield name, status
        except (OSError, Unreadable):
            return  # removed, or swapped for something else, since its parent was listed

    def _names(self, names):
        with self._directory(names) as directory, os.scandir(directory) as entries:
            return [entry.name for entry, _count in zip(entries, range(MAX_IN_DIRECTORY))]

    def _status(self, names):
        with self._directory(names[:-1]) as directory:
            return os.stat(names[-1], dir_fd=directory, follow_symlinks=False)

    def _target(self, names, status):
        if status is None or not stat.S_ISLNK(status.st_mode):
            return ""
        try:
            with self._directory(names[:-1]) as directory:
                return os.readlink(names[-1], dir_fd=directory)
        except (OSError, Unreadable):
            return "?"

    @contextlib.contextmanager
    def _directory(self, names):
        """Give a descriptor of a directory below the tree and on its mount."""
        if len(names) > MAX_DEPTH:
            raise Unreadable("deeper than %d directories" % MAX_DEPTH)
        place = os.dup(self._top)
        try:
            for number, name in enumerate(names):
                if names[: number + 1] in self._points:
                    raise Unreadable("mounted: what is below is not looked at")
                below = os.open(name, safe_tree.DIRECTORY, dir_fd=place)
                os.close(place)
                place = below
                if safe_tree.mount_id(place) != self._mount:
                    raise Unreadable("mounted: what is below is not looked at")
            yield place
        finally:
            os.close(place)

    @contextlib.contextmanager
    def _regular(self, names):
        """Give a descriptor to read a regular file of the tree; nothing else is ever opened."""
        if names in self._points:
            raise Unreadable("mounted: it is not of the tree")
        try:
            with self._directory(names[:-1]) as directory:
                place = os.open(names[-1], safe_tree.PLACE, dir_fd=directory)
        except OSError as err:
            raise Unreadable(_why(err)) from err
        try:
            status = os.fstat(place)
            if not stat.S_ISREG(status.st_mode):
                raise Unreadable("not a regular file (type %s): it is not opened" % _type(status))
            if status.st_dev != self._device or safe_tree.mount_id(place) != self._mount:
                raise Unreadable("mounted: it is not of the tree")
            if status.st_nlink != 1:
                raise Unreadable("it has %d names, maybe some outside of the tree: it is not read" % status.st_nlink)
            descriptor = os.open("/proc/self/fd/%d" % place, REOPEN)
        except OSError as err:
            raise Unreadable(_why(err)) from err
        finally:
            os.close(place)
        try:
            yield descriptor
        finally:
            os.close(descriptor)


def shown(names):
    """Return a path as printable ASCII."""
    return "/".join(safe_tree.shown(name) for name in names)


def _read(descriptor, start, end):
    parts = []
    while start < end:
        try:
            part = os.pread(descriptor, min(READ_SIZE, end - start), start)
        except OSError as err:
            raise Unreadable(_why(err)) from err
        if not part:
            break
        parts.append(part)
        start += len(part)
    return b"".join(parts)


def _line(names, status, target):
    if status is None:
        return "?  %s  (mounted, or gone: not looked at)" % shown(names)
    return "%s%04o %d %d:%d %d %s %s%s" % (
        _type(status),
        stat.S_IMODE(status.st_mode),
        status.st_nlink,
        status.st_uid,
        status.st_gid,
        status.st_size,
        _time(status.st_mtime),
        shown(names),
        " -> %s" % safe_tree.shown(target) if target else "",
    )


def _type(status):
    return TYPES.get(stat.S_IFMT(status.st_mode), "?")


def _time(seconds):
    try:
        return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
    except (ValueError, OverflowError, OSError):
        return "%d" % seconds  # a year that no calendar has, as anybody may set


def _why(err):
    return "a symbolic link: it is not followed" if err.errno == errno.ELOOP else (err.strerror or str(err))
