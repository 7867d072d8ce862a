# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The dm_thin kind against transcripts of dmsetup and thin_dump, with the sysfs of the host they were taken on.

What it does to a volume is in test_dm_control.py: that is asked of the kernel itself.
"""

import json
import pathlib

import pytest
from ansible_collections.microvm.reaper.plugins.module_utils import dm, probe, thin_pool
from ansible_collections.microvm.reaper.plugins.module_utils.kinds import dm_thin

CAPTURES = pathlib.Path(__file__).parent / "captures"
VERSIONS = sorted(path.name for path in CAPTURES.glob("dmsetup-*.json"))
STATES = json.loads((CAPTURES / "thin-pool-states-linux-7.2.7.json").read_text())
FAILED = STATES["thin of a failed pool"]
RULES = [{"name": "hyper-rw-(?P<vm_id>.*)"}]


class Replay:
    """A host that answers what it was recorded to answer, if it is asked in the same words and order."""

    state_dir = None

    def __init__(self, boot_id, transcript):
        self.boot_id = boot_id
        self.transcript = list(transcript)

    def run(self, command, *arguments, environment=None):
        said = self.transcript.pop(0)
        assert [command, *arguments] == said["argv"]
        assert environment == said["environment"]
        return said["rc"], said["out"], said["err"]

    def status(self, number, target):
        """Answer a request for the status of a device with the line that dmsetup was told: the same text."""
        said = self.transcript.pop(0)
        assert said["argv"][0:2] == ["dmsetup", "status"] and said["argv"][-2:] == ["--target", target]
        return dm.parse_lines(said["out"], target)[dm.attribute(number, "dm/name")]


@pytest.fixture(params=VERSIONS)
def capture(request, tmp_path, monkeypatch):
    """A capture, with its sysfs laid out under a temporary directory."""
    found = json.loads((CAPTURES / request.param).read_text())
    monkeypatch.setattr(dm, "SYS", str(tmp_path))
    monkeypatch.setattr(dm, "UDEV_CONTROL", str(tmp_path / "none"))
    (tmp_path / "class/misc/device-mapper").mkdir(parents=True)
    for number, files in found["sysfs"].items():
        device = tmp_path / "dev/block" / number
        (device / "dm").mkdir(parents=True)
        (device / "holders").mkdir()
        for name in ("dm/name", "dm/uuid", "dm/suspended", "diskseq"):
            (device / name).write_text(files[name])
        for name in files["holders"]:
            (device / "holders" / name).touch()
        (tmp_path / "block").mkdir(exist_ok=True)
        (tmp_path / "block" / files["block"]).symlink_to(device)
    return found


def collect(capture):
    host = Replay(capture["boot_id"], capture["collect"])
    found = dm_thin.collect(capture["rules"], host)
    assert host.transcript == []
    return found


def test_collects_the_volumes_that_a_rule_names(capture):
    found = collect(capture)
    by_name = {one["name"]: one for one in found["resources"]}
    assert sorted(by_name) == [
        "devpool-snap-3",
        "hyper-rw-vbase",
        "hyper-rw-vdead",
        "hyper-rw-vlvm",
        "hyper-rw-vopen",
        "hyper-rw-vother",
        "hyper-rw-vsnap",
        "hyper-rw-vsuspended",
        "hyper-rw-vtagged",
    ]
    # Five mangled names, one that is not UTF-8, one with a raw blank, and cryptroot, which its rule wants in another
    # pool. A raw newline, two targets and other targets are not even candidates.
    assert found["foreign"] == 8
    sequence = capture["sysfs"]["254:3"]["diskseq"].strip()
    assert by_name["hyper-rw-vdead"] == {
        "kind": "dm_thin",
        "name": "hyper-rw-vdead",
        "vm_id": "vdead",
        "identity": "%s:seq%s:hyper-thinpool:1" % (capture["boot_id"], sequence),
        "in_use": False,
        "holders": [],
        "age_seconds": None,
        "bytes": 5 << 20,
        "parent": None,
        "details": {
            "pool": "hyper-thinpool",
            "pool_uuid": "",
            "pool_device": "254:0",
            "thin_id": 1,
            "device": "254:3",
            "size_sectors": 65536,
            "place": "hyper-thinpool",
        },
    }


def test_says_why_a_volume_is_held(capture):
    held = {one["name"]: (one["in_use"], one["holders"]) for one in collect(capture)["resources"]}
    assert {name: held[name] for name in ("hyper-rw-vdead", "hyper-rw-vsnap", "hyper-rw-vtagged")} == {
        "hyper-rw-vdead": (False, []),
        "hyper-rw-vsnap": (False, []),
        "hyper-rw-vtagged": (False, []),
    }
    assert held["hyper-rw-vopen"] == (True, [])
    assert held["hyper-rw-vbase"] == (True, [{"type": "device", "name": "hyper-rw-vlinear"}])
    assert held["hyper-rw-vlvm"] == (False, [{"type": "lvm", "name": "hyper-rw-vlvm"}])
    assert held["hyper-rw-vsuspended"] == (False, [{"type": "suspended", "name": "hyper-rw-vsuspended"}])
    assert held["devpool-snap-3"] == (False, [{"type": "containerd_snapshotter", "name": "devpool-snap-3"}])
    because = "other-pool: its metadata snapshot is held by somebody else (block 23)"
    assert held["hyper-rw-vother"] == (False, [{"type": "pool", "name": because}])


def test_a_device_that_vanished_since_it_was_listed_is_left_out(capture, tmp_path):
    (tmp_path / "dev/block/254:3").rename(tmp_path / "gone")
    names = [one["name"] for one in collect(capture)["resources"]]
    assert "hyper-rw-vdead" not in names and "hyper-rw-vopen" in names


def test_before_linux_5_15_the_inode_is_the_incarnation(capture, tmp_path):
    (tmp_path / "dev/block/254:3/diskseq").unlink()
    inode = (tmp_path / "dev/block/254:3").stat().st_ino
    identities = [one["identity"] for one in collect(capture)["resources"]]
    assert "%s:ino%d:hyper-thinpool:1" % (capture["boot_id"], inode) in identities


def test_a_name_can_neither_forge_a_line_nor_a_field():
    listed = "254/3/0/Active/1/v\n254/4/0/Active/1/w/\n254/5/0/Active/1/x y/254/6/0/Active/1/z/\n"
    assert [(one.name, one.uuid) for one in dm.parse_info(listed).values()] == [
        ("w", ""),
        ("x y", "254/6/0/Active/1/z/"),
    ]
    table = "a: 0 8 thin 254:0 1: 0 16 thin 254:0 2\nb\nc: 0 8 thin 254:0 3\nc: 0 8 thin 254:0 4\nd: 8 8 thin 254:0 5\n"
    assert dm.parse_lines(table, "thin") == {"a: 0 8 thin 254:0 1": dm.Line(16, ["254:0", "2"])}


@pytest.mark.parametrize(
    ("state", "trouble", "held", "used", "full"),
    [
        ("rw", None, None, 0, 10.3),
        ("held", "its metadata snapshot is held by somebody else (block 23)", "23", 0, 10.3),
        ("full", None, None, 8 << 20, 100.0),
        ("full, after a delete", None, None, 4 << 20, 50.0),
        ("read-only", "read-only", None, 0, 10.3),
        ("fail", "Fail", None, None, None),
    ],
)
def test_health_of_a_pool(state, trouble, held, used, full):
    line = dm.parse_lines("p: " + STATES[state], "thin-pool")["p"]
    assert thin_pool.parse_health(line.sectors, line.words) == (trouble, held, used, full)
    assert thin_pool.parse_health(line.sectors, line.words, ours="23").trouble == (None if held else trouble)


def test_needs_check_comes_first():
    words = STATES["read-only"].replace("queue_if_no_space -", "queue_if_no_space needs_check").split()[3:]
    assert thin_pool.parse_health(32768, words).trouble == "needs_check"


def test_a_volume_of_a_failed_pool_is_reported(capture, tmp_path):
    changed = json.loads(json.dumps(capture))
    table, status, pools = changed["collect"][1:]
    table["out"] = table["out"].replace("hyper-rw-vdead: 0 65536 thin 254:0 1\n", "hyper-rw-vdead: %s\n" % FAILED)
    status["out"] = status["out"].replace("thin 10240 10239", "thin Fail")
    pools["out"] = "hyper-thinpool: %s\n" % STATES["fail"]
    slaves = tmp_path / "dev/block/254:3/slaves"
    (slaves / "dm-0").mkdir(parents=True)
    (slaves / "dm-0/dev").write_text("254:0\n")
    one = next(one for one in collect(changed)["resources"] if one["name"] == "hyper-rw-vdead")
    assert (one["bytes"], one["holders"]) == (None, [{"type": "pool", "name": "hyper-thinpool: Fail"}])


@pytest.mark.parametrize(
    ("old", "new", "rule"),
    [
        (
            "/1/hyper-rw-vdead/",
            "/2/hyper-rw-vdead/",
            "hyper-rw-(?P<vm_id>vdead)",
        ),  # a linear target follows the thin one
        ("hyper-rw-vdead", "\ufffd-vdead", ".*-(?P<vm_id>vdead)"),  # was not UTF-8
    ],
)
def test_is_not_ours_whatever_the_rule(capture, old, new, rule):
    changed = dict(json.loads(json.dumps(capture)), rules=[{"name": rule}])
    assert len(collect(dict(capture, rules=[{"name": ".*-(?P<vm_id>vdead)"}]))["resources"]) == 1
    for answer in changed["collect"]:
        answer["out"] = answer["out"].replace(old, new)
    assert collect(changed)["resources"] == []


def test_no_devices_at_all_is_empty(capture):
    changed = json.loads(json.dumps(capture))
    for answer in changed["collect"]:
        answer["out"] = "No devices found\n"
    assert collect(changed) == {"resources": [], "foreign": 0, "places": {}}


def test_a_kernel_without_device_mapper_is_not_asked(capture, tmp_path):
    (tmp_path / "class/misc/device-mapper").rmdir()
    with pytest.raises(probe.Absent, match="no device-mapper"):
        dm_thin.collect(RULES, Replay(capture["boot_id"], []))


def test_a_device_that_vanishes_while_all_are_listed_is_no_failure(capture):
    vanished = dict(capture["collect"][1], out="", rc=1, err=capture["texts"]["table of no number"]["err"])
    changed = dict(capture, collect=[capture["collect"][0], vanished, *capture["collect"][1:]])
    assert len(collect(changed)["resources"]) == 9


def test_any_other_failure_is_not_an_empty_list(capture):
    refused = dict(capture["collect"][0], out="", rc=1, err="/dev/mapper/control: open failed: Permission denied\n")
    with pytest.raises(probe.ProbeError, match="open failed: Permission denied"):
        dm_thin.collect(RULES, Replay(capture["boot_id"], [refused]))


def test_records_of_a_pool(capture, tmp_path, monkeypatch):
    monkeypatch.setattr(thin_pool, "find_command", lambda name: name)
    monkeypatch.setattr(dm, "node", lambda number: "/dev/loop0")
    host = Replay(capture["boot_id"], capture["records"])
    monkeypatch.setattr(dm, "status", host.status)
    host.state_dir = str(tmp_path)
    found = thin_pool.records(thin_pool.pool("254:0"), host)
    assert host.transcript == []
    assert found[1] == {"device": [0, 0, 1, 80], "pool": [1, 0]}
    assert found[20] == {"device": [0, 1, 1, 0], "pool": [1, 0]}
    assert json.loads((tmp_path / thin_pool.NOTES).read_text()) == {}


def test_a_metadata_snapshot_is_released_when_the_dump_hangs(capture, tmp_path, monkeypatch):
    monkeypatch.setattr(thin_pool, "find_command", lambda name: name)
    monkeypatch.setattr(dm, "node", lambda number: "/dev/loop0")
    noted = []

    class Hangs(Replay):
        def run(self, command, *arguments, environment=None):
            answer = super().run(command, *arguments, environment=environment)
            if command == "thin_dump":
                noted.append(json.loads((tmp_path / thin_pool.NOTES).read_text()))
                raise probe.DeadlineExceeded("hung")
            return answer

    host = Hangs(capture["boot_id"], capture["records"])
    monkeypatch.setattr(dm, "status", host.status)
    host.state_dir = str(tmp_path)
    with pytest.raises(probe.DeadlineExceeded):
        thin_pool.records(thin_pool.pool("254:0"), host)
    assert host.transcript == []  # the release was the last
    assert list(noted[0]) == ["hyper-thinpool"] and noted[0]["hyper-thinpool"].isdigit()


def test_no_record_without_a_place_for_the_note(capture, monkeypatch):
    monkeypatch.setattr(thin_pool, "find_command", lambda name: name)
    tokens = [dict(one, stop=False) for one in collect(capture)["resources"]]
    prepared = dm_thin.prepare(tokens, RULES, Replay(capture["boot_id"], []))
    assert prepared and not any("record" in one for one in prepared.values())


@pytest.mark.parametrize(
    ("before", "now", "same"),
    [
        ([1, 2, 3, 80], [1, 2, 3, 80], True),
        ([1, 2, 3, 80], [1, 2, 3, 81], False),
        ([1, 2, 3, 80], [1, 2, 4, 80], False),
        ([1, 2, 3, 80], [2, 2, 3, 80], False),
        ([1, 2, 3, 0], [1, 2, 3, 0], False),
    ],
)
def test_what_proves_that_a_thin_id_is_the_same_volume(before, now, same):
    assert thin_pool.is_same({"device": before, "pool": [5, 5]}, {"device": now, "pool": [6, 5]}) is same
    assert not thin_pool.is_same({"device": before, "pool": [5, 5]}, {"device": now, "pool": [4, 5]})


def test_half_a_dump_is_no_dump():
    with pytest.raises(probe.ProbeError, match="whole superblock"):
        thin_pool.parse_dump('<superblock uuid="" time="1" transaction="0" version="2">\n')


DEVICE = '<device dev_id="1" mapped_blocks="%d" transaction="1" creation_time="0" snap_time="0">\n</device>\n'
DUMP = '<superblock uuid="" time="1" transaction="2" version="2">\n' + DEVICE + "</superblock>\n"


@pytest.mark.parametrize(
    ("dump", "said"),
    [
        pytest.param(DUMP % 1 + DUMP % 2, "whole superblock", id="twice"),
        pytest.param((DUMP % 1).rstrip() + DEVICE % 2, "whole superblock", id="after the end"),
        pytest.param((DUMP % 1).replace("</superblock>", DEVICE % 2 + "</superblock>"), "two devices 1", id="in one"),
        pytest.param((DUMP % 1).replace('snap_time="0"', 'snap_time="x"'), "not understood", id="not understood"),
    ],
)
def test_a_dump_that_says_two_things_of_one_volume_is_no_dump(dump, said):
    assert thin_pool.parse_dump(DUMP % 5)[1]["device"] == [1, 0, 0, 5]
    with pytest.raises(probe.ProbeError, match=said):
        thin_pool.parse_dump(dump)


@pytest.mark.parametrize(
    "used", ["a/b", "1/2/3", "-1/5", "\u0661/5", "/", pytest.param("9" * 5000 + "/1", id="5000 digits")]
)
def test_a_status_that_makes_no_sense_is_trouble(used):
    assert thin_pool.parse_health(32768, ["0", "420/4096", used, "-", "rw"]).trouble
