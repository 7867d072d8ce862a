# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What stops a whole batch of hosts before the first delete on any of them. Pure."""

from __future__ import annotations

from .words import enumerate_hosts

# A host refused for one of these says something about the live source or about the sweep, not about itself.
BATCH_CODES = ("host_cap", "blind", "shrunk", "epoch_went_back", "other_realm")


def brake(plans):
    """Return ``(abort, refused)`` for ``{host: plan}`` of one batch.

    ``abort`` is None or the ``{code, message}`` that stops all hosts of the batch; ``refused`` maps single hosts that
    are to be left alone to theirs.
    """
    refused = {host: plan["refused"] for host, plan in plans.items() if plan["refused"]}
    refused.update(_clones(plans))
    aborting = [(host, one) for host, one in sorted(refused.items()) if one["code"] in BATCH_CODES]
    if not aborting:
        return None, refused
    host, first = aborting[0]
    others = [other for other, _one in aborting[1:]]
    also = " (refused as well: %s)" % enumerate_hosts(others) if others else ""
    return {"code": first["code"], "message": "%s: %s%s" % (host, first["message"], also)}, refused


def _clones(plans):
    """Refuse hosts that call themselves the same machine: the strikes of one would be believed of the other."""
    hosts = {}
    for host, plan in sorted(plans.items()):
        if plan["ledger"]["machine_id"] is not None:
            hosts.setdefault(plan["ledger"]["machine_id"], []).append(host)
    return {
        host: {
            "code": "cloned_machine_id",
            "message": "%s have the same machine id %s; give each its own" % (enumerate_hosts(clones), machine_id),
        }
        for machine_id, clones in hosts.items()
        if len(clones) > 1
        for host in clones
    }
