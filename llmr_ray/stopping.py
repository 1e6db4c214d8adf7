"""SIGTERM and Ctrl-C: a command ends in good order and says how to go on; training ends with a checkpoint.

A driver that is told to stop raises KeyboardInterrupt wherever it is (`stoppable`). Work that loses much by this is
asked to end by itself first (`asking`): the driver writes into a file that its workers read (`ask`, `is_asked`). A
worker to which SIGTERM comes, because its machine is wanted back, notes it (`note_sigterm`) and does the same.
"""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

SIGNALS = (signal.SIGTERM, signal.SIGINT)

_noted = threading.Event()


@contextmanager
def stoppable(resume: str) -> Iterator[None]:
    """Ends the block with KeyboardInterrupt on SIGTERM as on Ctrl-C, then the process with exit code 143 or 130.

    Args:
        resume: the command that goes on, printed at the end.
    """
    came: list[int] = []

    def interrupt(number: int, _: object) -> None:
        came.append(number)
        raise KeyboardInterrupt

    try:
        with _handled_by(interrupt):
            yield
    except BaseException as error:
        # While Ray starts, a handler of its own makes SystemExit(SIGTERM) of it.
        if not came and getattr(error, "code", None) != signal.SIGTERM:
            raise
        number = came[0] if came else signal.SIGTERM
        name = signal.Signals(number).name
        print(f"stopped by {name}. What is done is kept; go on with: {resume}", file=sys.stderr, flush=True)
        raise SystemExit(128 + number) from error


@contextmanager
def asking(ask: Callable[[], object], seconds: float) -> Iterator[Callable[[], bool]]:
    """Lets the block end by itself: the first SIGTERM or Ctrl-C calls `ask`, and has its usual effect after the block.

    A second one, or `seconds` without an end, interrupts the block at once. Yields what tells whether one came.
    """
    came: list[int] = []
    main = threading.main_thread().ident or 0
    # A real signal, for it also ends a wait for a lock.
    impatience = threading.Timer(seconds, lambda: signal.pthread_kill(main, came[0]))
    impatience.daemon = True

    def on_signal(number: int, _: object) -> None:
        came.append(number)
        if len(came) > 1:
            raise KeyboardInterrupt
        ask()
        impatience.start()

    try:
        with _handled_by(on_signal):
            yield lambda: bool(came)
    finally:
        impatience.cancel()
        if came:
            signal.raise_signal(came[0])


@contextmanager
def _handled_by(handler: Callable[[int, object], None]) -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    # Jobs of the background ignore Ctrl-C, and go on doing so.
    taken = {number: old for number, old in before.items() if old is not signal.SIG_IGN}
    for number in taken:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in taken.items():
            signal.signal(number, old)


def clear(path: Path) -> None:
    """Nobody is asked to stop. The file is made now: a network file system remembers for a while that there is none,
    but looks for what is new in a file whenever it is opened."""
    path.write_bytes(b"")


def ask(path: Path) -> None:
    """Asks those who read the file to stop."""
    path.write_bytes(b"stop")


def is_asked(path: Path) -> bool:
    """Whether those who read the file are asked to stop."""
    return bool(path.read_bytes())


def note_sigterm() -> None:
    """Has this process note the next SIGTERM instead of ending; one more ends it. To be called in the main thread."""
    before = signal.getsignal(signal.SIGTERM)
    _noted.clear()

    def note(*_: object) -> None:
        signal.signal(signal.SIGTERM, before)
        _noted.set()

    signal.signal(signal.SIGTERM, note)


def sigterm_came() -> bool:
    """Whether SIGTERM came since `note_sigterm`."""
    return _noted.is_set()
