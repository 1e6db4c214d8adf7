"""The learning rate against worked numbers and the shapes it promises."""

import json
import math

import pytest

from llmr_ray.training.schedule import SelfPaced, paced_factor, warmup_decay


def rates(num_steps=10, warmup_fraction=0.2, schedule="linear"):
    return [
        warmup_decay(step, num_steps=num_steps, warmup_fraction=warmup_fraction, schedule=schedule)
        for step in range(num_steps)
    ]


def test_warmup_then_linear_decay():
    """Prevents a wasted first step, a jump at the end of warm-up, and a last step that stands still."""
    assert rates() == pytest.approx([0.5, 1.0, 1.0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])
    assert rates(schedule="constant")[2:] == [1.0] * 8
    assert rates(warmup_fraction=0.0)[0] == 1.0
    assert warmup_decay(10, num_steps=10, warmup_fraction=0.2, schedule="linear") == 0.0
    assert min(rates(num_steps=1, warmup_fraction=1.0)) == 1.0


@pytest.mark.parametrize(("loss", "expected"), [(0.6, 4.3301e-6), (1.2, 6.1237e-6)])
def test_self_paced_worked_numbers(loss, expected):
    """Prevents a ratio upside down or without its root (methods.md A.6.2)."""
    assert 5e-6 * paced_factor(loss, 0.8) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("loss", "reference", "expected"),
    [
        (100, 1, 2.0),
        (1e-9, 1, 0.5),
        (1, 0, 1.0),
        (1, -1, 1.0),
        (math.nan, 1, 1.0),
        (1, math.inf, 1.0),
        (1e-6, 1e-7, 1.0),
    ],
)
def test_self_paced_limits(loss, reference, expected):
    """Prevents a KL near zero, or a loss that means nothing, from throwing the learning rate away."""
    assert paced_factor(loss, reference) == expected


def test_tasks_are_paced_apart_and_references_refresh():
    """Prevents one task's loss from driving another's rate, and references that never move."""
    paced = SelfPaced(interval=4)
    assert paced.observe(0, "qa", 2.0) == 1.0
    assert paced.observe(1, "chat", 0.01) == 1.0
    assert paced.observe(2, "qa", 1.0) == pytest.approx(math.sqrt(1.9 / 2.0))
    assert paced.observe(3, "qa", 1.0) == pytest.approx(math.sqrt(1.81 / 2.0))
    assert paced.observe(4, "qa", 1.0) == pytest.approx(math.sqrt((0.9 * 1.81 + 0.1) / 1.81))
    assert paced.references["chat"] == 0.01


def test_state_survives_a_checkpoint():
    """Prevents a resumed run from starting its averages again."""
    one, two = SelfPaced(interval=3), SelfPaced(interval=3)
    for step in range(5):
        one.observe(step, "qa", 2.0 - step / 10)
    two.restore(json.loads(json.dumps(one.state())))
    assert [one.observe(step, "qa", 0.5) for step in range(5, 12)] == [two.observe(s, "qa", 0.5) for s in range(5, 12)]
