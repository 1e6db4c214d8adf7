"""Control tokens of a model, where they stand in data: there they are words like others.

A tokenizer makes the token that ends a turn of every "<|im_end|>" in a prompt, whoever wrote it. A passage of the web
could end the user's turn so and go on as somebody else, the annotator for example, and a text about language models
would cut the prompt in two. So the names of control tokens in what is asked about are written with a blank behind their
first character, which no tokenizer takes for the token.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from llmr_ray.feedback.requests import LLMRequest

_LEAST_CHARS = 2
"""A control token of one character cannot be written in two parts."""


class ControlTokens:
    """The names of a model's control tokens.

    Args:
        names: as the tokenizer has them.
    """

    def __init__(self, names: Iterable[str]) -> None:
        longest_first = sorted(
            {name for name in names if len(name) >= _LEAST_CHARS}, key=lambda name: (-len(name), name)
        )
        self._name = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    @classmethod
    def load(cls, folder: Path) -> "ControlTokens":
        """Those of the tokenizer in a model's folder (``tokenizer.json``); none where it has no such file."""
        path = folder / "tokenizer.json"
        added = json.loads(path.read_text("utf-8")).get("added_tokens") or [] if path.is_file() else []
        return cls(token["content"] for token in added if token.get("special"))

    def as_words(self, requests: Sequence[LLMRequest]) -> list[LLMRequest]:
        """The same requests with control tokens in their texts and outputs written as words."""
        return [self._request(request) for request in requests]

    def _request(self, request: LLMRequest) -> LLMRequest:
        texts = [*(segment.text for segment in request.segments), *request.targets]
        if self._name is None or not any(map(self._name.search, texts)):
            return request
        segments = tuple(replace(segment, text=self._text(segment.text)) for segment in request.segments)
        return replace(request, segments=segments, targets=tuple(map(self._text, request.targets)))

    def _text(self, text: str) -> str:
        assert self._name is not None
        return self._name.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)
