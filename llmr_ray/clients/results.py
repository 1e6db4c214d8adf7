"""A server's answers as typed values."""

import array
import base64
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmr_ray.serving.protocol import Hit


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """What was found for one query, best first.

    hits: at most top_k; fewer where a filter or min_score leaves fewer. index_snapshot: the state of the index that was
    searched. partial: a part of the index did not answer, so documents may be missing (only where the server allows
    such answers). request_id: under which the server logged the request.
    """

    query: str
    hits: Sequence[Hit]
    index_snapshot: str
    partial: bool
    request_id: str


@dataclass(frozen=True, kw_only=True)
class RankedDocument:
    """A document that was given to be ranked: its place among those given, and its score in (0, 1)."""

    index: int
    relevance_score: float


@dataclass(frozen=True, kw_only=True)
class ServerInfo:
    """What a server serves. `limits` are those of a request, by name; `tasks` may be named in requests."""

    model: str
    collection: str
    tasks: Sequence[str]
    default_task: str | None
    reranker: str | None
    version: str
    index_snapshot: str | None
    num_documents: int
    dimension: int | None
    limits: Mapping[str, float]


def retrievals(answer: Mapping[str, Any], queries: Sequence[str]) -> list[Retrieval]:
    """The answer of /v1/retrieve; KeyError, TypeError or ValueError where it has another form."""
    return [
        Retrieval(
            query=query,
            hits=[_hit(value) for value in hits],
            index_snapshot=str(answer["index_snapshot"]),
            partial=bool(answer["partial"]),
            request_id=str(answer["request_id"]),
        )
        for query, hits in zip(queries, answer["results"], strict=True)
    ]


def _hit(value: Mapping[str, Any]) -> Hit:
    found = {name: value.get(name) for name in ("title", "text", "metadata")}
    return Hit(doc_id=str(value["id"]), retrieval_score=float(value["score"]), **found)


def embeddings(answer: Mapping[str, Any], number: int) -> list[list[float]]:
    """The vectors of /v1/embeddings asked for as base64; errors as of `retrievals`."""
    rows = sorted(answer["data"], key=lambda row: int(row["index"]))
    if [row["index"] for row in rows] != list(range(number)):
        raise ValueError("not one embedding for each text")
    return [_floats(row["embedding"]) for row in rows]


def _floats(text: str) -> list[float]:
    values = array.array("f")
    values.frombytes(base64.b64decode(text, validate=True))
    if sys.byteorder == "big":
        values.byteswap()
    return values.tolist()


def ranking(answer: Mapping[str, Any], number: int) -> list[RankedDocument]:
    """The answer of /v1/rerank; errors as of `retrievals`."""
    ranked = [
        RankedDocument(index=int(row["index"]), relevance_score=float(row["relevance_score"]))
        for row in answer["results"]
    ]
    if any(not 0 <= row.index < number for row in ranked):
        raise ValueError("a document that was not given")
    return ranked


def server_info(answer: Mapping[str, Any]) -> ServerInfo:
    """The answer of /info; errors as of `retrievals`. What a newer server tells beyond it is left out."""
    return ServerInfo(**{name: answer[name] for name in ServerInfo.__dataclass_fields__})
