#!/usr/bin/python
# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
module: seal_plan
short_description: Sign the plans of a whole fleet as one
version_added: 0.1.0
author:
  - The microvm.reaper authors (@microvm)
description:
  - Takes the plans of all hosts of the play, after M(microvm.reaper.brake) has let them pass, and writes them as one
    plan that is signed with HMAC-SHA256. M(microvm.reaper.open_plan) opens it.
  - Only what is to be done is in it, and by which list and caps it was judged. It is signed and not encrypted.
  - Fails in a play with C(serial). A plan of one batch would not have been judged as a whole.
options:
  state:
    description: V(absent) removes an older plan and makes sure that a new one can be written and signed, to begin with.
    type: str
    choices: [present, absent]
    default: present
  path:
    description:
      - Write it to this file on the controller, in one piece, readable by its owner only. What is there and is no plan
        is not overwritten by V(absent).
    type: path
    default: ""
  artifact:
    description:
      - Return it as C(ansible.builtin.set_stats) would, in C(reap_plan), so that the later nodes of a workflow of AWX
        get it as an extra variable. Fails above 512 KiB.
    type: bool
    default: false
  key:
    description: The key, at least 32 characters, or a list of keys, of which the first signs.
    type: raw
    required: true
  plans:
    description: The name of the variable that holds each host's plan. Required to make one.
    type: str
  hosts:
    description: All hosts of the play. Those that have no plan are named in the plan as unseen.
    type: list
    elements: str
    default: []
  refused:
    description: The hosts on which nothing is done, as M(microvm.reaper.brake) returned them.
    type: dict
    default: {}
  manifest:
    description: What M(microvm.reaper.live_manifest) returned. Required to make one.
    type: dict
  realm:
    description: The realm. Required to make one.
    type: str
  sweep:
    description: The id of this run, and so of the plan. Required to make one.
    type: str
  caps:
    description: The caps of the fleet, as M(microvm.reaper.brake) has them.
    type: dict
    default: {}
    suboptions:
      max_per_fleet:
        description: More VMs than this to be reaped in one run stop it.
        type: int
        default: 500
      max_percent:
        description: A larger share than this of all VMs to be reaped stops the run.
        type: float
        default: 30
      percent_floor:
        description: Up to this many VMs percentages say nothing.
        type: int
        default: 10
  max_age:
    description: Seconds after which it expires.
    type: float
    default: 3600
extends_documentation_fragment:
  - microvm.reaper.on_controller
attributes:
  check_mode:
    description: Can run in check mode and return changed status prediction without modifying target.
    support: full
    details: Nothing is written, removed or passed on.
notes:
  - Runs on the controller. Meant to be run once, with C(run_once).
seealso:
  - module: microvm.reaper.open_plan
  - module: microvm.reaper.brake
"""

EXAMPLES = r"""
- name: Seal the plan
  microvm.reaper.seal_plan:
    path: /srv/reaper/prod.plan
    key: "{{ reap_plan_key }}"
    plans: my_plan
    hosts: "{{ preflight.hosts }}"
    manifest: "{{ live.manifest }}"
    realm: prod
    sweep: "{{ preflight.sweep }}"
  run_once: true
"""

RETURN = r"""
sealed:
  description: What the plan says of itself.
  returned: when one was made
  type: dict
  contains:
    plan:
      description: Its id.
      type: str
    made_at:
      description: When it was made, in seconds since 1970.
      type: float
    expires_at:
      description: Until when it can be applied.
      type: float
    manifest:
      description: The list of live VMs that it was judged by.
      type: dict
    budget:
      description: How many VMs begin to go on how many hosts, and the caps that this was judged by.
      type: dict
    idle:
      description: Hosts on which nothing is to be done.
      type: list
      elements: str
    refused:
      description: Hosts that were refused, with the code.
      type: dict
    unseen:
      description: Hosts that could not be reached or read, by their names in the inventory.
      type: list
      elements: str
    path:
      description: Where it is.
      type: str
    bytes:
      description: How long its text is.
      type: int
code:
  description: One word for why none was made.
  returned: failure
  type: str
  sample: plan_too_large
"""
