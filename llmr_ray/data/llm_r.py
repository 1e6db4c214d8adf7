"""Reader of LLM-R's published files (methods.md B.11, H.2): one task of the table from a folder that holds all of them.

    train.jsonl.gz, test.jsonl.gz   query_id "{task}_{split}_{row}", query, options ([""]: none), answers, task_name
    passages.jsonl.gz               id (a number as text), contents (input, newline, output), task_name
    bm25_train.jsonl.gz and alike   beside a query's fields doc_ids and doc_scores: candidates that are given
    kd_bm25_train.jsonl.gz and alike   the same, with scores of the reward model: candidates and rewards that are given

What doc_scores are no file says; the setting that names it does (candidates, given_rewards). A query's rows add up,
in whichever of the files they are.

The answer of a multiple choice is a letter, which is resolved to the option's text, as in the passages. The passage of
a training query's own row is recognised by its contents, which begin with the query. A passage with a test query's
input is left out of the pool (selection.py), unlike in the published evaluation: it holds the answer.
"""

import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from llmr_ray.data.example_tasks import TASKS, ExampleTask
from llmr_ray.data.examples import POOL, gold_option, with_passages
from llmr_ray.data.judgements import Claims, Line, Lines
from llmr_ray.data.passages import is_score, scores_of, texts_of
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
    records_of,
)
from llmr_ray.errors import ConfigError, DataError

Row = dict[str, Any]

_NAMED = re.compile(rb'"task_name"\s*:\s*"')


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
    candidates = _Scored(source, [source.config.candidates] if source.config.candidates else [])
    rewards = _Scored(source, source.config.given_rewards)
    for scored in (candidates, rewards):
        yield from scored.read()
    queries: list[Query] = []
    for split in ("train", "test"):
        for where, row in _rows(source, f"{split}.jsonl.gz"):
            try:
                query = row if isinstance(row, Bad) else _query(source, task, split, row, candidates, rewards)
            except BadRow as bad:
                query = bad.at(where)
            if isinstance(query, Query):
                queries.append(query)
            else:
                yield query
    for scored in (candidates, rewards):
        yield from scored.leftovers()
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


def _query(
    source: Source, task: ExampleTask, split: str, row: Row, candidates: "_Scored", rewards: "_Scored"
) -> Query | Skip:
    limit = source.config.max_text_chars
    identity = check_text(row.get("query_id"), "query_id", limit)
    retrieved, taught = candidates.of(identity), rewards.of(identity)
    if not identity.startswith(f"{source.name}_{split}_"):
        raise BadRow("bad_id", identity)
    text = check_text(row.get("query"), "query", limit)
    answers = check_texts(row.get("answers"), "answers", limit)
    # Only [""] means none. An empty one among others keeps its place, or letters would name the texts behind it.
    choices = [] if row.get("options") == [""] else row.get("options") or []
    options, gold = None, None
    if task.kind == "labels":
        if answers[0] not in task.labels:
            raise BadRow("unknown_label", answers[0])
        options, gold = task.labels, task.labels.index(answers[0])
    elif task.kind == "choice":
        options = check_texts(choices, "options", limit)
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
        # Those with a reward alone stay in the order of the files, which is by chance: a few of them are not the best.
        given=(
            *sorted(retrieved.items(), key=lambda pair: -pair[1]),
            *((doc_id, None) for doc_id in taught if doc_id not in retrieved),
        ),
        given_rewards=tuple(taught.items()),
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


class _Scored:
    """Documents and their scores by query, from files of candidates.

    Args:
        source: the data set.
        files: names in its folder.
    """

    def __init__(self, source: Source, files: Sequence[str]) -> None:
        self.source, self.files = source, files
        self.scores: dict[str, dict[str, float]] = {}
        self._claims = Claims(())

    def read(self) -> Iterator[Record]:
        """Takes in the files; yields what is no good or left out. Of a document's scores the best counts."""
        for file in self.files:
            yield from records_of(_rows(self.source, file), self._read)
        self._claims = Claims(self.scores)

    def _read(self, where: str, row: Row) -> Iterator[Record]:
        identity = check_text(row.get("query_id"), "query_id", self.source.config.max_text_chars)
        ids = texts_of(row, "doc_ids")
        scores = scores_of(row, "doc_scores", len(ids))
        if scores is None:
            raise BadRow("missing_field", "doc_scores")
        if strange := [item for item in ids if not str(item).isdecimal()]:
            raise BadRow("bad_id", strange)
        best = self.scores.setdefault(identity, {})
        for number, (item, score) in enumerate(zip(ids, scores, strict=True)):
            doc_id = sys.intern(_doc_id(str(item)))  # one string for all queries
            if score is None or not is_score(score):
                yield Skip(row=f"{where} candidate {number}", reason="candidate_without_score")
            elif doc_id in best:
                best[doc_id] = max(best[doc_id], score)
                yield Skip(row=f"{where} candidate {number}", reason="repeated_candidate")
            else:
                best[doc_id] = score

    def of(self, identity: str) -> dict[str, float]:
        """Scores by document of a query, which is there now; they are handed over."""
        self._claims.claim(identity)
        return self.scores.pop(identity, {})

    def leftovers(self) -> Iterator[Bad]:
        """The rows of queries that did not come; DataError where these are all."""
        yield from self._claims.leftovers(self.source.name, self._lines())

    def _lines(self) -> Lines:
        for file in self.files:
            for where, row in _rows(self.source, file):
                yield where, row if isinstance(row, Bad) else Line(str(row.get("query_id")), "", 0.0)
