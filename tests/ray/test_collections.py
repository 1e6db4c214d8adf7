"""Documents added by a real job, one of whose workers is killed."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from llmr_ray.artifacts import SHARD_ROWS
from llmr_ray.config import RuntimeConfig
from llmr_ray.index import adding, stage
from llmr_ray.index.filters import Comparison
from llmr_ray.index.snapshot import OpenSnapshot, folder_of, named
from llmr_ray.modeling.embedder import Embedder
from tests.collections_world import base_of, rows_of, write
from tests.waiting import until

pytestmark = pytest.mark.ray


def test_a_killed_worker_costs_no_document(
    local_ray: RuntimeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9 of an embedding actor in the middle of a shard: the shard is done again, and every document is there."""

    class Dying(stage.EmbedWorker):
        """Its process is killed in the middle of shard 1, the first time."""

        def run(self, shard: int) -> dict[str, Any]:
            scar = self.artifact.path / "killed"
            if shard == 1 and not scar.exists():
                scar.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().run(shard)

    root = tmp_path / "artifacts"
    config, asset = base_of(root)
    rows = rows_of(0, 2 * SHARD_ROWS + 10)
    monkeypatch.setattr(stage, "EmbedWorker", Dying)
    done = adding.add(config.runtime, "c", write(tmp_path / "more.jsonl", rows))
    assert len(list(root.glob("embed/*/killed"))) == 1
    assert done.num_added == len(rows)
    chosen = [*rows[:5], *rows[SHARD_ROWS : SHARD_ROWS + 5], rows[-1]]
    vectors = Embedder(asset.path, max_query_tokens=8, max_document_tokens=12, precision="float32").encode(
        [str(row["text"]) for row in chosen],
        instruction=config.tasks["qa"].document_instruction,
        max_tokens=12,
        batch_tokens=4096,
    )
    snapshot = OpenSnapshot(root, "c", done.snapshot)
    _, scores = snapshot.search(vectors, 1, allowed=[Comparison("doc_id", "eq", row["doc_id"]) for row in chosen])
    np.testing.assert_allclose(scores[:, 0], 1, atol=1e-5)


@pytest.mark.slow
def test_a_killed_build_leaves_what_is_served(tmp_path: Path) -> None:
    """kill -9 of `llmr index add` and all its workers: CURRENT names a whole snapshot, and the same command goes on."""
    root = tmp_path / "artifacts"
    base_of(root)
    rows = rows_of(0, 2 * SHARD_ROWS + 10)
    settings = tmp_path / "small.yaml"
    settings.write_text("runtime: {object_store_mb: 256}\n")
    more = write(tmp_path / "more.jsonl", rows)
    command = [sys.executable, "-m", "llmr_ray", "index", "add", "c", str(more), "--root", str(root), "--config"]
    before = (root / "collections" / "c" / "CURRENT").read_bytes()
    first = named(folder_of(root, "c")).current
    with subprocess.Popen([*command, str(settings)], start_new_session=True) as build:

        def half_embedded() -> bool:
            assert build.poll() is None
            return bool(list(root.glob("embed/*/parts/*-00000*"))) and len(list(root.glob("embed/*"))) == 2

        until(half_embedded, 120)
        for process in [*psutil.Process(build.pid).children(recursive=True), build]:
            process.kill()
    assert (root / "collections" / "c" / "CURRENT").read_bytes() == before
    old = OpenSnapshot(root, "c", first)
    assert old.num_documents == 300
    subprocess.run([*command, str(settings)], check=True, timeout=300)
    assert named(folder_of(root, "c")).current != first
    assert OpenSnapshot(root, "c", named(folder_of(root, "c")).current).num_documents == 300 + len(rows)
