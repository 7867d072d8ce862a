# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A signed plan: what is in it, who can open it, and that nobody can change a byte of it."""

from __future__ import annotations

import json
import os
import stat

import pytest
from ansible_collections.microvm.reaper.plugins.module_utils.gather import squeezed
from ansible_collections.microvm.reaper.plugins.plugin_utils import signed_plan
from ansible_collections.microvm.reaper.plugins.plugin_utils.signed_plan import PlanError, keys_of, seal, unseal
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.builders import MACHINE, REALM, sweep_twice, thing

NOW, MAX_AGE = 1_800_000_000.0, 3600.0
KEY, OTHER_KEY = "k" * 32, "the other key, which is as long as it has to be"
CAPS = {"max_per_fleet": 500, "max_percent": 30.0, "percent_floor": 10}
MANIFEST = {"source": "test", "epoch": 7, "epochs": {"test": 7}, "count": 40, "generated_at": NOW, "index": "/tmp/x"}


def document(plans=None, refused=(), unseen=(), **changes):
    plans = plans or {"rack1": sweep_twice(thing("jail", "v1"), thing("cgroup", "v1"), host="h1")}
    how = {"plan_id": "1f2e3d4c5b6a7988", "realm": REALM, "manifest": MANIFEST, "caps": CAPS, "now": NOW}
    return signed_plan.document(plans, dict(refused), unseen, **dict(how, max_age=MAX_AGE, **changes))


def opened_by(text, keys=(KEY,), *, realm=REALM, now=NOW, max_age=MAX_AGE):
    return unseal(text, list(keys), realm=realm, now=now, max_age=max_age)


def refusal(text, **how):
    with pytest.raises(PlanError) as caught:
        opened_by(text, **how)
    return caught.value.code, str(caught.value)


# --- what is in it


def test_a_plan_has_what_is_to_be_done_and_by_what_it_was_judged():
    idle, dying = sweep_twice(host="h2"), sweep_twice(thing("jail", "v1"), thing("cgroup", "v1"), host="h1")
    refused = dict(sweep_twice(thing("jail", "v3"), host="h3"))
    found = document(
        {"rack1": dying, "rack2": idle, "rack3": refused}, {"rack3": {"code": "c", "message": "m"}}, ["rack9"]
    )
    assert found == {
        "plan": "1f2e3d4c5b6a7988",
        "realm": REALM,
        "made_at": NOW,
        "expires_at": NOW + MAX_AGE,
        "manifest": {key: value for key, value in MANIFEST.items() if key != "index"},
        "budget": {"vms": 1, "hosts": 1, "caps": CAPS},
        "hosts": {
            "h1": {
                "machine_id": MACHINE,
                "acts": [
                    ["jail", "v1.jail", "v1", "id of v1.jail", "remove", False],
                    ["cgroup", "v1.cgroup", "v1", "id of v1.cgroup", "remove", False],
                ],
                "begins": ["v1"],
            }
        },
        "idle": ["h2"],
        "refused": {"h3": "c"},
        "unseen": ["rack9"],
    }


def test_what_only_begins_to_wait_is_in_the_plan_too():
    waits = sweep_twice(thing("snapshot", "v1"), hold=60)
    assert waits["reap"] == [] and waits["begins"] == ["v1"]
    assert document({"rack1": waits})["hosts"]["h1"] == {"machine_id": MACHINE, "acts": [], "begins": ["v1"]}


def test_how_a_zombie_goes_is_a_part_of_the_act():
    zombie = thing("zombie", "v1", details={"parent_unit": "vmm@1.service"})
    told = sweep_twice(zombie)["reap"][0]
    restarted = sweep_twice(zombie, zombies="restart_unit", zombies_restart_units=["vmm@*"])["reap"][0]
    assert signed_plan.act_of(told)[6:] == [None, None, None]
    assert signed_plan.act_of(restarted)[6:] == ["restart_unit", "vmm@1.service", False]


def test_two_hosts_of_one_name_make_no_plan():
    twice = {"rack1": sweep_twice(), "rack2": sweep_twice()}
    with pytest.raises(PlanError, match="rack1 and rack2 have the same name in the live sources, 'h1'") as caught:
        document(twice)
    assert caught.value.code == "two_of_one_name"
    assert document(twice, {"rack2": {"code": "c", "message": "m"}})["idle"] == ["h1"]


# --- who can open it


def test_what_was_sealed_is_opened_and_the_same_plan_is_the_same_text():
    found = document()
    assert opened_by(seal(found, [KEY])) == found
    assert seal(found, [KEY]) == seal(dict(reversed(found.items())), [KEY])
    assert opened_by("\n %s\r\n" % seal(found, [KEY])) == found


def test_of_several_keys_the_first_signs_and_each_verifies():
    rotated = seal(document(), [OTHER_KEY, KEY])
    assert opened_by(rotated, [KEY, OTHER_KEY]) == opened_by(rotated, [OTHER_KEY]) == document()
    assert refusal(rotated, keys=[KEY])[0] == "plan_altered"
    assert refusal(seal(document(), [KEY]), keys=[])[0] == "plan_altered"


@pytest.mark.parametrize(
    ("given_keys", "said"),
    [
        ("", "is not given"),
        (None, "is not given"),
        ([], "is not given"),
        ("hunter2" * 4 + "abc", "reap_plan_key is shorter than 32 characters"),
        ([KEY, "hunter2"], "key 2 of reap_plan_key is shorter"),
        (KEY, None),
        ([KEY, OTHER_KEY], None),
    ],
)
def test_a_weak_key_is_refused_without_telling_it(given_keys, said):
    problem = signed_plan.weak(keys_of(given_keys))
    assert (problem is None) == (said is None)
    if said:
        assert said in problem and "hunter2" not in problem


@pytest.mark.parametrize("path", [["plan"], ["realm"], ["made_at"], ["expires_at"], ["manifest", "epoch"],
                                  ["budget", "caps", "max_per_fleet"], ["hosts", "h1", "begins"],
                                  ["hosts", "h1", "acts"], ["hosts", "h1", "machine_id"], ["idle"], ["refused"],
                                  ["unseen"]])  # fmt: skip
def test_no_field_can_be_changed(path):
    text = seal(document(), [KEY])
    forged = json.loads(json.dumps(document()))
    place = forged
    for key in path[:-1]:
        place = place[key]
    assert path[-1] in place
    place[path[-1]] = "forged"
    signed = "%s:%d:%s" % (signed_plan.NAME, signed_plan.FORMAT, squeezed(json.dumps(forged)))
    assert refusal("%s:%s" % (signed, text.rpartition(":")[2]))[0] == "plan_altered"
    assert refusal(seal(forged, [OTHER_KEY]))[0] == "plan_altered"


SEALED = seal(document(), [KEY])


@settings(max_examples=500)
@given(st.integers(0, len(SEALED) - 1), st.integers(0, 255), st.sampled_from(["replace", "insert", "delete", "cut"]))
def test_any_change_of_a_byte_is_refused(place, byte, how):
    data, new = SEALED.encode(), bytes([byte])
    changed = {
        "replace": data[:place] + new + data[place + 1 :],
        "insert": data[:place] + new + data[place:],
        "delete": data[:place] + data[place + 1 :],
        "cut": data[:place],
    }[how].decode("utf-8", "surrogateescape")
    if changed.strip(" \t\r\n") == SEALED:
        assert opened_by(changed) == document()
    else:
        assert refusal(changed)[0] in ("plan_altered", "plan_unreadable")


def test_nothing_is_parsed_before_it_is_verified(monkeypatch):
    def never(*_arguments):
        raise AssertionError("parsed")

    monkeypatch.setattr(signed_plan, "unpack", never)
    assert refusal(seal(document(), [OTHER_KEY]))[0] == "plan_altered"
    with pytest.raises(AssertionError, match="parsed"):
        opened_by(SEALED)


def test_another_realm_is_refused():
    code, said = refusal(SEALED, realm="staging")
    assert code == "plan_foreign"
    assert said == "the plan 1f2e3d4c5b6a7988 of 2027-01-15T08:00:00Z is for realm 'prod', and this is 'staging'"


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"now": NOW + 3600}, None),
        ({"now": NOW + 3600.1}, "has expired at 2027-01-15T09:00:00Z: make a new one"),
        ({"now": NOW + 3600.1, "max_age": 7200}, "has expired at"),
        ({"now": NOW + 60, "max_age": 60}, None),
        ({"now": NOW + 61, "max_age": 60}, "is 61 s old, more than reap_plan_max_age=60: make a new one"),
        ({"now": NOW - 30}, None),
        ({"now": NOW - 31}, "was made 31 s from now: the clock"),
    ],
)
def test_a_plan_is_good_for_as_long_as_both_say(how, said):
    if said is None:
        assert opened_by(SEALED, **how) == document()
    else:
        code, message = refusal(SEALED, **how)
        assert code == "plan_expired" and said in message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "does not begin with 'microvm.reaper.plan:'"),
        ("{}", "does not begin with"),
        ("microvm.reaper.planned:1:x:y", "does not begin with"),
        ("x" * (signed_plan.MAX_TEXT + 1), "larger than"),
    ],
)
def test_what_is_no_plan_says_so(text, said):
    code, message = refusal(text)
    assert code == "plan_unreadable" and said in message


def resealed(signed):
    return "%s:%s" % (signed, signed_plan._signature(signed.encode(), KEY))


def test_a_signed_plan_of_another_version_says_so():
    newer = resealed("microvm.reaper.plan:2:" + squeezed("{}"))
    assert refusal(newer)[1].startswith("it has format 2, and this version of the collection reads format 1")
    for content in ("[]", "{", json.dumps(dict(document(), idle=None))):
        assert refusal(resealed("microvm.reaper.plan:1:" + squeezed(content)))[0] == "plan_unreadable"
    for key in document():
        less = {name: value for name, value in document().items() if name != key}
        assert refusal(seal(less, [KEY])) == (
            "plan_unreadable",
            "it has no '%s': another version of the collection made it" % key,
        )


# --- files


def test_a_plan_is_written_as_a_whole_for_its_owner_only(tmp_path):
    path = tmp_path / "prod.plan"
    path.write_text("microvm.reaper.plan:an older one")
    path.chmod(0o644)
    signed_plan.write(str(path), SEALED)
    assert path.read_text() == SEALED + "\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["prod.plan"]
    assert signed_plan.read(str(path)) == SEALED + "\n" and signed_plan.read(SEALED) == SEALED


def test_a_plan_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(signed_plan.os, "fsync", full)
    with pytest.raises(PlanError, match="cannot write .*prod.plan: No space left on device"):
        signed_plan.write(str(tmp_path / "prod.plan"), SEALED)
    assert os.listdir(tmp_path) == []
    for check in (signed_plan.check_place, lambda path: signed_plan.write(path, SEALED)):
        with pytest.raises(PlanError, match="No such file or directory"):
            check(str(tmp_path / "missing" / "prod.plan"))


def test_an_older_plan_makes_way_and_nothing_else_does(tmp_path):
    path = tmp_path / "prod.plan"
    assert not signed_plan.clear(str(path))
    signed_plan.write(str(path), SEALED)
    assert signed_plan.clear(str(path), check_mode=True) and path.exists()
    assert signed_plan.clear(str(path)) and not path.exists()
    path.write_text("root:x:0:0")
    with pytest.raises(PlanError, match="is there and is no plan; it is not overwritten"):
        signed_plan.clear(str(path))
    assert path.read_text() == "root:x:0:0"
    with pytest.raises(PlanError, match="Is a directory"):
        signed_plan.clear(str(tmp_path))
    with pytest.raises(PlanError, match="cannot be read: No such file") as caught:
        signed_plan.read(str(tmp_path / "other.plan"))
    assert caught.value.code == "plan_unreadable"


# --- the handle


def test_each_host_is_given_its_share_and_only_that(tmp_path):
    found = document({"rack1": sweep_twice(thing("jail", "v1"))}, unseen=["h9"])
    found.update(idle=["h2"], refused={"h3": "latched"})
    handle = signed_plan.opened(found, str(tmp_path / "plan.sqlite"), NOW + 5)
    assert "hosts" not in handle and handle["now"] == NOW + 5 and handle["budget"] == found["budget"]
    common = {"plan": found["plan"], "made_at": NOW, "epoch": 7, "now": NOW + 5}
    assert signed_plan.share_of(handle, "h1") == dict(common, absent=None, **found["hosts"]["h1"])
    nothing = {"machine_id": None, "acts": [], "begins": []}
    for host, why in (("h2", "idle"), ("h3", "refused"), ("h9", "unseen"), ("h' OR 1", "missing")):
        assert signed_plan.share_of(handle, host) == dict(common, absent=why, **nothing)


def test_what_awx_would_cut_is_refused():
    signed_plan.check_artifact("x" * signed_plan.MAX_ARTIFACT)
    with pytest.raises(PlanError, match="524289 bytes.*write it to reap_plan_path") as caught:
        signed_plan.check_artifact("x" * (signed_plan.MAX_ARTIFACT + 1))
    assert caught.value.code == "plan_too_large"
