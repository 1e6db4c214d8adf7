"""Exact search of a range of vectors on a GPU, by FAISS.

Shape suffixes: M queries, N documents, D embedding, F fetched.
"""

import faiss
import numpy as np


class GpuRange:
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
