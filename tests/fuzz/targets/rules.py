# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What people write: rules, presets, patterns of paths, pins of a policy. And the names that meet them."""

from __future__ import annotations

import json
import warnings

import yaml
from ansible_collections.microvm.reaper.plugins.module_utils.kinds import cgroup, jail, zombie
from ansible_collections.microvm.reaper.plugins.module_utils.resource import VM_ID, Names, RuleError, is_text
from ansible_collections.microvm.reaper.plugins.module_utils.supervisors import firecracker
from ansible_collections.microvm.reaper.plugins.plugin_utils import planner, presets

from ..target import is_safe, target

warnings.simplefilter("ignore")  # of patterns that mean something else in other languages


@target()
def names(data):
    """Raises nothing for a name, whatever it is. An id is one, and stands in the name where the rule has it."""
    name = data.decode("utf-8", "surrogateescape")
    rules = [{"name": "vm-(?P<vm_id>.*)-disk"}, {"name": "(?P<vm_id>[^/]+)/x"}, {"label": "vm"}]
    for labels in (None, {}, {"vm": name}):
        vm_id, rule = Names("jail", rules).match(name, labels)
        if vm_id is None:
            continue
        assert VM_ID.fullmatch(vm_id) and is_text(name) and is_safe(name) and vm_id in name
        assert rule == rules[2] or name in ("vm-%s-disk" % vm_id, "%s/x" % vm_id)


@target(max_length=256)
def name_rule(data):
    """Raises RuleError only. A pattern that is taken gives ids that are ids."""
    text, _newline, name = data.decode("utf-8", "replace").partition("\n")
    try:
        rules = Names("jail", [{"name": text[:80]}])
    except RuleError as err:
        assert str(err)
        return
    # As short as this, no pattern takes long.
    vm_id, _rule = rules.match(name[:8])
    assert vm_id is None or VM_ID.fullmatch(vm_id)


@target(max_length=512)
def paths(data):
    """Raises RuleError only. A pattern of a socket, a pid file, a jail or a cgroup that is taken stays where it is."""
    text = data.decode("utf-8", "replace")
    for parse in (
        firecracker._pattern,
        zombie._split_glob,
        lambda path: jail._bases([{"base": path}]),
        _jail_exec,
        lambda path: cgroup._root({"root": path}),
    ):
        try:
            found = parse(text)
        except RuleError as err:
            assert str(err)
            continue
        if isinstance(found, firecracker.Pattern):
            assert found.base.startswith("/") and ".." not in [*found.base.split("/"), *found.above, *found.below]
            assert found.entry.fullmatch(text.split("/")[1 + len([x for x in found.base.split("/") if x])
                                                         + len(found.above)].replace("{vm_id}", "v1"))
        elif isinstance(found, dict):
            assert all(base.startswith("/") and "/../" not in base + "/" for base in found)


def _jail_exec(text):
    """Match a pattern for the directories of jailer with a name that is short enough for any pattern."""
    rules = jail._bases([{"base": "/srv/jailer", "name": "(?P<vm_id>.*)", "exec": text[:80]}])["/srv/jailer"]
    return jail._names(rules, ["abcdefgh"])


@target(is_json=True)
def preset(data):
    """Raises PresetError only. The rules of a preset that is taken are taken again, and are those of its kinds."""
    try:
        content = yaml.load(data.decode("utf-8", "replace"), Loader=yaml.CSafeLoader)
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError):
        return
    if not isinstance(content, dict):
        return
    try:
        found = presets.rules([content])
        reused = presets.reused_ids([content])
    except presets.PresetError as err:
        assert str(err)
        return
    assert presets.rules([{"rules": found}]) == found and all(isinstance(pattern, str) for pattern in reused)
    json.dumps(found)


@target()
def policy_pin(data):
    """Raises PolicyError only. A pin has a pattern, and an end that is a day, which is written again as it was."""
    text = data.decode("utf-8", "replace")
    try:
        found = planner.pin(text)
    except planner.PolicyError:
        return
    words = text.split()
    assert words[0] == found["pattern"] and len(words) in (1, 3)
    assert (found["until"] is None) == (len(words) == 1)
    assert found["until"] is None or found["until"] % 86400 == 0
