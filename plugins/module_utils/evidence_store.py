# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Evidence bundles, what is in one, and the directory in which a realm keeps them on one host.

A bundle is ``<state directory>/<realm>/evidence/<UTC time>-<vm_id>-<cause>-<sweep>.tar.gz``, in a directory that only
its owner can enter. In it ``metadata.json`` comes first, then ``NN-title.txt`` for each thing that was read.

METADATA ``{version, host, realm, vm_id, cause, time, sweep, verdict, reasons, strikes, source, epoch, machine_id,
boot_id, resources: [{kind, name, identity}], logs}``, and ``left_out`` where only the metadata could be written
SECTION  ``(title, source, text)``: source is the command line or path that was read, text is text or bytes

The store takes a share of its file system and no more, and leaves the ledger room to be written. To make room, bundles
are dropped in the order of CAUSES, the oldest first within one, and never one that matters more than the new one. What
in the directory has no name of ours, is no file or belongs to somebody else is neither counted nor touched.
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import heapq
import io
import json
import os
import re
import stat
import tarfile
import time
import zlib

from . import ledger as ledgers
from .resource import VM_ID

VERSION = 1
# Why the VM is taken for gone, what matters least first: the control plane itself knows most of a VM it destroyed.
CAUSES = ("tombstoned", "elsewhere", "absent")
NAME = re.compile(
    r"(\d{8}T\d{6}Z)-([A-Za-z0-9][A-Za-z0-9._~@+-]*)-(%s)-(\w{1,64})\.tar\.gz" % "|".join(CAUSES), re.ASCII
)
NEW = ".new"
SWEEP = re.compile(r"\w{1,64}", re.ASCII)
FORGOTTEN_SECONDS = 3600
MAX_BUNDLES = 20000  # so that to list them stays quick
MAX_METADATA = 4 * 1024 * 1024
BLOCK = 4096
# What comes of a bundle that is none, or a damaged one.
UNREADABLE = (OSError, EOFError, ValueError, zlib.error, tarfile.TarError, RecursionError)
# What the ledger, the journal and the rest of the host are left of the file system.
RESERVE_BYTES, RESERVE_SHARE = 64 * 1024 * 1024, 0.05
LEVEL = 6


class EvidenceError(Exception):
    """Evidence cannot be kept or read; the text says what, where and what to do."""


def name_of(moment, vm_id, cause, sweep):
    """Return the name of a bundle. A colon, which tar would take for that of a remote host, becomes a tilde."""
    if not VM_ID.fullmatch(vm_id) or cause not in CAUSES or not SWEEP.fullmatch(sweep):
        raise EvidenceError("no name for a bundle can be made of %r, %r, %r" % (vm_id, cause, sweep))
    return "%s-%s-%s-%s.tar.gz" % (
        time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(moment)),
        _plain(vm_id),
        cause,
        sweep,
    )


def packed(metadata, sections):
    """Return a bundle as bytes."""
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w", format=tarfile.GNU_FORMAT) as archive:
        _add(archive, "metadata.json", json.dumps(metadata, indent=1).encode("ascii") + b"\n", metadata)
        for number, (title, source, text) in enumerate(sections, 1):
            title = re.sub(r"[^A-Za-z0-9._-]+", "_", title)[:80]
            _add(archive, "%02d-%s.txt" % (number, title), as_bytes(source, 500) + b"\n" + as_bytes(text), metadata)
    return gzip.compress(whole.getvalue(), LEVEL, mtime=0)


def unpacked(stream, limit):
    """Return ``(metadata, [SECTION])`` of a bundle; raises EvidenceError when it is none or larger than ``limit``."""
    try:
        with gzip.GzipFile(fileobj=stream) as plain, tarfile.open(fileobj=plain, mode="r|") as archive:
            metadata, sections, size = None, [], 0
            for member in archive:
                size += member.size
                if size > limit:
                    raise EvidenceError("larger than %d bytes" % limit)
                data = _content(archive, member)
                if metadata is None:
                    metadata = json.loads(data.decode("ascii"))
                    continue
                source, _newline, text = data.partition(b"\n")
                title = re.sub(r"^\d+-|\.txt$", "", member.name)
                sections.append((title, source, text))
        if not isinstance(metadata, dict):
            raise EvidenceError("no metadata")
        return metadata, sections
    except UNREADABLE as err:
        raise EvidenceError("not a bundle: %s" % err) from err


def as_bytes(text, limit=None):
    """Return text, which may hold half characters, as UTF-8; bytes as they are; one line where there is a limit."""
    data = text if isinstance(text, bytes) else text.encode("utf-8", "replace")
    return data if limit is None else data.replace(b"\n", b"?")[:limit]


class Store:
    """The bundles of one realm on this host. All is done below one descriptor of a directory that is our own."""

    def __init__(self, state_dir, realm, percent, max_bytes):
        self.path = os.path.join(os.path.dirname(ledgers.path_of(state_dir, realm)), "evidence")
        self.percent = percent
        self.max_bytes = max_bytes
        self._directory = -1
        # {name: bytes it takes}, a heap of (rank, name), {id of the VM as in names: its latest}, bytes by rank
        self._sizes, self._ranks, self._newest, self._total = {}, [], {}, 0
        self._by_rank = [0] * len(CAUSES)
        self._forgotten = []
        try:
            for path in (state_dir, os.path.dirname(self.path), self.path):
                ledgers.own_directory(path)
            self._directory = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            self._list()
        except (OSError, ledgers.LedgerError) as err:
            self.close()
            why = ledgers.why(err) if isinstance(err, OSError) else str(err)
            raise EvidenceError("cannot use the store of evidence %s: %s" % (self.path, why)) from err

    def __enter__(self):
        return self

    def __exit__(self, *_exception):
        self.close()

    def close(self):
        """Let go of the directory."""
        if self._directory != -1:
            os.close(self._directory)
            self._directory = -1

    def names(self):
        """Return the names of all bundles, the oldest first."""
        return sorted(self._sizes)

    def newest(self, vm_id):
        """Return the name of a VM's latest bundle, None when it has none."""
        return self._newest.get(_plain(vm_id))

    def metadata(self, name):
        """Return the metadata of a bundle, without unpacking the rest. Raises EvidenceError."""
        with self._opened(name) as stream:
            try:
                with gzip.GzipFile(fileobj=stream) as plain, tarfile.open(fileobj=plain, mode="r|") as archive:
                    member = archive.next()
                    if member is None or member.size > MAX_METADATA:
                        raise EvidenceError("%s has no metadata" % name)
                    found = json.loads(_content(archive, member).decode("ascii"))
            except UNREADABLE as err:
                raise EvidenceError("%s is not a bundle: %s" % (name, err)) from err
        if not isinstance(found, dict):
            raise EvidenceError("%s has no metadata" % name)
        return found

    def read(self, name, limit):
        """Return ``(metadata, [SECTION])`` of a bundle."""
        with self._opened(name) as stream:
            return unpacked(stream, limit)

    def write(self, name, data):
        """Keep a bundle, in the place of one of the same name; drop for it what matters less. Raises EvidenceError."""
        if not NAME.fullmatch(name):
            raise EvidenceError("not a name of a bundle: %r" % name)
        try:
            self._make_room(name, len(data))
            self._write(name, data)
        except OSError as err:
            with contextlib.suppress(OSError):
                os.unlink(name + NEW, dir_fd=self._directory)
            raise EvidenceError("cannot write %s: %s" % (os.path.join(self.path, name), ledgers.why(err))) from err
        self._remember(name, len(data))

    def clean(self):
        """Drop what is over the limit, and what killed reapers left half written."""
        for name in self._forgotten:
            with contextlib.suppress(OSError):
                os.unlink(name, dir_fd=self._directory)
        self._forgotten.clear()
        while self._sizes and (self._total > self._limit() or len(self._sizes) > MAX_BUNDLES):
            if not self._drop_least(len(CAUSES)):
                return

    def _list(self):
        with os.scandir(self._directory) as entries:
            for entry in entries:
                is_new = entry.name.endswith(NEW)
                if not NAME.fullmatch(entry.name[: -len(NEW)] if is_new else entry.name):
                    continue
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
                        continue
                    if not is_new:
                        self._remember(entry.name, status.st_size)
                    elif time.time() - status.st_mtime > FORGOTTEN_SECONDS:
                        self._forgotten.append(entry.name)

    def _remember(self, name, size):
        size = -(-size // BLOCK) * BLOCK
        if name not in self._sizes:
            heapq.heappush(self._ranks, (_rank(name), name))
        self._count(name, size)
        self._sizes[name] = size
        vm_id = NAME.fullmatch(name).group(2)  # type: ignore[union-attr]
        self._newest[vm_id] = max(name, self._newest.get(vm_id, ""))

    def _count(self, name, size):
        change = size - self._sizes.get(name, 0)
        self._total += change
        self._by_rank[_rank(name)] += change

    def _limit(self):
        status = os.fstatvfs(self._directory)
        everything = status.f_blocks * status.f_frsize
        reserve = min(RESERVE_BYTES, everything * RESERVE_SHARE)
        return min(
            self.max_bytes,
            everything * self.percent / 100,
            self._total + status.f_bavail * status.f_frsize - reserve,
        )

    def _make_room(self, name, size):
        rank, before = _rank(name), self._sizes.get(name, 0)
        more = -(-size // BLOCK) * BLOCK - before
        fits = self._total - sum(self._by_rank[: rank + 1]) + before + more <= self._limit()
        while fits and (self._total + more > self._limit() or len(self._sizes) >= MAX_BUNDLES):
            fits = self._drop_least(rank, name)
        if not fits:
            raise EvidenceError(
                "no room for %d bytes in the store of evidence %s (it holds %d bytes; reap_evidence_percent, "
                "reap_evidence_max_bytes and the free space on its file system limit it)"
                % (size, self.path, self._total)
            )

    def _drop_least(self, rank, but=None):
        """Drop the bundle that matters least, if it does not matter more than the rank; tell whether one was."""
        kept = []
        try:
            while self._ranks and self._ranks[0][0] <= rank:
                entry = heapq.heappop(self._ranks)
                if entry[1] == but:
                    kept.append(entry)
                    continue
                try:
                    os.unlink(entry[1], dir_fd=self._directory)
                except FileNotFoundError:
                    pass
                except OSError:
                    kept.append(entry)  # immutable, or on a file system that has become read-only
                    return False
                self._count(entry[1], 0)
                del self._sizes[entry[1]]
                return True
            return False
        finally:
            for entry in kept:
                heapq.heappush(self._ranks, entry)

    def _write(self, name, data):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name + NEW, dir_fd=self._directory)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(name + NEW, flags, 0o600, dir_fd=self._directory)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view) :]
        finally:
            os.close(descriptor)
        os.rename(name + NEW, name, src_dir_fd=self._directory, dst_dir_fd=self._directory)

    @contextlib.contextmanager
    def _opened(self, name):
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            descriptor = os.open(name, flags, dir_fd=self._directory)
        except OSError as err:
            what = "a symbolic link" if err.errno == errno.ELOOP else ledgers.why(err)
            raise EvidenceError("cannot read %s: %s" % (os.path.join(self.path, name), what)) from err
        with os.fdopen(descriptor, "rb") as stream:
            yield stream


def _rank(name):
    return CAUSES.index(NAME.fullmatch(name).group(3))  # type: ignore[union-attr]


def _plain(vm_id):
    return vm_id.replace(":", "~")


def _add(archive, name, data, metadata):
    member = tarfile.TarInfo(name)
    member.size, member.mode, member.mtime = len(data), 0o600, int(metadata.get("seconds", 0))
    archive.addfile(member, io.BytesIO(data))


def _content(archive, member):
    stream = archive.extractfile(member) if member.isreg() else None
    if stream is None:
        raise EvidenceError("%s is no file" % member.name)
    return stream.read()
