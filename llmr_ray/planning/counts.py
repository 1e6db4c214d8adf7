"""How many texts and pairs a configuration has, and how large they are: what every stage's work is counted in."""

from collections import Counter
from collections.abc import Collection, Iterable

from llmr_ray.artifacts import SHARD_ROWS
from llmr_ray.config import Config, DatasetConfig, EmbedderConfig
from llmr_ray.evaluation.leakage import EXAMPLE_TASKS
from llmr_ray.planning.hardware import Assumptions
from llmr_ray.planning.models import size_of

CHARS_PER_TOKEN = 4.5
ROW_BYTES = 120
"""Of a row of candidates or scores on disk."""
_OWN_POOLS = ("chat", "lrlm")
"""Tasks whose queries search a dialogue or a text of their own, which is small."""
QUESTIONS = "questions"
"""The source that brings no documents."""
_OPENED = 5 / 4
"""An opened index over its vectors: 8-bit codes that propose documents are a quarter more (index/searcher.py)."""


def num_queries(config: Config) -> int:
    """Queries of all splits, at the most."""
    return sum(data.num_train + data.num_dev + data.num_test for data in config.datasets.values())


def num_training(config: Config) -> int:
    """Training queries, at the most."""
    return sum(data.num_train for data in config.datasets.values())


def num_documents(config: Config, assumed: Assumptions, tasks: Collection[str] = ()) -> int:
    """Documents of the pools of some tasks, or of all; where the configuration does not say, assumed or as many as its
    queries' candidates."""
    found = config.datasets.values()
    return sum(_documents(data, config, assumed) for data in found if not tasks or data.task in tasks)


def num_compared(config: Config, assumed: Assumptions, asked: Iterable[tuple[DatasetConfig, int]]) -> float:
    """(query, document) pairs of exact searches, each query against its whole pool: that of all examples, of the data
    sets that share it, or of its data set. Own dialogues and texts are too small to count.

    Args:
        config, assumed: sizes of the pools.
        asked: data sets, and how many queries of each search.
    """
    examples = num_documents(config, assumed, EXAMPLE_TASKS)
    shared: Counter[str] = Counter()
    for data in config.datasets.values():
        shared[data.pool] += _documents(data, config, assumed)

    def searched(data: DatasetConfig) -> int:
        if data.task in EXAMPLE_TASKS:
            return examples
        return shared[data.pool] if data.pool else _documents(data, config, assumed)

    return float(sum(number * searched(data) for data, number in asked if data.task not in _OWN_POOLS))


def num_pairs(config: Config, *, again: bool) -> int:
    """Candidates of all training queries in the first round or a later one, at the most."""
    return sum(data.num_train * mined(config, data.task, again=again) for data in config.datasets.values())


def mined(config: Config, task: str, *, again: bool) -> int:
    """Candidates of a query, at the most."""
    return config.tasks[task].mine_in(again=again).most


def lengths(embedder: EmbedderConfig, assumed: Assumptions) -> tuple[float, float]:
    """Mean tokens of a query and of a document, as an embedder reads them."""
    return assumed.fill * embedder.max_query_tokens, assumed.fill * embedder.max_document_tokens


def vector_bytes(embedder: EmbedderConfig) -> int:
    """Of one embedding."""
    return 4 * size_of(embedder.model).dimension


def opened_bytes(config: Config, assumed: Assumptions, embedder: EmbedderConfig) -> float:
    """Of an opened exact index of all documents."""
    return num_documents(config, assumed) * vector_bytes(embedder) * _OPENED


def num_index_nodes(config: Config, assumed: Assumptions, embedder: EmbedderConfig) -> int:
    """Nodes that an exact index takes, each with so much memory for it."""
    return max(1, -(-int(opened_bytes(config, assumed, embedder)) // int(assumed.node_memory_gb * 1e9)))


def num_shards(rows: float, each: int = SHARD_ROWS) -> int:
    """Pieces of so many rows."""
    return max(1, -(-int(rows) // each))


def num_evaluated(config: Config, data: DatasetConfig) -> int:
    """A data set's queries of the split that is evaluated."""
    return data.num_test if config.evaluate.split == "test" else data.num_dev


def _documents(data: DatasetConfig, config: Config, assumed: Assumptions) -> int:
    if data.num_documents:
        return data.num_documents
    if data.task in EXAMPLE_TASKS and not data.num_train:
        # Examples are made of training rows: one that only tests takes those of the others.
        return 0
    if data.source == QUESTIONS:
        return 0
    asked = data.num_train + data.num_dev + data.num_test
    guess = asked * max(1, mined(config, data.task, again=False))
    return guess if data.task in _OWN_POOLS else assumed.documents or guess
