#!/usr/bin/python
# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
module: abandoned_vmm_facts
short_description: Look at the records of VMs that a control plane has abandoned in its database
version_added: 0.1.0
author:
  - The microvm.reaper authors (@microvm)
description:
  - Lists what M(microvm.reaper.abandoned_vmms) would judge, with the verdict it would give. That module's page has the
    rules.
  - Reads only, in one read-only transaction that locks nothing. The user of the database needs the right to select, no
    other. A replica will do.
options:
  facts:
    description:
      - The hosts that were looked at and answered, each with the ids of the VMs of which something is there, as in
        M(microvm.reaper.abandoned_vmms). Without it everything is V(unknown).
    type: dict
    default: {}
  facts_age:
    description: How many seconds ago the first host was looked at for O(facts).
    type: float
    default: 0
extends_documentation_fragment:
  - microvm.reaper.abandoned
attributes:
  check_mode:
    description: Can run in check mode and return the same as otherwise.
    support: full
  diff_mode:
    description: Will return details on what has changed (or possibly needs changing in check mode), when in diff mode.
    support: none
    details: Nothing is changed.
  facts:
    description: Action returns an C(ansible_facts) dictionary that will update existing host facts.
    support: full
  platform:
    description: Target OS/families that can be operated against.
    support: full
    platforms: all
seealso:
  - module: microvm.reaper.abandoned_vmms
"""

EXAMPLES = r"""
- name: Look for abandoned VMs
  microvm.reaper.abandoned_vmm_facts:
    conninfo: host=db dbname=omicron user=reader sslmode=verify-full
    password_file: /etc/reaper/db-password
  delegate_to: localhost
  run_once: true
  register: looked

- name: Say how many there are
  ansible.builtin.debug:
    msg: "{{ looked.ansible_facts.abandoned_vmms.counters.vmms_found }} records wait for their deletion"
  run_once: true
"""

RETURN = r"""
ansible_facts:
  description: Facts to add to those of the host.
  returned: always
  type: dict
  contains:
    abandoned_vmms:
      description: What was found.
      type: dict
      contains:
        counters:
          description:
            - As those of M(microvm.reaper.abandoned_vmms). Nothing is deleted, so C(vmms_deleted),
              C(vmms_already_deleted), C(sled_reservations_deleted) and C(errors) are 0.
          type: dict
        found:
          description: Each abandoned record and stale reservation.
          type: list
          elements: dict
          contains:
            what:
              description: V(vmm), a record and its reservation, or V(reservation), a stale one.
              type: str
            id:
              description: The id of the VM.
              type: str
            host:
              description: Its host.
              type: str
            state:
              description: The state of the record or of the reservation.
              type: str
            verdict:
              description: V(abandoned), V(conflict), V(unknown) or V(young).
              type: str
            reason:
              description: Why it would be left alone.
              type: str
      sample:
        counters:
          vmms_found: 1
          reservations_stale: 0
          conflicts: 0
          unknown: 0
          young: 0
        found:
          - what: vmm
            id: 1ebf3b5d-bc9d-4782-876a-87dff639a4a7
            host: 2c33e8ef-ae07-4191-804d-52a1840ce53c
            state: destroyed
            verdict: abandoned
            reason:
"""

from ansible.module_utils.basic import AnsibleModule, missing_required_lib
from ansible_collections.microvm.reaper.plugins.module_utils import abandoned


def get_argument_spec():
    """Return the module's argument spec."""
    return abandoned.argument_spec(
        facts={"type": "dict", "default": {}},
        facts_age={"type": "float", "default": 0.0},
    )


def main():
    """Look."""
    module = AnsibleModule(
        argument_spec=get_argument_spec(),
        mutually_exclusive=[("password", "password_file")],
        supports_check_mode=True,
    )
    if abandoned.PSYCOPG_MISSING:
        module.fail_json(msg=missing_required_lib("psycopg"), exception=abandoned.PSYCOPG_MISSING)
    try:
        seen = abandoned.Seen(module.params["facts"])
        with abandoned.open_database(module.params, module.no_log_values.add) as database:
            records, reservations, _instant = abandoned.look(database, seen)
    except abandoned.AbandonedError as err:
        module.fail_json(msg=str(err))
    found = {
        "counters": abandoned.counters(records, reservations),
        "found": [abandoned.told(one) for one in records + reservations],
    }
    module.exit_json(changed=False, ansible_facts={"abandoned_vmms": found})


if __name__ == "__main__":
    main()
