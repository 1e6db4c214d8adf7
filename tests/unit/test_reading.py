"""How the LLM reads passages: with evidence, or one by one and voted (methods.md C.5, F)."""

import io
import json
import math
import re
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import evaluation_world as world
import pytest
from rich.console import Console

from llmr_ray import loading
from llmr_ray.artifacts import Artifact
from llmr_ray.config import EvaluateConfig, TaskConfig, TaskScore, TrainConfig
from llmr_ray.errors import ConfigError
from llmr_ray.evaluation import knowledge, reading
from llmr_ray.evaluation.protocols import Ask
from llmr_ray.evaluation.report import print_table, write_report
from llmr_ray.feedback import labels
from llmr_ray.feedback.client import LocalClient
from llmr_ray.feedback.engine import Sampled
from llmr_ray.feedback.requests import LLMResult
from llmr_ray.feedback.store import LLMStore
from llmr_ray.schemas import table_of

SCORES = (0, 1, 1, 0.5)
"""What the rule below says of passage N, by N % 4."""

METHODS = ["none", "bm25", "base"]
PASSAGE = re.compile(r"hotpot text (\d+)$", re.M)


def is_broken(number):
    return number % 5 == 3


class Letters:
    """A tokenizer for which every character is a token."""

    def __call__(self, text, **_):
        places = [(start, start + 1) for start in range(len(text))]
        return {"input_ids": [*map(ord, text)], "offset_mapping": places, "special_tokens_mask": [0] * len(text)}

    def decode(self, ids):
        return "".join(map(chr, ids))


class Reader:
    """An engine that labels and answers by rule, counts what it is asked, and may die at its n-th call.

    It quotes passages of an odd number and makes up its quotes of the others; some labels are broken. The answer is the
    parity of the last passage it is shown.
    """

    max_model_tokens = 4096

    def __init__(self, dies_at=0):
        self.tokenizer, self.dies_at, self.calls, self.prompts = Letters(), dies_at, 0, []

    def begin(self):
        pass

    def sample(self, jobs):
        self.calls += 1
        if self.calls == self.dies_at:
            raise KeyboardInterrupt
        return [self._sampled(job) for job in jobs]

    def _sampled(self, job):
        prompt = self.tokenizer.decode(job.prompt_ids)
        self.prompts.append(prompt)
        numbers = [int(number) for number in PASSAGE.findall(prompt)]
        if job.output_schema:
            said = json.dumps({str(place): self._said(number) for place, number in enumerate(numbers, 1)})
        else:
            said = f" number {numbers[-1] % 2}" if numbers else " nothing"
        return Sampled(texts=(said,), num_output_tokens=3, num_computed_tokens=len(job.prompt_ids))

    def _said(self, number):
        score = 7 if is_broken(number) else SCORES[number % 4]
        return {"evidence": f"text {number}" if number % 2 else "made up", "score": score}


def configured(how, **evaluate):
    config = world.make_config()
    asked = EvaluateConfig(
        methods=METHODS, num_llm_queries={"hotpot": 5}, bootstrap_samples=50, search_depth=20, reading=how, **evaluate
    )
    return replace(config, datasets={"hotpot": config.datasets["hotpot"]}, evaluate=asked)


@pytest.fixture
def evaluated(tmp_path, monkeypatch):
    """Runs the stage with a store that outlives it; `folder` names another machine."""
    monkeypatch.setattr("llmr_ray.evaluation.stage.search", world.brute_force_search)
    prepared = {}

    def run(config, engine, folder="here", targets=None):
        root = tmp_path / folder
        if folder not in prepared:
            prepared[folder] = with_targets(world.make_prepare(root), targets)
        return world.make_evaluation(
            root, config, prepared[folder], LocalClient("rule", LLMStore(root / "store"), engine)
        )

    return run


def with_targets(prepare, targets):
    """The same artifact with other desired outputs of all queries."""
    if targets is None:
        return prepare
    queries = [row | {"targets": targets} for row in prepare.read("queries").to_pylist()]
    tables = {name: prepare.read(name) for name in ("corpus", "qrels")}
    return world.make_artifact(
        prepare.path.parents[1] / "other", "prepare", {"queries": table_of("queries", queries)} | tables
    )


def document(text):
    return {"doc_id": text, "text": text, "continuation": None, "title": None, "meta": None}


def query(**fields):
    return {"query_id": "q", "task": "qa", "dataset": "d", "query": "U", "targets": ["O"], "options": None} | fields


def by_question(table):
    found = defaultdict(list)
    for row in table.to_pylist():
        found[row["method"], row["query_id"]].append(row)
    return found


# --- vote ------------------------------------------------------------------------------------------------------------


def test_weights_are_a_softmax_at_the_temperature():
    """The unit values of methods.md F; large scores, as of BM25, must not overflow."""
    assert reading.vote_weights([0.9, 0.7, 0.5], 0.1) == pytest.approx([0.866813, 0.117310, 0.015876], abs=1e-6)
    assert reading.vote_weights([40.0, 20.0], 0.02) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("outputs", "weights", "place"),
    [
        (["Lyon", "Paris", "Rome"], [0.2, 0.5, 0.3], 1),
        # Equal once normalised, two light votes outweigh a heavy one.
        (["Lyon", "the Paris", " paris."], [0.4, 0.35, 0.25], 1),
        # Ties go to the better passage, be it in the larger or the smaller group.
        (["Lyon", "Paris", "Paris"], [0.5, 0.25, 0.25], 0),
        (["Paris", "Lyon", "Paris"], [0.25, 0.5, 0.25], 0),
        (["Rome"], [1.0], 0),
    ],
)
def test_the_answer_with_the_most_weight_wins(outputs, weights, place):
    assert reading.winner(outputs, weights) == place


def test_a_vote_costs_all_its_answers_and_fails_with_any():
    """Prevents a report that shows the winner's tokens alone, and a vote that is quietly one of two passages."""
    ask = Ask(method="base", query=query(), documents=(), scores=(), requests=(), weights=(0.3, 0.7))
    one, other = (
        LLMResult(request_id=name, texts=(name,), num_computed_tokens=tokens, num_prompt_tokens=9, cached=cached)
        for name, tokens, cached in (("a", 0, True), ("b", 20, False))
    )
    both = reading.voted(ask, [one, other])
    assert (both.texts, both.num_computed_tokens, both.num_prompt_tokens, both.cached) == (("b",), 20, 18, False)
    failed = reading.voted(ask, [LLMResult(request_id="a", error="no room"), other])
    assert (failed.error, failed.num_computed_tokens) == ("no room", 20)


def test_stage_votes_over_the_passages_it_used_to_read_together(evaluated):
    """The whole way, against the run file: cosines at the temperature of training, BM25's scores as they are."""
    config = configured("vote")
    artifact = evaluated(config, Reader())
    found = defaultdict(list)
    for row in artifact.read("run").to_pylist():
        if row["rank"] <= config.evaluate.qa_passages:
            found[row["run_name"], row["query_id"]].append((int(row["doc_id"].rpartition("d")[2]), row["score"]))
    shown = by_question(artifact.read("reading"))
    answers = artifact.read("answers").to_pylist()
    for row in answers:
        if row["method"] == "none":
            assert row["output"] == "nothing"
            continue
        passages = found[row["method"], row["query_id"]]
        temperature = {"base": config.train.temperature, "bm25": 1.0}[row["method"]]
        total = sum(math.exp((score - passages[0][1]) / temperature) for _, score in passages)
        weights = [math.exp((score - passages[0][1]) / temperature) / total for _, score in passages]
        odd = sum(weight for (number, _), weight in zip(passages, weights, strict=True) if number % 2)
        assert row["output"] == f"number {int(odd > 0.5)}"
        assert row["prompt"].count("Knowledge: ") == len(passages) == 3
        told = shown[row["method"], row["query_id"]]
        assert [entry["weight"] for entry in told] == pytest.approx(weights, abs=1e-6)
        assert [entry["output"] for entry in told] == [f" number {number % 2}" for number, _ in passages]
    assert len(answers) == 15
    assert {method for method, _ in shown} == {"bm25", "base"}


def test_questions_with_options_are_read_as_a_whole_where_others_are_voted_on():
    """Prevents a run that fails after all training on its first multiple-choice question (studies/reading.yaml)."""
    passages = (document("p1"), document("p2"))
    asks = []
    for fields in ({"options": ["a", "b"], "gold_option": 0}, {}):
        asked = knowledge.request("r", query(**fields), passages, passage_tokens=9, max_new_tokens=9)
        ask = Ask(method="bm25", query=query(**fields), documents=passages, scores=(2.0, 1.0), requests=(asked,))
        asks.append(ask)
    (whole, voted), _, _ = reading.arranged(configured("vote"), None, asks)
    assert whole == asks[0]
    assert len(voted.requests) == len(voted.weights) == 2


# --- evidence --------------------------------------------------------------------------------------------------------


def test_the_best_passage_stands_next_to_the_question_under_its_evidence():
    """A long prompt loses the worst passage first, quotes after all passages, and the question last."""
    passages = [(document("best"), "b e"), (document("second"), ""), (document("third"), "t\n e")]
    asked = knowledge.request_with_evidence("r", query(), passages, passage_tokens=96, max_new_tokens=16)
    text = "".join(segment.text for segment in asked.segments)
    assert text.partition("Knowledge: ")[2] == (
        "Evidence: t e\nthird\nsecond\nEvidence: b e\nbest\n\nQuestion: U\n\nAnswer:"
    )
    cut = sorted((segment for segment in asked.segments if segment.trim_order), key=lambda segment: segment.trim_order)
    assert [segment.text for segment in cut] == ["third", "second", "best", "t e", "b e", "U"]
    assert {segment.text for segment in asked.segments if segment.max_tokens == 96} == {"third", "second", "best"}
    plain = knowledge.request("r", query(), [document("best")], passage_tokens=96, max_new_tokens=16)
    alone = [(document("best"), "")]
    assert knowledge.request_with_evidence("r", query(), alone, passage_tokens=96, max_new_tokens=16) == plain


@pytest.mark.parametrize(
    ("found", "floor", "kept"),
    [
        ([1.0, 0.0, 0.5], 0.5, [0, 2]),
        ([0.5, 1.0, 0.5], 1.0, [1]),
        ([0.0, 0.0], 0.5, [0]),
        ([0.0, None, 0.0], 0.5, [1]),
        ([0.0, 0.0], 0.0, [0, 1]),
    ],
)
def test_what_is_below_the_floor_goes_but_never_all(found, floor, kept):
    assert reading.read_ranks(found, floor) == kept


def test_stage_reads_what_is_labelled_and_shows_quotes_alone(evaluated):
    """Prevents a made-up quote that is read as evidence, and a passage that a broken label costs."""
    plain = evaluated(configured("passages"), Reader())
    artifact = evaluated(configured("evidence"), Reader())
    shown = by_question(artifact.read("reading"))
    answers = {(row["method"], row["query_id"]): row for row in artifact.read("answers").to_pylist()}
    before = {(row["method"], row["query_id"]): row for row in plain.read("answers").to_pylist()}
    assert shown.keys() == {key for key in answers if key[0] != "none"}
    for key, answer in answers.items():
        assert answer["doc_ids"] == before[key]["doc_ids"]
        lines, numbers = [], [int(doc_id.rpartition("d")[2]) for doc_id in answer["doc_ids"]]
        # A score whose quote is made up loses 0.5.
        fair = {n: SCORES[n % 4] - (0.5 if n % 4 == 2 else 0) for n in numbers}
        label = [None if is_broken(n) else fair[n] for n in numbers]
        read = [n for n, of_n in zip(numbers, label, strict=True) if of_n != 0] or numbers[:1]
        for number in reversed(read):
            quote = [f"Evidence: text {number}"] if number % 2 and not is_broken(number) else []
            lines += [*quote, f"hotpot text {number}"]
        known = "Knowledge: " + "\n".join(lines) + "\n\n" if lines else ""
        assert answer["prompt"].partition("iron\n\n")[2].startswith(f"{known}Question: ")
        told = shown[key]
        assert [row["is_read"] for row in told] == [n in read for n in numbers]
        assert [row["label"] for row in told] == label
        assert [row["error"] for row in told] == [labels.BAD_SCORE if is_broken(n) else None for n in numbers]
    calls = {(query_id, frozenset(row["doc_id"] for row in rows)) for (_, query_id), rows in shown.items()}
    counts, without = artifact.require()["counts"], plain.require()["counts"]
    assert counts["rows_in"] - without["rows_in"] == sum(len(doc_ids) for _, doc_ids in calls)
    broken = sum(is_broken(int(doc_id.rpartition("d")[2])) for _, doc_ids in calls for doc_id in doc_ids)
    assert counts["quarantined"] == {labels.BAD_SCORE: broken}
    assert counts["llm_tokens"] > without["llm_tokens"]
    assert {row["label"] for rows in shown.values() for row in rows} == {0.0, 0.5, 1.0, None}


def test_who_asks_does_not_know_the_answer(evaluated):
    """In training a gold answer lowers a label whose passage lacks it (C.1); here it would give the answer away."""
    prompts, labelled = [], []
    for folder, answers in (("one", ["hotpot text"]), ("other", ["something else"])):
        engine = Reader()
        artifact = evaluated(configured("evidence"), engine, folder, answers)
        prompts.append(engine.prompts)
        labelled.append(artifact.read("reading").to_pylist())
    assert prompts[0] == prompts[1]
    assert labelled[0] == labelled[1]


def test_methods_that_retrieved_the_same_share_a_call():
    """Prevents paying again for each round of training; what a method finds must not depend on the other methods."""
    asked = []

    class Client:
        scorer_id = "rule"

        def answer(self, requests, *, label):
            asked.append([request.unit for request in requests])
            return [LLMResult(request_id=request.request_id, error="no") for request in requests]

    def ask(method, *texts):
        documents = tuple(map(document, texts))
        first = knowledge.request(method, query(), documents, passage_tokens=9, max_new_tokens=9)
        return Ask(method=method, query=query(), documents=documents, scores=(), requests=(first,))

    questions = [ask("base", "a", "b"), ask("round_1", "b", "a"), ask("trained", "a", "c"), ask("none")]
    arranged, rows, counts = reading.arranged(configured("evidence"), Client(), questions)
    assert [len(set(units)) for units in asked] == [2]
    assert (len(rows), counts.rows_in, counts.quarantined) == (6, 4, {"no": 4})
    assert all(row["is_read"] and row["error"] == "no" for row in rows)
    texts = ["".join(part.text for part in question.requests[0].segments) for question in arranged]
    best_last = [re.findall(r"^(?:Knowledge: )?([abc])$", text, re.M) for text in texts]
    assert best_last == [["b", "a"], ["a", "b"], ["c", "a"], []]


# --- the run ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["evidence", "vote"])
def test_a_killed_evaluation_goes_on_where_it_was(how, evaluated):
    """Labels are paid once: the same calls are made again, and answered by the store."""
    whole = Reader()
    expected = evaluated(configured(how), whole, "whole")
    # Labels, those that were broken once more, answers.
    assert whole.calls == {"evidence": 3, "vote": 1}[how]
    for dies_at in range(1, whole.calls + 1):
        folder = f"killed at {dies_at}"
        with pytest.raises(KeyboardInterrupt):
            evaluated(configured(how), Reader(dies_at), folder)
        rest = Reader()
        artifact = evaluated(configured(how), rest, folder)
        assert rest.calls == whole.calls - dies_at + 1
        for table in ("metrics", "answers", "reading"):
            assert artifact.read(table) == expected.read(table)


def spec_id(config, prepare, root):
    embeddings = {"base": world.Embeddings("base", prepare)}
    llm = world.Asset(name="fake", kind="model", path=root, fingerprint="fake")
    return world.evaluate_spec(config, llm, prepare, embeddings, embeddings).id


def test_settings_name_an_evaluation_only_where_they_matter(tmp_path):
    """Prevents old evaluations that are done again, and new ones that are taken for each other."""
    prepare = world.make_prepare(tmp_path)

    def changed_by(how):
        config = configured(how)
        votes = {"qa": TaskConfig(score=TaskScore(label_votes=2))}
        changes = {
            "floor": replace(config, evaluate=replace(config.evaluate, score_floor=1.0)),
            "votes": replace(config, tasks=config.tasks | votes),
            "temperature": replace(config, train=TrainConfig(temperature=1.0)),
        }
        old = spec_id(config, prepare, tmp_path)
        return {name for name, change in changes.items() if spec_id(change, prepare, tmp_path) != old}

    assert changed_by("passages") == set()
    assert changed_by("evidence") == {"floor", "votes"}
    assert changed_by("vote") == {"temperature"}
    assert len({spec_id(configured(how), prepare, tmp_path) for how in ("passages", "evidence", "vote")}) == 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluate.reading=aloud"], "passages, evidence, vote"),
        (["evaluate.score_floor=2"], "above 1"),
        (["evaluate.reading=evidence", "evaluate.num_llm_queries.hotpotqa=0"], "no question"),
        (["evaluate.reading=vote", "train.temperature=0"], "train.temperature"),
    ],
)
def test_settings_that_cannot_be_read_by_are_refused(overrides, message):
    """After hours of training it is too late to learn that nothing is read as was asked for."""
    with pytest.raises(ConfigError, match=message):
        loading.load(Path(__file__).parents[2] / "conf" / "quickstart.yaml", overrides)


def test_passages_that_do_not_fit_a_label_call_are_refused_before_anything_runs(tmp_path):
    config = configured("evidence")
    prepare = world.make_prepare(tmp_path)
    small = replace(config, llm=replace(config.llm, max_model_tokens=400))
    with pytest.raises(ConfigError, match="passages_per_call"):
        spec_id(small, prepare, tmp_path)


@pytest.mark.parametrize("how", ["passages", "evidence", "vote"])
def test_the_report_tells_how_questions_were_read(how, evaluated, tmp_path):
    """Figures of two readings that look alike are compared as if they were of two retrievers."""
    config = configured(how)
    artifact = evaluated(config, Reader())
    prepare = Artifact(
        tmp_path / "here", world.ArtifactSpec(stage="prepare", version=1, config={}, inputs={"of": "prepare"})
    )
    results = write_report(
        run_dir=tmp_path / "run",
        config=config,
        artifacts={"prepare": prepare, "evaluate": artifact},
        stages=[],
        command="llmr run x",
        commit="abc",
    )
    of_rows = {(row["method"], row["measure"]): row.get("reading") for row in results["rows"]}
    assert {measure: of_rows["base", measure] for measure in ("EM", "F1", "nDCG@10", "R@10")} == {
        "EM": how, "F1": how, "nDCG@10": None, "R@10": None
    }  # fmt: skip
    assert of_rows["none", "EM"] is None
    page = (tmp_path / "run" / "report.html").read_text()
    console = Console(file=io.StringIO(), width=80)
    print_table(results, console)
    assert ("How questions were read" in page) == ("reading" in results) == (how != "passages")
    assert (f"by reading: {how}" in console.file.getvalue()) == (how != "passages")
    if how == "passages":
        return
    rows = artifact.read("reading").to_pylist()
    for told in results["reading"]["passages"]:
        mine = [row for row in rows if row["method"] == told["method"]]
        assert told["passages"] == len(mine) == 15
        assert told["dropped"] == sum(not row["is_read"] for row in mine)
        assert told["unlabelled"] == sum(row["error"] is not None for row in mine)
    assert (sum(row["dropped"] for row in results["reading"]["passages"]) > 0) == (how == "evidence")
