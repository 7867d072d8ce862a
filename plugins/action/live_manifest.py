# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The controller's side of microvm.reaper.live_manifest."""

from __future__ import annotations

import contextlib
import os
import tempfile

from ansible import constants as C
from ansible.errors import AnsibleError
from ansible.inventory.manager import InventoryManager
from ansible.plugins.action import ActionBase
from ansible.template import Templar
from ansible.vars.manager import VariableManager
from ansible_collections.microvm.reaper.plugins.plugin_utils import batches, manifest, sources

SPEC = {
    "realm": {"type": "str", "required": True},
    "sources": {"type": "list", "elements": "dict", "required": True},
    "max_age": {"type": "float", "default": 600},
    "terminal_states": {"type": "list", "elements": "str", "default": list(manifest.TERMINAL_STATES)},
}


class Inventory:
    """The inventory, read again now; ``groups`` maps names to host names.

    Hosts that the play has and the sources have not (add_host) are kept: they can only add life.
    """

    def __init__(self, loader, task_vars):
        self._manager = InventoryManager(loader=loader, sources=task_vars["ansible_inventory_sources"], parse=False)
        with _all_or_nothing():
            self._manager.parse_sources(cache=False)
        self._variables = VariableManager(loader=loader, inventory=self._manager)
        self._extra_variables = self._variables.extra_vars
        self._own = VariableManager(loader=loader, inventory=self._manager)
        self._own._extra_vars = {}
        self._loader = loader
        self._play_hostvars = task_vars["hostvars"]
        self.groups = self._manager.get_groups_dict()
        for group, hosts in task_vars["groups"].items():
            self.groups[group] = self.groups.get(group, []) + sorted(set(hosts) - set(self.groups.get(group, [])))

    def variables(self, name):
        """Return the variables of a host of the inventory; those that hold a template are rendered."""
        host = self._manager.get_host(name)
        if host is None:
            return dict(self._play_hostvars.raw_get(name))
        found = self._variables.get_vars(host=host, include_hostvars=False)
        return _Rendered(found, Templar(loader=self._loader, variables=found))

    def own_variables(self, name):
        """Return the variables that are a host's own.

        One of the command line goes before them all, so that its ``vm_id``, for example, would be the id of every VM.
        """
        host = self._manager.get_host(name) or self._play_hostvars._inventory.get_host(name)
        found = self._own.get_vars(host=host, include_hostvars=False)
        return _Rendered(found, Templar(loader=self._loader, variables=dict(self._extra_variables, **found)))


@contextlib.contextmanager
def _all_or_nothing():
    """Let no part of the inventory be left out: Ansible by default warns of a plugin that fails, and goes on."""
    setting = "INVENTORY_ANY_UNPARSED_IS_FAILED"
    before = getattr(C, setting)
    setattr(C, setting, True)
    try:
        yield
    except AnsibleError as err:
        said = " ".join(str(err).split())
        raise manifest.ManifestError("unreadable", "a part of the inventory cannot be read: %s" % said) from err
    finally:
        setattr(C, setting, before)


class _Rendered(dict):
    def __init__(self, variables, templar):
        super().__init__(variables)
        self._templar = templar

    def get(self, key, default=None):
        """Return a variable; rendering is costly, so it is for those that hold a template."""
        value = super().get(key, default)
        return self._templar.template(value) if "{{" in str(value) else value


def context(action, task_vars, arguments):
    """Return what sources may ask about the run, see sources/__init__.py."""
    return {
        "realm": arguments["realm"],
        "now": manifest.now(),
        "directory": task_vars.get("playbook_dir") or os.getcwd(),
        "inventory": lambda: Inventory(action._loader, task_vars),
        # Only AWX has a number for its jobs.
        "of_awx": "awx_job_id" in task_vars,
        "terminal_states": arguments["terminal_states"],
    }


class ActionModule(ActionBase):
    """Fetch the live sources, prove them, keep them in a local file; return the small handle of it."""

    TRANSFERS_FILES = False
    _requires_connection = False

    def run(self, tmp=None, task_vars=None):
        """Fetch once for the whole batch."""
        result = super().run(tmp, task_vars)
        _validation, arguments = self.validate_argument_spec(dict(SPEC, epochs={"type": "dict", "default": {}}))
        directory = tempfile.mkdtemp(prefix="live-", dir=C.DEFAULT_LOCAL_TMP)  # type: ignore[attr-defined]
        path = os.path.join(directory, "manifest.sqlite")
        about = context(self, task_vars, arguments)
        try:
            fetched = sources.fetch(arguments["sources"], about, path, max_age=arguments["max_age"])
            if fetched["realm"] != arguments["realm"]:
                raise manifest.ManifestError(
                    "other_realm",
                    "%s speaks for realm %r, the sweep is for %r"
                    % (fetched["source"], fetched["realm"], arguments["realm"]),
                )
            _no_older(fetched, arguments["epochs"])
        except manifest.ManifestError as err:
            result.update(failed=True, msg="live source refused (%s): %s" % (err.code, err), code=err.code)
            return result
        warnings = ["live source skipped: %s" % skipped for skipped in fetched.pop("skipped")]
        result.update(changed=False, manifest=fetched, warnings=warnings)
        return result


def _no_older(fetched, epochs):
    """Refuse a list whose epoch is lower than in ``epochs``, or in an earlier batch of this run: a stale copy answered.
    """
    with batches.memory("epochs") as by_realm:
        seen = by_realm.setdefault(fetched["realm"], {})
        for source, epoch in fetched["epochs"].items():
            for before in (seen, epochs):
                manifest.check_epoch(source, before.get(source), epoch)
        seen.update(fetched["epochs"])
