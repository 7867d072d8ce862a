# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""playbooks/explain.yml after real sweeps over real hosts."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time

import pytest
from hosts.fleet import BIN, ROOT, Fleet

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.timeout(180),
    pytest.mark.skipif(os.geteuid() != 0, reason="test hosts need root"),
]

FEW = {"live": 2, "orphans": 3, "containers": 0, "running_orphans": 0, "zombies": 0}
QUICK = {"reap_min_age": 0, "reap_strike_interval": 0.1}
JOURNAL = "/var/lib/microvm.reaper/test/journal.jsonl"


@pytest.fixture(scope="module")
def swept(pair: Fleet) -> Fleet:
    """Two hosts after two sweeps, of which one VM of the host `one` was kept out."""
    pair.plant(FEW)
    for _turn in range(2):
        time.sleep(0.3)
        pair.list_live(generated_at=time.time() + 25)
        done = pair.sweep("-e", json.dumps(dict(QUICK, reap_keep=[dead(pair, "one")[0]])), timeout=120)
        assert done.code == 0, done.output
    return pair


def dead(fleet: Fleet, host: str) -> list[str]:
    return fleet.planted()[host]["orphans"]


def explain(fleet: Fleet, *arguments: str, **variables) -> dict[str, list[str]]:
    """Run the playbook; return what is printed under each heading, and prove that nothing was changed."""
    before = {host: remembered(fleet, host) for host in fleet.hosts()}
    argv = [BIN / "ansible-playbook", "-i", fleet.state / "inventory.yml", "playbooks/explain.yml", *arguments]
    argv += ["-e", json.dumps(dict(QUICK, **variables))]
    done = subprocess.run(argv, cwd=ROOT, text=True, capture_output=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    recap = [line for line in done.stdout.splitlines() if " changed=" in line]
    assert len(recap) == 2 and all("changed=0 " in line for line in recap), done.stdout
    assert {host: remembered(fleet, host) for host in fleet.hosts()} == before
    return paragraphs(done.stdout)


def remembered(fleet: Fleet, host: str) -> str:
    """Return all that a host has in its state directory."""
    look = "cd /var/lib/microvm.reaper; ls -lR --time-style=full-iso; find test -type f -exec sha256sum {} +"
    return fleet.run(host, look, check=True).stdout


def paragraphs(output: str) -> dict[str, list[str]]:
    lines = output[output.index("microvm.reaper: why"):].split("\n\n")[0].splitlines()[1:]
    found: dict[str, list[str]] = {}
    for line in lines:
        if line.startswith("  "):
            found[list(found)[-1]].append(line.strip())
        else:
            found[line] = []
    return found


def has(sentences: list[str], *words: str) -> bool:
    """Tell whether one sentence has all these words."""
    return any(all(word in sentence for word in words) for sentence in sentences)


def test_a_live_vm(swept: Fleet) -> None:
    vm_id = swept.planted()["one"]["live"][0]
    said = explain(swept, "-e", f"vm_id={vm_id}")
    assert list(said) == ["one: live", "two: nothing known of it"] and said["two: nothing known of it"] == []
    assert has(said["one: live"], "file", "live.json", f"says that the VM {vm_id} lives here")
    assert has(said["one: live"], "cgroup", vm_id, "in use")


def test_a_reaped_vm_and_one_of_its_things(swept: Fleet) -> None:
    vm_id = dead(swept, "two")[1]
    said = explain(swept, "-e", f"vm_id={vm_id}")
    assert list(said) == ["two: gone", "one: nothing known of it"]
    jail = f"jail /srv/jailer/firecracker/{vm_id}"
    assert has(said["two: gone"], "something of the VM was removed at 20")
    why = r"because the live source (says that the VM was destroyed|does not list the VM) \(2 strikes, the list of "
    journal = [one for one in said["two: gone"] if jail in one]
    assert len(journal) == 1 and re.match(rf"Journal, 20\S+Z, sweep \w{{16}}: {jail} was reaped.*, {why}", journal[0])
    by_name = explain(swept, "-e", f"resource=/srv/jailer/firecracker/{vm_id}", "--check")
    assert has(by_name["two: gone"], jail, "was reaped") and not has(by_name["two: gone"], ": cgroup ")


def test_a_vm_that_is_kept(swept: Fleet) -> None:
    vm_id = dead(swept, "one")[0]
    held = explain(swept, "-e", f"vm_id={vm_id}", reap_keep=[vm_id])["one: held"]
    assert has(held, "reap_keep names it") and has(held, "Waiting changes nothing")
    assert has(held, f"jail /srv/jailer/firecracker/{vm_id}")
    assert has(explain(swept, "-e", f"vm_id={vm_id}")["one: suspected"], "0 of the 2 strikes", "reap_strikes")


def test_what_nobody_knows(swept: Fleet) -> None:
    said = explain(swept, "-e", "vm_id=vnobody")
    assert list(said) == ["one and two: nothing known of it"]
    (sentences,) = said.values()
    assert has(sentences, "This host knows nothing of vnobody") and has(sentences, "Looked at: cgroup")
    assert has(sentences, "Not on this host: dm_thin (")


def test_a_host_that_is_refused_says_which_variable_a_person_answers_with(swept: Fleet) -> None:
    swept.list_live(vms=[], count=0)
    try:
        said = explain(swept, "-e", f"vm_id={dead(swept, 'one')[0]}")
    finally:
        swept.list_live()
    assert has(said["one: refused"], "Refused (blind)", "reap_expect_empty=test")
    assert next(iter(said)).startswith("NO SWEEP of these hosts removes anything (blind): one: ")


@pytest.mark.parametrize("arguments", [[], ["-e", "vm_id=a", "-e", "resource=b"], ["-e", "vm_id="]])
def test_it_wants_to_know_what(swept: Fleet, arguments: list[str]) -> None:
    argv = [BIN / "ansible-playbook", "-i", swept.state / "inventory.yml", "playbooks/explain.yml", *arguments]
    done = subprocess.run(argv, cwd=ROOT, text=True, capture_output=True, timeout=60)
    assert done.returncode == 2 and "either -e vm_id=ID or -e resource=NAME" in done.stdout + done.stderr


def test_a_journal_that_cannot_be_read_is_a_failure_with_words(swept: Fleet) -> None:
    swept.run("one", f"mv {JOURNAL} /run/kept; mkdir {JOURNAL}", check=True)
    argv = [BIN / "ansible-playbook", "-i", swept.state / "inventory.yml", "playbooks/explain.yml", "-e", "vm_id=a"]
    try:
        done = subprocess.run(argv, cwd=ROOT, text=True, capture_output=True, timeout=100)
    finally:
        swept.run("one", f"rmdir {JOURNAL}; mv /run/kept {JOURNAL}", check=True)
    assert done.returncode == 2 and f"{JOURNAL} is in the way: it must be a file" in done.stdout + done.stderr
    assert "one: could not be asked" in done.stdout and "two: nothing known of it" in done.stdout
