"""How the suite is divided between two processes, so that one computes while the other waits for Ray."""

import os
from pathlib import Path

import pytest

# Each process computes on one core; libraries read this when they are loaded, and Ray's workers inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

_STARTS_PROCESSES = {"ray", "e2e", "distributed"}


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests that start Ray or other processes go to one process (--dist loadgroup), one after the other."""
    root = Path(__file__).parent
    for item in items:
        if item.path.relative_to(root).parts[0] in _STARTS_PROCESSES:
            item.add_marker(pytest.mark.xdist_group("processes"))
