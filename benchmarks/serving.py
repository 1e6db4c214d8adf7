"""Serving: our application on Ray Serve against the same application on bare FastAPI and uvicorn.

    apt-get install wrk
    python benchmarks/serving.py [--documents 20000] [--rounds 5] [--seconds 5] [--with-default]
    python benchmarks/serving.py --documents 50000 --kind hnsw --connections 8     # T1 to T3, as they are defined

Both answer /v1/retrieve from one collection (drawn vectors, the sample embedder) in one process each, so the work is
the same and the difference is Serve's: its HAProxy, and what its replica does around the application. Beside them, in
the same rounds, an application that does nothing, on both. wrk asks, from one connection (p50, p99) and from several
(requests a second), and with 32 queries in a request. Rounds are interleaved; a figure is the median of the rounds'.

A gate runs first: both give the same results. Goals: p50 at most 0.7 ms over bare, at least 0.6 times its throughput.
And of Serve alone:

    T1   p50 at most that of nothing, embedding, searching and 5 ms more, and 40 ms; p99 at most 150 ms
    T2   at least 0.6 of the requests a second that do nothing, and 60
    T3   32 queries in a request: at least eight times the queries a second of T2
"""

import argparse
import json
import os
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import wrk
from contender import record
from index import vectors

BATCH = 32
WHAT = ("p50_ms", "p99_ms", "rps")
MODEL, DIMENSION = "minilm-l6", 384
RESULTS = Path(__file__).parent / "results" / "serving.json"


# --- what is served --------------------------------------------------------------------------------------------------


def build_collection(root: Path, num_documents: int, kind: str = "flat") -> None:
    """A collection of drawn unit vectors that claims to be of the sample embedder, and of queries for canaries."""
    from llmr_ray.artifacts import Artifact, ArtifactSpec, Counts
    from llmr_ray.assets import resolve
    from llmr_ray.config import Config, DatasetConfig, EmbedderConfig, TaskConfig
    from llmr_ray.index import collection
    from llmr_ray.index.settings import IndexConfig
    from llmr_ray.index.stage import RECALL, IndexWorker, RecallWorker, TrainWorker, embed_spec, index_spec
    from llmr_ray.index.vectors import encoder_of, to_table
    from llmr_ray.schemas import table_of

    config = Config(
        datasets={"d": DatasetConfig(task="qa")},
        tasks={"qa": TaskConfig()},
        embedder=EmbedderConfig(model=MODEL, max_query_tokens=64, max_document_tokens=64, precision="float32"),
        index=IndexConfig(kind=kind),
    )
    rng = np.random.default_rng(0)
    words = [f"word{number}" for number in range(2000)]
    rows = [
        {"doc_id": f"d{row}", "pool": "p", "position": row, "task": "qa", "text": " ".join(rng.choice(words, 60))}
        for row in range(num_documents)
    ]
    told: dict[str, Any] = {"task": "qa", "dataset": "d", "split": "test", "targets": [], "pool": "p"}
    queries = [{**told, "query_id": f"q{row}", "query": " ".join(rng.choice(words, 8))} for row in range(50)]
    counts = Counts(rows_in=num_documents, ok=num_documents)
    prepare = Artifact(root, ArtifactSpec(stage="prepare", version=1, config={"rows": num_documents}, inputs={}))
    prepare.begin()
    prepare.write_shard(0, {"corpus": table_of("corpus", rows), "queries": table_of("queries", queries)}, counts)
    prepare.commit(1, seconds=0)
    embeddings = Artifact(root, embed_spec(config, resolve(MODEL), prepare))
    embeddings.begin()
    table = to_table("doc_id", [row["doc_id"] for row in rows], vectors(num_documents, DIMENSION, seed=1))
    embeddings.write_shard(0, {"document_embeddings": table}, counts)
    embeddings.commit(1, seconds=0, extra={"encoder": encoder_of(embeddings)})
    index = Artifact(root, index_spec(config, embeddings))
    index.begin()
    extra: dict[str, Any] = {"encoder": encoder_of(embeddings), "cuts": [0, num_documents]}
    workers = [IndexWorker] if kind == "flat" else [TrainWorker, IndexWorker, RecallWorker]
    for worker in workers:
        worker(index, embeddings, extra["cuts"]).run(0)
    if kind != "flat":
        extra["recall"] = json.loads((index.path / RECALL).read_text())
    index.commit(1, seconds=0, extra=extra)
    collection.create(root, "bench", index.id, model=MODEL)


def settings_of(root: Path, ingress_replicas: int = 1) -> Any:
    """Everything in the process that answers; limits and canaries as they come."""
    from llmr_ray.serving.settings import ServingSettings

    return ServingSettings(artifact_root=str(root), collection="bench", ingress_replicas=ingress_replicas)


def noop_api() -> Any:
    """An application that reads a body and answers."""
    from fastapi import FastAPI, Request

    api = FastAPI()

    async def noop(request: Request) -> dict[str, int]:
        await request.body()
        return {"ok": 1}

    api.post("/noop/")(noop)
    api.post("/")(noop)  # as Serve's replicas see it, without the prefix
    return api


def serve_bare(root: Path, port: int) -> None:
    """The application under uvicorn, as uvicorn comes."""
    import asyncio
    import logging

    import uvicorn

    from llmr_ray.serving import app, engine
    from llmr_ray.serving.api import Service, build_api
    from llmr_ray.serving.gate import ACCESS_LOG, Gate
    from llmr_ray.serving.metrics import Metrics
    from llmr_ray.serving.models import TextEncoder
    from llmr_ray.serving.switching import Switcher

    settings = settings_of(root)
    spec = app.served_spec(settings)

    async def service() -> Service:
        encoder = engine.LocalEncoder(TextEncoder(spec, settings).encode, None, settings)
        local = engine.LocalShards(root, settings)
        composed = engine.Engine(settings, encoder, [local], local)
        metrics = Metrics()
        switcher = Switcher(root, settings, composed, spec, (), metrics.watch)
        await switcher.start()
        return Service(Gate(settings, metrics), composed, switcher, spec)

    logging.getLogger(ACCESS_LOG).setLevel(logging.INFO)
    logging.getLogger(ACCESS_LOG).addHandler(logging.StreamHandler())
    api = build_api(asyncio.run(service()))
    api.mount("/noop", noop_api())
    print("ready", flush=True)
    uvicorn.run(api, port=port, log_level="error", access_log=False)


def serve_ray(settings: Any, port: int, *, fast: bool, with_noop: bool = False) -> None:
    """The application on Ray Serve, and beside it one that does nothing."""
    from llmr_ray.serving import launch

    launch.prepare(fast=fast)
    from ray import serve

    from llmr_ray import cluster
    from llmr_ray.config import RuntimeConfig
    from llmr_ray.serving.app import build, running

    cluster.start(RuntimeConfig(object_store_mb=100))
    with running(build(settings), "bench", "127.0.0.1", port):
        if with_noop:

            class Noop:
                pass

            noop = serve.deployment(name="noop", max_ongoing_requests=1000)(serve.ingress(noop_api())(Noop))
            serve.run(noop.bind(), name="noop", route_prefix="/noop")
        print("ready", flush=True)
        sys.stdin.read()
    cluster.stop()


# --- asking ----------------------------------------------------------------------------------------------------------


def asked(url: str, body: dict[str, Any], connections: int, seconds: float, folder: Path) -> dict[str, float]:
    """p50 and p99 in milliseconds, and requests a second; every one has to be answered."""
    found = wrk.ask(url, body, connections, seconds, folder)
    if found["busy"] or found["other"] or found["broken"]:
        raise RuntimeError(f"{url}: {found}")
    return {"p50_ms": found["p50_ms"], "p99_ms": found["p99_ms"], "rps": found["answers_per_s"]}


def answer(url: str, body: dict[str, Any]) -> Any:
    """The answer to one request."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.load(reply)


class Server:
    """One of the contenders in a process of its own."""

    def __init__(self, name: str, root: Path, port: int) -> None:
        self.name, self.url = name, f"http://127.0.0.1:{port}"
        arguments = ["--serve", name, "--root", str(root), "--port", str(port)]
        self._process = wrk.Process(__file__, arguments, root / f"{name}.log")
        time.sleep(2)

    def close(self) -> None:
        """Ends it; uvicorn heeds a signal alone."""
        self._process.close(0.1 if self.name == "bare" else 20)


def bodies(connections: int) -> dict[str, tuple[str, dict[str, Any], int]]:
    """Kind of request -> path, body, connections."""
    one = {"query": "which word stands here", "task": "qa", "top_k": 10}
    many = {"queries": [f"which word is number {n}" for n in range(BATCH)], "task": "qa", "top_k": 10}
    return {
        "noop c=1": ("/noop/", {"ok": 1}, 1),
        f"noop c={connections}": ("/noop/", {"ok": 1}, connections),
        "retrieve c=1": ("/v1/retrieve", one, 1),
        f"retrieve c={connections}": ("/v1/retrieve", one, connections),
        f"retrieve {BATCH} queries c=1": ("/v1/retrieve", many, 1),
    }


def main() -> None:
    """Builds the collection, starts the contenders, measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=20_000)
    parser.add_argument("--kind", choices=("flat", "hnsw"), default="flat", help="of the index")
    parser.add_argument("--connections", type=int, default=16, help="where as many answers as can be are wanted")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=5)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--with-default", action="store_true", help="also Serve without its fast mode")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", RAY_USAGE_STATS_ENABLED="0")
    if options.serve == "bare":
        return serve_bare(options.root, options.port)
    if options.serve:
        return serve_ray(settings_of(options.root), options.port, fast=options.serve == "serve", with_noop=True)
    from llmr_ray.serving.launch import free_port

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        build_collection(root, options.documents, options.kind)
        names = ["bare", "serve", *(["serve default"] if options.with_default else [])]
        servers = [Server(name, root, free_port()) for name in names]
        try:
            check(servers)
            rounds = measure(servers, options, root)
            work_ms = encode_and_search(servers[1])
        finally:
            for server in servers:
                server.close()
    told = figures(rounds, names)
    told["targets"] = targets(told, work_ms, options.connections)
    sizes = {name: getattr(options, name) for name in ("documents", "kind", "connections", "rounds")}
    record(options.results, "overhead", {**sizes, **told})


def check(servers: list[Server]) -> None:
    """All give the same results, up to the rounding of scores."""
    path, body, _ = bodies(1)[f"retrieve {BATCH} queries c=1"]
    expected, *others = [answer(server.url + path, body)["results"] for server in servers]
    for found in others:
        for mine, theirs in zip(found, expected, strict=True):
            if [hit["id"] for hit in mine] != [hit["id"] for hit in theirs]:
                raise RuntimeError("the contenders give different results; the ratios would mean nothing")
    print(f"gate: {BATCH} queries have the same results on all", flush=True)


def encode_and_search(server: Server) -> float:
    """Milliseconds that the work itself takes of a request, as the server tells them; the median of a hundred."""
    path, body, _ = bodies(1)["retrieve c=1"]
    timings = [answer(server.url + path, body)["timings_ms"] for _ in range(100)]
    return median(timing["encode"] + timing["search"] for timing in timings)


def measure(servers: list[Server], options: argparse.Namespace, folder: Path) -> list[dict[str, dict[str, Any]]]:
    """Per round: kind of request -> contender -> figures. The first round warms up and is dropped."""
    rounds = []
    for number in range(options.rounds + 1):
        of_round: dict[str, dict[str, Any]] = {}
        for kind, (path, body, connections) in bodies(options.connections).items():
            order = servers if number % 2 else servers[::-1]
            seconds = options.seconds if number else 1
            of_round[kind] = {s.name: asked(s.url + path, body, connections, seconds, folder) for s in order}
        if number:
            rounds.append(of_round)
            print(f"round {number} of {options.rounds}", flush=True)
    return rounds


def figures(rounds: list[dict[str, dict[str, Any]]], names: list[str]) -> dict[str, Any]:
    """Medians over the rounds, and what Serve adds to bare."""
    told: dict[str, Any] = {"load_average": os.getloadavg()[0]}
    for kind in rounds[0]:
        told[kind] = {
            name: {what: round(median(of[kind][name][what] for of in rounds), 3) for what in WHAT} for name in names
        }
        for name in names[1:]:
            added = median(of[kind][name]["p50_ms"] - of[kind]["bare"]["p50_ms"] for of in rounds)
            ratio = median(of[kind][name]["rps"] / of[kind]["bare"]["rps"] for of in rounds)
            told[kind][f"{name} over bare"] = {"p50_ms": round(added, 3), "rps_ratio": round(ratio, 3)}
            print(f"{kind:28} {name:14} p50 {added:+.2f} ms, throughput x{ratio:.2f}", flush=True)
    return told


def targets(told: dict[str, Any], work_ms: float, connections: int) -> dict[str, Any]:
    """T1, T2 and T3 of Serve, each with its bound."""
    [noop, many_noops, one, many, batch] = [told[kind]["serve"] for kind in bodies(connections)]
    p50_bound = min(40.0, noop["p50_ms"] + work_ms + 5)
    least_rps = max(60.0, 0.6 * many_noops["rps"])
    batched = BATCH * batch["rps"] / many["rps"]
    found: dict[str, Any] = {
        "T1": {"p50_ms": one["p50_ms"], "at_most": p50_bound, "encode_and_search_ms": work_ms, "p99_ms": one["p99_ms"]}
        | {"is_met": one["p50_ms"] <= p50_bound and one["p99_ms"] <= 150},
        "T2": {"rps": many["rps"], "at_least": least_rps, "is_met": many["rps"] >= least_rps},
        "T3": {"queries_ratio": batched, "at_least": 8, "is_met": batched >= 8},
    }
    for name, target in found.items():
        print(f"{name}: {'met' if target['is_met'] else 'NOT MET'} {json.dumps(target)}", flush=True)
    return found


if __name__ == "__main__":
    main()
