"""JSON schemas as grammars for the reference engine: which tokens may come next. xgrammar reads them, as in vLLM."""

from collections.abc import Collection
from typing import Any

import numpy as np
import torch


class JSONGrammars:
    """Compiles schemas for one model.

    Args:
        tokenizer: the model's.
        vocab_size: V, the width of the model's logits; tokenizers may know fewer tokens.
        end_ids: tokens that end an output; at least one.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, end_ids: Collection[int]) -> None:
        import xgrammar

        self.vocab_size = vocab_size
        self._xgrammar = xgrammar
        known = xgrammar.TokenizerInfo.from_huggingface(
            tokenizer, vocab_size=vocab_size, stop_token_ids=sorted(end_ids)
        )
        self._compiler = xgrammar.GrammarCompiler(known, max_threads=1)

    def begin(self, schema: str) -> "JSONOutput":
        """An output that obeys the schema, nothing of it written yet. No white space is free, as in engine_vllm."""
        compiled = self._compiler.compile_json_schema(schema, any_whitespace=False, separators=(",", ":"))
        bitmask = self._xgrammar.allocate_token_bitmask(1, self.vocab_size)
        return JSONOutput(self._xgrammar.GrammarMatcher(compiled), bitmask, self.vocab_size)


class JSONOutput:
    """How far an output has come."""

    def __init__(self, matcher: Any, bitmask: torch.Tensor, vocab_size: int) -> None:
        self._matcher, self._bitmask, self._vocab_size = matcher, bitmask, vocab_size

    def forbidden(self) -> torch.Tensor:
        """bool [V]: tokens that may not come next; an end token may once the JSON is whole."""
        self._bitmask.fill_(-1)  # xgrammar leaves it alone where every token may come
        self._matcher.fill_next_token_bitmask(self._bitmask)
        bits = np.unpackbits(self._bitmask.numpy().view(np.uint8), bitorder="little")[: self._vocab_size]
        return torch.from_numpy(bits == 0)

    def write(self, token: int) -> None:
        """Goes on by a token that was not forbidden."""
        if not self._matcher.accept_token(token):
            raise ValueError(f"token {token} does not continue the JSON, although the grammar allowed it.")
