"""The test hosts themselves: what they can do, and that nothing of them stays."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

HOSTS = Path(__file__).with_name("hosts.py")
CACHE = Path(os.environ.get("REAPER_TEST_CACHE", "/var/cache/microvm-reaper-tests"))

# Building images may be part of the first test.
pytestmark = [pytest.mark.hosts, pytest.mark.timeout(600)]


def hosts(*args: str | Path, check: bool = True, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(HOSTS), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(env or {})})
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def remove_stale() -> None:
    """Remove what nobody owns any more. The hosts of this test run, in use, are not meant: it lives."""
    hosts("down", "--all", env={"REAPER_TEST_OWNER": ""})


def inside(state: Path, name: str, script: str) -> str:
    return hosts("exec", "--state", state, name, "--", script).stdout


def variables(state: Path) -> dict[str, str]:
    """The variables of a state directory's only host."""
    pairs = re.findall(r"^      (\w+): (.*)$", (state / "inventory.yml").read_text(), re.MULTILINE)
    return {key: json.loads(value) for key, value in pairs}


def run_ids(state: Path) -> list[str]:
    records = [json.loads(path.read_text()) for path in (CACHE / "runs").glob("*.json")]
    return [record["id"] for record in records if record["state"] == str(state)]


def traces(run_id: str) -> list[str]:
    """Everything on this machine that carries the id of a run: processes, containers, cgroups, files, mounts."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environment, command = (process / "environ").read_bytes(), (process / "cmdline").read_bytes()
        except OSError:
            continue
        if run_id.encode() in environment + command and int(process.name) != os.getpid():
            found.append(f"process {process.name}: {command!r}")
    listing = ["podman", "ps", "--all", "--format", "{{.Names}} {{.Labels}}"]
    for text in subprocess.run(listing, capture_output=True, text=True, check=True).stdout.splitlines():
        if run_id in text:
            found.append(f"container {text}")
    for top, directories, _ in os.walk("/sys/fs/cgroup"):
        found += [f"cgroup {top}/{name}" for name in directories if run_id in name]
    found += [str(path) for path in [*Path("/tmp").glob(f"*{run_id}*"), *(CACHE / "runs").glob(f"*{run_id}*")]]
    found += [line for line in Path("/proc/self/mounts").read_text().splitlines() if run_id in line]
    return found


def machine() -> dict[str, str]:
    """What only exists once on the machine, whoever made it."""
    commands = {"links": "ip -oneline link", "namespaces": "ip netns", "loops": "losetup --list --noheadings"}
    return {
        name: subprocess.run(text.split(), capture_output=True, text=True, check=True).stdout
        for name, text in commands.items()
    }


def gone(run_id: str) -> bool:
    """Whether no trace is left; a killed process needs a moment."""
    deadline = time.monotonic() + 5
    while traces(run_id):
        if time.monotonic() > deadline:
            raise AssertionError(f"left of run {run_id}: {traces(run_id)}")
        time.sleep(0.1)
    return True


@pytest.fixture(scope="module", params=["container", "kernel"])
def state(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One started host, `one`, of each kind; taken down, with everything that the tests left in it."""
    directory = tmp_path_factory.mktemp(request.param)
    before = machine()
    hosts("up", "--kind", request.param, "--name", "one", "--state", directory)
    (run_id,) = run_ids(directory)
    yield directory
    assert traces(run_id)
    hosts("down", "--state", directory)
    hosts("down", "--state", directory)
    assert gone(run_id)
    assert not directory.exists()
    assert machine() == before


def test_a_host_has_a_name_and_a_machine_id_of_its_own(state: Path) -> None:
    name, machine_id = inside(state, "one", "hostname; cat /etc/machine-id").split()
    assert name == "one"
    assert re.fullmatch(r"[0-9a-f]{32}", machine_id)
    assert machine_id != Path("/etc/machine-id").read_text().strip()


def test_the_exit_code_of_a_command_comes_back(state: Path) -> None:
    assert hosts("exec", "--state", state, "one", "--", "exit 7", check=False).returncode == 7


def test_ansible_reaches_a_host_by_the_inventory(state: Path) -> None:
    pytest.importorskip("ansible")
    command = [sys.executable, "-m", "ansible", "adhoc", "-i", f"{state}/inventory.yml", "reap_hosts", "-m", "ping"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "one | SUCCESS" in done.stdout, done.stdout + done.stderr


def test_cgroups_are_made_killed_and_removed(state: Path) -> None:
    known = variables(state)
    cgroup = f"{known['test_cgroup_mount']}/{known['test_cgroup_parent']}/vm"
    script = f"""
        mkdir -p {cgroup}; sleep 100 & echo $! > {cgroup}/cgroup.procs
        grep populated {cgroup}/cgroup.events
        echo 1 > {cgroup}/cgroup.kill
        until grep -q 'populated 0' {cgroup}/cgroup.events; do sleep 0.01; done
        rmdir {cgroup} && test ! -e {cgroup} && echo removed"""
    assert inside(state, "one", script).splitlines()[-2:] == ["populated 1", "removed"]


def test_containerd_runs_a_real_task_in_a_cgroup(state: Path) -> None:
    known = variables(state)
    ctr = f"ctr --namespace {known['test_containerd_namespace']}"
    script = f"""
        {ctr} images import {known["test_busybox_archive"]} > /dev/null
        {ctr} run --detach {known["test_busybox_image"]} box sleep 1000
        {ctr} tasks ls
        cat {known["test_cgroup_mount"]}/{known["test_containerd_namespace"]}/box/cgroup.events"""
    text = inside(state, "one", script)
    assert re.search(r"box +\d+ +RUNNING", text)
    assert "populated 1" in text


def test_snapshots_form_chains(state: Path) -> None:
    snapshots = f"ctr --namespace {variables(state)['test_containerd_namespace']} snapshots"
    script = f"""
        {snapshots} prepare base ""; {snapshots} commit base-done base
        {snapshots} prepare child base-done
        {snapshots} ls | grep child; {snapshots} rm base-done"""
    done = hosts("exec", "--state", state, "one", "--", script, check=False)
    assert re.search(r"child +base-done +Active", done.stdout)
    assert "cannot remove snapshot with child" in done.stderr


def test_a_zombie_of_a_living_parent_stays(state: Path) -> None:
    script = "import os, time; pid = os.fork() or os._exit(0); time.sleep(0.3); print(open(f'/proc/{pid}/stat').read())"
    assert ") Z " in inside(state, "one", f'python3 -c "{script}"')


def test_thin_volumes_are_made_and_removed(state: Path) -> None:
    if not variables(state)["test_device_mapper"]:
        pytest.skip("a container has this machine's kernel, which may lack device-mapper")
    script = """
        set -e; export DM_DISABLE_UDEV=1
        /opt/test/mkpool pool 64
        dmsetup message pool 0 'create_thin 1'
        dmsetup create volume --table '0 20480 thin /dev/mapper/pool 1'
        dd if=/dev/zero of=/dev/mapper/volume bs=1M count=3 2> /dev/null
        dmsetup status pool
        dmsetup remove volume
        dmsetup message pool 0 'delete 1'
        dmsetup status pool"""
    used = re.findall(r" (\d+)/1024 ", inside(state, "one", script))
    assert used == ["48", "0"]


def test_a_second_start_in_one_directory_is_refused(state: Path) -> None:
    done = hosts("up", "--kind", "container", "--name", "two", "--state", state, check=False)
    assert done.returncode == 1
    assert "has hosts already" in done.stderr


@pytest.mark.parametrize("kind", ["container", "kernel"])
@pytest.mark.parametrize("moment", [0.2, 0.5, 1.5])
def test_a_killed_start_leaves_nothing_after_down_all(kind: str, moment: float, tmp_path: Path) -> None:
    hosts("images", kind)
    before = machine()
    # Its own owner: where it was quick enough to finish, the hosts are stale all the same.
    owning = ["sh", "-c", 'exec "$@" --owner $$', "sh"]
    command = [sys.executable, str(HOSTS), "up", "--kind", kind, "--name", "a", "--name", "b", "--state", str(tmp_path)]
    process = subprocess.Popen([*owning, *command], stdout=subprocess.DEVNULL)
    run_id = wait_for_record(process, tmp_path)
    time.sleep(moment)
    process.kill()
    process.wait()
    remove_stale()
    assert gone(run_id)
    assert machine() == before


def wait_for_record(process: subprocess.Popen, state: Path) -> str:
    """The id of a run that is starting: from then on there may be something to remove."""
    while not run_ids(state):
        assert process.poll() is None
        time.sleep(0.01)
    (run_id,) = run_ids(state)
    return run_id


def test_an_interrupted_start_cleans_up_after_itself(tmp_path: Path) -> None:
    hosts("images", "kernel")
    command = [sys.executable, str(HOSTS), "up", "--kind", "kernel", "--name", "a", "--state", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    run_id = wait_for_record(process, tmp_path)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 128 + signal.SIGTERM
    assert gone(run_id)


def test_hosts_of_a_living_owner_are_not_stale(tmp_path: Path) -> None:
    owner = subprocess.Popen(["sleep", "300"])
    try:
        hosts(
            "up",
            "--kind",
            "container",
            "--name",
            "a",
            "--no-containerd",
            "--state",
            tmp_path,
            "--owner",
            str(owner.pid),
        )
        (run_id,) = run_ids(tmp_path)
        remove_stale()
        assert inside(tmp_path, "a", "hostname").strip() == "a"
    finally:
        owner.kill()
        owner.wait()
    remove_stale()
    assert gone(run_id)


def test_emulation_stands_in_for_a_kernel_that_does_not_come_up(tmp_path: Path) -> None:
    try:
        done = hosts("up", "--kind", "kernel", "--name", "slow", "--state", tmp_path, "--deadline", "0.5")
        assert "trying qemu instead" in done.stderr
        assert variables(tmp_path)["test_backend"] == "qemu"
        assert "0 131072 thin-pool" in inside(
            tmp_path, "slow", "/opt/test/mkpool pool 64 > /dev/null && dmsetup status"
        )
    finally:
        hosts("down", "--state", tmp_path)


def test_a_name_that_no_host_can_have_is_refused(tmp_path: Path) -> None:
    done = hosts("up", "--kind", "container", "--name", "Bad_Name", "--state", tmp_path, check=False)
    assert "'Bad_Name' is no host name" in done.stderr
