# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""cgroups: v2, v1 and hybrid. One resource is one directory right below a configured root, in one hierarchy.

Its name is its path, its identity the boot id and the inode, which the kernel does not use again when a cgroup of the
same name is created. ``populated`` in cgroup.events tells whether anything runs in it; zombies do not count. v1 has no
such file: there the processes of the whole subtree are listed.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import os
import select
import signal
import time

from .. import blame, mounts, processes
from .. import resource as r
from ..probe import Absent, ProbeError, read_once, read_text

KIND = "cgroup"
STOPS = True
SETS_ASIDE = "running"
DEPENDS_ON = ()
RULE = {
    "root": {"type": "str", "required": True},
    "name": {"type": "str", "required": True},
}

KILL_SECONDS = 2.0
MAX_HOLDERS = 20
MAX_PINNED = 256
MAX_WITNESSED = 100
# What tells how a VM's cgroup was used; v1 has other names for it.
TELLING = (
    "cgroup.events", "cgroup.freeze", "memory.current", "memory.peak", "memory.events", "cpu.stat", "io.stat",
    "pids.current", "memory.usage_in_bytes", "memory.max_usage_in_bytes", "memory.failcnt", "cpuacct.usage",
    "freezer.state", "cgroup.procs",
)  # fmt: skip
INITIAL_NAMESPACE = 0xEFFFFFFB  # the kernel's own: /proc then shows whole paths
# What an access to a cgroup gives that is gone, or is just being removed.
REMOVED = (errno.ENOENT, errno.ENODEV)
SYSTEMD_SUFFIXES = (".scope", ".service", ".slice")
DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def collect(rules, host):
    """Return all cgroups right below the configured roots whose name is that of a VM."""
    found, foreign = [], 0
    everybody, ours = r.Names(KIND, rules), _own_pids()
    own_names = _names_on_the_way_to(ours)
    for mount, version in cgroup_mounts(mounts.read()):
        for root, names in _names(rules).items():
            for entry in _directories(os.path.join(mount, root)):
                vm_id = names.match(entry.name)[0]
                if vm_id is None:
                    foreign += 1
                    continue
                may_be_ours = own_names is None or entry.name in own_names
                one = _describe(entry.path, vm_id, version, host, everybody, ours if may_be_ours else frozenset())
                if one is not None:
                    found.append(one)
    return {"resources": found, "foreign": foreign}


def inspect(token, rules, host):
    """Return None when this very cgroup is still there, ours and (unless it is to be stopped first) not populated."""
    return _with_cgroup(token, rules, host, lambda cgroup: None)


def stop(token, rules, host):
    """Kill all that runs in the cgroup and wait up to two seconds for it to be empty."""
    refused = _with_cgroup(dict(token, stop=True), rules, host, lambda cgroup: _kill(token, cgroup))
    return None if refused is not None and refused["outcome"] == r.ALREADY_GONE else refused


def prepare(tokens, _rules, _host):
    """Return for those that are to be set aside whether they are frozen already."""
    found = {}
    for token in tokens:
        if token.get("step") == r.ASIDE:
            with contextlib.suppress(OSError):
                found[token["name"]] = {"frozen": _is_frozen(token["name"])}
    return found


def set_aside(token, rules, host):
    """Freeze all that runs in the cgroup: nothing is lost, and nothing goes on."""
    return _with_cgroup(dict(token, stop=True), rules, host, lambda cgroup: _freeze(token, cgroup))


def bring_back(token, rules, host):
    """Thaw what was set aside, unless it was frozen before."""
    return _with_cgroup(dict(token, stop=True), rules, host, lambda cgroup: _thaw(token, cgroup))


def remove(token, rules, host):
    """Remove the cgroup and its children, children first. Never kills: see stop()."""
    return _with_cgroup(dict(token, stop=False), rules, host, lambda cgroup: _remove(token, cgroup))


def witness(token, rules, host):
    """Return what the cgroup tells of its use, and the command lines of what is in it."""
    if _locate(token, rules) is None:
        raise ProbeError("not below a configured cgroup root, or not the name of this VM")
    directory = os.open(token["name"], DIRECTORY)
    try:
        if _identity(host, os.fstat(directory)) != token["identity"]:
            raise ProbeError("another cgroup of the same name is there now")
        text = "".join(_told(directory, name) for name in TELLING)
        pids = _pids("/proc/self/fd/%d" % directory)
    finally:
        os.close(directory)
    text += "".join("== process %s\n" % processes.described(pid) for pid in pids[:MAX_WITNESSED])
    text += "... cut: %d more processes\n" % (len(pids) - MAX_WITNESSED) if len(pids) > MAX_WITNESSED else ""
    return [{"title": KIND, "source": token["name"], "text": text}]


def _told(directory, name):
    try:
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    except FileNotFoundError:
        return ""
    try:
        return "== %s\n%s" % (name, os.read(descriptor, 1 << 16).decode("utf-8", "replace"))
    except OSError as err:
        return "== %s\nnot read: %s\n" % (name, err.strerror)
    finally:
        os.close(descriptor)


# A cgroup that is held open. ``held`` leads to this very object, and to nothing once that is removed, whatever has its
# name by then; so all that is read, killed or removed below is what was compared.
_Cgroup = collections.namedtuple("_Cgroup", "path held directory version")


def _with_cgroup(token, rules, host, act):
    version = _locate(token, rules)
    if version is None:
        return r.outcome(token, r.FAILED, "not below a configured cgroup root, or not the name of this VM")
    try:
        directory = os.open(token["name"], DIRECTORY)
    except FileNotFoundError:
        return r.outcome(token, r.ALREADY_GONE)
    try:
        cgroup = _Cgroup(token["name"], "/proc/self/fd/%d" % directory, directory, version)
        return _refusal(token, cgroup, rules, host) or act(cgroup)
    except OSError as err:
        if err.errno in REMOVED and not _is_there(cgroup):
            return r.outcome(token, r.ALREADY_GONE)
        raise
    finally:
        os.close(directory)


def _is_there(cgroup):
    """Tell whether the name of the cgroup is still that of the one which is held."""
    try:
        return os.path.samestat(os.lstat(cgroup.path), os.fstat(cgroup.directory))
    except FileNotFoundError:
        return False


def _refusal(token, cgroup, rules, host):
    if _identity(host, os.fstat(cgroup.directory)) != token["identity"]:
        return r.outcome(token, r.IDENTITY_CHANGED, "another cgroup of the same name is there now")
    below = _descendants(cgroup.held)
    holders = _holders(cgroup.path, cgroup.held, below, token["vm_id"], r.Names(KIND, rules), _own_pids())
    if holders:
        return r.outcome(token, r.DEFERRED, "not the VM's alone", holders=holders)
    if not token.get("stop") and _populated(cgroup.held, cgroup.version):
        return r.outcome(token, r.DEFERRED, "populated", holders=_processes(cgroup.held))
    return None


def _remove(token, cgroup):
    deadline = time.monotonic() + KILL_SECONDS
    # Only the last step has to go by the name; so look each time whose name that is.
    while _is_there(cgroup):
        try:
            for child in _descendants(cgroup.held):
                os.rmdir(child)
            if _is_there(cgroup):
                os.rmdir(cgroup.path)
                return r.outcome(token, r.REAPED)
        except OSError as err:
            # EBUSY also while the kernel still takes the last exited task out of the cgroup.
            if err.errno not in REMOVED + (errno.EBUSY,):
                raise
        if time.monotonic() > deadline:
            return r.outcome(token, r.DEFERRED, "busy", holders=_processes(cgroup.held))
        time.sleep(0.005)
    if os.path.lexists(cgroup.path):
        return r.outcome(token, r.IDENTITY_CHANGED, "another cgroup of the same name is there now")
    return r.outcome(token, r.ALREADY_GONE)


def cgroup_mounts(table):
    """Return ``[(mount point, 1 | 2)]`` of all cgroup hierarchies in the mount table.

    A hierarchy that is mounted more than once (bind mounts) counts once, so that a cgroup has one name. What is mounted
    last on a point hides what was there.
    """
    visible = {mount.point: mount for mount in table}
    found = {}
    for mount in visible.values():
        if mount.kind in ("cgroup", "cgroup2"):
            found.setdefault((mount.device, mount.root), (mount.point, 2 if mount.kind == "cgroup2" else 1))
    if not found:
        raise Absent("no cgroup hierarchy is mounted")
    return list(found.values())


def _describe(path, vm_id, version, host, everybody, ours):
    try:
        status = os.lstat(path)
        populated = _populated(path, version)
        # Most have no child, by the count of links, and are not listed for that.
        below = _descendants(path) if status.st_nlink > 2 else []
        holders = _holders(path, path, below, vm_id, everybody, ours if populated else frozenset())
    except OSError as err:
        if err.errno in REMOVED:
            return None  # gone between the listing and the read
        raise
    # No age: the kernel stamps a cgroup's inode when it is first looked at, maybe years after the cgroup was made.
    return r.resource(
        KIND,
        path,
        vm_id,
        _identity(host, status),
        in_use=populated,
        holders=holders,
        details={"version": version},
    )


def _holders(path, held, below, vm_id, everybody, ours):
    """Return what makes the cgroup not the VM's alone: systemd's, another VM's below it, the reaper's own."""
    found = []
    if path.endswith(SYSTEMD_SUFFIXES):
        found.append(r.holder("systemd_unit", os.path.basename(path)))
    if ours and not ours.isdisjoint(_pids_in(below + [held])):
        found.append(r.holder("reaper", path))
    for child in below:
        if everybody.match(os.path.basename(child))[0] not in (None, vm_id):
            found.append(r.holder("other_vm", path + child[len(held) :]))
    return found


def _identity(host, status):
    return "%s:%d:%d" % (host.boot_id, status.st_dev, status.st_ino)


def _populated(path, version):
    if version == 2:
        return b"populated 1" in read_once(path + "/cgroup.events")
    return bool(_pids(path))


def _pids(path):
    """Return the pids in the cgroup and in all below it, without those that are not seen from our pid namespace."""
    return _pids_in(_descendants(path) + [path])


def _pids_in(directories):
    found = []
    for directory in directories:
        try:
            pids = read_text(directory + "/cgroup.procs", 1 << 24).split()
        except OSError as err:
            if err.errno not in REMOVED + (errno.EOPNOTSUPP,):  # the last one: threads, listed in a cgroup above
                raise
            continue
        found += [int(pid) for pid in pids if pid != "0"]
    return found


def _descendants(path):
    """Return all cgroups below one, children before their parents."""
    below, found = [path], []
    while below:
        children = [entry.path for entry in _directories(below.pop())]
        below += children
        found += children
    return found[::-1]


def _processes(path):
    """Return holders that name what runs in the cgroup."""
    return [one for one in map(blame.process, _pids(path)[:MAX_HOLDERS]) if one is not None]


def _kill(token, cgroup):
    """Kill all in the cgroup; return None when nothing runs in it any more, else an OUTCOME."""
    if cgroup.version == 2 and _write(cgroup, "cgroup.kill", b"1"):
        is_empty = _wait_until_empty(cgroup.directory, KILL_SECONDS)
    else:
        is_empty = _kill_one_by_one(cgroup)
    if is_empty:
        return None
    return r.outcome(token, r.DEFERRED, "does not die of SIGKILL", holders=_processes(cgroup.held))


def _kill_one_by_one(cgroup):
    """Do what cgroup.kill does, for v1 and for Linux before 5.14. What is frozen dies when it is thawed."""
    deadline = time.monotonic() + KILL_SECONDS
    while _populated(cgroup.held, cgroup.version):
        if time.monotonic() > deadline:
            return False
        _kill_members(_pids(cgroup.held)[:MAX_PINNED], cgroup.held)
        _write(cgroup, "freezer.state", b"THAWED")
        time.sleep(0.01)
    return True


def _kill_members(pids, path):
    """Kill the processes that are in the cgroup still once they are pinned, so that no reused pid is hit."""
    pinned = {}
    try:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                pinned[pid] = processes.pin(pid)
        for pid in set(_pids(path)).intersection(pinned):
            with contextlib.suppress(ProcessLookupError):
                processes.send(pinned[pid], pid, signal.SIGKILL)
    finally:
        for descriptor in pinned.values():
            if descriptor is not None:
                os.close(descriptor)


def _write(cgroup, name, data):
    """Write to a file of the cgroup; return whether there is one. (Not by open(): its O_CREAT gives EACCES here.)"""
    try:
        descriptor = os.open(name, os.O_WRONLY | os.O_CLOEXEC, dir_fd=cgroup.directory)
    except FileNotFoundError:
        return False
    try:
        os.write(descriptor, data)
    finally:
        os.close(descriptor)
    return True


def _is_frozen(path):
    for name, word in (("cgroup.freeze", b"1"), ("freezer.state", b"FROZEN")):
        with contextlib.suppress(FileNotFoundError):
            return read_once(os.path.join(path, name)).strip() == word
    return False


def _freeze(token, cgroup):
    if _write(cgroup, "cgroup.freeze", b"1"):
        # What sits in the kernel is frozen when it comes out; it will not run a step of its own.
        if not _wait_until(b"frozen 1", cgroup.directory, KILL_SECONDS):
            left = r.outcome(token, r.SET_ASIDE, "not all of it is frozen yet", holders=_processes(cgroup.held))
            return dict(left, in_sight=True)
        return dict(r.outcome(token, r.SET_ASIDE), in_sight=True)
    if _write(cgroup, "freezer.state", b"FROZEN"):
        return dict(r.outcome(token, r.SET_ASIDE), in_sight=True)
    return dict(r.outcome(token, r.DEFERRED, "cannot be frozen: left as it is until reap_hold is over"), waits=True)


def _thaw(token, cgroup):
    if not token["details"].get("frozen") and not _write(cgroup, "cgroup.freeze", b"0"):
        _write(cgroup, "freezer.state", b"THAWED")
    return r.outcome(token, r.RESTORED)


def _wait_until_empty(directory, seconds):
    return _wait_until(b"populated 0", directory, seconds)


def _wait_until(event, directory, seconds):
    """Wait for an event, such as ``populated 0``; the kernel signals a change of cgroup.events with POLLPRI."""
    deadline = time.monotonic() + seconds
    events = os.open("cgroup.events", os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
    try:
        poll = select.poll()
        poll.register(events, select.POLLPRI)
        while True:
            if event in os.pread(events, 4096, 0):
                return True
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            poll.poll(left * 1000)
    finally:
        os.close(events)


def _locate(token, rules):
    """Return the version of the hierarchy that the token's cgroup is in, None if it is not one of ours."""
    parent, _slash, name = token["name"].rpartition("/")
    for mount, version in cgroup_mounts(mounts.read()):
        for root, names in _names(rules).items():
            if parent == os.path.join(mount, root):
                return version if names.match(name)[0] == token["vm_id"] else None
    return None


def _own_pids():
    """Return our pid and those of our ancestors: whatever cgroup one of them is in, in any hierarchy, is not killed."""
    return frozenset(processes.lineage(os.getpid()))


def _names_on_the_way_to(pids):
    """Return the names of all cgroups that lead to one that a process is in, None where a namespace hides some."""
    try:
        if os.readlink("/proc/self/ns/cgroup") != "cgroup:[%d]" % INITIAL_NAMESPACE:
            return None
    except FileNotFoundError:
        pass  # a kernel without such namespaces
    found = set()
    for pid in pids:
        for line in (processes.read(pid, "cgroup") or "").split("\n"):
            found.update(line.split(":", 2)[-1].split("/"))
    return found


def _names(rules):
    """Return ``{root: the Names of its rules}``."""
    roots = {}
    for rule in rules:
        roots.setdefault(_root(rule), []).append(rule)
    return {root: r.Names(KIND, its_rules) for root, its_rules in sorted(roots.items())}


def _root(rule):
    root = rule["root"].strip("/")
    if not root or {"", ".", ".."}.intersection(root.split("/")):
        raise r.RuleError("cgroup rule: 'root' must name a cgroup below the mount point: %r" % rule["root"])
    return root


def _directories(path):
    try:
        with os.scandir(path) as entries:
            return [entry for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError as err:
        if err.errno in REMOVED + (errno.ENOTDIR,):
            return []
        raise
