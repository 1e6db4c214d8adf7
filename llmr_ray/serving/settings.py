"""Settings of a server: from a configuration, `LLMR_SERVE_*` variables and arguments. None changes an artifact."""

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmr_ray.errors import ConfigError

PREFIX = "LLMR_SERVE_"
"""Every setting is read from the environment variable of this prefix and its name in capitals."""

OF_THE_COMMAND = (f"{PREFIX}HOST", f"{PREFIX}PORT")
"""Variables that `llmr serve` alone reads: where the server listens is no part of the application."""


@dataclass(frozen=True, kw_only=True)
class ServingSettings:
    """How a collection is served: what, by how many processes, within which limits."""

    artifact_root: str = ""
    """Where collections and artifacts are; empty: runtime.artifact_root."""
    cache_root: str = ""
    """Where sample models are kept; empty: runtime.cache_root."""
    collection: str = ""
    """Name of the collection below the artifact root; empty: that of the run."""
    model: str = ""
    """The model's name in answers; empty: the collection's."""
    embedder: str = ""
    """The embedder of queries: an asset's name or a folder. Empty: what the snapshot names."""
    reranker: str = ""
    """Folder of a cross-encoder for /v1/rerank, `reward_model` for the run's own, or empty: there is none."""
    reranker_max_tokens: int = 256
    """Of a pair, special tokens included."""
    default_task: str = ""
    """Task of requests that name none; empty: the collection's only task, else such requests are refused."""

    ingress_replicas: int = 1
    """Processes that answer HTTP."""
    encoder_replicas: int = 0
    """Processes that embed queries, at the least. 0: each ingress does it itself, which saves a hop."""
    max_encoder_replicas: int = 0
    """Up to so many are started under load; below encoder_replicas: their number is fixed."""
    encoder_gpus: float = 0.0
    """GPUs of each."""
    shard_groups: int = 0
    """Groups that an index's shards are dealt to, each a deployment. 0: each ingress searches all, without a hop."""
    shard_replicas: int = 1
    """Processes of each group."""
    shard_memory_mb: int = 0
    """MiB that a process reserves which searches shards (of a group, or an ingress), so that Ray puts it on a node with
    as much left; while a snapshot follows another it has both open. 0: Ray places by CPUs alone."""
    encode_threads: int = 1
    search_threads: int = 1
    encode_batch_tokens: int = 8192
    batch_queries: int = 64
    """Queries embedded or searched at once at the most. What comes while a batch is under way makes up the next one."""

    max_body_bytes: int = 2 * 2**20
    """Larger bodies are refused unread (413)."""
    max_text_chars: int = 32_000
    """Of a query, a text to embed or a document to rank."""
    max_texts: int = 64
    """Queries of a request, and texts to embed."""
    max_documents: int = 256
    """Documents to rank in one request."""
    max_top_k: int = 1000
    max_results: int = 3200
    """Queries of a request times its top_k, where texts come with the results: the bound of an answer's length."""
    max_json_depth: int = 32
    max_concurrent: int = 64
    """Requests that an ingress works on at once; more wait."""
    max_queued: int = 1024
    """Requests beyond those that an ingress lets in, to send their bodies or to wait; more are refused (429) unread."""
    max_queued_mb: int = 256
    """MiB of bodies that arrive or wait at an ingress, likewise. A body that is alone is always let in."""
    queue_timeout_s: float = 5.0
    """A request that has waited so long is refused (429)."""
    max_concurrent_per_key: int = 0
    """Requests of one API key that an ingress has let in: that arrive, wait or are worked on; 0: no limit."""
    requests_per_second_per_key: float = 0.0
    """Of one API key at one ingress, with bursts of two seconds' worth; 0: no limit."""
    request_timeout_s: float = 30.0
    """An answer later than this is a 504."""
    body_timeout_s: float = 10.0
    """A body that has not arrived by then is a 408, and the connection is closed."""

    keys_file: str = ""
    """API keys, see `llmr keys`. Empty: everybody may ask."""
    access_log: bool = True
    """One line of JSON for each request; without texts."""

    poll_seconds: float = 1.0
    """How often it is looked which snapshot the collection names as current."""
    load_timeout_s: float = 600.0
    """A snapshot that takes longer to load is given up; the old one stays."""
    num_canaries: int = 8
    """Questions of the collection that are asked of the old and the new snapshot before a switch; 0: none."""
    canary_min_overlap: float = 0.2
    """Least mean share of the ten best documents that both find. Catches a spoiled index, not one that has grown. 0:
    every snapshot may follow another; `llmr index accept` lets a single one."""
    allow_partial: bool = False
    """Where a shard group fails, answer from the others and say so. False: such requests fail (503)."""

    fast: bool = True
    """Serve's throughput-optimised mode behind HAProxy. False: Serve's Python proxy, ten times slower. `llmr serve`
    sets its environment where it starts Ray; a cluster's nodes must start in it (launch.FAST), else the log says so."""

    @classmethod
    def of(cls, values: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> "ServingSettings":
        """Settings from values by name, over those in the environment.

        Args:
            values: strings or values of the right type, as Serve's arguments are.
            environment: what is read in place of os.environ.

        Raises:
            ConfigError: an unknown name, or a value of the wrong type or sign.
        """
        return cls().changed(environment_values(environment)).changed(values)

    def changed(self, values: Mapping[str, Any]) -> "ServingSettings":
        """These settings with some replaced; errors as of `of`."""
        kinds = {item.name: type(getattr(self, item.name)) for item in dataclasses.fields(self)}
        unknown = sorted(set(values) - set(kinds))
        if unknown:
            raise ConfigError(f"unknown serving settings {unknown}. Known: {sorted(kinds)}.")
        return dataclasses.replace(self, **{name: _typed(name, kinds[name], value) for name, value in values.items()})


def environment_values(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """The settings that `LLMR_SERVE_*` variables hold, by name; ConfigError where there is no such setting."""
    environment = os.environ if environment is None else environment
    found = {
        name: value for name, value in environment.items() if name.startswith(PREFIX) and name not in OF_THE_COMMAND
    }
    known = {item.name for item in dataclasses.fields(ServingSettings)}
    names = {name: name.removeprefix(PREFIX).lower() for name in found}
    strangers = sorted(name for name, setting in names.items() if setting not in known)
    if strangers:
        raise ConfigError(f"{strangers} are no settings of the server. Known, after {PREFIX}: {sorted(known)}.")
    return {names[name]: value for name, value in found.items()}


_TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def _typed(name: str, kind: type, value: Any) -> Any:
    try:
        typed: Any
        if kind is bool:
            typed = value if isinstance(value, bool) else _TRUTH[str(value).lower()]
        elif kind is int:
            typed = int(str(value))
        else:
            typed = kind(value)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"serving.{name} must be of the type {kind.__name__}.") from error
    if kind in (int, float) and not 0 <= typed < float("inf"):
        raise ConfigError(f"serving.{name} may not be negative or infinite.")
    return typed
