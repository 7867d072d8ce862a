# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Live manifests: what lives. A list that lost its end must never pass for a whole one."""

from __future__ import annotations

import itertools
import json
import os

from ansible_collections.microvm.reaper.plugins.module_utils.resource import VM_ID, is_text
from ansible_collections.microvm.reaper.plugins.plugin_utils import manifest, publishing, sources
from ansible_collections.microvm.reaper.plugins.plugin_utils.manifest import ManifestError
from ansible_collections.microvm.reaper.plugins.plugin_utils.sources import _listing, _paths, _web, postgresql

from ..target import is_number, scratch, target

NOW = 1_800_000_000.0
CONTEXT = {"realm": "prod", "now": NOW, "directory": "/", "terminal_states": manifest.TERMINAL_STATES}
_numbers = itertools.count()


def _checked(document):
    """Return what check() says of a document, or the code of its refusal."""
    try:
        return manifest.check(document, "here", now=NOW, max_age=1e9)
    except ManifestError as err:
        assert str(err)
        return err.code


def _collected(document):
    """Return the same as a Collector says it, and what lives on the hosts by its index."""
    path = scratch() / ("index-%d" % next(_numbers))
    collector = manifest.Collector(str(path))
    try:
        collector.add(document, "here", now=NOW, max_age=1e9)
        return collector.finish()
    except ManifestError as err:
        path.unlink()
        return err.code
    finally:
        collector._writer._connection.close()


@target(is_json=True)
def manifest_document(data):
    """Raises ManifestError only. check() and the Collector agree, a list taken twice is the same list, ids are ids,

    and a list whose count or checksum is another one is refused.
    """
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return
    if isinstance(document, dict):
        document.pop("made_before", None)  # is set by us, never by a source
    found = _checked(document)
    handle = _collected(document)
    if isinstance(found, str):
        assert handle == found, (found, handle)
        return
    assert _checked(document) == found
    _is_manifest(found)
    listed = len(document["vms"])
    for changes in ({"count": listed + 1}, {"count": listed - 1}, {"sha256": "0" * 64}, {"complete": 1}):
        assert isinstance(_checked(dict(document, **changes)), str), changes
    if document.get("count") is not None and listed:
        assert isinstance(_checked(dict(document, vms=document["vms"][:-1])), str)
    columns = manifest._columns(document["vms"])
    if columns:
        assert _checked(dict(document, vms=iter([columns]))) == found
    assert handle["count"] == found["count"] and handle["proven"] == found["proven"]
    ids = {*found["vms"], *found["tombstones"]}
    for host in ["h1", *(found["hosts"] or ())][:3]:
        share = manifest.share(handle, host, ids)
        here = {vm_id for vm_id, hosts in found["vms"].items() if not hosts or host in hosts}
        anywhere = here if found["hosts"] is not None else set(found["vms"])
        assert set(share["live"]) == anywhere, (host, share["live"], anywhere)
        assert {*share["live"], *share["elsewhere"]} == set(found["vms"])
    os.unlink(handle["index"])


def _is_manifest(found):
    assert all(VM_ID.fullmatch(vm_id) for vm_id in (*found["vms"], *found["tombstones"]))
    assert all(is_text(host) for hosts in found["vms"].values() for host in hosts)
    assert is_number(found["generated_at"]) and is_number(found["age"]) and is_text(found["realm"])
    assert all(since is None or is_number(since) for since in found["tombstones"].values())
    assert found["epoch"] is None or is_number(found["epoch"])
    assert found["proven"] is (found["unproven"] is None)


@target(is_json=True)
def manifest_file(data):
    """Raises ManifestError only. Of JSON and YAML no beginning is taken for a proven list; of JSON lines none without

    its count. (A checksum is of the ids: of a VM that is in two lines it does not know the hosts.)
    """
    found = _of_file(data)
    if found is None:
        return
    assert _of_file(data) == found
    assert all(VM_ID.fullmatch(vm_id) for vm_id in found["vms"])
    whole = data.rstrip()
    ends = [place + 1 for place, octet in enumerate(whole) if octet == ord("\n")]
    for end in {len(whole) - 1, len(whole) // 2, *ends[-10:]}:
        cut = _of_file(whole[: max(end, 0)])
        if cut is None or not cut["proven"]:
            continue
        assert cut["vms"].keys() == found["vms"].keys(), (end, cut)
        assert cut["vms"] == found["vms"] or b"sha256" in whole, (end, cut)


def _of_file(data):
    """Return the manifest in a file, None for one that is refused."""
    path = scratch() / "manifest"
    path.write_bytes(data)
    os.utime(path, (NOW, NOW))
    ((module, options),) = sources.configured([{"type": "file", "path": str(path)}])
    try:
        with sources._ended(module.fetch(options, CONTEXT)) as document:
            return manifest.check(document, "here", now=NOW, max_age=1e9)
    except ManifestError as err:
        assert err.code and str(err)
        return None


def _options(**changes):
    return sources.configured([dict({"type": "http", "url": "https://cp.example.net/vms"}, **changes)])[0][1]


WAYS = [
    _options(),
    _options(paging="next", next="next", about={"realm": "realm", "count": "count"}, items="vms"),
    _options(paging="link", proof="count"),
    _options(paging="cursor", next="next", realm="prod", about={"epoch": "epoch"}, fields={"vm_id": "vm_id"}),
    _options(paging="page", page_param="p", about={"realm": "realm"}, items="vms", proof="reread"),
]


class _Server:
    """Answers each URL that is asked for with the next page, and again with the same."""

    def __init__(self, pages):
        self.pages, self.known, self.served = pages, {}, []

    def ask_ahead(self, url, etag):
        pass

    def get(self, url, *, etag=None, may_be_gone=False):
        if url not in self.known:
            number = len(self.known)
            if number >= len(self.pages):
                raise ManifestError("unreadable", "GET %s: no more pages" % url)
            page = self.pages[number]
            headers, body = page if isinstance(page, list) and len(page) == 2 else ({}, page)
            headers = headers if isinstance(headers, dict) else {}
            texts = {name: value for name, value in headers.items() if isinstance(value, str)}
            self.known[url] = _web.Answer(200, texts, body)
        self.served.append(url)
        return self.known[url]


@target(is_json=True)
def http_pages(data):
    """Raises ManifestError only. A list that is proven has every VM of every page that was asked for."""
    try:
        way, *pages = json.loads(data)
        options = WAYS[int(way) % len(WAYS)]
    except (ValueError, TypeError, RecursionError, OverflowError):
        return
    server = _Server(pages[:20])
    try:
        with sources._ended(_listing.Listing(options, server, CONTEXT).document()) as document:
            found = manifest.check(document, "here", now=NOW, max_age=1e9)
    except ManifestError as err:
        assert err.code and str(err).isprintable()
        return
    _is_manifest(found)
    for url in set(server.served):
        for vm in server.known[url].body["vms"]:
            assert vm["vm_id"] in found["vms"] or vm["vm_id"] in found["tombstones"], vm
    if found["proven"] and options["paging"] in ("next", "cursor"):
        assert not server.known[server.served[-1]].body.get("next")


LOOKUP = _options(lookup_url="https://cp.example.net/vms/{vm_id}", about={"realm": "realm"}, proof="none")


@target(is_json=True)
def http_lookup(data):
    """Raises ManifestError only. Of those that are asked for none is gone whose answer does not say so."""
    try:
        answers = [one for one in json.loads(data) if one is None or isinstance(one, (dict, list))]
    except (ValueError, TypeError, RecursionError):
        return
    wanted = ["v%d" % number for number in range(1, len(answers[:8]) + 1)]

    class Server:
        def get(self, url, *, etag=None, may_be_gone=False):
            name = url.rpartition("/")[2]
            if name == "vms":
                return _web.Answer(200, {}, {"realm": "prod", "vms": [{"vm_id": "v1"}, {"vm_id": "v9"}]})
            if name == "v9":
                return _web.Answer(200, {}, {"vm_id": "v9"})
            body = answers[wanted.index(name)]
            return _web.Answer(404 if body is None else 200, {}, body)

    try:
        found = _listing.Listing(LOOKUP, Server(), CONTEXT).look_up(set(wanted), None)
    except ManifestError as err:
        assert err.code and str(err).isprintable()
        return
    for vm_id, body in zip(wanted, answers, strict=False):
        gone = body is None or str(body.get("state")).lower() in manifest.TERMINAL_STATES
        assert (vm_id in found) != gone, (vm_id, body)
        if vm_id in found:
            assert body["vm_id"] == vm_id and all(isinstance(host, str) for host in found[vm_id])
            assert body.get("host") is None or body["host"] in found[vm_id]


class _Inventory:
    def __init__(self, said):
        self.groups = {str(name): list(map(str, hosts)) for name, hosts in said["groups"].items()}
        self.said = {str(name): dict(found) for name, found in said["variables"].items()}

    def variables(self, name):
        return self.said.get(name, {})

    own_variables = variables


@target(is_json=True)
def inventory_group(data):
    """Raises ManifestError only. Each host of the group is a VM that lives, unless its state is a terminal one."""
    try:
        inventory = _Inventory(json.loads(data))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return
    if "all" not in inventory.groups:
        return  # there always is
    ((module, options),) = sources.configured([{"type": "inventory"}])
    try:
        document = module.fetch(options, dict(CONTEXT, inventory=lambda: inventory))
        found = manifest.check(document, "here", now=NOW, max_age=1e9)
    except ManifestError as err:
        assert err.code and str(err)
        return
    _is_manifest(found)
    for name in inventory.groups["live_vms"]:
        variables = inventory.variables(name)
        if str(variables.get("vm_state")).lower() not in manifest.TERMINAL_STATES:
            assert variables.get("vm_id", name) in found["vms"], name


@target(max_length=512)
def database_epoch(data):
    """Raises ManifestError only. An epoch is the number that the text says, without its fraction."""
    session = object.__new__(postgresql._Session)
    session.name, session._epoch_query = "db", "SELECT 1"
    text = data.decode("utf-8", "replace")
    session._value = lambda key, query: text
    try:
        epoch = session.epoch()
    except ManifestError:
        return
    # Decimals of Python may have underscores anywhere, and blanks of all kinds around them.
    number = float("".join(c for c in text if c.isdigit() or c in "+-.eE"))
    assert isinstance(epoch, int) and abs(epoch - number) <= max(1, abs(epoch) / 1e9)


@target(is_json=True)
def http_body(data):
    """Raises ValueError only. JSON means what the standard library says, and no object has a key twice."""
    text = data.decode("utf-8", "replace")
    try:
        found = _web._decoded(text)
    except (ValueError, RecursionError):
        found = None

    def once(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError("twice")
        return dict(pairs)

    def refuse(said):
        raise ValueError(said)

    try:
        expected = json.loads(text, object_pairs_hook=once, parse_constant=refuse)
    except (ValueError, RecursionError):
        expected = None
    assert found == expected, (found, expected)


CLIENT = _web.Client(
    _options(headers={"X-Key": "secret-header"}, params={"q": "secret-param"}), "secret-token", None,
    {"client_cert": None, "client_key": None, "ca_file": None},
)


@target()
def http_answer(data):
    """Never raises. Only a 200 with JSON is an answer; what is said of another one is printable and has no secret."""
    head, _blank, body = data.partition(b"\n\n")
    first, *lines = head.decode("latin-1").split("\n")
    status = int(first[:3]) if first[:3].isascii() and first[:3].isdigit() else 200
    headers = dict(line.partition(":")[::2] for line in lines)
    found = CLIENT._judge(_web.Answer(status, headers, body + b"secret-token"), None, False)
    if isinstance(found, _web.Answer):
        assert found.status == 200 and "json" in headers["Content-Type"].lower()
        return
    said = CLIENT._without_secrets(found.text)
    assert is_number(found.after) and found.after >= 0 and said.isprintable()
    assert not any(secret in said for secret in ("secret-token", "secret-header", "secret-param"))


@target()
def http_headers(data):
    """Never raises. A next page is at our own scheme, host and port, whatever a header says, and is printable."""
    text = data.decode("latin-1")
    _web.http_date(text)
    assert is_number(_web._retry_after({"Retry-After": text, "Date": text}))
    assert _web._charset(text) is not None and _web.shown(text).isprintable()
    hook = publishing.shown(text)
    assert hook is None or hook.count("/") == 2, hook
    link = _listing.next_link(text)
    assert link is None or "<%s>" % link in text
    base = "https://cp.example.net:8443/v1/vms?limit=2"
    for reference in filter(None, (link, text)):
        url = _web.followed(base, reference)
        assert url is None or (url.startswith("https://cp.example.net:8443/") and url.isascii() and " " not in url), url
        if url is not None:
            assert _web.with_params(url, {"c": text}).startswith("https://cp.example.net:8443/")


@target()
def jmespath_columns(data):
    """Raises ManifestError only. The quick way for dotted names finds what JMESPath itself finds."""
    expression, _newline, content = data.decode("utf-8", "replace").partition("\n")
    try:
        items = json.loads(content)
        column = _paths.column("items", expression)
        found = column([items])
    except (ValueError, RecursionError):
        return
    except ManifestError as err:
        assert err.code in ("bad_source", "not_a_manifest")
        return
    try:
        expected = [_paths.jmespath.search(expression, items)]
    except RecursionError:
        return
    # An expression (&name) is no JSON, and is equal to nothing.
    assert json.dumps(found, default=_kind_of) == json.dumps(expected, default=_kind_of)


def _kind_of(value):
    return type(value).__name__


@target(is_json=True)
def database_rows(data):
    """Raises ManifestError only. Each VM of the rows is there; other hosts are texts, from an array or JSON of one."""
    try:
        rows = [[vm_id, host, state, also_on, end] for vm_id, host, state, also_on, end in json.loads(data)]
    except (ValueError, TypeError, RecursionError):
        return
    texts = all(value is None or isinstance(value, str) for row in rows for value in row[:4])
    if not texts or not all(row[4] is None or is_number(row[4]) for row in rows):
        return  # what PostgreSQL cannot return for our casts
    session = object.__new__(postgresql._Session)
    session.name, session._clock, session.ended_only = "db", NOW, 0
    ended: list = []
    try:
        columns = session.vms(rows, ended)
        document = {"realm": "prod", "generated_at": NOW, "complete": True, "vms": iter([columns])}
        ends = [{"vm_id": vm_id, "destroyed_at": end} for vm_id, end in ended]
        found = manifest.check(dict(document, tombstones=ends), "here", now=NOW, max_age=1e9)
    except ManifestError:
        return
    _is_manifest(found)
    for vm_id, _host, state, _also_on, end in rows:
        assert vm_id in found["vms"] or vm_id in found["tombstones"], vm_id
        if end is None and state is None:
            assert vm_id in found["vms"], vm_id
