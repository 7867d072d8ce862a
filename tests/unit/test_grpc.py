# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The transport against a peer that follows a script: what a daemon may send, and what none should."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import tempfile
import threading
import time

import pytest
from ansible_collections.microvm.reaper.plugins.module_utils import grpc, hpack
from ansible_collections.microvm.reaper.plugins.module_utils.probe import DeadlineExceeded, ProbeError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

HELLO = grpc._frame(grpc.SETTINGS, 0, 0, b"")
ANSWER = hpack.encode([(":status", "200"), ("content-type", "application/grpc")])
METHOD = "pkg.Service/Call"


def headers(block=ANSWER, flags=grpc.END_HEADERS, stream=1):
    return grpc._frame(grpc.HEADERS, flags, stream, block)


def trailers(status="0", message="", stream=1, first=()):
    block = hpack.encode([*first, ("grpc-status", status), ("grpc-message", message)])
    return headers(block, grpc.END_HEADERS | grpc.END_STREAM, stream)


def data(payload, flags=0, stream=1):
    return grpc._frame(grpc.DATA, flags, stream, payload)


def message(payload):
    return struct.pack(">BI", 0, len(payload)) + payload


class Peer:
    """The daemon's end. ``script`` gets it once a client has connected; the socket is closed when it returns."""

    def __init__(self, script):
        self.directory = tempfile.mkdtemp()
        self.path = os.path.join(self.directory, "s")
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(self.path)
        self.listener.listen(1)
        self.script = script
        self.over = threading.Event()
        self.error = None
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self):
        self.socket, _address = self.listener.accept()
        self.socket.settimeout(10)
        try:
            self.script(self)
        except OSError:
            pass  # the client has left
        except Exception as err:
            self.error = err
        self.socket.close()

    def read(self, count):
        found = b""
        while len(found) < count:
            part = self.socket.recv(count - len(found))
            if not part:
                raise OSError("the client has left")
            found += part
        return found

    def frame(self):
        head = self.read(9)
        return head[3], head[4], struct.unpack(">I", head[5:])[0], self.read(int.from_bytes(head[:3], "big"))

    def request(self):
        """Read until the end of a request; return its headers and its message."""
        found, body = {}, b""
        while True:
            kind, flags, _stream, payload = self.frame()
            if kind == grpc.HEADERS:
                found = dict(hpack.decode(payload))
            if kind == grpc.DATA:
                body += payload
                if flags & grpc.END_STREAM:
                    return found, body

    def greet(self):
        assert self.read(len(grpc.PREFACE)) == grpc.PREFACE
        self.socket.sendall(HELLO)

    def wait(self):
        self.over.wait(10)


@contextlib.contextmanager
def peer(script):
    one = Peer(script)
    try:
        yield one
    finally:
        one.over.set()
        one.listener.close()
        one.thread.join(12)
        os.unlink(one.path)
        os.rmdir(one.directory)
    if one.error:
        raise one.error


def answers(*frames):
    """A script: greet, read a request, answer with these bytes, and keep the connection open."""

    def script(one):
        one.greet()
        one.request()
        one.socket.sendall(b"".join(frames))
        one.wait()

    return script


def call(path, timeout=2.0, request=b"hi"):
    connection = grpc.Connection(path, timeout)
    try:
        return list(connection.call(METHOD, request, timeout))
    finally:
        connection.close()


def test_unary_call():
    seen = []

    def script(one):
        one.greet()
        seen.append(one.request())
        one.socket.sendall(headers() + data(message(b"answer")) + trailers())
        one.wait()

    with peer(script) as one:
        connection = grpc.Connection(one.path, 2)
        found = list(connection.call(METHOD, b"question", 2, [("containerd-namespace", "vms")]))
        connection.close()
    assert found == [b"answer"]
    sent, body = seen[0]
    assert body == message(b"question")
    assert sent[":path"] == "/pkg.Service/Call"
    assert sent["containerd-namespace"] == "vms"
    assert sent["te"] == "trailers"
    assert sent["content-type"] == "application/grpc"
    assert 0 < int(sent["grpc-timeout"][:-1]) <= 2000 and sent["grpc-timeout"][-1] == "m"


def test_messages_cut_anywhere_padded_and_empty():
    body = message(b"one") + message(b"") + message(b"three" * 9000)
    frames = [data(body[place : place + 997]) for place in range(0, len(body), 997)]
    frames.insert(1, data(b"\x03" + b"\0" * 3, grpc.PADDED))
    with peer(answers(headers(), *frames, trailers())) as one:
        assert call(one.path) == [b"one", b"", b"three" * 9000]


def test_headers_in_pieces_with_padding_and_priority():
    begin = headers(b"\x02" + b"\0" * 5 + ANSWER[:3] + b"\0\0", grpc.PADDED | grpc.PRIORITY)
    rest = grpc._frame(grpc.CONTINUATION, grpc.END_HEADERS, 1, ANSWER[3:])
    with peer(answers(begin, rest, data(message(b"x")), trailers())) as one:
        assert call(one.path) == [b"x"]


def test_other_frames_in_between():
    noise = (
        grpc._frame(grpc.PING, 0, 0, b"12345678")
        + grpc._frame(grpc.WINDOW_UPDATE, 0, 0, struct.pack(">I", 1000))
        + grpc._frame(grpc.SETTINGS, 0, 0, grpc._settings({grpc.INITIAL_WINDOW_SIZE: 10, 99: 1}))
        + grpc._frame(200, 0, 0, b"a frame of the future")
        + data(b"an old stream's", stream=7)
        + headers(stream=7)
    )
    with peer(answers(noise, headers(), noise, data(message(b"x")), noise, trailers())) as one:
        assert call(one.path) == [b"x"]


def test_a_ping_is_answered():
    seen = []

    def script(one):
        one.greet()
        one.request()
        one.socket.sendall(grpc._frame(grpc.PING, 0, 0, b"12345678"))
        while True:
            kind, flags, _stream, payload = one.frame()
            if kind == grpc.PING:
                seen.append((flags, payload))
                break
        one.socket.sendall(headers() + data(message(b"x")) + trailers())

    with peer(script) as one:
        call(one.path)
    assert seen == [(grpc.ACK, b"12345678")]


def test_an_answer_larger_than_the_window():
    """A peer that keeps to flow control can send it all only because the windows are given back in time."""
    part = message(b"x" * 100_000)
    total = len(part) * 150

    def script(one):
        one.greet()
        window = {0: grpc.FIRST_WINDOW, 1: grpc.WINDOW}
        sent = 0
        one.request_seen = False

        def read_one():
            kind, flags, stream, payload = one.frame()
            if kind == grpc.WINDOW_UPDATE:
                window[stream] += struct.unpack(">I", payload)[0]
            one.request_seen |= kind == grpc.DATA and bool(flags & grpc.END_STREAM)

        while not one.request_seen:
            read_one()
        one.socket.sendall(headers())
        stream = part * 150
        while sent < total:
            while min(window.values()) < grpc.MAX_FRAME:
                read_one()
            piece = stream[sent : sent + grpc.MAX_FRAME]
            one.socket.sendall(data(piece))
            sent += len(piece)
            window = {key: left - len(piece) for key, left in window.items()}
        one.socket.sendall(trailers())
        one.wait()

    with peer(script) as one:
        found = call(one.path, 20)
    assert len(found) == 150 and set(map(len, found)) == {100_000}


def test_a_request_waits_for_the_peers_window():
    seen = []

    def script(one):
        assert one.read(len(grpc.PREFACE)) == grpc.PREFACE
        one.socket.sendall(grpc._frame(grpc.SETTINGS, 0, 0, grpc._settings({grpc.INITIAL_WINDOW_SIZE: 10})))
        body = b""
        while len(body) < 105:
            kind, _flags, _stream, payload = one.frame()
            if kind == grpc.DATA:
                assert len(payload) <= 10
                seen.append(len(payload))
                body += payload
                one.socket.sendall(grpc._frame(grpc.WINDOW_UPDATE, 0, 1, struct.pack(">I", 10)))
        one.socket.sendall(headers() + data(message(b"x")) + trailers())
        one.wait()

    with peer(script) as one:
        assert call(one.path, request=b"q" * 100) == [b"x"]
    assert sum(seen) == 105


def test_many_calls_on_one_connection():
    def script(one):
        one.greet()
        for number in range(50):
            one.request()
            stream = 2 * number + 1
            one.socket.sendall(headers(stream=stream) + data(message(b"%d" % number), stream=stream))
            one.socket.sendall(trailers(stream=stream))
        one.wait()

    with peer(script) as one:
        connection = grpc.Connection(one.path, 2)
        for number in range(50):
            assert connection.is_usable()
            assert list(connection.call(METHOD, b"", 2)) == [b"%d" % number]
        connection.close()


@pytest.mark.parametrize(
    ("status", "kind", "code"),
    [
        ("5", grpc.NotFound, "NOT_FOUND"),
        ("9", grpc.FailedPrecondition, "FAILED_PRECONDITION"),
        ("14", grpc.CallError, "UNAVAILABLE"),
    ],
)
def test_errors_of_the_daemon_are_typed_and_say_what_and_where(status, kind, code):
    refused = trailers(status, "snapshot %25x%0adoes%ff not exist", first=[(":status", "200")])
    with peer(answers(refused)) as one, pytest.raises(kind) as caught:
        call(one.path)
    assert caught.value.code == code
    assert isinstance(caught.value, ProbeError)
    text = "%s: %s: %s: snapshot %%x?does\ufffd not exist" % (one.path, METHOD, code)
    assert str(caught.value) == text


def test_the_connection_survives_an_error_of_the_daemon():
    refused = trailers("5", "no", first=[(":status", "200")])
    with peer(answers(refused)) as one:
        connection = grpc.Connection(one.path, 2)
        with pytest.raises(grpc.NotFound):
            list(connection.call(METHOD, b"", 2))
        assert connection.is_usable()
        connection.close()


RST = grpc._frame(grpc.RST_STREAM, 0, 1, struct.pack(">I", 8))
GOAWAY = grpc._frame(grpc.GOAWAY, 0, 0, struct.pack(">II", 0, 0))
HUGE = hpack.encode([("x", "y" * 15000)])


@pytest.mark.parametrize(
    ("frames", "reason"),
    [
        pytest.param([RST], "broke off", id="RST_STREAM"),
        pytest.param([grpc._frame(grpc.RST_STREAM, 0, 1, b"")], "malformed", id="RST_STREAM without a code"),
        pytest.param([GOAWAY], "closes the connection", id="GOAWAY"),
        pytest.param([grpc._frame(grpc.GOAWAY, 0, 0, b"")], "closes the connection", id="GOAWAY without a stream"),
        pytest.param([b"\xff\xff\xff\x00\x00\x00\x00\x00\x01"], "16777215 bytes", id="giant frame"),
        pytest.param([headers(), data(b"\x00\xff\xff\xff\xff")], "4294967295 bytes", id="giant message"),
        pytest.param([headers(), data(b"\x01\x00\x00\x00\x01x")], "compressed", id="compressed message"),
        pytest.param([headers(), data(b"\x00\x00\x00\x00\x09x"), trailers()], "cut short", id="message cut short"),
        pytest.param([headers(), data(b"\x09x", grpc.PADDED)], "malformed", id="padding longer than the frame"),
        pytest.param([headers(), data(b"", grpc.END_STREAM)], "not an answer", id="no status"),
        pytest.param([trailers(first=[(":status", "502")])], "HTTP status '502'", id="HTTP error"),
        pytest.param([trailers("²", first=[(":status", "200")])], "not an answer", id="status that is no number"),
        pytest.param([trailers("99", first=[(":status", "200")])], "not an answer", id="status that does not exist"),
        pytest.param([headers(b"\xff\xff\xff\xff\xff\xff\xff")], "too large", id="broken header block"),
        pytest.param([headers(b"\xbe")], "table that is empty", id="dynamic table"),
        pytest.param([headers(ANSWER, 0), data(b"x")], "malformed", id="headers interrupted"),
        pytest.param(
            [headers(HUGE, 0)] + [grpc._frame(grpc.CONTINUATION, 0, 1, HUGE)] * 9,
            "endless headers",
            id="endless headers",
        ),
        pytest.param(
            [headers(hpack.encode([("%d.%d" % (n, m), "") for m in range(500)])) for n in range(4)],
            "endless headers",
            id="endless header names",
        ),
        pytest.param([grpc._frame(grpc.PUSH_PROMISE, grpc.END_HEADERS, 1, b"\0\0\0\2")], "pushes", id="push"),
        pytest.param([b"HTTP/1.1 400 Bad Request\r\n\r\n"], "does not speak HTTP/2", id="HTTP/1"),
    ],
)
def test_faults_in_an_answer(frames, reason):
    with peer(answers(*frames)) as one, pytest.raises(ProbeError, match=reason) as caught:
        call(one.path)
    assert str(caught.value).startswith("%s: %s: " % (one.path, METHOD))
    assert not isinstance(caught.value, grpc.CallError)


@pytest.mark.parametrize(
    "greeting", [b"SSH-2.0-OpenSSH_9.2\r\n", b"HTTP/1.0 200 OK\r\n\r\n", grpc.PREFACE, RST, b"\0" * 9]
)
def test_a_peer_that_is_no_such_daemon(greeting):
    script = lambda one: (one.socket.sendall(greeting), one.wait())  # noqa: E731
    with peer(script) as one, pytest.raises(ProbeError, match=r"does not speak HTTP/2|no answer in time"):
        grpc.Connection(one.path, 0.5)


def test_closed_in_the_middle_of_a_frame():
    def script(one):
        one.greet()
        one.request()
        one.socket.sendall(headers() + data(message(b"answer"))[:-3])

    with peer(script) as one, pytest.raises(ProbeError, match="closed the connection"):
        call(one.path)


def test_closed_before_anything():
    with peer(lambda one: None) as one, pytest.raises(ProbeError, match=r"closed the connection|Broken pipe|reset"):
        grpc.Connection(one.path, 2)


def drip(one, payload):
    for byte in payload:
        one.socket.sendall(bytes([byte]))
        if one.over.wait(0.05):
            return


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(lambda one: one.wait(), id="accepts and says nothing"),
        pytest.param(lambda one: (one.greet(), one.wait()), id="greets and says nothing"),
        pytest.param(lambda one: (one.greet(), drip(one, headers() + data(message(b"x" * 300)))), id="slow drip"),
        pytest.param(
            lambda one: (one.greet(), [one.socket.sendall(HELLO * 100) for _ in iter(one.over.is_set, True)]),
            id="endless settings",
        ),
        pytest.param(
            lambda one: (
                one.greet(),
                [one.socket.sendall(data(b"", stream=7) * 99) for _ in iter(one.over.is_set, True)],
            ),
            id="endless frames of another stream",
        ),
    ],
)
def test_no_wait_outlives_the_deadline(script):
    begin = time.monotonic()
    with peer(script) as one, pytest.raises(ProbeError) as caught:
        call(one.path, 0.4)
    assert time.monotonic() - begin < 1.5
    assert isinstance(caught.value, DeadlineExceeded) or "closed" in str(caught.value)


def test_a_listener_that_does_not_accept():
    """What a stopped daemon looks like, at first while its queue has room and then when it is full."""
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "s")
        with socket.socket(socket.AF_UNIX) as listener, contextlib.ExitStack() as waiting:
            listener.bind(path)
            listener.listen(1)
            for _attempt in range(5):
                begin = time.monotonic()
                with pytest.raises(DeadlineExceeded):
                    grpc.Connection(path, 0.2)
                assert time.monotonic() - begin < 1
                with contextlib.suppress(BlockingIOError):
                    filler = waiting.enter_context(socket.socket(socket.AF_UNIX))
                    filler.setblocking(False)
                    filler.connect(path)


def test_nobody_listens():
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "s")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
        with pytest.raises(ProbeError, match="Connection refused"):
            grpc.Connection(path, 1)
        with pytest.raises(ProbeError, match="too long"):
            grpc.Connection(path + "x" * 200, 1)


def test_an_answer_without_end_is_bounded(monkeypatch):
    monkeypatch.setattr(grpc, "MAX_ANSWER", 50_000)
    endless = answers(headers(), *[data(message(b"x" * 1000))] * 60)
    with peer(endless) as one, pytest.raises(ProbeError, match="larger than 50000 bytes"):
        call(one.path)


def test_a_request_is_bounded():
    with peer(answers()) as one, pytest.raises(ProbeError, match="the request is larger"):
        call(one.path, request=b"x" * grpc.MAX_REQUEST)


def test_giving_up_an_answer_closes_the_connection():
    with peer(answers(headers(), data(message(b"one") + message(b"two")))) as one:
        connection = grpc.Connection(one.path, 2)
        answer = connection.call(METHOD, b"", 2)
        assert next(answer) == b"one"
        answer.close()
        assert not connection.is_usable()


@pytest.mark.parametrize("farewell", [b"", GOAWAY, b"\xff" * 20])
def test_an_idle_connection_that_the_daemon_left_is_not_usable(farewell):
    connected = threading.Event()

    def script(one):
        one.greet()
        connected.wait(2)
        one.socket.sendall(farewell)
        if farewell:
            one.wait()

    with peer(script) as one:
        connection = grpc.Connection(one.path, 2)
        assert connection.is_usable()
        connected.set()
        time.sleep(0.1)
        assert not connection.is_usable()


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.binary(max_size=200))
def test_any_bytes_after_the_greeting_are_an_answer_or_an_error(noise):
    def script(one):
        one.greet()
        one.request()
        one.socket.sendall(headers() + noise)

    with peer(script) as one, contextlib.suppress(ProbeError):
        call(one.path, 1)
