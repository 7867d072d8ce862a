# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Row 30: the reaper is killed at each step that it takes, and the next one comes to the same end.

Real jails, cgroups and containers, and thin volumes on a host with a kernel of its own; tests/hosts/stops.py says what
a step is.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import tarfile

import pytest
from hosts.fleet import ROOT, hosts_py

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.timeout(600),
    pytest.mark.skipif(os.geteuid() != 0, reason="test hosts need root"),
]


# A host with a kernel of its own starts programs slowly: REAPER_ALL_STEPS=1 has all steps of it tried.
EVERY = 1 if os.environ.get("REAPER_ALL_STEPS") else 3


def killed(fleet, host, case, kinds, every, place="stops", least=16):
    """Run stops.py on a host, and look that no step was left out."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for part in ("module_utils", "plugin_utils"):
            archive.add(ROOT / "plugins" / part, f"ansible_collections/microvm/reaper/plugins/{part}")
    argv = hosts_py("exec", "--state", fleet.state, host, "--", "mkdir -p /tmp/reaper; tar -C /tmp/reaper -xf -")
    subprocess.run(argv, input=buffer.getvalue(), check=True)
    script = (ROOT / "tests/hosts/stops.py").read_text()
    fleet.run(host, "cat > /run/stops.py", input=script, check=True)
    done = fleet.run(host, f"python3 /run/stops.py {case} {kinds} {every} {place} 2>&1", timeout=580)
    assert done.returncode == 0, done.stdout[-4000:]
    came_to = json.loads(done.stdout.splitlines()[-1])
    assert came_to["problems"] == []
    # Each step from the first on, until there is nobody left to be killed. How often a task that was paused has to be
    # told to go on before it dies is not the same each time.
    assert came_to["tried"] == list(range(1, came_to["tried"][-1] + 1, every))
    assert came_to["tried"][-1] > came_to["steps"]
    assert came_to["steps"] >= least


@pytest.mark.parametrize("case", ["remove", "aside", "finish", "undo"])
def test_jails_and_cgroups(pair, case):
    parent = pair.hosts()["one"]["test_cgroup_parent"]
    killed(pair, "one", case, "jail,cgroup", 1, f"{parent}/stops")


@pytest.mark.parametrize("case", ["remove", "aside", "finish", "undo"])
def test_thin_volumes(kernel, case):
    killed(kernel, "kern", case, "dm_thin", EVERY)


@pytest.mark.parametrize(("case", "least"), [("remove", 6), ("aside", 2), ("finish", 6), ("undo", 2)])
def test_containers(pair, case, least):
    namespace = pair.hosts()["one"]["test_containerd_namespace"]
    killed(pair, "one", case, "container,snapshot", 1, namespace, least)
