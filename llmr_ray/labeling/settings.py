"""Settings of ARL2: generated questions and adaptive self-training (methods.md C.1, C.4).

Plain values: importing them imports nothing else.
"""

from dataclasses import dataclass

from llmr_ray.later import later


@dataclass(frozen=True, kw_only=True)
class TaskQuestions:
    """Training questions that the LLM writes about passages of one task (methods.md C.1.1 to C.1.3)."""

    num_documents: int = 0
    """Documents of each data set of the task about which questions are written, the lowest by a hash of seed and id.
    0: no questions are written. Of pools that belong to one dialogue or text none is taken."""
    per_document: int = 2
    """Questions that are asked for about each."""
    temperature: float = 0.7
    """At which they are written; each document has a seed of its own."""
    demonstrations: str = "clustered"
    """clustered (training questions near to the document, each of another cluster of question patterns), or drawn."""
    num_demonstrations: int = 5
    """Training questions with their passage that the LLM is shown at the most."""
    num_nearest: int = 50
    """clustered: they are chosen from so many questions nearest to the document."""
    num_clusters: int = 10
    """clustered: of question patterns, or as many to begin with where the two limits below are set."""
    split_above: float = later(0.0)
    """clustered: a cluster whose mean squared distance to its mean is larger is split (ISODATA). 0: none is."""
    merge_below: float = later(0.0)
    """clustered: clusters whose means are nearer are merged (ISODATA). 0: none are."""
    demonstration_tokens: int = 96
    """The passage of a demonstration is cut to so many LLM tokens; the one asked about to llm.max_candidate_tokens."""


@dataclass(frozen=True, kw_only=True)
class AdaptiveConfig:
    """How a round of labelling spends its calls, and what it lets the retriever label. A call is one pair."""

    enabled: bool = False
    """Tasks with the feedback `label` learn from labels that are made in rounds; else from labels of all candidates."""
    annotator: str = "llm"
    """llm, or gold: labels of the data, spoiled at the rates below, to test with an annotator of known quality."""
    gold_missed: float = 0.0
    """gold: share of the relevant pairs, wholly or partly, that it labels 0."""
    gold_false_alarms: float = 0.0
    """gold: share of the other pairs that it labels 1."""
    policy: str = "adaptive"
    """adaptive, or to compare with: uncertainty (the same order of calls, no pseudo-labels), random (drawn pairs)."""
    calls_per_round: int = 1000
    """Pairs about which the LLM is asked in a round at the most, audits and calibration included."""
    total_calls: int = 0
    """Pairs about which it is asked in all rounds. 0: no limit."""
    calibration_fraction: float = 0.1
    """Share of the questions, by a hash of the id, whose pairs only the LLM labels and nothing trains on."""
    calibration_share: float = 0.1
    """Share of a round's calls, audits aside, for pairs of those questions, whatever their probability."""
    calibrator: str = "platt"
    """platt (logistic regression), or isotonic, which fits any rising curve but needs about 1,000 pairs."""
    least_precision: float = 0.95
    """What a threshold's precision on the calibration set must reach."""
    most_missed: float = 0.05
    """Share of the calibration pairs labelled above 0 that the threshold of label 0 may have below it. Where one pair
    in ten is relevant, 0 for every pair has a precision of 0.9, and misses all that there is to find."""
    fallback_hi: float = 0.9
    """Probability from which a pair is labelled 1 where the calibration set allows no choice."""
    fallback_lo: float = 0.1
    """Probability up to which a pair is labelled 0 where the calibration set allows no choice."""
    max_positives: int = 3
    """A question with so many labels 1 gets no further one from the retriever."""
    max_pseudo_ratio: float = 3.0
    """Pseudo-labels over labels of the LLM that train."""
    trained_margin: float = 0.05
    """Cosine by which all known positives of a well trained question lead all known negatives."""
    trained_rounds: int = 2
    """In so many rounds running."""
    audit_share: float = 0.05
    """Share of a round's pseudo-labels that the LLM labels too."""
    audit_agreement: float = 0.9
    """Below this agreement the thresholds tighten."""
    audit_step: float = 0.02
    """By so much."""
    audit_steps: int = 1
    """So often in a round at the most, each time for the audited pairs that are still beyond the thresholds."""
    min_gain: float = 0.005
    """From the round on whose retriever gains less than that of the round before, relatively, in nDCG@10 on the
    calibration questions, the LLM is asked nothing more: later rounds train on the labels there are. Negative: whatever
    it gains."""
    min_agreement: float = later(0.6)
    """Where several LLMs label: share of them that must give the same label. Two of three do, one of two does not."""
    num_canaries: int = later(20)
    """Passages of each task that try to talk the LLM into a high score; the report says how often they do. 0: none."""

    @property
    def asks_llm(self) -> bool:
        """Whether feedback comes from an LLM, not from an annotator in its place."""
        return not self.enabled or self.annotator == "llm"
