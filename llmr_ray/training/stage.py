"""The stages group and train.

group: joins candidates, gold documents and rewards into one row per training query, and says of every query left out
why. train: the embedder, from the groups (running.py).
"""

import shutil
import time
from collections import Counter
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from llmr_ray.artifacts import SHARD_ROWS, Artifact, ArtifactSpec, Counts
from llmr_ray.assets import Asset
from llmr_ray.config import Config, TaskConfig, identity, later_identity, question_tasks, training_seed
from llmr_ray.data.example_labels import classifications
from llmr_ray.errors import ConfigError
from llmr_ray.precision import training_precision
from llmr_ray.training import running
from llmr_ray.training.bi_encoder import EmbedderRecipe, instructions_of
from llmr_ray.training.groups import SAME_LABEL
from llmr_ray.training.pools import group_row, join_pools, named_documents, quotes, write_groups

GROUP_VERSION = 4
TRAIN_VERSION = 5

GRADED_VERSION = 2
"""Of what graded labels teach: part of a trained embedder's id where a task learns from them, and nowhere else."""

STEPS_SCHEMA = pa.schema([*running.STEP_FIELDS, ("num_false_negatives", pa.int64()), ("uniformity", pa.float64())])
"""What the artifact keeps of each step."""


def training_tasks(config: Config) -> dict[str, TaskConfig]:
    """The tasks of the data sets that have training queries, given or generated.

    Raises:
        ConfigError: a task has no loss, or asks for rewards without feedback that would make them.
    """
    given = {dataset.task for dataset in config.datasets.values() if dataset.num_train}
    names = sorted(given | question_tasks(config).keys())
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
        name: {
            "feedback": task.score.feedback,
            "positive": task.train.positive,
            "top_positives": task.train.top_positives,
            "group": identity(task.group),
        }
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
    names at its end. Where a task has LLM feedback, documents without a reward are left out. Their number, and that of
    the documents that are no negatives because they have the query's label, are in the manifest.
    """
    started = time.monotonic()
    tasks = training_tasks(config)
    columns = ["query_id", "task", "dataset", "query", "split", "options", "gold_option"]
    queries = prepare.read("queries").select(columns)
    queries = queries.filter(pc.equal(queries["split"], "train"))
    qrels, mined = prepare.read("qrels"), candidates.read("candidates")
    documents = named_documents(prepare, qrels, mined, ["title", "text", "meta"])
    rewarded = rewards.read("rewards")
    pools = join_pools(qrels, mined, rewarded, documents)
    quoted = quotes(rewarded) if any(task.group.evidence_weight for task in tasks.values()) else {}
    labelled = classifications(queries)
    seen = Counter[str]()

    def row_of(query: dict[str, Any]) -> dict[str, Any] | str:
        row, without = group_row(
            query,
            tasks.get(query["task"]),
            pools.get(query["query_id"]),
            documents,
            is_classification=query["dataset"] in labelled,
            quoted=quoted,
        )
        seen["documents_without_reward"] += without
        if not isinstance(row, str):
            seen["documents_of_the_same_label"] += row["roles"].count(SAME_LABEL)
        return row

    num_shards = write_groups(artifact, queries, row_of)
    artifact.commit(num_shards, seconds=time.monotonic() - started, extra=dict(seen))


# --- train -----------------------------------------------------------------------------------------------------------


def train_spec(config: Config, groups: Artifact, base: Asset) -> ArtifactSpec:
    """What determines the trained embedder. The number of workers does not: the global batch is fixed."""
    train = identity(config.train)
    del train["checkpoint_interval"]
    # One number, wherever it is said.
    train.pop("seed", None)
    tasks = training_tasks(config)
    is_graded = any(task.train.has_graded_labels for task in tasks.values())
    return ArtifactSpec(
        stage="train",
        version=TRAIN_VERSION,
        config={
            "seed": training_seed(config, config.train),
            "train": train,
            "pooling": config.embedder.pooling,
            "max_query_tokens": config.embedder.max_query_tokens,
            "max_document_tokens": config.embedder.max_document_tokens,
            "precision": training_precision(config.embedder.precision),
            **later_identity(config.embedder),
            "tasks": {name: identity(task.train) for name, task in tasks.items()},
            **({"graded_version": GRADED_VERSION} if is_graded else {}),
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
    beside: running.Beside | None = None,
    looks: running.Looks | None = None,
    allow_restart: bool = False,
) -> None:
    """Trains and commits ``files/embedder`` and the table `steps`, see running.train_model.

    Deletes the artifact's ``work/`` folder once it is committed.

    Args:
        config: the run's.
        artifact: to be made.
        groups: the artifact to train on.
        base: the model to start from.
        beside: what goes on while training does.
        looks: what such looks have found so far.
        allow_restart: train anew where there are checkpoints but none is valid.

    Raises:
        DataError: training diverged, there is nothing to train on, or none of the checkpoints is valid.
        ResourceError: the cluster cannot place the workers, or they kept dying.
    """
    started = time.monotonic()
    manifest = groups.require()
    num_rows = manifest["rows"].get("groups", 0)
    extra = running.train_model(
        config,
        artifact,
        embedder_recipe(config),
        groups=groups,
        num_groups=manifest["num_shards"],
        base=base,
        shard=0,
        file="embedder",
        steps_schema=STEPS_SCHEMA,
        counts=Counts(rows_in=num_rows, ok=num_rows),
        beside=beside,
        looks=looks,
        allow_restart=allow_restart,
    )
    artifact.commit(1, seconds=time.monotonic() - started, extra=extra)
    shutil.rmtree(running.work_folder(artifact))


def embedder_recipe(config: Config) -> EmbedderRecipe:
    """How the embedder is trained."""
    tasks = training_tasks(config)
    return EmbedderRecipe(
        train=config.train,
        seed=training_seed(config, config.train),
        tasks={name: task.train for name, task in tasks.items()},
        instructions=instructions_of(tasks),
        pooling=config.embedder.pooling,
        similarity=config.embedder.similarity,
        pool_instruction=config.embedder.pool_instruction,
        max_query_tokens=config.embedder.max_query_tokens,
        max_document_tokens=config.embedder.max_document_tokens,
        # Of the driver: the workers of a cluster must not differ.
        precision=training_precision(config.embedder.precision),
        prompts=saved_prompts(config),
    )
