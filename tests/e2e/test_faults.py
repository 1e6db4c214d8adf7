"""kill -9 of any process, a full disk, a Ray that is gone; then the same command: the same files, none paid twice."""

import json
import os
import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from llmr_ray.cluster import lives
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
        return next(child for child in driver.children(recursive=True) if title in _title(child))

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
    assert runner.run_and_kill(when, victim) == 0, runner.log
    rows = store_rows(runner)
    assert len(rows) == len(set(rows)), "a committed LLM score was paid for again"
    assert files(runner) == files(finished)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("daemon", ["raylet", "gcs_server"])
def test_lost_ray(runner: Runner, finished: Runner, daemon: str) -> None:
    """Without its daemons Ray neither answers nor fails: the run must end by itself and leave nothing behind."""
    killed: list[float] = []

    def kill(driver: psutil.Process) -> None:
        next(child for child in driver.children() if child.name() == daemon).kill()
        killed.append(time.monotonic())

    assert runner.run_disturbed(scoring_began, kill) == 4, runner.log
    assert time.monotonic() - killed[0] < 120  # the end of the run (60 s) and of the processes it had started
    assert not runner.left
    assert f"the local Ray was lost: its process {daemon}" in runner.log
    assert "run the same command again: llmr run" in runner.log
    done = runner.run()
    assert done.returncode == 0, done.stdout + done.stderr
    assert files(runner) == files(finished)


@pytest.mark.timeout(1800)
def test_random_kills(runner: Runner, finished: Runner) -> None:
    """A minute in which some worker dies every few seconds: the run ends by itself with the same artifacts."""
    rng = random.Random(0)

    def disturb(driver: psutil.Process) -> None:
        end = time.monotonic() + 60
        while time.monotonic() < end and lives(driver):
            workers = [child for child in driver.children(recursive=True) if "ray::" in _title(child)]
            if workers:
                rng.choice(workers).kill()
            time.sleep(rng.uniform(3, 8))

    assert runner.run_disturbed(scoring_began, disturb) == 0, runner.log
    rows = store_rows(runner)
    assert len(rows) == len(set(rows)), "a committed LLM score was paid for again"
    assert files(runner) == files(finished)


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


@pytest.mark.timeout(1800)
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk")
@pytest.mark.parametrize(("folder", "kilobytes"), [("llm_store", 64), ("index", 64), ("train", 40_000)])
def test_full_disk(runner: Runner, finished: Runner, folder: str, kilobytes: int) -> None:
    """No room for scores, an index or a checkpoint: the run says where, keeps what is whole and goes on with room."""
    disk = runner.folder / "artifacts" / folder
    disk.mkdir(parents=True)
    _mount("-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(disk))
    try:
        for _ in range(2):
            full = runner.run()
            assert full.returncode == 4, full.stdout + full.stderr
            assert str(disk) in full.stderr
            assert "No space left" in full.stderr
            assert "Traceback" not in full.stderr
        _mount("-o", "remount,size=4g", str(disk))
        done = runner.run()
        assert done.returncode == 0, done.stdout + done.stderr
        assert files(runner) == files(finished)
        assert not [path for path in _all(disk) if ".tmp-" in path.name], "what could not be written was left behind"
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


def _all(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.timeout(300)
def test_too_few_cpus(runner: Runner) -> None:
    """Ray Data waits for ever for CPUs that do not exist; the run must say so instead."""
    started = time.monotonic()
    done = runner.run("runtime.logical_cpus=2")
    assert done.returncode == 4, done.stdout + done.stderr
    assert "logical CPUs" in done.stderr
    assert time.monotonic() - started < 120


def test_segments_bound_what_a_kill_can_cost(finished: Runner) -> None:
    """Answers that wait in memory for a full segment are lost when the process dies."""
    segments = sorted((finished.folder / "artifacts" / "llm_store").rglob("*.parquet"))
    assert segments
    # A chunk of 64 rows is stored whole, so a segment may hold what was pending plus one chunk.
    assert all(pq.read_metadata(path).num_rows <= 128 for path in segments)
