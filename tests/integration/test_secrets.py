# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A secret of a live source is nowhere but in the request, however much Ansible is made to tell."""

from __future__ import annotations

import gzip
import http.server
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SECRET = "hunter2-of-the-reaper"
KEY = SECRET + ", who signs its plans"

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(os.geteuid() != 0, reason="the state of a host belongs to root"),
]


class Api(http.server.BaseHTTPRequestHandler):
    """Lists one VM to who knows the secret."""

    def do_GET(self) -> None:
        knows = self.headers["Authorization"] == f"Bearer {SECRET}"
        vms = [{"vm_id": "a", "host": "localhost"}]
        document = {"realm": "x", "generated_at": time.time(), "complete": True, "vms": vms, "count": 1}
        body = json.dumps(document if knows else {"message": "who are you?"}).encode()
        self.send_response(200 if knows else 401)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_arguments: object) -> None:
        """Be quiet."""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    server = http.server.HTTPServer(("127.0.0.1", 0), Api)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/vms"
    server.shutdown()


SIGNED = "the path of the plan"


@pytest.mark.parametrize(
    ("playbooks", "changes", "code", "said"),
    [
        (["reap"], {}, 0, "1 VMs live by http"),
        (["reap", "--check", "--diff"], {}, 0, "1 VMs live by http"),
        (["reap"], {"reap_realm": "other"}, 2, "other_realm"),
        (["plan"], {"reap_plan_path": SIGNED, "reap_plan_artifact": True}, 0, "it can be applied until"),
        (["plan"], {"reap_plan_path": SIGNED, "reap_plan_key": SECRET}, 2, "shorter than 32 characters"),
        (["reap"], {"reap_plan": SIGNED, "reap_plan_key": ["k" * 32, KEY]}, 2, "plan_unreadable"),
        (["plan", "playbooks/reap.yml"], {"reap_plan_path": SIGNED, "reap_plan": SIGNED}, 0, "on 0 hosts, applied on"),
        (["plan", "playbooks/reap.yml"], {"reap_plan_path": SIGNED, "reap_plan": SIGNED, "reap_plan_max_age": 0.01}, 2,
         "plan_expired"),
    ],
)
def test_nothing_tells_a_secret(
    url: str, tmp_path: Path, playbooks: list[str], changes: dict, code: int, said: str
) -> None:
    jail = tmp_path / "jailer/firecracker/dead/root"
    jail.mkdir(parents=True)
    variables = {
        "reap_realm": "x",
        "reap_presets": ["firecracker-jailer"],
        "reap_state_dir": str(tmp_path / "state"),
        "reap_jail_bases": [str(tmp_path / "jailer")],
        "reap_cgroup_roots": ["no-such-parent"],
        "reap_report_path": str(tmp_path / "report.json"),
        "reap_save_inputs": str(tmp_path),
        "reap_min_age": 0,
        "reap_live_sources": [{"type": "http", "url": url, "token": SECRET}],
        "reap_plan_key": [KEY, "k" * 32],
        "ansible_python_interpreter": sys.executable,
    }
    signed = {name: str(tmp_path / "signed.plan") for name, value in changes.items() if value == SIGNED}
    variables.update(changes, **signed)
    given = tmp_path / "variables.json"
    given.write_text(json.dumps(variables))
    program = [str(Path(sys.executable).parent / "ansible-playbook"), "-vvvvv", "-i", "localhost,", "-c", "local"]
    done = subprocess.run(
        [*program, "-e", f"@{given}", f"playbooks/{playbooks[0]}.yml", *playbooks[1:]],
        cwd=ROOT,
        env={**os.environ, "ANSIBLE_DEBUG": "1", "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg")},
        capture_output=True,
        text=True,
    )
    output = done.stdout + done.stderr
    assert done.returncode == code and said in output, output[-3000:]
    given.unlink()
    assert [line for line in output.splitlines() if SECRET in line] == []
    for path in tmp_path.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert SECRET.encode() not in (gzip.decompress(content) if path.name.endswith(".gz") else content), path
