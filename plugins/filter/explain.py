# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The filter microvm.reaper.explain."""

from __future__ import annotations

DOCUMENTATION = r"""
name: explain
short_description: Say why something on a host was or was not reaped
version_added: 0.1.0
author:
  - The microvm.reaper authors (@microvm)
description:
  - Takes the facts of one host and returns, for one VM or one resource, in sentences, what the live source says of it,
    what of it is on the host, its verdict with the reasons, what is still missing, and what the host remembers of it.
  - The verdict is that of the plan, as P(microvm.reaper.confirmed_orphans#filter) makes it. Nothing is decided here.
positional: manifest, policy, what, journal
options:
  _input:
    description: What M(microvm.reaper.vm_resource_facts) returned.
    type: dict
    required: true
  manifest:
    description: The live manifest, as for P(microvm.reaper.confirmed_orphans#filter).
    type: dict
    required: true
  policy:
    description: The policy, as for P(microvm.reaper.confirmed_orphans#filter).
    type: dict
    required: true
  what:
    description: The id of a VM, or the whole name of a resource.
    type: str
    required: true
  journal:
    description: What M(microvm.reaper.journal_facts) returned as C(vm_journal), or its entries.
    type: raw
    default: []
"""

EXAMPLES = r"""
- name: Say why a VM was or was not reaped
  ansible.builtin.debug:
    msg: "{{ (ansible_facts.vm_resources | microvm.reaper.explain(manifest, policy, 'vabc234')).sentences }}"
  vars:
    manifest: "{{ lookup('ansible.builtin.file', 'live-vms.yml') | from_yaml }}"
    policy:
      realm: prod
      host: "{{ inventory_hostname }}"
"""

RETURN = r"""
_value:
  description: The explanation.
  type: dict
  contains:
    host:
      description: The host's name in the manifest.
      type: str
    vm_id:
      description: The VM that it is about.
      type: str
    verdict:
      description:
        - V(live), V(suspected), V(confirmed), V(disputed), V(held) or V(unknown), as in the plan.
        - V(refused) where nothing at all is done on the host, V(gone) where only the host's memory has it, V(not_here)
          where the host knows nothing of it.
      type: str
    sentences:
      description: Why, the verdict first.
      type: list
      elements: str
"""

from ansible.errors import AnsibleFilterError
from ansible_collections.microvm.reaper.plugins.plugin_utils import explaining
from ansible_collections.microvm.reaper.plugins.plugin_utils.facts import FactsError
from ansible_collections.microvm.reaper.plugins.plugin_utils.manifest import ManifestError
from ansible_collections.microvm.reaper.plugins.plugin_utils.planner import PolicyError


def explain(facts, manifest, policy, what, journal=()):
    """Return the explanation of one VM or resource on the host that ``facts`` are of."""
    try:
        return explaining.explain(facts, manifest, policy, what, journal)
    except (FactsError, ManifestError, PolicyError) as err:
        raise AnsibleFilterError("microvm.reaper.explain: %s" % err) from err


class FilterModule:
    """The filters of this file."""

    def filters(self):
        """Return them by name."""
        return {"explain": explain}
