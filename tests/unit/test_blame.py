# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Who is blamed for what is busy: on real processes, cgroups, mount namespaces, loop devices and a dead file server."""

import ctypes
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest
from ansible_collections.microvm.reaper.plugins.module_utils import blame, containerd, dm, mounts, processes
from ansible_collections.microvm.reaper.plugins.module_utils import resource as r
from ansible_collections.microvm.reaper.plugins.module_utils.kinds import cgroup
from ansible_collections.microvm.reaper.plugins.module_utils.probe import Absent, Host, ProbeError, boottime

ID = "3f2a" + "0123456789ab" * 5
MIB = 1 << 20
libc = ctypes.CDLL(None, use_errno=True)


def unified():
    try:
        found = [mount for mount, version in cgroup.cgroup_mounts(mounts.read()) if version == 2]
    except Absent:
        return None
    return found[0] if found and os.geteuid() == 0 and os.access(found[0], os.W_OK) else None


needs_cgroup = pytest.mark.skipif(unified() is None, reason="needs root and a v2 cgroup hierarchy")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: loop devices and mounts")


@pytest.fixture(autouse=True)
def nothing_is_remembered():
    dm._unseen.clear()
    blame._silent.clear()
    yield
    dm._unseen.clear()
    blame._silent.clear()


@pytest.fixture
def host():
    return Host(boottime() + 60)


@pytest.fixture
def start():
    """Start processes that end with the test."""
    started = []

    def run(argv, **how):
        started.append(subprocess.Popen(argv, **how))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()


@pytest.fixture
def place():
    """Make cgroups and put processes into them, to be asked for before ``start``: they are removed when these ended."""
    root = pathlib.Path(unified()) / ("microvm-reaper-test-blame-%d" % os.getpid())

    def put(path, pid):
        (root / path).mkdir(parents=True, exist_ok=True)
        (root / path / "cgroup.procs").write_text(str(pid))

    yield put
    for directory, _below, _files in os.walk(root, topdown=False):
        os.rmdir(directory)


# Containers


@pytest.mark.parametrize(
    ("path", "namespace"),
    [
        ("/system.slice/docker-%s.scope", "moby"),
        ("/docker/%s", None),
        ("/machine.slice/libpod-%s.scope/container", None),
        ("/machine.slice/libpod-conmon-%s.scope", None),
        ("/libpod_parent/libpod-%s", None),
        ("/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod7.slice/cri-containerd-%s.scope", "k8s.io"),
        ("/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod7.slice/crio-%s.scope", None),
        ("/kubepods/burstable/pod7/%s", "k8s.io"),
        ("/system.slice/nerdctl-%s.scope", "default"),
        ("/default/%s", "default"),
        ("/hyper/v1/%s (deleted)", None),
    ],
)
def test_a_container_is_known_by_its_cgroup(path, namespace):
    text = "5:devices:/\n0::%s\n" % (path % ID).replace(" (deleted)", "")
    assert blame.container_of(text)[0] == ID
    if "crio" not in path:
        assert blame.container_of(text)[1] == namespace


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("/default/vm-1", ("vm-1", "default")),
        ("/k8s.io/a.b/inner", ("a.b", "k8s.io")),
        ("/default/a b", (None, None)),
        ("/default", (None, None)),
        ("/hyper/vabc", (None, None)),
        ("/system.slice/x.service", (None, None)),
        ("/docker-%s0.scope" % ID, (None, None)),
        ("/docker-%s.scope" % ID[:-1], (None, None)),
        ("/docker-%s.scope" % ID.upper(), (None, None)),
        ("/", (None, None)),
        ("", (None, None)),
    ],
)
def test_what_only_looks_like_a_container_is_none(path, told):
    assert blame.container_of("0::%s\n" % path) == told
    assert blame.container_of("") == (None, None)


def test_the_innermost_container_is_the_one():
    outer = "9" * 64
    assert blame.container_of("0::/docker/%s/system.slice/docker-%s.scope\n" % (outer, ID))[0] == ID


# Processes


@needs_cgroup
def test_a_process_is_named_with_unit_container_and_descriptor(place, start):
    process = start(["sleep", "60"])
    place("box.service/docker-%s" % ID, process.pid)
    found = blame.process(process.pid, ["fd 12", "cwd", "fd 3", "map"])
    assert found == {
        "type": "process",
        "name": "%d sleep (unit box.service, container %s, cwd, map, fd 3, 1 more)" % (process.pid, ID[:12]),
        "pid": process.pid,
        "command": "sleep",
        "unit": "box.service",
        "container": ID,
        "mount_namespace": None,
        "by": ["cwd", "map", "fd 3", "fd 12"],
        "fd": 3,
    }
    # The unit of a container that systemd knows says nothing more.
    place("docker-%s.scope" % ID, process.pid)
    found = blame.process(process.pid, ["root"])
    assert found["name"] == "%d sleep (container %s, root)" % (process.pid, ID[:12])
    assert (found["unit"], found["fd"]) == ("docker-%s.scope" % ID, None)


@needs_root
def test_another_mount_namespace_is_told(start):
    process = start(["unshare", "-m", "sh", "-c", "echo; exec sleep 60"], stdout=subprocess.PIPE)
    process.stdout.read(1)
    number = int(os.readlink("/proc/%d/ns/mnt" % process.pid)[5:-1])
    found = blame.process(process.pid)
    assert found["mount_namespace"] == number and "mount namespace %d" % number in found["name"]


def test_a_process_that_is_gone_is_nobody(start):
    process = start(["true"])
    process.wait()
    assert blame.process(process.pid) is None


def test_a_hostile_command_is_made_printable(start):
    process = start([sys.executable, "-c", "open('/proc/self/comm', 'wb').write(b'\\x1b[2J\\n\\xff{{x}}'); input()"],
                    stdin=subprocess.PIPE)
    while b"{{x}}" not in pathlib.Path("/proc/%d/comm" % process.pid).read_bytes():
        time.sleep(0.01)
    found = blame.process(process.pid, ["fd %d" % number for number in range(1000)])
    assert found["command"] == "?[2J?\ufffd{{x}}" and found["name"].isprintable()
    assert len(found["by"]) == blame.MAX_BY and len(found["name"]) < 300
    json.dumps(found).encode()
    process.stdin.close()


@needs_cgroup
def test_a_task_is_named_only_where_its_cgroup_confirms_it(place, start):
    process = start(["sleep", "60"])
    assert blame.task(process.pid, "vm-1") == r.holder("process", str(process.pid))
    place("default/vm-1", process.pid)
    assert blame.task(process.pid, "vm-1")["name"].startswith("%d sleep (" % process.pid)
    assert blame.task(process.pid, "vm-1")["container"] == "vm-1"
    assert blame.task(process.pid, "") == r.holder("process", str(process.pid))


def a_shim(start, tmp_path, *arguments):
    """Start a process that is called as containerd calls its shims, and is none."""
    program = tmp_path / "containerd-shim-runc-v2"
    shutil.copy("/bin/sleep", program)
    sleeping = start([str(program), *(arguments or ()), "60"]) if not arguments else start(
        ["bash", "-c", "exec -a containerd-shim-runc-v2 %s -c 'read x' %s" % (bash(tmp_path), " ".join(arguments))],
        stdin=subprocess.PIPE,
    )
    while not (processes.stat(sleeping.pid).command.startswith("containerd-shim")):
        time.sleep(0.01)
    return sleeping


def bash(tmp_path):
    program = tmp_path / "containerd-shim-bash"
    if not program.exists():
        shutil.copy(os.path.realpath("/bin/bash"), program)
    return program


def test_a_shim_was_told_of_its_container(start, tmp_path, host):
    shim = a_shim(start, tmp_path, "x", "-namespace", "prod", "-id", "vm-1", "-address", "/run/x")
    assert blame.shim(shim.pid) == ("vm-1", "prod")
    found = blame.parent(shim.pid, host)
    assert found["container"] == "vm-1" and "container vm-1" in found["name"]
    assert found["image"] is None


def test_a_process_is_in_the_container_of_its_shim(start, tmp_path, host):
    script = "sleep 60 & echo $!; read x; kill %1"
    argv = ["bash", "-c", "exec -a shim %s -c '%s' x -namespace prod -id vm-1" % (bash(tmp_path), script)]
    shim = start(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    pid = int(shim.stdout.readline())
    try:
        while processes.stat(pid).command != "sleep":  # until then it is a copy of the shim
            time.sleep(0.01)
        assert blame.parent(pid, host)["container"] == "vm-1"
        assert blame.parent(os.getpid(), host)["container"] == blame.container_of(blame._text(os.getpid(), "cgroup"))[0]
    finally:
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("arguments", [("x",), ("x", "-namespace", "prod"), ("x", "-namespace", "a/b", "-id", "vm-1"),
                                       ("x", "-namespace", "prod", "-id")])
def test_a_shim_that_was_told_nothing_of_use(start, tmp_path, arguments):
    assert blame.shim(a_shim(start, tmp_path, *arguments).pid) == (None, None)


class Answers:
    """Stands for containerd.Client; ``answer`` is an image or what is raised."""

    asked: list = []

    def __init__(self, address, namespace, host):
        self.namespace = namespace

    def container(self, name, timeout):
        self.asked.append((self.namespace, name))
        if isinstance(self.answer, Exception):
            raise self.answer
        return {"image": self.answer}


@pytest.mark.parametrize(
    ("answer", "image", "asked"),
    [
        ("docker.io/library/vm:1", "docker.io/library/vm:1", 2),
        ("", None, 2),
        ("x\n" * 500, ("x?" * 500)[: blame.MAX_IMAGE], 2),
        (containerd.NotFound("no such container"), None, 2),
        (ProbeError("it does not answer"), None, 1),
    ],
)
def test_the_image_is_told_where_containerd_tells_it(start, tmp_path, host, monkeypatch, answer, image, asked):
    monkeypatch.setattr(Answers, "answer", answer, raising=False)
    monkeypatch.setattr(Answers, "asked", [])
    monkeypatch.setattr(containerd, "Client", Answers)
    monkeypatch.setattr(containerd, "ADDRESS", str(tmp_path))
    shim = a_shim(start, tmp_path, "x", "-namespace", "prod", "-id", "vm-1")
    found = [blame.parent(shim.pid, host) for _again in range(2)][1]
    assert found["image"] == image
    assert ("image %s" % image in found["name"]) == (image is not None)
    assert Answers.asked == [("prod", "vm-1")] * asked


# Who has a block device open


@pytest.fixture
def disk(tmp_path):
    """A loop device: its path and number."""
    file = tmp_path / "disk"
    file.write_bytes(b"\0" * 4 * MIB)
    done = subprocess.run(["losetup", "--find", "--show", str(file)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("no loop devices here: %s" % done.stderr)
    path = done.stdout.strip()
    yield path, dm.number_of(path)
    subprocess.run(["losetup", "--detach", path], check=True)


HOLD = """
import ctypes, os, sys
descriptor = os.open(sys.argv[1], os.O_RDONLY)
kept = os.dup2(descriptor, 77) if "fd" in sys.argv[2] else None
if "map" in sys.argv[2]:  # not by the module mmap, which keeps a descriptor
    assert ctypes.CDLL(None).mmap(None, ctypes.c_size_t(4096), 1, 1, descriptor, ctypes.c_long(0)) != -1
os.close(descriptor)
print("ready", flush=True)
sys.stdin.read()
"""


def hold(start, path, how):
    process = start([sys.executable, "-c", HOLD, path, how], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    return process


@needs_root
@pytest.mark.parametrize(("how", "by", "fd"), [("fd", ["fd 77"], 77), ("map fd", ["map", "fd 77"], 77),
                                               ("map", ["map"], None)])
def test_row_20_a_process_is_named_with_what_it_holds_a_device_by(disk, start, how, by, fd):
    process = hold(start, disk[0], how)
    (found,) = dm.openers(disk[1])
    assert (found["pid"], found["by"], found["fd"]) == (process.pid, by, fd)
    assert found["name"].endswith("%s)" % ", ".join(by))


@needs_root
def test_row_20_a_loop_device_on_a_device_is_named(disk):
    done = subprocess.run(["losetup", "--find", "--show", disk[0]], capture_output=True, text=True, check=True)
    on_it = done.stdout.strip()
    try:
        assert {"type": "device", "name": os.path.basename(on_it), "device": dm.number_of(on_it)} in dm.openers(disk[1])
    finally:
        subprocess.run(["losetup", "--detach", on_it], check=True)


@needs_root
def test_row_20_a_mount_in_another_namespace_is_named_with_it(disk, start, tmp_path):
    subprocess.run(["mkfs.ext4", "-qF", disk[0]], check=True)
    script = "mount --make-rprivate / && mount %s %s && echo ready && exec sleep 60" % (disk[0], tmp_path)
    process = start(["unshare", "-m", "sh", "-ec", script], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    (found,) = [one for one in dm.openers(disk[1]) if one["type"] == "mount"]
    assert found["mount_namespace"] == int(os.readlink("/proc/%d/ns/mnt" % process.pid)[5:-1])
    assert found["name"] == "%s (mount namespace %d, of %d sleep)" % (tmp_path, found["mount_namespace"], process.pid)


@pytest.fixture
def frozen(tmp_path):
    """Processes that have a file open on a file system whose server does not answer: who asks what it is, hangs."""
    dead, pids = tmp_path / "dead", []
    dead.mkdir()
    try:
        server = os.open("/dev/fuse", os.O_RDWR)
    except OSError as err:
        pytest.skip("no FUSE here: %s" % err)
    options = b"fd=%d,rootmode=40000,user_id=0,group_id=0" % server
    if libc.mount(b"fuse", os.fsencode(dead), b"fuse", 0, options) < 0:
        os.close(server)
        pytest.skip("no FUSE here: %s" % os.strerror(ctypes.get_errno()))

    def start():
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.dup2(os.open(str(dead), os.O_PATH), 50)
            os.write(writer, b"1")
            time.sleep(60)
            os._exit(0)
        pids.append(pid)
        os.read(reader, 1)
        os.close(reader)
        os.close(writer)
        return pid

    yield start
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    os.close(server)
    for pid in pids:
        os.waitpid(pid, 0)
    libc.umount2(os.fsencode(dead), 2)


@needs_root
def test_row_31_a_process_that_cannot_be_looked_at_does_not_hide_the_others(disk, start, frozen):
    first = frozen()
    holder = hold(start, disk[0], "fd")
    begin = time.monotonic()
    found = dm.openers(disk[1])
    assert [one["pid"] for one in found] == [holder.pid]
    assert dm.LOOK_SECONDS <= time.monotonic() - begin < dm.OPENERS_SECONDS + 0.5
    # It is not tried again.
    assert dm._unseen == {(first, processes.stat(first).started)}
    begin = time.monotonic()
    assert [one["pid"] for one in dm.openers(disk[1])] == [holder.pid]
    assert time.monotonic() - begin < dm.LOOK_SECONDS
    holder.kill()
    holder.wait()
    (found,) = dm.openers(disk[1])
    assert found["pid"] == first
    assert found["name"].endswith(": whether it has it open cannot be seen")


@needs_root
def test_row_31_however_many_cannot_be_looked_at_it_ends_in_time(disk, frozen):
    for _number in range(6):
        frozen()
    begin = time.monotonic()
    assert len(dm.openers(disk[1])) == dm.MAX_ABANDONED
    assert time.monotonic() - begin < dm.OPENERS_SECONDS + 0.5


@needs_root
def test_no_more_holders_are_named_than_can_be_read(disk, start):
    script = "for i in $(seq 40); do sleep 60 < %s & done; echo ready; wait" % disk[0]
    process = start(["setsid", "sh", "-c", script], stdout=subprocess.PIPE)
    process.stdout.readline()
    time.sleep(0.3)
    try:
        assert len(dm.openers(disk[1])) == dm.MAX_HOLDERS
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        time.sleep(0.2)
