"""Errors a user can act on: each says what was seen, why it matters and what to do.

Every class takes a single message, so that it survives the pickling between Ray processes. ``exit_code`` is what the
command line returns (0 ok, 1 failed, 2 usage or config, 3 data, 4 resources, 5 budget reached, 6 locked).
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class LlmrError(Exception):
    """Base of all errors that are the user's to solve rather than a defect of this code."""

    exit_code = 1


class ConfigError(LlmrError):
    """The configuration is wrong: an unknown key, a value out of range, settings that contradict each other."""

    exit_code = 2


class DataError(LlmrError):
    """Input or intermediate data breaks its contract (schema, keys, nulls, accounting, checksum)."""

    exit_code = 3


class ResourceError(LlmrError):
    """The machine or cluster cannot run this: too few CPUs, no disk, a missing model, a stalled stage."""

    exit_code = 4


class BudgetError(LlmrError):
    """The run may spend no more on the LLM. What was computed is kept."""

    exit_code = 5


class LockedError(LlmrError):
    """Another living process works on the same artifact."""

    exit_code = 6


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Ends the process with the error's exit code, printed without its traceback; defects keep theirs."""
    try:
        yield
    except LlmrError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        raise SystemExit(error.exit_code) from error
