# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""All kinds, in the order in which their resources are removed.

Adding a kind is adding a file in kinds/ and naming it in ORDER. A kind is a module with

``KIND``        its name
``STOPS``       whether stop() can end what runs in one
``DEPENDS_ON``  kinds that must have been readable before one may be removed: what could not be read is not free
``RESUMES``     optional: whether remove() can finish what an earlier reaper began and could not end (token["resume"])
``SETS_ASIDE``  optional: whether set_aside() is for all things of the kind ("always"; they are out of sight then) or
                for those in which something runs ("running"; they stay in sight). All else waits as it is
``TAKES``       optional: kinds of which a manager may collect things, unasked, when one of this kind is removed
``RULE``        the argument spec of one of its rules (a rule says which names are ours, and where)
``collect(rules, host)``         -> ``{"resources": [RESOURCE], "foreign": N}``; reads, never writes.
                                 Raises Absent (the host has no such thing) or another ProbeError (could not be read)
``inspect(token, rules, host)``  -> None when the object that the token names may be removed now, else an OUTCOME:
                                 already_gone, identity_changed, deferred (busy; with holders) or failed (not ours)
``stop(token, rules, host)``     -> None when nothing runs in it any more, else an OUTCOME (only where STOPS)
``remove(token, rules, host)``   -> OUTCOME; re-reads the identity itself, acts, and verifies that it is gone. With
                                 token["resume"] of what was set aside, or half removed

``witness(token, rules, host)`` -> optional: ``[{"title", "source", "text"}]``, what there is to see of the object that
                                 the token names, for the evidence kept of it (evidence.py); what it cuts it says. Reads
                                 only, and is called in a child of its own, before the acts. ``host.once()`` reads what
                                 is the same for all tokens
``logs_of(outcome, rules)``      -> optional: ``(base, names below it, globs)`` of the logs of what was moved aside
``prepare(tokens, rules, host)`` -> optional: ``{name: details to add}`` to tokens of the kind, before anything is done
``set_aside(token, rules, host)`` -> only where SETS_ASIDE: OUTCOME set_aside (with ``in_sight`` where collect() goes
                                 on to find it), or as inspect(). One that could not be brought back is deferred
                                 with ``waits``: it waits as it is
``remove_all(tokens, rules, host)``, ``set_aside_all(tokens, rules, host)`` -> optional, where much of the work is the
                                 same for all: the OUTCOMEs of the first of the tokens, of at least one and of as many
                                 as about two seconds are enough for. It is called again with the rest. Of what it
                                 began and did not answer for, remove() and set_aside() know what came of it
``bring_back(token, rules, host)`` -> the OUTCOME restored when it is exactly as it was, or as inspect()

Every function may raise ProbeError or OSError; the caller turns these into a failed outcome.
"""

from __future__ import annotations

from .kinds import cgroup, container, dm_thin, jail, snapshot, thin_id, zombie

ORDER = (container, snapshot, jail, dm_thin, thin_id, cgroup, zombie)

BY_NAME = {kind.KIND: kind for kind in ORDER}
# What the planner needs to know of the kinds, as data: it imports nothing that touches a host.
TRAITS = {
    kind.KIND: {
        "order": place,
        "stops": kind.STOPS,
        "depends_on": list(kind.DEPENDS_ON),
        "resumes": getattr(kind, "RESUMES", False),
        "aside": getattr(kind, "SETS_ASIDE", None),
        "takes": list(getattr(kind, "TAKES", ())),
    }
    for place, kind in enumerate(ORDER)
}
