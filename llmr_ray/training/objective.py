"""What one step minimises: the sampled groups of this rank and the loss of their embeddings.

Tensor legend: B queries of this rank, N over all ranks, G documents of a group, C = N * G gathered documents, D
embedding, T distinct texts of this rank.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
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
    `texts`. rewards_BG: 0 where has_rewards_B is False; weights_BG: what they weigh. positive_BG, same_BGG, others_BC:
    see losses.py. peers_BN: groups.peers, where a query of any rank takes its peers as negatives (all ranks must
    gather, or none). tasks_B: each query's task.
    """

    dataset: str
    epoch: int
    first: int
    texts: np.ndarray
    query_B: np.ndarray
    doc_BG: np.ndarray
    rewards_BG: np.ndarray
    weights_BG: np.ndarray
    has_rewards_B: np.ndarray
    positive_BG: np.ndarray
    same_BGG: np.ndarray
    others_BC: np.ndarray
    peers_BN: np.ndarray | None
    tasks_B: list[str]


@dataclass(frozen=True, kw_only=True)
class Group:
    """What a step uses of a query's pool: positions there, the first `num_positives` of them positives."""

    pool: groups.Pool
    places: np.ndarray
    num_positives: int

    @property
    def rewards(self) -> np.ndarray:
        """Of the documents, float32 [G]; 0 where the pool has none."""
        if self.pool.rewards is None:
            return np.zeros(len(self.places), np.float32)
        return self.pool.rewards[self.places]

    @property
    def weights(self) -> np.ndarray:
        """Of the rewards, float32 [G]."""
        if self.pool.weights is None:
            return np.ones(len(self.places), np.float32)
        return self.pool.weights[self.places]


def sample_groups(
    data: TrainingData,
    rows: Iterable[int],
    *,
    tasks: Mapping[str, TaskTrain],
    group_size: int,
    seed: int,
    epoch: int,
) -> list[Group]:
    """The groups of some rows: a pure function of (seed, epoch, query_id) and the pool of each."""
    found = []
    for row in rows:
        pool, task, query_id = data.pool(row), tasks[data.task(row)], data.query_id(row)
        places, num_positives = groups.sample(
            pool,
            size=group_size,
            positive=task.positive,
            negatives=task.negatives,
            num_positives=task.num_positives,
            top_positives=task.top_positives,
            bottom_negatives=task.bottom_negatives,
            num_preferred=task.num_preferred,
            turn=epoch + seed_of(seed, "turn", query_id),
            rng=np.random.default_rng(seed_of(seed, "group", epoch, query_id)),
        )
        found.append(Group(pool=pool, places=places, num_positives=num_positives))
    return found


def local_batch(
    data: TrainingData,
    block: Block,
    *,
    tasks: Mapping[str, TaskTrain],
    group_size: int,
    seed: int,
    rank: int,
    world_size: int,
    sampled_once: bool = False,
    keeps_false_negatives: bool = False,
) -> LocalBatch:
    """Samples the groups of the whole block (cheap, and equal on all ranks) and cuts out what this rank encodes.

    Ranks wait for each other, so the queries are dealt out such that all ranks have about as many tokens. The last two
    arguments are train.sampling and train.false_negatives.
    """
    epoch = 0 if sampled_once else block.epoch
    sampled = sample_groups(data, map(int, block.rows), tasks=tasks, group_size=group_size, seed=seed, epoch=epoch)
    if world_size > 1:
        tokens_N = [
            sum(len(data.text(int(number))) for number in (query, *data.pool_texts(int(row))[group.places]))
            for row, query, group in zip(block.rows, data.query_texts(block.rows), sampled, strict=True)
        ]
        order = dealt(tokens_N, world_size)
        block, sampled = replace(block, rows=block.rows[order]), [sampled[place] for place in order]
    places_NG = np.stack([group.places for group in sampled])
    keys_NG = np.stack([group.pool.keys[group.places] for group in sampled])
    mine = block.of_rank(rank, world_size)
    rows_B = [int(block.rows[place]) for place in mine]
    doc_text_BG = np.stack([data.pool_texts(row)[places_NG[place]] for row, place in zip(rows_B, mine, strict=True)])
    numbers = np.concatenate([data.query_texts(rows_B), doc_text_BG.reshape(-1)])
    # By key, since a text that stands in several shards of the data has a number in each.
    _, first, where = np.unique(data.text_keys(numbers), return_index=True, return_inverse=True)
    own = sampled[mine.start : mine.stop]
    own_BG = keys_NG[mine.start : mine.stop]
    by_label = [tasks[data.task(row)].has_graded_labels for row in rows_B]
    relevant = [group.pool.relevant_keys(by_label=is_so) for group, is_so in zip(own, by_label, strict=True)]
    if keeps_false_negatives:
        same_BGG = np.tile(np.eye(group_size, dtype=bool), (len(own), 1, 1))
        others_BC = np.arange(keys_NG.size)[None, :] // group_size != np.asarray(mine)[:, None]
    else:
        same_BGG = own_BG[:, :, None] == own_BG[:, None, :]
        others_BC = groups.in_batch_negatives(keys_NG, relevant, mine)
    return LocalBatch(
        dataset=block.dataset,
        epoch=block.epoch,
        first=mine.start,
        texts=numbers[first],
        query_B=where[: len(rows_B)],
        doc_BG=where[len(rows_B) :].reshape(doc_text_BG.shape),
        rewards_BG=np.stack([group.rewards for group in own]),
        weights_BG=np.stack([group.weights for group in own]),
        has_rewards_B=np.asarray([group.pool.rewards is not None for group in own]),
        positive_BG=np.arange(group_size) < np.asarray([group.num_positives for group in own])[:, None],
        same_BGG=same_BGG,
        others_BC=others_BC,
        peers_BN=groups.peers(keys_NG[:, 0], relevant, data.text_keys(data.query_texts(block.rows)), mine)
        if any(tasks[data.task(row)].full_contrastive_weight for row in block.rows)
        else None,
        tasks_B=[data.task(row) for row in rows_B],
    )


def dealt(costs: Sequence[float], num_hands: int) -> np.ndarray:
    """An order of N items whose consecutive equal parts, one for each hand, cost about the same: int64 [N].

    The dearest first, each to the hand that has least so far and is not full; N is a multiple of `num_hands`.
    """
    size = len(costs) // num_hands
    hands: list[list[int]] = [[] for _ in range(num_hands)]
    totals = np.zeros(num_hands)
    for item in np.argsort(-np.asarray(costs, np.float64), kind="stable"):
        hand = int(np.argmin(np.where([len(hand) < size for hand in hands], totals, np.inf)))
        hands[hand].append(int(item))
        totals[hand] += costs[item]
    return np.asarray([item for hand in hands for item in sorted(hand)], np.int64)


def batch_loss(
    query_BD: torch.Tensor,
    doc_BGD: torch.Tensor,
    batch: LocalBatch,
    *,
    tasks: Mapping[str, TaskTrain],
    temperature: float,
    gather_devices: int = 1,
) -> torch.Tensor:
    """The mean loss over this rank's queries, each with the terms and weights of its task; scalar with gradient.

    Documents of all ranks are in-batch candidates of the contrastive, graded and listwise terms; KL, marginal and
    pairwise terms look at the own group alone. Weights apply whatever other terms there are (the released code ignores
    the distillation weight when it is the only term, methods.md I.8: `lone_weight`). Terms that look at gathered
    documents are divided by `gather_devices` (see TrainConfig).
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
    rewards_BG, weights_BG, positive_BG, same_BGG, others_BC = (
        torch.from_numpy(array).to(device)
        for array in (batch.rewards_BG, batch.weights_BG, batch.positive_BG, batch.same_BGG, batch.others_BC)
    )
    scored = Scored(
        sim_BC=(query_BD @ doc_CD.T) / temperature,
        own_BG=own_BG + batch.first * group_size,
        rewards_BG=rewards_BG,
        weights_BG=weights_BG,
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
        for setting, weight in term_weights(tasks[task], gather_devices).items():
            loss = loss + weight * TERMS[setting](of_task, tasks[task]).sum()
    return loss / num_queries


def term_weights(task: TaskTrain, gather_devices: int = 1) -> dict[str, float]:
    """The terms of a task's loss by the setting of their weight, each with what it is multiplied with."""
    weights = {setting: float(weight) for setting in TERMS if (weight := getattr(task, setting))}
    if task.lone_weight == "ignored" and len(weights) == 1:
        weights = dict.fromkeys(weights, 1.0)
    return {setting: weight / (gather_devices if setting in GATHERED else 1) for setting, weight in weights.items()}


@dataclass(kw_only=True)
class Scored:
    """What the losses of B queries are made of (see losses.py); X columns only where a task uses full_contrastive."""

    sim_BC: torch.Tensor
    own_BG: torch.Tensor
    rewards_BG: torch.Tensor
    weights_BG: torch.Tensor
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
        weights_BG=of.weights_BG,
    )


def _pairwise(of: Scored, task: TaskTrain) -> torch.Tensor:
    return losses.pairwise(of.own_sim_BG, of.rewards_BG, weights_BG=of.weights_BG)


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

GATHERED = frozenset({"contrastive_weight", "full_contrastive_weight", "graded_weight", "listwise_weight"})
"""Those that look at the documents of all ranks."""
