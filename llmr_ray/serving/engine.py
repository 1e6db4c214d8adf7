"""What a retrieval is made of: encode, search every shard group, merge, read the documents. No Ray, no HTTP.

Encoder, reranker and shard groups are in this process or behind deployments of their own (app.py); the answers are the
same. Every part of a request names the snapshot that was chosen when it came in, so no answer mixes two.

Shape suffixes: Q queries of a request, D embedding, K results.
"""

import asyncio
import logging
import secrets
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from llmr_ray.errors import DataError
from llmr_ray.index import shards
from llmr_ray.index.filters import Filter
from llmr_ray.index.snapshot import OpenSnapshot
from llmr_ray.index.topk import MISSING, merge_topk
from llmr_ray.serving.batching import Batcher
from llmr_ray.serving.models import Prompted
from llmr_ray.serving.protocol import Hit, RequestError
from llmr_ray.serving.settings import ServingSettings

log = logging.getLogger(__name__)

Found = tuple[np.ndarray, np.ndarray]
"""Rows int64 [Q, K] of a snapshot and their scores float32 [Q, K], as topk.py says."""


class Encoder(Protocol):
    """Embeds queries."""

    async def encode(self, prompted: Sequence[Prompted]) -> np.ndarray:
        """float32 [Q, D]."""

    async def rank(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """Logits of pairs of a query and a document: float32 [n]."""


class ShardGroup(Protocol):
    """Holds some shards of several snapshots side by side. Servers that share it may each serve another one."""

    async def load(self, snapshot_id: str, server: str) -> dict[str, Any]:
        """Opens a snapshot in every process of the group, and says what it is: encoder, dimension, num_documents.

        It stays open at least until the server that asks says what it wants kept.
        """

    async def search(self, snapshot_id: str, query_QD: np.ndarray, k: int, filters: Sequence[Filter | None]) -> Found:
        """The k best of the group's shards, opening the snapshot first where it is not."""

    async def keep(self, snapshot_ids: Sequence[str], server: str) -> None:
        """Closes all snapshots but these and those that other servers want kept."""


class LocalEncoder:
    """Models in this process, with the texts of concurrent requests in one batch.

    Embedder and reranker have a thread each: ranking takes seconds, for which no query should wait. Both work in slices
    of about `encode_batch_tokens` tokens.
    """

    def __init__(
        self,
        encode: Callable[[Sequence[Prompted]], np.ndarray],
        rank: Callable[[Sequence[tuple[str, str]]], np.ndarray] | None,
        settings: ServingSettings,
    ) -> None:
        room = settings.encode_batch_tokens
        least = max(1, room // max(1, settings.batch_queries))  # so that there are no more than batch_queries
        self._encode: Batcher[Prompted, np.ndarray] = Batcher(
            _in_thread(encode, "encode"),
            room,
            lambda prompted: max(least, min(prompted[2], _num_tokens(prompted[0]) + _num_tokens(prompted[1]))),
        )
        self._rank: Batcher[tuple[str, str], float] | None = None
        if rank is not None:
            most = settings.reranker_max_tokens
            self._rank = Batcher(
                _in_thread(rank, "rank"), room, lambda pair: max(1, min(most, sum(map(_num_tokens, pair))))
            )

    async def encode(self, prompted: Sequence[Prompted]) -> np.ndarray:
        """float32 [Q, D]."""
        return np.stack(await self._encode.submit(prompted))

    async def rank(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """float32 [n]."""
        if self._rank is None:
            raise RequestError(404, "this server has no model to rank with.", code="model_not_found")
        return np.asarray(await self._rank.submit(pairs), np.float32)


def _num_tokens(text: str) -> int:
    """About how many tokens a text has; rather too many, as some scripts have a token for each character."""
    return len(text) // 2


def _in_thread(work: Callable[[Any], Any], name: str) -> Callable[[list[Any]], Awaitable[Any]]:
    """Work that is done in a thread of its own."""
    thread = ThreadPoolExecutor(1, name)

    async def run(items: list[Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(thread, work, items)

    return run


class DocumentStore:
    """A collection's snapshots in this process without their vectors: texts come from Parquet when they are asked for.

    Args:
        root: the artifact root.
        settings: of the server.
    """

    def __init__(self, root: Path, settings: ServingSettings) -> None:
        self._root, self._settings = root, settings
        self._open: dict[str, OpenSnapshot] = {}
        self._kept: dict[str, tuple[float, set[str]]] = {}
        """Of each server: until when it is heeded, as it may have died, and which snapshots it wants kept."""
        self._locks: dict[str, threading.Lock] = {}
        self._loader = ThreadPoolExecutor(1, "load")

    def opened(self, snapshot_id: str) -> OpenSnapshot:
        """A snapshot, opened and checked once; DataError where it cannot be."""
        with self._locks.setdefault(snapshot_id, threading.Lock()):
            if snapshot_id not in self._open:
                self._open[snapshot_id] = self._opened(snapshot_id)
            return self._open[snapshot_id]

    def _opened(self, snapshot_id: str) -> OpenSnapshot:
        return OpenSnapshot(self._root, self._settings.collection, snapshot_id, shards=())

    async def load(self, snapshot_id: str, server: str) -> dict[str, Any]:
        """See ShardGroup. Searches go on meanwhile, in another thread."""
        _, kept = self._kept.get(server, (0.0, set()))
        self._keep(kept | {snapshot_id}, server)
        snapshot = await self.snapshot(snapshot_id)
        return {
            "encoder": snapshot.encoder,
            "dimension": snapshot.dimension,
            "num_documents": snapshot.num_documents,
            "num_shards": snapshot.num_shards,
        }

    async def snapshot(self, snapshot_id: str) -> OpenSnapshot:
        """An opened snapshot."""
        if (snapshot := self._open.get(snapshot_id)) is not None:
            return snapshot
        return await asyncio.get_running_loop().run_in_executor(self._loader, self.opened, snapshot_id)

    async def keep(self, snapshot_ids: Sequence[str], server: str) -> None:
        """See ShardGroup. Who reads or searches a snapshot holds it."""
        self._keep(set(snapshot_ids), server)
        now = time.monotonic()
        self._kept = {name: (until, kept) for name, (until, kept) in self._kept.items() if until > now}
        for snapshot_id in set(self._open).difference(*(kept for _, kept in self._kept.values())):
            del self._open[snapshot_id]

    def _keep(self, snapshot_ids: set[str], server: str) -> None:
        # A server that loads a snapshot says nothing meanwhile, and then compares it for as long at the most.
        self._kept[server] = (time.monotonic() + 2 * self._settings.load_timeout_s, snapshot_ids)


class LocalShards(DocumentStore):
    """Some shards of a collection's snapshots in this process, and its documents.

    Args:
        root: the artifact root.
        settings: of the server.
        group: which of `groups` this is; it holds every `groups`-th shard.
    """

    def __init__(self, root: Path, settings: ServingSettings, group: int = 0, groups: int = 1) -> None:
        super().__init__(root, settings)
        self._group, self._groups = group, groups
        self._searcher = ThreadPoolExecutor(1, "search")
        self._batchers: dict[str, Batcher[tuple[np.ndarray, Filter | None, int], Found]] = {}
        shards.set_threads(settings.search_threads)

    def _opened(self, snapshot_id: str) -> OpenSnapshot:
        place = (self._root, self._settings.collection, snapshot_id)
        numbers = None
        if self._groups > 1:
            numbers = range(self._group, super()._opened(snapshot_id).num_shards, self._groups)
        snapshot = OpenSnapshot(*place, shards=numbers, num_threads=self._settings.search_threads)
        # Here, in the loader's thread: it takes seconds, and the first search with a filter would hold up all others.
        snapshot.read_attributes()
        return snapshot

    async def search(self, snapshot_id: str, query_QD: np.ndarray, k: int, filters: Sequence[Filter | None]) -> Found:
        """See ShardGroup. Queries of concurrent requests are searched for together."""
        await self.snapshot(snapshot_id)  # an error in opening it is none of a batch
        batcher = self._batchers.get(snapshot_id)
        if batcher is None:
            batcher = self._batchers[snapshot_id] = Batcher(
                lambda items: self._search(snapshot_id, items), self._settings.batch_queries
            )
        found = await batcher.submit([(query_D, chosen, k) for query_D, chosen in zip(query_QD, filters, strict=True)])
        return np.stack([rows for rows, _ in found]), np.stack([scores for _, scores in found])

    async def _search(self, snapshot_id: str, items: list[tuple[np.ndarray, Filter | None, int]]) -> list[Found]:
        snapshot = await self.snapshot(snapshot_id)
        return await asyncio.get_running_loop().run_in_executor(self._searcher, _found, snapshot, items)

    async def keep(self, snapshot_ids: Sequence[str], server: str) -> None:
        """See ShardGroup."""
        await super().keep(snapshot_ids, server)
        for snapshot_id in set(self._batchers) - set(self._open):
            del self._batchers[snapshot_id]


def _found(snapshot: OpenSnapshot, items: list[tuple[np.ndarray, Filter | None, int]]) -> list[Found]:
    """What each query of a batch, with its filter and its k, finds."""
    deepest = max(k for _, _, k in items)
    together: dict[int, list[int]] = {}
    for at, (_, _, k) in enumerate(items):
        # What an approximate index proposes depends on k, and nobody's answer may depend on who asks beside them. Of an
        # exact one, the k best of more than k are the first k: ties have an order.
        together.setdefault(k if snapshot.is_approximate else deepest, []).append(at)
    found: dict[int, Found] = {}
    for k, members in together.items():
        query_QD = np.stack([items[at][0] for at in members])
        rows_QK, scores_QK = snapshot.search(query_QD, k, allowed=[items[at][1] for at in members])
        found |= {at: (rows_QK[row], scores_QK[row]) for row, at in enumerate(members)}
    return [(found[at][0][:k], found[at][1][:k]) for at, (_, _, k) in enumerate(items)]


@dataclass(frozen=True, kw_only=True)
class Retrieved:
    """The answer to a retrieval: hits of each query, best first."""

    snapshot_id: str
    hits: list[list[Hit]]
    partial: bool = False
    seconds: dict[str, float] = field(default_factory=dict)


class Engine:
    """Composes a server's parts.

    Args:
        settings: of the server.
        encoder: embeds queries.
        groups: hold all shards between them.
        documents: of the same collection; with one local group, that group itself.
    """

    def __init__(
        self, settings: ServingSettings, encoder: Encoder, groups: Sequence[ShardGroup], documents: DocumentStore
    ) -> None:
        self.settings, self.encoder, self.groups, self._documents = settings, encoder, list(groups), documents
        self._readers = ThreadPoolExecutor(2, "documents")
        self._name = secrets.token_hex(8)
        self.groups_failed = 0
        """Of the latest search, also of one that failed for them."""

    async def load(self, snapshot_id: str) -> dict[str, Any]:
        """Opens a snapshot everywhere; the first error ends it. Says what the snapshot is, as all its parts agree."""
        parts = await asyncio.gather(
            self._documents.load(snapshot_id, self._name),
            *(group.load(snapshot_id, self._name) for group in self.groups),
        )
        if any(part != parts[0] for part in parts[1:]):
            raise DataError("the shard groups read different snapshots under one id; their storage is not shared.")
        return parts[0]

    async def keep(self, snapshot_ids: Sequence[str]) -> None:
        """Closes all other snapshots everywhere, but those that other servers want kept."""
        parts: list[DocumentStore | ShardGroup] = [self._documents, *self.groups]
        closed = (part.keep(snapshot_ids, self._name) for part in parts)
        for result in await asyncio.gather(*closed, return_exceptions=True):
            if isinstance(result, BaseException):
                log.warning("a shard group could not close old snapshots: %r", result)

    async def search(self, snapshot_id: str, query_QD: np.ndarray, k: int, filters: Sequence[Filter | None]) -> Found:
        """The k best of a snapshot for each query, whole or not at all."""
        found, _ = await self._scatter(snapshot_id, query_QD, k, filters, partial=False)
        return found

    async def _scatter(
        self, snapshot_id: str, query_QD: np.ndarray, k: int, filters: Sequence[Filter | None], *, partial: bool
    ) -> tuple[Found, bool]:
        searches = [group.search(snapshot_id, query_QD, k, filters) for group in self.groups]
        parts = await asyncio.gather(*searches, return_exceptions=True)
        failed = [part for part in parts if isinstance(part, BaseException)]
        self.groups_failed = len(failed)
        if failed and (not partial or len(failed) == len(parts)):
            raise failed[0]
        return merge_topk([part for part in parts if not isinstance(part, BaseException)], k), bool(failed)

    async def retrieve(
        self,
        snapshot_id: str,
        prompted: Sequence[Prompted],
        k: int,
        chosen: Filter | None,
        *,
        with_text: bool,
        min_score: float | None = None,
    ) -> Retrieved:
        """Finds the k best documents of each query among those that the filter lets through.

        Args:
            snapshot_id: what to search.
            prompted: Q queries.
            k: results of each at the most.
            chosen: a filter, applied before the search.
            with_text: read the documents' texts.
            min_score: leave out documents with a lower retrieval score.
        """
        times = [time.perf_counter()]
        query_QD = await self.encoder.encode(prompted)
        times.append(time.perf_counter())
        filters = [chosen] * len(prompted)
        allow = self.settings.allow_partial
        (rows_QK, scores_QK), partial = await self._scatter(snapshot_id, query_QD, k, filters, partial=allow)
        times.append(time.perf_counter())
        hits = await self._hits(snapshot_id, rows_QK, scores_QK, with_text=with_text, min_score=min_score)
        times.append(time.perf_counter())
        seconds = dict(zip(("encode", "search", "fetch"), np.diff(times).tolist(), strict=True))
        return Retrieved(snapshot_id=snapshot_id, hits=hits, partial=partial, seconds=seconds)

    async def _hits(
        self, snapshot_id: str, rows_QK: np.ndarray, scores_QK: np.ndarray, *, with_text: bool, min_score: float | None
    ) -> list[list[Hit]]:
        found_QK = rows_QK != MISSING
        if min_score is not None:
            found_QK &= scores_QK >= min_score
        rows, places = np.unique(rows_QK[found_QK], return_inverse=True)
        if not len(rows):
            return [[] for _ in rows_QK]
        snapshot = await self._documents.snapshot(snapshot_id)

        def read() -> list[Any]:
            return snapshot.documents(rows.tolist(), with_text=with_text)

        documents = await asyncio.get_running_loop().run_in_executor(self._readers, read)
        of_hit, scores = iter(places.tolist()), iter(scores_QK[found_QK].tolist())
        hits = []
        for count in found_QK.sum(axis=1).tolist():
            hits.append([_hit(documents[next(of_hit)], next(scores)) for _ in range(count)])
        return hits

    async def doc_ids(self, snapshot_id: str, rows_QK: np.ndarray) -> list[list[str]]:
        """The ids of found rows, query by query."""
        hits = await self._hits(
            snapshot_id, rows_QK, np.zeros(rows_QK.shape, np.float32), with_text=False, min_score=None
        )
        return [[hit.doc_id for hit in of_query] for of_query in hits]


def _hit(document: Any, score: float) -> Hit:
    return Hit(
        doc_id=document.doc_id,
        retrieval_score=score,
        title=document.title,
        text=document.text,
        metadata=document.metadata,
    )
