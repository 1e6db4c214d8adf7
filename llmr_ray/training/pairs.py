"""What the reward model reads, and the groups it learns from: pure functions on rows (LLM-R, methods.md B.5, B.6)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from llmr_ray.config import TaskScore
from llmr_ray.data.splits import unit_hash
from llmr_ray.feedback.jobs import desired_output
from llmr_ray.feedback.prompts import candidate_text
from llmr_ray.training.groups import CANDIDATE, reject_reason
from llmr_ray.training.pools import pool_of


def is_held_out(query: Mapping[str, Any], fraction: float) -> bool:
    """Whether a training query does not train the reward model, so that this can be compared with the LLM on it.

    As with splits, queries that must not be parted are held out together.

    Args:
        query: query_id and split_key of a row of `queries`.
        fraction: share of the keys.
    """
    return unit_hash("held out of the reward model", query["split_key"] or query["query_id"]) < fraction


GUESSING = 0.97
"""A loss that is still this share of that of the first steps has hardly left that of guessing."""
KNOWING = 0.5
"""A model that puts the positive first in more than this share of its groups does not guess."""


def learned_little(losses: Sequence[float], accuracies: Sequence[float]) -> str | None:
    """A warning where a reward model still guesses at the end of its training, else None.

    It begins with logits that are nearly equal, and leaves the loss of guessing the later the less the candidates
    differ. Until then its rewards are almost alike and teach next to nothing. One that was good from the beginning is
    not meant, though its loss does not fall either.

    Args:
        losses: of all steps.
        accuracies: of all steps; shares of the groups whose positive comes first.
    """
    first = float(np.mean(losses[: max(1, len(losses) // 20)]))
    last, accuracy = (float(np.mean(values[-max(1, len(losses) // 10) :])) for values in (losses, accuracies))
    if last < GUESSING * first or accuracy > KNOWING:
        return None
    return (
        f"its loss is {last:.3f} at the end and was {first:.3f} at the beginning, so it hardly tells candidates apart "
        "and teaches next to nothing. Train it longer (reward_model.train.num_steps) or at another rate "
        "(reward_model.train.learning_rate), or let the LLM's scores teach (reward_model.model: '')."
    )


def left_text(query: Mapping[str, Any], settings: TaskScore, *, sees_target: bool, seed: int) -> str | None:
    """Query, newline, desired output; None where there is none to see.

    The output is the one by which the LLM judged the candidates; of a question with options it is the option's text.

    Args:
        query: a row of `queries`.
        settings: how the LLM scores the query's task.
        sees_target: False: the query alone.
        seed: of the run.
    """
    if not sees_target:
        return str(query["query"])
    target = desired_output(query, settings, seed)
    return None if target is None else f"{query['query']}\n{target}"


def pair_row(
    query: Mapping[str, Any],
    left: str | None,
    found: Mapping[str, list[Any]] | None,
    corpus: pa.Table,
    *,
    top_positives: int,
) -> dict[str, Any] | str:
    """A row of a groups table of pairs, or the reason why the query cannot train.

    `query` is what stands on the left, `docs` what the LLM read of the candidates. The rewards alone decide what is
    better: a gold document is a candidate like any other.

    Args:
        query: a row of `queries`.
        left: its `left_text`.
        found: the query's entry of `join_pools`; None where there is none.
        corpus: what `join_pools` was given, with `continuation`.
        top_positives: see groups.sample.
    """
    if found is None:
        return "no_candidates"
    if left is None:
        return "no_target"
    places = [place for place, judged in enumerate(found["judged"]) if judged]
    if not places:
        return "no_rewards"
    documents = corpus.take([found["row"][place] for place in places]).to_pylist()
    docs = [candidate_text(query["task"], document) for document in documents]
    rewards = [found["reward"][place] for place in places]
    roles = [CANDIDATE] * len(docs)
    reason = reject_reason(
        pool_of(docs, roles, rewards),
        positive="teacher",
        min_reward=None,
        min_margin=0.0,
        top_positives=top_positives,
    )
    if reason is not None:
        return reason
    row = {name: query[name] for name in ("query_id", "task", "dataset")}
    doc_ids = [found["doc_id"][place] for place in places]
    return row | {"query": left, "doc_ids": doc_ids, "docs": docs, "roles": roles, "rewards": rewards, "weights": None}
