# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Where the list of live VMs comes from. A source is one file in this directory, named as its ``type``, with

``OPTIONS``                  ``{name: {type, required, default}}``, checked by Ansible's own argument validation
``describe(options)``        -> a short name of it for people, and for the epochs that hosts remember; no secrets
``fetch(options, context)``  -> a DOCUMENT (see manifest.py); raises ManifestError

The context is ``{realm, now, directory, inventory}``: ``directory`` is the playbook's, ``inventory()`` reads the
inventory and returns it, with ``groups`` and ``variables(host name)``.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os

from ansible.module_utils.common.arg_spec import ArgumentSpecValidator

from ..manifest import ManifestError, check, union

COMMON = {"type": {"type": "str", "required": True}, "required": {"type": "bool", "default": True}}


def types():
    """Return the names of all sources."""
    names = (os.path.splitext(name)[0] for name in os.listdir(os.path.dirname(__file__)) if name.endswith(".py"))
    return sorted(name for name in names if not name.startswith("_"))


def configured(sources):
    """Return ``[(module, options)]`` for the value of reap_live_sources; raises ManifestError for bad ones."""
    if not sources:
        raise ManifestError("no_source", "reap_live_sources is empty: without live VMs' names nothing is an orphan")
    return [_configured(number, source) for number, source in enumerate(sources)]


def fetch(sources, context, *, max_age, terminal_states):
    """Fetch all sources and return their union (see manifest.py), with ``skipped`` for optional ones that failed."""
    manifests, skipped = [], []
    for module, options in configured(sources):
        name = module.describe(options)
        try:
            with _nothing_thrown_away():
                document = module.fetch(options, context)
                manifests.append(
                    check(document, name, now=context["now"], max_age=max_age, terminal_states=terminal_states)
                )
        except ManifestError as err:
            if options["required"]:
                raise
            skipped.append("%s: %s" % (err.code, err))
    if not manifests:
        raise ManifestError("no_source", "none of the live sources answered: %s" % "; ".join(skipped))
    return dict(union(manifests), skipped=skipped)


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


def _configured(number, source):
    where = "reap_live_sources[%d]" % number
    kind = source.get("type") if isinstance(source, dict) else None
    if kind not in types():
        raise ManifestError("bad_source", "%s: 'type' must be one of %s, not %r" % (where, ", ".join(types()), kind))
    module = importlib.import_module("%s.%s" % (__name__, kind))
    result = ArgumentSpecValidator(dict(COMMON, **module.OPTIONS)).validate(source)
    if result.error_messages:
        raise ManifestError("bad_source", "%s (%s): %s" % (where, kind, "; ".join(result.error_messages)))
    return module, result.validated_parameters
