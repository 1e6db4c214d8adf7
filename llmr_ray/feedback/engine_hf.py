"""The reference engine: a plain forward pass of transformers for each pair. Slow, and hard to get wrong."""

from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from llmr_ray.artifacts import seed_of
from llmr_ray.feedback.engine import EngineSettings, Rival, Sampled, Sampling, Scored, silent_ids
from llmr_ray.feedback.grammar import JSONGrammars
from llmr_ray.feedback.trie import Ids, Pair


def load_model(settings: EngineSettings) -> tuple[Any, torch.device]:
    """The model in evaluation mode, on the GPU where there is one; sets the threads of this process."""
    torch.set_num_threads(settings.num_threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[settings.dtype]
    model: Any = AutoModelForCausalLM.from_pretrained(settings.path, dtype=dtype, device_map=device)
    return model.eval(), device


@torch.inference_mode()
def plain_logprobs(model: Any, prompt_ids: Ids, target_ids: Ids) -> torch.Tensor:
    """float32 [L]: of each target token after what precedes it, in a forward pass of its own (row i predicts i + 1)."""
    ids_L = torch.tensor([*prompt_ids, *target_ids], device=model.device)
    logits_LV = model(input_ids=ids_L[None], use_cache=False).logits[0, len(prompt_ids) - 1 : -1].float()
    return logits_LV.log_softmax(-1).gather(1, ids_L[len(prompt_ids) :, None])[:, 0]


class TransformersEngine:
    """Scores one pair per forward pass; nothing is shared or batched between pairs.

    Args:
        settings: model folder, dtype and threads.
        tokenizer: the model's tokenizer.
    """

    def __init__(self, settings: EngineSettings, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.max_model_tokens = settings.max_model_tokens
        self.model, self.device = load_model(settings)
        end = self.model.generation_config.eos_token_id
        self.end_ids = frozenset([] if end is None else end if isinstance(end, list) else [end])
        self._silent = cache(partial(silent_ids, tokenizer))
        self._grammars = cache(
            partial(JSONGrammars, tokenizer, self.model.config.get_text_config().vocab_size, self.end_ids)
        )

    def begin(self) -> None:
        """Nothing is kept between calls."""

    def likelihood(self, pairs: Sequence[Pair], rivals: Sequence[Rival | None] = ()) -> list[Scored]:
        """As in Engine; reads everything."""
        return [
            Scored(
                logprobs=tuple(plain_logprobs(self.model, prompt_ids, target_ids).tolist()),
                num_computed_tokens=len(prompt_ids) + len(target_ids),
            )
            for prompt_ids, target_ids in pairs
        ]

    def sample(self, jobs: Sequence[Sampling]) -> list[Sampled]:
        """As in Engine: token by token, by inverting the cumulative distribution at a seeded uniform draw."""
        results = []
        for job in jobs:
            texts, drawn, computed = [], 0, 0
            for number in range(job.num_samples):
                text, count = self._one(job, np.random.default_rng(seed_of(job.seed, "output", number)))
                texts.append(text)
                drawn += count
                computed += len(job.prompt_ids) + count
            results.append(Sampled(texts=tuple(texts), num_output_tokens=drawn, num_computed_tokens=computed))
        return results

    @torch.inference_mode()
    def _one(self, job: Sampling, rng: np.random.Generator) -> tuple[str, int]:
        """One output and the number of tokens drawn for it, an end token included."""
        new: list[int] = []
        past, fed = None, list(job.prompt_ids)
        written = self._grammars().begin(job.output_schema) if job.output_schema else None
        while len(new) < job.max_new_tokens:
            output = self.model(input_ids=torch.tensor([fed], device=self.device), past_key_values=past, use_cache=True)
            past = output.past_key_values
            logits_V = output.logits[0, -1].double()
            if job.says_something and not new:
                logits_V[[*self._silent(job.stop), *self.end_ids]] = -torch.inf
            if written is not None:
                logits_V[written.forbidden().to(self.device)] = -torch.inf
            if job.temperature == 0:
                token = int(logits_V.argmax())
            else:
                cumulative_V = (logits_V / job.temperature).softmax(-1).cumsum(-1)
                token = int(torch.searchsorted(cumulative_V, rng.random() * float(cumulative_V[-1])))
                token = min(token, len(cumulative_V) - 1)
            if token in self.end_ids:
                return self.tokenizer.decode(new, skip_special_tokens=True), len(new) + 1
            if written is not None:
                written.write(token)
            new.append(token)
            fed = [token]
            text = self.tokenizer.decode(new, skip_special_tokens=True)
            ends = [place for place in (text.find(stop) for stop in job.stop) if place >= 0]
            if ends:
                return text[: min(ends)], len(new)
        return self.tokenizer.decode(new, skip_special_tokens=True), len(new)
