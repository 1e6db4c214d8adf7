"""Which split a row belongs to: a pure function of the data set's name and the row's key.

No counter, order or seed takes part, so adding or removing rows moves no other row, and a larger run contains the
smaller one.
"""

import hashlib
from collections.abc import Iterable

SPLITS = ("train", "dev", "test")
SPLITS_TOLD = {"train": "training", "dev": "development", "test": "test"}
"""What pages and tables call them."""


def unit_hash(*parts: str) -> float:
    """A number in [0, 1) from the sha256 of the parts."""
    digest = hashlib.sha256("\x1f".join(parts).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def split_of(dataset: str, key: str, *, test_fraction: float, dev_fraction: float) -> str:
    """The split of all rows with this key: test, then dev, then train along the unit interval."""
    value = unit_hash("split", dataset, key)
    if value < test_fraction:
        return "test"
    return "dev" if value < test_fraction + dev_fraction else "train"


def lowest(dataset: str, ids: Iterable[str], number: int) -> set[str]:
    """The `number` ids that come first in the data set's hash order."""
    return set(sorted(ids, key=lambda item: (unit_hash("order", dataset, item), item))[:number])


def normalized(text: str) -> str:
    """The form in which two texts count as the same: lower case, runs of white space as one space."""
    return " ".join(text.lower().split())
