"""Runs of the real command in processes of its own."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

from llmr_ray.cluster import lives

TINY = Path(__file__).with_name("tiny.yaml")


@dataclass
class Runner:
    """`llmr run` of a configuration that is named as its file is, with artifacts and runs in `folder`."""

    folder: Path
    config: Path = TINY
    left: list[psutil.Process] = field(default_factory=list)

    @property
    def run_dir(self) -> Path:
        return self.folder / "runs" / self.config.stem

    def command(self, *extra: str) -> list[str]:
        places = [f"runtime.artifact_root={self.folder / 'artifacts'}", f"runtime.run_root={self.folder / 'runs'}"]
        return [sys.executable, "-m", "llmr_ray", "run", str(self.config), *places, *extra]

    def run(self, *extra: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.command(*extra), capture_output=True, text=True, timeout=900, env=environment())

    @property
    def log(self) -> str:
        """What the disturbed run printed."""
        return (self.folder / "disturbed.log").read_text()

    def run_and_kill(self, when: Callable[["Runner"], bool], victim: Callable[[psutil.Process], psutil.Process]) -> int:
        """Starts a run, kills -9 one of its processes once `when` holds, and returns the driver's exit code."""
        return self.run_disturbed(when, lambda driver: victim(driver).send_signal(signal.SIGKILL))

    def run_disturbed(
        self, when: Callable[["Runner"], bool], disturb: Callable[[psutil.Process], None], *extra: str
    ) -> int:
        """Starts a run, calls `disturb` with its driver once `when` holds, and returns the driver's exit code.

        The driver leads a process group, as what is started from a terminal does: Ctrl-C goes to all of it.

        What still runs of it a minute after its end is in `left`: a driver that was killed leaves its Ray behind, which
        ends by itself, and the next run must not meet it half dead.
        """
        with (self.folder / "disturbed.log").open("w") as log:
            driver = subprocess.Popen(
                self.command(*extra), stdout=log, stderr=subprocess.STDOUT, env=environment(), start_new_session=True
            )
        family = psutil.Process(driver.pid)
        try:
            deadline = time.monotonic() + 900
            while not when(self):
                assert driver.poll() is None, self.log
                assert time.monotonic() < deadline, self.log
                time.sleep(0.2)
            children = family.children(recursive=True)
            disturb(family)
            code = driver.wait(timeout=900)
        finally:
            driver.kill()
        deadline = time.monotonic() + 60
        while (left := [process for process in children if lives(process)]) and time.monotonic() < deadline:
            time.sleep(0.5)
        self.left = left
        return code

    def finished(self) -> dict[str, int]:
        """When the manifest of each finished artifact was written, by the artifact's id."""
        paths = (self.folder / "artifacts").glob("*/*/manifest.json")
        return {f"{path.parts[-3]}/{path.parts[-2]}": path.stat().st_mtime_ns for path in paths}

    def files(self) -> dict[str, dict[str, Any]]:
        """The checksums of all artifacts: equal files mean an equal run to the last bit."""
        return {
            name: json.loads((self.folder / "artifacts" / name / "manifest.json").read_text())["files"]
            for name in self.finished()
        }

    def answers(self, since: int = 0) -> list[bytes]:
        """The keys of what the LLM answered after a time."""
        paths = self.folder.glob("artifacts/llm_store/**/*.parquet")
        new = [path for path in paths if path.stat().st_mtime_ns > since]
        return [key for path in new for key in pq.read_table(path, columns=["key"])["key"].to_pylist()]

    def at_work(self, stage: str, number: int) -> list[Path]:
        """The artifact of a stage in its `number`-th round, while it is unfinished."""
        folders = list((self.folder / "artifacts" / stage).glob("*"))
        return [path for path in folders if not (path / "manifest.json").exists()] if len(folders) == number else []

    @property
    def results(self) -> dict[str, Any]:
        return dict(json.loads((self.run_dir / "results.json").read_text()))

    @property
    def stages(self) -> dict[str, dict[str, Any]]:
        """Each stage's artifact and accounting."""
        return {stage["stage"]: stage for stage in self.results["stages"]}

    def rows(self, stage: str, table: str) -> list[dict[str, Any]]:
        folder = self.folder / "artifacts" / self.stages[stage]["artifact"]
        parts = sorted(folder.glob(f"parts/{table}-*.parquet"))
        return [row for path in parts for row in pq.read_table(path).to_pylist()]

    def pairs(self, stage: str, table: str, value: str) -> dict[tuple[str, str], Any]:
        rows = self.rows(stage, table)
        found = {(row["query_id"], row["doc_id"]): row[value] for row in rows}
        assert len(found) == len(rows) > 0
        return found


def kill_all(driver: psutil.Process) -> None:
    """SIGKILL to the driver and to everything that it started, Ray included."""
    for process in [driver, *driver.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):  # ended by itself
            process.kill()


def title_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def named(title: str) -> Callable[[psutil.Process], psutil.Process]:
    def find(driver: psutil.Process) -> psutil.Process:
        return next(child for child in driver.children(recursive=True) if title in title_of(child))

    return find


def environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """An undisturbed run; the other tests compare with it."""
    runner = Runner(tmp_path_factory.mktemp("finished"))
    done = runner.run()
    assert done.returncode == 0, done.stdout + done.stderr
    return runner


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    return Runner(tmp_path)
