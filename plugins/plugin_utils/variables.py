# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The variables of the role, as its argument specification has them."""

from __future__ import annotations

import difflib
import os

import yaml

SPEC = os.path.join(os.path.dirname(__file__), "..", "..", "roles", "reap", "meta", "argument_specs.yml")
PREFIX = "reap_"


def role_spec():
    """Return ``{variable: its specification}``."""
    with open(SPEC, encoding="utf-8") as stream:
        return yaml.safe_load(stream)["argument_specs"]["main"]["options"]


def unknown(name, spec):
    """Return the sentence for a variable that the role does not know."""
    similar = difflib.get_close_matches(name, spec, n=1)
    return "unknown variable %s%s" % (name, ", did you mean %s?" % similar[0] if similar else "")
