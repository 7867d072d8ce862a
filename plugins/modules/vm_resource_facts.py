#!/usr/bin/python
# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
module: vm_resource_facts
short_description: Gather everything on a host that belongs to VMs
version_added: 0.1.0
author:
  - The microvm.reaper authors (@microvm)
description:
  - Reads all kinds of resources at the same time, and what the host remembers of earlier sweeps. Everything a plan
    needs to
    know of the host, in one call.
  - Plans are made of it by P(microvm.reaper.confirmed_orphans#filter) and carried out by M(microvm.reaper.reap).
options:
  realm:
    description: The name of the control plane whose VMs these are.
    type: str
    required: true
  state_dir:
    description: Where the host keeps what it remembers.
    type: path
    default: /var/lib/microvm.reaper
  packed:
    description:
      - Return the kinds as one string, C(packed), in place of C(kinds), and C(alive) as one too. The filters of this
        collection read both; Ansible itself handles one string many times faster than thousands of records.
    type: bool
    default: false
  supervisors:
    description:
      - What tells on the host that a VM lives, whatever a list of live VMs says; the role takes it of its variable
        C(reap_live_sources). One entry for each type. It can only add life.
    type: list
    elements: dict
    default: []
    suboptions:
      type:
        description:
          - V(firecracker) are the API sockets of Firecracker. A VM lives while something listens on its socket, with
            whatever answer, or none.
          - V(containerd) are tasks. A VM lives while a task of its container has not stopped.
        type: str
        choices: [containerd, firecracker]
        required: true
      required:
        description: Whether the plan of this host is refused when it cannot be read. One that is absent has been read.
        type: bool
        default: true
      sockets:
        description:
          - Of V(firecracker). Where the API sockets are, as absolute paths with C({vm_id}) in the place of the VM's id.
          - In the names before that one there may be C(*), C(?) and C([...]). From the first of these on, or from
            C({vm_id}), no symbolic link is followed, since what is in a jail belongs to an unprivileged user.
        type: list
        elements: str
        default: ["/srv/jailer/*/{vm_id}/root/run/firecracker.socket"]
      namespaces:
        description: Of V(containerd), which needs it. The namespaces to look into.
        type: list
        elements: str
      name:
        description:
          - Of V(containerd). Regular expression for the whole id of a VM's container, with a group C(vm_id). Without
            O(supervisors[].label) the whole id by default.
        type: str
      label:
        description:
          - Of V(containerd). The label whose value is the id of the VM. With O(supervisors[].name) too, both must
            match.
        type: str
      address:
        description: Of V(containerd). Its socket.
        type: str
        default: /run/containerd/containerd.sock
extends_documentation_fragment:
  - microvm.reaper.rules
  - microvm.reaper.rules.facts
seealso:
  - module: microvm.reaper.reap
  - plugin: microvm.reaper.confirmed_orphans
    plugin_type: filter
"""

EXAMPLES = r"""
- name: Read what belongs to VMs of hyper
  microvm.reaper.vm_resource_facts:
    realm: prod
    rules: "{{ lookup('microvm.reaper.rules', 'hyper') }}"

- name: Read also which VMs run, by containerd and by their API sockets
  microvm.reaper.vm_resource_facts:
    realm: prod
    rules: "{{ lookup('microvm.reaper.rules', 'hyper') }}"
    supervisors:
      - type: firecracker
        sockets: ["/srv/jailer/firecracker/{vm_id}/root/run/firecracker.socket"]
      - type: containerd
        namespaces: [vms]
        name: vm-(?P<vm_id>[a-z0-9]+)

- name: Show what belongs to no VM that runs
  ansible.builtin.debug:
    msg: "{{ ansible_facts.vm_resources | microvm.reaper.orphans(['vabc234']) }}"
"""

RETURN = r"""
ansible_facts:
  description: Facts to add to those of the host.
  returned: always
  type: dict
  contains:
    vm_resources:
      description: Everything on the host that belongs to VMs.
      type: dict
      contains:
        realm:
          description: The realm asked for.
          type: str
        boot_id:
          description: The kernel's id of this boot.
          type: str
        machine_id:
          description: The id in /etc/machine-id.
          type: str
        boottime_seconds:
          description: Seconds since boot, suspend included, when reading began.
          type: float
        ledger:
          description: What the host remembers of earlier sweeps of this realm, among it its strikes.
          type: dict
        ledger_problem:
          description: What is wrong with the ledger, null when nothing is.
          type: str
        generation:
          description: How often the ledger has been written.
          type: int
        other_realms:
          description: The other realms for which this host has been swept.
          type: list
          elements: str
        pins:
          description: The lines of the host's pin file, C(keep) in O(state_dir), which names VMs that are left alone.
          type: list
          elements: str
        kinds:
          description:
            - By kind, C(status), C(reason), C(resources), C(foreign) and C(seconds), as in the fact modules of the
              kinds.
            - Only the kinds that have rules.
          type: dict
        packed:
          description: The same as C(kinds), in place of it, when O(packed) is true.
          type: str
        supervisors:
          description:
            - By type, whether the supervisor could be read, C(status) and C(reason) as those of kinds, and C(required).
          type: dict
        alive:
          description:
            - The VMs that live by the supervisors, each with the reason, a part of a sentence. One string when
              O(packed) is true.
          type: raw
      sample:
        realm: prod
        boot_id: 6a0f7a4e-6d65-4c8b-9f2e-55c1f0a7d4c1
        machine_id: 2a2f0c1b6f0d4c0f9f0e1b2c3d4e5f60
        boottime_seconds: 86412.118
        generation: 3
        ledger_problem:
        ledger:
          strikes: {}
        kinds:
          dm_thin:
            status: absent
            reason: the kernel has no device-mapper
            resources: []
            foreign: 0
            seconds:
        supervisors:
          firecracker:
            status: ok
            reason:
            required: true
        alive:
          vabc234: its API socket /srv/jailer/firecracker/vabc234/root/run/firecracker.socket answers (Running)
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.microvm.reaper.plugins.module_utils.all_kinds import ORDER
from ansible_collections.microvm.reaper.plugins.module_utils.all_supervisors import entry_spec
from ansible_collections.microvm.reaper.plugins.module_utils.facts_module import bounded, rules_of_all_kinds
from ansible_collections.microvm.reaper.plugins.module_utils.gather import gather
from ansible_collections.microvm.reaper.plugins.module_utils.ledger import LedgerError


def get_argument_spec():
    """Return the module's argument spec."""
    return {
        "realm": {"type": "str", "required": True},
        "rules": dict(rules_of_all_kinds(ORDER), required=True),
        "state_dir": {"type": "path", "default": "/var/lib/microvm.reaper"},
        "deadline": {"type": "float", "default": 60},
        "packed": {"type": "bool", "default": False},
        "supervisors": dict(entry_spec(), default=[]),
    }


def main():
    """Read the host."""
    module = AnsibleModule(argument_spec=get_argument_spec(), supports_check_mode=True)
    facts = bounded(module, lambda seconds: read(module.params, seconds))
    if "failed" in facts:
        module.fail_json(msg=facts["failed"])
    module.exit_json(changed=False, ansible_facts={"vm_resources": facts})


def read(params, seconds):
    """Return the facts, or ``{failed}``."""
    where = (params["rules"], params["realm"], params["state_dir"])
    try:
        return gather(ORDER, *where, seconds, params["packed"], params["supervisors"])
    except LedgerError as err:
        return {"failed": str(err)}


if __name__ == "__main__":
    main()
