# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The dm_thin kind on a host with a kernel of its own and real thin pools, compared with what dmsetup and sysfs say."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tarfile

import pytest
from ansible_collections.microvm.reaper.plugins.module_utils import probe
from ansible_collections.microvm.reaper.plugins.module_utils.kinds import dm_thin

ROOT = pathlib.Path(__file__).resolve().parents[2]
HOSTS = ROOT / "tests" / "hosts" / "hosts.py"
PACKAGE = "ansible_collections/microvm/reaper/plugins/module_utils"
NAME = "thin"
RULES = [{"name": "hyper-rw-(?P<vm_id>.*)"}]
MIB = 1 << 20

pytestmark = [pytest.mark.hosts, pytest.mark.skipif(os.geteuid() != 0, reason="test hosts need root")]

# Runs on the host: does one act with the collection's own code and prints what it came to. ``before`` is what happens
# on the host right before a certain command or request of ours: something else acts, or the reaper is killed. A request
# to the kernel counts as a command: "info NAME", "table NUMBER", "status NUMBER", "rename NAME UUID", "remove UUID",
# "message NAME TEXT".
DRIVER = r"""
import json, os, subprocess, sys, time
sys.path.insert(0, "/tmp/reaper")
from ansible_collections.microvm.reaper.plugins.module_utils import dm, dm_control, probe
from ansible_collections.microvm.reaper.plugins.module_utils.kinds import dm_thin, thin_id

ask = json.load(sys.stdin)
kind = {"dm_thin": dm_thin, "thin_id": thin_id}[ask["kind"]]
run, ioctl = probe.Host.run, dm_control._ioctl
ran, requests = [], []

def meanwhile(words):
    for hook in ask["before"]:
        if hook["command"] in words and not hook.get("over"):
            hook["over"] = True
            if "shell" in hook:
                subprocess.run(["sh", "-ec", hook["shell"]], check=True, stdout=subprocess.DEVNULL)
            if "crash" in hook:
                os._exit(9)

def hooked(self, command, *arguments, **more):
    words = " ".join((command,) + arguments)
    ran.append(words)
    meanwhile(words)
    return run(self, command, *arguments, **more)

def told(command, buffer):
    fields = dm_control.HEADER.unpack_from(buffer)
    device, name, uuid = fields[10:13]
    name, uuid = (text.rstrip(b"\0").decode() for text in (name, uuid))
    words = {4: "remove", 5: "rename", 7: "info", 12: "table" if fields[7] & dm_control.STATUS_TABLE else "status"}
    data = bytes(buffer[320 if command == 14 else 312 :]).rstrip(b"\0").decode() if command in (5, 14) else ""
    words = [words.get(command, "message"), dm_control._decoded(device) if device else name or uuid, data]
    return " ".join(words).rstrip()

def hooked_request(descriptor, command, buffer):
    if command == dm_control.GET_VERSION:
        return ioctl(descriptor, command, buffer)
    words = told(command, buffer)
    requests.append({"request": words, "sent": bytes(buffer).hex()})
    meanwhile(words)
    try:
        ioctl(descriptor, command, buffer)
        requests[-1]["answer"] = bytes(buffer).hex()
    except OSError as err:
        requests[-1]["errno"] = err.errno
        raise

probe.Host.run = hooked
dm_control._ioctl = hooked_request
os.makedirs("/run/reaper", exist_ok=True)
host = probe.Host(probe.boottime() + ask["seconds"], "/run/reaper")
host.boot_id = ask.get("boot_id") or host.boot_id

def work(_item):
    if ask["act"] == "collect":
        return kind.collect(ask["rules"], host)
    if ask["act"] == "prepare":
        return kind.prepare(ask["tokens"], ask["rules"], host)
    return [getattr(kind, ask["act"])(token, ask["rules"], host) for token in ask["tokens"]]

begin = time.monotonic()
try:
    # In a child, as the reaper does it, where something is to hang; else here, where the hooks can be looked at.
    answer = {"result": probe.Worker(work).call(None, ask["seconds"]) if ask.get("child") else work(None)}
except Exception as err:
    answer = {"error": type(err).__name__, "text": str(err)}
seconds = time.monotonic() - begin
told_of = {"requests": requests} if ask.get("record") else {"asked": [one["request"] for one in requests]}
print(json.dumps(dict(answer, seconds=seconds, commands=ran, **told_of)))
"""


class Reaper:
    """A test host, seen through dmsetup and through the collection's code."""

    kind = "dm_thin"

    def __init__(self, state):
        inventory = (state / "inventory.yml").read_text()
        options, sockets = (
            json.loads(re.search("%s: (.*)" % key, inventory).group(1))
            for key in ("ansible_ssh_common_args", "ansible_control_path_dir")
        )
        # One connection for all: each act is a round trip of its own, and a new connection costs more than most acts.
        shared = ["-oControlMaster=auto", "-oControlPersist=60", "-oControlPath=%s/%%C" % sockets]
        self.ssh = ["ssh", "-i", str(state / "key"), *shlex.split(options), *shared, "root@" + NAME]
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            archive.add(ROOT / "plugins/module_utils", PACKAGE)
        self.shell("mkdir -p /tmp/reaper && tar -C /tmp/reaper -xf -", data=buffer.getvalue())
        self.shell("cat > /tmp/driver.py", data=DRIVER.encode())

    def shell(self, command, data=b"", check=True):
        command = "export DM_DISABLE_UDEV=1 LC_ALL=C PATH=/usr/sbin:/usr/bin:/sbin:/bin:/opt/test; " + command
        done = subprocess.run([*self.ssh, command], input=data, capture_output=True, timeout=60, check=False)
        assert not check or done.returncode == 0, (done.stdout.decode(), done.stderr.decode())
        return done.stdout.decode()

    def ask(self, act, tokens=(), rules=None, before=(), seconds=30, **more):
        """Return the driver's answer, None when it was killed on the way."""
        ask = dict(more, kind=self.kind, act=act, tokens=list(tokens), rules=rules or RULES)
        ask.update(before=list(before), seconds=seconds)
        text = self.shell("python3 /tmp/driver.py || [ $? = 9 ]", data=json.dumps(ask).encode())
        return json.loads(text) if text else None

    def collect(self, rules=None, **more):
        """Return ``{name: resource}``."""
        answer = self.ask("collect", rules=rules, **more)
        assert "error" not in answer, answer
        return {one["name"]: one for one in answer["result"]["resources"]}

    def tokens(self, *names, **more):
        """Return tokens of volumes that are there now."""
        found = self.collect(**more)
        keys = ("kind", "name", "vm_id", "identity", "details")
        return [dict({key: found[name][key] for key in keys}, stop=False) for name in names]

    def prepared(self, *names):
        """Return tokens as they are in the ledger when the reaper begins to act."""
        tokens = self.tokens(*names)
        added = self.ask("prepare", tokens)["result"]
        return [dict(one, details=dict(one["details"], **added.get(one["name"], {}))) for one in tokens]

    def act(self, act, tokens, **more):
        """Return the only outcome of an act on one token."""
        answer = self.ask(act, tokens, **more)
        assert answer is None or "error" not in answer, answer
        return answer and answer["result"][0]

    def killed_before_delete(self, name):
        """Return the token of a volume that was deactivated by a reaper that did not live to delete it."""
        tokens = self.prepared(name)
        assert self.act("remove", tokens, before=[{"command": "delete", "crash": True}]) is None
        assert name not in self.names()
        return [dict(one, resume=True) for one in tokens]

    def names(self):
        """Return the names of all devices, as the kernel has them."""
        return set(self.shell("cat $(ls -d /sys/block/dm-*/dm/name) < /dev/null").split("\n")) - {""}

    def status(self, pool):
        return self.shell("dmsetup status --noflush %s" % pool).split()

    def used(self, pool):
        """Return the bytes that a pool has given to volumes; the block size of mkpool is 64 KiB."""
        return int(self.status(pool)[5].split("/")[0]) * 65536


class Pool:
    """A pool, and volumes on it that are 32 MiB large."""

    def __init__(self, reaper, name, size):
        self.reaper, self.name = reaper, name
        reaper.shell("mkpool %s %d" % (name, size))

    def volume(self, name, thin_id, mib=0, uuid=None, raw=False):
        options = ("--manglename none " if raw else "") + ("--uuid %s" % shlex.quote(uuid) if uuid else "")
        self.message("create_thin %d" % thin_id)
        self.activate(name, thin_id, options)
        if mib:
            self.reaper.shell("dd if=/dev/urandom of=/dev/mapper/%s bs=1M count=%d oflag=direct" % (name, mib))

    def activate(self, name, thin_id, options=""):
        table = "0 65536 thin /dev/mapper/%s %d" % (self.name, thin_id)
        self.reaper.shell("dmsetup create %s --table '%s' -- %s" % (options, table, shlex.quote(name)))

    def message(self, text):
        self.reaper.shell("dmsetup message %s 0 '%s'" % (self.name, text))

    def has_id(self, thin_id):
        """Tell whether the pool still has the thin id: only then a volume can be activated with it."""
        table = "0 65536 thin /dev/mapper/%s %d" % (self.name, thin_id)
        make = "dmsetup create probe --table '%s' 2>/dev/null && dmsetup remove probe && echo yes" % table
        return self.reaper.shell(make, check=False) == "yes\n"


@contextlib.contextmanager
def started(kind_of_reaper, state):
    """Give a Reaper, or another kind of it, of a host of its own."""
    command = [sys.executable, str(HOSTS)]
    start = [*command, "up", "--kind", "kernel", "--name", NAME, "--state", str(state), "--no-containerd"]
    try:
        subprocess.run(start, check=True)
        yield kind_of_reaper(state)
    finally:
        subprocess.run([*command, "down", "--state", str(state)], check=False)


@contextlib.contextmanager
def pool_of(reaper, first="", also=""):
    """Give a Pool, and take away all that there is of device-mapper then; before and besides what a test has more."""
    yield Pool(reaper, "hyper-thinpool", 128)
    clean = first + UNUSE + "; dmsetup remove_all; dmsetup remove_all; losetup -D; rm -rf /run/thin /run/reaper " + also
    reaper.shell(clean + "; find /dev/mapper -type b -delete", check=False)
    assert reaper.names() == set()


@pytest.fixture(scope="module")
def reaper(tmp_path_factory):
    with started(Reaper, tmp_path_factory.mktemp("thin-host")) as one:
        yield one


@pytest.fixture
def pool(reaper):
    with pool_of(reaper) as one:
        yield one


def test_gives_the_blocks_back_and_touches_nothing_else(reaper, pool):
    pool.volume("hyper-rw-vdead", 1, mib=9)
    pool.volume("hyper-rw-vlive", 2, mib=5)
    before = reaper.shell("sha256sum /dev/mapper/hyper-rw-vlive"), reaper.used(pool.name)
    found = reaper.collect()
    assert {name: one["bytes"] for name, one in found.items()} == {"hyper-rw-vdead": 9 * MIB, "hyper-rw-vlive": 5 * MIB}
    assert 0 <= found["hyper-rw-vdead"]["age_seconds"] < 60

    tokens = reaper.tokens("hyper-rw-vdead")
    assert reaper.act("inspect", tokens) is None
    outcome = reaper.act("remove", tokens)

    assert (outcome["outcome"], outcome["message"], outcome["bytes"]) == ("reaped", "", 9 * MIB)
    assert reaper.names() == {pool.name, "hyper-rw-vlive"}
    assert reaper.shell("ls /dev/mapper").split() == ["control", "hyper-rw-vlive", pool.name]
    assert not pool.has_id(1)
    assert (reaper.shell("sha256sum /dev/mapper/hyper-rw-vlive"), reaper.used(pool.name)) == (
        before[0],
        before[1] - 9 * MIB,
    )
    assert reaper.act("remove", tokens)["outcome"] == "already_gone"


HOSTILE = ["hyper-rw-v a\"b'\\c", "hyper-rw-v\nline", "hyper-rw-v$(touch x){{ 7*7 }}", "hyper-rw-v\u00e9\u2603", "-rf"]


def test_row_36_hostile_names_are_data(reaper, pool):
    pool.volume("hyper-rw-vdead", 1, mib=1)
    for number, name in enumerate(HOSTILE):
        pool.volume(name, 10 + number)
    pool.volume("hyper-rw-v\nhyper-rw-vforged: 0 65536 thin 254:0 1", 20, raw=True)
    pool.volume("hyper-rw-vraw blank", 21, raw=True)
    pool.volume("hyper-rw-vlvm", 22, uuid="LVM-x")
    pool.volume("hyper-rw-vuuid", 23, mib=1, uuid="a/b -c\\")
    pool.volume("--dash", 24, mib=1)
    others = reaper.names() - {"hyper-rw-vdead", "hyper-rw-vuuid", "--dash"}
    rules = [*RULES, {"name": "--(?P<vm_id>dash)", "pool": pool.name}, {"name": "-(?P<vm_id>rf)", "pool": "another"}]

    found = reaper.collect(rules=rules)
    assert sorted(found) == ["--dash", "hyper-rw-vdead", "hyper-rw-vlvm", "hyper-rw-vuuid"]
    for name in found:
        outcome = reaper.act("remove", reaper.tokens(name, rules=rules), rules=rules)
        assert outcome["outcome"] == ("deferred" if name == "hyper-rw-vlvm" else "reaped"), outcome
    assert reaper.names() == others
    assert reaper.used(pool.name) == 0
    assert "x" not in reaper.shell("ls").split()


def test_another_pool_or_vm_is_not_ours(reaper, pool):
    pool.volume("hyper-rw-vdead", 1)
    (token,) = reaper.tokens("hyper-rw-vdead")
    for more in ({"rules": [dict(RULES[0], pool="another")]}, {"rules": [{"name": "hyper-rw-v(?P<vm_id>.*)"}]}):
        assert reaper.act("remove", [token], **more)["outcome"] == "failed"
    assert "hyper-rw-vdead" in reaper.names()


UNUSE = (
    "kill $(cat /run/user); rm /run/user; umount /mnt; dmsetup remove on-it; swapoff -a; "
    "losetup -d $(losetup --noheadings -O NAME -j /dev/mapper/hyper-rw-vdead); sleep 0.1"
)
# Has the volume in its memory only: it has closed it.
MAPPED = """
import ctypes, os, time
volume = os.open("/dev/mapper/hyper-rw-vdead", os.O_RDONLY)
ctypes.CDLL(None).mmap(None, ctypes.c_size_t(4096), 1, 1, volume, ctypes.c_long(0))
os.close(volume)
open("/run/mapped", "w").close()
time.sleep(1000)
"""


@pytest.mark.parametrize(
    ("use", "kind", "named", "parts"),
    [
        (
            "setsid sleep 1000 < /dev/mapper/hyper-rw-vdead > /dev/null 2>&1 & echo $! > /run/user; "
            "until dmsetup info -c --noheadings -o open hyper-rw-vdead | grep -q 1; do sleep 0.05; done",
            "process",
            " sleep (",
            {"by": ["fd 0"], "fd": 0, "command": "sleep", "container": None, "mount_namespace": None},
        ),
        (
            "rm -f /run/mapped; setsid python3 -c '%s' < /dev/null > /dev/null 2>&1 & echo $! > /run/user; "
            "until [ -e /run/mapped ]; do sleep 0.05; done" % MAPPED,
            "process",
            "map)",
            {"by": ["map"], "fd": None, "command": "python3"},
        ),
        (
            "mkfs.ext4 -qF /dev/mapper/hyper-rw-vdead; mount /dev/mapper/hyper-rw-vdead /mnt",
            "mount",
            "/mnt",
            {"mount_namespace": None},
        ),
        (
            "echo 0 2048 linear /dev/mapper/hyper-rw-vdead 0 | dmsetup create on-it",
            "device",
            "on-it",
            {"device": r"\d+:\d+"},
        ),
        ("losetup -f /dev/mapper/hyper-rw-vdead", "device", "loop", {"device": r"7:\d+"}),
        ("mkswap /dev/mapper/hyper-rw-vdead; swapon /dev/mapper/hyper-rw-vdead", "swap", "/dev/", {}),
    ],
)
def test_row_20_21_a_busy_one_stays_and_its_user_is_named(reaper, pool, use, kind, named, parts):
    pool.volume("hyper-rw-vdead", 1, mib=1)
    tokens = reaper.tokens("hyper-rw-vdead")
    reaper.shell(use)
    assert reaper.collect()["hyper-rw-vdead"]["in_use"]
    for act in ("inspect", "remove"):
        outcome = reaper.act(act, tokens)
        assert (outcome["outcome"], outcome["message"]) == ("deferred", "busy")
        assert [(one["type"], named in one["name"]) for one in outcome["holders"]] == [(kind, True)], outcome
        (holder,) = outcome["holders"]
        for key, part in parts.items():
            assert holder[key] == part or key == "device" and re.fullmatch(part, holder[key]), holder
    # Somebody opens it after we looked: the kernel itself refuses, and nothing is deleted.
    reaper.shell(UNUSE, check=False)
    outcome = reaper.act("remove", tokens, before=[{"command": "remove", "shell": use}])
    assert (outcome["outcome"], outcome["message"]) == ("deferred", "busy")
    reaper.shell(UNUSE, check=False)
    assert reaper.used(pool.name) > 0
    assert reaper.act("remove", tokens)["outcome"] == "reaped"
    assert reaper.used(pool.name) == 0


AGAIN = "dmsetup remove hyper-rw-vdead; dmsetup create hyper-rw-vdead --table '0 65536 thin /dev/mapper/%s 1'"


@pytest.mark.parametrize("moment", ["", "info", "table", "status", "rename", "remove"])
def test_row_19_the_same_name_and_id_again_is_another_object(reaper, pool, moment):
    pool.volume("hyper-rw-vdead", 1, mib=2)
    tokens = reaper.tokens("hyper-rw-vdead")
    if moment:
        outcome = reaper.act("remove", tokens, before=[{"command": moment, "shell": AGAIN % pool.name}])
    else:
        reaper.shell(AGAIN % pool.name)
        outcome = reaper.act("remove", tokens)
    assert outcome["outcome"] == ("already_gone" if moment == "remove" else "identity_changed"), outcome
    assert "hyper-rw-vdead" in reaper.names()
    assert reaper.used(pool.name) == 2 * MIB
    assert reaper.tokens("hyper-rw-vdead")[0]["identity"] != tokens[0]["identity"]


def test_activated_again_between_remove_and_delete(reaper, pool):
    pool.volume("hyper-rw-vdead", 1, mib=2)
    back = "dmsetup create hyper-rw-vdead --table '0 65536 thin /dev/mapper/hyper-thinpool 1'"
    before = [{"command": "delete", "shell": back}]
    outcome = reaper.act("remove", reaper.tokens("hyper-rw-vdead"), before=before)
    assert outcome["outcome"] == "failed" and "thin id 1 of pool hyper-thinpool remains" in outcome["message"]
    assert outcome["unfinished"]
    assert reaper.used(pool.name) == 2 * MIB


def test_row_22_a_suspended_one_is_not_touched_and_nothing_hangs(reaper, pool):
    pool.volume("hyper-rw-vdead", 1, mib=1)
    tokens = reaper.tokens("hyper-rw-vdead")
    reaper.shell("dmsetup suspend hyper-rw-vdead")
    assert reaper.collect()["hyper-rw-vdead"]["holders"] == [{"type": "suspended", "name": "hyper-rw-vdead"}]
    answer = reaper.ask("remove", tokens)
    assert (answer["result"][0]["outcome"], answer["commands"], answer["asked"]) == ("deferred", [], [])
    reaper.shell("dmsetup resume hyper-rw-vdead")
    assert reaper.act("remove", tokens)["outcome"] == "reaped"


BAD = """
mkdir -p /run/thin/bad; truncate -s 8M /run/thin/bad/m; truncate -s 32M /run/thin/bad/d
m=$(losetup -f --show /run/thin/bad/m) d=$(losetup -f --show /run/thin/bad/d)
dmsetup create badmeta --table "0 16384 linear $m 0"
dmsetup create bad --table "0 65536 thin-pool /dev/mapper/badmeta $d 128 0 1 skip_block_zeroing"
dmsetup message bad 0 'create_thin 1'; dmsetup create hyper-rw-vbad --table '0 65536 thin /dev/mapper/bad 1'
dd if=/dev/zero of=/dev/mapper/hyper-rw-vbad bs=1M count=1 oflag=direct
"""


def test_row_22_a_hang_ends_at_the_deadline_and_the_next_one_finishes(reaper, pool):
    reaper.shell(BAD)
    tokens = reaper.prepared("hyper-rw-vbad")
    suspend = {"command": "delete", "shell": "dmsetup suspend badmeta"}
    answer = reaper.ask("remove", tokens, before=[suspend], seconds=3, child=True)
    assert answer["error"] == "DeadlineExceeded" and answer["seconds"] < 4
    reaper.shell("dmsetup resume badmeta; sleep 1")
    outcome = reaper.act("remove", [dict(one, resume=True) for one in tokens])
    # The message that hung went through once it could.
    assert outcome["outcome"] in ("already_gone", "reaped")
    assert reaper.used("bad") == 0


def test_row_23_no_deletes_in_a_failed_pool(reaper, pool):
    reaper.shell(BAD)
    tokens = reaper.tokens("hyper-rw-vbad")
    fail = "dmsetup load badmeta --table '0 16384 error'; dmsetup suspend badmeta; dmsetup resume badmeta; "
    reaper.shell(fail + "dmsetup message bad 0 'create_thin 5'; sleep 1.5", check=False)
    assert reaper.status("bad")[3:] == ["Fail"]
    found = reaper.collect()["hyper-rw-vbad"]
    assert (found["holders"], found["bytes"]) == ([{"type": "pool", "name": "bad: Fail"}], None)
    assert reaper.act("remove", tokens)["message"] == "its pool has failed"
    assert "hyper-rw-vbad" in reaper.names()


def test_row_23_no_deletes_in_a_read_only_pool(reaper, pool):
    pool.volume("hyper-rw-vdead", 1, mib=1)
    tokens = reaper.tokens("hyper-rw-vdead")
    load = (
        "dmsetup load {0} --table \"$(dmsetup table {0} | sed 's/ 1 skip_block_zeroing */ {1}/')\"; "
        "dmsetup suspend {0}; dmsetup resume {0}"
    )
    reaper.shell(load.format(pool.name, "2 skip_block_zeroing read_only"))
    assert reaper.collect()["hyper-rw-vdead"]["holders"] == [{"type": "pool", "name": "hyper-thinpool: read-only"}]
    outcome = reaper.act("remove", tokens)
    assert (outcome["outcome"], outcome["message"]) == ("deferred", "pool hyper-thinpool: read-only")
    assert "hyper-rw-vdead" in reaper.names()


def test_a_pool_out_of_space_is_saved_by_the_delete(reaper, pool):
    full = Pool(reaper, "full", 8)
    full.volume("hyper-rw-vdead", 1, mib=4)
    full.volume("hyper-rw-vlive", 2)
    write = "dd if=/dev/zero of=/dev/mapper/hyper-rw-vlive bs=1M count=6 oflag=direct"
    reaper.shell("setsid %s >/dev/null 2>/tmp/written </dev/null & sleep 2" % write)
    assert reaper.status("full")[7] == "out_of_data_space"
    outcome = reaper.act("remove", reaper.tokens("hyper-rw-vdead"))
    assert (outcome["outcome"], outcome["bytes"] > 0) == ("reaped", True)
    reaper.shell("for i in $(seq 50); do grep -q copied /tmp/written && break; sleep 0.1; done; rm /tmp/written")
    assert (reaper.status("full")[7], reaper.used("full")) == ("rw", 6 * MIB)


def test_row_24_a_metadata_snapshot_of_somebody_else_is_respected(reaper, pool):
    pool.volume("hyper-rw-vdead", 1, mib=1)
    tokens = reaper.tokens("hyper-rw-vdead")
    pool.message("reserve_metadata_snap")
    held = reaper.status(pool.name)[6]
    (holder,) = reaper.collect()["hyper-rw-vdead"]["holders"]
    assert holder["name"] == "hyper-thinpool: its metadata snapshot is held by somebody else (block %s)" % held
    assert "record" not in reaper.ask("prepare", tokens)["result"]["hyper-rw-vdead"]
    assert reaper.act("remove", tokens)["outcome"] == "deferred"
    assert reaper.status(pool.name)[6] == held
    assert "hyper-rw-vdead" in reaper.names()


def test_a_metadata_snapshot_that_a_killed_reaper_left_is_known_as_ours(reaper, pool):
    pool.volume("hyper-rw-vdead", 1, mib=1)
    tokens = reaper.tokens("hyper-rw-vdead")
    assert reaper.ask("prepare", tokens, before=[{"command": "thin_dump", "crash": True}]) is None
    assert reaper.status(pool.name)[6] != "-"
    assert reaper.collect()["hyper-rw-vdead"]["holders"] == []
    assert reaper.ask("prepare", tokens)["result"]["hyper-rw-vdead"]["record"]["device"][3] == 16
    assert reaper.status(pool.name)[6] == "-"


def test_row_30_killed_between_remove_and_delete(reaper, pool):
    pool.volume("hyper-rw-vdead", 1, mib=3)
    tokens = reaper.killed_before_delete("hyper-rw-vdead")
    assert reaper.used(pool.name) == 3 * MIB
    assert reaper.act("inspect", tokens) is None
    outcome = reaper.act("remove", tokens)
    assert (outcome["outcome"], outcome["bytes"]) == ("reaped", 3 * MIB)
    assert (reaper.used(pool.name), reaper.status(pool.name)[6]) == (0, "-")
    assert reaper.act("remove", tokens)["outcome"] == "already_gone"


def test_killed_before_remove(reaper, pool):
    pool.volume("hyper-rw-vdead", 1, mib=3)
    tokens = reaper.prepared("hyper-rw-vdead")
    assert reaper.act("remove", tokens, before=[{"command": "remove", "crash": True}]) is None
    assert reaper.act("remove", [dict(tokens[0], resume=True)])["outcome"] == "reaped"
    assert reaper.used(pool.name) == 0


def test_row_30_power_cut_between_remove_and_delete(reaper, pool):
    pool.volume("hyper-rw-vdead", 1, mib=3)
    table = reaper.shell("dmsetup table " + pool.name).strip()
    tokens = reaper.killed_before_delete("hyper-rw-vdead")
    reaper.shell("dmsetup remove " + pool.name)
    outcome = reaper.act("remove", tokens, boot_id="another-boot")
    assert (outcome["outcome"], outcome["unfinished"]) == ("deferred", True)
    assert outcome["message"] == "thin id 1 of pool hyper-thinpool remains: the pool is not active"
    reaper.shell("dmsetup create %s --table '%s'" % (pool.name, table))
    assert reaper.act("remove", tokens, boot_id="another-boot")["outcome"] == "reaped"
    assert reaper.used(pool.name) == 0


@pytest.mark.parametrize(
    ("change", "result", "message"),
    [
        ("activate", "identity_changed", "in use again, as new name"),
        ("rewritten", "identity_changed", "is another volume now"),
        ("deleted", "already_gone", "was deleted"),
        ("unrecorded", "deferred", "was not recorded"),
        ("empty", "deferred", "nothing tells it from a new one"),
        ("pool made anew", "deferred", "nothing tells it from a new one"),
        ("held", "deferred", "held by somebody else"),
        ("no thin_dump", "deferred", "thin_dump is not installed"),
        ("not ours", "failed", "no rule says"),
    ],
)
def test_what_cannot_be_proved_is_not_deleted(reaper, pool, change, result, message):
    pool.volume("hyper-rw-vdead", 1, mib=0 if change == "empty" else 3)
    tokens = reaper.killed_before_delete("hyper-rw-vdead")
    more = {}
    if change == "activate":
        pool.activate("new name", 1, "--manglename none")
    elif change == "rewritten":
        pool.message("delete 1")
        pool.volume("x", 1, mib=2)
        reaper.shell("dmsetup remove x")
    elif change == "deleted":
        pool.message("delete 1")
    elif change == "unrecorded":
        del tokens[0]["details"]["record"]
    elif change == "pool made anew":
        tokens[0]["details"]["record"]["pool"] = [7, 0]
    elif change == "held":
        pool.message("reserve_metadata_snap")
    elif change == "no thin_dump":
        reaper.shell("mv /usr/sbin/thin_dump /usr/sbin/thin_dump.off")
    elif change == "not ours":
        more = {"rules": [{"name": "other-(?P<vm_id>.*)"}]}
    there, used = pool.has_id(1), reaper.used(pool.name)
    outcome = reaper.act("remove", tokens, **more)
    reaper.shell("mv /usr/sbin/thin_dump.off /usr/sbin/thin_dump", check=False)
    assert (outcome["outcome"], message in outcome["message"]) == (result, True), outcome
    assert outcome.get("unfinished", False) is (result == "deferred")
    assert (pool.has_id(1), reaper.used(pool.name)) == (there, used)


def test_two_hundred_volumes_cost_four_commands(reaper, pool):
    make = 'for i in $(seq 200); do dmsetup message {0} 0 "create_thin $i"; dmsetup create hyper-rw-v$i --table '
    reaper.shell((make + '"0 65536 thin /dev/mapper/{0} $i"; done').format(pool.name))
    answers = [reaper.ask("collect") for _attempt in range(5)]
    assert [len(one["result"]["resources"]) for one in answers] == [200] * 5
    assert {len(one["commands"]) for one in answers} == {4}
    bare = "; ".join("%s > /dev/null" % command for command in answers[0]["commands"])
    timed = "import time, os; t = time.monotonic(); os.system(%r); print(time.monotonic() - t)" % bare
    alone = min(float(reaper.shell("python3 -c %s" % shlex.quote(timed))) for _attempt in range(5))
    ours = min(one["seconds"] for one in answers)
    print("200 volumes: collect %.3f s, its four commands alone %.3f s" % (ours, alone))
    assert ours < 2 * alone + 0.02


@pytest.mark.skipif(os.path.exists("/sys/class/misc/device-mapper"), reason="this machine has device-mapper")
def test_row_39_a_machine_without_device_mapper_has_none():
    with pytest.raises(probe.Absent, match="no device-mapper"):
        dm_thin.collect(RULES, probe.Host(probe.boottime() + 5))


def test_a_witness_tells_of_all_volumes_with_four_commands(reaper, pool):
    for number in range(20):
        pool.volume("hyper-rw-v%d" % number, number, mib=1 if number == 3 else 0)
    tokens = reaper.tokens(*["hyper-rw-v%d" % number for number in range(20)])
    answer = reaper.ask("witness", tokens)
    assert len(answer["commands"]) == 4 and len(answer["result"]) == 20
    (told,) = answer["result"][3]
    assert told["title"] == "dm_thin" and "hyper-rw-v3 in pool hyper-thinpool" in told["source"]
    lines = dict(line.split(": ", 1) for line in told["text"].splitlines())
    assert lines["table of the volume"].startswith("sectors=65536 words=") and "'3'" in lines["table of the volume"]
    assert "'2048'" in lines["status of the volume"] and "'rw'" in lines["status of the pool"]
    assert "name=hyper-rw-v3" in lines["info of the volume"]
    reaper.shell("dmsetup remove hyper-rw-v3")
    assert reaper.ask("witness", tokens[3:4])["error"] == "ProbeError"
