# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What the batches of one run (``serial``) tell each other: they share nothing but the run's temporary directory."""

from __future__ import annotations

import contextlib
import json
import os

from ansible import constants as C


@contextlib.contextmanager
def memory(of):
    """Give the dictionary that earlier batches of this run left under a name; what is in it at the end is kept."""
    path = os.path.join(C.DEFAULT_LOCAL_TMP, "%s.json" % of)  # type: ignore[attr-defined]
    try:
        with open(path, encoding="utf-8") as stream:
            kept = json.load(stream)
    except FileNotFoundError:
        kept = {}
    yield kept
    with open(path, "w", encoding="utf-8") as stream:
        json.dump(kept, stream)
