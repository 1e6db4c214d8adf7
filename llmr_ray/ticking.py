"""Something done again and again beside the work of a `with` block."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def ticking(action: Callable[[], object], seconds: float, name: str) -> Iterator[None]:
    """Calls `action` every `seconds` in a thread of that name while the block runs, and never after it."""
    stop = threading.Event()

    def loop() -> None:
        while not stop.wait(seconds):
            action()

    thread = threading.Thread(target=loop, daemon=True, name=name)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
