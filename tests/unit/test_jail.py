# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The jail kind and safe_tree.py on real directories, mounts and processes, in a mount namespace of our own."""

import ctypes
import errno
import hashlib
import itertools
import json
import os
import pathlib
import resource as limits
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time

import pytest
from ansible_collections.microvm.reaper.plugins.module_utils import mounts, processes, safe_tree
from ansible_collections.microvm.reaper.plugins.module_utils import resource as r
from ansible_collections.microvm.reaper.plugins.module_utils.kinds import jail
from ansible_collections.microvm.reaper.plugins.module_utils.probe import (
    Absent,
    DeadlineExceeded,
    Host,
    ProbeError,
    Worker,
    boottime,
)

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: mounts, device nodes and other users' files")

MS_BIND, MS_REC, MS_PRIVATE, MS_SHARED = 4096, 16384, 1 << 18, 1 << 20
CLONE_NEWNS, RENAME_EXCHANGE, AT_FDCWD, MNT_DETACH = 0x20000, 2, -100, 2
libc = ctypes.CDLL(None, use_errno=True)


def call(function, *arguments):
    arguments = [os.fsencode(one) if isinstance(one, (str, pathlib.Path)) else one for one in arguments]
    if getattr(libc, function)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), "%s: %s" % (function, os.strerror(ctypes.get_errno())))


def mount(source, target, kind=None, flags=0):
    call("mount", str(source), str(target), kind, flags, None)


def own_mount_namespace():
    call("unshare", CLONE_NEWNS)
    mount("none", "/", None, MS_REC | MS_PRIVATE)


@pytest.fixture
def namespace():
    """Put the test into a mount namespace of its own, and take it back afterwards."""
    before, directory = os.open("/proc/self/ns/mnt", os.O_RDONLY), os.getcwd()
    own_mount_namespace()
    yield
    call("setns", before, CLONE_NEWNS)
    os.chdir(directory)
    os.close(before)


@pytest.fixture
def base(tmp_path):
    path = tmp_path / "jailer"
    (path / "firecracker").mkdir(parents=True)
    return path


@pytest.fixture
def rules(base):
    return [{"base": str(base), "exec": "firecracker", "name": "(?P<vm_id>v[a-z2-7]+)"}]


@pytest.fixture
def host():
    return Host(boottime() + 60)


@pytest.fixture
def sentinel(tmp_path):
    """A tree outside of all jails. It must be the same after the test, whatever the test did."""
    path = tmp_path / "sentinel"
    (path / "inner" / "deep").mkdir(parents=True)
    for name in ("file", "inner/file", "inner/deep/file"):
        (path / name).write_text("precious " + name)
    before = checksum(path)
    yield path
    assert checksum(path) == before


@pytest.fixture
def started():
    """Processes that the test started, by pid; they end with it."""
    pids = []
    yield pids
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass


def checksum(path):
    """Return a digest of names, types, modes, owners and contents."""
    digest = hashlib.sha256()
    for directory, below, files in os.walk(path):
        below.sort()
        for name in sorted(below + files):
            status = os.lstat(os.path.join(directory, name))
            digest.update(repr((directory, name, status.st_mode, status.st_uid, status.st_mtime_ns)).encode())
            if stat.S_ISREG(status.st_mode):
                digest.update(pathlib.Path(directory, name).read_bytes())
    return digest.hexdigest()


def make(base, name="vabc"):
    path = base / "firecracker" / name
    (path / "root" / "dev").mkdir(parents=True)
    (path / "root" / "firecracker").write_bytes(b"x" * 10000)
    (path / "root" / "run").mkdir()
    return path


def collected(rules, host):
    return {one["name"]: one for one in jail.collect(rules, host)["resources"]}


def token(path, rules, host):
    one = collected(rules, host)[str(path)]
    return dict({key: one[key] for key in ("kind", "name", "vm_id", "identity", "details")}, stop=False)


def removed(path, rules, host):
    return jail.remove(token(path, rules, host), rules, host)


def aside_of(path):
    """Return where a jail is that was moved aside."""
    (found,) = (path.parent / jail.ASIDE).glob("*/" + path.name)
    return found


def left_in(path):
    return "; what is left of it is %s" % path


def result(outcome):
    return None if outcome is None else outcome["outcome"]


def child(function):
    """Fork a child that calls ``function`` and then waits for its end; return its pid once it has."""
    done, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            function()
            os.write(tell, b"1")
            while True:
                signal.pause()
        finally:
            os._exit(1)
    os.close(tell)
    assert os.read(done, 1) == b"1"
    os.close(done)
    return pid


# What is found


def test_jails_are_found_by_base_exec_and_name(base, rules, host):
    path = make(base)
    for other in ("firecracker/other", "jailer-x/vabc"):
        (base / other).mkdir(parents=True)
    (base / "firecracker" / "vfile").write_text("")
    (base / "firecracker" / "vlink").symlink_to(path)
    (base / "link").symlink_to(base / "firecracker")
    found = jail.collect(rules, host)
    assert [one["name"] for one in found["resources"]] == [str(path)]
    assert found["foreign"] == 1
    one = found["resources"][0]
    assert (one["vm_id"], one["in_use"], one["bytes"], one["details"]["mounts"]) == ("vabc", False, None, 0)
    assert 0 <= one["age_seconds"] < 60


def test_without_an_exec_level_the_jails_are_right_below_the_base(base, host):
    make(base)
    (base / "vxyz").mkdir()
    names = [{"base": str(base), "exec": "", "name": "(?P<vm_id>v[a-z]+)"}]
    assert list(collected(names, host)) == [str(base / "vxyz")]
    assert result(removed(base / "vxyz", names, host)) == r.REAPED
    assert list(collected([{"base": str(base), "name": "(?P<vm_id>v[a-z]+)"}], host)) == [
        str(base / "firecracker" / "vabc")
    ]


def test_a_base_that_is_missing_is_absent_only_when_all_are(base, rules, host):
    missing = {"base": "/nonexistent/jailer", "name": "(?P<vm_id>.*)"}
    with pytest.raises(Absent, match="/nonexistent/jailer"):
        jail.collect([missing], host)
    make(base)
    assert len(collected(rules + [missing], host)) == 1


@pytest.mark.parametrize("path", ["relative", "/", "", "/a/../b", "/a//b"])
def test_a_base_must_be_an_absolute_path(path, host):
    with pytest.raises(r.RuleError, match="base"):
        jail.collect([{"base": path, "name": "(?P<vm_id>.*)"}], host)


def test_a_base_may_be_a_link_but_nothing_below_it(base, rules, host, tmp_path, sentinel):
    path = make(base)
    link = tmp_path / "link"
    link.symlink_to(base)
    linked = [dict(rules[0], base=str(link))]
    one = token(link / "firecracker" / "vabc", linked, host)
    (base / "firecracker").rename(base / "moved")
    (base / "firecracker").symlink_to(base / "moved")
    assert result(jail.remove(one, linked, host)) == r.IDENTITY_CHANGED
    (base / "firecracker").unlink()
    (base / "moved").rename(base / "firecracker")
    path.rename(base / "vaside")
    path.symlink_to(sentinel)
    assert result(jail.remove(one, linked, host)) == r.IDENTITY_CHANGED
    path.unlink()
    (base / "vaside").rename(path)
    assert result(jail.remove(one, linked, host)) == r.REAPED


def test_a_jail_made_again_is_another_one(base, rules, host):
    path = make(base)
    one = token(path, rules, host)
    again = token(path, rules, host)
    assert one == again
    shutil.rmtree(path)
    make(base)
    assert token(path, rules, host)["identity"] != one["identity"]
    for act in (jail.inspect, jail.remove):
        assert result(act(one, rules, host)) == r.IDENTITY_CHANGED
    assert path.is_dir()


def test_the_identity_is_that_of_the_object_not_of_its_name_or_contents(base, rules, host):
    path = make(base)
    before = token(path, rules, host)["identity"]
    (path / "more").mkdir()
    path.rename(base / "firecracker" / "vmoved")
    assert token(base / "firecracker" / "vmoved", rules, host)["identity"] == before


def test_without_file_handles_the_birth_takes_their_place(base, rules, host, monkeypatch):
    monkeypatch.setattr(safe_tree, "_handle", lambda directory: None)
    identities = set()
    for _round in range(5):
        path = make(base)
        one = token(path, rules, host)
        (path / "more").mkdir()
        assert token(path, rules, host) == one
        assert "inode:%d:" % path.stat().st_ino in one["identity"]
        identities.add(one["identity"])
        assert result(jail.remove(one, rules, host)) == r.REAPED
    assert len(identities) == 5


def test_what_is_gone_is_gone(base, rules, host):
    path = make(base)
    one = token(path, rules, host)
    shutil.rmtree(path)
    assert [result(act(one, rules, host)) for act in (jail.inspect, jail.remove)] == [r.ALREADY_GONE] * 2
    shutil.rmtree(base)
    assert result(jail.remove(one, rules, host)) == r.ALREADY_GONE


def test_row_38_what_vanishes_between_listing_and_reading_is_not_an_error(base, rules, host, monkeypatch):
    path = make(base)
    places = processes.places
    monkeypatch.setattr(processes, "places", lambda table: shutil.rmtree(path) or places(table))
    assert jail.collect(rules, host)["resources"] == []


@pytest.mark.parametrize(
    "tail",
    [
        "",
        "/",
        "/firecracker",
        "/vabc",
        "/firecracker/vabc/",
        "/firecracker/vabc/root",
        "/x/../firecracker/vabc",
        "/firecracker/../firecracker/vabc",
        "//vabc",
        "/other/vabc",
        "/firecracker/..",
        "x/firecracker/vabc",
    ],
)
def test_a_token_is_acted_on_only_by_its_own_name(base, rules, host, tail):
    make(base)
    (base / "other" / "vabc").mkdir(parents=True)
    one = {"kind": "jail", "name": str(base) + tail, "vm_id": "vabc", "identity": "x", "stop": False}
    assert result(jail.remove(one, rules, host)) == r.FAILED
    one = dict(token(base / "firecracker" / "vabc", rules, host), vm_id="vother")
    assert result(jail.remove(one, rules, host)) == r.FAILED


@pytest.mark.parametrize("level", ["..", "."])
def test_no_token_leads_out_of_the_base(base, host, level):
    rules = [{"base": str(base), "name": "(?P<vm_id>v[a-z]+)"}]
    path = os.path.normpath(base / level / "vabc")
    os.mkdir(path)
    one = {"kind": "jail", "name": "%s/%s/vabc" % (base, level), "vm_id": "vabc", "stop": False}
    with safe_tree.Tree(os.path.dirname(path), ["vabc"]) as tree:
        one["identity"] = tree.identity()
    assert result(jail.remove(one, rules, host)) == r.FAILED
    assert os.path.isdir(path)


HOSTILE = [
    "a b",
    "a'b\"c",
    "$(reboot)",
    "`reboot`",
    "{{ x }}",
    "a\nb",
    "-rf",
    "\u202ea",
    "x" * 255,
    "a\\b",
    "...",
    os.fsdecode(b"v\xff\xfe"),
    "\x1b[2J",
    "*",
    "~",
]


def test_row_36_hostile_names_of_jails_are_foreign(base, host):
    rules = [{"base": str(base), "name": "(?P<vm_id>(?s:.*))"}]
    for name in HOSTILE:
        make(base, name)
    make(base, "good")
    found = jail.collect(rules, host)
    assert [one["vm_id"] for one in found["resources"]] == ["good"]
    assert found["foreign"] == len(HOSTILE)
    json.dumps(found, ensure_ascii=False).encode()
    for name in HOSTILE:
        one = {"kind": "jail", "name": str(base / "firecracker" / name), "vm_id": name, "identity": "x"}
        assert result(jail.remove(one, rules, host)) == r.FAILED


# What is in use


def cwd(path):
    os.chdir(path / "root" / "run")


def chroot(path):
    os.chroot(path / "root")
    os.chdir("/")


def pivot(path):
    """Do what the jailer does: a namespace of its own, in which the jail becomes the root."""
    own_mount_namespace()
    mount(path / "root", path / "root", None, MS_BIND | MS_REC)
    os.chdir(path / "root")
    call("pivot_root", ".", ".")
    call("umount2", ".", MNT_DETACH)
    os.chdir("/")


def new_namespace_only(path):
    own_mount_namespace()
    os.chdir(path)


@pytest.mark.parametrize("enter", [cwd, chroot, pivot, new_namespace_only])
def test_a_process_in_a_jail_protects_it(base, rules, host, started, enter):
    path, other = make(base), make(base, "vabcd")
    pid = child(lambda: enter(path))
    started.append(pid)
    found = collected(rules, host)
    assert {name: one["in_use"] for name, one in found.items()} == {str(path): True, str(other): False}
    one = token(path, rules, host)
    for act in (jail.inspect, jail.remove):
        outcome = act(one, rules, host)
        assert outcome["outcome"] == r.DEFERRED
        (holder,) = outcome["holders"]
        assert (holder["pid"], "cwd" in holder["by"] or "root" in holder["by"]) == (pid, True)
        assert (holder["mount_namespace"] is not None) == (enter in (pivot, new_namespace_only))
    assert (path / "root" / "firecracker").exists()
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert result(jail.remove(one, rules, host)) == r.REAPED


@pytest.mark.parametrize("deleted", [False, True])
def test_a_process_whose_executable_is_in_a_jail_protects_it(base, rules, host, started, deleted):
    path = make(base)
    program = path / "root" / "vmm"
    shutil.copy("/bin/sleep", program)
    process = subprocess.Popen([str(program), "60"], cwd="/")
    started.append(process.pid)
    if deleted:
        program.unlink()
    assert collected(rules, host)[str(path)]["in_use"]
    outcome = removed(path, rules, host)
    (holder,) = outcome["holders"]
    assert (outcome["outcome"], holder["type"], holder["pid"]) == (r.DEFERRED, "process", process.pid)
    assert holder["name"].startswith("%d vmm (" % process.pid) and holder["name"].endswith("exe)")
    assert (holder["by"], holder["fd"]) == (["exe"], None)


def test_processes_that_cannot_be_seen_make_the_kind_unreadable(base, rules):
    make(base)

    def unprivileged(_item):
        os.setresuid(65534, 65534, 65534)
        return jail.collect([{"base": "/proc/self/cwd", "name": "x(?P<vm_id>y)"}], Host(boottime() + 10))

    worker = Worker(unprivileged)
    with pytest.raises(ProbeError, match="needs root"):
        worker.call(None, 10)
    worker.close()


# Removal


def test_a_jail_is_removed_with_all_that_is_in_it_and_its_parent_stays(base, rules, host):
    path, other = make(base), make(base, "vother")
    for name in ("a", "b/c/d", "b/e"):
        (path / name).mkdir(parents=True)
        (path / name / "file").write_bytes(b"x" * 5000)
    (path / "twice").write_bytes(b"x" * 9000)
    os.link(path / "twice", path / "once more")
    os.chmod(path / "b", 0)
    one = token(path, rules, host)
    assert jail.inspect(one, rules, host) is None
    outcome = jail.remove(one, rules, host)
    assert (outcome["outcome"], outcome["bytes"]) == (r.REAPED, 3 * 8192 + 12288 + 12288)
    assert not path.exists()
    assert other.is_dir()


def test_row_28_nothing_outside_of_a_jail_changes(base, rules, host, sentinel, namespace):
    path = make(base)
    root = path / "root"
    (root / "link").symlink_to(sentinel)
    (root / "up").symlink_to("../../../../sentinel/inner")
    (root / "to file").symlink_to(sentinel / "file")
    (root / "dangling").symlink_to("/nonexistent")
    (root / "itself").symlink_to(".")
    os.link(sentinel / "file", root / "hard")
    os.mkfifo(root / "fifo")
    os.mknod(root / "dev" / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(root / "dev" / "disk", stat.S_IFBLK | 0o666, os.makedev(7, 250))
    held = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("/proc/self/fd/%d/s" % held)  # its whole path would be too long
        os.close(held)
        for name in ("bind", "bind2/deep"):
            (root / name).mkdir(parents=True)
        (root / "bound file").write_text("")
        mount(sentinel, root / "bind", None, MS_BIND)
        mount(sentinel / "inner", root / "bind2" / "deep", None, MS_BIND)
        mount(sentinel / "file", root / "bound file", None, MS_BIND)
        assert collected(rules, host)[str(path)]["details"]["mounts"] == 3
        outcome = removed(path, rules, host)
    assert (outcome["outcome"], outcome["message"]) == (r.REAPED, "")
    assert not path.exists()
    assert os.lstat(sentinel / "file").st_nlink == 1


def test_a_bind_mount_that_appears_after_the_unmounting_is_not_descended_into(
    base, rules, host, sentinel, namespace, monkeypatch
):
    path = make(base)
    (path / "bind").mkdir()
    one = token(path, rules, host)
    unmount = safe_tree.Tree.unmount
    monkeypatch.setattr(
        safe_tree.Tree, "unmount", lambda tree: unmount(tree) or mount(sentinel, tree.path + "/bind", None, MS_BIND)
    )
    outcome = jail.remove(one, rules, host)
    assert (outcome["outcome"], outcome["message"]) == (r.DEFERRED, "mounted: bind" + left_in(aside_of(path)))
    assert outcome["unfinished"]
    monkeypatch.undo()
    assert result(jail.remove(one, rules, host)) == r.REAPED


def test_row_36_hostile_names_in_a_jail_are_removed(base, rules, host, sentinel, namespace):
    path = make(base)
    for name in HOSTILE:
        (path / name / name).mkdir(parents=True)
        (path / name / name / ("file " + name)[:255]).write_text("")
        mount("none", path / name / name, "tmpfs")
    assert len(mounts.below(mounts.read(), str(path))) == len(HOSTILE)
    assert result(removed(path, rules, host)) == r.REAPED


def test_nested_and_stacked_mounts_are_unmounted_deepest_first(base, rules, host, sentinel, namespace):
    path = make(base)
    mount("none", path / "root", "tmpfs")
    (path / "root" / "a").mkdir()
    mount("none", path / "root" / "a", "tmpfs")
    mount("none", path / "root" / "a", "tmpfs")
    (path / "root" / "a" / "b").mkdir()
    mount(sentinel, path / "root" / "a" / "b", None, MS_BIND)
    assert collected(rules, host)[str(path)]["details"]["mounts"] == 4
    assert result(removed(path, rules, host)) == r.REAPED
    assert mounts.below(mounts.read(), str(path)) == []


def test_unmounting_in_a_jail_unmounts_nothing_outside(base, rules, host, sentinel, namespace):
    path = make(base)
    (path / "shared").mkdir()
    mount(sentinel, sentinel, None, MS_BIND)
    mount("none", sentinel, None, MS_SHARED)
    mount("none", sentinel / "inner", "tmpfs")
    (sentinel / "inner" / "in the tmpfs").write_text("precious")
    mount(sentinel, path / "shared", None, MS_BIND | MS_REC)
    before = [one.point for one in mounts.below(mounts.read(), str(sentinel))]
    assert len(before) == 2
    assert result(removed(path, rules, host)) == r.REAPED
    assert [one.point for one in mounts.below(mounts.read(), str(sentinel))] == before
    assert (sentinel / "inner" / "in the tmpfs").read_text() == "precious"
    call("umount2", sentinel / "inner", 0)
    call("umount2", sentinel, 0)


def test_a_jail_that_is_itself_a_mount_is_unmounted(base, rules, host, namespace):
    path = base / "firecracker" / "vabc"
    path.mkdir()
    mount("none", path, "tmpfs")
    (path / "root").mkdir()
    mount("none", path / "root", "tmpfs")
    assert result(removed(path, rules, host)) == r.REAPED
    assert not path.exists()
    make(base)
    mount("none", path, "tmpfs")
    outcome = removed(path, rules, host)
    assert outcome["outcome"] == r.DEFERRED
    assert "another one" in outcome["message"]
    assert (path / "root" / "firecracker").exists()
    assert result(removed(path, rules, host)) == r.REAPED


def test_a_mount_that_is_busy_is_named_and_nothing_removed(base, rules, host, namespace):
    path = make(base)
    mount("none", path / "root" / "dev", "tmpfs")
    with open(path / "root" / "dev" / "open", "w"):
        outcome = removed(path, rules, host)
        assert (outcome["outcome"], outcome["message"]) == (r.DEFERRED, "mounted: %s/root/dev" % path)
        assert (path / "root" / "firecracker").exists() and "unfinished" not in outcome
    assert result(removed(path, rules, host)) == r.REAPED


def test_an_immutable_file_is_left_and_named(base, rules, host):
    path = make(base)
    try:
        subprocess.run(["chattr", "+i", str(path / "root" / "firecracker")], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no immutable files here")
    try:
        one = token(path, rules, host)
        outcome = jail.remove(one, rules, host)
    finally:
        subprocess.run(["chattr", "-i", str(aside_of(path) / "root" / "firecracker")], check=True)
    assert (outcome["outcome"], outcome["unfinished"]) == (r.FAILED, True)
    why = "firecracker: Operation not permitted, perhaps immutable or append-only: see lsattr"
    assert outcome["message"] == why + left_in(aside_of(path))
    assert result(jail.remove(one, rules, host)) == r.REAPED


def test_a_tree_of_10000_levels_needs_few_descriptors_and_little_stack(base, rules, monkeypatch):
    host = Host(boottime() + 240)
    monkeypatch.setattr(jail, "REMOVE_SECONDS", 200)  # a busy disk is not what is tested here
    path = make(base)
    place = os.open(path, os.O_RDONLY)
    for _level in range(10000):
        os.mkdir("d", dir_fd=place)
        with open(os.open("f", os.O_CREAT | os.O_WRONLY, dir_fd=place), "w"):
            below = os.open("d", os.O_RDONLY, dir_fd=place)
        os.close(place)
        place = below
    os.close(place)
    one = token(path, rules, host)
    soft, hard = limits.getrlimit(limits.RLIMIT_NOFILE)
    limits.setrlimit(limits.RLIMIT_NOFILE, (256, hard))
    recursion = sys.getrecursionlimit()
    sys.setrecursionlimit(300)
    try:
        outcome = jail.remove(one, rules, host)
    finally:
        sys.setrecursionlimit(recursion)
        limits.setrlimit(limits.RLIMIT_NOFILE, (soft, hard))
        subprocess.run(["rm", "-rf", str(path)], check=True)  # what is left of it no other rmtree can remove
    assert (outcome["outcome"], outcome["message"]) == (r.REAPED, "")


def test_a_removal_that_takes_too_long_goes_on_in_the_next_sweep(base, rules, host, monkeypatch):
    path = make(base)
    for number in range(3000):
        (path / str(number)).write_bytes(b"x")
    one = token(path, rules, host)
    ticks = itertools.count()  # a clock that goes on by a second whenever it is looked at
    monkeypatch.setattr(jail, "boottime", lambda: next(ticks))
    outcome = jail.remove(one, rules, host)
    assert outcome["outcome"] == r.DEFERRED
    assert "next sweep" in outcome["message"]
    left = len(os.listdir(aside_of(path)))
    assert 0 < left < 3000
    assert outcome["bytes"] > 0 and outcome["unfinished"]
    monkeypatch.undo()
    assert result(jail.remove(one, rules, host)) == r.REAPED


def test_a_jail_that_is_exchanged_while_it_is_removed_stays(base, rules, host, monkeypatch):
    path, other = make(base), base / "firecracker" / "other"
    run, moved = safe_tree.Removal.run, []

    def exchanged(removal):
        run(removal)
        moved.append(aside_of(path))
        moved[0].rename(other)
        moved[0].mkdir()

    monkeypatch.setattr(safe_tree.Removal, "run", exchanged)
    outcome = removed(path, rules, host)
    assert (outcome["outcome"], outcome["message"]) == (
        r.DEFERRED,
        "another directory of the same name took its place" + left_in(moved[0]),
    )
    assert moved[0].is_dir()


# Many together


@pytest.fixture
def looks(monkeypatch):
    """How often the processes are looked at, and what happens right before such a look, by its number."""
    found = {"count": 0, "before": {}}
    places = processes.places

    def looked(table):
        found["count"] += 1
        found["before"].get(found["count"], lambda: None)()
        return list(places(table))

    monkeypatch.setattr(processes, "places", looked)
    return found


def tokens_of(paths, rules, host):
    found = collected(rules, host)
    keys = ("kind", "name", "vm_id", "identity", "details")
    return [dict({key: found[str(path)][key] for key in keys}, stop=False) for path in paths]


def several(base, count=4):
    return [make(base, "v%s" % letter) for letter in "abcdefgh"[:count]]


def test_many_jails_share_the_looks_at_the_processes(base, rules, host, looks):
    paths = several(base)
    some = tokens_of(paths, rules, host)
    looks["count"] = 0
    assert [result(one) for one in jail.remove_all(some, rules, host)] == [r.REAPED] * 4
    assert (looks["count"], os.listdir(base / "firecracker")) == (2, [])
    some = tokens_of(several(base), rules, host)
    looks["count"] = 0
    aside = jail.set_aside_all(some, rules, host)
    assert [result(one) for one in aside] == [r.SET_ASIDE] * 4 and looks["count"] == 2
    assert [one["aside"]["path"] for one in aside] == [str(aside_of(path)) for path in paths]
    looks["count"] = 0
    outcomes = jail.remove_all([dict(one, resume=True) for one in some], rules, host)
    assert [result(one) for one in outcomes] == [r.REAPED] * 4
    assert (looks["count"], os.listdir(base / "firecracker")) == (1, [])


@pytest.mark.parametrize("act", [jail.remove_all, jail.set_aside_all])
@pytest.mark.parametrize("moment", [1, 2])
def test_one_that_a_process_is_in_stays_and_the_others_go(base, rules, host, looks, started, act, moment):
    paths = several(base)
    some = tokens_of(paths, rules, host)
    before = checksum(paths[1])

    def enter():
        place = paths[1] if paths[1].exists() else aside_of(paths[1])  # moved aside by then
        started.append(child(lambda: os.chdir(place)))

    looks["count"] = 0
    looks["before"][moment] = enter
    outcomes = act(some, rules, host)
    done = r.REAPED if act is jail.remove_all else r.SET_ASIDE
    assert [result(one) for one in outcomes] == [done, r.DEFERRED, done, done]
    assert [one["name"].split()[0] for one in outcomes[1]["holders"]] == [str(started[0])]
    assert "unfinished" not in outcomes[1]
    assert paths[1].is_dir() and checksum(paths[1]) == before
    assert not any(path.exists() for path in paths[:1] + paths[2:])


def test_another_one_and_one_that_is_gone_are_no_hindrance(base, rules, host):
    paths = several(base)
    some = tokens_of(paths, rules, host)
    shutil.rmtree(paths[0])
    shutil.rmtree(paths[1])
    make(base, "vb")
    some.insert(2, dict(some[2], name=str(base / "elsewhere")))
    outcomes = jail.remove_all(some, rules, host)
    assert [result(one) for one in outcomes] == [
        r.ALREADY_GONE, r.IDENTITY_CHANGED, r.FAILED, r.REAPED, r.REAPED,
    ]
    assert paths[1].is_dir()


def test_one_that_took_the_place_of_one_that_was_moved_back_from_is_left(base, rules, host, looks, started):
    paths = several(base, 2)
    some = tokens_of(paths, rules, host)

    def taken():
        started.append(child(lambda: os.chdir(aside_of(paths[0]))))
        paths[0].mkdir()

    looks["count"] = 0
    looks["before"][2] = taken
    outcomes = jail.remove_all(some, rules, host)
    assert [result(one) for one in outcomes] == [r.DEFERRED, r.REAPED]
    # Out of its place nobody sees it: it has to be remembered.
    assert outcomes[0]["unfinished"] and "could not be moved back" in outcomes[0]["message"]
    assert os.listdir(paths[0]) == [] and (aside_of(paths[0]) / "root" / "firecracker").exists()


def test_when_the_time_is_up_the_rest_is_aside_and_goes_with_the_next_call(base, rules, host, monkeypatch):
    paths = several(base)
    some = tokens_of(paths, rules, host)
    begin, run = boottime(), safe_tree.Removal.run
    late = []
    monkeypatch.setattr(jail, "boottime", lambda: begin + (3 if late else 0))
    monkeypatch.setattr(safe_tree.Removal, "run", lambda removal: late.append(1) or run(removal))
    monkeypatch.setattr(jail, "REMOVE_SECONDS", 60)
    outcomes = jail.remove_all(some, rules, host)
    assert [result(one) for one in outcomes] == [r.REAPED]
    assert not any(path.exists() for path in paths) and aside_of(paths[1]).is_dir()
    late.clear()
    assert [result(one) for one in jail.remove_all(some[1:], rules, host)] == [r.REAPED]
    # As does one alone, also where it was to be set aside, and the next sweep.
    assert result(jail.remove(some[2], rules, host)) == r.REAPED
    there = str(aside_of(paths[3]))
    again = jail.set_aside(some[3], rules, host)
    assert (result(again), again["aside"]) == (r.SET_ASIDE, {"path": there})
    assert result(jail.remove(dict(some[3], resume=True), rules, host)) == r.REAPED
    assert os.listdir(base / "firecracker") == []


def test_no_more_are_held_open_than_descriptors_allow(base, rules, host, monkeypatch):
    monkeypatch.setattr(jail, "TOGETHER", 3)
    some = tokens_of(several(base), rules, host)
    before = os.listdir("/proc/self/fd")
    assert len(jail.remove_all(some, rules, host)) == 3
    assert os.listdir("/proc/self/fd") == before


def test_a_jail_in_a_jail_waits_for_the_next_call(base, host):
    rules = [
        {"base": str(base), "exec": "", "name": "(?P<vm_id>firecracker)"},
        {"base": str(base), "exec": "firecracker", "name": "(?P<vm_id>v[a-z]+)"},
    ]
    some = tokens_of([make(base), base / "firecracker"], rules, host)
    assert [result(one) for one in jail.remove_all(some, rules, host)] == [r.REAPED]
    assert (base / "firecracker").is_dir()
    assert [result(one) for one in jail.remove_all([some[1], some[0]], rules, host)] == [r.REAPED]
    assert result(jail.remove(some[0], rules, host)) == r.ALREADY_GONE


def test_processes_that_cannot_be_seen_after_the_move_leave_it_to_the_next_look(base, rules, host, looks):
    paths = several(base, 2)
    some = tokens_of(paths, rules, host)
    looks["count"] = 0

    def refused():
        raise ProbeError("cannot be seen")

    looks["before"][2] = refused
    with pytest.raises(ProbeError):
        jail.remove_all(some, rules, host)
    assert (aside_of(paths[0]) / "root" / "firecracker").exists()
    assert [result(jail.remove(one, rules, host)) for one in some] == [r.REAPED] * 2


def test_one_that_cannot_be_moved_has_a_look_of_its_own(base, rules, host, looks, started, namespace):
    paths = several(base, 2)
    mount("none", paths[0], "tmpfs")
    some = tokens_of(paths, rules, host)
    looks["count"] = 0
    looks["before"][3] = lambda: started.append(child(lambda: os.chdir(paths[0])))
    outcomes = jail.remove_all(some, rules, host)
    assert [result(one) for one in outcomes] == [r.DEFERRED, r.REAPED]
    assert os.path.ismount(paths[0]) and os.listdir(base / "firecracker") == [paths[0].name]
    os.kill(started[0], signal.SIGKILL)
    os.waitpid(started[0], 0)
    (outcome,) = jail.set_aside_all(some[:1], rules, host)
    assert (result(outcome), outcome["waits"]) == (r.DEFERRED, True)
    assert jail.ASIDE not in os.listdir(base / "firecracker")


RACER = """
import ctypes, os, sys
libc = ctypes.CDLL(None)
jail = sys.argv[1].encode()
os.setresuid(65534, 65534, 65534)
names = [b"%s/d%d" % (jail, number) for number in range(int(sys.argv[2]))]
print("ready", flush=True)
while True:
    for name in names:
        libc.renameat2(-100, name, -100, jail + b"/link", 2)
        libc.renameat2(-100, name, -100, jail + b"/link", 2)
"""


def test_row_28_directories_exchanged_with_a_link_while_they_are_removed(base, rules, host, sentinel):
    """A process of the jail's user exchanges directories with a link to the sentinel as fast as it can."""
    lost = 0
    for _round in range(8):
        path = make(base)
        os.chown(path, 65534, 65534)
        (path / "link").symlink_to(sentinel)
        for number in range(200):
            (path / ("d%d" % number) / "inner" / "deep").mkdir(parents=True)
            (path / ("d%d" % number) / "file").write_text("")
        for directory in (base.parents[0], base.parents[1], base.parents[2]):
            os.chmod(directory, 0o755)
        one = token(path, rules, host)
        racer = subprocess.Popen(
            [sys.executable, "-c", RACER, str(path), "200"], stdout=subprocess.PIPE, text=True, cwd="/"
        )
        try:
            assert racer.stdout.readline() == "ready\n"
            outcome = jail.remove(one, rules, host)
        finally:
            racer.kill()
            racer.wait()
            racer.stdout.close()
        assert outcome["outcome"] in (r.REAPED, r.DEFERRED), outcome
        lost += outcome["outcome"] == r.REAPED
        if path.exists():
            assert result(jail.remove(one, rules, host)) == r.REAPED
    assert lost > 0


def test_row_31_a_base_on_a_file_system_that_does_not_answer_hangs_only_the_child(tmp_path, namespace):
    dead = tmp_path / "dead"
    dead.mkdir()
    try:
        server = os.open("/dev/fuse", os.O_RDWR)
        options = b"fd=%d,rootmode=40000,user_id=0,group_id=0" % server
        call("mount", "fuse", dead, b"fuse", 0, options)
    except OSError as err:
        pytest.skip("no FUSE here: %s" % err)
    try:
        rules = [{"base": str(dead), "name": "(?P<vm_id>v[a-z]+)"}]
        worker = Worker(lambda _item: jail.collect(rules, Host(boottime() + 10)))
        begin = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            worker.call(None, 0.5)
        assert time.monotonic() - begin < 1.5
    finally:
        os.close(server)


# The mount table


def test_mount_points_may_have_any_name():
    line = "36 1 8:1 /a\\040b /mnt/x\\012y\\134z\\011\x0c\u2028 rw shared:1 master:2 - ext4 /dev/vda rw\n"
    (one,) = mounts.parse(line + "\n# broken\n1 2 3\n")
    assert one == mounts.Mount(36, 1, "8:1", "/a b", "/mnt/x\ny\\z\t\x0c\u2028", True, "ext4")


def test_the_deepest_mount_comes_first_however_the_table_is_sorted():
    def line(number, parent, point):
        return "%d %d 0:1 / %s rw - tmpfs none rw\n" % (number, parent, point)

    table = line(9, 1, "/j") + line(3, 9, "/j/a") + line(2, 3, "/j/a") + line(5, 2, "/j/a/b") + line(7, 1, "/jail")
    assert [one.id for one in mounts.below(mounts.parse(table), "/j")] == [5, 2, 3, 9]


def test_the_root_of_another_namespace_is_seen_through_our_mounts():
    table = mounts.parse(
        "1 0 8:1 / / rw - ext4 a rw\n2 1 8:2 /jails /srv rw - ext4 b rw\n3 1 8:1 /x /y rw - ext4 a rw\n"
    )
    here = mounts.by_device(table)

    def seen(device, root):
        return mounts.seen_as(mounts.Mount(0, 0, device, root, "/", False, "ext4"), here)

    assert seen("8:2", "/jails/v/root") == ["/srv/v/root"]
    assert seen("8:2", "/jails") == ["/srv"]
    assert seen("8:1", "/x/v") == ["/x/v", "/y/v"]
    assert seen("8:2", "/elsewhere") == []
    assert seen("8:3", "/jails") == []


def test_what_the_kernel_answers_is_told_apart():
    assert isinstance(safe_tree._blocked(OSError(errno.EBUSY, ""), "x"), safe_tree.Busy)
    assert isinstance(safe_tree._blocked(OSError(errno.EROFS, ""), "x"), safe_tree.Refused)
    assert safe_tree.shown("a\n\x1b\udcff") == "a\\n\\x1b\\udcff"
