"""Two engines of one model behind one protocol: one draws outputs, either scores. Each is opened when first needed."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

from llmr_ray.errors import ConfigError
from llmr_ray.feedback.engine import Engine, Rival, Sampled, Sampling, Scored
from llmr_ray.feedback.engine_tree import TreeScorer
from llmr_ray.feedback.trie import Pair

log = logging.getLogger(__name__)

TREE = "tree"
ENGINE = "engine"
ROUTES = (TREE, ENGINE)


class RoutedEngine:
    """Implements Engine.

    Args:
        tokenizer, max_model_tokens: as in Engine.
        open_sampler: opens the engine that samples, and scores by the route "engine".
        open_tree: opens the scorer of the route "tree".
        must_take_tree: a model that the tree does not cover is an error; else the engine scores it, with a warning.

    `route` says what scores from now on.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_model_tokens: int,
        open_sampler: Callable[[], Engine],
        open_tree: Callable[[], TreeScorer],
        *,
        must_take_tree: bool = False,
    ) -> None:
        self.tokenizer, self.max_model_tokens = tokenizer, max_model_tokens
        self.route = TREE
        self._open_sampler, self._open_tree = open_sampler, open_tree
        self._must_take_tree, self._tree_fails = must_take_tree, False
        self._sampler: Engine | None = None
        self._tree: TreeScorer | None = None

    def begin(self) -> None:
        """As in Engine."""
        if self._sampler is not None:
            self._sampler.begin()

    def likelihood(self, pairs: Sequence[Pair], rivals: Sequence[Rival | None] = ()) -> list[Scored]:
        """As in Engine, by the chosen route."""
        tree = None if self.route == ENGINE else self._scorer()
        return self._engine().likelihood(pairs, rivals) if tree is None else tree.likelihood(pairs, rivals)

    def sample(self, jobs: Sequence[Sampling]) -> list[Sampled]:
        """As in Engine."""
        return self._engine().sample(jobs) if jobs else []

    def _scorer(self) -> TreeScorer | None:
        if self._tree is None and not self._tree_fails:
            try:
                self._tree = self._open_tree()
            except ConfigError as error:
                if self._must_take_tree:
                    raise
                log.warning("%s The engine scores instead.", error)
                self._tree_fails = True
        return self._tree

    def _engine(self) -> Engine:
        if self._sampler is None:
            self._sampler = self._open_sampler()
        return self._sampler
