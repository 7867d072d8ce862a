# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Changes JSON where it means something: of random bytes hardly any would be JSON at all. Lines are JSON too."""

from __future__ import annotations

import copy
import json
import random

VALUES = [
    None, True, False, 0, 1, -1, 0.5, 1e308, float("nan"), float("inf"), -float("inf"), 2**63, 10**400, -(10**400),
    "", "v1", "v2", "h1", "a b", "\n", "\u0000", "\ud800", "\u00b2", "\u0663", "\x1b[2J", "a" * 129, "9" * 40, "..",
    "/",
    [], {}, [[]], [None], {"": ""}, "2027-01-15T08:00:00Z", "0001-01-01T00:00:00+23:59", "2027-01-15", "*", "(", "1e9",
]  # fmt: skip


def mutated(data, seed, change_text, max_length):
    """Return JSON, or lines of JSON, with something changed in it; None for what is neither.

    ``change_text(bytes)`` changes the bytes of a text.
    """
    chance = random.Random(seed)
    lines = data.split(b"\n")
    number = chance.randrange(len(lines))
    for part in (data, lines[number]):
        try:
            document = json.loads(part)
        except (ValueError, RecursionError):
            continue
        for _time in range(chance.randint(1, 3)):
            document = _changed(document, chance, change_text)
        try:
            text = json.dumps(document).encode("ascii")
        except (ValueError, RecursionError):
            return None
        if part is not data:
            here = [text] if chance.random() < 0.9 else [text, part]
            text = b"\n".join(lines[:number] + here + lines[number + 1 :])
        return text if len(text) <= max_length else None
    return None


def _places(value, found, parent=None, key=None):
    found.append((parent, key, value))
    if isinstance(value, dict):
        for name in value:
            _places(value[name], found, value, name)
    elif isinstance(value, list):
        for number, one in enumerate(value):
            _places(one, found, value, number)
    return found


def _changed(document, chance, change_text):
    """Return the document with one value or key in it changed, taken out or added."""
    places = _places(document, [])
    parent, key, value = chance.choice(places)
    what = chance.random()
    if isinstance(value, dict) and value and what < 0.3:
        name = chance.choice(list(value))
        if what < 0.15:
            del value[name]
        else:
            value[_text(name, chance, change_text)] = value.pop(name) if what < 0.22 else copy.deepcopy(value[name])
        return document
    if isinstance(value, list) and value and what < 0.3:
        number = chance.randrange(len(value))
        if what < 0.15:
            del value[number]
        else:
            value.insert(number, copy.deepcopy(value[number]))
        return document
    if isinstance(value, str) and what < 0.6:
        new = _text(value, chance, change_text)
    elif isinstance(value, (int, float)) and not isinstance(value, bool) and what < 0.5:
        new = chance.choice([value + 1, value - 1, -value, value * 2, str(value)])
    elif what < 0.7:
        new = copy.deepcopy(chance.choice(places)[2])
    else:
        new = copy.deepcopy(chance.choice(VALUES))
    if parent is None:
        return new
    parent[key] = new
    return document


def _text(text, chance, change_text):
    if chance.random() < 0.2:
        return str(chance.choice([one for one in VALUES if isinstance(one, str)]))
    return change_text(text.encode("utf-8", "surrogatepass")).decode("utf-8", "replace")
