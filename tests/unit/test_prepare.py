"""Splits and selection: pure functions of ids; no test text in training; every row accounted for."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from llmr_ray.artifacts import Artifact
from llmr_ray.assets import Asset
from llmr_ray.config import Config, DatasetConfig, PrepareConfig
from llmr_ray.data.records import Bad, Document, Query, Record, Skip
from llmr_ray.data.scope import scopes
from llmr_ray.data.selection import Selected, collect, held_out_texts, in_order, select
from llmr_ray.data.splits import lowest, normalized, split_of
from llmr_ray.data.stage import PrepareWorker, prepare_spec
from llmr_ray.data.texts import Texts
from llmr_ray.errors import ConfigError, DataError

HALVES = PrepareConfig(test_fraction=0.4, dev_fraction=0.1)
ALL = {"num_train": 999, "num_dev": 999, "num_test": 999}


def query(name: str, text: str = "", **values: Any) -> Query:
    fields: dict[str, Any] = {"pool": "p", "split_key": name, "targets": ("t",), **values}
    return Query(query_id=name, query=text or f"text of {name}", **fields)


def run(records: list[Record], prepare: PrepareConfig = HALVES, **settings: Any) -> Selected:
    config = DatasetConfig(**{**ALL, **settings})
    data = collect("d", config, prepare, records)
    result = select(data, held_out_texts([data]))
    result.counts.check("test")
    assert result.counts.ok == len(result.queries) + len(result.corpus)
    return result


def corpus_of(result: Selected) -> list[dict[str, Any]]:
    return [document.row() for document in in_order([result])]


def test_split_is_a_function_of_the_key() -> None:
    """A split that depends on the order or number of rows lets a later run train on an earlier run's test rows."""
    splits = [split_of("d", f"k{n}", test_fraction=0.3, dev_fraction=0.1) for n in range(4000)]
    assert abs(splits.count("test") / 4000 - 0.3) < 0.03
    assert abs(splits.count("dev") / 4000 - 0.1) < 0.02
    first = int.from_bytes(hashlib.sha256(b"split\x1fd\x1fk0").digest()[:6], "big") / 2**48
    assert splits[0] == ("test" if first < 0.3 else "dev" if first < 0.4 else "train")
    assert split_of("d", "k0", test_fraction=1.0, dev_fraction=0.0) == "test"
    assert split_of("d", "k0", test_fraction=0.0, dev_fraction=0.0) == "train"


def test_larger_selection_contains_the_smaller() -> None:
    """Raising num_train must not exchange the queries whose scores are paid for."""
    ids = [f"q{n}" for n in range(100)]
    assert lowest("d", ids, 10) < lowest("d", reversed(ids), 30)
    assert len(lowest("d", ids, 999)) == 100
    assert lowest("d", ids, 10) != lowest("e", ids, 10)


def test_rows_in_any_order_give_the_same_result() -> None:
    """A file that lists the same rows in another order is the same data set."""
    records: list[Record] = [query(f"q{n}", qrels=((f"d{n}", 1),)) for n in range(40)]
    records += [Document(doc_id=f"d{n}", pool="p", text=f"doc {n}") for n in range(60)]
    one, two = run(records, num_documents=45, num_test=5), run(records[::-1], num_documents=45, num_test=5)
    assert corpus_of(one) == corpus_of(two)
    for same in ("queries", "chosen", "qrels", "quarantine", "counts"):
        assert getattr(one, same) == getattr(two, same)
    assert sum(row["split"] == "test" for row in one.queries) == 5
    assert len(one.corpus) == 45
    assert {row["doc_id"] for row in one.qrels} <= {row["doc_id"] for row in corpus_of(one)}


def test_rows_of_one_key_stay_together() -> None:
    """Questions about one passage in both training and test would leak the passage."""
    result = run([query(f"q{n}", split_key=f"k{n // 10}") for n in range(200)])
    for first in range(0, 200, 10):
        ids = {f"q{n}" for n in range(first, first + 10)}
        assert len({row["split"] for row in result.queries if row["query_id"] in ids}) == 1
        assert {row["split_key"] for row in result.queries if row["query_id"] in ids} == {f"k{first // 10}"}


def test_text_of_a_test_query_is_nowhere_in_training() -> None:
    """The same question under another id, in other letters, as a query or as an example, is still the test question."""
    records: list[Record] = []
    for name, split, text in [
        ("a", "train", "Who  is IT?"),
        ("b", "test", "who is it?"),
        ("c", "dev", "who is it? "),
        ("e", "train", "something else"),
        ("f", "test", "test only"),
    ]:
        records.append(query(name, text, split=split, self_doc_id=f"{name}:x"))
        records.append(Document(doc_id=f"{name}:x", pool="icl", text=f"{text}\nanswer", from_query=name))
    result = run(records)
    assert [row["query_id"] for row in result.queries] == ["b", "e", "f"]
    assert [(row["doc_id"], row["text"]) for row in corpus_of(result)] == [("e:x", "something else\nanswer")]
    # Queries a and c, and the example of a; the examples of b, c and f are held out by their split alone.
    assert result.counts.skipped == {"duplicate_of_test": 3, "example_of_held_out_query": 3}
    meta = {row["query_id"]: row["meta"] for row in result.queries}
    assert json.loads(meta["e"]) == {"self_doc_id": "e:x"}
    assert meta["b"] is None
    held_out = {normalized(row["query"]) for row in result.queries if row["split"] != "train"}
    assert not held_out & {normalized(row["query"]) for row in result.queries if row["split"] == "train"}


def test_documents_of_chosen_queries_come_first() -> None:
    """A gold document that was sampled away makes a query without an answer."""
    records: list[Record] = [Document(doc_id=f"d{n}", pool="p", text="x") for n in range(50)]
    records.append(query("q", split="test", qrels=(("d49", 1),), related=("d48",)))
    kept = {document.doc_id for document in run(records, num_documents=5).corpus}
    assert len(kept) == 5
    assert {"d49", "d48"} <= kept
    assert len(run(records, num_documents=1).corpus) == 2
    assert len(run(records).corpus) == 50


def test_memory_is_cut_after_the_last_query_and_unused_pools_go() -> None:
    """Documents that no query may see cost embedding and index for nothing."""
    records: list[Record] = [
        Document(doc_id=f"{pool}{n}", pool=pool, text="x", position=n) for pool in "ab" for n in range(9)
    ]
    records += [query("q", split="test", pool="b", history_end=4), query("r", split="test", pool="b", history_end=6)]
    result = run(records)
    assert [(document.doc_id, document.position) for document in in_order([result])] == [(f"b{n}", n) for n in range(6)]
    assert result.counts.skipped == {"document_of_unused_pool": 9, "document_after_last_query": 3}
    short = run(records, num_documents=5)
    assert [row["query_id"] for row in short.queries] == ["q"]
    assert [document.doc_id for document in in_order([short])] == [f"b{n}" for n in range(4)]
    assert short.counts.skipped["history_too_long"] == 1


def test_texts_come_back_from_their_file_as_they_were() -> None:
    """Texts wait outside memory until they are chosen; a line break, or what is no UTF-8, must not shift the next."""
    strange = ["", "a\nb\r\n", "\u2028 \x00 \udc80", '"quoted" \\n', "語 🙂", "x" * 100_000]
    records: list[Record] = [
        Document(doc_id=f"d{n:02}", pool="p", text=text, continuation=text[::-1] if n % 2 else None, meta={"t": text})
        for n, text in enumerate(strange)
    ]
    records.append(query("q", split="test"))
    rows = sorted(corpus_of(run(records)), key=lambda row: row["doc_id"])
    assert [row["text"] for row in rows] == strange
    assert [row["continuation"] for row in rows] == [text[::-1] if n % 2 else None for n, text in enumerate(strange)]
    assert [json.loads(row["meta"]) for row in rows] == [{"t": text} for text in strange]
    texts = Texts()
    places = []
    for number in range(5):  # written and read in turn
        places.append(texts.put(str(number), None))
        assert [texts.get(place) for place in places] == [[str(known), None] for known in range(number + 1)]


def test_ids_that_two_data_sets_share_are_told() -> None:
    """A join on a repeated id multiplies rows, and each data set for itself looks sound."""
    parts = []
    for name in ("one", "two"):
        data = collect(
            name, DatasetConfig(**ALL), HALVES, [query("q", split="test"), Document(doc_id="d", pool="p", text=name)]
        )
        parts.append(select(data, held_out_texts([data])))
    with pytest.raises(DataError, match="'one' and 'two' both have a document 'd'"):
        list(in_order(parts))


def test_duplicate_ids_and_the_limit_on_bad_rows() -> None:
    """A join on a repeated id multiplies rows; a data set that is mostly broken must not pass as a small one."""
    records: list[Record] = [query(f"q{n}") for n in range(30)] + [Document(doc_id="d", pool="p", text="x")]
    records += [query("q1", "again"), Document(doc_id="d", pool="p", text="again")]
    records += [Bad(row="f:9", reason="nan"), Skip(row="f:10", reason="unanswerable")]
    result = run(records, PrepareConfig(max_bad_fraction=0.1))
    assert [(row["row"], row["reason"]) for row in result.quarantine] == [
        ("q1", "duplicate_id"),
        ("d", "duplicate_id"),
        ("f:9", "nan"),
    ]
    assert next(row for row in result.queries if row["query_id"] == "q1")["query"] == "text of q1"
    assert result.counts.rows_in == 35
    with pytest.raises(DataError, match=r"3 of 35 rows are bad.*'duplicate_id': 2, 'nan': 1.*max_bad_fraction = 0\.05"):
        run(records, PrepareConfig(max_bad_fraction=0.05))
    with pytest.raises(DataError, match="no rows"):
        run([])


# --- the stage without Ray -------------------------------------------------------------------------------------------


def own_examples(folder: Path, name: str, rows: list[dict[str, Any]]) -> Asset:
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return Asset(str(path), "local", path, f"print of {name}")


def test_examples_of_all_data_sets_share_one_pool_in_order(tmp_path: Path) -> None:
    """Pools must be contiguous with positions 0..n-1, and one data set's test text may not be another's example."""
    rows = {
        "one": [{"id": n, "query": f"one {n}", "answers": ["a"], "split": "train"} for n in range(5)],
        "two": [{"id": n, "query": f"two {n}", "answers": ["b"], "split": "train"} for n in range(5)],
    }
    rows["one"].append({"id": "t", "query": "TWO 3", "answers": ["a"], "split": "test"})
    assets = {name: own_examples(tmp_path, name, items) for name, items in rows.items()}
    datasets = {
        name: DatasetConfig(task="icl", source="jsonl", path=name, num_train=2, num_test=9, num_documents=4)
        for name in rows
    }
    config = Config(name="t", datasets=datasets, prepare=HALVES)
    artifact = Artifact(tmp_path, prepare_spec(config, assets))
    artifact.begin()
    paths = {name: assets[name].path for name in rows}
    worker = PrepareWorker(artifact, ["icl"], datasets, HALVES, paths, tmp_path)
    record = worker.run(0)
    artifact.commit(1, seconds=0)
    corpus, queries = artifact.read("corpus"), artifact.read("queries")
    assert corpus["pool"].to_pylist() == ["icl"] * 8
    assert corpus["position"].to_pylist() == list(range(8))
    assert "two 3\nb" not in corpus["text"].to_pylist()
    assert set(queries["split"].to_pylist()) == {"train", "test"}
    assert scopes(queries, corpus).tolist() == [[0, 8]] * queries.num_rows
    assert record["counts"]["skipped"]["duplicate_of_test"] == 2
    documents = set(corpus["doc_id"].to_pylist())
    for row in queries.to_pylist():
        if row["split"] == "train":
            assert json.loads(row["meta"])["self_doc_id"] in documents


def spec_id(config: Config, **fingerprints: str) -> str:
    assets = {name: Asset(name, "data", Path("/x"), print_) for name, print_ in fingerprints.items()}
    return prepare_spec(config, assets).id


def test_identity_is_content_and_settings() -> None:
    """Changed content or settings must redo the stage; a moved folder, or another LLM, must not."""
    base = DatasetConfig(source="jsonl", path="a")
    config = Config(name="t", datasets={"mine": base})
    known = spec_id(config, a="1")
    assert spec_id(config, a="2") != known
    moved = dataclasses.replace(config, datasets={"mine": dataclasses.replace(base, path="b")})
    assert spec_id(moved, b="1") == known
    more = dataclasses.replace(config, datasets={"mine": dataclasses.replace(base, num_test=1)})
    assert spec_id(more, a="1") != known
    other_llm = dataclasses.replace(config, llm=dataclasses.replace(config.llm, model="m"))
    assert spec_id(other_llm, a="1") == known
    chunks = dataclasses.replace(config, datasets={"code": DatasetConfig(task="lrlm", source="stdlib", path="s")})
    model = chunks.llm.model
    assert spec_id(chunks, s="1", **{model: "x"}) != spec_id(chunks, s="1", **{model: "y"})
    for name in ("a b", "a:b", "icl"):
        with pytest.raises(ConfigError, match="name"):
            spec_id(dataclasses.replace(config, datasets={name: base}), a="1")
    with pytest.raises(ConfigError, match="empty"):
        spec_id(Config())
