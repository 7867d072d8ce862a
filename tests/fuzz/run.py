# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Fuzz targets one after the other: `run.py [--seconds 60] [--target NAME]... [--keep]`. README.md has more."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(ROOT / "collections"), str(ROOT / "tests")]

from fuzz.target import CORPUS, Target, kept, targets  # noqa: E402

CACHE = ROOT / ".cache/fuzz"
# Many targets write a file for each input.
MEMORY = Path("/dev/shm")
INPUT_SECONDS = 5
MEMORY_MB = 1024
# Beyond what it was given, for the imports and the last input.
GRACE_SECONDS = 60
MOST_FILES, MOST_BYTES = 60, 4096
EXECUTED = re.compile(r"number_of_executed_units:\s*(\d+)")
# What libFuzzer and Python say of an input that is wrong.
TROUBLE = re.compile(r"^(?: === |==\d+== ERROR|[A-Za-z_.]+(?:Error|Exception|Timeout)\b|ALARM:|SUMMARY:)")


def fuzz(target: Target, seconds: float) -> bool:
    """Fuzz one target, say in a line what came of it; tell whether nothing was found."""
    found, crashes = CACHE / "corpus" / target.name, CACHE / "crashes" / target.name
    for directory in (found, crashes, CORPUS / target.name):
        directory.mkdir(parents=True, exist_ok=True)
    before = set(crashes.iterdir())
    started = time.monotonic()
    output = _one(
        target,
        [
            "-max_total_time=%d" % max(1, round(seconds)),
            "-timeout=%d" % INPUT_SECONDS,
            "-artifact_prefix=%s/" % crashes,
            "-print_final_stats=1",
            str(found),
            str(CORPUS / target.name),
        ],
        seconds + GRACE_SECONDS,
    )
    executed = EXECUTED.search(output)
    files = sorted(set(crashes.iterdir()) - before)
    is_clean = executed is not None and not files
    numbers = (target.name, int(executed[1]) if executed else 0, time.monotonic() - started)
    sizes = (len(kept(target.name)), len(list(found.iterdir())))
    verdict = "clean" if is_clean else "FOUND"
    print("%-20s %9d inputs in %5.0f s  corpus %3d kept, %5d found  %s" % (*numbers, *sizes, verdict), flush=True)
    if not is_clean:
        print("\n".join(_story(output)))
        for path in files:
            print("    the input is %s" % path.relative_to(ROOT), flush=True)
    return is_clean


def keep(target: Target) -> None:
    """Add to the kept corpus what of the found one reaches code that nothing kept does, as few files as can be."""
    found = [path for path in (CACHE / "corpus" / target.name).glob("*") if path.stat().st_size <= MOST_BYTES]
    here = CORPUS / target.name
    here.mkdir(parents=True, exist_ok=True)
    before = kept(target.name)
    known = {step for path in before for step in _reached(target, path)}
    gains = {path: _reached(target, path) - known for path in sorted(found)}
    room = MOST_FILES - len(before)
    while room > 0:
        gains = {path: gain for path, gain in gains.items() if gain}
        if not gains:
            break
        best = max(gains, key=lambda path: (len(gains[path]), -path.stat().st_size))
        reached = gains.pop(best)
        shutil.copy(best, here / best.name[:12])
        gains = {path: gain - reached for path, gain in gains.items()}
        room -= 1
    now = len(kept(target.name))
    print("%-20s %d files kept, %d of them new" % (target.name, now, now - len(before)), flush=True)


def _reached(target: Target, path: Path) -> set[tuple[str, int, int]]:
    """Return the steps from line to line that our code takes with an input."""
    steps = set()

    def local(before):
        def trace(frame, event, argument):
            nonlocal before
            if event == "line":
                steps.add((frame.f_code.co_filename, before, frame.f_lineno))
                before = frame.f_lineno
            return trace

        return trace

    def called(frame, event, argument):
        return local(0) if "/plugins/" in frame.f_code.co_filename else None

    sys.settrace(called)
    try:
        target.run(path.read_bytes())
    finally:
        sys.settrace(None)
    return steps


def _one(target: Target, arguments: list[str], seconds: float) -> str:
    """Run libFuzzer on a target; return what it printed."""
    command = [
        sys.executable, str(HERE / "one.py"), target.name, "-max_len=%d" % target.max_length,
        "-rss_limit_mb=%d" % MEMORY_MB, *arguments,
    ]  # fmt: skip
    # libFuzzer ends a process without its clean-up.
    with tempfile.TemporaryDirectory(prefix="reaper-fuzz-", dir=MEMORY if MEMORY.is_dir() else None) as scratch:
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=dict(os.environ, TMPDIR=scratch), stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, timeout=seconds,
            )  # fmt: skip
        except subprocess.TimeoutExpired as err:
            return "%s\nTimeout: it did not end by itself" % (err.stdout or b"").decode("utf-8", "replace")
    return done.stdout.decode("utf-8", "replace")


def _story(output: str) -> list[str]:
    """Return the lines that say what is wrong, and where."""
    lines = output.split("\n")
    begin = next((number for number, line in enumerate(lines) if TROUBLE.match(line)), max(0, len(lines) - 20))
    return ["    " + line[:300] for line in lines[begin : begin + 40]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="for all targets together")
    parser.add_argument("--target", action="append", default=[], help="only this one; may be repeated")
    parser.add_argument("--keep", action="store_true", help="add what was found before to the kept corpus, and end")
    options = parser.parse_args()
    known = targets()
    unknown = [name for name in options.target if name not in known]
    if unknown:
        print("there is no target %s; there are %s" % (", ".join(unknown), ", ".join(known)), file=sys.stderr)
        return 2
    chosen = [known[name] for name in options.target or known]
    if options.keep:
        for target in chosen:
            keep(target)
        return 0
    found = [target.name for target in chosen if not fuzz(target, options.seconds / len(chosen))]
    print("found something: %s" % ", ".join(found) if found else "all clean")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
