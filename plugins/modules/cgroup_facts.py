#!/usr/bin/python
# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
module: cgroup_facts
short_description: Gather the cgroups of VMs
version_added: 0.1.0
author:
  - The microvm.reaper authors (@microvm)
description:
  - Lists the cgroups right below the configured roots whose name is that of a VM, in every mounted hierarchy, v1 and
    v2.
extends_documentation_fragment:
  - microvm.reaper.rules.cgroup
  - microvm.reaper.rules.facts
seealso:
  - module: microvm.reaper.vm_resource_facts
"""

EXAMPLES = r"""
- name: Look for cgroups that firecracker's jailer made below /sys/fs/cgroup/firecracker
  microvm.reaper.cgroup_facts:
    rules:
      - root: firecracker
        name: (?P<vm_id>[A-Za-z0-9-]+)

- name: Show those in which nothing runs
  ansible.builtin.debug:
    msg: "{{ ansible_facts.vm_cgroups.resources | rejectattr('in_use') | map(attribute='name') }}"
"""

RETURN = r"""
ansible_facts:
  description: Facts to add to those of the host.
  returned: always
  type: dict
  contains:
    vm_cgroups:
      description: The cgroups of VMs.
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
            - C(name) is the path, C(in_use) tells that a process runs in the cgroup or below it; zombies do not count.
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
          - kind: cgroup
            name: /sys/fs/cgroup/hyper/vabc234
            vm_id: vabc234
            identity: 6a0f7a4e-6d65-4c8b-9f2e-55c1f0a7d4c1:26:5123
            in_use: false
            holders: []
            age_seconds: 86405.2
            bytes:
            parent:
            details:
              version: 2
"""

from ansible_collections.microvm.reaper.plugins.module_utils import facts_module
from ansible_collections.microvm.reaper.plugins.module_utils.kinds import cgroup


def main():
    """Read the host's resources of this kind."""
    facts_module.run(
        {"rules": dict(facts_module.rules_spec(cgroup), required=True)},
        lambda params: {"vm_cgroups": (cgroup, params["rules"])},
    )


if __name__ == "__main__":
    main()
