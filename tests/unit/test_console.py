"""What is printed for people."""

import pytest

from llmr_ray.console import terminal


@pytest.mark.parametrize("told", ["llmr run a.yaml 'evaluate.methods=[random,bm25]'", "[red]", "a [/b] c", "x" * 500])
def test_what_is_printed_is_what_was_given(told: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A resume command that lost its lists, or was broken at the terminal's width, starts another run."""
    terminal().print(told)
    terminal(stderr=True).print(told, style="red")
    assert capsys.readouterr() == (f"{told}\n", f"{told}\n")
