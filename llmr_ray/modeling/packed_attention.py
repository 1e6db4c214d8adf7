"""Attention within each of many texts that stand one after the other: an attention function of transformers' interface.

A batch without padding is one row of all texts' tokens, so that every other layer computes on nothing else. Texts of
one length that stand together are one call of the attention kernel. Where a gradient is asked for it computes in
float32 whatever the precision of the model: on a CPU a gradient takes several times as long in bfloat16.

Tensor legend: H heads, T tokens of all texts, d head size.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "llmr_packed"

Runs = list[tuple[int, int]]
"""Texts of one length that follow each other: (how many, tokens of each)."""


def runs_of(lengths: Sequence[int]) -> Runs:
    """The runs of texts of these lengths."""
    return [(len(list(same)), length) for length, same in groupby(lengths)]


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    runs: Runs | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """query, key and value [1, H, T, d] to [1, T, H, d]. Without `runs`, a padded batch: transformers' own function.

    Raises:
        NotImplementedError: the model looks only back, or only near, or changes scores, which is not computed here.
    """
    if runs is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **others
        )
    changes = [name for name in ("sliding_window", "softcap", "s_aux", "position_bias") if others.get(name) is not None]
    if changes or getattr(module, "is_causal", False) or key.shape != query.shape:
        raise NotImplementedError(f"attention of {type(module).__name__} on packed texts: {changes}")
    sizes, dtype = [count * length for count, length in runs], query.dtype
    within = torch.float32 if torch.is_grad_enabled() else dtype
    # Split and not sliced: the gradient of a split is one concatenation.
    parts = zip(*(part[0].transpose(0, 1).split(sizes) for part in (query, key, value)), strict=True)
    attended = []
    with torch.autocast(query.device.type, enabled=False):
        for (count, length), part in zip(runs, parts, strict=True):
            query, key, value = (rows_THd.to(within).unflatten(0, (count, length)).transpose(1, 2) for rows_THd in part)
            found = functional.scaled_dot_product_attention(query, key, value, dropout_p=dropout, scale=scaling)
            attended.append(found.transpose(1, 2).flatten(0, 1))
        return torch.cat(attended)[None].to(dtype), None


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
