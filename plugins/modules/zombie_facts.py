#!/usr/bin/python
# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
module: zombie_facts
short_description: Gather the zombies of VMs
version_added: 0.1.0
author:
  - The microvm.reaper authors (@microvm)
description:
  - Lists zombie processes that belong to VMs, by the cgroup that they are still in or by a pid file that names them.
  - Only the parent of a zombie can reap it, so each is returned with its parent.
extends_documentation_fragment:
  - microvm.reaper.rules.zombie
  - microvm.reaper.rules.facts
seealso:
  - module: microvm.reaper.vm_resource_facts
"""

EXAMPLES = r"""
- name: Look for zombies in the cgroups of VMs, and for those that boxlite registered
  microvm.reaper.zombie_facts:
    rules:
      - command: firecracker
        cgroup_name: (?P<vm_id>v[a-z2-7]+)
      - command: boxlite-shim
        pid_file: /var/lib/boxlite/boxes/*/shim.pid
"""

RETURN = r"""
ansible_facts:
  description: Facts to add to those of the host.
  returned: always
  type: dict
  contains:
    vm_zombies:
      description: The zombies of VMs.
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
            - C(name) is the pid, C(parent) that of the parent, C(identity) has the start time, so that a pid used
              again differs.
            - C(details) tell of the parent its systemd unit, its container and, where it runs in the cgroup of a VM
              itself, that VM.
          type: list
          elements: dict
        foreign:
          description: How many others there are that no rule matches.
          type: int
        seconds:
          description: How long it took.
          type: float
      sample:
        status: ok
        reason:
        foreign: 0
        seconds: 0.004
        resources:
          - kind: zombie
            name: "4711"
            vm_id: vabc234
            identity: 6a0f7a4e-6d65-4c8b-9f2e-55c1f0a7d4c1:4711:912345
            in_use: false
            holders: []
            age_seconds: 905.1
            bytes:
            parent: "4650"
            details:
              command: firecracker
              parent: 4650 hyperd
              parent_unit: hyper.service
              parent_identity: "4650:80123"
              parent_container:
              parent_vm:
"""

from ansible_collections.microvm.reaper.plugins.module_utils import facts_module
from ansible_collections.microvm.reaper.plugins.module_utils.kinds import zombie


def main():
    """Read the host's resources of this kind."""
    facts_module.run(
        {"rules": dict(facts_module.rules_spec(zombie), required=True)},
        lambda params: {"vm_zombies": (zombie, params["rules"])},
    )


if __name__ == "__main__":
    main()
