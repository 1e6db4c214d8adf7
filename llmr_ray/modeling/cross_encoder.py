"""The cross-encoder: a transformer that reads two texts together and gives one logit, with the heads of transformers.

Tensor legend: B pairs of a batch, L tokens of the longest pair, T tokens of all pairs, D hidden size, n pairs of a
call.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmr_ray.errors import ResourceError
from llmr_ray.modeling.text_model import TextModel, Tokens, loading, readable_weights, require_weights

if TYPE_CHECKING:
    import torch

_RAW_LOGITS = {"activation_fn": "torch.nn.modules.linear.Identity"}
"""Tells sentence-transformers' CrossEncoder to give logits as they are, not their sigmoid."""


@dataclass(frozen=True, kw_only=True)
class PairTemplate:
    """How a tokenizer puts two texts together: special tokens before, between and after them, int32 each.

    max_tokens: of a pair, special tokens included.
    """

    before: np.ndarray
    between: np.ndarray
    after: np.ndarray
    max_tokens: int

    @classmethod
    def of(cls, tokenizer: Any, max_tokens: int) -> "PairTemplate":
        """The template of a fast tokenizer; ResourceError where its pairs do not begin with a special token."""
        encoded = tokenizer("a", "b")
        ids, side = np.asarray(encoded["input_ids"], dtype=np.int32), encoded.sequence_ids(0)
        left, right, length = side.index(0), side.index(1), len(side)
        if not left:
            raise ResourceError(
                "the tokenizer puts no special token before a pair of texts, so there is nothing for a cross-encoder's "
                "head to read. Use a model of the BERT, ELECTRA, RoBERTa or MPNet kind."
            )
        left_end = length - side[::-1].index(0)
        right_end = length - side[::-1].index(1)
        return cls(before=ids[:left], between=ids[left_end:right], after=ids[right_end:], max_tokens=max_tokens)

    def pair(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """The tokens of a pair, from those of its texts without special tokens: int32.

        Too long pairs are cut as tokenizers do under `longest_first`: the longer text down to the length of the
        shorter, then both to one half (an odd token goes to the longer, of equally long ones to the right).
        """
        room = max(0, self.max_tokens - len(self.before) - len(self.between) - len(self.after))
        if len(left) + len(right) > room:
            short = min(len(left), len(right), room // 2)
            is_left_longer = len(left) > len(right)
            left = left[: room - short if is_left_longer else short]
            right = right[: short if is_left_longer else room - short]
        return np.concatenate([self.before, left, self.between, right, self.after]).astype(np.int32, copy=False)


def load_tokenizer(path: Path | str) -> Any:
    """The fast tokenizer of a model folder, which knows no token types (methods.md B.6).

    Raises:
        ResourceError: there is none.
    """
    from transformers import AutoTokenizer

    with loading(Path(path), "a cross-encoder"):
        tokenizer: Any = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    if not tokenizer.is_fast:
        raise ResourceError(f"{path} has no fast tokenizer, which the cross-encoder needs.")
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    return tokenizer


def tokenize(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of whole texts without special tokens: what a PairTemplate puts together."""
    if not texts:
        return []
    encoded = tokenizer(
        list(texts),
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # no warning of texts that are too long: pairs are cut when they are made
    )
    ids: list[list[int]] = encoded["input_ids"]
    return ids


class CrossEncoder(TextModel):
    """One logit for two texts, for inference and as the module that is trained.

    A folder with a classification head of one label is used as it is; to any other encoder a fresh head of its own
    architecture is added, on the first token. The head is computed in float32 whatever the precision: bfloat16 would
    leave three digits to rank by.

    Args:
        path: a transformers folder with weights in safetensors; a sentence-transformers folder of one transformer is
            such a folder too.
        max_tokens: of a pair, special tokens included; stored in saved models.
        head_seed: a fresh head depends on it alone.
        precision: auto, float32 or bfloat16.
        device: "cpu", "cuda", ...; None: CUDA where there is one.

    Raises:
        ResourceError: there is no such folder, or it holds no model that can be loaded safely.
        ConfigError: the precision is unknown, or pairs of max_tokens do not fit the model.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        max_tokens: int,
        head_seed: int = 0,
        precision: str = "auto",
        device: str | None = None,
    ) -> None:
        super().__init__(path, precision=precision, device=device)
        self.tokenizer = load_tokenizer(self.path)
        self.template = PairTemplate.of(self.tokenizer, max_tokens)
        self.module = _load(self.path, head_seed).to(self.device)
        self.transformer.forward = partial(self._for_head, self.transformer.forward)
        self._make_ready(max_tokens, "reward_model.max_tokens")
        self.tokenizer.model_max_length = max_tokens

    @property
    def transformer(self) -> Any:
        """The encoder below the head; BERT's pooler is a part of it."""
        return self.module.base_model

    @property
    def heads(self) -> list[Any]:
        """The classifier, which may be a fresh one."""
        return [part for part in self.module.children() if part is not self.transformer]

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of whole texts without special tokens: what `template` puts together."""
        return tokenize(self.tokenizer, texts)

    def score(self, pairs: Tokens, batch_tokens: int) -> np.ndarray:
        """The logits of pairs that `template` made: float32 [n], in their order.

        Args:
            pairs: n pairs.
            batch_tokens: tokens of a batch at the most, padding included.
        """
        return self.infer(pairs, batch_tokens, np.empty(len(pairs), dtype=np.float32))

    def _of_padded(self, features: dict[str, "torch.Tensor"]) -> "torch.Tensor":
        return self.module(**features).logits[:, 0].float()

    def _of_packed(self, features: dict[str, Any], bounds: "torch.Tensor") -> "torch.Tensor":
        return self.module(**features).logits[:, 0].float()

    def _for_head(self, forward: Callable[..., Any], *inputs: Any, **features: Any) -> Any:
        """What the head is given: in float32, and of a packed batch [1, T, D] the first tokens alone, [B, 1, D]."""
        import torch

        with self._autocast():
            output = forward(*inputs, **features)
        hidden = output.last_hidden_state
        if features.get("runs") is not None:
            lengths = [length for count, length in features["runs"] for _ in range(count)]
            starts_B = torch.tensor([0, *lengths[:-1]], device=hidden.device).cumsum(dim=0)
            hidden = hidden[0, starts_B, None]
        output.last_hidden_state = hidden.float()
        pooler = getattr(self.transformer, "pooler", None)
        if pooler is not None:
            output.pooler_output = pooler(output.last_hidden_state)
        return output

    def save(self, folder: Path | str) -> None:
        """Writes a folder that transformers and sentence-transformers load as a model for pairs of texts.

        Args:
            folder: created; the caller makes it atomic.
        """
        self.module.config.sentence_transformers = _RAW_LOGITS
        self.module.save_pretrained(str(folder))
        self.tokenizer.save_pretrained(str(folder))
        readable_weights(folder)


def _load(path: Path, head_seed: int) -> Any:
    import torch
    from transformers import AutoModelForSequenceClassification

    with loading(path, "a cross-encoder") as missing, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(head_seed)
        module = AutoModelForSequenceClassification.from_pretrained(
            str(path),
            num_labels=1,
            ignore_mismatched_sizes=True,  # a head of other labels is replaced
            local_files_only=True,
            use_safetensors=True,
            dtype=torch.float32,
        )
    of_encoder = f"{module.base_model_prefix}."
    require_weights(path, [name for name in missing if name.startswith(of_encoder) and ".pooler." not in name])
    return module
