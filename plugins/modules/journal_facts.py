#!/usr/bin/python
# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
module: journal_facts
short_description: Read what a host's journal says of one VM or resource
version_added: 0.1.0
author:
  - The microvm.reaper authors (@microvm)
description:
  - M(microvm.reaper.reap) writes into the journal of each host what it sets out to remove, why, and what came of it.
    This returns the entries of one VM or of one resource, the latest 1000, and those of every latch.
  - The filter P(microvm.reaper.explain#filter) puts them into sentences.
options:
  realm:
    description: The name of the control plane whose VMs these are.
    type: str
    required: true
  vm_id:
    description: The id of the VM. Either this or O(name) must be given.
    type: str
  name:
    description: The whole name of the resource, as in the report.
    type: str
  kind:
    description: Only resources of this kind that have the O(name).
    type: str
    choices: [cgroup, container, dm_thin, jail, snapshot, thin_id, zombie]
  state_dir:
    description: Where the host keeps what it remembers.
    type: path
    default: /var/lib/microvm.reaper
attributes:
  check_mode:
    description: Can run in check mode and return the same as otherwise.
    support: full
  diff_mode:
    description: Will return details on what has changed (or possibly needs changing in check mode), when in diff mode.
    support: none
    details: Nothing is changed.
  facts:
    description: Action returns an C(ansible_facts) dictionary that will update existing host facts.
    support: full
  platform:
    description: Target OS/families that can be operated against.
    support: full
    platforms: Linux
requirements:
  - Python 3.8 or later on the host
notes:
  - Reads only. A host without a journal has no entries; a journal that cannot be read is a failure.
seealso:
  - module: microvm.reaper.reap
  - plugin: microvm.reaper.explain
    plugin_type: filter
"""

EXAMPLES = r"""
- name: Read what became of a VM
  microvm.reaper.journal_facts:
    realm: prod
    vm_id: vabc234

- name: Read what became of a thin volume
  microvm.reaper.journal_facts:
    realm: prod
    name: hyper-rw-vabc234
    kind: dm_thin
"""

RETURN = r"""
ansible_facts:
  description: Facts to add to those of the host.
  returned: always
  type: dict
  contains:
    vm_journal:
      description: What the journal says.
      type: dict
      contains:
        entries:
          description:
            - In the order in which they were written. Each has C(what), C(time), C(boottime), C(boot_id), C(sweep), and
              in C(previous) the SHA-256 of the line before it in the file.
            - "C(what) is V(intent), with C(kind), C(name), C(vm_id), C(identity), C(step), C(evidence), C(strikes),
              C(reasons), C(source) and C(epoch); V(outcome), with C(kind), C(name), C(vm_id), C(outcome), C(message)
              and C(bytes); or V(latched), with C(message)."
            - C(plan) of an intent is the id of the signed plan that was applied, where there was one.
            - C(step) is V(aside) for what can be taken back, V(remove) or V(bring_back).
          type: list
          elements: dict
        truncated:
          description: Whether there are more, older entries.
          type: bool
        broken:
          description: Where a line does not have the hash of the one before it, V(null) when all have.
          type: str
      sample:
        truncated: false
        broken: null
        entries:
          - what: intent
            time: "2026-11-22T03:10:00Z"
            boottime: 86412.118
            boot_id: 6a0f7a4e-6d65-4c8b-9f2e-55c1f0a7d4c1
            sweep: 1f2e3d4c5b6a7988
            kind: jail
            name: /srv/jailer/firecracker/vabc234
            vm_id: vabc234
            identity: 6a0f7a4e-6d65-4c8b-9f2e-55c1f0a7d4c1:26:5123
            step: aside
            previous: 7d865e959b2466918c9863afca942d0fb89d7c9ac0c99bafc3749504ded97730
            evidence: absent
            strikes: 2
            reasons: [the live source does not list the VM]
            source: file live-vms.json
            epoch: 17
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.microvm.reaper.plugins.module_utils import journal
from ansible_collections.microvm.reaper.plugins.module_utils.all_kinds import BY_NAME
from ansible_collections.microvm.reaper.plugins.module_utils.ledger import LedgerError


def get_argument_spec():
    """Return the module's argument spec."""
    return {
        "realm": {"type": "str", "required": True},
        "vm_id": {"type": "str"},
        "name": {"type": "str"},
        "kind": {"type": "str", "choices": sorted(BY_NAME)},
        "state_dir": {"type": "path", "default": "/var/lib/microvm.reaper"},
    }


def main():
    """Read the journal."""
    module = AnsibleModule(
        argument_spec=get_argument_spec(),
        required_one_of=[("vm_id", "name")],
        mutually_exclusive=[("vm_id", "name")],
        required_by={"kind": "name"},
        supports_check_mode=True,
    )
    params = module.params
    wanted = {key: params[key] for key in ("vm_id", "name", "kind") if params[key] is not None}
    try:
        found = journal.about(params["state_dir"], params["realm"], wanted)
    except LedgerError as err:
        module.fail_json(msg=str(err))
    module.exit_json(changed=False, ansible_facts={"vm_journal": found})


if __name__ == "__main__":
    main()
