"""`llmr validate`: formats are recognised, every rejected row is told with what to do, exit codes say which it was."""

import gzip
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from llmr_ray.cli import app
from llmr_ray.data import validation
from llmr_ray.data.recognition import recognise
from tests import published
from tests.published import write_lines

SOURCES = Path(validation.__file__).parent


def run(*arguments: Any, code: int = 0) -> Any:
    done = CliRunner().invoke(app, ["validate", *map(str, arguments)])
    assert done.exit_code == code, done.output
    return json.loads(done.stdout) if "--json" in arguments and code != 2 else done.output


def test_every_reason_has_advice() -> None:
    """A reason that only its author understands leaves a user with a row number."""
    found = set()
    for path in SOURCES.glob("*.py"):
        text = path.read_text()
        found |= set(re.findall(r'BadRow\(\s*"(\w+)"', text))
        found |= set(re.findall(r'Bad\((?:[^()]|\([^()]*\))*reason="(\w+)"', text))
    assert found == set(validation.ADVICE)


def test_formats_are_recognised(tmp_path: Path) -> None:
    """What is read under another format is rejected row by row, or worse, is not."""
    archive = published.llm_embedder(tmp_path / "archive")
    found = {item.name: (item.source, item.task) for item in recognise(archive)}
    assert found == {
        **dict.fromkeys(("mmlu", "msmarco", "nq", "popqa"), ("llm_embedder", "qa")),
        **dict.fromkeys(("rte", "arc_e"), ("llm_embedder", "icl")),
        "qrecc": ("llm_embedder", "convsearch"),
        "msc": ("llm_embedder", "chat"),
        "arxiv": ("llm_embedder", "lrlm"),
        "toolbench": ("llm_embedder", "tool"),
    }
    gz = tmp_path / "llm_r"
    gz.mkdir()
    for name in ("train", "test", "passages"):
        (gz / f"{name}.jsonl.gz").write_bytes(gzip.compress(b'{"task_name": "rte"}\n{"task_name": "unheard"}\n'))
    row = {"query": "q", "pos": ["a"]}
    paths = {
        archive / "qa": ["llm_embedder"] * 4,
        archive / "chat" / "msc": ["llm_embedder"],
        gz: ["llm_r"],
        published.toolbench(tmp_path / "G1"): ["toolbench"],
        published.instructions(tmp_path / "raw"): ["toolbench"],
        published.mteb(tmp_path / "mteb"): ["mteb"],
        write_lines(tmp_path / "flag.jsonl", [row | {"neg": ["b"]}]): ["flag_embedding"],
        write_lines(tmp_path / "kl.jsonl.gz", [row | {"scores": [1]}]): ["kl_rows"],
        write_lines(tmp_path / "tevatron.jsonl", [{"query": "q", "positive_passages": []}]): ["tevatron"],
    }
    for path, sources in paths.items():
        assert [item.source for item in recognise(path)] == sources, path


def test_rejected_rows_are_told(tmp_path: Path) -> None:
    """A run that stops at its limit of bad rows tells the first; before it, one wants to know of all."""
    archive = published.llm_embedder(tmp_path)
    (nq,) = run(archive, "--name", "nq", "--json", code=3)
    assert nq["rejected"] == {"invalid_json": 1, "scores_length": 1, "unknown_document": 1}
    assert nq["examples"]["scores_length"][0]["row"] == "train.json:5"
    assert (nq["num_documents"], nq["num_queries"], nq["num_with_rewards"]) == (5, {"train": 3, "test": 1}, 1)
    # The accounting: every record is a document, a query, left out or rejected.
    parts = nq["num_documents"] + sum(nq["num_queries"].values())
    assert nq["num_rows"] == parts + sum(nq["left_out"].values()) + sum(nq["rejected"].values())
    told = run(archive, "--name", "nq", code=3)
    assert "train.json:5" in told
    assert validation.ADVICE["scores_length"] in told


def test_clean_and_unusable_input(tmp_path: Path) -> None:
    """A script tells the three apart by the exit code."""
    clean = write_lines(tmp_path / "rows.jsonl", [{"query": "q", "pos": ["a"], "neg": ["b"]}])
    assert "no row is rejected" in run(clean)
    assert "unknown" not in run(clean, "--source", "kl_rows", "--task", "qa", code=3)
    assert "there is no" in run(tmp_path / "nowhere", code=2)
    assert "none of the formats" in run(write_lines(tmp_path / "odd.jsonl", [{"x": 1}]), code=2)
    assert "serves" in run(clean, "--task", "chat", code=2)
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(clean.read_bytes())[:-9])
    assert "whole gzip" in run(tmp_path / "cut.jsonl.gz", "--source", "kl_rows", "--task", "qa", code=2)


def test_files_that_only_a_configuration_names_are_read(tmp_path: Path) -> None:
    """LLM-R's scores lie beside the data, and none is known as such: their faults came up in the run."""
    fields = {"answers": ["Yes"], "options": [""], "task_name": "rte"}
    rows = [fields | {"query_id": f"rte_train_{number}", "query": f"Is it {number}?"} for number in range(2)]
    taught = [rows[0] | {"doc_ids": ["0", "1"], "doc_scores": scores} for scores in ([0.5, -1.0], [0.5])]
    passages = [{"id": str(number), "contents": f"Was it {number}?\nNo", "task_name": "rte"} for number in range(2)]
    files = {"train": rows, "test": [rows[0] | {"query_id": "rte_test_0", "query": "Will it?"}], "passages": passages}
    for name, lines in (files | {"kd_bm25_train": taught}).items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / f"{name}.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    (alone,) = run(tmp_path, "--json")
    assert alone["num_with_rewards"] == 0
    config = tmp_path / "run.yaml"
    settings = "task: icl, source: llm_r, given_rewards: [kd_bm25_train.jsonl.gz], num_train: 2"
    config.write_text(f"tasks: {{icl: {{}}}}\ndatasets:\n  rte: {{{settings}, path: {tmp_path}}}\n")
    (found,) = run(config, "--json", code=3)
    assert (found["name"], found["num_with_rewards"], found["rejected"]) == ("rte", 1, {"scores_length": 1})
    assert "Leave out --task" in run(config, "--task", "icl", code=2)
    config.write_text(config.read_text().replace(str(tmp_path), f"{tmp_path}/elsewhere"))
    assert "elsewhere" in run(config, code=2)


def test_a_repeated_id_is_rejected_as_in_a_run(tmp_path: Path) -> None:
    """What validate calls clean must not be quarantined later."""
    write_lines(tmp_path / "corpus.jsonl", [{"doc_id": "d", "text": "one"}, {"doc_id": "d", "text": "two"}])
    write_lines(tmp_path / "queries.jsonl", [{"query_id": "q", "query": "what", "answers": ["x"], "positives": ["d"]}])
    (found,) = run(tmp_path, "--json", code=3)
    assert found["rejected"] == {"duplicate_id": 1}
    assert found["source"] == "jsonl"


def test_validate_starts_light(tmp_path: Path) -> None:
    """Looking at a file must not take the seconds that torch and Ray take to load."""
    clean = write_lines(tmp_path / "rows.jsonl", [{"query": "q", "pos": ["a"], "neg": ["b"]}])
    code = (
        "import sys; from llmr_ray.cli import main; sys.argv = ['llmr', 'validate', sys.argv[1]]\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "print(sorted({'torch', 'ray', 'vllm', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(clean)], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


@pytest.mark.parametrize("name", ["chat", "lrlm", "convsearch", "tool", "icl"])
def test_every_task_of_the_archive_validates(tmp_path: Path, name: str) -> None:
    """Each task has a reader of its own kind of rows."""
    archive = published.llm_embedder(tmp_path)
    found = run(archive / name, "--json", code=3 if name == "icl" else 0)
    assert all(item["num_queries"] for item in found)
