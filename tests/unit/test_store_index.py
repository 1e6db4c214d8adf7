"""The key index against a Python dict: the same places for the same keys, whatever came when."""

import random
from itertools import pairwise

import numpy as np
import pytest

from llmr_ray.feedback.key_index import KeyIndex
from llmr_ray.feedback.segments import Segment

EDGES = [b"\0" * 32, b"\0" * 31 + b"\1", b"\1" + b"\0" * 31, b"\xff" * 32, b"\xff" * 31 + b"\0", b"a" * 31 + b"\0"]


def segment(tmp_path, time, rows):
    return Segment(tmp_path, f"seg-{time:020d}-0-0.parquet", (0,), rows)


def looked_up(index, keys):
    found, numbers, rows = index.find(np.array(keys, "S32"))
    return {
        key: (index.segments[number].name, row)
        for key, hit, number, row in zip(keys, found, numbers, rows, strict=True)
        if hit
    }


@pytest.mark.parametrize("seed", range(20))
def test_index_is_a_dict(tmp_path, seed):
    """Runs that merge wrongly lose keys or serve an earlier answer; keys with zero bytes are where S32 misleads."""
    rng = random.Random(seed)
    pool = EDGES + [rng.randbytes(32) for _ in range(60)]
    index, expected = KeyIndex(), {}
    for _ in range(rng.randrange(1, 25)):
        batch = []
        for time in sorted(rng.sample(range(10**6), rng.randrange(4))):
            keys = rng.choices(pool, k=rng.randrange(30))
            added = segment(tmp_path, time, len(keys))
            batch.append((added, np.array(keys, "S32")))
            for row, key in enumerate(keys):
                expected[key] = max(expected.get(key, ("", 0)), (added.name, row))
        index.add(batch)
        assert looked_up(index, pool) == expected
        assert len(index) == len(expected)
    assert index.keys().tolist() == [key.rstrip(b"\0") for key in sorted(expected)]
    assert looked_up(index, pool) == expected
    names = {name for name, _ in expected.values()}
    assert all(index.serves_from({name}) == (name in names) for name in {item.name for item in index.segments})


def test_adding_one_by_one_is_not_quadratic(tmp_path):
    """Actors add 64 keys at a time; a run for each would make every lookup a search in thousands of them."""
    index, rng = KeyIndex(), random.Random(0)
    for time in range(1000):
        index.add([(segment(tmp_path, time, 4), np.array([rng.randbytes(32) for _ in range(4)], "S32"))])
    assert len(index) == 4000
    assert len(index._runs) <= np.log2(4000)
    sizes = [len(run) for run in index._runs]
    assert all(long > 2 * short for long, short in pairwise(sizes))
