"""The main job in small, all parts real: Ray, vLLM, the sample models and data."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.e2e.conftest import Runner, environment

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

SCENARIOS = {"knowledge", "memory", "examples", "tools"}


def manifests(runner: Runner) -> dict[str, dict]:
    return {
        str(path.parent.relative_to(runner.folder / "artifacts")): json.loads(path.read_text())
        for path in (runner.folder / "artifacts").glob("*/*/manifest.json")
    }


def test_results_hold_every_scenario_and_method(finished: Runner) -> None:
    """A table that silently lacks a method or an interval would still look like a result."""
    results = json.loads((finished.run_dir / "results.json").read_text())
    rows = results["rows"]
    assert {row["scenario"] for row in rows} == SCENARIOS
    for scenario in SCENARIOS:
        methods = {row["method"] for row in rows if row["scenario"] == scenario}
        assert {"random", "bm25", "base", "trained"} <= methods
    assert {"none", "recency"} <= {row["method"] for row in rows if row["scenario"] == "memory"}
    for row in rows:
        assert row["n"] > 0
        assert row["ci95"][0] <= row["mean"] <= row["ci95"][1]
    assert any(row["delta_vs_base"] for row in rows if row["method"] == "trained")


def test_every_stage_accounts_for_its_rows(finished: Runner) -> None:
    """Rows that vanish between stages are the failure that no table shows."""
    stages = json.loads((finished.run_dir / "results.json").read_text())["stages"]
    assert len(stages) == 12
    for stage in stages:
        dropped = sum(stage["quarantined"].values()) + sum(stage["skipped"].values())
        assert stage["rows_in"] == stage["ok"] + stage["cached"] + dropped, stage
    assert next(stage for stage in stages if stage["stage"] == "score")["llm_tokens"] > 0


def test_no_test_text_in_training(finished: Runner) -> None:
    """A test query that is trained on, or stands in the pool of examples, makes every figure worthless."""
    root = finished.folder / "artifacts"

    def rows(stage: str, table: str) -> list[dict]:
        return [
            row for path in root.glob(f"{stage}/*/parts/{table}-*.parquet") for row in pq.read_table(path).to_pylist()
        ]

    queries, corpus, groups = rows("prepare", "queries"), rows("prepare", "corpus"), rows("group", "groups")
    held_out = {" ".join(row["query"].lower().split()) for row in queries if row["split"] != "train"}
    assert groups
    assert not held_out & {" ".join(row["query"].lower().split()) for row in groups}
    examples = [row["text"].lower() for row in corpus if row["task"] == "icl"]
    icl = {row["query"].lower() for row in queries if row["split"] != "train" and row["task"] == "icl"}
    assert not [text for text in examples if any(text.startswith(query + "\n") for query in icl)]


def test_embedder_loads_without_this_package(finished: Runner, tmp_path: Path) -> None:
    """Whoever gets the embedder has sentence-transformers and nothing of ours."""
    code = (
        "import sys; sys.modules['llmr_ray'] = None\n"
        "from sentence_transformers import SentenceTransformer\n"
        f"m = SentenceTransformer({str(finished.run_dir / 'embedder')!r}, device='cpu')\n"
        "assert {'qa-query', 'qa-document', 'tool-query'} <= set(m.prompts), m.prompts\n"
        "v = m.encode(['hello'], prompt_name='qa-query')\n"
        "assert v.shape == (1, 384) and abs(float((v ** 2).sum()) - 1) < 1e-4\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr


def test_rerun_does_no_work_and_a_change_redoes_what_depends_on_it(finished: Runner) -> None:
    """Paying twice for the same LLM score, or keeping a result that its settings no longer describe."""
    before = manifests(finished)
    again = finished.run()
    assert again.returncode == 0, again.stdout
    assert again.stdout.count("done already") == 12
    assert manifests(finished) == before
    plan = finished.run("--dry-run", "train.num_steps=13").stdout
    states = {line.split()[0]: line.split()[1] for line in plan.splitlines() if "/" in line and len(line.split()) == 3}
    redone = {"train", "embed_trained", "index_trained", "evaluate"}
    assert {name for name, state in states.items() if state == "missing"} == redone
    assert {name for name, state in states.items() if state == "done"} == set(states) - redone
    assert "nothing to pay" in plan


def test_the_report_tells_of_leakage_papers_and_rewards(finished: Runner) -> None:
    """What is computed but not told is not checked by anyone."""
    results = json.loads((finished.run_dir / "results.json").read_text())
    assert {row["dataset"] for row in results["leakage"]["training"]} >= {"hotpotqa", "stdlib", "bfcl_tools"}
    assert results["leakage"]["removed"]["example_of_held_out_query"] > 0
    assert results["published"][0]["name"] == "llm_embedder_table_1"
    assert results["audit"]["num_queries"]["qa"] == 6
    assert results["audit"]["unasked"] == ["tool"]


def test_the_audit_is_written_again_without_a_cluster(finished: Runner) -> None:
    """A page that only a whole run can write is lost with its folder."""
    page = finished.run_dir / "audit.html"
    before = page.read_bytes()
    page.unlink()
    command = [word if word != "run" else "audit" for word in finished.command()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment())
    assert done.returncode == 0, done.stderr
    assert page.read_bytes() == before


def test_report_is_one_self_contained_file(finished: Runner) -> None:
    """A report that fetches scripts or fonts is blank where there is no network."""
    html = (finished.run_dir / "report.html").read_text()
    assert "<svg" in html
    assert 'src="http' not in html
    assert 'href="http' not in html
    assert list(finished.run_dir.rglob("*.trec"))
