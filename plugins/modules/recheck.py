#!/usr/bin/python
# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
module: recheck
short_description: Ask the live sources once more about what is about to be reaped
version_added: 0.1.0
author:
  - The microvm.reaper authors (@microvm)
description:
  - Asks the sources, right before the first removal of a batch of hosts, about the VMs that its plans reap, and only
    about those where a source can be asked so. Names those that are listed now, and all of them when a source that
    answered before fails now or goes back behind what it said.
  - Asks nothing when nothing is about to be reaped.
options:
  plans:
    description: The name of the variable that holds each host's plan.
    type: str
    required: true
  refused:
    description: The hosts on which nothing is done, as M(microvm.reaper.brake) returned them.
    type: dict
    default: {}
  manifest:
    description: What M(microvm.reaper.live_manifest) returned; the plans were made with it.
    type: dict
    required: true
  realm:
    description: The realm that the sources must speak for.
    type: str
    required: true
  sources:
    description: The live sources, as in the role's variable C(reap_live_sources).
    type: list
    elements: dict
    required: true
  max_age:
    description: A list older than this many seconds is refused.
    type: float
    default: 600
  terminal_states:
    description: States in which a VM is gone. Any other protects it.
    type: list
    elements: str
    default: [deleted, destroyed, saga_unwound, terminated]
extends_documentation_fragment:
  - microvm.reaper.on_controller
attributes:
  check_mode:
    description: Can run in check mode and return the same as otherwise.
    support: full
notes:
  - Runs on the controller. Meant to be run once for a batch of hosts, with C(run_once).
seealso:
  - module: microvm.reaper.live_manifest
  - module: microvm.reaper.reap
"""

EXAMPLES = r"""
- name: Ask once more about what is about to go
  microvm.reaper.recheck:
    plans: my_plan
    realm: prod
    sources:
      - type: file
        path: live-vms.yml
    manifest: "{{ live.manifest }}"
  run_once: true
  register: again

- name: Reap the others
  microvm.reaper.reap:
    plan: "{{ my_plan }}"
    rules: "{{ lookup('microvm.reaper.rules', 'hyper') }}"
    spare: "{{ again.spare[inventory_hostname] | default({}) }}"
"""

RETURN = r"""
spare:
  description: By host, the ids of the VMs that must not be reaped there, each with the reason.
  returned: always
  type: dict
  sample:
    rack1:
      vabc234: asked once more, the live source lists the VM here
asked:
  description: The ids that were asked about.
  returned: always
  type: list
  elements: str
"""
