"""Attention over a token tree, for any transformers decoder: an attention function that the models look up by name.

Tokens are taken in blocks of consecutive rows. What a block sees besides itself are ancestors of its first token,
because an ancestor outside the block has descendants up to the row itself, the block's first row among them. So a block
is one dense product with few masked columns, and no T x T matrix exists.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers import AttentionInterface

from llmr_ray.feedback.trie import TokenTree, ancestors

NAME = "llmr_tree"

BLOCK_ROWS = 128
"""Rows of a block. Fewer waste less on masked columns, more make larger products."""


@dataclass(kw_only=True)
class TreeLayout:
    """What the attention function needs to know about a tree; handed through the model's forward as `tree`.

    blocks: (first row, one past the last, rows of the keys, visible [rows, keys] as bool).
    position_T: depth of each token, for models with a sliding window.
    """

    blocks: Sequence[tuple[int, int, torch.Tensor, torch.Tensor]]
    position_T: torch.Tensor
    _bias: dict[tuple[int | None, torch.dtype], list[torch.Tensor]] = field(default_factory=dict)

    def bias(self, window: int | None, dtype: torch.dtype) -> list[torch.Tensor]:
        """Per block what is added to the scores: 0, or -inf where a token is not seen; made once for all layers."""
        key = (window, dtype)
        if key not in self._bias:
            self._bias[key] = []
            for start, stop, keys_K, visible_RK in self.blocks:
                seen = visible_RK
                if window is not None:
                    near = self.position_T[start:stop, None] - self.position_T[keys_K][None] < window
                    seen = seen & near
                bias_RK = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
                self._bias[key].append(bias_RK.masked_fill_(~seen, -math.inf))
        return self._bias[key]


def layout(tree: TokenTree, device: torch.device, block_rows: int = BLOCK_ROWS) -> TreeLayout:
    """Blocks of a tree on a device."""
    blocks = []
    for start in range(0, len(tree), block_rows):
        stop = min(len(tree), start + block_rows)
        keys_K = np.concatenate([ancestors(tree, start), np.arange(start, stop)])
        rows_R = np.arange(start, stop)[:, None]
        visible_RK = (keys_K[None] <= rows_R) & (rows_R < tree.end_T[keys_K][None])
        blocks.append(
            (start, stop, torch.from_numpy(keys_K).to(device), torch.from_numpy(visible_RK).to(device)),
        )
    return TreeLayout(blocks=blocks, position_T=torch.from_numpy(tree.position_T).to(device))


def tree_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    tree: TreeLayout,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **unused: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function of transformers' interface. query [1, H, T, D], key and value [1, Hkv, T, D].

    Raises:
        NotImplementedError: the model caps its scores or has attention sinks, which this function does not compute.
    """
    if softcap is not None or unused.get("s_aux") is not None:
        raise NotImplementedError(
            "this model caps attention scores or has attention sinks, which the tree engine does not compute. "
            "Set runtime.llm_scoring=engine."
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    output = torch.empty_like(query)
    for (start, stop, keys_K, _), bias_RK in zip(tree.blocks, tree.bias(sliding_window, query.dtype), strict=True):
        output[:, :, start:stop] = functional.scaled_dot_product_attention(
            query[:, :, start:stop],
            key.index_select(2, keys_K),
            value.index_select(2, keys_K),
            attn_mask=bias_RK,
            scale=scale,
            enable_gqa=key.shape[1] != query.shape[1],
        )
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, tree_attention)
