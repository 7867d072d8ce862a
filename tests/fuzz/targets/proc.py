# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What /proc tells. Names of commands, cgroups and mount points are the tenants'."""

from __future__ import annotations

import os
import re

from ansible_collections.microvm.reaper.plugins.module_utils import (
    abandoned,
    blame,
    containerd,
    mounts,
    processes,
    units,
)
from ansible_collections.microvm.reaper.plugins.module_utils.kinds import zombie
from ansible_collections.microvm.reaper.plugins.module_utils.probe import ProbeError
from ansible_collections.microvm.reaper.plugins.module_utils.resource import VM_ID, Names
from ansible_collections.microvm.reaper.plugins.plugin_utils import report

from ..target import is_safe, target, text_of

NAMES = Names("zombie", [{"name": "vm-(?P<vm_id>.*)"}, {"name": "(?P<vm_id>[0-9a-f-]{36})"}])
TAIL = " Z 7 42 42 0 -1 4194304 0 0 0 0 0 0 0 0 20 0 1 0 123456 0 0\n"


@target()
def stat(data):
    """Raises ProbeError only. Whatever a command is called, the numbers are those that the kernel wrote."""
    text = text_of(data)
    found = processes.parse_stat("42 (%s)%s" % (text, TAIL))
    assert found == processes.Stat(42, text, "Z", 7, 1, 123456), found
    try:
        found = processes.parse_stat(text)
    except ProbeError:
        return
    for number in (found.pid, found.parent, found.threads, found.started):
        assert str(abs(number)) in text, number
    assert "(%s)" % found.command in text and found.state in text.rpartition(")")[2].split()


@target()
def cgroup(data):
    """Never raises. A VM and a unit are whole components of a path, whatever is beside them."""
    text = text_of(data)
    parts = {name for line in text.split("\n") for name in line.split("/")}
    vm_id = zombie.vm_id_of_cgroup(text, NAMES)
    if vm_id is not None:
        assert VM_ID.fullmatch(vm_id)
        endings = ("", " (deleted)")
        assert any(start + vm_id + end in parts or re.search(r"(^|:|/)%s" % re.escape(start + vm_id + end), text)
                   for start in ("vm-", "") for end in endings)
    container, namespace = blame.container_of(text)
    assert container is None or (container in text and container.isprintable() and "/" not in container)
    assert namespace is None or (container is not None and containerd.IDENTIFIER.fullmatch(namespace))
    unit = processes.unit(text)
    assert unit is None or (unit.endswith((".service", ".scope")) and unit.isprintable() and "/" not in unit)


@target()
def mountinfo(data):
    """Never raises. A directory that the kernel escaped is given back as it is, and is found under it."""
    text = os.fsdecode(data)
    table = mounts.parse(text)
    assert len(table) <= text.count("\n") + 1
    for mount in table:
        assert re.fullmatch("[0-9]+", str(mount.id)) and " " not in mount.device
    assert len(mounts.below(table, "/")) <= len(table)
    here = mounts.by_device(table)
    for mount in table[:3]:
        assert mount.point in mounts.seen_as(mount, here)
    name = "/" + text.replace("\0", "")
    line = "36 35 98:0 / %s rw shared:1 - overlay overlay rw,upperdir=%s" % (_escaped(name), _escaped(name))
    (one,) = mounts.parse(text[:0] + line)
    assert one == mounts.Mount(36, 35, "98:0", "/", name, True, "overlay"), one


@target()
def mount_points(data):
    """Never raises. An overlay that writes below a directory is found, however the kernel had to write its name."""
    text = os.fsdecode(data)
    points = mounts.points_with(text, "upperdir=", {"/" + text.split("\n", 1)[0], "/var/x"})
    assert all(isinstance(point, str) for point in points)
    name = "/var/x/" + text.replace("\0", "").replace(",", "")  # overlay writes a comma in a way of its own
    line = "36 35 98:0 / %s rw - overlay overlay rw,upperdir=%s" % (_escaped(name), _escaped(name + "/fs"))
    for directory in (name, "/var/x", "/"):
        assert mounts.points_with("22 1 0:1 / / rw - a b c\n%s\n" % line, "upperdir=", {directory}) == {name}
    assert mounts.points_with(line, "upperdir=", {"/var/y"}) == set()


@target()
def unit_properties(data):
    """Raises ProbeError only. What is known of a unit stands in a line of what systemctl printed."""

    class Host:
        def run(self, *_arguments, **_options):
            return 0, text_of(data), ""

    try:
        found = units.properties("x.service", Host())
    except ProbeError as err:
        assert str(err)
        return
    lines = set(text_of(data).split("\n"))
    assert all("%s=%s" % pair in lines for pair in found.items())
    assert set(units._PROPERTIES) - set(units.DEPENDENTS) <= set(found)


@target()
def printable(data):
    """Never raises. What is made fit to be printed cannot command a terminal, nor break a file of UTF-8."""
    text = os.fsdecode(data)
    for said in (processes.printable(text), report.printable(text), abandoned.printable(text)):
        assert is_safe(said), said
    if text:
        assert is_safe(containerd.printable(text))
    assert len(report.printable(text)) <= report.MAX_LINE + 3


def _escaped(text):
    """Write a name as the kernel does in mountinfo."""
    return re.sub(r"[ \t\n\\]", lambda found: "\\%03o" % ord(found.group()), text)
