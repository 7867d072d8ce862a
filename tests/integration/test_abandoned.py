# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""abandoned_vmms on a real PostgreSQL with omicron's tables while others write to them, and playbooks/abandoned.yml."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import psycopg
import pytest
import yaml
from ansible_collections.microvm.reaper.plugins.module_utils import abandoned
from ansible_collections.microvm.reaper.plugins.module_utils import ledger as ledgers
from hosts.fleet import write_list
from integration import postgresql
from psycopg import sql

ROOT = Path(__file__).resolve().parent.parent.parent
SLED, OTHER_SLED = "11111111-0000-4000-8000-000000000001", "11111111-0000-4000-8000-000000000002"
STATES = (
    "creating starting running stopping stopped rebooting migrating failed destroyed saga_unwound"
).split()
OVER = {"failed", "destroyed", "saga_unwound"}
SCHEMA = """
CREATE TYPE vmm_state AS ENUM ('%s');
CREATE TYPE sled_resource_vmm_state AS ENUM ('tombstoned', 'active', 'target');
CREATE TABLE vmm (
    id uuid PRIMARY KEY, time_created timestamptz NOT NULL, time_deleted timestamptz, instance_id uuid NOT NULL,
    sled_id uuid NOT NULL, state vmm_state NOT NULL, time_state_updated timestamptz NOT NULL,
    state_generation int8 NOT NULL, failure_reason text,
    CHECK ((state = 'failed') = (failure_reason IS NOT NULL)));
CREATE TABLE sled_resource_vmm (
    id uuid PRIMARY KEY, sled_id uuid NOT NULL, hardware_threads int8 NOT NULL, rss_ram int8 NOT NULL,
    reservoir_ram int8 NOT NULL, instance_id uuid, state sled_resource_vmm_state NOT NULL);
CREATE UNIQUE INDEX ON sled_resource_vmm (instance_id, state) WHERE state <> 'tombstoned';
CREATE TABLE instance (
    id uuid PRIMARY KEY, active_propolis_id uuid, target_propolis_id uuid, migration_id uuid, time_deleted timestamptz);
""" % "', '".join(STATES)


class Plane:
    """A control plane's database, with omicron's tables."""

    def __init__(self, server: postgresql.Server, more: str = ""):
        self.server, self.name = server, server.database(SCHEMA + more)
        self.connection = server.connect(self.name)

    def sql(self, statement: str, *parameters) -> list[tuple]:
        cursor = self.connection.execute(statement.encode(), parameters or None)
        return cursor.fetchall() if cursor.description else []

    def instance(self, active: str | None = None, target: str | None = None, deleted: bool = False) -> str:
        """Add an instance."""
        one = str(uuid.uuid4())
        when = "now() - interval '1 hour'" if deleted else "NULL"
        self.sql(f"INSERT INTO instance VALUES (%s, %s, %s, NULL, {when})", one, active, target)
        return one

    def vmm(
        self,
        state: str = "destroyed",
        *,
        vm_id: str | None = None,
        instance: str | None = None,
        deleted: bool = False,
        age: float = 3600,
        sled: str = SLED,
        reservation: str | None = "active",
    ) -> str:
        """Add a record whose instance is missing unless given, and its reservation; return its id."""
        vm_id, instance = vm_id or str(uuid.uuid4()), instance or str(uuid.uuid4())
        self.sql(
            "INSERT INTO vmm VALUES (%s, now() - interval '1 day', CASE WHEN %s THEN now() - interval '30 min' END, %s,"
            " %s, %s, now() - %s * interval '1 second', 1, %s)",
            *(vm_id, deleted, instance, sled, state, age, "reboot" if state == "failed" else None),
        )
        if reservation:
            self.reservation(reservation, vm_id=vm_id, instance=instance, sled=sled)
        return vm_id

    def reservation(
        self, state: str = "tombstoned", *, vm_id: str | None = None, instance: str | None = None, sled: str = SLED
    ) -> str:
        """Add a reservation."""
        vm_id = vm_id or str(uuid.uuid4())
        self.sql("INSERT INTO sled_resource_vmm VALUES (%s, %s, 4, 1, 1, %s, %s)", vm_id, sled, instance, state)
        return vm_id

    def open_records(self) -> set[str]:
        """Return the ids of the records that are not deleted."""
        return {str(row[0]) for row in self.sql("SELECT id FROM vmm WHERE time_deleted IS NULL")}

    def reserved(self) -> set[str]:
        return {str(row[0]) for row in self.sql("SELECT id FROM sled_resource_vmm")}

    def rows(self) -> dict[str, list[tuple]]:
        """Return every row, with what a write or a lock would change of it."""
        tables = ("vmm", "sled_resource_vmm", "instance")
        return {name: self.sql(f"SELECT xmin::text, xmax::text, t.* FROM {name} t ORDER BY t.id") for name in tables}

    def database(self, *, age: float = 60.0, timeout: float = 30.0, **options) -> abandoned.Database:
        values = {"terminal": sorted(OVER), "tombstoned": ["tombstoned"], "min_age": age}
        return abandoned.Database(self.server.options(self.name, **options), abandoned.NAMES, values, timeout)

    def settle(self, facts=None, *, most: int = 5000, strike: float = 0.0, check_mode: bool = False, **database):
        """Settle with the hosts that answered; ours had nothing unless said otherwise."""
        seen = abandoned.Seen({SLED: []} if facts is None else facts)
        with self.database(**database) as opened:
            return abandoned.Settling(opened, seen, most, strike, check_mode=check_mode)

    def module(self, name: str = "abandoned_vmms", *, check_mode: bool = False, verbosity: int = 3, **params) -> dict:
        """Run the module itself, as ansible does; return its result and, as ``output``, all that it printed."""
        options = self.server.options(self.name)
        given = {
            "conninfo": psycopg.conninfo.make_conninfo(**{k: v for k, v in options.items() if k != "password"}),
            "password": options["password"],
            **({"facts": {SLED: []}, "facts_age": 0, "strike_interval": 0} if name == "abandoned_vmms" else {}),
            **params,
        }
        given = {key: value for key, value in given.items() if value is not None}
        how = {"_ansible_check_mode": check_mode, "_ansible_diff": True, "_ansible_verbosity": verbosity}
        program = (
            "import sys; from ansible.module_utils import basic; basic._ANSIBLE_ARGS = sys.stdin.buffer.read();"
            "basic._ANSIBLE_PROFILE = 'legacy';"
            f"from ansible_collections.microvm.reaper.plugins.modules import {name} as module; module.main()"
        )
        done = subprocess.run(
            [sys.executable, "-c", program],
            input=json.dumps({"ANSIBLE_MODULE_ARGS": {**given, **how}}),
            env={**os.environ, "PYTHONPATH": str(ROOT / "collections")},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.stdout.startswith("\n{"), done.stdout + done.stderr
        return dict(json.loads(done.stdout), output=done.stdout + done.stderr)


@pytest.fixture
def plane(postgres: postgresql.Server) -> Plane:
    return Plane(postgres)


def numbers(settling, **others: int) -> None:
    """Compare the counters; those not given must be 0."""
    found = settling if isinstance(settling, dict) else settling.counters
    assert found == {**dict.fromkeys(abandoned.COUNTERS, 0), **others}


def meanwhile(monkeypatch: pytest.MonkeyPatch, do) -> None:
    """Do something between the list and the first transaction."""
    look = abandoned.look

    def look_and_do(*arguments):
        found = look(*arguments)
        do()
        return found

    monkeypatch.setattr(abandoned, "look", look_and_do)


# --- the rule


def pointers(vm_id: str) -> dict[str, dict | None]:
    """Return the instances that there can be, by what they name; None is one that is missing."""
    other = str(uuid.uuid4())
    return {
        "missing": None,
        "names nobody": {},
        "active is it": {"active": vm_id},
        "target is it": {"target": vm_id},
        "both are it": {"active": vm_id, "target": vm_id},
        "active is another": {"active": other},
        "target is another": {"target": other},
        "active is another, target is it": {"active": other, "target": vm_id},
        "active is it, target is another": {"active": vm_id, "target": other},
        "both are others": {"active": other, "target": other},
        "deleted, names nobody": {"deleted": True},
        "deleted, active is it": {"active": vm_id, "deleted": True},
    }


def names_it(instance: dict | None, vm_id: str) -> bool:
    return bool(instance) and vm_id in (instance.get("active"), instance.get("target"))


def test_the_whole_truth_table_of_records(plane: Plane) -> None:
    """State x time_deleted x instance x reservation; what is to go is said here in Python, NULL is None."""
    abandoned_ones, stale, kept = set(), set(), set()
    cases = itertools.product(STATES, (False, True), pointers(""), (None, "active", "target", "tombstoned"))
    for state, deleted, which, reservation in cases:
        vm_id = str(uuid.uuid4())
        instance = pointers(vm_id)[which]
        owner = plane.instance(**instance) if instance is not None else None
        plane.vmm(state, vm_id=vm_id, instance=owner, deleted=deleted, reservation=reservation)
        over = state in OVER and not names_it(instance, vm_id)
        if over and not deleted:
            abandoned_ones.add(vm_id)
        elif over and reservation == "tombstoned":
            stale.add(vm_id)
        else:
            kept.add(vm_id)
    assert (len(abandoned_ones), len(stale), len(kept)) == (3 * 6 * 4, 3 * 6, 960 - 72 - 18)
    opened, reserved = plane.open_records(), plane.reserved()
    before = dict(plane.sql("SELECT id, time_deleted FROM vmm"))
    done = plane.settle()
    numbers(
        done,
        vmms_found=72,
        vmms_deleted=72,
        sled_reservations_deleted=3 * 6 * 3 + 18,
        reservations_stale=18,
    )
    assert opened - plane.open_records() == abandoned_ones
    assert reserved - plane.reserved() == reserved & (abandoned_ones | stale)
    after = dict(plane.sql("SELECT id, time_deleted FROM vmm"))
    assert {vm_id for vm_id in before if str(vm_id) not in abandoned_ones and before[vm_id] != after[vm_id]} == set()
    numbers(plane.settle())


def test_null_hides_nothing(plane: Plane) -> None:
    """Of these four a naive <> finds one, and an INNER JOIN three."""
    plane.vmm()
    plane.vmm(instance=plane.instance())
    plane.vmm(instance=plane.instance(active=str(uuid.uuid4())))
    plane.vmm(instance=plane.instance(active=str(uuid.uuid4()), target=str(uuid.uuid4())))
    naive = "v.id <> i.active_propolis_id AND v.id <> i.target_propolis_id"
    safe = "v.id IS DISTINCT FROM i.active_propolis_id AND v.id IS DISTINCT FROM i.target_propolis_id"
    count = "SELECT count(*) FROM vmm v {} JOIN instance i ON i.id = v.instance_id WHERE {}"
    assert plane.sql(count.format("LEFT", naive)) == [(1,)]
    assert plane.sql(count.format("INNER", safe)) == [(3,)]
    numbers(plane.settle(), vmms_found=4, vmms_deleted=4, sled_reservations_deleted=4)


def test_the_whole_truth_table_of_reservations(plane: Plane) -> None:
    """State x record x instance of the reservation."""
    stale = set()
    records = {"none": None, "open": ("running", False), "over": ("destroyed", False), "deleted": ("destroyed", True)}
    records["deleted in a state that is not over"] = ("running", True)
    cases = itertools.product(("tombstoned", "active", "target"), records, ["null", *pointers("")])
    for state, record, which in cases:
        vm_id = str(uuid.uuid4())
        instance = pointers(vm_id).get(which)
        owner = plane.instance(**instance) if instance is not None else None if which == "null" else str(uuid.uuid4())
        if records[record]:
            # Named by its own instance, so that nothing goes because of the record but what is deleted.
            own = owner or str(uuid.uuid4())
            if record == "over" and not names_it(instance, vm_id):
                own = plane.instance(active=vm_id)
            plane.vmm(records[record][0], vm_id=vm_id, instance=own, deleted=records[record][1], reservation=None)
        plane.reservation(state, vm_id=vm_id, instance=owner)
        alone = which in ("null", "missing", "deleted, names nobody")
        free = not names_it(instance, vm_id)
        if state == "tombstoned" and (record == "none" and alone or record == "deleted" and free):
            stale.add(vm_id)
    assert len(stale) == 3 + 7
    reserved, opened = plane.reserved(), plane.open_records()
    numbers(plane.settle(), reservations_stale=10, sled_reservations_deleted=10)
    assert reserved - plane.reserved() == stale
    assert plane.open_records() == opened


def test_a_start_in_flight_is_never_touched(plane: Plane) -> None:
    """The reservation is there before its record; also when its instance cannot be seen yet."""
    owner = plane.instance()
    plane.reservation("active", instance=owner)
    plane.reservation("target", instance=owner)
    plane.reservation("active", instance=None)
    before = plane.rows()
    numbers(plane.settle())
    assert plane.rows() == before


def test_what_changed_after_the_hosts_were_looked_at_is_young(plane: Plane) -> None:
    young, old = plane.vmm(age=100), plane.vmm(age=200)
    leaked = plane.vmm(age=3600, deleted=True, reservation="tombstoned")
    plane.sql("UPDATE vmm SET time_deleted = now() - interval '100 s' WHERE id = %s", leaked)
    ahead = plane.vmm(age=-500)
    done = plane.settle(age=150.0)
    numbers(
        done, vmms_found=3, vmms_deleted=1, reservations_stale=1, young=3, sled_reservations_deleted=1
    )
    assert plane.open_records() == {young, ahead} and old not in plane.reserved()
    # facts_age and min_age add up.
    assert plane.module(facts_age=60, min_age=60, check_mode=True)["counters"]["young"] == 3
    assert plane.module(facts_age=60, min_age=30, check_mode=True)["counters"]["young"] == 1


def test_the_facts_grow_older_while_others_are_settled(plane: Plane, monkeypatch) -> None:
    vm_id = plane.vmm(age=3600)

    def touch():
        plane.sql("UPDATE vmm SET time_state_updated = now()")
        time.sleep(0.5)

    meanwhile(monkeypatch, touch)
    done = plane.settle(age=0.1)
    assert [found.verdict for found in done.left] == [abandoned.CHANGED] and plane.open_records() == {vm_id}


# --- what the hosts say


def test_what_a_host_still_has_is_a_conflict_and_stays(plane: Plane) -> None:
    here, elsewhere, stale, goes = plane.vmm(), plane.vmm(), plane.reservation(), plane.vmm()
    facts = {SLED: [here.upper(), stale.replace("-", ""), "unrelated"], OTHER_SLED: [elsewhere]}
    result = plane.module(facts=facts)
    numbers(
        result["counters"],
        vmms_found=3,
        reservations_stale=1,
        conflicts=3,
        vmms_deleted=1,
        sled_reservations_deleted=1,
    )
    assert {(one["id"], one["verdict"]) for one in result["left"]} == {
        (one, "conflict") for one in (here, elsewhere, stale)
    }
    assert f"conflict: vmm {elsewhere}: something of it is still on {OTHER_SLED}" in result["report"]
    assert plane.open_records() == {here, elsewhere} and goes not in plane.reserved()


def test_what_is_on_a_host_that_did_not_answer_is_unknown_and_stays(plane: Plane) -> None:
    away, here = plane.vmm(sled=OTHER_SLED), plane.vmm()
    gone_too = plane.reservation(sled=OTHER_SLED)
    done = plane.settle()
    numbers(done, vmms_found=2, vmms_deleted=1, sled_reservations_deleted=1, reservations_stale=1, unknown=2)
    assert plane.open_records() == {away} and plane.reserved() == {away, gone_too} and here
    numbers(plane.settle({}), vmms_found=1, reservations_stale=1, unknown=2)


# --- others who write at the same time


def test_somebody_else_deletes_first(plane: Plane, monkeypatch) -> None:
    marked, leaking, removed, ours = (plane.vmm() for _ in range(4))

    def delete():
        plane.sql("DELETE FROM sled_resource_vmm WHERE id IN (%s, %s)", marked, removed)
        plane.sql("UPDATE vmm SET time_deleted = '2026-01-01T00:00Z' WHERE id IN (%s, %s)", marked, leaking)
        plane.sql("DELETE FROM vmm WHERE id = %s", removed)

    meanwhile(monkeypatch, delete)
    done = plane.settle()
    numbers(done, vmms_found=4, vmms_deleted=1, vmms_already_deleted=3, sled_reservations_deleted=2)
    assert {found.id for found in done.gone} == {ours, leaking}
    # What they lost halfway is finished, and their time stays.
    assert plane.reserved() == set()
    times = {str(key): when for key, when in plane.sql("SELECT id, time_deleted FROM vmm")}
    assert times[marked].year == times[leaking].year == 2026 and times[marked].month == times[leaking].month == 1


def test_two_reapers_at_once_settle_each_once(plane: Plane) -> None:
    for _ in range(60):
        plane.vmm()
        plane.reservation()
    done: list = []
    workers = [threading.Thread(target=lambda: done.append(plane.settle())) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    counters = [one.counters for one in done]
    assert [one["errors"] for one in counters] == [0, 0], [one.failed for one in done]
    assert sum(one["vmms_deleted"] for one in counters) == 60
    assert sum(one["sled_reservations_deleted"] for one in counters) == 120
    assert plane.open_records() == set() and plane.reserved() == set()


@pytest.mark.parametrize("column", ["active_propolis_id", "target_propolis_id"])
def test_an_instance_that_is_pointed_at_it_after_the_list(plane: Plane, monkeypatch, column: str) -> None:
    owner = plane.instance()
    vm_id, stale = plane.vmm(instance=owner), plane.vmm(deleted=True, instance=owner, reservation="tombstoned")
    other = plane.vmm()
    meanwhile(monkeypatch, lambda: plane.sql(f"UPDATE instance SET {column} = %s WHERE id = %s", vm_id, owner))
    done = plane.settle()
    numbers(done, vmms_found=2, vmms_deleted=1, reservations_stale=1, sled_reservations_deleted=2)
    assert [(found.id, found.verdict) for found in done.left] == [(vm_id, abandoned.CHANGED)]
    assert plane.open_records() == {vm_id} and plane.reserved() == {vm_id} and stale and other


@pytest.mark.parametrize("what", ["vmm", "reservation"])
def test_an_instance_that_is_being_pointed_at_it_in_a_transaction_still_open(plane: Plane, what: str) -> None:
    """We wait for its lock, cannot serialize behind it, begin again, and see it."""
    owner = plane.instance()
    vm_id = plane.vmm(instance=owner, deleted=what == "reservation", reservation="tombstoned")
    done: list = []
    with plane.server.connect(plane.name, autocommit=False) as writer:
        writer.execute("UPDATE instance SET active_propolis_id = %s WHERE id = %s", (vm_id, owner))
        settler = threading.Thread(target=lambda: done.append(plane.settle()))
        settler.start()
        wait_until(lambda: plane.sql("SELECT 1 FROM pg_locks WHERE NOT granted"))
    settler.join()
    assert [found.verdict for found in done[0].left] == [abandoned.CHANGED] and done[0].failed == []
    assert plane.reserved() == {vm_id}
    assert "could not serialize access" in plane.server.log


def wait_until(true, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_lock_that_somebody_does_not_let_go_costs_one_error(plane: Plane) -> None:
    held, goes = plane.vmm(), plane.vmm()
    with plane.server.connect(plane.name, autocommit=False) as writer:
        writer.execute("SELECT 1 FROM vmm WHERE id = %s FOR UPDATE", (held,))
        done = plane.settle(timeout=0.3)
    numbers(done, vmms_found=2, vmms_deleted=1, sled_reservations_deleted=1, errors=1)
    assert "timeout" in done.failed[0]["message"]
    assert plane.open_records() == plane.reserved() == {held} and goes


# --- a database that does something else than it is told

TRIGGER = """
CREATE FUNCTION meddle() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {} END $$;
CREATE TRIGGER meddle BEFORE {} ON {} FOR EACH ROW EXECUTE FUNCTION meddle();
"""


def meddle(plane: Plane, body: str, on: str = "DELETE", table: str = "sled_resource_vmm") -> None:
    plane.sql(TRIGGER.format(body, on, table))


@pytest.mark.parametrize(
    "body, said",
    [
        ("IF OLD.id = '{}' THEN RAISE EXCEPTION 'no, not this one'; END IF; RETURN OLD;", "no, not this one"),
        ("IF OLD.id = '{}' THEN RETURN NULL; END IF; RETURN OLD;", "its reservation was deleted and is still there"),
    ],
    ids=["fails", "does nothing"],
)
def test_a_record_whose_reservation_cannot_be_deleted_is_not_marked(plane: Plane, body: str, said: str) -> None:
    ids = sorted(plane.vmm() for _ in range(5))
    stuck = ids[2]
    meddle(plane, body.format(stuck))
    result = plane.module()
    numbers(result["counters"], vmms_found=5, vmms_deleted=4, sled_reservations_deleted=4, errors=1)
    assert result["failed"] and result["changed"]
    assert f"1 could not be settled: vmm {stuck}: " in result["msg"] and said in result["msg"]
    assert [(one["id"], said in one["message"]) for one in result["errors"]] == [(stuck, True)]
    assert plane.open_records() == plane.reserved() == {stuck}
    # It is listed again, and goes when it can.
    plane.sql("DROP TRIGGER meddle ON sled_resource_vmm")
    numbers(plane.module()["counters"], vmms_found=1, vmms_deleted=1, sled_reservations_deleted=1)


def test_a_record_that_cannot_be_marked_keeps_its_reservation(plane: Plane) -> None:
    vm_id = plane.vmm()
    meddle(plane, "RETURN NULL;", "UPDATE", "vmm")
    done = plane.settle()
    numbers(done, vmms_found=1, errors=1)
    assert "could not be marked deleted" in done.failed[0]["message"]
    assert plane.reserved() == {vm_id}


@pytest.mark.parametrize("code", ["40001", "40P01"])
def test_what_cannot_be_serialized_is_tried_again(plane: Plane, code: str) -> None:
    plane.vmm()
    plane.reservation()
    plane.sql("CREATE SEQUENCE tries")
    # A sequence is not rolled back: it counts the tries.
    again = f"RAISE EXCEPTION 'x' USING ERRCODE = '{code}';"
    meddle(plane, f"IF nextval('tries') % 4 <> 0 THEN {again} END IF; RETURN OLD;")
    numbers(
        plane.settle(), vmms_found=1, vmms_deleted=1, reservations_stale=1, sled_reservations_deleted=2
    )
    assert plane.sql("SELECT last_value FROM tries") == [(8,)]


def test_what_can_never_be_serialized_is_given_up_and_the_others_go_on(plane: Plane) -> None:
    ids = sorted(plane.vmm() for _ in range(3))
    plane.sql("CREATE SEQUENCE tries")
    meddle(
        plane,
        f"IF OLD.id = '{ids[0]}' THEN PERFORM nextval('tries'); RAISE EXCEPTION 'x' USING ERRCODE = '40001'; END IF;"
        " RETURN OLD;",
    )
    began = time.monotonic()
    numbers(plane.settle(), vmms_found=3, vmms_deleted=2, sled_reservations_deleted=2, errors=1)
    assert plane.sql("SELECT last_value FROM tries") == [(abandoned.RETRIES + 1,)]
    assert 1 < time.monotonic() - began < 10
    assert plane.open_records() == {ids[0]}


def test_a_connection_that_is_lost_ends_it_and_what_was_settled_is_told(plane: Plane) -> None:
    ids = sorted(plane.vmm() for _ in range(3))
    kill = f"IF OLD.id = '{ids[1]}' THEN PERFORM pg_terminate_backend(pg_backend_pid()); END IF; RETURN OLD;"
    meddle(plane, kill)
    result = plane.module()
    numbers(result["counters"], vmms_found=3, vmms_deleted=1, sled_reservations_deleted=1, errors=1)
    assert result["failed"] and result["changed"]
    assert "the connection to the database was lost" in result["msg"]
    assert [one["id"] for one in result["settled"]] == [ids[0]]
    assert plane.open_records() == set(ids[1:])


# --- strikes


def test_a_stale_reservation_is_looked_at_twice(plane: Plane) -> None:
    plane.reservation()
    began = time.monotonic()
    numbers(plane.settle(strike=1.0), reservations_stale=1, sled_reservations_deleted=1)
    assert 1 <= time.monotonic() - began < 5


def test_nobody_waits_where_nothing_is_stale(plane: Plane) -> None:
    plane.vmm()
    plane.reservation(sled=OTHER_SLED)
    began = time.monotonic()
    plane.reservation("active")
    numbers(
        plane.settle(strike=30.0),
        vmms_found=1,
        vmms_deleted=1,
        sled_reservations_deleted=1,
        reservations_stale=1,
        unknown=1,
    )
    assert time.monotonic() - began < 10


def test_the_second_look_is_by_the_clock_of_the_database(plane: Plane, monkeypatch) -> None:
    stale = plane.reservation()
    monkeypatch.setattr(abandoned.time, "sleep", lambda seconds: None)
    done = plane.settle(strike=5.0)
    assert [found.verdict for found in done.left] == [abandoned.CHANGED]
    assert plane.reserved() == {stale}


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE sled_resource_vmm SET state = 'active'",
        f"UPDATE sled_resource_vmm SET sled_id = '{OTHER_SLED}'",
        "UPDATE sled_resource_vmm SET instance_id = gen_random_uuid()",
        "INSERT INTO instance SELECT gen_random_uuid(), id FROM sled_resource_vmm;"
        "UPDATE sled_resource_vmm SET instance_id = (SELECT id FROM instance)",
        "INSERT INTO vmm SELECT id, now(), NULL, gen_random_uuid(), sled_id, 'starting', now(), 1"
        " FROM sled_resource_vmm",
    ],
)
def test_a_reservation_that_is_another_at_the_second_look_stays(plane: Plane, monkeypatch, change: str) -> None:
    stale = plane.reservation()
    meanwhile(monkeypatch, lambda: plane.sql(change))
    done = plane.settle()
    numbers(done, reservations_stale=1)
    assert [found.verdict for found in done.left] == [abandoned.CHANGED]
    assert plane.reserved() == {stale}


# --- how much


def test_2500_records_in_pages_in_check_mode_and_for_real(plane: Plane, monkeypatch) -> None:
    plane.sql(
        "INSERT INTO vmm SELECT gen_random_uuid(), now() - interval '1 day', NULL, gen_random_uuid(), %s, 'destroyed',"
        " now() - interval '1 hour', 1 FROM generate_series(1, 2500)",
        SLED,
    )
    plane.sql("INSERT INTO sled_resource_vmm SELECT id, sled_id, 1, 1, 1, instance_id, 'active' FROM vmm")
    plane.sql(
        "INSERT INTO sled_resource_vmm SELECT gen_random_uuid(), %s, 1, 1, 1, NULL, 'tombstoned'"
        " FROM generate_series(1, 1001)",
        SLED,
    )
    pages = []
    run = abandoned.Database._run

    def counted(self, name, **how):
        pages.extend([(name, how["page"])] if "page" in how else [])
        return run(self, name, **how)

    monkeypatch.setattr(abandoned.Database, "_run", counted)
    foreseen = plane.settle(check_mode=True)
    names = ["first_records", "next_records", "next_records", "first_reservations", "next_reservations"]
    assert pages == [(name, 1000) for name in names]
    numbers(
        foreseen, vmms_found=2500, vmms_deleted=2500, reservations_stale=1001, sled_reservations_deleted=3501
    )
    done = plane.settle()
    assert done.counters == foreseen.counters
    assert plane.open_records() == plane.reserved() == set()


@pytest.mark.parametrize("rows", [0, 999, 1000, 1001, 2000])
def test_a_page_may_be_just_full(plane: Plane, rows: int) -> None:
    plane.sql(
        "INSERT INTO vmm SELECT gen_random_uuid(), now() - interval '1 day', NULL, gen_random_uuid(), %s, 'destroyed',"
        " now() - interval '1 hour', 1 FROM generate_series(1, %s)",
        SLED,
        rows,
    )
    assert plane.settle(check_mode=True).counters["vmms_found"] == rows


@pytest.mark.parametrize("check_mode", [False, True])
def test_more_than_max_aborts_before_the_first_change(plane: Plane, check_mode: bool) -> None:
    for _ in range(3):
        plane.vmm()
    plane.reservation()
    plane.vmm(sled=OTHER_SLED)
    before = plane.rows()
    result = plane.module(max=3, check_mode=check_mode)
    assert result["failed"] and not result.get("changed")
    assert result["msg"] == (
        "nothing was changed: stopped before the first change: 3 records and 1 reservations would go, more than max=3; "
        "raise max if this is right"
    )
    assert plane.rows() == before
    assert plane.module(max=4, check_mode=check_mode)["counters"]["vmms_deleted"] == 3


# --- the modules


def mixed(plane: Plane) -> dict:
    """Have one of each; return the facts for it."""
    conflict = plane.vmm()
    for state in sorted(OVER):
        plane.vmm(state, instance=plane.instance(active=str(uuid.uuid4())))
    plane.vmm("running", instance=plane.instance())
    plane.vmm(reservation=None)
    plane.vmm(sled=OTHER_SLED)
    plane.vmm(age=1)
    plane.vmm(deleted=True, reservation="tombstoned")
    plane.reservation()
    plane.reservation("active")
    return {SLED: [conflict]}


MIXED = {
    "vmms_found": 7,
    "vmms_deleted": 4,
    "sled_reservations_deleted": 5,
    "reservations_stale": 2,
    "conflicts": 1,
    "unknown": 1,
    "young": 1,
}


def test_check_mode_has_the_same_numbers_and_only_reads(plane: Plane) -> None:
    """As a user who has no right but to select; not even a lock is left on a row."""
    facts = mixed(plane)
    plane.sql("CREATE ROLE looks LOGIN PASSWORD 'looks'")
    try:
        plane.sql("GRANT SELECT ON ALL TABLES IN SCHEMA public TO looks")
        before, said = plane.rows(), len(plane.server.log)
        options = {k: v for k, v in plane.server.options(plane.name, user="looks").items() if k != "password"}
        conninfo = psycopg.conninfo.make_conninfo(**options)
        foreseen = plane.module(facts=facts, check_mode=True, conninfo=conninfo, password="looks")
        looked = plane.module(
            "abandoned_vmm_facts", facts=facts, facts_age=0, conninfo=conninfo, password="looks"
        )
        began = [line for line in plane.server.log[said:].splitlines() if "BEGIN" in line]
        assert len(began) == 2 and all(line.endswith("REPEATABLE READ READ ONLY") for line in began), began
        assert plane.rows() == before
    finally:
        plane.sql("DROP OWNED BY looks; DROP ROLE looks")
    numbers(foreseen["counters"], **MIXED)
    assert foreseen["changed"] and foreseen["msg"].endswith("(check mode: nothing was changed)")
    found = looked["ansible_facts"]["abandoned_vmms"]
    numbers(found["counters"], **{**MIXED, "vmms_deleted": 0, "sled_reservations_deleted": 0})
    assert sorted(one["verdict"] for one in found["found"]) == ["abandoned"] * 6 + ["conflict", "unknown", "young"]
    assert not looked["changed"]
    done = plane.module(facts=facts)
    assert done["counters"] == foreseen["counters"]
    assert done["diff"] == foreseen["diff"]
    assert sorted(done["diff"]["before"].splitlines()) == sorted(
        f"{one['what']} {one['id']}" for one in done["settled"]
    )
    assert done["diff"]["after"] == "" and len(done["settled"]) == 6


def test_the_second_run_changes_nothing(plane: Plane) -> None:
    facts = mixed(plane)
    assert plane.module(facts=facts)["changed"]
    before = plane.rows()
    again = plane.module(facts=facts)
    assert not again["changed"] and not again.get("failed")
    numbers(again["counters"], vmms_found=3, conflicts=1, unknown=1, young=1)
    assert (again["settled"], again["diff"]["before"]) == ([], "")
    assert plane.rows() == before


def test_a_user_with_the_rights_of_the_page_and_no_others(plane: Plane) -> None:
    """docs/records.md says which; they are read there."""
    grants = [line.strip() for line in (ROOT / "docs/records.md").read_text().splitlines() if "GRANT" in line]
    assert len(grants) == 3
    facts = mixed(plane)
    plane.sql("CREATE ROLE reaper LOGIN PASSWORD 'reaper'")
    try:
        for grant in grants:
            plane.sql(grant)
        done = plane.settle(facts, user="reaper", password="reaper")
        numbers(done, **MIXED)
    finally:
        plane.sql("DROP OWNED BY reaper; DROP ROLE reaper")


def test_a_replica_can_be_looked_at_and_not_settled(plane: Plane, tmp_path: Path) -> None:
    plane.vmm()
    password = tmp_path / "password"
    password.write_text(postgresql.PASSWORD + "\n")
    with plane.server.replica() as replica:
        options = replica.options(plane.name)
        options.pop("password")
        conninfo = psycopg.conninfo.make_conninfo(**options)
        with_file = {"conninfo": conninfo, "password": None, "password_file": str(password)}
        result = plane.module(**with_file)
        assert result["msg"].startswith("nothing was changed: cannot connect to the database: ")
        assert "read-only" in result["msg"]
        looked = plane.module("abandoned_vmm_facts", **with_file)
        assert looked["ansible_facts"]["abandoned_vmms"]["counters"]["unknown"] == 1


def test_other_tables_are_named_in_the_error(postgres: postgresql.Server) -> None:
    plane = Plane(postgres)
    result = plane.module(records={"table": "machines"})
    assert 'relation "machines" does not exist' in result["msg"]
    assert "name them in records, reservations, instances" in result["msg"]
    result = plane.module(instances={"active": "current"})
    assert "current does not exist" in result["msg"]


def test_no_password_is_ever_shown(plane: Plane, tmp_path: Path) -> None:
    secret = "Geheim-7%41"
    path = tmp_path / "password"
    path.write_text(secret + "\n")
    for given in (
        {"password": secret},
        {"password": None, "password_file": str(path)},
        {"password": None, "conninfo": f"host=127.0.0.1 password={secret}"},
        {"password": None, "conninfo": "postgresql://u:Geheim-7%2541@127.0.0.1/x"},
        {"password": None, "conninfo": f"host 127.0.0.1 {secret}"},
    ):
        result = plane.module(**given)
        assert result["failed"]
        assert "Geheim" not in result["output"], result["output"]


def test_without_psycopg_the_library_is_named(plane: Plane, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "psycopg.py").write_text("raise ImportError('none here')")
    path = f"{tmp_path}:{ROOT / 'collections'}"
    program = (
        "import sys; from ansible.module_utils import basic; basic._ANSIBLE_PROFILE = 'legacy';"
        "basic._ANSIBLE_ARGS = b'{\"ANSIBLE_MODULE_ARGS\": {\"facts\": {}, \"facts_age\": 0}}';"
        "from ansible_collections.microvm.reaper.plugins.modules import abandoned_vmms as module; module.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert "Failed to import the required Python library (psycopg)" in json.loads(done.stdout)["msg"]


# --- hostile values

HOSTILE = [
    '"; DROP TABLE vmm; --', "'; DROP TABLE vmm; --", "a\"b", "a'b", 'a""b', "a''b", "\\", "\\'", "$1", "$$", "%",
    "%s", "%(id)s", "%%", "{", "}", "{}", "{v_id}", "{records}", "{{ 7 * 7 }}", "{% raw %}", "$(reboot)",
    "`reboot`", "| reboot", "; reboot", "&& reboot", "-- comment", "/* comment */", "*/", "NULL", "null", "None",
    "true", "0", "-1", "1e309", "NaN", "select", "table", "user", "order", "from", "*", "vmm", "VMM", "v", "i",
    "r", " ", "  leading", "trailing  ", "a b", "tab\there", "ünïcödé", "日本語", "𝒳", "\u202egnp", "\u200b", "é",
    "e\u0301", "-dash", "--", "..", "../..", "/etc/passwd", "a/b", "a\\b", "a:b", "a,b", "a=b", "a@b", "a#b",
    "a?b", "a!b", "a~b", "a^b", "a&b", "<script>", "[1]", "(1)", "E'\\n'", "U&'\\0061'", "::text", "id::int",
    "ANY", "now()", "pg_sleep(9)", "host=evil", "@file", "~root", "\x1b[2J", "\x07", "new\nline", "\r", "\x7f",
    "a" * 63, "a" * 64, "a" * 4096, "ß" * 31, "'" * 40, '"' * 40, "{" * 40,
]  # fmt: skip

TEXT_SCHEMA = """
CREATE TABLE vmm (id text PRIMARY KEY, time_created timestamptz DEFAULT now() - interval '1 day',
    time_deleted timestamptz, instance_id text, sled_id text, state text, time_state_updated timestamptz);
CREATE TABLE sled_resource_vmm (id text PRIMARY KEY, sled_id text, instance_id text, state text);
CREATE TABLE instance (id text PRIMARY KEY, active_propolis_id text, target_propolis_id text, time_deleted timestamptz);
"""


def test_hostile_ids_hosts_and_states_are_data(postgres: postgresql.Server) -> None:
    assert len(set(HOSTILE)) >= 100
    dbname = postgres.database(TEXT_SCHEMA)
    values = {"terminal": HOSTILE, "tombstoned": ["tombstoned", *HOSTILE], "min_age": 60.0}
    with postgres.connect(dbname) as connection:
        for number, text in enumerate(HOSTILE):
            row = (text, text, text, text)
            connection.execute("INSERT INTO vmm (id, instance_id, sled_id, state) VALUES (%s, %s, %s, %s)", row)
            connection.execute("INSERT INTO sled_resource_vmm VALUES (%s, %s, %s, %s)", row)
            connection.execute("INSERT INTO sled_resource_vmm VALUES (%s, %s, %s, %s)", ("r" + text, text, None, text))
            if number % 3 == 0:
                connection.execute("INSERT INTO instance VALUES (%s, %s)", (text, text))
        named = {text for number, text in enumerate(HOSTILE) if number % 3 == 0}
        # Every third is seen on a host of its own; ids that differ only in case are taken for one.
        seen = [text for number, text in enumerate(HOSTILE) if number % 3 == 1]
        facts = {**{text: [] for text in HOSTILE}, "elsewhere": seen}
        conflicts = {text for text in HOSTILE if abandoned.normal(text) in set(map(abandoned.normal, seen))} - named
        with abandoned.Database(postgres.options(dbname), abandoned.NAMES, values) as database:
            done = abandoned.Settling(database, abandoned.Seen(facts), 5000, 0.0)
        assert done.failed == []
        going = set(HOSTILE) - named - conflicts
        assert 30 < len(going) < 40
        marked = {row[0] for row in connection.execute("SELECT id FROM vmm WHERE time_deleted IS NOT NULL")}
        assert marked == going
        left = {row[0] for row in connection.execute("SELECT id FROM sled_resource_vmm")}
        assert left == named | conflicts
        numbers(
            done,
            vmms_found=len(HOSTILE) - len(named),
            vmms_deleted=len(going),
            reservations_stale=len(HOSTILE),
            sled_reservations_deleted=len(going) + len(HOSTILE),
            conflicts=len(conflicts),
        )
        assert abandoned.failures([{"what": "vmm", "id": text, "message": ""} for text in HOSTILE]).isprintable()


def test_hostile_names_of_tables_and_columns_are_names(postgres: postgresql.Server) -> None:
    dbname = postgres.database()
    fit = [text for text in HOSTILE if text.isprintable() and 0 < len(text.encode()) <= 63 and "." not in text]
    assert len(fit) > 85
    for number, text in enumerate(fit):
        names = {kind: dict(columns, table=f"{kind}_{number}") for kind, columns in abandoned.NAMES.items()}
        # In each table another of them is the hostile one: the table, the id, the state, the time of deletion, ...
        for kind, columns in names.items():
            columns[sorted(columns)[number % len(columns)]] = text if kind == "records" else f"{text[:20]}{number}"
        make_tables(postgres, dbname, names)
        values = {"terminal": ["gone"], "tombstoned": ["tombstoned"], "min_age": 60.0}
        with abandoned.Database(postgres.options(dbname), names, values) as database:
            numbers(
                abandoned.Settling(database, abandoned.Seen({"h": []}), 10, 0.0),
                vmms_found=1,
                vmms_deleted=1,
                reservations_stale=1,
                sled_reservations_deleted=2,
            )
            numbers(abandoned.Settling(database, abandoned.Seen({"h": []}), 10, 0.0))


def make_tables(server: postgresql.Server, dbname: str, names: dict) -> None:
    """Make the three tables by these names, with one abandoned record, one that lives, and one stale reservation."""
    times = ("created", "changed", "deleted")
    with server.connect(dbname) as connection:
        for kind, columns in names.items():
            table = sql.Identifier(columns["table"])
            defined = [
                sql.SQL("{} {}").format(sql.Identifier(name), sql.SQL("timestamptz" if meaning in times else "text"))
                for meaning, name in columns.items()
                if meaning != "table"
            ]
            connection.execute(sql.SQL("DROP TABLE IF EXISTS {}").format(table))
            connection.execute(sql.SQL("CREATE TABLE {} ({})").format(table, sql.SQL(", ").join(defined)))
            for row in {
                "records": [
                    {"id": "a", "instance": "i", "host": "h", "state": "gone", "created": "2020-01-01"},
                    {"id": "b", "instance": "i", "host": "h", "state": "gone", "created": "2020-01-01"},
                ],
                "reservations": [
                    {"id": "a", "instance": "i", "host": "h", "state": "active"},
                    {"id": "c", "instance": "none", "host": "h", "state": "tombstoned"},
                ],
                "instances": [{"id": "i", "active": "b", "target": None, "deleted": None}],
            }[kind]:
                insert = sql.SQL("INSERT INTO {} ({}) VALUES ({})").format(
                    sql.Identifier(columns["table"].replace("%", "%%")),
                    sql.SQL(", ").join(sql.Identifier(columns[meaning].replace("%", "%%")) for meaning in row),
                    sql.SQL(", ").join([sql.Placeholder()] * len(row)),
                )
                connection.execute(insert, list(row.values()))


# --- after a sweep

RACKS = {"rack1": SLED, "rack2": OTHER_SLED}


class Sweeps:
    """Sweeps over this machine by several names, each with jails of its own, and the playbook that settles records."""

    def __init__(self, plane: Plane, directory: Path):
        self.plane, self.directory = plane, directory
        self.live = directory / "live.json"
        options = plane.server.options(plane.name)
        password = directory / "password"
        password.write_text(options.pop("password") + "\n")
        self.inventory = directory / "hosts.yml"
        self.inventory.write_text(yaml.safe_dump({"all": {"hosts": {rack: self._host(rack) for rack in RACKS}}}))
        self.variables = {
            "abandoned_conninfo": psycopg.conninfo.make_conninfo(**options),
            "abandoned_password_file": str(password),
            "abandoned_strike_interval": 0,
            "abandoned_min_age": 0,
            "reap_realm": "test",
            "reap_presets": ["firecracker-jailer"],
            "reap_kinds": ["jail"],
            "reap_live_sources": [{"type": "file", "path": str(self.live)}],
            "reap_min_age": 0,
            "reap_strike_interval": 0,
            "reap_hold": 0,
        }
        for rack in RACKS:
            (directory / rack).mkdir()

    def _host(self, rack: str) -> dict:
        return {
            "ansible_connection": "local",
            "ansible_python_interpreter": sys.executable,
            "reap_host_id": RACKS[rack],
            "reap_jail_bases": [str(self.directory / rack)],
            "reap_state_dir": str(self.directory / f"state-{rack}"),
        }

    def jail(self, rack: str, vm_id: str) -> Path:
        path = self.directory / rack / "firecracker" / vm_id
        (path / "root").mkdir(parents=True)
        return path

    def latch(self, rack: str) -> None:
        """Let a host remember that something was reaped that lived."""
        latch = {"code": "latched", "message": "v1 was alive"}
        state = str(self.directory / f"state-{rack}")
        ledgers.save(state, "test", dict(ledgers.empty("test"), latch=latch))

    def run(
        self, *arguments: str, playbook: str = "playbooks/abandoned.yml", **variables
    ) -> subprocess.CompletedProcess:
        hosts = list(RACKS.values())
        vms = [{"vm_id": f"living{number}", "host": hosts[0], "state": "running"} for number in range(50)]
        document = {"realm": "test", "generated_at": time.time() + 25, "complete": True, "hosts": hosts, "vms": vms}
        write_list(self.live, document)
        given = json.dumps({**self.variables, **variables})
        argv = [str(Path(sys.executable).parent / "ansible-playbook"), "-i", str(self.inventory), playbook]
        env = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg")}
        return subprocess.run(
            [*argv, "-e", given, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=200
        )

    def settles(self, *arguments: str, code: int = 0, **variables) -> str:
        done = self.run(*arguments, **variables)
        assert done.returncode == code, done.stdout + done.stderr
        return " ".join((done.stdout + done.stderr).split())


@pytest.fixture
def sweeps(plane: Plane, tmp_path: Path) -> Sweeps:
    return Sweeps(plane, tmp_path)


@pytest.mark.timeout(300)
def test_a_sweep_in_batches_and_then_the_records_of_all_of_them(plane: Plane, sweeps: Sweeps) -> None:
    """What a host of the first batch has is a conflict for a record on a host of the second."""
    conflict, goes, away = plane.vmm(sled=OTHER_SLED), plane.vmm(sled=OTHER_SLED), plane.vmm(sled=str(uuid.uuid4()))
    young, stale = plane.vmm(), plane.reservation()

    def settles(*arguments: str, **variables) -> str:
        """Sweep and settle, while one record goes on changing."""
        over = threading.Event()

        def change():
            with plane.server.connect(plane.name) as connection:
                while not over.wait(0.2):
                    connection.execute("UPDATE vmm SET time_state_updated = now() WHERE id = %s", (young,))

        changing = threading.Thread(target=change)
        changing.start()
        try:
            return sweeps.settles(*arguments, **variables)
        finally:
            over.set()
            changing.join()

    sweeps.jail("rack1", conflict)
    output = settles("--check", "--diff", reap_waves=[1, 1])
    said = "4 abandoned records and 1 stale reservation found; 1 record marked deleted, 2 reservations deleted; "
    assert said + "left alone: 1 conflict, 1 unknown, 1 young (check mode" in output
    assert f"-vmm {goes}" in output and f"-reservation {stale}" in output
    assert plane.open_records() == {conflict, goes, away, young} and stale in plane.reserved()
    output = settles(reap_waves=[1, 1])
    assert said + "left alone: 1 conflict, 1 unknown, 1 young" in output
    assert f"microvm.reaper: conflict: vmm {conflict}: something of it is still on {SLED}" in output
    assert plane.open_records() == {conflict, away, young} and stale not in plane.reserved()
    # A second sweep reaps the jail, a third settles the record of it.
    jail = sweeps.directory / "rack1" / "firecracker" / conflict
    settles()
    assert not jail.exists() and conflict in plane.open_records()
    output = settles()
    assert "3 abandoned records and 0 stale reservations found; 1 record marked deleted" in output
    assert plane.open_records() == {away, young}


@pytest.mark.timeout(300)
def test_a_host_that_does_not_answer_keeps_its_records(plane: Plane, sweeps: Sweeps) -> None:
    away, goes = plane.vmm(sled=OTHER_SLED), plane.vmm()
    document = yaml.safe_load(sweeps.inventory.read_text())
    document["all"]["hosts"]["rack2"].update(ansible_connection="ssh", ansible_ssh_common_args="-oProxyCommand=false")
    sweeps.inventory.write_text(yaml.safe_dump(document))
    output = sweeps.settles(code=4)
    assert "left alone: 1 unknown" in output
    assert "microvm.reaper: no record on rack2 is settled: it could not be looked at: " in output
    assert plane.open_records() == {away} and goes not in plane.reserved()


@pytest.mark.timeout(300)
def test_a_sweep_that_is_latched_settles_nothing(plane: Plane, sweeps: Sweeps) -> None:
    plane.vmm()
    plane.vmm(sled=OTHER_SLED)
    before = plane.rows()
    sweeps.latch("rack2")
    done = sweeps.run()
    assert done.returncode == 2 and "refused (latched)" in done.stdout, done.stdout
    assert plane.rows() == before
    # Also when the latch is in the last batch only, and the play goes on behind it.
    done = sweeps.run(reap_waves=[1, 1])
    assert done.returncode == 2 and "Settle" not in done.stdout.partition("PLAY RECAP")[0].rpartition("TASK")[2]
    assert plane.rows() == before


@pytest.mark.timeout(300)
def test_a_sweep_that_is_stopped_settles_nothing(plane: Plane, sweeps: Sweeps) -> None:
    plane.vmm()
    before = plane.rows()
    for number in range(3):
        sweeps.jail("rack1", f"dead{number}")
    sweeps.settles()
    numbers_before = plane.rows()
    assert numbers_before != before
    plane.vmm()
    before = plane.rows()
    done = sweeps.run(reap_max_per_fleet=1)
    assert done.returncode == 2 and "fleet_cap" in done.stdout, done.stdout
    assert plane.rows() == before


@pytest.mark.timeout(300)
def test_a_limited_sweep_settles_nothing_and_a_missing_database_is_named_first(plane: Plane, sweeps: Sweeps) -> None:
    plane.vmm()
    before = plane.rows()
    output = sweeps.settles("--limit", "rack1")
    assert output.count("skipping: no hosts matched") == 2 and "rack1: looked at jail" in output
    assert plane.rows() == before
    del sweeps.variables["abandoned_conninfo"]
    done = sweeps.run()
    assert done.returncode == 2 and "say how to reach the control plane" in done.stdout
    assert "Gather what belongs to VMs" not in done.stdout


@pytest.mark.timeout(300)
def test_in_a_play_in_batches_it_is_refused(sweeps: Sweeps) -> None:
    play = {
        "hosts": "all",
        "gather_facts": False,
        "serial": 1,
        "roles": ["microvm.reaper.reap"],
        "post_tasks": [
            {
                "name": "Know",
                "microvm.reaper.swept_vms": {"hosts": "{{ ansible_play_hosts_all }}"},
                "run_once": True,
                "register": "swept",
            }
        ],
    }
    path = sweeps.directory / "play.yml"
    path.write_text(yaml.safe_dump([play]))
    done = sweeps.run(playbook=str(path))
    assert done.returncode == 2, done.stdout
    assert "this play runs in batches (serial)" in done.stdout and "playbooks/abandoned.yml does" in done.stdout
    del play["serial"]
    path.write_text(yaml.safe_dump([play]))
    assert sweeps.settles(playbook=str(path))
