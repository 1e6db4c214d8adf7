"""Linear layers in 8 bits, for inference on processors that multiply 8-bit integers fast.

A layer computes ``x W + b``. Weights are rounded to 8 bits with one scale for each output; inputs are rounded when they
come, with one scale for each token, so that what a text becomes depends on that text alone, and no range has to be
known beforehand. Transformers have a few input features that are far larger than the others and would take all of a
token's range: each feature is divided by the root of its largest value, and the weights that meet it are multiplied by
that (SmoothQuant, 2211.10438, eq. 4 with alpha 0.5; without the weights' part, so that layers of one input share what
is rounded). The largest values come from texts that are kept here, as does the measure of what is lost.

Tensor legend: T tokens, I inputs and O outputs of a layer, n texts, D embedding size.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any
from weakref import ref

import numpy as np
import torch

from llmr_ray.errors import ConfigError
from llmr_ray.precision import cpu_has

LEAST_COSINE = 0.98
"""What the embedding of each text of SAMPLE must have in common with that of float32; MiniLM has 0.995."""

FAST = ("avx512_vnni", "avx_vnni", "amx_int8")
"""Flags of processors that multiply 8-bit integers exactly and fast; older ones saturate sums at 16 bits."""

SAMPLE = (
    "The Great Barrier Reef is the world's largest coral reef system, composed of over 2,900 individual reefs.",
    "who won the world cup in 1998 and who was the captain of the team",
    "How do I return an item that I bought online? The parcel was damaged when it arrived on Tuesday.",
    "def merge(left, right):\n    result = []\n    while left and right:\n        result.append(left.pop(0))\n",
    '{"name": "get_weather", "description": "Current weather of a city.", "parameters": {"city": "string"}}',
    "A: hey, are you coming tonight?\nB: can't, I have to finish my thesis :( maybe next week!",
    "It is a gorgeous, witty, seductive movie. Sentiment: positive",
    "Die Würde des Menschen ist unantastbar. Sie zu achten und zu schützen ist Verpflichtung aller staatlichen Gewalt.",
    "人人生而自由,在尊严和权利上一律平等。",
    "يولد جميع الناس أحراراً متساوين في الكرامة والحقوق.",
    "If x + 3 = 12 and y = 2x, what is y? A. 9 B. 12 C. 18 D. 24",
    "Metformin lowers hepatic glucose production; contraindicated at eGFR < 30 mL/min/1.73 m2 (see table 4).",
    "SELECT name, COUNT(*) FROM orders WHERE total > 99.50 GROUP BY name ORDER BY 2 DESC LIMIT 10;",
    "The parties agree that any dispute arising out of this contract shall be settled by arbitration in Geneva.",
    "Breaking: shares of the company fell 12.4% on Monday after it missed quarterly earnings estimates.",
    "yes",
)
"""Texts of many kinds; in other scripts as well, since encoders of many languages are quantised on them too."""


def quantise(module: torch.nn.Module, run: Callable[[], np.ndarray], name: str) -> float:
    """From now on the module's linear layers multiply in 8 bits where no gradient is asked for.

    Parameters, their names and what is saved stay as they are.

    Args:
        module: a transformer in float32 on the CPU.
        run: embeds SAMPLE with it: float32 [n, D].
        name: of the model, for the error.

    Returns:
        The least cosine between a text of SAMPLE embedded before and after.

    Raises:
        ConfigError: the processor lacks 8-bit products, or that cosine is below LEAST_COSINE.
    """
    if not cpu_has(*FAST) or next(module.parameters()).device.type != "cpu":
        raise ConfigError(
            f"precision is 'int8', but that needs a CPU with one of {', '.join(FAST)}, and no GPU. Set "
            "embedder.precision=auto."
        )
    layers = [layer for layer in module.modules() if type(layer) is torch.nn.Linear]
    largest, watching = _watched(layers)
    before_nD = run()
    for handle in watching:
        handle.remove()
    rows = _Rows()
    for layer, largest_I in zip(layers, largest, strict=True):
        if largest_I is not None:
            forward = partial(_forward, layer.forward, _Weights(layer, largest_I), rows)
            layer.forward = forward  # type: ignore[method-assign]
    after_nD = run()
    norm_n = np.linalg.norm(before_nD, axis=1) * np.linalg.norm(after_nD, axis=1)
    cosine = float(((before_nD * after_nD).sum(axis=1) / norm_n).min())
    if not cosine >= LEAST_COSINE:
        raise ConfigError(
            f"in 8 bits {name} embeds a text with a cosine of {cosine:.4f} to its embedding in float32; from "
            f"{LEAST_COSINE} on nothing is lost that retrieval notices. Set embedder.precision=auto."
        )
    return cosine


def _watched(layers: Sequence[torch.nn.Linear]) -> tuple[list[torch.Tensor | None], list[Any]]:
    """For each layer the largest value of each input feature (None: it is not called), and what to remove after."""
    largest: list[torch.Tensor | None] = [None] * len(layers)

    def watch(number: int, layer: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        found_I = inputs[0].detach().float().flatten(0, -2).abs().amax(dim=0)
        known_I = largest[number]
        largest[number] = found_I if known_I is None else torch.maximum(known_I, found_I)

    return largest, [layer.register_forward_pre_hook(partial(watch, at)) for at, layer in enumerate(layers)]


class _Weights:
    """A layer's weights in 8 bits, as oneDNN wants them, with the scale of each output."""

    def __init__(self, layer: torch.nn.Linear, largest_I: torch.Tensor) -> None:
        weight_OI = layer.weight.detach().float()
        factor_I = largest_I.clamp_min(1e-5).sqrt()
        weight_OI = weight_OI * factor_I
        self.scale_O = weight_OI.abs().amax(dim=1).clamp_min(1e-12) / 127
        rounded_OI = (weight_OI / self.scale_O[:, None]).round_().to(torch.int8)
        self.packed = torch.ops.onednn.qlinear_prepack(rounded_OI, None)
        self.zero_O = torch.zeros(len(self.scale_O), dtype=torch.int64)
        self.inverse_I = (1 / factor_I).contiguous()
        self.bias_O = torch.zeros(len(self.scale_O)) if layer.bias is None else layer.bias.detach().float()


class _Rows:
    """Rounds inputs. What was rounded last is kept while its input lives: a query, a key and a value layer share it."""

    def __init__(self) -> None:
        self._last: tuple[Any, torch.Tensor, tuple[torch.Tensor, torch.Tensor]] | None = None
        self._threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(self._threads)

    def of(self, input: torch.Tensor, inverse_I: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """An input [..., I] times `inverse_I`, rounded: int8 [T, I], and the scale of each token [T, 1]."""
        if self._last is not None and self._last[0]() is input and torch.equal(self._last[1], inverse_I):
            return self._last[2]
        from llmr_ray.modeling.int8_kernels import round_rows

        values_TI = input.float().reshape(-1, input.shape[-1]).contiguous()
        rounded_TI = torch.empty(values_TI.shape, dtype=torch.int8)
        scale_T = torch.empty(len(values_TI), dtype=torch.float32)
        cuts = [len(scale_T) * part // self._threads for part in range(self._threads + 1)]

        def round_part(start: int, end: int) -> None:
            part = slice(start, end)
            values, rounded, scale = (tensor[part].numpy() for tensor in (values_TI, rounded_TI, scale_T))
            round_rows(values, inverse_I.numpy(), rounded, scale)

        list(self._pool.map(round_part, cuts[:-1], cuts[1:]))
        self._last = (ref(input), inverse_I, (rounded_TI, scale_T[:, None]))
        return self._last[2]


def _forward(
    exact: Callable[[torch.Tensor], torch.Tensor], weights: _Weights, rows: _Rows, input: torch.Tensor
) -> torch.Tensor:
    """The layer in 8 bits; where a gradient is asked for, `exact`, what it did before."""
    if torch.is_grad_enabled():
        return exact(input)
    rounded_TI, scale_T1 = rows.of(input, weights.inverse_I)
    sums_TO = torch.ops.onednn.qlinear_pointwise(
        rounded_TI, 1.0, 0, weights.packed, weights.scale_O, weights.zero_O, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return torch.addcmul(weights.bias_O, sums_TO, scale_T1).view(*input.shape[:-1], -1)
