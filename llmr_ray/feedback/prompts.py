"""The texts by which an LLM judges candidates: templates of LLM-Embedder (methods.md A.4.2), one per task.

A prompt is a tuple of segments, so that the engine can shorten it: the candidate first, then the context, then the
query, never the desired output. Without a document the candidate's part of the template is left out, which is the
"no retrieval" of the rank-aware reward (A.4.1).

Prompt and desired output joined are exactly the template. Only tokens of the desired output are scored, so a newline
before it (icl) ends the prompt and is no part of the target; a space before it ("Answer: x") begins the target,
because tokenizers merge a space with the word after it and would split "Answer: " from "x" in another way.
"""

from collections.abc import Mapping
from typing import Any

from llmr_ray.data.text import document_text
from llmr_ray.errors import ConfigError
from llmr_ray.feedback.requests import Segment

PROMPTS_VERSION = 3
"""Raised whenever a template, its trimming or its stop strings change; part of what determines llm_scores."""

EXAMPLE_END = {"llm_embedder": "\n", "llm_r": "\n\n"}
"""What stands between an example and what follows it, by layout."""

_CANDIDATE, _CONTEXT, _QUERY = 1, 2, 3
_SPACED = frozenset({"qa", "convsearch", "chat"})
_STOP = {"qa": ("\n",), "convsearch": ("\n",), "icl": ("\n",), "chat": ("\n",), "lrlm": ()}


def candidate_text(task: str, document: Mapping[str, Any]) -> str:
    """What the LLM reads of a document: title, text and continuation; stripped, except for lrlm where text is exact."""
    text = document_text(document.get("title"), document["text"]) + (document["continuation"] or "")
    return text if task == "lrlm" else text.strip()


def feedback_segments(
    task: str,
    query_row: Mapping[str, Any],
    doc_row: Mapping[str, Any] | None,
    *,
    max_candidate_tokens: int = 0,
    layout: str = "llm_embedder",
) -> tuple[Segment, ...]:
    """The prompt before the desired output.

    ===============  ================================================================
    qa, convsearch   ``Knowledge: {candidate}⏎⏎Question: {query}⏎⏎Answer:``
    icl              ``{candidate}⏎{query}⏎``
    chat             ``{candidate}⏎Speaker 1: {query}⏎Speaker 2:``
    lrlm             ``{candidate}{context}{query}`` with no separator
    ===============  ================================================================

    Args:
        task: qa, convsearch, icl, chat or lrlm.
        query_row: a row of `queries`.
        doc_row: a row of `corpus`, or None for the form without retrieval.
        max_candidate_tokens: the candidate is cut to this many LLM tokens in any case (published: 512; 0: no limit).
        layout: llm_embedder, or llm_r: an example is followed by a blank line (methods.md B.4).

    Raises:
        ConfigError: the task has no template (tools are trained on labels, methods.md A.4.2).
    """
    text = "" if doc_row is None else candidate_text(task, doc_row)
    # An example's answer stands at its end: what is left of it must be that.
    side = "left" if task == "icl" else "right"
    candidate = Segment(text=text, trim_order=_CANDIDATE, trim_side=side, max_tokens=max_candidate_tokens)
    # Cut on the left: the question itself stands at the end of a query that carries its history.
    query = Segment(text=_exact(task, query_row["query"]), trim_order=_QUERY, trim_side="left")
    shown: tuple[Segment, ...] = ()
    match task:
        case "qa" | "convsearch":
            if doc_row is not None:
                shown = (Segment(text="Knowledge: "), candidate, Segment(text="\n\n"))
            return (*shown, Segment(text="Question: "), query, Segment(text="\n\nAnswer:"))
        case "icl":
            if doc_row is not None:
                shown = (candidate, Segment(text=EXAMPLE_END[layout], separates=True))
            return (*shown, query, Segment(text="\n"))
        case "chat":
            if doc_row is not None:
                shown = (candidate, Segment(text="\n", separates=True))
            return (*shown, Segment(text="Speaker 1: "), query, Segment(text="\nSpeaker 2:"))
        case "lrlm":
            context = Segment(text=str(query_row["context"] or ""), trim_order=_CONTEXT, trim_side="left")
            return (*(() if doc_row is None else (candidate,)), context, query)
    raise ConfigError(
        f"task '{task}' has no feedback prompt, so `tasks.{task}.score.feedback` must be none. Tasks with one: "
        f"{', '.join(_STOP)}."
    )


def target_text(task: str, target: str) -> str:
    """The desired output as it continues the prompt: with its leading space where the template has one (not for icl and
    lrlm, whose prompts end right where the output begins)."""
    return (" " if task in _SPACED else "") + _exact(task, target)


def stop_strings(task: str) -> tuple[str, ...]:
    """Where a sampled output ends: the line, except for lrlm, whose outputs are running text (our choice: the papers
    give no stop rule, and a small LLM otherwise goes on to invent the next question)."""
    return _STOP[task]


def continues_text(task: str) -> bool:
    """Whether the desired output goes on in the prompt's own text, so that no chat template fits around the prompt."""
    return task == "lrlm"


def _exact(task: str, text: str) -> str:
    return text if task == "lrlm" else text.strip()
