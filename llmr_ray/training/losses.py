"""The training losses, as pure functions of similarities: contrastive, group KL and graded distillation.

Tensor legend: B queries of this rank, G documents of a query's group (position 0 is the chosen positive), C documents
of all ranks. `sim` is cosine / temperature; half types are widened to float32. Every function returns one loss per
query; the batch's loss is their mean over all queries of all ranks.

What may serve as a negative is decided once for all losses (methods.md I.7):
  own_BG     the columns of the query's own group in `sim_BC`;
  same_BGG   which positions of a group hold the same text: never each other's negatives;
  others_BC  which columns are in-batch negatives: not the query's own group, no text of it, no gold document of it.
Masks are boolean and masked similarities -inf, so a masked document has exactly no weight and no gradient.
"""

import torch
import torch.nn.functional as F


def contrastive(
    sim_BC: torch.Tensor, own_BG: torch.Tensor, same_BGG: torch.Tensor, others_BC: torch.Tensor
) -> torch.Tensor:
    """Cross-entropy of the positive against the own group's rest and all in-batch negatives (methods.md A.5.2).

    As in paper and released code, but for documents masked as false negatives, which both keep.

    Returns:
        float32 [B].
    """
    negative_BGG = ~same_BGG[:, :1]
    return _cross_entropies(sim_BC, own_BG, negative_BGG, others_BC)[:, 0]


def group_kl(sim_BG: torch.Tensor, rewards_BG: torch.Tensor, *, reward_temperature: float) -> torch.Tensor:
    """KL(softmax(reward / T) || softmax(sim)) within each query's own group (methods.md A.5.3).

    As in the released code. All-equal rewards give a uniform target, a group of one gives 0 without gradient, and
    documents whose target probability is 0 contribute 0.

    Returns:
        float32 [B].
    """
    teacher_BG = F.softmax(_wide(rewards_BG) / reward_temperature, dim=1)
    student_BG = F.log_softmax(_wide(sim_BG), dim=1)
    return F.kl_div(student_BG, teacher_BG, reduction="none").sum(dim=1)


def graded_distillation(
    sim_BC: torch.Tensor,
    own_BG: torch.Tensor,
    rewards_BG: torch.Tensor,
    same_BGG: torch.Tensor,
    others_BC: torch.Tensor,
    *,
    tie_policy: str,
    position0: str,
    reward_temperature: float,
) -> torch.Tensor:
    """Each document of the group against the worse ones and all in-batch negatives, weighted by softmax(reward).

    LLM-Embedder's equation 4 in the form of the released code: the document itself stands in its denominator (as
    printed it does not, and the loss is unbounded below, methods.md A.5.5), no division by G. The G cross-entropies
    share one pass over the in-batch columns. Where code and paper differ, `tie_policy` chooses:
      sorted: (code) documents in descending order of reward, ties in group order; all later ones are negatives;
      strict: (paper) only documents of strictly lower reward are negatives.
    And `position0`:
      gold_first: (code) the chosen positive counts as better than all that it does not tie with, whatever its reward;
      by_reward: (paper) it stands where its reward puts it.
    The weights follow the rewards in either case. Released temperature: 1.

    Returns:
        float32 [B].
    """
    rewards_BG = _wide(rewards_BG)
    weights_BG = F.softmax(rewards_BG / reward_temperature, dim=1)
    negative_BGG = worse(rewards_BG, tie_policy=tie_policy, position0=position0) & ~same_BGG
    return (weights_BG * _cross_entropies(sim_BC, own_BG, negative_BGG, others_BC)).sum(dim=1)


def worse(rewards_BG: torch.Tensor, *, tie_policy: str, position0: str) -> torch.Tensor:
    """Which documents of a group count as worse than which: bool [B, G, G], [b, i, j] = j is a negative of i."""
    gold_first = position0 == "gold_first"
    if tie_policy == "strict":
        worse_BGG = rewards_BG[:, None, :] < rewards_BG[:, :, None]
        if gold_first:
            worse_BGG[:, 0, :] = rewards_BG != rewards_BG[:, :1]
            worse_BGG[:, :, 0] = False
        return worse_BGG
    if tie_policy != "sorted":
        raise ValueError(f"tie_policy is '{tie_policy}', but must be strict or sorted")
    keys_BG = rewards_BG.clone()
    if gold_first:
        keys_BG[:, 0] = torch.inf
    place_BG = torch.argsort(torch.argsort(keys_BG, dim=1, descending=True, stable=True), dim=1)
    return place_BG[:, None, :] > place_BG[:, :, None]


def _cross_entropies(
    sim_BC: torch.Tensor, own_BG: torch.Tensor, negative_BIG: torch.Tensor, others_BC: torch.Tensor
) -> torch.Tensor:
    """-log softmax of own documents 0..I-1, each against itself, its own negatives and the in-batch ones: [B, I]."""
    sim_BC = _wide(sim_BC)
    own_sim_BG = sim_BC.gather(1, own_BG)
    in_batch_B = _logsumexp(sim_BC, others_BC)
    num_items = negative_BIG.shape[1]
    itself_IG = torch.eye(num_items, own_BG.shape[1], dtype=torch.bool, device=sim_BC.device)
    own_BI = _logsumexp(own_sim_BG[:, None, :].expand_as(negative_BIG), negative_BIG | itself_IG)
    return torch.logaddexp(own_BI, in_batch_B[:, None]) - own_sim_BG[:, :num_items]


def _wide(values: torch.Tensor) -> torch.Tensor:
    """At least float32: cos / 0.01 spans +-100, too much for the softmax of a half type."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _logsumexp(values: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Logsumexp of the kept entries along the last axis; -inf, with zero gradient, where none is kept."""
    some = kept.any(dim=-1, keepdim=True)
    masked = values.masked_fill(~kept, -torch.inf).masked_fill(~some, 0.0)
    return torch.logsumexp(masked, dim=-1).masked_fill(~some.squeeze(-1), -torch.inf)
