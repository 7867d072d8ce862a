# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The person who is called when a sweep refuses, looks, and says what is true: by a variable for the next run."""

from __future__ import annotations

from . import actions
from .terms import BEYOND, REALM

TOO_MANY = ("host_cap", "fleet_cap", "shrunk", "epoch_went_back")
LIFTED = {"max_per_host": BEYOND, "max_percent_per_host": 100, "max_shrink_percent": 100}
STRANGERS = ("host_renamed", "machine_id_changed", "realm_changed", "cloned_machine_id")


class Answers:
    """What the person says for one run: ``policy`` for all hosts, ``adopted`` hosts, if the caps are ``lifted``."""

    def __init__(self):
        self.policy, self.adopted, self.lifted = {}, frozenset(), False

    def needs_truth(self):
        """The person made sure that the control plane answers with the truth this time."""
        return self.lifted or "expect_empty" in self.policy


def answer(world, refusals):
    """Return the answers to ``{host or None: code}``, the refusals of the run before."""
    given, chance = Answers(), world.random
    codes = set(refusals.values())
    if codes & set(TOO_MANY) and chance.random() < 0.8:
        given.lifted = True
        given.policy.update(LIFTED)
    if "blind" in codes and not world.living() and chance.random() < 0.5:
        given.policy["expect_empty"] = REALM
    if "latched" in codes and chance.random() < 0.5:
        given.policy["clear_latch"] = REALM
    given.adopted = frozenset(
        host
        for host, code in refusals.items()
        if code in STRANGERS and chance.random() < 0.7 and _is_right(world, host)
    )
    for name, value in given.policy.items() if world.story.is_wanted else ():
        world.story.tell("a person has looked and says: reap_%s=%s", name, value)
    for host in sorted(given.adopted, key=repr) if world.story.is_wanted else ():
        world.story.tell("a person has looked and says for %s: reap_adopt_host=true", host)
    return given


def _is_right(world, host):
    """Tell whether the host is what it says it is. A clone is given a machine id of its own, or it is overlooked."""
    is_clone = any(other.machine == host.machine for other in world.hosts if other is not host)
    if is_clone and world.random.random() < 0.5:
        actions.new_machine(host)
        world.story.tell("%s is given a machine id of its own: %s", host, host.machine)
        return False
    strange = [vm for vm in world.vms if vm.realm != REALM and vm.lives_on(host)]
    return host.called == host.known_as and not strange
