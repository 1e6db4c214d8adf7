"""A query sees the documents of its own past, and nothing else."""

import numpy as np
import pyarrow as pa
import pytest

from llmr_ray.data.scope import scopes
from llmr_ray.errors import DataError


def corpus(rows: list[tuple[str, int]]) -> pa.Table:
    return pa.table({"pool": [pool for pool, _ in rows], "position": pa.array([at for _, at in rows], pa.int32())})


def queries(rows: list[tuple[str, int | None]]) -> pa.Table:
    return pa.table(
        {
            "query_id": [str(number) for number in range(len(rows))],
            "pool": [pool for pool, _ in rows],
            "history_end": pa.array([end for _, end in rows], pa.int32()),
        }
    )


def test_ranges_equal_a_naive_filter() -> None:
    """A range that is off by one shows a query its own answer."""
    documents = corpus([("a", 0), ("a", 1), ("a", 5), ("b", 0), ("c", 2), ("c", 3)])
    asked = queries([("a", None), ("a", 2), ("a", 5), ("a", 0), ("b", None), ("c", 3), ("c", 99)])
    got = scopes(asked, documents)
    for row, (pool, limit) in enumerate(zip(asked["pool"].to_pylist(), asked["history_end"].to_pylist(), strict=True)):
        want = [
            number
            for number, (own, at) in enumerate(
                zip(documents["pool"].to_pylist(), documents["position"].to_pylist(), strict=True)
            )
            if own == pool and (limit is None or at < limit)
        ]
        assert list(np.arange(*got[row])) == want


@pytest.mark.parametrize("rows", [[("a", 1), ("a", 0)], [("a", 0), ("b", 0), ("a", 1)], [("a", 0), ("a", 0)]])
def test_an_unsorted_corpus_is_refused(rows: list[tuple[str, int]]) -> None:
    """On an unsorted corpus a range would hold other pools' documents."""
    with pytest.raises(DataError, match="not sorted"):
        scopes(queries([("a", None)]), corpus(rows))


def test_an_unknown_pool_is_named() -> None:
    """A query without a pool would silently retrieve nothing."""
    with pytest.raises(DataError, match="pool 'z'"):
        scopes(queries([("z", None)]), corpus([("a", 0)]))
