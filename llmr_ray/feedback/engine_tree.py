"""Scoring by the packed token tree: what prompts and continuations share is computed once, nothing else ever.

Pairs are laid out as token trees (feedback/trie.py) of a bounded size; a tree is one forward pass without padding, with
attention along its branches (feedback/tree_attention.py). The output layer runs on the tokens that predict, in slices,
so no [T, V] matrix of logits exists. Works for the decoders of transformers whose attention goes through its attention
interface; each model is checked against its own plain forward pass when it is opened.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import DynamicCache

from llmr_ray.errors import ConfigError
from llmr_ray.feedback import tree_attention
from llmr_ray.feedback.engine import EngineSettings, Rival, Scored
from llmr_ray.feedback.engine_hf import load_model, plain_logprobs
from llmr_ray.feedback.rewards import likelihood
from llmr_ray.feedback.trie import Ids, Pair, TokenTree, build_tree, packs
from llmr_ray.modeling.linear import is_faster, use_onednn

LOGIT_ROWS = 256
"""Predicting tokens whose logits exist at a time."""

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.3}
"""The mean difference of log-probabilities from the plain forward pass that a new model may show. Mistakes of attention
or of the output layer are far larger; in float32 rounding stays below 1e-4."""


FIRST_TOKENS = 8
"""Of a pair that is only compared, so many tokens are read before it is asked whether it can still win; then as many
again, and twice as many. A pass costs something of its own, so a finer division saves tokens and not time."""

MARGIN = 0.01
"""By how much a pair must have lost before the rest is left unread. What it is compared with may have been computed in
another pass, with other rounding, and an output that goes on where the other ends loses by little at first."""


@dataclass(frozen=True, kw_only=True)
class Contest:
    """A tree's pair that is compared with another one of its pairs, by "mean" or "sum"."""

    pair: int
    rival: int
    rank_by: str

    def is_open(self, tree: TokenTree, stops_N: np.ndarray, logprobs_P: np.ndarray) -> bool:
        """Whether the pair may still be the likelier, with what was not read yet at its best."""
        if stops_N[self.pair] == tree.bounds[self.pair + 1]:
            return False
        own, other = (
            likelihood(logprobs_P[tree.bounds[pair] : tree.bounds[pair + 1]].tolist(), self.rank_by)
            for pair in (self.pair, self.rival)
        )
        return own > other - MARGIN


class TreeScorer:
    """Log-probabilities of continuations, computed on token trees.

    Args:
        settings: model folder, dtype, threads, and max_batched_tokens: tokens of a forward pass.

    Raises:
        ConfigError: the model's log-probabilities on trees are not those of its plain forward pass.
    """

    def __init__(self, settings: EngineSettings) -> None:
        self.max_tokens = settings.max_batched_tokens
        self.model, self.device = load_model(settings)
        if self.device.type == "cpu" and is_faster():
            use_onednn(self.model)
        self.softcap = getattr(self.model.config, "final_logit_softcapping", None)
        self._verify(settings.path)

    def likelihood(self, pairs: Sequence[Pair], rivals: Sequence[Rival | None] = ()) -> list[Scored]:
        """As in Engine. A tree's tokens are charged to its first pair, so that their sum is what was computed."""
        results: list[Scored | None] = [None] * len(pairs)
        for members in packs(pairs, self.max_tokens):
            contests = []
            compared: dict[Pair, int] = {}  # where the tree has each rival: after the pairs that are asked
            for place, number in enumerate(members):
                if rivals and (rival := rivals[number]):
                    where = compared.setdefault(rival.pair, len(members) + len(compared))
                    contests.append(Contest(pair=place, rival=where, rank_by=rival.rank_by))
            tree = build_tree([*(pairs[number] for number in members), *compared])
            logprobs_P, read = self._read(tree, contests)
            for place, number in enumerate(members):
                own = logprobs_P[tree.bounds[place] : tree.bounds[place + 1]]
                results[number] = Scored(logprobs=tuple(own.tolist()), num_computed_tokens=read if place == 0 else 0)
        return [result for result in results if result is not None]

    def _read(self, tree: TokenTree, contests: Sequence[Contest]) -> tuple[np.ndarray, int]:
        """The log-probability of each of the tree's predictions (float32 [P]), and the number of tokens computed.

        Without contests that is a forward pass over the tree. With some, pairs that are compared are read a few tokens
        at first and then further, on the keys and values of the passes before, as long as they may still be the
        likelier: their likelihood only falls. Predictions that were not read are 0.
        """
        logprobs_P = np.zeros(len(tree.predict_id_P), np.float32)
        stops_N = tree.bounds[1:].copy()
        for contest in contests:
            stops_N[contest.pair] = min(stops_N[contest.pair], tree.bounds[contest.pair] + FIRST_TOKENS)
        cache = DynamicCache() if contests else None
        held_K = np.zeros(0, np.int64)
        while True:
            wanted_T = tree.paths(tree.predict_node_P[stops_N - 1])
            wanted_T[held_K] = False
            rows_R = np.flatnonzero(wanted_T)
            if len(rows_R):  # else another pair's tokens were all that these need
                hidden_RD = self._forward(tree, rows_R, held_K, cache)
                held_K = np.concatenate([held_K, rows_R])
                self._predict(tree, rows_R, hidden_RD, logprobs_P)
            contests = [contest for contest in contests if contest.is_open(tree, stops_N, logprobs_P)]
            if not contests:
                return logprobs_P, len(held_K)
            for contest in contests:
                start, end = tree.bounds[contest.pair : contest.pair + 2]
                stops_N[contest.pair] = min(end, start + 2 * (stops_N[contest.pair] - start))

    @torch.inference_mode()
    def _forward(
        self, tree: TokenTree, rows_R: np.ndarray, held_K: np.ndarray, cache: DynamicCache | None
    ) -> torch.Tensor:
        """Hidden states [R, D] of some tokens of a tree; the cache has the keys and values of `held_K`."""
        return self.model.base_model(
            input_ids=torch.from_numpy(tree.token_T[rows_R])[None].to(self.device),
            position_ids=torch.from_numpy(tree.position_T[rows_R])[None].to(self.device),
            past_key_values=cache,
            use_cache=cache is not None,
            tree=tree_attention.layout(tree, self.device, rows_R, held_K),
        ).last_hidden_state[0]

    @torch.inference_mode()
    def _predict(self, tree: TokenTree, rows_R: np.ndarray, hidden_RD: torch.Tensor, logprobs_P: np.ndarray) -> None:
        """Writes the log-probabilities of what the rows predict into `logprobs_P`."""
        head = self.model.get_output_embeddings()
        place_T = np.full(len(tree), -1)
        place_T[rows_R] = np.arange(len(rows_R))
        mine = np.flatnonzero(place_T[tree.predict_node_P] >= 0)
        # A token where branches part predicts several ids, but its logits are the same.
        places, row_P = np.unique(place_T[tree.predict_node_P[mine]], return_inverse=True)
        by_row = np.argsort(row_P, kind="stable")
        mine, row_P = mine[by_row], row_P[by_row]
        for start in range(0, len(places), LOGIT_ROWS):
            rows = torch.from_numpy(places[start : start + LOGIT_ROWS]).to(self.device)
            logits_RV = head(hidden_RD[rows]).float()
            if self.softcap is not None:
                logits_RV = torch.tanh(logits_RV / self.softcap) * self.softcap
            low, high = np.searchsorted(row_P, [start, start + LOGIT_ROWS])
            row = torch.from_numpy(row_P[low:high] - start).to(self.device)
            chosen = logits_RV[row, torch.from_numpy(tree.predict_id_P[mine[low:high]]).to(self.device)]
            logprobs_P[mine[low:high]] = (chosen - logits_RV.logsumexp(-1)[row]).cpu().numpy()

    def _verify(self, path: str) -> None:
        """Compares a tree of three branches with plain forward passes, then leaves the model set to trees."""
        vocabulary = self.model.get_input_embeddings().num_embeddings
        ids = np.random.default_rng(0).integers(0, vocabulary, 200).tolist()
        stem: Ids = tuple(ids[:150])
        pairs = [(stem, tuple(ids[150:160])), (stem, tuple(ids[160:170])), (stem[:70], tuple(ids[170:200]))]
        expected = [plain_logprobs(self.model, prompt, target).cpu().numpy() for prompt, target in pairs]
        self.model.set_attn_implementation(tree_attention.NAME)
        try:
            got = self.likelihood(pairs)
        except (NotImplementedError, TypeError) as error:
            raise ConfigError(
                f"the model in {path} cannot be scored on token trees: {error}. Set runtime.llm_scoring=engine."
            ) from error
        differences = [np.abs(scored.logprobs - plain) for scored, plain in zip(got, expected, strict=True)]
        mean = float(np.concatenate(differences).mean())
        if not mean <= TOLERANCE[self.model.dtype]:
            raise ConfigError(
                f"the model in {path} gives other log-probabilities on token trees than in a plain forward pass "
                f"(mean difference {mean:.2g}), so its attention is of a kind the tree does not cover. Set "
                "runtime.llm_scoring=engine."
            )
