#!/usr/bin/python
# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
module: abandoned_vmms
short_description: Settle the records of VMs that a control plane has abandoned in its database
version_added: 0.1.0
author:
  - The microvm.reaper authors (@microvm)
description:
  - For control planes that keep a record of each VM, and a reservation of what it takes on its host, in PostgreSQL or
    CockroachDB. Complete for omicron; the tables, columns and states of others can be named.
  - A record is abandoned when its state is terminal, it is not marked deleted, and its instance, if there is one, names
    it neither as active nor as target. Its reservation is deleted and the record is marked deleted, both or neither.
  - A reservation is stale when it is tombstoned, no instance names it, and it has neither a record nor an instance, or
    its record is in a terminal state and deleted already. It is deleted. Others are never touched without their record,
    since a start reserves before it makes the record.
  - What a host still has something of is a conflict, what is on a host that is not in O(facts) is unknown, and what
    changed after the hosts were looked at is young. All of it is left alone and counted.
  - Each is settled in a serializable transaction of its own that applies the rule again to locked rows. One that fails
    is undone and told, and the others go on. The module fails at the end when any failed.
  - A record in a terminal state needs no strike. A stale reservation is known only by what is absent, so it is looked
    at twice, O(strike_interval) seconds apart by the database's clock. The module waits for as long when there is one.
options:
  facts:
    description:
      - The hosts that were looked at in this sweep and answered, each with the ids of the VMs of which something is
        there. Hosts by the names that the database has for them.
      - M(microvm.reaper.swept_vms) returns it for the hosts of a sweep.
    type: dict
    required: true
  facts_age:
    description:
      - How many seconds ago the first host was looked at for O(facts).
      - What changed since cannot be judged by them and is left alone as young.
    type: float
    required: true
  max:
    description:
      - Records and stale reservations that may go in one run. If there are more the module fails before the first
        change; it never settles only some.
    type: int
    default: 500
  strike_interval:
    description: Seconds between the two looks at a stale reservation.
    type: float
    default: 60
extends_documentation_fragment:
  - microvm.reaper.abandoned
attributes:
  action:
    description: Indicates this has a corresponding action plugin so some parts of the options can be executed on the
      controller.
    support: full
    details: It prints the report.
  check_mode:
    description: Can run in check mode and return changed status prediction without modifying target.
    support: full
    details: The numbers are those of the real run, as far as one read-only transaction can tell. Nothing is locked.
  diff_mode:
    description: Will return details on what has changed (or possibly needs changing in check mode), when in diff mode.
    support: full
  platform:
    description: Target OS/families that can be operated against.
    support: full
    platforms: all
seealso:
  - module: microvm.reaper.abandoned_vmm_facts
  - module: microvm.reaper.swept_vms
"""

EXAMPLES = r"""
# After a sweep, in a play of its own, because a play with serial has only the hosts of one batch at hand. This is what
# playbooks/abandoned.yml does.
- name: Note when the sweep begins
  hosts: localhost
  gather_facts: false
  tasks:
    - name: Note the time
      ansible.builtin.set_fact:
        began: "{{ now().timestamp() }}"

- name: Reap what dead VMs left behind
  hosts: hypervisors
  gather_facts: false
  roles:
    - microvm.reaper.reap

- name: Settle the records of dead VMs
  hosts: localhost
  gather_facts: false
  tasks:
    # Fails when the sweep was stopped or latched: then no record is to be touched either.
    - name: Know which VMs the hosts still have something of
      microvm.reaper.swept_vms:
        hosts: "{{ groups.hypervisors }}"
        realm: prod
      register: swept

    - name: Settle
      microvm.reaper.abandoned_vmms:
        conninfo: host=db dbname=omicron user=reaper sslmode=verify-full
        password_file: /etc/reaper/db-password
        facts: "{{ swept.facts }}"
        facts_age: "{{ now().timestamp() - began | float }}"

# A control plane of one's own, with the hosts that answered written down by hand.
- name: Settle the records of another control plane
  hosts: localhost
  gather_facts: false
  tasks:
    - name: Settle
      microvm.reaper.abandoned_vmms:
        conninfo: service=cloud
        records: {table: cloud.machines, instance: server, host: node, changed: time_created}
        reservations: {table: cloud.allocations, id: machine, instance: server, host: node}
        instances: {table: cloud.servers, active: machine, target: moving_to}
        terminal_states: [terminated, error]
        tombstoned_states: [released]
        facts:
          node-1: [vm-17, vm-23]
          node-2: []
        facts_age: 120
"""

RETURN = r"""
counters:
  description: How many of each; in check mode how many there would be.
  returned: when the database was read
  type: dict
  contains:
    vmms_found:
      description: Abandoned records, whatever became of them.
      type: int
    vmms_deleted:
      description: Records that were marked deleted.
      type: int
    vmms_already_deleted:
      description: Records that somebody else marked deleted, or removed, after they were listed.
      type: int
    sled_reservations_deleted:
      description: Reservations that were deleted, with a record or stale.
      type: int
    reservations_stale:
      description: Stale reservations, whatever became of them.
      type: int
    conflicts:
      description: Records and reservations that were left alone because a host still has something of the VM.
      type: int
    unknown:
      description: Those left alone because their host did not answer.
      type: int
    young:
      description: Those left alone because they changed after the hosts were looked at, or shortly before.
      type: int
    errors:
      description: Those that could not be settled.
      type: int
  sample:
    vmms_found: 7
    vmms_deleted: 5
    vmms_already_deleted: 0
    sled_reservations_deleted: 6
    reservations_stale: 1
    conflicts: 1
    unknown: 0
    young: 1
    errors: 0
msg:
  description: The counters in a sentence, or what failed.
  returned: always
  type: str
  sample: "7 abandoned records and 1 stale reservation found; 5 records marked deleted, 6 reservations deleted; left
    alone: 1 conflict, 1 young"
report:
  description: The counters in a sentence, and one for each conflict, ten at most. It is printed.
  returned: when the database was read
  type: list
  elements: str
settled:
  description: What is gone; in check mode what would go.
  returned: when the database was read
  type: list
  elements: dict
  contains: &found
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
      description: V(abandoned), V(conflict), V(unknown), V(young), or V(changed) when it was not as listed any more.
      type: str
    reason:
      description: Why it was left alone.
      type: str
left:
  description: What was left alone, conflicts first; at most a hundred, C(counters) has them all.
  returned: when the database was read
  type: list
  elements: dict
  contains: *found
errors:
  description:
    - C(what), C(id) and C(message) of each that could not be settled; its rows are as before.
    - When the connection was lost there is one without C(what) and C(id). What was not settled is left to the next run.
  returned: when the database was read
  type: list
  elements: dict
"""

from ansible.module_utils.basic import AnsibleModule, missing_required_lib
from ansible_collections.microvm.reaper.plugins.module_utils import abandoned


def get_argument_spec():
    """Return the module's argument spec."""
    return abandoned.argument_spec(
        facts={"type": "dict", "required": True},
        facts_age={"type": "float", "required": True},
        max={"type": "int", "default": 500},
        strike_interval={"type": "float", "default": 60.0},
    )


def diff(gone):
    """Return what was there and is not any more."""
    before = "".join("%s %s\n" % (found.what, abandoned.printable(found.id)) for found in gone)
    return {"before_header": "abandoned", "after_header": "settled", "before": before, "after": ""}


def main():
    """Settle what is abandoned."""
    module = AnsibleModule(
        argument_spec=get_argument_spec(),
        mutually_exclusive=[("password", "password_file")],
        supports_check_mode=True,
    )
    if abandoned.PSYCOPG_MISSING:
        module.fail_json(msg=missing_required_lib("psycopg"), exception=abandoned.PSYCOPG_MISSING)
    params = module.params
    try:
        seen = abandoned.Seen(params["facts"])
        # Not a replica: it lags, and nothing can be settled there.
        with abandoned.open_database(params, module.no_log_values.add, target_session_attrs="read-write") as database:
            done = abandoned.Settling(
                database, seen, params["max"], params["strike_interval"], check_mode=module.check_mode
            )
    except abandoned.AbandonedError as err:
        module.fail_json(msg="nothing was changed: %s" % err)
    report = [abandoned.summary(done.counters, module.check_mode)] + abandoned.conflicts(done.left)
    result = {
        "changed": bool(done.gone),
        "report": report,
        "counters": done.counters,
        "settled": [abandoned.told(found) for found in done.gone],
        "left": [abandoned.told(found) for found in abandoned.worst(done.left)],
        "errors": done.failed,
        "diff": diff(done.gone),
    }
    if done.failed:
        module.fail_json(msg=abandoned.failures(done.failed), **result)
    module.exit_json(msg=report[0], **result)


if __name__ == "__main__":
    main()
