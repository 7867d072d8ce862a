# Copyright: The microvm.reaper authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Every file that fuzzing has kept, through the target that it is of: tests/fuzz/README.md says what must hold."""

from __future__ import annotations

import pytest
from fuzz.target import CORPUS, kept, targets

TARGETS = targets()
MOST_FILES, MOST_BYTES = 64, 8192


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", TARGETS)
def test_what_was_kept_holds(name):
    files = kept(name)
    assert files, "a target without a corpus: make fuzz TARGET=%s ARGS=--keep" % name
    for path in files:
        try:
            TARGETS[name].run(path.read_bytes())
        except Exception as err:
            raise AssertionError("%s of the target %s: %r" % (path.name, name, err)) from err


def test_the_corpus_stays_small():
    assert sorted(path.name for path in CORPUS.iterdir()) == sorted(TARGETS)
    for name in TARGETS:
        files = kept(name)
        assert len(files) <= MOST_FILES, name
        assert [path.name for path in files if path.stat().st_size > MOST_BYTES] == [], name
