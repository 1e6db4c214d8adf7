"""What settings of labels, annotators and generated questions must be: loading.py checks them before anything runs."""

import re

from llmr_ray.config import LLM, Config, TaskQuestions, TaskScore
from llmr_ray.errors import ConfigError
from llmr_ray.labeling.settings import AdaptiveConfig

LABEL_TASKS = ("qa", "convsearch", "tool")
"""Tasks whose candidates an LLM can label (score.feedback: label)."""

QUESTION_TASKS = ("qa", "convsearch")
"""Tasks about whose documents an LLM can write questions (questions.num_documents)."""

_SHARES = (
    "gold_missed",
    "gold_false_alarms",
    "calibration_share",
    "audit_share",
    "audit_agreement",
    "audit_step",
    "min_agreement",
    "most_missed",
)
"""Settings of the rounds that are 1 at the most."""

_BELOW_ONE = {
    "calibration_fraction": "the calibration questions are not trained on, and some must be left that are",
    "least_precision": "no number of calibration pairs could tell a precision of 1",
}
"""Settings of the rounds that must be below 1, and why."""


def check_labels(task: str, score: TaskScore) -> None:
    """Raises ConfigError where a task's candidates cannot be labelled as its settings say."""
    if score.feedback == "label" and score.num_first:
        raise ConfigError(
            f"tasks.{task}.score.num_first leaves candidates without the LLM's word, but a label is no rank that they "
            f"could be below. Mine fewer (tasks.{task}.mine)."
        )
    if score.feedback == "label" and task not in LABEL_TASKS:
        raise ConfigError(
            f"tasks.{task}.score.feedback is label, but only candidates of {', '.join(LABEL_TASKS)} are passages that "
            "help with a question or do not. Take likelihood or rank."
        )
    if not (score.passages_per_call and score.label_votes and score.evidence_chars):
        raise ConfigError(
            f"tasks.{task}.score.passages_per_call, label_votes and evidence_chars must be at least 1 each."
        )


def check_questions(task: str, questions: TaskQuestions) -> None:
    """Raises ConfigError where no questions about a task's documents can be written as its settings say."""
    if questions.num_documents and task not in QUESTION_TASKS:
        raise ConfigError(
            f"tasks.{task}.questions.num_documents is set, but only documents of {', '.join(QUESTION_TASKS)} are "
            "passages that answer questions. Set it to 0."
        )
    if not (questions.per_document and questions.num_nearest and questions.num_clusters):
        raise ConfigError(
            f"tasks.{task}.questions.per_document, num_nearest and num_clusters must be at least 1. Without "
            "demonstrations: num_demonstrations: 0; without questions: num_documents: 0."
        )


def check_quotes(config: Config) -> None:
    """Raises ConfigError where quotes are to train that nobody gives, or that nobody looks up in the passage."""
    for name, task in config.tasks.items():
        if not task.group.evidence_weight:
            continue
        if not (task.score.feedback == "label" and task.score.check_evidence):
            raise ConfigError(
                f"tasks.{name}.group.evidence_weight trains on what an LLM quotes for its labels, once it was found in "
                f"the passage. Set tasks.{name}.score.feedback to label and score.check_evidence to true, or "
                "evidence_weight to 0."
            )
        if config.reward_model.model or not config.labeling.asks_llm:
            who = "a reward model" if config.reward_model.model else f"the annotator {config.labeling.annotator}"
            raise ConfigError(
                f"tasks.{name}.group.evidence_weight trains on what an LLM quotes for its labels, but {who} has the "
                "last word on them, and quotes nothing. Set evidence_weight to 0, or leave reward_model.model empty "
                "and labeling.annotator at llm."
            )


def check_labeling(config: Config) -> None:
    """Raises ConfigError where labels cannot be made in rounds, or by several LLMs, as the configuration says."""
    what = "labeling.enabled makes labels in rounds" if config.labeling.enabled else "annotators are LLMs that label"
    feedback = {config.tasks[dataset.task].score.feedback for dataset in config.datasets.values()} - {"none"}
    if config.datasets and feedback != {"label"}:
        raise ConfigError(
            f"{what}, but the feedback of the tasks is {sorted(feedback)}. Set "
            "tasks.*.score.feedback to label, or to none where a task trains on labels of the data."
        )
    if odd := [name for name in config.annotators if not re.fullmatch("[a-z0-9_]+", name) or name == LLM]:
        raise ConfigError(
            f"annotators have names of lower-case letters, digits and _ that become stages (score_NAME), and 'llm' is "
            f"the first of them. Rename {odd}."
        )
    if config.annotators and config.labeling.enabled and config.labeling.annotator != "llm":
        raise ConfigError(
            f"labeling.annotator is {config.labeling.annotator}, which labels in the place of all LLMs. Leave "
            "annotators empty, or labeling.annotator at llm."
        )
    if config.labeling.enabled and config.reward_model.model:
        raise ConfigError("labeling.enabled leaves no place for reward_model.model: the labels are the rewards.")
    _check_ranges(config.labeling)


def _check_ranges(labeling: AdaptiveConfig) -> None:
    """Found out later, in a round whose calls depend on it, such a number has cost the rounds before."""
    for name in _SHARES:
        if (value := getattr(labeling, name)) > 1:
            raise ConfigError(f"labeling.{name} is {value}, but is a share, 1 at the most.")
    for name, why in _BELOW_ONE.items():
        if (value := getattr(labeling, name)) >= 1:
            raise ConfigError(f"labeling.{name} is {value}, but must be below 1: {why}.")
    if not labeling.fallback_lo <= 0.5 <= labeling.fallback_hi <= 1:
        raise ConfigError(
            f"labeling.fallback_lo is {labeling.fallback_lo} and labeling.fallback_hi {labeling.fallback_hi}, but they "
            "are probabilities of label 1, of which no pair may get the less likely label: fallback_lo is 0.5 at the "
            "most, fallback_hi between 0.5 and 1."
        )
    if not labeling.trained_rounds:
        raise ConfigError("labeling.trained_rounds is 0, but a question is well trained after one round at the least.")
