# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Snapshots of containerd. One resource is one snapshot, named namespace/snapshotter/key.

containerd itself protects only a snapshot that has children. It removes without a word one that a container runs on,
that a lease keeps or that an image was unpacked into. So all that refers to a snapshot is listed as its holder, and
again right before it is removed.
"""

from __future__ import annotations

import json
import os

from .. import containerd, dm, mounts, processes
from .. import resource as r
from ..probe import ProbeError

KIND = "snapshot"
STOPS = False
DEPENDS_ON = ("container",)
RULE = dict(
    containerd.RULE,
    snapshotter={"type": "str", "default": "overlayfs"},
    # `ctr snapshots prepare` and `commit` pin all they make with the label containerd.io/gc.root. Such a snapshot is
    # left alone unless the rule says that pinned ones are meant too.
    pinned={"type": "bool", "default": False},
)

USAGE_SECONDS = 5.0
# The address and namespace of every daemon that this process let collect its garbage.
_nudged = set()
UPPER = "upperdir="


def collect(rules, host):
    """Return all snapshots whose key or label is that of a VM, in the namespaces and snapshotters of the rules."""
    names = r.Names(KIND, rules)
    found, foreign = [], 0
    for client in containerd.clients(KIND, rules, host):
        for snapshotter in _snapshotters(rules, client):
            snapshots = client.snapshots(snapshotter)
            referrers = _referrers(client, snapshotter, snapshots)[0]
            for snapshot in snapshots:
                vm_id, rule = _match(names, client, snapshotter, snapshot)
                if vm_id is None:
                    foreign += 1
                    continue
                holders = referrers.get(snapshot["name"], []) + _pins(snapshot, rule)
                found.append(_describe(client, snapshotter, snapshot, vm_id, holders))
    return {"resources": found, "foreign": foreign}


def inspect(token, rules, host):
    """Return None when this very snapshot is still there, ours, and nothing refers to it but leases that are over."""
    return _removable(token, rules, host)[0]


def remove(token, rules, host):
    """Remove a snapshot that nothing refers to. What only a lease that is over holds, containerd is asked to let go."""
    bytes_used = _usage(token, rules, host)
    refused, leases = _removable(token, rules, host)
    if refused is not None:
        return refused
    client, snapshotter, key = _locate(token, rules, host)
    if leases:
        _nudge(client)
        refused, leases = _removable(token, rules, host)
        if refused is not None and refused["outcome"] == r.ALREADY_GONE:
            return r.outcome(token, r.REAPED, "collected by containerd itself", bytes_given_back=bytes_used)
        if refused is not None or leases:
            return refused or r.outcome(token, r.DEFERRED, "containerd still has a lease that is over", holders=leases)
    try:
        client.remove_snapshot(snapshotter, key)
    except containerd.NotFound:
        return r.outcome(token, r.ALREADY_GONE)
    except containerd.FailedPrecondition as err:  # a child since the last look
        holders = _referrers(client, snapshotter, client.snapshots(snapshotter))[0].get(key, [])
        return r.outcome(token, r.DEFERRED, str(err), holders=holders)
    try:
        client.snapshot(snapshotter, key)
    except containerd.NotFound:
        return r.outcome(token, r.REAPED, bytes_given_back=bytes_used)
    return r.outcome(token, r.FAILED, "containerd says it was removed, and still has it")


def _removable(token, rules, host):
    """Return ``(OUTCOME | None, [HOLDER])``: None when it may be removed, but for these leases that are over."""
    client, snapshotter, key = _locate(token, rules, host)
    if client is None:
        return r.outcome(token, r.FAILED, "no rule looks into this namespace and snapshotter"), []
    try:
        snapshot = client.snapshot(snapshotter, key)
    except containerd.NotFound:
        return r.outcome(token, r.ALREADY_GONE), []
    if _identity(client, snapshotter, snapshot) != token["identity"]:
        return r.outcome(token, r.IDENTITY_CHANGED, "another snapshot of the same key is there now"), []
    vm_id, rule = _match(r.Names(KIND, rules), client, snapshotter, snapshot)
    if vm_id != token["vm_id"]:
        return r.outcome(token, r.FAILED, "by the rules it is not a snapshot of this VM"), []
    referrers, leases = _referrers(client, snapshotter, client.snapshots(snapshotter))
    holders = _pins(snapshot, rule) + referrers.get(key, [])
    try:
        holders += _used(client, snapshotter, snapshot, host)
    except containerd.NotFound:  # collected by containerd itself meanwhile, after its container
        return r.outcome(token, r.ALREADY_GONE), []
    if holders:
        return r.outcome(token, r.DEFERRED, "referred to by others", holders=holders), []
    return None, leases.get(key, [])


def _nudge(client):
    """Let containerd collect its garbage, expired leases with it, once for each sweep: it locks all its records."""
    where = (client.address, client.namespace)
    if where not in _nudged:
        _nudged.add(where)
        client.collect_garbage()


def witness(token, rules, host):
    """Return the record of the snapshot."""
    client, snapshotter, key = _locate(token, rules, host)
    if client is None:
        raise ProbeError("no rule looks into this namespace and snapshotter")
    snapshot = client.snapshot(snapshotter, key)
    if _identity(client, snapshotter, snapshot) != token["identity"]:
        raise ProbeError("another snapshot of the same key is there now")
    source = "containerd %s, Snapshots/Stat of %s" % (client.address, token["name"])
    return [{"title": KIND, "source": source, "text": containerd.as_text(snapshot)}]


def _describe(client, snapshotter, snapshot, vm_id, holders):
    parent = snapshot["parent"]
    return r.resource(
        KIND,
        _name(client, snapshotter, snapshot["name"]),
        vm_id,
        _identity(client, snapshotter, snapshot),
        holders=holders,
        age_seconds=containerd.age(snapshot["created_at"]),
        parent=_name(client, snapshotter, parent) if parent else None,
        details={
            "namespace": client.namespace,
            "snapshotter": snapshotter,
            "address": client.address,
            "kind": _kind(snapshot),
        },
    )


def _referrers(client, snapshotter, snapshots):
    """Return ``({key: [HOLDER]}, {key: [HOLDER]})``: the containers, children, leases and images that refer to each
    snapshot; and the leases that would, were they not over, which are containerd's to collect.

    Called after the snapshots were listed: what was made on one of them meanwhile is seen.
    """
    found, over = {}, {}
    containers, blobs, images = client.containers(), client.blobs(), client.images()
    for container in containers:
        name = r.holder("container", "%s/%s" % (client.namespace, container["id"]), kind="container")
        keys = {container["snapshot_key"]} if container["snapshotter"] == snapshotter else set()
        for key in keys | _labelled(container["labels"], snapshotter):
            found.setdefault(key, []).append(name)
    for child in snapshots:
        name = r.holder("child", _name(client, snapshotter, child["name"]), kind=KIND)
        for key in {child["parent"]} | _labelled(child["labels"], snapshotter):
            found.setdefault(key, []).append(name)
    for lease, key, is_over in client.leased_snapshots(snapshotter):
        (over if is_over else found).setdefault(key, []).append(r.holder("lease", containerd.printable(lease)))
    for name, labels in [(one["digest"], one["labels"]) for one in blobs] + [
        (one["name"], one["labels"]) for one in images
    ]:
        for key in _labelled(labels, snapshotter):
            found.setdefault(key, []).append(r.holder("image", containerd.printable(name)))
    there = {
        "container": {one["id"] for one in containers},
        "content": {one["digest"] for one in blobs},
        "image": {one["name"] for one in images},
        "snapshot." + snapshotter: {one["name"] for one in snapshots},
    }
    for snapshot in snapshots:
        for kind, name in _back_references(snapshot["labels"]):
            # What lies in a snapshotter that was not looked at may be there.
            if name in there.get(kind, [name]):
                found.setdefault(snapshot["name"], []).append(r.holder(kind, containerd.printable(name)))
    return found, over


def _back_references(labels):
    """Yield ``(kind, name)`` of what keeps an object from collection by labels of that object, like
    containerd.io/gc.bref.container (2.x)."""
    for label, name in labels.items():
        if label.startswith(containerd.GC_BACK_REFERENCE):
            kind = label[len(containerd.GC_BACK_REFERENCE) :].partition("/")[0]
            yield (kind if kind.startswith("snapshot.") else kind.partition(".")[0]), name


def _labelled(labels, snapshotter):
    """Return the keys that an object keeps from collection by labels like containerd.io/gc.ref.snapshot.overlayfs/1."""
    label = containerd.GC_REFERENCE + snapshotter
    return {key for name, key in labels.items() if name == label or name.startswith(label + "/")}


def _used(client, snapshotter, snapshot, host):
    """Return who uses an active snapshot's files, whether a container of its namespace or not: mounts in any mount
    namespace, and containers of any namespace whose spec has them.

    Where the files of a committed one are, containerd does not tell; its children use them, and are known.
    """
    if _kind(snapshot) == "committed":
        return []
    asked = client.snapshot_mounts(snapshotter, snapshot["name"])
    directories = {_directory(path) for mount in asked for path in _own_paths(mount)}
    devices = {number for number in [dm.number_of(mount["source"]) for mount in asked] if number}
    if not directories and not devices:
        return []
    found = [r.holder("mount", containerd.printable(point)) for point in mount_points(directories, devices)]
    for other in containerd.all_clients(client.address, host):
        for container in other.containers():
            if _has(container, directories, asked):
                found.append(r.holder("container", "%s/%s" % (other.namespace, containerd.printable(container["id"]))))
    return found


def _own_paths(mount):
    """Return the directories that a mount of a snapshot writes to, or is."""
    uppers = [option[len(UPPER) :] for option in mount["options"] if option.startswith(UPPER)]
    is_bind = mount["source"].startswith("/") and not mount["source"].startswith("/dev/")
    return uppers or ([mount["source"]] if is_bind else [])


def _directory(path):
    """Return the directory of a snapshot: its files are in one called fs beside those of overlayfs."""
    return os.path.dirname(path) if os.path.basename(path) == "fs" else path


def mount_points(directories, devices):
    """Return where any process sees something of these directories, or these block devices, mounted, or has something
    mounted in them: removing a directory would remove that too.
    """
    here, found, seen = mounts.by_device(mounts.read()), set(), set()
    for pid in ["self", *processes.pids()]:
        try:
            namespace = os.readlink("/proc/%s/ns/mnt" % pid)
            if namespace in seen:
                continue
            text = mounts.text(pid)
        except OSError:
            continue  # ended while we looked; others may be in the same namespace
        seen.add(namespace)
        uppers = mounts.points_with(text, UPPER, directories)
        for mount in mounts.parse(text):
            places = mounts.seen_as(mount, here)
            is_below = any(mounts.is_same_or_above(one, place) for one in directories for place in places)
            if is_below or mount.device in devices or mount.point in uppers:
                found.add(mount.point)
    return sorted(found)


def _has(container, directories, asked):
    """Tell whether the spec of a container has one of the directories, or a device among ``asked``, mounted."""
    text = (container["spec"] or {"value": ""})["value"]
    if not text:
        return False
    devices = {mount["source"] for mount in asked if mount["source"].startswith("/dev/")}
    try:
        paths = list(_spec_paths(json.loads(text)))
    except (ValueError, TypeError, AttributeError, RecursionError):
        return any(one in text for one in directories | devices)
    return any(mounts.is_same_or_above(one, path) for one in directories for path in paths) or bool(
        devices.intersection(paths)
    )


def _spec_paths(spec):
    """Yield the paths of the host in a container's spec: its root, sources of mounts, directories in their options."""
    yield str((spec.get("root") or {}).get("path") or "")
    for mount in spec.get("mounts") or []:
        yield str(mount.get("source") or "")
        for option in mount.get("options") or []:
            yield from str(option).partition("=")[2].split(":")


def _pins(snapshot, rule):
    pinned = containerd.GC_ROOT in snapshot["labels"] and not rule.get("pinned")
    return [r.holder("label", containerd.GC_ROOT)] if pinned else []


def _match(names, client, snapshotter, snapshot):
    return names.match(
        snapshot["name"],
        snapshot["labels"],
        lambda rule: containerd.looks_at(rule, client) and _snapshotter(rule) == snapshotter,
    )


def _identity(client, snapshotter, snapshot):
    return "%s@%s:%s:%s" % (
        _name(client, snapshotter, snapshot["name"]),
        containerd.stamp(snapshot["created_at"]),
        _kind(snapshot),
        containerd.printable(snapshot["parent"]) if snapshot["parent"] else "",
    )


def _kind(snapshot):
    return containerd.SNAPSHOT_KINDS.get(snapshot["kind"], "unknown")


def _name(client, snapshotter, key):
    return "%s/%s/%s" % (client.namespace, snapshotter, containerd.printable(key))


def _usage(token, rules, host):
    """Return what the snapshot takes; counting may be slow, and is given up then."""
    client, snapshotter, key = _locate(token, rules, host)
    try:
        return client.snapshot_usage(snapshotter, key, USAGE_SECONDS) if client else 0
    except ProbeError:
        return 0


def _locate(token, rules, host):
    """Return ``(client, snapshotter, key)`` of what the token names; no client where no rule looks there."""
    _namespace, _separator, rest = token["name"].partition("/")
    snapshotter, _separator, key = rest.partition("/")
    rules = [rule for rule in rules if _snapshotter(rule) == snapshotter]
    return containerd.client_for(KIND, token, rules, host), snapshotter, key


def _snapshotters(rules, client):
    return sorted({_snapshotter(rule) for rule in rules if containerd.looks_at(rule, client)})


def _snapshotter(rule):
    return rule.get("snapshotter") or "overlayfs"
