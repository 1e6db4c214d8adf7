"""Reader of the user's own data: JSON lines in our field names, or a BEIR folder.

    queries.jsonl   {query_id, query, answers, positives, options, gold_option, split}; BEIR: {_id, text}
    corpus.jsonl    {doc_id, title, text}; BEIR: {_id, title, text}
    qrels/*.tsv     BEIR: query-id, corpus-id, score; the file's name (train, dev, test) is the split

Needed are a query's text, its `answers` where the task uses them (all but tool and convsearch), and a document's text.
`options` are the choices, the first of `answers` being the right one. For the task icl, a folder without a corpus gives
its training queries as examples to the pool of all tasks.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmr_ray.data.examples import example
from llmr_ray.data.records import (
    Bad,
    BadRow,
    Document,
    Query,
    Record,
    Source,
    check_text,
    check_texts,
    one_line,
    read_bytes,
    read_json_lines,
)
from llmr_ray.data.splits import SPLITS
from llmr_ray.data.text import document_text
from llmr_ray.errors import ConfigError, DataError

TASKS = ("qa", "convsearch", "icl", "tool")
_WITHOUT_ANSWERS = frozenset({"tool", "convsearch"})


def read_jsonl(source: Source) -> Iterator[Record]:
    """The rows of a folder (or, for examples, of one file of queries)."""
    task = source.config.task
    if task not in TASKS:
        raise ConfigError(f"data set '{source.name}': the source 'jsonl' serves {', '.join(TASKS)}, not '{task}'.")
    folder = source.path if source.path.is_dir() else source.path.parent
    queries = folder / "queries.jsonl" if source.path.is_dir() else source.path
    corpus = folder / "corpus.jsonl"
    as_examples = task == "icl" and not (source.path.is_dir() and corpus.exists())
    documents: set[str] = set()
    if not as_examples:
        if not corpus.exists():
            raise DataError(f"data set '{source.name}': there is no {corpus} to retrieve from.")
        for where, row in read_json_lines(corpus):
            document = row if isinstance(row, Bad) else _document(source, where, row)
            if isinstance(document, Document):
                documents.add(document.doc_id)
            yield document
    judged, split_of, bad = _beir_qrels(source, folder / "qrels")
    yield from bad
    for where, row in read_json_lines(queries):
        if isinstance(row, Bad):
            yield row
            continue
        try:
            if as_examples:
                yield from _example(source, where, row)
            else:
                yield _query(source, where, row, judged, split_of, documents)
        except BadRow as wrong:
            yield wrong.at(where)


def _document(source: Source, where: str, row: dict[str, Any]) -> Document | Bad:
    limit = source.config.max_text_chars
    try:
        text = check_text(row.get("text"), "text", limit).strip()
        title = one_line(check_text(row["title"], "title", limit)) if row.get("title") else None
        identity = _identity(row, ("doc_id", "_id", "docid", "id"), where)
    except BadRow as bad:
        return bad.at(where)
    return Document(doc_id=_name(source, identity), pool=source.name, text=document_text(title, text))


def _query(
    source: Source,
    where: str,
    row: dict[str, Any],
    judged: dict[str, dict[str, int]],
    split_of: dict[str, str],
    documents: set[str],
) -> Query:
    limit = source.config.max_text_chars
    identity = _identity(row, ("query_id", "_id", "qid", "id"), where)
    relevance = dict(judged.get(identity, {}))
    if row.get("positives") is not None:
        relevance |= {item: 1 for item in map(str, row["positives"])}
    unknown = [item for item in relevance if _name(source, item) not in documents]
    if unknown:
        raise BadRow("unknown_document", unknown)
    options, gold = _options(row, limit)
    return Query(
        query_id=_name(source, identity),
        query=_text(row, limit),
        targets=_answers(source, row, limit),
        pool=source.name,
        split_key=identity,
        split=_split(row) or split_of.get(identity),
        options=options,
        gold_option=gold,
        qrels=tuple((_name(source, item), score) for item, score in relevance.items()),
    )


def _example(source: Source, where: str, row: dict[str, Any]) -> Iterator[Record]:
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


def _text(row: dict[str, Any], limit: int) -> str:
    return check_text(row.get("query", row.get("text")), "query", limit).strip()


def _answers(source: Source, row: dict[str, Any], limit: int) -> tuple[str, ...]:
    if row.get("answers") is None and source.config.task in _WITHOUT_ANSWERS:
        return ()
    return tuple(answer.strip() for answer in check_texts(row.get("answers"), "answers", limit))


def _options(row: dict[str, Any], limit: int) -> tuple[tuple[str, ...] | None, int | None]:
    """The choices and the right one's index, which the first answer names."""
    if not row.get("options"):
        return None, None
    options = tuple(option.strip() for option in check_texts(row["options"], "options", limit))
    answer = check_texts(row.get("answers"), "answers", limit)[0].strip()
    if answer not in options:
        raise BadRow("answer_not_in_options", answer)
    return options, options.index(answer)


def _split(row: dict[str, Any]) -> str | None:
    split = row.get("split")
    if split is not None and split not in SPLITS:
        raise BadRow("unknown_split", split)
    return split


def _identity(row: dict[str, Any], names: tuple[str, ...], where: str) -> str:
    """The row's own id (numbers become text), else its place in the file."""
    value = next((row[name] for name in names if row.get(name) is not None), where)
    if isinstance(value, bool) or not isinstance(value, (str, int)) or not str(value).strip():
        raise BadRow("bad_id", value)
    return check_text(str(value), "id", 1000)


def _name(source: Source, identity: str) -> str:
    return f"{source.name}:{identity}"


def _beir_qrels(source: Source, folder: Path) -> tuple[dict[str, dict[str, int]], dict[str, str], list[Bad]]:
    """Relevance by query and document, each query's split by the file it is judged in, and the unreadable lines."""
    judged: dict[str, dict[str, int]] = {}
    split_of: dict[str, str] = {}
    bad: list[Bad] = []
    for path in sorted(folder.glob("*.tsv")):
        lines = read_bytes(path).decode("utf-8", "replace").splitlines()
        for number, line in enumerate(lines, 1):
            cells = line.split("\t")
            if not line.strip() or (number == 1 and cells[-1].strip() == "score"):
                continue
            try:
                query, document, score = cells[0], cells[-2], int(cells[-1])
            except (ValueError, IndexError):
                bad.append(Bad(row=f"{path.name}:{number}", reason="bad_qrels_line", excerpt=line[:160]))
                continue
            if score > 0:
                judged.setdefault(query, {})[document] = score
            if path.stem in SPLITS:
                split_of[query] = path.stem
    return judged, split_of, bad
