"""Questions as LLM-Embedder's evaluator asks them (methods.md A.7): MMLU, PopQA and Natural Questions.

What is retrieved stands first in all three, the least relevant passage loses text first, and the question is cut last.

    mmlu    ``Knowledge:⏎p1⏎p2⏎p3``, the subject, the question and its options; the likeliest letter is chosen. Subjects
            count alike, however many questions they have.
    popqa   ``Knowledge: p1⏎p2⏎p3``, a demonstration of each relation but the question's own, ``Q: … A:``
    nq      the same with ten demonstrations of the development split, ``Question: …⏎Answer:``
"""

import json
import string
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from llmr_ray.artifacts import seed_of
from llmr_ray.data.splits import lowest
from llmr_ray.errors import DataError
from llmr_ray.evaluation import knowledge
from llmr_ray.evaluation.protocols import Judgement, Protocol, Row, behind, likeliest
from llmr_ray.feedback.prompts import stop_strings
from llmr_ray.feedback.requests import LLMRequest, LLMResult, Segment

NQ_DEMONSTRATIONS = 10

_BY_CATEGORY = {
    "STEM": (
        "abstract_algebra astronomy college_biology college_chemistry college_computer_science college_mathematics "
        "college_physics computer_security conceptual_physics electrical_engineering elementary_mathematics "
        "high_school_biology high_school_chemistry high_school_computer_science high_school_mathematics "
        "high_school_physics high_school_statistics machine_learning"
    ),
    "Social": (
        "econometrics high_school_geography high_school_government_and_politics high_school_macroeconomics "
        "high_school_microeconomics high_school_psychology human_sexuality professional_psychology public_relations "
        "security_studies sociology us_foreign_policy"
    ),
    "Human": (
        "formal_logic high_school_european_history high_school_us_history high_school_world_history "
        "international_law jurisprudence logical_fallacies moral_disputes moral_scenarios philosophy prehistory "
        "professional_law world_religions"
    ),
    "Other": (
        "anatomy business_ethics clinical_knowledge college_medicine global_facts human_aging management marketing "
        "medical_genetics miscellaneous nutrition professional_accounting professional_medicine virology"
    ),
}

MMLU_CATEGORIES = {subject: category for category, names in _BY_CATEGORY.items() for subject in names.split()}
"""The 57 subjects of MMLU, each with its category (Hendrycks et al., 2009.03300)."""


def protocol(
    name: str, queries: Sequence[Row], *, num_passages: int, passage_tokens: int, match: str, seed: int
) -> Protocol:
    """The LLM half of a data set.

    Args:
        name: mmlu, popqa or nq.
        queries: of the data set, all that are prepared: demonstrations come from them.
        num_passages: of the prompt.
        passage_tokens: a passage is cut to this many tokens in any case (0: not).
        match: evaluate.answer_match.
        seed: of the run; draws demonstrations.

    Raises:
        DataError: the data set has no demonstrations.
    """
    request: Callable[..., LLMRequest]
    judge: Callable[[Row, LLMResult], Judgement] = partial(knowledge.judge, match=match)
    match name:
        case "mmlu":
            request, judge = mmlu_request, mmlu_judge
        case "popqa":
            request = partial(popqa_request, by_relation=_by_relation(queries), seed=seed)
        case _:
            request = partial(nq_request, demonstrations=_of_development(queries))
    return Protocol(num_documents=num_passages, request=partial(request, passage_tokens=passage_tokens), judge=judge)


# --- MMLU ------------------------------------------------------------------------------------------------------------


def mmlu_request(request_id: str, query: Row, passages: Sequence[Row], *, passage_tokens: int) -> LLMRequest:
    """Passages, one a line; ``The following are multiple choice questions (with answers) about {subject}.``; the
    question; its options by letters, one a line; ``Answer:``. The letters are scored.

    Raises:
        DataError: the question has no options, or its subject is none of MMLU's.
    """
    options, subject = query["options"], _subject(query)
    if not options or query["gold_option"] is None:
        raise DataError(
            f"question {query['query_id']} has no options or no right one, but evaluate.qa_protocols asks its data set "
            "as MMLU. Take another protocol."
        )
    letters = _letters(options)
    choices = "".join(f"\n{letter}. {option}" for letter, option in zip(letters, options, strict=True))
    told = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
    rest = [Segment(text=told), _question(query["query"]), Segment(text=f"{choices}\nAnswer:")]
    return LLMRequest(
        request_id=request_id,
        unit=query["query_id"],
        segments=_behind("Knowledge:\n", passages, passage_tokens, rest),
        targets=tuple(f" {letter}" for letter in letters),
    )


def mmlu_judge(query: Row, result: LLMResult) -> Judgement:
    """Accuracy of the likeliest letter, a value of the question's subject."""
    chosen = likeliest(query, result)
    accuracy = {"accuracy": float(chosen == query["gold_option"])}
    return Judgement(accuracy, _letters(query["options"])[chosen], stratum=_subject(query))


def _subject(query: Row) -> str:
    subject = _meta(query).get("subject")
    if subject not in MMLU_CATEGORIES:
        raise DataError(
            f"question {query['query_id']} is of the subject '{subject}', which is none of MMLU's 57, so it counts "
            "in no category. Take another protocol in evaluate.qa_protocols, or repair the data."
        )
    return str(subject)


def _letters(options: Sequence[str]) -> str:
    return string.ascii_uppercase[: len(options)]


# --- PopQA, Natural Questions ----------------------------------------------------------------------------------------

_Demonstration = tuple[str, str]
"""A question and its answer."""


def popqa_request(
    request_id: str,
    query: Row,
    passages: Sequence[Row],
    *,
    by_relation: Mapping[str, Sequence[_Demonstration]],
    passage_tokens: int,
    seed: int,
) -> LLMRequest:
    """Passages, a question of each other relation with its answer, and the question; 16 tokens are generated."""
    own = _relation(query)
    shown = [
        of_relation[seed_of(seed, "popqa", query["query_id"], relation) % len(of_relation)]
        for relation, of_relation in by_relation.items()
        if relation != own
    ]
    told = "".join(f"Q: {question} A: {answer}\n\n" for question, answer in shown)
    rest = [Segment(text=f"{told}Q: "), _question(query["query"]), Segment(text=" A:")]
    return _generated(request_id, query, _behind("Knowledge: ", passages, passage_tokens, rest), 16)


def nq_request(
    request_id: str,
    query: Row,
    passages: Sequence[Row],
    *,
    demonstrations: Sequence[_Demonstration],
    passage_tokens: int,
) -> LLMRequest:
    """Passages, the demonstrations and the question; 32 tokens are generated."""
    told = "".join(f"Question: {question}\nAnswer: {answer}\n\n" for question, answer in demonstrations)
    rest = [Segment(text=f"{told}Question: "), _question(query["query"]), Segment(text="\nAnswer:")]
    return _generated(request_id, query, _behind("Knowledge: ", passages, passage_tokens, rest), 32)


def _by_relation(queries: Sequence[Row]) -> dict[str, list[_Demonstration]]:
    """The test questions of each relation, by its number, with their objects as answers."""
    found: dict[str, list[_Demonstration]] = defaultdict(list)
    for query in sorted(queries, key=lambda query: str(query["query_id"])):
        if query["split"] == "test":
            found[_relation(query)].append((query["query"].strip(), str(_meta(query)["obj"]).strip()))
    return {relation: found[relation] for relation in sorted(found)}


def _relation(query: Row) -> str:
    meta = _meta(query)
    if meta.get("prop_id") is None or meta.get("obj") is None:
        raise DataError(
            f"question {query['query_id']} has no relation (prop_id) or no object (obj), of which the demonstrations "
            "of PopQA are made. Take another protocol in evaluate.qa_protocols."
        )
    return str(meta["prop_id"])


def _of_development(queries: Sequence[Row]) -> list[_Demonstration]:
    """The development questions that come first by a hash of the id."""
    usable = {query["query_id"]: query for query in queries if query["split"] == "dev" and query["targets"]}
    if len(usable) < NQ_DEMONSTRATIONS:
        raise DataError(
            f"evaluate.qa_protocols asks a data set as Natural Questions, after {NQ_DEMONSTRATIONS} demonstrations of "
            f"its development split, but {len(usable)} development questions with answers are prepared. Raise num_dev "
            "of the data set, or take another protocol."
        )
    dataset = next(iter(usable.values()))["dataset"]
    chosen = sorted(lowest(dataset, usable, NQ_DEMONSTRATIONS))
    return [(usable[name]["query"].strip(), usable[name]["targets"][0].strip()) for name in chosen]


# --- what they share -------------------------------------------------------------------------------------------------


def _behind(head: str, passages: Sequence[Row], passage_tokens: int, rest: Sequence[Segment]) -> tuple[Segment, ...]:
    """Passages and a blank line, where there are any, before the rest of a prompt."""
    known = knowledge.shown(head, passages, passage_tokens)
    return (*known, *([Segment(text="\n\n")] if known else []), *behind(len(passages), rest))


def _question(text: str) -> Segment:
    return Segment(text=text.strip(), trim_order=1, trim_side="left")


def _generated(request_id: str, query: Row, segments: tuple[Segment, ...], max_new_tokens: int) -> LLMRequest:
    """Greedy decoding up to the first line break."""
    return LLMRequest(
        request_id=request_id,
        unit=query["query_id"],
        segments=segments,
        num_samples=1,
        max_new_tokens=max_new_tokens,
        temperature=0.0,
        stop=stop_strings("qa"),
    )


def _meta(query: Row) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(query["meta"] or "{}")
    return found
