# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Bugs that somebody could write one day. The simulator is worth something only as long as it finds each of them.

A fault is a function that gets pytest's monkeypatch and plants itself.
"""

from __future__ import annotations

from ansible_collections.microvm.reaper.plugins.module_utils import acts
from ansible_collections.microvm.reaper.plugins.plugin_utils import manifest, planner

from . import sweeper


def strikes_are_not_cleared(patch):
    """A VM that is seen live keeps the strikes of its things."""
    judge = planner._Judge
    keep = judge.keep_unseen_strikes

    def forgetful(self):
        keep(self)
        before = self.facts["ledger"]["strikes"].items()
        self.strikes.update({key: strike for key, strike in before if strike["vm_id"] in self.live})

    patch.setattr(judge, "keep_unseen_strikes", forgetful)


def identity_by_name(patch):
    """A strike is believed of whatever has the name now."""
    judge = planner._Judge
    strike = judge._strike

    def careless(self, member, *enough):
        before = self.facts["ledger"]["strikes"].get(planner._key(member))
        if before:
            before["identity"] = member["identity"]
        return strike(self, member, *enough)

    patch.setattr(judge, "_strike", careless)


def the_cap_shortens_the_plan(patch):
    """Too many VMs: the first few are taken."""
    in_order = planner._in_order

    def first_few(tokens, kinds):
        few = sorted({token["vm_id"] for token in tokens})[: sweeper.POLICY["max_per_host"]]
        return in_order([token for token in tokens if token["vm_id"] in few], kinds)

    patch.setattr(planner, "_in_order", first_few)


def there_is_no_cap(patch):
    """Any number of VMs is taken."""
    patch.setattr(planner, "_over_cap", lambda families, tokens, policy: None)


def an_empty_list_is_trusted(patch):
    """No VM on the list: then nothing lives."""
    refuse = planner._refuse

    def trusting(facts, share, policy):
        refused = refuse(facts, share, policy)
        return None if refused and refused["code"] in ("blind", "shrunk") and share["count"] == 0 else refused

    patch.setattr(planner, "_refuse", trusting)


def a_shrunken_list_is_trusted(patch):
    """Two of three VMs are not on the list any more: then they are gone."""
    goes_back = planner._goes_back
    patch.setattr(
        planner,
        "_goes_back",
        lambda remembered, share, policy: goes_back(dict(remembered, count=None), share, policy),
    )


def a_lower_epoch_is_accepted(patch):
    """A stale copy is as good as any."""
    goes_back = planner._goes_back
    patch.setattr(
        planner,
        "_goes_back",
        lambda remembered, share, policy: goes_back(dict(remembered, epochs={}), share, policy),
    )


def an_incomplete_list_is_trusted(patch):
    """Neither what the list says of itself nor its count is looked at."""
    check = manifest.check
    patch.setattr(
        manifest,
        "check",
        lambda document, *args, **named: check(dict(document, complete=True, count=None), *args, **named),
    )


def unavailable_is_read_as_empty(patch):
    """What could not be read is not there."""
    patch.setattr(planner, "_unreadable", lambda facts, kind, kinds: None)
    patch.setattr(planner._Judge, "keep_unseen_strikes", lambda self: None)


def check_mode_records(patch):
    """Check mode writes its strikes down."""

    def carry_out(self, host, plan, sweep):
        if sweep.check_mode:
            plan = dict(plan, reap=[])
        self.apply(host, plan, sweep)

    patch.setattr(sweeper.Sweeper, "carry_out", carry_out)


def the_age_of_the_list_is_forgotten(patch):
    """A list of some minutes ago is believed about what is younger."""
    judge = planner._Judge
    init = judge.__init__
    patch.setattr(judge, "__init__", lambda self, facts, share, *rest: init(self, facts, dict(share, age=0.0), *rest))


def the_young_are_reaped(patch):
    """No age protects."""
    judge = planner._Judge
    init = judge.__init__

    def ageless(self, *args):
        init(self, *args)
        self.min_age = 0

    patch.setattr(judge, "__init__", ageless)


def a_migration_has_one_end(patch):
    """The other host of a migration is forgotten."""
    sorted_out = manifest._sorted_out

    def one_end(entries, *args):
        vms, dead = sorted_out(entries, *args)
        return [(vm_id, hosts[:1]) for vm_id, hosts in vms], dead

    patch.setattr(manifest, "_sorted_out", one_end)


def holders_do_not_count(patch):
    """What somebody refers to goes all the same."""
    patch.setattr(planner, "_hold_back", lambda going: False)


def one_look_is_enough(patch):
    """Neither a second strike nor time is asked for."""
    complete_policy = planner.complete_policy
    once = dict.fromkeys(planner.GRADES, 1)
    patch.setattr(planner, "complete_policy", lambda policy: dict(complete_policy(policy), strikes=once, min_age=0))


def intents_are_lost(patch):
    """What was cut short is never finished."""
    patch.setattr(planner, "_intents", lambda *args: ([], []))


def strikes_outlive_nothing(patch):
    """Every sweep begins anew: safe, and useless."""
    judge = planner._Judge
    strike = judge._strike

    def new_each_time(self, member, *enough):
        self.facts = dict(self.facts, ledger=dict(self.facts["ledger"], strikes={}))
        return strike(self, member, *enough)

    patch.setattr(judge, "_strike", new_each_time)


def unfinished_is_forgotten(patch):
    """What waits for its turn is dropped from the ledger after the acts."""
    settled = acts.settled
    patch.setattr(acts, "settled", lambda ledger, kept, *rest: settled(ledger, [], *rest))


def names_hide_what_is_half_removed(patch):
    """An intent is dropped when another object has its name: the bug that this simulator found first."""
    intents = planner._intents

    def by_name(facts, judge, families, kinds):
        present = {planner._key(one) for kind in facts["kinds"].values() for one in kind["resources"]}
        ledger = facts["ledger"]
        begun = [token for token in ledger["intents"] if planner._key(token) not in present]
        return intents(dict(facts, ledger=dict(ledger, intents=begun)), judge, families, kinds)

    patch.setattr(planner, "_intents", by_name)


def every_sweep_writes(patch):
    """A strike that counts on is news in every sweep."""
    judge = planner._Judge
    strike = judge._strike

    def restless(self, member, *enough):
        found = strike(self, member, *enough)
        counted = self.strikes[planner._key(member)]
        counted["strikes"] += 1
        return found

    patch.setattr(judge, "_strike", restless)


FAULTS = [
    strikes_are_not_cleared,
    identity_by_name,
    the_cap_shortens_the_plan,
    there_is_no_cap,
    an_empty_list_is_trusted,
    a_shrunken_list_is_trusted,
    a_lower_epoch_is_accepted,
    an_incomplete_list_is_trusted,
    unavailable_is_read_as_empty,
    check_mode_records,
    the_age_of_the_list_is_forgotten,
    the_young_are_reaped,
    a_migration_has_one_end,
    holders_do_not_count,
    one_look_is_enough,
    intents_are_lost,
    strikes_outlive_nothing,
    unfinished_is_forgotten,
    names_hide_what_is_half_removed,
    every_sweep_writes,
]
