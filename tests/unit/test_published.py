"""Published figures beside ours: what is compared, and what differs, read off the configuration."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from llmr_ray import loading
from llmr_ray.config import Config, DatasetConfig, ReportConfig, TaskConfig
from llmr_ray.errors import ConfigError
from llmr_ray.evaluation import published
from llmr_ray.evaluation.published import (
    beside_published,
    check_names,
    check_variants,
    differences,
    published_tables,
)

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
        assert bool(table.figures) != bool(table.variants), table.name
        for figures in table.variants.values() if table.variants else [table.figures]:
            assert {*table.methods, *([table.initial] if table.initial else [])} - {"None"} <= set(figures), table.name
            assert all(len(values) == len(table.columns) for values in figures.values()), table.name
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


@pytest.mark.parametrize(
    ("table", "variant", "method", "figures"),
    [
        ("llm_embedder_table_4", "full method", "LLM-Embedder", [0.505, 13.483, 0.627, 0.865]),
        ("llm_embedder_table_4", "no homogeneous batching", "LLM-Embedder", [0.447, 14.183, 0.605, 0.836]),
        ("llm_embedder_table_10", "Qwen-7B-Chat", "BGE", [0.579, 0.445, 0.633, 16.206, 2.517]),
        ("llm_embedder_table_10", "Llama-2-13B-Chat", "LLM-Embedder", [0.558, 0.503, 0.644, 11.538, 2.854]),
        ("llm_r_ablations", "no reward model", "LLM-R", [64.9]),
        ("llm_r_ablations", "reward model without gold output", "LLM-R", [63.8]),
        ("llm_r_ablations", "raw LLM score as teacher", "LLM-R", [65.2]),
    ],
)
def test_ablations_as_printed(table, variant, method, figures):
    """Spot checks against the papers' ablations."""
    assert published_tables()[table].variants[variant][method] == figures


def test_the_whole_method_is_the_same_in_all_tables_of_a_paper():
    """An ablation whose full method differs from the main results was copied from another row."""
    tables = published_tables()

    def main(table, method, column):
        names = [entry["name"] for entry in tables[table].columns]
        return tables[table].figures[method][names.index(column)]

    places = [("llm_embedder_table_1", "PopQA"), ("llm_embedder_table_2", "MSC"), ("llm_embedder_table_3", "Average")]
    full = tables["llm_embedder_table_4"].variants["full method"]["LLM-Embedder"]
    assert full == [main(table, "LLM-Embedder", column) for table, column in [*places, (places[2][0], "ToolBench")]]
    places = [(places[0][0], "MMLU All"), *places[:1], places[2], places[1], (places[1][0], "arXiv")]
    for method, figures in tables["llm_embedder_table_10"].variants["Llama-2-7B-Chat"].items():
        assert figures == [main(table, method, column) for table, column in places]
    assert tables["llm_r_ablations"].variants["iteration 1"]["LLM-R"] == [main("llm_r_main", "LLM-R it 1", "Average")]


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
    config = loading.load(CONF / "baselines.yaml")
    config = replace(
        config,
        evaluate=replace(config.evaluate, methods=list(config.evaluate.embedders)),
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


def measured(config, *methods, table="llm_embedder_table_2"):
    """What stands beside MSC's published rows, and the differences told, where some methods were measured."""
    config = replace(config, datasets={"msc": DatasetConfig(task="chat")}, report=ReportConfig(reproduces=[table]))
    rows = [row("msc", "chat", method, "perplexity", 10.0 + place) for place, method in enumerate(methods)]
    (told,) = beside_published(config, rows)
    (figure,) = told["figures"]
    ours = [(entry["published_method"], entry["method"]) for entry in figure["methods"] if entry["ours"] is not None]
    return ours, {entry["what"]: entry for entry in told["differences"]}


def test_a_method_stands_beside_its_own_row_and_no_other():
    """Published BGE beside BGE without its instruction, and measured Contriever beside nothing."""
    config = loading.load(CONF / "baselines.yaml")
    names = ["Instructor", "Contriever", "RetroMAE-BEIR", "BGE", "AAR", "API-Retriever", "LLM-R"]
    ours, told = measured(config, "none", "recency", "bm25", "base", *names, "SBERT", "trained")
    same = [(name, name) for name in names]
    assert ours == [("None", "none"), ("Recency", "recency"), ("BM25", "bm25"), *same, ("LLM-Embedder", "trained")]
    assert "row BGE" not in told


def test_the_base_embedder_stands_in_for_the_model_it_is_and_says_so():
    """Without BGE's own row the base embedder is the nearest; with other instructions it is not the same."""
    ours, told = measured(loading.load(CONF / "baselines.yaml"), "base", "trained")
    assert ours == [("BGE", "base"), ("LLM-Embedder", "trained")]
    assert told["row BGE"]["published"] == "BGE, as its authors run it"
    assert "minilm-l6" in told["row BGE"]["ours"]
    assert "row BGE" not in measured(Config(), "bm25", "trained")[1]
    config = Config(datasets={"piqa": DatasetConfig(task="icl")}, report=ReportConfig(reproduces=["llm_r_table_10"]))
    for methods, expected in ((("base", "E5"), "E5"), (("base",), "base")):
        (told,) = beside_published(config, [row("piqa", "icl", method, "accuracy", 0.5) for method in methods])
        (figure,) = told["figures"]
        assert [entry["method"] for entry in figure["methods"] if entry["ours"] is not None] == [expected]


def test_a_released_model_stands_beside_the_row_that_the_run_trains_for():
    """Prevents the released checkpoint from being dropped, or from taking the place of the run's own result."""
    ours, _ = measured(loading.load(CONF / "baselines.yaml"), "LLM-Embedder", "trained")
    assert ours == [("LLM-Embedder", "trained"), ("LLM-Embedder", "LLM-Embedder")]


def test_another_model_by_the_name_of_a_row_is_told():
    """A row is found by its name, which anyone can give to any model."""
    config = loading.load(
        CONF / "baselines.yaml",
        ["evaluate.methods=[AAR,BGE]", "evaluate.embedders.BGE.model=BAAI/bge-large-en"],
    )
    _, told = measured(config, "AAR", "BGE")
    assert told["evaluate.embedders.BGE.model"]["ours"] == "BAAI/bge-large-en"
    assert told["evaluate.embedders.AAR.similarity"] == {
        "what": "evaluate.embedders.AAR.similarity",
        "ours": "dot",
        "published": "cosine",
    }
    assert "evaluate.embedders.API-Retriever.similarity" not in told, "it is not compared"


def test_every_method_that_the_paper_s_configurations_measure_has_a_row():
    """Prevents a row of the tables that a run at the paper's scale pays for and the report drops."""
    for name, further in (("llm_embedder", {"base"}), ("llm_r", {"base", "LLM-Embedder"})):
        config = loading.load(CONF / "paper" / f"{name}.yaml")
        rows = [
            row(data, task, method, measure, 0.5)
            for method in config.evaluate.methods
            for data, task, measure in (("msc", "chat", "perplexity"), ("average", "icl", "score"))
        ]
        shown = {
            entry["method"]
            for table in beside_published(config, rows)
            for figure in table["figures"]
            for entry in figure["methods"]
        }
        assert set(config.evaluate.methods) - shown == further


def test_tables_of_ablations_are_for_studies():
    """A run has no variants: an ablation named by a report would be an empty table."""
    with pytest.raises(ConfigError, match="named by studies"):
        check_names(["llm_r_ablations"])
    with pytest.raises(ConfigError, match="no published table llm_r_main of ablations"):
        check_variants({"llm_r_main": {}})
    with pytest.raises(ConfigError, match=r"no variant \['no answer'\]. Known: iteration 1"):
        check_variants({"llm_r_ablations": {"a": "no answer"}})


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
