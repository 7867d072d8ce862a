# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The filter microvm.reaper.orphans."""

from __future__ import annotations

DOCUMENTATION = r"""
name: orphans
short_description: List the resources on a host whose VM is not live
version_added: 0.1.0
author:
  - The microvm.reaper authors (@microvm)
description:
  - Takes the facts of one host and returns the resources that belong to none of the live VMs.
  - This is a look at one moment. It knows no strikes, no policy and no caps, so it is no list of what may be removed;
    see P(microvm.reaper.confirmed_orphans#filter) for that.
positional: live
options:
  _input:
    description: What M(microvm.reaper.vm_resource_facts) returned.
    type: dict
    required: true
  live:
    description: The ids of the live VMs, or a live manifest (a mapping with C(vms)).
    type: raw
    required: true
"""

EXAMPLES = r"""
- name: Show what belongs to no VM that runs
  ansible.builtin.debug:
    msg: "{{ ansible_facts.vm_resources | microvm.reaper.orphans(['vabc234', 'vdef567']) }}"
"""

RETURN = r"""
_value:
  description:
    - Resources, sorted by kind and name; each with C(kind), C(name), C(vm_id), C(identity), C(in_use), C(holders),
      C(age_seconds), C(bytes), C(parent) and C(details).
  type: list
  elements: dict
"""

from ansible.errors import AnsibleFilterError
from ansible_collections.microvm.reaper.plugins.plugin_utils import planning
from ansible_collections.microvm.reaper.plugins.plugin_utils.facts import FactsError
from ansible_collections.microvm.reaper.plugins.plugin_utils.manifest import ManifestError


def orphans(facts, live):
    """Return the resources in ``facts`` whose vm_id is not in ``live``."""
    try:
        return planning.orphans(facts, live)
    except (FactsError, ManifestError) as err:
        raise AnsibleFilterError("microvm.reaper.orphans: %s" % err) from err


class FilterModule:
    """The filters of this file."""

    def filters(self):
        """Return them by name."""
        return {"orphans": orphans}
