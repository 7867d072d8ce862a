# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A query to PostgreSQL or CockroachDB.

Everything is asked in one read-only transaction, in which the database does not change: which columns the query has,
the epoch, realm, hosts, how many rows there are, and the rows, which come through a cursor, a page at a time. So the
list is of one moment, and complete when as many rows came as were counted.

The query may return these columns; others are ignored:

``vm_id``         needed
``host``          where it lives; NULL: everywhere
``state``         NULL: it lives
``also_on``       other hosts of a migration, an array or JSON
``destroyed_at``  timestamptz, or seconds since 1970: a tombstone, and live besides as long as ``state`` says so
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import decimal
import itertools
import json
import os
import socket
import threading
import time
import uuid
from typing import Any

from ..manifest import TERMINAL_STATES, Columns, ManifestError, add_place, check_epoch

OPTIONS = {
    "dsn": {"type": "str", "no_log": True},
    "host": {"type": "str"},
    "port": {"type": "int"},
    "dbname": {"type": "str"},
    "user": {"type": "str"},
    "password": {"type": "str", "no_log": True},
    "password_file": {"type": "path"},
    "sslmode": {"type": "str", "choices": ["disable", "allow", "prefer", "require", "verify-ca", "verify-full"]},
    "sslrootcert": {"type": "str"},
    "sslcert": {"type": "path"},
    "sslkey": {"type": "path"},
    "query": {"type": "str"},
    "preset": {"type": "str", "choices": ["omicron"]},
    "tombstone_seconds": {"type": "int", "default": 604800},
    "hosts_query": {"type": "str"},
    "realm": {"type": "str"},
    "realm_query": {"type": "str"},
    "epoch_query": {"type": "str"},
    "budget_query": {"type": "str"},
    "max_replica_lag": {"type": "float", "default": 0},
    "max_clock_skew": {"type": "float", "default": 30},
    "connect_timeout": {"type": "int", "default": 10},
    "statement_timeout": {"type": "float", "default": 60},
    "lock_timeout": {"type": "float", "default": 10},
    "deadline": {"type": "float", "default": 300},
    "retries": {"type": "int", "default": 2},
}
CONNECTION = ("host", "port", "dbname", "user", "password", "sslmode", "sslrootcert", "sslcert", "sslkey")
FILES = ("sslrootcert", "sslcert", "sslkey")
SECRET = ("password", "sslpassword")
PAGE = 2000  # rows; larger ones are slower
MAX_DIGITS = 300
BACKOFF = 0.5  # seconds before the first retry, then twice as long each time

# What is asked before the transaction, so that it is never later than the snapshot: the clock, whether it is a replica,
# and of when the last change is that it has. And what the database itself counts up: on an old copy it is lower.
POSTGRESQL = {
    "clock": "SELECT extract(epoch FROM clock_timestamp())::float8, pg_is_in_recovery(), "
    "extract(epoch FROM pg_last_xact_replay_timestamp())::float8",
    "begin": "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY",
    "settings": ("cursor_tuple_fraction = 1",),  # all rows are wanted, not the first ones soon
    "epoch": "SELECT txid_snapshot_xmin(txid_current_snapshot())",
}
COCKROACHDB = {
    "clock": "SELECT extract(epoch FROM clock_timestamp())::float8, false, NULL::float8",
    "begin": "BEGIN ISOLATION LEVEL SERIALIZABLE READ ONLY",
    "settings": (),
    "epoch": "SELECT cluster_logical_timestamp()",
}

# A VMM is a VM with the id of its propolis. While one moves, source and target live on each other's sled too.
# A VMM whose record is deleted is dead if its last state says so as well; the later of the two times counts.
OMICRON = """
WITH moving AS (
    SELECT source_propolis_id AS one, target_propolis_id AS other FROM migration
    WHERE coalesce(source_state::text, '') NOT IN ('completed', 'failed')
       OR coalesce(target_state::text, '') NOT IN ('completed', 'failed')
    UNION
    SELECT active_propolis_id, target_propolis_id FROM instance
    WHERE active_propolis_id IS NOT NULL AND target_propolis_id IS NOT NULL
), beside AS (
    SELECT pair.one AS id, array_agg(DISTINCT peer.sled_id) FILTER (WHERE peer.sled_id IS NOT NULL) AS sleds
    FROM (SELECT one, other FROM moving UNION SELECT other, one FROM moving) AS pair
    JOIN vmm AS peer ON peer.id = pair.other
    GROUP BY pair.one
)
SELECT v.id AS vm_id, v.sled_id AS host, beside.sleds AS also_on,
    CASE WHEN v.time_deleted IS NOT NULL AND v.state::text IN ('failed', 'destroyed', 'saga_unwound')
        THEN 'destroyed' ELSE v.state::text END AS state,
    CASE WHEN v.time_deleted IS NOT NULL OR v.state::text IN ('destroyed', 'saga_unwound')
        THEN greatest(v.time_deleted, v.time_state_updated) END AS destroyed_at
FROM vmm AS v LEFT JOIN beside ON beside.id = v.id
WHERE v.time_deleted IS NULL OR v.time_deleted > now() - interval '%(tombstone_seconds)d seconds'
"""
PRESETS = {"omicron": {"query": OMICRON, "hosts_query": "SELECT id FROM sled"}}

# What to do, by the longest beginning of the SQLSTATE; None where the server gave none.
ADVICE = {
    "": "correct the query or what it reads",
    "08": "see that the server runs and can be reached",
    "25006": "the query must only read",
    "28": "correct user and password, or let the user in (pg_hba.conf)",
    "3D000": "correct dbname",
    "40": "sweep again when the database is less busy",
    "42501": "grant the user SELECT on what the query reads",
    "42": "correct the query: one SELECT, without a semicolon in it",
    "0A000": "the query must only read, in one SELECT",
    "53": "see what the server lacks",
    "55P03": "another transaction locks a table: sweep when it is done, or raise lock_timeout",
    "57014": "make the query faster, or raise statement_timeout",
    "57": "see why the server ended the connection, and sweep again",
    None: "see that the server runs and can be reached, with these settings of the connection",
}
PASSING = ("08", "40001", "40P01", "57P01", "57P02", "57P03")

TEXTS = (25, 1043)  # oids, the same in CockroachDB: text, varchar
UUID = 2950
TIMESTAMPTZ = 1184
NUMBERS = (20, 21, 23, 700, 701, 1700)


def describe(options):
    """Name the source by its host and database."""
    try:
        return _name(_parameters(options))
    except ManifestError:
        return "postgresql"


def configured(options):
    """Refuse options that do not go together."""
    _psycopg()
    for one, other in (("query", "preset"), ("dsn", "host")):
        if not options[one] and not options[other]:
            raise ManifestError("bad_source", "%s or %s must be given" % (one, other))
    for one, other in (("query", "preset"), ("password", "password_file"), ("realm", "realm_query")):
        if options[one] and options[other]:
            raise ManifestError("bad_source", "%s and %s exclude each other" % (one, other))
    for key in ("query", "hosts_query", "realm_query", "epoch_query", "budget_query"):
        if options[key] and not _begins_as_select(options[key]):
            raise ManifestError("bad_source", "%s must be a SELECT (or begin with WITH, VALUES or TABLE)" % key)
    for key in ("connect_timeout", "statement_timeout", "lock_timeout", "deadline"):
        if not 0 < options[key] <= 86400:
            raise ManifestError("bad_source", "%s must be more than 0 and at most 86400 seconds" % key)
    for key in ("tombstone_seconds", "max_replica_lag", "max_clock_skew", "retries"):
        if not 0 <= options[key] < 1e9:
            raise ManifestError("bad_source", "%s cannot be negative or so large: %s" % (key, options[key]))
    parameters = _parameters(options)
    for key in ("host", "dbname"):  # both are shown, so no password may hide in them
        value = parameters.get(key) or ""
        if "@" in value[1:] or "=" in value or "://" in value or not value.isprintable():
            raise ManifestError("bad_source", "%s must be a name only; a whole connection string is a dsn" % key)
    for key in ("password_file", *FILES):
        path = options[key] if key == "password_file" else parameters.get(key)
        if path and os.path.isabs(path) and not os.access(path, os.R_OK):
            raise ManifestError("bad_source", "%s: %s is not there or cannot be read" % (key, path))


def fetch(options, context):
    """Return what the query says as a document whose ``vms`` are read as they are asked for."""
    document = {"complete": False}
    rows = _rows(options, context, document)
    next(rows)
    document["vms"] = rows
    return document


def still_listed(options, context, vm_ids, epoch):
    """Return ``{vm_id: [host]}`` of those of the ids that live now; no host means everywhere."""
    if not vm_ids:
        return {}
    terminal_states = {state.lower() for state in context.get("terminal_states", TERMINAL_STATES)}

    def ask(session):
        columns = session.columns()
        condition, values = _among(columns["vm_id"], vm_ids)
        session.realm()
        check_epoch(session.name, epoch, session.epoch())
        return session.all("SELECT %s WHERE %s" % (session.selected(columns), condition), (values,))

    session, rows = _asked(options, context, ask)
    session.close()
    found = {}
    with session.explained():
        for vm_id, host, state, also_on in zip(*session.vms(rows, []), strict=True):
            if state is None or state.lower() not in terminal_states:
                add_place(found, vm_id, [] if host is None else sorted({host, *(also_on or ())}))
    return found


def _rows(options, context, document):
    """Yield once when ``document`` has what is known before the VMs, then the VMs, and then fill in the rest."""

    def ask(session):
        document.update(
            generated_at=session.generated_at,
            epoch=session.epoch(),
            realm=session.realm(),
            hosts=session.hosts(),
            **session.budget(),
        )
        columns = session.columns()
        count = session.all("SELECT count(*) FROM %s" % session.relation)[0][0]
        return count, session.cursor("SELECT %s" % session.selected(columns))

    session, (count, pages) = _asked(options, context, ask)
    with contextlib.closing(session), contextlib.closing(pages), session.explained():
        yield None
        ended, session.delivered = [], 0
        for page in pages:
            yield session.vms(page, ended)
            session.delivered += len(page)
        if session.delivered != count:
            raise ManifestError(
                "incomplete",
                "%s counted %d rows and delivered %d of them in one transaction: does the query return something else "
                "each time?" % (session.name, count, session.delivered),
            )
        session.end()
        document.update(
            complete=True,
            proven=True,
            count=count - session.ended_only,
            tombstones=({"vm_id": vm_id, "destroyed_at": destroyed_at} for vm_id, destroyed_at in ended),
        )


def _asked(options, context, ask):
    """Return an open session and what ``ask(session)`` returned.

    What passes by itself, a server that restarts or transactions in each other's way, is tried again.
    """
    deadline = time.monotonic() + options["deadline"]
    for retry in range(options["retries"] + 1):
        session = _Session(options, context, deadline)
        done = False
        try:
            with session.explained():
                session.open()
                answer = ask(session)
                done = True
            return session, answer
        except ManifestError:
            pause = BACKOFF * 2**retry
            if not session.may_pass or retry == options["retries"] or time.monotonic() + pause > deadline:
                raise
        finally:
            if not done:
                session.close()
        time.sleep(pause)
    raise AssertionError("the last try returns or raises")


class _Session:
    """A connection with one read-only transaction. Past the deadline it is cut, whatever the server does."""

    def __init__(self, options, context, deadline):
        self._options, self._context, self._deadline = options, context, deadline
        self._parameters = _parameters(options, context["directory"])
        self._connection: Any = None
        self._timer: Any = None
        self._subject = ""
        self.name = _name(self._parameters)
        self.delivered = None
        self.ended_only = 0
        self.may_pass = False
        preset = PRESETS.get(options["preset"], {})
        query = _bare(options["query"] or preset["query"] % options)
        self.relation = "(\n%s\n) AS q" % query
        self._hosts_query = options["hosts_query"] if options["hosts_query"] is not None else preset.get("hosts_query")
        self._label = "preset %s" % options["preset"] if options["preset"] else _first_line(query)

    def open(self):
        """Connect, judge clock and replica, and begin the transaction."""
        psycopg = _psycopg()
        self._subject = "a connection"
        begin = time.time()
        parameters = dict(self._parameters, connect_timeout=self._connect_timeout())
        self._connection = psycopg.connect(**parameters, autocommit=True, prepare_threshold=None)
        self._timer = _Cutter(self._connection.fileno(), self._deadline - time.monotonic())
        dialect = COCKROACHDB if _is_cockroachdb(self._connection) else POSTGRESQL
        self._epoch_query = self._options["epoch_query"] or dialect["epoch"]
        self._subject, begin = "its clock", time.time()
        clock, replica, replayed_at = self.all(dialect["clock"])[0]
        self._judge_clock(clock, begin, time.time())
        if replica:
            self._judge_replica(begin, replayed_at)
        self._clock = clock
        self.generated_at = min(clock, begin, replayed_at if replica else begin)
        self._connection.execute(dialect["begin"])
        for setting in (*dialect["settings"], *self._timeouts()):
            self._connection.execute("SET LOCAL " + setting)

    def _connect_timeout(self):
        left = self._deadline - time.monotonic()
        return max(1, min(self._options["connect_timeout"], int(left)))

    def _timeouts(self):
        idle = self._options["deadline"]  # where the consumer of the rows died without a word
        yield "idle_in_transaction_session_timeout = %d" % (idle * 1000)
        for key in ("statement_timeout", "lock_timeout"):
            yield "%s = %d" % (key, max(1, self._options[key] * 1000))

    def _judge_clock(self, clock, begin, end):
        skew = max(clock - end, begin - clock)
        if skew > self._options["max_clock_skew"]:
            raise ManifestError(
                "clock_skew",
                "%s: its clock is %d s %s ours, more than max_clock_skew=%g; set both by NTP"
                % (self.name, skew, "ahead of" if clock > end else "behind", self._options["max_clock_skew"]),
            )

    def _judge_replica(self, now, replayed_at):
        most = self._options["max_replica_lag"]
        lag = "by an unknown time" if replayed_at is None else "%d s" % (now - replayed_at)
        if replayed_at is None or now - replayed_at > most or not most:
            raise ManifestError(
                "stale",
                "%s is a replica and its last change is behind %s; ask the primary (target_session_attrs=read-write in "
                "the dsn), or allow for it with max_replica_lag, which is %g" % (self.name, lag, most),
            )

    def columns(self):
        """Return ``{name: type}`` of the query's columns that mean something; raises ManifestError."""
        self._subject = "its VMs (%s)" % self._label
        described = self._run("SELECT * FROM %s LIMIT 0" % self.relation).description
        found = {column.name: column.type_code for column in described}
        if "vm_id" not in found:
            raise ManifestError(
                "bad_query",
                "%s: the query has no column vm_id, only %s: write ... AS vm_id (%s)"
                % (self.name, ", ".join(found) or "none", self._label),
            )
        destroyed_at = found.get("destroyed_at")
        if destroyed_at is not None and destroyed_at not in (TIMESTAMPTZ, *NUMBERS):
            raise ManifestError(
                "bad_query",
                "%s: destroyed_at must be timestamptz, or a number of seconds since 1970: write "
                "destroyed_at AT TIME ZONE 'UTC' for a timestamp without a zone (%s)" % (self.name, self._label),
            )
        return found

    def selected(self, columns):
        """Return the SQL of our five columns, all text or null but the last one, and where they come from."""
        if columns.get("also_on") in TEXTS:
            also_on = "q.also_on"
        else:
            also_on = "to_jsonb(q.also_on)::text" if "also_on" in columns else "NULL::text"
        if columns.get("destroyed_at") == TIMESTAMPTZ:
            destroyed_at = "extract(epoch FROM q.destroyed_at)::float8"
        else:
            destroyed_at = "q.destroyed_at::float8" if "destroyed_at" in columns else "NULL::float8"
        texts = ["q.%s::text" % key if key in columns else "NULL::text" for key in ("vm_id", "host", "state")]
        return "%s FROM %s" % (", ".join([*texts, also_on, destroyed_at]), self.relation)

    def epoch(self):
        """Return the one number of the epoch query."""
        value = self._value("epoch_query", self._epoch_query)
        try:
            number = decimal.Decimal(value)
            if number.adjusted() > MAX_DIGITS:  # a few characters can stand for gigabytes
                raise ValueError(value)
            return int(number)
        except (ArithmeticError, ValueError) as err:
            said = "%s: epoch_query must return a number, not %.80r" % (self.name, value)
            raise ManifestError("bad_query", said) from err

    def realm(self):
        """Return the realm that the database speaks for; raises ManifestError if it is not ours."""
        realm = self._options["realm"] or self._context["realm"]
        if self._options["realm_query"]:
            realm = self._value("realm_query", self._options["realm_query"])
        if realm != self._context["realm"]:
            raise ManifestError(
                "other_realm",
                "%s speaks for realm %.80r, the sweep is for %r; is it the right database?"
                % (self.name, realm, self._context["realm"]),
            )
        return realm

    def hosts(self):
        """Return all hosts of the hosts query, None without one."""
        if not self._hosts_query:
            return None
        self._subject = "hosts_query (%s)" % _first_line(self._hosts_query)
        hosts = self._values(self._hosts_query)
        if None in hosts:
            raise ManifestError("bad_query", "%s: hosts_query returns NULL: leave that row out" % self.name)
        return hosts

    def budget(self):
        """Return ``{budget: the one number of the budget query}``, nothing without one."""
        if not self._options["budget_query"]:
            return {}
        value = self._value("budget_query", self._options["budget_query"])
        return {"budget": int(value) if value.isdecimal() and len(value) < MAX_DIGITS else value}

    def vms(self, rows, ended):
        """Return COLUMNS of rows; add ``(vm_id, seconds since 1970)`` to ``ended`` for those that were destroyed."""
        vm_ids, hosts, states, also_on, ends = map(list, zip(*rows, strict=True)) if rows else ([], [], [], [], [])
        if set(ends) - {None}:
            # What is to be destroyed in the future lives.
            over = [end is not None and end <= self._clock for end in ends]
            ended += itertools.compress(zip(vm_ids, ends, strict=True), over)
            stays = [not is_over or state is not None for is_over, state in zip(over, states, strict=True)]
            self.ended_only += stays.count(False)
            vm_ids, hosts, states, also_on = (
                list(itertools.compress(one, stays)) for one in (vm_ids, hosts, states, also_on)
            )
        if any(also_on):
            also_on = [self._others(*one) if one[1] else None for one in zip(vm_ids, also_on, strict=True)]
        return Columns(vm_ids, hosts, states, also_on)

    def _others(self, vm_id, also_on):
        try:
            hosts = json.loads(also_on)
        except (ValueError, RecursionError):
            hosts = also_on
        if hosts is None:
            return []
        if not isinstance(hosts, list) or not all(type(host) in (str, int) for host in hosts):
            raise ManifestError(
                "not_a_manifest",
                "%s: also_on of %.80r must be an array of hosts without NULL, or JSON of it, not %.80r"
                % (self.name, vm_id, also_on),
            )
        return [str(host) for host in hosts]

    def cursor(self, query):
        """Return the pages of a query, of which the first has been fetched. Another comes while one is looked at."""
        self._subject = "its VMs (%s)" % self._label
        cursor = self._connection.cursor("vms")
        cursor.execute(query.encode())
        first = cursor.fetchmany(PAGE)

        def pages():
            page = first
            with concurrent.futures.ThreadPoolExecutor(1) as ahead:
                while page:
                    following = ahead.submit(cursor.fetchmany, PAGE)
                    try:
                        yield page
                    except GeneratorExit:
                        self._timer.cut()  # nobody wants what is on its way
                        raise
                    page = following.result()
            cursor.close()

        return pages()

    def _value(self, key, query):
        self._subject = "%s (%s)" % (key, _first_line(query))
        values = self._values(query)
        if len(values) != 1 or values[0] is None:
            raise ManifestError("bad_query", "%s: %s must return one row, and no NULL" % (self.name, key))
        return values[0]

    def _values(self, query):
        """Return the first column of a query, as texts."""
        return [value for (value,) in self.all("SELECT q.value::text FROM (\n%s\n) AS q(value)" % _bare(query))]

    def all(self, query, values=None):
        """Return all rows of a query."""
        return self._run(query, values).fetchall()

    def _run(self, query, values=None):
        # Binary goes by the protocol that takes one statement only: nothing of a query runs outside of the transaction.
        return _psycopg().RawCursor(self._connection).execute(query.encode(), values, binary=True)

    def end(self):
        """Commit: CockroachDB says only then whether all was of one moment."""
        self._connection.execute("COMMIT")

    def close(self):
        """Hang up."""
        if self._timer:
            self._timer.cancel()
        if self._connection:
            self._connection.close()

    @contextlib.contextmanager
    def explained(self):
        """Turn what the database raises into a ManifestError that says who was asked what, and what to do."""
        psycopg = _psycopg()
        try:
            yield
        except psycopg.Error as err:
            self.may_pass = self._may_pass(err)
            # Not `from err`: what a library says may hold what it was told, with passwords.
            raise ManifestError("incomplete" if self.delivered else "unreadable", self._explanation(err)) from None
        except UnicodeError as err:  # a host's name that is none, bytes that are no text
            raise ManifestError("unreadable", "%s was asked for %s: %s" % (self.name, self._subject, err)) from None

    def _may_pass(self, err):
        if err.sqlstate:
            return err.sqlstate.startswith(PASSING)
        # A password that was wrong once would be so again, and lock the account.
        refused = self._connection is None and err.pgconn is not None and err.pgconn.used_password
        return isinstance(err, _psycopg().OperationalError) and not refused

    def _explanation(self, err):
        whom = "%s as %s" % (self.name, self._parameters.get("user") or "this user")
        if self.delivered is not None:
            whom += " (after %d rows)" % self.delivered
        if self._timer and self._timer.has_cut:
            deadline = self._options["deadline"]
            return "%s was asked for %s and did not answer within deadline=%g s; see what the server waits for" % (
                whom, self._subject, deadline
            )
        state = err.sqlstate
        parts = (state, err.diag.message_primary or str(err), err.diag.message_hint)
        said = " ".join(" ".join(part for part in parts if part).split())
        advice = ADVICE[state and max((key for key in ADVICE if key is not None and state.startswith(key)), key=len)]
        said = "%s was asked for %s: %.300s; %s" % (whom, self._subject, said, advice)
        for key in SECRET:
            if self._parameters.get(key):
                said = said.replace(self._parameters[key], "***")
        return "".join(character if character.isprintable() else " " for character in said)


class _Cutter:
    """Shuts a socket down after some seconds, so that whoever reads from it is told of its end."""

    def __init__(self, descriptor, seconds):
        self._socket = socket.socket(fileno=os.dup(descriptor))
        self.has_cut = False
        self._timer = threading.Timer(max(0, seconds), self.cut)
        self._timer.daemon = True
        self._timer.start()

    def cut(self):
        self.has_cut = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def cancel(self):
        self._timer.cancel()
        self._socket.close()


def _psycopg():
    try:
        import psycopg
    except ImportError as err:
        said = "the source postgresql needs psycopg 3 on the controller: pip install 'psycopg[binary]' (%s)" % err
        raise ManifestError("missing_library", said) from err
    return psycopg


def _is_cockroachdb(connection):
    return connection.info.parameter_status("crdb_version") is not None


def _parameters(options, directory=None):
    """Return what libpq is told, by its names; with the password of the file if the playbook's directory is given."""
    psycopg = _psycopg()
    try:
        found = psycopg.conninfo.conninfo_to_dict(options["dsn"] or "")
    except psycopg.Error:
        said = "dsn must be postgresql://user@host/database or host=... dbname=... (libpq's connection strings)"
        raise ManifestError("bad_source", said) from None
    found.update({key: options[key] for key in CONNECTION if options[key] is not None})
    if directory is not None:
        for key in FILES:
            if found.get(key) not in (None, "", "system"):
                found[key] = os.path.join(directory, found[key])
        if options["password_file"]:
            found["password"] = _first_line_of(os.path.join(directory, options["password_file"]))
    return {"application_name": "microvm.reaper", **found, "client_encoding": "UTF8"}


def _first_line_of(path):
    try:
        with open(path, encoding="utf-8") as stream:
            return stream.readline().rstrip("\r\n")
    except (OSError, ValueError) as err:
        said = "password_file %s cannot be read: %s" % (path, getattr(err, "strerror", None) or "it is not UTF-8")
        raise ManifestError("bad_source", said) from None


def _name(parameters):
    where = str(parameters.get("host") or parameters.get("hostaddr") or parameters.get("service") or "localhost")
    if parameters.get("port"):
        where += ":%s" % parameters["port"]
    return "postgresql %s/%s" % (where, parameters.get("dbname") or "")


def _among(kind, vm_ids):
    """Return the condition that a row is of these ids, and its values; on the column itself where it has an index."""
    if kind == UUID:
        return "q.vm_id = ANY($1::uuid[])", [vm_id for vm_id in vm_ids if _is_uuid(vm_id)]
    return "q.vm_id%s = ANY($1::text[])" % ("" if kind in TEXTS else "::text"), list(vm_ids)


def _is_uuid(text):
    """Tell whether the database prints a uuid so; another text is none of its ids."""
    try:
        return str(uuid.UUID(text)) == text
    except ValueError:
        return False


def _begins_as_select(query):
    lines = (line.split("--")[0].strip() for line in query.splitlines())
    words = " ".join(lines).replace("(", " ").split()
    return bool(words) and words[0].lower() in ("select", "with", "values", "table")


def _bare(query):
    return query.strip().rstrip("; \n")


def _first_line(query):
    return "%.80s" % next((line.strip() for line in query.splitlines() if line.strip()), "")
