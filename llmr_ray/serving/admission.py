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
        self._waiting_bytes = 0
        self.working = 0
        self.waiting = 0

    @asynccontextmanager
    async def admitted(self, key: str, num_bytes: int = 0) -> AsyncIterator[float]:
        """Surrounds the work of a request; yields the seconds that it waited.

        The bound of the queue is the time that it may take: where clients ask again at once, answering refusals is work
        too, so that a short queue loses more answers to refusals than it saves in waiting.

        Args:
            key: whose limits count.
            num_bytes: of the body, which is kept while the request waits.

        Raises:
            RequestError: 429 with the time after which it is worth asking again.
        """
        self._check_key(key)
        if self.working >= self._settings.max_concurrent and not self._has_room(num_bytes):
            raise self._overloaded()
        self._of_key[key] += 1
        started = time.perf_counter()
        try:
            await self._wait(num_bytes)
            begun = time.perf_counter()
            self.working += 1
            try:
                yield begun - started
            finally:
                self.working -= 1
                self._slots.release()
                self._mean_seconds += 0.05 * (time.perf_counter() - begun - self._mean_seconds)
        finally:
            self._of_key[key] -= 1
            if not self._of_key[key]:
                del self._of_key[key]

    async def _wait(self, num_bytes: int) -> None:
        """Until there is a place to work at, which is taken."""
        self.waiting += 1
        self._waiting_bytes += num_bytes
        try:
            async with asyncio.timeout(self._settings.queue_timeout_s):
                await self._slots.acquire()
        except TimeoutError:
            raise self._overloaded() from None
        finally:
            self.waiting -= 1
            self._waiting_bytes -= num_bytes

    def _has_room(self, num_bytes: int) -> bool:
        most = self._settings.max_queued_mb * 2**20
        return self.waiting < self._settings.max_queued and self._waiting_bytes + num_bytes <= most

    def _overloaded(self) -> RequestError:
        # What waits now is done in about this time.
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


def _busy(message: str, code: str, seconds: float) -> RequestError:
    return RequestError(429, message, code=code, retry_after=min(MAX_WAIT_SECONDS, max(1.0, seconds)))
