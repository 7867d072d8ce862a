# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The controller's side of microvm.reaper.open_plan."""

from __future__ import annotations

import os
import tempfile

from ansible import constants as C
from ansible.plugins.action import ActionBase
from ansible_collections.microvm.reaper.plugins.plugin_utils import signed_plan
from ansible_collections.microvm.reaper.plugins.plugin_utils.manifest import now
from ansible_collections.microvm.reaper.plugins.plugin_utils.signed_plan import PlanError


class ActionModule(ActionBase):
    """Verify a signed plan, and keep it in a local file from which each host is given its share."""

    TRANSFERS_FILES = False
    _requires_connection = False

    def run(self, tmp=None, task_vars=None):
        """Open it once for the whole batch."""
        result = super().run(tmp, task_vars)
        _validation, arguments = self.validate_argument_spec(
            {
                "plan": {"type": "str", "required": True},
                "key": {"type": "raw", "required": True, "no_log": True},
                "realm": {"type": "str", "required": True},
                "max_age": {"type": "float", "default": 3600},
            }
        )
        instant, where = now(), "in reap_plan"
        try:
            if not arguments["plan"]:
                raise PlanError("plan_missing", "reap_plan is not given, and reap_plan_required is true")
            keys = signed_plan.keys_of(arguments["key"])
            problem = signed_plan.weak(keys)
            if problem:
                raise PlanError("weak_key", problem)
            if not signed_plan.is_sealed(arguments["plan"].strip()):
                where = arguments["plan"][:200]
            text = signed_plan.read(arguments["plan"])
            how = {"realm": arguments["realm"], "now": instant, "max_age": arguments["max_age"]}
            found = signed_plan.unseal(text, keys, **how)
        except PlanError as err:
            said = "the plan %s is refused (%s), and nothing is done: %s" % (where, err.code, err)
            result.update(failed=True, code=err.code, msg=said)
            return result
        directory = tempfile.mkdtemp(prefix="plan-", dir=C.DEFAULT_LOCAL_TMP)  # type: ignore[attr-defined]
        handle = signed_plan.opened(found, os.path.join(directory, "plan.sqlite"), instant)
        result.update(changed=False, opened=handle)
        return result
