# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""JMESPath over many items at once. Dotted names, which is what people write, cost no interpreter."""

from __future__ import annotations

import operator

try:
    import jmespath
    from jmespath.exceptions import JMESPathError
except ImportError:  # http.py says so before anything here is called
    jmespath, JMESPathError = None, Exception  # type: ignore[assignment, misc]

from ..manifest import ManifestError


def column(option, expression):
    """Return a function ``[item] -> [value]`` for a JMESPath expression; what it finds nothing in gives None.

    ``option`` is the name of the option that the expression is of. Raises ManifestError, as the function does.
    """
    try:
        compiled = jmespath.compile(expression)
    except (JMESPathError, TypeError, AttributeError, RecursionError) as err:
        raise ManifestError("bad_source", "%s: %.200r is no JMESPath: %s" % (option, expression, _said(err))) from None
    names = _names(compiled.parsed)

    def by_names(items):
        for name in names:
            try:
                items = list(map(operator.itemgetter(name), items))
            except (KeyError, TypeError):
                items = [item.get(name) if isinstance(item, dict) else None for item in items]
        return items

    def by_search(items):
        try:
            return [compiled.search(item) for item in items]
        except (JMESPathError, RecursionError) as err:
            problem = "%s: %s cannot be applied to what came: %s" % (option, expression, _said(err))
            raise ManifestError("not_a_manifest", problem) from None

    return by_search if names is None else by_names


def _names(parsed):
    """Return ``[name, ...]`` for the syntax tree of a dotted name, [] for that of ``@``, None for any other."""
    if parsed["type"] == "current":
        return []
    if parsed["type"] == "field":
        return [parsed["value"]]
    if parsed["type"] == "subexpression":
        parts = [_names(child) for child in parsed["children"]]
        return None if None in parts else [name for part in parts for name in part]
    return None


def _said(err):
    return " ".join(str(err).split())[:200]
