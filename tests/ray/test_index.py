"""Embedding, indexing and the distributed search, on a random BERT of a few thousand weights."""

import dataclasses
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray

from llmr_ray.artifacts import SHARD_ROWS, Artifact, ArtifactSpec, Counts
from llmr_ray.assets import resolve
from llmr_ray.config import Config, DatasetConfig, EmbedderConfig, RuntimeConfig, TaskConfig
from llmr_ray.data.text import document_text
from llmr_ray.errors import DataError
from llmr_ray.index.rows import read_rows
from llmr_ray.index.searcher import Searcher, search
from llmr_ray.index.stage import embed_spec, index_spec, run_embed, run_index
from llmr_ray.index.topk import exact_topk
from llmr_ray.index.vectors import encoder_of, to_matrix, to_table
from llmr_ray.modeling.embedder import Embedder
from llmr_ray.schemas import table_of
from tests.tiny import tiny_bert

pytestmark = pytest.mark.ray

LETTERS = list("abcdefghij")


def config_of(runtime: RuntimeConfig, **changes: int) -> Config:
    return Config(
        datasets={"one": DatasetConfig(task="qa"), "two": DatasetConfig(task="chat")},
        tasks={
            "qa": TaskConfig(query_instruction="query : ", document_instruction="document : "),
            "chat": TaskConfig(query_instruction="a a a ", document_instruction="z z "),
        },
        embedder=EmbedderConfig(max_query_tokens=8, max_document_tokens=12, precision="float32"),
        runtime=dataclasses.replace(runtime, **changes),
    )


def prepared(root: Path, num_documents: int, num_queries: int) -> Artifact:
    rng = np.random.default_rng(0)
    documents = [
        {
            "doc_id": f"d{row}",
            "pool": "first" if row < num_documents // 2 else "second",
            "position": row,
            "task": "qa" if row % 3 else "chat",
            "title": "t" if row % 5 == 0 else None,
            "text": " ".join(rng.choice(LETTERS, 4)),
        }
        for row in range(num_documents)
    ]
    queries = [
        {
            "query_id": f"q{row}",
            "task": "qa" if row % 2 else "chat",
            "dataset": "one" if row % 2 else "two",
            "split": "test",
            "query": " ".join(rng.choice(LETTERS, 3)),
            "targets": ["a"],
            "pool": "first",
        }
        for row in range(num_queries)
    ]
    artifact = Artifact(root, ArtifactSpec(stage="prepare", version=1, config={}, inputs={}))
    artifact.begin()
    # The parts of `prepare` do not end where those of `embed` do.
    half = len(documents) // 3
    for shard, part in enumerate((documents[:half], documents[half:])):
        tables = {"corpus": table_of("corpus", part)}
        if shard == 1:
            tables["queries"] = table_of("queries", queries)
        artifact.write_shard(shard, tables, Counts(rows_in=len(part), ok=len(part)))
    artifact.commit(2, seconds=0)
    return artifact


def embedded(root: Path, vector_ND: np.ndarray) -> Artifact:
    """Embeddings made here instead of by a model; every document also is a query."""
    spec = ArtifactSpec(
        stage="embed",
        version=1,
        config={"pooling": "mean", "precision": "float32"},
        inputs={"embedder": "none"},
    )
    artifact = Artifact(root, spec)
    artifact.begin()
    ids = [str(row) for row in range(len(vector_ND))]
    tables = {
        "document_embeddings": to_table("doc_id", ids, vector_ND),
        "query_embeddings": to_table("query_id", ids, vector_ND),
    }
    artifact.write_shard(0, tables, Counts(rows_in=len(ids), ok=len(ids)))
    artifact.commit(1, seconds=0, extra={"encoder": encoder_of(artifact)})
    return artifact


def build(config: Config, root: Path, embeddings: Artifact) -> Artifact:
    artifact = Artifact(root, index_spec(config, embeddings))
    artifact.begin()
    run_index(config, artifact, embeddings)
    return artifact


def pid_of(actor: Any) -> int:
    return ray.get(actor.__ray_call__.remote(lambda self: os.getpid()))


def duplicated(num_rows: int) -> np.ndarray:
    rng = np.random.default_rng(1)
    vectors = rng.standard_normal((num_rows // 10, 24))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors[rng.integers(0, len(vectors), num_rows)].astype(np.float32)


def test_embeddings_join_their_rows_and_use_the_instruction_of_their_task(
    local_ray: RuntimeConfig, tmp_path: Path
) -> None:
    """Rows of several tasks in one shard: a mixed-up order or instruction is invisible but for worse retrieval."""
    config = config_of(local_ray)
    prepare = prepared(tmp_path, SHARD_ROWS + 40, 30)
    asset = resolve(str(tiny_bert(tmp_path / "model")))
    artifact = Artifact(tmp_path, embed_spec(config, asset, prepare))
    artifact.begin()
    run_embed(config, artifact, asset, prepare)
    assert artifact.require()["counts"]["ok"] == SHARD_ROWS + 70
    documents, queries = artifact.read("document_embeddings"), artifact.read("query_embeddings")
    assert documents["doc_id"].to_pylist() == prepare.read("corpus")["doc_id"].to_pylist()
    assert queries["query_id"].to_pylist() == prepare.read("queries")["query_id"].to_pylist()

    embedder = Embedder(asset.path, max_query_tokens=8, max_document_tokens=12, precision="float32")

    def alone(text: str, instruction: str, max_tokens: int) -> np.ndarray:
        return embedder.encode([text], instruction=instruction, max_tokens=max_tokens, batch_tokens=64)[0]

    corpus = prepare.read("corpus").to_pylist()
    for row in (0, 1, 5, SHARD_ROWS - 1, SHARD_ROWS, SHARD_ROWS + 39):
        text = document_text(corpus[row]["title"], corpus[row]["text"])
        expected = alone(text, config.tasks[corpus[row]["task"]].document_instruction, 12)
        np.testing.assert_allclose(to_matrix(documents)[row], expected, atol=1e-5)
    for row, query in list(enumerate(prepare.read("queries").to_pylist()))[::7]:
        expected = alone(query["query"], config.tasks[query["task"]].query_instruction, 8)
        np.testing.assert_allclose(to_matrix(queries)[row], expected, atol=1e-5)


def test_what_changes_embeddings_changes_their_id(local_ray: RuntimeConfig, tmp_path: Path) -> None:
    """An instruction or length that is not identity would let stale embeddings be served as fresh ones."""
    config = config_of(local_ray)
    prepare = prepared(tmp_path, 30, 5)
    asset = resolve(str(tiny_bert(tmp_path / "model")))
    tasks = config.tasks | {"qa": TaskConfig(query_instruction="other")}
    same = dataclasses.replace(config, runtime=dataclasses.replace(config.runtime, encode_batch_tokens=7))
    changed = [
        embed_spec(config, dataclasses.replace(asset, fingerprint="other"), prepare),
        embed_spec(dataclasses.replace(config, tasks=tasks), asset, prepare),
        embed_spec(dataclasses.replace(config, embedder=EmbedderConfig(max_query_tokens=9)), asset, prepare),
        embed_spec(dataclasses.replace(config, embedder=EmbedderConfig(pooling="cls")), asset, prepare),
    ]
    original = embed_spec(config, asset, prepare).id
    assert embed_spec(same, asset, prepare).id == original
    assert len({original, *(spec.id for spec in changed)}) == 5


def test_rows_are_read_across_parts(tmp_path: Path) -> None:
    """Stages cut their shards differently; rows lost or repeated at a border would shift all that follow."""
    prepare = prepared(tmp_path, 31, 5)
    whole = prepare.read("corpus")["doc_id"].to_pylist()
    for start, end in ((0, 31), (0, 10), (9, 12), (10, 31), (25, 99)):
        assert read_rows(prepare, "corpus", start, end)["doc_id"].to_pylist() == whole[start:end]
    with pytest.raises(DataError, match="none of them"):
        read_rows(prepare, "corpus", 31, 40)


@pytest.mark.parametrize(("num_shards", "num_actors"), [(1, 1), (2, 2), (3, 2)])
def test_search_equals_the_oracle_whatever_the_shards(
    local_ray: RuntimeConfig, tmp_path: Path, num_shards: int, num_actors: int
) -> None:
    """The number of shards and actors is runtime: results that depend on it could not be repeated elsewhere."""
    config = config_of(local_ray, index_shards=num_shards, index_actors=num_actors)
    docs = duplicated(900)
    embeddings = embedded(tmp_path, docs)
    index = build(config, tmp_path, embeddings)
    assert index.require()["num_shards"] == num_shards
    assert index.read("ids")["doc_id"].to_pylist() == embeddings.read("document_embeddings")["doc_id"].to_pylist()
    queries = np.concatenate([docs[::2], docs[::2], docs[::2]])
    scopes = np.sort(np.random.default_rng(2).integers(0, 901, (len(queries), 2)), axis=1)
    scopes[:700] = 0, 900
    scopes[700] = 450, 450
    found = search(config, index, queries, scopes, 50, encoder=encoder_of(embeddings))
    for mine, oracle in zip(found, exact_topk(queries, docs, scopes, 50), strict=True):
        np.testing.assert_array_equal(mine, oracle)
    nothing = search(config, index, queries[:0], scopes[:0], 5)
    assert nothing[0].shape == (0, 5)


def test_a_resumed_build_keeps_its_cuts(local_ray: RuntimeConfig, tmp_path: Path) -> None:
    """Resuming with another `index_shards` must not combine shards of two different cuts."""
    docs = duplicated(300)
    embeddings = embedded(tmp_path, docs)
    index = build(config_of(local_ray, index_shards=3), tmp_path, embeddings)
    bytes_before = index.require()["files"]
    (index.path / "manifest.json").unlink()
    (index.path / "_ledger" / "00001.json").unlink()
    (index.path / "files" / "shard-00001.faiss").unlink()
    again = build(config_of(local_ray, index_shards=2), tmp_path, embeddings)
    assert again.require()["extra"]["cuts"] == [0, 100, 200, 300]
    assert again.require()["files"] == bytes_before


def test_killed_actors_cost_no_result(local_ray: RuntimeConfig, tmp_path: Path) -> None:
    """kill -9 of a search actor, idle or at work, must neither fail a search nor lose a shard's documents."""
    config = config_of(local_ray, index_shards=2, index_actors=2)
    docs = duplicated(1000)
    index = build(config, tmp_path, embedded(tmp_path, docs))
    queries, scopes = np.tile(docs, (5, 1)), np.tile([[0, 1000]], (5000, 1))
    expected = exact_topk(docs, docs, scopes[:1000], 20)
    with Searcher(config, index) as searcher:
        victim = searcher._actors[1]
        for _ in range(2):
            os.kill(pid_of(victim), signal.SIGKILL)
            rows, scores = searcher.search(queries, scopes, 20)
            np.testing.assert_array_equal(rows, np.tile(expected[0], (5, 1)))
            np.testing.assert_array_equal(scores, np.tile(expected[1], (5, 1)))
        pending = [victim.search.remote((queries, scopes), 20) for _ in range(3)]
        os.kill(pid_of(searcher._actors[0]), signal.SIGKILL)
        ray.kill(victim, no_restart=False)
        for rows, _ in ray.get(pending):
            assert (rows[rows >= 0] >= 500).all()


def test_queries_of_another_encoder_are_refused(local_ray: RuntimeConfig, tmp_path: Path) -> None:
    """Vectors of two embedders of one size compare without an error and mean nothing."""
    config = config_of(local_ray)
    index = build(config, tmp_path, embedded(tmp_path, duplicated(50)))
    with pytest.raises(DataError, match="same encoder"):
        Searcher(config, index, encoder="another")


def test_damaged_index_is_not_searched(local_ray: RuntimeConfig, tmp_path: Path) -> None:
    """FAISS loads damaged files; the error must reach the caller instead of an endless restart of the actor."""
    config = config_of(local_ray, index_shards=1)
    index = build(config, tmp_path, embedded(tmp_path, duplicated(50)))
    path = index.file("shard-00000.faiss")
    data = bytearray(path.read_bytes())
    data[-1] ^= 8
    path.write_bytes(bytes(data))
    with pytest.raises(DataError, match="bytes changed"):
        search(config, index, duplicated(50)[:2], np.asarray([[0, 50]] * 2), 3)


def test_embeddings_without_documents_are_refused(local_ray: RuntimeConfig, tmp_path: Path) -> None:
    """An empty corpus should stop where it shows, not as missing files two stages later."""
    prepare = Artifact(tmp_path, ArtifactSpec(stage="prepare", version=1, config={}, inputs={}))
    prepare.begin()
    prepare.write_shard(
        0, {"quarantine": pa.table({"dataset": ["x"], "row": ["0"], "reason": ["r"], "excerpt": ["e"]})}, Counts()
    )
    prepare.commit(1, seconds=0)
    config = config_of(local_ray)
    asset = resolve(str(tiny_bert(tmp_path / "model")))
    with pytest.raises(DataError, match="needs documents"):
        run_embed(config, Artifact(tmp_path, embed_spec(config, asset, prepare)), asset, prepare)
