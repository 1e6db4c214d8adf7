"""Where messages for people are printed."""

from rich.console import Console


def terminal(*, stderr: bool = False, quiet: bool = False) -> Console:
    """A console that prints what it is given: no `[...]` of a command, label or path is taken for markup, and no line
    is broken, so that commands can be copied from a log."""
    return Console(stderr=stderr, quiet=quiet, markup=False, highlight=False, soft_wrap=True)
