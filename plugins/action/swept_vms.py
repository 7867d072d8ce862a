# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The controller's side of microvm.reaper.swept_vms."""

from __future__ import annotations

import json

from ansible.plugins.action import ActionBase
from ansible.utils.display import Display
from ansible_collections.microvm.reaper.plugins.plugin_utils import swept

VARIABLES = {
    "gathered": "__reap_gathered",
    "plan": "__reap_plan",
    "brake": "__reap_brake",
    "recheck": "__reap_recheck",
}


class ActionModule(ActionBase):
    """Tell what the hosts of a whole sweep have something of, or why nothing may be concluded from it."""

    TRANSFERS_FILES = False
    _requires_connection = False

    def run(self, tmp=None, task_vars=None):
        """Look at what the steps of the sweep left in the variables of its hosts."""
        result = super().run(tmp, task_vars)
        names = {name: {"type": "str", "default": default} for name, default in VARIABLES.items()}
        _validation, arguments = self.validate_argument_spec(
            {
                "hosts": {"type": "list", "elements": "str", "required": True},
                "realm": {"type": "str", "default": ""},
                "variables": {"type": "dict", "default": {}, "apply_defaults": True, "options": names},
            }
        )
        others = set(task_vars["ansible_play_hosts"]).difference(task_vars["ansible_play_batch"])
        known = {host: _variables(task_vars["hostvars"], host) for host in arguments["hosts"]}
        said = {
            host: {what: variables.get(name) for what, name in arguments["variables"].items()}
            for host, variables in known.items()
        }
        try:
            swept.refuse_batches(others.intersection(arguments["hosts"]))
            facts, unanswered, realm = swept.seen(said, arguments["realm"])
        except swept.SweepError as err:
            result.update(failed=True, msg="nothing can be concluded from this sweep: %s" % err)
            return result
        for line in swept.report(unanswered):
            Display().display("microvm.reaper: %s" % line)
        # As one text: a fleet has a hundred thousand ids, and ansible tags every element of a structure.
        result.update(changed=False, facts=json.dumps(facts), hosts=len(facts), unanswered=unanswered, realm=realm)
        return result


def _variables(hostvars, host):
    """Return the variables of a host, none for one that the inventory does not have."""
    return hostvars.raw_get(host) if host in hostvars else {}
