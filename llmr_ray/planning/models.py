"""How large a model is, from its name: what plans need before any weights are here."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """parameters: all of them. body: those that each token is multiplied with, without the table of word embeddings.
    dimension: of an embedding. is_known: False where the name only suggests it."""

    parameters: float
    body: float
    dimension: int
    is_known: bool = True


_KNOWN = {
    "minilm-l6": Size(22.7e6, 10.6e6, 384),
    "all-minilm-l6-v2": Size(22.7e6, 10.6e6, 384),
    "minilm-l3": Size(17.2e6, 5.3e6, 384),
    "paraphrase-minilm-l3-v2": Size(17.2e6, 5.3e6, 384),
    "e5-small-v2": Size(33.4e6, 21.3e6, 384),
    "bge-small-en": Size(33.4e6, 21.3e6, 384),
    "bge-base-en": Size(109.5e6, 85.6e6, 768),
    "bge-large-en": Size(335e6, 302e6, 1024),
    "e5-base-v2": Size(109.5e6, 85.6e6, 768),
    "bert-base-uncased": Size(109.5e6, 85.6e6, 768),
    "electra-base-discriminator": Size(109e6, 85.6e6, 768),
    "all-mpnet-base-v2": Size(109.5e6, 85.6e6, 768),
    "llm-embedder": Size(109.5e6, 85.6e6, 768),
    "llm-retriever-base": Size(109.5e6, 85.6e6, 768),
    "contriever": Size(109.5e6, 85.6e6, 768),
    "retromae_beir": Size(109.5e6, 85.6e6, 768),
    "toolbench_ir_bert_based_uncased": Size(109.5e6, 85.6e6, 768),
    # The encoder of a T5; AAR reads its decoder's first step, whose keys and values are made of every token.
    "instructor-base": Size(110.2e6, 85.0e6, 768),
    "aar-ance": Size(222.9e6, 99.1e6, 768),
    "aar-contriever": Size(109.5e6, 85.6e6, 768),
    "smollm2-135m-instruct": Size(134.5e6, 106.2e6, 576),
    "llama-7b": Size(6.74e9, 6.61e9, 4096),
    "llama-2-7b-chat-hf": Size(6.74e9, 6.61e9, 4096),
    "llama-2-13b-chat-hf": Size(13.0e9, 12.9e9, 5120),
}

_WORDS = {"large": Size(335e6, 302e6, 1024, False), "base": Size(110e6, 86e6, 768, False)}
_WORDS["small"] = Size(33e6, 21e6, 384, False)


def size_of(name: str) -> Size:
    """The size of a model: known by its name, else by a number or a word in it (1.5B, 360M, large), else base size."""
    short = name.lower().rstrip("/").rsplit("/", 1)[-1]
    if found := _KNOWN.get(short) or _KNOWN.get(re.sub(r"-v[\d.]+$", "", short)):
        return found
    if match := re.search(r"(?<![\d.])(\d+(?:\.\d+)?)([mb])(?![a-z])", short):
        parameters = float(match[1]) * {"m": 1e6, "b": 1e9}[match[2]]
        dimension = 64 * max(6, round((parameters / 12 / 32) ** 0.5 / 64))
        return Size(parameters, 0.9 * parameters, dimension, False)
    return next((size for word, size in _WORDS.items() if word in short), _WORDS["base"])
