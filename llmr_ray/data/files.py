"""Files of published data sets: which of a folder's files hold a table, and their rows, one after the other.

A table is JSON lines, one JSON list or Parquet, plain or compressed, in one file or in several (``corpus.jsonl``,
``corpus-00000-of-00002.parquet``, ``corpus/…``). No more than a few rows are in memory at a time.
"""

import codecs
import json
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from llmr_ray.data.records import MAX_LINE_BYTES, Bad, excerpt_of, open_bytes, read_json_lines, read_lines
from llmr_ray.data.splits import SPLITS
from llmr_ray.errors import DataError

Row = dict[str, Any]
Rows = Iterator[tuple[str, Row | Bad]]
"""Names of rows, ``file:number`` from 1, each with the row or with why it is none."""

_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")
_PARQUET_ROWS = 512
_LIST = re.compile(rb"\s*\[\s*(\{|$)")
"""How a file begins that is one list of objects; a line that holds a list of something else is a bad row."""

_PIECE = 1 << 20
_BETWEEN = re.compile(r"[\s,]*")
_REST = re.compile(r"\s*\S")

_SPLITS = {"train": "train", "training": "train", "dev": "dev", "valid": "dev", "validation": "dev", "test": "test"}


def is_table(path: Path) -> bool:
    """Whether a file's name is that of a table."""
    return path.is_file() and path.name.endswith(_SUFFIXES)


def split_named(name: str) -> str | None:
    """The split that a file's name begins with (``train.concat.json``, ``validation-00000-of-00001.parquet``)."""
    word = re.match(r"[a-z]*", name.lower())
    return _SPLITS.get(word.group()) if word else None


def tables_in(folder: Path) -> list[Path]:
    """All tables right in a folder, sorted by name."""
    return sorted(path for path in folder.iterdir() if is_table(path)) if folder.is_dir() else []


def tables_of(folder: Path, name: str) -> list[Path]:
    """The files of the table `name`: those in the folder of that name, else those whose names begin with it."""
    named = re.compile(rf"{re.escape(name)}([.-]|$)")
    return tables_in(folder / name) or [path for path in tables_in(folder) if named.match(path.name)]


def has_splits(folder: Path) -> bool:
    """Whether a folder holds a table whose name begins with a split's."""
    return any(split_named(file.name) for file in tables_in(folder))


def files_of_splits(path: Path) -> list[tuple[str | None, Path]]:
    """The files of a data set of rows, with the split that their names say: a folder's in the order of the splits, or
    the one that is given.

    Raises:
        DataError: there is no such file.
    """
    if path.is_file():
        return [(split_named(path.name), path)]
    found = [(split, file) for file in tables_in(path) if (split := split_named(file.name))]
    if not found:
        raise DataError(
            f"there is no file of rows in {path}: one that begins with train, dev or test and ends with "
            f"{', '.join(_SUFFIXES)}. Name the file itself, or rename it."
        )
    return sorted(found, key=lambda item: (SPLITS.index(item[0]), item[1].name))


def read_tables(paths: list[Path]) -> Rows:
    """The rows of several files, one after the other."""
    return chain.from_iterable(map(read_rows, paths))


def read_rows(path: Path) -> Rows:
    """The rows of a table, whichever form it has; a broken row costs only itself.

    Raises:
        DataError: the file cannot be read, or was cut short.
    """
    if path.suffix == ".parquet":
        return _parquet_rows(path)
    first = next((line for line in read_lines(path) if line.strip()), b"")
    return _list_rows(path) if _LIST.match(first[:1000]) else read_json_lines(path)


def _parquet_rows(path: Path) -> Rows:
    try:
        number = 0
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path.name}:{number}", row
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} is not a whole Parquet file: {error}. Check `path`, or fetch it again.") from error


def _list_rows(path: Path) -> Rows:
    """The objects of a file that is one JSON list; it may be longer than memory."""
    decoder = json.JSONDecoder()
    # Bytes that are no UTF-8 become lone surrogates, over which the check of that text trips, and no other row.
    decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
    with open_bytes(path) as file:
        text = decode(file.read(_PIECE)).lstrip("\ufeff \t\r\n").removeprefix("[")
        place, number = 0, 0
        while True:
            place = _BETWEEN.match(text, place).end()  # type: ignore[union-attr]  # it matches nothing, too
            if text.startswith("]", place):
                return
            value, end = _decoded(decoder, text, place)
            if end < 0:
                # As much again as there is, or long objects would be parsed anew for each piece.
                piece = file.read(max(_PIECE, len(text) - place))
                if not piece or len(text) - place > MAX_LINE_BYTES:
                    raise DataError(
                        f"{path} is a list that breaks off or is broken after {number} elements. It may have been cut "
                        "short; fetch or export it again."
                    )
                text, place = text[place:] + decode(piece), 0
                continue
            number, place = number + 1, end
            row = f"{path.name}:{number}"
            is_row = isinstance(value, dict)
            yield row, value if is_row else Bad(row=row, reason="not_an_object", excerpt=excerpt_of(value))


def _decoded(decoder: json.JSONDecoder, text: str, place: int) -> tuple[Any, int]:
    """The value at a place of a text and where it ends; -1 while it is not all there."""
    try:
        value, end = decoder.raw_decode(text, place)
    except (json.JSONDecodeError, RecursionError):
        return None, -1
    return (value, end) if _REST.match(text, end) else (None, -1)
