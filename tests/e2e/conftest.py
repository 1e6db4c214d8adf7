"""Runs of the real command in processes of its own."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from llmr_ray.cluster import lives

TINY = Path(__file__).with_name("tiny.yaml")


@dataclass
class Runner:
    """`llmr run tests/e2e/tiny.yaml` with artifacts and runs in `folder`."""

    folder: Path
    left: list[psutil.Process] = field(default_factory=list)

    @property
    def run_dir(self) -> Path:
        return self.folder / "runs" / "tiny"

    def command(self, *extra: str) -> list[str]:
        places = [f"runtime.artifact_root={self.folder / 'artifacts'}", f"runtime.run_root={self.folder / 'runs'}"]
        return [sys.executable, "-m", "llmr_ray", "run", str(TINY), *places, *extra]

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
