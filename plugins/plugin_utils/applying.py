# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Applies one host's share of a signed plan (see signed_plan.py): what is done is what two plans want. Pure.

The host is looked at and planned again, so that every guard of an ordinary sweep holds at the moment of the acts. Of
that new plan only those VMs go of which everything that would be done, and that anything begins at all, is in the
signed one as well, act for act. All others are withheld as a whole, and are judged and struck as in any sweep.
"""

from __future__ import annotations

import json

from . import planner
from .facts import vm_ids
from .signed_plan import FUTURE_SECONDS, IDLE, MISSING, REFUSED, UNSEEN, act_of
from .words import utc

NOT_IN_PLAN = "not_in_plan"
SPENT = "plan_spent"
APPLIED = "applied"

# How often one VM less may change what becomes of others, before all of them are left alone.
ROUNDS = 8

_ABSENT = {
    IDLE: "the plan {0} has nothing to do on this host",
    REFUSED: "this host was refused when the plan {0} was made",
    UNSEEN: "this host could not be read when the plan {0} was made",
    MISSING: "the plan {0} does not have this host",
}


def plan(facts, share, policy, kinds, within):
    """Return the PLAN of a host that may take only its share of a signed plan, ``within`` (WITHIN, see signed_plan.py).

    It has one key more, ``within: {plan, made_at, epoch, state, why}``: ``state`` is applied, plan_spent, or why the
    plan has nothing for this host. A host's ledger remembers the last plan that was applied, so that none is twice.
    """
    why = _barred(facts, within)
    acts, begins = (set(), set()) if why else (set(map(_key, within["acts"])), set(within["begins"]))
    state, text = why or (NOT_IN_PLAN, "the plan %s does not have this of the VM" % _name(within))
    # Of whatever kind the reason is, it is said with the VM: it goes with another plan, or in a sweep.
    reason = {"code": SPENT if state == SPENT else NOT_IN_PLAN, "text": text}
    withheld: dict = {}
    for _round in range(ROUNDS):
        made = planner.plan(facts, share, policy, kinds, withheld)
        beyond = {token["vm_id"] for token in made["reap"] if _key(act_of(token)) not in acts}
        beyond |= set(made["begins"]) - begins
        if not beyond:
            break
        withheld.update(dict.fromkeys(beyond, reason))
    else:
        made = planner.plan(facts, share, policy, kinds, dict.fromkeys(vm_ids(facts), reason))
    said = {key: within[key] for key in ("plan", "made_at", "epoch")}
    made = dict(made, within=dict(said, state=state if why else APPLIED, why=text if why else None))
    # What a host that is refused, or has nothing any more, does not write down it has not applied either.
    if why or made["refused"] or made["ledger"]["host"] is None:
        return made
    return dict(made, ledger=dict(made["ledger"], applied=said), ledger_changed=True)


def _barred(facts, within):
    """Return None, or ``(state, sentence)`` of why nothing of the plan is applied on the host."""
    if within["absent"]:
        return within["absent"], _ABSENT[within["absent"]].format(_name(within))
    before = facts["ledger"]["applied"]
    if before and _is_spent(before, within):
        if before["plan"] == within["plan"]:
            return SPENT, "the plan %s has been applied on this host already" % _name(within)
        return SPENT, "the plan %s was made before the plan %s, which has been applied on this host" % (
            _name(within),
            _name(before),
        )
    if within["machine_id"] != facts["machine_id"]:
        return MISSING, "the plan %s was made for another machine of this name" % _name(within)
    return None


def _is_spent(before, within):
    """What was made before the last one that was applied is spent too, unless that one is of the future: of a clock
    that was wrong."""
    is_of_the_future = before["made_at"] > within["now"] + FUTURE_SECONDS
    return before["plan"] == within["plan"] or within["made_at"] <= before["made_at"] and not is_of_the_future


def _key(act):
    return json.dumps(act, sort_keys=True)


def _name(plan_said):
    return "%s of %s" % (plan_said["plan"], utc(plan_said["made_at"]))
