# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The controller's side of microvm.reaper.preflight."""

from __future__ import annotations

import hashlib
import json
import os

from ansible import constants as C
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator
from ansible.plugins.action import ActionBase
from ansible_collections.microvm.reaper.plugins.module_utils.all_kinds import TRAITS
from ansible_collections.microvm.reaper.plugins.module_utils.resource import VM_ID
from ansible_collections.microvm.reaper.plugins.plugin_utils import inputs, publishing, signed_plan, sources
from ansible_collections.microvm.reaper.plugins.plugin_utils.manifest import ManifestError
from ansible_collections.microvm.reaper.plugins.plugin_utils.planner import (
    DEFAULT_POLICY,
    GRADES,
    PolicyError,
    complete_policy,
)
from ansible_collections.microvm.reaper.plugins.plugin_utils.presets import PresetError, rules
from ansible_collections.microvm.reaper.plugins.plugin_utils.variables import PREFIX, role_spec, unknown
from ansible_collections.microvm.reaper.plugins.plugin_utils.words import enumerate_hosts

MOST_THIN_ID = (1 << 24) - 1
# Strategies by which a task that runs once does so when all hosts are done with the one before it: the last part of
# their names. By others, like free, the brake would look at plans that are not all there, once for each host.
STEP_BY_STEP = ("linear", "debug")
ALONE = (
    "nothing was done: the strategy %r lets each host go on alone, and what stops a sweep must look at all of them at "
    'once; set "strategy: linear" in the play, or ANSIBLE_STRATEGY=linear'
)
# A signed plan is opened once, for all: with one for some hosts only, either all or none would be swept by it.
FOR_ALL = ("reap_plan", "reap_plan_required")


class ActionModule(ActionBase):
    """Check the variables of all hosts of the batch at once, before any of them is touched."""

    TRANSFERS_FILES = False
    _requires_connection = False

    def run(self, tmp=None, task_vars=None):
        """Name every variable that is unknown, of a wrong type or impossible."""
        result = super().run(tmp, task_vars)
        strategy = self._task.get_play().strategy
        if not strategy.endswith(STEP_BY_STEP):
            return dict(result, failed=True, msg=ALONE % strategy)
        spec, problems, known_good, signed = role_spec(), {}, set(), {}
        for host, variables in self._variables_by_host(task_vars):
            signed.setdefault(tuple(str(variables.get(name, "")) for name in FOR_ALL), []).append(host)
            own = {name: value for name, value in variables.items() if name not in FOR_ALL}
            key = json.dumps(own, sort_keys=True, default=str)
            if key not in known_good:
                found = check(variables, spec)
                known_good.update([] if found else [key])
                for problem in found:
                    problems.setdefault(problem, []).append(host)
        if len(signed) > 1:
            problems["%s must be the same for all hosts of a run" % " and ".join(FOR_ALL)] = list(signed.values())[1]
        result.update(changed=False, hosts=list(task_vars["ansible_play_batch"]), sweep=_sweep())
        if problems:
            said = ["%s (%s)" % (problem, enumerate_hosts(hosts)) for problem, hosts in problems.items()]
            result.update(failed=True, msg="nothing was done: " + "; ".join(said), problems=list(problems))
        return result

    def _variables_by_host(self, task_vars):
        """Yield each host of the batch with its ``reap_`` variables: its own, and those of play and command line."""
        hostvars = task_vars["hostvars"]
        own = hostvars.raw_get(task_vars["inventory_hostname"])
        common = {
            name: self._templar.template(value)
            for name, value in task_vars.items()
            if name.startswith(PREFIX) and name not in own
        }
        for host in task_vars["ansible_play_batch"]:
            raw = hostvars.raw_get(host)
            mine = {
                name: hostvars[host][name] if "{{" in str(value) else value
                for name, value in raw.items()
                if name.startswith(PREFIX)
            }
            yield host, dict(common, **mine)


def _sweep():
    """Return the id of this run, the same for all of its batches: they share nothing but its temporary directory."""
    run = os.path.basename(C.DEFAULT_LOCAL_TMP)  # type: ignore[attr-defined]
    return hashlib.sha256(run.encode()).hexdigest()[:16]


def check(variables, spec):
    """Return what is wrong with one host's variables, each problem a sentence that names the variable."""
    problems = [unknown(name, spec) for name in sorted(set(variables) - set(spec))]
    given = {name: value for name, value in variables.items() if name in spec}
    validated = ArgumentSpecValidator(spec).validate(given)
    problems += validated.error_messages
    if problems:
        return problems
    return _impossible(validated.validated_parameters)


def _impossible(parameters):
    """Return what the types allow and the meaning does not."""
    problems = []
    try:
        rules(parameters["reap_presets"], thin_pools=parameters["reap_thin_pools"], kinds=parameters["reap_kinds"])
        if not parameters["reap_presets"]:
            problems.append("reap_presets is empty: nothing would be looked at")
    except PresetError as err:
        problems.append(str(err))
    try:
        sources.configured(parameters["reap_live_sources"])
    except ManifestError as err:
        problems.append(str(err))
    policy = {name: parameters[PREFIX + name] for name in DEFAULT_POLICY if PREFIX + name in parameters}
    try:
        complete_policy(dict(policy, host="host"))
    except PolicyError as err:
        problems.append(str(err))
    if isinstance(parameters["reap_hold"], dict):
        known = [*TRAITS, *GRADES]
        for key in sorted(str(key) for key in set(parameters["reap_hold"]) - set(known)):
            problems.append("reap_hold has a value for %r, which is none of %s" % (key, ", ".join(known)))
    problems += _of_thin_pools(parameters["reap_unmapped_thin_ids"], parameters["reap_thin_pools"])
    keys = signed_plan.keys_of(parameters["reap_plan_key"])
    if (keys or parameters["reap_plan"]) and signed_plan.weak(keys):
        problems.append(signed_plan.weak(keys))
    above_nothing = ("deadline", "manifest_max_age", "plan_max_age", "evidence_seconds", "evidence_bytes")
    for name in (PREFIX + key for key in above_nothing):
        if parameters[name] <= 0:
            problems.append("%s must be more than 0, not %r" % (name, parameters[name]))
    if not 1 <= parameters["reap_evidence_percent"] <= 50:
        problems.append("reap_evidence_percent must be from 1 to 50, not %r" % parameters["reap_evidence_percent"])
    if parameters["reap_evidence_max_bytes"] < 0:
        problems.append("reap_evidence_max_bytes must not be less than 0")
    if parameters["reap_webhook_url"] and publishing.shown(parameters["reap_webhook_url"]) is None:
        problems.append("reap_webhook_url must be a URL of http or https, such as https://control.example/hook")
    directory = parameters["reap_save_inputs"]
    why = inputs.unwritable(directory) if directory else None
    if why:
        problems.append(
            "reap_save_inputs: no file can be made in %r on the controller: %s; make this directory writable, or leave "
            "the variable empty" % (directory, why)
        )
    return problems


def _of_thin_pools(wanted, pools):
    if wanted != "false" and not pools:
        return [
            "reap_unmapped_thin_ids is %s, and reap_thin_pools is empty: name the thin pools that hold volumes of VMs "
            "and nothing else" % wanted
        ]
    return [
        "reap_thin_pools: %r is not a name that the pool of a VM can have: letters, digits and ._:@+-" % pool
        for pool in pools
        if not VM_ID.fullmatch("thin:%s:%d" % (pool, MOST_THIN_ID))
    ]
