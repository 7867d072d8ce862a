# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The vectors of RFC 7541, appendix C, as far as they need no dynamic table."""

from __future__ import annotations

import contextlib

import pytest
from ansible_collections.microvm.reaper.plugins.module_utils import hpack
from hypothesis import given
from hypothesis import strategies as st

REQUEST = [(":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", "www.example.com")]
RESPONSE = [
    (":status", "302"),
    ("cache-control", "private"),
    ("date", "Mon, 21 Oct 2013 20:13:21 GMT"),
    ("location", "https://www.example.com"),
]
# All bytes from 0 to 255, as python-hpack 4.1 encodes them.
ALL_BYTES = (
    "ffc7fffd8fffffe2fffffe3fffffe4fffffe5fffffe6fffffe7fffffe8ffffeafffffff3fffffa7fffffabffffffdfffffebfffffecfffffed"
    "fffffeefffffefffffff0ffffff1ffffff2fffffffbfffffcffffffd3fffffd7fffffdbfffffdffffffe3fffffe7fffffebfffffed4fe3f9ff"
    "affcabf1febfafefe7fdfd2cbb00089969b71d79fb9f7fff20ffbff3ff50ddbd7f061c58f265cd9f469d5af66dddbf871e5f9cff7ff7fffc3f"
    "f9ffe45fff4719242cb34e6e9d68a6a3d7dac426defe3cfaf7fffbfe7ffbffdffffffcfffe6ffff4bfff9ffffa3fffd3ffff53fffd5ffffb3f"
    "ffeb7fffdaffffb7ffff73fffeeffffdeffffebffffbfffffd9ffffdbfffebffffe0ffffeeffffc3ffff8bffff1ffffe4fffee7fffb1ffff97"
    "fffd9ffffcdffff9fffffbffffdafffeeffff4ffffb7fffee7fffe8ffffd3fffdeffffd5fffeeffffbdffffe1fffdfffff7fffff5ffffecfff"
    "f07fff87fffe0ffff17fffedffff87ffff77fffeffffeaffff8bfffe3ffff93ffff87fffcbffff37ffff1fffff83ffffe1fffebfffe3ffff3f"
    "ffff2ffffa3ffffd9fffff17ffffc7fffff27ffffdefffffbffffff2fffff8fffffb7fff97fff8fffffe6fffffc1fffff87ffffe7fffffc5ff"
    "ffe5fffe4ffff2fffffd1fffff4ffffffefffffe3fffffc9fffff97fffb3ffffcffffb7fffcdffff4ffff9ffffd1ffffcffffeaffffafffffd"
    "dffffeffffff4fffff5fffffabffffa7ffffd7fffff9bffffecfffffb7fffff3fffffe8fffffd3fffffabfffff5fffffff7ffffecfffffdbff"
    "fffbbfffff7ffffff0fffffbbf"
)


@pytest.mark.parametrize(
    ("value", "prefix", "coded"),
    [(10, 5, "0a"), (1337, 5, "1f9a0a"), (42, 8, "2a")],
    ids=["C.1.1", "C.1.2", "C.1.3"],
)
def test_integers(value, prefix, coded):
    assert hpack.encode_integer(value, prefix).hex() == coded
    assert hpack.decode_integer(bytes.fromhex(coded), 0, prefix) == (value, len(coded) // 2)


@pytest.mark.parametrize(
    ("block", "headers"),
    [
        ("400a637573746f6d2d6b65790d637573746f6d2d686561646572", [("custom-key", "custom-header")]),
        ("040c2f73616d706c652f70617468", [(":path", "/sample/path")]),
        ("100870617373776f726406736563726574", [("password", "secret")]),
        ("82", [(":method", "GET")]),
        ("828684410f7777772e6578616d706c652e636f6d", REQUEST),
        ("828684418cf1e3c2e5f23a6ba0ab90f4ff", REQUEST),
        (
            "4803333032580770726976617465611d4d6f6e2c203231204f637420323031332032303a31333a323120474d546e17687474"
            "70733a2f2f7777772e6578616d706c652e636f6d",
            RESPONSE,
        ),
        (
            "488264025885aec3771a4b6196d07abe941054d444a8200595040b8166e082a62d1bff6e919d29ad171863c78f0b97c8e9ae"
            "82ae43d3",
            RESPONSE,
        ),
    ],
    ids=["C.2.1", "C.2.2", "C.2.3", "C.2.4", "C.3.1", "C.4.1", "C.5.1", "C.6.1"],
)
def test_header_blocks(block, headers):
    assert hpack.decode(bytes.fromhex(block)) == headers


def test_every_huffman_code():
    assert hpack.huffman_decode(bytes.fromhex(ALL_BYTES)) == bytes(range(256))


def test_the_static_table_has_the_size_and_ends_of_the_rfc():
    assert len(hpack.STATIC) == 61
    assert hpack.STATIC[0] == (":authority", "")
    assert hpack.STATIC[15] == ("accept-encoding", "gzip, deflate")
    assert hpack.STATIC[60] == ("www-authenticate", "")


@pytest.mark.parametrize(
    "block",
    [
        pytest.param("80", id="index 0"),
        pytest.param("be", id="first entry of the dynamic table (C.3.2)"),
        pytest.param("3fe11f", id="table of 4096 bytes"),
        pytest.param("1fffffffffff7f", id="integer without end"),
        pytest.param("00ff", id="length cut off"),
        pytest.param("000a6162", id="string cut off"),
        pytest.param("0001", id="no value"),
        pytest.param("0084ffffffff00", id="end-of-string code"),
        pytest.param("008200000000", id="value missing after a Huffman name"),
        pytest.param("000081ff", id="padding of eight bits"),
        pytest.param("00811800", id="padding of zeros"),
    ],
)
def test_malformed_blocks_are_errors(block):
    with pytest.raises(hpack.HpackError):
        hpack.decode(bytes.fromhex(block))


def test_an_empty_table_is_allowed():
    assert hpack.decode(bytes.fromhex("2082")) == [(":method", "GET")]


@given(st.lists(st.tuples(*[st.text(st.characters(max_codepoint=255), max_size=300)] * 2), max_size=8))
def test_what_is_encoded_decodes(headers):
    assert hpack.decode(hpack.encode(headers)) == headers


@given(st.binary(max_size=400))
def test_any_bytes_decode_or_are_an_error(block):
    with contextlib.suppress(hpack.HpackError):
        hpack.decode(block)
