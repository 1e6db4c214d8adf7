"""Approximate indexes: what they propose is scored, filtered and merged exactly, and how much they miss is measured."""

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmr_ray import cluster
from llmr_ray.artifacts import Artifact
from llmr_ray.config import Config, RuntimeConfig
from llmr_ray.errors import ConfigError, DataError, ResourceError
from llmr_ray.index import approximate, collection, recall, shards
from llmr_ray.index.filters import Comparison
from llmr_ray.index.settings import IndexConfig
from llmr_ray.index.snapshot import OpenSnapshot, current, folder_of
from llmr_ray.index.stage import index_spec, run_index
from llmr_ray.index.topk import MISSING, exact_topk, merge_topk, pair_scores
from llmr_ray.serving.engine import Found, LocalShards
from llmr_ray.serving.settings import ServingSettings
from tests.collections_world import document, indexed, unit

KINDS = ("ivf_sq8", "ivf_pq", "hnsw")
ROWS, DIMENSION = 2400, 16


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small shards have structures too, and jobs run in this process."""
    monkeypatch.setattr(approximate, "MIN_ROWS", 500)

    def map_shards(shards, worker, worker_args, **options):
        made = worker(**worker_args) if shards else None
        return [made.run(shard) for shard in shards]

    monkeypatch.setattr(cluster, "map_shards", map_shards)


def corpus() -> np.ndarray:
    """Clusters with many equal vectors."""
    rng = np.random.default_rng(0)
    docs = unit(rng, 40, DIMENSION)[rng.integers(0, 40, ROWS)] + 0.15 * rng.standard_normal((ROWS, DIMENSION))
    docs[rng.integers(0, ROWS, 300)] = docs[rng.integers(0, ROWS, 300)]
    return (docs / np.linalg.norm(docs, axis=1, keepdims=True)).astype(np.float32)


def built(
    root: Path, docs: np.ndarray, num_shards: int = 2, similarity: str = "cosine", **settings: object
) -> Artifact:
    config = Config(index=IndexConfig(**settings), runtime=RuntimeConfig(index_shards=num_shards))
    rows = [document(f"d{row}", row, meta=json.dumps({"n": row})) for row in range(len(docs))]
    flat = indexed(root, docs, rows, **({} if similarity == "cosine" else {"similarity": similarity}))
    embeddings = Artifact.found(root, flat.spec.inputs["embeddings"])
    index = Artifact(root, index_spec(config, embeddings))
    if index.id == flat.id:
        return flat
    index.begin()
    run_index(config, index, embeddings)
    return index


def searched(index: Artifact, queries: np.ndarray, scopes: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    opened = shards.open_shards(index, range(index.require()["num_shards"]))
    assert all(shard.proposals is not None for shard in opened)
    return merge_topk([shard.search(queries, scopes, k) for shard in opened], k)


@pytest.mark.parametrize("kind", ["ivf_sq8", "hnsw"])
def test_vectors_of_any_length_are_found_by_inner_product(tmp_path: Path, kind: str) -> None:
    """Lists by direction alone must not lose long vectors of another direction without that being measured."""
    docs = corpus() * np.random.default_rng(2).uniform(2, 6, (ROWS, 1)).astype(np.float32)
    index = built(tmp_path, docs, kind=kind, similarity="dot")
    assert index.require()["extra"]["recall"]["recall@10"] >= 0.95
    queries = docs[:50]
    rows, scores = searched(index, queries, np.tile([[0, ROWS]], (50, 1)), 10)
    exact = exact_topk(queries, docs, np.tile([[0, ROWS]], (50, 1)), 10)[1]
    assert (scores >= exact[:, -1:]).mean() >= 0.9
    for query, found, score in zip(queries, rows, scores, strict=True):
        np.testing.assert_array_equal(score, pair_scores(query, docs[found]))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_found_has_its_exact_score_and_the_recall_is_true(tmp_path: Path, kind: str) -> None:
    """Scores of codes compare with no other shard's; a recall that is not measured is a guess."""
    docs = corpus()
    index = built(tmp_path, docs, kind=kind)
    figures = index.require()["extra"]["recall"]
    assert figures["queries"] == "documents"
    assert figures["recall@10"] >= 0.95
    queries = docs[:50] + 0.02 * unit(np.random.default_rng(1), 50, DIMENSION)
    scopes = np.tile([[0, ROWS]], (50, 1))
    rows, scores = searched(index, queries, scopes, 10)
    oracle = exact_topk(queries, docs, scopes, 10)[1]
    for query, found, score in zip(queries, rows, scores, strict=True):
        assert len(set(found.tolist())) == 10
        np.testing.assert_array_equal(score, pair_scores(query, docs[found]))
        assert (np.diff(score) <= 0).all()
    assert (scores >= oracle[:, -1:]).mean() > 0.8
    # Measured again by hand on the sample that the build drew.
    embeddings = Artifact.found(tmp_path, index.spec.inputs["embeddings"])
    sample = recall.sample_documents(embeddings, recall.NUM_QUERIES, 42)
    scopes = np.tile([[0, ROWS]], (len(sample), 1))
    mine, exact = searched(index, sample, scopes, 10)[1], exact_topk(sample, docs, scopes, 10)[1]
    share = np.mean([[score >= best[-1] for score in found] for found, best in zip(mine, exact, strict=True)])
    assert round(share, 4) == figures["recall@10"]


@pytest.mark.parametrize("kind", KINDS)
def test_ranges_filters_and_fillers(tmp_path: Path, kind: str) -> None:
    """FAISS pads with -1 where the lists it looked into run dry; a filter must not make that worse."""
    docs = corpus()
    index = built(tmp_path, docs, kind=kind, effort=1, least_recall=0.0)
    queries = unit(np.random.default_rng(1), 8, DIMENSION)
    scopes = np.asarray([[0, ROWS], [100, 130], [0, 0], [5, 6], [1100, 1300], [0, 2000], [1, ROWS], [3, 400]])
    for k in (3, 150, 3000):
        rows, scores = searched(index, queries, scopes, k)
        for number, (start, end) in enumerate(scopes):
            real = rows[number][rows[number] != MISSING]
            assert len(real) == min(k, end - start) == len(set(real.tolist()))
            assert ((real >= start) & (real < end)).all()
            assert np.isneginf(scores[number, len(real) :]).all()
        small = [1, 2, 3, 4]
        oracle = exact_topk(queries[small], docs, scopes[small], k)
        np.testing.assert_array_equal(rows[small], oracle[0])

    collection.create(tmp_path, "c", index.id, model="model")
    collection.delete(tmp_path, "c", [f"d{row}" for row in range(0, ROWS, 2)])
    snapshot = OpenSnapshot(tmp_path, "c", current(folder_of(tmp_path, "c")))
    assert snapshot.manifest["kind"] == kind
    rows, _ = snapshot.search(
        queries, 40, allowed=[None, Comparison("n", "lt", 1500), Comparison("n", "lt", 30)] * 2 + [None] * 2
    )
    assert (rows[[0, 1, 3, 4]] % 2 == 1).all()
    assert (rows[[1, 4]] < 1500).all()
    for number in (2, 5):
        allowed = np.arange(1, 30, 2)
        oracle = exact_topk(queries[number : number + 1], docs[allowed], np.asarray([[0, 15]]), 15)[0][0]
        np.testing.assert_array_equal(rows[number], [*allowed[oracle], *[MISSING] * 25])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_a_filter_by_meaning_costs_no_recall(tmp_path: Path, kind: str, share: float) -> None:
    """A tenant or a language is a region of the space. Questions from outside it, whose nearest allowed documents are
    far, would get those that a walk or a list happens to hold."""
    rng = np.random.default_rng(0)
    centres = unit(rng, 80, DIMENSION)
    docs = np.repeat(centres, ROWS // 80, axis=0) + 0.1 * rng.standard_normal((ROWS, DIMENSION))
    docs = (docs / np.linalg.norm(docs, axis=1, keepdims=True)).astype(np.float32)
    collection.create(tmp_path, "c", built(tmp_path, docs, num_shards=1, kind=kind).id, model="model")
    snapshot = OpenSnapshot(tmp_path, "c", current(folder_of(tmp_path, "c")))
    queries = docs[:: ROWS // 80]
    num = int(share * ROWS)
    _, scores = snapshot.search(queries, 10, allowed=[Comparison("n", "lt", num)] * 80)
    oracle = exact_topk(queries, docs[:num], np.tile([[0, num]], (80, 1)), 10)[1]
    found_share_Q = (scores >= oracle[:, -1:]).mean(axis=1)
    assert found_share_Q.mean() >= 0.95
    assert found_share_Q.min() >= 0.5


@pytest.mark.parametrize("kind", ["flat", *KINDS])
def test_an_answer_does_not_depend_on_who_asks_beside(tmp_path: Path, kind: str) -> None:
    """A server searches concurrent queries together. A neighbour who wants more results has more proposed to it."""
    docs = unit(np.random.default_rng(0), ROWS, DIMENSION)
    least = {} if kind == "flat" else {"effort": 2, "least_recall": 0.0}
    collection.create(tmp_path, "c", built(tmp_path, docs, kind=kind, **least).id, model="model")
    snapshot = current(folder_of(tmp_path, "c"))
    group = LocalShards(tmp_path, ServingSettings(collection="c"))
    queries = unit(np.random.default_rng(1), 20, DIMENSION)
    depths = [10] * 15 + [50, 3, 10, 200, 50]

    async def alone() -> list[Found]:
        return [await group.search(snapshot, queries[at : at + 1], k, [None]) for at, k in enumerate(depths)]

    async def together() -> list[Found]:
        searches = [group.search(snapshot, queries[at : at + 1], k, [None]) for at, k in enumerate(depths)]
        return await asyncio.gather(*searches)

    calls = []
    search = OpenSnapshot.search

    def noting(self: OpenSnapshot, query_QD: np.ndarray, k: int, **options: Any) -> Any:
        calls.append(k)
        return search(self, query_QD, k, **options)

    singles = asyncio.run(alone())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OpenSnapshot, "search", noting)
        batched = asyncio.run(together())
    for one, other, k in zip(singles, batched, depths, strict=True):
        assert one[0].shape == (1, k)
        np.testing.assert_array_equal(one[0], other[0])
        np.testing.assert_array_equal(one[1], other[1])
    # An exact kind, whose answers begin alike, is searched once for all.
    assert sorted(calls) == ([200] if kind == "flat" else [3, 10, 50, 200])


def test_searching_everything_is_exact(tmp_path: Path) -> None:
    """At full effort an ivf index leaves out nothing but what its codes misjudge by more than is refined."""
    docs = corpus()
    index = built(tmp_path, docs, kind="ivf_sq8", num_lists=9, effort=9)
    queries = unit(np.random.default_rng(1), 30, DIMENSION)
    scopes = np.tile([[0, ROWS]], (30, 1))
    for mine, oracle in zip(searched(index, queries, scopes, 20), exact_topk(queries, docs, scopes, 20), strict=True):
        np.testing.assert_array_equal(mine, oracle)
    exact = shards.open_shards(index, range(2), how=shards.Opening(exact=True))
    assert all(shard.proposals is None for shard in exact)


def test_a_recall_too_low_fails_the_build(tmp_path: Path) -> None:
    """An index that loses a fifth of the documents looks like a bad embedder."""
    docs = unit(np.random.default_rng(0), ROWS, DIMENSION)
    with pytest.raises(DataError, match=r"index\.effort.*index\.refine"):
        built(tmp_path, docs, kind="ivf_sq8", num_lists=30, effort=1, least_recall=0.99)
    with pytest.raises(DataError, match=r"pq_bytes"):
        built(tmp_path, docs, kind="ivf_pq", num_lists=1, pq_bytes=1, refine=1, least_recall=1.0)
    assert len(list(tmp_path.glob("index/*/manifest.json"))) == 1  # of the exact one beside


def test_small_shards_are_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists over a handful of documents cost more than they save, and k-means needs points."""
    monkeypatch.setattr(approximate, "MIN_ROWS", 4096)
    docs = unit(np.random.default_rng(0), 30, DIMENSION)
    for kind in KINDS:
        index = built(tmp_path, docs, kind=kind)
        assert index.require()["extra"]["recall"]["recall@10"] == 1.0
        opened = shards.open_shards(index, [0, 1])
        assert all(shard.proposals is None for shard in opened)


def test_a_resumed_build_trains_and_measures_once(tmp_path: Path) -> None:
    """Other lists after a kill would leave shards that do not fit together."""
    docs = corpus()
    index = built(tmp_path, docs, num_shards=3, kind="ivf_sq8")
    before = index.require()
    trained = (index.file("trained.faiss").stat().st_mtime_ns, index.file("trained.faiss").read_bytes())
    (index.path / "manifest.json").unlink()
    (index.path / "_ledger" / "00001.json").unlink()
    index.file("proposals-00001.faiss").unlink()
    (index.path / "recall.json").unlink()
    again = built(tmp_path, docs, num_shards=3, kind="ivf_sq8")
    assert (again.file("trained.faiss").stat().st_mtime_ns, again.file("trained.faiss").read_bytes()) == trained
    assert again.require()["files"] == before["files"]
    assert again.require()["extra"] == before["extra"]


def test_damaged_proposals_are_noticed(tmp_path: Path) -> None:
    """A flipped bit in a list's document number is a wrong document."""
    index = built(tmp_path, corpus(), kind="hnsw")
    path = index.file("proposals-00000.faiss")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(bytes(data))
    with pytest.raises(DataError, match="bytes changed"):
        shards.open_shards(index, [0])


def test_the_id_of_an_exact_index_is_that_of_its_embeddings_alone(tmp_path: Path) -> None:
    """Indexes built before there were kinds must still be found, and settings of other kinds change nothing."""
    flat = indexed(tmp_path, corpus())
    embeddings = Artifact.found(tmp_path, flat.spec.inputs["embeddings"])
    assert flat.spec.config == {}
    assert index_spec(Config(index=IndexConfig(num_lists=3), seed=7), embeddings).id == flat.id
    ids = {
        index_spec(Config(index=IndexConfig(**settings), seed=seed), embeddings).id
        for settings in ({"kind": "ivf_sq8"}, {"kind": "ivf_sq8", "refine": 3}, {"kind": "hnsw"})
        for seed in (1, 2)
    }
    assert len(ids) == 6


def test_what_cannot_be_built_says_why(tmp_path: Path) -> None:
    """An odd code size fails inside FAISS with a C++ assertion; a GPU's graph has no GPU here."""
    with pytest.raises(ConfigError, match="pq_bytes"):
        built(tmp_path, corpus(), kind="ivf_pq", pq_bytes=5)
    with pytest.raises(ResourceError, match="hnsw"):
        built(tmp_path, corpus(), kind="cagra")
