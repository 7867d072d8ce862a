# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The recipes of docs/sources/recipes.md, as they are written there, by the real inventory plugins.

libvirt is real, with its test driver, which has domains and no VMs. OpenStack and Proxmox are servers that answer as
the documentation of their APIs has it.
"""

from __future__ import annotations

import http.server
import json
import os
import re
import subprocess
import threading
import time
import urllib.parse
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import ClassVar

import pytest
import yaml
from ansible_collections.microvm.reaper.plugins.plugin_utils import manifest, sources
from hosts.fleet import BIN, ROOT
from integration import community
from unit.builders import facts, policy, thing

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

    def __init__(self, place: Path, plugins: community.Community):
        self.place, self.plugins = place, plugins
        (place / "inventory").mkdir()
        (place / "ansible.cfg").write_text("[defaults]\n")
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

    def openstack(self, url: str) -> None:
        """Make an inventory of an OpenStack."""
        (recipe,) = [text for text in blocks("yaml") if "plugin: openstack.cloud" in text]
        (self.place / "inventory/openstack.yml").write_text(recipe)
        (self.place / "clouds.yaml").write_text(json.dumps({"clouds": {"test": {
            "auth": {
                "auth_url": f"{url}/v3",
                "username": "reaper",
                "password": "only for tests",
                "project_name": "admin",
                "user_domain_name": "Default",
                "project_domain_name": "Default",
            },
            "region_name": "here",
        }}}))

    def dead(self, vm_ids: Iterable[str] = "abcde") -> set[str]:
        """Return which of the VMs, all with something on rack1, are not live there."""
        host = facts(*[thing("jail", vm_id) for vm_id in vm_ids])
        extra = json.dumps({"facts": host, "policy": policy(host="rack1")})
        environment = dict(
            os.environ,
            ANSIBLE_CONFIG=f"{self.place}/ansible.cfg",
            ANSIBLE_COLLECTIONS_PATH=f"{ROOT / 'collections'}:{self.plugins.collections}",
            PYTHONPATH=str(self.plugins.libraries),
            OS_CLIENT_CONFIG_FILE=f"{self.place}/clouds.yaml",
        )
        argv = [str(BIN / "ansible-playbook"), "-i", "inventory", "-e", extra, "play.yml"]
        done = subprocess.run(argv, cwd=self.place, env=environment, text=True, capture_output=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stdout + done.stderr)
        return set(json.loads((self.place / "plan.json").read_text())["families"])


@pytest.fixture(scope="module")
def plugins() -> community.Community:
    return community.installed()


@pytest.fixture
def project(tmp_path: Path, plugins: community.Community) -> Project:
    return Project(tmp_path, plugins)


@pytest.fixture
def needs_libvirt(plugins: community.Community) -> None:
    if not plugins.has_libvirt:
        pytest.skip("Debian has libvirt's bindings for its own Python only")


@pytest.mark.usefixtures("needs_libvirt")
def test_domains_in_any_state_live_and_those_undefined_do_not(project: Project) -> None:
    project.hypervisor("rack1", a=RUNNING, b=PAUSED)
    project.hypervisor("rack2", c=SHUTOFF)
    assert project.dead() == {"d", "e"}


@pytest.mark.usefixtures("needs_libvirt")
def test_a_domain_that_migrates_lives_on_both_hosts(project: Project) -> None:
    """Row 10."""
    project.hypervisor("rack1", a=RUNNING)
    project.hypervisor("rack2", a=PAUSED, b=RUNNING)
    assert project.dead() == {"c", "d", "e"}


@pytest.mark.usefixtures("needs_libvirt")
def test_a_hypervisor_that_does_not_answer_is_no_empty_one(project: Project) -> None:
    """Row 2."""
    project.hypervisor("rack1", a=RUNNING)
    project.hypervisor("rack2", b=RUNNING)
    (project.place / "rack2.xml").unlink()
    with pytest.raises(RuntimeError, match="rack2.libvirt.yml"):
        project.dead()


@pytest.mark.usefixtures("needs_libvirt")
def test_row_01_no_domain_at_all_is_not_believed(project: Project) -> None:
    project.hypervisor("rack1")
    assert project.dead() == set()  # the plan is refused: it judges nobody
    assert json.loads((project.place / "plan.json").read_text())["refused"]["code"] == "blind"


def server(number: int, status: str, **changes: object) -> dict:
    """Return a server as the documentation of Nova's API has it, GET /servers/detail of microversion 2.96."""
    name = f"server-{number}"
    common = {
        "accessIPv4": "",
        "accessIPv6": "",
        "addresses": {"private": [{"addr": "192.0.2.%d" % number, "version": 4, "OS-EXT-IPS:type": "fixed",
                                   "OS-EXT-IPS-MAC:mac_addr": "00:0c:29:0d:11:74"}]},
        "created": "2026-09-03T04:01:32Z",
        "description": "",
        "flavor": {"disk": 1, "ephemeral": 0, "extra_specs": {}, "original_name": "m1.tiny", "ram": 512, "swap": 0,
                   "vcpus": 1},
        "hostId": "bcf92836fc9ed4203a75cb0337afc7f917d2be504164b995c2334b25",
        "id": UUID % number,
        "image": {"id": "70a599e0-31e7-49b7-b260-868f441e862b", "links": []},
        "key_name": None,
        "links": [],
        "metadata": {},
        "name": name,
        "config_drive": "",
        "locked": False,
        "OS-DCF:diskConfig": "AUTO",
        "OS-EXT-AZ:availability_zone": "nova",
        "OS-EXT-SRV-ATTR:host": "rack2",
        "OS-EXT-SRV-ATTR:hypervisor_hostname": "rack2",
        "OS-EXT-SRV-ATTR:instance_name": "instance-%08x" % number,
        "OS-EXT-STS:power_state": 1,
        "OS-EXT-STS:task_state": None,
        "OS-EXT-STS:vm_state": status.lower(),
        "os-extended-volumes:volumes_attached": [],
        "progress": 0,
        "security_groups": [{"name": "default"}],
        "status": status,
        "tags": [],
        "tenant_id": "6f70656e737461636b20342065766572",
        "updated": "2026-09-03T04:01:32Z",
        "user_id": "someone",
    }
    return {**common, **changes}


UUID = "f5dc173b-6804-445a-a6d8-%012d"


class OpenStack(http.server.BaseHTTPRequestHandler):
    """Keystone and Nova, two servers on a page."""

    servers: ClassVar[list[dict]] = []
    fails: ClassVar[str] = ""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        base = f"http://{self.headers['Host']}"
        catalog = [
            {"type": kind, "name": kind, "id": kind, "endpoints": [
                {"interface": "public", "url": base + path, "region": "here", "region_id": "here", "id": kind},
            ]}
            for kind, path in (("identity", "/v3"), ("compute", "/compute/v2.1"))
        ]
        project = {"id": "p", "name": "admin", "domain": {"id": "default", "name": "Default"}}
        token = {"methods": ["password"], "user": dict(project, name="reaper"), "project": project, "roles": [],
                 "expires_at": "2099-01-01T00:00:00.000000Z", "issued_at": "2026-01-01T00:00:00.000000Z",
                 "catalog": catalog}
        self.answer({"token": token}, 201)

    def do_GET(self) -> None:
        base, (path, _mark, query) = f"http://{self.headers['Host']}", self.path.partition("?")
        if path.rstrip("/") == "/v3":
            links = [{"rel": "self", "href": base + "/v3/"}]
            self.answer({"version": {"id": "v3.14", "status": "stable", "links": links}})
        elif path.rstrip("/") == "/compute/v2.1":
            links = [{"rel": "self", "href": base + "/compute/v2.1/"}]
            about = {"id": "v2.1", "status": "CURRENT", "version": "2.96", "min_version": "2.1", "links": links}
            self.answer({"version": about})
        elif path == "/compute/v2.1/servers/detail" and "all_tenants=True" in query:
            asked = dict(urllib.parse.parse_qsl(query))
            ids = [one["id"] for one in self.servers]
            begin = ids.index(asked["marker"]) + 1 if "marker" in asked else 0
            page = {"servers": self.servers[begin : begin + 2]}
            if begin + 2 < len(ids):
                after = f"{base}{path}?all_tenants=True&limit=2&marker={ids[begin + 1]}"
                page["servers_links"] = [{"rel": "next", "href": after}]
            if self.fails and self.fails in query:
                self.answer({"computeFault": {"code": 500, "message": "Unexpected API Error."}}, 500)
            else:
                self.answer(page)
        else:
            self.answer({"error": {"message": "there is none", "code": 404}}, 404)

    def answer(self, body: dict, status: int = 200) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in (("Content-Type", "application/json"), ("Content-Length", len(data)),
                            ("X-Subject-Token", "token")):
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_arguments: object) -> None:
        pass


@pytest.fixture
def openstack(project: Project) -> Iterator[type[OpenStack]]:
    handler = type("Handler", (OpenStack,), {})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        project.openstack("http://127.0.0.1:%d" % running.server_port)
        yield handler
        running.shutdown()


def test_servers_of_openstack_live_in_any_state_until_they_are_gone(
    project: Project, openstack: type[OpenStack]
) -> None:
    openstack.servers = [
        server(1, "ACTIVE"),
        server(2, "SHUTOFF"),
        server(3, "BUILD", addresses={}, **{"OS-EXT-SRV-ATTR:host": None}),  # on no host yet, without an address
        server(4, "ERROR"),
        server(5, "MIGRATING"),
        server(6, "DELETED"),
    ]
    assert project.dead([UUID % number for number in range(1, 9)]) == {UUID % number for number in (6, 7, 8)}


@pytest.mark.parametrize("page", ["marker", "all_tenants"])
def test_row_02_an_openstack_that_fails_midway_is_no_smaller_one(
    project: Project, openstack: type[OpenStack], page: str
) -> None:
    openstack.servers = [server(number, "ACTIVE") for number in range(1, 6)]
    openstack.fails = page
    with pytest.raises(RuntimeError, match=r"openstack.yml"):
        project.dead([UUID % 1, UUID % 5])


def test_row_01_no_server_at_all_is_not_believed(project: Project, openstack: type[OpenStack]) -> None:
    assert project.dead([UUID % 1]) == set()  # the plan is refused: it judges nobody
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
