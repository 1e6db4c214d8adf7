"""Progress of training, read by the driver from the step records: a bar on a terminal, else a plain line at times."""

import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from llmr_ray.training.checkpoint import read_steps

LINE_SECONDS = 10.0
POLL_SECONDS = 1.0


class TrainProgress:
    """Shows step, loss and time left while the `with` block runs; workers need not be able to print.

    Args:
        root: where the step records are.
        num_steps: the last step's number.
    """

    def __init__(self, root: Path, num_steps: int) -> None:
        self.root, self.num_steps = root, num_steps
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="train-progress")

    def __enter__(self) -> "TrainProgress":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        console = Console(stderr=True)
        if not console.is_terminal:
            while not self._stop.wait(LINE_SECONDS):
                steps = read_steps(self.root)
                if steps:
                    print(f"train: {describe(steps, self.num_steps)}", file=sys.stderr, flush=True)
            return
        columns = (TextColumn("train"), BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("starting workers", total=self.num_steps)
            while not self._stop.wait(POLL_SECONDS):
                steps = read_steps(self.root)
                if steps:
                    bar.update(task, completed=len(steps), description=describe(steps, self.num_steps))


def describe(steps: list[dict[str, Any]], num_steps: int) -> str:
    """One line on where training stands, from the records so far (at least one)."""
    recent = steps[-20:]
    seconds = sum(record["seconds"] for record in recent) / len(recent)
    tokens = sum(record["num_tokens"] for record in recent) / max(1e-9, sum(record["seconds"] for record in recent))
    last = steps[-1]
    left = time.strftime("%H:%M:%S", time.gmtime(seconds * (num_steps - len(steps))))
    return (
        f"step {len(steps)}/{num_steps}, {last['dataset']} loss {last['loss']:.4f}, lr {last['learning_rate']:.2e}, "
        f"{tokens:,.0f} tokens/s, {left} left"
    )
