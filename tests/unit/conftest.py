# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

import pytest
from ansible_collections.microvm.reaper.plugins.plugin_utils.sources import file

FAR_AHEAD = 4_000_000_000.0


@pytest.fixture(autouse=True)
def files_have_no_date():
    """Many tests live at an instant of their own, which their files do not know. undo() gives them a date."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file, "_written", lambda stream: FAR_AHEAD)
        yield patch
