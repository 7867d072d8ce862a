# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Removes a directory tree whose owner may be hostile and at work while we remove it.

Nothing here acts on a path that somebody else could bend. A directory is opened below one that is held already, by one
name and without following a symbolic link, and its entries are removed below that descriptor. So whatever is swapped
for whatever, what is removed is an entry of a directory that was in the tree; nothing outside is ever reached.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import struct

from . import mounts

DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
# Only as a place to start from: does not read, so no file system server is asked and no device opened.
PLACE = getattr(os, "O_PATH", 0o10000000) | os.O_NOFOLLOW | os.O_CLOEXEC
# How deep we go with a descriptor held per level; what is deeper is moved up first, see Removal.
MAX_DEPTH = 32
CLOSED = -1  # not None, which for a directory descriptor means the working directory

_AT_EMPTY_PATH, _STATX_BTIME, _MAX_HANDLE = 0x1000, 0x800, 128
_MS_PRIVATE, _UMOUNT_NOFOLLOW = 1 << 18, 8
_NO_REPLACE = 1
_NOT_A_DIRECTORY = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
_libc = ctypes.CDLL(None, use_errno=True)


class Busy(Exception):
    """Something holds it, or there was no time left: another sweep may do better."""


class Refused(Exception):
    """The file system does not let us; a person has to look."""


@contextlib.contextmanager
def opened(base, names):
    """Give a descriptor to read a file below a trusted base. It may be anything: look before reading. Never blocks."""
    directory = descriptor = None
    try:
        directory = _descend(base, names[:-1])
        descriptor = os.open(names[-1], FILE, dir_fd=directory)
        yield descriptor
    finally:
        for one in (directory, descriptor):
            if one is not None:
                os.close(one)


def remove_empty(base, names):
    """Remove the directory below a trusted base that the names lead to, and then the one above it: what is empty."""
    for above in (names[:-1], names[:-2]):
        with contextlib.suppress(OSError):
            place = _descend(base, above)
            try:
                os.rmdir(names[len(above)], dir_fd=place)
            finally:
                os.close(place)


class Tree:
    """A directory below a base that is trusted, held by descriptors. No name below the base may be a symbolic link.

    Raises FileNotFoundError when it is not there, NotADirectoryError when something else is.
    """

    def __init__(self, base, names):
        self.name = names[-1]
        self.path = os.path.join(base, *names)
        self.directory = CLOSED
        self.parent = _descend(base, names[:-1])
        try:
            self.directory = _open(self.name, DIRECTORY, self.parent)
        except OSError:
            self.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_exception):
        self.close()

    def close(self):
        """Let go of the tree."""
        for descriptor in (self.parent, self.directory):
            if descriptor != CLOSED:
                os.close(descriptor)
        self.parent = self.directory = CLOSED

    def identity(self):
        """Return a text that no other directory has: not one of the same name, not one with the same inode.

        The handle of a file system names inode and generation and outlives a reboot. Where there is none (overlayfs
        among others) the time of birth takes the place of the generation.
        """
        filesystem = os.fstatvfs(self.directory).f_fsid
        return "%x:%s" % (filesystem, _handle(self.directory) or _inode_and_birth(self.directory))

    def unmount(self):
        """Unmount all that is mounted in the tree or on it, the deepest first. Nothing is forced or left for later.

        Returns whether the tree itself was a mount: then another directory is in its place now.
        """
        table = mounts.below(mounts.read(), self.path)
        parents = {mount.parent for mount in table}
        for mount in reversed(table):
            if mount.shared and mount.id in parents:
                self._make_private(mount)
        for mount in table:
            if mount.point != self.path:
                self._unmount(mount)
        itself = [mount for mount in table if mount.point == self.path]
        if itself:
            os.close(self.directory)  # or we are the ones who hold it
            self.directory = CLOSED
        for mount in itself:
            self._unmount(mount)
        left = mounts.below(mounts.read(), self.path)
        if left:
            raise Busy("still mounted: %s" % shown(left[0].point))
        return bool(itself)

    def remove(self):
        """Remove the empty tree itself. Raises Busy when it is not empty, or not the directory that we hold."""
        try:
            if self.directory != CLOSED and not self._is_itself():
                raise Busy("another directory of the same name took its place")
            os.rmdir(self.name, dir_fd=self.parent)
        except FileNotFoundError:
            return
        except OSError as err:
            if self.directory == CLOSED and err.errno == errno.ENOTEMPTY:
                raise Busy("unmounted; the directory that its mount hid is another one, and not empty") from err
            raise _blocked(err, self.path) from err

    def move_below(self, first, second):
        """Move the tree into ``first/second/`` beside it, directories that only we can enter; return its new path.

        Raises Busy when the tree is not what is at its name any more, Refused when it cannot be moved.
        """
        place = os.dup(self.parent)
        try:
            for name in (first, second):
                place = _own(name, place)
            try:
                os.rename(self.name, self.name, src_dir_fd=self.parent, dst_dir_fd=place)
            except OSError as err:
                _remove_empty(place, (second, first))
                if err.errno == errno.ENOENT:
                    raise _blocked(err, self.path) from err
                raise Refused("%s: %s" % (shown(self.path), err.strerror)) from err
            self.parent, place = place, self.parent
            self.path = os.path.join(os.path.dirname(self.path), first, second, self.name)
            if not self._is_itself():
                self.move_up()
                raise Busy("another directory of the same name took its place")
            return self.path
        finally:
            os.close(place)

    def move_up(self):
        """Move a tree that lies in ``first/second/`` back beside ``first``, and remove ``second``.

        Raises Busy when something of its name is there.
        """
        home = os.open("../..", DIRECTORY, dir_fd=self.parent)
        try:
            _rename_to_free(self.name, self.parent, home)
        except OSError as err:
            raise _blocked(err, self.name, "in the way") from err
        finally:
            os.close(home)
        self.remove_parent()

    def remove_parent(self):
        """Remove ``second`` that the tree lay in, and ``first``, those that are empty."""
        names = self.path.split("/")
        _remove_empty(self.parent, (names[-2], names[-3]))

    def _is_itself(self):
        there = os.stat(self.name, dir_fd=self.parent, follow_symlinks=False)
        return os.path.samestat(there, os.fstat(self.directory))

    def _make_private(self, mount):
        """Cut a mount off from its peers: what we unmount on it would be unmounted there too, outside of the tree."""
        parent, name = self._parent_of(mount)
        try:
            point = os.open(name, PLACE, dir_fd=parent)
            try:
                if mount_id(point) != mount.id:
                    raise Busy("a mount that shares what is mounted on it is hidden: %s" % shown(mount.point))
                _call("mount", None, _path_of(point), None, _MS_PRIVATE, None)
            finally:
                os.close(point)
        except OSError as err:
            raise _blocked(err, mount.point) from err
        finally:
            os.close(parent)

    def _unmount(self, mount):
        parent, name = self._parent_of(mount)
        try:
            _call("umount2", _path_of(parent) + b"/" + os.fsencode(name), _UMOUNT_NOFOLLOW)
        except OSError as err:
            if err.errno not in (errno.EINVAL, errno.ENOENT):  # these two: unmounted already
                raise _blocked(err, mount.point, "mounted") from err
        finally:
            os.close(parent)

    def _parent_of(self, mount):
        """Return a descriptor of the directory that a mount point is in, and its name there."""
        if mount.point == self.path:
            return os.dup(self.parent), self.name
        names = os.path.relpath(mount.point, self.path).split("/")
        try:
            return _descend(".", names[:-1], PLACE | os.O_DIRECTORY, self.directory), names[-1]
        except OSError as err:
            raise Busy("the tree changed while it was unmounted: %s" % shown(mount.point)) from err


class Removal:
    """Removes all that is in a directory. ``bytes`` is what that gave back so far.

    A tree may be deeper than we may have descriptors or stack. What lies too deep is moved up to the top by a rename,
    where it is removed like the rest; no path is ever built and no ``..`` followed.
    """

    def __init__(self, directory, is_late):
        self.bytes = 0
        self._top = directory
        self._is_late = is_late
        self._mount = mount_id(directory)
        self._names = "reaper-%s" % os.urandom(8).hex()
        self._moved = 0

    def run(self):
        """Remove it all, or raise Busy or Refused; what is gone by then stays gone."""
        self._empty(self._top, 0)

    def _empty(self, directory, depth):
        while self._remove_entries(directory, depth):
            pass  # a listing may miss what was added or moved up meanwhile: go on until there is nothing

    def _remove_entries(self, directory, depth):
        found = False
        with os.scandir(directory) as entries:
            for entry in entries:
                found = True
                if self._is_late():
                    raise Busy("not finished in time; the rest goes in the next sweep")
                try:
                    if not entry.is_dir(follow_symlinks=False):
                        self._unlink(directory, entry)
                    elif depth < MAX_DEPTH:
                        self._remove_directory(directory, entry.name, depth)
                    else:
                        self._move_up(directory, entry.name)
                except OSError as err:
                    # An entry that is not what it was a moment ago is looked at again in the next listing.
                    if err.errno not in _NOT_A_DIRECTORY + (errno.EISDIR, errno.ENOTEMPTY, errno.EEXIST):
                        raise _blocked(err, entry.name) from err
        return found

    def _unlink(self, directory, entry):
        status = entry.stat(follow_symlinks=False)
        os.unlink(entry.name, dir_fd=directory)
        if status.st_nlink == 1:
            self.bytes += status.st_blocks * 512

    def _remove_directory(self, parent, name, depth):
        directory = _open(name, DIRECTORY, parent)
        try:
            if mount_id(directory) != self._mount:
                raise Busy("mounted: %s" % shown(name))
            self._empty(directory, depth + 1)
        finally:
            os.close(directory)
        os.rmdir(name, dir_fd=parent)

    def _move_up(self, directory, name):
        self._moved += 1
        os.rename(name, "%s-%d" % (self._names, self._moved), src_dir_fd=directory, dst_dir_fd=self._top)


def shown(name):
    """Return a file name as printable ASCII, whatever is in it."""
    return ascii(name)[1:-1][:200]


def _open(name, flags, directory):
    try:
        return os.open(name, flags, dir_fd=directory)
    except OSError as err:
        if err.errno == errno.ELOOP:
            raise NotADirectoryError(errno.ENOTDIR, "a symbolic link", shown(name)) from err
        raise


def _descend(base, names, flags=DIRECTORY, start=None):
    """Return a descriptor of the directory that the names lead to from the base, one by one, by no symbolic link."""
    place = os.open(base, flags & ~os.O_NOFOLLOW, dir_fd=start)
    for name in names:
        try:
            below = _open(name, flags, place)
        finally:
            os.close(place)
        place = below
    return place


def _rename_to_free(name, source, target):
    """Rename an entry into another directory in which nothing has its name."""
    raw = os.fsencode(name)
    try:
        _call("renameat2", source, raw, target, raw, _NO_REPLACE)
        return
    except AttributeError:  # a C library that is too old for it
        pass
    except OSError as err:
        if err.errno not in (errno.EINVAL, errno.ENOSYS):  # of a file system that does not know the flag
            raise
    with contextlib.suppress(FileNotFoundError):
        os.stat(name, dir_fd=target, follow_symlinks=False)
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
    os.rename(name, name, src_dir_fd=source, dst_dir_fd=target)


def _own(name, place):
    """Return a descriptor of a directory below another, which is closed; made if need be, and nobody else's."""
    try:
        try:
            os.mkdir(name, 0o700, dir_fd=place)
        except FileExistsError:
            pass
        below = _open(name, DIRECTORY, place)
    except OSError as err:
        raise Refused("%s: %s" % (shown(name), err.strerror)) from err
    status = os.fstat(below)
    if status.st_uid != os.geteuid() or status.st_mode & 0o077 or status.st_dev != os.fstat(place).st_dev:
        os.close(below)
        raise Refused("%s is not a directory of the reaper's user alone" % shown(name))
    os.close(place)
    return below


def _remove_empty(place, names):
    """Remove the directory ``place``, called by the first of the names, the one above it, and so on: what is empty."""
    with contextlib.suppress(OSError):
        for above, name in zip(("..", "../.."), names):
            directory = os.open(above, DIRECTORY, dir_fd=place)
            try:
                os.rmdir(name, dir_fd=directory)
            finally:
                os.close(directory)


def _blocked(err, name, what="in use"):
    """Return the error to raise for what the kernel answered."""
    if err.errno == errno.EBUSY or err.errno == errno.EEXIST and what == "in the way":
        return Busy("%s: %s" % (what, shown(name)))
    if err.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.ENOENT):
        return Busy("changed while it was removed: %s" % shown(name))
    hint = ", perhaps immutable or append-only: see lsattr" if err.errno == errno.EPERM else ""
    return Refused("%s: %s%s" % (shown(name), os.strerror(err.errno), hint))


def _handle(directory):
    """Return the file handle as text, None where the file system (or a container's filter) gives none."""
    buffer = ctypes.create_string_buffer(struct.pack("Ii", _MAX_HANDLE, 0), 8 + _MAX_HANDLE)
    mount = ctypes.c_int()
    try:
        _call("name_to_handle_at", directory, b"", buffer, ctypes.byref(mount), _AT_EMPTY_PATH)
    except (OSError, AttributeError):
        return None
    size, kind = struct.unpack_from("Ii", buffer)
    return "%d:%s" % (kind, buffer.raw[8 : 8 + size].hex())


def _inode_and_birth(directory):
    status = os.fstat(directory)
    buffer = ctypes.create_string_buffer(256)
    try:
        _call("statx", directory, b"", _AT_EMPTY_PATH, _STATX_BTIME, buffer)
        known = struct.unpack_from("I", buffer)[0] & _STATX_BTIME
    except (OSError, AttributeError):
        known = 0
    seconds, nanoseconds = struct.unpack_from("qI", buffer, 80) if known else (0, status.st_ctime_ns)
    return "inode:%d:%d.%d" % (status.st_ino, seconds, nanoseconds)


def mount_id(descriptor):
    """Return the id of the mount that a descriptor is in. Unlike the device it differs for a bind mount too."""
    with open("/proc/self/fdinfo/%d" % descriptor, "rb") as stream:
        for line in stream:
            if line.startswith(b"mnt_id:"):
                return int(line.split()[1])
    raise Refused("the kernel does not tell which mount a directory is in")


def _path_of(descriptor):
    return b"/proc/self/fd/%d" % descriptor


def _call(function, *arguments):
    if getattr(_libc, function)(*arguments) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
