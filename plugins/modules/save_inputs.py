#!/usr/bin/python
# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
module: save_inputs
short_description: Save what the plans of a batch of hosts were made of
version_added: 0.1.0
author:
  - The microvm.reaper authors (@microvm)
description:
  - Writes the facts of all hosts of the batch, their share of the list of live VMs, their policy and the checksum of
    their plan to a file on the controller, from which M(microvm.reaper.replay) makes the same plans again.
  - Each run makes a file of its own, named after the realm and the time, readable by its owner only. The batches of a
    run (C(serial)) share it.
options:
  directory:
    description: The directory, on the controller, in which the file is made. It must exist.
    type: path
    required: true
  realm:
    description: The realm of the sweep.
    type: str
    required: true
  caps:
    description: The caps of the fleet, as M(microvm.reaper.brake) has them.
    type: dict
    default: {}
    suboptions:
      max_per_fleet:
        description: More VMs than this to be reaped in one run stop it.
        type: int
        default: 500
      max_percent:
        description: A larger share than this of all VMs to be reaped stops the run.
        type: float
        default: 30
      percent_floor:
        description: Up to this many VMs percentages say nothing.
        type: int
        default: 10
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
      policy:
        description: The policy that P(microvm.reaper.confirmed_orphans#filter) was called with.
        type: str
        required: true
      plan:
        description: The plan that it returned.
        type: str
        required: true
      opened:
        description: The result of M(microvm.reaper.open_plan), where a signed plan is applied.
        type: str
extends_documentation_fragment:
  - microvm.reaper.on_controller
attributes:
  check_mode:
    description: Can run in check mode and return the same as otherwise. The file is written in check mode too.
    support: full
notes:
  - Runs on the controller. Meant to be run once for a batch of hosts, with C(run_once), before M(microvm.reaper.brake)
    can stop it.
seealso:
  - module: microvm.reaper.replay
  - module: microvm.reaper.brake
"""

EXAMPLES = r"""
- name: Save what the plans were made of
  microvm.reaper.save_inputs:
    directory: /var/lib/reaper/inputs
    realm: prod
    variables: {gathered: facts, manifest: live, policy: policy, plan: plan}
  run_once: true
"""

RETURN = r"""
path:
  description: The file that was written.
  returned: success
  type: str
  sample: /var/lib/reaper/inputs/prod-2026-11-22T02-00-00Z.jsonl.gz
hosts:
  description: How many hosts of this batch were saved.
  returned: success
  type: int
code:
  description: One word for why nothing was saved.
  returned: failure
  type: str
  sample: inputs_not_saved
"""
