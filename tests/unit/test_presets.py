# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The presets, against names that the real systems use."""

from __future__ import annotations

import pytest
from ansible_collections.microvm.reaper.plugins.module_utils.all_kinds import BY_NAME
from ansible_collections.microvm.reaper.plugins.module_utils.resource import Names
from ansible_collections.microvm.reaper.plugins.plugin_utils import presets


def match(preset, kind, name):
    return Names(kind, presets.rules([preset])[kind]).match(name)[0]


@pytest.mark.parametrize("name", presets.known())
def test_every_preset_loads(name):
    rules = presets.rules([name])
    assert rules and all(rules.values())
    for kind, kind_rules in rules.items():
        for rule in kind_rules:
            assert set(rule) <= set(BY_NAME[kind].RULE)


def test_the_presets_that_are_documented():
    assert {"hyper", "obuilder", "boxlite", "firecracker-jailer"} <= set(presets.known())


@pytest.mark.parametrize(
    ("preset", "kind", "name", "vm_id"),
    [
        ("hyper", "cgroup", "vabc234", "vabc234"),
        ("hyper", "cgroup", "vabc189", None),
        ("hyper", "cgroup", "v", None),
        ("hyper", "cgroup", "user.slice", None),
        ("hyper", "cgroup", "kubepods", None),
        ("hyper", "jail", "vabc234", "vabc234"),
        ("hyper", "jail", "vABC", None),
        ("hyper", "dm_thin", "hyper-rw-vabc234", "vabc234"),
        ("hyper", "dm_thin", "hyper-rw-vabc234-snap", None),
        ("hyper", "dm_thin", "hyper-rw-", None),
        ("hyper", "dm_thin", "xhyper-rw-vabc234", None),
        ("hyper", "dm_thin", "hyper-img-debian-1", None),
        ("hyper", "dm_thin", "hyper-img-vabc234-1", None),
        ("hyper", "dm_thin", "hyper-thinpool", None),
        ("hyper", "dm_thin", "hyper-thinpool_tdata", None),
        ("hyper", "dm_thin", "cryptroot", None),
        ("hyper", "dm_thin", "vg0-root", None),
        ("firecracker-jailer", "cgroup", "551e7604-e35c", "551e7604-e35c"),
        ("firecracker-jailer", "cgroup", "system.slice", None),
        ("firecracker-jailer", "jail", "a" * 64, "a" * 64),
        ("firecracker-jailer", "jail", "a" * 65, None),
        ("firecracker-jailer", "jail", "-rf", None),
        ("obuilder", "container", "obuilder-run-17", "obuilder-run-17"),
        ("obuilder", "container", "obuilder-run-", None),
        ("obuilder", "container", "buildkitd", None),
        ("obuilder", "snapshot", "ab" * 32, "ab" * 32),
        ("obuilder", "snapshot", "ab" * 32 + "-committed", "ab" * 32),
        ("obuilder", "snapshot", "obuilder-base-debian", None),
        ("obuilder", "snapshot", "obuilder-base-" + "ab" * 32, None),
    ],
)
def test_names_of_the_real_systems(preset, kind, name, vm_id):
    assert match(preset, kind, name) == vm_id


def test_what_is_given_takes_the_place_of_what_the_preset_says():
    rules = presets.rules(
        ["hyper", "obuilder"],
        cgroup_roots=["a", "b"],
        jail_bases=["/j"],
        containerd_namespaces=["n", "m"],
        containerd_address="/run/other.sock",
    )
    assert [rule["root"] for rule in rules["cgroup"]] == ["a", "b"]
    assert [rule["base"] for rule in rules["jail"]] == ["/j"]
    for kind in ("container", "snapshot"):
        assert {rule["namespace"] for rule in rules[kind]} == {"n", "m"}
        assert {rule["address"] for rule in rules[kind]} == {"/run/other.sock"}
    assert rules["dm_thin"] == presets.rules(["hyper"])["dm_thin"]


def test_the_same_rule_of_two_presets_counts_once():
    once, twice = presets.rules(["hyper"]), presets.rules(["hyper", "hyper"])
    assert once == twice


def test_kinds_limits_the_kinds():
    assert set(presets.rules(["hyper"], kinds=["cgroup"])) == {"cgroup"}
    assert presets.rules(["boxlite"], kinds=["cgroup"]) == {}


def test_a_preset_of_ones_own():
    own = {"rules": {"cgroup": [{"root": "mine", "name": "(?P<vm_id>x[0-9]+)"}]}}
    assert presets.rules([own])["cgroup"][0]["root"] == "mine"


@pytest.mark.parametrize(
    ("preset", "said"),
    [
        ("hiper", "there is no preset 'hiper'; there are .*hyper"),
        ("../presets/hyper", "there is no preset"),
        (5, "there is no preset 5"),
        ({}, r"\(inline\): a mapping with 'rules'"),
        ({"rules": []}, r"\(inline\): a mapping with 'rules'"),
        ({"rules": {"cgroup": {}}}, "the rules of cgroup must be a list"),
        ({"rules": {"cgroup": ["x"]}}, "the rules of cgroup must be a list"),
        ({"rules": {"cgruop": []}}, "'cgruop' is no kind; the kinds are .*cgroup"),
        ({"rules": {"cgroup": [{"name": "(?P<vm_id>x)"}]}}, "a rule of cgroup: .*root"),
        ({"rules": {"cgroup": [{"root": "a", "nam": "x", "name": "(?P<vm_id>x)"}]}}, "a rule of cgroup: .*nam"),
        ({"rules": {"cgroup": [{"root": "a", "name": "(?P<vm_id>["}]}}, "not a regular expression"),
        ({"rules": {"cgroup": [{"root": "a", "name": "x"}]}}, "no group"),
    ],
)
def test_bad_presets_are_named(preset, said):
    with pytest.raises(presets.PresetError, match=said):
        presets.rules([preset])


@pytest.mark.parametrize("preset", ["hyper", "firecracker-jailer"])
def test_the_presets_of_jails_say_where_their_logs_are(preset):
    assert all(rule["evidence"] for rule in presets.rules([preset])["jail"])


def test_a_glob_that_leads_out_of_the_jail_is_refused():
    rule = {"base": "/srv/jailer", "name": "(?P<vm_id>.*)", "evidence": ["../../etc/shadow"]}
    with pytest.raises(presets.PresetError, match="globs relative to the jail"):
        presets.rules([{"rules": {"jail": [rule]}}])
