"""A served collection under more than it can take, for long, through a swap of its snapshot, and from a cold start.

    apt-get install wrk
    python benchmarks/loads.py [--documents 50000] [--soak-seconds 600] [--workloads start overload soak swap]

One server (Ray Serve in its throughput-optimised mode, limits as they come) over random vectors and the sample
embedder. wrk asks /v1/retrieve, one query a request; statuses are counted in wrk, and a prober beside it, one request
at a time, measures latency by status. What is asked of each:

    start      from the command to ready: at most 30 s
    overload   ten times the connections that saturate it, for a minute: nothing but 200, 429 and 503; answers a second
               at least 0.9 of those at saturation; p99 at most three times that of before and the time that the queue
               may take; within 10 s of its end at most twice the median latency of before
    soak       four connections: no failure; p99 of the last third at most 1.2 of the first's; memory as it was
    swap       a new snapshot while four connections ask: no failure; p99 of the second of the swap at most twice
"""

import argparse
import json
import os
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import wrk
from contender import record
from serving import build_collection, serve_ray, settings_of

RESULTS = Path(__file__).parent / "results" / "loads.json"
SATURATING, EXCESS = 64, 10
BODY = {"query": "which word stands here", "task": "qa", "top_k": 10}


class Served:
    """The server in a process of its own; `seconds` from its start until it is ready."""

    def __init__(self, root: Path) -> None:
        from llmr_ray.serving.launch import free_port

        port = free_port()
        self.root, self.url = root, f"http://127.0.0.1:{port}/v1/retrieve"
        started = time.monotonic()
        arguments = ["--serve", "--root", str(root), "--port", str(port)]
        self._process = wrk.Process(__file__, arguments, root / "server.log")
        self.ask()
        self.seconds = time.monotonic() - started

    def ask(self) -> tuple[int, float]:
        """Status and milliseconds of one request; 0: no answer."""
        started = time.perf_counter()
        try:
            with self._asked() as reply:
                reply.read()
                status = int(reply.status)
        except urllib.error.HTTPError as error:
            status = error.code
        except OSError:
            status = 0
        return status, 1e3 * (time.perf_counter() - started)

    def snapshot(self) -> str:
        """Which one answers."""
        with self._asked() as reply:
            shown: str = json.load(reply)["index_snapshot"]
        return shown

    def _asked(self) -> Any:
        request = urllib.request.Request(self.url, json.dumps(BODY).encode(), {"content-type": "application/json"})
        return urllib.request.urlopen(request, timeout=60)

    def load(self, connections: int, seconds: float) -> dict[str, Any]:
        """What wrk sees; see wrk.ask."""
        return wrk.ask(self.url, BODY, connections, seconds, self.root)

    def memory_mb(self) -> float:
        """Of all processes that the server started, Ray's own among them."""
        family = psutil.Process(self._process.pid).children(recursive=True)
        return sum(process.memory_info().rss for process in family if process.is_running()) / 2**20

    def close(self) -> None:
        """Ends it."""
        self._process.close()


def probed(served: Served, work: Callable[[], Any]) -> tuple[Any, dict[str, Any]]:
    """What `work` gives, and what a single client saw meanwhile: statuses, and the times of those answered."""
    seen: list[tuple[int, float]] = []
    is_over = threading.Event()

    def probe() -> None:
        while not is_over.is_set():
            seen.append(served.ask())

    prober = threading.Thread(target=probe)
    prober.start()
    try:
        found = work()
    finally:
        is_over.set()
        prober.join()
    times = [taken for status, taken in seen if status == 200] or [float("nan")]
    statuses = {str(status): number for status, number in sorted(Counter(status for status, _ in seen).items())}
    return found, {"statuses": statuses, "p50_ms": float(np.median(times)), "p99_ms": float(np.quantile(times, 0.99))}


# --- workloads -------------------------------------------------------------------------------------------------------


def start(served: Served, options: argparse.Namespace) -> dict[str, Any]:
    """How long the start took."""
    return {"seconds": served.seconds, "memory_mb": served.memory_mb(), "is_met": served.seconds <= 30}


def overload(served: Served, options: argparse.Namespace) -> dict[str, Any]:
    """Far more connections than it serves."""
    quiet = [served.ask()[1] for _ in range(200)]
    saturated = served.load(SATURATING, 15)
    found, probe = probed(served, lambda: served.load(SATURATING * EXCESS, options.overload_seconds))
    started, recovered = time.monotonic(), float("nan")
    while time.monotonic() - started < 30:
        if np.median([served.ask()[1] for _ in range(20)]) <= 2 * np.median(quiet):
            recovered = time.monotonic() - started
            break
    kept = found["answers_per_s"] / saturated["answers_per_s"]
    bound_ms = 3 * float(np.quantile(quiet, 0.99)) + 1e3 * settings_of(served.root).queue_timeout_s
    is_orderly = not found["other"] and not found["broken"] and found["p99_ms"] <= bound_ms
    is_met = is_orderly and kept >= 0.9 and recovered <= 10
    return {
        "quiet_p50_ms": float(np.median(quiet)),
        "p99_bound_ms": bound_ms,
        "saturated": saturated,
        "overloaded": found,
        "prober": probe,
        "goodput_kept": kept,
        "recovery_s": recovered,
        "is_met": bool(is_met),
    }


def soak(served: Served, options: argparse.Namespace) -> dict[str, Any]:
    """The same load for long."""
    served.load(4, 10)
    before = served.memory_mb()
    windows = [served.load(4, options.soak_seconds / 9) for _ in range(9)]
    after = served.memory_mb()
    p99 = [window["p99_ms"] for window in windows]
    drift = float(np.median(p99[-3:]) / np.median(p99[:3]))
    failures = sum(window["busy"] + window["other"] + window["broken"] for window in windows)
    return {
        "answers": sum(window["ok"] for window in windows),
        "failures": failures,
        "p99_ms": p99,
        "p99_drift": drift,
        "memory_mb": [before, after],
        "is_met": bool(not failures and drift <= 1.2 and after <= 1.1 * before),
    }


def swap(served: Served, options: argparse.Namespace) -> dict[str, Any]:
    """A new snapshot in the middle."""
    from llmr_ray.index import collection

    calm = probed(served, lambda: served.load(4, 10))
    changed: list[str] = []
    timer = threading.Timer(4, lambda: changed.append(collection.delete(served.root, "bench", ["d0"]).snapshot))
    timer.start()
    loaded, probe = probed(served, lambda: served.load(4, 12))
    timer.join()
    failures = loaded["busy"] + loaded["other"] + loaded["broken"]
    is_changed = [served.snapshot()] == changed
    ratio = probe["p99_ms"] / calm[1]["p99_ms"]
    return {
        "calm": calm[0],
        "swapping": loaded,
        "prober_calm": calm[1],
        "prober_swapping": probe,
        "failures": failures,
        "p99_ratio": ratio,
        "is_met": bool(not failures and set(probe["statuses"]) == {"200"} and is_changed and ratio <= 2),
    }


WORKLOADS: dict[str, Callable[[Served, argparse.Namespace], dict[str, Any]]] = {
    "start": start,
    "overload": overload,
    "soak": soak,
    "swap": swap,
}


def main() -> None:
    """Builds the collection, serves it, and writes what is found into benchmarks/results/loads.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--documents", type=int, default=50_000)
    parser.add_argument("--soak-seconds", type=float, default=600)
    parser.add_argument("--overload-seconds", type=float, default=60)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", RAY_USAGE_STATS_ENABLED="0")
    if options.serve:
        return serve_ray(settings_of(options.root), options.port, fast=True)
    with tempfile.TemporaryDirectory() as folder:
        build_collection(Path(folder), options.documents)
        served = Served(Path(folder))
        try:
            for name in options.workloads:
                found = WORKLOADS[name](served, options)
                print(f"{name}: {'met' if found['is_met'] else 'NOT MET'} {json.dumps(found)}", flush=True)
                record(options.results, name, {"documents": options.documents, **found})
        finally:
            served.close()


if __name__ == "__main__":
    main()
