# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A manifest in a file on the controller, YAML or JSON."""

from __future__ import annotations

import contextlib
import gc
import json
import os

import yaml

from ..manifest import ManifestError

OPTIONS = {"path": {"type": "path", "required": True}}
MAX_BYTES = 512 * 1024 * 1024


def describe(options):
    """Name the source by its path."""
    return "file %s" % options["path"]


def fetch(options, context):
    """Return the document in the file. JSON is tried first: it is YAML too, but read a hundred times faster."""
    path = os.path.join(context["directory"], options["path"])
    try:
        with open(path, "rb") as stream:
            data = stream.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ManifestError("unreadable", "%s is larger than %d bytes" % (describe(options), MAX_BYTES))
        text = data.decode("utf-8")
        if text.lstrip().startswith("{"):
            with _nothing_thrown_away():
                return json.loads(text)
        return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except OSError as err:
        raise ManifestError("unreadable", "%s cannot be read: %s" % (describe(options), err.strerror)) from err
    # PyYAML says of some values that have the wrong tag only that an index, a key or an attribute is missing.
    except (ValueError, LookupError, AttributeError, TypeError, yaml.YAMLError, RecursionError) as err:
        problem = " ".join(str(err).split())
        raise ManifestError("unreadable", "%s is no YAML or JSON: %s" % (describe(options), problem)) from err


@contextlib.contextmanager
def _nothing_thrown_away():
    """A million records that all stay are no garbage: looking through them again and again takes half of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
