"""What readers yield: queries, documents and the rows that are no good, each with its reason.

A reader turns one source into these records and decides nothing about splits or sizes; `selection.py` does. A bad row
costs itself only: the reader goes on. A file that cannot be read at all raises DataError.
"""

import gzip
import json
import math
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, cast

from llmr_ray.config import DatasetConfig
from llmr_ray.data.splits import SPLITS
from llmr_ray.errors import DataError

EXCERPT_CHARS = 160

MAX_LINE_BYTES = 256 * 2**20
"""A line beyond this is no row: without a bound, a file without line breaks would have to fit in memory."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a reader is given: a data set's name, its settings, where it lies, and the LLM's tokenizer folder."""

    name: str
    config: DatasetConfig
    path: Path
    tokenizer: Path


@dataclass(frozen=True, kw_only=True)
class Query:
    """A row of `queries` before its split is known.

    split_key: rows with one key go to one split (a dialogue's pair, a file, a shared passage). split: fixed by the
    data. qrels: relevance of documents. related: documents that are kept for this query besides its qrels.
    self_doc_id: the document made from this very row. given: candidates that come with the data, best first, with
    their retrieval scores (None: the data has none). given_rewards: what a teacher of the data's makers scored them.
    row: where it was read, to be told; empty where the reader does not say.
    """

    query_id: str
    query: str
    targets: tuple[str, ...]
    pool: str
    split_key: str
    split: str | None = None
    options: tuple[str, ...] | None = None
    gold_option: int | None = None
    context: str | None = None
    history_end: int | None = None
    qrels: tuple[tuple[str, int], ...] = ()
    related: tuple[str, ...] = ()
    self_doc_id: str | None = None
    given: tuple[tuple[str, float | None], ...] = ()
    given_rewards: tuple[tuple[str, float], ...] = ()
    meta: dict[str, Any] | None = None
    row: str = field(default="", compare=False)


@dataclass(frozen=True, kw_only=True)
class Document:
    """A row of `corpus`. position: its place in a dialogue or text; None where the pool has no order.

    from_query: the query it was made from; it is kept only if that query is for training. is_solved: a published
    example, of which is known only that its input ends at some line break; it is kept only if that is no held-out
    query's. row: as a query's.
    """

    doc_id: str
    pool: str
    text: str
    position: int | None = None
    continuation: str | None = None
    from_query: str | None = None
    is_solved: bool = False
    meta: dict[str, Any] | None = None
    row: str = field(default="", compare=False)


@dataclass(frozen=True, kw_only=True)
class Bad:
    """A row that breaks its contract: it is quarantined and counts towards prepare.max_bad_fraction."""

    row: str
    reason: str
    excerpt: str | None = None


@dataclass(frozen=True, kw_only=True)
class Skip:
    """A sound row that is not used on purpose."""

    row: str
    reason: str


Record = Query | Document | Bad | Skip


class BadRow(Exception):
    """Raised by the checks below and turned into a Bad record by the reader."""

    def __init__(self, reason: str, excerpt: Any = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.excerpt = None if excerpt is None else excerpt_of(excerpt)

    def at(self, row: str) -> Bad:
        """The record for this row."""
        return Bad(row=row, reason=self.reason, excerpt=self.excerpt)


def records_of(
    rows: Iterable[tuple[str, dict[str, Any] | Bad]], read: Callable[[str, dict[str, Any]], Iterable[Record]]
) -> Iterator[Record]:
    """What `read` makes of each row, given its name and content, which queries and documents keep; a row in which it
    finds something bad (BadRow) costs only itself."""
    for where, row in rows:
        if isinstance(row, Bad):
            yield row
            continue
        try:
            for record in read(where, row):
                is_named = isinstance(record, (Bad, Skip)) or record.row
                yield record if is_named else replace(record, row=where)
        except BadRow as bad:
            yield bad.at(where)


def duplicate_of(record: Query | Document) -> Bad:
    """What to tell of a query or a document whose id an earlier one has."""
    identity, text = (record.query_id, record.query) if isinstance(record, Query) else (record.doc_id, record.text)
    return Bad(row=record.row or identity, reason="duplicate_id", excerpt=excerpt_of(f"{identity}: {text}"))


def excerpt_of(value: Any) -> str:
    """The beginning of a value as printable text."""
    text = value if isinstance(value, str) else repr(value)
    return text[:EXCERPT_CHARS].encode("utf-8", "replace").decode("utf-8")


def check_text(value: Any, field: str, max_chars: int) -> str:
    """`value` if it is text that can be used; BadRow names what is wrong otherwise.

    Reasons: missing_field, nan, not_text, empty_text, invalid_unicode (a lone surrogate), too_long.
    """
    if value is None:
        raise BadRow("missing_field", field)
    if isinstance(value, float) and not math.isfinite(value):
        raise BadRow("nan", field)
    if not isinstance(value, str):
        raise BadRow("not_text", f"{field}: {value!r}")
    if not value.strip():
        raise BadRow("empty_text", field)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow("invalid_unicode", value) from error
    if len(value) > max_chars:
        raise BadRow("too_long", value)
    return value


def check_texts(value: Any, field: str, max_chars: int) -> tuple[str, ...]:
    """A non-empty list of texts (one text counts as a list of one); BadRow otherwise."""
    items = [value] if isinstance(value, str) else value
    if items is None:
        raise BadRow("missing_field", field)
    if not isinstance(items, list):
        raise BadRow("not_text", f"{field}: {value!r}")
    if not items:
        raise BadRow("empty_text", field)
    return tuple(check_text(item, field, max_chars) for item in items)


def check_split(value: Any) -> str | None:
    """The split that a row names, None where it names none; BadRow (unknown_split) where there is no such split."""
    if value is not None and value not in SPLITS:
        raise BadRow("unknown_split", value)
    split: str | None = value
    return split


def one_line(text: str) -> str:
    """Text with every run of white space as one space."""
    return " ".join(text.split())


def read_bytes(path: Path) -> bytes:
    """A file's bytes, or DataError saying what is missing."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error


def read_json(path: Path) -> Any:
    """A whole JSON file; DataError names the position where it is broken."""
    data = read_bytes(path)
    try:
        return json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 at byte {error.start}: {error.reason}. Fetch or export it again."
        ) from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path} is not JSON at line {error.lineno}, column {error.colno}: {error.msg}. It may have been cut "
            "short; fetch or export it again."
        ) from error


def read_json_lines(
    path: Path, wanted: Callable[[bytes], bool] | None = None
) -> Iterator[tuple[str, dict[str, Any] | Bad]]:
    """(row name, object or Bad) for each line that is not blank, or is `wanted`; a broken line costs only itself.

    The file, which may be compressed (.gz), need not fit in memory. Reasons: invalid_utf8, invalid_json,
    not_an_object.

    Raises:
        DataError: the file cannot be read, or was cut short.
    """
    for number, line in enumerate(read_lines(path), 1):
        if line.strip() and (wanted is None or wanted(line)):
            row = f"{path.name}:{number}"
            yield row, parse_json_line(row, line.rstrip(b"\r\n"))


def read_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file or of a compressed one (.gz); those beyond MAX_LINE_BYTES come in pieces."""
    with open_bytes(path) as file:
        while line := file.readline(MAX_LINE_BYTES):
            yield line


@contextmanager
def open_bytes(path: Path) -> Iterator[BinaryIO]:
    """A file for reading, decompressed where it ends with .gz; DataError where it cannot be read or was cut short."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield cast(BinaryIO, file)
    except (OSError, EOFError, zlib.error) as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: Exception) -> DataError:
    """What to tell of a file that cannot be read."""
    if path.suffix == ".gz" and not isinstance(error, FileNotFoundError):
        return DataError(f"{path} is not a whole gzip file: {error}. Check `path`, or fetch the file again.")
    return DataError(f"{path} cannot be read: {error}. Check `path` of the data set.")


def parse_json_line(row: str, line: bytes) -> dict[str, Any] | Bad:
    """The object in a line of a file, or why it is none; `row` names the line."""
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return Bad(row=row, reason="invalid_utf8", excerpt=line[:EXCERPT_CHARS].decode("utf-8", "replace"))
    except (json.JSONDecodeError, RecursionError):
        return Bad(row=row, reason="invalid_json", excerpt=excerpt_of(line.decode("utf-8")))
    return value if isinstance(value, dict) else Bad(row=row, reason="not_an_object", excerpt=excerpt_of(value))
