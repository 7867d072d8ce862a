# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Jails: the directories ``<base>/<exec>/<id>`` of Firecracker's jailer, each with the root of its VM in ``root``.

The jailer cleans nothing up, and what is in a jail belongs to an unprivileged user: it is treated as hostile. A jail
in which a process has its root, working directory or executable is in use. What is mounted in it does not protect it:
that is unmounted, never descended into.
"""

from __future__ import annotations

import collections
import os
import re
import time

from .. import mounts, processes, safe_tree
from .. import resource as r
from ..probe import Absent, boottime

KIND = "jail"
STOPS = False
DEPENDS_ON = ("cgroup",)
RULE = {
    "base": {"type": "str", "required": True},
    "exec": {"type": "str", "default": "[^/]+"},
    "name": {"type": "str", "required": True},
}

# One act must end well before the reaper gives up on it; a tree that takes longer is finished in later sweeps.
REMOVE_SECONDS = 20.0
RESERVE_SECONDS = 0.5


def collect(rules, host):
    """Return all jails below the configured bases whose name is that of a VM. No tree is walked."""
    bases = _bases(rules)
    if not any(os.path.isdir(base) for base in bases):
        raise Absent("no jail base directory exists: %s" % ", ".join(sorted(bases)))
    found, foreign = [], 0
    for base, base_rules in bases.items():
        for entry, names, depth in _entries(base, base_rules):
            vm_id = r.Names(KIND, base_rules).match(entry.name, wanted=lambda rule, ok=names: rule in ok)[0]
            if vm_id is None or not r.is_text(entry.path):
                foreign += 1
                continue
            found.append((base, entry, vm_id, depth))
    table = mounts.read()
    return {"resources": _described(found, bases, table), "foreign": foreign}
