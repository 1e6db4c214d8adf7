"""The stage generate: training questions that an LLM writes about passages (ARL2, methods.md C.1.1 to C.1.3).

Its artifact takes the place of `prepare` for all later stages: the same tables, and behind them one shard with the
generated questions as training queries, their passages as qrels, and the table `generated`, a row for every question
that was asked for, kept or not.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from llmr_ray.artifacts import Artifact, ArtifactSpec, Counts, canonical_json, seed_of
from llmr_ray.assets import Asset
from llmr_ray.config import Config, TaskQuestions, identity, question_tasks
from llmr_ray.data.splits import unit_hash
from llmr_ray.data.text import document_text
from llmr_ray.feedback.engine import asked_identity
from llmr_ray.feedback.prompts import candidate_text
from llmr_ray.feedback.requests import LLMClient, LLMRequest, LLMResult
from llmr_ray.index.vectors import own_limits
from llmr_ray.labeling.patterns import choose_demonstrations, cluster, draw_demonstrations, mask
from llmr_ray.labeling.questions import (
    ANSWER_TOKENS,
    LLM_FAILED,
    NOT_WRITTEN,
    OF_ANSWER,
    QUESTION_TOKENS,
    QUESTIONS_VERSION,
    answer_reason,
    answer_segments,
    counted,
    generation_segments,
    read_questions,
    reject_reasons,
)
from llmr_ray.precision import resolve_precision
from llmr_ray.schemas import table_of

GENERATE_VERSION = 2

GENERATED = pa.schema(
    [(name, pa.string()) for name in ("question_id", "dataset", "doc_id", "question", "answer", "reason", "error")]
)
"""reason: why a question is not kept (labeling/questions.py), or null. error: the LLM's, where it failed."""

Vectors = Callable[[str, Sequence[tuple[str, list[str]]]], list[np.ndarray]]
"""(task, lists of texts with their side, "query" or "document") -> unit-norm float32 [n, D] of each list."""

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class _Given:
    """What `prepare` made."""

    queries: pa.Table
    qrels: pa.Table
    prepare: Artifact


def generate_spec(config: Config, *, llm: Asset, base: Asset, prepare: Artifact) -> ArtifactSpec:
    """What determines generated questions: the LLM and how it reads, the prompts, data and seed, and the embedder by
    which demonstrations are chosen and repetitions found."""
    tasks = question_tasks(config)
    embedder = {name: getattr(config.embedder, name) for name in ("pooling", "max_query_tokens", "max_document_tokens")}
    return ArtifactSpec(
        stage="generate",
        version=GENERATE_VERSION,
        config={
            **asked_identity(llm.fingerprint, config.llm),
            "tasks": {task: identity(settings) for task, settings in tasks.items()},
            "instructions": {
                task: [config.tasks[task].query_instruction, config.tasks[task].document_instruction] for task in tasks
            },
            "embedder": embedder
            | own_limits(config, tasks)
            | {"precision": resolve_precision(config.embedder.precision)},
            "questions_version": QUESTIONS_VERSION,
            "seed": config.seed,
        },
        inputs={"llm": llm.fingerprint, "base": base.fingerprint, "prepare": prepare.id},
    )


def run_generate(config: Config, artifact: Artifact, *, vectors: Vectors, client: LLMClient, prepare: Artifact) -> None:
    """Writes the tables of `prepare`, shard by shard, and then one shard with what is generated.

    Accounting counts questions that were asked for: ok are those kept, skipped those that were not written or not
    kept, quarantined those over which the LLM failed.

    Args:
        config: the run's.
        artifact: to be made.
        vectors: embeds texts with the run's base embedder.
        client: asks the LLM.
        prepare: a finished artifact.
    """
    started = time.monotonic()
    last = prepare.require()["num_shards"]
    prepared = prepare.ledger()
    for shard in artifact.pending(last + 1):
        if shard < last:
            copied = {name: prepare.read(name, shard) for name in prepared[shard]["rows"]}
            artifact.write_shard(shard, copied, Counts())
        else:
            tables, counts = _generated(config, vectors, client, prepare)
            artifact.write_shard(shard, tables, counts)
    artifact.commit(last + 1, seconds=time.monotonic() - started)


def _generated(
    config: Config, vectors: Vectors, client: LLMClient, prepare: Artifact
) -> tuple[dict[str, pa.Table], Counts]:
    given = _Given(queries=prepare.read("queries"), qrels=prepare.read("qrels"), prepare=prepare)
    asked: list[Row] = []
    queries: list[Row] = []
    counts = Counts()
    for task in question_tasks(config):
        rows, fate = _of_task(config, task, given, vectors, client)
        asked += rows
        queries += [_query(config, task, row) for row in rows if row["reason"] is None]
        counts += fate
    qrels = [
        {"query_id": row["question_id"], "doc_id": row["doc_id"], "relevance": 1}
        for row in asked
        if row["reason"] is None
    ]
    tables = {
        "queries": table_of("queries", queries),
        "qrels": table_of("qrels", qrels),
        "generated": pa.Table.from_pylist(asked, schema=GENERATED),
    }
    return tables, counts


def _of_task(config: Config, task: str, given: _Given, vectors: Vectors, client: LLMClient) -> tuple[list[Row], Counts]:
    """A row of `generated` for every question of a task that was asked for, and their accounting."""
    settings, limit = config.tasks[task].questions, config.llm.max_candidate_tokens
    queries = given.queries.filter(pc.equal(given.queries["task"], task))
    documents = drawn_documents(config, task, given.prepare)
    shown = _demonstrations(config, task, queries, given, documents, vectors)
    texts = {document["doc_id"]: candidate_text(task, document) for document in documents}
    results = client.answer(
        [_writing(config, doc_id, text, shown.get(doc_id, []), settings) for doc_id, text in texts.items()],
        label=f"questions about {task}",
    )
    rows = [
        row
        for document, result in zip(documents, results, strict=True)
        for row in _written(document, result, settings.per_document)
    ]
    answers = list[LLMResult]()
    judge = _judge(task, _kept(rows), queries["query"].to_pylist(), vectors)
    while left := judge():
        found = client.answer(
            [_answering(row["question_id"], texts[row["doc_id"]], row["question"], limit) for row in left],
            label=f"answers to questions about {task}",
        )
        for row, result in zip(left, found, strict=True):
            if result.error is not None:
                row |= {"reason": LLM_FAILED, "error": result.error}
                continue
            row["answer"] = result.texts[0].strip()
            row["reason"] = answer_reason(row["question"], row["answer"], texts[row["doc_id"]])
        answers += found
    reasons = counted([row["reason"] for row in rows])
    failed = reasons.pop(LLM_FAILED, 0)
    counts = Counts(
        rows_in=len(rows),
        ok=len(_kept(rows)),
        skipped=reasons,
        llm_tokens=sum(result.num_computed_tokens for result in (*results, *answers)),
        llm_tokens_least=sum(result.num_least_tokens for result in (*results, *answers)),
    )
    counts.quarantined.update({LLM_FAILED: failed} if failed else {})
    return rows, counts


def drawn_documents(config: Config, task: str, prepare: Artifact) -> list[Row]:
    """The rows of the corpus about which questions are written, with their `dataset`, in the order of the draw.

    Shared pools alone: what a pool of one dialogue or text tells is nobody else's question. Of a pool that several data
    sets share, the first of these has the questions. Drawing more documents keeps those that fewer would be.
    """
    number = config.tasks[task].questions.num_documents
    pools = prepare.read("corpus", columns=["doc_id", "pool"])
    found: list[Row] = []
    first: dict[str, str] = {}
    for name in sorted(name for name, dataset in config.datasets.items() if dataset.task == task):
        first.setdefault(_pool(config, name), name)
    for pool, name in sorted(first.items()):
        doc_ids = pools["doc_id"].filter(pc.equal(pools["pool"], pool)).to_pylist()
        drawn = sorted(doc_ids, key=lambda doc_id: unit_hash("questions", str(config.seed), doc_id))[:number]
        row_of = _documents(prepare, drawn)
        found += [row_of[doc_id] | {"dataset": name} for doc_id in drawn]
    return found


def _demonstrations(
    config: Config, task: str, queries: pa.Table, given: _Given, documents: Sequence[Row], vectors: Vectors
) -> dict[str, list[tuple[str, str]]]:
    """(passage, question) that the LLM is shown for each document: training questions with a relevant passage."""
    settings = config.tasks[task].questions
    about: dict[str, list[str]] = {}
    relevant = given.qrels.filter(pc.greater(given.qrels["relevance"], 0)).to_pylist()
    for row in sorted(relevant, key=lambda row: (-row["relevance"], row["doc_id"])):
        about.setdefault(row["query_id"], []).append(row["doc_id"])
    training = queries.filter(pc.equal(queries["split"], "train")).select(["query_id", "query"]).to_pylist()
    text_of = {row["query_id"]: row["query"] for row in training if row["query_id"] in about}
    if not text_of or not settings.num_demonstrations:
        return {}
    of: dict[str, Any] = {
        "doc_ids": [document["doc_id"] for document in documents],
        "question_ids": list(text_of),
        "passages": [about[query_id] for query_id in text_of],
        "seed": config.seed,
        "number": settings.num_demonstrations,
    }
    if settings.demonstrations == "drawn":
        chosen = draw_demonstrations(**of)
    else:
        questions = list(text_of.values())
        texts = [document_text(document["title"], document["text"]) for document in documents]
        document_MD, question_ND, pattern_ND = vectors(
            task, [("document", texts), ("query", questions), ("query", [mask(question) for question in questions])]
        )
        cluster_N = cluster(
            pattern_ND,
            num_clusters=settings.num_clusters,
            split_above=settings.split_above,
            merge_below=settings.merge_below,
            seed=config.seed,
        )
        chosen = choose_demonstrations(
            document_MD=document_MD,
            question_ND=question_ND,
            cluster_N=cluster_N,
            nearest=settings.num_nearest,
            **of,
        )
    passages = _documents(given.prepare, [about[query_id][0] for query_id in chosen["question_id"].to_pylist()])
    shown: dict[str, list[tuple[str, str]]] = {}
    for row in chosen.to_pylist():
        passage = passages[about[row["question_id"]][0]]
        shown.setdefault(row["doc_id"], []).append((candidate_text(task, passage), text_of[row["question_id"]]))
    return shown


def _writing(
    config: Config, doc_id: str, text: str, shown: Sequence[tuple[str, str]], settings: TaskQuestions
) -> LLMRequest:
    return LLMRequest(
        request_id=canonical_json(["questions", doc_id]),
        unit=doc_id,
        segments=generation_segments(
            text,
            shown,
            number=settings.per_document,
            passage_tokens=config.llm.max_candidate_tokens,
            demonstration_tokens=settings.demonstration_tokens,
        ),
        num_samples=1,
        temperature=settings.temperature,
        seed=seed_of(config.seed, "questions", doc_id),
        max_new_tokens=QUESTION_TOKENS * settings.per_document,
        stop=("Passage:",),
    )


def _answering(question_id: str, text: str, question: str, passage_tokens: int) -> LLMRequest:
    return LLMRequest(
        request_id=question_id,
        unit=question_id,
        segments=answer_segments(text, question, passage_tokens=passage_tokens),
        num_samples=1,
        temperature=0.0,
        max_new_tokens=ANSWER_TOKENS,
        stop=("\n",),
        says_something=True,
    )


def _written(document: Row, result: LLMResult, number: int) -> list[Row]:
    """A row for each of the questions that were asked for about a document, also for those that are not there."""
    questions: list[str | None] = [] if result.error else [*read_questions(result.texts[0], number=number)]
    questions += [None] * (number - len(questions))
    missing = LLM_FAILED if result.error else NOT_WRITTEN
    return [
        {
            "question_id": f"generated:{document['doc_id']}:{place}",
            "dataset": document["dataset"],
            "doc_id": document["doc_id"],
            "question": question,
            "reason": missing if question is None else None,
            "error": result.error,
        }
        for place, question in enumerate(questions)
    ]


def _judge(task: str, rows: Sequence[Row], existing: list[str], vectors: Vectors) -> Callable[[], list[Row]]:
    """What gives their reason to questions that cannot be kept, by form or because they repeat another, and returns
    those left that have no answer yet.

    Called again, it leaves out questions that got a reason from their answer: one that is not answered from its passage
    must not keep a twin of it, about another passage, from being asked.

    Args:
        task: of the questions.
        rows: questions without a reason yet.
        existing: all questions of the task, also those it is tested on.
        vectors: as in `run_generate`.
    """
    if not rows:
        return list
    questions = [row["question"] for row in rows]
    vector_ND, existing_MD = vectors(task, [("query", questions), ("query", existing)])

    def judge() -> list[Row]:
        places = [place for place, row in enumerate(rows) if row["reason"] not in OF_ANSWER]
        reasons = reject_reasons(
            [questions[place] for place in places], existing, vector_ND=vector_ND[places], existing_MD=existing_MD
        )
        for place, reason in zip(places, reasons, strict=True):
            rows[place]["reason"] = reason
        return [row for row in _kept(rows) if "answer" not in row]

    return judge


def _kept(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["reason"] is None]


def _pool(config: Config, dataset: str) -> str:
    """The pool of a data set whose passages are shared."""
    return config.datasets[dataset].pool or dataset


def _query(config: Config, task: str, row: Row) -> Row:
    """A generated question as a row of `queries`; mining looks for `source_doc_id`."""
    return {
        "query_id": row["question_id"],
        "task": task,
        "dataset": row["dataset"],
        "split": "train",
        "split_key": row["doc_id"],
        "query": row["question"],
        "targets": [row["answer"]],
        "pool": _pool(config, row["dataset"]),
        "meta": json.dumps({"source_doc_id": row["doc_id"]}, ensure_ascii=False),
    }


def _documents(prepare: Artifact, doc_ids: Sequence[str]) -> Mapping[str, Row]:
    """Rows of the corpus by id."""
    columns = ["doc_id", "title", "text", "continuation"]
    return {row["doc_id"]: row for row in prepare.read("corpus", columns=columns, ids=doc_ids).to_pylist()}
