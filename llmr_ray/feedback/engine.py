"""What computes: one protocol for the engines, and how one is opened.

Engines see token ids only; the tokenizer is loaded here, the same for each of them, so that two engines of one model
are asked exactly the same.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from llmr_ray.artifacts import canonical_json, sha256_text
from llmr_ray.config import ENDPOINTS, Config, LLMConfig
from llmr_ray.errors import ConfigError, ResourceError
from llmr_ray.feedback.trie import Ids, Pair
from llmr_ray.precision import resolve_precision

FITTING_VERSION = 1
"""Raised whenever tokenising, trimming or scoring rules change, so that old answers in the store are not mixed in."""


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Log-probabilities of a target's tokens after its prompt, and the tokens the LLM processed for them."""

    logprobs: tuple[float, ...]
    num_computed_tokens: int


@dataclass(frozen=True, kw_only=True)
class Rival:
    """What a continuation is compared with: another pair, by "mean" or "sum" (LLMRequest.rank_by)."""

    pair: Pair
    rank_by: str


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Outputs to draw after a prompt; output j has a seed of its own, made from `seed` and j. Temperature 0: greedy.

    says_something, output_schema: as in LLMRequest; endpoints know no setting for the first.
    """

    prompt_ids: Ids
    num_samples: int
    max_new_tokens: int
    temperature: float
    seed: int
    stop: tuple[str, ...] = ()
    says_something: bool = False
    output_schema: str = ""


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """The outputs as text, without special tokens and without the stop string.

    num_output_tokens: tokens drawn, all outputs together. num_computed_tokens: those and what was read of the prompt.
    """

    texts: tuple[str, ...]
    num_output_tokens: int
    num_computed_tokens: int


class Engine(Protocol):
    """A causal language model that scores and samples."""

    tokenizer: Any
    max_model_tokens: int

    def begin(self) -> None:
        """Forgets what was computed before, so that the next answers do not depend on it."""
        ...

    def likelihood(self, pairs: Sequence[Pair], rivals: Sequence[Rival | None] = ()) -> list[Scored]:
        """log P(target token | prompt, earlier target tokens), natural log, for each (prompt ids, target ids).

        Of a pair with a rival (rivals are by pair, or none at all) it is enough to know whether it is likelier: an
        engine may read less of it and give 0 for the rest (LLMRequest.rank_by).
        """
        ...

    def sample(self, jobs: Sequence[Sampling]) -> list[Sampled]:
        """Draws outputs from the unmodified distribution at the job's temperature (no top-p, no penalties)."""
        ...


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """All that opening an engine needs, as plain values that travel to another process."""

    path: str
    engine: str
    dtype: str
    max_model_tokens: int
    num_threads: int
    kv_cache_gb: float
    max_batched_tokens: int
    max_sequences: int
    scoring: str = "auto"
    endpoint: str = ""
    endpoint_model: str = ""
    num_gpus: int = 0

    @classmethod
    def of(cls, config: Config, path: Path) -> "EngineSettings":
        """The settings of a run, for the model in the folder `path`."""
        return cls(
            path=str(path),
            engine=config.llm.engine,
            dtype=resolve_precision(config.llm.dtype),
            max_model_tokens=config.llm.max_model_tokens,
            num_threads=config.runtime.llm_threads,
            kv_cache_gb=config.runtime.llm_kv_cache_gb,
            max_batched_tokens=config.runtime.llm_max_batched_tokens,
            max_sequences=config.runtime.llm_max_sequences,
            scoring=config.runtime.llm_scoring,
            endpoint=config.llm.endpoint,
            endpoint_model=config.llm.endpoint_model,
            num_gpus=int(config.runtime.llm_gpus),
        )


def silent_ids(tokenizer: Any, stop: Sequence[str]) -> list[int]:
    """Tokens with which an output would end before it has said anything: blanks and then a stop string."""
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    return [token for token, text in enumerate(texts) if text.lstrip(" ").startswith(tuple(stop))] if stop else []


def asked_identity(fingerprint: str, llm: LLMConfig) -> dict[str, Any]:
    """What of an LLM and its settings is part of the id of every artifact that holds its answers."""
    return {"scorer": scorer_id(fingerprint, llm), "max_candidate_tokens": llm.max_candidate_tokens}


def scorer_id(fingerprint: str, llm: LLMConfig) -> str:
    """Names what answers: two scorers of one id give the same answers, up to the rounding of floats.

    The engine is part of it although both compute the same model: an oracle served from the other engine's answers
    would prove nothing, and samples differ.
    """
    dtype = resolve_precision(llm.dtype)
    what = [FITTING_VERSION, fingerprint, llm.engine, dtype, llm.max_model_tokens]
    if llm.engine in ENDPOINTS:
        # Where it is served may change; what is served may not.
        what.append(llm.endpoint_model)
    if llm.chat_template:
        what.append("chat template")
    return f"{llm.engine}-{dtype}-{sha256_text(canonical_json(what))[:16]}"


def environment(settings: EngineSettings) -> dict[str, str]:
    """Environment variables that must be set before torch is imported in the process of an engine."""
    return {
        "OMP_NUM_THREADS": str(settings.num_threads),
        "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1"),
        "TOKENIZERS_PARALLELISM": "false",
    }


def open_engine(settings: EngineSettings) -> Engine:
    """Loads the model and its tokenizer.

    Raises:
        ConfigError: the model cannot hold `max_model_tokens`, or its tokenizer gives no character offsets.
        ResourceError: there is no model in the folder.
    """
    from transformers import AutoConfig, AutoTokenizer

    if not (Path(settings.path) / "config.json").is_file():
        raise ResourceError(
            f"{settings.path} holds no config.json, so no LLM can be loaded from it. Check `llm.model`."
        )
    window = getattr(AutoConfig.from_pretrained(settings.path), "max_position_embeddings", None)
    if window is not None and settings.max_model_tokens >= window:
        raise ConfigError(
            f"llm.max_model_tokens is {settings.max_model_tokens}, but the model reads {window} tokens and one is kept "
            f"for the output. Set it to {window - 1} at the most."
        )
    tokenizer = AutoTokenizer.from_pretrained(settings.path)
    if not tokenizer.is_fast:
        raise ConfigError(
            f"the tokenizer in {settings.path} gives no character offsets (no tokenizer.json); use another."
        )
    if settings.engine in ENDPOINTS:
        from llmr_ray.feedback.engine_openai import OpenAIChatEngine, OpenAIEngine

        return (OpenAIEngine if settings.engine == "openai" else OpenAIChatEngine)(settings, tokenizer)
    if settings.engine == "transformers":
        from llmr_ray.feedback.engine_hf import TransformersEngine

        return TransformersEngine(settings, tokenizer)
    from llmr_ray.feedback.engine_routed import TREE, RoutedEngine
    from llmr_ray.feedback.engine_tree import TreeScorer

    def open_vllm() -> Engine:
        from llmr_ray.feedback.engine_vllm import VllmEngine

        return VllmEngine(settings, tokenizer)

    if settings.num_gpus > 1:
        if settings.scoring == TREE:
            raise ConfigError(
                f"runtime.llm_scoring=tree holds the model on one GPU, but runtime.llm_gpus is {settings.num_gpus}. "
                "Leave llm_scoring out: vLLM spreads the model and scores it."
            )
        return open_vllm()
    return RoutedEngine(
        tokenizer,
        settings.max_model_tokens,
        open_vllm,
        lambda: TreeScorer(settings),
        must_take_tree=settings.scoring == TREE,
    )
