# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Carrying out a plan, with kinds that do what a test wants, in real children and with a real ledger."""

from __future__ import annotations

import json
import os
import signal
import time
import types

import pytest
from ansible_collections.microvm.reaper.plugins.module_utils import acts
from ansible_collections.microvm.reaper.plugins.module_utils import ledger as ledgers
from ansible_collections.microvm.reaper.plugins.module_utils import resource as r
from ansible_collections.microvm.reaper.plugins.module_utils.probe import Host, ProbeError, boottime

REALM = "prod"
STRIKE = {"identity": "i", "vm_id": "v1", "strikes": 2, "first": 1.0, "last": 1.0, "boot_id": "b"}


class Model:
    """Kinds whose objects are files, and whose acts go into a log."""

    def __init__(self, directory):
        self.directory = directory
        self.log = directory / "log"

    def kind(self, name, **replaced):
        """Return a kind; every function of it may be replaced."""
        functions = {
            "inspect": lambda token, rules, host: self._look(token),
            "stop": lambda token, rules, host: self._note("stop", token),
            "remove": lambda token, rules, host: self._remove(token),
        }
        return types.SimpleNamespace(KIND=name, **dict(functions, **replaced))

    def make(self, *names):
        """Make objects; return their tokens. A name is ``kind/name``, with a ! what runs and is to be stopped."""
        tokens = []
        for name in names:
            kind, _slash, own = name.rstrip("!").partition("/")
            (self.directory / own).touch()
            tokens.append({
                "kind": kind, "name": own, "vm_id": "v1", "identity": "i", "stop": name.endswith("!"), "details": {},
                "parent": None,
            })
        return tokens

    def done(self):
        """Return what was done, in order."""
        return self.log.read_text().split() if self.log.exists() else []

    def _note(self, act, token):
        with open(self.log, "a") as stream:
            stream.write("%s:%s\n" % (act, token["name"]))

    def _look(self, token):
        return None if (self.directory / token["name"]).exists() else r.outcome(token, r.ALREADY_GONE)

    def _remove(self, token):
        refused = self._look(token)
        if refused:
            return refused
        self._note("remove", token)
        (self.directory / token["name"]).unlink()
        return r.outcome(token, r.REAPED, bytes_given_back=7)


@pytest.fixture
def model(tmp_path):
    return Model(tmp_path)


@pytest.fixture
def state(tmp_path):
    return str(tmp_path / "state")


def hands(*kinds, seconds=20.0):
    return acts.Hands({}, Host(boottime() + seconds), kinds)


def plan(tokens, state, **changes):
    before = ledgers.load(state, REALM)[0]
    strikes = {"%(kind)s %(name)s" % token: STRIKE for token in tokens}
    ledger = {"host": "h1", "machine_id": "m", "manifest": before["manifest"], "strikes": strikes}
    ledger.update({"intents": [], "aside": []}, **changes)
    return {"realm": REALM, "reap": tokens, "ledger": ledger, "generation": before["generation"]}


def apply(tokens, state, *kinds, **changes):
    with hands(*kinds) as some:
        return acts.apply(plan(tokens, state, **changes), some, state, REALM)


def results(outcomes):
    return [one["outcome"] for one in outcomes]


def test_all_that_runs_is_stopped_before_anything_is_removed(model, state):
    tokens = model.make("container/a!", "dm/b", "cgroup/c!")
    outcomes = apply(tokens, state, model.kind("container"), model.kind("dm"), model.kind("cgroup"))
    assert results(outcomes) == ["reaped"] * 3
    assert model.done() == ["stop:a", "stop:c", "remove:a", "remove:b", "remove:c"]
    ledger = ledgers.load(state, REALM)[0]
    assert (ledger["strikes"], ledger["intents"], ledger["generation"], ledger["host"]) == ({}, [], 2, "h1")


def test_what_could_not_be_stopped_is_not_removed(model, state):
    stuck = model.kind("cgroup", stop=lambda token, rules, host: r.outcome(token, r.DEFERRED, "unkillable"))
    outcomes = apply(model.make("cgroup/a!", "cgroup/b"), state, stuck)
    assert results(outcomes) == ["deferred", "reaped"]
    assert model.done() == ["remove:b"]
    assert list(ledgers.load(state, REALM)[0]["strikes"]) == ["cgroup a"]


def broken(err):
    def act(token, rules, host):
        raise err

    return act


@pytest.mark.parametrize("err", [OSError(5, "I/O error"), ProbeError("no answer"), KeyError("x"), MemoryError()])
def test_one_failure_does_not_stop_the_others(model, state, err):
    outcomes = apply(model.make("bad/a", "good/b"), state, model.kind("bad", remove=broken(err)), model.kind("good"))
    assert results(outcomes) == ["failed", "reaped"]
    assert outcomes[0]["message"]
    # How far it came nobody knows.
    assert [token["name"] for token in ledgers.load(state, REALM)[0]["intents"]] == ["a"]


def test_row_37_a_host_that_can_start_no_process(model, state, monkeypatch):
    def no_process(_function):
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(acts, "Worker", no_process)
    outcomes = apply(model.make("cgroup/a"), state, model.kind("cgroup", prepare=lambda *_all: {}))
    assert results(outcomes) == ["failed"]


def test_a_child_that_dies_is_a_failure_of_one_item(model, state):
    def die(token, rules, host):
        if token["name"] == "a":
            os.kill(os.getpid(), signal.SIGKILL)
        return r.outcome(token, r.REAPED)

    outcomes = apply(model.make("bad/a", "bad/b"), state, model.kind("bad", remove=die))
    assert results(outcomes) == ["failed", "reaped"]


def test_an_act_that_hangs_costs_its_kind_and_no_other(model, state, monkeypatch):
    monkeypatch.setattr(acts, "ACT_SECONDS", 0.3)
    hanging = model.kind("bad", remove=lambda token, rules, host: time.sleep(60))
    tokens = model.make("bad/a", "bad/b", "good/c")
    tokens[1]["resume"] = True
    begin = time.monotonic()
    outcomes = apply(tokens, state, hanging, model.kind("good"))
    assert time.monotonic() - begin < 5
    assert results(outcomes) == ["failed", "deferred", "reaped"]
    assert "hung" in outcomes[0]["message"] and "not tried" in outcomes[1]["message"]
    # The one that hung may yet be done; the one that an earlier reaper began is still begun.
    assert [token["name"] for token in ledgers.load(state, REALM)[0]["intents"]] == ["a", "b"]


def test_no_act_begins_when_the_time_is_up(model, state):
    tokens = model.make("slow/a", "slow/b")
    with hands(model.kind("slow", remove=lambda *_all: time.sleep(60)), seconds=0.2) as some:
        assert results(acts.apply(plan(tokens, state), some, state, REALM)) == ["failed", "deferred"]


def test_row_29_a_plan_of_another_generation_is_void(model, state):
    tokens = model.make("cgroup/a")
    old = plan(tokens, state)
    written = ledgers.save(state, REALM, ledgers.empty(REALM))
    with hands(model.kind("cgroup")) as some, pytest.raises(ledgers.Busy, match="generation 0, now 1"):
        acts.apply(old, some, state, REALM)
    assert (model.done(), ledgers.load(state, REALM)[0]) == ([], written)


def test_row_29_nobody_acts_without_the_lock(model, state):
    tokens = model.make("cgroup/a")
    with ledgers.Lock(state), hands(model.kind("cgroup")) as some, pytest.raises(ledgers.Busy):
        acts.apply(plan(tokens, state), some, state, REALM)
    assert model.done() == []


def test_row_32_who_cannot_remember_does_not_reap(model, state):
    os.makedirs(os.path.join(state, REALM), mode=0o700)
    os.chmod(os.path.join(state, REALM), 0o777)
    with pytest.raises(ledgers.LedgerError):
        apply(model.make("cgroup/a"), state, model.kind("cgroup"))
    assert model.done() == []


def test_row_32_what_was_done_is_told_even_if_it_cannot_be_written_down(model, state, monkeypatch):
    save = ledgers.save

    def once(*arguments):
        monkeypatch.setattr(ledgers, "save", broken_save)
        return save(*arguments)

    def broken_save(*_arguments):
        raise ledgers.LedgerError("No space left on device")

    monkeypatch.setattr(ledgers, "save", once)
    assert results(apply(model.make("cgroup/a"), state, model.kind("cgroup"))) == ["reaped"]
    assert [token["name"] for token in ledgers.load(state, REALM)[0]["intents"]] == ["a"]
    monkeypatch.setattr(ledgers, "save", broken_save)
    with pytest.raises(ledgers.LedgerError, match="nothing was removed"):
        apply(model.make("cgroup/b"), state, model.kind("cgroup"))
    assert model.done() == ["remove:a"]


def test_row_30_a_reaper_that_is_killed_leaves_its_intents_and_the_next_one_ends_the_same(model, state):
    tokens = model.make("cgroup/a", "dm/b", "dm/c")
    reached = model.directory / "reached"

    def wait_at_b(token, rules, host):
        if token["name"] == "b":
            reached.touch()
            time.sleep(60)
        return model._remove(token)

    pid = os.fork()
    if pid == 0:
        try:
            apply(tokens, state, model.kind("cgroup"), model.kind("dm", remove=wait_at_b))
        finally:
            os._exit(1)
    deadline = time.monotonic() + 10
    while not reached.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    ledger = ledgers.load(state, REALM)[0]
    assert [token["name"] for token in ledger["intents"]] == ["a", "b", "c"]
    assert len(ledger["strikes"]) == 3
    # Nobody knows how far it came: should the VM show up, something of it may be gone.
    assert list(ledger["reaped"]) == ["v1"]
    # The lock went with the process, although a child of it still hangs.
    outcomes = apply(tokens, state, model.kind("cgroup"), model.kind("dm"))
    assert results(outcomes) == ["already_gone", "reaped", "reaped"]
    assert model.done() == ["remove:a", "remove:b", "remove:c"]
    ledger = ledgers.load(state, REALM)[0]
    assert (ledger["intents"], ledger["strikes"]) == ([], {})


def test_what_a_kind_calls_unfinished_stays_an_intent(model, state):
    half = model.kind("dm", remove=lambda token, *_all: dict(r.outcome(token, r.FAILED, "half"), unfinished=True))
    kept = dict(model.make("dm/old")[0], name="old")
    apply(model.make("dm/a"), state, half, intents=[kept])
    assert [token["name"] for token in ledgers.load(state, REALM)[0]["intents"]] == ["old", "a"]


@pytest.mark.parametrize(
    ("result", "stays"), [(r.REAPED, False), (r.ALREADY_GONE, False), (r.IDENTITY_CHANGED, False), (r.DEFERRED, True)]
)
def test_strikes_after_the_acts(model, state, result, stays):
    apply(model.make("dm/a"), state, model.kind("dm", remove=lambda token, *_all: r.outcome(token, result)))
    ledger = ledgers.load(state, REALM)[0]
    assert (list(ledger["strikes"]), ledger["intents"]) == (["dm a"] if stays else [], [])


def test_a_plan_without_acts_is_written_once(model, state):
    assert apply([], state) == []
    assert ledgers.load(state, REALM)[0]["generation"] == 1


def test_proof_is_added_before_the_acts(model, state):
    seen = []
    kind = model.kind("dm", prepare=lambda tokens, rules, host: {token["name"]: {"proof": 1} for token in tokens})
    kind.remove = lambda token, *_all: dict(r.outcome(token, r.FAILED), unfinished=True)
    apply(model.make("dm/a"), state, kind)
    seen = ledgers.load(state, REALM)[0]["intents"]
    assert seen[0]["details"] == {"proof": 1}


def test_without_proof_the_acts_go_on(model, state):
    kind = model.kind("dm", prepare=broken(ProbeError("no thin_dump")))
    assert results(apply(model.make("dm/a"), state, kind)) == ["reaped"]


# --- together ------------------------------------------------------------------------------------------------------


def together(model, name, at_once, **replaced):
    """Return a kind that removes so many at once, and notes how many it was given."""

    def remove_all(tokens, rules, host):
        model._note("given", {"name": str(len(tokens))})
        return [model._remove(token) for token in tokens[:at_once]]

    return model.kind(name, **dict({"remove_all": remove_all}, **replaced))


def test_a_kind_that_can_is_given_many_and_again_what_it_did_not_come_to(model, state):
    names = ["jail/%02d" % number for number in range(7)]
    heard = []
    tokens = model.make("dm/z", *names)
    with hands(together(model, "jail", 3), model.kind("dm")) as some:
        outcomes = acts.carry_out(tokens, some, ["jail", "dm"], heard.append)
    assert [one["name"] for one in outcomes] == [name[5:] for name in names] + ["z"]
    assert results(outcomes) == ["reaped"] * 8 and heard == outcomes
    given = [entry[6:] for entry in model.done() if entry.startswith("given")]
    assert given == ["7", "4"]  # the last one alone needs nobody to share with
    assert model.done()[-2:] == ["remove:06", "remove:z"]


def test_no_more_are_given_than_may_be_left_undecided(model, state, monkeypatch):
    monkeypatch.setattr(acts, "TOGETHER", 2)
    outcomes = apply(model.make("jail/a", "jail/b", "jail/c", "jail/d!"), state, together(model, "jail", 9))
    assert results(outcomes) == ["reaped"] * 4
    assert [entry for entry in model.done() if entry.startswith("given")] == ["given:2", "given:2"]


def test_when_they_hang_together_each_of_them_is_unfinished_and_remembered(model, state, monkeypatch):
    monkeypatch.setattr(acts, "ACT_SECONDS", 0.3)
    monkeypatch.setattr(acts, "TOGETHER", 2)
    tokens = model.make("jail/a", "jail/b", "jail/c", "dm/d")
    for number, one in enumerate(tokens):
        one["vm_id"] = "v%d" % number
    hanging = together(model, "jail", 9, remove_all=lambda *_all: time.sleep(60))
    outcomes = apply(tokens, state, hanging, model.kind("dm"))
    assert results(outcomes) == ["failed", "failed", "deferred", "reaped"]
    assert "remove hung, of this one or of another of 2" in outcomes[0]["message"]
    ledger = ledgers.load(state, REALM)[0]
    assert [token["name"] for token in ledger["intents"]] == ["a", "b"]
    # Something of the first two may be gone: should they live, a person has to hear of it.
    assert sorted(ledger["reaped"]) == ["v0", "v1", "v3"]


@pytest.mark.parametrize("remove_all", [broken(ProbeError("no answer")), lambda *_all: [], lambda *_all: [1, 2, 3, 4]])
def test_what_cannot_be_done_together_is_done_one_by_one(model, state, remove_all):
    def bad_one(token, rules, host):
        if token["name"] == "b":
            raise OSError(5, "I/O error")
        return model._remove(token)

    kind = together(model, "jail", 9, remove_all=remove_all, remove=bad_one)
    outcomes = apply(model.make("jail/a", "jail/b", "jail/c"), state, kind)
    assert results(outcomes) == ["reaped", "failed", "reaped"]


def test_a_child_that_dies_of_one_of_many_is_a_failure_of_that_one(model, state):
    def die(token, rules, host):
        if token["name"] == "b":
            os.kill(os.getpid(), signal.SIGKILL)
        return model._remove(token)

    kind = together(
        model, "jail", 9, remove=die, remove_all=lambda tokens, *more: [die(token, *more) for token in tokens]
    )
    outcomes = apply(model.make("jail/a", "jail/b", "jail/c"), state, kind)
    # The first was done by the child that died.
    assert results(outcomes) == ["already_gone", "failed", "reaped"]
    assert [token["name"] for token in ledgers.load(state, REALM)[0]["intents"]] == ["b"]


# --- check mode ------------------------------------------------------------------------------------------------------


def test_check_mode_looks_and_leaves_everything_as_it_is(model, state):
    tokens = model.make("container/a!", "dm/b", "dm/c")
    (model.directory / "c").unlink()
    before = sorted(os.listdir(model.directory))
    with hands(model.kind("container"), model.kind("dm")) as some:
        assert results(acts.foresee(tokens, some)) == ["would_reap", "would_reap", "already_gone"]
    assert (sorted(os.listdir(model.directory)), os.path.exists(state)) == (before, False)


def busy(*holders):
    return lambda token, *_all: r.outcome(token, r.DEFERRED, "busy", holders=holders)


def test_check_mode_knows_that_what_is_in_the_way_goes_first(model):
    tokens = model.make("container/a", "snapshot/b")
    in_plan, not_in_plan = r.holder("container", "a", kind="container"), r.holder("lease", "l")
    for holders, expected in (((in_plan,), "would_reap"), ((in_plan, not_in_plan), "deferred"), ((), "deferred")):
        with hands(model.kind("container"), model.kind("snapshot", inspect=busy(*holders))) as some:
            assert results(acts.foresee(tokens, some)) == ["would_reap", expected]
    stopping = model.make("cgroup/c!", "dm/d")
    with hands(model.kind("cgroup"), model.kind("dm", inspect=busy(r.holder("process", "5")))) as some:
        assert results(acts.foresee(stopping, some)) == ["would_reap", "would_reap"]


def test_outcomes_and_ledgers_are_json(model, state):
    json.dumps(apply(model.make("dm/a"), state, model.kind("dm")))


def test_what_is_spared_stays_and_is_told():
    tokens = [
        {"kind": "cgroup", "name": "a", "vm_id": "v1"},
        {"kind": "jail", "name": "b", "vm_id": "v2"},
        {"kind": "dm_thin", "name": "c", "vm_id": "v2", "resume": True},
    ]
    intents = [{"kind": "dm_thin", "name": "z", "vm_id": "v3"}]
    whole = {"reap": tokens, "ledger": {"intents": intents, "aside": [], "strikes": {}}}
    plan, outcomes = acts.spared(whole, {"v2": "it lives"})
    assert plan["reap"] == tokens[:1]
    assert [(one["name"], one["outcome"], one["message"]) for one in outcomes] == [
        ("b", r.DEFERRED, "spared: it lives"),
        ("c", r.DEFERRED, "spared: it lives"),
    ]
    # A removal that was begun is not forgotten.
    assert [one["name"] for one in plan["ledger"]["intents"]] == ["z", "c"]
    assert acts.spared(whole, {}) == (whole, [])


def test_only_what_was_removed_stays_remembered_as_reaped(model, state):
    tokens = model.make("cgroup/a")
    busy = {"remove": lambda token, rules, host: r.outcome(token, r.DEFERRED, "busy")}
    assert results(apply(tokens, state, model.kind("cgroup", **busy))) == ["deferred"]
    assert ledgers.load(state, REALM)[0]["reaped"] == {}
    assert results(apply(tokens, state, model.kind("cgroup"))) == ["reaped"]
    assert list(ledgers.load(state, REALM)[0]["reaped"]) == ["v1"]


def test_after_the_deadline_nothing_more_is_tried(model, state):
    """However quick each act is: what is left is left for the next sweep."""
    tokens = model.make("cgroup/a", "cgroup/b", "dm/c")
    late = {"remove": lambda token, rules, host: (time.sleep(0.3), r.outcome(token, r.REAPED))[1]}
    with hands(model.kind("cgroup", **late), model.kind("dm"), seconds=0.2) as some:
        done = acts.apply(plan(tokens, state), some, state, REALM)
    told = [(one["outcome"], "reap_deadline" in one["message"]) for one in done]
    assert told[1:] == [("deferred", True)] * 2 and "c" not in str(model.done())
