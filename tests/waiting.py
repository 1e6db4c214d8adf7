"""Waiting for what other processes do."""

import time
from collections.abc import Callable


def until(condition: Callable[[], object], seconds: float, told: Callable[[], object] = str) -> None:
    """Returns once a condition holds; fails with what `told` says where it does not within so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {told()}"
        time.sleep(0.05)
