# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What dmsetup and thin_dump print, and our own note of metadata snapshots."""

from __future__ import annotations

import json
import re
import struct

from ansible_collections.microvm.reaper.plugins.module_utils import bolt, devmapper, dm, thin_pool
from ansible_collections.microvm.reaper.plugins.module_utils.kinds import thin_id
from ansible_collections.microvm.reaper.plugins.module_utils.probe import ProbeError

from ..target import scratch, target, text_of


@target()
def dm_info(data):
    """Never raises. Each device is a whole line of the text, by other means than the parser's."""
    text = text_of(data)
    lines = set(text.split("\n"))
    for number, device in dm.parse_info(text).items():
        assert number == device.number and re.fullmatch("[0-9]+:[0-9]+", number), number
        assert "/" not in device.name and device.name
        state = "Suspended" if device.suspended else "Active"
        assert any(
            line.startswith(number.replace(":", "/") + "/")
            and line.endswith("/%s/%s" % (device.name, device.uuid))
            and "/%s/" % state in line
            for line in lines
        ), device


@target()
def dm_lines(data):
    """Never raises. A name has its line alone, and the words are the rest of that line."""
    text = text_of(data)
    lines = text.split("\n")
    for kind in ("thin", "thin-pool"):
        for name, line in dm.parse_lines(text, kind).items():
            (mine,) = [one for one in lines if one.rpartition(": ")[0] == name]
            start, _blank, rest = mine[len(name) + 2 :].partition(" ")
            assert start == "0" and line.sectors >= 0
            assert rest.split()[1:] == [kind, *line.words] and int(rest.split()[0]) == line.sectors


@target()
def thin_mapped(data):
    """Never raises. Each volume with a line of its own is among the thin ids that are in use."""

    class Host:
        def run(self, *_arguments, **_options):
            return 0, text_of(data), ""

    found = thin_id.mapped(Host())
    assert all(re.fullmatch("[0-9]+:[0-9]+", number) and one >= 0 for number, one in found)
    for line in dm.parse_lines(text_of(data), "thin").values():
        words = " ".join(line.words[:2])
        # The kernel has no more digits, and writes one blank between words.
        if re.fullmatch("[0-9]{1,10}:[0-9]{1,10} [0-9]{1,10}", words) and _has_blanks_only(text_of(data)):
            assert (line.words[0], int(line.words[1])) in found, line


def _has_blanks_only(text):
    return all(c in " \n" for c in text if c.isspace()) and "  " not in text


@target()
def thin_health(data):
    """Never raises. A pool without trouble is writable, needs no check, and nobody else holds its metadata snapshot."""
    text, _newline, ours = text_of(data).partition("\n")
    words = text.split()
    for mine in (None, ours, thin_pool.PENDING):
        found = thin_pool.parse_health(1 << 20, words, mine)
        assert found.used_bytes is None or found.used_bytes >= 0
        if found.trouble is None:
            assert words[4] in ("rw", "out_of_data_space") and "needs_check" not in words
            assert words[3] in ("-", mine) or mine == thin_pool.PENDING
            assert found.held == (None if words[3] == "-" else words[3])
            assert re.fullmatch("[0-9]+/[0-9]+", words[2])
        else:
            assert found.trouble


@target()
def thin_dump(data):
    """Raises ProbeError only. All numbers stand in the text; a beginning of a whole dump is refused."""
    text = text_of(data)
    try:
        found = thin_pool.parse_dump(text)
    except ProbeError:
        return
    assert text.count("<device ") == len(found)
    for number, record in found.items():
        transaction, created, snapped, mapped = record["device"]
        words = (number, mapped, transaction, created, snapped)
        names = ("dev_id", "mapped_blocks", "transaction", "creation_time", "snap_time")
        # Leading zeros are digits too.
        pattern = "<device " + " ".join('%s="0*%d"' % pair for pair in zip(names, words, strict=True))
        assert len(re.findall(pattern, text, re.ASCII)) == 1, (number, record)
    whole = text.rstrip()
    for end in {len(whole) - 1, len(whole) // 2, len(whole) // 3, len(whole) - len("</superblock>")}:
        try:
            thin_pool.parse_dump(whole[:end])
        except ProbeError:
            continue
        raise AssertionError("a dump that is cut off at %d of %d was accepted" % (end, len(whole)))


@target()
def thin_notes(data):
    """Never raises, whatever lies in the place of our note; what it says is a mapping of texts."""

    class Host:
        state_dir = str(scratch())

    (scratch() / thin_pool.NOTES).write_bytes(data)
    assert all(isinstance(key, str) for key in thin_pool._notes(Host))


@target()
def dm_reason(data):
    """Never raises. What dmsetup complained of becomes one short line that can be printed."""
    said = dm.reason(text_of(data))
    assert (said.isprintable() or not said) and len(said) <= 300


@target(max_length=12288)
def bolt_database(data):
    """Raises ProbeError only. What is in a database is in its bytes, and is not more than they are.

    The bytes are its pages; our meta page leads to them, for by chance none would have its checksum.
    """
    for content in (data, _with_meta(data)):
        try:
            found = bolt.parse(content, "/x.db")
        except ProbeError as err:
            assert str(err)
            continue
        assert sum(len(key) + len(value) for key, value in _all_of(found)) <= len(content)
        assert all(key in content and value in content for key, value in _all_of(found))
        try:
            devmapper.thin_ids(found, "/x.db")
        except ProbeError:
            continue


def _with_meta(data):
    meta = struct.pack("<IIIIQQQQQ", bolt.MAGIC, bolt.VERSION, 4096, 0, 1, 0, 0, 9, 5)
    head = struct.pack("<QHHI", 0, bolt.META, 0, 0) + meta + struct.pack("<Q", bolt._fnv(meta))
    return head.ljust(4096, b"\0") + data


def _all_of(found):
    for key, value in found.items():
        if isinstance(value, dict):
            yield from _all_of(value)
        else:
            yield key, value


@target(is_json=True)
def snapshotter_records(data):
    """Raises ProbeError only. Each device has an id that stands in its record; an id that is not free is named."""
    states = dict.fromkeys(data[1:40].split(b","), data[:1])
    database = {b"devices": {b"pool-snap-1": data}, b"device_ids": {b"4": b"\x01", b"5": b"\x00", b"6": b"\x02"}}
    for one in (database, dict(database, device_ids=states), {b"devices": {}, b"device_ids": states}):
        try:
            found, names = devmapper.thin_ids(one, "/x.db")
        except ProbeError as err:
            assert str(err)
            continue
        assert all(isinstance(number, int) for number in found) and names == set(one[b"devices"])
        if one is database:
            assert {4, 6} <= set(found) <= {4, 6, int(json.loads(data)["device_id"])}
    devmapper._SETTING.findall(text_of(data))
