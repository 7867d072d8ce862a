# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Carries out one host's plan: every act on its own, in order, none forced, none that stops another.

The ledger is written twice: before the first act, with the strikes and with the tokens as intents, and after the last
one, with what is left of them. A reaper that is killed between leaves its intents, and the next sweep finishes them.
The journal is written at the same times, for people, when there is anything to remove.
"""

from __future__ import annotations

import itertools
import time

from . import journal as journals
from . import ledger as ledgers
from . import resource as r
from .probe import DeadlineExceeded, ProbeError, Worker, boottime

ACT_SECONDS = 30.0
TOGETHER = 50  # tokens of which a kind is told at once; of one that does not answer nobody knows which it did
BRING_BACK = "bring_back"


class Hands:
    """Does the acts of a plan, those of each kind one after the other in a child that can be abandoned."""

    def __init__(self, rules, host, kinds):
        self.rules = rules
        self.host = host
        self.kinds = {kind.KIND: kind for kind in kinds}
        self.workers = {}
        self.hung = {}

    def __enter__(self):
        return self

    def __exit__(self, *_exception):
        for worker in self.workers.values():
            worker.close()

    def do(self, act, token):
        """Return what a function of the kind, see all_kinds.py, says of the token, whatever happens to it."""
        kind = token["kind"]
        why = self._no_more(kind)
        if why:
            deferred = r.outcome(token, r.DEFERRED, "not tried: %s" % why)
            return dict(deferred, unfinished=True) if token.get("resume") else deferred
        try:
            return self._call(kind, act, token)
        except DeadlineExceeded as err:
            failed = r.outcome(token, r.FAILED, "%s hung: %s" % (act, err))
        except (ProbeError, OSError) as err:
            failed = r.outcome(token, r.FAILED, str(err))
        # Nobody knows how far an act came that did not answer, so it stays an intent.
        return dict(failed, unfinished=True) if act in ("remove", "set_aside") else failed

    def do_all(self, act, tokens):
        """Yield what do() says of each of the tokens, which are all of one kind, done together where the kind can."""
        can, left = hasattr(self.kinds[tokens[0]["kind"]], act + "_all"), list(tokens)
        while left:
            answers = self._together(act, left[: TOGETHER if can else 1])
            yield from answers
            del left[: len(answers)]

    def _together(self, act, tokens):
        """Return what came of the first of the tokens, of at least one.

        Those that a kind began with and did not answer for are the first of the next call, or hang with it.
        """
        kind = tokens[0]["kind"]
        if len(tokens) > 1 and not self._no_more(kind):
            try:
                answers = self._call(kind, act + "_all", tokens)
                if 0 < len(answers) <= len(tokens):
                    return answers
            except DeadlineExceeded as err:
                message = "%s hung, of this one or of another of %d: %s" % (act, len(tokens), err)
                return [dict(r.outcome(token, r.FAILED, message), unfinished=True) for token in tokens]
            except (ProbeError, OSError):
                pass  # perhaps because of one of them: each on its own, it stops no other
        return [self.do(act, token) for token in tokens]

    def _no_more(self, kind):
        """Return why nothing of the kind is tried any more in this sweep, or None."""
        if boottime() > self.host.deadline:
            return "the time of this sweep (reap_deadline) is over"
        return self.hung.get(kind)

    def prepare(self, tokens):
        """Return the tokens with what their kinds add, before an act, to prove after a crash what they were."""
        added = {}
        for kind, module in self.kinds.items():
            mine = [token for token in tokens if token["kind"] == kind]
            if mine and hasattr(module, "prepare"):
                try:
                    added[kind] = self._call(kind, "prepare", mine)
                except (ProbeError, OSError):
                    pass  # without it a removal that is cut short has to be finished by a person
        return [
            dict(token, details=dict(token["details"], **added.get(token["kind"], {}).get(token["name"], {})))
            for token in tokens
        ]

    def _call(self, kind, act, argument):
        if kind not in self.workers:
            self.workers[kind] = Worker(self._work)
        try:
            return self.workers[kind].call([kind, act, argument], min(ACT_SECONDS, self.host.remaining()))
        except DeadlineExceeded:
            # Whatever holds this one up may hold up all of its kind: leave the kind alone for this sweep.
            self.hung[kind] = "an earlier act on a %s of this sweep hung" % kind
            raise
        finally:
            if self.workers[kind].is_gone:
                del self.workers[kind]

    def _work(self, item):
        kind, act, argument = item
        return getattr(self.kinds[kind], act)(argument, self.rules.get(kind) or [], self.host)


def carry_out(tokens, hands, order, tell=lambda outcome: None):
    """Do all acts of a plan: end what runs first, then go on in order. Returns one OUTCOME for each token.

    ``tell`` hears each outcome as soon as it is known.
    """
    tokens = sorted(tokens, key=lambda token: order.index(token["kind"]))
    refused = {}
    for token in tokens:
        if token["stop"]:
            refused[_key(token)] = hands.do("stop", token)
    outcomes = []
    for (_kind, act), run in itertools.groupby(tokens, lambda token: (token["kind"], _act(token, refused))):
        some = [dict(token, stop=False) for token in run]
        for one in hands.do_all(act, some) if act else [_ended(token, refused) for token in some]:
            outcomes.append(one)
            tell(one)
    return outcomes


def _act(token, refused):
    """Return the act that a token still needs, None when to end what ran in it, or not to be able to, was all."""
    if refused.get(_key(token)):
        return None
    if _step_of(token) == r.REMOVE:
        return "remove"
    return None if token["stop"] else "set_aside"


def _ended(token, refused):
    # What is stopped waits where it is.
    ended = dict(r.outcome(token, r.SET_ASIDE, "ended; the rest goes with what it holds"), waits=True)
    return refused.get(_key(token)) or ended


def _step_of(token):
    """Return the step of a token; one of a ledger that knew no ladder is to be removed."""
    return token.get("step", r.REMOVE)


def foresee(tokens, hands):
    """Return the OUTCOMEs of check mode: what would be done, as far as looking can tell. Changes nothing."""
    going = {_key(token) for token in tokens}
    stopping = {token["vm_id"] for token in tokens if token["stop"]}
    return [_foreseen(token, hands.do("inspect", token), going, stopping) for token in tokens]


def spared(plan, spare, because="spared"):
    """Return the plan without the VMs in ``spare``, ``{vm_id: why}``, and the OUTCOMEs of what it does not do then.

    A removal that was begun in an earlier sweep is remembered on.
    """
    left = [token for token in plan["reap"] if token["vm_id"] in spare]
    ledger = _remembering(plan["ledger"], [one for one in left if one.get("resume") or "since" in one])
    going = [token for token in plan["reap"] if token["vm_id"] not in spare]
    outcomes = [r.outcome(token, r.DEFERRED, "%s: %s" % (because, spare[token["vm_id"]])) for token in left]
    return dict(plan, reap=going, ledger=ledger), outcomes


def _foreseen(token, found, going, stopping):
    """What is in the way only until an earlier act of the plan is not in the way."""
    would = r.outcome(token, r.WOULD_REAP if _step_of(token) == r.REMOVE else r.WOULD_SET_ASIDE)
    if found is None:
        return would
    goes_first = found["holders"] and all("kind" in holder and _key(holder) in going for holder in found["holders"])
    if found["outcome"] == r.DEFERRED and (goes_first or token["vm_id"] in stopping):
        return would
    return found


def apply(plan, hands, state_dir, realm, tell=lambda problem: None, sweep=None, evidence=None):
    """Carry out ``plan`` under the host's lock; return the outcomes. Raises Busy or LedgerError before any act.

    ``tell`` hears, after the acts, what of them could not be written down. ``sweep`` is the id of the sweep,
    ``evidence`` an evidence.Evidence, or None where none is to be kept.
    """
    with ledgers.Lock(state_dir):
        ledger = ledgers.load(state_dir, realm)[0]
        if ledger["generation"] != plan["generation"]:
            raise ledgers.Busy(
                "another reaper has written this host's ledger since the plan was made (generation %d, now %d)"
                % (plan["generation"], ledger["generation"])
            )
        journal = journals.Journal(state_dir, realm, sweep)
        lacking = evidence.take(plan, hands, journal.sweep) if evidence else {}
        plan, left = spared(plan, lacking, "no evidence")
        tokens = hands.prepare(plan["reap"])
        try:
            journal.intents(plan, tokens)
            decided = dict(ledger, **plan["ledger"])
            saved = ledgers.save(state_dir, realm, begun(decided, tokens))
        except ledgers.LedgerError as err:
            raise ledgers.LedgerError(
                "%s; nothing was removed, because a sweep that cannot remember must not reap" % err
            ) from err
        if not tokens:
            return left
        with journal.writing(tell):
            outcomes = carry_out(tokens, hands, list(hands.kinds), journal.outcome)
        # What was done has to be told even if it cannot be written down: the intents stay, the next sweep settles them.
        moment = {"since": round(boottime(), 3), "boot_id": hands.host.boot_id, "sweep": journal.sweep}
        after = settled(dict(decided, generation=saved["generation"]), tokens, outcomes, moment)
        try:
            ledgers.save(state_dir, realm, after)
        except ledgers.LedgerError as err:
            tell("what was done could not be written down: %s" % err)
        if evidence:
            evidence.follow(outcomes)
        return outcomes + left


def undo(is_meant, hands, state_dir, realm, until, tell=lambda problem: None):
    """Bring back what the ledger has aside, or may have, and ``is_meant(HELD)`` tells; return the outcomes.

    Its VMs are pinned first, in the host's pin file, until the day ``until`` if there is one, or the next sweeps would
    set them aside again. A reaper that is killed meanwhile leaves what it brought back pinned, the rest where it was.
    """
    with ledgers.Lock(state_dir):
        ledger = ledgers.load(state_dir, realm)[0]
        meant = [held for held in _can_come_back(ledger) if is_meant(held)]
        if not meant:
            return []
        if until:
            ledgers.pin(state_dir, sorted({held["vm_id"] for held in meant}), until)
        journal = journals.Journal(state_dir, realm)
        journal.intents({}, [dict(held, step=BRING_BACK) for held in meant])
        # What was taken away last is the first to come back.
        meant.sort(key=lambda held: -list(hands.kinds).index(held["kind"]))
        with journal.writing(tell):
            outcomes = []
            for held in meant:
                outcomes.append(_bring_back(held, hands))
                journal.outcome(outcomes[-1])
        settled_ones = (r.RESTORED, r.ALREADY_GONE, r.IDENTITY_CHANGED)
        back = {_object(held): None for held, one in zip(meant, outcomes) if one["outcome"] in settled_ones}
        keys = {key for key, _identity in back}
        after = dict(
            ledger,
            aside=[held for held in ledger["aside"] if _object(held) not in back],
            intents=[token for token in ledger["intents"] if _object(token) not in back],
            strikes={key: strike for key, strike in ledger["strikes"].items() if key not in keys},
        )
        try:
            ledgers.save(state_dir, realm, after)
        except ledgers.LedgerError as err:
            tell("what was brought back could not be written down: %s" % err)
        return outcomes


def foresee_undo(is_meant, state_dir, realm):
    """Return the outcomes of undo() in check mode. Changes nothing."""
    ledger = ledgers.load(state_dir, realm)[0]
    return [r.outcome(held, r.WOULD_RESTORE) for held in _can_come_back(ledger) if is_meant(held)]


def _can_come_back(ledger):
    """Return what is aside, and what a reaper that was killed had set aside or was about to.

    No sweep may have settled that since: where the VM lives, the host is latched and its ledger stays as it is.
    """
    begun = [dict(_held_again(token), state=r.ASIDE) for token in ledger["intents"] if _may_be_aside(token)]
    return ledger["aside"] + begun


def _may_be_aside(token):
    return token["state"] == r.ASIDE if "since" in token else token.get("step") == r.ASIDE and not token["stop"]


def _bring_back(held, hands):
    if held["state"] == "waiting":
        return r.outcome(held, r.RESTORED, "it had not been touched")
    return hands.do(BRING_BACK, dict(held, resume=True))


def begun(ledger, tokens):
    """Return the ledger that a plan decided on before the acts: with all that is about to be done."""
    return dict(ledger, intents=ledger["intents"] + tokens, reaped=_reaped(ledger["reaped"], tokens))


def settled(ledger, tokens, outcomes, moment):
    """Return the ledger that a plan decided on after the acts: without the strikes of what is gone, with what was set
    aside, with what is left to finish, and with the VMs of which something went.

    ``moment`` is ``{since, boot_id, sweep}`` of what was set aside.
    """
    by_key = {_key(one): one for one in outcomes}
    gone, moved, done, aside, unfinished = set(), set(), [], [], []
    for token in tokens:
        key, one = _key(token), by_key[_key(token)]
        is_set_aside, waits = one["outcome"] == r.SET_ASIDE, one.get("waits")
        if is_set_aside and not (waits or one.get("in_sight")):
            moved.add(key)
        # Of what is not finished nobody knows how far it came.
        if is_set_aside or one["outcome"] == r.REAPED or one.get("unfinished"):
            done.append(token)
        if one["outcome"] in (r.REAPED, r.ALREADY_GONE, r.IDENTITY_CHANGED):
            gone.add(key)
        elif is_set_aside or waits:
            aside.append(held_of(token, moment, "waiting" if waits else "aside"))
        elif one.get("unfinished") or "since" in token:
            unfinished.append(token)
    after = _remembering(ledger, unfinished)
    return dict(
        after,
        strikes={key: strike for key, strike in ledger["strikes"].items() if key not in gone | moved},
        aside=after["aside"] + aside,
        reaped=_reaped(ledger["reaped"], done),
    )


def held_of(token, moment, state):
    """Return the HELD, see ledger.py, of a token that was set aside or waits where it is."""
    return dict(_held_again(token), state=state, **moment)


def _remembering(ledger, tokens):
    """Return the ledger with tokens that are to be done later: what was aside before still is."""
    return dict(
        ledger,
        intents=ledger["intents"] + [token for token in tokens if "since" not in token],
        aside=ledger["aside"] + [_held_again(token) for token in tokens if "since" in token],
    )


def _held_again(token):
    return {key: value for key, value in token.items() if key not in r.OF_A_PLAN}


def latch(refusal, state_dir, realm):
    """Remember that nothing more is to be removed in the realm; see ledger.py."""
    with ledgers.Lock(state_dir):
        ledger = ledgers.load(state_dir, realm)[0]
        if ledger["latch"] is None:
            ledgers.save(state_dir, realm, dict(ledger, latch=refusal))
            journals.Journal(state_dir, realm).latched(refusal["message"])


def _reaped(before, tokens):
    """Remember the VMs of which something went because they live nowhere, the latest MAX_REAPED of them.

    One that lives on another host may come back to this one; it proves nothing.
    """
    now = round(time.time())
    gone = {token["vm_id"]: now for token in tokens if token.get("evidence") != r.ELSEWHERE}
    latest = sorted(dict(before, **gone).items(), key=lambda item: item[1], reverse=True)
    return dict(latest[: ledgers.MAX_REAPED])


def _key(item):
    return "%s %s" % (item["kind"], item["name"])


def _object(item):
    return _key(item), item["identity"]
