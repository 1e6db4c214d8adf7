"""How the reward model is trained: a cross-encoder that learns which candidates the LLM likes (LLM-R, methods.md B.6).

Texts are stored without special tokens, each once; a step puts together the pairs that it needs.

Tensor legend: B queries of this rank, G documents of a group, T distinct pairs of this rank.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from llmr_ray.artifacts import seed_of
from llmr_ray.config import TaskTrain, TrainConfig
from llmr_ray.modeling.cross_encoder import CrossEncoder, load_tokenizer, tokenize
from llmr_ray.training.batches import Block
from llmr_ray.training.dataset import TrainingData, write_shard
from llmr_ray.training.gather import place
from llmr_ray.training.groups import reward_spread
from llmr_ray.training.losses import group_cross_entropy
from llmr_ray.training.objective import sample_groups


@dataclass(frozen=True, kw_only=True)
class CrossEncoderRecipe:
    """The training of a cross-encoder (recipe.Recipe).

    top_positives, bottom_negatives: see groups.sample. The rest as in CrossEncoder.
    """

    train: TrainConfig
    seed: int
    max_tokens: int
    precision: str = "auto"
    top_positives: int = 3
    bottom_negatives: int = 16

    def load(self, folder: Path, device: str | None) -> CrossEncoder:
        """The cross-encoder in a folder; a fresh head is that of the run's seed."""
        return CrossEncoder(
            folder,
            max_tokens=self.max_tokens,
            head_seed=seed_of(self.seed, "head"),
            precision=self.precision,
            device=device,
        )

    def save(self, model: CrossEncoder, folder: Path) -> None:
        """A transformers folder."""
        model.save(folder)

    def objective(self, model: CrossEncoder, data: TrainingData) -> "CrossEncoding":
        """The cross-entropy of groups."""
        return CrossEncoding(self, model, data)

    def writer(self, base: Path) -> Callable[[pa.Table, Path], None]:
        """Queries and documents whole: where a pair is cut depends on both its texts."""
        tokenizer = load_tokenizer(base)
        return partial(
            write_shard,
            tokenize=lambda texts, instruction, limit: tokenize(tokenizer, texts),
            instructions=defaultdict(lambda: ("", "")),
            max_query_tokens=0,
            max_document_tokens=0,
        )

    @property
    def policy(self) -> TaskTrain:
        """How groups are sampled, whatever the task."""
        return TaskTrain(
            positive="teacher",
            negatives="lowest",
            top_positives=self.top_positives,
            bottom_negatives=self.bottom_negatives,
        )


class CrossEncoding:
    """The cross-entropy of the positive among its group (recipe.Objective)."""

    def __init__(self, recipe: CrossEncoderRecipe, model: CrossEncoder, data: TrainingData) -> None:
        self.recipe, self.template, self.data = recipe, model.template, data
        self.rank, self.world_size = place()

    def repeats(self) -> Mapping[str, int]:
        """Once each."""
        return {}

    def batch(self, block: Block) -> "PairBatch":
        """The pairs of this rank's groups, each once."""
        train = self.recipe.train
        rows_B = [int(block.rows[at]) for at in block.of_rank(self.rank, self.world_size)]
        tasks = dict.fromkeys(map(self.data.task, rows_B), self.recipe.policy)
        epoch = 0 if train.sampling == "once" else block.epoch
        groups = sample_groups(
            self.data, rows_B, tasks=tasks, group_size=train.group_size, seed=self.recipe.seed, epoch=epoch
        )
        key_BG = np.stack([group.pool.keys[group.places] for group in groups])
        text_BG = np.stack([self.data.pool_texts(row)[group.places] for row, group in zip(rows_B, groups, strict=True)])
        # A group of too few documents repeats some; what is computed is each pair once. They stand in the order of
        # queries and places in their pools, which does not depend on how the data is cut into shards.
        place_BG = np.stack([group.places for group in groups])
        query_place_BG = place_BG + np.arange(len(rows_B))[:, None] * (place_BG.max() + 1)
        _, first_T, pair_BG = np.unique(query_place_BG, return_index=True, return_inverse=True)
        lefts_T = self.data.query_texts(rows_B)[first_T // train.group_size]
        pairs = zip(lefts_T, text_BG.reshape(-1)[first_T], strict=True)
        return PairBatch(
            tokens=[self.template.pair(self.data.text(int(left)), self.data.text(int(right))) for left, right in pairs],
            pair_BG=pair_BG.reshape(text_BG.shape),
            same_BGG=key_BG[:, :, None] == key_BG[:, None, :],
            rewards_BG=np.stack([group.rewards for group in groups]),
            temperature=train.temperature,
        )

    def record(self, totals: list[float]) -> dict[str, Any]:
        """Spread of the rewards, and how often the positive has the highest logit of its group."""
        margin, num_first, num_groups = totals
        return {"reward_margin": margin / num_groups, "accuracy": num_first / num_groups}


@dataclass(frozen=True, kw_only=True)
class PairBatch:
    """A rank's groups and the pairs they are made of (recipe.Batch).

    pair_BG: positions in `tokens`. same_BGG: see losses.py.
    """

    tokens: list[np.ndarray]
    pair_BG: np.ndarray
    same_BGG: np.ndarray
    rewards_BG: np.ndarray
    temperature: float

    def loss(self, output: torch.Tensor) -> torch.Tensor:
        """The cross-entropy of logits [T]."""
        same_BGG = torch.from_numpy(self.same_BGG).to(output.device)
        return group_cross_entropy(self._logit_BG(output) / self.temperature, same_BGG).mean()

    def sums(self, output: torch.Tensor) -> list[float]:
        """The groups' best - worst reward, how many positives come first, how many groups there are."""
        logit_BG = self._logit_BG(output)
        margin = reward_spread(self.rewards_BG)
        num_first = float((logit_BG[:, 0] > logit_BG[:, 1:].amax(dim=1)).sum())
        return [margin, num_first, float(len(logit_BG))]

    def _logit_BG(self, output: torch.Tensor) -> torch.Tensor:
        return output[torch.from_numpy(self.pair_BG).to(output.device)]
