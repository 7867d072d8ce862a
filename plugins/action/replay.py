# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The controller's side of microvm.reaper.replay."""

from __future__ import annotations

from ansible.plugins.action import ActionBase
from ansible.utils.display import Display
from ansible_collections.microvm.reaper.plugins.plugin_utils import inputs, replaying
from ansible_collections.microvm.reaper.plugins.plugin_utils.variables import role_spec


class ActionModule(ActionBase):
    """Make the plans of a saved sweep again and say what differs."""

    TRANSFERS_FILES = False
    _requires_connection = False

    def run(self, tmp=None, task_vars=None):
        """Read the file, touch no host."""
        result = super().run(tmp, task_vars)
        _validation, arguments = self.validate_argument_spec(
            {"path": {"type": "path", "required": True}, "policy": {"type": "dict", "default": {}}}
        )
        path, variables = arguments["path"], arguments["policy"]
        try:
            changes = replaying.changes(variables, role_spec())
            replayed = replaying.replay_all(inputs.Reader(path), changes)
        except (inputs.InputsError, replaying.ReplayError) as err:
            result.update(failed=True, msg=str(err))
            return result
        Display().display(replaying.text(replayed, variables))
        result.update(replayed, changed=False)
        if replayed["differing"] and not variables:
            result.update(failed=True, msg=replaying.verdict(replayed))
        return result
