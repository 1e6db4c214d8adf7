"""The stages group and train.

group: joins candidates, gold documents and rewards into one row per training query, and says of every query left out
why. train: the groups are tokenised shard by shard by a pool of actors, then data-parallel training under Ray Train,
which replaces workers that die; what they resume from are our own verified checkpoints, in a folder that all workers
reach. A driver or worker that is told to stop leaves a checkpoint.
"""

import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from llmr_ray import cluster
from llmr_ray.artifacts import SHARD_ROWS, Artifact, ArtifactSpec, Counts
from llmr_ray.assets import Asset
from llmr_ray.config import Config, TaskConfig, identity
from llmr_ray.durable import staged
from llmr_ray.errors import ConfigError, DataError
from llmr_ray.precision import resolve_precision
from llmr_ray.schemas import table_of
from llmr_ray.training import checkpoint
from llmr_ray.training.dataset import write_shard
from llmr_ray.training.fit import SPEED_FILE, fit
from llmr_ray.training.pools import group_row, join_pools
from llmr_ray.training.progress import train_progress
from llmr_ray.training.speed import summary
from llmr_ray.training.trackers import tracked

GROUP_VERSION = 2
TRAIN_VERSION = 4

STEPS_SCHEMA = pa.schema(
    [
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
        ("num_false_negatives", pa.int64()),
        ("uniformity", pa.float64()),
    ]
)
"""What the artifact keeps of each step: not how long it took, which no rerun could repeat."""


def training_tasks(config: Config) -> dict[str, TaskConfig]:
    """The tasks of the data sets that train.

    Raises:
        ConfigError: a task has no loss, or asks for rewards without feedback that would make them.
    """
    names = sorted({dataset.task for dataset in config.datasets.values() if dataset.num_train})
    for name in names:
        task = config.tasks[name]
        if not task.train.has_loss:
            raise ConfigError(f"task '{name}' has training data but no loss. Set one of its weights in `train`.")
        if task.score.feedback == "none" and task.train.learns_from_rewards:
            raise ConfigError(
                f"task '{name}' trains on rewards (a loss of them, a teacher positive or negatives by reward), but its "
                "score.feedback is none. Set feedback, or train it with contrastive_weight alone."
            )
    return {name: config.tasks[name] for name in names}


# --- group -----------------------------------------------------------------------------------------------------------


def group_spec(config: Config, prepare: Artifact, candidates: Artifact, rewards: Artifact) -> ArtifactSpec:
    """What determines the groups: the inputs, which tasks need rewards or gold documents, and the filters."""
    tasks = {
        name: {"feedback": task.score.feedback, "positive": task.train.positive, "group": identity(task.group)}
        for name, task in training_tasks(config).items()
    }
    return ArtifactSpec(
        stage="group",
        version=GROUP_VERSION,
        config={"tasks": tasks, "shard_rows": SHARD_ROWS},
        inputs={"prepare": prepare.id, "candidates": candidates.id, "rewards": rewards.id},
    )


def run_group(config: Config, artifact: Artifact, prepare: Artifact, candidates: Artifact, rewards: Artifact) -> None:
    """Makes the groups of all training queries.

    A row of the result holds a query's whole pool in the order of the candidates, gold documents that no candidate
    names at its end. Where a task has LLM feedback, documents without a reward are left out (counted in the manifest).
    """
    started = time.monotonic()
    tasks = training_tasks(config)
    queries = prepare.read("queries").select(["query_id", "task", "dataset", "query", "split"])
    queries = queries.filter(pc.equal(queries["split"], "train"))
    corpus = prepare.read("corpus").select(["doc_id", "title", "text"]).combine_chunks()
    pools = join_pools(prepare.read("qrels"), candidates.read("candidates"), rewards.read("rewards"), corpus)
    num_shards = max(1, -(-queries.num_rows // SHARD_ROWS))
    unrewarded = 0
    for shard in range(num_shards):
        part = queries.slice(shard * SHARD_ROWS, SHARD_ROWS)
        rows, skipped = [], Counter[str]()
        for query in part.to_pylist():
            task = tasks.get(query["task"])
            group, without = group_row(query, task, pools.get(query["query_id"]), corpus)
            unrewarded += without
            if isinstance(group, str):
                skipped[group] += 1
            else:
                rows.append(group)
        if shard in artifact.ledger():
            continue
        artifact.write_shard(
            shard,
            {"groups": table_of("groups", rows)},
            Counts(rows_in=part.num_rows, ok=len(rows), skipped=skipped),
        )
    artifact.commit(num_shards, seconds=time.monotonic() - started, extra={"documents_without_reward": unrewarded})


# --- train -----------------------------------------------------------------------------------------------------------


def train_spec(config: Config, groups: Artifact, base: Asset) -> ArtifactSpec:
    """What determines the trained embedder. The number of workers does not: the global batch is fixed."""
    train = identity(config.train)
    del train["checkpoint_interval"]
    return ArtifactSpec(
        stage="train",
        version=TRAIN_VERSION,
        config={
            "seed": config.seed,
            "train": train,
            "pooling": config.embedder.pooling,
            "max_query_tokens": config.embedder.max_query_tokens,
            "max_document_tokens": config.embedder.max_document_tokens,
            "precision": resolve_precision(config.embedder.precision),
            "tasks": {name: identity(task.train) for name, task in training_tasks(config).items()},
            "prompts": saved_prompts(config),
        },
        inputs={"groups": groups.id, "base": base.fingerprint},
    )


def saved_prompts(config: Config) -> dict[str, str]:
    """Prompt names of a saved embedder: ``{task}-query`` and ``{task}-document``; "query" and "document" are qa's."""
    prompts = {}
    for name, task in sorted(config.tasks.items()):
        prompts[f"{name}-query"], prompts[f"{name}-document"] = task.query_instruction, task.document_instruction
    if "qa" in config.tasks:
        prompts["query"], prompts["document"] = prompts["qa-query"], prompts["qa-document"]
    return prompts


def run_train(
    config: Config,
    artifact: Artifact,
    groups: Artifact,
    base: Asset,
    *,
    beside: Callable[[Artifact, Path], AbstractContextManager[None]] | None = None,
    looks: Callable[[str], Sequence[Mapping[str, Any]]] | None = None,
    allow_restart: bool = False,
) -> None:
    """Trains and commits ``files/embedder`` and the table `steps`.

    Continues from the newest valid checkpoint in the artifact's ``work/`` folder, which must be on storage that all
    workers reach. Deletes that folder once the artifact is committed. On SIGTERM or Ctrl-C the workers end the step at
    hand and write a checkpoint first; when SIGTERM comes to a worker, others then take their place.

    Args:
        config: the run's.
        artifact: to be made.
        groups: the artifact to train on.
        base: the model to start from.
        beside: what goes on while training does, given the artifact and the folder of its checkpoints.
        looks: from the artifact's id, what looks beside training have found so far; trackers show it.
        allow_restart: train anew where there are checkpoints but none is valid.

    Raises:
        DataError: training diverged, there is nothing to train on, or none of the checkpoints is valid.
        ResourceError: the cluster cannot place the workers, or they kept dying.
    """
    started = time.monotonic()
    runtime, work = config.runtime, (artifact.path / "work").resolve()
    work.mkdir(parents=True, exist_ok=True)
    if config.train.num_steps < 1:
        raise ConfigError("train.num_steps is 0: there is nothing to train.")
    if 0 not in artifact.ledger():
        cluster.require(runtime.train_workers, runtime.train_workers if runtime.train_gpus else 0, "train")
        last = checkpoint.newest(work, allow_restart=allow_restart)
        if last is not None:
            print(f"train: goes on from step {last.step}", file=sys.stderr, flush=True)
        checkpoint.keep_steps(work, last.step if last else 0)
        tokenize_groups(config, artifact, groups, base)
        told = tracked(
            runtime.trackers,
            work,
            folder=Path(runtime.run_root) / config.name,
            run=config.name,
            run_id=artifact.id,
            looks=partial(looks, artifact.id) if looks else tuple,
        )
        other = beside(artifact, work) if beside else nullcontext()
        with train_progress(work, config.train.num_steps), told, other:
            last = fit(
                config,
                artifact.spec.config,
                tasks=training_tasks(config),
                data=data_folders(artifact, groups),
                base=base.path,
                work=work,
                last=last,
            )
        _publish(artifact, work, last, config.train.num_steps, groups.require()["rows"].get("groups", 0))
    steps = artifact.ledger()[0]["rows"]["steps"]
    measured = work / SPEED_FILE
    speed = summary(checkpoint.read_steps(work), **json.loads(measured.read_text())) if measured.exists() else None
    artifact.commit(1, seconds=time.monotonic() - started, extra={"steps": steps, "speed": speed})
    shutil.rmtree(work)


def data_folders(artifact: Artifact, groups: Artifact) -> list[Path]:
    """Where the tokens of each shard of the groups belong, until training has ended."""
    work = (artifact.path / "work").resolve()
    return [work / "data" / f"{shard:05d}" for shard in range(groups.require()["num_shards"])]


def tokenize_groups(config: Config, artifact: Artifact, groups: Artifact, base: Asset) -> None:
    """Tokenises the shards of the groups that are not tokenised yet, each into its folder.

    Tokenising is part of encoding and takes the actors and threads that encoding has, but no GPU.
    """
    folders = data_folders(artifact, groups)
    cluster.map_shards(
        [shard for shard, folder in enumerate(folders) if not folder.exists()],
        TokenizeWorker,
        {
            "groups": groups,
            "folders": folders,
            "base_path": str(base.path),
            "tasks": training_tasks(config),
            "max_query_tokens": config.embedder.max_query_tokens,
            "max_document_tokens": config.embedder.max_document_tokens,
        },
        num_actors=config.runtime.encode_actors,
        num_threads=config.runtime.encode_threads,
        purpose="train: tokenize",
    )


class TokenizeWorker:
    """Tokenises shards of the groups."""

    def __init__(
        self,
        groups: Artifact,
        folders: list[Path],
        base_path: str,
        tasks: dict[str, TaskConfig],
        max_query_tokens: int,
        max_document_tokens: int,
    ) -> None:
        from llmr_ray.modeling.embedder import Embedder

        self.groups, self.folders = groups, folders
        self.max_query_tokens, self.max_document_tokens = max_query_tokens, max_document_tokens
        self.instructions = {name: (task.query_instruction, task.document_instruction) for name, task in tasks.items()}
        # On the device "meta" a model has no weights: the tokenizer is all that is wanted.
        self.embedder = Embedder(
            base_path, max_query_tokens=max_query_tokens, max_document_tokens=max_document_tokens, device="meta"
        )

    def run(self, shard: int) -> dict[str, Any]:
        """Tokenises one shard; returns its record."""
        write_shard(
            self.groups.read("groups", shard),
            self.folders[shard],
            tokenize=lambda texts, instruction, limit: self.embedder.tokenize(
                texts, instruction=instruction, max_tokens=limit
            ),
            instructions=self.instructions,
            max_query_tokens=self.max_query_tokens,
            max_document_tokens=self.max_document_tokens,
        )
        return {"shard": shard}


def _publish(
    artifact: Artifact, work: Path, last: checkpoint.Checkpoint | None, num_steps: int, num_groups: int
) -> None:
    """Moves the last checkpoint's embedder into place and writes the shard that names it."""
    steps = checkpoint.read_steps(work)
    if last is None or last.step != num_steps or [record["step"] for record in steps] != list(range(num_steps)):
        raise DataError(
            f"training ended, but {work} holds step {last.step if last else None} of {num_steps} and {len(steps)} step "
            "records. Run again: it continues from the newest valid checkpoint."
        )
    target = artifact.file("embedder")
    with staged(target) as temporary:
        shutil.copytree(last.embedder, temporary)
    files = tuple(str(path.relative_to(artifact.path)) for path in sorted(target.rglob("*")) if path.is_file())
    table = pa.Table.from_pylist(steps, schema=STEPS_SCHEMA)
    artifact.write_shard(0, {"steps": table}, Counts(rows_in=num_groups, ok=num_groups), files=files)
