# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Thin ids in a pool's metadata that stand for a volume which nobody has and nobody names. One resource is one id.

A volume that was deactivated is only a number in its pool, without a name, so no rule can tell whose it was. That is
why a rule names pools, of which a person says that they are for VMs alone, and why an id counts as one that is left
over only when five views agree on it: the pool's metadata have it, no active device maps it, containerd's devmapper
snapshotter has no record of it, no ledger of this host says that the reaper itself put it there, and no pool is looked
at that LVM, Stratis or Docker manages. Whatever cannot be read makes the whole kind unavailable.

To read the metadata of a live pool its metadata snapshot is reserved and released: see thin_pool.py.

The VM of an id is made up, ``thin:<pool>:<id>``. Its identity is what the metadata say of it, which outlives a reboot;
whoever uses the volume changes them, or is seen to have it.
"""

from __future__ import annotations

import collections
import os
import re

from .. import containerd, devmapper, dm, thin_pool
from .. import ledger as ledgers
from .. import resource as r
from ..probe import Absent, ProbeError

KIND = "thin_id"
STOPS = False
DEPENDS_ON = ("container", "snapshot", "dm_thin")
RULE = {
    "pool": {"type": "str", "required": True},
    "address": {"type": "str", "default": containerd.ADDRESS},
}

DOCKERS_POOL = re.compile(r"docker-\d+:\d+-\d+-pool")
MAPPED_BLOCKS = 3  # its place in what a RECORD says of a device

# ``block_bytes``: what one block of it holds; ``records``: see thin_pool.records().
View = collections.namedtuple("View", "pool block_bytes records")


def collect(rules, host):
    """Return all thin ids of the rules' pools that are mapped by no device and named by nobody."""
    there = dm.devices(host)
    views = [_view(pool, host) for pool in _pools(rules, there, host)]
    if not views:
        raise Absent("none of the pools %s is active here" % ", ".join(sorted({rule["pool"] for rule in rules})))
    # After the metadata: an id that was made or put aside meanwhile is not in them, or is seen to be in use.
    named = _named([view.pool for view in views], rules, host)
    found, foreign = [], 0
    for view in views:
        for thin_id, record in sorted(view.records.items()):
            if thin_id in named[view.pool.number]:
                continue
            if r.VM_ID.fullmatch(_vm_id(view.pool, thin_id)):
                found.append(_describe(view, thin_id, record))
            else:
                foreign += 1
    return {"resources": found, "foreign": foreign}


def inspect(token, rules, host):
    """Return None when the id still stands for the same volume, nobody has or names it, and its pool takes deletes."""
    return _removable(token, rules, host)[0]


def remove(token, rules, host):
    """Delete the thin id, so that its blocks go back to the pool. The kernel refuses that of an active volume."""
    refused, pool = _removable(token, rules, host)
    if refused is not None:
        return refused
    given_back, complaint = thin_pool.delete(pool, token["details"]["thin_id"], host)
    if dm.BUSY in complaint:
        return r.outcome(token, r.DEFERRED, "activated meanwhile")
    if complaint:
        return r.outcome(token, r.FAILED, complaint)
    return r.outcome(token, r.REAPED, bytes_given_back=given_back)


def witness(token, _rules, host):
    """Return what the metadata said of the id when it was found, and the status of its pool; one command for all."""
    pool = host.once("dm status thin-pool", lambda: dm.statuses(host, "thin-pool")).get(token["details"]["pool"])
    lines = ["%s: %s" % pair for pair in sorted(token["details"].items())]
    lines.append("status of the pool: %s" % (" ".join(pool.words) if pool else "none"))
    source = "dmsetup status of all pools; thin_dump when it was found: %s" % token["name"]
    return [{"title": KIND, "source": source, "text": "\n".join(lines) + "\n"}]


def _pools(rules, devices, host):
    """Return the active pools that the rules name. Raises ProbeError for what is none, or another manager's."""
    wanted = {rule["pool"] for rule in rules}
    pools = thin_pool.pools(devices, host)
    found = []
    for device in sorted(devices.values()):
        if device.name not in wanted:
            continue
        if device.number not in pools:
            raise ProbeError("%s is no thin pool; name only pools in reap_thin_pools" % device.name)
        manager = _manager(device)
        if manager:
            raise ProbeError(
                "pool %s is managed by %s, which keeps account of its ids; take it out of reap_thin_pools"
                % (device.name, manager)
            )
        if device.suspended:
            raise ProbeError("pool %s is suspended" % device.name)
        found.append(pools[device.number][0])
    return found


def _manager(pool):
    for prefix, manager in thin_pool.MANAGERS:
        if pool.uuid.startswith(prefix):
            return manager
    return "docker" if DOCKERS_POOL.fullmatch(pool.name) else None


def _view(pool, host):
    _state_dir(host)
    records = thin_pool.records(pool, host)
    table = dm.tables(host, "thin-pool").get(pool.name)
    blocks = table.words[2] if table and len(table.words) > 2 else ""
    return View(pool, int(blocks) * dm.SECTOR if blocks.isdigit() else None, records)


def _describe(view, thin_id, record):
    mapped = record["device"][MAPPED_BLOCKS]
    pool = view.pool
    # Nothing in the metadata tells an empty volume from one that was made under the same number a moment ago.
    holders = [] if mapped else [r.holder("empty volume", "thin id %d of pool %s" % (thin_id, pool.name))]
    return r.resource(
        KIND,
        "%s/%d" % (pool.name, thin_id),
        _vm_id(pool, thin_id),
        _identity(pool, thin_id, record),
        holders=holders,
        bytes_used=None if view.block_bytes is None else mapped * view.block_bytes,
        details={"pool": pool.name, "pool_uuid": pool.uuid, "thin_id": thin_id, "record": record},
    )


def _vm_id(pool, thin_id):
    return "thin:%s:%d" % (pool.name, thin_id)


def _identity(pool, thin_id, record):
    return "%s:%d:%s" % (thin_pool.identity(pool), thin_id, "-".join(str(number) for number in record["device"]))


def _removable(token, rules, host):
    """Return ``(OUTCOME | None, Pool)``; None when the token's thin id may be deleted now."""
    details = token["details"]
    rules = [rule for rule in rules if rule["pool"] == details["pool"]]
    if not rules or token["vm_id"] != "thin:%(pool)s:%(thin_id)d" % details:
        return r.outcome(token, r.FAILED, "no rule names its pool"), None
    pools = _pools(rules, dm.devices(host), host)
    if not pools:
        return r.outcome(token, r.DEFERRED, "its pool is not active"), None
    (pool,) = pools
    trouble = thin_pool.read_health(pool, host).trouble
    if trouble:
        holders = [r.holder("pool", "%s: %s" % (pool.name, trouble))]
        return r.outcome(token, r.DEFERRED, trouble, holders=holders), None
    now = thin_pool.records(pool, host).get(details["thin_id"])
    if now is None:
        return r.outcome(token, r.ALREADY_GONE), None
    if _identity(pool, details["thin_id"], now) != token["identity"]:
        return r.outcome(token, r.IDENTITY_CHANGED, "it is another volume now, or it was used"), None
    if not thin_pool.is_same(details["record"], now):
        return r.outcome(token, r.DEFERRED, "nothing tells it from a new one"), None
    holder = _named([pool], rules, host)[pool.number].get(details["thin_id"])
    if holder:
        return r.outcome(token, r.DEFERRED, "%(type)s %(name)s has it" % holder, holders=[holder]), None
    return None, pool


def _named(pools, rules, host):
    """Return ``{number of the pool: {thin id: HOLDER}}`` of all that map or name an id of these pools."""
    found = {pool.number: {} for pool in pools}
    for pool in pools:
        for thin_id in _put_aside(pool, host):
            found[pool.number][thin_id] = r.holder("ledger", "thin id %d" % thin_id)
    for name, thin_ids in _of_containerd(rules, host).items():
        for pool in pools:
            if pool.name == name:
                for thin_id, device in thin_ids.items():
                    found[pool.number][thin_id] = r.holder("containerd_snapshotter", containerd.printable(device))
    # Last, because it is the one that changes most.
    for number, thin_id in mapped(host):
        if number in found:
            found[number][thin_id] = r.holder("device", "of thin id %d" % thin_id)
    return found


def mapped(host):
    """Return ``{(number of the pool, thin id)}`` of all tables, those too that are loaded and not yet active.

    A name that holds a newline can only add to them.
    """
    listed = [dm.listing(host, "table", *options, "--target", "thin") for options in ((), ("--inactive",))]
    pattern = re.compile(" thin ([0-9]{1,10}:[0-9]{1,10}) ([0-9]{1,10})(?![^ \n])")
    return {(number, int(thin_id)) for text in listed for number, thin_id in pattern.findall(text)}


def _of_containerd(rules, host):
    """Return ``{pool: {thin id: device name}}`` of containerd's devmapper snapshotter, for all pools of the host."""
    devices = dm.devices(host)
    names = {one.name for one, _health in thin_pool.pools(devices, host).values()}
    called = {device.name.rpartition("-snap-")[0] for device in devices.values() if _is_snapshot(device.name)}
    addresses = sorted({rule.get("address") or containerd.ADDRESS for rule in rules})
    return devmapper.named(sorted(names), sorted(called & names), addresses, host)


def _is_snapshot(name):
    return re.fullmatch(r".+-snap-\d+", name) is not None


def _put_aside(pool, host):
    """Return the thin ids that this host's reapers deactivated and still mean to finish or to bring back."""
    found = set()
    for ledger in _ledgers(host.state_dir):
        for one in ledger["intents"] + ledger.get("aside", []):
            details = one.get("details") or {}
            is_here = pool.name == details.get("pool") or pool.uuid and pool.uuid == details.get("pool_uuid")
            if one.get("kind") != KIND and is_here and isinstance(details.get("thin_id"), int):
                found.add(details["thin_id"])
    return found


def _ledgers(state_dir):
    """Return the ledgers of all realms. Raises ProbeError when what one of them says is not known."""
    found = []
    try:
        for realm in ledgers.other_realms(state_dir, None):
            ledger, problem = ledgers.load(state_dir, realm)
            lost = ledgers.path_of(state_dir, realm) + ".corrupt"
            if problem or os.path.lexists(lost):
                raise ProbeError(
                    problem or "%s may name thin ids that were put aside; remove it when you have looked" % lost
                )
            found.append(ledger)
    except ledgers.LedgerError as err:
        raise ProbeError(str(err)) from err
    return found


def _state_dir(host):
    """Make the directory in which our metadata snapshot is noted, where no sweep has written anything yet."""
    if host.state_dir is None:
        raise ProbeError("there is no state directory in which to note the metadata snapshot")
    try:
        ledgers.own_directory(host.state_dir)
    except ledgers.LedgerError as err:
        raise ProbeError(str(err)) from err
