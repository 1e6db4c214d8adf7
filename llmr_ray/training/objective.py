"""What one step minimises: the sampled groups of this rank and the loss of their embeddings.

Tensor legend: B queries of this rank, N over all ranks, G documents of a group, C = N * G gathered documents, D
embedding, T distinct texts of this rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass

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
