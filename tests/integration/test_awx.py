# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What AWX is told, and what it refuses to be told."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hosts.fleet import ROOT
from integration import community
from integration.awx_controller import TOKEN, Controller, Refused, serving, wrong_question

SETTINGS = {
    "awx_execution_environment_image": "registry.example.org/reaper:1",
    "awx_inventory_scm_url": "https://git.example.org/fleet.git",
    "awx_machine_credential": "hypervisors",
    "awx_notify_url": "https://chat.example.org/hook",
    "awx_plan_key": "k-of-the-plan",
    "awx_live_source_token": "t-of-the-source",
}


def files() -> list[str]:
    """The files of a clone of this project."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    return subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.fixture
def controller() -> Controller:
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


def test_all_of_it_is_accepted_and_the_second_time_nothing_is_written(controller: Controller) -> None:
    first = apply(controller)
    assert first.returncode == 0, first.stdout + first.stderr
    # What AWX takes from elsewhere: the organization of a job template is that of its project.
    assert set(controller.ignored) <= {("job_templates", "organization"), ("workflow_job_template_nodes", "type")}
    assert not any(secret in first.stdout for secret in ("k-of-the-plan", "t-of-the-source"))

    of_apply = controller.one("job_templates", "microvm.reaper apply")
    assert of_apply["job_slice_count"] == 5 and of_apply["allow_simultaneous"] is False
    assert controller.one("job_templates", "microvm.reaper reap")["job_slice_count"] == 1
    for name in ("reap", "plan", "apply"):
        template = ("job_templates", f"microvm.reaper {name}")
        assert controller.names(*template, "notification_templates_error") == ["microvm.reaper"]
        signs = "microvm.reaper plan key" in controller.names(*template, "credentials")
        assert signs is (name != "reap")
    nodes = "workflow_job_template_nodes"
    assert controller.names(nodes, "plan", "success_nodes") == ["approve"]
    assert controller.names(nodes, "approve", "success_nodes") == ["apply"]
    assert controller.names(nodes, "apply", "success_nodes") == []
    approval = controller.find("workflow_approval_templates", controller.one(nodes, "approve")["unified_job_template"])
    assert approval["timeout"] == 3600
    enabled = {one["name"]: one["enabled"] for one in controller.objects["schedules"].values()}
    assert enabled == {"microvm.reaper sweep": True, "microvm.reaper plan and apply": False}

    controller.writes.clear()
    second = apply(controller)
    assert (second.returncode, recap(second)["changed"], controller.writes) == (0, 0, []), second.stdout


def test_what_has_no_default_is_named_before_awx_is_asked(controller: Controller) -> None:
    done = apply(controller, awx_plan_key=None, awx_run="both")
    assert done.returncode and "awx_plan_key" in done.stdout and "both" in done.stdout
    assert not controller.writes


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
