# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The saved inputs of a sweep: a file from which its plans can be made again, offline.

One file for a run, gzip, of JSON lines. Each batch of hosts (``serial``) appends a part of its own, a HEADER and one
RECORD for each host, so that what a run has written until it is cut off can be read.

HEADER  ``{format, realm, saved_at, version, check_mode, caps, hosts}``: ``saved_at`` in ISO 8601, ``version`` of the
        collection, ``caps`` of the fleet as brake() takes them, ``hosts`` are those whose records follow
RECORD  ``{host, facts, share, policy, plan_sha256, decision}``: the arguments of the plan as the planner got them, the
        facts as they came from the host, and what came of them, see digest() and decision(). And ``within`` where a
        share of a signed plan was applied, see signed_plan.py
"""

from __future__ import annotations

import datetime
import gzip
import hashlib
import json
import os
import tempfile
import urllib.parse
import zlib

import yaml

FORMAT = 1
MAX_LINE = 512 * 1024 * 1024
MAX_CAP = 10**18
LEVEL = 1  # the bulk of it is compressed already
ROOT = os.path.join(os.path.dirname(__file__), "..", "..")

_SHAPES: dict = {
    "header": {
        "format": int, "realm": str, "saved_at": str, "version": str, "check_mode": bool, "caps": dict, "hosts": list,
    },
    "record": {
        "host": str, "facts": dict, "share": dict, "policy": dict, "plan_sha256": str, "decision": dict,
    },
    "caps": {"max_per_fleet": (int, float), "max_percent": (int, float), "percent_floor": (int, float)},
}  # fmt: skip


class InputsError(Exception):
    """The file cannot be read or written; the text says which, where in it, and why."""


# --- what is saved


def header(realm, caps, hosts, *, now, check_mode=False):
    """Return the HEADER of a batch; ``now`` is in seconds since 1970."""
    return {
        "format": FORMAT,
        "realm": realm,
        "saved_at": _utc(now).isoformat(timespec="seconds").replace("+00:00", "Z"),
        "version": version(),
        "check_mode": check_mode,
        "caps": caps,
        "hosts": list(hosts),
    }


def record(host, facts, share, policy, plan, within=None):
    """Return the RECORD of one host."""
    return {
        **({"within": within} if within else {}),
        "host": host,
        "facts": facts,
        "share": {key: value for key, value in share.items() if key != "index"},
        "policy": policy,
        "plan_sha256": digest(plan),
        "decision": decision(plan),
    }


def digest(plan):
    """Return the checksum of a plan, the same for the same plan whatever the order of its keys."""
    return hashlib.sha256(json.dumps(plan, sort_keys=True, separators=(",", ":")).encode("ascii")).hexdigest()


def decision(plan):
    """Return what a plan comes to: the parts of it that brake() needs, and of each VM the verdict and the reasons.

    DECISION ``{refused, manifest: {count}, ledger: {machine_id}, reap: [{kind, name, vm_id}],
    begins: [vm_id], families: {vm_id: {verdict, codes: [code of a reason], resources: how many}}}``
    """
    return {
        "refused": plan["refused"],
        "manifest": {"count": plan["manifest"]["count"]},
        "ledger": {"machine_id": plan["ledger"]["machine_id"]},
        "reap": [{key: token[key] for key in ("kind", "name", "vm_id")} for token in plan["reap"]],
        "begins": plan["begins"],
        "families": {
            vm_id: {"verdict": family["verdict"], "codes": _codes(family), "resources": len(family["resources"])}
            for vm_id, family in plan["families"].items()
        },
    }


def checked_decision(found):
    """Return a DECISION that was read, with nothing else in it; raises KeyError, TypeError or ValueError."""
    refused = found["refused"]
    return {
        "refused": {key: str(refused[key]) for key in ("code", "message")} if refused else None,
        "manifest": {"count": int(found["manifest"]["count"])},
        "ledger": {"machine_id": found["ledger"]["machine_id"] and str(found["ledger"]["machine_id"])},
        "reap": [{key: str(token[key]) for key in ("kind", "name", "vm_id")} for token in found["reap"]],
        # A file of a version without a ladder: all that went began to go then.
        "begins": [str(one) for one in found.get("begins", sorted({token["vm_id"] for token in found["reap"]}))],
        "families": {
            vm_id: {
                "verdict": str(family["verdict"]),
                "codes": [str(code) for code in family["codes"]],
                "resources": int(family["resources"]),
            }
            for vm_id, family in found["families"].items()
        },
    }


def _codes(family):
    return sorted({reason["code"] for one in (family, *family["resources"]) for reason in one["reasons"]})


def version():
    """Return the version of this collection, whether it is installed or a checkout."""
    try:
        with open(os.path.join(ROOT, "MANIFEST.json"), encoding="utf-8") as stream:
            return json.load(stream)["collection_info"]["version"]
    except FileNotFoundError:
        with open(os.path.join(ROOT, "galaxy.yml"), encoding="utf-8") as stream:
            return yaml.safe_load(stream)["version"]


def _utc(now):
    return datetime.datetime.fromtimestamp(now, datetime.UTC)


# --- the file


def unwritable(directory):
    """Return why no file can be made in the directory, None where one can."""
    try:
        with tempfile.TemporaryFile(dir=directory):
            return None
    except OSError as err:
        return err.strerror


def new_file(directory, realm, now):
    """Make the file of a run, named after its realm and its time (in seconds since 1970); return its path."""
    stem = "%s-%s" % (urllib.parse.quote(realm, safe="", errors="replace"), _utc(now).strftime("%Y-%m-%dT%H-%M-%SZ"))
    number = 1
    while True:
        path = os.path.join(directory, "%s%s.jsonl.gz" % (stem, "" if number == 1 else "-%d" % number))
        try:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
            return path
        except FileExistsError:
            number += 1


def append(path, lines):
    """Append the lines as one part; each can be read as soon as it is written. A part that fails is taken back."""
    before = os.stat(path).st_size
    try:
        with open(path, "ab", opener=_existing) as stream:
            with gzip.GzipFile(filename="", fileobj=stream, mode="wb", compresslevel=LEVEL) as part:
                for line in lines:
                    part.write(json.dumps(line).encode("ascii") + b"\n")
                    part.flush()
            stream.flush()
            os.fsync(stream.fileno())
    except Exception:
        os.truncate(path, before)
        raise


def _existing(path, flags):
    return os.open(path, flags & ~os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC)


class Reader:
    """Reads a file line by line. ``cut_off`` tells, at the end, whether the run was cut off while it wrote."""

    def __init__(self, path):
        self.path = path
        self.number = 0
        self.cut_off = False

    def __iter__(self):
        """Yield HEADERs and RECORDs in the shape they must have; raises InputsError."""
        try:
            with gzip.open(self.path) as stream:
                while line := stream.readline(MAX_LINE):
                    self.number += 1
                    yield self._parsed(line)
        except EOFError:
            self.cut_off = True
        except (OSError, zlib.error) as err:
            where = "after line %d of " % self.number if self.number else ""
            raise InputsError(
                "%s%s: not a file that reap_save_inputs wrote, or a corrupt one: %s" % (where, self.path, err)
            ) from err
        if not self.number:
            raise InputsError("%s has not a single line: nothing was saved before the run was cut off" % self.path)

    def wrong(self, said):
        """Return the error that says what is wrong with the line that was read last."""
        return InputsError("%s, line %d: %s" % (self.path, self.number, said))

    def _parsed(self, line):
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as err:
            raise self.wrong("not JSON, so not a file that reap_save_inputs wrote, or a corrupt one: %s" % err) from err
        if not isinstance(found, dict):
            raise self.wrong("not a file that reap_save_inputs wrote: a mapping was expected")
        if "format" not in found and self.number == 1:
            raise self.wrong("not a file that reap_save_inputs wrote: it does not begin with a header")
        if "format" in found and found["format"] != FORMAT:
            raise self.wrong(
                "format %.50r, saved by version %.50r of the collection; this is version %s, which reads format %d"
                % (found["format"], found.get("version"), version(), FORMAT)
            )
        self._check("header" if "format" in found else "record", found)
        if "format" in found:
            self._check("caps", found["caps"])
        return found

    def _check(self, shape, found):
        for key, types in _SHAPES[shape].items():
            value = found.get(key, Ellipsis)
            if not isinstance(value, types) or (shape == "caps" and not 0 <= value < MAX_CAP):
                raise self.wrong("'%s' of the %s is missing or cannot be %.100r" % (key, shape, found.get(key)))
