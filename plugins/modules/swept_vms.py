#!/usr/bin/python
# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
module: swept_vms
short_description: Tell of which VMs the hosts of a sweep still had something
version_added: 0.1.0
author:
  - The microvm.reaper authors (@microvm)
description:
  - Takes what the role P(microvm.reaper.reap#role) found on its hosts earlier in this run, for
    M(microvm.reaper.abandoned_vmms), which leaves the records of those VMs alone. Looks at no host itself.
  - Fails when nothing may be concluded from the sweep; when it was stopped by a cap or by a live source that cannot be
    believed, when its realm is latched, when it was of another realm, or when no host answered.
  - A host that did not answer, was refused, or of which a kind could not be read is left out and named.
options:
  hosts:
    description: All hosts of the sweep, by their inventory names.
    type: list
    elements: str
    required: true
  realm:
    description: The realm that the sweep must have been of.
    type: str
    default: ""
  variables:
    description: Where a sweep of one's own, without the role, keeps what its steps returned, by variable name.
    type: dict
    default: {}
    suboptions:
      gathered:
        description: The result of M(microvm.reaper.vm_resource_facts).
        type: str
        default: __reap_gathered
      plan:
        description: What P(microvm.reaper.confirmed_orphans#filter) returned.
        type: str
        default: __reap_plan
      brake:
        description: The result of M(microvm.reaper.brake).
        type: str
        default: __reap_brake
      recheck:
        description: The result of M(microvm.reaper.recheck), if it was asked.
        type: str
        default: __reap_recheck
attributes:
  action:
    description: Indicates this has a corresponding action plugin so some parts of the options can be executed on the
      controller.
    support: full
  check_mode:
    description: Can run in check mode and return the same as otherwise.
    support: full
  diff_mode:
    description: Will return details on what has changed (or possibly needs changing in check mode), when in diff mode.
    support: none
    details: Nothing is changed.
  platform:
    description: Target OS/families that can be operated against.
    support: full
    platforms: all
notes:
  - Runs on the controller. It needs a play of its own behind the one with the role, since the hosts of a play with
    C(serial) are at hand only one batch after the other. In such a play it fails.
seealso:
  - module: microvm.reaper.abandoned_vmms
"""

EXAMPLES = r"""
- name: Settle the records of dead VMs
  hosts: localhost
  gather_facts: false
  tasks:
    - name: Know which VMs the hosts still have something of
      microvm.reaper.swept_vms:
        hosts: "{{ groups.hypervisors }}"
        realm: prod
      register: swept

    - name: Name the hosts that cannot be settled in this sweep
      ansible.builtin.debug:
        var: swept.unanswered
"""

RETURN = r"""
facts:
  description:
    - The hosts that answered, by the names that the control plane has for them (C(reap_host_id)), each with the ids of
      the VMs of which something was there when it was looked at. A mapping, written as JSON.
    - What the sweep removed afterwards is in it too; the records of these VMs are settled by the next run.
  returned: success
  type: str
  sample: '{"rack1": ["vabc234"], "rack2": []}'
hosts:
  description: How many hosts answered.
  returned: success
  type: int
unanswered:
  description: By inventory name, why a host is not among them.
  returned: success
  type: dict
realm:
  description: The realm of the sweep.
  returned: success
  type: str
"""
