# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A client that asks one API for JSON and believes only whole answers.

All that it asks has to come before one deadline. No secret and no query value is in any error: they are made from the
kinds of what failed, never from texts or objects of the libraries, which carry the request.
"""

from __future__ import annotations

import base64
import collections
import concurrent.futures
import datetime
import email.utils
import http.client
import itertools
import json
import logging
import queue
import random
import re
import socket
import ssl
import threading
import time
import urllib.parse
import weakref
import zlib

try:
    import requests
    import urllib3
except ImportError:  # http.py says so before anything here is called
    requests = urllib3 = None  # type: ignore[assignment]

from ..manifest import ManifestError

CHUNK = 256 * 1024
EXCERPT = 80
BACKOFF, MAX_BACKOFF = 0.5, 30.0
# Shorter values of headers and parameters are no secrets, and would black out half of a text.
SECRET_LENGTH = 4
JSON_TYPE = re.compile(r"application/(?:[\w.-]+\+)?json", re.ASCII | re.IGNORECASE)

# headers: those of the answer; body: what its JSON means, None for a status other than 200.
Answer = collections.namedtuple("Answer", "status headers body")
# again: whether it is worth another try, after: seconds the server asks to wait before it
Problem = collections.namedtuple("Problem", "code text again after", defaults=(False, 0.0))

WHAT_TO_DO = {
    204: "the list is read from a body; see url",
    206: "a part of a list is no list: see url and headers",
    401: "see token, token_file, username and password_file, and whether they have expired",
    403: "see what the token, user or client certificate may read, and whether they have expired",
    404: "see url",
    429: "see limit, or ask for a higher rate",
}


class Client:
    """Asks with the credentials of the options, again where that may help, until the deadline."""

    def __init__(self, options, token, password, files):
        """``files``: ``{client_cert, client_key, ca_file}`` with full paths or None."""
        self._ends = time.monotonic() + options["deadline"]
        self._options = options
        headers = {name: as_text(value) for name, value in options["headers"].items()}
        self._secrets = [value for value in headers.values() if len(value) >= SECRET_LENGTH]
        for given in options["params"].values():
            values = [as_text(value) for value in (given if isinstance(given, list) else [given])]
            self._secrets += [value for value in values if len(value) >= SECRET_LENGTH]
        if token is not None:
            self._secrets.append(token)
            headers["Authorization"] = "Bearer " + token
        if password is not None:
            both = base64.b64encode(("%s:%s" % (options["username"], password)).encode()).decode()
            self._secrets += [password, both]
            headers["Authorization"] = "Basic " + both
        self._begun, self._queue = {}, queue.SimpleQueue()
        threading.Thread(target=_work, args=(self._queue,), daemon=True).start()
        weakref.finalize(self, self._queue.put, None)
        self._session = requests.Session()
        # Neither a netrc, which would replace the credentials, nor proxies of an environment that nobody looks at.
        self._session.trust_env = False
        self._session.headers.update({"Accept": "application/json", "User-Agent": "microvm.reaper"})
        # An old list out of a cache would pass for one of now.
        self._session.headers.update({"Cache-Control": "no-cache"})
        self._session.headers.update(headers)
        # The only encoding that is unpacked here, with a limit.
        self._session.headers["Accept-Encoding"] = "gzip"
        self._session.verify = files["ca_file"] or True
        self._session.cert = files["client_cert"]
        if files["client_key"]:
            self._session.cert = (files["client_cert"], files["client_key"])
        # It logs whole URLs, with their queries.
        logging.getLogger("urllib3").setLevel(logging.CRITICAL)

    def get(self, url, *, etag=None, may_be_gone=False):
        """Return an Answer of status 200; 304 if it still has ``etag``; 404 and 410 if it ``may_be_gone``."""
        tries = 0
        while True:
            outcome = self._try(url, etag, may_be_gone)
            if isinstance(outcome, Answer):
                return outcome
            tries += 1
            text, pause = outcome.text, max(outcome.after, _backoff(tries))
            if not outcome.again or tries > self._options["retries"]:
                break
            if pause >= self._left():
                text += "; to try again in %.0f s would be after the deadline of %g s" % (
                    pause, self._options["deadline"])
                break
            time.sleep(pause)
        often = " (tried %d times)" % tries if tries > 1 else ""
        raise ManifestError(outcome.code, "GET %s%s: %s" % (shown(url), often, self._without_secrets(text)))

    def _left(self):
        return self._ends - time.monotonic()

    def _try(self, url, etag, may_be_gone):
        """Ask once; return an Answer or a Problem.

        In a thread that may be left behind: names that are looked up, handshakes and headers that drip in have no
        deadline of their own.
        """
        if self._left() > 0:
            done = self._begun.pop((url, etag), None) or self._begin(url, etag)
            concurrent.futures.wait([done], timeout=self._left())
            if done.done():
                outcome = done.result()
                return outcome if isinstance(outcome, Problem) else self._judge(outcome, etag, may_be_gone)
        self._queue.put(None)  # the deadline is that of all that is asked: nothing more will be
        return self._late()

    def ask_ahead(self, url, etag):
        """Ask already for what get() will be asked for next, while the caller still has other work."""
        if self._left() > 0:
            self._begun = {(url, etag): self._begin(url, etag)}

    def _begin(self, url, etag):
        """Ask in the thread; return the Future of what comes."""
        done = concurrent.futures.Future()

        def work():
            try:
                done.set_result(self._exchange(url, etag))
            except BaseException as err:
                done.set_exception(err)

        self._queue.put(work)
        return done

    def _late(self):
        return Problem("incomplete", "not all had come before the deadline of %g s; see deadline and limit"
                       % self._options["deadline"])

    def _exchange(self, url, etag):
        """Return an Answer whose body is still bytes, or a Problem."""
        status = None
        patience = max(0.001, min(self._options["timeout"], self._left()))
        try:
            with self._session.get(
                url,
                headers={} if etag is None else {"If-None-Match": etag},
                timeout=(patience, patience),
                allow_redirects=False,
                stream=True,
            ) as response:
                status = response.status_code
                body = self._body(response)
                return body if isinstance(body, Problem) else Answer(status, response.headers, body)
        except (requests.RequestException, urllib3.exceptions.HTTPError, http.client.HTTPException, zlib.error,
                OSError, ValueError) as err:
            return self._failure(err, status)

    def _body(self, response):
        """Return the whole body, unpacked; a Problem if it is too large; of an error only the beginning."""
        packing = response.headers.get("Content-Encoding", "identity").strip().lower()
        if packing not in ("identity", "gzip", "x-gzip", ""):
            return Problem("unreadable", "the body is packed with %.40r, and only gzip was asked for" % packing)
        unpack = zlib.decompressobj(16 + zlib.MAX_WBITS) if "gzip" in packing else None
        wanted = response.status_code == 200
        limit = self._options["max_page_bytes"] if wanted else CHUNK
        body = bytearray()
        # read1() returns what is there: read() would wait for a whole chunk of a body that drips in.
        while chunk := response.raw.read1(CHUNK, decode_content=False):
            body += unpack.decompress(chunk, limit + 1 - len(body)) if unpack else chunk
            if len(body) > limit and not wanted:
                break
            if len(body) > limit:
                return Problem("unreadable", "the page is larger than max_page_bytes=%d; see limit" % limit)
            if self._left() <= 0:
                return self._late()
        if unpack and not unpack.eof and wanted:
            return Problem("incomplete", "the gzip data broke off", True)
        return bytes(body)

    def _failure(self, err, status):
        """Return the Problem that an exception means, told from its kind and not from its text."""
        causes = _causes(err)

        def find(*kinds):
            return next((cause for cause in causes if isinstance(cause, kinds)), None)

        if isinstance(found := find(ssl.SSLCertVerificationError), ssl.SSLCertVerificationError):
            text = "its certificate is not accepted (%s); see ca_file" % found.verify_message.rstrip(".")
            return Problem("unreadable", text)
        if isinstance(found := find(ssl.SSLError), ssl.SSLError):
            reason = (found.reason or "no reason given").replace("_", " ").lower()
            return Problem("unreadable", "TLS failed (%s); see url, client_cert and client_key" % reason)
        if status is not None:
            what = "nothing came for %g s" % self._options["timeout"] if find(
                urllib3.exceptions.ReadTimeoutError, TimeoutError) else "the connection ended early"
            if find(zlib.error):
                what = "its gzip data is damaged"
            return Problem("incomplete", "it answered %d, but the body broke off: %s" % (status, what), True)
        if isinstance(found := find(socket.gaierror), OSError):
            return Problem("unreadable", "the name of the host cannot be resolved (%s)" % found.strerror, True)
        if find(TimeoutError, urllib3.exceptions.ReadTimeoutError):
            return Problem("unreadable", "no answer within %g s; see timeout" % self._options["timeout"], True)
        if find(http.client.RemoteDisconnected):
            return Problem("unreadable", "the connection was closed without an answer", True)
        found = next((cause for cause in causes if isinstance(cause, OSError) and cause.strerror), None)
        if isinstance(found, OSError):
            return Problem("unreadable", "no answer: %s" % found.strerror, True)
        again = isinstance(err, (requests.ConnectionError, urllib3.exceptions.ProtocolError))
        return Problem("unreadable", "no HTTP answer (%s)" % type(causes[-1]).__name__, again)

    def _judge(self, answer, etag, may_be_gone):
        """Return the Answer with the meaning of its body, or the Problem with it."""
        status, headers, body = answer
        if (status == 304 and etag is not None) or (status in (404, 410) and may_be_gone):
            return Answer(status, headers, None)
        kind, _semicolon, rest = headers.get("Content-Type", "").partition(";")
        if status != 200:
            text = self._answered(answer, kind)
            if 300 <= status < 400 and "Location" in headers:
                text += "; it points to %s: redirects are not followed, credentials would go along; see url" % shown(
                    headers["Location"])
            elif status in WHAT_TO_DO:
                text += "; " + WHAT_TO_DO[status]
            again = status == 429 or status >= 500
            return Problem("incomplete" if status == 206 else "unreadable", text, again,
                           _retry_after(headers) if again else 0.0)
        if not JSON_TYPE.fullmatch(kind.strip()):
            return Problem("unreadable", self._answered(answer, kind) + "; JSON was expected: see url")
        charset = _charset(rest)
        if charset not in ("utf-8", "utf8"):
            return Problem("unreadable", "its JSON is in %.40r; only UTF-8 is read" % charset)
        try:
            return Answer(status, headers, _decoded(body.decode("utf-8")))
        except UnicodeDecodeError as err:
            problem = "its JSON is not UTF-8 from byte %d on" % err.start
        except RecursionError:
            problem = "its JSON is nested too deeply"
        except ValueError as err:
            problem = "%s; that is no JSON (%s)" % (self._answered(answer, kind), _printable(str(err))[:200])
        return Problem("unreadable", problem)

    def _answered(self, answer, kind):
        """Say what came: status, type and the beginning of the body."""
        kind = self._beginning(kind) or "without a type"
        body = self._beginning(answer.body[:CHUNK].decode("utf-8", "replace"))
        return "it answered %d %s%s" % (answer.status, kind, ": '%s'" % body if body else ", with an empty body")

    def _beginning(self, text):
        # Secrets first: of one that is cut short the rest would stay.
        return " ".join(_printable(self._without_secrets(text)[: 10 * EXCERPT]).split())[:EXCERPT]

    def _without_secrets(self, text):
        """Return the text without what the server may have echoed of our request."""
        for secret in self._secrets:
            for form in (secret, urllib.parse.quote(secret, safe=""), json.dumps(secret)[1:-1]):
                text = text.replace(form, "***")
        return text


def _work(tasks):
    """Do what comes out of the queue, until None does. One thread for all: a new one for each page costs a third."""
    while True:
        task = tasks.get()
        if task is None:
            return
        task()
        del task  # it refers to the client, with whose end this ends


def shown(url):
    """Return a URL for people: without user and password, and of the query only the names."""
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError:
        return "a URL that cannot be read"
    netloc = parts.netloc.rpartition("@")[2]
    pairs = [pair.partition("=") for pair in parts.query.split("&") if pair]
    query = "&".join(name + "=..." if equals else "..." for name, equals, _value in pairs)
    return _printable(urllib.parse.urlunsplit((parts.scheme, netloc, parts.path, query, "")))[:500]


def as_text(value):
    """Return a value of a YAML mapping as it is written in headers and queries."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def with_params(url, params):
    """Return the URL with these parameters in place of those of the same names."""
    parts = urllib.parse.urlsplit(url)
    kept = [pair for pair in urllib.parse.parse_qsl(parts.query, keep_blank_values=True) if pair[0] not in params]
    for name, value in params.items():
        kept += [(name, as_text(one)) for one in (value if isinstance(value, list) else [value])]
    return urllib.parse.urlunsplit(parts._replace(query=urllib.parse.urlencode(kept)))


def followed(url, reference):
    """Return what a page at ``url`` refers to as a URL, None if that is not of the same scheme, host and port."""
    try:
        base, parts = urllib.parse.urlsplit(url), urllib.parse.urlsplit(urllib.parse.urljoin(url, reference))
        if "@" in parts.netloc or _origin(parts) != _origin(base):
            return None
    except ValueError:
        return None
    # The host is taken from our own URL: another library may read a strange one in another way.
    path = urllib.parse.quote(parts.path, safe="/%:@!$&'()*+,;=~-._")
    query = urllib.parse.quote(parts.query, safe="/?%:@!$&'()*+,;=~-._[]")
    return urllib.parse.urlunsplit((base.scheme, base.netloc, path or "/", query, ""))


def _origin(parts):
    scheme = parts.scheme.lower()
    return scheme, (parts.hostname or "").rstrip("."), parts.port or {"http": 80, "https": 443}.get(scheme)


def _causes(err):
    """Return an exception and all it wraps: the libraries put causes into arguments, reasons and contexts."""
    causes, found = [], [err]
    while found:
        one = found.pop(0)
        if isinstance(one, BaseException) and not any(one is cause for cause in causes):
            causes.append(one)
            found += [*one.args, getattr(one, "reason", None), one.__cause__, one.__context__]
    return causes


def _backoff(tries):
    """Return seconds to wait after so many failures; at random, so that not all controllers come at once."""
    return min(MAX_BACKOFF, BACKOFF * 2 ** (tries - 1)) * random.uniform(0.5, 1)


def _retry_after(headers):
    """Return the seconds that a server asks to wait: it says a number of them or an instant of its own clock."""
    value = headers.get("Retry-After", "").strip()
    if value.isascii() and value.isdigit():
        return float(value[:9])
    instants = [http_date(value), http_date(headers.get("Date", ""))]
    now = instants[1] or datetime.datetime.now(datetime.UTC)
    return max(0.0, (instants[0] - now).total_seconds()) if instants[0] else 0.0


def http_date(text):
    """Return the instant of a date as HTTP writes it, None for anything else."""
    try:
        instant = email.utils.parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return None
    return instant if instant.tzinfo else instant.replace(tzinfo=datetime.UTC)


def _charset(parameters):
    """Return the charset among a content type's parameters; without one JSON is UTF-8."""
    for parameter in parameters.split(";"):
        name, _equals, value = parameter.partition("=")
        if name.strip().lower() == "charset":
            return value.strip().strip("\"'").lower()
    return "utf-8"


def _printable(text):
    return "".join(one if one.isprintable() else " " for one in text)


def _decoded(text):
    """Return what JSON means; raises ValueError, also for an object that has a key twice."""
    found = _QUICK.decode(text)
    # Where no quote is escaped and no colon stands apart, each key ends in a quote and a colon, and nearly nothing else
    # does: as many keys as such ends, and none is there twice. Otherwise one looks at each object, in thrice the time.
    ends = text.count('":')
    is_odd = "\\" in text or (ends < text.count(":") and any(odd in text for odd in (" :", "\t:", "\n:", "\r:")))
    if is_odd or ends != _keys(found):
        found = _CAREFUL.decode(text)
    return found


def _keys(found):
    """Return how many keys the objects have that are in ``found``, at any depth."""
    keys, level = 0, [found]
    while level:
        kinds: list = list(map(type, level))
        # By functions in C alone: most of what is here are millions of texts.
        objects = list(itertools.compress(level, map(_IS_OBJECT.get, kinds)))
        lists = itertools.compress(level, map(_IS_LIST.get, kinds)) if list in set(kinds) else ()
        keys += sum(map(len, objects))
        level = list(itertools.chain.from_iterable(itertools.chain(map(dict.values, objects), lists)))
    return keys


_IS_OBJECT, _IS_LIST = {dict: True}, {list: True}


def _mapping(pairs):
    mapping = dict(pairs)
    if len(mapping) == len(pairs):
        return mapping
    twice = collections.Counter(name for name, _value in pairs).most_common(1)[0][0]
    raise ValueError("the key %.80r is there twice in one object" % twice)


def _no_number(text):
    raise ValueError("%s is no number in JSON" % text)


_QUICK = json.JSONDecoder(parse_constant=_no_number)
_CAREFUL = json.JSONDecoder(object_pairs_hook=_mapping, parse_constant=_no_number)
