"""Approximate indexes: FAISS structures that propose documents, which their shard then scores exactly.

The coarse quantiser and the codebooks of the ivf kinds are trained once, on a sample of the whole corpus, so the lists
of all shards together are those of one index. A graph is built per shard. Shards of few documents have no structure and
are searched exactly.
"""

from collections.abc import Callable
from math import isqrt
from pathlib import Path
from typing import Any

import faiss as _faiss
import numpy as np

from llmr_ray.artifacts import sha256_file
from llmr_ray.durable import staged
from llmr_ray.errors import ConfigError, DataError, ResourceError
from llmr_ray.index.settings import IndexConfig
from llmr_ray.index.topk import MISSING

faiss: Any = _faiss
"""Its type stubs lack much of what is used here."""

MIN_ROWS = 4096
"""Shards of fewer documents are searched exactly: that takes no longer."""

EXACT_SHARE = 0.1
"""Where filters and ranges leave a smaller share of a shard's documents, they are searched exactly: few of them would
be among the best of all."""

WIDER = 4
"""Times the effort of a search that has to look deeper than the effort was chosen for, because of a filter."""

TRAIN_ROWS_PER_LIST = 64
CODEBOOK_ROWS = 16_384
ROUNDS = 10
"""Iterations of k-means."""

HNSW_BUILD_WIDTH = 200
MOST_LISTS = 65_536

Train = Callable[[int], np.ndarray]
"""The number of rows wanted -> so many drawn from the corpus, float32 [n, D]."""


def is_approximate(settings: IndexConfig) -> bool:
    """Whether a kind only proposes documents."""
    return settings.kind != "flat"


def num_lists(settings: IndexConfig, num_rows: int) -> int:
    """Lists of an ivf index over `num_rows` documents."""
    wanted = settings.num_lists or 4 * isqrt(num_rows)
    return max(1, min(wanted, MOST_LISTS, num_rows // TRAIN_ROWS_PER_LIST))


def pq_bytes(settings: IndexConfig, dimension: int) -> int:
    """Bytes of a code; ConfigError where they do not divide the dimension."""
    wanted = settings.pq_bytes or max(size for size in range(1, max(1, dimension // 4) + 1) if dimension % size == 0)
    if dimension % wanted:
        raise ConfigError(
            f"index.pq_bytes is {wanted}, but embeddings of {dimension} values cut into that many equal pieces do not "
            "come out even. Take a divisor of the dimension, or 0."
        )
    return wanted


def refine(settings: IndexConfig) -> int:
    """Documents proposed for each one asked for."""
    return settings.refine or (10 if settings.kind == "ivf_pq" else 2)


def efforts(settings: IndexConfig, num_rows: int) -> list[int]:
    """The efforts to try, least first."""
    if settings.effort:
        return [settings.effort]
    most = num_lists(settings, num_rows) if settings.kind.startswith("ivf") else 2048
    first = 1 if settings.kind.startswith("ivf") else 16
    steps = [first << step for step in range(most.bit_length()) if first << step < most]
    return [*steps, most]


def write_trained(sample: Train, num_rows: int, dimension: int, settings: IndexConfig, seed: int, path: Path) -> None:
    """Trains what all shards share and writes it as an empty index. Nothing for kinds that share nothing."""
    if not settings.kind.startswith("ivf"):
        return
    lists = num_lists(settings, num_rows)
    quantizer = faiss.IndexFlatIP(dimension)
    if settings.kind == "ivf_sq8":
        byte = faiss.ScalarQuantizer.QT_8bit
        index = faiss.IndexIVFScalarQuantizer(quantizer, dimension, lists, byte, faiss.METRIC_INNER_PRODUCT)
    else:
        size = pq_bytes(settings, dimension)
        index = faiss.IndexIVFPQ(quantizer, dimension, lists, size, 8, faiss.METRIC_INNER_PRODUCT)
        index.pq.cp.niter, index.pq.cp.seed = ROUNDS, seed % 2**31
        index.pq.cp.max_points_per_centroid = CODEBOOK_ROWS // 256
    index.cp.niter, index.cp.seed, index.cp.spherical = ROUNDS, seed % 2**31, True
    index.cp.max_points_per_centroid = TRAIN_ROWS_PER_LIST
    index.train(sample(min(num_rows, max(lists * TRAIN_ROWS_PER_LIST, CODEBOOK_ROWS))))
    with staged(path) as temporary:
        faiss.write_index(index, str(temporary))


def write_proposals(vector_ND: np.ndarray, trained: Path, settings: IndexConfig, path: Path) -> bool:
    """Writes the structure of a shard, whose documents are numbered from 0; False where it has too few for one."""
    if len(vector_ND) < MIN_ROWS:
        return False
    if settings.kind.startswith("ivf"):
        index: Any = faiss.read_index(str(trained))
        index.add(vector_ND)
    elif settings.kind == "hnsw":
        byte = faiss.ScalarQuantizer.QT_8bit
        index = faiss.IndexHNSWSQ(vector_ND.shape[1], byte, settings.num_links, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = HNSW_BUILD_WIDTH
        index.train(vector_ND)
        index.add(vector_ND)
    else:
        index = _cagra(vector_ND, settings)
    with staged(path) as temporary:
        faiss.write_index(index, str(temporary))
    return True


def _cagra(vector_ND: np.ndarray, settings: IndexConfig) -> Any:
    """A graph built by a GPU, as an index that a CPU searches. (No machine with cuVS has run this yet.)"""
    if not hasattr(faiss, "GpuIndexCagra") or faiss.get_num_gpus() == 0:
        raise ResourceError(
            "index.kind is cagra, which a GPU builds through a faiss with cuVS, but this faiss has "
            f"{'no CAGRA' if not hasattr(faiss, 'GpuIndexCagra') else 'no GPU'}. Install faiss-gpu-cuvs in an "
            "environment of its own, or take hnsw."
        )
    config = faiss.GpuIndexCagraConfig()
    config.graph_degree = 2 * settings.num_links
    config.intermediate_graph_degree = 4 * settings.num_links
    built = faiss.GpuIndexCagra(faiss.StandardGpuResources(), vector_ND.shape[1], faiss.METRIC_INNER_PRODUCT, config)
    built.train(vector_ND)
    index = faiss.IndexHNSWCagra()
    index.base_level_only = True
    built.copyTo(index)
    return index


class Proposals:
    """The opened structure of a shard, mapped into memory.

    Args:
        path: its file.
        sha256: what the manifest says of it.
        settings: of the index.
        effort: see IndexConfig.effort.

    Raises:
        DataError: the bytes are not those that were committed.
    """

    def __init__(self, path: Path, sha256: str, settings: IndexConfig, effort: int) -> None:
        if not path.exists() or sha256_file(path) != sha256:
            raise DataError(f"{path} is missing or its bytes changed since it was committed. Build the index again.")
        is_ivf = settings.kind.startswith("ivf")
        self._index: Any = faiss.read_index(str(path), faiss.IO_FLAG_MMAP if is_ivf else faiss.IO_FLAG_MMAP_IFC)
        self._is_ivf, self.effort, self.refine = is_ivf, effort, refine(settings)

    def propose(self, query_MD: np.ndarray, num: int, width: int = 1) -> np.ndarray:
        """Rows [M, num] of the shard that may be the best, MISSING where no more were met.

        Args:
            query_MD: float32 [M, D].
            num: rows of each.
            width: so many times the effort.
        """
        if self._is_ivf:
            params: Any = faiss.SearchParametersIVF(nprobe=min(width * self.effort, self._index.nlist))
        else:
            params = faiss.SearchParametersHNSW(efSearch=max(width * self.effort, num))
        _, rows_MF = self._index.search(query_MD, num, params=params)
        found: np.ndarray = np.where(rows_MF < 0, MISSING, rows_MF)
        return found
