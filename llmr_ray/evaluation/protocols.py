"""What is measured for each task, and the shapes the scenarios share (methods.md A.7).

A protocol has a retrieval half (measures against labels, where a data set has them) and an LLM half: a pure function
that builds the request for one query and its retrieved documents, and one that judges the answer. The LLM half is used
for as many queries of a data set as the configuration says.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llmr_ray.errors import DataError
from llmr_ray.evaluation.metrics import retrieval_values
from llmr_ray.feedback.requests import LLMRequest, LLMResult, Segment

Row = dict[str, Any]
"""A row of `queries` or `corpus` as plain values."""

Ranking = list[tuple[str, float]]
"""(document id, retrieval score), best first."""

SCENARIOS: dict[str, str] = {
    "qa": "knowledge",
    "convsearch": "knowledge",
    "chat": "memory",
    "lrlm": "memory",
    "icl": "examples",
    "tool": "tools",
}
"""The scenario, that is the table of the paper, to which a task belongs."""

RETRIEVAL_MEASURES: dict[str, tuple[str, ...]] = {
    "qa": ("nDCG@10", "R@10"),
    "convsearch": ("nDCG@3", "R@10"),
    "chat": ("R@10",),
    "lrlm": ("R@10",),
    "icl": ("R@10",),
    "tool": ("nDCG@5", "R@5", "nDCG@1"),
}
"""Measured where a data set has labels; the first is the task's main one."""

LOWER_IS_BETTER = frozenset({"perplexity"})

POSITIVE_F1 = "F1-positive"
"""F1 of one label of a classification, over all queries of a data set."""


@dataclass(frozen=True)
class Judgement:
    """What an answer was worth: measure -> value, and the words that the LLM said or chose (None: it was only scored).

    The value of ``perplexity`` is the query's mean NLL: the figure is exp of its mean over queries. The value of
    ``F1-positive`` is 2 where the LLM said the positive label, plus 1 where it is right: the figure is F1 over queries.
    stratum: the part of the data set that the query is of, where figures are averages over parts.
    """

    values: dict[str, float]
    output: str | None
    stratum: str | None = None


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """The LLM half of a task's evaluation.

    num_documents: retrieved documents put into the prompt.
    request: (request id, query, documents best first) -> what is asked.
    judge: (query, result without error) -> its worth.
    """

    num_documents: int
    request: Callable[[str, Row, Sequence[Row]], LLMRequest]
    judge: Callable[[Row, LLMResult], Judgement]


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One question to the LLM: a query under a retrieval method.

    documents, scores: retrieved for it, best first, and how the retrieval scored them.
    requests: one, or one for each document where their answers are put to the vote. weights: of these answers.
    """

    method: str
    query: Row
    documents: tuple[Row, ...]
    scores: tuple[float, ...]
    requests: tuple[LLMRequest, ...]
    weights: tuple[float, ...] = ()


def applies(method: str, task: str) -> bool:
    """Whether a method has a row in a task's table: recency is a baseline of memory alone (methods.md G), and k-means,
    which gives every query the same examples, one of examples (B.9)."""
    return SCENARIOS[task] == {"recency": "memory", "kmeans": "examples"}.get(method, SCENARIOS[task])


def asks(
    protocol: Protocol,
    queries: Sequence[Row],
    rankings: Mapping[str, Mapping[str, Ranking]],
    documents: Mapping[str, Row],
    methods: Sequence[str],
) -> list[Ask]:
    """The questions of one task, query by query, so that the prompts of one query stand together.

    Args:
        protocol: of the task.
        queries: to be answered, all of this task.
        rankings: method -> query id -> ranking; the method "none" needs no entry.
        documents: document id -> its corpus row, at least those ranked high enough to be read.
        methods: rows of the table, in order; those that do not apply to the task are left out.
    """
    result = []
    for query in queries:
        for method in methods:
            if not applies(method, query["task"]):
                continue
            ranking = [] if method == "none" else rankings[method][query["query_id"]][: protocol.num_documents]
            shown = tuple(documents[doc_id] for doc_id, _ in ranking)
            scores = tuple(score for _, score in ranking)
            request = protocol.request(f"evaluate/{method}/{query['query_id']}", query, shown)
            result.append(Ask(method=method, query=query, documents=shown, scores=scores, requests=(request,)))
    return result


def bounded(question: Ask, limits: Mapping[str, int]) -> Ask:
    """The question with the limit of its task's prompts, where there is one (evaluate.prompt_tokens)."""
    limit = limits.get(question.query["task"], 0)
    return replace(question, requests=tuple(replace(request, max_tokens=limit) for request in question.requests))


def mean_logprob(logprobs: Sequence[float], query: Row) -> float:
    """Mean log-probability per token (methods.md A.4.2); DataError for a desired output without tokens."""
    if not logprobs:
        raise DataError(f"a desired output of query {query['query_id']} has no tokens, so it has no likelihood.")
    return sum(logprobs) / len(logprobs)


def likeliest(query: Row, result: LLMResult) -> int:
    """The target with the highest mean log-probability, the first of equals."""
    scores = [mean_logprob(logprobs, query) for logprobs in result.token_logprobs]
    return scores.index(max(scores))


def behind(num_documents: int, segments: Sequence[Segment]) -> list[Segment]:
    """The rest of a prompt, put behind documents whose trim orders are 1 to `num_documents`: it is cut after these."""
    return [
        replace(segment, trim_order=segment.trim_order + num_documents) if segment.trim_order else segment
        for segment in segments
    ]


def measured_rankings(
    queries: Sequence[Row], qrels: Mapping[str, Mapping[str, int]], rankings: Mapping[str, Mapping[str, Ranking]]
) -> tuple[list[Row], list[list[Row]]]:
    """Rows of `run`, and for each judged (method, query) its rows of `metrics`."""
    run, values = [], []
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for query in queries:
        groups[query["task"], query["dataset"]].append(query)
    for (task, dataset), members in groups.items():
        judged = {query["query_id"]: qrels[query["query_id"]] for query in members if query["query_id"] in qrels}
        for method, ranking in rankings.items():
            if not applies(method, task):
                continue
            for query in members:
                for rank, (doc_id, score) in enumerate(ranking[query["query_id"]], 1):
                    run.append(
                        {
                            "run_name": method,
                            "query_id": query["query_id"],
                            "doc_id": doc_id,
                            "rank": rank,
                            "score": score,
                        }
                    )
            measured = retrieval_values(judged, ranking, RETRIEVAL_MEASURES[task]) if judged else {}
            for query_id in judged:
                where = {"scenario": SCENARIOS[task], "dataset": dataset, "method": method, "query_id": query_id}
                values.append(
                    [{**where, "measure": name, "value": by_id[query_id]} for name, by_id in measured.items()]
                )
    return run, values
