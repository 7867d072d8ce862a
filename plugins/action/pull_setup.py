# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The controller's side of microvm.reaper.pull_setup."""

from __future__ import annotations

import os
import tempfile
import urllib.parse

from ansible import constants as C
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator
from ansible.plugins.action import ActionBase
from ansible_collections.microvm.reaper.plugins.plugin_utils import pulling
from ansible_collections.microvm.reaper.plugins.plugin_utils.inputs import ROOT, version
from ansible_collections.microvm.reaper.plugins.plugin_utils.variables import PREFIX, role_spec

PLACE = "ansible_collections/microvm/reaper"


class ActionModule(ActionBase):
    """Write down here, for one host, what it needs to sweep itself."""

    TRANSFERS_FILES = False
    _requires_connection = False

    def run(self, tmp=None, task_vars=None):
        """Pack the collection once for the run, and write the inventory of this host."""
        result = super().run(tmp, task_vars)
        self.validate_argument_spec({})
        spec = role_spec()
        given = {name: self._templar.template(task_vars[name]) for name in task_vars if name in spec}
        validated = ArgumentSpecValidator(spec).validate(given)
        problems = validated.error_messages or pulling.problems(validated.validated_parameters)
        if problems:
            result.update(failed=True, msg="nothing was done: %s" % "; ".join(problems), problems=problems)
            return result
        host = task_vars["inventory_hostname"]
        known = dict(pulling.of_the_host(given, spec), reap_host_id=given.get(PREFIX + "host_id", host))
        content = pulling.files(os.path.normpath(ROOT))
        name = "%s-%s" % (version(), pulling.digest(content))
        here = C.DEFAULT_LOCAL_TMP  # type: ignore[attr-defined]
        path = os.path.join(here, "pull-%s.tar.gz" % name)
        if not os.path.exists(path):
            _write(path, pulling.archive(content, PLACE))
        inventory = os.path.join(here, "pull-%s.yml" % urllib.parse.quote(host, safe=""))
        _write(inventory, pulling.inventory(host, known).encode())
        result.update(changed=False, version=name, archive=path, inventory=inventory, variables=sorted(known))
        return result


def _write(path, content):
    """Write a file for its owner alone; several hosts may write the same one at the same time."""
    descriptor, partial = tempfile.mkstemp(dir=os.path.dirname(path))
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(content)
    os.replace(partial, path)
