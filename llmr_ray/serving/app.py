"""The Ray Serve application: an ingress that answers HTTP, and deployments for the encoder and groups of shards.

`llmr serve` runs it, and so do `serve run` and `serve deploy` with the import path ``llmr_ray.serving.app:app`` and
settings as arguments:

    serve run llmr_ray.serving.app:app artifact_root=/data/artifacts collection=quickstart shard_groups=2

With no encoder replicas and no shard groups there is the ingress alone: for a small index on one machine a hop between
processes costs more than the work.
"""

import asyncio
import dataclasses
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from llmr_ray.errors import ConfigError, DataError, LlmrError, ResourceError
from llmr_ray.index.filters import Filter
from llmr_ray.index.snapshot import current, folder_of, read_manifest
from llmr_ray.serving import engine
from llmr_ray.serving.api import Service, build_api
from llmr_ray.serving.canaries import canary_queries
from llmr_ray.serving.gate import ACCESS_LOG, Gate
from llmr_ray.serving.keys import KeyRing
from llmr_ray.serving.launch import warn_if_slow
from llmr_ray.serving.metrics import Metrics, merged
from llmr_ray.serving.models import EncoderSpec, PairScorer, Prompted, TextEncoder, encoder_spec
from llmr_ray.serving.protocol import RequestError
from llmr_ray.serving.settings import ServingSettings
from llmr_ray.serving.switching import Switcher

ATTEMPTS = 3
"""How often a deployment is asked. A replica that dies takes what it was asked with it; asking changes nothing."""

KEEP_TIMEOUT_S = 10.0
"""How long shard groups may take to close what is old. It is said again, and nothing new is looked for meanwhile."""

log = logging.getLogger(__name__)


def app(arguments: dict[str, Any]) -> serve.Application:
    """Builds the application from settings by name; `LLMR_SERVE_*` variables stand in for those not given."""
    return build(ServingSettings.of(arguments))


def build(settings: ServingSettings) -> serve.Application:
    """The application of some settings.

    Raises:
        ConfigError: no collection is named.
        DataError: the collection has no snapshot.
    """
    if not settings.collection:
        raise ConfigError("serving.collection names no collection. Give one: collection=NAME.")
    root = str(Path(settings.artifact_root or "artifacts").resolve())
    # Not resolved: where the file is a Kubernetes secret, the link stays and what it points to is replaced.
    keys = str(Path(settings.keys_file).absolute()) if settings.keys_file else ""
    settings = dataclasses.replace(settings, artifact_root=root, keys_file=keys)
    spec = served_spec(settings)
    models = None
    if settings.encoder_replicas:
        models = _deployment(
            _Models,
            "models",
            {"num_cpus": 1, "num_gpus": settings.encoder_gpus},
            settings.batch_queries,
            **_replicas(settings.encoder_replicas, settings.max_encoder_replicas),
        ).bind(settings, spec)
    searching = {"num_cpus": 1, "memory": settings.shard_memory_mb * 2**20}
    groups = [
        _deployment(
            _ShardGroup,
            f"shards-{group}",
            searching,
            settings.batch_queries,
            num_replicas=settings.shard_replicas,
        ).bind(settings, group)
        for group in range(settings.shard_groups)
    ]
    # Beyond what the admission lets in, requests still have to be told so.
    room = 2 * (settings.max_concurrent + settings.max_queued) + 64
    ingress = serve.ingress()(_Ingress)
    needs = {"num_cpus": 1} if groups else searching
    return _deployment(ingress, "ingress", needs, room, num_replicas=settings.ingress_replicas).bind(
        settings, spec, models, groups
    )


def _deployment(
    of: type, name: str, actor_options: dict[str, Any], max_ongoing_requests: int, **replicas: Any
) -> serve.Deployment:
    made: serve.Deployment = serve.deployment(
        name=name,
        ray_actor_options=actor_options,
        max_ongoing_requests=max_ongoing_requests,
        health_check_period_s=2,
        graceful_shutdown_timeout_s=10,
        max_constructor_retry_count=3,
        logging_config=LoggingConfig(enable_access_log=False, log_level="WARNING"),
        **replicas,
    )(of)
    return made


@contextmanager
def running(application: serve.Application, name: str, host: str, port: int) -> Iterator[None]:
    """Runs an application of this module in the Ray that is started, for the block.

    Raises:
        ResourceError: it did not start; the last words of the part that failed are in the message.
    """
    serve.start(http_options={"host": host, "port": port})
    try:
        try:
            serve.run(application, name=name, route_prefix="/")
        except RuntimeError as error:
            said = [line for line in str(error).splitlines() if line.strip()]
            raise ResourceError(f"the server did not start: {said[-1] if said else error}") from error
        yield
    finally:
        if os.environ.get("RAY_ADDRESS"):
            serve.delete(name)  # others may be serving on that cluster
        else:
            serve.shutdown()


def served_spec(settings: ServingSettings) -> EncoderSpec:
    """How the collection's queries are embedded, its embedder found and checked; errors as of encoder_spec."""
    root = Path(settings.artifact_root)
    collection = folder_of(root, settings.collection)
    manifest = read_manifest(collection, current(collection))
    return encoder_spec(root, manifest, settings.embedder, settings.cache_root)


def _replicas(least: int, most: int) -> dict[str, Any]:
    if most <= least:
        return {"num_replicas": least}
    scaling = {"min_replicas": least, "max_replicas": most, "target_ongoing_requests": 4, "upscale_delay_s": 5}
    return {"autoscaling_config": scaling}


def _local_models(settings: ServingSettings, spec: EncoderSpec) -> engine.LocalEncoder:
    encoder = TextEncoder(spec, settings)
    ranker = PairScorer(settings.reranker, settings) if settings.reranker else None
    return engine.LocalEncoder(encoder.encode, ranker.score if ranker else None, settings)


class _Models:
    """The embedder and the reranker in processes of their own."""

    def __init__(self, settings: ServingSettings, spec: EncoderSpec) -> None:
        self._encoder = _local_models(settings, spec)

    async def encode(self, prompted: Sequence[Prompted]) -> np.ndarray:
        """See engine.Encoder."""
        return await self._encoder.encode(prompted)

    async def rank(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """See engine.Encoder."""
        return await self._encoder.rank(pairs)


class _ShardGroup:
    """A group of shards. A new replica opens what is current; other snapshots when they are asked for."""

    def __init__(self, settings: ServingSettings, group: int) -> None:
        self._shards = engine.LocalShards(Path(settings.artifact_root), settings, group, settings.shard_groups)
        try:
            self._shards.opened(current(folder_of(settings.artifact_root, settings.collection)))
        except DataError as error:
            # The ingress may be serving the snapshot before it; that is opened when it is asked for.
            log.error("the current snapshot cannot be opened: %s", error)

    async def load(self, snapshot_id: str, server: str) -> dict[str, Any]:
        """See engine.ShardGroup."""
        return await self._shards.load(snapshot_id, server)

    async def search(
        self, snapshot_id: str, query_QD: np.ndarray, k: int, filters: Sequence[Filter | None]
    ) -> engine.Found:
        """See engine.ShardGroup."""
        return await self._shards.search(snapshot_id, query_QD, k, filters)

    async def keep(self, snapshot_ids: Sequence[str], server: str) -> None:
        """See engine.ShardGroup."""
        await self._shards.keep(snapshot_ids, server)


class _Ingress:
    """Answers HTTP. It starts only if it can serve a snapshot, so that an update to a bad one never takes over."""

    async def __init__(  # type: ignore[misc]
        self,
        settings: ServingSettings,
        spec: EncoderSpec,
        models: DeploymentHandle | None,
        groups: list[DeploymentHandle],
    ) -> None:
        _log_to_stderr()
        warn_if_slow(settings)
        root = Path(settings.artifact_root)
        keys = KeyRing(Path(settings.keys_file)) if settings.keys_file else None
        encoder = _RemoteModels(models) if models else _local_models(settings, spec)
        local = engine.LocalShards(root, settings)
        documents = engine.DocumentStore(root, settings) if groups else local
        shard_groups: list[engine.ShardGroup] = [_RemoteShards(group, settings) for group in groups] or [local]
        self._metrics = Metrics()
        composed = engine.Engine(settings, encoder, shard_groups, documents)
        canaries = canary_queries(root, settings.collection, spec, settings.num_canaries)
        switcher = Switcher(root, settings, composed, spec, canaries, self._metrics.watch)
        await switcher.start()
        gate = Gate(settings, self._metrics, keys, only_local=_is_local())
        self._service = Service(gate, composed, switcher, spec, self._scrape)
        self._watch = asyncio.create_task(switcher.watch())

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_api(self._service)

    async def own_metrics(self) -> tuple[str, str]:
        """This replica's name and metrics."""
        return serve.get_replica_context().replica_id.unique_id, self._service.metrics_text()

    async def _scrape(self) -> str:
        """The metrics of all ingress replicas, whichever of them is asked."""
        context = serve.get_replica_context()
        handle = serve.get_deployment_handle(context.deployment, context.app_name)
        try:
            told = await handle.broadcast("own_metrics").results_async(timeout_s=2, return_exceptions=True)
        except (TimeoutError, RayError) as error:
            log.warning("only this replica's metrics were told: %r", error)
            told = []
        return merged(dict([await self.own_metrics(), *(pair for pair in told if isinstance(pair, tuple))]))


def _is_local() -> bool:
    """Whether the server is to be asked from its own machine alone; `llmr serve` says so to its replicas."""
    return os.environ.get(ONLY_LOCAL) == "1"


ONLY_LOCAL = "LLMR_ONLY_LOCAL"


def _log_to_stderr() -> None:
    """Request logs as they are, one line of JSON each, into the replica's stderr, which Ray keeps in a file.

    Not into sys.stderr, which Serve replaces: that looks at the whole stack, and at every source file in it, for each
    line, which took a fifth of the ingress's time.
    """
    handler = logging.StreamHandler(sys.__stderr__)
    handler.setFormatter(logging.Formatter("%(message)s"))
    access = logging.getLogger(ACCESS_LOG)
    access.handlers, access.propagate = [handler], False
    access.setLevel(logging.INFO)


# --- asking deployments ----------------------------------------------------------------------------------------------


class _RemoteModels:
    """engine.Encoder by a deployment."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def encode(self, prompted: Sequence[Prompted]) -> np.ndarray:
        vectors: np.ndarray = await _asked(self._handle, "encode", list(prompted))
        return vectors

    async def rank(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        logits: np.ndarray = await _asked(self._handle, "rank", list(pairs))
        return logits


class _RemoteShards:
    """engine.ShardGroup by a deployment, of which every replica holds the same shards."""

    def __init__(self, handle: DeploymentHandle, settings: ServingSettings) -> None:
        self._handle, self._settings = handle, settings

    async def load(self, snapshot_id: str, server: str) -> dict[str, Any]:
        # One answer first: it waits for a replica where there is none yet.
        one: dict[str, Any] = await _asked(self._handle, "load", snapshot_id, server)
        every = await _by_all(self._handle, self._settings.load_timeout_s, "load", snapshot_id, server)
        if any(what != one for what in every):
            raise DataError("replicas of a shard group read different snapshots under one id.")
        return one

    async def search(
        self, snapshot_id: str, query_QD: np.ndarray, k: int, filters: Sequence[Filter | None]
    ) -> engine.Found:
        found: engine.Found = await _asked(self._handle, "search", snapshot_id, query_QD, k, list(filters))
        return found

    async def keep(self, snapshot_ids: Sequence[str], server: str) -> None:
        await _by_all(self._handle, KEEP_TIMEOUT_S, "keep", list(snapshot_ids), server)


async def _asked(handle: DeploymentHandle, method: str, *arguments: Any) -> Any:
    """What one replica answers; another is asked where one dies."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return await getattr(handle, method).remote(*arguments)
        except (BackPressureError, DeploymentUnavailableError) as error:
            raise RequestError(503, "a part of the server is busy.", code="unavailable", retry_after=2) from error
        except RayTaskError as error:
            raise _cause(error) from None
        except RayError:
            if attempt == ATTEMPTS:
                raise RequestError(
                    503, "a part of the server is not there.", code="unavailable", retry_after=2
                ) from None
            await asyncio.sleep(0.05 * attempt)
    raise AssertionError("unreachable")


async def _by_all(handle: DeploymentHandle, seconds: float, method: str, *arguments: Any) -> list[Any]:
    """What all replicas answer."""
    try:
        return await handle.broadcast(method, *arguments).results_async(timeout_s=seconds)
    except RayTaskError as error:
        raise _cause(error) from None


def _cause(error: RayTaskError) -> Exception:
    """An error as it was raised in the replica, without Ray's stack traces."""
    cause = error.cause
    return cause if isinstance(cause, LlmrError | RequestError) else error
