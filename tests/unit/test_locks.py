"""One writer of a folder at a time, also where the last one died."""

import json
import multiprocessing
import multiprocessing.synchronize
import os
import time
from pathlib import Path

import pytest

from llmr_ray.errors import LockedError
from llmr_ray.locks import locked


def _hold(folder: str, ready: "multiprocessing.synchronize.Event") -> None:
    with locked(Path(folder)):
        ready.set()
        time.sleep(60)


def test_second_writer_is_told_who_owns_the_folder(tmp_path: Path) -> None:
    """Two runs on one artifact interleave silently; the second must stop, and take over once the first is dead."""
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    owner = context.Process(target=_hold, args=(str(tmp_path), ready))
    owner.start()
    assert ready.wait(30)
    with pytest.raises(LockedError, match=str(owner.pid)), locked(tmp_path):
        pass
    owner.kill()
    owner.join()
    with locked(tmp_path):
        assert json.loads((tmp_path / "LOCK").read_text())["pid"] == os.getpid()
    assert not (tmp_path / "LOCK").exists()


def test_lock_of_a_silent_host_is_taken_over(tmp_path: Path) -> None:
    """A machine that died cannot remove its lock; its heartbeat tells."""
    (tmp_path / "LOCK").write_text('{"host":"elsewhere","pid":1,"since":"then"}')
    with pytest.raises(LockedError, match="elsewhere"), locked(tmp_path):
        pass
    os.utime(tmp_path / "LOCK", (0, 0))
    with locked(tmp_path):
        pass
