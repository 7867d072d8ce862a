# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""An API that lists VMs as JSON over HTTP, page by page. docs/sources/http.md has the options with examples."""

from __future__ import annotations

import math
import os
import re
import ssl
import urllib.parse

from ..manifest import ManifestError

PAGINGS = ("none", "link", "next", "cursor", "page", "offset")
PROOFS = ("auto", "count", "reread", "none")
OPTIONS = {
    "url": {"type": "str", "required": True},
    "name": {"type": "str"},
    "params": {"type": "dict", "default": {}},
    "headers": {"type": "dict", "default": {}},
    "token": {"type": "str", "no_log": True},
    "token_file": {"type": "path", "no_log": False},
    "username": {"type": "str"},
    "password": {"type": "str", "no_log": True},
    "password_file": {"type": "path", "no_log": False},
    "client_cert": {"type": "path"},
    "client_key": {"type": "path", "no_log": False},
    "ca_file": {"type": "path"},
    "timeout": {"type": "float", "default": 30.0},
    "deadline": {"type": "float", "default": 300.0},
    "retries": {"type": "int", "default": 4},
    "max_page_bytes": {"type": "int", "default": 64 * 1024 * 1024},
    "max_pages": {"type": "int", "default": 100_000},
    "items": {"type": "str", "default": "vms"},
    "fields": {"type": "dict"},
    "about": {"type": "dict"},
    "count_header": {"type": "str"},
    "realm": {"type": "str"},
    "paging": {"type": "str", "default": "none", "choices": list(PAGINGS)},
    "next": {"type": "str"},
    "cursor_param": {"type": "str", "default": "cursor"},
    "page_param": {"type": "str", "default": "page"},
    "first_page": {"type": "int", "default": 1},
    "offset_param": {"type": "str", "default": "offset"},
    "limit_param": {"type": "str", "default": "limit"},
    "limit": {"type": "int"},
    "proof": {"type": "str", "default": "auto", "choices": list(PROOFS)},
    "lookup_url": {"type": "str"},
    "lookup_item": {"type": "str", "default": "@"},
}
FILES = ("client_cert", "client_key", "ca_file")
MAX_SECRET = 64 * 1024
HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
VISIBLE = re.compile(r"[!-~]+")


def describe(options):
    """Name the source by its name or URL."""
    parts = urllib.parse.urlsplit(options["url"])
    address = urllib.parse.urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
    return "http %s" % (options["name"] or address)


def configured(options):
    """Refuse options that cannot work or do not go together."""
    _check_url("url", options["url"])
    if options["lookup_url"] is not None:
        _check_url("lookup_url", options["lookup_url"])
        _demand("{vm_id}" in options["lookup_url"], "lookup_url needs {vm_id} where the id of a VM belongs")
    _check_credentials(options)
    for name in ("timeout", "deadline", "max_page_bytes", "max_pages", "limit"):
        value = options[name]
        _demand(value is None or (math.isfinite(value) and value > 0), "%s must be more than 0" % name)
    _demand(options["retries"] >= 0, "retries must not be less than 0")
    follows_body = options["paging"] in ("next", "cursor")
    _demand(not follows_body or options["next"], "paging: %s needs next, where in a page it is" % options["paging"])
    _demand(follows_body or not options["next"], "next is for paging: next and paging: cursor")
    about = _listing().Paths(options).about
    _demand(options["realm"] or "realm" in about, "name about.realm, or realm where the API cannot tell it")
    counted = options["count_header"] or "count" in about
    _demand(options["proof"] != "count" or counted, "proof: count needs count_header or about.count")
    if all(os.path.isabs(options[name] or "/") for name in FILES):
        _check_tls({name: options[name] for name in FILES})


def fetch(options, context):
    """Return the list as a document of this moment. Its first page is read before this returns."""
    return _listing().Listing(options, _client(options, context), context).document()


def still_listed(options, context, vm_ids, epoch):
    """Return ``{vm_id: [host]}`` of those that lookup_url finds; None without one: the list has to be fetched."""
    if options["lookup_url"] is None:
        return None
    return _listing().Listing(options, _client(options, context), context).look_up(vm_ids, epoch)


def _listing():
    """Return the module that needs libraries which only this source needs."""
    from . import _listing, _paths, _web

    needed = {"jmespath": _paths.jmespath, "requests": _web.requests}
    for name in needed:
        if needed[name] is None:
            said = "it needs the Python library %s: pip install requests jmespath" % name
            raise ManifestError("missing_library", said)
    return _listing


def _client(options, context):
    """Return the client with the secrets and certificates as they are now."""
    directory = context["directory"]
    files = {name: _in(directory, options[name]) for name in FILES}
    _check_tls(files)
    token, password = options["token"], options["password"]
    if options["token_file"] is not None:
        token = _secret("token_file", _in(directory, options["token_file"]))
    if token is not None:
        _demand(VISIBLE.fullmatch(token), "the token has characters that no token has, or is empty")
    if options["password_file"] is not None:
        password = _secret("password_file", _in(directory, options["password_file"]))
    return _listing()._web.Client(options, token, password, files)


def _in(directory, path):
    return None if path is None else os.path.join(directory, path)


def _secret(name, path):
    problem = None
    try:
        with open(path, encoding="utf-8") as stream:
            return stream.read(MAX_SECRET).strip()
    except OSError as err:
        problem = "%s: %s cannot be read: %s" % (name, path, err.strerror)
    except UnicodeDecodeError:
        problem = "%s: %s is no text" % (name, path)
    raise ManifestError("bad_source", problem)


def _demand(true, text):
    if not true:
        raise ManifestError("bad_source", text)


def _check_url(name, url):
    try:
        parts = urllib.parse.urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        good = False
    _demand(good and VISIBLE.fullmatch(url) and not parts.fragment, "%s must be like https://host/path" % name)
    _demand("@" not in parts.netloc, "%s must not carry a user: see username and password_file" % name)


def _check_credentials(options):
    ways = [name for name in ("token", "token_file", "username") if options[name] is not None]
    _demand(len(ways) < 2, "only one of %s" % " and ".join(ways))
    passwords = [name for name in ("password", "password_file") if options[name] is not None]
    _demand(len(passwords) == (options["username"] is not None), "username needs one of password and password_file, "
            "and they need it")
    _demand(":" not in (options["username"] or ""), "username must not have a colon")
    _demand(options["client_cert"] or not options["client_key"], "client_key needs client_cert")
    for name, value in options["headers"].items():
        good = isinstance(name, str) and HEADER_NAME.fullmatch(name)
        _demand(good, "headers: %.80r is no name of a header" % (name,))
        text = str(value)
        _demand(value is not None and not isinstance(value, (dict, list)) and text.isprintable() and text.isascii()
                and text == text.strip(), "headers: the value of %s must be printable ASCII" % name)
    for name, value in options["params"].items():
        _demand(value is not None and not isinstance(value, dict), "params: %.80s needs a value" % name)
    if options["token"] is not None:
        _demand(VISIBLE.fullmatch(options["token"]), "the token has characters that no token has, or is empty")
    by_header = "authorization" in {name.lower() for name in options["headers"]}
    _demand(not (by_header and ways), "headers: there is an Authorization beside %s" % " and ".join(ways))


def _check_tls(files):
    """Refuse certificate files that cannot be loaded; a key that asks for a passphrase would ask nobody."""
    for name in FILES:
        problem = None
        try:
            with open(files[name] or os.devnull, "rb"):
                pass
        except OSError as err:
            problem = "%s: %s cannot be read: %s" % (name, files[name], err.strerror)
        _demand(problem is None, problem)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    for name, load in (
        ("ca_file", lambda: context.load_verify_locations(files["ca_file"])),
        ("client_cert", lambda: context.load_cert_chain(files["client_cert"], files["client_key"], password="")),
    ):
        problem = None
        try:
            if files[name] is not None:
                load()
        except (OSError, ValueError) as err:
            reason = getattr(err, "reason", None) or "no PEM, encrypted, or a key of another certificate"
            problem = "%s: %s cannot be used (%s)" % (name, files[name], reason.replace("_", " ").lower())
        _demand(problem is None, problem)
