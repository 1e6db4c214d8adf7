"""vLLM in this process: scoring with shared prefixes, sampling with a seed per output. The only file that imports vllm.

The last token of an output is asked as one that may follow the rest: vLLM tells the log-probabilities of any tokens
that may come next, so outputs that differ in their last token alone (options of one token) are one request. The tokens
before it are asked as log-probabilities of the prompt. By default vLLM then reads nothing from its prefix cache; that
default is overridden here, which makes 1 + N continuations of one prompt about as dear as one. The price is a guard:
log-probabilities of cached positions are not computed (their memory holds garbage), and the first target token is
predicted by the prompt's last position. So a result counts only where at least that position was computed; others are
asked again with the default, as when a pair was asked before. A prompt that fills whole cache blocks would be found
cached to its end by every pair but the first: there the first token too is asked as one that may come next, once for
all outputs.

vLLM's newer runner on GPUs scores given tokens at given positions alone, without the output layer on the rest of the
prompt. Where it does, and gives what the default gives, that is what is asked.
"""

import itertools
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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

_MAX_NEXT_TOKENS = 128
"""Of how many tokens vLLM tells the log-probability in one request."""

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
        longest_batch = max(settings.max_batched_tokens, settings.max_sequences)
        if on_cpu:
            # vLLM rewinds the generator of an output whose prompt is cut to fill a batch; a CPU's cannot be rewound.
            dependent["enable_chunked_prefill"] = False
            longest_batch = max(longest_batch, settings.max_model_tokens + 1)
        dependent["dtype"] = settings.dtype
        # The ranks of a model that is spread over GPUs are processes of the actor, which owns all of these GPUs.
        spread = settings.num_gpus > 1
        dependent |= {"tensor_parallel_size": settings.num_gpus} if spread else {}
        self._llm = LLM(
            model=settings.path,
            max_model_len=settings.max_model_tokens + 1,
            max_num_seqs=settings.max_sequences,
            max_num_batched_tokens=longest_batch,
            enable_prefix_caching=True,
            distributed_executor_backend="mp" if spread else "uni",
            disable_log_stats=True,
            # White space can be forbidden for the whole engine alone: vLLM reads the setting nowhere else.
            structured_outputs_config={"backend": "xgrammar", "disable_any_whitespace": True},
            seed=0,
            **dependent,
        )
        self._block_size = self._llm.llm_engine.vllm_config.cache_config.block_size
        self._scores_tokens = not on_cpu and self._can_score_tokens()
        self._silent = cache(partial(silent_ids, tokenizer))

    def begin(self) -> None:
        """Empties the prefix cache. What a failed call has left unanswered is given up: it would be computed beside the
        next call's requests, and its answers come with theirs."""
        engine = self._llm.llm_engine
        if left := list(engine.output_processor.request_states):
            engine.abort_request(left, internal=True)
        if not self._llm.reset_prefix_cache():
            raise DataError("vLLM did not empty its prefix cache: a request is still running. This is a defect.")

    def likelihood(self, pairs: Sequence[Pair], rivals: Sequence[Rival | None] = ()) -> list[Scored]:
        """As in Engine; reads everything. Pairs of one prompt should stand together, equal ones be asked once."""
        parts = [self._parts(pair) for pair in pairs]
        following: dict[Pair, dict[int, None]] = {}
        for stem, token in itertools.chain.from_iterable(parts):
            following.setdefault(stem, {})[token] = None
        answers = self._answers({stem: tuple(tokens) for stem, tokens in following.items()})
        results: list[Scored] = []
        counted: set[Pair] = set()
        for own in parts:
            # What several pairs share is counted with the first.
            computed = sum(answers[stem].num_computed for stem, _ in own if stem not in counted)
            counted.update(stem for stem, _ in own)
            logprobs = (value for stem, token in own for value in answers[stem].of(token))
            results.append(Scored(logprobs=tuple(logprobs), num_computed_tokens=computed))
        return results

    def _parts(self, pair: Pair) -> list[tuple[Pair, int]]:
        """How a pair is asked: (prompt, what is given of the output) and the token that follows, in order."""
        prompt_ids, target_ids = pair
        if len(prompt_ids) % self._block_size or len(target_ids) == 1:
            return [((prompt_ids, target_ids[:-1]), target_ids[-1])]
        longer = (*prompt_ids, target_ids[0])
        return [((prompt_ids, ()), target_ids[0]), ((longer, target_ids[1:-1]), target_ids[-1])]

    def _answers(self, following: Mapping[Pair, Ids]) -> dict[Pair, "_Answer"]:
        """What vLLM says by (prompt, given part of an output), asked about the tokens that may follow it."""
        answers = {stem: _Answer() for stem in following}
        asked = [
            (stem, tokens[start : start + _MAX_NEXT_TOKENS])
            for stem, tokens in following.items()
            for start in range(0, len(tokens), _MAX_NEXT_TOKENS)
        ]
        for read_cache in (True, False):
            again = []
            for (stem, tokens), output in zip(asked, self._ask(asked, read_cache=read_cache), strict=True):
                answer, (prompt_ids, given_ids) = answers[stem], stem
                answer.num_computed += _computed(output)
                # Valid only if the prompt's last token was computed in this very request (see the module's docstring).
                is_garbage = (output.num_cached_tokens or 0) > len(prompt_ids) - 1
                if given_ids and (is_garbage or (self._scores_tokens and output.prompt_token_id_logprobs is None)):
                    again.append((stem, tokens))
                    continue
                answer.given = _rows(output, given_ids) if given_ids else ()
                answer.after |= {token: float(output.outputs[0].logprobs[0][token].logprob) for token in tokens}
            asked = again
        if asked:
            raise DataError(f"vLLM gave no log-probabilities of {len(asked)} prompts, though its cache was not read.")
        return answers

    def sample(self, jobs: Sequence[Sampling]) -> list[Sampled]:
        """As in Engine: each output is a request with its own seed; they share the prompt through the cache."""
        prompts: list[Ids] = []
        params = []
        for job in jobs:
            extra: dict[str, Any] = {}
            if job.says_something:
                # vLLM lets no token end an output of less than min_tokens that it takes for an end.
                extra |= {"min_tokens": 1, "stop_token_ids": self._silent(job.stop)}
            if job.output_schema:
                extra["structured_outputs"] = self._structured(json=job.output_schema)
            for number in range(job.num_samples):
                prompts.append(job.prompt_ids)
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
        outputs = iter(self._generate(prompts, params))
        results = []
        for job in jobs:
            mine = [next(outputs) for _ in range(job.num_samples)]
            drawn = sum(len(output.outputs[0].token_ids) for output in mine)
            computed = drawn + sum(map(_computed, mine))
            texts = tuple(output.outputs[0].text for output in mine)
            results.append(Sampled(texts=texts, num_output_tokens=drawn, num_computed_tokens=computed))
        return results

    def _ask(self, asked: Sequence[tuple[Pair, Ids]], *, read_cache: bool) -> list[Any]:
        params = []
        for (prompt_ids, given_ids), tokens in asked:
            rows: dict[str, Any] = {"prompt_logprobs": 0} if given_ids else {}
            if given_ids and self._scores_tokens:
                # Row i of the ids is what the prompt's position start + i predicts.
                ids = np.asarray(given_ids)[:, None]
                rows = {"prompt_logprob_token_ids": ids, "prompt_logprob_start": len(prompt_ids) - 1}
            params.append(
                self._params(
                    max_tokens=1,
                    temperature=0.0,
                    detokenize=False,
                    skip_reading_prefix_cache=not read_cache,
                    logprob_token_ids=list(tokens),
                    **rows,
                )
            )
        return self._generate([(*prompt_ids, *given_ids) for (prompt_ids, given_ids), _ in asked], params)

    def _generate(self, prompts: Sequence[Ids], params: Sequence[Any]) -> list[Any]:
        asked = [self._prompt(prompt_token_ids=list(ids)) for ids in prompts]
        return list(self._llm.generate(asked, list(params), use_tqdm=False)) if asked else []

    def _can_score_tokens(self) -> bool:
        """Whether this vLLM scores given tokens, and as it scores whole prompts; warns where it fails to."""
        ids = tuple(range(5, 69))
        pairs: list[Pair] = [(ids[:length], target) for length in (35, 64) for target in ((7, 8, 9), (3,))]
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


@dataclass
class _Answer:
    """Log-probabilities of the given part of an output and of tokens after it; LLM tokens computed for them."""

    given: tuple[float, ...] = ()
    after: dict[int, float] = field(default_factory=dict)
    num_computed: int = 0

    def of(self, token: int) -> tuple[float, ...]:
        """Of the given part with a token after it."""
        return (*self.given, self.after[token])


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


def _rows(output: Any, given_ids: Ids) -> tuple[float, ...]:
    """The log-probabilities of the prompt's last tokens, which are given."""
    scores = getattr(output, "prompt_token_id_logprobs", None)
    if scores is not None:
        return tuple(float(row[0]) for row in scores)
    # Aligned at the end: with cache reads some vLLM runners return only the computed positions.
    entries = output.prompt_logprobs[-len(given_ids) :]
    return tuple(float(entry[token].logprob) for entry, token in zip(entries, given_ids, strict=True))
