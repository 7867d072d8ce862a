# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The recipes of docs/sources/recipes.md, as they are written there, by the real inventory plugins.

libvirt is real, with its test driver, which has domains and no VMs. Needs community.libvirt (`pip install ansible` has
it; REAPER_TEST_COLLECTIONS names a place for collections) and libvirt's bindings for the Python that runs the tests.
"""

from __future__ import annotations

import http.server
import importlib.util
import json
import os
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from ansible_collections.microvm.reaper.plugins.plugin_utils import manifest, sources
from hosts.fleet import BIN, ROOT
from unit.builders import facts, policy, thing

COLLECTIONS = [*filter(None, [os.environ.get("REAPER_TEST_COLLECTIONS")]), "/usr/lib/python3/dist-packages"]
HAS_LIBVIRT = importlib.util.find_spec("libvirt") and any(
    Path(place, "ansible_collections/community/libvirt").exists() for place in COLLECTIONS
)
needs_libvirt = pytest.mark.skipif(not HAS_LIBVIRT, reason="needs community.libvirt and Python's libvirt bindings")

DOMAIN = """
  <domain type="test" xmlns:test="http://libvirt.org/schemas/domain/test/1.0">
    <name>%s</name><memory>8192</memory><os><type>hvm</type></os><test:runstate>%d</test:runstate>
  </domain>"""
RUNNING, PAUSED, SHUTOFF = 1, 3, 5
PLAY = """
- hosts: rack1
  connection: local
  gather_facts: false
  vars:
    ansible_python_interpreter: "{{ ansible_playbook_python }}"
  tasks:
    - microvm.reaper.live_manifest:
        realm: prod
        sources: [{type: inventory, group: live_vms}]
      register: fetched
    - ansible.builtin.copy:
        content: "{{ facts | microvm.reaper.confirmed_orphans(fetched.manifest, policy) | to_json }}"
        dest: "{{ playbook_dir }}/plan.json"
"""


def blocks(language: str) -> list[str]:
    """Return the code blocks of the recipes in this language."""
    text = (ROOT / "docs/sources/recipes.md").read_text()
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)
    return [re.sub(f"^{indent}", "", block, flags=re.MULTILINE) for indent, block in found]


class Project:
    """A project made of the recipes, with hypervisors of libvirt's test driver."""

    def __init__(self, place: Path):
        self.place = place
        (place / "inventory").mkdir()
        (place / "ansible.cfg").write_text(blocks("ini")[0])
        (place / "play.yml").write_text(PLAY)
        (hosts,) = [text for text in blocks("yaml") if "hosts.yml" in text]
        (place / "inventory/hosts.yml").write_text(hosts)
        (self.recipe,) = [text for text in blocks("yaml") if "plugin: community.libvirt" in text]

    def hypervisor(self, name: str, **domains: int) -> None:
        """Make a hypervisor that has these domains in these states."""
        node = self.place / f"{name}.xml"
        node.write_text("<node>%s\n</node>" % "".join(DOMAIN % item for item in domains.items()))
        recipe = self.recipe.replace("qemu+ssh://root@rack1/system", f"test://{node}")
        assert recipe != self.recipe
        (self.place / f"inventory/{name}.libvirt.yml").write_text(recipe)

    def dead(self) -> set[str]:
        """Return which of the VMs a, b, c, d and e, all with something on rack1, are not live there."""
        host = facts(*[thing("jail", vm_id) for vm_id in "abcde"])
        extra = json.dumps({"facts": host, "policy": policy(host="rack1")})
        environment = dict(
            os.environ,
            ANSIBLE_CONFIG=f"{self.place}/ansible.cfg",
            ANSIBLE_COLLECTIONS_PATH=":".join([str(ROOT / "collections"), *COLLECTIONS]),
        )
        argv = [str(BIN / "ansible-playbook"), "-i", "inventory", "-e", extra, "play.yml"]
        done = subprocess.run(argv, cwd=self.place, env=environment, text=True, capture_output=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stdout + done.stderr)
        return set(json.loads((self.place / "plan.json").read_text())["families"])


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


@needs_libvirt
def test_domains_in_any_state_live_and_those_undefined_do_not(project: Project) -> None:
    project.hypervisor("rack1", a=RUNNING, b=PAUSED)
    project.hypervisor("rack2", c=SHUTOFF)
    assert project.dead() == {"d", "e"}


@needs_libvirt
def test_a_domain_that_migrates_lives_on_both_hosts(project: Project) -> None:
    """Row 10."""
    project.hypervisor("rack1", a=RUNNING)
    project.hypervisor("rack2", a=PAUSED, b=RUNNING)
    assert project.dead() == {"c", "d", "e"}


@needs_libvirt
def test_a_hypervisor_that_does_not_answer_is_no_empty_one(project: Project) -> None:
    """Row 2."""
    project.hypervisor("rack1", a=RUNNING)
    project.hypervisor("rack2", b=RUNNING)
    (project.place / "rack2.xml").unlink()
    with pytest.raises(RuntimeError, match="rack2.libvirt.yml"):
        project.dead()


@needs_libvirt
def test_row_01_no_domain_at_all_is_not_believed(project: Project) -> None:
    project.hypervisor("rack1")
    assert project.dead() == set()  # the plan is refused: it judges nobody
    assert json.loads((project.place / "plan.json").read_text())["refused"]["code"] == "blind"


# In the shape of the API's documentation (Proxmox VE 8, cluster/resources); one node does not answer.
GUESTS = [
    {"id": "qemu/100", "type": "qemu", "node": "pve1", "vmid": 100, "name": "web", "status": "running", "template": 0},
    {"id": "qemu/101", "type": "qemu", "node": "pve2", "vmid": 101, "name": "web", "status": "unknown"},
    {"id": "lxc/102", "type": "lxc", "node": "pve1", "vmid": 102, "name": "db", "status": "stopped", "template": 0},
]
TOKEN = "PVEAPIToken=reaper@pve!sweep=12345678-1234-1234-1234-123456789abc"


class Proxmox(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        good = self.path == "/api2/json/cluster/resources?type=vm" and self.headers["Authorization"] == TOKEN
        body = json.dumps({"data": GUESTS if good else None}).encode()
        self.send_response(200 if good else 401)
        self.send_header("Content-Type", "application/json;charset=UTF-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_arguments: object) -> None:
        pass


@pytest.fixture
def proxmox() -> Iterator[str]:
    """The address of a server that answers as Proxmox does."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxmox) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield "http://127.0.0.1:%d" % server.server_port
        server.shutdown()


def test_guests_of_proxmox_live_whatever_their_node_says(proxmox: str, tmp_path: Path) -> None:
    (recipe,) = [text for text in blocks("yaml") if "type: http" in text]
    (source,) = yaml.safe_load(recipe)["reap_live_sources"]
    assert "lookup(" in source["headers"]["Authorization"] and source.pop("ca_file")
    source.update(url=source["url"].replace("https://pve1:8006", proxmox), headers={"Authorization": TOKEN})
    context = {"realm": "prod", "now": time.time(), "directory": str(tmp_path), "inventory": None}
    context["terminal_states"] = manifest.TERMINAL_STATES
    handle = sources.fetch([source], context, str(tmp_path / "index"), max_age=600)
    assert manifest.share(handle, "rack1", {"100", "101", "102", "103"})["live"] == ["100", "101", "102"]
    assert manifest.share(handle, "rack1", {"100"})["proven"]
