# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What AWX is told, and what it refuses to be told."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import oldest
import pytest
import yaml
from hosts.fleet import ROOT, Fleet, write_list
from integration import awx_job, community
from integration.awx_controller import TOKEN, Controller, Refused, serving, wrong_question

# A hundred processes, one after the other.
pytestmark = pytest.mark.timeout(900)

SETTINGS = {
    "awx_execution_environment_image": "registry.example.org/reaper:1",
    "awx_inventory_scm_url": "https://git.example.org/fleet.git",
    "awx_machine_credential": "hypervisors",
    "awx_notify_url": "https://chat.example.org/hook",
    "awx_plan_key": "the-key-of-the-plans-of-these-tests",
    "awx_live_source_token": "the-token-of-the-live-source",
}


def files() -> list[str]:
    """The files of a clone of this project."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    return subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.fixture(scope="module")
def controller() -> Controller:
    """A controller with what a person has to make: the credential of the hosts."""
    fresh = Controller(files())
    fresh.add("credentials", {"name": "hypervisors", "organization": 1, "credential_type": 2, "inputs": {}})
    return fresh


def apply(controller: Controller, *arguments: str, **changes) -> subprocess.CompletedProcess:
    with serving(controller) as url:
        return subprocess.run(
            [Path(sys.executable).parent / "ansible-playbook", "playbooks/awx.yml", *arguments,
             "-e", json.dumps({**SETTINGS, **changes})],
            cwd=ROOT,
            env={
                **os.environ,
                "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
                "ANSIBLE_COLLECTIONS_PATH": f"{ROOT / 'collections'}:{community.awx()}",
                "ANSIBLE_PIPELINING": "true",
                "CONTROLLER_HOST": url,
                "CONTROLLER_OAUTH_TOKEN": TOKEN,
            },
            capture_output=True,
            text=True,
            check=False,
        )


def recap(done: subprocess.CompletedProcess) -> dict[str, int]:
    (line,) = re.findall(r"^localhost +: (.*)$", done.stdout, re.M)
    return {name: int(count) for name, count in re.findall(r"(\w+)=(\d+)", line)}


@pytest.fixture(scope="module")
def applied(controller: Controller) -> Controller:
    """A controller that was set up by the playbook."""
    done = apply(controller)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not any(SETTINGS[secret] in done.stdout for secret in ("awx_plan_key", "awx_live_source_token"))
    return controller


def test_what_has_no_default_is_named_before_awx_is_asked(controller: Controller) -> None:
    done = apply(controller, awx_plan_key=None, awx_run="both")
    assert done.returncode and "awx_plan_key" in done.stdout and "both" in done.stdout
    assert not controller.writes


def test_all_of_it_is_accepted_and_the_second_time_nothing_is_written(applied: Controller) -> None:
    controller = applied
    # What AWX takes from elsewhere: the organization of a job template is that of its project.
    assert set(controller.ignored) <= {("job_templates", "organization"), ("workflow_job_template_nodes", "type")}

    of_apply = controller.one("job_templates", "microvm.reaper apply")
    assert of_apply["job_slice_count"] == 5 and of_apply["allow_simultaneous"] is False
    assert controller.one("job_templates", "microvm.reaper reap")["job_slice_count"] == 1
    for name in ("reap", "plan", "apply"):
        template = ("job_templates", f"microvm.reaper {name}")
        assert controller.names(*template, "notification_templates_error") == ["microvm.reaper"]
        signs = "microvm.reaper plan key" in controller.names(*template, "credentials")
        assert signs is (name != "reap")
    nodes = "workflow_job_template_nodes"
    assert controller.names(nodes, "plan", "always_nodes") == ["approve"]
    assert controller.names(nodes, "approve", "success_nodes") == ["apply"]
    assert controller.names(nodes, "apply", "success_nodes") == []
    approval = controller.find("workflow_approval_templates", controller.one(nodes, "approve")["unified_job_template"])
    assert approval["timeout"] == 3600
    enabled = {one["name"]: one["enabled"] for one in controller.objects["schedules"].values()}
    assert enabled == {"microvm.reaper sweep": True, "microvm.reaper plan and apply": False}

    controller.writes.clear()
    second = apply(controller)
    assert (second.returncode, recap(second)["changed"], controller.writes) == (0, 0, []), second.stdout


# --- the stand-in refuses what AWX refuses


@pytest.fixture(scope="module")
def full() -> Controller:
    """A controller with the objects that the mistakes below refer to."""
    made = Controller(["playbooks/reap.yml"])
    project = made.add("projects", {"name": "p", "organization": 1, "scm_type": "git", "scm_url": "u"})
    inventory = made.add("inventories", {"name": "i", "organization": 1})
    template = {"name": "t", "project": project["id"], "inventory": inventory["id"], "playbook": "playbooks/reap.yml"}
    made.add("job_templates", {**template, "ask_limit_on_launch": True, "survey_enabled": True})
    spec = {"name": "", "description": "", "spec": [QUESTION]}
    made.survey("job_templates", made.one("job_templates", "t")["id"], spec)
    made.add("workflow_job_templates", {"name": "w", "organization": 1})
    made.add("credential_types", {"name": "c", "kind": "cloud", "inputs": {"fields": [{"id": "k", "label": "K"}]}})
    return made


QUESTION = {"type": "multiplechoice", "question_name": "Q", "variable": "v", "required": True, "choices": ["a", "b"]}
EVERY = "DTSTART:20260101T000000Z RRULE:FREQ=DAILY;INTERVAL=1"
HOOK = {"url": "u", "headers": {}}


@pytest.mark.parametrize(
    ("resource", "given", "said"),
    [
        ("organizations", {"name": "Default"}, "already exists"),
        ("organizations", {"name": ""}, "required"),
        ("execution_environments", {"name": "e"}, "image"),
        ("execution_environments", {"name": "e", "image": "i", "pull": "often"}, "not a valid choice"),
        ("projects", {"name": "q", "organization": 99, "scm_type": "git", "scm_url": "u"}, "object does not exist"),
        ("projects", {"name": "q", "organization": 1, "scm_type": "git"}, "SCM URL is required"),
        ("inventory_sources", {"name": "s", "inventory": "@i", "source": "scm"}, "Project required"),
        ("job_templates", {"playbook": "no.yml"}, "Playbook not found"),
        ("job_templates", {"inventory": None}, "Must either set a default"),
        ("job_templates", {"project": None}, "must have a project"),
        ("job_templates", {"name": "t"}, "already exists"),
        ("job_templates", {"extra_vars": "[1]"}, "Cannot parse"),
        ("job_templates", {"job_type": "scan"}, "not a valid choice"),
        ("job_templates", {"verbosity": 6}, "not a valid choice"),
        ("job_templates", {"forks": "many"}, "valid integer"),
        ("job_templates", {"diff_mode": "perhaps"}, "valid boolean"),
        ("credential_types", {"name": "d", "kind": "ssh"}, "not a valid choice"),
        ("credential_types", {"name": "d", "kind": "cloud", "inputs": {"fields": [{"id": "k"}]}}, "Schema"),
        ("credential_types", {"name": "d", "kind": "cloud", "injectors": {"env": {"x": "{{ k }}"}}}, "undefined"),
        ("credentials", {"name": "x", "credential_type": "@c", "organization": 1, "inputs": {"z": ""}}, "unexpected"),
        ("credentials", {"name": "x", "credential_type": "@c"}, "organization"),
        ("notification_templates", {"notification_configuration": {"headers": {}}}, "Missing required fields"),
        ("notification_templates", {"notification_configuration": {**HOOK, "headers": ""}}, "incorrect type"),
        ("notification_templates", {"notification_configuration": {**HOOK, "http_method": "GET"}}, "must be either"),
        ("notification_templates", {"messages": {"failed": None}}, "invalid"),
        ("notification_templates", {"messages": {"error": {"body": "{{ job.artifact }}"}}}, "undefined"),
        ("notification_templates", {"messages": {"error": {"body": "{{ job.id }}"}}}, "json dictionary"),
        ("schedules", {"extra_data": {"v": "a"}, "rrule": "FREQ=DAILY;INTERVAL=1"}, "Valid DTSTART required"),
        ("schedules", {"extra_data": {"v": "a"}, "rrule": "DTSTART:20260101T000000Z RRULE:FREQ=DAILY"}, "INTERVAL"),
        ("schedules", {"extra_data": {"v": "a"}, "rrule": EVERY.replace("DAILY", "SECONDLY")}, "SECONDLY"),
        ("schedules", {"extra_data": {"v": "a"}, "rrule": EVERY.replace("Z ", " ")}, "naive"),
        ("schedules", {"extra_data": {"v": "c"}}, "none of the choices"),
        ("schedules", {"extra_data": {"v": "a", "x": 1}}, "not allowed on launch"),
        ("schedules", {}, "value missing"),
        ("schedules", {"extra_data": {"v": "a"}, "job_type": "check"}, "not configured to prompt"),
        ("workflow_job_template_nodes", {"job_slice_count": 3}, "not configured to prompt"),
        ("workflow_job_template_nodes", {"extra_data": {"x": 1}}, "not allowed on launch"),
    ],
)
def test_the_stand_in_refuses(full: Controller, resource: str, given: dict, said: str) -> None:
    usual = {
        "job_templates": {"name": "u", "project": "@p", "inventory": "@i", "playbook": "playbooks/reap.yml"},
        "notification_templates": {"name": "n", "organization": 1, "notification_type": "webhook",
                                   "notification_configuration": dict(HOOK)},
        "schedules": {"name": "s", "unified_job_template": "@t", "rrule": EVERY},
        "workflow_job_template_nodes": {"identifier": "n", "workflow_job_template": "@w", "unified_job_template": "@t"},
    }.get(resource, {})
    ids = {one["name"]: one["id"] for items in full.objects.values() for one in items.values() if "name" in one}
    filled = {key: ids[value[1:]] if str(value).startswith("@") else value for key, value in {**usual, **given}.items()}
    before = {name: len(items) for name, items in full.objects.items()}
    with pytest.raises(Refused, match=said):
        full.add(resource, filled)
    assert {name: len(items) for name, items in full.objects.items()} == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"type": "number"}, "not one of the allowed"),
        ({"required": "yes"}, "wrong type"),
        ({"default": "c"}, "answered from the choices"),
        ({"choices": ""}, "must specify choices"),
        ({"type": "integer", "default": "3"}, "expected to be a int"),
        ({"max": "9"}, "expected to be integer"),
        ({"variable": "before"}, "duplicated"),
        ({"help": "?"}, "unknown"),
        ({"variable": 3}, "wrong type"),
    ],
)
def test_the_stand_in_refuses_a_question(change: dict, said: str) -> None:
    assert wrong_question(QUESTION, ["before"]) == ""
    assert said in wrong_question({**QUESTION, **change}, ["before"])


def test_the_stand_in_refuses_a_circle(full: Controller) -> None:
    here = full.one("workflow_job_templates", "w")["id"]
    nodes = [full.add("workflow_job_template_nodes", {"identifier": name, "workflow_job_template": here})["id"]
             for name in "abc"]
    for one, other in zip(nodes, nodes[1:], strict=False):
        full.attach("workflow_job_template_nodes", one, "success_nodes", {"id": other})
    with pytest.raises(Refused, match="Cycle"):
        full.attach("workflow_job_template_nodes", nodes[2], "failure_nodes", {"id": nodes[0]})


# --- surveys


TYPES = {"str": {"text", "textarea", "password"}, "int": {"integer"}, "float": {"float"}, "bool": {"multiplechoice"},
         "list": {"multiselect"}}


def templates() -> list[dict]:
    return yaml.safe_load((ROOT / "awx/templates.yml").read_text())["controller_templates"]


def asked() -> list[tuple[str, dict]]:
    return [(template["playbook"], question) for template in templates()
            for question in template.get("survey_spec", {"spec": []})["spec"]]


@pytest.mark.parametrize(("playbook", "question"), asked(), ids=lambda one: one["variable"] if "type" in one else "")
def test_a_question_of_a_survey_is_a_variable_of_the_role(playbook: str, question: dict) -> None:
    specs = yaml.safe_load((ROOT / "roles/reap/meta/argument_specs.yml").read_text())["argument_specs"]
    entry = {"playbooks/undo.yml": "undo", "playbooks/explain.yml": "explain"}.get(playbook, "main")
    spec = specs[entry]["options"][question["variable"]]
    assert question["type"] in TYPES[spec["type"]] or (spec.get("choices") and question["type"] == "multiplechoice")
    choices = ["false", "true"] if spec["type"] == "bool" else spec.get("choices")
    assert question.get("choices") == choices
    default = spec.get("default", "")
    assert question["default"] == (str(default).lower() if spec["type"] == "bool" else default)
    assert not (spec.get("no_log") and question["type"] != "password")
    assert wrong_question(question, []) == ""


def test_what_a_template_says_beside_its_survey_is_a_variable_of_the_role() -> None:
    specs = yaml.safe_load((ROOT / "roles/reap/meta/argument_specs.yml").read_text())["argument_specs"]
    said = {name for template in templates() for name in template.get("extra_vars", {})}
    injected = yaml.load((ROOT / "awx/credentials.yml").read_text(), _WithUnsafe)["controller_credential_types"]
    said |= {name for one in injected for name in one["injectors"]["extra_vars"] if name.startswith("reap_")}
    known = set().union(*(entry["options"] for entry in specs.values()))
    assert said <= known


class _WithUnsafe(yaml.SafeLoader):
    """Reads what Ansible is told not to render."""


_WithUnsafe.add_constructor("!unsafe", lambda loader, node: loader.construct_scalar(node))


# --- what AWX runs


@dataclass
class Site:
    """This machine as a host of AWX, with jails of dead VMs."""

    applied: Controller
    directory: Path
    repository: Path
    programs: Path

    def plant(self, *names: str) -> None:
        for name in names:
            (self.directory / "jailer/firecracker" / name / "root").mkdir(parents=True)

    def left(self) -> list[str]:
        return sorted(path.name for path in (self.directory / "jailer/firecracker").glob("[!.]*"))

    def list_live(self, *names: str, **changes) -> None:
        # By a clock that is a little ahead: what was just planted is then older than the list.
        date = time.time() + 25
        document = {"realm": "awx", "generated_at": date, "complete": True, "vms": [{"vm_id": name} for name in names]}
        write_list(self.directory / f"{SETTINGS['awx_live_source_token']}.json", {**document, **changes})

    def run(self, name: str, answers: dict | None = None, **variables) -> awx_job.Job:
        said = {
            "reap_realm": "awx",
            "reap_presets": ["firecracker-jailer"],
            "reap_kinds": ["jail", "cgroup"],
            "reap_jail_bases": [str(self.directory / "jailer")],
            "reap_cgroup_roots": ["no-such-parent"],
            # What a credential injects, in a variable of the inventory.
            "reap_live_sources": [{"type": "file", "path": f"{self.directory}/{{{{ live_source_token }}}}.json"}],
            "reap_state_dir": str(self.directory / "state"),
            "reap_strike_interval": 0.01,
            "reap_min_age": 0,
            "reap_hold": 0,
            **variables,
        }
        local = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}
        inventory = {"all": {"hosts": ["rack1"], "vars": said}, "_meta": {"hostvars": {"rack1": local}}}
        job = run(self.applied, name, self.repository, self.directory, inventory, answers, programs=self.programs)
        print(job.stdout)
        return job


def run(
    applied: Controller, name: str, repository: Path, directory: Path, inventory: dict, answers: dict | None, **how
) -> awx_job.Job:
    """Run a job of a template as the playbook has made it, with what its credentials inject."""
    made = applied.one("job_templates", f"microvm.reaper {name}")
    survey = applied.surveys.get(("job_templates", made["id"]), {"spec": []})["spec"]
    template = {**made, "extra_vars": json.loads(made["extra_vars"] or "{}"), "survey": survey}
    attached = applied.names("job_templates", made["name"], "credentials")
    known = {"microvm.reaper plan key": {"reap_plan_key": SETTINGS["awx_plan_key"]},
             "microvm.reaper live source": {"live_source_token": SETTINGS["awx_live_source_token"]}}
    secrets = {key: value for one in attached for key, value in known.get(one, {}).items()}
    return awx_job.run(repository, directory, template, inventory, answers=answers, secrets=secrets, **how)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return awx_job.repository(tmp_path_factory.mktemp("project"))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may remove jails")
def test_what_a_sweep_comes_to_is_told_by_the_status_and_the_artifact(
    applied: Controller, repository: Path, tmp_path: Path
) -> None:
    """With the oldest ansible-core, which execution environments of AWX have."""
    site = Site(applied, tmp_path, repository, oldest.programs(oldest.promised()))
    site.plant("dead1", "dead2")
    site.list_live("alive")
    first = site.run("reap")
    assert (first.status, first.hosts) == ("successful", {"rack1"})
    counts = first.artifacts["microvm_reaper"]
    assert (counts["suspected"], counts["reaped"], counts["refused"], counts["stopped"]) == (2, 0, {}, None)
    assert "2 suspected" in first.stdout

    capped = site.run("reap", reap_max_per_fleet=1)
    assert capped.status == "failed" and capped.artifacts["microvm_reaper"]["stopped"]["code"] == "fleet_cap"
    site.list_live("alive", hosts=["rack2"])
    refused = site.run("reap")
    assert refused.status == "failed" and sum(refused.artifacts["microvm_reaper"]["refused"].values()) == 1
    copied = site.run("reap", reap_live_sources=[{"type": "inventory"}])
    assert copied.status == "failed" and copied.artifacts["microvm_reaper"]["stopped"]["code"] == "inventory_copy"
    assert site.left() == ["dead1", "dead2"]

    site.list_live("alive")
    aside = site.run("reap", reap_hold=3600)
    assert (aside.status, aside.artifacts["microvm_reaper"]["aside"], site.left()) == ("successful", 2, [])
    back = site.run("undo", {"vm_id": "dead1"})
    assert (back.status, site.left()) == ("successful", ["dead1"])
    gone = site.run("reap")
    assert (gone.status, gone.artifacts["microvm_reaper"]["reaped"], site.left()) == ("successful", 1, ["dead1"])

    site.list_live("alive", "dead2")
    latched = site.run("reap")
    assert (latched.status, latched.artifacts["microvm_reaper"]["refused"]) == ("failed", {"latched": 1})
    cleared = site.run("reap", {"reap_clear_latch": "awx"})
    assert (cleared.status, cleared.artifacts["microvm_reaper"]["refused"]) == ("successful", {})

    why = site.run("explain", {"vm_id": "dead1"})
    assert why.status == "successful" and "dead1" in why.stdout

    unplanned = site.run("apply")
    assert unplanned.status == "failed" and unplanned.artifacts["microvm_reaper"]["stopped"]["code"] == "plan_missing"


@pytest.mark.hosts
@pytest.mark.skipif(os.geteuid() != 0, reason="test hosts need root")
def test_the_slices_of_an_apply_do_together_what_the_plan_says(
    applied: Controller, repository: Path, pair: Fleet, tmp_path: Path
) -> None:
    """The nodes of the workflow, one after the other; what one leaves as artifacts the next gets as variables."""
    pair.plant({"live": 2, "orphans": 2, "containers": 0})
    pair.list_live(generated_at=time.time() + 25)
    inventory = awx_job.imported(pair.state / "inventory.yml")
    inventory["all"]["vars"] |= {"reap_min_age": 0, "reap_strike_interval": 0.1, "reap_max_percent": 100}

    def job(name: str, answers: dict | None = None, share: tuple[int, int] = (1, 1)) -> awx_job.Job:
        done = run(applied, name, repository, tmp_path, inventory, answers, slice_of=share)
        print(done.stdout)
        return done

    assert job("reap").artifacts["microvm_reaper"]["suspected"] > 0
    pair.list_live(generated_at=time.time() + 25)
    planned = job("plan")
    assert planned.status == "successful" and planned.artifacts["microvm_reaper"]["planned"]
    assert pair.check("there") == []
    count = applied.one("job_templates", "microvm.reaper apply")["job_slice_count"]
    assert count > 1

    with ThreadPoolExecutor() as pool:
        slices = list(pool.map(lambda number: job("apply", planned.artifacts, (number, 2)), (1, 2)))
    assert [one.status for one in slices] == ["successful", "successful"]
    assert [one.hosts for one in slices] == [{"one"}, {"two"}]
    assert pair.check("gone") == []
    reaped = [one.artifacts["microvm_reaper"]["reaped"] for one in slices]
    assert all(reaped) and sum(reaped) == planned.artifacts["microvm_reaper"]["confirmed"]
    again = job("apply", planned.artifacts)
    assert again.artifacts["microvm_reaper"]["reaped"] == 0 and "plan_spent" in again.stdout
