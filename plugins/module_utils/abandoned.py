# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The records of VMs that a control plane has abandoned in its database, and the reservations that it has forgotten.

A *record* is the row of one incarnation of a VM, a *reservation* what was set aside for it on its host, an *instance*
what owns VMs, and names the one it runs on and the one it moves to. The tables are omicron's, or others; see NAMES.

The rule. A record is **abandoned** when its state is terminal, it is not marked deleted, and its instance, if there is
one, names it neither as active nor as target. A reservation is **stale** when it is tombstoned, no instance names it,
and

- it has neither a record, nor an instance that is not deleted, or
- its record is in a terminal state and marked deleted: what a deletion leaves that lost its reservation halfway.

A reservation in any other state belongs to its record. Without one it is a start in flight, because the reservation is
made first; it is never touched.

The facts of the hosts can forbid, never allow: what a host of the sweep still has something of is a *conflict*, what is
on a host that did not answer is *unknown*, what changed after the hosts were looked at is *young*. All three stay.

Strikes. A terminal state is the control plane saying that the VM is over; it needs no strike. A stale reservation is
known only by what is absent, so it is struck twice. Nothing that must last may live on the controller, reservations
have no time of their own, and a host's ledger tells of that host's things. So both strikes are looks at the database,
by its own clock: the first when the reservation is listed, the second inside the transaction that deletes it, at least
``strike_interval`` seconds later, of a row that is still the same. Nobody waits where nothing is stale.

Each is settled in a serializable transaction of its own, which locks the record and its instance, applies the rule
again, deletes the reservation, and only then sets the time of deletion, where there is none. What fails undoes both.
"""

from __future__ import annotations

import collections
import random
import time
import traceback
import uuid

try:
    import psycopg
    from psycopg import conninfo as conninfos
    from psycopg import errors as pg
    from psycopg import sql

    PSYCOPG_MISSING = None
except ImportError:
    PSYCOPG_MISSING = traceback.format_exc()

PAGE = 1000
RETRIES = 6
MAX_NAME_BYTES = 63
MAX_LEFT = 100
MAX_SAID = 10
MAX_SECONDS = 10**9

# The tables and columns, by what they mean here. The values are those of omicron.
NAMES = {
    "records": {
        "table": "vmm",
        "id": "id",
        "instance": "instance_id",
        "host": "sled_id",
        "state": "state",
        "created": "time_created",
        "changed": "time_state_updated",
        "deleted": "time_deleted",
    },
    "reservations": {
        "table": "sled_resource_vmm",
        "id": "id",
        "instance": "instance_id",
        "host": "sled_id",
        "state": "state",
    },
    "instances": {
        "table": "instance",
        "id": "id",
        "active": "active_propolis_id",
        "target": "target_propolis_id",
        "deleted": "time_deleted",
    },
}
TERMINAL_STATES = ("destroyed", "failed", "saga_unwound")
TOMBSTONED_STATES = ("tombstoned",)
# What no configuration may call over.
LIVE_STATES = ("active", "creating", "migrating", "paused", "rebooting", "running", "starting", "stopping", "target")

ABANDONED = "abandoned"
CONFLICT = "conflict"
UNKNOWN = "unknown"
YOUNG = "young"
CHANGED = "changed"

COUNTERS = (
    "vmms_found",
    "vmms_deleted",
    "vmms_already_deleted",
    "sled_reservations_deleted",
    "reservations_stale",
    "conflicts",
    "unknown",
    "young",
    "errors",
)

RECORD = "vmm"
RESERVATION = "reservation"

# ``key`` is the id as the database has it, ``id`` the same as text. ``identity`` is what of a reservation must be the
# same at the second look, ``reservations`` how many rows of them go.
Found = collections.namedtuple("Found", "what key id host state identity reservations verdict reason")


class AbandonedError(Exception):
    """Nothing was changed; the text says what was asked, what came back and what to do."""


class Lost(Exception):
    """The connection is gone; the text says so."""


class _Changed(Exception):
    """It is no longer what it was when it was listed."""


# --- what the hosts say: pure ------------------------------------------------------------------------------------


def normal(text):
    """Return an id or a name so that two ways of writing the same one are equal; a UUID has many."""
    text = str(text).strip()
    try:
        return str(uuid.UUID(text))
    except ValueError:
        return text.casefold()


class Seen:
    """What the hosts of a sweep have something of: of ``{host: [vm_id]}``, the hosts that answered."""

    def __init__(self, facts):
        self.hosts = set()
        self._where = {}
        for host, ids in facts.items():
            if not isinstance(ids, list) or not all(isinstance(one, str) for one in ids):
                raise AbandonedError("facts: %.200r must be a list of the ids that were seen there" % (host,))
            self.hosts.add(normal(host))
            for one in ids:
                self._where.setdefault(normal(one), []).append(str(host))

    def judge(self, vm_id, host, settled):
        """Return ``(verdict, reason)`` of what the rule calls abandoned or stale."""
        where = self._where.get(normal(vm_id))
        if where:
            return CONFLICT, "something of it is still on %s" % ", ".join(sorted(where))
        if host is None:
            return UNKNOWN, "the database does not say on which host it is"
        if normal(host) not in self.hosts:
            return UNKNOWN, "its host %s did not answer in this sweep" % host
        if not settled:
            return YOUNG, "it changed after the hosts were looked at, or too shortly before"
        return ABANDONED, None


# --- the statements: pure ----------------------------------------------------------------------------------------

_OVER = "v.{v_state}::text = ANY(%(terminal)s)"
_UNNAMED = """NOT EXISTS (SELECT 1 FROM {instances} i WHERE i.{i_id} = v.{v_instance}
    AND (i.{i_active} = v.{v_id} OR i.{i_target} = v.{v_id}))"""
# An unknown time is a recent one.
_BEFORE = "COALESCE(GREATEST(%s) < now() - %%(min_age)s * interval '1 second', false)"
_SETTLED = _BEFORE % "v.{v_created}, v.{v_changed}"

_LIST_RECORDS = (
    "SELECT v.{v_id}, v.{v_host}::text, v.{v_state}::text, " + _SETTLED + ","
    " (SELECT count(*) FROM {reservations} r WHERE r.{r_id} = v.{v_id})"
    " FROM {records} v WHERE v.{v_deleted} IS NULL AND " + _OVER + " AND " + _UNNAMED
)
_NEXT_RECORDS = " AND v.{v_id} > %(after)s"
_ORDER_RECORDS = " ORDER BY v.{v_id} LIMIT %(page)s"

_LIST_RESERVATIONS = (
    "SELECT r.{r_id}, r.{r_host}::text, r.{r_state}::text, r.{r_instance}::text,"
    " CASE WHEN v.{v_id} IS NULL THEN true ELSE "
    + _BEFORE % "v.{v_created}, v.{v_changed}, v.{v_deleted}"
    + " END, now()"
    " FROM {reservations} r LEFT JOIN {records} v ON v.{v_id} = r.{r_id}"
    " WHERE r.{r_state}::text = ANY(%(tombstoned)s)"
    " AND NOT EXISTS (SELECT 1 FROM {instances} i WHERE i.{i_id} IN (r.{r_instance}, v.{v_instance})"
    " AND (i.{i_active} = r.{r_id} OR i.{i_target} = r.{r_id}))"
    " AND (v.{v_deleted} IS NOT NULL AND " + _OVER + " OR v.{v_id} IS NULL AND NOT EXISTS ("
    "SELECT 1 FROM {instances} i WHERE i.{i_id} = r.{r_instance} AND i.{i_deleted} IS NULL))"
)
_NEXT_RESERVATIONS = " AND r.{r_id} > %(after)s"
_ORDER_RESERVATIONS = " ORDER BY r.{r_id} LIMIT %(page)s"

_STATEMENTS = {
    "first_records": _LIST_RECORDS + _ORDER_RECORDS,
    "next_records": _LIST_RECORDS + _NEXT_RECORDS + _ORDER_RECORDS,
    "first_reservations": _LIST_RESERVATIONS + _ORDER_RESERVATIONS,
    "next_reservations": _LIST_RESERVATIONS + _NEXT_RESERVATIONS + _ORDER_RESERVATIONS,
    "lock_record": "SELECT 1 FROM {records} v WHERE v.{v_id} = %(id)s FOR UPDATE",
    "lock_instances": (
        "SELECT 1 FROM {instances} i WHERE i.{i_id} IN (SELECT v.{v_instance} FROM {records} v WHERE v.{v_id} = %(id)s"
        " UNION SELECT r.{r_instance} FROM {reservations} r WHERE r.{r_id} = %(id)s) FOR UPDATE OF i"
    ),
    "check_record": (
        "SELECT v.{v_deleted} IS NOT NULL FROM {records} v WHERE v.{v_id} = %(id)s AND "
        + " AND ".join([_OVER, _UNNAMED, _SETTLED])
    ),
    "check_reservation": _LIST_RESERVATIONS
    + " AND r.{r_id} = %(id)s AND now() >= %(first)s + %(strike_interval)s * interval '1 second'",
    "record_is_there": "SELECT 1 FROM {records} v WHERE v.{v_id} = %(id)s",
    "delete_reservation": "DELETE FROM {reservations} r WHERE r.{r_id} = %(id)s",
    "delete_stale": "DELETE FROM {reservations} r WHERE r.{r_id} = %(id)s AND r.{r_state}::text = ANY(%(tombstoned)s)",
    "reservation_is_there": "SELECT 1 FROM {reservations} r WHERE r.{r_id} = %(id)s",
    "mark": "UPDATE {records} v SET {v_deleted} = now() WHERE v.{v_id} = %(id)s AND v.{v_deleted} IS NULL",
}


def identifier(option, name):
    """Return the quoted identifier of a column; raises AbandonedError for what cannot be the name of one."""
    if not isinstance(name, str) or not name.isprintable() or not 0 < len(name.encode()) <= MAX_NAME_BYTES:
        raise AbandonedError(
            "%s: %.200r cannot be a name in a database: 1 to %d printable bytes are" % (option, name, MAX_NAME_BYTES)
        )
    return _quoted(name)


def table(option, name):
    """Return the quoted name of a table, ``table``, ``schema.table`` or ``database.schema.table``."""
    parts = name.split(".") if isinstance(name, str) else [name]
    if len(parts) > 3:
        raise AbandonedError("%s: %.200r has more parts than database.schema.table" % (option, name))
    for part in parts:
        identifier(option, part)
    return _quoted(*parts)


def _quoted(*parts):
    # psycopg quotes a name for the database, but looks for placeholders in it afterwards.
    return sql.Identifier(*[part.replace("%", "%%") for part in parts])


def statements(names):
    """Return the statements, ready to be executed, for tables and columns like those of NAMES."""
    quoted = {}
    for kind, letter in (("records", "v"), ("reservations", "r"), ("instances", "i")):
        for meaning in NAMES[kind]:
            name, option = names[kind][meaning], "%s.%s" % (kind, meaning)
            if meaning == "table":
                quoted[kind] = table(option, name)
            else:
                quoted["%s_%s" % (letter, meaning)] = identifier(option, name)
    return {key: sql.SQL(text).format(**quoted) for key, text in _STATEMENTS.items()}


# --- the database ------------------------------------------------------------------------------------------------


def connection_options(text, password=None):
    """Return what psycopg takes of a connection string, with our defaults; raises AbandonedError without its text."""
    try:
        options = conninfos.conninfo_to_dict(text)
    except psycopg.Error:
        raise AbandonedError(
            "conninfo is no connection string of libpq: key=value pairs, a value with spaces in single quotes, or a URL"
        ) from None
    if "password" in options:
        raise AbandonedError("conninfo must not have a password; give it in password or password_file")
    ours = {"application_name": "microvm.reaper", "connect_timeout": 10}
    return dict(ours, **dict(options, **({"password": password} if password else {})))


class Database:
    """A control plane's database.

    ``params`` are what the statements take beside ids: ``{terminal: [state], tombstoned: [state], min_age}``. What
    changed less than ``min_age`` seconds ago is young. ``timeout`` is in seconds, of one statement.
    """

    def __init__(self, options, names, params, timeout=30.0):
        self._statements = statements(names)
        self._params = params
        self._timeout = timeout
        self._began = time.monotonic()
        try:
            self.connection = psycopg.connect(autocommit=True, prepare_threshold=None, **options)
        except psycopg.Error as err:
            raise AbandonedError("cannot connect to the database: %s" % str(err).strip()) from err

    def __enter__(self):
        return self

    def __exit__(self, *_exception):
        self.connection.close()

    def transact(self, work, read_only=False):
        """Return what ``work(run)`` returns, done in one transaction; a few times anew if it is not serializable.

        ``run(statement, **params)`` executes one of the statements and returns the cursor. Raises psycopg's errors,
        and Lost.
        """
        level = psycopg.IsolationLevel.REPEATABLE_READ if read_only else psycopg.IsolationLevel.SERIALIZABLE
        for attempt in range(RETRIES + 1):
            try:
                self.connection.isolation_level = level
                self.connection.read_only = read_only
                with self.connection.transaction():
                    self._limit()
                    return work(self._run)
            except (pg.SerializationFailure, pg.DeadlockDetected):
                if attempt == RETRIES:
                    raise
                time.sleep(0.05 * 2**attempt * random.uniform(0.5, 1.5))
            except psycopg.Error as err:
                if self.connection.closed:
                    raise Lost("the connection to the database was lost: %s" % str(err).strip()) from err
                raise
        return None

    def _run(self, name, **params):
        # The facts grow older while we work, and with them what counts as young.
        min_age = self._params["min_age"] + time.monotonic() - self._began
        return self.connection.execute(self._statements[name], dict(self._params, min_age=min_age, **params))

    def _limit(self):
        """Let no statement, and nobody's lock, hold this transaction up for longer than the timeout."""
        limit = sql.Literal(max(1, round(self._timeout * 1000)))
        both = sql.SQL("SET LOCAL statement_timeout = {}; SET LOCAL lock_timeout = {}").format(limit, limit)
        self.connection.execute(both)


# --- looking -----------------------------------------------------------------------------------------------------


def look(database, seen):
    """Return ``(records, reservations, instant)``: lists of Found, at one instant of the database's clock.

    All is read in pages, in one read-only transaction.
    """

    def work(run):
        records = [_record(row, seen) for row in _pages(run, "records")]
        rows = list(_pages(run, "reservations"))
        return records, [_reservation(row, seen) for row in rows], rows[0][-1] if rows else None

    try:
        return database.transact(work, read_only=True)
    except Lost as err:
        raise AbandonedError(str(err)) from err
    except psycopg.Error as err:
        raise AbandonedError(
            "the records cannot be listed: %s; if the control plane has other tables, columns or states, name them in "
            "records, reservations, instances, terminal_states and tombstoned_states" % str(err).strip()
        ) from err


def _pages(run, what):
    rows = run("first_%s" % what, page=PAGE).fetchall()
    while rows:
        yield from rows
        if len(rows) < PAGE:
            return
        rows = run("next_%s" % what, page=PAGE, after=rows[-1][0]).fetchall()


def _record(row, seen):
    key, host, state, settled, reservations = row
    verdict, reason = seen.judge(key, host, settled)
    return Found(RECORD, key, str(key), host, state, None, reservations, verdict, reason)


def _reservation(row, seen):
    key, host, state, _instance, settled, _now = row
    verdict, reason = seen.judge(key, host, settled)
    return Found(RESERVATION, key, str(key), host, state, _identity(row), 1, verdict, reason)


def _identity(row):
    """Return what makes a reservation the same one: all that is read of it but times."""
    return row[:4]


def counters(records, reservations):
    """Return the COUNTERS of a look; nothing is deleted yet."""
    verdicts = collections.Counter(found.verdict for found in records + reservations)
    return dict(
        dict.fromkeys(COUNTERS, 0),
        vmms_found=len(records),
        reservations_stale=len(reservations),
        conflicts=verdicts[CONFLICT],
        unknown=verdicts[UNKNOWN],
        young=verdicts[YOUNG],
    )


def summary(counts, check_mode):
    """Return COUNTERS as a sentence."""
    said = "%s and %s found; %s marked deleted, %s deleted" % (
        _many(counts["vmms_found"], "abandoned record"),
        _many(counts["reservations_stale"], "stale reservation"),
        _many(counts["vmms_deleted"], "record"),
        _many(counts["sled_reservations_deleted"], "reservation"),
    )
    left = [_many(counts["conflicts"], "conflict")] if counts["conflicts"] else []
    left += ["%d %s" % (counts[key], key) for key in ("unknown", "young") if counts[key]]
    said += "; left alone: %s" % ", ".join(left) if left else ""
    return said + (" (check mode: nothing was changed)" if check_mode else "")


def _many(count, thing):
    return "%d %s%s" % (count, thing, "" if count == 1 else "s")


def worst(left):
    """Return at most MAX_LEFT of what was left alone, conflicts first."""
    order = (CONFLICT, CHANGED, UNKNOWN, YOUNG)
    return sorted(left, key=lambda found: (order.index(found.verdict), found.what, found.id))[:MAX_LEFT]


def conflicts(left):
    """Return a sentence for each conflict, a few of them."""
    found = [one for one in left if one.verdict == CONFLICT]
    more = ["%d more conflicts" % (len(found) - MAX_SAID)] if len(found) > MAX_SAID else []
    return ["conflict: %s %s: %s" % (one.what, printable(one.id), one.reason) for one in found[:MAX_SAID]] + more


def failures(failed):
    """Return in one text what failed; what concerns them all has no ``what``."""
    said = [
        "%s%s" % ("%s %s: " % (one["what"], printable(one["id"])) if one["what"] else "", one["message"])
        for one in failed[:MAX_SAID]
    ]
    more = ["and %d more" % (len(failed) - MAX_SAID)] if len(failed) > MAX_SAID else []
    return "%d could not be settled: %s" % (len(failed), "; ".join(said + more))


def printable(text):
    """Return the text without anything that a terminal would obey."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def told(found):
    """Return one Found as the modules return it."""
    return {
        "what": found.what,
        "id": found.id,
        "host": found.host,
        "state": found.state,
        "verdict": found.verdict,
        "reason": found.reason,
    }


# --- settling ----------------------------------------------------------------------------------------------------


class Settling:
    """Settles what a look has found, or nothing if it is more than ``most``; in check mode only counts.

    ``counters``; ``gone``, the Found of which a row changed; ``left``, those that stay; ``failed``, each
    ``{what, id, message}``.
    """

    def __init__(self, database, seen, most, strike_interval, check_mode=False):
        self._database = database
        self._strike_interval = strike_interval
        records, reservations, self._first = look(database, seen)
        second = time.monotonic() + strike_interval
        self.counters = counters(records, reservations)
        self.left = [found for found in records + reservations if found.verdict != ABANDONED]
        self.gone, self.failed = [], []
        records, stale = _going(records), _going(reservations)
        if len(records) + len(stale) > most:
            raise AbandonedError(
                "stopped before the first change: %d records and %d reservations would go, more than max=%d; raise max "
                "if this is right" % (len(records), len(stale), most)
            )
        if check_mode:
            for found in records + stale:
                self._count(found, found.reservations, found.what == RECORD)
            return
        try:
            self._settle(records, self._settle_record)
            if stale:
                time.sleep(max(0.0, second - time.monotonic()))
            self._settle(stale, self._settle_stale)
        except Lost as err:
            self._fail(None, "%s; what was not settled is left to the next run" % err)

    def _settle(self, going, how):
        """Settle each on its own; what fails is told, and the others go on."""
        for found in going:
            try:
                self._count(found, *self._database.transact(lambda run, found=found: how(run, found)))
            except _Changed as err:
                self.left.append(found._replace(verdict=CHANGED, reason=str(err)))
            except psycopg.Error as err:
                self._fail(found, str(err).strip())

    @staticmethod
    def _settle_record(run, found):
        """Delete the reservation of one record and mark the record deleted. Returns how many rows of each."""
        run("lock_record", id=found.key)
        run("lock_instances", id=found.key)
        row = run("check_record", id=found.key).fetchone()
        if row is None and run("record_is_there", id=found.key).fetchone():
            raise _Changed("it is not abandoned any more: its instance names it, or its state is another")
        if row is None:
            return 0, 0
        reservations = run("delete_reservation", id=found.key).rowcount
        left = run("reservation_is_there", id=found.key).fetchone()
        _prove(not left, "its reservation was deleted and is still there")
        already = row[0]
        marked = 0 if already else run("mark", id=found.key).rowcount
        _prove(already or marked, "it could not be marked deleted")
        return reservations, marked

    def _settle_stale(self, run, found):
        """Delete one stale reservation if this second look shows what the first one did."""
        run("lock_record", id=found.key)
        run("lock_instances", id=found.key)
        strike = {"first": self._first, "strike_interval": self._strike_interval}
        row = run("check_reservation", id=found.key, **strike).fetchone()
        if row is None or _identity(row) != found.identity:
            raise _Changed("it is not stale any more, or went, or the database's clock did not go on")
        reservations = run("delete_stale", id=found.key).rowcount
        left = run("reservation_is_there", id=found.key).fetchone()
        _prove(not left, "it was deleted and is still there")
        return reservations, 0

    def _count(self, found, reservations, marked):
        self.counters["sled_reservations_deleted"] += reservations
        if found.what == RECORD:
            self.counters["vmms_deleted" if marked else "vmms_already_deleted"] += 1
        if reservations or marked:
            self.gone.append(found)

    def _fail(self, found, message):
        self.counters["errors"] += 1
        self.failed.append({"what": found and found.what, "id": found and found.id, "message": message})


def _going(findings):
    return [found for found in findings if found.verdict == ABANDONED]


def _prove(true, otherwise):
    """Undo the transaction when the database did something else than it was told, such as by a trigger or a policy."""
    if not true:
        raise psycopg.DataError(otherwise + "; a trigger or a row security policy of the database?")


# --- what the modules have in common -----------------------------------------------------------------------------


def argument_spec(**others):
    """Return the options of both modules, and those of one."""
    return dict(
        {
            "conninfo": {"type": "str", "default": ""},
            "password": {"type": "str", "no_log": True},
            "password_file": {"type": "path", "no_log": False},
            "min_age": {"type": "float", "default": 60.0},
            "terminal_states": {"type": "list", "elements": "str", "default": list(TERMINAL_STATES)},
            "tombstoned_states": {"type": "list", "elements": "str", "default": list(TOMBSTONED_STATES)},
            "timeout": {"type": "float", "default": 30.0},
        },
        **dict({kind: _names_spec(names) for kind, names in NAMES.items()}, **others)
    )


def _names_spec(names):
    options = {meaning: {"type": "str", "default": name} for meaning, name in names.items()}
    return {"type": "dict", "default": {}, "apply_defaults": True, "options": options}


def open_database(params, hide, **connection):
    """Return the Database that a module's parameters mean; raises AbandonedError.

    ``hide`` takes what must not be shown. ``connection`` are options of libpq that conninfo may replace.
    """
    _check(params)
    password = _password(params)
    if password:
        hide(password)
    try:
        options = connection_options(params["conninfo"], password)
    except AbandonedError:
        hide(params["conninfo"])
        raise
    values = {
        "terminal": params["terminal_states"],
        "tombstoned": params["tombstoned_states"],
        "min_age": params["facts_age"] + params["min_age"],
    }
    return Database(dict(connection, **options), {kind: params[kind] for kind in NAMES}, values, params["timeout"])


def _check(params):
    """Refuse what the types allow and the meaning does not."""
    for name in ("facts_age", "min_age", "timeout", "strike_interval", "max"):
        # Written so that NaN, which is neither more nor less than anything, is refused too.
        if not 0 <= params.get(name, 0) <= MAX_SECONDS:
            raise AbandonedError("%s must be a number between 0 and %d, not %r" % (name, MAX_SECONDS, params[name]))
    for name in ("terminal_states", "tombstoned_states"):
        alive = [state for state in params[name] if state.casefold() in LIVE_STATES]
        if alive:
            raise AbandonedError("%s must not have %r: what is in that state belongs to a live VM" % (name, alive[0]))


def _password(params):
    path = params["password_file"]
    if not path:
        return params["password"]
    try:
        with open(path, encoding="utf-8") as stream:
            password = stream.readline().rstrip("\r\n")
    except (OSError, ValueError) as err:
        raise AbandonedError("password_file %s cannot be read: %s" % (path, err)) from None
    if not password:
        raise AbandonedError("password_file %s has no password in its first line" % path)
    return password
