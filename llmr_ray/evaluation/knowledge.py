"""Knowledge: a question is answered with the retrieved passages before it (methods.md A.4.2 template, A.7).

Greedy, up to the first line break, after a few fixed demonstrations of the form: without them a small LLM ends at once
or repeats the question (seen on development questions). The paper demonstrates with 15 questions of PopQA's own test
file, put between the passages and the question; ours are made up, and stand first, so that passages and question stay
together as in the feedback's template and the demonstrations are computed once. Of a question's options the likeliest
is chosen. Data sets can be asked as the paper asks them (questions.py).
"""

from collections.abc import Sequence

from llmr_ray.errors import DataError
from llmr_ray.evaluation.answers import alias_inside, exact_match, token_f1
from llmr_ray.evaluation.protocols import Judgement, Row, behind, likeliest
from llmr_ray.feedback.prompts import candidate_text, feedback_segments, stop_strings, target_text
from llmr_ray.feedback.requests import LLMRequest, LLMResult, Segment

DEMONSTRATIONS = (
    ("What is the capital of France?", "Paris"),
    ("Who wrote the play Hamlet?", "William Shakespeare"),
    ("Are the Nile and the Amazon both rivers?", "yes"),
    ("In what year did the Second World War end?", "1945"),
    ("Which metal has the chemical symbol Fe?", "iron"),
)
"""Questions with short answers, the same for every query and method."""


def request(
    request_id: str, query: Row, passages: Sequence[Row], *, passage_tokens: int, max_new_tokens: int
) -> LLMRequest:
    """Demonstrations, ``Knowledge: p1⏎p2⏎p3``, ``Question: q``, ``Answer:``, blank lines between; passages may lack.

    Args:
        request_id: names the request.
        query: a question.
        passages: best first; when the prompt is too long, the least relevant one is cut first.
        passage_tokens: a passage is cut to this many tokens in any case.
        max_new_tokens: of the answer.
    """
    return _request(request_id, query, shown("Knowledge: ", passages, passage_tokens), max_new_tokens)


def shown(head: str, passages: Sequence[Row], passage_tokens: int) -> list[Segment]:
    """Passages behind a heading, one a line, best first, the least relevant to be cut first; nothing without any."""
    known = []
    for rank, passage in enumerate(passages):
        known += [
            Segment(text="\n" if rank else head),
            Segment(text=candidate_text("qa", passage), trim_order=len(passages) - rank, max_tokens=passage_tokens),
        ]
    return known


def request_with_evidence(
    request_id: str, query: Row, passages: Sequence[tuple[Row, str]], *, passage_tokens: int, max_new_tokens: int
) -> LLMRequest:
    """As `request`, but the best passage stands last, and each below what is quoted from it (methods.md C.5):
    ``Knowledge: Evidence: e2⏎p2⏎Evidence: e1⏎p1``.

    Args:
        request_id, query, passage_tokens, max_new_tokens: as in `request`.
        passages: with their evidence, best first; one without evidence stands alone. Passages are cut before evidence.
    """
    known: list[Segment] = []
    for rank, (passage, evidence) in reversed([*enumerate(passages)]):
        known.append(Segment(text="\n" if known else "Knowledge: "))
        if evidence:
            quote = Segment(text=" ".join(evidence.split()), trim_order=2 * len(passages) - rank)
            known += [Segment(text="Evidence: "), quote, Segment(text="\n")]
        known.append(
            Segment(text=candidate_text("qa", passage), trim_order=len(passages) - rank, max_tokens=passage_tokens)
        )
    return _request(request_id, query, known, max_new_tokens)


def _request(request_id: str, query: Row, known: Sequence[Segment], max_new_tokens: int) -> LLMRequest:
    """Demonstrations, knowledge, question, which is cut last. Options are scored, else an answer is generated."""
    told = "".join(f"Question: {question}\n\nAnswer: {answer}\n\n" for question, answer in DEMONSTRATIONS)
    segments = [Segment(text=told), *known]
    if known:
        segments.append(Segment(text="\n\n"))
    segments += behind(max(part.trim_order for part in segments), feedback_segments("qa", query, None))
    if query["options"]:
        targets = tuple(target_text("qa", option) for option in query["options"])
        return LLMRequest(request_id=request_id, unit=query["query_id"], segments=tuple(segments), targets=targets)
    return LLMRequest(
        request_id=request_id,
        unit=query["query_id"],
        segments=tuple(segments),
        num_samples=1,
        max_new_tokens=max_new_tokens,
        temperature=0.0,
        stop=stop_strings("qa"),
    )


def judge(query: Row, result: LLMResult, *, match: str = "exact") -> Judgement:
    """Accuracy of the likeliest option; else token F1 and exact match with the best of the accepted answers.

    Args:
        query: a question.
        result: of `request`.
        match: evaluate.answer_match.

    Raises:
        DataError: there are options, but none is the right one.
    """
    if query["options"]:
        if query["gold_option"] is None:
            raise DataError(f"question {query['query_id']} has options but no gold_option, so no choice can be right.")
        chosen = likeliest(query, result)
        return Judgement({"accuracy": float(chosen == query["gold_option"])}, query["options"][chosen])
    output = result.texts[0].strip()
    targets = query["targets"]
    matches = {"exact": exact_match, "alias_inside": alias_inside}[match]
    return Judgement({"F1": token_f1(output, targets), "EM": matches(output, targets)}, output)
