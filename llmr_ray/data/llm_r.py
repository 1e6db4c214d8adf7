"""Reader of LLM-R's published files (methods.md B.11, H.2): one task of the table from a folder that holds all of them.

    train.jsonl.gz, test.jsonl.gz   query_id "{task}_{split}_{row}", query, options ([""]: none), answers, task_name
    passages.jsonl.gz               id (a number as text), contents (input, newline, output), task_name
    bm25_train.jsonl.gz and alike   beside a query's fields doc_ids and doc_scores: candidates that are given

The answer of a multiple choice is a letter, which is resolved to the option's text, as in the passages. The passage of
a training query's own row is recognised by its contents, which begin with the query. A passage with a test query's
input is left out of the pool, unlike in the published evaluation: it holds the answer.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from llmr_ray.data.example_tasks import TASKS, ExampleTask
from llmr_ray.data.examples import POOL, gold_option, with_passages
from llmr_ray.data.records import (
    Bad,
    BadRow,
    Query,
    Record,
    Skip,
    Source,
    check_text,
    check_texts,
    read_json_lines,
)
from llmr_ray.errors import ConfigError, DataError

Row = dict[str, Any]

_NAMED = re.compile(rb'"task_name"\s*:\s*"')

Given = tuple[tuple[str, float | None], ...]
"""Candidates of a query and their scores, best first."""


def read_llm_r(source: Source) -> Iterator[Record]:
    """The queries and passages of the task that has the data set's name. Rows of other tasks do not count."""
    if source.name not in TASKS:
        raise ConfigError(
            f"the source 'llm_r' knows no task '{source.name}'. Name the data set by one of {sorted(TASKS)}."
        )
    if not source.path.is_dir():
        raise DataError(
            f"{source.path} is no folder. The source 'llm_r' reads train, test and passages.jsonl.gz in it."
        )
    task = TASKS[source.name]
    given = _given(source)
    queries: list[Query] = []
    for split in ("train", "test"):
        for where, row in _rows(source, f"{split}.jsonl.gz"):
            try:
                query = row if isinstance(row, Bad) else _query(source, task, split, row, given)
            except BadRow as bad:
                query = bad.at(where)
            if isinstance(query, Query):
                queries.append(query)
            else:
                yield query
    yield from with_passages(source.name, task.category, queries, _passages(source))


def _rows(source: Source, file: str) -> Iterator[tuple[str, Row | Bad]]:
    """The rows of a file that are of the data set's task; those that name no task are bad rows of every data set."""
    # Most lines are other tasks', and parsing them all for each of thirty tasks would take hours.
    own = f'"{source.name}"'.encode()
    for where, row in read_json_lines(source.path / file, lambda line: own in line or not _NAMED.search(line)):
        if isinstance(row, Bad):
            yield where, row
        elif not isinstance(row.get("task_name"), str):
            yield where, Bad(row=where, reason="missing_field", excerpt="task_name")
        elif row["task_name"] == source.name:
            yield where, row


def _query(source: Source, task: ExampleTask, split: str, row: Row, given: Mapping[str, Given]) -> Query | Skip:
    limit = source.config.max_text_chars
    identity = check_text(row.get("query_id"), "query_id", limit)
    if not identity.startswith(f"{source.name}_{split}_"):
        raise BadRow("bad_id", identity)
    text = check_text(row.get("query"), "query", limit)
    answers = check_texts(row.get("answers"), "answers", limit)
    choices = tuple(option for option in row.get("options") or [] if option != "")
    options, gold = None, None
    if task.kind == "labels":
        if answers[0] not in task.labels:
            raise BadRow("unknown_label", answers[0])
        options, gold = task.labels, task.labels.index(answers[0])
    elif task.kind == "choice":
        options = check_texts(list(choices), "options", limit)
        gold = gold_option(answers[0], options)
        if gold is None:
            raise BadRow("answer_not_in_options", answers[0])
        if options.count(options[gold]) > 1:
            raise BadRow("equal_options", options)
        if task.num_options and len(options) != task.num_options:
            return Skip(row=identity, reason="other_number_of_options")
        answers = (options[gold],)
    elif choices:
        raise BadRow("unreadable_options", choices)
    return Query(
        query_id=f"{source.name}:{identity}",
        query=text,
        targets=answers,
        pool=POOL,
        split_key=identity,
        split=split,
        options=options,
        gold_option=gold,
        meta={"dataset": source.name, "category": task.category},
        given=given.get(identity, ()),
    )


def _passages(source: Source) -> Iterator[tuple[str, str] | Bad]:
    """Ids and contents of the task's passages."""
    for where, row in _rows(source, "passages.jsonl.gz"):
        if isinstance(row, Bad):
            yield row
            continue
        try:
            identity = check_text(row.get("id"), "id", 100)
            if not identity.isdecimal():
                raise BadRow("bad_id", identity)
            yield _doc_id(identity), check_text(row.get("contents"), "contents", source.config.max_text_chars)
        except BadRow as bad:
            yield bad.at(where)


def _doc_id(identity: str) -> str:
    """Rows of the file are candidates of every task, so their ids do not name one."""
    return f"llm_r:{identity}"


def _given(source: Source) -> dict[str, Given]:
    """Candidates by query id from the file that the data set names, without those whose score is no number."""
    if not source.config.candidates:
        return {}
    result: dict[str, Given] = {}
    for where, row in _rows(source, source.config.candidates):
        if isinstance(row, Bad):
            raise DataError(f"{where}: {row.reason} {row.excerpt!r}. Fetch the file of candidates again.")
        ids, scores = row.get("doc_ids", []), row.get("doc_scores", [])
        if len(ids) != len(scores) or not all(isinstance(score, (int, float)) for score in scores):
            raise DataError(
                f"{source.config.candidates}, row {where}: no doc_ids with as many doc_scores. Fetch it again."
            )
        pairs = [(_doc_id(str(item)), float(score)) for item, score in zip(ids, scores, strict=True)]
        best: dict[str, float] = {}
        for doc_id, score in sorted((pair for pair in pairs if math.isfinite(pair[1])), key=lambda pair: -pair[1]):
            best.setdefault(doc_id, score)
        result[str(row.get("query_id"))] = tuple(best.items())
    return result
