# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The mount table: what is mounted where, and where else the same directory can be seen."""

from __future__ import annotations

import collections
import os
import re

# ``root``: the directory of the file system that is the root of this mount; ``shared``: what is mounted or unmounted on
# it happens to its peers elsewhere too.
Mount = collections.namedtuple("Mount", "id parent device root point shared kind")

_ID = re.compile("[0-9]{1,20}")
_ESCAPE = re.compile(r"\\([0-7]{3})")


def read(pid="self"):
    """Return the mounts that a process sees, with the points as it sees them."""
    return parse(text(pid))


def text(pid="self"):
    """Return a process' mountinfo as text."""
    with open("/proc/%s/mountinfo" % pid, "rb") as stream:
        return os.fsdecode(stream.read())


def points_with(mountinfo, option, directories):
    """Return the mount points that have the option, ``"upperdir="`` say, with a path in one of the directories."""
    found = set()
    for line in mountinfo.split("\n") if option in mountinfo else []:
        before, _separator, after = line.partition(" - ")
        for one in (after.split(" ") + ["", ""])[2].split(","):
            path = _unescape(one[len(option) :]) if one.startswith(option) else ""
            if path and any(is_same_or_above(directory, path) for directory in directories):
                found.update(map(_unescape, before.split(" ")[4:5]))
    return found


def parse(mountinfo):
    """Return the mounts in the text of a mountinfo file. Lines end in a newline only: a name may hold any other."""
    found = []
    for line in mountinfo.split("\n"):
        before, separator, after = line.partition(" - ")
        fields = before.split(" ")
        if separator and len(fields) >= 6 and _ID.fullmatch(fields[0]) and _ID.fullmatch(fields[1]):
            shared = any(field.startswith("shared:") for field in fields[6:])
            root, point = _unescape(fields[3]), _unescape(fields[4])
            found.append(
                Mount(int(fields[0]), int(fields[1]), fields[2], root, point, shared, after.split(" ")[0]),
            )
    return found


def is_same_or_above(directory, path):
    """Tell whether ``path`` is ``directory`` or lies below it."""
    return path == directory or path.startswith(directory.rstrip("/") + "/")


def below(table, directory):
    """Return the mounts on the directory or below it, each after all that are mounted on it."""
    chosen = {mount.id: mount for mount in table if is_same_or_above(directory, mount.point)}

    def depth(mount):
        found = 0
        while mount.parent in chosen and mount.parent != mount.id and found < len(chosen):
            mount, found = chosen[mount.parent], found + 1
        return found

    return sorted(chosen.values(), key=depth, reverse=True)


def by_device(table):
    """Return ``{device: [mount]}``, for seen_as()."""
    found = collections.defaultdict(list)
    for mount in table:
        found[mount.device].append(mount)
    return found


def seen_as(root, here):
    """Return the paths at which the root directory of a mount of another mount namespace is seen in ours.

    A process that pivoted its root says that it is in ``/``; only the mount tells which directory that is.
    """
    return [
        os.path.join(mount.point, os.path.relpath(root.root, mount.root)) if root.root != mount.root else mount.point
        for mount in here.get(root.device, ())
        if is_same_or_above(mount.root, root.root)
    ]


def _unescape(text):
    """Undo the octal escapes of mountinfo: space, tab, newline, backslash and ``#``."""
    return _ESCAPE.sub(lambda found: chr(int(found.group(1), 8)), text)
