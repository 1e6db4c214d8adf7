"""Judgements and given candidates: a line that matches nothing is told, and ids that never match stop the run."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from llmr_ray.assets import Asset
from llmr_ray.cli import app
from llmr_ray.config import Config, DatasetConfig, PrepareConfig
from llmr_ray.data.records import Bad, Query
from llmr_ray.data.selection import collect
from llmr_ray.data.sources import READER_VERSIONS
from llmr_ray.data.stage import prepare_spec
from llmr_ray.errors import DataError
from tests import published
from tests.published import kinds, read, write_lines

HEADER = "query-id\tcorpus-id\tscore\n"


def beir(root: Path, **qrels: str) -> Path:
    """Two documents, two queries and a query whose text is missing."""
    write_lines(root / "corpus.jsonl", [{"_id": "d1", "text": "one"}, {"_id": "d2", "text": "two"}])
    write_lines(root / "queries.jsonl", [{"_id": "1", "text": "first"}, {"_id": "2", "text": "second"}, {"_id": "3"}])
    (root / "qrels").mkdir()
    for name, lines in qrels.items():
        (root / "qrels" / f"{name}.tsv").write_text(HEADER + lines)
    return root


def told(records: list[Any]) -> list[tuple[str, str, str | None]]:
    return [(bad.row, bad.reason, bad.excerpt) for bad in kinds(records, Bad)]


def test_judgements_of_no_query_are_told_by_their_lines(tmp_path: Path) -> None:
    """A query that lost its labels to a misspelt id must not look like one that never had any."""
    root = beir(tmp_path, train="1\td1\t1\nq1\td1\t1\nq2\td1\t0\n3\td2\t1\n", test="q1\td2\t1\nq1\td1\t2\n")
    records = read(root, "jsonl", task="tool")
    assert [query.qrels for query in kinds(records, Query)] == [(("jsonl:d1", 1),), ()]
    # Query 3 is there, though its row is no good; a judgement of irrelevance says nothing that could be lost.
    assert Counter(told(records)) == Counter(
        [
            ("queries.jsonl:3", "missing_field", "query"),
            ("test.tsv:2", "unknown_query", "q1 d2"),
            ("test.tsv:3", "unknown_query", "q1 d1"),
            ("train.tsv:3", "unknown_query", "q1 d1"),
        ]
    )


def test_judgements_that_match_nothing_stop_the_run(tmp_path: Path) -> None:
    """A run over data whose labels all went astray trains and evaluates without them."""
    root = beir(tmp_path, test="q1\td1\t1\nq2\td2\t1\n")
    with pytest.raises(DataError, match=r"test\.tsv:2 names the query 'q1', but .* is called '1', .* the 2 that"):
        read(root, "jsonl", task="tool")
    done = CliRunner().invoke(app, ["validate", str(root), "--task", "tool"])
    assert (done.exit_code, "test.tsv:2" in done.output) == (2, True)


def test_a_file_of_irrelevance_alone_is_no_mistake(tmp_path: Path) -> None:
    """Nothing is judged relevant there, so nothing is lost."""
    records = read(beir(tmp_path, test="q1\td1\t0\n"), "jsonl", task="tool")
    assert [bad.reason for bad in kinds(records, Bad)] == ["missing_field"]


def test_candidates_are_known_documents_of_known_queries(tmp_path: Path) -> None:
    """What the corpus lacks can be no candidate: `given` would count more than the LLM is ever asked about."""
    root = beir(tmp_path)
    run = ["1 Q0 d2 1 9.5 bm25", "1 Q0 d9 2 9.0 bm25", "1 Q0 d1 3 8.0 bm25", "q7 Q0 d1 1 1.0 bm25", "2 Q0 d2"]
    run += ["3 Q0 d1 1 1.0 bm25", "q7 Q0 d9 1 0.5 bm25"]
    (root / "run.trec").write_text("\n".join(run) + "\n")
    records = read(root, "jsonl", task="tool", candidates="run.trec")
    assert [query.given for query in kinds(records, Query)] == [(("jsonl:d2", 9.5), ("jsonl:d1", 8.0)), ()]
    assert Counter(told(records)) == Counter(
        [
            ("queries.jsonl:3", "missing_field", "query"),
            ("run.trec:2", "unknown_document", "1 d9"),
            ("run.trec:4", "unknown_query", "q7 d1"),
            ("run.trec:5", "bad_run_line", "2 Q0 d2"),
            ("run.trec:7", "unknown_document", "q7 d9"),
        ]
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [("1 Q0 D1 1 1.0 x", r"no line of .*run\.trec names a document"), ("q1 Q0 d1 1 1.0 x", r"run\.trec:1 names")],
)
def test_a_run_that_matches_nothing_stops_the_run(tmp_path: Path, line: str, message: str) -> None:
    """The run of another collection would leave every query without candidates."""
    root = beir(tmp_path)
    (root / "run.trec").write_text(line + "\n")
    with pytest.raises(DataError, match=message):
        read(root, "jsonl", task="tool", candidates="run.trec")


def test_other_layouts_tell_it_too(tmp_path: Path) -> None:
    """Tables of the hub and ToolBench's files are judged by the same ids."""
    hub = published.mteb(tmp_path / "mteb")
    write_lines(
        hub / "qrels" / "train.jsonl",
        [
            {"query-id": "q1", "corpus-id": "d1", "score": 1},
            {"query-id": "q9", "corpus-id": "d1", "score": 1},
        ],
    )
    assert told(read(hub, "mteb", task="convsearch")) == [("train.jsonl:2", "unknown_query", "q9 d1")]
    tools = published.toolbench(tmp_path / "G1")
    before = told(read(tools, "toolbench", task="tool"))
    with (tools / "qrels.train.tsv").open("a") as file:
        file.write("21\t0\t1\t1\n")
    after = told(read(tools, "toolbench", task="tool"))
    assert Counter(after) - Counter(before) == Counter([("qrels.train.tsv:4", "unknown_query", "21 1")])
    (tools / "qrels.train.tsv").write_text("21\t0\t1\t1\n")
    with pytest.raises(DataError, match=r"qrels\.train\.tsv:1 names the query '21', .* is called '1'"):
        read(tools, "toolbench", task="tool")


def test_a_repeated_id_is_told_with_its_row(tmp_path: Path) -> None:
    """In a file of a million rows the id alone finds the first of the two, which is not the one that is rejected."""
    root = beir(tmp_path, test="1\td1\t1\n")
    write_lines(root / "corpus.jsonl", [{"_id": "d1", "text": "one"}, {"_id": "d1", "text": "again"}])
    write_lines(root / "queries.jsonl", [{"_id": "1", "text": "first"}, {"_id": "1", "text": "anew"}])
    expected = [
        ("corpus.jsonl:2", "duplicate_id", "jsonl:d1: again"),
        ("queries.jsonl:2", "duplicate_id", "jsonl:1: anew"),
    ]
    config = DatasetConfig(task="tool", source="jsonl")
    collected = collect("jsonl", config, PrepareConfig(max_bad_fraction=1), read(root, "jsonl", task="tool"))
    assert [(bad.row, bad.reason, bad.excerpt) for bad in collected.bad] == expected
    done = CliRunner().invoke(app, ["validate", str(root), "--name", "jsonl", "--task", "tool", "--json"])
    assert done.exit_code == 3
    (found,) = json.loads(done.stdout)
    assert [(row["row"], row["excerpt"]) for row in found["examples"]["duplicate_id"]] == [
        (row, text) for row, _, text in expected
    ]


def test_only_what_a_changed_reader_made_is_made_again(tmp_path: Path) -> None:
    """Days of LLM scores rest on prepared data: another reader's change must not cost them."""
    asset = Asset(name="x", kind="folder", path=tmp_path, fingerprint="f")

    def settings(source: str) -> dict[str, Any]:
        config = Config(datasets={"mine": DatasetConfig(task="qa", source=source, path="x")})
        spec = prepare_spec(config, {"x": asset, config.llm.model: asset})
        found: dict[str, Any] = spec.config["datasets"]["mine"]
        return found

    assert settings("jsonl")["reader"] == READER_VERSIONS["jsonl"] > 1
    assert "reader" not in settings("hotpotqa")
