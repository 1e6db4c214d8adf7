"""Candidates that come with the data, as rows of the corpus: at the published scale tens of millions of pairs."""

import numpy as np
import polars as pl
import pyarrow as pa

from llmr_ray.frames import frame_of
from llmr_ray.index.topk import MISSING


class GivenCandidates:
    """Corpus rows and retrieval scores of each query's given candidates, in the order given.

    They are kept as arrays of all pairs (12 bytes each), of which a query has a slice: as Python's lists of numbers
    they would take some ten times that.

    Args:
        given: columns of `given`.
        doc_ids: of the corpus, by row.
    """

    def __init__(self, given: pa.Table, doc_ids: pa.ChunkedArray) -> None:
        pairs = frame_of(given, ["query_id", "doc_id", "retrieval_score"])
        corpus = frame_of(pa.table({"doc_id": doc_ids}), ["doc_id"]).with_row_index("row")
        corpus = corpus.join(pairs.select("doc_id").unique(), on="doc_id", how="semi")
        placed = pairs.join(corpus, on="doc_id", how="left", maintain_order="left")
        placed = placed.sort("query_id", maintain_order=True)
        self._rows = placed["row"].cast(pl.Int64).fill_null(MISSING).to_numpy()
        self._scores = placed["retrieval_score"].fill_null(float("nan")).to_numpy()
        sizes = placed.group_by("query_id", maintain_order=True).len()
        ends = np.cumsum(sizes["len"].to_numpy(), dtype=np.int64).tolist()
        self._slices = dict(zip(sizes["query_id"], map(slice, [0, *ends], ends), strict=True))

    def of(self, query_id: str) -> tuple[np.ndarray, np.ndarray]:
        """rows int64 [N], MISSING where the corpus lacks the document, and scores float32 [N], NaN where none is given;
        empty for a query without given candidates."""
        members = self._slices.get(query_id, slice(0))
        return self._rows[members], self._scores[members]
