"""Retrieval measures per query, computed by ir_measures on exactly the ranking that the exported TREC run holds."""

from collections.abc import Mapping, Sequence

import ir_measures
import numpy as np
import pyarrow as pa


def relevance_by_query(qrels: pa.Table) -> dict[str, dict[str, int]]:
    """The `qrels` table as query id -> document id -> relevance."""
    found: dict[str, dict[str, int]] = {}
    for row in qrels.to_pylist():
        found.setdefault(row["query_id"], {})[row["doc_id"]] = row["relevance"]
    return found


def trec_scores(scores: Sequence[float]) -> np.ndarray:
    """Scores of a ranked list made strictly decreasing in float32, so that every tool sees the same order.

    trec_eval ignores ranks: it sorts by score (a C float) and breaks ties by document id, so tied documents would be
    ranked otherwise than we ranked them. A score that does not lie below its predecessor becomes the next float below.

    Args:
        scores: K scores in rank order, not increasing (an increase is treated as a tie).

    Returns:
        float32 [K], strictly decreasing.
    """
    result = np.asarray(scores, np.float32).copy()
    for rank in range(1, len(result)):
        if result[rank] >= result[rank - 1]:
            result[rank] = np.nextafter(result[rank - 1], np.float32(-np.inf))
    return result


def retrieval_values(
    qrels: Mapping[str, Mapping[str, int]],
    rankings: Mapping[str, Sequence[tuple[str, float]]],
    measures: Sequence[str],
) -> dict[str, dict[str, float]]:
    """Every measure for every query of `qrels`; a query without results has 0 (methods.md I.20).

    The ideal of nDCG uses min(k, number of relevant documents), as trec_eval does. Check value (methods.md A.7): the
    ranking 5, 1, 9, 2, 7 with 1, 2, 3 relevant has nDCG@5 0.4981893 and nDCG@3 0.2960820.

    Args:
        qrels: query id -> document id -> relevance.
        rankings: query id -> (document id, retrieval score) in rank order; queries outside `qrels` are ignored.
        measures: as ir_measures writes them, for example ``nDCG@10``.

    Returns:
        measure -> query id -> value.
    """
    judged = [
        ir_measures.Qrel(query_id, doc_id, relevance)
        for query_id, documents in qrels.items()
        for doc_id, relevance in documents.items()
    ]
    run = []
    for query_id in qrels:
        ranking = rankings.get(query_id, [])
        scores = trec_scores([score for _, score in ranking])
        run += [
            ir_measures.ScoredDoc(query_id, doc_id, float(score))
            for (doc_id, _), score in zip(ranking, scores, strict=True)
        ]
    parsed = {ir_measures.parse_measure(name): name for name in measures}
    values: dict[str, dict[str, float]] = {name: dict.fromkeys(qrels, 0.0) for name in measures}
    for metric in ir_measures.iter_calc(list(parsed), judged, run):
        values[parsed[metric.measure]][metric.query_id] = float(metric.value)
    return values
