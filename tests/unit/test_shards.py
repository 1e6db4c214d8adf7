"""FAISS shards against the NumPy oracle, and the checks FAISS itself lacks."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from llmr_ray.artifacts import sha256_file
from llmr_ray.errors import DataError
from llmr_ray.index import shards
from llmr_ray.index.topk import exact_topk, merge_topk
from llmr_ray.index.vectors import to_matrix, to_table


def unit(rng: np.random.Generator, *shape: int) -> np.ndarray:
    vectors = rng.standard_normal(shape)
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def build(folder: Path, docs: np.ndarray, cuts: list[int]) -> list[shards.Shard]:
    opened = []
    for number, (start, end) in enumerate(pairwise(cuts)):
        path = folder / shards.file_name(number)
        shards.write_shard(docs[start:end], path)
        opened.append(shards.Shard(path, start, sha256_file(path)))
    return opened


def corpus(rng: np.random.Generator, duplicates: str) -> np.ndarray:
    docs = unit(rng, 1500, 48)
    if duplicates == "some":
        docs[rng.integers(0, 1500, 300)] = docs[rng.integers(0, 1500, 300)]
    elif duplicates == "many":
        docs = docs[rng.integers(0, 15, 1500)]
    elif duplicates == "near":
        # Equal up to the last bits: float32 sums cannot order them, the definition of a score can.
        docs = docs[:1] + rng.integers(-1, 2, (1500, 48)).astype(np.float32) * np.float32(2.0**-25)
    elif duplicates == "all":
        docs = np.repeat(docs[:1], 1500, axis=0)
    return docs


@pytest.mark.parametrize("duplicates", ["none", "some", "many", "near", "all"])
@pytest.mark.parametrize("cuts", [[0, 1500], [0, 700, 1500], [0, 3, 800, 1500]], ids=["1", "2", "3"])
def test_search_equals_the_oracle(tmp_path: Path, duplicates: str, cuts: list[int]) -> None:
    """Results that depend on FAISS's heap order, its rounding or the number of shards cannot be repeated."""
    rng = np.random.default_rng(0)
    docs = corpus(rng, duplicates)
    queries = np.concatenate([unit(rng, 30, 48), docs[:10]])
    edges = np.sort(rng.integers(0, 1501, (36, 2)), axis=1)
    scopes = np.concatenate([np.asarray([[0, 1500], [0, 1500], [800, 800], [699, 702]]), edges])
    opened = build(tmp_path, docs, cuts)
    for k in (1, 20, 400):
        found = merge_topk([shard.search(queries, scopes, k) for shard in opened], k)
        for mine, oracle in zip(found, exact_topk(queries, docs, scopes, k), strict=True):
            np.testing.assert_array_equal(mine, oracle)


def test_a_coarse_first_scan_does_not_change_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scan with TF32's rounding misplaces documents; the bound must make the search look wide enough."""
    rng = np.random.default_rng(1)
    docs = corpus(rng, "some")
    (shard,) = build(tmp_path, docs, [0, 1500])
    queries, scopes = unit(rng, 40, 48), np.repeat([[0, 1500]], 40, axis=0)

    def scan(query_MD, fetch, start, end):
        noise = np.random.default_rng(2).uniform(-1, 1, (len(query_MD), end - start)) * 0.01
        coarse = query_MD @ docs[start:end].T + noise
        order = np.argsort(-coarse, axis=1)[:, :fetch]
        return np.take_along_axis(coarse, order, axis=1), order, 0.02

    monkeypatch.setattr(shard, "_scan", scan)
    for mine, oracle in zip(shard.search(queries, scopes, 30), exact_topk(queries, docs, scopes, 30), strict=True):
        np.testing.assert_array_equal(mine, oracle)


@pytest.mark.parametrize("duplicates", ["none", "some", "near", "all"])
@pytest.mark.parametrize("length", [0.01, 300.0])
def test_lengths_that_count_do_not_change_what_is_exact(tmp_path: Path, duplicates: str, length: float) -> None:
    """An error bound for unit vectors is too narrow for long ones: ties would go to the wrong document."""
    rng = np.random.default_rng(0)
    docs = corpus(rng, duplicates) * np.float32(length)
    if duplicates in ("none", "some"):
        docs *= rng.uniform(0.2, 1, (1500, 1)).astype(np.float32)
        docs[3] = 0
    path = tmp_path / "x.faiss"
    shards.write_shard(docs, path, unit_norm=False)
    shard = shards.Shard(path, 0, sha256_file(path), unit_norm=False)
    queries, scopes = np.concatenate([unit(rng, 30, 48), docs[:10]]), np.repeat([[0, 1500]], 40, axis=0)
    for mine, oracle in zip(shard.search(queries, scopes, 20), exact_topk(queries, docs, scopes, 20), strict=True):
        np.testing.assert_array_equal(mine, oracle)
    assert shard.largest_norm >= np.linalg.norm(docs, axis=1).max()


def test_fillers_get_no_offset(tmp_path: Path) -> None:
    """-1 plus a shard's first row is a real, wrong document (methods.md, trap 28)."""
    docs = unit(np.random.default_rng(3), 600, 16)
    second = build(tmp_path, docs, [0, 300, 600])[1]
    rows, scores = second.search(docs[:3], np.asarray([[0, 600], [298, 302], [0, 300]]), 310)
    assert (rows[0, :300] >= 300).all()
    assert (rows[0, 300:] == -1).all()
    assert sorted(rows[1, :2].tolist()) == [300, 301]
    assert (rows[1, 2:] == -1).all()
    assert (rows[2] == -1).all()
    assert np.isneginf(scores[rows == -1]).all()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda docs: docs.__setitem__((3, 1), np.nan), "NaN"),
        (lambda docs: docs.__setitem__(5, docs[5] * 2), "unit norm"),
        (lambda docs: docs.__setitem__(7, 0), "unit norm"),
    ],
    ids=["nan", "long", "zero"],
)
def test_bad_embeddings_are_not_indexed(tmp_path: Path, spoil, message: str) -> None:
    """FAISS takes NaN rows without complaint and never finds them again."""
    docs = unit(np.random.default_rng(4), 20, 8)
    spoil(docs)
    with pytest.raises(DataError, match=message):
        shards.write_shard(docs, tmp_path / "x.faiss")
    assert list(tmp_path.iterdir()) == []


def test_an_empty_shard_is_refused(tmp_path: Path) -> None:
    """An index of nothing answers everything with nothing."""
    with pytest.raises(DataError, match="needs rows"):
        shards.write_shard(np.zeros((0, 8), np.float32), tmp_path / "x.faiss")


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    """FAISS loads 3 of 4 damaged files without an error and returns wrong neighbours."""
    path = tmp_path / "x.faiss"
    shards.write_shard(unit(np.random.default_rng(5), 50, 8), path)
    sha256 = sha256_file(path)
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(DataError, match="bytes changed"):
        shards.Shard(path, 0, sha256)


def test_nan_queries_are_refused(tmp_path: Path) -> None:
    """FAISS answers a NaN query with row -1 and score -3.4e38, which reads as the last document."""
    (shard,) = build(tmp_path, unit(np.random.default_rng(6), 50, 8), [0, 50])
    with pytest.raises(DataError, match="NaN"):
        shard.search(np.full((1, 8), np.nan, np.float32), np.asarray([[0, 50]]), 3)
    with pytest.raises(DataError, match="8 values"):
        shard.search(np.ones((1, 9), np.float32), np.asarray([[0, 50]]), 3)


def test_embeddings_survive_arrow() -> None:
    """A sliced or chunked column whose offset is ignored shifts every embedding."""
    vectors = unit(np.random.default_rng(7), 10, 4)
    table = to_table("doc_id", [f"d{row}" for row in range(10)], vectors)
    np.testing.assert_array_equal(to_matrix(table), vectors)
    np.testing.assert_array_equal(to_matrix(table.slice(3, 4)), vectors[3:7])
    assert to_matrix(table.slice(0, 0)).shape == (0, 4)
    with pytest.raises(DataError, match="fixed_size_list"):
        to_matrix(table.set_column(1, "embedding", table["embedding"].cast(pa.list_(pa.float32()))))


@pytest.mark.parametrize("share", [0.0, 0.002, 0.3, 0.51, 0.98, 1.0])
@pytest.mark.parametrize("duplicates", ["none", "many"])
def test_only_what_is_allowed_is_found(tmp_path: Path, share: float, duplicates: str) -> None:
    """A search that filters what it found returns too few; one that copies all it allows is slow where that is most."""
    rng = np.random.default_rng(8)
    docs = corpus(rng, duplicates)
    queries = np.concatenate([unit(rng, 20, 48), docs[:10]])
    allowed = rng.random(1500) < share
    # The best of the last queries are all forbidden: what is fetched at first holds none that may be found.
    allowed[np.argsort(-(docs @ docs[0]))[:400]] &= share == 1.0
    scopes = np.concatenate([np.tile([[0, 1500]], (28, 1)), [[10, 20], [600, 1400]]])
    opened = build(tmp_path, docs, [0, 700, 1500])
    rows_of = np.flatnonzero(allowed)
    narrowed = np.searchsorted(rows_of, scopes)
    for k in (1, 20, 900):
        parts = [
            shard.search(queries, scopes, k, allowed[start:][: shard.num_rows])
            for shard, start in zip(opened, (0, 700), strict=True)
        ]
        rows, scores = merge_topk(parts, k)
        if not len(rows_of):
            assert (rows == -1).all()
            continue
        oracle_rows, oracle_scores = exact_topk(queries, docs[rows_of], narrowed, k)
        np.testing.assert_array_equal(rows, np.where(oracle_rows == -1, -1, rows_of[oracle_rows]))
        np.testing.assert_array_equal(scores, oracle_scores)
