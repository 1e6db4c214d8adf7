"""The training loop: one forward over all texts of a step, losses over gathered documents, one optimiser step.

Tensor legend: B queries of this rank, G documents of a group, D embedding, T distinct texts of this rank.
"""

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from llmr_ray.artifacts import seed_of
from llmr_ray.config import TaskTrain, TrainConfig
from llmr_ray.errors import ConfigError, DataError
from llmr_ray.modeling.embedder import Embedder
from llmr_ray.training import checkpoint, gradient
from llmr_ray.training.adapters import Adapters
from llmr_ray.training.batches import MIXED, Plan
from llmr_ray.training.dataset import TrainingData
from llmr_ray.training.gather import agree, is_distributed, place, total
from llmr_ray.training.objective import LocalBatch, batch_loss, local_batch
from llmr_ray.training.schedule import SelfPaced, warmup_decay

PACK_TOKENS = {"cpu": 2048, "cuda": 32768}
"""Tokens of one pass through the transformer; on a CPU small ones stay in cache."""


class PackedEncoder(torch.nn.Module):
    """Embeds texts of any lengths in one call, in batches of similar length: one forward in the eyes of DDP."""

    def __init__(self, embedder: Embedder) -> None:
        super().__init__()
        self.module = embedder.module
        self._embed, self._cut = embedder.forward, embedder.batches
        self._budget = PACK_TOKENS.get(embedder.device.type, PACK_TOKENS["cuda"])

    def forward(self, tokens: list[np.ndarray]) -> torch.Tensor:
        """Unit-norm embeddings of T texts, in their order: float32 [T, D]."""
        passes = self.batches(tokens)
        return gradient.in_order(passes, [self._embed([tokens[row] for row in rows]) for rows in passes])

    def batches(self, tokens: list[np.ndarray]) -> list[np.ndarray]:
        """How the texts are cut into passes."""
        return self._cut([len(ids) for ids in tokens], self._budget)


class Trainer:
    """Trains an embedder from a step to the last, writing checkpoints and one record per step.

    Args:
        base: folder of the model to start from (a checkpoint in `root` takes precedence).
        load: makes an Embedder from a folder.
        data: the training data.
        config: optimisation settings.
        tasks: sampling and losses by task.
        seed: of the run.
        prompts: stored with saved models.
        root: holds checkpoints and the step records; shared by all ranks.
        grad_cache: hold the activations of one pass at a time (gradient.cached_backward).
        checkpointing: hold the activations of one layer at a time.
        is_stopping: asked in every step; where any rank says yes, all end after that step, with a checkpoint.
    """

    def __init__(
        self,
        *,
        base: Path,
        load: Callable[[Path], Embedder],
        data: TrainingData,
        config: TrainConfig,
        tasks: Mapping[str, TaskTrain],
        seed: int,
        prompts: dict[str, str],
        root: Path,
        grad_cache: bool = False,
        checkpointing: bool = False,
        is_stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self.config, self.tasks, self.data, self.seed, self.prompts, self.root = (
            config,
            tasks,
            data,
            seed,
            prompts,
            root,
        )
        self.backward = gradient.cached_backward if grad_cache else gradient.backward
        self.is_stopping, self.stops = is_stopping, False
        self.rank, self.world_size = place()
        if config.global_batch_size % self.world_size:
            raise ConfigError(f"{config.global_batch_size} queries do not divide over {self.world_size} workers.")
        rows = data.rows_by(config.batch_by)
        self.plan = Plan(
            rows,
            repeats={name: tasks[data.task(numbers[0])].repeat for name, numbers in rows.items()},
            batch_size=config.global_batch_size,
            batching=config.batching,
            seed=seed,
            shares=config.batch_shares,
            mix=config.mix,
            mix_temperature=config.mix_temperature,
        )
        found = self._resume_point()
        self.embedder = load(found.embedder if found and not config.lora.rank else base)
        self.device = self.embedder.device
        if too_long := [size for size in config.matryoshka_dimensions if not 0 < size < self.embedder.dimension]:
            raise ConfigError(
                f"train.matryoshka_dimensions {too_long} are not between 1 and {self.embedder.dimension - 1}: the "
                f"embedder has {self.embedder.dimension} dimensions, and the whole is always trained."
            )
        self.adapters = Adapters(self.embedder, config.lora, seed) if config.lora.rank else None
        if checkpointing:
            self.embedder.checkpoint_activations()
        encoder = PackedEncoder(self.embedder)
        encoder.train(config.dropout)
        freeze_unused(encoder, data.text(0))
        self.names = {name: value for name, value in encoder.named_parameters() if value.requires_grad}
        self.encoder: torch.nn.Module = encoder
        if is_distributed():
            ids = [self.device.index or 0] if self.device.type == "cuda" else None
            self.encoder = DistributedDataParallel(encoder, device_ids=ids, broadcast_buffers=False)
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
                embedder=self.embedder if is_whole else None,
                adapters=self.names if self.adapters else {},
                prompts=self.prompts,
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
        batch = local_batch(
            self.data,
            self.plan.block(step),
            tasks=self.tasks,
            group_size=config.group_size,
            seed=self.seed,
            rank=self.rank,
            world_size=self.world_size,
        )
        # Dropout draws from torch's generator: seeding it by step makes a resumed run repeat an uninterrupted one.
        torch.manual_seed(seed_of(self.seed, "dropout", step, self.rank))
        tokens = [self.data.text(int(number)) for number in batch.texts]

        def loss_of(embedding_TD: torch.Tensor) -> torch.Tensor:
            where_B, where_BG = (torch.from_numpy(at).to(self.device) for at in (batch.query_B, batch.doc_BG))
            each = [
                batch_loss(cut[where_B], cut[where_BG], batch, tasks=self.tasks, temperature=config.temperature)
                for cut in nested(embedding_TD, config.matryoshka_dimensions)
            ]
            return torch.stack(each).mean()

        self.optimizer.zero_grad(set_to_none=True)
        loss, embedding_TD = self.backward(self.encoder, tokens, loss_of)
        grad_norm = float(
            torch.nn.utils.clip_grad_norm_(self.names.values(), config.max_grad_norm or math.inf, foreach=True)
        )
        local = [*self._local_sums(float(loss), tokens, batch), nearness(embedding_TD), float(self.is_stopping())]
        sums = total(torch.tensor(local, dtype=torch.float64, device=self.device))
        self.stops = bool(sums[7] > 0)
        mean_loss = float(sums[0]) / self.world_size
        if not (math.isfinite(mean_loss) and math.isfinite(grad_norm)):
            raise DataError(
                f"step {step} ({batch.dataset}): loss {mean_loss}, gradient norm {grad_norm}. Training diverged: lower "
                "train.learning_rate, raise train.temperature, or look for extreme rewards in this data set."
            )
        task = batch.tasks_B[0] if batch.dataset != MIXED else MIXED
        factor = self.paced.observe(step, task, mean_loss) if config.self_paced else 1.0
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
            "epoch": batch.epoch,
            "dataset": batch.dataset,
            "task": task,
            "loss": mean_loss,
            "learning_rate": rate,
            "self_paced_factor": factor,
            "grad_norm": grad_norm,
            "num_tokens": int(sums[1]),
            "padding_fraction": 1 - float(sums[1] / sums[2]),
            "reward_margin": float(sums[3] / sums[4]) if sums[4] else None,
            "num_false_negatives": int(sums[5]),
            "uniformity": math.log(float(sums[6]) / self.world_size),
            "seconds": time.perf_counter() - started,
        }

    def _local_sums(self, loss: float, tokens: list[np.ndarray], batch: LocalBatch) -> list[float]:
        """Loss, tokens, tokens with padding, sum of the groups' best - worst reward, how many have rewards, and the
        in-batch documents that are no negatives because the query counts them, or their text, as its own."""
        lengths = [len(ids) for ids in tokens]
        padded = sum(self.embedder.computed_tokens([lengths[row] for row in rows]) for rows in self.packing(tokens))
        rewarded_BG = batch.rewards_BG[batch.has_rewards_B]
        best_B = rewarded_BG.max(axis=1, initial=-np.inf)
        worst_B = rewarded_BG.min(axis=1, where=np.isfinite(rewarded_BG), initial=np.inf)
        margin = float(np.where(worst_B <= best_B, best_B - worst_B, 0.0).sum())
        spared = int((~batch.others_BC).sum()) - batch.doc_BG.size
        return [loss, float(sum(lengths)), float(padded), margin, float(len(rewarded_BG)), float(spared)]


def nested(embedding_TD: torch.Tensor, sizes: list[int]) -> list[torch.Tensor]:
    """The embeddings whole and cut to their first dimensions, each of unit norm."""
    return [embedding_TD, *(torch.nn.functional.normalize(embedding_TD[:, :size], dim=1) for size in sizes)]


def nearness(embedding_TD: torch.Tensor) -> float:
    """Mean of exp(-2 |x - y|^2) over pairs of texts (at most the first 512); its log is the uniformity of 2005.10242.

    1 where all texts lie on one point; the spread-out embeddings of a good retriever are near exp(-4).
    """
    some = embedding_TD[:512].float()
    near = torch.exp(4 * (some @ some.T - 1))
    pairs = len(some) * (len(some) - 1)
    return float((near.sum() - near.diagonal().sum()) / pairs) if pairs else 1.0


def freeze_unused(encoder: PackedEncoder, tokens: np.ndarray) -> None:
    """Takes parameters that no embedding depends on (BERT's pooler) out of training: DDP would wait for them."""
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
