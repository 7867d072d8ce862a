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
5. What goes climbs a ladder: first the step that can be taken back, and after the hold, in a later plan, if nothing
   speaks against it by then, the one that cannot.
6. More than the caps allow: the whole plan is refused. It is never cut short.
"""

from __future__ import annotations

import collections
import contextlib
import datetime
import fnmatch
import re

from ..module_utils.resource import OF_A_PLAN

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
REPORT, RESTART_UNIT, WITH_FAMILY = "report", "restart_unit", "with_family"
ZOMBIE_POLICIES = (REPORT, "notify_parent", RESTART_UNIT, WITH_FAMILY)
THIN_ID_POLICIES = ("false", "report", "true")

# What a plan decides of the ledger; the rest is bookkeeping of the host.
LEDGER_KEYS = ("host", "machine_id", "manifest", "strikes", "intents", "aside", "reaped", "latch")

# The steps of the ladder (TOKEN, see resource.py), and what is no step yet.
ASIDE = "aside"
REMOVE = "remove"
WAIT = "wait"
# When the step that can be taken back of a kind is taken: of all its things, or of those in which something runs.
ALWAYS = "always"
RUNNING = "running"
ANY_KIND = "*"

# What a HELD, see ledger.py, has beside its TOKEN.
OF_A_HOLD = ("since", "boot_id", "sweep", "state")

DEFAULT_POLICY = {
    "realm": None,
    "host": None,
    "strikes": 2,
    "strike_interval": 60,
    # What cannot be made again. Seconds; see _holds() for what else it may be.
    "hold": {"jail": 3600, "dm_thin": 3600, "snapshot": 3600},
    "pressure": 90,
    "min_age": 60,
    "running": TOMBSTONED,
    "zombies": "notify_parent",
    "zombies_restart_units": [],
    "unmapped_thin_ids": "false",
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
    full["strikes"] = _by_grade("strikes", full["strikes"], 2, DEFAULT_POLICY["strikes"])
    full["hold"] = _holds(full["hold"])
    for key in ("strike_interval", "min_age", "max_per_host", "percent_floor"):
        full[key] = _checked_number(key, full[key], 0)
    for key in ("max_percent_per_host", "max_shrink_percent", "pressure"):
        full[key] = _checked_number(key, full[key], 0, 100)
    if not isinstance(full["adopt_host"], bool):
        raise PolicyError("reap_adopt_host must be true or false, not %r" % (full["adopt_host"],))
    full["unmapped_thin_ids"] = str(full["unmapped_thin_ids"]).lower()
    for key, allowed in (
        ("running", RUNNING_POLICIES),
        ("zombies", ZOMBIE_POLICIES),
        ("unmapped_thin_ids", THIN_ID_POLICIES),
    ):
        if full[key] not in allowed:
            raise PolicyError("reap_%s must be one of %s, not %r" % (key, ", ".join(allowed), full[key]))
    try:
        [re.compile(pattern) for pattern in full["reused_ids"]]
    except (re.error, TypeError, OverflowError, RecursionError) as err:
        raise PolicyError(
            "reap_reused_ids must be a list of regular expressions, not %r: %s" % (full["reused_ids"], err)
        ) from None
    _check_units(full["zombies_restart_units"], full["zombies"])
    if not isinstance(full["keep"], list):
        raise PolicyError("reap_keep must be a list, not %r" % (full["keep"],))
    return dict(full, keep=[pin(one) for one in full["keep"]])


def _check_units(patterns, zombies):
    if not isinstance(patterns, list) or not all(isinstance(one, str) and one for one in patterns):
        raise PolicyError(
            "reap_zombies_restart_units must be a list of unit names or glob patterns, not %r" % (patterns,)
        )
    if zombies == RESTART_UNIT and not patterns:
        raise PolicyError(
            "reap_zombies is restart_unit, and reap_zombies_restart_units names no unit that may be restarted"
        )


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


def plan(facts, share, policy, kinds, withheld=None):
    """Return the PLAN of one host.

    facts   what gather read: ``{realm, boot_id, machine_id, boottime_seconds, ledger, ledger_problem, kinds}`` and
            optionally ``other_realms, pins``, ``supervisors: {type: {status, reason, required}}`` and ``alive: {vm_id:
            why}``, what they say; a kind may have ``places: {name: percent that is full}``
    share   what the live manifest says of this host and of the ids in the facts: ``{realm, source, epoch, epochs,
            generated_at, age, count, counts, proven, unproven, host_known, live: [vm_id], elsewhere: {vm_id: [host]},
            tombstones: {vm_id: seconds since destroyed, or null}}``; ``age`` in seconds when it was fetched
    policy  see DEFAULT_POLICY
    kinds   ``{kind: {order, stops, depends_on, resumes, aside, takes}}``
    withheld  ``{vm_id: REASON}`` of VMs of which nothing is begun and nothing finished, see applying.py; they are
            struck like others

    PLAN    ``{host, realm, manifest, refused, families, reap, begins, ledger, ledger_changed, generation, counts,
            notices}``; ``begins`` are the VMs that this plan is the first to take something of
    """
    policy = complete_policy(policy)
    refused = _refuse(facts, share, policy)
    if refused:
        counts = _counts(facts, {}, [], facts["ledger"]["aside"], UNKNOWN)
        return _plan(facts, share, policy, refused=refused, counts=counts)
    judge = _Judge(facts, share, policy, kinds, withheld)
    families = {vm_id: judge.family(vm_id, members) for vm_id, members in _by_family(judge.to_judge())}
    judge.keep_unseen_strikes()
    ladder = _Ladder(judge, families)
    tokens = _in_order(ladder.climb(_going(families, kinds, judge)) + ladder.finish(), kinds)
    living = _living(facts, judge.live)
    refused = _over_cap(living + len(set(families) | _vm_ids(tokens)), ladder.begins, policy)
    found = {"families": families, "living": living, "counts": _counts(facts, families, tokens, ladder.aside, LIVE)}
    if refused:
        return _plan(facts, share, policy, refused=refused, **found)
    found.update(begins=ladder.begins, said=ladder.notices)
    if not _something(facts) and not facts["ledger"]["generation"]:
        # A host that never had anything of VMs is bound to nothing, and nothing is written on it.
        return _plan(facts, share, policy, **found)
    ledger = {
        "host": policy["host"],
        "machine_id": facts["machine_id"],
        "manifest": _remembered(facts["ledger"]["manifest"], share, policy),
        "strikes": judge.strikes,
        "intents": ladder.intents,
        "aside": ladder.aside,
        "reaped": _still_gone(facts, share),
        "latch": None,
    }
    return _plan(facts, share, policy, tokens=tokens, ledger=ledger, **found)


def hold_of(policy, kind, share, vm_id):
    """Return how many seconds a thing of this kind waits by a complete policy, with what the share says of its VM."""
    grade = TOMBSTONED if share["proven"] and vm_id in share["tombstones"] else ABSENT
    return policy["hold"].get(kind, policy["hold"][ANY_KIND])[grade]


def is_permitted(running, evidence):
    """Tell whether the policy ``running`` lets a running thing be ended on this evidence."""
    return running == CONFIRMED and evidence != UNPROVEN or running == TOMBSTONED and evidence == TOMBSTONED


def _by_grade(key, value, least, missing):
    """Return ``{grade: number}`` of a number or of a mapping that has some of the grades."""
    if not isinstance(value, dict):
        value = dict.fromkeys(GRADES, value)
    unknown = sorted(str(grade) for grade in set(value) - set(GRADES))
    if unknown:
        raise PolicyError(
            "reap_%s has values for %s; the grades of evidence are %s" % (key, ", ".join(unknown), ", ".join(GRADES))
        )
    return {grade: _checked_number(key, value.get(grade, missing), least) for grade in GRADES}


def _holds(value):
    """Return ``{kind: {grade: seconds}}``, with ANY_KIND for all others.

    ``value`` is a number for all; or a mapping that has a number for some kinds, or for some grades of evidence, and
    for a kind maybe one for each grade. What is not named does not wait.
    """
    if not isinstance(value, dict):
        return {ANY_KIND: _by_grade("hold", value, 0, 0)}
    odd = sorted(str(key) for key in value if not isinstance(key, str))
    if odd:
        raise PolicyError("reap_hold has values for %s; it may have some for kinds and for grades" % ", ".join(odd))
    grades = {grade: value[grade] for grade in GRADES if grade in value}
    found = {ANY_KIND: _by_grade("hold", grades, 0, 0)}
    for kind in set(value) - set(GRADES):
        found[kind] = _by_grade("hold", value[kind], 0, 0)
    return found


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


def _of_kind(facts, kind):
    return facts["kinds"].get(kind, {}).get("resources", [])


def _something(facts):
    """Tell whether there is anything on the host to decide about."""
    ledger = facts["ledger"]
    known = ledger["strikes"] or ledger["intents"] or ledger["aside"]
    return bool(known or any(one["resources"] for one in facts["kinds"].values()))


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
            "something of the VM %s was taken away on the host %s at %s, and the live source %s lists it on %s now: it "
            "was alive then, or its id is used again; nothing more is removed in realm %s until a person looked and "
            "clears this with reap_clear_latch=%s (ids that are used again belong in reap_reused_ids)%s"
            % (
                vm_id,
                policy["host"],
                when.strftime("%Y-%m-%dT%H:%M:%SZ"),
                share["source"],
                ", ".join(share["elsewhere"].get(vm_id, ["this host"])),
                policy["realm"],
                policy["realm"],
                "; what was set aside of it comes back by playbooks/undo.yml -e vm_id=%s" % vm_id
                if any(held["vm_id"] == vm_id for held in ledger["aside"])
                else "",
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

    def __init__(self, facts, share, policy, kinds, withheld=None):
        self.facts = facts
        self.share = share
        self.policy = policy
        self.kinds = kinds
        self.withheld = withheld or {}
        self.live = set(share["live"])
        self.alive = facts.get("alive") or {}
        # The list says nothing about what came after it was made, so its own age is not time that was watched.
        self.min_age = policy["min_age"] + share["age"]
        self.now = share["generated_at"] + share["age"]
        self.pins = [("reap_keep", one) for one in policy["keep"]] + [
            ("the host's pin file", _lenient_pin(line)) for line in facts.get("pins") or []
        ]
        self.kinds = kinds
        self.unreadable = {kind: _unreadable(facts, kind, kinds) for kind in kinds}
        self.strikes = {}

    def to_judge(self):
        """Return the resources of VMs that are not live, by kind and name. All else costs no more than this look.

        What was set aside, and is to be seen where it lies now, is the ladder's.
        """
        ledger = self.facts["ledger"]
        # An intent too: of a reaper that was killed when it had set something aside, or was removing that.
        aside = {(one["kind"], one["identity"]) for one in ledger["aside"] + ledger["intents"]}
        return [
            resource
            for kind in sorted(self.kinds, key=lambda kind: self.kinds[kind]["order"])
            for resource in sorted(
                (one for one in _of_kind(self.facts, kind) if one["vm_id"] not in self.live),
                key=lambda one: one["name"],
            )
            if not (aside and resource["details"].get(ASIDE) and (kind, resource["identity"]) in aside)
        ]

    def hold(self, kind, vm_id):
        """Return how many seconds a thing waits between the step that can be taken back and the one that cannot."""
        return hold_of(self.policy, kind, self.share, vm_id)

    def family(self, vm_id, members):
        """Return ``{verdict, evidence, strikes, reasons, resources}``; members are judged in ``resources``."""
        evidence = self._evidence(vm_id)
        hold = self._held(vm_id, self.weighed(members))
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
        strikes = {_key(member): self._strike(member, self.policy["strikes"][grade]) for member in members}
        weighed = [_key(member) for member in self.weighed(members)]
        fewest = min([strikes[key] for key in weighed])
        reasons = [self._why(vm_id, evidence)]
        verdict = CONFIRMED if fewest >= self.policy["strikes"][grade] else SUSPECTED
        if verdict == CONFIRMED and evidence == UNPROVEN:
            verdict = SUSPECTED
            why = "; ".join(self.share.get("unproven") or ["the live source does not prove that its list is complete"])
            reasons.append(_reason("unproven", why))
        family = self._all(members, verdict, reasons, evidence, strikes=fewest)
        for judged in family["resources"]:
            why = self.unreadable[judged["kind"]]
            if why:
                judged.update(verdict=UNKNOWN, reasons=[_reason("unreadable", why)])
        return family

    def weighed(self, members):
        """Return the members that the family is judged by.

        A zombie whose parent is to be stopped with the VM goes by itself then. What still runs there makes new ones
        all the time, each of them young and without a strike, and would so keep the VM's things for ever.
        """
        if self.policy["zombies"] != WITH_FAMILY:
            return members
        stopping = [member for member in members if _stops(member, self.kinds)]
        return [member for member in members if not _goes_with(member, stopping)]

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

    def may_end(self, vm_id):
        """Tell whether what still runs of the VM may be ended on this evidence."""
        return is_permitted(self.policy["running"], self._evidence(vm_id))

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


def _going(families, kinds, judge):
    """Return ``{key: member}`` of the confirmed families and mark what is held by something that stays."""
    going = {}
    for family in families.values():
        for member in family["resources"]:
            if member["verdict"] != CONFIRMED:
                continue
            if member["vm_id"] in judge.withheld:
                member.update(verdict=HELD, reasons=[judge.withheld[member["vm_id"]]])
            elif member["kind"] == "zombie" and judge.policy["zombies"] == REPORT:
                why = "reap_zombies is report"
                _hold_zombie(member, "only its parent %%s can reap it (%s)" % why, why)
            elif member["kind"] == "thin_id" and judge.policy["unmapped_thin_ids"] != "true":
                why = "unmapped thin id, reap_unmapped_thin_ids is %s" % judge.policy["unmapped_thin_ids"]
                _hold(member, "unmapped_thin_id", why)
            else:
                going[_key(member)] = member
    while _hold_back(going) or _hold_busy(going, kinds):
        pass
    if judge.policy["zombies"] == WITH_FAMILY:
        _hold_with_parent(going, kinds)
    return going


def _hold_with_parent(going, kinds):
    """Take the zombies out of ``going`` whose parent is not stopped by this plan."""
    stopping = collections.defaultdict(list)
    for member in going.values():
        if _stops(member, kinds):
            stopping[member["vm_id"]].append(member)
    for key, member in list(going.items()):
        if member["kind"] == "zombie" and not _goes_with(member, stopping[member["vm_id"]]):
            text = "its parent %s is not stopped by this plan (reap_zombies is with_family)"
            _hold_zombie(going.pop(key), text, "it is not stopped by this plan, and reap_zombies is with_family")


def _hold_zombie(member, text, note):
    """Hold a zombie; ``holders`` then has its parent as the details have it, and a note why it is left alone."""
    details = member["details"]
    parts = [(word, details.get("parent_" + word)) for word in ("unit", "container")]
    said = ", ".join("%s %s" % part for part in parts if part[1])
    name = "%s%s" % (details.get("parent") or member["parent"], " (%s)" % said if said else "")
    _hold(member, "zombie", text % name)
    member["holders"] = [{"type": "process", "name": name, **dict(parts), "image": None, "note": note}]


def _with_way(token, judge):
    """Return the token of a zombie with the way in which it goes, where that is not by a reminder of its parent."""
    policy, unit = judge.policy, token["details"].get("parent_unit")
    if policy["zombies"] == WITH_FAMILY:
        way = {"how": WITH_FAMILY}
    elif policy["zombies"] == RESTART_UNIT and _is_named(unit, policy["zombies_restart_units"]):
        # What of the VM runs in the unit may end with it where it might be stopped anyway.
        way = {"how": RESTART_UNIT, "unit": unit, "may_end": judge.may_end(token["vm_id"])}
    else:
        return token
    return dict(token, details=dict(token["details"], **way))


def _is_named(unit, patterns):
    return isinstance(unit, str) and any(fnmatch.fnmatchcase(unit, pattern) for pattern in patterns)


def _goes_with(member, stopping):
    """Tell whether it is a zombie whose parent runs in one of these things of the same VM, which are to be stopped."""
    return member["kind"] == "zombie" and any(_has_inside(one, member["details"]) for one in stopping)


def _has_inside(member, details):
    if member["kind"] == "cgroup":
        return details.get("parent_vm") == member["vm_id"]
    container = member["details"].get("id")
    return member["kind"] == "container" and container is not None and details.get("parent_container") == container


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


def _token(member, evidence, step, stop):
    return {
        "kind": member["kind"],
        "name": member["name"],
        "vm_id": member["vm_id"],
        "identity": member["identity"],
        "parent": member["parent"],
        "evidence": evidence,
        "step": step,
        "stop": stop,
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


# --- 5. the ladder -----------------------------------------------------------------------------------------------


class _Ladder:
    """Tells what is done now of what may go, and what is remembered of the rest.

    ``aside`` and ``intents`` are those of the new ledger, ``begins`` the VMs of which something is taken for the first
    time.
    """

    def __init__(self, judge, families):
        self.judge, self.families, self.kinds = judge, families, judge.kinds
        self.now, self.boot_id = judge.facts["boottime_seconds"], judge.facts["boot_id"]
        ledger = judge.facts["ledger"]
        self.present = {
            _key(one): one["identity"]
            for kind in self.kinds
            if ledger["intents"] or ledger["aside"]
            for one in _of_kind(judge.facts, kind)
            if not one["details"].get(ASIDE)
        }
        self.back = {(key.partition(" ")[0], identity) for key, identity in self.present.items()}
        self.in_place, self.moved, self.unfinished = {}, [], []
        self.aside, self.intents, self.begins, self.notices = [], [], [], []
        for held in ledger["aside"]:
            self._place(held)
        for token in ledger["intents"]:
            self._begun(token)
        self.pressed = self._under_pressure()

    def climb(self, going):
        """Return the tokens of what may go and has not been set aside yet; mark what waits where it is as held."""
        steps = {key: WAIT if self._takes_unseen(one) else self._step(key, one) for key, one in going.items()}
        while self._wait_for_each_other(going, steps):
            pass
        ends = {key for key, member in going.items() if _stops(member, self.kinds) and self._ends(member, steps[key])}
        freed = {going[key]["vm_id"] for key in ends}
        begins, tokens = set(), []
        for key, member in going.items():
            held = self.in_place.pop(key, None)
            if member["in_use"] and not _stops(member, self.kinds) and member["vm_id"] not in freed:
                _hold(member, "busy", "what runs in it is frozen, and ends when its reap_hold is over")
                self.aside += [held] if held else []
                continue
            if not held:
                begins.add(member["vm_id"])
            if steps[key] == WAIT and key not in ends:
                self.aside.append(held or self._waiting(member))
                self._mark(member, self.aside[-1])
            else:
                # What runs may end now although the rest has to wait for what it holds.
                step = ASIDE if steps[key] == WAIT else steps[key]
                tokens.append(self._climbing(member, held, step, key in ends))
        self.begins = sorted(begins)
        # What was set aside or waited, and may not go at all this time. What lives has nothing to wait for.
        self.aside += [
            held
            for held in self.in_place.values()
            if held["state"] == ASIDE or held["vm_id"] not in self.judge.live
        ]
        return tokens

    def finish(self):
        """Return the tokens of what is out of sight: set aside long enough ago, or half removed by a killed reaper.

        They wait as long as anything else of the VM would, and while their name is that of another object.
        """
        # Of two that had the same name the one may be the other: an undo that was killed brought it back.
        tokens, taken = [], {*self.present, *(_key(held) for held in self.moved if not self._is_due(held))}
        for held in self.moved:
            if _key(held) in taken or self._speaks_against(held):
                self.aside.append(held)
            else:
                tokens.append(dict(held, step=REMOVE, stop=False, resume=True, why=self._why(held)))
                taken.add(_key(held))  # and one at a time
        for token in self.unfinished:
            if _key(token) in taken or self._speaks_against(token):
                self.intents.append(token)
            else:
                left = {key: value for key, value in token.items() if key not in OF_A_HOLD}
                tokens.append(dict(left, stop=False, resume=True))
                taken.add(_key(token))
                self.begins = sorted({*self.begins, token["vm_id"]})
        self._notice_the_living()
        return tokens

    def _place(self, held):
        """Find out where something is that was set aside or waits; what is gone, or back, is forgotten."""
        if held["boot_id"] != self.boot_id:
            held = dict(held, since=0, boot_id=self.boot_id)  # the clock of this boot
        traits, is_there = self.kinds.get(held["kind"]), self.present.get(_key(held)) == held["identity"]
        can_be_seen = traits and self._status(held["kind"]) == "ok"
        if is_there and (held["state"] != ASIDE or traits[ASIDE] == RUNNING):
            self.in_place[_key(held)] = held
        elif (held["kind"], held["identity"]) in self.back:
            pass  # one that was found aside, after its ledger was lost, has another name there
        elif held["state"] == ASIDE and not (can_be_seen and traits[ASIDE] == RUNNING):
            self.moved.append(held)
        elif not can_be_seen:
            self.aside.append(held)

    def _begun(self, token):
        """Find out what a reaper that was killed left: only what cannot be seen in its place has to be remembered."""
        traits = self.kinds.get(token["kind"])
        is_there = self.present.get(_key(token)) == token["identity"]
        is_half_gone = traits and traits["resumes"] and not is_there and token.get("step") != ASIDE
        # What is always set aside is moved before it is removed, also at once and where it had waited in its place.
        is_moved = traits and traits[ASIDE] == ALWAYS and not is_there
        if is_half_gone and token.get("state") != ASIDE:
            self.unfinished.append(token)
        elif "since" in token:
            held = {key: value for key, value in token.items() if key not in OF_A_PLAN}
            self._place(dict(held, state=ASIDE) if is_moved and self._status(held["kind"]) == "ok" else held)
        elif is_moved or traits and token.get("step") == ASIDE and traits[ASIDE] == RUNNING:
            self._place(dict(self._held(token), state=ASIDE))

    def _step(self, key, member):
        held = self.in_place.get(key)
        if held:
            return REMOVE if self._is_due(held) else WAIT
        if not self.judge.hold(member["kind"], member["vm_id"]):
            return REMOVE
        when = self.kinds[member["kind"]][ASIDE]
        return ASIDE if when == ALWAYS or when == RUNNING and _stops(member, self.kinds) else WAIT

    def _ends(self, member, step):
        """Tell whether what runs in it is ended now, and not only frozen."""
        return step == REMOVE or step == WAIT and not self.judge.hold(member["kind"], member["vm_id"])

    def _takes_unseen(self, member):
        """Tell whether a manager may collect with it what has a hold and could not be read."""
        return any(
            self.judge.hold(kind, member["vm_id"]) and self._status(kind) == "unavailable"
            for kind in self.kinds[member["kind"]]["takes"]
        )

    def _wait_for_each_other(self, going, steps):
        """Let what holds something that stays for now wait too, for a manager collects what nothing refers to any more;
        and let what is held by something that stays for now wait.
        """
        pairs = [
            (key, _key(holder)) for key, member in going.items() for holder in member["holders"] if "kind" in holder
        ]
        apart = [pair for pair in pairs if len({steps.get(one) == REMOVE for one in pair}) == 2]
        early = {key for pair in apart for key in pair if steps.get(key) == REMOVE}
        steps.update(dict.fromkeys(early, WAIT))
        return bool(early)

    def _climbing(self, member, held, step, stop):
        token = _token(member, self.judge.evidence_of(member), step, stop)
        if member["kind"] == "zombie":
            token = _with_way(token, self.judge)
        if not held:
            return dict(token, bytes=member["bytes"])
        # What its kind noted when it was set aside is needed to bring it back, should this be put off.
        return dict(held, **dict(token, details=held["details"]), why=self._why(held))

    def _waiting(self, member):
        token = _token(member, self.judge.evidence_of(member), None, False)
        return dict(self._held(token), state="waiting", bytes=member["bytes"])

    def _held(self, token):
        kept = {key: value for key, value in token.items() if key not in OF_A_PLAN}
        return dict(kept, since=self.now, boot_id=self.boot_id, sweep=token.get("sweep"))

    def _mark(self, member, held):
        hold = self.judge.hold(held["kind"], held["vm_id"])
        waited = self.now - held["since"]
        if waited >= hold:
            _hold(member, "hold", "it goes with what it holds, or what holds it")
        else:
            did = "set aside" if held["state"] == ASIDE else "waiting where it is for"
            _hold(member, "hold", "%s %d s%s, and reap_hold is %d" % (
                did, waited, " ago" if held["state"] == ASIDE else "", hold
            ))

    def _is_due(self, held):
        hold = self.judge.hold(held["kind"], held["vm_id"])
        return self.now - held["since"] >= hold or _object(held) in self.pressed

    def _why(self, held):
        place = self.pressed.get(_object(held))
        waited = "it has been aside for %d s" % (self.now - held["since"])
        if place:
            return "%s, and goes before its time because %s" % (waited, place)
        return "%s, and reap_hold is %d" % (waited, self.judge.hold(held["kind"], held["vm_id"]))

    def _speaks_against(self, token):
        """Tell whether anything keeps what is out of sight from being removed."""
        judge, vm_id = self.judge, token["vm_id"]
        return bool(
            token["kind"] not in self.kinds
            or vm_id in judge.live
            or vm_id in judge.withheld
            or vm_id in self.families
            and self.families[vm_id]["verdict"] != CONFIRMED
            or judge.pin(vm_id)
            or judge.running(vm_id)
            or not judge.share["proven"]
            or judge.unreadable[token["kind"]]
            or self._status(token["kind"]) != "ok"
        )

    def _status(self, kind):
        return self.judge.facts["kinds"].get(kind, {}).get("status")

    def _under_pressure(self):
        """Return ``{object: why}`` of what does not wait to the end: where it is full, the older half goes now."""
        found, threshold = {}, self.judge.policy["pressure"]
        for kind in sorted(self.kinds):
            for place, percent in sorted(self.judge.facts["kinds"].get(kind, {}).get("places", {}).items()):
                held = [
                    one
                    for one in [*self.moved, *self.in_place.values()]
                    if one["kind"] == kind and one["details"].get("place") == place
                ]
                if percent < threshold or not held:
                    continue
                why = "%s is %d %% full (reap_pressure is %g)" % (place, percent, threshold)
                held.sort(key=lambda one: (one["since"], one["name"]))
                found.update({_object(one): why for one in held[: (len(held) + 1) // 2]})
                self.notices.append("%s: of %d that are aside there, the older half does not wait" % (why, len(held)))
        return found

    def _notice_the_living(self):
        living = sorted({held["vm_id"] for held in self.aside if held["vm_id"] in self.judge.live})
        if living:
            more = " and %d more VMs" % (len(living) - 3) if len(living) > 3 else ""
            self.notices.append(
                "something of %s%s is aside, and lives here now: bring it back with playbooks/undo.yml -e vm_id=%s"
                % (", ".join(living[:3]), more, living[0])
            )


def _object(held):
    return _key(held), held["identity"]


# --- 6. caps, counts, and the plan itself ------------------------------------------------------------------------


def _over_cap(everybody, begins, policy):
    """Refuse a plan that takes more VMs than the caps allow; percentages say nothing about a handful of VMs.

    What was set aside has been counted then.
    """
    doomed = len(begins)
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


def _counts(facts, families, tokens, aside, otherwise):
    """Return ``{kind: {foreign, status, reap, aside, <verdict>: n}}``; what belongs to no family counts as
    ``otherwise``, what waits for the end of its hold as aside and as nothing else.
    """
    counts = {}
    for kind, entry in facts["kinds"].items():
        counts[kind] = dict.fromkeys(VERDICTS, 0)
        counts[kind].update(foreign=entry.get("foreign", 0), status=entry["status"], reap=0, aside=0)
        counts[kind][otherwise] = sum(1 for one in entry["resources"] if not one["details"].get(ASIDE))
    for family in families.values():
        for member in family["resources"]:
            counts[member["kind"]][otherwise] -= not member["details"].get(ASIDE)
            counts[member["kind"]][member["verdict"]] += not _waits(member)
    for token in tokens:
        counts.setdefault(token["kind"], collections.Counter())["reap"] += 1
    for held in aside:
        counts.setdefault(held["kind"], collections.Counter())["aside"] += 1
    return counts


def _waits(member):
    return any(reason["code"] == "hold" for reason in member["reasons"])


def _plan(
    facts, share, policy, *, counts, refused=None, families=None, living=0, tokens=(), begins=(), ledger=None, said=()
):
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
        "begins": list(begins),
        "ledger": ledger,
        "ledger_changed": any(ledger[key] != before[key] for key in ledger),
        "generation": before["generation"],
        "counts": {kind: counts[kind] for kind in sorted(counts)},
        "notices": _notices(facts) + list(said),
    }


def _notices(facts):
    """Return what a person should know beside: an unreadable ledger, supervisors that did not tell who lives."""
    silent = _silent(facts, required=False) if _something(facts) else []
    return ([facts["ledger_problem"]] if facts.get("ledger_problem") else []) + [
        "%s did not say who lives" % one for one in silent
    ]


def _brief(member):
    return {key: member[key] for key in ("kind", "name", "verdict", "reasons", "bytes", "holders")}
