# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The inventory as a live source: what is given on the command line says nothing of a VM."""

from __future__ import annotations

import pytest
from ansible import constants
from ansible.inventory.manager import InventoryManager
from ansible.parsing.dataloader import DataLoader
from ansible.utils import vars as ansible_vars
from ansible.vars.hostvars import HostVars
from ansible.vars.manager import VariableManager
from ansible_collections.microvm.reaper.plugins.action.live_manifest import Inventory
from ansible_collections.microvm.reaper.plugins.plugin_utils import manifest
from ansible_collections.microvm.reaper.plugins.plugin_utils.manifest import ManifestError
from ansible_collections.microvm.reaper.plugins.plugin_utils.sources import inventory as source

INVENTORY = """
all:
  hosts:
    rack1:
  children:
    live_vms:
      hosts:
        a: {vm_id: v1, vm_host: rack1}
        b: {vm_host: "{{ where }}"}
"""
OPTIONS = {name: option["default"] for name, option in source.OPTIONS.items()}


@pytest.fixture
def fetched(tmp_path, monkeypatch):
    """Return a function: with these variables on the command line, what the source lists, as ``{vm_id: host}``."""

    def fetch(**extra):
        monkeypatch.setattr(ansible_vars.load_extra_vars, "extra_vars", extra, raising=False)
        (tmp_path / "hosts.yml").write_text(INVENTORY)
        loader = DataLoader()
        play = InventoryManager(loader=loader, sources=[str(tmp_path / "hosts.yml")])
        play.add_host("c")  # as the module add_host does
        play.groups["live_vms"].add_host(play.get_host("c"))
        play.get_host("c").set_variable("vm_host", "rack1")
        task_vars = {
            "ansible_inventory_sources": [str(tmp_path / "hosts.yml")],
            "hostvars": HostVars(play, VariableManager(loader=loader, inventory=play), loader),
            "groups": play.get_groups_dict(),
        }
        context = {"realm": "prod", "now": 0, "inventory": lambda: Inventory(loader, task_vars)}
        document = source.fetch(OPTIONS, context)
        assert document["hosts"] == [extra.get("reap_host_id", "rack1")]
        assert {vm["state"] for vm in document["vms"]} == {None}
        return {vm["vm_id"]: vm["host"] for vm in document["vms"]}

    return fetch


def test_names_of_hosts_that_are_no_texts_are_refused_in_words():
    class Hosts:
        groups = {"all": ["rack1", "rack2", "a"], "live_vms": ["a"]}

        def variables(self, name):
            return {"reap_host_id": 2} if name == "rack2" else {}

        own_variables = variables

    document = source.fetch(OPTIONS, {"realm": "prod", "now": 0, "inventory": Hosts})
    with pytest.raises(ManifestError, match="hosts: a text was expected, not 2"):
        manifest.check(document, "inventory", now=0, max_age=60)


@pytest.mark.parametrize("extra", [{}, {"vm_id": "v9"}, {"vm_host": "rack9", "reap_host_id": "r"}, {"vm_state": "x"}])
def test_every_vm_keeps_its_own_id_host_and_state(fetched, extra):
    assert fetched(where="rack1", **extra) == {"v1": "rack1", "b": "rack1", "c": "rack1"}


def test_row_33_a_part_of_the_inventory_that_cannot_be_read_is_no_smaller_inventory(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "INVENTORY_ANY_UNPARSED_IS_FAILED", False)
    (tmp_path / "a.yml").write_text(INVENTORY)
    (tmp_path / "b.yml").write_text("all: {hosts: {rack2: ")
    loader = DataLoader()
    task_vars = {"ansible_inventory_sources": [str(tmp_path)], "groups": {}, "hostvars": {}}
    with pytest.raises(ManifestError, match="a part of the inventory cannot be read"):
        Inventory(loader, task_vars)
    assert constants.INVENTORY_ANY_UNPARSED_IS_FAILED is False
    (tmp_path / "b.yml").unlink()
    assert "live_vms" in Inventory(loader, task_vars).groups


def test_a_copy_that_awx_has_made_for_a_job_does_not_tell_who_lives():
    with pytest.raises(ManifestError, match="AWX gives its jobs a copy of the inventory") as caught:
        source.fetch(OPTIONS, {"realm": "prod", "now": 0, "inventory": None, "of_awx": True})
    assert caught.value.code == "inventory_copy"
