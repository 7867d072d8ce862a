# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""From a long story that goes wrong to a short one that goes wrong in the same way (delta debugging)."""

from __future__ import annotations


def shrunk(places, violated, may_go_on):
    """Return ``(places to leave out, whether all was tried)``.

    ``places`` are all ``(step, slot)`` in order, ``violated(left out)`` tells whether it still goes wrong, and
    ``may_go_on()`` whether to try on. First whole steps are left out, from the end on, then what is in those that stay.
    """
    steps = {}
    for place in places:
        steps.setdefault(place[0], []).append(place)
    left_out = _without(list(steps.values()), frozenset(), violated, may_go_on)
    for _round in range(3):
        before = left_out
        left = [[place] for place in places if place not in left_out]
        left_out = _without(left, left_out, violated, may_go_on)
        if left_out == before or not may_go_on():
            break
    return left_out, may_go_on()


def _without(groups, left_out, violated, may_go_on):
    """Leave out as many groups of places as possible, large parts first."""
    size = len(groups)
    while size >= 1 and groups:
        begin = len(groups)
        while begin > 0:
            begin = max(0, begin - size)
            tried = left_out.union(*groups[begin:begin + size])
            if not may_go_on():
                return left_out
            if violated(tried):
                left_out = tried
                del groups[begin:begin + size]
        size //= 2
    return left_out
