import os
from collections.abc import Iterator

import pytest
from hosts.fleet import Fleet
from integration import postgresql


@pytest.fixture(scope="session", autouse=True)
def owner() -> None:
    """What is left of these tests belongs to this process: `hosts.py down --all` finds it when we are gone."""
    os.environ.setdefault("REAPER_TEST_OWNER", str(os.getpid()))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Two containers, `one` and `two`."""
    fleet = Fleet.up(tmp_path_factory.mktemp("pair"), container=["one", "two"])
    yield fleet
    fleet.down()


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """One host with a kernel of its own, `kern`: it has device-mapper."""
    fleet = Fleet.up(tmp_path_factory.mktemp("kernel"), kernel=["kern"])
    yield fleet
    fleet.down()


@pytest.fixture(scope="session")
def postgres() -> Iterator[postgresql.Server]:
    """A real PostgreSQL; each test makes a database of its own in it."""
    with postgresql.server() as running:
        yield running
