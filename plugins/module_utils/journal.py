# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The journal: what reapers set out to do on one host, why, and what came of it. For people; no plan is made of it.

It lies beside the realm's ledger, at ``<state directory>/<realm>/journal.jsonl``, one ENTRY in JSON to a line. Lines
are only ever added. A file that would grow over MAX_BYTES becomes ``journal.jsonl.1``, in the place of the one before.

ENTRY ``{time, boottime, boot_id, sweep, previous, what}``: when, as UTC text for people and in seconds of the boot
clock, in which sweep, and the SHA-256 of the line before, also of one in the file before, and of one that a power cut
left unfinished; and with ``what``

``intent``   before the first act, one for each TOKEN: ``{kind, name, vm_id, identity, step, evidence, strikes,
             reasons: [text], source, epoch}``, the last two those of the live manifest; ``step`` is aside, remove or
             bring_back. And ``plan``, the id of the signed plan that was applied
``outcome``  after its act: ``{kind, name, vm_id, outcome, message, bytes}``
``latched``  the realm was latched: ``{message}``

Keys that are not known are left out on reading, so that entries may get more of them. Who changes a line, or takes one
away between two others, breaks the chain, and about() says where.

All intents are written and synced before the first act, the outcomes as they come, synced each SYNC_SECONDS and at the
end; a sweep that has nothing to do writes nothing. A reaper that is killed leaves intents without outcomes. What was
done by then is not lost: the ledger has the same intents, and the next sweep looks at each object again, finishes what
is left and writes the outcome of that. What is gone by then gets no outcome: its intent says which sweep went for it,
and why.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import json
import math
import os
import stat
import time

from . import ledger as ledgers
from .probe import boottime, read_text

INTENT = "intent"
OUTCOME = "outcome"
LATCHED = "latched"

MAX_BYTES = 8 * 1024 * 1024
MAX_ENTRIES = 1000
# A name has up to 4096 characters, each up to 12 bytes in ASCII JSON; other texts are cut to fit.
MAX_LINE = 128 * 1024
MAX_TEXT = 500
MAX_REASONS = 4
SYNC_SECONDS = 1.0
BEGINNING = "0" * 64  # what the first line has in the place of the line before

TEXTS = (
    "time", "boot_id", "sweep", "previous", "kind", "name", "vm_id", "identity", "step", "evidence", "source",
    "outcome", "message", "plan",
)
NUMBERS = ("boottime", "strikes", "epoch", "bytes")
# Without these an entry says nothing.
NEEDED = {
    INTENT: ("time", "sweep", "kind", "name", "vm_id"),
    OUTCOME: ("time", "sweep", "kind", "name", "vm_id", "outcome"),
    LATCHED: ("time", "message"),
}


class JournalError(ledgers.LedgerError):
    """The journal cannot be written or read; the text says what, where and what to do."""


def path_of(state_dir, realm):
    """Return the path of the realm's journal."""
    return os.path.join(os.path.dirname(ledgers.path_of(state_dir, realm)), "journal.jsonl")


class Journal:
    """One sweep's way to write the journal; the caller has the host's lock."""

    def __init__(self, state_dir, realm, sweep=None):
        self.state_dir = state_dir
        self.realm = realm
        self.sweep = sweep or os.urandom(8).hex()
        self._boot_id = read_text("/proc/sys/kernel/random/boot_id").strip()
        self._file: _File | None = None
        self._problem: Exception | None = None
        self._synced = 0.0

    def intents(self, plan, tokens):
        """Write what is about to be done to the tokens of ``plan``, and why. Raises LedgerError."""
        families, manifest = plan.get("families", {}), plan.get("manifest", {})
        applied = {"plan": plan["within"]["plan"]} if plan.get("within") else {}
        self._append(
            [
                {
                    "what": INTENT,
                    "kind": token["kind"],
                    "name": token["name"],
                    "vm_id": token["vm_id"],
                    "identity": _cut(token["identity"]),
                    "step": token.get("step"),
                    "evidence": token.get("evidence"),
                    "strikes": families.get(token["vm_id"], {}).get("strikes"),
                    "reasons": _reasons(token, families.get(token["vm_id"], {})),
                    "source": _cut(manifest.get("source")),
                    "epoch": manifest.get("epoch"),
                    **applied,
                }
                for token in tokens
            ]
        )

    @contextlib.contextmanager
    def writing(self, tell):
        """Keep the journal open for the outcomes of a sweep. ``tell`` hears at the end what could not be written."""
        self._synced = time.monotonic()
        try:
            self._file = _File(self.state_dir, self.realm)
        except ledgers.LedgerError as err:
            self._problem = err
        try:
            yield
        finally:
            if self._file is not None:
                self._attempt(self._file.sync)
                self._file.close()
            self._file = None
            if self._problem is not None:
                tell("what was done could not be written down: %s" % self._problem)

    def outcome(self, one):
        """Write what came of an act, while writing(). An outcome that cannot be written stops nothing."""
        journal = self._file
        if journal is None or self._problem is not None:
            return
        kept = ("kind", "name", "vm_id", "outcome", "bytes")
        entry = dict({key: one[key] for key in kept}, what=OUTCOME, message=_cut(one["message"]))
        self._attempt(lambda: journal.add([dict(self._stamp(), **entry)]))
        if self._problem is None and time.monotonic() - self._synced > SYNC_SECONDS:
            self._attempt(journal.sync)
            self._synced = time.monotonic()

    def latched(self, message):
        """Write that the realm was latched. Raises LedgerError."""
        self._append([{"what": LATCHED, "message": _cut(message)}])

    def _attempt(self, write):
        try:
            write()
        except ledgers.LedgerError as err:
            self._problem = err

    def _append(self, entries):
        """Add all of the entries, on the disk, or none."""
        if not entries:
            return
        with contextlib.closing(_File(self.state_dir, self.realm)) as journal:
            journal.add([dict(self._stamp(), **entry) for entry in entries])
            journal.sync()

    def _stamp(self):
        return {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "boottime": round(boottime(), 3),
            "boot_id": self._boot_id,
            "sweep": self.sweep,
        }


class _File:
    """The journal's file, open to be added to. Every method but close() raises JournalError."""

    def __init__(self, state_dir, realm):
        self.path = path_of(state_dir, realm)
        self._descriptor = -1
        self._size, self._is_new, self._is_torn, self._previous = 0, True, False, BEGINNING
        with self._explained():
            ledgers.own_directory(state_dir)
            ledgers.own_directory(os.path.dirname(self.path))
            self._open()

    def add(self, entries):
        """Add the entries, all of them or none, each with the hash of the line before it."""
        with self._explained():
            lines, previous = self._chained(entries)
            if self._size and self._size + len(lines) > MAX_BYTES:
                os.rename(self.path, self.path + ".1")
                os.close(self._descriptor)
                self._open()
            if self._is_torn:
                lines = b"\n" + lines  # what a power cut left of the last line must not join this one
            self._write(lines)
            self._previous, self._is_torn = previous, False

    def sync(self):
        """Have on the disk what was added."""
        with self._explained():
            os.fsync(self._descriptor)
            if self._is_new:
                ledgers.sync_directory(os.path.dirname(self.path))
                self._is_new = False

    def close(self):
        """Close the file."""
        os.close(self._descriptor)

    def _open(self):
        self._descriptor = _open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT)
        try:
            self._size = os.fstat(self._descriptor).st_size
            self._is_new = not self._size
            self._previous, self._is_torn = _last(self._descriptor, self._size)
            if self._is_new:
                self._previous = _last_of(self.path + ".1")
        except BaseException:
            os.close(self._descriptor)
            raise

    def _chained(self, entries):
        lines, previous = [], self._previous
        for entry in entries:
            line = json.dumps(dict(entry, previous=previous), sort_keys=True).encode("ascii")
            lines.append(line + b"\n")
            previous = _hash(line)
        return b"".join(lines), previous

    def _write(self, data):
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(self._descriptor, view) :]
        except OSError:
            # A full disk took a part: nothing will be done, and nothing must be said to have been intended.
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, self._size)
            raise
        self._size += len(data)

    @contextlib.contextmanager
    def _explained(self):
        try:
            yield
        except OSError as err:
            raise JournalError("cannot write the journal %s: %s" % (self.path, ledgers.why(err))) from err


def about(state_dir, realm, wanted):
    """Return ``{entries: [ENTRY], truncated, broken}``: the latest MAX_ENTRIES that have all that ``wanted`` has.

    ``wanted`` is for example ``{"vm_id": "v1"}``. A latch is about every VM. Entries are in the order in which they
    were written; lines that are none, as a power cut leaves one, are skipped. A host without a journal has no entries.
    ``broken`` says where the journal is not as it was written, None where it is.
    """
    found, seen, chain = collections.deque(maxlen=MAX_ENTRIES), 0, _Chain()
    path = path_of(state_dir, realm)
    try:
        with contextlib.ExitStack() as stack:
            for name, stream in _generations(path, stack):
                for number, line in enumerate(_lines(stream), 1):
                    entry = _parsed(line)
                    chain.follow(line, entry, "line %d of %s" % (number, name))
                    if entry and (entry["what"] == LATCHED or wanted.items() <= entry.items()):
                        found.append(entry)
                        seen += 1
    except OSError as err:
        raise JournalError("cannot read the journal %s: %s" % (path, ledgers.why(err))) from err
    return {"entries": list(found), "truncated": seen > len(found), "broken": chain.broken}


class _Chain:
    """Follows the hashes from line to line; ``broken`` says where they first do not fit."""

    def __init__(self):
        self.broken = None
        self._previous = None

    def follow(self, line, entry, where):
        """Take the next line, with the ENTRY in it if there is one. The oldest line that is kept proves nothing."""
        said = entry and entry.get("previous")
        if self._previous is not None and entry and said != self._previous and self.broken is None:
            self.broken = "%s does not follow the line before it: one of them was changed, or lines are missing" % where
        self._previous = _hash(line.rstrip(b"\n"))


def checked(entry):
    """Return what is known of an entry that came from elsewhere; raises ValueError when it is none."""
    if not isinstance(entry, dict) or entry.get("what") not in tuple(NEEDED):
        raise ValueError("not an entry of a journal: %.200r" % (entry,))
    known = {"what": entry["what"]}
    for key in TEXTS:
        if isinstance(entry.get(key), str):
            known[key] = _text(entry[key])
    for key in NUMBERS:
        if _is_number(entry.get(key)):
            known[key] = entry[key]
    reasons = entry.get("reasons")
    known["reasons"] = [_text(one) for one in reasons if isinstance(one, str)] if isinstance(reasons, list) else []
    missing = [key for key in NEEDED[known["what"]] if key not in known]
    if missing:
        raise ValueError("an entry of a journal without %s: %.200r" % (", ".join(missing), entry))
    return known


def _text(value):
    """Return the text such that it can travel as UTF-8: JSON can hold half of a character."""
    return value.encode("utf-8", "replace").decode("utf-8")


def _reasons(token, family):
    if token.get("why"):
        return [_cut(token["why"])]
    if token.get("resume"):
        return ["an earlier sweep began to remove it and was cut short"]
    return [_cut(reason["text"]) for reason in family.get("reasons", [])[:MAX_REASONS]]


def _cut(text):
    return text if text is None or len(text) <= MAX_TEXT else text[:MAX_TEXT] + "..."


def _hash(line):
    return hashlib.sha256(line).hexdigest()


def _last(descriptor, size):
    """Return ``(hash, is torn)`` of the last line of a file."""
    if not size:
        return BEGINNING, False
    tail = os.pread(descriptor, MAX_LINE, max(0, size - MAX_LINE))
    is_torn = not tail.endswith(b"\n")
    line = tail if is_torn else tail[:-1]
    return _hash(line[line.rfind(b"\n") + 1 :]), is_torn


def _last_of(path):
    """Return the hash of the last line of a file that may not be there."""
    try:
        descriptor = _open(path, os.O_RDONLY)
    except FileNotFoundError:
        return BEGINNING
    try:
        return _last(descriptor, os.fstat(descriptor).st_size)[0]
    finally:
        os.close(descriptor)


def _open(path, flags):
    # Not to be held up by a pipe that lies in the place of the file.
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise JournalError("%s is in the way: it must be a file" % path)


def _generations(path, stack):
    """Return ``[(path, stream)]``, the older first, opened so that a reaper that renames one hides nothing."""
    streams = []
    for name in (path, path + ".1"):
        with contextlib.suppress(FileNotFoundError):
            streams.append((name, stack.enter_context(os.fdopen(_open(name, os.O_RDONLY), "rb"))))
    if len(streams) == 2 and os.path.sameopenfile(streams[0][1].fileno(), streams[1][1].fileno()):
        streams.pop()
    return streams[::-1]


def _lines(stream):
    """Yield the lines of a file, of one that is too long to be ours only its beginning."""
    begins = True
    for part in iter(lambda: stream.readline(MAX_LINE), b""):
        if begins:
            yield part
        begins = part.endswith(b"\n")


def _parsed(line):
    try:
        return checked(json.loads(line.decode("ascii")))
    except (ValueError, RecursionError):
        return None


def _is_number(value):
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False
