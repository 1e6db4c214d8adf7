"""From segments to token ids: exact spans of the desired output, and cutting what may be cut.

The whole text, prompt and target, is tokenised at once, and the target's tokens are those whose characters begin at or
after its first one. Released code measures the target's length on its own instead (methods.md A.4.2), which is right
only where the tokenizer happens to split the joint text the same way.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llmr_ray.artifacts import sha256_text
from llmr_ray.feedback.requests import LLMRequest, Segment
from llmr_ray.feedback.trie import Ids


class FitError(Exception):
    """A row that cannot be asked, with the reason. It becomes the row's error and is no defect of the run."""


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """Token ids ready for an engine. `target_ids` is empty for sampling."""

    prompt_ids: Ids
    target_ids: Ids
    truncated: bool
    prompt_sha: str


def fit_targets(
    tokenizer: Any, request: LLMRequest, targets: Sequence[str], max_model_tokens: int
) -> list[Fitted | FitError]:
    """The prompt with each of the targets; a target that cannot be asked gives its error.

    Together they have at most `max_model_tokens` and what the request itself allows.
    The prompt leaves room for the target or for `request.max_new_tokens`, whichever is more. So the targets of a
    request, which are no longer than that as a rule, see the same prompt although each is fitted by itself; and what
    is computed for a (prompt, target) never depends on which other targets were asked with it.
    """
    most = _most(request, max_model_tokens)
    trimmed: dict[int, _Trimmed] = {}

    def trim(limit: int) -> _Trimmed:
        if limit not in trimmed:
            trimmed[limit] = _trim(tokenizer, request.segments, limit)
        return trimmed[limit]

    results: list[Fitted | FitError] = []
    for target in targets:
        try:
            results.append(_fit_target(tokenizer, trim, target, request.max_new_tokens, most))
        except FitError as error:
            results.append(error)
    return results


def _fit_target(
    tokenizer: Any, trim: Callable[[int], "_Trimmed"], target: str, max_new_tokens: int, most: int
) -> Fitted:
    _check_text(target)
    if not target.strip():
        raise FitError("the desired output is empty")
    limit = most - max(max_new_tokens, len(_encode(tokenizer, target)[0]))
    while True:
        prompt = trim(limit)
        ids, starts = _encode(tokenizer, prompt.text + target)
        over = len(ids) - most
        if over <= 0:
            break
        if prompt.num_tokens > limit:
            raise FitError(
                f"the desired output and what may not be cut have {len(ids)} tokens, but {most} are the limit "
                f"({_LIMITS})"
            )
        limit = prompt.num_tokens - over
    split = next((place for place, start in enumerate(starts) if start >= len(prompt.text)), len(ids))
    if split == len(ids):
        raise FitError("the desired output has no token of its own: the tokenizer merges it into the prompt")
    if split == 0:
        raise FitError("nothing precedes the desired output, so its first token has no probability")
    return Fitted(
        prompt_ids=tuple(ids[:split]),
        target_ids=tuple(ids[split:]),
        truncated=prompt.truncated,
        prompt_sha=sha256_text(prompt.text),
    )


def fit_prompt(tokenizer: Any, request: LLMRequest, max_model_tokens: int) -> Fitted:
    """The prompt of a sampling request, with room for `max_new_tokens`.

    Raises:
        FitError: the prompt is empty, or what may not be cut leaves no room.
    """
    most = _most(request, max_model_tokens)
    limit = most - request.max_new_tokens
    prompt = _trim(tokenizer, request.segments, limit)
    ids, _ = _encode(tokenizer, prompt.text)
    if not ids:
        raise FitError("the prompt is empty")
    if len(ids) > limit:
        raise FitError(
            f"the parts that may not be cut have {len(ids)} tokens and {request.max_new_tokens} are to be made, but "
            f"{most} are the limit ({_LIMITS})"
        )
    return Fitted(prompt_ids=tuple(ids), target_ids=(), truncated=prompt.truncated, prompt_sha=sha256_text(prompt.text))


_LIMITS = "llm.max_model_tokens, and in evaluation evaluate.prompt_tokens"


def _most(request: LLMRequest, max_model_tokens: int) -> int:
    """The tokens that a prompt and its output may have."""
    return min(request.max_tokens or max_model_tokens, max_model_tokens)


@dataclass(frozen=True)
class _Trimmed:
    text: str
    num_tokens: int
    truncated: bool


def _trim(tokenizer: Any, segments: Sequence[Segment], limit: int) -> _Trimmed:
    """The prompt cut to `limit` tokens as far as its segments allow."""
    for segment in segments:
        _check_text(segment.text)
    texts = [
        _cut(tokenizer, segment.text, segment.max_tokens, segment.trim_side) if segment.max_tokens else segment.text
        for segment in segments
    ]
    order = sorted(
        (row for row, segment in enumerate(segments) if segment.trim_order > 0),
        key=lambda row: (segments[row].trim_order, row),
    )
    while (count := len(_encode(tokenizer, text := _joined(segments, texts))[0])) > limit:
        row = next((row for row in order if texts[row]), None)
        if row is None:
            break
        starts = _encode(tokenizer, texts[row])[1]
        keep = sum(start >= 0 for start in starts) - (count - limit)
        texts[row] = _cut(tokenizer, texts[row], max(0, keep), segments[row].trim_side)
    truncated = any(left != segment.text for left, segment in zip(texts, segments, strict=True))
    return _Trimmed(text, count, truncated)


def _joined(segments: Sequence[Segment], texts: Sequence[str]) -> str:
    """What is left of the segments, without what separated one of which nothing is left."""
    gone = [False, *(not text and bool(segment.text) for text, segment in zip(texts, segments, strict=True))]
    return "".join(
        text
        for text, segment, after_gone in zip(texts, segments, gone, strict=False)
        if not (segment.separates and after_gone)
    )


def _cut(tokenizer: Any, text: str, keep: int, side: str) -> str:
    """The first (or last) `keep` tokens of a text as text, cut between characters; shorter whenever it has more."""
    ids, starts = _encode(tokenizer, text)
    lead = sum(start < 0 for start in starts)
    tokens = len(ids) - lead
    if tokens <= keep:
        return text
    if keep == 0:
        return ""
    if side == "left":
        # A token that shares its character with the one before it would bring that one back.
        first = tokens - keep
        while first < tokens and starts[lead + first] == starts[lead + first - 1]:
            first += 1
        return text[starts[lead + first] :] if first < tokens else ""
    return text[: starts[lead + keep]]


def _encode(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """Token ids and the character each begins at (-1 for special tokens the tokenizer puts in front).

    Special tokens in front (a BOS) are kept as the tokenizer puts them by default; those behind (an EOS) are dropped,
    because the text goes on.
    """
    encoded = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True, verbose=False)
    ids, mask = list(encoded["input_ids"]), list(encoded["special_tokens_mask"])
    starts = [
        -1 if special else int(start) for (start, _), special in zip(encoded["offset_mapping"], mask, strict=True)
    ]
    end = len(ids)
    while text and mask[end - 1]:
        end -= 1
    return ids[:end], starts[:end]


def _check_text(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise FitError(f"the text is not valid Unicode ({error.reason})") from error
