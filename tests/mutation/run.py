"""Run the tests on mutants of the modules that decide: `run.py [--only FILE] [--list]`. README.md says how to read it.

What the tests import is imported once; each mutant is then tried in a child that is forked from here.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import gc
import importlib
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from child import ROOT, Run, run_tests
from mutants import MODULE, Mutant, mutants

HERE = Path(__file__).resolve().parent
SURVIVORS = HERE / "survivors.yml"
KEY = ("file", "function", "operator", "before", "after")
LEAST_PERCENT = 95
# A child that outlives this is killed. One test alone has as long as it took on the module as it is, being profiled
# then, and some seconds more.
CHILD_SECONDS = 300
TEST_SECONDS = 20
KILLED, TIMEOUT, SURVIVED = "killed", "timeout", "survived"
# The modules that are mutated, and the files in tests/unit that are about them.
SUBJECTS = {
    "plugins/plugin_utils/manifest.py": ["manifest", "collector", "sources"],
    "plugins/module_utils/ledger.py": ["ledger", "ladder", "latch_and_pins", "acts"],
    "plugins/plugin_utils/planner.py": ["planner", "ladder", "latch_and_pins", "supervisors", "what_a_plan_says"],
    "plugins/plugin_utils/brake.py": ["brake"],
}
class Stop(Exception):
    """The mutants cannot be tried; the text says why."""


@dataclass
class Result:
    """What came of the mutants of one file."""

    file: str
    outcomes: dict[str, list[Mutant]] = field(default_factory=lambda: collections.defaultdict(list))

    @property
    def total(self) -> int:
        return sum(len(some) for some in self.outcomes.values())

    @property
    def percent(self) -> float:
        return 100 * (self.total - len(self.outcomes[SURVIVED])) / max(self.total, 1)


@dataclass
class Child:
    """A process that runs tests; ``end`` is the moment it is given up, on the monotonic clock."""

    pid: int
    scratch: Path
    end: float
    mutant: Mutant


class Pool:
    """Forks children, at most ``workers`` at a time."""

    def __init__(self, workers: int, scratch: Path) -> None:
        self.workers, self.scratch = workers, scratch
        self.children: dict[int, Child] = {}
        self.count = 0

    def start(self, mutant: Mutant, order: list[str] | None, test_seconds: float) -> None:
        self.count += 1
        scratch = self.scratch / str(self.count)
        sys.stdout.flush()
        pid = os.fork()
        if not pid:
            _be_child(mutant, order, test_seconds, scratch)
        self.children[pid] = Child(pid, scratch, time.monotonic() + CHILD_SECONDS, mutant)

    def wait(self) -> tuple[Mutant, Run]:
        """Return what the next child that ends has to say."""
        while True:
            for child in list(self.children.values()):
                if os.waitpid(child.pid, os.WNOHANG)[0]:
                    return child.mutant, self._ended(child)
                if time.monotonic() > child.end:
                    _kill(child.pid, signal.SIGKILL)
                    os.waitpid(child.pid, 0)
                    self._ended(child)
                    return child.mutant, Run(failed="the limit of the whole run", timeout=True)
            time.sleep(0.01)

    def _ended(self, child: Child) -> Run:
        del self.children[child.pid]
        _kill(child.pid, signal.SIGKILL)  # what its tests have started
        said = child.scratch.with_suffix(".run")
        run = pickle.loads(said.read_bytes()) if said.exists() else Run(failed="a crash of the tests")
        if run.problem:
            raise Stop(f"{run.problem}; see {child.scratch.with_suffix('.out').read_text()[-2000:]}")
        shutil.rmtree(child.scratch, ignore_errors=True)
        for suffix in (".run", ".out"):
            child.scratch.with_suffix(suffix).unlink(missing_ok=True)
        return run

    def stop(self) -> None:
        """End what still runs, first so that the tests can clean up."""
        for number, seconds in ((signal.SIGINT, 3), (signal.SIGKILL, 0)):
            for pid in self.children:
                _kill(pid, number)
            if self.children:
                time.sleep(seconds)


def _kill(group: int, number: int) -> None:
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        pass


def _be_child(mutant: Mutant, order: list[str] | None, test_seconds: float, scratch: Path) -> None:
    """Run the tests, leave the Run in a file beside ``scratch``, and end."""
    code = 1
    try:
        os.setsid()
        with open(scratch.with_suffix(".out"), "wb", buffering=0) as out:
            for descriptor in (1, 2):
                os.dup2(out.fileno(), descriptor)
        tests = [f"tests/unit/test_{name}.py" for name in SUBJECTS[mutant.file]]
        if order:
            tests = sorted({name.partition("::")[0] for name in order})
        run = run_tests(mutant.file, mutant.source, tests, order, test_seconds, scratch)
        said = scratch.with_suffix(".part")
        said.write_bytes(pickle.dumps(run))
        said.rename(scratch.with_suffix(".run"))
        code = 0
    finally:
        os._exit(code)


def baseline(pool: Pool, file: str, source: str) -> Run:
    """Run all tests on the module as it is; import here what they import, so that no child has to."""
    pool.start(Mutant(file, MODULE, "none", source, source), None, CHILD_SECONDS)
    _same, run = pool.wait()
    if not run.passed:
        raise Stop(f"the tests of {file} fail without any mutant: {run.failed}")
    for name in run.modules:
        # Some a test makes up for itself.
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    # What is here already need not be looked at by the garbage collector of every child.
    gc.freeze()
    return run


def trials(pool: Pool, file: str, wanted: str) -> Iterator[tuple[Mutant, str, str]]:
    """Try every mutant of ``file`` with the tests that call its function; yield it, its outcome, and what killed it.

    Quick tests come first, and before them those that killed another mutant of the same function.
    """
    source = (ROOT / file).read_text()
    usual = baseline(pool, file, source)
    killers: dict[str, set[str]] = collections.defaultdict(set)
    left = [one for one in mutants(file, source) if wanted in one.function][::-1]
    while left or pool.children:
        while left and len(pool.children) < pool.workers:
            mutant = left.pop()
            tests = [name for name, called in usual.calls.items() if mutant.function in called]
            if mutant.function == MODULE or not tests:
                tests = list(usual.calls)  # some look at a constant and call nothing
            first = killers[mutant.function]
            tests.sort(key=lambda name, first=first: (name not in first, usual.seconds[name]))
            pool.start(mutant, tests, TEST_SECONDS + max(usual.seconds.values()))
        tried, run = pool.wait()
        if run.failed:
            killers[tried.function].add(run.failed)
        yield tried, SURVIVED if run.passed else TIMEOUT if run.timeout else KILLED, run.failed


def accepted() -> dict[tuple[str, ...], str]:
    """Return ``{key of a mutant: why it may survive}``."""
    return {tuple(str(entry[key]) for key in KEY): entry["reason"] for entry in yaml.safe_load(SURVIVORS.read_text())}


def show_survivor(mutant: Mutant, reason: str | None, show_all: bool) -> None:
    """Print a survivor, and the entry of survivors.yml that it lacks."""
    if reason is None:
        entry = dict(zip(KEY, mutant.key, strict=True), reason="")
        shown = yaml.safe_dump([entry], sort_keys=False, width=10000, allow_unicode=True)
        print(f"\nSURVIVED\n{mutant.diff}\n\n{shown}", flush=True)
    elif show_all:
        print(f"\nACCEPTED, {reason}\n{mutant.diff}", flush=True)


def report(results: list[Result], listed: dict[tuple[str, ...], str], whole: bool) -> bool:
    """Print the table; tell whether all is as it should be."""
    survivors = {mutant.key for result in results for mutant in result.outcomes[SURVIVED]}
    unlisted = survivors - set(listed)
    files = {result.file for result in results}
    stale = [key for key in listed if whole and key[0] in files and key not in survivors]
    for key in stale:
        print(f"\nSTALE, it does not survive any more: {dict(zip(KEY, key, strict=True))}")
    print(f"\n{'file':36} mutants  killed timeout survived  percent")
    for result in results:
        numbers = [result.total, *(len(result.outcomes[one]) for one in (KILLED, TIMEOUT, SURVIVED))]
        print(f"{result.file:36} {numbers[0]:7} {numbers[1]:7} {numbers[2]:7} {numbers[3]:8} {result.percent:7.1f} %")
    print(f"{len(survivors)} survived: {len(unlisted)} of them not in survivors.yml; {len(stale)} entries are stale")
    return not unlisted and not stale and all(result.percent >= LEAST_PERCENT for result in results)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="make mutants ARGS=...", description="Try the tests on mutants.")
    parser.add_argument("--only", metavar="FILE", action="append", help="a module, for example planner.py; repeatable")
    parser.add_argument("--function", default="", help="only functions whose name has this in it")
    parser.add_argument("--list", action="store_true", help="show the accepted survivors too, as diffs")
    parser.add_argument("--killers", action="store_true", help="print which test killed each mutant")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args(argv)
    files = [file for file in SUBJECTS if not options.only or Path(file).name in options.only]
    if not files:
        parser.error(f"--only is one of {', '.join(Path(file).name for file in SUBJECTS)}")
    listed, results = accepted(), []
    scratch = Path(tempfile.mkdtemp(prefix="mutants-"))
    os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = str(scratch / "hypothesis")
    # Tests that were compiled once need not be by every child; nothing is written into the checkout.
    sys.pycache_prefix, sys.dont_write_bytecode = str(scratch / "bytecode"), False
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_arguments: sys.exit(1))
    pool = Pool(options.workers, scratch)
    try:
        for file in files:
            started = time.monotonic()
            results.append(Result(file))
            for mutant, outcome, killer in trials(pool, file, options.function):
                results[-1].outcomes[outcome].append(mutant)
                if outcome == SURVIVED:
                    show_survivor(mutant, listed.get(mutant.key), options.list)
                if options.killers:
                    print(f"{outcome:8} {mutant.function}: {mutant.key[-1]!r} {killer}", flush=True)
            print(f"{file}: {results[-1].total} mutants in {time.monotonic() - started:.0f} s", flush=True)
    except Stop as why:
        print(why, file=sys.stderr)
        return 2
    finally:
        pool.stop()
        shutil.rmtree(scratch, ignore_errors=True)
    return 0 if report(results, listed, whole=not options.function) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
