# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What a person sees at the end of a sweep. Pure: plans and outcomes in, text and plain structures out.

HOST ``{plan, outcomes, busy, evidence, error, refused, absent, unavailable, seconds}``, what is known of one host after
a sweep; of one that only plans the outcomes are foreseen, see foreseen()
"""

from __future__ import annotations

from ..module_utils import resource as r
from .words import enumerate_hosts, utc

NUMBERS = ("live", "suspected", "confirmed", "reaped", "aside", "held", "failed")
COLUMNS = ("HOST", "KIND", *(name.upper() for name in NUMBERS), "GIVEN BACK")
SET_ASIDE = ("set_aside", "would_set_aside")
WAITS = "hold"  # the reason of what waits for the end of reap_hold
HELD = ("held", "disputed", "unknown")
MAX_LINES = 40
MAX_LINE = 1000
MAX_BYTES = 1 << 80


def summarize(hosts):
    """Return ``{host: {kind: {live, suspected, confirmed, reaped, aside, already_gone, held, failed, bytes}}}``.

    ``aside`` is what was set aside, or waits, after the sweep.
    """
    return {host: _kinds(one) for host, one in sorted(_believed(hosts).items())}


def foreseen(plan):
    """Return the OUTCOMEs that a plan would come to if nothing came in between."""
    would = {r.REMOVE: r.WOULD_REAP, r.ASIDE: r.WOULD_SET_ASIDE}
    return [r.outcome(token, would[token["step"]]) for token in plan["reap"]]


def text(realm, manifest, hosts, *, check_mode=False, abort=None, sweep="", unpublished=None, sealed=None, opened=None):
    """Return the report as lines for a terminal.

    ``hosts`` is ``{host: HOST}``, ``manifest`` the HANDLE or None, ``abort`` why the whole batch was stopped, ``sweep``
    the id by which it can be undone, ``unpublished`` why the end of its VMs was not published, ``sealed`` what a signed
    plan says of itself that was made, ``opened`` the OPENED of one that was applied (see signed_plan.py).
    """
    hosts = _believed(hosts)
    summary = summarize(hosts)
    rows = [_row(host, kind, n) for host, kinds in summary.items() for kind, n in kinds.items() if _is_news(n)]
    lines = [_headline(realm, manifest, hosts, summary, check_mode, abort, bool(sealed))]
    if abort:
        lines.append("STOPPED (%(code)s): %(message)s" % abort)
    lines += (_sealed(sealed) if sealed else []) + (_applied(opened, hosts) if opened else [])
    lines += ["NOT PROVEN, so nothing is confirmed: %s" % why for why in (manifest or {}).get("unproven") or ()]
    lines += ["NOT PUBLISHED: %s" % unpublished] if unpublished else []
    lines += _table(rows) if rows else []
    lines += _undo(hosts, sweep)
    lines += _limited(_troubles(hosts, abort) + _held(hosts) + _unreaped(hosts) + _failed(hosts))
    lines += _unseen(hosts)
    return "\n".join(printable(line) for line in lines)


def as_json(
    realm, manifest, hosts, *, check_mode=False, abort=None, sweep="", unpublished=None, sealed=None, opened=None
):
    """Return the same as a structure, with every family and every outcome; ``headline`` is its first line.

    ``zombies`` are those that are left, by parent: ``[{parent: HOLDER, count, vms: [vm_id]}]``.
    """
    hosts = _believed(hosts)
    said = ("source", "epoch", "count", "generated_at", "unproven")
    summary = summarize(hosts)
    return {
        "headline": printable(_headline(realm, manifest, hosts, summary, check_mode, abort, bool(sealed))),
        "realm": realm,
        "manifest": {key: manifest.get(key) for key in said} if manifest else None,
        "check_mode": check_mode,
        "sweep": sweep,
        "stopped": abort,
        "unpublished": unpublished,
        "sealed": sealed,
        "applied": {key: value for key, value in opened.items() if key != "index"} if opened else None,
        "kinds": summary,
        "hosts": {
            host: {
                "refused": one["refused"],
                "busy": one["busy"],
                "within": one["plan"].get("within") if one["plan"] else None,
                "evidence": one.get("evidence"),
                "error": one["error"],
                "absent": one["absent"],
                "unavailable": one["unavailable"],
                "vms": one["plan"]["vms"] if one["plan"] else None,
                "families": one["plan"]["families"] if one["plan"] else None,
                "notices": one["plan"]["notices"] if one["plan"] else [],
                "aside": _aside(one),
                "zombies": _zombies(one),
                "outcomes": one["outcomes"],
            }
            for host, one in sorted(hosts.items())
        },
    }


def artifact(
    realm, hosts, *, check_mode=False, abort=None, sweep="", unpublished=None, sealed=None, opened=None, before=None
):
    """Return what a scheduler should keep of a sweep: counts only, however many hosts there are.

    ``before`` is what was returned for the earlier batches of the same run; for all others see text().
    """
    hosts, before = _believed(hosts), before or {}
    kinds = [n for of_host in summarize(hosts).values() for n in of_host.values()]
    refused = dict(before.get("refused", {}))
    for one in hosts.values():
        if one["refused"]:
            refused[one["refused"]["code"]] = refused.get(one["refused"]["code"], 0) + 1
    stopped = {"code": abort["code"], "message": printable(abort["message"])} if abort else None
    sums = {key: before.get(key, 0) + sum(n[key] for n in kinds) for key in (*NUMBERS, "already_gone", "bytes")}
    return {
        "realm": realm,
        "sweep": sweep,
        "check_mode": check_mode,
        "planned": bool(sealed),
        "plan": (sealed or opened or {}).get("plan"),
        "hosts": before.get("hosts", 0) + len(hosts),
        "errors": before.get("errors", 0) + sum(1 for one in hosts.values() if one["error"]),
        "refused": refused,
        "stopped": before.get("stopped") or stopped,
        "unpublished": bool(before.get("unpublished") or unpublished),
        **sums,
    }


def undone(host, result):
    """Return what a person sees of an undo on one host: ``result`` is what the module returned."""
    if result.get("busy"):
        return ["%s: %s" % (host, printable(str(result["busy"])))]
    good = _with_outcomes({"outcomes": result.get("outcomes") or [], "error": None})["outcomes"]
    if not good:
        return [] if result.get("failed") else ["%s: nothing of it is aside on this host" % host]
    until = ", pinned until %s" % result["pinned_until"] if result.get("pinned_until") else ""
    back = [one for one in good if one["outcome"] in ("restored", "would_restore")]
    did = "would be back" if any(one["outcome"] == "would_restore" for one in back) else "back"
    lines = ["%s: %d of %d %s%s" % (host, len(back), len(good), did, until)]
    for one in good:
        came_to = "" if one in back else " was NOT brought back (%s)" % one["outcome"]
        message = ": %s" % one["message"] if one["message"] else ""
        lines.append("%s: %s %s%s%s" % (host, one["kind"], one["name"], came_to, message))
    return _limited([printable(line) for line in lines])


def human_bytes(count):
    """Return a number of bytes as a person reads it."""
    if not count:
        return "-"
    value, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return "%d %s" % (value, unit) if unit == "B" else "%.1f %s" % (value, unit)


def printable(line):
    """Return the line without anything that a terminal would obey; names come from whoever made the thing."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in line)
    return shown if len(shown) <= MAX_LINE else shown[:MAX_LINE] + "..."


def _believed(hosts):
    """Drop outcomes that are none: a host may return anything, and must not spoil the report of the others."""
    return {host: _with_outcomes(one) for host, one in hosts.items()}


def _with_outcomes(one):
    outcomes = one["outcomes"] if isinstance(one["outcomes"], list) else [one["outcomes"]]
    good = [outcome for outcome in outcomes if _is_outcome(outcome)]
    if len(good) == len(outcomes):
        return dict(one, outcomes=good)
    return dict(one, outcomes=good, error=one["error"] or "it returned %d outcomes that are none" % (
        len(outcomes) - len(good)
    ))


def _is_outcome(outcome):
    try:
        return (
            all(isinstance(outcome[key], str) for key in ("kind", "name", "vm_id", "outcome", "message"))
            and _is_count(outcome["bytes"])
            and isinstance(outcome["holders"], list)
            and all(isinstance(holder[key], str) for holder in outcome["holders"] for key in ("type", "name"))
        )
    except (KeyError, TypeError):
        return False


def _is_count(value):
    """Tell whether it is a number of bytes that can be added up, or none."""
    return value is None or (isinstance(value, (int, float)) and 0 <= value < MAX_BYTES)


def _kinds(one):
    if not one["plan"]:
        return {}
    kinds = {}
    for kind, counts in one["plan"]["counts"].items():
        mine = [outcome for outcome in one["outcomes"] if outcome["kind"] == kind]
        deferred = sum(1 for outcome in mine if outcome["outcome"] in ("deferred", "identity_changed"))
        kinds[kind] = {
            "live": counts["live"],
            "suspected": counts["suspected"],
            "confirmed": counts["confirmed"],
            "reaped": sum(1 for outcome in mine if outcome["outcome"] in ("reaped", "would_reap")),
            "aside": counts["aside"] + sum(1 for outcome in mine if outcome["outcome"] in SET_ASIDE),
            "held": sum(counts[verdict] for verdict in HELD) + deferred,
            "already_gone": sum(1 for outcome in mine if outcome["outcome"] == "already_gone"),
            "failed": sum(1 for outcome in mine if outcome["outcome"] == "failed"),
            "bytes": sum(outcome["bytes"] or 0 for outcome in mine),
        }
    return kinds


def _is_news(counts):
    return any(counts[key] for key in NUMBERS if key != "live")


def _row(host, kind, n):
    return [host, kind] + [str(n[key]) for key in NUMBERS] + [human_bytes(n["bytes"])]


def _table(rows):
    widths = [max(len(row[place]) for row in [list(COLUMNS)] + rows) for place in range(len(COLUMNS))]
    return [
        "  ".join(
            cell.ljust(width) if place < 2 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [list(COLUMNS)] + rows
    ]


def _sealed(plan):
    """Say what was planned, and what is not in it."""
    where = "; it is in %s" % plan["path"] if plan["path"] else ""
    lines = [
        "PLAN %s of %s: %s on %s; it can be applied until %s%s"
        % (
            plan["plan"],
            utc(plan["made_at"]),
            _some(plan["budget"]["vms"], "VM"),
            _some(plan["budget"]["hosts"], "host"),
            utc(plan["expires_at"]),
            where,
        )
    ]
    left_out = ((plan["unseen"], "which could not be read"), (sorted(plan["refused"]), "refused"))
    return lines + ["NOT IN THE PLAN: %s, %s" % (enumerate_hosts(names), why) for names, why in left_out if names]


def _applied(opened, hosts):
    """Say which signed plan it was, and where it was not applied."""
    states: dict = {}
    for host, one in sorted(hosts.items()):
        within = one["plan"].get("within") if one["plan"] and not one["refused"] else None
        if within:
            states.setdefault(within["state"], {}).setdefault(within["why"], []).append(host)
    epoch = opened["manifest"].get("epoch")
    lines = [
        "plan %s of %s%s: %s on %s, applied on %s of this run"
        % (
            opened["plan"],
            utc(opened["made_at"]),
            ", by epoch %s" % epoch if epoch is not None else "",
            _some(opened["budget"]["vms"], "VM"),
            _some(opened["budget"]["hosts"], "host"),
            _some(sum(map(len, states.pop("applied", {}).values())), "host"),
        )
    ]
    return lines + [
        "%s: nothing is removed (%s): %s" % (enumerate_hosts(names), state, why)
        for state, groups in sorted(states.items())
        if state != "idle"
        for why, names in sorted(groups.items())
    ]


def _some(count, what):
    return "%d %s%s" % (count, what, "" if count == 1 else "s")


def _headline(realm, manifest, hosts, summary, check_mode, abort, is_plan=False):
    refused = [host for host in hosts if abort or hosts[host]["refused"]]
    totals = {
        # No strike is written on a host that is refused, whatever its plan thought.
        key: sum(n[key] for host, kinds in summary.items() if key != "suspected" or host not in refused
                 for n in kinds.values())
        for key in ("suspected", "confirmed", "reaped", "aside", "already_gone", "held", "failed", "bytes")
    }
    if abort:
        did = "nothing was removed on any host"
    elif totals["reaped"] and (check_mode or is_plan):
        did = "%d would be reaped" % totals["reaped"]
    elif totals["reaped"]:
        did = "%d reaped, %s given back" % (totals["reaped"], human_bytes(totals["bytes"]).replace("-", "0 B"))
    else:
        did = "nothing to reap" if not totals["confirmed"] + totals["aside"] else "nothing reaped"
    others = ("aside", "already_gone", "suspected", "held", "failed")
    parts = ["%d %s" % (totals[key], key.replace("_", " ")) for key in others if totals[key]]
    if refused and not abort:
        parts.append("1 host refused" if len(refused) == 1 else "%d hosts refused" % len(refused))
    source = "%d VMs live by %s" % (manifest["count"], manifest["source"]) if manifest else "no list of live VMs"
    return "microvm.reaper: realm %s, %s, %s: %s%s%s" % (
        realm,
        "1 host" if len(hosts) == 1 else "%d hosts" % len(hosts),
        source,
        did,
        "".join(", " + part for part in parts),
        " (check mode: nothing was changed)" if check_mode else " (a plan: nothing was changed)" if is_plan else "",
    )


def _waits(reasons):
    return reasons[0]["code"] == WAITS


def _undo(hosts, sweep):
    """Say how to bring back what this sweep has set aside."""
    if not any(outcome["outcome"] == "set_aside" for one in hosts.values() for outcome in one["outcomes"]):
        return []
    return ["What was set aside comes back with playbooks/undo.yml -e sweep=%s, until reap_hold is over." % sweep]


def _aside(one):
    """Return what is aside on a host after the sweep, as far as its plan and its outcomes tell."""
    held = [] if not one["plan"] or one["refused"] else one["plan"]["ledger"].get("aside", [])
    found = [{key: entry.get(key) for key in ("kind", "name", "vm_id", "state", "since", "sweep")} for entry in held]
    new = [outcome for outcome in one["outcomes"] if outcome["outcome"] == "set_aside"]
    return found + [{key: outcome[key] for key in ("kind", "name", "vm_id")} for outcome in new]


def _troubles(hosts, abort):
    lines = []
    for host, one in sorted(hosts.items()):
        if one["refused"] and not (abort and one["refused"]["code"] == abort["code"]):
            lines.append("%s: refused (%s): %s" % (host, one["refused"]["code"], one["refused"]["message"]))
        if one["busy"]:
            lines.append("%s: busy: %s" % (host, one["busy"]))
        if one["error"]:
            lines.append("%s: %s" % (host, one["error"]))
        lines += ["%s: %s" % (host, said) for said in _of_evidence(one.get("evidence"))]
        for notice in one["plan"]["notices"] if one["plan"] else []:
            lines.append("%s: %s" % (host, notice))
    return lines


def _of_evidence(evidence):
    """Return what a person should know of a host's evidence: what is not as it should be."""
    evidence = evidence if isinstance(evidence, dict) else {}
    failed = [str(why) for why in evidence.get("failed") or ()] if isinstance(evidence.get("failed"), list) else []
    lines = ["evidence failed: %s%s" % (failed[0], _more(len(failed) - 1))] if failed else []
    for key, said in (("skipped", "no evidence of %d VMs"), ("short", "only metadata as evidence of %d VMs")):
        count = evidence.get(key)
        if isinstance(count, int) and count:
            lines.append(said % count + ", reap_evidence_seconds was used up")
    return lines


def _held(hosts):
    """One line for each host, kind and reason; the names are those of the first few."""
    groups = {}
    for host, one in sorted(hosts.items()):
        for vm_id, family in one["plan"]["families"].items() if one["plan"] else ():
            for member in family["resources"]:
                reasons = member["reasons"] or family["reasons"]
                if member["verdict"] in HELD and reasons and not (_waits(reasons) or _is_its_parents(member)):
                    code = member["verdict"] if member["verdict"] != "held" else reasons[0]["code"]
                    groups.setdefault((host, member["kind"], code), []).append((vm_id, reasons[0]["text"]))
        for outcome in one["outcomes"]:
            if outcome["outcome"] in ("deferred", "identity_changed") and not _is_its_parents(outcome):
                who = ", ".join("%(type)s %(name)s" % holder for holder in outcome["holders"][:3])
                said = "%s%s" % (outcome["message"] or outcome["outcome"], " (%s)" % who if who else "")
                groups.setdefault((host, outcome["kind"], outcome["outcome"]), []).append((outcome["vm_id"], said))
    return [
        "%s: %s held (%s): %s: %s%s" % (host, kind, code, cases[0][0], cases[0][1], _more(len(cases) - 1))
        for (host, kind, code), cases in sorted(groups.items())
    ]


def _is_its_parents(one):
    """Tell whether this is a zombie, held or deferred, of which we know the parent that does not reap it."""
    if one["kind"] != "zombie" or one.get("outcome", one.get("verdict")) not in ("deferred", "held"):
        return False
    return any(holder["type"] == "process" and "note" in holder for holder in one["holders"])


def _zombies(one):
    """Return the zombies of a host that are left, grouped by their parent and by what it is left alone for."""
    groups = {}
    families = one["plan"]["families"].items() if one["plan"] else ()
    found = [(vm_id, member) for vm_id, family in families for member in family["resources"]]
    for vm_id, zombie in found + [(outcome["vm_id"], outcome) for outcome in one["outcomes"]]:
        if _is_its_parents(zombie):
            parent = zombie["holders"][0]
            group = groups.setdefault((parent["name"], str(parent.get("note"))), {"parent": parent, "vms": []})
            group["vms"].append(vm_id)
    return [
        {"parent": group["parent"], "count": len(group["vms"]), "vms": sorted(set(group["vms"]))}
        for _key, group in sorted(groups.items())
    ]


def _unreaped(hosts):
    """One line for each host and parent that does not reap its zombies, and for each unit that was restarted."""
    lines = []
    for host, one in sorted(hosts.items()):
        for group in _zombies(one):
            several, vms, note = group["count"] > 1, len(group["vms"]), group["parent"].get("note")
            lines.append("%s: %d zombie%s of %d VM%s, %s parent %s does not reap %s%s" % (
                host,
                group["count"], "s" if several else "",
                vms, "s" if vms > 1 else "",
                "their" if several else "its",
                group["parent"]["name"],
                "them" if several else "it",
                "; %s" % note if note else "",
            ))
        lines += ["%s: %s" % (host, outcome["message"]) for outcome in one["outcomes"] if outcome.get("restarted")]
    return lines


def _failed(hosts):
    return [
        "%s: %s %s FAILED: %s" % (host, outcome["kind"], outcome["name"], outcome["message"])
        for host, one in sorted(hosts.items())
        for outcome in one["outcomes"]
        if outcome["outcome"] == "failed"
    ]


def _more(count):
    return "" if count < 1 else " (and %d more)" % count


def _limited(lines):
    if len(lines) <= MAX_LINES:
        return lines
    return lines[:MAX_LINES] + ["... %d more lines; reap_report_path has them all" % (len(lines) - MAX_LINES)]


def _unseen(hosts):
    """Say what was looked at and what could not be; hosts with the same answer share a line."""
    groups = {}
    for host, one in sorted(hosts.items()):
        if not one["plan"]:
            continue
        looked = [kind for kind, counts in one["plan"]["counts"].items() if counts["status"] == "ok"]
        said = "looked at %s" % (", ".join(looked) or "nothing")
        if one["absent"]:
            said += "; not on this host: %s" % "; ".join("%s (%s)" % pair for pair in sorted(one["absent"].items()))
        if one["unavailable"]:
            said += "; COULD NOT READ %s" % "; ".join("%s (%s)" % pair for pair in sorted(one["unavailable"].items()))
        groups.setdefault(said, []).append(host)
    return [
        "%s: %s" % (enumerate_hosts(names), said)
        for said, names in sorted(groups.items(), key=lambda group: group[1])
    ]
