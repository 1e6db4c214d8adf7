"""What is asked of the LLM for each scenario, how its answers are judged, and that no row gets lost."""

import json
import math
import re
from collections import Counter
from dataclasses import replace

import evaluation_world as world
import numpy as np
import pytest

from llmr_ray.config import ComparedEmbedder
from llmr_ray.errors import ConfigError, DataError
from llmr_ray.evaluation import examples, knowledge, memory, questions
from llmr_ray.evaluation.baselines import random_topk, recency_topk
from llmr_ray.evaluation.results import result_rows
from llmr_ray.feedback.requests import LLMResult
from llmr_ray.schemas import table_of


def document(text, position=0, continuation=None):
    return {"doc_id": text, "text": text, "position": position, "continuation": continuation, "title": None}


def query(task, **fields):
    row = {"query_id": "q", "task": task, "dataset": "d", "query": "U", "targets": ["O"], "options": None}
    return row | {"gold_option": None, "context": None} | fields


def prompt(request):
    return "".join(segment.text for segment in request.segments)


def cut_order(request):
    """Texts in the order in which a prompt that is too long loses them."""
    cut = [segment for segment in request.segments if segment.trim_order > 0]
    return [segment.text for segment in sorted(cut, key=lambda segment: segment.trim_order)]


def test_knowledge_prompt_puts_passages_first_and_loses_the_worst_first():
    """A template that differs from training's, or that cuts the best passage, measures something else."""
    passages = [document("best"), document("second"), document("third")]
    asked = knowledge.request("r", query("qa"), passages, passage_tokens=96, max_new_tokens=16)
    shown, marker, rest = prompt(asked).partition("Knowledge: ")
    assert marker + rest == "Knowledge: best\nsecond\nthird\n\nQuestion: U\n\nAnswer:"
    assert shown.endswith("\n\nAnswer: iron\n\n")
    assert cut_order(asked) == ["third", "second", "best", "U"]
    assert [segment.max_tokens for segment in asked.segments if segment.text == "best"] == [96]
    assert (asked.num_samples, asked.temperature, asked.stop, asked.targets) == (1, 0.0, ("\n",), ())
    alone = knowledge.request("r", query("qa"), [], passage_tokens=96, max_new_tokens=16)
    assert prompt(alone) == shown + "Question: U\n\nAnswer:"


def test_knowledge_answer_is_judged_by_its_best_alias():
    """A list of aliases is a choice, not a conjunction."""
    judged = knowledge.judge(query("qa", targets=["Bob", "The Paris"]), LLMResult(request_id="r", texts=(" paris. ",)))
    assert judged.values == {"F1": 1.0, "EM": 1.0}


def test_options_of_a_question_are_compared_and_not_generated():
    """Judged by the words of a free answer, a question with options is right only where the LLM copies one."""
    row = query("qa", options=["a long wrong one", "tin"], gold_option=1)
    asked = knowledge.request("r", row, [document("best")], passage_tokens=96, max_new_tokens=16)
    assert (asked.num_samples, asked.targets) == (0, (" a long wrong one", " tin"))
    result = LLMResult(request_id="r", token_logprobs=((-1.0,) * 4, (-0.5,)))
    assert knowledge.judge(row, result).values == {"accuracy": 1.0}
    with pytest.raises(DataError, match="gold_option"):
        knowledge.judge(row | {"gold_option": None}, result)


PASSAGES = [document("best"), document("second"), document("third")]


def published(name, queries):
    return questions.protocol(name, queries, num_passages=3, passage_tokens=0, match="exact", seed=1)


def test_mmlu_is_asked_by_letters_as_published():
    """Another template, or options scored by their words, is not the paper's MMLU (A.7)."""
    meta = '{"subject": "high_school_biology"}'
    row = query("qa", options=["ice", "tin", "sun", "sea"], gold_option=2, meta=meta)
    mmlu = published("mmlu", [row])
    asked = mmlu.request("r", row, PASSAGES)
    told = "The following are multiple choice questions (with answers) about high school biology.\n\n"
    told += "U\nA. ice\nB. tin\nC. sun\nD. sea\nAnswer:"
    assert prompt(asked) == "Knowledge:\nbest\nsecond\nthird\n\n" + told
    assert prompt(mmlu.request("r", row, [])) == told
    assert (asked.targets, asked.num_samples) == ((" A", " B", " C", " D"), 0)
    assert cut_order(asked) == ["third", "second", "best", "U"]
    judged = mmlu.judge(row, LLMResult(request_id="r", token_logprobs=((-2.0,), (-3.0,), (-1.0,), (-4.0,))))
    assert (judged.values, judged.output, judged.stratum) == ({"accuracy": 1.0}, "C", "high_school_biology")
    with pytest.raises(DataError, match="astrology"):
        mmlu.request("r", row | {"meta": '{"subject": "astrology"}'}, [])
    with pytest.raises(DataError, match="no options"):
        mmlu.request("r", row | {"options": None}, [])
    by_category = Counter(questions.MMLU_CATEGORIES.values())
    assert by_category == {"STEM": 18, "Social": 12, "Human": 13, "Other": 14}


def test_popqa_shows_a_question_of_each_other_relation():
    """A demonstration of the question's own relation gives its form away, or its very answer."""
    relations = {22: "job", 218: "town", 91: "genre"}
    rows = [
        query("qa", query_id=f"{relation}-{n}", split="test", query=f"Which {word} has {n}?",
              meta=json.dumps({"prop_id": relation, "obj": f"{word} {n}"}))
        for relation, word in relations.items() for n in range(20)
    ]  # fmt: skip
    popqa = published("popqa", rows)
    asked = popqa.request("r", rows[3], PASSAGES)
    blocks = prompt(asked).split("\n\n")
    assert blocks[0] == "Knowledge: best\nsecond\nthird"
    assert blocks[-1] == "Q: Which job has 3? A:"
    found = [re.fullmatch(r"Q: Which (\w+) has (\d+)\? A: (\w+) (\d+)", block).groups() for block in blocks[1:-1]]
    assert {word for word, *_ in found} == {"town", "genre"}
    assert all(question == answer for question, answer in ((one[:2], one[2:]) for one in found))
    assert (asked.max_new_tokens, asked.temperature, asked.stop) == (16, 0.0, ("\n",))
    assert len({prompt(popqa.request("r", row, [])).split("Q: Which job")[0] for row in rows[:20]}) > 5, (
        "drawn for each"
    )
    assert prompt(popqa.request("r", rows[3], PASSAGES)) == prompt(asked)
    with pytest.raises(DataError, match="prop_id"):
        published("popqa", [query("qa", split="test", meta=None)])


def test_nq_shows_ten_questions_of_the_development_split():
    """Demonstrations of the test split would tell other queries' answers, and made-up ones are not the paper's."""
    rows = [
        query("qa", query_id=f"{split}{n}", split=split, query=f"{split} {n}?", targets=[f"is {n}"], meta=None)
        for split in ("dev", "test") for n in range(12)
    ]  # fmt: skip
    asked = published("nq", rows).request("r", rows[-1], PASSAGES)
    known, *shown, last = prompt(asked).split("\n\n")
    assert (known, last) == ("Knowledge: best\nsecond\nthird", "Question: test 11?\nAnswer:")
    assert len(set(shown)) == 10
    assert all(re.fullmatch(r"Question: dev (\d+)\?\nAnswer: is \1", block) for block in shown)
    assert asked.max_new_tokens == 32
    with pytest.raises(DataError, match="num_dev"):
        published("nq", rows[:9])


def test_subjects_of_mmlu_count_alike():
    """By questions, the largest subject is a tenth of MMLU; the paper's figure is the mean over subjects."""
    of = {"virology": [1, 1, 1, 1], "anatomy": [0, 0], "sociology": [1, 0], "philosophy": [1]}
    rows = [
        {"scenario": "knowledge", "dataset": "mmlu", "method": "base", "measure": "accuracy", "value": float(value),
         "query_id": f"{subject}{number}", "stratum": subject}
        for subject, values in of.items() for number, value in enumerate(values)
    ]  # fmt: skip
    told = result_rows(table_of("metrics", rows), {"mmlu": "qa"}, ["base"], samples=20, seed=1, artifacts={"base": {}})
    means = {row["dataset"]: (row["mean"], row["n"]) for row in told}
    assert means == {
        "mmlu": (pytest.approx((1 + 0 + 0.5 + 1) / 4), 9),
        "mmlu Other": (0.5, 6),
        "mmlu Social": (0.5, 2),
        "mmlu Human": (1.0, 1),
    }


def test_chat_prompt_is_mscs_template_and_turns_keep_their_order():
    """The released template (A.7); a dialogue read backwards would confuse any LLM."""
    turns = [document("late", 7), document("early", 2)]
    asked = memory.chat_request("r", query("chat"), turns, document_tokens=512)
    assert prompt(asked) == "early\nlate\nSpeaker 1: U\nSpeaker 2:"
    assert asked.targets == (" O",)
    assert cut_order(asked) == ["early", "late", "U"]
    assert prompt(memory.chat_request("r", query("chat"), [], document_tokens=512)) == "Speaker 1: U\nSpeaker 2:"


def test_long_text_puts_chunks_with_continuations_before_the_same_window():
    """If the window or the target differed between rows, the perplexities could not be compared (G)."""
    row = query("lrlm", context="context ", query="query", targets=[" next"])
    chunks = [document("c9", 9, "c10"), document("c3", 3, "c4")]
    asked = memory.text_request("r", row, chunks, document_tokens=512, window_tokens=256)
    alone = memory.text_request("r", row, [], document_tokens=512, window_tokens=256)
    assert prompt(asked) == "c3c4c9c10context query"
    assert prompt(alone) == "context query"
    assert asked.targets == alone.targets == (" next",)
    window, lone = asked.segments[-1], alone.segments[-1]
    assert (window.text, window.max_tokens, window.trim_side) == (lone.text, 256, "left")
    assert cut_order(asked) == ["c3c4", "c9c10", "context query"]


def test_perplexity_value_is_the_mean_nll_per_token():
    """A sum would make long answers look hard."""
    judged = memory.judge(query("chat"), LLMResult(request_id="r", token_logprobs=((-1.0, -2.0, -6.0),)))
    assert judged.values == {"perplexity": 3.0}


def test_the_most_similar_demonstration_stands_last_and_is_cut_last():
    """The released code cuts the most similar examples first (I.21)."""
    shown = [document("best\n1"), document("good\n2"), document("fair\n3")]
    asked = examples.request("r", query("icl"), shown, demonstration_tokens=96, max_new_tokens=16)
    assert prompt(asked) == "fair\n3\ngood\n2\nbest\n1\nU\n"
    assert cut_order(asked) == ["fair\n3", "good\n2", "best\n1", "U"]
    # Cut on the left: a demonstration that loses its answer demonstrates nothing.
    assert {segment.trim_side for segment in asked.segments if segment.trim_order} == {"left"}


def test_options_are_compared_by_mean_logprob_on_one_prompt():
    """By the sum, the shortest option wins whatever it says."""
    row = query("icl", options=["a long wrong one", "no"], gold_option=0)
    asked = examples.request("r", row, [], demonstration_tokens=96, max_new_tokens=16)
    assert asked.num_samples == 0
    assert len(asked.targets) == 2
    result = LLMResult(request_id="r", token_logprobs=((-1.0,) * 4, (-1.5,)))
    judged = examples.judge(row, result)
    assert (judged.values, judged.output) == ({"accuracy": 1.0}, "a long wrong one")
    assert examples.judge(row | {"gold_option": 1}, result).values == {"accuracy": 0.0}
    with pytest.raises(DataError, match="gold_option"):
        examples.judge(row | {"gold_option": None}, result)


def test_generation_is_judged_by_exact_match_only_where_answers_are_short():
    """EM of a summary is always 0; ROUGE of an entity rewards half an entity."""
    said = LLMResult(request_id="r", texts=("O",))
    assert set(examples.judge(query("icl", dataset="nq_open"), said).values) == {"EM", "F1"}
    assert set(examples.judge(query("icl", dataset="xsum"), said).values) == {"ROUGE-L"}


def test_recency_of_chunks_is_the_contiguous_text_before_the_window():
    """Chunks bring their successor along: adjacent ones would repeat half of the text (G)."""
    rows, scores = recency_topk(np.array([[10, 20], [10, 20], [5, 5]]), [1, 2, 1], 3)
    assert rows.tolist() == [[19, 18, 17], [19, 17, 15], [-1, -1, -1]]
    assert (np.diff(scores) < 0).all()


def test_random_is_a_function_of_seed_and_query_alone():
    """A draw that depends on which other queries there are changes when the test set grows."""
    choices = np.arange(50, 90)
    together, _ = random_topk(["a", "b"], [choices, choices], 5, 1)
    alone, _ = random_topk(["b"], [choices], 5, 1)
    assert together[1].tolist() == alone[0].tolist()
    assert together[0].tolist() != together[1].tolist()
    assert random_topk(["b"], [choices], 5, 2)[0].tolist() != alone.tolist()
    short, _ = random_topk(["c"], [np.array([7, 8])], 5, 1)
    assert sorted(short[0].tolist()) == [-1, -1, -1, 7, 8]


@pytest.fixture
def evaluated(tmp_path, monkeypatch):
    monkeypatch.setattr("llmr_ray.evaluation.stage.search", world.brute_force_search)
    config = world.make_config()
    prepare = world.make_prepare(tmp_path)
    client = world.FakeClient(failing=("evaluate/bm25/hotpot/q1", "evaluate/base/hotpot/q1"))
    artifact = world.make_evaluation(tmp_path, config, prepare, client)
    return config, prepare, client, artifact


def test_stage_asks_once_and_accounts_for_every_row(evaluated):
    """A failed row that is left out in silence makes the rest look like all of it."""
    _, _, client, artifact = evaluated
    assert len(client.calls) == 1
    requests = client.calls[0]
    assert len({request.request_id for request in requests}) == len(requests)
    methods = {"qa": 5, "chat": 6, "lrlm": 6, "icl": 5}
    assert len(requests) == sum(5 * methods[world.TASKS[name]] for name in world.ASKED)
    failed = [request for request in requests if request.request_id in client.failing]
    counts = artifact.require()["counts"]
    labelled = 8 * (4 + 5 + 4)
    assert counts["rows_in"] == labelled + len(requests)
    assert sum(counts["quarantined"].values()) == len(failed)
    assert counts["cached"] == sum("/none/" in request.request_id for request in requests)
    assert counts["llm_tokens"] == 10 * (len(requests) - len(failed))
    assert artifact.read("answers").num_rows == len(requests)


def test_stage_evaluates_test_queries_only(evaluated):
    """Training queries in the test figures are the oldest mistake of all."""
    _, prepare, _, artifact = evaluated
    split = dict(zip(*prepare.read("queries").select(["query_id", "split"]).to_pydict().values(), strict=True))
    for table in ("metrics", "run", "answers"):
        assert {split[query_id] for query_id in artifact.read(table)["query_id"].to_pylist()} == {"test"}


def test_stage_measures_what_each_task_calls_for(evaluated):
    """Which measures appear for which method is the shape of the paper's tables."""
    rows = evaluated[3].read("metrics").to_pylist()
    shape = {}
    for row in rows:
        shape.setdefault((row["dataset"], row["measure"]), set()).add(row["method"])
    everything = {"none", "random", "bm25", "recency", "base", "trained"}
    assert shape == {
        ("hotpot", "nDCG@10"): everything - {"none", "recency"},
        ("hotpot", "R@10"): everything - {"none", "recency"},
        ("hotpot", "F1"): everything - {"recency"},
        ("hotpot", "EM"): everything - {"recency"},
        ("chitchat", "perplexity"): everything,
        ("bfcl_memory", "R@10"): everything - {"none"},
        ("austen", "perplexity"): everything,
        ("piqa", "accuracy"): everything - {"recency"},
        ("nq_open", "EM"): everything - {"recency"},
        ("nq_open", "F1"): everything - {"recency"},
        ("xsum", "ROUGE-L"): everything - {"recency"},
        ("bfcl", "nDCG@5"): everything - {"none", "recency"},
        ("bfcl", "R@5"): everything - {"none", "recency"},
        ("bfcl", "nDCG@1"): everything - {"none", "recency"},
    }
    assert all(math.isfinite(row["value"]) for row in rows)


def test_rankings_stay_inside_the_query_history(evaluated):
    """A dialogue that sees its own future retrieves the answer."""
    _, prepare, _, artifact = evaluated
    position = dict(zip(*prepare.read("corpus").select(["doc_id", "position"]).to_pydict().values(), strict=True))
    queries = {row["query_id"]: row for row in prepare.read("queries").to_pylist()}
    seen = set()
    for row in artifact.read("run").to_pylist():
        query_row = queries[row["query_id"]]
        if query_row["history_end"] is not None:
            assert position[row["doc_id"]] < query_row["history_end"]
            seen.add(row["run_name"])
        if query_row["task"] == "icl" and row["run_name"] == "random":
            assert row["doc_id"].startswith(query_row["dataset"])
    assert seen == {"random", "bm25", "recency", "base", "trained"}


def test_stage_gives_the_same_bytes_again(evaluated, tmp_path):
    """Figures that depend on the run, not on its inputs, cannot be reproduced."""
    config, prepare, client, artifact = evaluated
    again = world.make_evaluation(tmp_path / "again", config, prepare, client)
    assert again.id == artifact.id
    assert again.require()["files"] == artifact.require()["files"]


def test_bootstrap_samples_do_not_redo_the_evaluation_but_the_seed_does(evaluated, tmp_path):
    """The id must change with what changes the tables, and only with that."""
    config, prepare, _, artifact = evaluated
    embeddings = {name: world.Embeddings(name, prepare) for name in ("base", "trained")}
    llm = world.Asset(name="fake", kind="model", path=tmp_path, fingerprint="fake")

    def spec_id(changed):
        return world.evaluate_spec(changed, llm, prepare, embeddings, embeddings).id

    assert spec_id(replace(config, evaluate=replace(config.evaluate, bootstrap_samples=7))) == artifact.id
    assert spec_id(replace(config, seed=7)) != artifact.id
    assert spec_id(replace(config, evaluate=replace(config.evaluate, qa_passages=1))) != artifact.id


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ["base", "splade"]}, "splade"),
        ({"embedders": {"round_1": ComparedEmbedder()}}, "round_1"),
        ({"num_llm_queries": {"hotpt": 3}}, "hotpt"),
        ({"num_llm_queries": {"bfcl": 3}}, "labels alone"),
    ],
)
def test_settings_that_cannot_be_evaluated_fail_before_anything_runs(change, message, tmp_path):
    """A misspelt data set would silently have no answers, after hours of training."""
    config = world.make_config()
    config = replace(config, evaluate=replace(config.evaluate, **change))
    prepare = world.make_prepare(tmp_path)
    both = {name: world.Embeddings(name, prepare) for name in ("base", "trained")}
    llm = world.Asset(name="fake", kind="model", path=tmp_path, fingerprint="fake")
    with pytest.raises(ConfigError, match=message):
        world.evaluate_spec(config, llm, prepare, both, both)
