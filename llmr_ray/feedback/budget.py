"""What a run may spend on the LLM: reached, it stops cleanly, and the same command with a higher budget goes on."""

import time

from llmr_ray.config import BudgetConfig
from llmr_ray.errors import BudgetError


class Budget:
    """Counts LLM tokens and the hours since the first question to the LLM.

    Args:
        limits: of the run; 0 is no limit.
    """

    def __init__(self, limits: BudgetConfig) -> None:
        self.limits = limits
        self.tokens = 0
        self._started: float | None = None

    def start(self) -> None:
        """The clock runs from the first call on."""
        self._started = self._started if self._started is not None else time.monotonic()

    @property
    def hours(self) -> float:
        """Since `start`."""
        return 0.0 if self._started is None else (time.monotonic() - self._started) / 3600

    @property
    def is_reached(self) -> bool:
        """Whether nothing more may be asked."""
        over_tokens = 0 < self.limits.max_tokens <= self.tokens
        return over_tokens or 0 < self.limits.max_hours <= self.hours

    def error(self, chunks_left: int) -> BudgetError:
        """What to raise when it is reached."""
        return BudgetError(
            f"the budget is reached: {self.tokens:,} LLM tokens (budget.max_tokens {self.limits.max_tokens:,}) in "
            f"{self.hours:.2f} hours (budget.max_hours {self.limits.max_hours:g}); 0 means no limit. At least "
            f"{chunks_left:,} chunks of work are left. All answers are stored: the same command pays only for the "
            "rest, and counts its budget anew."
        )
