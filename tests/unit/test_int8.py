"""The 8-bit scan against the NumPy oracle: every id and score, whatever the vectors, ranges, filters and threads."""

from pathlib import Path

import numpy as np
import pytest

from llmr_ray.artifacts import sha256_file
from llmr_ray.index import int8, shards
from llmr_ray.index.topk import MISSING, exact_topk
from tests.unit.test_shards import corpus, unit

ROWS = 1500


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "MIN_ROWS", 300)


def opened(
    folder: Path, docs: np.ndarray, num_threads: int = 1, *, first_row: int = 0, unit_norm: bool = True
) -> shards.Shard:
    path = folder / (f"x{first_row}.faiss" if first_row else "x.faiss")
    if not path.exists():
        shards.write_shard(docs, path, unit_norm=unit_norm)
    shard = shards.Shard(path, first_row, sha256_file(path), unit_norm=unit_norm)
    shard.codes = int8.open_codes(path, sha256_file(path), shard.vector_ND, num_threads, shard.largest_norm)
    return shard


def outliers(rng: np.random.Generator) -> np.ndarray:
    """A few large values, as language models have them: one scale for the row leaves the others few levels."""
    docs = rng.standard_normal((ROWS, 48))
    docs[:, 3] += 30
    docs[::2, 7] *= 100
    return (docs / np.linalg.norm(docs, axis=1, keepdims=True)).astype(np.float32)


def drawn(rng: np.random.Generator, vectors: str) -> tuple[np.ndarray, np.ndarray]:
    """Documents of a kind, and 300 queries, some of which are documents, long, null or far from all."""
    docs = outliers(rng) if vectors in ("outliers", "long") else corpus(rng, vectors)
    if vectors == "long":
        docs *= rng.uniform(1, 90, (ROWS, 1)).astype(np.float32)
    return docs, np.concatenate(
        [unit(rng, 280, 48), docs[:10], 100 * docs[:5], np.zeros((1, 48), np.float32), -docs[:4]]
    )


Found = tuple[np.ndarray, np.ndarray]


def assert_oracle(
    found: Found, queries: np.ndarray, docs: np.ndarray, scopes: np.ndarray, k: int, allowed: np.ndarray
) -> None:
    """Rows and scores are those of a comparison with every allowed document."""
    chosen = np.flatnonzero(allowed)
    rows, scores = exact_topk(queries, docs[chosen], np.searchsorted(chosen, scopes), k)
    np.testing.assert_array_equal(found[0], np.where(rows == MISSING, MISSING, chosen[rows]))
    np.testing.assert_array_equal(found[1], scores)


@pytest.mark.parametrize("vectors", ["none", "some", "many", "near", "all", "outliers", "long"])
@pytest.mark.parametrize("num_threads", [1, 2])
def test_the_scan_equals_the_oracle(tmp_path: Path, vectors: str, num_threads: int) -> None:
    """A bound that is too narrow by a rounding loses a document once in a million searches."""
    rng = np.random.default_rng(0)
    docs, queries = drawn(rng, vectors)
    edges = np.sort(rng.integers(0, ROWS + 1, (len(queries) - 270, 2)), axis=1)
    scopes = np.concatenate([np.tile([[0, ROWS]], (265, 1)), [[0, 400]] * 5, edges])
    shard = opened(tmp_path, docs, num_threads, unit_norm=vectors != "long")
    for k in (1, 10, 300, 1100):
        assert_oracle(shard.search(queries, scopes, k), queries, docs, scopes, k, np.ones(ROWS, bool))
        allowed = rng.random(ROWS) < 0.7
        assert_oracle(shard.search(queries, scopes, k, allowed), queries, docs, scopes, k, allowed)


@pytest.mark.parametrize("vectors", ["none", "many", "near", "all", "outliers", "long"])
def test_several_shards_equal_the_oracle_though_each_knows_what_those_before_it_found(
    tmp_path: Path, vectors: str
) -> None:
    """A threshold that another shard set a rounding too high loses a document; equal ones straddle shards."""
    rng = np.random.default_rng(0)
    docs, queries = drawn(rng, vectors)
    scopes = np.concatenate([np.tile([[0, ROWS]], (250, 1)), [[300, 1300]] * 40, [[0, 350]] * 10])
    cuts = [(0, 400), (400, 401), (401, 1000), (1000, ROWS)]
    held = [opened(tmp_path, docs[a:b], first_row=a, unit_norm=vectors != "long") for a, b in cuts]
    allowed = rng.random(ROWS) < 0.7
    for k in (1, 10, 300):
        assert_oracle(shards.search_all(held, queries, scopes, k), queries, docs, scopes, k, np.ones(ROWS, bool))
        found = shards.search_all(held, queries, scopes, k, [allowed[a:b] for a, b in cuts])
        assert_oracle(found, queries, docs, scopes, k, allowed)


def test_a_floor_spares_what_is_below_it_and_nothing_else(tmp_path: Path) -> None:
    """One that were ignored would cost speed alone, which no result shows."""
    docs = unit(np.random.default_rng(0), ROWS, 48)
    queries, scopes = unit(np.random.default_rng(1), 30, 48), np.tile([[0, ROWS]], (30, 1))
    rows, scores = exact_topk(queries, docs, scopes, 100)
    found, told = opened(tmp_path, docs).search(queries, scopes, 100, floor_Q=scores[:, 19])
    np.testing.assert_array_equal(found[:, :20], rows[:, :20])
    np.testing.assert_array_equal(told[:, :20], scores[:, :20])
    assert (found[:, 99] == MISSING).all()


def test_the_scan_is_what_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mode that silently falls back to float32 is exact too, and no faster."""
    docs = unit(np.random.default_rng(0), ROWS, 48)
    shard = opened(tmp_path, docs)
    queries, scopes = unit(np.random.default_rng(1), 30, 48), np.tile([[0, ROWS]], (30, 1))
    expected = exact_topk(queries, docs, scopes, 10)
    monkeypatch.setattr(shards, "_settled", None)
    for mine, oracle in zip(shard.search(queries, scopes, 10), expected, strict=True):
        np.testing.assert_array_equal(mine, oracle)


def test_bounds_hold(tmp_path: Path) -> None:
    """The inequality itself, in double precision, for vectors with and without outliers."""
    rng = np.random.default_rng(0)
    for docs in (unit(rng, 500, 48), outliers(rng)[:500]):
        queries = unit(rng, 40, 48)
        (code, scale, error), (query_code, query_scale, query_error) = int8.quantize(docs), int8.quantize(queries)
        bounded = (query_code.astype(int) @ code.T.astype(int)) * query_scale[:, None].astype(float) * scale
        norm = np.linalg.norm(queries, axis=1)
        width = (norm + query_error)[:, None] * error + int8.NORM * query_error[:, None]
        assert (np.abs(bounded - queries.astype(float) @ docs.T.astype(float)) <= width).all()
        assert width.max() < 0.2


def test_codes_are_made_once_and_anew_when_they_do_not_fit(tmp_path: Path) -> None:
    """Codes of another shard, or with a flipped bit, lose documents without an error."""
    docs = unit(np.random.default_rng(0), ROWS, 48)
    opened(tmp_path, docs)
    path, note = tmp_path / "x.int8", tmp_path / "x.int8.json"
    whole, made = path.read_bytes(), path.stat().st_mtime_ns
    opened(tmp_path, docs)
    assert path.stat().st_mtime_ns == made
    data = bytearray(whole)
    data[100] ^= 64
    path.write_bytes(bytes(data))
    opened(tmp_path, docs)
    assert path.read_bytes() == whole
    for text in ("{", "{}", note.read_text().replace('"of":"', '"of":"0')):
        note.write_text(text)
        opened(tmp_path, docs)
        assert path.read_bytes() == whole
        assert sha256_file(path) in note.read_text()


def test_codes_without_a_place_stay_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An index on read-only storage must be searched, not repaired."""
    docs = unit(np.random.default_rng(0), ROWS, 48)
    monkeypatch.setattr("os.access", lambda *given: False)
    shard = opened(tmp_path, docs)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.faiss"]
    scopes = np.tile([[0, ROWS]], (5, 1))
    for mine, oracle in zip(shard.search(docs[:5], scopes, 7), exact_topk(docs[:5], docs, scopes, 7), strict=True):
        np.testing.assert_array_equal(mine, oracle)
