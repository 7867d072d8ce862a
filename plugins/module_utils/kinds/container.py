# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Containers of containerd, with their tasks. One resource is one container record, named namespace/id.

Its identity is the time of its creation, which containerd keeps to the nanosecond. A container is in use while it has a
task that is not stopped: a paused task, or one that does not tell, may run. Its snapshot is a resource of its own; one
that nothing else refers to and no label pins is collected by containerd itself as soon as the container is gone.
"""

from __future__ import annotations

import contextlib
import time

from .. import blame, containerd
from .. import resource as r
from ..probe import ProbeError

KIND = "container"
STOPS = True
SETS_ASIDE = "running"
TAKES = ("snapshot",)
DEPENDS_ON = ()
RULE = containerd.RULE

STOP_SECONDS = 5.0
PAUSES = (containerd.PAUSED, containerd.PAUSING)


def collect(rules, host):
    """Return all containers whose id or label is that of a VM, in the namespaces that the rules name."""
    names = r.Names(KIND, rules)
    found, foreign = [], 0
    for client in containerd.clients(KIND, rules, host):
        containers = client.containers()
        tasks = client.tasks()  # after the containers: one that is started meanwhile is seen as running
        for container in containers:
            vm_id = _vm_id(names, client, container)
            if vm_id is None:
                foreign += 1
            else:
                found.append(_describe(client, container, tasks.get(container["id"]), vm_id))
    return {"resources": found, "foreign": foreign}


def inspect(token, rules, host):
    """Return None when this very container is still there, ours and (unless it is to be stopped first) not running."""
    client = containerd.client_for(KIND, token, rules, host)
    if client is None:
        return r.outcome(token, r.FAILED, "no rule looks into this namespace")
    try:
        container = client.container(_id(token))
    except containerd.NotFound:
        return r.outcome(token, r.ALREADY_GONE)
    if _identity(client, container) != token["identity"]:
        return r.outcome(token, r.IDENTITY_CHANGED, "another container of the same id is there now")
    if _vm_id(r.Names(KIND, rules), client, container) != token["vm_id"]:
        return r.outcome(token, r.FAILED, "by the rules it is not a container of this VM")
    if containerd.GC_ROOT in container["labels"]:
        return r.outcome(token, r.DEFERRED, "pinned", holders=_holders(container))
    task = client.task(container["id"])
    if not token.get("stop") and _runs(task):
        return r.outcome(token, r.DEFERRED, "running", holders=_processes(task))
    return None


def stop(token, rules, host):
    """Kill all processes of the task, wait up to five seconds until it has stopped, and delete the task."""
    refused = inspect(dict(token, stop=True), rules, host)
    if refused is not None:
        return None if refused["outcome"] == r.ALREADY_GONE else refused
    client = containerd.client_for(KIND, token, rules, host)
    task = client.task(_id(token))
    if _runs(task):
        task = _kill(client, _id(token))
        if _runs(task):
            return r.outcome(token, r.DEFERRED, "does not die of SIGKILL", holders=_processes(task))
    _delete_task(client, task, _id(token))
    return None


def prepare(tokens, rules, host):
    """Return for those that are to be set aside whether their tasks are paused already."""
    found = {}
    for token in tokens:
        client = containerd.client_for(KIND, token, rules, host) if token.get("step") == r.ASIDE else None
        task = client.task(_id(token)) if client else None
        if task is not None:
            found[token["name"]] = {"paused": task["status"] in PAUSES}
    return found


def set_aside(token, rules, host):
    """Pause the task of a container: nothing is lost, and nothing goes on."""
    refused = inspect(dict(token, stop=True), rules, host)
    if refused is not None:
        return refused
    client = containerd.client_for(KIND, token, rules, host)
    task = client.task(_id(token))
    aside = dict(r.outcome(token, r.SET_ASIDE), in_sight=True)
    if not _runs(task) or task["status"] in PAUSES:
        return aside
    try:
        client.pause_task(_id(token))
    except containerd.CallError as err:
        why = "cannot be paused (%s): left as it is until reap_hold is over" % err
        return dict(r.outcome(token, r.DEFERRED, why), waits=True)
    return aside


def bring_back(token, rules, host):
    """Let the task of a container go on, unless it was paused before."""
    refused = inspect(dict(token, stop=True), rules, host)
    if refused is not None:
        return refused
    client = containerd.client_for(KIND, token, rules, host)
    task = client.task(_id(token))
    if task is not None and task["status"] in PAUSES and not token["details"].get("paused"):
        client.resume_task(_id(token))
    return r.outcome(token, r.RESTORED)


def remove(token, rules, host):
    """Remove the record of a container that does not run, and what is left of its task. Not its snapshot."""
    refused = inspect(dict(token, stop=False), rules, host)
    if refused is not None:
        return refused
    client = containerd.client_for(KIND, token, rules, host)
    try:
        _delete_task(client, client.task(_id(token)), _id(token))
        client.delete_container(_id(token))
    except containerd.FailedPrecondition as err:
        return r.outcome(token, r.DEFERRED, str(err), holders=_processes(client.task(_id(token))))
    except containerd.NotFound:
        pass
    try:
        client.container(_id(token))
    except containerd.NotFound:
        return r.outcome(token, r.REAPED)
    return r.outcome(token, r.FAILED, "containerd says it was deleted, and still has it")


def witness(token, rules, host):
    """Return the record of the container and its task."""
    client = containerd.client_for(KIND, token, rules, host)
    if client is None:
        raise ProbeError("no rule looks into this namespace")
    container = client.container(_id(token))
    if _identity(client, container) != token["identity"]:
        raise ProbeError("another container of the same id is there now")
    source = "containerd %s, Containers/Get and Tasks/Get of %s" % (client.address, token["name"])
    told = {"container": container, "task": client.task(container["id"])}
    return [{"title": KIND, "source": source, "text": containerd.as_text(told)}]


def _describe(client, container, task, vm_id):
    details = {
        "namespace": client.namespace,
        "id": container["id"],
        "address": client.address,
        "snapshotter": containerd.printable(container["snapshotter"]),
        "snapshot_key": containerd.printable(container["snapshot_key"]),
    }
    if task is not None and task["pid"]:
        details["pid"] = task["pid"]
    return r.resource(
        KIND,
        "%s/%s" % (client.namespace, container["id"]),
        vm_id,
        _identity(client, container),
        in_use=_runs(task),
        holders=_holders(container),
        age_seconds=containerd.age(container["created_at"]),
        details=details,
    )


def _vm_id(names, client, container):
    return names.match(container["id"], container["labels"], lambda rule: containerd.looks_at(rule, client))[0]


def _identity(client, container):
    return "%s/%s/%s" % (client.namespace, container["id"], containerd.stamp(container["created_at"]))


def _holders(container):
    pinned = containerd.GC_ROOT in container["labels"]
    return [r.holder("label", containerd.GC_ROOT)] if pinned else []


def _id(token):
    return token["name"].partition("/")[2]


def _runs(task):
    return task is not None and task["status"] != containerd.STOPPED


def _processes(task):
    return [] if task is None else [blame.task(task["pid"], task["container_id"] or task["id"])]


def _kill(client, name):
    """Kill the task; return it as it is when it has stopped or the time is over, None when it is gone."""
    deadline = time.monotonic() + STOP_SECONDS
    with contextlib.suppress(containerd.NotFound):  # ended by itself meanwhile
        client.kill_task(name)
    while True:
        task = client.task(name)
        if not _runs(task) or time.monotonic() > deadline:
            return task
        if task["status"] in PAUSES:
            # Frozen processes do not die; some versions of runc thaw them for the kill themselves.
            with contextlib.suppress(containerd.CallError):
                client.resume_task(name)
        time.sleep(0.02)


def _delete_task(client, task, name):
    if task is not None:
        with contextlib.suppress(containerd.NotFound):
            client.delete_task(name)
