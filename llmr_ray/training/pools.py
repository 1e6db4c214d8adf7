"""From candidates, gold documents and rewards to the pool of each training query."""

from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from llmr_ray.config import TaskConfig
from llmr_ray.data.text import document_text
from llmr_ray.errors import DataError
from llmr_ray.training.groups import Pool, pool_rewards, reject_reason


def join_pools(
    qrels: pa.Table, candidates: pa.Table, rewards: pa.Table, corpus: pa.Table
) -> dict[str, dict[str, list[Any]]]:
    """Each query's pool as lists: doc_id, row (of the corpus), gold, judged, reward (None where there is none).

    `judged` documents are those that the rewards name, also where they say no more than that it is below all others.

    Documents stand in the order of the candidates; gold documents that no candidate names come last.

    Raises:
        DataError: a pair names a document that the corpus lacks.
    """
    pair = ["query_id", "doc_id"]
    gold = pl.from_arrow(qrels.filter(pc.greater(qrels["relevance"], 0)).select(pair))
    mined = pl.from_arrow(candidates.select([*pair, "source"]))
    rewarded = pl.from_arrow(rewards.select([*pair, "reward"]))
    rows = pl.from_arrow(corpus.select(["doc_id"]))
    assert isinstance(gold, pl.DataFrame)
    assert isinstance(mined, pl.DataFrame)
    assert isinstance(rewarded, pl.DataFrame)
    assert isinstance(rows, pl.DataFrame)
    gold, rewarded = gold.with_columns(gold=pl.lit(True)), rewarded.with_columns(judged=pl.lit(True))
    mined = mined.join(gold, on=pair, how="left", maintain_order="left")
    mined = mined.select(*pair, gold=pl.col("gold").fill_null(False) | (pl.col("source") == "gold"))
    pairs = pl.concat([mined, gold.join(mined, on=pair, how="anti", maintain_order="left").select(*pair, "gold")])
    joined = pairs.join(rewarded, on=pair, how="left", maintain_order="left").join(
        rows.with_row_index("row"), on="doc_id", how="left", maintain_order="left"
    )
    lost = joined.filter(pl.col("row").is_null())
    if len(lost):
        raise DataError(f"candidates or qrels name documents that the corpus lacks, such as {lost['doc_id'][0]}.")
    grouped = joined.group_by("query_id", maintain_order=True).agg("doc_id", "row", "gold", "judged", "reward")
    return {row["query_id"]: row for row in grouped.iter_rows(named=True)}


def group_row(
    query: dict[str, Any], task: TaskConfig | None, found: dict[str, list[Any]] | None, corpus: pa.Table
) -> tuple[dict[str, object] | str, int]:
    """A row of the groups table, or the reason why a query cannot train; and how many documents lacked a reward.

    Args:
        query: a row of the queries table.
        task: of the query; None where it does not train.
        found: the query's entry of `join_pools`; None where there is none.
        corpus: what `join_pools` was given.
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
    docs = [document_text(corpus["title"][row].as_py(), corpus["text"][row].as_py()) for row in numbers]
    gold = [found["gold"][n] for n in places]
    rewards = [found["reward"][n] for n in places] if needs_rewards else None
    keys = {doc: number for number, doc in enumerate(dict.fromkeys(docs))}
    pool = Pool(
        keys=np.asarray([keys[doc] for doc in docs]),
        is_gold=np.asarray(gold, dtype=bool),
        rewards=pool_rewards(rewards) if rewards is not None else None,
    )
    reason = reject_reason(
        pool, positive=task.train.positive, min_reward=task.group.min_reward, min_margin=task.group.min_margin
    )
    if reason is not None:
        return reason, without
    row: dict[str, object] = {name: query[name] for name in ("query_id", "task", "dataset", "query")}
    row |= {"doc_ids": [found["doc_id"][n] for n in places], "docs": docs}
    row |= {"roles": ["gold" if is_gold else "candidate" for is_gold in gold], "rewards": rewards}
    return row, without
