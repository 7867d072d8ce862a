# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The ledger: what one host remembers of the sweeps of one realm, kept on that host.

It lies at ``<state directory>/<realm>/ledger.json``, readable by its owner only, and is replaced as a whole: written
beside, synced, renamed, the directory synced. So a power cut leaves the old one or the new one.

LEDGER ``{version, realm, host, machine_id, generation, manifest: {epochs, count},
strikes: {"kind name": STRIKE}, intents: [TOKEN], aside: [HELD], reaped: {vm_id: seconds since 1970}, latch, applied}``
STRIKE ``{identity, vm_id, strikes, first, last, boot_id}``; first and last are instants of the boot clock in seconds.
HELD   a TOKEN with ``{since, boot_id, sweep, state}``: what waits for its removal, since when, by the boot clock.
       ``state`` is ``aside`` after a step that can be taken back, ``waiting`` of what lies as it lay.

``generation`` counts the writes: a plan made from generation N is carried out on generation N only. ``intents`` are
the acts that were begun and whose end is not known, so that the next sweep can finish what was cut short.
``reaped`` are the VMs of which something was removed here, the latest ones. ``latch`` is null or ``{code, message}``,
about a VM that was reaped and turned out to live: nothing more is removed in the realm until a person has cleared it.
``applied`` is null or the signed plan that was applied last, ``{plan, made_at, epoch}``; none is applied twice.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import re
import stat

from .resource import VM_ID

VERSION = 1
STATES = ("aside", "waiting")
MAX_BYTES = 64 * 1024 * 1024
MAX_REAPED = 10000
MAX_COUNT = 1 << 53
MAX_INSTANT = 1 << 37  # of the year 6325
MAX_PINS_BYTES = 1024 * 1024
REALM = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class LedgerError(Exception):
    """The ledger cannot be used or written; the text says what, where and what to do."""


class Busy(LedgerError):
    """Another reaper holds this host's lock, or has written since the plan was made."""


def empty(realm):
    """Return the ledger of a host that remembers nothing."""
    return {
        "version": VERSION,
        "realm": realm,
        "host": None,
        "machine_id": None,
        "generation": 0,
        "manifest": {"epochs": {}, "count": None, "counts": {}},
        "strikes": {},
        "intents": [],
        "aside": [],
        "reaped": {},
        "latch": None,
        "applied": None,
    }


def path_of(state_dir, realm):
    """Return the path of the realm's ledger; raises LedgerError for a realm that is no plain name."""
    if not REALM.fullmatch(realm):
        raise LedgerError("realm %r must be letters, digits, '.', '_' or '-', at most 64 of them" % realm)
    return os.path.join(state_dir, realm, "ledger.json")


def load(state_dir, realm):
    """Return ``(ledger, problem)``.

    A host without a ledger has an empty one. One that cannot be understood counts as lost: the ledger returned is
    empty, so no strike survives, and ``problem`` says what was wrong with the file (it is kept aside by save()).
    """
    path = path_of(state_dir, realm)
    try:
        with open(path, "rb", opener=no_follow) as stream:
            data = stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        return empty(realm), None
    except OSError as err:
        raise LedgerError("cannot read the ledger %s: %s" % (path, why(err))) from err
    try:
        if len(data) > MAX_BYTES:
            raise ValueError("larger than %d bytes" % MAX_BYTES)
        return checked(json.loads(data.decode()), realm), None
    except (ValueError, RecursionError) as err:
        return empty(realm), "the ledger %s is corrupt (%s); all strikes start again" % (path, err)


def save(state_dir, realm, ledger):
    """Replace the realm's ledger by ``ledger``, whose generation goes up by one; return the ledger as written."""
    path = path_of(state_dir, realm)
    written = dict(ledger, version=VERSION, realm=realm, generation=ledger["generation"] + 1)
    temporary = path + ".new"
    try:
        own_directory(state_dir)
        own_directory(os.path.dirname(path))
        _keep_corrupt_aside(state_dir, realm, path)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(json.dumps(written, sort_keys=True).encode("ascii"))
            stream.flush()
            os.fsync(stream.fileno())
        os.rename(temporary, path)
        sync_directory(os.path.dirname(path))
    except OSError as err:
        raise LedgerError("cannot write the ledger %s: %s" % (path, why(err))) from err
    return written


def other_realms(state_dir, realm):
    """Return the names of the other realms that this host remembers."""
    try:
        names = [name for name in os.listdir(state_dir) if REALM.fullmatch(name)]
    except FileNotFoundError:
        return []
    except OSError as err:
        raise LedgerError("cannot read %s: %s" % (state_dir, why(err))) from err
    return sorted(name for name in names if name != realm and os.path.exists(path_of(state_dir, name)))


def pins(state_dir):
    """Return the lines of the host's pin file, ``<state directory>/keep``: VMs that a person wants left alone.

    A line is an id or a glob pattern, and maybe ``until YYYY-MM-DD``. Blank lines and comments (#) are left out.
    """
    path = os.path.join(state_dir, "keep")
    try:
        with open(path, "rb", opener=no_follow) as stream:
            data = stream.read(MAX_PINS_BYTES + 1)
    except FileNotFoundError:
        return []
    except OSError as err:
        raise LedgerError("cannot read the pins %s: %s" % (path, why(err))) from err
    if len(data) > MAX_PINS_BYTES:
        raise LedgerError("the pins %s are larger than %d bytes" % (path, MAX_PINS_BYTES))
    lines = (" ".join(line.partition("#")[0].split()) for line in data.decode("utf-8", "replace").splitlines())
    # What cannot be printed becomes a "?", which in a pattern is any character: it pins no less than was meant.
    return ["".join(c if c.isprintable() else "?" for c in line) for line in lines if line]


def pin(state_dir, vm_ids, until):
    """Add VMs to the host's pin file, until the end of a day, ``YYYY-MM-DD``. Raises LedgerError."""
    path = os.path.join(state_dir, "keep")
    try:
        own_directory(state_dir)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "ab") as stream:
            size = os.fstat(descriptor).st_size
            joint = b"\n" if size and os.pread(descriptor, 1, size - 1) != b"\n" else b""
            lines = ("%s until %s  # brought back\n" % (vm_id, until) for vm_id in vm_ids)
            stream.write(joint + "".join(lines).encode("ascii"))
            stream.flush()
            os.fsync(descriptor)
        sync_directory(state_dir)
    except OSError as err:
        raise LedgerError("cannot write the pins %s: %s" % (path, why(err))) from err


def why(err):
    """Return the reason in words, with the right that is missing."""
    missing = err.errno in (errno.EACCES, errno.EPERM) and os.geteuid() != 0
    return err.strerror + ("; the reaper has to run as root (become)" if missing else "")


class Lock:
    """This host's lock, for all realms: one reaper at a time acts on a host. The kernel drops it with the process."""

    def __init__(self, state_dir):
        self.path = os.path.join(state_dir, "lock")
        self.state_dir = state_dir
        self._descriptor = -1

    def __enter__(self):
        try:
            own_directory(self.state_dir)
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as err:
            raise LedgerError("cannot open the lock %s: %s" % (self.path, why(err))) from err
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as err:
            os.close(self._descriptor)
            if err.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise Busy("another reaper works on this host (it holds %s)" % self.path) from err
            raise LedgerError("cannot lock %s: %s" % (self.path, why(err))) from err
        return self

    def __exit__(self, *_exception):
        os.close(self._descriptor)


def checked(ledger, realm):
    """Return a ledger that came from elsewhere, or raise ValueError when it is not one of this realm."""
    try:
        return _checked(ledger, realm)
    except (KeyError, TypeError, AttributeError, OverflowError) as err:
        raise ValueError("%s: %s" % (type(err).__name__, err)) from err


def _checked(ledger, realm):
    if ledger["version"] != VERSION:
        raise ValueError("version %r, not %d" % (ledger["version"], VERSION))
    if ledger["realm"] != realm:
        raise ValueError("realm %r, not %r" % (ledger["realm"], realm))
    if not isinstance(ledger["generation"], int) or ledger["generation"] < 0:
        raise ValueError("generation %r" % (ledger["generation"],))
    for strike in ledger["strikes"].values():
        if not (isinstance(strike["identity"], str) and VM_ID.fullmatch(strike["vm_id"])):
            raise ValueError("a strike without identity or vm_id")
        if not isinstance(strike["strikes"], int) or not isinstance(strike["boot_id"], str):
            raise ValueError("a strike without a count or a boot id")
        if not (math.isfinite(strike["first"]) and math.isfinite(strike["last"])):
            raise ValueError("a strike without its instants")
    # A ledger of a version that had no ladder has nothing aside.
    ledger = dict(ledger, aside=ledger.get("aside", []))
    for key in ("intents", "aside"):
        if not isinstance(ledger[key], list):
            raise ValueError("%s is not a list" % key)
        for token in ledger[key]:
            _check_token(token)
    for held in ledger["aside"]:
        if not math.isfinite(held["since"]) or not isinstance(held["boot_id"], str) or held["state"] not in STATES:
            raise ValueError("something aside without an instant, a boot id or a state")
    remembered = dict(empty(realm)["manifest"], **ledger["manifest"])
    if not all(math.isfinite(epoch) for epoch in remembered["epochs"].values()):
        raise ValueError("an epoch that is no number")
    counts = [*remembered["counts"].values()] + [remembered["count"]]
    if not all(count is None or 0 <= count <= MAX_COUNT for count in counts):
        raise ValueError("a count that is no number")
    ledger = dict(empty(realm), **dict(ledger, manifest=remembered))
    if not all(VM_ID.fullmatch(vm_id) and math.isfinite(when) for vm_id, when in ledger["reaped"].items()):
        raise ValueError("a reaped VM without id or time")
    latch = ledger["latch"]
    if latch is not None and not all(isinstance(latch[key], str) for key in ("code", "message")):
        raise ValueError("a latch without code or message")
    applied = ledger["applied"]
    if applied is not None and not (isinstance(applied["plan"], str) and 0 <= applied["made_at"] <= MAX_INSTANT):
        raise ValueError("an applied plan without id or time")
    if applied is not None and not (applied["epoch"] is None or math.isfinite(applied["epoch"])):
        raise ValueError("an applied plan of an epoch that is no number")
    for key in ("host", "machine_id"):
        if ledger[key] is not None and not isinstance(ledger[key], str):
            raise ValueError("%s %r" % (key, ledger[key]))
    return ledger


def _check_token(token):
    if not all(isinstance(token[key], str) for key in ("kind", "name", "identity")):
        raise ValueError("an intent without kind, name or identity")
    if not VM_ID.fullmatch(token["vm_id"]) or not isinstance(token["details"], dict):
        raise ValueError("an intent without vm_id or details")


def _keep_corrupt_aside(state_dir, realm, path):
    problem = load(state_dir, realm)[1]
    if problem is not None:
        os.rename(path, path + ".corrupt")


def own_directory(path):
    """Make a directory that only its owner can enter, or refuse one that somebody else could have prepared."""
    try:
        os.makedirs(path, 0o700)
    except FileExistsError:
        pass
    status = os.lstat(path)
    if not stat.S_ISDIR(status.st_mode):
        raise LedgerError("%s is in the way: it must be a directory, not a file or a link" % path)
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise LedgerError(
            "%s must belong to the user the reaper runs as (uid %d) and be writable by nobody else; it belongs to "
            "uid %d with mode %04o" % (path, os.geteuid(), status.st_uid, stat.S_IMODE(status.st_mode))
        )


def sync_directory(path):
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def no_follow(path, flags):
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC)
