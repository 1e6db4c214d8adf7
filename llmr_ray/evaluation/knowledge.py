"""Knowledge: a question is answered with the retrieved passages before it (methods.md A.4.2 template, A.7).

Zero-shot, greedy, up to the first line break. The paper puts 15 demonstrations of PopQA's own test file before the
question; a reader that has seen other test questions says less about what was retrieved.
"""

from collections.abc import Sequence

from llmr_ray.evaluation.answers import exact_match, token_f1
from llmr_ray.evaluation.protocols import Judgement, Row, behind
from llmr_ray.feedback.prompts import candidate_text, feedback_segments, stop_strings
from llmr_ray.feedback.requests import LLMRequest, LLMResult, Segment


def request(
    request_id: str, query: Row, passages: Sequence[Row], *, passage_tokens: int, max_new_tokens: int
) -> LLMRequest:
    """``Knowledge: p1⏎p2⏎p3``, blank line, ``Question: q``, blank line, ``Answer:``; no passages, no first part.

    Args:
        request_id: names the request.
        query: a question.
        passages: best first; when the prompt is too long, the least relevant one is cut first.
        passage_tokens: a passage is cut to this many tokens in any case.
        max_new_tokens: of the answer.
    """
    segments: list[Segment] = []
    for rank, passage in enumerate(passages):
        segments += [
            Segment(text="\n" if rank else "Knowledge: "),
            Segment(text=candidate_text("qa", passage), trim_order=len(passages) - rank, max_tokens=passage_tokens),
        ]
    if passages:
        segments.append(Segment(text="\n\n"))
    segments += behind(len(passages), feedback_segments("qa", query, None))
    return LLMRequest(
        request_id=request_id,
        unit=query["query_id"],
        segments=tuple(segments),
        num_samples=1,
        max_new_tokens=max_new_tokens,
        temperature=0.0,
        stop=stop_strings("qa"),
    )


def judge(query: Row, result: LLMResult) -> Judgement:
    """Token F1 and exact match with the best of the accepted answers."""
    output = result.texts[0].strip()
    targets = query["targets"]
    return Judgement({"F1": token_f1(output, targets), "EM": exact_match(output, targets)}, output)
