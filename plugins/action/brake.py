# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The controller's side of microvm.reaper.brake."""

from __future__ import annotations

import json
import os

from ansible import constants as C
from ansible.plugins.action import ActionBase
from ansible_collections.microvm.reaper.plugins.plugin_utils.brake import brake, doomed


class _Spent:
    """How many VMs the batches of this run were to reap: a file that lasts as long as the run, since batches share
    nothing else."""

    def __init__(self, path):
        self.path = path

    def of_earlier_batches(self, count):
        """Return the sum so far, and add ``count`` to it."""
        try:
            with open(self.path, encoding="utf-8") as stream:
                before = json.load(stream)
        except FileNotFoundError:
            before = 0
        with open(self.path, "w", encoding="utf-8") as stream:
            json.dump(before + count, stream)
        return before


class ActionModule(ActionBase):
    """Look at the plans of all hosts of the batch and stop them all, or single ones, before anything is removed."""

    TRANSFERS_FILES = False
    _requires_connection = False

    def run(self, tmp=None, task_vars=None):
        """Judge the batch once."""
        result = super().run(tmp, task_vars)
        _validation, arguments = self.validate_argument_spec(
            {
                "plans": {"type": "str", "required": True},
                "max_per_fleet": {"type": "int", "default": 500},
                "max_percent": {"type": "float", "default": 30},
                "percent_floor": {"type": "int", "default": 10},
            }
        )
        hostvars = task_vars["hostvars"]
        plans = {host: hostvars.raw_get(host).get(arguments["plans"]) for host in task_vars["ansible_play_batch"]}
        plans = {host: plan for host, plan in plans.items() if plan}
        spent = _Spent(os.path.join(C.DEFAULT_LOCAL_TMP, "spent.json"))  # type: ignore[attr-defined]
        abort, refused = brake(plans, arguments, spent.of_earlier_batches(doomed(plans)))
        if abort:
            result.update(failed=True, abort=abort, msg="stopped (%(code)s): %(message)s" % abort)
        else:
            result.update(changed=False, refused=refused)
        return result
