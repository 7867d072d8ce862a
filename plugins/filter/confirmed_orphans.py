# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The filter microvm.reaper.confirmed_orphans."""

from __future__ import annotations

DOCUMENTATION = r"""
name: confirmed_orphans
short_description: Plan what is to be reaped on a host
version_added: 0.1.0
author:
  - The microvm.reaper authors (@microvm)
description:
  - Takes the facts of one host, with the strikes it remembers, and returns the plan for it. What is in C(reap) belongs
    to
    no live VM and has been seen without one, as the same object, in as many sweeps as the policy asks for.
  - A pure function. The same facts, manifest and policy give the same plan.
positional: manifest, policy, signed_plan
options:
  _input:
    description: What M(microvm.reaper.vm_resource_facts) returned.
    type: dict
    required: true
  manifest:
    description:
      - A live manifest, as M(microvm.reaper.live_manifest) returned it, or a whole one, a mapping with C(realm),
        C(generated_at), C(complete) and C(vms).
      - The age of a whole one is not checked here.
    type: dict
    required: true
  policy:
    description:
      - The policy. C(realm) and C(host) are required. The others are those of the role without C(reap_), namely
        C(strikes), C(strike_interval), C(hold), C(min_age), C(running), C(zombies), C(zombies_restart_units), C(keep),
        C(expect_empty), C(max_per_host), C(max_percent_per_host), C(max_shrink_percent), C(percent_floor),
        C(reused_ids), C(adopt_host) and C(clear_latch).
    type: dict
    required: true
  signed_plan:
    description:
      - A signed plan, as M(microvm.reaper.open_plan) returned it. Only what it has for this host, act for act, is then
        planned; VMs of which it does not have all are held.
    type: dict
"""

EXAMPLES = r"""
- name: See what the next sweep would remove
  ansible.builtin.debug:
    msg: "{{ (ansible_facts.vm_resources | microvm.reaper.confirmed_orphans(manifest, policy)).reap }}"
  vars:
    manifest: "{{ lookup('ansible.builtin.file', 'live-vms.yml') | from_yaml }}"
    policy:
      realm: prod
      host: "{{ inventory_hostname }}"
"""

RETURN = r"""
_value:
  description: The plan of the host.
  type: dict
  contains:
    host:
      description: The host's name in the manifest.
      type: str
    realm:
      description: The realm.
      type: str
    manifest:
      description: What the decision rests on, with C(source), C(epoch), C(count) and C(generated_at).
      type: dict
    refused:
      description: Null, or C(code) and C(message) of why nothing at all is done on this host.
      type: dict
    families:
      description: By vm_id, for every VM that is not live, its verdict, evidence, strikes, reasons and resources.
      type: dict
    vms:
      description: How many VMs have which verdict.
      type: dict
    reap:
      description: What is to be removed, in the order of removal.
      type: list
      elements: dict
    ledger:
      description: What the host is to remember.
      type: dict
    ledger_changed:
      description: Whether that differs from what it remembers now.
      type: bool
    generation:
      description: The generation of the ledger that the plan was made from.
      type: int
    within:
      description: The id, the time and the epoch of the signed plan, and with C(state) and C(why) whether this host's
        share of it may be applied.
      type: dict
      returned: with O(signed_plan)
    counts:
      description: By kind, how many resources have which verdict.
      type: dict
    notices:
      description: What an operator should know besides.
      type: list
      elements: str
"""

from ansible.errors import AnsibleFilterError
from ansible_collections.microvm.reaper.plugins.plugin_utils import planning
from ansible_collections.microvm.reaper.plugins.plugin_utils.facts import FactsError
from ansible_collections.microvm.reaper.plugins.plugin_utils.manifest import ManifestError
from ansible_collections.microvm.reaper.plugins.plugin_utils.planner import PolicyError


def confirmed_orphans(facts, manifest, policy, signed_plan=None):
    """Return the plan of the host that ``facts`` are of."""
    try:
        return planning.plan(facts, manifest, policy, signed_plan)
    except (FactsError, ManifestError, PolicyError) as err:
        raise AnsibleFilterError("microvm.reaper.confirmed_orphans: %s" % err) from err


class FilterModule:
    """The filters of this file."""

    def filters(self):
        """Return them by name."""
        return {"confirmed_orphans": confirmed_orphans}
