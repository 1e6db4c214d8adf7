"""The registry of readers: a data set's `source` names one of them."""

from collections.abc import Callable, Iterator

from llmr_ray.config import DatasetConfig
from llmr_ray.data.examples import is_sample, read_icl
from llmr_ray.data.jsonl import read_jsonl, read_mteb
from llmr_ray.data.knowledge import read_hotpotqa, read_squad
from llmr_ray.data.llm_embedder import read_llm_embedder
from llmr_ray.data.llm_r import read_llm_r
from llmr_ray.data.memory import read_bfcl_memory, read_chitchat, read_stdlib
from llmr_ray.data.questions import read_questions
from llmr_ray.data.records import Record, Source
from llmr_ray.data.toolbench import read_toolbench
from llmr_ray.data.tools import read_bfcl_tools
from llmr_ray.data.training_rows import read_flag_embedding, read_kl_rows, read_tevatron
from llmr_ray.errors import ConfigError

SOURCES: dict[str, Callable[[Source], Iterator[Record]]] = {
    "hotpotqa": read_hotpotqa,
    "squad": read_squad,
    "questions": read_questions,
    "chitchat": read_chitchat,
    "stdlib": read_stdlib,
    "bfcl_memory": read_bfcl_memory,
    "icl": read_icl,
    "llm_r": read_llm_r,
    "bfcl_tools": read_bfcl_tools,
    "jsonl": read_jsonl,
    "mteb": read_mteb,
    "llm_embedder": read_llm_embedder,
    "toolbench": read_toolbench,
    "flag_embedding": read_flag_embedding,
    "tevatron": read_tevatron,
    "kl_rows": read_kl_rows,
}

READER_VERSIONS = {"jsonl": 3, "mteb": 2, "toolbench": 2, "llm_r": 3, "llm_embedder": 2}
"""Raised whenever a reader makes other records of the same files; those that are not named are at 1. Part of what
determines the artifact of the data sets that it reads, so that the others stay."""

_WITH_CANDIDATES = frozenset({"llm_embedder", "flag_embedding", "tevatron", "kl_rows"})
"""Sources whose rows hold candidates."""


OWN_ROWS_VERSION = 3
"""READER_VERSIONS of icl where rows are the user's own: those of sample packages are read as ever."""


def reader_version(name: str, dataset: DatasetConfig) -> int:
    """The version of the reader of a data set of this name."""
    is_own = dataset.source == "icl" and not is_sample(name, dataset)
    return OWN_ROWS_VERSION if is_own else READER_VERSIONS.get(dataset.source, 1)


def is_tokenized(dataset: DatasetConfig) -> bool:
    """Whether a data set's rows depend on the LLM's tokenizer: texts are cut by its tokens."""
    return dataset.source == "stdlib" or (dataset.source == "llm_embedder" and dataset.task == "lrlm")


def brings_candidates(dataset: DatasetConfig) -> bool:
    """Whether a data set's queries have given candidates (mine.num_given)."""
    return bool(dataset.candidates or dataset.given_rewards) or dataset.source in _WITH_CANDIDATES


def reader(name: str) -> Callable[[Source], Iterator[Record]]:
    """The reader called `name`; ConfigError lists the known ones."""
    if name not in SOURCES:
        raise ConfigError(f"there is no source '{name}'. Known sources: {', '.join(SOURCES)}.")
    return SOURCES[name]
