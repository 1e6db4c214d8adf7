"""Memory: the perplexity of what comes next, with retrieved turns or chunks before it (methods.md A.7, G).

Every row of the table scores the same tokens of the desired output with the same text right before them; only what is
put in front differs, or the comparison would be void.
"""

from collections.abc import Sequence

from llmr_ray.evaluation.protocols import Judgement, Row, behind, mean_logprob
from llmr_ray.feedback.prompts import candidate_text, continues_text, feedback_segments, target_text
from llmr_ray.feedback.requests import LLMRequest, LLMResult, Segment


def chat_request(request_id: str, query: Row, turns: Sequence[Row], *, document_tokens: int) -> LLMRequest:
    """MSC's template: retrieved turns, ``Speaker 1: {query}``, ``Speaker 2:``; the response is scored.

    Args:
        request_id: names the request.
        query: the current utterance.
        turns: best first; they are put in the order of the dialogue.
        document_tokens: a turn is cut to this many tokens in any case.
    """
    segments: list[Segment] = []
    for order, turn in _in_text_order(turns):
        segments += [
            Segment(text=candidate_text("chat", turn), trim_order=order, max_tokens=document_tokens),
            Segment(text="\n", separates=True),
        ]
    segments += behind(len(turns), feedback_segments("chat", query, None))
    return _scored(request_id, query, segments)


def text_request(
    request_id: str, query: Row, chunks: Sequence[Row], *, document_tokens: int, window_tokens: int
) -> LLMRequest:
    """Long text: retrieved chunks with their continuations, then the recent window; the next chunk is scored.

    Args:
        request_id: names the request.
        query: its `context` and `query` are the text right before the desired output.
        chunks: best first; they are put in the order of the text, without separators (as released).
        document_tokens: a chunk with its continuation is cut to this many tokens in any case.
        window_tokens: the window keeps its last so many tokens.
    """
    segments = [
        Segment(text=candidate_text("lrlm", chunk), trim_order=order, trim_side="left", max_tokens=document_tokens)
        for order, chunk in _in_text_order(chunks)
    ]
    window = (query["context"] or "") + query["query"]
    segments.append(Segment(text=window, trim_order=len(chunks) + 1, trim_side="left", max_tokens=window_tokens))
    return _scored(request_id, query, segments)


def judge(query: Row, result: LLMResult) -> Judgement:
    """The mean NLL of the desired output, from which perplexity is made as exp of the mean over queries."""
    return Judgement({"perplexity": -mean_logprob(result.token_logprobs[0], query)}, None)


def _in_text_order(documents: Sequence[Row]) -> list[tuple[int, Row]]:
    """Documents by position, each with its trim order: the least relevant loses text first."""
    ranked = [(len(documents) - rank, document) for rank, document in enumerate(documents)]
    return sorted(ranked, key=lambda item: int(item[1]["position"]))


def _scored(request_id: str, query: Row, segments: Sequence[Segment]) -> LLMRequest:
    target = target_text(query["task"], query["targets"][0])
    return LLMRequest(
        request_id=request_id,
        unit=query["query_id"],
        segments=tuple(segments),
        targets=(target,),
        continues_text=continues_text(query["task"]),
    )
