"""How the suite is divided between processes, so that one computes while another waits for Ray."""

import os
from typing import Any

import pytest

# Each process computes on one core; libraries read this when they are loaded, and Ray's workers inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

_STARTS_PROCESSES = ("tests/ray/", "tests/e2e/", "tests/distributed/")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """All tests that start Ray or other processes go to one process, one after the other; other modules each as one."""
    from xdist.scheduler import LoadScopeScheduling

    class Divided(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "processes" if nodeid.startswith(_STARTS_PROCESSES) else nodeid.partition("::")[0]

    return Divided(config, log)
