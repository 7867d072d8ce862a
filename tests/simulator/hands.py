# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What acts.Hands and the kinds do, on things of the model."""

from __future__ import annotations

from ansible_collections.microvm.reaper.plugins.module_utils import acts
from ansible_collections.microvm.reaper.plugins.module_utils import resource as r

from .terms import TRAITS

LASTING = ("remove", "set_aside", acts.BRING_BACK)


class Killed(BaseException):
    """The reaper of a host ends at once, in the middle of an act."""


class Hands:
    """The hands of one sweep of one host. ``gone``: ids that the ledger has to remember as reaped.

    ``batch`` is told what was done; so is one of an undo, which has no documents.
    """

    def __init__(self, host, batch, weather, world):
        self.host, self.batch, self.weather, self.world = host, batch, weather, world
        self.kinds = dict.fromkeys(TRAITS)
        # Of acts.Hands.host only this is asked.
        self.host.boot_id = "boot-%d" % host.boot
        self.acts, self.gone = 0, set()

    def prepare(self, tokens):
        """Add nothing to the tokens."""
        return tokens

    def do(self, act, token):
        """Do one act; sometimes be killed before it, half way through, or before it is written down."""
        if act in LASTING:
            self._survive(act, token)
        return self._do(act, token)

    def do_all(self, act, tokens):
        """Do an act on each of them."""
        for token in tokens:
            yield self.do(act, token)

    def _do(self, act, token):
        if act == acts.BRING_BACK:
            return self._bring_back(token)
        if token.get("resume"):
            return self._finish(token) if act == "remove" else None
        thing = self.host.find(token["kind"], token["name"])
        if thing is None:
            return r.outcome(token, r.ALREADY_GONE)
        if thing.identity != token["identity"]:
            return r.outcome(token, r.IDENTITY_CHANGED)
        if act == "stop":
            return self._stop(thing, token)
        if act == "set_aside":
            return self._set_aside(thing, token)
        if self._is_busy(thing):
            return r.outcome(token, r.DEFERRED)
        if act == "inspect":
            return None
        self._remove(thing, token)
        return r.outcome(token, r.REAPED)

    def _is_busy(self, thing):
        busy = self.weather.busy
        return self.host.in_use(thing) or busy and busy in (thing.kind, *(user.kind for user in thing.used_by))

    def _stop(self, thing, token):
        """End what runs in it; of a VM that lives this is as bad as removing it."""
        self.batch.stopped_things.append((self.host, thing, token["evidence"]))
        if thing.vm.lives_on(self.host):
            self.batch.reaped.append((self.host, thing))
        thing.runaway = thing.frozen = False
        if token["step"] == r.ASIDE:
            self._was_taken(thing, token)

    def _set_aside(self, thing, token):
        """Freeze what runs, and move away what can be moved."""
        if thing.serial in self.host.aside:
            return self._is_aside(thing, token)
        if thing.stays:
            thing.aside_since = self.world.now
            return dict(r.outcome(token, r.DEFERRED), waits=True)
        is_frozen = TRAITS[thing.kind]["aside"] == "running"
        if thing.kind == self.weather.busy or not is_frozen and self.host.in_use(thing):
            return r.outcome(token, r.DEFERRED)
        if is_frozen:
            thing.frozen = True
        else:
            self.host.put_aside(thing)
        self.batch.aside.append((self.host, thing))
        self.world.story.tell("%s: the %s is %s", self.host, thing, "frozen" if is_frozen else "set aside")
        return dict(self._is_aside(thing, token), in_sight=is_frozen)

    def _is_aside(self, thing, token):
        self._was_taken(thing, token)
        thing.aside_since, thing.forgotten = self.world.now, False
        if thing.serial in self.host.aside:
            thing.chances, thing.dead_since = 0, None
        return r.outcome(token, r.SET_ASIDE)

    def _remove(self, thing, token):
        collected = []
        if thing.serial in self.host.aside:
            del self.host.aside[thing.serial]
            self.batch.from_aside.append((self.host, thing))
        else:
            if thing.kind == "container" and self.world.terms.holds:
                collected = [one for one in self.world.of(thing.vm, self.host) if one.used_by == [thing]]
            self.host.drop(thing)
            self.batch.reaped.append((self.host, thing))
        self._was_taken(thing, token)
        self.world.story.tell("%s: the %s is removed", self.host, thing)
        for one in collected:
            self._remove(one, token)

    def _was_taken(self, thing, token):
        """Remember the VM. What lives elsewhere may come back; one that the list does not have, or calls destroyed, may
        not. Of what is out of sight it counts what was said when it was taken.
        """
        if token.get("resume"):
            lives_elsewhere = token["evidence"] == r.ELSEWHERE
        else:
            thing.evidence = token["evidence"]
            lives_elsewhere = any(
                vm["vm_id"] == token["vm_id"] for document in self.batch.documents for vm in document["vms"]
            )
        if not lives_elsewhere:
            self.gone.add(token["vm_id"])

    def _finish(self, token):
        """Remove what is out of sight."""
        serial = token["details"]["serial"]
        for thing in self.host.things.values():
            if thing.serial == serial and token["kind"] == "dm_thin":
                return r.outcome(token, r.IDENTITY_CHANGED)
        if token["kind"] == self.weather.busy:
            return dict(r.outcome(token, r.DEFERRED), unfinished=True)
        thing = self.host.half.pop(serial, None)
        if thing is not None:
            self.batch.finished.append((self.host, thing))
            self.world.story.tell("%s: the %s was half removed, and goes now", self.host, thing)
            self._was_taken(thing, token)
            return r.outcome(token, r.REAPED)
        thing = self.host.aside.get(serial)
        if thing is None:
            return r.outcome(token, r.ALREADY_GONE)
        self._remove(thing, token)
        return r.outcome(token, r.REAPED)

    def _bring_back(self, token):
        """Put it back as it was, or let it run on."""
        thing = self.host.find(token["kind"], token["name"])
        if thing is not None and thing.identity == token["identity"] and thing.serial not in self.host.aside:
            thing.frozen = False
            self.batch.restored.append((self.host, thing))
            return r.outcome(token, r.RESTORED)
        if TRAITS[token["kind"]]["aside"] != "always":
            return r.outcome(token, r.IDENTITY_CHANGED if thing else r.ALREADY_GONE)
        serial = token["details"]["serial"]
        thing = self.host.aside.get(serial)
        if thing is None:
            is_back = any(one.serial == serial for one in self.host.things.values())
            return r.outcome(token, r.IDENTITY_CHANGED if is_back else r.ALREADY_GONE)
        if (thing.kind, thing.name) in self.host.things:
            return r.outcome(token, r.DEFERRED)
        self.host.put_back(thing, self.world.serial())
        self.batch.restored.append((self.host, thing))
        self.world.story.tell("%s: the %s is back in its place", self.host, thing)
        return r.outcome(token, r.RESTORED)

    def _survive(self, act, token):
        self.acts += 1
        killed_at = self.weather.killed_at
        if killed_at is None:
            return
        # Mostly just where something can be half done.
        if self.world.terms.holds and killed_at == 2:
            here = act != "remove" or token.get("resume")
        else:
            here = token["kind"] == "dm_thin" if killed_at else self.acts > 1
        if not here:
            return
        if self.weather.is_half_done:
            self._half(act, token)
        self.world.story.tell("%s: the reaper is killed at the %s %s", self.host, token["kind"], token["name"])
        raise Killed

    def _half(self, act, token):
        """Come so far as to deactivate a volume, or to the end of an act that is not written down any more."""
        thing = self.host.things.get((token["kind"], token["name"]))
        can_be_half = thing and thing.kind == "dm_thin" and thing.identity == token["identity"]
        if act == "remove" and can_be_half and not token.get("resume"):
            if not self._is_busy(thing):
                self._remove(thing, token)
                self.host.half[thing.serial] = thing
        elif self.world.terms.holds:
            self._do(act, token)
