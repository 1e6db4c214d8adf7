"""From log-probabilities to rewards: likelihood and rank-aware reward (methods.md A.4). Pure functions."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from llmr_ray.artifacts import Counts
from llmr_ray.errors import DataError
from llmr_ray.feedback.rules import RULES
from llmr_ray.frames import PAIR, frame_of
from llmr_ray.schemas import SCHEMAS

MIN_REWARDED = 2
"""A query with fewer rewarded documents has nothing to compare."""

_TOO_FEW = f"the query has fewer than {MIN_REWARDED} rewarded documents"


@dataclass(frozen=True)
class Draws:
    """Distinct sampled outputs and how often each was drawn."""

    texts: tuple[str, ...]
    counts: tuple[int, ...]


def likelihood(token_logprobs: Sequence[float], normalization: str) -> float:
    """The generation likelihood of an output from its tokens' log-probabilities.

    "mean" is what all released code computes (LLM-Embedder, LLM-R, Atlas); "sum" is the product that the papers print,
    which favours short outputs.
    """
    if not token_logprobs:
        raise DataError("an output without tokens has no likelihood.")
    total = float(sum(token_logprobs))
    return total if normalization == "sum" else total / len(token_logprobs)


def share_of(gold: float, others: Sequence[float]) -> float:
    """The log of the gold option's share: its likelihood minus the log-sum-exp over all options' likelihoods.

    Raw likelihood also rewards a candidate under which every option is likelier; the choice depends on the share alone.
    UPRISE normalises its losses over options in the same spirit (methods.md B).
    """
    return float(gold - np.logaddexp.reduce([gold, *others]))


def distinct_draws(samples: Sequence[str], target: str) -> Draws:
    """Sampled outputs to compare the desired output with, in order of first appearance.

    White space around an output does not count. Empty outputs are dropped; so are those equal to the desired output,
    which must not beat itself. Equal ones are scored once but keep their count: each is a draw (methods.md A.4.1).
    """
    counts: dict[str, int] = {}
    for sample in (sample.strip() for sample in samples):
        if sample and sample != target.strip():
            counts[sample] = counts.get(sample, 0) + 1
    return Draws(tuple(counts), tuple(counts.values()))


def rank_of(target_likelihood: float, sample_likelihoods: Sequence[float], counts: Sequence[int] | None = None) -> int:
    """1 + the number of sampled outputs with a strictly higher likelihood than the desired one; 1 is best.

    The paper leaves ties and origin open; ties go to the desired output here. With N samples the rank is in [1, N + 1].
    """
    weights = [1] * len(sample_likelihoods) if counts is None else counts
    return 1 + sum(
        count for sampled, count in zip(sample_likelihoods, weights, strict=True) if sampled > target_likelihood
    )


def rank_reward(rank_without: int, rank_with: int) -> int:
    """R(C) = r^a - r^b: by how many places the candidate lifts the desired output (LLM-Embedder, ACL version)."""
    return rank_without - rank_with


def reward_rows(
    score_rows: Sequence[Mapping[str, Any]], kind_of: Mapping[str, str]
) -> tuple[list[dict[str, object]], Counts]:
    """The rewards rows of llm_scores rows: the llm_score, or label, of the kind that the query's task uses.

    A document that a rule judged has no reward, and the rule as the source: it ranks below all that have one. Rows of
    another kind, failed rows and queries with nothing to compare (fewer than two documents, or none that the LLM
    scored) are left out, each with its reason.

    Args:
        score_rows: rows of llm_scores, all of a query's among them.
        kind_of: query_id to "likelihood", "rank" or "label".
    """
    counts = Counts(rows_in=len(score_rows))
    rewarded: dict[str, list[dict[str, object]]] = {}
    for row in score_rows:
        is_label = row["kind"] == "label"
        if row["kind"] != kind_of[row["query_id"]]:
            counts.skipped["a kind the task does not use"] += 1
        elif row["error"] is not None and row["error"] not in RULES:
            counts.skipped["the LLM request failed"] += 1
        else:
            rewarded.setdefault(row["query_id"], []).append(
                {
                    "query_id": row["query_id"],
                    "doc_id": row["doc_id"],
                    "reward": row["label" if is_label else "llm_score"],
                    "reward_source": row["error"] or ("label" if is_label else "llm"),
                    "evidence": row["evidence"] if is_label else None,
                }
            )
    return _comparable(rewarded.values(), counts)


def given_rewards(given: pa.Table, source: str) -> tuple[pa.Table, Counts]:
    """The rewards of pairs that came with the data, but of queries with fewer than two of them.

    Args:
        given: a table given_rewards with all pairs of its queries. There may be tens of millions.
        source: what their reward_source is.
    """
    pairs = frame_of(given, [*PAIR, "reward"])
    rewards = pairs.filter(pl.len().over("query_id") >= MIN_REWARDED).with_columns(reward_source=pl.lit(source))
    counts = Counts(rows_in=len(pairs), ok=len(rewards))
    if len(rewards) < len(pairs):
        counts.skipped[_TOO_FEW] = len(pairs) - len(rewards)
    return rewards.with_columns(evidence=pl.lit(None, pl.String)).to_arrow().cast(SCHEMAS["rewards"]), counts


def _comparable(rewarded: Iterable[list[dict[str, object]]], counts: Counts) -> tuple[list[dict[str, object]], Counts]:
    """The rows of queries that have something to compare; the others are counted."""
    rows: list[dict[str, object]] = []
    for of_query in rewarded:
        if len(of_query) < MIN_REWARDED:
            counts.skipped[_TOO_FEW] += len(of_query)
        elif all(row["reward"] is None for row in of_query):
            counts.skipped["the LLM scored no document of the query"] += len(of_query)
        else:
            rows.extend(of_query)
    counts.ok = len(rows)
    return rows, counts
