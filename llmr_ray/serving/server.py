"""`llmr serve`: a local Ray and the application in it, until it is stopped."""

import json
import os
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

from llmr_ray import cluster, stopping
from llmr_ray.config import Config, RuntimeConfig
from llmr_ray.errors import ResourceError
from llmr_ray.index import collection
from llmr_ray.index.snapshot import folder_of
from llmr_ray.serving import launch
from llmr_ray.serving.settings import ServingSettings

READY_SECONDS = 300.0
"""How long a server may take from its start to its first answer."""


def published(source: Path, overrides: list[str], config: Config, settings: ServingSettings) -> ServingSettings:
    """Sees to it that there is a collection, and finds the run's reward model where it is asked for.

    Args:
        source: the run's configuration file.
        overrides: settings that go with it.
        config: what they come to.
        settings: how the run is to be served.

    Raises:
        DataError: the run's index is not finished.
        ConfigError: the run has no reward model that could rank for clients.
    """
    exists = (folder_of(settings.artifact_root, settings.collection) / "CURRENT").exists()
    if exists and settings.reranker != "reward_model":
        return settings
    from llmr_ray.pipeline import Pipeline, index_of

    if not exists:
        index, model, root = index_of(str(source), overrides, "trained")
        index.require()
        collection.create(root, settings.collection, index.id, model=model)
    if settings.reranker == "reward_model":
        trained = Pipeline(config).by_name.get("reward_model")
        folder = trained.artifact.file("reward_model") if trained else Path()
        settings = launch.with_reward_model(config, settings, folder)
    return settings


def run_server(
    runtime: RuntimeConfig, settings: ServingSettings, host: str, port: int, command: str, *, is_local: bool
) -> None:
    """Serves until SIGTERM or Ctrl-C.

    Args:
        runtime: of the local Ray.
        settings: what is served and how.
        host: the address to listen at.
        port: the port, which is free.
        command: that repeats this.
        is_local: the address is this machine's alone.

    Raises:
        DataError: the collection has no snapshot that can be served.
        ResourceError: the server did not come up.
    """
    if is_local:
        os.environ["LLMR_ONLY_LOCAL"] = "1"
    if not os.environ.get("RAY_ADDRESS"):
        launch.prepare(fast=settings.fast)
    # Serve reads the environment when it is first imported.
    from llmr_ray.serving.app import build, running

    application = build(settings)
    with stopping.stoppable(command), cluster.or_lost(command):
        cluster.start(runtime)
        with running(application, settings.collection, host, port):
            reachable = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
            url = f"http://{reachable}:{port}"
            ready = _await_ready(url)
            print(f"serving {settings.collection}, snapshot {ready['index_snapshot']}, at {url}", flush=True)
            threading.Event().wait()


def _await_ready(url: str) -> dict[str, str]:
    deadline = time.monotonic() + READY_SECONDS
    said = "nothing"
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{url}/readyz", timeout=5) as answer:
                ready: dict[str, str] = json.load(answer)
                return ready
        except (urllib.error.URLError, OSError, ValueError) as error:
            said = str(error)
        time.sleep(0.2)
    raise ResourceError(f"the server at {url} did not get ready within {READY_SECONDS:.0f} s (it said: {said}).")
