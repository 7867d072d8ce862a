# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The ladder by the real playbooks on real hosts: set aside, brought back exactly as it was, removed after the hold."""

from __future__ import annotations

import json
import os
import subprocess
import time

import pytest
from hosts.fleet import BIN, ROOT, Fleet

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.timeout(180),
    pytest.mark.skipif(os.geteuid() != 0, reason="test hosts need root"),
]

VMS = {"live": 3, "orphans": 3, "containers": 1, "running_orphans": 1, "zombies": 0}
QUICK = {"reap_min_age": 0, "reap_strike_interval": 0.1, "reap_max_percent": 100, "reap_pressure": 100}
LADDER = {"jail": 3600, "dm_thin": 3600, "snapshot": 3600}
KEEP = "/var/lib/microvm.reaper/keep"
# All that there is of volumes and jails of a host, and of who may open what, by the host's own tools.
LOOK = r"""
for name in $(dmsetup ls --target thin 2>/dev/null | cut -f1 | sort); do
    echo "$name: $(dmsetup table "$name"); $(dmsetup info -c --noheadings -o uuid,readonly,open "$name")"
    stat -Lc '%n %a %U %G' /dev/mapper/$name
    md5sum < /dev/mapper/$name
done
cd /srv/jailer && find . -path '*/.microvm.reaper' -prune -o -printf '%p %y %m %U %G %s %n %i %l %T@\n' |
    grep -v '^\. \|^./[^/]* ' | sort
"""


def sweep(fleet: Fleet, *arguments, hold=LADDER, **variables):
    # A list of the future is of age 0 for a while.
    fleet.list_live(generated_at=time.time() + 25)
    extra = json.dumps(dict(QUICK, reap_hold=hold, **variables))
    return fleet.sweep(*arguments, "-e", extra, timeout=100)


def undo(fleet: Fleet, *arguments) -> subprocess.CompletedProcess:
    argv = [str(BIN / "ansible-playbook"), "-i", f"{fleet.state}/inventory.yml", *arguments, "playbooks/undo.yml"]
    return subprocess.run(argv, cwd=ROOT, text=True, capture_output=True, timeout=100, check=False)


def look(fleet: Fleet, host: str) -> list[str]:
    return fleet.run(host, LOOK, check=True).stdout.splitlines()


def results(swept) -> dict[str, set[str]]:
    """Return ``{kind: {outcome}}``."""
    found: dict[str, set[str]] = {}
    for one in swept.outcomes():
        found.setdefault(one["kind"], set()).add(one["outcome"])
    return found


def test_set_aside_brought_back_and_removed_after_the_hold(kernel):
    kernel.plant(VMS)
    before = look(kernel, "kern")
    assert any("thin" in line for line in before)
    sweep(kernel)
    # Its check mode says the same and does nothing.
    dry = sweep(kernel, "--check")
    assert results(dry)["jail"] == results(dry)["dm_thin"] == {"would_set_aside"} and look(kernel, "kern") == before
    aside = sweep(kernel)
    assert aside.code == 0, aside.output
    assert results(aside) == {"jail": {"set_aside"}, "dm_thin": {"set_aside"}, "cgroup": {"reaped"}}, aside.output
    there = look(kernel, "kern")
    assert there != before and kernel.check("any") == []
    ledger = kernel.ledger("kern")
    names = sorted((held["kind"], held["name"]) for held in ledger["aside"] if held["state"] == "aside")
    assert {kind for kind, _name in names} == {"jail", "dm_thin"} and len(names) == 6
    assert f"undo.yml -e sweep={aside.report['sweep']}" in aside.output

    # One more sweep has nothing to do.
    again = sweep(kernel)
    assert (again.code, again.outcomes()) == (0, []), again.output
    assert again.report["kinds"]["kern"]["jail"]["aside"] == 3, again.output

    # One VM comes back, then all that the sweep set aside.
    vm_id = next(held["vm_id"] for held in ledger["aside"] if held["kind"] == "jail")
    one = undo(kernel, "-e", f"vm_id={vm_id}")
    assert one.returncode == 0 and "kern: 2 of 2 back, pinned until 20" in one.stdout, one.stdout + one.stderr
    rest = undo(kernel, "-e", f"sweep={aside.report['sweep']}")
    assert rest.returncode == 0, rest.stdout + rest.stderr
    assert look(kernel, "kern") == before
    assert kernel.ledger("kern")["aside"] == [held for held in ledger["aside"] if held["state"] == "waiting"]
    nothing = undo(kernel, "-e", f"vm_id={vm_id}")
    assert nothing.returncode == 0 and "changed=0" in nothing.stdout
    assert "kern: nothing of it is aside on this host" in nothing.stdout

    # What came back is pinned: no sweep touches it.
    for _time in range(3):
        held = sweep(kernel)
        assert not [one for one in held.outcomes() if one["kind"] in ("jail", "dm_thin")], held.output
    assert look(kernel, "kern") == before

    # Without the pin it goes: aside again, and for good when the hold is over.
    kernel.run("kern", f"rm {KEEP}", check=True)
    sweep(kernel, hold=1)
    sweep(kernel, hold=1)
    time.sleep(1.1)
    last = sweep(kernel, hold=1)
    time.sleep(1.1)
    last = sweep(kernel, hold=1)
    assert last.code == 0, last.output
    assert kernel.check("gone") == [] and kernel.ledger("kern")["aside"] == []
    assert kernel.run("kern", "find /srv/jailer -name .microvm.reaper").stdout == ""


def test_undo_says_what_it_cannot_bring_back(kernel):
    kernel.plant(dict(VMS, live=1, orphans=1, containers=0, running_orphans=0))
    sweep(kernel)
    assert results(sweep(kernel))["dm_thin"] == {"set_aside"}
    (volume,) = [held for held in kernel.ledger("kern")["aside"] if held["kind"] == "dm_thin"]
    taken = "dmsetup create %s --table '0 8 zero'" % volume["name"]
    kernel.run("kern", "DM_DISABLE_UDEV=1 " + taken, check=True)
    try:
        done = undo(kernel, "-e", f"vm_id={volume['vm_id']}")
        assert done.returncode == 2 and "kern: 1 of 2 back" in done.stdout, done.stdout
        assert "was NOT brought back (deferred): another device has its name now" in done.stdout
        (left,) = kernel.ledger("kern")["aside"]
        assert left == volume
    finally:
        kernel.run("kern", "DM_DISABLE_UDEV=1 dmsetup remove %s" % volume["name"], check=True)
    assert undo(kernel, "-e", f"vm_id={volume['vm_id']}").returncode == 0
    assert kernel.ledger("kern")["aside"] == []


def test_undo_wants_to_know_what(kernel):
    done = undo(kernel)
    assert done.returncode == 2 and "say what to bring back" in done.stdout


def test_pressure_takes_the_older_half_at_once(kernel):
    kernel.plant(dict(VMS, live=1, orphans=4, containers=0, running_orphans=0))
    sweep(kernel)
    assert results(sweep(kernel))["dm_thin"] == {"set_aside"}
    pressed = sweep(kernel, reap_pressure=0)
    gone = [one["kind"] for one in pressed.outcomes() if one["outcome"] == "reaped"]
    assert sorted(gone) == ["dm_thin", "dm_thin", "jail", "jail"], pressed.output
    assert "of 4 that are aside there, the older half does not wait" in pressed.output
    assert kernel.check("any") == []


def test_what_runs_is_frozen_and_thawed_where_it_has_to_wait(pair):
    pair.plant(dict(VMS, containers=1, running_orphans=1))
    hold = {"cgroup": 3600, "container": 3600, "jail": 3600, "snapshot": 3600}
    sweep(pair, hold=hold)
    aside = sweep(pair, hold=hold)
    assert aside.code == 0, aside.output
    frozen = {
        host: [held for held in pair.ledger(host)["aside"] if held["kind"] in ("cgroup", "container") and
               held["state"] == "aside"]
        for host in pair.hosts()
    }
    assert all(frozen.values()), aside.output
    cgroups = [held["name"] for held in frozen["one"] if held["kind"] == "cgroup"]
    look_at = "cat %s/cgroup.events %s/cgroup.procs" % (cgroups[0], cgroups[0])
    said = pair.run("one", look_at, check=True).stdout
    assert "frozen 1" in said and "populated 1" in said
    pids = said.split()[4:]
    assert sweep(pair, hold=hold).outcomes() == [] and pair.check("any") == []
    assert undo(pair, "-e", f"sweep={aside.report['sweep']}").returncode == 0
    said = pair.run("one", look_at, check=True).stdout
    assert "frozen 0" in said and said.split()[4:] == pids
    assert pair.check("there") == []
