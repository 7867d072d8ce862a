# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What we ask of containerd, over the API on its socket (services v1: containerd 1.6, 1.7 and 2.x).

Not by `ctr`: it prints neither labels nor times without one call for each object, and is not a stable interface.
The tables hold only the fields that are used; their numbers are those of containerd's .proto files.
"""

from __future__ import annotations

import calendar
import json
import os
import re
import signal
import time

from . import grpc
from . import resource as r
from .grpc import CallError, FailedPrecondition, NotFound
from .probe import Absent, ProbeError
from .protobuf import INT, LABELS, TEXT, ProtobufError, decode, encode

__all__ = ["CallError", "FailedPrecondition", "NotFound"]  # what kinds catch, beside what is below

ADDRESS = "/run/containerd/containerd.sock"
RULE = {
    "namespace": {"type": "str", "required": True},
    "name": {"type": "str"},
    "label": {"type": "str"},
    "address": {"type": "str", "default": ADDRESS},
}
SNAPSHOTTERS = "io.containerd.snapshotter.v1"
GC_ROOT = "containerd.io/gc.root"
GC_REFERENCE = "containerd.io/gc.ref.snapshot."
GC_BACK_REFERENCE = "containerd.io/gc.bref."
GC_EXPIRE = "containerd.io/gc.expire"
# A lease counts as over when it has been for so long: the clock that it was made by may have been another one.
EXPIRED_SECONDS = 60
IDENTIFIER = re.compile(r"[A-Za-z0-9]+(?:[._-][A-Za-z0-9]+)*")
_TIME = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.\d+)?(?:Z|([+-])(\d\d):(\d\d))", re.ASCII)
CALL_SECONDS = 20.0
MAX_OBJECTS = 1 << 20

CREATED, RUNNING, STOPPED, PAUSED, PAUSING = 1, 2, 3, 4, 5
SNAPSHOT_KINDS = {1: "view", 2: "active", 3: "committed"}

TIME = {1: ("seconds", INT), 2: ("nanos", INT)}
SPEC = {2: ("value", TEXT)}
CONTAINER = {
    1: ("id", TEXT),
    2: ("labels", LABELS),
    3: ("image", TEXT),
    5: ("spec", SPEC),
    6: ("snapshotter", TEXT),
    7: ("snapshot_key", TEXT),
    8: ("created_at", TIME),
}
PROCESS = {
    1: ("container_id", TEXT),
    2: ("id", TEXT),
    3: ("pid", INT),
    4: ("status", INT),
    9: ("exit_status", INT),
    10: ("exited_at", TIME),
}
SNAPSHOT = {
    1: ("name", TEXT),
    2: ("parent", TEXT),
    3: ("kind", INT),
    4: ("created_at", TIME),
    6: ("labels", LABELS),
}
MOUNT = {1: ("type", TEXT), 2: ("source", TEXT), 4: ("options", [TEXT])}
NAMESPACE = {1: ("name", TEXT)}
STATUS = {1: ("code", INT), 2: ("message", TEXT)}
PLUGIN = {1: ("type", TEXT), 2: ("id", TEXT), 7: ("init_err", STATUS)}
LEASE = {1: ("id", TEXT), 3: ("labels", LABELS)}
LEASED = {1: ("id", TEXT), 2: ("type", TEXT)}
IMAGE = {1: ("name", TEXT), 2: ("labels", LABELS)}
BLOB = {1: ("digest", TEXT), 5: ("labels", LABELS)}

NOTHING = {}
ID = {1: ("id", TEXT)}
CONTAINER_ID = {1: ("container_id", TEXT)}
KEY = {1: ("snapshotter", TEXT), 2: ("key", TEXT)}
# The calls: what is asked with, and what each message of the answer holds.
CALLS = {
    "namespaces.v1.Namespaces/List": (NOTHING, {1: ("namespaces", [NAMESPACE])}),
    "introspection.v1.Introspection/Plugins": (NOTHING, {1: ("plugins", [PLUGIN])}),
    "containers.v1.Containers/Get": (ID, {1: ("container", CONTAINER)}),
    "containers.v1.Containers/ListStream": (NOTHING, {1: ("container", CONTAINER)}),
    "containers.v1.Containers/Delete": (ID, NOTHING),
    "tasks.v1.Tasks/Get": (CONTAINER_ID, {1: ("process", PROCESS)}),
    "tasks.v1.Tasks/List": (NOTHING, {1: ("tasks", [PROCESS])}),
    "tasks.v1.Tasks/Kill": ({1: ("container_id", TEXT), 3: ("signal", INT), 4: ("all", INT)}, NOTHING),
    "tasks.v1.Tasks/Pause": (CONTAINER_ID, NOTHING),
    "tasks.v1.Tasks/Resume": (CONTAINER_ID, NOTHING),
    "tasks.v1.Tasks/Delete": (CONTAINER_ID, NOTHING),
    "snapshots.v1.Snapshots/Stat": (KEY, {1: ("info", SNAPSHOT)}),
    "snapshots.v1.Snapshots/List": ({1: ("snapshotter", TEXT)}, {1: ("info", [SNAPSHOT])}),
    "snapshots.v1.Snapshots/Mounts": (KEY, {1: ("mounts", [MOUNT])}),
    "snapshots.v1.Snapshots/Usage": (KEY, {1: ("size", INT)}),
    "snapshots.v1.Snapshots/Remove": (KEY, NOTHING),
    "leases.v1.Leases/List": (NOTHING, {1: ("leases", [LEASE])}),
    "leases.v1.Leases/Create": ({1: ("id", TEXT), 3: ("labels", LABELS)}, {1: ("lease", LEASE)}),
    "leases.v1.Leases/Delete": ({1: ("id", TEXT), 2: ("sync", INT)}, NOTHING),
    "leases.v1.Leases/ListResources": (ID, {1: ("resources", [LEASED])}),
    "images.v1.Images/List": (NOTHING, {1: ("images", [IMAGE])}),
    "content.v1.Content/List": (NOTHING, {1: ("info", [BLOB])}),
}

_connections = {}


class Client:
    """containerd at one address, as seen from one namespace. A namespace that does not exist is an empty one."""

    def __init__(self, address, namespace, host):
        self.address = address
        self.namespace = namespace
        self.host = host

    def namespaces(self):
        """Return the names of all namespaces of this daemon."""
        return [one["name"] for one in self._call("namespaces.v1.Namespaces/List")["namespaces"]]

    def has_snapshotter(self, snapshotter):
        """Tell whether the daemon has that snapshotter, and could load it."""
        plugins = self._call("introspection.v1.Introspection/Plugins")["plugins"]
        wanted = (SNAPSHOTTERS, snapshotter)
        return any((one["type"], one["id"]) == wanted and one["init_err"] is None for one in plugins)

    def containers(self):
        return [answer["container"] for answer in self._stream("containers.v1.Containers/ListStream")]

    def container(self, name, timeout=CALL_SECONDS):
        return self._call("containers.v1.Containers/Get", timeout, id=name)["container"]

    def delete_container(self, name):
        self._call("containers.v1.Containers/Delete", id=name)

    def tasks(self):
        """Return ``{container id: task}``. A task whose shim does not answer is among them, its status unknown."""
        tasks = self._call("tasks.v1.Tasks/List")["tasks"]
        return {task["container_id"] or task["id"]: task for task in tasks}

    def task(self, name):
        """Return the task of a container, None when it has none."""
        try:
            return self._call("tasks.v1.Tasks/Get", container_id=name)["process"]
        except NotFound:
            return None

    def kill_task(self, name):
        self._call("tasks.v1.Tasks/Kill", container_id=name, signal=signal.SIGKILL, all=True)

    def pause_task(self, name):
        self._call("tasks.v1.Tasks/Pause", container_id=name)

    def resume_task(self, name):
        self._call("tasks.v1.Tasks/Resume", container_id=name)

    def delete_task(self, name):
        self._call("tasks.v1.Tasks/Delete", container_id=name)

    def snapshots(self, snapshotter):
        return self._all("snapshots.v1.Snapshots/List", "info", snapshotter=snapshotter)

    def snapshot(self, snapshotter, key):
        return self._call("snapshots.v1.Snapshots/Stat", snapshotter=snapshotter, key=key)["info"]

    def snapshot_mounts(self, snapshotter, key):
        """Return how an active snapshot is to be mounted; containerd does not tell whether it is."""
        return self._call("snapshots.v1.Snapshots/Mounts", snapshotter=snapshotter, key=key)["mounts"]

    def snapshot_usage(self, snapshotter, key, timeout):
        return self._call("snapshots.v1.Snapshots/Usage", timeout, snapshotter=snapshotter, key=key)["size"]

    def remove_snapshot(self, snapshotter, key):
        self._call("snapshots.v1.Snapshots/Remove", snapshotter=snapshotter, key=key)

    def leased_snapshots(self, snapshotter):
        """Return ``[(lease, snapshot key, whether the lease has expired)]`` of all leases."""
        found = []
        for lease in self._call("leases.v1.Leases/List")["leases"]:
            try:
                leased = self._call("leases.v1.Leases/ListResources", id=lease["id"])["resources"]
            except NotFound:
                continue  # ended meanwhile
            is_over = has_expired(lease["labels"].get(GC_EXPIRE), time.time())
            found += [(lease["id"], one["id"], is_over) for one in leased if one["type"] == "snapshots/" + snapshotter]
        return found

    def images(self):
        return self._call("images.v1.Images/List")["images"]

    def blobs(self):
        return self._all("content.v1.Content/List", "info")

    def collect_garbage(self):
        """Let containerd collect what nothing refers to, as it does after a lease ended, and wait until it has.

        It does not do so by itself when a lease expires, only after the next thing that is deleted.
        """
        name = "microvm.reaper-%d-%d" % (os.getpid(), time.time_ns())
        until = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 600))  # should we not live to end it
        self._call("leases.v1.Leases/Create", id=name, labels={GC_EXPIRE: until})
        self._call("leases.v1.Leases/Delete", id=name, sync=True)

    def _all(self, call, field, **request):
        return [one for answer in self._stream(call, **request) for one in answer[field]]

    def _call(self, call, timeout=CALL_SECONDS, **request):
        answers = list(self._stream(call, timeout, **request))
        if len(answers) != 1:
            raise ProbeError("%s: %s: %d answers" % (self.address, call, len(answers)))
        return answers[0]

    def _stream(self, call, timeout=CALL_SECONDS, **request):
        """Yield the answers, each with all messages that its table says it has."""
        timeout = min(timeout, self.host.remaining())
        ask, tell = CALLS[call]
        metadata = [("containerd-namespace", self.namespace)]
        connection, objects = _connection(self.address, timeout), 0
        for data in connection.call("containerd.services." + call, encode(ask, request), timeout, metadata):
            try:
                answer = decode(tell, data)
            except ProtobufError as err:
                raise ProbeError("%s: %s: %s" % (self.address, call, err)) from err
            if None in answer.values():
                raise ProbeError("%s: %s: an empty answer" % (self.address, call))
            objects += sum([len(one) for one in answer.values() if isinstance(one, list)], 1)
            if objects > MAX_OBJECTS:
                raise ProbeError("%s: %s: more than %d objects" % (self.address, call, MAX_OBJECTS))
            yield answer


def clients(kind, rules, host):
    """Return a Client for every address and namespace that the rules name. Raises Absent where no address exists."""
    check(kind, rules)
    addresses = {_address(rule) for rule in rules}
    there = {address for address in addresses if _exists(address)}
    if addresses and not there:
        raise Absent("no containerd here: there is no %s" % ", ".join(sorted(addresses)))
    wanted = {(_address(rule), rule["namespace"]) for rule in rules if _address(rule) in there}
    return [Client(address, namespace, host) for address, namespace in sorted(wanted)]


def all_clients(address, host):
    """Return a Client for every namespace of the daemon at that address, none where there is no daemon."""
    if not _exists(address):
        return []
    return [Client(address, namespace, host) for namespace in sorted(Client(address, "default", host).namespaces())]


def client_for(kind, token, rules, host):
    """Return the Client for what the token names, None where no rule looks there.

    Of two daemons that have the same namespace, the token's details say which one is meant.
    """
    check(kind, rules)
    namespace = token["name"].partition("/")[0]
    wanted = (token.get("details") or {}).get("address")
    for rule in rules:
        if rule["namespace"] == namespace and wanted in (None, _address(rule)):
            return Client(_address(rule), namespace, host)
    return None


def check(kind, rules):
    """Raise RuleError for names and addresses that cannot be ones of containerd."""
    for rule in rules:
        for key in ("namespace", "snapshotter"):
            if key in rule and not IDENTIFIER.fullmatch(rule[key]):
                raise r.RuleError("%s rule: '%s' is not a name in containerd: %r" % (kind, key, rule[key]))
        if not _address(rule).startswith("/"):
            raise r.RuleError("%s rule: 'address' is not the path of a socket: %r" % (kind, _address(rule)))


def looks_at(rule, client):
    """Tell whether the rule is for the client's address and namespace."""
    return rule["namespace"] == client.namespace and _address(rule) == client.address


def stamp(created):
    """Return the time of creation as text, to the nanosecond: with the name it makes an identity."""
    return "%d.%09d" % (created["seconds"], created["nanos"]) if created else "unknown"


def has_expired(until, now):
    """Tell whether the time of a label containerd.io/gc.expire went by a minute ago. One that is no time never does."""
    matched = _TIME.fullmatch(until or "")
    if not matched:
        return False
    try:
        seconds = calendar.timegm(time.strptime(matched.group(1), "%Y-%m-%dT%H:%M:%S"))
    except ValueError:
        return False
    if matched.group(2):
        ahead = 60 * int(matched.group(3)) + int(matched.group(4))
        seconds -= 60 * (ahead if matched.group(2) == "+" else -ahead)
    return now - seconds > EXPIRED_SECONDS


def age(created):
    """Return the age in seconds, None when it cannot be told."""
    seconds = time.time() - created["seconds"] if created and created["seconds"] > 0 else -1
    return round(seconds, 1) if seconds >= 0 else None


def as_text(answer):
    """Return an answer for people to read; half characters, which stand for bytes that are no UTF-8, are escaped."""
    return json.dumps(answer, indent=1, sort_keys=True) + "\n"


def printable(text):
    """Return text that can travel: a snapshot's key may be any bytes."""
    return text if r.is_text(text) else ascii(text)[: r.MAX_NAME]


def _connection(address, timeout):
    """Return the open connection to that address, or a new one. A fork does not share its parent's."""
    owner, connection = _connections.pop(address, (None, None))
    if connection is not None and owner != os.getpid():
        connection.forget()
    if connection is None or not connection.is_usable():
        connection = grpc.Connection(address, timeout)
    _connections[address] = os.getpid(), connection
    return connection


def _exists(address):
    """Tell whether there is, or has been since boot, a daemon at that address: one that stops takes its socket away
    but not the directory, and its containers are still there."""
    return os.path.lexists(address) or os.path.isdir(os.path.dirname(address))


def _address(rule):
    return rule.get("address") or ADDRESS
