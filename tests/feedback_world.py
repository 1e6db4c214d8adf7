"""A few queries, documents and candidates as finished artifacts, for tests of LLM feedback."""

import json

from llmr_ray.artifacts import Artifact, ArtifactSpec, Counts
from llmr_ray.config import Config, DatasetConfig, LLMConfig, RuntimeConfig, TaskConfig, TaskScore
from llmr_ray.schemas import table_of

PASSAGES = [
    "Paris is the capital of France.",
    "The river runs through the old town, past the mill and the market, until it meets the sea.",
    "hello there, how are you doing today?",
    "I am fine, thank you very much.",
]


def make_config(root, *, queries_task="qa", engine="transformers", score=None, **runtime):
    feedback = score or TaskScore(feedback="rank", num_samples=4, max_new_tokens=6)
    return Config(
        datasets={"main": DatasetConfig(task=queries_task), "tools": DatasetConfig(task="tool")},
        tasks={queries_task: TaskConfig(score=feedback), "tool": TaskConfig()},
        llm=LLMConfig(model="tiny", engine=engine, max_model_tokens=128, max_candidate_tokens=40),
        runtime=RuntimeConfig(artifact_root=str(root), **({"llm_threads": 1} | runtime)),
    )


def make_artifact(root, stage, tables):
    artifact = Artifact(root, ArtifactSpec(stage=stage, version=1, config={}, inputs={}))
    artifact.begin()
    num_rows = next(iter(tables.values())).num_rows
    artifact.write_shard(0, {name: table for name, table in tables.items()}, Counts(rows_in=num_rows, ok=num_rows))
    artifact.commit(1, seconds=0)
    return artifact


def make_world(root, num_queries=3, *, task="qa", targets=("Paris", "the sea"), metas=(None,) * 4, **fields):
    """(prepare, candidates): each query of `task` has every passage as candidate; one more query is a tool's."""
    queries = [
        {"query_id": f"q{n}", "task": task, "query": f"what is number {n}?", "targets": list(targets), **fields}
        for n in range(num_queries)
    ] + [{"query_id": "t0", "task": "tool", "query": "add two numbers", "targets": []}]
    for query in queries:
        query |= {"dataset": "main", "split": "train", "pool": "p"}
    corpus = [
        {"doc_id": f"d{n}", "pool": "p", "position": n, "task": task, "text": text, "meta": meta and json.dumps(meta)}
        for n, (text, meta) in enumerate(zip(PASSAGES, metas, strict=True))
    ]
    candidates = [
        {"query_id": query["query_id"], "doc_id": document["doc_id"], "source": "bm25"}
        for query in queries
        for document in corpus
    ]
    qrels = [{"query_id": f"q{n}", "doc_id": f"d{n % 4}", "relevance": 1} for n in range(num_queries)]
    prepared = {"queries": queries, "corpus": corpus, "qrels": qrels}
    return (
        make_artifact(root, "prepare", {name: table_of(name, rows) for name, rows in prepared.items()}),
        make_artifact(root, "mine", {"candidates": table_of("candidates", candidates)}),
    )
