"""What a query may retrieve: one contiguous range of corpus rows.

The corpus is sorted by (pool, position). A query sees the documents of its pool whose position is below its
`history_end`, so a shared corpus, a dialogue's earlier turns and a text's earlier chunks are all `[start, end)`.
"""

import numpy as np
import pyarrow as pa

from llmr_ray.errors import DataError
from llmr_ray.frames import frame_of


def scopes(queries: pa.Table, corpus: pa.Table) -> np.ndarray:
    """The row range of each query.

    Args:
        queries: a `queries` table of Q rows.
        corpus: the columns `pool` and `position` of the whole `corpus` table, sorted by them.

    Returns:
        int64 [Q, 2]: start and end row (exclusive) in `corpus`.

    Raises:
        DataError: the corpus is not sorted, or a query's pool is not in it.
    """
    positions = corpus["position"].to_numpy()
    runs = frame_of(corpus, ["pool"]).to_series().rle().struct.unnest()
    ends = np.cumsum(runs["len"].to_numpy(), dtype=np.int64)
    starts = ends - runs["len"].to_numpy()
    where = dict(zip(runs["value"].to_list(), zip(starts.tolist(), ends.tolist(), strict=True), strict=True))
    if len(where) != len(starts) or any(
        (np.diff(positions[start:end]) <= 0).any() for start, end in zip(starts, ends, strict=True)
    ):
        raise DataError("the corpus is not sorted by (pool, position), so row ranges mean nothing. Prepare it again.")
    result = np.zeros((queries.num_rows, 2), np.int64)
    for row, (pool, limit) in enumerate(
        zip(queries["pool"].to_pylist(), queries["history_end"].to_pylist(), strict=True)
    ):
        if pool not in where:
            raise DataError(f"query {queries['query_id'][row].as_py()} searches pool '{pool}', which the corpus lacks.")
        start, end = where[pool]
        if limit is not None:
            end = start + int(np.searchsorted(positions[start:end], limit))
        result[row] = start, end
    return result
