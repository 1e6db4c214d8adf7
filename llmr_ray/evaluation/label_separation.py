"""How far a reward model tells examples of another label from those of the question's own.

The LLM is not asked about examples of another label (feedback/rules.py), so no agreement with it counts them; and yet
they are most of what a classification has to teach, because a small LLM answers as its examples do. A reward model that
has not learned one of the labels leaves its questions' wrong examples as much weight as a guess would, and the embedder
that it teaches is pulled by the other labels alone: it shows their examples to all questions.
"""

from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from llmr_ray.artifacts import seed_of
from llmr_ray.data.example_labels import right_labels
from llmr_ray.evaluation.significance import estimate
from llmr_ray.feedback.rules import OTHER_LABEL
from llmr_ray.frames import PAIR, frame_of

SCHEMA = pa.schema(
    [
        ("query_id", pa.string()),
        ("dataset", pa.string()),
        ("label", pa.string()),
        ("share", pa.float64()),
        ("weight", pa.float64()),
    ]
)
"""Of a query's candidates those of another label: their share in number, and in the reward model's softmax."""

LEAST_QUERIES = 10
"""Of a label, before anything is said of it."""


def label_separation(taught: pa.Table, of_llm: pa.Table, queries: pa.Table) -> pa.Table:
    """The weight that a reward model leaves to examples of another label, for each query that has both kinds.

    Args:
        taught: rewards of the reward model: query_id, doc_id, reward.
        of_llm: rewards of the LLM, whose source tells what a rule put last: reward_source beside those.
        queries: query_id, dataset, options and gold_option.

    Returns:
        a table of SCHEMA, in the order of `queries`.
    """
    is_other = pl.col("reward_source") == OTHER_LABEL
    verdicts = frame_of(of_llm, [*PAIR, "reward", "reward_source"]).filter(pl.col("reward").is_not_null() | is_other)
    weights = (
        frame_of(taught, [*PAIR, "reward"])
        .join(verdicts.select(*PAIR, other=is_other), on=PAIR)
        .with_columns(power=(pl.col("reward") - pl.col("reward").max().over("query_id")).exp())
        .group_by("query_id")
        .agg(share=pl.col("other").mean(), weight=pl.col("power").filter(pl.col("other")).sum() / pl.col("power").sum())
        .filter(pl.col("share").is_between(0, 1, closed="none"))
    )
    named = frame_of(queries, ["query_id", "dataset"]).join(right_labels(queries), on="query_id", maintain_order="left")
    found = named.join(weights, on="query_id", maintain_order="left").select(SCHEMA.names)
    return found.to_arrow().cast(SCHEMA)


def separation_rows(table: pa.Table, *, samples: int, seed: int) -> list[dict[str, Any]]:
    """By data set and right label: n queries, mean share and weight, and the weight's ci95 over queries.

    Args:
        table: of SCHEMA.
        samples: bootstrap samples.
        seed: of the run.
    """
    rows = []
    for row in _by_label(table).iter_rows(named=True):
        drawn = {"samples": samples, "seed": seed_of(seed, "label_separation", row["dataset"], row["label"])}
        weight = estimate([np.asarray(row.pop("weights"))], exponential=False, **drawn)
        rows.append(row | {"ci95": [weight.low, weight.high]})
    return rows


def untold_labels(table: pa.Table) -> str | None:
    """A warning that names the labels that the reward model has not learned, or None: those it leaves more than half
    of what a guess would.

    Args:
        table: of SCHEMA.
    """
    untold = _by_label(table).filter(pl.col("n") >= LEAST_QUERIES, pl.col("weight") > pl.col("share") / 2)
    if untold.is_empty():
        return None
    told = [
        f"{row['dataset']} '{row['label']}' ({row['weight']:.2f}, a guess {row['share']:.2f})"
        for row in untold.iter_rows(named=True)
    ]
    return (
        "the reward model does not tell examples of another label from the right ones, by the weight it leaves them: "
        f"{'; '.join(told)}. The embedder will show such examples there. Train it longer "
        "(reward_model.train.num_steps), or at another learning rate."
    )


def _by_label(table: pa.Table) -> pl.DataFrame:
    """Means by data set and label, in their order: dataset, label, n, share, weight, and the weights they are of."""
    grouped = frame_of(table, SCHEMA.names).group_by("dataset", "label", maintain_order=True)
    means = grouped.agg(n=pl.len(), share=pl.mean("share"), weight=pl.mean("weight"), weights=pl.col("weight"))
    return means.sort("dataset", "label")
