# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The controller's side of microvm.reaper.brake."""

from __future__ import annotations

from ansible.plugins.action import ActionBase
from ansible_collections.microvm.reaper.plugins.plugin_utils import batches
from ansible_collections.microvm.reaper.plugins.plugin_utils.brake import CAPS, NOTHING_BEFORE, brake, so_far


class ActionModule(ActionBase):
    """Look at the plans of all hosts of the batch and stop them all, or single ones, before anything is removed."""

    TRANSFERS_FILES = False
    _requires_connection = False

    def run(self, tmp=None, task_vars=None):
        """Judge the batch once."""
        result = super().run(tmp, task_vars)
        _validation, arguments = self.validate_argument_spec(dict(CAPS, plans={"type": "str", "required": True}))
        hostvars = task_vars["hostvars"]
        plans = {host: hostvars.raw_get(host).get(arguments["plans"]) for host in task_vars["ansible_play_batch"]}
        plans = {host: plan for host, plan in plans.items() if plan}
        realm = next((plan["realm"] for plan in plans.values()), "")
        with batches.memory("brake") as by_realm:
            before = by_realm.get(realm, NOTHING_BEFORE)
            abort, refused = brake(plans, arguments, before)
            by_realm[realm] = so_far(before, plans, refused)
        if abort:
            result.update(failed=True, abort=abort, msg="stopped (%(code)s): %(message)s" % abort)
        else:
            result.update(changed=False, refused=refused)
        return result
