# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Bugs that somebody could write one day. The simulator is worth something only as long as it finds each of them.

A fault is a function that gets pytest's monkeypatch and plants itself.
"""

from __future__ import annotations

import dataclasses

from ansible_collections.microvm.reaper.plugins.module_utils import acts
from ansible_collections.microvm.reaper.plugins.plugin_utils import brake, manifest, planner

from . import disks, sweeper, world


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
    """Too many VMs: the first two are taken."""
    in_order = planner._in_order

    def first_few(tokens, kinds):
        few = sorted({token["vm_id"] for token in tokens})[:2]
        return in_order([token for token in tokens if token["vm_id"] in few], kinds)

    patch.setattr(planner, "_in_order", first_few)
    patch.setattr(planner, "_over_cap", lambda *args: None)


def there_is_no_cap(patch):
    """Any number of VMs is taken."""
    patch.setattr(planner, "_over_cap", lambda *args: None)


def an_empty_list_is_trusted(patch):
    """No VM on the list: then nothing lives."""
    refuse = planner._refuse

    def trusting(facts, share, policy):
        refused = refuse(facts, share, policy)
        return None if refused and refused["code"] in ("blind", "shrunk") and share["count"] == 0 else refused

    patch.setattr(planner, "_refuse", trusting)


def a_shrunken_list_is_trusted(patch):
    """Two of three VMs are not on the list any more: then they are gone."""
    shrunk = planner._shrunk
    patch.setattr(
        planner,
        "_shrunk",
        lambda remembered, share, policy: shrunk(dict(remembered, count=None, counts={}), share, policy),
    )


def only_the_sum_is_counted(patch):
    """One of several sources may list nothing while the others list enough."""
    shrunk = planner._shrunk
    patch.setattr(
        planner,
        "_shrunk",
        lambda remembered, share, policy: shrunk(dict(remembered, counts={}), share, policy),
    )


def a_clone_hides_why(patch):
    """A host with the machine id of another is refused for that, whatever else it was refused for."""
    real = brake.brake

    def hiding(plans, *rest):
        clones = brake._clones(plans)
        hidden = {host: dict(plan, refused=clones.get(host) or plan["refused"]) for host, plan in plans.items()}
        return real(hidden, *rest)

    patch.setattr(brake, "brake", hiding)


def a_latch_makes_a_stranger_known(patch):
    """A ledger that was written counts as one of this realm, whatever is in it."""
    real = planner._stranger

    def trusting(facts, policy):
        refused = real(facts, policy)
        written = facts["ledger"]["generation"] and facts["ledger"]["host"] is None
        return None if written else refused

    patch.setattr(planner, "_stranger", trusting)


def a_killed_reaper_is_forgotten(patch):
    """What a reaper was about to remove is remembered only when it comes to its end."""
    real = acts.begun
    patch.setattr(
        acts, "begun", lambda ledger, tokens: dict(real(ledger, tokens), reaped=ledger["reaped"])
    )


def a_lower_epoch_is_accepted(patch):
    """A stale copy is as good as any."""
    patch.setattr(planner, "_stale_copy", lambda remembered, share: None)


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

    carry_out = sweeper.Sweeper.carry_out

    def and_write(self, host, plan, batch, weather):
        carry_out(self, host, plan, batch, weather)
        if batch.check_mode and host not in batch.refused and plan["ledger_changed"]:
            plan = dict(plan, reap=[])
            self.apply(host, plan, batch, sweeper.Hands(host, batch, weather, self.world))

    patch.setattr(sweeper.Sweeper, "carry_out", and_write)


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
    check = manifest.check

    def one_end(document, *args, **named):
        vms = [dict(vm, also_on=[]) for vm in document["vms"]]
        return check(dict(document, vms=vms), *args, **named)

    patch.setattr(manifest, "check", one_end)


def holders_do_not_count(patch):
    """What somebody refers to goes all the same."""
    patch.setattr(planner, "_hold_back", lambda going: False)
    a_container_takes_its_snapshot_along(patch)


def one_look_is_enough(patch):
    """Neither a second strike nor time is asked for."""
    complete_policy = planner.complete_policy
    once = dict.fromkeys(planner.GRADES, 1)
    patch.setattr(planner, "complete_policy", lambda policy: dict(complete_policy(policy), strikes=once, min_age=0))


def intents_are_lost(patch):
    """What was cut short is never finished."""
    patch.setattr(planner._Ladder, "_begun", lambda self, token: None)


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
    patch.setattr(acts, "settled", lambda ledger, *rest: settled(dict(ledger, intents=[]), *rest))


def names_hide_what_is_half_removed(patch):
    """An intent is dropped when another object has its name: the bug that this simulator found first."""
    begun = planner._Ladder._begun

    def by_name(self, token):
        if planner._key(token) not in self.present:
            begun(self, token)

    patch.setattr(planner._Ladder, "_begun", by_name)


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


def nothing_latches(patch):
    """A VM that was reaped and lives is nobody's business."""
    patch.setattr(planner, "_false_positive", lambda *args: None)


def the_latch_does_not_spread(patch):
    """Only the host that found it stops."""
    real = brake.brake

    def alone(plans, *rest):
        abort, refused = real(plans, *rest)
        return abort, {host: one for host, one in refused.items() if plans[host]["refused"]}

    patch.setattr(brake, "brake", alone)


def the_latch_clears_itself(patch):
    """What the ledger remembers of a latch is not looked at."""
    real = planner.plan

    def forgetful(facts, *rest):
        return real(dict(facts, ledger=dict(facts["ledger"], latch=None)), *rest)

    patch.setattr(planner, "plan", forgetful)


def what_was_reaped_is_forgotten(patch):
    """No host remembers what it removed."""
    patch.setattr(acts, "_reaped", lambda *args: {})


def what_lives_elsewhere_counts_as_reaped(patch):
    """A VM that left its things behind and comes back is taken for a false positive."""
    patch.setattr(planner._Judge, "evidence_of", lambda self, member: self._evidence(member["vm_id"]))


def what_was_spent_is_forgotten(patch):
    """Each batch has the caps of the run for itself."""
    real = brake.brake
    patch.setattr(brake, "brake", lambda plans, caps, before: real(plans, caps))


def there_is_no_cap_of_the_fleet(patch):
    """Any number of VMs is taken in one run."""
    patch.setattr(brake, "_over_cap", lambda *args: None)


def the_unproven_is_reaped(patch):
    """A list without proof is as good as one with it."""
    patch.setattr(
        planner._Judge,
        "_evidence",
        lambda self, vm_id: planner.TOMBSTONED if vm_id in self.share["tombstones"] else planner.ABSENT,
    )


def one_proof_is_enough(patch):
    """Of several sources one proves for all."""
    real = manifest.union
    patch.setattr(
        manifest, "union", lambda manifests: dict(real(manifests), proven=any(one["proven"] for one in manifests))
    )


def the_first_source_is_enough(patch):
    """Of several sources only the first counts."""
    real = manifest.union
    patch.setattr(manifest, "union", lambda manifests: real(manifests[:1]))


def a_source_that_fails_is_skipped(patch):
    """No source is required."""
    real = sweeper.fetch
    patch.setattr(
        sweeper,
        "fetch",
        lambda answers, wall: real(
            [(dataclasses.replace(source, required=False), document) for source, document in answers], wall
        ),
    )


def a_tombstone_beats_life(patch):
    """What was destroyed once is dead, whoever has the id now."""
    real = manifest.union

    def morbid(manifests):
        joined = real(manifests)
        dead = {vm_id for one in manifests for vm_id in one["tombstones"]}
        return dict(joined, vms={vm_id: hosts for vm_id, hosts in joined["vms"].items() if vm_id not in dead})

    patch.setattr(manifest, "union", morbid)


def a_host_left_out_counts_as_empty(patch):
    """What the list does not speak for has no VMs."""
    real = planner._untrusted
    patch.setattr(
        planner, "_untrusted", lambda facts, share, *rest: real(facts, dict(share, host_known=True), *rest)
    )


def strangers_are_adopted(patch):
    """Another name, machine or realm is taken as it comes."""
    patch.setattr(planner, "_stranger", lambda *args: None)


def clones_are_accepted(patch):
    """Two hosts may be the same machine."""
    patch.setattr(brake, "_clones", lambda plans: {})


def ages_by_the_wall_clock(patch):
    """A host tells time by a clock that can be set."""
    real = world.Host.facts

    def by_wall(self, now, unavailable):
        facts = real(self, now, unavailable)
        facts["boottime_seconds"] = max(0.0, facts["boottime_seconds"] + self.skew)
        for entry in facts["kinds"].values():
            for one in entry["resources"]:
                if one["age_seconds"] is not None:
                    one["age_seconds"] = max(0.0, one["age_seconds"] + self.skew)
        return facts

    patch.setattr(world.Host, "facts", by_wall)


def the_boot_is_forgotten(patch):
    """Instants of the boot clock before a reboot are taken for instants after it."""
    real = world.Host.facts
    patch.setattr(world.Host, "facts", lambda self, *args: dict(real(self, *args), boot_id="boot"))


def pins_are_ignored(patch):
    """Nobody can have a VM left alone."""
    patch.setattr(planner._Judge, "pin", lambda self, vm_id: None)


def pins_end_a_day_early(patch):
    """The day that a pin names is not a day of it."""
    real = planner.pin

    def early(text):
        one = real(text)
        return dict(one, until=one["until"] and one["until"] - 86400) if isinstance(text, str) else one

    patch.setattr(planner, "pin", early)


def garbled_pins_are_ignored(patch):
    """A line of a pin file that cannot be understood pins nothing."""
    real = planner._lenient_pin

    def strict(line):
        one = real(line)
        return one if one["until"] or line == one["pattern"] else {"pattern": "", "until": None}

    patch.setattr(planner, "_lenient_pin", strict)


def reaped_without_remembering(patch):
    """A ledger that cannot be written is no reason to stop."""
    real = disks.Disks.save

    def save(self, host, realm, ledger):
        try:
            return real(self, host, realm, ledger)
        except acts.ledgers.LedgerError:
            return dict(ledger)

    patch.setattr(disks.Disks, "save", save)


def strikes_come_at_once(patch):
    """No time has to pass between two strikes."""
    _with_policy(patch, strike_interval=0, min_age=0)


def whatever_runs_is_ended(patch):
    """Nothing is left alone because it runs."""
    patch.setattr(planner, "is_permitted", lambda running, evidence: True)


def what_lives_again_is_reaped(patch):
    """What the sources list when they are asked once more is not heard."""
    patch.setattr(brake, "live_again", lambda plans, listed, any_host_protects: {})


def nobody_waits(patch):
    """What is confirmed goes at once."""
    _with_policy(patch, hold={planner.ANY_KIND: dict.fromkeys(planner.GRADES, 0)})


def the_hold_begins_with_the_first_strike(patch):
    """The time that strikes take is counted as time aside."""
    real = acts.settled

    def early(ledger, tokens, outcomes, moment):
        after = real(ledger, tokens, outcomes, moment)
        for held in after["aside"]:
            strike = ledger["strikes"].get(acts._key(held))
            if strike and held["since"] == moment["since"]:
                held["since"] = strike["first"]
        return after

    patch.setattr(acts, "settled", early)


def what_is_aside_goes_though_the_vm_lives(patch):
    """Only what is in its place is protected by the list."""
    _with_judge(patch, live=frozenset())


def what_is_aside_goes_though_it_is_pinned(patch):
    """Only what is in its place is protected by pins."""
    _with_judge(patch, pin=lambda vm_id: None)


def what_was_set_aside_is_forgotten_after_a_kill(patch):
    """Only a removal that was cut short is remembered."""
    begun = planner._Ladder._begun

    def forgetful(self, token):
        if token.get("step") != planner.ASIDE and "since" not in token:
            begun(self, token)

    patch.setattr(planner._Ladder, "_begun", forgetful)


def a_reboot_does_not_begin_the_hold_anew(patch):
    """Since when something is aside is told by the clock of another boot."""
    place = planner._Ladder._place
    patch.setattr(planner._Ladder, "_place", lambda self, held: place(self, dict(held, boot_id=self.boot_id)))


def pressure_takes_the_newest(patch):
    """Where it is full, what was set aside last goes first."""
    real = planner._Ladder._under_pressure

    def reversed_(self):
        kept = self.moved, self.in_place
        self.moved = [dict(held, since=-held["since"]) for held in self.moved]
        self.in_place = {key: dict(held, since=-held["since"]) for key, held in self.in_place.items()}
        found = real(self)
        self.moved, self.in_place = kept
        return found

    patch.setattr(planner._Ladder, "_under_pressure", reversed_)


def pressure_takes_all(patch):
    """Where it is full, nothing waits."""
    real = planner._Ladder._under_pressure

    def greedy(self):
        found = real(self)
        pressed = {key.split()[0] for key, _identity in found}
        everything = [*self.moved, *self.in_place.values()]
        return {planner._object(held): "it is full" for held in everything if held["kind"] in pressed}

    patch.setattr(planner._Ladder, "_under_pressure", greedy)


def undo_does_not_pin(patch):
    """What is brought back is left to the next sweep."""
    patch.setattr(disks.Disks, "pin", lambda *args: None)


def undo_forgets_what_it_left(patch):
    """What cannot be brought back is dropped from the ledger."""
    real = acts.undo

    def forgetful(is_meant, hands, host, *rest):
        outcomes = real(is_meant, hands, host, *rest)
        host.ledger = dict(host.ledger, aside=[held for held in host.ledger["aside"] if not is_meant(held)])
        return outcomes

    patch.setattr(acts, "undo", forgetful)


def undo_does_not_see_what_a_killed_reaper_left(patch):
    """Only a reaper that came to its end can be undone: found by this simulator."""
    patch.setattr(acts, "_can_come_back", lambda ledger: ledger["aside"])


def the_caps_count_twice(patch):
    """What is aside is counted again when it goes."""
    real = planner._Ladder.finish

    def again(self):
        tokens = real(self)
        self.begins = sorted({*self.begins, *(token["vm_id"] for token in tokens)})
        return tokens

    patch.setattr(planner._Ladder, "finish", again)


def the_caps_do_not_count_what_is_set_aside(patch):
    """Nothing is lost yet, so any number may be set aside."""
    real = planner._Ladder.climb

    def uncounted(self, going):
        tokens = real(self, going)
        removed = {token["vm_id"] for token in tokens if token["step"] == planner.REMOVE}
        self.begins = [vm_id for vm_id in self.begins if vm_id in removed]
        return tokens

    patch.setattr(planner._Ladder, "climb", uncounted)


def a_container_takes_its_snapshot_along(patch):
    """A container without a hold goes at once, and its snapshot with it."""
    patch.setattr(planner._Ladder, "_wait_for_each_other", lambda *args: False)


def a_container_takes_along_what_was_not_seen(patch):
    """What could not be read does not wait: found by this simulator."""
    patch.setattr(planner._Ladder, "_takes_unseen", lambda *args: False)


def a_frozen_vm_that_lives_is_forgotten(patch):
    """What lives has nothing to wait for, and stays frozen."""
    real = planner._Ladder.climb

    def forgetful(self, going):
        tokens = real(self, going)
        living = [held for held in self.in_place.values() if held["vm_id"] in self.judge.live]
        self.aside = [held for held in self.aside if held not in living]
        return tokens

    patch.setattr(planner._Ladder, "climb", forgetful)


def what_was_set_aside_does_not_latch(patch):
    """Only what was removed proves a false positive."""
    real = acts._reaped
    patch.setattr(
        acts,
        "_reaped",
        lambda before, tokens: real(before, [token for token in tokens if token.get("step") != planner.ASIDE]),
    )


def names_hide_what_is_aside(patch):
    """What is aside is dropped when another object has its name."""
    place = planner._Ladder._place

    def by_name(self, held):
        if self.present.get(planner._key(held)) in (None, held["identity"]):
            place(self, held)

    patch.setattr(planner._Ladder, "_place", by_name)


def _with_judge(patch, **changes):
    """Have the ladder see another judge where it looks at what speaks against a removal."""
    real = planner._Ladder._speaks_against

    def blind(self, token):
        before = {key: self.judge.__dict__.get(key) for key in changes}
        self.judge.__dict__.update(changes)
        try:
            return real(self, token)
        finally:
            for key, value in before.items():
                if value is None:
                    del self.judge.__dict__[key]
                else:
                    self.judge.__dict__[key] = value

    patch.setattr(planner._Ladder, "_speaks_against", blind)


def _with_policy(patch, **changes):
    real = planner.complete_policy
    patch.setattr(planner, "complete_policy", lambda policy: dict(real(policy), **changes))


FAULTS = [
    strikes_are_not_cleared,
    identity_by_name,
    the_cap_shortens_the_plan,
    there_is_no_cap,
    an_empty_list_is_trusted,
    a_shrunken_list_is_trusted,
    a_lower_epoch_is_accepted,
    only_the_sum_is_counted,
    a_clone_hides_why,
    a_latch_makes_a_stranger_known,
    a_killed_reaper_is_forgotten,
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
    nothing_latches,
    the_latch_does_not_spread,
    the_latch_clears_itself,
    what_was_reaped_is_forgotten,
    what_lives_elsewhere_counts_as_reaped,
    what_was_spent_is_forgotten,
    there_is_no_cap_of_the_fleet,
    the_unproven_is_reaped,
    one_proof_is_enough,
    the_first_source_is_enough,
    a_source_that_fails_is_skipped,
    a_tombstone_beats_life,
    a_host_left_out_counts_as_empty,
    strangers_are_adopted,
    clones_are_accepted,
    ages_by_the_wall_clock,
    the_boot_is_forgotten,
    pins_are_ignored,
    pins_end_a_day_early,
    garbled_pins_are_ignored,
    reaped_without_remembering,
    strikes_come_at_once,
    whatever_runs_is_ended,
    what_lives_again_is_reaped,
    nobody_waits,
    the_hold_begins_with_the_first_strike,
    what_is_aside_goes_though_the_vm_lives,
    what_is_aside_goes_though_it_is_pinned,
    what_was_set_aside_is_forgotten_after_a_kill,
    a_reboot_does_not_begin_the_hold_anew,
    pressure_takes_the_newest,
    pressure_takes_all,
    undo_does_not_pin,
    undo_forgets_what_it_left,
    undo_does_not_see_what_a_killed_reaper_left,
    the_caps_count_twice,
    the_caps_do_not_count_what_is_set_aside,
    a_container_takes_its_snapshot_along,
    a_container_takes_along_what_was_not_seen,
    a_frozen_vm_that_lives_is_forgotten,
    what_was_set_aside_does_not_latch,
    names_hide_what_is_aside,
]

# From 0 on these are found late or beyond 10,000 sweeps, because rare things have to meet; from these seeds at once.
# Whoever changes the model may have to look for others: simulate(100000, 0) with the bug planted names one.
SEEDS = {
    only_the_sum_is_counted: 613496683501,
    a_clone_hides_why: 398419449110,
    a_latch_makes_a_stranger_known: 992104218676,
    a_killed_reaper_is_forgotten: 1020655407669,
    an_incomplete_list_is_trusted: 767139045693,
    intents_are_lost: 799386231694,
    unfinished_is_forgotten: 808720281895,
    names_hide_what_is_half_removed: 808720281895,
    what_was_spent_is_forgotten: 799386231694,
    one_proof_is_enough: 667751427166,
    a_source_that_fails_is_skipped: 478233397405,
    the_boot_is_forgotten: 1026143361567,
    what_lives_again_is_reaped: 198876468739,
    ages_by_the_wall_clock: 881430398223,
    what_is_aside_goes_though_the_vm_lives: 642106840667,
    a_reboot_does_not_begin_the_hold_anew: 966278520653,
    pressure_takes_the_newest: 1026143361567,
    pressure_takes_all: 1026143361567,
    undo_does_not_see_what_a_killed_reaper_left: 815401438528,
    the_caps_count_twice: 509620678325,
    a_container_takes_along_what_was_not_seen: 61111570717,
    a_frozen_vm_that_lives_is_forgotten: 289373877581,
    the_unproven_is_reaped: 305520757495,
}
