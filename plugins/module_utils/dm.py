# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""device-mapper: what dmsetup tells of all its devices, the kernel and sysfs of one, and who has one of them open.

A name is the kernel's, the one seen in /dev/mapper: dmsetup hands a blank to the kernel as ``\\x20`` and translates it
back when it prints. ``--manglename none`` keeps it from translating, so no byte of a name is taken for a separator.
What is about one device is asked of the kernel itself: for each volume that goes, nine processes would cost more than
all the rest.
"""

from __future__ import annotations

import collections
import errno
import os
import re
import stat

from . import dm_control, mounts, processes
from . import resource as r
from .probe import Absent, ProbeError, Worker, read_text

SYS = "/sys"
UDEV_CONTROL = "/run/udev/control"
NO_SUCH_DEVICE = "No such device or address"
SECTOR = 512
MAX_HOLDERS = 20
OPENERS_SECONDS = 2.0

# ``number`` is "major:minor", ``sectors`` and ``words`` are the length and the parameters of a table's only line.
Device = collections.namedtuple("Device", "number name uuid open suspended segments")
Line = collections.namedtuple("Line", "sectors words")

# A name cannot hold a slash, so it is the separator; the uuid, which can, comes last.
_INFO_FORMAT = ("--noheadings", "--separator", "/", "-o", "major,minor,open,suspended,segments,name,uuid")
_INFO = re.compile(r"(\d+)/(\d+)/(\d+)/(Active|Suspended)/(\d+)/([^/]+)/(.*)")


def devices(host):
    """Return ``{number: Device}`` of all devices."""
    require()
    return parse_info(listing(host, "info", "-c", *_INFO_FORMAT))


def tables(host, target):
    """Return ``{name: Line}`` of all devices whose table is one line with that target."""
    return parse_lines(listing(host, "table", "--target", target), target)


def statuses(host, target):
    """Return ``{name: Line}`` as tables() does, of what the targets report. Does not make a pool commit or wait."""
    return parse_lines(listing(host, "status", "--noflush", "--target", target), target)


def device(number):
    """Return the Device with this number, None when there is none."""
    return _device(dm_control.DEV_STATUS, number=number)


def named(name):
    """Return the Device with this name, None when there is none."""
    return _device(dm_control.DEV_STATUS, name=name)


def table(number, target):
    """Return the Line that is the whole table of a device, None when it is another target or there is no device."""
    return _line(number, target, dm_control.STATUS_TABLE)


def status(number, target):
    """Return the Line as table() does, of what the target reports. Does not make a pool commit or wait."""
    return _line(number, target, dm_control.NOFLUSH)


def set_uuid(name, uuid):
    """Give a device the uuid that it has for good then. Raises OSError, EINVAL when it has one."""
    data = uuid.encode("ascii") + b"\0"
    flags = dm_control.TO_UUID
    dm_control.ask(dm_control.DEV_RENAME, name=name, flags=flags, event=dm_control.PRIMARY_SOURCE, data=data)


def remove(uuid):
    """Deactivate the device with a uuid. Raises OSError, EBUSY when it is open, ENXIO when there is none."""
    dm_control.ask(dm_control.DEV_REMOVE, uuid=uuid, event=dm_control.PRIMARY_SOURCE)


def message(name, text):
    """Send a message to the first target of a device. Raises OSError when it refuses."""
    data = dm_control.SECTOR.pack(0) + text.encode("ascii") + b"\0"
    dm_control.ask(dm_control.TARGET_MSG, name=name, data=data)


def _asked(command, **request):
    """Return the kernel's answer, None when there is no such device."""
    try:
        return dm_control.ask(command, **request)
    except OSError as err:
        if err.errno == errno.ENXIO:
            return None
        raise


def _device(command, **request):
    found = _asked(command, **request)
    if found is None:
        return None
    is_suspended = bool(found.flags & dm_control.SUSPENDED)
    return Device(found.number, found.name, found.uuid, found.open, is_suspended, found.targets)


def _line(number, target, flags):
    found = _asked(dm_control.TABLE_STATUS, number=number, flags=flags)
    lines = dm_control.targets(found) if found else []
    if len(lines) != 1 or lines[0].start or lines[0].kind != target:
        return None
    return Line(lines[0].length, lines[0].text.split())


def require():
    """Raise Absent where the kernel has no device-mapper: asking dmsetup would load it."""
    if not os.path.exists(os.path.join(SYS, "class/misc/device-mapper")):
        raise Absent("the kernel has no device-mapper, or has not loaded it")


def parse_info(text):
    """Parse what ``info -c`` prints with our fields. A line that is a part of a name, after a newline, is no match."""
    found = {}
    for line in text.split("\n"):
        matched = _INFO.fullmatch(line)
        if matched:
            major, minor, opened, state, segments, name, uuid = matched.groups()
            number = "%s:%s" % (major, minor)
            found[number] = Device(number, name, uuid, int(opened), state == "Suspended", int(segments))
    return found


def parse_lines(text, target):
    """Parse ``name: start length target words...``. A name that comes twice has no table of one line: left out."""
    pattern = re.compile(r"(.*): 0 (\d+) %s(?: (.*))?" % re.escape(target), re.DOTALL)
    found, seen = {}, collections.Counter()
    for line in text.split("\n"):
        name = line.rpartition(": ")[0]
        seen[name] += 1
        matched = pattern.fullmatch(line)
        if matched:
            found[name] = Line(int(matched.group(2)), (matched.group(3) or "").split())
    return {name: line for name, line in found.items() if seen[name] == 1}


def listing(host, *arguments):
    """Return the output of a dmsetup command that lists many devices; one that vanishes meanwhile is no failure."""
    for _attempt in range(3):
        rc, out, err = dmsetup(host, *arguments)
        if rc == 0:
            return out
        if NO_SUCH_DEVICE not in err:
            break
    raise ProbeError("dmsetup %s: %s" % (arguments[0], reason(err) or "exit code %d" % rc))


def dmsetup(host, command, *arguments):
    """Run dmsetup; return ``(rc, stdout, stderr)``."""
    # Where no udevd runs, dmsetup would wait for it, and leave the nodes in /dev/mapper to it.
    environment = {} if os.path.exists(UDEV_CONTROL) else {"DM_DISABLE_UDEV": "1"}
    return host.run("dmsetup", command, "--manglename", "none", "--noudevsync", *arguments, environment=environment)


def reason(err):
    """Return what dmsetup complained of, as one short line that can be printed."""
    lines = [line.strip() for line in err.split("\n") if line.strip() and line.strip() != "Command failed."]
    return processes.printable("; ".join(lines))[:300]


def attribute(number, name):
    """Return a file of a device in sysfs without its final newline, None when there is no such device or file."""
    descriptor = None
    try:
        # No buffering: this is read for each volume of a host.
        descriptor = os.open("%s/dev/block/%s/%s" % (SYS, number, name), os.O_RDONLY | os.O_CLOEXEC)
        text = os.read(descriptor, 1 << 16).decode("utf-8", "replace")
    except OSError as err:
        if err.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
            return None
        raise
    finally:
        if descriptor is not None:
            os.close(descriptor)
    return text[:-1] if text.endswith("\n") else text


def incarnation(number):
    """Return a word that no other device of this boot has or will have, None when there is no such device.

    Before Linux 5.15 a device has no sequence number; the inode of its directory in sysfs does not come again either.
    """
    sequence = attribute(number, "diskseq")
    if sequence is not None:
        return "seq%s" % sequence
    try:
        return "ino%d" % os.stat(os.path.join(SYS, "dev/block", number)).st_ino
    except FileNotFoundError:
        return None


def built_on(number):
    """Return the numbers of the block devices that a device is built on."""
    found = [attribute(number, "slaves/%s/dev" % name) for name in _listed(number, "slaves")]
    return [one for one in found if one is not None]


def devices_on(number):
    """Return HOLDERs for the block devices that are built on a device."""
    found = []
    for name in _listed(number, "holders")[:MAX_HOLDERS]:
        try:
            called = read_text(os.path.join(SYS, "block", name, "dm/name")).rstrip("\n")
        except OSError:
            called = name
        found.append(r.holder("device", processes.printable(called)))
    return found


def _listed(number, directory):
    try:
        return sorted(os.listdir(os.path.join(SYS, "dev/block", number, directory)))
    except FileNotFoundError:
        return []


def node(number):
    """Return the path of a block device's node, None when there is none."""
    event = attribute(number, "uevent") or ""
    name = next((line[len("DEVNAME=") :] for line in event.split("\n") if line.startswith("DEVNAME=")), None)
    path = os.path.join("/dev", name) if name else None
    return path if path and number_of(path) == number else None


def number_of(path):
    """Return the number of the block device whose node a path is, None when it is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return as_number(status.st_rdev) if stat.S_ISBLK(status.st_mode) else None


def as_number(device):
    """Return a device number, as stat() has it, as "major:minor"."""
    return "%d:%d" % (os.major(device), os.minor(device))


def openers(number):
    """Return HOLDERs for who has a device open: devices on it, mounts, swap, processes. Looks for two seconds only."""
    worker = Worker(_openers)
    try:
        return devices_on(number) + worker.call(number, OPENERS_SECONDS)
    except ProbeError:
        return devices_on(number)  # a file on a dead server, open in any process, can hang who asks what it is
    finally:
        worker.close()


def _openers(number):
    swaps = [line.split(" ")[0] for line in read_text("/proc/swaps").split("\n")[1:]]
    found = [r.holder("swap", processes.printable(path)) for path in swaps if number_of(path) == number]
    points = set()
    for pid in processes.pids():
        try:
            points.update(mount.point for mount in mounts.read(pid) if mount.device == number)
            if _has_open(pid, number):
                found.append(processes.holder(pid))
        except OSError:
            continue  # ended while we looked
    found += [r.holder("mount", processes.printable(point)) for point in sorted(points)]
    return [one for one in found if one is not None][:MAX_HOLDERS]


def _has_open(pid, number):
    for name in os.listdir("/proc/%d/fd" % pid):
        path = "/proc/%d/fd/%s" % (pid, name)
        try:
            is_file = os.readlink(path).startswith("/")  # not a socket, not a pipe
        except OSError:
            continue  # closed while we looked
        if is_file and number_of(path) == number:
            return True
    return False
