"""Peak memory of a run on this machine: the driver and every process below it, Ray's included."""

from collections.abc import Iterator
from contextlib import contextmanager

import psutil

from llmr_ray.ticking import ticking


class MemoryMeter:
    """Samples the resident memory of this process and its descendants; `peak_bytes` holds the highest sample.

    Shared pages (Ray's object store, libraries) are divided among the processes that map them where the kernel tells
    proportional sizes; elsewhere each counts them whole, an upper bound.
    """

    def __init__(self) -> None:
        self.peak_bytes = 0

    def sample(self) -> None:
        """Looks once."""
        me = psutil.Process()
        used = sum(_memory(process) for process in [me, *me.children(recursive=True)])
        self.peak_bytes = max(self.peak_bytes, used)


@contextmanager
def metered_memory(seconds: float = 5.0) -> Iterator[MemoryMeter]:
    """A meter that samples at the start of the block and then every `seconds`."""
    meter = MemoryMeter()
    meter.sample()
    with ticking(meter.sample, seconds, "memory-meter"):
        yield meter


def _memory(process: psutil.Process) -> int:
    """Proportional set size where the kernel tells it, resident set size otherwise; 0 for a process just gone."""
    try:
        full = process.memory_full_info()
        return int(getattr(full, "pss", full.rss))
    except psutil.AccessDenied:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0
