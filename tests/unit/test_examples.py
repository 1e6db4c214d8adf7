"""Protocols of in-context examples: LLM-R's decoding, prompts and demotion beside LLM-Embedder's (methods.md B.9)."""

from dataclasses import replace

import evaluation_world as world
import numpy as np
import pyarrow as pa
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.metrics import f1_score

from llmr_ray.data.example_tasks import TASKS
from llmr_ray.errors import ConfigError, DataError
from llmr_ray.evaluation import examples
from llmr_ray.evaluation.answers import exact_match
from llmr_ray.evaluation.baselines import central, kmeans_topk
from llmr_ray.evaluation.protocols import POSITIVE_F1
from llmr_ray.evaluation.results import result_rows
from llmr_ray.evaluation.significance import estimate, paired_difference
from llmr_ray.feedback.client import LocalClient
from llmr_ray.feedback.engine import EngineSettings, open_engine
from llmr_ray.feedback.requests import LLMResult
from llmr_ray.feedback.store import LLMStore
from llmr_ray.schemas import table_of
from tests.tiny_llm import TEXT, save_model


def query(**fields):
    row = {"query_id": "q", "task": "icl", "dataset": "rte", "query": "U", "targets": ["Yes"], "options": None}
    return row | {"gold_option": None, "context": None} | fields


def document(text):
    return {"doc_id": text, "text": text, "continuation": None, "title": None}


# --- decoding --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = save_model(tmp_path_factory.mktemp("llm"))
    settings = EngineSettings.of(world.make_config(), folder)
    return open_engine(replace(settings, engine="transformers", max_model_tokens=200, dtype="float32"))


@torch.inference_mode()
def greedy_in_trie(engine, prompt, labels):
    """Constrained decoding token by token: of all tokens that continue some label, the likeliest, to the end."""
    start = engine.tokenizer(prompt)["input_ids"]
    paths = {tuple(engine.tokenizer(prompt + label + "\n")["input_ids"][len(start) :]): label for label in labels}
    done = ()
    while done not in paths:
        logits = engine.model(input_ids=torch.tensor([[*start, *done]])).logits[0, -1]
        allowed = {path[len(done)] for path in paths if path[: len(done)] == done}
        done += (max(allowed, key=lambda token: float(logits[token])),)
    return paths[done]


@pytest.mark.parametrize("dataset", ["snli", "ag_news"])
def test_constrained_choice_is_greedy_decoding_in_the_trie_of_labels(engine, tmp_path, dataset):
    """Comparing whole labels is another decoder: where a first token is rare and the rest certain, they part."""
    labels = TASKS[dataset].labels
    client = LocalClient("tiny", LLMStore(tmp_path), engine)
    words = TEXT.split()
    asked, rows = [], []
    for number in range(5):
        rows.append(query(dataset=dataset, query=" ".join(words[number : number + 9]), options=labels, gold_option=0))
        shown = [document(f"{words[number]}\n{labels[-1]}")]
        settings = {"demonstration_tokens": 0, "max_new_tokens": 4, "protocol": "llm_r"}
        asked.append(examples.request(f"r{number}", rows[-1], shown, **settings))
    differ = 0
    for row, request, result in zip(rows, asked, client.answer(asked, label="t"), strict=True):
        said = examples.judge(row, result, protocol="llm_r").output
        assert said == greedy_in_trie(engine, "".join(segment.text for segment in request.segments), labels)
        differ += said != examples.judge(row, result).output
    assert differ > 0


def test_labels_that_begin_alike_are_refused():
    """Their first token may be the same, and the comparison would go by rounding errors."""
    with pytest.raises(DataError, match="first letter"):
        examples.constrained_choice(["Neutral", "Negative"], [(-1.0,), (-1.1,)])
    with pytest.raises(DataError, match="no tokens"):
        examples.constrained_choice(["Yes", "No"], [(), (-1.1,)])


def test_llm_r_prompt_and_judgement():
    """Each protocol has its own separators, decoding and normalisation; mixed, the figures are nobody's."""
    row = query(options=["Yes", "No"], gold_option=1)
    settings = {"demonstration_tokens": 0, "max_new_tokens": 64, "protocol": "llm_r"}
    asked = examples.request("r", row, [document("best\nNo"), document("good\nYes")], **settings)
    assert "".join(segment.text for segment in asked.segments) == "good\nYes\n\nbest\nNo\n\nU\n"
    assert "".join(segment.text for segment in examples.request("r", row, [], **settings).segments) == "U\n"
    result = LLMResult(request_id="r", token_logprobs=((-1.0, -4.0), (-2.0, -0.5)))
    assert examples.judge(row, result, protocol="llm_r").output == "Yes"
    assert examples.judge(row, result).output == "No"
    # The options of a multiple choice are compared as wholes in both.
    choice = query(dataset="arc_e", options=["Yes", "No"], gold_option=1)
    assert examples.judge(choice, result, protocol="llm_r").output == "No"
    said = LLMResult(request_id="r", texts=("U.S. Army",))
    asked_about = query(dataset="natural_questions", targets=["u s army"])
    assert examples.judge(asked_about, said, protocol="llm_r").values["EM"] == 1.0
    assert examples.judge(asked_about, said).values["EM"] == 0.0


def test_a_space_stands_before_options_where_it_is_published():
    """LLM-Embedder's code scores " No" after a line break (A.7): other tokens, so other likelihoods."""
    row = query(options=["Yes", "No"], gold_option=1)
    settings = {"demonstration_tokens": 0, "max_new_tokens": 64}
    assert examples.request("r", row, [], option_space=True, **settings).targets == (" Yes", " No")
    assert examples.request("r", row, [], **settings).targets == ("Yes", "No")


def test_trivia_qa_normalisation_makes_spaces_of_punctuation():
    """SQuAD's joins what stood apart; LLM-R judges natural_questions by TriviaQA's."""
    assert exact_match("well-known ‘one’", ["well known one"], "trivia_qa") == 1.0
    assert exact_match("well-known", ["wellknown"], "trivia_qa") == 0.0
    assert exact_match("well-known", ["wellknown"], "squad") == 1.0
    assert exact_match("The_answer", ["answer"], "trivia_qa") == 1.0


# --- demotion --------------------------------------------------------------------------------------------------------

OWNERS = {"a": "mnli", "b": "rte", "c": "mnli", "d": None, "e": "rte", "f": "rte", "g": "mnli"}
RANKING = [(name, 1.0 - number / 10) for number, name in enumerate("bcadegf")]


def test_demotion_moves_other_tasks_behind_within_the_head():
    """A demotion of the whole ranking would fetch examples from any depth; of k alone it would fetch none."""
    assert [name for name, _ in examples.demoted(RANKING, OWNERS, "mnli", 1)] == ["c", "a", "b", "d", "e"]
    assert [name for name, _ in examples.demoted(RANKING, OWNERS, "mnli", 2)] == ["c", "a", "g", "b", "d", "e", "f"]
    # As released: no example is of the test task mnli_m, so all are demoted alike and the order stays.
    assert examples.demoted(RANKING, OWNERS, "mnli_m", 2) == RANKING


@pytest.mark.parametrize(
    ("demotion", "own_first"), [("none", False), ("other_tasks", True), ("other_tasks_by_test_name", True)]
)
def test_stage_demotes_for_prompts_and_not_in_the_run(tmp_path, monkeypatch, demotion, own_first):
    """Runs are what was retrieved; what the LLM sees is cut from the demoted ranking."""
    monkeypatch.setattr("llmr_ray.evaluation.stage.search", world.brute_force_search)
    config, prepare = world.make_config(), world.make_prepare(tmp_path)
    changed = replace(config.evaluate, icl_demotion=demotion, methods=["base"], icl_demonstrations=4)
    artifact = world.make_evaluation(tmp_path, replace(config, evaluate=changed), prepare, world.FakeClient())
    shown = {row["query_id"]: row["doc_ids"] for row in artifact.read("answers").to_pylist()}
    for query_id in (name for name in shown if name.startswith(("piqa", "xsum"))):
        run = [row["doc_id"] for row in artifact.read("run").to_pylist() if row["query_id"] == query_id]
        own = query_id.split("/")[0]
        head = sorted(run[:20], key=lambda doc_id: not doc_id.startswith(own)) if own_first else run
        assert shown[query_id] == head[:4]
    shallow = replace(config, evaluate=replace(changed, icl_demotion="other_tasks", icl_demonstrations=5))
    with pytest.raises(ConfigError, match="search_depth"):
        world.make_evaluation(tmp_path, shallow, prepare, world.FakeClient())


def test_stage_asks_within_the_limit_of_the_task(tmp_path, monkeypatch):
    """A limit for prompts of examples that reaches other tasks, or none."""
    monkeypatch.setattr("llmr_ray.evaluation.stage.search", world.brute_force_search)
    config, client = world.make_config(), world.FakeClient()
    changed = replace(config.evaluate, methods=["base"], prompt_tokens={"icl": 1024}, icl_option_space=True)
    world.make_evaluation(tmp_path, replace(config, evaluate=changed), world.make_prepare(tmp_path), client)
    asked = [request for call in client.calls for request in call]
    limits = {(request.unit.split("/")[0], request.max_tokens) for request in asked}
    tasks = {name: data.task for name, data in config.datasets.items()}
    assert {(tasks[name], limit) for name, limit in limits} >= {("icl", 1024), ("qa", 0)}
    assert all((limit == 1024) == (tasks[name] == "icl") for name, limit in limits)
    of_piqa = [request for request in asked if request.unit.startswith("piqa")]
    assert of_piqa
    assert all(target.startswith(" ") for request in of_piqa for target in request.targets)


# --- k-means ---------------------------------------------------------------------------------------------------------


def test_central_examples_are_those_of_scikit_learns_clusters():
    """Examples near no centre are a random baseline under another name."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(4, 6)) * 5
    sizes = (40, 30, 20, 10)
    points = np.concatenate([centre + rng.normal(size=(size, 6)) for centre, size in zip(centres, sizes, strict=True)])
    points = points[rng.permutation(len(points))].astype(np.float32)
    theirs = KMeans(4, n_init=5, random_state=0).fit(points)
    distance = theirs.transform(points)
    order = np.argsort(-np.bincount(theirs.labels_))
    assert central(points, 4, seed=1).tolist() == distance.argmin(axis=0)[order].tolist()
    assert len(set(central(points[:1].repeat(9, axis=0), 4, seed=1))) == 4
    assert central(points[:3], 8, seed=1).shape == (3,)
    assert central(points[:0], 8, seed=1).shape == (0,)


def test_kmeans_gives_all_queries_of_a_task_the_same_examples_of_that_task():
    """The baseline shows what good examples are worth that do not depend on the query."""
    vectors = np.random.default_rng(1).normal(size=(30, 4)).astype(np.float32)
    queries = pa.table({"task": ["icl", "qa", "icl", "icl"], "dataset": ["a", "x", "b", "a"]})
    a, b = np.arange(0, 12), np.arange(12, 15)
    rows, scores = kmeans_topk(queries, [a, np.arange(30), b, a], vectors, 4, seed=3)
    assert rows[0].tolist() == rows[3].tolist()
    assert set(rows[0]) <= set(a)
    assert sorted(rows[2].tolist()) == [-1, 12, 13, 14]
    assert (rows[1] == -1).all()
    assert (np.diff(scores) < 0).all()


def test_stage_shows_kmeans_and_rounds(tmp_path, monkeypatch):
    """A round whose index is missing would be reported as another's; k-means has no place outside of examples."""
    monkeypatch.setattr("llmr_ray.evaluation.stage.search", world.brute_force_search)
    config, prepare = world.make_config(), world.make_prepare(tmp_path)
    methods = ["kmeans", "base", "round_1", "round_2"]
    config = replace(config, evaluate=replace(config.evaluate, methods=methods))
    artifact = world.make_evaluation(tmp_path, config, prepare, world.FakeClient())
    inputs = artifact.spec.inputs
    assert {name for name in inputs if name.startswith("index")} == {"index_base", "index_round_1", "index_round_2"}
    rows = artifact.read("metrics").to_pylist()
    assert {row["dataset"] for row in rows if row["method"] == "kmeans"} == {"piqa", "nq_open", "xsum"}
    assert {row["method"] for row in rows if row["dataset"] == "piqa"} == set(methods)
    for bad in ("round_0", "round_x", "round_3"):
        changed = replace(config, evaluate=replace(config.evaluate, methods=["base", bad]))
        with pytest.raises(ConfigError, match=bad):
            world.make_evaluation(tmp_path, changed, prepare, world.FakeClient())


# --- figures ---------------------------------------------------------------------------------------------------------


def coded(said, meant):
    return 2.0 * said + meant


def judged(dataset, method, values, measure):
    where = {"scenario": "examples", "dataset": dataset, "method": method, "measure": measure}
    return [{**where, "query_id": f"{dataset}/{n}", "value": float(value)} for n, value in enumerate(values)]


def figures(metrics, tasks, held_out=()):
    methods = sorted({row["method"] for row in metrics})
    kept = {"samples": 400, "seed": 1, "artifacts": {method: {} for method in methods}, "held_out": held_out}
    rows = result_rows(table_of("metrics", metrics), dict.fromkeys(tasks, "icl"), methods, **kept)
    return {(row["dataset"], row["measure"], row["method"]): row for row in rows}


def test_f1_of_a_label_is_taken_over_queries():
    """F1 is no mean over queries: averaged it would be accuracy of the positive class at best (I.21)."""
    rng = np.random.default_rng(2)
    meant, base, trained = (rng.random(60) < p for p in (0.3, 0.5, 0.4))
    metrics = judged("multirc", "base", coded(base, meant), POSITIVE_F1)
    metrics += judged("multirc", "trained", coded(trained, meant), POSITIVE_F1)
    rows = figures(metrics, ["multirc"])
    expected = f1_score(meant, base), f1_score(meant, trained)
    assert rows["multirc", POSITIVE_F1, "base"]["mean"] == pytest.approx(expected[0])
    delta = rows["multirc", POSITIVE_F1, "trained"]["delta_vs_base"]
    assert delta["mean"] == pytest.approx(expected[1] - expected[0])
    row = query(dataset="multirc", options=["No", "Yes"], gold_option=0)
    result = LLMResult(request_id="r", token_logprobs=((-2.0,), (-1.0,)))
    assert examples.judge(row, result).values == {"accuracy": 0.0, POSITIVE_F1: 2.0}


def test_intervals_and_p_of_a_ratio_by_enumeration():
    """Resampling numerators apart from denominators, or testing their means, gives another statistic's interval."""
    rng = np.random.default_rng(5)
    meant, a, b = (rng.random(9) < 0.5 for _ in range(3))

    def parts(said):
        return np.stack([2.0 * (said & meant), 1.0 * said + meant], axis=1)

    def f1(said, at=slice(None)):
        """Precision and recall written out; scikit-learn takes a millisecond a call."""
        hits = (said & meant)[at].sum()
        precision, recall = hits / max(1, said[at].sum()), hits / max(1, meant[at].sum())
        return 2 * precision * recall / (precision + recall) if hits else 0.0

    found = paired_difference([parts(a)], [parts(b)], exponential=False, samples=20_000, seed=3)
    observed = f1(a) - f1(b)
    assert found.mean == pytest.approx(observed) == f1_score(meant, a) - f1_score(meant, b)
    extreme = 0
    for swaps in np.ndindex(*[2] * 9):
        x, y = np.where(swaps, b, a), np.where(swaps, a, b)
        extreme += abs(f1(x) - f1(y)) >= abs(observed) - 1e-12
    assert found.p == pytest.approx(extreme / 2**9, abs=0.015)
    draws = rng.integers(9, size=(4000, 9))
    low, high = np.percentile([f1(a, at) - f1(b, at) for at in draws], [2.5, 97.5])
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.06)
    # Beside a mean, each weighs half.
    both = estimate([parts(a), np.array([1.0, 0.0])], exponential=False, samples=100, seed=0)
    assert both.mean == pytest.approx((f1(a) + 0.5) / 2)
    nothing = estimate([np.zeros((4, 2))], exponential=False, samples=100, seed=0)
    assert (nothing.mean, nothing.low, nothing.high) == (0.0, 0.0, 0.0)


def test_averages_by_category_and_over_held_out_tasks():
    """LLM-R's claims are about categories and unseen tasks; a micro average would let the largest set decide."""
    metrics = []
    for dataset, values, measure in [
        ("rte", [1, 1, 0, 0], "accuracy"),
        ("snli", [1, 1], "accuracy"),
        ("qnli", [0], "accuracy"),
        ("natural_questions", [1], "EM"),
        ("natural_questions", [0.5], "F1"),
        ("mine", [1, 0], "accuracy"),
    ]:
        metrics += judged(dataset, "base", values, measure) + judged(dataset, "trained", values, measure)
    tasks = ["rte", "snli", "qnli", "natural_questions", "mine"]
    rows = figures(metrics, tasks, held_out=["qnli", "natural_questions"])
    means = {key[0]: row["mean"] for key, row in rows.items() if key[1] == "score" and key[2] == "base"}
    assert means == {
        "average NLI": pytest.approx((0.5 + 1 + 0) / 3),
        "average held-out tasks": 0.5,
        "average": pytest.approx((0.5 + 1 + 0 + 1 + 0.5) / 5),
    }
    delta = rows["average NLI", "score", "trained"]["delta_vs_base"]
    assert (delta["mean"], delta["p"], delta["n"]) == (0.0, 1.0, 7)
    assert [key[0] for key, row in rows.items() if row["is_main"]] == ["average", "average"]
    assert "average held-out tasks" not in {key[0] for key in figures(metrics, tasks, held_out=tasks)}
