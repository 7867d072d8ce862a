# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What can be said of abandoned records without a database; tests/integration/test_abandoned.py has one."""

from __future__ import annotations

import copy

import pytest
from ansible_collections.microvm.reaper.plugins.module_utils import abandoned
from ansible_collections.microvm.reaper.plugins.module_utils.abandoned import AbandonedError, Found, Seen
from ansible_collections.microvm.reaper.plugins.modules import abandoned_vmm_facts, abandoned_vmms

VM = "6a0f7a4e-6d65-4c8b-9f2e-55c1f0a7d4c1"


def params(**changes):
    """Return a module's parameters; without a database to reach."""
    plain = {"conninfo": "", "password": None, "password_file": None, "facts_age": 0.0, "min_age": 60.0, "timeout": 1.0}
    states = {"terminal_states": list(abandoned.TERMINAL_STATES), "tombstoned_states": ["tombstoned"]}
    return {**copy.deepcopy(abandoned.NAMES), **plain, **states, **changes}


def refused(**changes):
    """Return why the parameters are refused, and what of them must not be shown."""
    hidden = []
    with pytest.raises(AbandonedError) as err:
        abandoned.open_database(params(**changes), hidden.append)
    return str(err.value), hidden


def found(verdict=abandoned.CONFLICT, vm_id=VM, reason="r"):
    return Found(abandoned.RECORD, vm_id, vm_id, "h", "failed", None, 1, verdict, reason)


# --- what the hosts say


@pytest.mark.parametrize("seen", [VM, VM.upper(), VM.replace("-", ""), "{%s}" % VM, " %s\n" % VM])
def test_what_a_host_still_has_is_a_conflict_however_it_is_written(seen):
    verdict, reason = Seen({"h": [], "other": [seen]}).judge(VM, "h", True)
    assert (verdict, reason) == (abandoned.CONFLICT, "something of it is still on other")


def test_ids_that_are_no_uuids_are_compared_without_case_only():
    seen = Seen({"h": ["VM-1"]})
    assert seen.judge("vm-1", "h", True)[0] == abandoned.CONFLICT
    assert seen.judge("vm1", "h", True)[0] == abandoned.ABANDONED


@pytest.mark.parametrize(
    "host, settled, verdict",
    [
        ("h", True, abandoned.ABANDONED),
        ("H", True, abandoned.ABANDONED),
        ("h", False, abandoned.YOUNG),
        ("other", True, abandoned.UNKNOWN),
        ("other", False, abandoned.UNKNOWN),
        (None, True, abandoned.UNKNOWN),
    ],
)
def test_only_a_host_that_answered_and_looked_after_the_change_lets_go(host, settled, verdict):
    assert Seen({"h": []}).judge(VM, host, settled)[0] == verdict


def test_a_conflict_goes_before_all_else():
    assert Seen({"h": [VM]}).judge(VM, None, False)[0] == abandoned.CONFLICT


@pytest.mark.parametrize("ids", [None, VM, {VM: 1}, [1], [None], [[VM]]])
def test_facts_that_are_none_are_refused(ids):
    with pytest.raises(AbandonedError, match="facts: 'h' must be a list of the ids"):
        Seen({"h": ids})


# --- what is refused before the database is reached


@pytest.mark.parametrize("name", ["", "a\nb", "a\0b", "x" * 64, "ü" * 32, None, 7, ["a"]])
@pytest.mark.parametrize("kind, meaning", [("records", "id"), ("reservations", "state"), ("instances", "table")])
def test_a_name_that_cannot_be_one_is_refused_by_its_option(name, kind, meaning):
    names = copy.deepcopy(abandoned.NAMES)
    names[kind][meaning] = name
    with pytest.raises(AbandonedError, match=r"%s\.%s: .* cannot be a name in a database" % (kind, meaning)):
        abandoned.statements(names)


def test_a_table_may_have_its_schema_and_database_and_no_more():
    names = copy.deepcopy(abandoned.NAMES)
    names["records"]["table"] = "omicron.public.vmm"
    assert '"omicron"."public"."vmm"' in abandoned.statements(names)["mark"].as_string(None)
    names["records"]["table"] = "a.b.c.d"
    with pytest.raises(AbandonedError, match="more parts than"):
        abandoned.statements(names)


@pytest.mark.parametrize("option", ["facts_age", "min_age", "timeout", "strike_interval", "max"])
@pytest.mark.parametrize("value", [-1, float("nan"), float("inf")])
def test_impossible_numbers_are_named(option, value):
    assert refused(**{option: value})[0].startswith("%s must be a number between 0" % option)


@pytest.mark.parametrize("option", ["terminal_states", "tombstoned_states"])
@pytest.mark.parametrize("state", ["active", "target", "Running", "migrating"])
def test_states_of_the_living_are_refused(option, state):
    assert refused(**{option: ["x", state]})[0].startswith("%s must not have %r" % (option, state))


def test_a_password_in_the_connection_string_is_refused_and_hidden():
    for text in ("host=h password=geheim", "postgresql://u:geh%65im@h/db"):
        message, hidden = refused(conninfo=text)
        assert "must not have a password" in message and "geh" not in message
        assert hidden == [text]


def test_a_connection_string_that_is_none_is_not_quoted():
    message, hidden = refused(conninfo="host=h geheim")
    assert "no connection string" in message and "geheim" not in message
    assert hidden == ["host=h geheim"]


def test_a_password_file_that_says_nothing_is_named(tmp_path):
    empty = tmp_path / "empty"
    empty.write_text("\nsecond line\n")
    assert "has no password in its first line" in refused(password_file=str(empty))[0]
    assert "cannot be read: " in refused(password_file=str(tmp_path / "none"))[0]
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    assert "cannot be read: " in refused(password_file=str(tmp_path / "bytes"))[0]


def test_a_password_is_hidden_before_anybody_connects(tmp_path):
    path = tmp_path / "password"
    path.write_text("geheim\r\nsecond line\n")
    nowhere = "host=127.0.0.1 port=1 connect_timeout=1"
    for given in ({"password_file": str(path)}, {"password": "geheim"}):
        message, hidden = refused(conninfo=nowhere, **given)
        assert message.startswith("cannot connect to the database: ")
        assert hidden == ["geheim"]


def test_the_user_may_replace_our_options_of_the_connection():
    options = abandoned.connection_options("connect_timeout=3 host=h", "geheim")
    assert options == {
        "application_name": "microvm.reaper",
        "connect_timeout": "3",
        "host": "h",
        "password": "geheim",
    }


# --- what is said


def test_the_worst_is_told_first_and_not_without_end():
    left = [found(abandoned.UNKNOWN, "u%04d" % number) for number in range(200)] + [found(vm_id="c")]
    worst = abandoned.worst(left)
    assert (worst[0].id, len(worst)) == ("c", abandoned.MAX_LEFT)
    said = abandoned.conflicts([found(vm_id="c%d" % number) for number in range(15)])
    assert said[0] == "conflict: vmm c0: r"
    assert (len(said), said[-1]) == (11, "5 more conflicts")


def test_failures_are_told_without_end_and_without_what_a_terminal_obeys():
    failed = [{"what": "vmm", "id": "\x1b[2J%d" % number, "message": "boom"} for number in range(12)]
    said = abandoned.failures(failed)
    assert said.startswith("12 could not be settled: vmm \\x1b[2J0: boom; ") and said.endswith("; and 2 more")


def test_the_summary_has_all_that_is_not_zero():
    counts = dict.fromkeys(abandoned.COUNTERS, 0)
    assert abandoned.summary(counts, False) == (
        "0 abandoned records and 0 stale reservations found; 0 records marked deleted, 0 reservations deleted"
    )
    counts.update(vmms_found=1, reservations_stale=1, conflicts=2, young=3)
    assert abandoned.summary(counts, True) == (
        "1 abandoned record and 1 stale reservation found; 0 records marked deleted, 0 reservations deleted; "
        "left alone: 2 conflicts, 3 young (check mode: nothing was changed)"
    )


# --- what the pages say is what the modules take


@pytest.mark.parametrize("module", [abandoned_vmms, abandoned_vmm_facts])
def test_the_pages_have_the_defaults_of_the_code(module):
    import yaml
    from ansible_collections.microvm.reaper.plugins.doc_fragments.abandoned import ModuleDocFragment

    documented = yaml.safe_load(ModuleDocFragment.DOCUMENTATION)["options"]
    documented.update(yaml.safe_load(module.DOCUMENTATION)["options"])
    spec = module.get_argument_spec()
    assert set(documented) == set(spec)
    for name, option in spec.items():
        for part, described in [(option, documented[name])] + [
            (one, documented[name]["suboptions"][key]) for key, one in option.get("options", {}).items()
        ]:
            assert (part["type"], part.get("default")) == (described["type"], described.get("default")), name
