"""Labels of a query's candidates: which calls the LLM gets, and the llm_scores rows their answers make (labels.py).

Each vote asks about all candidates once, dealt at random to calls of at most `passages_per_call`: where a passage
stands, and beside what, changes what an LLM says of it. What an answer gives no label for is asked once more, in the
opposite order, and is a row error then.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmr_ray.artifacts import Counts, canonical_json, seed_of
from llmr_ray.config import TaskScore
from llmr_ray.errors import ConfigError
from llmr_ray.feedback import labels
from llmr_ray.feedback.jobs import Job, Row
from llmr_ray.feedback.labels import Label, Said
from llmr_ray.feedback.prompts import candidate_text
from llmr_ray.feedback.requests import LLMRequest, LLMResult

KIND = "label"

_MIN_PASSAGE_TOKENS = 16
_ID_TOKENS = 5


@dataclass(frozen=True, kw_only=True)
class Call:
    """Passages that are shown together."""

    request_id: str
    vote: int
    documents: tuple[Row, ...]


def first_requests(job: Job) -> list[LLMRequest]:
    """One request per call of every vote."""
    return [_request(job, call) for call in _first_calls(job)]


def second_requests(job: Job, first: Mapping[str, LLMResult]) -> list[LLMRequest]:
    """What was answered but rejected, once more. Requests that failed are not asked again here: they would fail again.

    Args:
        job: the query.
        first: the job's results of the first round, by request id.
    """
    return [_request(job, call) for call in _second_calls(job, first)]


def label_rows(
    job: Job, scorer_id: str, first: Mapping[str, LLMResult], second: Mapping[str, LLMResult]
) -> tuple[list[dict[str, Any]], Counts]:
    """The llm_scores rows of a query, one per pair, and their accounting.

    A pair without a label in any of its votes is quarantined under the reason of the first such vote.

    Args:
        job: the query.
        scorer_id: what answered.
        first, second: the job's own results of both rounds, by request id.
    """
    results = [*first.values(), *second.values()]
    counts = Counts(
        rows_in=len(job.documents),
        llm_tokens=sum(result.num_computed_tokens for result in results),
        llm_tokens_least=sum(result.num_least_tokens for result in results),
        label_requests=len(results),
    )
    said: dict[tuple[str, int], Said | str] = {}
    answers: dict[str, list[LLMResult]] = defaultdict(list)
    for calls, found in ((_first_calls(job), first), (_second_calls(job, first), second)):
        for call in calls:
            for doc_id, of_document in _said(call, found[call.request_id]).items():
                said[doc_id, call.vote] = of_document
                answers[doc_id].append(found[call.request_id])
    rows = []
    gold = labels.gold_answers(job.query["targets"])
    for document, rule in zip(job.documents, job.rules, strict=True):
        doc_id = str(document["doc_id"])
        votes = [said[doc_id, vote] for vote in range(job.settings.label_votes)] if rule is None else []
        label = rule if rule is not None else _judged(job, votes, candidate_text(job.task, document), gold)
        if rule is not None:
            counts.skipped[rule] += 1
        elif isinstance(label, str):
            counts.quarantined[label] += 1
        elif all(result.cached for result in answers[doc_id]):
            counts.cached += 1
        else:
            counts.ok += 1
        row = {"query_id": job.query_id, "doc_id": doc_id, "scorer_id": scorer_id, "kind": KIND, "num_target_tokens": 0}
        row |= _reading(answers[doc_id])
        if isinstance(label, Label):
            row |= {"label": label.score, "evidence": label.evidence, "flags": list(label.flags)}
        else:
            row["error"] = label
        rows.append(row)
    return rows, counts


def num_requests(num_pairs: int, settings: TaskScore) -> int:
    """Requests that label so many pairs of a query; those that ask once more not counted."""
    return settings.label_votes * -(-num_pairs // settings.passages_per_call)


def to_pay(job: Job, stored: Callable[[Sequence[LLMRequest]], list[LLMResult | None]]) -> tuple[int, int]:
    """(pairs that still need the LLM, estimated LLM tokens), given what the store holds.

    An answer is taken as half as long as it may be. What will be rejected, and asked again, cannot be known before.
    """
    calls, requests = _first_calls(job), first_requests(job)
    found = stored(requests)
    known = {request.request_id: result for request, result in zip(requests, found, strict=True) if result is not None}
    answered = [call for call in calls if call.request_id in known]
    again = list(_again(answered, known))
    calls, requests = [*calls, *again], [*requests, *(_request(job, call) for call in again)]
    found += stored(requests[len(found) :])
    missing = {
        document["doc_id"]
        for call, result in zip(calls, found, strict=True)
        if result is None
        for document in call.documents
    }
    tokens = sum(
        request.estimated_prompt_tokens + request.max_new_tokens // 2
        for request, result in zip(requests, found, strict=True)
        if result is None
    )
    return len(missing), tokens


def _first_calls(job: Job) -> list[Call]:
    calls = []
    for vote in range(job.settings.label_votes if job.asked else 0):
        order = np.random.default_rng(seed_of(job.seed, "label", job.query_id, vote)).permutation(len(job.asked))
        dealt = np.array_split(order, -(-len(order) // job.settings.passages_per_call))
        for number, places in enumerate(dealt):
            documents = tuple(job.asked[place] for place in places)
            calls.append(
                Call(request_id=canonical_json([KIND, job.query_id, vote, number]), vote=vote, documents=documents)
            )
    return calls


def _second_calls(job: Job, first: Mapping[str, LLMResult]) -> list[Call]:
    return list(_again(_first_calls(job), first))


def _again(calls: Sequence[Call], results: Mapping[str, LLMResult]) -> Iterator[Call]:
    """For each answered call what was rejected of it, in the opposite order."""
    for call in calls:
        if results[call.request_id].error is None:
            said = _said(call, results[call.request_id])
            rejected = tuple(document for document in call.documents if isinstance(said[document["doc_id"]], str))
            if rejected:
                name = canonical_json([call.request_id, "again"])
                yield Call(request_id=name, vote=call.vote, documents=rejected[::-1])


def _said(call: Call, result: LLMResult) -> dict[str, Said | str]:
    """By document."""
    doc_ids = [str(document["doc_id"]) for document in call.documents]
    if result.error is not None:
        return dict.fromkeys(doc_ids, result.error)
    return dict(zip(doc_ids, labels.parse_answer(result.texts[0], len(doc_ids)).values(), strict=True))


def _judged(job: Job, votes: Sequence[Said | str], passage: str, gold: Sequence[str]) -> Label | str:
    rejected = next((vote for vote in votes if isinstance(vote, str)), None)
    if rejected is not None:
        return rejected
    chars, check = job.settings.evidence_chars, job.settings.check_evidence
    said = [vote for vote in votes if isinstance(vote, Said)]
    return labels.combined([labels.checked(vote, passage, gold, chars, check_evidence=check) for vote in said])


def _reading(answers: Sequence[LLMResult]) -> dict[str, Any]:
    """What the LLM read for a document: of the last answer about it, but cut short if it ever was."""
    read = [answer for answer in answers if answer.error is None]
    return {
        "num_prompt_tokens": read[-1].num_prompt_tokens if read else 0,
        "truncated": any(answer.truncated for answer in read),
        "prompt_sha": read[-1].prompt_sha if read else "",
    }


def _request(job: Job, call: Call) -> LLMRequest:
    count = len(call.documents)
    passages = [candidate_text(job.task, document) for document in call.documents]
    return LLMRequest(
        request_id=call.request_id,
        unit=job.query_id,
        segments=labels.label_segments(job.query["query"], passages, _passage_tokens(job, count)),
        num_samples=1,
        temperature=0.0,
        max_new_tokens=labels.answer_tokens(count, job.settings.evidence_chars),
        output_schema=labels.answer_schema(count, job.settings.evidence_chars),
    )


def _passage_tokens(job: Job, count: int) -> int:
    """What a call's passages may have each, so that all fit: cut later, the first would lose all and the last none."""
    answer = labels.answer_tokens(count, job.settings.evidence_chars)
    room = (job.max_model_tokens - answer - labels.FRAME_TOKENS - labels.QUERY_TOKENS) // count - _ID_TOKENS
    if room < _MIN_PASSAGE_TOKENS:
        raise ConfigError(
            f"llm.max_model_tokens is {job.max_model_tokens}, of which {count} passages and their labels leave {room} "
            f"tokens for each passage; fewer than {_MIN_PASSAGE_TOKENS} say nothing. Raise it, or lower "
            f"tasks.{job.task}.score.passages_per_call or evidence_chars."
        )
    return min(room, job.max_candidate_tokens or room)
