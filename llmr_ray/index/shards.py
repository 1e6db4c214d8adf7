"""FAISS shards: contiguous blocks of the corpus as IndexFlatIP files, searched exactly inside ranges of rows.

FAISS finds candidates fast, but breaks ties in the order of its heap, sums in float32 and checks no file. So shards
are checked when built (finite; unit norm where the similarity is cosine) and when opened (sha256), and a search fetches
a few more than k, scores them again as `topk` defines, and widens until no document left out could belong to the
result. The result is that of `topk.exact_topk`, whatever the number of shards, threads or duplicates.

A range is a contiguous slice of the flat vectors, which FAISS searches in place: no selector, no copy. Where only some
documents may be found (filters, deletions), few of them are copied out and searched alone, block by block; of many the
others are dropped from what a search of all fetched.

Shape suffixes: Q queries of a call, M of one range, N documents of the shard, D embedding, K results, F fetched.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from llmr_ray.artifacts import Artifact, sha256_file
from llmr_ray.durable import staged
from llmr_ray.errors import DataError
from llmr_ray.index import int8
from llmr_ray.index.approximate import EXACT_SHARE, WIDER, Proposals
from llmr_ray.index.gpu import GpuRange
from llmr_ray.index.int8 import Codes
from llmr_ray.index.settings import IndexConfig
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
from llmr_ray.index.vectors import is_unit_norm

NORM_TOLERANCE = 1e-3
"""Embeddings that are compared by cosine must have unit norm within this; the error bound of a search relies on it."""

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


def write_shard(vector_ND: np.ndarray, path: Path, *, unit_norm: bool = True) -> None:
    """Writes a block of embeddings as an IndexFlatIP file, atomically.

    Args:
        vector_ND: float32.
        path: the file.
        unit_norm: they are compared by cosine.

    Raises:
        DataError: no rows, NaN or infinite values, or rows that do not have unit norm where they should.
    """
    if vector_ND.ndim != 2 or not len(vector_ND):
        raise DataError(f"an index shard needs rows, but the embeddings have the shape {vector_ND.shape}.")
    check_finite(vector_ND, "embeddings")
    norms = np.linalg.norm(vector_ND, axis=1)
    bad = np.flatnonzero(np.abs(norms - 1) > NORM_TOLERANCE)
    if unit_norm and len(bad):
        raise DataError(
            f"{len(bad)} embeddings do not have unit norm; row {bad[0]} has {norms[bad[0]]:.4f}. Scores would favour "
            "long vectors; embed again, or with embedder.similarity: dot where the length is meant to count."
        )
    index = faiss.IndexFlatIP(vector_ND.shape[1])
    index.add(np.ascontiguousarray(vector_ND, np.float32))
    with staged(path) as temporary:
        faiss.write_index(index, str(temporary))


def file_name(shard: int) -> str:
    """The name of the file of a shard's vectors in an index artifact."""
    return f"shard-{shard:05d}.faiss"


def proposals_name(shard: int) -> str:
    """The name of the file that proposes documents of a shard, where the kind has one."""
    return f"proposals-{shard:05d}.faiss"


@dataclass(frozen=True, kw_only=True)
class Opening:
    """How shards are opened; no exact result depends on it.

    exact: search exactly whatever the kind. scan: of exact searches, float32, int8, or auto: int8 where the CPU is
    faster at it. num_threads: of a search.
    """

    exact: bool = False
    scan: str = "float32"
    num_threads: int = 1


def open_shards(
    index: Artifact, numbers: Iterable[int], first_row: int = 0, how: Opening | None = None
) -> list["Shard"]:
    """Opens some shards of a finished index artifact.

    Args:
        index: the artifact.
        numbers: of the shards.
        first_row: what is searched counts the index's first document as this row.
        how: see Opening.

    Raises:
        DataError: the index is not finished, or a file's bytes changed.
    """
    manifest, how = index.require(), how or Opening()
    files, extra = manifest["files"], manifest["extra"]
    effort = None if how.exact or "recall" not in extra else int(extra["recall"]["effort"])
    opened = []
    for number in numbers:
        shard = _opened(index, files, number, first_row + extra["cuts"][number], effort)
        if shard.num_rows >= int8.MIN_ROWS and _wants_codes(how.scan):
            path = index.file(file_name(number))
            sha256 = files[f"files/{path.name}"]["sha256"]
            shard.codes = int8.open_codes(path, sha256, shard.vector_ND, how.num_threads, shard.largest_norm)
        opened.append(shard)
    return opened


def _wants_codes(scan: str) -> bool:
    return scan == "int8" or (scan == "auto" and faiss.get_num_gpus() == 0 and int8.is_faster())


def open_built(index: Artifact, cuts: Sequence[int]) -> list["Shard"]:
    """Opens all shards of an index that is built and not yet committed."""
    ledger = index.ledger()
    return [
        _opened(index, record["files"], number, cuts[number], settings_of(index).effort)
        for number, record in sorted(ledger.items())
    ]


def _opened(index: Artifact, files: Mapping[str, Any], number: int, first_row: int, effort: int | None) -> "Shard":
    """A shard whose files are listed with their checksums; without an effort, to be searched exactly."""
    name = f"files/{file_name(number)}"
    unit_norm = is_unit_norm(index.spec.config)
    shard = Shard(index.path / name, first_row, files[name]["sha256"], unit_norm=unit_norm)
    name = f"files/{proposals_name(number)}"
    if effort is not None and name in files:
        shard.proposals = Proposals(index.path / name, files[name]["sha256"], settings_of(index), effort)
    return shard


def settings_of(index: Artifact) -> IndexConfig:
    """The settings that an index was made by."""
    return IndexConfig(
        **{name: value for name, value in index.spec.config.items() if name not in ("seed", "similarity")}
    )


def search_all(
    shards: Sequence["Shard"],
    query_QD: np.ndarray,
    scopes_Q2: np.ndarray,
    k: int,
    allowed: Sequence[np.ndarray | None] = (),
) -> tuple[np.ndarray, np.ndarray]:
    """The k best documents of several shards: rows int64 [Q, k] and scores float32 [Q, k].

    Each shard is told what the k-th best of those before it scores, which spares it most candidates.

    Args:
        shards: at least one.
        query_QD, scopes_Q2, k: see Shard.search.
        allowed: of each shard; empty: all documents of all.
    """
    (first, mask), *others = zip(shards, allowed or [None] * len(shards), strict=True)
    best = first.search(query_QD, scopes_Q2, k, mask)
    for shard, mask in others:
        best = merge_topk([best, shard.search(query_QD, scopes_Q2, k, mask, best[1][:, -1])], k)
    return best


class Shard:
    """An opened shard. The file is mapped into memory: processes of one machine share its pages.

    Args:
        path: the file.
        first_row: corpus row of its first document.
        sha256: what the manifest says of the file. FAISS itself loads a file with flipped bits without complaint.
        unit_norm: what `write_shard` was told.

    Raises:
        DataError: the bytes are not those that were committed.
    """

    def __init__(self, path: Path, first_row: int, sha256: str, *, unit_norm: bool = True) -> None:
        if not path.exists() or sha256_file(path) != sha256:
            raise DataError(f"{path} is missing or its bytes changed since it was committed. Build the index again.")
        index: Any = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
        self._index = index
        self.first_row = first_row
        self.num_rows = int(self._index.ntotal)
        self.dimension = int(self._index.d)
        flat = faiss.rev_swig_ptr(index.get_xb(), self.num_rows * self.dimension)
        self.vector_ND = flat.reshape(self.num_rows, self.dimension)
        self.largest_norm = 1.0 if unit_norm else _largest_norm(self.vector_ND)
        """Of a document: what errors of scores are in proportion to."""
        self.proposals: Proposals | None = None
        """What proposes documents where the index is approximate; the vectors here are its exact scores."""
        self.codes: Codes | None = None
        """What bounds scores by 8-bit products; the result is the same without it."""
        self._gpu: GpuRange | None = GpuRange(self.vector_ND) if faiss.get_num_gpus() > 0 else None

    def search(
        self,
        query_QD: np.ndarray,
        scopes_Q2: np.ndarray,
        k: int,
        allowed_N: np.ndarray | None = None,
        floor_Q: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k best documents of this shard inside each query's range of corpus rows.

        Args:
            query_QD: float32 [Q, D], finite.
            scopes_Q2: int64 [Q, 2] start and end (exclusive), in rows of the whole corpus.
            k: results per query.
            allowed_N: bool, which of the shard's documents may be found; None: all.
            floor_Q: float32, scores that k documents elsewhere have: those of lower ones may be left out; None: all
                are wanted.

        Returns:
            corpus rows int64 [Q, k] and scores float32 [Q, k]; MISSING and -inf where the range has no more.
        """
        local_Q2 = np.clip(scopes_Q2 - self.first_row, 0, self.num_rows)
        check_queries(query_QD, local_Q2, self.dimension, self.num_rows)
        rows_QK, scores_QK = nothing(len(query_QD), k)
        floor_Q = np.full(len(query_QD), -np.inf, np.float32) if floor_Q is None else floor_Q
        for start, end, members in by_range(local_Q2):
            search = self._search_exact if self.proposals is None else partial(self._search_proposed, self.proposals)
            rows_MK, scores_MK = search(query_QD[members], start, end, k, allowed_N, floor_Q[members])
            rows_QK[members] = _moved(rows_MK, self.first_row)
            scores_QK[members] = scores_MK
        return rows_QK, scores_QK

    def _search_proposed(
        self,
        proposals: Proposals,
        query_MD: np.ndarray,
        start: int,
        end: int,
        k: int,
        allowed_N: np.ndarray | None,
        floor_M: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """`_search_exact` among what is proposed; exactly where that is as fast, and where too little is proposed.

        All documents are proposed from: asked for allowed ones alone, lists and walks give those that they meet,
        wherever the best are. Where the k best of all are allowed, they are the result; else a wider search has to find
        k allowed ones among the 2k best.
        """
        num_allowed = self.num_rows
        if allowed_N is not None or end - start < self.num_rows:
            allowed_N = np.ones(self.num_rows, bool) if allowed_N is None else allowed_N.copy()
            allowed_N[:start] = allowed_N[end:] = False
            num_allowed = int(np.count_nonzero(allowed_N))
            # A filter that lets all pass is none.
            allowed_N = allowed_N if num_allowed < self.num_rows else None
        num = max(k + SPARE, k * proposals.refine)
        if num_allowed <= max(num, EXACT_SHARE * self.num_rows):
            return self._search_exact(query_MD, start, end, k, allowed_N, floor_M)
        todo = np.arange(len(query_MD))
        rows_MK, scores_MK = nothing(len(query_MD), k)
        for depth, width in [(k, 1)] if allowed_N is None else [(k, 1), (2 * k, WIDER)]:
            best_MF, scores_MF = self._proposed(proposals, query_MD[todo], num, depth, width)
            found_MF = best_MF if allowed_N is None else np.where(allowed_N[best_MF], best_MF, MISSING)
            rows_MK[todo], scores_MK[todo] = select_topk(found_MF, scores_MF, k)
            todo = todo[rows_MK[todo, -1] == MISSING]
            if not len(todo):
                return rows_MK, scores_MK
        rows_MK[todo], scores_MK[todo] = self._search_exact(query_MD[todo], start, end, k, allowed_N, floor_M[todo])
        return rows_MK, scores_MK

    def _proposed(
        self, proposals: Proposals, query_MD: np.ndarray, num: int, depth: int, width: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The best `depth` of `num` documents proposed to each query, and their exact scores."""
        found_MF = proposals.propose(query_MD, num, width)
        exact_MF = np.stack(
            [pair_scores(query_D, self.vector_ND[found_F]) for query_D, found_F in zip(query_MD, found_MF, strict=True)]
        )
        return select_topk(found_MF, exact_MF, depth)

    def _search_exact(
        self,
        query_MD: np.ndarray,
        start: int,
        end: int,
        k: int,
        allowed_N: np.ndarray | None,
        floor_M: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Searches the shard's rows [start, end), of which it gives numbers; floor_M is as in `search`."""
        vector_RD, allowed_R = self.vector_ND[start:end], None
        if allowed_N is not None and not allowed_N[start:end].all():
            allowed_R = allowed_N[start:end]
            chosen_C = np.flatnonzero(allowed_R)
            if not len(chosen_C):
                return nothing(len(query_MD), k)
            if len(chosen_C) <= max(DIRECT_ROWS, DENSE_SHARE * len(vector_RD)):
                rows_MK, scores_MK = self._search_copied(query_MD, vector_RD, chosen_C, k)
                return _moved(rows_MK, start), scores_MK
        todo = np.ones(len(query_MD), bool)
        rows_MK, scores_MK = nothing(len(query_MD), k)
        if self.codes is not None and len(vector_RD) >= int8.MIN_ROWS and k <= int8.MAX_RESULTS:
            rows_MK, scores_MK, todo = self.codes.search(query_MD, start, end, k, allowed_R, floor_M)
        scan = partial(self._scan, start=start, end=end)
        if allowed_R is not None and todo.any() and (fetch := 2 * (k + SPARE)) < len(vector_RD):
            found_MK, scores_MK[todo], open_M = _attempt(query_MD[todo], vector_RD, k, fetch, scan, allowed_R)
            rows_MK[todo] = _moved(found_MK, start)
            todo[np.flatnonzero(todo)[~open_M]] = False
        if todo.any():
            if allowed_R is None:
                found_MK, scores_MK[todo] = _settled(query_MD[todo], vector_RD, k, scan)
            else:
                found_MK, scores_MK[todo] = self._search_copied(query_MD[todo], vector_RD, chosen_C, k)
            rows_MK[todo] = _moved(found_MK, start)
        return rows_MK, scores_MK

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

        The error is that of the longest document with a unit query: float32 sums of D products are off by less than
        D * 2**-24 times the norms in any order, twice that with the rounding of the exact score.
        """
        if self._gpu is not None and end - start >= GPU_MIN_ROWS and fetch <= GPU_MAX_FETCH:
            # Tensor cores may round the factors to TF32: 10 bits of mantissa each.
            scores_MF, found_MF = self._gpu.search(query_MD, start, end, fetch)
            return scores_MF, found_MF, 2.0**-9 * self.largest_norm
        return self._scan_copy(self.vector_ND[start:end], query_MD, fetch)

    def _scan_copy(
        self, vector_CD: np.ndarray, query_MD: np.ndarray, fetch: int
    ) -> tuple[np.ndarray, np.ndarray, float]:
        """`_scan` of vectors in memory, by the CPU."""
        scores_MF, found_MF = faiss.knn(query_MD, vector_CD, fetch, metric=faiss.METRIC_INNER_PRODUCT)
        return scores_MF, found_MF, self.dimension * 2.0**-23 * self.largest_norm


Scan = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray, float]]
"""(queries [M, D], F) -> the F best scores [M, F] and rows of a scan that may round, and the largest error of a score
for unit queries."""


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


def _largest_norm(vector_ND: np.ndarray) -> float:
    """The norm of the longest vector, rounded up."""
    blocks = range(0, len(vector_ND), GATHER_ROWS)
    return max(float(np.linalg.norm(vector_ND[first : first + GATHER_ROWS], axis=1).max()) for first in blocks) * 1.001


def _moved(rows: np.ndarray, first_row: int) -> np.ndarray:
    """Rows counted from another one. A filler plus an offset would be a real, wrong document, so fillers stay."""
    moved: np.ndarray = np.where(rows == MISSING, MISSING, rows + first_row)
    return moved
