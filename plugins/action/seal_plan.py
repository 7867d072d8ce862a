# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The controller's side of microvm.reaper.seal_plan."""

from __future__ import annotations

from ansible.plugins.action import ActionBase
from ansible_collections.microvm.reaper.plugins.plugin_utils import signed_plan
from ansible_collections.microvm.reaper.plugins.plugin_utils.brake import CAPS, LATCHED
from ansible_collections.microvm.reaper.plugins.plugin_utils.manifest import now
from ansible_collections.microvm.reaper.plugins.plugin_utils.signed_plan import PlanError
from ansible_collections.microvm.reaper.plugins.plugin_utils.words import enumerate_hosts

SPEC = {
    "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
    "path": {"type": "path", "default": ""},
    "artifact": {"type": "bool", "default": False},
    "key": {"type": "raw", "required": True, "no_log": True},
    "plans": {"type": "str"},
    "hosts": {"type": "list", "elements": "str", "default": []},
    "refused": {"type": "dict", "default": {}},
    "manifest": {"type": "dict"},
    "realm": {"type": "str"},
    "sweep": {"type": "str"},
    "caps": {"type": "dict", "default": {}, "options": CAPS, "apply_defaults": True},
    "max_age": {"type": "float", "default": 3600},
}
REQUIRED_IF = [("state", "present", ["plans", "manifest", "realm", "sweep"])]


class ActionModule(ActionBase):
    """Sign the plans of all hosts of the play as one, and write it down; or make way for it."""

    TRANSFERS_FILES = False
    _requires_connection = False

    def run(self, tmp=None, task_vars=None):
        """Do so once for the whole play."""
        result = super().run(tmp, task_vars)
        _validation, arguments = self.validate_argument_spec(SPEC, required_if=REQUIRED_IF)
        keys = signed_plan.keys_of(arguments["key"])
        try:
            _check(arguments, keys)
            if arguments["state"] == "absent":
                result.update(changed=self._clear(arguments["path"]))
            else:
                result.update(self._seal(arguments, keys, task_vars))
        except PlanError as err:
            result.update(failed=True, code=err.code, msg="no plan is made (%s): %s" % (err.code, err))
        return result

    def _clear(self, path):
        """Remove the older plan, so that nobody takes it for the new one, should there be none."""
        if not path:
            return False
        signed_plan.check_place(path)
        return signed_plan.clear(path, check_mode=self._task.check_mode)

    def _seal(self, arguments, keys, task_vars):
        plans, unseen = _plans(arguments, task_vars)
        _check_latch(arguments["refused"])
        found = signed_plan.document(
            plans,
            arguments["refused"],
            unseen,
            plan_id=arguments["sweep"],
            realm=arguments["realm"],
            manifest=arguments["manifest"],
            caps=arguments["caps"],
            now=now(),
            max_age=arguments["max_age"],
        )
        text = signed_plan.seal(found, keys)
        if arguments["artifact"]:
            signed_plan.check_artifact(text)
        if arguments["path"] and not self._task.check_mode:
            signed_plan.write(arguments["path"], text)
        kept = ("plan", "made_at", "expires_at", "manifest", "budget", "idle", "refused", "unseen")
        sealed = dict({key: found[key] for key in kept}, path=arguments["path"], bytes=len(text))
        # As ansible.builtin.set_stats does; AWX passes it on as an extra variable.
        stats = {"data": {"reap_plan": text}, "per_host": False, "aggregate": False}
        is_passed_on = arguments["artifact"] and not self._task.check_mode
        return {"changed": True, "sealed": sealed, **({"ansible_stats": stats} if is_passed_on else {})}


def _check(arguments, keys):
    problem = signed_plan.weak(keys)
    if problem:
        raise PlanError("weak_key", problem)
    if not arguments["path"] and not arguments["artifact"]:
        raise PlanError(
            "nowhere", "say where it is to go: reap_plan_path, or for a workflow of AWX reap_plan_artifact=true"
        )


def _plans(arguments, task_vars):
    """Return the plans of the hosts, and the names of those that have none."""
    others = set(task_vars["ansible_play_hosts"]) - set(task_vars["ansible_play_batch"])
    if others:
        raise PlanError(
            "half_a_plan",
            "%s are in another batch (serial), and the caps of the fleet hold only for a plan of all hosts at once"
            % enumerate_hosts(sorted(others)),
        )
    raw_get, seen = task_vars["hostvars"].raw_get, set(task_vars["ansible_play_batch"])
    plans = {host: raw_get(host).get(arguments["plans"]) for host in arguments["hosts"] if host in seen}
    plans = {host: plan for host, plan in plans.items() if plan}
    return plans, [host for host in arguments["hosts"] if host not in plans]


def _check_latch(refused):
    latched = sorted(host for host, refusal in refused.items() if refusal["code"] == LATCHED)
    if latched:
        raise PlanError(LATCHED, refused[latched[0]]["message"])
