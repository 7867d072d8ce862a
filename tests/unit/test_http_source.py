# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The pure parts of the source http: options, paths, URLs, headers. tests/integration has it against real servers."""

from __future__ import annotations

import builtins
import io
import json
import pathlib
import re
import sys
import textwrap
import tracemalloc
import zlib

import jmespath
import pytest
import yaml
from ansible_collections.microvm.reaper.plugins.plugin_utils import manifest, sources
from ansible_collections.microvm.reaper.plugins.plugin_utils.sources import _listing, _paths, _web
from ansible_collections.microvm.reaper.plugins.plugin_utils.sources import http as source
from hypothesis import given
from hypothesis import strategies as st

GOOD = {"type": "http", "url": "https://cp.example.net/v1/vms"}


def configured(**options):
    ((_module, found),) = sources.configured([{**GOOD, **options}])
    return found


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"url": "cp.example.net/vms"}, "url must be like https://host/path"),
        ({"url": "ftp://cp.example.net/"}, "url must be like"),
        ({"url": "https:///vms"}, "url must be like"),
        ({"url": "https://[::1/"}, "url must be like"),
        ({"url": "https://h:port/"}, "url must be like"),
        ({"url": "https://h/a b"}, "url must be like"),
        ({"url": "https://h/#vms"}, "url must be like"),
        ({"url": "https://who:secret@h/"}, "url must not carry a user"),
        ({"lookup_url": "https://h/vms"}, r"lookup_url needs \{vm_id\}"),
        ({"lookup_url": "/vms/{vm_id}"}, "lookup_url must be like"),
        ({"token": "a b"}, "the token has characters"),
        ({"token": ""}, "the token has characters"),
        ({"token": "a", "token_file": "b"}, "only one of token and token_file"),
        ({"token": "a", "username": "b", "password": "c"}, "only one of token and username"),
        ({"username": "a"}, "username needs one of password and password_file"),
        ({"password": "a"}, "username needs one of"),
        ({"username": "a", "password": "b", "password_file": "c"}, "username needs one of"),
        ({"username": "a:b", "password": "c"}, "username must not have a colon"),
        ({"client_key": "/dev/null"}, "client_key needs client_cert"),
        ({"client_cert": "/nothing.pem"}, "client_cert: /nothing.pem cannot be read: No such file"),
        ({"ca_file": "/nothing.pem"}, "ca_file: /nothing.pem cannot be read"),
        ({"ca_file": "/etc/passwd"}, "ca_file: /etc/passwd cannot be used"),
        ({"headers": {"a b": "c"}}, "headers: 'a b' is no name"),
        ({"headers": {"a": "b\nc"}}, "headers: the value of a must be"),
        ({"headers": {"a": None}}, "headers: the value of a must be"),
        ({"headers": {"authorization": "b"}, "token": "c"}, "there is an Authorization beside token"),
        ({"params": {"a": None}}, "params: a needs a value"),
        ({"params": {"a": {}}}, "params: a needs a value"),
        ({"timeout": 0}, "timeout must be more than 0"),
        ({"deadline": -1}, "deadline must be more than 0"),
        ({"deadline": "nan"}, "deadline must be more than 0"),
        ({"deadline": "inf"}, "deadline must be more than 0"),
        ({"limit": 0}, "limit must be more than 0"),
        ({"retries": -1}, "retries must not be less"),
        ({"max_page_bytes": 0}, "max_page_bytes must be"),
        ({"max_pages": 0}, "max_pages must be"),
        ({"paging": "cursor"}, "paging: cursor needs next"),
        ({"paging": "next"}, "paging: next needs next"),
        ({"next": "meta.next"}, "next is for paging: next and paging: cursor"),
        ({"paging": "link", "next": "meta.next"}, "next is for paging"),
        ({"paging": "pages"}, "paging.*pages"),
        ({"proof": "maybe"}, "proof.*maybe"),
        ({"items": "a["}, r"items: 'a\[' is no JMESPath"),
        ({"items": ""}, "items: '' is no JMESPath"),
        ({"fields": {"vm_id": "a b"}}, "fields.vm_id: 'a b' is no JMESPath"),
        ({"fields": {"vm_id": 5}}, "fields.vm_id: 5 is no JMESPath"),
        ({"fields": {"vm_id": None}}, "fields.vm_id: None is no JMESPath"),
        ({"fields": {"host": "host"}}, "fields needs vm_id"),
        ({"fields": {"vm_id": "id", "hots": "host"}}, "fields: 'hots' is none of vm_id, host"),
        ({"about": {"relam": "realm"}}, "about: 'relam' is none of realm"),
        ({"about": {"count": "a("}}, "about.count: .* is no JMESPath"),
        ({"about": {}}, "name about.realm, or realm"),
        ({"about": {}, "realm": "prod", "proof": "count"}, "proof: count needs count_header or about.count"),
        ({"lookup_item": "]"}, "lookup_item: .* is no JMESPath"),
        ({"relam": "prod"}, "relam"),
    ],
)
def test_options_that_cannot_work_are_named(options, said):
    with pytest.raises(manifest.ManifestError, match=said) as caught:
        configured(**options)
    assert caught.value.code == "bad_source"
    assert "reap_live_sources[0] (http): " in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [{}, {"about": {}, "realm": "prod"}, {"paging": "cursor", "next": "a.b"}, {"proof": "count"}, {"ca_file": "ca.pem"},
     {"proof": "count", "about": {}, "realm": "prod", "count_header": "X-Total"}, {"url": "http://[::1]:8080/a?b=c"}],
)
def test_options_that_can(options):
    configured(**options)


@pytest.mark.parametrize("missing", ["requests", "jmespath"])
def test_a_library_that_is_missing_is_named(monkeypatch, missing):
    real = builtins.__import__

    def without(name, *others):
        if name.partition(".")[0] == missing:
            raise ImportError("no", name=missing)
        return real(name, *others)

    package = sources.__name__
    for name in ("_listing", "_web", "_paths"):
        monkeypatch.delitem(sys.modules, "%s.%s" % (package, name), raising=False)
        monkeypatch.delattr(sources, name, raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(manifest.ManifestError, match="library %s: pip install requests jmespath" % missing) as caught:
        configured()
    assert caught.value.code == "missing_library"


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "http https://cp.example.net/v1/vms"),
        ({"name": "eu"}, "http eu"),
        ({"url": "https://h:8443/a?token=x"}, "http https://h:8443/a"),
    ],
)
def test_its_name_has_no_query(options, name):
    assert source.describe(configured(**options)) == name


ITEM = {"id": "v1", "n": 5, "node": {"name": "h1", "a-b": {"c": 1}}, "tags": [{"k": "x"}], "none": None, "get": "g"}


@pytest.mark.parametrize(
    ("expression", "is_simple"),
    [("id", True), ("node.name", True), ('node."a-b".c', True), ("@", True), ("none.x", True), ("id.x", True),
     ("nowhere", True), ("nowhere.x", True), ("get", True), ("@.id", True), ("tags[0].k", False), ("tags[].k", False),
     ("to_string(n)", False), ("id || n", False), ("node.*", False), ("[node.name]", False), ("`1`", False)],
)
def test_paths_find_what_jmespath_finds(expression, is_simple):
    items = [ITEM, {}, [], "text", None, 5, {"id": 1, "node": "n"}, ITEM]
    column = _paths.column("fields.x", expression)
    assert (column.__name__ == "by_names") is is_simple
    if expression == "to_string(n)":
        items = [ITEM]
    assert column(items) == [jmespath.search(expression, item) for item in items]
    assert column([ITEM, ITEM]) == [jmespath.search(expression, ITEM)] * 2
    assert column([]) == []


@pytest.mark.parametrize(
    ("header", "target"),
    [
        ('<https://h/a?page=2>; rel="next", <https://h/a?page=9>; rel="last"', "https://h/a?page=2"),
        ('<a>; rel="last", <b>; rel="next"', "b"),
        ("<b>; rel=next", "b"),
        ("<b>;rel=NEXT;x=y", "b"),
        ('<b>; title="a, <c>; rel=next"; rel="prev next"', "b"),
        ('<c,d;e>; rel="next"', "c,d;e"),
        ('<a>; title="rel=next", <b>; rel="next"', "b"),
        ('<b>; rel="nextish"', None),
        ('<b>; rel="prev"', None),
        ("b; rel=next", None),
        ("", None),
        ("<" * 60000, None),
        ('<a>"' * 15000, None),
    ],
)
def test_the_next_link(header, target):
    assert _listing.next_link(header) == target


@given(st.text(max_size=60))
def test_any_link_header_is_read(header):
    assert _listing.next_link(header) is None or "<" in header


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://who:secret@h:8443/a/b?token=secret&page=2&x=#secret", "https://h:8443/a/b?token=...&page=...&x=..."),
        ("http://h/", "http://h/"),
        ("/a?secret&b=secret&", "/a?...&b=..."),
        ("http://[::1/", "a URL that cannot be read"),
        ("http://h/\x1b[31m\n", "http://h/ [31m"),
    ],
)
def test_urls_for_people(url, shown):
    assert _web.shown(url) == shown


@pytest.mark.parametrize(
    ("reference", "found"),
    [
        ("?page=2", "https://cp.example.net/v1/vms?page=2"),
        ("/v2?a=b%26c&d=%C3%A9", "https://cp.example.net/v2?a=b%26c&d=%C3%A9"),
        ("https://CP.example.net:443/x#f", "https://cp.example.net/x"),
        ("//cp.example.net/x", "https://cp.example.net/x"),
        ("https://cp.example.net", "https://cp.example.net/"),
        ("a b?c=d e", "https://cp.example.net/v1/a%20b?c=d%20e"),
        ("http://cp.example.net/x", None),
        ("https://cp.example.net:8443/x", None),
        ("https://cp.example.net.evil/x", None),
        ("https://evil/x", None),
        ("//evil/x", None),
        ("https://cp.example.net@evil/", None),
        ("https://who@cp.example.net/", None),
        ("https://evil\\@cp.example.net/", None),
        ("https://cp.example.net:99999/", None),
        ("https://[::1/", None),
        ("javascript:alert(1)", None),
    ],
)
def test_a_next_page_is_on_the_same_server(reference, found):
    assert _web.followed("https://cp.example.net/v1/vms?page=1", reference) == found


@given(st.text(max_size=40))
def test_any_reference_stays_on_the_same_server(reference):
    found = _web.followed("https://cp.example.net/v1/vms", reference)
    assert found is None or (found.startswith("https://cp.example.net/") and found.isascii() and " " not in found)


def test_parameters_replace_those_of_the_same_name():
    url = _web.with_params("https://h/a?b=1&c=2&c=3&d=", {"c": "x y", "e": [1, True]})
    assert url == "https://h/a?b=1&d=&c=x+y&e=1&e=true"


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, 0), ({"Retry-After": "7"}, 7), ({"Retry-After": " 7 "}, 7), ({"Retry-After": "-7"}, 0),
        ({"Retry-After": "soon"}, 0), ({"Retry-After": "1.5"}, 0), ({"Retry-After": "9" * 400}, 999999999),
        ({"Retry-After": "Fri, 31 Dec 2027 23:59:59 GMT", "Date": "Fri, 31 Dec 2027 23:59:50 GMT"}, 9),
        ({"Retry-After": "Fri, 31 Dec 2027 23:59:40 GMT", "Date": "Fri, 31 Dec 2027 23:59:50 GMT"}, 0),
        ({"Retry-After": "Fri, 31 Dec 1999 23:59:59 GMT"}, 0),
        ({"Retry-After": "Fri, 99 Dec 2027 23:59:59 GMT"}, 0),
    ],
)
def test_how_long_a_server_asks_to_wait(headers, seconds):
    assert _web._retry_after(headers) == seconds


def test_row_37_a_bomb_is_unpacked_no_further_than_the_limit():
    pack = zlib.compressobj(9, zlib.DEFLATED, 31)
    bomb = b"".join(pack.compress(b" " * 1_000_000) for _megabyte in range(100)) + pack.flush()

    class Raw(io.BytesIO):
        def read1(self, _size, *, decode_content):
            assert not decode_content
            return self.read()

    class Response:
        status_code = 200
        headers = {"Content-Encoding": "gzip"}
        raw = Raw(bomb)

    client = _web.Client(configured(max_page_bytes=1_000_000), None, None, dict.fromkeys(source.FILES))
    tracemalloc.start()
    try:
        problem = client._body(Response)
        _now, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert "larger than max_page_bytes=1000000" in problem.text
    assert peak < 10_000_000


def test_waiting_grows_and_ends():
    for tries, least, most in ((1, 0.25, 0.5), (2, 0.5, 1), (3, 1, 2), (50, 15, 30)):
        waits = [_web._backoff(tries) for _turn in range(200)]
        assert least <= min(waits) < max(waits) <= most
        assert max(waits) - min(waits) > (most - least) / 2


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.sampled_from(["h1", "h2", None]))), st.randoms())
def test_a_read_is_the_same_in_any_order_and_on_any_pages(vms, order):
    def read(listed, size):
        summed = _listing._Read(was_given=True)
        for begin in range(0, max(len(listed), 1), size):
            part = listed[begin:begin + size]
            columns = [[vm_id for vm_id, _host in part], [host for _vm_id, host in part]]
            said = {"count": None, "went_back": None}
            total = sum(hash(one) for one in part)
            summed.add(_listing.Page("u", None, said, len(part), total, None, columns))
        return summed

    one, shuffled = read(vms, 3), list(vms)
    order.shuffle(shuffled)
    assert one.same_as(read(shuffled, 2))
    assert (one.finish() is None) is (len(set(vms)) == len(vms))
    if vms:
        assert not one.same_as(read(vms[1:], 3))
        assert not one.same_as(read([(vms[0][0], "h9"), *vms[1:]], 3))


PAGE = pathlib.Path(__file__).parents[2] / "docs/sources/http.md"


def test_the_examples_of_its_page_work(tmp_path, monkeypatch):
    text = PAGE.read_text()
    blocks = [textwrap.dedent(block) for block in re.findall(r"(?:^    .*\n)+", text, re.MULTILINE)]
    assert len(blocks) == 4
    monkeypatch.setattr(source, "_check_tls", lambda files: None)
    for block in blocks:
        sources.configured(yaml.safe_load(block)["reap_live_sources"])
    # What they say of the answers is what they find in them.
    for block in blocks[1:]:
        (wanted,) = yaml.safe_load(block)["reap_live_sources"]
        example = " ".join(re.findall(r"^# (?!GET|Link)(.*)", block, re.MULTILINE))
        body = json.loads(example.replace(", ...", ""))
        paths = _listing.Paths(configured(**wanted))
        (items,) = paths.items([body])
        found = {name: column(items)[0] for name, column in paths.fields.items()}
        assert (found["vm_id"], found["host"], bool(found["state"])) in (("v1", "rack1", True), ("17", "rack1", True))
        assert all(column([body])[0] is not None for column in paths.about.values())
        assert not wanted.get("next") or paths.next([body]) == ["djk5OQ"]


def test_its_page_has_every_option_and_no_other():
    table = PAGE.read_text().partition("## Options")[2].partition("## Errors")[0]
    rows = [line.split("|") for line in table.splitlines() if line.startswith("| `")]
    named = re.findall(r"`(\w+)`", " ".join(row[1] for row in rows))
    assert sorted(named) == sorted(source.OPTIONS)
    for option in ("timeout", "deadline", "retries", "max_page_bytes", "max_pages", "first_page"):
        assert re.search(r"^\| `%s` \| %d \|" % (option, source.OPTIONS[option]["default"]), table, re.MULTILINE)
