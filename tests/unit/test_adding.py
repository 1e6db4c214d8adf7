"""Documents added from files and segments merged: the jobs' workers, called one after the other in this process."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from llmr_ray import cluster
from llmr_ray.artifacts import SHARD_ROWS
from llmr_ray.data.text import document_text
from llmr_ray.errors import DataError
from llmr_ray.index import adding, collection, pruning
from llmr_ray.index.filters import Comparison
from llmr_ray.index.snapshot import OpenSnapshot, current, folder_of, read_manifest
from llmr_ray.modeling.embedder import Embedder
from llmr_ray.runtime_config import RuntimeConfig
from llmr_ray.serving.canaries import canary_queries
from llmr_ray.serving.models import TextEncoder, encoder_spec
from llmr_ray.serving.settings import ServingSettings
from tests.collections_world import base_of, rows_of, write
from tests.serving_world import world
from tests.tiny import tiny_bert


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the workers of a job in this process: what Ray adds is tested in tests/ray."""

    def map_shards(shards, worker, worker_args, **options):
        made = worker(**worker_args) if shards else None
        return [made.run(shard) for shard in shards]

    monkeypatch.setattr(cluster, "map_shards", map_shards)


def everything(root: Path) -> dict[str, tuple[str | None, str | None]]:
    """Title and text of all documents that can be found, by id."""
    snapshot = OpenSnapshot(root, "c", current(folder_of(root, "c")))
    query = np.zeros((1, snapshot.dimension), np.float32)
    query[0, 0] = 1
    rows, _ = snapshot.search(query, snapshot.num_documents + 5, allowed=[None])
    assert (rows[0, snapshot.num_documents :] == -1).all()
    documents = snapshot.documents(rows[0, : snapshot.num_documents], with_text=True)
    assert len({document.doc_id for document in documents}) == snapshot.num_documents
    return {document.doc_id: (document.title, document.text) for document in documents}


def test_lengths_count_from_the_embedder_to_what_is_served(tmp_path: Path) -> None:
    """A collection of inner products, and instructions that are not pooled: one place that normalises or averages
    otherwise than the others gives scores of another model. The oracle is transformers alone."""
    root = tmp_path / "artifacts"
    config, asset = base_of(root, similarity="dot", pool_instruction=False)
    adding.add(config.runtime, "c", write(tmp_path / "new.jsonl", rows_of(0, 20)))
    place = folder_of(root, "c")
    manifest = read_manifest(place, current(place))
    encoder = TextEncoder(encoder_spec(root, manifest), ServingSettings())
    query = encoder.encode([("a b", "query : ", 8), ("a b", "a a a ", 8), ("c", "query : ", 8)])
    snapshot = OpenSnapshot(root, "c", manifest["id"])
    rows, scores = snapshot.search(query, snapshot.num_documents, allowed=[None] * 3)
    documents = snapshot.documents(rows[0], with_text=True)

    tokenizer, model = AutoTokenizer.from_pretrained(asset.path), AutoModel.from_pretrained(asset.path).eval()

    def embedded(instruction: str, text: str, limit: int) -> np.ndarray:
        ids = tokenizer(instruction + text, truncation=True, max_length=limit, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            hidden = model(ids).last_hidden_state[0]
        return hidden[len(tokenizer(instruction)["input_ids"]) - 1 if instruction else 0 :].mean(dim=0).numpy()

    asked = [embedded(*of) for of in (("query : ", "a b", 8), ("a a a ", "a b", 8), ("query : ", "c", 8))]
    np.testing.assert_allclose(query, asked, atol=1e-5)
    of_chat = {f"d{row}" for row in range(0, 300, 3)}
    tasks = ["chat" if document.doc_id in of_chat else "qa" for document in documents]
    instructions = [config.tasks[task].document_instruction for task in tasks]
    found = [embedded(before, document.text, 12) for before, document in zip(instructions, documents, strict=True)]
    np.testing.assert_allclose(scores[0], np.stack(found) @ asked[0], atol=1e-4)
    assert (np.diff(scores[0]) <= 0).all()
    assert json.loads(manifest["encoder"])["similarity"] == "dot"


def test_added_documents_are_found_and_bad_lines_counted(tmp_path: Path) -> None:
    """A document that is added without its instruction, or under another's text, is found by nobody."""
    root = tmp_path / "artifacts"
    config, asset = base_of(root)
    rows = [
        *rows_of(0, 40),
        {"doc_id": "d7", "title": "b", "text": "c d", "task": "chat"},
        {"doc_id": 12, "text": "e e", "task": "qa", "pool": "mine"},
        {"doc_id": "n3", "text": "j j j", "task": "qa"},
        {"doc_id": "x", "text": "a", "task": "other"},
        {"doc_id": "x", "text": "a"},
        {"text": "a", "task": "qa"},
        {"doc_id": "x", "text": " ", "task": "qa"},
        {"doc_id": "x", "text": "a", "task": "qa", "metadata": [1]},
        {"doc_id": "x", "text": "a", "task": "qa", "url": "u"},
        '{"doc_id": "x", "text": "a", "task": "qa", "metadata": {"v": NaN}}',
        '{"doc_id": "x", "text": "\\ud800", "task": "qa"}',
        "{",
        "[" * 100_000,
        "",
    ]
    file = write(tmp_path / "more.jsonl", rows)
    with pytest.raises(DataError, match="10 of 53 lines are bad"):
        adding.add(config.runtime, "c", file)
    done = adding.add(config.runtime, "c", file, max_bad_fraction=0.5)
    assert (done.num_added, done.num_replaced, done.num_quarantined, done.num_documents) == (42, 1, 10, 341)
    assert adding.add(config.runtime, "c", file, max_bad_fraction=0.5).snapshot == done.snapshot
    found = everything(root)
    assert found["d7"] == ("b", "c d")
    assert found["n3"] == (None, "j j j")
    assert "x" not in found

    snapshot = OpenSnapshot(root, "c", done.snapshot)
    embedder = Embedder(asset.path, max_query_tokens=8, max_document_tokens=12, precision="float32")
    for doc_id, task in (("d7", "chat"), ("12", "qa"), ("n3", "qa")):
        text = document_text(*found[doc_id])
        instruction = config.tasks[task].document_instruction
        vector = embedder.encode([text], instruction=instruction, max_tokens=12, batch_tokens=64)
        rows_QK, scores_QK = snapshot.search(vector, 5, allowed=[Comparison("doc_id", "eq", doc_id)])
        assert (rows_QK[0, 1:] == -1).all()
        np.testing.assert_allclose(scores_QK[0, 0], 1, atol=1e-5)
        assert snapshot.documents(rows_QK[0, :1], with_text=False)[0].doc_id == doc_id


def test_compacting_changes_no_result(tmp_path: Path) -> None:
    """Merging segments must neither lose a document, bring one back, nor embed anything anew."""
    root = tmp_path / "artifacts"
    config, _ = base_of(root)
    adding.add(config.runtime, "c", write(tmp_path / "a.jsonl", rows_of(0, SHARD_ROWS + 30)))
    adding.add(config.runtime, "c", write(tmp_path / "b.jsonl", rows_of(50, 20)))
    collection.delete(root, "c", [f"d{row}" for row in range(0, 300, 3)] + ["n2000"])
    queries = np.random.default_rng(0).standard_normal((20, 16)).astype(np.float32)

    def answers() -> tuple[list[list[str]], np.ndarray]:
        snapshot = OpenSnapshot(root, "c", current(folder_of(root, "c")))
        rows, scores = snapshot.search(queries, 40, allowed=[None] * 20)
        return [[document.doc_id for document in snapshot.documents(row, with_text=False)] for row in rows], scores

    before, documents = answers(), everything(root)
    done = adding.compact(config.runtime, "c")
    assert done.num_documents == len(documents)
    [entry] = [item for item in collection.snapshots(root, "c") if item["is_current"]]
    assert len(entry["segments"]) == 1
    assert entry["deleted"] is None
    assert everything(root) == documents
    ids, scores = answers()
    assert ids == before[0]
    np.testing.assert_array_equal(scores, before[1])
    assert adding.compact(config.runtime, "c").snapshot == done.snapshot
    assert adding.add(config.runtime, "c", write(tmp_path / "c.jsonl", rows_of(5000, 3))).num_added == 3


def test_the_queries_of_a_run_outlive_its_snapshots(tmp_path: Path) -> None:
    """Servers compare an old and a new snapshot by them; without, a spoiled one takes over unnoticed."""
    docs = world(tmp_path)
    spec = encoder_spec(docs.root, read_manifest(docs.collection, docs.current))
    before = canary_queries(docs.root, "docs", spec, 8)
    assert len(before) == 8
    oldest = docs.collection / "snapshots" / docs.current / "manifest.json"
    collection.delete(docs.root, "docs", ["d0-3"])
    adding.compact(RuntimeConfig(artifact_root=str(docs.root)), "docs")
    collection.delete(docs.root, "docs", ["d0-4"])
    oldest.write_text("")
    assert canary_queries(docs.root, "docs", spec, 8) == before
    oldest.unlink()
    assert len(pruning.prune(docs.root, "docs", keep=1).snapshots) == 1
    assert canary_queries(docs.root, "docs", spec, 8) == before


def test_another_model_is_refused(tmp_path: Path) -> None:
    """A model folder that was trained on since would embed the new documents into another space."""
    root = tmp_path / "artifacts"
    config, asset = base_of(root, 20)
    tiny_bert(asset.path, seed=5)
    with pytest.raises(DataError, match="not what embedded"):
        adding.add(config.runtime, "c", write(tmp_path / "a.jsonl", rows_of(0, 3)))


class Killed(BaseException):
    pass


def test_a_job_that_was_killed_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever shard it died at: what is served stays, what was done is not done again, and nothing is added twice."""
    root = tmp_path / "artifacts"
    config, _ = base_of(root, 40)
    file = write(tmp_path / "a.jsonl", rows_of(0, 2 * SHARD_ROWS + 10))
    before = current(folder_of(root, "c"))
    run_all, kills, made = cluster.map_shards, 0, []

    def dying(shards, worker, worker_args, **options):
        nonlocal kills
        records = []
        for shard in shards:
            if len(made) == kills:
                kills += 1
                raise Killed
            records += run_all([shard], worker, worker_args, **options)
            made.append((worker.__name__, shard))
        return records

    monkeypatch.setattr(cluster, "map_shards", dying)
    done = None
    while done is None:
        try:
            done = adding.add(config.runtime, "c", file)
        except Killed:
            assert current(folder_of(root, "c")) == before
            assert len(everything(root)) == 40
    assert len(made) == len(set(made)) == 8
    assert kills in (8, 9)
    assert (done.num_added, done.num_documents) == (2 * SHARD_ROWS + 10, 2 * SHARD_ROWS + 50)
