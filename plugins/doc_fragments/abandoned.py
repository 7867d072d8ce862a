# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What the modules for the records of a control plane have in common."""

from __future__ import annotations


class ModuleDocFragment:
    """The database, its tables, and what the hosts say."""

    DOCUMENTATION = r"""
options:
  conninfo:
    description:
      - How to reach the database, as libpq writes it, C(key=value) pairs or a URL; for example
        C(host=db1,db2 port=26257 dbname=omicron user=reaper sslmode=verify-full sslrootcert=/etc/ssl/db.pem).
      - What is not here is taken from libpq's environment variables and files.
      - It must not have a password.
    type: str
    default: ""
  password:
    description: The password of the user.
    type: str
  password_file:
    description: A file that has it as its first line. Excludes O(password).
    type: path
  min_age:
    description: What changed less than this many seconds before the hosts were looked at is left alone as well.
    type: float
    default: 60
  records:
    description:
      - The table that has a row for each VM, and its columns.
      - A table may be written with its schema, and that with its database, C(omicron.public.vmm). Names are taken as
        they are; they are not folded to lower case.
    type: dict
    default: {}
    suboptions:
      table:
        description: The table.
        type: str
        default: vmm
      id:
        description: The id of the VM, by which the hosts know it. Unique; pages are made by it.
        type: str
        default: id
      instance:
        description: The id of the instance that owns it.
        type: str
        default: instance_id
      host:
        description: The host it is on, by the name that O(facts) has.
        type: str
        default: sled_id
      state:
        description: Its state, an enumeration or a text.
        type: str
        default: state
      created:
        description: When it was made, a timestamp with time zone.
        type: str
        default: time_created
      changed:
        description: When its state changed last. Where there is no such column, name O(records.created) again.
        type: str
        default: time_state_updated
      deleted:
        description: When it was deleted, null where it was not. This is what is set.
        type: str
        default: time_deleted
  reservations:
    description: The table of what is set aside on a host for a VM, and its columns.
    type: dict
    default: {}
    suboptions:
      table:
        description: The table.
        type: str
        default: sled_resource_vmm
      id:
        description: The id of the VM.
        type: str
        default: id
      instance:
        description: The id of the instance that owns the VM; may be null.
        type: str
        default: instance_id
      host:
        description: The host, by the name that O(facts) has.
        type: str
        default: sled_id
      state:
        description: The state of the reservation.
        type: str
        default: state
  instances:
    description: The table of what owns VMs, and its columns.
    type: dict
    default: {}
    suboptions:
      table:
        description: The table.
        type: str
        default: instance
      id:
        description: The id of the instance.
        type: str
        default: id
      active:
        description: The id of the VM that it runs on; may be null.
        type: str
        default: active_propolis_id
      target:
        description: The id of the VM that it moves to; may be null. If there is none, name O(instances.active) again.
        type: str
        default: target_propolis_id
      deleted:
        description: When the instance was deleted, null where it was not.
        type: str
        default: time_deleted
  terminal_states:
    description:
      - States of a record in which its VM is over for good. Exactly as the database writes them.
      - States that mean a live VM wherever they are used, such as V(running), are refused.
    type: list
    elements: str
    default: [destroyed, failed, saga_unwound]
  tombstoned_states:
    description: States of a reservation whose VM does not run any more. V(active) and V(target) are refused.
    type: list
    elements: str
    default: [tombstoned]
  timeout:
    description: Seconds after which a statement, or the wait for a lock that somebody else has, is given up.
    type: float
    default: 30
requirements:
  - psycopg >= 3.1, for the Python that the module runs with
notes:
  - Runs where psycopg is, which is mostly the controller, so delegate it to C(localhost), and once for all hosts.
  - For PostgreSQL 12 or later, and for CockroachDB, which takes the same statements. The tests run on PostgreSQL 15.
"""
