# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""How things are said to people."""

from __future__ import annotations

NAMED = 3


def enumerate_hosts(names):
    """Return the names of hosts as a person would say them: ``a``, ``a, b and c``, ``a, b, c and 7 more hosts``."""
    names = list(names)
    if len(names) > NAMED:
        return "%s and %d more hosts" % (", ".join(names[:NAMED]), len(names) - NAMED)
    return " and ".join([part for part in (", ".join(names[:-1]), names[-1] if names else "") if part])
