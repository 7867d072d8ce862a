# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The controller's side of microvm.reaper.abandoned_vmms: says what came of it, as the report of a sweep does."""

from __future__ import annotations

from ansible.plugins.action import ActionBase
from ansible.utils.display import Display


class ActionModule(ActionBase):
    """Run the module, and print its report, which a callback that hides what is ok would hide with it."""

    TRANSFERS_FILES = False

    def run(self, tmp=None, task_vars=None):
        """Run the module."""
        result = super().run(tmp, task_vars)
        result.update(self._execute_module(task_vars=task_vars))
        for line in result.get("report", []):
            Display().display("microvm.reaper: %s" % line)
        return result
