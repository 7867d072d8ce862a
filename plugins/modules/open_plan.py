#!/usr/bin/python
# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
module: open_plan
short_description: Verify a signed plan
version_added: 0.1.0
author:
  - The microvm.reaper authors (@microvm)
description:
  - Opens what M(microvm.reaper.seal_plan) wrote, and returns the small handle with which
    P(microvm.reaper.confirmed_orphans#filter) plans no more than what the signed plan has for a host.
  - Fails when the signature is not good, the plan is for another realm, or it has expired. Nothing of it is parsed
    before its signature was verified.
options:
  plan:
    description: The path of the plan on the controller, or its text.
    type: str
    required: true
  key:
    description: The key, or a list of keys, one of which it must be signed with.
    type: raw
    required: true
  realm:
    description: The realm that it must be for.
    type: str
    required: true
  max_age:
    description: A plan older than this many seconds is refused, also where it says that it is good for longer.
    type: float
    default: 3600
extends_documentation_fragment:
  - microvm.reaper.on_controller
attributes:
  check_mode:
    description: Can run in check mode and return the same as otherwise.
    support: full
notes:
  - Runs on the controller. Meant to be run once for a batch of hosts, with C(run_once).
seealso:
  - module: microvm.reaper.seal_plan
  - plugin: microvm.reaper.confirmed_orphans
    plugin_type: filter
"""

EXAMPLES = r"""
- name: Open the signed plan
  microvm.reaper.open_plan:
    plan: /srv/reaper/prod.plan
    key: "{{ reap_plan_key }}"
    realm: prod
  run_once: true
  register: signed
"""

RETURN = r"""
opened:
  description: The handle of the plan, with C(plan), C(realm), C(made_at), C(expires_at), C(manifest) and C(budget).
    Good until the end of this run.
  returned: success
  type: dict
code:
  description: One word for why it was refused.
  returned: failure
  type: str
  sample: plan_expired
"""
