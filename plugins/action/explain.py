# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The controller's side of microvm.reaper.explain."""

from __future__ import annotations

from ansible.plugins.action import ActionBase
from ansible.utils.display import Display
from ansible_collections.microvm.reaper.plugins.plugin_utils import explaining
from ansible_collections.microvm.reaper.plugins.plugin_utils.brake import CAPS, brake


class ActionModule(ActionBase):
    """Print the explanations of all hosts of the batch."""

    TRANSFERS_FILES = False
    _requires_connection = False

    def run(self, tmp=None, task_vars=None):
        """Print once for the whole batch."""
        result = super().run(tmp, task_vars)
        _validation, arguments = self.validate_argument_spec(
            {
                "what": {"type": "str", "required": True},
                "hosts": {"type": "list", "elements": "str", "required": True},
                "variables": {"type": "dict", "required": True},
                **CAPS,
            }
        )
        hosts = {host: task_vars["hostvars"].raw_get(host) for host in arguments["hosts"]}
        found = {step: _by_host(hosts, name) for step, name in arguments["variables"].items()}
        failed = [one for one in found["manifest"].values() if one.get("failed")]
        if failed:
            stopped, refused = {"code": failed[0].get("code", "failed"), "message": failed[0].get("msg", "")}, {}
        else:
            stopped, refused = brake(found["plan"], arguments)
        silent = sorted(set(hosts) - set(found["explanation"]))
        text = explaining.text(
            arguments["what"], found["explanation"], stopped=stopped, refused=refused, silent=silent
        )
        Display().display(text)
        result.update(changed=False, explanations=found["explanation"], text=text)
        return result


def _by_host(hosts, name):
    return {host: variables[name] for host, variables in hosts.items() if variables.get(name)}
