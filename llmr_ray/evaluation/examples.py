"""Examples: a task's input is answered after retrieved demonstrations, by the protocol of LLM-Embedder or of LLM-R.

The two papers' numbers are not comparable (methods.md I.24). LLM-Embedder (A.7) retrieves examples of any task, joins
them by newlines and chooses the option with the highest mean log-probability. LLM-R (B.9) puts other tasks' examples
behind those of the query's own, joins by blank lines, and decodes the label of a classification greedily.

The most similar demonstration stands next to the input and is the last to be cut; LLM-Embedder's code cuts it first
(I.21).
"""

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from llmr_ray.data.example_tasks import TASKS, ExampleTask
from llmr_ray.errors import DataError
from llmr_ray.evaluation.answers import exact_match, rouge_l, token_f1
from llmr_ray.evaluation.protocols import POSITIVE_F1, Judgement, Ranking, Row, behind, likeliest
from llmr_ray.feedback.prompts import EXAMPLE_END, candidate_text, feedback_segments, stop_strings, target_text
from llmr_ray.feedback.requests import LLMRequest, LLMResult, Segment

MAIN_MEASURES = ("accuracy", "EM", "ROUGE-L")
"""A data set's score in an average is the first of these that it has, where its task does not say F1."""

DEMOTION_DEPTH = 5
"""Demotion looks at so many times the demonstrations (B.9)."""


def main_measure(dataset: str, measures: Collection[str]) -> str | None:
    """The measure of `measures` that is a data set's score in averages."""
    if dataset in TASKS and TASKS[dataset].metric == "F1" and POSITIVE_F1 in measures:
        return POSITIVE_F1
    return next((measure for measure in MAIN_MEASURES if measure in measures), None)


def demoted(ranking: Ranking, owners: Mapping[str, str | None], own: str, num_demonstrations: int) -> Ranking:
    """The head of a ranking, examples of other tasks behind all of the task `own`, otherwise in order.

    Args:
        ranking: best first.
        owners: document id -> the task that it is an example of.
        own: the query's.
        num_demonstrations: of the prompt; the head is DEMOTION_DEPTH times as long.
    """
    head = ranking[: DEMOTION_DEPTH * num_demonstrations]
    return sorted(head, key=lambda found: owners.get(found[0]) != own)


def request(
    request_id: str,
    query: Row,
    demonstrations: Sequence[Row],
    *,
    demonstration_tokens: int,
    max_new_tokens: int,
    protocol: str = "llm_embedder",
    cut: str = "least_similar",
    option_space: bool = False,
) -> LLMRequest:
    """Demonstrations, the most similar last; then the input on a line. Options are scored, else an answer is generated.

    Args:
        request_id: names the request.
        query: a task's input, with `options` when one of them is to be chosen.
        demonstrations: best first.
        demonstration_tokens: a demonstration is cut to this many tokens in any case (0: not); on the left, because its
            answer stands at its end.
        max_new_tokens: of a generated answer.
        cut: which demonstrations a prompt that is too long loses first, least_similar or most_similar.
        protocol: llm_embedder (a newline behind each demonstration) or llm_r (a blank line; an answer is never empty).
        option_space: a space stands before a scored option, as in LLM-Embedder's released code (A.7).
    """
    segments: list[Segment] = []
    orders = range(1, len(demonstrations) + 1)
    for order, demonstration in zip(
        orders if cut == "least_similar" else reversed(orders), reversed(demonstrations), strict=True
    ):
        segments += [
            Segment(
                text=candidate_text("icl", demonstration),
                trim_order=order,
                trim_side="left",
                max_tokens=demonstration_tokens,
            ),
            Segment(text=EXAMPLE_END[protocol], separates=True),
        ]
    segments += behind(len(demonstrations), feedback_segments("icl", query, None))
    unit = query["query_id"]
    if query["options"]:
        space = " " if option_space else ""
        targets = tuple(space + target_text("icl", option) for option in query["options"])
        return LLMRequest(request_id=request_id, unit=unit, segments=tuple(segments), targets=targets)
    return LLMRequest(
        request_id=request_id,
        unit=unit,
        segments=tuple(segments),
        num_samples=1,
        max_new_tokens=max_new_tokens,
        temperature=0.0,
        stop=stop_strings("icl"),
        says_something=protocol == "llm_r",
    )


def judge(query: Row, result: LLMResult, *, protocol: str = "llm_embedder") -> Judgement:
    """Accuracy of the chosen option (and F1 of a positive label), EM and token F1 of a short answer, or ROUGE-L."""
    task = TASKS.get(query["dataset"])
    if query["options"]:
        return _choice(query, result, task, protocol)
    output, targets = result.texts[0].strip(), query["targets"]
    if task is not None and task.metric == "EM":
        normalization = task.normalization if protocol == "llm_r" else "squad"
        return Judgement(
            {"EM": exact_match(output, targets, normalization), "F1": token_f1(output, targets, normalization)}, output
        )
    return Judgement({"ROUGE-L": rouge_l(output, targets)}, output)


def _choice(query: Row, result: LLMResult, task: ExampleTask | None, protocol: str) -> Judgement:
    options, gold = query["options"], query["gold_option"]
    if gold is None:
        raise DataError(f"query {query['query_id']} has options but no gold_option, so no choice can be right.")
    if protocol == "llm_r" and task is not None and task.kind == "labels":
        chosen = constrained_choice(options, result.token_logprobs)
    else:
        chosen = likeliest(query, result)
    values = {"accuracy": float(chosen == gold)}
    if task is not None and task.positive_label:
        said, meant = (options[number] == task.positive_label for number in (chosen, gold))
        values[POSITIVE_F1] = float(2 * said + meant)
    return Judgement(values, options[chosen])


def constrained_choice(labels: Sequence[str], token_logprobs: Sequence[Sequence[float]]) -> int:
    """The label at which greedy decoding arrives when no token is allowed but those of the labels (B.9).

    Labels of which no two begin with the same byte part at their first token, whatever the tokenizer; from there on a
    single token is allowed at each step, up to the newline that ends the label. So the likeliest first token decides,
    which the labels' own log-probabilities tell, and no engine has to decode under constraints.

    Args:
        labels: the options.
        token_logprobs: of each label's tokens after the prompt.

    Raises:
        DataError: two labels begin alike, or one has no tokens.
    """
    if len({label.encode()[0] for label in labels}) != len(labels):
        raise DataError(
            f"the labels {list(labels)} do not differ in their first letter, so their first tokens may be the same and "
            "the likeliest one decides nothing. Evaluate with evaluate.icl_protocol=llm_embedder."
        )
    if not all(token_logprobs):
        raise DataError(f"one of the labels {list(labels)} has no tokens after its prompt, so it has no likelihood.")
    return int(np.argmax([logprobs[0] for logprobs in token_logprobs]))
