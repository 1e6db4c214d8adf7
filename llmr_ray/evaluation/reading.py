"""How the LLM reads the passages of a question, where not all of them simply stand before it (methods.md C.5).

evidence: the LLM first says how well each passage answers, and quotes it, by the call that makes labels (C.1); gold
answers play no part. What it labels too low is not read, the rest stand under their quotes, the best next to the
question. vote: it answers from each passage alone, and the answers are voted with the passages' weights as in REPLUG's
ensemble (F), which also multiplies by the answer's likelihood; this we leave out, so that an LLM without
log-probabilities can vote too. Questions with options have no answers to vote about, because the likeliest option is
chosen: they are read with all passages before them.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa

from llmr_ray.artifacts import Counts, canonical_json
from llmr_ray.config import Config, TaskScore
from llmr_ray.evaluation import knowledge
from llmr_ray.evaluation.answers import normalize
from llmr_ray.evaluation.protocols import Ask, Row
from llmr_ray.evaluation.tables import is_embedder
from llmr_ray.feedback import label_calls, labels
from llmr_ray.feedback.jobs import Job, make_job
from llmr_ray.feedback.prompts import candidate_text
from llmr_ray.feedback.requests import LLMClient, LLMResult
from llmr_ray.feedback.scoring import ask_jobs

TASK = "qa"

SCHEMA = pa.schema(
    [
        ("query_id", pa.string()),
        ("dataset", pa.string()),
        ("method", pa.string()),
        ("doc_id", pa.string()),
        ("rank", pa.int32()),
        ("is_read", pa.bool_()),
        ("label", pa.float32()),
        ("evidence", pa.string()),
        ("error", pa.string()),
        ("weight", pa.float32()),
        ("output", pa.string()),
    ]
)
"""The table `reading`, a row for each retrieved passage. evidence: label, evidence (empty where it is no quote), or the
error for which there is no label. vote: weight, and the answer from this passage alone."""


def identity_of(config: Config) -> dict[str, Any]:
    """What else of a configuration determines an evaluation, by evaluate.reading."""
    match config.evaluate.reading:
        case "evidence":
            calls = _label_settings(config)
            names = ("passages_per_call", "label_votes", "evidence_chars")
            return {"labels": {"version": labels.LABELS_VERSION} | {name: getattr(calls, name) for name in names}}
        case "vote":
            return {"vote_temperature": config.train.temperature}
    return {}


def check_room(config: Config) -> None:
    """Raises ConfigError where passages and their labels would not fit into a call."""
    if config.evaluate.reading == "evidence":
        query = {"query_id": "", "task": TASK, "query": "", "targets": []}
        blank = [{"doc_id": str(rank), "text": "", "continuation": None} for rank in range(config.evaluate.qa_passages)]
        label_calls.first_requests(_label_job(config, query, blank))


def arranged(config: Config, client: LLMClient, questions: Sequence[Ask]) -> tuple[list[Ask], list[Row], Counts]:
    """The questions as evaluate.reading wants them asked; those of other tasks or without passages stay as they are.

    Args:
        config: of the run; `llm` reads.
        client: makes the labels of `evidence`, each passage of a question once for all methods that retrieved the same.
        questions: with all passages before them.

    Returns:
        questions, rows of the table `reading` (of `vote` they come with the answers, vote_rows), and the accounting of
        labels, a row for each question and passage.
    """
    match config.evaluate.reading:
        case "evidence":
            return _with_evidence(config, client, questions)
        case "vote":
            return [_one_by_one(config, question) for question in questions], [], Counts()
    return [*questions], [], Counts()


def by_question(questions: Sequence[Ask], results: Sequence[LLMResult]) -> list[tuple[Ask, list[LLMResult]]]:
    """Each question with the results of its requests, which stand in the order of the questions."""
    rest = iter(results)
    return [(question, [*islice(rest, len(question.requests))]) for question in questions]


# --- evidence --------------------------------------------------------------------------------------------------------


def read_ranks(found: Sequence[float | None], floor: float) -> list[int]:
    """The passages that are read, of those with these labels (best retrieved first): all at or above the floor and
    all without a label, or the first where that is none."""
    kept = [rank for rank, label in enumerate(found) if label is None or label >= floor]
    return kept or [0]


def _with_evidence(config: Config, client: LLMClient, questions: Sequence[Ask]) -> tuple[list[Ask], list[Row], Counts]:
    jobs = {
        number: _label_job(config, question.query, question.documents)
        for number, question in enumerate(questions)
        if _has_passages(question)
    }
    found, counts = _labels(client, {job.query_id: job for job in jobs.values()})
    arranged, rows = [*questions], list[Row]()
    for number, job in jobs.items():
        question = questions[number]
        said = [found[job.query_id, document["doc_id"]] for document in question.documents]
        read = read_ranks([row.get("label") for row in said], config.evaluate.score_floor)
        chars = job.settings.evidence_chars
        quotes = [_quote(row, document, chars) for row, document in zip(said, question.documents, strict=True)]
        asked = knowledge.request_with_evidence(
            question.requests[0].request_id,
            question.query,
            [(question.documents[rank], quotes[rank]) for rank in read],
            passage_tokens=config.evaluate.qa_passage_tokens,
            max_new_tokens=config.evaluate.qa_max_new_tokens,
        )
        arranged[number] = replace(question, requests=(asked,))
        rows += [
            _row(question, rank)
            | {"is_read": rank in read, "label": row.get("label"), "evidence": quotes[rank], "error": row.get("error")}
            for rank, row in enumerate(said)
        ]
    return arranged, rows, counts


def _label_settings(config: Config) -> TaskScore:
    score = config.tasks[TASK].score
    return TaskScore(
        feedback="label",
        passages_per_call=score.passages_per_call,
        label_votes=score.label_votes,
        evidence_chars=score.evidence_chars,
    )


def _label_job(config: Config, query: Row, documents: Sequence[Row]) -> Job:
    """The label calls about a question's passages. Named by what is asked, so that methods that retrieved the same
    passages share them; the desired outputs are left out, as nobody knows them who only asks."""
    shown = sorted(documents, key=lambda document: str(document["doc_id"]))
    name = canonical_json([query["query_id"], *(document["doc_id"] for document in shown)])
    unanswered = query | {"query_id": name, "targets": []}
    return make_job(unanswered, shown, _label_settings(config), config.llm, config.seed)


def _labels(client: LLMClient, jobs: dict[str, Job]) -> tuple[dict[tuple[str, str], Row], Counts]:
    """By job and document what the LLM says, as a row of llm_scores, and the accounting."""
    first, second = ask_jobs(client, [*jobs.values()], "evaluate evidence")
    found, counts = dict[tuple[str, str], Row](), Counts()
    for name, job in jobs.items():
        rows, fate = label_calls.label_rows(job, client.scorer_id, first[name], second[name])
        found |= {(name, row["doc_id"]): row for row in rows}
        counts += fate
    return found, counts


def _quote(row: Row, document: Row, evidence_chars: int) -> str:
    """The evidence of a label, where it stands in the passage."""
    evidence = str(row.get("evidence") or "")
    return evidence if labels.is_quoted(evidence, candidate_text(TASK, document), evidence_chars) else ""


# --- vote ------------------------------------------------------------------------------------------------------------


def vote_weights(scores: Sequence[float], temperature: float) -> list[float]:
    """softmax(scores / temperature), which is how likely the retriever draws each passage."""
    logits = np.asarray(scores, np.float64) / temperature
    weights = np.exp(logits - logits.max())
    return list((weights / weights.sum()).tolist())


def winner(outputs: Sequence[str], weights: Sequence[float]) -> int:
    """The place of the answer with the most weight. Answers that are equal once normalised add up, and stand at the
    place of the first of them; of equal weights the one that stands first wins."""
    votes: dict[str, float] = defaultdict(float)
    first: dict[str, int] = {}
    for place, (output, weight) in enumerate(zip(outputs, weights, strict=True)):
        said = normalize(output)
        votes[said] += weight
        first.setdefault(said, place)
    return first[max(votes, key=votes.__getitem__)]


def voted(question: Ask, answers: Sequence[LLMResult]) -> LLMResult:
    """The answer to a question: that of its only request, or the one that wins the vote. A vote of which a request
    failed has its error."""
    if len(answers) == 1:
        return answers[0]
    failed = [answer for answer in answers if answer.error is not None]
    chosen = failed[0] if failed else answers[winner([answer.texts[0] for answer in answers], question.weights)]
    return replace(
        chosen,
        num_prompt_tokens=sum(answer.num_prompt_tokens for answer in answers),
        num_computed_tokens=sum(answer.num_computed_tokens for answer in answers),
        num_least_tokens=sum(answer.num_least_tokens for answer in answers),
        truncated=any(answer.truncated for answer in answers),
        cached=all(answer.cached for answer in answers),
    )


def vote_rows(answers: Sequence[tuple[Ask, Sequence[LLMResult]]]) -> list[Row]:
    """Rows of the table `reading`; only questions that are voted on have any."""
    return [
        _row(question, rank)
        | {
            "is_read": True,
            "error": answer.error,
            "weight": weight,
            "output": answer.texts[0] if answer.texts else None,
        }
        for question, of_question in answers
        if question.weights
        for rank, (answer, weight) in enumerate(zip(of_question, question.weights, strict=True))
    ]


def _one_by_one(config: Config, question: Ask) -> Ask:
    """Cosines, and what this run trains, are divided by the temperature of training, other scores by 1 as in REPLUG."""
    if not _has_passages(question) or question.query["options"]:
        return question
    other = config.evaluate.embedders.get(question.method)
    is_trained_at = is_embedder(question.method) and (other is None or other.similarity == "cosine")
    temperature = config.train.temperature if is_trained_at else 1.0
    requests = tuple(
        knowledge.request(
            f"{question.requests[0].request_id}#{rank}",
            question.query,
            [document],
            passage_tokens=config.evaluate.qa_passage_tokens,
            max_new_tokens=config.evaluate.qa_max_new_tokens,
        )
        for rank, document in enumerate(question.documents, 1)
    )
    return replace(question, requests=requests, weights=tuple(vote_weights(question.scores, temperature)))


# --- what is told of it ----------------------------------------------------------------------------------------------


def summary(table: pa.Table) -> list[dict[str, Any]]:
    """By data set and method: the passages retrieved, those not read, and those without a label.

    Args:
        table: `reading`.
    """
    told: dict[tuple[str, str], dict[str, Any]] = {}
    for row in table.to_pylist():
        where = {"dataset": row["dataset"], "method": row["method"]}
        of_method = told.setdefault(
            (row["dataset"], row["method"]), where | {"passages": 0, "dropped": 0, "unlabelled": 0}
        )
        of_method["passages"] += 1
        of_method["dropped"] += not row["is_read"]
        of_method["unlabelled"] += row["error"] is not None
    return [*told.values()]


def _has_passages(question: Ask) -> bool:
    return question.query["task"] == TASK and bool(question.documents)


def _row(question: Ask, rank: int) -> Row:
    return {
        "query_id": question.query["query_id"],
        "dataset": question.query["dataset"],
        "method": question.method,
        "doc_id": question.documents[rank]["doc_id"],
        "rank": rank + 1,
    }
