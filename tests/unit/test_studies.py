"""Studies: every shipped variant is a valid configuration, and tables say what the runs said."""

import dataclasses
import json
from pathlib import Path

import pytest

from llmr_ray import loading
from llmr_ray.config import Config, DatasetConfig, EvaluateConfig, TrainConfig
from llmr_ray.errors import ConfigError
from llmr_ray.schemas import table_of
from llmr_ray.studies import Finished, Study, check_figures, figures_without_rows, read_study, run_study
from llmr_ray.study_tables import summary, table, write

STUDIES = sorted((Path(__file__).parents[2] / "conf" / "studies").glob("*.yaml"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_variant_of_a_shipped_study_loads(path):
    """Prevents a variant of a misspelt setting, found after the variants before it have run for hours, and a figure
    that no run has."""
    study = read_study(path)
    study = dataclasses.replace(study, seeds=study.seeds[:1])
    loaded = [loading.load(study.config, cell.settings) for cell in study.cells([])]
    check_figures(study, loaded)
    loaded = [dataclasses.replace(config, name="") for config in loaded]
    assert len({loading.to_yaml(config) for config in loaded}) == len(loaded), "two variants are the same"


def test_settings_hold_for_all_variants_and_give_way_to_the_command_and_the_variant(tmp_path):
    """Prevents a study that says `rounds=1` from running two rounds, or from overruling whoever runs it."""
    text = "title: a\nconfig: b\nfigures: [a b]\nsettings: [rounds=1]\nvariants: {one: [], three: [rounds=3]}\n"
    (tmp_path / "s.yaml").write_text(text)
    study = read_study(tmp_path / "s.yaml")
    assert [cell.settings for cell in study.cells(["rounds=2"])] == [
        ["rounds=1", "rounds=2", "name=s-one"],
        ["rounds=1", "rounds=2", "rounds=3", "name=s-three"],
    ]


def result(method, mean, dataset="average", measure="score"):
    delta = None if method in ("none", "base") else {"mean": mean - 0.5, "ci95": [0.01, 0.2], "p": 0.0004, "n": 9}
    interval = [mean - 0.1, mean + 0.1]
    row = {"dataset": dataset, "measure": measure, "method": method, "mean": mean, "ci95": interval, "n": 9}
    return row | {"delta_vs_base": delta, "task": "icl", "lower_is_better": measure == "perplexity"}


def finished(rows, metrics=(), **results):
    """What a run leaves: `rows` of results.json, and (method, query, value) of the data set `qa`."""
    config = Config(datasets={"qa": DatasetConfig(task="qa", source="jsonl", path="none")})
    values = [
        {"scenario": "knowledge", "dataset": "qa", "measure": "nDCG@10", "method": method, "query_id": query}
        | {"value": x}
        for method, query, x in metrics
    ]
    return Finished(config=config, results={"rows": rows, **results}, metrics=table_of("metrics", values))


@pytest.fixture
def study(tmp_path):
    (tmp_path / "small.yaml").write_text(
        "title: What helps?\nconfig: ../base.yaml\nfigures: [average score]\n"
        "variants:\n  plain: []\n  Two rounds: [rounds=2]\n"
    )
    return read_study(tmp_path / "small.yaml")


def test_a_study_is_a_run_for_each_variant_and_one_table(study, tmp_path):
    asked = []

    def run(config, cell):
        asked.append((Path(config), cell.settings))
        rows = [result("none", 0.25), result("base", 0.5), result("trained", 0.5 + 0.125 * len(asked))]
        if len(asked) == 2:
            rows.insert(2, result("round_1", 0.5625))
        return finished([*rows, result("base", 0.875, dataset="boolq", measure="accuracy")])

    outcome = run_study(study, ["seed=7"], run, lambda known: write(study, known, tmp_path / "out"))
    rows = outcome.rows
    assert asked == [
        ((tmp_path / "../base.yaml").resolve(), ["seed=7", "name=small-plain"]),
        ((tmp_path / "../base.yaml").resolve(), ["seed=7", "rounds=2", "name=small-two-rounds"]),
    ]
    assert len(rows) == 7
    lines = [line for line in table(study, outcome).splitlines() if line.startswith("| ")][1:]
    told = [[cell.strip() for cell in line.strip("|").split("|")][:2] for line in lines]
    assert told == [
        ["None", "0.250 [0.150, 0.350]"],
        ["Base embedder", "0.500 [0.400, 0.600]"],
        ["plain", "0.625 [0.525, 0.725]"],
        ["Two rounds: round 1", "0.562 [0.463, 0.662]"],
        ["Two rounds: trained embedder", "0.750 [0.650, 0.850]"],
    ]
    assert lines[2].endswith("| +0.125 [+0.010, +0.200] | < .001 |")
    assert json.loads((tmp_path / "out" / "study.json").read_text())["rows"] == rows
    assert (tmp_path / "out" / "average-score.svg").read_text().startswith("<svg")


def test_what_a_cell_s_stages_warn_of_stands_in_the_table(study, tmp_path):
    """Prevents a variant from being judged by a teacher that learned nothing in that cell alone."""

    def run(_, cell):
        done = finished([result("base", 0.5), result("trained", 0.75)])
        warnings = ["its loss is that of guessing"] if "rounds=2" in cell.settings else []
        done.results["stages"] = [{"stage": "reward_model", "warnings": warnings}, {"stage": "train"}]
        return done

    run_study(study, [], run, lambda known: write(study, known, tmp_path / "out"))
    text = (tmp_path / "out" / "study.md").read_text()
    assert text.count("loss") == 1
    assert "- Two rounds: reward_model: its loss is that of guessing" in text
    (told,) = json.loads((tmp_path / "out" / "study.json").read_text())["warnings"]
    assert (told["variant"], told["stage"]) == ("Two rounds", "reward_model")


def test_a_failed_cell_is_told_and_the_others_go_on(study, tmp_path):
    """Prevents one variant's failure from costing the night, or its table, and from being silent."""
    tried = []

    def run(_, cell):
        tried.append(cell.label)
        if cell.settings[0] == "rounds=2" and len(tried) < 5:
            raise ConfigError("no GPU")
        return finished([result("base", 0.5), result("trained", 0.75)])

    seeded = dataclasses.replace(study, seeds=[1, 2])
    outcome = run_study(seeded, [], run, lambda known: write(seeded, known, tmp_path / "out"))
    assert tried == ["plain, seed 1", "Two rounds, seed 1", "plain, seed 2", "Two rounds, seed 2"]
    record = json.loads((tmp_path / "out" / "study.json").read_text())
    assert [(told["variant"], told["seed"], told["error"]) for told in record["failures"]] == [
        ("Two rounds", 1, "ConfigError: no GPU"),
        ("Two rounds", 2, "ConfigError: no GPU"),
    ]
    assert record["failures"][0]["trace"][-1].endswith("ConfigError: no GPU")
    assert record["missing"] == []
    text = (tmp_path / "out" / "study.md").read_text()
    assert "| Base embedder | 0.500" in text
    assert "- Two rounds, seed 1: ConfigError: no GPU" in text
    # The same again: what failed is tried again.
    assert run_study(seeded, [], run, lambda known: None).failures == []
    assert len(outcome.rows) == 4


@pytest.mark.parametrize(
    ("figure", "is_there"),
    [
        (("qa", "nDCG@10"), True),
        (("qa", "EM"), True),
        (("silent", "EM"), False),
        (("silent", "R@10"), True),
        (("silent", "R@5"), False),
        (("other", "nDCG@10"), False),
        (("average", "score"), True),
        (("average Sentiment", "score"), True),
    ],
)
def test_figures_that_no_cell_can_have_are_told_before_any_runs(study, figure, is_there):
    """Prevents a study that ends well and lacks a column, as one that asks for EM where the LLM answers nothing."""
    datasets = {"qa": DatasetConfig(task="qa"), "silent": DatasetConfig(task="qa"), "boolq": DatasetConfig(task="icl")}
    asked = EvaluateConfig(num_llm_queries={"qa": 5, "silent": 0, "boolq": 5})
    configs = [Config(), Config(datasets=datasets, evaluate=asked)]
    study = dataclasses.replace(study, figures=[("qa", "R@10"), figure])
    if is_there:
        check_figures(study, configs)
        return
    with pytest.raises(ConfigError, match=f"{' '.join(figure)}.*num_llm_queries"):
        check_figures(study, configs)


def test_a_figure_that_no_cell_had_is_told(study, tmp_path):
    """Prevents a misspelt measure from being an empty table that nobody looks at."""
    study = dataclasses.replace(study, figures=[("average", "score"), ("qa", "exact match")])

    def run(_, cell):
        return finished([result("base", 0.5), result("trained", 0.75)])

    outcome = run_study(study, [], run, lambda known: write(study, known, tmp_path / "out"))
    assert figures_without_rows(study, outcome) == ["qa exact match"]
    assert "No cell that has run has the figures: qa exact match." in (tmp_path / "out" / "study.md").read_text()

    def fail(_, cell):
        raise ConfigError("no GPU")

    assert figures_without_rows(study, run_study(study, [], fail, lambda known: None)) == []


def test_published_ablations_stand_beside_the_variants_that_ask_the_same(tmp_path):
    """Prevents a study of a paper's ablation whose table says nothing of the paper's own figures, and changes that are
    read off two scales."""
    (tmp_path / "rewards.yaml").write_text(
        "title: a\nconfig: ../base.yaml\nfigures: [average score]\nreference: whole\nseeds: [1, 2]\n"
        "reproduces: {llm_r_ablations: {whole: iteration 1, raw: raw LLM score as teacher, late: no reward model}}\n"
        "variants: {whole: [], raw: ['reward_model.model=\"\"'], late: [rounds=3], alone: [rounds=2]}\n"
    )
    study = read_study(tmp_path / "rewards.yaml")
    means = {"whole": 0.5, "raw": 0.4375, "late": 0.25, "alone": 0.75}

    def run(_, cell):
        if cell.variant == "late":
            raise ConfigError("no GPU")
        rows = [result("base", 0.25), result("trained", means[cell.variant] + 0.125 * (cell.seed - 1))]
        icl = {"boolq": DatasetConfig(task="icl", num_test=9)}
        lr = 0.5 if cell.variant == "raw" else 0.25
        config = Config(datasets=icl, rounds=1, train=TrainConfig(learning_rate=lr, num_steps=7))
        return dataclasses.replace(finished(rows), config=config)

    run_study(study, [], run, lambda known: write(study, known, tmp_path / "out"))
    (paper,) = json.loads((tmp_path / "out" / "study.json").read_text())["published"]
    whole, raw = paper["figures"]
    assert (whole["variant"], raw["variant"]) == ("whole", "raw")
    # On the paper's scale, means over the seeds; LLM-R prints percent.
    assert (raw["published"], raw["published_change"]) == (65.2, pytest.approx(-0.5))
    assert (raw["ours"], raw["change"]) == (pytest.approx(50.0), pytest.approx(-6.25))
    assert (whole["change"], whole["published_change"], whole["same_data"]) == (None, None, False)
    told = {row["what"]: row for row in paper["differences"]}
    assert told["train.num_steps"]["published"] == "6000"
    assert "train.learning_rate" not in told, "the variants differ in it"
    assert "rounds" not in told, "the ablations are of one iteration"
    text = (tmp_path / "out" / "study.md").read_text()
    assert "## Beside LLM-R (2307.07164), ablations after one iteration" in text
    assert "Average beside average, score, which is other data:" in text
    row = next(line for line in text.splitlines() if line.startswith("| raw | raw LLM"))
    assert row.startswith("| raw | raw LLM score as teacher | LLM-R / Trained embedder | 65.200 | 50.000 [")
    assert row.endswith("| -0.500 | -6.250 |")


def test_a_study_of_which_nothing_has_run_has_nothing_beside_it(study):
    """Prevents the table of a first failed cell from failing itself."""
    study = dataclasses.replace(study, reproduces={"llm_r_ablations": {"plain": "iteration 1"}})

    def fail(_, cell):
        raise ConfigError("no GPU")

    assert "Beside" not in table(study, run_study(study, [], fail, lambda known: None))


def test_an_interrupt_is_no_failure_of_a_cell(study):
    """Prevents Ctrl-C from being noted as a failure while the next cell starts."""

    def run(_, cell):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_study(study, [], run, lambda known: None)


def test_differences_over_seeds_are_paired_by_seed(tmp_path):
    """Prevents the spread between seeds, common to both variants, from hiding a difference that every seed shows."""
    study = Study(
        name="s", title="s", config="", figures=[("qa", "nDCG@10"), ("qa", "perplexity")], reference="full",
        variants={"full": [], "less": ["a=b"]}, seeds=[1, 2, 3], against="tokens",
    )  # fmt: skip
    level = {1: 0.5, 2: 0.25, 3: 0.75}
    lost = {1: 0.125, 2: 0.25, 3: 0.1875}

    def run(_, cell):
        if cell.label == "less, seed 3":
            raise ValueError("gone")
        value = level[cell.seed] - (lost[cell.seed] if cell.variant == "less" else 0)
        rows = [result("none", 20.0, "qa", "perplexity"), result("base", 0.5, "qa", "nDCG@10")]
        rows += [result("trained", value, "qa", "nDCG@10"), result("trained", 16.0, "qa", "perplexity")]
        told = finished(rows, [("trained", query, value) for query in "abcd"])
        return dataclasses.replace(told, tokens=1000 if cell.variant == "full" else 10)

    outcome = run_study(study, [], run, lambda known: write(study, known, tmp_path / "out"))
    told = {(row["variant"], row["method"]): row for row in summary(outcome.rows) if row["measure"] == "nDCG@10"}
    full, less = told["full", "trained"], told["less", "trained"]
    assert (full["mean"], full["num_seeds"], less["num_seeds"]) == (0.5, 3, 2)
    assert full["ci95"] == pytest.approx([0.5 - 0.6210, 0.5 + 0.6210], abs=1e-3)  # 4.3027 * .25 / sqrt(3)
    assert full["delta_vs_reference"] is None
    delta = less["delta_vs_reference"]
    # -.125 and -.25: mean -.1875, t(.975, 1) = 12.706, sd .0884 / sqrt(2).
    assert delta["mean"] == pytest.approx(-0.1875)
    assert delta["ci95"] == pytest.approx([-0.1875 - 0.7941, -0.1875 + 0.7941], abs=1e-3)
    assert len(less["p_over_queries"]) == 2
    assert told["full", "base"]["ci95"] == [0.4, 0.6]
    assert (full["tokens"], less["tokens"]) == (1000, 10)
    text = (tmp_path / "out" / "study.md").read_text()
    assert "less, seed 3: ValueError: gone" in text
    assert "| LLM tokens of feedback |" in text
    impact = (tmp_path / "out" / "impact.svg").read_text()
    assert "+20.0%" in impact  # perplexity 16 for 20: warm
    assert "-62.5%" in impact  # .1875 for the base's .5


def test_variants_are_compared_query_by_query_and_drawn_over_what_they_asked(tmp_path):
    """Prevents two means with overlapping intervals from being all that a study says of two variants, and a round from
    standing at the calls of another."""
    (tmp_path / "labels.yaml").write_text(
        "title: Which labels?\nconfig: ../base.yaml\nfigures: [qa nDCG@10]\nreference: all\nagainst: asked\n"
        "variants:\n  some: [rounds=2]\n  all: []\n"
    )

    def run(_, cell):
        if cell.settings[0] == "rounds=2":
            rows = [result(method, 0.5, "qa", "nDCG@10") for method in ("base", "round_1", "trained")]
            values = [("round_1", "a", 0.25), ("round_1", "b", 0.25), ("trained", "a", 0.5), ("trained", "c", 0.25)]
            return finished(rows, values, labeling=[{"spent": 100, "requests": 20}, {"spent": 180, "requests": 40}])
        rows = [result(method, 0.5, "qa", "nDCG@10") for method in ("base", "trained")]
        values = [("trained", query, 0.75) for query in "abc"]
        return finished(rows, values, labeling=[{"spent": 400, "requests": 80}])

    labels = read_study(tmp_path / "labels.yaml")
    rows = run_study(labels, [], run, lambda known: write(labels, known, tmp_path / "out")).rows
    told = {(row["variant"], row["method"]): row for row in rows}
    assert {key: row["asked"] for key, row in told.items()} == {
        ("some", "base"): None,
        ("some", "round_1"): 100,
        ("some", "trained"): 180,
        ("all", "base"): None,
        ("all", "trained"): 400,
    }
    trained = {key: row["requests"] for key, row in told.items() if row["method"] != "base"}
    assert trained == {("some", "round_1"): 20, ("some", "trained"): 60, ("all", "trained"): 80}
    differences = {key: row["delta_vs_reference"] for key, row in told.items() if row["delta_vs_reference"]}
    assert {key: (row["mean"], row["n"]) for key, row in differences.items()} == {
        ("some", "round_1"): (-0.5, 2),
        ("some", "trained"): (-0.375, 2),
    }
    header, _, *lines = [line for line in (tmp_path / "out" / "study.md").read_text().splitlines() if "|" in line]
    assert header.split(" | ")[1] == "pairs asked"
    assert header.endswith("| difference to all | p |")
    assert [line.split(" | ")[1] for line in lines] == ["–", "100", "180", "400"]
    drawn = (tmp_path / "out" / "qa-ndcg-10-over-asked.svg").read_text()
    assert drawn.startswith("<svg")
    assert "pairs asked" in drawn


@pytest.mark.parametrize(("bm25", "base", "compared"), [(0.5, 0.5, True), (0.25, 0.5, True), (0.25, 0.25, False)])
def test_variants_tested_on_other_texts_are_not_compared(tmp_path, bm25, base, compared):
    """Prevents a pool that grew by the training questions' passages from being taken for what a variant gains or loses.
    Where only one of two rankers differs it may be what is studied."""
    (tmp_path / "pools.yaml").write_text(
        "title: Which questions?\nconfig: ../base.yaml\nfigures: [qa nDCG@10]\nreference: few\n"
        "variants:\n  few: []\n  many: [rounds=2]\n"
    )

    def run(_, cell):
        level = {
            "few": {"bm25": 0.5, "base": 0.5, "trained": 0.75},
            "many": {"bm25": bm25, "base": base, "trained": 1.0},
        }
        rows = [result(method, value, "qa", "nDCG@10") for method, value in level[cell.variant].items()]
        return finished(rows, [(method, query, x) for method, x in level[cell.variant].items() for query in "ab"])

    pools = read_study(tmp_path / "pools.yaml")
    rows = run_study(pools, [], run, lambda known: write(pools, known, tmp_path / "out")).rows
    [delta] = [row["delta_vs_reference"] for row in rows if (row["variant"], row["method"]) == ("many", "trained")]
    assert (delta and delta["mean"]) == (0.25 if compared else None)
    told = (tmp_path / "out" / "study.md").read_text()
    assert ("Tested on other texts than few, as BM25 and the base embedder show" in told) is not compared


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("title: a\nconfig: b\nfigures: [a b]\nvariants: {a: []}\nreference: c\n", "must be one of the variants"),
        ("title: a\nconfig: b\nfigures: [a b]\nvariants: {a: []}\nagainst: hours\n", "can be drawn over"),
        ("title: a\nconfig: b\nfigures: [a b]\nvariants: {a: []}\nseeds: [1, 1]\n", "twice"),
        ("title: a\nconfig: b\nfigures: [a b]\nvariants: {a: []}\nseeds: 3\n", "whole numbers"),
        ("title: a\nconfig: b\nfigures: [average score]\n", "must have the keys"),
        ("title: a\nconfig: b\nfigures: [score]\nvariants: {a: []}\n", "a data set and a measure"),
        ("title: a\nconfig: b\nfigures: [average score]\nvariants: {a b: [], A-b: []}\n", "different words"),
        ("title: a\nconfig: b\nfigures: [a b]\nvariants: {a: rounds=2}\n", "is a list"),
        ("title: a\nconfig: b\nfigures: [a b]\nvariants: {a: []}\nsettings: rounds=2\n", "is a list"),
        ("title: a\nconfig: b\nfigures: [a b]\nvariants: {a: []}\nreproduces: [c]\n", "has published tables"),
        (
            "title: a\nconfig: b\nfigures: [a b]\nvariants: {a: []}\nreproduces: {llm_r_ablations: {b: iteration 1}}\n",
            r"names \['b'\]",
        ),
        (
            "title: a\nconfig: b\nfigures: [a b]\nvariants: {a: []}\nreproduces: {llm_r_ablations: {a: iteration 9}}\n",
            "no variant",
        ),
        ("title: [", "not valid YAML"),
    ],
)
def test_a_study_that_cannot_run_says_why(tmp_path, text, message):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_study(tmp_path / "bad.yaml")
    with pytest.raises(ConfigError, match="no study"):
        read_study(tmp_path / "none.yaml")
