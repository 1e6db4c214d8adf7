"""The stages reward_model and teach (LLM-R, methods.md B.6 and B.7).

reward_model: a cross-encoder learns from the rewards of the LLM which candidates of a query it likes. teach: it scores
every candidate, and its logits are the rewards that the embedder learns from. It reads the desired output, which no
retriever knows, so it can be nothing but a teacher.
"""

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from llmr_ray import cluster
from llmr_ray.artifacts import SHARD_ROWS, Artifact, ArtifactSpec, Counts
from llmr_ray.assets import Asset
from llmr_ray.config import Config, RewardModelConfig, TaskScore, identity, training_seed
from llmr_ray.errors import DataError
from llmr_ray.feedback.jobs import feedback_tasks
from llmr_ray.feedback.prompts import candidate_text
from llmr_ray.precision import resolve_precision
from llmr_ray.schemas import table_of
from llmr_ray.training import running
from llmr_ray.training.cross_encoder import CrossEncoderRecipe
from llmr_ray.training.pairs import is_held_out, learned_little, left_text, pair_row
from llmr_ray.training.pools import join_pools, named_documents, write_groups

REWARD_MODEL_VERSION = 1
TEACH_VERSION = 2

FILE = "reward_model"
"""The model's folder below the artifact's files."""

STEPS_SCHEMA = pa.schema([*running.STEP_FIELDS, ("accuracy", pa.float64())])
"""What the artifact keeps of each step."""

# --- reward_model ----------------------------------------------------------------------------------------------------


def reward_model_spec(
    config: Config, *, prepare: Artifact, candidates: Artifact, rewards: Artifact, base: Asset
) -> ArtifactSpec:
    """What determines the reward model. The number of workers does not: the global batch is fixed."""
    settings = identity(config.reward_model)
    del settings["model"], settings["train"]["checkpoint_interval"]
    if settings["train"].get("seed") == config.seed:
        del settings["train"]["seed"]
    return ArtifactSpec(
        stage="reward_model",
        version=REWARD_MODEL_VERSION,
        config={
            "seed": config.seed,
            **settings,
            "precision": resolve_precision(config.reward_model.precision),
            "tasks": sorted(feedback_tasks(config)),
            "shard_rows": SHARD_ROWS,
        },
        inputs={
            "prepare": prepare.id,
            "candidates": candidates.id,
            "rewards": rewards.id,
            "base": base.fingerprint,
        },
    )


def run_reward_model(
    config: Config,
    artifact: Artifact,
    *,
    prepare: Artifact,
    candidates: Artifact,
    rewards: Artifact,
    base: Asset,
    allow_restart: bool = False,
) -> None:
    """Trains and commits ``files/reward_model``, and the tables `groups` (of pairs) and `steps`.

    It learns from the training queries of tasks with LLM feedback. If it has learned next to nothing, the manifest's
    `warnings` say so. Every other query is counted with its reason:
    "task_without_feedback", "held_out", "no_candidates", "no_target" (no desired output to read), "no_rewards",
    or one of groups.reject_reason. Training goes as in running.train_model; the artifact's ``work/`` folder is deleted
    once it is committed.

    Args:
        config: the run's.
        artifact: to be made.
        prepare, candidates, rewards: finished artifacts; the rewards are those of the LLM.
        base: the encoder to start from.
        allow_restart: train anew where there are checkpoints but none is valid.

    Raises:
        DataError: training diverged, there is nothing to train on, or none of the checkpoints is valid.
        ResourceError: the cluster cannot place the workers, or they kept dying.
    """
    started = time.monotonic()
    settings, tasks = config.reward_model, feedback_tasks(config)
    queries = prepare.read("queries").select(["query_id", "task", "dataset", "query", "targets", "split", "split_key"])
    queries = queries.filter(pc.equal(queries["split"], "train"))
    qrels, mined = prepare.read("qrels"), candidates.read("candidates")
    documents = named_documents(prepare, qrels, mined, ["title", "text", "continuation"])
    pools = join_pools(qrels, mined, rewards.read("rewards"), documents)

    def row_of(query: dict[str, Any]) -> dict[str, Any] | str:
        if query["task"] not in tasks:
            return "task_without_feedback"
        if is_held_out(query, settings.held_out_fraction):
            return "held_out"
        score = config.tasks[query["task"]].score
        left = left_text(query, score, sees_target=settings.sees_target, seed=config.seed)
        return pair_row(query, left, pools.get(query["query_id"]), documents, top_positives=settings.top_positives)

    num_groups = write_groups(artifact, queries, row_of)
    extra = running.train_model(
        config,
        artifact,
        reward_model_recipe(config),
        groups=artifact,
        num_groups=num_groups,
        base=base,
        shard=num_groups,
        file=FILE,
        steps_schema=STEPS_SCHEMA,
        counts=Counts(),
        allow_restart=allow_restart,
    )
    steps = artifact.part("steps", num_groups)
    warning = learned_little(steps["loss"].to_pylist(), steps["accuracy"].to_pylist())
    extra["warnings"] = [warning] if warning else []
    artifact.commit(num_groups + 1, seconds=time.monotonic() - started, extra=extra)
    shutil.rmtree(running.work_folder(artifact))


def reward_model_recipe(config: Config) -> CrossEncoderRecipe:
    """How the reward model is trained."""
    settings = config.reward_model
    return CrossEncoderRecipe(
        train=settings.train,
        seed=training_seed(config, settings.train),
        max_tokens=settings.max_tokens,
        # Of the driver: the workers of a cluster must not differ.
        precision=resolve_precision(settings.precision),
        top_positives=settings.top_positives,
        bottom_negatives=settings.bottom_negatives,
    )


# --- teach -----------------------------------------------------------------------------------------------------------


def teach_spec(config: Config, *, prepare: Artifact, candidates: Artifact, reward_model: Artifact) -> ArtifactSpec:
    """What determines the reward model's rewards: the model, what it reads, and the pairs."""
    settings = config.reward_model
    return ArtifactSpec(
        stage="teach",
        version=TEACH_VERSION,
        config={
            "seed": config.seed,
            "sees_target": settings.sees_target,
            "max_tokens": settings.max_tokens,
            "precision": resolve_precision(settings.precision),
            "tasks": sorted(feedback_tasks(config)),
        },
        inputs={"prepare": prepare.id, "candidates": candidates.id, "reward_model": reward_model.id},
    )


def run_teach(
    config: Config, artifact: Artifact, *, prepare: Artifact, candidates: Artifact, reward_model: Artifact
) -> None:
    """Scores all candidates of tasks with LLM feedback: table `rewards`, whose source is "reward_model".

    The rewards are raw logits: also of what the LLM was not asked about or failed at, and of held-out queries. A gold
    document that is no candidate gets none, as it gets none from the LLM, and the stage group leaves it out.
    Candidates of other tasks, or of queries without a desired output where it is read, are counted with their reason.

    Raises:
        DataError: a candidate's query or document does not exist.
    """
    started = time.monotonic()
    num_shards = candidates.require()["num_shards"]
    cluster.map_shards(
        artifact.pending(num_shards),
        TeachWorker,
        {
            "artifact": artifact,
            "prepare": prepare,
            "candidates": candidates,
            "model": reward_model.file(FILE),
            "tasks": feedback_tasks(config),
            "settings": config.reward_model,
            "seed": config.seed,
            "batch_tokens": config.runtime.encode_batch_tokens,
        },
        num_actors=config.runtime.encode_actors,
        num_threads=config.runtime.encode_threads,
        num_gpus=config.runtime.encode_gpus,
        purpose="teach",
    )
    artifact.commit(num_shards, seconds=time.monotonic() - started)


class TeachWorker:
    """Scores shards of the candidates."""

    def __init__(
        self,
        artifact: Artifact,
        prepare: Artifact,
        candidates: Artifact,
        model: Path,
        tasks: dict[str, TaskScore],
        settings: RewardModelConfig,
        seed: int,
        batch_tokens: int,
    ) -> None:
        from llmr_ray.modeling.cross_encoder import CrossEncoder

        self.artifact, self.candidates, self.tasks, self.settings = artifact, candidates, tasks, settings
        self.seed, self.batch_tokens = seed, batch_tokens
        self.queries = prepare.read("queries").select(["query_id", "task", "query", "targets"])
        named = candidates.read("candidates", columns=["doc_id"])["doc_id"].unique().to_pylist()
        columns = ["doc_id", "title", "text", "continuation"]
        self.documents = prepare.read("corpus", columns=columns, ids=named)
        self.model = CrossEncoder(
            model, max_tokens=settings.max_tokens, precision=str(artifact.spec.config["precision"])
        )

    def run(self, shard: int) -> dict[str, Any]:
        """Scores one shard and commits it; returns its ledger record."""
        pairs = self.candidates.read("candidates", shard).select(["query_id", "doc_id"]).to_pylist()
        queries = _by_id(self.queries, "query_id", {pair["query_id"] for pair in pairs})
        documents = _by_id(self.documents, "doc_id", {pair["doc_id"] for pair in pairs})
        lefts = {
            query_id: left_text(query, self.tasks[query["task"]], sees_target=self.settings.sees_target, seed=self.seed)
            for query_id, query in queries.items()
            if query["task"] in self.tasks
        }
        counts = Counts(rows_in=len(pairs))
        asked: list[dict[str, Any]] = []
        texts: list[tuple[str, str]] = []
        for pair in pairs:
            task, left = queries[pair["query_id"]]["task"], lefts.get(pair["query_id"])
            if task not in self.tasks:
                counts.skipped["task_without_feedback"] += 1
            elif left is None:
                counts.skipped["no_target"] += 1
            else:
                asked.append(pair)
                texts.append((left, candidate_text(task, documents[pair["doc_id"]])))
        counts.ok = len(asked)
        rows = [
            {**pair, "reward": float(reward), "reward_source": "reward_model"}
            for pair, reward in zip(asked, self._score(texts), strict=True)
        ]
        return self.artifact.write_shard(shard, {"rewards": table_of("rewards", rows)}, counts)

    def _score(self, texts: list[tuple[str, str]]) -> np.ndarray:
        """Logits of pairs of texts, each text tokenised once: float32 [n]."""
        distinct = list(dict.fromkeys(text for pair in texts for text in pair))
        tokens = dict(zip(distinct, map(np.asarray, self.model.tokenize(distinct)), strict=True))
        pairs = [self.model.template.pair(tokens[left], tokens[right]) for left, right in texts]
        return self.model.score(pairs, self.batch_tokens)


def _by_id(table: pa.Table, key: str, ids: set[str]) -> Mapping[str, dict[str, Any]]:
    """Some rows of a table by their id."""
    chosen = table.filter(pc.is_in(table[key], value_set=pa.array(sorted(ids), pa.string())))
    rows = {row[key]: row for row in chosen.to_pylist()}
    if lost := sorted(ids - rows.keys()):
        raise DataError(f"candidates name a {key} that does not exist: {lost[:3]}. Mine again from this data.")
    return rows
