"""Embeddings as Arrow tables (plain fixed_size_list<float32>, so that any tool reads them), and who made them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from llmr_ray.artifacts import Artifact, canonical_json
from llmr_ray.config import Config
from llmr_ray.errors import DataError

SIDES = ("query", "document")

_PAIRS = 65_536
"""Pairs whose vectors are side by side in memory at a time."""


def to_table(key: str, ids: Sequence[str] | pa.ChunkedArray, vector_ND: np.ndarray) -> pa.Table:
    """A table of two columns: the ids under the name `key`, and `embedding`.

    Args:
        key: "doc_id" or "query_id".
        ids: N ids.
        vector_ND: float32 [N, D].
    """
    values = pa.array(np.ascontiguousarray(vector_ND, np.float32).reshape(-1))
    kind = pa.list_(pa.field("element", pa.float32(), nullable=False), vector_ND.shape[1])
    return pa.table({key: ids, "embedding": pa.FixedSizeListArray.from_arrays(values, type=kind)})


def to_matrix(table: pa.Table) -> np.ndarray:
    """The `embedding` column as float32 [N, D].

    Raises:
        DataError: the column is no fixed_size_list<float32>, or holds nulls.
    """
    column = table["embedding"]
    if not pa.types.is_fixed_size_list(column.type) or not pa.types.is_float32(column.type.value_type):
        raise DataError(f"column 'embedding' is {column.type}, but must be fixed_size_list<float32>. Embed again.")
    if column.null_count:
        raise DataError(f"column 'embedding' holds {column.null_count} nulls; rows would shift. Embed again.")
    parts = [chunk.flatten().to_numpy() for chunk in column.chunks]
    values = np.concatenate(parts) if parts else np.zeros(0, np.float32)
    return values.reshape(-1, column.type.list_size)


def how_pooled(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of the settings of an `embed` artifact, those by which tokens become a vector, as Embedder takes them; what is
    not there was at its default."""
    names = ("pooling", "precision", "similarity", "pool_instruction")
    return {name: settings[name] for name in names if name in settings}


def own_limits(config: Config, tasks: Iterable[str]) -> dict[str, dict[str, list[int]]]:
    """Of the settings of an `embed` artifact, the tokens that queries and documents of a task are cut to, where a task
    has limits of its own; nothing where none has."""
    whole = [getattr(config.embedder, f"max_{side}_tokens") for side in SIDES]
    limits = {task: [config.max_tokens(task, side) for side in SIDES] for task in tasks}
    own = {task: both for task, both in limits.items() if both != whole}
    return {"limits": own} if own else {}


def max_tokens(settings: Mapping[str, Any], task: str | None, side: str) -> int:
    """To how many tokens a task's texts are cut, by the settings of an `embed` artifact; None: a text of no task."""
    own = settings.get("limits", {}).get(task)
    return int(own[SIDES.index(side)] if own else settings[f"max_{side}_tokens"])


def is_unit_norm(settings: Mapping[str, Any]) -> bool:
    """Whether the vectors of an `embed` or `index` artifact of these settings have unit norm."""
    return settings.get("similarity", "cosine") == "cosine"


def encoder_of(embeddings: Artifact) -> str:
    """Names the encoder of an `embed` artifact: vectors of equal names may be compared, others may not."""
    return canonical_json({"embedder": embeddings.spec.inputs["embedder"]} | how_pooled(embeddings.spec.config))


def query_vectors(embeddings: Artifact, query_ids: Sequence[str]) -> np.ndarray:
    """The embeddings of some queries, joined on the id: float32 [Q, D].

    Raises:
        DataError: a query was not embedded.
    """
    table = embeddings.read("query_embeddings")
    row_of = {query_id: row for row, query_id in enumerate(table["query_id"].to_pylist())}
    missing = [query_id for query_id in query_ids if query_id not in row_of]
    if missing:
        raise DataError(f"{embeddings.id} lacks {len(missing)} queries, the first is '{missing[0]}'. Embed again.")
    return to_matrix(table)[[row_of[query_id] for query_id in query_ids]]


def pair_similarities(embeddings: Artifact, query_ids: list[str], doc_ids: list[str]) -> np.ndarray:
    """Inner products, which are cosines unless the embedder's similarity is dot, of P pairs of a query and a document:
    float32 [P]."""
    documents = embeddings.read("document_embeddings")
    documents = documents.filter(pc.is_in(documents["doc_id"], value_set=pc.unique(pa.array(doc_ids, pa.string()))))
    row_of = {doc_id: row for row, doc_id in enumerate(documents["doc_id"].to_pylist())}
    number_of = {query_id: number for number, query_id in enumerate(dict.fromkeys(query_ids))}
    document_ND, query_QD = to_matrix(documents), query_vectors(embeddings, list(number_of))
    document_P = np.asarray([row_of[doc_id] for doc_id in doc_ids], np.int64)
    query_P = np.asarray([number_of[query_id] for query_id in query_ids], np.int64)
    similarity_P = np.zeros(len(doc_ids), np.float32)
    for start in range(0, len(doc_ids), _PAIRS):
        part = slice(start, start + _PAIRS)
        similarity_P[part] = (query_QD[query_P[part]] * document_ND[document_P[part]]).sum(axis=1)
    return similarity_P
