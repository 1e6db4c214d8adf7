"""Batches of what is asked at the same time: nobody waits for a batch to fill, what comes during one makes up the next.

A timer would add its length to every answer of an idle server and still not fill the batches of a busy one.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Batcher(Generic[Item, Result]):
    """Puts items of concurrent callers together; a caller's items are never split.

    Args:
        work: results of a batch's items, in their order. One batch is under way at a time.
        max_items: of a batch; a caller with more makes up a batch alone.
    """

    def __init__(self, work: Callable[[list[Item]], Awaitable[Sequence[Result]]], max_items: int) -> None:
        self._work, self._max_items = work, max_items
        self._waiting: deque[tuple[Sequence[Item], asyncio.Future[list[Result]]]] = deque()
        self._running: asyncio.Task[None] | None = None

    async def submit(self, items: Sequence[Item]) -> list[Result]:
        """The results of a caller's items. A caller that is cancelled before its batch begins costs nothing."""
        if not items:
            return []
        future: asyncio.Future[list[Result]] = asyncio.get_running_loop().create_future()
        self._waiting.append((items, future))
        if self._running is None:
            self._running = asyncio.create_task(self._run())
        return await future

    async def _run(self) -> None:
        try:
            while batch := self._next():
                await self._answer(batch)
        finally:
            self._running = None

    def _next(self) -> list[tuple[Sequence[Item], "asyncio.Future[list[Result]]"]]:
        batch: list[tuple[Sequence[Item], asyncio.Future[list[Result]]]] = []
        count = 0
        while self._waiting:
            items, future = self._waiting[0]
            if not future.done():
                if batch and count + len(items) > self._max_items:
                    break
                batch.append((items, future))
                count += len(items)
            self._waiting.popleft()
        return batch

    async def _answer(self, batch: list[tuple[Sequence[Item], "asyncio.Future[list[Result]]"]]) -> None:
        try:
            results = await self._work([item for items, _ in batch for item in items])
        except asyncio.CancelledError:
            for _, future in batch:
                future.cancel()
            raise
        except Exception as error:
            if len(batch) == 1:
                if not batch[0][1].done():
                    batch[0][1].set_exception(error)
                return
            # What one caller asks for must not fail the others.
            for alone in batch:
                await self._answer([alone])
            return
        start = 0
        for items, future in batch:
            if not future.done():
                future.set_result(list(results[start : start + len(items)]))
            start += len(items)
