# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The source postgresql against a real server, and what goes wrong with databases."""

from __future__ import annotations

import contextlib
import gc
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import traceback
import uuid

import psycopg
import pytest
from ansible_collections.microvm.reaper.plugins.plugin_utils import manifest, sources
from ansible_collections.microvm.reaper.plugins.plugin_utils.sources import postgresql as source
from integration import postgresql
from unit import builders

TABLE = """
CREATE TABLE vm (id text, node text, st text, moving text[], gone timestamptz);
INSERT INTO vm VALUES ('v1', 'h1', 'running', NULL), ('v2', 'h2', 'running', '{h1,h3}'), ('v3', NULL, NULL, NULL);
"""
QUERY = "SELECT id AS vm_id, node AS host, st AS state, moving AS also_on, gone AS destroyed_at FROM vm"
MANY = "SELECT 'v' || n AS vm_id, 'h' || n %% 1000 AS host FROM generate_series(1, %d) AS n"
VMS = [
    {"vm_id": "v1", "host": "h1", "state": "running", "also_on": None},
    {"vm_id": "v2", "host": "h2", "state": "running", "also_on": ["h1", "h3"]},
    {"vm_id": "v3", "host": None, "state": None, "also_on": None},
]


class Asker:
    """Asks one database of the server through the source, as the project does."""

    def __init__(self, server, dbname, statements=TABLE, **options):
        self.server, self.dbname = server, dbname
        gc.collect()  # what nobody read to its end still has its transaction
        self.sql("DROP SCHEMA public CASCADE; CREATE SCHEMA public; GRANT USAGE ON SCHEMA public TO PUBLIC")
        self.sql(statements)
        self.options = {"type": "postgresql", **server.options(self.dbname), "query": QUERY, "retries": 0, **options}

    def checked(self, **others):
        wanted = {key: value for key, value in {**self.options, **others}.items() if value is not None}
        ((_module, options),) = sources.configured([wanted])
        return options

    def open(self, **others):
        document = source.fetch(self.checked(**others), context())
        document["vms"] = builders.vms_of(document["vms"])
        return document

    def whole(self, **others):
        document = self.open(**others)
        assert document["complete"] is False
        return {**document, "vms": list(document["vms"])} | {
            key: document.get(key) for key in ("complete", "proven", "count")
        } | {"tombstones": list(document["tombstones"])}

    def vms(self, query, **others):
        return self.whole(query=query, **others)["vms"]

    def ids(self, **others):
        return [vm["vm_id"] for vm in self.whole(**others)["vms"]]

    def refused(self, **others):
        with pytest.raises(manifest.ManifestError) as caught:
            self.whole(**others)
        said = "".join(traceback.format_exception(caught.value))
        assert postgresql.PASSWORD not in said
        return caught.value.code, str(caught.value)

    def index(self, path, **others):
        """Take it in as a sweep does; return what it says of h1 to h3."""
        wanted = {key: value for key, value in {**self.options, **others}.items() if value is not None}
        handle = sources.fetch([wanted], context(), str(path), max_age=600)
        return lambda *ids, host="h1": manifest.share(handle, host, set(ids))

    def still(self, *ids, epoch=None, **others):
        return source.still_listed(self.checked(**others), context(), set(ids), epoch)

    def sql(self, statement, parameters=None):
        return self.server.sql(statement, parameters, dbname=self.dbname)

    def backends(self):
        """Return the pids of the server's processes that work for the source."""
        rows = self.server.sql(
            "SELECT pid FROM pg_stat_activity WHERE application_name = 'microvm.reaper' AND datname = %s",
            (self.dbname,),
        )
        return [pid for (pid,) in rows]

    def when_busy(self, act):
        """Start a thread that calls ``act(pid)`` when the source waits for its query."""

        def watch():
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline:
                busy = self.server.sql(
                    "SELECT pid FROM pg_stat_activity WHERE application_name = 'microvm.reaper'"
                    " AND datname = %s AND wait_event = 'PgSleep'",
                    (self.dbname,),
                )
                if busy:
                    act(busy[0][0])
                    break
                time.sleep(0.02)

        thread = threading.Thread(target=watch)
        thread.start()
        return thread


def context(**others):
    told = {"realm": "prod", "now": time.time(), "directory": "/", "inventory": None}
    return {**told, "terminal_states": manifest.TERMINAL_STATES, **others}


@pytest.fixture(scope="module")
def dbname(postgres):
    return postgres.database()


@pytest.fixture
def ask(postgres, dbname):
    return Asker(postgres, dbname)


# --- what it says


def test_a_whole_list(ask):
    before = time.time()
    document = ask.whole()
    assert document["vms"] == VMS
    told = {key: document[key] for key in ("realm", "complete", "proven", "count", "hosts", "tombstones")}
    assert told == {"realm": "prod", "complete": True, "proven": True, "count": 3, "hosts": None, "tombstones": []}
    assert before - 1 < document["generated_at"] <= time.time()
    assert source.describe(ask.checked()) == "postgresql 127.0.0.1:%d/%s" % (ask.server.port, ask.dbname)
    assert ask.backends() == []


def test_row_01_an_empty_table_is_a_proven_empty_list(ask):
    ask.sql("DELETE FROM vm")
    document = ask.whole()
    assert (document["vms"], document["count"], document["complete"]) == ([], 0, True)


def test_all_the_ways_to_connect(ask):
    local = ask.server.options(ask.dbname)
    none = dict.fromkeys(("host", "port", "dbname", "user", "password"))
    url = "postgresql://%(user)s@%(host)s:%(port)s/%(dbname)s" % local
    pairs = "host=%(host)s port=%(port)s user=%(user)s dbname=%(dbname)s password='%(password)s'" % local
    for others in (
        dict(none, dsn=url, password=local["password"]),
        dict(none, dsn=pairs),
        {"password": None, "host": str(ask.server.directory)},
    ):
        assert ask.ids(**others) == ["v1", "v2", "v3"]
    assert source.describe(ask.checked(**none, dsn=pairs)) == source.describe(ask.checked())


def test_the_password_may_be_in_a_file(ask, tmp_path):
    (tmp_path / "secret").write_text(postgresql.PASSWORD + "\n")
    assert ask.ids(password=None, password_file=str(tmp_path / "secret")) == ["v1", "v2", "v3"]
    options = ask.checked(password=None, password_file="secret")
    options["password_file"] = "secret"
    (page,) = source.fetch(options, context(directory=str(tmp_path)))["vms"]
    assert len(page.vm_id) == 3


def test_any_query_that_has_a_vm_id(ask):
    assert ask.vms("SELECT 'v1' AS vm_id") == [{"vm_id": "v1", "host": None, "state": None, "also_on": None}]
    assert ask.vms("  -- what lives\n(SELECT id AS vm_id, 7 AS size FROM vm LIMIT 1);\n")[0]["vm_id"] == "v1"
    assert ask.vms("WITH a AS (SELECT id FROM vm) SELECT id AS vm_id FROM a WHERE id LIKE 'v%2' -- the end")
    code, said = ask.refused(query="SELECT id, node FROM vm")
    assert code == "bad_query" and "no column vm_id, only id, node: write ... AS vm_id" in said


def test_any_types(ask):
    ask.sql("CREATE TYPE st AS ENUM ('running')")
    one = uuid.UUID(int=7)
    typed = "'%s'::uuid AS vm_id, 4::bigint AS host, 'running'::st AS state" % one
    for also_on in ("ARRAY[5, 6]", "'[\"5\", 6]'::jsonb", "'[5, 6]'::json", "'[5, 6]'::varchar", "'{5,6}'::char(3)[]"):
        (vm,) = ask.vms("SELECT %s, %s AS also_on" % (typed, also_on))
        assert dict(vm, also_on=[host.strip() for host in vm["also_on"]]) == {
            "vm_id": str(one), "host": "4", "state": "running", "also_on": ["5", "6"]
        }


def test_row_10_null_everywhere(ask):
    for null in ("NULL::text[]", "NULL::jsonb", "'null'::json", "'null'", "'{}'::text[]", "NULL::uuid[]"):
        (vm,) = ask.vms(
            "SELECT 'v1' AS vm_id, NULL::uuid AS host, NULL AS state, %s AS also_on,"
            " NULL::timestamptz AS destroyed_at" % null
        )
        assert dict(vm, also_on=vm["also_on"] or None) == {"vm_id": "v1", "host": None, "state": None, "also_on": None}


@pytest.mark.parametrize(
    "also_on",
    ["ARRAY['h1', NULL]", "'h2'", "'{\"a\": 1}'::jsonb", "'[[\"h\"]]'::json", "'[true]'::json", "repeat('[', 99999)"],
)
def test_row_10_a_migration_that_cannot_be_read_is_refused(ask, also_on):
    code, said = ask.refused(query="SELECT 'v1' AS vm_id, %s AS also_on" % also_on)
    assert code == "not_a_manifest" and "also_on of 'v1' must be an array of hosts without NULL" in said


def test_row_10_a_state_nobody_knows_is_live(ask, tmp_path):
    ask.sql("INSERT INTO vm VALUES ('v4', 'h1', 'zzz'), ('v5', 'h1', 'Destroyed')")
    share = ask.index(tmp_path / "index")("v1", "v2", "v3", "v4", "v5")
    assert share["live"] == ["v1", "v2", "v3", "v4"]
    assert share["tombstones"] == {"v5": None}
    assert share["proven"] and share["count"] == 4


def test_row_09_tombstones(ask, tmp_path):
    now = time.time()
    ask.sql(
        "INSERT INTO vm VALUES ('d1', 'h1', NULL, NULL, now() - interval '1 h'),"
        " ('d2', 'h1', 'destroyed', NULL, now() - interval '2 h'), ('l1', 'h1', 'running', NULL, now()),"
        " ('l2', 'h1', NULL, NULL, now() + interval '1 h'), ('l3', 'h1', NULL, NULL, 'infinity')"
    )
    document = ask.whole()
    assert {vm["vm_id"] for vm in document["vms"]} == {"v1", "v2", "v3", "d2", "l1", "l2", "l3"}
    ended = {one["vm_id"]: now - one["destroyed_at"] for one in document["tombstones"]}
    assert set(ended) == {"d1", "d2", "l1"} and ended["d1"] == pytest.approx(3600, abs=30)
    share = ask.index(tmp_path / "index")("d1", "d2", "l1", "l2", "l3")
    assert share["live"] == ["l1", "l2", "l3"]
    assert {vm_id: round(since / 3600) for vm_id, since in share["tombstones"].items()} == {"d1": 1, "d2": 2}


def test_row_09_a_time_must_be_one(ask):
    for seconds in ("1800000000", "1800000000.5::float8", "1800000000.5::numeric"):
        assert ask.whole(query="SELECT 'v1' AS vm_id, %s - 1e9 AS destroyed_at" % seconds)["tombstones"]
    for wrong in ("now()::timestamp", "now()::date", "'2026-01-01'", "now()::text"):
        code, said = ask.refused(query="SELECT 'v1' AS vm_id, %s AS destroyed_at" % wrong)
        assert code == "bad_query" and "destroyed_at must be timestamptz" in said


def test_row_11_an_id_that_is_used_again_lives(ask, tmp_path):
    ask.sql("INSERT INTO vm VALUES ('v1', 'h1', NULL, NULL, now() - interval '1 h')")
    share = ask.index(tmp_path / "index")("v1")
    assert (share["live"], share["tombstones"]) == (["v1"], {})


def test_row_05_the_hosts_it_speaks_for(ask, tmp_path):
    ask.sql("CREATE TABLE node (name text); INSERT INTO node VALUES ('h1'), ('h2'), ('h3')")
    assert ask.whole(hosts_query="SELECT name, 1 FROM node;")["hosts"] == ["h1", "h2", "h3"]
    look = ask.index(tmp_path / "index", hosts_query="SELECT name FROM node")
    assert look("v1", host="h3")["host_known"] and not look("v1", host="h4")["host_known"]
    ask.sql("INSERT INTO node VALUES (NULL)")
    code, said = ask.refused(hosts_query="SELECT name FROM node")
    assert code == "bad_query" and "hosts_query returns NULL" in said


def test_row_05_another_realm(ask):
    ask.sql("CREATE TABLE realm (name text); INSERT INTO realm VALUES ('prod')")
    assert ask.whole(realm_query="SELECT name FROM realm")["realm"] == "prod"
    ask.sql("UPDATE realm SET name = 'staging'")
    for others in ({"realm_query": "SELECT name FROM realm"}, {"realm": "staging"}):
        code, said = ask.refused(**others)
        assert code == "other_realm" and "'staging', the sweep is for 'prod'" in said
        with pytest.raises(manifest.ManifestError, match="speaks for realm"):
            ask.still("v1", **others)
    ask.sql("UPDATE realm SET name = NULL")
    assert "realm_query must return one row" in ask.refused(realm_query="SELECT name FROM realm")[1]
    ask.sql("DELETE FROM realm")
    assert "realm_query must return one row" in ask.refused(realm_query="SELECT name FROM realm")[1]


# --- one moment, whole


def test_row_02_a_server_process_killed_midway(ask, monkeypatch):
    monkeypatch.setattr(source, "PAGE", 100)
    document = ask.open(query=MANY % 100000)
    for _number in range(150):
        next(document["vms"])
    ask.server.sql("SELECT pg_terminate_backend(%s)", tuple(ask.backends()))
    with pytest.raises(manifest.ManifestError) as caught:
        list(document["vms"])
    assert caught.value.code == "incomplete"
    # One more page was on its way when it died.
    assert re.search(r"after [23]00 rows", str(caught.value))
    for part in ("57P01 terminating connection", "see why the server ended the connection"):
        assert part in str(caught.value)
    assert document["complete"] is False and "tombstones" not in document


def test_row_02_fewer_rows_than_were_counted(ask):
    code, said = ask.refused(query="SELECT 'v1' AS vm_id FROM generate_series(1, 1000) WHERE random() < 0.5")
    assert code == "incomplete" and "counted" in said and "in one transaction" in said


def test_row_02_rows_that_change_midway_are_of_one_moment(ask, monkeypatch):
    monkeypatch.setattr(source, "PAGE", 10)
    ask.sql("INSERT INTO vm SELECT 'm' || n FROM generate_series(1, 997) AS n")
    document = ask.open()
    first = next(document["vms"])["vm_id"]
    ask.sql("DELETE FROM vm; INSERT INTO vm SELECT 'n' || n FROM generate_series(1, 5000) AS n")
    ids = [first, *(vm["vm_id"] for vm in document["vms"])]
    assert len(ids) == len(set(ids)) == document["count"] == 1000
    assert not any(vm_id.startswith("n") for vm_id in ids)
    assert document["complete"] is True
    assert len(ask.ids()) == 5000


def test_row_02_hosts_count_and_rows_are_of_one_moment(ask):
    change = ask.when_busy(lambda _pid: ask.sql("DELETE FROM vm WHERE id = 'v1'"))
    document = ask.whole(hosts_query="SELECT id FROM vm, (SELECT pg_sleep(1)) AS nap")
    change.join()
    assert document["hosts"] == [vm["vm_id"] for vm in document["vms"]] == ["v1", "v2", "v3"]
    assert ask.ids() == ["v2", "v3"]


def test_who_stops_reading_hangs_up(ask):
    document = ask.open(query=MANY % 100000)
    next(document["vms"])
    assert len(ask.backends()) == 1
    assert any(isinstance(thread, threading.Timer) for thread in threading.enumerate())
    document["vms"].close()
    deadline = time.monotonic() + 10
    while ask.backends() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert ask.backends() == []
    wait_for(lambda: not any(isinstance(thread, threading.Timer) for thread in threading.enumerate()))


def test_who_never_reads_hangs_up_too(ask):
    document = ask.open()
    del document
    gc.collect()
    deadline = time.monotonic() + 10
    while ask.backends() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert ask.backends() == []


# --- old copies and clocks


def test_the_budget_is_a_number_of_the_database(ask):
    assert "budget" not in ask.whole()
    assert ask.whole(budget_query="SELECT 3")["budget"] == 3
    assert ask.whole(budget_query="SELECT count(*) - count(*) FROM vm")["budget"] == 0
    for wrong in ("-1", "2.5", "'all'", "1e400::numeric"):
        with pytest.raises(manifest.ManifestError, match="'budget' must be a whole number"):
            manifest.check(ask.open(budget_query="SELECT %s" % wrong), "s", now=time.time(), max_age=600)
    assert "budget_query must return one row, and no NULL" in ask.refused(budget_query="SELECT NULL::int")[1]


def test_row_04_the_epoch_only_grows(ask):
    first = ask.whole()["epoch"]
    assert ask.whole()["epoch"] >= first
    for _number in range(3):
        ask.sql("INSERT INTO vm VALUES ('v9')")
    assert ask.whole()["epoch"] >= first + 3
    assert ask.whole(epoch_query="SELECT 1e20 + 5")["epoch"] == 10**20 + 5
    for wrong in ("'x'", "'NaN'::float8", "'Infinity'::float8"):
        assert "epoch_query must return a number" in ask.refused(epoch_query="SELECT %s" % wrong)[1]
    assert "epoch_query must return one row" in ask.refused(epoch_query="SELECT 1 FROM vm")[1]


def test_row_04_a_replica(ask):
    with ask.server.replica() as replica:
        here = {"host": "127.0.0.1", "port": replica.port}
        ask.sql("INSERT INTO vm VALUES ('v4')")
        wait_for(lambda: replica.sql("SELECT id FROM vm WHERE id = 'v4'", dbname=ask.dbname))
        code, said = ask.refused(**here)
        assert code == "stale" and "is a replica" in said and "max_replica_lag, which is 0" in said
        assert "v4" in ask.ids(**here, max_replica_lag=60)

        replica.sql("SELECT pg_wal_replay_pause()")
        wait_for(lambda: replica.sql("SELECT pg_get_wal_replay_pause_state()") == [("paused",)])
        paused = time.time()
        ask.sql("INSERT INTO vm VALUES ('v5')")
        time.sleep(2)
        document = ask.whole(**here, max_replica_lag=60)
        assert "v5" not in [vm["vm_id"] for vm in document["vms"]]
        assert document["generated_at"] < paused, "a list is as old as the last change in it"
        assert document["epoch"] < ask.whole()["epoch"]
        code, said = ask.refused(**here, max_replica_lag=1)
        assert code == "stale" and "its last change is behind" in said
        with pytest.raises(manifest.ManifestError, match="is a replica"):
            ask.still("v1", **here, max_replica_lag=1)


def test_row_04_who_is_behind_the_list_is_not_asked_once_more(ask):
    epoch = ask.whole()["epoch"]
    assert set(ask.still("v1", "v9", epoch=epoch)) == {"v1"}
    with pytest.raises(manifest.ManifestError, match="was at epoch %d and is at" % (epoch + 10**6)) as caught:
        ask.still("v1", epoch=epoch + 10**6)
    assert caught.value.code == "epoch_went_back"


def test_row_04_a_replica_that_replayed_nothing_since_it_started(ask):
    with ask.server.replica() as replica:
        assert replica.sql("SELECT pg_last_xact_replay_timestamp()") == [(None,)]
        code, said = ask.refused(host="127.0.0.1", port=replica.port, max_replica_lag=1e6)
        assert code == "stale" and "by an unknown time" in said


@pytest.mark.parametrize(("ours", "said"), [(-100, "s ahead of ours"), (100, "s behind ours")])
def test_row_06_clocks_that_differ(ask, monkeypatch, ours, said):
    clock = time.time
    monkeypatch.setattr(source.time, "time", lambda: clock() + ours)
    code, text = ask.refused()
    assert code == "clock_skew" and said in text and "set both by NTP" in text
    document = ask.whole(max_clock_skew=200)
    assert document["generated_at"] <= min(clock(), clock() + ours), "never later than either clock"


# --- what a query cannot do


@pytest.mark.parametrize(
    ("query", "code", "said"),
    [
        ("INSERT INTO vm VALUES ('x') RETURNING id AS vm_id", "bad_source", "query must be a SELECT"),
        ("-- SELECT\nDELETE FROM vm", "bad_source", "query must be a SELECT"),
        ("", "bad_source", "query or preset must be given"),
        ("WITH a AS (INSERT INTO vm VALUES ('x') RETURNING id) SELECT id AS vm_id FROM a", "unreadable", "only read"),
        ("SELECT sneak() AS vm_id", "unreadable", "25006 cannot execute INSERT in a read-only transaction"),
        ("SELECT id AS vm_id FROM vm FOR UPDATE", "unreadable", "25006"),
        ("SELECT nextval('counter') AS vm_id", "unreadable", "25006"),
        ("SELECT 'a' AS vm_id) AS q; COMMIT; DELETE FROM vm; SELECT * FROM (SELECT 1", "unreadable", "one SELECT"),
        ("SELECT 'a' AS vm_id; DELETE FROM vm", "unreadable", "42601"),
        ("SELECT id AS vm_id FROM vms", "unreadable", '42P01 relation "vms" does not exist'),
        ("SELECT vm_id FROM vm", "unreadable", '42703 column "vm_id" does not exist'),
        ("SELECT 1/0 AS vm_id", "unreadable", "22012 division by zero"),
        ("SELECT a.id AS vm_id, b.id AS vm_id FROM vm a, vm b", "unreadable", "42702"),
    ],
)
def test_what_a_query_cannot_do(ask, query, code, said):
    ask.sql(
        "CREATE SEQUENCE counter;"
        "CREATE FUNCTION sneak() RETURNS text AS $$ INSERT INTO vm VALUES ('s') RETURNING id $$ LANGUAGE sql"
    )
    found = ask.refused(query=query)
    assert found[0] == code and said in found[1], found
    if code == "unreadable":
        assert source.describe(ask.checked()) + " as postgres was asked for its VMs (" in found[1]
    assert ask.ids() == ["v1", "v2", "v3"]


def test_the_transaction_is_read_only_and_repeatable(ask):
    query = (
        "SELECT current_setting('transaction_read_only') || '-' || current_setting('transaction_isolation') AS vm_id"
    )
    assert ask.ids(query=query) == ["on-repeatable read"]
    assert set(ask.still("on-repeatable read", query=query)) == {"on-repeatable read"}


def test_a_user_without_the_right_to_read(ask):
    ask.sql("DROP ROLE IF EXISTS nosy; CREATE ROLE nosy LOGIN PASSWORD 'nosy one'")
    try:
        code, said = ask.refused(user="nosy", password="nosy one")
        assert code == "unreadable" and "as nosy" in said and "42501 permission denied" in said
        assert "grant the user SELECT" in said
    finally:
        ask.sql("DROP ROLE nosy")


# --- time


def test_a_statement_that_takes_too_long(ask):
    code, said = ask.refused(query="SELECT 'v1' AS vm_id FROM pg_sleep(30)", statement_timeout=0.5)
    assert code == "unreadable" and "57014" in said and "raise statement_timeout" in said


def test_a_table_that_is_locked(ask):
    with ask.server.connect(ask.dbname) as connection, connection.transaction():
        connection.execute("LOCK TABLE vm IN ACCESS EXCLUSIVE MODE")
        code, said = ask.refused(lock_timeout=0.3)
    assert code == "unreadable" and "55P03" in said and "raise lock_timeout" in said


def frozen(ask, pid):
    """Stop a process of the server, and let it go on at the end."""
    stack = contextlib.ExitStack()
    os.kill(pid, signal.SIGSTOP)
    stack.callback(os.kill, pid, signal.SIGCONT)
    return stack


def test_a_server_that_hangs_midway(ask, monkeypatch):
    monkeypatch.setattr(source, "PAGE", 10)
    document = ask.open(query=MANY % 1000, deadline=3)
    next(document["vms"])
    with frozen(ask, *ask.backends()):
        begin = time.monotonic()
        with pytest.raises(manifest.ManifestError, match="did not answer within deadline=3 s") as caught:
            list(document["vms"])
    assert caught.value.code == "incomplete" and time.monotonic() - begin < 10


def test_a_server_that_hangs_before_the_first_row(ask):
    stopped = []
    freeze = ask.when_busy(lambda pid: stopped.append(frozen(ask, pid)))
    begin = time.monotonic()
    try:
        code, said = ask.refused(query="SELECT 'v1' AS vm_id FROM pg_sleep(2)", deadline=3, retries=5)
    finally:
        freeze.join()
        stopped[0].close()
    assert code == "unreadable" and "did not answer within deadline=3 s" in said
    assert 2.5 < time.monotonic() - begin < 10


def test_something_that_listens_and_says_nothing(ask):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        begin = time.monotonic()
        code, said = ask.refused(port=silent.getsockname()[1], connect_timeout=1)
        assert code == "unreadable" and "was asked for a connection" in said and "timeout" in said
        assert time.monotonic() - begin < 8


def test_a_host_that_cannot_be_one(ask):
    for host in ("a" * 80, "..", "nowhere.invalid"):
        code, said = ask.refused(host=host)
        assert code == "unreadable" and "was asked for a connection" in said


def test_nothing_listens(ask):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    code, said = ask.refused(port=port)
    assert code == "unreadable" and "onnection refused" in said and "can be reached" in said


def test_who_is_cut_off_before_the_first_row_asks_again(ask):
    query = "SELECT 'v1' AS vm_id FROM pg_sleep(0.7)"
    cut = ask.when_busy(lambda pid: ask.server.sql("SELECT pg_terminate_backend(%s)", (pid,)))
    assert ask.ids(query=query, retries=1) == ["v1"]
    cut.join()
    cut = ask.when_busy(lambda pid: ask.server.sql("SELECT pg_terminate_backend(%s)", (pid,)))
    assert "57P01" in ask.refused(query=query, retries=0)[1]
    cut.join()


@pytest.mark.parametrize(("state", "tries"), [("40001", 3), ("40P01", 3), ("22012", 1)])
def test_what_is_tried_again(ask, monkeypatch, state, tries):
    monkeypatch.setattr(source, "BACKOFF", 0.01)
    name = "fails_%d" % time.monotonic_ns()
    ask.sql(
        "CREATE FUNCTION %s() RETURNS text AS $$ BEGIN RAISE EXCEPTION 'again' USING errcode = '%s'; END $$"
        " LANGUAGE plpgsql" % (name, state)
    )
    code, said = ask.refused(query="SELECT %s() AS vm_id FROM vm WHERE %s() > ''" % (name, name), retries=2)
    assert code == "unreadable" and state + " again" in said
    assert ask.server.log.count("LOG:  execute <unnamed>: SELECT count(*) FROM (\n\tSELECT %s" % name) == tries


# --- secrets, options, hostile data


def test_a_wrong_password_is_tried_once_and_never_shown(ask):
    failed = "password authentication failed"
    before = ask.server.log.count("FATAL:  " + failed)
    code, said = ask.refused(password="wr0ng-secret", retries=5)
    assert code == "unreadable" and failed in said and "as postgres" in said and "wr0ng" not in said
    assert ask.server.log.count("FATAL:  " + failed) == before + 1


@pytest.mark.parametrize(
    ("others", "said"),
    [
        ({"dsn": "postgresql://u:s3cret@h/d?x=y"}, "dsn must be"),
        ({"dsn": "s3cret"}, "dsn must be"),
        ({"dsn": "host=h password='s3cret"}, "dsn must be"),
        ({"dbname": "postgresql://u:s3cret@h/d"}, "dbname must be a name only"),
        ({"dbname": "host=h password=s3cret"}, "dbname must be a name only"),
        ({"host": "u:s3cret@h"}, "host must be a name only"),
        ({"host": "a\nb"}, "host must be a name only"),
        ({"host": None}, "dsn or host must be given"),
        ({"preset": "omicron"}, "query and preset exclude each other"),
        ({"query": None}, "query or preset must be given"),
        ({"password_file": "/x"}, "password and password_file exclude each other"),
        ({"password": None, "password_file": "/nowhere/x"}, "password_file: /nowhere/x is not there"),
        ({"sslrootcert": "/nowhere/ca"}, "sslrootcert: /nowhere/ca is not there"),
        ({"realm": "a", "realm_query": "SELECT 'a'"}, "realm and realm_query exclude each other"),
        ({"epoch_query": "UPDATE vm SET id = 1"}, "epoch_query must be a SELECT"),
        ({"hosts_query": "DROP TABLE vm"}, "hosts_query must be a SELECT"),
        ({"deadline": 0}, "deadline must be more than 0"),
        ({"statement_timeout": float("nan")}, "statement_timeout must be more than 0"),
        ({"retries": -1}, "retries cannot be negative"),
        ({"sslmode": "none"}, "sslmode"),
        ({"passwort": "x"}, "passwort"),
    ],
)
def test_options_that_are_wrong_are_named_before_anything_is_asked(ask, others, said):
    with pytest.raises(manifest.ManifestError) as caught:
        ask.checked(**others)
    assert caught.value.code == "bad_source" and said in str(caught.value)
    assert "s3cret" not in "".join(traceback.format_exception(caught.value))


def test_a_dsn_without_the_library(ask, monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(manifest.ManifestError, match="pip install 'psycopg") as caught:
        ask.checked()
    assert caught.value.code == "missing_library"


def test_a_password_is_in_no_place_where_others_look(ask):
    document = ask.open(query=MANY % 100000)
    next(document["vms"])
    secret = postgresql.PASSWORD.encode()
    for process in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            assert secret not in process.read_bytes()
    seen = ask.server.sql("SELECT * FROM pg_stat_activity WHERE datname = %s", (ask.dbname,))
    assert seen and postgresql.PASSWORD not in str(seen)
    assert postgresql.PASSWORD not in ask.server.log
    assert postgresql.PASSWORD not in source.describe(ask.checked())
    document["vms"].close()


def test_what_a_server_repeats_of_a_password_is_masked(ask):
    query = "SELECT 'v1' AS vm_id FROM vm WHERE '%s' = id AND 'x %s'::int > 0" % ((postgresql.PASSWORD,) * 2)
    code, said = ask.refused(query=query)
    assert code == "unreadable" and "***" in said and "22P02" in said


HOSTILE = ["it's", '"', "$(id)", "{{ 7*7 }}", "a\nb", "..", "%s", "%(x)s", "a\\b", "x" * 4096, "-rf", "\u202e", "'; --"]


@pytest.mark.parametrize("vm_id", HOSTILE)
def test_row_36_hostile_ids_are_data(ask, tmp_path, vm_id):
    ask.sql("INSERT INTO vm VALUES (%s, 'h1')", (vm_id,))
    assert ask.ids() == ["v1", "v2", "v3", vm_id]
    assert ask.still(vm_id, "v1") == {vm_id: ["h1"], "v1": ["h1"]}
    with pytest.raises(manifest.ManifestError, match="cannot be the id of a VM"):
        ask.index(tmp_path / "index")


def test_row_36_text_that_is_not_utf_8(ask):
    name = "ascii_%d" % time.monotonic_ns()
    ask.server.sql("CREATE DATABASE %s TEMPLATE template0 ENCODING 'SQL_ASCII' LOCALE 'C'" % name)
    for query in (r"SELECT E'v\xff' AS vm_id", r"SELECT 'v1' AS vm_id, E'\xff\xfe' AS host"):
        code, said = ask.refused(query=query, dbname=name)
        assert code == "unreadable" and "22021 invalid byte sequence" in said and "what it reads" in said


# --- asked once more, of a few


def test_the_few_that_are_asked_for_once_more(ask):
    ask.sql(
        "INSERT INTO vm VALUES ('d1', 'h1', 'destroyed'), ('v1', 'h9', 'running'), ('v2', NULL, 'running'),"
        " ('p%', 'h1', NULL); INSERT INTO vm VALUES ('d2', 'h1', NULL, NULL, now() - interval '1 h')"
    )
    assert ask.still("v1", "v2", "v3", "d1", "d2", "no", "p%") == {
        "v1": ["h1", "h9"], "v2": [], "v3": [], "p%": ["h1"]
    }
    assert ask.still("v1") == {"v1": ["h1", "h9"]}
    assert ask.still() == {}
    assert ask.still("v1", "p%", query=QUERY + " WHERE id LIKE 'p%'") == {"p%": ["h1"]}
    with pytest.raises(manifest.ManifestError, match="42P01"):
        ask.still("v1", query="SELECT id AS vm_id FROM vms")


def test_ids_of_other_types_are_asked_for_by_their_text(ask):
    one, other = str(uuid.UUID(int=10)), str(uuid.UUID(int=11))
    ask.sql("CREATE TABLE u (id uuid PRIMARY KEY, n int)")
    ask.sql("INSERT INTO u VALUES (%s, 1), (%s, 2)", (one, other))
    wanted = (one, one.upper(), "{%s}" % other, "v1", "'")
    assert ask.still(*wanted, query="SELECT id AS vm_id FROM u") == {one: []}
    assert ask.still("1", "01", "x", query="SELECT n AS vm_id FROM u") == {"1": []}
    assert ask.still("v1", "x", query="SELECT id::varchar AS vm_id FROM vm") == {"v1": []}


def test_the_few_are_found_by_an_index(ask):
    ask.sql("CREATE TABLE u AS SELECT gen_random_uuid() AS id FROM generate_series(1, 50000)")
    ask.sql("ALTER TABLE u ADD PRIMARY KEY (id); ANALYZE u")
    ((one,),) = ask.sql("SELECT id::text FROM u LIMIT 1")
    assert set(ask.still(one, query="SELECT id AS vm_id FROM u")) == {one}
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        ((read,),) = ask.sql("SELECT seq_tup_read FROM pg_stat_user_tables WHERE relname = 'u'")
        ((used,),) = ask.sql("SELECT idx_scan FROM pg_stat_user_tables WHERE relname = 'u'")
        if used:
            break
        time.sleep(0.2)
    assert used == 1, read


# --- omicron

OMICRON = """
CREATE TYPE vmm_state AS ENUM ('creating', 'starting', 'running', 'stopping', 'stopped', 'rebooting', 'migrating',
    'failed', 'destroyed', 'saga_unwound');
CREATE TYPE migration_state AS ENUM ('pending', 'in_progress', 'failed', 'completed');
CREATE TABLE sled (id uuid PRIMARY KEY, time_deleted timestamptz);
CREATE TABLE instance (id uuid PRIMARY KEY, active_propolis_id uuid, target_propolis_id uuid, migration_id uuid,
    time_deleted timestamptz);
CREATE TABLE vmm (id uuid PRIMARY KEY, time_created timestamptz NOT NULL DEFAULT now(), time_deleted timestamptz,
    instance_id uuid, sled_id uuid NOT NULL, state vmm_state NOT NULL, time_state_updated timestamptz);
CREATE TABLE migration (id uuid PRIMARY KEY DEFAULT gen_random_uuid(), source_state migration_state NOT NULL,
    source_propolis_id uuid NOT NULL, target_state migration_state NOT NULL, target_propolis_id uuid NOT NULL);
INSERT INTO sled SELECT ('00000000-0000-0000-0000-00000000a00' || n)::uuid FROM generate_series(1, 4) AS n;
"""


def of(number):
    return str(uuid.UUID(int=number))


def sled(number):
    return "00000000-0000-0000-0000-00000000a00%d" % number


class Omicron(Asker):
    def __init__(self, server, dbname):
        super().__init__(server, dbname, OMICRON, query=None, preset="omicron")

    def vmm(self, number, on, state="running", deleted=None, updated="now() - interval '9 h'", instance=None):
        deleted = "now() - interval '%s'" % deleted if deleted else "NULL"
        self.sql(
            "INSERT INTO vmm (id, sled_id, state, instance_id, time_deleted, time_state_updated)"
            " VALUES (%%s, %%s, %%s, %%s, %s, %s)" % (deleted, updated),
            (of(number), sled(on), state, of(instance) if instance else None),
        )

    def migration(self, source_state, source_vmm, target_state, target_vmm):
        self.sql(
            "INSERT INTO migration (source_state, source_propolis_id, target_state, target_propolis_id)"
            " VALUES (%s, %s, %s, %s)",
            (source_state, of(source_vmm), target_state, of(target_vmm)),
        )

    def places(self, **others):
        return {vm["vm_id"]: [vm["host"], *(vm["also_on"] or ())] for vm in self.whole(**others)["vms"]}


@pytest.fixture
def omicron(postgres, dbname):
    return Omicron(postgres, dbname)


def test_omicron_every_state(omicron, tmp_path):
    states = ["creating", "starting", "running", "stopping", "stopped", "rebooting", "migrating", "failed"]
    for number, state in enumerate(states):
        omicron.vmm(number, 1, state)
    omicron.vmm(20, 1, "destroyed")
    omicron.vmm(21, 1, "saga_unwound", updated="NULL")
    omicron.vmm(22, 1, "failed", deleted="1 h")
    omicron.vmm(23, 1, "destroyed", deleted="10 h")
    omicron.vmm(24, 1, "running", deleted="1 h")
    omicron.vmm(25, 1, "destroyed", deleted="8 days")
    look = omicron.index(tmp_path / "index")
    share = look(*map(of, range(30)), host=sled(1))
    assert share["live"] == [*map(of, range(len(states))), of(24)], "what contradicts itself lives"
    ages = {vm_id: since and round(since / 3600) for vm_id, since in share["tombstones"].items()}
    assert ages == {of(20): 9, of(21): None, of(22): 1, of(23): 9}
    assert share["host_known"] and not look(of(1), host="elsewhere")["host_known"]
    assert set(omicron.still(*map(of, range(30)))) == {*map(of, range(len(states))), of(24)}
    assert of(25) in {one["vm_id"] for one in omicron.whole(tombstone_seconds=10**6)["tombstones"]}


@pytest.mark.parametrize(
    ("states", "both"),
    [
        (("pending", "pending"), True),
        (("in_progress", "in_progress"), True),
        (("completed", "in_progress"), True),
        (("failed", "pending"), True),
        (("completed", "completed"), False),
        (("failed", "failed"), False),
    ],
)
def test_row_10_omicron_source_and_target_of_a_migration(omicron, states, both):
    omicron.vmm(1, 1, "migrating")
    omicron.vmm(2, 2, "migrating")
    omicron.vmm(3, 3)
    omicron.migration(states[0], 1, states[1], 2)
    expected = {of(1): [sled(1)], of(2): [sled(2)], of(3): [sled(3)]}
    if both:
        expected.update({of(1): [sled(1), sled(2)], of(2): [sled(2), sled(1)]})
    assert omicron.places() == expected
    assert omicron.still(of(1)) == {of(1): sorted(expected[of(1)])}


def test_row_10_omicron_an_instance_with_two_vmms(omicron):
    omicron.vmm(1, 1, instance=9)
    omicron.vmm(2, 2, "creating", instance=9)
    omicron.vmm(3, 3, instance=8)
    omicron.sql("INSERT INTO instance VALUES (%s, %s, %s), (%s, %s, NULL)", (of(9), of(1), of(2), of(8), of(3)))
    assert omicron.places() == {of(1): [sled(1), sled(2)], of(2): [sled(2), sled(1)], of(3): [sled(3)]}


def test_omicron_hosts_are_sleds_unless_asked_otherwise(omicron):
    assert omicron.whole()["hosts"] == [sled(number) for number in (1, 2, 3, 4)]
    assert omicron.whole(hosts_query="SELECT 'x'")["hosts"] == ["x"]
    assert omicron.whole(hosts_query="")["hosts"] is None


# --- CockroachDB: what differs, on PostgreSQL with CockroachDB's function in it


def test_cockroachdb(ask, monkeypatch):
    monkeypatch.setattr(source, "_is_cockroachdb", lambda connection: True)
    ask.sql(
        "CREATE FUNCTION cluster_logical_timestamp() RETURNS numeric LANGUAGE sql AS"
        " $$ SELECT 1700000000123456789.0000000042 $$"
    )
    document = ask.whole()
    assert document["vms"] == VMS and document["epoch"] == 1700000000123456789
    assert ask.ids(query="SELECT current_setting('transaction_isolation') AS vm_id") == ["serializable"]
    assert set(ask.still("v1")) == {"v1"}


def test_row_37_memory_does_not_grow_with_the_rows(ask):
    script = """
        import resource, sys, time
        from ansible_collections.microvm.reaper.plugins.plugin_utils import sources
        from ansible_collections.microvm.reaper.plugins.plugin_utils.sources import postgresql
        peaks = []
        for rows in (20000, 400000):
            wanted = dict(%r, query=%r %% rows)
            ((_module, options),) = sources.configured([wanted])
            document = postgresql.fetch(options, {"realm": "prod", "now": time.time(), "directory": "/"})
            assert sum(len(page.vm_id) for page in document["vms"]) == document["count"] == rows
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        print(peaks[1] - peaks[0])
    """
    script = textwrap.dedent(script) % (ask.options, MANY)
    path = {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, **path})
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 10000, "KiB more for twenty times the rows"


def test_the_server_of_the_tests_is_gone_with_who_started_it():
    script = """
        from integration import postgresql
        with postgresql.server() as server:
            print(server.directory, server.pid, flush=True)
            input()
    """
    path = {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, env={**os.environ, **path}, **pipes) as starter:
        directory, pid = starter.stdout.readline().split()
        assert pathlib.Path(directory, "data").is_dir() and pathlib.Path("/proc", pid).exists()
        starter.kill()
    wait_for(lambda: not pathlib.Path(directory).exists() and not pathlib.Path("/proc", pid).exists())


def wait_for(condition):
    deadline = time.monotonic() + 20
    while True:
        with contextlib.suppress(psycopg.Error):
            if condition():
                return
        assert time.monotonic() < deadline
        time.sleep(0.05)
