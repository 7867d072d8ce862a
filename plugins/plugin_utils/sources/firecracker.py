# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Firecracker's API sockets on the hosts, read there by vm_resource_facts (module_utils/supervisors/firecracker.py)."""

from __future__ import annotations

from ...module_utils.supervisors import firecracker as supervisor
from . import _on_host

ON_HOST = True
OPTIONS = supervisor.OPTIONS


def describe(options):
    """Name the source."""
    return "firecracker on the hosts"


def configured(options):
    """Refuse what the host would stumble over."""
    _on_host.check(supervisor, options)
