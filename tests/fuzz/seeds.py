# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Write the seeds of the corpus: what real tools and daemons said (tests/unit/captures), and good cases of the rest."""

from __future__ import annotations

import base64
import io
import json
import struct
import sys
import tarfile
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT / "collections"), str(ROOT / "tests")]

from ansible_collections.microvm.reaper.plugins.module_utils import (  # noqa: E402  # noqa: E402
    bolt,
    containerd,
    grpc,
    hpack,
    ledger,
    protobuf,
    units,
)
from ansible_collections.microvm.reaper.plugins.module_utils import resource as r  # noqa: E402
from ansible_collections.microvm.reaper.plugins.plugin_utils import inputs, manifest, planner, planning  # noqa: E402
from fuzz.target import CORPUS  # noqa: E402
from fuzz.targets.answers import POLICY, SHARE  # noqa: E402
from fuzz.targets.daemons import ANSWERS  # noqa: E402

CAPTURES = ROOT / "tests/unit/captures"
VM = "0d1b0f5e-6d1c-4a8e-9a57-3c1b6f0f7a11"


def seeds():
    """Yield ``(target, name, text or bytes)``."""
    yield from _device_mapper()
    yield from _containerd()
    yield from _proc()
    yield from _state()
    yield from _lists()
    yield from _rules()
    yield from _answers()


def _device_mapper():
    for number, path in enumerate(sorted(CAPTURES.glob("dmsetup-*.json"))):
        capture = json.loads(path.read_text())
        for said in capture["collect"]:
            name = {"info": "dm_info", "table": "dm_lines", "status": "dm_lines"}.get(said["argv"][1])
            name = "thin_dump" if said["argv"][0] == "thin_dump" else name
            if name:
                what = said["argv"][1] if name == "dm_lines" else "all"
                target = said["argv"][-1] if name == "dm_lines" else ""
                yield name, "seed-%s%s-%d" % (what, target, number), said["out"]
            if name == "dm_lines" and target == "thin":
                yield "thin_mapped", "seed-%s-%d" % (what, number), said["out"]
            if said["err"]:
                yield "dm_reason", "seed-%d" % number, said["err"]
    busy = "device-mapper: remove ioctl on v1 failed: Device or resource busy\nCommand failed.\n"
    yield "dm_reason", "seed-busy", busy
    for state, line in json.loads((CAPTURES / "thin-pool-states-linux-7.2.7.json").read_text()).items():
        yield "thin_health", "seed-" + state.replace(" ", "-").replace(",", ""), line.split(" ", 3)[3] + "\n23"
    dump = '<superblock uuid="" time="1" transaction="2" version="2" data_block_size="128" nr_data_blocks="256">\n'
    device = '  <device dev_id="%d" mapped_blocks="1" transaction="1" creation_time="0" snap_time="0">\n  </device>\n'
    yield "thin_dump", "seed-small", dump + device % 1 + device % 2 + "</superblock>\n"
    yield "thin_notes", "seed", '{"hyper-thinpool": "23"}'
    yield "snapshotter_records", "seed", '{"device_id": 1, "size": 10737418240, "name": "pool-snap-1", "state": 4}'
    yield "snapshotter_records", "seed-states", b"\x01" + b"4,5,6,16777215"
    yield "bolt_database", "seed", _bolt_pages()


def _bolt_pages():
    """Return a page with a bucket in it, which has a value, and one that has a page of its own."""

    def leaf(elements):
        head, body = struct.pack("<QHHI", 1, bolt.LEAF, len(elements), 0), b""
        for number, (flags, key, value) in enumerate(elements):
            head += struct.pack("<IIII", flags, 16 * (len(elements) - number) + len(body), len(key), len(value))
            body += key + value
        return head + body

    record = b'{"device_id": 1, "size": 4096}'
    inline = struct.pack("<QQ", 0, 0) + leaf([(0, b"1", b"\x01"), (0, b"2", b"\x00")])
    first = leaf([(1, b"device_ids", inline), (1, b"devices", struct.pack("<QQ", 2, 0))])
    return first.ljust(4096, b"\0") + leaf([(0, b"pool-snap-1", record)])


def _containerd():
    for path in sorted(CAPTURES.glob("containerd-*.json")):
        version, calls = path.stem.split("-")[1], json.loads(path.read_text())
        small: dict = {}
        for call, answers in calls.items():
            name = call.split(" ")[0]
            table = containerd.CALLS[name][1]
            for answer in answers[:1]:
                message = base64.b64decode(answer)
                label = "seed-%s-%s" % (version, name.split(".", 2)[2].replace("/", "-"))
                yield "containerd_message", label, bytes([ANSWERS.index(table)]) + message
            small.setdefault(name, [
                protobuf.encode(table, protobuf.decode(table, base64.b64decode(answer))) for answer in answers
            ])
        for label, names in (
            ("container", ("containers.v1.Containers/ListStream", "tasks.v1.Tasks/List")),
            ("snapshot", ("snapshots.v1.Snapshots/List", "containers.v1.Containers/ListStream",
                          "content.v1.Content/List", "leases.v1.Leases/List", "leases.v1.Leases/ListResources")),
            ("tasks", ("tasks.v1.Tasks/List", "containers.v1.Containers/ListStream")),
        ):
            yield "containerd_kinds", "seed-%s-%s" % (version, label), b"\n====\n".join(
                b"\n----\n".join(small[name]) for name in names
            )
    spec = {"root": {"path": "rootfs"}, "mounts": [{"source": "/snapshots/7/fs", "options": ["lowerdir=/a:/b", "rw"]}]}
    yield "container_spec", "seed", json.dumps(spec)
    for number, time in enumerate(("2026-11-22T03:00:00Z", "2026-11-22T03:00:00.123456789+01:00")):
        yield "lease_time", "seed-%d" % number, time
    head = grpc._frame(grpc.SETTINGS, 0, 0, b"")
    begin = hpack.encode([(":status", "200"), ("content-type", "application/grpc")])
    message = protobuf.encode({1: ("id", protobuf.TEXT)}, {"id": "vm-1"})
    data = b"\0" + len(message).to_bytes(4, "big") + message
    for status, said in (("0", b""), ("5", b"%20not found")):
        end = hpack.encode([("grpc-status", status), ("grpc-message", said.decode())])
        yield "grpc_answer", "seed-status-" + status, b"".join([
            head,
            grpc._frame(grpc.HEADERS, grpc.END_HEADERS, 1, begin),
            grpc._frame(grpc.DATA, 0, 1, data + data),
            grpc._frame(grpc.PING, 0, 0, b"12345678"),
            grpc._frame(grpc.WINDOW_UPDATE, 0, 0, b"\0\0\1\0"),
            grpc._frame(grpc.HEADERS, grpc.END_HEADERS | grpc.END_STREAM, 1, end),
        ])
    # What else a frame may have: padding, a priority, headers in two frames, a goodbye.
    yield "grpc_answer", "seed-padded", b"".join([
        grpc._frame(grpc.SETTINGS, 0, 0, grpc._settings({grpc.INITIAL_WINDOW_SIZE: 70000})),
        grpc._frame(grpc.HEADERS, grpc.PADDED | grpc.PRIORITY, 1, b"\x02" + bytes(5) + begin[:20] + b"\0\0"),
        grpc._frame(grpc.CONTINUATION, grpc.END_HEADERS, 1, begin[20:]),
        grpc._frame(grpc.DATA, grpc.PADDED, 1, b"\x03" + data[:4] + bytes(3)),
        grpc._frame(grpc.DATA, 0, 1, data[4:]),
        grpc._frame(grpc.GOAWAY, 0, 0, b"\0\0\0\x01\0\0\0\0bye"),
        grpc._frame(grpc.HEADERS, grpc.END_HEADERS | grpc.END_STREAM, 1, hpack.encode([("grpc-status", "0")])),
    ])
    broken = grpc._frame(grpc.RST_STREAM, 0, 1, b"\0\0\0\x08")
    yield "grpc_answer", "seed-broken-off", head + grpc._frame(grpc.HEADERS, grpc.END_HEADERS, 1, begin) + broken
    long_ago = {"seconds": -62135596800, "nanos": -1}
    before = {"container": {"id": "a", "labels": {"a": "b", "c": ""}, "created_at": long_ago}}
    tell = containerd.CALLS["containers.v1.Containers/Get"][1]
    yield "containerd_message", "seed-long-ago", bytes([ANSWERS.index(tell)]) + protobuf.encode(tell, before)
    yield "headers", "seed-plain", begin
    yield "headers", "seed-static", bytes([0x88, 0x5F, 0x8B]) + bytes.fromhex("1d75d0620d263d4c4d6564") + b"\x20"
    yield "headers", "seed-huffman", bytes.fromhex("f1e3c2e5f23a6ba0ab90f4ff")
    body = '{"id":"v1","state":"Running","vmm_version":"1.7.0","app_name":"Firecracker"}'
    answer = "HTTP/1.1 200 OK\r\nServer: Firecracker API\r\nContent-Type: application/json\r\n%s\r\n\r\n%s"
    yield "firecracker_answer", "seed", answer % ("Content-Length: %d" % len(body), body)
    yield "firecracker_answer", "seed-another-vm", answer % ("Connection: close", body.replace("v1", "v2"))
    chunks = "%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    yield "firecracker_answer", "seed-chunked", answer % ("Transfer-Encoding: chunked", chunks)


def _proc():
    yield "stat", "seed-real", "4711 (sh) R 4700 4711 4700 34816 4711 4194304 812 0 0 0 3 1 0 0 20 0 1 0 987654 9 9\n"
    yield "stat", "seed-hostile", "42 (a) Z 1 (b) R 7 42 42 0 -1 4194304 0 0 0 0 0 0 0 0 20 0 1 0 123456 0 0\n"
    yield "cgroup", "seed-v2", "0::/machine.slice/vm-v1/emulator\n"
    yield "cgroup", "seed-removed", "0::/firecracker/%s (deleted)\n" % VM
    yield "cgroup", "seed-hybrid", "4:cpu,cpuacct:/vm-v1\n1:name=systemd:/system.slice/boxlite.service\n0::/x.scope/y\n"
    table = (CAPTURES / "mountinfo-linux-6.18-hybrid.txt").read_text().split("\n")
    overlay = "36 35 98:0 / /a\\040b rw shared:1 - overlay overlay rw,upperdir=/var/x/1/fs,lowerdir=/l"
    for name in ("mountinfo", "mount_points"):
        yield name, "seed-real", "\n".join(table[:20])
        yield name, "seed-overlay", ("upperdir=/var/x/1/fs\n" if name == "mount_points" else "") + overlay + "\n"
    yield "cgroup", "seed-containers", "0::/kubepods/pod1/cri-containerd-%s.scope\n1:cpu:/k8s.io/c1\n" % ("5f" * 32)
    shown = dict.fromkeys(units._PROPERTIES, "")
    shown.update(Id="x.service", LoadState="loaded", ControlGroup="/system.slice/x.service", MainPID="7")
    yield "unit_properties", "seed", "".join("%s=%s\n" % pair for pair in shown.items())
    yield "printable", "seed", "a\u202eb\x1b[2J\n\u00e9\u2603 /"


def _ledger():
    strike = {"identity": "i", "vm_id": "v2", "strikes": 1, "first": 10.0, "last": 900.5, "boot_id": "b"}
    token = {"kind": "dm_thin", "name": "hyper-rw-v3", "vm_id": "v3", "identity": "i", "stop": False, "details": {}}
    return dict(
        ledger.empty("prod"),
        host="h1",
        machine_id="m",
        generation=4,
        manifest={"epochs": {"test": 2}, "count": 9, "counts": {"test": 9}},
        strikes={"cgroup v2.cgroup": strike},
        intents=[dict(token, evidence="absent", resume=True)],
        reaped={"v4": 1_799_999_000.0},
    )


def _state():
    yield "ledger_file", "seed-empty", json.dumps(ledger.empty("prod"))
    yield "ledger_file", "seed-full", json.dumps(_ledger())
    yield "ledger_file", "seed-latched", json.dumps(dict(_ledger(), latch={"code": "latched", "message": "v4 lives"}))
    yield "pins", "seed", "# keep\nv1\nrack7-* until 2027-01-31 # for Ann\n\n  v2 until tomorrow\n"
    stamp = {"time": "2027-01-15T08:00:00Z", "boottime": 12.5, "boot_id": "b", "sweep": "00ff"}
    thing = {"kind": "cgroup", "name": "v1.cgroup", "vm_id": "v1"}
    entries = [
        dict(stamp, what="intent", **thing, identity="i", evidence="absent", strikes=2, reasons=["why"], source="s",
             epoch=3),
        dict(stamp, what="outcome", **thing, outcome="reaped", message="", bytes=4096),
        dict(stamp, what="latched", message="v4 lives"),
    ]
    yield "journal_file", "seed", "".join(json.dumps(one, sort_keys=True) + "\n" for one in entries)
    yield "journal_chain", "seed", "".join(json.dumps(one, sort_keys=True) + "\n" for one in entries)
    yield "journal_chain", "seed-torn", json.dumps(entries[2]) + "\n" + json.dumps(entries[0])[:40]
    bundle = io.BytesIO()
    with tarfile.open(fileobj=bundle, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name, text in (("metadata.json", b'{"vm_id": "v1"}\n'), ("01-jail.txt", b"/srv/x\ntext\n")):
            member = tarfile.TarInfo(name)
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text))
    yield "evidence_bundle", "seed", bundle.getvalue()[:2560]
    for one in entries:
        yield "journal_entry", "seed-" + one["what"], json.dumps(one)


def _manifest(**changes):
    vms = [
        {"vm_id": "v1", "host": "h1", "state": "running"},
        {"vm_id": VM, "host": "h2", "state": "paused", "also_on": ["h1"]},
        {"vm_id": "v3", "host": "h2", "state": "destroyed"},
        {"vm_id": "v4"},
    ]
    head = {"realm": "prod", "source": "cp", "generated_at": "2027-01-15T08:00:00Z", "complete": True, "epoch": 3}
    return dict(head, hosts=["h1", "h2"], vms=vms, **changes)


def _lists():
    document = _manifest(tombstones=[{"vm_id": "v5", "destroyed_at": 1_799_999_000}])
    for name in ("manifest_document", "manifest_file"):
        yield name, "seed", json.dumps(document)
        yield name, "seed-counted", json.dumps(_manifest(count=4))
    nothing = {"realm": "prod", "generated_at": 1.8e9, "complete": True, "vms": []}
    yield "manifest_document", "seed-bare", json.dumps(nothing)
    head = {key: value for key, value in _manifest(count=4).items() if key != "vms"}
    lines = [json.dumps(one) for one in (head, *document["vms"])]
    yield "manifest_file", "seed-lines", "\n".join(lines) + "\n"
    yield "manifest_file", "seed-yaml", (
        "realm: prod\ngenerated_at: 2027-01-15T08:00:00Z\ncount: 2\nvms:\n  - {vm_id: v1, host: h1}\n  - vm_id: v12\n"
        "    host: h12\n    also_on: [h1]\ncomplete: true\n"
    )
    bare = json.dumps({key: value for key, value in head.items() if key != "count"})
    yield "manifest_file", "seed-lines-without-a-count", "\n".join([bare, *lines[1:]]) + "\n"
    checksum = manifest.sha256([vm["vm_id"] for vm in document["vms"]])
    yield "manifest_file", "seed-lines-with-a-checksum", "\n".join([
        json.dumps(dict(json.loads(bare), sha256=checksum)), *lines[1:],
    ]) + "\n"
    yield "manifest_document", "seed-checksum", json.dumps(_manifest(sha256=checksum))
    pages = [
        {"realm": "prod", "count": 2, "epoch": 3, "next": "/vms?c=1", "vms": [{"vm_id": "v1", "host": "h1"}]},
        {"realm": "prod", "count": 2, "epoch": 3, "next": None, "vms": [{"vm_id": "v2", "host": "h2", "state": "x"}]},
        {"realm": "prod", "vms": []},
    ]
    yield "http_pages", "seed-whole", json.dumps([0, _manifest(count=4)])
    yield "http_pages", "seed-next", json.dumps([1, *pages])
    link = [{"Link": '<https://cp.example.net/vms?p=2>; rel="next"', "Date": "Fri, 15 Jan 2027 08:00:00 GMT"}]
    last = dict(_manifest(count=5), vms=[{"vm_id": "v9"}])
    yield "http_pages", "seed-link", json.dumps([2, [*link, _manifest(count=5)], last])
    yield "http_pages", "seed-cursor", json.dumps([3, *pages])
    yield "http_pages", "seed-reread", json.dumps([4, *pages])
    yield "http_body", "seed", json.dumps(document)
    yield "http_body", "seed-spaced", '{"a" : {"b":[1,{"c":"\\":"}], "d": ":"}}'
    yield "http_answer", "seed", "200\nContent-Type: application/json; charset=utf-8\n\n" + json.dumps(document)
    yield "http_answer", "seed-error", "503\nRetry-After: 7\nContent-Type: text/html\n\n<html>secret-token"
    yield "http_answer", "seed-redirect", "302\nLocation: https://u:p@elsewhere/?q=secret-param\n\n"
    yield "http_headers", "seed-link", '<https://cp.example.net:8443/v1/vms?limit=2&c=x>; title="a, b"; rel="next last"'
    yield "http_headers", "seed-date", "Fri, 15 Jan 2027 08:00:00 GMT"
    yield "http_headers", "seed-charset", '; charset="UTF-8"; boundary=x'
    yield "jmespath_columns", "seed", 'a.b\n{"a": {"b": [1, 2]}}'
    some = '{"vms": [{"vm_id": "v1", "state": "x"}]}'
    yield "jmespath_columns", "seed-filter", 'vms[?state!=`"gone"`].{id: vm_id}\n' + some
    yield "jmespath_columns", "seed-functions", "vms[0].[to_string(@), length(vm_id), state || 'x'] | [0]\n" + some
    two = [{"vm_id": "v1", "host": "h1"}, {"vm_id": "v2", "state": "destroyed"}]
    yield "http_lookup", "seed", json.dumps([*two, None])
    yield "inventory_group", "seed", json.dumps({
        "groups": {"all": ["h1", "h2", "a", "b"], "live_vms": ["a", "b"]},
        "variables": {"a": {"vm_id": "v1", "vm_host": "h1", "vm_also_on": ["h2"]}, "h2": {"reap_host_id": "h2"}},
    })
    yield "database_epoch", "seed", "12"
    yield "database_epoch", "seed-decimal", "1.5E+3"
    yield "database_rows", "seed", json.dumps([
        ["v1", "h1", "running", None, None],
        ["v2", "h1", None, '["h2", 3]', None],
        ["v3", None, None, None, 1_799_999_000.0],
        ["v4", "h1", "gone", "h2", 1_900_000_000.0],
    ])


def _rules():
    yield "names", "seed", "vm-v1-disk"
    yield "names", "seed-uuid", VM + "/x"
    yield "name_rule", "seed", "vm-(?P<vm_id>[a-z0-9]+)\nvm-v1"
    yield "paths", "seed-socket", "/srv/jailer/*/{vm_id}/root/run/firecracker.socket"
    yield "paths", "seed-pid-file", "/var/lib/boxlite/boxes/*/shim.pid"
    yield "paths", "seed-base", "/srv/jailer"
    for path in sorted((ROOT / "roles/reap/vars/presets").glob("*.yml")):
        yield "preset", "seed-" + path.stem, path.read_text()
    rule = {"name": "vm-(?P<vm_id>.*)"}
    yield "preset", "seed-json", json.dumps({
        "description": "x",
        "rules": {
            "cgroup": [dict(rule, root="vms")],
            "dm_thin": [rule],
            "container": [dict(rule, namespace="default")],
        },
        "reused_ids": ["[0-9]+"],
    })
    yield "policy_pin", "seed", "rack7-* until 2027-01-31"


def _answers():
    def thing(kind, vm_id, **others):
        return r.resource(kind, "%s.%s" % (vm_id, kind), vm_id, "i", age_seconds=1000.0, **others)

    held = [r.holder("process", "12 qemu")]
    found = {
        "cgroup": [thing("cgroup", "v1"), thing("cgroup", "v2"), thing("cgroup", "v6", in_use=True, holders=held)],
        "jail": [thing("jail", "v2", bytes_used=4096, details={"mounts": 1})],
    }
    entry = {"status": "ok", "reason": None, "foreign": 1}
    kinds = {kind: dict(entry, columns=r.columns(rows)) for kind, rows in found.items()}
    kinds["zombie"] = {"status": "unavailable", "reason": "no answer", "foreign": 0, "resources": []}
    said = {
        "realm": "prod",
        "boot_id": "b",
        "machine_id": "m",
        "boottime_seconds": 1000.0,
        "ledger": _ledger(),
        "ledger_problem": None,
        "other_realms": [],
        "pins": ["v6 until 2027-02-01"],
        "supervisors": {"firecracker": {"status": "ok", "reason": None, "required": True}},
        "alive": {"v7": "it runs"},
        "kinds": kinds,
    }
    listed = dict(said, kinds={"cgroup": dict(entry, resources=found["cgroup"])})
    yield "facts", "seed-columns", json.dumps(said)
    yield "facts", "seed-rows", json.dumps(listed)
    yield "packed_facts", "seed", zlib.compress(json.dumps({"cgroup": dict(entry, resources=[])}).encode(), 6)
    outcome = {"kind": "cgroup", "name": "v2.cgroup", "vm_id": "v2", "outcome": "reaped", "message": "", "bytes": 4096}
    yield "outcomes", "seed", json.dumps([
        dict(outcome, holders=[]),
        dict(outcome, outcome="deferred", message="busy", bytes=None, holders=held),
        dict(outcome, kind="jail", outcome="failed", message="no"),
    ])
    plan = planning.plan_of_share(listed, SHARE, POLICY)
    caps = {"max_per_fleet": 500, "max_percent": 30, "percent_floor": 10}
    head = inputs.header("prod", caps, ["h1"], now=1_800_000_000.0)
    record = inputs.record("h1", listed, SHARE, planner.complete_policy(POLICY), plan)
    yield "saved_inputs", "seed", json.dumps(head) + "\n" + json.dumps(record) + "\n"


def main():
    """Write them, over those that are there."""
    for target, name, content in seeds():
        path = CORPUS / target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content
        if len(data) <= 8192:
            path.write_bytes(data)


if __name__ == "__main__":
    main()
