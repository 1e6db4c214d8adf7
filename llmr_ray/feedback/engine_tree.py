"""Scoring by the packed token tree: what prompts and continuations share is computed once, nothing else ever.

Pairs are laid out as token trees (feedback/trie.py) of a bounded size; a tree is one forward pass without padding, with
attention along its branches (feedback/tree_attention.py). The output layer runs on the tokens that predict, in slices,
so no [T, V] matrix of logits exists. Works for the decoders of transformers whose attention goes through its attention
interface; each model is checked against its own plain forward pass when it is opened.
"""

from collections.abc import Sequence

import numpy as np
import torch

from llmr_ray.errors import ConfigError
from llmr_ray.feedback import tree_attention
from llmr_ray.feedback.engine import EngineSettings, Scored
from llmr_ray.feedback.engine_hf import load_model, plain_logprobs
from llmr_ray.feedback.trie import Ids, Pair, TokenTree, build_tree, packs

LOGIT_ROWS = 256
"""Predicting tokens whose logits exist at a time."""

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.3}
"""The mean difference of log-probabilities from the plain forward pass that a new model may show. Mistakes of attention
or of the output layer are far larger; in float32 rounding stays below 1e-4."""


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
        self.softcap = getattr(self.model.config, "final_logit_softcapping", None)
        self._verify(settings.path)

    def likelihood(self, pairs: Sequence[Pair]) -> list[Scored]:
        """As in Engine. A tree's tokens are charged to its first pair, so that their sum is what was computed."""
        results: list[Scored | None] = [None] * len(pairs)
        for members in packs(pairs, self.max_tokens):
            tree = build_tree([pairs[number] for number in members])
            logprobs_P = self._forward(tree)
            for place, number in enumerate(members):
                own = logprobs_P[tree.bounds[place] : tree.bounds[place + 1]]
                cost = len(tree) if place == 0 else 0
                results[number] = Scored(logprobs=tuple(own.tolist()), num_computed_tokens=cost)
        return [result for result in results if result is not None]

    @torch.inference_mode()
    def _forward(self, tree: TokenTree) -> np.ndarray:
        """float32 [P]: the log-probability of each of the tree's predictions."""
        hidden_TD = self.model.base_model(
            input_ids=torch.from_numpy(tree.token_T)[None].to(self.device),
            position_ids=torch.from_numpy(tree.position_T)[None].to(self.device),
            use_cache=False,
            tree=tree_attention.layout(tree, self.device),
        ).last_hidden_state[0]
        head = self.model.get_output_embeddings()
        # A token where branches part predicts several ids, but its logits are the same.
        nodes, row_P = np.unique(tree.predict_node_P, return_inverse=True)
        by_row = np.argsort(row_P, kind="stable")
        ordered_P = row_P[by_row]
        logprobs_P = np.empty(len(row_P), np.float32)
        for start in range(0, len(nodes), LOGIT_ROWS):
            rows = torch.from_numpy(nodes[start : start + LOGIT_ROWS]).to(self.device)
            logits_RV = head(hidden_TD[rows]).float()
            if self.softcap is not None:
                logits_RV = torch.tanh(logits_RV / self.softcap) * self.softcap
            low, high = np.searchsorted(ordered_P, [start, start + LOGIT_ROWS])
            mine = by_row[low:high]
            row = torch.from_numpy(row_P[mine] - start).to(self.device)
            chosen = logits_RV[row, torch.from_numpy(tree.predict_id_P[mine]).to(self.device)]
            logprobs_P[mine] = (chosen - logits_RV.logsumexp(-1)[row]).cpu().numpy()
        return logprobs_P

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
