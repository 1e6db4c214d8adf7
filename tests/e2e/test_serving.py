"""A finished run, served by the real command: HAProxy, Serve, the trained embedder, and the run's measures again."""

import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from llmr_ray.cluster import lives
from llmr_ray.serving.launch import free_port
from tests.e2e.conftest import TINY, Runner, environment

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]


class Command:
    """`llmr serve RUN` in a process of its own."""

    def __init__(self, run: Path, log: Path, *extra: str) -> None:
        self.url, self._log = "", log
        port = free_port()
        command = [sys.executable, "-m", "llmr_ray", "serve", str(run), "--port", str(port), *extra]
        with log.open("w") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment())
        deadline = time.monotonic() + 400
        while f"http://127.0.0.1:{port}" not in (said := log.read_text()).partition("\nserving")[2]:
            assert self.process.poll() is None, said
            assert time.monotonic() < deadline, said
            time.sleep(0.2)
        self.url = f"http://127.0.0.1:{port}"

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        self.process.terminate()
        return self.process.wait(120)


@pytest.fixture(scope="module")
def command(finished: Runner, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    running = Command(finished.run_dir, tmp_path_factory.mktemp("serve") / "log")
    yield running
    if running.process.poll() is None:
        running.stop()


def test_the_run_is_served_as_it_was_measured(command: Command, finished: Runner) -> None:
    """An encoder set up otherwise than the index, or a query that sees other documents, only shows in the measures."""
    places = [f"runtime.artifact_root={finished.folder / 'artifacts'}", f"runtime.run_root={finished.folder / 'runs'}"]
    arguments = ["eval", str(TINY), *places, "--endpoint", command.url]
    done = subprocess.run(
        [sys.executable, "-m", "llmr_ray", *arguments], capture_output=True, text=True, timeout=600, env=environment()
    )
    assert done.returncode == 0, done.stderr
    served = json.loads((finished.run_dir / "served.json").read_text())
    results = json.loads((finished.run_dir / "results.json").read_text())
    assert served["num_queries"] > 20
    # Where the machine's precision is bfloat16, rounding depends on the company in a batch.
    assert served["max_score_difference"] < 5e-3
    for row in served["figures"]:
        [told] = [
            other for other in results["rows"]
            if other["method"] == "trained" and (other["dataset"], other["measure"]) == (row["dataset"], row["measure"])
        ]  # fmt: skip
        assert row["n"] == told["n"]
        assert row["offline"] == pytest.approx(told["mean"], abs=1e-9)


def test_it_ends_in_good_order(command: Command) -> None:
    """Processes that stay behind hold the port, the memory and the model."""
    with urllib.request.urlopen(f"{command.url}/readyz") as answer:
        assert json.load(answer)["status"] == "ready"
    family = psutil.Process(command.process.pid).children(recursive=True)
    assert command.stop() == 143
    deadline = time.monotonic() + 60
    while (left := [process for process in family if lives(process)]) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not left
