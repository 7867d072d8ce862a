# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Snapshots of containerd. One resource is one snapshot, named namespace/snapshotter/key.

containerd itself protects only a snapshot that has children. It removes without a word one that a container runs on,
that a lease keeps or that an image was unpacked into. So all that refers to a snapshot is listed as its holder, and
again right before it is removed.
"""

from __future__ import annotations

from .. import containerd, mounts
from .. import resource as r
from ..probe import ProbeError, read_text

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


def collect(rules, host):
    """Return all snapshots whose key or label is that of a VM, in the namespaces and snapshotters of the rules."""
    names = r.Names(KIND, rules)
    found, foreign = [], 0
    for client in containerd.clients(KIND, rules, host):
        for snapshotter in _snapshotters(rules, client):
            snapshots = client.snapshots(snapshotter)
            referrers = _referrers(client, snapshotter, snapshots)
            for snapshot in snapshots:
                vm_id, rule = _match(names, client, snapshotter, snapshot)
                if vm_id is None:
                    foreign += 1
                    continue
                holders = referrers.get(snapshot["name"], []) + _pins(snapshot, rule)
                found.append(_describe(client, snapshotter, snapshot, vm_id, holders))
    return {"resources": found, "foreign": foreign}


def inspect(token, rules, host):
    """Return None when this very snapshot is still there, ours, and nothing refers to it."""
    client, snapshotter, key = _locate(token, rules, host)
    if client is None:
        return r.outcome(token, r.FAILED, "no rule looks into this namespace and snapshotter")
    try:
        snapshot = client.snapshot(snapshotter, key)
    except containerd.NotFound:
        return r.outcome(token, r.ALREADY_GONE)
    if _identity(client, snapshotter, snapshot) != token["identity"]:
        return r.outcome(token, r.IDENTITY_CHANGED, "another snapshot of the same key is there now")
    vm_id, rule = _match(r.Names(KIND, rules), client, snapshotter, snapshot)
    if vm_id != token["vm_id"]:
        return r.outcome(token, r.FAILED, "by the rules it is not a snapshot of this VM")
    holders = _pins(snapshot, rule) + _referrers(client, snapshotter, client.snapshots(snapshotter)).get(key, [])
    try:
        holders += _mounted(client, snapshotter, snapshot)
    except containerd.NotFound:  # collected by containerd itself meanwhile, after its container
        return r.outcome(token, r.ALREADY_GONE)
    if holders:
        return r.outcome(token, r.DEFERRED, "referred to by others", holders=holders)
    return None


def remove(token, rules, host):
    """Remove a snapshot that nothing refers to."""
    bytes_used = _usage(token, rules, host)
    refused = inspect(token, rules, host)
    if refused is not None:
        return refused
    client, snapshotter, key = _locate(token, rules, host)
    try:
        client.remove_snapshot(snapshotter, key)
    except containerd.NotFound:
        return r.outcome(token, r.ALREADY_GONE)
    except containerd.FailedPrecondition as err:  # a child since the last look
        holders = _referrers(client, snapshotter, client.snapshots(snapshotter)).get(key, [])
        return r.outcome(token, r.DEFERRED, str(err), holders=holders)
    try:
        client.snapshot(snapshotter, key)
    except containerd.NotFound:
        return r.outcome(token, r.REAPED, bytes_given_back=bytes_used)
    return r.outcome(token, r.FAILED, "containerd says it was removed, and still has it")


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
    """Return ``{key: [HOLDER]}``: the containers, children, leases and images that refer to each snapshot.

    Called after the snapshots were listed: what was made on one of them meanwhile is seen.
    """
    found = {}
    for container in client.containers():
        name = r.holder("container", "%s/%s" % (client.namespace, container["id"]), kind="container")
        keys = {container["snapshot_key"]} if container["snapshotter"] == snapshotter else set()
        for key in keys | _labelled(container["labels"], snapshotter):
            found.setdefault(key, []).append(name)
    for child in snapshots:
        name = r.holder("child", _name(client, snapshotter, child["name"]), kind=KIND)
        for key in {child["parent"]} | _labelled(child["labels"], snapshotter):
            found.setdefault(key, []).append(name)
    for lease, key in client.leased_snapshots(snapshotter):
        found.setdefault(key, []).append(r.holder("lease", containerd.printable(lease)))
    for digest, key in client.image_snapshots(snapshotter):
        found.setdefault(key, []).append(r.holder("image", containerd.printable(digest)))
    return found


def _labelled(labels, snapshotter):
    """Return the keys that an object keeps from collection by labels like containerd.io/gc.ref.snapshot.overlayfs/1."""
    label = containerd.GC_REFERENCE + snapshotter
    return {key for name, key in labels.items() if name == label or name.startswith(label + "/")}


def _mounted(client, snapshotter, snapshot):
    """Return where an active snapshot is mounted, with or without a container: whoever did that uses it."""
    if _kind(snapshot) == "committed":
        return []
    marks = set()
    for mount in client.snapshot_mounts(snapshotter, snapshot["name"]):
        marks |= {option for option in mount["options"] if option.startswith("upperdir=")}
        marks |= {mount["source"]} if mount["source"].startswith("/dev/") else set()
    found = mount_points(read_text("/proc/self/mountinfo", 1 << 24), marks)
    return [r.holder("mount", containerd.printable(point)) for point in found]


def mount_points(mountinfo, marks):
    """Return the mount points in the text of mountinfo whose source or one of whose options is among ``marks``."""
    found = []
    for line in mountinfo.split("\n"):
        before, _separator, after = line.partition(" - ")
        where, fields = before.split(" "), after.split(" ")
        if len(where) < 5 or len(fields) < 3:
            continue
        # A mount has few words, and only those that the kernel had to escape are not as they were given.
        if not marks.isdisjoint(map(mounts.unescape, [fields[1]] + fields[2].split(","))):
            found.append(where[4])
    return found


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
