# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""dm-thin pools: their health, and which volume a thin id stands for, by the pool's own metadata.

A number is all that is left of a volume that was deactivated, and its owner may give that number to another one. What
tells them apart is in the metadata: transaction, creation time, time of the last snapshot, blocks. A live pool lets
them be read from a metadata snapshot only, of which it has one, for everybody. So ours is noted in a file: one that a
killed reaper left behind is known as ours and released by the next one, and no other ever is.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import fcntl
import json
import os
import re
import time

from . import dm
from .probe import DeadlineExceeded, ProbeError, find_command

LOCK_SECONDS = 5.0
NOTES = "thin-metadata-snapshots.json"
# In the place of a block: we are about to reserve one, and nobody had any. Whoever is killed then has it, or nobody.
PENDING = "pending"
LOCK = "thin-metadata-snapshots.lock"
# Who keeps account of all volumes of a pool himself, by the beginning of its uuid (or that of a volume).
MANAGERS = (("LVM-", "lvm"), ("stratis-", "stratis"))

Pool = collections.namedtuple("Pool", "name uuid number incarnation")
# ``trouble``: why nothing may be deleted in the pool, None for none. ``held``: block of its metadata snapshot.
# ``full``: percent of its data or of its metadata, whichever is more.
Health = collections.namedtuple("Health", "trouble held used_bytes full")

# Of digits as the kernel writes them, and not more than it has: Python's int() takes others, and refuses thousands.
_USED = re.compile(r"[0-9]{1,20}/[0-9]{1,20}")
_SUPERBLOCK = re.compile(r'<superblock uuid="[^"]*" time="([0-9]{1,20})" transaction="([0-9]{1,20})"')
_DEVICE = re.compile(
    r'<device dev_id="([0-9]{1,20})" mapped_blocks="([0-9]{1,20})" transaction="([0-9]{1,20})"'
    r' creation_time="([0-9]{1,20})" snap_time="([0-9]{1,20})"'
)


def pool(number):
    """Return the Pool with this device number, None when there is no such dm device."""
    name = dm.attribute(number, "dm/name")
    return None if name is None else Pool(name, dm.attribute(number, "dm/uuid") or "", number, dm.incarnation(number))


def pools(devices, host):
    """Return ``{number: (Pool, Health)}`` of all pools among the dm devices."""
    statuses = dm.statuses(host, "thin-pool")
    found = {}
    for device in devices.values():
        if device.name in statuses:
            one = Pool(device.name, device.uuid, device.number, dm.incarnation(device.number))
            found[device.number] = one, health(one, statuses, host)
    return found


def identity(one):
    """Return the word that stands for a pool in the identity of its volumes."""
    return one.uuid or one.name


def health(one, statuses, host):
    """Return the Health of a pool from the status lines of all pools."""
    line = statuses.get(one.name)
    if line is None:
        return Health("not a thin pool", None, None, None)
    return parse_health(line.sectors, line.words, _ours(one, host))


def read_health(one, host):
    """Return the Health of a pool as it is now."""
    line = dm.status(one.number, "thin-pool")
    is_it = line is not None and dm.attribute(one.number, "dm/name") == one.name
    return health(one, {one.name: line} if is_it else {}, host)


def parse_health(sectors, words, ours=None):
    """Parse a pool's status. Out of data space is no trouble: deletes are what such a pool waits for, and work."""
    if len(words) < 5 or not all(_USED.fullmatch(word) for word in words[1:3]):
        return Health(" ".join(words) or "no status", None, None, None)  # Fail, Error
    used, total = (int(count) for count in words[2].split("/"))
    held = None if words[3] == "-" else words[3]
    # The length of the table is that of the data, rounded up by less than a block.
    used_bytes = used * (sectors // max(total, 1)) * dm.SECTOR
    if "needs_check" in words[4:]:
        trouble = "needs_check"
    elif words[4] not in ("rw", "out_of_data_space"):
        trouble = {"ro": "read-only"}.get(words[4], words[4])
    elif held not in (None, ours) and ours != PENDING:
        trouble = "its metadata snapshot is held by somebody else (block %s)" % held
    else:
        trouble = None
    return Health(trouble, held, used_bytes, max(_percent(word) for word in words[1:3]))


def _percent(word):
    used, total = (int(count) for count in word.split("/"))
    return round(100 * used / max(total, 1), 1)


def records(one, host):
    """Return ``{thin id: RECORD}`` of all volumes in the pool's metadata. Raises ProbeError when it cannot be read.

    RECORD ``{device: [transaction, creation time, snapshot time, mapped blocks], pool: [time, transaction]}``
    """
    find_command("thin_dump")
    if host.state_dir is None:
        raise ProbeError("there is no state directory in which to note the metadata snapshot")
    with _alone(host):
        return _records(one, host)


def _records(one, host):
    found = read_health(one, host)
    if found.trouble:
        raise ProbeError("pool %s: %s" % (one.name, found.trouble))
    if found.held:  # by a reaper that did not live to release it, or it would be trouble
        _message(one, host, "release_metadata_snap")
    table = dm.tables(host, "thin-pool").get(one.name)
    path = dm.node(table.words[0]) if table and table.words else None
    if path is None:
        raise ProbeError("pool %s: no node in /dev for its metadata device" % one.name)
    with _snapshot(one, host):
        rc, out, err = host.run("thin_dump", "--metadata-snap", "--skip-mappings", path)
    if rc != 0:
        raise ProbeError("thin_dump %s: %s" % (path, dm.reason(err)))
    return parse_dump(out)


def parse_dump(text):
    """Parse the XML of thin_dump, of which only numbers are looked at."""
    head = _SUPERBLOCK.search(text)
    # A dump that was cut off has no end; two of them in one have it in the middle.
    if not head or text.find("</superblock>") != len(text.rstrip()) - len("</superblock>"):
        raise ProbeError("thin_dump printed something else than a whole superblock")
    of_pool = [int(number) for number in head.groups()]
    found = {}
    for matched in _DEVICE.finditer(text):
        thin_id, mapped, transaction, created, snapped = (int(number) for number in matched.groups())
        if thin_id in found:
            raise ProbeError("thin_dump printed two devices %d" % thin_id)
        found[thin_id] = {"device": [transaction, created, snapped, mapped], "pool": of_pool}
    if len(found) != text.count("<device "):
        raise ProbeError("thin_dump printed a device that is not understood")
    return found


def is_same(before, now):
    """Tell whether two RECORDs of one thin id are proved to be of one volume. Nobody writes to an inactive volume.

    The clocks of a pool never go back, those of a pool made anew begin at 0. Two empty volumes cannot be told apart.
    """
    return (
        before["device"] == now["device"]
        and before["device"][3] > 0
        and all(then <= later for then, later in zip(before["pool"], now["pool"]))
    )


def delete(one, thin_id, host):
    """Delete a thin id that no device has; the kernel refuses any other. Returns ``(bytes, complaint)``.

    The bytes are what the pool has free more than before. No complaint, "", when the id is gone.
    """
    before = read_health(one, host).used_bytes
    try:
        dm.message(one.name, "delete %d" % thin_id)
    except OSError as err:
        if err.errno != errno.ENODATA:  # there is no such id
            return 0, err.strerror
    after = read_health(one, host).used_bytes
    return max(before - after, 0) if before is not None and after is not None else 0, ""


@contextlib.contextmanager
def _alone(host):
    """Keep other reapers out: they would take our metadata snapshot for one that was left behind, and release it."""
    path = os.path.join(host.state_dir, LOCK)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        _lock(descriptor, time.monotonic() + LOCK_SECONDS)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor, deadline):
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise ProbeError("another reaper is reading the metadata of thin pools") from None
            time.sleep(0.05)


@contextlib.contextmanager
def _snapshot(one, host):
    _note(one, host, PENDING)
    try:
        _message(one, host, "reserve_metadata_snap")
    except DeadlineExceeded:
        raise  # it may still come to it
    except ProbeError:
        _note(one, host, None)
        raise
    try:
        _note(one, host, read_health(one, host).held)
        yield
    finally:
        _message(one, host, "release_metadata_snap")
        _note(one, host, None)


def _message(one, host, text):
    rc, _out, err = dm.dmsetup(host, "message", "--", one.name, "0", text)
    if rc != 0:
        raise ProbeError("pool %s: %s: %s" % (one.name, text, dm.reason(err)))


def _ours(one, host):
    """Return the block of the metadata snapshot that a reaper noted as its own in this pool."""
    return _notes(host).get(identity(one))


def _notes(host):
    if host.state_dir is None:
        return {}
    try:
        with open(os.path.join(host.state_dir, NOTES), "rb") as stream:
            notes = json.loads(stream.read(1 << 20).decode())
    except (OSError, ValueError, RecursionError):
        return {}
    return notes if isinstance(notes, dict) else {}


def _note(one, host, held):
    """Note which metadata snapshot is ours and see it on disk: it must outlive a power cut, because the snapshot does.

    None: we have none in this pool.
    """
    notes = dict(_notes(host), **{identity(one): held})
    path = os.path.join(host.state_dir, NOTES)
    descriptor = os.open(path + ".new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(json.dumps({key: block for key, block in notes.items() if block}).encode("ascii"))
        stream.flush()
        os.fsync(stream.fileno())
    os.rename(path + ".new", path)
    directory = os.open(host.state_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
