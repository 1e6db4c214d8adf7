"""Readers of in-context learning tasks: an input, an output, and a pool of examples shared by all tasks.

An example is input, newline, output; a query is the input alone (methods.md B.2). Options stand in no template: each is
scored as a continuation. Inputs and outputs are single lines, so that an example's last line is its output (methods.md
I.19). The rows of SAMPLES come with packages, which a data set's `path` names; any others are the user's, of whatever
task of the table, as JSON lines with the fields of its template and `label` (a number or the word), `options` and
`answer` (a number, letter or text), or `answer` alone (a text or a list), and `split` where it is fixed. Rows of a task
that is only tested, such as mnli_m, are test rows and no examples.
"""

import bz2
import csv
import io
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from llmr_ray.assets import CATALOGUE
from llmr_ray.config import DatasetConfig
from llmr_ray.data.example_tasks import TASKS, ExampleTask
from llmr_ray.data.records import (
    Bad,
    BadRow,
    Document,
    Query,
    Record,
    Skip,
    Source,
    check_split,
    check_text,
    check_texts,
    one_line,
    read_bytes,
    read_json_lines,
    records_of,
)
from llmr_ray.errors import ConfigError, DataError

POOL = "icl"
"""The pool of all tasks' examples."""

_FIELD = r"\{(\w+)\}"
_SENTENCE_END = re.compile(r"(?<=[.!?])\s")
_REVIEWS_PER_PLOT = 12  # in the corpus of Rotten Tomatoes
_OPTION = re.compile(r"^([A-Z])\.\s+(.*\S)\s*$")

Row = dict[str, Any]
Rows = Iterator[tuple[str, Row | Bad]]


def _json_rows(source: Source, file: str) -> Rows:
    return read_json_lines(source.path / file if source.path.is_dir() else source.path)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Where the rows of a task lie, and how they read where they do not have the form that its table entry expects.

    file: below the data set's folder. template: in place of the table's. fields: the template's names for the rows'
    own. answer_field: "label" or "answer", if not another. label_of: the label's number by the row's value.
    split_field: rows equal in it go to one split. names_split: rows may have a field `split`. max_words: beside the
    table's.
    """

    file: str
    rows: Callable[[Source, str], Rows] = _json_rows
    template: str = ""
    fields: dict[str, str] = field(default_factory=dict)
    answer_field: str = "answer"
    label_of: dict[Any, int] = field(default_factory=dict)
    split_field: str = "question"
    names_split: bool = False
    max_words: dict[str, int] = field(default_factory=dict)


def is_sample(name: str, dataset: DatasetConfig) -> bool:
    """Whether a data set's rows come with a sample package: a user's own rows may have the same name."""
    return name in SAMPLES and dataset.path in CATALOGUE


def read_icl(source: Source) -> Iterator[Record]:
    """The task of the table that has the data set's name: a sample's rows, or the user's own."""
    if source.name not in TASKS:
        raise ConfigError(
            f"the source 'icl' knows no task '{source.name}'. It knows {sorted(TASKS)}: give the data set one of these "
            "names, or use the source 'jsonl' for your own."
        )
    task = TASKS[source.name]
    sample = SAMPLES[source.name] if is_sample(source.name, source.config) else _own_rows(source.name, task)
    yield from records_of(sample.rows(source, sample.file), partial(_records, source, task, sample))


def _own_rows(name: str, task: ExampleTask) -> Sample:
    labels: dict[Any, int] = dict(enumerate(range(len(task.labels))))
    return Sample(
        file=f"{name}.jsonl",
        answer_field="label" if task.labels else "answer",
        label_of=labels | {label: number for number, label in enumerate(task.labels)},
        split_field=next(iter(re.findall(_FIELD, task.template))),
        names_split=True,
    )


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
    """A task's input as a query, and with its first output as an example of the shared pool.

    Of a task that is only tested there are no examples, and what names no split is tested.

    Raises:
        BadRow: no_train_split.
    """
    is_test_only = source.name in TASKS and TASKS[source.name].is_test_only
    if is_test_only and split == "train":
        raise BadRow("no_train_split", f"{source.name}: {text}")
    query_id = f"{source.name}:{row}"
    doc_id = f"{query_id}:example"
    meta = {"dataset": source.name} | ({"category": category} if category else {})
    yield Query(
        query_id=query_id,
        query=text,
        targets=outputs,
        pool=POOL,
        split_key=split_key,
        split=split or ("test" if is_test_only else None),
        options=options,
        gold_option=gold_option,
        self_doc_id=None if is_test_only else doc_id,
        meta=meta,
    )
    if not is_test_only:
        yield Document(doc_id=doc_id, pool=POOL, text=f"{text}\n{outputs[0]}", from_query=query_id, meta=meta)


def with_passages(
    dataset: str, category: str, queries: Iterable[Query], passages: Iterable[tuple[str, str] | Bad]
) -> Iterator[Record]:
    """A published pool of examples, each with the query it was made from, and then the queries, each with its own.

    Most examples were made from no query of these, and other data sets may test their inputs (mnli's those of mnli_m):
    which of them stay is decided when all are known (selection.py).

    Args:
        dataset: whose examples they are.
        category: of its task.
        queries: of all splits.
        passages: id and contents (input, newline, output), or what is no passage.
    """
    by_text: dict[str, list[Query]] = defaultdict(list)
    for query in queries:
        by_text[query.query].append(query)
    own: dict[str, str] = {}
    alike: dict[str, str] = {}
    for passage in passages:
        if isinstance(passage, Bad):
            yield passage
            continue
        doc_id, contents = passage
        made_from = _made_from(contents, by_text)
        if made_from is not None:
            is_own = contents == "\n".join((made_from.query, *made_from.targets[:1]))
            (own if is_own else alike).setdefault(made_from.query_id, doc_id)
        yield Document(
            doc_id=doc_id,
            pool=POOL,
            text=contents,
            from_query=None if made_from is None else made_from.query_id,
            is_solved=True,
            meta={"dataset": dataset, "category": category},
        )
    for query in (query for same_input in by_text.values() for query in same_input):
        yield replace(query, self_doc_id=own.get(query.query_id, alike.get(query.query_id)))


def _made_from(contents: str, queries: Mapping[str, Sequence[Query]]) -> Query | None:
    """The query whose input and output a passage holds; else the first that has its input."""
    found: list[Query] = []
    end = contents.find("\n")
    while end >= 0:
        alike = queries.get(contents[:end], ())
        for query in alike:
            if query.targets[:1] == (contents[end + 1 :],):
                return query
        found += alike
        end = contents.find("\n", end + 1)
    return next(iter(found), None)


def _records(source: Source, task: ExampleTask, sample: Sample, where: str, row: Row) -> Iterator[Record]:
    limit = source.config.max_text_chars
    template = sample.template or task.template
    fields = {
        name: one_line(check_text(row.get(sample.fields.get(name, name)), name, limit))
        for name in re.findall(_FIELD, template)
    }
    if "{question}?" in template:
        fields["question"] = fields["question"].rstrip("? ")
    if any(len(fields[name].split()) > most for name, most in {**task.max_words, **sample.max_words}.items()):
        yield Skip(row=where, reason="input_too_long")
        return
    text = template.format_map(fields)
    options, gold = None, None
    if task.kind == "labels":
        options, gold = task.labels, _label(sample, row)
        outputs: tuple[str, ...] = (options[gold],)
    elif task.kind == "free":
        outputs = tuple(map(one_line, check_texts(row.get(sample.answer_field), sample.answer_field, limit)))
    else:
        options, gold = read_options(row, limit)
        outputs = (options[gold],)
        if task.num_options and len(options) != task.num_options:
            yield Skip(row=where, reason="other_number_of_options")
            return
    if task.bad_text and any(re.search(task.bad_text, given) for given in (*fields.values(), *outputs)):
        yield Skip(row=where, reason="unwanted_text")
        return
    key = one_line(str(row.get(sample.split_field) or where)).lower()
    split = check_split(row.get("split")) if sample.names_split else None
    yield from example(
        source, where, text, outputs, task.category, split_key=key, split=split, options=options, gold_option=gold
    )


def _label(sample: Sample, row: Row) -> int:
    value = row.get(sample.answer_field)
    if value is None:
        raise BadRow("missing_field", sample.answer_field)
    # By type too: True equals 1, which is "No" where the first label is "Yes".
    found = [number for label, number in sample.label_of.items() if type(label) is type(value) and label == value]
    if not found:
        raise BadRow("unknown_label", f"{value!r} is none of {list(sample.label_of)}")
    return found[0]


def read_options(row: Row, limit: int) -> tuple[tuple[str, ...], int]:
    """Options without their letters and the index of the right one. Samples give both as "A. text", one a line."""
    if isinstance(row.get("options"), list):
        return _listed_options(row, limit)
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
    _check_distinct(texts, row["options"])
    return texts, letters.index(answer[1])


def _listed_options(row: Row, limit: int) -> tuple[tuple[str, ...], int]:
    texts = tuple(map(one_line, check_texts(row["options"], "options", limit)))
    answer, number = row.get("answer"), None
    if isinstance(answer, str):
        number = gold_option(answer, texts)
    elif type(answer) is int:  # True is no number of an option
        number = answer
    if len(texts) < 2:
        raise BadRow("unreadable_options", row["options"])
    if answer in texts and number != texts.index(answer):
        raise BadRow(
            "answer_not_in_options", f"{answer!r} is the letter of one option and the text of another: {texts}"
        )
    if number is None or not 0 <= number < len(texts):
        raise BadRow("answer_not_in_options", str(answer))
    _check_distinct(texts, row["options"])
    return texts, number


def gold_option(answer: str, options: tuple[str, ...]) -> int | None:
    """The index of the right option, given as its letter or its text; None where it is neither."""
    if len(answer) == 1 and 0 <= ord(answer) - ord("A") < len(options):
        return ord(answer) - ord("A")
    return options.index(answer) if answer in options else None


def _check_distinct(texts: tuple[str, ...], options: Any) -> None:
    if len({text.lower() for text in texts}) != len(texts):
        raise BadRow("equal_options", options)


def _boolq_rows(source: Source, file: str) -> Rows:
    """BoolQ's combined file also holds the unlabelled test set, whose rows are left out before they count."""
    for where, row in _json_rows(source, file):
        if isinstance(row, Bad) or "label" in row:
            yield where, row


def _movie_rows(source: Source) -> Iterable[tuple[int, Row]]:
    """Rotten Tomatoes: a bz2 CSV of reviews (fresh, rotten) and plots."""
    data = read_bytes(source.path)
    try:
        text = bz2.decompress(data).decode("utf-8")
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f"{source.path} ({len(data)} bytes) is not a whole bz2 file of UTF-8 text: {error}. Fetch it again."
        ) from error
    return enumerate(csv.DictReader(io.StringIO(text, newline="")), 1)


def _review_rows(source: Source, file: str) -> Rows:
    """Plots are no reviews and left out."""
    for number, row in _movie_rows(source):
        if row.get("category") != "plot":
            yield f"review-{number}", row


def _subjectivity_rows(source: Source, file: str) -> Rows:
    """First sentences of plots, which are about as long as reviews, and as many reviews."""
    for number, row in _movie_rows(source):
        if row.get("category") == "plot":
            yield f"plot-{number}", {**row, "text": _SENTENCE_END.split(row.get("text") or "", maxsplit=1)[0]}
        elif number % _REVIEWS_PER_PLOT == 0:
            yield f"review-{number}", row


def _sarcasm_rows(source: Source, file: str) -> Rows:
    """Headlines as messages of a chat: what the model is told, and what it is to judge."""
    for where, row in _json_rows(source, file):
        if isinstance(row, Bad):
            yield where, row
            continue
        messages = row.get("input")
        last = messages[-1] if isinstance(messages, list) and messages else None
        yield where, {**row, "headline": last.get("content") if isinstance(last, dict) else None}


SAMPLES: dict[str, Sample] = {
    "rotten_tomatoes": Sample(
        file="",
        rows=_review_rows,
        answer_field="category",
        label_of={"rotten": 0, "fresh": 1},
        split_field="movie_name",
    ),
    "subjectivity": Sample(
        file="",
        rows=_subjectivity_rows,
        answer_field="category",
        label_of={"plot": 0, "rotten": 1, "fresh": 1},
        split_field="movie_name",
    ),
    "sarcasm": Sample(
        file="samples.jsonl",
        rows=_sarcasm_rows,
        answer_field="ideal",
        label_of={"0": 0, "1": 1},
        split_field="headline",
    ),
    "siqa": Sample(file="SIQA/test.jsonl", split_field="passage"),
    "piqa": Sample(file="PIQA/validation.jsonl", fields={"goal": "question"}),
    "commonsenseqa": Sample(file="CommonsenseQA/validation.jsonl"),
    # The package leaves out the fact.
    "openbookqa": Sample(file="OpenBookQA/test.jsonl", template="{question}"),
    # Sentences that differ in a pronoun only share their options: one split, or the test would be in the pool.
    "disambiguation_qa": Sample(file="Bigbench/DisambiguationQA/test.jsonl", split_field="options"),
    "nq_open": Sample(file="NQ-open/combined.jsonl"),
    "mmlu": Sample(file="MMLU/test.jsonl"),
    "asdiv": Sample(file="ASDiv/test.jsonl", split_field="passage"),
    "logiqa": Sample(file="LogiQA/test.jsonl", split_field="passage"),
    "boolq": Sample(
        file="BoolQ/combined.jsonl",
        rows=_boolq_rows,
        fields={"text": "passage"},
        answer_field="label",
        label_of={False: 0, True: 1},
        split_field="passage",
        max_words={"text": 80},
    ),
    "disfl_qa": Sample(file="Bigbench/DisflQA/test.jsonl", split_field="passage"),
    "privacy_policy": Sample(file="Privacy-Policy/test.jsonl", label_of={"False": 0, "True": 1}, split_field="context"),
    "xsum": Sample(file="XSum/test.jsonl", answer_field="summary", split_field="document"),
}
