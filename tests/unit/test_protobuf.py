# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The wire format: the examples of its documentation, round trips, and what hostile bytes come to."""

from __future__ import annotations

import contextlib

import pytest
from ansible_collections.microvm.reaper.plugins.module_utils import protobuf as p
from ansible_collections.microvm.reaper.plugins.module_utils.containerd import CALLS, CONTAINER
from hypothesis import given
from hypothesis import strategies as st

INNER = {1: ("a", p.INT), 2: ("b", p.TEXT)}
OUTER = {
    1: ("number", p.INT),
    2: ("text", p.TEXT),
    3: ("inner", INNER),
    4: ("many", [INNER]),
    5: ("texts", [p.TEXT]),
    20: ("labels", p.LABELS),
}
EMPTY = {"number": 0, "text": "", "inner": None, "many": [], "texts": [], "labels": {}}

numbers = st.integers(-(2**63), 2**63 - 1)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
inner = st.fixed_dictionaries({"a": numbers, "b": texts})
outer = st.fixed_dictionaries(
    {
        "number": numbers,
        "text": texts,
        "inner": st.none() | inner.filter(any),
        "many": st.lists(inner.filter(lambda one: any(one.values())), max_size=3),
        "texts": st.lists(texts.filter(bool), max_size=3),
        "labels": st.dictionaries(texts, texts, max_size=3),
    }
)


@pytest.mark.parametrize(
    ("table", "values", "coded"),
    [
        ({1: ("a", p.INT)}, {"a": 150}, "089601"),
        ({2: ("b", p.TEXT)}, {"b": "testing"}, "120774657374696e67"),
        ({3: ("c", {1: ("a", p.INT)})}, {"c": {"a": 150}}, "1a03089601"),
        ({1: ("a", p.INT)}, {"a": -2}, "08feffffffffffffffff01"),
        ({4: ("d", p.TEXT), 5: ("e", [p.TEXT])}, {"d": "hello", "e": ["1", "2"]}, "220568656c6c6f2a01312a0132"),
        ({7: ("map", p.LABELS)}, {"map": {"k": "v"}}, "3a060a016b120176"),
    ],
)
def test_examples(table, values, coded):
    assert p.encode(table, values).hex() == coded
    assert p.decode(table, bytes.fromhex(coded)) == values


def test_what_is_not_there_is_empty():
    assert p.decode(OUTER, b"") == EMPTY
    assert p.encode(OUTER, EMPTY) == b""


def test_unknown_fields_of_every_wire_type_are_skipped():
    unknown = bytes.fromhex("30ff013103" + "00" * 7 + "3a03ffffff3d00000000")
    assert p.decode(OUTER, unknown + bytes.fromhex("0801")) == dict(EMPTY, number=1)


def test_text_that_is_not_utf8_keeps_its_bytes():
    text = p.decode({1: ("a", p.TEXT)}, b"\x0a\x02\xff\x41")["a"]
    assert text == "\udcffA"
    assert p.encode({1: ("a", p.TEXT)}, {"a": text}) == b"\x0a\x02\xff\x41"


@pytest.mark.parametrize(
    "coded",
    [
        pytest.param("08", id="no value"),
        pytest.param("0880", id="integer cut off"),
        pytest.param("08" + "ff" * 10 + "01", id="integer of eleven octets"),
        pytest.param("120574", id="text cut off"),
        pytest.param("12ffffffffffffffffff01", id="length of 2^64"),
        pytest.param("1205", id="length without bytes"),
        pytest.param("3100", id="eight bytes cut off"),
        pytest.param("0b", id="group"),
        pytest.param("0f", id="wire type 7"),
        pytest.param("0001", id="field 0"),
        pytest.param("0a0161", id="text where a number belongs"),
        pytest.param("1001", id="number where text belongs"),
        pytest.param("1a0208", id="message longer than its field"),
        pytest.param("1a0108", id="broken message inside"),
    ],
)
def test_malformed_messages_are_errors(coded):
    with pytest.raises(p.ProtobufError):
        p.decode(OUTER, bytes.fromhex(coded))


@given(outer)
def test_round_trip(values):
    assert p.decode(OUTER, p.encode(OUTER, values)) == values


@given(st.binary(max_size=300), st.sampled_from([OUTER, CONTAINER] + [tell for _ask, tell in CALLS.values()]))
def test_any_bytes_decode_or_are_an_error(message, table):
    with contextlib.suppress(p.ProtobufError):
        p.decode(table, message)


def test_deep_nesting_costs_nothing():
    message = b""
    for _level in range(1000):
        message = b"\x1a" + p.encode_varint(len(message)) + message
    assert p.decode(OUTER, message)["inner"] == {"a": 0, "b": ""}


@pytest.mark.parametrize("entry", ["2200", "2a00"])
def test_the_number_of_entries_is_bounded(entry, monkeypatch):
    monkeypatch.setattr(p, "MAX_REPEATED", 100)
    assert p.decode(OUTER, bytes.fromhex(entry) * 100)
    with pytest.raises(p.ProtobufError, match="more than 100 entries"):
        p.decode(OUTER, bytes.fromhex(entry) * 101)


def test_the_number_of_labels_is_bounded(monkeypatch):
    monkeypatch.setattr(p, "MAX_REPEATED", 100)
    with pytest.raises(p.ProtobufError, match="more than 100 entries"):
        p.decode(OUTER, p.encode(OUTER, {"labels": {str(number): "" for number in range(101)}}))
