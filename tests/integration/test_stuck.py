# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What cannot be done, on a host with a kernel of its own: a process that no signal ends, a right that is missing."""

from __future__ import annotations

import json
import os
import time

import pytest
from hosts.fleet import Fleet

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.timeout(180),
    pytest.mark.skipif(os.geteuid() != 0, reason="test hosts need root"),
]

# A read from a suspended device waits in the kernel, where SIGKILL does not reach it.
STICK = """
set -e
dmsetup create stuck --table '0 2048 zero'
dmsetup mknodes stuck
dmsetup suspend stuck
setsid sh -c 'echo 0 > {cgroup}/cgroup.procs; exec dd if=/dev/mapper/stuck of=/dev/null iflag=direct' >/dev/null 2>&1 &
for turn in $(seq 100); do
    for pid in $(cat {cgroup}/cgroup.procs); do grep -q ') D ' /proc/$pid/stat && exit 0; done
    sleep 0.1
done
exit 1
"""


def test_row_17_what_does_not_die_is_reported_and_not_waited_for(kernel: Fleet) -> None:
    kernel.plant({"live": 2, "orphans": 3, "containers": 0, "running_orphans": 1, "zombies": 0})
    variables = kernel.hosts()["kern"]
    victim = kernel.planted()["kern"]["tombstones"][0]
    cgroup = f"{variables['test_cgroup_mount']}/{variables['test_cgroup_parent']}/hyper/{victim}"
    stuck = kernel.run("kern", "bash -c \"$(cat)\"", input=STICK.format(cgroup=cgroup))
    assert stuck.returncode == 0, stuck.stdout + stuck.stderr
    try:
        sweep(kernel)
        begin = time.monotonic()
        second = sweep(kernel)
        assert time.monotonic() - begin < 60
        outcomes = {(one["kind"], one["vm_id"]): one for one in second.outcomes()}
        left = outcomes["cgroup", victim]
        assert left["outcome"] == "deferred" and "SIGKILL" in left["message"], left
        assert any("unkillable" in holder["name"] for holder in left["holders"]), left
        assert sum(one["outcome"] == "reaped" for one in outcomes.values()) >= 6, outcomes
        assert second.code == 0 and "unkillable" in second.output, second.output
    finally:
        kernel.run("kern", "dmsetup resume stuck; sleep 1; dmsetup remove stuck", check=True)
    sweep(kernel)
    assert kernel.check("gone") == []


def sweep(fleet: Fleet):
    """Sweep with a list of this moment; wait until the next one counts."""
    time.sleep(0.5)
    fleet.list_live(generated_at=time.time() + 25)
    return fleet.sweep("-e", json.dumps({"reap_min_age": 0, "reap_strike_interval": 0.1}), timeout=120)


def test_row_40_without_the_right_to_it_nothing_is_done_and_the_right_is_named(kernel: Fleet) -> None:
    kernel.plant({"live": 1, "orphans": 1, "containers": 0, "running_orphans": 0, "zombies": 0})
    kernel.run("kern", "chmod 755 /run && id reader || useradd reader", check=True)
    kernel.list_live()
    done = kernel.sweep("-b", "--become-user=reader", "--become-method=su", timeout=120)
    assert done.code != 0 and not done.outcomes(), done.output
    assert "Permission denied" in done.output and "/var/lib/microvm.reaper" in done.output, done.output
    assert kernel.check("there") == []
