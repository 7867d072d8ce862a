# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The last things that happened, in words, for whoever has to understand a violation."""

from __future__ import annotations

import collections


class Violation(Exception):
    """An invariant does not hold."""


class Story:
    """Keeps the end of the story; a line is put into words only when somebody reads it."""

    def __init__(self, lines=60):
        self._lines = collections.deque(maxlen=lines)
        self.now = lambda: 0.0

    def tell(self, text, *arguments):
        """Add a line."""
        self._lines.append((self.now(), text, [str(argument) for argument in arguments]))

    def __str__(self):
        if not self._lines:
            return ""
        first = self._lines[0][0]
        return "\n".join(
            "  %+6.0f s  %s" % (when - first, text % tuple(arguments)) for when, text, arguments in self._lines
        )
