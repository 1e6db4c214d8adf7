"""kill -9 of any process, SIGTERM, a full disk, a Ray that is gone; then the same command: the same files, none paid
twice."""

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from llmr_ray.cluster import lives
from tests.e2e.conftest import Runner, named, title_of

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def scoring_began(runner: Runner) -> bool:
    return len(runner.answers()) > 20


def training_began(runner: Runner) -> bool:
    return any((runner.folder / "artifacts" / "train").rglob("ckpt-????????/MANIFEST.json"))


LONG_TRAINING = (
    "--stage",
    "train",
    "train.num_steps=60",
    "train.checkpoint_interval=1000",
    "runtime.stop_seconds=120",
)
"""Training alone, long enough to be disturbed, and without checkpoints but the one after the last step."""


def steps_done(runner: Runner) -> int:
    return sum(len(path.read_text().splitlines()) for path in runner.folder.glob("artifacts/train/*/work/steps.jsonl"))


def some_steps_done(runner: Runner) -> bool:
    return steps_done(runner) >= 3


def steps(runner: Runner) -> list[int]:
    """The steps that the longest finished training recorded."""
    tables = [pq.read_table(path) for path in runner.folder.glob("artifacts/train/*/parts/steps-*.parquet")]
    longest = max(tables, key=lambda table: table.num_rows)
    return [int(step) for step in longest["step"].to_pylist()]


@pytest.fixture
def prepared(runner: Runner, finished: Runner) -> Runner:
    """All stages before training are done."""
    shutil.copytree(finished.folder / "artifacts", runner.folder / "artifacts")
    return runner


@pytest.mark.timeout(1800)
def test_driver_told_to_stop_while_training(prepared: Runner) -> None:
    """A preempted machine gives notice: the step at hand is saved, nothing stays behind, and the run goes on there."""
    at_signal: list[int] = []

    def tell(driver: psutil.Process) -> None:
        other = prepared.run(*LONG_TRAINING)
        assert other.returncode == 6, other.stdout + other.stderr
        assert f"process {driver.pid} on" in other.stderr
        at_signal.append(steps_done(prepared))
        driver.send_signal(signal.SIGTERM)

    assert prepared.run_disturbed(some_steps_done, tell, *LONG_TRAINING) == 143, prepared.log
    assert not prepared.left
    assert "go on with: llmr run" in prepared.log
    [saved] = prepared.folder.glob("artifacts/train/*/work/ckpt-*")
    step = int(saved.name.removeprefix("ckpt-"))
    assert step == steps_done(prepared) >= at_signal[0]
    done = prepared.run(*LONG_TRAINING)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"goes on from step {step}" in done.stderr
    assert steps(prepared) == list(range(60))


@pytest.fixture
def from_a_terminal() -> Iterator[None]:
    """What a shell has in the background ignores Ctrl-C, and so do its children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("from_a_terminal")
@pytest.mark.parametrize("times", [1, 2], ids=["once", "twice"])
def test_ctrl_c_while_training(prepared: Runner, times: int) -> None:
    """Ctrl-C goes to every process of the terminal: once, the step at hand is saved; twice, nothing is waited for. The
    same command goes on from what is whole."""
    at_signal: list[int] = []

    def press(driver: psutil.Process) -> None:
        at_signal.append(steps_done(prepared))
        for _ in range(times):
            os.killpg(driver.pid, signal.SIGINT)
            time.sleep(0.05)

    assert prepared.run_disturbed(some_steps_done, press, *LONG_TRAINING) == 130, prepared.log
    assert not prepared.left
    assert "stopped by SIGINT" in prepared.log
    assert "go on with: llmr run" in prepared.log
    assert "Traceback" not in prepared.log
    whole = prepared.folder.glob("artifacts/train/*/work/ckpt-????????")  # a second Ctrl-C may leave half of one
    saved = [int(path.name.removeprefix("ckpt-")) for path in whole]
    if times == 1:
        assert saved == [steps_done(prepared)]
        assert saved[0] >= at_signal[0]
    done = prepared.run(*LONG_TRAINING)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(f"goes on from step {step}" in done.stderr for step in saved)
    assert steps(prepared) == list(range(60))
    assert not list(prepared.folder.rglob("*.tmp-*"))


@pytest.mark.timeout(1800)
def test_train_worker_told_to_stop(prepared: Runner) -> None:
    """The machine of one worker is preempted: the step at hand is saved, and the run goes on from there by itself."""
    at_signal: list[int] = []

    def tell(driver: psutil.Process) -> None:
        at_signal.append(steps_done(prepared))
        named("RayTrainWorker")(driver).send_signal(signal.SIGTERM)

    assert prepared.run_disturbed(some_steps_done, tell, *LONG_TRAINING) == 0, prepared.log
    [went_on] = re.findall(r"told to stop: training goes on from step (\d+)", prepared.log)
    assert at_signal[0] <= int(went_on) < 60
    assert steps(prepared) == list(range(60))


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("when", [scoring_began, training_began], ids=["scoring", "training"])
def test_killed_driver(runner: Runner, finished: Runner, when: Callable[[Runner], bool]) -> None:
    """The machine of the driver dies: the same command goes on where the last commit was."""
    assert runner.run_and_kill(when, lambda driver: driver) != 0
    paid = runner.answers()
    done = runner.run()
    assert done.returncode == 0, done.stdout + done.stderr
    rows = runner.answers()
    assert set(paid) <= set(rows)
    assert len(rows) == len(set(rows)), "a committed LLM score was paid for again"
    assert runner.files() == finished.files()
    assert runner.results["rows"] == finished.results["rows"]


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
    rows = runner.answers()
    assert len(rows) == len(set(rows)), "a committed LLM score was paid for again"
    assert runner.files() == finished.files()


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
    assert runner.files() == finished.files()


@pytest.mark.timeout(1800)
def test_random_kills(runner: Runner, finished: Runner) -> None:
    """A minute in which some worker dies every few seconds: the run ends by itself with the same artifacts."""
    rng = random.Random(0)

    def disturb(driver: psutil.Process) -> None:
        end = time.monotonic() + 60
        while time.monotonic() < end and lives(driver):
            with contextlib.suppress(psutil.NoSuchProcess):  # ended by itself
                titles = {child: title_of(child) for child in driver.children(recursive=True)}
                # Ray itself does not outlive its agents.
                workers = [child for child, title in titles.items() if "ray::" in title and "Agent" not in title]
                if workers:
                    rng.choice(workers).kill()
            time.sleep(rng.uniform(3, 8))

    assert runner.run_disturbed(scoring_began, disturb) == 0, runner.log
    rows = runner.answers()
    assert len(rows) == len(set(rows)), "a committed LLM score was paid for again"
    assert runner.files() == finished.files()


@pytest.mark.timeout(1800)
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk")
@pytest.mark.parametrize(("folder", "kilobytes"), [("llm_store", 64), ("index", 64), ("train", 40_000)])
def test_full_disk(runner: Runner, finished: Runner, folder: str, kilobytes: int) -> None:
    """No room for scores, an index or a checkpoint: the run says where, keeps what is whole and goes on with room."""
    disk = runner.folder / "artifacts" / folder
    disk.mkdir(parents=True)
    _mount("-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(disk))
    try:
        used = []
        for _ in range(3):
            full = runner.run()
            used.append(shutil.disk_usage(disk).used)
            assert full.returncode == 4, full.stdout + full.stderr
            assert str(disk) in full.stderr
            assert "No space left" in full.stderr
            assert "Traceback" not in full.stderr
        # Scores that still fit are kept in every try; of a checkpoint or an index that did not fit nothing stays.
        assert folder == "llm_store" or used[2] <= used[1], "tries that fail fill the disk"
        _mount("-o", "remount,size=4g", str(disk))
        done = runner.run()
        assert done.returncode == 0, done.stdout + done.stderr
        assert runner.files() == finished.files()
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
