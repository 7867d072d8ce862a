# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The live manifest: which VMs live where, as one realm's control plane tells it, with proof that nothing is missing.

Collector takes the documents of several sources, checks them, and writes them to an index, a file that hands out each
host's share: a manifest of a million VMs is never in memory. check() and union() do the same in memory.

DOCUMENT ``{realm, generated_at, complete, vms: [{vm_id, host, state, also_on}]}`` and optionally ``source, epoch,
count, sha256, hosts, tombstones: [{vm_id, destroyed_at}], proven, unproven``. ``vms`` may be any iterable, which is
taken once; ``realm, generated_at, hosts`` must be there before, everything else only when it is exhausted. ``proven``
is False where nothing shows that the list is complete, ``unproven`` says why.
"""

from __future__ import annotations

import datetime
import hashlib
import math
import os
import sqlite3
import time
import urllib.parse
from collections.abc import Iterator

from ..module_utils.resource import VM_ID, is_text

# Only these say that a VM is gone. A state that is not known here is a live one.
TERMINAL_STATES = ("deleted", "destroyed", "saga_unwound", "terminated")
# The clocks of control plane and controller may differ by so much: the other half of the minute that reap_min_age gives
# a new VM to be listed. A list from further in the future shows that they differ by more.
FUTURE_SECONDS = 30


class ManifestError(Exception):
    """A source cannot be believed. ``code`` is one word for it, the text says what is wrong and where."""

    def __init__(self, code, message):
        super().__init__(message)
        self.code = code


def check(document, source, *, now, max_age, terminal_states=TERMINAL_STATES):
    """Return one source's document as ``{realm, source, epoch, generated_at, age, count, proven, unproven, hosts, vms,
    tombstones}``.

    ``vms`` is a list of ``(vm_id, [host])`` (no host: it lives everywhere), ``tombstones`` maps ids to the seconds
    since they were destroyed (None: unknown), ``generated_at`` is in seconds since 1970, ``age`` in seconds,
    ``unproven`` says why the list is not. Raises ManifestError.
    """
    head = _opened(document, source, now, max_age)
    listed = list(_entries(document["vms"], source, terminal_states, head["hosts"]))
    vms = [(vm_id, hosts) for vm_id, hosts in listed if hosts is not None]
    live = {vm_id for vm_id, _hosts in vms}
    tombstones = dict.fromkeys(vm_id for vm_id, hosts in listed if hosts is None and vm_id not in live)
    for vm_id, since in _tombstones(document, source, now):
        tombstones[vm_id] = _shorter(since, tombstones.get(vm_id))
    return dict(
        _closed(document, head, len(listed), lambda: (vm_id for vm_id, _hosts in listed)),
        count=len(live),
        vms=vms,
        tombstones=tombstones,
    )


def union(manifests):
    """Return one manifest for several of the same realm: what lives in any of them lives.

    Hosts are those that any source speaks for; unknown as soon as one source does not say which it speaks for.
    """
    joined = _joined(manifests)
    vms = [vm for one in manifests for vm in one["vms"]]
    live = {vm_id for vm_id, _hosts_of_it in vms}
    tombstones = {}
    for one in manifests:
        for vm_id, since in one["tombstones"].items():
            if vm_id not in live:
                tombstones[vm_id] = _shorter(since, tombstones.get(vm_id))
    return dict(joined, count=len(live), vms=vms, tombstones=tombstones)


def _joined(manifests):
    """Return what several manifests say together of themselves, all but the VMs."""
    first = manifests[0]
    others = [one for one in manifests if one["realm"] != first["realm"]]
    if others:
        raise ManifestError(
            "other_realm",
            "the live sources speak for different realms: %s for %r, %s for %r"
            % (first["source"], first["realm"], others[0]["source"], others[0]["realm"]),
        )
    unproven = ["%s: %s" % (one["source"], one["unproven"]) for one in manifests if one["unproven"]]
    return {
        "realm": first["realm"],
        "source": ", ".join(one["source"] for one in manifests),
        "epoch": first["epoch"] if len(manifests) == 1 else None,
        "epochs": {one["source"]: one["epoch"] for one in manifests if one["epoch"] is not None},
        "counts": {one["source"]: one["count"] for one in manifests},
        "generated_at": min(one["generated_at"] for one in manifests),
        "age": max(one["age"] for one in manifests),
        "proven": not unproven,
        "unproven": unproven,
        "hosts": None if any(one["hosts"] is None for one in manifests) else sorted({
            host for one in manifests for host in one["hosts"]
        }),
    }


def sha256(vm_ids):
    """Return the checksum a manifest may carry: of its sorted, distinct ids, each followed by a newline."""
    return hashlib.sha256("".join("%s\n" % vm_id for vm_id in sorted(set(vm_ids))).encode()).hexdigest()


class Collector:
    """Checks the documents of several sources and joins them in an index, one VM after the other."""

    def __init__(self, path):
        self._writer = _Writer(path)
        self._path = path
        self._heads = []

    def add(self, document, source, *, now, max_age, terminal_states=TERMINAL_STATES):
        """Take one source's document. Raises ManifestError, and forgets then what it took of it."""
        number = len(self._heads)
        try:
            head = _opened(document, source, now, max_age)
            listed = self._writer.add_vms(number, _entries(document["vms"], source, terminal_states, head["hosts"]))
            self._writer.add_tombstones(number, _tombstones(document, source, now))
            self._heads.append(_closed(document, head, listed, lambda: self._writer.vm_ids(number)))
        except ManifestError:
            self._writer.drop(number)
            raise

    def finish(self):
        """Return the HANDLE of what all sources list together."""
        self._writer.index()
        joined = _joined([dict(head, count=self._writer.count(number)) for number, head in enumerate(self._heads)])
        count = next(iter(joined["counts"].values())) if len(self._heads) == 1 else self._writer.count()
        self._writer.close(joined["hosts"])
        return _handle(dict(joined, count=count), self._path)


def live_among(vm_ids, document, source, handle, *, now, max_age, terminal_states=TERMINAL_STATES):
    """Return ``{vm_id: [host]}`` of those of ``vm_ids`` that a later document of the source lists; no host: everywhere.

    Raises ManifestError, also for a document that is older than the one of which ``handle`` was made.
    """
    head = _opened(document, source, now, max_age)
    if head["realm"] != handle["realm"]:
        raise ManifestError("other_realm", "%s speaks for realm %r now" % (source, head["realm"]))
    listed, found, ids = 0, {}, []
    for vm_id, hosts in _entries(document["vms"], source, terminal_states, head["hosts"]):
        listed += 1
        if document.get("sha256") is not None:
            ids.append(vm_id)
        if vm_id in vm_ids and hosts is not None:
            add_place(found, vm_id, hosts)
    closed, before = _closed(document, head, listed, lambda: ids), handle["epochs"].get(source)
    epoch = closed["epoch"]
    if closed["unproven"]:
        raise ManifestError("unproven", "%s: %s" % (source, closed["unproven"]))
    if before is not None and (epoch is None or epoch < before):
        raise ManifestError("epoch_went_back", "%s was at epoch %s and is at %s now" % (source, before, epoch))
    return found


def add_place(found, vm_id, hosts):
    """Add hosts to ``{vm_id: [host]}``, in which no host means everywhere."""
    known = found.get(vm_id, hosts)
    found[vm_id] = sorted({*known, *hosts}) if known and hosts else []


class _Writer:
    """Writes an index. There is no journal: nobody reads an index that was not finished."""

    def __init__(self, path):
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        os.close(descriptor)
        self._connection = sqlite3.connect(path, isolation_level=None)
        for statement in (
            "PRAGMA journal_mode = OFF",
            "PRAGMA synchronous = OFF",
            # host: "" lives everywhere, NULL is in a terminal state
            "CREATE TABLE vm (host TEXT, vm_id TEXT, source INTEGER)",
            "CREATE TABLE ended (vm_id TEXT, since REAL, source INTEGER)",
            "CREATE TABLE tombstone (vm_id TEXT PRIMARY KEY, since REAL) WITHOUT ROWID",
            "CREATE TABLE host (name TEXT PRIMARY KEY) WITHOUT ROWID",
            "BEGIN",
        ):
            self._connection.execute(statement)

    def add_vms(self, number, entries):
        """Add what _entries() yields; return how many that were."""
        listed = 0

        def rows():
            nonlocal listed
            for vm_id, hosts in entries:
                listed += 1
                for host in (None,) if hosts is None else hosts or ("",):
                    yield host, vm_id, number

        self._connection.executemany("INSERT INTO vm VALUES (?, ?, ?)", rows())
        return listed

    def add_tombstones(self, number, tombstones):
        """Add ``(vm_id, seconds since it was destroyed)``."""
        rows = ((vm_id, since, number) for vm_id, since in tombstones)
        self._connection.executemany("INSERT INTO ended VALUES (?, ?, ?)", rows)

    def vm_ids(self, number):
        """Yield the distinct ids that a source listed, in order."""
        found = self._connection.execute("SELECT DISTINCT vm_id FROM vm WHERE source = ? ORDER BY vm_id", (number,))
        return (vm_id for (vm_id,) in found)

    def drop(self, number):
        """Forget a source."""
        for table in ("vm", "ended"):
            self._connection.execute("DELETE FROM %s WHERE source = ?" % table, (number,))

    def index(self):
        """Make it quick to be asked, when everything is in it."""
        # At the end and at once: half the time of trees that grow at random places.
        for statement in (
            "CREATE INDEX by_host ON vm (host, vm_id)",
            "CREATE INDEX by_id ON vm (vm_id, host, source)",
            "INSERT INTO tombstone SELECT vm_id, MIN(since) FROM"
            " (SELECT vm_id, NULL AS since FROM vm WHERE host IS NULL UNION ALL SELECT vm_id, since FROM ended) AS one"
            " WHERE NOT EXISTS (SELECT 1 FROM vm WHERE vm.vm_id = one.vm_id AND vm.host IS NOT NULL) GROUP BY vm_id",
            "DROP TABLE ended",
        ):
            self._connection.execute(statement)

    def count(self, number=None):
        """Return how many VMs live, all or by one source."""
        # In the order of the index, which COUNT(DISTINCT) does not use.
        one = "SELECT 1 FROM vm WHERE host IS NOT NULL AND ? IN (source, -1) GROUP BY vm_id"
        counted = self._connection.execute("SELECT COUNT(*) FROM (%s)" % one, (-1 if number is None else number,))
        return counted.fetchone()[0]

    def close(self, hosts):
        """Write the hosts that the manifest speaks for, and end."""
        self._connection.executemany("INSERT OR IGNORE INTO host VALUES (?)", ((name,) for name in hosts or []))
        self._connection.execute("COMMIT")
        self._connection.close()


class Index:
    """A manifest in a local file, asked for one host's share at a time."""

    def __init__(self, path):
        self.path = path

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
                places = "SELECT vm_id, host FROM vm WHERE host IS NOT NULL AND vm_id IN (%s)" % marks
                for vm_id, where in connection.execute(places, part):
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


def _parts(ids):
    """Yield parts of a list that are short enough for one statement."""
    return (ids[begin:begin + 500] for begin in range(0, len(ids), 500))


def handle(manifest, path):
    """Write the index of ``manifest`` (of union()) to the new file ``path``; return its HANDLE."""
    writer = _Writer(path)
    writer.add_vms(0, manifest["vms"])
    writer.add_tombstones(0, manifest["tombstones"].items())
    writer.index()
    writer.close(manifest["hosts"])
    return _handle(manifest, path)


def _handle(manifest, path):
    """Return the small HANDLE that plans are made with.

    HANDLE ``{realm, source, epoch, epochs, generated_at, age, count, counts, proven, unproven, names_hosts, index}``
    """
    kept = ("realm", "source", "epoch", "epochs", "generated_at", "age", "count", "counts", "proven", "unproven")
    return dict({key: manifest[key] for key in kept}, names_hosts=manifest["hosts"] is not None, index=path)


def share(manifest_handle, host, vm_ids):
    """Return what the planner needs to know of the manifest: this host's share, and only the ids asked for."""
    found = Index(manifest_handle["index"]).look_up(vm_ids, host, not manifest_handle["names_hosts"])
    listed = found.pop("host_listed")
    return dict(manifest_handle, **found, host_known=listed or not manifest_handle["names_hosts"])


def _opened(document, source, now, max_age):
    """Check what a document says before its VMs; return ``{realm, source, generated_at, age, hosts}``."""
    if not isinstance(document, dict):
        raise ManifestError("not_a_manifest", "%s: a mapping was expected, not %s" % (source, type(document).__name__))
    missing = [key for key in ("realm", "generated_at", "complete", "vms") if key not in document]
    if missing:
        raise ManifestError("not_a_manifest", "%s: the manifest has no %s" % (source, ", ".join(missing)))
    generated_at = _instant(document["generated_at"], "%s: generated_at" % source)
    _check_age(now - generated_at, max_age, source)
    if not isinstance(document["vms"], (list, Iterator)):
        raise ManifestError("not_a_manifest", "%s: 'vms' must be a list" % source)
    hosts = document.get("hosts")
    if hosts is not None:
        hosts = sorted({_text(host, "%s: hosts" % source) for host in _list(document, "hosts", source)})
    return {
        "realm": _text(document["realm"], "%s: realm" % source),
        "source": source,
        "generated_at": generated_at,
        "age": max(0.0, now - generated_at),
        "hosts": hosts,
    }


def _closed(document, head, listed, ids):
    """Check what a document says of its VMs, of which ``listed`` were read; return ``head`` with the rest.

    ``ids()`` gives the ids that were listed.
    """
    source = head["source"]
    if document["complete"] is not True:
        raise ManifestError("incomplete", "%s: the manifest does not call itself complete" % source)
    count, checksum, epoch = document.get("count"), document.get("sha256"), document.get("epoch")
    if count is not None and count != listed:
        raise ManifestError("incomplete", "%s: 'count' is %.200r, but %d VMs are listed" % (source, count, listed))
    if checksum is not None and checksum != sha256(ids()):
        raise ManifestError("incomplete", "%s: 'sha256' does not belong to the VMs that are listed" % source)
    if epoch is not None and not _is_finite(epoch):
        raise ManifestError("not_a_manifest", "%s: 'epoch' must be a number, not %.200r" % (source, epoch))
    unproven = None
    if document.get("proven", True) is not True:
        unproven = document.get("unproven") or "it does not prove that its list is complete"
        unproven = _text(unproven, "%s: unproven" % source)
    return dict(head, epoch=epoch, proven=not unproven, unproven=unproven)


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


def _entries(entries, source, terminal_states, known_hosts):
    """Yield ``(vm_id, [host])`` for each VM: no host for one that lives everywhere, None for one that has ended.

    A million VMs have a few states and some thousand hosts: what was found good once is not looked at again.
    """
    known = None if known_hosts is None else set(known_hosts)
    ends = {state.lower() for state in terminal_states}
    has_ended, alone_on = {}, {}
    where = _Place(source, "vms")
    for where.number, vm in enumerate(entries):
        vm_id = _vm_id(vm, where)
        state = vm.get("state")
        if state is not None:
            if not isinstance(state, str) or state not in has_ended:
                has_ended[state] = _text(state, where, ".state").lower() in ends
            if has_ended[state]:
                yield vm_id, None
                continue
        host, also_on = vm.get("host"), vm.get("also_on")
        if also_on is not None:
            also_on = _list(vm, "also_on", where)
        if host is None:
            yield vm_id, []
        elif also_on:
            yield vm_id, [_host(one, vm_id, known, where) for one in [host] + also_on]
        else:
            if not isinstance(host, str) or host not in alone_on:
                alone_on[host] = [_host(host, vm_id, known, where)]
            yield vm_id, alone_on[host]


def _host(name, vm_id, known, where):
    if known is not None and _text(name, where, ".host") not in known:
        raise ManifestError(
            "unknown_host",
            "%s: the VM %s is on host %r, which is not in the manifest's hosts; a host that goes by two names "
            "would look empty" % (where.source, vm_id, name),
        )
    return _text(name, where, ".host")


def _tombstones(document, source, now):
    """Yield ``(vm_id, seconds since it was destroyed, None where that is not known)``."""
    tombstones = document.get("tombstones")
    if tombstones is None:
        return
    if not isinstance(tombstones, (list, Iterator)):
        raise ManifestError("not_a_manifest", "%s: 'tombstones' must be a list, not %.200r" % (source, tombstones))
    where = _Place(source, "tombstones")
    for where.number, tombstone in enumerate(tombstones):
        vm_id, destroyed_at = _vm_id(tombstone, where), tombstone.get("destroyed_at")
        yield vm_id, None if destroyed_at is None else now - _instant(destroyed_at, where)


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
            parsed = datetime.datetime.fromisoformat(_text(value, where))
        except ValueError as err:
            raise ManifestError("not_a_manifest", "%s: not an instant: %.200r" % (where, value)) from err
    if parsed.tzinfo is None:
        raise ManifestError("not_a_manifest", "%s: %s has no time zone; write for example %sZ" % (where, value, value))
    return parsed.timestamp()


def now():
    """Return seconds since 1970, for the doors; nothing else here looks at a clock."""
    return time.time()
