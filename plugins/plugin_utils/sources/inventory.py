# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A group of the Ansible inventory: each live VM is a host of any inventory plugin.

Its variable ``vm_id`` is its id (its inventory name without one), ``vm_host`` the host it lives on (everywhere without
one), ``vm_also_on`` the other hosts of a migration, ``vm_state`` its state. The hosts the list speaks for are all other
hosts of the inventory, so a VM on a host the inventory does not have is an error and not a VM lost from sight.

The inventory is read again, without caches: what the play itself knows is as old as its beginning. AWX gives a job a
copy of its inventory, and a slice only some hosts of each group. That is refused: the list is then older than what was
found on the hosts, or has only a share of those who live.
"""

from __future__ import annotations

from ..manifest import ManifestError

OPTIONS = {
    "group": {"type": "str", "default": "live_vms"},
    "id_variable": {"type": "str", "default": "vm_id"},
    "host_variable": {"type": "str", "default": "vm_host"},
    "state_variable": {"type": "str", "default": "vm_state"},
    "also_on_variable": {"type": "str", "default": "vm_also_on"},
}


def describe(options):
    """Name the source by its group."""
    return "inventory group %s" % options["group"]


def fetch(options, context):
    """Return the group as a document of this moment."""
    if context.get("of_awx"):
        raise ManifestError(
            "inventory_copy",
            "AWX gives its jobs a copy of the inventory, old or of one slice, so the group %r does not tell who lives "
            "now: let reap_live_sources ask the control plane itself" % options["group"],
        )
    inventory = context["inventory"]()
    if options["group"] not in inventory.groups:
        raise ManifestError(
            "no_group",
            "the inventory has no group %r; where no VM lives the group is there and empty" % options["group"],
        )
    vms = inventory.groups[options["group"]]
    hosts = set(inventory.groups["all"]) - set(vms)
    return {
        "realm": context["realm"],
        "generated_at": context["now"],
        "complete": True,
        # What is no text is refused later, by its place in the list.
        "hosts": sorted((inventory.variables(name).get("reap_host_id", name) for name in hosts), key=str),
        "vms": [_vm(name, inventory.own_variables(name), options) for name in vms],
    }


def _vm(name, variables, options):
    return {
        "vm_id": variables.get(options["id_variable"], name),
        "host": variables.get(options["host_variable"]),
        "state": variables.get(options["state_variable"]),
        "also_on": variables.get(options["also_on_variable"]),
    }
