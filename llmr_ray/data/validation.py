"""Checking data files before a run: every row is read as the run would read it, and what it would reject is told.

Beside a reader's own checks a second row with an id already seen is rejected, as `prepare` does (selection.py).
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from llmr_ray.assets import resolve
from llmr_ray.config import Config, DatasetConfig
from llmr_ray.data.recognition import DataFiles, name_of, recognise
from llmr_ray.data.records import Bad, Document, Query, Record, Skip, Source, duplicate_of
from llmr_ray.data.sources import is_tokenized, reader
from llmr_ray.errors import DataError

ADVICE = {
    "missing_field": "Add the field, or read the file as another source (--source) or task (--task).",
    "nan": "NaN is no text: export the row again, with an empty field left out.",
    "not_text": "Write the field as text in quotes, or as a list of texts where several are meant.",
    "empty_text": "Fill the field, or leave the row out: nothing can be learned from an empty text.",
    "invalid_unicode": "The text holds half a character (a lone surrogate): export it again as UTF-8.",
    "too_long": "Cut the text into passages, or raise max_text_chars of the data set if it is meant to be so long.",
    "invalid_utf8": "Save the file as UTF-8.",
    "invalid_json": "The line is no whole JSON value: look for a cut line, single quotes or a trailing comma.",
    "not_an_object": "Every row is one JSON object {...}.",
    "bad_id": "An id is a text or a whole number.",
    "duplicate_id": "Two rows have this id: the first is used. Give the other an id of its own, or remove it.",
    "unknown_document": "The row names a document that the corpus lacks: add it, or correct its id or row number.",
    "unknown_query": "The line names a query that the data set lacks: correct the id, or leave the line out.",
    "other_text_of_id": "One id stands for two texts: the first is used. Give the other an id of its own.",
    "not_a_number": "Scores are a list of numbers; null stands for a candidate without one.",
    "scores_length": "There is one score for each candidate, of the positives first and then of the negatives.",
    "ids_length": "There is one id for each candidate.",
    "bad_index": "Rows of the corpus are whole numbers, from 0.",
    "bad_qrels_line": "A judgement is query, document and a whole number, separated by tabs, or TREC's four columns.",
    "bad_run_line": "A line of a run is: query Q0 document rank score tag.",
    "bad_query_line": "A line is an id and a text, separated by a tab; texts with tabs or line breaks stand in quotes.",
    "bad_corpus_line": "A line is an id and a JSON object, separated by a tab; the object stands in quotes.",
    "answer_not_in_options": "The answer is one of the options: its text, its letter or its index from 0.",
    "unreadable_options": "Options are a list of at least two texts, each another.",
    "equal_options": "Two options are the same, so the right one cannot be told. Remove one.",
    "unknown_label": "The answer is none of the task's labels (data/example_tasks.py).",
    "unknown_split": "A split is train, dev or test.",
    "no_train_split": "The task is only tested (data/example_tasks.py): its rows are test or dev, or name no split.",
    "not_a_pair": "Relevant APIs are pairs of a tool's and an API's name.",
    "no_relevant_api": "None of the relevant APIs is in the row's own api_list: correct the names.",
    "no_gold_call": "The question has no gold call. Fetch its file of possible answers again.",
    "unknown_gold_tool": "The gold call names a function that no file describes. Fetch the files again.",
}
"""What to do about each reason for which readers reject rows."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """A rejected row: file and number, and how it begins."""

    row: str
    excerpt: str | None


@dataclass(kw_only=True)
class Validated:
    """What the rows of one data set come to."""

    name: str
    source: str
    task: str
    path: str
    num_rows: int = 0
    num_documents: int = 0
    num_queries: Counter[str] = field(default_factory=Counter)
    """By split; "by hash": the data does not say."""
    num_with_answers: int = 0
    num_with_relevant: int = 0
    num_with_candidates: int = 0
    """Queries with given candidates."""
    num_with_rewards: int = 0
    """Queries with scores of a teacher."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Sound rows that are not used, by reason."""
    rejected: Counter[str] = field(default_factory=Counter)
    """Rows that are no good, by reason."""
    examples: dict[str, list[Example]] = field(default_factory=dict)
    """The first rejected rows of each reason."""

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values, with what to do about each reason."""
        # asdict() builds a Counter anew from pairs, which it would count.
        plain = {name: dict(value) if isinstance(value, Counter) else value for name, value in vars(self).items()}
        examples = {reason: [asdict(example) for example in seen] for reason, seen in self.examples.items()}
        return plain | {"examples": examples, "advice": {reason: ADVICE[reason] for reason in self.rejected}}


def sources_in(
    path: Path, *, source: str = "", task: str = "", name: str = "", tokenizer: Path, max_text_chars: int
) -> list[Source]:
    """The data sets of a file or folder: as it is told, else as they are recognised.

    Args:
        path: the file or folder.
        source, task: in place of what is recognised.
        name: of several data sets, this one alone; a single one is called so.
        tokenizer: a folder with tokenizer.json, where texts are cut by tokens.
        max_text_chars: as in a data set's settings.

    Raises:
        ConfigError: the format is not recognised and not told.
        DataError: there is no such file.
    """
    if source and task:
        if not path.exists():
            raise DataError(f"there is no {path}.")
        found = [DataFiles(name=name or name_of(path), source=source, task=task, path=path)]
    else:
        found = [replace(item, source=source or item.source, task=task or item.task) for item in recognise(path)]
    if len(found) == 1:
        found = [replace(found[0], name=name or found[0].name)]
    return [
        Source(
            name=item.name,
            config=DatasetConfig(
                task=item.task, source=item.source, path=str(item.path), max_text_chars=max_text_chars
            ),
            path=item.path,
            tokenizer=tokenizer,
        )
        for item in found
        if name in ("", item.name)
    ]


def configured_sources(config: Config, *, name: str = "") -> list[Source]:
    """The data sets of a run with its settings, such as the files of candidates and rewards that it names.

    Args:
        config: the run's.
        name: of its data sets, this one alone.

    Raises:
        ConfigError, DataError: a file that a data set names, or the LLM whose tokens cut its texts, is not there.
    """
    chosen = {key: dataset for key, dataset in config.datasets.items() if name in ("", key)}
    cache = config.runtime.cache_root
    tokenizer = resolve(config.llm.model, cache).path if any(map(is_tokenized, chosen.values())) else Path()
    places = {path: resolve(path, cache).path for path in {dataset.path for dataset in chosen.values()}}
    return [
        Source(name=key, config=dataset, path=places[dataset.path], tokenizer=tokenizer)
        for key, dataset in chosen.items()
    ]


def validate(source: Source, *, num_examples: int = 3) -> Validated:
    """Reads every row of a data set.

    Args:
        source: the data set.
        num_examples: rejected rows kept of each reason.

    Raises:
        ConfigError: the source does not serve the task.
        DataError: a file cannot be read, or there are no rows.
    """
    config = source.config
    result = Validated(name=source.name, source=config.source, task=config.task, path=str(source.path))
    _take_in(result, reader(config.source)(source), num_examples)
    if not result.num_rows:
        raise DataError(f"{source.path} holds no rows of the data set '{source.name}' (source {config.source}).")
    return result


def _take_in(result: Validated, records: Iterable[Record], num_examples: int) -> None:
    queries: set[str] = set()
    documents: set[str] = set()
    for record in records:
        result.num_rows += 1
        bad = record if isinstance(record, Bad) else None
        match record:
            case Query() if record.query_id in queries:
                bad = duplicate_of(record)
            case Query():
                queries.add(record.query_id)
                result.num_queries[record.split or "by hash"] += 1
                result.num_with_answers += bool(record.targets)
                result.num_with_relevant += bool(record.qrels)
                result.num_with_candidates += bool(record.given)
                result.num_with_rewards += bool(record.given_rewards)
            case Document() if record.doc_id in documents:
                bad = duplicate_of(record)
            case Document():
                documents.add(record.doc_id)
                result.num_documents += 1
            case Skip():
                result.left_out[record.reason] += 1
        if bad is not None:
            result.rejected[bad.reason] += 1
            seen = result.examples.setdefault(bad.reason, [])
            if len(seen) < num_examples:
                seen.append(Example(row=bad.row, excerpt=bad.excerpt))
