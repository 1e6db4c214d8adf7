"""Studies: every shipped variant is a valid configuration, and tables say what the runs said."""

import json
from pathlib import Path

import pytest

from llmr_ray import loading
from llmr_ray.config import Config, DatasetConfig
from llmr_ray.errors import ConfigError
from llmr_ray.schemas import table_of
from llmr_ray.studies import Finished, read_study, run_study, table

STUDIES = sorted((Path(__file__).parents[2] / "conf" / "studies").glob("*.yaml"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_variant_of_a_shipped_study_loads(path):
    """Prevents a variant of a misspelt setting, found after the variants before it have run for hours."""
    study = read_study(path)
    loaded = [loading.load(study.config, list(overrides)) for overrides in study.variants.values()]
    assert len({loading.to_yaml(config) for config in loaded}) == len(loaded), "two variants are the same"


def result(method, mean, dataset="average", measure="score"):
    delta = None if method in ("none", "base") else {"mean": mean - 0.5, "ci95": [0.01, 0.2], "p": 0.0004, "n": 9}
    interval = [mean - 0.1, mean + 0.1]
    row = {"dataset": dataset, "measure": measure, "method": method, "mean": mean, "ci95": interval, "n": 9}
    return row | {"delta_vs_base": delta, "task": "icl"}


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

    def run(config, settings):
        asked.append((Path(config), settings))
        rows = [result("none", 0.25), result("base", 0.5), result("trained", 0.5 + 0.125 * len(asked))]
        if len(asked) == 2:
            rows.insert(2, result("round_1", 0.5625))
        return finished([*rows, result("base", 0.875, dataset="boolq", measure="accuracy")])

    rows = run_study(study, ["seed=7"], run, tmp_path / "out")
    assert asked == [
        ((tmp_path / "../base.yaml").resolve(), ["seed=7", "name=small-plain"]),
        ((tmp_path / "../base.yaml").resolve(), ["seed=7", "rounds=2", "name=small-two-rounds"]),
    ]
    assert len(rows) == 7
    lines = [line for line in table(study, rows).splitlines() if line.startswith("| ")][1:]
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


def test_what_is_known_is_written_after_each_variant(study, tmp_path):
    """Prevents the last variant's failure from costing the table of the others."""

    def run(_, settings):
        if settings[0] == "rounds=2":
            raise ConfigError("no")
        return finished([result("base", 0.5)])

    with pytest.raises(ConfigError, match="no"):
        run_study(study, [], run, tmp_path / "out")
    assert "| Base embedder | 0.500" in (tmp_path / "out" / "study.md").read_text()


def test_variants_are_compared_query_by_query_and_drawn_over_what_they_asked(tmp_path):
    """Prevents two means with overlapping intervals from being all that a study says of two variants, and a round from
    standing at the calls of another."""
    (tmp_path / "labels.yaml").write_text(
        "title: Which labels?\nconfig: ../base.yaml\nfigures: [qa nDCG@10]\nreference: all\nagainst: asked\n"
        "variants:\n  some: [rounds=2]\n  all: []\n"
    )

    def run(_, settings):
        if settings[0] == "rounds=2":
            rows = [result(method, 0.5, "qa", "nDCG@10") for method in ("base", "round_1", "trained")]
            values = [("round_1", "a", 0.25), ("round_1", "b", 0.25), ("trained", "a", 0.5), ("trained", "c", 0.25)]
            return finished(rows, values, labeling=[{"spent": 100}, {"spent": 180}])
        rows = [result(method, 0.5, "qa", "nDCG@10") for method in ("base", "trained")]
        values = [("trained", query, 0.75) for query in "abc"]
        return finished(rows, values, labeling=[{"spent": 400}])

    rows = run_study(read_study(tmp_path / "labels.yaml"), [], run, tmp_path / "out")
    told = {(row["variant"], row["method"]): row for row in rows}
    assert {key: row["asked"] for key, row in told.items()} == {
        ("some", "base"): None,
        ("some", "round_1"): 100,
        ("some", "trained"): 180,
        ("all", "base"): None,
        ("all", "trained"): 400,
    }
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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("title: a\nconfig: b\nfigures: [a b]\nvariants: {a: []}\nreference: c\n", "must be one of the variants"),
        ("title: a\nconfig: b\nfigures: [a b]\nvariants: {a: []}\nagainst: hours\n", "over 'asked' alone"),
        ("title: a\nconfig: b\nfigures: [average score]\n", "must have the keys"),
        ("title: a\nconfig: b\nfigures: [score]\nvariants: {a: []}\n", "a data set and a measure"),
        ("title: a\nconfig: b\nfigures: [average score]\nvariants: {a b: [], A-b: []}\n", "different words"),
        ("title: [", "not valid YAML"),
    ],
)
def test_a_study_that_cannot_run_says_why(tmp_path, text, message):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_study(tmp_path / "bad.yaml")
    with pytest.raises(ConfigError, match="no study"):
        read_study(tmp_path / "none.yaml")
