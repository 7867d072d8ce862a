"""Run parts of the test suite: `run.py PART... [-- ARGS]`.

Every part runs, whatever happened to the ones before it. What failed with the lines that tell why, a table
of the parts and one line that sums up all tests close the output, which is also kept by part under
.cache/logs/. The exit code is 1 if anything failed. An interrupt reaches the running part first, then its
leftovers are removed.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache"
BIN = Path(sys.executable).parent
PLUGINS = "collections/ansible_collections/microvm/reaper/plugins"
# Named, because molecule looks for its configuration only where it finds a git repository.
MOLECULE = ["molecule", "--base-config", ".config/molecule/config.yml"]
SCENARIOS = sorted(p.parent.name for p in ROOT.glob("molecule/*/molecule.yml"))
ENV = {
    **os.environ,
    "PATH": f"{BIN}:{os.environ['PATH']}",
    "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
    "LC_ALL": "C.UTF-8",
    "MOLECULE_COMMAND_BORDERS": "false",
    "PYTHONUNBUFFERED": "1",
    # So that `hosts.py down --all` knows the hosts of this run, and leaves those of another alone.
    "REAPER_TEST_OWNER": str(os.getpid()),
    **({} if sys.stdout.isatty() else {"NO_COLOR": "1"}),
}
# Each of a dozen processes would rewrite the assertions of all tests again: half of their time.
ENV.pop("PYTHONDONTWRITEBYTECODE", None)
# A file system in memory: to make and remove 10,000 directories costs a disk most of a minute.
MEMORY = Path("/dev/shm")
# Each part of the suite: seconds until it is given up, and its commands.
PARTS: dict[str, tuple[int, list[list[str]]]] = {
    "lint": (
        600,
        [
            ["ruff", "check", "--quiet"],
            ["yamllint", "--strict", "."],
            ["ansible-lint", "--strict", "-q"],
            ["mypy", "--no-error-summary", PLUGINS],
            ["antsibull-changelog", "lint"],
        ],
    ),
    "docs": (300, [["python", "tests/docs.py"]]),
    # Much of it waits for the kernel: more workers than cores.
    "unit": (600, [["pytest", "-n", "4", "tests/unit"]]),
    "simulator": (600, [["pytest", "-n", "2", "tests/simulator"]]),
    "oldest": (600, [["python", "tests/oldest.py"]]),
    "sanity": (1200, [["python", "tests/sanity.py"]]),
    "scenarios": (2400, [[*MOLECULE, "test", "-s", name] for name in SCENARIOS]),
    "integration": (3000, [["pytest", "tests/integration", "tests/hosts"]]),
}
CLEANUP: dict[str, list[list[str]]] = {
    "scenarios": [[*MOLECULE, "destroy", "-s", name] for name in SCENARIOS],
    "integration": [],
}
HOSTS = ROOT / "tests/hosts/hosts.py"


# A line of output that may tell why a command failed, and how much of these is repeated at the end.
TELLING = re.compile(r"fatal: |UNREACHABLE!|^(ERROR|CRITICAL|FAILED)\b|^E  |\b\w*Error: |--- given up")
TELLING_LINES, TELLING_LENGTH = 8, 400


class Interrupted(Exception):
    pass


@dataclass
class Count:
    passed: int = 0
    failed: int = 0
    skipped: int = 0

    def __add__(self, other: "Count") -> "Count":
        return Count(self.passed + other.passed, self.failed + other.failed, self.skipped + other.skipped)

    def __str__(self) -> str:
        return f"{self.passed} passed, {self.failed} failed" + (f", {self.skipped} skipped" if self.skipped else "")


@dataclass
class Result:
    name: str
    count: Count = field(default_factory=Count)
    seconds: float = 0.0
    why: list[str] = field(default_factory=list)


def stop(child: subprocess.Popen[str]) -> None:
    """End a child and all it started. An interrupt comes first: pytest then runs its fixtures' teardown."""
    for number, patience in ((signal.SIGINT, 60), (signal.SIGTERM, 10), (signal.SIGKILL, 10)):
        try:
            os.killpg(child.pid, number)
            child.wait(patience)
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            return


def execute(command: list[str], log: Path, timeout: float) -> int:
    """Run a command in a process group of its own; copy its output to the terminal and the log."""
    shown = " ".join(command)
    print(f"--- {shown}", flush=True)
    child = subprocess.Popen(
        command,
        cwd=ROOT,
        env=ENV,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )

    def copy() -> None:
        with log.open("a") as file:
            file.write(f"--- {shown}\n")
            for line in child.stdout or []:
                sys.stdout.write(line)
                sys.stdout.flush()
                file.write(line)

    # A daemon: something the command left behind may hold the pipe open for ever.
    copier = threading.Thread(target=copy, daemon=True)
    copier.start()
    try:
        code = child.wait(timeout)
    except subprocess.TimeoutExpired:
        given_up = f"--- given up after {timeout:.0f} s: {shown}"
        print(given_up, flush=True)
        with log.open("a") as file:
            file.write(f"{given_up}\n")
        code = 1
    finally:
        stop(child)
        copier.join(5)
    return code


def telling(log: Path, start: int) -> list[str]:
    """The lines of a log, from an offset on, that may tell why a command failed: its last ones if none does."""
    with log.open(errors="replace") as file:
        file.seek(start)
        lines = [line.rstrip()[:TELLING_LENGTH] for line in file if line.strip()]
    return ([line for line in lines if TELLING.search(line)] or lines)[-TELLING_LINES:]


def count_junit(report: Path, code: int) -> Count:
    count = Count()
    for suite in ET.parse(report).iter("testsuite") if report.exists() else []:
        number = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
        failed = number["failures"] + number["errors"]
        count += Count(max(0, number["tests"] - failed - number["skipped"]), failed, number["skipped"])
    # Nothing collected, a crash, a test killed: no green without a test that passed.
    return count + Count(failed=1) if code and not count.failed else count


@contextlib.contextmanager
def scratch(name: str) -> Iterator[list[str]]:
    """Return options that give the unit tests a directory in memory, where there is enough of it."""
    if name == "unit" and MEMORY.is_mount() and shutil.disk_usage(MEMORY).free > 2**30:
        with tempfile.TemporaryDirectory(prefix="reaper-unit-", dir=MEMORY, ignore_cleanup_errors=True) as directory:
            yield [f"--basetemp={directory}/tests"]
    else:
        yield []


def run_part(result: Result, args: list[str]) -> None:
    limit, commands = PARTS[result.name]
    log, report = CACHE / "logs" / f"{result.name}.log", CACHE / "junit" / f"{result.name}.xml"
    for path in (log, report):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
    if not commands:
        print("nothing to run")
        result.count += Count(failed=1)
    deadline = time.monotonic() + limit
    for command in commands:
        pytest = command[0] == "pytest"
        extra = [*args, f"--junitxml={report}"] if pytest else args
        start = log.stat().st_size if log.exists() else 0
        with scratch(result.name) as options:
            code = execute([*command, *extra, *options], log, max(1, deadline - time.monotonic()))
        result.count += count_junit(report, code) if pytest else Count(passed=code == 0, failed=code != 0)
        if code:
            result.why += [f"--- {' '.join(command)}", *telling(log, start)]


def cleanup(name: str) -> None:
    commands = CLEANUP.get(name)
    if commands is None:
        return
    if HOSTS.exists():
        commands = [*commands, ["python", str(HOSTS), "down", "--all"]]
    for command in commands:
        execute(command, CACHE / "logs" / "cleanup.log", 120)


def interrupt(number: int, _frame: object) -> None:
    # A second signal must not cut the clean-up short.
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    raise Interrupted(signal.Signals(number).name)


def main(argv: list[str]) -> int:
    names, args = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    unknown = [name for name in names if name not in PARTS]
    if unknown or not names:
        print(f"usage: run.py PART... [-- ARGS], PART one of {' '.join(PARTS)}", file=sys.stderr)
        return 2
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, interrupt)

    results: list[Result] = []
    interrupted = ""
    for name in names:
        print(f"\n=== {name}", flush=True)
        results.append(Result(name))
        started = time.monotonic()
        try:
            run_part(results[-1], args)
        except Interrupted as why:
            interrupted = str(why)
            results[-1].count += Count(failed=1)
            cleanup(name)
        results[-1].seconds = time.monotonic() - started
        if interrupted:
            break

    print()
    for result in results:
        print("".join(f"{line}\n" for line in result.why), end="")
    for result in results:
        verdict = "FAILED" if result.count.failed else "ok"
        print(f"{result.name:12} {verdict:7} {result.seconds:6.1f} s  {result.count}")
    for name in names[len(results) :]:
        print(f"{name:12} not run ({interrupted})")
    total = sum((result.count for result in results), Count())
    print(total)
    return 1 if total.failed or not total.passed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
