#!/usr/bin/python
# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
module: jail_facts
short_description: Gather the jails of VMs
version_added: 0.1.0
author:
  - The microvm.reaper authors (@microvm)
description:
  - Lists the directories that firecracker's jailer made, C(<base>/<exec>/<id>), whose name is that of a VM.
extends_documentation_fragment:
  - microvm.reaper.rules.jail
  - microvm.reaper.rules.facts
seealso:
  - module: microvm.reaper.vm_resource_facts
"""

EXAMPLES = r"""
- name: Look for the jails of firecracker
  microvm.reaper.jail_facts:
    rules:
      - base: /srv/jailer
        exec: firecracker.*
        name: (?P<vm_id>[A-Za-z0-9-]+)
"""

RETURN = r"""
ansible_facts:
  description: Facts to add to those of the host.
  returned: always
  type: dict
  contains:
    vm_jails:
      description: The jails of VMs.
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
            - C(name) is the path, C(in_use) tells that a process has its root, working directory or program in the
              jail.
          type: list
          elements: dict
        foreign:
          description: How many others there are that no rule matches.
          type: int
        seconds:
          description: How long it took.
          type: float
        places:
          description: How full the file systems of the jail bases are, in percent.
          type: dict
      sample:
        status: ok
        reason:
        foreign: 0
        seconds: 0.004
        places:
          /srv/jailer: 41.3
        resources:
          - kind: jail
            name: /srv/jailer/firecracker/vabc234
            vm_id: vabc234
            identity: 8c3f0f8a2b1d4e55:1:0d00000044a1b2c3
            in_use: false
            holders: []
            age_seconds: 86405.2
            bytes:
            parent:
            details:
              mounts: 0
"""

from ansible_collections.microvm.reaper.plugins.module_utils import facts_module
from ansible_collections.microvm.reaper.plugins.module_utils.kinds import jail


def main():
    """Read the host's resources of this kind."""
    facts_module.run(
        {"rules": dict(facts_module.rules_spec(jail), required=True)},
        lambda params: {"vm_jails": (jail, params["rules"])},
    )


if __name__ == "__main__":
    main()
