"""A made-up run in small: every task, a language model that answers by rule, and a search by brute force."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from llmr_ray.artifacts import Artifact, ArtifactSpec, Counts, seed_of
from llmr_ray.assets import Asset
from llmr_ray.config import Config, DatasetConfig, EvaluateConfig, TaskConfig
from llmr_ray.evaluation.stage import evaluate_spec, run_evaluate
from llmr_ray.feedback.requests import LLMRequest, LLMResult
from llmr_ray.index.vectors import to_table
from llmr_ray.schemas import table_of

TASKS = {
    "hotpot": "qa",
    "chitchat": "chat",
    "bfcl_memory": "chat",
    "austen": "lrlm",
    "piqa": "icl",
    "nq_open": "icl",
    "xsum": "icl",
    "bfcl": "tool",
}
NUM_QUERIES, NUM_DOCUMENTS = 12, 30
LABELLED = ("hotpot", "bfcl_memory", "bfcl")
ASKED = {name: 5 for name in TASKS if name not in ("bfcl", "bfcl_memory")}


def make_config() -> Config:
    return Config(
        name="small",
        datasets={name: DatasetConfig(task=task) for name, task in TASKS.items()},
        tasks={task: TaskConfig() for task in TASKS.values()},
        evaluate=EvaluateConfig(num_llm_queries=ASKED, bootstrap_samples=200, search_depth=20),
    )


def make_artifact(root: Path, stage: str, tables: dict[str, pa.Table], files: dict[str, str] | None = None) -> Artifact:
    spec = ArtifactSpec(stage=stage, version=1, config={}, inputs={"of": stage})
    artifact = Artifact(root, spec)
    artifact.begin()
    for name, content in (files or {}).items():
        path = artifact.file(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    rows = next(iter(tables.values())).num_rows
    artifact.write_shard(0, tables, Counts(rows_in=rows, ok=rows))
    artifact.commit(1, seconds=1.5)
    return artifact


def make_prepare(root: Path, *, rest: str = "train") -> Artifact:
    """Eight test queries of each data set; the other four are of the split `rest`."""
    queries, corpus, qrels = [], [], []
    for dataset, task in TASKS.items():
        pool = "icl" if task == "icl" else dataset
        for number in range(NUM_DOCUMENTS):
            corpus.append(
                {
                    "doc_id": f"{dataset}-d{number}",
                    "pool": pool,
                    "position": number + 1000 * list(TASKS).index(dataset),
                    "task": task,
                    "text": f"{dataset} text {number}",
                    "continuation": f" + {dataset} text {number + 1}" if task == "lrlm" else None,
                    "meta": json.dumps({"dataset": dataset}),
                }
            )
        for number in range(NUM_QUERIES):
            first = 1000 * list(TASKS).index(dataset)
            query_id = f"{dataset}/q{number}"
            queries.append(
                {
                    "query_id": query_id,
                    "task": task,
                    "dataset": dataset,
                    "split": "test" if number < 8 else rest,
                    "query": f"<b>what</b> about {dataset} text {number}?",
                    "targets": [f"answer {number}"],
                    "options": ["no", f"answer {number}"] if dataset == "piqa" else None,
                    "gold_option": 1 if dataset == "piqa" else None,
                    "context": "window " if task == "lrlm" else None,
                    "pool": pool,
                    "history_end": first + 10 + number if task in ("chat", "lrlm") else None,
                }
            )
            if dataset in LABELLED:
                qrels.append({"query_id": query_id, "doc_id": f"{dataset}-d{number}", "relevance": 1})
    corpus.sort(key=lambda row: (row["pool"], row["position"]))
    return make_artifact(
        root,
        "prepare",
        {
            "queries": table_of("queries", queries),
            "corpus": table_of("corpus", corpus),
            "qrels": table_of("qrels", qrels),
        },
    )


def make_training(root: Path) -> dict[str, Artifact]:
    """Candidates, LLM scores, rewards and a checkpoint of the training queries."""
    candidates, scores, rewards = [], [], []
    for dataset in TASKS:
        for number in range(8, NUM_QUERIES):
            for rank in range(4):
                pair = {"query_id": f"{dataset}/q{number}", "doc_id": f"{dataset}-d{number + rank}"}
                candidates.append({**pair, "source": "dense", "rank": rank + 1, "retrieval_score": 0.9 - rank / 10})
                if dataset in ("bfcl", "bfcl_memory"):
                    continue
                value = float(rank - 1) if dataset == "hotpot" else -0.1 * rank
                rewards.append({**pair, "reward": value, "reward_source": "llm"})
                scores.append(
                    {
                        **pair,
                        "scorer_id": "fake",
                        "kind": "likelihood",
                        "llm_score": -1.0 - rank,
                        "num_prompt_tokens": 9,
                        "num_target_tokens": 2,
                        "truncated": False,
                        "prompt_sha": "0",
                    }
                )
    steps = pa.table(
        {
            "step": list(range(40)),
            "dataset": [["hotpot", "austen"][step % 2] for step in range(40)],
            "task": [["qa", "lrlm"][step % 2] for step in range(40)],
            "loss": [2.0 / (step + 1) for step in range(40)],
            "learning_rate": [2e-5 * (1 - step / 40) for step in range(40)],
        }
    )
    embedder = {"embedder/config.json": "{}", "embedder/1_Pooling/config.json": "{}"}
    return {
        "candidates": make_artifact(root, "mine", {"candidates": table_of("candidates", candidates)}),
        "llm_scores": make_artifact(root, "score", {"llm_scores": table_of("llm_scores", scores)}),
        "rewards": make_artifact(root, "reward", {"rewards": table_of("rewards", rewards)}),
        "checkpoint": make_artifact(root, "train", {"steps": steps}, embedder),
    }


class Embeddings:
    """Embeddings; those of queries in an order of their own."""

    def __init__(self, name: str, prepare: Artifact) -> None:
        self.id = f"embed/{name}"
        self.spec = ArtifactSpec(
            stage="embed",
            version=1,
            config={"pooling": "mean", "precision": "float32"},
            inputs={"embedder": name},
        )
        ids = prepare.read("queries")["query_id"].to_pylist()[::-1]
        vectors = [np.random.default_rng(seed_of(name, query_id)).normal(size=4) for query_id in ids]
        documents = prepare.read("corpus")["doc_id"].to_pylist()
        document_vectors = np.random.default_rng(seed_of(name)).normal(size=(len(documents), 4)).astype(np.float32)
        self.tables = {
            "query_embeddings": to_table("query_id", ids, np.asarray(vectors, np.float32)),
            "document_embeddings": to_table("doc_id", documents, document_vectors),
        }

    def read(self, table: str) -> pa.Table:
        return self.tables[table]


def brute_force_search(config, index, query_QD, scopes_Q2, k, *, encoder=None):
    """Scores by documents drawn from the index's name; rows in the order of score, then row."""
    rows = np.full((len(query_QD), k), -1, np.int64)
    scores = np.full((len(query_QD), k), -np.inf, np.float32)
    documents = np.random.default_rng(len(index.id)).normal(size=(int(scopes_Q2.max()), 4)).astype(np.float32)
    for number, (start, end) in enumerate(scopes_Q2):
        similarity = documents[start:end] @ query_QD[number]
        order = np.argsort(-similarity, kind="stable")[:k]
        rows[number, : len(order)], scores[number, : len(order)] = order + start, similarity[order]
    return rows, scores


@dataclass
class FakeClient:
    """Answers by rule: a prompt with more documents makes the desired output likelier; some rows fail."""

    scorer_id: str = "fake"
    failing: tuple[str, ...] = ()
    calls: list[list[LLMRequest]] = field(default_factory=list)

    def answer(self, requests: Sequence[LLMRequest], *, label: str) -> list[LLMResult]:
        self.calls.append(list(requests))
        return [self._result(request) for request in requests]

    def missing(self, requests: Sequence[LLMRequest]) -> int:
        return len(requests)

    def _result(self, request: LLMRequest) -> LLMResult:
        prompt = "".join(segment.text for segment in request.segments)
        if request.request_id in self.failing:
            return LLMResult(request_id=request.request_id, error="the prompt does not fit")
        noise = np.random.default_rng(seed_of(prompt)).random()
        return LLMResult(
            request_id=request.request_id,
            token_logprobs=tuple((-1.0, -2.0 + noise + row) for row, _ in enumerate(request.targets)),
            texts=(f" answer {int(8 * noise)}",) if request.num_samples else (),
            num_prompt_tokens=len(prompt.split()),
            num_computed_tokens=10,
            cached="/none/" in request.request_id,
        )


def make_evaluation(root: Path, config: Config, prepare: Artifact, client: FakeClient) -> Artifact:
    """Runs the stage on the made-up data; `llmr_ray.evaluation.stage.search` must be brute_force_search."""
    embeddings = {name: Embeddings(name, prepare) for name in ("base", "trained", "round_1", "round_2")}
    llm = Asset(name="fake", kind="model", path=Path("."), fingerprint="fake")
    spec = evaluate_spec(config, llm, prepare, embeddings, embeddings)
    artifact = Artifact(root, spec)
    artifact.begin()
    run_evaluate(config, artifact, client, prepare, embeddings, embeddings)
    return artifact
