#!/usr/bin/python
# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
module: reap
short_description: Carry out the plan of one host
version_added: 0.1.0
author:
  - The microvm.reaper authors (@microvm)
description:
  - Sets aside or removes what the plan names, in order, each on its own. Before every act the object is read again and
    must be the very one that the plan was made for; what is busy is left alone, and nothing is ever forced.
  - Writes the strikes that the plan gives into the host's ledger, and what it is about to remove, why, and what came of
    it, into the host's journal, which M(microvm.reaper.journal_facts) reads. A host that cannot remember removes
    nothing.
  - One reaper at a time works on a host. A plan is carried out only when nobody has written the ledger since it was
    made.
  - A failed item never stops the others. The module fails at the end when any item failed.
options:
  plan:
    description: The plan of this host, as P(microvm.reaper.confirmed_orphans#filter) returned it.
    type: dict
    required: true
  state_dir:
    description: Where the host keeps what it remembers.
    type: path
    default: /var/lib/microvm.reaper
  deadline:
    description: Seconds after which whatever is not done is left for the next sweep.
    type: float
    default: 300
  sweep:
    description:
      - The id of the sweep, by which M(microvm.reaper.undo) finds what it has set aside.
      - Made anew where it is not given.
    type: str
  spare:
    description: VMs of the plan that are left alone all the same, by their ids, each with the reason.
    type: dict
    default: {}
  evidence:
    description:
      - Keep evidence of each VM that is about to lose something, in the directory C(evidence) beside the host's ledger.
        Without this option none is kept. What fails of it is in the result and stops nothing unless it is required.
    type: dict
    suboptions:
      seconds:
        description: For how long it may be gathered before the acts.
        type: float
        default: 5
      bytes:
        description: The most that is read for one bundle.
        type: int
        default: 16777216
      percent:
        description: The most of its file system that all bundles together may take, from 1 to 50.
        type: int
        default: 25
      max_bytes:
        description: The most bytes that they may take; the lesser of the two counts.
        type: int
        default: 1073741824
      required:
        description: Whether a VM of which no evidence could be kept is left alone.
        type: bool
        default: false
extends_documentation_fragment:
  - microvm.reaper.rules
attributes:
  check_mode:
    description: Can run in check mode and return changed status prediction without modifying target.
    support: full
    details: Looks at every object of the plan again. Nothing is removed and no strike is recorded.
  diff_mode:
    description: Will return details on what has changed (or possibly needs changing in check mode), when in diff mode.
    support: full
  platform:
    description: Target OS/families that can be operated against.
    support: full
    platforms: Linux
requirements:
  - Python 3.8 or later on the host
seealso:
  - module: microvm.reaper.vm_resource_facts
  - module: microvm.reaper.journal_facts
  - module: microvm.reaper.undo
  - plugin: microvm.reaper.confirmed_orphans
    plugin_type: filter
"""

EXAMPLES = r"""
- name: Remove what is confirmed
  microvm.reaper.reap:
    plan: "{{ ansible_facts.vm_resources | microvm.reaper.confirmed_orphans(manifest, policy) }}"
    rules: "{{ lookup('microvm.reaper.rules', 'hyper') }}"
"""

RETURN = r"""
outcomes:
  description: What came of each item of the plan, in the order of removal.
  returned: always
  type: list
  elements: dict
  contains:
    kind:
      description: The kind of the resource.
      type: str
    name:
      description: Its name.
      type: str
    vm_id:
      description: The VM it belonged to.
      type: str
    outcome:
      description:
        - V(reaped), V(set_aside), V(already_gone), V(deferred) when it is busy, V(identity_changed) when another object
          has its name now, V(failed), and in check mode V(would_reap) or V(would_set_aside).
      type: str
    message:
      description: Why, when it was not reaped.
      type: str
    bytes:
      description: What its removal gave back.
      type: int
    holders:
      description:
        - Who keeps it busy, each with C(type) and, in a sentence, C(name).
        - A process has C(pid), C(command), C(unit), C(container), C(mount_namespace) where it is another one than the
          reaper's, and C(by), by what it holds it (C(cwd), C(root), C(exe), C(map), C(fd 12)), C(fd) being the first
          descriptor. The parent of a zombie has C(image) of its container and C(note), what was tried in vain. A block
          device has its number, C(device).
      type: list
      elements: dict
    restarted:
      description: The systemd unit that was restarted for a zombie's sake.
      type: str
      returned: when a unit was restarted
  sample:
    - kind: dm_thin
      name: hyper-rw-vabc234
      vm_id: vabc234
      outcome: reaped
      message: ""
      bytes: 134217728
      holders: []
evidence:
  description: What became of the evidence.
  returned: when there is a plan to carry out, evidence is asked for and the module is not in check mode
  type: dict
  contains:
    written:
      description: How many bundles were written.
      type: int
    bytes:
      description: What they take.
      type: int
    short:
      description: How many of them have metadata only, because the time was used up.
      type: int
    known:
      description: How many VMs have a bundle of an earlier sweep that has it all already.
      type: int
    skipped:
      description: How many VMs have none, because the time was used up.
      type: int
    failed:
      description: Why bundles could not be written, the first few.
      type: list
      elements: str
    background:
      description: What is being done in the background, or why nothing is.
      type: str
  sample:
    written: 3
    bytes: 9412
    short: 0
    known: 0
    skipped: 0
    failed: []
    background: null
busy:
  description: Why nothing was done, when another reaper works on the host.
  returned: when another reaper works on the host
  type: str
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.microvm.reaper.plugins.module_utils import acts
from ansible_collections.microvm.reaper.plugins.module_utils import resource as r
from ansible_collections.microvm.reaper.plugins.module_utils.all_kinds import BY_NAME, ORDER
from ansible_collections.microvm.reaper.plugins.module_utils.evidence import DEFAULTS, Evidence
from ansible_collections.microvm.reaper.plugins.module_utils.facts_module import bounded, rules_of_all_kinds
from ansible_collections.microvm.reaper.plugins.module_utils.ledger import Busy, LedgerError
from ansible_collections.microvm.reaper.plugins.module_utils.probe import Host, boottime

CHANGES = (r.REAPED, r.SET_ASIDE, r.WOULD_REAP, r.WOULD_SET_ASIDE)


def get_argument_spec():
    """Return the module's argument spec."""
    return {
        "plan": {"type": "dict", "required": True},
        "rules": dict(rules_of_all_kinds(ORDER), required=True),
        "state_dir": {"type": "path", "default": "/var/lib/microvm.reaper"},
        "deadline": {"type": "float", "default": 300},
        "sweep": {"type": "str"},
        "spare": {"type": "dict", "default": {}},
        "evidence": {"type": "dict", "options": get_evidence_spec()},
    }


def get_evidence_spec():
    """Return the argument spec of what is to be kept of a VM."""
    types = {bool: "bool", int: "int", float: "float"}
    return {name: {"type": types[type(value)], "default": value} for name, value in DEFAULTS.items()}


def checked(plan):
    """Return the plan, or raise ValueError when it is none."""
    for key, kind in (("reap", list), ("ledger", dict), ("generation", int), ("realm", str)):
        if not isinstance(plan.get(key), kind):
            raise ValueError("'%s' is missing or no %s" % (key, kind.__name__))
    for token in plan["reap"]:
        if token.get("kind") not in BY_NAME:
            raise ValueError("kind %r of %r is not known here" % (token.get("kind"), token.get("name")))
        if token.get("step", r.REMOVE) not in r.STEPS:
            raise ValueError("step %r of %r is not known here" % (token["step"], token.get("name")))
        if not all(isinstance(token.get(key), str) for key in ("name", "vm_id", "identity")):
            raise ValueError("a token without name, vm_id or identity: %.300r" % (token,))
    return plan


def summary(outcomes):
    """Return one sentence for what failed."""
    failed = [one for one in outcomes if one["outcome"] == r.FAILED]
    items = "; ".join("%s %s: %s" % (one["kind"], one["name"], one["message"]) for one in failed)
    return "%d of %d items failed: %s" % (len(failed), len(outcomes), items)


def diff(outcomes):
    """Return what was there and is not any more."""
    gone = ["%(kind)s %(name)s\n" % one for one in outcomes if one["outcome"] in (r.REAPED, r.WOULD_REAP)]
    aside = ["%(kind)s %(name)s\n" % one for one in outcomes if one["outcome"] in (r.SET_ASIDE, r.WOULD_SET_ASIDE)]
    return {
        "before_header": "leftovers of dead VMs",
        "after_header": "reaped, or set aside",
        "before": "".join(gone + aside),
        "after": "".join("%s (set aside)\n" % line[:-1] for line in aside),
    }


def _remember(plan, module):
    """Let the host remember a latch, so that it holds until a person clears it, whatever the next list says."""
    if plan["refused"].get("code") == "latched" and not module.check_mode:
        try:
            acts.latch(plan["refused"], module.params["state_dir"], plan["realm"])
        except LedgerError as err:
            module.warn("the latch could not be written down: %s" % err)


def main():
    """Carry out the plan."""
    module = AnsibleModule(argument_spec=get_argument_spec(), supports_check_mode=True)
    params = module.params
    try:
        plan = checked(params["plan"])
    except ValueError as err:
        module.fail_json(msg="not a plan of microvm.reaper.confirmed_orphans: %s" % err, outcomes=[])
    if plan.get("refused"):
        _remember(plan, module)
        module.fail_json(msg="refused (%(code)s): %(message)s" % plan["refused"], outcomes=[], refused=plan["refused"])
    if params["evidence"] and not 1 <= params["evidence"]["percent"] <= 50:
        problem = "evidence: percent must be from 1 to 50, not %d" % params["evidence"]["percent"]
        module.fail_json(msg=problem, outcomes=[])
    plan, left = acts.spared(plan, params["spare"])
    done = bounded(module, lambda seconds: carry_out(plan, params, module.check_mode, seconds))
    for problem in done["problems"]:
        module.warn(problem)
    if "busy" in done:
        module.exit_json(changed=False, outcomes=[], busy=done["busy"])
    if "failed" in done:
        module.fail_json(msg=done["failed"], outcomes=[])
    outcomes = done["outcomes"] + left
    result = {
        "changed": any(one["outcome"] in CHANGES for one in outcomes),
        "outcomes": outcomes,
        "diff": diff(outcomes),
        **({"evidence": done["evidence"]} if "evidence" in done else {}),
    }
    if any(one["outcome"] == r.FAILED for one in outcomes):
        module.fail_json(msg=summary(outcomes), **result)
    module.exit_json(**result)


def carry_out(plan, params, check_mode, seconds):
    """Return ``{problems}`` with ``outcomes``, and ``evidence`` if any was kept; or with ``busy`` or ``failed``."""
    problems, state_dir = [], params["state_dir"]
    evidence = Evidence(state_dir, plan["realm"], params["evidence"]) if params["evidence"] else None
    try:
        with acts.Hands(params["rules"], Host(boottime() + seconds, state_dir), ORDER) as hands:
            if check_mode:
                return {"problems": [], "outcomes": acts.foresee(plan["reap"], hands)}
            how = {"tell": problems.append, "sweep": params["sweep"], "evidence": evidence}
            outcomes = acts.apply(plan, hands, state_dir, plan["realm"], **how)
    except Busy as err:
        return {"problems": problems, "busy": str(err)}
    except LedgerError as err:
        return {"problems": problems, "failed": str(err)}
    found = {"problems": problems, "outcomes": outcomes}
    return dict(found, evidence=evidence.result()) if evidence else found


if __name__ == "__main__":
    main()
