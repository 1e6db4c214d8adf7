"""Linear layers in float32 through oneDNN, on processors where PyTorch's own products leave half the speed unused.

PyTorch's x86 builds multiply float32 by MKL, which takes its AVX-512 kernels on Intel's processors alone; oneDNN makes
its kernels for what the processor can do. On an AMD EPYC with AVX-512 the products of a MiniLM run at 150 to 190
GFLOP/s a core instead of 90, forward and backward. Values agree to rounding.
"""

from functools import cache, partial
from typing import Any

import torch

from llmr_ray.precision import cpu_has


@cache
def is_faster() -> bool:
    """Whether this machine gains: a rule and no measurement, so that a machine always computes the same."""
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    return cpu_has("AuthenticAMD")


def use_onednn(module: torch.nn.Module) -> None:
    """From now on the module's linear layers multiply by oneDNN where they are in float32 on the CPU.

    Parameters, their names and what is saved stay as they are.
    """
    for layer in module.modules():
        if type(layer) is torch.nn.Linear:
            layer.forward = partial(_forward, layer)  # type: ignore[method-assign]


def product(left: torch.Tensor, right_OI: torch.Tensor, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    """left [..., I] times the transpose of right, float32 [..., O]; strides are read as they are, nothing is copied."""
    return torch.ops.mkldnn._linear_pointwise(left, right_OI, bias_O, "none", [], "")


def _forward(layer: torch.nn.Linear, input: torch.Tensor) -> torch.Tensor:
    if input.dtype != torch.float32 or not input.is_cpu or torch.is_autocast_enabled("cpu"):
        return torch.nn.functional.linear(input, layer.weight, layer.bias)
    if not torch.is_grad_enabled():
        return product(input, layer.weight, layer.bias)
    return _Linear.apply(input, layer.weight, layer.bias)


class _Linear(torch.autograd.Function):
    """input [..., I], weight [O, I], bias [O] or None: [..., O]."""

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(input, weight_OI)
        return product(input, weight_OI, bias_O)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        input, weight_OI = ctx.saved_tensors
        grad_NO, input_NI = grads[0].contiguous().flatten(0, -2), input.flatten(0, -2)
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            product(grad_NO, weight_OI.T).view(input.shape) if needs_input else None,
            product(grad_NO.T, input_NI.T) if needs_weight else None,
            grad_NO.sum(dim=0) if needs_bias else None,
        )
