# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The record every kind yields, what an act on one came to, and how a name becomes the id of a VM.

Pure: no input or output. The shapes are those of the collection's contract:

RESOURCE  ``{kind, name, vm_id, identity, in_use, holders, age_seconds, bytes, parent, details}``
HOLDER    ``{type, name}`` and, where the holder is itself a resource of a known kind, ``kind``; see blame.py for more
TOKEN     ``{kind, name, vm_id, identity, step, stop, details}``: one resource that is to go; ``step`` is one of STEPS
OUTCOME   ``{kind, name, vm_id, outcome, message, bytes, holders}``
"""

from __future__ import annotations

import re

# Ids come from names that a tenant or an attacker may have chosen. Everything else that is printed, stored as a
# key or passed as an argument is derived from an id, so the id is where hostile text stops.
VM_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@+-]{0,127}")
MAX_NAME = 4096

# The steps of the ladder: what can be taken back, and what cannot.
ASIDE = "aside"
REMOVE = "remove"
STEPS = (ASIDE, REMOVE)
# What a TOKEN has of the plan that it is in; what is remembered of it has none of these.
OF_A_PLAN = ("step", "stop", "resume", "why")

REAPED = "reaped"
SET_ASIDE = "set_aside"
RESTORED = "restored"
ALREADY_GONE = "already_gone"
DEFERRED = "deferred"
IDENTITY_CHANGED = "identity_changed"
FAILED = "failed"
WOULD_REAP = "would_reap"
WOULD_SET_ASIDE = "would_set_aside"
WOULD_RESTORE = "would_restore"

# The evidence for removing something of a VM that lives on another host.
ELSEWHERE = "elsewhere"


class RuleError(ValueError):
    """A rule cannot be used; the text names the kind, the key and the value."""


def resource(
    kind,
    name,
    vm_id,
    identity,
    *,
    in_use=False,
    holders=(),
    age_seconds=None,
    bytes_used=None,
    parent=None,
    details=None,
):
    """Return one RESOURCE.

    ``in_use``: something runs in it or has it open. ``holders``: what forbids its removal as long as it is there.
    ``age_seconds``: None when unknown, which the planner treats as young. ``bytes_used``: what removal gives back, None
    when unknown.
    """
    return {
        "kind": kind,
        "name": name,
        "vm_id": vm_id,
        "identity": identity,
        "in_use": bool(in_use),
        "holders": list(holders),
        "age_seconds": age_seconds,
        "bytes": bytes_used,
        "parent": parent,
        "details": details or {},
    }


# What a resource has beside its kind, in the order of resource().
COLUMNS = ("name", "vm_id", "identity", "in_use", "holders", "age_seconds", "bytes", "parent", "details")


def columns(resources):
    """Return resources of one kind as ``{key: [value of each]}``: a third of the text, and quick to check."""
    return {key: [one[key] for one in resources] for key in COLUMNS}


def rows(kind, table):
    """Return the resources that columns() made ``table`` of."""
    return [
        {
            "kind": kind,
            "name": name,
            "vm_id": vm_id,
            "identity": identity,
            "in_use": in_use,
            "holders": holders,
            "age_seconds": age_seconds,
            "bytes": bytes_used,
            "parent": parent,
            "details": details,
        }
        for name, vm_id, identity, in_use, holders, age_seconds, bytes_used, parent, details in zip(
            *[table[key] for key in COLUMNS]
        )
    ]


def holder(kind_of_holder, name, *, kind=None):
    """Return one HOLDER. ``kind`` is set when the holder is a resource that may itself be in the plan."""
    found = {"type": kind_of_holder, "name": name}
    if kind:
        found["kind"] = kind
    return found


def outcome(token, result, message="", *, bytes_given_back=0, holders=()):
    """Return the OUTCOME of an act on the resource that ``token`` names."""
    return {
        "kind": token["kind"],
        "name": token["name"],
        "vm_id": token["vm_id"],
        "outcome": result,
        "message": message,
        "bytes": bytes_given_back,
        "holders": list(holders),
    }


def is_text(name):
    """Tell whether ``name`` can travel as UTF-8 text: no bytes that were not UTF-8, no control characters."""
    return 0 < len(name) <= MAX_NAME and name.isprintable()  # a surrogate, which stands for such a byte, is not


class Names:
    """The name rules of one kind: from a name (and labels) to a vm_id.

    ``rules`` are dicts with ``name``, a regular expression that must match the whole name and has a group called
    ``vm_id``; and/or ``label``, the label whose value is the id. A resource that no rule matches is foreign: not ours.
    """

    def __init__(self, kind, rules):
        self.rules = [(rule, _compiled(kind, rule)) for rule in rules]

    def match(self, name, labels=None, wanted=None):
        """Return ``(vm_id, rule)`` of the first rule that matches, ``(None, None)`` for a foreign name.

        ``wanted`` is an optional ``f(rule) -> bool`` that limits the rules to those of the place looked at.
        """
        for rule, pattern in self.rules:
            if wanted is not None and not wanted(rule):
                continue
            found = _vm_id(rule, pattern, name, labels)
            if found is not None and VM_ID.fullmatch(found) and is_text(name):
                return found, rule
        return None, None


def _compiled(kind, rule):
    text = rule.get("name")
    if not text:
        if rule.get("label"):
            return None
        raise RuleError("a %s rule needs 'name' (a regular expression with a group vm_id): %r" % (kind, rule))
    try:
        pattern = re.compile(text)
    except (re.error, OverflowError, RecursionError) as err:
        raise RuleError("%s rule: 'name' is not a regular expression: %r: %s" % (kind, text, err)) from err
    if "vm_id" not in pattern.groupindex and not rule.get("label"):
        raise RuleError("%s rule: 'name' has no group (?P<vm_id>...): %r" % (kind, text))
    return pattern


def _vm_id(rule, pattern, name, labels):
    """Return the id by one rule. With both ``name`` and ``label`` the name must match too; the label has the id."""
    matched = pattern.fullmatch(name) if pattern is not None else None
    if pattern is not None and matched is None:
        return None
    if rule.get("label"):
        return (labels or {}).get(rule["label"])
    return matched.group("vm_id") if matched else None
