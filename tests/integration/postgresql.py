# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A real PostgreSQL for the tests, in a temporary directory, gone with the process that started it.

    with postgresql.server() as server:
        database = server.database()              # new and empty; `server.database("CREATE TABLE ...")` fills it
        server.sql("SELECT 1", dbname=database)   # -> [(1,)]
        with server.connect(database) as connection: ...
        with server.replica() as replica: ...     # streams from it; `replica` is a Server too
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator

import psycopg
from psycopg import sql

ACCOUNT = "postgres"  # of the machine, made by the Debian package
ROLE, PASSWORD = "postgres", "only for tests"
START_SECONDS = 60
SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "max_connections": "50",
    "shared_buffers": "64MB",
    "log_statement": "all",
    "timezone": "UTC",
}
# Runs the server and waits for the end of its input, which ends with whoever started it, even by SIGKILL; then it ends
# the server without a checkpoint (a frozen backend is killed after 5 seconds) and removes its directory.
KEEPER = r"""
directory=$1; shift
"$@" </dev/null >>"$directory/log" 2>&1 &
server=$!
read -r _
kill -QUIT "$server" 2>/dev/null
wait "$server"
rm -rf "$directory"
"""


@dataclasses.dataclass
class Server:
    """A running PostgreSQL. ``directory`` has its socket, data and log; ``pid`` is its first process."""

    directory: pathlib.Path
    port: int

    @property
    def pid(self) -> int:
        return int((self.directory / "data" / "postmaster.pid").read_text().split()[0])

    @property
    def log(self) -> str:
        return (self.directory / "log").read_text(errors="replace")

    def options(self, dbname: str = "postgres", **others: str | int) -> dict:
        """Return what a client needs to connect over TCP, by libpq's names."""
        local = {"host": "127.0.0.1", "port": self.port, "user": ROLE, "password": PASSWORD, "dbname": dbname}
        return {**local, **others}

    def connect(self, dbname: str = "postgres", **others) -> psycopg.Connection:
        """Connect over the socket, without a password, every statement its own transaction."""
        options = {"host": str(self.directory), "port": self.port, "user": ROLE, "autocommit": True, **others}
        return psycopg.connect(dbname=dbname, **options)

    def sql(self, statement: str, parameters: dict | tuple | None = None, dbname: str = "postgres") -> list[tuple]:
        """Run one statement, or several without parameters; return the rows of the last one."""
        with self.connect(dbname) as connection:
            cursor = connection.execute(statement.encode(), parameters)
            while cursor.nextset():
                pass
            return cursor.fetchall() if cursor.description else []

    def database(self, statements: str = "") -> str:
        """Create a database with these statements in it; return its name."""
        name = f"test_{time.monotonic_ns()}"
        with self.connect() as connection:
            connection.execute(sql.SQL("CREATE DATABASE {} TEMPLATE template0").format(sql.Identifier(name)))
        if statements:
            self.sql(statements, dbname=name)
        return name

    @contextlib.contextmanager
    def replica(self, **settings: str) -> Iterator[Server]:
        """Start a server that streams from this one: ``recovery_min_apply_delay="1h"`` lets it lag."""
        with _directory() as directory:
            source = ["--host", self.directory, "--port", self.port, "--username", ROLE, "--checkpoint=fast"]
            _run("pg_basebackup", *source, "--pgdata", directory / "data", "--no-sync", "--write-recovery-conf")
            with _running(directory, settings) as replica:
                yield replica


@contextlib.contextmanager
def server(**settings: str) -> Iterator[Server]:
    """Start a new, empty server: ``server(max_connections="10")``."""
    with _directory() as directory:
        password = directory / "password"
        password.write_text(PASSWORD)
        _give_away(password)
        trust = ["--auth-local=trust", "--auth-host=scram-sha-256", "--username", ROLE, "--pwfile", password]
        _run("initdb", "--pgdata", directory / "data", "--no-sync", "--encoding=UTF8", "--locale=C.UTF-8", *trust)
        with _running(directory, settings) as running:
            yield running


@contextlib.contextmanager
def _directory() -> Iterator[pathlib.Path]:
    """Make a directory of the server's user, with a name that is short enough for a socket."""
    directory = pathlib.Path(tempfile.mkdtemp(prefix="reaper-pg-", dir="/tmp"))
    try:
        _give_away(directory)
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def _running(directory: pathlib.Path, settings: dict[str, str]) -> Iterator[Server]:
    """Run the server of a directory that has its data, until the end of the block."""
    running = Server(directory, _free_port())
    fixed = {"port": str(running.port), "unix_socket_directories": str(directory)}
    options = [f"--{key}={value}" for key, value in {**SETTINGS, **settings, **fixed}.items()]
    command = _command("postgres", "-D", directory / "data", *options)
    keeper = subprocess.Popen(
        ["/bin/sh", "-c", KEEPER, "keeper", str(directory), *command], stdin=subprocess.PIPE, start_new_session=True
    )
    try:
        _wait_for(running)
        yield running
    finally:
        if keeper.stdin:
            keeper.stdin.close()
        keeper.wait(60)


def _wait_for(running: Server) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            return running.connect().close()
        except psycopg.OperationalError as err:
            if time.monotonic() > deadline:
                raise AssertionError(f"PostgreSQL did not start: {err}\n{running.log}") from err
        time.sleep(0.05)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _give_away(path: pathlib.Path) -> None:
    """Give a path to the account that the server runs as: PostgreSQL refuses to run as root."""
    if os.geteuid() == 0:
        shutil.chown(path, ACCOUNT, ACCOUNT)


def _command(program: str, *arguments: object) -> list[str]:
    versions = pathlib.Path("/usr/lib/postgresql").glob(f"*/bin/{program}")
    newest = max(versions, key=lambda path: float(path.parts[-3]), default=program)
    drop = ["setpriv", f"--reuid={ACCOUNT}", f"--regid={ACCOUNT}", "--clear-groups"] if os.geteuid() == 0 else []
    return [*drop, str(newest), *map(str, arguments)]


def _run(program: str, *arguments: object) -> None:
    done = subprocess.run(_command(program, *arguments), capture_output=True, text=True, cwd="/", check=False)
    assert done.returncode == 0, done.stderr
