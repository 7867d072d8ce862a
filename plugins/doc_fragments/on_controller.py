# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What the steps that run on the controller have in common."""

from __future__ import annotations


class ModuleDocFragment:
    """Documentation that these modules share."""

    DOCUMENTATION = r"""
attributes:
  action:
    description: Indicates this has a corresponding action plugin so some parts of the options can be executed on the
      controller.
    support: full
  diff_mode:
    description: Will return details on what has changed (or possibly needs changing in check mode), when in diff mode.
    support: none
    details: Nothing is changed on any host.
  platform:
    description: Target OS/families that can be operated against.
    support: full
    platforms: all
"""
