# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Says in sentences why something was or was not reaped. Pure, and decides nothing: all verdicts are the planner's.

What is still to come is the planner's too: it is asked what it would say of the same things at later moments.

EXPLANATION ``{host, vm_id, verdict, sentences: [text]}``; the verdict is one of the planner's or of those below
"""

from __future__ import annotations

import collections

from ..module_utils import journal as journals
from ..module_utils.all_kinds import TRAITS
from . import outlook, planner, planning
from .facts import FactsError, unpacked, vm_ids
from .report import human_bytes, printable
from .words import enumerate_hosts, human_seconds, utc

REFUSED = "refused"
GONE = "gone"
NOT_HERE = "not_here"

MAX_THINGS = 50
MAX_TOLD = 20

HEADLINES = {
    planner.LIVE: "{0} is live: nothing of it is touched here.",
    planner.SUSPECTED: "{0} is suspected: too few sweeps have seen it without a live VM, so nothing is removed yet.",
    planner.CONFIRMED: "{0} is confirmed: it belongs to no live VM, and the next sweep removes it.",
    planner.DISPUTED: "{0} is disputed: something of its VM is in use, so nothing of it is touched.",
    planner.HELD: "{0} is held: it is not removed now.",
    planner.UNKNOWN: "{0} is unknown: what might hold it could not be read, so it is not removed.",
    REFUSED: "{0} stays as it is: this host is refused, so nothing is removed on it and no strike changes.",
    GONE: "{0} is gone: nothing of it is on this host, but the host remembers it.",
    NOT_HERE: "This host knows nothing of {0}: nothing here has this name or belongs to a VM of this id, and neither "
    "ledger nor journal names it.",
}

# What a person can do about it, by the code of a refusal or of a reason. The planner's own words come before.
REFUSALS = {
    "latched": "Find out first whether the VM was alive when something of it was removed.",
    "other_realm": "Compare reap_realm with the realm that the live source speaks for (reap_live_sources).",
    "realm_changed": "Compare reap_realm with what this host was swept for before.",
    "machine_id_changed": "A clone needs a machine id of its own; a host that was replaced is adopted.",
    "host_renamed": "Compare reap_host_id with the name by which the live source calls this host.",
    "host_unknown": "Compare reap_host_id with the hosts that the live source names.",
    "supervisor_unavailable": "Find out why it does not answer on the host.",
    "blind": "Find out why the live source (reap_live_sources) lists nothing.",
    "epoch_went_back": "Wait for the live source to catch up, or point reap_live_sources at one that is not behind.",
    "shrunk": "If so many VMs are really gone, raise reap_max_shrink_percent for one sweep.",
    "host_cap": "If so many VMs are really dead, raise the cap for one sweep.",
    "fleet_cap": "If so many VMs are really dead, raise the cap for one sweep.",
    "cloned_machine_id": "The strikes of one would be believed of the other.",
}
REASONS = {
    planner.TOMBSTONED: "",
    planner.ABSENT: "",
    planner.ELSEWHERE: "",
    "pinned": "It may go when neither reap_keep nor the file 'keep' in the host's reap_state_dir names it any more.",
    "recently_destroyed": "reap_min_age says how long the platform of a destroyed VM has for its own cleaning.",
    "too_young": "reap_min_age says how long new things are left to whoever is at work on them.",
    "running": "reap_running says on which evidence what still runs may be ended; or end it by hand.",
    "hold": "reap_hold says how long what is confirmed is kept all the same.",
    "unproven": "A list that is not proven earns strikes and no removal: the live source has to prove itself complete.",
    "unreadable": "It is left alone until that can be read again: what could not be read is not free.",
    "zombie": "With reap_zombies=notify_parent the parent is told, with restart_unit its unit may be restarted.",
    "unmapped_thin_id": "With reap_unmapped_thin_ids=true it goes; nothing tells whose it was.",
    "busy": "Find out what uses it and end that; nothing is forced.",
}
HELD_BY_SOMETHING = "It goes in a sweep after that is gone; nothing is forced."

Subject = collections.namedtuple("Subject", "what vm_id is_resource resources")


def explain(facts, manifest, policy, what, journal=()):
    """Return the EXPLANATION of one VM (its id) or resource (its whole name) on one host.

    ``facts``, ``manifest`` and ``policy`` are what planning.plan() takes; ``journal`` what the module journal_facts
    returned, or its entries. Raises FactsError, ManifestError or PolicyError.
    """
    facts, journal = unpacked(facts), _believed(journal)
    subject = _subject(facts, str(what), journal)
    facts, share, plan = planning.judged(facts, manifest, policy, also=[subject.vm_id])
    return _Case(facts, share, planner.complete_policy(policy), plan, subject, journal).explanation()


def text(what, explanations, *, stopped=None, refused=None, silent=()):
    """Return all EXPLANATIONs of a batch, ``{host: EXPLANATION}``, as lines for a terminal.

    ``stopped`` is why a sweep over the batch would stop (``{code, message}``, or None), ``refused`` the same for single
    hosts, ``silent`` are hosts without an explanation. Hosts that know nothing of it share a line.
    """
    lines = ["microvm.reaper: why %s was or was not reaped" % what]
    if stopped:
        lines.append("NO SWEEP of these hosts removes anything (%s" % _refusal(stopped))
    knowing = {host: one for host, one in sorted(explanations.items()) if one["verdict"] != NOT_HERE}
    for host, one in knowing.items():
        lines.append("%s: %s" % (host, one["verdict"]))
        said = one["sentences"]
        refusal = (refused or {}).get(host)
        if refusal and not any(refusal["message"] in sentence for sentence in said):
            said = said + ["A sweep of these hosts leaves this one alone (%s" % _refusal(refusal)]
        lines += ["  " + sentence for sentence in said]
    lines += _not_here({host: one for host, one in explanations.items() if host not in knowing}, not knowing)
    if silent:
        lines.append("%s: could not be asked; see the failure above" % enumerate_hosts(sorted(silent)))
    return "\n".join(printable(line) for line in lines)


def _not_here(explanations, at_length):
    if explanations and not at_length:
        return ["%s: nothing known of it" % enumerate_hosts(sorted(explanations))]
    groups = {}
    for host, one in sorted(explanations.items()):
        groups.setdefault(tuple(one["sentences"]), []).append(host)
    return [
        line
        for sentences, hosts in groups.items()
        for line in ["%s: nothing known of it" % enumerate_hosts(hosts)] + ["  " + sentence for sentence in sentences]
    ]


def _refusal(refusal):
    advice = REFUSALS.get(refusal["code"], "")
    return ("%s): %s. %s" % (refusal["code"], refusal["message"], advice)).rstrip()


def _believed(journal):
    """Return ``{entries, truncated, broken}`` of what a host returned as its journal."""
    if not isinstance(journal, dict):
        journal = {"entries": journal, "truncated": False}
    entries = journal.get("entries")
    if not isinstance(entries, (list, tuple)):
        raise FactsError("the journal must be a list of entries, not %.200r" % (entries,))
    try:
        return {
            "entries": [journals.checked(entry) for entry in entries],
            "truncated": bool(journal.get("truncated")),
            "broken": str(journal["broken"])[:500] if journal.get("broken") else None,
        }
    except ValueError as err:
        raise FactsError("the journal: %s" % err) from err


def _of_things(journal):
    return [entry for entry in journal["entries"] if entry["what"] != journals.LATCHED]


def _subject(facts, what, journal):
    """Find out what is asked about: a VM whose id anything here names, else a thing of this name, else any VM."""
    resources = [one for kind in TRAITS if kind in facts["kinds"] for one in facts["kinds"][kind]["resources"]]
    remembered = [(entry["vm_id"], entry["name"]) for entry in _of_things(journal)]
    remembered += [(one["vm_id"], one["name"]) for key in ("intents", "aside") for one in facts["ledger"][key]]
    remembered += [(one["vm_id"], key.partition(" ")[2]) for key, one in facts["ledger"]["strikes"].items()]
    ids = vm_ids(facts) | {vm_id for vm_id, _name in remembered}
    named = [one for one in resources if one["name"] == what]
    owners = [one["vm_id"] for one in named] + [vm_id for vm_id, name in remembered if name == what]
    if what in ids or not owners:
        return Subject(what, what, False, [one for one in resources if one["vm_id"] == what])
    return Subject(what, owners[0], True, [one for one in named if one["vm_id"] == owners[0]])


class _Case:
    """One subject on one host, and what is to be said of it; each method returns sentences."""

    def __init__(self, facts, share, policy, plan, subject, journal):
        self.facts = facts
        self.share = share
        self.policy = policy
        self.plan = plan
        self.subject = subject
        self.journal = journal
        self.told = [one for one in _of_things(journal) if self._is_meant(one)]
        self.family = plan["families"].get(subject.vm_id)
        members = self.family["resources"] if self.family else []
        self.judged = {(one["kind"], one["name"]): one for one in members}
        self.going = [token for token in plan["reap"] if token["vm_id"] == subject.vm_id]
        self.verdict = self._verdict()

    def explanation(self):
        """Return the EXPLANATION: the verdict first, then what it rests on, then what is remembered."""
        headline = HEADLINES[self.verdict].format(self.subject.what)
        sentences = [headline] + self._refused() + self._source()
        if self.verdict == NOT_HERE:
            sentences += self._alive() + self._out_of_sight()
        else:
            sentences += self._things() + self._aside() + self._alive() + self._reasons() + self._strikes()
            sentences += self._to_come()
            sentences += self._next_sweep() + self._unavailable() + self._ledger() + self._journal()
        return {
            "host": self.plan["host"],
            "vm_id": self.subject.vm_id,
            "verdict": self.verdict,
            "sentences": sentences,
        }

    def _is_meant(self, one):
        return one["name"] == self.subject.what if self.subject.is_resource else one["vm_id"] == self.subject.vm_id

    @property
    def _is_live(self):
        return self.subject.vm_id in self.share["live"]

    def _verdict(self):
        if not self.subject.resources:
            # A list that does not say which hosts it speaks for makes a VM live everywhere; that is no news of a host.
            if self._is_live and self.share.get("names_hosts"):
                return planner.LIVE
            if self._aside_of_it():
                return planner.HELD
            return GONE if self._is_remembered() else NOT_HERE
        if self.plan["refused"]:
            return REFUSED
        if self._is_live:
            return planner.LIVE
        mine = [self.judged[one["kind"], one["name"]]["verdict"] for one in self.subject.resources]
        if self.family["verdict"] != planner.CONFIRMED or planner.CONFIRMED in mine:
            return self.family["verdict"]
        return mine[0]

    def _is_remembered(self):
        ledger = self.facts["ledger"]
        return bool(self.told or self.subject.vm_id in ledger["reaped"] or self._unfinished() or self._unseen())

    # --- what it rests on

    def _refused(self):
        return ["Refused (%s" % _refusal(self.plan["refused"])] if self.plan["refused"] else []

    def _source(self):
        share = self.share
        epoch = "" if share["epoch"] is None else "epoch %s, " % share["epoch"]
        said = "The live source, %s (%s%s, %s old when it was read), " % (
            share["source"],
            epoch,
            "1 VM" if share["count"] == 1 else "%d VMs" % share["count"],
            human_seconds(share["age"]),
        )
        said += self._says()
        if not share["proven"]:
            said += "; it does not prove that its list is complete"
        return [said + "."]

    def _says(self):
        vm_id, share = self.subject.vm_id, self.share
        it = "the VM %s" % vm_id
        if self._is_live and share.get("names_hosts", True):
            return "says that %s lives here" % it
        if self._is_live:
            return "lists %s; it does not say for which hosts it speaks, so the VM counts as living here" % it
        if vm_id in share["elsewhere"]:
            return "says that %s lives on %s, not here" % (it, enumerate_hosts(share["elsewhere"][vm_id]))
        if vm_id in share["tombstones"]:
            since = share["tombstones"][vm_id]
            return "says that %s was destroyed%s" % (it, "" if since is None else " %s ago" % human_seconds(since))
        return "does not list %s" % it

    def _things(self):
        resources = self.subject.resources
        if not resources:
            return []
        said = [self._thing(one) for one in resources[:MAX_THINGS]]
        if len(resources) > MAX_THINGS:
            said.append("And %d more things of it are on this host." % (len(resources) - MAX_THINGS))
        others = len(self.judged) - len(resources)
        if others > 0:
            said.append("It is judged together with %d more things of the VM %s." % (others, self.subject.vm_id))
        return said

    def _thing(self, one):
        judged = self.judged.get((one["kind"], one["name"]), {"reasons": []})
        age = one["age_seconds"]
        age = "of unknown age, which counts as young" if age is None else "%s old" % human_seconds(age)
        parts = [age, "in use" if one["in_use"] else "not in use"]
        if one["holders"]:
            parts.append("held by %s" % ", ".join("%(type)s %(name)s" % holder for holder in one["holders"][:5]))
        if one["bytes"]:
            parts.append(human_bytes(one["bytes"]))
        said = "On this host: %s %s, %s (identity %s)." % (one["kind"], one["name"], ", ".join(parts), one["identity"])
        for reason in judged["reasons"]:
            advice = REASONS.get(reason["code"], HELD_BY_SOMETHING)
            said += " It is %s: %s. %s" % (judged["verdict"], reason["text"], advice)
        return said

    def _alive(self):
        why = self.facts.get("alive", {}).get(self.subject.vm_id)
        return ["The VM is alive on this host: %s." % why] if why else []

    def _reasons(self):
        if not self.family or not self.family["reasons"]:
            return []
        texts = "; ".join(reason["text"] for reason in self.family["reasons"])
        advice = [REASONS.get(reason["code"], "") for reason in self.family["reasons"]]
        return [" ".join(["The VM is %s: %s." % (self.family["verdict"], texts)] + [one for one in advice if one])]

    # --- what is still missing

    def _strikes(self):
        if not self.family:
            return []
        known = self.facts["ledger"]["strikes"]
        mine = [known.get("%(kind)s %(name)s" % one) for one in self.judged.values()]
        strikes = [strike for strike in mine if strike]
        fewest = min(strike["strikes"] for strike in strikes) if len(strikes) == len(mine) else 0
        wanted = _of_grade(self.policy["strikes"], self.family["evidence"])
        said = "The host remembers %d of the %d strikes that are needed (reap_strikes)" % (fewest, wanted)
        latest = [strike["last"] for strike in strikes if strike["boot_id"] == self.facts["boot_id"]]
        if latest:
            said += ", the latest of %s ago; strikes are at least %s s apart (reap_strike_interval)" % (
                human_seconds(self.facts["boottime_seconds"] - max(latest)),
                "%g" % self.policy["strike_interval"],
            )
        return [said + "."]

    def _to_come(self):
        if self.plan["refused"] or not self.family or self.family["verdict"] == planner.CONFIRMED:
            return []
        found = outlook.to_come(self.facts, self.share, self.policy, self.subject.vm_id)
        if not found:
            return ["Waiting changes nothing, as long as everything else stays as it is."]
        sweeps, seconds = found
        when = "%s%s from now at the earliest" % ("the last " * (sweeps > 1), human_seconds(seconds))
        count = "1 more sweep" if sweeps == 1 else "%d more sweeps" % sweeps
        return ["If everything stays as it is, the VM is confirmed by %s, %s." % (count, when)]

    def _next_sweep(self):
        if not self.going:
            return []
        said = []
        for step, does in ((planner.ASIDE, "sets aside"), (planner.REMOVE, "removes")):
            tokens = [token for token in self.going if token.get("step", planner.REMOVE) == step]
            names = ["%(kind)s %(name)s" % token for token in tokens[:MAX_THINGS]]
            if len(tokens) > MAX_THINGS:
                names.append("and %d more" % (len(tokens) - MAX_THINGS))
            said += ["The next sweep %s, in this order: %s." % (does, ", ".join(names))] if names else []
        return said

    # --- what could not be seen

    def _kinds(self, status):
        """Return the kinds with this status, each with its reason."""
        kinds = sorted(self.facts["kinds"].items())
        return ["%s (%s)" % (kind, entry["reason"]) for kind, entry in kinds if entry["status"] == status]

    def _unavailable(self):
        lost = self._kinds("unavailable")
        said = ["Could not be read, so nothing is known of such things of it: %s." % ", ".join(lost)] if lost else []
        supervisors = sorted(self.facts.get("supervisors", {}).items())
        silent = ["%s (%s)" % (name, one["reason"]) for name, one in supervisors if one["status"] == "unavailable"]
        return said + (["Could not say whether the VM lives: %s." % ", ".join(silent)] if silent else [])

    def _out_of_sight(self):
        kinds = self.facts["kinds"]
        looked = sorted(kind for kind, entry in kinds.items() if entry["status"] == "ok")
        foreign = [kind for kind in looked if kinds[kind].get("foreign")]
        left_out = sorted(set(TRAITS) - set(kinds))
        said = [
            "Looked at: %s. Names are compared as a whole; a cgroup and a jail are called by their path."
            % (", ".join(looked) or "nothing")
        ]
        if foreign:
            said.append(
                "Of these the host has some that no rule of reap_presets matches (%s): they are foreign, and never "
                "touched." % ", ".join(foreign)
            )
        if self._kinds("absent"):
            said.append("Not on this host: %s." % ", ".join(self._kinds("absent")))
        if left_out:
            said.append("Not looked at, for want of a rule or because of reap_kinds: %s." % ", ".join(left_out))
        return said + self._unavailable()

    # --- what is remembered

    def _aside_of_it(self):
        return [held for held in self.facts["ledger"]["aside"] if self._is_meant(held)]

    def _aside(self):
        """Say of what was set aside, or waits, since when it does and how long it will."""
        said, here = [], self.facts["boot_id"]
        for held in self._aside_of_it()[:MAX_THINGS]:
            waited = human_seconds(self.facts["boottime_seconds"] - held["since"]) if held["boot_id"] == here else None
            since = "%s ago" % waited if waited else "before the last boot, and waits since that"
            if held["state"] == planner.ASIDE:
                sweep = " by the sweep %s" % held["sweep"] if held.get("sweep") else ""
                did = "was set aside %s%s" % (since, sweep)
            else:
                did = "is left where it is, confirmed %s" % since
            hold = planner.hold_of(self.policy, held["kind"], self.share, held["vm_id"])
            said.append(
                "%s %s %s. It is removed when reap_hold, %s, is over and nothing speaks against it; until then "
                "playbooks/undo.yml -e vm_id=%s brings it back."
                % (held["kind"], held["name"], did, human_seconds(hold), held["vm_id"])
            )
        return said

    def _unfinished(self):
        return [token for token in self.facts["ledger"]["intents"] if self._is_meant(token)]

    def _unseen(self):
        """Return the keys of strikes of things that are not to be seen now."""
        seen = {"%(kind)s %(name)s" % one for one in self.subject.resources}
        return [
            key
            for key, strike in sorted(self.facts["ledger"]["strikes"].items())
            if key not in seen and self._is_meant(dict(strike, name=key.partition(" ")[2]))
        ]

    def _ledger(self):
        ledger, vm_id = self.facts["ledger"], self.subject.vm_id
        said = [self.facts["ledger_problem"] + "."] if self.facts.get("ledger_problem") else []
        if vm_id in ledger["reaped"]:
            said.append("The ledger has that something of the VM was removed at %s." % utc(ledger["reaped"][vm_id]))
        if ledger["applied"]:
            said.append(_applied(ledger["applied"]))
        said += [
            "A sweep began to %s %s %s, and its end is not known: a later sweep finishes it, once nothing speaks "
            "against it."
            % ("set aside" if token.get("step") == planner.ASIDE else "remove", token["kind"], token["name"])
            for token in self._unfinished()
        ]
        unseen = self._unseen()[:MAX_THINGS]
        return said + ["The ledger has strikes of %s, which is not to be seen now." % key for key in unseen]

    def _journal(self):
        acts = {}
        for entry in self.told:
            acts.setdefault((entry["sweep"], entry["kind"], entry["name"]), {})[entry["what"]] = entry
        said = [_act(act.get(journals.INTENT), act.get(journals.OUTCOME)) for act in acts.values()]
        latches = [one for one in self.journal["entries"] if one["what"] == journals.LATCHED]
        said += ["Journal, %(time)s: all reaping in the realm was latched: %(message)s." % one for one in latches[-1:]]
        more = len(said) - MAX_TOLD
        if more > 0 or self.journal["truncated"]:
            count = "%d" % more if not self.journal["truncated"] else "more than %d" % max(more, 0)
            said = ["The journal has %s earlier acts on it." % count] + said[-MAX_TOLD:]
        if self.journal["broken"]:
            said.append("The journal is not as it was written: %s." % self.journal["broken"])
        return said


def _applied(plan):
    epoch = ", by epoch %s" % plan["epoch"] if plan.get("epoch") is not None else ""
    return "The signed plan that was applied last on this host is %s, made at %s%s." % (
        plan["plan"],
        utc(plan["made_at"]),
        epoch,
    )


STEPS = {"aside": "set aside", "bring_back": "brought back"}


def _act(intent, outcome):
    """Return what the journal says of one thing in one sweep; one of the two may be missing."""
    entry = intent or outcome
    said = "Journal, %(time)s, sweep %(sweep)s: %(kind)s %(name)s " % entry
    about = "was about to be %s, and what came of that was not written down"
    said += _came_to(outcome) if outcome else about % STEPS.get(intent.get("step"), "removed")
    if not intent:
        return said + "."
    why = "; ".join(intent["reasons"]) or intent.get("evidence") or "no reason is noted"
    basis = ["%d strikes" % intent["strikes"]] if intent.get("strikes") else []
    basis += ["the list of %s" % intent["source"]] if intent.get("source") else []
    basis += ["epoch %s" % intent["epoch"]] if "epoch" in intent else []
    basis += ["signed plan %s" % intent["plan"]] if "plan" in intent else []
    return "%s, because %s%s." % (said, why, " (%s)" % ", ".join(basis) if basis else "")


def _came_to(outcome):
    said = {
        "reaped": "was reaped",
        "set_aside": "was set aside",
        "restored": "was brought back",
        "already_gone": "was gone already",
        "deferred": "was left, because it was busy",
        "identity_changed": "was left, because another object has its name now",
        "failed": "could not be removed",
    }.get(outcome["outcome"], "came to " + outcome["outcome"])
    if outcome.get("bytes"):
        said += " and gave back %s" % human_bytes(outcome["bytes"])
    return said + (" (%s)" % outcome["message"] if outcome.get("message") else "")


def _of_grade(value, evidence):
    """Return a number of the policy, which may have one for each grade of evidence."""
    if not isinstance(value, dict):
        return value
    return value.get(evidence, value[planner.ABSENT])


