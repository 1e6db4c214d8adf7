"""An engine that takes all memory: Ray ends it without asking, and the run must neither hang nor try for ever."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from ray import cloudpickle

from llmr_ray.assets import Asset
from llmr_ray.feedback import pool
from llmr_ray.feedback.pool import RayClient
from llmr_ray.feedback.requests import LLMRequest, Segment
from tests.feedback_world import make_config
from tests.tiny_llm import save_model

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ALLOWED_BYTES = 3 << 30
"""What the hungry engine may take before Ray's memory monitor ends it."""


class HungryActor(pool.EngineActor):
    """Takes more and more memory over a prompt that holds the word poison."""

    def compute(self, chunk, route):
        if any("poison" in segment.text for request in chunk.requests for segment in request.segments):
            held = []
            while len(held) * (64 << 20) < 2 * ALLOWED_BYTES:
                held.append(b"x" * (64 << 20))
                time.sleep(0.03)
        return pool.EngineActor.compute(self, chunk, route)


def ask(folder: Path) -> None:
    """What the process with a watched Ray does: prints the ids of the requests that failed, and their errors."""
    cloudpickle.register_pickle_by_value(sys.modules[HungryActor.__module__])
    pool.EngineActor = HungryActor
    client = RayClient(make_config(folder), Asset("tiny", "model", save_model(folder / "llm"), "f"))
    texts = [f"Question {number}:" for number in range(40)]
    texts[20] = "Question poison:"
    requests = [
        LLMRequest(request_id=text, unit=text, segments=(Segment(text=text),), targets=(" Paris",)) for text in texts
    ]
    results = client.answer(requests, label="test")
    client.close()
    print(json.dumps([[result.request_id, result.error] for result in results if result.error]))


@pytest.mark.timeout(600)
def test_a_prompt_that_takes_all_memory_is_a_row_error(tmp_path: Path) -> None:
    memory = psutil.virtual_memory()
    threshold = (memory.total - memory.available + ALLOWED_BYTES) / memory.total
    assert threshold < 0.95, "the test needs more free memory"
    limits = {"RAY_memory_usage_threshold": f"{threshold:.4f}", "RAY_memory_monitor_refresh_ms": "100"}
    code = f"from pathlib import Path; from tests.e2e.test_memory import ask; ask(Path({str(tmp_path)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **limits},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    [[failed, error]] = json.loads(done.stdout.splitlines()[-1])
    assert failed == "Question poison:"
    assert "died 3 times" in error
    assert "memory" in done.stderr
