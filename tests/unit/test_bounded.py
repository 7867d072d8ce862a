# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Rows 17, 22 and 31: no module outlives its deadline, whatever hangs."""

from __future__ import annotations

import os
import time

import pytest
from ansible_collections.microvm.reaper.plugins.module_utils import probe
from ansible_collections.microvm.reaper.plugins.module_utils.facts_module import bounded


class Failed(Exception):
    pass


class Module:
    """As much of an AnsibleModule as bounded() asks of one."""

    def __init__(self, deadline):
        self.params = {"deadline": deadline, "state_dir": "/var/lib/microvm.reaper"}

    def fail_json(self, msg, **_more):
        raise Failed(msg)


def test_what_comes_in_time_comes_whole():
    assert bounded(Module(30.0), lambda seconds: {"seconds": seconds, "big": "x" * 3_000_000})["seconds"] == 27.0
    assert bounded(Module(300.0), lambda seconds: seconds) == 290.0


def test_what_hangs_is_abandoned_at_the_deadline_and_told(tmp_path):
    begin = time.monotonic()
    with pytest.raises(Failed, match="nothing came of it within 0.5 s.*file system of /var/lib/microvm.reaper hangs"):
        bounded(Module(0.5), lambda seconds: (tmp_path / "pid").write_text(str(os.getpid())) and time.sleep(60))
    assert 0.5 <= time.monotonic() - begin < 10
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 5
    while os.path.exists("/proc/%d/exe" % pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    with pytest.raises(FileNotFoundError):
        os.readlink("/proc/%d/exe" % pid)


def test_what_goes_wrong_in_the_child_is_told_in_words():
    def broken(_seconds):
        raise OSError(28, "No space left on device")

    with pytest.raises(Failed, match="No space left on device"):
        bounded(Module(5.0), broken)


def test_a_child_may_have_children_of_its_own():
    def work():
        worker = probe.Worker(lambda item: item + 1)
        try:
            return worker.call(41, 5.0)
        finally:
            worker.close()

    assert probe.in_a_child(work, 10.0) == 42
