"""A language model behind an OpenAI-compatible endpoint, by either of its two routes.

    openai        completions: token ids go in, log-probabilities or texts come out. Likelihood needs an endpoint that
                  echoes the prompt's log-probabilities (vLLM, SGLang, TGI's and llama.cpp's servers do). Prompts travel
                  as token ids of the tokenizer in `llm.model`, so spans are exact.
    openai_chat   chat completions, which is all that most commercial endpoints have: the prompt's text is the user's
                  turn. Outputs alone can be had, so such a model labels, ranks by its outputs and reads, and is asked
                  for no likelihood. `llm.model` names a tokenizer by which prompts are cut to length, which need not
                  be the model's own.

The client retries what is worth it (connection errors, 408, 409, 429, 5xx) with exponential back-off, and waits as long
as Retry-After says.
"""

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import openai

from llmr_ray.errors import ConfigError, ResourceError
from llmr_ray.feedback.engine import EngineSettings, Rival, Sampled, Sampling, Scored
from llmr_ray.feedback.trie import Ids, Pair

MAX_RETRIES = 10
"""With the client's back-off of up to 8 s, more than a minute of an endpoint's absence."""

PROMPTS_PER_CALL = 16
"""Prompts scored by one HTTP request: fewer round trips, while a failed one costs little."""

Ask = TypeVar("Ask")
Got = TypeVar("Got")


class OpenAIEngine:
    """Scores and samples through HTTP. The key comes from OPENAI_API_KEY, never from a configuration.

    Args:
        settings: endpoint, the model's name there, and max_sequences: prompts in flight.
        tokenizer: the model's tokenizer.
    """

    def __init__(self, settings: EngineSettings, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.max_model_tokens = settings.max_model_tokens
        self.endpoint, self.model = settings.endpoint, settings.endpoint_model
        self.max_sequences = max(1, settings.max_sequences)
        self.client = openai.OpenAI(
            base_url=settings.endpoint, api_key=os.environ.get("OPENAI_API_KEY", "none"), max_retries=MAX_RETRIES
        )

    def begin(self) -> None:
        """As in Engine: nothing is kept here; what the endpoint keeps is its own affair."""

    def likelihood(self, pairs: Sequence[Pair], rivals: Sequence[Rival | None] = ()) -> list[Scored]:
        """As in Engine. Tokens are those the endpoint was sent; what it shares between prompts it does not tell."""
        batches = [pairs[start : start + PROMPTS_PER_CALL] for start in range(0, len(pairs), PROMPTS_PER_CALL)]
        return [
            scored
            for batch in self._at_once(self._score, batches, self.max_sequences // PROMPTS_PER_CALL)
            for scored in batch
        ]

    def sample(self, jobs: Sequence[Sampling]) -> list[Sampled]:
        """As in Engine, with the endpoint's own use of the seed."""
        return self._at_once(self._draw, jobs, self.max_sequences)

    def _score(self, pairs: Sequence[Pair]) -> list[Scored]:
        prompts: list[Ids] = [prompt + target for prompt, target in pairs]
        # One token is generated because not every endpoint takes 0; it is left out.
        answer = self._ask(prompts, max_tokens=1, temperature=0.0, echo=True, logprobs=1)
        self._check_usage(answer, sum(map(len, prompts)))
        results = []
        choices = sorted(answer.choices, key=lambda choice: int(choice.index))
        if len(choices) != len(pairs):
            raise ResourceError(f"{self.endpoint} gave {len(choices)} answers to {len(pairs)} prompts.")
        for choice, (prompt, target) in zip(choices, pairs, strict=True):
            values = choice.logprobs.token_logprobs if choice.logprobs is not None else None
            if values is None or len(values) < len(prompt) + len(target):
                raise ConfigError(
                    f"{self.endpoint} does not return the log-probabilities of the prompt ({self.model}; asked with "
                    "echo and logprobs), so it cannot judge candidates by likelihood. Serve the model with an engine "
                    "that does, such as vLLM."
                )
            span = values[len(prompt) : len(prompt) + len(target)]
            # A None in the span becomes NaN, which is a row's error.
            logprobs = tuple(float("nan") if value is None else float(value) for value in span)
            results.append(Scored(logprobs=logprobs, num_computed_tokens=len(prompt) + len(target)))
        return results

    def _draw(self, job: Sampling) -> Sampled:
        answer = self._ask(
            [job.prompt_ids],
            max_tokens=job.max_new_tokens,
            stop=list(job.stop) or None,
            **_drawing(job),
        )
        texts = self._outputs(answer, job, lambda choice: choice.text)
        self._check_usage(answer, len(job.prompt_ids))
        drawn = int(answer.usage.completion_tokens)
        return Sampled(texts=texts, num_output_tokens=drawn, num_computed_tokens=len(job.prompt_ids) + drawn)

    def _outputs(self, answer: Any, job: Sampling, text_of: Callable[[Any], str]) -> tuple[str, ...]:
        texts = tuple(text_of(choice) for choice in sorted(answer.choices, key=lambda choice: int(choice.index)))
        if len(texts) != job.num_samples:
            raise ResourceError(f"{self.endpoint} gave {len(texts)} outputs where {job.num_samples} were asked for.")
        return texts

    def _ask(self, prompts: Sequence[Ids], **parameters: Any) -> Any:
        create = self.client.completions.create
        return self._answered(lambda: create(model=self.model, prompt=[list(ids) for ids in prompts], **parameters))

    def _answered(self, ask: Callable[[], Got]) -> Got:
        try:
            return ask()
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
            raise ConfigError(
                f"{self.endpoint} refuses the request for {self.model}: {_said(error)}. Check llm.endpoint, "
                "llm.endpoint_model and the environment variable OPENAI_API_KEY."
            ) from None
        except (openai.APIConnectionError, openai.RateLimitError, openai.InternalServerError) as error:
            raise ResourceError(
                f"{self.endpoint} did not answer after {MAX_RETRIES} retries: {_said(error)}. What was answered is "
                "kept; run the same command when it is back, or lower runtime.llm_max_sequences."
            ) from None

    def _check_usage(self, answer: Any, expected: int) -> None:
        counted = answer.usage.prompt_tokens if answer.usage is not None else expected
        if counted != expected:
            raise ConfigError(
                f"{self.endpoint} counted {counted} prompt tokens where {expected} were sent, so {self.model} reads "
                "them with another tokenizer. Set llm.model to the folder or hub name of that model's tokenizer."
            )

    def _at_once(self, function: Callable[[Ask], Got], items: Sequence[Ask], number: int) -> list[Got]:
        with ThreadPoolExecutor(max_workers=max(1, number)) as pool:
            return list(pool.map(function, items))


class OpenAIChatEngine(OpenAIEngine):
    """Samples by the route of chats.

    What the endpoint counts as prompt holds its own template, so that nothing can be checked against it.
    """

    def likelihood(self, pairs: Sequence[Pair], rivals: Sequence[Rival | None] = ()) -> list[Scored]:
        """No chat route tells it: ConfigError."""
        raise ConfigError(
            f"the engine openai_chat has no log-probabilities of a given text, and {self.model} is asked for them: to "
            "score candidates by likelihood, or to choose among the options of test questions. Let it label "
            "(score.feedback: label) or rank by outputs, and name another `reader` for questions with options. What "
            "was answered is kept."
        )

    def _draw(self, job: Sampling) -> Sampled:
        text = self.tokenizer.decode(list(job.prompt_ids), skip_special_tokens=True)
        stop: dict[str, Any] = {"stop": list(job.stop)} if job.stop else {}
        answer = self._answered(
            lambda: self.client.chat.completions.create(
                model=self.model,
                messages=[{"role": "user", "content": text}],
                max_completion_tokens=job.max_new_tokens,
                **stop,
                **_drawing(job),
            )
        )
        # A turn that is withheld has no content; who reads outputs expects what is not as asked.
        texts = self._outputs(answer, job, lambda choice: choice.message.content or "")
        if answer.usage is None:
            drawn, read = sum(len(self.tokenizer(text)["input_ids"]) for text in texts), len(job.prompt_ids)
        else:
            drawn, read = int(answer.usage.completion_tokens), int(answer.usage.prompt_tokens)
        return Sampled(texts=texts, num_output_tokens=drawn, num_computed_tokens=read + drawn)


def _drawing(job: Sampling) -> dict[str, Any]:
    """How outputs are drawn, as both routes call it."""
    return {
        "n": job.num_samples,
        "temperature": job.temperature,
        # Endpoints take 32 bits at the least; the job's seed has more.
        "seed": job.seed % 2**31,
        "extra_body": _json_only(job.output_schema) if job.output_schema else None,
    }


def _json_only(schema: str) -> dict[str, Any]:
    """Lets an output obey a JSON schema: OpenAI's parameter of the chat route, which vLLM and SGLang take on both. An
    endpoint that does not know it leaves the output free."""
    named = {"name": "answer", "schema": json.loads(schema), "strict": True}
    return {"response_format": {"type": "json_schema", "json_schema": named}}


def _said(error: openai.APIError) -> str:
    return str(error.message)[:300]
