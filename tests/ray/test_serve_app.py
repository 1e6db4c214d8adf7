"""The Serve application: an ingress, a deployment of models and two shard groups, over real HTTP."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import psutil
import pytest
import ray
from ray import serve

from llmr_ray.clients import Client
from llmr_ray.config import RuntimeConfig
from llmr_ray.serving.app import build, running
from llmr_ray.serving.launch import free_port
from tests.serving_world import World, world
from tests.waiting import until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

BODY = {"queries": ["a b", "c d e", "j"], "task": "qa", "top_k": 12}

HTTP = httpx.Client(timeout=60)


@dataclass
class Served:
    docs: World
    url: str

    def ask(self, **changes: Any) -> dict[str, Any]:
        answer = HTTP.post(f"{self.url}/v1/retrieve", json=BODY | changes)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def wait_for(self, snapshot: str, key: str = "index_snapshot") -> None:
        """Until a snapshot is served (or refused)."""
        until(
            lambda: HTTP.get(f"{self.url}/readyz").json().get(key) == snapshot,
            60,
            lambda: HTTP.get(f"{self.url}/info").text,
        )


@pytest.fixture(scope="module")
def served(local_ray: RuntimeConfig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    docs = world(tmp_path_factory.mktemp("served"))
    port = free_port()
    settings = docs.settings(
        encoder_replicas=1,
        shard_groups=2,
        shard_memory_mb=100,
        ingress_replicas=2,
        canary_min_overlap=0.05,
        max_queued=100_000,
    )
    with running(build(settings), "docs", "127.0.0.1", port):
        yield Served(docs, f"http://127.0.0.1:{port}")


@dataclass
class Load:
    """Clients that ask until they are told to stop, each on a connection of its own; every answer is counted."""

    served: Served
    clients: int = 4
    codes: Counter[int | str] = field(default_factory=Counter)
    answers: list[tuple[float, dict[str, Any]]] = field(default_factory=list)

    def __enter__(self) -> "Load":
        self._stop, self._started = threading.Event(), time.monotonic()
        self._threads = [threading.Thread(target=self._ask, daemon=True) for _ in range(self.clients)]
        for thread in self._threads:
            thread.start()
        return self

    def _ask(self) -> None:
        with httpx.Client(timeout=60) as http:
            while not self._stop.is_set():
                try:
                    answer = http.post(f"{self.served.url}/v1/retrieve", json=BODY)
                except httpx.HTTPError as error:
                    self.codes[f"{type(error).__name__}: {error}, after {time.monotonic() - self._started:.1f} s"] += 1
                    continue
                self.codes[answer.status_code] += 1
                if answer.status_code == 200:
                    self.answers.append((time.monotonic(), answer.json()))

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)

    def assert_whole(self, expected: dict[str, list[list[dict[str, Any]]]]) -> None:
        """Every answer is complete and that of the one snapshot it names."""
        for _, answer in self.answers:
            assert answer["partial"] is False
            for mine, theirs in zip(answer["results"], expected[answer["index_snapshot"]], strict=True):
                assert [hit["id"] for hit in mine] == [hit["id"] for hit in theirs]


def test_shards_reserve_the_memory_that_they_are_said_to_need(served: Served) -> None:
    """Placed by CPUs alone, the groups of an index too large for one node may all be put there."""
    reserved = ray.cluster_resources()["memory"] - ray.available_resources()["memory"]
    assert reserved == pytest.approx(2 * 100 * 2**20, rel=0.01)


def test_deployments_answer_as_one_process(served: Served) -> None:
    """How the work is spread over processes may change no answer."""
    from llmr_ray.serving.gate import Call
    from llmr_ray.serving.protocol import to_json

    alone = served.docs.service()
    import asyncio

    for changes in (
        {},
        {"task": "chat", "top_k": 60},
        {"filter": {"type": "eq", "key": "lang", "value": "en"}, "with_text": False},
        {"filter": {"must": [{"key": "position", "range": {"lt": 4}}]}},
    ):
        expected = asyncio.run(alone.retrieve(Call(request_id="r", route="retrieve"), to_json(BODY | changes)))
        answer = served.ask(**changes)
        for mine, theirs in zip(answer["results"], expected["results"], strict=True):
            assert [hit["id"] for hit in mine] == [hit["id"] for hit in theirs]
            np.testing.assert_allclose([hit["score"] for hit in mine], [hit["score"] for hit in theirs], atol=1e-6)
            assert [hit.get("text") for hit in mine] == [hit.get("text") for hit in theirs]


def test_the_official_client_and_errors_through_serve(served: Served) -> None:
    """Serve's proxy stands between; it must pass errors on as they are."""
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
    answer = client.embeddings.create(model="docs/qa-query", input=["a b", "c"])
    np.testing.assert_allclose(np.linalg.norm([row.embedding for row in answer.data], axis=1), 1, atol=1e-5)
    for body, status in (
        (b'{"query": "zanzibar", "task": "qa", "min_score": NaN}', 400),
        (b'{"query": "zanzibar \\ud800", "task": "qa"}', 422),
        (b"a" * 20_000_000, 413),
        (b'{"query": "a", "task": "zanzibar"}', 422),
    ):
        headers = {"content-type": "application/json"}
        answer = HTTP.post(f"{served.url}/v1/retrieve", content=body, headers=headers)
        assert answer.status_code == status
        assert "zanzibar" not in answer.text
        assert answer.json()["error"]["request_id"]
    assert HTTP.get(f"{served.url}/nowhere").json()["error"]["code"] == "not_found"


def test_metrics_are_those_of_every_ingress(served: Served) -> None:
    """A page of one replica, drawn by chance, shows counters that jump back and forth."""
    served.ask()
    text = HTTP.get(f"{served.url}/metrics").text
    lines = [line for line in text.splitlines() if line.startswith("llmr_index_documents{")]
    assert len({line.partition('replica="')[2].partition('"')[0] for line in lines}) == 2
    assert {line.rsplit(" ")[-1] for line in lines} == {"60.0"}


def test_no_request_fails_while_snapshots_change(served: Served) -> None:
    """Every answer must be whole, of one snapshot, and name the right one; a damaged one must not be answered from."""
    docs = served.docs
    first = docs.current
    expected = {first: served.ask()["results"]}
    with Load(served) as load:
        for seed in (1, 2):
            new = docs.add(40, seed)
            served.wait_for(new)
            time.sleep(1.0)  # the other ingress too
            expected[new] = served.ask()["results"]
            assert served.ask()["index_snapshot"] == new
        back = docs.rollback()
        served.wait_for(back)
        time.sleep(1.0)
        bad = docs.replace(seed=5)
        served.wait_for(bad, "refused_snapshot")
        assert served.ask()["index_snapshot"] == back
        docs.rollback()
        time.sleep(1.0)
    assert set(load.codes) == {200}
    assert load.codes[200] >= 20
    seen = {answer["index_snapshot"] for _, answer in load.answers}
    assert seen == set(expected)
    load.assert_whole(expected)


def replicas(deployment: str) -> list[psutil.Process]:
    """The processes of a deployment's replicas."""
    found = []
    for process in psutil.process_iter(["name", "cmdline", "ppid"]):
        words = " ".join(process.info["cmdline"] or [])
        if words.startswith(f"ray::ServeReplica:docs:{deployment}") and _is_ours(process):
            found.append(process)
    return found


def _is_ours(process: psutil.Process) -> bool:
    """Another Ray of the machine may serve a collection of the same name."""
    mine = ray.get_runtime_context().get_node_id()
    return mine in " ".join(psutil.Process(process.ppid()).cmdline()) or any(
        parent.pid == os.getpid() for parent in process.parents()
    )


@pytest.mark.slow
@pytest.mark.parametrize("deployment", ["models", "shards-1"])
def test_requests_wait_for_the_only_replica_of_a_part(served: Served, deployment: str) -> None:
    """Where a part has one process, its loss must cost time, or at the worst an answer that says to come again."""
    before = {process.pid for process in replicas(deployment)}
    assert before
    with Load(served) as load:
        time.sleep(2)
        os.kill(min(before), signal.SIGKILL)

        def replaced() -> bool:
            now = {process.pid for process in replicas(deployment)}
            return len(now) == len(before) and now != before

        until(replaced, 120)
        time.sleep(2)
    assert set(load.codes) <= {200, 503, 504}, load.codes
    served.ask()


@pytest.mark.slow
def test_a_killed_controller_costs_no_request(served: Served) -> None:
    """Serve's controller only manages; requests go on without it and it comes back."""
    [controller] = [
        process for process in psutil.process_iter(["cmdline"])
        if " ".join(process.info["cmdline"] or []).startswith("ray::ServeController") and _is_ours(process)
    ]  # fmt: skip
    with Load(served) as load:
        time.sleep(1)
        controller.kill()
        time.sleep(10)
    assert set(load.codes) == {200}
    until(lambda: serve.status().applications["docs"].status == "RUNNING", 120)


@pytest.mark.slow
def test_a_replica_killed_during_a_switch_mixes_no_snapshots(served: Served) -> None:
    """One shard group at the new snapshot and one at the old would answer with half of each."""
    docs = served.docs
    old = docs.current
    expected = {old: served.ask()["results"]}
    [before] = [process.pid for process in replicas("shards-1")]
    with Load(served) as load:
        time.sleep(1)
        new = docs.add(40, seed=11)
        os.kill(before, signal.SIGKILL)
        served.wait_for(new)
        until(lambda: {process.pid for process in replicas("shards-1")} - {before}, 120)
        time.sleep(3)
        settled = len(load.answers)
        until(lambda: len(load.answers) >= settled + 500, 60)
    expected[new] = served.ask()["results"]
    assert set(load.codes) <= {200, 503, 504}, load.codes
    assert {answer["index_snapshot"] for _, answer in load.answers[settled:]} == {new}
    load.assert_whole(expected)


FAST = """
import sys
from llmr_ray.config import RuntimeConfig
from llmr_ray.serving.server import run_server
from llmr_ray.serving.settings import ServingSettings
settings = ServingSettings(artifact_root=sys.argv[1], collection="docs", ingress_replicas=2, poll_seconds=0.1)
run_server(RuntimeConfig(object_store_mb=100), settings, "127.0.0.1", int(sys.argv[2]), "again", is_local=True)
"""


@dataclass
class Fast(Served):
    """A server in a process of its own, in Serve's throughput-optimised mode."""

    server: psutil.Process

    def processes(self, title: str) -> set[int]:
        """The processes of this server whose command line has the words of `title`."""
        return {process.pid for process in self.server.children(recursive=True) if title in _title(process)}


@pytest.fixture(scope="module")
def fast(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fast]:
    folder = tmp_path_factory.mktemp("fast")
    docs = world(folder)
    port = free_port()
    log = folder / "log"
    with log.open("w") as out:
        server = subprocess.Popen(
            [sys.executable, "-c", FAST, str(docs.root), str(port)], stdout=out, stderr=subprocess.STDOUT
        )
    try:
        until(lambda: "\nserving docs" in log.read_text() or server.poll() is not None, 300, log.read_text)
        assert server.poll() is None, log.read_text()
        yield Fast(docs, f"http://127.0.0.1:{port}", psutil.Process(server.pid))
    finally:
        server.terminate()
        server.wait(90)


@pytest.mark.slow
def test_behind_haproxy_a_killed_ingress_costs_what_it_held_and_a_switch_nothing(fast: Fast) -> None:
    """Machines lose processes; with a second one clients must not notice, and what is lost must come back."""
    title = "ServeReplica:docs:ingress"
    before = fast.processes(title)
    assert len(before) == 2
    with Load(fast) as load:
        time.sleep(3)
        os.kill(min(before), signal.SIGKILL)
        until(lambda: fast.processes(title) - before and len(fast.processes(title)) >= 2, 180)
        new = fast.docs.add(20)
        fast.wait_for(new)
        time.sleep(3)
    # HAProxy repeats what it knows to be lost, but not a request whose connection the dead process reset: it closes the
    # client's connection then, and clients repeat (OpenAI's does).
    lost = {code: count for code, count in load.codes.items() if code != 200}
    assert all(str(code).startswith("RemoteProtocolError") for code in lost), lost
    assert sum(lost.values()) <= load.clients // 2, lost
    assert load.codes[200] > 100
    assert fast.ask()["index_snapshot"] == new


@pytest.mark.slow
@pytest.mark.parametrize("title", ["haproxy.cfg", "ray::HAProxyManager"])
def test_a_killed_proxy_comes_back_and_patient_clients_do_not_notice(fast: Fast, title: str) -> None:
    """All connections of a machine go through one process; without it nothing answers, not even with 503."""
    before = fast.processes(title)
    assert before
    answered: list[str] = []
    stop = threading.Event()

    def ask() -> None:
        with Client(fast.url, total_s=120, max_retries=30) as client:
            while not stop.is_set():
                answered.append(client.retrieve("a b", task="qa").index_snapshot)

    patient = threading.Thread(target=ask, daemon=True)
    patient.start()
    with Load(fast, clients=1) as load:
        time.sleep(1)
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        killed = time.monotonic()
        until(
            lambda: fast.processes(title) - before and len([at for at, _ in load.answers if at > killed]) >= 20,
            60,
            lambda: load.codes,
        )
        count = len(answered)
        time.sleep(5)
    stop.set()
    patient.join(60)
    assert not patient.is_alive()
    assert len(answered) > count
    times = [killed, *(at for at, _ in load.answers if at > killed)]
    # 3 s until it is missed, then the start of a process, which takes its time where all cores are busy.
    assert max(later - earlier for earlier, later in pairwise(times)) < 20
    lost = {str(code).partition(":")[0] for code in load.codes if code != 200}
    # A proxy of Ray that has just started says 404 until it hears of the application; our client comes again.
    assert lost <= {"ConnectError", "ReadError", "RemoteProtocolError", "503", "404"}, lost


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def test_a_taken_port_is_told_at_once(tmp_path: Path) -> None:
    """Half an application behind a port of somebody else's looks like a server."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        command = [sys.executable, "-m", "llmr_ray", "serve", "conf/quickstart.yaml", "--port", str(port)]
        started = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        seconds = time.monotonic() - started
    assert done.returncode == 4
    assert f"port {port}" in done.stderr
    assert f"process {os.getpid()}" in done.stderr
    assert seconds < 10
