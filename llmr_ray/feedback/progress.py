"""Progress of LLM work: a bar on a terminal, else a plain line every few seconds."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

LINE_SECONDS = 10.0


class AnswerProgress:
    """Shows how many answers are there, how fast they come, and what they cost. A context manager.

    Args:
        label: what is being asked.
        total: answers that must be computed.
        cached: answers that were in the store.
    """

    def __init__(self, label: str, total: int, cached: int) -> None:
        self.label, self.total, self.cached = label, total, cached
        self.done = self.tokens = self.errors = 0
        self._started = self._printed = time.monotonic()
        self._bar: Progress | None = None

    def __enter__(self) -> "AnswerProgress":
        console = Console(stderr=True)
        if console.is_terminal and self.total:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(),
                console=console,
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(self.label, total=self.total, note="")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, *, done: int, tokens: int, errors: int) -> None:
        """Counts answers that were just computed."""
        self.done, self.tokens, self.errors = self.done + done, self.tokens + tokens, self.errors + errors
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, note=self._rates())
        elif time.monotonic() - self._printed >= LINE_SECONDS:
            self._printed = time.monotonic()
            print(
                f"{self.label}: {self.done}/{self.total}, {self._rates()}, {self._left()}", file=sys.stderr, flush=True
            )

    def _rates(self) -> str:
        seconds = max(1e-9, time.monotonic() - self._started)
        return (
            f"{self.done / seconds:.1f} answers/s, {self.tokens / seconds:.0f} LLM tokens/s, {self.cached} cached, "
            f"{self.errors} errors"
        )

    def _left(self) -> str:
        if not self.done:
            return "time left unknown"
        return f"{(time.monotonic() - self._started) / self.done * (self.total - self.done):.0f} s left"
