# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The execution environment, as far as it is made without an image: its context, and what is installed out of it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hosts.fleet import BIN, ROOT


def call(*command: str | Path, cwd: Path = ROOT, **environment: str) -> str:
    how = {"env": {**os.environ, **environment}, "capture_output": True, "text": True}
    done = subprocess.run(command, cwd=cwd, check=False, **how)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("environment")
    call(BIN / "ansible-builder", "create", "--file=execution-environment.yml", f"--context={place}")
    return place


def test_it_has_an_ansible_core_that_awx_works_with(context: Path) -> None:
    said = (context / "Containerfile").read_text()
    assert "ansible-core>=2.16,<2.19" in said and 'PYCMD="/usr/bin/python3.11"' in said
    promised = yaml.safe_load((ROOT / "meta/runtime.yml").read_text())["requires_ansible"]
    assert promised == ">=2.16.0"


def test_the_collection_of_the_checkout_is_installed_and_says_what_it_needs(context: Path, tmp_path: Path) -> None:
    # As the galaxy stage of the build does, in its working directory.
    build, collections = context / "_build", tmp_path / "collections"
    settings = tmp_path / "ansible.cfg"
    settings.write_text("[galaxy]\ndisable_gpg_verify = true\n")
    install = [BIN / "ansible-galaxy", "collection", "install", "-r", "requirements.yml"]
    call(*install, f"--collections-path={collections}", cwd=build, ANSIBLE_CONFIG=str(settings))
    installed = collections / "ansible_collections/microvm/reaper"
    for directory in ("awx", "meta", "playbooks", "plugins", "roles"):
        here = {path.relative_to(ROOT) for path in (ROOT / directory).rglob("*") if path.is_file()}
        there = {path.relative_to(installed) for path in (installed / directory).rglob("*") if path.is_file()}
        assert there == {path for path in here if path.suffix != ".pyc"}
    listed = call(BIN / "ansible-doc", "--list", "microvm.reaper", ANSIBLE_COLLECTIONS_PATH=str(collections),
                  ANSIBLE_CONFIG=str(settings))
    assert "microvm.reaper.reap " in listed

    needed = yaml.safe_load(call(sys.executable, "-m", "ansible_builder", "introspect", collections))
    here = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line[:1].isalpha()]
    assert names(needed["python"]) == names(here) - {"ansible-core"}
    assert {"openssh-clients", "openssh-client"} <= names(needed["system"])


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[^\w-]", line)[0] for line in requirements}
