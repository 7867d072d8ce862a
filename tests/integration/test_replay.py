# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What a sweep saves, and replays of it, by the real ansible-playbook. The hosts are directories of this machine."""

from __future__ import annotations

import gzip
import json
import os
import re
import secrets
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from hosts.fleet import BIN, ROOT, write_list

pytestmark = [pytest.mark.timeout(180), pytest.mark.skipif(os.geteuid() != 0, reason="the reaper runs as root")]

QUICK = {"reap_min_age": 0, "reap_strike_interval": 0.1, "reap_waves": [1]}


class Local:
    """Hosts that are nothing but jails in a directory: on each one VM lives and one is dead."""

    def __init__(self, directory: Path, names: list[str]):
        self.directory, self.names = directory, names
        self.saved = directory / "saved"
        self.saved.mkdir()
        for name in names:
            for vm_id in ("valive", "vdead"):
                (directory / name / "jails/firecracker" / vm_id / "root").mkdir(parents=True)
            _machine(directory / name)
        python = f"{directory}/{{{{ inventory_hostname }}}}/python"
        here = {"ansible_connection": "local", "ansible_python_interpreter": python}
        variables = {
            "reap_realm": "local",
            "reap_presets": ["hyper"],
            "reap_kinds": ["jail", "cgroup"],
            "reap_cgroup_roots": [f"no-such-cgroup-{os.getpid()}"],
            "reap_jail_bases": [f"{directory}/{{{{ inventory_hostname }}}}/jails"],
            "reap_state_dir": f"{directory}/{{{{ inventory_hostname }}}}/state",
            "reap_live_sources": [{"type": "file", "path": f"{directory}/live.json"}],
            "reap_save_inputs": str(self.saved),
        }
        hosts = {name: dict(here, reap_keep=[f"only-{name}"]) for name in names}
        (directory / "hosts.yml").write_text(yaml.safe_dump({"all": {"hosts": hosts, "vars": variables}}))

    def sweep(self, *arguments: str, live: dict | None = None, **variables) -> subprocess.CompletedProcess:
        """Sweep with a list of this moment; by a clock that is a little ahead, so that its age is 0."""
        vms = [{"vm_id": "valive", "host": name} for name in self.names]
        document = {"realm": "local", "generated_at": time.time() + 25, "complete": True, "vms": vms, **(live or {})}
        write_list(self.directory / "live.json", document)
        given = ["-e", json.dumps({**QUICK, **variables})]
        return run("-i", self.directory / "hosts.yml", *given, *arguments, "playbooks/reap.yml")

    def files(self) -> list[Path]:
        return sorted(self.saved.iterdir(), key=lambda path: path.stat().st_mtime_ns)

    def dead(self) -> list[str]:
        return [name for name in self.names if (self.directory / name / "jails/firecracker/vdead").exists()]


def _machine(directory: Path) -> None:
    """Make a Python that sees a machine id of its own: without, all hosts would be clones of this machine."""
    (directory / "machine-id").write_text(secrets.token_hex(16) + "\n")
    with_it = f'mount --bind {directory}/machine-id /etc/machine-id && exec {sys.executable} "$@"'
    (directory / "python").write_text(f"#!/bin/sh\nexec unshare --mount sh -c '{with_it}' python \"$@\"\n")
    (directory / "python").chmod(0o700)


def run(*argv) -> subprocess.CompletedProcess:
    argv = (BIN / "ansible-playbook", *argv)
    return subprocess.run([str(one) for one in argv], cwd=ROOT, capture_output=True, text=True, timeout=120)


def replay(path: Path, changes: dict | None = None) -> subprocess.CompletedProcess:
    """Replay as the README has it; nothing is there that could be asked."""
    given = {"reap_inputs": str(path), **({"reap_changes": changes} if changes else {})}
    return run("-i", "localhost,", "-e", json.dumps(given), "playbooks/replay.yml")


def lines(path: Path) -> list[dict]:
    with gzip.open(path) as stream:
        return [json.loads(line) for line in stream]


@pytest.fixture
def three(tmp_path: Path) -> Local:
    return Local(tmp_path, ["h1", "h2", "h3"])


@pytest.fixture
def two(tmp_path: Path) -> Local:
    return Local(tmp_path, ["h1", "h2"])


def test_a_sweep_in_batches_is_saved_and_replayed(three: Local) -> None:
    first = three.sweep()
    assert first.returncode == 0, first.stdout + first.stderr
    second = three.sweep()
    assert second.returncode == 0 and three.dead() == [], second.stdout + second.stderr
    one, two = three.files()
    assert re.fullmatch(r"local-\d{4}-\d\d-\d\dT\d\d-\d\d-\d\dZ(-2)?\.jsonl\.gz", one.name)
    assert {path.stat().st_mode & 0o777 for path in (one, two)} == {0o600}
    # One file for all batches of a run, each with its header; every host with its own policy.
    found = lines(two)
    assert [line.get("host", "header") for line in found] == ["header", "h1", "header", "h2", "header", "h3"]
    assert [line["policy"]["keep"] for line in found if "host" in line] == [["only-h1"], ["only-h2"], ["only-h3"]]
    assert all(isinstance(line["facts"]["packed"], str) for line in found if "host" in line)
    for path in (one, two):
        done = replay(path)
        assert done.returncode == 0 and "all plans are the same, to the byte" in done.stdout, done.stdout
    tried = replay(two, {"reap_strikes": 3})
    assert tried.returncode == 0, tried.stdout
    for name in three.names:
        assert f"{name}: vdead: confirmed, 1 of 1 reaped -> suspected\n" in tried.stdout
    assert "to be reaped then: 3 VMs (3 resources); now: 0 VMs (0 resources)" in tried.stdout
    forged = [dict(line, policy=dict(line["policy"], strikes=3)) if "host" in line else line for line in found]
    two.write_bytes(gzip.compress("".join(json.dumps(line) + "\n" for line in forged).encode()))
    caught = replay(two)
    assert caught.returncode == 2, caught.stdout
    assert "3 of 3 plans are not as they were made (h1, h2 and h3); the file or" in " ".join(caught.stdout.split())


def test_what_was_stopped_can_be_replayed_in_check_mode_too(two: Local) -> None:
    assert two.sweep("--check").returncode == 0
    assert two.sweep().returncode == 0
    stopped = two.sweep("--check", reap_max_per_fleet=1)
    assert stopped.returncode == 2 and "fleet_cap" in stopped.stdout, stopped.stdout
    looked, _struck, path = two.files()
    assert [line["check_mode"] for line in lines(looked) if "format" in line] == [True] * 2
    told = replay(path)
    assert told.returncode == 0 and "batch 2: stopped (fleet_cap): 2 VMs would be reaped in this run" in told.stdout
    allowed = replay(path, {"reap_max_per_fleet": 2})
    assert "reap_max_per_fleet=1 -> goes on" in allowed.stdout, allowed.stdout
    assert "then: 1 VM (1 resource); now: 2 VMs (2 resources)" in allowed.stdout
    assert two.dead() == two.names


def test_nothing_is_saved_where_nobody_asked(two: Local) -> None:
    assert two.sweep(reap_save_inputs="").returncode == 0
    assert two.files() == []


def test_a_directory_that_cannot_be_written_is_told_before_any_host_is_touched(two: Local) -> None:
    done = two.sweep(reap_save_inputs="/proc/no-such-directory")
    assert done.returncode == 2 and "reap_save_inputs" in done.stdout and "nothing was done" in done.stdout
    assert not (two.directory / "h1/state").exists()


def test_a_file_that_cannot_be_written_on_stops_the_batch_before_its_first_removal(two: Local) -> None:
    assert two.sweep().returncode == 0
    # Enough for the file that the preflight tries, and not for what is to be saved.
    script = f"mount -t tmpfs -o size=4k none {two.saved} && exec {BIN}/ansible-playbook $0 \"$@\""
    given = json.dumps({**QUICK, "reap_keep": [secrets.token_hex(50) for _pin in range(100)]})
    argv = ["unshare", "--mount", "sh", "-c", script, "-i", str(two.directory / "hosts.yml"), "-e", given]
    done = subprocess.run([*argv, "playbooks/reap.yml"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "STOPPED (inputs_not_saved)" in done.stdout and "No space left on device" in done.stdout
    assert two.dead() == two.names


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"reap_strikse": 3}, "unknown variable reap_strikse, did you mean reap_strikes?"),
        ({"reap_strikes": 1}, "reap_strikes must be a number, at least 2"),
        ({"reap_kinds": ["jail"]}, "reap_kinds cannot be changed afterwards"),
    ],
)
def test_changes_that_cannot_be_are_named(tmp_path: Path, changes: dict, words: str) -> None:
    done = replay(tmp_path / "none", changes)
    assert done.returncode == 2 and words in " ".join(done.stdout.split()), done.stdout


def test_a_file_has_to_be_named() -> None:
    done = run("-i", "localhost,", "playbooks/replay.yml")
    assert done.returncode != 0 and "-e reap_inputs=" in done.stdout + done.stderr
