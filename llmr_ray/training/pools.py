"""From candidates, gold documents and rewards to the pool of each training query."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from llmr_ray.artifacts import SHARD_ROWS, Artifact, Counts
from llmr_ray.config import TaskConfig
from llmr_ray.data.example_labels import has_other_label, is_own_example
from llmr_ray.data.text import document_text
from llmr_ray.errors import DataError
from llmr_ray.frames import PAIR, frame_of
from llmr_ray.schemas import PSEUDO, table_of
from llmr_ray.training.groups import CANDIDATE, GOLD, SAME_LABEL, Pool, pool_rewards, reject_reason


def named_documents(prepare: Artifact, qrels: pa.Table, candidates: pa.Table, columns: Sequence[str]) -> pa.Table:
    """The rows of the corpus that labels or candidates name, which may be few of many."""
    ids = (table["doc_id"].unique().to_pylist() for table in (qrels, candidates))
    return prepare.read("corpus", columns=["doc_id", *columns], ids=chain.from_iterable(ids))


class Pools(Mapping[str, dict[str, list[Any]]]):
    """What `join_pools` found, by query. A pool becomes Python's lists when it is asked for: all of them at once, some
    hundred documents of hundreds of thousands of queries, would take ten times their table's memory."""

    def __init__(self, pools: pl.DataFrame) -> None:
        self._pools = pools
        self._number = {query_id: number for number, query_id in enumerate(pools["query_id"])}

    def __getitem__(self, query_id: str) -> dict[str, list[Any]]:
        return self._pools.row(self._number[query_id], named=True)

    def __iter__(self) -> Iterator[str]:
        return iter(self._number)

    def __len__(self) -> int:
        return len(self._number)


def join_pools(qrels: pa.Table, candidates: pa.Table, rewards: pa.Table, corpus: pa.Table) -> Pools:
    """Each query's pool as lists: doc_id, row (of `corpus`), gold, judged, reward (None where there is none), source
    (of the reward).

    `judged` documents are those that the rewards name, also where they say no more than that it is below all others.

    Documents stand in the order of the candidates; gold documents that no candidate names come last.

    Args:
        qrels, candidates, rewards: tables of those schemas.
        corpus: at least the `named_documents` of these.

    Raises:
        DataError: a pair names a document that the corpus lacks.
    """
    gold = frame_of(qrels.filter(pc.greater(qrels["relevance"], 0)), PAIR)
    mined = frame_of(candidates, [*PAIR, "source"])
    rewarded = frame_of(rewards, [*PAIR, "reward", "reward_source"])
    rows = frame_of(corpus, ["doc_id"])
    gold, rewarded = gold.with_columns(gold=pl.lit(True)), rewarded.with_columns(judged=pl.lit(True))
    mined = mined.join(gold, on=PAIR, how="left", maintain_order="left")
    mined = mined.select(*PAIR, gold=pl.col("gold").fill_null(False) | (pl.col("source") == "gold"))
    pairs = pl.concat([mined, gold.join(mined, on=PAIR, how="anti", maintain_order="left").select(*PAIR, "gold")])
    joined = pairs.join(rewarded, on=PAIR, how="left", maintain_order="left").join(
        rows.with_row_index("row"), on="doc_id", how="left", maintain_order="left"
    )
    lost = joined.filter(pl.col("row").is_null())
    if len(lost):
        raise DataError(f"candidates or qrels name documents that the corpus lacks, such as {lost['doc_id'][0]}.")
    grouped = joined.group_by("query_id", maintain_order=True).agg(
        "doc_id", "row", "gold", "judged", "reward", source="reward_source"
    )
    return Pools(grouped)


def pool_of(docs: list[str], roles: list[str], rewards: list[float | None] | None) -> Pool:
    """The pool of a row of the groups table."""
    keys = {doc: number for number, doc in enumerate(dict.fromkeys(docs))}
    return Pool(
        keys=np.asarray([keys[doc] for doc in docs]),
        is_gold=np.asarray([role == GOLD for role in roles]),
        rewards=pool_rewards(rewards) if rewards is not None else None,
        is_barred=np.asarray([role == SAME_LABEL for role in roles]),
    )


Quotes = Mapping[tuple[str, str], str]
"""What the LLM quoted for its label 1, by query and document."""


def quotes(rewards: pa.Table) -> Quotes:
    """Of a table of rewards. A label stays 1 only where its evidence was found in the document (feedback/labels.py)."""
    fully = rewards.filter(pc.and_(pc.equal(rewards["reward"], 1), pc.greater(pc.utf8_length(rewards["evidence"]), 0)))
    return {(query_id, doc_id): text for query_id, doc_id, text in frame_of(fully, [*PAIR, "evidence"]).iter_rows()}


def group_row(
    query: dict[str, Any],
    task: TaskConfig | None,
    found: dict[str, list[Any]] | None,
    corpus: pa.Table,
    *,
    is_classification: bool = False,
    quoted: Quotes | None = None,
) -> tuple[dict[str, Any] | str, int]:
    """A row of the groups table, or the reason why a query cannot train; and how many documents lacked a reward.

    Args:
        query: a row of the queries table.
        task: of the query; None where it does not train.
        found: the query's entry of `join_pools`; None where there is none.
        corpus: what `join_pools` was given; of a classification with `meta`.
        is_classification: whether documents of the query's label are to be told apart, where the task wants that.
        quoted: what is a positive beside the documents that it stands in, where the task gives it a weight.
    """
    if task is None:
        return "task_does_not_train", 0
    if found is None:
        return "no_candidates", 0
    needs_rewards = task.score.feedback != "none"
    places = [n for n, judged in enumerate(found["judged"]) if judged or not needs_rewards]
    without = len(found["judged"]) - len(places)
    if not places:
        return "no_rewards", without
    numbers = [found["row"][n] for n in places]
    documents = corpus.take(numbers).to_pylist()
    docs = [document_text(document["title"], document["text"]) for document in documents]
    rewards = [found["reward"][n] for n in places] if needs_rewards else None
    # What the LLM labels fully relevant is as good as gold: never a negative. What the data says then plays no part.
    by_llm = task.score.feedback == "label"
    gold = [found["reward"][n] == 1 if by_llm else found["gold"][n] and task.group.with_gold for n in places]
    bars = is_classification and not task.group.same_label_negatives and query["gold_option"] is not None
    roles = [
        GOLD if is_gold else SAME_LABEL if bars and _has_its_label(document, query) else CANDIDATE
        for is_gold, document in zip(gold, documents, strict=True)
    ]
    reason = reject_reason(
        pool_of(docs, roles, rewards),
        positive=task.train.positive,
        min_reward=task.group.min_reward,
        min_margin=task.group.min_margin,
        top_positives=task.train.top_positives,
    )
    if reason is not None:
        return reason, without
    doc_ids = [found["doc_id"][n] for n in places]
    weights = [task.group.pseudo_weight if found["source"][n] == PSEUDO else 1.0 for n in places]
    row: dict[str, Any] = {name: query[name] for name in ("query_id", "task", "dataset", "query")}
    row |= {"doc_ids": doc_ids, "docs": docs, "roles": roles, "rewards": rewards}
    if quoted and rewards is not None and task.group.evidence_weight:
        for doc_id in [name for name in doc_ids if (query["query_id"], name) in quoted]:
            doc_ids.append(f"{doc_id}#evidence")
            docs.append(quoted[query["query_id"], doc_id])
            roles.append(GOLD)
            rewards.append(1.0)
            weights.append(task.group.evidence_weight)
    row["weights"] = weights if needs_rewards and set(weights) != {1.0} else None
    return row, without


def _has_its_label(document: Mapping[str, Any], query: Mapping[str, Any]) -> bool:
    return is_own_example(document, query) and not has_other_label(document, query)


def write_groups(
    artifact: Artifact, queries: pa.Table, row_of: Callable[[dict[str, Any]], dict[str, Any] | str]
) -> int:
    """Writes the table `groups` in shards of SHARD_ROWS queries; returns how many shards there are.

    Args:
        artifact: to be written; shards in its ledger stay as they are.
        queries: all that may train.
        row_of: a query's row, or the reason why it cannot train, which is counted.
    """
    num_shards = max(1, -(-queries.num_rows // SHARD_ROWS))
    pending = set(artifact.pending(num_shards))
    for shard in range(num_shards):
        part = queries.slice(shard * SHARD_ROWS, SHARD_ROWS)
        rows, skipped = [], Counter[str]()
        for query in part.to_pylist():
            row = row_of(query)
            if isinstance(row, str):
                skipped[row] += 1
            else:
                rows.append(row)
        if shard in pending:
            counts = Counts(rows_in=part.num_rows, ok=len(rows), skipped=skipped)
            artifact.write_shard(shard, {"groups": table_of("groups", rows)}, counts)
    return num_shards
