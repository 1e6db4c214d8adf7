"""Mining end to end on made-up texts and vectors, against a naive miner."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from llmr_ray.artifacts import Artifact, ArtifactSpec, Counts
from llmr_ray.config import Config, DatasetConfig, RuntimeConfig, TaskConfig, TaskMine
from llmr_ray.errors import DataError
from llmr_ray.index.stage import index_spec, run_index
from llmr_ray.index.topk import exact_topk
from llmr_ray.index.vectors import encoder_of, to_table
from llmr_ray.mining.bm25 import bm25_topk
from llmr_ray.mining.stage import MINE_QUERIES, mine_spec, run_mine
from llmr_ray.schemas import table_of

pytestmark = pytest.mark.ray

WORDS = [f"{first}{second}{third}" for first in "bdfg" for second in "aiou" for third in "klmn"]
NUM_SHARED, NUM_TURNS = 400, 30

# The corpus lacks the second, and has the text of the first twice more.
GIVEN = [
    {"query_id": f"q{number}", "doc_id": doc_id, "retrieval_score": 9.0 - place}
    for number in range(0, MINE_QUERIES, 3)
    for place, doc_id in enumerate(["s310", "nowhere", "s320", f"s{301 + number % 7}", "s309"])
]


def config_of(runtime: RuntimeConfig, *, seed: int = 7, **changes: int) -> Config:
    return Config(
        seed=seed,
        datasets={"shared": DatasetConfig(task="qa", candidates="given"), "dialogues": DatasetConfig(task="chat")},
        tasks={
            "qa": TaskConfig(mine=TaskMine(num_given=2, num_bm25=3, num_dense=3, num_random=2, depth=20)),
            "chat": TaskConfig(mine=TaskMine(num_bm25=2, num_dense=4, depth=20)),
        },
        runtime=dataclasses.replace(runtime, **changes),
    )


def unit(rng: np.random.Generator, *shape: int) -> np.ndarray:
    vectors = rng.standard_normal(shape)
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def inputs(root: Path, runtime: RuntimeConfig) -> dict[str, Artifact]:
    """A shared pool of short texts (some twice) and ten dialogues, whose turn t may retrieve turns below t."""
    rng = np.random.default_rng(0)
    corpus = []
    for row in range(NUM_SHARED):
        text = " ".join(rng.choice(WORDS, 8)) if row % 10 else "the same text everywhere"
        corpus.append({"doc_id": f"s{row}", "pool": "a-shared", "position": row, "task": "qa", "text": text})
    for dialogue in range(10):
        for turn in range(NUM_TURNS):
            text = " ".join(rng.choice(WORDS, 8))
            name = f"b-dialogue{dialogue}"
            corpus.append({"doc_id": f"{name}-{turn}", "pool": name, "position": turn, "task": "chat", "text": text})
    queries, qrels = [], []
    for number in range(MINE_QUERIES):
        query = {"query_id": f"q{number}", "task": "qa", "dataset": "shared", "pool": "a-shared", "targets": ["x"]}
        query |= {"split": "train" if number % 8 else "dev", "query": " ".join(rng.choice(WORDS, 4))}
        if number % 5 == 0:
            query["meta"] = json.dumps({"self_doc_id": f"s{number + 1}"})
        queries.append(query)
        qrels.append({"query_id": f"q{number}", "doc_id": f"s{number}", "relevance": 1})
        qrels.append({"query_id": f"q{number}", "doc_id": f"s{number + 50}", "relevance": number % 3})
    for dialogue in range(10):
        for turn in range(NUM_TURNS):
            queries.append(
                {
                    "query_id": f"t{dialogue}-{turn}",
                    "task": "chat",
                    "dataset": "dialogues",
                    "split": "train",
                    "pool": f"b-dialogue{dialogue}",
                    "history_end": turn,
                    "query": " ".join(rng.choice(WORDS, 5)),
                    "targets": ["x"],
                }
            )
    prepare = Artifact(root, ArtifactSpec(stage="prepare", version=1, config={}, inputs={}))
    prepare.begin()
    rows = {"queries": queries, "corpus": corpus, "qrels": qrels, "given": GIVEN}
    tables = {name: table_of(name, of_table) for name, of_table in rows.items()}
    prepare.write_shard(0, tables, Counts())
    prepare.commit(1, seconds=0)

    settings = {"pooling": "mean", "precision": "float32"}
    spec = ArtifactSpec(stage="embed", version=1, config=settings, inputs={"embedder": "none"})
    embeddings = Artifact(root, spec)
    embeddings.begin()
    documents, vectors = unit(rng, len(corpus), 16), unit(rng, len(queries), 16)
    documents[:NUM_SHARED:10] = documents[0]
    vectors[10] = documents[0]
    # The rows of queries stand in another order than in `prepare`: only ids may join them.
    shuffled = rng.permutation(len(queries))
    tables = {
        "document_embeddings": to_table("doc_id", [row["doc_id"] for row in corpus], documents),
        "query_embeddings": to_table("query_id", [queries[row]["query_id"] for row in shuffled], vectors[shuffled]),
    }
    embeddings.write_shard(0, tables, Counts())
    embeddings.commit(1, seconds=0, extra={"encoder": encoder_of(embeddings)})

    config = config_of(runtime)
    index = Artifact(root, index_spec(config, embeddings))
    index.begin()
    run_index(config, index, embeddings)
    return {"prepare": prepare, "embeddings": embeddings, "index": index}


def mine(config: Config, root: Path, of: dict[str, Artifact]) -> Artifact:
    artifact = Artifact(root, mine_spec(config, **of))
    artifact.begin()
    run_mine(config, artifact, **of)
    return artifact


@pytest.fixture(scope="module")
def mined(local_ray: RuntimeConfig, tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("mine")
    of = inputs(root, local_ray)
    return root, of, mine(config_of(local_ray), root, of)


def naive_lists(of: dict[str, Artifact], query: dict, depth: int) -> dict[str, list[str]]:
    """What each retriever finds for one query when it searches only the documents that the query may see."""
    corpus = of["prepare"].read("corpus").to_pylist()
    limit = query["history_end"]
    rows = [
        row
        for row, document in enumerate(corpus)
        if document["pool"] == query["pool"] and (limit is None or document["position"] < limit)
    ]
    if not rows:
        return {"given": [], "dense": [], "bm25": []}
    documents = of["embeddings"].read("document_embeddings").to_pylist()
    vectors = {entry["query_id"]: entry["embedding"] for entry in of["embeddings"].read("query_embeddings").to_pylist()}
    scope = np.asarray([[0, len(rows)]])
    dense = exact_topk(
        np.asarray([vectors[query["query_id"]]], np.float32),
        np.asarray([documents[row]["embedding"] for row in rows], np.float32),
        scope,
        depth,
    )[0][0]
    bm25 = bm25_topk([query["query"]], [corpus[row]["text"] for row in rows], scope, depth, 0.82, 0.68)[0][0]
    given = [pair["doc_id"] for pair in GIVEN if pair["query_id"] == query["query_id"]]
    return {"given": given} | {
        name: [corpus[rows[place]]["doc_id"] for place in found if place >= 0]
        for name, found in (("dense", dense), ("bm25", bm25))
    }


def test_candidates_equal_those_of_a_naive_miner(mined) -> None:
    """Ranges, joins on ids, exclusions and order of sources, each of which fails without a sign."""
    _, of, artifact = mined
    texts = {row["doc_id"]: row["text"] for row in of["prepare"].read("corpus").to_pylist()}
    candidates = artifact.read("candidates").to_pylist()
    qrels = of["prepare"].read("qrels").to_pylist()
    queries = [row for row in of["prepare"].read("queries").to_pylist() if row["split"] == "train"]
    for query in [*queries[:60:6], *queries[-30:]]:
        own = json.loads(query["meta"])["self_doc_id"] if query["meta"] else None
        gold = [row for row in qrels if row["query_id"] == query["query_id"] and row["relevance"] > 0]
        gold_ids = [row["doc_id"] for row in sorted(gold, key=lambda row: (-row["relevance"], int(row["doc_id"][1:])))]
        expected = [("gold", doc_id) for doc_id in gold_ids]
        seen = {texts[doc_id] for doc_id in [*gold_ids, *([own] if own else [])]} | {query["query"]}
        lists = naive_lists(of, query, 20)
        wanted = {"given": 2, "dense": 3, "bm25": 3} if query["task"] == "qa" else {"dense": 4, "bm25": 2}
        for source, number in wanted.items():
            fresh = []
            for doc_id in lists[source]:
                if len(fresh) < number and doc_id in texts and texts[doc_id] not in seen:
                    seen.add(texts[doc_id])
                    fresh.append((source, doc_id))
            expected += fresh
        mine = [row for row in candidates if row["query_id"] == query["query_id"]]
        if len(expected) < 2 and query["task"] == "chat":
            assert mine == []
            continue
        assert [(row["source"], row["doc_id"]) for row in mine if row["source"] != "random"] == expected
        for row in mine:
            if row["source"] in ("given", "dense", "bm25"):
                assert lists[row["source"]][row["rank"] - 1] == row["doc_id"]
                assert row["retrieval_score"] is not None


def test_history_shows_no_future_and_few_candidates_are_counted(mined) -> None:
    """A turn that retrieves itself or later turns trains on the answer; a query dropped in silence skews a result."""
    _, of, artifact = mined
    for row in artifact.read("candidates").to_pylist():
        if row["query_id"].startswith("t"):
            dialogue, turn = row["query_id"][1:].split("-")
            pool, position = row["doc_id"].rsplit("-", 1)
            assert pool == f"b-dialogue{dialogue}"
            assert int(position) < int(turn)
    counts = artifact.require()["counts"]
    assert counts["rows_in"] == counts["ok"] + sum(counts["skipped"].values())
    assert counts["skipped"] == {"no_candidate": 10, "one_candidate": 10}
    splits = {row["query_id"]: row["split"] for row in of["prepare"].read("queries").to_pylist()}
    assert {splits[row["query_id"]] for row in artifact.read("candidates").to_pylist()} == {"train"}
    reasons = {row["reason"] for row in artifact.read("exclusions").to_pylist()}
    assert {"candidate_text", "gold_text"} <= reasons


def test_bytes_do_not_depend_on_actors_order_or_an_interruption(mined, local_ray: RuntimeConfig) -> None:
    """Candidates are what the LLM is paid for: a rerun that differs in a byte pays again."""
    root, of, artifact = mined
    before = artifact.require()["files"]
    assert artifact.require()["num_shards"] > 1
    (artifact.path / "manifest.json").unlink()
    (artifact.path / "_ledger" / "00000.json").unlink()
    again = mine(config_of(local_ray, mine_actors=1), root, of)
    assert again.id == artifact.id
    assert again.require()["files"] == before


def test_another_seed_is_another_artifact_with_other_random_candidates(mined, local_ray: RuntimeConfig) -> None:
    """The seed must reach chance and nothing else."""
    root, of, artifact = mined
    other = mine(config_of(local_ray, seed=8), root, of)
    assert other.id != artifact.id

    def rows(made: Artifact, chance: bool) -> list[tuple[str, str]]:
        table = made.read("candidates").to_pylist()
        return [(row["query_id"], row["doc_id"]) for row in table if (row["source"] == "random") == chance]

    assert rows(other, chance=False) == rows(artifact, chance=False)
    assert rows(other, chance=True) != rows(artifact, chance=True)


def test_an_index_of_other_embeddings_is_refused(mined, local_ray: RuntimeConfig, tmp_path: Path) -> None:
    """An index and query vectors of two embedders give scores without meaning."""
    _, of, _ = mined
    spec = dataclasses.replace(of["embeddings"].spec, inputs={"embedder": "another"})
    swapped = of | {"embeddings": Artifact(tmp_path, spec)}
    config = config_of(local_ray)
    with pytest.raises(DataError, match="other embeddings"):
        run_mine(config, Artifact(tmp_path, mine_spec(config, **swapped)), **swapped)
