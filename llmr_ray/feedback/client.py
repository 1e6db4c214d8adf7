"""Answering requests: from the store what is there, from an engine what is not, durably and in an order of its own.

What is missing is computed in chunks (feedback/chunks.py). A chunk is asked in one go after the prefix cache was
emptied, and stored whole before it counts as answered. So the floats of an answer do not depend on whether the process
was killed in between, and a kill costs at most the chunk at work.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from llmr_ray.durable import storage_errors
from llmr_ray.errors import DataError, LlmrError
from llmr_ray.feedback.chat import ChatTemplate
from llmr_ray.feedback.chunks import Chunk, plan_chunks
from llmr_ray.feedback.controls import ControlTokens
from llmr_ray.feedback.engine import Engine, Rival, Sampling
from llmr_ray.feedback.fitting import FitError, Fitted, fit_prompt, fit_targets
from llmr_ray.feedback.progress import AnswerProgress
from llmr_ray.feedback.requests import LLMRequest, LLMResult
from llmr_ray.feedback.store import Answer, LLMStore, request_keys
from llmr_ray.feedback.trie import Ids, Pair, trie_min

log = logging.getLogger(__name__)

Ask = TypeVar("Ask")
Got = TypeVar("Got")

MAX_ERROR_FRACTION = 0.01
"""Row errors above this share of a call fail it (one is always let through): then it is no matter of single rows."""


@dataclass(kw_only=True)
class Usage:
    """What a client has answered so far. Tokens are those the LLM processed; cached answers cost none."""

    requests: int = 0
    cached: int = 0
    computed_tokens: int = 0
    errors: int = 0


class StoreClient(ABC):
    """Implements LLMClient on a store; a subclass says where chunks are computed.

    Args:
        scorer_id: what answers (engine.scorer_id).
        store: the answers of that scorer.
        template: put around every prompt that is no running text.
        controls: the model's control tokens, which are words in what is asked; None: requests are taken as they are.
    """

    def __init__(
        self,
        scorer_id: str,
        store: LLMStore,
        template: ChatTemplate | None = None,
        controls: ControlTokens | None = None,
    ) -> None:
        self.scorer_id = scorer_id
        self.store = store
        self.template, self.controls = template, controls
        self.usage = Usage()

    @abstractmethod
    def _compute(self, chunks: Sequence[Chunk], label: str) -> Iterator[list[Answer]]:
        """Computes and stores what the chunks want; yields the answers as they come, each wanted key once."""

    def answer(self, requests: Sequence[LLMRequest], *, label: str) -> list[LLMResult]:
        """As in LLMClient. Raises DataError when more than 1% of the requests fail; engine failures pass through."""
        requests = self._asked(requests)
        keys = self._keys(requests)
        stored = self.store.get([key for of_request in keys for key in of_request])
        answers, fresh = dict(stored), set[bytes]()
        chunks = plan_chunks(requests, keys, stored)
        total = sum(len(chunk.wanted) for chunk in chunks)
        with AnswerProgress(label, total, cached=len(stored)) as progress:
            for computed in self._compute(chunks, label) if chunks else ():
                answers.update((answer.key, answer) for answer in computed)
                fresh.update(answer.key for answer in computed)
                progress.update(
                    done=len(computed),
                    tokens=sum(answer.num_computed_tokens for answer in computed),
                    errors=sum(answer.error is not None for answer in computed),
                )
        results = []
        for request, of_request in zip(requests, keys, strict=True):
            # A key that two requests share is paid by the first.
            paid = fresh.intersection(of_request)
            fresh -= paid
            of_answers = [answers[key] for key in of_request]
            cached = stored.keys() >= set(of_request)
            results.append(_result(request, of_answers, [answers[key] for key in paid], cached=cached))
        self._account(results)
        return results

    def missing(self, requests: Sequence[LLMRequest]) -> int:
        """As in LLMClient."""
        keys = self._keys(self._asked(requests))
        return len(self.store.missing(key for of_request in keys for key in of_request))

    def stored(self, requests: Sequence[LLMRequest]) -> list[LLMResult | None]:
        """The results that need no LLM; None for requests of which anything is missing."""
        keys = self._keys(self._asked(requests))
        found = self.store.get([key for of_request in keys for key in of_request])
        return [
            _result(request, [found[key] for key in of_request], [], cached=True)
            if all(key in found for key in of_request)
            else None
            for request, of_request in zip(requests, keys, strict=True)
        ]

    def _asked(self, requests: Sequence[LLMRequest]) -> Sequence[LLMRequest]:
        if self.controls:
            requests = self.controls.as_words(requests)
        return self.template.wrap(requests) if self.template else requests

    def _keys(self, requests: Sequence[LLMRequest]) -> list[list[bytes]]:
        for request in requests:
            _check(request)
        return [request_keys(self.scorer_id, request) for request in requests]

    def _account(self, results: Sequence[LLMResult]) -> None:
        failed = [result for result in results if result.error is not None]
        self.usage.requests += len(results)
        self.usage.cached += sum(result.cached for result in results)
        self.usage.computed_tokens += sum(result.num_computed_tokens for result in results)
        self.usage.errors += len(failed)
        if len(failed) > max(1, MAX_ERROR_FRACTION * len(results)):
            examples = "; ".join(f"{result.request_id}: {result.error}" for result in failed[:3])
            raise DataError(
                f"{len(failed)} of {len(results)} LLM requests failed, more than {MAX_ERROR_FRACTION:.0%}: {examples}. "
                "Answers that succeeded are kept. Look at these rows; raise llm.max_model_tokens if prompts do not fit."
            )


class LocalClient(StoreClient):
    """Answers with one engine in this process.

    Args:
        scorer_id, store: as in StoreClient.
        engine: computes what the store lacks.
    """

    def __init__(self, scorer_id: str, store: LLMStore, engine: Engine) -> None:
        super().__init__(scorer_id, store)
        self.engine = engine

    def compute(self, chunk: Chunk) -> list[Answer]:
        """The answers to what a chunk wants, stored: what another process asks of an actor that holds a client."""
        # Looked up again: a process that was killed may have stored them before it was asked a second time.
        found = self.store.get(chunk.wanted)
        wanted = chunk.wanted - found.keys()
        if not wanted:
            return list(found.values())
        computed = compute_chunk(self.engine, self.scorer_id, chunk, wanted)
        with storage_errors(self.store.folder):
            self.store.put(computed)
        return [*found.values(), *computed]

    def _compute(self, chunks: Sequence[Chunk], label: str) -> Iterator[list[Answer]]:
        yield from map(self.compute, chunks)


def compute_chunk(engine: Engine, scorer_id: str, chunk: Chunk, wanted: frozenset[bytes]) -> list[Answer]:
    """Asks the engine for the `wanted` keys of a chunk, starting from an empty prefix cache. Rows may fail."""
    answers: dict[bytes, Answer] = {}
    to_score: dict[bytes, Fitted] = {}
    rivals: dict[bytes, Rival] = {}
    to_sample: dict[bytes, tuple[Fitted, Sampling]] = {}
    for request in chunk.requests:
        keys = request_keys(scorer_id, request)
        if request.targets:
            open_keys = {
                key: target
                for key, target in zip(keys, request.targets, strict=True)
                if key in wanted - to_score.keys()
            }
            fits = fit_targets(engine.tokenizer, request, list(open_keys.values()), engine.max_model_tokens)
            for key, fitted in zip(open_keys, fits, strict=True):
                if isinstance(fitted, FitError):
                    answers[key] = Answer(key=key, error=str(fitted))
                else:
                    to_score[key] = fitted
            rivals |= _rivals(engine, request, keys[0], {key: to_score[key] for key in open_keys if key in to_score})
        elif keys[0] in wanted and keys[0] not in to_sample:
            try:
                fitted = fit_prompt(engine.tokenizer, request, engine.max_model_tokens)
            except FitError as error:
                answers[keys[0]] = Answer(key=keys[0], error=str(error))
            else:
                to_sample[keys[0]] = fitted, _sampling(request, fitted)
    jobs = [job for _, job in to_sample.values()]
    pairs = [(fitted.prompt_ids, fitted.target_ids) for fitted in to_score.values()]
    prompts = [(job.prompt_ids, _UNFED) for job in jobs]
    least = _least(engine, prompts + pairs, chunk.before)
    for (key, (fitted, _)), sampled in zip(to_sample.items(), _ask(engine, engine.sample, jobs), strict=True):
        if isinstance(sampled, str):
            answers[key] = Answer(key=key, error=sampled)
        else:
            least += sampled.num_output_tokens
            answers[key] = _answer(key, fitted, sampled.num_computed_tokens, texts=sampled.texts)
    contests = [(pair, rivals.get(key)) for key, pair in zip(to_score, pairs, strict=True)]
    found = _ask(engine, lambda some: engine.likelihood(*zip(*some, strict=True)), contests)
    for (key, fitted), scored in zip(to_score.items(), found, strict=True):
        if isinstance(scored, str):
            answers[key] = Answer(key=key, error=scored)
            continue
        # Stored as float32, so a fresh answer must not differ from the same one read back.
        logprobs = np.asarray(scored.logprobs, np.float32)
        if np.isfinite(logprobs).all() and len(logprobs) == len(fitted.target_ids):
            answers[key] = _answer(key, fitted, scored.num_computed_tokens, logprobs=tuple(logprobs.tolist()))
        else:
            answers[key] = Answer(key=key, error="the LLM gave no finite log-probability for each token")
    # What all share cannot be told apart, so the first answer stands for the chunk's lower bound.
    first, *rest = answers.values()
    return [replace(first, num_least_tokens=least), *rest]


def _rivals(engine: Engine, request: LLMRequest, key: bytes, wanted: Mapping[bytes, Fitted]) -> dict[bytes, Rival]:
    """For targets that are only compared with the request's first one, whose key is given: that one."""
    if not request.rank_by or not wanted:
        return {}
    first: Fitted | FitError | None = wanted.get(key)
    if first is None:
        [first] = fit_targets(engine.tokenizer, request, request.targets[:1], engine.max_model_tokens)
    if isinstance(first, FitError):
        return {}
    rival = Rival(pair=(first.prompt_ids, first.target_ids), rank_by=request.rank_by)
    return {key: rival for key, fitted in wanted.items() if fitted != first}


_UNFED: Ids = (0,)
"""A target of one token, which no engine needs to compute."""


def _least(engine: Engine, pairs: Sequence[Pair], before: LLMRequest | None) -> int:
    """The tokens that the pairs add to the tree of those before them."""
    if before is None or not pairs:
        return trie_min(pairs)
    try:
        prompt = fit_prompt(engine.tokenizer, before, engine.max_model_tokens).prompt_ids
    except FitError:
        return trie_min(pairs)
    return trie_min([*pairs, (prompt, _UNFED)]) - len(prompt)


def _ask(engine: Engine, ask: Callable[[Sequence[Ask]], Sequence[Got]], items: Sequence[Ask]) -> list[Got | str]:
    """What the engine gives for each item; for one it fails on, why: a row must not cost its neighbours.

    Fails with the engine's error when every item fails.
    """
    if not items:
        return []
    engine.begin()
    try:
        return [*ask(items)]
    except LlmrError:
        raise
    except Exception as error:
        log.warning("the engine failed on %d rows at once (%r); asking them one by one", len(items), error)
        results: list[Got | str] = []
        for item in items:
            engine.begin()
            try:
                results += ask([item])
            except Exception as own:
                results.append(f"the engine failed on this row: {own!r}")
        if all(isinstance(result, str) for result in results):
            raise
        return results


def _answer(
    key: bytes, fitted: Fitted, computed: int, *, logprobs: tuple[float, ...] = (), texts: tuple[str, ...] = ()
) -> Answer:
    return Answer(
        key=key,
        logprobs=logprobs,
        texts=texts,
        num_prompt_tokens=len(fitted.prompt_ids),
        truncated=fitted.truncated,
        prompt_sha=fitted.prompt_sha,
        num_computed_tokens=computed,
    )


def _sampling(request: LLMRequest, fitted: Fitted) -> Sampling:
    return Sampling(
        prompt_ids=fitted.prompt_ids,
        num_samples=request.num_samples,
        max_new_tokens=request.max_new_tokens,
        temperature=request.temperature,
        seed=request.seed,
        stop=request.stop,
        says_something=request.says_something,
        output_schema=request.output_schema,
    )


def _result(request: LLMRequest, answers: Sequence[Answer], paid: Sequence[Answer], *, cached: bool) -> LLMResult:
    computed = sum(answer.num_computed_tokens for answer in paid)
    least = sum(answer.num_least_tokens for answer in paid)
    errors = [answer.error for answer in answers if answer.error is not None]
    if errors:
        return LLMResult(
            request_id=request.request_id, num_computed_tokens=computed, num_least_tokens=least, error=errors[0]
        )
    return LLMResult(
        request_id=request.request_id,
        token_logprobs=tuple(answer.logprobs for answer in answers) if request.targets else (),
        texts=() if request.targets else answers[0].texts,
        num_prompt_tokens=answers[0].num_prompt_tokens,
        num_computed_tokens=computed,
        num_least_tokens=least,
        truncated=any(answer.truncated for answer in answers),
        cached=cached,
        prompt_sha=answers[0].prompt_sha,
    )


def _check(request: LLMRequest) -> None:
    if bool(request.targets) == bool(request.num_samples):
        raise ValueError(f"request {request.request_id} must have either targets or num_samples, and one of the two.")
    if request.targets and request.output_schema:
        raise ValueError(f"request {request.request_id} has targets, so there is no output for its output_schema.")
    if not request.targets and request.temperature == 0 and request.num_samples != 1:
        raise ValueError(f"request {request.request_id} is greedy, so num_samples must be 1: all would be equal.")
