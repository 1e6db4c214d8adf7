"""How the embedder is trained: one embedding for each distinct text of a step, losses over gathered documents.

Tensor legend: D embedding, T distinct texts of this rank.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from llmr_ray.config import TaskConfig, TaskTrain, TrainConfig
from llmr_ray.errors import ConfigError
from llmr_ray.modeling.embedder import Embedder
from llmr_ray.training.batches import Block
from llmr_ray.training.dataset import TrainingData, write_shard
from llmr_ray.training.gather import place
from llmr_ray.training.groups import reward_spread
from llmr_ray.training.objective import LocalBatch, batch_loss, local_batch


@dataclass(frozen=True, kw_only=True)
class EmbedderRecipe:
    """The training of an embedder (recipe.Recipe).

    tasks: sampling and losses by task. prompts: stored with saved models. The rest as in Embedder and write_shard.
    """

    train: TrainConfig
    seed: int
    tasks: Mapping[str, TaskTrain]
    instructions: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    pooling: str = "auto"
    similarity: str = "cosine"
    pool_instruction: bool = True
    max_query_tokens: int
    max_document_tokens: int
    precision: str = "auto"
    prompts: dict[str, str] = field(default_factory=dict)

    def load(self, folder: Path, device: str | None) -> Embedder:
        """The embedder in a folder."""
        return Embedder(
            folder,
            pooling=self.pooling,
            similarity=self.similarity,
            pool_instruction=self.pool_instruction,
            max_query_tokens=self.max_query_tokens,
            max_document_tokens=self.max_document_tokens,
            precision=self.precision,
            device=device,
        )

    def save(self, model: Embedder, folder: Path) -> None:
        """A sentence-transformers folder."""
        model.save(folder, self.prompts)

    def objective(self, model: Embedder, data: TrainingData) -> "BiEncoding":
        """The losses of the tasks.

        Raises:
            ConfigError: embeddings are to be cut to sizes that they do not have.
        """
        if too_long := [size for size in self.train.matryoshka_dimensions if not 0 < size < model.dimension]:
            raise ConfigError(
                f"train.matryoshka_dimensions {too_long} are not between 1 and {model.dimension - 1}: the "
                f"embedder has {model.dimension} dimensions, and the whole is always trained."
            )
        return BiEncoding(self, data)

    def writer(self, base: Path) -> Callable[[pa.Table, Path], None]:
        """Queries and documents with their instructions, as the base's tokenizer cuts them."""
        # On the device "meta" a model has no weights: the tokenizer is all that is wanted.
        embedder = self.load(base, "meta")
        return partial(
            write_shard,
            tokenize=lambda texts, instruction, limit: embedder.tokenize(
                texts, instruction=instruction, max_tokens=limit
            ),
            instructions=self.instructions,
            max_query_tokens=self.max_query_tokens,
            max_document_tokens=self.max_document_tokens,
        )


def instructions_of(tasks: Mapping[str, TaskConfig]) -> dict[str, tuple[str, str]]:
    """The instructions of query and document by task."""
    return {name: (task.query_instruction, task.document_instruction) for name, task in tasks.items()}


class BiEncoding:
    """The losses of similarities, by task (recipe.Objective)."""

    def __init__(self, recipe: EmbedderRecipe, data: TrainingData) -> None:
        self.recipe, self.data = recipe, data
        self.rank, self.world_size = place()

    def repeats(self) -> dict[str, int]:
        """As the tasks say."""
        return {name: task.repeat for name, task in self.recipe.tasks.items()}

    def batch(self, block: Block) -> "EmbeddingBatch":
        """The texts of this rank's groups, each once."""
        local = local_batch(
            self.data,
            block,
            tasks=self.recipe.tasks,
            group_size=self.recipe.train.group_size,
            seed=self.recipe.seed,
            rank=self.rank,
            world_size=self.world_size,
            sampled_once=self.recipe.train.sampling == "once",
            keeps_false_negatives=self.recipe.train.false_negatives == "kept",
        )
        return EmbeddingBatch(self.recipe, local, [self.data.text(int(number)) for number in local.texts])

    def record(self, totals: list[float]) -> dict[str, Any]:
        """Spread of the rewards, documents spared as false negatives, and how evenly embeddings are spread."""
        margin, num_rewarded, num_spared, near = totals
        return {
            "reward_margin": margin / num_rewarded if num_rewarded else None,
            "num_false_negatives": int(num_spared),
            "uniformity": math.log(near / self.world_size),
        }


@dataclass(frozen=True)
class EmbeddingBatch:
    """A rank's groups and the texts they are made of (recipe.Batch)."""

    recipe: EmbedderRecipe
    local: LocalBatch
    tokens: list[np.ndarray]

    def loss(self, output: torch.Tensor) -> torch.Tensor:
        """The losses of embeddings [T, D], whole and cut to their first dimensions."""
        local, train = self.local, self.recipe.train
        where_B, where_BG = (torch.from_numpy(at).to(output.device) for at in (local.query_B, local.doc_BG))
        each = [
            batch_loss(
                cut[where_B],
                cut[where_BG],
                local,
                tasks=self.recipe.tasks,
                temperature=train.temperature,
                gather_devices=train.gather_devices,
            )
            for cut in nested(output, train.matryoshka_dimensions, unit_norm=self.recipe.similarity == "cosine")
        ]
        return torch.stack(each).mean()

    def sums(self, output: torch.Tensor) -> list[float]:
        """The groups' best - worst reward, how many have rewards, in-batch documents that are no negatives because the
        query counts them, or their text, as its own, and `nearness`."""
        local = self.local
        rewarded_BG = local.rewards_BG[local.has_rewards_B]
        margin = reward_spread(rewarded_BG)
        spared = int((~local.others_BC).sum()) - local.doc_BG.size
        return [margin, float(len(rewarded_BG)), float(spared), nearness(output)]


def nested(embedding_TD: torch.Tensor, sizes: list[int], *, unit_norm: bool = True) -> list[torch.Tensor]:
    """The embeddings whole and cut to their first dimensions, each of unit norm where the whole ones are."""
    cut = [embedding_TD[:, :size] for size in sizes]
    return [embedding_TD, *((torch.nn.functional.normalize(part, dim=1) for part in cut) if unit_norm else cut)]


def nearness(embedding_TD: torch.Tensor) -> float:
    """Mean of exp(-2 |x - y|^2) over pairs of texts (at most the first 512); its log is the uniformity of 2005.10242.

    x and y are of unit norm, or made so. 1 where all texts lie on one point; the spread-out embeddings of a good
    retriever are near exp(-4).
    """
    some = torch.nn.functional.normalize(embedding_TD[:512].float(), dim=1)
    near = torch.exp(4 * (some @ some.T - 1))
    pairs = len(some) * (len(some) - 1)
    return float((near.sum() - near.diagonal().sum()) / pairs) if pairs else 1.0
