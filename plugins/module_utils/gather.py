# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Reads all kinds of a host, in children that can be abandoned, and never writes.

A kind that hangs, crashes or is refused is ``unavailable`` with the reason; it never reads as an empty list and never
takes another kind with it.
"""

from __future__ import annotations

import base64
import contextlib
import json
import time
import zlib

from . import ledger as ledgers
from .probe import Absent, Host, ProbeError, Worker, boottime, read_text
from .resource import columns

# More resources than this on one host are not leftovers but a fault; the kind is then not judged at all.
MAX_RESOURCES = 200000
PATIENCE_SECONDS = 2.0


def gather(kinds, rules, realm, state_dir, seconds, packed=False):
    """Return the facts of this host: ``{realm, boot_id, machine_id, boottime_seconds, ledger, ledger_problem,
    generation, other_realms, pins, kinds: {kind: {status, reason, resources, foreign, seconds}}}``.

    ``kinds`` are the modules of the kinds, ``rules`` their rules by name; a kind without rules is not read. With
    ``packed`` the facts have ``packed``, see pack(), in place of ``kinds``.
    """
    host = Host(boottime() + seconds, state_dir)
    # Before the kinds: what another reaper does from here on makes its generation, and the plan made of this, void.
    ledger, problem = ledgers.load(state_dir, realm)
    pins = ledgers.pins(state_dir)
    texts = _read_all([kind for kind in kinds if rules.get(kind.KIND)], rules, host, _in_columns if packed else dict)
    return {
        "realm": realm,
        "boot_id": host.boot_id,
        "machine_id": machine_id(),
        "boottime_seconds": round(host.started, 3),
        "ledger": ledger,
        "ledger_problem": problem,
        "generation": ledger["generation"],
        "other_realms": ledgers.other_realms(state_dir, realm),
        "pins": pins,
        **({"packed": _packed(texts)} if packed else {"kinds": _parsed(texts)}),
    }


def collect_all(kinds, rules, host):
    """Return ``{kind: {status, reason, resources, foreign, seconds}}``."""
    return _parsed(_read_all(kinds, rules, host, dict))


def pack(kinds):
    """Return the facts of the kinds as one string. Ansible handles one string 30 times faster than 10,000 records.

    ``columns`` are in place of ``resources``, see resource.columns().
    """
    return _packed({name: json.dumps(_in_columns(entry)) for name, entry in kinds.items()})


def _in_columns(entry):
    return dict({key: value for key, value in entry.items() if key != "resources"}, columns=columns(entry["resources"]))


def _packed(texts):
    whole = "{%s}" % ", ".join("%s: %s" % (json.dumps(name), text) for name, text in texts.items())
    return base64.b64encode(zlib.compress(whole.encode("ascii"), 6)).decode("ascii")


def _parsed(texts):
    return {name: json.loads(text) for name, text in texts.items()}


def _read_all(kinds, rules, host, shape):
    """Return what collect_all() does, of each kind as JSON, after ``shape(entry)``.

    One child reads kind after kind: another fork costs more time than most kinds take, and as much memory again. Only
    one that is slow, because it has much to read or hangs, keeps its child to itself, and the rest goes on beside it.
    """
    by_name = {kind.KIND: kind for kind in kinds}
    deadline = time.monotonic() + host.remaining()
    patience = min(PATIENCE_SECONDS, host.remaining() / (2 * len(kinds) or 1))
    found, busy, worker = {}, {}, None
    for name in by_name:
        if worker is None or worker.is_gone:
            worker = Worker(lambda name: shape(_timed(by_name[name], rules[name], host)))
        with contextlib.suppress(ProbeError):  # it has ended: _answer() says so
            worker.send(name)
        if worker.answers_within(patience):
            found[name] = _answer(worker, deadline, shape)
        else:
            busy[name], worker = worker, None
    for name, slow in busy.items():
        found[name] = _answer(slow, deadline, shape)
        slow.close()
    if worker is not None:
        worker.close()
    return {name: found[name] for name in by_name}


def machine_id():
    """Return this machine's id, None where there is none."""
    try:
        return read_text("/etc/machine-id", 128).strip() or None
    except OSError:
        return None


def _timed(kind, rules, host):
    begin = time.monotonic()
    found = kind.collect(rules, host)
    if len(found["resources"]) > MAX_RESOURCES:
        raise ProbeError("%d resources, more than %d" % (len(found["resources"]), MAX_RESOURCES))
    return dict(found, seconds=round(time.monotonic() - begin, 3), status="ok", reason=None)


def _answer(worker, deadline, shape):
    """Return the child's answer as it wrote it: what it found is large, and goes to the controller as it is."""
    empty = {"resources": [], "foreign": 0, "seconds": None}
    try:
        return worker.result_text(deadline)
    except Absent as err:
        return json.dumps(shape(dict(empty, status="absent", reason=str(err))))
    except ProbeError as err:
        return json.dumps(shape(dict(empty, status="unavailable", reason=str(err))))
