#!/usr/bin/python
# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
module: containerd_facts
short_description: Gather the containers and snapshots of VMs
version_added: 0.1.0
author:
  - The microvm.reaper authors (@microvm)
description:
  - Lists the containers and snapshots whose name or label is that of a VM, with what refers to them, over containerd's
    own interface. C(ctr) is not needed.
options:
  containers:
    description: Which containers are those of VMs. A container belongs to the first rule that matches.
    type: list
    elements: dict
    default: []
    suboptions:
      namespace:
        description: The containerd namespace.
        type: str
        required: true
      name:
        description: Regular expression for the whole id of a VM's container, with a group C(vm_id).
        type: str
      label:
        description: The label whose value is the id of the VM. With O(containers[].name) too, both must match.
        type: str
      address:
        description: The socket of containerd.
        type: str
        default: /run/containerd/containerd.sock
  snapshots:
    description: Which snapshots are those of VMs. A snapshot belongs to the first rule that matches.
    type: list
    elements: dict
    default: []
    suboptions:
      namespace:
        description: The containerd namespace.
        type: str
        required: true
      pinned:
        description:
          - Whether snapshots with the label C(containerd.io/gc.root) are meant too. C(ctr snapshots prepare) puts it on
            all that it makes. Otherwise they are left alone.
        type: bool
        default: false
      snapshotter:
        description: The snapshotter.
        type: str
        default: overlayfs
      name:
        description: Regular expression for the whole key of a VM's snapshot, with a group C(vm_id).
        type: str
      label:
        description: The label whose value is the id of the VM. With O(snapshots[].name) too, both must match.
        type: str
      address:
        description: The socket of containerd.
        type: str
        default: /run/containerd/containerd.sock
extends_documentation_fragment:
  - microvm.reaper.rules.facts
seealso:
  - module: microvm.reaper.vm_resource_facts
"""

EXAMPLES = r"""
- name: Look for what obuilder left
  microvm.reaper.containerd_facts:
    containers:
      - namespace: default
        name: (?P<vm_id>obuilder-run-[0-9]+)
    snapshots:
      - namespace: default
        name: (?P<vm_id>[0-9a-f]{64})(-committed)?

- name: Show the snapshots that nothing refers to
  ansible.builtin.debug:
    msg: "{{ ansible_facts.vm_snapshots.resources | rejectattr('holders') | map(attribute='name') }}"
"""

RETURN = r"""
ansible_facts:
  description: Facts to add to those of the host.
  returned: always
  type: dict
  contains:
    vm_containers:
      description: The containers of VMs, when O(containers) has rules.
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
            - C(name) is C(namespace/id), C(in_use) tells that the container has a task that has not ended.
          type: list
          elements: dict
        foreign:
          description: How many others there are that no rule matches.
          type: int
        seconds:
          description: How long it took.
          type: float
    vm_snapshots:
      description:
        - The snapshots of VMs, when O(snapshots) has rules, in the same shape.
        - C(name) is C(namespace/snapshotter/key), C(holders) are the containers, snapshots, leases and labels that
          keep it.
      type: dict
"""

from ansible_collections.microvm.reaper.plugins.module_utils import facts_module
from ansible_collections.microvm.reaper.plugins.module_utils.kinds import container, snapshot


def main():
    """Read the host's containers and snapshots."""
    facts_module.run(
        {
            "containers": dict(facts_module.rules_spec(container), default=[]),
            "snapshots": dict(facts_module.rules_spec(snapshot), default=[]),
        },
        lambda params: {
            "vm_containers": (container, params["containers"]),
            "vm_snapshots": (snapshot, params["snapshots"]),
        },
    )


if __name__ == "__main__":
    main()
