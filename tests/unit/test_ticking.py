"""The thread beside a block: alive while the block is, gone with it."""

import json
import threading
import time
from pathlib import Path

import pytest

from llmr_ray.memory import metered_memory
from llmr_ray.ticking import ticking
from llmr_ray.training.checkpoint import MAX_RECORD_BYTES, append_step, last_steps, read_steps
from llmr_ray.training.progress import describe


def test_nothing_ticks_after_the_block() -> None:
    """A heartbeat that outlives its block would hold a lock nobody owns, also when the block failed."""
    ticks: list[float] = []

    def fail_while_ticking() -> None:
        with ticking(lambda: ticks.append(0.0), 0.01, "test-tick"):
            while len(ticks) < 3:
                time.sleep(0.005)
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        fail_while_ticking()
    after = len(ticks)
    time.sleep(0.05)
    assert len(ticks) == after
    assert "test-tick" not in {thread.name for thread in threading.enumerate()}


def test_memory_of_a_short_block_is_measured() -> None:
    """A run shorter than the interval must not report a peak of zero."""
    with metered_memory(60.0) as meter:
        pass
    assert meter.peak_bytes > 1_000_000


def record(step: int) -> dict[str, object]:
    return {"step": step, "dataset": "a", "loss": 1.0, "learning_rate": 1e-5, "seconds": 2.0, "num_tokens": 100}


def test_last_steps_are_the_end_of_all_steps(tmp_path: Path) -> None:
    """Progress reads the tail alone: a cut first line, a torn last one and a short file must all be survived."""
    assert last_steps(tmp_path, 20) == []
    for step in range(3):
        append_step(tmp_path, record(step))
    assert last_steps(tmp_path, 20) == read_steps(tmp_path)
    for step in range(3, 3 * MAX_RECORD_BYTES // len(json.dumps(record(0)))):
        append_step(tmp_path, record(step))
    (tmp_path / "steps.jsonl").open("a").write('{"step": 9')
    assert last_steps(tmp_path, 2) == read_steps(tmp_path)[-2:]


def test_time_left_is_of_the_steps_not_done() -> None:
    """Records are a tail: the number of steps done is the last one's number, not their count."""
    line = describe([record(step) for step in range(40, 60)], 90)
    assert line.startswith("step 60/90")
    assert "50 tokens/s, 00:01:00 left" in line
