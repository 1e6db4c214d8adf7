"""Batches of what is asked at the same time: nobody waits for a batch to fill, what comes during one makes up the next.

A timer would add its length to every answer of an idle server and still not fill the batches of a busy one. A batch
that has begun cannot be stopped, so its size is limited: who asks for much is served in slices, between which others
have their turn and the work of those who left ends.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass
class _Caller(Generic[Item, Result]):
    """Who waits for the results of some items, and those that are there already: of the first items."""

    items: Sequence[Item]
    sizes: list[int]
    future: "asyncio.Future[list[Result]]"
    results: list[Result] = field(default_factory=list)


class Batcher(Generic[Item, Result]):
    """Puts items of concurrent callers together.

    Args:
        work: results of a batch's items, in their order. One batch is under way at a time.
        room: what the sizes of a batch's items may add up to; an item that is larger makes up a batch alone.
        size: of an item, at least 1; without it, batches are of up to `room` items.
    """

    def __init__(
        self,
        work: Callable[[list[Item]], Awaitable[Sequence[Result]]],
        room: int,
        size: Callable[[Item], int] = lambda _: 1,
    ) -> None:
        self._work, self._room, self._size = work, room, size
        self._waiting: deque[_Caller[Item, Result]] = deque()
        self._running: asyncio.Task[None] | None = None

    async def submit(self, items: Sequence[Item]) -> list[Result]:
        """The results of a caller's items. A caller that is cancelled costs no more than the batch under way."""
        if not items:
            return []
        future: asyncio.Future[list[Result]] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Caller(items, list(map(self._size, items)), future))
        if self._running is None:
            self._running = asyncio.create_task(self._run())
        return await future

    async def _run(self) -> None:
        try:
            while batch := self._next():
                await self._answer(batch)
                # Behind those who came meanwhile, so that much work of one holds nobody up for longer than a batch.
                self._waiting.extend(caller for caller, _ in batch if not caller.future.done())
        finally:
            self._running = None

    def _next(self) -> list[tuple[_Caller[Item, Result], Sequence[Item]]]:
        """Callers in turn, each with the items that are its part of the batch."""
        batch: list[tuple[_Caller[Item, Result], Sequence[Item]]] = []
        left = self._room
        while self._waiting:
            caller = self._waiting[0]
            if not caller.future.done():
                start = end = len(caller.results)
                while end < len(caller.items) and (caller.sizes[end] <= left or (end == start and not batch)):
                    left -= caller.sizes[end]
                    end += 1
                if end == start:
                    break
                batch.append((caller, caller.items[start:end]))
            self._waiting.popleft()
        return batch

    async def _answer(self, batch: list[tuple[_Caller[Item, Result], Sequence[Item]]]) -> None:
        try:
            results = await self._work([item for _, items in batch for item in items])
        except asyncio.CancelledError:
            for caller, _ in batch:
                caller.future.cancel()
            raise
        except Exception as error:
            if len(batch) == 1:
                if not batch[0][0].future.done():
                    batch[0][0].future.set_exception(error)
                return
            # What one caller asks for must not fail the others.
            for alone in batch:
                await self._answer([alone])
            return
        start = 0
        for caller, items in batch:
            caller.results.extend(results[start : start + len(items)])
            start += len(items)
            if len(caller.results) == len(caller.items) and not caller.future.done():
                caller.future.set_result(caller.results)
