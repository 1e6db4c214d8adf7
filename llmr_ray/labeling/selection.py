"""What becomes of each pair in a round of adaptive self-training: labelled by the retriever, by the LLM, or neither.

A round is `decide`, the LLM's answers to what is asked, and `settle`, which looks at the audit and makes the new labels
(methods.md C.4). Every pair of the round stands in the table `decisions` exactly once, with the reason. All draws are
functions of (seed, round, pair), so neither the order of rows nor other pairs' fate moves them.

A pseudo-label holds for its round: the next one decides anew, by a retriever that has learned more, about all that the
LLM has not labelled, so that a round of wrong ones can be got over.

Legend: P pairs.
"""

import math
from collections import Counter
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import numpy as np
import polars as pl
import pyarrow as pa

from llmr_ray.artifacts import Counts
from llmr_ray.data.splits import unit_hash
from llmr_ray.errors import ConfigError, DataError
from llmr_ray.frames import PAIR, frame_of
from llmr_ray.labeling.calibration import RETRIEVER, Thresholds, is_calibration
from llmr_ray.labeling.settings import AdaptiveConfig
from llmr_ray.schemas import conform

POSITIVE, NEGATIVE, ASK, LEAVE, LABELLED = "positive", "negative", "ask", "leave", "labelled"
"""Decisions: pseudo-label 1, pseudo-label 0, the LLM is asked, the pair stays unlabelled, it has a label."""

CONFIDENT = "confident"
UNCERTAIN, DRAWN, CALIBRATION = "uncertain", "drawn", "calibration"
AUDIT = {POSITIVE: "audit_positive", NEGATIVE: "audit_negative"}
"""Why the LLM is asked about a pair that the retriever would have labelled so."""
BUDGET, WELL_TRAINED, POSITIVES_CAP = "budget", "well_trained", "positives_cap"
AUDIT_FAILED, NO_ANSWER, STOPPED = "audit_failed", "no_answer", "stopped"

POLICIES = ("adaptive", "uncertainty", "random")


def decide(
    pairs: pa.Table,
    labels: pa.Table,
    thresholds: Thresholds,
    settings: AdaptiveConfig,
    *,
    number: int,
    calls: int,
    seed: int,
    well_trained: AbstractSet[str] = frozenset(),
) -> pa.Table:
    """One round's decision about every pair, before the LLM is asked: the table `decisions`.

    adaptive: pairs from hi on are pseudo-labelled 1, the likeliest first, while their question has fewer than
    max_positives labels 1; pairs up to lo are pseudo-labelled 0, the least likely first; both while all pseudo-labels
    are within max_pseudo_ratio and their audit within the calls, those of label 1 first because they are few. A draw of
    audit_share of either label goes to the LLM instead. All other pairs are asked about, the most uncertain first, but
    for questions that are well trained or have their labels 1: also those beyond the thresholds for which no
    pseudo-label is left. uncertainty: the same order of calls over all pairs, without pseudo-labels. random: a draw.

    Under each policy calibration_share of the calls, audits aside, is for calibration questions, whose pairs are taken
    question by question: pairs chosen for what the retriever thinks of them could not judge it. Nothing else is decided
    about them.

    Args:
        pairs: all candidates of the round; columns query_id, doc_id, probability (of label 1).
        labels: all labels so far, also of pairs that are no candidates now; columns query_id, doc_id, label (null: the
            LLM was asked and gave none, and is not asked again), source. At most one row a pair; the retriever's no
            longer hold.
        thresholds: of the round, tightened by what earlier audits said.
        settings: of the rounds.
        number: of the round.
        calls: pairs that may be asked about (`rounds.calls_of_round`).
        seed: of the run.
        well_trained: questions that need no calls (`rounds.well_trained_questions`).

    Returns:
        query_id, doc_id, decision, reason, probability, round; one row a pair, in the order of `pairs`.

    Raises:
        ConfigError: an unknown policy.
        DataError: a pair stands twice, or a probability is missing.
    """
    if settings.policy not in POLICIES:
        raise ConfigError(f"policy is '{settings.policy}', but must be one of {', '.join(POLICIES)}")
    state = _Round(pairs, labels, settings, number=number, seed=seed)
    undecided = state.undecided
    if settings.policy == "adaptive":
        accepted = state.pseudo_label(thresholds, _accepted_at_most(labels, settings, calls))
        calls -= state.audit(accepted)
        undecided = undecided[state.decision[undecided] == ""]
        is_done = np.asarray([state.query_ids[row] in well_trained for row in undecided], bool)
        state.put(undecided[is_done], LEAVE, WELL_TRAINED)
        undecided = undecided[~is_done]
    kept = state.by_question(state.kept)
    of_kept = min(round(settings.calibration_share * calls), len(kept))
    state.ask(kept, of_kept, CALIBRATION)
    is_random = settings.policy == "random"
    order = state.by(np.zeros(len(state.draw_P)) if is_random else np.abs(state.probability_P - 0.5), undecided)
    state.ask(order, calls - of_kept, DRAWN if is_random else UNCERTAIN)
    return state.table()


def unchanged(pairs: pa.Table, labels: pa.Table, *, number: int) -> pa.Table:
    """The table `decisions` of a round that decides nothing: what has a label keeps it, also that of the retriever.

    Args:
        pairs: of the round; columns query_id, doc_id.
        labels: as for `decide`.
        number: of the round.
    """
    known = frame_of(labels, [*PAIR, "label", "source"])
    was_asked, has_label = pl.col("source").is_not_null(), pl.col("label").is_not_null()
    why_left = pl.when(was_asked).then(pl.lit(NO_ANSWER)).otherwise(pl.lit(STOPPED))
    rows = (
        frame_of(pairs, PAIR)
        .join(known, on=PAIR, how="left", maintain_order="left")
        .select(
            *PAIR,
            decision=pl.when(has_label).then(pl.lit(LABELLED)).otherwise(pl.lit(LEAVE)),
            reason=pl.when(has_label).then("source").otherwise(why_left),
            probability=pl.lit(0.5),
            round=pl.lit(number, pl.Int32),
        )
    )
    return conform(rows.to_arrow(), "decisions")


class _Round:
    """The pairs of a round as arrays, and what is decided about each; an empty decision is still to be made."""

    def __init__(self, pairs: pa.Table, labels: pa.Table, settings: AdaptiveConfig, *, number: int, seed: int) -> None:
        self.settings, self.number = settings, number
        known = frame_of(labels, [*PAIR, "label", "source"]).filter(pl.col("source") != RETRIEVER)
        if known.select(PAIR).is_duplicated().any():
            raise DataError("labels name a pair twice, and it is not known which one holds. Keep one label of each.")
        frame = frame_of(pairs, [*PAIR, "probability"]).join(known, on=PAIR, how="left", maintain_order="left")
        if not frame["probability"].is_between(0, 1).fill_null(False).all():
            raise DataError("a pair has no probability in [0, 1]. Make the table with calibration.with_probability.")
        self.query_ids, self.doc_ids = frame["query_id"].to_list(), frame["doc_id"].to_list()
        self.probability_P = frame["probability"].to_numpy()
        self.decision, self.reason = np.full(len(frame), "", object), np.full(len(frame), "", object)
        self.draw_P, self._audit_P = self._draws("order", seed), self._draws("audit", seed)
        has_label, was_asked = frame["label"].is_not_null().to_numpy(), frame["source"].is_not_null().to_numpy()
        self.put(np.flatnonzero(has_label), LABELLED, frame["source"].filter(has_label).to_list())
        self.put(np.flatnonzero(was_asked & ~has_label), LEAVE, NO_ANSWER)
        is_kept = {name: is_calibration(name, settings.calibration_fraction) for name in set(self.query_ids)}
        kept_P = np.asarray([is_kept[name] for name in self.query_ids], bool)
        self.kept = np.flatnonzero(kept_P & ~was_asked)
        self.undecided = np.flatnonzero(~kept_P & ~was_asked)
        is_one = known.filter(pl.col("label") == 1)["query_id"].to_list()
        self.positives = Counter[str](is_one)

    def put(self, rows: np.ndarray, decision: str, reason: str | Sequence[str]) -> None:
        self.decision[rows], self.reason[rows] = decision, reason

    def ask(self, rows: np.ndarray, calls: int, reason: str) -> None:
        """Asks about the first rows; the calls do not reach the others."""
        self.put(rows[:calls], ASK, reason)
        self.put(rows[calls:], LEAVE, BUDGET)

    def by(self, value_P: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Rows by rising value, equal ones by draw."""
        return rows[np.lexsort((self.draw_P[rows], value_P[rows]))]

    def by_question(self, rows: np.ndarray) -> np.ndarray:
        """Rows question by question, in an order that does not change from round to round."""
        return np.asarray(
            sorted(
                rows,
                key=lambda row: (unit_hash("question", self.query_ids[row]), self.query_ids[row], self.draw_P[row]),
            ),
            np.int64,
        )

    def pseudo_label(self, thresholds: Thresholds, at_most: int) -> np.ndarray:
        """Labels pairs beyond the thresholds; returns their rows. Those that are too many stay undecided."""
        p, rows = self.probability_P, self.undecided
        positive = self.by(-p, rows[p[rows] >= thresholds.hi])
        negative = self.by(p, rows[(p[rows] <= thresholds.lo) & (p[rows] < thresholds.hi)])
        is_within = np.zeros(len(positive), bool)
        for place, row in enumerate(positive):
            question = self.query_ids[row]
            is_within[place] = self.positives[question] < self.settings.max_positives
            self.positives[question] += int(is_within[place])
        self.put(positive[~is_within], LEAVE, POSITIVES_CAP)
        positive = positive[is_within][:at_most]
        negative = negative[: at_most - len(positive)]
        self.put(positive, POSITIVE, CONFIDENT)
        self.put(negative, NEGATIVE, CONFIDENT)
        return np.concatenate([positive, negative])

    def audit(self, accepted: np.ndarray) -> int:
        """Draws the pseudo-labels that the LLM gives instead, of each label its share; returns their number."""
        number = 0
        for decision, reason in AUDIT.items():
            rows = accepted[self.decision[accepted] == decision]
            rows = rows[np.argsort(self._audit_P[rows], kind="stable")]
            # Rounded first: 0.05 * 140 is a little more than 7.
            drawn = rows[: math.ceil(round(self.settings.audit_share * len(rows), 9))]
            self.put(drawn, ASK, reason)
            number += len(drawn)
        return number

    def table(self) -> pa.Table:
        """The table `decisions`."""
        columns = {"query_id": self.query_ids, "doc_id": self.doc_ids}
        columns |= {"decision": self.decision.tolist(), "reason": self.reason.tolist()}
        rounds = np.full(len(self.query_ids), self.number, np.int32)
        return conform(pa.table(columns | {"probability": self.probability_P, "round": rounds}), "decisions")

    def _draws(self, purpose: str, seed: int) -> np.ndarray:
        drawn = (purpose, str(seed), str(self.number))
        pairs = zip(self.query_ids, self.doc_ids, strict=True)
        return np.fromiter((unit_hash(*drawn, *pair) for pair in pairs), np.float64, len(self.query_ids))


def _accepted_at_most(labels: pa.Table, settings: AdaptiveConfig, calls: int) -> int:
    """How many pseudo-labels a round may accept: by their ratio, and by the calls for their audit."""
    known = frame_of(labels, ["query_id", "label", "source"])
    known = known.filter(pl.col("label").is_not_null() & (pl.col("source") != RETRIEVER))
    kept = [is_calibration(name, settings.calibration_fraction) for name in known["query_id"].to_list()]
    by_ratio = math.floor(settings.max_pseudo_ratio * kept.count(False))
    # The shares of both labels are rounded up, which is one call more than that of all at the most.
    by_calls = math.floor(round((calls - 1) / settings.audit_share, 9)) if settings.audit_share else by_ratio
    return max(0, min(by_ratio, by_calls))


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What the LLM said about a draw of a round's pseudo-labels.

    agreement: of the answered ones of the label where it is lower; None where there are none. steps: how often the
    thresholds tightened. discarded: the round's pseudo-labels that were taken back, all of a label of whose draw none
    was answered among them.
    """

    num_drawn: int
    num_answered: int
    agreement: float | None
    steps: int
    discarded: int


@dataclass(frozen=True, kw_only=True)
class Settled:
    """A round after the LLM's answers: its decisions, rows for the table `labels`, and the thresholds as tightened."""

    decisions: pa.Table
    new_labels: pa.Table
    thresholds: Thresholds
    audit: Audit


def settle(
    decisions: pa.Table,
    answers: pa.Table,
    thresholds: Thresholds,
    settings: AdaptiveConfig,
    *,
    annotator: str = "llm",
) -> Settled:
    """The round's outcome: what the audit takes back, and the new labels.

    If the LLM agrees with less than audit_agreement of the audited pairs of either label, both thresholds move outwards
    by audit_step, and the round's pseudo-labels that are no longer beyond them are left (reason audit_failed); up to
    audit_steps times, while the audited pairs still beyond them disagree. Each label is judged by itself, because the
    few pairs labelled 1 would be lost among the many labelled 0. A label 0.5 agrees with neither. Of a label about none
    of whose audited pairs the LLM said anything, all of the round's pseudo-labels are left: nothing speaks for them.

    A pair that was asked about in vain is left (no_answer) and stands in the new labels without a label.

    Args:
        decisions: of `decide`.
        answers: of the LLM; columns query_id, doc_id, label (0, 0.5 or 1), evidence (null: none was quoted), and no
            other pairs than were asked about.
        thresholds: that `decide` was given.
        settings: of the rounds.
        annotator: the source of the answers.

    Raises:
        DataError: an answer to what was not asked.
    """
    frame = frame_of(decisions, decisions.column_names)
    said = frame_of(answers, [*PAIR, "label", "evidence"]).filter(pl.col("label").is_not_null())
    strays = said.join(frame.filter(pl.col("decision") == ASK), on=PAIR, how="anti")
    if len(strays):
        raise DataError(f"the LLM labelled {strays.select(PAIR).row(0)}, which this round did not ask about.")
    was_asked = pl.col("decision") == ASK
    frame = frame.join(said, on=PAIR, how="left", maintain_order="left").with_columns(was_asked=was_asked)
    as_positive = pl.col("reason") == AUDIT[POSITIVE]
    audited = frame.filter(pl.col("reason").is_in(list(AUDIT.values()))).with_columns(
        agrees=pl.col("label") == as_positive.cast(pl.Float64),
        as_if=pl.when(as_positive).then(pl.lit(POSITIVE)).otherwise(pl.lit(NEGATIVE)),
    )
    answered = audited.filter(pl.col("label").is_not_null())
    unheard = set(audited["as_if"]) - set(answered["as_if"])
    steps, tightened = 0, thresholds
    while steps < settings.audit_steps:
        agreement = _agreement(answered.filter(_is_beyond(tightened, "as_if")))
        if agreement is None or agreement >= settings.audit_agreement:
            break
        tightened, steps = tightened.tightened(settings.audit_step), steps + 1
    is_unheard = pl.col("decision").is_in(pl.Series(sorted(unheard), dtype=pl.String))
    is_pseudo = pl.col("decision").is_in([POSITIVE, NEGATIVE])
    taken_back = is_pseudo & (is_unheard | ~_is_beyond(tightened, "decision"))
    in_vain = was_asked & pl.col("label").is_null()
    discarded = frame.select(taken_back.sum()).item()
    why = pl.when(taken_back).then(pl.lit(AUDIT_FAILED)).when(in_vain).then(pl.lit(NO_ANSWER)).otherwise("reason")
    what = pl.when(taken_back | in_vain).then(pl.lit(LEAVE)).otherwise("decision")
    frame = frame.with_columns(decision=what, reason=why)
    return Settled(
        decisions=conform(frame.drop("label", "evidence", "was_asked").to_arrow(), "decisions"),
        new_labels=_new_labels(frame, annotator),
        thresholds=tightened,
        audit=Audit(
            num_drawn=len(audited),
            num_answered=len(answered),
            agreement=_agreement(answered),
            steps=steps,
            discarded=discarded,
        ),
    )


def _agreement(answered: pl.DataFrame) -> float | None:
    """The share of agreement of the label where it is lower; None without any pair."""
    shares = answered.group_by("as_if").agg(pl.col("agrees").mean())["agrees"].to_list()
    return min(shares, default=None)


def _is_beyond(thresholds: Thresholds, column: str) -> pl.Expr:
    """Whether a pair that is labelled as the column says is beyond that label's threshold."""
    p = pl.col("probability")
    return pl.when(pl.col(column) == POSITIVE).then(p >= thresholds.hi).otherwise(p <= thresholds.lo)


def _new_labels(settled: pl.DataFrame, annotator: str) -> pa.Table:
    """Rows of the table `labels` of a round: the annotator's answers, its refusals, and the pseudo-labels."""
    is_pseudo, p = pl.col("decision").is_in([POSITIVE, NEGATIVE]), pl.col("probability")
    is_one = pl.col("decision") == POSITIVE
    rows = settled.filter(is_pseudo | pl.col("was_asked")).select(
        *PAIR,
        label=pl.when(is_pseudo).then(is_one.cast(pl.Float32)).otherwise(pl.col("label").cast(pl.Float32)),
        source=pl.when(is_pseudo).then(pl.lit(RETRIEVER)).otherwise(pl.lit(annotator)),
        round="round",
        confidence=pl.when(is_pseudo).then(pl.when(is_one).then(p).otherwise(1 - p)),
        evidence="evidence",
    )
    return conform(rows.to_arrow(), "labels")


def accounting(decisions: pa.Table) -> Counts:
    """The pairs of a round: ok with a label or a question to the LLM, cached with an earlier label, else the reason."""
    frame = frame_of(decisions, ["decision", "reason"])
    left = frame.filter(pl.col("decision") == LEAVE)["reason"].to_list()
    return Counts(
        rows_in=len(frame),
        ok=int(frame["decision"].is_in([POSITIVE, NEGATIVE, ASK]).sum()),
        cached=int((frame["decision"] == LABELLED).sum()),
        skipped=Counter(left),
    )
