"""Readers of training rows as other projects exchange them (methods.md H.4): FlagEmbedding, Tevatron and DPR, KL rows.

    flag_embedding   {query, pos, neg, pos_scores?, neg_scores? or teacher_scores?, pos_id?, neg_id?, query_id?,
                     answers?}
    tevatron         {query_id, query, positive_passages, negative_passages: [{docid, title, text}], answers?}; DPR:
                     {question, answers, positive_ctxs, hard_negative_ctxs: [{passage_id, title, text}]}
    kl_rows          {query, pos: all candidates, scores: one for each, query_id?, answers?}

`path` is a file, or a folder of files that begin with train, dev or test, and perhaps of a table `corpus`, whose
documents can be found beside those of the rows. Rows of a file that names no split are split by a hash of their ids.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from llmr_ray.data.files import Row, files_of_splits, read_rows, read_tables, tables_of
from llmr_ray.data.passages import (
    Identities,
    Passage,
    Passages,
    RowQuery,
    answers_of,
    identity_of,
    query_records,
    scores_of,
    texts_of,
)
from llmr_ray.data.records import BadRow, Record, Skip, Source, records_of
from llmr_ray.errors import ConfigError

TASKS = ("qa", "convsearch", "tool")
"""Tasks with one pool of documents for all queries."""

Parts = dict[str, Any]
"""What a format says of a row, as fields of RowQuery."""


def read_flag_embedding(source: Source) -> Iterator[Record]:
    """Rows with their candidates as texts; scores of a teacher become rewards (score.feedback: given)."""
    return _read(source, _flag_embedding)


def read_tevatron(source: Source) -> Iterator[Record]:
    """Rows with their candidates as objects; negatives become given candidates."""
    return _read(source, _tevatron)


def read_kl_rows(source: Source) -> Iterator[Record]:
    """Rows of candidates none of which is labelled, with a score for each."""
    return _read(source, _kl_row)


def _read(source: Source, parts_of: Callable[[Row], Parts]) -> Iterator[Record]:
    if source.config.task not in TASKS:
        raise ConfigError(
            f"data set '{source.name}': the source '{source.config.source}' serves {', '.join(TASKS)}, whose queries "
            f"share one pool, not '{source.config.task}'."
        )
    passages, identities = Passages(source), Identities()
    for where, row in read_tables(tables_of(source.path, "corpus")):
        yield passages.corpus_row(where, row)
    for split, file in files_of_splits(source.path):
        read = partial(_records, passages, identities, split, parts_of)
        yield from records_of(read_rows(file), read)


def _records(
    passages: Passages,
    identities: Identities,
    split: str | None,
    parts_of: Callable[[Row], Parts],
    where: str,
    row: Row,
) -> Iterator[Record]:
    parts = parts_of(row)
    identity = identity_of(row, ("query_id", "qid", "_id", "id")) or where
    unique = identities.take(identity, row)
    if unique is None:
        yield Skip(row=where, reason="repeated_row")
        return
    targets = answers_of(row, ("answers", "answer"), passages.limit)
    yield from query_records(passages, where, RowQuery(identity=unique, split=split, targets=targets, **parts))


def _flag_embedding(row: Row) -> Parts:
    positives, negatives = texts_of(row, "pos"), texts_of(row, "neg")
    if not positives:
        raise BadRow("missing_field", "pos")
    rewards = scores_of(row, "teacher_scores", len(positives) + len(negatives))
    if rewards is None:
        of_positives, of_negatives = (
            scores_of(row, "pos_scores", len(positives)),
            scores_of(row, "neg_scores", len(negatives)),
        )
        if of_positives is not None and (of_negatives is not None or not negatives):
            rewards = [*of_positives, *(of_negatives or [])]
    return {
        "text": row.get("query"),
        "positives": _named(positives, row, "pos_id"),
        "negatives": _named(negatives, row, "neg_id"),
        "rewards": rewards,
    }


def _named(texts: list[Any], row: Row, name: str) -> list[Passage]:
    """Candidates with the ids that a row has for them."""
    ids = texts_of(row, name)
    if not ids:
        return [Passage(text=text) for text in texts]
    if len(ids) != len(texts):
        raise BadRow("ids_length", f"{name}: {len(ids)} for {len(texts)} candidates")
    pairs = zip(texts, ids, strict=True)
    return [Passage(text=text, identity=identity_of({name: item}, (name,))) for text, item in pairs]


def _tevatron(row: Row) -> Parts:
    positives = _objects(row, ("positive_passages", "positive_ctxs"))
    if not positives:
        raise BadRow("missing_field", "positive_passages")
    return {
        "text": row.get("query", row.get("question")),
        "positives": positives,
        "negatives": _objects(row, ("negative_passages", "hard_negative_ctxs")),
    }


def _objects(row: Row, names: tuple[str, ...]) -> list[Passage]:
    value: Any = next((row[name] for name in names if row.get(name) is not None), [])
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise BadRow("not_an_object", f"{names[0]}: {value!r}")
    return [
        Passage(
            text=item.get("text", ""),
            title=item.get("title"),
            identity=identity_of(item, ("docid", "passage_id", "psg_id", "doc_id")),
        )
        for item in value
    ]


def _kl_row(row: Row) -> Parts:
    candidates = texts_of(row, "pos")
    if not candidates:
        raise BadRow("missing_field", "pos")
    rewards = scores_of(row, "scores", len(candidates))
    if rewards is None:
        raise BadRow("missing_field", "scores")
    return {"text": row.get("query"), "negatives": [Passage(text=text) for text in candidates], "rewards": rewards}
