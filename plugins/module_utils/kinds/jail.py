# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Jails: the directories ``<base>/<exec>/<id>`` of Firecracker's jailer, each with the root of its VM in ``root``.

The jailer cleans nothing up, and what is in a jail belongs to an unprivileged user: it is treated as hostile. A jail
in which a process has its root, working directory or executable is in use. What is mounted in it does not protect it:
that is unmounted, never descended into.

A jail is set aside by a rename, into ``.microvm.reaper/<hash of its identity>/`` beside it, which only the reaper's
user can enter. It keeps all that it was, what is mounted in it too. What is to be removed at once is moved aside first
too, where nobody else can enter it any more, and then who is in it is looked for. That look, at all processes of the
host, is one for many jails.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import os
import re
import time
import typing

from .. import blame, mounts, processes, safe_read, safe_tree
from .. import resource as r
from ..probe import Absent, ProbeError, boottime

KIND = "jail"
STOPS = False
SETS_ASIDE = "always"
DEPENDS_ON = ("cgroup",)
ASIDE = ".microvm.reaper"
DEFAULT_EXEC = "[^/]+"
RULE = {
    "base": {"type": "str", "required": True},
    "exec": {"type": "str", "default": DEFAULT_EXEC},
    "name": {"type": "str", "required": True},
    "evidence": {"type": "list", "elements": "str"},
}

# One act must end well before the reaper gives up on it; a tree that takes longer is finished in later sweeps.
REMOVE_SECONDS = 20.0
RESERVE_SECONDS = 0.5
MAX_HOLDERS = 20
# How much a witness tells of a jail.
MAX_LISTED, LISTED_DEPTH = 300, 6
MAX_LOGS, LOG_BYTES = 10, 64 * 1024
# How many are held open and looked at together, each by two descriptors, and how long after the look one may go.
TOGETHER = 50
TOGETHER_SECONDS = 2.0


def collect(rules, host):
    """Return all jails below the configured bases whose name is that of a VM. No tree is walked."""
    bases = _bases(rules)
    if not any(os.path.isdir(base) for base in bases):
        raise Absent("no jail base directory exists: %s" % ", ".join(sorted(bases)))
    jails, foreign = {}, 0
    for base, base_rules in sorted(bases.items()):
        for above, names in _levels(base, base_rules):
            for below in _jails(os.path.join(base, *above)):
                vm_id = names.match(below[-1])[0]
                if vm_id is not None and r.is_text(os.path.join(base, *above, *below)):
                    jails[os.path.join(os.path.realpath(base), *above, *below)] = base, above + below, vm_id
                else:
                    foreign += 1
    table = mounts.read()
    inside = _inside(jails, processes.places(table))
    mounted = _inside(jails, ((mount.id, mount.point) for mount in table))
    found = [
        _describe(base, names, vm_id, in_use=bool(inside[path]), mounted=len(mounted[path]))
        for path, (base, names, vm_id) in jails.items()
    ]
    places = {base: full for base, full in ((base, _full(base)) for base in bases) if full is not None}
    return {"resources": [one for one in found if one is not None], "foreign": foreign, "places": places}


def inspect(token, rules, host):
    """Return None when this very jail is still there, ours, and no process is in it."""
    return _with_tree(token, rules, _refusal)


def set_aside(token, rules, host):
    """Move the jail aside as it is."""
    return set_aside_all([token], rules, host)[0]


def set_aside_all(tokens, rules, host):
    """Move jails aside, the first of them."""
    with _opened(tokens, rules) as jails:
        _look(jails)
        for jail in jails:
            jail.decide(_move)
        _look_again(jails)
        for jail in jails:
            jail.decide(lambda jail: dict(r.outcome(jail.token, r.SET_ASIDE), aside={"path": jail.tree.path}))
        return [jail.outcome for jail in jails]


def bring_back(token, rules, host):
    """Move a jail that was set aside back to where it was, unless something else is there now."""
    back = _with_tree(token, rules, _is_back, _home)
    if back["outcome"] in (r.ALREADY_GONE, r.IDENTITY_CHANGED):
        return _with_tree(token, rules, _bring_back)
    _tidy(token, rules)
    return back


def remove(token, rules, host):
    """Unmount what is mounted in the jail, remove all that is in it, then the jail. What is above it stays."""
    return remove_all([token], rules, host)[0]


def remove_all(tokens, rules, host):
    """Remove jails, as many of the first of them as two seconds are enough for.

    The rest of those that were looked at is aside by then, and found there by the next call, or the next sweep.
    """
    with _opened(tokens, rules) as jails:
        _look(jails)
        for jail in jails:
            jail.decide(lambda jail: _move(jail, must=False))
        _look_again(jails)
        end = boottime() + min(TOGETHER_SECONDS, host.remaining() - RESERVE_SECONDS)
        for place, jail in enumerate(jails):
            if place and boottime() > end:
                return [one.outcome for one in jails[:place]]
            jail.decide(lambda jail: _remove(jail, host))
            if jail.outcome["outcome"] == r.ALREADY_GONE:
                _tidy(jail.token, rules)
        return [jail.outcome for jail in jails]


class _Jail:
    """The jail of a token, held open; ``outcome`` once it is decided. ``is_away``: it is not where its name says."""

    def __init__(self, token):
        self.token = token
        self.tree: typing.Any = None
        self.outcome: typing.Any = None
        self.is_away = False
        self.is_moved = False  # by us, and now

    def decide(self, act):
        """Act on a jail about which nothing is decided, which no failure of an earlier one prevents."""
        if self.outcome is not None:
            return
        try:
            self.outcome = act(self)
        except FileNotFoundError:
            self.outcome = r.outcome(self.token, r.ALREADY_GONE)
        except NotADirectoryError:
            self.outcome = r.outcome(self.token, r.IDENTITY_CHANGED, "something that is not a directory is there now")
        except OSError as err:
            self.outcome = dict(r.outcome(self.token, r.FAILED, str(err)), unfinished=True)

    def open(self, rules):
        """Open it where it was moved aside, also by a call that did not come to remove it, or where its name says."""
        place = _locate(self.token, rules)
        if place is None:
            return r.outcome(self.token, r.FAILED, "not below a configured jail base, or not the name of this VM")
        base, names = place
        aside = _aside(names, self.token["identity"])
        with contextlib.suppress(*() if self.token.get("resume") else (FileNotFoundError, NotADirectoryError)):
            self.tree = safe_tree.Tree(base, aside)
            self.is_away = aside != names
            if self.token.get("resume") or self.tree.identity() == self.token["identity"]:
                return None
            self.close()
        self.tree, self.is_away = safe_tree.Tree(base, names), False
        return None

    def close(self):
        """Let go of it."""
        if self.tree is not None:
            self.tree.close()

    def is_aside(self):
        """Tell whether it lies where what was set aside does, also one that is called by that."""
        return os.path.basename(os.path.dirname(os.path.dirname(self.tree.path))) == ASIDE

    def move_back(self):
        """Undo the move, or have the outcome say that it has to be looked for."""
        try:
            self.tree.move_up()
            self.is_away = self.is_moved = False
        except (safe_tree.Busy, OSError) as err:
            message = "%s; and it could not be moved back: %s" % (self.outcome["message"], err)
            self.outcome = dict(self.outcome, message=message, unfinished=True)


@contextlib.contextmanager
def _opened(tokens, rules):
    """Give the _Jails of the first of the tokens, of which none is in another one."""
    chosen = []
    for token in tokens[:TOGETHER]:
        pairs = [pair for one in chosen for pair in ((one["name"], token["name"]), (token["name"], one["name"]))]
        if any(mounts.is_same_or_above(*pair) for pair in pairs):
            break
        chosen.append(token)
    jails = [_Jail(token) for token in chosen]
    try:
        for jail in jails:
            jail.decide(lambda jail: jail.open(rules))
        yield jails
    finally:
        for jail in jails:
            jail.close()


def _look(jails):
    """Decide about the jails that are other ones, and about those that a process is in. One look at all processes."""
    for jail in jails:
        jail.decide(lambda jail: _another(jail.token, jail.tree))
    left = [jail for jail in jails if jail.outcome is None]
    inside = _inside({jail.tree.path for jail in left}, processes.places(mounts.read())) if left else {}
    for jail in left:
        if inside[jail.tree.path]:
            jail.outcome = _in_use(jail.token, inside[jail.tree.path])


def _look_again(jails):
    """Move back, of the jails that were moved aside, those into which a process went meanwhile."""
    moved = [jail for jail in jails if jail.is_moved]
    _look(moved)
    for jail in moved:
        if jail.outcome is not None:
            jail.move_back()


def witness(token, rules, host):
    """Return the listing of the jail, what is mounted in it, and the ends of the logs that the rules name."""
    place = _locate(token, rules)
    if place is None:
        raise ProbeError("not below a configured jail base, or not the name of this VM")
    table = host.once("mounts", mounts.read)
    with safe_tree.Tree(*place) as tree:
        if tree.identity() != token["identity"]:
            raise ProbeError("another jail of the same name is there now")
        reader = safe_read.Reader(tree, table)
        lines = reader.listing(MAX_LISTED, LISTED_DEPTH)
        told = [{"title": "jail-listing", "source": token["name"], "text": "\n".join(lines) + "\n"}]
        mounted = ["%s on %s" % (one.kind, safe_tree.shown(one.point)) for one in mounts.below(table, tree.path)]
        if mounted:
            told.append({"title": "jail-mounts", "source": "/proc/self/mountinfo", "text": "\n".join(mounted) + "\n"})
        for names in reader.matching(log_globs(_rules_of(token, rules)), MAX_LOGS):
            told.append(_end_of_log(token, reader, names))
    return told


def logs_of(outcome, rules):
    """Return ``(base, names below it, globs)``: where a jail lies that was moved aside, and which logs are in it."""
    path = (outcome.get("aside") or {}).get("path") or ""
    for base in _bases(rules):
        place = os.path.realpath(base)
        names = path[len(place) + 1 :].split("/")
        if path.startswith(place + "/") and not {"", ".", ".."}.intersection(names):
            return place, names, log_globs(_rules_of(outcome, rules))
    raise ProbeError("%s is not below a configured jail base" % safe_tree.shown(path))


def log_globs(rules):
    """Return the globs, relative to a jail, of the logs that the rules name. Raises RuleError."""
    found = []
    for rule in rules:
        for pattern in rule.get("evidence") or ():
            if {"", ".", ".."}.intersection(pattern.split("/")):
                raise r.RuleError("jail rule: 'evidence' must be globs relative to the jail: %r" % pattern)
            found += [pattern] if pattern not in found else []
    return found


def _rules_of(item, rules):
    """Return the rules of the base that a token or an outcome is of."""
    return [rule for base, of_base in _bases(rules).items() if item["name"].startswith(base + "/") for rule in of_base]


def _end_of_log(token, reader, names):
    shown = safe_read.shown(names)
    try:
        data, notes = reader.end_of(names, LOG_BYTES)
    except safe_read.Unreadable as err:
        data, notes = b"not read: " + str(err).encode(), []
    source = "; ".join(["%s/%s" % (token["name"], shown)] + notes)
    return {"title": "jail-log-" + shown, "source": source, "text": data.decode("utf-8", "replace")}


def _with_tree(token, rules, act, where=None):
    """Open the jail of a token, where ``where(names, identity)`` says, and act on it."""
    place = _locate(token, rules)
    if place is None:
        return r.outcome(token, r.FAILED, "not below a configured jail base, or not the name of this VM")
    where = where or (_aside if token.get("resume") else _as_named)
    try:
        with safe_tree.Tree(place[0], where(place[1], token["identity"])) as tree:
            return act(token, tree)
    except FileNotFoundError:
        return r.outcome(token, r.ALREADY_GONE)
    except NotADirectoryError:
        return r.outcome(token, r.IDENTITY_CHANGED, "something that is not a directory is there now")


def _tidy(token, rules):
    """Remove what a reaper that was killed left of the place in which a jail lay aside."""
    place = _locate(token, rules)
    if place is not None:
        safe_tree.remove_empty(place[0], _aside(place[1], token["identity"])[:-1])


def _refusal(token, tree):
    refused = _another(token, tree)
    inside = set() if refused else _inside({tree.path}, processes.places(mounts.read()))[tree.path]
    return _in_use(token, inside) if inside else refused


def _another(token, tree):
    if tree.identity() != token["identity"]:
        return r.outcome(token, r.IDENTITY_CHANGED, "another jail of the same name is there now")
    return None


def _in_use(token, inside):
    by = collections.defaultdict(list)
    for pid, name in inside:
        by[pid].append(name)
    holders = [blame.process(pid, by[pid]) for pid in sorted(by)[:MAX_HOLDERS]]
    return r.outcome(token, r.DEFERRED, "processes are in it", holders=[one for one in holders if one])


def _move(jail, must=True):
    """Move a jail aside; None when it is there. One that cannot be moved is left where it is, if it need not."""
    if jail.is_aside():  # moved there before, perhaps by a reaper whose ledger was lost
        return None
    try:
        jail.tree.move_below(ASIDE, _hash(jail.token["identity"]))
        jail.is_away = jail.is_moved = True
    except safe_tree.Busy as err:
        return r.outcome(jail.token, r.DEFERRED, str(err))
    except safe_tree.Refused as err:
        if must:
            left = r.outcome(jail.token, r.DEFERRED, "left where it is until reap_hold is over: %s" % err)
            return dict(left, waits=True)
    return None


def _is_back(token, tree):
    if tree.identity() != token["identity"]:
        return r.outcome(token, r.IDENTITY_CHANGED)
    return r.outcome(token, r.RESTORED, "it is where it was")


def _bring_back(token, tree):
    if tree.identity() != token["identity"]:
        return r.outcome(token, r.IDENTITY_CHANGED, "another directory is where it was set aside")
    try:
        tree.move_up()
    except safe_tree.Busy as err:
        return r.outcome(token, r.DEFERRED, str(err))
    return r.outcome(token, r.RESTORED)


def _remove(jail, host):
    token, tree = jail.token, jail.tree
    if not jail.is_aside():
        # Anybody may have gone in since the look at all of them: this one has a look of its own, right before it goes.
        refused = _refusal(token, tree)
        if refused:
            return refused
    end = boottime() + min(REMOVE_SECONDS, host.remaining() - RESERVE_SECONDS)
    removal = safe_tree.Removal(tree.directory, lambda: boottime() > end)
    has_begun = False
    try:
        if not tree.unmount():
            has_begun = True
            removal.run()
        tree.remove()
    except (safe_tree.Busy, safe_tree.Refused) as err:
        result = r.DEFERRED if isinstance(err, safe_tree.Busy) else r.FAILED
        path, message = tree.path, str(err)
        jail.outcome = r.outcome(token, result, message, bytes_given_back=removal.bytes)
        if jail.is_moved and not has_begun:
            jail.move_back()
        if not jail.is_away:
            here = message.replace(safe_tree.shown(path), safe_tree.shown(token["name"]))
            return dict(jail.outcome, message=here)
        # Out of its place it is not seen: its intent is all that is known of it.
        message = "%s; what is left of it is %s" % (jail.outcome["message"], safe_tree.shown(path))
        return dict(jail.outcome, message=message, unfinished=True)
    if jail.is_aside():
        tree.remove_parent()
    return r.outcome(token, r.REAPED, bytes_given_back=removal.bytes)


def _hash(identity):
    return hashlib.sha256(identity.encode("ascii")).hexdigest()[:32]


def _aside(names, identity):
    """Return the names that lead to where a jail is that was set aside, also of one that is called by that."""
    return names if names[-3:-2] == [ASIDE] else [*names[:-1], ASIDE, _hash(identity), names[-1]]


def _home(names, _identity):
    return [*names[:-3], names[-1]] if names[-3:-2] == [ASIDE] else names


def _as_named(names, _identity):
    return names


def _full(base):
    """Return how many percent of the file system of a base are used, None when it cannot be told."""
    try:
        usage = os.statvfs(base)
    except OSError:
        return None
    used, free = usage.f_blocks - usage.f_bfree, usage.f_bavail
    return round(100 * used / (used + free), 1) if used + free else None


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
        details={"mounts": mounted, "place": base, **({"aside": True} if names[-3:-2] == [ASIDE] else {})},
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
        level = _names(base_rules, names[:-3] if names[-3:-2] == [ASIDE] else names[:-1])
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


def _jails(path):
    """Yield the names below a directory of all that may be a jail there: those in it, and those that were set aside."""
    for entry in _directories(path):
        yield [entry.name]
    for above in _directories(os.path.join(path, ASIDE)):
        for entry in _directories(above.path):
            yield [ASIDE, above.name, entry.name]


def _directories(path):
    try:
        with os.scandir(path) as entries:
            return [entry for entry in entries if entry.is_dir(follow_symlinks=False) and entry.name != ASIDE]
    except (FileNotFoundError, NotADirectoryError):
        return []
