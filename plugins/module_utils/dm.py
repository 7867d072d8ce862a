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
import time

from . import blame, dm_control, mounts, processes
from . import resource as r
from .probe import Absent, DeadlineExceeded, ProbeError, Worker, read_text

SYS = "/sys"
UDEV_CONTROL = "/run/udev/control"
NO_SUCH_DEVICE = "No such device or address"
BUSY = os.strerror(errno.EBUSY)
SECTOR = 512
MAX_HOLDERS = 20
OPENERS_SECONDS = 2.0
LOOK_SECONDS = 0.4  # at one process
MAX_ABANDONED = 3
MAX_MAPS = 1 << 22

# The processes, as (pid, start), that could not be looked at in time: nobody tries again.
_unseen = set()

# ``number`` is "major:minor", ``sectors`` and ``words`` are the length and the parameters of a table's only line.
Device = collections.namedtuple("Device", "number name uuid open suspended segments")
Line = collections.namedtuple("Line", "sectors words")

# A name cannot hold a slash, so it is the separator; the uuid, which can, comes last.
_INFO_FORMAT = ("--noheadings", "--separator", "/", "-o", "major,minor,open,suspended,segments,name,uuid")
_INFO = re.compile(
    r"([0-9]{1,10})/([0-9]{1,10})/([0-9]{1,10})/(Active|Suspended)/([0-9]{1,10})/([^/]+)/(.*)"
)


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
    pattern = re.compile(r"(.*): 0 ([0-9]{1,20}) %s(?: (.*))?" % re.escape(target), re.DOTALL)
    found, seen = {}, collections.Counter()
    for line in text.split("\n"):
        name = line.rpartition(": ")[0]
        seen[name] += 1
        matched = pattern.fullmatch(line)
        if matched and matched.group(1) == name:
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


def devices_on(number, *, numbered=False):
    """Return HOLDERs for the block devices that are built on a device, with ``device``, their numbers, if wanted."""
    found = []
    for name in _listed(number, "holders")[:MAX_HOLDERS]:
        try:
            called = read_text(os.path.join(SYS, "block", name, "dm/name")).rstrip("\n")
        except OSError:
            called = name
        one = r.holder("device", processes.printable(called))
        found.append(dict(one, device=attribute(number, "holders/%s/dev" % name)) if numbered else one)
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
    """Return HOLDERs for who has a device open: devices on it, swap, mounts, processes. Looks for two seconds only."""
    looker = _Looker(OPENERS_SECONDS)
    try:
        found = devices_on(number, numbered=True) + (looker.ask(["kernel", number]) or [])
        found += _using(number, looker)
    finally:
        looker.close()
    return (found or looker.stuck())[:MAX_HOLDERS]


class _Looker:
    """Looks in children that can be abandoned: a file on a dead server, open in any process, hangs who asks what it is.

    The next child goes on with the next process. Who was such a process is remembered, for it would hang them all.
    """

    def __init__(self, seconds):
        self._end = time.monotonic() + seconds
        self._worker = None
        self._abandoned = 0
        self._stuck = []

    def ask(self, item, process=None):
        """Return what the child sees, None when it cannot see it, or when the time is over."""
        left = self._end - time.monotonic()
        if process in _unseen:
            self._stuck.append(process)
            return None
        if left <= 0 or self._abandoned >= MAX_ABANDONED:
            return None
        if self._worker is None or self._worker.is_gone:
            self._worker = Worker(_look)
        try:
            return self._worker.call(item, min(LOOK_SECONDS, left))
        except DeadlineExceeded:
            self._abandoned += 1
            if process is not None and left >= LOOK_SECONDS:
                _unseen.add(process)
                self._stuck.append(process)
        except ProbeError:
            pass  # ended while we looked
        return None

    def stuck(self):
        """Return HOLDERs that name the processes which cannot be looked at."""
        found = [blame.process(pid) for pid, _started in self._stuck[:MAX_HOLDERS]]
        return [dict(one, name=one["name"] + ": whether it has it open cannot be seen") for one in found if one]

    def close(self):
        if self._worker is not None:
            self._worker.close()


def _using(number, looker):
    """Return HOLDERs for the processes that have a device open, and for its mounts, in each mount namespace."""
    found, mounted, ours = [], [], _mount_namespace("self")
    namespaces = set()
    for pid in processes.pids():
        namespace = _mount_namespace(pid)
        process = processes.stat(pid)
        if process is None:
            continue  # ended while we looked
        seen = looker.ask(["process", number, pid, namespace not in namespaces], (pid, process.started))
        if seen is None:
            continue
        namespaces.add(namespace)
        mounted += [_mount(point, process, namespace if namespace != ours else None) for point in seen["points"]]
        found.append(blame.process(pid, seen["by"]) if seen["by"] else None)
    mounted.sort(key=lambda one: (one["mount_namespace"] or 0, one["name"]))
    return mounted + [one for one in found if one is not None]


def _mount(point, process, namespace):
    name = processes.printable(point)
    if namespace is not None:
        name += " (mount namespace %s, of %s)" % (namespace, processes.label(process))
    return dict(r.holder("mount", name), mount_namespace=namespace)


def _mount_namespace(pid):
    try:
        return int(os.readlink("/proc/%s/ns/mnt" % pid)[len("mnt:[") : -1])
    except (OSError, ValueError):
        return None


def _look(item):
    """The child's side."""
    what, number = item[:2]
    if what == "kernel":
        swaps = [line.split(" ")[0] for line in read_text("/proc/swaps").split("\n")[1:]]
        found = [r.holder("swap", processes.printable(path)) for path in swaps if number_of(path) == number]
        return found + _loops(number)
    pid, with_mounts = item[2:]
    points = {mount.point for mount in mounts.read(pid) if mount.device == number} if with_mounts else ()
    return {"points": sorted(points), "by": (_descriptors(pid, number) + _maps(pid, number))[: blame.MAX_BY]}


def _loops(number):
    """Return HOLDERs for the loop devices that a device is the file of: to sysfs they are not built on it."""
    found = []
    for name in sorted(os.listdir(os.path.join(SYS, "block"))):
        if name.startswith("loop"):
            try:
                file = read_text(os.path.join(SYS, "block", name, "loop/backing_file")).rstrip("\n")
            except OSError:
                continue  # is no file's
            if number_of(file) == number:
                its_number = read_text(os.path.join(SYS, "block", name, "dev")).strip()
                found.append(dict(r.holder("device", name), device=its_number))
    return found


def _descriptors(pid, number):
    found = []
    for name in os.listdir("/proc/%d/fd" % pid):
        path = "/proc/%d/fd/%s" % (pid, name)
        try:
            is_file = os.readlink(path).startswith("/")  # not a socket, not a pipe
        except OSError:
            continue  # closed while we looked
        if is_file and number_of(path) == number:
            found.append("fd %s" % name)
    return found


def _maps(pid, number):
    """Return ``["map"]`` where a process has a device in its memory, which keeps it open when it is closed."""
    files = {}
    for line in read_text("/proc/%d/maps" % pid, MAX_MAPS).split("\n"):
        fields = line.split(" ", 5)
        if len(fields) == 6 and fields[5].lstrip().startswith("/"):
            files.setdefault((fields[3], fields[4]), fields[0])
    is_mapped = any(number_of("/proc/%d/map_files/%s" % (pid, area)) == number for area in files.values())
    return ["map"] if is_mapped else []
