# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What runs on a host is not taken for dead by a list that does not have it: a real containerd, and a real HTTP server.

There is no firecracker where these tests run: a server of Python's answers on the socket as its API does.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator

import pytest
from hosts.fleet import Fleet, Sweep

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.timeout(240),
    pytest.mark.skipif(os.geteuid() != 0, reason="test hosts need root"),
]

FEW = {"live": 2, "orphans": 2, "containers": 0, "running_orphans": 0, "zombies": 0}
QUICK = {"reap_min_age": 0, "reap_strike_interval": 0.1, "reap_max_percent": 100}

# Answers as Firecracker 1.10 does on GET /. Started outside of the jail: nothing but the socket is in there.
API = r"""
import http.server, json, os, socketserver, sys

vm_id, path = sys.argv[1:]

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        info = {"id": vm_id, "state": "Running", "vmm_version": "1.10.1", "app_name": "Firecracker"}
        body = json.dumps(info).encode()
        self.send_response(200 if self.path == "/" else 404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def address_string(self):
        return "unix"

    def log_message(self, *_arguments):
        pass

server = socketserver.UnixStreamServer(path, Handler)
if os.fork():
    os._exit(0)
os.setsid()
os.chdir("/")
null = os.open("/dev/null", os.O_RDWR)
for descriptor in (0, 1, 2):
    os.dup2(null, descriptor)
with open("/run/api.pid", "w") as stream:
    stream.write(str(os.getpid()))
server.serve_forever()
"""


@pytest.fixture
def planted(pair: Fleet) -> Iterator[Fleet]:
    """Hosts with two dead VMs each, and no memory of tests before."""
    pair.clear()
    pair.plant(FEW)
    yield pair
    pair.clear()


def on(fleet: Fleet, host: str, command: str, **how) -> str:
    done = fleet.run(host, command, **how)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def sweeps(fleet: Fleet, *sources: dict, times: int = 2, **variables) -> Sweep:
    """Sweep as often, with these sources beside the list; return the last one."""
    listed = {"type": "file", "path": str(fleet.state / "live.json")}
    extra = json.dumps(dict(QUICK, reap_live_sources=[listed, *sources], **variables))
    for _number in range(times):
        fleet.list_live(generated_at=time.time() + 25)
        swept = fleet.sweep("-e", extra, timeout=100)
        time.sleep(0.2)
    return swept


def left(fleet: Fleet, host: str) -> set[str]:
    """Return the ids of the dead VMs of which something is left on a host."""
    there = " ".join(fleet.left(host))
    return {vm_id for vm_id in fleet.planted()[host]["orphans"] if vm_id in there}


def disputed(swept: Sweep, host: str, vm_id: str) -> str:
    """Return why the VM is disputed on a host, as the report has it; it must be loud too."""
    family = swept.report["hosts"][host]["families"][vm_id]
    assert (family["verdict"], family["strikes"]) == ("disputed", 0)
    (reason,) = family["reasons"]
    assert reason["code"] == "running"
    assert "held (disputed): %s: %s" % (vm_id, reason["text"][:40]) in swept.output
    return reason["text"]


def test_a_vm_whose_task_runs_is_disputed_and_goes_when_it_has_ended(planted: Fleet) -> None:
    """Rows 8 and 10: the list is wrong, and the host knows better."""
    host, other = sorted(planted.hosts())
    runs = planted.planted()[host]["orphans"][0]
    settings = planted.hosts()[host]
    image = settings["test_busybox_image"]
    ctr = "ctr -n tasks-of-vms "
    on(planted, host, f"{ctr} images import {settings['test_busybox_archive']}")
    on(planted, host, f"{ctr} run -d {image} vm-{runs} /bin/sleep 100000")
    source = {"type": "containerd", "namespaces": ["tasks-of-vms"], "name": "vm-(?P<vm_id>.*)"}
    try:
        swept = sweeps(planted, source)
        assert swept.code == 0, swept.output
        why = disputed(swept, host, runs)
        assert why.startswith(f"the task tasks-of-vms/vm-{runs} of containerd runs (process ")
        assert left(planted, host) == {runs} and left(planted, other) == set()

        on(planted, host, f"{ctr} tasks pause vm-{runs}")
        swept = sweeps(planted, source)
        assert "is paused" in disputed(swept, host, runs)
        on(planted, host, f"{ctr} tasks resume vm-{runs}")
        assert left(planted, host) == {runs}

        on(planted, host, f"{ctr} tasks kill -s 9 vm-{runs}")
        swept = sweeps(planted, source)
        assert swept.code == 0 and left(planted, host) == set(), swept.output
    finally:
        planted.run(host, f"{ctr} tasks resume vm-{runs}; {ctr} tasks rm -f vm-{runs}; {ctr} containers rm vm-{runs}")
        planted.run(host, f"{ctr} images rm {image}; ctr namespaces rm tasks-of-vms")
    assert planted.check("gone") == []


def test_a_vm_whose_api_answers_or_hangs_is_disputed_and_goes_when_nobody_listens(planted: Fleet) -> None:
    """Rows 8 and 10."""
    host, other = sorted(planted.hosts())
    runs, dead = planted.planted()[host]["orphans"]
    path = f"/srv/jailer/firecracker/{runs}/root/run/firecracker.socket"
    stale = f"/srv/jailer/firecracker/{dead}/root/run/firecracker.socket"
    on(planted, host, f"python3 - {runs} {path}", input=API)
    try:
        # A socket that outlived its VMM.
        on(planted, host, f"python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind(\"{stale}\")'")
        source = {"type": "firecracker"}
        swept = sweeps(planted, source)
        assert swept.code == 0, swept.output
        assert disputed(swept, host, runs).startswith(f"its API socket {path} answers (Running) although the VM")
        assert left(planted, host) == {runs} and left(planted, other) == set()

        on(planted, host, "kill -STOP $(cat /run/api.pid)")
        assert "something listens on its API socket" in disputed(sweeps(planted, source), host, runs)
        assert left(planted, host) == {runs}

        on(planted, host, "kill -CONT $(cat /run/api.pid); kill -9 $(cat /run/api.pid)")
        assert "firecracker.socket" in on(planted, host, f"ls {os.path.dirname(path)}")
        swept = sweeps(planted, source)
        assert swept.code == 0 and left(planted, host) == set(), swept.output
    finally:
        planted.run(host, "kill -CONT $(cat /run/api.pid); kill -9 $(cat /run/api.pid)")
    assert planted.check("gone") == []


def test_row_27_a_supervisor_that_cannot_be_read_leaves_its_host_alone(planted: Fleet) -> None:
    host, other = sorted(planted.hosts())
    address = "/run/stuck/containerd.sock"
    listen = f"import socket as s, time; a = s.socket(s.AF_UNIX); a.bind('{address}'); a.listen(); time.sleep(100000)"
    start = f"setsid python3 -c \"{listen}\" >/dev/null 2>&1 </dev/null & echo $! > /run/stuck.pid"
    on(planted, host, f"mkdir -p /run/stuck; {start}")
    source = {"type": "containerd", "namespaces": ["x"], "address": address}
    try:
        swept = sweeps(planted, source, reap_deadline=5)
        refused = swept.report["hosts"][host]["refused"]
        assert refused["code"] == "supervisor_unavailable", swept.output
        assert refused["message"].startswith("the supervisor containerd (")
        assert f"{host}: refused (supervisor_unavailable)" in swept.output
        # The other host has no such thing at all, which is no failure.
        assert "supervisor containerd (no containerd here" in swept.output
        assert left(planted, other) == set()
        assert left(planted, host) == set(planted.planted()[host]["orphans"])
        assert planted.ledger(host) is None

        swept = sweeps(planted, dict(source, required=False), reap_deadline=5)
        assert "the supervisor containerd" in swept.output and "did not say who lives" in swept.output
        assert left(planted, host) == set()
    finally:
        planted.run(host, "kill $(cat /run/stuck.pid); rm -rf /run/stuck")
    assert planted.check("gone") == []


def test_a_source_that_only_adds_life_is_not_enough(planted: Fleet) -> None:
    alone = json.dumps({"reap_live_sources": [{"type": "firecracker"}]})
    swept = planted.sweep("-e", alone, timeout=100)
    assert swept.code != 0 and "nothing was done" in swept.output
    assert "nothing but firecracker" in swept.output
    assert planted.check("there") == []
