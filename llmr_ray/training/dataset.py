"""The training data as memory-mapped arrays: all texts tokenised once, shard by shard, before the first step.

Each shard of the groups becomes a folder of .npy files (no pickle) and one Parquet file. It appears by rename, so it is
there whole or not at all, and it depends on no other shard: as many can be made at once as there are processes, each in
the memory of one shard, and a kill costs those at work. A text is stored once in every shard in which it occurs; what
texts are compared by is a key, which is equal for equal texts wherever they stand.

Legend: Q queries, P pool documents of all queries, T distinct (side, task, text) of a shard, M documents of a pool.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llmr_ray.durable import staged
from llmr_ray.training.groups import GOLD, SAME_LABEL, Pool, pool_rewards

_CHUNK_ROWS = 256
"""Rows of the groups turned into Python objects at once."""
_CHUNK_TEXTS = 1024
"""Texts tokenised in one call; the tokenizer holds some hundred bytes for each of their tokens."""

_QUERY = np.dtype([("text", "<i8"), ("start", "<i8"), ("end", "<i8"), ("has_rewards", "?")])
_DOCUMENT = np.dtype(
    [("text", "<i8"), ("key", "<i8"), ("reward", "<f4"), ("weight", "<f4"), ("is_gold", "?"), ("is_barred", "?")]
)
_TEXT = np.dtype([("key", "<i8"), ("start", "<i8"), ("end", "<i8")])

Tokenize = Callable[[Sequence[str], str, int], list[list[int]]]
"""(texts, instruction, max_tokens) -> token ids."""


def text_key(*parts: str) -> int:
    """A signed 64-bit hash: what texts are compared by.

    Keys are compared only among the C texts of one batch, of which two different ones share a key with probability
    C^2 / 2^65: 3e-11 for 32,768 texts, 3e-5 over a million such steps, however many texts the data set has. It would
    cost that step a negative, or one text would be encoded as the other.
    """
    return int.from_bytes(blake2b("\0".join(parts).encode(), digest_size=8).digest(), "little", signed=True)


@dataclass(frozen=True, kw_only=True)
class Shard:
    """The arrays of a shard, each a file.

    queries [Q]: number of the query's text, `start` and `end` of its pool, and whether the rewards there mean anything.
    pool [P]: number of the document's text as it is encoded, key of the document alone (equal whatever the task),
    reward, its weight, is_gold, is_barred. texts [T]: key of (side, task, text), `start` and `end` of its tokens.
    tokens: int32, flat.
    """

    queries: np.ndarray
    pool: np.ndarray
    texts: np.ndarray
    tokens: np.ndarray


# --- writing ---------------------------------------------------------------------------------------------------------


def write_shard(
    groups: pa.Table,
    folder: Path,
    *,
    tokenize: Tokenize,
    instructions: Mapping[str, tuple[str, str]],
    max_query_tokens: int,
    max_document_tokens: int,
) -> None:
    """Tokenises one shard of the groups into `folder`; a pure function of its arguments.

    Args:
        groups: a conforming groups table.
        folder: made by rename; one that stands there is replaced.
        tokenize: the embedder's.
        instructions: of query and document by task.
        max_query_tokens: longer queries are cut.
        max_document_tokens: longer documents are cut.
    """
    numbers: dict[tuple[str, str, str], int] = {}
    queries, pool = list[tuple[int, int, int, bool]](), list[tuple[int, int, float, float, bool, bool]]()

    def number(side: str, task: str, text: str) -> int:
        return numbers.setdefault((side, task, text), len(numbers))

    for batch in groups.to_batches(max_chunksize=_CHUNK_ROWS):
        for row in batch.to_pylist():
            task, docs, has_rewards = row["task"], row["docs"], row["rewards"] is not None
            query = number("query", task, row["query"])
            queries.append((query, len(pool), len(pool) + len(docs), has_rewards))
            rewards = pool_rewards(row["rewards"]).tolist() if has_rewards else [0.0] * len(docs)
            weights = row["weights"] or [1.0] * len(docs)
            pool += [
                (number("document", task, doc), text_key(doc), reward, weight, role == GOLD, role == SAME_LABEL)
                for doc, reward, weight, role in zip(docs, rewards, weights, row["roles"], strict=True)
            ]
    limits = {"query": max_query_tokens, "document": max_document_tokens}
    tokens, length_T = _tokenize_all(list(numbers), tokenize, instructions, limits)
    texts = np.empty(len(numbers), dtype=_TEXT)
    texts["key"] = [text_key(*text) for text in numbers]
    texts["end"] = np.cumsum(length_T)
    texts["start"] = texts["end"] - length_T
    shard = Shard(queries=np.array(queries, _QUERY), pool=np.array(pool, _DOCUMENT), texts=texts, tokens=tokens)
    with staged(folder) as staging:
        staging.mkdir()
        for item in fields(Shard):
            np.save(staging / f"{item.name}.npy", getattr(shard, item.name), allow_pickle=False)
        pq.write_table(groups.select(["query_id", "task", "dataset"]), staging / "rows.parquet")


def _tokenize_all(
    texts: list[tuple[str, str, str]],
    tokenize: Tokenize,
    instructions: Mapping[str, tuple[str, str]],
    limits: Mapping[str, int],
) -> tuple[np.ndarray, np.ndarray]:
    """Flat int32 tokens of all (side, task, text) in their order, and the length of each."""
    kinds: dict[tuple[str, str], list[int]] = {}
    for number, (side, task, _) in enumerate(texts):
        kinds.setdefault((side, task), []).append(number)
    found: list[np.ndarray] = [np.zeros(0, np.int32)] * len(texts)
    for (side, task), numbers in kinds.items():
        instruction = instructions[task][0 if side == "query" else 1]
        for start in range(0, len(numbers), _CHUNK_TEXTS):
            chunk = numbers[start : start + _CHUNK_TEXTS]
            for number, ids in zip(
                chunk, tokenize([texts[n][2] for n in chunk], instruction, limits[side]), strict=True
            ):
                found[number] = np.asarray(ids, dtype=np.int32)
    lengths = np.asarray([len(ids) for ids in found], dtype=np.int64)
    return (np.concatenate(found) if found else np.zeros(0, np.int32)), lengths


# --- reading ---------------------------------------------------------------------------------------------------------


class TrainingData:
    """Queries, their pools, and the tokens of all texts.

    Rows are those of the groups table, shard after shard. Texts are numbered shard after shard too, so that a text of
    several shards has several numbers, but one key. Held in memory are the query's id, task and data set of each row
    (16 bytes and the id); all else is mapped, and read where it is asked for.

    Args:
        rows: columns query_id, task, dataset of all rows; the last two as dictionaries.
        shards: at least one.
    """

    def __init__(self, rows: pa.Table, shards: Sequence[Shard]) -> None:
        self._shards = shards
        self._row_starts = list(accumulate((len(shard.queries) for shard in shards), initial=0))
        self._text_starts = list(accumulate((len(shard.texts) for shard in shards), initial=0))
        self._query_ids = rows["query_id"].cast(pa.large_string()).combine_chunks()
        self._columns = {name: _Codes(rows[name]) for name in ("task", "dataset")}

    def query_id(self, row: int) -> str:
        """The id of a query."""
        return str(self._query_ids[row])

    def task(self, row: int) -> str:
        """The task of a query."""
        return self._columns["task"][row]

    def rows_by(self, what: str) -> dict[str, np.ndarray]:
        """Row numbers of each data set or of each task; `what` is dataset or task."""
        return self._columns[what].rows()

    def pool(self, row: int) -> Pool:
        """The pool of a query."""
        shard, query = self._query(row)
        part = self._shards[shard].pool[query["start"] : query["end"]]
        columns = ("key", "is_gold", "reward", "is_barred", "weight")
        keys, is_gold, rewards, is_barred, weights = (np.ascontiguousarray(part[name]) for name in columns)
        return Pool(
            keys=keys,
            is_gold=is_gold,
            rewards=rewards if query["has_rewards"] else None,
            is_barred=is_barred,
            weights=weights,
        )

    def pool_texts(self, row: int) -> np.ndarray:
        """Text numbers of a query's pool: int64 [M]."""
        shard, query = self._query(row)
        part = self._shards[shard].pool[query["start"] : query["end"]]
        return np.asarray(part["text"] + self._text_starts[shard])

    def query_texts(self, rows: Iterable[int]) -> np.ndarray:
        """Text numbers of some queries: int64, one for each."""
        found = [self._query(row) for row in rows]
        return np.asarray([self._text_starts[shard] + query["text"] for shard, query in found], dtype=np.int64)

    def text_keys(self, numbers: Iterable[int]) -> np.ndarray:
        """Keys of texts, equal where side, task and text are: int64, one for each number."""
        return np.asarray([self._text(number)[1]["key"] for number in numbers], dtype=np.int64)

    def text(self, number: int) -> np.ndarray:
        """Token ids of a text."""
        shard, text = self._text(number)
        return self._shards[shard].tokens[text["start"] : text["end"]]

    def _query(self, row: int) -> tuple[int, np.void]:
        """The shard that holds a row, and the query's entry there."""
        shard = bisect_right(self._row_starts, row) - 1
        return shard, self._shards[shard].queries[row - self._row_starts[shard]]

    def _text(self, number: int) -> tuple[int, np.void]:
        """The shard that holds a text, and its entry there."""
        shard = bisect_right(self._text_starts, number) - 1
        return shard, self._shards[shard].texts[number - self._text_starts[shard]]


def read_training_data(folders: Sequence[Path]) -> TrainingData:
    """Opens what `write_shard` wrote, shards in order; arrays stay on disk and are mapped."""
    rows = [pq.read_table(folder / "rows.parquet", read_dictionary=["task", "dataset"]) for folder in folders]
    return TrainingData(pa.concat_tables(rows), [_open(folder) for folder in folders])


def _open(folder: Path) -> Shard:
    arrays = {
        item.name: np.load(folder / f"{item.name}.npy", mmap_mode="r", allow_pickle=False) for item in fields(Shard)
    }
    # Indexing an np.memmap costs several times as much as indexing the array that it is.
    return Shard(**{name: np.asarray(array) for name, array in arrays.items()})


class _Codes:
    """A column of few distinct names, 4 bytes a row."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        encoded = column.unify_dictionaries().combine_chunks()
        self._names: list[str] = encoded.dictionary.to_pylist()
        self._codes = encoded.indices.to_numpy()

    def __getitem__(self, row: int) -> str:
        return self._names[self._codes[row]]

    def rows(self) -> dict[str, np.ndarray]:
        """Row numbers of each name, names sorted."""
        return {name: np.flatnonzero(self._codes == self._names.index(name)) for name in sorted(self._names)}
