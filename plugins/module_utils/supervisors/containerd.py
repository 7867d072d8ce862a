# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Tasks of containerd: a VM lives while a task of its container has not stopped.

A task that is paused, or does not tell, may run.
"""

from __future__ import annotations

from .. import containerd
from .. import resource as r

TYPE = "containerd"
OPTIONS = {
    "namespaces": {"type": "list", "elements": "str", "required": True},
    "name": {"type": "str"},
    "label": {"type": "str"},
    "address": {"type": "str", "default": containerd.ADDRESS},
}

WHOLE_NAME = "(?P<vm_id>.*)"
STATES = {
    containerd.CREATED: "is created",
    containerd.RUNNING: "runs",
    containerd.PAUSED: "is paused",
    containerd.PAUSING: "is being paused",
}


def check(options):
    """Raise RuleError for patterns, namespaces and addresses that are none."""
    rules = _rules(options)
    if not rules:
        raise r.RuleError("namespaces is empty: nothing would be looked at")
    r.Names(TYPE, rules)
    containerd.check(TYPE, rules)


def alive(options, host):
    """Return the VMs with a task that has not stopped, in the namespaces."""
    rules, found = _rules(options), {}
    names = r.Names(TYPE, rules[:1])  # they differ in the namespace, and each client looks into one
    for client in containerd.clients(TYPE, rules, host):
        tasks = client.tasks()
        # After the tasks: a container that has one was there before it.
        labels = {one["id"]: one["labels"] for one in client.containers()} if options.get("label") else {}
        for name, task in tasks.items():
            vm_id = names.match(name, labels.get(name))[0]
            if vm_id is not None and task["status"] != containerd.STOPPED:
                found[vm_id] = _why(client, name, task)
    return found


def _why(client, name, task):
    state = STATES.get(task["status"], "does not say whether it runs")
    return "the task %s/%s of containerd %s (process %d)" % (client.namespace, name, state, task["pid"])


def _rules(options):
    name = options.get("name")
    if not name and not options.get("label"):
        name = WHOLE_NAME
    place = {"name": name, "label": options.get("label"), "address": options.get("address")}
    return [dict(place, namespace=namespace) for namespace in options["namespaces"]]
