# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Fuzz one target in this process, until libFuzzer ends it: `one.py NAME [libFuzzer's arguments]`."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import atheris

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT / "collections"), str(ROOT / "tests")]

atheris.enabled_hooks.add("str")  # how texts are compared, too

with atheris.instrument_imports(include=["ansible_collections.microvm.reaper", "jmespath", "email._parseaddr"]):
    from fuzz.mutate import mutated
    from fuzz.target import targets

    TARGETS = targets()


def main(argv):
    """Never returns."""
    chosen = TARGETS[argv[1]]
    logging.disable(logging.CRITICAL)

    def change(data, max_length, seed):
        found = None
        if seed % 4:
            found = mutated(data, seed, lambda text: atheris.Mutate(text, len(text) + 8), max_length)
        return found if found is not None else atheris.Mutate(data, max_length)

    options = {"custom_mutator": change} if chosen.is_json else {}
    atheris.Setup([argv[0], *argv[2:]], chosen.run, **options)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv)
