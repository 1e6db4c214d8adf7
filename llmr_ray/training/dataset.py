"""The training data as memory-mapped arrays: every distinct text tokenised once, before the first step.

A folder of .npy files (no pickle) and one Parquet file; it appears by rename, so it is there whole or not at all.
Legend: Q queries, P pool documents of all queries, T distinct (instruction, text) pairs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llmr_ray.durable import staged
from llmr_ray.training.groups import Pool

_CHUNK = 8192
"""Texts tokenised in one call."""

Tokenize = Callable[[Sequence[str], str, int], list[list[int]]]
"""(texts, instruction, max_tokens) -> token ids."""


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """Queries, their pools, and the tokens of all texts.

    Rows are those of the groups table. `pool_offsets` [Q + 1] and `token_offsets` [T + 1] cut the flat arrays;
    `query_text` [Q] and `pool_text` [P] are text numbers; `pool_key` [P] is equal for equal texts whatever their
    instruction; `has_rewards` [Q] says whose `pool_reward` entries mean anything.
    """

    query_ids: list[str]
    tasks: list[str]
    datasets: list[str]
    tokens: np.ndarray
    token_offsets: np.ndarray
    query_text: np.ndarray
    pool_offsets: np.ndarray
    pool_text: np.ndarray
    pool_key: np.ndarray
    pool_gold: np.ndarray
    pool_reward: np.ndarray
    has_rewards: np.ndarray

    def pool(self, row: int) -> Pool:
        """The pool of a query, M documents."""
        part = self._part(row)
        rewards = np.asarray(self.pool_reward[part]) if self.has_rewards[row] else None
        return Pool(keys=np.asarray(self.pool_key[part]), is_gold=np.asarray(self.pool_gold[part]), rewards=rewards)

    def pool_texts(self, row: int) -> np.ndarray:
        """Text numbers of a query's pool: int64 [M]."""
        return np.asarray(self.pool_text[self._part(row)])

    def text(self, number: int) -> np.ndarray:
        """Token ids of a text."""
        return self.tokens[int(self.token_offsets[number]) : int(self.token_offsets[number + 1])]

    def names(self, what: str) -> list[str]:
        """The data set or the task of each row; `what` is dataset or task."""
        return self.tasks if what == "task" else self.datasets

    def rows_by(self, what: str) -> dict[str, np.ndarray]:
        """Row numbers of each data set or of each task."""
        names = np.asarray(self.names(what), dtype=object)
        return {name: np.flatnonzero(names == name) for name in sorted(set(self.names(what)))}

    def _part(self, row: int) -> slice:
        return slice(int(self.pool_offsets[row]), int(self.pool_offsets[row + 1]))


_ARRAYS = (
    "tokens",
    "token_offsets",
    "query_text",
    "pool_offsets",
    "pool_text",
    "pool_key",
    "pool_gold",
    "pool_reward",
    "has_rewards",
)


class _Numbers:
    """Numbers values by first occurrence."""

    def __init__(self) -> None:
        self.of: dict[tuple[str, ...], int] = {}

    def __call__(self, *value: str) -> int:
        return self.of.setdefault(value, len(self.of))


def write_training_data(
    groups: pa.Table,
    folder: Path,
    *,
    tokenize: Tokenize,
    instructions: Mapping[str, tuple[str, str]],
    max_query_tokens: int,
    max_document_tokens: int,
) -> None:
    """Tokenises the groups table into `folder`, unless it is there.

    Args:
        groups: a conforming groups table.
        folder: made by rename.
        tokenize: the embedder's.
        instructions: of query and document by task.
        max_query_tokens: longer queries are cut.
        max_document_tokens: longer documents are cut.
    """
    if folder.exists():
        return
    texts, keys = _Numbers(), _Numbers()
    query_text, pool_text, pool_key, sizes = list[int](), list[int](), list[int](), [0]
    pool_gold, pool_reward, has_rewards = list[bool](), list[float](), list[bool]()
    for batch in groups.to_batches(max_chunksize=_CHUNK):
        for row in batch.to_pylist():
            query_text.append(texts("query", row["task"], row["query"]))
            pool_text += [texts("document", row["task"], doc) for doc in row["docs"]]
            pool_key += [keys(doc) for doc in row["docs"]]
            pool_gold += [role == "gold" for role in row["roles"]]
            pool_reward += row["rewards"] if row["rewards"] is not None else [0.0] * len(row["docs"])
            has_rewards.append(row["rewards"] is not None)
            sizes.append(len(row["docs"]))
    tokens, lengths = _tokenize_all(
        list(texts.of), tokenize, instructions, {"query": max_query_tokens, "document": max_document_tokens}
    )
    arrays = {
        "tokens": tokens,
        "token_offsets": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        "query_text": np.asarray(query_text, dtype=np.int64),
        "pool_offsets": np.cumsum(sizes).astype(np.int64),
        "pool_text": np.asarray(pool_text, dtype=np.int64),
        "pool_key": np.asarray(pool_key, dtype=np.int64),
        "pool_gold": np.asarray(pool_gold, dtype=bool),
        "pool_reward": np.asarray(pool_reward, dtype=np.float32),
        "has_rewards": np.asarray(has_rewards, dtype=bool),
    }
    with staged(folder) as staging:
        staging.mkdir()
        for name in _ARRAYS:
            np.save(staging / f"{name}.npy", arrays[name], allow_pickle=False)
        pq.write_table(groups.select(["query_id", "task", "dataset"]), staging / "rows.parquet")


def read_training_data(folder: Path) -> TrainingData:
    """Opens what `write_training_data` wrote; arrays stay on disk and are mapped."""
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in _ARRAYS}
    rows = pq.read_table(folder / "rows.parquet")
    return TrainingData(
        query_ids=rows["query_id"].to_pylist(),
        tasks=rows["task"].to_pylist(),
        datasets=rows["dataset"].to_pylist(),
        **arrays,
    )


def _tokenize_all(
    texts: list[tuple[str, ...]],
    tokenize: Tokenize,
    instructions: Mapping[str, tuple[str, str]],
    limits: Mapping[str, int],
) -> tuple[np.ndarray, np.ndarray]:
    """Flat int32 tokens of all texts in their order, and the length of each."""
    kinds: dict[tuple[str, str], list[int]] = {}
    for number, (side, task, _) in enumerate(texts):
        kinds.setdefault((side, task), []).append(number)
    found: list[np.ndarray] = [np.zeros(0, np.int32)] * len(texts)
    for (side, task), numbers in kinds.items():
        instruction = instructions[task][0 if side == "query" else 1]
        for start in range(0, len(numbers), _CHUNK):
            chunk = numbers[start : start + _CHUNK]
            for number, ids in zip(
                chunk, tokenize([texts[n][2] for n in chunk], instruction, limits[side]), strict=True
            ):
                found[number] = np.asarray(ids, dtype=np.int32)
    lengths = np.asarray([len(ids) for ids in found], dtype=np.int64)
    return (np.concatenate(found) if found else np.zeros(0, np.int32)), lengths
