#!/usr/bin/python
# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
module: live_manifest
short_description: Fetch the list of live VMs and prove it
version_added: 0.1.0
author:
  - The microvm.reaper authors (@microvm)
description:
  - Fetches all live sources, checks each, joins them, and keeps the result in a temporary file on the controller, from
    which
    plans read the share of their host.
  - Fails when a required source cannot be had or cannot be believed. An incomplete list is no list.
  - Run it after the facts were gathered. A VM whose resources were seen is then already on the list.
options:
  realm:
    description: The realm that the sources must speak for.
    type: str
    required: true
  sources:
    description:
      - The live sources, as in the role's variable C(reap_live_sources).
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
  epochs:
    description:
      - By source, the epoch of a list that was seen before, such as the one that a signed plan was judged by. A source
        that is behind it is refused.
    type: dict
    default: {}
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
- name: Fetch the list of live VMs
  microvm.reaper.live_manifest:
    realm: prod
    sources:
      - type: file
        path: live-vms.yml
  run_once: true
  register: live
"""

RETURN = r"""
manifest:
  description: The handle that P(microvm.reaper.confirmed_orphans#filter) takes; good until the end of this run.
  returned: success
  type: dict
  sample:
    realm: prod
    source: file live-vms.yml
    epoch: 41
    count: 512
    generated_at: 1790000000.0
code:
  description: One word for why the list was refused.
  returned: failure
  type: str
  sample: stale
"""
