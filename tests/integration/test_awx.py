# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What AWX is told, and what it refuses to be told."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hosts.fleet import ROOT
from integration import community
from integration.awx_controller import TOKEN, Controller, serving

SETTINGS = {
    "awx_execution_environment_image": "registry.example.org/reaper:1",
    "awx_inventory_scm_url": "https://git.example.org/fleet.git",
    "awx_machine_credential": "hypervisors",
    "awx_notify_url": "https://chat.example.org/hook",
    "awx_plan_key": "k-of-the-plan",
    "awx_live_source_token": "t-of-the-source",
}


def files() -> list[str]:
    """The files of a clone of this project."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    return subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.fixture
def controller() -> Controller:
    fresh = Controller(files())
    fresh.add("credentials", {"name": "hypervisors", "organization": 1, "credential_type": 2, "inputs": {}})
    return fresh


def apply(controller: Controller, *arguments: str, **changes) -> subprocess.CompletedProcess:
    with serving(controller) as url:
        return subprocess.run(
            [Path(sys.executable).parent / "ansible-playbook", "playbooks/awx.yml", *arguments,
             "-e", json.dumps({**SETTINGS, **changes})],
            cwd=ROOT,
            env={
                **os.environ,
                "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
                "ANSIBLE_COLLECTIONS_PATH": f"{ROOT / 'collections'}:{community.awx()}",
                "CONTROLLER_HOST": url,
                "CONTROLLER_OAUTH_TOKEN": TOKEN,
            },
            capture_output=True,
            text=True,
            check=False,
        )


def recap(done: subprocess.CompletedProcess) -> dict[str, int]:
    (line,) = re.findall(r"^localhost +: (.*)$", done.stdout, re.M)
    return {name: int(count) for name, count in re.findall(r"(\w+)=(\d+)", line)}


def test_all_of_it_is_accepted_and_the_second_time_changes_nothing(controller: Controller) -> None:
    first = apply(controller)
    assert first.returncode == 0, first.stdout + first.stderr
    print(first.stdout[-3000:], controller.ignored)
    second = apply(controller)
    print(second.stdout[-5000:])
    assert recap(second)["changed"] == 0
