# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Requests to device-mapper, and the acts on volumes made of them, against what a kernel was asked and answered."""

import ctypes
import json
import os
import pathlib
import shutil
import stat

import pytest
from ansible_collections.microvm.reaper.plugins.module_utils import dm, dm_control, probe
from ansible_collections.microvm.reaper.plugins.module_utils.kinds import dm_thin

CAPTURES = pathlib.Path(__file__).parent / "captures"
CAPTURE = json.loads((CAPTURES / "dm-ioctl-linux-7.2.7.json").read_text())
RULES = [{"name": "hyper-rw-(?P<vm_id>.*)"}]


class Kernel:
    """Answers what a real one answered, if it is asked the same to the byte, and lets the copy of sysfs follow."""

    def __init__(self, requests, sysfs=None):
        self.left, self.sysfs = list(requests), sysfs
        self.asked = []

    def __call__(self, _descriptor, command, buffer):
        if command == dm_control.GET_VERSION:
            return
        said = self.left.pop(0)
        self.asked.append(command)
        assert bytes(buffer).rstrip(b"\0").hex() == said["sent"]
        if "errno" in said:
            raise OSError(said["errno"], os.strerror(said["errno"]))
        buffer[:] = bytes.fromhex(said["answer"]).ljust(len(buffer), b"\0")
        if self.sysfs:
            self._follow(command, dm_control.HEADER.unpack_from(buffer), said)

    def _follow(self, command, fields, said):
        place = self.sysfs / "dev/block"
        uuid = fields[12].rstrip(b"\0").decode()
        if command == dm_control.DEV_RENAME:
            new = bytes.fromhex(said["sent"])[dm_control.HEADER.size :].decode()
            (place / dm_control._decoded(fields[10]) / "dm/uuid").write_text(new + "\n")
        if command == dm_control.DEV_REMOVE:
            (gone,) = [one for one in place.iterdir() if (one / "dm/uuid").read_text().strip() == uuid]
            shutil.rmtree(gone)


@pytest.fixture
def kernel(monkeypatch):
    """Make a Kernel of requests that were captured."""

    def speak(requests, sysfs=None):
        found = Kernel(requests, sysfs)
        monkeypatch.setattr(dm_control, "_ioctl", found)
        monkeypatch.setattr(dm_control, "CONTROL", os.devnull)
        return found

    return speak


# --- requests


def test_the_layout_is_that_of_c_on_every_machine():
    class Ioctl(ctypes.Structure):
        """struct dm_ioctl of include/uapi/linux/dm-ioctl.h"""

        _fields_ = [
            ("version", ctypes.c_uint32 * 3), ("data_size", ctypes.c_uint32), ("data_start", ctypes.c_uint32),
            ("target_count", ctypes.c_uint32), ("open_count", ctypes.c_int32), ("flags", ctypes.c_uint32),
            ("event_nr", ctypes.c_uint32), ("padding", ctypes.c_uint32), ("dev", ctypes.c_uint64),
            ("name", ctypes.c_char * 128), ("uuid", ctypes.c_char * 129), ("data", ctypes.c_char * 7),
        ]

    class Spec(ctypes.Structure):
        """struct dm_target_spec"""

        _fields_ = [
            ("sector_start", ctypes.c_uint64), ("length", ctypes.c_uint64), ("status", ctypes.c_int32),
            ("next", ctypes.c_uint32), ("target_type", ctypes.c_char * 16),
        ]

    assert ctypes.sizeof(Ioctl) == dm_control.HEADER.size == 312 and ctypes.sizeof(Spec) == dm_control.TARGET.size
    # Where 64 bit numbers need not be aligned, as on 32 bit x86, nothing moves: both are aligned as it is.
    assert (Ioctl.dev.offset, Ioctl.name.offset, Ioctl.uuid.offset, Spec.target_type.offset) == (40, 48, 176, 24)
    packed = dm_control.HEADER.pack(4, 1, 2, 3, 4, 5, -6, 7, 8, 9, 10, b"n", b"u", b"d")
    one = Ioctl.from_buffer_copy(packed)
    assert list(one.version) + [one.data_size, one.data_start, one.target_count] == [4, 1, 2, 3, 4, 5]
    assert (one.open_count, one.flags, one.event_nr, one.dev, one.name, one.uuid) == (-6, 7, 8, 10, b"n", b"u")


def test_the_number_of_a_request_is_that_of_the_kernel(monkeypatch):
    seen = []
    monkeypatch.setattr(dm_control.fcntl, "ioctl", lambda *arguments: seen.append(arguments))
    dm_control._ioctl(5, dm_control.DEV_STATUS, "buffer")
    assert seen == [(5, 0xC138FD07, "buffer", True)]


@pytest.mark.parametrize("number", ["0:0", "254:3", "253:255", "253:256", "4095:1048575", "259:70000"])
def test_device_numbers(number):
    assert dm_control._decoded(dm_control._encoded(number)) == number


def test_a_table_that_is_longer_than_the_buffer_is_asked_for_again(kernel):
    asked = kernel(CAPTURE["requests"]["table of 200 targets"])
    found = dm_control.ask(dm_control.TABLE_STATUS, name="big", flags=dm_control.STATUS_TABLE)
    assert len(asked.asked) > 1 and asked.left == []
    lines = dm_control.targets(found)
    assert [(one.start, one.length) for one in lines] == [(8 * number, 8) for number in range(200)]
    assert {(one.kind, one.text) for one in lines} == {("zero", ""), ("linear", "254:0 0")}


def test_a_table_that_never_fits_is_an_error(kernel, monkeypatch):
    monkeypatch.setattr(dm_control, "MAX_SIZE", dm_control.FIRST_SIZE)
    kernel(CAPTURE["requests"]["table of 200 targets"])
    with pytest.raises(probe.ProbeError, match="more of device 254:"):
        dm_control.ask(dm_control.TABLE_STATUS, name="big", flags=dm_control.STATUS_TABLE)


def test_an_answer_that_is_cut_off_is_an_error(kernel):
    kernel(CAPTURE["requests"]["table of 200 targets"])
    found = dm_control.ask(dm_control.TABLE_STATUS, name="big", flags=dm_control.STATUS_TABLE)
    with pytest.raises(probe.ProbeError, match="cut off"):
        dm_control.targets(found._replace(data=found.data[:-50]))


def test_another_target_is_none_of_ours_and_no_device_is_none(kernel):
    (said,) = CAPTURE["requests"]["table of one that is not thin"]
    kernel([said])
    number = dm_control._decoded(dm_control.HEADER.unpack(bytes.fromhex(said["sent"]).ljust(312, b"\0"))[10])
    assert dm.table(number, "thin") is None
    (said,) = CAPTURE["requests"]["no such number"]
    assert said["errno"] == 6
    kernel([said])
    assert dm.device("254:200") is None


def test_who_has_a_uuid_gets_no_other(kernel):
    kernel(CAPTURE["requests"]["a uuid for one that has one"])
    with pytest.raises(OSError, match="Invalid argument"):
        dm.set_uuid("tagged", "another")


def test_a_kernel_of_another_version_is_not_asked(monkeypatch):
    monkeypatch.setattr(dm_control, "CONTROL", os.devnull)

    def another(_descriptor, command, buffer):
        assert command == dm_control.GET_VERSION
        buffer[:12] = bytes.fromhex(CAPTURE["requests"]["version 5"][0]["answered"])[:12]
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(dm_control, "_ioctl", another)
    with pytest.raises(probe.ProbeError, match=r"speaks version 4\.\d+\.\d+, which is not 4.19"):
        dm.device("254:0")


@pytest.mark.parametrize(
    "make", [lambda path: None, lambda path: path.write_text(""), lambda path: path.symlink_to(os.devnull)]
)
def test_without_its_device_it_cannot_be_read(monkeypatch, tmp_path, make):
    path = tmp_path / "control"
    make(path)
    monkeypatch.setattr(dm_control, "CONTROL", str(path))
    before = os.listdir("/proc/self/fd")
    with pytest.raises(probe.ProbeError, match="control (cannot be opened|is no device)"):
        dm.device("254:0")
    assert os.listdir("/proc/self/fd") == before


def test_a_device_that_is_none_of_device_mapper(monkeypatch):
    monkeypatch.setattr(dm_control, "CONTROL", os.devnull)
    with pytest.raises(probe.ProbeError, match="/dev/null speaks version"):
        dm.device("254:0")


@pytest.mark.parametrize("name", ["x" * 128, "\u2603" * 43, "a\0b"])
def test_what_no_device_can_be_called(kernel, name):
    kernel([])
    with pytest.raises(probe.ProbeError, match="no device can be called"):
        dm.named(name)


# --- acts


@pytest.fixture
def act(kernel, monkeypatch, tmp_path):
    """Do an act as it was captured; return its outcome and the Kernel."""

    def done(name, token=None, **changes):
        scene = CAPTURE["acts"][name]
        for number, files in scene["sysfs"].items():
            device = tmp_path / "dev/block" / number
            (device / "dm").mkdir(parents=True)
            (device / "holders").mkdir()
            for file, text in files.items():
                (device / file).write_text(text)
        monkeypatch.setattr(dm, "SYS", str(tmp_path))
        monkeypatch.setattr(dm, "UDEV_CONTROL", str(tmp_path / "none"))
        monkeypatch.setattr(dm, "openers", lambda number: [])
        monkeypatch.setattr(dm_thin, "BUSY_PAUSE", 0)
        monkeypatch.setattr(dm_thin, "_node", lambda name: str(tmp_path / name))
        asked = kernel(changes.get("requests") or scene["requests"], tmp_path)
        host = probe.Host(probe.boottime() + 10)
        host.boot_id = CAPTURE["boot_id"]
        outcome = getattr(dm_thin, scene["act"])(token or scene["token"], RULES, host)
        return outcome, asked

    return done


@pytest.mark.parametrize("name", sorted(CAPTURE["acts"]))
def test_an_act_asks_and_comes_to_what_it_did_then(act, name):
    outcome, asked = act(name)
    then = CAPTURE["acts"][name]["result"]
    assert outcome == (then and dict(then, holders=[]))
    assert asked.left == []


def test_each_look_is_taken_for_each_volume(act):
    _outcome, asked = act("removed")
    looks = [dm_control.DEV_STATUS, dm_control.TABLE_STATUS, dm_control.TABLE_STATUS]
    deletes = [dm_control.TABLE_STATUS, dm_control.TARGET_MSG, dm_control.TABLE_STATUS]
    assert asked.asked == [*looks, dm_control.DEV_RENAME, dm_control.DEV_REMOVE, *deletes]


def test_an_open_one_is_tried_again_and_then_left(act):
    outcome, asked = act("opened before the removal")
    assert (outcome["outcome"], outcome["message"]) == ("deferred", "busy")
    assert asked.asked.count(dm_control.DEV_REMOVE) == dm_thin.BUSY_TRIES


def test_a_thin_id_that_is_in_use_again_stays_and_is_remembered(act):
    outcome, _asked = act("activated before the delete")
    assert (outcome["outcome"], outcome["unfinished"]) == ("failed", True)
    assert outcome["message"].endswith("remains: Device or resource busy")


@pytest.mark.parametrize(("request_of", "refused", "message"), [
    ("rename", 1, "cannot be marked for removal: Operation not permitted"),
    ("remove", 1, "cannot be deactivated: Operation not permitted"),
    ("remove", 6, "cannot be deactivated: No such device or address"),  # and yet it is there
])
def test_what_the_kernel_refuses_is_told_and_nothing_is_deleted(act, request_of, refused, message):
    requests = []
    for one in CAPTURE["acts"]["removed"]["requests"]:
        requests.append(one)
        if one["request"].startswith(request_of):
            requests[-1] = {"sent": one["sent"], "errno": refused}
            break
    outcome, asked = act("removed", requests=requests)
    assert (outcome["outcome"], outcome["message"]) == ("failed", message)
    assert asked.left == [] and dm_control.TARGET_MSG not in asked.asked


@pytest.mark.parametrize(("said", "now", "message"), [
    (b" - rw ", b" 7 rw ", "pool hyper-thinpool: its metadata snapshot is held by somebody else (block 7)"),
    (b" - rw ", b" - ro ", "pool hyper-thinpool: read-only"),
    (b"queue_if_no_space - ", b"queue_if_no_space needs_check ", "pool hyper-thinpool: needs_check"),
])
def test_nothing_is_asked_of_a_pool_that_cannot_take_it(act, said, now, message):
    requests = [dict(one) for one in CAPTURE["acts"]["removed"]["requests"][:3]]
    assert requests[2]["request"].startswith("status") and said.hex() in requests[2]["answer"]
    answer = bytearray.fromhex(requests[2]["answer"].replace(said.hex(), now.hex()))
    answer[12:16] = (int.from_bytes(answer[12:16], "little") + len(now) - len(said)).to_bytes(4, "little")
    requests[2]["answer"] = answer.hex()
    outcome, asked = act("removed", requests=requests)
    assert (outcome["outcome"], outcome["message"], asked.left) == ("deferred", message, [])


def test_a_device_that_the_kernel_says_it_removed_and_has_is_a_failure(act, monkeypatch):
    monkeypatch.setattr(Kernel, "_follow", lambda kernel, command, fields, said: (
        None if command == dm_control.DEV_REMOVE else follow(kernel, command, fields, said)))
    outcome, asked = act("removed")
    assert outcome["message"] == "still there after the kernel said that it was removed"
    assert dm_control.TARGET_MSG not in asked.asked


follow = Kernel._follow


@pytest.mark.skipif(os.geteuid() != 0, reason="makes device nodes")
@pytest.mark.parametrize(("node", "stays"), [
    ("its", False), ("its, where udevd runs", True), ("of another number", True), ("a link to it", True),
    ("a file", True), ("a character device", True),
])
def test_only_the_node_of_its_number_is_removed(act, tmp_path, monkeypatch, node, stays):
    token = CAPTURE["acts"]["removed"]["token"]
    major, minor = (int(part) for part in token["details"]["device"].split(":"))
    path = tmp_path / token["name"]
    if node.startswith(("its", "of", "a character")):
        kind = stat.S_IFCHR if node == "a character device" else stat.S_IFBLK
        os.mknod(path, kind | 0o600, os.makedev(major, minor + (node == "of another number")))
    elif node == "a file":
        path.write_text("")
    else:
        path.symlink_to("dm-1")
    if node.endswith("runs"):
        (tmp_path / "none").touch()
    assert act("removed")[0]["outcome"] == "reaped"
    assert os.path.lexists(path) is stays


@pytest.mark.skipif(os.geteuid() != 0, reason="makes device nodes")
def test_the_node_of_a_device_that_has_the_number_now_stays(act, tmp_path, monkeypatch):
    token = CAPTURE["acts"]["removed"]["token"]
    number = token["details"]["device"]
    major, minor = (int(part) for part in number.split(":"))
    os.mknod(tmp_path / token["name"], stat.S_IFBLK | 0o600, os.makedev(major, minor))

    def removed_and_made_again(kernel, command, fields, said):
        follow(kernel, command, fields, said)
        if command == dm_control.DEV_REMOVE:
            place = tmp_path / "dev/block" / number
            (place / "dm").mkdir(parents=True)
            for file, text in (("dm/name", token["name"]), ("dm/uuid", ""), ("diskseq", "999999")):
                (place / file).write_text(text + "\n")

    monkeypatch.setattr(Kernel, "_follow", removed_and_made_again)
    assert act("removed")[0]["outcome"] == "reaped"
    assert os.path.lexists(tmp_path / token["name"])
