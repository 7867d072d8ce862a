# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The controller's side of microvm.reaper.recheck."""

from __future__ import annotations

from ansible.plugins.action import ActionBase
from ansible_collections.microvm.reaper.plugins.action.live_manifest import SPEC, context
from ansible_collections.microvm.reaper.plugins.plugin_utils import sources
from ansible_collections.microvm.reaper.plugins.plugin_utils.brake import live_again, over_budget_now
from ansible_collections.microvm.reaper.plugins.plugin_utils.manifest import ManifestError


class ActionModule(ActionBase):
    """Ask the live sources about the few VMs that are about to be reaped, and name those that are to be spared."""

    TRANSFERS_FILES = False
    _requires_connection = False

    def run(self, tmp=None, task_vars=None):
        """Ask once for the whole batch; not at all where nothing goes."""
        result = super().run(tmp, task_vars)
        _validation, arguments = self.validate_argument_spec(
            dict(
                SPEC,
                plans={"type": "str", "required": True},
                refused={"type": "dict", "default": {}},
                manifest={"type": "dict", "required": True},
            )
        )
        hosts = [host for host in task_vars["ansible_play_batch"] if host not in arguments["refused"]]
        known = {host: task_vars["hostvars"].raw_get(host).get(arguments["plans"]) for host in hosts}
        plans = {host: plan for host, plan in known.items() if plan and plan["reap"]}
        doomed = {token["vm_id"] for plan in plans.values() for token in plan["reap"]}
        result.update(changed=False, asked=sorted(doomed), spare={})
        if not doomed:
            return result
        handle = arguments["manifest"]
        about = context(self, task_vars, arguments)
        try:
            listed, budget = sources.still_listed(
                arguments["sources"], about, doomed, handle, max_age=arguments["max_age"]
            )
        except ManifestError as err:
            why = "the live source did not answer once more (%s): %s" % (err.code, err)
            result.update(warnings=["nothing is reaped: %s" % why])
            spare = {host: {token["vm_id"]: why for token in plan["reap"]} for host, plan in plans.items()}
        else:
            spare = dict(live_again(plans, listed, not handle["names_hosts"]), **over_budget_now(plans, budget))
        result.update(spare=spare)
        return result
