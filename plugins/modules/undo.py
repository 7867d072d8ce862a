#!/usr/bin/python
# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
module: undo
short_description: Bring back what sweeps have set aside on a host
version_added: 0.1.0
author:
  - The microvm.reaper authors (@microvm)
description:
  - A sweep first does what can be taken back. It deactivates a volume, moves a jail aside, freezes a cgroup, pauses
    a container. Only a later sweep, after C(reap_hold), removes it. Until then this brings it back exactly as it was.
  - The VMs of what comes back are first pinned in the host's pin file, the file C(keep) in O(state_dir), or the next
    sweeps would set the same things aside again.
  - What something else has taken the place of meanwhile is left where it is, and said. The module fails at the end when
    anything could not be brought back.
options:
  realm:
    description: The name of the control plane whose VMs these are.
    type: str
    required: true
  vm_id:
    description: Bring back all that is aside of this VM. Either this or O(sweep) must be given.
    type: str
  sweep:
    description: Bring back all that this sweep has set aside, by the id that its report has.
    type: str
  keep_days:
    description: For how many days the VMs are pinned. With V(0) they are not.
    type: int
    default: 7
  state_dir:
    description: Where the host keeps what it remembers.
    type: path
    default: /var/lib/microvm.reaper
  deadline:
    description: Seconds after which whatever is not done is left.
    type: float
    default: 300
extends_documentation_fragment:
  - microvm.reaper.rules
attributes:
  action:
    description: Indicates this has a corresponding action plugin so some parts of the options can be executed on the
      controller.
    support: partial
    details: It shows what came of it.
  check_mode:
    description: Can run in check mode and return changed status prediction without modifying target.
    support: full
    details: Says what would be brought back, by what the host remembers.
  diff_mode:
    description: Will return details on what has changed (or possibly needs changing in check mode), when in diff mode.
    support: full
  platform:
    description: Target OS/families that can be operated against.
    support: full
    platforms: Linux
requirements:
  - Python 3.8 or later on the host
seealso:
  - module: microvm.reaper.reap
"""

EXAMPLES = r"""
- name: Bring back what is aside of a VM
  microvm.reaper.undo:
    realm: prod
    vm_id: vabc234
    rules: "{{ lookup('microvm.reaper.rules', 'hyper') }}"
"""

RETURN = r"""
outcomes:
  description: What came of each thing that was aside, as M(microvm.reaper.reap) returns it.
  returned: always
  type: list
  elements: dict
  contains:
    outcome:
      description:
        - V(restored), V(already_gone), V(deferred), V(identity_changed), V(failed), in check mode V(would_restore).
      type: str
pinned_until:
  description: The last day on which the VMs are pinned, empty when they are not.
  returned: always
  type: str
  sample: "2026-11-29"
busy:
  description: Why nothing was done, when a reaper works on the host.
  returned: when a reaper works on the host
  type: str
"""

import datetime

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.microvm.reaper.plugins.module_utils import acts
from ansible_collections.microvm.reaper.plugins.module_utils import resource as r
from ansible_collections.microvm.reaper.plugins.module_utils.all_kinds import ORDER
from ansible_collections.microvm.reaper.plugins.module_utils.facts_module import bounded, rules_of_all_kinds
from ansible_collections.microvm.reaper.plugins.module_utils.ledger import Busy, LedgerError
from ansible_collections.microvm.reaper.plugins.module_utils.probe import Host, boottime

BACK = (r.RESTORED, r.WOULD_RESTORE)


def get_argument_spec():
    """Return the module's argument spec."""
    return {
        "realm": {"type": "str", "required": True},
        "vm_id": {"type": "str"},
        "sweep": {"type": "str"},
        "keep_days": {"type": "int", "default": 7},
        "rules": dict(rules_of_all_kinds(ORDER), required=True),
        "state_dir": {"type": "path", "default": "/var/lib/microvm.reaper"},
        "deadline": {"type": "float", "default": 300},
    }


def last_day(days, today=None):
    """Return the day in so many days as text, empty for none."""
    today = today or datetime.datetime.now(datetime.timezone.utc).date()
    return (today + datetime.timedelta(days=days)).isoformat() if days > 0 else ""


def summary(outcomes):
    """Return one sentence for what could not be brought back, None when all is well."""
    left = [one for one in outcomes if one["outcome"] not in BACK]
    items = "; ".join("%(kind)s %(name)s: %(outcome)s %(message)s" % one for one in left)
    return "%d of %d could not be brought back: %s" % (len(left), len(outcomes), items) if left else None


def bring_back(params, until, check_mode, seconds):
    """Return ``{problems}`` with ``outcomes``, ``busy`` or ``failed``."""
    problems, where = [], (params["state_dir"], params["realm"])

    def is_meant(held):
        return held["vm_id"] == params["vm_id"] if params["vm_id"] else held.get("sweep") == params["sweep"]

    try:
        if check_mode:
            return {"problems": [], "outcomes": acts.foresee_undo(is_meant, *where)}
        with acts.Hands(params["rules"], Host(boottime() + seconds, params["state_dir"]), ORDER) as hands:
            outcomes = acts.undo(is_meant, hands, *where, until, problems.append)
    except Busy as err:
        return {"problems": problems, "busy": str(err)}
    except LedgerError as err:
        return {"problems": problems, "failed": str(err)}
    return {"problems": problems, "outcomes": outcomes}


def main():
    """Bring it back."""
    module = AnsibleModule(
        argument_spec=get_argument_spec(),
        required_one_of=[("vm_id", "sweep")],
        mutually_exclusive=[("vm_id", "sweep")],
        supports_check_mode=True,
    )
    params = module.params
    until = last_day(params["keep_days"])

    done = bounded(module, lambda seconds: bring_back(params, until, module.check_mode, seconds))
    for problem in done["problems"]:
        module.warn(problem)
    if "busy" in done:
        module.exit_json(changed=False, outcomes=[], pinned_until="", busy=done["busy"])
    if "failed" in done:
        module.fail_json(msg=done["failed"], outcomes=[], pinned_until="")
    outcomes = done["outcomes"]
    back = [one for one in outcomes if one["outcome"] in BACK]
    result = {
        "changed": bool(back),
        "outcomes": outcomes,
        "pinned_until": until if outcomes else "",
        "diff": {
            "before_header": "set aside",
            "after_header": "brought back",
            "before": "",
            "after": "".join("%(kind)s %(name)s\n" % one for one in back),
        },
    }
    problem = summary(outcomes)
    if problem:
        module.fail_json(msg=problem, **result)
    module.exit_json(**result)


if __name__ == "__main__":
    main()
