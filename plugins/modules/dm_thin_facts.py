#!/usr/bin/python
# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
module: dm_thin_facts
short_description: Gather the thin volumes of VMs
version_added: 0.1.0
author:
  - The microvm.reaper authors (@microvm)
description:
  - Lists the active device-mapper thin volumes whose name is that of a VM.
  - Runs a fixed number of C(dmsetup) commands, however many volumes there are.
extends_documentation_fragment:
  - microvm.reaper.rules.dm_thin
  - microvm.reaper.rules.facts
seealso:
  - module: microvm.reaper.vm_resource_facts
"""

EXAMPLES = r"""
- name: Look for the thin volumes of VMs
  microvm.reaper.dm_thin_facts:
    rules:
      - name: hyper-rw-(?P<vm_id>v[a-z2-7]+)
        pool: hyper-thinpool
"""

RETURN = r"""
ansible_facts:
  description: Facts to add to those of the host.
  returned: always
  type: dict
  contains:
    vm_thin_volumes:
      description: The thin volumes of VMs.
      type: dict
      contains:
        status:
          description: V(ok), V(absent) where the host has no such thing at all, V(unavailable) where it could not be
            read.
          type: str
        reason:
          description: Why it is not V(ok).
          type: str
        resources:
          description:
            - What belongs to VMs. Each has C(kind), C(name), C(vm_id), C(identity), C(in_use), C(holders),
              C(age_seconds),
              C(bytes), C(parent) and C(details).
            - C(name) is the device-mapper name, C(in_use) tells that the volume is open, C(bytes) is what it takes of
              its pool.
          type: list
          elements: dict
        foreign:
          description: How many others there are that no rule matches.
          type: int
        seconds:
          description: How long it took.
          type: float
        places:
          description: How full the pools, by their data or their metadata, whichever is more, are, in percent.
          type: dict
      sample:
        status: ok
        reason:
        foreign: 0
        seconds: 0.004
        places:
          hyper-thinpool: 41.3
        resources:
          - kind: dm_thin
            name: hyper-rw-vabc234
            vm_id: vabc234
            identity: 6a0f7a4e-6d65-4c8b-9f2e-55c1f0a7d4c1:41:hyper-thinpool:7
            in_use: false
            holders: []
            age_seconds:
            bytes: 134217728
            parent:
            details:
              pool: hyper-thinpool
              thin_id: 7
"""

from ansible_collections.microvm.reaper.plugins.module_utils import facts_module
from ansible_collections.microvm.reaper.plugins.module_utils.kinds import dm_thin


def main():
    """Read the host's resources of this kind."""
    facts_module.run(
        {"rules": dict(facts_module.rules_spec(dm_thin), required=True)},
        lambda params: {"vm_thin_volumes": (dm_thin, params["rules"])},
    )


if __name__ == "__main__":
    main()
