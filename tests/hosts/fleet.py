#!/usr/bin/env python3
"""A small fleet of test hosts with VMs, dead and alive: what the scenarios, the demo and the tests have in common.

    fleet.py plant --state DIR [--options JSON]     plant VMs on all hosts of DIR; write what a sweep needs beside them
    fleet.py list --state DIR                       write the list of live VMs anew, as of now
    fleet.py check --state DIR --orphans there|gone check all hosts; exit 1 and say what is wrong
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BIN = Path(sys.executable).parent
REALM = "test"


def write_list(path: Path, document: dict, part: int = 1) -> None:
    """Write a manifest, or a part of it. One of the future has a file of the future: it is of age 0 for a while."""
    new, text = path.with_suffix(".new"), json.dumps(document, indent=1)
    new.write_text(text[: len(text) // part])
    date = document["generated_at"]
    if isinstance(date, float) and date > time.time():
        os.utime(new, (date, date))
    os.replace(new, path)


class Fleet:
    """The hosts that hosts.py started for one state directory."""

    def __init__(self, state: Path):
        self.state = Path(state).resolve()

    @classmethod
    def up(cls, state: Path, **names: list[str]) -> "Fleet":
        """Start hosts: ``container=[names]``, ``kernel=[names]``."""
        fleet = cls(state)
        for kind, wanted in names.items():
            call(hosts_py("up", "--kind", kind, "--state", state, *(f"--name={name}" for name in wanted)))
        return fleet

    def down(self) -> None:
        """Remove the hosts."""
        call(hosts_py("down", "--state", self.state))

    def hosts(self) -> dict[str, dict]:
        """Return the variables of each host."""
        return yaml.safe_load((self.state / "inventory.yml").read_text())["reap_hosts"]["hosts"]

    def run(self, host: str, command: str, **how) -> subprocess.CompletedProcess:
        """Run a shell command on a host."""
        argv = hosts_py("exec", "--state", self.state, host, "--", command)
        return subprocess.run(argv, text=True, capture_output=True, **how)

    def plant(self, options: dict) -> None:
        """Plant VMs on all hosts, and write what the playbook needs to know of them."""
        with ThreadPoolExecutor() as pool:
            planted = dict(pool.map(lambda item: (item[0], self._plant(*item, options)), self.hosts().items()))
        (self.state / "planted.json").write_text(json.dumps(planted))
        (self.state / "group_vars").mkdir(exist_ok=True)
        (self.state / "group_vars" / "all.yml").write_text(yaml.safe_dump(self._variables()))
        self.list_live()

    def list_live(self, **changes) -> None:
        """Write the manifest of this moment; ``changes`` replace keys of it."""
        planted = self.planted()
        vms = [{"vm_id": vm_id, "host": host} for host, one in planted.items() for vm_id in one["live"]]
        dead = [{"vm_id": vm_id} for one in planted.values() for vm_id in one["tombstones"]]
        document = {
            "realm": REALM,
            "generated_at": time.time(),
            "epoch": time.time_ns(),
            "complete": True,
            "count": len(vms),
            "hosts": sorted(planted),
            "vms": vms,
            "tombstones": dead,
        }
        write_list(self.state / "live.json", dict(document, **changes))

    def sweep(self, *arguments: str, **how) -> "Sweep":
        """Run the playbook once against the fleet."""
        report = self.state / "report.json"
        report.unlink(missing_ok=True)
        done = subprocess.run(self.sweep_argv(*arguments), cwd=ROOT, text=True, capture_output=True, **how)
        return Sweep(done, json.loads(report.read_text()) if report.exists() else None)

    def sweep_argv(self, *arguments: str) -> list[str]:
        """Return the command line of one sweep."""
        extra = ["-e", f"reap_report_path={self.state}/report.json"]
        command = [str(BIN / "ansible-playbook"), "-i", f"{self.state}/inventory.yml"]
        return [*command, *extra, *arguments, "playbooks/reap.yml"]

    def clear(self) -> None:
        """Make all hosts as new: without any VM, dead or alive, and without what a reaper remembers."""
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda host: self._on(host, "clear"), self.hosts()))

    def left(self, host: str) -> list[str]:
        """Return what there still is of the dead VMs on a host, each as "kind name"."""
        return json.loads(self._on(host, "left"))

    def ledger(self, host: str) -> dict | None:
        """Return what a host remembers, None for a host without a ledger."""
        done = self.run(host, f"cat /var/lib/microvm.reaper/{REALM}/ledger.json")
        return json.loads(done.stdout) if done.returncode == 0 else None

    def planted(self) -> dict[str, dict]:
        """Return what was planted on each host."""
        return json.loads((self.state / "planted.json").read_text())

    def check(self, orphans: str) -> list[str]:
        """Return what is wrong on any of the hosts."""
        with ThreadPoolExecutor() as pool:
            found = pool.map(lambda host: self._check(host, orphans), self.hosts())
            return [problem for problems in found for problem in problems]

    def _plant(self, host: str, variables: dict, options: dict) -> dict:
        options = dict(
            options,
            seed=host,
            device_mapper=variables["test_device_mapper"],
            cgroup_mount=variables["test_cgroup_mount"],
            cgroup_parent=variables["test_cgroup_parent"] + "/hyper",
            namespace=variables["test_containerd_namespace"],
            archive=variables["test_busybox_archive"],
            image=variables["test_busybox_image"],
        )
        return json.loads(self._on(host, f"plant --options {shlex.quote(json.dumps(options))}"))

    def _on(self, host: str, arguments: str) -> str:
        """Run plant.py on a host."""
        script = (HERE / "plant.py").read_text()
        done = self.run(host, f"cat > /run/plant.py; python3 /run/plant.py {arguments}", input=script)
        if done.returncode:
            raise RuntimeError(f"{host}: {done.stderr or done.stdout}")
        return done.stdout

    def _check(self, host: str, orphans: str) -> list[str]:
        done = self.run(host, f"python3 /run/plant.py check --orphans {orphans}")
        return [f"{host}: {line}" for line in (done.stdout + done.stderr).splitlines()] if done.returncode else []

    def _variables(self) -> dict:
        return {
            "reap_realm": REALM,
            "reap_presets": ["hyper", "obuilder"],
            "reap_cgroup_roots": ["{{ test_cgroup_parent }}/hyper"],
            "reap_containerd_namespaces": ["{{ test_containerd_namespace }}"],
            "reap_live_sources": [{"type": "file", "path": f"{self.state}/live.json"}],
            "reap_manifest_max_age": 3600,
            # A scenario is over in a minute; in it a VM that is a second old is no VM that boots.
            "reap_strike_interval": 1,
            "reap_min_age": 1,
            # Nothing waits for its end where a scenario is not about that.
            "reap_hold": 0,
            # Half of the VMs in a scenario are dead.
            "reap_max_percent": 60,
        }


class Sweep:
    """What came of one run of the playbook."""

    def __init__(self, done: subprocess.CompletedProcess, report: dict | None):
        self.code = done.returncode
        self.output = done.stdout + done.stderr
        self.report = report

    @property
    def changed(self) -> int:
        """How many hosts were changed, by the recap."""
        return sum("changed=0" not in line for line in self.output.splitlines() if " changed=" in line)

    def outcomes(self) -> list[dict]:
        """Return the outcomes on all hosts."""
        return [one for host in (self.report or {"hosts": {}})["hosts"].values() for one in host["outcomes"]]


def hosts_py(*arguments) -> list[str]:
    """Return a command line of hosts.py."""
    return [sys.executable, str(HERE / "hosts.py"), *map(str, arguments)]


def call(argv: list[str]) -> None:
    """Run a command whose output is for people."""
    done = subprocess.run(argv)
    if done.returncode:
        sys.exit(f"{' '.join(argv)}: exit code {done.returncode}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("plant", "list", "check"):
        one = commands.add_parser(name)
        one.add_argument("--state", type=Path, required=True)
    commands.choices["plant"].add_argument("--options", type=json.loads, default={})
    commands.choices["check"].add_argument("--orphans", choices=["there", "gone"], required=True)
    arguments = parser.parse_args()
    fleet = Fleet(arguments.state)
    if arguments.command == "plant":
        fleet.plant(arguments.options)
    elif arguments.command == "list":
        fleet.list_live()
    else:
        problems = fleet.check(arguments.orphans)
        print("\n".join(problems) or f"all {len(fleet.hosts())} hosts as they should be: orphans {arguments.orphans}")
        return bool(problems)
    return 0


if __name__ == "__main__":
    sys.exit(main())
