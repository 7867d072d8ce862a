#!/usr/bin/env python3
"""Throw-away test hosts on this machine, reached by ssh, with nothing routed anywhere.

    hosts.py images [container|kernel]                          build what is missing, once per recipe
    hosts.py up --kind kernel --name h1 --name h2 --state DIR   start hosts, write DIR/inventory.yml
    hosts.py exec --state DIR h1 -- uname -r                    run a command in a host
    hosts.py down --state DIR                                   remove the hosts of DIR
    hosts.py down --all                                         remove what interrupted runs left

Two kinds. A *container* is cheap, shares this machine's kernel and cgroups, and has no device-mapper.
A *kernel* host runs User-Mode Linux, or an emulated machine where that does not come up in time; it has
device-mapper and a cgroup v2 tree of its own. Both run one Debian root, one init, sshd and containerd.

Every run has a random id, and all it makes carries that id: the environment of its processes, the label and
name of its containers, its cgroups. The id is recorded before anything is made, so `down` finds everything
whenever `up` was killed, and touches nothing else. A kernel host lives in network, mount and pid namespaces of
its own: its tap, mounts and processes end with it.
"""

import argparse
import contextlib
import fcntl
import functools
import hashlib
import io
import json
import lzma
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
CACHE = Path(os.environ.get("REAPER_TEST_CACHE", "/var/cache/microvm-reaper-tests"))
MIRROR = os.environ.get("REAPER_TEST_MIRROR", "http://deb.debian.org/debian")

SUITE = "trixie"
ROOT_PACKAGES = [
    "busybox-static",
    "containerd",
    "dmsetup",
    "e2fsprogs",
    "iproute2",
    "kmod",
    "openssh-server",
    "procps",
    "python3",
    "runc",
    "thin-provisioning-tools",
    "tini",
    "util-linux",
]
# User-Mode Linux older than sid's dies on recent CPUs; its C library comes along, whatever that of SUITE is.
UML_PACKAGES = ["libc6", "user-mode-linux"]
QEMU_PACKAGES = ["linux-image-cloud-amd64"]
QEMU_DRIVERS = ["virtio_pci", "virtio_blk", "virtio_net", "virtio_rng", "ext4", "overlay"]
BUSYBOX_IMAGE = "localhost/busybox:test"
SSHD_CONFIG = "UsePAM no\nPrintLastLog no\nMaxStartups 100\nMaxSessions 100\n"
# Kubernetes' plugin and exotic snapshotters only cost start-up time here.
CONTAINERD_CONFIG = (
    'version = 2\ndisabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.snapshotter.v1.btrfs", '
    '"io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.devmapper", '
    '"io.containerd.snapshotter.v1.blockfile"]\n'
)

# The two ends of the link to a host, the same for every host: each has a network namespace to itself.
PEER, ADDRESS = "192.0.2.1", "192.0.2.2"
# Seconds until a host must answer.
DEADLINE = {"container": 60, "uml": 45, "qemu": 180}
NAME = re.compile(r"[a-z][a-z0-9-]{0,30}")
# What `up` starts carries one of these in its environment: a kernel host its unique name, and commands that end by
# themselves their run's id.
HOST_MARK, COMMAND_MARK = "REAPER_TEST_HOST", "REAPER_TEST_COMMAND"
LABEL = "microvm-reaper-test"
NAMESPACES = ["unshare", "--mount", "--pid", "--fork", "--kill-child=KILL"]
PODMAN = ["podman", "--runtime", "runc", "--cgroup-manager", "cgroupfs"]
TOOLS = {
    "mmdebstrap": "mmdebstrap",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "nsenter": "util-linux",
    "ip": "iproute2",
    "podman": "podman",
    "runc": "runc",
    "socat": "socat",
    "qemu-system-x86_64": "qemu-system-x86",
}


class HostsError(Exception):
    """What went wrong, where, and what to do."""


# Set by a signal: threads that wait for a host or a command then give up.
STOP = threading.Event()
SAVING = threading.Lock()


# --- processes, known by pid and start time


@dataclass(frozen=True)
class Process:
    """A process that a pid alone would not name: pids are used again."""

    pid: int
    start: str
    boot: str

    @classmethod
    def of(cls, pid: int) -> "Process | None":
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        try:
            stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
        except OSError:
            return None
        state, *fields = stat.rpartition(")")[2].split()
        return None if state in "ZX" else cls(pid, fields[18], boot)

    @property
    def alive(self) -> bool:
        return Process.of(self.pid) == self


def default_owner() -> int:
    """The outermost ancestor below init: hosts started by hand live as long as that login."""
    pid = os.getpid()
    while True:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
        parent = int(stat.rpartition(")")[2].split()[1])
        if parent <= 1:
            return pid
        pid = parent


def marked(mark: str, value: str) -> list[int]:
    """The pids whose environment carries a mark."""
    wanted, found = f"{mark}={value}".encode(), []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if wanted in Path(entry.path, "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return found


def kill_marked(mark: str, value: str, patience: float = 10) -> None:
    """Kill the marked processes; a pid is checked again once it is held and cannot be used anew."""
    deadline = time.monotonic() + patience
    while pids := marked(mark, value):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                handle = os.pidfd_open(pid)
                try:
                    if pid in marked(mark, value):
                        signal.pidfd_send_signal(handle, signal.SIGKILL)
                finally:
                    os.close(handle)
        if time.monotonic() > deadline:
            raise HostsError(f"processes {pids} of {value} do not die: see /proc/PID/stack, then run down again")
        time.sleep(0.02)


def run(command: Sequence[str | Path], timeout: float = float("inf"), env: dict[str, str] | None = None) -> str:
    """Run a command and return what it printed; its failure is an error that quotes its last lines."""
    words = [str(word) for word in command]
    deadline = time.monotonic() + timeout
    child = subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env={**os.environ, **(env or {})},
    )
    while True:
        try:
            out, err = child.communicate(timeout=0.5)
            break
        except subprocess.TimeoutExpired:
            if STOP.is_set() or time.monotonic() > deadline:
                out, err = end(child)
                break
    if child.returncode:
        last = "\n".join((out + err).strip().splitlines()[-15:])
        raise HostsError(f"`{' '.join(words)}` ended with {child.returncode}:\n{last}")
    return out


def end(child: subprocess.Popen[str]) -> tuple[str, str]:
    """End a command and return what it printed. Not all obey: unshare ignores the polite signal."""
    child.terminate()
    try:
        return child.communicate(timeout=2)
    except subprocess.TimeoutExpired:
        child.kill()
        return child.communicate()


def require(*tools: str) -> None:
    if os.geteuid() != 0:
        raise HostsError("test hosts need root: containers, namespaces and cgroups of their own")
    missing = sorted({TOOLS[tool] for tool in tools if not shutil.which(tool)})
    if missing:
        raise HostsError(f"missing on this machine: apt-get install --no-install-recommends {' '.join(missing)}")


def in_parallel(function: Callable, items: Iterable) -> list:
    items = list(items)
    with ThreadPoolExecutor(max_workers=max(1, len(items))) as pool:
        return list(pool.map(function, items))


# --- images


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def bootstrap(suite: str, variant: str, packages: Iterable[str], target: Path) -> None:
    """Make a Debian directory; tried twice, as a download may fail."""
    # In namespaces of its own, so that it ends with us and a killed build leaves no mounts behind.
    command = ["setpriv", "--pdeathsig", "KILL", *NAMESPACES, "--mount-proc", "mmdebstrap"]
    command += [f"--variant={variant}", f"--include={','.join(packages)}"]
    # A mirror that lags behind is as good for a test; signatures are checked all the same.
    command += ['--aptopt=Acquire::Check-Valid-Until "false"', "--aptopt=Acquire::Retries 3"]
    command += [f"--dpkgopt=path-exclude=/usr/share/{path}/*" for path in ("doc", "man", "locale", "info")]
    temporary = {"TMPDIR": str(target.parent)}
    try:
        run([*command, suite, target, MIRROR], env=temporary)
    except HostsError:
        if STOP.is_set():
            raise
        shutil.rmtree(target, ignore_errors=True)
        run([*command, suite, target, MIRROR], env=temporary)


def build_root(target: Path) -> None:
    """The root of both kinds of host."""
    bootstrap(SUITE, "minbase", ROOT_PACKAGES, target)
    tests = target / "opt/test"
    tests.mkdir(parents=True)
    for script in (HERE / "guest").iterdir():
        shutil.copy(script, tests)
    write_busybox(target / "usr/bin/busybox", tests / "busybox.tar")
    (target / "usr/lib/modules").mkdir(exist_ok=True)
    (target / "var/lib/containerd").mkdir(exist_ok=True)
    (target / "etc/ssh/sshd_config.d/test-host.conf").write_text(SSHD_CONFIG)
    (target / "etc/containerd").mkdir(exist_ok=True)
    (target / "etc/containerd/config.toml").write_text(CONTAINERD_CONFIG)


def tar(files: dict[str, bytes], links: dict[str, str] | None = None, directories: Iterable[str] = ()) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name in directories:
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            archive.addfile(entry)
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), 0o755
            archive.addfile(entry, io.BytesIO(content))
        for name, destination in (links or {}).items():
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = tarfile.SYMTYPE, destination
            archive.addfile(entry)
    return out.getvalue()


def write_busybox(busybox: Path, target: Path) -> None:
    """Write a container image of one static binary, for `ctr images import`: there is no registry here."""
    links = {f"bin/{name}": "busybox" for name in ("cat", "echo", "ls", "sh", "sleep", "true")}
    layer = tar({"bin/busybox": busybox.read_bytes()}, links, ("bin", "dev", "etc", "proc", "sys", "tmp"))
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Cmd": ["sleep", "infinity"], "Env": ["PATH=/bin"]},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"]},
    }
    manifest = [{"Config": "config.json", "RepoTags": [BUSYBOX_IMAGE], "Layers": ["layer.tar"]}]
    parts = {"config.json": json.dumps(config).encode(), "layer.tar": layer}
    target.write_bytes(tar({"manifest.json": json.dumps(manifest).encode(), **parts}))


def build_uml(target: Path) -> None:
    """The User-Mode Linux program and its C library, laid out to be a chroot."""
    bootstrap("sid", "extract", UML_PACKAGES, target)
    for name in ("lib", "lib64"):
        if not (target / name).exists():
            (target / name).symlink_to(f"usr/{name}")
    for name in ("dev", "guest", "proc", "tmp"):
        (target / name).mkdir(exist_ok=True)


def build_qemu(target: Path) -> None:
    """A kernel, an initial RAM disk and the root as a disk image, for the emulated machine."""
    target.mkdir()
    files, tree = target / "files", target / "tree"
    bootstrap(SUITE, "extract", QEMU_PACKAGES, files)
    (kernel,) = (files / "boot").glob("vmlinuz-*")
    shutil.copy(kernel, target / "kernel")
    version = kernel.name.removeprefix("vmlinuz-")
    run(["cp", "-a", image("root"), tree])
    shutil.copytree(files / "usr/lib/modules", tree / "usr/lib/modules", dirs_exist_ok=True)
    run(["chroot", tree, "depmod", version])
    write_initrd(tree, version, target / "initrd")
    size = int(run(["du", "-sm", tree]).split()[0]) * 5 // 4 + 64
    run(["mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-d", tree, target / "root.img", f"{size}M"])
    for directory in (files, tree):
        shutil.rmtree(directory)


def write_initrd(tree: Path, version: str, target: Path) -> None:
    """Only what is needed to mount the root: busybox, a script and some drivers in the order of loading."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for directory in ("bin", "dev", "lower", "modules", "proc", "root", "sys", "upper"):
            (root / directory).mkdir()
        shutil.copy(tree / "usr/bin/busybox", root / "bin")
        shutil.copy(HERE / "guest/stage1-qemu", root / "init")
        order: dict[str, None] = {}
        for driver in QEMU_DRIVERS:
            listing = run(["chroot", tree, "modprobe", "--set-version", version, "--show-depends", driver])
            order |= dict.fromkeys(line.split()[1] for line in listing.splitlines() if line.startswith("insmod"))
        for number, path in enumerate(order):
            module = root / f"modules/{number:02}-{Path(path).name.removesuffix('.xz')}"
            packed = (tree / path.lstrip("/")).read_bytes()
            module.write_bytes(lzma.decompress(packed) if path.endswith(".xz") else packed)
        files = "\n".join(str(path.relative_to(root)) for path in root.rglob("*"))
        archive = subprocess.run(
            [tree / "usr/bin/busybox", "cpio", "-o", "-H", "newc"],
            input=files.encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=root,
            check=True,
        )
        target.write_bytes(archive.stdout)


BUILDERS: dict[str, Callable[[Path], None]] = {"root": build_root, "uml": build_uml, "qemu": build_qemu}
IMAGES = {"container": ["root"], "uml": ["root", "uml"], "qemu": ["root", "qemu"]}


@functools.cache
def recipe(name: str) -> str:
    """A hash of all that shapes an image: another recipe, another image."""
    lists: dict[str, list] = {
        "root": [SUITE, ROOT_PACKAGES, SSHD_CONFIG, CONTAINERD_CONFIG],
        "uml": [UML_PACKAGES],
        "qemu": [QEMU_PACKAGES, QEMU_DRIVERS],
    }
    scripts = [path.read_text() for path in sorted((HERE / "guest").iterdir())] if name != "uml" else []
    text = json.dumps([MIRROR, *lists[name], scripts, recipe("root") if name == "qemu" else ""])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def image(name: str) -> Path:
    return CACHE / "images" / f"{name}-{recipe(name)}"


def build_image(name: str) -> None:
    """Build one image if it is missing: in a directory of its own that is renamed when complete."""
    with locked(CACHE / f"{name}.lock"):
        if image(name).exists():
            return
        started = time.monotonic()
        image(name).parent.mkdir(exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f"partial-{name}-", dir=image(name).parent))
        try:
            BUILDERS[name](partial / "image")
            (partial / "image").rename(image(name))
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        print(f"image {name} built in {time.monotonic() - started:.1f} s: {image(name)}", flush=True)
        drop_old_images(name)


def drop_old_images(name: str) -> None:
    """Remove images of other recipes and what killed builds left, if a day old and no hosts may stand on them."""
    if Run.all():
        return
    for pattern in (f"{name}-*", f"partial-{name}-*"):
        for old in image(name).parent.glob(pattern):
            if old != image(name) and time.time() - old.stat().st_mtime > 86400:
                shutil.rmtree(old, ignore_errors=True)


def build_images(backend: str) -> None:
    """Build what a backend needs: images apart from each other side by side, qemu's upon the root."""
    if all(image(name).exists() for name in IMAGES[backend]):
        return
    require("mmdebstrap")
    in_parallel(build_image, [name for name in IMAGES[backend] if name != "qemu"])
    if "qemu" in IMAGES[backend]:
        build_image("qemu")


# --- runs and their hosts


@dataclass
class Host:
    """One test host; `pid` is any process in its network namespace."""

    name: str
    backend: str
    mark: str
    pid: int = 0

    @property
    def container(self) -> str:
        """Its name for podman and the beginning of its cgroups' names: unique on this machine."""
        return f"{self.mark}-{self.name}"

    @property
    def kind(self) -> str:
        return "container" if self.backend == "container" else "kernel"

    @property
    def proxy(self) -> str:
        """Enter the host's network namespace and talk to its sshd.

        The source address exists in such namespaces only: should the host be gone and its pid be another's,
        nothing leaves the machine.
        """
        return f"nsenter -t {self.pid} -n socat - TCP4:{ADDRESS}:22,bind={PEER}"


@dataclass
class Run:
    """Hosts started together; recorded in the cache until the last trace of them is removed."""

    id: str
    state: str
    owner: Process
    starter: Process
    ready: bool = False
    hosts: list[Host] = field(default_factory=list)

    @staticmethod
    def all() -> list["Run"]:
        found = []
        for path in sorted((CACHE / "runs").glob("*.json")):
            with contextlib.suppress(FileNotFoundError):  # another `down` was quicker
                found.append(Run.load(path))
        return found

    @classmethod
    def load(cls, path: Path) -> "Run":
        text = json.loads(path.read_text())
        owner, starter = Process(**text.pop("owner")), Process(**text.pop("starter"))
        hosts = [Host(**host) for host in text.pop("hosts")]
        return cls(owner=owner, starter=starter, hosts=hosts, **text)

    @property
    def record(self) -> Path:
        return CACHE / "runs" / f"{self.id}.json"

    @property
    def mark(self) -> str:
        return f"rt{self.id}"

    @property
    def sockets(self) -> Path:
        """Where ssh shares connections: short, as a socket's path must be, and never another run's."""
        return Path("/tmp") / self.mark

    @property
    def starting(self) -> bool:
        return not self.ready and self.starter.alive and self.starter.pid != os.getpid()

    def save(self) -> None:
        self.record.parent.mkdir(parents=True, exist_ok=True)
        partial = self.record.with_suffix(".partial")
        with SAVING:  # hosts are started in parallel, and each saves the run
            partial.write_text(json.dumps(asdict(self), indent=1))
            partial.rename(self.record)

    def log(self, host: Host) -> Path:
        return Path(self.state) / f"{host.name}.log"

    @property
    def key(self) -> Path:
        return Path(self.state) / "key"

    def ssh_options(self, host: Host) -> list[str]:
        return [
            f'-oProxyCommand="{host.proxy}"',
            "-oStrictHostKeyChecking=no",
            "-oUserKnownHostsFile=/dev/null",
            "-oLogLevel=ERROR",
            "-oServerAliveInterval=15",
        ]

    def ssh(self, host: Host) -> list[str]:
        options = [option.replace('"', "") for option in self.ssh_options(host)]
        return ["ssh", "-F", "none", "-i", str(self.key), *options, f"root@{host.name}"]


def find(state: Path) -> Run | None:
    """The run of a state directory."""
    path = str(state.resolve())
    return next((each for each in Run.all() if each.state == path), None)


def cgroup_mounts() -> dict[Path, str]:
    """Every cgroup hierarchy of this machine and its type, v1 and v2."""
    fields = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    return {Path(words[1]): words[2] for words in fields if words[2] in ("cgroup", "cgroup2")}


def host_variables(each: Run, host: Host) -> dict[str, object]:
    """How Ansible reaches a host, and what tests need to know of it.

    Containers share this machine's cgroups and containerd names a cgroup after its namespace: tests use the parent
    and the namespace given here, which are the host's own and go with it.
    """
    unified = [path for path, kind in cgroup_mounts().items() if kind == "cgroup2"]
    mount = unified[0] if host.kind == "container" and unified else Path("/sys/fs/cgroup")
    return {
        "ansible_connection": "ssh",
        "ansible_host": host.name,
        "ansible_user": "root",
        "ansible_ssh_private_key_file": str(each.key),
        "ansible_ssh_common_args": " ".join(["-F none", *each.ssh_options(host)]),
        # A shared connection outlives its host for a while: one run must not meet that of another.
        "ansible_control_path_dir": str(each.sockets),
        "ansible_python_interpreter": "/usr/bin/python3",
        "test_kind": host.kind,
        "test_backend": host.backend,
        "test_device_mapper": host.kind == "kernel",
        "test_cgroup_mount": str(mount),
        "test_cgroup_parent": host.container,
        "test_containerd_namespace": f"{host.container}-ctr",
        "test_busybox_archive": "/opt/test/busybox.tar",
        "test_busybox_image": BUSYBOX_IMAGE,
    }


def write_inventory(each: Run) -> None:
    """Write the hosts as an Ansible inventory; every value is written as JSON, which is YAML."""
    lines = ["reap_hosts:", "  hosts:"]
    for host in each.hosts:
        lines.append(f"    {host.name}:")
        lines += [f"      {key}: {json.dumps(value)}" for key, value in host_variables(each, host).items()]
    Path(each.state, "inventory.yml").write_text("---\n" + "\n".join(lines) + "\n")


# --- up


@dataclass
class Settings:
    backend: str
    memory: int
    containerd: bool
    deadline: float | None


def host_environment(each: Run, host: Host, settings: Settings) -> dict[str, str]:
    """What init is told."""
    return {
        "REAP_KIND": host.kind,
        "REAP_NAME": host.name,
        "REAP_MACHINE_ID": uuid.uuid4().hex,
        "REAP_KEY": each.key.with_suffix(".pub").read_text().split()[1],
        "REAP_ADDRESS": ADDRESS,
        "REAP_PEER": PEER,
        "REAP_CONTAINERD": "yes" if settings.containerd else "no",
    }


def start_container(each: Run, host: Host, settings: Settings) -> None:
    """Start a container in which containerd and runc work: privileged, on the machine's whole cgroup tree."""
    command = [*PODMAN, "run", "--detach", "--name", host.container, "--label", f"{LABEL}={each.id}"]
    command += ["--hostname", host.name, "--network", "none", "--privileged"]
    command += ["--cgroupns", "host", "--cgroup-parent", f"/{each.mark}", "--volume", "/sys/fs/cgroup:/sys/fs/cgroup"]
    # podman's own default limits are refused where root's hard limits are lower.
    command += ["--ulimit", "nofile=1024:2048", "--ulimit", "nproc=4096:4096"]
    for name, value in host_environment(each, host, settings).items():
        command += ["--env", f"{name}={value}"]
    command += ["--rootfs", f"{image('root')}:O", "/opt/test/init"]
    run(command, env={COMMAND_MARK: each.id})
    host.pid = int(run([*PODMAN, "inspect", "--format", "{{.State.Pid}}", host.container]))


def start_kernel(each: Run, host: Host, settings: Settings) -> None:
    """Start a host with a kernel of its own, in namespaces of its own."""
    words = [f"{name}={value}" for name, value in host_environment(each, host, settings).items()]
    if host.backend == "uml":
        command = [HERE / "boot-uml", image("uml"), image("root"), PEER, f"mem={settings.memory}M", *words]
    else:
        command = [HERE / "boot-qemu", image("qemu"), PEER, f"{settings.memory}M", *words]
    with each.log(host).open("wb") as log:
        child = subprocess.Popen(
            [*NAMESPACES, "--net", *map(str, command)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, HOST_MARK: host.container},
        )
    host.pid = child.pid


def start(each: Run, host: Host, settings: Settings) -> None:
    build_images(host.backend)
    (start_container if host.backend == "container" else start_kernel)(each, host, settings)
    each.save()


def wait_for(condition: Callable[[], bool], deadline: float) -> bool:
    while not condition():
        if STOP.is_set() or time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def console_says_ready(each: Run, host: Host) -> bool:
    """Whether init finished. Asking sshd before would cost seconds: nobody answers for the address yet."""
    text = each.log(host).read_text(errors="replace")
    if "Kernel panic" in text or not Process.of(host.pid):
        raise HostsError("it died while booting")
    return "test host ready" in text


def await_ready(each: Run, host: Host, settings: Settings) -> None:
    """Wait until ssh, and behind it containerd, answer."""
    seconds = settings.deadline or DEADLINE[host.backend]
    deadline = time.monotonic() + seconds
    if host.kind == "kernel" and not wait_for(lambda: console_says_ready(each, host), deadline):
        raise HostsError(f"it did not boot within {seconds:.0f} s")
    probe = "until ctr version > /dev/null; do sleep 0.1; done" if settings.containerd else "true"
    answer = ""

    def answers() -> bool:
        nonlocal answer
        try:
            run([*each.ssh(host), probe], timeout=10)
        except HostsError as why:
            answer = str(why)
            return False
        return True

    if not wait_for(answers, deadline):
        raise HostsError(f"it did not answer within {seconds:.0f} s; the last answer was: {answer}")


def describe_failure(each: Run, host: Host, why: object) -> str:
    if host.backend == "container":
        logs = subprocess.run([*PODMAN, "logs", host.container], capture_output=True, text=True, errors="replace")
        text = logs.stdout + logs.stderr
    else:
        text = each.log(host).read_text(errors="replace") if each.log(host).exists() else ""
    last = "\n".join(f"    {line}" for line in text.splitlines()[-15:])
    return f"host {host.name} ({host.backend}) did not come up: {why}\n  its console said last:\n{last}"


def bring_up(each: Run, host: Host, settings: Settings, tries: int = 3) -> float:
    """Start one host; seconds until it answered. With backend `auto`, emulation stands in for User-Mode Linux.

    An emulated kernel now and then dies of the emulation while it boots: it gets a few tries.
    """
    started = time.monotonic()
    try:
        start(each, host, settings)
        await_ready(each, host, settings)
    except HostsError as why:
        failure = describe_failure(each, host, why)
        if host.backend == "qemu" and tries > 1 and not STOP.is_set():
            kill_marked(HOST_MARK, host.container)
            return bring_up(each, host, settings, tries - 1)
        if STOP.is_set() or host.backend != "uml" or settings.backend == "uml":
            raise HostsError(failure) from why
        print(f"{failure}\n  trying qemu instead", file=sys.stderr, flush=True)
        kill_marked(HOST_MARK, host.container)
        host.backend = "qemu"
        # The deadline asked for was the other's: emulation has always needed more.
        return bring_up(each, host, replace(settings, deadline=None))
    seconds = time.monotonic() - started
    print(f"{host.name}: {host.backend} ready in {seconds:.1f} s", flush=True)
    return seconds


def up(kind: str, names: Sequence[str], state: Path, settings: Settings, owner: int | None = None) -> Run:
    """Start hosts and write their inventory; whatever fails takes all of them down again."""
    require("ssh", "ssh-keygen", "nsenter", "socat", *(["podman", "runc"] if kind == "container" else ["ip"]))
    check_names(names)
    state.mkdir(parents=True, exist_ok=True)
    if older := find(state):
        raise HostsError(f"{state} has hosts already (run {older.id}): `hosts.py down --state {state}` first")
    backend = "container" if kind == "container" else settings.backend.replace("auto", "uml")
    mine, owning = Process.of(os.getpid()), Process.of(owner or default_owner())
    if mine is None or owning is None:
        raise HostsError(f"there is no process {owner} to own the hosts: see --owner")
    each = Run(id=secrets.token_hex(4), state=str(state.resolve()), owner=owning, starter=mine)
    each.hosts = [Host(name, backend, each.mark) for name in names]
    each.save()
    try:
        each.sockets.mkdir(mode=0o700)
        run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", each.mark, "-f", each.key])
        with contextlib.suppress(HostsError):  # said again, per host, where a fallback is chosen
            build_images(backend)
        in_parallel(lambda host: bring_up(each, host, settings), each.hosts)
        write_inventory(each)
    except BaseException:
        STOP.clear()
        down(each)
        raise
    each.ready = True
    each.save()
    return each


def check_names(names: Sequence[str]) -> None:
    for name in names:
        if not NAME.fullmatch(name):
            raise HostsError(f"{name!r} is no host name: lower case letters, digits and dashes, 31 at most")
    if len(set(names)) < len(names):
        raise HostsError(f"host names must differ: {' '.join(names)}")


# --- down


def close_connections(each: Run) -> None:
    """End the ssh connections that are kept open to be shared."""
    if each.sockets.is_dir():
        for socket in each.sockets.iterdir():
            subprocess.run(["ssh", "-F", "none", "-O", "exit", "-S", socket, "none"], capture_output=True)
        shutil.rmtree(each.sockets, ignore_errors=True)


def remove_containers(each: Run) -> None:
    if all(host.kind == "kernel" for host in each.hosts):
        return
    # A podman that outlived its killed `up` may be making a container still: let it end, or end it.
    wait_for(lambda: not marked(COMMAND_MARK, each.id), time.monotonic() + 15)
    kill_marked(COMMAND_MARK, each.id)
    query = [*PODMAN, "ps", "--all", "--quiet", "--filter", f"label={LABEL}={each.id}"]
    for container in run(query).split():
        run([*PODMAN, "rm", "--force", "--time", "0", container])


def our_cgroups(each: Run) -> list[Path]:
    """Top-level cgroups that carry the run's id, in every hierarchy."""
    return [
        path
        for mount in cgroup_mounts()
        for path in mount.iterdir()
        if path.is_dir() and (path.name == each.mark or path.name.startswith(f"{each.mark}-"))
    ]


def remove_cgroup(top: Path) -> None:
    """Kill what runs in a cgroup and remove it, children first."""
    for name, _, files in os.walk(top, topdown=False):
        cgroup = Path(name)
        with contextlib.suppress(OSError):
            if "cgroup.kill" in files:
                (cgroup / "cgroup.kill").write_text("1")
            for pid in (cgroup / "cgroup.procs").read_text().split():
                os.kill(int(pid), signal.SIGKILL)
        with contextlib.suppress(OSError):
            cgroup.rmdir()


def remove_cgroups(each: Run) -> None:
    def gone() -> bool:
        for cgroup in our_cgroups(each):
            remove_cgroup(cgroup)
        return not our_cgroups(each)

    if not wait_for(gone, time.monotonic() + 10):
        left = " ".join(map(str, our_cgroups(each)))
        raise HostsError(f"cgroups of run {each.id} stay busy: {left}; see their cgroup.procs, then run down again")


def remove_files(each: Run) -> None:
    names = ["key", "key.pub", "inventory.yml", *(f"{host.name}.log" for host in each.hosts)]
    for name in names:
        Path(each.state, name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        Path(each.state).rmdir()


def down(each: Run) -> None:
    """Remove a run. The record goes last: a `down` that was cut short can be repeated."""
    close_connections(each)
    for host in each.hosts:
        kill_marked(HOST_MARK, host.container)
    remove_containers(each)
    remove_cgroups(each)
    remove_files(each)
    each.record.unlink(missing_ok=True)


def down_state(state: Path) -> None:
    each = find(state)
    if each is None:
        return
    if each.starting:
        raise HostsError(f"hosts of {state} are being started by process {each.starter.pid}: stop that first")
    down(each)


def down_stale(owner: int | None = None) -> None:
    """Remove runs whose owner is gone, whose start was cut short, or which the given owner wants gone."""
    for each in Run.all():
        cut_short = not each.ready and not each.starter.alive
        if cut_short or not each.owner.alive or (owner == each.owner.pid and not each.starting):
            down(each)
            print(f"run {each.id} removed ({' '.join(host.name for host in each.hosts)})", flush=True)


def execute(state: Path, name: str, command: Sequence[str]) -> int:
    each = find(state)
    if each is None:
        raise HostsError(f"no hosts belong to {state}: `hosts.py up` starts some")
    host = next((host for host in each.hosts if host.name == name), None)
    if host is None:
        raise HostsError(f"{state} has no host {name}, but {' '.join(host.name for host in each.hosts)}")
    return subprocess.run([*each.ssh(host), *command]).returncode


# --- command line


def parser() -> argparse.ArgumentParser:
    shape = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(prog="hosts.py", description=__doc__, formatter_class=shape)
    commands = top.add_subparsers(dest="command", required=True)

    images = commands.add_parser("images", help="build the images that are missing")
    images.add_argument("kind", nargs="?", choices=["container", "kernel"], help="default: both")
    images.add_argument("--backend", choices=["uml", "qemu"], default="uml", help="of kernel hosts; default: uml")

    start = commands.add_parser("up", help="start hosts and write an inventory")
    start.add_argument("--kind", choices=["container", "kernel"], required=True)
    start.add_argument("--name", action="append", required=True, help="host name; once for each host")
    start.add_argument("--state", type=Path, required=True, help="directory for inventory.yml, key and console logs")
    start.add_argument("--backend", choices=["auto", "uml", "qemu"], default="auto", help="of kernel hosts")
    start.add_argument("--mem", type=int, default=400, metavar="MB", help="memory of a kernel host; default: 400")
    start.add_argument("--deadline", type=float, metavar="SECONDS", help="until a host must answer")
    start.add_argument("--no-containerd", action="store_true", help="do not start containerd")

    stop = commands.add_parser("down", help="remove hosts")
    which = stop.add_mutually_exclusive_group(required=True)
    which.add_argument("--state", type=Path, help="those of this directory; nothing happens if there are none")
    which.add_argument("--all", action="store_true", help="those whose owner is gone or whose start was cut short")
    owned = "process whose end makes the hosts stale; default: $REAPER_TEST_OWNER, else the outermost ancestor"
    start.add_argument("--owner", type=int, metavar="PID", default=owner_variable(), help=owned)
    same = "with --all: also the hosts of this owner, though it lives; default: $REAPER_TEST_OWNER"
    stop.add_argument("--owner", type=int, metavar="PID", default=owner_variable(), help=same)

    inside = commands.add_parser("exec", help="run a command in a host, by ssh")
    inside.add_argument("--state", type=Path, required=True)
    inside.add_argument("name", metavar="NAME")
    inside.add_argument("argv", nargs="+", metavar="COMMAND", help="put -- before it; the host's shell reads it")
    return top


def owner_variable() -> int | None:
    text = os.environ.get("REAPER_TEST_OWNER", "")
    return int(text) if text.isdigit() else None


def terminate(number: int, _frame: object) -> None:
    STOP.set()
    raise SystemExit(128 + number)


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    # `up` cleans up after itself when it is asked to end.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, terminate)
    try:
        if args.command == "exec":
            return execute(args.state, args.name, args.argv)
        if args.command == "images":
            require("mmdebstrap")
            build_images("container" if args.kind == "container" else args.backend)
        elif args.command == "up":
            settings = Settings(args.backend, args.mem, not args.no_containerd, args.deadline)
            up(args.kind, args.name, args.state, settings, args.owner)
        elif args.all:
            require()
            down_stale(args.owner)
        else:
            require()
            down_state(args.state)
    except HostsError as error:
        print(f"hosts.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
