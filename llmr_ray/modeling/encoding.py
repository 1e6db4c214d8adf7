"""Texts of a task to vectors, as a run embeds them: what a process does that needs a few vectors and no artifact."""

from collections.abc import Callable, Sequence

import numpy as np

from llmr_ray.config import Config

Encode = Callable[[list[str], str, str], np.ndarray]
"""(n texts, task, "query" or "document") -> float32 [n, D], unit norm unless embedder.similarity is dot."""


def text_encoder(model: str, config: Config) -> Encode:
    """Embeds with the model in a folder, on as many threads as the run's embedding actors have."""
    import torch

    from llmr_ray.modeling.embedder import Embedder

    torch.set_num_threads(config.runtime.encode_threads)
    embedder = Embedder(
        model,
        pooling=config.embedder.pooling,
        similarity=config.embedder.similarity,
        pool_instruction=config.embedder.pool_instruction,
        max_query_tokens=config.embedder.max_query_tokens,
        max_document_tokens=config.embedder.max_document_tokens,
        precision=config.embedder.precision,
    )

    def encode(texts: list[str], task: str, side: str) -> np.ndarray:
        return embedder.encode(
            texts,
            instruction=config.tasks[task].instruction(side),
            max_tokens=config.max_tokens(task, side),
            batch_tokens=config.runtime.encode_batch_tokens,
        )

    return encode


def encode_each(model: str, config: Config, task: str, asked: Sequence[tuple[str, list[str]]]) -> list[np.ndarray]:
    """Vectors of several lists of texts of a task, each with its side: what another process is given to do."""
    encode = text_encoder(model, config)
    return [encode(texts, task, side) for side, texts in asked]
