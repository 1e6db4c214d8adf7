"""What feedback will cost, before it is paid: pairs and tokens by task, and the speed on a few of the real pairs."""

import time
from dataclasses import dataclass

from llmr_ray.config import Config, LLMConfig, TaskScore, question_tasks
from llmr_ray.feedback import labels
from llmr_ray.feedback.client import StoreClient
from llmr_ray.feedback.jobs import ScoreJobs, equal_share, feedback_tasks
from llmr_ray.feedback.label_calls import num_requests
from llmr_ray.feedback.scoring import ask_jobs, to_pay
from llmr_ray.labeling.questions import ANSWER_TOKENS, FRAME_TOKENS, QUESTION_TOKENS

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

    again: in a round after the first; answers that it shares with earlier ones are counted too. Pairs of a round of
    labelling that several tasks have are shared out by their number.
    """
    if not config.labeling.asks_llm:
        return []
    tasks = feedback_tasks(config)
    sizes = {task: _asked_at_most(config, task, settings, again=again) for task, settings in tasks.items()}
    all_pairs = sum(queries * asked for queries, asked in sizes.values())
    # A round of labelling asks about no more pairs than it has calls.
    share = min(1.0, config.labeling.calls_per_round / max(1, all_pairs)) if config.labeling.enabled else 1.0
    result = []
    for task, settings in tasks.items():
        queries, asked = sizes[task]
        pairs = round(share * queries * asked)
        if settings.feedback == "label":
            # The first round labels whole questions; the pairs of a later one may be of all of them.
            among = queries if again else -(-pairs // max(1, asked))
            tokens = _labels(settings, pairs, among, asked, candidate_tokens(config.llm))
        else:
            prompt = candidate_tokens(config.llm) + _QUERY_TOKENS
            tokens = pairs * (prompt + _outputs(settings)) + queries * _samples(settings)
            if settings.feedback == "rank" and settings.samples == "fresh":
                tokens += pairs * (prompt + _drawn(settings))
        result.append(TaskCost(task=task, feedback=settings.feedback, pairs=pairs, missing=pairs, tokens=tokens))
    return result


def _asked_at_most(config: Config, task: str, settings: TaskScore, *, again: bool) -> tuple[int, int]:
    """Queries of a task, and candidates of each, that the LLM is asked about."""
    sizes = [dataset.num_train for dataset in config.datasets.values() if dataset.task == task]
    sizes.append(_question_documents(config, task) * config.tasks[task].questions.per_document)
    share = equal_share(sizes, settings.max_queries)
    mined = config.tasks[task].mine_in(again=again).most
    asked = min(mined, settings.num_candidates or mined, settings.num_first or mined)
    return sum(min(size, share) for size in sizes), asked


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


def _labels(settings: TaskScore, pairs: int, queries: int, asked: int, candidate_tokens: int) -> int:
    """Tokens of labels for pairs of these queries, at most `asked` of each, packed as badly as can be: one of every
    query, and then so many of one that it takes a further request. Answers are as long as they may be; requests that
    ask once more are not counted."""
    scattered = min(pairs, queries + max(0, pairs - queries) // settings.passages_per_call)
    requests = min(settings.label_votes * scattered, queries * num_requests(asked, settings))
    of_pair = candidate_tokens + labels.answer_tokens(1, settings.evidence_chars)
    return requests * (labels.FRAME_TOKENS + labels.QUERY_TOKENS) + settings.label_votes * pairs * of_pair


def _samples(settings: TaskScore) -> int:
    """Tokens of sampling for one query without retrieval, and of scoring that prompt."""
    if settings.feedback != "rank":
        return 0
    return 2 * (_QUERY_TOKENS + _drawn(settings))
