"""Two engines of one model behind one protocol: one draws outputs, either scores. Each is opened when first needed."""

from collections.abc import Callable, Sequence
from typing import Any

from llmr_ray.feedback.engine import Engine, Sampled, Sampling, Scored
from llmr_ray.feedback.engine_tree import TreeScorer
from llmr_ray.feedback.trie import Pair

TREE = "tree"
ENGINE = "engine"
ROUTES = (TREE, ENGINE)


class RoutedEngine:
    """Implements Engine.

    Args:
        tokenizer, max_model_tokens: as in Engine.
        open_sampler: opens the engine that samples, and scores by the route "engine".
        open_tree: opens the scorer of the route "tree".

    `route` says what scores from now on.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_model_tokens: int,
        open_sampler: Callable[[], Engine],
        open_tree: Callable[[], TreeScorer],
    ) -> None:
        self.tokenizer, self.max_model_tokens = tokenizer, max_model_tokens
        self.route = TREE
        self._open_sampler, self._open_tree = open_sampler, open_tree
        self._sampler: Engine | None = None
        self._tree: TreeScorer | None = None

    def begin(self) -> None:
        """As in Engine."""
        if self._sampler is not None:
            self._sampler.begin()

    def likelihood(self, pairs: Sequence[Pair]) -> list[Scored]:
        """As in Engine, by the chosen route."""
        if self.route == ENGINE:
            return self._engine().likelihood(pairs)
        if self._tree is None:
            self._tree = self._open_tree()
        return self._tree.likelihood(pairs)

    def sample(self, jobs: Sequence[Sampling]) -> list[Sampled]:
        """As in Engine."""
        return self._engine().sample(jobs) if jobs else []

    def _engine(self) -> Engine:
        if self._sampler is None:
            self._sampler = self._open_sampler()
        return self._sampler
