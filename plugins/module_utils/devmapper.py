# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The thin ids that containerd's devmapper snapshotter keeps account of.

A committed snapshot of it has no device, only a thin id, and its interface tells no ids. They are in a database of its
own, ``<root of the snapshotter>/<pool>.db``: a bucket ``devices``, which has what it knows of each device, in JSON, by
its name (``<pool>-snap-<n>``), and a bucket ``device_ids``, which has a byte for each id, 0 for one that is free again.
An id is written down there before it is made.
"""

from __future__ import annotations

import glob
import json
import os
import re

from . import bolt, containerd, processes
from .probe import ProbeError, read_text

SNAPSHOTTER = "devmapper"
FREE = b"\x00"
DELETED = " (deleted)"
# Where the databases of snapshotters lie whose containerd does not run now; one that runs has them open.
PLACES = (
    "/var/lib/*",
    "/var/lib/*/*",
    "/var/lib/*/*/*",
    "/var/lib/rancher/*/agent/containerd/*",
)
CONFIGURATIONS = (
    "/etc/*containerd*/*.toml",
    "/etc/*containerd*/*/*.toml",
    "/var/lib/rancher/*/agent/etc/containerd/*.toml",
)
_SETTING = re.compile(r"""^\s*(pool_name|root_path|root)\s*=\s*["']([^"'\n]*)["']""", re.MULTILINE)


def named(pools, used, addresses, host):
    """Return ``{pool: {thin id: device name}}`` of the snapshotter's records of these pools. Raises ProbeError.

    ``pools`` are the names of all pools of the host, ``used`` those in which a device has a name as the snapshotter
    gives it, ``addresses`` the sockets of containerd.
    """
    # Before its records: what it makes meanwhile is in them, and no more.
    snapshots = sum(_snapshots(address, host) for address in addresses)
    databases = _databases(pools)
    for pool in sorted(set(used) - set(databases)):
        raise ProbeError(
            "pool %s has devices that are called as those of containerd's devmapper snapshotter, whose records (%s.db) "
            "are not to be found" % (pool, pool)
        )
    found, devices = {}, 0
    for pool, paths in databases.items():
        found[pool], names = {}, set()
        for path in sorted(paths):
            ids, names_there = thin_ids(bolt.read(path), path)
            found[pool].update(ids)
            names |= names_there
        devices += len(names)
    if devices < snapshots:
        raise ProbeError(
            "containerd has %d snapshots in thin pools, and what is to be found of its records has %d devices: which "
            "thin ids are its own is not known" % (snapshots, devices)
        )
    return found


def thin_ids(database, path):
    """Return ``({thin id: device name}, {device name})``: all ids that are not free, and the devices it knows."""
    devices, states = database.get(b"devices"), database.get(b"device_ids")
    if not isinstance(devices, dict) or not isinstance(states, dict):
        raise ProbeError("%s is no database of containerd's devmapper snapshotter" % path)
    try:
        found = {int(number): "device id %d" % int(number) for number, state in states.items() if state != FREE}
        for name, text in devices.items():
            found[int(json.loads(text.decode())["device_id"])] = name.decode("utf-8", "replace")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as err:
        raise ProbeError("%s has a record that is not understood: %s" % (path, err)) from err
    return found, set(devices)


def _databases(pools):
    """Return ``{pool: [path]}``: what processes have open, and what lies where it usually does."""
    wanted, found = {pool + ".db": pool for pool in pools}, {}
    for path, name in _open_files():
        if name in wanted:
            found.setdefault(wanted[name], set()).add(path)
    for pool in pools:
        for place in PLACES:
            for path in glob.glob(os.path.join(place, glob.escape(pool + ".db"))):
                found.setdefault(pool, set()).add(path)
    for pool, path in _configured(pools):
        found.setdefault(pool, set()).add(path)
    return found


def _open_files():
    """Yield ``(path to open it by, its name)`` of all that processes have open."""
    for pid in processes.pids():
        directory = "/proc/%d/fd" % pid
        try:
            descriptors = os.listdir(directory)
        except OSError:
            continue  # ended while we looked
        for descriptor in descriptors:
            path = "%s/%s" % (directory, descriptor)
            try:
                target = os.readlink(path)
            except OSError:
                continue  # closed while we looked
            if target.startswith("/"):
                name = os.path.basename(target)
                yield path, name[: -len(DELETED)] if name.endswith(DELETED) else name


def _configured(pools):
    """Yield ``(pool, path of its database)`` for what a containerd is configured to use, whether it runs or not."""
    for path in sorted(path for pattern in CONFIGURATIONS for path in glob.glob(pattern)):
        try:
            settings = _SETTING.findall(read_text(path))
        except OSError as err:
            raise ProbeError("cannot read %s: %s" % (path, err.strerror)) from err
        roots = [value for key, value in settings if key == "root_path" and value]
        roots += [
            os.path.join(value, "io.containerd.snapshotter.v1.devmapper")
            for value in [value for key, value in settings if key == "root" and value] or ["/var/lib/containerd"]
        ]
        for pool in sorted({value for key, value in settings if key == "pool_name"} & set(pools)):
            there = [os.path.join(root, pool + ".db") for root in roots]
            there = [one for one in there if os.path.lexists(one)]
            if not there:
                raise ProbeError("%s gives pool %s to containerd, whose %s.db is not to be found" % (path, pool, pool))
            for one in there:
                yield pool, one


def _snapshots(address, host):
    """Return how many snapshots the daemon at that address has in thin pools, in all namespaces."""
    clients = containerd.all_clients(address, host)
    if not clients or not clients[0].has_snapshotter(SNAPSHOTTER):
        return 0
    return sum(len(client.snapshots(SNAPSHOTTER)) for client in clients)
