#!/usr/bin/env python3
"""Measure what a list of live VMs costs, from its source to an index; bench/README.md says what is counted.

    lists.py bare|ours http|postgresql OPTIONS    read the list that OPTIONS (JSON) tell of; print the numbers as JSON
    lists.py serve VMS                            hand out as many VMs over HTTP; print the port
"""

from __future__ import annotations

import contextlib
import json
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "collections"), str(ROOT / "tests")]

VMS, HOSTS = 1_000_000, 1000
PAGE = 1000
ROUNDS = 5
MIB = 2**20
MAX_RATIO, MAX_MEMORY, MAX_SHARE = 3.0, 300 * MIB, 0.005
REALM = "bench"
# In the order of their random ids, as a control plane keeps them.
TABLE = f"""
    CREATE TABLE vm (id uuid PRIMARY KEY, host text NOT NULL, state text NOT NULL);
    INSERT INTO vm SELECT gen_random_uuid(), 'h' || number %% {HOSTS}, 'running' FROM generate_series(1, %d) AS number;
    ANALYZE vm;
"""
QUERY = "SELECT id AS vm_id, host, state FROM vm"


# --- the readers, each in a process of its own


def bare_http(options: dict) -> int:
    """Read all pages with requests and json."""
    import requests

    session, listed, url = requests.Session(), 0, options["url"]
    while url:
        answer = session.get(url)
        listed += len(answer.json())
        url = requests.compat.urljoin(url, answer.links["next"]["url"]) if "next" in answer.links else None
    return listed


def bare_postgresql(options: dict) -> int:
    """Read all rows with psycopg, by a cursor of the server."""
    import psycopg

    listed = 0
    keys = ("host", "port", "user", "password", "dbname")
    with (
        psycopg.connect(**{key: options[key] for key in keys}) as connection,
        connection.cursor("vms") as cursor,
    ):
        cursor.execute("SELECT id::text, host, state FROM vm")
        while page := cursor.fetchmany(PAGE):
            listed += len(page)
    return listed


def ours(options: dict) -> tuple[int, Callable[[], float]]:
    """Fetch, prove and index the list; return how many live, and what measures a host's share."""
    from ansible_collections.microvm.reaper.plugins.plugin_utils import manifest, sources

    directory = tempfile.TemporaryDirectory()
    context = {"realm": REALM, "now": time.time(), "directory": "/", "terminal_states": ["gone"]}
    handle = sources.fetch([options], context, f"{directory.name}/index.sqlite", max_age=600)
    assert handle["proven"], handle["unproven"]

    def share() -> float:
        with contextlib.closing(manifest.sqlite3.connect(handle["index"])) as connection:
            ids = {vm_id for (vm_id,) in connection.execute("SELECT vm_id FROM vm WHERE host = 'h7'")}
        ids |= {f"dead{number}" for number in range(len(ids) // 100)}
        times = []
        for _round in range(21):
            begin = time.perf_counter()
            found = manifest.share(handle, "h7", ids)
            times.append(time.perf_counter() - begin)
        assert len(ids) > len(found["live"]) > 0
        directory.cleanup()
        return statistics.median(times)

    return handle["count"], share


def read(how: str, what: str, options: dict) -> dict:
    """Read a list; return seconds, the largest memory in bytes, and how many VMs it had."""
    begin, share = time.perf_counter(), None
    if how == "ours":
        listed, share = ours(options)
    else:
        listed = {"http": bare_http, "postgresql": bare_postgresql}[what](options)
    seconds = time.perf_counter() - begin
    # Not ru_maxrss, which begins with what the process that started this one had.
    (peak,) = [line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line]
    return {"seconds": seconds, "memory": int(peak) * 1024, "vms": listed, "share": share and share()}


# --- the servers


def serve(vms: int) -> None:
    """Hand out pages that were made before, so that the server costs next to nothing."""
    chance = random.Random(1)
    ids = sorted(f"{chance.getrandbits(128):032x}" for _number in range(vms))
    pages = []
    for begin in range(0, vms, PAGE):
        some = [
            {"id": vm_id, "node": {"name": f"h{number % HOSTS}"}, "state": "running"}
            for number, vm_id in enumerate(ids[begin : begin + PAGE], begin)
        ]
        body = json.dumps(some).encode()
        link = f'Link: </vms?from={begin + PAGE}>; rel="next"\r\n' if begin + PAGE < vms else ""
        head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        pages.append(f"{head}X-Total: {vms}\r\n{link}\r\n".encode() + body)
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    while True:
        client, _address = listener.accept()
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with client, client.makefile("rb") as stream:
            while line := stream.readline():
                begin = int(line.split()[1].partition(b"from=")[2] or 0)
                while stream.readline().strip():
                    pass
                client.sendall(pages[begin // PAGE])


@contextlib.contextmanager
def http(vms: int) -> Iterator[dict]:
    with subprocess.Popen([sys.executable, __file__, "serve", str(vms)], stdout=subprocess.PIPE, text=True) as server:
        try:
            port = int(server.stdout.readline()) if server.stdout else 0
            yield {
                "type": "http",
                "url": f"http://127.0.0.1:{port}/vms",
                "realm": REALM,
                "items": "@",
                "fields": {"vm_id": "id", "host": "node.name", "state": "state"},
                "about": {},
                "paging": "link",
                "count_header": "X-Total",
            }
        finally:
            server.kill()


@contextlib.contextmanager
def postgresql(vms: int) -> Iterator[dict]:
    from integration import postgresql as servers

    with servers.server(log_statement="none") as server:
        dbname = server.database(TABLE % vms)
        yield {"type": "postgresql", **server.options(dbname), "realm": REALM, "query": QUERY}


# --- what is shown


def report(_repeat: int) -> tuple[dict, list[str]]:
    """Measure and print; return all numbers and the targets that were missed."""
    numbers, missed = {}, []
    print(f"{VMS} VMs on {HOSTS} hosts, fetched, proved and indexed; medians of {ROUNDS} rounds")
    for what, server in (("http", http), ("postgresql", postgresql)):
        with server(VMS) as options:
            rounds = [{how: _alone(how, what, options) for how in ("bare", "ours")} for _round in range(ROUNDS)]
        counted = {one[how]["vms"] for one in rounds for how in one}
        if counted != {VMS}:
            sys.exit(f"{what}: {counted} VMs, not {VMS}")
        numbers[what] = rounds
        bare, mine = ([one[how]["seconds"] for one in rounds] for how in ("bare", "ours"))
        ratio = statistics.median(one / other for one, other in zip(mine, bare, strict=True))
        share = min(one["ours"]["share"] for one in rounds)  # what else runs here can only make it longer
        print(f"\n{what}: bare client {statistics.median(bare):.2f} s, ours {statistics.median(mine):.2f} s")
        for name, value, most in (
            ("ours to bare client", ratio, MAX_RATIO),
            ("memory in MiB", max(one["ours"]["memory"] for one in rounds) / MIB, MAX_MEMORY / MIB),
            ("a host's share, in milliseconds", share * 1000, MAX_SHARE * 1000),
        ):
            print(f"{name:38} {value:8.1f}, at most {most:.0f}")
            if value > most:
                missed.append(f"{what}, {name}: {value:.1f}, at most {most:.0f}")
    return numbers, missed


def _alone(how: str, what: str, options: dict) -> dict:
    command = [sys.executable, __file__, how, what, json.dumps(options)]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(int(sys.argv[2]))
    else:
        print(json.dumps(read(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))))
