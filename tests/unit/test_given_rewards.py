"""Scores of a teacher that come with data: they are rewards without an LLM, and candidates need no retrieval score."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from llmr_ray.artifacts import Artifact, ArtifactSpec, Counts
from llmr_ray.config import Config, DatasetConfig, TaskConfig, TaskScore
from llmr_ray.errors import DataError
from llmr_ray.feedback.jobs import ScoreJobs, feedback_tasks
from llmr_ray.feedback.stage import reward_spec, run_reward
from llmr_ray.mining.candidates import Found, union
from llmr_ray.mining.given import GivenCandidates
from llmr_ray.schemas import table_of

CONFIG = Config(
    datasets={"nq": DatasetConfig(task="qa"), "msc": DatasetConfig(task="chat")},
    tasks={
        "qa": TaskConfig(score=TaskScore(feedback="given")),
        "chat": TaskConfig(score=TaskScore(feedback="likelihood")),
    },
)
QUERIES = [("a", "qa", "train"), ("b", "qa", "train"), ("c", "qa", "test"), ("m", "chat", "train")]
GIVEN = [("a", "d1", -0.5), ("a", "d2", -3.0), ("b", "d1", -1.0), ("c", "d1", 1.0), ("c", "d2", 2.0), ("m", "d1", 9.0)]


def artifact(root: Path, stage: str, tables: dict[str, pa.Table]) -> Artifact:
    made = Artifact(root, ArtifactSpec(stage=stage, version=1, config={}, inputs={}))
    made.begin()
    made.write_shard(0, tables, Counts())
    made.commit(1, seconds=0)
    return made


def inputs(root: Path, given: list[tuple[str, str, float]]) -> dict[str, Artifact]:
    queries = [
        {"query_id": query, "task": task, "dataset": task, "split": split, "query": "?", "targets": ["x"], "pool": "p"}
        for query, task, split in QUERIES
    ]
    tables = {"queries": table_of("queries", queries)}
    if given:
        names = ("query_id", "doc_id", "reward")
        tables["given_rewards"] = table_of("given_rewards", [dict(zip(names, row, strict=True)) for row in given])
    score = {"query_id": "m", "scorer_id": "s", "kind": "likelihood", "num_prompt_tokens": 1, "num_target_tokens": 1}
    score |= {"truncated": False, "prompt_sha": "0"}
    scores = [{**score, "doc_id": doc_id, "llm_score": value} for doc_id, value in (("d1", -1.0), ("d2", -2.0))]
    return {
        "prepare": artifact(root, "prepare", tables),
        "llm_scores": artifact(root, "score", {"llm_scores": table_of("llm_scores", scores)}),
    }


def rewards(root: Path, config: Config, of: dict[str, Artifact]) -> Artifact:
    made = Artifact(root, reward_spec(config, **of))
    made.begin()
    run_reward(config, made, **of)
    return made


def test_given_scores_are_rewards_beside_the_llm_s(tmp_path: Path) -> None:
    """A task's rewards must come from where its settings say: the data has scores for chat too, which are not asked."""
    made = rewards(tmp_path, CONFIG, inputs(tmp_path, GIVEN))
    found = {(r["query_id"], r["doc_id"]): (r["reward"], r["reward_source"]) for r in made.read("rewards").to_pylist()}
    assert found == {
        ("m", "d1"): (-1.0, "llm"),
        ("m", "d2"): (-2.0, "llm"),
        ("a", "d1"): (-0.5, "given"),
        ("a", "d2"): (-3.0, "given"),
    }
    assert made.require()["counts"]["skipped"] == {"the query has fewer than 2 rewarded documents": 1}


def test_missing_scores_of_a_teacher_stop_the_run(tmp_path: Path) -> None:
    """Without a word every query would be left out as one without rewards."""
    with pytest.raises(DataError, match="no data set brings"):
        rewards(tmp_path / "none", CONFIG, inputs(tmp_path / "none", []))
    with pytest.raises(DataError, match="no training query"):
        rewards(tmp_path / "test", CONFIG, inputs(tmp_path / "test", [("c", "d1", 1.0), ("m", "d1", 1.0)]))


def test_the_llm_is_not_asked_and_other_ids_stay(tmp_path: Path) -> None:
    """Scores that are there already must not be paid for; artifacts of earlier runs must be found again."""
    assert list(feedback_tasks(CONFIG)) == ["chat"]
    of = inputs(tmp_path, GIVEN)
    candidates = table_of(
        "candidates", [{"query_id": query, "doc_id": "d1", "source": "given"} for query in ("a", "m")]
    )
    corpus = table_of("corpus", [{"doc_id": "d1", "pool": "p", "position": 0, "task": "qa", "text": "x"}])
    assert ScoreJobs(CONFIG, of["prepare"].read("queries"), corpus, candidates).num_pairs == 1
    none = replace(CONFIG, tasks={**CONFIG.tasks, "qa": TaskConfig()})
    assert reward_spec(none, **of).config == {"kinds": {"chat": "likelihood"}}
    assert reward_spec(CONFIG, **of).id != reward_spec(none, **of).id


def given_candidates(rows: list[tuple[str, str, float | None]], corpus: list[str]) -> GivenCandidates:
    names = ("query_id", "doc_id", "retrieval_score")
    given = table_of("given", [dict(zip(names, row, strict=True)) for row in rows])
    return GivenCandidates(given, pa.chunked_array([corpus], pa.string()))


def test_given_candidates_are_each_query_s_own_in_their_order() -> None:
    """A slice that begins one pair late gives every query a document of its neighbour."""
    rng = np.random.default_rng(7)
    corpus = [f"d{number}" for number in range(40)]
    rows = [
        (f"q{query}", f"d{document}", float(np.float32(rng.normal())))
        for query in rng.permutation(12).tolist()
        for document in rng.choice(60, size=query, replace=False).tolist()
    ]
    given = given_candidates(rows, corpus)
    for query in range(13):
        own = [(document, score) for name, document, score in rows if name == f"q{query}"]
        places, scores = given.of(f"q{query}")
        assert places.dtype == np.int64
        assert places.tolist() == [corpus.index(document) if document in corpus else -1 for document, _ in own]
        assert scores.tolist() == [score for _, score in own]


def test_given_candidates_without_a_retrieval_score() -> None:
    """NaN in a table of candidates stops a run, and 0 would be a score that nobody gave."""
    rows = [("q", "d2", None), ("q", "lost", 0.5), ("q", "d1", 0.25)]
    places, scores = given_candidates(rows, ["d1", "d2"]).of("q")
    found = Found(source="given", num=3, rows=places, scores=scores)
    chosen, _ = union(gold_rows=[], self_row=None, query="?", found=[found], key_of=str)
    assert [(item.row, item.rank, item.retrieval_score) for item in chosen] == [(1, 1, None), (0, 3, 0.25)]
