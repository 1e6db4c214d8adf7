"""The stages score (LLM feedback on candidates) and reward."""

import time
from collections import Counter
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from llmr_ray.artifacts import Artifact, ArtifactSpec, Counts
from llmr_ray.assets import Asset
from llmr_ray.config import Config, identity
from llmr_ray.errors import DataError
from llmr_ray.feedback.engine import asked_identity
from llmr_ray.feedback.jobs import GIVEN, SHARD_QUERIES, ScoreJobs, feedback_tasks, given_tasks
from llmr_ray.feedback.labels import LABELS_VERSION
from llmr_ray.feedback.prompts import PROMPTS_VERSION
from llmr_ray.feedback.requests import LLMClient
from llmr_ray.feedback.rewards import given_rewards, reward_rows
from llmr_ray.feedback.scoring import ask_jobs, score_rows
from llmr_ray.schemas import table_of

SCORE_VERSION = 1
REWARD_VERSION = 1

# --- score -----------------------------------------------------------------------------------------------------------


def score_spec(config: Config, llm: Asset, prepare: Artifact, candidates: Artifact) -> ArtifactSpec:
    """What determines llm_scores: the LLM and how it reads, the prompts, the tasks' feedback, data and seed."""
    tasks = feedback_tasks(config)
    labels = {"labels_version": LABELS_VERSION} if any(task.feedback == "label" for task in tasks.values()) else {}
    return ArtifactSpec(
        stage="score",
        version=SCORE_VERSION,
        config={
            **asked_identity(llm.fingerprint, config.llm),
            "tasks": {task: identity(settings) for task, settings in tasks.items()},
            "prompts_version": PROMPTS_VERSION,
            "seed": config.seed,
            "shard_queries": SHARD_QUERIES,
            **labels,
        },
        inputs={"llm": llm.fingerprint, "prepare": prepare.id, "candidates": candidates.id},
    )


def run_score(
    config: Config,
    artifact: Artifact,
    client: LLMClient,
    prepare: Artifact,
    candidates: Artifact,
    *,
    table: str = "candidates",
) -> None:
    """Asks the LLM about the candidates of the tasks with feedback, and writes llm_scores.

    One row per (query, document, kind), failed ones with their error. rows_in counts pairs. A finished shard is not
    asked again, and of an unfinished one only what the store lacks.
    """
    started = time.monotonic()
    work = score_jobs(config, prepare, candidates, table)
    for shard in artifact.pending(work.num_shards):
        label = f"score {shard + 1}/{work.num_shards}"
        jobs = work.of_shard(shard)
        samples, scores = ask_jobs(client, jobs, label)
        rows: list[dict[str, object]] = []
        counts = Counts()
        if shard == 0 and work.num_not_drawn:
            counts += Counts(rows_in=work.num_not_drawn, skipped=Counter(not_drawn=work.num_not_drawn))
        for job in jobs:
            of_job, fate = score_rows(job, client.scorer_id, samples[job.query_id], scores[job.query_id])
            rows.extend(of_job)
            counts += fate
        artifact.write_shard(shard, {"llm_scores": table_of("llm_scores", rows)}, counts)
    artifact.commit(work.num_shards, seconds=time.monotonic() - started, extra={"scorer_id": client.scorer_id})


def score_jobs(config: Config, prepare: Artifact, candidates: Artifact, table: str = "candidates") -> ScoreJobs:
    """The pairs to judge, from finished artifacts; `table` of the candidates' artifact holds them."""
    pairs = candidates.read(table)
    documents = prepare.read("corpus", ids=pairs["doc_id"].unique().to_pylist())
    return ScoreJobs(config, prepare.read("queries"), documents, pairs)


# --- reward ----------------------------------------------------------------------------------------------------------


def reward_spec(config: Config, prepare: Artifact, llm_scores: Artifact) -> ArtifactSpec:
    """What determines rewards: the scores, and which kind of them each task uses."""
    return ArtifactSpec(
        stage="reward",
        version=REWARD_VERSION,
        config={
            "kinds": {task: settings.feedback for task, settings in feedback_tasks(config).items()},
            **({"given": given} if (given := given_tasks(config)) else {}),
            **({"evidence": True} if any(task.group.evidence_weight for task in config.tasks.values()) else {}),
        },
        inputs={"prepare": prepare.id, "llm_scores": llm_scores.id},
    )


def run_reward(config: Config, artifact: Artifact, prepare: Artifact, llm_scores: Artifact) -> None:
    """Writes rewards, shard by shard of llm_scores (a query's rows are all in one), and then one shard of those that
    came with the data. rows_in counts rows of llm_scores and of given_rewards.

    Raises:
        DataError: a task's rewards are said to come with the data, and there are none.
    """
    started = time.monotonic()
    kinds = {task: settings.feedback for task, settings in feedback_tasks(config).items()}
    queries = prepare.read("queries")
    kind_of = {
        query_id: kinds[task]
        for query_id, task in zip(queries["query_id"].to_pylist(), queries["task"].to_pylist(), strict=True)
        if task in kinds
    }
    scored_shards = llm_scores.require()["num_shards"]
    given = given_tasks(config)
    num_shards = scored_shards + bool(given)
    for shard in artifact.pending(num_shards):
        if shard < scored_shards:
            rows, counts = reward_rows(llm_scores.read("llm_scores", shard).to_pylist(), kind_of)
            rewards = table_of("rewards", rows)
        else:
            rewards, counts = given_rewards(_given_rewards(prepare, queries, given), GIVEN)
        artifact.write_shard(shard, {"rewards": rewards}, counts)
    artifact.commit(num_shards, seconds=time.monotonic() - started)


def _given_rewards(prepare: Artifact, queries: pa.Table, tasks: Sequence[str]) -> pa.Table:
    """Those of given_rewards of the training queries of some tasks; each of these must have some."""
    if "given_rewards" not in prepare.require()["rows"]:
        raise DataError(
            f"score.feedback of {', '.join(tasks)} is '{GIVEN}', but no data set brings scores of a teacher. Read "
            "files that have them (source: llm_embedder, flag_embedding, kl_rows, or llm_r with given_rewards), or let "
            "the LLM give the feedback."
        )
    is_meant = pc.and_(pc.is_in(queries["task"], value_set=pa.array(tasks)), pc.equal(queries["split"], "train"))
    wanted = queries.filter(is_meant)
    given = prepare.read("given_rewards")
    given = given.filter(pc.is_in(given["query_id"], value_set=wanted["query_id"].combine_chunks()))
    with_rewards = wanted.filter(pc.is_in(wanted["query_id"], value_set=given["query_id"].combine_chunks()))
    if without := sorted(set(tasks) - set(with_rewards["task"].to_pylist())):
        raise DataError(
            f"score.feedback of {', '.join(without)} is '{GIVEN}', but no training query of it has a teacher's scores. "
            "Name files that have them, or set its feedback to likelihood, rank or none."
        )
    return given
