"""Examples: a task's input is answered after retrieved demonstrations (methods.md A.7, ICL).

Retrieved are the best examples of any task, as in LLM-Embedder (LLM-R demotes other tasks', so the two papers' numbers
are not comparable). The most similar demonstration stands next to the input and is the last to be cut; the released
code cuts it first (methods.md I.21).
"""

from collections.abc import Sequence

from llmr_ray.errors import DataError
from llmr_ray.evaluation.answers import exact_match, rouge_l, token_f1
from llmr_ray.evaluation.protocols import Judgement, Row, behind, mean_logprob
from llmr_ray.feedback.prompts import candidate_text, feedback_segments, stop_strings, target_text
from llmr_ray.feedback.requests import LLMRequest, LLMResult, Segment

SHORT_ANSWERS = frozenset({"nq_open", "natural_questions", "squad_v1"})
"""Data sets of short answers, judged by exact match; other generation is judged by ROUGE-L."""

MAIN_MEASURES = ("accuracy", "EM", "ROUGE-L")
"""A data set's score in the average is the one of these that it has."""


def request(
    request_id: str, query: Row, demonstrations: Sequence[Row], *, demonstration_tokens: int, max_new_tokens: int
) -> LLMRequest:
    """Demonstrations, each on its line(s), the most similar last; then the input. Options are scored, else generation.

    Args:
        request_id: names the request.
        query: a task's input, with `options` when one of them is to be chosen.
        demonstrations: best first.
        demonstration_tokens: a demonstration is cut to this many tokens in any case; on the left, because its answer
            stands at its end.
        max_new_tokens: of a generated answer.
    """
    segments: list[Segment] = []
    for order, demonstration in enumerate(reversed(demonstrations), 1):
        segments += [
            Segment(
                text=candidate_text("icl", demonstration),
                trim_order=order,
                trim_side="left",
                max_tokens=demonstration_tokens,
            ),
            Segment(text="\n"),
        ]
    segments += behind(len(demonstrations), feedback_segments("icl", query, None))
    unit = query["query_id"]
    if query["options"]:
        targets = tuple(target_text("icl", option) for option in query["options"])
        return LLMRequest(request_id=request_id, unit=unit, segments=tuple(segments), targets=targets)
    return LLMRequest(
        request_id=request_id,
        unit=unit,
        segments=tuple(segments),
        num_samples=1,
        max_new_tokens=max_new_tokens,
        temperature=0.0,
        stop=stop_strings("icl"),
    )


def judge(query: Row, result: LLMResult) -> Judgement:
    """Accuracy of the option with the highest mean log-probability (the first of equals), EM and F1, or ROUGE-L."""
    if query["options"]:
        if query["gold_option"] is None:
            raise DataError(f"query {query['query_id']} has options but no gold_option, so no choice can be right.")
        scores = [mean_logprob(logprobs, query) for logprobs in result.token_logprobs]
        chosen = scores.index(max(scores))
        return Judgement({"accuracy": float(chosen == query["gold_option"])}, query["options"][chosen])
    output, targets = result.texts[0].strip(), query["targets"]
    if query["dataset"] in SHORT_ANSWERS:
        return Judgement({"EM": exact_match(output, targets), "F1": token_f1(output, targets)}, output)
    return Judgement({"ROUGE-L": rouge_l(output, targets)}, output)
