# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What the modules have in common: the rules of each kind, and where a host keeps its state."""

from __future__ import annotations

import textwrap

_RULES = {
    "cgroup": """
        root:
          description: The cgroup right below which the VMs' cgroups are, relative to the mount of the hierarchy.
          type: str
          required: true
        name:
          description: Regular expression for the whole name of a VM's cgroup, with a group C(vm_id).
          type: str
          required: true
        """,
    "jail": """
        base:
          description: The jailer's base directory, an absolute path.
          type: str
          required: true
        exec:
          description:
            - Regular expression for the directory between the base and the jails, which the jailer calls as the binary.
            - Empty where the jails are right below the base.
          type: str
          default: "[^/]+"
        name:
          description: Regular expression for the whole name of a VM's jail, with a group C(vm_id).
          type: str
          required: true
        evidence:
          description:
            - Globs, relative to the jail, of the logs that go into the evidence of a VM before its jail is removed.
          type: list
          elements: str
        """,
    "dm_thin": """
        name:
          description: Regular expression for the whole device-mapper name of a VM's thin volume, with a group C(vm_id).
          type: str
          required: true
        pool:
          description: Only the volumes of the thin pool with this device-mapper name.
          type: str
        """,
    "container": """
        namespace:
          description: The containerd namespace.
          type: str
          required: true
        name:
          description: Regular expression for the whole id of a VM's container, with a group C(vm_id).
          type: str
        label:
          description: The label whose value is the id of the VM. With O(ignore:name) too, both must match.
          type: str
        address:
          description: The socket of containerd.
          type: str
          default: /run/containerd/containerd.sock
        """,
    "snapshot": """
        namespace:
          description: The containerd namespace.
          type: str
          required: true
        pinned:
          description:
            - Whether snapshots with the label C(containerd.io/gc.root) are meant too. C(ctr snapshots prepare) puts it
              on
              all that it makes. Otherwise they are left alone.
          type: bool
          default: false
        snapshotter:
          description: The snapshotter.
          type: str
          default: overlayfs
        name:
          description: Regular expression for the whole key of a VM's snapshot, with a group C(vm_id).
          type: str
        label:
          description: The label whose value is the id of the VM. With O(ignore:name) too, both must match.
          type: str
        address:
          description: The socket of containerd.
          type: str
          default: /run/containerd/containerd.sock
        """,
    "thin_id": """
        pool:
          description: The device-mapper name of a thin pool that holds volumes of VMs and nothing else.
          type: str
          required: true
        address:
          description: The socket of containerd, whose devmapper snapshotter may have volumes in a pool.
          type: str
          default: /run/containerd/containerd.sock
        """,
    "zombie": """
        command:
          description: Regular expression for the whole command name of the process.
          type: str
          default: ".*"
        cgroup_name:
          description: Regular expression for the whole name of a cgroup that the process is in, with a group C(vm_id).
          type: str
        pid_file:
          description: Glob of files that hold the pid of a VM's process, with one C(*) in the place of the VM's id.
          type: str
        """,
}


def _suboptions(kind, indent):
    return textwrap.indent(textwrap.dedent(_RULES[kind]).strip("\n"), " " * indent)


def _one_kind(kind):
    return """
options:
  rules:
    description: Which names are those of VMs, and where to look for them. A resource belongs to the first that matches.
    type: list
    elements: dict
    required: true
    suboptions:
%s
""" % _suboptions(kind, 6)


def _all_kinds():
    kinds = "\n".join(
        """\
      %s:
        description: The rules of this kind. Without any the host's resources of this kind are not looked at.
        type: list
        elements: dict
        suboptions:
%s""" % (kind, _suboptions(kind, 10))
        for kind in sorted(_RULES)
    )
    return """
options:
  rules:
    description:
      - By kind, which names are those of VMs, and where to look for them; P(microvm.reaper.rules#lookup) makes them of
        presets.
    type: dict
    required: true
    suboptions:
%s
""" % kinds


class ModuleDocFragment:
    """Fragments; the name of an attribute is the part after the dot in extends_documentation_fragment."""

    FACTS = """
options:
  deadline:
    description: Seconds after which whatever has not answered is given up and counts as unavailable.
    type: float
    default: 60
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
    platforms: Linux
requirements:
  - Python 3.8 or later on the host
notes:
  - Reads only. What could not be read is unavailable, with the reason; it is never an empty list.
"""


setattr(ModuleDocFragment, "DOCUMENTATION", _all_kinds())  # noqa: B010
for _kind in _RULES:
    setattr(ModuleDocFragment, _kind.upper(), _one_kind(_kind))
