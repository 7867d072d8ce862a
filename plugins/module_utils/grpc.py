# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A gRPC client for a daemon that listens on a unix socket: just enough of HTTP/2 (RFC 9113), one call at a time.

The daemon may be stopped, slow or no such daemon at all. So every wait ends at the deadline of the call, everything it
sends has a bound, and whatever goes wrong is a ProbeError that names the socket, the call and the reason.
"""

from __future__ import annotations

import socket
import struct
import time

from . import hpack
from .probe import DeadlineExceeded, ProbeError

MAX_FRAME = 16384  # what a peer may send unless we allow more
MAX_HEADERS = 1 << 16
MAX_HEADER_NAMES = 1000
MAX_MESSAGE = 1 << 24  # what containerd itself allows
MAX_ANSWER = 1 << 30  # a stream of messages; each is dropped before the next is read
MAX_REQUEST = 1 << 15
WINDOW = 1 << 22  # how much the peer may send before we tell it that we have read
FIRST_WINDOW = 65535

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 5, 6, 7, 8, 9
END_STREAM, ACK, END_HEADERS, PADDED, PRIORITY = 0x1, 0x1, 0x4, 0x8, 0x20
HEADER_TABLE_SIZE, ENABLE_PUSH, INITIAL_WINDOW_SIZE = 1, 2, 4
OK = "0"
CODES = [
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
]
CODE_NAMES = {str(number): name for number, name in enumerate(CODES)}


class CallError(ProbeError):
    """The daemon answered with an error; ``code`` is its name in gRPC."""

    code = ""


class NotFound(CallError):
    """There is no such object."""


class FailedPrecondition(CallError):
    """The object is not in a state that allows it."""


class Connection:
    """One connection. After an error of transport it is closed, and of no more use; see ``is_usable``."""

    def __init__(self, path, timeout):
        self.path = path
        self.doing = "connect"
        self.deadline = time.monotonic() + timeout
        self.buffer = bytearray()
        self.stream = -1
        self.first_window = self.window = self.stream_window = FIRST_WINDOW
        self.unreported = 0
        self.leaving = False
        self.socket = self._connect()
        try:
            self._send(
                PREFACE,
                _frame(SETTINGS, 0, 0, _settings({HEADER_TABLE_SIZE: 0, ENABLE_PUSH: 0, INITIAL_WINDOW_SIZE: WINDOW})),
                _frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", WINDOW - FIRST_WINDOW)),
            )
            kind, flags, stream, payload = self._read_frame()
            if kind != SETTINGS or stream or flags & ACK:
                raise self._error("does not speak HTTP/2")
            self._on_settings(flags, payload)
        except BaseException:
            self.close()
            raise

    def call(self, method, request, timeout, metadata=()):
        """Send one request, yield the messages of the answer. Raises CallError for the daemon's own errors."""
        self.doing, self.deadline = method, time.monotonic() + timeout
        self.stream += 2
        self.stream_window = self.first_window
        headers = [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", "/" + method),
            (":authority", "localhost"),
            ("te", "trailers"),
            ("content-type", "application/grpc"),
            ("user-agent", "microvm.reaper"),
            ("grpc-timeout", "%dm" % max(1, int(timeout * 1000))),
        ]
        complete = False
        try:
            self._send(_frame(HEADERS, END_HEADERS, self.stream, hpack.encode(headers + list(metadata))))
            self._send_request(struct.pack(">BI", 0, len(request)) + request)
            answer = {}
            yield from self._messages(answer)
            complete = True
        except hpack.HpackError as err:
            raise self._error(str(err)) from err
        finally:
            if not complete:  # also when the caller does not want the rest
                self.close()
        self._check(answer)

    def is_usable(self):
        """Tell whether the next call may use it: open, and the daemon has not said that it is leaving."""
        if self.socket is None:
            return False
        self.doing, self.deadline = "ping", time.monotonic() + 1.0
        try:
            while not self.leaving and self._has_input():
                self._on_frame(*self._read_frame())
        except ProbeError:
            self.leaving = True
        if self.leaving:
            self.close()
        return self.socket is not None

    def close(self):
        """Close it. Never raises."""
        if self.socket is not None:
            self.socket.close()
            self.socket = None

    def forget(self):
        """Give up a connection that was inherited over a fork: the descriptor is the parent's, and left alone."""
        if self.socket is not None:
            self.socket.detach()
            self.socket = None

    def _connect(self):
        while True:
            peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
            try:
                peer.settimeout(self._left())
                peer.connect(self.path)
                return peer
            except BlockingIOError:  # its queue is full: it does not accept
                peer.close()
                time.sleep(0.02)
            except OSError as err:
                peer.close()
                raise self._failure(err) from err
            except BaseException:
                peer.close()
                raise

    def _messages(self, answer):
        """Yield the messages of the current stream; ``answer`` receives its headers and trailers."""
        data, total, over = bytearray(), 0, False
        while not over:
            kind, flags, payload = self._next()
            if kind == RST_STREAM:
                raise self._error("the daemon broke off the call (HTTP/2 error %d)" % struct.unpack(">I", payload)[0])
            if kind == HEADERS:
                answer.update(hpack.decode(payload))
                if len(answer) > MAX_HEADER_NAMES:
                    raise self._error("malformed or endless headers")
            else:
                data += payload
                total += len(payload)
                if total > MAX_ANSWER:
                    raise self._error("the answer is larger than %d bytes" % MAX_ANSWER)
                yield from self._complete(data)
            over = bool(flags & END_STREAM)
        if data and answer.get("grpc-status") == OK:
            raise self._error("the answer was cut short")

    def _complete(self, data):
        """Take the complete messages out of ``data``."""
        while len(data) >= 5:
            packed, length = struct.unpack_from(">BI", data)
            if packed or length > MAX_MESSAGE:
                raise self._error("a message of %d bytes%s" % (length, ", compressed" if packed else ""))
            if len(data) < 5 + length:
                return
            message = bytes(data[5 : 5 + length])
            del data[: 5 + length]
            yield message

    def _check(self, answer):
        status = answer.get("grpc-status")
        if answer.get(":status") != "200" or status not in CODE_NAMES:
            raise self._error("not an answer of gRPC (HTTP status %.20r)" % answer.get(":status"))
        if status != OK:
            from urllib.parse import unquote_to_bytes  # seldom needed, and slow to load

            code = CODE_NAMES[status]
            text = unquote_to_bytes(answer.get("grpc-message", "")).decode("utf-8", "replace")
            kind = {"NOT_FOUND": NotFound, "FAILED_PRECONDITION": FailedPrecondition}.get(code, CallError)
            raise self._error("%s: %s" % (code, "".join(c if c.isprintable() else "?" for c in text[:500])), kind, code)

    def _next(self):
        """Return ``(kind, flags, payload)`` of the next frame that belongs to the current call."""
        while True:
            kind, flags, stream, payload = self._read_frame()
            self._on_frame(kind, flags, stream, payload)
            if kind == HEADERS:
                flags, payload = self._whole_headers(flags, stream, payload)
            if stream == self.stream and kind in (DATA, HEADERS, RST_STREAM):
                if kind == RST_STREAM and len(payload) != 4:
                    raise self._error("a malformed frame")
                return kind, flags, self._unpadded(flags, payload) if kind == DATA else payload

    def _on_frame(self, kind, flags, stream, payload):
        """Do what a frame asks of the connection, whatever stream it is for."""
        if kind == DATA:
            self._on_data(len(payload))
        elif kind == SETTINGS:
            self._on_settings(flags, payload)
        elif kind == PING and not flags & ACK:
            self._send(_frame(PING, ACK, 0, payload[:8]))
        elif kind == WINDOW_UPDATE and len(payload) == 4:
            self._on_window(stream, struct.unpack(">I", payload)[0] & 0x7FFFFFFF)
        elif kind == GOAWAY:
            self.leaving = True
            if len(payload) < 8 or struct.unpack_from(">I", payload)[0] & 0x7FFFFFFF < self.stream:
                raise self._error("the daemon closes the connection")
        elif kind == PUSH_PROMISE:
            raise self._error("the daemon pushes, which we did not allow")

    def _on_settings(self, flags, payload):
        if flags & ACK:
            return
        for place in range(0, len(payload) - 5, 6):
            name, value = struct.unpack_from(">HI", payload, place)
            if name == INITIAL_WINDOW_SIZE:
                self.stream_window += value - self.first_window
                self.first_window = value
        self._send(_frame(SETTINGS, ACK, 0, b""))

    def _on_window(self, stream, more):
        if stream == 0:
            self.window += more
        elif stream == self.stream:
            self.stream_window += more

    def _on_data(self, length):
        """Tell the peer, now and then, that it may send as much again. What an earlier stream left is counted for the
        current one: its window then is a little larger than it need be."""
        self.unreported += length
        if self.unreported >= WINDOW // 2:
            more = struct.pack(">I", self.unreported)
            self._send(_frame(WINDOW_UPDATE, 0, 0, more), _frame(WINDOW_UPDATE, 0, self.stream, more))
            self.unreported = 0

    def _whole_headers(self, flags, stream, payload):
        """Return the flags of a HEADERS frame and its block, with what CONTINUATION frames add to it."""
        block = self._unpadded(flags, payload)
        if flags & PRIORITY:
            block = block[5:]
        last = flags
        while not last & END_HEADERS:
            kind, last, other, more = self._read_frame()
            if kind != CONTINUATION or other != stream or len(block) + len(more) > MAX_HEADERS:
                raise self._error("malformed or endless headers")
            block += more
        return flags, block

    def _unpadded(self, flags, payload):
        if not flags & PADDED:
            return payload
        if not payload or payload[0] >= len(payload):
            raise self._error("a malformed frame")
        return payload[1 : len(payload) - payload[0]]

    def _send_request(self, data):
        """Send the one message of the call, as the peer's windows allow."""
        if len(data) > MAX_REQUEST:
            raise self._error("the request is larger than %d bytes" % MAX_REQUEST)
        while data:
            size = min(len(data), MAX_FRAME, self.window, self.stream_window)
            if size <= 0:
                kind, flags, stream, payload = self._read_frame()
                if stream == self.stream and kind in (HEADERS, RST_STREAM):
                    raise self._error("the daemon refuses the request")
                self._on_frame(kind, flags, stream, payload)
                continue
            part, data = data[:size], data[size:]
            self.window -= size
            self.stream_window -= size
            self._send(_frame(DATA, 0 if data else END_STREAM, self.stream, part))

    def _send(self, *frames):
        try:
            self.socket.settimeout(self._left())
            self.socket.sendall(b"".join(frames))
        except OSError as err:
            raise self._failure(err) from err

    def _read_frame(self):
        header = self._read(9)
        length, kind, flags = int.from_bytes(header[:3], "big"), header[3], header[4]
        if length > MAX_FRAME:
            raise self._error("does not speak HTTP/2, or sends a frame of %d bytes" % length)
        return kind, flags, int.from_bytes(header[5:], "big") & 0x7FFFFFFF, self._read(length)

    def _read(self, count):
        try:
            while len(self.buffer) < count:
                self.socket.settimeout(self._left())
                part = self.socket.recv(1 << 17)
                if not part:
                    raise self._error("the daemon closed the connection")
                self.buffer += part
        except OSError as err:
            raise self._failure(err) from err
        data = bytes(self.buffer[:count])
        del self.buffer[:count]
        return data

    def _has_input(self):
        if self.buffer:
            return True
        self.socket.settimeout(0)
        try:
            return self.socket.recv(1, socket.MSG_PEEK) is not None  # an end is an input too
        except BlockingIOError:
            return False
        except OSError:
            return True

    def _left(self):
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise self._error("no answer in time", DeadlineExceeded)
        return left

    def _failure(self, err):
        if isinstance(err, socket.timeout):
            return self._error("no answer in time", DeadlineExceeded)
        return self._error(err.strerror or str(err))

    def _error(self, text, kind=ProbeError, code=None):
        found = kind("%s: %s: %s" % (self.path, self.doing, text))
        if code:
            found.code = code
        return found


def _frame(kind, flags, stream, payload):
    return len(payload).to_bytes(3, "big") + struct.pack(">BBI", kind, flags, stream) + payload


def _settings(values):
    return b"".join(struct.pack(">HI", name, value) for name, value in values.items())
