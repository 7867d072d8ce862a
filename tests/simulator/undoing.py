# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The person who brings back what was set aside, by the real acts.undo(), and what must hold then."""

from __future__ import annotations

from ansible_collections.microvm.reaper.plugins.module_utils import acts
from ansible_collections.microvm.reaper.plugins.module_utils.ledger import LedgerError

from .hands import Hands, Killed
from .story import Violation
from .terms import REALM

DAYS = ("2027-01-15", "2027-01-16", "")


class _Undo:
    """What a batch and its weather are for hands that bring things back."""

    def __init__(self, killed_at, is_half_done):
        self.killed_at, self.is_half_done, self.busy = killed_at, is_half_done, None
        self.restored = []


def undo(world):
    """A person brings back what was set aside on a host, of one VM or by one sweep."""
    draws = [world.random.random() for _draw in range(5)]
    waiting = [(host, one) for host in world.hosts for one in host.everything() if one.aside_since is not None]
    if not waiting:
        return
    host, thing = min(waiting, key=lambda item: (item[1].serial * 7919 + int(draws[0] * 1000)) % 1000)
    if world.now < host.away_until:
        return
    vm_id, until = thing.vm.vm_id, DAYS[int(draws[1] * len(DAYS))]
    sweep = next((held["sweep"] for held in host.ledger["aside"] if held["vm_id"] == vm_id), None)
    if draws[2] < 0.7 or sweep is None:
        sweep = None
    world.story.tell("a person brings back %s on %s", "what %s set aside" % sweep if sweep else vm_id, host)
    trouble = _Undo((None, 2, 0)[(draws[3] < 0.2) + (draws[3] < 0.1)], draws[4] < 0.7)
    bring_back(world, host, vm_id, sweep, until, trouble)


def bring_back(world, host, vm_id, sweep, until, trouble):
    """Bring it back; raise Violation when it is not all as it must be then."""
    def is_meant(held):
        return held.get("sweep") == sweep if sweep else held["vm_id"] == vm_id

    known = [(held["kind"], held["identity"]) for held in host.ledger["aside"] if is_meant(held)]
    pinned = {held["vm_id"] for held in host.ledger["aside"] if is_meant(held)}
    meant = [
        thing
        for thing in host.everything()
        if ((thing.kind, thing.identity) in known if sweep else thing.vm.vm_id == vm_id)
        and not thing.forgotten
        and (thing.frozen or thing.serial in host.aside)
        and not (thing.serial in host.aside and _has_no_place(host, thing))
    ]
    before, world.acting = host.ledger, host
    is_killed = False
    try:
        acts.undo(is_meant, Hands(host, trouble, trouble, world), host, REALM, until)
    except LedgerError:
        return
    except Killed:
        is_killed = True
    if host.ledger is not before:
        waited = [one for one in host.things.values() if (one.kind, one.identity) in known]
        for thing in waited + [one for _host, one in trouble.restored]:
            thing.aside_since, thing.strikes, thing.first_strike, thing.last_strike = None, 0, None, -1e9
            thing.chances, thing.dead_since = 0, None
    elif not is_killed and trouble.restored and world.now >= host.full_until:
        raise Violation("undo", "what was brought back on %s is aside by its ledger" % host)
    world.restored += len(trouble.restored)
    left = [] if is_killed else [one for one in meant if one.frozen or one.serial in host.aside]
    if left:
        raise Violation("undo", "the %s on %s was not brought back" % (left[0], host))
    for one in sorted(pinned) if until else ():
        if "%s until %s" % (one, until) not in host.pins:
            raise Violation("undo", "%s was brought back on %s and is not pinned" % (one, host))


def _has_no_place(host, thing):
    """Tell whether something else has its name, in its place or aside."""
    named = [one for one in host.everything() if (one.kind, one.name) == (thing.kind, thing.name)]
    return len(named) > 1
