"""A served collection: its cold start, more than it can take, a long load, swaps of its snapshot, a killed process.

    apt-get install wrk
    python benchmarks/loads.py [--documents 50000] [--kind hnsw] [--workloads start overload soak swap]
    python benchmarks/loads.py --workloads start --documents 200000
    python benchmarks/loads.py --workloads kill --ingress-replicas 2

One server (Ray Serve in its throughput-optimised mode, limits and canaries as they come) over drawn vectors and the
sample embedder. wrk asks /v1/retrieve, one query a request; statuses are counted in wrk, and probers beside it, each
with one request at a time, measure latency by status. "Half" is half of the answers a second that eight connections
get when they ask again at once, sent in even steps. What is asked of each:

    start      T8: from the command to ready: at most 30 s; of more than 50,000 documents, 45 s
    overload   T4: ten times the connections that saturate it, for a minute: nothing but 200, 429 and 503; answers a
               second at least 0.9 of the most that fewer get; p99 of those that are answered at most three times
               that of before and the time that the queue may take; within 10 s of its end the median latency of before
    soak       T5, E6: half for ten minutes, with ten swaps in it: no failure; p99 of the last third at most 1.2 of the
               first's; memory grows by less than 1 MB a minute; no more open files and mapped indexes than before
    swap       T6: a new snapshot under half: no failure; p99 of the swap at most twice; no more than a second in which
               both snapshots answer
    kill       T7: one of two ingress replicas is killed (-9) under half: no failure; both are back after at most 15 s
"""

import argparse
import json
import os
import signal
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import wrk
from contender import record
from serving import build_collection, serve_ray, settings_of

RESULTS = Path(__file__).parent / "results" / "loads.json"
CONNECTIONS, SATURATING, EXCESS = 8, 64, 10
SETTLE_SECONDS = 15.0
"""After a swap, until what is no longer served is closed everywhere."""
BODY = {"query": "which word stands here", "task": "qa", "top_k": 10}


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What came of a request: when, in what time, and of which snapshot; status 0: there was no answer."""

    at: float
    status: int
    ms: float
    snapshot: str = ""


class Served:
    """The server in a process of its own; `seconds` from its start until it is ready."""

    def __init__(self, root: Path, options: argparse.Namespace) -> None:
        from llmr_ray.serving.launch import free_port

        port = free_port()
        self.root, self.host = root, f"http://127.0.0.1:{port}"
        self.url = f"{self.host}/v1/retrieve"
        self._swaps = 0
        self._calibration_seconds = options.calibration_seconds
        started = time.monotonic()
        arguments = ["--serve", "--root", str(root), "--port", str(port)]
        arguments += ["--ingress-replicas", str(options.ingress_replicas)]
        self._process = wrk.Process(__file__, arguments, root / "server.log")
        self.ask()
        self.seconds = time.monotonic() - started

    def ask(self) -> Seen:
        """One request."""
        request = urllib.request.Request(self.url, json.dumps(BODY).encode(), {"content-type": "application/json"})
        started, status, snapshot = time.perf_counter(), 0, ""
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                snapshot = json.load(reply)["index_snapshot"]
                status = int(reply.status)
        except urllib.error.HTTPError as error:
            status = error.code
        except OSError:
            pass
        return Seen(at=time.monotonic(), status=status, ms=1e3 * (time.perf_counter() - started), snapshot=snapshot)

    @cached_property
    def full(self) -> float:
        """Answers a second that eight connections get: T2."""
        self.load(CONNECTIONS, 2)
        return float(self.load(CONNECTIONS, self._calibration_seconds)["answers_per_s"])

    def load(self, connections: int, seconds: float, rate: float = 0) -> dict[str, Any]:
        """What wrk sees; see wrk.ask."""
        found = wrk.ask(self.url, BODY, connections, seconds, self.root, rate)
        return found | {"failures": found["busy"] + found["other"] + found["broken"]}

    def half(self, seconds: float) -> dict[str, Any]:
        """The same, at half of what it can do."""
        return self.load(CONNECTIONS, seconds, self.full / 2)

    def family(self) -> list[psutil.Process]:
        """All processes that the server started, Ray's own among them."""
        return psutil.Process(self._process.pid).children(recursive=True)

    def holds(self) -> dict[str, float]:
        """Memory of the family in MB, its open files, and how often it has a file of the collection in memory."""
        found = dict.fromkeys(("memory_mb", "files", "mapped"), 0.0)
        for process in self.family():
            try:
                found["memory_mb"] += process.memory_info().rss / 2**20
                found["files"] += process.num_fds()
                found["mapped"] += Path(f"/proc/{process.pid}/maps").read_text().count(f" {self.root}/")
            except (psutil.Error, OSError):
                pass  # it ended just now
        return found

    def ingresses(self) -> list[psutil.Process]:
        """The processes that answer."""
        found = []
        for process in self.family():
            try:
                if " ".join(process.cmdline()).startswith("ray::ServeReplica:bench:ingress"):
                    found.append(process)
            except psutil.Error:
                pass
        return found

    def answering(self) -> set[str]:
        """The names of the ingress replicas that tell their metrics."""
        with urllib.request.urlopen(f"{self.host}/metrics", timeout=10) as reply:
            lines = reply.read().decode().splitlines()
        return {line.partition('replica="')[2].partition('"')[0] for line in lines if not line.startswith("#")}

    def swap(self) -> str:
        """A new snapshot becomes current: one document fewer."""
        from llmr_ray.index import collection

        self._swaps += 1
        return collection.delete(self.root, "bench", [f"d{self._swaps}"]).snapshot

    def close(self) -> None:
        """Ends it."""
        self._process.close()


def probed(served: Served, work: Callable[[], Any], probers: int = 1) -> tuple[Any, list[Seen]]:
    """What `work` gives, and what clients that ask one request after the other saw meanwhile."""
    seen: list[Seen] = []
    is_over = threading.Event()

    def probe() -> None:
        while not is_over.is_set():
            seen.append(served.ask())

    threads = [threading.Thread(target=probe) for _ in range(probers)]
    for thread in threads:
        thread.start()
    try:
        found = work()
    finally:
        is_over.set()
        for thread in threads:
            thread.join()
    return found, sorted(seen, key=lambda one: one.at)


def told(seen: list[Seen]) -> dict[str, Any]:
    """Statuses, and the times of those that were answered."""
    times = [one.ms for one in seen if one.status == 200] or [float("nan")]
    statuses = {str(status): number for status, number in sorted(Counter(one.status for one in seen).items())}
    return {"statuses": statuses, "p50_ms": float(np.median(times)), "p99_ms": float(np.quantile(times, 0.99))}


# --- workloads -------------------------------------------------------------------------------------------------------


def start(served: Served, options: argparse.Namespace) -> dict[str, Any]:
    """How long the start took."""
    most = 30 if options.documents <= 50_000 else 45
    return {"seconds": served.seconds, "at_most": most, **served.holds(), "is_met": served.seconds <= most}


def overload(served: Served, options: argparse.Namespace) -> dict[str, Any]:
    """Far more connections than it serves."""
    quiet = told([served.ask() for _ in range(200)])
    saturated = served.load(SATURATING, options.calibration_seconds)
    most = max(served.full, saturated["answers_per_s"])
    found, seen = probed(served, lambda: served.load(SATURATING * EXCESS, options.overload_seconds), options.probers)
    started, recovered = time.monotonic(), float("nan")
    while time.monotonic() - started < 30:
        if told([served.ask() for _ in range(20)])["p50_ms"] <= 1.2 * quiet["p50_ms"]:
            recovered = time.monotonic() - started
            break
    accepted = told(seen)
    bound_ms = 3 * quiet["p99_ms"] + 1e3 * settings_of(served.root).queue_timeout_s
    is_orderly = not found["other"] and not found["broken"] and set(accepted["statuses"]) <= {"200", "429", "503"}
    is_met = is_orderly and accepted["p99_ms"] <= bound_ms and found["answers_per_s"] >= 0.9 * most and recovered <= 10
    return {
        "quiet": quiet,
        "full": served.full,
        "saturated": saturated,
        "overloaded": found,
        "probers": accepted,
        "p99_at_most": bound_ms,
        "goodput_kept": found["answers_per_s"] / most,
        "recovery_s": recovered,
        "is_met": bool(is_met),
    }


def soak(served: Served, options: argparse.Namespace) -> dict[str, Any]:
    """Half of what it can do, for long, while its snapshot changes again and again."""
    served.half(min(60.0, options.soak_seconds / 10))
    served.swap()  # from now on there is a snapshot before the served one, which stays open
    time.sleep(SETTLE_SECONDS)
    before, windows = served.holds(), []
    samples: list[tuple[float, float]] = []
    is_over = threading.Event()

    def sample() -> None:
        while not is_over.wait(min(5.0, options.soak_seconds / 50)):
            samples.append((time.monotonic() / 60, served.holds()["memory_mb"]))

    def change() -> None:
        for _ in range(options.swaps):
            if not is_over.wait(options.soak_seconds / (options.swaps + 1)):
                served.swap()

    threads = [threading.Thread(target=work) for work in (sample, change)]
    for thread in threads:
        thread.start()
    try:
        windows = [served.half(options.soak_seconds / 9) for _ in range(9)]
    finally:
        is_over.set()
        for thread in threads:
            thread.join()
    time.sleep(SETTLE_SECONDS)
    after = served.holds()
    p99 = [window["p99_ms"] for window in windows]
    drift = float(np.median(p99[-3:]) / np.median(p99[:3]))
    failures = sum(window["failures"] for window in windows)
    minutes, memory = np.asarray(samples[len(samples) // 5 :]).T
    slope = float(np.polyfit(minutes, memory, 1)[0])
    # A file that each swap forgot to close would be as many as there were swaps.
    is_flat = after["files"] - before["files"] < max(1, options.swaps) and after["mapped"] <= before["mapped"]
    return {
        "full": served.full,
        "answers": sum(window["ok"] for window in windows),
        "failures": failures,
        "swaps": options.swaps,
        "p99_ms": p99,
        "p99_drift": drift,
        "memory_mb_a_minute": slope,
        "before": before,
        "after": after,
        "is_met": bool(not failures and drift <= 1.2 and slope < 1 and is_flat),
    }


def swap(served: Served, options: argparse.Namespace) -> dict[str, Any]:
    """A new snapshot in the middle."""
    calm, seen_calm = probed(served, lambda: served.half(options.swap_seconds))
    changes: list[tuple[float, str]] = []
    timer = threading.Timer(options.swap_seconds / 3, lambda: changes.append((time.monotonic(), served.swap())))
    timer.start()
    loaded, seen = probed(served, lambda: served.half(options.swap_seconds))
    timer.join()
    [(begun, new)] = changes
    first = min((one.at for one in seen if one.snapshot == new), default=float("nan"))
    during = told([one for one in seen if begun <= one.at <= first + 1])
    mixed = max(0.0, max((one.at for one in seen if one.snapshot not in (new, "")), default=first) - first)
    quiet, failures = told(seen_calm), calm["failures"] + loaded["failures"]
    is_whole = not failures and {one.status for one in seen} == {200} and seen[-1].snapshot == new
    ratio = during["p99_ms"] / quiet["p99_ms"]
    return {
        "calm": calm,
        "swapping": loaded,
        "prober_calm": quiet,
        "prober_swapping": during,
        "failures": failures,
        "switched_after_s": first - begun,
        "p99_ratio": ratio,
        "mixed_s": mixed,
        "is_met": bool(is_whole and ratio <= 2 and mixed <= 1),
    }


def kill(served: Served, options: argparse.Namespace) -> dict[str, Any]:
    """One of the processes that answer dies."""
    before, times = served.answering(), []

    def strike() -> None:
        os.kill(min(process.pid for process in served.ingresses()), signal.SIGKILL)
        begun = time.monotonic()
        while time.monotonic() - begun < 120:
            time.sleep(0.2)
            try:
                now = served.answering()
            except OSError:
                continue
            if len(now) == len(before) and now != before:
                times.append(time.monotonic() - begun)
                return

    served.half(2)
    timer = threading.Timer(options.kill_seconds / 6, strike)
    timer.start()
    loaded = served.half(options.kill_seconds)
    timer.join()
    back = times[0] if times else float("nan")
    return {"loaded": loaded, "back_after_s": back, "is_met": bool(not loaded["failures"] and back <= 15)}


WORKLOADS: dict[str, Callable[[Served, argparse.Namespace], dict[str, Any]]] = {
    "start": start,
    "overload": overload,
    "soak": soak,
    "swap": swap,
    "kill": kill,
}


def main() -> None:
    """Builds the collection, serves it, and writes what is found into benchmarks/results/loads.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual = [name for name in WORKLOADS if name != "kill"]
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=usual)
    parser.add_argument("--documents", type=int, default=50_000)
    parser.add_argument("--kind", choices=("flat", "hnsw"), default="flat", help="of the index")
    parser.add_argument("--ingress-replicas", type=int, default=1)
    parser.add_argument("--calibration-seconds", type=float, default=15)
    parser.add_argument("--overload-seconds", type=float, default=60)
    parser.add_argument("--probers", type=int, default=8, help="beside the overload")
    parser.add_argument("--soak-seconds", type=float, default=600)
    parser.add_argument("--swaps", type=int, default=10, help="within the soak")
    parser.add_argument("--swap-seconds", type=float, default=12)
    parser.add_argument("--kill-seconds", type=float, default=30)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", RAY_USAGE_STATS_ENABLED="0")
    if options.serve:
        return serve_ray(settings_of(options.root, options.ingress_replicas), options.port, fast=True)
    if "kill" in options.workloads and options.ingress_replicas < 2:
        parser.error("who kills an ingress needs another: --ingress-replicas 2")
    with tempfile.TemporaryDirectory() as folder:
        build_collection(Path(folder), options.documents, options.kind)
        served = Served(Path(folder), options)
        try:
            for name in options.workloads:
                found = WORKLOADS[name](served, options)
                print(f"{name}: {'met' if found['is_met'] else 'NOT MET'} {json.dumps(found)}", flush=True)
                sizes = {key: getattr(options, key) for key in ("documents", "kind", "ingress_replicas")}
                record(options.results, f"{name}_{options.documents // 1000}k_{options.kind}", {**sizes, **found})
        finally:
            served.close()


if __name__ == "__main__":
    main()
