import os

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "hosts: starts test hosts; needs root, podman and the network for images")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name == "hosts" and os.geteuid() != 0:
            item.add_marker(pytest.mark.skip(reason="test hosts need root"))
