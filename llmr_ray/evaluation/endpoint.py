"""The measures of a run through a served collection, beside those of the run itself.

Every test query of the run that has labels is asked of the server, inside its own range of documents (pool and
history, as a filter). With the run's own documents the rankings are the run's, but for near ties: a vector depends on
its batch by rounding, 1e-7 in float32 and 1e-3 in bfloat16 (embedder.precision, where auto is the machine's choice).
"""

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from llmr_ray.errors import DataError
from llmr_ray.evaluation.protocols import RETRIEVAL_MEASURES, Ranking, Row, measured_rankings

if TYPE_CHECKING:
    from llmr_ray.clients import Client

SERVED = "served"
"""The name of the server among the methods."""


@dataclass(frozen=True, kw_only=True)
class ServedFigure:
    """A measure of a data set: mean over n queries as the run found it, and as the server did."""

    dataset: str
    measure: str
    n: int
    offline: float
    served: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What came of asking a server.

    num_same: queries with the same documents in the same order. max_score_difference: of documents that both found.
    """

    figures: list[ServedFigure]
    snapshots: list[str]
    num_queries: int
    num_same: int
    max_score_difference: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """A JSON form."""
        return asdict(self)


def scope_filter(query: Mapping[str, Any]) -> dict[str, Any]:
    """What a query may retrieve, as a filter: its pool, and of a history what came before it."""
    pool = {"type": "eq", "key": "pool", "value": query["pool"]}
    if query["history_end"] is None:
        return pool
    before = {"type": "lt", "key": "position", "value": query["history_end"]}
    return {"type": "and", "filters": [pool, before]}


def compare(
    queries: Sequence[Row],
    qrels: Mapping[str, Mapping[str, int]],
    run: pa.Table,
    method: str,
    client: "Client",
    *,
    depth: int,
    num_clients: int = 4,
) -> Comparison:
    """Asks a server what a run evaluated.

    Args:
        queries: rows of `queries`.
        qrels: query id -> document id -> relevance.
        run: the evaluation's table of rankings.
        method: whose rankings are compared.
        client: of the server.
        depth: documents per query.
        num_clients: asking at the same time.

    Raises:
        DataError: the run has no rankings by this method, or no query with labels.
        RequestRefusedError: the server does not answer such a query.
        ServerUnavailableError: it is not there, or busy for too long.
    """
    offline: dict[str, Ranking] = defaultdict(list)
    for row in run.to_pylist():
        if row["run_name"] == method:
            offline[row["query_id"]].append((row["doc_id"], row["score"]))
    asked = [query for query in queries if query["query_id"] in qrels and query["query_id"] in offline]
    if not asked:
        raise DataError(f"the run ranked no labelled query by '{method}', so there is nothing to compare with.")
    snapshots: set[str] = set()

    def served(query: Row) -> Ranking:
        found = client.retrieve(
            query["query"], task=query["task"], top_k=depth, filter=scope_filter(query), with_text=False
        )
        snapshots.add(found.index_snapshot)
        return [(hit.doc_id, hit.retrieval_score) for hit in found.hits]

    started = time.monotonic()
    with ThreadPoolExecutor(num_clients) as clients:
        found = dict(zip((query["query_id"] for query in asked), clients.map(served, asked), strict=True))
    seconds = time.monotonic() - started
    same, difference = 0, 0.0
    for query_id, ranking in found.items():
        same += [doc_id for doc_id, _ in ranking] == [doc_id for doc_id, _ in offline[query_id]]
        before = dict(offline[query_id])
        difference = max([difference, *(abs(score - before[doc_id]) for doc_id, score in ranking if doc_id in before)])
    labels = {query["query_id"]: qrels[query["query_id"]] for query in asked}
    return Comparison(
        figures=_figures(asked, labels, {method: offline, SERVED: found}, method),
        snapshots=sorted(snapshots),
        num_queries=len(asked),
        num_same=same,
        max_score_difference=difference,
        seconds=round(seconds, 3),
    )


def _figures(
    queries: Sequence[Row],
    qrels: Mapping[str, Mapping[str, int]],
    rankings: Mapping[str, Mapping[str, Ranking]],
    method: str,
) -> list[ServedFigure]:
    _, values = measured_rankings(queries, qrels, rankings)
    by: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in (row for rows in values for row in rows):
        by[row["dataset"], row["measure"]][row["method"]].append(row["value"])
    order = {measure: at for at, measure in enumerate(dict.fromkeys(sum(RETRIEVAL_MEASURES.values(), ())))}
    return [
        ServedFigure(
            dataset=dataset,
            measure=measure,
            n=len(of[SERVED]),
            offline=sum(of[method]) / len(of[method]),
            served=sum(of[SERVED]) / len(of[SERVED]),
        )
        for (dataset, measure), of in sorted(by.items(), key=lambda item: (item[0][0], order[item[0][1]]))
    ]
