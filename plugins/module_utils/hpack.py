# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""HPACK, the header coding of HTTP/2 (RFC 7541), without its dynamic table.

We announce a table of size zero, so the peer has to send every header in full or by its number in the static table.
Each header block can then be read on its own, or skipped. Pure.
"""

from __future__ import annotations


class HpackError(ValueError):
    """The bytes are no header block."""


# Appendix A, in order; "name" or "name value".
_APPENDIX_A = """
:authority|:method GET|:method POST|:path /|:path /index.html|:scheme http|:scheme https|:status 200|:status 204|
:status 206|:status 304|:status 400|:status 404|:status 500|accept-charset|accept-encoding gzip, deflate|
accept-language|accept-ranges|accept|access-control-allow-origin|age|allow|authorization|cache-control|
content-disposition|content-encoding|content-language|content-length|content-location|content-range|content-type|
cookie|date|etag|expect|expires|from|host|if-match|if-modified-since|if-none-match|if-range|if-unmodified-since|
last-modified|link|location|max-forwards|proxy-authenticate|proxy-authorization|range|referer|refresh|retry-after|
server|set-cookie|strict-transport-security|transfer-encoding|user-agent|vary|via|www-authenticate
"""
STATIC = tuple(tuple(entry.partition(" ")[::2]) for entry in _APPENDIX_A.replace("\n", "").split("|"))

# Appendix B: the length in bits of the code of each byte; the last is the end of the string. The code is canonical, so
# that the lengths are all there is to know.
# fmt: off
LENGTHS = (
    13, 23, 28, 28, 28, 28, 28, 28, 28, 24, 30, 28, 28, 30, 28, 28, 28, 28, 28, 28, 28, 28, 30, 28, 28, 28, 28, 28,
    28, 28, 28, 28, 6, 10, 10, 12, 13, 6, 8, 11, 10, 10, 8, 11, 8, 6, 6, 6, 5, 5, 5, 6, 6, 6, 6, 6, 6, 6, 7, 8, 15, 6,
    12, 10, 13, 6, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 8, 7, 8, 13, 19, 13, 14, 6, 15,
    5, 6, 5, 6, 5, 6, 6, 6, 5, 7, 7, 6, 6, 6, 5, 6, 7, 6, 5, 5, 6, 7, 7, 7, 7, 7, 15, 11, 14, 13, 28, 20, 22, 20, 20,
    22, 22, 22, 23, 22, 23, 23, 23, 23, 23, 24, 23, 24, 24, 22, 23, 24, 23, 23, 23, 23, 21, 22, 23, 22, 23, 23, 24,
    22, 21, 20, 22, 22, 23, 23, 21, 23, 22, 22, 24, 21, 22, 23, 23, 21, 21, 22, 21, 23, 22, 23, 23, 20, 22, 22, 22,
    23, 22, 22, 23, 26, 26, 20, 19, 22, 23, 22, 25, 26, 26, 26, 27, 27, 26, 24, 25, 19, 21, 26, 27, 27, 26, 27, 24,
    21, 21, 26, 26, 28, 27, 27, 27, 20, 24, 20, 21, 22, 21, 21, 23, 22, 22, 25, 25, 24, 24, 26, 23, 26, 27, 26, 26,
    27, 27, 27, 27, 27, 28, 27, 27, 27, 27, 27, 26, 30,
)
# fmt: on
END_OF_STRING = 256


def _symbols():
    """Return ``{(length, code): symbol}``: within a length codes count up with the symbols."""
    found, code, previous = {}, 0, 0
    for length, symbol in sorted((length, symbol) for symbol, length in enumerate(LENGTHS)):
        code <<= length - previous
        found[length, code] = symbol
        code, previous = code + 1, length
    return found


SYMBOLS = _symbols()


def encode(headers):
    """Return the block of ``[(name, value)]``: every header a literal that is not to be indexed."""
    block = bytearray()
    for name, value in headers:
        block.append(0)
        for text in (name, value):
            data = text.encode("latin-1")
            block += encode_integer(len(data), 7) + data
    return bytes(block)


def decode(block):
    """Return ``[(name, value)]`` of one complete header block, as text of one character per byte."""
    headers, position = [], 0
    while position < len(block):
        first = block[position]
        if first & 0x80:
            index, position = decode_integer(block, position, 7)
            headers.append(_entry(index))
        elif first & 0xE0 == 0x20:
            size, position = decode_integer(block, position, 5)
            if size:
                raise HpackError("the peer enlarges its header table, which we announced as empty")
        else:
            # With indexing (01), without (0000) or never (0001): the same, to who has no table.
            index, position = decode_integer(block, position, 6 if first & 0x40 else 4)
            name, position = (_entry(index)[0], position) if index else _string(block, position)
            value, position = _string(block, position)
            headers.append((name, value))
    return headers


def encode_integer(value, prefix):
    """Return ``value`` with the given number of prefix bits, the bits before it zero."""
    limit = (1 << prefix) - 1
    if value < limit:
        return bytes([value])
    data, value = bytearray([limit]), value - limit
    while value >= 0x80:
        data.append(value & 0x7F | 0x80)
        value >>= 7
    data.append(value)
    return bytes(data)


def decode_integer(block, position, prefix):
    """Return the integer at ``position`` and the position after it."""
    limit = (1 << prefix) - 1
    if position >= len(block):
        raise HpackError("a header block ends early")
    value = block[position] & limit
    position += 1
    if value < limit:
        return value, position
    for shift in range(0, 28, 7):
        if position >= len(block):
            raise HpackError("a header block ends in an integer")
        octet = block[position]
        position += 1
        value += (octet & 0x7F) << shift
        if octet < 0x80:
            return value, position
    raise HpackError("an integer in a header block is too large")


def huffman_decode(data):
    """Return the bytes behind a Huffman-coded string."""
    found, code, length = bytearray(), 0, 0
    for octet in data:
        for bit in range(7, -1, -1):
            code, length = code << 1 | octet >> bit & 1, length + 1
            symbol = SYMBOLS.get((length, code))
            if symbol is None:
                if length > 30:
                    raise HpackError("no such Huffman code")
                continue
            if symbol == END_OF_STRING:
                raise HpackError("an end-of-string code inside a string")
            found.append(symbol)
            code, length = 0, 0
    if length > 7 or code != (1 << length) - 1:
        raise HpackError("a Huffman-coded string is not padded as it should be")
    return bytes(found)


def _string(block, position):
    if position >= len(block):
        raise HpackError("a header block ends early")
    coded = block[position] & 0x80
    length, position = decode_integer(block, position, 7)
    data = bytes(block[position : position + length])
    if len(data) < length:
        raise HpackError("a header block ends in a string")
    return (huffman_decode(data) if coded else data).decode("latin-1"), position + length


def _entry(index):
    if not 0 < index <= len(STATIC):
        raise HpackError("header %d of a table that is empty" % index)
    return STATIC[index - 1]
