# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Every scenario of docs/scenarios.md is named by a test, in its name (test_row_12_...) or docstring (Row 12)."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def test_every_scenario_has_a_test_that_names_it():
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", (ROOT / "docs" / "scenarios.md").read_text(), re.MULTILINE)
    wanted = {int(number) for number, said in rows if "(not yet)" not in said}
    text = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py") if path != Path(__file__))
    named = {
        int(number)
        for found in re.findall(r"def test_rows?_(\d+(?:_\d+)*)_|^ +\"\"\"Rows? ([\d, and]+)", text, re.MULTILINE)
        for number in re.findall(r"\d+", found[0] + " " + found[1])
    }
    assert len(rows) == 40
    assert sorted(wanted - named) == []
