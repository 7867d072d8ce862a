#!/usr/bin/python
# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
module: report
short_description: Show what came of a sweep
version_added: 0.1.0
author:
  - The microvm.reaper authors (@microvm)
description:
  - Prints one table for all hosts of the batch, and writes the same as JSON with every family and every outcome.
  - Leaves the counts of the whole run, all batches together, as the custom statistic C(microvm_reaper), as
    M(ansible.builtin.set_stats) would. AWX keeps it as an artifact of the job. It does not grow with the hosts.
options:
  realm:
    description: The realm of the sweep.
    type: str
    required: true
  hosts:
    description: The hosts of the batch, also those that have failed meanwhile.
    type: list
    elements: str
    required: true
  variables:
    description: The names of the variables that hold, on each host, what the steps before returned.
    type: dict
    required: true
    suboptions:
      gathered:
        description: The result of M(microvm.reaper.vm_resource_facts).
        type: str
        required: true
      manifest:
        description: The result of M(microvm.reaper.live_manifest).
        type: str
        required: true
      plan:
        description: The plan.
        type: str
        required: true
      saved:
        description: The result of M(microvm.reaper.save_inputs).
        type: str
      brake:
        description: The result of M(microvm.reaper.brake).
        type: str
        required: true
      published:
        description: The result of M(microvm.reaper.publish).
        type: str
      result:
        description: The result of M(microvm.reaper.reap). Without it the plans are shown as what would be done.
        type: str
      sealed:
        description: The result of M(microvm.reaper.seal_plan).
        type: str
      opened:
        description: The result of M(microvm.reaper.open_plan).
        type: str
  sweep:
    description: The id of the sweep, for who wants to undo it.
    type: str
    default: ""
  path:
    description: Write the report as JSON to this file. Batches of one run share it.
    type: path
    default: ""
extends_documentation_fragment:
  - microvm.reaper.on_controller
attributes:
  check_mode:
    description: Can run in check mode and return the same as otherwise.
    support: full
notes:
  - Runs on the controller. Meant to be run once for a batch of hosts, with C(run_once).
seealso:
  - module: microvm.reaper.vm_resource_facts
  - module: microvm.reaper.reap
"""

EXAMPLES = r"""
- name: Report
  microvm.reaper.report:
    realm: prod
    hosts: "{{ preflight.hosts }}"
    variables: {gathered: facts, manifest: live, plan: plan, brake: brake, result: result}
  run_once: true
"""

RETURN = r"""
report:
  description: The report as text.
  returned: always
  type: str
totals:
  description: By host and kind, how many are live, suspected, confirmed, reaped, held, failed, and the bytes given
    back.
  returned: always
  type: dict
ansible_stats:
  description: What is left as custom statistics.
  returned: always
  type: dict
  contains:
    data:
      description: The statistics by name. There is one.
      type: dict
      contains:
        microvm_reaper:
          description:
            - C(realm), C(sweep) and C(check_mode) of the run; C(plan), the id of the signed plan that it made or
              applied, or null; C(planned), whether it has made it. What would be done is counted as if it were done.
            - C(hosts), how many there were, and C(errors), on how many of them a step failed.
            - C(refused), how many hosts by the code they were refused for; C(stopped), the C(code) and C(message) of
              what stopped a batch, or null; C(unpublished), whether telling who ended has failed.
            - C(live), C(suspected), C(confirmed), C(reaped), C(aside), C(held), C(failed), C(already_gone) and C(bytes)
              as in RV(totals), summed over all hosts and kinds.
          type: dict
"""
