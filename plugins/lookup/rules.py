# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The lookup microvm.reaper.rules."""

from __future__ import annotations

DOCUMENTATION = r"""
name: rules
short_description: Turn presets into the rules that say which names on a host are those of VMs
version_added: 0.1.0
author:
  - The microvm.reaper authors (@microvm)
description:
  - Reads presets, checks them and returns the rules for the O(microvm.reaper.vm_resource_facts#module:rules) of
    M(microvm.reaper.vm_resource_facts).
options:
  _terms:
    description: Names of presets that come with the collection, or mappings in the shape of one.
    type: list
    elements: raw
    required: true
  cgroup_roots:
    description: Cgroups, relative to the mount of their hierarchy, that take the place of those in the presets.
    type: list
    elements: str
    default: []
  jail_bases:
    description: Base directories of jails that take the place of those in the presets.
    type: list
    elements: str
    default: []
  containerd_namespaces:
    description: containerd namespaces that take the place of those in the presets.
    type: list
    elements: str
    default: []
  containerd_address:
    description: The socket of containerd that takes the place of the one in the presets.
    type: str
    default: ''
  thin_pools:
    description: Thin pools that hold volumes of VMs and nothing else, by their device-mapper names. The thin ids in
      them that no device maps are looked at.
    type: list
    elements: str
    default: []
  want:
    description: The rules, or the patterns of ids that the platforms use again.
    type: str
    choices: [rules, reused_ids]
    default: rules
  kinds:
    description: Only the rules of these kinds. All where empty.
    type: list
    elements: str
    default: []
"""

EXAMPLES = r"""
- name: Show the rules for a host of hyper whose VMs live below another cgroup
  ansible.builtin.debug:
    msg: "{{ lookup('microvm.reaper.rules', 'hyper', cgroup_roots=['vms/hyper']) }}"
"""

RETURN = r"""
_raw:
  description: One mapping of kinds to lists of rules, or one list of patterns.
  type: list
  elements: raw
"""

from ansible.errors import AnsibleLookupError
from ansible.plugins.lookup import LookupBase
from ansible_collections.microvm.reaper.plugins.plugin_utils.presets import PresetError, reused_ids, rules


class LookupModule(LookupBase):
    """Presets in, rules out."""

    def run(self, terms, variables=None, **kwargs):
        """Return the rules as the only element."""
        self.set_options(var_options=variables, direct=kwargs)
        names = ("cgroup_roots", "jail_bases", "containerd_namespaces", "containerd_address", "thin_pools", "kinds")
        try:
            if self.get_option("want") == "reused_ids":
                return [reused_ids(terms)]
            return [rules(terms, **{name: self.get_option(name) for name in names})]
        except PresetError as err:
            raise AnsibleLookupError("microvm.reaper.rules: %s" % err) from err
