"""Ray, started in one place, with the checks that keep a pipeline from hanging.

Ray Data holds one logical CPU for each read, write and actor; a plan that asks for more than there are does not fail,
it waits for ever. ``start`` therefore gives a local Ray more logical CPUs than the machine has cores (the work itself
is bounded by the threads each actor uses), and ``map_shards`` refuses a plan that cannot be placed. A driver whose
local Ray dies would wait for ever too; ``or_lost`` ends it.
"""

import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import Any

import psutil
import ray
from ray.data import ActorPoolStrategy, DataContext

from llmr_ray import errors
from llmr_ray.config import RuntimeConfig
from llmr_ray.errors import ResourceError

log = logging.getLogger(__name__)

WATCH_SECONDS = 0.2
"""How often it is looked whether a local Ray still lives."""

LOST_GRACE_SECONDS = 40.0
"""How long a driver whose Ray is gone may take to end in good order."""


def start(runtime: RuntimeConfig) -> None:
    """Connects to the cluster named by RAY_ADDRESS (as in a submitted job), or starts a local Ray. Does it once."""
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray's C++ core calls it an error that an actor with constructor arguments may be restarted.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    handler = signal.getsignal(signal.SIGTERM)
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=True, logging_level=logging.WARNING)
    else:
        # Ray gives up a node that was too busy to answer for 15 seconds, and the driver with it. There is one here, and
        # `or_lost` sees when its processes are gone.
        os.environ.setdefault("RAY_health_check_failure_threshold", "100")
        _start_local(runtime)
    if callable(handler):
        signal.signal(signal.SIGTERM, handler)  # Ray puts one of its own in its place
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def _start_local(runtime: RuntimeConfig) -> None:
    """Starts a Ray on this machine; once more where it was too busy to answer within the 30 seconds that Ray waits."""
    for _ in range(2):
        others = psutil.Process().children()
        try:
            ray.init(
                num_cpus=runtime.logical_cpus,
                include_dashboard=False,
                object_store_memory=runtime.object_store_mb * 2**20,
                log_to_driver=runtime.log_workers,
                logging_level=logging.WARNING,
            )
        except Exception as error:
            if "timed out during startup" not in str(error):  # Ray has no type for it
                raise
            # What it had started would go on beside the next, and be taken for it by `or_lost`.
            for child in psutil.Process().children():
                if child not in others:
                    with suppress(psutil.NoSuchProcess):  # ended by itself
                        child.kill()
        else:
            return
    raise ResourceError(
        f"Ray did not start on this machine in twice 30 seconds: the load average is {os.getloadavg()[0]:.0f} on "
        f"{os.cpu_count()} cores. Run the same command again when less runs beside it; what was committed is kept."
    )


def stop() -> None:
    """Disconnects; a Ray that `start` started ends with it."""
    ray.shutdown()


@contextmanager
def or_lost(resume: str) -> Iterator[None]:
    """Ends the block with ResourceError when a process that holds a local Ray together dies; then stops Ray.

    Without its raylet or its control store Ray neither answers nor fails, so the driver would wait for ever; or the
    driver's next use of the object store ends it without a word, so the watch is close. A driver that does not come to
    an end within LOST_GRACE_SECONDS is ended at once: what is committed is durable at any time.

    Args:
        resume: the command that goes on, for the error.
    """
    lost: list[str] = []
    ended = threading.Event()

    def message() -> str:
        return (
            f"the local Ray was lost: its process {lost[0]} ended, by a kill or for want of memory. What was committed "
            f"is kept; run the same command again: {resume}"
        )

    def watch() -> None:
        daemons: dict[psutil.Process, str] = {}
        while not ended.wait(WATCH_SECONDS):
            if not daemons and ray.is_initialized():
                children = {child: child.name() for child in psutil.Process().children()}
                daemons = {child: name for child, name in children.items() if name in ("raylet", "gcs_server")}
            lost.extend(f"{name} (pid {child.pid})" for child, name in daemons.items() if not lives(child))
            if lost:
                # A real signal, for it also ends a wait for a lock; SIGINT is ignored in jobs of the background.
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR2)
                if not ended.wait(LOST_GRACE_SECONDS):
                    print(f"{ResourceError.__name__}: {message()}", file=sys.stderr, flush=True)
                    os._exit(ResourceError.exit_code)
                return

    def interrupt(*_: object) -> None:
        raise InterruptedError("the local Ray was lost")

    before = signal.signal(signal.SIGUSR2, interrupt)
    threading.Thread(target=watch, daemon=True, name="ray-watch").start()
    try:
        yield
    except BaseException as error:
        if lost:
            raise ResourceError(message()) from error
        raise
    finally:
        if not lost:
            ended.set()
        stop()
        ended.set()
        signal.signal(signal.SIGUSR2, before)


def lives(process: psutil.Process) -> bool:
    """Whether a process runs; one that ended stays a zombie until its parent collects it."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def require(cpus: float, gpus: float, purpose: str) -> None:
    """Raises ResourceError when the cluster can never place what is asked for."""
    total = ray.cluster_resources()
    if total.get("CPU", 0) < cpus or total.get("GPU", 0) < gpus:
        raise ResourceError(
            f"{purpose} needs {cpus:g} logical CPUs and {gpus:g} GPUs, but the cluster has {total.get('CPU', 0):g} and "
            f"{total.get('GPU', 0):g}; it would wait for ever. Lower the actors in `runtime`, or raise "
            "`runtime.logical_cpus` (local) or add nodes."
        )


def require_memory(needed: Sequence[int], purpose: str) -> None:
    """Raises ResourceError when actors of so many bytes each cannot be placed on the nodes there are."""
    rooms = sorted((node["Resources"].get("memory", 0) for node in ray.nodes() if node["Alive"]), reverse=True)
    free = list(rooms)
    for num_bytes in sorted(needed, reverse=True):
        place = max(range(len(free)), key=lambda at: free[at], default=None)
        if place is None or free[place] < num_bytes:
            asked, had = ([f"{item / 2**30:.2f}" for item in items] for items in (sorted(needed), rooms))
            raise ResourceError(
                f"{purpose} needs actors of {', '.join(asked)} GiB of memory, but the nodes have {', '.join(had)} GiB; "
                "it would wait for ever. Cut the index into more shards over more actors (runtime.index_shards, "
                "index_actors), or add nodes."
            )
        free[place] -= num_bytes


def map_shards(
    shards: Sequence[int],
    worker: type,
    worker_args: dict[str, Any],
    *,
    num_actors: int,
    num_threads: int = 1,
    num_gpus: float = 0,
    purpose: str,
    on_done: Callable[[dict[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
    """Runs `worker(**worker_args).run(shard)` for each shard number through Ray Data; returns the ledger records.

    The worker reads its shard, works, commits it and returns the ledger record; only shard numbers and records travel.
    An actor that dies is replaced and its shard redone. Records come back in the order of completion through `on_done`
    and are returned sorted by shard.

    Args:
        shards: shard numbers still to do.
        worker: a class; one instance lives in each actor.
        worker_args: what each instance is constructed with.
        num_actors: how many actors at the most.
        num_threads: threads for BLAS, OpenMP and torch in each actor.
        num_gpus: GPUs of each actor.
        purpose: the stage, for messages.
        on_done: called with each record as it comes.

    Raises:
        LlmrError: what a worker raised, under its own class and naming the shard; finished shards stay in the ledger.
    """
    if not shards:
        return []
    actors = max(1, min(num_actors, len(shards)))
    require(actors + 2, actors * num_gpus, purpose)
    started = time.monotonic()
    dataset = ray.data.from_items([{"shard": int(shard)} for shard in shards], override_num_blocks=len(shards))
    mapped = dataset.map_batches(
        _ShardActor,
        fn_constructor_kwargs={"worker": worker, "worker_args": worker_args, "num_threads": num_threads},
        batch_size=1,
        compute=ActorPoolStrategy(size=actors),
        num_cpus=1,
        num_gpus=num_gpus or None,
    )
    records = []
    for row in mapped.iter_rows():
        record = json.loads(row["record"])
        if "failed" in record:
            raise getattr(errors, record["failed"])(f"{purpose}, shard {record['shard']}: {record['message']}")
        records.append(record)
        if on_done is not None:
            on_done(record)
    log.info("%s: %d shards in %.1f s", purpose, len(records), time.monotonic() - started)
    return sorted(records, key=lambda record: int(record["shard"]))


def background(function: Callable[..., Any], *arguments: Any, num_gpus: float = 0) -> Future[Any]:
    """Starts a call in a process of its own, on one logical CPU, and returns at once; the future has its result."""
    task = ray.remote(num_cpus=1, num_gpus=num_gpus, max_retries=1)(function)
    future: Future[Any] = task.remote(*arguments).future()
    return future


class _ShardActor:
    """What Ray Data keeps alive: one worker, called with one shard number at a time."""

    def __init__(self, worker: type, worker_args: dict[str, Any], num_threads: int) -> None:
        # Before the libraries that read it are loaded; Ray presets it to the actor's CPUs. A runtime_env would do the
        # same at the price of a fresh process for every stage.
        os.environ["OMP_NUM_THREADS"] = str(num_threads)
        import torch

        torch.set_num_threads(num_threads)
        self.worker = worker(**worker_args)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        # A record travels as JSON text inside a row: Arrow would merge the differing keys of two records.
        return {"record": [json.dumps(self._run(int(shard))) for shard in batch["shard"]]}

    def _run(self, shard: int) -> dict[str, Any]:
        try:
            return self.worker.run(shard)
        except errors.LlmrError as error:
            # Ray Data would bury the message under its own stack traces.
            return {"shard": shard, "failed": type(error).__name__, "message": str(error)}
