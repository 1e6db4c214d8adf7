"""The stage prepare: from sources to `queries`, `corpus`, `qrels` and `quarantine`.

A shard is a task: all its data sets are read together, because a training query may not be the test query of another
data set of the task, and because examples of all data sets share one pool. Shards are in the order of task names, and
inside a shard the corpus is sorted by (pool, position), so every pool is one range of rows of the whole corpus.
"""

import logging
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from llmr_ray import cluster
from llmr_ray.artifacts import GROUP_ROWS, Artifact, ArtifactSpec, Counts
from llmr_ray.assets import Asset
from llmr_ray.config import Config, DatasetConfig, PrepareConfig, identity
from llmr_ray.data.examples import POOL
from llmr_ray.data.records import Query, Source
from llmr_ray.data.selection import (
    Selected,
    collect,
    given_reward_rows,
    given_rows,
    held_out_texts,
    in_order,
    select,
)
from llmr_ray.data.sources import is_tokenized, reader, reader_version
from llmr_ray.data.texts import Texts
from llmr_ray.durable import storage_errors
from llmr_ray.errors import ConfigError, DataError
from llmr_ray.schemas import table_of

log = logging.getLogger(__name__)

PREPARE_VERSION = 2

CORPUS_ROWS = 32 * GROUP_ROWS["corpus"]
"""Documents that are written at once."""

GIVEN_QUERIES = 1024
"""Queries whose given candidates are written at once."""


def prepare_spec(config: Config, assets: dict[str, Asset]) -> ArtifactSpec:
    """What determines prepared data: the data sets' settings and content (their place does not count), and the LLM's
    tokenizer where a source cuts text by tokens.

    Args:
        config: the run's configuration.
        assets: by DatasetConfig.path; the LLM's under config.llm.model.
    """
    if not config.datasets:
        raise ConfigError("`datasets` is empty: there is nothing to prepare. Take the blocks of conf/datasets.yaml.")
    for name, dataset in config.datasets.items():
        reader(dataset.source)
        for given in (name, dataset.pool or name):
            if not re.fullmatch(r"[\w.-]+", given) or given == POOL:
                raise ConfigError(
                    f"'{given}' cannot be the name of a data set or of its pool: these begin ids, so they are letters, "
                    f"digits, '_', '.' and '-', and '{POOL}' is the pool of examples. Rename it."
                )
    inputs = {f"dataset:{name}": assets[dataset.path].fingerprint for name, dataset in config.datasets.items()}
    if any(map(is_tokenized, config.datasets.values())):
        inputs["tokenizer"] = assets[config.llm.model].fingerprint
    settings = {name: identity(dataset) for name, dataset in config.datasets.items()}
    for name, entry in settings.items():
        del entry["path"]
        if (version := reader_version(name, config.datasets[name])) > 1:
            entry["reader"] = version
    return ArtifactSpec(
        stage="prepare",
        version=PREPARE_VERSION,
        config={"datasets": settings, "prepare": identity(config.prepare)},
        inputs=inputs,
    )


def run_prepare(config: Config, artifact: Artifact, assets: dict[str, Asset]) -> None:
    """Reads every data set and commits the four tables.

    Raises:
        DataError: a source cannot be read, or too many of its rows are bad.
    """
    started = time.monotonic()
    tasks = sorted({dataset.task for dataset in config.datasets.values()})
    cluster.map_shards(
        artifact.pending(len(tasks)),
        PrepareWorker,
        {
            "artifact": artifact,
            "tasks": tasks,
            "datasets": config.datasets,
            "prepare": config.prepare,
            "paths": {name: assets[dataset.path].path for name, dataset in config.datasets.items()},
            "tokenizer": assets[config.llm.model].path,
        },
        num_actors=config.runtime.mine_actors,
        purpose="prepare",
    )
    artifact.commit(len(tasks), seconds=time.monotonic() - started)
    queries = artifact.read("queries")
    rows = Counter(zip(queries["dataset"].to_pylist(), queries["split"].to_pylist(), strict=True))
    for (name, split), number in sorted(rows.items()):
        log.info("%s: %d %s queries", name, number, split)


class PrepareWorker:
    """Prepares shards: shard n is the n-th task with all its data sets."""

    def __init__(
        self,
        artifact: Artifact,
        tasks: list[str],
        datasets: dict[str, DatasetConfig],
        prepare: PrepareConfig,
        paths: dict[str, Path],
        tokenizer: Path,
    ) -> None:
        self.artifact, self.tasks, self.datasets = artifact, tasks, datasets
        self.prepare, self.paths, self.tokenizer = prepare, paths, tokenizer

    def run(self, shard: int) -> dict[str, Any]:
        """Reads, selects and writes one task; returns the ledger record."""
        names = sorted(name for name, dataset in self.datasets.items() if dataset.task == self.tasks[shard])
        collected = []
        for name in names:
            dataset = self.datasets[name]
            source = Source(name=name, config=dataset, path=self.paths[name], tokenizer=self.tokenizer)
            with storage_errors(self.artifact.path):
                texts = Texts(self.artifact.path)
                collected.append(collect(name, dataset, self.prepare, reader(dataset.source)(source), texts))
        held_out = held_out_texts(collected)
        selected = [select(data, held_out) for data in collected]
        _check_pools(self.datasets, selected)
        rows: dict[str, list[dict[str, Any]]] = {
            "queries": [row for part in selected for row in part.queries],
            "qrels": [row for part in selected for row in part.qrels],
            "quarantine": [row for part in selected for row in part.quarantine],
        }
        tables: dict[str, pa.Table | Iterable[pa.Table]] = {name: table_of(name, table) for name, table in rows.items()}
        # Written only where there are any: most sources bring none.
        chosen = [query for part in selected for query in part.chosen]
        if any(query.given for query in chosen):
            tables["given"] = _given("given", given_rows, chosen)
        if any(query.given_rewards for query in chosen):
            tables["given_rewards"] = _given("given_rewards", given_reward_rows, chosen)
        tables["corpus"] = _corpus(selected)
        return self.artifact.write_shard(shard, tables, sum((part.counts for part in selected), Counts()))


def _check_pools(datasets: Mapping[str, DatasetConfig], selected: Sequence[Selected]) -> None:
    """A misspelt name must not leave queries without anything to find."""
    named = {datasets[row["dataset"]].pool for part in selected for row in part.queries} - {""}

    def is_empty(pool: str) -> bool:
        return not any(document.pool == pool for part in selected for document in part.corpus)

    if empty := sorted(filter(is_empty, named)):
        users = sorted(name for name, dataset in datasets.items() if dataset.pool in empty)
        raise DataError(
            f"the pool {', '.join(map(repr, empty))} holds no document, so the queries of {', '.join(users)} would "
            "find nothing. Give the data set whose passages they search the same name as datasets.*.pool."
        )


def _given(
    name: str, rows_of: Callable[[Iterable[Query]], list[dict[str, Any]]], queries: Sequence[Query]
) -> Iterator[pa.Table]:
    """A table of what is given for queries in parts, of which only one is in memory."""
    for start in range(0, len(queries), GIVEN_QUERIES):
        yield table_of(name, rows_of(queries[start : start + GIVEN_QUERIES]))


def _corpus(selected: Sequence[Selected]) -> Iterator[pa.Table]:
    """The table `corpus` in parts, of which only one is in memory."""
    documents = in_order(selected)
    while rows := [document.row() for document in islice(documents, CORPUS_ROWS)]:
        yield table_of("corpus", rows)
