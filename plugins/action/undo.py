# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The controller's side of microvm.reaper.undo."""

from __future__ import annotations

from ansible.plugins.action import ActionBase
from ansible.utils.display import Display
from ansible_collections.microvm.reaper.plugins.plugin_utils import report


class ActionModule(ActionBase):
    """Run the module on the host, and say what came of it: a person waits for that."""

    TRANSFERS_FILES = False

    def run(self, tmp=None, task_vars=None):
        """Bring back what was set aside on one host."""
        result = super().run(tmp, task_vars)
        result.update(self._execute_module(task_vars=task_vars))
        for line in report.undone(task_vars["inventory_hostname"], result):
            Display().display(line)
        return result
