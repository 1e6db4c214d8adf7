"""Which floating-point type this machine multiplies fast."""

from functools import cache
from pathlib import Path

from llmr_ray.errors import ConfigError


@cache
def cpu_has(*words: str) -> bool:
    """Whether what Linux says of this processor (flags, vendor) holds one of some words."""
    info = Path("/proc/cpuinfo")
    return info.exists() and any(word in info.read_text() for word in words)


def resolve_precision(name: str) -> str:
    """The precision meant by `name` on this machine: "float32", "bfloat16" or "int8".

    "auto" is bfloat16 where the hardware multiplies it natively (CUDA from sm80, CPUs with avx512_bf16 or amx_bf16):
    elsewhere it is emulated and slower. The resolved value is part of the identity of what it computes.
    """
    if name in ("float32", "bfloat16", "int8"):
        return name
    if name != "auto":
        raise ConfigError(f"precision is '{name}', but must be auto, float32, bfloat16 or int8.")
    import torch

    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.get_device_capability() >= (8, 0) else "float32"
    return "bfloat16" if cpu_has("avx512_bf16", "amx_bf16") else "float32"


def training_precision(name: str) -> str:
    """What a model that embeds in `name` is trained in: 8 bits are for inference, its training takes "auto"."""
    return resolve_precision("auto" if name == "int8" else name)
