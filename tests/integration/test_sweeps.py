# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Sweeps by the real ansible-playbook over real hosts, while things fail, race and lie.

The rows are those of docs/scenarios.md. Every test plants anew, and at its end what is live is as it was.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from hosts.fleet import BIN, ROOT, Fleet, Sweep, write_list

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.timeout(120),
    pytest.mark.skipif(os.geteuid() != 0, reason="test hosts need root"),
]

FEW = {"live": 2, "orphans": 2, "containers": 0}
BUILDS = {"live": 1, "orphans": 2, "containers": 1}
# However slow or fast this machine is, every sweep is far enough from the last one; and half of all VMs here are dead.
QUICK = {"reap_min_age": 0, "reap_strike_interval": 0.1, "reap_max_percent": 100}
STATE = "/var/lib/microvm.reaper"


# --- what the tests say


def listed(fleet: Fleet, **changes) -> dict:
    """Write the list of live VMs anew, changed; return it. By a clock that is a little ahead: its age is then 0."""
    fleet.list_live(**{"generated_at": time.time() + 25, **changes})
    return json.loads((fleet.state / "live.json").read_text())


def write(fleet: Fleet, document: dict, part: int = 1) -> None:
    write_list(fleet.state / "live.json", document, part)


def sweep(fleet: Fleet, *arguments: str, times: int = 1, **variables) -> Sweep:
    """Sweep, also several times in a row; return the last one."""
    again = ["playbooks/reap.yml"] * (times - 1)
    return fleet.sweep(*arguments, "-e", json.dumps(dict(QUICK, **variables)), *again, timeout=100)


def struck(fleet: Fleet, options: dict) -> None:
    """Plant, and sweep once."""
    fleet.plant(options)
    listed(fleet)
    first = sweep(fleet)
    assert first.code == 0 and not first.outcomes(), first.output


def in_background(fleet: Fleet, report: Path, **variables) -> subprocess.Popen:
    """Start a sweep in a process group of its own."""
    argv = fleet.sweep_argv("-e", json.dumps(dict(QUICK, reap_report_path=str(report), **variables)))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(argv, cwd=ROOT, text=True, start_new_session=True, **pipes)


def ledgers(fleet: Fleet) -> dict:
    return {host: fleet.ledger(host) for host in fleet.hosts()}


def strikes(fleet: Fleet, host: str) -> set[int]:
    return {strike["strikes"] for strike in fleet.ledger(host)["strikes"].values()}


def reaped(report: dict) -> list[str]:
    """Return what was reaped, each as "host kind name"."""
    return sorted(
        f"{host} {one['kind']} {one['name']}"
        for host, said in report["hosts"].items()
        for one in said["outcomes"]
        if one["outcome"] == "reaped"
    )


def orphans(fleet: Fleet, host: str) -> list[str]:
    return fleet.planted()[host]["orphans"]


def on(fleet: Fleet, host: str, command: str, **how) -> str:
    done = fleet.run(host, command, **how)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@contextlib.contextmanager
def meanwhile(fleet: Fleet, host: str, do: str, undo: str) -> Iterator[None]:
    """Break something on a host for a while."""
    on(fleet, host, do)
    try:
        yield
    finally:
        on(fleet, host, undo)


def inventory(path: Path, **hosts: dict) -> list[str]:
    """Write a second inventory, of hosts or of more variables of them; return the arguments for it."""
    path.write_text(yaml.safe_dump({"reap_hosts": {"hosts": hosts}}))
    return ["-i", str(path)]


GHOST = {
    "ansible_ssh_common_args": "-F none -oProxyCommand=false",
    "test_cgroup_parent": "ghost",
    "test_containerd_namespace": "ghost",
}


# --- check mode


def plans(output: str) -> dict[str, dict]:
    """Return the plan of each host from the output of ansible-playbook -v."""
    found = {}
    for place in re.finditer(r"^ok: \[(\w+)\] => (?=\{)", output, re.MULTILINE):
        result = json.JSONDecoder().raw_decode(output, place.end())[0]
        if "__reap_plan" in result.get("ansible_facts", {}):
            found[place[1]] = result["ansible_facts"]["__reap_plan"]
    return found


def test_check_mode_shows_the_plan_of_the_real_run_and_changes_nothing_and_hostile_names_survive(pair: Fleet) -> None:
    """Row 36."""
    shown = {"ANSIBLE_CALLBACK_RESULT_FORMAT": "json", "ANSIBLE_DISPLAY_OK_HOSTS": "true"}
    struck(pair, dict(BUILDS, hostile=True))
    before = ledgers(pair)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in shown.items():
            patch.setenv(name, value)
        dry = sweep(pair, "--check", "--diff", "-v")
        assert dry.code == 0 and ledgers(pair) == before and pair.check("there") == []
        real = sweep(pair, "-v")
    planned = {host: plan["reap"] for host, plan in plans(dry.output).items()}
    assert set(planned) == {"one", "two"} and all(planned.values())
    assert {host: plan["reap"] for host, plan in plans(real.output).items()} == planned
    tokens = [(host, token["kind"], token["name"]) for host, plan in planned.items() for token in plan]
    assert {one["outcome"] for one in dry.outcomes()} == {"would_reap"}
    # A container's own snapshot may be gone before its turn: containerd drops what nothing refers to any more.
    assert {(one["kind"], one["outcome"]) for one in real.outcomes() if one["outcome"] != "reaped"} <= {
        ("snapshot", "already_gone")
    }
    assert real.code == 0 and set(reaped(real.report)) <= {" ".join(token) for token in tokens}
    diff = dry.output.replace("\\n", "\n")
    assert [token for token in tokens if f"-{token[1]} {token[2]}\n" not in diff] == []
    assert pair.check("gone") == []
    assert [c for c in dry.output + real.output if not (c.isprintable() or c == "\n")] == []


# --- lists that cannot be believed


def shrunk(document: dict) -> None:
    document["vms"] = [vm for vm in document["vms"] if not vm["vm_id"].startswith("more")]
    document["count"] = len(document["vms"])


UNBELIEVABLE = {
    "row 1, no VM at all": (lambda d: d.update(vms=[], count=0), ["blind", "reap_expect_empty=test"]),
    "row 2, truncated": (None, ["unreadable"]),
    "row 2, count is off": (lambda d: d.update(count=d["count"] + 1), ["incomplete", "'count'"]),
    "row 2, a page of several": (lambda d: d.update(complete=False), ["incomplete"]),
    "row 3, shrunk": (shrunk, ["shrunk", "reap_max_shrink_percent"]),
    "row 4, stale": (lambda d: d.update(generated_at=time.time() - 7200), ["stale", "reap_manifest_max_age"]),
    "row 4, an older one": (lambda d: d.update(epoch=1), ["epoch_went_back"]),
    "row 5, of another realm": (lambda d: d.update(realm="other"), ["other_realm", "'other'"]),
}


@pytest.fixture(scope="class")
def once_struck(pair: Fleet) -> Fleet:
    """Hosts that have seen their orphans once, and a list of 24 VMs."""
    pair.plant(FEW)
    write(pair, long_list(pair))
    assert sweep(pair).code == 0
    return pair


def long_list(fleet: Fleet) -> dict:
    document = listed(fleet)
    document["vms"] += [{"vm_id": f"more-{number}", "host": "one"} for number in range(20)]
    return dict(document, count=len(document["vms"]))


class TestAListThatCannotBeBelieved:
    @pytest.mark.parametrize(("change", "words"), UNBELIEVABLE.values(), ids=UNBELIEVABLE)
    def test_stops_the_sweep_and_leaves_every_strike_as_it_was(self, once_struck: Fleet, change, words) -> None:
        document, before = long_list(once_struck), ledgers(once_struck)
        if change:
            change(document)
        write(once_struck, document, part=1 if change else 2)
        done = sweep(once_struck)
        assert done.code == 2
        expected = ["STOPPED", "nothing was removed on any host", *words]
        assert [word for word in expected if word not in done.output] == []
        assert ledgers(once_struck) == before and strikes(once_struck, "one") == {1}
        assert once_struck.check("there") == []

    def test_without_one_of_the_hosts_it_is_refused_for_that_host(self, once_struck: Fleet) -> None:
        """Row 5: the list does not name the host. The others go on, and the strikes outlived all that was refused."""
        document, before = long_list(once_struck), once_struck.ledger("one")
        vms = [dict(vm, host="three") if vm["host"] == "one" else vm for vm in document["vms"]]
        write(once_struck, dict(document, hosts=["two", "three"], vms=vms))
        done = sweep(once_struck)
        assert done.code == 2 and "one: refused (host_unknown)" in done.output
        assert once_struck.ledger("one") == before
        assert len(once_struck.left("one")) == 5 and once_struck.left("two") == []
        write(once_struck, long_list(once_struck))
        assert sweep(once_struck).code == 0
        assert once_struck.check("gone") == []


def test_an_empty_list_is_fine_where_there_is_nothing_to_decide_about(pair: Fleet) -> None:
    """Row 1."""
    pair.plant(FEW)
    pair.clear()
    listed(pair, vms=[], count=0, tombstones=[])
    done = sweep(pair)
    assert done.code == 0 and "nothing to reap" in done.output
    assert ledgers(pair) == {"one": None, "two": None}  # a host without anything of VMs is not even written on


# --- identity of the hosts


def other_machine(fleet: Fleet, host: str) -> contextlib.AbstractContextManager:
    """Give a host the id of another machine for a while."""
    change = f"mv /etc/machine-id /run/machine-id; echo {'c' * 32} > /etc/machine-id"
    return meanwhile(fleet, host, change, "mv /run/machine-id /etc/machine-id")


def test_hosts_with_a_cloned_or_changed_machine_id_are_refused(pair: Fleet, kernel: Fleet) -> None:
    """Row 5."""
    sources = [{"type": "file", "path": f"{fleet.state}/live.json"} for fleet in (pair, kernel)]
    for fleet in (pair, kernel):
        fleet.plant(FEW)
        listed(fleet)
    with other_machine(pair, "one"), other_machine(pair, "two"):
        cloned = sweep(pair, "-i", f"{kernel.state}/inventory.yml", reap_live_sources=sources)
    assert cloned.code == 2 and "one and two have the same machine id" in cloned.output
    assert {host: one["refused"]["code"] for host, one in cloned.report["hosts"].items() if one["refused"]} == {
        "one": "cloned_machine_id",
        "two": "cloned_machine_id",
    }
    assert ledgers(pair) == {"one": None, "two": None} and strikes(kernel, "kern") == {1}
    assert sweep(pair).code == 0
    with other_machine(pair, "one"):
        changed = sweep(pair)
    assert changed.code == 2 and "one: refused (machine_id_changed)" in changed.output
    assert len(pair.left("one")) == 5 and pair.left("two") == []
    assert sweep(pair).code == 0
    assert pair.check("gone") == kernel.check("there") == []


# --- evidence


def test_only_what_is_surely_dead_goes(pair: Fleet, tmp_path: Path) -> None:
    """Rows 9, 10, 15, 16: what the list says of a VM, what runs, what systemd has, what the operator keeps."""
    pair.plant({"live": 2, "orphans": 7, "running_orphans": 2, "zombies": 0, "containers": 0})
    destroyed, running, migrating, strange, recent, kept, absent = orphans(pair, "one")
    in_use = orphans(pair, "two")[0]
    options = {host: planted["options"] for host, planted in pair.planted().items()}
    root = {host: f"{one['cgroup_mount']}/{one['cgroup_parent']}" for host, one in options.items()}
    on(pair, "one", f"mkdir {root['one']}/run-u1.scope")
    on(pair, "two", f"mkdir {root['two']}/{migrating} /srv/jailer/firecracker/{migrating}")
    scopes = {"rules": {"cgroup": [{"root": "x", "name": r"(?P<vm_id>run-[a-z0-9.]+)"}]}}
    variables = inventory(tmp_path / "more.yml", two={"reap_running": "never"})

    document = listed(pair)
    document["vms"] += [
        {"vm_id": migrating, "host": "two", "also_on": ["one"], "state": "migrating"},
        {"vm_id": strange, "host": "one", "state": "daydreaming"},
    ]
    document["tombstones"] = [one for one in document["tombstones"] if one["vm_id"] != running]
    document["tombstones"].append({"vm_id": recent, "destroyed_at": time.time() + 60})
    write(pair, dict(document, count=len(document["vms"])))
    done = sweep(pair, *variables, times=2, reap_keep=[kept], reap_presets=["hyper", scopes])
    assert done.code == 0, done.output
    families = {host: one["families"] for host, one in done.report["hosts"].items()}
    said = {vm_id: (one["verdict"], one["reasons"][0]["code"]) for vm_id, one in families["one"].items()}
    assert said == {
        destroyed: ("confirmed", "tombstoned"),
        absent: ("confirmed", "absent"),
        running: ("disputed", "running"),
        recent: ("held", "recently_destroyed"),
        kept: ("held", "pinned"),
        "run-u1.scope": ("confirmed", "absent"),
    }
    scope = families["one"]["run-u1.scope"]["resources"][0]
    assert scope["verdict"] == "held" and scope["holders"][0]["type"] == "systemd_unit"
    assert families["two"][in_use]["verdict"] == "disputed"
    left = [f"{kind} {vm_id}" for vm_id in (running, migrating, strange, recent, kept) for kind in ("cgroup", "jail")]
    assert sorted(pair.left("one")) == sorted(left)
    assert {name.split()[1] for name in pair.left("two")} == set(orphans(pair, "two")[:2])
    on(pair, "one", f"test -d {root['one']}/run-u1.scope")
    on(pair, "two", f"test -d {root['two']}/{migrating} -a -d /srv/jailer/firecracker/{migrating}")
    assert pair.check("any") == []


# --- sweeps that are cut short, and two at once

# Runs on the host: waits until a reaper has the lock and the path is gone; then stops the reaper and prints its pid.
STOPPER = r"""
import os, signal, sys, time
inode = os.stat("/var/lib/microvm.reaper/lock").st_ino
path, end, pid = sys.argv[1], time.monotonic() + 30, None
while pid is None or os.path.lexists(path):
    if time.monotonic() > end:
        sys.exit("no reaper came")
    rows = [line.split() for line in open("/proc/locks")] if pid is None else []
    pid = next((int(row[4]) for row in rows if row[1] == "FLOCK" and row[5].endswith(":%d" % inode)), pid)
os.kill(pid, signal.SIGSTOP)
print(pid)
"""


@pytest.mark.parametrize("end", ["KILL", "CONT"])
def test_a_sweep_that_is_cut_short_is_finished_by_the_next_one(pair: Fleet, tmp_path: Path, end: str) -> None:
    """Rows 29 and 30: ansible-playbook is killed, and the reaper on the host killed too, or left to go on alone."""
    struck(pair, {"live": 2, "orphans": 6, "zombies": 2, "containers": 1})
    everything = pair.left("one")
    jail = f"/srv/jailer/firecracker/{sorted(name for name in orphans(pair, 'one') if name[0] == 'v')[0]}"
    listed(pair)
    with ThreadPoolExecutor() as pool:
        stopper = pool.submit(on, pair, "one", f"python3 - {jail}", input=STOPPER)
        controller = in_background(pair, tmp_path / "cut.json")
        pid = int(stopper.result())
        os.killpg(controller.pid, signal.SIGKILL)
        controller.communicate()
    before, left = pair.ledger("one"), pair.left("one")
    assert before["intents"] and 0 < len(left) < len(everything)
    busy = sweep(pair)
    assert busy.code == 0 and "one: busy: another reaper works on this host" in busy.output
    assert pair.ledger("one") == before and pair.left("one") == left
    on(pair, "one", f"kill -{end} {pid}; flock -w 20 {STATE}/lock true")
    done = sweep(pair)
    assert done.code == 0 and pair.check("gone") == [], done.output
    assert bool(done.outcomes()) == (end == "KILL")
    assert pair.ledger("one")["intents"] == [] and pair.ledger("one")["strikes"] == {}


def test_of_two_sweeps_that_overlap_one_acts(pair: Fleet, tmp_path: Path) -> None:
    """Row 29: the plan of the slower one was made of what was; it changes nothing, and does not fail."""
    pair.plant(FEW)
    listed(pair)
    pipe = tmp_path / "live.json"
    os.mkfifo(pipe)
    slow = in_background(pair, tmp_path / "slow.json", reap_live_sources=[{"type": "file", "path": str(pipe)}])
    with pipe.open("w") as stream:  # opens as soon as the slow one has its facts and wants the list
        assert sweep(pair).code == 0
        before = ledgers(pair)
        stream.write((pair.state / "live.json").read_text())
    output = slow.communicate(timeout=100)[0]
    assert slow.returncode == 0 and output.count("busy: another reaper has written this host's ledger") > 0, output
    assert ledgers(pair) == before and strikes(pair, "one") == strikes(pair, "two") == {1}


def test_of_two_sweeps_at_the_same_time_one_acts(pair: Fleet, tmp_path: Path) -> None:
    """Row 29: everything is reaped once, and neither fails."""
    struck(pair, FEW)
    listed(pair)
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    both = [in_background(pair, path) for path in paths]
    outputs = [one.communicate(timeout=100)[0] for one in both]
    assert [one.returncode for one in both] == [0, 0], outputs
    names = [name for path in paths for name in reaped(json.loads(path.read_text()))]
    assert names and sorted(names) == sorted(set(names))
    assert pair.check("gone") == []


# --- parts of a host that fail


START_CONTAINERD = (
    "kill -CONT $(pidof containerd) || { setsid containerd > /var/log/containerd.log 2>&1 < /dev/null & }; "
    "until ctr version > /dev/null; do sleep 0.1; done"
)


@pytest.mark.parametrize("how", ["TERM", "STOP"])
def test_without_containerd_what_depends_on_it_waits(pair: Fleet, kernel: Fleet, how: str) -> None:
    """Row 27: not answering is not empty. TERM: on the host with thin volumes. STOP: it hangs, and has a deadline."""
    fleet, host = (kernel, "kern") if how == "TERM" else (pair, "one")
    struck(fleet, BUILDS)
    with meanwhile(fleet, host, f"kill -{how} $(pidof containerd)", START_CONTAINERD):
        without = sweep(fleet, "--limit", host, reap_deadline=6)
    assert "COULD NOT READ container (" in without.output
    left = {name.split()[0] for name in fleet.left(host)}
    assert left == ({"container", "snapshot", "volume"} if how == "TERM" else {"container", "snapshot"})
    assert {name.split()[1] for name in reaped(without.report)} >= {"cgroup", "jail"}
    listed(fleet)
    after = sweep(fleet)
    assert after.code == 0 and fleet.check("gone") == [], after.output


def test_a_ledger_that_is_corrupt_or_cannot_be_written(pair: Fleet) -> None:
    """Row 32: corrupt is kept aside and strikes start again; a host that cannot remember does not reap."""
    struck(pair, FEW)
    corrupt = on(pair, "one", f"cd {STATE}/test; head -c 40 ledger.json > x; mv x ledger.json; cat ledger.json")
    with meanwhile(pair, "two", f"mount --bind {STATE} {STATE}; mount -o remount,ro,bind {STATE}", f"umount {STATE}"):
        done = sweep(pair)
    assert done.code == 2 and f"two: cannot open the lock {STATE}/lock: Read-only file system" in done.output
    assert f"one: the ledger {STATE}/test/ledger.json is corrupt" in done.output
    assert on(pair, "one", f"cat {STATE}/test/ledger.json.corrupt") == corrupt
    assert strikes(pair, "one") == {1} and pair.check("there") == []
    full = f"mount -t tmpfs -o size=64k,mode=700 none {STATE}; cp -a /run/kept/. {STATE}; cat /dev/zero > {STATE}/full"
    fill = f"cp -a {STATE} /run/kept; {full} 2> /dev/null || true"
    with meanwhile(pair, "two", fill, f"umount {STATE}; rm -r /run/kept"):
        done = sweep(pair)
    assert done.code == 2 and "No space left on device; nothing was removed" in done.output
    assert pair.left("one") == [] and len(pair.left("two")) == 5
    assert sweep(pair).code == 0
    assert pair.check("gone") == []


def test_row_18_zombies_that_a_policy_leaves_are_told_by_their_parent(pair: Fleet) -> None:
    """Their parent runs outside of all VMs, and in no unit: the last policy is the one that sends it a signal."""
    struck(pair, {"live": 2, "orphans": 4, "zombies": 2, "containers": 0, "running_orphans": 0})
    for policy, note in (("report", "reap_zombies is report"), ("with_family", "is with_family")):
        listed(pair)
        done = sweep(pair, reap_zombies=policy)
        assert done.code == 0, done.output
        for host in ("one", "two"):
            (group,) = done.report["hosts"][host]["zombies"]
            assert (group["count"], len(group["vms"]), note in group["parent"]["note"]) == (2, 2, True)
            assert f"{host}: 2 zombies of 2 VMs, their parent {group['parent']['name']} does not reap" in done.output
    listed(pair)
    done = sweep(pair, reap_zombies="restart_unit", reap_zombies_restart_units=["*.service"])
    assert done.code == 0 and [done.report["hosts"][host]["zombies"] for host in ("one", "two")] == [[], []]
    assert pair.check("gone") == []


def test_one_item_that_fails_does_not_stop_the_others(pair: Fleet) -> None:
    """The host fails in the end, and says which item it was; the next sweep tries again."""
    pair.plant(FEW)
    jail = "/srv/frozen/firecracker/vfrozen"
    listed(pair)
    freeze = f"mkdir -p {jail}/root; mount --bind /srv/frozen /srv/frozen; mount -o remount,ro,bind /srv/frozen"
    with meanwhile(pair, "one", freeze, "umount /srv/frozen"):
        done = sweep(pair, times=2, reap_jail_bases=["/srv/jailer", "/srv/frozen"])
    assert done.code == 2 and re.search(r"^two .* failed=0", done.output, re.MULTILINE), done.output
    assert f"one: jail {jail} FAILED: " in done.output and "1 of 6 items failed" in done.output
    row = [line.split() for line in done.output.splitlines() if re.match(r"one +jail ", line)][-1]
    header = next(line.split() for line in done.output.splitlines() if line.startswith("HOST "))
    assert (row[header.index("REAPED")], row[header.index("FAILED")]) == ("2", "1")
    assert pair.check("gone") == []
    assert sweep(pair, reap_jail_bases=["/srv/jailer", "/srv/frozen"]).code == 0
    assert on(pair, "one", "ls /srv/frozen/firecracker; rm -r /srv/frozen") == ""


# --- parts of a fleet that fail


def test_the_hosts_that_answer_are_swept(pair: Fleet, tmp_path: Path) -> None:
    """Row 33: and the exit code tells of the one that did not, the first by its name."""
    ghost = inventory(tmp_path / "ghost.yml", a_ghost=GHOST)
    pair.plant(FEW)
    listed(pair)
    assert sweep(pair, *ghost).code == 4
    capped = sweep(pair, *ghost, reap_max_per_fleet=3)
    assert capped.code != 0 and capped.report["stopped"]["code"] == "fleet_cap", capped.output
    done = sweep(pair, *ghost)
    assert done.code == 4 and done.report["manifest"]["count"] == 4, done.output
    assert pair.check("gone") == []


def test_a_cap_that_is_tripped_on_one_host_or_by_all_stops_all(pair: Fleet, tmp_path: Path) -> None:
    """Row 34: before the first removal anywhere, and no sweep takes the first few."""
    struck(pair, FEW)
    before = ledgers(pair)
    on_two = sweep(pair, *inventory(tmp_path / "more.yml", two={"reap_max_per_host": 1}))
    assert "(host_cap): two: 2 VMs would be reaped on this host, more than reap_max_per_host=1" in on_two.output
    by_all = sweep(pair, reap_max_per_fleet=3)
    assert "(fleet_cap): 4 VMs would be reaped in this run, more than reap_max_per_fleet=3" in by_all.output
    for done in (on_two, by_all):
        assert done.code == 2 and not done.outcomes()
    assert ledgers(pair) == before and pair.check("there") == []
    assert sweep(pair).code == 0
    assert pair.check("gone") == []


GOOD = {"reap_realm": "test", "reap_presets": ["hyper"], "reap_live_sources": [{"type": "file", "path": "live.json"}]}
BAD = {
    "unknown": ({"reap_foo": 1, "reap_strikse": 3}, ["reap_foo", "reap_strikse"]),
    "wrong type": ({"reap_percent_floor": "many", "reap_keep": {"a": 1}}, ["reap_percent_floor", "'many'"]),
    "no number": ({"reap_strikes": "many"}, ["reap_strikes must be a number, at least 2, not 'many'"]),
    "no grade": ({"reap_hold": {"unproven": 5}}, ["reap_hold has a value for 'unproven', which is none of"]),
    "no such choice": ({"reap_running": "maybe"}, ["reap_running", "maybe"]),
    "too few": ({"reap_strikes": 1}, ["reap_strikes must be a number, at least 2"]),
    "too many": ({"reap_max_percent_per_host": 150}, ["reap_max_percent_per_host"]),
    "no unit": ({"reap_zombies": "restart_unit"}, ["reap_zombies_restart_units names no unit that may be restarted"]),
    "no such preset": ({"reap_presets": ["hyperion"]}, ["hyperion", "reap_presets"]),
    "no such source": ({"reap_live_sources": [{"type": "oracle"}]}, ["reap_live_sources[0]", "oracle"]),
    "no realm": ({"reap_realm": None}, ["reap_realm"]),
}


@pytest.mark.parametrize(("variables", "words"), BAD.values(), ids=BAD)
def test_bad_variables_are_named_before_any_host_is_touched(tmp_path: Path, variables: dict, words: list[str]) -> None:
    given = {name: value for name, value in dict(GOOD, **variables).items() if value is not None}
    argv = [BIN / "ansible-playbook", *inventory(tmp_path / "ghost.yml", ghost=GHOST), "playbooks/reap.yml"]
    done = subprocess.run([*argv, "-e", json.dumps(given)], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "unreachable=0" in done.stdout, "the host that is not there was not asked"
    assert [word for word in words if word not in done.stdout] == []


# --- the modules, the report, the artifact, other Pythons


FACTS = {
    "cgroup_facts": {"rules": [{"root": "{{ test_cgroup_parent }}/hyper", "name": "(?P<vm_id>v[a-z2-7]+)"}]},
    "jail_facts": {"rules": [{"base": "/srv/jailer", "name": "(?P<vm_id>v[a-z2-7]+)"}]},
    "zombie_facts": {"rules": [{"command": "firecracker", "cgroup_name": "(?P<vm_id>v[a-z2-7]+)"}]},
    "containerd_facts": {
        "containers": [{"namespace": "{{ test_containerd_namespace }}", "name": "(?P<vm_id>obuilder-run-[0-9]+)"}],
        "snapshots": [{"namespace": "{{ test_containerd_namespace }}", "name": "(?P<vm_id>obuilder-run-[0-9]+)"}],
    },
    "dm_thin_facts": {"rules": [{"name": "hyper-rw-(?P<vm_id>v[a-z2-7]+)"}]},
}


@pytest.fixture(scope="class")
def planted_kernel(kernel: Fleet) -> Fleet:
    kernel.plant(BUILDS)
    return kernel


class TestFactModules:
    @pytest.mark.parametrize("module", FACTS)
    def test_return_what_they_document_in_check_mode_too(self, planted_kernel: Fleet, module: str) -> None:
        documented = re.search(r'RETURN = r"""(.*?)"""', (ROOT / f"plugins/modules/{module}.py").read_text(), re.DOTALL)
        contains = yaml.safe_load(documented[1])["ansible_facts"]["contains"]
        argv = [BIN / "ansible", "kern", "-i", planted_kernel.state / "inventory.yml", "-m", f"microvm.reaper.{module}"]
        env = dict(os.environ, ANSIBLE_CALLBACK_RESULT_FORMAT="json", ANSIBLE_CONFIG=str(ROOT / "ansible.cfg"))
        argv += ["-a", json.dumps(FACTS[module]), "--check"]
        done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, env=env, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
        result = json.loads(done.stdout.partition("=> ")[2])
        assert result["changed"] is False and set(result["ansible_facts"]) == set(contains)
        for facts in result["ansible_facts"].values():
            assert facts["status"] == "ok" and set(facts) == set(next(iter(contains.values()))["contains"])
            assert facts["resources"] and set(facts["resources"][0]) == {
                "kind", "name", "vm_id", "identity", "in_use", "holders", "age_seconds", "bytes", "parent", "details"
            }


def test_the_report_of_a_run_in_batches_has_all_hosts(pair: Fleet, tmp_path: Path) -> None:
    """In a playbook of one's own, with serial: 1."""
    struck(pair, FEW)
    (tmp_path / "own.yml").write_text(
        "- hosts: reap_hosts\n  gather_facts: false\n  serial: 1\n  roles:\n    - microvm.reaper.reap\n"
    )
    argv = pair.sweep_argv("-e", json.dumps(QUICK))
    argv[argv.index("playbooks/reap.yml")] = str(tmp_path / "own.yml")
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((pair.state / "report.json").read_text())
    assert set(report["hosts"]) == set(report["kinds"]) == {"one", "two"}
    for host, one in report["hosts"].items():
        assert set(one["families"]) == set(orphans(pair, host)) == {each["vm_id"] for each in one["outcomes"]}
        assert report["kinds"][host]["jail"]["reaped"] == 2
    assert pair.check("gone") == []


def test_the_built_artifact_works_outside_the_checkout(pair: Fleet, tmp_path: Path) -> None:
    galaxy = [str(BIN / "ansible-galaxy"), "collection"]
    (tmp_path / "ansible.cfg").touch()
    places = {"ANSIBLE_COLLECTIONS_PATH": str(tmp_path / "there"), "ANSIBLE_CONFIG": str(tmp_path / "ansible.cfg")}
    env = dict(os.environ, **places)
    subprocess.run([*galaxy, "build", "--output-path", tmp_path], cwd=ROOT, check=True, capture_output=True)
    (artifact,) = glob.glob(f"{tmp_path}/microvm-reaper-*.tar.gz")
    argv = [*galaxy, "install", "--offline", "-p", tmp_path / "there", artifact]
    subprocess.run(argv, cwd=tmp_path, env=env, check=True, capture_output=True)
    pair.plant(FEW)
    listed(pair)
    argv = [BIN / "ansible-playbook", *["microvm.reaper.reap"] * 2, "-i", pair.state / "inventory.yml"]
    argv += ["-e", json.dumps(QUICK)]
    done = subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    assert pair.check("gone") == []


def test_a_fresh_checkout_sweeps_its_own_machine() -> None:
    """The inventory that comes with it. In namespaces: other tests' zombies are not seen, no ledger stays."""
    script = f"mount -t tmpfs none /var/lib && exec {BIN}/ansible-playbook playbooks/reap.yml"
    argv = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "sh", "-c", script]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and "nothing to reap" in done.stdout, done.stdout + done.stderr


def test_a_target_with_python_3_8(tmp_path: Path) -> None:
    """Row 40: the oldest Python that hosts may have, on this machine."""
    found = [*glob.glob(str(Path("~/.pyenv/versions/3.8.*/bin/python").expanduser())), shutil.which("python3.8")]
    python = next((path for path in found if path), None)
    if python is None:
        pytest.skip("there is no Python 3.8 here")
    for vm_id in ("valive", "vdead"):
        (tmp_path / "jails/firecracker" / vm_id / "root").mkdir(parents=True)
    document = {"realm": "old", "generated_at": time.time() + 25, "complete": True}
    document["vms"] = [{"vm_id": "valive", "host": "here"}]
    write_list(tmp_path / "live.json", document)
    variables = {
        **QUICK,
        "ansible_connection": "local",
        "ansible_python_interpreter": python,
        "reap_realm": "old",
        "reap_presets": ["hyper"],
        "reap_kinds": ["jail", "cgroup"],
        "reap_cgroup_roots": [f"no-such-cgroup-{os.getpid()}"],
        "reap_jail_bases": [str(tmp_path / "jails")],
        "reap_state_dir": str(tmp_path / "state"),
        "reap_live_sources": [{"type": "file", "path": str(tmp_path / "live.json")}],
    }
    argv = [BIN / "ansible-playbook", *inventory(tmp_path / "here.yml", here=variables), *["playbooks/reap.yml"] * 2]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(os.listdir(tmp_path / "jails/firecracker")) == [".microvm.reaper", "valive"]
    done = subprocess.run([*argv[:-1], "-e", "reap_hold=0"], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    assert os.listdir(tmp_path / "jails/firecracker") == ["valive"]
