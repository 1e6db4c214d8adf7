"""Peak memory of a run on this machine: the driver and every process below it, Ray's included."""

import threading
from types import TracebackType

import psutil


class MemoryMeter:
    """Samples the resident memory of this process and its descendants while the `with` block runs.

    Shared pages (Ray's object store, libraries) are divided among the processes that map them where the kernel tells
    proportional sizes; elsewhere each counts them whole, an upper bound. `peak_bytes` holds the highest sample.
    """

    def __init__(self, interval_seconds: float = 5.0) -> None:
        self.peak_bytes = 0
        self._interval = interval_seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True, name="memory-meter")

    def __enter__(self) -> "MemoryMeter":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        me = psutil.Process()
        while True:
            self.peak_bytes = max(
                self.peak_bytes, sum(_memory(process) for process in [me, *me.children(recursive=True)])
            )
            if self._stop.wait(self._interval):
                return


def _memory(process: psutil.Process) -> int:
    """Proportional set size where the kernel tells it, resident set size otherwise; 0 for a process just gone."""
    try:
        full = process.memory_full_info()
        return int(getattr(full, "pss", full.rss))
    except psutil.AccessDenied:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0
