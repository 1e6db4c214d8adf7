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

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llmr_ray.data.examples import example
from llmr_ray.data.files import Row, Rows, read_tables, tables_in, tables_of
from llmr_ray.data.judgements import Judgements, Run, judged_files
from llmr_ray.data.passages import identity_of, whole_text
from llmr_ray.data.records import (
    BadRow,
    Document,
    Query,
    Record,
    Source,
    check_split,
    check_text,
    check_texts,
    read_json_lines,
    records_of,
)
from llmr_ray.errors import ConfigError, DataError

TASKS = ("qa", "convsearch", "icl", "tool")
_WITHOUT_ANSWERS = frozenset({"tool", "convsearch"})


@dataclass(kw_only=True)
class Beside:
    """What stands beside the queries: the ids of documents, judgements and given candidates."""

    documents: set[str]
    judgements: Judgements
    run: Run


def read_jsonl(source: Source) -> Iterator[Record]:
    """The rows of a folder (or, for examples, of one file of queries)."""
    _check_task(source)
    folder = source.path if source.path.is_dir() else source.path.parent
    queries = folder / "queries.jsonl" if source.path.is_dir() else source.path
    corpus = folder / "corpus.jsonl"
    if source.config.task == "icl" and not (source.path.is_dir() and corpus.exists()):
        yield from records_of(read_json_lines(queries), lambda where, row: _example(source, where, row))
        return
    if not corpus.exists() and not source.config.pool:
        raise DataError(
            f"data set '{source.name}': there is no {corpus} to retrieve from. Where its queries search the passages "
            "of other data sets, give them all one name as datasets.*.pool."
        )
    documents = read_json_lines(corpus) if corpus.exists() else iter(())
    judgements = Judgements(sorted(judged_files(folder / "qrels")))
    yield from _collection(source, folder, documents, read_json_lines(queries), judgements)


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
    files = judged_files(source.path / "qrels")
    for name in ("qrels", "default", "data"):
        files += tables_in(source.path / name) or tables_of(source.path, name)
    judgements = Judgements(sorted(dict.fromkeys(files)))
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
    candidates = folder / source.config.candidates if source.config.candidates else None
    run = Run(candidates, lambda document: _name(source, document) in documents)
    yield from run.read(source.name)
    beside = Beside(documents=documents, judgements=judgements, run=run)
    yield from records_of(queries, lambda where, row: [_query(source, where, row, beside)])
    yield from judgements.leftovers(source.name)
    yield from run.leftovers(source.name)


def _document(source: Source, where: str, row: Row) -> Document:
    text = whole_text(row.get("text"), row.get("title"), source.config.max_text_chars)
    identity = _identity(row, ("doc_id", "_id", "docid", "id"), where)
    # An example is told from another task's by the data set that it names.
    meta = {"dataset": source.name} if source.config.task == "icl" else None
    return Document(doc_id=_name(source, identity), pool=source.name, text=text, meta=meta, row=where)


def _query(source: Source, where: str, row: Row, beside: Beside) -> Query:
    limit = source.config.max_text_chars
    identity = _identity(row, ("query_id", "_id", "qid", "id"), where)
    relevance, given = beside.judgements.of(identity), beside.run.of(identity)
    if row.get("positives") is not None:
        relevance |= {item: 1 for item in map(str, row["positives"])}
    unknown = [item for item in relevance if _name(source, item) not in beside.documents]
    if unknown:
        raise BadRow("unknown_document", unknown)
    options, gold = _options(row, limit)
    return Query(
        query_id=_name(source, identity),
        query=_text(row, limit),
        targets=_answers(source, row, limit),
        pool=source.name,
        split_key=identity,
        split=check_split(row.get("split")) or beside.judgements.split_of.get(identity),
        options=options,
        gold_option=gold,
        qrels=tuple((_name(source, item), score) for item, score in relevance.items()),
        given=tuple((_name(source, item), score) for item, score in given.items()),
        row=where,
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
        split=check_split(row.get("split")),
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


def _identity(row: Row, names: tuple[str, ...], where: str) -> str:
    """The row's own id (numbers become text), else its place in the file."""
    return identity_of(row, names) or where


def _name(source: Source, identity: str) -> str:
    return f"{source.name}:{identity}"
