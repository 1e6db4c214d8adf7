"""GPUs by kind, and how long work takes on one: data sheets, and the shares of them that are assumed to be reached."""

from dataclasses import dataclass

from llmr_ray.errors import ConfigError

TERA = 1e12
GIGA = 1e9


@dataclass(frozen=True, kw_only=True)
class GPU:
    """One kind, from its data sheet.

    flops: dense half-precision products a second (bfloat16; float16 where there is none). memory_bytes, bandwidth
    (bytes a second). link: bytes a second to the other GPUs of its node, one way.
    """

    name: str
    flops: float
    memory_bytes: float
    bandwidth: float
    link: float


GPUS = {
    kind.name: kind
    for kind in (
        GPU(name="T4", flops=65 * TERA, memory_bytes=16 * GIGA, bandwidth=0.320 * TERA, link=16 * GIGA),
        GPU(name="L4", flops=121 * TERA, memory_bytes=24 * GIGA, bandwidth=0.300 * TERA, link=32 * GIGA),
        GPU(name="V100", flops=125 * TERA, memory_bytes=32 * GIGA, bandwidth=0.900 * TERA, link=150 * GIGA),
        GPU(name="A100-40G", flops=312 * TERA, memory_bytes=40 * GIGA, bandwidth=1.555 * TERA, link=300 * GIGA),
        GPU(name="A100-80G", flops=312 * TERA, memory_bytes=80 * GIGA, bandwidth=2.039 * TERA, link=300 * GIGA),
        GPU(name="H100", flops=989 * TERA, memory_bytes=80 * GIGA, bandwidth=3.35 * TERA, link=450 * GIGA),
        GPU(name="H200", flops=989 * TERA, memory_bytes=141 * GIGA, bandwidth=4.8 * TERA, link=450 * GIGA),
    )
}
"""By name: NVIDIA's data sheets, without sparsity; SXM where there is a choice (V100: 32 GB)."""


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What cannot be read off a configuration. Each is a guess that a probe or a first run replaces.

    utilisation: share of peak products that scoring, encoding and training reach; 0.45 is what well-batched prefill of
    7B models and training of base-size encoders reach on A100s. bandwidth_utilisation: of memory bandwidth, in sampling
    and searching. fill: mean length of a text as a share of its limit. decode_batch: sequences sampled together.
    documents: of a shared pool whose size the configuration does not say; 0: the candidates of its queries.
    node_memory_gb: what shards of an index may take of a node. network: bytes a second between nodes, for each GPU.
    load_bandwidth: bytes a second at which weights come from storage. cores_per_gpu, documents_per_core (a second):
    what prepares and groups. core_flops: float32 products a second of a core at its peak, where searches run on cores.
    straggler: by how much the slowest worker is behind the mean.
    """

    utilisation: float = 0.45
    bandwidth_utilisation: float = 0.6
    fill: float = 0.5
    decode_batch: int = 64
    documents: int = 0
    node_memory_gb: float = 256.0
    network: float = 25 * GIGA
    load_bandwidth: float = 1 * GIGA
    cores_per_gpu: int = 8
    documents_per_core: float = 2000.0
    core_flops: float = 90 * GIGA
    straggler: float = 0.1


def gpu_of(name: str) -> GPU:
    """The kind of a name; ConfigError naming the known ones."""
    if name not in GPUS:
        raise ConfigError(f"there is no GPU kind '{name}' in the table. Known: {', '.join(GPUS)}.")
    return GPUS[name]


def seconds(
    gpu: GPU, assumed: Assumptions, *, flops: float = 0, bytes_read: float = 0, decoded: float = 0, weights: float = 0
) -> float:
    """Seconds on one GPU: products by its peak, reading by its bandwidth, sampling by whichever is slower.

    Args:
        gpu, assumed: the GPU, and the shares of its data sheet that are reached.
        flops: of products over many tokens at once.
        bytes_read: from memory.
        decoded: tokens sampled one after the other, `decode_batch` sequences together.
        weights: parameters of the model that samples; each step reads them all, in half precision.
    """
    rate = gpu.flops * assumed.utilisation
    bandwidth = gpu.bandwidth * assumed.bandwidth_utilisation
    step = max(2 * weights / bandwidth, 2 * weights * assumed.decode_batch / rate)
    return flops / rate + bytes_read / bandwidth + decoded / assumed.decode_batch * step
