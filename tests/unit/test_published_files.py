"""Readers of published files: every task and tolerance of LLM-Embedder's archive, ToolBench, exchanged rows, MTEB."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from llmr_ray.config import DatasetConfig, PrepareConfig
from llmr_ray.data import files
from llmr_ray.data.passages import text_id
from llmr_ray.data.records import Bad, Document, Query, Skip
from llmr_ray.data.selection import collect, given_reward_rows, given_rows, held_out_texts, select
from llmr_ray.errors import ConfigError, DataError
from tests import published
from tests.published import kinds, read, write_lines


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return published.llm_embedder(tmp_path_factory.mktemp("archive"))


def texts(records: list[Any]) -> dict[str, str]:
    """Documents' texts by id."""
    return {document.doc_id: document.text for document in kinds(records, Document)}


def fates(records: list[Any], kind: type) -> list[tuple[str, str]]:
    return [(record.row, record.reason) for record in kinds(records, kind)]


# --- LLM-Embedder ----------------------------------------------------------------------------------------------------


def test_qa_rows(archive: Path) -> None:
    """Scores stay with their candidates when one is dropped, and rows of the corpus with theirs after a bad one."""
    records = read(archive, "llm_embedder", "nq")
    of = texts(records)
    first, second, third, test = kinds(records, Query)
    assert first.query_id == "nq:train:7"
    assert [of[doc_id] for doc_id, _ in first.qrels] == ["Moon It circles the Earth."]
    assert {of[doc_id]: reward for doc_id, reward in first.given_rewards} == {
        "Moon It circles the Earth.": -0.5,
        "Rivers run to the sea.": -2.0,
        "Tin A metal.": -3.0,
    }
    assert [(of[doc_id], score) for doc_id, score in first.given] == [
        ("Rivers run to the sea.", None),
        ("Tin A metal.", None),
    ]
    assert (second.targets, [of[doc_id] for doc_id, _ in second.qrels]) == ((), ["Rivers run to the sea."])
    assert third.query_id == "nq:train:7#2"
    # The text alone is not the document "Tin A metal.": it is one of its own.
    assert [of[doc_id] for doc_id, _ in third.given] == ["A metal."]
    assert (test.split, test.targets, [of[doc_id] for doc_id, _ in test.qrels]) == ("test", ("tin",), ["Tin A metal."])
    assert fates(records, Bad) == [
        ("corpus.json:4", "invalid_json"),
        ("train.json:5", "scores_length"),
        ("test.json:2", "unknown_document"),
    ]
    assert fates(records, Skip) == [
        ("corpus.json:6", "repeated_text"),
        ("train.json:1 negative 1", "candidate_without_score"),
        ("train.json:4", "repeated_row"),
    ]
    assert read(archive / "qa" / "nq", "llm_embedder", "nq") == records


def test_borrowed_corpora(archive: Path) -> None:
    """MMLU and PopQA have none of their own; a corpus outside the data set's path would escape its fingerprint."""
    mmlu = read(archive, "llm_embedder", "mmlu")
    (query,) = kinds(mmlu, Query)
    assert (query.options, query.gold_option, query.targets) == (("a fish", "a metal"), 1, ("a metal",))
    assert query.meta == {"subject": "chemistry"}
    assert list(texts(mmlu).values()) == ["Tin is a metal."]
    assert fates(mmlu, Bad) == [("test.json:2", "answer_not_in_options")]
    popqa = read(archive, "llm_embedder", "popqa")
    assert kinds(popqa, Query)[0].targets == ("Ann", "Annie")
    assert len(kinds(popqa, Document)) == 4
    with pytest.raises(DataError, match="corpus of msmarco"):
        read(archive / "qa" / "mmlu", "llm_embedder", "mmlu")


def test_convsearch_and_tools(archive: Path) -> None:
    """QReCC lies in several forms and its row numbers are of a corpus that is not there; tools call ids `qid`."""
    records = read(archive, "llm_embedder", "qrecc", task="convsearch")
    (query,) = kinds(records, Query)
    assert query.query == "rivers? and the sea?"
    assert [texts(records)[doc_id] for doc_id, _ in query.qrels] == ["Rivers run to the sea."]
    records = read(archive, "llm_embedder", "toolbench", task="tool")
    train, test = kinds(records, Query)
    assert (train.query_id, test.query_id) == ("toolbench:train:a1", "toolbench:test:a1")
    assert texts(records)[test.qrels[0][0]] == "weather: tells the weather"


def test_chat_history_is_the_pool(archive: Path) -> None:
    """Padding and unscored turns leave without moving the others' scores; a query without memory would stop a run."""
    records = read(archive, "llm_embedder", "msc", task="chat")
    (query,) = kinds(records, Query)
    (turn,) = kinds(records, Document)
    assert (turn.text, turn.position, query.history_end) == ("Speaker 1: Hi.\nSpeaker 2: I bake.", 0, 1)
    assert query.given_rewards == ((turn.doc_id, -0.2),)
    assert query.pool == turn.pool
    assert [reason for _, reason in fates(records, Skip)] == [
        "blank_candidate",
        "candidate_without_score",
        "blank_candidate",
        "no_candidates",
    ]


def test_long_range_rows_and_texts(archive: Path, tmp_path: Path) -> None:
    """Training rows bring their chunks; texts of evaluation are cut by the LLM's tokens, which must be there."""
    records = read(archive, "llm_embedder", "arxiv", task="lrlm")
    (query,) = kinds(records, Query)
    assert [reward for _, reward in query.given_rewards] == [-1.5, -0.5]
    assert (query.targets, query.context, query.qrels, query.history_end) == (("chunk ten",), None, (), 2)
    words = [f"w{number}" for number in range(40 * memory_tokens())]
    folder = tmp_path / "lrlm" / "books3"
    write_lines(folder / "test.json.gz", [{"text": " ".join(words)}])
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        read(tmp_path, "llm_embedder", "books3", task="lrlm")
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate([*words, "?"])}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    records = read(tmp_path, "llm_embedder", "books3", task="lrlm", tokenizer=tmp_path)
    assert len(kinds(records, Document)) == 39
    assert {query.split for query in kinds(records, Query)} == {"test"}
    assert kinds(records, Query)[-1].targets[0].split() == words[-memory_tokens() :]


def memory_tokens() -> int:
    from llmr_ray.data.memory import CHUNK_TOKENS

    return CHUNK_TOKENS


def test_icl_rows_belong_to_their_tasks(archive: Path) -> None:
    """Training rows name no task: read under another's name they would be judged by its metric."""
    records = read(archive, "llm_embedder", "rte", task="icl")
    train, test = kinds(records, Query)
    of = {f"llm_embedder:{text_id(row['contents'])}": row["contents"] for row in published.ICL_CORPUS}
    assert [(of[doc_id], reward) for doc_id, reward in train.given_rewards] == [
        (published.ICL_CORPUS[1]["contents"], -5.0),
        ("What is hot?\nfire", -6.0),
    ]
    assert of[train.self_doc_id] == published.ICL_CORPUS[0]["contents"]
    assert (test.targets, test.gold_option, test.options) == (("Yes",), 0, ("Yes", "No"))
    documents = kinds(records, Document)
    assert len(documents) == 3
    # What holds a test query's answer is kept only if that query trains, which it does not.
    (leak,) = [document for document in documents if document.text.startswith("It pours.")]
    assert leak.from_query == test.query_id
    (other,) = [
        query for query in kinds(read(archive, "llm_embedder", "arc_e", task="icl"), Query) if query.split == "test"
    ]
    assert other.targets == ("ice",)
    with pytest.raises(ConfigError, match="knows no task"):
        read(archive, "llm_embedder", "icl", task="icl")


def test_given_rows_reach_the_tables(archive: Path) -> None:
    """A negative that num_documents leaves out, or a score that no table holds, is lost in silence."""
    config = DatasetConfig(task="qa", source="llm_embedder", num_train=9, num_test=9, num_documents=1)
    data = collect("nq", config, PrepareConfig(max_bad_fraction=0.5), read(archive, "llm_embedder", "nq"))
    chosen = select(data, held_out_texts([data]))
    kept = {document.doc_id for document in chosen.corpus}
    given = given_rows(chosen.chosen)
    assert {row["doc_id"] for row in given} <= kept
    assert sorted(row["reward"] for row in given_reward_rows(chosen.chosen)) == [-3.0, -2.0, -0.5]
    assert {row["retrieval_score"] for row in given} == {None}


# --- ToolBench -------------------------------------------------------------------------------------------------------


def test_toolbench_tables(tmp_path: Path) -> None:
    """Texts hold tabs and line breaks; rows repeat; an unknown document must not pass as a relevant one."""
    records = read(published.toolbench(tmp_path / "G1"), "toolbench", task="tool")
    of = texts(records)
    assert len(of) == 3
    assert of["toolbench:1"] == (
        'Home, Clock, now, tells\tthe "time"\nof day, required_params: [{"name": "q"}], optional_params: [], '
        'return_schema: {"ok": "bool"}'
    )
    queries = {query.query: [doc_id for doc_id, _ in query.qrels] for query in kinds(records, Query)}
    assert queries == {
        "what time\tis it": ["toolbench:1"],
        "rain or sun?": ["toolbench:2", "toolbench:3"],
        "rain?": ["toolbench:2"],
    }
    assert [reason for _, reason in fates(records, Bad)] == ["invalid_json", "unknown_document"]
    assert [reason for _, reason in fates(records, Skip)] == ["repeated_text", "repeated_row"]


def test_toolbench_instructions(tmp_path: Path) -> None:
    """The raw list: queries in a list, ids that are missing, relevance within a row's own APIs, test ids by file."""
    records = read(published.instructions(tmp_path / "data"), "toolbench", task="tool")
    assert len(texts(records)) == 3
    first, second = kinds(records, Query)
    assert (first.query_id, first.split, len(first.qrels)) == ("toolbench:G1-11", "test", 1)
    assert (second.query_id, second.query, second.split, len(second.qrels)) == ("toolbench:G1-1", "rain?", "train", 2)
    assert fates(records, Bad) == [("G1_query.json:3", "no_relevant_api")]


# --- exchanged rows --------------------------------------------------------------------------------------------------

FLAG = [
    {"query": "q1", "pos": ["a"], "neg": ["b", "a", " "], "pos_scores": [2], "neg_scores": [1, 0.5, 0]},
    {"query": "q2", "pos": ["c"], "neg": [], "teacher_scores": [0.5], "pos_id": ["x7"]},
    {"query": "q3", "pos": ["d"], "neg": ["b"], "pos_scores": [1.0]},
    {"query": "q4", "pos": [], "neg": ["b"]},
    {"query": "q5", "pos": ["d"], "neg": ["b"], "teacher_scores": [1.0, "2"]},
    {"query": "q6", "pos": ["other text"], "pos_id": ["x7"]},
]


def test_flag_embedding_rows(tmp_path: Path) -> None:
    """Scores of one side alone are no teacher; a negative that is the positive would be its own opponent."""
    path = write_lines(tmp_path / "train_rows.jsonl", FLAG)
    records = read(path, "flag_embedding", "mine")
    of = texts(records)
    first, second, third = kinds(records, Query)
    assert {of[doc_id]: reward for doc_id, reward in first.given_rewards} == {"a": 2.0, "b": 1.0}
    assert [of[doc_id] for doc_id, _ in first.given] == ["b"]
    assert second.qrels == (("mine:x7", 1),)
    assert third.given_rewards == ()
    assert fates(records, Skip) == [("train_rows.jsonl:1 negative 1", "repeated_candidate")]
    assert fates(records, Bad) == [
        ("train_rows.jsonl:1 negative 2", "empty_text"),
        ("train_rows.jsonl:4", "missing_field"),
        ("train_rows.jsonl:5", "not_a_number"),
        ("train_rows.jsonl:6", "other_text_of_id"),
    ]
    with pytest.raises(ConfigError, match="not 'chat'"):
        read(path, "flag_embedding", task="chat")


def test_tevatron_and_dpr_rows(tmp_path: Path) -> None:
    """Documents are known by their ids, so that rows of several files mean the same ones; DPR's file is one list."""
    passage = {"docid": 5, "title": "Tin", "text": "a metal"}
    row = {
        "query_id": 1,
        "query": "q",
        "positive_passages": [passage],
        "negative_passages": [{"docid": "6", "text": "b"}],
    }
    write_lines(tmp_path / "t" / "train.jsonl.gz", [row, row, {"query": "no positives", "positive_passages": []}])
    write_lines(tmp_path / "t" / "corpus.jsonl", [passage, {"docid": "9", "title": "", "text": "unused"}])
    records = read(tmp_path / "t", "tevatron", "t", task="tool")
    assert texts(records) == {"t:5": "Tin a metal", "t:9": "unused", "t:6": "b"}
    (query,) = kinds(records, Query)
    assert (query.qrels, query.given, query.given_rewards) == ((("t:5", 1),), (("t:6", None),), ())
    assert [reason for _, reason in fates(records, Bad)] == ["missing_field"]
    context = {"passage_id": "5", "title": "Tin", "text": "a metal", "score": 9.0}
    dpr = [
        {"question": f"q{n}", "answers": ["x"], "positive_ctxs": [context], "hard_negative_ctxs": []} for n in (1, 2)
    ]
    (tmp_path / "dpr.json").write_text(json.dumps(dpr))
    first, second = kinds(read(tmp_path / "dpr.json", "tevatron", "t"), Query)
    assert (first.query, first.targets, first.split, second.qrels) == ("q1", ("x",), None, (("t:5", 1),))


def test_kl_rows(tmp_path: Path) -> None:
    """Here `pos` holds every candidate: as positives they would all be labels."""
    rows = [{"query": "q", "pos": ["a", "b"], "scores": [0.5, float("-inf")]}, {"query": "r", "pos": ["a"]}]
    records = read(write_lines(tmp_path / "rows.jsonl", rows), "kl_rows")
    (query,) = kinds(records, Query)
    assert (query.qrels, [reward for _, reward in query.given_rewards]) == ((), [0.5])
    assert fates(records, Bad) == [("rows.jsonl:2", "missing_field")]


def test_one_list_may_be_longer_than_what_is_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A list cut anywhere, also inside a letter, must come out as json reads it; a broken one must not look short."""
    monkeypatch.setattr(files, "_PIECE", 7)
    rows = [{"text": "ä" * number, "more": [1, {"x": "]"}]} for number in range(30)] + [["no row"]]
    path = tmp_path / "list.json"
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    found = [row for _, row in files.read_rows(path)]
    assert found[:-1] == rows[:-1]
    assert found[-1].reason == "not_an_object"
    path.write_text(path.read_text()[:-40])
    with pytest.raises(DataError, match="breaks off"):
        list(files.read_rows(path))


# --- MTEB and TREC ---------------------------------------------------------------------------------------------------


def test_mteb_folder(tmp_path: Path) -> None:
    """Tables in several Parquet files, judgements as numbers with a point, splits by the files' names."""
    records = read(published.mteb(tmp_path / "set"), "mteb", "m", task="convsearch")
    assert texts(records) == {"m:d1": "Tin a metal", "m:d2": "a river"}
    assert [(query.query_id, query.split, query.qrels) for query in kinds(records, Query)] == [
        ("m:q1", "dev", (("m:d1", 2),)),
        ("m:q2", "test", (("m:d2", 1),)),
    ]
    (tmp_path / "set" / "corpus" / "corpus-00001-of-00002.parquet").write_bytes(b"PAR1 cut")
    with pytest.raises(DataError, match="whole Parquet"):
        read(tmp_path / "set", "mteb", "m", task="convsearch")


def test_trec_judgements_and_run(tmp_path: Path) -> None:
    """A run's documents are candidates, best first whatever the order of its lines; a broken line is told."""
    write_lines(tmp_path / "corpus.jsonl", [{"_id": name, "text": name} for name in ("d1", "d2", "d3")])
    write_lines(tmp_path / "queries.jsonl", [{"_id": "q1", "text": "first"}])
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "test.qrels").write_text("q1 0 d1 1\nq1 0 d2 0\n")
    (tmp_path / "bm25.trec").write_text("q1 Q0 d2 2 1.5 x\nq1 Q0 d3 1 9 x\nq1 Q0 d2 3 1 x\nq1 Q0 d1\n")
    records = read(tmp_path, "jsonl", "j", task="tool", candidates="bm25.trec")
    (query,) = kinds(records, Query)
    assert (query.split, query.qrels) == ("test", (("j:d1", 1),))
    assert query.given == (("j:d3", 9.0), ("j:d2", 1.5))
    assert fates(records, Bad) == [("bm25.trec:4", "bad_run_line")]
