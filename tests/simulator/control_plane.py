# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What the control plane answers: the truth a little late, the truth of some minutes ago, or one of its lies.

A lie of which no single sweep can know is a VM left out for once; only the second strike protects from it. So it is
told in one sweep, no host hears the next before it has heard the truth, and it is not about a VM that has a strike from
the seconds before it was listed: two failures at once are more than two strikes are for.
"""

from __future__ import annotations

import copy

from .world import REALM

MAX_AGE = 600.0
LIES = ("empty", "cut off", "count off", "shrunk", "stale copy", "other realm", "glitch")


class ControlPlane:
    """Answers fetches; ``mood`` is how, ``honest`` whether the last answer was the truth."""

    def __init__(self, world):
        self.world = world
        self.mood, self.until = "honest", 0.0
        self.history = []
        self.export = None

    def document(self, must_be_honest):
        """Return ``(document, mood)``."""
        self._change_mood()
        mood = "honest" if must_be_honest else self.mood
        answer = getattr(self, "_" + mood.replace(" ", "_"))()
        return (self._honest(), "honest") if answer is None else (answer, mood)

    def _change_mood(self):
        world = self.world
        if world.now < self.until:
            return
        self.mood = world.random.choice(("honest",) * 5 + ("export",) * 2 + LIES) if world.serial > 60 else "honest"
        # Lies last for minutes: long enough for any number of strikes, if they were believed.
        self.until = world.now + world.random.uniform(100, 600)
        self.export = None
        world.story.tell("the control plane is in this mood: %s", self.mood)

    def _honest(self):
        world = self.world
        world.epoch += 1
        known = [(vm.vm_id, vm.known(world.now)) for vm in world.vms]
        document = {
            "realm": REALM,
            "source": "cp",
            "epoch": world.epoch,
            "generated_at": world.now,
            "complete": True,
            "hosts": [host.name for host in world.hosts],
            "vms": [
                {"vm_id": vm_id, "host": record["host"], "state": record["state"], "also_on": record.get("also_on", [])}
                for vm_id, record in known
                if "host" in record
            ],
            "tombstones": [
                {"vm_id": vm_id, "destroyed_at": record["at"]} for vm_id, record in known if "at" in record
            ],
        }
        document["count"] = len(document["vms"])
        self.history = self.history[-40:] + [document]
        return document

    def _export(self):
        """The truth, written to a file every few minutes."""
        if self.export is None or self.world.now - self.export["generated_at"] > 500:
            self.export = self._honest()
        return self.export

    def _empty(self):
        return dict(self._honest(), vms=[], count=0, tombstones=[])

    def _cut_off(self):
        document = self._honest()
        return dict(document, vms=document["vms"][::2], complete=False, count=None)

    def _count_off(self):
        document = self._honest()
        return dict(document, vms=document["vms"][::2]) if document["vms"] else None

    def _shrunk(self):
        """Complete by its own words, and only a part of what the hosts remember."""
        document = self._honest()
        remembered = [host.ledger["manifest"]["count"] or 0 for host in self.world.hosts]
        if min(remembered) < 6:
            return None
        vms = document["vms"][: min(remembered) // 3]
        return dict(document, vms=vms, count=len(vms))

    def _stale_copy(self):
        """A replica that stands still and says that it is of now."""
        remembered = min(host.ledger["manifest"]["epochs"].get("cp", 0) for host in self.world.hosts)
        older = [document for document in self.history if document["epoch"] < remembered]
        return dict(copy.copy(older[0]), generated_at=self.world.now) if older else None

    def _other_realm(self):
        return dict(self._honest(), realm="staging", vms=[], count=0)

    def _glitch(self):
        document = self._honest()
        known = [vm.vm_id for vm in self.world.living() if all(host.has_heard_of(vm) for host in self.world.hosts)]
        if any(host.learned_from_a_glitch for host in self.world.hosts) or not known:
            return None
        left_out = self.world.random.choice(known)
        self.world.story.tell("the list leaves out %s for once", left_out)
        vms = [vm for vm in document["vms"] if vm["vm_id"] != left_out]
        return dict(document, vms=vms, count=len(vms))
