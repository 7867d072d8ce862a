# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""device-mapper's own interface: one request to the kernel about one device, without a process for each.

The kernel's side of it is include/uapi/linux/dm-ioctl.h. A request is a ``struct dm_ioctl`` with data behind it, sent
by ioctl() on /dev/mapper/control; the answer is written over it. Its fields have the same width and place on 32 and
64 bit. Names and uuids are bytes for the kernel: here they are text, which is sent as UTF-8, and in which what is not
UTF-8 becomes U+FFFD when it is read.

What the kernel refuses is an OSError with its errno: ENXIO no such device, EBUSY in use. All of it may hang, where the
device does, and nothing ends that: it is for a child that can be abandoned, see probe.py.
"""

from __future__ import annotations

import collections
import fcntl
import os
import stat
import struct

from .probe import ProbeError

CONTROL = "/dev/mapper/control"
# What we speak. The kernel takes any minor version up to its own; to set a uuid by a rename began with 4.19.
VERSION = (4, 19, 0)

GET_VERSION, DEV_REMOVE, DEV_RENAME, DEV_STATUS, TABLE_STATUS, TARGET_MSG = 0, 4, 5, 7, 12, 14

SUSPENDED = 1 << 1
STATUS_TABLE = 1 << 4  # the parameters of the table, not what the targets report
BUFFER_FULL = 1 << 8
NOFLUSH = 1 << 11
TO_UUID = 1 << 14  # rename: what changes is the uuid
# With it udev's rules tell what somebody asked for from spurious events; it travels in the place of the event number.
PRIMARY_SOURCE = 0x40 << 16

# version[3], data_size, data_start, target_count, open_count, flags, event_nr, padding, dev, name, uuid, data
HEADER = struct.Struct("=3I3IiIIIQ128s129s7s")
TARGET = struct.Struct("=QQiI16s")  # sector_start, length, status, next, target_type
SECTOR = struct.Struct("=Q")  # a message begins with the sector whose target it is for

FIRST_SIZE = 4096
MAX_SIZE = 16 * 1024 * 1024

# ``number`` is "major:minor"; ``targets`` how many its table has; ``data`` is what came behind the header.
Answer = collections.namedtuple("Answer", "number name uuid open targets flags data")
Target = collections.namedtuple("Target", "start length kind text")


def ask(command, *, name="", uuid="", number=None, flags=0, event=0, data=b""):
    """Send a request about the device that one of ``name``, ``uuid`` and ``number`` names; return the Answer.

    Raises OSError where the kernel refuses, ProbeError where it cannot be asked.
    """
    descriptor = _open()
    try:
        size = max(FIRST_SIZE, HEADER.size + len(data))
        while True:
            answer = _asked(descriptor, command, _request(size, name, uuid, number, flags, event, data))
            if command != TABLE_STATUS or not answer.flags & BUFFER_FULL:
                return answer
            size *= 2
            if size > MAX_SIZE:
                raise ProbeError("the kernel says more of device %s than %d bytes" % (answer.number, MAX_SIZE))
    finally:
        os.close(descriptor)


def targets(answer):
    """Return the Targets that TABLE_STATUS answered with."""
    found, place = [], 0
    for _count in range(answer.targets):
        if place + TARGET.size > len(answer.data):
            raise ProbeError("the kernel's answer about device %s is cut off" % answer.number)
        start, length, _status, following, kind = TARGET.unpack_from(answer.data, place)
        end = answer.data.find(b"\0", place + TARGET.size)
        text = answer.data[place + TARGET.size : end if end >= 0 else len(answer.data)]
        found.append(Target(start, length, _text(kind), _text(text)))
        if following <= place:  # of the last one too it is where another would be
            break
        place = following
    return found


def _open():
    """Return a descriptor of the control device, of a kernel whose version we speak."""
    try:
        descriptor = os.open(CONTROL, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as err:
        raise ProbeError("%s cannot be opened: %s" % (CONTROL, err.strerror)) from err
    try:
        _negotiate(descriptor)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _negotiate(descriptor):
    if not stat.S_ISCHR(os.fstat(descriptor).st_mode):
        raise ProbeError("%s is no device" % CONTROL)
    buffer = _request(HEADER.size, "", "", None, 0, 0, b"")
    try:
        _ioctl(descriptor, GET_VERSION, buffer)
    except OSError as err:
        spoken = ".".join(str(one) for one in HEADER.unpack_from(buffer)[:3])
        raise ProbeError(
            "%s speaks version %s, which is not 4.19 or a later 4.x: %s" % (CONTROL, spoken, err.strerror)
        ) from err


def _request(size, name, uuid, number, flags, event, data):
    device = 0 if number is None else _encoded(number)
    words = _bytes(name, 128), _bytes(uuid, 129)
    buffer = bytearray(size)
    HEADER.pack_into(buffer, 0, *VERSION, size, HEADER.size, 0, 0, flags, event, 0, device, *words, b"")
    buffer[HEADER.size : HEADER.size + len(data)] = data
    return buffer


def _asked(descriptor, command, buffer):
    _ioctl(descriptor, command, buffer)
    fields = HEADER.unpack_from(buffer)
    size, start, count, opened, flags = fields[3:8]
    device, name, uuid = fields[10:13]
    return Answer(_decoded(device), _text(name), _text(uuid), opened, count, flags, bytes(buffer[start:size]))


def _ioctl(descriptor, command, buffer):
    """Send one request and have its answer in the buffer. The number is that of _IOWR(0xfd, command, dm_ioctl)."""
    fcntl.ioctl(descriptor, 3 << 30 | HEADER.size << 16 | 0xFD << 8 | command, buffer, True)


def _bytes(text, room):
    raw = text.encode("utf-8")
    if b"\0" in raw or len(raw) >= room:
        raise ProbeError("no device can be called %.300r" % text)
    return raw


def _text(raw):
    return raw.partition(b"\0")[0].decode("utf-8", "replace")


def _encoded(number):
    """Return a device number as the kernel has it: minor[8..19], major[12], minor[0..7]."""
    major, minor = (int(part) for part in number.split(":"))
    return (minor & 0xFF) | major << 8 | (minor & ~0xFF) << 12


def _decoded(device):
    return "%d:%d" % (device >> 8 & 0xFFF, (device & 0xFF) | (device >> 12 & 0xFFF00))
