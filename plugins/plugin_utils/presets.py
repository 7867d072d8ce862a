# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Presets: which names on a host are those of VMs, for systems whose leftovers we know. Data, one YAML file each.

PRESET ``{description, rules: {kind: [RULE]}, reused_ids: [regular expression]}``;
what a RULE may say is the RULE spec of its kind.
"""

from __future__ import annotations

import os

import yaml
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator

from ..module_utils.all_kinds import BY_NAME
from ..module_utils.resource import Names, RuleError

DIRECTORY = os.path.join(os.path.dirname(__file__), "..", "..", "roles", "reap", "vars", "presets")


class PresetError(ValueError):
    """A preset is unknown or wrong; the text names the file, the kind and the key."""


def known():
    """Return the names of the presets that come with the collection."""
    return sorted(name[:-len(".yml")] for name in os.listdir(DIRECTORY) if name.endswith(".yml"))


def rules(
    presets,
    *,
    cgroup_roots=(),
    jail_bases=(),
    containerd_namespaces=(),
    containerd_address="",
    thin_pools=(),
    kinds=(),
):
    """Return ``{kind: [RULE]}`` of all presets together.

    ``presets`` are names of presets or mappings in their shape. Roots, bases, namespaces and address that are given
    take the place of those in the presets: each rule is repeated for each of them. ``thin_pools`` are pools that are
    for VMs alone: their unmapped thin ids are looked at. ``kinds`` limits the kinds.
    """
    merged = {}
    for preset in [*presets, *_of_pools(thin_pools, containerd_address)]:
        name, content = _load(preset)
        for kind, kind_rules in content["rules"].items():
            if kind not in BY_NAME:
                raise PresetError("preset %s: %r is no kind; the kinds are %s" % (name, kind, ", ".join(BY_NAME)))
            if kinds and kind not in kinds:
                continue
            for rule in kind_rules:
                for placed in _placed(kind, rule, cgroup_roots, jail_bases, containerd_namespaces, containerd_address):
                    checked = _check(name, kind, placed)
                    if checked not in merged.setdefault(kind, []):
                        merged[kind].append(checked)
    return merged


def reused_ids(presets):
    """Return the patterns of ids that the platforms of these presets use again."""
    return [pattern for preset in presets for pattern in _load(preset)[1].get("reused_ids") or []]


def _of_pools(pools, address):
    """Return what the role says by itself, as a preset: which pools hold the volumes of VMs and nothing else."""
    more = {"address": address} if address else {}
    return [{"rules": {"thin_id": [dict(more, pool=pool) for pool in pools]}}] if pools else []


def _load(preset):
    if isinstance(preset, dict):
        return "(inline)", _shape("(inline)", preset)
    if preset not in known():
        raise PresetError("reap_presets: there is no preset %r; there are %s" % (preset, ", ".join(known())))
    with open(os.path.join(DIRECTORY, preset + ".yml"), encoding="utf-8") as stream:
        return preset, _shape(preset, yaml.safe_load(stream))


def _shape(name, content):
    if not isinstance(content, dict) or not isinstance(content.get("rules"), dict):
        raise PresetError("preset %s: a mapping with 'rules' (kind: [rule]) was expected" % name)
    reused = content.get("reused_ids") or []
    if not isinstance(reused, list) or not all(isinstance(pattern, str) for pattern in reused):
        raise PresetError("preset %s: 'reused_ids' must be a list of regular expressions" % name)
    for kind, kind_rules in content["rules"].items():
        if not isinstance(kind_rules, list) or not all(_is_rule(rule) for rule in kind_rules):
            raise PresetError("preset %s: the rules of %s must be a list of mappings" % (name, kind))
    return content


def _is_rule(rule):
    return isinstance(rule, dict) and all(isinstance(key, str) for key in rule)


def _placed(kind, rule, cgroup_roots, jail_bases, namespaces, address):
    """Return the rule once for every place where it is to be applied."""
    key, places = {
        "cgroup": ("root", cgroup_roots),
        "jail": ("base", jail_bases),
        "container": ("namespace", namespaces),
        "snapshot": ("namespace", namespaces),
    }.get(kind, ("", ()))
    if kind in ("container", "snapshot") and address:
        rule = dict(rule, address=address)
    return [dict(rule, **{key: place}) for place in places] if places else [rule]


def _check(name, kind, rule):
    result = ArgumentSpecValidator(BY_NAME[kind].RULE).validate(rule)
    if result.error_messages:
        raise PresetError("preset %s: a rule of %s: %s" % (name, kind, "; ".join(result.error_messages)))
    try:
        if "name" in BY_NAME[kind].RULE:
            Names(kind, [result.validated_parameters])
        if "evidence" in BY_NAME[kind].RULE:
            BY_NAME[kind].log_globs([result.validated_parameters])
    except RuleError as err:
        raise PresetError("preset %s: %s" % (name, err)) from err
    return {key: value for key, value in result.validated_parameters.items() if value is not None}
