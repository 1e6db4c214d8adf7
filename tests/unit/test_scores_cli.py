"""`llmr scores`: the figures are right, the export is whole and sorted, errors say what to do."""

import json
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from llmr_ray import durable
from llmr_ray.feedback import export
from llmr_ray.feedback.scores_cli import app
from llmr_ray.feedback.store import Answer, LLMStore
from llmr_ray.locks import locked

KEYS = [bytes([97 * number % 256]) * 32 for number in range(12)]


def target(number, *logprobs, truncated=False):
    return Answer(key=KEYS[number], logprobs=logprobs, num_prompt_tokens=10, truncated=truncated, prompt_sha="ab")


def sampled(number, *texts):
    return Answer(key=KEYS[number], texts=texts, num_prompt_tokens=4, prompt_sha="cd")


def run(*arguments, code=0):
    """What a command prints: JSON, or the message of an error."""
    done = CliRunner().invoke(app, [*map(str, arguments), *([] if code else ["--json"])])
    assert done.exit_code == code, done.output
    return done.output if code else json.loads(done.output)


@pytest.fixture
def root(tmp_path):
    """An artifact root with two scorers; one of them answered a key twice."""
    first = LLMStore(tmp_path / "a" / "llm_store" / "hf-1")
    first.put([target(0, -1.0, -2.0), target(1, -3.0, truncated=True)])
    first.put([target(0, -1.5, -2.0), sampled(2, "x", "")])
    LLMStore(tmp_path / "a" / "llm_store" / "vllm-2").put([target(3, -0.5)])
    return tmp_path / "a"


def test_stats_of_a_worked_example(root):
    """A figure counted twice, or a replaced answer counted at all, misleads whoever plans the next run."""
    found = run("stats", root)
    assert set(found) == {"hf-1", "vllm-2"}
    size = found["hf-1"].pop("bytes")
    assert size == sum(path.stat().st_size for path in (root / "llm_store" / "hf-1").iterdir())
    assert found["hf-1"] == {
        "keys": 3,
        "targets": 2,
        "sampled_texts": 2,
        "prompt_tokens": 24,
        "target_tokens": 3,
        "truncated_share": pytest.approx(1 / 3),
        "segments": 2,
        "duplicate_rows": 1,
    }


def test_store_can_be_named_in_three_ways(root):
    """Users have the artifact root at hand, or paste the folder that a log names."""
    folder = root / "llm_store" / "vllm-2"
    alone = run("stats", root, "--scorer", "vllm-2")
    assert alone == run("stats", folder) == run("stats", root / "llm_store", "--scorer", "vllm-2")
    assert list(alone) == ["vllm-2"]


def test_tables_show_every_figure(root):
    """The table is what people read; a figure cut off by a narrow terminal is lost."""
    done = CliRunner().invoke(app, ["stats", str(root)])
    assert done.exit_code == 0
    assert all(word in done.output for word in ("hf-1", "vllm-2", "target tokens", "0.3333"))


def test_diff_of_a_worked_example(root, tmp_path):
    """Two machines of one scorer: the largest and the mean difference decide whether their answers may be mixed."""
    other = LLMStore(tmp_path / "b" / "llm_store" / "hf-1")
    other.put([target(0, -1.5, -2.25), target(1, -3.0, -4.0), sampled(2, "x", "y"), target(4, -1.0), target(5, -1.0)])
    (name, found), *more = run("diff", root, tmp_path / "b").items()
    assert (name, more) == ("hf-1", [])
    assert found == {
        "only_a": 0,
        "only_b": 2,
        "both": 3,
        "compared_tokens": 2,
        "largest_difference": 0.25,
        "mean_difference": 0.125,
        "other_lengths": 1,
        "other_texts": 1,
    }
    turned = run("diff", tmp_path / "b", root)["hf-1"]
    assert turned == found | {"only_a": 2, "only_b": 0}


def test_renamed_copy_can_be_compared(root, tmp_path):
    """A backup has another folder name but the same keys."""
    folder = root / "llm_store" / "hf-1"
    folder.rename(tmp_path / "backup")
    folder.mkdir()
    LLMStore(folder).put([target(1, -3.0, truncated=True)])
    found = run("diff", folder, tmp_path / "backup")["hf-1"]
    assert (found["only_a"], found["only_b"], found["both"], found["largest_difference"]) == (0, 2, 1, 0.0)


def test_scorers_that_share_no_key_are_refused(root, tmp_path):
    """Two engines never share a key: 'nothing in common' would look like a broken store."""
    LLMStore(tmp_path / "b" / "llm_store" / "vllm-3").put([target(0, -1.0)])
    assert "no scorer in common (hf-1, vllm-2 against vllm-3)" in run("diff", root, tmp_path / "b", code=3)


def test_diff_without_tokens_has_no_mean(root, tmp_path):
    """Nothing compared is not a difference of zero."""
    LLMStore(tmp_path / "b" / "llm_store" / "hf-1").put([target(7, -1.0)])
    found = run("diff", root, tmp_path / "b")["hf-1"]
    assert (found["both"], found["largest_difference"], found["mean_difference"]) == (0, None, None)


def test_compact_keeps_what_stats_count(root):
    """The command must touch every scorer and change files only."""
    before = run("stats", root)
    done = run("compact", root)
    assert done["hf-1"] == {"merged_segments": 2, "new_segments": 1, "answers": 3, "dropped_rows": 1}
    assert done["vllm-2"]["merged_segments"] == 0
    after = run("stats", root)
    for name, figures in after.items():
        changed = {"segments": 1, "duplicate_rows": 0, "bytes": figures["bytes"]}
        assert figures == before[name] | changed


def test_locked_store_exits_with_the_owner(root):
    """A script must be able to tell 'busy' from 'broken'."""
    with locked(root / "llm_store" / "hf-1"):
        assert "process" in run("compact", root, code=6)


@pytest.mark.parametrize("range_rows", [1, 3, 1000])
def test_export_is_whole_and_sorted(tmp_path, monkeypatch, range_rows):
    """Rows lost or doubled at the border of a key range would not be missed by anyone."""
    monkeypatch.setattr(export, "_RANGE_ROWS", range_rows)
    expected = {}
    for scorer in ("hf-1", "vllm-2"):
        answers = [*(target(number, -float(number), -0.5) for number in range(9)), sampled(10, "é", "")]
        for start in range(0, 10, 3):
            LLMStore(tmp_path / scorer).put(answers[start : start + 3])
        LLMStore(tmp_path / scorer).put([target(0, -7.0)])
        expected |= {(answer.key, scorer): answer for answer in [*answers, target(0, -7.0)]}
    out = tmp_path / "new" / "out.parquet"
    assert run("export", tmp_path, out) == {str(out): {"answers": 20, "bytes": out.stat().st_size}}
    rows = pq.read_table(out).to_pylist()
    assert [(row["key"], row["scorer"]) for row in rows] == sorted(expected)
    for row in rows:
        answer = expected[row["key"], row["scorer"]]
        assert (tuple(row["logprobs"]), tuple(row["texts"])) == (answer.logprobs, answer.texts)
        assert (row["num_prompt_tokens"], row["prompt_sha"]) == (answer.num_prompt_tokens, answer.prompt_sha)
    assert list(out.parent.iterdir()) == [out]


def test_failed_export_leaves_the_old_file(root, tmp_path, monkeypatch):
    """A half-written export looks like a whole one to whoever reads it."""
    out = tmp_path / "out.parquet"
    run("export", root, out)
    before = out.read_bytes()
    monkeypatch.setattr(durable, "commit_rename", lambda *_: 1 / 0)
    assert CliRunner().invoke(app, ["export", str(root), str(out)]).exit_code == 1
    assert out.read_bytes() == before
    assert not [path for path in tmp_path.iterdir() if ".tmp-" in path.name]


def test_wrong_names_are_explained(root, tmp_path):
    """A typo must not look like an empty store."""
    assert "holds no LLM answers" in run("stats", tmp_path / "nothing", code=3)
    assert "It has: hf-1, vllm-2." in run("stats", root, "--scorer", "hf", code=2)


def test_help_is_quick():
    """`llmr --help` that loads Arrow, torch or Ray takes seconds."""
    code = "import sys, llmr_ray.cli; print(*{'pyarrow', 'numpy', 'torch', 'ray'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""
