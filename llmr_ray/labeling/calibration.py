"""How likely the LLM would label a pair 1, by the retriever's scores, and from where this can stand for its label.

Everything is told on calibration questions: a share of the questions, by a hash of the id, that only the LLM labels and
nothing trains on (methods.md C.4). Probabilities by which thresholds and reliability are told are cross-fitted: each
comes from a fit on the other questions. On the pairs it was fitted on, isotonic regression is calibrated by
construction, however little it knows.

Legend: P pairs, F = 2 features, K knots.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

from llmr_ray.data.splits import unit_hash
from llmr_ray.errors import ConfigError, DataError
from llmr_ray.frames import PAIR, frame_of
from llmr_ray.labeling.settings import AdaptiveConfig

RETRIEVER = "retriever"
"""The source of pseudo-labels; all other sources (llm, gold, human) count as the LLM's."""

FOLDS = 5

FEWEST_QUESTIONS = 2
"""Calibration questions with labels that a round after the first needs: one to fit on, one to judge the fit by."""


def is_calibration(query_id: str, fraction: float) -> bool:
    """Whether a question is kept for calibration: a function of its id alone."""
    return unit_hash("calibration of labels", query_id) < fraction


def pair_features(pairs: pa.Table) -> np.ndarray:
    """What the probability is told by, float64 [P, 2]: the cosine, and by how much it leads the query's best other.

    The margin of the first candidate is the one to the next; all others have the negative margin to the first. It is 0
    for an only candidate and for two that share the first place.

    Args:
        pairs: all candidates of each query; columns query_id, cosine.
    """
    cosine = pl.col("cosine").cast(pl.Float64)
    first, second = cosine.max().over("query_id"), cosine.top_k(2).min().over("query_id")
    rival = pl.when(cosine == first).then(second).otherwise(first)
    return frame_of(pairs, ["query_id", "cosine"]).select(cosine, margin=cosine - rival).to_numpy()


@dataclass(frozen=True, kw_only=True, eq=False)
class Calibrator:
    """Features to probabilities. weight_F and bias make the logit; knots_K2 (logit, probability) bend it, if given."""

    weight_F: np.ndarray
    bias: float
    knots_K2: np.ndarray | None = None

    def probability(self, feature_PF: np.ndarray) -> np.ndarray:
        """That the LLM's label is 1: float64 [P]."""
        logit_P = feature_PF @ self.weight_F + self.bias
        if self.knots_K2 is None:
            # The same as 1 / (1 + exp(-logit)), without its overflow.
            return 0.5 * (1.0 + np.tanh(0.5 * logit_P))
        return np.interp(logit_P, self.knots_K2[:, 0], self.knots_K2[:, 1])

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        knots = None if self.knots_K2 is None else self.knots_K2.tolist()
        return {"weight": self.weight_F.tolist(), "bias": self.bias, "knots": knots}


def fit(feature_PF: np.ndarray, is_one_P: np.ndarray, *, method: str) -> Calibrator:
    """A calibrator from labelled pairs, of one class only too.

    platt: logistic regression on Platt's targets, (N1 + 1) / (N1 + 2) and 1 / (N0 + 2) for N1 ones and N0 others, which
    keep the weights finite where the classes can be parted (Platt 1999). isotonic: the best rising function of that
    regression's logit, linear between its knots.

    Args:
        feature_PF: float64, at least one pair.
        is_one_P: bool, whether the LLM's label is 1.
        method: platt or isotonic.

    Raises:
        ConfigError: another method.
    """
    if method not in ("platt", "isotonic"):
        raise ConfigError(f"calibrator is '{method}', but must be platt or isotonic")
    mean_F, scale_F = feature_PF.mean(axis=0), feature_PF.std(axis=0)
    scale_F = np.where(scale_F > 1e-12, scale_F, 1.0)
    num_ones, num_pairs = int(is_one_P.sum()), len(is_one_P)
    target_P = np.where(is_one_P, (num_ones + 1) / (num_ones + 2), 1 / (num_pairs - num_ones + 2))
    # A soft target is the pair twice, once in each class, weighted by the target.
    standard_PF = (feature_PF - mean_F) / scale_F
    model = LogisticRegression(C=np.inf, max_iter=1000, tol=1e-8).fit(
        np.concatenate([standard_PF, standard_PF]),
        np.repeat([1, 0], num_pairs),
        sample_weight=np.concatenate([target_P, 1 - target_P]),
    )
    weight_F = model.coef_[0] / scale_F
    platt = Calibrator(weight_F=weight_F, bias=float(model.intercept_[0] - mean_F @ weight_F))
    if method == "platt":
        return platt
    rising = IsotonicRegression(y_min=0.0, y_max=1.0).fit(feature_PF @ platt.weight_F + platt.bias, is_one_P)
    return replace(platt, knots_K2=np.stack([rising.X_thresholds_, rising.y_thresholds_], axis=1))


def cross_fitted(query_ids: Sequence[str], feature_PF: np.ndarray, is_one_P: np.ndarray, *, method: str) -> np.ndarray:
    """Each pair's probability by a fit on the questions of the other folds: float64 [P].

    Raises:
        DataError: of fewer than two questions.
    """
    questions = sorted(set(query_ids), key=lambda name: (unit_hash("calibration fold", name), name))
    if len(questions) < FEWEST_QUESTIONS:
        raise DataError(
            f"{len(questions)} calibration questions have labels of the LLM, and probabilities cannot be told on the "
            "questions they were fitted on. Label more questions, or raise calibration_fraction."
        )
    fold_of = {name: place % FOLDS for place, name in enumerate(questions)}
    fold_P = np.asarray([fold_of[name] for name in query_ids])
    probability_P = np.zeros(len(fold_P))
    for fold in range(min(FOLDS, len(questions))):
        own_P = fold_P == fold
        calibrator = fit(feature_PF[~own_P], is_one_P[~own_P], method=method)
        probability_P[own_P] = calibrator.probability(feature_PF[own_P])
    return probability_P


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """How far probabilities can be taken at their word.

    table: for each of the bins that hold pairs low, high, num_pairs, mean_probability, share_of_ones (a plot's points).
    ece: expected calibration error, the mean distance of the two over pairs. brier: mean squared error.
    """

    table: pa.Table
    ece: float
    brier: float


def reliability(probability_P: np.ndarray, is_one_P: np.ndarray, *, bins: int = 10) -> Reliability:
    """Reliability in bins of equal width, each without its lower end but the first."""
    edges = np.linspace(0.0, 1.0, bins + 1)
    bin_P = np.clip(np.searchsorted(edges, probability_P, side="left") - 1, 0, bins - 1)
    num = np.bincount(bin_P, minlength=bins)
    held = np.flatnonzero(num)
    mean = np.bincount(bin_P, probability_P, bins)[held] / num[held]
    share = np.bincount(bin_P, is_one_P, bins)[held] / num[held]
    columns = {"low": edges[held], "high": edges[held + 1], "num_pairs": num[held]}
    return Reliability(
        table=pa.table(columns | {"mean_probability": mean, "share_of_ones": share}),
        ece=float((num[held] * np.abs(mean - share)).sum() / len(bin_P)),
        brier=float(((probability_P - is_one_P) ** 2).mean()),
    )


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """From hi on a pair is labelled 1, up to lo 0.

    num_hi, num_lo: calibration pairs beyond them. notes: why a fallback stands in for a chosen value. tightening: by
    how much audits have moved both since they were chosen.
    """

    hi: float
    lo: float
    num_hi: int = 0
    num_lo: int = 0
    notes: tuple[str, ...] = ()
    tightening: float = 0.0

    def tightened(self, by: float) -> "Thresholds":
        """Both moved outwards; beyond 1 and 0 nothing is accepted any more."""
        return replace(self, hi=self.hi + by, lo=self.lo - by, tightening=self.tightening + by)


def choose_thresholds(probability_P: np.ndarray, label_P: np.ndarray, settings: AdaptiveConfig) -> Thresholds:
    """The loosest thresholds that reach the precision on the calibration set.

    hi is the least probability for which enough of the pairs from there on have label 1, lo the greatest for which
    enough of those up to there have label 0: a partly helpful pair (0.5) is right for neither. No threshold goes beyond
    0.5, so that no pair gets the less likely label. A precision can be told from 1 / (1 - precision) pairs on (20 at
    0.95), where one may be wrong; where no value has that many beyond it, or none is precise enough, the fallback
    stands and `notes` say why.

    Up to lo, fallback or not, there are no more than most_missed of the pairs labelled above 0, which methods.md C.4
    does not ask (docs/decisions.md).

    Args:
        probability_P: cross-fitted.
        label_P: of the LLM: 0, 0.5 or 1.
        settings: least_precision in [0, 1), most_missed, fallback_hi, fallback_lo.
    """
    fewest = math.ceil(round(1 / (1 - settings.least_precision), 9))
    hi, num_hi, hi_note = _loosest(probability_P, 0.5, label_P == 1, fewest, settings.least_precision)
    helping_P = np.sort(probability_P[label_P > 0])
    num_missed = math.floor(round(settings.most_missed * len(helping_P), 9))
    # lo stays below the first that would be one too many.
    highest_lo = np.nextafter(helping_P[num_missed], -1) if num_missed < len(helping_P) else 1.0
    # Falling probabilities are rising negative ones: 1 - p would round.
    least = max(-0.5, -highest_lo)
    lo, num_lo, lo_note = _loosest(-probability_P, least, label_P == 0, fewest, settings.least_precision)
    notes = [f"{side}: {note}" for side, note in (("hi", hi_note), ("lo", lo_note)) if note]
    if hi is None:
        hi, num_hi = settings.fallback_hi, int((probability_P >= settings.fallback_hi).sum())
    if lo is None:
        lo = min(settings.fallback_lo, float(highest_lo))
        num_lo = int((probability_P <= lo).sum())
    else:
        lo = -lo
    return Thresholds(hi=hi, lo=lo, num_hi=num_hi, num_lo=num_lo, notes=tuple(notes))


def _loosest(
    certainty_P: np.ndarray, least: float, is_right_P: np.ndarray, fewest: int, precision: float
) -> tuple[float | None, int, str]:
    """The lowest certainty >= least from which on pairs are precise, how many they are, and else why there is none."""
    order = np.argsort(-certainty_P, kind="stable")
    order = order[certainty_P[order] >= least]
    if len(order) < fewest:
        return (
            None,
            0,
            f"{len(order)} calibration pairs are on this side, and a precision of {precision} needs {fewest}",
        )
    falling, num_right, num = certainty_P[order], np.cumsum(is_right_P[order]), np.arange(1, len(order) + 1)
    is_last_of_tie = np.append(falling[1:] < falling[:-1], True)
    found = np.flatnonzero(is_last_of_tie & (num >= fewest) & (num_right / num >= precision))
    if not len(found):
        right = f"{num_right[-1]} of {len(order)} calibration pairs on this side are right"
        return None, 0, f"no value reaches a precision of {precision} on {fewest} pairs or more ({right})"
    return float(falling[found[-1]]), int(num[found[-1]]), ""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What a round learned from its calibration pairs; the calibrator is fitted on all of them."""

    calibrator: Calibrator
    reliability: Reliability
    thresholds: Thresholds
    num_pairs: int
    num_questions: int

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        made = self.thresholds
        return {
            "calibrator": self.calibrator.record(),
            "reliability": self.reliability.table.to_pylist(),
            "ece": self.reliability.ece,
            "brier": self.reliability.brier,
            "thresholds": {"hi": made.hi, "lo": made.lo, "num_hi": made.num_hi, "num_lo": made.num_lo},
            "notes": list(made.notes),
            "num_pairs": self.num_pairs,
            "num_questions": self.num_questions,
        }


def calibrate(pairs: pa.Table, labels: pa.Table, settings: AdaptiveConfig) -> Calibration:
    """Fits and judges the probabilities of a round on the LLM's labels of the calibration questions.

    Args:
        pairs: all candidates of each query, labelled or not, as the round's retriever scores them; columns query_id,
            doc_id, cosine.
        labels: columns query_id, doc_id, label (null: the LLM gave none), source.
        settings: of the rounds.

    Raises:
        DataError: a calibration question has a pseudo-label, or fewer than two have labels.
    """
    known = of_calibration(labels, settings.calibration_fraction)
    pseudo = known.filter(pl.col("source") == RETRIEVER)
    if len(pseudo):
        raise DataError(
            f"the calibration question {pseudo['query_id'][0]} has a pseudo-label: the retriever would judge itself. "
            "Leave calibration_fraction as it was when the labels were made."
        )
    feature_PF = pair_features(pairs)
    rows = frame_of(pairs, PAIR).with_row_index("row").join(known, on=PAIR, how="inner", maintain_order="left")
    query_ids, label_P = rows["query_id"].to_list(), rows["label"].to_numpy()
    feature_PF, is_one_P = feature_PF[rows["row"].to_numpy()], label_P == 1
    probability_P = cross_fitted(query_ids, feature_PF, is_one_P, method=settings.calibrator)
    return Calibration(
        calibrator=fit(feature_PF, is_one_P, method=settings.calibrator),
        reliability=reliability(probability_P, is_one_P),
        thresholds=choose_thresholds(probability_P, label_P, settings),
        num_pairs=len(rows),
        num_questions=len(set(query_ids)),
    )


def with_probability(pairs: pa.Table, calibrator: Calibrator) -> pa.Table:
    """The pairs that `calibrate` was given, with the column probability (float64)."""
    return pairs.append_column("probability", pa.array(calibrator.probability(pair_features(pairs))))


def of_calibration(labels: pa.Table, fraction: float) -> pl.DataFrame:
    """The labels of calibration questions, without those that the LLM did not give."""
    known = frame_of(labels, [*PAIR, "label", "source"]).filter(pl.col("label").is_not_null())
    kept = [name for name in known["query_id"].unique().to_list() if is_calibration(name, fraction)]
    return known.filter(pl.col("query_id").is_in(kept))
