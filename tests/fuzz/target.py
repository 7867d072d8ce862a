# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A target: one parser of outside text, and what must hold of whatever it makes of any bytes."""

from __future__ import annotations

import importlib
import math
import pkgutil
import tempfile
import typing
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
CORPUS = HERE / "corpus"


class Target(typing.NamedTuple):
    """``run`` takes bytes and raises whatever is wrong; ``is_json``: what it takes is best mutated as JSON."""

    name: str
    run: Callable[[bytes], None]
    is_json: bool
    max_length: int


_targets: dict[str, Target] = {}


def target(*, is_json=False, max_length=4096):
    """Register a function of bytes as the target of its name. Its docstring says what must hold."""

    def register(run):
        _targets[run.__name__] = Target(run.__name__, run, is_json, max_length)
        return run

    return register


def targets():
    """Return ``{name: Target}`` of all targets."""
    from . import targets as package

    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module("%s.%s" % (package.__name__, module.name))
    return dict(sorted(_targets.items()))


def kept(name):
    """Return the files of the kept corpus of a target."""
    return sorted(path for path in (CORPUS / name).glob("*") if path.is_file())


def text_of(data):
    """Return bytes as what runs on a host reads them from a command or from /proc."""
    return data.decode("utf-8", "replace")


def is_safe(text):
    """Tell whether a text can be printed and stored: no control characters, no half of a character."""
    return isinstance(text, str) and (text.isprintable() or not text) and text == text.encode("utf-8").decode("utf-8")


def is_number(value):
    """Tell whether it is a number to count with."""
    return isinstance(value, (int, float)) and (isinstance(value, int) or math.isfinite(value))


_scratch: list = []


def scratch():
    """Return a directory for the files of a target."""
    if not _scratch:
        _scratch.append(tempfile.TemporaryDirectory(prefix="reaper-fuzz-"))
    return Path(_scratch[0].name)
