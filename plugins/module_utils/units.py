# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Restarts a systemd unit for the sake of one process in it, and only when nothing else would end with that process.

A restart ends all that is in the cgroup of the unit. Beyond it may end what the process has started elsewhere, as its
children, and units that depend on it. So all of these are looked for, and whatever is found and is not known to be
of a dead VM forbids the restart. Two things nobody can look for: what a supervisor ends on its way down besides, and
what it starts in the milliseconds between the look and the restart. So a unit that has to do with VMs that live is
none for the allow-list that a person makes; see planner.py.
"""

from __future__ import annotations

import collections
import contextlib
import fnmatch
import os
import re

from . import mounts, processes
from .probe import DeadlineExceeded, ProbeError

SHOW_SECONDS = 5.0
RESTART_SECONDS = 15.0

# Ends its containers wherever they run (docker), or is what the host or its sessions stand on.
NEVER = (
    "dbus*.service",
    "docker*.service",
    "getty@*.service",
    "init.*",
    "serial-getty@*.service",
    "session-*",
    "systemd-*.service",
    "user@*.service",
    "user-runtime-dir@*.service",
)
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9:_.@\\-]{0,246}\.service")
# The units that systemd stops or restarts with this one.
DEPENDENTS = ("RequiredBy", "RequisiteOf", "BoundBy", "ConsistsOf", "PropagatesStopTo")
_PROPERTIES = ("Id", "LoadState", "ActiveState", "ControlGroup", "KillMode", "MainPID", "CanStart") + DEPENDENTS
MAX_NAMED = 3

# What came of the units that were restarted in this process, or were to be: each is restarted once at most.
_restarted = {}


def restart(unit, parent, may_end, host):
    """Restart the unit that the process ``parent``, a Stat, runs in. Return None when it was done, else why not.

    ``may_end(Stat)`` tells of a living process whether it may end with the parent.
    """
    if unit in _restarted:
        return _restarted[unit] or "unit %s was restarted before in this sweep" % unit
    try:
        pinned = processes.pin(parent.pid)
    except ProcessLookupError:
        return "its parent has ended meanwhile"
    try:
        # After systemd was asked, for that takes time: from the look at the processes on there is only the restart.
        why = _forbidden(unit) or _forbidden_by_systemd(unit, parent, may_end, host)
        if why is not None:
            return why
        return _restart(unit, host)
    except (ProbeError, OSError) as err:
        return "unit %s was not restarted: %s" % (unit, err)
    finally:
        if pinned is not None:
            os.close(pinned)


def _restart(unit, host):
    _restarted[unit] = "unit %s was to be restarted, which is not known to have worked" % unit
    try:
        rc, _out, err = host.run("systemctl", "restart", "--", unit, timeout=RESTART_SECONDS)
    except DeadlineExceeded:
        _restarted[unit] = "unit %s is being restarted, which takes longer than %d s" % (unit, RESTART_SECONDS)
        return _restarted[unit]
    if rc != 0:
        said = processes.printable(" ".join(err.split()))[:300]
        _restarted[unit] = "unit %s could not be restarted: %s" % (unit, said or "exit code %d" % rc)
        return _restarted[unit]
    _restarted[unit] = None
    return None


def _forbidden(unit):
    if not _NAME.fullmatch(unit):
        return "%s is not a service, and only services are restarted" % processes.printable(unit)
    if any(fnmatch.fnmatchcase(unit, pattern) for pattern in NEVER):
        return "unit %s is never restarted" % unit
    return None


def _forbidden_by_systemd(unit, parent, may_end, host):
    """Return why the unit may not be restarted, None when it may."""
    found = properties(unit, host)
    path = found["ControlGroup"]
    dependents = [name for key in DEPENDENTS for name in found.get(key, "").split()]
    why = None
    if found["Id"] != unit or found["LoadState"] != "loaded" or found["ActiveState"] != "active":
        why = "systemd has it as %s, %s, %s" % (found["Id"], found["LoadState"], found["ActiveState"])
    elif found["CanStart"] != "yes":
        why = "systemd could not start it again"
    elif not path.startswith("/") or path.strip("/") == "":
        why = "it has no cgroup of its own"
    elif found["KillMode"] not in ("control-group", "mixed") and found["MainPID"] != str(parent.pid):
        why = "with KillMode=%s a restart does not end the parent" % found["KillMode"]
    elif dependents:
        why = "%s would be stopped with it" % _some(sorted(set(dependents)))
    else:
        why = _holds_more(path, parent, may_end)
    return why and "unit %s was not restarted: %s" % (unit, processes.printable(why))


def properties(unit, host):
    """Return ``{property: text}`` of a unit. Raises ProbeError."""
    wanted = "--property=%s" % ",".join(_PROPERTIES)
    rc, out, err = host.run("systemctl", "show", wanted, "--", unit, timeout=SHOW_SECONDS)
    if rc != 0:
        raise ProbeError("systemctl show: %s" % (processes.printable(" ".join(err.split()))[:300] or "code %d" % rc))
    found = dict(line.partition("=")[::2] for line in out.split("\n") if "=" in line)
    missing = [key for key in _PROPERTIES if key not in found and key not in DEPENDENTS]
    if missing:
        raise ProbeError("systemctl show: no %s" % ", ".join(missing))
    return found


def _holds_more(path, parent, may_end):
    """Return what else would end with the cgroup ``path``, in words; None when it is only the parent, and zombies."""
    everybody = _everybody()
    now = everybody.get(parent.pid)
    if now is None or now.stat.started != parent.started:
        return "its parent has ended meanwhile"
    inside = {pid for pid, one in everybody.items() if _is_inside(one.cgroup, path)}
    if parent.pid not in inside:
        return "its parent %s is not in the cgroup %s that systemd has for it" % (processes.label(parent), path)
    doomed = _with_descendants(inside, everybody)
    if not doomed.isdisjoint(processes.lineage(os.getpid())):
        return "the reaper itself runs in it"
    living = [everybody[pid].stat for pid in sorted(doomed - {parent.pid})]
    others = [one for one in living if not processes.is_zombie(one) and not may_end(one)]
    if others:
        return "%s would end with it" % _some([processes.label(one) for one in others])
    return None


_One = collections.namedtuple("_One", "stat cgroup")


def _everybody():
    """Return ``{pid: _One}`` of all processes; who has ended while we looked is none."""
    found = {}
    for pid in processes.pids():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            # The cgroup first: what a pid that is used again is in then, is at worst too much.
            cgroup, process = processes.read(pid, "cgroup"), processes.stat(pid)
            if process is not None:
                found[pid] = _One(process, cgroup or "")
    return found


def _is_inside(cgroup, path):
    """Tell whether a process is in a cgroup or below it, in any hierarchy, by the text of its /proc/PID/cgroup."""
    return any(mounts.is_same_or_above(path, line.split(":", 2)[-1]) for line in cgroup.split("\n") if line)


def _with_descendants(pids, everybody):
    children = collections.defaultdict(list)
    for pid, one in everybody.items():
        children[one.stat.parent].append(pid)
    found, left = set(), list(pids)
    while left:
        pid = left.pop()
        if pid not in found:
            found.add(pid)
            left += children[pid]
    return found


def _some(names):
    more = len(names) - MAX_NAMED
    return ", ".join(names[:MAX_NAMED]) + (" and %d more" % more if more > 0 else "")
