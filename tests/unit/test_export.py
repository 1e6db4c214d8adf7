"""`llmr export`: what is written is what other projects read, and what our readers read back is what was exported."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import DatasetCard, ModelCard
from typer.testing import CliRunner

from llmr_ray.artifacts import Artifact
from llmr_ray.cli import app
from llmr_ray.config import Config, DatasetConfig, EvaluateConfig, TaskConfig, TaskScore
from llmr_ray.data.records import Bad, Document, Query, Skip
from llmr_ray.errors import DataError
from llmr_ray.export.exporting import Exported, Finished, Wanted, export
from llmr_ray.export.training_data import training_rows
from llmr_ray.schemas import table_of
from tests.published import kinds, read
from tests.unit.evaluation_world import make_artifact

GROUPS = [
    ("q1", "qa", "nq", ["d1", "d2", "d3"], ["gold", "candidate", "candidate"], [-0.5, -2.0, None]),
    ("q2", "qa", "nq", ["d2", "d3", "d4", "d1"], ["gold", "gold", "candidate", "candidate"], [-1.0, -1.5, -3.0, -4.0]),
    ("q3", "qa", "nq", ["d4", "d2"], ["candidate", "candidate"], [-3.0, -2.0]),  # no gold document
    ("q4", "qa", "nq", ["d1", "d5"], ["gold", "candidate"], [-3.0, -2.0]),  # d5 has d1's text
    ("t1", "tool", "apis", ["a1", "a2", "a3"], ["candidate", "gold", "same_label"], None),
]
TEXTS = {"d1": "Tin a metal", "d2": "a river", "d3": "bread | cake", "d4": "ünï\ncode", "d5": "Tin a metal"}
TEXTS |= {"a1": "clock", "a2": "weather", "a3": "sun"}


def groups_table(parts: slice = slice(None)) -> pa.Table:
    return table_of(
        "groups",
        [
            {
                "query_id": query_id,
                "task": task,
                "dataset": dataset,
                "query": f"what is {query_id}?",
                "doc_ids": doc_ids,
                "docs": [TEXTS[doc_id] for doc_id in doc_ids],
                "roles": roles,
                "rewards": rewards,
                "weights": None,
            }
            for query_id, task, dataset, doc_ids, roles, rewards in GROUPS[parts]
        ],
    )


@pytest.fixture
def finished(tmp_path: Path) -> Finished:
    """A run of two data sets with its groups, rankings and an embedder's folder."""
    config = Config(
        name="small",
        datasets={"nq": DatasetConfig(task="qa"), "apis": DatasetConfig(task="tool")},
        tasks={
            "qa": TaskConfig(query_instruction="Find: ", score=TaskScore(feedback="likelihood")),
            "tool": TaskConfig(),
        },
        evaluate=EvaluateConfig(methods=["base", "trained"]),
    )
    queries, qrels, run, metrics = [], [], [], []
    for query_id, task, dataset, doc_ids, *_ in GROUPS:
        fields = {"query_id": query_id, "task": task, "dataset": dataset, "split": "test", "query": query_id}
        queries.append({**fields, "targets": ["yes"], "pool": dataset})
        qrels.append({"query_id": query_id, "doc_id": doc_ids[0], "relevance": 1})
        where = {"scenario": "s", "dataset": dataset, "measure": "nDCG@10", "query_id": query_id, "value": 1.0}
        for method, ranking in {"base": doc_ids[::-1], "trained": doc_ids}.items():
            metrics.append({**where, "method": method})
            for rank, doc_id in enumerate(ranking, 1):
                row = {"run_name": method, "query_id": query_id, "doc_id": doc_id, "rank": rank, "score": 1 / rank}
                run.append(row)
    root = tmp_path / "artifacts"
    prepared = {"queries": table_of("queries", queries), "qrels": table_of("qrels", qrels)}
    evaluated = {"run": table_of("run", run), "metrics": table_of("metrics", metrics)}
    artifacts = {
        "prepare": make_artifact(root, "prepare", prepared),
        "group": make_artifact(root, "group", {"groups": groups_table()}),
        "evaluate": make_artifact(root, "evaluate", evaluated),
        "train": make_artifact(root, "train", {"steps": pa.table({"step": [1]})}, {"embedder/config.json": "{}"}),
    }
    return Finished(config=config, artifacts=artifacts, base_model="an-owner/a-model")


def write(finished: Finished, tmp_path: Path, form: str, **settings: Any) -> tuple[Path, Exported]:
    out = tmp_path / form
    return out, export(finished, Wanted(form=form, out=out, **settings), "llmr run small.yaml")


def content(records: list[Any]) -> dict[str, Any]:
    """Each query as texts: positives, negatives in order, and the rewards by text."""
    of = {document.doc_id: document.text for document in kinds(records, Document)}
    return {
        query.query: (
            [of[doc_id] for doc_id, _ in query.qrels],
            [of[doc_id] for doc_id, _ in query.given],
            {of[doc_id]: reward for doc_id, reward in query.given_rewards},
        )
        for query in kinds(records, Query)
    }


NQ = {
    "what is q1?": (["Tin a metal"], ["a river"], {"Tin a metal": -0.5, "a river": -2.0}),
    "what is q2?": (
        ["a river", "bread | cake"],
        ["ünï\ncode", "Tin a metal"],
        {"a river": -1.0, "bread | cake": -1.5, "ünï\ncode": -3.0, "Tin a metal": -4.0},
    ),
    "what is q3?": (["a river"], ["ünï\ncode"], {"a river": -2.0, "ünï\ncode": -3.0}),
}
APIS = {"what is t1?": (["weather"], ["clock"], {})}


@pytest.mark.parametrize(
    ("form", "source", "folder"),
    [("flag_embedding", "flag_embedding", "{dataset}"), ("llm_embedder", "llm_embedder", "{task}/{dataset}")],
)
def test_rows_with_scores_are_read_back(
    finished: Finished, tmp_path: Path, form: str, source: str, folder: str
) -> None:
    """A score that stands with another document, or is lost, teaches the wrong order in silence."""
    out, done = write(finished, tmp_path, form)
    for task, dataset, wanted in (("qa", "nq", NQ), ("tool", "apis", APIS)):
        records = read(out / folder.format(task=task, dataset=dataset), source, dataset, task=task)
        assert content(records) == wanted
        assert not kinds(records, Bad)
        assert not kinds(records, Skip)
        assert {query.split for query in kinds(records, Query)} == {"train"}
    assert sorted(done.files.values()) == [1, 3]
    assert done.left_out == {
        "document_of_the_same_label": 1,
        "document_without_reward": 1,
        "group_without_negative": 1,
    }


def test_tevatron_rows_are_read_back(finished: Finished, tmp_path: Path) -> None:
    """Documents keep their ids, and those that a rule put last are negatives, for no score has to say so."""
    out, _ = write(finished, tmp_path, "tevatron")
    records = read(out / "nq", "tevatron", "nq")
    positives, negatives, rewards = content(records)["what is q1?"]
    assert (positives, negatives, rewards) == (["Tin a metal"], ["a river", "bread | cake"], {})
    assert kinds(records, Query)[0].qrels == (("nq:d1", 1),)


def test_columns_for_sentence_transformers(finished: Finished, tmp_path: Path) -> None:
    """The label's numbers stand in the order of the columns; every row of a file has the same columns."""
    out, done = write(finished, tmp_path, "sentence_transformers")
    table = pq.read_table(out / "nq" / "train.parquet")
    assert table.column_names == ["query", "positive", "negative_1", "label"]
    score_of = {(query, text): reward for query, (_, _, rewards) in NQ.items() for text, reward in rewards.items()}
    for row in table.to_pylist():
        assert row["label"] == [score_of[row["query"], row[name]] for name in ("positive", "negative_1")]
    assert table.num_rows == 4  # q2 has two positives
    assert pq.read_table(out / "apis" / "train.parquet").column_names == ["query", "positive", "negative_1"]
    out, done = write(finished, tmp_path, "sentence_transformers", num_negatives=2)
    assert (done.files, pq.read_table(out / "nq" / "train.parquet").num_rows) == ({"nq/train.parquet": 2}, 2)
    with pytest.raises(DataError, match="no group has 9"):
        write(finished, tmp_path, "sentence_transformers", num_negatives=9)


def test_a_null_reward_is_no_number() -> None:
    """JSON has no minus infinity: a trainer would stop at NaN, or read null as 0, the best of log-likelihoods."""
    left_out: Counter[str] = Counter()
    rows = list(training_rows([groups_table(slice(0, 1))], {}, left_out, needs_rewards=True))
    assert [document.doc_id for row in rows for document in row.negatives] == ["d2"]
    assert left_out["document_without_reward"] == 1


def test_mteb_reads_the_results(finished: Finished, tmp_path: Path) -> None:
    """MTEB's own class is the judge of its format."""
    results = pytest.importorskip("mteb.results.task_result")
    out, done = write(finished, tmp_path, "mteb", language="deu-Latn")
    assert set(done.files) == {"nq.json", "apis.json"}
    result = results.TaskResult.from_disk(out / "nq.json")
    assert (result.task_name, result.eval_splits, result.languages) == ("nq", ["test"], ["deu"])
    assert result.get_score() == 1.0
    write(finished, tmp_path, "mteb", method="base")
    scores = results.TaskResult.from_disk(out / "nq.json").scores["test"][0]
    # The relevant document is the last of 3, 4, 2 and 2.
    assert scores["mrr_at_10"] == pytest.approx((1 / 3 + 1 / 4 + 1 / 2 + 1 / 2) / 4)
    assert scores["recall_at_3"] == pytest.approx(3 / 4)
    with pytest.raises(DataError, match="Methods: base, trained"):
        write(finished, tmp_path, "mteb", method="bm25")


def test_trec_files(finished: Finished, tmp_path: Path) -> None:
    """Qrels and runs of each data set and method."""
    out, done = write(finished, tmp_path, "trec")
    assert done.files["nq.qrels.trec"] == 4
    assert done.files["nq.trained.run.trec"] == 11
    assert (out / "apis.base.run.trec").read_text().splitlines()[0].split()[:4] == ["t1", "Q0", "a3", "1"]


def test_cards_are_read_by_the_hub(finished: Finished, tmp_path: Path) -> None:
    """A front matter that the hub refuses makes a card that nobody finds."""
    out, _ = write(finished, tmp_path, "flag_embedding", license_name="cc-by-4.0")
    card = DatasetCard.load(out / "README.md")
    assert (card.data.license, card.data.size_categories) == ("cc-by-4.0", ["n<1K"])
    paths = [config["data_files"][0]["path"] for config in card.data.to_dict()["configs"]]
    assert all((out / path).exists() for path in paths)
    assert "document without reward" in card.text
    out, _ = write(finished, tmp_path, "model")
    model = ModelCard.load(out / "README.md")
    assert (model.data.base_model, model.data.library_name) == ("an-owner/a-model", "sentence-transformers")
    values = {(item.dataset_name, item.metric_type): item.metric_value for item in model.data.eval_results}
    assert values["nq", "ndcg_at_10"] == 1.0
    assert "Find: " in model.text
    assert json.loads((out / "config.json").read_text()) == {}


def test_the_model_card_says_how_the_model_was_trained(finished: Finished, tmp_path: Path) -> None:
    """Prompts that the folder does not hold, and a seed that was not the training's, mislead who takes it up."""
    bare = replace(finished.config, seed=7, train=replace(finished.config.train, instructions=False, seed=43))
    out, _ = write(replace(finished, config=bare), tmp_path, "model")
    told = (out / "README.md").read_text()
    assert "Find: " not in told
    assert "trained without instructions" in told
    assert "seed 43" in told


def test_what_is_missing_is_said(finished: Finished, tmp_path: Path) -> None:
    """An empty folder would look like a run without training data."""
    gone = Artifact(tmp_path / "elsewhere", finished.artifacts["group"].spec)
    lacking = Finished(config=finished.config, artifacts={**finished.artifacts, "group": gone})
    with pytest.raises(DataError, match="at least to the stage group"):
        write(lacking, tmp_path, "tevatron")
    assert not (tmp_path / "tevatron").exists()
    done = CliRunner().invoke(app, ["export", str(tmp_path / "no.yaml"), "--format", "trec"])
    assert (done.exit_code, "there is no" in done.output) == (2, True)
    done = CliRunner().invoke(app, ["export", "x.yaml", "--format", "csv"])
    assert (done.exit_code, "Formats: flag_embedding" in done.output) == (2, True)
