"""Pairs about which the LLM is not asked, because a rule says already that the candidate is worse (methods.md B.4).

LLM-R scores an example of another task, and in a classification one with another label, -100: such a candidate ranks
below all that the LLM scored. Here it has no score at all, and the rule as the reason, so that no mean, softmax or
margin takes a number that nobody measured, and the LLM is not paid for it. AAR asks about the best that were retrieved,
and takes negatives from further down (D.2, D.5).
"""

from collections.abc import Mapping
from typing import Any

from llmr_ray.config import TaskScore
from llmr_ray.data.example_labels import has_other_label, is_own_example

OTHER_TASK = "other_task"
OTHER_LABEL = "other_label"
FURTHER = "further"

RULES = frozenset({OTHER_TASK, OTHER_LABEL, FURTHER})
"""Reasons for a pair without a score that are no failures."""


def rule_of(
    settings: TaskScore,
    query: Mapping[str, Any],
    document: Mapping[str, Any],
    *,
    place: int = 0,
    is_classification: bool = False,
) -> str | None:
    """The rule by which a candidate ranks below all scored ones; None where the LLM is to be asked.

    The rules do not add up: a label is compared only within a task (methods.md I.18).

    Args:
        settings: of the query's task.
        query: a row of `queries`.
        document: a row of `corpus`.
        place: of the candidate among those of the query, from 0.
        is_classification: whether the query's answer is a label (example_labels.classifications).
    """
    if settings.num_first and place >= settings.num_first:
        return FURTHER
    if not (settings.same_task or settings.same_label):
        return None
    if not is_own_example(document, query):
        return OTHER_TASK if settings.same_task else None
    if settings.same_label and is_classification and has_other_label(document, query):
        return OTHER_LABEL
    return None
