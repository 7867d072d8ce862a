# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The files of the model's hosts, in memory: what the real acts.apply() and acts.latch() read and write.

A host stands where they expect its state directory.
"""

from __future__ import annotations

import contextlib
import marshal
import types

from ansible_collections.microvm.reaper.plugins.module_utils import acts
from ansible_collections.microvm.reaper.plugins.module_utils import ledger as ledgers


class Disks:
    """In place of the modules ledger and journal, for one world."""

    LedgerError, Busy, MAX_REAPED = ledgers.LedgerError, ledgers.Busy, ledgers.MAX_REAPED

    def __init__(self, world):
        self.world = world

    def Lock(self, _host):
        """Return a lock; the model does one thing at a time."""
        return contextlib.nullcontext()

    def load(self, host, _realm):
        """Return ``(ledger, problem)``."""
        return host.ledger, host.problem

    def save(self, host, _realm, ledger):
        """What ledger.save() does, but for the file: a copy, as if through JSON but ten times as fast."""
        if self.world.now < host.full_until:
            raise ledgers.LedgerError("cannot write the ledger: No space left on device")
        host.ledger = marshal.loads(marshal.dumps(dict(ledger, generation=ledger["generation"] + 1)))
        host.problem = None
        return host.ledger

    def pin(self, host, vm_ids, until):
        """Add VMs to the host's pin file."""
        if self.world.now < host.full_until:
            raise ledgers.LedgerError("cannot write the pins: No space left on device")
        host.pins += ["%s until %s" % (vm_id, until) for vm_id in vm_ids]


class _NoJournal:
    """A journal decides nothing."""

    def __init__(self, _host, _realm, sweep=None):
        self.sweep = sweep

    def writing(self, _tell):
        return contextlib.nullcontext()

    def __getattr__(self, _name):
        return lambda *_arguments: None


@contextlib.contextmanager
def disks_of(world, disks=Disks):
    """Have acts use the model's disks and clock."""
    instead = {
        "ledgers": disks(world),
        "journals": types.SimpleNamespace(Journal=_NoJournal),
        "time": types.SimpleNamespace(time=world.wall),
        "boottime": lambda: world.now - world.acting.booted_at,
    }
    real = {name: getattr(acts, name) for name in instead if hasattr(acts, name)}
    for name in real:
        setattr(acts, name, instead[name])
    try:
        yield
    finally:
        for name, module in real.items():
            setattr(acts, name, module)
