"""The learning rate: warm-up, decay, and LLM-Embedder's self-paced factor per task."""

import math
from collections.abc import Mapping
from typing import Any

DECAY = 0.9
"""Of the moving average that stands for a task's current loss."""
FLOOR = 1e-4
"""Losses below count as this: a KL near zero would make the ratio of two losses mean nothing."""
FACTOR_RANGE = (0.5, 2.0)


def warmup_decay(step: int, *, num_steps: int, warmup_fraction: float, schedule: str) -> float:
    """The multiplier of the learning rate at a step counted from 0.

    Rises linearly to 1 over the first `warmup_fraction` of steps (the first step already moves: HF's starts at 0 and
    wastes one), then falls linearly, reaching 0 after the last step, or stays ("constant").
    """
    warmup = math.floor(num_steps * warmup_fraction)
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    return max(0.0, (num_steps - step) / (num_steps - warmup))


def paced_factor(loss: float, reference: float) -> float:
    """sqrt(L / L0), both floored, clamped to FACTOR_RANGE; 1 where L0 means nothing (methods.md A.6.2)."""
    if not (math.isfinite(loss) and math.isfinite(reference)) or reference <= 0:
        return 1.0
    return min(max(math.sqrt(max(loss, FLOOR) / max(reference, FLOOR)), FACTOR_RANGE[0]), FACTOR_RANGE[1])


class SelfPaced:
    """The state of self-paced scheduling: lr = schedule * sqrt(L / L0) per task (LLM-Embedder, ACL version only).

    The paper leaves open what "current loss" is: here a moving average per task. L0 is the task's first loss and then,
    every `interval` steps, its average. Fed with the loss over all workers, so that all ranks agree.
    """

    def __init__(self, interval: int) -> None:
        self.interval = interval
        self.averages: dict[str, float] = {}
        self.references: dict[str, float] = {}

    def observe(self, step: int, task: str, loss: float) -> float:
        """Takes in the loss of a step on `task` and returns the factor for that same step."""
        if step and self.interval and step % self.interval == 0:
            self.references = dict(self.averages)
        known = self.averages.get(task)
        self.averages[task] = loss if known is None else DECAY * known + (1 - DECAY) * loss
        self.references.setdefault(task, loss)
        return paced_factor(self.averages[task], self.references[task])

    def state(self) -> dict[str, Any]:
        """Plain JSON values for the checkpoint."""
        return {"averages": dict(self.averages), "references": dict(self.references)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`."""
        self.averages, self.references = dict(state["averages"]), dict(state["references"])
