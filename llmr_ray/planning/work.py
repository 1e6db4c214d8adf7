"""The work of one stage, independent of where it runs."""

from dataclasses import dataclass, replace

from llmr_ray.planning.hardware import GPU, Assumptions, seconds


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a stage takes.

    units, unit: how much of what. tokens: that go through a model. flops, bytes_read, decoded: as hardware.seconds
    takes them. weights: parameters that each worker loads. memory_bytes: of each GPU of a worker. node_bytes: of files
    that a node maps, or of what a worker holds in the node's memory. storage_bytes: what the stage leaves. shards:
    pieces that workers share; the unit of retry. cpu_seconds: of work on cores. steps, gradient_bytes, batch: of a
    training. gpus: of each worker. remedy: settings by which its workers need less GPU memory.
    """

    stage: str
    unit: str
    units: float
    tokens: float = 0
    flops: float = 0
    bytes_read: float = 0
    decoded: float = 0
    weights: float = 0
    memory_bytes: float = 0
    node_bytes: float = 0
    storage_bytes: float = 0
    shards: int = 1
    cpu_seconds: float = 0
    steps: int = 0
    gradient_bytes: float = 0
    batch: int = 0
    gpus: int = 1
    remedy: str = ""

    def searching(self, flops: float, *, on_gpus: bool, assumed: Assumptions) -> "Work":
        """The work with exact searches of so many FLOPs, on GPUs or on cores."""
        if on_gpus:
            return replace(self, flops=self.flops + flops)
        return replace(self, cpu_seconds=self.cpu_seconds + flops / (assumed.core_flops * assumed.utilisation))

    def gpu_hours(self, gpu: GPU, assumed: Assumptions) -> float:
        """On one GPU of a kind, without what does not divide."""
        of = {"flops": self.flops, "bytes_read": self.bytes_read, "decoded": self.decoded, "weights": self.weights}
        return seconds(gpu, assumed, **of) / 3600

    def fits(self, gpu: GPU) -> bool:
        """Whether its workers have room on GPUs of a kind."""
        return self.memory_bytes <= gpu.memory_bytes
