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
DEFAULT_EXEC = "[^/]+"
RULE = {
    "base": {"type": "str", "required": True},
    "exec": {"type": "str", "default": DEFAULT_EXEC},
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
    jails, foreign = {}, 0
    for base, base_rules in sorted(bases.items()):
        for above, names in _levels(base, base_rules):
            for entry in _directories(os.path.join(base, *above)):
                vm_id = names.match(entry.name)[0]
                if vm_id is not None and r.is_text(entry.path):
                    jails[os.path.join(os.path.realpath(base), *above, entry.name)] = base, above + [entry.name], vm_id
                else:
                    foreign += 1
    table = mounts.read()
    inside = _inside(jails, processes.places(table))
    mounted = _inside(jails, ((mount.id, mount.point) for mount in table))
    found = [
        _describe(base, names, vm_id, in_use=bool(inside[path]), mounted=len(mounted[path]))
        for path, (base, names, vm_id) in jails.items()
    ]
    return {"resources": [one for one in found if one is not None], "foreign": foreign}


def inspect(token, rules, host):
    """Return None when this very jail is still there, ours, and no process is in it."""
    return _with_tree(token, rules, _refusal)


def remove(token, rules, host):
    """Unmount what is mounted in the jail, remove all that is in it, then the jail. What is above it stays."""
    return _with_tree(token, rules, lambda token, tree: _refusal(token, tree) or _remove(token, tree, host))


def _with_tree(token, rules, act):
    place = _locate(token, rules)
    if place is None:
        return r.outcome(token, r.FAILED, "not below a configured jail base, or not the name of this VM")
    try:
        with safe_tree.Tree(*place) as tree:
            return act(token, tree)
    except FileNotFoundError:
        return r.outcome(token, r.ALREADY_GONE)
    except NotADirectoryError:
        return r.outcome(token, r.IDENTITY_CHANGED, "something that is not a directory is there now")


def _refusal(token, tree):
    if tree.identity() != token["identity"]:
        return r.outcome(token, r.IDENTITY_CHANGED, "another jail of the same name is there now")
    pids = _inside({tree.path}, processes.places(mounts.read()))[tree.path]
    if pids:
        holders = [processes.holder(pid) for pid in sorted(pids)[:20]]
        return r.outcome(token, r.DEFERRED, "processes are in it", holders=[one for one in holders if one])
    return None


def _remove(token, tree, host):
    end = boottime() + min(REMOVE_SECONDS, host.remaining() - RESERVE_SECONDS)
    removal = safe_tree.Removal(tree.directory, lambda: boottime() > end)
    try:
        if not tree.unmount():
            removal.run()
        tree.remove()
    except safe_tree.Busy as err:
        return r.outcome(token, r.DEFERRED, str(err), bytes_given_back=removal.bytes)
    except safe_tree.Refused as err:
        return r.outcome(token, r.FAILED, str(err), bytes_given_back=removal.bytes)
    return r.outcome(token, r.REAPED, bytes_given_back=removal.bytes)


def _describe(base, names, vm_id, in_use, mounted):
    try:
        with safe_tree.Tree(base, names) as tree:
            identity, status = tree.identity(), os.fstat(tree.directory)
    except (FileNotFoundError, NotADirectoryError):
        return None  # gone between the listing and the look
    age = time.time() - status.st_ctime
    return r.resource(
        KIND,
        os.path.join(base, *names),
        vm_id,
        identity,
        in_use=in_use,
        age_seconds=round(age, 1) if age >= 0 else None,
        details={"mounts": mounted},
    )


def _inside(jails, places):
    """Return ``{jail: keys}`` of the ``(key, path)`` whose path is one of the jails or below one."""
    found = collections.defaultdict(set)
    for key, path in places:
        while path:
            if path in jails:
                found[path].add(key)
            path = path.rpartition("/")[0]
    return found


def _locate(token, rules):
    """Return ``(base, names below it)`` of the token's jail with the base resolved, None if it is not one of ours."""
    for base, base_rules in _bases(rules).items():
        if not token["name"].startswith(base + "/"):
            continue
        names = token["name"][len(base) + 1 :].split("/")
        if any(name in ("", ".", "..") for name in names):
            return None
        level = _names(base_rules, names[:-1])
        if level is not None and level.match(names[-1])[0] == token["vm_id"]:
            return os.path.realpath(base), names
    return None


def _bases(rules):
    """Return ``{base: its rules}``."""
    found = collections.defaultdict(list)
    for rule in rules:
        base = rule["base"].rstrip("/")
        if not base or not base.startswith("/") or os.path.normpath(base) != base:
            raise r.RuleError("jail rule: 'base' must be an absolute path, not the root: %r" % rule["base"])
        try:
            re.compile(_exec(rule))
        except (re.error, OverflowError, RecursionError) as err:
            raise r.RuleError("jail rule: 'exec' is not a regular expression: %r: %s" % (rule["exec"], err)) from err
        found[base].append(rule)
    return found


def _levels(base, rules):
    """Yield ``(names below the base, Names)`` of every directory that jails of the rules lie right below."""
    levels = [[]] + [[entry.name] for entry in _directories(base)]
    for above in levels:
        names = _names(rules, above)
        if names is not None:
            yield above, names


def _names(rules, above):
    """Return the Names of the rules for jails below the directories ``above``, None when no rule is."""
    here = [rule for rule in rules if len(above) < 2 and re.fullmatch(_exec(rule), "".join(above))]
    return r.Names(KIND, here) if here else None


def _exec(rule):
    return DEFAULT_EXEC if rule.get("exec") is None else rule["exec"]


def _directories(path):
    try:
        with os.scandir(path) as entries:
            return [entry for entry in entries if entry.is_dir(follow_symlinks=False)]
    except (FileNotFoundError, NotADirectoryError):
        return []
