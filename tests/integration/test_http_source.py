# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The source http against real servers, and what goes wrong on the wire."""

from __future__ import annotations

import contextlib
import datetime
import email.utils
import gzip
import ipaddress
import itertools
import json
import logging
import os
import pathlib
import resource
import shutil
import socket
import subprocess
import sys
import textwrap
import threading
import time
import traceback
import zlib

import pytest
from ansible_collections.microvm.reaper.plugins.plugin_utils import manifest, sources
from ansible_collections.microvm.reaper.plugins.plugin_utils.sources import _web
from ansible_collections.microvm.reaper.plugins.plugin_utils.sources import http as source
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from integration import http_api
from integration.http_api import head, reply
from unit import builders

NOW = 1_800_000_000.0
SECRET = "s3cret-T0ken/with+signs"
FIELDS = {"vm_id": "id", "host": "node.name", "state": "state"}


@pytest.fixture
def api():
    running = http_api.Api()
    yield running
    running.close()


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    monkeypatch.setattr(_web, "BACKOFF", 0.01)


def context(**others):
    common = {"realm": "prod", "now": NOW, "directory": "/", "inventory": None, "terminal_states": ["destroyed"]}
    return {**common, **others}


def checked(url, **options):
    ((_module, found),) = sources.configured([{"type": "http", "url": url, "deadline": 10, **options}])
    return found


def whole(url, **options):
    """Return the document with its VMs as a list."""
    document = source.fetch(checked(url, **options), context())
    assert (document["complete"], document["proven"]) == (False, False)
    return {**document, "vms": list(builders.vms_of(document["vms"]))} | {
        name: document.get(name) for name in ("complete", "proven", "unproven", "count", "epoch", "sha256")
    } | {"tombstones": list(document.get("tombstones") or [])}


def ids(document):
    return [vm["vm_id"] for vm in document["vms"]]


def refusal(url, **options):
    with pytest.raises(manifest.ManifestError) as caught:
        whole(url, **options)
    text = "".join(traceback.format_exception(caught.value))
    assert not shown_anywhere(caught.value), text
    assert "\n" not in str(caught.value)
    return caught.value.code, str(caught.value)


def shown_anywhere(err):
    """Tell whether the secret is in an error, in what it wraps, or in what these hold."""
    forms = ("s3cret", "czNjcmV0")
    found, seen = [err], []
    while found:
        one = found.pop()
        if any(one is other for other in seen) or one is None:
            continue
        seen.append(one)
        said = "%s %r %r" % (one, one, getattr(one, "__dict__", None))
        if any(form in said for form in forms):
            return True
        if isinstance(one, BaseException):
            found += [*one.args, one.__cause__, one.__context__]
    return False


def vm(number, **others):
    return {"id": "v%d" % number, "node": {"name": "h%d" % (number % 3)}, "state": "running", **others}


class Fleet:
    """A list of VMs that is handed out in pages of any kind."""

    def __init__(self, api, count=5, size=2, paging="link", **said):
        self.api, self.vms, self.size, self.paging = api, [vm(n) for n in range(count)], size, paging
        self.said = said
        self.headers = {}
        self.before = {}  # {number of the request: what happens before it}
        api.answer = self.answer
        self.options = {
            "url": api.url, "items": "data", "fields": FIELDS, "realm": "prod", "paging": paging, "limit": size,
            "about": {},
        }
        if paging in ("next", "cursor"):
            self.options["next"] = "meta.next"

    def answer(self, request):
        self.before.get(request.number, lambda: None)()
        begin = self.begin(request.query)
        end = begin + self.size
        body = {"data": self.vms[begin:end], "meta": {"next": None}, **self.said}
        headers = dict(self.headers)
        if end < len(self.vms):
            following = "%s?limit=%d&from=%d" % (request.path, self.size, end)
            if self.paging == "link":
                headers["Link"] = '<%s>; rel="first", <%s>; rel="next"' % (request.path, following)
            body["meta"]["next"] = following if self.paging == "next" else "c%d" % end
        return reply(body, **headers)

    def begin(self, query):
        assert query["limit"] == str(self.size)
        if self.paging == "page":
            return (int(query["page"]) - 1) * self.size
        if self.paging == "offset":
            return int(query["offset"])
        if self.paging == "cursor":
            return int(query.get("cursor", "c0")[1:])
        return int(query.get("from", 0))

    def whole(self, **others):
        return whole(**{**self.options, **others})

    def refusal(self, **others):
        return refusal(**{**self.options, **others})


ALL = ["v0", "v1", "v2", "v3", "v4"]


# What it reads


def test_a_manifest_as_a_file_has_it(api):
    checksum = manifest.sha256(["v1", "v2"])
    whole_manifest = {
        "realm": "prod", "generated_at": "2027-01-15T07:59:00Z", "complete": True, "hosts": ["h1"], "epoch": 7,
        "count": 2, "sha256": checksum, "vms": [{"vm_id": "v1", "host": "h1", "also_on": []}, {"vm_id": "v2"}],
        "tombstones": [{"vm_id": "v3", "destroyed_at": "2027-01-15T07:00:00Z"}],
    }
    api.answer = lambda request: reply(whole_manifest)
    got = whole(api.url)
    assert got["vms"] == [
        {"vm_id": "v1", "host": "h1", "state": None, "also_on": None},
        {"vm_id": "v2", "host": None, "state": None, "also_on": None},
    ]
    assert (got["realm"], got["hosts"], got["epoch"], got["count"]) == ("prod", ["h1"], 7, 2)
    assert (got["generated_at"], got["sha256"], got["complete"]) == (NOW - 60, checksum, True)
    assert got["tombstones"] == whole_manifest["tombstones"]
    assert (got["proven"], got["unproven"], len(api.requests)) == (True, None, 1)
    assert api.requests[0].headers["Accept-Encoding"] == "gzip"
    assert api.requests[0].headers["Cache-Control"] == "no-cache"


@pytest.mark.parametrize("paging", ["link", "next", "cursor", "page", "offset"])
@pytest.mark.parametrize("count", [0, 1, 4, 5])
def test_all_pages_of_all_kinds(api, paging, count):
    got = Fleet(api, count=count, paging=paging, total=count).whole(about={"count": "total"})
    assert ids(got) == ALL[:count]
    assert got["vms"][:1] == [{"vm_id": "v0", "host": "h0", "state": "running", "also_on": None}][:count]
    assert (got["proven"], got["count"]) == (True, count)
    pages = max(1, (count + 1) // 2) if paging in ("link", "next", "cursor") else (count + 1) // 2 + 1
    reads = 2 if paging in ("page", "offset") else 1
    assert len(api.requests) == pages * reads


def test_a_budget_is_that_of_the_first_page(api):
    fleet = Fleet(api, limits={"reap": {"h1": 2, "*": 0}})
    assert "budget" not in fleet.whole()
    assert fleet.whole(about={"budget": "limits.reap"})["budget"] == {"h1": 2, "*": 0}
    assert "about.budget (limits.gone) finds nothing" in fleet.refusal(about={"budget": "limits.gone"})[1]
    # One that counts down with each question is a budget all the same, and no list that changes.
    fleet.before = {number: lambda number=number: fleet.said.update(limits=9 - number) for number in range(20)}
    got = fleet.whole(about={"budget": "limits"})
    assert (got["proven"], type(got["budget"])) == (True, int)


def test_an_epoch_on_each_page_spares_the_second_read_of_pages_by_number(api):
    fleet = Fleet(api, paging="page", count=4, size=2, total=4, at=9)
    got = fleet.whole(about={"count": "total", "epoch": "at"})
    assert (ids(got), got["proven"], len(api.requests), got["epoch"]) == (ALL[:4], True, 3, 9)


def test_fields_of_any_shape(api):
    api.answer = lambda request: reply({"a": [{"b": [
        {"n": 17, "on": {"src": "h1", "dst": "h2"}, "st": "migrating"},
        {"n": 18, "on": {"src": "h1", "dst": None}, "st": "gone", "end": "2027-01-15T07:00:00Z"},
    ]}]})
    got = whole(api.url, items="a[].b[]", realm="prod", about={}, fields={
        "vm_id": "to_string(n)", "host": "on.src", "also_on": "[on.dst]", "state": "st", "destroyed_at": "end"})
    assert got["vms"] == [
        {"vm_id": "17", "host": "h1", "state": "migrating", "also_on": ["h2"]},
        {"vm_id": "18", "host": "h1", "state": "gone", "also_on": None},
    ]
    assert got["tombstones"] == [{"vm_id": "18", "destroyed_at": "2027-01-15T07:00:00Z"}]


def test_what_has_only_an_end_is_no_vm_but_a_tombstone(api):
    api.answer = lambda request: reply([{"id": "v1"}, {"id": "v2", "end": 5}], X_Total="2")
    got = whole(api.url, items="@", realm="prod", about={}, fields={"vm_id": "id", "destroyed_at": "end"},
                count_header="x-total")
    assert (ids(got), got["tombstones"]) == (["v1"], [{"vm_id": "v2", "destroyed_at": 5}])
    # The consumer counts what it was given.
    assert (got["proven"], got["count"]) == (True, 1)


def test_the_whole_way_into_an_index(api, tmp_path):
    Fleet(api, count=5, total=5)
    fleet = Fleet(api, count=5, total=5)
    wanted = {"type": "http", **fleet.options, "about": {"count": "total"}}
    handle = sources.fetch([wanted], context(), str(tmp_path / "index"), max_age=600)
    assert (handle["count"], handle["proven"], handle["realm"]) == (5, True, "prod")
    assert handle["source"] == "http %s" % api.url
    assert manifest.share(handle, "h1", {"v1", "v9"})["live"] == ["v1"]


# Proof


def test_row_02_a_list_with_no_count_is_proven_by_reading_it_twice(api):
    got = Fleet(api).whole()
    assert (ids(got), got["proven"], len(api.requests)) == (ALL, True, 6)
    assert whole(**{**Fleet(api).options, "proof": "none"})["unproven"] == "the option proof is none"


def test_etags_spare_the_second_transfer(api):
    fleet = Fleet(api)
    plain = fleet.answer

    def answer(request):
        tag = '"tag-%s"' % request.query.get("from", "0")
        fleet.headers["ETag"] = tag
        if request.headers.get("If-None-Match") == tag:
            return head(304, ETag=tag)
        return plain(request)

    api.answer = answer
    got = fleet.whole()
    assert (ids(got), got["proven"]) == (ALL, True)
    assert [request.headers.get("If-None-Match") for request in api.requests] == [
        None, None, None, '"tag-0"', '"tag-2"', '"tag-4"']


def test_a_304_that_was_not_asked_for_is_no_list(api):
    api.answer = lambda request: head(304)
    assert "answered 304" in refusal(api.url)[1]


@pytest.mark.parametrize("others", [{}, {"count_header": "X-Total"}])
def test_a_list_that_changes_between_two_reads_is_read_until_it_rests(api, others):
    fleet = Fleet(api, paging="page")
    fleet.headers["X-Total"] = "6"
    # Four requests make a read. The first has all five, which is not what its count says: it moves.
    fleet.before[1] = lambda: fleet.headers.update({"X-Total": "5"})
    fleet.before[6] = lambda: (fleet.vms.append(vm(5)), fleet.headers.update({"X-Total": "6"}))
    got = fleet.whole(**others)
    assert got["proven"] is True
    assert set(ids(got)) == {*ALL, "v5"}
    # What was read and is no more is listed too; the numbers of the source say nothing of that.
    assert got["count"] is None


def test_a_change_of_host_or_state_is_a_change(api):
    for key, value in (("node", {"name": "h9"}), ("state", "stopped")):
        fleet = Fleet(api, count=2, size=3)
        first = len(api.requests)
        fleet.before[first + 2] = lambda fleet=fleet, key=key, value=value: fleet.vms[1].update({key: value})
        got = fleet.whole()
        assert (got["proven"], len(api.requests) - first) == (True, 3)
        assert [one for one in got["vms"] if one["host"] == "h9" or one["state"] == "stopped"]


def test_row_02_a_list_that_never_rests_stays_unproven(api):
    fleet = Fleet(api, count=1, size=100)
    for number in range(1, 20):
        fleet.before[number] = lambda: fleet.vms.append(vm(len(fleet.vms)))
    got = fleet.whole()
    assert (got["proven"], got["complete"]) == (False, True)
    assert got["unproven"] == "read 4 times: two reads of it differ"
    assert len(api.requests) == 4


def test_row_02_pages_that_move_lose_a_vm_that_a_count_does_not_miss(api):
    """v0 goes and v9 comes between page 1 and 2: five are counted, five are listed, and v2 is not among them."""
    fleet = Fleet(api, paging="page", total=5)
    fleet.before[2] = lambda: (fleet.vms.pop(0), fleet.vms.append(vm(9)))
    got = fleet.whole(about={"count": "total"})
    assert "v2" in ids(got)
    assert got["proven"] is True


def test_row_02_a_vm_that_comes_twice_means_that_pages_moved(api):
    fleet = Fleet(api, paging="page", count=6)
    fleet.before[2] = lambda: fleet.vms.insert(0, vm(9))
    got = fleet.whole()
    assert (got["proven"], set(ids(got))) == (True, {*ALL, "v5", "v9"})
    # One that always comes twice is never proven, neither by count nor by reading again.
    for others in ({}, {"count_header": "X-Total"}):
        fleet = Fleet(api)
        fleet.vms[4] = fleet.vms[0]
        fleet.headers["X-Total"] = "5"
        got = fleet.whole(**others)
        assert (got["proven"], got["unproven"]) == (
            False, "read 4 times: 1 entries came twice, as when pages move while they are read")


@pytest.mark.parametrize(("count", "listed"), [(6, 5), (4, 5), (1, 0), (0, 5)])
def test_row_02_a_count_that_is_off(api, count, listed):
    code, said = Fleet(api, count=listed, total=count).refusal(about={"count": "total"})
    assert code == "incomplete"
    assert "its count is %d, but %d VMs were listed" % (count, listed) in said


def test_row_02_a_count_in_a_header_that_is_off(api):
    fleet = Fleet(api)
    fleet.headers["X-Total"] = "50"
    assert fleet.refusal(count_header="X-Total")[0] == "incomplete"
    # Without the header the second read has to do, unless the count was demanded.
    fleet.headers.clear()
    assert fleet.whole(count_header="X-Total")["proven"] is True
    code, said = fleet.refusal(count_header="X-Total", proof="count")
    assert (code, "it has no count; see count_header" in said) == ("incomplete", True)
    for bad in ("-1", "1.5", "many", "1 2"):
        fleet.headers["X-Total"] = bad
        assert fleet.refusal(count_header="X-Total")[0] == "not_a_manifest"


def test_row_02_a_count_that_changes_while_the_pages_are_read(api):
    fleet = Fleet(api, total=5)
    numbers = itertools.count(5)
    plain = fleet.answer

    def answer(request):
        fleet.said["total"] = next(numbers)
        return plain(request)

    api.answer = answer
    got = fleet.whole(about={"count": "total"})
    assert (got["proven"], "its count changed from" in got["unproven"]) == (False, True)


def test_row_02_a_count_that_is_not_on_the_last_page(api):
    fleet = Fleet(api, total=5)
    plain = fleet.answer

    def answer(request):
        if request.query.get("from") == "4":
            fleet.said.pop("total", None)
        else:
            fleet.said["total"] = 5
        return plain(request)

    api.answer = answer
    got = fleet.whole(about={"count": "total"}, proof="count")
    assert got["unproven"] == "there is no count on its last page"
    assert fleet.whole(about={"count": "total"})["proven"] is True


def test_row_02_page_1_of_3_without_a_way_to_the_next(api):
    """The cursor is missing on a full page."""
    fleet = Fleet(api, paging="cursor", total=5)
    fleet.options["next"] = "meta.nxt"
    code, said = fleet.refusal(about={"count": "total"})
    assert (code, "its count is 5, but 2 VMs were listed on 1 pages" in said) == ("incomplete", True)
    # With no count it looks like a list of two, twice.
    for paging in ("link", "next", "cursor"):
        fleet = Fleet(api, paging=paging, count=2)
        got = fleet.whole()
        assert (got["proven"], "names no next one" in got["unproven"]) == (False, True)
        assert whole(**{**fleet.options, "params": {"limit": 2}, "limit": None})["proven"] is False
    fleet = Fleet(api, paging="cursor", count=2, size=3)
    assert fleet.whole()["proven"] is True


def test_row_01_an_empty_list(api, tmp_path):
    """Whether it may be empty is the planner's question: the source only says that it is."""
    got = Fleet(api, count=0, total=0).whole(about={"count": "total"})
    assert (got["vms"], got["count"], got["proven"]) == ([], 0, True)
    fleet = Fleet(api, count=0)
    handle = sources.fetch([{"type": "http", **fleet.options}], context(), str(tmp_path / "index"), max_age=600)
    assert (handle["count"], manifest.share(handle, "h1", {"v1"})["live"]) == (0, [])


def test_row_01_an_empty_list_that_has_a_count(api):
    assert Fleet(api, count=0, total=3).refusal(about={"count": "total"})[0] == "incomplete"


@pytest.mark.parametrize("body", [{}, {"vms": None}, {"vms": {}}, {"vms": "none"}, {"vms": 0}, [], None, "x", 3, True])
def test_row_01_what_is_no_list_is_not_an_empty_one(api, body):
    api.answer = lambda request: reply(body)
    code, said = refusal(api.url)
    assert (code, "items (vms) must be a list" in said) == ("not_a_manifest", True)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({}, "fields.vm_id (id) finds null or nothing in entry 1"),
        ({"id": None}, "fields.vm_id (id) finds null"),
        ({"id": 7}, "finds a number in entry 1 of the page: 7; a number becomes a text by to_string(id)"),
        ({"id": True}, "finds true or false"),
        ({"id": ["v"]}, "finds a list"),
        ({"id": {"a": 1}}, "finds an object"),
        ("v1", "fields.vm_id (id) finds null"),
        (None, "fields.vm_id (id) finds null"),
        (dict(vm(1), node={"name": 5}), "fields.host (node.name) finds a number"),
        (dict(vm(1), state=["x"]), "fields.state (state) finds a list"),
    ],
)
def test_entries_that_are_no_vms(api, entry, said):
    fleet = Fleet(api, size=9)
    fleet.vms[1] = entry
    code, text = fleet.refusal()
    assert (code, said in text) == ("not_a_manifest", True), text


def test_other_hosts_that_are_none(api):
    fleet = Fleet(api, size=9)
    for value in (5, [5], [["h1"]], {"a": 1}):
        fleet.vms[1] = vm(1, also=value)
        code, said = fleet.refusal(fields={**FIELDS, "also_on": "also"})
        assert (code, "fields.also_on (also) finds" in said) == ("not_a_manifest", True)
    for value, hosts in (("h7", ["h7"]), (["h7", None], ["h7"]), ([None], None), ([], None)):
        fleet.vms[1] = vm(1, also=value)
        assert fleet.whole(fields={**FIELDS, "also_on": "also"})["vms"][1]["also_on"] == hosts


def test_paths_that_find_nothing_are_named(api):
    fleet = Fleet(api, total=5)
    for name in ("host", "state"):
        code, said = fleet.refusal(fields={**FIELDS, name: "nowhere"})
        assert (code, "fields.%s (nowhere) finds nothing in any of 5 VMs" % name in said) == ("not_a_manifest", True)
    for name in ("realm", "count", "epoch", "hosts", "generated_at", "complete", "sha256", "tombstones"):
        code, said = fleet.refusal(about={name: "nowhere"}, realm=None if name == "realm" else "prod")
        assert (code, "about.%s (nowhere) finds nothing" % name in said) == ("not_a_manifest", True)
    code, said = fleet.refusal(items="join(',', data)")
    assert (code, "items: join(',', data) cannot be applied" in said) == ("not_a_manifest", True)


def test_row_04_an_old_list_says_so(api, tmp_path):
    for instant in (NOW - 4000, "2027-01-15T06:53:20Z"):
        fleet = Fleet(api, made=instant)
        got = fleet.whole(about={"generated_at": "made"})
        assert got["generated_at"] == NOW - 4000
        wanted = {"type": "http", **fleet.options, "about": {"generated_at": "made"}}
        with pytest.raises(manifest.ManifestError) as caught:
            sources.fetch([wanted], context(), str(tmp_path / str(instant)), max_age=600)
        assert caught.value.code == "stale"


def test_row_04_a_list_out_of_a_cache_is_as_old_as_the_cache_says(api):
    fleet = Fleet(api, total=5)
    assert fleet.whole()["generated_at"] == NOW
    fleet.headers["Age"] = "5000"
    assert fleet.whole()["generated_at"] == NOW - 5000


def test_row_04_a_clock_ahead_makes_no_list_newer(api):
    about = {"generated_at": "made"}
    assert Fleet(api, made=NOW + manifest.FUTURE_SECONDS - 1).whole(about=about)["generated_at"] == NOW
    ahead = NOW + manifest.FUTURE_SECONDS + 1
    assert Fleet(api, made=ahead).whole(about=about)["generated_at"] == ahead
    for bad in ("yesterday", "2027-01-15T06:53:20", [], {}, True, 10**400):
        code, said = Fleet(api, made=bad).refusal(about=about)
        assert (code, "about.generated_at must be" in said) == ("not_a_manifest", True)


@pytest.mark.parametrize("name", ["epoch", "generated_at"])
def test_row_04_a_replica_that_lags(api, name):
    """Each second read is answered by one that is behind: it lists the same, and proves nothing."""
    fleet = Fleet(api, size=9, at=NOW - 10)
    for number in range(1, 20):
        fleet.before[number] = lambda number=number: fleet.said.update(at=NOW - 10 - 50 * (number % 2 == 0))
    got = fleet.whole(about={name: "at"}, limit=9)
    assert (got["proven"], got["complete"]) == (False, True)
    assert "lags" in got["unproven"]
    assert got["epoch"] == (NOW - 10 if name == "epoch" else None)


def test_row_04_an_epoch_that_changes_between_pages(api):
    fleet = Fleet(api, total=5, at=1)
    fleet.before[2] = lambda: fleet.said.update(at=2)
    got = fleet.whole(about={"count": "total", "epoch": "at"})
    assert (got["proven"], got["epoch"], len(api.requests)) == (True, 2, 6)
    for number in range(7, 30):
        fleet.before[number] = lambda: fleet.said.update(at=fleet.said["at"] + 1)
    got = fleet.whole(about={"count": "total", "epoch": "at"})
    assert (got["proven"], "its epoch changed from" in got["unproven"]) == (False, True)
    for bad in ("7", True, [], 10**400):
        assert Fleet(api, at=bad).refusal(about={"epoch": "at"})[0] == "not_a_manifest"


def test_row_05_another_realm(api, tmp_path):
    fleet = Fleet(api, realm="stage")
    code, said = fleet.refusal(about={"realm": "realm"}, realm="prod")
    assert (code, "realm 'stage' and not for 'prod'" in said) == ("other_realm", True)
    # Without a fixed one the answer's is handed on: hosts compare it with theirs.
    assert fleet.whole(about={"realm": "realm"}, realm=None)["realm"] == "stage"


def test_row_05_a_page_of_another_realm(api):
    fleet = Fleet(api, realm="prod")
    fleet.before[3] = lambda: fleet.said.update(realm="stage")
    assert fleet.refusal(about={"realm": "realm"}, realm=None)[0] == "other_realm"


def test_row_02_a_list_that_calls_itself_incomplete(api):
    for bad in (False, "yes", 0, None):
        api.answer = lambda request, bad=bad: reply(
            {"realm": "prod", "generated_at": NOW, "complete": bad, "vms": []})
        assert refusal(api.url)[0] == ("not_a_manifest" if bad is None else "incomplete")


# Chains of pages


def chain(*links, paging="next"):
    """Answer with a page for each of ``links``, each of which is what the page says of the next one."""
    def answer(request):
        number = min(request.number, len(links))
        link = links[number - 1]
        headers = {"Link": "<%s>; rel=next" % link} if paging == "link" and link else {}
        return reply({"data": [vm(request.number)], "meta": {"next": link}}, **headers)

    return answer


@pytest.mark.parametrize("paging", ["link", "next"])
@pytest.mark.parametrize(
    "link",
    ["http://example.net/v1/vms?from=2", "https://127.0.0.1/", "//example.net/x", "http://127.0.0.1:1/x",
     "http://user@127.0.0.1/", "http://[::1/", "http://127.0.0.1:99999/", "ftp://127.0.0.1/x", "file:///etc/passwd",
     "http:\\\\example.net\\x"],
)
def test_a_next_page_elsewhere_gets_no_credentials(api, paging, link):
    api.answer = chain(link, paging=paging)
    code, said = Fleet.refusal(_options(api, paging), token=SECRET)
    assert code in ("incomplete", "unreadable")
    # Some of these are read as a path at our own host, which is no harm.
    assert "another scheme, host or port" in said or {request.path for request in api.requests} == {
        "/v1/vms", "/v1/%5C%5Cexample.net%5Cx"}
    assert "user@" not in said


class _options:
    def __init__(self, api, paging, **others):
        self.options = {"url": api.url, "items": "data", "fields": FIELDS, "realm": "prod", "about": {},
                        "paging": paging, **({} if paging == "link" else {"next": "meta.next"}), **others}


@pytest.mark.parametrize("paging", ["link", "next", "cursor"])
def test_row_02_pages_in_a_circle(api, paging):
    for links in (["?a=1", "?a=2", "?a=1"], ["?a=1", "?a=1"], ["/v1/vms"]):
        api.requests.clear()
        api.answer = chain(*links, paging=paging)
        code, said = Fleet.refusal(_options(api, paging))
        assert (code, "go round in a circle" in said) == ("incomplete", True), said
        assert len(api.requests) <= 4


@pytest.mark.parametrize("paging", ["page", "offset", "next"])
def test_row_02_an_api_that_does_not_know_the_parameter(api, paging):
    """It answers with its first page for ever."""
    numbers = itertools.count()
    api.answer = lambda request: reply({"data": [vm(1), vm(2)], "meta": {"next": "?n=%d" % next(numbers)}})
    others = {} if paging == "next" else {"next": None}
    code, said = Fleet.refusal(_options(api, paging, **others))
    assert (code, "page 2 is the same as the one before it" in said) == ("incomplete", True)


def test_row_02_pages_without_an_end(api):
    api.answer = lambda request: reply({"data": [vm(request.number)], "meta": {"next": "c%d" % request.number}})
    code, said = Fleet.refusal(_options(api, "cursor", max_pages=7))
    assert (code, "more pages than max_pages=7" in said, len(api.requests)) == ("incomplete", True, 7)


def test_a_short_page_is_not_the_last_one(api):
    """The server sends less than it was asked for, and an offset goes on from what came."""
    fleet = Fleet(api, count=5, size=2, paging="offset")
    plain = fleet.begin
    fleet.begin = lambda query: plain({**query, "limit": "2"})
    assert ids(fleet.whole(limit=100)) == ALL
    assert [request.query["offset"] for request in api.requests[:4]] == ["0", "2", "4", "5"]


def test_what_is_no_cursor(api):
    for bad in ([1], {"a": 1}, True, 1.5):
        api.answer = chain(bad, paging="cursor")
        assert Fleet.refusal(_options(api, "cursor"))[0] == "not_a_manifest"


# Answers that are none


@pytest.mark.parametrize(
    ("wire", "code", "said"),
    [
        (reply({"vms": []}, 206), "incomplete", "answered 206 application/json: '{\"vms\": []}'; a part of a list"),
        (head(204, Content_Type=None), "unreadable", "answered 204 without a type, with an empty body"),
        (reply({"vms": []}, 201), "unreadable", "answered 201"),
        (reply({"vms": []}, 203), "unreadable", "answered 203"),
        (reply({"why": "who"}, 401), "unreadable", "see token, token_file, username"),
        (reply({}, 403), "unreadable", "see what the token"),
        (reply({}, 404), "unreadable", "answered 404 application/json: '{}'; see url"),
        (reply({}, 410), "unreadable", "answered 410"),
        (reply(b"<html>\n<b>Log in</b>", Content_Type="text/html"), "unreadable",
         "answered 200 text/html: '<html> <b>Log in</b>'; JSON was expected"),
        (reply(b'{"vms": []}', Content_Type=None), "unreadable", "answered 200 without a type"),
        (reply(b'{"vms": []}', Content_Type="text/plain"), "unreadable", "JSON was expected"),
        (reply(b'{"vms": []}', Content_Type="application/json; charset=latin-1"), "unreadable", "in 'latin-1'"),
        (reply('{"vms": []}'.encode("utf-16"), Content_Type="application/json"), "unreadable", "not UTF-8 from byte 0"),
        (reply(b'{"vms": ["\xe9"]}'), "unreadable", "not UTF-8 from byte 10"),
        (reply(b'{"vms": ['), "unreadable", "no JSON (Expecting value"),
        (reply(b""), "unreadable", "no JSON"),
        (reply(b'{"vms": []} {}'), "unreadable", "no JSON (Extra data"),
        (reply(b'{"vms": [NaN]}'), "unreadable", "NaN is no number in JSON"),
        (reply(b'{"vms": [-Infinity]}'), "unreadable", "-Infinity is no number"),
        (reply(b'{"vms": [], "vms": [{"vm_id": "v1"}]}'), "unreadable", "the key 'vms' is there twice"),
        (reply(b'{"vms": [{"vm_id": "v1", "vm_id": "v2"}]}'), "unreadable", "the key 'vm_id' is there twice"),
        (reply(b"[" * 10_000_000), "unreadable", "nested too deeply"),
        (reply(b'{"a":' * 2_000_000), "unreadable", "nested too deeply"),
        (reply(b'{"count": ' + b"9" * 5000 + b"}"), "unreadable", "no JSON"),
        (reply({"vms": []}, Content_Encoding="br"), "unreadable", "packed with 'br'"),
        (reply({"vms": []}, Content_Encoding="gzip"), "incomplete", "its gzip data is damaged"),
    ],
)
def test_row_02_answers_that_are_no_list(api, wire, code, said):
    api.answer = lambda request: wire
    found, text = refusal(api.url, retries=1)
    assert (found, said in text) == (code, True), text
    assert text.startswith("GET %s" % api.url)
    assert len(text) < 500


def test_a_type_of_json_in_any_dress(api):
    for kind in ("application/json", "Application/JSON; charset=UTF-8", 'application/json;charset="utf8"',
                 "application/vnd.api+json", "application/json; profile=x"):
        api.answer = lambda request, kind=kind: reply({"vms": []}, Content_Type=kind)
        assert whole(api.url, about={}, realm="prod")["complete"] is True


def test_row_02_redirects_are_not_followed(api):
    for status in (301, 302, 303, 307, 308):
        api.answer = lambda request, status=status: reply(
            {}, status, Location="http://who:%s@example.net/x?key=%s" % ("s3cret-T0ken%2F", SECRET))
        code, said = refusal(api.url)
        assert (code, "points to http://example.net/x?key=...: redirects are not followed" in said) == (
            "unreadable", True)


BODY = json.dumps({"vms": [{"vm_id": "v%d" % n, "host": "h1"} for n in range(100)]}).encode()
CHUNKED = {"Transfer_Encoding": "chunked"}


def chunk(data):
    return b"%x\r\n%s\r\n" % (len(data), data)


def truncated_gzip():
    data = gzip.compress(BODY)[:-12]
    return reply(data, Content_Encoding="gzip")


@pytest.mark.parametrize(
    ("pieces", "said"),
    [
        ([head(Content_Length=len(BODY)) + BODY[:-50]], "the body broke off: the connection ended early"),
        ([head(Content_Length=len(BODY) + 1) + BODY], "the body broke off"),
        ([head(**CHUNKED) + chunk(BODY)], "the body broke off"),
        ([head(**CHUNKED) + chunk(BODY)[:-40]], "the body broke off"),
        ([head(**CHUNKED) + chunk(BODY) + b"zz\r\n"], "the body broke off"),
        ([truncated_gzip()], "the gzip data broke off"),
        ([head(Content_Length=len(BODY)), 3.0], "the body broke off: nothing came for 0.5 s"),
    ],
)
def test_row_02_bodies_that_break_off(api, pieces, said):
    """Even one that would be whole: nobody can know that."""
    api.answer = lambda request: iter(pieces)
    code, text = refusal(api.url, retries=1, timeout=0.5)
    assert (code, said in text) == ("incomplete", True), text
    assert "(tried 2 times)" in text
    assert len(api.requests) == 2


def test_row_02_a_body_that_breaks_off_once_is_asked_for_again(api):
    good = reply({"vms": [{"vm_id": "v1", "host": "h1"}]})
    api.answer = lambda request: iter([good[:-5]]) if request.number == 1 else good
    assert ids(whole(api.url, about={}, realm="prod", proof="none")) == ["v1"]
    assert len(api.requests) == 2


def test_row_02_a_body_that_is_longer_than_it_says(api):
    api.answer = lambda request: iter([head(Content_Length=len(BODY) - 10) + BODY])
    assert refusal(api.url)[0] == "unreadable"


def test_a_body_in_chunks_and_packed(api):
    wanted = {"about": {}, "realm": "prod", "proof": "none"}
    api.answer = lambda request: head(**CHUNKED) + chunk(BODY[:70]) + chunk(BODY[70:]) + b"0\r\n\r\n"
    assert len(ids(whole(api.url, **wanted))) == 100
    api.answer = lambda request: reply(gzip.compress(BODY), Content_Encoding="gzip")
    assert len(ids(whole(api.url, **wanted))) == 100


def test_row_37_a_bomb_is_not_unpacked(api):
    pack = zlib.compressobj(9, zlib.DEFLATED, 31)
    bomb = b"".join(pack.compress(b" " * 1_000_000) for _megabyte in range(1000)) + pack.flush()
    api.answer = lambda request: reply(bomb, Content_Encoding="gzip")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    code, said = refusal(api.url, max_page_bytes=1_000_000)
    assert (code, "larger than max_page_bytes=1000000" in said) == ("unreadable", True)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000
    api.answer = lambda request: reply(b" " * 1_000_001)
    assert "larger than" in refusal(api.url, max_page_bytes=1_000_000)[1]
    assert "no JSON" in refusal(api.url, max_page_bytes=1_000_001)[1]


# Time


def drip(data, every):
    for number in range(len(data)):
        yield data[number:number + 1]
        yield every


@pytest.mark.parametrize("where", ["headers", "body", "chunks", "status"])
def test_a_slow_drip_does_not_outlive_the_deadline(api, where):
    slow = {
        "headers": lambda: itertools.chain([b"HTTP/1.1 200 OK\r\n"], drip(b"X-A: " + b"a" * 1000, 0.05)),
        "status": lambda: drip(b"HTTP/1.1 200 OK" + b"K" * 1000, 0.05),
        "body": lambda: itertools.chain([head(Content_Length=1000)], drip(b" " * 1000, 0.05)),
        "chunks": lambda: itertools.chain([head(**CHUNKED)], itertools.chain.from_iterable(
            drip(chunk(b" "), 0.02) for _chunk in range(1000))),
    }
    api.answer = lambda request: slow[where]()
    threads = threading.active_count()
    began = time.monotonic()
    code, said = refusal(api.url, deadline=1, timeout=0.5)
    assert 0.9 < time.monotonic() - began < 1.6
    # Nor does it go on in the dark; headers do until they are whole, as no library looks at a clock there.
    while where in ("body", "chunks") and threading.active_count() > threads:
        assert time.monotonic() - began < 4
        time.sleep(0.05)
    assert (code, "before the deadline of 1 s" in said) == ("incomplete", True)


def test_the_deadline_is_that_of_all_pages(api):
    fleet = Fleet(api, count=100)
    plain = fleet.answer
    api.answer = lambda request: (time.sleep(0.2), plain(request))[1]
    began = time.monotonic()
    code, said = fleet.refusal(deadline=1)
    assert 0.9 < time.monotonic() - began < 1.6
    assert (code, "before the deadline" in said) == ("incomplete", True)


def test_an_answer_that_does_not_come(api):
    api.answer = lambda request: iter([2.0])
    code, said = refusal(api.url, timeout=0.3, retries=1)
    assert (code, "(tried 2 times): no answer within 0.3 s" in said) == ("unreadable", True)


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_what_passes_is_tried_again(api, status):
    good = reply({"vms": []})
    api.answer = lambda request: good if request.number == 3 else reply({"busy": 1}, status)
    assert whole(api.url, about={}, realm="prod", proof="none")["complete"] is True
    api.requests.clear()
    code, said = refusal(api.url, retries=1)
    assert (code, "(tried 2 times): it answered %d application/json: '{\"busy\": 1}'" % status in said) == (
        "unreadable", True)


def test_what_does_not_pass_is_not(api):
    for status in (400, 401, 404, 302):
        api.requests.clear()
        api.answer = lambda request, status=status: reply({}, status)
        refusal(api.url)
        assert len(api.requests) == 1


def test_retry_after_is_waited_for(api):
    good = reply({"vms": []})
    about = {"about": {}, "realm": "prod", "proof": "none"}
    api.answer = lambda request: good if request.number > 1 else reply({}, 429, Retry_After="1")
    began = time.monotonic()
    whole(api.url, **about)
    assert 1 <= time.monotonic() - began < 2
    # An instant is one of the server's clock, which may differ from ours.
    then = datetime.datetime(2031, 1, 1, tzinfo=datetime.UTC)
    later = then + datetime.timedelta(seconds=1)
    api.requests.clear()
    api.answer = lambda request: good if request.number > 1 else reply(
        {}, 503, Date=email.utils.format_datetime(then, usegmt=True),
        Retry_After=email.utils.format_datetime(later, usegmt=True))
    began = time.monotonic()
    whole(api.url, **about)
    assert 1 <= time.monotonic() - began < 2


def test_retry_after_beyond_the_deadline_is_not_waited_for(api):
    for value in ("3600", "Wed, 01 Jan 2098 00:00:00 GMT"):
        api.answer = lambda request, value=value: reply({}, 503, Retry_After=value)
        began = time.monotonic()
        code, said = refusal(api.url, deadline=5)
        assert time.monotonic() - began < 1
        assert (code, "after the deadline of 5 s" in said) == ("unreadable", True)


# Servers that are not there


def test_nobody_listens(api):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        code, said = refusal("http://127.0.0.1:%d/" % free.getsockname()[1], retries=1)
    assert (code, "(tried 2 times): no answer: Connection refused" in said) == ("unreadable", True)
    code, said = refusal("http://nowhere.invalid/", retries=0)
    assert (code, "the name of the host cannot be resolved" in said) == ("unreadable", True)
    api.answer = lambda request: iter([])
    assert "closed without an answer" in refusal(api.url, retries=0)[1]
    api.answer = lambda request: iter([b"SSH-2.0-OpenSSH_9.2\r\n"])
    code, said = refusal(api.url, retries=0)
    assert (code, "no HTTP answer" in said) == ("unreadable", True)


# Secrets


def test_what_is_sent_to_prove_who_asks(api, tmp_path):
    api.answer = lambda request: reply({"vms": []})
    about = {"about": {}, "realm": "prod", "proof": "none"}
    (tmp_path / "secret").write_text(SECRET + "\n")
    path = str(tmp_path / "secret")
    for options, wanted in (
        ({"token": SECRET}, "Bearer " + SECRET),
        ({"token_file": path}, "Bearer " + SECRET),
        ({"username": "w\xe9", "password": SECRET}, "Basic d8OpOnMzY3JldC1UMGtlbi93aXRoK3NpZ25z"),
        ({"username": "w\xe9", "password_file": path}, "Basic d8OpOnMzY3JldC1UMGtlbi93aXRoK3NpZ25z"),
        ({"headers": {"Authorization": "ApiKey 1"}}, "ApiKey 1"),
    ):
        whole(api.url, **about, **options)
        assert api.requests[-1].headers["Authorization"] == wanted
    whole(api.url + "?b=1", **about, params={"a": [1, 2], "b": True}, headers={"X-N": 5})
    assert (api.requests[-1].query, api.requests[-1].headers["X-N"]) == ({"a": "2", "b": "true"}, "5")


def test_environment_and_netrc_are_not_read(api, tmp_path, monkeypatch):
    (tmp_path / ".netrc").write_text("default login x password y\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    whole(api.url, about={}, realm="prod", proof="none", token=SECRET)
    assert api.requests[0].headers["Authorization"] == "Bearer " + SECRET


WAYS = [
    {"token": SECRET},
    {"username": "who", "password": SECRET},
    {"headers": {"X-Key": SECRET}},
    {"params": {"key": SECRET, "list": [SECRET, "x"]}},
]


@pytest.mark.parametrize("way", WAYS)
def test_secrets_are_in_no_error(api, way, caplog):
    """refusal() looks for them in every error, and in all that these wrap and hold."""
    caplog.set_level(logging.DEBUG)

    def echo(request):
        heads = "%s %s" % (request.headers, request.query)
        return reply(json.dumps({"you": heads, "raw": SECRET}).encode(), 400, Content_Type="application/" + SECRET)

    broken = head(Content_Length=1000)
    wires = [
        echo, lambda request: reply(request.headers.as_bytes() + str(request.query).encode()),
        lambda request: reply({}, 302, Location="/x?" + SECRET),
        lambda request: reply(b'{"%s": 1, "%s": 2}' % ((SECRET.encode(),) * 2)),
        # One that would be cut short by the end of what is shown.
        *(lambda request, n=n: reply(b"x" * n + SECRET.encode(), 400) for n in (60, 75)),
        lambda request: iter([broken]), lambda request: iter([]), lambda request: iter([b"rubbish\r\n\r\n"]),
        lambda request: iter([b"HTTP/1.1 200 OK\r\nno header here\r\n: x\r\n\r\n{}"]),
        lambda request: reply({}, 503, Retry_After="9999"), lambda request: iter([1.0]),
    ]
    for wire in wires:
        api.answer = wire
        _code, said = refusal(api.url, retries=0, timeout=0.3, **way)
        assert said.startswith("GET http://127.0.0.1:")
    for url in ("http://127.0.0.1:1/", "http://nowhere.invalid/", api.url.replace("http:", "https:")):
        refusal(url, retries=0, **way)
    assert SECRET not in caplog.text and "s3cret" not in caplog.text
    options = checked(api.url + "?key=" + SECRET, **way)
    assert source.describe(options) == "http " + api.url


def test_a_broken_secret_is_not_shown(tmp_path):
    (tmp_path / "bad").write_bytes(SECRET.encode() + b"\nInjected: yes")
    (tmp_path / "none").write_bytes(b"")
    for bad in ({"token": SECRET + "\nX: y"}, {"headers": {"X-Key": SECRET + "\r\n"}},
                *({"token_file": str(tmp_path / name)} for name in ("bad", "none", "nothing")),
                {"token": SECRET, "username": "x", "password": SECRET}, {"token": "caf\xe9" + SECRET}):
        assert refusal("http://127.0.0.1:1/", **bad)[0] == "bad_source"
    for bad in ("http://who:%s@host/", "http://host/%s \n", "ftp://%s"):
        assert refusal(bad % SECRET)[0] == "bad_source"


# Looking up single VMs


def looked_up(api, *vm_ids, epoch=None, **others):
    others = {"about": {}, **others}
    options = checked(api.url, items="data", fields=FIELDS, realm="prod",
                      lookup_url=api.url + "/{vm_id}?full=1", **others)
    return source.still_listed(options, context(), list(vm_ids), epoch)


class Single:
    def __init__(self, api, *vms, gone=404):
        self.vms, self.gone = {one["id"]: one for one in vms}, gone
        api.answer = self.answer

    def answer(self, request):
        if request.path.endswith("/vms"):
            return reply({"data": list(self.vms.values())})
        found = self.vms.get(request.path.rpartition("/")[2])
        return reply(found) if found else reply({}, self.gone)


def test_vms_are_looked_up(api):
    for gone in (404, 410):
        Single(api, vm(1), vm(2, state="Destroyed"), vm(3, state="odd"), vm(4, node=None), gone=gone)
        assert looked_up(api, "v1", "v2", "v3", "v4", "v5") == {"v1": ["h1"], "v3": ["h0"], "v4": []}
    assert looked_up(api) == {}


@pytest.mark.parametrize(
    ("ahead", "is_believed"), [(None, True), (-4000, True), (20, True), (40, False), (9000, False)]
)
def test_row_06_a_server_whose_clock_is_ahead_is_not_believed(api, ahead, is_believed):
    """What it made minutes ago is of now, by its clock; one that is behind makes its list older only."""
    date = {} if ahead is None else {"Date": email.utils.formatdate(time.time() + ahead, usegmt=True)}
    page = {"data": [vm(1)], "at": time.time() - 5}
    api.answer = lambda request: reply(page, **date)
    options = {"items": "data", "fields": FIELDS, "realm": "prod"}
    if is_believed:
        assert ids(whole(api.url, about={"generated_at": "at"}, **options)) == ["v1"]
    else:
        code, said = refusal(api.url, about={"generated_at": "at"}, **options)
        assert (code, "s ahead of ours; set both by NTP" in said) == ("clock_skew", True)
    # Who does not say when is believed to answer at once.
    assert ids(whole(api.url, about={}, **options)) == ["v1"]


def test_row_04_a_lookup_at_a_replica_that_lags_is_no_answer(api):
    """It does not know the VM yet, as it does not know the epoch of the list that the VM was missing from."""
    Single(api, vm(1))
    api.said = {"epoch": 7}
    plain = api.answer
    api.answer = lambda request: plain(request) if request.path != "/v1/vms" else reply({"data": [vm(1)], **api.said})
    for epoch in (None, 6, 7):
        assert looked_up(api, "v1", "v2", epoch=epoch, about={"epoch": "epoch"}) == {"v1": ["h1"]}
    with pytest.raises(manifest.ManifestError, match="was at epoch 8 and is at 7 now") as caught:
        looked_up(api, "v1", "v2", epoch=8, about={"epoch": "epoch"})
    assert caught.value.code == "epoch_went_back"
    # What it finds alive is alive, whoever says so.
    assert looked_up(api, "v1", epoch=8, about={"epoch": "epoch"}) == {"v1": ["h1"]}


def test_the_id_is_quoted(api):
    Single(api, vm(1))
    looked_up(api, "a:b@c+d")
    assert api.requests[0].path == "/v1/vms/a%3Ab%40c%2Bd"
    assert api.requests[0].query == {"full": "1"}


def test_a_lookup_at_the_wrong_place_finds_nothing_and_is_noticed(api):
    """It would say of every VM that it is gone."""
    single = Single(api, vm(1), vm(2))
    plain = api.answer
    api.answer = lambda request: reply({}, 404) if request.path != "/v1/vms" else plain(request)
    with pytest.raises(manifest.ManifestError, match="does not find VM v1, which is on the list; see lookup_url"):
        looked_up(api, "v9")
    single.vms.clear()
    with pytest.raises(manifest.ManifestError, match="no live VM with which lookup_url could be tried"):
        looked_up(api, "v9")


@pytest.mark.parametrize(
    "wire",
    [reply({}, 500), reply({}, 403), reply({}, 204), reply({}), reply([]), reply(b"{"), reply({"id": "other"}),
     reply({}, 206), reply(b"<html>", Content_Type="text/html"), iter([])],
)
def test_what_is_no_answer_to_a_lookup(api, wire):
    api.answer = lambda request: wire
    with pytest.raises(manifest.ManifestError) as caught:
        looked_up(api, "v1", retries=0)
    assert "GET %s/v1?full=..." % api.url in str(caught.value)


def test_without_lookup_url_the_list_has_to_be_fetched(api):
    assert source.still_listed(checked(api.url), context(), ["v1"], None) is None


# TLS, by a server that people use

NGINX = shutil.which("nginx", path=os.environ["PATH"] + os.pathsep + "/usr/sbin")


def certificate(folder, name, issuer=None, days=2):
    """Make a key and a certificate, of an authority or signed by one; it has ended where ``days`` is negative."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject, signer, signs = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]), key, name
    if issuer:
        signer, signs = serialization.load_pem_private_key((folder / (issuer + ".key")).read_bytes(), None), issuer
    today = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder().subject_name(subject).public_key(key.public_key())
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, signs)]))
        .serial_number(x509.random_serial_number())
        .not_valid_before(today - datetime.timedelta(days=5)).not_valid_after(today + datetime.timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(signer, hashes.SHA256())
    )
    (folder / (name + ".pem")).write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (folder / (name + ".key")).write_bytes(key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))


@pytest.fixture(scope="module")
def nginx(tmp_path_factory):
    """nginx with a good and an expired certificate, one that wants clients' ones, and a list as a file."""
    if not NGINX:
        pytest.skip("nginx is not installed")
    folder = tmp_path_factory.mktemp("nginx")
    os.chmod(folder, 0o755)
    for name in ("ca", "other"):
        certificate(folder, name)
    for name in ("server", "client"):
        certificate(folder, name, "ca")
    certificate(folder, "stranger", "other")
    certificate(folder, "expired", "ca", days=-1)
    ports = {}
    for name in ("good", "expired", "mutual"):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports[name] = free.getsockname()[1]
    (folder / "www").mkdir()
    listed = {"realm": "prod", "generated_at": NOW, "complete": True, "vms": [
        {"vm_id": "v%d" % n, "host": "h1", "state": "running"} for n in range(2000)]}
    (folder / "www/live.json").write_text(json.dumps(listed))
    server = "server { listen 127.0.0.1:%d ssl; ssl_certificate %s.pem; ssl_certificate_key %s.key; %s}\n"
    mutual = "ssl_client_certificate %s/ca.pem; ssl_verify_client on; " % folder
    servers = "".join([
        server % (ports["good"], folder / "server", folder / "server", ""),
        server % (ports["expired"], folder / "expired", folder / "expired", ""),
        server % (ports["mutual"], folder / "server", folder / "server", mutual),
    ])
    places = " ".join("%s_temp_path %s;" % (one, folder / one) for one in (
        "client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    user = "user root; " if os.geteuid() == 0 else ""
    (folder / "nginx.conf").write_text(
        user + "daemon off; pid %s/pid; error_log %s/log; events {}\n"
        "http { access_log %s/access; types { application/json json; } root %s/www; gzip on;"
        " gzip_types application/json; %s\n%s}\n" % (folder, folder, folder, folder, places, servers))
    child = subprocess.Popen([NGINX, "-p", str(folder), "-c", str(folder / "nginx.conf")],
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for port in ports.values():
            _wait_for(port, child)
        yield {"folder": folder, "access": folder / "access",
               **{name: "https://127.0.0.1:%d/live.json" % port for name, port in ports.items()}}
    finally:
        child.terminate()
        child.wait(10)


def _wait_for(port, child):
    for _attempt in range(100):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        assert child.poll() is None, "nginx did not start"
        time.sleep(0.05)
    raise AssertionError("nginx does not listen")


def test_tls_by_a_private_authority_packed_and_not_modified(nginx):
    got = whole(nginx["good"], ca_file=str(nginx["folder"] / "ca.pem"))
    assert (len(got["vms"]), got["proven"]) == (2000, True)
    # The second read was not sent again.
    lines = nginx["access"].read_text().splitlines()[-2:]
    assert [line.split('" ')[1].split()[0] for line in lines] == ["200", "304"]
    assert int(lines[0].split('" ')[1].split()[1]) < 20_000


@pytest.mark.parametrize(
    ("place", "files", "said"),
    [
        ("good", {}, "self-signed certificate in certificate chain"),
        ("good", {"ca_file": "other"}, "certificate is not accepted"),
        ("expired", {"ca_file": "ca"}, "its certificate is not accepted (certificate has expired); see ca_file"),
        ("mutual", {"ca_file": "ca"}, "answered 400 text/html"),
        ("mutual", {"ca_file": "ca", "client_cert": "stranger"}, "answered 400 text/html"),
    ],
)
def test_tls_that_is_not_trusted(nginx, place, files, said):
    code, text = refusal(nginx[place], token=SECRET, **paths_of(nginx, files))
    # What cannot be better next time is not tried again.
    assert (code, "tried" in text) == ("unreadable", False)
    assert said in text or (not files and "unable to get local issuer" in text), text


def paths_of(nginx, files):
    paths = {name: str(nginx["folder"] / (file + ".pem")) for name, file in files.items()}
    if "client_cert" in files:
        paths["client_key"] = str(nginx["folder"] / (files["client_cert"] + ".key"))
    return paths


def test_tls_with_the_name_of_another_host(nginx):
    url = nginx["good"].replace("127.0.0.1", "localhost")
    assert "certificate is not accepted" in refusal(url, **paths_of(nginx, {"ca_file": "ca"}))[1]


def test_tls_with_a_client_certificate(nginx):
    options = paths_of(nginx, {"ca_file": "ca", "client_cert": "client"})
    assert len(whole(nginx["mutual"], **options)["vms"]) == 2000
    # Certificate and key may be in one file.
    both = nginx["folder"] / "both.pem"
    both.write_bytes((nginx["folder"] / "client.pem").read_bytes() + (nginx["folder"] / "client.key").read_bytes())
    assert whole(nginx["mutual"], ca_file=options["ca_file"], client_cert=str(both))["complete"] is True
    # Paths may be those of the playbook's directory.
    named = {"ca_file": "ca.pem", "client_cert": "client.pem", "client_key": "client.key"}
    document = source.fetch(checked(nginx["mutual"], **named), context(directory=str(nginx["folder"])))
    assert len(list(builders.vms_of(document["vms"]))) == 2000


def test_certificate_files_that_cannot_be_used(nginx):
    good = paths_of(nginx, {"ca_file": "ca", "client_cert": "client"})
    folder = nginx["folder"]
    for name, path in (("ca_file", "nothing"), ("client_cert", "nothing"), ("client_key", "nothing"),
                       ("ca_file", "nginx.conf"), ("client_cert", "nginx.conf"), ("client_key", "server.key")):
        said = "client_cert" if path == "server.key" else str(folder / path)
        with pytest.raises(manifest.ManifestError, match=said) as bad:
            checked(nginx["mutual"], **{**good, name: str(folder / path)})
        assert bad.value.code == "bad_source"
    key = serialization.load_pem_private_key((folder / "client.key").read_bytes(), None)
    (folder / "locked.key").write_bytes(key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"x")))
    with pytest.raises(manifest.ManifestError, match="client_cert: .* cannot be used"):
        checked(nginx["mutual"], **{**good, "client_key": str(folder / "locked.key")})


# Size


def test_row_37_a_million_vms(tmp_path):
    """In the memory of a page, and in at most three times of what requests and json alone need for the same pages."""
    count, size = MILLION, 1000
    port, child = serve_many(count, size)
    try:
        url = "http://127.0.0.1:%d/vms" % port
        bare, _memory = measured(BARE, url, tmp_path)
        ours, memory = measured(OURS, url, tmp_path)
        _seconds, little = measured(OURS, url + "?last=%d" % (count // size // 10), tmp_path)
        print("%d VMs: bare %.2f s, ours %.2f s, ratio %.2f, %.0f MiB, of a tenth %.0f MiB" % (
            count, bare, ours, ours / bare, memory, little))
        assert ours < 3 * bare
        # 8 bytes for each VM, at the end for a moment ten times as much, and what a page takes.
        assert memory - little < 96 * count / 2**20 + 8
        assert memory < 300
    finally:
        child.kill()
        child.wait()


MILLION = int(os.environ.get("REAPER_TEST_MANY", "200000"))
SERVER = r"""
    import json, socket, sys
    count, size = int(sys.argv[1]), int(sys.argv[2])
    def page(begin, last):
        body = json.dumps([{"id": "v%08d" % n, "node": {"name": "h%d" % (n % 1000)}, "state": "running"}
                           for n in range(begin * size, begin * size + size)]).encode()
        total = (last or count // size) * size
        link = "" if begin * size + size >= total else 'Link: </vms?from=%d%s>; rel="next"\r\n' % (
            begin + 1, "&last=%d" % last if last else "")
        return ("HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\nX-Total: %d\r\n%s\r\n"
                % (len(body), total, link)).encode() + body
    pages = {(begin, last): page(begin, last)
             for last in (0, count // size // 10) for begin in range(last or count // size)}
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    while True:
        client, _address = listener.accept()
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with client, client.makefile("rb") as stream:
            while line := stream.readline():
                query = dict(one.split("=") for one in line.decode().split()[1].partition("?")[2].split("&") if one)
                while stream.readline().strip():
                    pass
                client.sendall(pages[int(query.get("from", 0)), int(query.get("last", 0))])
"""
BARE = """
    import requests
    def read(url):
        session, listed = requests.Session(), 0
        while url:
            answer = session.get(url)
            listed += len(answer.json())
            url = requests.compat.urljoin(url, answer.links["next"]["url"]) if "next" in answer.links else None
        return listed
"""
OURS = """
    from ansible_collections.microvm.reaper.plugins.plugin_utils import sources
    from ansible_collections.microvm.reaper.plugins.plugin_utils.sources import http
    def read(url):
        wanted = {"type": "http", "url": url, "items": "@", "fields": {"vm_id": "id", "host": "node.name",
                  "state": "state"}, "about": {}, "realm": "r", "paging": "link", "count_header": "X-Total"}
        ((_module, options),) = sources.configured([wanted])
        document = http.fetch(options, {"now": 1e9, "directory": "/"})
        listed = sum(len(page.vm_id) for page in document["vms"])
        assert document["proven"]
        return listed
"""
MEASURE = """
    import sys, time
    best = None
    for turn in range(2):
        # Not the clock on the wall: others may be busy here too.
        began = time.process_time()
        listed = read(sys.argv[1])
        took = time.process_time() - began
        best = took if best is None else min(best, took)
    # Not ru_maxrss, which begins with what the process that started this one had.
    (peak,) = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")]
    print(best, int(peak) / 1024)
"""


def serve_many(count, size):
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(SERVER), str(count), str(size)],
                             stdout=subprocess.PIPE, text=True)
    return int(child.stdout.readline()), child


def measured(reader, url, folder):
    """Return the seconds and the MiB that a process of its own needs."""
    program = folder / "program.py"
    program.write_text(textwrap.dedent(reader) + textwrap.dedent(MEASURE))
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run([sys.executable, program, url], capture_output=True, text=True, check=False,
                          env={**os.environ, "PYTHONPATH": str(root / "collections")})
    assert done.returncode == 0, done.stderr
    seconds, memory = done.stdout.split()
    return float(seconds), float(memory)
