"""kill -9 of any process, then the same command: the same artifacts, and nothing paid twice."""

import json
from collections.abc import Callable

import psutil
import pyarrow.parquet as pq
import pytest

from tests.e2e.conftest import Runner

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def store_rows(runner: Runner) -> list[str]:
    return [
        key
        for path in (runner.folder / "artifacts" / "llm_store").rglob("*.parquet")
        for key in pq.read_table(path, columns=["key"])["key"].to_pylist()
    ]


def scoring_began(runner: Runner) -> bool:
    return len(store_rows(runner)) > 20


def training_began(runner: Runner) -> bool:
    return any((runner.folder / "artifacts" / "train").rglob("ckpt-*/MANIFEST.json"))


def named(title: str) -> Callable[[psutil.Process], psutil.Process]:
    def find(driver: psutil.Process) -> psutil.Process:
        return next(child for child in driver.children(recursive=True) if title in " ".join(child.cmdline()))

    return find


def results(runner: Runner) -> list[dict]:
    rows = json.loads((runner.run_dir / "results.json").read_text())["rows"]
    assert isinstance(rows, list)
    return rows


def files(runner: Runner) -> dict[str, dict]:
    """The checksums of all artifacts: equal files mean an equal run to the last bit."""
    return {
        str(path.parent.relative_to(runner.folder / "artifacts")): json.loads(path.read_text())["files"]
        for path in (runner.folder / "artifacts").glob("*/*/manifest.json")
    }


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("when", [scoring_began, training_began], ids=["scoring", "training"])
def test_killed_driver(runner: Runner, finished: Runner, when: Callable[[Runner], bool]) -> None:
    """The machine of the driver dies: the same command goes on where the last commit was."""
    assert runner.run_and_kill(when, lambda driver: driver) != 0
    paid = store_rows(runner)
    done = runner.run()
    assert done.returncode == 0, done.stdout + done.stderr
    rows = store_rows(runner)
    assert set(paid) <= set(rows)
    assert len(rows) == len(set(rows)), "a committed LLM score was paid for again"
    assert files(runner) == files(finished)
    assert results(runner) == results(finished)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("when", "victim"),
    [(scoring_began, named("EngineActor")), (training_began, named("RayTrainWorker"))],
    ids=["scorer", "train worker"],
)
def test_killed_worker(
    runner: Runner,
    finished: Runner,
    when: Callable[[Runner], bool],
    victim: Callable[[psutil.Process], psutil.Process],
) -> None:
    """A worker dies: the run replaces it and ends by itself with the artifacts of an undisturbed run."""
    assert runner.run_and_kill(when, victim) == 0, (runner.folder / "killed.log").read_text()
    rows = store_rows(runner)
    assert len(rows) == len(set(rows)), "a committed LLM score was paid for again"
    assert files(runner) == files(finished)


def test_segments_bound_what_a_kill_can_cost(finished: Runner) -> None:
    """Answers that wait in memory for a full segment are lost when the process dies."""
    segments = sorted((finished.folder / "artifacts" / "llm_store").rglob("*.parquet"))
    assert segments
    # A chunk of 64 rows is stored whole, so a segment may hold what was pending plus one chunk.
    assert all(pq.read_metadata(path).num_rows <= 128 for path in segments)
