# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The end of a VM is published before anything of it is removed, by real sweeps of this machine."""

from __future__ import annotations

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
SECRET = "hunter2-of-the-hook"

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(os.geteuid() != 0, reason="the state of a host belongs to root"),
]


class Hook:
    def __init__(self, jail: Path) -> None:
        self.status, self.seen = 204, []
        hook = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                hook.seen.append((body, self.headers["Authorization"], jail.exists()))
                self.send_response(hook.status)
                self.end_headers()

            def log_message(self, *_arguments: object) -> None:
                """Be quiet."""

        self.server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/{SECRET}"


@pytest.fixture
def hook(tmp_path: Path) -> Iterator[Hook]:
    jail = tmp_path / "jailer/firecracker/dead/root"
    (jail / "logs").mkdir(parents=True)
    (jail / "logs" / "vmm.log").write_text("last words\n")
    one = Hook(jail)
    yield one
    one.server.shutdown()


def sweep(tmp_path: Path, hook: Hook, *arguments: str, **changes: object) -> str:
    (tmp_path / "live.json").write_text(json.dumps({
        "realm": "x", "generated_at": time.time() + 25, "complete": True, "vms": [{"vm_id": "a", "host": "localhost"}],
    }))  # fmt: skip
    ahead = time.time() + 25
    os.utime(tmp_path / "live.json", (ahead, ahead))
    variables = {
        "reap_realm": "x",
        "reap_presets": ["firecracker-jailer"],
        "reap_state_dir": str(tmp_path / "state"),
        "reap_jail_bases": [str(tmp_path / "jailer")],
        "reap_cgroup_roots": ["no-such-parent"],
        "reap_report_path": str(tmp_path / "report.json"),
        "reap_min_age": 0,
        "reap_strike_interval": 0.01,
        "reap_live_sources": [{"type": "file", "path": str(tmp_path / "live.json")}],
        "reap_webhook_url": hook.url,
        "reap_webhook_headers": {"Authorization": "Bearer " + SECRET},
        "ansible_python_interpreter": sys.executable,
    }
    given = tmp_path / "variables.json"
    given.write_text(json.dumps({**variables, **changes}))
    program = [str(Path(sys.executable).parent / "ansible-playbook"), "-vvvvv", "-i", "localhost,", "-c", "local"]
    done = subprocess.run(
        [*program, "playbooks/reap.yml", "-e", f"@{given}", *arguments],
        cwd=ROOT,
        env={**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg")},
        capture_output=True,
        text=True,
    )
    output = done.stdout + done.stderr
    given.unlink()
    assert done.returncode == 0, output[-3000:]
    assert [line for line in output.splitlines() if SECRET in line] == []
    return output


def report(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "report.json").read_text())


def test_the_end_is_known_before_the_cleaning_and_nothing_is_sent_in_check_mode(tmp_path: Path, hook: Hook) -> None:
    sweep(tmp_path, hook)
    sweep(tmp_path, hook, "--check")
    assert hook.seen == []
    sweep(tmp_path, hook)
    ((body, header, jail_was_there),) = hook.seen
    assert jail_was_there and not (tmp_path / "jailer/firecracker/dead").exists()
    assert header == "Bearer " + SECRET
    said = report(tmp_path)
    assert body == {
        "event": "vm_ended",
        "realm": "x",
        "sweep": said["sweep"],
        "check_mode": False,
        "hosts": {"localhost": [{"vm_id": "dead", "evidence": "absent", "resources": 1}]},
    }
    assert said["unpublished"] is None and said["hosts"]["localhost"]["evidence"]["written"] == 1
    # The jail was moved aside, and its whole log is copied in the background.
    subprocess.run(["flock", "-w", "20", tmp_path / "state/evidence.lock", "true"], check=True)
    (bundle,) = (tmp_path / "state/x/evidence").iterdir()
    listed = subprocess.run(["tar", "-tzf", bundle], check=True, capture_output=True, text=True).stdout.split()
    log = "-log-root_logs_vmm.log.txt"
    assert listed == ["metadata.json", "01-jail-listing.txt", f"02-jail{log}", f"03-jail-whole{log}"]
    sweep(tmp_path, hook)
    assert len(hook.seen) == 1


def test_a_hook_that_fails_stops_nothing_and_is_told(tmp_path: Path, hook: Hook) -> None:
    hook.status = 500
    sweep(tmp_path, hook)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ANSIBLE_DISPLAY_OK_HOSTS", "true")
        output = sweep(tmp_path, hook)
    assert len(hook.seen) == 2 and not (tmp_path / "jailer/firecracker/dead").exists()
    assert "NOT PUBLISHED: POST http://127.0.0.1:" in output and "HTTP 500" in output
    assert "VMs was not published" in " ".join(output.split())
    assert "HTTP 500" in report(tmp_path)["unpublished"]


def test_without_a_url_nothing_is_sent_and_without_evidence_nothing_is_kept(tmp_path: Path, hook: Hook) -> None:
    for _sweep in range(2):
        sweep(tmp_path, hook, reap_webhook_url="", reap_evidence=False)
    assert hook.seen == [] and not (tmp_path / "jailer/firecracker/dead").exists()
    assert not (tmp_path / "state/x/evidence").exists()
    assert report(tmp_path)["hosts"]["localhost"]["evidence"] is None
