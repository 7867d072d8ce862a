# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Reads all kinds of a host, and what its supervisors say, in children that can be abandoned, and never writes.

A kind that hangs, crashes or is refused is ``unavailable`` with the reason; it never reads as an empty list and never
takes another kind with it. So with supervisors.
"""

from __future__ import annotations

import base64
import collections
import contextlib
import functools
import json
import time
import zlib

from . import all_supervisors
from . import ledger as ledgers
from .probe import Absent, Host, ProbeError, Worker, boottime, read_text
from .resource import columns

# More resources than this on one host are not leftovers but a fault; the kind is then not judged at all.
MAX_RESOURCES = 200000
PATIENCE_SECONDS = 2.0

# ``read()`` returns the entry of what could be read; ``empty`` is, beside its status, the entry of anything else.
_Reader = collections.namedtuple("_Reader", "read empty")


def gather(kinds, rules, realm, state_dir, seconds, packed=False, supervisors=()):
    """Return the facts of this host: ``{realm, boot_id, machine_id, boottime_seconds, ledger, ledger_problem,
    generation, other_realms, pins, kinds: {kind: {status, reason, resources, foreign, seconds}}, supervisors: {type:
    {status, reason, required}}, alive: {vm_id: why}}``.

    ``kinds`` are the modules of the kinds, ``rules`` their rules by name; a kind without rules is not read.
    ``supervisors`` are entries as all_supervisors has them. With ``packed`` the facts have ``packed``, see pack(), in
    place of ``kinds``, and ``alive`` is packed too.
    """
    host = Host(boottime() + seconds, state_dir)
    # Before the kinds: what another reaper does from here on makes its generation, and the plan made of this, void.
    ledger, problem = ledgers.load(state_dir, realm)
    pins = ledgers.pins(state_dir)
    wanted = [kind for kind in kinds if rules.get(kind.KIND)]
    readers = _of_kinds(wanted, rules, host, _in_columns if packed else dict)
    # After the kinds: what was started while these were read is seen to be alive.
    texts = _read_all(dict(readers, **_of_supervisors(supervisors, host)), host)
    said, alive = _said([(one, json.loads(texts.pop(_name(one)))) for one in supervisors])
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
        "supervisors": said,
        "alive": squeezed(json.dumps(alive)) if packed else alive,
        **({"packed": _packed(texts)} if packed else {"kinds": _parsed(texts)}),
    }


def collect_all(kinds, rules, host):
    """Return ``{kind: {status, reason, resources, foreign, seconds}}``."""
    return _parsed(_read_all(_of_kinds(kinds, rules, host, dict), host))


def pack(kinds):
    """Return the facts of the kinds as one string. Ansible handles one string 30 times faster than 10,000 records.

    ``columns`` are in place of ``resources``, see resource.columns().
    """
    return _packed({name: json.dumps(_in_columns(entry)) for name, entry in kinds.items()})


def _in_columns(entry):
    return dict({key: value for key, value in entry.items() if key != "resources"}, columns=columns(entry["resources"]))


def _packed(texts):
    return squeezed("{%s}" % ", ".join("%s: %s" % (json.dumps(name), text) for name, text in texts.items()))


def squeezed(text):
    """Return ASCII text as a shorter one; ``unpack()`` of facts.py reads it."""
    return base64.b64encode(zlib.compress(text.encode("ascii"), 6)).decode("ascii")


def _parsed(texts):
    return {name: json.loads(text) for name, text in texts.items()}


def _of_kinds(kinds, rules, host, shape):
    """Return the readers of the kinds; an entry is what ``shape`` makes of it."""
    empty = shape({"resources": [], "foreign": 0, "seconds": None})
    return {
        kind.KIND: _Reader(lambda kind=kind: shape(_timed(kind, rules[kind.KIND], host)), empty) for kind in kinds
    }


def _of_supervisors(entries, host):
    return {_name(entry): _Reader(functools.partial(_alive, entry, host), {"alive": {}}) for entry in entries}


def _name(entry):
    return "supervisor " + entry["type"]  # containerd is both


def _alive(entry, host):
    found = all_supervisors.BY_TYPE[entry["type"]].alive(entry, host)
    if len(found) > MAX_RESOURCES:
        raise ProbeError("%d VMs, more than %d" % (len(found), MAX_RESOURCES))
    return {"alive": found, "status": "ok", "reason": None}


def _said(answers):
    """Return ``(supervisors, alive)`` of the facts."""
    supervisors, alive = {}, {}
    for entry, answer in answers:
        for vm_id, why in answer.pop("alive").items():
            alive.setdefault(vm_id, why)
        supervisors[entry["type"]] = dict(answer, required=entry["required"])
    return supervisors, alive


def _read_all(readers, host):
    """Return the entries of all readers, ``{name: entry in JSON}``.

    One child reads one after the other: another fork costs more time than most of them take, and as much memory again.
    Only one that is slow, because it has much to read or hangs, keeps its child to itself, and the rest goes on beside.
    """
    deadline = time.monotonic() + host.remaining()
    patience = min(PATIENCE_SECONDS, host.remaining() / (2 * len(readers) or 1))
    found, busy, worker = {}, {}, None
    for name, reader in readers.items():
        if worker is None or worker.is_gone:
            worker = Worker(lambda name: readers[name].read())
        with contextlib.suppress(ProbeError):  # it has ended: _answer() says so
            worker.send(name)
        if worker.answers_within(patience):
            found[name] = _answer(worker, deadline, reader.empty)
        else:
            busy[name], worker = worker, None
    for name, slow in busy.items():
        found[name] = _answer(slow, deadline, readers[name].empty)
        slow.close()
    if worker is not None:
        worker.close()
    return {name: found[name] for name in readers}


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


def _answer(worker, deadline, empty):
    """Return the child's answer as it wrote it: what it found is large, and goes to the controller as it is."""
    try:
        return worker.result_text(deadline)
    except Absent as err:
        return json.dumps(dict(empty, status="absent", reason=str(err)))
    except ProbeError as err:
        return json.dumps(dict(empty, status="unavailable", reason=str(err)))
