"""Reader of LLM-Embedder's published archive (methods.md H.1): its folders ``{task}/{dataset}`` and every task's rows.

`path` is the archive, one folder of it, or a file of rows. In the archive the data set's name says which folder:
msmarco, nq, mmlu or popqa (qa), qrecc (convsearch), msc (chat), books3, arxiv, codeparrot or pg19 (lrlm), toolbench
(tool); of icl the name is a task's (data/example_tasks.py), as for LLM-R's files. MMLU and PopQA retrieve from the
corpora of msmarco and nq, for which `path` must hold these too; QReCC's corpus is a download of its own, to be put
beside its rows as ``corpus.json`` or Parquet.

    qa, convsearch, tool   rows of training with pos, neg, teacher_scores, of evaluation with pos_index, over a corpus
    chat                   rows with a history, whose turns are the row's own pool
    lrlm                   rows of training with chunks (pos, neg), the row's own pool; of evaluation a whole text
    icl                    rows over the union of all tasks' examples, {contents, task_name}
"""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from llmr_ray.data.example_tasks import TASKS, ExampleTask
from llmr_ray.data.examples import POOL, gold_option, with_passages
from llmr_ray.data.files import Row, Rows, files_of_splits, has_splits, read_rows, read_tables, tables_of
from llmr_ray.data.memory import text_records, text_tokenizer
from llmr_ray.data.passages import (
    Identities,
    Passage,
    Passages,
    RowQuery,
    answers_of,
    identity_of,
    is_score,
    query_records,
    scores_of,
    text_id,
    texts_of,
)
from llmr_ray.data.records import Bad, BadRow, Document, Query, Record, Skip, Source, check_text, records_of
from llmr_ray.errors import ConfigError, DataError

FOLDERS = {
    "qa": ("qa",),
    "convsearch": ("convsearch", "conversation"),
    "chat": ("chat",),
    "lrlm": ("lrlm",),
    "icl": ("icl",),
    "tool": ("tool",),
}
"""Of each task, what its folder of the archive is called; documentation and archive differ for convsearch."""

BORROWED = {"mmlu": "msmarco", "popqa": "nq"}
"""Data sets that retrieve from another one's corpus."""

_ANSWERS = ("answers", "possible_answers")


def read_llm_embedder(source: Source) -> Iterator[Record]:
    """The rows of the data set's task; ids carry the split, because every file counts its rows from the same number."""
    task = source.config.task
    if task == "icl":
        return _examples(source)
    return _memories(source) if task in ("chat", "lrlm") else _knowledge(source)


# --- where the rows are ----------------------------------------------------------------------------------------------


def folder_of(source: Source) -> Path:
    """The folder of the data set's rows; DataError says where they were looked for."""
    path = source.path
    if path.is_file():
        return path.parent
    inner = "icl" if source.config.task == "icl" else source.name
    places = [path, path / inner, *(path / folder / inner for folder in FOLDERS[source.config.task])]
    for place in places:
        if has_splits(place):
            return place
    raise DataError(
        f"data set '{source.name}': no train, dev or test file in {', '.join(map(str, places))}. `path` is the "
        f"folder of LLM-Embedder's archive, and the data set is called like its folder there."
    )


def _files(source: Source) -> list[tuple[str | None, Path]]:
    """Files of rows by split. QReCC has dialogues in several forms: the concatenated one is what is searched with."""
    if source.path.is_file():
        return files_of_splits(source.path)
    found = files_of_splits(folder_of(source))
    concatenated = {split for split, file in found if ".concat." in file.name}
    return [(split, file) for split, file in found if split not in concatenated or ".concat." in file.name]


def _corpus(source: Source, folder: Path) -> Rows:
    files = tables_of(folder, "corpus")
    if not files and source.name in BORROWED:
        # Only below `path`: what lies elsewhere is no part of the data set's fingerprint.
        lender = folder.parent / BORROWED[source.name]
        files = tables_of(lender, "corpus") if lender.is_relative_to(source.path) else []
        if not files:
            raise DataError(
                f"data set '{source.name}' retrieves from the corpus of {BORROWED[source.name]}, which {source.path} "
                "does not hold. Name the whole archive, or its folder qa, as `path`."
            )
    return read_tables(files)


def _identity(row: Row, where: str, split: str | None) -> str:
    identity = identity_of(row, ("query_id", "qid")) or where
    return f"{split}:{identity}" if split else identity


def _each_row(source: Source, read: Callable[[str, str | None, str, Row], Iterator[Record]]) -> Iterator[Record]:
    """What `read` makes of each row, given its place, split, id and content; exact repetitions are skipped."""
    identities = Identities()

    def read_once(split: str | None, where: str, row: Row) -> Iterator[Record]:
        unique = identities.take(_identity(row, where, split), row)
        if unique is None:
            yield Skip(row=where, reason="repeated_row")
        else:
            yield from read(where, split, unique, row)

    for split, file in _files(source):
        yield from records_of(read_rows(file), partial(read_once, split))


# --- qa, convsearch, tool --------------------------------------------------------------------------------------------


def _knowledge(source: Source) -> Iterator[Record]:
    passages = Passages(source)
    for where, row in _corpus(source, folder_of(source)):
        yield passages.corpus_row(where, row)

    def read(where: str, split: str | None, identity: str, row: Row) -> Iterator[Record]:
        options, gold, targets = _choices(row, passages.limit)
        fields = {name: row[name] for name in ("subject", "prop_id", "obj") if row.get(name) is not None}
        positives, negatives = _side(row, "pos"), _side(row, "neg")
        yield from query_records(
            passages,
            where,
            RowQuery(
                identity=identity,
                split=split,
                text=row.get("query"),
                targets=targets,
                positives=positives,
                negatives=negatives,
                rewards=scores_of(row, "teacher_scores", len(positives) + len(negatives)),
                fields={"options": options, "gold_option": gold, "meta": fields or None},
            ),
        )

    yield from _each_row(source, read)
    if not len(passages):
        raise DataError(f"data set '{source.name}' has neither a corpus nor rows with texts: nothing can be retrieved.")


def _side(row: Row, side: str) -> list[Passage]:
    """The candidates of one side: texts with their rows in the corpus, or these alone."""
    texts, rows = texts_of(row, side), row.get(f"{side}_index")
    listed = rows if isinstance(rows, list) else [] if rows is None else [rows]
    try:
        numbers = [int(number) for number in listed]
    except (TypeError, ValueError) as error:
        raise BadRow("bad_index", f"{side}_index: {rows!r}") from error
    if not texts:
        return [Passage(row=number) for number in numbers]
    # Without as many numbers as texts, nothing says which belong together.
    matching: list[int | None] = [*numbers] if len(numbers) == len(texts) else [None] * len(texts)
    return [Passage(text=text, row=number) for text, number in zip(texts, matching, strict=True)]


def _choices(row: Row, limit: int) -> tuple[tuple[str, ...] | None, int | None, tuple[str, ...]]:
    """Options, the right one and the desired outputs: MMLU's choices, PopQA's list in a text, or plain answers."""
    if row.get("choices") is None:
        listed = row.get("possible_answers")
        if isinstance(listed, str) and listed.lstrip().startswith("["):
            try:
                row = row | {"possible_answers": json.loads(listed)}
            except json.JSONDecodeError as error:
                raise BadRow("invalid_json", f"possible_answers: {listed}") from error
        return None, None, answers_of(row, _ANSWERS, limit)
    options = tuple(check_text(str(choice), "choices", limit).strip() for choice in texts_of(row, "choices"))
    answer = row.get("answer", row.get("answers"))
    gold = _option_number(answer, options)
    if gold is None:
        raise BadRow("answer_not_in_options", answer)
    return options, gold, (options[gold],)


def _option_number(answer: Any, options: tuple[str, ...]) -> int | None:
    """The right option's index, which is given as a number, a number in a text, a letter or the text."""
    value = answer[0] if isinstance(answer, list) and answer else answer
    if isinstance(value, str) and value.strip().isdecimal():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value if 0 <= value < len(options) else None
    return gold_option(value.strip(), options) if isinstance(value, str) else None


# --- chat, lrlm ------------------------------------------------------------------------------------------------------


def _memories(source: Source) -> Iterator[Record]:
    tokenizer = None

    def read(where: str, split: str | None, identity: str, row: Row) -> Iterator[Record]:
        nonlocal tokenizer
        if row.get("text") is not None and row.get("query") is None:
            text = check_text(row["text"], "text", max(source.config.max_text_chars, len(str(row["text"]))))
            tokenizer = tokenizer or text_tokenizer(source)
            yield from text_records(source, tokenizer, identity, text, split)
        else:
            yield from _memory(source, where, split, identity, row)

    yield from _each_row(source, read)


def _memory(source: Source, where: str, split: str | None, identity: str, row: Row) -> Iterator[Record]:
    """A row whose candidates are its own pool, in their order: a history, or the chunks of pos and then of neg.

    Blank entries, which the data is padded with, and those without a score of the teacher are left out.
    """
    limit = source.config.max_text_chars
    query = check_text(row.get("query"), "query", limit).strip()
    history = texts_of(row, "history")
    positives = [] if history else texts_of(row, "pos")
    texts = history or [*positives, *texts_of(row, "neg")]
    rewards = scores_of(row, "teacher_scores", len(texts))
    targets = answers_of(row, _ANSWERS, limit)
    pool = f"{source.name}:{identity}"
    documents: list[Document] = []
    relevant: list[str] = []
    teacher: list[tuple[str, float]] = []
    for number, text in enumerate(texts):
        name = f"{where} candidate {number}"
        reward = rewards[number] if rewards is not None else None
        if rewards is not None and not is_score(reward):
            yield Skip(row=name, reason="candidate_without_score")
            continue
        try:
            body = check_text(text, "candidate", limit).strip()
        except BadRow as bad:
            yield Skip(row=name, reason="blank_candidate") if bad.reason == "empty_text" else bad.at(name)
            continue
        document = Document(doc_id=f"{pool}:{number}", pool=pool, text=body, position=len(documents))
        documents.append(document)
        if number < len(positives):
            relevant.append(document.doc_id)
        if reward is not None:
            teacher.append((document.doc_id, reward))
    if not documents:
        yield Skip(row=where, reason="no_candidates")
        return
    yield from documents
    context = row.get("context")
    yield Query(
        query_id=pool,
        query=query,
        targets=targets,
        context=check_text(context, "context", limit) if isinstance(context, str) and context.strip() else None,
        pool=pool,
        split_key=identity,
        split=split,
        history_end=len(documents),
        qrels=tuple((doc_id, 1) for doc_id in relevant),
        given=tuple((document.doc_id, None) for document in documents if document.doc_id not in relevant),
        given_rewards=tuple(teacher),
    )


# --- icl -------------------------------------------------------------------------------------------------------------


def _examples(source: Source) -> Iterator[Record]:
    """The task that has the data set's name. Training rows name no task: it is that of their first positive."""
    if source.name not in TASKS:
        raise ConfigError(
            f"the source 'llm_embedder' knows no task '{source.name}' of icl. Name the data set by one of "
            f"{sorted(TASKS)}."
        )
    task, passages = TASKS[source.name], _IclPassages(source)
    yield from passages.read(_corpus(source, folder_of(source)))
    queries: list[Query] = []

    def read(where: str, split: str | None, identity: str, row: Row) -> Iterator[Record]:
        if passages.owns(row):
            query, fate = _example_query(source, task, passages, where, split, identity, row)
            queries.append(query)
            yield from fate

    yield from _each_row(source, read)
    yield from with_passages(source.name, task.category, queries, passages.own.items())


class _IclPassages:
    """The examples of all tasks: ids are made of texts, so that rows can name those of other data sets."""

    def __init__(self, source: Source) -> None:
        self.name, self.limit = source.name, source.config.max_text_chars
        self.own: dict[str, str] = {}

    def read(self, corpus: Rows) -> Iterator[Record]:
        """Takes in the corpus; a text that another task's example had before counts as that one's."""
        seen: set[int] = set()
        for where, row in corpus:
            if isinstance(row, Bad):
                yield row
                continue
            try:
                is_own = _task_name(row) == self.name
                contents = check_text(row.get("contents", row.get("text")), "contents", self.limit)
            except BadRow as bad:
                yield bad.at(where)
                continue
            number = int(text_id(contents), 16)
            if not is_own or number not in seen:
                if is_own:
                    self.own[self.doc_id(contents)] = contents
            else:
                yield Skip(row=where, reason="repeated_text")
            seen.add(number)

    def owns(self, row: Row) -> bool:
        """Whether a row is of the data set's task."""
        if row.get("task_name") is not None:
            return _task_name(row) == self.name
        first = next(iter(texts_of(row, "pos")), None)
        return isinstance(first, str) and self.doc_id(first) in self.own

    def doc_id(self, contents: str) -> str:
        """The id of an example of any task."""
        return f"llm_embedder:{text_id(contents)}"


def _task_name(row: Row) -> str:
    name = row.get("task_name")
    if not isinstance(name, str):
        raise BadRow("missing_field", "task_name")
    return name


def _example_query(
    source: Source, task: ExampleTask, passages: _IclPassages, where: str, split: str | None, identity: str, row: Row
) -> tuple[Query, list[Record]]:
    """A row's query, whose candidates are all given ones, and what of them was left out."""
    limit = passages.limit
    positives, negatives = texts_of(row, "pos"), texts_of(row, "neg")
    rewards = scores_of(row, "teacher_scores", len(positives) + len(negatives))
    fate: list[Record] = []
    candidates: dict[str, float | None] = {}
    for number, text in enumerate([*positives, *negatives]):
        name = f"{where} candidate {number}"
        reward = rewards[number] if rewards is not None else None
        if rewards is not None and not is_score(reward):
            fate.append(Skip(row=name, reason="candidate_without_score"))
            continue
        try:
            doc_id = passages.doc_id(check_text(text, "candidate", limit))
        except BadRow as bad:
            fate.append(bad.at(name))
            continue
        if doc_id in candidates:
            fate.append(Skip(row=name, reason="repeated_candidate"))
        else:
            candidates[doc_id] = reward
    options, gold, targets = _outputs(task, row, limit)
    query = Query(
        query_id=f"{source.name}:{identity}",
        query=check_text(row.get("query"), "query", limit),
        targets=targets,
        pool=POOL,
        split_key=identity,
        split=split,
        options=options,
        gold_option=gold,
        given=tuple((doc_id, None) for doc_id in candidates),
        given_rewards=tuple((doc_id, reward) for doc_id, reward in candidates.items() if reward is not None),
        meta={"dataset": source.name, "category": task.category},
    )
    return query, fate


def _outputs(task: ExampleTask, row: Row, limit: int) -> tuple[tuple[str, ...] | None, int | None, tuple[str, ...]]:
    """Options, the right one and desired outputs; of rows with options the answer is the index of the right one."""
    choices = [choice for choice in texts_of(row, "options") if choice != ""]
    if choices and task.metric in ("accuracy", "F1"):
        options = tuple(check_text(str(choice), "options", limit).strip() for choice in choices)
        answers = row.get("answers")
        gold = _option_number(answers, options)
        if gold is None:
            raise BadRow("answer_not_in_options", answers)
        return options, gold, (options[gold],)
    targets = answers_of(row, _ANSWERS, limit)
    if task.labels and targets and targets[0] in task.labels:
        return task.labels, task.labels.index(targets[0]), targets[:1]
    return None, None, targets
