# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The live manifest: which VMs live where, as one realm's control plane tells it, with proof that nothing is missing.

Collector takes the documents of several sources, checks them, and writes them to an index, a file that hands out each
host's share: a manifest of a million VMs is never in memory. check() and union() do the same in memory.

DOCUMENT ``{realm, generated_at, complete, vms: [{vm_id, host, state, also_on}]}`` and optionally ``source, epoch,
count, sha256, hosts, tombstones: [{vm_id, destroyed_at}], budget, proven, unproven``. ``vms`` may be any iterator,
which is taken once, of VMs or of COLUMNS of them; ``realm, generated_at, hosts`` must be there before, everything else
only when it is exhausted. ``proven`` is False where nothing shows that the list is complete, ``unproven`` says why.
``made_before`` is an instant of our own clock at which the list was there: it is no younger, whatever it says itself.
``budget`` is how many VMs one host may begin to reap by this list, a number or ``{host: number}``, see budget_of().
"""

from __future__ import annotations

import collections
import datetime
import hashlib
import itertools
import math
import os
import re
import sqlite3
import time
import typing
import urllib.parse
from collections.abc import Iterator

from ..module_utils.resource import VM_ID, is_text

# Only these say that a VM is gone. A state that is not known here is a live one.
TERMINAL_STATES = ("deleted", "destroyed", "saga_unwound", "terminated")
# The clocks of control plane and controller may differ by so much: the other half of the minute that reap_min_age gives
# a new VM to be listed. A list from further in the future shows that they differ by more.
FUTURE_SECONDS = 30
VM_IDS = re.compile(r"%s(?:\n%s)*" % (VM_ID.pattern, VM_ID.pattern))
# In a budget: each host that it does not name. And more than anybody can mean.
ANY_HOST, MAX_BUDGET = "*", 10**9
# VMs that are looked at together, rows of the index that are written together, and ids that are kept for their hosts.
PAGE, ROWS, KEPT = 1000, 400, 100_000


class Columns(typing.NamedTuple):
    """COLUMNS: many VMs at once, four lists of the same length with the values that VMs have under these names."""

    vm_id: list
    host: list
    state: list
    also_on: list


class ManifestError(Exception):
    """A source cannot be believed. ``code`` is one word for it, the text says what is wrong and where."""

    def __init__(self, code, message):
        super().__init__(message)
        self.code = code


def check(document, source, *, now, max_age, terminal_states=TERMINAL_STATES):
    """Return one source's document as ``{realm, source, epoch, generated_at, age, count, proven, unproven, hosts, vms,
    tombstones, budget}``.

    ``vms`` maps the ids of what lives to ``[host]`` (no host: it lives everywhere), ``tombstones`` maps ids to the
    seconds since they were destroyed (None: unknown), ``generated_at`` is in seconds since 1970, ``age`` in seconds,
    ``unproven`` says why the list is not. Raises ManifestError.
    """
    head = _opened(document, source, now, max_age)
    listed, vms, ended, ids = 0, {}, [], []
    for count, places, vm_ids in _Entries(source, terminal_states, head["hosts"]).rows(document["vms"]):
        listed += count
        ids += vm_ids
        for place, vm_id in zip(places, vm_ids, strict=True):
            if place is None:
                ended.append(vm_id)
            else:
                add_place(vms, vm_id, _hosts_at(place))
    tombstones = dict.fromkeys(vm_id for vm_id in ended if vm_id not in vms)
    for vm_id, since in _tombstones(document, source, now):
        tombstones[vm_id] = _shorter(since, tombstones.get(vm_id))
    return dict(_closed(document, head, listed, lambda: ids), count=len(vms), vms=vms, tombstones=tombstones)


def union(manifests):
    """Return one manifest for several of the same realm: what lives in any of them lives.

    Hosts are those that any source speaks for; unknown as soon as one source does not say which it speaks for.
    """
    joined, vms, tombstones = _joined(manifests), {}, {}
    for one in manifests:
        for vm_id, hosts in one["vms"].items():
            add_place(vms, vm_id, hosts)
    for one in manifests:
        for vm_id, since in one["tombstones"].items():
            if vm_id not in vms:
                tombstones[vm_id] = _shorter(since, tombstones.get(vm_id))
    return dict(joined, count=len(vms), vms=vms, tombstones=tombstones)


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
        "budget": joined_budget(one["budget"] for one in manifests),
        "hosts": None if any(one["hosts"] is None for one in manifests) else sorted({
            host for one in manifests for host in one["hosts"]
        }),
    }


def budget(document, source, hosts=None):
    """Return the BUDGET of a document, ``{host: number}``, None where it has none; ``hosts`` are all it speaks for.

    Raises ManifestError. A budget of null is none that can be believed: it may have been meant to stop everything.
    """
    if "budget" not in document:
        return None
    found = document["budget"]
    if not isinstance(found, dict):
        found = {ANY_HOST: found}
    known = None if hosts is None else {ANY_HOST, *hosts}
    for host, most in found.items():
        # A host that goes by two names would have the number of all others.
        if _text(host, source, ": budget") and known is not None and host not in known:
            raise ManifestError("unknown_host", "%s: the budget is of host %.200r, which is not in the manifest's hosts"
                                % (source, host))
        if isinstance(most, bool) or not isinstance(most, int) or not 0 <= most <= MAX_BUDGET:
            raise ManifestError(
                "not_a_manifest",
                "%s: 'budget' must be a whole number of VMs from 0 to %d, or a mapping of hosts to such, not %.200r; "
                "leave it out where there is none" % (source, MAX_BUDGET, most),
            )
    return dict(found)


def budget_of(whole, host):
    """Return how many VMs the host may begin to reap by a BUDGET, None: as many as the caps allow.

    A host that it does not name may what it says of ANY_HOST, and else nothing.
    """
    return None if whole is None else whole.get(host, whole.get(ANY_HOST, 0))


def joined_budget(budgets):
    """Return the BUDGET of several sources, of which each counts that has one: for each host the smallest."""
    given = [one for one in budgets if one is not None]
    if not given:
        return None
    return {host: min(budget_of(one, host) for one in given) for host in sorted({ANY_HOST}.union(*given))}


def sha256(vm_ids):
    """Return the checksum a manifest may carry: of its sorted, distinct ids, each followed by a newline."""
    return hashlib.sha256("".join("%s\n" % vm_id for vm_id in sorted(set(vm_ids))).encode()).hexdigest()


class Collector:
    """Checks the documents of several sources and joins them in an index, one page of VMs after the other."""

    def __init__(self, path):
        self._writer = _Writer(path)
        self._path = path
        self._heads = []

    def add(self, document, source, *, now, max_age, terminal_states=TERMINAL_STATES):
        """Take one source's document. Raises ManifestError, and forgets then what it took of it."""
        number = len(self._heads)
        try:
            head = _opened(document, source, now, max_age)
            listed = 0
            for count, places, vm_ids in _Entries(source, terminal_states, head["hosts"]).rows(document["vms"]):
                listed += count
                self._writer.add_vms(number, places, vm_ids)
            self._writer.add_tombstones(number, _tombstones(document, source, now))
            self._heads.append(_closed(document, head, listed, lambda: self._writer.vm_ids(number)))
        except ManifestError:
            self._writer.drop(number)
            raise

    def finish(self):
        """Return the HANDLE of what all sources list together."""
        self._writer.index()
        count, one = self._writer.count(), len(self._heads) == 1
        counts = [count if one else self._writer.count(number) for number in range(len(self._heads))]
        joined = _joined([dict(head, count=counts[number]) for number, head in enumerate(self._heads)])
        self._writer.close(joined["hosts"], joined["budget"])
        return _handle(dict(joined, count=count), self._path)


def live_among(vm_ids, document, source, handle, *, now, max_age, terminal_states=TERMINAL_STATES):
    """Return ``{vm_id: [host]}`` of those of ``vm_ids`` that a later document of the source lists; no host: everywhere.

    Raises ManifestError, also for a document that is older than the one of which ``handle`` was made.
    """
    head = _opened(document, source, now, max_age)
    if head["realm"] != handle["realm"]:
        raise ManifestError("other_realm", "%s speaks for realm %r now" % (source, head["realm"]))
    wanted, listed, found, ids = set(vm_ids), 0, {}, []
    for count, places, here in _Entries(source, terminal_states, head["hosts"]).rows(document["vms"]):
        listed += count
        if document.get("sha256") is not None:
            ids += here
        if wanted.isdisjoint(here):
            continue
        for place, vm_id in zip(places, here, strict=True):
            if vm_id in wanted and place is not None:
                add_place(found, vm_id, _hosts_at(place))
    closed = _closed(document, head, listed, lambda: ids)
    if closed["unproven"]:
        raise ManifestError("unproven", "%s: %s" % (source, closed["unproven"]))
    check_epoch(source, handle["epochs"].get(source), closed["epoch"])
    return found


def check_epoch(source, before, epoch):
    """Refuse a source that was at the epoch ``before``, None if it told none, and is behind it now."""
    if before is not None and (epoch is None or epoch < before):
        raise ManifestError("epoch_went_back", "%s was at epoch %s and is at %s now" % (source, before, epoch))


def add_place(found, vm_id, hosts):
    """Add hosts to ``{vm_id: [host]}``, in which no host means everywhere."""
    known = found.get(vm_id)
    if known is None:
        found[vm_id] = hosts
    elif known != hosts:
        found[vm_id] = sorted({*known, *hosts}) if known and hosts else []


def _hosts_at(place):
    return [place] if place else []


class _Writer:
    """Writes an index. There is no journal: nobody reads an index that was not finished."""

    def __init__(self, path):
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        os.close(descriptor)
        self._connection = sqlite3.connect(path, isolation_level=None)
        for statement in (
            "PRAGMA journal_mode = OFF",
            "PRAGMA synchronous = OFF",
            # host: "" lives everywhere
            "CREATE TABLE vm (host TEXT, vm_id TEXT, source INTEGER)",
            # the same, a text of many ids for each host: what lives on a host is read at once, not found one by one
            "CREATE TABLE here (host TEXT, vm_ids TEXT, source INTEGER)",
            # is_listed: among the VMs, in a state that is terminal, and not only among the tombstones
            "CREATE TABLE ended (vm_id TEXT, since REAL, source INTEGER, is_listed INTEGER)",
            "CREATE TABLE tombstone (vm_id TEXT PRIMARY KEY, since REAL) WITHOUT ROWID",
            "CREATE TABLE host (name TEXT PRIMARY KEY) WITHOUT ROWID",
            "CREATE TABLE budget (host TEXT PRIMARY KEY, vms INTEGER) WITHOUT ROWID",
            "BEGIN",
        ):
            self._connection.execute(statement)
        self._here, self._kept = collections.defaultdict(list), 0

    def add_vms(self, number, places, vm_ids):
        """Add rows of _Entries."""
        if None in places:
            ended = (vm_id for place, vm_id in zip(places, vm_ids, strict=True) if place is None)
            self._add_ended(number, ((vm_id, None) for vm_id in ended), is_listed=1)
            lives = [place is not None for place in places]
            places, vm_ids = list(itertools.compress(places, lives)), list(itertools.compress(vm_ids, lives))
        values = [None] * (2 * len(vm_ids))
        values[0::2], values[1::2] = places, vm_ids
        for begin in range(0, len(values), 2 * ROWS):
            some = values[begin:begin + 2 * ROWS]
            # Many rows in one statement take half the time.
            marks = ", ".join(["(?, ?, %d)" % number] * (len(some) // 2))
            self._connection.execute("INSERT INTO vm VALUES %s" % marks, some)
        for place, vm_id in zip(places, vm_ids, strict=True):
            self._here[place].append(vm_id)
        self._kept += len(vm_ids)
        if self._kept > KEPT:
            self._write_here(number)

    def _write_here(self, number):
        rows = ((host, "\n".join(vm_ids), number) for host, vm_ids in self._here.items())
        self._connection.executemany("INSERT INTO here VALUES (?, ?, ?)", rows)
        self._here.clear()
        self._kept = 0

    def add_tombstones(self, number, tombstones):
        """Add ``(vm_id, seconds since it was destroyed)``, when all VMs of a source were added."""
        self._write_here(number)
        self._add_ended(number, tombstones, is_listed=0)

    def _add_ended(self, number, ended, is_listed):
        rows = ((vm_id, since, number, is_listed) for vm_id, since in ended)
        self._connection.executemany("INSERT INTO ended VALUES (?, ?, ?, ?)", rows)

    def vm_ids(self, number):
        """Yield the distinct ids that a source listed as VMs."""
        listed = (
            "SELECT vm_id FROM vm WHERE source = ?1 UNION SELECT vm_id FROM ended WHERE source = ?1 AND is_listed = 1"
        )
        return (vm_id for (vm_id,) in self._connection.execute(listed, (number,)))

    def drop(self, number):
        """Forget a source."""
        self._here.clear()
        for table in ("vm", "here", "ended"):
            self._connection.execute("DELETE FROM %s WHERE source = ?" % table, (number,))

    def index(self):
        """Make it quick to be asked, when everything is in it."""
        # At the end and at once: half the time of trees that grow at random places.
        for statement in (
            "CREATE INDEX by_id ON vm (vm_id, host, source)",
            "CREATE INDEX by_host ON here (host)",
            "INSERT INTO tombstone SELECT vm_id, MIN(since) FROM ended"
            " WHERE NOT EXISTS (SELECT 1 FROM vm WHERE vm.vm_id = ended.vm_id) GROUP BY vm_id",
            "DROP TABLE ended",
        ):
            self._connection.execute(statement)

    def count(self, number=None):
        """Return how many VMs live, all or by one source."""
        # In the order of the index, which COUNT(DISTINCT) does not use.
        where = "" if number is None else "WHERE source = %d" % number
        return self._connection.execute("SELECT COUNT(*) FROM (SELECT DISTINCT vm_id FROM vm %s)" % where).fetchone()[0]

    def close(self, hosts, whole_budget):
        """Write the hosts that the manifest speaks for and their budget, and end."""
        self._connection.executemany("INSERT INTO budget VALUES (?, ?)", (whole_budget or {}).items())
        self._connection.executemany("INSERT OR IGNORE INTO host VALUES (?)", ((name,) for name in hosts or []))
        self._connection.execute("COMMIT")
        self._connection.close()


class Index:
    """A manifest in a local file, asked for one host's share at a time."""

    def __init__(self, path):
        self.path = path

    def look_up(self, vm_ids, host, any_host_protects):
        """Return ``{live, elsewhere, tombstones, budget, host_listed}`` for these ids on this host.

        ``any_host_protects``: the manifest does not say which hosts it speaks for, so a VM that is named on another one
        may be here all the same under a name of this host that we do not know.
        """
        live, elsewhere, tombstones = set(), {}, {}
        connection = sqlite3.connect("file:%s?mode=ro" % urllib.parse.quote(self.path), uri=True)
        try:
            for (here,) in connection.execute("SELECT vm_ids FROM here WHERE host IN (?, '')", (host,)):
                live |= vm_ids.intersection(here.split("\n"))
            # Most of what is on a host lives there: only the others are looked for one by one.
            for part in _parts(sorted(vm_ids - live)):
                marks = ",".join("?" * len(part))
                for vm_id, where in connection.execute("SELECT vm_id, host FROM vm WHERE vm_id IN (%s)" % marks, part):
                    if any_host_protects:
                        live.add(vm_id)
                    else:
                        elsewhere.setdefault(vm_id, set()).add(where)
            for part in _parts(sorted(vm_ids - live)):
                marks = ",".join("?" * len(part))
                tombstones.update(
                    connection.execute("SELECT vm_id, since FROM tombstone WHERE vm_id IN (%s)" % marks, part)
                )
            listed = connection.execute("SELECT 1 FROM host WHERE name = ?", (host,)).fetchone() is not None
            mine = dict(connection.execute("SELECT host, vms FROM budget WHERE host IN (?, ?)", (host, ANY_HOST)))
        finally:
            connection.close()
        return {
            "live": sorted(live),
            "elsewhere": {vm_id: sorted(hosts) for vm_id, hosts in sorted(elsewhere.items()) if vm_id not in live},
            "tombstones": tombstones,
            "budget": budget_of(mine or None, host),
            "host_listed": listed,
        }


def _parts(ids):
    """Yield parts of a list that are short enough for one statement."""
    return (ids[begin:begin + 500] for begin in range(0, len(ids), 500))


def handle(manifest, path):
    """Write the index of ``manifest`` (of union()) to the new file ``path``; return its HANDLE."""
    writer = _Writer(path)
    rows = [(place, vm_id) for vm_id, hosts in manifest["vms"].items() for place in hosts or [""]]
    writer.add_vms(0, [place for place, _vm_id in rows], [vm_id for _place, vm_id in rows])
    writer.add_tombstones(0, manifest["tombstones"].items())
    writer.index()
    writer.close(manifest["hosts"], manifest["budget"])
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
    by_its_words = _instant(document["generated_at"], "%s: generated_at" % source)
    generated_at = _not_after(by_its_words, document, source)
    _check_age(now - generated_at, now - by_its_words, max_age, source)
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
    most = budget(document, source, head["hosts"])
    return dict(head, epoch=epoch, proven=not unproven, unproven=unproven, budget=most)


def _not_after(generated_at, document, source):
    """Return when the list was made, by its own words or by our clock, whichever makes it older."""
    if document.get("made_before") is None:
        return generated_at
    made_before = _instant(document["made_before"], "%s: made_before" % source)
    if generated_at > made_before + FUTURE_SECONDS:
        raise ManifestError(
            "from_the_future",
            "%s: by its own words it was generated %d s after it was written here; compare the clocks"
            % (source, generated_at - made_before),
        )
    return min(generated_at, made_before)


def _check_age(age, by_its_words, max_age, source):
    if age > max_age:
        said = "%s: the manifest is %d s old, more than reap_manifest_max_age=%d" % (source, age, max_age)
        if age > by_its_words:
            said += "; by its own words %d s, but it was written here before" % by_its_words
        raise ManifestError("stale", said)
    if age < -FUTURE_SECONDS:
        raise ManifestError(
            "from_the_future",
            "%s: the manifest was generated %d s in the future; compare the clocks" % (source, -age),
        )


class _Entries:
    """Checks what a source lists. A million VMs have a few states and some thousand hosts, and most are as plain as can
    be: a page of those is looked at as a whole, and what was found good once is not looked at again.
    """

    def __init__(self, source, terminal_states, known_hosts):
        self._known = None if known_hosts is None else set(known_hosts)
        self._ends = {state.lower() for state in terminal_states}
        self._has_ended, self._places = {None: False}, {None}
        self._where = _Place(source, "vms")

    def rows(self, entries):
        """Yield ``(how many VMs, [place], [vm_id])``, page by page.

        The lists are as long as the VMs have places: a host, "" for everywhere, None for a VM that has ended.
        """
        number = 0
        for page in _pages(entries):
            columns = page if isinstance(page, Columns) else _columns(page)
            listed = len(page.vm_id if isinstance(page, Columns) else page)
            places = None if columns is None else self._plain(columns)
            if places is not None:
                yield listed, places, columns.vm_id
            else:
                if isinstance(page, Columns):
                    page = [dict(zip(Columns._fields, values, strict=True)) for values in zip(*page, strict=True)]
                rows = [row for self._where.number, vm in enumerate(page, number) for row in self._vm(vm)]
                yield listed, [place for place, _vm_id in rows], [vm_id for _place, vm_id in rows]
            number += listed

    def _plain(self, columns):
        """Return the places of a page of VMs with nothing special about them, None for another one."""
        vm_ids, hosts, states, also_on = columns
        if also_on.count(None) < len(also_on) or not _are_vm_ids(vm_ids):
            return None
        try:
            here, found = set(hosts), set(states)
            for host in here - self._places:
                self._place(host)
                self._places.add(host)
            for state in found - self._has_ended.keys():
                self._has_ended[state] = self._ended(state)
        except (ManifestError, TypeError):
            return None  # of which VM, and whether it matters there, is seen when each is looked at
        places = [place or "" for place in hosts] if None in here else hosts
        if any(self._has_ended[state] for state in found):
            places = [None if self._has_ended[state] else place for place, state in zip(places, states, strict=True)]
        return places

    def _ended(self, state):
        return _text(state, self._where, ".state").lower() in self._ends

    def _vm(self, vm):
        """Return the rows of one VM."""
        vm_id, state = _vm_id(vm, self._where), vm.get("state")
        if state is not None and self._ended(state):
            return [(None, vm_id)]
        host, also_on = vm.get("host"), _list(vm, "also_on", self._where)
        if host is None:
            return [("", vm_id)]
        return [(self._place(one, vm_id), vm_id) for one in [host, *also_on]]

    def _place(self, name, vm_id=None):
        if self._known is not None and _text(name, self._where, ".host") not in self._known:
            raise ManifestError(
                "unknown_host",
                "%s: the VM %s is on host %r, which is not in the manifest's hosts; a host that goes by two names "
                "would look empty" % (self._where.source, vm_id, name),
            )
        return _text(name, self._where, ".host")


def _pages(entries):
    """Yield COLUMNS as they come, and lists of what comes one by one."""
    some = []
    for entry in entries:
        if isinstance(entry, Columns):
            yield entry
            continue
        some.append(entry)
        if len(some) == PAGE:
            yield some
            some = []
    yield some


def _columns(vms):
    """Return COLUMNS of a list of VMs, None where one is no mapping."""
    if set(map(type, vms)) != {dict}:
        return None
    return Columns(*([vm.get(key) for vm in vms] for key in Columns._fields))


def _are_vm_ids(values):
    try:
        text = "\n".join(values)
    except TypeError:
        return False
    return bool(VM_IDS.fullmatch(text)) and text.count("\n") == len(values) - 1


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
