# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The thin_id kind on a host with a kernel of its own, real thin pools and a real containerd with its devmapper
snapshotter, compared with what dmsetup says."""

from __future__ import annotations

import json
import os
import shlex
import time

import pytest
from integration.test_dm_thin import BAD, MIB, Pool, Reaper, pool_of, started

POOL = "hyper-thinpool"
RULES = [{"pool": POOL}]
LEDGER = "/run/reaper/prod/ledger.json"
CONTAINERD = f"""
version = 2
root = "/run/ctd/root"
state = "/run/ctd/state"
disabled_plugins = ["io.containerd.grpc.v1.cri"]
[plugins."io.containerd.snapshotter.v1.devmapper"]
pool_name = "{POOL}"
root_path = "/run/ctd/devmapper"
base_image_size = "32MB"
fs_type = "ext4"
"""
START = """
mkdir -p /etc/containerd /run/ctd; cat > /etc/containerd/config.toml
containerd > /run/ctd/log 2>&1 < /dev/null & echo $! > /run/ctd/pid
for i in $(seq 100); do ctr version > /dev/null 2>&1 && exit 0; sleep 0.1; done; cat /run/ctd/log >&2; exit 1
"""
STOP = (
    "[ ! -e /run/ctd/pid ] || { kill $(cat /run/ctd/pid); "
    "while kill -0 $(cat /run/ctd/pid) 2> /dev/null; do sleep 0.1; done; }; "
)
CTR = "ctr -n vms snapshots --snapshotter devmapper "

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.timeout(300),
    pytest.mark.skipif(os.geteuid() != 0, reason="test hosts need root"),
]


class ThinIds(Reaper):
    """The same host, looked at for its thin ids."""

    kind = "thin_id"

    def ask(self, act, tokens=(), rules=None, before=(), seconds=30, **more):
        return super().ask(act, tokens, rules or RULES, before, seconds, **more)

    def ids(self, **more):
        """Return the thin ids that are found in the pool."""
        return {one["details"]["thin_id"] for one in self.collect(**more).values()}

    def token(self, thin_id, pool=POOL):
        return self.tokens("%s/%d" % (pool, thin_id))

    def unavailable(self):
        """Return why the kind could not be read."""
        answer = self.ask("collect")
        assert answer.get("error") == "ProbeError", answer
        return answer["text"]

    def file(self, path, text):
        self.shell("mkdir -p %s && cat > %s" % (os.path.dirname(path), path), data=text.encode())


@pytest.fixture(scope="module")
def reaper(tmp_path_factory):
    with started(ThinIds, tmp_path_factory.mktemp("thin-id-host")) as one:
        yield one


@pytest.fixture
def pool(reaper):
    with pool_of(reaper, first=STOP, also="/run/ctd /etc/containerd /run/containerd") as one:
        yield one


def until(is_so):
    for _attempt in range(50):
        if is_so():
            return
        time.sleep(0.2)
    raise AssertionError("not in ten seconds")


def unmapped(pool, thin_id, mib):
    """Make a volume with something in it and deactivate it."""
    pool.volume("gone", thin_id, mib=mib)
    pool.reaper.shell("dmsetup remove gone")


def test_gives_back_what_nobody_maps_and_touches_nothing_else(reaper, pool):
    unmapped(pool, 1, 9)
    pool.volume("hyper-rw-vlive", 2, mib=5)
    before = reaper.shell("sha256sum /dev/mapper/hyper-rw-vlive"), reaper.used(pool.name)
    found = reaper.collect()
    assert list(found) == ["hyper-thinpool/1"]
    (one,) = found.values()
    assert (one["vm_id"], one["bytes"], one["in_use"], one["holders"], one["age_seconds"]) == (
        "thin:hyper-thinpool:1", 9 * MIB, False, [], None,
    )
    assert reaper.status(pool.name)[6] == "-"

    tokens = reaper.token(1)
    assert reaper.act("inspect", tokens) is None
    assert pool.has_id(1)
    outcome = reaper.act("remove", tokens)

    assert (outcome["outcome"], outcome["message"], outcome["bytes"]) == ("reaped", "", 9 * MIB)
    assert not pool.has_id(1)
    assert (reaper.shell("sha256sum /dev/mapper/hyper-rw-vlive"), reaper.used(pool.name)) == (
        before[0],
        before[1] - 9 * MIB,
    )
    assert reaper.status(pool.name)[6] == "-"
    assert reaper.act("remove", tokens)["outcome"] == "already_gone"


def test_what_is_given_back_is_measured_where_blocks_are_shared(reaper, pool):
    pool.volume("origin", 1, mib=6)
    reaper.shell("dmsetup suspend origin; dmsetup message %s 0 'create_snap 2 1'; dmsetup resume origin" % pool.name)
    pool.activate("clone", 2)
    reaper.shell("dd if=/dev/urandom of=/dev/mapper/clone bs=1M seek=8 count=3 oflag=direct")
    before = reaper.shell("sha256sum < /dev/mapper/clone")
    reaper.shell("dmsetup remove origin")
    assert reaper.ids() == {1}
    outcome = reaper.act("remove", reaper.token(1))
    assert (outcome["outcome"], outcome["bytes"]) == ("reaped", 0)
    assert reaper.shell("sha256sum < /dev/mapper/clone") == before
    reaper.shell("dmsetup remove clone")
    (one,) = reaper.collect().values()
    assert one["bytes"] == 9 * MIB
    outcome = reaper.act("remove", reaper.token(2))
    assert (outcome["outcome"], outcome["bytes"], reaper.used(pool.name)) == ("reaped", 9 * MIB, 0)


@pytest.mark.parametrize("moment", ["before", "thin_dump", "table", "delete"])
def test_one_that_becomes_active_meanwhile_stays(reaper, pool, moment):
    unmapped(pool, 1, 2)
    tokens = reaper.token(1)
    activate = "dmsetup create back --table '0 65536 thin /dev/mapper/%s 1'" % pool.name
    if moment == "before":
        reaper.shell(activate)
        outcome = reaper.act("remove", tokens)
    else:
        outcome = reaper.act("remove", tokens, before=[{"command": moment, "shell": activate}])
    assert outcome["outcome"] == "deferred", outcome
    assert reaper.used(pool.name) == 2 * MIB
    assert reaper.ids() == set()


def test_a_table_that_is_loaded_and_not_yet_active_has_the_volume(reaper, pool):
    unmapped(pool, 1, 2)
    tokens = reaper.token(1)
    reaper.shell("dmsetup create soon --notable; dmsetup load soon --table '0 65536 thin /dev/mapper/%s 1'" % pool.name)
    assert reaper.ids() == set()
    assert reaper.act("remove", tokens)["outcome"] == "deferred"
    reaper.shell("dmsetup resume soon")


def test_a_device_of_two_volumes_has_both(reaper, pool):
    for thin_id in (1, 2):
        unmapped(pool, thin_id, 1)
    table = f"0 65536 thin /dev/mapper/{pool.name} 1\\n65536 65536 thin /dev/mapper/{pool.name} 2\\n"
    reaper.shell("printf '%s' | dmsetup create joined" % table)
    assert reaper.ids() == set()


@pytest.mark.parametrize(
    ("change", "result", "message"),
    [
        ("used since", "identity_changed", "or it was used"),
        ("cloned since", "identity_changed", "or it was used"),
        ("another", "identity_changed", "or it was used"),
        ("deleted", "already_gone", ""),
        ("pool made anew", "deferred", "nothing tells it from a new one"),
        ("held", "deferred", "held by somebody else"),
        ("no thin_dump", "Absent", "thin_dump is not installed"),
        ("no rule", "failed", "no rule names its pool"),
        ("inactive pool", "deferred", "not active"),
        ("read-only", "deferred", "read-only"),
        ("ledger", "deferred", "ledger thin id 1 has it"),
    ],
)
def test_what_cannot_be_proved_is_not_deleted(reaper, pool, change, result, message):
    unmapped(pool, 1, 3)
    tokens, more = reaper.token(1), {}
    if change == "used since":
        pool.activate("x", 1)
        reaper.shell("dd if=/dev/urandom of=/dev/mapper/x bs=1M seek=9 count=1 oflag=direct; dmsetup remove x")
    elif change == "cloned since":
        pool.message("create_snap 2 1")
    elif change == "another":
        pool.message("delete 1")
        unmapped(pool, 1, 2)
    elif change == "deleted":
        pool.message("delete 1")
    elif change == "pool made anew":
        tokens[0]["details"]["record"]["pool"] = [7, 0]
    elif change == "held":
        pool.message("reserve_metadata_snap")
    elif change == "no thin_dump":
        reaper.shell("mv /usr/sbin/thin_dump /usr/sbin/thin_dump.off")
    elif change == "no rule":
        more = {"rules": [{"pool": "another"}]}
    elif change == "inactive pool":
        table = reaper.shell("dmsetup table " + pool.name).strip()
        reaper.shell("dmsetup remove " + pool.name)
    elif change == "read-only":
        reload(reaper, pool.name, "2 skip_block_zeroing read_only")
    elif change == "ledger":
        remember(reaper, intents=[aside(1)])
    answer = reaper.ask("remove", tokens, **more)
    reaper.shell("mv /usr/sbin/thin_dump.off /usr/sbin/thin_dump", check=False)
    if change == "inactive pool":
        reaper.shell("dmsetup create %s --table '%s'" % (pool.name, table))
    outcome = answer["result"][0] if "result" in answer else {"outcome": answer["error"], "message": answer["text"]}
    assert (outcome["outcome"], message in outcome["message"]) == (result, True), outcome
    assert pool.has_id(1) is (change != "deleted")


def reload(reaper, pool, features):
    table = f"dmsetup table {pool} | sed 's/ 1 skip_block_zeroing */ {features}/'"
    reaper.shell(f'dmsetup load {pool} --table "$({table})"; dmsetup suspend {pool}; dmsetup resume {pool}')


def aside(thin_id, **changes):
    """Return what a ledger has of a volume that a reaper deactivated."""
    token = {"kind": "dm_thin", "name": "hyper-rw-v1", "vm_id": "v1", "identity": "x", "stop": False}
    details = {"pool": POOL, "pool_uuid": "", "pool_device": "254:0", "thin_id": thin_id}
    return dict(token, details=dict(details, **changes))


def remember(reaper, realm="prod", **changes):
    ledger = {
        "version": 1, "realm": realm, "host": None, "machine_id": None, "generation": 1,
        "manifest": {"epochs": {}, "count": None, "counts": {}},
        "strikes": {}, "intents": [], "reaped": {}, "latch": None,
    }
    reaper.file("/run/reaper/%s/ledger.json" % realm, json.dumps(dict(ledger, **changes)))


def test_what_the_reaper_itself_put_aside_is_named_in_a_ledger(reaper, pool):
    for thin_id in (1, 2, 3, 4):
        unmapped(pool, thin_id, 1)
    remember(reaper, intents=[aside(1), dict(aside(4), kind="thin_id")])
    since = {"since": 1.0, "boot_id": "b", "sweep": "s", "state": "aside"}
    held = [dict(one, **since) for one in (aside(2), aside(3, pool="another", pool_uuid="u"))]
    remember(reaper, realm="other", aside=held)
    assert reaper.ids() == {3, 4}
    for text in ("{", '{"version": 1}'):
        reaper.file("/run/reaper/other/ledger.json", text)
        assert "corrupt" in reaper.unavailable()
    remember(reaper, realm="other")
    reaper.shell("touch /run/reaper/other/ledger.json.corrupt")
    assert "ledger.json.corrupt may name thin ids" in reaper.unavailable()
    reaper.shell("rm /run/reaper/other/ledger.json.corrupt; rm %s; ln -s /etc/passwd %s" % (LEDGER, LEDGER))
    assert "cannot read the ledger" in reaper.unavailable()


def test_an_empty_volume_is_held(reaper, pool):
    pool.message("create_thin 1")
    (one,) = reaper.collect().values()
    assert [holder["type"] for holder in one["holders"]] == ["empty volume"]
    assert reaper.act("remove", reaper.token(1))["message"] == "nothing tells it from a new one"
    assert pool.has_id(1)


def test_only_pools_that_a_rule_names_and_nobody_manages(reaper, pool):
    unmapped(pool, 1, 1)
    other = Pool(reaper, "other", 32)
    other.message("create_thin 7")
    assert reaper.ids() == {1}
    answer = reaper.ask("collect", rules=[{"pool": "nosuch"}])
    assert answer["error"] == "Absent" and "nosuch" in answer["text"]
    tokens = reaper.token(1)
    for uuid, who in (("LVM-abc-tpool", "lvm"), ("stratis-1-x", "stratis")):
        table = reaper.shell("dmsetup table " + pool.name).strip()
        reaper.shell(f"dmsetup remove {pool.name}; dmsetup create {pool.name} -u {uuid} --table '{table}'")
        assert "is managed by %s" % who in reaper.unavailable()
        assert reaper.ask("remove", tokens)["error"] == "ProbeError"
        assert pool.has_id(1)
    reaper.shell("dmsetup create docker-254:1-99-pool --table '0 8 zero'")
    assert "no thin pool" in reaper.ask("collect", rules=[{"pool": "docker-254:1-99-pool"}])["text"]


def test_row_24_a_metadata_snapshot_of_somebody_else_is_respected(reaper, pool):
    unmapped(pool, 1, 1)
    pool.message("reserve_metadata_snap")
    held = reaper.status(pool.name)[6]
    assert "its metadata snapshot is held by somebody else" in reaper.unavailable()
    assert reaper.status(pool.name)[6] == held
    pool.message("release_metadata_snap")
    assert reaper.ids() == {1}


def test_a_reaper_that_reads_the_metadata_is_not_disturbed_by_another(reaper, pool):
    unmapped(pool, 1, 1)
    ask = {"kind": "thin_id", "act": "collect", "tokens": [], "rules": RULES, "before": [], "seconds": 20}
    other = "echo %s | python3 /tmp/driver.py > /run/other" % shlex.quote(json.dumps(ask))
    # While ours has its metadata snapshot, another reaper looks too: it has to wait, and gives up.
    answer = reaper.ask("collect", before=[{"command": "thin_dump", "shell": other}])
    assert len(answer["result"]["resources"]) == 1
    assert "another reaper is reading" in json.loads(reaper.shell("cat /run/other"))["text"]
    assert reaper.status(pool.name)[6] == "-"


def test_one_that_a_killed_reaper_left_is_released(reaper, pool):
    unmapped(pool, 1, 1)
    assert reaper.ask("collect", before=[{"command": "thin_dump", "crash": True}]) is None
    assert reaper.status(pool.name)[6] != "-"
    assert reaper.ids() == {1}
    assert reaper.status(pool.name)[6] == "-"


def test_row_23_nothing_in_a_failed_pool(reaper, pool):
    reaper.shell(BAD)
    reaper.shell("dmsetup remove hyper-rw-vbad")
    rules = [{"pool": "bad"}]
    tokens = reaper.tokens("bad/1", rules=rules)
    fail = "dmsetup load badmeta --table '0 16384 error'; dmsetup suspend badmeta; dmsetup resume badmeta; "
    reaper.shell(fail + "dmsetup message bad 0 'create_thin 5'; sleep 1.5", check=False)
    assert reaper.status("bad")[3:] == ["Fail"]
    assert reaper.act("remove", tokens, rules=rules)["outcome"] == "deferred"
    assert reaper.ask("collect", rules=rules)["text"] == "pool bad: Fail"


# So little room for metadata that it runs out of it.
TINY = """
mkdir -p /run/thin/tiny; truncate -s 96K /run/thin/tiny/m; truncate -s 64M /run/thin/tiny/d
m=$(losetup -f --show /run/thin/tiny/m) d=$(losetup -f --show /run/thin/tiny/d)
dmsetup create tiny --table "0 131072 thin-pool $m $d 128 0 1 skip_block_zeroing"
"""
FILL = """
for i in $(seq %d %d); do
    dmsetup message tiny 0 "create_thin $i"; dmsetup create x --table "0 65536 thin /dev/mapper/tiny $i" || exit 0
    dd if=/dev/zero of=/dev/mapper/x bs=64k count=1 oflag=direct; dmsetup remove x
done
"""


def test_row_23_nothing_in_a_pool_that_needs_a_check(reaper, pool):
    reaper.shell(TINY + FILL % (1, 2))
    rules = [{"pool": "tiny"}]
    tokens = reaper.tokens("tiny/1", rules=rules)
    reaper.shell(FILL % (3, 40), check=False)
    assert "needs_check" in reaper.status("tiny")
    used = reaper.used("tiny")
    outcome = reaper.act("remove", tokens, rules=rules)
    assert (outcome["outcome"], outcome["message"]) == ("deferred", "needs_check")
    assert reaper.ask("collect", rules=rules)["text"] == "pool tiny: needs_check"
    assert reaper.used("tiny") == used > 0


@pytest.fixture
def containerd(reaper, pool):
    """containerd, with the pool in the hands of its devmapper snapshotter."""
    reaper.shell(START, data=CONTAINERD.encode())
    reaper.shell(CTR + "prepare base && " + CTR + "commit done base && " + CTR + "prepare top done")
    return pool


def test_what_containerd_has_in_the_pool_is_untouched(reaper, containerd):
    unmapped(containerd, 5000, 2)
    # A committed snapshot has no device.
    assert {name for name in reaper.names() if "-snap-" in name} == {"%s-snap-2" % POOL}
    assert reaper.ids() == {5000}
    tokens = reaper.token(5000)
    # One of containerd's, as it would be taken for ours if its records said nothing.
    stolen = [dict(tokens[0], name="%s/1" % POOL, vm_id="thin:%s:1" % POOL, identity="x")]
    stolen[0]["details"] = dict(tokens[0]["details"], thin_id=1)
    assert reaper.act("remove", stolen)["outcome"] == "identity_changed"
    assert reaper.act("remove", tokens)["outcome"] == "reaped"
    # It still has all it had, and goes on.
    assert reaper.shell(CTR + "ls").split() == ["KEY", "PARENT", "KIND", "done", "Committed", "top", "done", "Active"]
    reaper.shell(CTR + "prepare more done && " + CTR + "rm more && " + CTR + "rm top && " + CTR + "rm done")
    # It deletes the ids when it gets to it; what it deletes while we look may be seen as one that nobody names.
    until(lambda: reaper.used(POOL) == 0)
    assert reaper.ids() == set()


def test_a_containerd_that_does_not_run_has_its_volumes_too(reaper, containerd):
    unmapped(containerd, 5000, 2)
    socket = "/run/containerd/containerd.sock"
    reaper.shell(STOP + "rm -rf /run/containerd")
    assert reaper.ids() == {5000}
    reaper.shell("mv /run/ctd/devmapper /run/ctd/moved")
    assert "/etc/containerd/config.toml gives pool hyper-thinpool to containerd" in reaper.unavailable()
    reaper.shell("rm -rf /etc/containerd")
    assert "has devices that are called as those of containerd's" in reaper.unavailable()
    reaper.shell("mkdir -p /var/lib/x && cp /run/ctd/moved/%s.db /var/lib/x/" % POOL)
    assert reaper.ids() == {5000}
    reaper.shell("head -c 9000 /dev/zero > /var/lib/x/%s.db" % POOL)
    assert "no bolt database" in reaper.unavailable()
    reaper.shell("rm -rf /var/lib/x")
    # Without any device left only containerd itself can tell, which says that it has none now.
    assert not reaper.shell("ls %s" % socket, check=False)


def test_snapshots_of_which_no_record_is_found(reaper, containerd):
    """Its records were moved, and it made new ones: it has snapshots of which nobody knows the ids."""
    assert reaper.ids() == set()
    reaper.shell(STOP + "mkdir /run/ctd/other; cp /run/ctd/devmapper/metadata.db /run/ctd/other/")
    reaper.shell("rm -rf /run/containerd; mv /run/ctd/devmapper /run/ctd/hidden; dmsetup remove %s-snap-2" % POOL)
    config = CONTAINERD.replace('root_path = "/run/ctd/devmapper"', 'root_path = "/run/ctd/other"')
    reaper.shell(START, data=config.encode())
    assert reaper.shell("ls /run/ctd/other").split() == [POOL + ".db", "metadata.db"]
    assert "containerd has 2 snapshots in thin pools, and what is to be found" in reaper.unavailable()


def test_row_27_a_containerd_that_hangs(reaper, containerd):
    unmapped(containerd, 5000, 2)
    tokens = reaper.token(5000)
    reaper.shell("kill -STOP $(cat /run/ctd/pid)")
    try:
        for act in ("collect", "remove"):
            answer = reaper.ask(act, tokens, seconds=3)
            assert answer.get("error") == "DeadlineExceeded", answer
    finally:
        reaper.shell("kill -CONT $(cat /run/ctd/pid)")
    assert reaper.act("remove", tokens)["outcome"] == "reaped"


def test_twenty_ids_in_one_sweep(reaper, pool):
    make = "for i in $(seq 20); do dmsetup message {0} 0 \"create_thin $i\"; dmsetup create x --table "
    make += '"0 65536 thin /dev/mapper/{0} $i"; dd if=/dev/zero of=/dev/mapper/x bs=64k count=1 oflag=direct; '
    reaper.shell((make + "dmsetup remove x; done").format(pool.name))
    found = reaper.collect()
    assert len(found) == 20
    answer = reaper.ask("remove", reaper.tokens(*found), seconds=60)
    assert [one["outcome"] for one in answer["result"]] == ["reaped"] * 20
    assert sum(one["bytes"] for one in answer["result"]) == 20 * 65536
    print("20 thin ids: %.2f s" % answer["seconds"])
    assert reaper.used(pool.name) == 0


def test_the_role_reports_them_and_reaps_them_when_it_is_told_to(kernel):
    few = {"live": 2, "orphans": 1, "containers": 0, "running_orphans": 0, "zombies": 0}
    kernel.plant(few)
    table = f"0 65536 thin /dev/mapper/{POOL} 9000"
    make = f"dmsetup message {POOL} 0 'create_thin 9000'; dmsetup create gone --table '{table}'; dmsetup mknodes gone; "
    make += "dd if=/dev/urandom of=/dev/mapper/gone bs=1M count=1 oflag=direct; dmsetup remove gone"
    kernel.run("kern", f"set -e; export DM_DISABLE_UDEV=1; {make}", check=True)

    def sweep(*arguments, **variables):
        time.sleep(0.5)
        kernel.list_live(generated_at=time.time() + 25)
        fast = {"reap_min_age": 0, "reap_strike_interval": 0.1}
        return kernel.sweep(*arguments, "-e", json.dumps(dict(fast, **variables)), timeout=120)

    def outcomes(done):
        return {one["name"]: one for one in done.outcomes() if one["kind"] == "thin_id"}

    refused = sweep(reap_unmapped_thin_ids=True)
    assert refused.code != 0 and "reap_thin_pools is empty" in refused.output, refused.output
    pools = {"reap_thin_pools": [POOL]}
    sweep(reap_unmapped_thin_ids="report", **pools)
    told = sweep(reap_unmapped_thin_ids="report", **pools)
    assert told.code == 0 and not outcomes(told), told.output
    assert "unmapped thin id, reap_unmapped_thin_ids is report" in told.output, told.output
    off = sweep(**pools)
    assert "thin_id" not in off.output and not outcomes(off), off.output
    sweep(reap_unmapped_thin_ids=True, **pools)
    checked = sweep("--check", reap_unmapped_thin_ids=True, **pools)
    assert {name: one["outcome"] for name, one in outcomes(checked).items()} == {POOL + "/9000": "would_reap"}, (
        checked.output
    )
    done = sweep(reap_unmapped_thin_ids=True, **pools)
    (one,) = outcomes(done).values()
    assert (one["name"], one["outcome"], one["bytes"]) == (POOL + "/9000", "reaped", MIB), done.output
    assert kernel.check("gone") == []


def test_a_witness_tells_what_the_metadata_said_and_how_the_pool_is(reaper, pool):
    for thin_id in (1, 2):
        unmapped(pool, thin_id, 1)
    answer = reaper.ask("witness", [*reaper.token(1), *reaper.token(2)])
    assert "error" not in answer and len(answer["commands"]) == 1, answer
    (told,) = answer["result"][1]
    lines = dict(line.split(": ", 1) for line in told["text"].splitlines())
    assert (lines["thin_id"], lines["pool"]) == ("2", POOL) and "'device': [" in lines["record"]
    assert " rw " in lines["status of the pool"]
