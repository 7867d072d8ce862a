# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What a host is given to sweep itself, what its unit may not have, and what it says of a sweep."""

from __future__ import annotations

import importlib.util
import io
import os
import pathlib
import socket
import subprocess
import sys
import tarfile

import pytest
import yaml
from ansible.inventory.manager import InventoryManager
from ansible.parsing.dataloader import DataLoader
from ansible.template import Templar
from ansible.vars.manager import VariableManager
from ansible_collections.microvm.reaper.plugins.plugin_utils import pulling, report, variables
from hypothesis import given, settings
from hypothesis import strategies as st

ROLE = pathlib.Path(__file__).resolve().parents[2] / "roles/reap"
SPEC = variables.role_spec()
DEFAULTS = yaml.safe_load((ROLE / "defaults/main.yml").read_text())
GIVEN = {"reap_realm": "prod", "reap_presets": ["hyper"], "reap_live_sources": [{"type": "http", "url": "https://cp"}]}


# --- the variables


def problems(**changes):
    return pulling.problems(dict(DEFAULTS, **dict(GIVEN, **changes)))


def test_the_defaults_can_be_had_by_a_timer():
    assert problems() == []
    assert problems(reap_schedule_on_failure="alert@%n.service", reap_schedule_on_calendar="Mon..Fri *-*-* 02,14:00/5",
                    reap_schedule_memory_max="infinity") == []


@pytest.mark.parametrize(("name", "value"), [
    ("reap_clear_latch", "prod"), ("reap_adopt_host", True),
    ("reap_live_sources", [{"type": "inventory"}]),
    ("reap_schedule_on_calendar", ""), ("reap_schedule_on_calendar", "daily\nExecStart=/bin/sh"),
    ("reap_schedule_on_failure", "alert"), ("reap_schedule_on_failure", "a.service\nExecStart=x.service"),
    ("reap_schedule_on_failure", "a.service b.service"),
    ("reap_schedule_ansible_playbook", "ansible-playbook"), ("reap_schedule_ansible_playbook", "/a b"),
    ("reap_schedule_ansible_playbook", "/a\n/b"), ("reap_schedule_ansible_playbook", "/opt/%i"),
    ("reap_schedule_memory_max", "1 GB"), ("reap_schedule_memory_max", "0"), ("reap_schedule_splay", -1),
])  # fmt: skip
def test_what_a_timer_must_not_say_is_named(name, value):
    (said,) = problems(**{name: value})
    assert said.startswith(name)


def test_a_host_gets_what_is_not_the_default_and_is_of_the_sweep():
    not_its_own = {"reap_hosts": "rack*", "reap_waves": [1], "reap_report_path": "/srv/r.json", "other": 1}
    given_to_it = dict(DEFAULTS, **GIVEN, reap_hold=0, reap_schedule_splay=9, reap_webhook_url="https://cp/hook")
    given_to_it.update(not_its_own)
    assert pulling.of_the_host(given_to_it, SPEC) == dict(
        GIVEN, reap_hold=0, reap_webhook_url="https://cp/hook", reap_host_id=DEFAULTS["reap_host_id"]
    )


TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\x85\ufeff"), max_size=20) | st.sampled_from(
    ["{{ 7 * 7 }}", "{% raw %}", "a{# x #}b", "!vault x", "no", "1e3", "|", "'", "a: b", "{{ lookup('pipe', 'id') }}"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from(["reap_keep", "reap_hold", "reap_realm"]), VALUES))
def test_ansible_reads_of_the_inventory_what_was_given_and_renders_nothing(tmp_path_factory, values):
    path = tmp_path_factory.getbasetemp() / "pulled.yml"
    path.write_text(pulling.inventory("rack 1", values))
    loader = DataLoader()
    manager = InventoryManager(loader=loader, sources=[str(path)])
    (host,) = manager.get_hosts()
    found = VariableManager(loader=loader, inventory=manager).get_vars(host=host)
    templar = Templar(loader=loader, variables=found)
    assert {name: templar.template(found[name]) for name in values} == values
    assert (host.name, found["ansible_connection"]) == ("rack 1", "local")


# --- the collection


def test_what_is_shipped_is_what_runs(tmp_path):
    link = ROLE.parents[1] / "collections/ansible_collections/microvm/reaper"
    content = pulling.files(str(link))
    assert content == pulling.files(str(ROLE.parents[1])), "from a link as from the checkout"
    assert {"playbooks/reap.yml", "roles/reap/files/sweep.py", "plugins/modules/reap.py", "galaxy.yml"} < set(content)
    assert not [path for path in content if path.startswith(("tests/", "docs/", ".")) or "__pycache__" in path]
    packed = pulling.archive(content, "a/b")
    assert packed == pulling.archive(dict(reversed(content.items())), "a/b")
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        assert {entry.name: entry.mode for entry in tar} == {"a/b/%s" % path: 0o644 for path in content}
        assert tar.extractfile("a/b/playbooks/reap.yml").read() == content["playbooks/reap.yml"]


def test_another_content_is_another_version():
    content = {"a": b"1", "b": b"2"}
    assert pulling.digest(content) == pulling.digest({"b": b"2", "a": b"1"})
    others = [{}, {"a": b"12", "b": b""}, {"a": b"1", "c": b"2"}, {"a": b"1"}, {"a": b"1", "b": b"3"}, {"ab": b"12"}]
    assert len({pulling.digest(one) for one in [content, *others]}) == 7


# --- the unit


# What gives a unit mounts, devices or users of its own, by systemd.exec(5). In such a unit nothing is unmounted on the
# host, and the jail's directory goes with a mount still on it.
OF_ITS_OWN = (
    "ProtectSystem ProtectHome ProtectKernelTunables ProtectKernelModules ProtectKernelLogs ProtectControlGroups "
    "ProtectClock ProtectProc ProtectHostname ProcSubset PrivateTmp PrivateDevices PrivateMounts PrivateUsers "
    "PrivateIPC MountAPIVFS MountFlags ReadWritePaths ReadOnlyPaths InaccessiblePaths ExecPaths NoExecPaths BindPaths "
    "BindReadOnlyPaths TemporaryFileSystem RootDirectory RootImage DynamicUser DeviceAllow DevicePolicy "
    "StateDirectory LogsDirectory CacheDirectory User"
).split()


def test_the_unit_has_the_mounts_and_devices_of_the_host():
    unit = (ROLE / "templates/microvm-reaper.service.j2").read_text()
    set_in_it = {line.partition("=")[0] for line in unit.splitlines() if "=" in line and not line.startswith("#")}
    assert {"CapabilityBoundingSet", "NoNewPrivileges"} <= set_in_it
    assert not set_in_it & set(OF_ITS_OWN)


# --- what runs in it


def load():
    spec = importlib.util.spec_from_file_location("sweep", ROLE / "files/sweep.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


sweep = load()


def reported(**changes):
    host = {"plan": None, "outcomes": [], "busy": None, "evidence": None, "error": None, "refused": None, "absent": {},
            "unavailable": {}}
    return report.as_json("prod", {"source": "s", "count": 3}, {"rack1": dict(host, **changes)})


@pytest.mark.parametrize(("found", "code", "said"), [
    (reported(), 0, "microvm.reaper: realm prod, 1 host, 3 VMs live by s: nothing to reap"),
    (None, 4, "no sweep: ansible-playbook ended with code 4"),
    ([], 2, "its report cannot be read"), ({"headline": "x"}, 2, "its report cannot be read"),
    (dict(reported(), stopped={"code": "blind", "message": "no\nVM"}), 2, "REFUSED (blind): no VM"),
    (reported(refused={"code": "host_unknown", "message": "who?"}), 2, "REFUSED (host_unknown): who?"),
    (reported(error="dead disk"), 2, "; FAILED: dead disk"), (reported(), 2, "; FAILED: see the journal"),
])  # fmt: skip
def test_one_line_says_what_came_of_it(found, code, said):
    line = sweep.in_words(found, code)
    assert said in line and "\n" not in line
    assert len(sweep.in_words(dict(reported(), headline="x" * 9999), 0)) < 500


def script(tmp_path, text):
    path = tmp_path / "ansible-playbook"
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    argv = [sys.executable, str(ROLE / "files/sweep.py"), str(path), "reap.yml", "hosts.yml"]
    return argv, dict(os.environ, RUNTIME_DIRECTORY=str(tmp_path))


def test_systemd_is_told_and_the_exit_code_is_that_of_the_playbook(tmp_path):
    argv, environment = script(tmp_path, 'echo "$@" > "%s/arguments"; exit 2' % tmp_path)
    (tmp_path / "report.json").write_text('{"headline": "of the sweep before"}')
    (tmp_path / "tmp/of-a-killed-sweep").mkdir(parents=True)
    environment["NOTIFY_SOCKET"] = "@reaper-test-%d" % os.getpid()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(environment["NOTIFY_SOCKET"].replace("@", "\0"))
        listener.settimeout(10)
        done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=30)
        told = [listener.recv(4096).decode() for _twice in range(2)]
    assert done.returncode == 2
    assert told == ["STATUS=sweeping", "STATUS=" + done.stdout.strip()]
    assert "code 2 before it had anything to report" in told[1]
    assert not (tmp_path / "tmp").exists()
    extra = "reap_report_path=%s/report.json" % tmp_path
    assert (tmp_path / "arguments").read_text() == "-i hosts.yml -e %s reap.yml\n" % extra


def test_it_ends_when_what_is_read_in_the_background_has_ended(tmp_path):
    argv, environment = script(tmp_path, "setsid sh -c 'sleep 1; echo done > %s/late' > /dev/null 2>&1 &" % tmp_path)
    assert subprocess.run(argv, env=environment, capture_output=True, timeout=30).returncode == 0
    assert (tmp_path / "late").read_text() == "done\n"


def test_it_hands_the_signal_on(tmp_path):
    argv, environment = script(tmp_path, "trap 'exit 9' TERM; echo up; while :; do sleep 0.1; done")
    with subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "up\n"
        child.terminate()
        assert child.wait(30) == 9


def test_a_program_that_is_not_there(tmp_path):
    argv, environment = script(tmp_path, "")
    done = subprocess.run([*argv[:2], "/nowhere/x", *argv[3:]], env=environment, capture_output=True, text=True)
    assert done.returncode == 127
    assert done.stdout.startswith("/nowhere/x cannot be run: No such file")
