# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What the sources have in common that are read on the hosts."""

from __future__ import annotations

from ...module_utils.resource import RuleError
from ..manifest import ManifestError


def check(supervisor, options):
    """Check the options as the supervisor's module does on the host; raise ManifestError."""
    try:
        supervisor.check(options)
    except RuleError as err:
        raise ManifestError("bad_source", str(err)) from err
