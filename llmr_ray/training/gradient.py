"""The gradient of a loss over the embeddings of many texts: at once, or with the memory of one pass.

A contrastive loss needs the embeddings of a whole batch, and plain backpropagation keeps the activations of all of
them. Gradient caching (GradCache, 2101.06983) embeds without keeping anything, takes the gradient with respect to
the embeddings, then embeds pass by pass once more and sends each pass its part. The gradient is the same, dropout
included: each pass repeats the random numbers it drew the first time. The price is one more forward pass.
"""

import contextlib
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

Tokens = list[np.ndarray]
LossOf = Callable[[torch.Tensor], torch.Tensor]
"""From embeddings [T, D] to the scalar loss, with gradient."""


class Encoder(Protocol):
    """Embeds texts in passes: float32 [T, D] in their order."""

    def __call__(self, tokens: Tokens) -> torch.Tensor:
        """All texts, in as many passes as `batches` cuts them into."""
        ...

    def batches(self, tokens: Tokens) -> list[np.ndarray]:
        """The texts of each pass."""
        ...


def in_order(passes: list[np.ndarray], embedded: list[torch.Tensor]) -> torch.Tensor:
    """The embeddings of all passes as one tensor [T, D], in the order of the texts."""
    back = torch.from_numpy(np.argsort(np.concatenate(passes), kind="stable"))
    return torch.cat(embedded)[back.to(embedded[0].device)]


def backward(model: Any, tokens: Tokens, loss_of: LossOf) -> tuple[torch.Tensor, torch.Tensor]:
    """Adds the loss's gradient to the parameters'; keeps all activations until then.

    Args:
        model: an Encoder, or one within DistributedDataParallel.
        tokens: T texts.
        loss_of: the loss of their embeddings.

    Returns:
        The loss and the embeddings [T, D], without gradient.
    """
    embedding_TD = model(tokens)
    loss = loss_of(embedding_TD)
    loss.backward()
    return loss.detach(), embedding_TD.detach()


def cached_backward(model: Any, tokens: Tokens, loss_of: LossOf) -> tuple[torch.Tensor, torch.Tensor]:
    """As `backward`, with the activations of one pass at a time. Workers talk to each other in the last pass alone."""
    distributed = isinstance(model, DistributedDataParallel)
    encoder: Encoder = model.module if distributed else model
    passes = encoder.batches(tokens)
    embedded, states = [], []
    with torch.no_grad():
        for rows in passes:
            states.append(_random_state())
            embedded.append(encoder([tokens[row] for row in rows]))
    embedding_TD = in_order(passes, embedded).requires_grad_()
    loss = loss_of(embedding_TD)
    [grad_TD] = torch.autograd.grad(loss, [embedding_TD])
    after = _random_state()
    for number, (rows, state) in enumerate(zip(passes, states, strict=True)):
        _restore(state)
        is_last = number == len(passes) - 1
        with contextlib.nullcontext() if is_last or not distributed else model.no_sync():
            again_BD = model([tokens[row] for row in rows])
            again_BD.backward(grad_TD[torch.from_numpy(rows).to(again_BD.device)])
    _restore(after)
    return loss.detach(), embedding_TD.detach()


def _random_state() -> tuple[torch.Tensor, torch.Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None


def _restore(state: tuple[torch.Tensor, torch.Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])
