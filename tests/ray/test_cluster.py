"""Shards are done once each whatever happens to the actors, and an impossible plan is refused instead of hanging."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from ray import cloudpickle

from llmr_ray import cluster
from llmr_ray.artifacts import Artifact, ArtifactSpec, Counts
from llmr_ray.config import RuntimeConfig
from llmr_ray.errors import DataError, ResourceError

pytestmark = pytest.mark.ray

# Ray's workers cannot import a test module by name.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

SPEC = ArtifactSpec(stage="demo", version=1, config={}, inputs={})


class Squares:
    """Writes shard n as the table {n * n}; the actor that first meets shard `dies_at` is killed in the middle."""

    def __init__(self, root: str, dies_at: int = -1, fails_at: int = -1) -> None:
        self.artifact = Artifact(root, SPEC)
        self.dies_at, self.fails_at = dies_at, fails_at

    def run(self, shard: int) -> dict[str, Any]:
        scar = self.artifact.path / f"killed-{shard}"
        if shard == self.dies_at and not scar.exists():
            scar.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if shard == self.fails_at:
            raise DataError(f"shard {shard} is rotten")
        return self.artifact.write_shard(shard, {"squares": pa.table({"n": [shard * shard]})}, Counts(rows_in=1, ok=1))


def make(root: Path, shards: list[int], **faults: int) -> Artifact:
    artifact = Artifact(root, SPEC)
    artifact.begin()
    cluster.map_shards(shards, Squares, {"root": str(root), **faults}, num_actors=2, purpose="test")
    return artifact


def test_killed_actor_is_replaced_and_nothing_is_lost(local_ray: RuntimeConfig, tmp_path: Path) -> None:
    """kill -9 of a worker must cost at most its shard, and the result must be the bytes of an undisturbed run."""
    disturbed = make(tmp_path / "a", list(range(6)), dies_at=3)
    undisturbed = make(tmp_path / "b", list(range(6)))
    assert (disturbed.path / "killed-3").exists()
    assert disturbed.commit(6, seconds=0)["files"] == undisturbed.commit(6, seconds=0)["files"]
    assert disturbed.read("squares")["n"].to_pylist() == [0, 1, 4, 9, 16, 25]


def test_error_of_a_shard_reaches_the_driver(local_ray: RuntimeConfig, tmp_path: Path) -> None:
    """A data error inside an actor must arrive as itself, with its message, and leave finished shards in the ledger."""
    with pytest.raises(DataError, match="shard 2 is rotten"):
        make(tmp_path, [0, 1, 2], fails_at=2)
    assert 2 in Artifact(tmp_path, SPEC).pending(3)


def test_plan_that_cannot_be_placed_is_refused(local_ray: RuntimeConfig, tmp_path: Path) -> None:
    """Ray waits for ever for CPUs or GPUs that do not exist."""
    with pytest.raises(ResourceError, match="GPUs"):
        cluster.map_shards([0], Squares, {"root": str(tmp_path)}, num_actors=1, num_gpus=8, purpose="test")


def test_memory_that_is_not_there_is_refused(local_ray: RuntimeConfig) -> None:
    """Ray waits for ever for an actor that fits no node, also where all nodes together have the room."""
    cluster.require_memory([1 << 20, 1 << 20], "search")
    with pytest.raises(ResourceError, match="more shards"):
        cluster.require_memory([1 << 20, 1 << 50], "search")
