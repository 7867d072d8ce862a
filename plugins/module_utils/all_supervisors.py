# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The supervisors of VMs on a host, and what each of their modules has.

They say which VMs run there, and so can only add life: what they do not name may live all the same.

``TYPE``                         its name, the ``type`` of an entry of reap_live_sources
``OPTIONS``                      Ansible's argument spec of the entry
``check(options)``               raises RuleError for what the spec cannot say
``alive(options, host)``         -> ``{vm_id: why}``, why in words, a part of a sentence; reads, never writes. What may
                                 live counts as alive. Raises Absent (there is no such thing here) or another
                                 ProbeError (could not be read)
"""

from __future__ import annotations

from .supervisors import containerd, firecracker

BY_TYPE = {supervisor.TYPE: supervisor for supervisor in (containerd, firecracker)}


def entry_spec():
    """Return the argument spec of a list of entries, of any type."""
    options = {
        "type": {"type": "str", "required": True, "choices": sorted(BY_TYPE)},
        "required": {"type": "bool", "default": True},
    }
    needed = []
    for name, supervisor in sorted(BY_TYPE.items()):
        for option, spec in supervisor.OPTIONS.items():
            options[option] = {key: value for key, value in spec.items() if key != "required"}
            if spec.get("required"):
                needed.append(["type", name, [option]])
    return {"type": "list", "elements": "dict", "options": options, "required_if": needed}
