# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Zombies: processes of VMs that have ended and that their parent has not waited for.

Only the parent can reap one. We attribute a zombie to a VM, by its cgroup or by a pid file, remind its parent with the
signal that it may have missed, and look whether the zombie is gone; otherwise we say who has to be blamed.
"""

from __future__ import annotations

import collections
import os
import re
import signal
import stat
import time

from .. import processes, safe_tree
from .. import resource as r

KIND = "zombie"
STOPS = False
DEPENDS_ON = ()
RULE = {
    "command": {"type": "str", "default": ".*"},
    "cgroup_name": {"type": "str"},
    "pid_file": {"type": "str"},
}

NUDGE_SECONDS = 2.0
# A pid file is written after its process started; the clocks of the two differ by a tick and more.
PID_FILE_SLACK = 2.0
MAX_PID_FILE = 64

# The identities of parents that were reminded in this process and did nothing: nobody waits for them again.
_deaf = set()


def collect(rules, host):
    """Return all zombies that a rule attributes to a VM."""
    claims = [_Claim(rule) for rule in rules]
    found, foreign, parents = [], 0, {}
    ours = _OwnTree()
    for process in processes.ended():
        if not _is_zombie(process) or process.parent in ours:
            continue
        vm_id = _attributed(process, claims)
        if vm_id is None:
            foreign += 1
            continue
        if process.parent not in parents:
            parents[process.parent] = _describe_parent(process.parent)
        found.append(_describe(process, vm_id, host, parents[process.parent]))
    return {"resources": found, "foreign": foreign}


def inspect(token, rules, host):
    """Return None when this very process is still a zombie and still attributed to the VM."""
    process = _current(token)
    if process is None:
        return r.outcome(token, r.ALREADY_GONE)
    if _identity(host, process) != token["identity"]:
        return r.outcome(token, r.IDENTITY_CHANGED, "another process has this pid now")
    if not _is_zombie(process):
        return r.outcome(token, r.DEFERRED, "not a zombie", holders=[r.holder("process", processes.label(process))])
    if process.parent in _OwnTree():
        return r.outcome(token, r.FAILED, "a child of the reaper or of what started it")
    if _attributed(process, [_Claim(rule) for rule in rules]) != token["vm_id"]:
        return r.outcome(token, r.FAILED, "not attributed to this VM by any rule")
    return None


def remove(token, rules, host):
    """Remind the parent, and report reaped only when /proc confirms it. Never waits for somebody else's child."""
    refused = inspect(token, rules, host)
    if refused is not None:
        return refused
    process = _current(token)
    parent = processes.stat(process.parent) if process is not None else None
    if parent is not None and _identity(host, parent) not in _deaf:
        _remind(parent)
        if not _is_gone_within(token, host, min(NUDGE_SECONDS, host.remaining())):
            _deaf.add(_identity(host, parent))
    if _is_gone_within(token, host, 0):
        return r.outcome(token, r.REAPED)
    if parent is None:
        return r.outcome(token, r.DEFERRED, "its parent cannot be seen from here")
    name = processes.label(parent)
    unit = processes.unit(processes.read(parent.pid, "cgroup") or "")
    message = "its parent %s%s%s does not reap it" % (
        name,
        " (unit %s)" % unit if unit else "",
        ", which is stopped," if parent.state in "Tt" else "",
    )
    return r.outcome(token, r.DEFERRED, message, holders=[r.holder("process", name)])


class _Claim:
    """One rule: which zombies belong to which VM. With both a cgroup and a pid file, both must name the same VM."""

    def __init__(self, rule):
        if not rule.get("cgroup_name") and not rule.get("pid_file"):
            raise r.RuleError("a zombie rule needs 'cgroup_name' or 'pid_file': %r" % rule)
        try:
            self._command = re.compile(rule.get("command") or RULE["command"]["default"])
        except (re.error, OverflowError, RecursionError) as err:
            raise r.RuleError("zombie rule: 'command' is not a regular expression: %s" % err) from err
        self._names = r.Names(KIND, [{"name": rule["cgroup_name"]}]) if rule.get("cgroup_name") else None
        self._pid_files = _split_glob(rule["pid_file"]) if rule.get("pid_file") else None
        self._registered = None

    def vm_id(self, process):
        """Return the id of the VM that the zombie belongs to, None when it is not one of this rule's."""
        if not self._command.fullmatch(process.command):
            return None
        by_cgroup = by_pid_file = None
        if self._names is not None:
            by_cgroup = vm_id_of_cgroup(processes.read(process.pid, "cgroup") or "", self._names)
        if self._pid_files is not None and (self._names is None or by_cgroup is not None):
            by_pid_file = self._by_pid_file(process)
        if self._names is None or self._pid_files is None:
            return by_cgroup or by_pid_file
        return by_cgroup if by_cgroup == by_pid_file else None

    def _by_pid_file(self, process):
        """Return the VM whose pid file names this process: a pid file older than the process means another one."""
        if self._registered is None:
            self._registered = _registered(self._pid_files)
        started = time.time() - processes.age_seconds(process)
        named = {vm_id for vm_id, written in self._registered[process.pid] if written >= started - PID_FILE_SLACK}
        return named.pop() if len(named) == 1 else None


class _OwnTree:
    """The processes whose children are left alone: our ancestors, and what we or our parent started."""

    def __init__(self):
        self._ancestors = set(processes.lineage(os.getpid())) - {1}
        self._roots = {os.getpid(), os.getppid()} - {1}
        self._known = {}

    def __contains__(self, parent):
        if parent not in self._known:
            self._known[parent] = parent in self._ancestors or not self._roots.isdisjoint(processes.lineage(parent))
        return self._known[parent]


def vm_id_of_cgroup(cgroup, names):
    """Return the VM that the text of a zombie's /proc/PID/cgroup names, the innermost one.

    A zombie stays in its v2 cgroup, even in a removed one. In v1 hierarchies the kernel shows it in the root.
    """
    for line in cgroup.split("\n"):
        path = line.split(":", 2)[-1]
        path = path[: -len(" (deleted)")] if path.endswith(" (deleted)") else path
        for name in reversed(path.split("/")):
            vm_id = names.match(name)[0]
            if vm_id is not None:
                return vm_id
    return None


def _attributed(process, claims):
    for claim in claims:
        vm_id = claim.vm_id(process)
        if vm_id is not None:
            return vm_id
    return None


def _is_zombie(process):
    """Tell whether the whole process has ended: the first thread of one that goes on is shown in state Z as well."""
    return process.state == "Z" and process.threads <= 1


def _describe(process, vm_id, host, parent):
    # The age is that of the process: an upper bound of how long it has been a zombie, which nothing tells.
    return r.resource(
        KIND,
        str(process.pid),
        vm_id,
        _identity(host, process),
        age_seconds=round(processes.age_seconds(process), 1),
        parent=str(process.parent),
        details=dict(parent, command=processes.printable(process.command)),
    )


def _describe_parent(pid):
    parent = processes.stat(pid)
    if parent is None:
        return {"parent": str(pid), "parent_unit": None, "parent_identity": None}
    return {
        "parent": processes.label(parent),
        "parent_unit": processes.unit(processes.read(pid, "cgroup") or ""),
        "parent_identity": "%d:%d" % (pid, parent.started),
    }


def _identity(host, process):
    return "%s:%d:%d" % (host.boot_id, process.pid, process.started)


def _current(token):
    return processes.stat(int(token["name"])) if re.fullmatch("[0-9]{1,10}", token["name"]) else None


def _remind(parent):
    """Send SIGCHLD to the process that was the parent a moment ago, and to no other that got its pid since."""
    try:
        pinned = processes.pin(parent.pid)
        try:
            now = processes.stat(parent.pid)
            if now is not None and now.started == parent.started:
                processes.send(pinned, parent.pid, signal.SIGCHLD)
        finally:
            if pinned is not None:
                os.close(pinned)
    except ProcessLookupError:
        pass


def _is_gone_within(token, host, seconds):
    deadline = time.monotonic() + seconds
    while True:
        process = _current(token)
        if process is None or _identity(host, process) != token["identity"]:
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.01)


def _split_glob(pattern):
    """Return ``(directory, pattern of a name in it, names below that)`` of a glob with one ``*``, the id of the VM."""
    names = pattern.split("/")
    places = [place for place, name in enumerate(names) if "*" in name]
    if not pattern.startswith("/") or pattern.count("*") != 1 or {".", ".."}.intersection(names):
        raise r.RuleError("zombie rule: 'pid_file' must be an absolute path with one * for the id: %r" % pattern)
    before, _star, after = names[places[0]].partition("*")
    return (
        "/".join(names[: places[0]]) or "/",
        re.compile(re.escape(before) + "(.+)" + re.escape(after)),
        names[places[0] + 1 :],
    )


def _registered(pid_files):
    """Return ``{pid: [(vm_id, time of writing)]}`` by the pid files, which a tenant may have planted."""
    directory, pattern, below = pid_files
    found = collections.defaultdict(list)
    try:
        names = os.listdir(directory)
    except (FileNotFoundError, NotADirectoryError):
        return found
    for name in names:
        matched = pattern.fullmatch(name)
        if matched and r.VM_ID.fullmatch(matched.group(1)):
            pid, written = _read_pid_file(directory, [name] + below)
            if pid is not None:
                found[pid].append((matched.group(1), written))
    return found


def _read_pid_file(directory, names):
    """Return ``(pid, time of writing)``; ``(None, None)`` for what is not a small regular file with a number in it."""
    try:
        with safe_tree.opened(directory, names) as descriptor:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_PID_FILE:
                return None, None
            text = os.read(descriptor, MAX_PID_FILE).strip()
    except OSError:
        return None, None
    return (int(text), status.st_mtime) if re.fullmatch(rb"[0-9]{1,10}", text) else (None, None)
