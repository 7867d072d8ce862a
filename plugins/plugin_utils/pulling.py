# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What a host needs to sweep itself: this collection, and an inventory of the one host with its own variables."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import re
import tarfile

import yaml

# What runs, and what names the version: one of the first two. Documentation stays on the controller.
SHIPPED = ("MANIFEST.json", "galaxy.yml", "meta", "playbooks", "plugins", "roles")
SCHEDULE = "reap_schedule_"
# Of the playbook that runs here, and of files here; the unit has a report of its own.
NOT_OF_THE_HOST = ("reap_hosts", "reap_waves", "reap_report_path")
# For one sweep, with a person who looks.
ONCE = ("reap_adopt_host", "reap_clear_latch")
CONNECTION = {"ansible_connection": "local", "ansible_python_interpreter": "{{ ansible_playbook_python }}"}

_UNIT = re.compile(r"[A-Za-z0-9:_.@%\\-]+\.(?:service|target)")
_PATH = re.compile(r"/[A-Za-z0-9/._+-]+")
_LINE = re.compile(r"[A-Za-z0-9 *,./:~-]+")
_BYTES = re.compile(r"[1-9][0-9]*[KMGT]?|infinity")


def problems(variables):
    """Return what speaks against a timer with these variables of the role, each a sentence that names the variable."""
    found = [
        "%s is for one sweep that a person looks at, and a timer would say it in each: run playbooks/reap.yml with it"
        % name
        for name in ONCE
        if variables.get(name)
    ]
    found += [
        "reap_live_sources[%d]: a host that sweeps itself has no inventory of VMs; use type file, http or postgresql"
        % number
        for number, source in enumerate(variables["reap_live_sources"])
        if source.get("type") == "inventory"
    ]
    for name, pattern, wanted in (
        ("on_calendar", _LINE, "a calendar event of systemd, such as *:0/5"),
        ("ansible_playbook", _PATH, "an absolute path on the host"),
        ("memory_max", _BYTES, "a number of bytes, such as 1G"),
    ):
        if not pattern.fullmatch(variables[SCHEDULE + name]):
            found.append("%s%s must be %s, not %r" % (SCHEDULE, name, wanted, variables[SCHEDULE + name]))
    on_failure = variables[SCHEDULE + "on_failure"]
    if on_failure and not _UNIT.fullmatch(on_failure):
        found.append("%son_failure must be the name of a service, such as alert@%%n.service, not %r"
                     % (SCHEDULE, on_failure))
    if variables[SCHEDULE + "splay"] < 0:
        found.append("%ssplay must not be less than 0" % SCHEDULE)
    return found


def of_the_host(variables, spec):
    """Return the variables that a host must be given to sweep itself as it would be swept from here.

    Only those that are not the role's own defaults, by ``spec``, its argument specification.
    """
    return {
        name: value
        for name, value in variables.items()
        if name in spec
        and not name.startswith(SCHEDULE)
        and name not in NOT_OF_THE_HOST
        and value != spec[name].get("default")
    }


def inventory(host, variables):
    """Return the text of an inventory of this host alone. No value is a template there, whatever is in it."""
    known = dict(CONNECTION, **_literal(dict(sorted(variables.items()))))
    content = yaml.dump({"all": {"hosts": {str(host): known}}}, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return "---\n# Written by the playbook microvm.reaper.schedule, which writes it anew. May hold secrets.\n" + content


def files(root):
    """Return ``{path: content}`` of what is shipped of the collection in ``root``; links are followed."""
    found = {}
    for top in SHIPPED:
        path = os.path.join(root, top)
        if os.path.isfile(path):
            found[top] = _content(path)
        for directory, below, names in os.walk(path, followlinks=True):
            below[:] = sorted(name for name in below if name != "__pycache__")
            for name in names:
                if not name.endswith((".pyc", ".pyo", "~")) and not name.startswith("."):
                    full = os.path.join(directory, name)
                    found[os.path.relpath(full, root)] = _content(full)
    return found


def digest(content):
    """Return a short text that differs for other contents."""
    total = hashlib.sha256()
    for path in sorted(content):
        for part in (path.encode(), content[path]):
            total.update(b"%d:%s" % (len(part), part))
    return total.hexdigest()[:12]


def archive(content, prefix):
    """Return the bytes of an archive with these files below ``prefix``: the same for the same files, root's own."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for path in sorted(content):
            entry = tarfile.TarInfo(os.path.join(prefix, path))
            entry.size, entry.mode = len(content[path]), 0o644
            tar.addfile(entry, io.BytesIO(content[path]))
    return gzip.compress(packed.getvalue(), mtime=0)


def _content(path):
    with open(path, "rb") as stream:
        return stream.read()


class _Unsafe(str):
    """A text that Ansible must not take for a template."""


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, _data):
        return True


_Dumper.add_representer(_Unsafe, lambda dumper, value: dumper.represent_scalar("!unsafe", str(value), style="'"))


def _literal(value):
    """Return a value of plain types. Ansible's own are texts, lists and mappings with something beside."""
    if isinstance(value, dict):
        return {str(key): _literal(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_literal(one) for one in value]
    if value is None or isinstance(value, bool):
        return value
    for kind in (int, float):
        if isinstance(value, kind):
            return kind(value)
    text = str(value)
    return _Unsafe(text) if any(mark in text for mark in ("{{", "{%", "{#")) else text
