# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Run a job template as AWX 24.6.1 does: the same directory, environment and extra variables, through ansible-runner's
transmit, worker and process. The directory of the worker stands for /runner of the execution environment."""

from __future__ import annotations

import io
import itertools
import json
import os
import shutil
import subprocess
import sys
from configparser import ConfigParser
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ansible_runner
import yaml
from hosts.fleet import ROOT

BIN = Path(sys.executable).parent
SEARCHED = (
    ("ANSIBLE_COLLECTIONS_PATHS", "collections_paths", "requirements_collections",
     "~/.ansible/collections:/usr/share/ansible/collections"),
    ("ANSIBLE_ROLES_PATH", "roles_path", "requirements_roles",
     "~/.ansible/roles:/usr/share/ansible/roles:/etc/ansible/roles"),
    ("ANSIBLE_COLLECTIONS_PATH", "collections_path", "requirements_collections",
     "~/.ansible/collections:/usr/share/ansible/collections"),
)


_numbers = itertools.count(1)


@dataclass
class Job:
    """What AWX keeps of a job."""

    status: str
    events: list[dict] = field(default_factory=list)

    @property
    def stdout(self) -> str:
        return "\n".join(event["stdout"] for event in self.events if event.get("stdout"))

    @property
    def artifacts(self) -> dict:
        """What the custom statistics of the run were."""
        ends = [event["event_data"] for event in self.events if event["event"] == "playbook_on_stats"]
        return ends[-1].get("artifact_data") or {} if ends else {}

    @property
    def hosts(self) -> set[str]:
        """Who did anything."""
        return {event["event_data"]["host"] for event in self.events if event["event"] == "runner_on_ok"}


def repository(directory: Path) -> Path:
    """Return a repository of the checkout as it is now, what is not committed included."""
    place = directory / "repository"
    listed = subprocess.check_output(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT)
    for name in listed.decode().split("\0"):
        if name and os.path.lexists(ROOT / name):
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, place / name, follow_symlinks=False)
    as_someone = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    for arguments in (["init", "-q"], ["add", "-A"], [*as_someone, "commit", "-qm", "all"]):
        subprocess.run(["git", *arguments], cwd=place, check=True)
    return place


def sliced(inventory: dict, number: int, count: int) -> dict:
    """Return the share of an inventory that AWX gives to a slice: every nth host, of every group."""
    mine = set(sorted(inventory["_meta"]["hostvars"])[number - 1::count])
    found: dict[str, Any] = {}
    for name, group in inventory.items():
        if name != "_meta":
            found[name] = {**group, "hosts": [host for host in group.get("hosts", []) if host in mine]}
    kept = {host: variables for host, variables in inventory["_meta"]["hostvars"].items() if host in mine}
    return {**found, "_meta": {"hostvars": kept}}


def imported(source: Path) -> dict:
    """Return an inventory as AWX imports it: groups with variables, and all hosts."""
    command = [BIN / "ansible-inventory", "-i", source, "--list", "--export"]
    environment = {name: value for name, value in os.environ.items() if name != "ANSIBLE_CONFIG"}
    listed = json.loads(subprocess.check_output(command, cwd=source.parent, env=environment))
    hosts = {host for group in listed.values() for host in group.get("hosts", [])}
    variables = {host: listed.get("_meta", {}).get("hostvars", {}).get(host, {}) for host in hosts}
    every = {**listed.get("all", {}), "hosts": sorted(hosts)}
    return {**listed, "all": every, "_meta": {"hostvars": variables}}


class _Unsafe(yaml.SafeDumper):
    """Writes every text so that Ansible does not take it for a template."""


_Unsafe.add_representer(str, lambda dumper, value: dumper.represent_scalar("!unsafe", value))


def run(
    project: Path,
    directory: Path,
    template: dict,
    inventory: dict,
    *,
    answers: dict | None = None,
    secrets: dict | None = None,
    slice_of: tuple[int, int] = (1, 1),
    job_type: str = "run",
    limit: str = "",
    programs: Path = BIN,
) -> Job:
    """Run a job of a template: its fields as AWX has them, ``extra_vars`` a dictionary, ``survey`` its questions.

    ``answers`` are those of the survey, and what comes from the job before; ``secrets`` what credentials inject;
    ``slice_of`` which slice it is of how many.
    """
    number = next(_numbers)
    private, worker = directory / f"job-{number}", directory / f"runner-{number}"
    for name in ("artifacts", "cp", "env", "inventory", "requirements_collections", "requirements_roles"):
        (private / name).mkdir(parents=True)
    worker.mkdir()
    clone = ["git", "clone", "-q", "--depth=1", project.as_uri(), private / "project"]
    subprocess.run(clone, check=True)

    script = f"#! /usr/bin/env python3\n# -*- coding: utf-8 -*-\nprint({json.dumps(sliced(inventory, *slice_of))!r})\n"
    _write(private / "inventory/hosts", script, 0o700)
    about = {f"{name}_{key}": value for name in ("awx", "tower") for key, value in {
        "job_id": number, "job_launch_type": "workflow", "inventory_id": 1, "project_revision": "0" * 40,
        "job_template_id": template["id"], "job_template_name": template["name"],
    }.items()}
    defaults = {one["variable"]: one["default"] for one in template["survey"] if "default" in one}
    variables = {**about, **template["extra_vars"], **defaults, **(answers or {})}
    _write(private / "env/extravars", yaml.dump(variables, Dumper=_Unsafe))
    _write(private / "env/secrets", yaml.dump(secrets or {}, Dumper=_Unsafe))
    _write(private / "env/settings", json.dumps({"job_timeout": 600, "suppress_ansible_output": True}))
    words = ["--check"] if job_type == "check" else []
    words += ["-u", "root"] + (["--diff"] if template["diff_mode"] else [])
    words += [f"--forks={template['forks']}"] + (["-l", limit] if limit else [])
    _write(private / "env/cmdline", ansible_runner.utils.args2cmdline(*words, "-e", f"@{worker}/env/secrets"))

    with (directory / f"sent-{number}").open("wb") as stream:
        ansible_runner.interface.run(
            streamer="transmit",
            _output=stream,
            private_data_dir=str(private),
            ident=str(number),
            playbook=template["playbook"],
            inventory=str(private / "inventory/hosts"),
            envvars=_environment(private, worker, number),
            suppress_env_files=True,
            fact_cache_type="",
        )
    (home := directory / f"home-{number}").mkdir()
    kept = {name: os.environ[name] for name in ("LANG", "LC_ALL", "TMPDIR") if name in os.environ}
    done = subprocess.run(
        [BIN / "ansible-runner", "worker", f"--private-data-dir={worker}"],
        input=(directory / f"sent-{number}").read_bytes(),
        capture_output=True,
        env={**kept, "LC_ALL": "C.UTF-8", "HOME": str(home), "PATH": f"{programs}:{BIN}:{os.environ['PATH']}"},
        timeout=300,
        check=False,
    )

    job = Job("unknown")
    ansible_runner.interface.run(
        streamer="process",
        _input=io.BytesIO(done.stdout),
        private_data_dir=str(private),
        ident=str(number),
        quiet=True,
        event_handler=lambda event: job.events.append(event) or True,
        status_handler=lambda status, runner_config: setattr(job, "status", status["status"]),
    )
    return job


def _write(path: Path, content: str, mode: int = 0o600) -> None:
    path.write_text(content)
    path.chmod(mode)


def _environment(private: Path, worker: Path, number: int) -> dict[str, str]:
    """Return what AWX sets for a job."""
    settings = ConfigParser(interpolation=None)
    settings.read(private / "project/ansible.cfg")
    found = dict(settings["defaults"]) if settings.has_section("defaults") else {}
    environment = {
        "ANSIBLE_FORCE_COLOR": "True",
        "ANSIBLE_HOST_KEY_CHECKING": "False",
        "ANSIBLE_INVENTORY_UNPARSED_FAILED": "True",
        "ANSIBLE_PARAMIKO_RECORD_HOST_KEYS": "False",
        "AWX_PRIVATE_DATA_DIR": str(private),
        "JOB_ID": str(number),
        "INVENTORY_ID": "1",
        "PROJECT_REVISION": "0" * 40,
        "ANSIBLE_RETRY_FILES_ENABLED": "False",
        "MAX_EVENT_RES": "700000",
        "AWX_HOST": "https://awx.example.org",
        "ANSIBLE_SSH_CONTROL_PATH_DIR": f"{worker}/cp",
    }
    for name, setting, folder, default in SEARCHED:
        paths = default.split(":")
        for path in found.get(setting, "").split(":") if setting in found else ():
            if path not in paths:
                paths = [found[setting], *paths]
        environment[name] = ":".join([f"{worker}/{folder}", *paths])
    return environment
