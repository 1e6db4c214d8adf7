"""How steadily training went, from its step records: what a reward costs in noise and in steps."""

from typing import Any

import numpy as np
import pyarrow as pa

SETTLED = 0.1
"""A loss has converged when what is left of its whole change is no more than this share."""


def stability(steps: pa.Table) -> list[dict[str, Any]]:
    """How the loss of each task fell.

    Losses of different rewards have different scales, so the noise is also given as a share of the loss.

    Args:
        steps: rows with step, task and loss.

    Returns:
        By task: task, num_steps, first_loss and last_loss (means over the first and last tenth of its steps),
        loss_variance (around the running mean over a tenth of the steps, in the second half), relative_noise (its root
        over last_loss; None where that is 0), and convergence_step (the step of the run from which on the running mean
        stays within SETTLED of the whole change; None where the loss did not change).
    """
    by_task: dict[str, list[tuple[int, float]]] = {}
    for row in sorted(steps.select(["step", "task", "loss"]).to_pylist(), key=lambda row: int(row["step"])):
        by_task.setdefault(row["task"], []).append((row["step"], row["loss"]))
    return [{"task": task, **_of_task(points)} for task, points in sorted(by_task.items())]


def _of_task(points: list[tuple[int, float]]) -> dict[str, Any]:
    numbers, loss = [step for step, _ in points], np.asarray([loss for _, loss in points], np.float64)
    width = max(1, len(loss) // 10)
    smooth = running_mean(loss, width)
    first, last = float(loss[:width].mean()), float(smooth[-1])
    variance = float(np.mean((loss - smooth)[len(loss) // 2 :] ** 2))
    away = np.abs(smooth - last) > SETTLED * abs(first - last)
    settled = int(np.nonzero(away)[0][-1]) + 1 if away.any() else 0
    return {
        "num_steps": len(loss),
        "first_loss": first,
        "last_loss": last,
        "loss_variance": variance,
        "relative_noise": float(np.sqrt(variance) / abs(last)) if last else None,
        "convergence_step": numbers[settled] if first != last else None,
    }


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Mean over the last `width` values, fewer at the start: [N]."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - width)
    found: np.ndarray = (sums[ends] - sums[starts]) / (ends - starts)
    return found
