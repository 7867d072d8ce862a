# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What a person sees at the end of a sweep. Pure: plans and outcomes in, text and plain structures out.

HOST ``{plan, outcomes, busy, error, refused, absent, unavailable, seconds}``, what is known of one host after a sweep
"""

from __future__ import annotations

from .words import enumerate_hosts

COLUMNS = ("HOST", "KIND", "LIVE", "SUSPECTED", "CONFIRMED", "REAPED", "HELD", "FAILED", "GIVEN BACK")
HELD = ("held", "disputed", "unknown")
MAX_LINES = 40
MAX_LINE = 1000
MAX_BYTES = 1 << 80


def summarize(hosts):
    """Return ``{host: {kind: {live, suspected, confirmed, reaped, already_gone, held, failed, bytes}}}``."""
    return {host: _kinds(one) for host, one in sorted(_believed(hosts).items())}


def text(realm, manifest, hosts, *, check_mode=False, abort=None):
    """Return the report as lines for a terminal.

    ``hosts`` is ``{host: HOST}``, ``manifest`` the HANDLE or None, ``abort`` why the whole batch was stopped.
    """
    hosts = _believed(hosts)
    summary = summarize(hosts)
    rows = [_row(host, kind, n) for host, kinds in summary.items() for kind, n in kinds.items() if _is_news(n)]
    lines = [_headline(realm, manifest, hosts, summary, check_mode, abort)]
    if abort:
        lines.append("STOPPED (%(code)s): %(message)s" % abort)
    lines += ["NOT PROVEN, so nothing is confirmed: %s" % why for why in (manifest or {}).get("unproven") or ()]
    lines += _table(rows) if rows else []
    lines += _limited(_troubles(hosts, abort) + _held(hosts) + _failed(hosts))
    lines += _unseen(hosts)
    return "\n".join(printable(line) for line in lines)


def as_json(realm, manifest, hosts, *, check_mode=False, abort=None):
    """Return the same as a structure, with every family and every outcome."""
    hosts = _believed(hosts)
    said = ("source", "epoch", "count", "generated_at", "unproven")
    return {
        "realm": realm,
        "manifest": {key: manifest.get(key) for key in said} if manifest else None,
        "check_mode": check_mode,
        "stopped": abort,
        "kinds": summarize(hosts),
        "hosts": {
            host: {
                "refused": one["refused"],
                "busy": one["busy"],
                "error": one["error"],
                "absent": one["absent"],
                "unavailable": one["unavailable"],
                "vms": one["plan"]["vms"] if one["plan"] else None,
                "families": one["plan"]["families"] if one["plan"] else None,
                "notices": one["plan"]["notices"] if one["plan"] else [],
                "outcomes": one["outcomes"],
            }
            for host, one in sorted(hosts.items())
        },
    }


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
            "held": sum(counts[verdict] for verdict in HELD) + deferred,
            "already_gone": sum(1 for outcome in mine if outcome["outcome"] == "already_gone"),
            "failed": sum(1 for outcome in mine if outcome["outcome"] == "failed"),
            "bytes": sum(outcome["bytes"] or 0 for outcome in mine),
        }
    return kinds


def _is_news(counts):
    return any(counts[key] for key in ("suspected", "confirmed", "reaped", "held", "failed"))


def _row(host, kind, n):
    numbers = [n[key] for key in ("live", "suspected", "confirmed", "reaped", "held", "failed")]
    return [host, kind] + [str(number) for number in numbers] + [human_bytes(n["bytes"])]


def _table(rows):
    widths = [max(len(row[place]) for row in [list(COLUMNS)] + rows) for place in range(len(COLUMNS))]
    return [
        "  ".join(
            cell.ljust(width) if place < 2 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [list(COLUMNS)] + rows
    ]


def _headline(realm, manifest, hosts, summary, check_mode, abort):
    refused = [host for host in hosts if abort or hosts[host]["refused"]]
    totals = {
        # No strike is written on a host that is refused, whatever its plan thought.
        key: sum(n[key] for host, kinds in summary.items() if key != "suspected" or host not in refused
                 for n in kinds.values())
        for key in ("suspected", "confirmed", "reaped", "already_gone", "held", "failed", "bytes")
    }
    if abort:
        did = "nothing was removed on any host"
    elif totals["reaped"] and check_mode:
        did = "%d would be reaped" % totals["reaped"]
    elif totals["reaped"]:
        did = "%d reaped, %s given back" % (totals["reaped"], human_bytes(totals["bytes"]).replace("-", "0 B"))
    else:
        did = "nothing to reap" if not totals["confirmed"] else "nothing reaped"
    others = ("already_gone", "suspected", "held", "failed")
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
        " (check mode: nothing was changed)" if check_mode else "",
    )


def _troubles(hosts, abort):
    lines = []
    for host, one in sorted(hosts.items()):
        if one["refused"] and not (abort and one["refused"]["code"] == abort["code"]):
            lines.append("%s: refused (%s): %s" % (host, one["refused"]["code"], one["refused"]["message"]))
        if one["busy"]:
            lines.append("%s: busy: %s" % (host, one["busy"]))
        if one["error"]:
            lines.append("%s: %s" % (host, one["error"]))
        for notice in one["plan"]["notices"] if one["plan"] else []:
            lines.append("%s: %s" % (host, notice))
    return lines


def _held(hosts):
    """One line for each host, kind and reason; the names are those of the first few."""
    groups = {}
    for host, one in sorted(hosts.items()):
        for vm_id, family in one["plan"]["families"].items() if one["plan"] else ():
            for member in family["resources"]:
                reasons = member["reasons"] or family["reasons"]
                if member["verdict"] in HELD and reasons:
                    code = member["verdict"] if member["verdict"] != "held" else reasons[0]["code"]
                    groups.setdefault((host, member["kind"], code), []).append((vm_id, reasons[0]["text"]))
        for outcome in one["outcomes"]:
            if outcome["outcome"] in ("deferred", "identity_changed"):
                who = ", ".join("%(type)s %(name)s" % holder for holder in outcome["holders"][:3])
                said = "%s%s" % (outcome["message"] or outcome["outcome"], " (%s)" % who if who else "")
                groups.setdefault((host, outcome["kind"], outcome["outcome"]), []).append((outcome["vm_id"], said))
    return [
        "%s: %s held (%s): %s: %s%s" % (host, kind, code, cases[0][0], cases[0][1], _more(len(cases) - 1))
        for (host, kind, code), cases in sorted(groups.items())
    ]


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
