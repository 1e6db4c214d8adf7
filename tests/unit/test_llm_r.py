"""LLM-R's published files: letters become texts, a query does not retrieve itself, bad rows cost themselves."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest

from llmr_ray import loading
from llmr_ray.config import DatasetConfig, PrepareConfig
from llmr_ray.data.example_tasks import TASKS, pool_of
from llmr_ray.data.llm_r import read_llm_r
from llmr_ray.data.records import Bad, Document, Query, Record, Skip, Source
from llmr_ray.data.selection import Selected, collect, held_out_texts, select
from llmr_ray.errors import ConfigError, DataError
from llmr_ray.evaluation.results import held_out_tasks


def row(identity: str, query: str, answers: Any, options: Any = None, **changes: Any) -> dict[str, Any]:
    task = identity.rsplit("_", 2)[0]
    fields = {"query_id": identity, "query": query, "options": options or [""], "answers": answers, "task_name": task}
    return fields | changes


RTE = "{} Based on the paragraph above can we conclude that x? Yes or No?".format
TRAIN = [
    row("rte_train_0", RTE("It rains."), ["Yes"]),
    row("rte_train_1", RTE("It snows."), ["No"]),
    row("arc_e_train_0", "What is hot?", ["B"], ["ice", "fire", "snow", "rain"]),
    row("squad_v1_train_0", "Please answer\nin two lines?", ["one", "uno"]),
    row("mnli_train_0", "Premise", ["Maybe"]),
]
BAD = [
    (row("rte_train_2", RTE("Hail."), ["Perhaps"]), "unknown_label"),
    (row("rte_train_3", " ", ["Yes"]), "empty_text"),
    (row("rte_train_4", RTE("Fog."), []), "empty_text"),
    (row("rte_test_5", RTE("Sun."), ["Yes"]), "bad_id"),
    (row("arc_e_train_1", "Cold?", ["E"], ["ice", "fire", "snow", "rain"]), "answer_not_in_options"),
    (row("arc_e_train_2", "Cold?", ["A"]), "empty_text"),
    (row("arc_e_train_3", "Cold?", ["A"], ["ice", "fire", "ice", "rain"]), "equal_options"),
    (row("squad_v1_train_1", "Who?", ["one"], ["one", "two"]), "unreadable_options"),
    (row("squad_v1_train_2", "Who?", None), "missing_field"),
]
TEST = [
    row("rte_test_0", RTE("It pours."), ["Yes"]),
    row("arc_e_test_0", "What is cold?", ["C"], ["fire", "sun", "ice", "lava"]),
    row("arc_e_test_1", "Three?", ["A"], ["one", "two", "three"]),
    row("mnli_m_test_0", "Premise of m", ["No"], task_name="mnli_m"),
]
PASSAGES = [
    ("rte", RTE("It rains.") + "\nNo"),  # the same input with the other label
    ("rte", RTE("It rains.") + "\nYes"),
    ("rte", RTE("Other.") + "\nNo"),
    ("rte", RTE("It pours.") + "\nYes"),  # the input of a test query
    ("arc_e", "What is hot?\nfire"),
    ("squad_v1", "Please answer\nin two lines?\none"),
    ("mnli", "Premise\nMaybe"),
    ("rte", RTE("It rains.") + " really?\nYes"),  # begins alike, but is another input
]


def write(folder: Path, name: str, rows: list[Any]) -> None:
    lines = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in rows]
    (folder / name).write_bytes(gzip.compress(b"\n".join(lines) + b"\n"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    mixed = [*TRAIN, *(bad for bad, _ in BAD)]
    random.Random(3).shuffle(mixed)  # the published rows are shuffled
    write(tmp_path, "train.jsonl.gz", mixed)
    write(tmp_path, "test.jsonl.gz", TEST)
    passages = [{"id": str(n), "contents": text, "task_name": task} for n, (task, text) in enumerate(PASSAGES)]
    write(tmp_path, "passages.jsonl.gz", passages)
    return tmp_path


def read(folder: Path, name: str, **settings: Any) -> list[Record]:
    config = DatasetConfig(task="icl", source="llm_r", **settings)
    return list(read_llm_r(Source(name=name, config=config, path=folder, tokenizer=folder)))


def kinds(records: list[Record], kind: type) -> list[Any]:
    return [record for record in records if isinstance(record, kind)]


def test_classification_multiple_choice_and_free_answers(folder: Path) -> None:
    """A letter as answer scores the letter; [""] read as an option makes a choice of nothing (H.2)."""
    by_id = {q.query_id: q for name in ("rte", "arc_e", "squad_v1") for q in kinds(read(folder, name), Query)}
    labelled, choice, free = (by_id[f"{n}:{n}_train_0"] for n in ("rte", "arc_e", "squad_v1"))
    assert (labelled.options, labelled.gold_option, labelled.targets) == (("Yes", "No"), 0, ("Yes",))
    assert (choice.options, choice.gold_option, choice.targets) == (("ice", "fire", "snow", "rain"), 1, ("fire",))
    assert (free.options, free.gold_option, free.targets) == (None, None, ("one", "uno"))
    assert {query.split for query in by_id.values()} == {"train", "test"}
    assert by_id["arc_e:arc_e_test_0"].targets == ("ice",)


def test_a_query_knows_its_own_passage(folder: Path) -> None:
    """Retrieving itself, a training query is given its answer (B.3); by row number alone no passage can be told."""
    rte = {query.query_id: query for query in kinds(read(folder, "rte"), Query)}
    assert rte["rte:rte_train_0"].self_doc_id == "llm_r:1"
    assert rte["rte:rte_train_1"].self_doc_id is None
    assert kinds(read(folder, "squad_v1"), Query)[0].self_doc_id == "llm_r:5"
    made = {document.doc_id: document.from_query for document in kinds(read(folder, "rte"), Document)}
    assert made == {
        "llm_r:0": "rte:rte_train_0",
        "llm_r:1": "rte:rte_train_0",
        "llm_r:2": None,
        "llm_r:3": "rte:rte_test_0",
        "llm_r:7": None,
    }


def selected(folder: Path, *names: str, **settings: Any) -> list[Selected]:
    config = DatasetConfig(task="icl", source="llm_r", num_train=9, num_test=9, **settings)
    collected = [
        collect(name, config, PrepareConfig(max_bad_fraction=0.9), read(folder, name, **settings)) for name in names
    ]
    held_out = held_out_texts(collected)
    return [select(data, held_out) for data in collected]


def test_the_pool_holds_no_test_query(folder: Path) -> None:
    """A pool passage with a test query's input shows its answer in the prompt."""
    [rte] = selected(folder, "rte")
    assert {document.doc_id for document in rte.corpus} == {"llm_r:0", "llm_r:1", "llm_r:2", "llm_r:7"}
    assert rte.counts.skipped["example_of_held_out_query"] == 1


@pytest.mark.parametrize(("bad", "reason"), BAD, ids=[bad["query_id"] for bad, _ in BAD])
def test_bad_rows_cost_themselves(folder: Path, bad: dict[str, Any], reason: str) -> None:
    """A label outside the task's words, or a letter without an option, has no right answer to score."""
    write(folder, "test.jsonl.gz", [])
    write(folder, "train.jsonl.gz", [bad, *TRAIN])
    records = read(folder, bad["task_name"])
    assert [record.reason for record in kinds(records, Bad)] == [reason]
    assert len(kinds(records, Query)) == sum(good["task_name"] == bad["task_name"] for good in TRAIN)


def test_rows_of_the_wrong_shape(folder: Path) -> None:
    """A line that names no task must not vanish because every task takes it for another's."""
    write(folder, "test.jsonl.gz", [b'{"query": "cut', b"[1]", {"task_name": 3}, *TEST])
    records = read(folder, "arc_e")
    reasons = [bad.reason for bad in kinds(records, Bad) if bad.row.startswith("test")]
    assert reasons == ["invalid_json", "not_an_object", "missing_field"]
    assert [skip.reason for skip in kinds(records, Skip)] == ["other_number_of_options"]
    write(folder, "passages.jsonl.gz", [{"id": "x", "contents": "c", "task_name": "arc_e"}])
    assert kinds(read(folder, "arc_e"), Bad)[-1].reason == "bad_id"


def test_files_and_names_that_are_wrong_say_so(folder: Path) -> None:
    """A download that was cut short must not become a smaller pool."""
    with pytest.raises(ConfigError, match="rte_x"):
        read(folder, "rte_x")
    with pytest.raises(DataError, match="no folder"):
        read(folder / "train.jsonl.gz", "rte")
    whole = (folder / "passages.jsonl.gz").read_bytes()
    (folder / "passages.jsonl.gz").write_bytes(whole[:-12])
    with pytest.raises(DataError, match=r"passages.*whole gzip"):
        read(folder, "rte")


def test_given_candidates_keep_their_scores_best_first(folder: Path) -> None:
    """Candidates paired with another document's score would be ranked by chance."""
    given = row("rte_train_0", "?", ["Yes"], doc_ids=["2", "4", "0", "2"], doc_scores=[1.5, 7.25, float("nan"), 0.5])
    write(folder, "bm25_train.jsonl.gz", [given, row("arc_e_train_0", "?", ["A"], doc_ids=["1"], doc_scores=[3])])
    [rte] = selected(folder, "rte", candidates="bm25_train.jsonl.gz")
    assert [(pair["query_id"], pair["doc_id"], pair["retrieval_score"]) for pair in rte.given] == [
        ("rte:rte_train_0", "llm_r:4", 7.25),
        ("rte:rte_train_0", "llm_r:2", 1.5),
    ]
    write(folder, "bm25_train.jsonl.gz", [row("rte_train_0", "?", ["Yes"], doc_ids=["1"], doc_scores=[1, 2])])
    with pytest.raises(DataError, match="doc_scores"):
        read(folder, "rte", candidates="bm25_train.jsonl.gz")


def test_the_table_is_llm_rs() -> None:
    """Thirty evaluation sets in nine categories (B.2); mnli is tested as two, whose examples are mnli's."""
    by_category = {
        "Close QA": "arc_c arc_e natural_questions",
        "Commonsense": "copa hellaswag piqa",
        "Coreference": "winogrande wsc wsc273",
        "Paraphrase": "mrpc paws qqp",
        "NLI": "rte snli mnli_m mnli_mm qnli",
        "Reading": "multirc openbookqa boolq squad_v1",
        "Sentiment": "sentiment140 sst2 yelp",
        "Data2text": "common_gen e2e_nlg dart",
        "Summarize": "aeslc ag_news gigaword",
    }
    names = {name: category for category, members in by_category.items() for name in members.split()}
    assert len(names) == 30
    assert {name: TASKS[name].category for name in names} == names
    assert {name for name in names if TASKS[name].is_held_out} == {"qnli", "piqa", "wsc273", "yelp"}
    assert {name: pool_of(name) for name in names if pool_of(name) != name} == {"mnli_m": "mnli", "mnli_mm": "mnli"}
    assert pool_of("unknown") == "unknown"
    assert {name for name in names if TASKS[name].metric == "EM"} == {"natural_questions", "squad_v1"}
    assert {name for name in names if TASKS[name].metric == "F1"} == {"multirc"}
    rouge = {"aeslc", "gigaword", "common_gen", "dart", "e2e_nlg"}
    assert {name for name in names if TASKS[name].metric == "ROUGE-L"} == rouge
    for task in TASKS.values():
        assert not task.positive_label or task.positive_label in task.labels
        # Constrained decoding tells labels apart by their first token (evaluation/examples.py).
        assert len({label.encode()[0] for label in task.labels}) == len(task.labels)


def test_the_papers_configuration_tests_all_and_trains_on_none_that_is_held_out() -> None:
    """A held-out task that is trained on makes the claim about unseen tasks void."""
    config = loading.load(Path(__file__).parents[2] / "conf" / "paper" / "llm_r_tasks.yaml")
    tested = {name for name, dataset in config.datasets.items() if dataset.num_test}
    assert set(config.evaluate.num_llm_queries) == tested
    assert len(tested) == 30
    assert held_out_tasks(config) == {name for name, task in TASKS.items() if task.is_held_out}
    assert {name for name, dataset in config.datasets.items() if not dataset.num_train} == {
        "mnli_m", "mnli_mm", *held_out_tasks(config),
    }  # fmt: skip
    # The pool has 6.3 million examples and the test sets 123 thousand (B.2); the 591 thousand training rows of the
    # published file include the cut sets of the tasks that are held out.
    datasets = config.datasets.values()
    assert sum(dataset.num_documents for dataset in datasets) == 6_283_120
    assert round(sum(dataset.num_test for dataset in datasets), -3) == 123_000
    cut = sum(min(30_000, config.datasets[name].num_documents) for name in held_out_tasks(config))
    assert round(sum(dataset.num_train for dataset in datasets) + cut, -3) == 591_000
