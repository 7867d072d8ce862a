#!/usr/bin/python
# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
module: explain
short_description: Show why something was or was not reaped
version_added: 0.1.0
author:
  - The microvm.reaper authors (@microvm)
description:
  - Prints what P(microvm.reaper.explain#filter) returned on each host of the batch, in one block. Hosts that know
    nothing of it share a line.
  - Says too when a sweep over these hosts would be stopped as a whole, by a cap of the fleet for example.
options:
  what:
    description: The id of the VM, or the whole name of the resource.
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
      manifest:
        description: The result of M(microvm.reaper.live_manifest).
        type: str
        required: true
      plan:
        description: The plan.
        type: str
        required: true
      explanation:
        description: What P(microvm.reaper.explain#filter) returned.
        type: str
        required: true
  max_per_fleet:
    description: As in M(microvm.reaper.brake).
    type: int
    default: 500
  max_percent:
    description: As in M(microvm.reaper.brake).
    type: float
    default: 30
  percent_floor:
    description: As in M(microvm.reaper.brake).
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
  - module: microvm.reaper.journal_facts
  - plugin: microvm.reaper.explain
    plugin_type: filter
"""

EXAMPLES = r"""
- name: Show why
  microvm.reaper.explain:
    what: vabc234
    hosts: "{{ preflight.hosts }}"
    variables: {manifest: live, plan: plan, explanation: explanation}
  run_once: true
"""

RETURN = r"""
explanations:
  description: By host, what the filter returned.
  returned: always
  type: dict
text:
  description: All of it as text.
  returned: always
  type: str
"""
