"""What the one train loop has to be told of a model: how it is loaded, what a step computes, what it minimises."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch

from llmr_ray.config import TrainConfig
from llmr_ray.modeling.text_model import TextModel
from llmr_ray.training.batches import Block
from llmr_ray.training.dataset import TrainingData


class Batch(Protocol):
    """This rank's part of a step."""

    @property
    def tokens(self) -> list[np.ndarray]:
        """What the model computes: token ids of T texts."""
        ...

    def loss(self, output: torch.Tensor) -> torch.Tensor:
        """The mean loss over this rank's queries, from the model's output [T, ...]; scalar with gradient."""
        ...

    def sums(self, output: torch.Tensor) -> list[float]:
        """What `Objective.record` needs the sum of over all ranks; always as many numbers."""
        ...


class Objective(Protocol):
    """What the steps of one training minimise."""

    def repeats(self) -> Mapping[str, int]:
        """How often each task occurs in an epoch."""
        ...

    def batch(self, block: Block) -> Batch:
        """This rank's part of a block of the plan."""
        ...

    def record(self, totals: list[float]) -> dict[str, Any]:
        """What the step's record says besides what it says of every training, from the sums over all ranks."""
        ...


class Recipe(Protocol):
    """All that determines a training but its data; travels to the workers."""

    @property
    def train(self) -> TrainConfig:
        """The optimisation."""
        ...

    @property
    def seed(self) -> int:
        """Of the run."""
        ...

    def load(self, folder: Path, device: str | None) -> TextModel:
        """The model in a folder: the base, or what `save` wrote."""
        ...

    def save(self, model: Any, folder: Path) -> None:
        """Writes the model into a folder that others load without this package."""
        ...

    def objective(self, model: Any, data: TrainingData) -> Objective:
        """What is minimised; ConfigError where the model cannot be trained so."""
        ...

    def writer(self, base: Path) -> Callable[[pa.Table, Path], None]:
        """What tokenises groups into a folder of the training data, for a model that starts from `base`."""
        ...
