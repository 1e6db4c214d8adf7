"""FAISS shards: contiguous blocks of the corpus as IndexFlatIP files, searched exactly inside ranges of rows.

FAISS finds candidates fast, but breaks ties in the order of its heap, sums in float32 and checks no file. So shards
are checked when built (finite, unit norm) and when opened (sha256), and a search fetches a few more than k, scores
them again as `topk` defines, and widens until no document left out could belong to the result. The result is that of
`topk.exact_topk`, whatever the number of shards, threads or duplicates.

A range is a contiguous slice of the flat vectors, which FAISS searches in place: no selector, no copy. Where only some
documents may be found (filters, deletions), few of them are copied out and searched alone, block by block; of many the
others are dropped from what a search of all fetched.

Shape suffixes: Q queries of a call, M of one range, N documents of the shard, D embedding, K results, F fetched.
"""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from llmr_ray.artifacts import Artifact, sha256_file
from llmr_ray.durable import staged
from llmr_ray.errors import DataError
from llmr_ray.index.topk import (
    MISSING,
    block_topk,
    by_range,
    check_finite,
    check_queries,
    merge_topk,
    nothing,
    pair_scores,
    select_topk,
)

NORM_TOLERANCE = 1e-3
"""Embeddings must have unit norm within this; the error bound of a search relies on it."""

SPARE = 32
"""Documents fetched beyond k before the exact comparison."""

DIRECT_ROWS = 256
"""Ranges up to this long are compared with NumPy. At thousands of ranges of 10 to 250 rows all ways cost under 0.1 ms
each (benchmarks/search.py); this one needs no second look."""

DENSE_SHARE = 0.5
"""Share of a range's documents that must be allowed for all to be scanned. Copying fewer costs less than that."""

GATHER_ROWS = 16_384
"""Allowed documents copied out at once."""

GPU_MIN_ROWS = 65_536
"""Shorter ranges are not worth the way to a GPU."""

GPU_MAX_FETCH = 2048
"""The most results a FAISS GPU index returns."""


def set_threads(num_threads: int) -> None:
    """Threads that FAISS uses in this process."""
    faiss.omp_set_num_threads(num_threads)


def write_shard(vector_ND: np.ndarray, path: Path) -> None:
    """Writes a block of embeddings as an IndexFlatIP file, atomically.

    Raises:
        DataError: no rows, NaN or infinite values, or rows that do not have unit norm.
    """
    if vector_ND.ndim != 2 or not len(vector_ND):
        raise DataError(f"an index shard needs rows, but the embeddings have the shape {vector_ND.shape}.")
    check_finite(vector_ND, "embeddings")
    norms = np.linalg.norm(vector_ND, axis=1)
    bad = np.flatnonzero(np.abs(norms - 1) > NORM_TOLERANCE)
    if len(bad):
        raise DataError(
            f"{len(bad)} embeddings do not have unit norm; row {bad[0]} has {norms[bad[0]]:.4f}. Scores would favour "
            "long vectors; embed again."
        )
    index = faiss.IndexFlatIP(vector_ND.shape[1])
    index.add(np.ascontiguousarray(vector_ND, np.float32))
    with staged(path) as temporary:
        faiss.write_index(index, str(temporary))


def file_name(shard: int) -> str:
    """The name of a shard's file in an index artifact."""
    return f"shard-{shard:05d}.faiss"


def open_shards(index: Artifact, numbers: Iterable[int], first_row: int = 0) -> list["Shard"]:
    """Opens some shards of a finished index artifact, whose first document is row `first_row` of what is searched.

    Raises:
        DataError: the index is not finished, or a file's bytes changed.
    """
    manifest = index.require()
    return [
        Shard(
            index.file(file_name(number)),
            first_row=first_row + manifest["extra"]["cuts"][number],
            sha256=manifest["files"][f"files/{file_name(number)}"]["sha256"],
        )
        for number in numbers
    ]


class Shard:
    """An opened shard. The file is mapped into memory: processes of one machine share its pages.

    Args:
        path: the file.
        first_row: corpus row of its first document.
        sha256: what the manifest says of the file. FAISS itself loads a file with flipped bits without complaint.

    Raises:
        DataError: the bytes are not those that were committed.
    """

    def __init__(self, path: Path, first_row: int, sha256: str) -> None:
        if not path.exists() or sha256_file(path) != sha256:
            raise DataError(f"{path} is missing or its bytes changed since it was committed. Build the index again.")
        index: Any = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
        self._index = index
        self.first_row = first_row
        self.num_rows = int(self._index.ntotal)
        self.dimension = int(self._index.d)
        flat = faiss.rev_swig_ptr(index.get_xb(), self.num_rows * self.dimension)
        self.vector_ND = flat.reshape(self.num_rows, self.dimension)
        self._gpu: _GpuRange | None = _GpuRange(self.vector_ND) if faiss.get_num_gpus() > 0 else None

    def search(
        self, query_QD: np.ndarray, scopes_Q2: np.ndarray, k: int, allowed_N: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k best documents of this shard inside each query's range of corpus rows.

        Args:
            query_QD: float32 [Q, D], finite.
            scopes_Q2: int64 [Q, 2] start and end (exclusive), in rows of the whole corpus.
            k: results per query.
            allowed_N: bool, which of the shard's documents may be found; None: all.

        Returns:
            corpus rows int64 [Q, k] and scores float32 [Q, k]; MISSING and -inf where the range has no more.
        """
        local_Q2 = np.clip(scopes_Q2 - self.first_row, 0, self.num_rows)
        check_queries(query_QD, local_Q2, self.dimension, self.num_rows)
        rows_QK, scores_QK = nothing(len(query_QD), k)
        for start, end, members in by_range(local_Q2):
            rows_MK, scores_MK = self._search_range(query_QD[members], start, end, k, allowed_N)
            rows_QK[members] = _moved(rows_MK, self.first_row)
            scores_QK[members] = scores_MK
        return rows_QK, scores_QK

    def _search_range(
        self, query_MD: np.ndarray, start: int, end: int, k: int, allowed_N: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Searches the shard's rows [start, end); rows are the shard's."""
        vector_RD, scan = self.vector_ND[start:end], partial(self._scan, start=start, end=end)
        if allowed_N is None or allowed_N[start:end].all():
            rows_MK, scores_MK = _settled(query_MD, vector_RD, k, scan)
            return _moved(rows_MK, start), scores_MK
        allowed_R = allowed_N[start:end]
        rows_MK, scores_MK = nothing(len(query_MD), k)
        todo = np.ones(len(query_MD), bool)
        num_allowed, fetch = int(np.count_nonzero(allowed_R)), 2 * (k + SPARE)
        if num_allowed > max(DIRECT_ROWS, DENSE_SHARE * len(vector_RD)) and fetch < len(vector_RD):
            rows_MK, scores_MK, todo = _attempt(query_MD, vector_RD, k, fetch, scan, allowed_R)
        if num_allowed and todo.any():
            rows_MK[todo], scores_MK[todo] = self._search_copied(
                query_MD[todo], vector_RD, np.flatnonzero(allowed_R), k
            )
        return _moved(rows_MK, start), scores_MK

    def _search_copied(
        self, query_MD: np.ndarray, vector_RD: np.ndarray, chosen_C: np.ndarray, k: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Searches some of the vectors (row numbers, ascending) without the others."""
        parts = []
        for first in range(0, len(chosen_C), GATHER_ROWS):
            block_C = chosen_C[first : first + GATHER_ROWS]
            copied_CD = vector_RD[block_C]
            found_MK, scores_MK = _settled(query_MD, copied_CD, k, partial(self._scan_copy, copied_CD))
            parts.append((np.where(found_MK == MISSING, MISSING, block_C[found_MK]), scores_MK))
        return merge_topk(parts, k)

    def _scan(self, query_MD: np.ndarray, fetch: int, start: int, end: int) -> tuple[np.ndarray, np.ndarray, float]:
        """FAISS's own top `fetch` of rows [start, end): scores, rows from `start`, and the largest error of a score.

        The error is that of a unit document with a unit query: float32 sums of D products are off by less than
        D * 2**-24 in any order, twice that with the rounding of the exact score.
        """
        if self._gpu is not None and end - start >= GPU_MIN_ROWS and fetch <= GPU_MAX_FETCH:
            # Tensor cores may round the factors to TF32: 10 bits of mantissa each.
            scores_MF, found_MF = self._gpu.search(query_MD, start, end, fetch)
            return scores_MF, found_MF, 2.0**-9
        return self._scan_copy(self.vector_ND[start:end], query_MD, fetch)

    def _scan_copy(
        self, vector_CD: np.ndarray, query_MD: np.ndarray, fetch: int
    ) -> tuple[np.ndarray, np.ndarray, float]:
        """`_scan` of vectors in memory, by the CPU."""
        scores_MF, found_MF = faiss.knn(query_MD, vector_CD, fetch, metric=faiss.METRIC_INNER_PRODUCT)
        return scores_MF, found_MF, self.dimension * 2.0**-23


Scan = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray, float]]
"""(queries [M, D], F) -> the F best scores [M, F] and rows of a scan that may round, and the largest error of a score
for unit vectors."""


def _settled(query_MD: np.ndarray, vector_RD: np.ndarray, k: int, scan: Scan) -> tuple[np.ndarray, np.ndarray]:
    """The exact k best of R vectors: scanned as wide as it takes, rows from 0."""
    rows_MK, scores_MK = nothing(len(query_MD), k)
    todo, fetch = np.arange(len(query_MD)), k + SPARE
    while len(todo) and len(vector_RD) > max(fetch, DIRECT_ROWS):
        rows_MK[todo], scores_MK[todo], unsettled = _attempt(query_MD[todo], vector_RD, k, fetch, scan)
        todo = todo[unsettled]
        fetch *= 4
    if len(todo):
        rows_MK[todo], scores_MK[todo] = block_topk(query_MD[todo], vector_RD, k, 0)
    return rows_MK, scores_MK


def _attempt(
    query_MD: np.ndarray, vector_RD: np.ndarray, k: int, fetch: int, scan: Scan, allowed_R: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The k best of what one scan fetched, rows from 0, and bool [M]: whose result a wider scan might change."""
    scan_MF, found_MF, error = scan(query_MD, fetch)
    exact_MF = np.stack(
        [pair_scores(query_D, vector_RD[found_F]) for query_D, found_F in zip(query_MD, found_MF, strict=True)]
    )
    if allowed_R is not None:
        found_MF = np.where(allowed_R[found_MF], found_MF, MISSING)
    rows_MK, scores_MK = select_topk(found_MF, exact_MF, k)
    # No document left out scanned above the last fetched one; if the k-th result is safely above that, the result is
    # settled. Else (near ties, duplicates, few that are allowed) it is not.
    margin_M = error * np.linalg.norm(query_MD, axis=1)
    return rows_MK, scores_MK, scores_MK[:, -1] <= scan_MF[:, -1] + margin_M


def _moved(rows: np.ndarray, first_row: int) -> np.ndarray:
    """Rows counted from another one. A filler plus an offset would be a real, wrong document, so fillers stay."""
    moved: np.ndarray = np.where(rows == MISSING, MISSING, rows + first_row)
    return moved


class _GpuRange:
    """A float32 copy of one range of a shard on the first GPU; another range replaces it.

    `index_cpu_to_all_gpus` is avoided: without a GPU it returns an empty index and no error; and FAISS's default of
    fp16 storage on some paths would change the numbers.
    """

    def __init__(self, vector_ND: np.ndarray) -> None:
        self._vector_ND = vector_ND
        self._resources = faiss.StandardGpuResources()
        self._range = (0, 0)

    def search(self, query_MD: np.ndarray, start: int, end: int, fetch: int) -> tuple[np.ndarray, np.ndarray]:
        """FAISS's top `fetch` of rows [start, end), numbered from `start`."""
        if self._range != (start, end):
            config = faiss.GpuIndexFlatConfig()
            config.useFloat16 = False
            self._index = faiss.GpuIndexFlatIP(self._resources, self._vector_ND.shape[1], config)
            self._index.add(self._vector_ND[start:end])
            self._range = (start, end)
        found: tuple[np.ndarray, np.ndarray] = self._index.search(query_MD, fetch)
        return found
