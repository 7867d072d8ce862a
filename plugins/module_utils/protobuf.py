# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The protobuf wire format, for the few messages we need, described by tables. Pure.

A table is ``{field number: (name, type)}``, where a type is TEXT, INT, LABELS (a map of text to text), another table (a
message) or a list of one type (repeated). Fields that a table does not name are skipped unread, so a message nests no
deeper than its table and costs no more than its bytes.
"""

from __future__ import annotations

TEXT, INT, LABELS = "text", "int", "labels"
ENTRY = {1: ("key", TEXT), 2: ("value", TEXT)}

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
MAX_FIELD = (1 << 29) - 1
MAX_REPEATED = 1 << 17  # an empty entry takes two bytes on the wire and hundreds here


class ProtobufError(ValueError):
    """The bytes are not a message of that table."""


def encode(table, values):
    """Return the message with the given values; a field that is None, empty or zero is left out, as proto3 does."""
    message = bytearray()
    for number, (name, kind) in sorted(table.items()):
        value = values.get(name)
        for one in value if isinstance(kind, list) and value else [value]:
            if one:
                message += _encode_field(number, kind[0] if isinstance(kind, list) else kind, one)
    return bytes(message)


def decode(table, message):
    """Return ``{name: value}`` of all fields of the table; fields that are not there have their empty value.

    An absent message is None. Text that is not UTF-8 keeps its bytes as surrogates.
    """
    values = {name: _empty(kind) for name, kind in table.values()}
    position = 0
    while position < len(message):
        tag, position = decode_varint(message, position)
        number, wire = tag >> 3, tag & 7
        raw, position = _read_raw(message, position, wire)
        if not 0 < number <= MAX_FIELD:
            raise ProtobufError("field number %d" % number)
        if number in table:
            _store(values, table[number], raw, wire)
    return values


def encode_varint(value):
    """Return a varint; a negative one has the ten octets of its 64-bit complement."""
    value &= (1 << 64) - 1
    data = bytearray()
    while value >= 0x80:
        data.append(value & 0x7F | 0x80)
        value >>= 7
    data.append(value)
    return bytes(data)


def decode_varint(message, position):
    """Return the unsigned integer at ``position`` and the position after it."""
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(message):
            raise ProtobufError("the message ends in an integer")
        octet = message[position]
        position += 1
        value |= (octet & 0x7F) << shift
        if octet < 0x80:
            return value & (1 << 64) - 1, position
    raise ProtobufError("an integer of more than ten octets")


def _encode_field(number, kind, value):
    if kind == INT:
        return encode_varint(number << 3 | VARINT) + encode_varint(int(value))
    if kind == LABELS:
        entries = [encode(ENTRY, {"key": key, "value": text}) for key, text in sorted(value.items())]
    else:
        entries = [value.encode("utf-8", "surrogateescape") if kind == TEXT else encode(kind, value)]
    return b"".join(encode_varint(number << 3 | BYTES) + encode_varint(len(entry)) + entry for entry in entries)


def _read_raw(message, position, wire):
    """Return an integer or the bytes of one field, and the position after it."""
    if wire == VARINT:
        return decode_varint(message, position)
    if wire == BYTES:
        length, position = decode_varint(message, position)
    elif wire in (FIXED64, FIXED32):
        length = 8 if wire == FIXED64 else 4
    else:
        raise ProtobufError("wire type %d" % wire)
    if length > len(message) - position:
        raise ProtobufError("a field is longer than its message")
    return message[position : position + length], position + length


def _store(values, field, raw, wire):
    name, kind = field
    repeated = isinstance(kind, list)
    kind = kind[0] if repeated else kind
    if wire != (VARINT if kind == INT else BYTES):
        raise ProtobufError("field '%s' has wire type %d" % (name, wire))
    if kind == LABELS:
        entry = decode(ENTRY, raw)
        values[name][entry["key"]] = entry["value"]
        _check_size(values[name], name)
        return
    if kind == INT:
        value = raw - (1 << 64) if raw >> 63 else raw
    elif kind == TEXT:
        value = bytes(raw).decode("utf-8", "surrogateescape")
    else:
        value = decode(kind, raw)
    if repeated:
        values[name].append(value)
        _check_size(values[name], name)
    else:
        values[name] = value


def _check_size(found, name):
    if len(found) > MAX_REPEATED:
        raise ProtobufError("field '%s' has more than %d entries" % (name, MAX_REPEATED))


def _empty(kind):
    if isinstance(kind, dict):
        return None
    return {TEXT: "", INT: 0, LABELS: {}}[kind] if isinstance(kind, str) else []
