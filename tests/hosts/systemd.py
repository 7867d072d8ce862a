"""A real systemd in namespaces of its own on this machine, for tests of what it is asked to do."""

import os
import pathlib
import shutil
import signal
import subprocess
import time

import pytest
from ansible_collections.microvm.reaper.plugins.module_utils import mounts
from ansible_collections.microvm.reaper.plugins.module_utils.kinds import cgroup
from ansible_collections.microvm.reaper.plugins.module_utils.probe import Absent

SYSTEMD = "/lib/systemd/systemd"
UP_SECONDS = 20


def unified():
    try:
        found = [mount for mount, version in cgroup.cgroup_mounts(mounts.read()) if version == 2]
    except Absent:
        return None
    return found[0] if found and os.geteuid() == 0 and os.access(found[0], os.W_OK) else None


has_systemd = os.path.exists(SYSTEMD) and all(map(shutil.which, ("systemctl", "unshare", "nsenter")))
needs_systemd = pytest.mark.skipif(
    unified() is None or not has_systemd, reason="needs root, a v2 cgroup hierarchy and the programs of systemd"
)


class Systemd:
    """A systemd in namespaces of its own, with the units of ``directory``.

    ``prepare`` are lines for a shell in there before systemd begins, without single quotes.
    """

    def __init__(self, directory, prepare=()):
        self.directory, self.prepare = directory, prepare
        self.unit_path = directory
        self.cgroup = pathlib.Path(unified()) / ("microvm-reaper-test-units-%d" % os.getpid())
        self.process = self.init = None

    def up(self):
        self.cgroup.mkdir()
        script = "\n".join([
            "echo $$ > %s/cgroup.procs" % self.cgroup,
            "exec unshare --pid --fork --mount --cgroup --uts --ipc --kill-child --mount-proc sh -ec '",
            "umount -R /sys/fs/cgroup; mount -t tmpfs none /run; mkdir /run/lock; mount -t cgroup2 none /sys/fs/cgroup",
            *self.prepare,
            "export container=test SYSTEMD_UNIT_PATH=%s" % self.unit_path,
            "exec %s --system --unit=default.target --show-status=no --log-target=console'" % SYSTEMD,
        ])
        log = open(self.directory.parent / "log", "wb")  # noqa: SIM115
        self.process = subprocess.Popen(["sh", "-ec", script], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        log.close()
        deadline = time.monotonic() + UP_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            self.init = self.init or self._child()
            if self.init and self.ctl("is-system-running", check=False) in ("running", "degraded"):
                return True
            time.sleep(0.05)
        return False

    def _child(self):
        path = "/proc/%d/task/%d/children" % (self.process.pid, self.process.pid)
        pids = pathlib.Path(path).read_text().split()
        # It is init only when its own /proc is mounted, and the shell has become systemd.
        is_up = pids and pathlib.Path("/proc/%s/comm" % pids[0]).read_text() == "systemd\n"
        return int(pids[0]) if is_up else None

    def run(self, argv, *, check=True, **how):
        done = self.execute(argv, timeout=60, **how)
        assert not check or done.returncode == 0, (argv, done.stdout, done.stderr)
        return done.stdout

    def execute(self, argv, **how):
        enter = ["nsenter", "--target", str(self.init), "--mount", "--pid", "--cgroup"]
        return subprocess.run([*enter, *argv], capture_output=True, text=True, check=False, **how)

    def ctl(self, *arguments, check=True):
        return self.run(["systemctl", *arguments], check=check).strip()

    def down(self):
        if self.process is not None:
            if self.init:
                os.kill(self.init, signal.SIGKILL)  # and with it all that runs in its pid namespace
            self.process.kill()
            self.process.wait()
        deadline = time.monotonic() + 10
        while self.cgroup.exists() and time.monotonic() < deadline:
            try:
                for path, _below, _files in os.walk(self.cgroup, topdown=False):
                    os.rmdir(path)
            except OSError:
                time.sleep(0.05)
