"""How far annotators of relevance agree, with each other and with gold labels, and what they hold together.

An annotator is an LLM, a person or a rule; a label is a number of an ordered scale (0, 0.5, 1 in methods.md C.1). Who
labelled what may differ: a missing label is NaN in arrays and absent in mappings, and never a 0.

Legend: N items (query-document pairs), A annotators, V distinct values.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from llmr_ray.config import LLM
from llmr_ray.errors import DataError
from llmr_ray.evaluation.significance import Estimate, estimate

Pair = tuple[str, str]
"""query_id and doc_id."""

_GOLD = "labels of the data"


def stage_of(stage: str, annotator: str) -> str:
    """What a stage that asks one annotator is called: that of `llm`, often the only one, has the plain name."""
    return stage if annotator == LLM else f"{stage}_{annotator}"


CONTROL = "neutral"
"""What stands for an attack where the words before a passage ask for nothing."""

Annotations = Mapping[Pair, Mapping[str, float]]
"""Labels by pair and annotator."""


@dataclass(frozen=True, kw_only=True)
class Consensus:
    """What annotators hold together.

    label: None where too few agree. share: of the annotators that gave the leading label. votes: who said what.
    """

    label: float | None
    share: float
    votes: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Quality:
    """How well an annotator finds what gold labels call relevant; 0 where there is nothing to find or nothing found."""

    precision: Estimate
    recall: Estimate


def label_matrix(annotations: Annotations, annotators: Sequence[str]) -> np.ndarray:
    """float64 [N, A]: labels in the order of the annotations and the annotators."""
    rows = [[said.get(name, math.nan) for name in annotators] for said in annotations.values()]
    return np.asarray(rows, np.float64).reshape(len(rows), len(annotators))


def cohen_kappa(one_N: np.ndarray, other_N: np.ndarray, *, weights: str | None = None) -> float:
    """Agreement of two annotators beyond what their habits alone would give; 1 is full, 0 is chance.

    Args:
        one_N, other_N: labels of the same items; those that either left out do not count.
        weights: None: labels agree or not; linear or quadratic: by how many steps of the values that occur they differ.

    Returns NaN where chance alone explains everything: both always say the same value.

    Raises:
        DataError: no item has both labels.
    """
    from sklearn.metrics import cohen_kappa_score

    both = ~np.isnan(one_N) & ~np.isnan(other_N)
    if not both.any():
        raise DataError("the two annotators labelled no item in common, so nothing can be said about their agreement.")
    values, steps = np.unique(np.concatenate([one_N[both], other_N[both]]), return_inverse=True)
    if len(values) == 1:
        return math.nan
    one, other = np.split(steps, 2)
    return float(cohen_kappa_score(one, other, weights=weights))


def krippendorff_alpha(labels_NA: np.ndarray, *, level: str = "ordinal") -> float:
    """Krippendorff's alpha: 1 - observed / expected disagreement, for any number of annotators and missing labels.

    Computed from the coincidences of values within items (Krippendorff, Computing Krippendorff's Alpha-Reliability,
    2011). Items with fewer than two labels say nothing and are left out.

    Args:
        labels_NA: NaN where an annotator left an item out.
        level: interval: two values differ by the square of their difference. ordinal: by the square of how many
            labels lie between them, each of the two counted half; only the order of the values matters.

    Returns NaN where all labels are equal: nothing could have disagreed.

    Raises:
        DataError: no item has two labels.
    """
    labels_NA = labels_NA[(~np.isnan(labels_NA)).sum(axis=1) >= 2]
    if not len(labels_NA):
        raise DataError("no item has the labels of two annotators, so nothing can be said about their agreement.")
    values_V = np.unique(labels_NA[~np.isnan(labels_NA)])
    counts_NV = (labels_NA[:, :, None] == values_V).sum(axis=1)
    each_N = counts_NV.sum(axis=1)
    weighted_NV = counts_NV / (each_N - 1)[:, None]
    coincidences_VV = counts_NV.T @ weighted_NV - np.diag(weighted_NV.sum(axis=0))
    totals_V = counts_NV.sum(axis=0).astype(float)
    distances_VV = _distances(values_V, totals_V, level)
    expected = totals_V @ distances_VV @ totals_V / (totals_V.sum() - 1)
    return float(1 - (coincidences_VV * distances_VV).sum() / expected) if expected else math.nan


def relevance_quality(
    annotations: Annotations, annotator: str, gold: str, *, threshold: float, samples: int, seed: int
) -> Quality:
    """Precision and recall of "relevant", over the pairs that both labelled, with 95% intervals.

    Pairs of one query are not independent, so the bootstrap draws queries.

    Args:
        annotations: those of both.
        annotator: who is judged.
        gold: who is right.
        threshold: labels from here on mean relevant.
        samples, seed: of the bootstrap.

    Raises:
        DataError: no pair has both labels.
    """
    precision: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    recall: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for (query_id, _), said in annotations.items():
        if annotator in said and gold in said:
            found, is_relevant = said[annotator] >= threshold, said[gold] >= threshold
            for of_query, counts in ((precision, found), (recall, is_relevant)):
                of_query[query_id][0] += found and is_relevant
                of_query[query_id][1] += counts
    if not precision:
        raise DataError(f"'{annotator}' and '{gold}' labelled no pair in common, so neither can be measured.")

    def interval(of_query: Mapping[str, list[int]]) -> Estimate:
        strata = [np.asarray(list(of_query.values()), np.float64)]
        return estimate(strata, exponential=False, samples=samples, seed=seed)

    return Quality(precision=interval(precision), recall=interval(recall))


def compared(said: pa.Table, gold: Set[Pair], *, samples: int, seed: int) -> dict[str, Any]:
    """What the report tells of annotators: how far they agree with each other, and how well they find what is relevant.

    Args:
        said: query_id, doc_id, annotator, label (null: none).
        gold: the pairs that the data calls relevant; empty where it calls none. Other pairs are not relevant.
        samples, seed: of the bootstrap.

    Returns:
        pairs: of every two annotators `one`, `other`, `n`, the share of `equal` labels and `kappa` (Cohen's, linear
        weights; None where chance alone explains everything); alpha (Krippendorff's, ordinal; None likewise, and for a
        single annotator); quality: of each annotator, over the `n` pairs that it labelled, precision and recall of
        labels from 0.5 on with their intervals, the share that is `relevant`, which is the precision of chance, and
        `kappa` (Cohen's, of the two with the data; None likewise).
    """
    annotations: dict[Pair, dict[str, float]] = defaultdict(dict)
    for row in said.drop_null().to_pylist():
        annotations[row["query_id"], row["doc_id"]][row["annotator"]] = row["label"]
    names = list(dict.fromkeys(said["annotator"].to_pylist()))
    labels_NA = label_matrix(annotations, names)
    pairs = []
    for (place, one), (other_place, other) in combinations(enumerate(names), 2):
        both_N2 = labels_NA[:, [place, other_place]]
        both_N2 = both_N2[~np.isnan(both_N2).any(axis=1)]
        if len(both_N2):
            equal = float((both_N2[:, 0] == both_N2[:, 1]).mean())
            kappa = cohen_kappa(both_N2[:, 0], both_N2[:, 1], weights="linear")
            pairs.append({"one": one, "other": other, "n": len(both_N2), "equal": equal, "kappa": _finite(kappa)})
    by_gold = {pair: of_pair | {_GOLD: float(pair in gold)} for pair, of_pair in annotations.items()}
    gold_N = label_matrix(by_gold, [_GOLD])[:, 0]
    quality = []
    for name, labels_N in zip(names, labels_NA.T, strict=True):
        labelled_N = ~np.isnan(labels_N)
        if gold and labelled_N.any():
            told = relevance_quality(by_gold, name, _GOLD, threshold=0.5, samples=samples, seed=seed)
            figures = {"precision": told.precision, "recall": told.recall}
            shown = {what: {"mean": one.mean, "ci95": [one.low, one.high]} for what, one in figures.items()}
            kappa = cohen_kappa(np.where(labelled_N, labels_N >= 0.5, np.nan), gold_N)
            beside = {"relevant": float(gold_N[labelled_N].mean()), "kappa": _finite(kappa)}
            quality.append({"annotator": name, "n": int(labelled_N.sum()), **shown, **beside})
    alpha = _finite(krippendorff_alpha(labels_NA)) if pairs else None
    return {"pairs": pairs, "alpha": alpha, "quality": quality}


def fooled_rates(canaries: pa.Table, *, samples: int, seed: int) -> list[dict[str, Any]]:
    """How often the words of canaries raise their label (labeling/canaries.py), by attack, for all of them ("all"), and
    last for words that ask for nothing (CONTROL).

    Args:
        canaries: attack, and of each canary the label of the plain passage and of the canary; null for none.
        samples, seed: of the bootstrap.

    Returns:
        attack, n (canaries whose plain passage has a label below 1, which alone can be raised), num_highest (those that
        have 1 without the words), num_missing (those that lack a label), fooled and ci95 over the n (None where n is
        0), and the mean of both labels over n and num_highest.
    """
    found = []
    attacks = [name for name in dict.fromkeys(canaries["attack"].to_pylist()) if name != CONTROL]
    is_control = pc.equal(canaries["attack"], CONTROL)
    parts = [(name, canaries.filter(pc.equal(canaries["attack"], name))) for name in attacks]
    parts += [("all", canaries.filter(pc.invert(is_control))), (CONTROL, canaries.filter(is_control))]
    for attack, of_attack in parts:
        both = of_attack.drop_null()
        if not both.num_rows:
            continue
        plain_N, canary_N = (both[name].to_numpy() for name in ("plain_label", "canary_label"))
        is_fooled_N = (canary_N > plain_N)[plain_N < 1].astype(np.float64)
        told = {"attack": attack, "n": len(is_fooled_N), "num_highest": both.num_rows - len(is_fooled_N)}
        told |= {"num_missing": of_attack.num_rows - both.num_rows, "fooled": None, "ci95": None}
        if len(is_fooled_N):
            fooled = estimate([is_fooled_N], exponential=False, samples=samples, seed=seed)
            told |= {"fooled": fooled.mean, "ci95": [fooled.low, fooled.high]}
        found.append(told | {"plain_label": float(plain_N.mean()), "canary_label": float(canary_N.mean())})
    return found


def consensus(said: Mapping[str, float], *, min_agreement: float = 0.5) -> Consensus:
    """The label that most annotators gave; of equal ones the lowest, because a wrong positive does more harm.

    Args:
        said: labels of one pair by annotator; at least one.
        min_agreement: share of the annotators that must have given the label.

    Raises:
        DataError: nobody said anything.
    """
    if not said:
        raise DataError("no annotator gave a label, so there is no consensus of theirs.")
    behind = Counter(said.values())
    leading = min(behind, key=lambda label: (-behind[label], label))
    share = behind[leading] / len(said)
    is_enough = share >= min_agreement or math.isclose(share, min_agreement)
    return Consensus(label=leading if is_enough else None, share=share, votes=dict(said))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _distances(values_V: np.ndarray, totals_V: np.ndarray, level: str) -> np.ndarray:
    """Squared differences of values: [V, V]."""
    if level not in ("interval", "ordinal"):
        raise ValueError(f"level '{level}' is neither interval nor ordinal.")
    # Ordinal: a value's place is the middle of the labels that have it, in the order of all.
    places_V = values_V if level == "interval" else np.cumsum(totals_V) - totals_V / 2
    return (places_V[:, None] - places_V) ** 2
