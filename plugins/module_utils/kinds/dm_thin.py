# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Thin volumes of device-mapper. One resource is one active device whose whole table is one ``thin`` target.

Its name is the kernel's, as in /dev/mapper; its identity the boot id, the sequence number that the kernel gives to each
block device once, the pool and the thin id. Removal has two steps: the device is deactivated, which the kernel refuses
while anybody has it open, and only then is its thin id deleted, which gives the blocks back to the pool. The first can
be taken back, and is how a volume is set aside. The second is done later, also by the next reaper when one was killed
between the two, if the pool's metadata prove that the id still stands for that volume.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import os
import re
import stat
import time

from .. import dm, thin_pool
from .. import resource as r
from ..probe import ProbeError

KIND = "dm_thin"
STOPS = False
DEPENDS_ON = ("cgroup", "container", "snapshot")
RESUMES = True
SETS_ASIDE = "always"
RULE = {
    "name": {"type": "str", "required": True},
    "pool": {"type": "str"},
}

# Whatever probes new and changed block devices, udevd for one, opens them for moments.
BUSY_TRIES = 5
BUSY_PAUSE = 0.2
TAG = "microvm-reaper-"
FAILED_POOL = ["Fail"]
_COUNT = re.compile("[0-9]{1,20}")
_NUMBERS = re.compile("[0-9]{1,10}:[0-9]{1,10} [0-9]{1,10}")

Volume = collections.namedtuple("Volume", "device pool thin_id sectors")


def collect(rules, host):
    """Return all thin volumes whose name is that of a VM. Four commands, however many volumes there are."""
    names = r.Names(KIND, rules)
    devices = dm.devices(host)
    tables = dm.tables(host, "thin")
    mapped = dm.statuses(host, "thin")
    pools = thin_pool.pools(devices, host)
    found, foreign = [], 0
    for device in devices.values():
        table = tables.get(device.name)
        if table is None or device.segments != 1:
            continue
        volume = _volume(device, table, lambda number: pools.get(number, (None,))[0])
        vm_id = _vm_id(names, device.name, volume.pool) if volume else None
        if vm_id is None:
            foreign += 1
            continue
        one = _describe(volume, vm_id, mapped.get(device.name), pools[volume.pool.number][1].trouble, host)
        if one is not None:
            found.append(one)
    places = {one.name: health.full for one, health in pools.values() if health.full is not None}
    return {"resources": found, "foreign": foreign, "places": places}


def inspect(token, rules, host):
    """Return None when this very volume is there and ours, nobody uses it and its pool can take a delete."""
    if _is_inactive(token, host):
        return _resumable(token, rules, host)[0]
    return _removable(token, rules, host)[0]


def prepare(tokens, _rules, host):
    """Return what proves, later, that a thin id still stands for the volume of its token, and what its device was like.

    May have gaps: the metadata of some pools cannot be read.
    """
    found, active = {}, [token for token in tokens if not token.get("resume")]
    for number in sorted({token["details"]["pool_device"] for token in active}):
        records = _records(number, host)
        for token in active:
            details = token["details"]
            if details["pool_device"] == number:
                record = records.get(details["thin_id"])
                found[token["name"]] = dict(_device(token), **({"record": record} if record else {}))
    return found


def set_aside(token, rules, host):
    """Deactivate the volume. One that could not be told from another one later is left active."""
    refused, volume = _removable(token, rules, host)
    why = None if refused else _would_be_lost(token, volume)
    if why:
        return dict(r.outcome(token, r.DEFERRED, "left active until reap_hold is over: %s" % why), waits=True)
    return refused or _deactivate(token, volume, host) or r.outcome(token, r.SET_ASIDE)


def bring_back(token, rules, host):
    """Activate a volume that was set aside, with the table, the name, the uuid and the node that it had."""
    if _is_there(token, host):
        return r.outcome(token, r.RESTORED, "it is active")
    refused, pool = _resumable(token, rules, host)
    refused = refused or _unproved(token, pool, host)
    if refused:
        return refused
    if dm.named(token["name"]):
        return r.outcome(token, r.DEFERRED, "another device has its name now")
    details = token["details"]
    table = "0 %d thin %s %d" % (details["size_sectors"], pool.number, details["thin_id"])
    arguments = (["--uuid", details["uuid"]] if details.get("uuid") else []) + ["--table", table]
    arguments += ["--readonly"] if details.get("read_only") else []
    rc, _out, err = dm.dmsetup(host, "create", *arguments, "--", token["name"])
    if rc != 0:
        return r.outcome(token, r.FAILED, "cannot be activated: %s" % dm.reason(err))
    _restore_node(token)
    return r.outcome(token, r.RESTORED)


def remove(token, rules, host):
    """Deactivate the volume and delete its thin id, so that its blocks go back to the pool. Never forces."""
    if _is_inactive(token, host):
        _remove_node(token["name"], token["details"]["device"])  # a reaper that was killed may not have come to it
        refused, pool = _resumable(token, rules, host)
        refused = refused or _unproved(token, pool, host)
        if refused is None:
            # Whoever activated it while we looked has it now; the kernel does not delete the id of an active volume.
            return _delete(token, pool, token["details"]["thin_id"], host)
        # What is put off keeps its intent.
        return dict(refused, unfinished=True) if refused["outcome"] == r.DEFERRED else refused
    refused, volume = _removable(token, rules, host)
    refused = refused or _deactivate(token, volume, host)
    return refused or _delete(token, volume.pool, volume.thin_id, host)


def witness(token, _rules, host):
    """Return the table, status and other state of the volume and the status of its pool; four commands for all."""
    if not _is_there(token, host):
        raise ProbeError("it is not active any more, or another volume has its name now")
    name, pool = token["name"], token["details"]["pool"]
    told = [
        ("info of the volume", host.once("dm info", lambda: dm.devices(host)).get(token["details"]["device"])),
        ("table of the volume", host.once("dm table thin", lambda: dm.tables(host, "thin")).get(name)),
        ("status of the volume", host.once("dm status thin", lambda: dm.statuses(host, "thin")).get(name)),
        ("status of the pool", host.once("dm status thin-pool", lambda: dm.statuses(host, "thin-pool")).get(pool)),
    ]
    lines = ["%s: %s" % (what, " ".join("%s=%s" % pair for pair in one._asdict().items()) if one else "none")
             for what, one in told]
    source = "dmsetup info, table, status, of all volumes at once: %s in pool %s" % (name, pool)
    return [{"title": KIND, "source": source, "text": "\n".join(lines) + "\n"}]


def _records(number, host):
    """Return what the metadata of a pool say, nothing where they cannot be read."""
    pool = thin_pool.pool(number)
    try:
        return thin_pool.records(pool, host) if pool else {}
    except (ProbeError, OSError):
        return {}


def _device(token):
    """Return what a device is like beside its table: ``{uuid, read_only, node: [mode, uid, gid]}``."""
    number = token["details"]["device"]
    uuid = dm.attribute(number, "dm/uuid") or ""
    found = {"uuid": "" if uuid.startswith(TAG) else uuid, "read_only": dm.attribute(number, "ro") == "1"}
    with contextlib.suppress(OSError):
        status = os.stat(_node(token["name"]))
        if stat.S_ISBLK(status.st_mode) and dm.as_number(status.st_rdev) == number:
            found["node"] = [stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid]
    return found


def _restore_node(token):
    """Give the node in /dev back the rights that it had. udevd, where it runs, may have made it by rules of its own."""
    if not os.path.lexists(_node(token["name"])) or "node" not in token["details"]:
        return
    mode, uid, gid = token["details"]["node"]
    with contextlib.suppress(OSError):
        os.chown(_node(token["name"]), uid, gid)
        os.chmod(_node(token["name"]), mode)


def _node(name):
    return os.path.join("/dev/mapper", name)


def _would_be_lost(token, volume):
    """Return why nothing would prove, once the volume is inactive, that its thin id still stands for it, or None."""
    record = token["details"].get("record")
    if not record:
        return "the metadata of pool %s could not be read (thin_dump)" % volume.pool.name
    if not record["device"][3]:
        return "it is empty, and nothing tells it from another empty one"
    table = dm.table(volume.device.number, "thin")
    return "it has an external origin" if table is None or len(table.words) != 2 else None


def _volume(device, table, pool_of):
    """Return the Volume of a device and its table, None when its pool is gone or the table is not understood.

    In a failed pool no volume says which thin id it has.
    """
    if table.words == FAILED_POOL:
        pool = next((pool for pool in map(pool_of, dm.built_on(device.number)) if pool), None)
        return Volume(device, pool, None, table.sectors) if pool else None
    if len(table.words) < 2 or not _NUMBERS.fullmatch(" ".join(table.words[:2])):
        return None
    pool = pool_of(table.words[0])
    return Volume(device, pool, int(table.words[1]), table.sectors) if pool else None


def _vm_id(names, name, pool):
    if "\ufffd" in name:
        return None  # was not UTF-8: there is no way to call it by its name
    return names.match(name, wanted=lambda rule: rule.get("pool") in (None, "", pool.name))[0]


def _describe(volume, vm_id, status, trouble, host):
    device, pool = volume.device, volume.pool
    identity = _identity(volume, host)
    if identity is None:
        return None  # removed since it was listed
    on_it = dm.devices_on(device.number) if device.open else []
    words = status.words if status else []
    return r.resource(
        KIND,
        device.name,
        vm_id,
        identity,
        in_use=device.open > 0,
        holders=on_it + _holders(device, pool, trouble),
        age_seconds=_age(device.number),
        bytes_used=int(words[0]) * dm.SECTOR if words and _COUNT.fullmatch(words[0]) else None,
        details={
            "pool": pool.name,
            "pool_uuid": pool.uuid,
            "pool_device": pool.number,
            "thin_id": volume.thin_id,
            "device": device.number,
            "size_sectors": volume.sectors,
            "place": pool.name,
        },
    )


def _holders(device, pool, trouble):
    """Return what forbids the removal of a volume, whoever has it open."""
    found = []
    for prefix, manager in thin_pool.MANAGERS:
        if device.uuid.startswith(prefix) or pool.uuid.startswith(prefix):
            found.append(r.holder(manager, device.name))
    if re.fullmatch(re.escape(pool.name) + r"-snap-\d+", device.name):
        found.append(r.holder("containerd_snapshotter", device.name))
    if device.suspended:
        found.append(r.holder("suspended", device.name))
    if trouble:
        found.append(r.holder("pool", "%s: %s" % (pool.name, trouble)))
    return found


def _identity(volume, host):
    incarnation = dm.incarnation(volume.device.number)
    return incarnation and "%s:%s:%s:%s" % (
        host.boot_id,
        incarnation,
        thin_pool.identity(volume.pool),
        volume.thin_id,
    )


def _age(number):
    """Return the seconds since the device's node in /dev was made or last changed, None when there is none."""
    try:
        status = os.stat("/dev/dm-%s" % number.partition(":")[2])
    except OSError:
        return None
    if not stat.S_ISBLK(status.st_mode) or dm.as_number(status.st_rdev) != number:
        return None
    age = time.time() - status.st_ctime
    return round(age, 1) if age >= 0 else None


def _removable(token, rules, host):
    """Return ``(OUTCOME | None, Volume)``; None when the token's volume may be deactivated and deleted now."""
    number = token["details"]["device"]
    # What can be read from sysfs is read first: that never hangs.
    if not _is_there(token, host):
        return _gone_or_another(token), None
    if dm.attribute(number, "dm/suspended") == "1":
        return r.outcome(token, r.DEFERRED, "suspended", holders=[r.holder("suspended", token["name"])]), None
    device = dm.device(number)
    table = dm.table(number, "thin")
    if table and table.words == FAILED_POOL:
        failed = r.holder("pool", "%s: Fail" % token["details"]["pool"])
        return r.outcome(token, r.DEFERRED, "its pool has failed", holders=[failed]), None
    volume = _volume(device, table, thin_pool.pool) if device and table and device.segments == 1 else None
    if volume is None or device.name != token["name"] or _identity(volume, host) != token["identity"]:
        return _gone_or_another(token), None
    if _vm_id(r.Names(KIND, rules), device.name, volume.pool) != token["vm_id"]:
        return r.outcome(token, r.FAILED, "no rule says that it belongs to this VM"), None
    if device.open:
        return _busy(token), None
    holders = _holders(device, volume.pool, thin_pool.read_health(volume.pool, host).trouble)
    if holders:
        message = "; ".join("%s %s" % (one["type"], one["name"]) for one in holders)
        return r.outcome(token, r.DEFERRED, message, holders=holders), None
    return None, volume


def _is_there(token, host):
    """Tell whether the device that the token was made for still exists, under its name."""
    number = token["details"]["device"]
    incarnation = dm.incarnation(number)
    return (
        incarnation is not None
        and token["identity"].startswith("%s:%s:" % (host.boot_id, incarnation))
        and dm.attribute(number, "dm/name") == token["name"]
    )


def _is_inactive(token, host):
    """Tell whether an earlier reaper got as far as to deactivate the volume of this token."""
    return bool(token.get("resume")) and not _is_there(token, host)


def _gone_or_another(token):
    if dm.named(token["name"]):
        return r.outcome(token, r.IDENTITY_CHANGED, "another volume of the same name is there now")
    return r.outcome(token, r.ALREADY_GONE)


def _busy(token):
    return r.outcome(token, r.DEFERRED, "busy", holders=dm.openers(token["details"]["device"]))


def _deactivate(token, volume, host):
    """Remove the device from the kernel's table; return None when it is gone, else an OUTCOME.

    A name, and a number too, can have passed to another device since we looked. A uuid cannot, and can be given to a
    device that has none: so it is given one, looked at once more, and removed by that.
    """
    number = volume.device.number
    uuid = volume.device.uuid
    if not uuid:
        uuid = "%s%s:%s" % (TAG, host.boot_id, dm.incarnation(number))
        try:
            dm.set_uuid(token["name"], uuid)
        except OSError as err:
            return r.outcome(token, r.FAILED, "cannot be marked for removal: %s" % err.strerror)
    if not _is_there(token, host) or dm.attribute(number, "dm/uuid") != uuid:
        return _gone_or_another(token)
    return _removed(token, uuid, host)


def _removed(token, uuid, host):
    """Remove the device with this uuid; return None when it is gone, else an OUTCOME."""
    for attempt in range(BUSY_TRIES):
        if attempt:
            time.sleep(BUSY_PAUSE)
        try:
            dm.remove(uuid)
        except OSError as err:
            if err.errno == errno.EBUSY:
                continue
            if err.errno == errno.ENXIO and not _is_there(token, host):
                return r.outcome(token, r.ALREADY_GONE)
            return r.outcome(token, r.FAILED, "cannot be deactivated: %s" % err.strerror)
        if _is_there(token, host):
            return r.outcome(token, r.FAILED, "still there after the kernel said that it was removed")
        _remove_node(token["name"], token["details"]["device"])
        return None
    return _busy(token)


def _remove_node(name, number):
    """Remove the node of a device that is gone. Where udevd runs that is for it to do, and it may not have yet."""
    if os.path.exists(dm.UDEV_CONTROL) or dm.attribute(number, "dm/name") is not None:
        return  # the number is that of another device already
    with contextlib.suppress(OSError):
        status = os.lstat(_node(name))
        if stat.S_ISBLK(status.st_mode) and dm.as_number(status.st_rdev) == number:
            os.unlink(_node(name))


def _delete(token, pool, thin_id, host):
    """Delete a thin id that no device uses any more. ``bytes`` is what the pool has free more than before."""
    where = "thin id %d of pool %s" % (thin_id, pool.name)
    if dm.incarnation(pool.number) != pool.incarnation:
        left = r.outcome(token, r.FAILED, "deactivated, but %s remains: the pool was deactivated too" % where)
        return dict(left, unfinished=True)
    given_back, complaint = thin_pool.delete(pool, thin_id, host)
    if complaint:
        left = r.outcome(token, r.FAILED, "deactivated, but %s remains: %s" % (where, complaint))
        return dict(left, unfinished=True)
    return r.outcome(token, r.REAPED, bytes_given_back=given_back)


def _resumable(token, rules, host):
    """Return ``(OUTCOME | None, Pool)``; None when nobody uses the thin id and the pool can take a delete."""
    details = token["details"]
    where = "thin id %d of pool %s" % (details["thin_id"], details["pool"])
    device = dm.named(details["pool"])
    pool = thin_pool.pool(device.number) if device else None
    if pool is None or pool.uuid != details["pool_uuid"]:
        return r.outcome(token, r.DEFERRED, "%s remains: the pool is not active" % where), None
    if _vm_id(r.Names(KIND, rules), token["name"], pool) != token["vm_id"]:
        return r.outcome(token, r.FAILED, "no rule says that it belongs to this VM"), None
    for name, line in dm.tables(host, "thin").items():
        if line.words[:2] == [pool.number, str(details["thin_id"])]:
            return r.outcome(token, r.IDENTITY_CHANGED, "%s is in use again, as %s" % (where, name)), None
    trouble = thin_pool.read_health(pool, host).trouble
    if trouble:
        holders = [r.holder("pool", "%s: %s" % (pool.name, trouble))]
        return r.outcome(token, r.DEFERRED, "%s remains: %s" % (where, trouble), holders=holders), None
    return None, pool


def _unproved(token, pool, host):
    """Return None when the pool's metadata prove that the thin id still stands for the token's volume."""
    details = token["details"]
    where = "thin id %d of pool %s" % (details["thin_id"], pool.name)
    if not details.get("record"):
        return r.outcome(token, r.DEFERRED, "%s remains: what it was before was not recorded" % where)
    try:
        now = thin_pool.records(pool, host).get(details["thin_id"])
    except ProbeError as err:
        return r.outcome(token, r.DEFERRED, "%s remains: %s" % (where, err))
    if now is None:
        return r.outcome(token, r.ALREADY_GONE, "%s was deleted" % where)
    if now["device"] != details["record"]["device"]:
        return r.outcome(token, r.IDENTITY_CHANGED, "%s is another volume now" % where)
    if not thin_pool.is_same(details["record"], now):
        return r.outcome(token, r.DEFERRED, "%s remains: nothing tells it from a new one" % where)
    return None
