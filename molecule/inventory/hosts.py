#!/usr/bin/env python3
"""The inventory of a scenario: the test hosts that stand now, none before they are made and after they are gone."""

import json
import os
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "tests" / "hosts"))

from fleet import Fleet  # noqa: E402

state = Path(os.environ["MOLECULE_EPHEMERAL_DIRECTORY"]) / "hosts"
standing = Fleet(state).hosts() if (state / "inventory.yml").exists() else {}
variables = yaml.safe_load((state / "group_vars" / "all.yml").read_text()) if (state / "group_vars").exists() else {}
print(
    json.dumps(
        {
            "reap_hosts": {"hosts": sorted(standing), "vars": variables},
            "_meta": {"hostvars": standing},
        }
    )
)
