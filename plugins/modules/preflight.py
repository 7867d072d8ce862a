#!/usr/bin/python
# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
module: preflight
short_description: Check the variables of the role before any host is touched
version_added: 0.1.0
author:
  - The microvm.reaper authors (@microvm)
description:
  - Checks all C(reap_) variables of all hosts of the batch against the argument specification of the role. Types,
    choices,
    impossible values, presets and sources that do not exist, and names that the role does not know.
extends_documentation_fragment:
  - microvm.reaper.on_controller
attributes:
  check_mode:
    description: Can run in check mode and return the same as otherwise.
    support: full
notes:
  - Runs on the controller. Meant to be run once for a batch of hosts, with C(run_once).
seealso:
  - module: microvm.reaper.vm_resource_facts
  - module: microvm.reaper.reap
"""

EXAMPLES = r"""
- name: Check every reap_ variable of every host
  microvm.reaper.preflight:
  run_once: true
"""

RETURN = r"""
hosts:
  description: The hosts of the batch, as long as none of them has failed.
  returned: always
  type: list
  elements: str
sweep:
  description: The id of this run.
  returned: always
  type: str
  sample: 1f2e3d4c5b6a7988
problems:
  description: What is wrong, each in a sentence that names the variable.
  returned: failure
  type: list
  elements: str
"""
