# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What the fact modules of single kinds share: read, return plain structures, change nothing."""

from __future__ import annotations

from ansible.module_utils.basic import AnsibleModule

from .gather import collect_all
from .probe import DeadlineExceeded, Host, ProbeError, boottime, in_a_child


def rules_spec(kind):
    """Return the argument spec of a list of rules of the kind."""
    return {"type": "list", "elements": "dict", "options": kind.RULE}


def rules_of_all_kinds(kinds):
    """Return the argument spec of a mapping of kinds to their rules."""
    return {"type": "dict", "options": {kind.KIND: rules_spec(kind) for kind in kinds}}


def bounded(module, work):
    """Return what ``work(seconds)`` returns, JSON, or fail in words when the module's ``deadline`` is over before.

    ``seconds`` is a little less than that: so what could not be done in time is still told. Only what hangs beside the
    acts and looks, such as the file system of the state directory, is abandoned with all that was found.
    """
    deadline = module.params["deadline"]
    try:
        return in_a_child(lambda: work(deadline - min(10.0, deadline / 10)), deadline)
    except DeadlineExceeded:
        module.fail_json(
            msg="nothing came of it within %g s (reap_deadline): look whether the file system of %s hangs; what was "
            "begun is an intent in the ledger, and settled by the next sweep" % (deadline, module.params["state_dir"])
        )
    except ProbeError as err:
        module.fail_json(msg=str(err))


def run(spec, kinds_of):
    """Run a fact module. ``kinds_of(params)`` returns ``{fact name: (kind, its rules)}``."""
    module = AnsibleModule(
        argument_spec=dict(spec, deadline={"type": "float", "default": 60}), supports_check_mode=True
    )
    wanted = kinds_of(module.params)
    rules = {kind.KIND: kind_rules or [] for kind, kind_rules in wanted.values()}
    host = Host(boottime() + module.params["deadline"])
    found = collect_all([kind for kind, kind_rules in wanted.values() if kind_rules], rules, host)
    module.exit_json(
        changed=False,
        ansible_facts={name: found[kind.KIND] for name, (kind, _rules) in wanted.items() if kind.KIND in found},
    )
