# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Evidence of real sweeps over real hosts: it is there, it is bounded, and it stops nothing."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from hosts.fleet import REALM, Fleet, Sweep

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.timeout(180),
    pytest.mark.skipif(os.geteuid() != 0, reason="test hosts need root"),
]

BUILDS = {"live": 1, "orphans": 2, "containers": 1}
FEW = {"live": 2, "orphans": 2, "containers": 0, "running_orphans": 0, "zombies": 0}
QUICK = {"reap_min_age": 0, "reap_strike_interval": 0.1, "reap_max_percent": 100}
STATE = "/var/lib/microvm.reaper"
STORE = f"{STATE}/{REALM}/evidence"
# What a tenant may leave where logs are expected.
HOSTILE_LOGS = r"""
set -e
for jail in /srv/jailer/firecracker/vo*; do
    logs=$jail/root/logs
    mkdir -p $logs
    echo "last words of $(basename $jail)" > $logs/vmm.log
    ln -s /etc/shadow $logs/shadow
    ln -s / $logs/root
    mkfifo $logs/fifo
    mknod $logs/mem c 1 1
    truncate -s 1T $logs/huge
    (while echo more >> $logs/growing; do sleep 0.01; done) > /dev/null 2>&1 < /dev/null &
    echo $! >> /run/growers
done
"""
# Prints {vm_id: {file name: text}} of all bundles of a host.
UNPACK = """
import glob, json, os, stat, tarfile
found = {}
for path in sorted(glob.glob("%s/*.tar.gz")):
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    with tarfile.open(path) as archive:
        texts = {one.name: archive.extractfile(one).read().decode("utf-8", "replace") for one in archive}
    assert next(iter(texts)) == "metadata.json"
    found[json.loads(texts["metadata.json"])["vm_id"]] = texts
assert stat.S_IMODE(os.stat("%s").st_mode) == 0o700
print(json.dumps(found))
""" % (STORE, STORE)


def sweep(fleet: Fleet, *arguments: str, **variables: object) -> Sweep:
    fleet.list_live(generated_at=time.time() + 25)
    return fleet.sweep(*arguments, "-e", json.dumps({**QUICK, **variables}), timeout=120)


def on(fleet: Fleet, host: str, command: str, **how: object) -> str:
    done = fleet.run(host, command, **how)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def bundles(fleet: Fleet, host: str) -> dict[str, dict[str, str]]:
    return json.loads(on(fleet, host, "python3 -", input=UNPACK))


def result(swept: Sweep, host: str) -> dict:
    return swept.report["hosts"][host]["evidence"]


def outcomes(swept: Sweep, host: str) -> set[str]:
    return {one["outcome"] for one in swept.report["hosts"][host]["outcomes"]}


def leaves_nothing_running(fleet: Fleet, host: str) -> None:
    """Nothing of a sweep runs on, and nobody holds a lock, soon after it is over."""
    on(fleet, host, f"for lock in {STATE}/*lock; do flock -w 70 $lock true; done")
    running = on(fleet, host, "cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' '")
    assert "AnsiballZ" not in running and "ansible_module" not in running


def test_every_vm_that_goes_leaves_a_bundle_and_hostile_logs_are_harmless(pair: Fleet) -> None:
    pair.plant(BUILDS)
    hosts = sorted(pair.hosts())
    for host in hosts:
        on(pair, host, HOSTILE_LOGS)
    try:
        assert sweep(pair).code == 0
        assert "evidence" not in on(pair, hosts[0], f"ls {STATE}/{REALM}")
        time.sleep(0.3)
        swept = sweep(pair)
    finally:
        for host in hosts:
            on(pair, host, "kill $(cat /run/growers); rm /run/growers")
    assert "evidence failed" not in swept.output and "evidence of" not in swept.output
    for host in hosts:
        gone = {one["vm_id"] for one in swept.report["hosts"][host]["outcomes"]}
        found = bundles(pair, host)
        assert set(found) == gone and result(swept, host)["written"] == len(gone)
        titles = {name.split("-", 1)[1] for texts in found.values() for name in texts if "-" in name}
        assert {"cgroup.txt", "jail-listing.txt", "jail-mounts.txt", "container.txt", "snapshot.txt"} <= titles
        assert "zombie.txt" in titles
        whole = json.dumps(found)
        assert "root:" not in whole and "not read: to look" not in whole
        for vm_id in pair.planted()[host]["orphans"]:
            if not vm_id.startswith("vo"):
                continue
            texts = {name.split("-", 1)[-1]: text for name, text in found[vm_id].items()}
            metadata = json.loads(texts["metadata.json"])
            assert metadata["cause"] == ("tombstoned" if vm_id in pair.planted()[host]["tombstones"] else "absent")
            assert {one["kind"] for one in metadata["resources"]} >= {"cgroup", "jail"}
            assert metadata["host"] == host and metadata["source"].endswith("live.json")
            path = f"/srv/jailer/firecracker/{vm_id}/root/logs"
            assert texts["jail-log-root_logs_vmm.log.txt"] == f"{path}/vmm.log\nlast words of {vm_id}\n"
            assert "more\n" in texts["jail-log-root_logs_growing.txt"]
            assert "left out" in texts["jail-log-root_logs_huge.txt"].split("\n")[0]
            for name, kind in (("shadow", "l"), ("root", "l"), ("fifo", "p"), ("mem", "c")):
                said = texts[f"jail-log-root_logs_{name}.txt"]
                assert f"not read: not a regular file (type {kind})" in said
            assert "root/mnt" in texts["jail-mounts.txt"] and "precious" not in texts["jail-listing.txt"]
        leaves_nothing_running(pair, host)
    assert pair.check("gone") == [] or all("growing" in one for one in pair.check("gone"))


def struck(fleet: Fleet) -> str:
    fleet.plant(FEW)
    assert sweep(fleet).code == 0
    time.sleep(0.3)
    return sorted(fleet.hosts())[0]


def test_a_store_on_a_full_disk_stops_nothing(pair: Fleet) -> None:
    host = struck(pair)
    on(pair, host, f"mkdir -m 700 {STORE} && mount -t tmpfs -o size=256k,mode=0700 none {STORE}")
    try:
        on(pair, host, f"dd if=/dev/zero of={STORE}/filler bs=4k 2>/dev/null; true")
        swept = sweep(pair)
        assert swept.code == 0 and outcomes(swept, host) == {"reaped"}
        assert result(swept, host)["written"] == 0
        assert f"{host}: evidence failed: " in swept.output and "no room for" in swept.output
        assert on(pair, host, f"ls {STORE}").split() == ["filler"]
    finally:
        on(pair, host, f"umount {STORE}")
    assert pair.check("gone") == []


def test_where_evidence_is_required_nothing_goes_without_and_it_goes_later(pair: Fleet) -> None:
    host = struck(pair)
    other = sorted(pair.hosts())[1]
    on(pair, host, f"echo mine > {STORE}")
    held = sweep(pair, reap_evidence_required=True)
    assert held.code == 0 and outcomes(held, host) == {"deferred"} and outcomes(held, other) == {"reaped"}
    assert "no evidence: cannot use the store of evidence" in held.output and "in the way" in held.output
    assert len(pair.left(host)) == 4
    assert {strike["strikes"] for strike in pair.ledger(host)["strikes"].values()} == {2}
    assert on(pair, host, f"cat {STORE}") == "mine\n"
    on(pair, host, f"rm {STORE}")
    swept = sweep(pair, reap_evidence_required=True)
    assert swept.code == 0 and outcomes(swept, host) == {"reaped"} and len(bundles(pair, host)) == 2
    assert pair.check("gone") == []


def test_the_store_keeps_what_matters_most(pair: Fleet) -> None:
    host = struck(pair)
    older = "mkdir -m 700 {0} && cd {0} && for cause in tombstoned absent; do for n in 1 2 3; do umask 077; " \
            "head -c 5000 /dev/urandom > 2026010${{n}}T000000Z-vold-$cause-000000000000000$n.tar.gz; done; done"
    on(pair, host, older.format(STORE) + "; echo kept > notes")
    swept = sweep(pair, reap_evidence_max_bytes=5 * 8192)
    assert swept.code == 0 and outcomes(swept, host) == {"reaped"}, swept.output
    left = on(pair, host, f"ls {STORE}").split()
    assert "notes" in left and len([name for name in left if "-vold-absent-" in name]) == 3
    newest = "20260103T000000Z-vold-tombstoned-0000000000000003.tar.gz"
    assert [name for name in left if "-vold-tombstoned-" in name] == [newest]
    assert len([name for name in left if "-vo" in name and "-vold-" not in name]) == 2


def test_check_mode_keeps_no_evidence(pair: Fleet, tmp_path: Path) -> None:
    host = struck(pair)
    assert sweep(pair, "--check").code == 0
    assert "evidence" not in on(pair, host, f"ls {STATE}/{REALM}")


def test_whole_logs_of_what_is_set_aside_are_copied_after_the_sweep(pair: Fleet) -> None:
    host = struck(pair)
    vm_id = pair.planted()[host]["orphans"][0]
    logs = f"/srv/jailer/firecracker/{vm_id}/root/logs"
    on(pair, host, f"mkdir {logs} && seq 1000000 > {logs}/vmm.log && truncate -s 1T {logs}/huge")
    # As another process of the kind would: it holds the lock, and the sweep neither waits nor fails.
    hold = f"nohup flock {STATE}/evidence.lock sleep 1000 > /dev/null 2>&1 < /dev/null &"
    on(pair, host, f"{hold} echo $! > /run/holder; sleep 0.2")
    aside = {"jail": 3600, "dm_thin": 3600, "snapshot": 3600}
    begin = time.monotonic()
    swept = sweep(pair, reap_hold=aside, reap_pressure=100)
    seconds = time.monotonic() - begin
    assert swept.code == 0 and "set_aside" in outcomes(swept, host) and seconds < 60
    assert "that of an earlier sweep goes on" in result(swept, host)["background"]
    assert not any("whole" in name for name in bundles(pair, host)[vm_id])
    on(pair, host, "pkill -P $(cat /run/holder) sleep; rm /run/holder")
    # The other host copied its own meanwhile; this one does when the jail is found aside, after its ledger was lost.
    other = sorted(pair.hosts())[1]
    leaves_nothing_running(pair, other)
    assert "root/logs" not in json.dumps(bundles(pair, other))
    on(pair, host, f"rm -r {STATE}/{REALM}")
    assert sweep(pair, reap_hold=aside, reap_pressure=100).code == 0
    time.sleep(0.3)
    swept = sweep(pair, reap_hold=aside, reap_pressure=100)
    assert "are being copied" in result(swept, host)["background"], swept.output
    leaves_nothing_running(pair, host)
    texts = {name.split("-", 1)[-1]: text for name, text in bundles(pair, host)[vm_id].items()}
    source, _newline, whole = texts["jail-whole-log-root_logs_vmm.log.txt"].partition("\n")
    assert "/.microvm.reaper/" in source and whole.endswith("999999\n1000000\n")
    assert texts["jail-whole-log-root_logs_huge.txt"].startswith("/srv/jailer/") and "left out" in json.dumps(texts)
    assert sweep(pair, reap_hold=0, reap_pressure=100).code == 0
    assert pair.left(host) == pair.left(other) == []
