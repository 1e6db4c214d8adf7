"""How the suite is divided between processes, so that one computes while another waits for Ray."""

import os
from typing import Any

import pytest

# Each process computes on one core; libraries read this when they are loaded, and Ray's workers inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Ray gives its workers the lowest priority; beside a process that computes all the time they would hardly move.
os.environ.setdefault("RAY_worker_niceness", "0")

_STARTS_RAY = ("tests/ray/", "tests/e2e/")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """All tests that start Ray go to one process, one after the other; other modules each as one."""
    from xdist.scheduler import LoadScopeScheduling

    class Divided(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "ray" if nodeid.startswith(_STARTS_RAY) else nodeid.partition("::")[0]

    return Divided(config, log)
