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

from .. import blame, processes, safe_tree, units
from .. import resource as r
from ..probe import ProbeError

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

# The ways in which a token may say that its zombie goes, beside that of reminding the parent.
WITH_FAMILY = "with_family"
RESTART_UNIT = "restart_unit"

# The identities of parents that were reminded in this process and did nothing: nobody waits for them again.
_deaf = set()
# The HOLDERs of parents, by identity: a parent may have thousands of zombies.
_blame = {}


def collect(rules, host):
    """Return all zombies that a rule attributes to a VM."""
    claims = [_Claim(rule) for rule in rules]
    found, foreign, parents = [], 0, {}
    ours = _OwnTree()
    for process in processes.ended():
        if not processes.is_zombie(process) or process.parent in ours:
            continue
        vm_id = _attributed(process, claims)
        if vm_id is None:
            foreign += 1
            continue
        if process.parent not in parents:
            parents[process.parent] = _describe_parent(process.parent, claims)
        found.append(_describe(process, vm_id, host, parents[process.parent]))
    return {"resources": found, "foreign": foreign}


def inspect(token, rules, host):
    """Return None when this very process is still a zombie and still attributed to the VM."""
    process = _current(token)
    if process is None:
        return r.outcome(token, r.ALREADY_GONE)
    if _identity(host, process) != token["identity"]:
        return r.outcome(token, r.IDENTITY_CHANGED, "another process has this pid now")
    if not processes.is_zombie(process):
        return r.outcome(token, r.DEFERRED, "not a zombie", holders=filter(None, [blame.process(process.pid)]))
    if process.parent in _OwnTree():
        return r.outcome(token, r.FAILED, "a child of the reaper or of what started it")
    if _attributed(process, [_Claim(rule) for rule in rules]) != token["vm_id"]:
        return r.outcome(token, r.FAILED, "not attributed to this VM by any rule")
    return None


def remove(token, rules, host):
    """Remind the parent, and report reaped only when /proc confirms it. Never waits for somebody else's child.

    ``details["how"]`` of the token is there where the policy asks for another way: ``with_family``, when the parent was
    stopped before and nobody is to be reminded; ``restart_unit``, when the systemd unit ``details["unit"]`` may be
    restarted after the reminder did nothing, with what is left of the VM in it if ``details["may_end"]``.
    """
    how = _details(token).get("how")
    refused = inspect(token, rules, host)
    if refused is not None:
        is_family = how == WITH_FAMILY and refused["outcome"] == r.ALREADY_GONE and not _has_its_parent(token)
        return r.outcome(token, r.REAPED, "it went with its parent") if is_family else refused
    process = _current(token)
    parent = processes.stat(process.parent) if process is not None else None
    note = _go_with_family(token, host) if how == WITH_FAMILY else _remind_once(token, parent, host)
    if _is_gone_within(token, host, 0):
        return r.outcome(token, r.REAPED)
    if parent is None:
        return r.outcome(token, r.DEFERRED, "its parent cannot be seen from here")
    if how == RESTART_UNIT:
        why = _restart(token, parent, rules, host)
        if why is None and _is_gone_within(token, host, min(NUDGE_SECONDS, host.remaining())):
            return _restarted(token, parent)
        note = why or "unit %s was restarted, and that did not help" % token["details"]["unit"]
    return _blamed(token, parent, note, host)


def _go_with_family(token, host):
    """Wait for whoever has inherited the zombie; return what is in the way, in words."""
    if _has_its_parent(token):
        return "it was not stopped with the VM"
    _is_gone_within(token, host, min(NUDGE_SECONDS, host.remaining()))
    return "it has inherited them"


def _has_its_parent(token):
    """Tell whether the process that was the parent when the zombie was found is still there."""
    pid, _colon, started = str(_details(token).get("parent_identity")).partition(":")
    parent = processes.stat(int(pid)) if re.fullmatch("[0-9]{1,10}", pid) else None
    return parent is not None and str(parent.started) == started and not processes.is_zombie(parent)


def _remind_once(token, parent, host):
    if parent is not None and _identity(host, parent) not in _deaf:
        _remind(parent)
        if not _is_gone_within(token, host, min(NUDGE_SECONDS, host.remaining())):
            _deaf.add(_identity(host, parent))
    return "it is stopped" if parent is not None and parent.state in "Tt" else None


def _restart(token, parent, rules, host):
    """Restart the unit of the parent; return None when that was done, else why not."""
    details = token["details"]
    unit = processes.unit(processes.read(parent.pid, "cgroup") or "")
    if unit != details["unit"] or details.get("parent_identity") != "%d:%d" % (parent.pid, parent.started):
        return "unit %s was not restarted: the parent is another one, or runs elsewhere, since it was found" % (
            details["unit"]
        )
    claims = [_Claim(rule) for rule in rules]

    def may_end(process):
        return bool(details.get("may_end")) and _vms_of(process, claims) == {token["vm_id"]}

    others = _vms_of(parent, claims)
    if others and not may_end(parent):
        return "unit %s was not restarted: the parent is itself of the VM %s" % (unit, ", ".join(sorted(others)))
    return units.restart(unit, parent, may_end, host)


def _restarted(token, parent):
    unit = token["details"]["unit"]
    message = "unit %s was restarted, because its process %s did not reap it" % (unit, processes.label(parent))
    return dict(r.outcome(token, r.REAPED, message), restarted=unit)


def _blamed(token, parent, note, host):
    """Return the outcome that names the parent, and what was tried in vain."""
    key = _identity(host, parent)
    if key not in _blame:
        _blame[key] = blame.parent(parent.pid, host)
    found = _blame[key] or r.holder("process", processes.label(parent))
    message = "its parent %s does not reap it%s" % (found["name"], "; %s" % note if note else "")
    return r.outcome(token, r.DEFERRED, message, holders=[dict(found, note=note)])


def witness(token, _rules, host):
    """Return the status of the zombie, which is all that is left of it, and who has not waited for it."""
    process = _current(token)
    if process is None or _identity(host, process) != token["identity"]:
        raise ProbeError("it is gone, or another process has its pid now")
    text = "%s== parent %s\n== its cgroup\n%s" % (
        processes.read(process.pid, "status") or "",
        processes.described(process.parent),
        processes.read(process.parent, "cgroup") or "",
    )
    return [{"title": KIND, "source": "/proc/%d/status" % process.pid, "text": text}]


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

    def vm_id_of(self, cgroup):
        """Return the id of the VM whose cgroup this is, by its text alone, None when it is not one of this rule's."""
        return vm_id_of_cgroup(cgroup, self._names) if self._names is not None else None

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


def _vms_of(process, claims):
    """Return all VMs that a living process may be of: by its cgroup whatever it is called, and as a zombie would be."""
    cgroup = processes.read(process.pid, "cgroup") or ""
    return {claim.vm_id_of(cgroup) for claim in claims}.union([_attributed(process, claims)]) - {None}


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


def _describe_parent(pid, claims):
    """Return what the details tell of a parent; ``parent_vm`` is the VM in whose cgroup it runs itself."""
    parent = processes.stat(pid)
    if parent is None:
        unknown = ("parent_unit", "parent_identity", "parent_container", "parent_vm")
        return dict(dict.fromkeys(unknown), parent=str(pid))
    cgroup = processes.read(pid, "cgroup") or ""
    return {
        "parent": processes.label(parent),
        "parent_unit": processes.unit(cgroup),
        "parent_identity": "%d:%d" % (pid, parent.started),
        "parent_container": blame.container_of(cgroup)[0],
        "parent_vm": next(filter(None, (claim.vm_id_of(cgroup) for claim in claims)), None),
    }


def _identity(host, process):
    return "%s:%d:%d" % (host.boot_id, process.pid, process.started)


def _details(token):
    return token.get("details") or {}


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
