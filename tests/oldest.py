"""Sweep this machine with the oldest ansible-core that meta/runtime.yml promises, until a dead jail is gone.

Its templates make texts of numbers, its filters get other classes, its arguments are checked by other code.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def promised() -> str:
    found = re.search(r"requires_ansible: .*>=(\d+\.\d+)", (ROOT / "meta/runtime.yml").read_text())
    assert found, "meta/runtime.yml promises no version"
    return found[1]


def programs(version: str) -> Path:
    """Return the directory of the programs of that version; it is installed once."""
    place = ROOT / ".cache" / f"ansible-core-{version}"
    if not (place / "ready").exists():
        venv.create(place, clear=True, with_pip=True)
        wanted = [f"ansible-core=={version}.*", *without_core((ROOT / "requirements.txt").read_text())]
        subprocess.run([place / "bin/python", "-m", "pip", "install", "--quiet", *wanted], check=True)
        (place / "ready").touch()
    return place / "bin"


def without_core(requirements: str) -> list[str]:
    lines = [line.partition("#")[0].strip() for line in requirements.splitlines()]
    return [line for line in lines if line and not line.startswith(("-", "ansible-core"))]


def sweep(bin_path: Path, directory: Path, playbook: str = "reap", **changes) -> str:
    """Sweep a jail base in ``directory`` once, or only plan to; return what was printed."""
    variables = {
        "reap_realm": "oldest",
        "reap_presets": ["firecracker-jailer"],
        "reap_kinds": ["jail", "cgroup"],
        "reap_jail_bases": [str(directory / "jailer")],
        "reap_cgroup_roots": ["no-such-parent"],
        "reap_live_sources": [{"type": "file", "path": str(directory / "live.json")}],
        "reap_state_dir": str(directory / "state"),
        "reap_strike_interval": 0.01,
        "reap_min_age": 0,
        "reap_strikes": {"absent": 2},
    }
    younger_than_the_jail = time.time() + 25
    live = {"realm": "oldest", "generated_at": younger_than_the_jail, "complete": True, "vms": [{"vm_id": "alive"}]}
    (directory / "live.json").write_text(json.dumps(live))
    os.utime(directory / "live.json", (younger_than_the_jail, younger_than_the_jail))
    command = [bin_path / "ansible-playbook", "-i", "localhost,", "-c", "local", f"playbooks/{playbook}.yml"]
    extra = ["-e", json.dumps(dict(variables, ansible_python_interpreter=sys.executable, **changes))]
    done = subprocess.run(
        [*command, *extra],
        cwd=ROOT,
        env={**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(done.stdout)
    assert done.returncode == 0, f"exit code {done.returncode}"
    return done.stdout


def main() -> None:
    if os.geteuid() != 0:
        print("not run: only root may remove jails")
        return
    version = promised()
    bin_path = programs(version)
    print(subprocess.run([bin_path / "ansible", "--version"], capture_output=True, text=True).stdout.splitlines()[0])
    with tempfile.TemporaryDirectory() as text:
        directory = Path(text)
        jail = directory / "jailer/firecracker/dead/root"
        jail.mkdir(parents=True)
        assert "1 suspected" in sweep(bin_path, directory)
        assert jail.exists()
        assert "1 aside" in sweep(bin_path, directory, reap_hold=3600)
        assert not jail.parent.exists()
        assert "1 reaped" in sweep(bin_path, directory, reap_hold=0)
        assert "nothing to reap" in sweep(bin_path, directory)
        jail.mkdir(parents=True)
        signed = {"reap_hold": 0, "reap_plan_key": "0123456789" * 4, "reap_waves": [1]}
        assert "1 suspected" in sweep(bin_path, directory, **signed)
        path = str(directory / "signed.plan")
        assert "1 would be reaped" in sweep(bin_path, directory, "plan", reap_plan_path=path, **signed)
        assert jail.exists()
        assert "1 reaped" in sweep(bin_path, directory, reap_plan=path, **signed)
        assert "plan_spent" in sweep(bin_path, directory, reap_plan=path, **signed)


if __name__ == "__main__":
    main()
