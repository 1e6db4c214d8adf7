"""Answering requests: from the store what is there, from an engine what is not, durably and in an order of its own.

What is missing is computed unit by unit in chunks. A chunk is a fixed slice of a unit, asked in one go after the
prefix cache was emptied, and stored whole. So the floats of an answer do not depend on what was asked before it, nor on
whether the process was killed in between; and a kill costs at most the chunks since the last commit.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from llmr_ray.errors import DataError
from llmr_ray.feedback.engine import Engine, Sampling
from llmr_ray.feedback.fitting import FitError, Fitted, fit_prompt, fit_targets
from llmr_ray.feedback.progress import AnswerProgress
from llmr_ray.feedback.requests import LLMRequest, LLMResult
from llmr_ray.feedback.store import Answer, LLMStore, request_keys

CHUNK_ROWS = 64
"""Targets and samples of a unit asked in one go. It decides what is computed together, so it is no runtime setting."""

MAX_ERROR_FRACTION = 0.01
"""Row errors above this share of a call fail it (one is always let through): then it is no matter of single rows."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """All requests of one unit in a call, and the keys among them that are to be computed."""

    requests: tuple[LLMRequest, ...]
    wanted: frozenset[bytes]


@dataclass(kw_only=True)
class Usage:
    """What a client has answered so far. Tokens are those the LLM processed; cached answers cost none."""

    requests: int = 0
    cached: int = 0
    computed_tokens: int = 0
    errors: int = 0


class StoreClient(ABC):
    """Implements LLMClient on a store; a subclass says where units are computed.

    Args:
        scorer_id: what answers (engine.scorer_id).
        store: the answers of that scorer.
    """

    def __init__(self, scorer_id: str, store: LLMStore) -> None:
        self.scorer_id = scorer_id
        self.store = store
        self.usage = Usage()

    @abstractmethod
    def _compute(self, units: Sequence[Unit]) -> Iterator[list[Answer]]:
        """Computes and stores what the units want; yields the answers as they come, each wanted key once."""

    def answer(self, requests: Sequence[LLMRequest], *, label: str) -> list[LLMResult]:
        """As in LLMClient. Raises DataError when more than 1% of the requests fail; engine failures pass through."""
        keys = self._keys(requests)
        stored = self.store.get([key for of_request in keys for key in of_request])
        answers, cost = dict(stored), dict[bytes, int]()
        units = _units(requests, keys, stored)
        total = sum(len(unit.wanted) for unit in units)
        with AnswerProgress(label, total, cached=len(stored)) as progress:
            for batch in self._compute(units) if units else ():
                answers.update((answer.key, answer) for answer in batch)
                cost.update((answer.key, answer.num_computed_tokens) for answer in batch)
                progress.update(
                    done=len(batch),
                    tokens=sum(answer.num_computed_tokens for answer in batch),
                    errors=sum(answer.error is not None for answer in batch),
                )
        results = []
        for request, of_request in zip(requests, keys, strict=True):
            # A key that two requests share is paid by the first.
            tokens = sum(cost.pop(key, 0) for key in dict.fromkeys(of_request))
            cached = all(key in stored for key in of_request)
            results.append(_result(request, [answers[key] for key in of_request], tokens, cached))
        self._account(results)
        return results

    def missing(self, requests: Sequence[LLMRequest]) -> int:
        """As in LLMClient."""
        return len(self.store.missing(key for of_request in self._keys(requests) for key in of_request))

    def stored(self, requests: Sequence[LLMRequest]) -> list[LLMResult | None]:
        """The results that need no LLM; None for requests of which anything is missing."""
        keys = self._keys(requests)
        found = self.store.get([key for of_request in keys for key in of_request])
        return [
            _result(request, [found[key] for key in of_request], 0, True)
            if all(key in found for key in of_request)
            else None
            for request, of_request in zip(requests, keys, strict=True)
        ]

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
        commit_rows, commit_seconds: answers become durable at least this often, at the ends of chunks.
    """

    def __init__(
        self, scorer_id: str, store: LLMStore, engine: Engine, *, commit_rows: int = 64, commit_seconds: float = 5.0
    ) -> None:
        super().__init__(scorer_id, store)
        self.engine = engine
        self.commit_rows, self.commit_seconds = commit_rows, commit_seconds

    def compute(self, units: Sequence[Unit]) -> list[Answer]:
        """The answers to what the units want, in a list: what another process asks of an actor that holds a client."""
        return [answer for batch in self._compute(units) for answer in batch]

    def _compute(self, units: Sequence[Unit]) -> Iterator[list[Answer]]:
        # Looked up again: a process that was killed may have stored a part before it was asked a second time.
        found = self.store.get({key for unit in units for key in unit.wanted})
        if found:
            yield list(found.values())
        pending: list[Answer] = []
        committed = time.monotonic()
        try:
            for unit in units:
                wanted = unit.wanted - found.keys()
                for chunk in _chunks(unit.requests):
                    batch = compute_chunk(self.engine, self.scorer_id, chunk, wanted)
                    if not batch:
                        continue
                    pending += batch
                    wanted -= {answer.key for answer in batch}
                    late = time.monotonic() - committed >= self.commit_seconds
                    if late or sum(map(_num_rows, pending)) >= self.commit_rows:
                        self.store.put(pending)
                        pending, committed = [], time.monotonic()
                    yield batch
        finally:
            self.store.put(pending)


def compute_chunk(
    engine: Engine, scorer_id: str, requests: Sequence[LLMRequest], wanted: frozenset[bytes]
) -> list[Answer]:
    """Asks the engine for the `wanted` keys of some requests, starting from an empty prefix cache. Rows may fail."""
    answers: dict[bytes, Answer] = {}
    to_score: dict[bytes, Fitted] = {}
    to_sample: dict[bytes, tuple[Fitted, Sampling]] = {}
    for request in requests:
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
        elif keys[0] in wanted and keys[0] not in to_sample:
            try:
                fitted = fit_prompt(engine.tokenizer, request, engine.max_model_tokens)
            except FitError as error:
                answers[keys[0]] = Answer(key=keys[0], error=str(error))
            else:
                to_sample[keys[0]] = fitted, _sampling(request, fitted)
    if to_score or to_sample:
        engine.begin()
    samples = engine.sample([job for _, job in to_sample.values()])
    for (key, (fitted, _)), sampled in zip(to_sample.items(), samples, strict=True):
        answers[key] = _answer(key, fitted, sampled.num_computed_tokens, texts=sampled.texts)
    scores = engine.likelihood([(fitted.prompt_ids, fitted.target_ids) for fitted in to_score.values()])
    for (key, fitted), scored in zip(to_score.items(), scores, strict=True):
        # Stored as float32, so a fresh answer must not differ from the same one read back.
        logprobs = np.asarray(scored.logprobs, np.float32)
        if np.isfinite(logprobs).all():
            answers[key] = _answer(key, fitted, scored.num_computed_tokens, logprobs=tuple(logprobs.tolist()))
        else:
            answers[key] = Answer(key=key, error="the LLM gave a log-probability that is not finite")
    return list(answers.values())


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
    )


def _units(
    requests: Sequence[LLMRequest], keys: Sequence[Sequence[bytes]], stored: Mapping[bytes, Answer]
) -> list[Unit]:
    """Requests by unit, in order of first appearance; a key that several units need is wanted by the first alone."""
    members: dict[str, list[LLMRequest]] = {}
    wanted: dict[str, set[bytes]] = {}
    claimed = set(stored)
    for request, of_request in zip(requests, keys, strict=True):
        members.setdefault(request.unit, []).append(request)
        wanted.setdefault(request.unit, set()).update(key for key in of_request if key not in claimed)
        claimed.update(of_request)
    return [Unit(requests=tuple(members[name]), wanted=frozenset(wanted[name])) for name in members if wanted[name]]


def _chunks(requests: Sequence[LLMRequest]) -> Iterator[list[LLMRequest]]:
    chunk: list[LLMRequest] = []
    rows = 0
    for request in requests:
        size = len(request.targets) or request.num_samples
        if chunk and rows + size > CHUNK_ROWS:
            yield chunk
            chunk, rows = [], 0
        chunk.append(request)
        rows += size
    if chunk:
        yield chunk


def _num_rows(answer: Answer) -> int:
    return max(1, len(answer.texts))


def _result(request: LLMRequest, answers: Sequence[Answer], tokens: int, cached: bool) -> LLMResult:
    errors = [answer.error for answer in answers if answer.error is not None]
    if errors:
        return LLMResult(request_id=request.request_id, num_computed_tokens=tokens, error=errors[0])
    return LLMResult(
        request_id=request.request_id,
        token_logprobs=tuple(answer.logprobs for answer in answers) if request.targets else (),
        texts=() if request.targets else answers[0].texts,
        num_prompt_tokens=answers[0].num_prompt_tokens,
        num_computed_tokens=tokens,
        truncated=any(answer.truncated for answer in answers),
        cached=cached,
        prompt_sha=answers[0].prompt_sha,
    )


def _check(request: LLMRequest) -> None:
    if bool(request.targets) == bool(request.num_samples):
        raise ValueError(f"request {request.request_id} must have either targets or num_samples, and one of the two.")
    if not request.targets and request.temperature == 0 and request.num_samples != 1:
        raise ValueError(f"request {request.request_id} is greedy, so num_samples must be 1: all would be equal.")
