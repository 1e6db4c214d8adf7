"""The registry of readers: a data set's `source` names one of them."""

from collections.abc import Callable, Iterator

from llmr_ray.data.examples import read_icl
from llmr_ray.data.jsonl import read_jsonl
from llmr_ray.data.knowledge import read_hotpotqa, read_squad
from llmr_ray.data.llm_r import read_llm_r
from llmr_ray.data.memory import read_bfcl_memory, read_chitchat, read_stdlib
from llmr_ray.data.records import Record, Source
from llmr_ray.data.tools import read_bfcl_tools
from llmr_ray.errors import ConfigError

SOURCES: dict[str, Callable[[Source], Iterator[Record]]] = {
    "hotpotqa": read_hotpotqa,
    "squad": read_squad,
    "chitchat": read_chitchat,
    "stdlib": read_stdlib,
    "bfcl_memory": read_bfcl_memory,
    "icl": read_icl,
    "llm_r": read_llm_r,
    "bfcl_tools": read_bfcl_tools,
    "jsonl": read_jsonl,
}

TOKENIZED = frozenset({"stdlib"})
"""Sources whose rows depend on the LLM's tokenizer."""


def reader(name: str) -> Callable[[Source], Iterator[Record]]:
    """The reader called `name`; ConfigError lists the known ones."""
    if name not in SOURCES:
        raise ConfigError(f"there is no source '{name}'. Known sources: {', '.join(SOURCES)}.")
    return SOURCES[name]
