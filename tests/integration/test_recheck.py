# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Right before the first removal of a batch the live source is asked once more."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hosts.fleet import Fleet, Sweep

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.timeout(180),
    pytest.mark.skipif(os.geteuid() != 0, reason="test hosts need root"),
]

FEW = {"live": 2, "orphans": 2, "containers": 0, "running_orphans": 0, "zombies": 0}
QUICK = {"reap_min_age": 0, "reap_strike_interval": 0.1}


def document(fleet: Fleet, **changes) -> dict:
    """Return the list of this moment."""
    fleet.list_live(generated_at=time.time() + 25)
    return dict(json.loads((fleet.state / "live.json").read_text()), **changes)


def answers_in_turn(path: Path, answers: list[Callable[[], str]]) -> None:
    """Give another answer to each reader of ``path``, a pipe."""
    os.mkfifo(path)

    def serve() -> None:
        for answer in answers:
            with path.open("w") as stream:  # waits until somebody reads
                stream.write(answer())
            time.sleep(0.5)  # until the reader has seen the end

    threading.Thread(target=serve, daemon=True).start()


def second_sweep(fleet: Fleet, place: Path, again: Callable[[], str]) -> Sweep:
    """Sweep twice; the second time the source answers ``again()`` when it is asked once more."""
    extra = ["-e", json.dumps(QUICK)]
    document(fleet)
    assert fleet.sweep(*extra, timeout=120).code == 0
    time.sleep(0.3)
    path = place / "pipe"
    answers_in_turn(path, [lambda: json.dumps(document(fleet)), again])
    source = {"reap_live_sources": [{"type": "file", "path": str(path)}]}
    return fleet.sweep(*extra, "-e", json.dumps(source), timeout=120)


def test_what_lives_again_is_spared_and_the_rest_goes(pair: Fleet, tmp_path: Path) -> None:
    pair.plant(FEW)
    first = sorted(pair.hosts())[0]
    risen = pair.planted()[first]["orphans"][0]

    def again() -> str:
        whole = document(pair)
        vms = [*whole["vms"], {"vm_id": risen, "host": first, "state": "starting"}]
        return json.dumps(dict(whole, vms=vms, count=len(vms)))

    swept = second_sweep(pair, tmp_path, again)
    outcomes = {(one["vm_id"], one["outcome"]) for one in swept.outcomes()}
    assert swept.code == 0, swept.output
    assert {what for vm_id, what in outcomes if vm_id == risen} == {"deferred"}
    assert {what for vm_id, what in outcomes if vm_id != risen} == {"reaped"}
    assert "spared: asked once more, the live source lists the VM here" in swept.output
    assert {line.split()[-1].rpartition("/")[2].removeprefix("hyper-rw-") for line in pair.left(first)} == {risen}
    assert pair.left(sorted(pair.hosts())[1]) == []


def test_what_the_control_plane_takes_back_meanwhile_is_spared(pair: Fleet, tmp_path: Path) -> None:
    pair.plant(FEW)
    first, second = sorted(pair.hosts())
    swept = second_sweep(pair, tmp_path, lambda: json.dumps(document(pair, budget={first: 1, "*": 2})))
    assert swept.code == 0, swept.output
    assert "spared: asked once more, the live source has a budget of 1 VMs for this host" in swept.output
    dead = pair.planted()[first]["orphans"]
    assert {line.split()[-1].rpartition("/")[2].removeprefix("hyper-rw-") for line in pair.left(first)} == set(dead)
    assert pair.left(second) == []


@pytest.mark.parametrize(
    ("again", "code"),
    [
        (lambda whole: "", "not_a_manifest"),
        (lambda whole: json.dumps(dict(whole, complete=False)), "incomplete"),
        (lambda whole: json.dumps(dict(whole, epoch=1)), "epoch_went_back"),
        (lambda whole: json.dumps(dict(whole, realm="other")), "other_realm"),
    ],
    ids=lambda one: one if isinstance(one, str) else "",
)
def test_a_source_that_fails_now_stops_all(
    pair: Fleet, tmp_path: Path, again: Callable[[dict], str], code: str
) -> None:
    pair.plant(FEW)
    swept = second_sweep(pair, tmp_path, lambda: again(document(pair)))
    assert {one["outcome"] for one in swept.outcomes()} == {"deferred"}, swept.output
    assert f"did not answer once more ({code})" in swept.output.replace("\n", " ")
    assert pair.check("there") == []
    # It costs nothing but time.
    document(pair)
    assert pair.sweep("-e", json.dumps(QUICK), timeout=120).code == 0
    assert pair.check("gone") == []
