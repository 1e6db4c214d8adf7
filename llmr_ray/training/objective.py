"""What one step minimises: the sampled groups of this rank and the loss of their embeddings.

Tensor legend: B queries of this rank, N over all ranks, G documents of a group, C = N * G gathered documents, D
embedding, T distinct texts of this rank.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from llmr_ray.artifacts import seed_of
from llmr_ray.config import TaskTrain
from llmr_ray.training import groups, losses
from llmr_ray.training.batches import Block
from llmr_ray.training.dataset import TrainingData
from llmr_ray.training.gather import gather_with_gradient


@dataclass(frozen=True, kw_only=True)
class LocalBatch:
    """What a rank needs of a step, from the global plan: no communication is needed to make it.

    texts: numbers of the T distinct texts to encode, in the order of their keys. query_B, doc_BG: positions in
    `texts`. rewards_BG: 0 where has_rewards_B is False. positive_BG, same_BGG, others_BC: see losses.py. peers_BN:
    groups.peers, where a query of any rank takes its peers as negatives (all ranks must gather, or none). tasks_B: each
    query's task.
    """

    dataset: str
    epoch: int
    first: int
    texts: np.ndarray
    query_B: np.ndarray
    doc_BG: np.ndarray
    rewards_BG: np.ndarray
    has_rewards_B: np.ndarray
    positive_BG: np.ndarray
    same_BGG: np.ndarray
    others_BC: np.ndarray
    peers_BN: np.ndarray | None
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
    sampled = [
        groups.sample(
            pool,
            size=group_size,
            positive=tasks[data.task(row)].positive,
            negatives=tasks[data.task(row)].negatives,
            num_positives=tasks[data.task(row)].num_positives,
            rng=np.random.default_rng(seed_of(seed, "group", block.epoch, data.query_id(row))),
        )
        for pool, row in zip(pools, block.rows, strict=True)
    ]
    places_NG = np.stack([places for places, _ in sampled])
    keys_NG = np.stack([pool.keys[places] for pool, places in zip(pools, places_NG, strict=True)])
    mine = block.of_rank(rank, world_size)
    rows_B = [int(block.rows[place]) for place in mine]
    doc_text_BG = np.stack([data.pool_texts(row)[places_NG[place]] for row, place in zip(rows_B, mine, strict=True)])
    numbers = np.concatenate([data.query_texts(rows_B), doc_text_BG.reshape(-1)])
    # By key, since a text that stands in several shards of the data has a number in each.
    _, first, where = np.unique(data.text_keys(numbers), return_index=True, return_inverse=True)
    rewards = [pools[place].rewards for place in mine]
    own_BG = keys_NG[mine.start : mine.stop]
    gold = [pools[place].keys[pools[place].is_gold] for place in mine]
    return LocalBatch(
        dataset=block.dataset,
        epoch=block.epoch,
        first=mine.start,
        texts=numbers[first],
        query_B=where[: len(rows_B)],
        doc_BG=where[len(rows_B) :].reshape(doc_text_BG.shape),
        rewards_BG=np.stack(
            [
                np.zeros(group_size, np.float32) if given is None else given[places_NG[place]]
                for given, place in zip(rewards, mine, strict=True)
            ]
        ),
        has_rewards_B=np.asarray([given is not None for given in rewards]),
        positive_BG=np.arange(group_size) < np.asarray([sampled[place][1] for place in mine])[:, None],
        same_BGG=own_BG[:, :, None] == own_BG[:, None, :],
        others_BC=groups.in_batch_negatives(keys_NG, gold, mine),
        peers_BN=groups.peers(keys_NG[:, 0], gold, data.text_keys(data.query_texts(block.rows)), mine)
        if any(tasks[data.task(row)].full_contrastive_weight for row in block.rows)
        else None,
        tasks_B=[data.task(row) for row in rows_B],
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

    Documents of all ranks are in-batch candidates of the contrastive, graded and listwise terms; KL, marginal and
    pairwise terms look at the own group alone. Weights apply whatever other terms there are (the released code ignores
    the distillation weight when it is the only term, methods.md I.8).
    """
    device = query_BD.device
    num_queries, group_size = batch.doc_BG.shape
    if batch.peers_BN is not None:
        # In one piece: of two gathers, one may be no part of some rank's loss, whose backward would then not take part.
        all_NGD = gather_with_gradient(torch.cat([query_BD[:, None], doc_BGD], dim=1))
        query_ND, doc_CD = all_NGD[:, 0], all_NGD[:, 1:].flatten(0, 1)
    else:
        doc_CD = gather_with_gradient(doc_BGD.flatten(0, 1))
    own_BG = torch.arange(num_queries * group_size, device=device).view(num_queries, group_size)
    rewards_BG, positive_BG, same_BGG, others_BC = (
        torch.from_numpy(array).to(device)
        for array in (batch.rewards_BG, batch.positive_BG, batch.same_BGG, batch.others_BC)
    )
    scored = Scored(
        sim_BC=(query_BD @ doc_CD.T) / temperature,
        own_BG=own_BG + batch.first * group_size,
        rewards_BG=rewards_BG,
        positive_BG=positive_BG,
        same_BGG=same_BGG,
        others_BC=others_BC,
    )
    if batch.peers_BN is not None:
        positive_BD, positive_ND = doc_BGD[:, 0], doc_CD[::group_size]
        pairs = ((positive_BD, query_ND), (query_BD, query_ND), (positive_BD, positive_ND))
        scored.sim_BX = torch.cat([(left @ right.T) / temperature for left, right in pairs], dim=1)
        scored.others_BX = torch.from_numpy(batch.peers_BN).to(device).repeat(1, len(pairs))
    loss = query_BD.new_zeros(())
    for task in sorted(set(batch.tasks_B)):
        rows = torch.tensor([row for row, of in enumerate(batch.tasks_B) if of == task], device=device)
        of_task = scored.rows(rows)
        for setting, term in TERMS.items():
            weight = getattr(tasks[task], setting)
            if weight:
                loss = loss + weight * term(of_task, tasks[task]).sum()
    return loss / num_queries


@dataclass(kw_only=True)
class Scored:
    """What the losses of B queries are made of (see losses.py); X columns only where a task uses full_contrastive."""

    sim_BC: torch.Tensor
    own_BG: torch.Tensor
    rewards_BG: torch.Tensor
    positive_BG: torch.Tensor
    same_BGG: torch.Tensor
    others_BC: torch.Tensor
    sim_BX: torch.Tensor | None = None
    others_BX: torch.Tensor | None = None

    @property
    def own_sim_BG(self) -> torch.Tensor:
        """Similarities within the group."""
        return self.sim_BC.gather(1, self.own_BG)

    def rows(self, rows: torch.Tensor) -> "Scored":
        """Those of some queries."""
        cut: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            cut[item.name] = None if value is None else value[rows]
        return Scored(**cut)


def _contrastive(of: Scored, task: TaskTrain) -> torch.Tensor:
    return losses.contrastive(of.sim_BC, of.own_BG, of.same_BGG, of.others_BC, positive_BG=_positives(of, task))


def _full_contrastive(of: Scored, task: TaskTrain) -> torch.Tensor:
    assert of.sim_BX is not None
    assert of.others_BX is not None
    return losses.full_contrastive(
        of.sim_BC,
        of.own_BG,
        of.same_BGG,
        of.others_BC,
        of.sim_BX,
        of.others_BX,
        positive_BG=_positives(of, task),
    )


def _positives(of: Scored, task: TaskTrain) -> torch.Tensor | None:
    return of.positive_BG if task.num_positives > 1 else None


def _graded(of: Scored, task: TaskTrain) -> torch.Tensor:
    return losses.graded_distillation(
        of.sim_BC,
        of.own_BG,
        of.rewards_BG,
        of.same_BGG,
        of.others_BC,
        tie_policy=task.tie_policy,
        position0=task.position0,
        reward_temperature=task.reward_temperature,
        reward_form=task.reward_form,
        include_self=task.include_self,
    )


def _group_kl(of: Scored, task: TaskTrain) -> torch.Tensor:
    return losses.group_kl(
        of.own_sim_BG,
        of.rewards_BG,
        reward_temperature=task.reward_temperature,
        reward_form=task.reward_form,
        student_temperature=task.student_temperature,
        direction=task.kl_direction,
    )


def _marginal(of: Scored, task: TaskTrain) -> torch.Tensor:
    return losses.marginal_likelihood(
        of.own_sim_BG,
        of.rewards_BG,
        reward_temperature=task.reward_temperature,
        student_temperature=task.student_temperature,
    )


def _listwise(of: Scored, task: TaskTrain) -> torch.Tensor:
    return losses.listwise(
        of.sim_BC,
        of.own_BG,
        of.rewards_BG,
        of.same_BGG,
        of.others_BC,
        label_temperature=task.reward_temperature,
    )


def _pairwise(of: Scored, task: TaskTrain) -> torch.Tensor:
    return losses.pairwise(of.own_sim_BG, of.rewards_BG)


TERMS: dict[str, Callable[[Scored, TaskTrain], torch.Tensor]] = {
    "contrastive_weight": _contrastive,
    "full_contrastive_weight": _full_contrastive,
    "graded_weight": _graded,
    "kl_weight": _group_kl,
    "marginal_weight": _marginal,
    "listwise_weight": _listwise,
    "pairwise_weight": _pairwise,
}
"""The terms of the loss by the setting that holds their weight: per-query losses [B] of a task's queries."""
