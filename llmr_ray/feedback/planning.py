"""What feedback will cost, before it is paid: pairs and tokens by task, and the speed on a few of the real pairs."""

import time
from dataclasses import dataclass, replace

from llmr_ray.config import Config, LLMConfig, TaskScore, question_tasks
from llmr_ray.feedback import labels
from llmr_ray.feedback.client import StoreClient
from llmr_ray.feedback.jobs import ScoreJobs, equal_share, feedback_tasks
from llmr_ray.feedback.scoring import ask_jobs, to_pay
from llmr_ray.labeling.questions import ANSWER_TOKENS, FRAME_TOKENS, QUESTION_TOKENS
from llmr_ray.labeling.settings import AdaptiveConfig

PROBE_PAIRS = 200
_WARM_UP_PAIRS = 16

_QUERY_TOKENS = 64
_TARGET_TOKENS = 16
"""Guesses for a query with its template and for a desired output, used until candidates are mined."""


@dataclass(frozen=True, kw_only=True)
class TaskCost:
    """One task's feedback. `missing` pairs still need the LLM, and `tokens` is what they will take, estimated."""

    task: str
    feedback: str
    pairs: int
    missing: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Speed:
    """How fast a client answered the pairs of a probe; the answers are stored like any other."""

    pairs: int
    tokens: int
    seconds: float


def costs(work: ScoreJobs, client: StoreClient) -> list[TaskCost]:
    """By task, exact in pairs. Starts no engine."""
    totals = {task: [0, 0, 0] for task in work.tasks}
    for shard in range(work.num_shards):
        for job in work.of_shard(shard):
            missing, tokens = to_pay(job, client.stored)
            for place, value in enumerate((len(job.asked), missing, tokens)):
                totals[job.task][place] += value
    return [
        TaskCost(task=task, feedback=work.tasks[task].feedback, pairs=pairs, missing=missing, tokens=tokens)
        for task, (pairs, missing, tokens) in totals.items()
    ]


def upper_costs(config: Config, *, again: bool = False) -> list[TaskCost]:
    """By task, from the configuration alone: every query has all the candidates it may have, of full length.

    again: in a round after the first; answers that it shares with earlier ones are counted too.
    """
    result = []
    for task, settings in feedback_tasks(config).items():
        sizes = [dataset.num_train for dataset in config.datasets.values() if dataset.task == task]
        sizes.append(_question_documents(config, task) * config.tasks[task].questions.per_document)
        share = equal_share(sizes, settings.max_queries)
        queries = sum(min(size, share) for size in sizes)
        mined = config.tasks[task].mine_in(again=again).most
        asked = min(mined, settings.num_candidates or mined, settings.num_first or mined)
        pairs = queries * asked
        if settings.feedback == "label":
            tokens = queries * _labels(settings, asked, candidate_tokens(config.llm))
        else:
            prompt = candidate_tokens(config.llm) + _QUERY_TOKENS
            tokens = pairs * (prompt + _outputs(settings)) + queries * _samples(settings)
            if settings.feedback == "rank" and settings.samples == "fresh":
                tokens += pairs * (prompt + _drawn(settings))
        result.append(TaskCost(task=task, feedback=settings.feedback, pairs=pairs, missing=pairs, tokens=tokens))
    if not config.labeling.asks_llm:
        return []
    return _within_calls(result, config.labeling) if config.labeling.enabled else result


def question_costs(config: Config) -> list[TaskCost]:
    """Of generated questions by task, an upper bound: all are written at full length, and the LLM answers each.

    A pair is a call here: one for a document, and one for each of its questions.
    """
    result = []
    for task, settings in question_tasks(config).items():
        documents = _question_documents(config, task)
        questions = documents * settings.per_document
        passage = candidate_tokens(config.llm) + FRAME_TOKENS
        shown = settings.num_demonstrations * (settings.demonstration_tokens + _QUERY_TOKENS)
        tokens = documents * (passage + shown) + questions * (2 * QUESTION_TOKENS + passage + ANSWER_TOKENS)
        calls = documents + questions
        result.append(TaskCost(task=task, feedback="questions", pairs=calls, missing=calls, tokens=tokens))
    return result


def candidate_tokens(llm: LLMConfig) -> int:
    """Tokens of a candidate in a prompt, at the most: without a limit of its own, all that the model reads."""
    return llm.max_candidate_tokens or llm.max_model_tokens


def _question_documents(config: Config, task: str) -> int:
    """Documents about which questions are written, if all data sets have so many."""
    number = config.tasks[task].questions.num_documents
    of_task = [dataset for dataset in config.datasets.values() if dataset.task == task]
    return sum(min(number, dataset.num_documents or number) for dataset in of_task)


def _within_calls(found: list[TaskCost], labeling: AdaptiveConfig) -> list[TaskCost]:
    """Costs of a round of labelling, which asks about no more pairs than it has calls."""
    share = min(1.0, labeling.calls_per_round / max(1, sum(cost.pairs for cost in found)))
    return [
        replace(
            cost, pairs=round(share * cost.pairs), missing=round(share * cost.pairs), tokens=round(share * cost.tokens)
        )
        for cost in found
    ]


def probe(work: ScoreJobs, client: StoreClient) -> Speed:
    """Answers PROBE_PAIRS of the pairs that are still missing, spread over the work, after a few to warm up."""
    jobs = [job for shard in range(work.num_shards) for job in work.of_shard(shard) if to_pay(job, client.stored)[0]]
    every = max(1, sum(len(job.asked) for job in jobs) // (PROBE_PAIRS + _WARM_UP_PAIRS))
    chosen = jobs[::every]
    warm = 0
    while warm < len(chosen) - 1 and sum(len(job.asked) for job in chosen[: warm + 1]) < _WARM_UP_PAIRS:
        warm += 1
    ask_jobs(client, chosen[:warm], "probe warm-up")
    before, started = client.usage.computed_tokens, time.monotonic()
    ask_jobs(client, chosen[warm:], "probe")
    return Speed(
        pairs=sum(len(job.asked) for job in chosen[warm:]),
        tokens=client.usage.computed_tokens - before,
        seconds=time.monotonic() - started,
    )


def _outputs(settings: TaskScore) -> int:
    """Tokens of the outputs scored after one prompt."""
    return _TARGET_TOKENS + _drawn(settings)


def _drawn(settings: TaskScore) -> int:
    """Tokens of the outputs sampled from one prompt."""
    return settings.num_samples * settings.max_new_tokens // 2 if settings.feedback == "rank" else 0


def _labels(settings: TaskScore, asked: int, candidate_tokens: int) -> int:
    """Tokens of labels for one query, its answers as long as they may be; second rounds are not counted."""
    calls = -(-asked // settings.passages_per_call) * (labels.FRAME_TOKENS + labels.QUERY_TOKENS)
    return settings.label_votes * (
        calls + asked * (candidate_tokens + labels.answer_tokens(1, settings.evidence_chars))
    )


def _samples(settings: TaskScore) -> int:
    """Tokens of sampling for one query without retrieval, and of scoring that prompt."""
    if settings.feedback != "rank":
        return 0
    return 2 * (_QUERY_TOKENS + _drawn(settings))
