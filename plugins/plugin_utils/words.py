# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""How things are said to people."""

from __future__ import annotations

import datetime

NAMED = 3


def enumerate_hosts(names):
    """Return the names of hosts as a person would say them: ``a``, ``a, b and c``, ``a, b, c and 7 more hosts``."""
    names = list(names)
    if len(names) > NAMED:
        return "%s and %d more hosts" % (", ".join(names[:NAMED]), len(names) - NAMED)
    return " and ".join([part for part in (", ".join(names[:-1]), names[-1] if names else "") if part])


def human_seconds(count):
    """Return a number of seconds, exact, and from two hours on also as a person reads it: ``259200 s (3.0 days)``."""
    for unit, length in (("days", 86400), ("hours", 3600)):
        if count >= 2 * length:
            return "%d s (%.1f %s)" % (count, count / length, unit)
    return "%d s" % count


def utc(instant):
    """Return seconds since 1970 as ``2026-11-22T03:00:00Z``."""
    return datetime.datetime.fromtimestamp(instant, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
