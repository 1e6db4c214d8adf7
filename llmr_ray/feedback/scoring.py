"""Which questions LLM feedback asks, and the llm_scores rows their answers make. Pure functions on rows and results.

Likelihood (methods.md A.4.2): one scoring per candidate. Rank (A.4.1): outputs are sampled without retrieval and scored
together with the desired output; then, per candidate, the same outputs (`shared`) or new ones (`fresh`) are scored
under the prompt with it. So rank feedback takes two rounds of requests: sampling, then scoring. Labels (C.1) are
sampled outputs too; the second round asks again what the first did not answer (label_calls.py).
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llmr_ray.artifacts import Counts, canonical_json, seed_of
from llmr_ray.feedback import label_calls, prompts
from llmr_ray.feedback.jobs import Job, Row
from llmr_ray.feedback.requests import CHARS_PER_TOKEN, LLMClient, LLMRequest, LLMResult
from llmr_ray.feedback.rewards import Draws, distinct_draws, likelihood, rank_of, rank_reward, share_of

LONG_OUTPUT = 16
"""Sampled outputs of so many tokens are read only until their rank is settled; shorter ones are read at once."""

NO_TARGET = "the query has no desired output"


def sampling_requests(job: Job) -> list[LLMRequest]:
    """The first round of rank feedback: N outputs without retrieval, and N per candidate when samples are fresh. The
    first round of labels: all passages."""
    if job.settings.feedback == "label":
        return label_calls.first_requests(job)
    if job.settings.feedback != "rank" or job.target is None or not job.asked:
        return []
    documents: list[Row | None] = [None]
    if job.settings.samples == "fresh":
        documents += job.asked
    return [
        LLMRequest(
            request_id=_request_id("sample", job, document),
            unit=job.query_id,
            segments=_segments(job, document),
            num_samples=job.settings.num_samples,
            max_new_tokens=job.settings.max_new_tokens,
            temperature=job.settings.sample_temperature,
            seed=seed_of(job.seed, "sample", job.query_id, *([] if document is None else [document["doc_id"]])),
            stop=prompts.stop_strings(job.task),
            continues_text=prompts.continues_text(job.task),
        )
        for document in documents
    ]


def scoring_requests(job: Job, samples: Mapping[str, LLMResult]) -> list[LLMRequest]:
    """The second round (the only one of likelihood feedback): the desired output and the draws after each prompt; of
    labels what was rejected in the first.

    Args:
        job: the query.
        samples: the job's results of the first round, by request id; where one failed, what needs it is not asked.
    """
    if job.settings.feedback == "label":
        return label_calls.second_requests(job, samples)
    if job.target is None or not job.asked:
        return []
    documents: list[Row | None] = [None, *job.asked] if job.settings.feedback == "rank" else [*job.asked]
    requests = []
    for document in documents:
        draws = _draws(job, document, samples)
        if document is None and isinstance(draws, str):
            continue
        texts = _other_options(job) if isinstance(draws, str) else (*draws.texts, *_other_options(job))
        requests.append(
            LLMRequest(
                request_id=_request_id("score", job, document),
                unit=job.query_id,
                segments=_segments(job, document),
                targets=tuple(prompts.target_text(job.task, text) for text in (job.target, *texts)),
                max_new_tokens=job.settings.max_new_tokens,
                rank_by=_rank_by(job),
                continues_text=prompts.continues_text(job.task),
            )
        )
    return requests


Results = dict[str, dict[str, LLMResult]]
"""Results by query and request id."""


def ask_jobs(client: LLMClient, jobs: Sequence[Job], label: str) -> tuple[Results, Results]:
    """Asks all of both rounds; returns the samples and the scores."""
    samples = _ask(client, [request for job in jobs for request in sampling_requests(job)], f"{label} samples")
    asked = [request for job in jobs for request in scoring_requests(job, samples[job.query_id])]
    return samples, _ask(client, asked, label)


def _ask(client: LLMClient, requests: Sequence[LLMRequest], label: str) -> Results:
    results: Results = defaultdict(dict)
    if requests:
        for request, result in zip(requests, client.answer(requests, label=label), strict=True):
            results[request.unit][request.request_id] = result
    return results


def score_rows(
    job: Job, scorer_id: str, samples: Mapping[str, LLMResult], scores: Mapping[str, LLMResult]
) -> tuple[list[dict[str, Any]], Counts]:
    """The llm_scores rows of a query, and the accounting of its pairs (a pair fares as the kind that its task uses).

    A rank task gives both kinds, rank and likelihood, because the second comes for free. A pair that a rule judges has
    its name in place of an error, and is skipped under it.

    Args:
        job: the query.
        scorer_id: what answered.
        samples, scores: the job's own results of both rounds, by request id.
    """
    if job.settings.feedback == "label":
        return label_calls.label_rows(job, scorer_id, samples, scores)
    rows: list[dict[str, Any]] = []
    counts = Counts(rows_in=len(job.documents))
    results = [*samples.values(), *scores.values()]
    counts.llm_tokens = sum(result.num_computed_tokens for result in results)
    counts.llm_tokens_least = sum(result.num_least_tokens for result in results)
    for document, rule in zip(job.documents, job.rules, strict=True):
        result = scores.get(_request_id("score", job, document))
        kinds = [_likelihood_row(job, result) if rule is None else {"kind": "likelihood", "error": rule}]
        if job.settings.feedback == "rank":
            kinds.append(_rank_row(job, document, samples, scores) if rule is None else {"kind": "rank", "error": rule})
        used = kinds[-1]
        if rule is not None:
            counts.skipped[rule] += 1
        elif used.get("error") is not None:
            counts.quarantined[str(used["error"])] += 1
        elif result is not None and result.cached:
            counts.cached += 1
        else:
            counts.ok += 1
        known = result is not None and result.error is None
        about = {
            "query_id": job.query_id,
            "doc_id": document["doc_id"],
            "scorer_id": scorer_id,
            "num_prompt_tokens": result.num_prompt_tokens if known and result else 0,
            "num_target_tokens": len(result.token_logprobs[0]) if known and result else 0,
            "truncated": result.truncated if known and result else False,
            "prompt_sha": result.prompt_sha if known and result else "",
        }
        rows += [about | kind for kind in kinds]
    return rows, counts


def to_pay(job: Job, stored: Callable[[Sequence[LLMRequest]], list[LLMResult | None]]) -> tuple[int, int]:
    """(pairs that still need the LLM, estimated LLM tokens), given what the store holds.

    Tokens are estimated from characters, with the prompt read once per request. Rank feedback whose samples are not
    there yet is taken as N distinct outputs of half the allowed length.
    """
    if job.settings.feedback == "label":
        return label_calls.to_pay(job, stored)
    sampling = sampling_requests(job)
    known = dict(zip((request.request_id for request in sampling), stored(sampling), strict=True))
    open_sampling = [request for request in sampling if known[request.request_id] is None]
    samples = {name: result for name, result in known.items() if result is not None}
    tokens = sum(
        request.estimated_prompt_tokens + request.num_samples * _output_tokens(job) for request in open_sampling
    )
    if job.target is not None and open_sampling:
        guessed = open_sampling[0].estimated_prompt_tokens + job.settings.num_samples * _output_tokens(job)
        candidates = sum(len(str(document["text"])) // CHARS_PER_TOKEN for document in job.asked)
        return len(job.asked), tokens + candidates + guessed * (1 + len(job.asked))
    scoring = scoring_requests(job, samples)
    missing = [request for request, result in zip(scoring, stored(scoring), strict=True) if result is None]
    for request in missing:
        tokens += request.estimated_prompt_tokens + sum(
            len(target) // CHARS_PER_TOKEN + 1 for target in request.targets
        )
    return min(len(missing), len(job.asked)), tokens


def _output_tokens(job: Job) -> int:
    return job.settings.max_new_tokens // 2 + 1


def _likelihood_row(job: Job, result: LLMResult | None) -> dict[str, Any]:
    if result is None:
        return {"kind": "likelihood", "error": NO_TARGET}
    if result.error is not None:
        return {"kind": "likelihood", "error": result.error}
    scored = result.token_logprobs[: 1 + len(_other_options(job))]
    gold, *others = (likelihood(logprobs, job.settings.normalization) for logprobs in scored)
    return {"kind": "likelihood", "llm_score": share_of(gold, others) if others else gold}


def _other_options(job: Job) -> tuple[str, ...]:
    """The options that are not the desired output, where the score is taken over them."""
    settings, options, gold = job.settings, job.query.get("options"), job.query.get("gold_option")
    if settings.feedback != "likelihood" or not settings.over_options or not options or gold is None:
        return ()
    return tuple(option for number, option in enumerate(options) if number != gold)


def _rank_row(
    job: Job, document: Row, samples: Mapping[str, LLMResult], scores: Mapping[str, LLMResult]
) -> dict[str, Any]:
    if job.target is None:
        return {"kind": "rank", "error": NO_TARGET}
    ranks = []
    for shown in (None, document):
        draws = _draws(job, shown, samples)
        if isinstance(draws, str):
            return {"kind": "rank", "error": draws}
        result = scores[_request_id("score", job, shown)]
        if result.error is not None:
            return {"kind": "rank", "error": result.error}
        target, *sampled = (likelihood(logprobs, job.settings.normalization) for logprobs in result.token_logprobs)
        ranks.append(rank_of(target, sampled, draws.counts))
    rank_without, rank_with = ranks
    return {
        "kind": "rank",
        "llm_score": float(rank_reward(rank_without, rank_with)),
        "rank_without": rank_without,
        "rank_with": rank_with,
    }


def _draws(job: Job, document: Row | None, samples: Mapping[str, LLMResult]) -> Draws | str:
    """What the desired output is compared with under a prompt, or why there is nothing: the error of the sampling."""
    if job.settings.feedback != "rank" or job.target is None:
        return Draws((), ())
    result = samples[_request_id("sample", job, document if job.settings.samples == "fresh" else None)]
    return distinct_draws(result.texts, job.target) if result.error is None else result.error


def _segments(job: Job, document: Row | None) -> tuple[Any, ...]:
    return prompts.feedback_segments(
        job.task,
        job.query,
        document,
        max_candidate_tokens=job.max_candidate_tokens,
        layout=job.settings.prompt,
    )


def _rank_by(job: Job) -> str:
    """By what outputs are compared, where they are long enough for an engine to save by stopping early."""
    may_stop = job.settings.feedback == "rank" and job.settings.max_new_tokens >= LONG_OUTPUT
    return job.settings.normalization if may_stop else ""


def _request_id(what: str, job: Job, document: Row | None) -> str:
    return canonical_json([what, job.query_id, None if document is None else document["doc_id"]])
