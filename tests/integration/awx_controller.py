# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A stand-in for AWX 24.6.1, for tests: keeps the objects it is given, and refuses what AWX would refuse.

The fields, their types and choices are those that AWX answers to OPTIONS; the rest is what its serializers check. AWX
leaves out fields that it does not know without a word: here they are counted in ``ignored``.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from jinja2 import StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

TOKEN = "of-the-test"
ENCRYPTED = "$encrypted$"
VERBOSITY = (0, 1, 2, 3, 4, 5)


class Refused(Exception):
    """What AWX would answer, with its status."""

    def __init__(self, answer: Any, status: int = 400) -> None:
        super().__init__(json.dumps(answer))
        self.answer, self.status = answer, status


def refuse(field: str, said: str) -> None:
    raise Refused({field: [said]})


class Field:
    """One field of a resource: how AWX takes it, and what it is where nobody has said."""

    def __init__(self, kind: str, default: Any = None, *, required: bool = False, **limits: Any) -> None:
        self.kind, self.default, self.required, self.limits = kind, default, required, limits

    def taken(self, name: str, value: Any) -> Any:
        if value is None and self.kind == "choice" and "" in self.limits["of"]:
            value = ""
        if value is None:
            if self.default is not None and self.kind != "json":
                refuse(name, "This field may not be null.")
            return None
        return getattr(self, "_" + self.kind)(name, value)

    def _text(self, name: str, value: Any) -> str:
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            refuse(name, "Not a valid string.")
        if len(str(value)) > self.limits.get("most", 1 << 30):
            refuse(name, f"Ensure this field has no more than {self.limits['most']} characters.")
        if self.required and not str(value):
            refuse(name, "This field may not be blank.")
        return str(value)

    def _yes(self, name: str, value: Any) -> bool:
        if value not in (True, False, "true", "false", "True", "False"):
            refuse(name, "Must be a valid boolean.")
        return value in (True, "true", "True")

    def _number(self, name: str, value: Any) -> int:
        if isinstance(value, bool) or not re.fullmatch(r"-?\d+", str(value)):
            refuse(name, "A valid integer is required.")
        if int(value) < self.limits.get("least", -(1 << 31)):
            refuse(name, f"Ensure this value is greater than or equal to {self.limits['least']}.")
        return int(value)

    def _choice(self, name: str, value: Any) -> Any:
        if value not in self.limits["of"]:
            refuse(name, f'"{value}" is not a valid choice.')
        return value

    def _json(self, name: str, value: Any) -> Any:
        if not isinstance(value, (dict, str)):
            refuse(name, "Value must be a valid JSON dictionary or string.")
        return value

    def _key(self, name: str, value: Any) -> int:
        return self._number(name, value)  # the resource looks for the object


def text(most: int = 1 << 30, **how: Any) -> Field:
    return Field("text", how.pop("default", ""), most=most, **how)


def yes(default: bool = False) -> Field:
    return Field("yes", default)


def number(default: int | None = 0, **how: Any) -> Field:
    return Field("number", default, **how)


def choice(*of: Any, default: Any = None, required: bool = False) -> Field:
    return Field("choice", default, of=of, required=required)


def key(of: str, *, required: bool = False) -> Field:
    return Field("key", None, of=of, required=required)


def document(default: Any = None, *, required: bool = False) -> Field:
    return Field("json", default, required=required)


NAMED = {"name": text(512, required=True), "description": text()}
ASKS = (
    "credential diff_mode execution_environment forks instance_groups inventory job_slice_count job_type labels "
    "limit scm_branch skip_tags tags timeout variables verbosity"
).split()
# What a schedule or a node may say, where its template asks for it; by the name of the question.
PROMPTS = {
    "job_tags": "tags",
    **{name: name for name in "diff_mode execution_environment forks inventory job_slice_count job_type limit".split()},
    **{name: name for name in "scm_branch skip_tags timeout verbosity".split()},
}
PROMPTED = {
    "extra_data": document({}),
    "inventory": key("inventories"),
    "scm_branch": text(1024, default=None),
    "job_type": choice(None, "", "run", "check"),
    "job_tags": text(default=None),
    "skip_tags": text(default=None),
    "limit": text(default=None),
    "diff_mode": Field("yes"),
    "verbosity": choice(None, *VERBOSITY),
    "execution_environment": key("execution_environments"),
    "forks": number(None, least=0),
    "job_slice_count": number(None, least=0),
    "timeout": number(None),
}
FIELDS: dict[str, dict[str, Field]] = {
    "organizations": {**NAMED, "max_hosts": number(0, least=0), "default_environment": key("execution_environments")},
    "execution_environments": {
        **NAMED,
        "image": text(1024, required=True),
        "organization": key("organizations"),
        "credential": key("credentials"),
        "pull": choice("", "always", "missing", "never", default=""),
    },
    "credential_types": {
        **NAMED,
        "kind": choice("cloud", "net", required=True),
        "inputs": document({}),
        "injectors": document({}),
        "managed": yes(),
    },
    "credentials": {
        **NAMED,
        "organization": key("organizations"),
        "credential_type": key("credential_types", required=True),
        "inputs": document({}),
    },
    "projects": {
        **NAMED,
        "organization": key("organizations"),
        "scm_type": choice("", "git", "svn", "insights", "archive", default=""),
        "scm_url": text(1024),
        "scm_branch": text(256),
        "scm_refspec": text(1024),
        "credential": key("credentials"),
        "default_environment": key("execution_environments"),
        "timeout": number(),
        "scm_update_cache_timeout": number(0, least=0),
        **{name: yes() for name in ("scm_clean", "scm_delete_on_update", "scm_track_submodules",
                                    "scm_update_on_launch", "allow_override")},
    },
    "inventories": {
        **NAMED,
        "organization": key("organizations", required=True),
        "kind": choice("", "smart", "constructed", default=""),
        "host_filter": text(default=None),
        "variables": document(""),
        "prevent_instance_group_fallback": yes(),
    },
    "inventory_sources": {
        **NAMED,
        "inventory": key("inventories", required=True),
        "source": choice("file", "constructed", "scm", "ec2", "gce", "azure_rm", "vmware", "satellite6", "openstack",
                         "rhv", "controller", "insights", "terraform", "openshift_virtualization"),
        "source_path": text(1024),
        "source_vars": text(),
        "source_project": key("projects"),
        "scm_branch": text(1024),
        "credential": key("credentials"),
        "execution_environment": key("execution_environments"),
        **{name: text() for name in ("enabled_var", "enabled_value", "host_filter", "limit")},
        **{name: yes() for name in ("overwrite", "overwrite_vars", "update_on_launch")},
        "timeout": number(),
        "update_cache_timeout": number(0, least=0),
        "verbosity": choice(0, 1, 2, default=1),
    },
    "notification_templates": {
        **NAMED,
        "organization": key("organizations", required=True),
        "notification_type": choice("awssns", "email", "grafana", "irc", "mattermost", "pagerduty", "rocketchat",
                                    "slack", "twilio", "webhook", required=True),
        "notification_configuration": document({}),
        "messages": document(),
    },
    "job_templates": {
        **NAMED,
        "job_type": choice("run", "check", default="run"),
        "inventory": key("inventories"),
        "project": key("projects"),
        "playbook": text(1024),
        "scm_branch": text(1024),
        "forks": number(0, least=0),
        "limit": text(),
        "verbosity": choice(*VERBOSITY, default=0),
        "extra_vars": document(""),
        "job_tags": text(),
        "skip_tags": text(1024),
        "start_at_task": text(1024),
        "timeout": number(),
        "execution_environment": key("execution_environments"),
        "host_config_key": text(1024),
        "job_slice_count": number(1, least=0),
        "webhook_service": choice("", "github", "gitlab", "bitbucket_dc", default=""),
        "webhook_credential": key("credentials"),
        **{name: yes() for name in ("allow_simultaneous", "become_enabled", "diff_mode", "force_handlers",
                                    "prevent_instance_group_fallback", "survey_enabled", "use_fact_cache")},
        **{f"ask_{name}_on_launch": yes() for name in ASKS},
    },
    "workflow_job_templates": {
        **NAMED,
        "organization": key("organizations"),
        "extra_vars": document(""),
        "inventory": key("inventories"),
        **{name: text(default=None) for name in ("limit", "scm_branch", "job_tags", "skip_tags")},
        "webhook_service": choice("", "github", "gitlab", "bitbucket_dc", default=""),
        "webhook_credential": key("credentials"),
        **{name: yes() for name in ("allow_simultaneous", "survey_enabled")},
        **{f"ask_{name}_on_launch": yes()
           for name in ("inventory", "labels", "limit", "scm_branch", "skip_tags", "tags", "variables")},
    },
    "workflow_approval_templates": {**NAMED, "timeout": number(0, least=0)},
    "workflow_job_template_nodes": {
        **PROMPTED,
        "workflow_job_template": key("workflow_job_templates", required=True),
        "unified_job_template": key("unified_job_templates"),
        "all_parents_must_converge": yes(),
        "identifier": text(512, required=True),
    },
    "schedules": {
        **NAMED,
        **PROMPTED,
        "rrule": text(required=True),
        "unified_job_template": key("unified_job_templates", required=True),
        "enabled": yes(True),
    },
}
TYPES = {name: name[:-1].replace("inventorie", "inventory") for name in FIELDS}
UNIFIED = ("job_templates", "projects", "inventory_sources", "workflow_job_templates", "workflow_approval_templates")
UNIQUE = {
    "credential_types": ("name", "kind"),
    "credentials": ("organization", "name", "credential_type"),
    "execution_environments": ("name",),
    "inventory_sources": ("inventory", "name"),
    "organizations": ("name",),
    "schedules": ("unified_job_template", "name"),
    "workflow_job_template_nodes": ("workflow_job_template", "identifier"),
    "workflow_approval_templates": ("id",),
}
TELLING = tuple(f"notification_templates_{event}" for event in ("started", "success", "error"))
NEXT = ("success_nodes", "failure_nodes", "always_nodes")
# What may be attached to what.
ATTACHED: dict[str, dict[str, str]] = {
    "projects": dict.fromkeys(TELLING, "notification_templates"),
    "inventory_sources": dict.fromkeys(TELLING, "notification_templates"),
    "job_templates": {"credentials": "credentials", **dict.fromkeys(TELLING, "notification_templates")},
    "workflow_job_templates": dict.fromkeys((*TELLING, "notification_templates_approvals"), "notification_templates"),
    "workflow_job_template_nodes": {"credentials": "credentials", **dict.fromkeys(NEXT, "workflow_job_template_nodes")},
    "schedules": {"credentials": "credentials"},
}
QUESTIONS: dict[str, type] = {
    "text": str, "textarea": str, "password": str, "multiplechoice": str, "multiselect": str, "integer": int,
    "float": float,
}
OF_A_QUESTION = {
    *"type question_name question_description variable required default min max choices new_question".split()
}
OF_AN_INPUT = {*"id label help_text type format secret multiline choices default ask_at_runtime".split()}
# The configuration of each type of notification: the type of each value, and the default of those that have one.
PARAMETERS: dict[str, dict[str, tuple]] = {
    "webhook": {
        "url": (str,), "http_method": (str, "POST"), "disable_ssl_verification": (bool, False), "headers": (dict,),
        "username": (str, ""), "password": (str, ""),
    },
    "slack": {"token": (str,), "channels": (list,)},
    "mattermost": {"mattermost_url": (str,), "mattermost_no_verify_ssl": (bool,)},
    "email": {
        "host": (str,), "port": (int,), "username": (str,), "password": (str,), "use_tls": (bool,), "use_ssl": (bool,),
        "sender": (str,), "recipients": (list,), "timeout": (int, 30),
    },
}
SECRET = ("password", "token")
# A part of what AWX renders a message with, to see whether it can be.
OF_A_JOB = {
    "job": {"id": 42, "name": "Stub", "status": "running", "job_explanation": "Sample", "artifacts": {}, "limit": "",
            "url": "/api/v2/jobs/42/", "job_slice_number": 0, "job_slice_count": 1, "failed": False},
    "job_friendly_name": "Job", "url": "https://awx/#/jobs/playbook/42", "approval_status": "approved",
    "approval_node_name": "Approve Me", "workflow_url": "https://awx/#/jobs/workflow/1010", "job_metadata": "{}",
}


class Controller:
    """All objects. ``files`` are those of the project's repository, which AWX looks for playbooks in."""

    def __init__(self, files: list[str]) -> None:
        self.files = files
        self.objects: dict[str, dict[int, dict]] = {name: {} for name in FIELDS}
        self.attached: dict[tuple[str, int, str], list[int]] = {}
        self.surveys: dict[tuple[str, int], dict] = {}
        self.ignored: list[tuple[str, str]] = []
        self.writes: list[str] = []
        self.last = 0
        self.add("organizations", {"name": "Default"})
        self.machine = self._keep("credential_types", {"name": "Machine", "kind": "ssh", "managed": True, "inputs": {
            "fields": [{"id": "username", "type": "string"}, {"id": "ssh_key_data", "type": "string", "secret": True}],
        }})

    # --- objects

    def find(self, name: str, identity: int) -> dict:
        for one in UNIFIED if name == "unified_job_templates" else (name,):
            if identity in self.objects[one]:
                return self.objects[one][identity]
        raise Refused({"detail": "Not found."}, 404)

    def one(self, resource: str, name: str) -> dict:
        items = self.objects[resource].values()
        return next(item for item in items if name in (item.get("name"), item.get("identifier")))

    def listed(self, name: str, query: dict[str, str]) -> list[dict]:
        names = UNIFIED if name == "unified_job_templates" else (name,)
        found = []
        for resource in names:
            known = {"id", "type", "organization", "or__id", "or__name", *FIELDS[resource]}
            for field in set(query) - known - {"page_size"}:
                raise Refused({"detail": f"{TYPES[resource]} has no field named '{field}'"})
            found += [item for item in self.objects[resource].values() if self._matches(item, query)]
        return found

    def _matches(self, item: dict, query: dict[str, str]) -> bool:
        either = [str(item.get(field[4:])) == value for field, value in query.items() if field.startswith("or__")]
        every = [str(item.get(field)) == value for field, value in query.items() if not field.startswith("or__")]
        return all(every) and (not either or any(either))

    def add(self, resource: str, given: dict) -> dict:
        fields = FIELDS[resource]
        for name, field in fields.items():
            if field.required and given.get(name) in (None, ""):
                refuse(name, "This field is required.")
        values = {name: field.default for name, field in fields.items()} | self._taken(resource, given)
        return self._keep(resource, self._checked(resource, values, None))

    def change(self, resource: str, identity: int, given: dict) -> dict:
        old = self.find(resource, identity)
        new = {**old, **self._taken(resource, given)}
        old.update(self._checked(resource, new, old))
        return old

    def _taken(self, resource: str, given: dict) -> dict:
        fields, taken = FIELDS[resource], {}
        for name, value in given.items():
            if name not in fields:
                self.ignored.append((resource, name))
                continue
            taken[name] = fields[name].taken(name, value)
            if fields[name].kind == "key" and taken[name] is not None:
                try:
                    self.find(fields[name].limits["of"], taken[name])
                except Refused:
                    refuse(name, f'Invalid pk "{value}" - object does not exist.')
        return taken

    def _keep(self, resource: str, values: dict) -> dict:
        self.last += 1
        url = f"/api/v2/{resource}/{self.last}/"
        kept = {**values, "id": self.last, "type": TYPES[resource], "url": url, "related": {}, "summary_fields": {}}
        if resource in ("job_templates", "workflow_job_templates"):
            kept["related"]["survey_spec"] = f"{url}survey_spec/"
        if resource == "projects":
            kept.update(scm_revision="0" * 40, summary_fields={"current_update": {"id": self.last}})
        self.objects[resource][self.last] = kept
        return kept

    def _checked(self, resource: str, new: dict, old: dict | None) -> dict:
        if resource == "job_templates" and new["project"]:
            new["organization"] = self.find("projects", new["project"])["organization"]
        unique = UNIQUE.get(resource, ("organization", "name"))
        for item in self.objects[resource].values():
            if item is not old and all(item.get(field) == new.get(field) for field in unique):
                raise Refused({"__all__": [f"{TYPES[resource]} with this {' and '.join(unique)} already exists."]})
        check = getattr(self, f"_check_{resource}", None)
        if check:
            check(new, old)
        return new

    # --- what each resource is checked for

    def _check_credential_types(self, new: dict, _old: dict | None) -> None:
        ids = []
        for field in new["inputs"].get("fields", []):
            unknown = set(field) - OF_AN_INPUT
            if unknown or not re.fullmatch(r"[a-zA-Z_]\w*", field.get("id", "")) or "label" not in field:
                refuse("inputs", f"Schema validation error in {field}")
            if field.get("type", "string") not in ("string", "boolean") or field["id"] == "tower":
                refuse("inputs", f"Schema validation error in {field}")
            ids.append(field["id"])
        if set(new["inputs"]) - {"fields", "required", "dependencies"} or len(ids) != len(set(ids)):
            refuse("inputs", "Schema validation error, or a duplicate id")
        if set(new["inputs"].get("required", [])) - set(ids):
            refuse("inputs", "required names what is no field")
        if set(new["injectors"]) - {"env", "file", "extra_vars"}:
            refuse("injectors", "Additional properties are not allowed")
        for templates in new["injectors"].values():
            for name, template in templates.items():
                self._rendered("injectors", name, template, {**dict.fromkeys(ids, "x"), "tower": {"filename": "x"}})

    def _rendered(self, field: str, name: str, template: str, variables: dict) -> str:
        try:
            environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined)
            return environment.from_string(template).render(variables)
        except Exception as err:
            refuse(field, f"{name} uses an undefined field ({err})")
            raise

    def _check_credentials(self, new: dict, _old: dict | None) -> None:
        of_type = self.find("credential_types", new["credential_type"])["inputs"]["fields"]
        fields = {field["id"]: field for field in of_type}
        if not new["organization"]:
            refuse("__all__", "Missing 'user', 'team', or 'organization'.")
        for name, value in new["inputs"].items():
            if name not in fields:
                refuse("inputs", f"Additional properties are not allowed ('{name}' was unexpected)")
            if not isinstance(value, (str, bool)):
                refuse("inputs", f"{value} is not of type 'string'")
        shown = {name: ENCRYPTED if fields[name].get("secret") else value for name, value in new["inputs"].items()}
        new["inputs"] = shown

    def _check_projects(self, new: dict, _old: dict | None) -> None:
        if new["scm_type"] and not new["scm_url"]:
            refuse("scm_url", "SCM URL is required.")
        if not new["organization"]:
            refuse("organization", "Organization is missing")

    def _check_inventory_sources(self, new: dict, _old: dict | None) -> None:
        if (new["source"] == "scm") != bool(new["source_project"]):
            refuse("source_project", "Project required for scm type sources." if new["source"] == "scm"
                   else "Cannot set source_project if not SCM type.")
        if new["source"] is None:
            refuse("source", "This field is required.")

    def _check_notification_templates(self, new: dict, _old: dict | None) -> None:
        given, wrong = new["notification_configuration"], []
        for name, (kind, *default) in PARAMETERS[new["notification_type"]].items():
            if name not in given and default:
                given[name] = default[0]
            elif name not in given:
                wrong.append(f"Missing required fields for Notification Configuration: {name}.")
            elif type(given[name]) is not kind:
                wrong.append(f"Configuration field '{name}' incorrect type, expected {kind.__name__}.")
            elif kind is list and not given[name]:
                wrong.append(f"No values specified for field '{name}'")
            elif name == "http_method" and given[name].lower() not in ("put", "post"):
                wrong.append("HTTP method must be either 'POST' or 'PUT'.")
        wrong += [f"{name} is no field of it" for name in set(given) - set(PARAMETERS[new["notification_type"]])]
        events = ("started", "success", "error", "workflow_approval")
        for event, messages in (new["messages"] or {}).items():
            if event not in events:
                wrong.append(f"Event '{event}' invalid, must be one of {events}")
            for name, template in (messages or {}).items() if event != "workflow_approval" else ():
                if name not in ("message", "body"):
                    wrong.append(f"Message type '{name}' invalid, must be either 'message' or 'body'")
                elif name == "message" and "\n" in template:
                    wrong.append("Messages cannot contain newlines.")
                else:
                    rendered = self._rendered("messages", event, template, OF_A_JOB)
                    if new["notification_type"] == "webhook" and name == "body":
                        self._is_dictionary(event, rendered, wrong)
        if wrong:
            raise Refused({"notification_configuration": wrong})
        for name in SECRET:
            if given.get(name):
                given[name] = ENCRYPTED

    def _is_dictionary(self, event: str, rendered: str, wrong: list[str]) -> None:
        try:
            good = isinstance(json.loads(rendered), dict)
        except ValueError:
            good = False
        if not good:
            wrong.append(f"Webhook body for '{event}' should be a json dictionary.")

    def _check_job_templates(self, new: dict, _old: dict | None) -> None:
        if not new["project"]:
            refuse("project", "Job Templates must have a project assigned.")
        if new["playbook"] not in self.files:
            refuse("playbook", "Playbook not found for project.")
        if not new["inventory"] and not new["ask_inventory_on_launch"]:
            refuse("inventory", "Must either set a default value or ask to prompt on launch.")
        self._is_a_dictionary(new["extra_vars"])

    def _check_workflow_job_templates(self, new: dict, _old: dict | None) -> None:
        self._is_a_dictionary(new["extra_vars"])

    def _is_a_dictionary(self, extra_vars: Any) -> None:
        try:
            good = isinstance(json.loads(extra_vars or "{}"), dict)
        except ValueError:
            good = False
        if not good:
            refuse("extra_vars", "Cannot parse as JSON or YAML.")

    def _check_workflow_job_template_nodes(self, new: dict, _old: dict | None) -> None:
        self._check_prompts(new, required=False)

    def _check_schedules(self, new: dict, _old: dict | None) -> None:
        wrong = list(wrong_rules(new["rrule"]))
        if wrong:
            raise Refused({"rrule": wrong})
        self._check_prompts(new, required=True)

    def _check_prompts(self, new: dict, *, required: bool) -> None:
        """A schedule and a node may only say what their template asks for."""
        if not new["unified_job_template"]:
            return
        template = self.find("unified_job_templates", new["unified_job_template"])
        for field, question in PROMPTS.items():
            said = new[field] not in (None, "") and new[field] != template.get(field)
            if said and not template.get(f"ask_{question}_on_launch"):
                refuse(field, "Field is not configured to prompt on launch.")
        spec = self.surveys.get((template["type"] + "s", template["id"]), {}).get("spec", [])
        asked = {question["variable"]: question for question in spec if template.get("survey_enabled")}
        unasked = set(new["extra_data"]) - set(asked)
        if unasked and not template.get("ask_variables_on_launch"):
            refuse("extra_data", f"Variables {', '.join(unasked)} are not allowed on launch.")
        for variable, question in asked.items():
            answer = new["extra_data"].get(variable)
            if answer is None and required and question["required"]:
                refuse("variables_needed_to_start", f"'{variable}' value missing")
            if answer is not None and not isinstance(answer, QUESTIONS[question["type"]]):
                refuse("variables_needed_to_start", f"Value {answer} for '{variable}' is of a wrong type")
            if answer is not None and question["type"] == "multiplechoice" and answer not in question["choices"]:
                refuse("variables_needed_to_start", f"Value {answer} for '{variable}' is none of the choices")

    def survey(self, resource: str, identity: int, given: dict) -> None:
        for name, kind in (("name", str), ("description", str), ("spec", list)):
            if name not in given or not isinstance(given[name], kind):
                raise Refused({"error": f"Expected {kind.__name__} for field '{name}'."})
        if not given["spec"]:
            raise Refused({"error": "'spec' doesn't contain any items."})
        variables = [question.get("variable") for question in given["spec"]]
        for index, question in enumerate(given["spec"]):
            said = wrong_question(question, variables[:index])
            if said:
                raise Refused({"error": f"{said} in survey question {index}"})
        self.surveys[resource, identity] = given

    # --- what is attached to what

    def attach(self, resource: str, identity: int, name: str, given: dict) -> None:
        there = self.attached.setdefault((resource, identity, name), [])
        other = self.find(ATTACHED[resource][name], given["id"])
        if given.get("disassociate"):
            there.remove(other["id"])
            return
        if name == "credentials" and resource == "job_templates":
            kinds = [self.find("credentials", one)["credential_type"] for one in there]
            if other["credential_type"] in kinds:
                raise Refused({"error": "Cannot assign multiple credentials of one type."})
        if name in NEXT:
            self._check_edge(self.find(resource, identity), other)
        there.append(other["id"])

    def _check_edge(self, node: dict, follower: dict) -> None:
        if node["workflow_job_template"] != follower["workflow_job_template"]:
            raise Refused({"Error": "Nodes of different workflows."})
        reached, new = set(), {follower["id"]}
        while new:
            reached |= new
            new = {one for at in new for name in NEXT
                   for one in self.attached.get(("workflow_job_template_nodes", at, name), [])} - reached
        if node["id"] in reached:
            raise Refused({"Error": "Cycle detected."})

    def names(self, resource: str, name: str, attached: str) -> list[str]:
        """Return the names of what is attached to the object with this name."""
        found = self.attached.get((resource, self.one(resource, name)["id"], attached), [])
        others = [self.find(ATTACHED[resource][attached], one) for one in found]
        return [one.get("name", one.get("identifier")) for one in others]

    # --- requests

    def answer(self, method: str, path: str, query: dict[str, str], body: dict) -> tuple[int, Any]:
        parts = path.removeprefix("/api/v2/").strip("/").split("/")
        resource, identity = parts[0], int(parts[1]) if len(parts) > 1 else 0
        sub = parts[2] if len(parts) > 2 else ""
        if method != "GET":
            self.writes.append(f"{method} {path} {json.dumps(body)}")
        if resource == "project_updates" and method == "GET":
            return 200, {"id": identity, "status": "successful"}
        if resource not in FIELDS and resource != "unified_job_templates":
            raise Refused({"detail": "Not found."}, 404)
        if not identity:
            return self._of_list(method, resource, query, body)
        item = self.find(resource, identity)
        if sub == "survey_spec":
            if method == "POST":
                self.survey(resource, identity, body)
            return 200, self.surveys.get((resource, identity), {})
        if sub == "create_approval_template" and method == "POST":
            approval = self.add("workflow_approval_templates", body)
            item.update(unified_job_template=approval["id"])
            item["related"]["unified_job_template"] = approval["url"]
            return 201, approval
        if sub in ATTACHED.get(resource, {}):
            return self._of_attached(method, resource, identity, sub, body)
        if sub or method not in ("GET", "PATCH"):
            raise Refused({"detail": f'Method "{method}" not allowed.'}, 405)
        return 200, self.change(resource, identity, body) if method == "PATCH" else item

    def _of_list(self, method: str, resource: str, query: dict[str, str], body: dict) -> tuple[int, Any]:
        if method == "POST" and resource in FIELDS and resource != "workflow_approval_templates":
            return 201, self.add(resource, body)
        if method != "GET":
            raise Refused({"detail": f'Method "{method}" not allowed.'}, 405)
        return 200, page(self.listed(resource, query))

    def _of_attached(self, method: str, resource: str, identity: int, sub: str, body: dict) -> tuple[int, Any]:
        if method == "POST":
            self.attach(resource, identity, sub, body)
            return 204, None
        found = self.attached.get((resource, identity, sub), [])
        return 200, page([self.find(ATTACHED[resource][sub], one) for one in found])


def page(results: list[dict]) -> dict:
    return {"count": len(results), "next": None, "previous": None, "results": results}


def wrong_question(question: dict, before: list) -> str:
    """Return what AWX has against a question of a survey, "" where it has nothing."""
    for name in ("type", "question_name", "variable", "required"):
        if name not in question:
            return f"'{name}' missing"
        if not isinstance(question[name], bool if name == "required" else str):
            return f"'{name}' of a wrong type"
    kind, default = question["type"], question.get("default", "")
    if question["variable"] in before:
        return f"'variable' '{question['variable']}' duplicated"
    if kind not in QUESTIONS:
        return f"'{kind}' is not one of the allowed question types"
    if default != "" and not isinstance(default, QUESTIONS[kind]):
        return f"Default value {default} expected to be a {QUESTIONS[kind].__name__}"
    for name in ("min", "max"):
        if question.get(name) is not None and not isinstance(question[name], int):
            return f"The {name} limit expected to be integer"
    if kind in ("multiplechoice", "multiselect"):
        choices = question.get("choices")
        if not choices or not isinstance(choices, (list, str)):
            return f"a question of type {kind} must specify choices"
        choices = choices if isinstance(choices, list) else choices.splitlines()
        if set(default.splitlines()) - set(choices):
            return "Default choice must be answered from the choices listed"
    unknown = set(question) - OF_A_QUESTION
    return f"unknown {unknown}" if unknown else ""


def wrong_rules(rrule: str) -> Iterator[str]:
    """Yield what AWX has against a recurrence."""
    starts = re.findall(r"DTSTART(?:;[^:]+)?:[0-9]+T[0-9]+Z?", rrule)
    rules = re.findall(r"RULE:[^\s]*", rrule)
    if not starts:
        yield "Valid DTSTART required in rrule. Value should start with: DTSTART:YYYYMMDDTHHMMSSZ"
    if len(starts) > 1:
        yield "Multiple DTSTART is not supported."
    if re.search(r"DTSTART:[0-9]+T[0-9]+ ", rrule):
        yield "DTSTART cannot be a naive datetime."
    if not rules:
        yield "One or more rule required in rrule."
    if re.search(r"(?i)exdate:|rdate:", rrule):
        yield "EXDATE and RDATE not allowed in rrule."
    for rule in rules:
        if "INTERVAL=" not in rule or re.search(r"INTERVAL=(0|\D|$)", rule):
            yield f"INTERVAL required in rrule: {rule}"
        if not re.search(r"FREQ=(MINUTELY|HOURLY|DAILY|WEEKLY|MONTHLY|YEARLY)\b", rule):
            yield f"rrule parsing failed validation, or SECONDLY is not supported: {rule}"
        if re.search(r"BYDAY=[0-9]+[A-Z]{2}", rule):
            yield f"BYDAY with numeric prefix not supported: {rule}"
        if "COUNT=" in rule and "UNTIL=" in rule:
            yield f"RRULE may not contain both COUNT and UNTIL: {rule}"
        count = re.search(r"COUNT=([0-9]+)", rule)
        if count and int(count[1]) > 999:
            yield f"COUNT > 999 is unsupported: {rule}"


@contextlib.contextmanager
def serving(controller: Controller) -> Iterator[str]:
    """Serve it on the loopback; yield its URL."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def _any(self) -> None:
            asked = urlsplit(self.path)
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
            try:
                if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    raise Refused({"detail": "Authentication credentials were not provided."}, 401)
                with lock:
                    status, said = controller.answer(self.command, asked.path, dict(parse_qsl(asked.query)), body)
                    content = b"" if said is None else json.dumps(said).encode()
            except Refused as err:
                status, content = err.status, json.dumps(err.answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.send_header("X-API-Product-Name", "AWX")
            self.send_header("X-API-Product-Version", "24.6.1")
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PATCH = do_DELETE = _any

        def log_message(self, *_arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
