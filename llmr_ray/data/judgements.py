"""Files beside the queries that name them by their ids: judgements (qrels) and candidates (TREC runs).

    judgements   query-id, corpus-id, score, separated by tabs; or TREC's qid, 0, docid, relevance; or tables
    runs         TREC's qid Q0 docid rank score tag

Lines are taken in before the queries are read, and the queries claim theirs. What names a query that never comes is
told line by line from a second reading, so that memory holds no line's place; where nothing at all is claimed, ids of
one file are not those of the other, and that is an error.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llmr_ray.data.files import read_rows, split_named
from llmr_ray.data.passages import identity_of
from llmr_ray.data.records import Bad, BadRow, read_lines
from llmr_ray.data.splits import SPLITS
from llmr_ray.errors import DataError

SUFFIXES = (".tsv", ".trec", ".qrels", ".txt", ".tsv.gz")
"""How files end that hold judgements as lines; others are tables."""


class Line(NamedTuple):
    """A judgement or a candidate: a query, a document and its relevance or its score."""

    query: str
    document: str
    value: float


Lines = Iterator[tuple[str, Line | Bad]]
"""Names of lines, ``file:number`` from 1, each with what it says or with why it says nothing."""


class Claims:
    """Which of the queries that a file names have come.

    Args:
        named: the queries that it names.
    """

    def __init__(self, named: Iterable[str]) -> None:
        self._open = set(named)
        self._num_named = len(self._open)
        self._other = ""

    def claim(self, query: str) -> None:
        """A query of this id is there, whether or not its row is any good."""
        if query in self._open:
            self._open.remove(query)
        elif not self._other:
            self._other = query

    def leftovers(self, dataset: str, lines: Lines) -> Iterator[Bad]:
        """The lines of a second reading that name a query which has not come (unknown_query).

        Raises:
            DataError: none of the queries that are named has come.
        """
        if not self._open:
            return
        for where, line in lines:
            if isinstance(line, Bad) or line.query not in self._open:
                continue
            if len(self._open) == self._num_named:
                called = f"is called '{self._other}'" if self._other else "has an id"
                raise DataError(
                    f"data set '{dataset}': {where} names the query '{line.query}', but a query of the data set "
                    f"{called}, and none is among the {self._num_named} that are named so: nothing of it would be "
                    "used. Write the ids of queries alike in both files."
                )
            yield Bad(row=where, reason="unknown_query", excerpt=f"{line.query} {line.document}")


class Judgements:
    """What qrels say: relevance by query and document, each query's split by the file it is judged in, and the
    unreadable lines. Documents that are judged irrelevant count as not judged.

    Args:
        files: with lines or tables of judgements; their names say the split.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files
        self.relevance: dict[str, dict[str, int]] = {}
        self.split_of: dict[str, str] = {}
        self.bad: list[Bad] = []
        for path in files:
            first = path.name.partition(".")[0]
            split = first if first in SPLITS else split_named(path.name)
            for _, line in _judged(path):
                if isinstance(line, Bad):
                    self.bad.append(line)
                    continue
                if line.value > 0:
                    self.relevance.setdefault(line.query, {})[line.document] = int(line.value)
                if split is not None:
                    self.split_of[line.query] = split
        self._claims = Claims(self.relevance)

    def of(self, query: str) -> dict[str, int]:
        """The relevance of documents to a query, which is there now."""
        self._claims.claim(query)
        return dict(self.relevance.get(query, {}))

    def leftovers(self, dataset: str) -> Iterator[Bad]:
        """The judgements that no query has asked for; DataError where that is all of them."""
        positive = (
            (where, line)
            for path in self.files
            for where, line in _judged(path)
            if isinstance(line, Line) and line.value > 0
        )
        yield from self._claims.leftovers(dataset, positive)


class Run:
    """Candidates of queries: the documents of a TREC run with their scores.

    Args:
        path: the run; None: there are no candidates.
        is_known: whether there is a document of this id.
    """

    def __init__(self, path: Path | None, is_known: Callable[[str], bool]) -> None:
        self._path, self._is_known = path, is_known
        self._given: dict[str, list[tuple[float, str]]] = {}
        self._claims = Claims(())

    def read(self, dataset: str) -> Iterator[Bad]:
        """Takes in all lines; yields those that are none, or whose document is unknown.

        Raises:
            DataError: no line names a document of the data set.
        """
        unknown: Bad | None = None
        for where, line in self._lines():
            if isinstance(line, Bad):
                yield line
            elif self._is_known(line.document):
                self._given.setdefault(line.query, []).append((line.value, line.document))
            else:
                unknown = Bad(row=where, reason="unknown_document", excerpt=f"{line.query} {line.document}")
                yield unknown
        if unknown is not None and not self._given:
            raise DataError(
                f"data set '{dataset}': no line of {self._path} names a document of the corpus; {unknown.row} has "
                f"'{unknown.excerpt}'. Write the ids in both files alike, or name the run of this corpus."
            )
        self._claims = Claims(self._given)

    def of(self, query: str) -> dict[str, float]:
        """A query's documents with their scores, best first; of a document that comes twice the better score."""
        self._claims.claim(query)
        best: dict[str, float] = {}
        for score, document in sorted(self._given.get(query, []), key=lambda pair: -pair[0]):
            best.setdefault(document, score)
        return best

    def leftovers(self, dataset: str) -> Iterator[Bad]:
        """The lines of known documents whose query has not come; DataError where that is all of them."""
        usable = (
            (where, line) for where, line in self._lines() if isinstance(line, Line) and self._is_known(line.document)
        )
        yield from self._claims.leftovers(dataset, usable)

    def _lines(self) -> Lines:
        return iter(()) if self._path is None else _ranked(self._path)


def judged_files(folder: Path) -> list[Path]:
    """Files with lines of judgements right in a folder."""
    return [path for path in folder.glob("*") if path.name.endswith(SUFFIXES)]


def _judged(path: Path) -> Lines:
    return _judged_lines(path) if path.name.endswith(SUFFIXES) else _judged_rows(path)


def _judged_lines(path: Path) -> Lines:
    for number, raw in enumerate(read_lines(path), 1):
        text = raw.decode("utf-8", "replace").rstrip("\r\n")
        # Three columns hold ids with blanks in them, TREC's four are separated by any white space.
        cells = text.split("\t") if "\t" in text else text.split()
        if not text.strip() or (number == 1 and cells[-1].strip() == "score"):
            continue
        where = f"{path.name}:{number}"
        try:
            yield where, Line(cells[0], cells[-2], int(cells[-1]))
        except (ValueError, IndexError):
            yield where, Bad(row=where, reason="bad_qrels_line", excerpt=text[:160])


def _judged_rows(path: Path) -> Lines:
    for where, row in read_rows(path):
        if isinstance(row, Bad):
            yield where, row
            continue
        try:
            query, document = identity_of(row, ("query-id", "query_id")), identity_of(row, ("corpus-id", "doc_id"))
            if query is None or document is None:
                raise BadRow("missing_field", "query-id or corpus-id")
            relevance: Any = row.get("score", row.get("relevance", 1))
            yield where, Line(query, document, int(relevance))
        except BadRow as bad:
            yield where, bad.at(where)
        except (TypeError, ValueError):
            yield where, Bad(row=where, reason="bad_qrels_line", excerpt=repr(row)[:160])


def _ranked(path: Path) -> Lines:
    for number, raw in enumerate(read_lines(path), 1):
        cells = raw.decode("utf-8", "replace").split()
        if not cells:
            continue
        where = f"{path.name}:{number}"
        try:
            line = Line(cells[0], cells[2], float(cells[4]))
            if not math.isfinite(line.value):
                raise ValueError(line.value)
            yield where, line
        except (ValueError, IndexError):
            yield where, Bad(row=where, reason="bad_run_line", excerpt=" ".join(cells)[:160])
