"""Settings of labelling that cannot be are refused when a configuration is read, before anything is paid."""

import pytest

from llmr_ray import loading
from llmr_ray.errors import ConfigError


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("labeling.calibration_share=1.5", "labeling.calibration_share is 1.5, but is a share"),
        ("labeling.gold_missed=3", "is a share"),
        ("labeling.gold_false_alarms=1.1", "is a share"),
        ("labeling.audit_share=5", "is a share"),
        ("labeling.audit_agreement=90", "is a share"),
        ("labeling.audit_step=2", "is a share"),
        ("labeling.min_agreement=60", "is a share"),
        ("labeling.least_precision=1", "below 1: no number of calibration pairs"),
        ("labeling.calibration_fraction=1", "below 1: the calibration questions are not trained on"),
        ("labeling.fallback_hi=0.05", "fallback_hi between 0.5 and 1"),
        ("labeling.fallback_hi=1.5", "fallback_hi between 0.5 and 1"),
        ("labeling.fallback_lo=0.6", "fallback_lo is 0.5 at the most"),
        ("labeling.trained_rounds=0", "one round at the least"),
    ],
)
def test_numbers_out_of_their_range_are_refused(override, message):
    """A share of 20 asked about 20 times the pairs that the calls allow; a precision of 1 ended the second round."""
    with pytest.raises(ConfigError, match=message):
        loading.load("conf/arl2.yaml", [override])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tasks.qa.score.check_evidence=false"], "once it was found in the passage"),
        (["labeling.enabled=false", "tasks.qa.score.feedback=likelihood"], "once it was found in the passage"),
        (["labeling.annotator=gold"], "the annotator gold has the last word"),
        (["labeling.enabled=false", "reward_model.model=minilm-l6"], "a reward model has the last word"),
        (["tasks.qa.group.evidence_weight=-1"], "may not be negative"),
    ],
)
def test_quotes_that_nobody_gave_or_looked_up_train_nothing(overrides, message):
    """A weight without quotes would change nothing, and an unchecked quote is whatever a small LLM repeats."""
    with pytest.raises(ConfigError, match=message):
        loading.load("conf/arl2.yaml", ["tasks.qa.group.evidence_weight=0.5", *overrides])


def test_the_ends_of_the_ranges_are_settings():
    """Audits can be left out, and every pseudo-label audited."""
    for override in ("labeling.audit_share=0", "labeling.audit_share=1", "labeling.fallback_hi=1"):
        loading.load("conf/arl2.yaml", [override])
