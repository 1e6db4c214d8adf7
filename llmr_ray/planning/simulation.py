"""The same plan on more and more GPUs: what divides, what does not, and where a stage stops scaling.

Stages run one after the other. A stage's shards are dealt out to its workers, so its time is that of the worker with
most of them; loading a model, the slowest worker, and work on cores that has few pieces do not divide. Training divides
a fixed global batch, so that more GPUs have fewer queries each, while every step sends the whole gradient. A simulation
of known limits, not of machines: what it leaves out (contention of storage, failures) makes real runs slower.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from llmr_ray.planning.hardware import GPU, Assumptions
from llmr_ray.planning.work import Work

COUNTS = (1, 8, 64, 512)
NODE = 8
"""GPUs of a node; between nodes the network is the limit."""
START_SECONDS = 20.0
"""A stage's workers start: processes, imports."""
STEP_SECONDS = 0.02
"""Of a training step besides products: launching, the optimiser, sums over workers."""
LEAST_TOKENS = 2048
"""With fewer tokens a step on a GPU, its products are no faster."""
EFFICIENT = 0.5
"""A stage scales while each GPU of the larger number does at least this share of what one did of the smaller."""


@dataclass(frozen=True, kw_only=True)
class Time:
    """Seconds of a stage on a number of GPUs, by what takes them; `workers` that have something to do."""

    parts: dict[str, float]
    workers: int

    @property
    def seconds(self) -> float:
        """All of them."""
        return sum(self.parts.values())

    @property
    def limit(self) -> str:
        """What takes most of the time beside work that divides."""
        rest = {name: value for name, value in self.parts.items() if name != "work"}
        return max(rest, key=lambda name: rest[name]) if any(rest.values()) else "work"


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """A stage on every number of GPUs. stops_at: the first number to which it does not scale, and `reason`; 0: none."""

    stage: str
    times: dict[int, Time]
    stops_at: int
    reason: str


def simulate(plan: Sequence[Work], gpu: GPU, assumed: Assumptions, counts: Sequence[int] = COUNTS) -> list[Scaling]:
    """Every stage of a plan on each number of GPUs, ascending."""
    return [_scaling(work, {count: time_of(work, count, gpu, assumed) for count in counts}) for work in plan]


def time_of(work: Work, count: int, gpu: GPU, assumed: Assumptions) -> Time:
    """A stage on so many GPUs."""
    if work.steps:
        return _training(work, count, gpu, assumed)
    total = work.gpu_hours(gpu, assumed) * 3600
    is_gpu = total > 0
    workers = max(1, min(count // work.gpus if is_gpu else count * assumed.cores_per_gpu, work.shards))
    cores = max(1, min(count * assumed.cores_per_gpu, work.shards))
    # A model over several GPUs works as fast as they do together.
    total /= work.gpus if count >= work.gpus else 1
    even = total / workers + work.cpu_seconds / cores
    uneven = total / work.shards * -(-work.shards // workers) + work.cpu_seconds / work.shards * -(
        -work.shards // cores
    )
    # The part of the even share that more shards would take away.
    could = total / max(1, count // work.gpus) + work.cpu_seconds / (count * assumed.cores_per_gpu)
    parts = {
        "work": could,
        "too few shards": uneven - could,
        "stragglers": assumed.straggler * even if workers > 1 else 0.0,
        "starting workers": START_SECONDS if is_gpu or work.cpu_seconds > START_SECONDS else 0.0,
        "loading the model": 2 * work.weights / assumed.load_bandwidth,
    }
    return Time(parts={name: max(0.0, value) for name, value in parts.items()}, workers=workers)


def _training(work: Work, count: int, gpu: GPU, assumed: Assumptions) -> Time:
    """Data-parallel training: workers divide the global batch evenly, so their number divides it."""
    workers = max(number for number in range(1, min(count, work.batch) + 1) if work.batch % number == 0)
    total = work.gpu_hours(gpu, assumed) * 3600
    per_step = work.tokens / work.steps
    least = total / work.tokens * min(LEAST_TOKENS, per_step) * work.steps
    even = total / workers
    link = gpu.link if workers <= NODE else min(gpu.link, assumed.network)
    # A ring sends and receives each gradient 2 (w - 1) / w times; half of it hides behind the backward pass.
    traffic = work.steps * 2 * (workers - 1) / workers * work.gradient_bytes / link
    parts = {
        "work": total / count,
        "the global batch divides no further": even - total / count,
        "few queries a GPU": max(0.0, least - even),
        "gradient traffic": max(0.0, traffic - even / 2),
        "stragglers": assumed.straggler * even if workers > 1 else 0.0,
        "fixed costs of a step": STEP_SECONDS * work.steps,
        "starting workers": START_SECONDS,
    }
    return Time(parts={name: max(0.0, value) for name, value in parts.items()}, workers=workers)


def _scaling(work: Work, times: dict[int, Time]) -> Scaling:
    counts = list(times)
    for fewer, more in pairwise(counts):
        gain = times[fewer].seconds / max(1e-9, times[more].seconds)
        if gain < EFFICIENT * more / fewer:
            return Scaling(stage=work.stage, times=times, stops_at=more, reason=times[more].limit)
    return Scaling(stage=work.stage, times=times, stops_at=0, reason="")
