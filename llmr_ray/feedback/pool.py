"""The pool of Ray actors that answers LLM requests: each hosts an engine and stores what it computes."""

import json
import logging
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from llmr_ray import cluster
from llmr_ray.artifacts import canonical_json
from llmr_ray.assets import Asset
from llmr_ray.config import Config
from llmr_ray.durable import write_atomic
from llmr_ray.errors import LlmrError, ResourceError
from llmr_ray.feedback.budget import Budget
from llmr_ray.feedback.chat import ChatTemplate
from llmr_ray.feedback.chunks import Chunk
from llmr_ray.feedback.client import LocalClient, StoreClient, compute_chunk
from llmr_ray.feedback.controls import ControlTokens
from llmr_ray.feedback.engine import EngineSettings, environment, open_engine, scorer_id
from llmr_ray.feedback.engine_routed import ENGINE, ROUTES, TREE, RoutedEngine
from llmr_ray.feedback.store import Answer, LLMStore, request_keys

log = logging.getLogger(__name__)

IN_FLIGHT = 2
"""Chunks sent to an actor at a time: the next one waits there while the answers of the last travel."""

MAX_ATTEMPTS = 3
"""Actors that may die over a chunk before its requests are asked one by one, and over one request before it fails."""

MAX_DEATHS = 8
"""Actors that may die or hang in a row without one answer between: then it is no matter of single rows."""

PROBE_CHUNKS = 3
PROBE_WORTH = 64
"""Chunks to score from which on the routes are compared; on fewer, measuring would cost what it can save."""


class EngineActor:
    """One engine in a process of its own. What it computes it stores itself, before it answers."""

    def __init__(self, settings: EngineSettings, name: str, folder: Path) -> None:
        self.engine = open_engine(settings)
        self.client = LocalClient(name, LLMStore(folder), self.engine)

    def compute(self, chunk: Chunk, route: str) -> list[Answer]:
        """Answers to what the chunk wants, scored by a route where the engine has several."""
        self._take(route)
        return self.client.compute(chunk)

    def time_routes(self, chunks: Sequence[Chunk]) -> dict[str, float]:
        """Tokens that had to be computed, per second, by route; nothing is stored."""
        speeds = {}
        for route in ROUTES:
            self._take(route)
            compute_chunk(self.engine, self.client.scorer_id, chunks[0], chunks[0].wanted)
            started = time.perf_counter()
            tokens = sum(
                answer.num_least_tokens
                for chunk in chunks
                for answer in compute_chunk(self.engine, self.client.scorer_id, chunk, chunk.wanted)
            )
            speeds[route] = tokens / (time.perf_counter() - started)
        return speeds

    def _take(self, route: str) -> None:
        if isinstance(self.engine, RoutedEngine):
            self.engine.route = route


@dataclass(frozen=True, kw_only=True)
class _Task:
    chunk: Chunk
    attempts: int = 0

    def after_death(self, scorer: str) -> "list[_Task]":
        """What to ask again when the actor died over this: the same, then single requests."""
        if self.attempts + 1 < MAX_ATTEMPTS:
            return [replace(self, attempts=self.attempts + 1)]
        if len(self.chunk.requests) == 1:
            return []
        singles = []
        left = set(self.chunk.wanted)
        for request in self.chunk.requests:
            wanted = left.intersection(request_keys(scorer, request))
            left -= wanted
            if wanted:
                singles.append(_Task(chunk=Chunk(requests=(request,), wanted=frozenset(wanted))))
        return singles


@dataclass(kw_only=True)
class _Work:
    """One call's chunks: those that wait, and those at work by the actor's slot."""

    route: str
    queue: "deque[_Task]"
    running: "dict[ray.ObjectRef, tuple[int, _Task]]" = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class _Hosted:
    """An actor, and what is there once its engine is open."""

    actor: Any
    opened: "ray.ObjectRef"

    @property
    def is_open(self) -> bool:
        """Whether the engine was ever open; one that was not has not begun what it was asked."""
        try:
            ray.get(self.opened, timeout=0)
        except RayError:  # it died, or is still at it
            return False
        return True


class RayClient(StoreClient):
    """Answers with a pool of engine actors, which start when something must be computed and live until `close`.

    An actor that dies or hangs is replaced and its chunks asked again; what it had stored is not. A request that takes
    an actor down every time becomes a row error.

    Args:
        config: the run's configuration.
        llm: the language model.
        budget: shared with another client of the same command; None: one of its own.
    """

    def __init__(self, config: Config, llm: Asset, budget: Budget | None = None) -> None:
        name = scorer_id(llm.fingerprint, config.llm)
        store = LLMStore(Path(config.runtime.artifact_root).resolve() / "llm_store" / name)
        template = ChatTemplate.load(llm.path) if config.llm.chat_template else None
        super().__init__(name, store, template, ControlTokens.load(llm.path))
        self.runtime, self.budget = config.runtime, budget or Budget(config.budget)
        self.settings = EngineSettings.of(config, llm.path)
        self._actors: list[_Hosted] = []

    def close(self) -> None:
        """Ends the actors; the next question starts new ones."""
        if ray.is_initialized():
            for hosted in self._actors:
                ray.kill(hosted.actor)
        self._actors = []

    def _compute(self, chunks: Sequence[Chunk], label: str) -> Iterator[list[Answer]]:
        self.budget.start()
        self._start(min(max(1, self.runtime.llm_actors), len(chunks)))
        work = _Work(route=self._route(chunks, label), queue=deque(_Task(chunk=chunk) for chunk in chunks))
        self._feed(work, range(len(self._actors)))
        last, deaths = time.monotonic(), 0
        while work.running:
            done, _ = ray.wait(list(work.running), num_returns=1, timeout=1.0)
            if not done and time.monotonic() - last < self.runtime.stall_timeout_s:
                continue
            try:
                computed = self._result(done)
            except _Lost as error:
                deaths += 1
                if deaths > MAX_DEATHS or (deaths > 1 and not done):
                    self.close()
                    raise ResourceError(self._gave_up(deaths, error, work)) from error
                yield from self._recover(work, done, error)
            else:
                deaths = 0
                slot, _ = work.running.pop(done[0])
                self.budget.tokens += sum(answer.num_computed_tokens for answer in computed)
                self._feed(work, [slot], depth=1)
                yield computed
            last = time.monotonic()
        if work.queue:
            raise self.budget.error(len(work.queue))

    def _feed(self, work: _Work, slots: Iterable[int], depth: int = IN_FLIGHT) -> None:
        """Sends each of the actors up to `depth` chunks more, round by round."""
        for slot in [*slots] * depth:
            if work.queue and not self.budget.is_reached:
                task = work.queue.popleft()
                work.running[self._actors[slot].actor.compute.remote(task.chunk, work.route)] = slot, task

    def _result(self, done: Sequence[ray.ObjectRef]) -> list[Answer]:
        """The answers of a chunk that ended; typed errors of the actor are raised as themselves, its loss as _Lost."""
        if not done:
            raise _Lost(f"gave no answer in {self.runtime.stall_timeout_s:g} s")
        try:
            return list(ray.get(done[0]))
        except RayTaskError as error:
            if isinstance(error.cause, LlmrError):
                raise error.cause from None
            raise
        except RayError as error:  # died, was ended for want of memory, its node is gone
            if isinstance(error, RayActorError) and error.actor_init_failed:
                self.close()
                raise ResourceError(f"an LLM actor could not be started: {error}") from error
            raise _Lost(f"{type(error).__name__}: {error}") from error

    def _recover(self, work: _Work, done: Sequence[ray.ObjectRef], error: Exception) -> Iterator[list[Answer]]:
        """Replaces the actor that died, or all when none answers, and asks their chunks again.

        Yields:
            Errors for the requests over which actors died every time.
        """
        slots = {work.running[done[0]][0]} if done else {slot for slot, _ in work.running.values()}
        lost = [ref for ref, (slot, _) in work.running.items() if slot in slots]
        reason = str(error).splitlines()[0]
        log.warning("an LLM actor was lost (%s); starting another, asking %d chunks again", reason, len(lost))
        # Not of one that died while it started: asked one by one, requests lose their company, and with it, in
        # bfloat16, the last bits of their answers.
        suspects = {slot for slot in slots if self._actors[slot].is_open}
        for ref in lost:
            slot, task = work.running.pop(ref)
            if slot not in suspects:
                work.queue.appendleft(task)
                continue
            # An actor works in the order of asking, so it died over the first. That one waits till the others are
            # answered, lest it takes one actor after the other down.
            suspects.remove(slot)
            again = task.after_death(self.scorer_id)
            work.queue.extend(again)
            if not again:
                yield _killed(task)
        for slot in slots:
            self._replace(slot)
        self._feed(work, slots)

    def _gave_up(self, deaths: int, error: Exception, work: _Work) -> str:
        return (
            f"{deaths} LLM actors in a row died or hung without an answer between; the last one {error}. "
            f"{len(work.running)} chunks were at work on {len(self._actors)} actors ({self.settings.engine}, "
            f"{self.settings.path}), {len(work.queue)} more queued. Either the engine cannot run here (memory, GPU), "
            "or it is slower than runtime.stall_timeout_s: then raise that. What was answered is kept."
        )

    def _route(self, chunks: Sequence[Chunk], label: str) -> str:
        """What scores: as set, else as measured once for this kind of work and kept beside the store."""
        to_score = [chunk for chunk in chunks if not chunk.is_sampling]
        if self.settings.engine != "vllm" or not to_score:
            return ENGINE
        if self.runtime.llm_scoring != "auto":
            return self.runtime.llm_scoring
        work = label.split()[0]
        path = self.store.folder / "routes.json"
        routes = json.loads(path.read_text()) if path.exists() else {}
        if work not in routes:
            if len(to_score) < PROBE_WORTH:
                return TREE
            # Evenly over the work: sorted by prompt, neighbours are of one task.
            probe = [to_score[(2 * n + 1) * len(to_score) // (2 * PROBE_CHUNKS)] for n in range(PROBE_CHUNKS)]
            try:
                speeds = ray.get(self._actors[0].actor.time_routes.remote(probe), timeout=self.runtime.stall_timeout_s)
            except (RayActorError, GetTimeoutError) as error:
                log.warning("the routes of scoring could not be compared: %s", str(error).splitlines()[0])
                self._replace(0)
                return TREE
            routes[work] = max(speeds, key=lambda route: speeds[route])
            write_atomic(path, canonical_json(routes).encode())
            measured = ", ".join(f"{route} {speed:,.0f}" for route, speed in speeds.items())
            print(f"{work}: scoring by {routes[work]} (distinct tokens/s measured: {measured})", file=sys.stderr)
        return str(routes[work])

    def _start(self, count: int) -> None:
        cluster.start(self.runtime)
        new = count - len(self._actors)
        if new > 0:
            cluster.require(count, count * self.runtime.llm_gpus, "the pool of LLM actors")
            self._actors += [self._new() for _ in range(new)]

    def _replace(self, slot: int) -> None:
        ray.kill(self._actors[slot].actor)
        self._actors[slot] = self._new()

    def _new(self) -> _Hosted:
        options: dict[str, Any] = {
            "num_cpus": 1,
            "num_gpus": self.runtime.llm_gpus,
            "max_restarts": 0,
            "max_task_retries": 0,
            "runtime_env": {"env_vars": environment(self.settings)},
        }
        made: Any = ray.remote(EngineActor).options(**options)
        actor = made.remote(self.settings, self.scorer_id, self.store.folder)
        return _Hosted(actor=actor, opened=actor.__ray_ready__.remote())


class _Lost(Exception):
    """An actor is gone, or none answered in time."""


def _killed(task: _Task) -> list[Answer]:
    error = f"the LLM's process died {MAX_ATTEMPTS} times over this request"
    return [Answer(key=key, error=error) for key in sorted(task.chunk.wanted)]
