"""Relevance labels in an LLM's own words: what it is asked, and what of its answer counts (ARL2, methods.md C.1).

A call shows one question and a few passages under ids. The answer is JSON by a schema: for each id first the evidence,
a quote, and then the score, so that the LLM looks before it judges. Nothing here trusts an answer: what does not parse
is rejected, and a score that its evidence does not bear is lowered and flagged. Needs no log-probabilities.
"""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmr_ray.feedback.requests import Segment

LABELS_VERSION = 2
"""Raised whenever the prompt, the schema or a check changes; part of what determines llm_scores with labels."""

SCORES = (0.0, 0.5, 1.0)
"""No support, partial, full."""

CUT_SHORT = "the LLM's answer was cut short"
NO_JSON = "the LLM's answer is no JSON object of passages"
UNKNOWN_ID = "the LLM's answer names a passage that it was not shown"
TWICE = "the LLM's answer names something twice"
NO_ENTRY = "the LLM's answer leaves the passage out"
NO_EVIDENCE_TEXT = "the LLM's evidence is no text"
BAD_SCORE = "the LLM's score is none of 0, 0.5, 1"
DISAGREE = "two votes of the LLM differ by 1"

NOT_QUOTED = "evidence_not_in_passage"
NO_GOLD_ANSWER = "no_gold_answer"

QUERY_TOKENS = 96
"""A question is cut on the left to so many LLM tokens."""

FRAME_TOKENS = 168
"""About the tokens of the prompt's own words."""

_SYNTAX = str.maketrans({"{": "(", "}": ")", "[": "(", "]": ")", '"': "'"})
"""What passages show instead of the characters of ids and answers: one with an answer in it would be the last example
that the LLM sees, and small ones copy it."""

_ENTRY_TOKENS = 24
"""Room for what stands around an id's evidence and score."""

_EXAMPLE = """Question: Who wrote Emma?

[1] Bath is a city in Somerset, England.
[2] Emma is a novel by Jane Austen, published in 1815.
[3] Jane Austen lived in Hampshire for many years.

JSON:
{"1":{"evidence":"","score":0},"2":{"evidence":"a novel by Jane Austen","score":1},"3":{"evidence":"Jane Austen",\
"score":0.5}}"""
"""Made up, the same for all. Without it a small LLM quotes ids instead of passages, and repeats them to the end."""

_MAX_ANSWER_WORDS = 10
"""Longer desired outputs are no answers that a passage would hold word by word."""

_MIN_OVERLAP = 0.8

# A character of a script without spaces is a word of its own.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+")


@dataclass(frozen=True, kw_only=True)
class Said:
    """What the LLM said about a passage; score is one of SCORES."""

    evidence: str
    score: float


@dataclass(frozen=True, kw_only=True)
class Label:
    """What counts of it. flags: the checks that lowered it."""

    score: float
    evidence: str
    flags: tuple[str, ...] = ()


def label_segments(question: str, passages: Sequence[str], passage_tokens: int) -> tuple[Segment, ...]:
    """The prompt of a call.

    Args:
        question: as the query has it.
        passages: shown under the ids of `passage_ids`, each as one line without brackets or double quotes, so that none
            can pass for two or hold an answer.
        passage_tokens: each is cut to so many LLM tokens.
    """
    shown: list[Segment] = []
    for name, passage in zip(passage_ids(len(passages)), passages, strict=True):
        shown.append(Segment(text=f"\n[{name}] "))
        text = " ".join(passage.split()).translate(_SYNTAX)
        shown.append(Segment(text=text, trim_order=1, max_tokens=passage_tokens))
    return (
        Segment(
            text="Judge how much each passage helps to answer the question. evidence: a few words copied from the "
            "passage, or empty. score: 1 it answers the question, 0.5 it helps a little, 0 it does not help.\n\n"
            f"{_EXAMPLE}\n\nQuestion: "
        ),
        Segment(text=" ".join(question.split()), trim_order=2, trim_side="left", max_tokens=QUERY_TOKENS),
        Segment(text="\n"),
        *shown,
        Segment(text="\n\nJSON:\n"),
    )


def passage_ids(count: int) -> tuple[str, ...]:
    """The ids of a call's passages, in the order shown."""
    return tuple(str(number) for number in range(1, count + 1))


def answer_schema(count: int, evidence_chars: int) -> str:
    """The JSON schema of the answer about `count` passages; evidence has at most so many characters."""
    evidence = {"type": "string", "maxLength": evidence_chars}
    entry = _object({"evidence": evidence, "score": {"enum": [0, 0.5, 1]}})
    return json.dumps(_object(dict.fromkeys(passage_ids(count), entry)), separators=(",", ":"))


def answer_tokens(count: int, evidence_chars: int) -> int:
    """Room for the answer in LLM tokens. Small LLMs repeat a digit to the end of a quote, and that is a token each.

    An answer that needs more (in a script of which the LLM knows few characters) is cut short and thereby rejected.
    """
    return count * (_ENTRY_TOKENS + evidence_chars)


def parse_answer(text: str, count: int) -> dict[str, Said | str]:
    """By id of a call with `count` passages: what the LLM said, or why that does not count.

    An answer that is broken or names a passage that does not exist counts for no passage.
    """
    ids = passage_ids(count)
    try:
        # Not strict: xgrammar lets control characters, such as a tab, into strings as they are.
        entries = json.loads(text, object_pairs_hook=_without_repeats, strict=False)
    except _RepeatError:
        return dict.fromkeys(ids, TWICE)
    except (ValueError, RecursionError):
        begun = text.lstrip().startswith("{") and not text.rstrip().endswith("}}")
        return dict.fromkeys(ids, CUT_SHORT if begun else NO_JSON)
    if not isinstance(entries, dict):
        return dict.fromkeys(ids, NO_JSON)
    if not entries.keys() <= set(ids):
        return dict.fromkeys(ids, UNKNOWN_ID)
    return {name: _said(entries[name]) if name in entries else NO_ENTRY for name in ids}


def checked(
    said: Said, passage: str, gold_answers: Sequence[str], evidence_chars: int, *, check_evidence: bool = True
) -> Label:
    """The label that the evidence bears.

    A score above 0 loses 0.5 where the evidence is empty or not in the passage (its words one after the other, or 80%
    of them anywhere); 1 becomes 0.5 where the question has gold answers and none stands in passage or evidence.

    Args:
        said: by the LLM.
        passage: whole, also where the LLM saw less of it.
        gold_answers: what `gold_answers` gives.
        evidence_chars: that the schema allowed.
        check_evidence: False leaves a score as it is whatever was quoted for it.
    """
    score, flags = said.score, []
    if check_evidence and score > 0 and not is_quoted(said.evidence, passage, evidence_chars):
        score -= 0.5
        flags.append(NOT_QUOTED)
    if score == 1 and gold_answers and not any(holds_answer(text, gold_answers) for text in (passage, said.evidence)):
        score = 0.5
        flags.append(NO_GOLD_ANSWER)
    return Label(score=score, evidence=said.evidence, flags=tuple(flags))


def gold_answers(targets: Sequence[str]) -> list[str]:
    """Of a query's desired outputs those that an answering passage must hold: no yes or no, and no long text."""
    words = {target: _words(target) for target in targets}
    return [
        target
        for target, of_target in words.items()
        if 0 < len(of_target) <= _MAX_ANSWER_WORDS and of_target not in (["yes"], ["no"])
    ]


def holds_answer(text: str, answers: Sequence[str]) -> bool:
    """Whether one of the answers stands in a text, its words one after the other; case and punctuation do not count."""
    words = f" {' '.join(_words(text))} "
    return any(f" {' '.join(_words(answer))} " in words for answer in answers)


def is_quoted(evidence: str, passage: str, evidence_chars: int) -> bool:
    """Whether the evidence is a quote: its words stand in the passage in a row, or at least 80% of them stand there at
    all. Case, punctuation and white space do not count. Where the evidence has as many characters as the schema allowed
    its last word may be cut; in shorter evidence nothing has cut it, and "1" is no quote of "1815"."""
    quoted, words = _words(evidence), _words(passage)
    if not quoted:
        return False
    end = "" if len(evidence) >= evidence_chars else " "
    if f" {' '.join(quoted)}{end}" in f" {' '.join(words)} ":
        return True
    return (Counter(quoted) & Counter(words)).total() >= _MIN_OVERLAP * len(quoted)


def combined(votes: Sequence[Label]) -> Label | str:
    """One label of several votes: their mean rounded down to a score, which is the lower one of votes that differ by
    0.5 at the most; votes that differ by 1 are no label. Flags of all votes are kept."""
    scores = [vote.score for vote in votes]
    if max(scores) - min(scores) >= 1:
        return DISAGREE
    lowest = min(votes, key=lambda vote: vote.score)
    flags = dict.fromkeys(flag for vote in votes for flag in vote.flags)
    return Label(score=lowest.score, evidence=lowest.evidence, flags=tuple(flags))


class _RepeatError(Exception):
    """A JSON object has a name twice, of which Python would silently take the last."""


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _RepeatError
    return found


def _said(entry: Any) -> Said | str:
    if not isinstance(entry, dict) or not isinstance(entry.get("evidence"), str):
        return NO_EVIDENCE_TEXT
    score = entry.get("score")
    if isinstance(score, bool) or not isinstance(score, int | float) or score not in SCORES:
        return BAD_SCORE
    return Said(evidence=entry["evidence"], score=float(score))


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    required = list(properties)
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _words(text: str) -> list[str]:
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
