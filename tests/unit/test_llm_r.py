"""LLM-R's published files: letters become texts, a query does not retrieve itself, bad rows cost themselves."""

import gzip
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmr_ray import loading
from llmr_ray.artifacts import Artifact
from llmr_ray.assets import Asset
from llmr_ray.config import Config, DatasetConfig, PrepareConfig, TaskConfig, TaskScore, identity
from llmr_ray.data import stage
from llmr_ray.data.llm_r import read_llm_r
from llmr_ray.data.records import Bad, Document, Query, Record, Skip, Source
from llmr_ray.data.selection import Selected, collect, given_reward_rows, given_rows, held_out_texts, select
from llmr_ray.data.stage import PrepareWorker, prepare_spec
from llmr_ray.errors import ConfigError, DataError
from llmr_ray.evaluation.published import differences, published_tables
from llmr_ray.evaluation.results import held_out_tasks
from llmr_ray.feedback.jobs import feedback_tasks, given_tasks
from llmr_ray.feedback.stage import reward_spec, run_reward
from llmr_ray.mining.stage import mine_spec

CONF = Path(__file__).parents[2] / "conf"


HELD_OUT = {"qnli", "piqa", "wsc273", "yelp"}


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
    (row("arc_e_train_4", "Cold?", ["B"], ["", "ice", "fire", "rain"]), "empty_text"),  # B is ice
    (row("arc_e_train_5", "Cold?", ["A"], 4), "not_text"),
    (row("squad_v1_train_1", "Who?", ["one"], ["one", "two"]), "unreadable_options"),
    (row("squad_v1_train_3", "Who?", ["one"], ["", ""]), "unreadable_options"),
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


def test_a_passage_with_another_data_set_s_test_input_is_left_out(folder: Path) -> None:
    """mnli's examples are those of mnli_m and mnli_mm: read alone, it has no test input for its passages to hold."""
    inputs = ["Premise of m", "two\nlines", "kept", "also\nkept", "of mm"]
    tests = [row("mnli_m_test_0", "premise  of M", ["No"]), row("mnli_m_test_1", "Two lines", ["No"])]
    write(folder, "test.jsonl.gz", [*tests, row("mnli_mm_test_0", "of mm", ["Yes"])])
    rows = [{"id": str(n), "contents": f"{text}\nMaybe", "task_name": "mnli"} for n, text in enumerate(inputs)]
    write(folder, "passages.jsonl.gz", rows)
    write(folder, "train.jsonl.gz", [row("mnli_train_0", "kept", ["Maybe"])])
    parts = {
        name: selected(folder, *names)[0] for name, names in {"alone": ["mnli"], "both": ["mnli", "mnli_m"]}.items()
    }
    assert {name: {document.doc_id[-1] for document in part.corpus} for name, part in parts.items()} == {
        "alone": set("01234"),
        "both": set("234"),
    }
    assert parts["both"].counts.skipped == {"example_of_held_out_query": 2}
    parts["both"].counts.check("test")


def kd(identity: str, scores: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A row of candidates and their scores, as published."""
    return row(identity, "?", ["Yes"], doc_ids=list(scores), doc_scores=list(scores.values()), **changes)


def test_given_candidates_keep_their_scores_best_first(folder: Path) -> None:
    """Candidates paired with another document's score would be ranked by chance."""
    given = kd("rte_train_0", {"2": 1.5, "4": 7.25, "0": float("nan")})
    given["doc_ids"].append("2")
    given["doc_scores"].append(0.5)
    write(folder, "bm25_train.jsonl.gz", [given, kd("arc_e_train_0", {"1": 3})])
    [rte] = selected(folder, "rte", candidates="bm25_train.jsonl.gz")
    assert [(pair["query_id"], pair["doc_id"], pair["retrieval_score"]) for pair in given_rows(rte.chosen)] == [
        ("rte:rte_train_0", "llm_r:4", 7.25),
        ("rte:rte_train_0", "llm_r:2", 1.5),
    ]
    assert given_reward_rows(rte.chosen) == []
    assert rte.counts.skipped["candidate_without_score"] == rte.counts.skipped["repeated_candidate"] == 1


@pytest.mark.parametrize("setting", ["candidates", "given_rewards"])
def test_bad_rows_of_candidates_cost_themselves(folder: Path, setting: str) -> None:
    """Scores that are not one for each candidate would stand with others; ids of another file would find nothing."""
    bad = [
        row("rte_train_1", "?", ["No"], doc_ids=["1"], doc_scores=[1, 2]),
        row("rte_train_1", "?", ["No"], doc_ids=["1"]),
        kd("rte_train_1", {"x": 1.0}),
        kd("rte_train_1", {"1": "2"}),
        kd("rte_train_77", {"1": 1.0}),
    ]
    name = "kd_bm25_train.jsonl.gz"
    settings: dict[str, Any] = {setting: [name] if setting == "given_rewards" else name}
    write(folder, name, [*bad, kd("rte_train_0", {"1": 2.0})])
    records = read(folder, "rte", **settings)
    assert [(record.row, record.reason) for record in kinds(records, Bad) if record.row.startswith("kd")] == [
        (f"{name}:1", "scores_length"),
        (f"{name}:2", "missing_field"),
        (f"{name}:3", "bad_id"),
        (f"{name}:4", "not_a_number"),
        (f"{name}:5", "unknown_query"),
    ]
    assert {query.query_id for query in kinds(records, Query) if query.given} == {"rte:rte_train_0"}
    write(folder, name, [kd("rte_train_77", {"1": 1.0}), kd("rte_train_78", {"1": 1.0})])
    with pytest.raises(DataError, match="rte_train_77"):
        read(folder, "rte", **settings)


def test_scores_of_several_files_are_rewards(folder: Path) -> None:
    """The released model learned from two files, in which queries repeat (H.2): as a dictionary the last row wins."""
    first = [
        kd("rte_train_0", {"0": 1.5, "4": -2.0, "2": float("inf")}),
        kd("arc_e_train_0", {"4": 1.0, "0": 0.25}),
        kd("rte_train_0", {"7": 0.5}),
    ]
    write(folder, "kd_bm25_train.jsonl.gz", first)
    write(
        folder,
        "kd_it2_train.jsonl.gz",
        [kd("rte_train_1", {"0": 3.0, "2": 1.0}), kd("rte_train_0", {"2": 4.0, "4": -2})],
    )
    files = ["kd_bm25_train.jsonl.gz", "kd_it2_train.jsonl.gz"]
    [rte] = selected(folder, "rte", given_rewards=files)
    expected = {"rte_train_0": {"0": 1.5, "4": -2.0, "7": 0.5, "2": 4.0}, "rte_train_1": {"0": 3.0, "2": 1.0}}
    pairs = [
        (f"rte:{query}", f"llm_r:{doc}", reward) for query, found in expected.items() for doc, reward in found.items()
    ]
    assert [(pair["query_id"], pair["doc_id"], pair["reward"]) for pair in given_reward_rows(rte.chosen)] == pairs
    assert [(pair["query_id"], pair["doc_id"], pair["retrieval_score"]) for pair in given_rows(rte.chosen)] == [
        (query, doc, None) for query, doc, _ in pairs
    ]
    write(folder, "bm25_train.jsonl.gz", [kd("rte_train_1", {"1": 5.0, "2": 9.0})])
    [both] = selected(folder, "rte", given_rewards=files, candidates="bm25_train.jsonl.gz")
    assert [
        (pair["doc_id"], pair["retrieval_score"])
        for pair in given_rows(both.chosen)
        if pair["query_id"] == "rte:rte_train_1"
    ] == [
        ("llm_r:2", 9.0),
        ("llm_r:1", 5.0),
        ("llm_r:0", None),
    ]
    assert given_reward_rows(both.chosen) == given_reward_rows(rte.chosen)


def test_the_stages_take_published_rewards(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named as candidates alone the scores are of no teacher, and the run ends where rewards are made."""
    monkeypatch.setattr(stage, "GIVEN_QUERIES", 1)  # the table comes in several parts
    write(folder, "kd_bm25_train.jsonl.gz", [kd("rte_train_0", {"0": 1.5, "4": -2.0}), kd("rte_train_1", {"2": 0.5})])
    write(folder, "kd_it2_train.jsonl.gz", [kd("rte_train_1", {"0": -0.5}), kd("arc_e_train_0", {"0": 1.0, "4": 2.0})])
    tasks = {"icl": TaskConfig(score=TaskScore(feedback="given"))}
    common = {"task": "icl", "source": "llm_r", "path": "here", "num_train": 9, "num_test": 9}

    def rewards(**settings: Any) -> list[tuple[str, str, float, str, str | None]]:
        datasets = {name: DatasetConfig(**common, **settings) for name in ("rte", "arc_e")}
        prepare = PrepareConfig(max_bad_fraction=0.9)
        config = Config(name="t", tasks=tasks, datasets=datasets, prepare=prepare)
        spec = prepare_spec(config, {"here": Asset("here", "local", folder, "print")})
        prepared = Artifact(tmp_path / "artifacts", spec)
        prepared.begin()
        PrepareWorker(prepared, ["icl"], datasets, prepare, dict.fromkeys(datasets, folder), folder).run(0)
        prepared.commit(1, seconds=0)
        scores = Artifact(tmp_path / "artifacts", replace(spec, stage="score"))
        scores.begin()
        scores.commit(0, seconds=0)
        mine_spec(config, prepared, prepared, prepared)
        made = Artifact(tmp_path / "artifacts", reward_spec(config, prepared, scores))
        made.begin()
        run_reward(config, made, prepared, scores)
        return [tuple(entry.values()) for entry in made.read("rewards").to_pylist()]

    assert set(rewards(given_rewards=["kd_bm25_train.jsonl.gz", "kd_it2_train.jsonl.gz"])) == {
        ("rte:rte_train_0", "llm_r:0", 1.5, "given", None),
        ("rte:rte_train_0", "llm_r:4", -2.0, "given", None),
        ("rte:rte_train_1", "llm_r:2", 0.5, "given", None),
        ("rte:rte_train_1", "llm_r:0", -0.5, "given", None),
        ("arc_e:arc_e_train_0", "llm_r:0", 1.0, "given", None),
        ("arc_e:arc_e_train_0", "llm_r:4", 2.0, "given", None),
    }
    with pytest.raises(DataError, match="given_rewards"):
        rewards(candidates="kd_bm25_train.jsonl.gz")


def test_published_scores_alone_train(tmp_path: Path) -> None:
    """A data set without the files would train on nothing, and one that asks the LLM is not the released run."""
    config = loading.load(CONF / "paper" / "llm_r_scores.yaml")
    files = ["kd_bm25_train.jsonl.gz", "kd_it2_train.jsonl.gz"]
    trained = {name for name, dataset in config.datasets.items() if dataset.num_train}
    assert {name: dataset.given_rewards for name, dataset in config.datasets.items() if dataset.given_rewards} == (
        dict.fromkeys(trained, files)
    )
    assert (given_tasks(config), feedback_tasks(config), config.reward_model.model) == (["icl"], {}, "")
    whole = loading.load(CONF / "paper" / "llm_r.yaml")
    for same in ("train", "embedder", "evaluate", "llm"):
        assert getattr(config, same) == getattr(whole, same)
    assert config.tasks["icl"].train == whole.tasks["icl"].train
    assert config.tasks["icl"].mine.num_given == 100 * len(files)
    with pytest.raises(ConfigError, match=r"datasets\.rte\.given_rewards"):
        loading.load(CONF / "paper" / "llm_r_scores.yaml", ["datasets.rte.source=jsonl"])
    assert "given_rewards" not in identity(DatasetConfig(source="llm_r"))
    assert identity(config.datasets["rte"])["given_rewards"] == files


def test_the_papers_configuration_tests_all_and_trains_on_none_that_is_held_out() -> None:
    """A held-out task that is trained on makes the claim about unseen tasks void."""
    config = loading.load(CONF / "paper" / "llm_r_tasks.yaml")
    tested = {name for name, dataset in config.datasets.items() if dataset.num_test}
    assert set(config.evaluate.num_llm_queries) == tested
    assert len(tested) == 30
    assert held_out_tasks(config) == HELD_OUT
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


def test_a_held_out_task_that_is_trained_on_is_told() -> None:
    """Held out is what a run does not train on; beside the paper's figures it says what the paper did not train on."""
    config = loading.load(CONF / "llm_r.yaml", ["datasets.piqa.num_train=48"])
    assert "piqa" not in held_out_tasks(config)
    told = {item["what"]: item["ours"] for item in differences(published_tables()["llm_r_main"], config)}
    assert "piqa (48)" in told["further training data"]
