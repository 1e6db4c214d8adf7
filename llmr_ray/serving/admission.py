"""Who may come in when many ask at once: bounded work, a bounded queue, and limits of each API key."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from llmr_ray.serving.protocol import RequestError
from llmr_ray.serving.settings import ServingSettings

MAX_WAIT_SECONDS = 30.0
"""No client is told to stay away longer."""

BURST_SECONDS = 2.0
"""A key that was quiet may make this many seconds' worth of requests at once."""


class Admission:
    """Counts the requests of one process. All of it runs in one event loop, so plain numbers do."""

    def __init__(self, settings: ServingSettings) -> None:
        self._settings = settings
        self._slots = asyncio.Semaphore(max(1, settings.max_concurrent))
        self._of_key: Counter[str] = Counter()
        self._tokens: dict[str, tuple[float, float]] = {}
        self._mean_seconds = 0.05
        self._inside = 0
        self._held_bytes = 0
        self.working = 0
        self.waiting = 0

    @asynccontextmanager
    async def entered(self, key: str) -> AsyncIterator["Visit"]:
        """Surrounds a request from before its body is read until its answer is made.

        The bound of the queue is the time that it may take: where clients ask again at once, answering refusals is work
        too, so that a short queue loses more answers to refusals than it saves in waiting.

        Args:
            key: whose limits count.

        Raises:
            RequestError: 429 with the time after which it is worth asking again.
        """
        self._check_key(key)
        if self._inside >= max(1, self._settings.max_concurrent) + self._settings.max_queued:
            raise self.overloaded()
        self._of_key[key] += 1
        self._inside += 1
        visit = Visit(self)
        try:
            yield visit
        finally:
            visit.release()
            self._inside -= 1
            self._of_key[key] -= 1
            if not self._of_key[key]:
                del self._of_key[key]

    @asynccontextmanager
    async def work(self) -> AsyncIterator[float]:
        """Waits for a place to work at and holds it; yields its start, by time.perf_counter. 429 if it waits long."""
        self.waiting += 1
        try:
            async with asyncio.timeout(self._settings.queue_timeout_s):
                await self._slots.acquire()
        except TimeoutError:
            raise self.overloaded() from None
        finally:
            self.waiting -= 1
        begun = time.perf_counter()
        self.working += 1
        try:
            yield begun
        finally:
            self.working -= 1
            self._slots.release()
            self._mean_seconds += 0.05 * (time.perf_counter() - begun - self._mean_seconds)

    def hold(self, num_bytes: int) -> None:
        """Counts bytes of bodies that are kept; below 0: no longer."""
        self._held_bytes += num_bytes

    def has_room(self, own: int, more: int) -> bool:
        """Whether a body of which `own` bytes are held may grow. A body that is alone may: its length is bounded."""
        is_alone = self._held_bytes == own
        return is_alone or self._held_bytes + more <= self._settings.max_queued_mb * 2**20

    def overloaded(self) -> RequestError:
        """The refusal of a full server: 429, with the time in which about what waits now is done."""
        seconds = self._mean_seconds * (self.waiting + self.working) / max(1, self._settings.max_concurrent)
        return _busy("the server is busy.", "overloaded", seconds)

    def _check_key(self, key: str) -> None:
        most, rate = self._settings.max_concurrent_per_key, self._settings.requests_per_second_per_key
        if most and self._of_key[key] >= most:
            raise _busy(f"this key has {most} requests under way, and may have no more.", "too_many_requests", 1.0)
        if not rate:
            return
        now, full = time.monotonic(), max(1.0, rate * BURST_SECONDS)
        tokens, last = self._tokens.get(key, (full, now))
        tokens = min(full, tokens + (now - last) * rate)
        if tokens < 1:
            self._tokens[key] = (tokens, now)
            raise _busy(f"this key may make {rate:g} requests a second.", "rate_limited", (1 - tokens) / rate)
        self._tokens[key] = (tokens - 1, now)


class Visit:
    """A request that was let in, and the bytes of its body that it holds until it is worked on."""

    def __init__(self, admission: Admission) -> None:
        self._admission, self._num_bytes = admission, 0

    def expect(self, num_bytes: int) -> None:
        """Raises RequestError (429) if there is no room for so many bytes more."""
        if not self._admission.has_room(self._num_bytes, num_bytes):
            raise self._admission.overloaded()

    def take(self, num_bytes: int) -> None:
        """Counts bytes that have come; RequestError (429) if there is no room for them."""
        self.expect(num_bytes)
        self._num_bytes += num_bytes
        self._admission.hold(num_bytes)

    def release(self) -> None:
        """Counts the body no longer."""
        self._admission.hold(-self._num_bytes)
        self._num_bytes = 0

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[float]:
        """Surrounds the work; yields the seconds that it waited. RequestError (429) if they are too many."""
        started = time.perf_counter()
        async with self._admission.work() as begun:
            self.release()
            yield begun - started


def _busy(message: str, code: str, seconds: float) -> RequestError:
    return RequestError(429, message, code=code, retry_after=min(MAX_WAIT_SECONDS, max(1.0, seconds)))
