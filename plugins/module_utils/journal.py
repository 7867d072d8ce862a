# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The journal: what reapers set out to remove on one host, why, and what came of it. For people; no plan is made of it.

It lies beside the realm's ledger, at ``<state directory>/<realm>/journal.jsonl``, one ENTRY in JSON to a line. Lines
are only ever added. A file that would grow over MAX_BYTES becomes ``journal.jsonl.1``, in the place of the one before.

ENTRY ``{time, boottime, boot_id, sweep, what}``: when, as UTC text for people and in seconds of the boot clock, and in
which sweep; and with ``what``

``intent``   before the first act, one for each TOKEN: ``{kind, name, vm_id, identity, evidence, strikes,
             reasons: [text], source, epoch}``, the last two those of the live manifest
``outcome``  after the last act, one for each token: ``{kind, name, vm_id, outcome, message, bytes}``
``latched``  the realm was latched: ``{message}``

Keys that are not known are left out on reading, so that entries may get more of them.

A sweep writes and syncs all intents at once and all outcomes at once; one that has nothing to remove writes nothing. A
reaper that is killed in between leaves intents without outcomes. What was done by then is not lost: the ledger has the
same intents, and the next sweep looks at each object again, finishes what is left and writes the outcome of that. What
is gone by then gets no outcome: its intent says which sweep went for it, and why.
"""

from __future__ import annotations

import collections
import contextlib
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

TEXTS = ("time", "boot_id", "sweep", "kind", "name", "vm_id", "identity", "evidence", "source", "outcome", "message")
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

    def intents(self, plan, tokens):
        """Write what the tokens of ``plan`` are about to lose, and why. Raises LedgerError."""
        families, manifest = plan.get("families", {}), plan.get("manifest", {})
        self._append(
            [
                {
                    "what": INTENT,
                    "kind": token["kind"],
                    "name": token["name"],
                    "vm_id": token["vm_id"],
                    "identity": _cut(token["identity"]),
                    "evidence": token.get("evidence"),
                    "strikes": families.get(token["vm_id"], {}).get("strikes"),
                    "reasons": _reasons(token, families.get(token["vm_id"], {})),
                    "source": _cut(manifest.get("source")),
                    "epoch": manifest.get("epoch"),
                }
                for token in tokens
            ]
        )

    def outcomes(self, outcomes):
        """Write what came of it. Raises LedgerError."""
        kept = ("kind", "name", "vm_id", "outcome", "bytes")
        self._append(
            [
                dict({key: one[key] for key in kept}, what=OUTCOME, message=_cut(one["message"]))
                for one in outcomes
            ]
        )

    def latched(self, message):
        """Write that the realm was latched. Raises LedgerError."""
        self._append([{"what": LATCHED, "message": _cut(message)}])

    def _append(self, entries):
        if not entries:
            return
        stamp = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "boottime": round(boottime(), 3),
            "boot_id": read_text("/proc/sys/kernel/random/boot_id").strip(),
            "sweep": self.sweep,
        }
        lines = [json.dumps(dict(stamp, **entry), sort_keys=True).encode("ascii") + b"\n" for entry in entries]
        path = path_of(self.state_dir, self.realm)
        try:
            ledgers.own_directory(self.state_dir)
            ledgers.own_directory(os.path.dirname(path))
            _write(path, b"".join(lines))
        except OSError as err:
            raise JournalError("cannot write the journal %s: %s" % (path, ledgers.why(err))) from err


def about(state_dir, realm, wanted):
    """Return ``{entries: [ENTRY], truncated}``: the latest MAX_ENTRIES entries that have all that ``wanted`` has.

    ``wanted`` is for example ``{"vm_id": "v1"}``. A latch is about every VM. Entries are in the order in which they
    were written; lines that are none, as a power cut leaves one, are skipped. A host without a journal has no entries.
    """
    found, seen = collections.deque(maxlen=MAX_ENTRIES), 0
    path = path_of(state_dir, realm)
    try:
        with contextlib.ExitStack() as stack:
            for stream in _generations(path, stack):
                for line in _lines(stream):
                    entry = _parsed(line)
                    if entry and (entry["what"] == LATCHED or wanted.items() <= entry.items()):
                        found.append(entry)
                        seen += 1
    except OSError as err:
        raise JournalError("cannot read the journal %s: %s" % (path, ledgers.why(err))) from err
    return {"entries": list(found), "truncated": seen > len(found)}


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
    if token.get("resume"):
        return ["an earlier sweep began to remove it and was cut short"]
    return [_cut(reason["text"]) for reason in family.get("reasons", [])[:MAX_REASONS]]


def _cut(text):
    return text if text is None or len(text) <= MAX_TEXT else text[:MAX_TEXT] + "..."


def _write(path, data):
    """Add ``data`` to the file, all of it or nothing, and have it on the disk."""
    descriptor = _open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT)
    try:
        size = os.fstat(descriptor).st_size
        if size and size + len(data) > MAX_BYTES:
            os.rename(path, path + ".1")
            os.close(descriptor)
            descriptor, size = _open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT), 0
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            data = b"\n" + data  # what a power cut left of the last line must not join this one
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view):]
            os.fsync(descriptor)
        except OSError:
            # A full disk took a part: nothing will be done, and nothing must be said to have been intended.
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, size)
            raise
        if not size:
            ledgers.sync_directory(os.path.dirname(path))
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
    """Return both files, the older first, opened such that a reaper that renames one of them hides nothing."""
    streams = []
    for name in (path, path + ".1"):
        with contextlib.suppress(FileNotFoundError):
            streams.append(stack.enter_context(os.fdopen(_open(name, os.O_RDONLY), "rb")))
    if len(streams) == 2 and os.path.sameopenfile(streams[0].fileno(), streams[1].fileno()):
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
