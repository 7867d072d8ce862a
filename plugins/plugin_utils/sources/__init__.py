# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Where the list of live VMs comes from. A source is one file in this directory, named as its ``type``, with

``OPTIONS``                  ``{name: {type, required, default}}``, checked by Ansible's own argument validation
``describe(options)``        -> a short name of it for people, and for the epochs that hosts remember; no secrets
``fetch(options, context)``  -> a DOCUMENT (see manifest.py), whose ``vms`` may be any iterator; raises ManifestError,
                             in the iterator too

and, where it can do better than without,

``configured(options)``      checks before any host is touched what the spec cannot say; raises ManifestError
``still_listed(options, context, vm_ids, epoch)``  -> ``{vm_id: [host]}`` of those ids that are live now, asking for no
                             others; None where the options do not say how. ``epoch`` is that of the list they are
                             missing from, or None: what is behind it is no answer

A source with ``ON_HOST`` true is no list and has no fetch(): vm_resource_facts reads it on each host, see
module_utils/all_supervisors.py.

The context is ``{realm, now, directory, inventory, of_awx, terminal_states}``: ``directory`` is the playbook's,
``inventory()`` reads the inventory and returns it, with ``groups`` and ``variables(host name)``; ``of_awx`` tells that
AWX made it for this job.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os

from ansible.module_utils.common.arg_spec import ArgumentSpecValidator

from ..manifest import Collector, ManifestError, add_place, budget, joined_budget, live_among

COMMON = {"type": {"type": "str", "required": True}, "required": {"type": "bool", "default": True}}


def types():
    """Return the names of all sources."""
    names = (os.path.splitext(name)[0] for name in os.listdir(os.path.dirname(__file__)) if name.endswith(".py"))
    return sorted(name for name in names if not name.startswith("_"))


def configured(sources):
    """Return ``[(module, options)]`` for the value of reap_live_sources; raises ManifestError for bad ones."""
    if not sources:
        raise ManifestError("no_source", "reap_live_sources is empty: without live VMs' names nothing is an orphan")
    found = [_configured(number, source) for number, source in enumerate(sources)]
    on_host = [options["type"] for module, options in found if _is_on_host(module)]
    if len(on_host) == len(found):
        raise ManifestError(
            "no_source",
            "reap_live_sources has nothing but %s: on a host one sees who lives, and not who is dead; add a source "
            "that lists all live VMs" % ", ".join(on_host),
        )
    twice = sorted(kind for kind in set(on_host) if on_host.count(kind) > 1)
    if twice:
        raise ManifestError(
            "bad_source", "reap_live_sources has %s twice: put its lists into one entry" % ", ".join(twice)
        )
    return found


def fetch(sources, context, path, *, max_age):
    """Fetch all sources into the new index ``path``; return its HANDLE (see manifest.py).

    It has besides ``answered``, the names of the sources in it, and ``skipped``, why optional ones are not.
    """
    collector, answered, skipped = Collector(path), [], []
    for module, options in _lists(sources):
        name = module.describe(options)
        how = {"now": context["now"], "max_age": max_age, "terminal_states": context["terminal_states"]}
        try:
            with _nothing_thrown_away(), _ended(module.fetch(options, context)) as document:
                collector.add(document, name, **how)
            answered.append(name)
        except ManifestError as err:
            if options["required"]:
                raise
            skipped.append("%s: %s" % (err.code, err))
    if not answered:
        raise ManifestError("no_source", "none of the live sources answered: %s" % "; ".join(skipped))
    return dict(collector.finish(), answered=answered, skipped=skipped)


def still_listed(sources, context, vm_ids, handle, *, max_age):
    """Return ``({vm_id: [host]}, BUDGET)`` of those ids that any source lists now; no host means everywhere.

    A source that is asked about single VMs says nothing of its budget. ``handle`` is that of fetch(). Raises
    ManifestError when a source that answered then does not answer now, or goes back behind what it said then.
    """
    found, budgets = {}, []
    for module, options in _lists(sources):
        name = module.describe(options)
        if name not in handle["answered"]:
            continue
        how = {"now": context["now"], "max_age": max_age, "terminal_states": context["terminal_states"]}
        listed = None
        if hasattr(module, "still_listed"):
            listed = module.still_listed(options, context, vm_ids, handle["epochs"].get(name))
        if listed is None:
            with _nothing_thrown_away(), _ended(module.fetch(options, context)) as document:
                listed = live_among(vm_ids, document, name, handle, **how)
                budgets.append(budget(document, name, document.get("hosts")))
        for vm_id, hosts in listed.items():
            add_place(found, vm_id, hosts)
    return found, joined_budget(budgets)


@contextlib.contextmanager
def _ended(document):
    """Give the document and end its iterators then, which may hold a connection, whatever was taken of them."""
    try:
        yield document
    finally:
        for entries in document.values() if isinstance(document, dict) else ():
            if hasattr(entries, "close"):
                entries.close()


@contextlib.contextmanager
def _nothing_thrown_away():
    """A million records refer to nothing that refers to them: looking for such garbage takes up to half of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _lists(sources):
    return [(module, options) for module, options in configured(sources) if not _is_on_host(module)]


def _is_on_host(module):
    return getattr(module, "ON_HOST", False)


def _configured(number, source):
    where = "reap_live_sources[%d]" % number
    kind = source.get("type") if isinstance(source, dict) else None
    if kind not in types():
        raise ManifestError("bad_source", "%s: 'type' must be one of %s, not %r" % (where, ", ".join(types()), kind))
    module = importlib.import_module("%s.%s" % (__name__, kind))
    result = ArgumentSpecValidator(dict(COMMON, **module.OPTIONS)).validate(source)
    if result.error_messages:
        said = _without_secrets("; ".join(result.error_messages), source, module.OPTIONS)
        raise ManifestError("bad_source", "%s (%s): %s" % (where, kind, said))
    options = result.validated_parameters
    if hasattr(module, "configured"):
        try:
            module.configured(options)
        except ManifestError as err:
            raise ManifestError(err.code, "%s (%s): %s" % (where, kind, err)) from err
    return module, options


def _without_secrets(text, source, options):
    """Take the values of secret options out of a text: Ansible's validation quotes what it does not like."""
    for name in options:
        if options[name].get("no_log") and source.get(name):
            text = text.replace(str(source[name]), "********")
    return text
