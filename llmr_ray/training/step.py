"""The training loop: one forward over all texts of a step, their loss, one optimiser step.

What is trained, and by which loss, is a recipe (recipe.py). Tensor legend: T texts of this rank.
"""

import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from llmr_ray.artifacts import seed_of
from llmr_ray.config import TrainConfig
from llmr_ray.errors import ConfigError, DataError
from llmr_ray.modeling.lookup import one_lookup
from llmr_ray.modeling.text_model import TextModel
from llmr_ray.training import checkpoint, gradient
from llmr_ray.training.adapters import Adapters
from llmr_ray.training.batches import MIXED, Plan
from llmr_ray.training.dataset import TrainingData
from llmr_ray.training.gather import agree, is_distributed, place, total
from llmr_ray.training.recipe import Recipe
from llmr_ray.training.schedule import SelfPaced, warmup_decay

PACK_TOKENS = {"cpu": 2048, "cuda": 32768}
"""Tokens of one pass through the transformer; on a CPU small ones stay in cache."""


class PackedEncoder(torch.nn.Module):
    """A model on texts of any lengths in one call, in batches of similar length: one forward in the eyes of DDP."""

    def __init__(self, model: TextModel) -> None:
        super().__init__()
        self.module = model.module
        self._compute, self._cut = model.forward, model.batches
        words, pad_id = model.transformer.get_input_embeddings(), model.tokenizer.pad_token_id
        # Within a function, since a module that is an attribute becomes a part of this one.
        self._reading = partial(one_lookup, words, pad_id=pad_id)
        self._budget = PACK_TOKENS.get(model.device.type, PACK_TOKENS["cuda"])

    def forward(self, tokens: list[np.ndarray]) -> torch.Tensor:
        """What the model gives T texts, in their order: float32 [T, ...]."""
        passes = self.batches(tokens)
        with self._reading(tokens):
            computed = [self._compute([tokens[row] for row in rows]) for rows in passes]
        return gradient.in_order(passes, computed)

    def batches(self, tokens: list[np.ndarray]) -> list[np.ndarray]:
        """How the texts are cut into passes."""
        return self._cut([len(ids) for ids in tokens], self._budget)


class Trainer:
    """Trains a model from a step to the last, writing checkpoints and one record per step.

    Args:
        base: folder of the model to start from (a checkpoint in `root` takes precedence).
        recipe: what is trained, and how.
        data: the training data.
        root: holds checkpoints and the step records; shared by all ranks.
        device: "cpu", "cuda:1", ...; None: CUDA where there is one.
        grad_cache: hold the activations of one pass at a time (gradient.cached_backward).
        checkpointing: hold the activations of one layer at a time.
        is_stopping: asked in every step; where any rank says yes, all end after that step, with a checkpoint.
    """

    def __init__(
        self,
        *,
        base: Path,
        recipe: Recipe,
        data: TrainingData,
        root: Path,
        device: str | None = None,
        grad_cache: bool = False,
        checkpointing: bool = False,
        is_stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        config, seed = recipe.train, recipe.seed
        self.recipe, self.config, self.data, self.seed, self.root = recipe, config, data, seed, root
        self.backward = gradient.cached_backward if grad_cache else gradient.backward
        self.is_stopping, self.stops = is_stopping, False
        self.rank, self.world_size = place()
        if config.global_batch_size % self.world_size:
            raise ConfigError(f"{config.global_batch_size} queries do not divide over {self.world_size} workers.")
        found = self._resume_point()
        self.model = recipe.load(found.model if found and not config.lora.rank else base, device)
        self.device = self.model.device
        self.objective = recipe.objective(self.model, data)
        rows, repeats = data.rows_by(config.batch_by), self.objective.repeats()
        self.plan = Plan(
            rows,
            repeats={name: repeats.get(data.task(numbers[0]), 1) for name, numbers in rows.items()},
            batch_size=config.global_batch_size,
            batching=config.batching,
            seed=seed,
            shares=config.batch_shares,
            mix=config.mix,
            mix_temperature=config.mix_temperature,
            order=config.order,
        )
        self.adapters = Adapters(self.model, config.lora, seed) if config.lora.rank else None
        if checkpointing:
            self.model.checkpoint_activations()
        encoder = PackedEncoder(self.model)
        encoder.train(config.dropout)
        freeze_unused(encoder, self.objective.batch(self.plan.block(0)).tokens[0])
        self.names = {name: value for name, value in encoder.named_parameters() if value.requires_grad}
        self.encoder: torch.nn.Module = encoder
        if is_distributed():
            ids = [self.device.index or 0] if self.device.type == "cuda" else None
            self.encoder = DistributedDataParallel(
                encoder, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True
            )
        self.packing = encoder.batches
        self.optimizer = make_optimizer(self.names, config)
        self.paced = SelfPaced(config.self_paced_interval)
        self.step = 0
        if found:
            self.step = found.step
            found.restore_optimizer(self.optimizer, self.names)
            if self.adapters:
                found.restore_adapters(self.names)
            self.paced.restore(found.state["self_paced"])
        if self.rank == 0:
            checkpoint.keep_steps(root, self.step)

    def _resume_point(self) -> checkpoint.Checkpoint | None:
        """Rank 0 verifies and chooses, the others follow: two ranks must never resume from different steps."""
        found = checkpoint.newest(self.root) if self.rank == 0 else None
        step = agree(found.step if found else 0)
        return checkpoint.read(self.root / f"ckpt-{step:08d}") if step else None

    def run(self, on_step: Callable[[dict[str, Any]], None] | None = None) -> None:
        """Trains until config.num_steps or until told to stop; a checkpoint every interval and after the last step."""
        while self.step < self.config.num_steps and not self.stops:
            record = self.train_step()
            if self.rank == 0:
                checkpoint.append_step(self.root, record)
            if self.has_checkpoint:
                self.save()
            if on_step is not None:
                on_step(record)

    @property
    def has_checkpoint(self) -> bool:
        """Whether a checkpoint belongs after the steps taken so far."""
        interval = self.config.checkpoint_interval
        return self.stops or self.step == self.config.num_steps or (interval > 0 and self.step % interval == 0)

    def save(self) -> None:
        """Writes a checkpoint (rank 0). After the last step adapters are merged for it: nothing trains any more."""
        if self.rank == 0:
            is_whole = self.adapters is None or self.step == self.config.num_steps
            if self.adapters and is_whole:
                self.adapters.merge()
            checkpoint.save(
                self.root,
                self.step,
                save_model=partial(self.recipe.save, self.model) if is_whole else None,
                adapters=self.names if self.adapters else {},
                optimizer=self.optimizer,
                names=self.names,
                state={"self_paced": self.paced.state(), "seed": self.seed},
            )

    def train_step(self) -> dict[str, Any]:
        """One optimiser step; returns its record (equal on all ranks, but for `seconds`).

        Raises:
            DataError: the loss or gradient is not finite; the weights are left as they were.
        """
        started, step, config = time.perf_counter(), self.step, self.config
        block = self.plan.block(step)
        batch = self.objective.batch(block)
        # Dropout draws from torch's generator: seeding it by step makes a resumed run repeat an uninterrupted one.
        torch.manual_seed(seed_of(self.seed, "dropout", step, self.rank))
        self.optimizer.zero_grad(set_to_none=True)
        loss, output = self.backward(self.encoder, batch.tokens, batch.loss)
        grad_norm = float(
            torch.nn.utils.clip_grad_norm_(self.names.values(), config.max_grad_norm or math.inf, foreach=True)
        )
        local = [float(loss), float(self.is_stopping()), *self._num_tokens(batch.tokens), *batch.sums(output)]
        sums = total(torch.tensor(local, dtype=torch.float64, device=self.device)).tolist()
        mean_loss, num_tokens, num_computed = sums[0] / self.world_size, sums[2], sums[3]
        self.stops = sums[1] > 0
        if not (math.isfinite(mean_loss) and math.isfinite(grad_norm)):
            raise DataError(
                f"step {step} ({block.dataset}): loss {mean_loss}, gradient norm {grad_norm}. Training diverged: lower "
                "its learning_rate, raise its temperature, or look for extreme rewards in this data set."
            )
        task = self.data.task(int(block.rows[0])) if block.dataset != MIXED else MIXED
        paced = block.dataset if config.self_paced_by == "dataset" else task
        factor = self.paced.observe(step, paced, mean_loss) if config.self_paced else 1.0
        rate = (
            config.learning_rate
            * factor
            * warmup_decay(
                step, num_steps=config.num_steps, warmup_fraction=config.warmup_fraction, schedule=config.schedule
            )
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.step += 1
        return {
            "step": step,
            "epoch": block.epoch,
            "dataset": block.dataset,
            "task": task,
            "loss": mean_loss,
            "learning_rate": rate,
            "self_paced_factor": factor,
            "grad_norm": grad_norm,
            "num_tokens": int(num_tokens),
            "padding_fraction": 1 - num_tokens / num_computed,
            **self.objective.record(sums[4:]),
            "seconds": time.perf_counter() - started,
        }

    def _num_tokens(self, tokens: list[np.ndarray]) -> tuple[float, float]:
        """Tokens, and tokens with padding."""
        lengths = [len(ids) for ids in tokens]
        computed = sum(self.model.computed_tokens([lengths[row] for row in rows]) for rows in self.packing(tokens))
        return float(sum(lengths)), float(computed)


def freeze_unused(encoder: PackedEncoder, tokens: np.ndarray) -> None:
    """Takes parameters that no output depends on (BERT's pooler) out of training: DDP would wait for them."""
    encoder([np.asarray(tokens)]).sum().backward()
    for parameter in encoder.parameters():
        if parameter.grad is None:
            parameter.requires_grad_(False)
    encoder.zero_grad(set_to_none=True)


def make_optimizer(names: Mapping[str, torch.nn.Parameter], config: TrainConfig) -> torch.optim.AdamW:
    """AdamW, fused; biases and norms (one-dimensional parameters) do not decay."""
    matrices = [value for value in names.values() if value.ndim > 1]
    vectors = [value for value in names.values() if value.ndim <= 1]
    parts = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(parts, lr=config.learning_rate, fused=True)
