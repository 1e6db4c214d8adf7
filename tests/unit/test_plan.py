"""What `llmr plan` says of a configuration whose models and data are elsewhere."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from llmr_ray.cli import app

PAPER = Path(__file__).parents[2] / "conf" / "paper" / "llm_embedder.yaml"


def test_a_job_of_the_paper_s_size_is_priced_without_its_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever plans a cluster job wants its price before fetching terabytes."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    arguments = ["plan", str(PAPER), "--tokens-per-second", "1000", "runtime.llm_actors=4", "runtime.llm_gpus=2"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    said = " ".join(done.output.split())
    assert "From the configuration alone" in said
    # 459,492 questions with 100 candidates and the gold document each; hours = tokens / speed / actors.
    assert f"{459_492 * 101:,}" in said
    tokens = int(said.split(" pairs and ")[1].split(" tokens")[0].replace(",", ""))
    assert f"{tokens / 1000 / 3600 / 4:,.2f} hours on 4 actors, {tokens / 1000 / 3600 * 2:,.2f} GPU hours" in said
