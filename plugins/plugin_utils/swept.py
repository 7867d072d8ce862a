# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What the hosts of a whole sweep have something of, for those who settle records elsewhere. Pure.

SAID ``{gathered, plan, brake, recheck}``: what the steps of the sweep registered on one host, None where it did not
come so far
"""

from __future__ import annotations

from .brake import LATCHED
from .facts import FactsError, unpacked
from .report import printable
from .words import enumerate_hosts


class SweepError(ValueError):
    """Nothing may be concluded from the sweep; the text says why and what to do."""


def refuse_batches(others):
    """Refuse to speak for a fleet of which this task sees one batch; ``others`` are the hosts of the other batches."""
    if others:
        raise SweepError(
            "this play runs in batches (serial), and this task is in one that has not %s; put it into a play of its "
            "own behind this one, as playbooks/abandoned.yml does" % enumerate_hosts(sorted(others))
        )


def seen(said, realm=""):
    """Return ``(facts, unanswered, realm)`` for ``{host: SAID}``.

    ``facts`` maps the hosts that answered, by the names that the control plane has for them, to the ids of the VMs of
    which something was there; ``unanswered`` maps all others to the reason. Raises SweepError when the sweep was
    stopped or latched, is of several realms, or when no host answered.
    """
    refusals = {host: _refusal(host, one) for host, one in sorted(said.items())}
    facts, unanswered, named, realms = {}, {}, {}, set()
    for host, one in sorted(said.items()):
        try:
            found = _of_host(one, refusals[host])
        except FactsError as err:
            unanswered[host] = str(err)
            continue
        realms.add(one["plan"]["realm"])
        name = one["plan"]["host"]
        if name in named:
            raise SweepError("%s and %s have the same reap_host_id %s" % (named[name], host, name))
        named[name], facts[name] = host, found
    if not facts:
        few = ["%s: %s" % item for item in sorted(unanswered.items())[:3]]
        raise SweepError("no host answered (%s)" % "; ".join(few))
    if len(realms) > 1 or realm and realms != {realm}:
        raise SweepError("it was of realm %s%s" % (" and ".join(sorted(realms)), realm and ", not of %s" % realm))
    return facts, unanswered, realms.pop()


def report(unanswered):
    """Return one sentence for each reason for which hosts did not answer."""
    by_reason = {}
    for host, reason in sorted(unanswered.items()):
        by_reason.setdefault(reason, []).append(host)
    return [
        printable("no record on %s is settled: %s" % (enumerate_hosts(hosts), reason))
        for reason, hosts in by_reason.items()
    ]


def _refusal(host, one):
    """Return why the host was refused, or None; raise SweepError for what concerns them all."""
    for step in ("brake", "recheck"):
        if (one[step] or {}).get("failed"):
            raise SweepError("it was stopped: %s" % one[step].get("msg"))
    refused = (one["plan"] or {}).get("refused") or (one["brake"] or {}).get("refused", {}).get(host)
    if refused and refused["code"] == LATCHED:
        raise SweepError("it is latched on %s: %s" % (host, refused["message"]))
    return refused


def _of_host(one, refused):
    """Return the ids of the VMs of which something was on one host; raises FactsError where it cannot be told."""
    gathered = one["gathered"] or {}
    if gathered.get("failed") or gathered.get("unreachable"):
        raise FactsError("it could not be looked at: %s" % gathered.get("msg"))
    if not gathered or not one["plan"] or not one["brake"]:
        raise FactsError("it was not swept in this run")
    if refused:
        raise FactsError("refused (%(code)s): %(message)s" % refused)
    facts = unpacked(gathered)
    unread = sorted(kind for kind, entry in facts["kinds"].items() if entry["status"] == "unavailable")
    if unread:
        raise FactsError("%s could not be read" % ", ".join(unread))
    if not facts["kinds"]:
        raise FactsError("nothing was looked at")
    ids = {resource["vm_id"] for entry in facts["kinds"].values() for resource in entry["resources"]}
    ids.update(facts.get("alive", ()))
    # A removal that was cut short may have left what no look shows.
    return sorted(ids.union(token["vm_id"] for key in ("intents", "aside") for token in facts["ledger"][key]))
