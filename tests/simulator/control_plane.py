# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What the live sources answer: the truth a little late, the truth of some minutes ago, or one of their lies.

A lie of which no single sweep can know is a VM left out for once; only the second strike protects from it. So it is
told in one sweep, no host hears the next before it has heard the truth, and it is not about a VM that has a strike from
the seconds before it was listed: two failures at once are more than two strikes are for.
"""

from __future__ import annotations

from .terms import REALM

HONEST = "honest"
LIES = {
    "export": "answers with what was true some minutes ago",
    "down": "does not answer",
    "empty": "answers with an empty list",
    "cut off": "answers with half of its list",
    "count off": "answers with half of its list and the count of all",
    "shrunk": "has lost most of its VMs and does not know",
    "stale copy": "answers from a copy that stands still, and says that it is of now",
    "other realm": "answers for another realm",
    "glitch": "leaves out a VM for once",
    "bare": "answers with half of its list, without proof that it is all",
    "host forgotten": "has forgotten a host and what lives there alone",
    "host unlisted": "has left a host out of its hosts, but not the VMs there",
}
# Of a source alone only those see through these that remember how many VMs it listed.
COUNTED = ("empty", "shrunk")


class ControlPlane:
    """Answers fetches. ``world.mood`` is what it does now."""

    def __init__(self, world):
        self.world = world
        self.epoch = 0
        self.history = {source.name: [] for source in world.terms.sources}
        self.exports, self._copy = {}, None
        self._mood = None
        self._forgotten = world.hosts[0]

    def answers(self, must_be_honest):
        """Return ``([(source, document or None when there is none)], mood)``."""
        world = self.world
        if world.now >= world.mood_until and world.mood != HONEST:
            world.mood = HONEST
            world.story.tell("the control plane is honest again")
        if world.mood != self._mood:
            self._mood, self.exports, self._copy, self._forgotten = world.mood, {}, None, world.pick(world.hosts)
        mood = HONEST if must_be_honest else world.mood
        truths = [(source, self._truth(source)) for source in world.terms.sources]
        told = None if mood == HONEST else getattr(self, "_" + mood.replace(" ", "_"))(truths)
        mood = HONEST if told is None else mood
        answers = [
            (source, None if source.fails and world.random.random() < source.fails else document)
            for source, document in told or truths
        ]
        for source, document in answers if world.story.is_wanted else ():
            world.story.tell("%s", in_words(source, document, world))
        return answers, mood

    def _truth(self, source):
        world, then = self.world, self.world.now - source.behind
        vms, tombstones = [], []
        for vm in world.vms:
            record = vm.known(then) if source.knows(vm) else None
            if record is None:
                continue
            _when, hosts, state, destroyed_at = record
            if state is not None:
                names = [host.known_as for host in hosts]
                vms.append({"vm_id": vm.vm_id, "host": names[0], "state": state, "also_on": names[1:]})
            if destroyed_at is not None:
                tombstones.append({"vm_id": vm.vm_id, "destroyed_at": destroyed_at + world.cp_skew})
        older = self.history[source.name]
        if not older or older[-1]["vms"] != vms or older[-1]["tombstones"] != tombstones:
            self.epoch += 1
        document = {
            "realm": REALM,
            "epoch": self.epoch,
            "generated_at": then + world.cp_skew,
            "made_before": then + world.controller_skew,
            "complete": True,
            "proven": source.proven,
            "vms": vms,
            "count": len(vms),
            "tombstones": tombstones,
        }
        if world.terms.names_hosts:
            document["hosts"] = [host.known_as for host in world.hosts]
        older.append(document)
        del older[:-30]
        return document

    def _liars(self, truths, lie):
        """Tell the lie with the first source alone, or with all of them where nobody would notice the one."""
        alone = truths[0][0].part is None or self.world.mood not in COUNTED or self._is_counted(truths[0][0])
        return [
            (source, lie(document) if place == 0 or not alone else document)
            for place, (source, document) in enumerate(truths)
        ]

    def _export(self, truths):
        for source, document in truths:
            old = self.exports.get(source.name)
            if old is None or document["generated_at"] - old["generated_at"] > 500 - source.behind:
                self.exports[source.name] = document
        return [(source, self.exports[source.name]) for source, _document in truths]

    def _down(self, truths):
        return [(truths[0][0], None), *truths[1:]]

    def _empty(self, truths):
        return self._liars(truths, lambda document: dict(document, vms=[], count=0, tombstones=[]))

    def _cut_off(self, truths):
        return self._liars(
            truths, lambda document: dict(document, vms=document["vms"][::2], complete=False, count=None)
        )

    def _count_off(self, truths):
        if not truths[0][1]["vms"]:
            return None
        return self._liars(truths, lambda document: dict(document, vms=document["vms"][1::2]))

    def _bare(self, truths):
        return self._liars(truths, lambda document: _only(document, document["vms"][::2], proven=False))

    def _remembered(self, source=None):
        """Return how many VMs every host remembers at least: of all sources, or of one."""
        doubting = [host.ledger["manifest"] for host in self.world.hosts if host.believed != self.world.mood]
        counts = [one["counts"].get(source.name) if source else one["count"] for one in doubting]
        return min((count or 0 for count in counts), default=6)

    def _is_counted(self, source):
        return self._remembered(source) > self.world.terms.policy["percent_floor"]

    def _shrunk(self, truths):
        """Complete by its own words, and only a part of what every host remembers."""
        source, remembered = truths[0][0], self._remembered()
        if remembered <= self.world.terms.policy["percent_floor"]:
            return None
        left = remembered // (3 if source.part is None else 6)
        if source.part is not None and self._is_counted(source):
            left = self._remembered(source) // 3
        return self._liars(truths, lambda document: _only(document, document["vms"][:left]))

    def _stale_copy(self, truths):
        """The truth of some time ago, which every host knows to be old by its epoch."""
        source, document = truths[0]
        doubting = [host for host in self.world.hosts if host.believed != self.world.mood]
        remembered = min((host.ledger["manifest"]["epochs"].get(source.name, 0) for host in doubting), default=None)
        if self._copy is None:
            self._copy = next((one for one in self.history[source.name] if one["epoch"] < (remembered or 0)), None)
        if self._copy is None or remembered is not None and self._copy["epoch"] >= remembered:
            return None
        dates = {key: document[key] for key in ("generated_at", "made_before")}
        return [(source, dict(self._copy, **dates)), *truths[1:]]

    def _other_realm(self, truths):
        return self._liars(truths, lambda document: dict(_only(document, []), realm="staging"))

    def _glitch(self, truths):
        world = self.world
        known = [vm for vm in world.living() if all(host.has_heard_of(vm) for host in world.hosts)]
        if any(host.learned_from_a_lie for host in world.hosts) or not known:
            return None
        left_out = world.pick(known).vm_id
        world.story.tell("the control plane leaves out %s for once", left_out)
        return [
            (source, _only(document, [vm for vm in document["vms"] if vm["vm_id"] != left_out]))
            for source, document in truths
        ]

    def _host_forgotten(self, truths):
        if not self.world.terms.names_hosts:
            return None
        name = self._forgotten.known_as
        return [
            (source, _only(self._without_host(document), [
                dict(vm, host=left[0], also_on=left[1:])
                for vm in document["vms"]
                for left in [[one for one in [vm["host"], *vm["also_on"]] if one != name]]
                if left
            ]))
            for source, document in truths
        ]

    def _host_unlisted(self, truths):
        if not self.world.terms.names_hosts:
            return None
        return [(source, self._without_host(document)) for source, document in truths]

    def _without_host(self, document):
        return dict(document, hosts=[name for name in document["hosts"] if name != self._forgotten.known_as])


def _only(document, vms, **changes):
    return dict(document, vms=vms, count=len(vms), **changes)


def in_words(source, document, world):
    """Return what a source says, as a sentence."""
    if document is None:
        return "%s does not answer" % source.name
    vms = ", ".join(
        "%s on %s%s" % (vm["vm_id"], " and ".join([vm["host"], *vm["also_on"]]), _state(vm)) for vm in document["vms"]
    )
    dead = ", ".join(one["vm_id"] for one in document["tombstones"])
    return "%s says (realm %s, epoch %d, %d s old%s%s%s): %s%s" % (
        source.name,
        document["realm"],
        document["epoch"],
        world.wall() - document["generated_at"],
        "" if document["complete"] else ", not complete",
        "" if document["count"] in (None, len(document["vms"])) else ", count %d" % document["count"],
        "" if document["proven"] else ", without proof",
        vms or "no VMs",
        "; destroyed: %s" % dead if dead else "",
    )


def _state(vm):
    return "" if vm["state"] == "running" else " (%s)" % vm["state"]
