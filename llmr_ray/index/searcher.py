"""The distributed search: one Ray actor per group of index shards, scatter and gather.

The result is `topk.exact_topk` of the whole corpus, however many shards and actors there are and whichever of them die
on the way.
"""

from collections.abc import Sequence
from types import TracebackType
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayTaskError

from llmr_ray import cluster
from llmr_ray.artifacts import Artifact, ArtifactSpec
from llmr_ray.config import Config
from llmr_ray.errors import DataError, LlmrError
from llmr_ray.index import shards
from llmr_ray.index.shards import Opening
from llmr_ray.index.topk import merge_topk

SEARCH_QUERIES = 1024
"""Queries sent to an actor at once; two such batches are under way, so that actors never wait for the driver."""

WORK_BYTES = 256 << 20
"""Of an actor beside its shards: libraries, queries, candidates."""


class Searcher:
    """A pool of Ray actors that hold an index; use it in a `with` block.

    Args:
        config: for `runtime`.
        index: a finished index.
        encoder: what `vectors.encoder_of` says of the queries' embeddings, to be compared with the index's own.

    Raises:
        DataError: the queries would come from another encoder than the index.
        ResourceError: the actors cannot be placed.
    """

    def __init__(self, config: Config, index: Artifact, *, encoder: str | None = None) -> None:
        made_by = index.require()["extra"]["encoder"]
        if encoder is not None and encoder != made_by:
            raise DataError(
                f"the queries were embedded by {encoder}, but {index.id} by {made_by}. Their scores mean nothing; "
                "search an index of the same encoder."
            )
        runtime = config.runtime
        num_shards = index.require()["num_shards"]
        num_actors = max(1, min(runtime.index_actors, num_shards))
        cluster.require(num_actors, num_actors * runtime.index_gpus, "search")
        groups = [list(range(first, num_shards, num_actors)) for first in range(num_actors)]
        needed = [_memory(index, numbers) for numbers in groups]
        cluster.require_memory(needed, "search")
        self._actors: list[Any] = [
            _ShardGroup.options(  # type: ignore[attr-defined]
                num_cpus=1, num_gpus=runtime.index_gpus, memory=num_bytes
            ).remote(
                str(index.path.parents[1]),
                index.spec,
                numbers,
                Opening(scan=runtime.index_scan, num_threads=runtime.index_threads),
            )
            for numbers, num_bytes in zip(groups, needed, strict=True)
        ]

    def search(self, query_QD: np.ndarray, scopes_Q2: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Exact top-k of each query inside its range of corpus rows, ties by lower row.

        Args:
            query_QD: float32 [Q, D].
            scopes_Q2: int64 [Q, 2], start and end row (exclusive).
            k: results per query.

        Returns:
            rows int64 [Q, k] and scores float32 [Q, k]; row -1 with score -inf where the range has no more documents.
        """
        parts: list[tuple[np.ndarray, np.ndarray]] = []
        waiting: list[list[Any]] = []
        for start in range(0, len(query_QD), SEARCH_QUERIES):
            stop = start + SEARCH_QUERIES
            batch = ray.put((query_QD[start:stop], scopes_Q2[start:stop]))
            waiting.append([actor.search.remote(batch, k) for actor in self._actors])
            if len(waiting) > 1:
                parts.append(merge_topk(_get(waiting.pop(0)), k))
        parts += [merge_topk(_get(results), k) for results in waiting]
        if not parts:
            return np.zeros((0, k), np.int64), np.zeros((0, k), np.float32)
        return np.concatenate([rows for rows, _ in parts]), np.concatenate([scores for _, scores in parts])

    def close(self) -> None:
        """Ends the actors."""
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []

    def __enter__(self) -> "Searcher":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@ray.remote(max_restarts=-1, max_task_retries=-1)
class _ShardGroup:
    """Some shards of an index. A killed one is started again and asked again: searching changes nothing."""

    def __init__(self, root: str, spec: ArtifactSpec, numbers: Sequence[int], how: Opening) -> None:
        shards.set_threads(how.num_threads)
        self._index, self._numbers, self._how = Artifact(root, spec), numbers, how
        self._shards: list[shards.Shard] = []

    def search(self, batch: tuple[np.ndarray, np.ndarray], k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k best of this group's shards."""
        if not self._shards:
            # Not in the constructor: of an error there, the caller learns only that the actor died.
            self._shards = shards.open_shards(self._index, self._numbers, how=self._how)
        return shards.search_all(self._shards, *batch, k)


def _memory(index: Artifact, numbers: Sequence[int]) -> int:
    """Bytes that a group of shards holds: its files, of which 8-bit codes are a quarter more, and room to work."""
    files = index.require()["files"]
    names = [f"files/{name(number)}" for number in numbers for name in (shards.file_name, shards.proposals_name)]
    return WORK_BYTES + sum(files[name]["bytes"] * 5 // 4 for name in names if name in files)


def _get(results: list[Any]) -> list[tuple[np.ndarray, np.ndarray]]:
    """What the actors answered; an error that the user can act on arrives without Ray's stack traces."""
    try:
        found: list[tuple[np.ndarray, np.ndarray]] = ray.get(results)
    except RayTaskError as error:
        if isinstance(error.cause, LlmrError):
            raise error.cause from error
        raise
    return found


def search(
    config: Config,
    index: Artifact,
    query_QD: np.ndarray,
    scopes_Q2: np.ndarray,
    k: int,
    *,
    encoder: str | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """`Searcher.search` with actors that live for this call alone."""
    with Searcher(config, index, encoder=encoder) as searcher:
        return searcher.search(query_QD, scopes_Q2, k)
