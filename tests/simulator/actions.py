# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What may happen in the world between two sweeps, and in the middle of one."""

from __future__ import annotations

from .control_plane import HONEST, LIES
from .terms import REALM
from .undoing import undo
from .world import FLAVOURS, LOST_AT_REBOOT

REUSED = range(10)
FULL = 6
STATES = ("running", "running", "paused", "hibernated", "a state of tomorrow")
HOURS = 3600.0
# Longer than any list is old that is accepted.
REVIVAL = 700.0


def create(world):
    """A VM begins, sometimes with an id that was used before; its things are there before it is listed."""
    used = {vm.number for vm in world.vms if vm.alive}
    half_removed = [host for host in world.hosts if _unfollowed(host, used)]
    host = world.pick(half_removed if half_removed and world.random.random() < 0.5 else world.hosts)
    free = [number for number in REUSED if number not in used]
    if len(used) >= FULL or not free:
        return
    kind = world.random.random()
    flavour = FLAVOURS[world.terms.flavour if kind < 0.6 else int(world.random.random() * len(FLAVOURS))]
    if not world.terms.ids_are_reused:
        world.used_numbers = number = getattr(world, "used_numbers", len(REUSED)) + 1
    else:
        half = _unfollowed(host, used)
        left = half or [thing.vm for thing in host.things.values() if thing.vm.number not in used]
        if left and world.random.random() < (0.8 if half else 0.4):
            old = world.pick(left)
            number, flavour = old.number, old.flavour
        else:
            number = free[int(world.random.random() * len(free))]
    vm = world.begin(number, host, tuple(kind for kind in flavour if kind not in host.lacks))
    vm.tell(world.now + world.lag(), (host,), "starting")
    world.story.tell("%s begins on %s: %s", vm, host, ", ".join(vm.flavour))
    if "container" in vm.flavour and world.random.random() < 0.5:
        _share(world, host)


def run(world):
    """A VM that began runs, pauses, or runs again."""
    for vm in _some(world):
        vm.running = not vm.running
        state = STATES[int(world.random.random() * len(STATES))]
        vm.tell(world.now + world.lag(), _places(vm), state)
        world.story.tell("%s %s; the control plane will call it %r", vm, "runs" if vm.running else "pauses", state)


def migrate(world):
    """A migration begins, goes over to its target, or is done; it may leave its source's things behind."""
    for vm in _some(world):
        if vm.target is None:
            others = [host for host in world.hosts if host is not vm.host and not _names(host, vm) and not host.lacks]
            if others:
                back = [host for host in others if host in vm.left]
                vm.target = world.pick(back if back and world.random.random() < 0.5 else others)
                for kind in vm.flavour:
                    world.add(vm.target, kind, vm)
                world.story.tell("%s begins to move from %s to %s", vm, vm.host, vm.target)
        elif world.random.random() < 0.5:
            vm.host, vm.target = vm.target, vm.host
            world.story.tell("%s runs on %s now, its source %s is still there", vm, vm.host, vm.target)
        else:
            source, vm.target = vm.target, None
            vm.left.append(source)
            _clean(world, vm, source, world.random.random() < 0.5)
            world.story.tell("%s has moved; it is on %s and not on %s", vm, vm.host, source)
        vm.tell(world.now + world.lag(), _places(vm), "migrating")


def destroy(world):
    """A VM is destroyed as it should be; sometimes the platform forgets things of it, or something runs on."""
    for vm in _some(world):
        vm.alive = vm.running = False
        vm.tell(world.now + world.lag(), destroyed_at=world.now)
        vm.tell(world.now + 100 + 800 * world.random.random())
        tidy = world.random.random() < 0.4
        for host in world.hosts:
            _clean(world, vm, host, tidy)
        world.story.tell("%s is destroyed%s", vm, "" if tidy else ", and not all of it is cleaned")


def crash(world):
    """A VM dies and nobody cleans; the control plane finds out later."""
    for vm in _some(world):
        vm.alive = vm.running = False
        vm.tell(world.now + 200 * world.random.random(), destroyed_at=world.now)
        if world.random.random() < 0.5:
            vm.tell(world.now + 200 + 200 * world.random.random())
        host = vm.host
        if world.random.random() < 0.3:
            world.add(host, "zombie", vm)
        for thing in world.of(vm, host):
            thing.runaway = _may_run_on(world, thing) and world.random.random() < 0.2
        world.story.tell("%s dies on %s and nobody cleans", vm, host)


def revive(world):
    """A VM that died is begun again with what is left of it. The control plane says so long before, in every list."""
    alive = {vm.number for vm in world.vms if vm.alive}
    left = sorted(
        (thing.serial, host, thing.vm)
        for host in world.hosts
        for thing in [*host.things.values(), *host.aside.values()]
        if not (thing.vm.is_followed or thing.vm.is_awaited or thing.vm.number in alive) and thing.vm.realm == REALM
    )
    if not left:
        return
    # Rather one of which something was set aside.
    aside = [one for one in left if one[0] in one[1].aside]
    left = aside or left
    _serial, host, vm = left[int(world.random.random() * len(left))]

    def begin():
        vm.is_awaited = False
        if vm.is_followed or vm.alive:
            vm.tell(world.now)
            return
        vm.alive, vm.host, vm.target, vm.revived = True, host, None, world.now
        world.story.tell("%s lives again on %s, on what is left of it", vm, host)

    vm.is_awaited = True
    vm.tell(world.now, (host,), "restored")
    world.story.tell("%s is to live again on %s, on what is left of it", vm, host)
    world.later(REVIVAL, begin)


def fill_a_place(world):
    """A pool or a file system of a host gets full for some minutes."""
    host, seconds = world.pick(world.hosts), 200 + 600 * world.random.random()
    place = ("fs", "pool")[int(world.random.random() * 2)]
    percent = 60 + 40 * world.random.random()
    host.full[place] = percent

    def end():
        host.full[place] = 50.0

    world.later(seconds, end)
    world.story.tell("%s of %s is %d %% full", place, host, percent)


def clean_aside(world):
    """The platform removes by itself what was set aside."""
    host = world.pick(world.hosts)
    if host.aside:
        serial = min(host.aside)
        world.story.tell("the platform removes the %s, which was set aside", host.aside.pop(serial))


def restore(world):
    """A VM that was reaped comes back from a backup, with its own id: on its host, or on another."""
    if world.terms.ids_are_reused:
        return
    used = {vm.vm_id for vm in world.vms if vm.alive}
    gone = sorted((vm_id, host.number, host) for host in world.hosts for vm_id in host.gone if vm_id not in used)
    if gone:
        vm_id, _number, host = gone[int(world.random.random() * len(gone))]
        if world.random.random() < 0.3:
            host = world.pick(world.hosts)
        vm = world.begin(int(vm_id[1:]), host, FLAVOURS[2] if host.lacks else FLAVOURS[0])
        vm.tell(world.now + world.lag(), (host,), "restored")
        world.story.tell("%s comes back to life on %s, from a backup", vm, host)


def reboot(world):
    """A host is booted again: its VMs are dead, its boot clock begins at nothing, some things are gone."""
    host = world.pick(world.hosts)
    host.boot, host.booted_at = host.boot + 1, world.now
    for thing in list(host.things.values()):
        if thing.kind in LOST_AT_REBOOT:
            host.drop(thing)
        thing.runaway = thing.frozen = False
    for thing in [*host.things.values(), *host.aside.values()]:
        thing.chances, thing.dead_since = 0, None
        thing.aside_since = None if thing.aside_since is None else world.now
    host.half.clear()  # half removed thin ids of the model are found by their pool, which is made anew
    for vm in world.vms:
        if vm.lives_on(host):
            vm.alive = vm.running = False
            vm.tell(world.now + world.lag())
    world.story.tell("%s is booted again", host)


def be_away(world):
    """A host cannot be reached for some minutes, because of the network or because it is suspended."""
    host, seconds = world.pick(world.hosts), 60 + 900 * world.random.random()
    host.away_until = world.now + seconds
    world.story.tell("%s cannot be reached for %d s; its boot clock goes on", host, seconds)


def fill_the_disk(world):
    """A host cannot write its ledger for some minutes."""
    host, seconds = world.pick(world.hosts), 60 + 600 * world.random.random()
    host.full_until = world.now + seconds
    world.story.tell("the disk of %s is full for %d s: no ledger can be written", host, seconds)


def lose_the_ledger(world):
    """A host's state directory was removed, or its ledger cannot be understood."""
    host, corrupt = world.pick(world.hosts), world.random.random() < 0.5
    if host.called != host.known_as:
        return  # a host that remembers nothing has to be called by its right name
    host.lose_the_ledger("the ledger is corrupt" if corrupt else None)
    world.story.tell("the ledger of %s is %s", host, "corrupt" if corrupt else "lost")


def share_a_snapshot(world):
    """A container of a living VM comes to run on a snapshot of another, which may die before it does."""
    _share(world, world.pick(world.hosts))


def _share(world, host):
    snapshots = [thing for thing in host.things.values() if thing.kind == "snapshot" and thing.vm.lives_on(host)]
    containers = [thing for thing in host.things.values() if thing.kind == "container" and thing.vm.lives_on(host)]
    if snapshots and containers:
        snapshot, container = world.pick(snapshots), world.pick(containers)
        if container not in snapshot.used_by:
            snapshot.used_by.append(container)
            world.story.tell("the %s runs on the %s", container, snapshot)


def lie(world):
    """The control plane begins to lie, for minutes: long enough for any number of strikes, if it were believed."""
    moods, which = (*LIES, "export", "glitch", "down"), world.random.random()
    if world.random.random() < 0.5:
        which = world.terms.favourites[2]
    mood, seconds = moods[int(which * len(moods))], 200 + 600 * world.random.random()
    if world.mood == HONEST:
        world.mood, world.mood_until = mood, world.now + seconds
        world.story.tell("for %d s the control plane %s", seconds, LIES[mood])


def rename(world):
    """A host gets another name, in the inventory and in the control plane's lists."""
    host = world.pick(world.hosts)
    if host.called == host.known_as:
        host.called = host.known_as = "%s-%s" % (host.name, "b" if host.called == host.name else host.called[-1] + "b")
        world.story.tell("%s is its new name, in the inventory and for the control plane", host)


def swap(world):
    """The inventory mixes up two hosts that are known under their names, for some minutes."""
    first = world.pick(world.hosts)
    others = [host for host in world.hosts if host is not first and _is_itself(host)]
    if not others or not _is_itself(first):
        return
    second = world.pick(others)
    first.called, second.called = second.called, first.called

    def end():
        for host in (first, second):
            host.called = host.known_as
        world.story.tell("the inventory has %s and %s right again", first.name, second.name)

    world.story.tell("the inventory mixes up %s and %s", first.name, second.name)
    world.later(100 + 600 * world.random.random(), end)


def change_the_machine(world):
    """A host is given another machine id, as by a reinstallation that kept its disk."""
    host = world.pick(world.hosts)
    new_machine(host)
    world.story.tell("%s has another machine id: %s", host, host.machine)


def clone(world):
    """A host is made anew from the image of another: it has that one's machine id, and maybe its ledger."""
    host = world.pick(world.hosts)
    other = world.pick([one for one in world.hosts if one is not host])
    if host.machine == other.machine or (other.bound and other.bound[0] == host.known_as):
        return  # its own old ledger would come back with it, and nobody can tell
    host.machine = other.machine
    # A ledger may remember nothing, so neither may be called by a wrong name.
    are_themselves = all(one.called == one.known_as for one in (host, other))
    with_ledger = world.random.random() < 0.5 and are_themselves
    if with_ledger:
        host.lose_the_ledger()
        host.ledger, host.bound, host.is_latched = other.ledger, other.bound, other.is_latched
        host.gone = set(other.gone)
    world.story.tell("%s has the machine id of %s now%s", host, other, " and its ledger" if with_ledger else "")


def join_from_staging(world):
    """A host of another realm, with VMs that only the other control plane knows, comes into this inventory."""
    empty = [host for host in world.hosts if not any(vm.lives_on(host) for vm in world.vms)]
    if not empty:
        return
    host = world.pick(empty)
    if host.called != host.known_as:
        return
    host.lose_the_ledger()
    host.other_realms = ["staging"]
    vm = world.begin(900 + host.number, host, FLAVOURS[2], "staging")
    vm.tell(world.now)

    def end():
        vm.alive = False
        vm.tell(world.now)
        world.story.tell("%s of staging ends and leaves its things on %s", vm, host)

    world.later(300 + 1000 * world.random.random(), end)
    world.story.tell("%s comes from the realm staging, and %s of staging lives there", host, vm)


def pin(world):
    """A person wants a VM left alone: in the inventory, or in a host's pin file; or no longer."""
    host = world.pick(world.hosts)
    where, pins = ("reap_keep", world.keep) if world.random.random() < 0.5 else ("the pin file of %s" % host, host.pins)
    ids = sorted({thing.vm.vm_id for thing in host.things.values()})
    if pins and world.random.random() < 0.5:
        world.story.tell("%s has no pins any more", where)
        pins.clear()
    elif ids:
        vm_id = ids[int(world.random.random() * len(ids))]
        forms = ["%s", "%s until 2027-01-15", "%s until 2027-01-16", vm_id[:-1] + "?"]
        forms += [] if pins is world.keep else ["%s until friday, please"]
        form = forms[int(world.random.random() * len(forms))]
        pins.append(form % vm_id if "%s" in form else form)
        world.story.tell("%s: %s", where, pins[-1])


def step_a_clock(world):
    """A wall clock jumps by a day, or is a little off, and is put right later."""
    which, size = world.random.random(), world.random.random()
    far = world.random.random() < (0.0 if "skew" in world.terms.gaps else 0.7)
    seconds = (25 * HOURS if far else world.terms.skew()) * (1 if size < 0.5 else -1)
    targets = [("control plane", world, "cp_skew"), ("controller", world, "controller_skew")]
    targets += [(host.name, host, "skew") for host in world.hosts]
    place = int(which * 4)
    name, owner, key = targets[place if place < 2 else 2 + int(size * 997) % len(world.hosts)]
    if any(getattr(one, attribute) for _name, one, attribute in targets[:2]) and owner is world:
        return  # two clocks that are wrong at the same time may agree with each other
    setattr(owner, key, seconds)

    def end():
        setattr(owner, key, 0.0)
        world.story.tell("the clock of %s is right again", name)

    world.later(200 + 600 * world.random.random(), end)
    world.story.tell("the wall clock of %s jumps by %+d s", name, seconds)


def _may_run_on(world, thing):
    return thing.kind == "cgroup" or world.terms.holds and thing.kind == "container"


COMMON = (
    *[create] * 20, *[run] * 4, *[migrate] * 10, *[destroy] * 4, *[crash] * 5, *[lie] * 6, share_a_snapshot,
    share_a_snapshot, restore, pin, be_away, step_a_clock,
)
RARE = (
    reboot, lose_the_ledger, fill_the_disk, rename, swap, swap, change_the_machine, clone, clone,
    join_from_staging,
)


# What makes a host another one; nobody does that to a host while it is swept.
BETWEEN_RUNS = (rename, swap, change_the_machine, clone, join_from_staging)
EVERY = (*dict.fromkeys(COMMON), *dict.fromkeys(RARE))
# What else happens where things wait.
OF_THE_LADDER = (*[undo] * 3, *[revive] * 2, fill_a_place, fill_a_place, clean_aside)


def happen(world, early=False):
    """Let something happen; in the first steps VMs begin."""
    chance = world.random.random()
    if early and chance < 0.7:
        action = create
    elif chance < 0.2:
        action = EVERY[int(world.terms.favourites[int(chance * 10)] * len(EVERY))]
    elif chance < 0.26:
        action = RARE[int(world.random.random() * len(RARE))]
    elif world.terms.holds and chance < 0.4:
        action = OF_THE_LADDER[int(world.random.random() * len(OF_THE_LADDER))]
    else:
        action = COMMON[int(world.random.random() * len(COMMON))]
    if not (world.is_swept and action in BETWEEN_RUNS):
        action(world)


def new_machine(host):
    """Give a host a machine id that no other has."""
    host.machines += 1
    host.machine = "%s-%d" % (host.name, host.machines)


def _unfollowed(host, used):
    """Return the VMs of which something is half removed on the host and whose id was not used again since."""
    out_of_sight = [*host.half.values(), *host.aside.values()]
    return [thing.vm for thing in out_of_sight if not (thing.vm.is_followed or thing.vm.number in used)]


def _some(world):
    living = world.living()
    return [world.pick(living)] if living else []


def _places(vm):
    return (vm.host, vm.target) if vm.target else (vm.host,)


def _names(host, vm):
    return any(thing.vm.vm_id == vm.vm_id for thing in host.things.values())


def _is_itself(host):
    return host.called == host.known_as and host.bound == (host.called, host.machine)


def _clean(world, vm, host, tidy):
    """The platform removes what a VM had on a host; an untidy one forgets some of it."""
    for thing in world.of(vm, host):
        if tidy or world.random.random() < 0.3:
            host.drop(thing)
        else:
            thing.runaway = _may_run_on(world, thing) and world.random.random() < 0.2
