"""Training groups in the formats of other trainers: FlagEmbedding, LLM-Embedder, Tevatron, sentence-transformers.

A group's gold documents are its positives, the other documents its negatives; where a task has no gold documents, the
one with the best reward is the positive. What a format cannot hold is left out and counted.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from llmr_ray.durable import staged
from llmr_ray.errors import DataError
from llmr_ray.training.groups import CANDIDATE, GOLD

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Document:
    """A document of a group; reward: None where the group has none."""

    doc_id: str
    text: str
    reward: float | None


@dataclass(frozen=True, kw_only=True)
class TrainingRow:
    """A group as other trainers see it."""

    query_id: str
    task: str
    dataset: str
    query: str
    targets: tuple[str, ...]
    positives: tuple[Document, ...]
    negatives: tuple[Document, ...]

    @property
    def has_rewards(self) -> bool:
        """Whether its documents have rewards; all have them, or none."""
        return self.positives[0].reward is not None


def training_rows(
    groups: Iterable[pa.Table], targets: Mapping[str, Sequence[str]], left_out: Counter[str], *, needs_rewards: bool
) -> Iterator[TrainingRow]:
    """The groups that can be trained on elsewhere, in order.

    Args:
        groups: parts of the groups table.
        targets: desired outputs by query id.
        left_out: counts what is left out, by reason.
        needs_rewards: leave out documents that a rule put below all that have a reward, which no number can say.
    """
    for table in groups:
        for group in table.to_pylist():
            row = _row(group, targets, left_out, needs_rewards=needs_rewards)
            if isinstance(row, str):
                left_out[row] += 1
            else:
                yield row


def _row(
    group: Row, targets: Mapping[str, Sequence[str]], left_out: Counter[str], *, needs_rewards: bool
) -> TrainingRow | str:
    rewards = group["rewards"]
    documents = [
        (role, Document(doc_id=doc_id, text=text, reward=None if rewards is None else rewards[number]))
        for number, (doc_id, text, role) in enumerate(zip(group["doc_ids"], group["docs"], group["roles"], strict=True))
    ]
    if rewards is not None and needs_rewards:
        left_out["document_without_reward"] += sum(document.reward is None for _, document in documents)
        documents = [(role, document) for role, document in documents if document.reward is not None]
    positives = [document for role, document in documents if role == GOLD]
    scored = [document for _, document in documents if document.reward is not None]
    if not positives and scored:
        positives = [max(scored, key=lambda document: document.reward or 0.0)]
    texts = {document.text for document in positives}
    negatives = {document.text: document for role, document in reversed(documents) if role == CANDIDATE}
    negatives = {text: negatives[text] for _, document in documents if (text := document.text) in negatives}
    left_out["document_of_the_same_label"] += sum(
        role not in (GOLD, CANDIDATE) and document not in positives for role, document in documents
    )
    if not positives:
        return "group_without_positive"
    others = tuple(document for text, document in negatives.items() if text not in texts)
    if not others:
        return "group_without_negative"
    return TrainingRow(
        query_id=group["query_id"],
        task=group["task"],
        dataset=group["dataset"],
        query=group["query"],
        targets=tuple(targets.get(group["query_id"], ())),
        positives=tuple(positives),
        negatives=others,
    )


# --- rows of JSON ----------------------------------------------------------------------------------------------------


def flag_embedding_row(row: TrainingRow) -> Row:
    """FlagEmbedding's row; pos_id and neg_id are ours, its trainer passes over them."""
    found: Row = _texts(row) | {
        "pos_id": [document.doc_id for document in row.positives],
        "neg_id": [document.doc_id for document in row.negatives],
    }
    if row.has_rewards:
        found["pos_scores"] = [document.reward for document in row.positives]
        found["neg_scores"] = [document.reward for document in row.negatives]
    return found


def llm_embedder_row(row: TrainingRow) -> Row:
    """LLM-Embedder's row (methods.md H.1): scores of positives and then of negatives."""
    found: Row = _texts(row) | {"answers": list(row.targets), "task": row.task}
    if row.task == "icl":
        found["task_name"] = row.dataset
    if row.has_rewards:
        found["teacher_scores"] = [document.reward for document in (*row.positives, *row.negatives)]
    return found


def _texts(row: TrainingRow) -> Row:
    return {
        "query_id": row.query_id,
        "query": row.query,
        "pos": [document.text for document in row.positives],
        "neg": [document.text for document in row.negatives],
    }


def tevatron_row(row: TrainingRow) -> Row:
    """Tevatron's row; a title stands at the head of our texts."""

    def passages(documents: Iterable[Document]) -> list[Row]:
        return [{"docid": document.doc_id, "title": "", "text": document.text} for document in documents]

    return {
        "query_id": row.query_id,
        "query": row.query,
        "answers": list(row.targets),
        "positive_passages": passages(row.positives),
        "negative_passages": passages(row.negatives),
    }


ROW_FORMATS: dict[str, Callable[[TrainingRow], Row]] = {
    "flag_embedding": flag_embedding_row,
    "llm_embedder": llm_embedder_row,
    "tevatron": tevatron_row,
}

FILE_OF = {"llm_embedder": "{task}/{dataset}/train.json"}
"""Where rows go, if not into ``{dataset}/train.jsonl``."""


def write_rows(out: Path, form: str, rows: Iterable[TrainingRow]) -> dict[str, int]:
    """Writes JSON lines, a file for each data set; returns the number of rows of each file."""
    counts: Counter[str] = Counter()
    with ExitStack() as open_files:
        files: dict[str, BinaryIO] = {}
        for row in rows:
            name = FILE_OF.get(form, "{dataset}/train.jsonl").format(task=row.task, dataset=row.dataset)
            if name not in files:
                whole = open_files.enter_context(staged(out / name))
                files[name] = open_files.enter_context(whole.open("wb"))
            line = json.dumps(ROW_FORMATS[form](row), ensure_ascii=False, allow_nan=False)
            files[name].write(line.encode() + b"\n")
            counts[name] += 1
    return dict(counts)


# --- columns of sentence-transformers --------------------------------------------------------------------------------


def write_columns(out: Path, rows: Callable[[], Iterable[TrainingRow]], num_negatives: int) -> dict[str, int]:
    """Writes Parquet with the columns query, positive, negative_1, … and, where there are rewards, label: those of the
    positive and the negatives, in this order (what MarginMSE and KL losses of sentence-transformers take).

    A group with several positives is several rows. A file has as many negatives as its group with the fewest.

    Args:
        out: the folder.
        rows: the training rows, anew at each call.
        num_negatives: so many instead; groups with fewer are left out. 0: as many as all have.

    Returns:
        The number of rows of each file.

    Raises:
        DataError: no group has so many negatives.
    """
    fewest: dict[str, int] = {}
    for row in rows():
        if len(row.negatives) >= num_negatives:
            number = num_negatives or len(row.negatives)
            fewest[row.dataset] = min(fewest.get(row.dataset, number), number)
    if num_negatives and not fewest:
        raise DataError(f"no group has {num_negatives} negatives. Ask for fewer, or mine more candidates.")
    counts: Counter[str] = Counter()
    with ExitStack() as open_files:
        writers: dict[str, pq.ParquetWriter] = {}
        buffers: dict[str, list[Row]] = {}
        for row in rows():
            if len(row.negatives) < fewest.get(row.dataset, len(row.negatives) + 1):
                continue
            name = f"{row.dataset}/train.parquet"
            if name not in writers:
                schema = _columns(fewest[row.dataset], with_label=row.has_rewards)
                whole = open_files.enter_context(staged(out / name))
                writers[name] = open_files.enter_context(pq.ParquetWriter(whole, schema, compression="zstd"))
                buffers[name] = []
            of_row = _column_rows(row, fewest[row.dataset])
            buffers[name] += of_row
            counts[name] += len(of_row)
            if len(buffers[name]) >= 1024:
                writers[name].write_table(pa.Table.from_pylist(buffers[name], schema=writers[name].schema))
                buffers[name] = []
        for name, rest in buffers.items():
            writers[name].write_table(pa.Table.from_pylist(rest, schema=writers[name].schema))
    return dict(counts)


def _columns(num_negatives: int, *, with_label: bool) -> pa.Schema:
    names = ["query", "positive", *(f"negative_{number}" for number in range(1, num_negatives + 1))]
    label = [pa.field("label", pa.list_(pa.field("element", pa.float32())))] if with_label else []
    return pa.schema([*(pa.field(name, pa.string()) for name in names), *label])


def _column_rows(row: TrainingRow, num_negatives: int) -> list[Row]:
    negatives = row.negatives[:num_negatives]
    texts = {f"negative_{number}": document.text for number, document in enumerate(negatives, 1)}
    return [
        {
            "query": row.query,
            "positive": positive.text,
            **texts,
            "label": [document.reward for document in (positive, *negatives)],
        }
        if row.has_rewards
        else {"query": row.query, "positive": positive.text, **texts}
        for positive in row.positives
    ]
