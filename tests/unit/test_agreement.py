"""Kendall's tau against counting pairs."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from llmr_ray.artifacts import Artifact, ArtifactSpec, Counts
from llmr_ray.config import Config, RewardModelConfig
from llmr_ray.evaluation.agreement import agree_spec, agreement_rows, rank_agreement, run_agree
from llmr_ray.index.vectors import to_table
from llmr_ray.schemas import table_of
from llmr_ray.training.pairs import is_held_out


def table(rewards):
    """{query: {document: reward}} as a table."""
    rows = [(query, doc, reward) for query, of in rewards.items() for doc, reward in of.items()]
    return pa.table(dict(zip(("query_id", "doc_id", "reward"), map(list, zip(*rows, strict=True)), strict=True)))


def brute_force(one, other):
    """Tau-b: concordant - discordant pairs over the geometric mean of the pairs that either does not tie."""
    signs = [(np.sign(one[i] - one[j]), np.sign(other[i] - other[j])) for i in range(len(one)) for j in range(i)]
    return sum(a * b for a, b in signs) / np.sqrt(sum(a != 0 for a, _ in signs) * sum(b != 0 for _, b in signs))


def test_agreement_is_tau_b_by_query():
    """Prevents ties from counting as agreement, and documents from being matched by position."""
    rng = np.random.default_rng(0)
    mine, llm = {}, {}
    for query in "abcdef":
        docs = [f"{query}{n}" for n in range(7)]
        mine[query] = dict(zip(docs, rng.integers(0, 5, 7).astype(float), strict=True))
        llm[query] = dict(zip(rng.permutation(docs), rng.integers(0, 5, 7).astype(float), strict=True))
    found = rank_agreement(table(mine), table(llm))
    assert set(found) == set("abcdef")
    for query, of in mine.items():
        expected = brute_force(list(of.values()), [llm[query][doc] for doc in of])
        assert found[query] == pytest.approx(expected, abs=1e-12)


def test_what_cannot_be_compared_is_left_out():
    """Prevents a NaN, or a 0 that nobody measured, from entering a mean."""
    mine = {"same": {"x": 1.0, "y": 2.0, "z": 9.0}, "tied": {"x": 1.0, "y": 1.0}, "one": {"x": 1.0, "y": 2.0}}
    llm = {"same": {"x": 5.0, "y": 6.0}, "tied": {"x": 1.0, "y": 2.0}, "one": {"y": 2.0, "z": 1.0}, "new": {"x": 1.0}}
    assert rank_agreement(table(mine), table(llm)) == {"same": 1.0}


def finished(root, stage, **tables):
    artifact = Artifact(root, ArtifactSpec(stage=stage, version=1, config={}, inputs={}))
    artifact.begin()
    artifact.write_shard(0, tables, Counts())
    artifact.commit(1, seconds=0)
    return artifact


def agreed(root, config, of):
    artifact = Artifact(root, agree_spec(config, **of))
    artifact.begin()
    run_agree(config, artifact, **of)
    return artifact


def test_judges_are_compared_on_queries_that_the_reward_model_did_not_see(tmp_path):
    """Prevents a reward model from being praised for what it learned by heart, and vectors of other rows."""
    rng = np.random.default_rng(0)
    config = Config(reward_model=RewardModelConfig(model="m", held_out_fraction=0.5))
    docs, queries = [f"d{n}" for n in range(9)], [f"q{n}" for n in range(12)]
    rows = [
        {
            "query_id": query,
            "task": "icl",
            "dataset": "d",
            "split": "train",
            "split_key": f"k{number // 2}",
            "query": query,
        }
        for number, query in enumerate(queries)
    ]
    prepare = finished(
        tmp_path, "prepare", queries=table_of("queries", [row | {"targets": [], "pool": "p"} for row in rows])
    )
    held_out = [row["query_id"] for row in rows if is_held_out(row, 0.5)]
    assert 2 < len(held_out) < 10
    llm = {query: {doc: float(rng.normal()) for doc in docs} for query in queries}
    good = {query: {doc: 3 * value for doc, value in of.items()} for query, of in llm.items()}
    queries_ND, docs_ND = rng.normal(size=(12, 4)), rng.normal(size=(9, 4))
    unit = {}
    for name, ids, vector_ND in (("query", queries[::-1], queries_ND), ("doc", docs[::-1], docs_ND)):
        vector_ND = (vector_ND / np.linalg.norm(vector_ND, axis=1, keepdims=True)).astype(np.float32)
        unit |= dict(zip(ids, vector_ND, strict=True))
        unit[name] = to_table(f"{name}_id", ids, vector_ND)
    judged = [
        finished(tmp_path, stage, rewards=table(of).append_column("reward_source", pa.array(["x"] * 108)))
        for stage, of in (("reward", llm), ("teach", good))
    ]
    base = finished(tmp_path, "embed", query_embeddings=unit["query"], document_embeddings=unit["doc"])
    of = {"prepare": prepare, "rewards": judged[0], "taught": judged[1], "embeddings": {"base": base}}
    artifact = agreed(tmp_path, config, of)
    assert artifact.require()["extra"]["warnings"] == []
    rows = artifact.read("agreement").to_pylist()
    assert sorted(row["query_id"] for row in rows if row["judge"] == "base") == sorted(held_out)
    for row in rows:
        query = row["query_id"]
        own = list(llm[query].values())
        other = own if row["judge"] == "reward_model" else [float(unit[query] @ unit[doc]) for doc in docs]
        assert row["tau"] == pytest.approx(brute_force(other, own), abs=1e-12)
    told = {row["judge"]: row for row in agreement_rows(artifact.read("agreement"), samples=500, seed=1)}
    assert told["reward_model"]["mean"] == pytest.approx(1.0)
    assert told["base"]["delta_vs_base"] is None
    delta = told["reward_model"]["delta_vs_base"]
    assert delta["mean"] == pytest.approx(1 - told["base"]["mean"])
    assert delta["ci95"][0] > 0
    assert delta["n"] == len(held_out)

    # Where none is held out the reward model is paid for already: the run must go on, and say what it cannot tell.
    whole = replace(config, reward_model=replace(config.reward_model, held_out_fraction=0.0))
    artifact = agreed(tmp_path, whole, of)
    assert agreement_rows(artifact.read("agreement"), samples=500, seed=1) == []
    [warning] = artifact.require()["extra"]["warnings"]
    assert "reward_model.held_out_fraction" in warning
