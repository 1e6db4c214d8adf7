"""Settings that came after artifacts had been made."""

from dataclasses import field
from typing import TypeVar

_Value = TypeVar("_Value")


def later(default: _Value) -> _Value:
    """A field of settings that is no part of an artifact's id at its default, so that old ids stay as they were."""
    return field(default=default, metadata={"later": True})
