# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The signed plan of a whole fleet: made by one run, carried out by others, each a share of it.

One line of text, ``microvm.reaper.plan:<format>:<packed>:<signature>``: the packed JSON of a DOCUMENT, and the
HMAC-SHA256, in hex, of all that is before the last colon. So the very bytes that travel are signed, and nothing of them
is looked into before they have been verified.

DOCUMENT  ``{plan, realm, made_at, expires_at, manifest, budget, hosts: {name: SHARE}, idle: [name],
          refused: {name: code}, unseen: [name]}``: ``plan`` is the id of the run that made it, the instants are in
          seconds since 1970, ``manifest`` what it was judged by, ``{source, epoch, epochs, count, generated_at}``,
          ``budget`` how many VMs begin to go on how many hosts, and by which caps, ``{vms, hosts, caps: {max_per_fleet,
          max_percent, percent_floor}}``. Hosts are called as the live sources call them; the unseen ones, of which no
          plan could be made, by their name in the inventory
SHARE     ``{machine_id, acts: [ACT], begins: [vm_id]}`` of a host on which something is to be done or to begin
ACT       what is to be done to one object, see act_of()
OPENED    the small handle of a verified plan: its DOCUMENT without the hosts, with ``now``, when it was verified, and
          ``index``, a local file from which share_of() takes what one host needs
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import sqlite3
import tempfile
import urllib.parse

from ..module_utils.gather import squeezed
from .facts import FactsError, unpack
from .words import enumerate_hosts, utc

NAME = "microvm.reaper.plan"
FORMAT = 1
LEAST_KEY = 32
MAX_TEXT = 64 * 1024 * 1024
# AWX cuts the results of a task near 700 KB.
MAX_ARTIFACT = 512 * 1024
FUTURE_SECONDS = 30

# What becomes of a host that a plan has no share for.
IDLE, REFUSED, UNSEEN, MISSING = "idle", "refused", "unseen", "missing"

_SHAPE: dict = {
    "plan": str, "realm": str, "made_at": (int, float), "expires_at": (int, float), "manifest": dict, "budget": dict,
    "hosts": dict, "idle": list, "refused": dict, "unseen": list,
}  # fmt: skip


class PlanError(Exception):
    """A plan cannot be sealed, opened, read or written; ``code`` is one word for why."""

    def __init__(self, code, message):
        super().__init__(message)
        self.code = code


# --- keys


def keys_of(value):
    """Return the keys in ``reap_plan_key``, a text or a list of them; the first signs, each verifies. Never told."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return [str(one) for one in values if one is not None and str(one)]


def weak(keys):
    """Return what is wrong with the keys, None when nothing is. No key is in the sentence."""
    if not keys:
        return "reap_plan_key is not given: a plan is signed with it; keep it in a vault"
    short = [number for number, key in enumerate(keys, 1) if len(key) < LEAST_KEY]
    if not short:
        return None
    which = "key %d of reap_plan_key" % short[0] if len(keys) > 1 else "reap_plan_key"
    return "%s is shorter than %d characters: take one that nobody can guess, such as `openssl rand -hex 32` makes" % (
        which,
        LEAST_KEY,
    )


# --- what is signed


def act_of(token):
    """Return the ACT that a TOKEN of a plan comes to. The same act is done to the same object, in the same way.

    ``[kind, name, vm_id, identity, step, stop]``, and of a zombie also how its parent is made to reap it.
    """
    act = [token[key] for key in ("kind", "name", "vm_id", "identity", "step", "stop")]
    details = token["details"]
    return act + [details.get(key) for key in ("how", "unit", "may_end")] if token["kind"] == "zombie" else act


def document(plans, refused, unseen, *, plan_id, realm, manifest, caps, now, max_age):
    """Return the DOCUMENT of all ``{host of the inventory: plan}``; ``refused`` is what brake() left out of it."""
    going = {host: plan for host, plan in plans.items() if host not in refused}
    by_name = {}
    for host, plan in sorted(going.items()):
        by_name.setdefault(plan["host"], []).append(host)
    for name, hosts in by_name.items():
        if len(hosts) > 1:
            raise PlanError(
                "two_of_one_name",
                "%s have the same name in the live sources, %r: give each its own reap_host_id"
                % (enumerate_hosts(hosts), name),
            )
    shares = {plan["host"]: _share(plan) for plan in going.values() if plan["reap"] or plan["begins"]}
    vms = sum(len(share["begins"]) for share in shares.values())
    return {
        "plan": plan_id,
        "realm": realm,
        "made_at": now,
        "expires_at": now + max_age,
        "manifest": {key: manifest.get(key) for key in ("source", "epoch", "epochs", "count", "generated_at")},
        "budget": {"vms": vms, "hosts": len(shares), "caps": caps},
        "hosts": shares,
        "idle": sorted(set(by_name) - set(shares)),
        "refused": {plans[host]["host"]: refusal["code"] for host, refusal in sorted(refused.items())},
        "unseen": sorted(unseen),
    }


def _share(plan):
    return {
        "machine_id": plan["ledger"]["machine_id"],
        "acts": [act_of(token) for token in plan["reap"]],
        "begins": plan["begins"],
    }


# --- sealed and opened


def seal(found, keys):
    """Return the text of a DOCUMENT, signed with the first of the keys."""
    plain = json.dumps(found, sort_keys=True, separators=(",", ":"))
    signed = "%s:%d:%s" % (NAME, FORMAT, squeezed(plain))
    return "%s:%s" % (signed, _signature(signed.encode(), keys[0]))


def unseal(text, keys, *, realm, now, max_age):
    """Return the DOCUMENT of a text that one of the keys has signed, for this realm, not too long ago.

    Raises PlanError with the code ``plan_unreadable``, ``plan_altered``, ``plan_foreign`` or ``plan_expired``.
    """
    found = _parsed(_verified(text, keys))
    name = "the plan %s of %s" % (found["plan"], utc(found["made_at"]))
    if found["realm"] != realm:
        raise PlanError("plan_foreign", "%s is for realm %r, and this is %r" % (name, found["realm"], realm))
    if found["made_at"] > now + FUTURE_SECONDS:
        raise PlanError(
            "plan_expired",
            "%s was made %d s from now: the clock of this controller or of the one that made it is wrong"
            % (name, found["made_at"] - now),
        )
    if now > found["expires_at"]:
        raise PlanError("plan_expired", "%s has expired at %s: make a new one" % (name, utc(found["expires_at"])))
    if now - found["made_at"] > max_age:
        raise PlanError(
            "plan_expired",
            "%s is %d s old, more than reap_plan_max_age=%d: make a new one" % (name, now - found["made_at"], max_age),
        )
    return found


def check_artifact(text):
    """Raise PlanError for a text that is too large to be passed on by AWX."""
    if len(text) > MAX_ARTIFACT:
        raise PlanError(
            "plan_too_large",
            "it has %d bytes, and AWX passes on no more than %d of them safely: write it to reap_plan_path, where the "
            "jobs that apply it can read it, and set reap_plan_artifact to false" % (len(text), MAX_ARTIFACT),
        )


def is_sealed(text):
    """Tell whether it begins as a sealed plan does, and so is not the path of one."""
    return text.startswith(NAME + ":")


def _verified(text, keys):
    """Return what is packed in a text whose signature is good. Nothing is parsed before."""
    if len(text) > MAX_TEXT:
        raise PlanError("plan_unreadable", "it is larger than %d bytes: no plan is" % MAX_TEXT)
    text = text.strip(" \t\r\n")
    if not is_sealed(text):
        raise PlanError("plan_unreadable", "it does not begin with '%s:': no plan of playbooks/plan.yml" % NAME)
    signed, _colon, signature = text.rpartition(":")
    signed, signature = (part.encode("utf-8", "surrogateescape") for part in (signed, signature))
    # All keys, whichever it was.
    matches = [hmac.compare_digest(_signature(signed, key).encode(), signature) for key in keys]
    if not any(matches):
        raise PlanError(
            "plan_altered", "it has been altered, or was signed with another key than those in reap_plan_key"
        )
    _name, number, packed = signed.decode().split(":")
    if number != str(FORMAT):
        raise PlanError(
            "plan_unreadable",
            "it has format %s, and this version of the collection reads format %d: make it with this one"
            % (number, FORMAT),
        )
    return packed


def _parsed(packed):
    try:
        found = unpack(packed)
    except FactsError as err:
        raise PlanError("plan_unreadable", str(err)) from err
    for key, types in _SHAPE.items():
        if not isinstance(found, dict) or not isinstance(found.get(key), types):
            raise PlanError("plan_unreadable", "it has no '%s': another version of the collection made it" % key)
    return found


def _signature(signed, key):
    return hmac.new(key.encode("utf-8", "surrogateescape"), signed, hashlib.sha256).hexdigest()


# --- files


def clear(path, *, check_mode=False):
    """Remove the older plan at ``path``, if there is one; tell whether there was. What is no plan is left alone."""
    try:
        with open(path, encoding="utf-8", errors="replace") as stream:
            if not is_sealed(stream.read(len(NAME) + 1)):
                raise PlanError(
                    "path_taken", "reap_plan_path: %s is there and is no plan; it is not overwritten" % path
                )
        if not check_mode:
            os.unlink(path)
        return True
    except FileNotFoundError:
        return False
    except OSError as err:
        raise _unwritten(path, err) from err


def check_place(path):
    """Raise PlanError if no file can be made where the plan is to be."""
    try:
        with tempfile.TemporaryFile(dir=os.path.dirname(os.path.abspath(path))):
            pass
    except OSError as err:
        raise _unwritten(path, err) from err


def write(path, text):
    """Write the plan as a whole: whoever looks sees no file or all of it. Readable by its owner only."""
    directory = os.path.dirname(os.path.abspath(path))
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=os.path.basename(path) + ".", dir=directory)
        try:
            with os.fdopen(descriptor, "w", encoding="ascii") as stream:
                stream.write(text + "\n")
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as err:
        raise _unwritten(path, err) from err


def _unwritten(path, err):
    return PlanError("plan_not_written", "reap_plan_path: cannot write %s: %s" % (path, err.strerror))


def read(plan):
    """Return the text of ``reap_plan``: a path, or the text itself."""
    if is_sealed(plan.strip()):
        return plan
    try:
        with open(os.path.expanduser(plan), encoding="utf-8", errors="surrogateescape") as stream:
            return stream.read(MAX_TEXT + 1)
    except (OSError, ValueError) as err:
        raise PlanError("plan_unreadable", "cannot be read: %s" % (getattr(err, "strerror", None) or err)) from err


# --- the handle, and a host's share


def opened(found, path, now):
    """Write the hosts of a DOCUMENT into the new file ``path``; return its OPENED."""
    states: dict = dict.fromkeys(found["unseen"], UNSEEN)
    states.update(dict.fromkeys(found["idle"], IDLE), **dict.fromkeys(found["refused"], REFUSED))
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE host (name TEXT PRIMARY KEY, absent TEXT, share TEXT)")
        rows = [(name, state, "") for name, state in states.items()]
        rows += [(name, None, json.dumps(share)) for name, share in found["hosts"].items()]
        connection.executemany("INSERT OR REPLACE INTO host VALUES (?, ?, ?)", rows)
    kept = ("plan", "realm", "made_at", "expires_at", "manifest", "budget")
    return dict({key: found[key] for key in kept}, now=now, index=path)


def share_of(handle, name):
    """Return what applying.plan() takes of an OPENED plan for one host.

    WITHIN  ``{plan, made_at, epoch, now, absent, machine_id, acts, begins}``; ``absent`` is None, or one word for why
            the plan has nothing for the host
    """
    index = "file:%s?mode=ro" % urllib.parse.quote(handle["index"])
    with contextlib.closing(sqlite3.connect(index, uri=True)) as connection:
        row = connection.execute("SELECT absent, share FROM host WHERE name = ?", (name,)).fetchone()
    absent, text = row or (MISSING, "")
    share = {"machine_id": None, "acts": [], "begins": []} if absent else json.loads(text)
    whole = {"plan": handle["plan"], "made_at": handle["made_at"], "now": handle["now"]}
    return dict(whole, epoch=handle["manifest"].get("epoch"), absent=absent, **share)
