#!/usr/bin/python
# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
module: pull_setup
short_description: Prepare on the controller what a host needs to sweep itself
version_added: 0.1.0
author:
  - The microvm.reaper authors (@microvm)
description:
  - Packs this collection, and writes an inventory of the host alone with all its C(reap_) variables that are not the
    defaults of the role, rendered. Both are files in the temporary directory of the run, readable by its owner only.
  - Fails where a variable cannot be meant for a timer. Those for one sweep, C(reap_clear_latch) and C(reap_adopt_host),
    and live sources that only the controller has.
extends_documentation_fragment:
  - microvm.reaper.on_controller
attributes:
  check_mode:
    description: Can run in check mode and return the same as otherwise.
    support: full
notes:
  - Runs on the controller. Used by the playbook C(microvm.reaper.schedule).
seealso:
  - module: microvm.reaper.preflight
"""

EXAMPLES = r"""
- name: Prepare what the host needs to sweep itself
  microvm.reaper.pull_setup:
  register: setup

- name: Write its inventory
  ansible.builtin.copy:
    src: "{{ setup.inventory }}"
    dest: /etc/microvm.reaper/hosts.yml
    mode: "0600"
  no_log: true
"""

RETURN = r"""
version:
  description: The version of the collection, and a checksum of what is shipped of it.
  returned: success
  type: str
  sample: 0.1.0-5f2c1d9e8a7b
archive:
  description: The archive of the collection on the controller, the same bytes for the same content.
  returned: success
  type: str
inventory:
  description: The inventory of this host on the controller. May hold secrets.
  returned: success
  type: str
variables:
  description: The names of the variables in it.
  returned: success
  type: list
  elements: str
  sample: [reap_host_id, reap_live_sources, reap_presets, reap_realm]
problems:
  description: What speaks against a timer, each in a sentence that names the variable.
  returned: failure
  type: list
  elements: str
"""
