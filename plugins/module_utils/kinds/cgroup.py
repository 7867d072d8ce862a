# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""cgroups: v2, v1 and hybrid. One resource is one directory right below a configured root, in one hierarchy.

Its name is its path, its identity the boot id and the inode, which the kernel does not use again when a cgroup of the
same name is created. ``populated`` in cgroup.events tells whether anything runs in it; zombies do not count. v1 has no
such file: there the processes of the whole subtree are listed.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import stat
import time

from .. import resource as r
from ..probe import Absent, read_text

KIND = "cgroup"
STOPS = True
DEPENDS_ON = ()
RULE = {
    "root": {"type": "str", "required": True},
    "name": {"type": "str", "required": True},
}

KILL_SECONDS = 2.0
SYSTEMD_SUFFIXES = (".scope", ".service", ".slice")
DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def collect(rules, host):
    """Return all cgroups right below the configured roots whose name is that of a VM."""
    names = r.Names(KIND, rules)
    found, foreign = [], 0
    ours = _own_cgroups()
    for mount, version in cgroup_mounts(read_text("/proc/self/mountinfo")):
        for root in _roots(rules):
            for entry in _directories(os.path.join(mount, root)):
                vm_id, rule = names.match(entry.name, wanted=lambda rule, root=root: _root(rule) == root)
                if vm_id is None:
                    foreign += 1
                    continue
                one = _describe(entry.path, vm_id, version, host, names, ours)
                if one is not None:
                    found.append(one)
    return {"resources": found, "foreign": foreign}


def inspect(token, rules, host):
    """Return None when this very cgroup is still there, ours and (unless it is to be stopped first) not populated."""
    place = _locate(token, rules)
    if place is None:
        return r.outcome(token, r.FAILED, "not below a configured cgroup root, or not the name of this VM")
    version = place
    try:
        status = os.lstat(token["name"])
    except FileNotFoundError:
        return r.outcome(token, r.ALREADY_GONE)
    if not stat.S_ISDIR(status.st_mode) or _identity(host, status) != token["identity"]:
        return r.outcome(token, r.IDENTITY_CHANGED, "another cgroup of the same name is there now")
    if any(is_same_or_above(token["name"], path) for path in _own_cgroups()):
        return r.outcome(token, r.DEFERRED, "the reaper itself runs in it")
    if not token.get("stop") and _populated(token["name"], version):
        return r.outcome(token, r.DEFERRED, "populated", holders=_processes(token["name"]))
    return None


def stop(token, rules, host):
    """Kill all that runs in the cgroup and wait up to two seconds for it to be empty."""
    refused = inspect(dict(token, stop=True), rules, host)
    if refused is not None:
        return None if refused["outcome"] == r.ALREADY_GONE else refused
    directory = os.open(token["name"], DIRECTORY)
    try:
        # The descriptor pins the object: what is killed below is the cgroup that was compared here.
        if _identity(host, os.fstat(directory)) != token["identity"]:
            return r.outcome(token, r.IDENTITY_CHANGED, "another cgroup of the same name is there now")
        return _kill(token, directory, _locate(token, rules))
    finally:
        os.close(directory)


def remove(token, rules, host):
    """Remove the cgroup and its children, children first. Never kills: see stop()."""
    refused = inspect(dict(token, stop=False), rules, host)
    if refused is not None:
        return refused
    deadline = time.monotonic() + KILL_SECONDS
    while True:
        try:
            _remove_tree(token["name"])
            return r.outcome(token, r.REAPED)
        except FileNotFoundError:
            return r.outcome(token, r.REAPED)
        except OSError as err:
            # EBUSY also while the kernel still takes the last exited task out of the cgroup.
            if err.errno != errno.EBUSY:
                raise
            if time.monotonic() > deadline:
                return r.outcome(token, r.DEFERRED, "busy", holders=_processes(token["name"]))
        time.sleep(0.005)


def cgroup_mounts(mountinfo):
    """Return ``[(mount point, 1 | 2)]`` of all cgroup hierarchies in the text of /proc/self/mountinfo.

    A hierarchy that is mounted more than once (bind mounts) counts once, so that a cgroup has one name.
    """
    found, seen = [], set()
    for line in mountinfo.splitlines():
        before, separator, after = line.partition(" - ")
        fields, kind = before.split(" "), after.split(" ")[0]
        if not separator or kind not in ("cgroup", "cgroup2") or len(fields) < 5:
            continue
        device, root, point = fields[2], fields[3], _unescape(fields[4])
        if (device, root) not in seen:
            seen.add((device, root))
            found.append((point, 2 if kind == "cgroup2" else 1))
    if not found:
        raise Absent("no cgroup hierarchy is mounted")
    return found


def is_same_or_above(directory, path):
    """Tell whether ``path`` is ``directory`` or lies below it."""
    return path == directory or path.startswith(directory.rstrip("/") + "/")


def _describe(path, vm_id, version, host, names, ours):
    try:
        status = os.lstat(path)
        populated = _populated(path, version)
        holders = _holders(path, vm_id, names, ours, has_children=status.st_nlink > 2)
    except (FileNotFoundError, NotADirectoryError):
        return None  # gone between the listing and the read
    except OSError as err:
        if err.errno == errno.ENODEV:
            return None  # what a read of a cgroup gives that is being removed
        raise
    age = time.time() - status.st_ctime
    return r.resource(
        KIND,
        path,
        vm_id,
        _identity(host, status),
        in_use=populated,
        holders=holders,
        age_seconds=round(age, 1) if age >= 0 else None,
        details={"version": version},
    )


def _holders(path, vm_id, names, ours, has_children):
    found = []
    if path.endswith(SYSTEMD_SUFFIXES):
        found.append(r.holder("systemd_unit", os.path.basename(path)))
    if any(is_same_or_above(path, own) for own in ours):
        found.append(r.holder("reaper", path))
    if has_children:
        for child, _directories_below, _files in os.walk(path):
            other = names.match(os.path.basename(child))[0]
            if child != path and other not in (None, vm_id):
                found.append(r.holder("other_vm", child))
    return found


def _identity(host, status):
    return "%s:%d:%d" % (host.boot_id, status.st_dev, status.st_ino)


def _populated(path, version):
    if version == 2:
        return "populated 1" in read_text(os.path.join(path, "cgroup.events"))
    return bool(_pids(path))


def _pids(path):
    """Return the pids in the cgroup and in all below it."""
    found = []
    for directory, _directories_below, _files in os.walk(path):
        try:
            found += [int(pid) for pid in read_text(os.path.join(directory, "cgroup.procs"), 1 << 24).split()]
        except (FileNotFoundError, OSError):
            continue  # removed while we looked
    return found


def _processes(path):
    """Return holders that name what runs in the cgroup: pid, command and, for one that is stuck, where."""
    found = []
    for pid in _pids(path)[:20]:
        try:
            name = "%d %s" % (pid, read_text("/proc/%d/comm" % pid).strip())
            if ") D " in read_text("/proc/%d/stat" % pid):
                name += " (unkillable: %s)" % (read_text("/proc/%d/wchan" % pid).strip() or "state D")
        except OSError:
            continue
        found.append(r.holder("process", name))
    return found


def _kill(token, directory, version):
    opener = lambda name, flags: os.open(name, flags, dir_fd=directory)  # noqa: E731
    if version == 2:
        try:
            with open("cgroup.kill", "w", opener=opener) as stream:
                stream.write("1")
        except FileNotFoundError:  # before Linux 5.14
            pass
        else:
            if _wait_until_empty(directory, KILL_SECONDS):
                return None
            return _still_there(token)
    deadline = time.monotonic() + KILL_SECONDS
    while time.monotonic() < deadline:
        pids = _pids(token["name"])
        if not pids:
            return None
        for pid in pids:
            _kill_member(pid, token["name"])
        time.sleep(0.01)
    return _still_there(token)


def _still_there(token):
    return r.outcome(token, r.DEFERRED, "does not die of SIGKILL", holders=_processes(token["name"]))


def _kill_member(pid, path):
    """Kill one process if it is in the cgroup still. The pidfd pins the process, so a reused pid is not hit."""
    try:
        descriptor = os.pidfd_open(pid) if hasattr(os, "pidfd_open") else None
    except ProcessLookupError:
        return
    try:
        if pid not in _pids(path):
            return
        if descriptor is None:
            os.kill(pid, signal.SIGKILL)
        else:
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
    except ProcessLookupError:
        pass
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _wait_until_empty(directory, seconds):
    """Wait for ``populated 0``; the kernel signals a change of cgroup.events with POLLPRI."""
    deadline = time.monotonic() + seconds
    events = os.open("cgroup.events", os.O_RDONLY, dir_fd=directory)
    try:
        poll = select.poll()
        poll.register(events, select.POLLPRI)
        while True:
            if b"populated 0" in os.pread(events, 4096, 0):
                return True
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            poll.poll(left * 1000)
    except OSError as err:
        if err.errno == errno.ENODEV:
            return True  # somebody else removed it meanwhile
        raise
    finally:
        os.close(events)


def _remove_tree(path):
    """Remove a cgroup directory by directory, children first. Files in it are the kernel's and go with it."""
    for directory, _directories_below, _files in os.walk(path, topdown=False):
        os.rmdir(directory)


def _locate(token, rules):
    """Return the version of the hierarchy that the token's cgroup is in, None if it is not one of ours."""
    parent, name = os.path.split(token["name"])
    if os.path.normpath(token["name"]) != token["name"]:
        return None
    names = r.Names(KIND, rules)
    for mount, version in cgroup_mounts(read_text("/proc/self/mountinfo")):
        for root in _roots(rules):
            if parent == os.path.join(mount, root):
                vm_id = names.match(name, wanted=lambda rule, root=root: _root(rule) == root)[0]
                return version if vm_id == token["vm_id"] else None
    return None


def _own_cgroups():
    """Return the paths of the cgroups that this process is in, in every hierarchy, with all mount points tried."""
    found = []
    mounts = [mount for mount, _version in cgroup_mounts(read_text("/proc/self/mountinfo"))]
    for line in read_text("/proc/self/cgroup").splitlines():
        path = line.split(":", 2)[-1].strip("/")
        found += [os.path.join(mount, path).rstrip("/") for mount in mounts if path]
    return found


def _roots(rules):
    return sorted({_root(rule) for rule in rules})


def _root(rule):
    root = rule["root"].strip("/")
    if not root or ".." in root.split("/"):
        raise r.RuleError("cgroup rule: 'root' must name a cgroup below the mount point: %r" % rule["root"])
    return root


def _directories(path):
    try:
        with os.scandir(path) as entries:
            return [entry for entry in entries if entry.is_dir(follow_symlinks=False)]
    except (FileNotFoundError, NotADirectoryError):
        return []


def _unescape(text):
    """Undo the octal escapes of mountinfo."""
    return text.encode("latin-1", "replace").decode("unicode_escape") if "\\" in text else text
