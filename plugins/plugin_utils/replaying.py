# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Makes the plans of a saved sweep again, as they were or with another policy, and says what differs. Pure.

THEN and NOW are DECISIONs (see inputs.py): what was decided in the sweep, and what is decided now.
"""

from __future__ import annotations

from ansible.module_utils.common.arg_spec import ArgumentSpecValidator

from . import inputs, planner, planning
from .brake import DEFAULT_CAPS, brake, doomed
from .facts import FactsError
from .report import printable
from .variables import PREFIX, unknown
from .words import enumerate_hosts

# Codes that say no more than the verdict does.
EVIDENCE = (planner.ABSENT, planner.TOMBSTONED, planner.ELSEWHERE)


class ReplayError(Exception):
    """What is asked for cannot be replayed; the text names the variable or the line."""


def changes(variables, spec):
    """Return ``{policy, caps}`` of the role's variables that are to be other than they were; raises ReplayError.

    ``spec`` is that of the role. Only what the planner and the brake look at can be changed afterwards.
    """
    variables = {str(name): value for name, value in variables.items()}
    allowed = {name: spec[name] for name in sorted(spec) if _is_judgement(name)}
    problems = [_not_replayable(name, spec, allowed) for name in sorted(set(variables) - set(allowed))]
    given = {name: value for name, value in variables.items() if name in allowed}
    validated = ArgumentSpecValidator({name: allowed[name] for name in given}).validate(given)
    problems += validated.error_messages
    if problems:
        raise ReplayError("; ".join(problems))
    meant = {name[len(PREFIX):]: value for name, value in validated.validated_parameters.items()}
    policy = {key: value for key, value in meant.items() if key in planner.DEFAULT_POLICY}
    try:
        planner.complete_policy(dict(policy, realm="realm", host="host"))
    except planner.PolicyError as err:
        raise ReplayError(str(err)) from err
    return {"policy": policy, "caps": {key: value for key, value in meant.items() if key in DEFAULT_CAPS}}


def _is_judgement(name):
    key = name[len(PREFIX):]
    return key != "realm" and (key in planner.DEFAULT_POLICY or key in DEFAULT_CAPS)


def _not_replayable(name, spec, allowed):
    if name not in spec:
        return unknown(name, allowed)
    return "%s cannot be changed afterwards, only what the hosts were judged by: %s" % (name, ", ".join(allowed))


def replay(record, policy_changes=None):
    """Return ``{host, same, then, now, differences: [sentence]}`` of a RECORD; ``same``: to the byte."""
    meant = dict(record["policy"], **(policy_changes or {}))
    plan = planning.plan_of_share(record["facts"], record["share"], meant, record.get("within"))
    then, now = inputs.checked_decision(record["decision"]), inputs.decision(plan)
    return {
        "host": record["host"],
        "same": inputs.digest(plan) == record["plan_sha256"],
        "then": then,
        "now": now,
        "differences": _differences(then, now),
    }


def replay_all(reader, changed):
    """Replay all that ``reader`` (see inputs.Reader) yields; return the REPLAY. One host at a time is in memory.

    REPLAY ``{realm, saved_at, version, check_mode, hosts: how many, differing: {host: [sentence]}, batches: [sentence],
    totals: {then, now: {vms, resources}}, missing: [host]}``. ``differing`` has the hosts whose plan is another one
    than it was: with a changed policy also some on which nothing is decided otherwise, without a sentence.
    """
    sweep: dict = {"hosts": 0, "differing": {}, "batches": [], "missing": []}
    then, now = _Brakes({}), _Brakes(changed["caps"])
    batch: dict = {}
    for found in reader:
        if "format" in found:
            _end(sweep, batch, then, now)
            batch = {"header": found, "then": {}, "now": {}}
            for key in ("realm", "saved_at", "version", "check_mode"):
                sweep.setdefault(key, found[key])
            continue
        one = _replayed(reader, found, changed["policy"])
        sweep["hosts"] += 1
        if not one["same"]:
            sweep["differing"].setdefault(one["host"], []).extend(one["differences"])
        for when in ("then", "now"):
            batch[when][one["host"]] = {key: value for key, value in one[when].items() if key != "families"}
    _end(sweep, batch, then, now)
    return dict(sweep, totals={"then": then.totals, "now": now.totals}, cut_off=reader.cut_off)


def _replayed(reader, record, policy_changes):
    try:
        return replay(record, policy_changes)
    except (FactsError, planner.PolicyError) as err:
        raise reader.wrong("host %.200s: %s" % (record["host"], err)) from err
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as err:
        raise reader.wrong(
            "host %.200s: version %s of the collection cannot plan with this: %s: %s"
            % (record["host"], inputs.version(), type(err).__name__, err)
        ) from err


class _Brakes:
    """The brake of one run: its batches one after the other, and nothing after the one that it stops."""

    def __init__(self, caps):
        self._caps = caps
        self._spent = 0
        self._is_stopped = False
        self.totals = {"vms": 0, "resources": 0}

    def batch(self, decisions, caps):
        """Return in words what becomes of a batch; add what is reaped in it to the totals."""
        if self._is_stopped:
            return "not reached"
        abort, refused = brake(decisions, dict(DEFAULT_CAPS, **dict(caps, **self._caps)), self._spent)
        self._spent += doomed(decisions)
        if abort:
            self._is_stopped = True
            return "stopped (%(code)s): %(message)s" % abort
        going = {host: one for host, one in decisions.items() if host not in refused}
        self.totals["vms"] += doomed(going)
        self.totals["resources"] += sum(len(one["reap"]) for one in going.values())
        # What a plan itself says is told with its host.
        by_brake = sorted(host for host in refused if not decisions[host]["refused"])
        return "goes on%s" % "".join(" without %s (%s)" % (host, refused[host]["code"]) for host in by_brake)


def _end(sweep, batch, then, now):
    """Brake the batch that has been read, then and now."""
    if not batch:
        return
    caps = batch["header"]["caps"]
    before, after = then.batch(batch["then"], caps), now.batch(batch["now"], caps)
    name = "batch %d" % (len(sweep["batches"]) + 1)
    sweep["batches"].append("%s: %s" % (name, before if before == after else "%s -> %s" % (before, after)))
    sweep["missing"] += [host for host in map(str, batch["header"]["hosts"]) if host not in batch["then"]]


# --- sentences


def _differences(then, now):
    """Return a sentence for each thing that is decided otherwise."""
    said = []
    if then["refused"] != now["refused"]:
        said.append("the host: %s -> %s" % (_refusal(then["refused"]), _refusal(now["refused"])))
    going_then, going_now = _going(then), _going(now)
    for vm_id in sorted({*then["families"], *now["families"], *going_then, *going_now}):
        before, after = _judged(vm_id, then, going_then), _judged(vm_id, now, going_now)
        if before != after:
            said.append("%s: %s -> %s" % (vm_id, before, after))
    return said


def _refusal(refused):
    return "refused (%(code)s): %(message)s" % refused if refused else "judged"


def _going(decision):
    """Return ``{vm_id: how many things of it go}``."""
    going: dict = {}
    for token in decision["reap"]:
        going[token["vm_id"]] = going.get(token["vm_id"], 0) + 1
    return going


def _judged(vm_id, decision, going):
    """Return the verdict on a VM in words, with the reasons where it is not just its evidence."""
    family = decision["families"].get(vm_id)
    if family is None:
        if vm_id in going:
            return "what was cut short is finished"
        return "not judged" if decision["refused"] else "nothing to do"
    codes = [code for code in family["codes"] if code not in EVIDENCE]
    said = family["verdict"] + (" (%s)" % ", ".join(codes) if codes else "")
    if family["verdict"] == planner.CONFIRMED:
        said += ", %d of %d reaped" % (going.get(vm_id, 0), family["resources"])
    return said


def text(result, variables):
    """Return the REPLAY in lines for a terminal; ``variables`` are those that were changed."""
    lines = ["microvm.reaper: replay of %s" % _source(result)]
    lines.append(verdict(result) if not variables else _with(result, variables))
    for host, differences in sorted(result["differing"].items()):
        lines += ["%s: %s" % (host, said) for said in differences]
        if not differences and not variables:
            lines.append("%s: decided alike, but the plan is not the same to the byte" % host)
    lines += [said for said in result["batches"] if not said.endswith(": goes on")]
    if variables:
        totals = result["totals"]
        lines.append("to be reaped then: %s; now: %s" % (_total(totals["then"]), _total(totals["now"])))
    if result["cut_off"] or result["missing"]:
        lines.append(
            "INCOMPLETE: the run was cut off while it wrote this file%s"
            % (", before it had saved %s" % enumerate_hosts(result["missing"]) if result["missing"] else "")
        )
    return "\n".join(printable(line) for line in lines)


def verdict(result):
    """Return in a sentence whether the plans are those that were made."""
    if not result["differing"]:
        return "all plans are the same, to the byte"
    if result["version"] == inputs.version():
        why = "the file or the collection was changed since: both are of version %s" % result["version"]
    else:
        why = "the file was saved by version %s, this is version %s" % (result["version"], inputs.version())
    return "%d of %d plans are not as they were made (%s); %s" % (
        len(result["differing"]),
        result["hosts"],
        enumerate_hosts(sorted(result["differing"])),
        why,
    )


def _source(result):
    versions = (result["version"], inputs.version())
    return "realm %s, saved %s%s%s: %s in %s" % (
        result["realm"],
        result["saved_at"],
        " in check mode" if result["check_mode"] else "",
        " by version %s (this is %s)" % versions if versions[0] != versions[1] else "",
        _many(result["hosts"], "host", "hosts"),
        _many(len(result["batches"]), "batch", "batches"),
    )


def _total(total):
    return "%s (%s)" % (_many(total["vms"], "VM", "VMs"), _many(total["resources"], "resource", "resources"))


def _many(count, one, more):
    return "%d %s" % (count, one if count == 1 else more)


def _with(result, variables):
    otherwise = sum(1 for differences in result["differing"].values() if differences)
    asked = ", ".join("%s=%s" % pair for pair in sorted(variables.items()))
    return "with %s: decided otherwise on %d of %d hosts" % (asked, otherwise, result["hosts"])
