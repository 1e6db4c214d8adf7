"""SIGTERM and Ctrl-C: what is at work ends in order, and the exit code says why."""

import signal
import threading
import time

import pytest

from llmr_ray import stopping
from llmr_ray.stopping import asking, stoppable

RESUME = "llmr run conf/x.yaml train.num_steps=9"


@pytest.fixture(autouse=True)
def as_started_from_a_terminal():
    """Ctrl-C as in a foreground process, whoever started the tests; and everything put back."""
    before = {number: signal.getsignal(number) for number in stopping.SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_block_in_order(capsys, number, code):
    """Prevents a SIGTERM that kills on the spot (locks and processes stay), and an end that looks like success."""
    before = signal.getsignal(number)
    cleaned = []

    def work():
        with stoppable(RESUME):
            try:
                signal.raise_signal(number)
                pytest.fail("the block went on")
            finally:
                cleaned.append(True)

    with pytest.raises(SystemExit) as ended:
        work()
    assert ended.value.code == code
    assert cleaned
    assert RESUME in capsys.readouterr().err
    assert signal.getsignal(number) is before


def test_what_a_library_makes_of_an_interrupt_is_still_the_signal():
    """Prevents a stopped run from being reported as a defect: Ray wraps what interrupts its waits."""

    def work():
        with stoppable(RESUME):
            try:
                signal.raise_signal(signal.SIGTERM)
            except KeyboardInterrupt:
                raise RuntimeError("wrapped") from None

    with pytest.raises(SystemExit) as ended:
        work()
    assert ended.value.code == 143


@pytest.mark.parametrize(("error", "code"), [(SystemExit(3), 3), (SystemExit(signal.SIGTERM), 143)])
def test_other_ends_keep_their_code(capsys, error, code):
    """Prevents user errors from turning into a stop; 15 is how Ray's own handler ends a driver while Ray starts."""
    with pytest.raises(SystemExit) as ended, stoppable(RESUME):
        raise error
    assert ended.value.code == code
    assert (RESUME in capsys.readouterr().err) == (code == 143)


def test_ctrl_c_stays_ignored_in_the_background():
    """Prevents Ctrl-C in a shell from ending the jobs it has in the background."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    reached = []
    with stoppable(RESUME), asking(lambda: reached.append("asked"), 9):
        signal.raise_signal(signal.SIGINT)
        reached.append("end")
    assert reached == ["end"]


def test_the_first_signal_asks_and_the_block_ends_by_itself():
    """Prevents a step at hand from being thrown away."""
    events = []

    def work():
        with stoppable(RESUME), asking(lambda: events.append("asked"), 9) as is_asked:
            assert not is_asked()
            signal.raise_signal(signal.SIGTERM)
            assert is_asked()
            events.append("step done")
        events.append("unreachable")

    with pytest.raises(SystemExit) as ended:
        work()
    assert ended.value.code == 143
    assert events == ["asked", "step done"]


def test_a_second_signal_ends_the_block_at_once():
    """Prevents a user from having to wait for a step that hangs."""
    events = []

    def work():
        with stoppable(RESUME), asking(lambda: events.append("asked"), 9):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            events.append("unreachable")

    with pytest.raises(SystemExit) as ended:
        work()
    assert ended.value.code == 130
    assert events == ["asked"]


def test_where_there_is_nothing_to_save_the_first_signal_ends_the_block():
    """Prevents a run whose workers are still starting from using up its grace period for nothing."""
    reached = []

    def work():
        with stoppable(RESUME), asking(lambda: signal.default_int_handler(0, None), 9):
            signal.raise_signal(signal.SIGTERM)
            reached.append("the end")

    with pytest.raises(SystemExit) as ended:
        work()
    assert ended.value.code == 143
    assert not reached


def test_patience_ends():
    """Prevents a platform from killing the run, and leaving its Ray behind, because one step takes too long."""
    never = threading.Lock()
    never.acquire()

    def work():
        with stoppable(RESUME), asking(lambda: None, 0.1):
            signal.raise_signal(signal.SIGTERM)
            never.acquire()

    started = time.monotonic()
    with pytest.raises(SystemExit) as ended:
        work()
    assert ended.value.code == 143
    assert time.monotonic() - started < 5


def test_an_error_after_being_asked_counts_as_the_stop():
    """Prevents workers that die of the same SIGTERM from turning a stop into a failure."""

    def work():
        with stoppable(RESUME), asking(lambda: None, 9):
            signal.raise_signal(signal.SIGTERM)
            raise ValueError("the workers are gone")

    with pytest.raises(SystemExit) as ended:
        work()
    assert ended.value.code == 143


def test_a_worker_notes_sigterm_once_and_obeys_the_second():
    """Prevents a worker from dying in the middle of a step, and one that cannot be ended."""
    obeyed = []
    signal.signal(signal.SIGTERM, lambda *_: obeyed.append(True))
    stopping.note_sigterm()
    assert not stopping.sigterm_came()
    signal.raise_signal(signal.SIGTERM)
    assert stopping.sigterm_came()
    assert not obeyed
    signal.raise_signal(signal.SIGTERM)
    assert obeyed


def test_a_new_run_is_not_stopped_by_the_request_to_the_last_one(tmp_path):
    """Prevents a resumed run from ending after each step because an old request is still there."""
    path = tmp_path / "stop"
    stopping.clear(path)
    assert not stopping.is_asked(path)
    stopping.ask(path)
    assert stopping.is_asked(path)
    stopping.clear(path)
    assert not stopping.is_asked(path)
