# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A manifest in a file on the controller: YAML, JSON, or JSON lines.

JSON lines: the first line is the manifest without ``vms``, each of the others a VM. Such a file may be of any size, and
may end at any line; only ``count`` or ``sha256`` in the first line prove that it is whole. YAML may end anywhere too,
even in a VM that it counts: it is proven by ``complete: true`` as its last line, or by the mark ``...`` there.

The list is as old as it says, or as the file if that is older: where the control plane's clock is ahead of ours, an old
list looks fresh.
"""

from __future__ import annotations

import contextlib
import json
import os
import re

import yaml

from ..manifest import ManifestError

OPTIONS = {"path": {"type": "path", "required": True}}
MAX_BYTES = 512 * 1024 * 1024
MAX_LINE = 1024 * 1024
END = re.compile(r"\n(?:complete: true|\.\.\.)\s*\Z")


def describe(options):
    """Name the source by its path."""
    return "file %s" % options["path"]


def fetch(options, context):
    """Return the document in the file."""
    path = os.path.join(context["directory"], options["path"])
    with _readable(options):
        stream = open(path, "rb")  # noqa: SIM115  (_Lines closes it)
        written = _written(stream)
        first = stream.readline(MAX_LINE)
        head = _head_of_lines(first)
        if head:
            return dict(head, vms=_Lines(stream, options), made_before=written, **_proof(head))
        with stream:
            data = first + stream.read(max(0, MAX_BYTES + 1 - len(first)))
        if len(data) > MAX_BYTES:
            raise ManifestError("unreadable", "%s is larger than %d bytes" % (describe(options), MAX_BYTES))
        text = data.decode("utf-8")
        document = _parsed(text)
        return dict(document, made_before=written, **_end(text)) if isinstance(document, dict) else document


def _written(stream):
    """Return when the file was written last, in seconds since 1970 by the clock of this machine."""
    return os.fstat(stream.fileno()).st_mtime


def _is_json(text):
    return text.lstrip().startswith("{")


def _end(text):
    """Return what has to be said of YAML that does not end as only a whole list does."""
    if _is_json(text) or END.search(text):
        return {}
    return {"proven": False, "unproven": "a list in YAML has to end with the line 'complete: true', or is cut off"}


def _parsed(text):
    """Return what a text says. JSON is tried first: it is YAML too, but read a hundred times faster."""
    if _is_json(text):
        return json.loads(text)
    return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def _head_of_lines(line):
    """Return the manifest without VMs that is the first of JSON lines, None for another file."""
    try:
        head = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return head if isinstance(head, dict) and "realm" in head and "vms" not in head else None


def _proof(head):
    """Return what has to be said of lines that may end anywhere."""
    if head.get("count") is not None or head.get("sha256") is not None:
        return {}
    return {"proven": False, "unproven": "a list in lines has to say its count or sha256"}


class _Lines:
    """The VMs of JSON lines. close() closes the file, also where nobody has taken any."""

    def __init__(self, stream, options):
        self._stream, self._vms = stream, _vms(stream, options)

    def __iter__(self):
        return self

    def __next__(self):
        return next(self._vms)

    def close(self):
        self._vms.close()
        self._stream.close()


def _vms(stream, options):
    """Yield the VMs of JSON lines."""
    with _readable(options), stream:
        for line in iter(lambda: stream.readline(MAX_LINE), b""):
            if not line.endswith(b"\n"):
                raise ValueError("its last line is cut off, or longer than %d bytes" % MAX_LINE)
            yield json.loads(line)


@contextlib.contextmanager
def _readable(options):
    """Say what is wrong with the file, whatever raises."""
    try:
        yield
    except OSError as err:
        raise ManifestError("unreadable", "%s cannot be read: %s" % (describe(options), err.strerror)) from err
    # PyYAML says of some values that have the wrong tag only that an index, a key or an attribute is missing.
    except (ValueError, LookupError, AttributeError, TypeError, yaml.YAMLError, RecursionError) as err:
        problem = " ".join(str(err).split())
        raise ManifestError("unreadable", "%s is no YAML or JSON: %s" % (describe(options), problem)) from err
