"""Progress of training, read by the driver from the step records: a bar on a terminal, else a plain line at times."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from llmr_ray.ticking import ticking
from llmr_ray.training.checkpoint import last_steps

LINE_SECONDS = 10.0
POLL_SECONDS = 1.0
RECENT_STEPS = 20
"""Speed and time left are judged by these."""


@contextmanager
def train_progress(name: str, root: Path, num_steps: int) -> Iterator[None]:
    """Shows step, loss and time left while the block runs; workers need not be able to print.

    Args:
        name: of the stage.
        root: where the step records are.
        num_steps: the last step's number.
    """
    console = Console(stderr=True)
    if not console.is_terminal:

        def line() -> None:
            if steps := last_steps(root, RECENT_STEPS):
                print(f"{name}: {describe(steps, num_steps)}", file=sys.stderr, flush=True)

        with ticking(line, LINE_SECONDS, f"{name}-progress"):
            yield
        return
    columns = (TextColumn(name), BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting workers", total=num_steps)

        def advance() -> None:
            if steps := last_steps(root, RECENT_STEPS):
                bar.update(task, completed=steps[-1]["step"] + 1, description=describe(steps, num_steps))

        with ticking(advance, POLL_SECONDS, f"{name}-progress"):
            yield


def describe(recent: Sequence[dict[str, Any]], num_steps: int) -> str:
    """One line on where training stands, from the last records (at least one)."""
    seconds = max(1e-9, sum(record["seconds"] for record in recent))
    tokens = sum(record["num_tokens"] for record in recent)
    last = recent[-1]
    done = last["step"] + 1
    left = time.strftime("%H:%M:%S", time.gmtime(seconds / len(recent) * (num_steps - done)))
    return (
        f"step {done}/{num_steps}, {last['dataset']} loss {last['loss']:.4f}, lr {last['learning_rate']:.2e}, "
        f"{tokens / seconds:,.0f} tokens/s, {left} left"
    )
