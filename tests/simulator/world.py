# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The world as it truly is: hosts, VMs, what VMs have on hosts, and what the control plane knows, which comes later.

Everything that happens has a place, ``(step, slot)``, and chances of its own there, made from the world's seed and the
place alone. So anything can be left out and the rest stays what it was.
"""

from __future__ import annotations

import random

from ansible_collections.microvm.reaper.plugins.module_utils import ledger as ledgers
from ansible_collections.microvm.reaper.plugins.module_utils import resource as r

from .terms import LAG, PLACES, REALM

# A day ends an hour and a half after the world began, and pins that last until then with it.
DAY = 1_800_057_600.0
START = DAY - 5400.0
FLAVOURS = (("cgroup", "jail", "dm_thin"), ("container", "snapshot", "cgroup"), ("jail",))
KINDS = ("container", "snapshot", "jail", "dm_thin", "cgroup", "zombie")
# A host cannot tell the age of every kind.
AGELESS = ("jail", "snapshot")
LOST_AT_REBOOT = ("cgroup", "dm_thin", "zombie")
RUNS = ("cgroup", "container", "dm_thin")


class Thing:
    """One thing of one VM on one host. ``runaway``: something runs in it although its VM is gone.

    ``serial`` is the thing itself, which keeps it where its identity changes. ``stays``: it cannot be set aside.
    ``aside_since``: since when it truly is set aside, or waits; ``forgotten``: the ledger that knew it was lost then.
    """

    def __init__(self, kind, vm, serial, born, boot):
        self.kind, self.vm, self.born = kind, vm, born
        self.name, self.serial = "%s.%s" % (vm.vm_id, kind), serial
        self.number = vm.number * 8 + KINDS.index(kind)
        self.identity = "%d %d" % (boot, serial) if kind in LOST_AT_REBOOT else "%d" % serial
        self.runaway = False
        self.used_by = []
        self.chances, self.last_chance, self.dead_since = 0, born, None
        # The sweeps that could strike it, which are no fewer than its strikes, and on which evidence it was removed.
        self.evidence = None
        self.strikes, self.first_strike, self.last_strike = 0, None, -1e9
        self.stays, self.frozen = serial % 9 == 0, False
        self.aside_since, self.forgotten = None, False
        self.details = {"serial": serial, "place": PLACES[kind]} if kind in PLACES else {}

    def name_aside(self):
        """Return what a jail is called where it was set aside."""
        return "aside/%d/%s" % (self.serial, self.name)

    def __repr__(self):
        return "%s of %s" % (self.kind, self.vm)


class Vm:
    """One life of a VM. An id may be used again by another life. ``realm``: the control plane that it belongs to."""

    def __init__(self, number, life, host, flavour, realm=REALM):
        self.number, self.life, self.host, self.flavour, self.realm = number, life, host, flavour, realm
        self.vm_id = "v%02d" % number
        self.alive, self.running, self.is_followed = True, False, False
        self.target, self.left = None, []
        # Whether it will live again, and when it last began to.
        self.is_awaited, self.revived = False, 0.0
        self.records = []

    def __repr__(self):
        return self.vm_id if self.life == 1 else "%s (life %d)" % (self.vm_id, self.life)

    def lives_on(self, host):
        """Tell whether anything of it on this host must stay."""
        return self.alive and (host is self.host or host is self.target)

    def tell(self, when, hosts=(), state=None, destroyed_at=None):
        """From ``when`` on the control plane knows this of it; without hosts and state: nothing."""
        self.records.append((when, hosts, state, destroyed_at))

    def known(self, now):
        """Return ``(when, hosts, state, destroyed_at)``, what the control plane knows of it now, or None."""
        for record in reversed(self.records):
            if record[0] <= now:
                return record
        return None


class Host:
    """One host with its things, what was set aside of them out of sight, its half removed thin ids, and its ledger.

    ``called`` is its name in the sweep's inventory, ``known_as`` that in the control plane's lists. What follows
    ``ledger`` is what the ledger should know, kept apart from it to check it: ``bound`` name and machine, ``gone`` the
    ids of which something was removed, ``is_latched``.
    """

    def __init__(self, number, now):
        self.number, self.name = number + 1, "h%d" % number
        self.called = self.known_as = self.name
        self.machine, self.machines = "m%d" % number, 1
        self.boot, self.booted_at, self.skew = 1, now - 1000.0, 0.0
        self.things, self.half, self.aside = {}, {}, {}
        self.full = dict.fromkeys(PLACES.values(), 50.0)
        self.lacks = ()
        self.away_until = self.full_until = 0.0
        self.other_realms, self.pins = [], []
        # ``believed``: a lie that it should have seen through, by what it remembered.
        self.learned_from_a_lie, self.heard_the_truth, self.believed = False, 0.0, None
        self.lose_the_ledger()

    def __repr__(self):
        return self.name if self.called == self.name else "%s (called %s)" % (self.name, self.called)

    def lose_the_ledger(self, problem=None):
        """Begin with an empty ledger; what only the ledger knew of is nobody's any more."""
        self.ledger, self.problem = ledgers.empty(REALM), problem
        self.bound, self.gone, self.is_latched = None, set(), False
        self.half.clear()
        for thing in [*self.things.values(), *self.aside.values()]:
            thing.chances, thing.dead_since = 0, None
            thing.aside_since, thing.forgotten = None, thing.frozen or thing.kind == "jail"
        self.aside = {serial: thing for serial, thing in self.aside.items() if thing.kind == "jail"}

    def facts(self, now, unavailable):
        """Return what gather would read."""
        kinds = {
            kind: {"status": "ok", "reason": None, "resources": [], "foreign": 0}
            for kind in KINDS
        }
        for kind in self.lacks:
            kinds[kind].update(status="absent", reason="not on this host")
        for kind in unavailable:
            kinds[kind].update(status="unavailable", reason="no answer")
        for thing in self.things.values():
            if thing.kind not in unavailable:
                kinds[thing.kind]["resources"].append(self._resource(thing, now, unavailable))
        for thing in self.aside.values():
            if thing.kind == "jail" and "jail" not in unavailable:
                found = dict(self._resource(thing, now, ()), name=thing.name_aside())
                kinds["jail"]["resources"].append(dict(found, details=dict(thing.details, aside=True)))
        for kind, place in PLACES.items():
            if kind not in unavailable:
                kinds[kind]["places"] = {place: self.full[place]}
        return {
            "realm": REALM,
            "boot_id": "boot-%d" % self.boot,
            "machine_id": self.machine,
            "boottime_seconds": now - self.booted_at,
            "ledger": self.ledger,
            "ledger_problem": self.problem,
            "other_realms": self.other_realms,
            "pins": self.pins,
            "kinds": kinds,
        }

    def _resource(self, thing, now, unavailable):
        return {
            "kind": thing.kind,
            "name": thing.name,
            "vm_id": thing.vm.vm_id,
            "identity": thing.identity,
            "in_use": self.in_use(thing),
            "holders": [
                r.holder(user.kind, user.name, kind=user.kind) for user in thing.used_by if user.kind not in unavailable
            ]
            if thing.used_by
            else [],
            "age_seconds": None if thing.kind in AGELESS else now - thing.born,
            "bytes": None,
            "parent": None,
            "details": thing.details,
        }

    def in_use(self, thing):
        """Tell whether something runs in it."""
        return thing.runaway or thing.kind in RUNS and thing.vm.running and thing.vm.lives_on(self)

    def everything(self):
        """Return all there is on the host: in its place, half removed, or aside."""
        return [*self.things.values(), *self.half.values(), *self.aside.values()]

    def has_heard_of(self, vm):
        """Tell whether the host has heard the truth since all that the VM has on it must have been listed."""
        begun = [vm.revived, *(thing.born for thing in self.things.values() if thing.vm is vm)]
        return max(begun) + LAG < self.heard_the_truth

    def drop(self, thing):
        """Take a thing away, and what it used with it from its list of users."""
        del self.things[thing.kind, thing.name]
        for other in self.things.values():
            if thing in other.used_by:
                other.used_by.remove(thing)

    def put_aside(self, thing):
        """Take a thing out of sight, as it is."""
        self.drop(thing)
        self.aside[thing.serial] = thing

    def put_back(self, thing, new_identity):
        """Put what was set aside where it was. What is activated anew is another device."""
        del self.aside[thing.serial]
        if thing.kind in LOST_AT_REBOOT:
            thing.identity = "%d %d" % (self.boot, new_identity)
        self.things[thing.kind, thing.name] = thing

    def find(self, kind, name):
        """Return what is called so, in its place or aside, or None."""
        found = self.things.get((kind, name))
        if found is None and name.startswith("aside/"):
            found = self.aside.get(int(name.split("/")[1]))
        return found


class World:
    """Everything there is. ``now`` is true time; the walls of control plane and controller may show another."""

    def __init__(self, terms, story):
        self.terms, self.story = terms, story
        self.random = random.Random()
        self.now = START
        self.cp_skew = self.controller_skew = 0.0
        self.hosts = [Host(number, self.now) for number in range(terms.hosts)]
        self.vms = []
        self.keep = []
        self.mood, self.mood_until = "honest", 0.0
        self.refusals = {}
        self.restored = 0
        self.is_swept, self.acting = False, None
        self._serial = 0
        self._later = []
        story.now = lambda: self.now - START

    def chance(self, step, slot):
        """Begin the chances of one place."""
        # Of the class below Random: the same, without looking at the type of the seed.
        super(random.Random, self.random).seed((self.terms.seed << 20) + step * 100 + slot)

    def pick(self, candidates):
        """Return one of them; leaving others out of the world rarely changes which."""
        key = int(self.random.random() * 2**31) | 1
        return min(candidates, key=lambda one: one.number * key & 0xFFFFFF)

    def later(self, seconds, what):
        """Have ``what()`` happen after so many seconds."""
        self._later.append((self.now + seconds, what))

    def wait(self, seconds):
        """Let time pass, and what was to happen by then."""
        self.now += seconds
        due = [what for when, what in self._later if when <= self.now]
        if due:
            self._later = [one for one in self._later if one[0] > self.now]
            for what in due:
                what()

    def wall(self):
        """Return what the controller's clock shows."""
        return self.now + self.controller_skew

    def lag(self):
        """Return after how long the control plane tells a change."""
        return LAG * self.random.random()

    def living(self):
        """Return the VMs of this realm that live."""
        return [vm for vm in self.vms if vm.alive and vm.realm == REALM]

    def add(self, host, kind, vm):
        """Make a thing, in the place of one that has the same name."""
        old = host.things.get((kind, "%s.%s" % (vm.vm_id, kind)))
        if old is not None:
            host.drop(old)
        thing = Thing(kind, vm, self.serial(), self.now, host.boot)
        host.things[thing.kind, thing.name] = thing
        return thing

    def serial(self):
        """Return a number that nothing else has."""
        self._serial += 1
        return self._serial

    def begin(self, number, host, flavour, realm=REALM):
        """Return a new life of the VM with this number, with its things on the host."""
        before = [vm for vm in self.vms if vm.number == number]
        for vm in before:
            vm.is_followed = True
        life = 1 + max((vm.life for vm in before), default=0)
        vm = Vm(number, life, host, flavour, realm)
        self.vms.append(vm)
        for kind in flavour:
            self.add(host, kind, vm)
        things = {thing.kind: thing for thing in self.of(vm, host)}
        if "container" in things:
            things["snapshot"].used_by.append(things["container"])
        return vm

    def of(self, vm, host):
        """Return the things of one life of a VM on a host."""
        return [thing for thing in host.things.values() if thing.vm is vm]

    def forget_the_long_dead(self):
        """Drop VMs that nothing speaks of any more, so that the world stays small."""
        named = {id(thing.vm) for host in self.hosts for thing in host.everything()}
        self.vms = [
            vm for vm in self.vms if vm.alive or id(vm) in named or self.now - vm.records[-1][0] < 1500
        ]
