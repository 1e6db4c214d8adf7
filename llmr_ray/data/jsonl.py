"""Readers of collections: a table of documents, one of queries, and judgements.

    jsonl   the user's own data: JSON lines in our field names, or a BEIR folder
    mteb    as data sets of MTEB and the hub are laid out: tables (Parquet or JSON) in folders

    queries   {query_id, query, answers, positives, options, gold_option, split}; BEIR and MTEB: {_id or id, text}
    corpus    {doc_id, title, text}; BEIR and MTEB: {_id or id, title, text}
    qrels/*   query-id, corpus-id, score, separated by tabs; or TREC's qid, 0, docid, relevance (.tsv, .trec, .qrels,
              .txt); mteb also has tables in `qrels`, `default` or `data`. The name of the file is the split

Needed are a query's text, its `answers` where the task uses them (all but tool and convsearch), and a document's text.
`options` are the choices, the first of `answers` being the right one. For the task icl, a folder without a corpus gives
its training queries as examples to the pool of all tasks. `candidates` may name a TREC run in the folder (qid Q0 docid
rank score tag), whose documents are the queries' given candidates.
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmr_ray.data.examples import example
from llmr_ray.data.files import Row, Rows, read_rows, read_tables, split_named, tables_in, tables_of
from llmr_ray.data.passages import identity_of, whole_text
from llmr_ray.data.records import (
    Bad,
    BadRow,
    Document,
    Query,
    Record,
    Source,
    check_text,
    check_texts,
    read_json_lines,
    read_lines,
    records_of,
)
from llmr_ray.data.splits import SPLITS
from llmr_ray.errors import ConfigError, DataError

TASKS = ("qa", "convsearch", "icl", "tool")
_WITHOUT_ANSWERS = frozenset({"tool", "convsearch"})
_JUDGEMENTS = (".tsv", ".trec", ".qrels", ".txt", ".tsv.gz")


@dataclass(kw_only=True)
class Judgements:
    """What qrels say: relevance by query and document, each query's split by the file it is judged in, and the
    unreadable lines."""

    relevance: dict[str, dict[str, int]] = field(default_factory=dict)
    split_of: dict[str, str] = field(default_factory=dict)
    bad: list[Bad] = field(default_factory=list)

    def add(self, query: str, document: str, relevance: int, split: str | None) -> None:
        """One judgement; documents that are judged irrelevant count as not judged."""
        if relevance > 0:
            self.relevance.setdefault(query, {})[document] = relevance
        if split is not None:
            self.split_of[query] = split


def read_jsonl(source: Source) -> Iterator[Record]:
    """The rows of a folder (or, for examples, of one file of queries)."""
    _check_task(source)
    folder = source.path if source.path.is_dir() else source.path.parent
    queries = folder / "queries.jsonl" if source.path.is_dir() else source.path
    corpus = folder / "corpus.jsonl"
    if source.config.task == "icl" and not (source.path.is_dir() and corpus.exists()):
        yield from records_of(read_json_lines(queries), lambda where, row: _example(source, where, row))
        return
    if not corpus.exists():
        raise DataError(f"data set '{source.name}': there is no {corpus} to retrieve from.")
    judgements = _judgements(sorted(_judged_files(folder / "qrels")))
    yield from _collection(source, folder, read_json_lines(corpus), read_json_lines(queries), judgements)


def read_mteb(source: Source) -> Iterator[Record]:
    """The rows of a folder that holds `corpus`, `queries` and judgements, each a table or a folder of tables."""
    _check_task(source)
    if source.config.task == "icl":
        raise ConfigError(f"data set '{source.name}': the source 'mteb' serves queries over a corpus, not 'icl'.")
    corpus, queries = (tables_of(source.path, name) for name in ("corpus", "queries"))
    if not corpus or not queries:
        raise DataError(
            f"data set '{source.name}': there is no table 'corpus' or no 'queries' (.parquet, .jsonl, .json) in "
            f"{source.path}. It holds {sorted(item.name for item in source.path.glob('*'))[:10]}."
        )
    files = [*_judged_files(source.path / "qrels")]
    for name in ("qrels", "default", "data"):
        files += tables_in(source.path / name) or tables_of(source.path, name)
    judgements = _judgements(sorted(dict.fromkeys(files)))
    yield from _collection(source, source.path, read_tables(corpus), read_tables(queries), judgements)


def _check_task(source: Source) -> None:
    if source.config.task not in TASKS:
        raise ConfigError(
            f"data set '{source.name}': the source '{source.config.source}' serves {', '.join(TASKS)}, not "
            f"'{source.config.task}'."
        )


def _collection(source: Source, folder: Path, corpus: Rows, queries: Rows, judgements: Judgements) -> Iterator[Record]:
    documents: set[str] = set()
    for record in records_of(corpus, lambda where, row: [_document(source, where, row)]):
        if isinstance(record, Document):
            documents.add(record.doc_id)
        yield record
    yield from judgements.bad
    given: dict[str, list[tuple[float, str]]] = defaultdict(list)
    if source.config.candidates:
        yield from _read_run(folder / source.config.candidates, given)
    yield from records_of(queries, lambda where, row: [_query(source, where, row, judgements, given, documents)])


def _document(source: Source, where: str, row: Row) -> Document:
    text = whole_text(row.get("text"), row.get("title"), source.config.max_text_chars)
    identity = _identity(row, ("doc_id", "_id", "docid", "id"), where)
    return Document(doc_id=_name(source, identity), pool=source.name, text=text)


def _query(
    source: Source,
    where: str,
    row: Row,
    judgements: Judgements,
    given: dict[str, list[tuple[float, str]]],
    documents: set[str],
) -> Query:
    limit = source.config.max_text_chars
    identity = _identity(row, ("query_id", "_id", "qid", "id"), where)
    relevance = dict(judgements.relevance.get(identity, {}))
    if row.get("positives") is not None:
        relevance |= {item: 1 for item in map(str, row["positives"])}
    unknown = [item for item in relevance if _name(source, item) not in documents]
    if unknown:
        raise BadRow("unknown_document", unknown)
    options, gold = _options(row, limit)
    best: dict[str, float] = {}
    for score, item in sorted(given.get(identity, []), key=lambda pair: -pair[0]):
        best.setdefault(_name(source, item), score)
    return Query(
        query_id=_name(source, identity),
        query=_text(row, limit),
        targets=_answers(source, row, limit),
        pool=source.name,
        split_key=identity,
        split=_split(row) or judgements.split_of.get(identity),
        options=options,
        gold_option=gold,
        qrels=tuple((_name(source, item), score) for item, score in relevance.items()),
        given=tuple(best.items()),
    )


def _example(source: Source, where: str, row: Row) -> Iterator[Record]:
    limit = source.config.max_text_chars
    identity = _identity(row, ("query_id", "_id", "qid", "id"), where)
    options, gold = _options(row, limit)
    yield from example(
        source,
        identity,
        _text(row, limit),
        _answers(source, row, limit),
        None,
        split_key=identity,
        split=_split(row),
        options=options,
        gold_option=gold,
    )


def _text(row: Row, limit: int) -> str:
    return check_text(row.get("query", row.get("text")), "query", limit).strip()


def _answers(source: Source, row: Row, limit: int) -> tuple[str, ...]:
    if row.get("answers") is None and source.config.task in _WITHOUT_ANSWERS:
        return ()
    return tuple(answer.strip() for answer in check_texts(row.get("answers"), "answers", limit))


def _options(row: Row, limit: int) -> tuple[tuple[str, ...] | None, int | None]:
    """The choices and the right one's index, which the first answer names."""
    if not row.get("options"):
        return None, None
    options = tuple(option.strip() for option in check_texts(row["options"], "options", limit))
    answer = check_texts(row.get("answers"), "answers", limit)[0].strip()
    if answer not in options:
        raise BadRow("answer_not_in_options", answer)
    return options, options.index(answer)


def _split(row: Row) -> str | None:
    split = row.get("split")
    if split is not None and split not in SPLITS:
        raise BadRow("unknown_split", split)
    return split


def _identity(row: Row, names: tuple[str, ...], where: str) -> str:
    """The row's own id (numbers become text), else its place in the file."""
    return identity_of(row, names) or where


def _name(source: Source, identity: str) -> str:
    return f"{source.name}:{identity}"


def _judged_files(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*") if path.name.endswith(_JUDGEMENTS)]


def _judgements(files: list[Path]) -> Judgements:
    found = Judgements()
    for path in files:
        split = path.name.partition(".")[0]
        of_file = split if split in SPLITS else split_named(path.name)
        if path.name.endswith(_JUDGEMENTS):
            _read_lines(path, of_file, found)
        else:
            _read_rows(path, of_file, found)
    return found


def _read_lines(path: Path, split: str | None, found: Judgements) -> None:
    for number, raw in enumerate(read_lines(path), 1):
        line = raw.decode("utf-8", "replace").rstrip("\r\n")
        # Three columns hold ids with blanks in them, TREC's four are separated by any white space.
        cells = line.split("\t") if "\t" in line else line.split()
        if not line.strip() or (number == 1 and cells[-1].strip() == "score"):
            continue
        try:
            found.add(cells[0], cells[-2], int(cells[-1]), split)
        except (ValueError, IndexError):
            found.bad.append(Bad(row=f"{path.name}:{number}", reason="bad_qrels_line", excerpt=line[:160]))


def _read_rows(path: Path, split: str | None, found: Judgements) -> None:
    for where, row in read_rows(path):
        if isinstance(row, Bad):
            found.bad.append(row)
            continue
        try:
            query, document = identity_of(row, ("query-id", "query_id")), identity_of(row, ("corpus-id", "doc_id"))
            if query is None or document is None:
                raise BadRow("missing_field", "query-id or corpus-id")
            found.add(query, document, _relevance(row), split)
        except BadRow as bad:
            found.bad.append(bad.at(where))
        except (TypeError, ValueError):
            found.bad.append(Bad(row=where, reason="bad_qrels_line", excerpt=repr(row)[:160]))


def _read_run(path: Path, given: dict[str, list[tuple[float, str]]]) -> Iterator[Bad]:
    """Fills in each query's documents and scores from a TREC run; yields the lines that are none."""
    for number, raw in enumerate(read_lines(path), 1):
        cells = raw.decode("utf-8", "replace").split()
        try:
            query, document, score = cells[0], cells[2], float(cells[4])
            if not math.isfinite(score):
                raise ValueError(score)
        except (ValueError, IndexError):
            if cells:
                yield Bad(row=f"{path.name}:{number}", reason="bad_run_line", excerpt=" ".join(cells)[:160])
            continue
        given[query].append((score, document))


def _relevance(row: dict[str, Any]) -> int:
    relevance: Any = row.get("score", row.get("relevance", 1))
    return int(relevance)
