"""From groups to a committed model, whatever is trained: tokenising, training with its checkpoints, publishing.

The groups are tokenised shard by shard by a pool of actors, then data-parallel training under Ray Train, which replaces
workers that die; what they resume from are our own verified checkpoints, in a folder that all workers reach. A driver
or worker that is told to stop leaves a checkpoint.
"""

import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from llmr_ray import cluster
from llmr_ray.artifacts import Artifact, Counts
from llmr_ray.assets import Asset
from llmr_ray.config import Config, RuntimeConfig
from llmr_ray.durable import staged
from llmr_ray.errors import ConfigError, DataError
from llmr_ray.training import checkpoint
from llmr_ray.training.fit import SPEED_FILE, fit
from llmr_ray.training.progress import train_progress
from llmr_ray.training.recipe import Recipe
from llmr_ray.training.speed import summary
from llmr_ray.training.trackers import tracked

STEP_FIELDS = [
    ("step", pa.int64()),
    ("epoch", pa.int64()),
    ("dataset", pa.string()),
    ("task", pa.string()),
    ("loss", pa.float64()),
    ("learning_rate", pa.float64()),
    ("self_paced_factor", pa.float64()),
    ("grad_norm", pa.float64()),
    ("num_tokens", pa.int64()),
    ("padding_fraction", pa.float64()),
    ("reward_margin", pa.float64()),
]
"""What an artifact keeps of each step of any training: not how long it took, which no rerun could repeat."""

Beside = Callable[[Artifact, Path], AbstractContextManager[None]]
"""What goes on while training does, given the artifact and the folder of its checkpoints."""

Looks = Callable[[str], Sequence[Mapping[str, Any]]]
"""From the artifact's id, what looks beside training have found so far."""


def train_model(
    config: Config,
    artifact: Artifact,
    recipe: Recipe,
    *,
    groups: Artifact,
    num_groups: int,
    base: Asset,
    shard: int,
    file: str,
    steps_schema: pa.Schema,
    counts: Counts,
    beside: Beside | None = None,
    looks: Looks | None = None,
    allow_restart: bool = False,
) -> dict[str, Any]:
    """Trains and writes one shard of the artifact: the model as ``files/{file}`` and the table `steps`.

    Continues from the newest valid checkpoint in the artifact's ``work/`` folder, which must be on storage that all
    workers reach. On SIGTERM or Ctrl-C the workers end the step at hand and write a checkpoint first; when SIGTERM
    comes to a worker, others then take its place. A shard that is written is not trained again.

    Args:
        config: the run's.
        artifact: to be made; the caller commits it.
        recipe: what is trained, and how.
        groups: the artifact whose table `groups` is trained on; its shards are written, it need not be committed.
        num_groups: shards of that table.
        base: the model to start from.
        shard: number of the shard to write.
        file: name of the model there.
        steps_schema: of the table `steps`.
        counts: of the shard.
        beside: see Beside.
        looks: see Looks; trackers show them.
        allow_restart: train anew where there are checkpoints but none is valid.

    Returns:
        What the manifest says: the number of steps and their speed.

    Raises:
        DataError: training diverged, there is nothing to train on, or none of the checkpoints is valid.
        ResourceError: the cluster cannot place the workers, or they kept dying.
    """
    runtime, name, num_steps = config.runtime, artifact.spec.stage, recipe.train.num_steps
    work = work_folder(artifact)
    work.mkdir(parents=True, exist_ok=True)
    if num_steps < 1:
        raise ConfigError(f"{name}: num_steps is 0, so there is nothing to train.")
    if shard not in artifact.ledger():
        cluster.require(runtime.train_workers, runtime.train_workers if runtime.train_gpus else 0, name)
        last = checkpoint.newest(work, allow_restart=allow_restart)
        if last is not None:
            print(f"{name}: goes on from step {last.step}", file=sys.stderr, flush=True)
        checkpoint.keep_steps(work, last.step if last else 0)
        folders = data_folders(artifact, num_groups)
        tokenize(groups, folders, recipe, base, runtime, name)
        run = config.name if name == "train" else f"{config.name}-{name}"
        folder = Path(runtime.run_root) / config.name / ("" if name == "train" else name)
        found = partial(looks, artifact.id) if looks else tuple
        told = tracked(runtime.trackers, work, folder=folder, run=run, run_id=artifact.id, looks=found)
        other = beside(artifact, work) if beside else nullcontext()
        with train_progress(name, work, num_steps), told, other:
            last = fit(recipe, runtime, name=name, data=folders, base=base.path, work=work, last=last)
        steps = _steps(work, last, num_steps)
        assert last is not None
        target = artifact.file(file)
        with staged(target) as temporary:
            shutil.copytree(last.model, temporary)
        files = tuple(str(path.relative_to(artifact.path)) for path in sorted(target.rglob("*")) if path.is_file())
        table = pa.Table.from_pylist(steps, schema=steps_schema)
        artifact.write_shard(shard, {"steps": table}, counts, files=files)
    measured = work / SPEED_FILE
    speed = summary(checkpoint.read_steps(work), **json.loads(measured.read_text())) if measured.exists() else None
    return {"steps": artifact.ledger()[shard]["rows"]["steps"], "speed": speed}


def work_folder(artifact: Artifact) -> Path:
    """Holds what training needs until the artifact is committed."""
    return (artifact.path / "work").resolve()


def data_folders(artifact: Artifact, num_groups: int) -> list[Path]:
    """Where the tokens of each shard of the groups belong, until training has ended."""
    return [work_folder(artifact) / "data" / f"{shard:05d}" for shard in range(num_groups)]


def tokenize(
    groups: Artifact, folders: list[Path], recipe: Recipe, base: Asset, runtime: RuntimeConfig, name: str
) -> None:
    """Tokenises the shards of the groups that are not tokenised yet, each into its folder.

    Tokenising is part of encoding and takes the actors and threads that encoding has, but no GPU.
    """
    cluster.map_shards(
        [shard for shard, folder in enumerate(folders) if not folder.exists()],
        TokenizeWorker,
        {"groups": groups, "folders": folders, "base": base.path, "recipe": recipe},
        num_actors=runtime.encode_actors,
        num_threads=runtime.encode_threads,
        purpose=f"{name}: tokenize",
    )


class TokenizeWorker:
    """Tokenises shards of the groups."""

    def __init__(self, groups: Artifact, folders: list[Path], base: Path, recipe: Recipe) -> None:
        self.groups, self.folders, self.write = groups, folders, recipe.writer(base)

    def run(self, shard: int) -> dict[str, Any]:
        """Tokenises one shard; returns its record."""
        self.write(self.groups.part("groups", shard), self.folders[shard])
        return {"shard": shard}


def _steps(work: Path, last: checkpoint.Checkpoint | None, num_steps: int) -> list[dict[str, Any]]:
    """The records of all steps; DataError when training ended before the last."""
    steps = checkpoint.read_steps(work)
    if last is None or last.step != num_steps or [record["step"] for record in steps] != list(range(num_steps)):
        raise DataError(
            f"training ended, but {work} holds step {last.step if last else None} of {num_steps} and {len(steps)} step "
            "records. Run again: it continues from the newest valid checkpoint."
        )
    return steps
