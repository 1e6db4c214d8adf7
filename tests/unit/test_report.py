"""The report: figures with intervals, a self-contained page, files for other tools."""

import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import evaluation_world as world
import numpy as np
import pyarrow as pa
import pytest
from rich.console import Console

from llmr_ray.artifacts import Artifact, ArtifactSpec, Counts
from llmr_ray.errors import DataError
from llmr_ray.evaluation.published import beside_published
from llmr_ray.evaluation.report import print_table, write_report
from llmr_ray.evaluation.results import result_rows
from llmr_ray.evaluation.tables import effect, in_order, p_text, result_of, tables
from llmr_ray.labeling.canaries import SCHEMA
from llmr_ray.labeling.generation import GENERATED
from llmr_ray.schemas import table_of
from tests.feedback_world import make_artifact


def metrics_of(values, dataset="d", measure="nDCG@5", scenario="tools"):
    return [
        {
            "scenario": scenario,
            "dataset": dataset,
            "method": method,
            "measure": measure,
            "query_id": f"{dataset}/{query_id}",
            "value": value,
        }
        for method, by_query in values.items()
        for query_id, value in by_query.items()
    ]


def rows_of(metrics, tasks):
    methods = ["none", "base", "trained"]
    return result_rows(
        table_of("metrics", metrics),
        tasks,
        methods,
        samples=500,
        seed=1,
        artifacts={method: {"evaluate": "e"} for method in methods},
    )


def test_difference_is_taken_over_the_queries_that_both_have():
    """A query whose LLM row failed for one method would shift the difference by its own difficulty."""
    metrics = metrics_of({"base": {"a": 0.0, "b": 1.0, "hard": 0.0}, "trained": {"b": 1.0, "a": 0.5, "new": 0.9}})
    base, trained = rows_of(metrics, {"d": "tool"})
    assert (base["n"], trained["n"]) == (3, 3)
    assert base["delta_vs_base"] is None
    assert trained["delta_vs_base"]["mean"] == pytest.approx(0.25)
    assert trained["delta_vs_base"]["n"] == 2
    assert trained["mean"] == pytest.approx(0.8)
    assert trained["is_main"]


def test_what_training_led_to_is_compared_with_every_method_on_shared_queries():
    """Against the base embedder alone a report cannot say whether training beats what costs nothing."""
    values = {"none": {"a": 1.0, "b": 0.0, "c": 1.0}, "base": {"a": 0.0, "b": 1.0}, "trained": {"a": 1.0, "b": 1.0}}
    none, base, trained = rows_of(metrics_of(values), {"d": "tool"})
    assert (none["delta_of_result"]["mean"], none["delta_of_result"]["n"]) == (0.5, 2)
    assert base["delta_of_result"]["mean"] == trained["delta_vs_base"]["mean"] == 0.5
    assert trained["delta_of_result"] is None
    beside = rows_of(metrics_of(values, measure="nDCG@1"), {"d": "tool"})
    assert all(row["delta_of_result"] is None for row in beside)  # not the main measure


def test_perplexity_is_exponentiated_and_lower_is_better():
    """The sign of an improvement in perplexity is the other way round."""
    ids = "abcdefgh"
    values = {"base": dict.fromkeys(ids, 2.5), "trained": dict.fromkeys(ids, 1.5)}
    base, trained = rows_of(metrics_of(values, measure="perplexity", scenario="memory"), {"d": "chat"})
    assert base["mean"] == pytest.approx(np.exp(2.5))
    assert trained["delta_vs_base"]["mean"] == pytest.approx(np.exp(1.5) - np.exp(2.5))
    assert trained["lower_is_better"]
    assert effect(trained) == "better"
    assert effect(rows_of(metrics_of(values), {"d": "tool"})[1]) == "worse"
    assert tables([base, trained])[0].columns[0].best == {"trained"}


def test_average_of_examples_takes_each_data_set_once_by_its_main_measure():
    """F1 next to EM would count a data set twice; a mean over queries would count it by its size."""
    metrics = metrics_of({"base": {"a": 1.0}}, "piqa", "accuracy", "examples")
    metrics += metrics_of({"base": {"a": 0.0, "b": 0.0, "c": 0.0}}, "nq_open", "EM", "examples")
    metrics += metrics_of({"base": {"a": 0.9, "b": 0.9, "c": 0.9}}, "nq_open", "F1", "examples")
    rows = rows_of(metrics, {"piqa": "icl", "nq_open": "icl"})
    (average,) = [row for row in rows if row["dataset"] == "average"]
    assert (average["mean"], average["n"], average["measure"]) == (0.5, 4, "score")
    assert [row["dataset"] for row in rows if row["is_main"]] == ["average"]


def test_p_is_never_printed_as_zero():
    """A permutation test cannot show p = 0."""
    assert p_text(0.0001) == "p<0.001"
    assert p_text(0.0341) == "p=0.034"


def write(run):
    config, artifacts, stages, folder = run
    return write_report(
        run_dir=folder, config=config, artifacts=artifacts, stages=stages, command="llmr run x", commit="abc"
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run whose report is written; the tests only read it, or write the same again."""
    root = tmp_path_factory.mktemp("report")
    config, prepare = world.make_config(), world.make_prepare(root)
    artifacts = {"prepare": prepare, **world.make_training(root)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llmr_ray.evaluation.stage.search", world.brute_force_search)
        artifacts["evaluate"] = world.make_evaluation(root, config, prepare, world.FakeClient())
    counts = Counts(rows_in=10, ok=7, llm_tokens=1234)
    counts.quarantined["text is <too> long"] = 2
    counts.skipped["no margin"] = 1
    stages = [{"stage": "prepare", "artifact": prepare.id, "seconds": 1.25, **counts.to_dict()}]
    stages[0]["warnings"] = ["its loss is <still> that of guessing"]
    whole = config, artifacts, stages, root / "run"
    write(whole)
    return whole


class Page(HTMLParser):
    """Collects what a browser would load, and checks that tags nest."""

    VOID = frozenset({"meta", "br", "link", "img", "path", "use"})

    def __init__(self):
        super().__init__()
        self.open, self.loaded, self.tags = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        self.loaded += [
            value for name, value in attributes if name in ("src", "href", "xlink:href") and not value.startswith("#")
        ]

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_results_have_every_figure_with_interval_n_and_artifacts(run):
    """A figure without n, interval or provenance cannot be trusted or traced."""
    written = write(run)
    results = json.loads((run[3] / "results.json").read_text())
    assert results == json.loads(json.dumps(written))
    assert (results["command"], results["commit"], results["seed"]) == ("llmr run x", "abc", 42)
    assert results["stages"][0]["quarantined"] == {"text is <too> long": 2}
    for row in results["rows"]:
        low, high = row["ci95"]
        assert low <= row["mean"] <= high
        assert row["n"] in (5, 8, 15)
        assert row["artifacts"]["evaluate"] == run[1]["evaluate"].id
        assert (row["delta_vs_base"] is None) == (row["method"] == "base")
    trained = next(row for row in results["rows"] if row["method"] == "trained")
    assert trained["artifacts"]["embeddings"] == "embed/trained"
    assert {row["scenario"] for row in results["rows"] if row["is_main"]} == {
        "knowledge",
        "memory",
        "examples",
        "tools",
    }


def test_page_is_self_contained_and_escapes_the_data(run):
    """A report that loads from elsewhere is blank offline; one that runs its data is a hole."""
    text = (run[3] / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert page.open == []
    assert page.loaded == ["audit.html"]  # a link beside it
    assert "script" not in page.tags
    assert not re.findall(r"url\((?!#)|@import", text)
    assert set(re.findall(r"https?://[^\"' <]*", text)) <= {
        "http://www.w3.org/1999/xlink",
        "http://www.w3.org/2000/svg",
    }
    assert "<b>what</b>" not in text
    assert "&lt;b&gt;what&lt;/b&gt; about hotpot" in text
    assert "text is &lt;too&gt; long: 2" in text
    assert "<b>prepare</b>: its loss is &lt;still&gt; that of guessing" in text


def test_page_shows_what_was_asked_for(run):
    """Each part of the report that is missing is a question that nobody can answer later."""
    text = (run[3] / "report.html").read_text()
    for heading in (
        "Table 1: knowledge",
        "Table 2: memory",
        "Table 3: examples and tools",
        "What the prompts show",
        "What the language model rewarded",
        "Retrieved before and after",
        "Training",
        "Rewards",
    ):
        assert f"<h2>{heading}</h2>" in text
    assert text.count("<svg ") == 2
    for scenario in ("knowledge", "memory", "examples", "tools"):
        assert text.count(f'<span class="tag">{scenario}</span>') >= 3


def test_files_for_other_tools_and_the_embedder_are_there(run):
    """The trained model is what the user came for."""
    write(run)
    names = {path.name for path in (run[3] / "trec").iterdir()}
    assert names >= {"hotpot.qrels.trec", "hotpot.trained.run.trec", "bfcl_memory.recency.run.trec"}
    assert "hotpot.recency.run.trec" not in names
    assert not any(name.startswith(("piqa", "chitchat")) for name in names)
    assert (run[3] / "embedder" / "1_Pooling" / "config.json").read_text() == "{}"
    names = {path.name for path in run[3].iterdir()}
    assert names == {"audit.html", "embedder", "report.html", "results.json", "trec"}


def test_same_run_gives_the_same_page(run):
    """Dates and random ids inside figures make every report differ from the last."""
    first = (run[3] / "report.html").read_bytes()
    write(run)
    assert (run[3] / "report.html").read_bytes() == first


def test_what_differs_from_a_paper_is_listed_once(run, tmp_path):
    """Two tables of one paper share the set-up; forty rows twice hide what comes after them."""
    config, artifacts, stages, _ = run
    beside = replace(config, report=replace(config.report, reproduces=["llm_r_main", "llm_r_table_10"]))
    write((beside, artifacts, stages, tmp_path))
    page = (tmp_path / "report.html").read_text()
    assert page.count("What differs from the published set-up</h3>") == 2
    assert page.count("<th>train.num_steps</th>") == 1
    assert re.search(r"\d+ settings that are listed beside LLM-R \(2307.07164\), main results by category", page)
    told = {row["what"] for table in beside_published(beside, []) for row in table["differences"]}
    assert all(page.count(f"<th>{what}</th>") == 1 for what in told)


def test_report_of_an_evaluation_alone(run, tmp_path):
    """Evaluating without training must not need its artifacts."""
    config, artifacts, stages, _ = run
    config = replace(config, evaluate=replace(config.evaluate, methods=["none", "bm25"]))
    evaluate = world.make_evaluation(tmp_path, config, artifacts["prepare"], world.FakeClient())
    folder = tmp_path / "run"
    results = write((config, {"prepare": artifacts["prepare"], "evaluate": evaluate}, stages, folder))
    assert all(row["delta_vs_base"] is None for row in results["rows"])
    assert not (folder / "embedder").exists()
    print_table(results, Console(file=io.StringIO()))


def test_report_of_training_rounds_compares_the_last_one(run, tmp_path, monkeypatch):
    """Rounds that a report leaves out, or sets beside the wrong one, hide whether another round was worth it."""
    monkeypatch.setattr("llmr_ray.evaluation.stage.search", world.brute_force_search)
    config, artifacts, stages, _ = run
    methods = ["round_2", "base", "kmeans", "round_1"]
    config = replace(config, evaluate=replace(config.evaluate, methods=methods))
    evaluate = world.make_evaluation(tmp_path, config, artifacts["prepare"], world.FakeClient())
    folder = tmp_path / "run"
    results = write((config, {"prepare": artifacts["prepare"], "evaluate": evaluate}, stages, folder))
    assert tables(results["rows"])[2].methods == ["kmeans", "base", "round_1", "round_2"]
    text = (folder / "report.html").read_text()
    assert "<th>Base</th><th>Round 2</th>" in text
    assert "Differences are round 2 minus base" in text
    assert '<tr class="trained"><th>Round 2</th>' in text
    assert re.search(r"<div><b>Base embedder</b>.*?<div><b>Round 2</b>", text, re.DOTALL)
    console = Console(file=io.StringIO())
    print_table(results, console)
    assert "round 2 minus base" in console.file.getvalue()
    assert all(f"Round {number}" in console.file.getvalue() for number in (1, 2))


@pytest.mark.parametrize(
    ("methods", "order", "result"),
    [
        (["trained", "round_10", "base", "round_2"], ["base", "round_2", "round_10", "trained"], "trained"),
        (["round_10", "round_9", "kmeans", "none"], ["none", "kmeans", "round_9", "round_10"], "round_10"),
        (["none", "bm25"], ["none", "bm25"], "trained"),
    ],
)
def test_rounds_are_in_the_order_of_their_numbers(methods, order, result):
    """As words, round 10 comes before round 2, and the last round would be the ninth."""
    assert (in_order(methods), result_of(methods)) == (order, result)


def test_the_page_tells_what_became_of_generated_questions(run, tmp_path):
    """Questions that are dropped without a word make a generator look better than it is."""
    config, artifacts, stages, _ = run
    fates = [("d1", "who?", None), ("d1", None, "not_written"), ("d2", "what", "no_question_mark"), ("d2", "a", None)]
    rows = [{"dataset": "hotpot", "doc_id": doc, "question": text, "reason": reason} for doc, text, reason in fates]
    table = pa.Table.from_pylist(rows, schema=GENERATED)
    folder = tmp_path / "run"
    made = {"generate": make_artifact(tmp_path, "generate", {"generated": table})}
    results = write((config, artifacts | made, stages, folder))
    dropped = {"not_written": 1, "no_question_mark": 1}
    told = {"dataset": "hotpot", "documents": 2, "asked": 4, "written": 3, "kept": 2, "dropped": dropped}
    assert results["questions"] == [told]
    text = (folder / "report.html").read_text()
    assert "Questions that the language model wrote" in text
    assert "no_question_mark: 1" in text
    console = Console(file=io.StringIO(), width=200)
    print_table(results, console)
    assert "3 written, 2 kept; not kept: 1 not_written, 1 no_question_mark" in console.file.getvalue()


def test_the_page_tells_how_often_each_annotator_was_talked_into_a_label(run, tmp_path):
    """Prevents a rate without its control, and that of one annotator from passing for all."""
    config, artifacts, stages, _ = run
    config = replace(config, annotators={"big": replace(config.llm, model="other")})
    shown = {"canaries": [("orders", 0.0, 1.0), ("neutral", 0.0, 0.0)], "canary_big": [("orders", 1.0, 1.0)]}
    made = {}
    for name, rows in shown.items():
        table = pa.Table.from_pylist(
            [dict(zip(SCHEMA.names, ("q", "d", *row), strict=True)) for row in rows], schema=SCHEMA
        )
        made[name] = make_artifact(tmp_path, name, {"canaries": table})
    results = write((config, artifacts | made, stages, tmp_path / "run"))
    told = [(row["annotator"], row["attack"], row["n"], row["fooled"]) for row in results["canaries"]]
    first = [("llm", "orders", 1, 1.0), ("llm", "all", 1, 1.0), ("llm", "neutral", 1, 0.0)]
    assert told == [*first, ("big", "orders", 0, None), ("big", "all", 0, None)]
    text = re.sub(r"\s+", " ", (tmp_path / "run" / "report.html").read_text())
    assert "<th>neutral</th>" in text
    assert '<th>big: orders</th><td class="figure">– <small>n=0, 1 had 1 already</small></td>' in text


@pytest.mark.parametrize(("annotator", "named"), [("llm", "the LLM"), ("gold", "the annotator (gold)")])
def test_the_page_tells_who_labelled_and_what_labelling_everything_would_take(run, tmp_path, annotator, named):
    """Labels of the data that pass for the LLM's, and calls without what they saved, make a policy look better."""
    config, artifacts, stages, _ = run
    pair = {"query_id": "q", "doc_id": "d", "round": 1}
    held = [pair | {"label": 1.0, "source": annotator}, pair | {"doc_id": "e", "label": 0.0, "source": "retriever"}]
    held.append(pair | {"doc_id": "f", "label": 0.0, "source": annotator, "round": 2})
    audit = {"num_drawn": 0, "num_answered": 0, "agreement": None, "steps": 0, "discarded": 0}
    first = {"round": 1, "annotator": annotator, "calls": 70, "spent": 70, "pairs": 500, "audit": audit}
    first |= {"requests": 15, "tokens": 5000}
    first |= dict.fromkeys(("thresholds", "calibration", "ndcg_before", "ndcg", "stop"))
    first |= {
        "distribution": [
            {"round": 1, "source": annotator, "label": 1.0, "num_pairs": 13},
            {"round": 1, "source": "retriever", "label": 0.0, "num_pairs": 29},
        ],
        "quality": [{"source": annotator, "label": 1.0, "num_pairs": 13, "precision": 0.875}],
    }
    second = first | {
        "round": 2,
        "calls": 0,
        "requests": 0,
        "tokens": 0,
        "pairs": 511,
        "ndcg_before": 0.75,
        "ndcg": 0.625,
        "stop": "no_gain",
    }
    made = Artifact(tmp_path, ArtifactSpec(stage="label", version=1, config={}, inputs={}))
    made.begin()
    made.write_shard(0, {"labels": table_of("labels", held)}, Counts(rows_in=3, ok=3))
    made.commit(1, seconds=0, extra={"rounds": [first, second]})
    nothing = make_artifact(tmp_path, "score", {"llm_scores": table_of("llm_scores", [])})
    folder = tmp_path / "run"
    results = write((config, artifacts | {"labels": made, "llm_scores": nothing}, stages, folder))
    # The last round asked nothing: the labels of the first are judged.
    assert [row["annotator"] for row in results["annotators"]["quality"]] == [annotator]
    first = results["annotators"]["first_round"]
    assert [told["quality"][0]["n"] for told in (results["annotators"], first)] == [2, 1]
    text = re.sub(r"\s+", " ", (folder / "report.html").read_text())
    assert f"<th>Asked {named}<br>" in text
    assert f"<th>Labels of {named}<br>" in text
    assert "<td>70<small>70 so far, of 500</small></td><td>15<small>5,000</small></td>" in text
    assert "<td>13 / 0 / 0 / 0</td><td>0 / 29</td>" in text
    assert "<td>0<small>70 so far, of 511</small></td><td>0<small>0</small></td>" in text
    assert "Pairs of all rounds." in text
    assert "Pairs of the first round." in text
    assert "0.625<small>from 0.750</small><small>stopped: no_gain</small>" in text
    assert "0.875" in text


def test_unfinished_evaluation_is_no_report(run):
    """Half an evaluation reported as a whole."""
    config, artifacts, stages, folder = run
    unfinished = Artifact(folder / "elsewhere", artifacts["evaluate"].spec)
    with pytest.raises(DataError, match="not finished"):
        write((config, artifacts | {"evaluate": unfinished}, stages, folder))


@pytest.mark.parametrize("width", [40, 80, 200])
def test_terminal_table_shows_every_column(run, width):
    """Figures only in a file are figures not seen; a job log is 80 columns wide and cut them off."""
    console = Console(file=io.StringIO(), width=width)
    print_table(write(run), console)
    text = console.file.getvalue()
    for word in ("hotpot", "nDCG@10", "perplexity ↓", "average", "Trained", "BM25"):
        assert word in text
    assert "…" not in text
    assert "prepare: warning: its loss is <still> that of guessing" in " ".join(text.split())
