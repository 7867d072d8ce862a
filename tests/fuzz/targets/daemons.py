# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What containerd and Firecracker answer on their sockets."""

from __future__ import annotations

import io
import json

from ansible_collections.microvm.reaper.plugins.module_utils import containerd, grpc, hpack, protobuf
from ansible_collections.microvm.reaper.plugins.module_utils import resource as r
from ansible_collections.microvm.reaper.plugins.module_utils.kinds import container, snapshot
from ansible_collections.microvm.reaper.plugins.module_utils.probe import ProbeError
from ansible_collections.microvm.reaper.plugins.module_utils.supervisors import containerd as tasks
from ansible_collections.microvm.reaper.plugins.module_utils.supervisors import firecracker
from ansible_collections.microvm.reaper.plugins.plugin_utils import facts

from ..target import target

ANSWERS = [tell for _name, (_ask, tell) in sorted(containerd.CALLS.items()) if tell]
UNKNOWN = protobuf.encode({99: ("a", protobuf.TEXT)}, {"a": "what a later version says"})
FAR = float("inf")
CODES = {symbol: "{:0{}b}".format(code, length) for (length, code), symbol in hpack.SYMBOLS.items()}


@target()
def containerd_message(data):
    """Raises ProtobufError only. The first byte chooses the message. What was read, written again, reads the same."""
    table, message = ANSWERS[data[0] % len(ANSWERS)] if data else ANSWERS[0], data[1:]
    try:
        found = protobuf.decode(table, message)
    except protobuf.ProtobufError:
        return
    assert all(-(2**63) <= number < 2**63 for number in _numbers(found))
    again = protobuf.decode(table, protobuf.encode(table, found))
    assert _filled(again) == _filled(found), (found, again)
    assert protobuf.decode(table, message + UNKNOWN) == found


def _numbers(value):
    """Yield all integers of a message."""
    if isinstance(value, int):
        yield value
    for one in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _numbers(one)


def _filled(value):
    """Return a message without empty texts in lists, which are not written."""
    if isinstance(value, dict):
        return {key: _filled(one) for key, one in value.items()}
    return [_filled(one) for one in value if one] if isinstance(value, list) else value


@target()
def headers(data):
    """Raises HpackError only. What was read, written again, reads the same; a Huffman code is written in one way."""
    try:
        found = hpack.decode(data)
    except hpack.HpackError:
        found = []
    assert hpack.decode(hpack.encode(found)) == found
    try:
        text = hpack.huffman_decode(data)
    except hpack.HpackError:
        return
    assert _huffman(text) == data


def _huffman(text):
    bits = "".join(map(CODES.get, text))
    bits += "1" * (-len(bits) % 8)
    return int(bits or "0", 2).to_bytes(len(bits) // 8, "big")


class _Socket:
    """A peer that has said all it says."""

    def __init__(self, data):
        self.stream = io.BytesIO(data)

    def settimeout(self, seconds):
        pass

    def sendall(self, data):
        pass

    def recv(self, size, flags=0):
        here = self.stream.tell()
        data = self.stream.read(size)
        if flags:
            self.stream.seek(here)
        return data

    def recv_into(self, buffer, size):
        data = self.stream.read(size)
        buffer[: len(data)] = data
        return len(data)

    def close(self):
        pass


class _Connection(grpc.Connection):
    def __init__(self, data):
        self.peer = _Socket(data)
        super().__init__("/run/fuzz.sock", 60.0)

    def _connect(self):
        return self.peer


@target()
def grpc_answer(data):
    """Raises ProbeError only. Messages are what the DATA frames have. An answer that lost its end is refused."""
    try:
        messages, used = _asked(data)
    except ProbeError:
        return
    said = b"".join(b"\0" + len(message).to_bytes(4, "big") + message for message in messages)
    assert said == _payload(data[:used]), messages
    for end in {used - 1, used - 9, used // 2}:
        try:
            _asked(data[: max(end, 0)])
        except ProbeError:
            continue
        raise AssertionError("an answer of %d bytes was accepted when %d of them had come" % (used, end))


def _payload(data):
    """Return what is in the DATA frames of the first stream, by nothing of grpc.py."""
    found = b""
    while data:
        length, kind, flags = int.from_bytes(data[:3], "big"), data[3], data[4]
        stream, payload = int.from_bytes(data[5:9], "big") % (1 << 31), data[9 : 9 + length]
        if kind == 0 and stream == 1:
            assert not flags & 8 or payload[0] < length, "more padding than there is"
            found += payload[1 : length - payload[0]] if flags & 8 else payload
        data = data[9 + length :]
    return found


def _asked(data):
    connection = _Connection(data)
    messages = list(connection.call("a/B", b"", 60.0))
    used = connection.peer.stream.tell() - len(connection.buffer)
    connection.is_usable()
    return messages, used


class _Host:
    def remaining(self):
        return 60.0


class _Daemon:
    """Answers call after call with what the fuzzer wrote: calls end in a line of ====, messages in one of ----."""

    def __init__(self, data):
        self.calls = data.split(b"\n====\n")

    def connection(self, address, timeout):
        return self

    def call(self, method, request, timeout, metadata=()):
        yield from self.calls.pop(0).split(b"\n----\n") if self.calls else ()


@target(max_length=8192)
def containerd_kinds(data):
    """Raises ProbeError only. What a kind takes out of any answers is accepted by the controller's check of facts."""
    rules = [
        {"namespace": "default", "name": "vm-(?P<vm_id>.*)", "address": "/run"},
        {"namespace": "default", "label": "vm", "address": "/run"},
    ]
    before = containerd._connection
    try:
        for kind in (container, snapshot):
            containerd._connection = _Daemon(data).connection
            try:
                found = kind.collect(rules, _Host())
            except ProbeError:
                continue
            table = json.loads(json.dumps(r.columns(found["resources"])))
            # A daemon can name one container twice; that the controller refuses.
            if len(set(table["name"])) == len(table["name"]):
                facts._check_columns(kind.KIND, table)
            for one in found["resources"]:
                assert one["vm_id"] in one["name"] or one["vm_id"].encode() in data, one
        containerd._connection = _Daemon(data).connection
        options = {"namespaces": ["default"], "name": None, "label": "vm", "address": "/run"}
        try:
            alive = tasks.alive(options, _Host())
        except ProbeError:
            return
        assert facts._are_vm_ids(list(alive)) and facts._are_names(list(alive.values())), alive
    finally:
        containerd._connection = before


@target(is_json=True)
def container_spec(data):
    """Never raises. A spec that mounts something of a snapshot is found to, also when it is not understood."""
    text = data.decode("utf-8", "surrogateescape")
    asked = [{"type": "bind", "source": "/dev/mapper/pool-snap-1", "options": []}]
    for spec in (None, {"value": text}):
        found = snapshot._has({"spec": spec}, {"/snapshots/7"}, asked)
        assert found in (True, False)
    try:
        spec = json.loads(text)
        spec["root"] = {"path": "/snapshots/7/fs"}
    except (ValueError, TypeError, RecursionError):
        return
    assert snapshot._has({"spec": {"value": json.dumps(spec)}}, {"/snapshots/7"}, asked)


@target(max_length=256)
def lease_time(data):
    """Never raises. A lease is over only where its time was a time more than a minute ago."""
    text = data.decode("utf-8", "surrogateescape")
    if not containerd.has_expired(text, 1_800_000_000.0):
        return
    assert len(text) >= len("2026-01-01T00:00:00Z") and text.isascii()
    year = int(text[:4])
    assert year <= 2027
    assert not containerd.has_expired("9999" + text[4:], 1_800_000_000.0) and containerd.has_expired(text, 1e12)


@target()
def firecracker_answer(data):
    """Never raises. The VM of the socket is alive whatever is answered; another id is one, and stands in the answer.

    An answer of which the end is missing makes no sense, and so names no other VM.
    """
    one = firecracker.Socket("v1", "/", [], "/x")
    found = firecracker._instance(_Socket(data), FAR)
    said = dict(firecracker._said(one, found))
    assert "v1" in said and facts._are_vm_ids(list(said)) and facts._are_names(list(said.values())), said
    if found is None:
        assert list(said) == ["v1"]
        return
    assert len(found[1]) <= 40
    ends = [place for place, octet in enumerate(data) if octet == ord("}")]
    assert firecracker._instance(_Socket(data[: ends[0]]), FAR) is None
    for end in ends[1:20]:
        assert firecracker._instance(_Socket(data[:end]), FAR) in (None, found)
