"""What is asked of vLLM and what is made of its answers, with a stand-in for it that follows its rules on cached rows.

The real vLLM is tested in the ray suite; its GPU runner, which scores given tokens, is not there on a CPU.
"""

from types import SimpleNamespace

import numpy as np
import pytest

from llmr_ray.errors import ConfigError
from llmr_ray.feedback.engine import EngineSettings, open_engine
from llmr_ray.feedback.engine_vllm import VllmEngine
from tests.tiny_llm import save_model

BLOCK = 4


def logprob(ids, position):
    """Of the token at a position after those before it: any function of exactly these."""
    return -((sum((n + 1) * token for n, token in enumerate(ids[: position + 1])) % 97) / 10 + 0.1)


class NotSupportedError(Exception):
    """vLLM's own errors have no common base with Python's."""


class StandIn:
    """Caches whole blocks; rows of cached positions are garbage, or, for given tokens, no scores at all."""

    def __init__(self, scores_tokens=True, wrong=0.0):
        self.cached, self.asked = set(), []
        self.scores_tokens, self.wrong = scores_tokens, wrong
        self.left = {}
        states = SimpleNamespace(request_states=self.left)
        self.llm_engine = SimpleNamespace(output_processor=states, abort_request=self._abort)

    def _abort(self, names, internal):
        for name in names:
            del self.left[name]

    def reset_prefix_cache(self):
        self.cached.clear()
        return not self.left

    def generate(self, prompts, params, use_tqdm):
        return [
            self._one(tuple(prompt["prompt_token_ids"]), wanted) for prompt, wanted in zip(prompts, params, strict=True)
        ]

    def _one(self, ids, params):
        self.asked.append((ids, params))
        known = 0
        if not params.get("skip_reading_prefix_cache"):
            known = max((n for n in range(0, len(ids), BLOCK) if ids[:n] in self.cached), default=0)
        self.cached |= {ids[:n] for n in range(BLOCK, len(ids) + 1, BLOCK)}
        after = {token: logprob((*ids, token), len(ids)) for token in params["logprob_token_ids"]}
        told = {token: SimpleNamespace(logprob=value) for token, value in after.items()}
        output = SimpleNamespace(
            prompt_token_ids=list(ids),
            num_cached_tokens=known,
            prompt_logprobs=None,
            prompt_token_id_logprobs=None,
            outputs=[SimpleNamespace(logprobs=[told])],
        )
        if "prompt_logprob_token_ids" in params:
            if not self.scores_tokens:
                raise NotSupportedError
            start = params["prompt_logprob_start"]
            assert [row[0] for row in params["prompt_logprob_token_ids"]] == list(ids[start + 1 :])
            if known <= start:
                rows = [[logprob(ids, place) + self.wrong] for place in range(start + 1, len(ids))]
                output.prompt_token_id_logprobs = np.array(rows)
        elif "prompt_logprobs" in params:
            values = [99.0 if place <= known else logprob(ids, place) for place in range(len(ids))]
            output.prompt_logprobs = [
                {token: SimpleNamespace(logprob=value)} for token, value in zip(ids, values, strict=True)
            ]
        return output


def engine(stand_in, *, on_gpu):
    made = VllmEngine.__new__(VllmEngine)
    made._llm, made._params, made._prompt, made._block_size = stand_in, dict, dict, BLOCK
    made._scores_tokens = on_gpu and made._can_score_tokens()
    return made


def pairs():
    stem = (5, 6, 7, 8, 9, 10, 11, 12)
    return [(stem, (3, 4)), (stem, (3, 4)), (stem, (9,)), (stem[:7], (1, 2, 3)), (stem[:3], (1,)), ((8,), (9, 9))]


@pytest.mark.parametrize("on_gpu", [True, False])
def test_garbage_of_cached_rows_is_never_an_answer(on_gpu):
    stand_in = StandIn()
    asked = engine(stand_in, on_gpu=on_gpu)
    stand_in.asked.clear()
    for (prompt, target), scored in zip(pairs(), asked.likelihood(pairs()), strict=True):
        ids = prompt + target
        assert scored.logprobs == pytest.approx([logprob(ids, place) for place in range(len(prompt), len(ids))])
    assert any("prompt_logprob_token_ids" in params for _, params in stand_in.asked) == on_gpu
    assert any("prompt_logprobs" in params for _, params in stand_in.asked) != on_gpu


@pytest.mark.parametrize("on_gpu", [True, False])
def test_outputs_of_a_prompt_of_whole_blocks_are_not_asked_twice(on_gpu):
    """The cache holds the row that predicts their first token: a prompt in 16 or 32 would cost as if nothing shared."""
    stand_in = StandIn()
    asked = engine(stand_in, on_gpu=on_gpu)
    stand_in.reset_prefix_cache()
    stand_in.asked.clear()
    stem, targets = (5, 6, 7, 8, 9, 10, 11, 12), [(3, 4), (9,), (9, 1, 2), (3, 5), (3, 4, 5)]
    scored = asked.likelihood([(stem, target) for target in targets])
    for target, result in zip(targets, scored, strict=True):
        ids = stem + target
        assert result.logprobs == pytest.approx([logprob(ids, place) for place in range(len(stem), len(ids))])
    # The prompt; (3,) and what follows it, 4 or 5; nothing for 9 alone; (9, 1) and (3, 4) and what follows them.
    assert [result.num_computed_tokens for result in scored] == [8 + 1, 0, 2, 0, 2]


def test_what_a_failed_call_left_is_given_up():
    """Else one poison row ends the engine: vLLM keeps the other requests of its call and never empties its cache."""
    stand_in = StandIn()
    asked = engine(stand_in, on_gpu=False)
    stand_in.left["a request"] = object()
    asked.begin()
    assert not stand_in.left


def test_options_of_one_token_are_one_request():
    stand_in = StandIn()
    asked = engine(stand_in, on_gpu=False)
    options = [(number,) for number in range(200)]
    scored = asked.likelihood([((5, 6, 7), option) for option in options])
    assert [result.logprobs for result in scored] == [(logprob((5, 6, 7, number), 3),) for number in range(200)]
    assert len(stand_in.asked) == 2  # vLLM tells of 128 tokens at most
    assert sum(result.num_computed_tokens for result in scored) == 3 + 3


def test_tokens_are_counted_with_those_asked_twice():
    stand_in = StandIn()
    asked = engine(stand_in, on_gpu=True)
    stand_in.reset_prefix_cache()
    first, again = asked.likelihood([((5, 6, 7), (3, 4, 8)), ((5, 6, 7), (3, 9, 8))])
    assert first.num_computed_tokens == 5
    assert again.num_computed_tokens == 1 + 5  # the targets' beginning fills a block: what predicts it was not there


@pytest.mark.parametrize(("stand_in", "warns"), [(StandIn(scores_tokens=False), False), (StandIn(wrong=0.5), True)])
def test_a_vllm_that_cannot_score_given_tokens_scores_whole_prompts(stand_in, warns, caplog):
    """A runner that scored the wrong rows would give plausible numbers."""
    asked = engine(stand_in, on_gpu=True)
    assert bool(caplog.records) == warns
    stand_in.asked.clear()
    for (prompt, target), scored in zip(pairs(), asked.likelihood(pairs()), strict=True):
        ids = prompt + target
        assert scored.logprobs == pytest.approx([logprob(ids, place) for place in range(len(prompt), len(ids))])
    assert not any("prompt_logprob_token_ids" in params for _, params in stand_in.asked)


def test_the_tree_does_not_spread_over_gpus(tmp_path):
    settings = EngineSettings(
        path=str(save_model(tmp_path)),
        engine="vllm",
        dtype="float32",
        max_model_tokens=128,
        num_threads=1,
        kv_cache_gb=1.0,
        max_batched_tokens=128,
        max_sequences=8,
        scoring="tree",
        num_gpus=2,
    )
    with pytest.raises(ConfigError, match="one GPU"):
        open_engine(settings)
