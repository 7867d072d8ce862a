# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The live manifest: which VMs live where, as one realm's control plane tells it, with proof that nothing is missing.

check() takes one document as a source returned it and refuses it or returns it in one shape. union() joins those of
several sources. Index keeps the result in a file that hands out each host's share, so that a manifest of a million VMs
is never held by a plan.

DOCUMENT ``{realm, generated_at, complete, vms: [{vm_id, host, state, also_on}]}`` and optionally ``source, epoch,
count, sha256, hosts, tombstones: [{vm_id, destroyed_at}], proven``
"""

from __future__ import annotations

import collections
import datetime
import hashlib
import math
import os
import sqlite3
import time
import urllib.parse

from ..module_utils.resource import VM_ID, is_text

# Only these say that a VM is gone. A state that is not known here is a live one.
TERMINAL_STATES = ("deleted", "destroyed", "saga_unwound", "terminated")
FUTURE_SECONDS = 300


class ManifestError(Exception):
    """A source cannot be believed. ``code`` is one word for it, the text says what is wrong and where."""

    def __init__(self, code, message):
        super().__init__(message)
        self.code = code


def check(document, source, *, now, max_age, terminal_states=TERMINAL_STATES):
    """Return one source's document as ``{realm, source, epoch, generated_at, age, count, proven, hosts, vms,
    tombstones}``.

    ``vms`` is a list of ``(vm_id, [host])`` (no host: it lives everywhere), ``tombstones`` maps ids to the seconds
    since they were destroyed (None: unknown), ``generated_at`` is in seconds since 1970, ``age`` in seconds. Raises
    ManifestError.
    """
    if not isinstance(document, dict):
        raise ManifestError("not_a_manifest", "%s: a mapping was expected, not %s" % (source, type(document).__name__))
    missing = [key for key in ("realm", "generated_at", "complete", "vms") if key not in document]
    if missing:
        raise ManifestError("not_a_manifest", "%s: the manifest has no %s" % (source, ", ".join(missing)))
    generated_at = _instant(document["generated_at"], "%s: generated_at" % source)
    _check_age(now - generated_at, max_age, source)
    if document["complete"] is not True:
        raise ManifestError("incomplete", "%s: the manifest does not call itself complete" % source)
    if not isinstance(document["vms"], list):
        raise ManifestError("not_a_manifest", "%s: 'vms' must be a list" % source)
    vms, dead = _sorted_out(document["vms"], source, {state.lower() for state in terminal_states})
    _check_count(document, source)
    hosts = _hosts(document, vms, source)
    tombstones = dict.fromkeys(dead)
    where = _Place(source, "tombstones")
    for where.number, tombstone in enumerate(_list(document, "tombstones", source)):
        vm_id, destroyed_at = _vm_id(tombstone, where), tombstone.get("destroyed_at")
        since = None if destroyed_at is None else now - _instant(destroyed_at, where)
        tombstones[vm_id] = _shorter(since, tombstones.get(vm_id))
    epoch = document.get("epoch")
    if epoch is not None and not _is_finite(epoch):
        raise ManifestError("not_a_manifest", "%s: 'epoch' must be a number, not %.200r" % (source, epoch))
    return {
        "realm": _text(document["realm"], "%s: realm" % source),
        "source": source,
        "epoch": epoch,
        "generated_at": generated_at,
        "age": max(0.0, now - generated_at),
        "count": len({vm_id for vm_id, _hosts_of_it in vms}),
        "proven": document.get("proven", True) is True,
        "hosts": hosts,
        "vms": vms,
        "tombstones": tombstones,
    }


def union(manifests):
    """Return one manifest for several of the same realm: what lives in any of them lives.

    Hosts are those that any source speaks for; unknown as soon as one source does not say which it speaks for.
    """
    first = manifests[0]
    others = [one for one in manifests if one["realm"] != first["realm"]]
    if others:
        raise ManifestError(
            "other_realm",
            "the live sources speak for different realms: %s for %r, %s for %r"
            % (first["source"], first["realm"], others[0]["source"], others[0]["realm"]),
        )
    vms = [vm for one in manifests for vm in one["vms"]]
    live = {vm_id for vm_id, _hosts_of_it in vms}
    tombstones = {}
    for one in manifests:
        for vm_id, since in one["tombstones"].items():
            if vm_id not in live:
                tombstones[vm_id] = _shorter(since, tombstones.get(vm_id))
    return {
        "realm": first["realm"],
        "source": ", ".join(one["source"] for one in manifests),
        "epoch": first["epoch"] if len(manifests) == 1 else None,
        "epochs": {one["source"]: one["epoch"] for one in manifests if one["epoch"] is not None},
        "generated_at": min(one["generated_at"] for one in manifests),
        "age": max(one["age"] for one in manifests),
        "count": len(live),
        "proven": all(one["proven"] for one in manifests),
        "hosts": None if any(one["hosts"] is None for one in manifests) else sorted({
            host for one in manifests for host in one["hosts"]
        }),
        "vms": vms,
        "tombstones": tombstones,
    }


def sha256(vm_ids):
    """Return the checksum a manifest may carry: of its sorted, distinct ids, each followed by a newline."""
    return hashlib.sha256("".join("%s\n" % vm_id for vm_id in sorted(set(vm_ids))).encode()).hexdigest()


class Index:
    """A manifest in a local file, asked for one host's share at a time."""

    def __init__(self, path):
        self.path = path

    @classmethod
    def write(cls, path, manifest):
        """Write ``manifest`` (of union()) to the new file ``path``."""
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        os.close(descriptor)
        connection = sqlite3.connect(path)
        with connection:
            connection.execute("PRAGMA journal_mode = OFF")
            connection.execute("PRAGMA synchronous = OFF")
            connection.execute("CREATE TABLE vm (host TEXT, vm_id TEXT, PRIMARY KEY (host, vm_id)) WITHOUT ROWID")
            connection.execute("CREATE TABLE tombstone (vm_id TEXT PRIMARY KEY, since REAL) WITHOUT ROWID")
            connection.execute("CREATE TABLE host (name TEXT PRIMARY KEY) WITHOUT ROWID")
            # In order, and the second index at the end: half the time of trees that grow at random places.
            places = _by_host(manifest["vms"])
            ordered = ((host, vm_id) for host in sorted(places) for vm_id in sorted(places[host]))
            connection.executemany("INSERT OR IGNORE INTO vm VALUES (?, ?)", ordered)
            connection.execute("CREATE INDEX by_id ON vm (vm_id)")
            connection.executemany("INSERT INTO tombstone VALUES (?, ?)", manifest["tombstones"].items())
            connection.executemany(
                "INSERT OR IGNORE INTO host VALUES (?)", ((name,) for name in manifest["hosts"] or [])
            )
        connection.close()
        return cls(path)

    def look_up(self, vm_ids, host, any_host_protects):
        """Return ``{live, elsewhere, tombstones, host_listed}`` for these ids on this host.

        ``any_host_protects``: the manifest does not say which hosts it speaks for, so a VM that is named on another one
        may be here all the same under a name of this host that we do not know.
        """
        elsewhere, tombstones = {}, {}
        connection = sqlite3.connect("file:%s?mode=ro" % urllib.parse.quote(self.path), uri=True)
        try:
            # Most of what is on a host lives there: one range of the index. Only the others are looked up one by one.
            here = connection.execute("SELECT vm_id FROM vm WHERE host = ?", (host,))
            live = vm_ids & {vm_id for vm_id, in here}
            for part in _parts(sorted(vm_ids - live)):
                marks = ",".join("?" * len(part))
                for vm_id, where in connection.execute("SELECT vm_id, host FROM vm WHERE vm_id IN (%s)" % marks, part):
                    if any_host_protects or not where:
                        live.add(vm_id)
                    else:
                        elsewhere.setdefault(vm_id, set()).add(where)
            for part in _parts(sorted(vm_ids - live)):
                marks = ",".join("?" * len(part))
                tombstones.update(
                    connection.execute("SELECT vm_id, since FROM tombstone WHERE vm_id IN (%s)" % marks, part)
                )
            listed = connection.execute("SELECT 1 FROM host WHERE name = ?", (host,)).fetchone() is not None
        finally:
            connection.close()
        return {
            "live": sorted(live),
            "elsewhere": {vm_id: sorted(hosts) for vm_id, hosts in sorted(elsewhere.items()) if vm_id not in live},
            "tombstones": tombstones,
            "host_listed": listed,
        }


def _by_host(vms):
    """Return ``{host: [vm_id]}``; those without a host are at ``""``."""
    places = collections.defaultdict(list)
    for vm_id, hosts in vms:
        for host in hosts or ("",):
            places[host].append(vm_id)
    return places


def _parts(ids):
    """Yield parts of a list that are short enough for one statement."""
    return (ids[begin:begin + 500] for begin in range(0, len(ids), 500))


def handle(manifest, path):
    """Write the index of ``manifest`` to ``path``; return the small HANDLE that plans are made with.

    HANDLE ``{realm, source, epoch, epochs, generated_at, age, count, proven, names_hosts, index}``
    """
    Index.write(path, manifest)
    kept = ("realm", "source", "epoch", "epochs", "generated_at", "age", "count", "proven")
    return dict(
        {key: manifest[key] for key in kept}, names_hosts=manifest["hosts"] is not None, index=path
    )


def share(manifest_handle, host, vm_ids):
    """Return what the planner needs to know of the manifest: this host's share, and only the ids asked for."""
    found = Index(manifest_handle["index"]).look_up(vm_ids, host, not manifest_handle["names_hosts"])
    listed = found.pop("host_listed")
    return dict(manifest_handle, **found, host_known=listed or not manifest_handle["names_hosts"])


def _check_age(age, max_age, source):
    if age > max_age:
        raise ManifestError(
            "stale",
            "%s: the manifest is %d s old, more than reap_manifest_max_age=%d" % (source, age, max_age),
        )
    if age < -FUTURE_SECONDS:
        raise ManifestError(
            "from_the_future",
            "%s: the manifest was generated %d s in the future; compare the clocks" % (source, -age),
        )


def _check_count(document, source):
    count, listed = document.get("count"), len(document["vms"])
    if count is not None and count != listed:
        raise ManifestError("incomplete", "%s: 'count' is %.200r, but %d VMs are listed" % (source, count, listed))
    checksum = document.get("sha256")
    if checksum is not None and checksum != sha256(vm["vm_id"] for vm in document["vms"]):
        raise ManifestError("incomplete", "%s: 'sha256' does not belong to the VMs that are listed" % source)


def _sorted_out(entries, source, terminal_states):
    """Return ``([(vm_id, [host])], {ids in a terminal state})``.

    A million VMs have a few states and some thousand hosts: what was found good once is not looked at again.
    """
    vms, dead = [], set()
    is_terminal, alone_on = {}, {}
    where = _Place(source, "vms")
    for where.number, vm in enumerate(entries):
        vm_id = _vm_id(vm, where)
        state = vm.get("state")
        if state is not None:
            if not isinstance(state, str) or state not in is_terminal:
                is_terminal[state] = _text(state, where, ".state").lower() in terminal_states
            if is_terminal[state]:
                dead.add(vm_id)
                continue
        host, also_on = vm.get("host"), vm.get("also_on")
        if also_on is not None:
            also_on = _list(vm, "also_on", where)
        if host is None:
            hosts = []
        elif also_on:
            hosts = [_text(one, where, ".host") for one in [host] + also_on]
        elif isinstance(host, str) and host in alone_on:
            hosts = alone_on[host]
        else:
            hosts = alone_on[host] = [_text(host, where, ".host")]
        vms.append((vm_id, hosts))
    live = {vm_id for vm_id, _hosts_of_it in vms}
    return vms, dead - live


def _hosts(document, vms, source):
    """Return the hosts that the source speaks for, None where it does not say."""
    if document.get("hosts") is None:
        return None
    known = {_text(host, "%s: hosts" % source) for host in _list(document, "hosts", source)}
    for vm_id, where in vms:
        if not known.issuperset(where):
            strange = next(host for host in where if host not in known)
            raise ManifestError(
                "unknown_host",
                "%s: the VM %s is on host %r, which is not in the manifest's hosts; a host that goes by two names "
                "would look empty" % (source, vm_id, strange),
            )
    return sorted(known)


class _Place:
    """Where in a document an entry stands; put into words only when there is something to say about it."""

    def __init__(self, source, key):
        self.source, self.key, self.number = source, key, 0

    def __str__(self):
        return "%s: %s[%d]" % (self.source, self.key, self.number)


def _vm_id(entry, where):
    if not isinstance(entry, dict) or not isinstance(entry.get("vm_id"), str):
        raise ManifestError("not_a_manifest", "%s: a mapping with a text 'vm_id' was expected: %.200r" % (where, entry))
    if not VM_ID.fullmatch(entry["vm_id"]):
        raise ManifestError(
            "not_a_manifest",
            "%s: %.200r cannot be the id of a VM (letters, digits and ._:@+- after the first, at most 128)"
            % (where, entry["vm_id"]),
        )
    return entry["vm_id"]


def _list(mapping, key, where):
    value = mapping.get(key)
    if value is not None and not isinstance(value, list):
        raise ManifestError("not_a_manifest", "%s: '%s' must be a list, not %.200r" % (where, key, value))
    return value or []


def _text(value, where, key=""):
    if not isinstance(value, str) or not is_text(value):
        raise ManifestError("not_a_manifest", "%s%s: a text was expected, not %.200r" % (where, key, value))
    return value


def _is_finite(value):
    """Tell whether it is a number that can be compared: neither NaN nor infinite, nor too large to be a float."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def _shorter(since, other):
    """Return the shorter of two times, of which any may be unknown."""
    known = [one for one in (since, other) if one is not None]
    return min(known) if known else None


def _instant(value, where):
    """Return seconds since 1970 of a number or of an ISO 8601 text with a time zone."""
    if _is_finite(value):
        return float(value)
    if isinstance(value, datetime.datetime):
        parsed = value
    else:
        try:
            parsed = datetime.datetime.fromisoformat(_text(value, where).replace("Z", "+00:00"))
        except ValueError as err:
            raise ManifestError("not_a_manifest", "%s: not an instant: %.200r" % (where, value)) from err
    if parsed.tzinfo is None:
        raise ManifestError("not_a_manifest", "%s: %s has no time zone; write for example %sZ" % (where, value, value))
    return parsed.timestamp()


def now():
    """Return seconds since 1970, for the doors; nothing else here looks at a clock."""
    return time.time()
