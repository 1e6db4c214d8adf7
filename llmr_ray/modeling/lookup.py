"""Word embeddings of many batches by one lookup, so that their gradient is made once.

The gradient of a lookup is a matrix of the whole vocabulary. Where a step embeds its texts in a dozen passes, a dozen
such matrices are filled with zeros and added up, which costs a step of a MiniLM 7% of its time, and 12% of a worker's
half of one. Read through a table of the rows that the step needs, the passes add up small matrices.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch.nn import functional


@contextmanager
def one_lookup(module: torch.nn.Embedding, tokens: Sequence[np.ndarray], pad_id: int) -> Iterator[None]:
    """While the block runs, `module` embeds from the rows of these texts alone; results and gradient are the same.

    Args:
        module: the word embeddings. One that does not train, or counts its lookups, is left as it is.
        tokens: all texts that are embedded in the block.
        pad_id: the id that fills up shorter texts.
    """
    if not (module.weight.requires_grad and torch.is_grad_enabled()) or not _is_plain(module):
        yield
        return
    device = module.weight.device
    used_U = np.unique(np.concatenate([*tokens, np.asarray([pad_id])]))
    place_V = np.zeros(module.num_embeddings, np.int64)
    place_V[used_U] = np.arange(len(used_U))
    table_UD = module.weight.index_select(0, torch.from_numpy(used_U.astype(np.int64)).to(device))
    place_of = torch.from_numpy(place_V).to(device)
    padding = module.padding_idx
    untrained = int(place_V[padding]) if padding is not None and padding in used_U else None

    def lookup(ids: torch.Tensor) -> torch.Tensor:
        return functional.embedding(place_of[ids], table_UD, padding_idx=untrained)

    module.forward = lookup  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        del module.forward


def _is_plain(module: torch.nn.Embedding) -> bool:
    return type(module) is torch.nn.Embedding and module.max_norm is None and not module.scale_grad_by_freq
