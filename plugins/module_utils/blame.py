# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Who keeps something busy: HOLDERs that say of a process which unit and container it is of, and by what it holds.

A HOLDER of type process has beside its sentence, ``name``, the parts of it: ``{pid, command, unit, container,
mount_namespace, by, fd}``. ``mount_namespace`` is the number of another one than ours, ``by`` are words like ``cwd``,
``root``, ``exe``, ``map`` and ``fd 12``, ``fd`` is the first descriptor. What is not known is None.

Looked at only where an act was refused. Nothing here asks a process for its memory, which can hang who asks, but
shim(), which does so in a child.
"""

from __future__ import annotations

import contextlib
import os
import re

from . import containerd, processes
from . import resource as r
from .probe import ProbeError, Worker

MAX_BY = 20
MAX_BY_SHOWN = 3
SHORT = 12
SHIM_SECONDS = 1.0
IMAGE_SECONDS = 2.0
MAX_IMAGE = 255

# docker-ID.scope, libpod-ID.scope, crio-ID.scope, cri-containerd-ID.scope, nerdctl-ID.scope, and the bare ID that
# docker and the kubelet give a cgroup without systemd.
_CONTAINER = re.compile(r"(?:([a-z][a-z0-9_-]*)[-_])?([0-9a-f]{64})(?:\.scope)?")
# In which namespace containerd has what was named so; the others are not containerd's.
_NAMESPACES = {"cri-containerd": "k8s.io", "docker": "moby", "nerdctl": "default"}
# containerd's own clients call the cgroup of a container /NAMESPACE/ID.
_OF_CONTAINERD = ("default", "k8s.io", "moby")
_SHIM = "containerd-shim"

# Why containerd could not be asked: it is not asked again.
_silent = []


def process(pid, by=(), *, container=None, image=None):
    """Return the HOLDER that names a process and, for one that no signal reaches, where it is stuck. None: gone.

    ``container`` and ``image`` are told where /proc alone does not tell them.
    """
    found = processes.stat(pid)
    if found is None:
        return None
    cgroup = _text(pid, "cgroup")
    parts = {
        "pid": pid,
        "command": processes.printable(found.command),
        "unit": processes.unit(cgroup),
        "container": container or container_of(cgroup)[0],
        "mount_namespace": _other_mount_namespace(pid),
        "by": sorted(by, key=_by_kind)[:MAX_BY],
        "fd": next((int(one[3:]) for one in sorted(by, key=_by_kind) if one.startswith("fd ")), None),
    }
    stuck = None
    if found.state == "D":
        stuck = "unkillable: %s" % (_text(pid, "wchan").strip("0\n") or "state D")
    said = [one for one in [stuck] + _said(parts, image) if one]
    name = processes.label(found) + (" (%s)" % ", ".join(said) if said else "")
    return dict(r.holder("process", name), **parts)


def task(pid, container):
    """Return the HOLDER of the process that containerd says to be a container's.

    It is its pid alone where /proc does not confirm that, because containerd counts pids elsewhere, for one.
    """
    found = process(pid, container=container) if container and container in _text(pid, "cgroup") else None
    return found or r.holder("process", str(pid))


def container_of(cgroup):
    """Return ``(id, namespace of containerd)`` that the text of /proc/PID/cgroup tells, None for what it does not."""
    for line in cgroup.split("\n"):
        names = line.split(":", 2)[-1].split("/")[1:]
        for name in reversed(names):
            matched = _CONTAINER.fullmatch(name)
            if matched:
                return matched.group(2), _NAMESPACES.get(matched.group(1)) or _of_path(names)
        if len(names) > 1 and names[0] in _OF_CONTAINERD and containerd.IDENTIFIER.fullmatch(names[1]):
            return names[1], names[0]
    return None, None


def parent(pid, host):
    """Return the HOLDER of a process that is to be blamed for its children; with ``image``, that of its container.

    What a cgroup does not tell, the shim was told that the process descends from, or is. The image is None where
    containerd does not tell it at once. Returns None when there is no such process.
    """
    container, namespace = container_of(_text(pid, "cgroup"))
    its_shim = None if namespace else _shim_of(pid)
    if its_shim is not None:
        of_shim, namespace = shim(its_shim)
        container = container or of_shim
    image = _image(container, namespace, host)
    holder = process(pid, container=container, image=image)
    return holder and dict(holder, image=image)


def shim(pid):
    """Return ``(id, namespace)`` of the container that a shim of containerd was started for, by its arguments."""
    worker = Worker(lambda pid: _text(pid, "cmdline").split("\0"))
    try:
        arguments = worker.call(pid, SHIM_SECONDS)
    except ProbeError:
        return None, None  # the memory of a process that hangs cannot be read
    finally:
        worker.close()
    told = [_argument(arguments, name) for name in ("-id", "-namespace")]
    return tuple(told) if all(told) else (None, None)


def _shim_of(pid):
    for one in processes.lineage(pid):
        found = processes.stat(one)
        if found is not None and found.command.startswith(_SHIM):
            return one
    return None


def _argument(arguments, name):
    value = arguments[arguments.index(name) + 1] if name in arguments[:-1] else ""
    return value if containerd.IDENTIFIER.fullmatch(value) and len(value) <= 255 else None


def _image(container, namespace, host):
    """Return the image of a container that containerd knows at its usual address, None where it does not say."""
    if container is None or namespace is None or _silent or not os.path.exists(containerd.ADDRESS):
        return None
    try:
        client = containerd.Client(containerd.ADDRESS, namespace, host)
        return processes.printable(client.container(container, IMAGE_SECONDS)["image"])[:MAX_IMAGE] or None
    except containerd.NotFound:
        return None
    except (ProbeError, OSError) as err:
        _silent.append(str(err))
        return None


def _said(parts, image):
    """Return what is told of a process beside its name, each in words. What tells the same again is left out."""
    container, unit = parts["container"], parts["unit"]
    short = container[:SHORT] if container and re.fullmatch("[0-9a-f]{64}", container) else container
    return [
        "unit %s" % unit if unit and not (container and container in unit) else None,
        "container %s" % short if container else None,
        "image %s" % image if image else None,
        "mount namespace %d" % parts["mount_namespace"] if parts["mount_namespace"] and not container else None,
    ] + _by_shown(parts["by"])


def _by_shown(by):
    more = len(by) - MAX_BY_SHOWN
    return by[:MAX_BY_SHOWN] + (["%d more" % more] if more > 0 else [])


def _by_kind(word):
    return (word.startswith("fd "), int(word[3:]) if word.startswith("fd ") else 0, word)


def _of_path(names):
    """Return the namespace in which a bare id may be known."""
    if names[0].startswith("kubepods"):
        return "k8s.io"
    return names[0] if names[0] in _OF_CONTAINERD else None


def _other_mount_namespace(pid):
    """Return the number of a process's mount namespace, None when it is ours or not to be seen."""
    with contextlib.suppress(OSError):
        its = os.readlink("/proc/%d/ns/mnt" % pid)
        matched = re.fullmatch(r"mnt:\[(\d+)\]", its)
        if matched and its != os.readlink("/proc/self/ns/mnt"):
            return int(matched.group(1))
    return None


def _text(pid, name):
    try:
        return processes.read(pid, name) or ""
    except OSError:
        return ""
