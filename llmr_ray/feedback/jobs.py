"""The work of the stage score: queries with their candidates, from the tables of earlier stages, cut into shards."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from llmr_ray.artifacts import seed_of
from llmr_ray.config import Config, LLMConfig, TaskScore
from llmr_ray.data.example_labels import classifications
from llmr_ray.data.splits import lowest, unit_hash
from llmr_ray.errors import DataError
from llmr_ray.feedback.rules import rule_of
from llmr_ray.frames import PAIR, frame_of

Row = Mapping[str, Any]

GIVEN = "given"
"""score.feedback, and reward_source, of what the makers of the data had a teacher say."""

SHARD_QUERIES = 256
"""Queries of one shard of llm_scores: LLM work is dear, so shards are smaller than elsewhere."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One query whose candidates are to be judged. `target` is None when the query has no desired output.

    rules: for each document, the rule that judges it in place of the LLM (rules.py), or None.
    max_candidate_tokens, max_model_tokens: as in LLMConfig.
    """

    query: Row
    documents: tuple[Row, ...]
    rules: tuple[str | None, ...]
    settings: TaskScore
    target: str | None
    max_candidate_tokens: int
    max_model_tokens: int
    seed: int

    @property
    def query_id(self) -> str:
        """The query's id, which is also the unit of its requests."""
        return str(self.query["query_id"])

    @property
    def task(self) -> str:
        """The query's task."""
        return str(self.query["task"])

    @property
    def asked(self) -> tuple[Row, ...]:
        """The documents that the LLM is asked about."""
        return tuple(document for document, rule in zip(self.documents, self.rules, strict=True) if rule is None)


def make_job(
    query: Row,
    documents: Sequence[Row],
    settings: TaskScore,
    llm: LLMConfig,
    seed: int,
    *,
    is_classification: bool = False,
) -> Job:
    """A job; `is_classification` as for rules.rule_of."""
    return Job(
        query=query,
        documents=tuple(documents),
        rules=tuple(
            rule_of(settings, query, document, place=place, is_classification=is_classification)
            for place, document in enumerate(documents)
        ),
        settings=settings,
        target=desired_output(query, settings, seed),
        max_candidate_tokens=llm.max_candidate_tokens,
        max_model_tokens=llm.max_model_tokens,
        seed=seed,
    )


def desired_output(query: Row, settings: TaskScore, seed: int) -> str | None:
    """Of several desired outputs one is drawn by the query's id, the same for all candidates (A.4.2); LLM-R
    always takes the first (B.4)."""
    targets = list(query["targets"])[: 1 if settings.prompt == "llm_r" else None]
    rng = np.random.default_rng(seed_of(seed, "target", query["query_id"]))
    return targets[int(rng.integers(len(targets)))] if targets else None


def feedback_tasks(config: Config) -> dict[str, TaskScore]:
    """Settings of the tasks that this run's data sets use and whose feedback the LLM gives."""
    used = sorted({dataset.task for dataset in config.datasets.values()})
    settings = {task: config.tasks[task].score for task in used}
    return {task: score for task, score in settings.items() if score.feedback not in ("none", GIVEN)}


def given_tasks(config: Config) -> list[str]:
    """The tasks that this run's data sets use and whose rewards come with the data, sorted."""
    used = {dataset.task for dataset in config.datasets.values()}
    return sorted(task for task in used if config.tasks[task].score.feedback == GIVEN)


class ScoreJobs:
    """Jobs by shard, in the order of the candidates. `num_not_drawn` pairs are left out by the tasks' limits.

    Args:
        config: the run's configuration.
        queries, corpus, candidates: tables of those schemas.

    Raises:
        DataError: a candidate's query or document does not exist, or a query's candidates do not stand together.
    """

    def __init__(self, config: Config, queries: pa.Table, corpus: pa.Table, candidates: pa.Table) -> None:
        self.tasks = feedback_tasks(config)
        self.llm, self.seed = config.llm, config.seed
        self.queries, self.corpus = queries, corpus
        self._labelled = (
            classifications(queries) if any(task.same_label for task in self.tasks.values()) else set[str]()
        )
        query_row = _rows_of(candidates["query_id"], queries["query_id"], "query")
        tasks = queries["task"].combine_chunks().take(query_row)
        candidates = candidates.filter(pc.is_in(tasks, value_set=pa.array(list(self.tasks), pa.string())))
        self.candidates = self._drawn(candidates) if any(map(_draws, self.tasks.values())) else candidates
        self.num_not_drawn = candidates.num_rows - self.candidates.num_rows
        ids = np.asarray(self.candidates["query_id"].to_pylist(), dtype=object)
        starts = np.flatnonzero(np.concatenate([[True], ids[1:] != ids[:-1]])) if len(ids) else np.zeros(0, np.int64)
        if len(starts) != len(set(ids[starts])):
            raise DataError("the candidates of a query do not stand together in the table, so shards would split them.")
        self._bounds = np.append(starts, len(ids))

    def _drawn(self, candidates: pa.Table) -> pa.Table:
        """The candidates about which the LLM is asked where a task limits queries or candidates (methods.md B.4)."""
        mined = frame_of(candidates, [*PAIR, "source"])
        of_query = frame_of(self.queries, ["query_id", "task", "dataset"])
        chosen = set[str]()
        for (task,), members in of_query.join(mined, on="query_id", how="semi").group_by("task"):
            ids = {str(name): part["query_id"].to_list() for (name,), part in members.group_by("dataset")}
            chosen |= drawn_queries(ids, self.tasks[str(task)].max_queries)
        rows = mined.with_row_index("row").join(of_query, on="query_id", how="left", maintain_order="left")
        asked = np.zeros(len(rows), bool)
        for (query_id, task), pairs in rows.group_by("query_id", "task"):
            if query_id in chosen:
                of_pairs = pairs["doc_id"].to_list(), (pairs["source"] == "gold").to_list()
                kept = drawn_candidates(str(query_id), *of_pairs, self.tasks[str(task)].num_candidates, self.seed)
                asked[pairs["row"].to_numpy()[kept]] = True
        return candidates.filter(pa.array(asked))

    @property
    def num_pairs(self) -> int:
        """Candidates of tasks with LLM feedback."""
        return int(self.candidates.num_rows)

    @property
    def num_shards(self) -> int:
        """At least one, so that the artifact exists even when nothing has LLM feedback."""
        return max(1, -(-(len(self._bounds) - 1) // SHARD_QUERIES))

    def of_shard(self, shard: int) -> list[Job]:
        """The jobs of a shard."""
        bounds = self._bounds[shard * SHARD_QUERIES : (shard + 1) * SHARD_QUERIES + 1]
        if len(bounds) < 2:
            return []
        part = self.candidates.slice(int(bounds[0]), int(bounds[-1] - bounds[0]))
        documents = self.corpus.take(_rows_of(part["doc_id"], self.corpus["doc_id"], "document")).to_pylist()
        queries = self.queries.take(
            _rows_of(self.candidates["query_id"].take(pa.array(bounds[:-1])), self.queries["query_id"], "query")
        ).to_pylist()
        jobs = []
        for query, start, stop in zip(queries, bounds[:-1] - bounds[0], bounds[1:] - bounds[0], strict=True):
            settings = self.tasks[query["task"]]
            is_classification = query["dataset"] in self._labelled
            job = make_job(
                query, documents[start:stop], settings, self.llm, self.seed, is_classification=is_classification
            )
            jobs.append(job)
        return jobs


def drawn_queries(ids: Mapping[str, Sequence[str]], limit: int) -> set[str]:
    """At most `limit` queries (0: all), by the largest equal share of the data sets that allows for it (B.4).

    Args:
        ids: by data set; of each the lowest by a hash are taken.
        limit: of all together.
    """
    share = equal_share([len(members) for members in ids.values()], limit)
    return {query_id for dataset, members in ids.items() for query_id in lowest(dataset, members, share)}


def equal_share(sizes: Sequence[int], limit: int) -> int:
    """The largest cap under which data sets of these sizes come to at most `limit` together; 0 is no limit."""
    if not limit or sum(sizes) <= limit:
        return max(sizes, default=0)
    left = limit
    for number, size in enumerate(sorted(sizes)):
        share = left // (len(sizes) - number)
        if size > share:
            return share
        left -= size
    raise AssertionError("sizes that come to more than the limit have one above its share")


def drawn_candidates(
    query_id: str, doc_ids: Sequence[str], is_gold: Sequence[bool], number: int, seed: int
) -> list[int]:
    """Which of a query's candidates the LLM is asked about: gold ones, then drawn ones up to `number` (0: all)."""
    if not number:
        return list(range(len(doc_ids)))

    def order(place: int) -> tuple[bool, float]:
        return not is_gold[place], unit_hash("asked", str(seed), query_id, doc_ids[place])

    return sorted(sorted(range(len(doc_ids)), key=order)[: max(number, sum(is_gold))])


def _draws(settings: TaskScore) -> bool:
    return bool(settings.num_candidates or settings.max_queries)


def _rows_of(ids: pa.ChunkedArray, known: pa.ChunkedArray, what: str) -> pa.Array:
    rows = pc.index_in(ids, value_set=known.combine_chunks())
    rows = rows.combine_chunks() if isinstance(rows, pa.ChunkedArray) else rows
    if rows.null_count:
        strangers = ids.filter(pc.is_null(rows)).slice(0, 3).to_pylist()
        raise DataError(f"candidates name a {what} that does not exist: {strangers}. Mine again from this data.")
    return rows
