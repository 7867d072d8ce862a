#!/usr/bin/python
# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
module: replay
short_description: Make the plans of a saved sweep again, offline
version_added: 0.1.0
author:
  - The microvm.reaper authors (@microvm)
description:
  - Reads the file that a sweep wrote because of C(reap_save_inputs) and makes the plan of every host again. No host is
    touched and no live source is asked.
  - Without O(policy) it proves that the plans are the same, to the byte, and fails when they are not.
  - With O(policy) it says which VMs would be decided otherwise, how many would be reaped, and whether the batches would
    be stopped.
options:
  path:
    description: The file. One that was cut off is replayed as far as it goes.
    type: path
    required: true
  policy:
    description:
      - Variables of the role that are to be other than they were in the sweep, on all hosts, such as C(reap_min_age) or
        C(reap_max_per_fleet).
      - Only those that the hosts are judged by. What was looked at, and what the live sources said, stays as it was.
      - A list takes the place of the whole list that was there. For C(reap_reused_ids) those of the presets are part
        of it.
    type: dict
    default: {}
extends_documentation_fragment:
  - microvm.reaper.on_controller
attributes:
  check_mode:
    description: Can run in check mode and return the same as otherwise.
    support: full
notes:
  - Runs on the controller.
  - What was planned is replayed, not what came of it. The outcomes are in the report of the sweep.
seealso:
  - module: microvm.reaper.save_inputs
  - plugin: microvm.reaper.confirmed_orphans
    plugin_type: filter
"""

EXAMPLES = r"""
- name: Prove that a sweep planned what its inputs say
  microvm.reaper.replay:
    path: /var/lib/reaper/inputs/prod-2026-11-22T02-00-00Z.jsonl.gz

- name: See what three strikes would have changed
  microvm.reaper.replay:
    path: /var/lib/reaper/inputs/prod-2026-11-22T02-00-00Z.jsonl.gz
    policy:
      reap_strikes: 3
"""

RETURN = r"""
realm:
  description: The realm of the sweep.
  returned: when the file could be read
  type: str
saved_at:
  description: When its first batch was saved.
  returned: when the file could be read
  type: str
version:
  description: The version of the collection that saved it.
  returned: when the file could be read
  type: str
check_mode:
  description: Whether it was a sweep in check mode.
  returned: when the file could be read
  type: bool
hosts:
  description: How many plans were made again.
  returned: when the file could be read
  type: int
differing:
  description: By host whose plan is another one, a sentence for each VM that is decided otherwise.
  returned: when the file could be read
  type: dict
batches:
  description: For each batch, whether it goes on or is stopped, then and now.
  returned: when the file could be read
  type: list
  elements: str
totals:
  description: How many C(vms) and C(resources) are to be reaped, C(then) and C(now).
  returned: when the file could be read
  type: dict
cut_off:
  description: Whether the run was cut off while it wrote the file.
  returned: when the file could be read
  type: bool
missing:
  description: Hosts that it had not yet saved by then.
  returned: when the file could be read
  type: list
  elements: str
"""
