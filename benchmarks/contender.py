"""A contender of a benchmark: a process of its own that does one job after the other, and the machine they run on."""

import gc
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Contender:
    """A benchmark run with ``--serve NAME``: it says "ready", then reads a job and writes an answer, as JSON a line.

    Args:
        script: the benchmark.
        name: of the contender.
        threads: of it.
        arguments: further ones.

    Raises:
        RuntimeError: it did not start.
    """

    def __init__(self, script: str, name: str, threads: int, *arguments: str) -> None:
        command = [sys.executable, script, "--serve", name, "--threads", str(threads), *arguments]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "RAYON_NUM_THREADS": str(threads),
            "HF_HUB_OFFLINE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        }
        pipe = subprocess.PIPE
        self.name = name
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, env=environment
        )
        if self._line() != "ready":
            raise RuntimeError(f"{name} did not start; run with --serve {name} to see why")

    def ask(self, job: Any) -> dict[str, Any]:
        """Does a job once; RuntimeError when the process ends over it."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        line = self._line()
        if not line:
            raise RuntimeError(f"{self.name} ended; run with --serve {self.name} to see why")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """Ends the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


def take_turns(running: Mapping[str, Contender], rounds: int, job: Any) -> dict[str, list[dict[str, Any]]]:
    """Each contender's answers to a job, one for each round; in a round all do it once, one after the other."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in running}
    for number in range(rounds):
        for name, contender in running.items():
            runs[name].append(contender.ask(job))
        print(f"  round {number + 1} of {rounds}", flush=True)
    return runs


def serve(opened: Callable[[], Callable[[Any], dict[str, Any]]], threads: int, gemm: tuple[int, int, int]) -> None:
    """What a contender's process does: see Contender.

    Args:
        opened: loads what the contender needs and returns what does a job.
        threads: of it.
        gemm: sizes of the matrix product that is measured before and after each job.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    import torch

    torch.set_num_threads(threads)
    work = opened()
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        before = gemm_gflops(*gemm)
        gc.collect()  # what the last job left must not count as this one's memory
        told = work(json.loads(line))
        print(json.dumps({**told, "gemm": [before, gemm_gflops(*gemm)]}), file=answers, flush=True)


@contextmanager
def spent() -> Iterator[dict[str, float]]:
    """CPU and wall seconds of the block, and the process's peak memory in it: ``cpu``, ``wall``, ``peak_mb``."""
    cost: dict[str, float] = {}
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    cpu, wall = cpu_seconds(), time.perf_counter()
    yield cost
    cost["cpu"], cost["wall"] = cpu_seconds() - cpu, time.perf_counter() - wall
    [peak] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    cost["peak_mb"] = int(peak.split()[1]) / 1024


def cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    used = (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def gemm_gflops(rows: int, inner: int, columns: int) -> float:
    """Billions of operations per CPU second of a float32 product of these sizes, by the faster library there is."""
    import torch
    from torch.nn.functional import linear

    from llmr_ray.modeling.linear import is_faster, product

    left, right = torch.randn(rows, inner), torch.randn(columns, inner)
    multiply = product if is_faster() else linear
    times = []
    for _ in range(12):
        started = cpu_seconds()
        for _ in range(10):
            multiply(left, right)
        times.append(cpu_seconds() - started)
    return 10 * 2 * rows * inner * columns / statistics.median(times) / 1e9


def gemm_spread(runs: list[dict[str, Any]]) -> tuple[float, float]:
    """(median, spread over the median) of the products measured around some answers."""
    speeds = [speed for run in runs for speed in run["gemm"]]
    median = statistics.median(speeds)
    return median, (max(speeds) - min(speeds)) / median


def record(path: Path, name: str, found: dict[str, Any]) -> None:
    """Writes what was found of a workload into a file of results, beside what it says of others.

    Each entry has the machine, the command and the commit it was measured with: a long benchmark may be run in parts.
    """
    path.parent.mkdir(exist_ok=True)
    results = json.loads(path.read_text()) if path.exists() else {}
    command = f"python benchmarks/{Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}".strip()
    results[name] = {"machine": machine(), "command": command, "commit": _commit(), **found}
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"written: {path}", flush=True)


def _commit() -> str:
    """The commit that is checked out, `-dirty` where something else than results was changed since."""
    head = subprocess.run(["git", "describe", "--always"], capture_output=True, text=True, check=False)
    but_results = ["git", "diff", "--quiet", "HEAD", "--", ":(top)", ":(top,exclude)benchmarks/results"]
    return head.stdout.strip() + ("-dirty" if subprocess.run(but_results, check=False).returncode else "")


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    cpu = models[0] if models else platform.processor()
    return {"cpu": cpu, "cores": os.cpu_count(), "python": platform.python_version()}
