"""An exact scan at a quarter of the bytes: products of 8-bit integers bound every score, and what may be among the best
is scored exactly.

A vector x is held as s * c + e, with c its values as integers of -127 to 127 and s one scale for the row. For a query
q = t * d + f of the same form, t * s * (c . d) is off from q . x by at most |t d| |e| + |f| |x| (Cauchy-Schwarz). The
k-th largest lower bound is a threshold; a document whose upper bound is below it is not among the k best. The
survivors, some hundreds of a million, are scored from the float32 vectors, so the result is that of the exact search,
ties included.

The product is oneDNN's through torch, on tiles that stay in the cache; the scan of a tile is compiled by Numba.

Shape suffixes: Q queries of a tile, N documents, B documents of a tile, D embedding, C candidates kept, K results.
"""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from llmr_ray.artifacts import canonical_json, sha256_file
from llmr_ray.durable import staged, write_atomic
from llmr_ray.index.topk import MISSING, nothing, pair_scores, select_topk

MIN_ROWS = 32_768
"""Shorter ranges are searched with float32 at once."""

MAX_RESULTS = 1024
"""Searches for more results are left to float32."""

QUERIES, DOCUMENTS = 256, 256
"""Of a tile: its products take 256 KiB."""

NORM = 1.001
"""Norms of documents are at the most this (shards.NORM_TOLERANCE), times `largest_norm` where they may be long."""

ROUNDING = 2.0**-20
"""Of a bound for unit vectors, for all that is computed in float32 around the integer product."""

_VERSION = 1
_WRITE_ROWS = 65_536
_NO_MASK = np.zeros(0, bool)


@lru_cache(maxsize=1)
def is_faster() -> bool:
    """Whether this CPU multiplies bytes at least three times as fast as float32, measured once in each process."""
    import torch

    rng = np.random.default_rng(0)
    left, right = (torch.from_numpy(rng.integers(-127, 128, (256, 384), np.int8)) for _ in range(2))
    wide, other = left.float(), right.float()

    def seconds(product: Any) -> float:
        taken = []
        for _ in range(5):
            started = perf_counter()
            for _ in range(4):
                product()
            taken.append(perf_counter() - started)
        return min(taken)

    return 3 * seconds(lambda: torch._int_mm(left, right.t())) < seconds(lambda: wide @ other.t())


class Codes:
    """The 8-bit codes of a shard's vectors.

    Args:
        code_ND: int8.
        scale_N: float32.
        error_N: float32, the norm of what the code leaves out.
        vector_ND: float32, the vectors themselves.
        num_threads: that search side by side, each with queries of its own.
        largest_norm: of the vectors; 1 where they have unit norm.
    """

    def __init__(
        self,
        code_ND: np.ndarray,
        scale_N: np.ndarray,
        error_N: np.ndarray,
        vector_ND: np.ndarray,
        num_threads: int,
        largest_norm: float = 1.0,
    ) -> None:
        self._largest_norm = largest_norm
        self._code_ND, self._scale_N, self._error_N, self._vector_ND = code_ND, scale_N, error_N, vector_ND
        self._pool = ThreadPoolExecutor(num_threads, initializer=_one_thread) if num_threads > 1 else None

    def search(
        self,
        query_MD: np.ndarray,
        start: int,
        end: int,
        k: int,
        allowed_R: np.ndarray | None,
        floor_M: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The exact k best of rows [start, end) for each of M queries.

        Args:
            query_MD: float32, finite.
            start: first row.
            end: last row, exclusive.
            k: results per query.
            allowed_R: bool, which of the rows may be found; None: all.
            floor_M: float32, scores below which nothing is wanted, so that less may be found; -inf: all is wanted.

        Returns:
            rows int64 [M, k], scores float32 [M, k], and bool [M]: of which query more documents than can be kept lie
            within the bounds (duplicates), so that its row here means nothing.
        """
        rows_MK, scores_MK = nothing(len(query_MD), k)
        unsettled_M = np.zeros(len(query_MD), bool)
        masked_R = _NO_MASK if allowed_R is None else allowed_R

        def tile(first: int) -> None:
            members = slice(first, first + QUERIES)
            found = self._tile(query_MD[members], start, end, k, masked_R, floor_M[members])
            rows_MK[members], scores_MK[members], unsettled_M[members] = found

        firsts = range(0, len(query_MD), QUERIES)
        for _ in map(tile, firsts) if self._pool is None else self._pool.map(tile, firsts):
            pass
        return rows_MK, scores_MK, unsettled_M

    def _tile(
        self, query_QD: np.ndarray, start: int, end: int, k: int, allowed_R: np.ndarray, floor_Q: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        import torch

        from llmr_ray.index import int8_kernels as kernels

        code_QD, scale_Q, error_Q = quantize(query_QD)
        norm_Q = np.linalg.norm(query_QD.astype(np.float64), axis=1)
        # Both in units of the query's scale: what multiplies a document's error, and the rest of the bound.
        slope_Q = ((norm_Q + error_Q) / scale_Q).astype(np.float32)
        slack_Q = (self._largest_norm * (NORM * error_Q + ROUNDING * (norm_Q + error_Q)) / scale_Q).astype(np.float32)
        room = max(2048, 4 * k) + DOCUMENTS
        kept = _Kept(floor_Q / scale_Q - 2 * slack_Q, room, k)
        codes, queries = torch.from_numpy(self._code_ND), torch.from_numpy(code_QD)
        product = torch.empty(len(query_QD), DOCUMENTS, dtype=torch.int32)
        for first in range(start, end, DOCUMENTS):
            last = min(first + DOCUMENTS, end)
            if last - first < DOCUMENTS:
                product = torch.empty(len(query_QD), last - first, dtype=torch.int32)
            torch._int_mm(queries, codes[first:last].t(), out=product)
            kernels.scan(
                product.numpy(),
                self._scale_N[first:last],
                self._error_N[first:last],
                allowed_R[first - start : last - start],
                slope_Q,
                slack_Q,
                k,
                first,
                DOCUMENTS,
                kept.rows_QC,
                kept.upper_QC,
                kept.lower_QC,
                kept.counts_Q,
                kept.limits_Q,
                kept.thresholds_Q,
            )
        error_Q = (self._largest_norm * self._vector_ND.shape[1] * 2.0**-23 * norm_Q).astype(np.float32)
        counts_Q = kept.counts_Q
        kernels.narrow(
            self._vector_ND,
            np.ascontiguousarray(query_QD, np.float32),
            slack_Q,
            error_Q,
            k,
            kept.rows_QC,
            kept.upper_QC,
            kept.lower_QC,
            counts_Q,
            kept.thresholds_Q,
        )
        width = max(k, int(counts_Q.max(initial=0)))
        found_QC = np.full((len(query_QD), width), MISSING, np.int64)
        exact_QC = np.full((len(query_QD), width), -np.inf, np.float32)
        for number, count in enumerate(counts_Q):
            if count > 0:
                rows_C = kept.rows_QC[number, :count]
                found_QC[number, :count] = rows_C
                exact_QC[number, :count] = pair_scores(query_QD[number], self._vector_ND[rows_C])
        rows_QK, scores_QK = select_topk(found_QC, exact_QC, k)
        return rows_QK, scores_QK, counts_Q < 0


class _Kept:
    """The candidates of each query of a tile, and the threshold below which there are no more, `least_Q` or higher.

    counts_Q: how many; -1 where there was no room. limits_Q: at how many the threshold is raised next.
    """

    def __init__(self, least_Q: np.ndarray, room: int, k: int) -> None:
        num_queries = len(least_Q)
        self.rows_QC = np.empty((num_queries, room), np.int64)
        self.upper_QC = np.empty((num_queries, room), np.float32)
        self.lower_QC = np.empty((num_queries, room), np.float32)
        self.counts_Q = np.zeros(num_queries, np.int64)
        self.limits_Q = np.full(num_queries, max(k, DOCUMENTS), np.int64)
        self.thresholds_Q = np.maximum(least_Q, np.finfo(np.float32).min).astype(np.float32)


def quantize(vector_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes int8 [N, D], scales float32 [N], and the norms of what the codes leave out, rounded up: float32 [N]."""
    largest_N = np.abs(vector_ND).max(axis=1)
    scale_N = np.where(largest_N > 0, largest_N / 127, 1).astype(np.float32)
    code_ND = np.clip(np.rint(vector_ND / scale_N[:, None]), -127, 127).astype(np.int8)
    left_ND = vector_ND - code_ND * scale_N[:, None].astype(np.float64)
    error_N = (np.linalg.norm(left_ND, axis=1) * (1 + 2.0**-20)).astype(np.float32)
    return code_ND, scale_N, error_N


def open_codes(shard: Path, sha256: str, vector_ND: np.ndarray, num_threads: int, largest_norm: float = 1.0) -> Codes:
    """The codes of a shard, from the file beside it, which is made when it is missing, damaged or of another shard.

    They are derived from the shard and no part of the artifact. Where the folder cannot be written they stay in memory.

    Args:
        shard: the shard's file of vectors.
        sha256: of it.
        vector_ND: its vectors.
        num_threads: see Codes.
        largest_norm: see Codes.
    """
    path, note = shard.with_suffix(".int8"), shard.with_suffix(".int8.json")
    size, dimension = vector_ND.shape
    of = {"of": sha256, "version": _VERSION, "shape": [size, dimension]}
    if not _is_whole(path, note, of):
        if not os.access(shard.parent, os.W_OK):
            return Codes(*quantize(vector_ND), vector_ND, num_threads, largest_norm)
        with staged(path) as temporary:
            _write(vector_ND, temporary)
        write_atomic(note, canonical_json({**of, "sha256": sha256_file(path)}).encode())
    raw: np.ndarray = np.memmap(path, np.uint8, "c")
    cut = size * dimension
    scale_N, error_N = raw[cut : cut + 4 * size].view(np.float32), raw[cut + 4 * size :].view(np.float32)
    code_ND = raw[:cut].view(np.int8).reshape(size, dimension)
    return Codes(code_ND, scale_N, error_N, vector_ND, num_threads, largest_norm)


def _is_whole(path: Path, note: Path, of: dict[str, Any]) -> bool:
    if not path.exists() or not note.exists():
        return False
    try:
        known = json.loads(note.read_text())
    except ValueError:
        return False
    return {key: known.get(key) for key in of} == of and known.get("sha256") == sha256_file(path)


def _write(vector_ND: np.ndarray, path: Path) -> None:
    """The codes, the scales, then the errors; block by block."""
    rest: tuple[list[bytes], list[bytes]] = ([], [])
    with path.open("wb") as file:
        for first in range(0, len(vector_ND), _WRITE_ROWS):
            code_ND, *others = quantize(vector_ND[first : first + _WRITE_ROWS])
            file.write(code_ND.tobytes())
            for kept, values in zip(rest, others, strict=True):
                kept.append(values.tobytes())
        for kept in rest:
            file.writelines(kept)


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
