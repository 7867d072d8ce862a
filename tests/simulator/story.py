# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What happened, in words, for whoever has to understand a violation."""

from __future__ import annotations


class Violation(Exception):
    """An invariant does not hold. ``name`` is the invariant's: a shrunk story must violate the same one."""

    def __init__(self, name, text):
        super().__init__(text)
        self.name = name


class Story:
    """Lines of what happened; nothing is put into words unless somebody wants to read it."""

    def __init__(self, is_wanted=False):
        self.is_wanted = is_wanted
        self.lines = []
        self.now = lambda: 0.0

    def tell(self, text, *arguments):
        """Add a line."""
        if self.is_wanted:
            self.lines.append("%+7.0f s  %s" % (self.now(), text % arguments))

    def __str__(self):
        return "\n".join(self.lines)
