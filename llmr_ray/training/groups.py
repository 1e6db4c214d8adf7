"""Groups: which queries can train, and which documents of a query's pool one step uses.

The groups table holds a query's whole pool. What a step uses is sampled when the batch is made, from a generator that
depends on (seed, epoch, query_id) alone: the released code samples once and freezes it for all epochs (methods.md
A.5.1). LLM-R goes round instead of drawing: its place in the lists moves on by one with each epoch (B.5; in the
released cross-encoder the epoch stays 0, and so do the documents).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmr_ray.errors import DataError

GOLD, CANDIDATE, SAME_LABEL = "gold", "candidate", "same_label"
"""Roles of a query's documents; one of the query's own label may be a positive, but no negative (LLM-R, B.8)."""

GOLD_AND_TEACHER = "gold_and_teacher"
"""The positive policy that takes gold documents and those that the LLM prefers (AAR, methods.md D.3)."""

POSITIVES_OF_GOLD = ("first", "random", "teacher_gold")
"""Positive policies that choose among gold documents; a query without any takes `teacher` where it has rewards."""


@dataclass(frozen=True, kw_only=True)
class Pool:
    """The candidate documents of one query, M of them.

    keys: int64 [M], equal exactly for equal texts. is_gold: bool [M]. rewards: float32 [M], -inf for a document that is
    below all that have one, or None for tasks trained on labels. is_barred: bool [M], documents that may not be
    negatives; None: there are none. weights: float32 [M], what the rewards weigh; None: all weigh 1.
    """

    keys: np.ndarray
    is_gold: np.ndarray
    rewards: np.ndarray | None
    is_barred: np.ndarray | None = None
    weights: np.ndarray | None = None

    @property
    def spared_keys(self) -> np.ndarray:
        """Keys of the texts that may not be negatives, however they are chosen: of gold and of barred documents."""
        return self.keys[self.is_gold if self.is_barred is None else self.is_gold | self.is_barred]

    def relevant_keys(self, *, by_label: bool) -> np.ndarray:
        """Keys of the texts that are no negatives where they stand in another query's group: of gold documents, and
        where the rewards are graded labels of all that are labelled above 0 (methods.md C.3)."""
        if self.rewards is None or not by_label:
            return self.keys[self.is_gold]
        return self.keys[self.is_gold | (self.rewards > 0)]


def pool_rewards(rewards: Sequence[float | None]) -> np.ndarray:
    """Rewards as a pool holds them: float32 [M]. None ranks below every number and has no weight in a softmax: -inf."""
    return np.asarray([-np.inf if reward is None else reward for reward in rewards], np.float32)


def reject_reason(
    pool: Pool, *, positive: str, min_reward: float | None, min_margin: float, top_positives: int = 1
) -> str | None:
    """Why a query cannot train, or None.

    "below_min_reward" and "below_min_margin" are the filters of methods.md A.5.1 (best reward < min_reward; best -
    worst <= min_margin, so that a pool without any preference is left out at 0); "no_gold_document" and "no_negative"
    say that no group can be made under the positive policy; "too_few_documents" that there are not more texts than
    positives to go round, or fewer that have a reward (LLM-R, B.5); "no_rewards" that none has one.
    """
    positive = _policy(pool, positive)
    if pool.rewards is not None and len(pool.rewards):
        if not np.isfinite(pool.rewards).any():
            return "no_rewards"
        if min_reward is not None and pool.rewards.max() < min_reward:
            return "below_min_reward"
        if pool.rewards.max() - pool.rewards.min() <= min_margin:
            return "below_min_margin"
    if positive in POSITIVES_OF_GOLD and not pool.is_gold.any():
        return "no_gold_document"
    if not len(pool.keys):
        return "no_negative"
    if top_positives > 1:
        scored = pool.keys if pool.rewards is None else pool.keys[np.isfinite(pool.rewards)]
        if len(np.unique(pool.keys)) <= top_positives or len(np.unique(scored)) < top_positives:
            return "too_few_documents"
    # The positive of `teacher` may be any document: where it could be a negative too, another must remain.
    others = np.setdiff1d(pool.keys, pool.spared_keys)
    by_teacher = positive == "teacher" or (positive == GOLD_AND_TEACHER and not pool.is_gold.any())
    spare = 1 if by_teacher and _teacher_is_spare(pool) else 0
    return "no_negative" if len(others) <= spare else None


def _policy(pool: Pool, positive: str) -> str:
    has_no_gold = positive in POSITIVES_OF_GOLD and not pool.is_gold.any()
    return "teacher" if has_no_gold and pool.rewards is not None and len(pool.rewards) else positive


def _teacher_is_spare(pool: Pool) -> bool:
    return pool.rewards is not None and pool.keys[np.argmax(pool.rewards)] not in pool.spared_keys


def sample(
    pool: Pool,
    *,
    size: int,
    positive: str,
    negatives: str,
    rng: np.random.Generator,
    num_positives: int = 1,
    top_positives: int = 1,
    bottom_negatives: int = 0,
    num_preferred: int = 2,
    turn: int = 0,
) -> tuple[np.ndarray, int]:
    """Positions in the pool of the positives and then the negatives, int64 [G], and how many positives there are.

    Negatives never are gold or barred documents of the query, nor texts equal to one or to a positive, nor one text
    twice unless there are too few: then the chosen ones repeat cyclically, and the losses mask equal texts (in the
    released code a repeated document is its own negative).

    Args:
        pool: the query's documents.
        size: G.
        positive: first or random (of the gold documents), teacher (best reward of all), teacher_gold (best of the gold
            ones), gold_and_teacher (the gold ones, then the `num_preferred` best of all; none of them is a negative).
            Ties go to the first. A pool with rewards but without gold documents takes teacher in place of first,
            random and teacher_gold.
        num_positives: at the most; they are of different texts, and one text is always left to be a negative.
        negatives: random (without replacement), first (pool order), lowest or highest (by reward, ties in pool order).
        rng: the only source of randomness.
        top_positives: of so many preferred documents the positive is the one whose turn it is; none of them is a
            negative (LLM-R: 3).
        bottom_negatives: negatives are taken in turn from the first so many of their order (LLM-R: 16 of the lowest);
            0: always the first ones.
        num_preferred: gold_and_teacher only: texts of best reward that are positives, gold ones among them (AAR: 2).
        turn: rises by one with each epoch.

    Raises:
        DataError: the pool admits no positive or no negative; `reject_reason` tells beforehand.
    """
    ranked = _of_different_texts(pool, _positives(pool, _policy(pool, positive), rng, num_preferred))
    distinct = np.sort(np.unique(pool.keys, return_index=True)[1])
    others = distinct[~np.isin(pool.keys[distinct], pool.spared_keys)]
    wanted = min(num_positives, size - 1)
    liked = len(ranked) if positive == GOLD_AND_TEACHER else min(max(wanted, top_positives), len(ranked))
    for count in range(max(1, liked), 0, -1):
        preferred = ranked[:count]
        eligible = others[~np.isin(pool.keys[others], pool.keys[preferred])]
        if len(eligible):
            break
    else:
        raise DataError("a training pool has no document that may be a negative. Make the groups again.")
    if top_positives > 1:
        preferred = np.roll(preferred, -(turn % count))
    chosen = preferred[: max(1, wanted)]
    if negatives == "random":
        eligible = rng.permutation(eligible)
    elif negatives != "first":
        rewards = _rewards(pool, f"negatives: {negatives}")[eligible]
        eligible = eligible[np.argsort(rewards if negatives == "lowest" else -rewards, kind="stable")]
    num_negatives = size - len(chosen)
    if bottom_negatives:
        eligible = eligible[:bottom_negatives]
        eligible = np.roll(eligible, -(turn * num_negatives % len(eligible)))
    return np.concatenate([chosen, np.resize(eligible[:num_negatives], num_negatives)]).astype(np.int64), len(chosen)


def _of_different_texts(pool: Pool, places: np.ndarray) -> np.ndarray:
    """The first place of each text, in their order."""
    return places[np.sort(np.unique(pool.keys[places], return_index=True)[1])]


def _positives(pool: Pool, policy: str, rng: np.random.Generator, num_preferred: int) -> np.ndarray:
    """What may be a positive, the preferred first."""
    if policy == "teacher":
        return np.argsort(-_rewards(pool, "positive: teacher"), kind="stable")
    gold = np.flatnonzero(pool.is_gold)
    if policy == GOLD_AND_TEACHER:
        rewards = _rewards(pool, "positive: gold_and_teacher")
        order = np.argsort(-rewards, kind="stable")
        # What ranks below all that have a reward is preferred by nobody.
        best = _of_different_texts(pool, order[np.isfinite(rewards[order])])[:num_preferred]
        return np.concatenate([gold, best])
    if not len(gold):
        raise DataError(f"a training pool has no gold document, which the positive policy '{policy}' needs.")
    if policy == "random":
        return rng.permutation(gold)
    if policy == "teacher_gold":
        return gold[np.argsort(-_rewards(pool, "positive: teacher_gold")[gold], kind="stable")]
    return gold


def _rewards(pool: Pool, setting: str) -> np.ndarray:
    if pool.rewards is None:
        raise DataError(f"`{setting}` needs rewards, but the pool has none. Set the task's score.feedback.")
    return pool.rewards


def reward_spread(rewards_BG: np.ndarray) -> float:
    """Best - worst reward, summed over groups; documents below all that have a reward are passed over."""
    best_B = rewards_BG.max(axis=1, initial=-np.inf)
    worst_B = rewards_BG.min(axis=1, where=np.isfinite(rewards_BG), initial=np.inf)
    return float((best_B - worst_B)[worst_B <= best_B].sum())


def in_batch_negatives(keys_NG: np.ndarray, relevant_keys: Sequence[np.ndarray], rows: range) -> np.ndarray:
    """Which documents of the global batch are in-batch negatives of which query: bool [B, N * G].

    Left out are a query's own group (the losses treat it by position), every text of it, and every relevant document of
    the query, wherever in the batch it stands (methods.md I.7).

    Args:
        keys_NG: text keys of the groups of all N queries.
        relevant_keys: `Pool.relevant_keys` of each of the B queries.
        rows: the B consecutive queries of this rank.
    """
    keys_C = keys_NG.reshape(-1)
    barred = [np.append(relevant, keys_NG[row]) for row, relevant in zip(rows, relevant_keys, strict=True)]
    return np.stack([~np.isin(keys_C, own) for own in barred])


def peers(
    positive_keys_N: np.ndarray, relevant_keys: Sequence[np.ndarray], query_keys_N: np.ndarray, rows: range
) -> np.ndarray:
    """Which other queries of the global batch ask for something else: bool [B, N].

    A query of the same text, or one whose positive is a positive or relevant document of this one, is no negative.

    Args:
        positive_keys_N: text keys of the positives of all N queries.
        relevant_keys: `Pool.relevant_keys` of each of the B queries.
        query_keys_N: keys of the queries' texts.
        rows: the B consecutive queries of this rank.
    """
    return np.stack(
        [
            ~np.isin(positive_keys_N, np.append(relevant, positive_keys_N[row])) & (query_keys_N != query_keys_N[row])
            for row, relevant in zip(rows, relevant_keys, strict=True)
        ]
    )
