# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The world as it truly is: hosts, VMs, what VMs have on hosts, and what the control plane knows, which comes later."""

from __future__ import annotations

from ansible_collections.microvm.reaper.plugins.module_utils import ledger as ledgers
from ansible_collections.microvm.reaper.plugins.module_utils import resource as r

REALM = "prod"
START = 1_800_000_000.0
# What the reaper relies on: a VM is on the list this many seconds after the first of its things at the latest.
LAG = 30.0
FLAVOURS = (("cgroup", "jail", "dm_thin"), ("container", "snapshot", "cgroup"), ("jail",))
# A host cannot tell the age of every kind.
AGELESS = ("jail", "snapshot")
LOST_AT_REBOOT = ("cgroup", "dm_thin", "zombie")
RUNS = ("cgroup", "container", "dm_thin")


class Thing:
    """One thing of one VM on one host. ``runaway``: something runs in it although its VM is gone."""

    def __init__(self, kind, vm, serial, born, boot):
        self.kind, self.vm, self.serial, self.born = kind, vm, serial, born
        self.name = "%s.%s" % (vm.vm_id, kind)
        self.identity = "%d %d" % (boot, serial) if kind in LOST_AT_REBOOT else "%d" % serial
        self.runaway = False
        self.used_by = []
        self.chances = 0
        self.last_chance = born

    def __repr__(self):
        return "%s #%d of %s" % (self.kind, self.serial, self.vm)


class Vm:
    """One life of a VM. An id may be used again by another life."""

    def __init__(self, vm_id, host, flavour, serial):
        self.vm_id, self.host, self.flavour, self.serial = vm_id, host, flavour, serial
        self.alive, self.running = True, False
        self.target = None
        self.records = []

    def __repr__(self):
        return "%s (life %d)" % (self.vm_id, self.serial)

    def lives_on(self, host):
        """Tell whether anything of it on this host must stay."""
        return self.alive and host in (self.host, self.target)

    def tell(self, when, **record):
        """From ``when`` on the control plane knows this of it; an empty record: nothing."""
        self.records.append((when, record))

    def known(self, now):
        """Return what the control plane knows of it now."""
        return next((record for when, record in reversed(self.records) if when <= now), {})


class Host:
    """One host with its things, its half removed thin ids, and its ledger."""

    def __init__(self, name, now):
        self.name, self.boot, self.booted_at = name, 1, now - 1000.0
        self.things = {}
        self.half = {}
        self.ledger = ledgers.empty(REALM)
        self.learned_from_a_glitch = False
        self.heard_the_truth = 0.0

    def __repr__(self):
        return self.name

    def facts(self, now, unavailable):
        """Return what gather would read."""
        kinds = {
            kind: {"status": "ok", "reason": None, "resources": [], "foreign": 0}
            for kind in ("container", "snapshot", "jail", "dm_thin", "cgroup", "zombie")
        }
        for kind in unavailable:
            kinds[kind].update(status="unavailable", reason="no answer")
        for thing in self.things.values():
            if thing.kind not in unavailable:
                kinds[thing.kind]["resources"].append(self._resource(thing, now, unavailable))
        return {
            "realm": REALM,
            "boot_id": "boot-%d" % self.boot,
            "machine_id": "machine of %s" % self.name,
            "boottime_seconds": now - self.booted_at,
            "ledger": self.ledger,
            "ledger_problem": None,
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
            ],
            "age_seconds": None if thing.kind in AGELESS else now - thing.born,
            "bytes": None,
            "parent": None,
            "details": {},
        }

    def in_use(self, thing):
        """Tell whether something runs in it."""
        return thing.runaway or thing.kind in RUNS and thing.vm.running and thing.vm.lives_on(self)

    def has_heard_of(self, vm):
        """Tell whether the host has heard the truth since all that the VM has on it must have been listed."""
        return all(thing.born + LAG < self.heard_the_truth for thing in self.things.values() if thing.vm is vm)

    def drop(self, thing):
        """Take a thing away, and what it used with it from its list of users."""
        del self.things[thing.kind, thing.name]
        for other in self.things.values():
            if thing in other.used_by:
                other.used_by.remove(thing)


class World:
    """Everything there is, and the clock of the control plane."""

    def __init__(self, random, story, hosts=3):
        self.random, self.story = random, story
        self.now = START
        self.hosts = [Host("h%d" % number, self.now) for number in range(hosts)]
        self.vms = []
        self.serial = 0
        self.epoch = 0

    def next_serial(self):
        """Return a number that no other object has."""
        self.serial += 1
        return self.serial

    def lag(self):
        """Return after how long the control plane tells a change."""
        return self.random.uniform(0.0, LAG)

    def living(self):
        """Return the VMs that live."""
        return [vm for vm in self.vms if vm.alive]

    def add(self, host, kind, vm):
        """Make a thing, in the place of one that has the same name."""
        old = host.things.get((kind, "%s.%s" % (vm.vm_id, kind)))
        if old is not None:
            host.drop(old)
        thing = Thing(kind, vm, self.next_serial(), self.now, host.boot)
        host.things[thing.kind, thing.name] = thing
        return thing

    def of(self, vm, host):
        """Return the things of one life of a VM on a host."""
        return [thing for thing in host.things.values() if thing.vm is vm]

    def forget_the_long_dead(self):
        """Drop VMs that nothing speaks of any more, so that the world stays small."""
        named = {id(thing.vm) for host in self.hosts for thing in host.things.values()}
        named.update(id(thing.vm) for host in self.hosts for thing in host.half.values())
        self.vms = [
            vm for vm in self.vms if vm.alive or id(vm) in named or self.now - vm.records[-1][0] < 1000
        ]
