# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What may happen in the world between two sweeps, and in the middle of one."""

from __future__ import annotations

from ansible_collections.microvm.reaper.plugins.module_utils import ledger as ledgers

from .world import FLAVOURS, LOST_AT_REBOOT, REALM, Vm

IDS = tuple("v%02d" % number for number in range(24))
FULL = 14


def create(world):
    """A VM begins, sometimes with an id that was used before; its things are there before it is listed."""
    used = {vm.vm_id for vm in world.living()}
    free = [vm_id for vm_id in IDS if vm_id not in used]
    if len(used) >= FULL or not free:
        return
    host = world.random.choice(world.hosts)
    vm_id, flavour = world.random.choice(free), world.random.choice(FLAVOURS)
    left = [thing.vm for thing in list(host.half.values()) * 5 + list(host.things.values())]
    again = [old for old in left if old.vm_id not in used]
    if again and world.random.random() < 0.3:
        old = world.random.choice(again)
        vm_id, flavour = old.vm_id, old.flavour
    vm = Vm(vm_id, host, flavour, world.next_serial())
    world.vms.append(vm)
    for kind in vm.flavour:
        world.add(host, kind, vm)
    _use(world, vm, host)
    vm.tell(world.now + world.lag(), host=host.name, state="starting")
    world.story.tell("%s begins on %s", vm, host)


def run(world):
    """A VM that began runs, pauses, or runs again."""
    for vm in _some(world):
        vm.running = not vm.running
        state = world.random.choice(("running", "paused", "hibernated", "a state of tomorrow"))
        vm.tell(world.now + world.lag(), **dict(_place(vm), state=state))


def migrate(world):
    """A migration begins, goes over to its target, or is done; it may leave its source's things behind."""
    for vm in _some(world):
        if vm.target is None:
            others = [host for host in world.hosts if host is not vm.host and not _named(host, vm)]
            if others:
                vm.target = world.random.choice(others)
                for kind in vm.flavour:
                    world.add(vm.target, kind, vm)
                world.story.tell("%s begins to move from %s to %s", vm, vm.host, vm.target)
        elif world.random.random() < 0.5:
            vm.host, vm.target = vm.target, vm.host
            world.story.tell("%s runs on %s now, its source %s is still there", vm, vm.host, vm.target)
        else:
            source, vm.target = vm.target, None
            _clean(world, vm, source, world.random.random() < 0.5)
            world.story.tell("%s has moved; it is on %s and not on %s", vm, vm.host, source)
        vm.tell(world.now + world.lag(), **dict(_place(vm), state="migrating"))


def destroy(world):
    """A VM is destroyed as it should be; sometimes the platform forgets things of it, or something runs on."""
    for vm in _some(world):
        vm.alive = vm.running = False
        vm.tell(world.now + world.lag(), state="destroyed", at=world.now)
        vm.tell(world.now + world.random.uniform(100, 900))
        tidy = world.random.random() < 0.5
        for host in world.hosts:
            _clean(world, vm, host, tidy)
        world.story.tell("%s is destroyed%s", vm, "" if tidy else ", its things stay")


def crash(world):
    """A VM dies and nobody cleans; the control plane finds out later."""
    for vm in _some(world):
        vm.alive = vm.running = False
        vm.tell(world.now + world.random.uniform(0, 200), state="destroyed", at=world.now)
        if world.random.random() < 0.5:
            vm.tell(world.now + world.random.uniform(200, 400))
        host = vm.host
        if world.random.random() < 0.3:
            world.add(host, "zombie", vm)
        for thing in world.of(vm, host):
            thing.runaway = thing.kind == "cgroup" and world.random.random() < 0.2
        world.story.tell("%s dies on %s and nobody cleans", vm, host)


def reboot(world):
    """A host is booted again: its VMs are dead, its boot clock begins at nothing, some things are gone."""
    if world.random.random() < 0.9:
        return
    host = world.random.choice(world.hosts)
    host.boot, host.booted_at = host.boot + 1, world.now
    for thing in list(host.things.values()):
        if thing.kind in LOST_AT_REBOOT:
            host.drop(thing)
        thing.runaway = False
        thing.chances = 0
    host.half.clear()  # half removed thin ids of the model are found by their pool, which is made anew
    for vm in world.living():
        if vm.lives_on(host):
            vm.alive = vm.running = False
            vm.tell(world.now + world.lag())
    world.story.tell("%s is booted again", host)


def lose_the_ledger(world):
    """A host's disk is made anew, or its ledger was corrupt."""
    if world.random.random() < 0.95:
        return
    host = world.random.choice(world.hosts)
    host.ledger = ledgers.empty(REALM)
    host.half.clear()  # only the ledger knew of them
    for thing in host.things.values():
        thing.chances = 0
    world.story.tell("%s lost its ledger", host)


def share_a_snapshot(world):
    """A container of a living VM comes to run on a snapshot of another, which may die before it does."""
    host = world.random.choice(world.hosts)
    snapshots = [thing for thing in host.things.values() if thing.kind == "snapshot" and thing.vm.lives_on(host)]
    containers = [thing for thing in host.things.values() if thing.kind == "container" and thing.vm.lives_on(host)]
    if snapshots and containers:
        snapshot, container = world.random.choice(snapshots), world.random.choice(containers)
        if container not in snapshot.used_by:
            snapshot.used_by.append(container)
            world.story.tell("the %s runs on the %s", container, snapshot)


ALL = (create, create, create, run, migrate, migrate, destroy, crash, reboot, lose_the_ledger, share_a_snapshot)


def happen(world, times):
    """Let a number of things happen."""
    for _time in range(times):
        world.random.choice(ALL)(world)


def _some(world):
    living = world.living()
    return [world.random.choice(living)] if living else []


def _place(vm):
    return {"host": vm.host.name, "also_on": [vm.target.name] if vm.target else []}


def _named(host, vm):
    return any(thing.vm.vm_id == vm.vm_id for thing in host.things.values())


def _use(world, vm, host):
    things = {thing.kind: thing for thing in world.of(vm, host)}
    if "container" in things:
        things["snapshot"].used_by.append(things["container"])


def _clean(world, vm, host, tidy):
    """The platform removes what a VM had on a host; an untidy one forgets some of it."""
    for thing in world.of(vm, host):
        if tidy or world.random.random() < 0.3:
            host.drop(thing)
        else:
            thing.runaway = thing.kind == "cgroup" and world.random.random() < 0.2
