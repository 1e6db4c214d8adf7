"""The application as a cluster starts it: by Ray's own `serve run`, and with encoders that follow the load."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from ray import serve

from llmr_ray.cluster import lives
from llmr_ray.config import RuntimeConfig
from llmr_ray.serving.app import build, running
from llmr_ray.serving.gate import Call
from llmr_ray.serving.launch import free_port
from llmr_ray.serving.protocol import to_json
from tests.serving_world import world
from tests.waiting import until

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

SERVICE = Path(__file__).parents[2] / "deploy" / "kuberay" / "rayservice.yaml"
BODY = {"queries": ["a b", "c d e"], "task": "qa", "top_k": 5}


def ids(hits: list[dict[str, Any]]) -> list[str]:
    return [hit["id"] for hit in hits]


def test_the_file_of_the_service_runs_by_rays_own_command(tmp_path: Path) -> None:
    """What KubeRay hands to Serve is this text; a name in it that Serve or the application does not know only shows
    there."""
    docs = world(tmp_path)
    port = free_port()
    config = yaml.safe_load(yaml.safe_load(SERVICE.read_text())["spec"]["serveConfigV2"])
    config["http_options"] |= {"host": "127.0.0.1", "port": port}
    [application] = config["applications"]
    small = {"ingress_replicas": 1, "encoder_replicas": 0, "shard_groups": 0, "shard_memory_mb": 0, "keys_file": ""}
    of_world = {"artifact_root": str(docs.root), "collection": "docs", "cache_root": "", "fast": False}
    application["args"] |= small | of_world
    path, log = tmp_path / "serve.yaml", tmp_path / "log"
    path.write_text(yaml.safe_dump(config))
    command = [str(Path(sys.executable).with_name("serve")), "run", str(path)]
    with log.open("w") as out:
        server = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=os.environ)
    family: list[psutil.Process] = []
    try:

        def is_ready() -> bool:
            assert server.poll() is None, log.read_text()
            try:
                return httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=5).status_code == 200
            except httpx.HTTPError:
                return False

        until(is_ready, 180, log.read_text)
        alone = asyncio.run(docs.service().retrieve(Call(request_id="r", route="retrieve"), to_json(BODY)))
        answer = httpx.post(f"http://127.0.0.1:{port}/v1/retrieve", json=BODY, timeout=30).json()
        assert [ids(hits) for hits in answer["results"]] == [ids(hits) for hits in alone["results"]]
        family = psutil.Process(server.pid).children(recursive=True)
        server.send_signal(signal.SIGINT)
        server.wait(90)
        until(lambda: not any(lives(process) for process in family), 60)
    finally:
        server.kill()
        for process in family:
            if lives(process):
                process.kill()


def test_encoders_follow_the_load(local_ray: RuntimeConfig, tmp_path: Path) -> None:
    """Requests that wait for an encoder are what says that there are too few, and starting one may fail none."""
    docs = world(tmp_path)
    port = free_port()
    codes: Counter[int] = Counter()
    stop = threading.Event()

    def ask() -> None:
        with httpx.Client(timeout=60) as http:
            while not stop.is_set():
                codes[http.post(f"http://127.0.0.1:{port}/v1/retrieve", json=BODY).status_code] += 1

    def encoders() -> int:
        told = serve.status().applications["scaled"].deployments["models"].replica_states
        return int(told.get("RUNNING", 0))

    settings = docs.settings(encoder_replicas=1, max_encoder_replicas=2)
    with running(build(settings), "scaled", "127.0.0.1", port):
        assert encoders() == 1
        clients = [threading.Thread(target=ask, daemon=True) for _ in range(24)]
        for client in clients:
            client.start()
        until(lambda: encoders() == 2, 120)
        time.sleep(2)
        stop.set()
        for client in clients:
            client.join(60)
    assert set(codes) == {200}, codes
    assert codes[200] > 100
