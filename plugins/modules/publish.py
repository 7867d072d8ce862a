#!/usr/bin/python
# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
module: publish
short_description: Tell a web hook which VMs have ended, before anything of them is removed
version_added: 0.1.0
author:
  - The microvm.reaper authors (@microvm)
description:
  - Posts the VMs of a batch of hosts that the plans are about to reap as JSON to a URL, so that whoever waits for the
    end of a VM does not wait for the cleaning. What is refused or spared is left out.
  - "The body is C({event: vm_ended, realm: ..., sweep: ..., check_mode: false, hosts: {host: [{vm_id: ..., evidence:
    tombstoned, resources: 3}]}}). The evidence is V(tombstoned), V(absent) or V(elsewhere), as in the plan."
  - A VM of which something stays busy is published again by the next sweep.
  - A hook that does not answer stops nothing; it is asked once more, and then there is a warning.
options:
  plans:
    description: The name of the variable that holds each host's plan.
    type: str
    required: true
  refused:
    description: The hosts on which nothing is done, as M(microvm.reaper.brake) returned them.
    type: dict
    default: {}
  spare:
    description: By host, the VMs that are left alone, as M(microvm.reaper.recheck) returned them.
    type: dict
    default: {}
  realm:
    description: The realm of the sweep.
    type: str
    required: true
  sweep:
    description: The id of the sweep, as the report and the hosts' journals have it.
    type: str
    default: ""
  url:
    description: The URL of the hook. It counts as a secret, and is told no more of than its host.
    type: str
    required: true
  headers:
    description: Headers to send, such as one that proves who asks. They are never shown.
    type: dict
    default: {}
  timeout:
    description: Seconds in which each try must be over.
    type: float
    default: 5
extends_documentation_fragment:
  - microvm.reaper.on_controller
attributes:
  check_mode:
    description: Can run in check mode and return changed status prediction without modifying target.
    support: full
    details: Nothing is published.
notes:
  - Runs on the controller. Meant to be run once for a batch of hosts, with C(run_once).
seealso:
  - module: microvm.reaper.recheck
  - module: microvm.reaper.reap
"""

EXAMPLES = r"""
- name: Tell the control plane which VMs have ended
  microvm.reaper.publish:
    plans: my_plan
    realm: prod
    url: https://control.example/hooks/reaper
    headers:
      Authorization: "Bearer {{ my_token }}"
  run_once: true
"""

RETURN = r"""
published:
  description: Whether the hook took it.
  returned: always
  type: bool
hosts:
  description: Of how many hosts there was something to publish.
  returned: always
  type: int
error:
  description: Why it did not, when it was asked.
  returned: always
  type: str
"""
