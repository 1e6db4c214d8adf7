"""Published figures beside ours: what is compared, and what differs, read off the configuration."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from llmr_ray import loading
from llmr_ray.config import Config, DatasetConfig, ReportConfig, TaskConfig
from llmr_ray.errors import ConfigError
from llmr_ray.evaluation import published
from llmr_ray.evaluation.published import beside_published, check_names, differences, published_tables

CONF = Path(__file__).parents[2] / "conf"


def row(dataset, task, method, measure, mean):
    interval = [mean - 0.01, mean + 0.01]
    return {
        "dataset": dataset,
        "task": task,
        "method": method,
        "measure": measure,
        "mean": mean,
        "ci95": interval,
        "n": 9,
    }


def test_every_table_is_whole():
    """A row that lost a number would set every later figure beside another data set's."""
    for table in published_tables().values():
        assert set(table.methods) <= set(table.figures)
        for values in table.figures.values():
            assert len(values) == len(table.columns), table.name
        assert all(isinstance(values, list) for values in table.settings.values())
        assert "llm.model" in table.settings


@pytest.mark.parametrize(
    ("table", "method", "column", "value"),
    [
        ("llm_embedder_table_1", "LLM-Embedder", "QReCC", 0.505),
        ("llm_embedder_table_1", "None", "QReCC", None),
        ("llm_embedder_table_2", "Recency", "MSC", 13.957),
        ("llm_embedder_table_2", "LLM-Embedder", "PG19", 10.118),
        ("llm_embedder_table_3", "BGE", "ToolBench", 0.576),
        ("llm_embedder_table_3", "LLM-Embedder", "Average", 0.627),
        ("llm_r_main", "LLM-R it 2", "Average", 66.5),
        ("llm_r_main", "EPR", "NLI", 64.3),
        ("llm_r_table_10", "zero-shot", "NQ", 0.3),
        ("llm_r_table_10", "LLM-R it 3", "Yelp", 95.5),
    ],
)
def test_figures_as_printed(table, method, column, value):
    """Spot checks against the papers' tables, first and last columns among them."""
    found = published_tables()[table]
    names = [entry["name"] for entry in found.columns]
    assert found.figures[method][names.index(column)] == value


def test_categories_average_their_data_sets():
    """LLM-R's categories and its table of data sets check each other: to the rounding of the paper."""
    tables = published_tables()
    per_set, by_category = tables["llm_r_table_10"], tables["llm_r_main"]
    assert len(per_set.columns) == 30
    names = {"zero-shot", "BM25", "LLM-R it 2", "LLM-R it 1"}
    for method in names:
        values = per_set.figures[method]
        average = by_category.figures[method][-1]
        assert sum(values) / 30 == pytest.approx(average, abs=0.06)


def test_every_setting_of_a_set_up_exists():
    """A setting that was renamed would silently never differ."""
    config = loading.load(CONF / "llm_r.yaml")
    config = replace(
        config,
        tasks=dict.fromkeys(("qa", "chat", "lrlm", "icl"), TaskConfig()),
        datasets={task: DatasetConfig(task=task) for task in ("qa", "chat", "lrlm", "icl")},
    )
    for table in published_tables().values():
        for path in table.settings:
            assert published._setting(config, path)[1], path


@pytest.mark.parametrize("path", sorted(CONF.rglob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_config_names_tables_that_exist(path):
    names = (yaml.safe_load(path.read_text()) or {}).get("report", {}).get("reproduces", [])
    check_names(names)
    if path.parent.name == "paper" and path.stem in ("llm_embedder", "llm_r"):
        assert names


def test_an_unknown_table_is_named_before_the_run():
    """A misspelt name that shows after hours, in the report, costs the run."""
    with pytest.raises(ConfigError, match="llm_embedder_table_1"):
        check_names(["llm_embedder_table_9"])


def test_the_same_data_has_a_gap_and_other_data_says_so():
    """A dialogue set of ours beside the paper's is context; its difference is not a gap."""
    config = Config(
        datasets={"qrecc": DatasetConfig(task="convsearch"), "hotpotqa": DatasetConfig(task="qa", num_train=5)},
        report=ReportConfig(reproduces=["llm_embedder_table_1"]),
    )
    rows = [
        row("qrecc", "convsearch", "base", "nDCG@3", 0.4),
        row("qrecc", "convsearch", "round_2", "nDCG@3", 0.5),
        row("hotpotqa", "qa", "none", "EM", 0.1),
        row("mmlu", "icl", "base", "accuracy", 0.9),
    ]
    (told,) = beside_published(config, rows)
    figures = {figure["column"]: figure for figure in told["figures"]}
    assert set(figures) == {"QReCC", "PopQA"}
    assert told["missing"] == ["MMLU STEM", "MMLU Social", "MMLU Human", "MMLU Other", "MMLU All"]
    qrecc = {entry["published_method"]: entry for entry in figures["QReCC"]["methods"]}
    assert figures["QReCC"]["same_data"]
    assert qrecc["BGE"]["gap"] == pytest.approx(0.4 - 0.386)
    assert qrecc["LLM-Embedder"]["method"] == "round_2"  # what training led to
    assert (qrecc["BM25"]["published"], qrecc["BM25"]["ours"]) == (0.434, None)
    assert "None" not in qrecc
    assert (figures["PopQA"]["data"], figures["PopQA"]["same_data"]) == ("hotpotqa", False)
    assert figures["QReCC"]["published_n"] == 8209


def test_percent_and_fractions_are_on_one_scale():
    """LLM-R prints percent; ours beside it would look a hundred times worse."""
    config = Config(
        datasets={"boolq": DatasetConfig(task="icl", num_test=9)},
        report=ReportConfig(reproduces=["llm_r_table_10", "llm_r_main"]),
    )
    rows = [row("boolq", "icl", "base", "accuracy", 0.7), row("average", "icl", "base", "score", 0.7)]
    by_set, main = beside_published(config, rows)
    (figure,) = by_set["figures"]  # a data set of ours stands in for none of theirs here
    base = next(entry for entry in figure["methods"] if entry["method"] == "base")
    assert (base["ours"], base["published"], base["gap"]) == pytest.approx((70, 72.4, -2.4))
    assert base["ci95"] == pytest.approx([69, 71])
    (average,) = main["figures"]
    assert not average["same_data"]
    assert {"what": "examples that are averaged", "ours": "1 data sets", "published": "30 data sets"} in main[
        "differences"
    ]


def test_a_round_stands_beside_the_same_round_of_the_paper():
    """The embedder of a single round is compared with the first iteration, not with the second."""
    config = Config(report=ReportConfig(reproduces=["llm_r_table_10"]), datasets={"piqa": DatasetConfig(task="icl")})

    def ours(rounds, means):
        rows = [row("piqa", "icl", method, "accuracy", mean) for method, mean in means.items()]
        (table,) = beside_published(replace(config, rounds=rounds), rows)
        (figure,) = [figure for figure in table["figures"] if figure["column"] == "PIQA"]
        return {told["published_method"]: told["ours"] for told in figure["methods"] if told["ours"] is not None}

    assert ours(1, {"trained": 0.5}) == {"LLM-R it 1": 50.0}
    assert ours(2, {"round_1": 0.25, "trained": 0.5}) == {"LLM-R it 1": 25.0, "LLM-R it 2": 50.0}
    rounds = {"round_1": 0.25, "round_2": 0.375, "round_3": 0.5, "trained": 0.625}
    assert list(ours(4, rounds).values()) == [25.0, 37.5, 50.0], "the paper has no fourth"


def test_differences_are_read_off_the_configuration():
    """Reasons in free text are those that someone thought of."""
    table = published_tables()["llm_embedder_table_2"]
    paper = loading.load(CONF / "paper" / "llm_embedder.yaml")
    told = {entry["what"]: entry for entry in differences(table, paper)}
    assert "llm.model" not in told
    assert "embedder.model" not in told
    assert "train.learning_rate" not in told
    assert told["tasks.qa.score.samples"] == {"what": "tasks.qa.score.samples", "ours": "shared", "published": "fresh"}
    assert not [what for what in told if what.startswith(("training data", "further"))]
    small = {entry["what"]: entry for entry in differences(table, loading.load(CONF / "small.yaml"))}
    assert small["llm.model"]["ours"] == "smollm2-135m-instruct"
    assert small["training data msc"] == {
        "what": "training data msc",
        "ours": "not trained on",
        "published": "48,925 queries",
    }
    assert "hotpotqa (300)" in small["further training data"]["ours"]
    local = replace(paper, llm=replace(paper.llm, model="/models/Llama-2-7b-chat-hf"))
    assert "llm.model" not in {entry["what"] for entry in differences(table, local)}
    read = replace(paper, reader=replace(paper.llm, model="other"))
    assert "reader.model" in {entry["what"] for entry in differences(table, read)}


def test_report_settings_are_in_no_id():
    """A setting of the report that enters an id makes every stage run again."""
    import json

    from llmr_ray.stages import StagePlan
    from tests.unit.test_stages import CONFIG, Asset

    def ids(config):
        names = ("data", config.embedder.model, config.llm.model)
        assets = {name: Asset(name=name, kind="model", path=Path("."), fingerprint=f"of {name}") for name in names}
        return [stage.artifact.id for stage in StagePlan(config, assets, "llm", "reader").stages]

    report = ReportConfig(reproduces=["llm_r_main"], audit_queries=1, audit_megabytes=0.1)
    assert ids(CONFIG) == ids(replace(CONFIG, report=report))
    assert json.dumps(report.reproduces)
