"""Runs the tests in this process, with another source in the place of one module's file."""

from __future__ import annotations

import collections
import ctypes
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, ModuleType

import hypothesis
import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGE = "ansible_collections.microvm.reaper"
CLONE_NEWNS, MS_REC, MS_PRIVATE = 0x20000, 0x4000, 0x40000  # of Linux

# Every run is to see the same examples, and one that fails is enough: no shrinking.
hypothesis.settings.register_profile(
    "mutation",
    derandomize=True,
    database=None,
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
    suppress_health_check=list(hypothesis.HealthCheck),
)


@dataclass
class Run:
    """What came of the tests: the first that failed, how long each took and which functions it called.

    ``modules`` are those that were imported on the way, but for the collection and its tests.
    """

    passed: bool = False
    failed: str = ""
    timeout: bool = False
    problem: str = ""
    seconds: dict[str, float] = field(default_factory=lambda: collections.defaultdict(float))
    calls: dict[str, set[str]] = field(default_factory=dict)
    modules: list[str] = field(default_factory=list)


class Substitute(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Loads ``source`` when the module of ``path`` is imported: nothing is written where the module is."""

    def __init__(self, file: str, source: str) -> None:
        self.name = f"{PACKAGE}.{file.removesuffix('.py').replace('/', '.')}"
        self.path, self.source = str(ROOT / file), source
        self.is_broken = False

    def find_spec(self, fullname: str, _path: object, _target: object = None) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.name:
            return None
        return importlib.util.spec_from_file_location(fullname, self.path, loader=self)

    def exec_module(self, module: ModuleType) -> None:
        try:
            exec(compile(self.source, self.path, "exec"), module.__dict__)
        except Exception:
            self.is_broken = True
            raise

    def is_loaded(self) -> bool:
        module = sys.modules.get(self.name)
        return module is not None and module.__loader__ is self


class Watcher:
    """A pytest plugin: runs the tests named in ``order`` (None: all), and fills a Run."""

    def __init__(self, run: Run, order: list[str] | None, profiled: str) -> None:
        self.run, self.order, self.profiled = run, order, profiled

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        if self.order is not None:
            by_name = {item.nodeid: item for item in items}
            items[:] = [by_name[name] for name in self.order if name in by_name]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        if not self.profiled:
            return (yield)
        called = self.run.calls.setdefault(item.nodeid, set())

        def profile(frame: FrameType, event: str, _argument: object) -> None:
            if event == "call" and frame.f_code.co_filename == self.profiled:
                called.add(frame.f_code.co_qualname.partition(".<locals>")[0])

        sys.setprofile(profile)
        try:
            return (yield)
        finally:
            sys.setprofile(None)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.run.seconds[report.nodeid] += report.duration
        # A test that calls nothing of the module says nothing of its mutants, nor whether they can be tried.
        concerned = not self.profiled or self.run.calls[report.nodeid]
        if report.failed and concerned and not self.run.failed:
            self.run.failed = report.nodeid
            self.run.timeout = "Timeout (>" in str(report.longrepr)


def _keep_mounts_to_ourselves() -> None:
    """Let what the tests mount go away with this process, which a mutant may keep them from unmounting."""
    libc = ctypes.CDLL(None)
    if libc.unshare(CLONE_NEWNS) == 0:
        libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None)


def run_tests(
    file: str, source: str, tests: list[str], order: list[str] | None, test_seconds: float, scratch: Path
) -> Run:
    """Run ``tests`` (files) in ``order`` until one fails; all of them, profiled, without an order. Once in a process.

    A test that takes ``test_seconds`` fails, so that the loop of a mutant ends and the test cleans up behind it.
    """
    substitute, run, before = Substitute(file, source), Run(), set(sys.modules)
    sys.meta_path.insert(0, substitute)
    _keep_mounts_to_ourselves()
    # A mutant may write to a path that is not absolute any more; some tests read theirs below the checkout.
    scratch.mkdir()
    (scratch / "collections").symlink_to(ROOT / "collections")
    os.chdir(scratch)
    hypothesis.settings.load_profile("mutation")
    watcher = Watcher(run, order, substitute.path if order is None else "")
    without = ("-pno:cacheprovider", "-pno:xdist", "-pno:warnings")
    options = ["-q", "--tb=short", *(["-x"] if order is not None else []), f"--timeout={test_seconds}", *without]
    places = [f"--rootdir={ROOT}", f"--config-file={ROOT / 'pyproject.toml'}", f"--basetemp={scratch / 'tmp'}"]
    code = pytest.main([*options, *places, *(str(ROOT / test) for test in tests)], plugins=[watcher])
    run.passed = code in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) and not run.failed
    ours = ("ansible_collections", "tests", "unit")
    run.modules = sorted(name for name in set(sys.modules) - before if name.partition(".")[0] not in ours)
    if substitute.is_broken:
        run.passed, run.failed = False, "the import of the module"
    elif run.passed and not substitute.is_loaded():
        run.problem = f"the tests do not import {substitute.name}"
    elif code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.INTERRUPTED):
        run.problem = f"pytest ended with {code!r}"
    return run
