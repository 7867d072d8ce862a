# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Evidence: what was there of a VM before it was removed, kept on its host for people who ask later.

Before the acts ``take()`` writes one small bundle for each family that is about to lose something (evidence_store.py
says what is in one). Each kind tells what it sees, in a child that can be abandoned, within a budget of time for the
whole sweep: a reap does not wait for evidence. After the acts ``follow()`` starts one process in the background, which
copies the whole logs out of jails that were moved aside; nobody waits for it, and there is one on a host at a time.

Evidence that fails stops nothing, unless it is required: then the families without any are left alone.

WITNESS ``{title, source, text}``: one thing that a kind has read; source is the command line or path
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import fcntl
import os
import signal
import time

from . import ledger as ledgers
from . import mounts, safe_read, safe_tree
from .evidence_store import CAUSES, VERSION, EvidenceError, Store, as_bytes, name_of, packed
from .probe import DeadlineExceeded, ProbeError, Worker, detached
from .resource import SET_ASIDE, VM_ID

DEFAULTS = {"seconds": 5.0, "bytes": 16 * 1024 * 1024, "percent": 25, "max_bytes": 1024**3, "required": False}
# Of the time of a sweep's evidence, how much is for reading; in the rest there is metadata only.
READING_SHARE = 0.8
MAX_TOLD = 20
OUT_OF_TIME = "the time for evidence (reap_evidence_seconds) was used up"

BACKGROUND_SECONDS = 60
BACKGROUND_BYTES = 256 * 1024 * 1024
MAX_LOGS = 50
MAX_BUNDLE = 256 * 1024 * 1024
LOCK = "evidence.lock"
_IOPRIO_SET = {"x86_64": 251, "aarch64": 30, "riscv64": 30, "loongarch64": 30, "ppc64le": 273, "s390x": 282}
_IOPRIO_IDLE = 3 << 13


class Evidence:
    """The evidence of one sweep on one host."""

    def __init__(self, state_dir, realm, options):
        self._state_dir = state_dir
        self._realm = realm
        self._options = dict(DEFAULTS, **options)
        self._bundles = {}  # {vm_id: name}
        self._rules = {}
        self._kinds = {}
        self._failed = []
        self._said = collections.Counter()
        self._background = None

    def take(self, plan, hands, sweep):
        """Write the bundles of all families in the plan; return ``{vm_id: why}`` of those that are to be left alone.

        Never raises for what fails, and takes little longer than the time it has.
        """
        families = collections.defaultdict(list)
        for token in plan["reap"]:
            if "since" not in token:  # of what was set aside the sweep that did it has kept evidence
                families[token["vm_id"]].append(token)
        if not families:
            return {}
        self._rules, self._kinds = hands.rules, hands.kinds
        begin, seconds = time.monotonic(), min(self._options["seconds"], hands.host.remaining() / 2)
        try:
            with self._store() as store, _Witnesses(hands, seconds) as witnesses:
                store.clean()
                common = self._common(plan, hands.host, sweep)
                lacking = {}
                for vm_id, tokens in families.items():
                    spent = (time.monotonic() - begin) / seconds
                    why = self._one(store, witnesses, dict(common, **_about(plan, vm_id, tokens)), tokens, spent)
                    if why is not None:
                        lacking[vm_id] = why
        except Exception as err:  # whatever it is, it must not stop a reap
            self._fail(_words(err))
            lacking = dict.fromkeys(families, _words(err))
        return lacking if self._options["required"] else {}

    def follow(self, outcomes):
        """Have the whole logs of the jails that were moved aside copied into their bundles, in the background."""
        jobs = [one for one in outcomes if one["outcome"] == SET_ASIDE and self._has_logs(one)]
        lock = self._lock() if jobs else None
        if lock is None:
            return
        try:
            detached(lambda: self._copy_logs(jobs), lock)
            self._background = "whole logs of %d jails are being copied" % len(jobs)
        except OSError as err:
            self._background = "no process to copy whole logs could be started: %s" % err.strerror
        finally:
            os.close(lock)  # the process in the background has it now, and the kernel drops it with that

    def result(self):
        """Return what came of it: ``{written, bytes, short, known, skipped, failed: [text], background}``."""
        counts = {key: self._said[key] for key in ("written", "bytes", "short", "known", "skipped")}
        return dict(counts, failed=self._failed, background=self._background)

    def _store(self):
        return Store(self._state_dir, self._realm, self._options["percent"], self._options["max_bytes"])

    def _fail(self, text):
        if len(self._failed) < MAX_TOLD:
            self._failed.append(text)

    def _common(self, plan, host, sweep):
        now = time.time()
        manifest = plan.get("manifest", {})
        return {
            "version": VERSION,
            "host": plan.get("host"),
            "realm": self._realm,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now)),
            "seconds": round(now),
            "sweep": sweep,
            "source": manifest.get("source"),
            "epoch": manifest.get("epoch"),
            "machine_id": plan["ledger"].get("machine_id"),
            "boot_id": host.boot_id,
            "logs": "their ends only",
        }

    def _one(self, store, witnesses, metadata, tokens, spent):
        """Write one family's bundle; return None, or why there is none."""
        vm_id = metadata["vm_id"]
        try:
            known = self._known(store, vm_id, tokens) if spent < 1 else None
            if known:
                self._bundles[vm_id] = known
                self._said["known"] += 1
                return None
            if spent >= 1 or spent >= READING_SHARE and self._options["required"]:
                self._said["skipped"] += 1
                return OUT_OF_TIME
            sections, hung = [], None
            if spent < READING_SHARE:
                sections, hung = witnesses.about(tokens, self._options["bytes"])
            else:
                metadata["left_out"] = OUT_OF_TIME
                self._said["short"] += 1
            if hung and self._options["required"]:
                raise EvidenceError(hung)
            name = name_of(metadata["seconds"], vm_id, metadata["cause"], metadata["sweep"])
            data = packed(metadata, sections)
            store.write(name, data)
        except Exception as err:  # whatever it is, it is the evidence of this family only
            self._fail("%s: %s" % (vm_id, _words(err)))
            return _words(err)
        self._bundles[vm_id] = name
        self._said["written"] += 1
        self._said["bytes"] += len(data)
        return None

    @staticmethod
    def _known(store, vm_id, tokens):
        """Return the name of a bundle that has it all already, as of a family that was busy; None where none has."""
        name = store.newest(vm_id)
        if name is None:
            return None
        try:
            before = store.metadata(name)
            seen = {(one["kind"], one["identity"]) for one in before["resources"]}
        except (EvidenceError, KeyError, TypeError):
            return None
        complete = "left_out" not in before and seen.issuperset((one["kind"], one["identity"]) for one in tokens)
        return name if complete else None

    # --- in the background

    def _has_logs(self, outcome):
        return outcome["vm_id"] in self._bundles and hasattr(self._kinds.get(outcome["kind"]), "logs_of")

    def _lock(self):
        """Return the descriptor of the lock of all such processes on this host, None where one is at work."""
        path = os.path.join(self._state_dir, LOCK)
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as err:
            self._background = "cannot open the lock %s: %s" % (path, ledgers.why(err))
            return None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            self._background = "whole logs were not copied: that of an earlier sweep goes on (it holds %s)" % path
            return None
        return lock

    def _copy_logs(self, jobs):
        """Add whole logs to the bundles. Ends by itself, by its deadline or by the signal of the alarm."""
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(BACKGROUND_SECONDS + 5)
        end, left = time.monotonic() + BACKGROUND_SECONDS, BACKGROUND_BYTES
        _be_quiet()
        table = mounts.read()
        with self._store() as store:
            for outcome in jobs:
                if time.monotonic() > end or left <= 0:
                    break
                with contextlib.suppress(EvidenceError, OSError, safe_read.Unreadable):
                    left -= self._add_logs(store, outcome, table, min(left, self._options["bytes"]))
            store.clean()

    def _add_logs(self, store, outcome, table, limit):
        """Write a bundle anew with all logs of what was moved aside; return how many bytes of them were read."""
        base, names, globs = self._kinds[outcome["kind"]].logs_of(outcome, self._rules.get(outcome["kind"]) or [])
        name, path = self._bundles[outcome["vm_id"]], os.path.join(base, *names)
        metadata, sections = store.read(name, MAX_BUNDLE)
        added, used = [], 0
        with safe_tree.Tree(base, names) as tree:
            reader = safe_read.Reader(tree, table)
            # The smallest first: one that is enormous must not take the room of all others.
            for log in sorted(reader.matching(globs, MAX_LOGS), key=reader.size):
                try:
                    data, notes = reader.end_of(log, max(0, limit - used))
                except safe_read.Unreadable as err:
                    data, notes = b"", ["not read: %s" % err]
                used += len(data)
                source = "; ".join([os.path.join(path, safe_read.shown(log))] + notes)
                added.append(("%s-whole-log-" % outcome["kind"] + safe_read.shown(log), source, data))
        if added:
            metadata["logs"] = "whole, as far as they fit"
            store.write(name, packed(metadata, sections + added))
        return used


class _Witnesses:
    """Asks the kinds what they see, in a child. One that hangs costs a share of the time and is left alone then."""

    def __init__(self, hands, seconds):
        self._hands = hands
        self._kinds = {name: module for name, module in hands.kinds.items() if hasattr(module, "witness")}
        self._share = seconds / (len(self._kinds) + 1)
        self._end = time.monotonic() + seconds
        self._worker = None
        self._hung = {}

    def __enter__(self):
        return self

    def __exit__(self, *_exception):
        if self._worker is not None:
            self._worker.close()

    def about(self, tokens, limit):
        """Return ``([SECTION], why)`` of a family; ``why`` is None, or which kind hung."""
        sections, hung = [], None
        for token in tokens:
            for one in self._ask(token):
                data = as_bytes(one["text"])
                if len(data) > limit:
                    data = data[:limit] + b"\n... cut: reap_evidence_bytes are used up\n"
                limit -= min(len(data), limit)
                sections.append((one["title"], one["source"], data))
            hung = hung or self._hung.get(token["kind"])
        return sections, hung

    def _ask(self, token):
        kind = token["kind"]
        if kind not in self._kinds:
            return []
        left = min(self._share, self._end - time.monotonic())
        if kind in self._hung or left <= 0:
            return [_failure(token, self._hung.get(kind, OUT_OF_TIME))]
        if self._worker is None or self._worker.is_gone:
            self._worker = Worker(self._work)
        try:
            return self._worker.call([kind, token], left)
        except DeadlineExceeded as err:
            self._hung[kind] = "to look at a %s hung: %s" % (kind, err)
            return [_failure(token, self._hung[kind])]
        except (ProbeError, OSError) as err:
            return [_failure(token, str(err))]

    def _work(self, item):
        kind, token = item
        return self._kinds[kind].witness(token, self._hands.rules.get(kind) or [], self._hands.host)


def _about(plan, vm_id, tokens):
    """Return the part of METADATA that is of one family."""
    family = plan.get("families", {}).get(vm_id, {})
    # What matters most of it: a member may be here although the VM lives elsewhere.
    grades = [grade for grade in CAUSES if grade in [token.get("evidence") for token in tokens]]
    return {
        "vm_id": vm_id if VM_ID.fullmatch(vm_id) else ascii(vm_id)[:200],
        "cause": grades[-1] if grades else CAUSES[-1],
        "verdict": family.get("verdict"),
        "reasons": [reason["text"] for reason in family.get("reasons", [])],
        "strikes": family.get("strikes"),
        "resources": [{key: token[key] for key in ("kind", "name", "identity")} for token in tokens],
    }


def _words(err):
    """Return what an error says, with its kind where it is none of ours."""
    return str(err) if isinstance(err, EvidenceError) else "%s: %s" % (type(err).__name__, err)


def _failure(token, why):
    return {"title": token["kind"], "source": token["name"], "text": "not read: %s" % why}


def _be_quiet():
    """Leave the processors and the disks to whoever wants them."""
    with contextlib.suppress(OSError):
        os.nice(19)
    number = _IOPRIO_SET.get(os.uname().machine)
    if number is not None:
        ctypes.CDLL(None).syscall(number, 1, 0, _IOPRIO_IDLE)  # where it fails it was not to be
