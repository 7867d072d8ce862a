# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Decides, for one host, what is a confirmed orphan: a pure function of what it is given.

No input or output, no clock, no randomness: the same facts, share of the manifest and policy give the same plan, to
the byte, whatever the order of their keys. All that is safe about the reaper is decided here and tested here.

The rules, in the order in which they are applied:

1. A host whose inputs cannot be trusted is refused: nothing is removed and no strike changes.
2. The resources of one VM are one family. A family is judged as a whole: live, held, disputed, suspected, confirmed.
3. A family is confirmed when every member was seen, as the same object, in as many sweeps as the policy asks for.
4. A member of a confirmed family goes unless it is held (somebody refers to it) or unknown (what could hold it could
   not be read).
5. More than the caps allow: the whole plan is refused. It is never cut short.
"""

from __future__ import annotations

import collections
import contextlib
import datetime
import fnmatch
import re

LIVE = "live"
SUSPECTED = "suspected"
CONFIRMED = "confirmed"
DISPUTED = "disputed"
HELD = "held"
UNKNOWN = "unknown"
VERDICTS = (LIVE, SUSPECTED, CONFIRMED, DISPUTED, HELD, UNKNOWN)

TOMBSTONED = "tombstoned"
ABSENT = "absent"
UNPROVEN = "unproven"
ELSEWHERE = "elsewhere"

# The grades of evidence on which something may be removed; a policy may have a value for each.
GRADES = (TOMBSTONED, ABSENT)
RUNNING_POLICIES = ("never", TOMBSTONED, CONFIRMED)
ZOMBIE_POLICIES = ("report", "notify_parent")

# What a plan decides of the ledger; the rest is bookkeeping of the host.
LEDGER_KEYS = ("host", "machine_id", "manifest", "strikes", "intents", "reaped", "latch")

DEFAULT_POLICY = {
    "realm": None,
    "host": None,
    "strikes": 2,
    "strike_interval": 60,
    "hold": 0,
    "min_age": 60,
    "running": TOMBSTONED,
    "zombies": "notify_parent",
    "keep": [],
    "reused_ids": [],
    "adopt_host": False,
    "clear_latch": "",
    "expect_empty": "",
    "max_per_host": 100,
    "max_percent_per_host": 50,
    "max_shrink_percent": 50,
    "percent_floor": 10,
}


class PolicyError(ValueError):
    """A value of the policy is impossible; the text names the variable."""


def complete_policy(policy):
    """Return ``policy`` with the defaults filled in; raises PolicyError for what cannot be meant."""
    unknown = sorted(set(policy) - set(DEFAULT_POLICY))
    if unknown:
        raise PolicyError("unknown key(s) in the policy: %s" % ", ".join(unknown))
    full = dict(DEFAULT_POLICY, **policy)
    for key in ("realm", "host"):
        if not isinstance(full[key], str) or not full[key]:
            raise PolicyError("policy: '%s' must be a name, not %r" % (key, full[key]))
    for key, least in (("strikes", 2), ("hold", 0)):
        full[key] = _by_grade(key, full[key], least)
    for key in ("strike_interval", "min_age", "max_per_host", "percent_floor"):
        full[key] = _checked_number(key, full[key], 0)
    for key in ("max_percent_per_host", "max_shrink_percent"):
        full[key] = _checked_number(key, full[key], 0, 100)
    if not isinstance(full["adopt_host"], bool):
        raise PolicyError("reap_adopt_host must be true or false, not %r" % (full["adopt_host"],))
    for key, allowed in (("running", RUNNING_POLICIES), ("zombies", ZOMBIE_POLICIES)):
        if full[key] not in allowed:
            raise PolicyError("reap_%s must be one of %s, not %r" % (key, ", ".join(allowed), full[key]))
    try:
        [re.compile(pattern) for pattern in full["reused_ids"]]
    except (re.error, TypeError, OverflowError, RecursionError) as err:
        raise PolicyError(
            "reap_reused_ids must be a list of regular expressions, not %r: %s" % (full["reused_ids"], err)
        ) from None
    if not isinstance(full["keep"], list):
        raise PolicyError("reap_keep must be a list, not %r" % (full["keep"],))
    return dict(full, keep=[pin(one) for one in full["keep"]])


def pin(text):
    """Return ``{pattern, until}`` of a pin: an id or a glob pattern, maybe with ``until YYYY-MM-DD`` behind it.

    ``until`` is in seconds since 1970, the end of that day in UTC, or None. Raises PolicyError.
    """
    if isinstance(text, dict) and set(text) == {"pattern", "until"}:
        return text
    words = text.split() if isinstance(text, str) else []
    if len(words) == 1:
        return {"pattern": words[0], "until": None}
    try:
        if len(words) != 3 or words[1] != "until":
            raise ValueError(text)
        day = datetime.datetime.strptime(words[2], "%Y-%m-%d").replace(tzinfo=datetime.UTC)
    except ValueError:
        raise PolicyError(
            "reap_keep: %.200r is neither an id or glob pattern nor one with 'until YYYY-MM-DD'" % (text,)
        ) from None
    return {"pattern": words[0], "until": day.timestamp() + 86400}


def plan(facts, share, policy, kinds):
    """Return the PLAN of one host.

    facts   what gather read: ``{realm, boot_id, machine_id, boottime_seconds, ledger, ledger_problem, kinds}`` and
            optionally ``other_realms, pins``, ``supervisors: {type: {status, reason, required}}`` and ``alive: {vm_id:
            why}``, what they say
    share   what the live manifest says of this host and of the ids in the facts: ``{realm, source, epoch, epochs,
            generated_at, age, count, counts, proven, unproven, host_known, live: [vm_id], elsewhere: {vm_id: [host]},
            tombstones: {vm_id: seconds since destroyed, or null}}``; ``age`` in seconds when it was fetched
    policy  see DEFAULT_POLICY
    kinds   ``{kind: {order, stops, depends_on, resumes}}``

    PLAN    ``{host, realm, manifest, refused, families, reap, ledger, ledger_changed, generation, counts, notices}``
    """
    policy = complete_policy(policy)
    refused = _refuse(facts, share, policy)
    if refused:
        return _plan(facts, share, policy, refused=refused, counts=_counts(facts, {}, [], UNKNOWN))
    judge = _Judge(facts, share, policy, kinds)
    resources = _without_life(facts, kinds, judge.live)
    families = {vm_id: judge.family(vm_id, members) for vm_id, members in _by_family(resources)}
    judge.keep_unseen_strikes()
    tokens = _tokens(families, kinds, judge)
    resumed, kept = _intents(facts, judge, families, kinds)
    tokens = _in_order(tokens + resumed, kinds)
    living = _living(facts, judge.live)
    refused = _over_cap(living + len(set(families) | _vm_ids(tokens)), tokens, policy)
    found = {"families": families, "living": living, "counts": _counts(facts, families, tokens, LIVE)}
    if refused:
        return _plan(facts, share, policy, refused=refused, **found)
    if not _something(facts) and not facts["ledger"]["generation"]:
        # A host that never had anything of VMs is bound to nothing, and nothing is written on it.
        return _plan(facts, share, policy, **found)
    ledger = {
        "host": policy["host"],
        "machine_id": facts["machine_id"],
        "manifest": _remembered(facts["ledger"]["manifest"], share, policy),
        "strikes": judge.strikes,
        "intents": kept,
        "reaped": _still_gone(facts, share),
        "latch": None,
    }
    return _plan(facts, share, policy, tokens=tokens, ledger=ledger, **found)


def is_permitted(running, evidence):
    """Tell whether the policy ``running`` lets a running thing be ended on this evidence."""
    return running == CONFIRMED and evidence != UNPROVEN or running == TOMBSTONED and evidence == TOMBSTONED


def _by_grade(key, value, least):
    """Return ``{grade: number}`` of a number or of a mapping that has some of the grades."""
    if not isinstance(value, dict):
        value = dict.fromkeys(GRADES, value)
    unknown = sorted(str(grade) for grade in set(value) - set(GRADES))
    if unknown:
        raise PolicyError(
            "reap_%s has values for %s; the grades of evidence are %s" % (key, ", ".join(unknown), ", ".join(GRADES))
        )
    return {grade: _checked_number(key, value.get(grade, DEFAULT_POLICY[key]), least) for grade in GRADES}


def _checked_number(key, value, least, most=None):
    """Return the number; what comes from the command line, or through the templates of Ansible 2.18, is a text."""
    with contextlib.suppress(ValueError):
        value = float(value) if isinstance(value, str) else value
    # Written so that NaN, which is neither more nor less than anything, is refused too.
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not value >= least
        or not (most is None or value <= most)
    ):
        bounds = "at least %s" % least if most is None else "between %s and %s" % (least, most)
        raise PolicyError("reap_%s must be a number, %s, not %r" % (key, bounds, value))
    return value


def _without_life(facts, kinds, live):
    """Return the resources of VMs that are not live, by kind and name. All else costs no more than this look."""
    return [
        resource
        for kind in sorted(kinds, key=lambda kind: kinds[kind]["order"])
        for resource in sorted(
            (one for one in _of_kind(facts, kind) if one["vm_id"] not in live), key=lambda one: one["name"]
        )
    ]


def _of_kind(facts, kind):
    return facts["kinds"].get(kind, {}).get("resources", [])


def _something(facts):
    """Tell whether there is anything on the host to decide about."""
    ledger = facts["ledger"]
    return bool(ledger["strikes"] or ledger["intents"] or any(one["resources"] for one in facts["kinds"].values()))


def _by_family(resources):
    members = {}
    for resource in resources:
        members.setdefault(resource["vm_id"], []).append(resource)
    return sorted(members.items())


# --- 1. what makes a host's inputs untrustworthy -----------------------------------------------------------------


def _refuse(facts, share, policy):
    """Return None or ``{code, message}``. Where there is nothing to decide about, an empty list cannot do harm."""
    ledger, realm = facts["ledger"], policy["realm"]
    if facts["realm"] != realm or share["realm"] != realm:
        return _refusal(
            "other_realm",
            "the sweep is for realm %r, the facts are of %r and the live source speaks for %r"
            % (realm, facts["realm"], share["realm"]),
        )
    is_cleared = policy["clear_latch"] == realm
    return (
        (None if is_cleared else ledger["latch"])
        # Before what is found in the list: a stale copy lists VMs that were alive.
        or _stale_copy(ledger["manifest"], share)
        or (None if is_cleared else _false_positive(ledger, share, policy))
        or (None if policy["adopt_host"] else _stranger(facts, policy))
        or _untrusted(facts, share, policy)
    )


def _false_positive(ledger, share, policy):
    """Return a refusal when a VM of which something was removed on this host, because it lived nowhere, lives now."""
    for vm_id in sorted(set(ledger["reaped"]).intersection([*share["live"], *share["elsewhere"]])):
        if any(re.fullmatch(pattern, vm_id) for pattern in policy["reused_ids"]):
            continue
        when = datetime.datetime.fromtimestamp(ledger["reaped"][vm_id], datetime.UTC)
        return _refusal(
            "latched",
            "something of the VM %s was removed on the host %s at %s, and the live source %s lists it on %s now: it "
            "was alive then, or its id is used again; nothing more is removed in realm %s until a person looked and "
            "clears this with reap_clear_latch=%s (ids that are used again belong in reap_reused_ids)"
            % (
                vm_id,
                policy["host"],
                when.strftime("%Y-%m-%dT%H:%M:%SZ"),
                share["source"],
                ", ".join(share["elsewhere"].get(vm_id, ["this host"])),
                policy["realm"],
                policy["realm"],
            ),
        )
    return None


def _still_gone(facts, share):
    live = {*share["live"], *share["elsewhere"]}
    return {vm_id: when for vm_id, when in facts["ledger"]["reaped"].items() if vm_id not in live}


def _stranger(facts, policy):
    """Refuse a host that is not the one that wrote the ledger; reap_adopt_host binds it anew."""
    ledger, host = facts["ledger"], policy["host"]
    others = facts.get("other_realms") or []
    # A ledger that only remembers the latch of its batch is bound to nobody yet.
    if others and ledger["host"] is None:
        return _refusal(
            "realm_changed",
            "this host has been swept for realm %s and never for %r; if both are right, say so once with "
            "reap_adopt_host=true" % (", ".join(repr(other) for other in others), policy["realm"]),
        )
    if ledger["machine_id"] not in (None, facts["machine_id"]):
        return _refusal(
            "machine_id_changed",
            "this host's ledger was written by machine %s, but this is machine %s: a cloned or replaced host; if that "
            "is intended, say so once with reap_adopt_host=true" % (ledger["machine_id"], facts["machine_id"]),
        )
    if ledger["host"] not in (None, host):
        return _refusal(
            "host_renamed",
            "this host is bound to the name %r, but is called %r now (reap_host_id); if that is intended, say so once "
            "with reap_adopt_host=true" % (ledger["host"], host),
        )
    return None


def _untrusted(facts, share, policy):
    """Refuse a list that cannot be believed for this host."""
    something = _something(facts)
    ledger, host, realm = facts["ledger"], policy["host"], policy["realm"]
    silent = _silent(facts, required=True)
    if something and silent:
        return _refusal(
            "supervisor_unavailable",
            "%s could not be read on this host, so what lives here is not known; where that does not matter, give "
            "it 'required: false' in reap_live_sources" % "; ".join(silent),
        )
    if something and not share["host_known"]:
        return _refusal("host_unknown", "the live source does not know the host %r, so it cannot speak for it" % host)
    if share["count"] == 0 and something and policy["expect_empty"] != realm:
        return _refusal(
            "blind",
            "the live source lists no VM at all while this host has things of VMs; if realm %r is really empty, say so "
            "with reap_expect_empty=%s" % (realm, realm),
        )
    return _shrunk(ledger["manifest"], share, policy)


def _silent(facts, *, required):
    """Return the supervisors that could not be read, each with the reason."""
    return [
        "the supervisor %s (%s)" % (name, one["reason"])
        for name, one in sorted((facts.get("supervisors") or {}).items())
        if one["status"] == "unavailable" and one["required"] == required
    ]


def _stale_copy(remembered, share):
    for source, epoch in sorted(share["epochs"].items()):
        last = remembered["epochs"].get(source, epoch)
        if epoch < last:
            return _refusal(
                "epoch_went_back",
                "the live source %s is at epoch %s, but this host has seen epoch %s: a stale copy"
                % (source, epoch, last),
            )
    return None


def _shrunk(remembered, share, policy):
    if policy["expect_empty"] == policy["realm"]:
        return None
    # One of several sources may fall silent while the others still list enough.
    counts = [("", share["count"], remembered["count"])] + [
        (" " + source, count, remembered["counts"].get(source)) for source, count in sorted(share["counts"].items())
    ]
    for source, count, last in counts:
        lost = 100 * (last - count) / last if last else 0
        if lost > policy["max_shrink_percent"] and last > policy["percent_floor"]:
            return _refusal(
                "shrunk",
                "the live source%s listed %d VMs at the last sweep and lists %d now (%d %% fewer, "
                "reap_max_shrink_percent is %d)" % (source, last, count, lost, policy["max_shrink_percent"]),
            )
    return None


def _refusal(code, message):
    return {"code": code, "message": message}


# --- 2. and 3. what a family is ----------------------------------------------------------------------------------


class _Judge:
    """Judges families one by one and collects the strikes that the ledger is to remember."""

    def __init__(self, facts, share, policy, kinds):
        self.facts = facts
        self.share = share
        self.policy = policy
        self.live = set(share["live"])
        self.alive = facts.get("alive") or {}
        # The list says nothing about what came after it was made, so its own age is not time that was watched.
        self.min_age = policy["min_age"] + share["age"]
        self.now = share["generated_at"] + share["age"]
        self.pins = [("reap_keep", one) for one in policy["keep"]] + [
            ("the host's pin file", _lenient_pin(line)) for line in facts.get("pins") or []
        ]
        self.unreadable = {kind: _unreadable(facts, kind, kinds) for kind in kinds}
        self.strikes = {}

    def family(self, vm_id, members):
        """Return ``{verdict, evidence, strikes, reasons, resources}``; members are judged in ``resources``."""
        evidence = self._evidence(vm_id)
        hold = self._held(vm_id, members)
        if hold:
            return self._all(members, HELD, hold, evidence)
        running = self.running(vm_id, members)
        if running:
            return self._all(members, DISPUTED, [running], evidence)
        return self._struck(vm_id, members, evidence)

    def running(self, vm_id, members=()):
        """Return the reason why the VM counts as running and may not be ended on this evidence, or None."""
        evidence = self._evidence(vm_id)
        if is_permitted(self.policy["running"], evidence):
            return None
        for member in members:
            if member["in_use"]:
                return self._still_running("%s %s is in use" % (member["kind"], member["name"]), evidence)
        return self._still_running(self.alive[vm_id], evidence) if vm_id in self.alive else None

    def _struck(self, vm_id, members, evidence):
        """Give every member its strike; the family has as many as the member with the fewest."""
        # What is not proven is struck like what is absent, and never confirmed.
        grade = ABSENT if evidence == UNPROVEN else evidence
        fewest = min([self._strike(member, self.policy["strikes"][grade]) for member in members])
        reasons = [self._why(vm_id, evidence)]
        verdict = CONFIRMED if fewest >= self.policy["strikes"][grade] else SUSPECTED
        if verdict == CONFIRMED and evidence == UNPROVEN:
            verdict = SUSPECTED
            why = "; ".join(self.share.get("unproven") or ["the live source does not prove that its list is complete"])
            reasons.append(_reason("unproven", why))
        since = max(self.strikes[_key(member)]["first"] for member in members)
        watched, hold = self.facts["boottime_seconds"] - since, self.policy["hold"][grade]
        if verdict == CONFIRMED and watched < hold:
            verdict = HELD
            reasons.insert(0, _reason("hold", "watched for %d s, and reap_hold is %d" % (watched, hold)))
        family = self._all(members, verdict, reasons, evidence, strikes=fewest)
        for judged in family["resources"]:
            why = self.unreadable[judged["kind"]]
            if why:
                judged.update(verdict=UNKNOWN, reasons=[_reason("unreadable", why)])
        return family

    def _strike(self, member, enough):
        """Count this sweep for one member, if it is far enough from the last one; return its strikes."""
        key = _key(member)
        before = self.facts["ledger"]["strikes"].get(key)
        now, boot_id = self.facts["boottime_seconds"], self.facts["boot_id"]
        strike = {"identity": member["identity"], "vm_id": member["vm_id"], "boot_id": boot_id}
        if not before or before["identity"] != member["identity"] or before["vm_id"] != member["vm_id"]:
            strike.update(strikes=1, first=now, last=now)
        elif before["boot_id"] != boot_id:
            # What outlived a reboot keeps one strike; the second is counted from the boot on, on the new clock.
            strike.update(strikes=min(before["strikes"], 1), first=0, last=0)
        else:
            strike.update(strikes=before["strikes"], first=before["first"], last=before["last"])
        if (
            strike["strikes"] < enough
            and now - strike["last"] >= self.policy["strike_interval"]
            and strike["last"] != now
        ):
            strike.update(strikes=strike["strikes"] + 1, last=now)
        self.strikes[key] = strike
        # An unknown age counts as young: until it has been watched for as long as the policy asks, it is one short.
        watched = now - strike["first"] >= self.min_age
        return strike["strikes"] if watched else min(strike["strikes"], enough - 1)

    def keep_unseen_strikes(self):
        """What a kind that could not be read has earned before stays earned: it was not seen live, nor gone."""
        for key, strike in self.facts["ledger"]["strikes"].items():
            entry = self.facts["kinds"].get(key.split(" ", 1)[0])
            if entry and entry["status"] == "unavailable" and strike["vm_id"] not in self.live:
                self.strikes.setdefault(key, strike)

    def _evidence(self, vm_id):
        if not self.share["proven"]:
            return UNPROVEN
        return TOMBSTONED if vm_id in self.share["tombstones"] else ABSENT

    def evidence_of(self, member):
        """Return the evidence as a token carries it: what lives elsewhere is no proof of a false positive later."""
        vm_id = member["vm_id"]
        return ELSEWHERE if vm_id in self.share["elsewhere"] else self._evidence(vm_id)

    def _held(self, vm_id, members):
        """Return the reasons for which the whole family has to wait, without a strike."""
        pinned = self.pin(vm_id)
        if pinned:
            return [_reason("pinned", pinned)]
        since = self.share["tombstones"].get(vm_id)
        if since is not None and since < self.policy["min_age"]:
            return [_reason("recently_destroyed", "destroyed %d s ago; its platform may still be cleaning" % since)]
        for member in members:
            if member["age_seconds"] is not None and member["age_seconds"] < self.min_age:
                return [
                    _reason(
                        "too_young",
                        "%s %s is %d s old (reap_min_age is %d, and the list of live VMs is %d s old)"
                        % (
                            member["kind"],
                            member["name"],
                            member["age_seconds"],
                            self.policy["min_age"],
                            self.share["age"],
                        ),
                    )
                ]
        return []

    def pin(self, vm_id):
        """Return who wants the VM left alone, in words, or None."""
        for where, one in self.pins:
            if fnmatch.fnmatchcase(vm_id, one["pattern"]) and (one["until"] is None or self.now < one["until"]):
                return "%s names it (%s)" % (where, one["pattern"])
        return None

    def _still_running(self, why, evidence):
        return _reason(
            "running", "%s although the VM is %s; reap_running is %s" % (why, evidence, self.policy["running"])
        )

    def _why(self, vm_id, evidence):
        if evidence == TOMBSTONED:
            return _reason(TOMBSTONED, "the live source says that the VM was destroyed")
        elsewhere = self.share["elsewhere"].get(vm_id)
        if elsewhere:
            return _reason(ELSEWHERE, "the VM lives on %s, not here" % ", ".join(elsewhere))
        return _reason(ABSENT, "the live source does not list the VM")

    @staticmethod
    def _all(members, verdict, reasons=(), evidence=None, strikes=0):
        return {
            "verdict": verdict,
            "evidence": evidence,
            "strikes": strikes,
            "reasons": list(reasons),
            "resources": [dict(member, verdict=verdict, reasons=[]) for member in members],
        }


def _lenient_pin(line):
    """A line of a pin file that says more than can be understood pins what its first word says, without an end."""
    try:
        return pin(line)
    except PolicyError:
        return {"pattern": line.split()[0], "until": None}


def _unreadable(facts, kind, kinds):
    """Return why a resource of the kind cannot be judged on this host, or None. A kind not asked for cannot fail."""
    for needed in [kind] + kinds[kind]["depends_on"]:
        entry = facts["kinds"].get(needed)
        if entry and entry["status"] not in ("ok", "absent"):
            return "%s could not be read: %s" % (needed, entry.get("reason") or entry["status"])
    return None


def _key(resource):
    return "%s %s" % (resource["kind"], resource["name"])


def _reason(code, text):
    return {"code": code, "text": text}


# --- 4. what may go ----------------------------------------------------------------------------------------------


def _tokens(families, kinds, judge):
    """Return the tokens of the confirmed families and mark what is held by something that stays."""
    going = {}
    for family in families.values():
        for member in family["resources"]:
            if member["verdict"] != CONFIRMED:
                continue
            if member["kind"] == "zombie" and judge.policy["zombies"] == "report":
                _hold(member, "zombie", "only its parent %s can reap it (reap_zombies is report)" % member["parent"])
            else:
                going[_key(member)] = member
    while _hold_back(going) or _hold_busy(going, kinds):
        pass
    return [_token(member, kinds, judge.evidence_of(member)) for member in going.values()]


def _hold_back(going):
    """Take out of ``going`` what is held by anything that stays, and what that holds in turn; tell whether any was."""
    held_by, stuck = {}, []
    for key, member in going.items():
        for holder in member["holders"]:
            if "kind" in holder and _key(holder) in going:
                held_by.setdefault(_key(holder), []).append((key, holder))
            else:
                stuck.append((key, holder))
    for key, holder in stuck:
        if key in going:
            _hold(going.pop(key), holder["type"], "held by %s %s" % (holder["type"], holder["name"]))
            stuck += held_by.get(key, [])
    return bool(stuck)


def _hold_busy(going, kinds):
    """Take out of ``going`` what is in use where nothing of its VM can be stopped; tell whether any was."""
    stopping = {member["vm_id"] for member in going.values() if _stops(member, kinds)}
    busy = [key for key, member in going.items() if member["in_use"] and member["vm_id"] not in stopping]
    for key in busy:
        _hold(going.pop(key), "busy", "it is in use, by nothing that belongs to the VM and could be stopped")
    return bool(busy)


def _hold(member, code, text):
    member.update(verdict=HELD, reasons=[_reason(code, text)])


def _stops(member, kinds):
    return member["in_use"] and kinds[member["kind"]]["stops"]


def _token(member, kinds, evidence):
    return {
        "kind": member["kind"],
        "name": member["name"],
        "vm_id": member["vm_id"],
        "identity": member["identity"],
        "parent": member["parent"],
        "evidence": evidence,
        "stop": _stops(member, kinds),
        "details": member["details"],
    }


def _in_order(tokens, kinds):
    """Return the tokens in removal order: by kind, and within a kind children before parents."""
    by_key = {_key(token): token for token in tokens}

    def depth(token):
        steps, seen = 0, set()
        while token is not None and _key(token) not in seen:
            seen.add(_key(token))
            token = by_key.get("%s %s" % (token["kind"], token.get("parent")))
            steps += 1
        return steps

    return sorted(tokens, key=lambda token: (kinds[token["kind"]]["order"], -depth(token), token["name"]))


def _intents(facts, judge, families, kinds):
    """Return ``(tokens to finish, intents to keep)`` for the removals that were cut short.

    Only some kinds can be half removed in a way that no later look shows; those tokens are planned again as they were,
    and the kind itself proves that the object is still the same. They wait as long as anything else of the VM would,
    and while their name is that of another object.
    """
    finish, keep = [], []
    intents = facts["ledger"]["intents"]
    present = {_key(one): one["identity"] for kind in kinds if intents for one in _of_kind(facts, kind)}
    for token in intents:
        kind = kinds.get(token["kind"])
        if not kind or not kind.get("resumes") or present.get(_key(token)) == token["identity"]:
            continue  # what is still to be seen needs no memory
        vm_id, entry = token["vm_id"], facts["kinds"].get(token["kind"])
        if (
            _key(token) in present
            or vm_id in judge.live
            or vm_id in families
            and families[vm_id]["verdict"] != CONFIRMED
            or judge.pin(vm_id)
            or judge.running(vm_id)
            or not judge.share["proven"]
            or judge.unreadable[token["kind"]]
            or not entry
            or entry["status"] != "ok"
        ):
            keep.append(token)
        else:
            finish.append(dict(token, stop=False, resume=True))
            present[_key(token)] = None  # of two that had the same name, one at a time
    return finish, keep


# --- 5. caps, counts, and the plan itself ------------------------------------------------------------------------


def _over_cap(everybody, tokens, policy):
    """Refuse a plan that takes more VMs than the caps allow; percentages say nothing about a handful of VMs."""
    doomed = len(_vm_ids(tokens))
    if doomed > policy["max_per_host"]:
        return _refusal(
            "host_cap",
            "%d VMs would be reaped on this host, more than reap_max_per_host=%d" % (doomed, policy["max_per_host"]),
        )
    percent = 100 * doomed / everybody if doomed else 0
    if doomed > policy["percent_floor"] and percent > policy["max_percent_per_host"]:
        return _refusal(
            "host_cap",
            "%d of %d VMs (%d %%) would be reaped on this host, more than reap_max_percent_per_host=%d"
            % (doomed, everybody, percent, policy["max_percent_per_host"]),
        )
    return None


def _remembered(before, share, policy):
    """What the host remembers of the manifest: the highest epoch of each source, and the last good count.

    A host without anything of VMs is not refused when the list is empty or unproven, but must not learn from it either.
    """
    good = share["proven"] and (share["count"] or policy["expect_empty"] == policy["realm"])
    return {
        "epochs": dict(before["epochs"], **share["epochs"]),
        "count": share["count"] if good else before["count"],
        "counts": dict(before["counts"], **share["counts"]) if good else before["counts"],
    }


def _living(facts, live):
    """Return how many live VMs have something on the host."""
    return len({one["vm_id"] for kind in facts["kinds"].values() for one in kind["resources"]} & live)


def _vm_ids(tokens):
    return {token["vm_id"] for token in tokens}


def _counts(facts, families, tokens, otherwise):
    """Return ``{kind: {foreign, status, reap, <verdict>: n}}``; what belongs to no family counts as ``otherwise``."""
    counts = {}
    for kind, entry in facts["kinds"].items():
        counts[kind] = dict.fromkeys(VERDICTS, 0)
        counts[kind].update(foreign=entry.get("foreign", 0), status=entry["status"], reap=0)
        counts[kind][otherwise] = len(entry["resources"])
    for family in families.values():
        for member in family["resources"]:
            counts[member["kind"]][otherwise] -= 1
            counts[member["kind"]][member["verdict"]] += 1
    for token in tokens:
        counts[token["kind"]]["reap"] += 1
    return counts


def _plan(facts, share, policy, *, counts, refused=None, families=None, living=0, tokens=(), ledger=None):
    families = families or {}
    before = facts["ledger"]
    ledger = ledger or {key: before[key] for key in LEDGER_KEYS}
    return {
        "host": policy["host"],
        "realm": policy["realm"],
        "manifest": {key: share.get(key) for key in ("source", "epoch", "count", "generated_at")},
        "refused": refused,
        "families": {
            vm_id: dict(family, resources=[_brief(member) for member in family["resources"]])
            for vm_id, family in sorted(families.items())
        },
        "vms": {
            **dict.fromkeys(VERDICTS, 0),
            **collections.Counter(family["verdict"] for family in families.values()),
            LIVE: living,
        },
        "reap": list(tokens),
        "ledger": ledger,
        "ledger_changed": any(ledger[key] != before[key] for key in ledger),
        "generation": before["generation"],
        "counts": {kind: counts[kind] for kind in sorted(counts)},
        "notices": _notices(facts),
    }


def _notices(facts):
    """Return what a person should know beside: an unreadable ledger, supervisors that did not tell who lives."""
    silent = _silent(facts, required=False) if _something(facts) else []
    return ([facts["ledger_problem"]] if facts.get("ledger_problem") else []) + [
        "%s did not say who lives" % one for one in silent
    ]


def _brief(member):
    return {key: member[key] for key in ("kind", "name", "verdict", "reasons", "bytes", "holders")}
