"""From one round of labelling to the next: calls, what is learned well enough, and when to stop (methods.md C.4)."""

from collections.abc import Sequence

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from llmr_ray.evaluation.metrics import retrieval_values
from llmr_ray.frames import PAIR, frame_of
from llmr_ray.labeling.calibration import RETRIEVER, of_calibration
from llmr_ray.labeling.settings import AdaptiveConfig


def calls_of_round(settings: AdaptiveConfig, spent: int) -> int:
    """How many pairs may be asked about in a round, after `spent` of the earlier ones."""
    if not settings.total_calls:
        return settings.calls_per_round
    return max(0, min(settings.calls_per_round, settings.total_calls - spent))


def next_labels(labels: pa.Table, new_labels: pa.Table) -> pa.Table:
    """The labels after a round, with which the next retriever is trained: earlier pseudo-labels no longer hold.

    Args:
        labels: the table before the round.
        new_labels: of `selection.settle`.
    """
    return pa.concat_tables([labels.filter(pc.not_equal(labels["source"], RETRIEVER)), new_labels])


def leads(pairs: pa.Table, labels: pa.Table) -> pa.Table:
    """By how much cosine each question's worst known positive leads its best known negative: query_id, lead (float64).

    Known is what the LLM labelled 1 and 0: pseudo-labels are the retriever's own opinion. The worst positive counts,
    because a question of several passages is learned when all are found. Questions that lack either are left out.

    Args:
        pairs: at least all labelled pairs; columns query_id, doc_id, cosine.
        labels: columns query_id, doc_id, label, source.
    """
    known = frame_of(labels, [*PAIR, "label", "source"]).filter(pl.col("source") != RETRIEVER)
    cosine = pl.col("cosine").cast(pl.Float64)
    ahead = (
        frame_of(pairs, [*PAIR, "cosine"])
        .join(known, on=PAIR, how="inner", maintain_order="left")
        .group_by("query_id", maintain_order=True)
        .agg(lead=cosine.filter(pl.col("label") == 1).min() - cosine.filter(pl.col("label") == 0).max())
    )
    return ahead.drop_nulls().to_arrow()


def well_trained_questions(rounds: Sequence[pa.Table], settings: AdaptiveConfig) -> set[str]:
    """Questions that need no further calls: they led by trained_margin in each of the last trained_rounds rounds.

    Args:
        rounds: what `leads` told of each round, in order.
        settings: of the rounds.
    """
    if len(rounds) < settings.trained_rounds:
        return set()
    ahead = []
    for table in rounds[-settings.trained_rounds :]:
        frame = frame_of(table, ["query_id", "lead"])
        ahead.append(set(frame.filter(pl.col("lead") >= settings.trained_margin)["query_id"].to_list()))
    return set.intersection(*ahead)


def calibration_ndcg(pairs: pa.Table, labels: pa.Table, settings: AdaptiveConfig) -> float | None:
    """Mean nDCG@10 over the calibration questions that have a label above 0, gains 1 and 2 for 0.5 and 1.

    Only labelled pairs are ranked: one that nobody judged says nothing. Two retrievers can be compared by it on the
    same labels alone, because with other labels come other questions.

    Args:
        pairs: at least all labelled pairs of these questions; columns query_id, doc_id, cosine.
        labels: columns query_id, doc_id, label, source.
        settings: of the rounds.

    Returns:
        None where there is no such question.
    """
    known = of_calibration(labels, settings.calibration_fraction)
    judged = (
        frame_of(pairs, [*PAIR, "cosine"]).join(known, on=PAIR, how="inner").sort("cosine", "doc_id", descending=True)
    )
    qrels: dict[str, dict[str, int]] = {}
    rankings: dict[str, list[tuple[str, float]]] = {}
    for query_id, doc_id, cosine, label in judged.select(*PAIR, "cosine", "label").iter_rows():
        qrels.setdefault(query_id, {})[doc_id] = round(2 * label)
        rankings.setdefault(query_id, []).append((doc_id, cosine))
    qrels = {query_id: relevance for query_id, relevance in qrels.items() if any(relevance.values())}
    if not qrels:
        return None
    return float(np.mean(list(retrieval_values(qrels, rankings, ["nDCG@10"])["nDCG@10"].values())))


def stop_reason(before: float | None, after: float | None, *, spent: int, settings: AdaptiveConfig) -> str | None:
    """Why nothing more is asked, or None: "budget" (total_calls are spent), "no_gain" (relative, below min_gain).

    Args:
        before, after: nDCG@10 on the calibration questions, on the same labels, of the retriever of the round before
            and of this round's; None where it cannot be told.
        spent: pairs asked about so far.
        settings: of the rounds; a negative min_gain never stops.
    """
    if settings.total_calls and spent >= settings.total_calls:
        return "budget"
    if before is None or after is None or settings.min_gain < 0:
        return None
    return "no_gain" if after <= before or after - before < settings.min_gain * before else None


def label_distribution(labels: pa.Table) -> pa.Table:
    """How many labels there are: round, source, label (null: asked in vain), num_pairs; sorted."""
    frame = frame_of(labels, ["round", "source", "label"])
    return frame.group_by("round", "source", "label").len("num_pairs").sort("round", "source", "label").to_arrow()
