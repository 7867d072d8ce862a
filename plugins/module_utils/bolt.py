# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Reads a bolt database (bbolt) while its owner has it open, locked and writes to it.

A commit writes pages that no bucket leads to yet and then, last, one of the two meta pages in turn. The pages that the
newest meta page leads to are not used again before the commit after the next one. So what was read is one state of the
database when no commit came between: then the newest meta page is the same before and after.

Only what is needed: no key is looked up, all of a small database is read.
"""

from __future__ import annotations

import os
import stat
import struct
import time

from .probe import ProbeError

MAGIC, VERSION = 0xED0CDAED, 2
BRANCH, LEAF, META = 0x01, 0x02, 0x04
IS_BUCKET = 0x01
MAX_BYTES = 1 << 26
PAGE_SIZES = (1 << 12, 1 << 13, 1 << 14, 1 << 15, 1 << 16)
MAX_DEPTH = 64
TRIES = 20
PAUSE = 0.05

_PAGE = struct.Struct("<QHHI")
_META = struct.Struct("<IIIIQQQQQQ")
_BRANCH = struct.Struct("<IIQ")
_LEAF = struct.Struct("<IIII")
_BUCKET = struct.Struct("<QQ")


def read(path):
    """Return the whole database as ``{key: value or, for a bucket, the same again}``, in bytes. Raises ProbeError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as err:
        raise ProbeError("cannot read the database %s: %s" % (path, err.strerror)) from err
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ProbeError("the database %s is no regular file" % path)
        for _attempt in range(TRIES):
            data = _all_of(descriptor, path)
            if _newest(data, path)[0] == _newest(os.pread(descriptor, 2 * PAGE_SIZES[-1], 0), path)[0]:
                return parse(data, path)
            time.sleep(PAUSE)
    finally:
        os.close(descriptor)
    raise ProbeError("the database %s is written to all the time" % path)


def parse(data, path):
    """Return what read() does of the bytes of a database."""
    _transaction, page_size, root = _newest(data, path)
    try:
        return _Pages(data, page_size).bucket(root, 0)
    except (struct.error, ValueError, OverflowError) as err:
        raise ProbeError("the database %s is corrupt: %s" % (path, err)) from err


class _Pages:
    """The pages of a database. Each byte belongs to one thing, so what takes more than there are leads in a circle."""

    def __init__(self, data, page_size):
        self.data = data
        self.page_size = page_size
        self.seen = set()
        self.left = len(data)

    def bucket(self, number, depth):
        """Return the keys and values below a page."""
        if number in self.seen:
            raise ValueError("page %d leads to itself" % number)
        self.seen.add(number)
        return self._below(number * self.page_size, depth)

    def _below(self, at, depth):
        _number, kind, count, _more = _PAGE.unpack_from(self.data, at)
        found, first = {}, at + _PAGE.size
        if depth > MAX_DEPTH:
            raise ValueError("buckets in buckets without an end")
        if kind & BRANCH:
            for one in range(count):
                found.update(self.bucket(_BRANCH.unpack_from(self.data, first + one * _BRANCH.size)[2], depth + 1))
        elif kind & LEAF:
            for one in range(count):
                place = first + one * _LEAF.size
                flags, position, key_size, size = _LEAF.unpack_from(self.data, place)
                begin = place + position + key_size
                is_bucket = flags & IS_BUCKET
                self.left -= _LEAF.size + key_size + (_BUCKET.size if is_bucket else size)
                if self.left < 0 or begin + size > len(self.data):
                    raise ValueError("values that are longer than the file")
                key = self.data[begin - key_size : begin]
                found[key] = self._nested(begin, depth) if is_bucket else self.data[begin : begin + size]
        else:
            raise ValueError("a page with the flags %#x" % kind)
        return found

    def _nested(self, at, depth):
        root = _BUCKET.unpack_from(self.data, at)[0]
        # A small bucket has no page: its only one follows right here.
        return self.bucket(root, depth + 1) if root else self._below(at + _BUCKET.size, depth + 1)


def _all_of(descriptor, path):
    size = os.fstat(descriptor).st_size
    if size > MAX_BYTES:
        raise ProbeError("the database %s is larger than %d bytes" % (path, MAX_BYTES))
    parts, at = [], 0
    while at < size:
        part = os.pread(descriptor, size - at, at)
        if not part:
            break
        parts.append(part)
        at += len(part)
    return b"".join(parts)


def _newest(data, path):
    """Return ``(transaction, page size, page of the root)`` of the newer meta page that is whole."""
    found = []
    for at in (0,) + PAGE_SIZES:
        if len(data) < at + _PAGE.size + _META.size:
            continue
        meta = data[at + _PAGE.size : at + _PAGE.size + _META.size]
        magic, version, page_size, _flags, root, _sequence, _free, _end, transaction, checksum = _META.unpack(meta)
        is_whole = (magic, version, checksum) == (MAGIC, VERSION, _fnv(meta[:-8]))
        if is_whole and at in (0, page_size) and page_size in PAGE_SIZES:
            found.append((transaction, page_size, root))
    if not found:
        raise ProbeError("%s is no bolt database, or it is corrupt" % path)
    return max(found)


def _fnv(data):
    """Return the 64-bit FNV-1a hash."""
    value = 0xCBF29CE484222325
    for octet in data:
        value = (value ^ octet) * 0x100000001B3 & (1 << 64) - 1
    return value
