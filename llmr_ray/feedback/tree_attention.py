"""Attention over a token tree, for any transformers decoder: an attention function that the models look up by name.

Tokens are taken in blocks of consecutive rows. Where all of a tree is computed at once, what a block sees besides
itself are ancestors of its first token, because an ancestor outside the block has descendants up to the row itself, the
block's first row among them. So a block is one dense product with few masked columns, and no T x T matrix exists. A
tree may also be computed in parts, each with the keys and values of the parts before it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers import AttentionInterface

from llmr_ray.feedback.trie import TokenTree

NAME = "llmr_tree"

BLOCK_ROWS = {"cpu": 32, "cuda": 128}
"""Rows of a block. Fewer waste less on masked columns, more make larger products."""


@dataclass(kw_only=True)
class TreeLayout:
    """What the attention function needs to know about the rows it computes; handed through the model's forward as
    `tree`.

    blocks: (first row, one past the last, places of the keys, visible [rows, keys] as bool).
    position_R, position_K: depth of each row and of each key, for models with a sliding window.
    """

    blocks: Sequence[tuple[int, int, torch.Tensor, torch.Tensor]]
    position_R: torch.Tensor
    position_K: torch.Tensor
    _bias: dict[tuple[int | None, torch.dtype], list[torch.Tensor]] = field(default_factory=dict)

    def bias(self, window: int | None, dtype: torch.dtype) -> list[torch.Tensor]:
        """Per block what is added to the scores: 0, or -inf where a token is not seen; made once for all layers."""
        key = (window, dtype)
        if key not in self._bias:
            self._bias[key] = []
            for start, stop, keys_K, visible_RK in self.blocks:
                seen = visible_RK
                if window is not None:
                    near = self.position_R[start:stop, None] - self.position_K[keys_K][None] < window
                    seen = seen & near
                bias_RK = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
                self._bias[key].append(bias_RK.masked_fill_(~seen, -math.inf))
        return self._bias[key]


def layout(tree: TokenTree, device: torch.device, rows_R: np.ndarray, held_K: np.ndarray) -> TreeLayout:
    """Blocks of rows of a tree on a device.

    Args:
        tree: the whole tree.
        device: where the tensors are put.
        rows_R: the tokens to compute, ascending; what they see is among these and `held_K`.
        held_K: the tokens whose keys are there already, in the order of the keys.
    """
    keys_K = np.concatenate([held_K, rows_R])
    end_K = tree.end_T[keys_K]
    blocks = []
    size = BLOCK_ROWS.get(device.type, BLOCK_ROWS["cuda"])
    for start in range(0, len(rows_R), size):
        block_R = rows_R[start : start + size]
        # Seen by some row of the block: a row stands between the token and the end of its descendants.
        seen_K = np.flatnonzero(np.searchsorted(block_R, keys_K) < np.searchsorted(block_R, end_K))
        visible_RK = (keys_K[seen_K][None] <= block_R[:, None]) & (block_R[:, None] < end_K[seen_K][None])
        blocks.append(
            (start, start + len(block_R), torch.from_numpy(seen_K).to(device), torch.from_numpy(visible_RK).to(device)),
        )
    return TreeLayout(
        blocks=blocks,
        position_R=torch.from_numpy(tree.position_T[rows_R]).to(device),
        position_K=torch.from_numpy(tree.position_T[keys_K]).to(device),
    )


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
    """The attention function of transformers' interface. query [1, H, R, D], key and value [1, Hkv, K, D].

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
