#!/usr/bin/python
# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
module: brake
short_description: Stop a batch of hosts before the first removal
version_added: 0.1.0
author:
  - The microvm.reaper authors (@microvm)
description:
  - Looks at the plans of all hosts of the batch at once. Fails, and so stops them all, when one takes more than the
    caps allow
    or shows that the live source cannot be believed.
  - Names single hosts that are to be left alone, such as two that have the same machine id.
options:
  plans:
    description: The name of the variable that holds each host's plan.
    type: str
    required: true
  max_per_fleet:
    description: More VMs than this to be reaped in one run, over all its batches, stop it.
    type: int
    default: 500
  max_percent:
    description:
      - A larger share than this of all VMs, those that the live source lists and those to be reaped, stops the run.
    type: float
    default: 30
  percent_floor:
    description: Up to this many VMs percentages say nothing.
    type: int
    default: 10
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
- name: Stop here if the plans take more than they may
  microvm.reaper.brake:
    plans: my_plan
  run_once: true
"""

RETURN = r"""
refused:
  description: By host, C(code) and C(message) of why nothing is done there.
  returned: success
  type: dict
abort:
  description: C(code) and C(message) of what stops the batch.
  returned: failure
  type: dict
"""
