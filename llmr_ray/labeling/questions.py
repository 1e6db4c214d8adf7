"""Questions that an LLM writes about a passage: prompt, reading of the output, what is kept (methods.md C.1.3).

Legend: N questions, M existing ones, D dimensions.
"""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from scipy import sparse
from sklearn.feature_extraction.text import HashingVectorizer

from llmr_ray.evaluation.answers import normalize
from llmr_ray.feedback.requests import Segment

QUESTIONS_VERSION = 2
"""Raised whenever a prompt, or what is read of its output, changes; part of what determines generated questions."""

QUESTION_TOKENS, ANSWER_TOKENS = 48, 16
"""LLM tokens of a question and of an answer at the most."""

FRAME_TOKENS = 48
"""About the tokens of a prompt's own words."""

NOT_WRITTEN, LLM_FAILED = "not_written", "llm_failed"
NO_QUESTION_MARK, TOO_SHORT, TOO_LONG, NEEDS_PASSAGE = "no_question_mark", "too_short", "too_long", "needs_passage"
SAME_TEXT, NEAR_TEXT, NEAR_VECTOR = "same_text", "near_text", "near_vector"
NO_ROUND_TRIP, GIVES_ANSWER = "no_round_trip", "gives_answer"
"""Why a question is not kept."""

OF_ANSWER = (NO_ROUND_TRIP, GIVES_ANSWER, LLM_FAILED)
"""What the LLM's answer, or that there is none, can have against a question."""

# "3.5 million people ..." and "1984: ..." begin a question, and not a list.
_MARKER = re.compile(r"^\s*(?:(?:[-*•]|\(?\d{1,2}[.):])\s+)?(?:(?:question|q)\s*\d{0,2}\s*[:.]\s+)?", re.IGNORECASE)
# "the author of Dune" and "the passage of the act" can be asked about by anyone.
_ABOUT_PASSAGE = re.compile(
    r"\b(?:(?:this|above|given|following|provided)\s+(?:passage|text|article|paragraph|excerpt|document|author|writer)"
    r"|the\s+(?:passage|text|article|paragraph|excerpt|document|author|writer)(?!\s+of\b))\b",
    re.IGNORECASE,
)
_DIGITS = re.compile(r"\d+")
_BLOCK = 256
"""Questions whose similarities to all others are in memory at a time."""


_ANSWERED = (
    "Passage: Emma is a novel by Jane Austen. It was published in London in 1815.\n"
    "Question: Who wrote the novel Emma?\nAnswer: Jane Austen"
)


def generation_segments(
    passage: str,
    demonstrations: Sequence[tuple[str, str]],
    *,
    number: int = 2,
    passage_tokens: int = 0,
    demonstration_tokens: int = 0,
) -> tuple[Segment, ...]:
    """The prompt by which an LLM writes questions about a passage; it goes on from "Question:".

    Demonstrations and the passage have the same form, which a small model copies more surely than it obeys. Passages of
    demonstrations are cut before the passage itself.

    Args:
        passage: as the LLM is to read it.
        demonstrations: (passage, question), of `patterns.choose_demonstrations`.
        number: of questions.
        passage_tokens: the passage is cut to so many LLM tokens. 0: no limit.
        demonstration_tokens: the same for the passage of each demonstration.
    """
    asked = (
        f"Write {number} factual questions that can be answered using only the passage. Each must be understandable "
        "without seeing the passage and have a short answer in it. One per line."
    )
    segments = [Segment(text=asked)]
    for text, question in demonstrations:
        segments.append(Segment(text="\n\nPassage: "))
        segments.append(Segment(text=text.strip(), trim_order=1, max_tokens=demonstration_tokens))
        segments.append(Segment(text=f"\nQuestion: {question.strip()}"))
    return (
        *segments,
        Segment(text="\n\nPassage: "),
        Segment(text=passage.strip(), trim_order=2, max_tokens=passage_tokens),
        Segment(text="\nQuestion:"),
    )


def read_questions(output: str, *, number: int = 2) -> list[str]:
    """The first `number` lines of the LLM's output, without numbering; what follows the next "Passage:" is not read."""
    lines = [_MARKER.sub("", line).strip() for line in output.split("Passage:")[0].splitlines()]
    return [line for line in lines if line][:number]


def answer_segments(passage: str, question: str, *, passage_tokens: int = 0) -> tuple[Segment, ...]:
    """The prompt by which the LLM answers from the passage alone, for `is_answered`. A made-up example shows the form,
    without which a small LLM answers in sentences of its own."""
    return (
        Segment(text=f"Answer with a few words of the passage.\n\n{_ANSWERED}\n\nPassage: "),
        Segment(text=passage.strip(), trim_order=1, max_tokens=passage_tokens),
        Segment(text=f"\nQuestion: {question}\nAnswer:"),
    )


def form_reason(question: str, *, fewest_words: int = 4, most_words: int = 40) -> str | None:
    """Why a question cannot be kept whatever the others are, or None. Words are what white space parts."""
    if not question.rstrip().endswith("?"):
        return NO_QUESTION_MARK
    words = len(question.split())
    if words < fewest_words:
        return TOO_SHORT
    if words > most_words:
        return TOO_LONG
    return NEEDS_PASSAGE if _ABOUT_PASSAGE.search(question) else None


def reject_reasons(
    questions: Sequence[str],
    existing: Sequence[str],
    *,
    vector_ND: np.ndarray | None = None,
    existing_MD: np.ndarray | None = None,
    near_vector: float = 0.95,
    near_text: float = 0.9,
) -> list[str | None]:
    """Why each question is not kept; None for those that are.

    The first reason counts, in this order: form, same_text (normalised), near_text, near_vector. Of questions that
    repeat each other the first is kept, and one that was not kept makes no other a repetition.

    near_text is the cosine of counts of character 3- to 5-grams. Only questions with the same numbers are compared by
    it: "Who won the 1994 World Cup?" and "... 1998 ..." differ in two characters, and are two questions.

    Args:
        questions: N, in the order in which they are to be preferred.
        existing: M questions that must not be repeated.
        vector_ND, existing_MD: unit vectors of both; without them nothing is near_vector.
        near_vector, near_text: cosines above which questions repeat each other.
    """
    reasons = [form_reason(question) for question in questions]
    texts = [normalize(text) for text in (*existing, *questions)]
    seen = set(texts[: len(existing)])
    for place, text in enumerate(texts[len(existing) :]):
        if reasons[place] is None:
            reasons[place] = SAME_TEXT if text in seen else None
            seen.add(text)
    vectorizer = HashingVectorizer(analyzer="char_wb", ngram_range=(3, 5), alternate_sign=False)
    numbers = ["/".join(_DIGITS.findall(text)) for text in texts]
    _mark_near(reasons, vectorizer.transform(texts), NEAR_TEXT, near_text, alike=numbers)
    if vector_ND is not None:
        held = np.zeros((0, vector_ND.shape[1])) if existing_MD is None else existing_MD
        _mark_near(reasons, np.concatenate([held, vector_ND]), NEAR_VECTOR, near_vector)
    return reasons


def counted(reasons: Sequence[str | None]) -> Counter[str]:
    """How many questions were not kept, by reason."""
    return Counter(reason for reason in reasons if reason is not None)


def answer_reason(question: str, answer: str, passage: str) -> str | None:
    """Why a question cannot be kept for the LLM's answer to it, or None."""
    if not is_answered(answer, passage):
        return NO_ROUND_TRIP
    gives = f" {normalize(answer)} " in f" {normalize(question)} "
    return GIVES_ANSWER if gives else None


def is_answered(answer: str, passage: str, *, overlap: float = 0.8) -> bool:
    """Whether an LLM's answer occurs in the passage: the round trip of a generated question.

    It does if its normalised words (SQuAD's normalisation) stand there in a row, or if at least the share `overlap` of
    them stand within a stretch of twice their number: scattered over a passage, common words would prove nothing.
    An empty answer does not occur.
    """
    said, words = normalize(answer).split(), normalize(passage).split()
    if not said:
        return False
    width, wanted = 2 * len(said), Counter(said)
    for start in range(max(1, len(words) - width + 1)):
        if (wanted & Counter(words[start : start + width])).total() >= overlap * len(said):
            return True
    return False


def _mark_near(
    reasons: list[str | None],
    unit_PD: np.ndarray | sparse.csr_matrix,
    reason: str,
    limit: float,
    alike: Sequence[str] | None = None,
) -> None:
    """Gives the reason to questions nearer than `limit` to an existing one or to a kept one before them.

    Args:
        reasons: of the N questions; those that have one are passed over.
        unit_PD: unit vectors of the existing questions and then of the N.
        reason, limit: see above.
        alike: of all P, what must be equal for two to be compared; None: any two are.
    """
    num_existing = unit_PD.shape[0] - len(reasons)
    kind_P = np.zeros(unit_PD.shape[0], np.int64) if alike is None else np.unique(alike, return_inverse=True)[1]
    is_kept_P = np.asarray([True] * num_existing + [reason is None for reason in reasons])
    for start in range(num_existing, len(is_kept_P), _BLOCK):
        stop = min(start + _BLOCK, len(is_kept_P))
        product = unit_PD[start:stop] @ unit_PD[:stop].T
        near_BP = (product.toarray() if sparse.issparse(product) else product) > limit
        near_BP &= kind_P[start:stop, None] == kind_P[None, :stop]
        for row in np.flatnonzero(is_kept_P[start:stop]) + start:
            if (near_BP[row - start, :row] & is_kept_P[:row]).any():
                is_kept_P[row], reasons[row - num_existing] = False, reason
