# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A list of VMs that an API hands out in pages: its fields, its pages, and the proof that it was all.

A list of any length is read in the memory of two pages and 8 bytes for each VM, at its end for a moment 80. What came
is handed on at once; whether it was complete is known at the end: because a count agrees, or because the whole list was
read twice and was the same.
"""

from __future__ import annotations

import array
import collections
import datetime
import itertools
import json
import math
import re
import tempfile
import time
import urllib.parse

from ..manifest import FUTURE_SECONDS, Columns, ManifestError, check_epoch
from . import _paths, _web

# The types that a field may have.
FIELDS = {
    "vm_id": (str,),
    "host": (str, type(None)),
    "state": (str, type(None)),
    "also_on": (list, str, type(None)),
    "destroyed_at": (str, int, float, type(None)),
}
# What a page may say of the whole list. By default it is a manifest, as a file is, and must say the first three.
ABOUT = ("realm", "generated_at", "complete", "epoch", "count", "sha256", "hosts", "tombstones", "budget")
OF_MANIFEST = ABOUT[:3]
# A list that changes while it is read is read again: once and three times more.
READS = 4
# Seconds that the clocks of servers behind one address may differ.
CLOCKS = 5

# columns: a list for each of FIELDS, with other hosts as a tuple or None; None where the server said that nothing
# changed since a read before. size: how many VMs; total: the sum of their hashes, None where a count is expected to be
# proof enough. following: the next URL or None.
Page = collections.namedtuple("Page", "url etag said size total following columns")
LINK = re.compile(r'<([^<>]*)>((?:[^,"]|"(?:[^"\\]|\\.)*")*)')
RELATION = re.compile(r';\s*rel\s*=\s*(?:"([^"]*)"|([^\s;,"]+))', re.IGNORECASE)


class Paths:
    """Where things are in a page. Each is a function of _paths.column(), ``texts`` has them as they were written."""

    def __init__(self, options):
        fields, about = options["fields"], options["about"]
        fields = {name: name for name in FIELDS} if fields is None else fields
        about = {name: name for name in ABOUT} if about is None else about
        if "vm_id" not in fields:
            raise ManifestError("bad_source", "fields needs vm_id")
        self.fields = {name: self._of("fields", name, path, FIELDS) for name, path in fields.items()}
        self.about = {name: self._of("about", name, path, ABOUT) for name, path in about.items()}
        self.items = _paths.column("items", options["items"])
        self.next = _paths.column("next", options["next"] or "@")
        self.lookup_item = _paths.column("lookup_item", options["lookup_item"])
        self.texts = {"fields.%s" % name: path for name, path in fields.items()}
        self.texts.update({"about.%s" % name: path for name, path in about.items()})

    @staticmethod
    def _of(option, name, path, allowed):
        if name not in allowed:
            raise ManifestError("bad_source", "%s: %.80r is none of %s" % (option, name, ", ".join(allowed)))
        return _paths.column("%s.%s" % (option, name), path)


class Listing:
    """The list of an API, read as the options say."""

    def __init__(self, options, client, context):
        self._options, self._client, self._context = options, client, context
        self._paths = Paths(options)
        # Of all pages of all reads: their realm, the highest epoch, the oldest and the newest instant.
        self._realm = options["realm"]
        self._epoch = self._generated_at = self._newest = None
        # The fields that any VM has.
        self._found = set()
        self._is_summed = False

    def document(self):
        """Return the DOCUMENT (see manifest.py), whose ``vms`` reads on after the first page."""
        first = self._page(self._first_url(), None)
        self._demand_about(first)
        document = {
            "realm": self._realm,
            "generated_at": self._generated_at,
            "complete": False,
            "hosts": first.said.get("hosts"),
            "proven": False,
            "unproven": "it was not read to its end",
        }
        if first.said.get("budget") is not None:
            document["budget"] = first.said["budget"]
        document["vms"] = self._vms(document, first)
        return document

    def _vms(self, document, first):
        """Yield all VMs, reading as often as the proof needs; complete the document at the end."""
        reads_given, only_tombstones, tombstones = 0, 0, _Spool()
        ended, why, last = False, None, None
        for number in range(READS):
            # Every second read only checks the one before, whose VMs have been handed on.
            checked = last if last is not None and last.was_given else None
            read = _Read(was_given=checked is None)
            for page in self._pages(None if number else first, checked.known if checked else {}):
                read.add(page)
                if checked:
                    continue
                tombstones.add_all(self._tombstones(page))
                vms = _vms_of(page)
                only_tombstones += page.size - len(vms.vm_id)
                yield vms
            reads_given += read.was_given
            self._check_read(read)
            ended, why = self._judge(read, last)
            if ended:
                break
            last = None if read.moved else read
        if not ended:
            why = "read %d times: %s" % (READS, why)
        document.update(complete=True, epoch=self._epoch, tombstones=iter(tombstones), proven=not why, unproven=why)
        # What was read before and moved was handed on too: then the numbers of the source are not those of our list.
        if reads_given == 1:
            document["sha256"] = first.said.get("sha256")
            document["count"] = None if read.count is None else read.count - only_tombstones

    def _judge(self, read, last):
        """Return whether no further read is needed, and why the list is not proven to be complete, None if it is."""
        proof = self._options["proof"]
        if proof == "none":
            return True, "the option proof is none"
        if read.moved:
            return False, read.moved
        if self._count_is_proof(read):
            return True, None
        if proof == "count":
            return True, "there is no count on its last page"
        self._is_summed = True
        if last is None or not read.same_as(last):
            return False, "two reads of it differ"
        return True, self._no_end(read)

    def _count_is_proof(self, read):
        """Tell whether the count, which agrees, is enough.

        By page or offset a VM can be lost all the same: where one before it goes, it moves to a page that was read, and
        a new one makes up the number. An epoch on each page would tell.
        """
        if self._options["proof"] == "reread" or not read.is_counted:
            return False
        return self._options["proof"] == "count" or read.has_epochs or not self._moves()

    def _has_to_compare(self, said):
        """Tell, of the first page, whether it may take two reads that are the same to prove the list."""
        proof = self._options["proof"]
        return proof == "reread" or proof == "auto" and (said["count"] is None or self._moves())

    def _moves(self):
        return self._options["paging"] in ("page", "offset")

    def _no_end(self, read):
        """Return why two equal reads prove nothing, or None: where ``next`` is wrong there is never a second page."""
        limit = self._options["limit"]
        is_short = limit is not None and read.listed < limit
        if read.pages > 1 or read.is_counted or is_short or self._options["paging"] not in ("link", "next", "cursor"):
            return None
        return "it is one page that names no next one; name a count, or a limit that one page does not reach"

    def _pages(self, first, known):
        """Yield the pages of one read, the first of which may be at hand. ``known``: ``{url: Page}`` of one before."""
        url, seen, before = self._first_url(), set(), None
        for number in itertools.count(1):
            page = first or self._page(url, known.get(url))
            first = None
            if page.columns and page.size and page.columns == before:
                raise _refusal("incomplete", url, "page %d is the same as the one before it; does the API know the "
                                                  "parameter that asks for a page?" % number)
            following = page.following
            if following is not None:
                seen.add(hash(url))
                if hash(following) in seen:
                    text = "its pages go round in a circle: page %d points back" % number
                    raise _refusal("incomplete", url, text)
                if number == self._options["max_pages"]:
                    raise _refusal("incomplete", url, "there are more pages than max_pages=%d" % number)
                self._client.ask_ahead(following, _etag(known.get(following)))
            yield page
            if following is None:
                return
            url, before = following, page.columns

    def _page(self, url, known):
        """Ask for one page. ``known``: what it was in a read before, if it had an ETag."""
        answer = self._client.get(url, etag=_etag(known))
        if answer.status == 304:
            return known
        (items,) = self._paths.items([answer.body])
        if not isinstance(items, list):
            text = "items (%s) must be a list in the body, and is %s" % (self._options["items"], _kind(items))
            raise _refusal("not_a_manifest", url, text)
        said = self._said(answer, url)
        columns = [self._field(name, items, url) for name in FIELDS]
        self._is_summed = self._is_summed or self._has_to_compare(said)
        total = sum(map(hash, zip(*columns, strict=True))) if self._is_summed else None
        following = self._following(url, answer, len(items))
        return Page(url, answer.headers.get("ETag"), said, len(items), total, following, columns)

    def _field(self, name, items, url):
        """Return one field of all items, in types that have a hash."""
        if name not in self._paths.fields:
            return [None] * len(items)
        values = self._paths.fields[name](items)
        kinds = set(map(type, values))
        if not kinds.issubset(FIELDS[name]):
            number = next(number for number, value in enumerate(values) if type(value) not in FIELDS[name])
            raise self._wrong(name, values[number], "entry %d of the page" % number, url)
        if kinds == {type(None)} or not kinds:
            return values
        self._found.add(name)
        return [self._others(value, url) for value in values] if name == "also_on" else values

    def _others(self, value, url):
        """Return the other hosts of a VM: from a list, in which a JMESPath may have left holes, or from one name."""
        hosts = tuple(host for host in (value if isinstance(value, list) else [value]) if host is not None)
        if not all(isinstance(host, str) for host in hosts):
            raise self._wrong("also_on", value, "the page", url)
        return hosts or None

    def _wrong(self, name, value, where, url):
        path = self._paths.texts["fields." + name]
        hint = "; a number becomes a text by to_string(%s)" % path if isinstance(value, (int, float)) else ""
        text = "fields.%s (%s) finds %s in %s: %.200r%s" % (name, path, _kind(value), where, value, hint)
        return _refusal("not_a_manifest", url, text)

    def _following(self, url, answer, listed):
        """Return the URL of the page after this one, None after the last."""
        options = self._options
        paging = options["paging"]
        if paging == "none":
            return None
        if paging in ("page", "offset"):
            # A page that is not full proves nothing: some servers send less than was asked for, others filter.
            param = options[paging + "_param"]
            step = listed if paging == "offset" else 1
            return _web.with_params(url, {param: _number(url, param) + step}) if listed else None
        following = next_link(answer.headers.get("Link", ""))
        if paging != "link":
            (following,) = self._paths.next([answer.body])
        if following is None or following is False or following == "":
            return None
        if isinstance(following, bool) or not isinstance(following, (str, int)):
            raise _refusal("not_a_manifest", url, "next (%s) finds %s" % (options["next"], _kind(following)))
        if not _can_travel(str(following)):
            raise _refusal("not_a_manifest", url, "next (%s) finds half of a character" % options["next"])
        if paging == "cursor":
            return _web.with_params(url, {options["cursor_param"]: following})
        found = _web.followed(url, str(following))
        if found is None:
            text = "its next page is at another scheme, host or port (%s), where credentials would go along"
            raise _refusal("incomplete", url, text % _web.shown(str(following)))
        return found

    def _first_url(self):
        options = self._options
        params = dict(options["params"])
        if options["limit"] is not None:
            params[options["limit_param"]] = options["limit"]
        if options["paging"] == "page":
            params[options["page_param"]] = options["first_page"]
        if options["paging"] == "offset":
            params[options["offset_param"]] = 0
        return _web.with_params(options["url"], params)

    def _said(self, answer, url):
        """Return what a page says of the whole list, ``{name: value}`` of ABOUT with

        ``instant``, seconds since 1970 when it was true, and ``went_back``, why it is older than a page before or None.
        """
        said = {name: column([answer.body])[0] for name, column in self._paths.about.items()}
        if self._options["count_header"] is not None:
            said["count"] = answer.headers.get(self._options["count_header"])
        said["count"] = _count(said.get("count"), url)
        realm, epoch = said.get("realm"), said.get("epoch")
        if realm is not None and self._realm is not None and realm != self._realm:
            text = "it speaks for realm %.100r and not for %.100r; see url and realm" % (realm, self._realm)
            raise _refusal("other_realm", url, text)
        if said.get("complete", True) not in (True, None):
            raise _refusal("incomplete", url, "it does not call its list complete")
        if epoch is not None and not _is_number(epoch):
            raise _refusal("not_a_manifest", url, "about.epoch must be a number, not %.200r" % (epoch,))
        said["instant"] = instant = self._instant(said.get("generated_at"), answer.headers, url)
        said["went_back"] = None
        if epoch is not None and self._epoch is not None and epoch < self._epoch:
            said["went_back"] = "its epoch went back from %s to %s: a replica that lags" % (self._epoch, epoch)
        elif self._newest is not None and instant < self._newest - CLOCKS:
            said["went_back"] = "a page is %d s older than one before it: a replica or a cache that lags" % (
                self._newest - instant)
        self._realm = realm if self._realm is None else self._realm
        known = [one for one in (epoch, self._epoch) if one is not None]
        self._epoch = max(known) if known else None
        self._generated_at = instant if self._generated_at is None else min(instant, self._generated_at)
        self._newest = instant if self._newest is None else max(instant, self._newest)
        return said

    def _instant(self, value, headers, url):
        now = self._context["now"]
        if value is None:
            # A cache tells how many seconds it has kept the answer.
            age = headers.get("Age", "")
            return now - (float(age[:9]) if age.isascii() and age.isdigit() else 0.0)
        _check_clock(headers, url)
        if _is_number(value):
            instant = float(value)
        else:
            instant = _parsed(value)
            if instant is None:
                text = "about.generated_at must be seconds since 1970 or an instant with a time zone, not %.200r"
                raise _refusal("not_a_manifest", url, text % (value,))
        # A clock a little ahead of ours must not make the list newer than it is. Far ahead is for people to see.
        return min(instant, now) if instant - now <= FUTURE_SECONDS else instant

    def _demand_about(self, page):
        """What was named in about must be there: a wrong path must not pass for an API that does not say."""
        wanted = OF_MANIFEST if self._options["about"] is None else self._options["about"]
        for name in wanted:
            if page.said.get(name) is None and not (name == "realm" and self._realm is not None):
                text = "about.%s (%s) finds nothing in the body; see about" % (name, self._paths.texts["about." + name])
                raise _refusal("not_a_manifest", page.url, text)
        if self._options["proof"] == "count" and page.said["count"] is None:
            raise _refusal("incomplete", page.url, "it has no count; see count_header, about.count and proof")

    @staticmethod
    def _tombstones(page):
        """Return ``[{vm_id, destroyed_at}]``: those of the fields, and those that a page lists apart."""
        listed = page.said.get("tombstones") or []
        if not isinstance(listed, list):
            raise _refusal("not_a_manifest", page.url, "about.tombstones must be a list, and is %s" % _kind(listed))
        vm_ids, ends = page.columns[0], page.columns[4]
        if ends.count(None) == len(ends):
            return listed
        both = zip(vm_ids, ends, strict=True)
        return listed + [{"vm_id": vm_id, "destroyed_at": end} for vm_id, end in both if end is not None]

    def _check_read(self, read):
        """Refuse a read that is wrong in a way that no further one makes good."""
        if self._options["fields"] is not None and read.listed:
            for name in ("host", "state"):
                if name in self._paths.fields and name not in self._found:
                    text = "fields.%s (%s) finds nothing in any of %d VMs; see fields"
                    found = text % (name, self._paths.texts["fields." + name], read.listed)
                    raise _refusal("not_a_manifest", self._options["url"], found)
        # Where pages moved the numbers cannot agree.
        if not read.finish() and read.count is not None and read.count != read.listed:
            text = "its count is %d, but %d VMs were listed on %d pages; see paging, next, limit and items"
            raise _refusal("incomplete", self._options["url"], text % (read.count, read.listed, read.pages))

    def look_up(self, vm_ids, epoch):
        """Return ``{vm_id: [host]}`` of those that live, no host for everywhere.

        ``epoch``: of the list that they were missing from; a server that is behind it, a replica that lags, is refused.
        """
        found = {vm_id: self._look_up(vm_id) for vm_id in sorted(vm_ids)}
        if None in found.values():
            self._prove_lookup(epoch)
        return {vm_id: hosts for vm_id, hosts in found.items() if hosts is not None}

    def _look_up(self, vm_id):
        """Return the hosts of a VM, None if it does not live."""
        url = self._options["lookup_url"].replace("{vm_id}", urllib.parse.quote(vm_id, safe=""))
        answer = self._client.get(url, may_be_gone=True)
        if answer.status != 200:
            return None
        items = self._paths.lookup_item([answer.body])
        fields = {name: self._field(name, items, url)[0] for name in FIELDS}
        if fields["vm_id"] != vm_id:
            raise _refusal("not_a_manifest", url, "it answered with VM %.128r; see lookup_item" % fields["vm_id"])
        if self._has_ended(fields["state"]):
            return None
        return [fields["host"], *(fields["also_on"] or ())] if fields["host"] is not None else []

    def _prove_lookup(self, epoch):
        """Make sure that lookup_url finds what lives, for at a wrong URL nothing does. The list has VMs to try."""
        page = self._page(self._first_url(), None)
        check_epoch("GET %s" % _web.shown(page.url), epoch, self._epoch)
        vms = zip(*page.columns, strict=True)
        live = [vm_id for vm_id, _host, state, _also_on, end in vms if end is None and not self._has_ended(state)]
        if not live:
            raise _refusal("incomplete", page.url, "it lists no live VM with which lookup_url could be tried")
        # One may have been destroyed between the two questions.
        if all(self._look_up(vm_id) is None for vm_id in live[:3]):
            text = "it does not find VM %.128s, which is on the list; see lookup_url" % live[0]
            raise _refusal("not_a_manifest", self._options["lookup_url"], text)

    def _has_ended(self, state):
        ends = {state.lower() for state in self._context.get("terminal_states", ())}
        return state is not None and state.lower() in ends


def _vms_of(page):
    """Return COLUMNS of the VMs of a page, without those that are nothing but tombstones."""
    *columns, ends = page.columns
    if ends.count(None) < len(ends):
        # A VM with a state is judged by it: what was destroyed may be an instance before this one.
        stays = [end is None or state is not None for end, state in zip(ends, columns[2], strict=True)]
        columns = [list(itertools.compress(values, stays)) for values in columns]
    if any(columns[3]):
        columns[3] = [others and list(others) for others in columns[3]]
    return Columns(*columns)


class _Read:
    """One read of the whole list, summed up.

    ``moved``: why its pages do not belong together; ``known``: ``{url: Page}`` without columns, of those with an ETag.
    """

    def __init__(self, was_given):
        self.was_given = was_given
        self.listed = self.pages = 0
        self.count = self.moved = None
        self.is_counted = self.has_epochs = False
        self.known = {}
        self._total: int | None = 0
        self._first = None
        self._hashes = array.array("q")

    def add(self, page):
        """Take the next page."""
        said = page.said
        if self._first is None:
            self._first, self.count, self.has_epochs = said, said["count"], True
        self.pages += 1
        self.listed += page.size
        self._total = None if page.total is None or self._total is None else self._total + page.total
        self.is_counted = self.count is not None and said["count"] is not None
        self.has_epochs = self.has_epochs and said.get("epoch") is not None
        for name in ("count", "epoch", "hosts"):
            before, now = self._first.get(name), said.get(name)
            if before is not None and now is not None and before != now:
                self.moved = "its %s changed from %.100r to %.100r between pages" % (name, before, now)
        self.moved = said["went_back"] or self.moved
        if page.etag is not None:
            self.known[page.url] = page._replace(columns=None)
        # A read that only checks another one is equal to it or thrown away.
        if self.was_given:
            self._hashes.extend(map(hash, zip(*page.columns[:2], strict=True)))

    def finish(self):
        """Look for what is there twice; return why its pages do not belong together, None if they do."""
        twice = len(self._hashes) - len(set(self._hashes))
        if twice and not self.moved:
            self.moved = "%d entries came twice, as when pages move while they are read" % twice
        return self.moved

    def same_as(self, other):
        """Tell whether both had the same VMs with the same fields, in any order."""
        return self._total is not None and (self.listed, self._total) == (other.listed, other._total)


class _Spool:
    """Keeps what has to wait until the end; on disk when it is much."""

    def __init__(self):
        self._file = tempfile.SpooledTemporaryFile(max_size=1024 * 1024, mode="w+", encoding="utf-8")  # noqa: SIM115

    def add_all(self, values):
        self._file.writelines(json.dumps(value) + "\n" for value in values)

    def __iter__(self):
        self._file.seek(0)
        for line in self._file:
            yield json.loads(line)


def _check_clock(headers, url):
    """Refuse a server whose clock is ahead of ours: by what it says its list is younger than it is."""
    date = _web.http_date(headers.get("Date", ""))
    ahead = date.timestamp() - time.time() if date else 0
    if ahead > FUTURE_SECONDS:
        raise _refusal("clock_skew", url, "its clock is %d s ahead of ours; set both by NTP" % ahead)


def _etag(known):
    return known.etag if known else None


def next_link(header):
    """Return the target of the link with the relation ``next`` in a Link header (RFC 8288), None without one."""
    for target, parameters in LINK.findall(header):
        relation = RELATION.search(parameters)
        if relation and "next" in (relation[1] or relation[2] or "").lower().split():
            return target
    return None


def _number(url, param):
    """Return the number that we put there ourselves."""
    return int(dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(url).query))[param])


def _count(value, url):
    """Return the number that a header or a body has as the count, None without one."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 19:
        return int(value)
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
        return value
    raise _refusal("not_a_manifest", url, "the count must be a number of VMs, not %.200r" % (value,))


def _parsed(value):
    """Return seconds since 1970 of an ISO 8601 text with a time zone, None of anything else."""
    try:
        instant = datetime.datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return None
    return instant.timestamp() if instant.tzinfo else None


def _can_travel(text):
    """Tell whether a text can stand in a URL: JSON can hold half of a character."""
    try:
        return text.encode("utf-8") is not None
    except UnicodeEncodeError:
        return False


def _is_number(value):
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def _kind(value):
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null or nothing"}
    return names.get(type(value), "a number")


def _refusal(code, url, text):
    return ManifestError(code, "GET %s: %s" % (_web.shown(url), text))
