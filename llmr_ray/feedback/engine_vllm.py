"""vLLM in this process: scoring with shared prefixes, sampling with a seed per output. The only file that imports vllm.

Scoring asks for the log-probabilities of the prompt. By default vLLM then reads nothing from its prefix cache; that
default is overridden here, which makes 1 + N continuations of one prompt about as dear as one. The price is a guard:
log-probabilities of cached positions are not computed (their memory holds garbage), and the first target token is
predicted by the prompt's last position. So a result counts only where at least that position was computed; other pairs
are asked again with the default. This happens when the prompt fills whole cache blocks, or a pair was asked before.

vLLM's newer runner on GPUs scores given tokens at given positions alone, without the output layer on the rest of the
prompt. Where it does, and gives what the default gives, that is what is asked.
"""

import logging
import math
import os
from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import numpy as np

from llmr_ray.artifacts import seed_of
from llmr_ray.errors import DataError
from llmr_ray.feedback.engine import EngineSettings, Rival, Sampled, Sampling, Scored, silent_ids
from llmr_ray.feedback.trie import Ids, Pair

log = logging.getLogger(__name__)

_CPU_BLOCK = 32
"""The smallest cache block that vLLM's CPU attention takes; its default of 128 would share less."""

_AGREEMENT = 0.1
"""How far two ways of scoring may be apart, in bfloat16; a wrong row is off by whole units."""


class VllmEngine:
    """A vLLM engine without processes of its own, so that one actor is one process.

    Args:
        settings: model folder, dtype, threads and sizes.
        tokenizer: the model's tokenizer.
    """

    def __init__(self, settings: EngineSettings, tokenizer: Any) -> None:
        import torch

        on_cpu = not torch.cuda.is_available()
        _prepare_environment(settings, on_cpu)
        from vllm import LLM, SamplingParams, TokensPrompt
        from vllm.sampling_params import StructuredOutputsParams

        torch.set_num_threads(settings.num_threads)
        self.tokenizer = tokenizer
        self.max_model_tokens = settings.max_model_tokens
        self._params, self._prompt, self._structured = SamplingParams, TokensPrompt, StructuredOutputsParams
        # The CPU engine is up in seconds only without compilation, and shares prefixes finely only with small blocks.
        dependent: dict[str, Any] = {"enforce_eager": True, "block_size": _CPU_BLOCK} if on_cpu else {}
        dependent["dtype"] = settings.dtype
        # The ranks of a model that is spread over GPUs are processes of the actor, which owns all of these GPUs.
        spread = settings.num_gpus > 1
        dependent |= {"tensor_parallel_size": settings.num_gpus} if spread else {}
        self._llm = LLM(
            model=settings.path,
            max_model_len=settings.max_model_tokens + 1,
            max_num_seqs=settings.max_sequences,
            max_num_batched_tokens=max(settings.max_batched_tokens, settings.max_sequences),
            enable_prefix_caching=True,
            distributed_executor_backend="mp" if spread else "uni",
            disable_log_stats=True,
            # White space can be forbidden for the whole engine alone: vLLM reads the setting nowhere else.
            structured_outputs_config={"backend": "xgrammar", "disable_any_whitespace": True},
            seed=0,
            **dependent,
        )
        self._scores_tokens = not on_cpu and self._can_score_tokens()
        self._silent = cache(partial(silent_ids, tokenizer))

    def begin(self) -> None:
        """Empties the prefix cache."""
        if not self._llm.reset_prefix_cache():
            raise DataError("vLLM did not empty its prefix cache: a request is still running. This is a defect.")

    def likelihood(self, pairs: Sequence[Pair], rivals: Sequence[Rival | None] = ()) -> list[Scored]:
        """As in Engine; reads everything. Pairs of one prompt should stand together, equal ones be asked once."""
        outputs = self._ask(pairs, read_cache=True)
        wasted = [_computed(output) for output in outputs]
        # Valid only if the prompt's last token was computed in this very request (see the module's docstring).
        again = [
            row
            for row, (output, (prompt_ids, _)) in enumerate(zip(outputs, pairs, strict=True))
            if (output.num_cached_tokens or 0) > len(prompt_ids) - 1
            or (self._scores_tokens and output.prompt_token_id_logprobs is None)
        ]
        for row, output in zip(again, self._ask([pairs[row] for row in again], read_cache=False), strict=True):
            outputs[row] = output
            wasted[row] += _computed(output)
        return [
            Scored(logprobs=_tail(output, target_ids), num_computed_tokens=count)
            for output, (_, target_ids), count in zip(outputs, pairs, wasted, strict=True)
        ]

    def sample(self, jobs: Sequence[Sampling]) -> list[Sampled]:
        """As in Engine: each output is a request with its own seed; they share the prompt through the cache."""
        prompts, params = [], []
        for job in jobs:
            extra: dict[str, Any] = {}
            if job.says_something:
                # vLLM lets no token end an output of less than min_tokens that it takes for an end.
                extra |= {"min_tokens": 1, "stop_token_ids": self._silent(job.stop)}
            if job.output_schema:
                extra["structured_outputs"] = self._structured(json=job.output_schema)
            for number in range(job.num_samples):
                prompts.append(self._prompt(prompt_token_ids=list(job.prompt_ids)))
                params.append(
                    self._params(
                        max_tokens=job.max_new_tokens,
                        temperature=job.temperature,
                        seed=seed_of(job.seed, "output", number),
                        stop=list(job.stop),
                        skip_special_tokens=True,
                        **extra,
                    )
                )
        outputs = iter(self._llm.generate(prompts, params, use_tqdm=False) if prompts else [])
        results = []
        for job in jobs:
            mine = [next(outputs) for _ in range(job.num_samples)]
            drawn = sum(len(output.outputs[0].token_ids) for output in mine)
            computed = drawn + sum(map(_computed, mine))
            texts = tuple(output.outputs[0].text for output in mine)
            results.append(Sampled(texts=texts, num_output_tokens=drawn, num_computed_tokens=computed))
        return results

    def _ask(self, pairs: Sequence[tuple[Ids, Ids]], *, read_cache: bool) -> list[Any]:
        if not pairs:
            return []
        common: dict[str, Any] = {
            "max_tokens": 1,
            "temperature": 0.0,
            "detokenize": False,
            "skip_reading_prefix_cache": not read_cache,
        }
        if self._scores_tokens:
            # Row i of the ids is what the prompt's position start + i predicts.
            params = [
                self._params(
                    prompt_logprob_token_ids=np.asarray(target_ids)[:, None],
                    prompt_logprob_start=len(prompt_ids) - 1,
                    **common,
                )
                for prompt_ids, target_ids in pairs
            ]
        else:
            params = [self._params(prompt_logprobs=0, **common)] * len(pairs)
        prompts = [self._prompt(prompt_token_ids=[*prompt_ids, *target_ids]) for prompt_ids, target_ids in pairs]
        return list(self._llm.generate(prompts, params, use_tqdm=False))

    def _can_score_tokens(self) -> bool:
        """Whether this vLLM scores given tokens, and as it scores whole prompts; warns where it fails to."""
        pairs: list[Pair] = [(tuple(range(5, 40)), (7, 8, 9)), (tuple(range(5, 40)), (3,))]
        self._scores_tokens = False
        expected = self.likelihood(pairs)
        self.begin()
        self._scores_tokens = True
        try:
            found = self.likelihood(pairs)
        except Exception as error:  # whichever of its own vLLM raises: the other way remains
            log.info("vLLM does not score given tokens (%s); it scores whole prompts", error)
            return False
        finally:
            self.begin()
        difference = max(
            abs(got - wanted)
            for one, other in zip(found, expected, strict=True)
            for got, wanted in zip(one.logprobs, other.logprobs, strict=True)
        )
        if not difference <= _AGREEMENT:
            log.warning(
                "vLLM's scores of given tokens are off by %.2g from those of whole prompts: not used", difference
            )
            return False
        return True


def _prepare_environment(settings: EngineSettings, on_cpu: bool) -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if on_cpu:
        # 'auto' would pin every engine to the same core; without a size the cache takes most of the memory; dynamo
        # would compile a C++ kernel at the first request for log-probabilities.
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, math.ceil(settings.kv_cache_gb)))  # whole GiB
        os.environ["TORCHDYNAMO_DISABLE"] = "1"


def _computed(output: Any) -> int:
    return len(output.prompt_token_ids) - int(output.num_cached_tokens or 0)


def _tail(output: Any, target_ids: Ids) -> tuple[float, ...]:
    scores = getattr(output, "prompt_token_id_logprobs", None)
    if scores is not None:
        return tuple(float(row[0]) for row in scores)
    # Aligned at the end: with cache reads some vLLM runners return only the computed positions.
    entries = output.prompt_logprobs[-len(target_ids) :]
    return tuple(float(entry[token].logprob) for entry, token in zip(entries, target_ids, strict=True))
