"""How much two judges agree on the order of candidates: the reward model, say, and the LLM it learned from."""

import polars as pl
import pyarrow as pa
from scipy.stats import kendalltau


def rank_agreement(rewards: pa.Table, llm_scores: pa.Table) -> dict[str, float]:
    """Kendall's tau-b between two judges' rewards of each query's candidates: 1 the same order, -1 the opposite.

    Only documents that both judged count. A query of fewer than two such documents, or all of whose documents one
    judge holds equal, has no tau and is left out.

    Args:
        rewards: columns query_id, doc_id, reward.
        llm_scores: the other judge's; the same columns.
    """
    pair = ["query_id", "doc_id"]
    mine, others = (pl.from_arrow(table.select([*pair, "reward"])) for table in (rewards, llm_scores))
    assert isinstance(mine, pl.DataFrame)
    assert isinstance(others, pl.DataFrame)
    judged = mine.join(others, on=pair, suffix="_other", maintain_order="left")
    found = {}
    for row in judged.group_by("query_id", maintain_order=True).agg("reward", "reward_other").iter_rows(named=True):
        one, other = row["reward"], row["reward_other"]
        if len(set(one)) > 1 and len(set(other)) > 1:
            found[row["query_id"]] = float(kendalltau(one, other).statistic)
    return found
