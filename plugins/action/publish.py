# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The controller's side of microvm.reaper.publish."""

from __future__ import annotations

from ansible.plugins.action import ActionBase
from ansible_collections.microvm.reaper.plugins.plugin_utils import publishing


class ActionModule(ActionBase):
    """Tell whoever wants to know which VMs have ended, before the slow cleaning begins."""

    TRANSFERS_FILES = False
    _requires_connection = False

    def run(self, tmp=None, task_vars=None):
        """Publish once for the whole batch; never fails, and in check mode does nothing."""
        result = super().run(tmp, task_vars)
        _validation, arguments = self.validate_argument_spec(
            {
                "plans": {"type": "str", "required": True},
                "refused": {"type": "dict", "default": {}},
                "spare": {"type": "dict", "default": {}},
                "realm": {"type": "str", "required": True},
                "sweep": {"type": "str", "default": ""},
                "url": {"type": "str", "required": True, "no_log": True},
                "headers": {"type": "dict", "default": {}, "no_log": True},
                "timeout": {"type": "float", "default": 5},
            }
        )
        hostvars = task_vars["hostvars"]
        plans = {host: hostvars.raw_get(host).get(arguments["plans"]) for host in task_vars["ansible_play_batch"]}
        hosts = publishing.ended(plans, arguments["refused"], arguments["spare"])
        result.update(changed=False, published=False, hosts=len(hosts), error=None)
        if not hosts or self._task.check_mode:
            return result
        document = publishing.document(arguments["realm"], arguments["sweep"], hosts)
        result["error"] = publishing.post(
            arguments["url"], document, headers=arguments["headers"], timeout=arguments["timeout"]
        )
        result["published"] = result["error"] is None
        if result["error"]:
            result["warnings"] = ["the end of these VMs was not published: %s" % result["error"]]
        return result
