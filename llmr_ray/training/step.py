"""The training loop: one forward over all texts of a step, losses over gathered documents, one optimiser step.

Tensor legend: B queries of this rank, N over all ranks, G documents of a group, C = N * G gathered documents, D
embedding, T distinct texts of this rank.
"""

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from llmr_ray.artifacts import seed_of
from llmr_ray.config import TaskTrain, TrainConfig
from llmr_ray.errors import DataError
from llmr_ray.modeling.embedder import Embedder, pack
from llmr_ray.training import checkpoint, groups, losses
from llmr_ray.training.batches import MIXED, Block, Plan
from llmr_ray.training.dataset import TrainingData
from llmr_ray.training.gather import agree, gather_with_gradient, is_distributed, place, total
from llmr_ray.training.schedule import SelfPaced, warmup_decay

PACK_TOKENS = {"cpu": 2048, "cuda": 32768}
"""Tokens of one pass through the transformer; on a CPU small ones stay in cache."""

STEPS_FILE = "steps.jsonl"


class PackedEncoder(torch.nn.Module):
    """Embeds texts of any lengths in one call, in batches of similar length: one forward in the eyes of DDP."""

    def __init__(self, embedder: Embedder) -> None:
        super().__init__()
        self.module = embedder.module
        self._embed = embedder.forward
        self._budget = PACK_TOKENS.get(embedder.device.type, PACK_TOKENS["cuda"])

    def forward(self, tokens: list[np.ndarray]) -> torch.Tensor:
        """Unit-norm embeddings of T texts, in their order: float32 [T, D]."""
        batches = self.batches(tokens)
        embedded = torch.cat([self._embed([tokens[row] for row in rows]) for rows in batches])
        back = np.argsort(np.concatenate(batches), kind="stable")
        return embedded[torch.from_numpy(back).to(embedded.device)]

    def batches(self, tokens: list[np.ndarray]) -> list[np.ndarray]:
        """How the texts are cut into passes."""
        return pack([len(ids) for ids in tokens], self._budget)


@dataclass(frozen=True, kw_only=True)
class LocalBatch:
    """What a rank needs of a step, from the global plan: no communication is needed to make it.

    texts: numbers of the T distinct texts to encode. query_B, doc_BG: positions in `texts`. rewards_BG: 0 where
    has_rewards_B is False. same_BGG, others_BC: see losses.py. tasks_B: the task of each query.
    """

    dataset: str
    epoch: int
    first: int
    texts: np.ndarray
    query_B: np.ndarray
    doc_BG: np.ndarray
    rewards_BG: np.ndarray
    has_rewards_B: np.ndarray
    same_BGG: np.ndarray
    others_BC: np.ndarray
    tasks_B: list[str]


def local_batch(
    data: TrainingData,
    block: Block,
    *,
    tasks: Mapping[str, TaskTrain],
    group_size: int,
    seed: int,
    rank: int,
    world_size: int,
) -> LocalBatch:
    """Samples the groups of the whole block (cheap, and equal on all ranks) and cuts out what this rank encodes."""
    pools = [data.pool(int(row)) for row in block.rows]
    places_NG = np.stack(
        [
            groups.sample(
                pool,
                size=group_size,
                positive=tasks[data.tasks[row]].positive,
                negatives=tasks[data.tasks[row]].negatives,
                rng=np.random.default_rng(seed_of(seed, "group", block.epoch, data.query_ids[row])),
            )
            for pool, row in zip(pools, block.rows, strict=True)
        ]
    )
    keys_NG = np.stack([pool.keys[places] for pool, places in zip(pools, places_NG, strict=True)])
    mine = block.of_rank(rank, world_size)
    rows_B = [int(block.rows[place]) for place in mine]
    doc_text_BG = np.stack([data.pool_texts(row)[places_NG[place]] for row, place in zip(rows_B, mine, strict=True)])
    query_text_B = np.asarray(data.query_text[rows_B])
    texts, where = np.unique(np.concatenate([query_text_B, doc_text_BG.reshape(-1)]), return_inverse=True)
    rewards = [pools[place].rewards for place in mine]
    own_BG = keys_NG[mine.start : mine.stop]
    return LocalBatch(
        dataset=block.dataset,
        epoch=block.epoch,
        first=mine.start,
        texts=texts,
        query_B=where[: len(rows_B)],
        doc_BG=where[len(rows_B) :].reshape(doc_text_BG.shape),
        rewards_BG=np.stack(
            [
                np.zeros(group_size, np.float32) if given is None else given[places_NG[place]]
                for given, place in zip(rewards, mine, strict=True)
            ]
        ),
        has_rewards_B=np.asarray([given is not None for given in rewards]),
        same_BGG=own_BG[:, :, None] == own_BG[:, None, :],
        others_BC=groups.in_batch_negatives(keys_NG, [pools[place].keys[pools[place].is_gold] for place in mine], mine),
        tasks_B=[data.tasks[row] for row in rows_B],
    )


def batch_loss(
    query_BD: torch.Tensor,
    doc_BGD: torch.Tensor,
    batch: LocalBatch,
    *,
    tasks: Mapping[str, TaskTrain],
    temperature: float,
) -> torch.Tensor:
    """The mean loss over this rank's queries, each with the terms and weights of its task; scalar with gradient.

    Documents of all ranks are in-batch candidates of the contrastive and graded terms; the KL term looks at the own
    group alone. Weights apply whatever other terms there are (the released code ignores the distillation weight when
    it is the only term, methods.md I.8).
    """
    device = query_BD.device
    num_queries, group_size = batch.doc_BG.shape
    doc_CD = gather_with_gradient(doc_BGD.flatten(0, 1))
    sim_BC = (query_BD @ doc_CD.T) / temperature
    own_BG = torch.arange(num_queries * group_size, device=device).view(num_queries, group_size)
    own_BG = own_BG + batch.first * group_size
    rewards_BG, same_BGG, others_BC = (
        torch.from_numpy(array).to(device) for array in (batch.rewards_BG, batch.same_BGG, batch.others_BC)
    )
    loss = query_BD.new_zeros(())
    for task in sorted(set(batch.tasks_B)):
        rows = torch.tensor([row for row, of in enumerate(batch.tasks_B) if of == task], device=device)
        terms, sim, own = tasks[task], sim_BC[rows], own_BG[rows]
        if terms.contrastive_weight:
            each = losses.contrastive(sim, own, same_BGG[rows], others_BC[rows])
            loss = loss + terms.contrastive_weight * each.sum()
        if terms.graded_weight:
            each = losses.graded_distillation(
                sim,
                own,
                rewards_BG[rows],
                same_BGG[rows],
                others_BC[rows],
                tie_policy=terms.tie_policy,
                position0=terms.position0,
                reward_temperature=terms.reward_temperature,
            )
            loss = loss + terms.graded_weight * each.sum()
        if terms.kl_weight:
            each = losses.group_kl(sim.gather(1, own), rewards_BG[rows], reward_temperature=terms.reward_temperature)
            loss = loss + terms.kl_weight * each.sum()
    return loss / num_queries


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
    ) -> None:
        self.config, self.tasks, self.data, self.seed, self.prompts, self.root = (
            config,
            tasks,
            data,
            seed,
            prompts,
            root,
        )
        self.rank, self.world_size = place()
        if config.global_batch_size % self.world_size:
            raise DataError(f"{config.global_batch_size} queries do not divide over {self.world_size} workers.")
        self.plan = Plan(
            data.rows_by_dataset(),
            repeats={name: tasks[task].repeat for name, task in zip(data.datasets, data.tasks, strict=True)},
            batch_size=config.global_batch_size,
            batching=config.batching,
            seed=seed,
        )
        found = self._resume_point()
        self.embedder = load(found.embedder if found else base)
        self.device = self.embedder.device
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
            self.paced.restore(found.state["self_paced"])
        if self.rank == 0:
            keep_steps(root / STEPS_FILE, self.step)

    def _resume_point(self) -> checkpoint.Checkpoint | None:
        """Rank 0 verifies and chooses, the others follow: two ranks must never resume from different steps."""
        found = checkpoint.newest(self.root) if self.rank == 0 else None
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        step = agree(found.step if found else 0, device)
        return checkpoint.read(self.root / f"ckpt-{step:08d}") if step else None

    def run(self, on_step: Callable[[dict[str, Any]], None] | None = None) -> None:
        """Trains until config.num_steps; a checkpoint every interval and after the last step."""
        while self.step < self.config.num_steps:
            record = self.train_step()
            if self.rank == 0:
                append_step(self.root / STEPS_FILE, record)
            if self.step % self.config.checkpoint_interval == 0 or self.step == self.config.num_steps:
                self.save()
            if on_step is not None:
                on_step(record)

    def save(self) -> None:
        """Writes a checkpoint (rank 0)."""
        if self.rank == 0:
            checkpoint.save(
                self.root,
                self.step,
                embedder=self.embedder,
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
        embedding_TD = self.encoder(tokens)
        query_BD = embedding_TD[torch.from_numpy(batch.query_B).to(self.device)]
        doc_BGD = embedding_TD[torch.from_numpy(batch.doc_BG).to(self.device)]
        loss = batch_loss(query_BD, doc_BGD, batch, tasks=self.tasks, temperature=config.temperature)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        grad_norm = float(
            torch.nn.utils.clip_grad_norm_(self.names.values(), config.max_grad_norm or math.inf, foreach=True)
        )
        sums = total(torch.tensor(self._local_sums(float(loss.detach()), tokens, batch), dtype=torch.float64))
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
            "seconds": time.perf_counter() - started,
        }

    def _local_sums(self, loss: float, tokens: list[np.ndarray], batch: LocalBatch) -> list[float]:
        """Loss, tokens, tokens with padding, sum of the groups' best - worst reward, and how many have rewards."""
        lengths = [len(ids) for ids in tokens]
        padded = sum(max(lengths[row] for row in rows) * len(rows) for rows in self.packing(tokens))
        rewarded_BG = batch.rewards_BG[batch.has_rewards_B]
        margin = float((rewarded_BG.max(axis=1) - rewarded_BG.min(axis=1)).sum()) if len(rewarded_BG) else 0.0
        return [loss, float(sum(lengths)), float(padded), margin, float(len(rewarded_BG))]


def freeze_unused(encoder: PackedEncoder, tokens: np.ndarray) -> None:
    """Takes parameters that the embedding does not depend on (BERT's pooler) out of training: DDP would wait for them."""
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


def append_step(path: Path, record: Mapping[str, Any]) -> None:
    """Adds one line to the step records."""
    with path.open("a") as handle:
        handle.write(json.dumps(record) + "\n")


def keep_steps(path: Path, step: int) -> None:
    """Cuts the records back to the steps before `step`, so that a step done again stands once; a torn line goes too."""
    kept = [line for line in read_steps(path) if line["step"] < step]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp-cut")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
    os.replace(temporary, path)


def read_steps(path: Path) -> list[dict[str, Any]]:
    """The records of the steps done, in order; a last line without its end is not one."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
