"""The training losses, as pure functions of similarities: contrastive, distilled from rewards, and on graded labels.

Tensor legend: B queries of this rank, G documents of a query's group (position 0 is the chosen positive), C documents
of all ranks. `sim` is similarity / temperature; half types are widened to float32. Every function returns one loss per
query; the batch's loss is their mean over all queries of all ranks.

What may serve as a negative is decided once for all losses (methods.md I.7):
  own_BG     the columns of the query's own group in `sim_BC`;
  same_BGG   which positions of a group hold the same text: never each other's negatives;
  others_BC  which columns are in-batch negatives: not the query's own group, no text of it, no relevant document of it.
Masks are boolean and masked similarities -inf, so a masked document has exactly no weight and no gradient.
"""

import torch
import torch.nn.functional as F


def contrastive(
    sim_BC: torch.Tensor,
    own_BG: torch.Tensor,
    same_BGG: torch.Tensor,
    others_BC: torch.Tensor,
    *,
    positive_BG: torch.Tensor | None = None,
    further_B: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross-entropy of the positive against the own group's rest and all in-batch negatives (methods.md A.5.2).

    As in paper and released code, but for documents masked as false negatives, which both keep. With several positives
    the mean over them, each against what is no positive (AAR, methods.md D.6).

    Args:
        sim_BC, own_BG, same_BGG, others_BC: see above.
        positive_BG: the positives of each group, at least one; the first document where it is None.
        further_B: the logsumexp of negatives that stand in no column.

    Returns:
        float32 [B].
    """
    if positive_BG is None:
        return _cross_entropies(sim_BC, own_BG, ~same_BGG[:, :1], others_BC, further_B)[:, 0]
    negative_BGG = ~(same_BGG | positive_BG[:, None, :])
    each_BG = _cross_entropies(sim_BC, own_BG, negative_BGG, others_BC, further_B)
    return (each_BG * positive_BG).sum(dim=1) / positive_BG.sum(dim=1)


def full_contrastive(
    sim_BC: torch.Tensor,
    own_BG: torch.Tensor,
    same_BGG: torch.Tensor,
    others_BC: torch.Tensor,
    sim_BX: torch.Tensor,
    others_BX: torch.Tensor,
    *,
    positive_BG: torch.Tensor | None = None,
) -> torch.Tensor:
    """The contrastive loss with every kind of pair as negatives (LLM-R, methods.md B.8).

    To the query's own negatives come its positive against other queries, the query against other queries, and its
    positive against other positives. A batch of one query has none of these.

    Args:
        sim_BC, own_BG, same_BGG, others_BC: see above.
        sim_BX: the further similarities of each query (or of its positive).
        others_BX: which of them are of true negatives.
        positive_BG: as in `contrastive`; "its positive" above is the first.

    Returns:
        float32 [B].
    """
    further_B = _logsumexp(_wide(sim_BX), others_BX)
    return contrastive(sim_BC, own_BG, same_BGG, others_BC, positive_BG=positive_BG, further_B=further_B)


def group_cross_entropy(logits_BG: torch.Tensor, same_BGG: torch.Tensor) -> torch.Tensor:
    """-log softmax of the positive among its group: L_reward of LLM-R (methods.md B.6). A text counts once.

    Args:
        logits_BG: of a cross-encoder, the positive's first.
        same_BGG: see above.

    Returns:
        float32 [B].
    """
    logits_BG = _wide(logits_BG)
    return _logsumexp(logits_BG, ~_repeats(same_BGG)) - logits_BG[:, 0]


def teacher_scores(rewards_BG: torch.Tensor, form: str) -> torch.Tensor:
    """Rewards as the teacher's softmax takes them: float32 [B, G].

    raw: as they are. exp: e to the reward, which makes probabilities of likelihoods (REPLUG's formula, methods.md F).
    zscore, minmax: standardised within the group, so that one temperature fits queries of any spread; rewards that are
    all equal become 0.
    """
    rewards_BG = _wide(rewards_BG)
    if form == "raw":
        return rewards_BG
    if form == "exp":
        return rewards_BG.exp()
    if form == "zscore":
        centred, spread = rewards_BG - rewards_BG.mean(dim=1, keepdim=True), rewards_BG.std(dim=1, correction=0)
    elif form == "minmax":
        low, high = rewards_BG.aminmax(dim=1)
        centred, spread = rewards_BG - low[:, None], high - low
    else:
        raise ValueError(f"reward_form is '{form}', but must be raw, exp, zscore or minmax")
    # By values, not by the spread: that of equal rewards need not round to 0.
    is_flat = (rewards_BG == rewards_BG[:, :1]).all(dim=1)
    return centred.masked_fill(is_flat[:, None], 0.0) / spread.masked_fill(is_flat, 1.0)[:, None]


def group_kl(
    sim_BG: torch.Tensor,
    rewards_BG: torch.Tensor,
    *,
    reward_temperature: float,
    reward_form: str = "raw",
    student_temperature: float = 1.0,
    direction: str = "teacher_student",
) -> torch.Tensor:
    """KL divergence between softmax(reward / T) and softmax(sim / T_s) within each query's own group (A.5.3, F).

    teacher_student is KL(teacher || student), as in LLM-Embedder, LLM-R and the code of REPLUG and Atlas;
    student_teacher is REPLUG's formula. All-equal rewards give a uniform teacher, a group of one gives 0 without
    gradient, and documents whose probability under the first is 0 contribute 0. The batch's loss is a mean over
    queries (REPLUG's code divides by the group's size as well).

    Returns:
        float32 [B].
    """
    teacher_BG = F.log_softmax(teacher_scores(rewards_BG, reward_form) / reward_temperature, dim=1)
    student_BG = F.log_softmax(_wide(sim_BG) / student_temperature, dim=1)
    first, second = (teacher_BG, student_BG) if direction == "teacher_student" else (student_BG, teacher_BG)
    each_BG = F.kl_div(second, first, reduction="none", log_target=True)
    return each_BG.masked_fill(first.isneginf(), 0.0).sum(dim=1)


def marginal_likelihood(
    sim_BG: torch.Tensor, rewards_BG: torch.Tensor, *, reward_temperature: float, student_temperature: float = 1.0
) -> torch.Tensor:
    """-log of the likelihood of the desired output when its document is drawn by the retriever (EMDR2, methods.md F).

    -log sum over the group of softmax(sim / T_s) * exp(reward / T), for rewards that are log-likelihoods. The gradient
    goes to the retriever alone. This is EMDR2's form, over whole outputs; Atlas takes the sum over documents at each
    token of the output, for which the log-probabilities of all tokens would have to be kept.

    Returns:
        float32 [B].
    """
    student_BG = F.log_softmax(_wide(sim_BG) / student_temperature, dim=1)
    return -torch.logsumexp(_wide(rewards_BG) / reward_temperature + student_BG, dim=1)


def listwise(
    sim_BC: torch.Tensor,
    own_BG: torch.Tensor,
    labels_BG: torch.Tensor,
    same_BGG: torch.Tensor,
    others_BC: torch.Tensor,
    *,
    label_temperature: float,
    weights_BG: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross-entropy with softmax(label / T) over the group as target and all in-batch documents at 0 (methods.md C.3).

    A text that stands in the group twice counts once. A query all of whose labels are 0 (or less) says nothing about
    what is relevant and gives 0 without gradient. Of the group's documents i with similarities f_i, labels l_i and
    weights w_i, and the in-batch negatives c, the loss is

        W * sum_i u_i (log(sum_j w_j exp f_j + sum_c exp f_c) - f_i),
        u_i in proportion to w_i exp(l_i / T),
        W = sum_i t_i w_i with t_i in proportion to exp(l_i / T).

    A document thus pulls and pushes as if w of it were there, in target and denominator alike, so that the order that
    is best does not depend on the weights; and a query whose relevant documents are uncertain has less say. Where
    labels above 0 weigh nothing there is no target.

    Args:
        sim_BC, own_BG, same_BGG, others_BC: see above.
        labels_BG: graded labels.
        label_temperature: T.
        weights_BG: what the labels weigh, at least 0; None: 1 each.

    Returns:
        float32 [B].
    """
    sim_BC, labels_BG = _wide(sim_BC), _wide(labels_BG)
    is_first_BG = ~_repeats(same_BGG)
    weights_BG = torch.ones_like(labels_BG) if weights_BG is None else _wide(weights_BG)
    counts_BG = is_first_BG & (weights_BG > 0)
    log_weights_BG = weights_BG.clamp(min=torch.finfo(torch.float32).tiny).log()
    raised_BG = labels_BG / label_temperature
    says_B = ((labels_BG > 0) & counts_BG).any(dim=1)
    # Of a query that says nothing all documents count: without any, softmax and denominator would be NaN, and so the
    # gradient of the whole batch.
    counts_BG = counts_BG | ~says_B[:, None]
    target_BG = F.softmax((raised_BG + log_weights_BG).masked_fill(~counts_BG, -torch.inf), dim=1)
    own_sim_BG = sim_BC.gather(1, own_BG)
    own_B = _logsumexp(own_sim_BG + log_weights_BG, counts_BG)
    all_B = torch.logaddexp(own_B, _logsumexp(sim_BC, others_BC))
    # As what is lacking to 1, so that it is exactly 1 where all weights are.
    say_B = 1 - (F.softmax(raised_BG.masked_fill(~is_first_BG, -torch.inf), dim=1) * (1 - weights_BG)).sum(dim=1)
    loss_B = say_B * (target_BG * (all_B[:, None] - own_sim_BG)).sum(dim=1)
    return torch.where(says_B, loss_B, torch.zeros_like(loss_B))


def pairwise(sim_BG: torch.Tensor, labels_BG: torch.Tensor, *, weights_BG: torch.Tensor | None = None) -> torch.Tensor:
    """Mean over the group's pairs of unequal label of gap * softplus(-(difference of similarity)) (methods.md C.3).

    Args:
        sim_BG: similarities within the group.
        labels_BG: graded labels.
        weights_BG: what the labels weigh, a pair as much as the product of its two; the mean stays over the number of
            pairs, so that a query of less certain labels has less say. None: 1 each.

    Returns:
        float32 [B]; 0 where all labels are equal.
    """
    sim_BG, labels_BG = _wide(sim_BG), _wide(labels_BG)
    gap_BGG = labels_BG[:, :, None] - labels_BG[:, None, :]
    each_BGG = gap_BGG.clamp(min=0) * F.softplus(sim_BG[:, None, :] - sim_BG[:, :, None])
    if weights_BG is not None:
        each_BGG = each_BGG * (weights_BG[:, :, None] * weights_BG[:, None, :])
    return each_BGG.sum(dim=(1, 2)) / (gap_BGG > 0).sum(dim=(1, 2)).clamp(min=1)


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
    reward_form: str = "raw",
    include_self: bool = True,
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
    The weights follow the rewards in either case. Released temperature: 1. `include_self` False is the equation as
    printed, for study: a document that has no negatives then contributes 0.

    Returns:
        float32 [B].
    """
    rewards_BG = _wide(rewards_BG)
    weights_BG = F.softmax(teacher_scores(rewards_BG, reward_form) / reward_temperature, dim=1)
    negative_BGG = worse(rewards_BG, tie_policy=tie_policy, position0=position0) & ~same_BGG
    each_BG = _cross_entropies(sim_BC, own_BG, negative_BGG, others_BC, include_self=include_self)
    return (weights_BG * each_BG).sum(dim=1)


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
    sim_BC: torch.Tensor,
    own_BG: torch.Tensor,
    negative_BIG: torch.Tensor,
    others_BC: torch.Tensor,
    further_B: torch.Tensor | None = None,
    *,
    include_self: bool = True,
) -> torch.Tensor:
    """-log softmax of own documents 0..I-1, each against itself, its own negatives and the in-batch ones: [B, I].

    `further_B` is the logsumexp of negatives that stand in no column. Without itself a document is weighed against its
    negatives alone, and one that has none gives 0.
    """
    sim_BC = _wide(sim_BC)
    own_sim_BG = sim_BC.gather(1, own_BG)
    in_batch_B = _logsumexp(sim_BC, others_BC)
    if further_B is not None:
        in_batch_B = torch.logaddexp(in_batch_B, further_B)
    num_items = negative_BIG.shape[1]
    itself_IG = torch.eye(num_items, own_BG.shape[1], dtype=torch.bool, device=sim_BC.device)
    among_BIG = negative_BIG | itself_IG if include_self else negative_BIG & ~itself_IG
    own_BI = _logsumexp(own_sim_BG[:, None, :].expand_as(negative_BIG), among_BIG)
    all_BI = torch.logaddexp(own_BI, in_batch_B[:, None])
    return torch.where(all_BI == -torch.inf, 0.0, all_BI - own_sim_BG[:, :num_items])


def _repeats(same_BGG: torch.Tensor) -> torch.Tensor:
    """Which positions hold a text that stands in the group before them: bool [B, G]."""
    return same_BGG.tril(diagonal=-1).any(dim=2)


def _wide(values: torch.Tensor) -> torch.Tensor:
    """At least float32: cos / 0.01 spans +-100, too much for the softmax of a half type."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _logsumexp(values: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Logsumexp of the kept entries along the last axis; -inf, with zero gradient, where none is kept."""
    some = kept.any(dim=-1, keepdim=True)
    masked = values.masked_fill(~kept, -torch.inf).masked_fill(~some, 0.0)
    return torch.logsumexp(masked, dim=-1).masked_fill(~some.squeeze(-1), -torch.inf)
