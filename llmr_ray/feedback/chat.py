"""An LLM's own chat template around the prompts of the tasks, for models that were tuned to be spoken to.

The prompt becomes one turn of the user and the desired output the assistant's. The released code of LLM-Embedder scores
without a template (methods.md A.4.2), so this is a switch that is off unless it is asked for (`llm.chat_template`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmr_ray.errors import ConfigError
from llmr_ray.feedback.requests import LLMRequest, Segment

_TURN = "5fb0d2c1 the user's turn 5fb0d2c1"
"""Stands for the prompt while the template is read; no template holds it."""

_DATE = "26 Jul 2024"
"""What templates that name the day are told (Llama 3's own default): a prompt must be the same tomorrow."""


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """The text of a template before and behind the user's turn; `tail` ends where the assistant begins to speak."""

    head: str
    tail: str

    @classmethod
    def load(cls, folder: Path) -> "ChatTemplate":
        """The template of the tokenizer in a model's folder. Raises ConfigError where there is none to use."""
        from transformers import AutoTokenizer

        return cls.of(AutoTokenizer.from_pretrained(folder), str(folder))

    @classmethod
    def of(cls, tokenizer: Any, name: str) -> "ChatTemplate":
        """The template of a tokenizer; `name` is for the error."""
        if not tokenizer.chat_template:
            raise ConfigError(
                f"llm.chat_template is set, but the tokenizer of {name} has no chat template: it was not tuned to be "
                "spoken to. Leave the setting out, or name the model's chat version."
            )
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": _TURN}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,
            date_string=_DATE,
        )
        head, *tails = rendered.split(_TURN)
        if len(tails) != 1:
            raise ConfigError(
                f"the chat template of {name} shows the user's turn {len(tails)} times instead of once, so prompts "
                "cannot be put into it. Leave llm.chat_template out."
            )
        # Templates begin with the BOS token that most tokenizers put in front of any text by themselves.
        bos = tokenizer.bos_token
        if bos and head.startswith(bos) and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id:
            head = head[len(bos) :]
        return cls(head=head, tail=tails[0])

    def wrap(self, requests: Sequence[LLMRequest]) -> list[LLMRequest]:
        """The same requests asked within the template; those that continue a running text are left as they are.

        Nothing is cut from the template when a prompt is too long. White space at the turn's end, and at the output's
        beginning, which separates the two in plain prompts, is left out.
        """
        return [request if request.continues_text else self._wrap(request) for request in requests]

    def _wrap(self, request: LLMRequest) -> LLMRequest:
        turn = list(request.segments)
        while turn and turn[-1].trim_order == 0 and turn[-1].text.isspace():
            turn.pop()
        if turn:
            turn[-1] = replace(turn[-1], text=turn[-1].text.rstrip())
        return replace(
            request,
            segments=(Segment(text=self.head), *turn, Segment(text=self.tail)),
            targets=tuple(target.lstrip() for target in request.targets),
        )
