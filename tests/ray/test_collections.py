"""Documents added by a real job whose workers are killed."""

import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from llmr_ray.artifacts import SHARD_ROWS
from llmr_ray.config import RuntimeConfig
from llmr_ray.index import adding, collection
from llmr_ray.index.filters import Comparison
from llmr_ray.index.snapshot import OpenSnapshot
from llmr_ray.modeling.embedder import Embedder
from tests.collections_world import base_of, rows_of, write

pytestmark = pytest.mark.ray


def test_a_killed_worker_costs_no_document(local_ray: RuntimeConfig, tmp_path: Path) -> None:
    """kill -9 of an embedding actor in the middle of a shard: the shard is done again, once."""
    root = tmp_path / "artifacts"
    config, asset = base_of(root)
    rows = rows_of(0, 3 * SHARD_ROWS)
    file = write(tmp_path / "more.jsonl", rows)
    done: list[collection.Change] = []
    thread = threading.Thread(target=lambda: done.append(adding.add(config.runtime, "c", file)))
    before = {path.parent for path in root.glob("embed/*/config.json")}
    thread.start()
    killed = False
    while thread.is_alive() and not killed:
        started = [path for path in root.glob("embed/*/_ledger/*.json") if path.parents[1] not in before]
        if started:
            workers = [child for child in psutil.Process().children(recursive=True) if "ShardActor" in _title(child)]
            for worker in workers:
                os.kill(worker.pid, signal.SIGKILL)
            killed = bool(workers)
        time.sleep(0.01)
    thread.join()
    assert killed
    assert done[0].num_added == len(rows)
    vectors = Embedder(asset.path, max_query_tokens=8, max_document_tokens=12, precision="float32").encode(
        [str(row["text"]) for row in rows[:50]],
        instruction=config.tasks["qa"].document_instruction,
        max_tokens=12,
        batch_tokens=4096,
    )
    snapshot = OpenSnapshot(root, "c", done[0].snapshot)
    _, scores = snapshot.search(vectors, 1, allowed=[Comparison("doc_id", "eq", row["doc_id"]) for row in rows[:50]])
    np.testing.assert_allclose(scores[:, 0], 1, atol=1e-5)


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
