"""Choices are made on development queries: which queries are evaluated, and that every page says so."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from llmr_ray import loading
from llmr_ray.config import ReportConfig
from llmr_ray.errors import ConfigError
from llmr_ray.evaluation.report import print_table, write_report
from llmr_ray.planning.hardware import Assumptions
from llmr_ray.planning.stages import plan
from tests.unit import evaluation_world as world

CONF = Path(__file__).parents[2] / "conf"


def evaluated(root: Path, split: str, patch: pytest.MonkeyPatch):
    """The made-up world, with four development queries of each data set, evaluated on a split."""
    patch.setattr("llmr_ray.evaluation.stage.search", world.brute_force_search)
    config = world.make_config()
    config = replace(config, evaluate=replace(config.evaluate, split=split))
    prepare = world.make_prepare(root, rest="dev")
    return config, prepare, world.make_evaluation(root, config, prepare, world.FakeClient())


def test_development_queries_take_the_place_of_test_queries(tmp_path, monkeypatch):
    """One test query among them, and a choice made on them has seen the test split."""
    _, prepare, on_dev = evaluated(tmp_path, "dev", monkeypatch)
    _, _, on_test = evaluated(tmp_path, "test", monkeypatch)
    split_of = {row["query_id"]: row["split"] for row in prepare.read("queries").to_pylist()}
    for artifact, split in ((on_dev, "dev"), (on_test, "test")):
        for table in ("metrics", "run", "answers"):
            found = set(artifact.read(table)["query_id"].to_pylist())
            assert {split_of[query_id] for query_id in found} == {split}, table
    assert on_dev.id != on_test.id
    # Runs from before the setting are evaluated already.
    assert "split" not in on_test.spec.config["evaluate"]


def test_a_report_says_whose_figures_it_shows(tmp_path, monkeypatch):
    """Figures of development queries beside published ones would pass for a reproduction."""
    config, prepare, artifact = evaluated(tmp_path, "dev", monkeypatch)
    results = write_report(
        run_dir=tmp_path / "run",
        config=replace(config, report=ReportConfig(reproduces=["llm_r_table_10"])),
        artifacts={"prepare": prepare, "evaluate": artifact},
        stages=[],
        command="llmr run x",
        commit="abc",
    )
    assert results["split"] == json.loads((tmp_path / "run" / "results.json").read_text())["split"] == "dev"
    assert "published" not in results
    assert "<dd>development queries</dd>" in (tmp_path / "run" / "report.html").read_text()
    told = io.StringIO()
    print_table(results, Console(file=told, width=200))
    assert "development figures" in told.getvalue()


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("llm_r", ["evaluate.split=train"], "must be test or dev"),
        ("llm_r", ["evaluate.split=dev"], "no data set has development queries"),
        (
            "quickstart",
            ["evaluate.split=dev", "datasets.hotpotqa.num_dev=9", "evaluate.qa_protocols={hotpotqa: nq}"],
            "demonstrations of the development split, with their answers",
        ),
    ],
)
def test_what_cannot_be_evaluated_is_refused_at_the_start(name, overrides, message):
    with pytest.raises(ConfigError, match=message):
        loading.load(CONF / f"{name}.yaml", overrides)


def test_a_plan_counts_the_queries_that_are_evaluated():
    """`llmr plan` must not promise the hours of the test split for a run on the development split."""
    path, dev = CONF / "llm_r.yaml", ["evaluate.split=dev", "datasets.piqa.num_dev=30"]
    prompts = {work.stage: work.units for work in plan(loading.load(path, dev), Assumptions())}
    assert prompts["evaluate"] == 30  # the second round's embedder alone: the others' answers are kept
