"""How fast training was, beside what the machine can do at best: a large matrix product."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

_SIZE = {"cpu": 1024, "cuda": 8192}
_SECONDS = 0.3


def gemm_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a square matrix product on this device, measured here and now."""
    size = _SIZE.get(device.type, _SIZE["cuda"])
    left = torch.randn(size, size, device=device, dtype=dtype)
    best, end = 0.0, time.perf_counter() + _SECONDS
    while time.perf_counter() < end:
        started = time.perf_counter()
        left @ left
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


def body_parameters(module: torch.nn.Module) -> int:
    """Parameters that every token is multiplied with: all matrices but embedding tables."""
    tables = {
        id(table) for part in module.modules() if isinstance(part, torch.nn.Embedding) for table in part.parameters()
    }
    return sum(value.numel() for value in module.parameters() if value.ndim > 1 and id(value) not in tables)


def summary(steps: Sequence[Mapping[str, Any]], *, num_parameters: int, peak_flops: float) -> dict[str, float]:
    """What the step records say of speed.

    Args:
        steps: step records, the first of which is left out: it waits for memory to be allocated.
        num_parameters: of `body_parameters`.
        peak_flops: of all workers together.

    Returns:
        tokens_per_second; padding_fraction, of all tokens computed; peak_fraction, the share of `peak_flops` spent on
        tokens that are no padding, 6 operations per parameter and token (attention's own products not counted).
    """
    counted = steps[1:] or steps
    tokens = sum(step["num_tokens"] for step in counted)
    padded = sum(step["num_tokens"] / (1 - step["padding_fraction"]) for step in counted)
    per_second = tokens / max(1e-9, sum(step["seconds"] for step in counted))
    return {
        "tokens_per_second": per_second,
        "padding_fraction": 1 - tokens / padded,
        "peak_fraction": 6 * num_parameters * per_second / peak_flops,
    }
