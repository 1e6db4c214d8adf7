"""The work of the stage score cut into shards: queries with their candidates, from the tables of earlier stages."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from llmr_ray.config import Config, TaskScore
from llmr_ray.errors import DataError
from llmr_ray.feedback.scoring import Job, make_job

SHARD_QUERIES = 256
"""Queries of one shard of llm_scores: LLM work is dear, so shards are smaller than elsewhere."""


def feedback_tasks(config: Config) -> dict[str, TaskScore]:
    """Settings of the tasks that this run's data sets use and that have LLM feedback."""
    used = sorted({dataset.task for dataset in config.datasets.values()})
    settings = {task: config.tasks[task].score for task in used}
    return {task: score for task, score in settings.items() if score.feedback != "none"}


class ScoreJobs:
    """Jobs by shard, in the order of the candidates.

    Args:
        config: the run's configuration.
        queries, corpus, candidates: tables of those schemas.

    Raises:
        DataError: a candidate's query or document does not exist, or a query's candidates do not stand together.
    """

    def __init__(self, config: Config, queries: pa.Table, corpus: pa.Table, candidates: pa.Table) -> None:
        self.tasks = feedback_tasks(config)
        self.max_candidate_tokens, self.seed = config.llm.max_candidate_tokens, config.seed
        self.queries, self.corpus = queries, corpus
        query_row = _rows_of(candidates["query_id"], queries["query_id"], "query")
        tasks = queries["task"].combine_chunks().take(query_row)
        self.candidates = candidates.filter(pc.is_in(tasks, value_set=pa.array(list(self.tasks), pa.string())))
        ids = np.asarray(self.candidates["query_id"].to_pylist(), dtype=object)
        starts = np.flatnonzero(np.concatenate([[True], ids[1:] != ids[:-1]])) if len(ids) else np.zeros(0, np.int64)
        if len(starts) != len(set(ids[starts])):
            raise DataError("the candidates of a query do not stand together in the table, so shards would split them.")
        self._bounds = np.append(starts, len(ids))

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
            jobs.append(make_job(query, documents[start:stop], settings, self.max_candidate_tokens, self.seed))
        return jobs


def _rows_of(ids: pa.ChunkedArray, known: pa.ChunkedArray, what: str) -> pa.Array:
    rows = pc.index_in(ids, value_set=known.combine_chunks())
    rows = rows.combine_chunks() if isinstance(rows, pa.ChunkedArray) else rows
    if rows.null_count:
        strangers = ids.filter(pc.is_null(rows)).slice(0, 3).to_pylist()
        raise DataError(f"candidates name a {what} that does not exist: {strangers}. Mine again from this data.")
    return rows
