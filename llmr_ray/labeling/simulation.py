"""An annotator of known quality, for experiments in which the truth is known (methods.md C.4, the adaptive claim).

What an LLM's mistakes cost can only be told where there are right labels to compare with: gold labels, spoiled at rates
that are set, stand for the LLM.
"""

from collections.abc import Mapping

import polars as pl
import pyarrow as pa

from llmr_ray.artifacts import Artifact
from llmr_ray.data.splits import unit_hash
from llmr_ray.errors import ConfigError
from llmr_ray.frames import PAIR, frame_of

LABELS = (0.0, 0.5, 1.0)

FlipRates = Mapping[float, Mapping[float, float]]
"""For a true label, the probability of each wrong one; what is left is that of the right one."""


def gold_labels(prepare: Artifact) -> pa.Table:
    """The labels that come with the data: query_id, doc_id, label.

    Where a data set's judgements are grades (one of them is 2 or above), 1 is partly relevant and labelled 0.5; else 1
    is relevant and labelled 1. What is judged 0 is labelled 0; pairs without a judgement are not here.
    """
    dataset_of = frame_of(prepare.read("queries"), ["query_id", "dataset"])
    judged = frame_of(prepare.read("qrels"), [*PAIR, "relevance"]).join(
        dataset_of, on="query_id", how="left", maintain_order="left"
    )
    whole = pl.col("relevance").max().over("dataset").clip(1, 2)
    label = (pl.col("relevance").clip(0, 2) / whole).cast(pl.Float32)
    return judged.select(*PAIR, label=label).to_arrow()


def annotate(pairs: pa.Table, gold: pa.Table, rates: FlipRates, *, seed: int) -> pa.Table:
    """The labels that an annotator with these error rates gives.

    A pair's label depends on the seed and the pair alone: asked again it is the same, as from an LLM at temperature 0.

    Args:
        pairs: to be labelled; columns query_id, doc_id.
        gold: columns query_id, doc_id, label; pairs that it lacks are truly 0.
        rates: see FlipRates; labels that it lacks are never wrong.
        seed: of the annotator.

    Returns:
        query_id, doc_id, label; in the order of `pairs`.

    Raises:
        ConfigError: a rate for an unknown label, for the right label, or rates that are no probabilities.
    """
    for true, flips in rates.items():
        is_known = true in LABELS and all(label in LABELS and label != true for label in flips)
        if not is_known or min(flips.values(), default=0.0) < 0 or sum(flips.values()) > 1:
            raise ConfigError(
                f"flip rates of label {true} are {dict(flips)}, but must name other labels of {LABELS} with "
                "probabilities that sum to at most 1."
            )
    truth = _with_truth(pairs.select(PAIR), gold)
    labels = [
        _spoiled(true, rates.get(true, {}), unit_hash("annotator", str(seed), query_id, doc_id))
        for query_id, doc_id, true in truth.select(*PAIR, "truth").iter_rows()
    ]
    return truth.select(*PAIR, label=pl.Series(labels, dtype=pl.Float32)).to_arrow()


def label_quality(labels: pa.Table, gold: pa.Table) -> pa.Table:
    """How many labels are right, by who gave them: source, label, num_pairs, precision; sorted.

    Args:
        labels: columns query_id, doc_id, label, source; rows without a label do not count.
        gold: as for `annotate`.
    """
    judged = _with_truth(labels.select([*PAIR, "label", "source"]), gold).drop_nulls("label")
    precision = (pl.col("label") == pl.col("truth")).mean()
    by = judged.group_by("source", "label").agg(num_pairs=pl.len(), precision=precision)
    return by.sort("source", "label").to_arrow()


def _spoiled(true: float, flips: Mapping[float, float], draw: float) -> float:
    for label, rate in sorted(flips.items()):
        if draw < rate:
            return label
        draw -= rate
    return true


def _with_truth(pairs: pa.Table, gold: pa.Table) -> pl.DataFrame:
    truth = frame_of(gold, [*PAIR, "label"]).rename({"label": "truth"})
    joined = frame_of(pairs, pairs.column_names).join(truth, on=PAIR, how="left", maintain_order="left")
    return joined.with_columns(pl.col("truth").fill_null(0.0))
