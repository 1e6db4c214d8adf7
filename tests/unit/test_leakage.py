"""Leakage: copies of test queries in training data and examples, against plain loops over all pairs."""

import io
import json
import random
import re
import unicodedata

import pyarrow as pa
import pytest
from rich.console import Console

from llmr_ray.artifacts import Artifact
from llmr_ray.config import Config
from llmr_ray.evaluation import leakage_stage
from llmr_ray.evaluation.leakage import (
    IN_DOCUMENT,
    KINDS,
    NEAR,
    NEAR_TEXT,
    OTHER_NUMBERS,
    SAME_TEXT,
    SCHEMA,
    Probe,
    Probes,
    gravest,
    leakage_figures,
    rows_of_document,
    rows_of_query,
)
from llmr_ray.evaluation.report import print_table
from llmr_ray.schemas import table_of
from tests.feedback_world import make_artifact


def probe(text, query_id="t", task="qa", targets=(), dataset="d", pool=None):
    pool = pool or ("icl" if task == "icl" else dataset)
    return Probe(query_id=query_id, dataset=dataset, task=task, pool=pool, text=text, targets=tuple(targets))


def document(doc_id, text, task="icl", pool="icl", owner="geo"):
    return {"doc_id": doc_id, "task": task, "pool": pool, "text": text, "meta": json.dumps({"dataset": owner})}


def kinds(text, other):
    return [held.kind for held in Probes([probe(text)]).copies(other)]


@pytest.mark.parametrize(
    ("text", "other", "expected"),
    [
        ("Who wrote the novel Emma?", "who wrote novel  EMMA", [SAME_TEXT]),
        ("Who wrote the famous novel Emma by the sea?", "Who wrote the famous novel Emma by the seas?", [NEAR_TEXT]),
        ("Who won the football World Cup in 1994?", "Who won the football World Cup in 1998?", [OTHER_NUMBERS]),
        ("Who wrote the novel Emma?", "Who composed the opera Emma?", []),
        ("???", "!!!", []),
        ("Ｗho wrote it?", "who wrote it", [SAME_TEXT]),
    ],
)
def test_kinds_of_copies(text, other, expected):
    """A copy that differs in case or a letter is as good as the original; a question with another year is not."""
    assert kinds(text, other) == expected


def plain(text):
    """The naive reading of the same definitions."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    bare = re.sub(r"\b(a|an|the)\b", " ", re.sub(r"[!-/:-@\[-`{-~]", "", text))
    return " ".join(bare.split()) or text


def plain_grams(text):
    text = plain(text)
    return {text[place : place + 3] for place in range(max(1, len(text) - 2))}


def test_no_near_copy_is_missed_or_made_up():
    """LSH proposes: what it overlooks is a leak that nobody sees, what it makes up an alarm that nobody trusts."""
    rng = random.Random(3)
    words = [
        "river",
        "town",
        "mill",
        "market",
        "sea",
        "castle",
        "bridge",
        "forest",
        "queen",
        "letter",
        "music",
        "garden",
        "winter",
        "table",
        "number",
    ]
    tests = [" ".join(rng.choices(words, k=rng.randint(7, 14))) for _ in range(60)]
    others = [" ".join(rng.choices(words, k=9)) for _ in range(40)]
    for text in tests:
        letters = list(text)
        for _ in range(rng.randint(1, 3)):
            letters[rng.randrange(len(letters))] = rng.choice("abcxyz ")
        others.append("".join(letters))
    probes = Probes([probe(text, f"t{number}") for number, text in enumerate(tests)])
    found = {(held.probe.query_id, place) for place, other in enumerate(others) for held in probes.copies(other)}
    sets = [plain_grams(text) for text in tests]
    expected = {
        (f"t{number}", place)
        for place, other in enumerate(map(plain_grams, others))
        for number, own in enumerate(sets)
        if len(own & other) / len(own | other) >= NEAR
    }
    assert 30 < len(expected) < 80
    assert found == expected


def test_an_example_with_the_query_inside_is_found_with_its_answer():
    """The LLM that is shown it copies the answer, and the retriever is praised for it."""
    probes = Probes(
        [
            probe("what is the capital of France?", "t0", "icl", ["Paris"]),
            probe("is it so", "short", "icl", ["yes"]),
            probe("what is the capital of France?", "qa", "qa", ["Paris"]),
        ]
    )
    solved = rows_of_document(probes, document("d1", "What is the capital of France\nParis"))
    assert [(row["query_id"], row["kind"], row["with_answer"]) for row in solved] == [("t0", SAME_TEXT, True)]
    longer = "Some words before. What is the capital of France? And of Spain? Is it so in all of them?\nMadrid"
    inside = rows_of_document(probes, document("d2", longer))
    assert [(row["query_id"], row["kind"], row["with_answer"]) for row in inside] == [("t0", IN_DOCUMENT, False)]
    near = document("d3", "what is the capital of Frances\nParis")
    assert rows_of_document(probes, near)[0]["kind"] == NEAR_TEXT
    assert rows_of_document(probes, document("d4", "the capital of France\nParis")) == []


def test_a_passage_that_is_a_test_query_is_told_apart():
    """A figure of retrieval over questions and answers says how well copies are found, and nobody would know."""
    probes = Probes(
        [
            probe("How do I reset my password?", "q0", targets=["Ask"], dataset="faq"),
            probe("How do I reset my password?", "q1", targets=["Ask"], dataset="wiki"),
            probe("Where is it?", "q2", "tool", dataset="faq"),
            probe("How do I reset my password?", "q3", "chat", dataset="talk"),
        ]
    )
    texts = {
        "same": "how do I reset my password",
        "near": "How do I reset my passwords?",
        "inside": f"{'Other words about everything. ' * 40}How do I reset my password? Ask the desk.",
        "short": "Where is it? Over there, behind the house.",
        "none": "Words of nothing that was ever asked.",
    }
    rows = [row for name, text in texts.items() for row in rows_of_document(probes, document(name, text, "qa", "faq"))]
    assert [(row["query_id"], row["where"], row["other_id"], row["kind"], row["with_answer"]) for row in rows] == [
        ("q0", "passage", "same", SAME_TEXT, False),
        ("q0", "passage", "near", NEAR_TEXT, False),
        ("q0", "passage", "inside", IN_DOCUMENT, True),
    ]
    # A dialogue's earlier turns may repeat, and no other pool's queries can find them.
    assert rows_of_document(probes, document("turn", texts["same"], "chat", "talk:1")) == []


def test_long_texts_are_passed_over_only_where_they_cannot_be_near():
    """A passage is told from queries by its beginning alone, but a text that repeats itself has few pieces."""
    query = "who wrote the famous novel Emma by the sea?"
    repeated = " ".join([query.strip("?")] * 30)
    own, other = plain_grams(query), plain_grams(repeated)
    assert len(own & other) / len(own | other) >= NEAR
    assert kinds(query, repeated) == [NEAR_TEXT]
    assert kinds(query, f"{query} {' '.join(map(str, range(200)))}") == []


def prepared(root, monkeypatch=None):
    """A test query of each kind, training queries of two data sets, examples, passages and earlier turns."""
    pools = {"icl": "icl", "qa": "nq", "chat": "talk"}
    tests = [
        ("a0", "nq", "qa", "who wrote the novel Emma?"),
        ("a1", "nq", "qa", "where does the long river of the north end?"),
        ("a2", "nq", "qa", "when was the old bridge of 1880 built again?"),
        ("a3", "nq", "qa", "what has nobody ever asked before today?"),
        ("b0", "piqa", "icl", "how do I open a jar of honey?"),
        ("c0", "talk", "chat", "do you bake bread?"),
    ]
    trains = [
        ("x0", "nq", "qa", "Who wrote a novel Emma"),
        ("x1", "hotpot", "qa", "who wrote the novel, Emma?!"),
        ("x2", "hotpot", "qa", "where does the long river of the north ends?"),
        ("x3", "hotpot", "qa", "when was the old bridge of 1881 built again?"),
        ("x4", "piqa", "icl", "how do I close a door?"),
    ]
    queries = [
        {
            "query_id": name,
            "dataset": dataset,
            "task": task,
            "query": text,
            "split": split,
            "targets": ["turn"],
            "pool": pools[task],
            "history_end": None,
        }
        for split, rows in (("test", tests), ("train", trains))
        for name, dataset, task, text in rows
    ]
    texts = [
        ("icl", "how do I open a jar of honey\nturn it"),
        ("qa", "Emma is a novel. who wrote the novel Emma?\nturn"),
        ("icl", "other\nx"),
        ("chat", "do you bake bread?"),
    ]
    corpus = [
        {"doc_id": f"d{n}", "pool": pools[task], "position": n, "task": task, "text": text}
        | {"meta": json.dumps({"dataset": "siqa"}) if task == "icl" else None}
        for n, (task, text) in enumerate(texts)
    ]
    return make_artifact(
        root, "prepare", {"queries": table_of("queries", queries), "corpus": table_of("corpus", corpus)}
    )


def compared(root, prepare):
    artifact = Artifact(root, leakage_stage.leakage_spec(prepare))
    artifact.begin()
    leakage_stage.run_leakage(Config(), artifact, prepare)
    return artifact


def test_the_stage_finds_what_is_there_and_accounts_for_every_row(tmp_path):
    """Data sets are checked against each other: prepare alone compares them within a task, and only exactly."""
    prepare = prepared(tmp_path)
    artifact = compared(tmp_path, prepare)
    rows = artifact.read("leakage").to_pylist()
    assert {(row["query_id"], row["other_dataset"], row["other_id"], row["kind"]) for row in rows} == {
        ("a0", "nq", "x0", SAME_TEXT),
        ("a0", "hotpot", "x1", SAME_TEXT),
        ("a1", "hotpot", "x2", NEAR_TEXT),
        ("a2", "hotpot", "x3", OTHER_NUMBERS),
        ("a0", "nq", "d1", IN_DOCUMENT),
        ("b0", "siqa", "d0", SAME_TEXT),
    }
    counts = artifact.require()["counts"]
    assert (counts["rows_in"], counts["ok"]) == (15, 8)
    assert counts["skipped"] == {"no_test_query_may_retrieve_it": 1, "held_out_query": 6}
    told = leakage_figures(
        artifact.read("leakage"), prepare.read("queries"), {"duplicate_of_test": 3}, prepare.read("corpus")
    )
    by_dataset = {row["dataset"]: row for row in told["training"]}
    assert (by_dataset["nq"]["n"], by_dataset["piqa"]["n"]) == (4, 1)
    assert by_dataset["nq"]["kinds"] == {SAME_TEXT: 1, NEAR_TEXT: 1, OTHER_NUMBERS: 1}
    assert by_dataset["nq"]["by_dataset"]["nq"] == {SAME_TEXT: 1}
    assert by_dataset["piqa"]["kinds"] == {}
    (examples,) = told["documents"]
    assert (examples["dataset"], examples["kinds"], examples["with_answer"]) == ("piqa", {SAME_TEXT: 1}, 1)
    (passages,) = told["passages"]
    assert (passages["dataset"], passages["n"], passages["kinds"]) == ("nq", 4, {IN_DOCUMENT: 1})
    assert (passages["with_answer"], passages["too_short"]) == (1, 0)
    assert told["not_compared"] == ["talk"]
    assert told["removed"] == {"duplicate_of_test": 3}
    assert {row["other_text"] for row in told["examples"] if row["where"] == "document"} == {
        "how do I open a jar of honey\nturn it"
    }
    assert len(json.dumps(told)) > 100


def test_the_terminal_tells_what_training_holds(tmp_path):
    """A leak that stands in a file alone is found after the figures were believed."""
    prepare = prepared(tmp_path)
    found = compared(tmp_path, prepare).read("leakage")
    console = Console(file=io.StringIO(), width=200)
    leakage = leakage_figures(found, prepare.read("queries"), {})
    print_table({"name": "x", "split": "test", "rows": [], "stages": [], "leakage": leakage}, console)
    told = console.file.getvalue()
    assert "nq: of 4 test queries among training queries: 1 same text, 1 near copy, 1 near but for numbers" in told
    assert "piqa: of 1 test queries among examples that may be retrieved: 1 same text" in told
    assert "nq: of 4 test queries among the documents that they are to find (no leak by itself): 1 inside" in told


def test_shards_of_any_size_say_the_same(tmp_path, monkeypatch):
    """A window that ends inside a batch, or in the next table, must lose or repeat no row."""
    prepare = prepared(tmp_path)
    whole = compared(tmp_path, prepare)
    expected = leakage_figures(whole.read("leakage"), prepare.read("queries"), {})
    pieces = leakage_stage.pieces(prepare)
    for size in (1, 3, 7):
        monkeypatch.setattr(leakage_stage, "SHARD_ROWS", size)
        artifact = Artifact(tmp_path / str(size), leakage_stage.leakage_spec(prepare))
        artifact.begin()
        worker = leakage_stage.LeakageWorker(artifact, prepare, pieces, size)
        number = -(-15 // size)
        for shard in range(number):
            worker.run(shard)
        artifact.commit(number, seconds=0)
        assert artifact.require()["counts"] == whole.require()["counts"]
        assert leakage_figures(artifact.read("leakage"), prepare.read("queries"), {}) == expected


def test_each_test_query_counts_once_by_its_gravest_copy():
    """A test query with ten copies is one leak, and an exact copy must not hide behind a near one."""
    probes = Probes([probe("who wrote the famous novel Emma by the sea?", "t0", dataset="nq")])
    train = [
        {"query_id": f"x{number}", "dataset": "hotpot", "query": text}
        for number, text in enumerate(
            [
                "who wrote the famous novel Emma by the seas?",
                "who wrote the famous novel Emma by the sea",
                "who wrote the famous novel Emma by the sea!",
            ]
        )
    ]
    rows = gravest(row for query in train for row in rows_of_query(probes, query))
    assert [(row["other_id"], row["kind"]) for row in rows] == [("x1", SAME_TEXT)]
    assert KINDS[0] == SAME_TEXT
    assert pa.Table.from_pylist(rows, SCHEMA).num_rows == 1
