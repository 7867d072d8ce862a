# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The controller's side of microvm.reaper.report."""

from __future__ import annotations

import json
import os

from ansible import constants as C
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display
from ansible_collections.microvm.reaper.plugins.plugin_utils import batches, report
from ansible_collections.microvm.reaper.plugins.plugin_utils.facts import FactsError, unpacked

# The steps that run once for a batch and may stop it, in their order.
MAY_STOP = ("opened", "manifest", "saved", "brake", "sealed")
# What a scheduler calls it; does not begin with reap_, for AWX gives it to the next job of a workflow as a variable.
ARTIFACT = "microvm_reaper"


class ActionModule(ActionBase):
    """Print what came of the sweep on all hosts of the batch, write it as JSON, and leave its counts as a statistic."""

    TRANSFERS_FILES = False
    _requires_connection = False

    def run(self, tmp=None, task_vars=None):
        """Report once for the whole batch."""
        result = super().run(tmp, task_vars)
        _validation, arguments = self.validate_argument_spec(
            {
                "realm": {"type": "str", "required": True},
                "hosts": {"type": "list", "elements": "str", "required": True},
                "variables": {"type": "dict", "required": True},
                "sweep": {"type": "str", "default": ""},
                "path": {"type": "path", "default": ""},
            }
        )
        names = arguments["variables"]
        known = {host: task_vars["hostvars"].raw_get(host) for host in arguments["hosts"]}
        hosts = {host: _host(variables, names) for host, variables in known.items()}
        once = {step: _once(known.values(), names.get(step)) for step in (*MAY_STOP, "published")}
        manifest = once["manifest"].get("manifest")
        abort = _abort(once)
        how = {
            "sealed": once["sealed"].get("sealed"),
            "opened": once["opened"].get("opened"),
            "check_mode": self._task.check_mode,
            "abort": abort,
            "sweep": arguments["sweep"],
            "unpublished": once["published"].get("error"),
        }
        text = report.text(arguments["realm"], manifest, hosts, **how)
        Display().display(text)
        document = report.as_json(arguments["realm"], manifest, hosts, **how)
        result.update(changed=False, report=text, totals=document["kinds"])
        with batches.memory("artifact") as counts:
            counts.update(report.artifact(arguments["realm"], hosts, before=dict(counts), **how))
        result["ansible_stats"] = {"data": {ARTIFACT: counts}, "per_host": False, "aggregate": False}
        if arguments["path"]:
            _write(arguments["path"], document)
        return result


def _host(variables, names):
    """Return the HOST (see report.py) that the registered results of one host amount to."""
    plan = variables.get(names["plan"])
    done = variables.get(names.get("result")) or {}
    brake = variables.get(names["brake"]) or {}
    gathered = (variables.get(names["gathered"]) or {}).get("ansible_facts", {}).get("vm_resources")
    refused = (brake.get("refused") or {}).get(variables["inventory_hostname"]) or (plan or {}).get("refused")
    unread = _unread(gathered)
    # What is only planned has no result.
    only_planned = plan and not refused and not names.get("result")
    return {
        "plan": plan,
        "outcomes": report.foreseen(plan) if only_planned else done.get("outcomes") or [],
        "busy": done.get("busy"),
        "evidence": done.get("evidence"),
        "error": done.get("msg") if done.get("failed") and not done.get("outcomes") and not refused else None,
        "refused": refused,
        "absent": unread.get("absent", {}),
        "unavailable": unread.get("unavailable", {}),
    }


def _unread(gathered):
    found = {}
    try:
        facts = unpacked(gathered) if gathered else {"kinds": {}}
    except FactsError:
        return found
    supervisors = {"supervisor %s" % name: entry for name, entry in facts.get("supervisors", {}).items()}
    for name, entry in dict(facts["kinds"], **supervisors).items():
        if entry["status"] != "ok":
            found.setdefault(entry["status"], {})[name] = entry["reason"]
    return found


def _once(hosts, name):
    """Return what a step that ran once registered: all hosts have it, but for those that could not be reached then."""
    return next((variables[name] for variables in hosts if variables.get(name)), {})


def _abort(once):
    """Return why the whole batch was stopped, None when it was not."""
    for done in (once[step] for step in MAY_STOP):
        if done.get("failed"):
            return done.get("abort") or {"code": done.get("code", "failed"), "message": done.get("msg", "")}
    return None


def _write(path, document):
    """Write the report; the batches of one run (``serial``) share a file, a new run begins it anew."""
    run = os.path.basename(C.DEFAULT_LOCAL_TMP)  # type: ignore[attr-defined]
    try:
        with open(path, encoding="utf-8") as stream:
            before = json.load(stream)
    except (OSError, ValueError):
        before = None
    if isinstance(before, dict) and before.get("run") == run:
        for key in ("hosts", "kinds"):
            document[key] = dict(before[key], **document[key])
        for key in ("stopped", "unpublished"):
            document[key] = document[key] or before.get(key)
    temporary = "%s.new" % path
    with open(temporary, "w", encoding="utf-8") as stream:
        json.dump(dict(document, run=run), stream, indent=1, sort_keys=True)
        stream.write("\n")
    os.replace(temporary, path)
