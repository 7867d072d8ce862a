# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The controller's side of microvm.reaper.save_inputs."""

from __future__ import annotations

from ansible.plugins.action import ActionBase
from ansible_collections.microvm.reaper.plugins.plugin_utils import batches, inputs, planning
from ansible_collections.microvm.reaper.plugins.plugin_utils.brake import CAPS
from ansible_collections.microvm.reaper.plugins.plugin_utils.manifest import now


class ActionModule(ActionBase):
    """Save what the plans of all hosts of the batch were made of, before anything is removed."""

    TRANSFERS_FILES = False
    _requires_connection = False

    def run(self, tmp=None, task_vars=None):
        """Save once for the whole batch."""
        result = super().run(tmp, task_vars)
        _validation, arguments = self.validate_argument_spec(
            {
                "directory": {"type": "path", "required": True},
                "realm": {"type": "str", "required": True},
                "caps": {"type": "dict", "default": {}, "options": CAPS, "apply_defaults": True},
                "variables": {"type": "dict", "required": True},
            }
        )
        hosts = _planned(task_vars, arguments["variables"])
        instant = now()
        header = inputs.header(
            arguments["realm"], arguments["caps"], hosts, now=instant, check_mode=self._task.check_mode
        )
        try:
            path = _file_of_this_run(arguments["directory"], arguments["realm"], instant)
            inputs.append(path, _lines(header, hosts))
        except OSError as err:
            result.update(
                failed=True,
                code="inputs_not_saved",
                msg="nothing is removed, since the inputs of the plans cannot be saved in reap_save_inputs=%s: %s"
                % (arguments["directory"], err),
            )
            return result
        result.update(changed=False, path=path, hosts=len(hosts))
        return result


def _planned(task_vars, names):
    """Return ``{host: {gathered, manifest, policy, plan, opened}}`` of the hosts of the batch that have a plan."""
    known = {host: task_vars["hostvars"].raw_get(host) for host in task_vars["ansible_play_batch"]}
    return {
        host: {what: variables.get(name) for what, name in names.items()}
        for host, variables in known.items()
        if variables.get(names["plan"])
    }


def _lines(header, hosts):
    yield header
    for host, one in hosts.items():
        facts = one["gathered"]["ansible_facts"]["vm_resources"]
        share = planning.share(facts, one["manifest"]["manifest"], one["policy"])
        within = planning.within((one.get("opened") or {}).get("opened"), one["policy"])
        yield inputs.record(host, facts, share, one["policy"], one["plan"], within)


def _file_of_this_run(directory, realm, instant):
    """Return the path of this run's file, a new one for its first batch: only a temporary directory is shared."""
    key = "%s %s" % (directory, realm)
    with batches.memory("inputs") as files:
        if key not in files:
            files[key] = inputs.new_file(directory, realm, instant)
        return files[key]
