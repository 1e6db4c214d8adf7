"""The stage `evaluate`: rankings of every method, measures against labels, and what the LLM makes of the documents.

All questions of all data sets and methods go to the LLM in one call, so the engine is started once and prompts of one
query share their prefixes; only evaluate.reading may ask about the documents before. Tables: ``run`` (rankings),
``metrics`` (a value per query), ``answers`` (what was asked and said), ``reading`` (passages, where these are labelled
or voted on). Means, intervals and tests are made from ``metrics`` by the report.
"""

import logging
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from llmr_ray.artifacts import Artifact, ArtifactSpec, Counts
from llmr_ray.assets import Asset
from llmr_ray.config import Config, EvaluateConfig, identity
from llmr_ray.data.example_tasks import owners, pool_of
from llmr_ray.data.scope import scopes
from llmr_ray.data.splits import lowest
from llmr_ray.data.text import document_texts
from llmr_ray.errors import ConfigError
from llmr_ray.evaluation import examples, knowledge, memory, questions, reading
from llmr_ray.evaluation.baselines import eligible, kmeans_topk, random_topk, recency_topk
from llmr_ray.evaluation.metrics import relevance_by_query
from llmr_ray.evaluation.protocols import (
    SCENARIOS,
    Ask,
    Judgement,
    Protocol,
    Ranking,
    Row,
    asks,
    bounded,
    measured_rankings,
)
from llmr_ray.evaluation.tables import METHOD_NAMES, is_embedder, is_reserved
from llmr_ray.feedback.engine import asked_identity
from llmr_ray.feedback.prompts import PROMPTS_VERSION
from llmr_ray.feedback.requests import LLMClient, LLMResult
from llmr_ray.index.searcher import search
from llmr_ray.index.vectors import encoder_of, query_vectors, to_matrix
from llmr_ray.mining.bm25 import bm25_topk
from llmr_ray.schemas import table_of

VERSION = 3

_ANSWERS = pa.schema(
    [
        ("query_id", pa.string()),
        ("dataset", pa.string()),
        ("method", pa.string()),
        ("doc_ids", pa.list_(pa.field("element", pa.string()))),
        ("prompt", pa.string()),
        ("output", pa.string()),
        ("num_prompt_tokens", pa.int32()),
        ("truncated", pa.bool_()),
        ("error", pa.string()),
    ]
)

log = logging.getLogger(__name__)


def evaluate_spec(
    config: Config, llm: Asset, prepare: Artifact, embeddings: dict[str, Artifact], indexes: dict[str, Artifact]
) -> ArtifactSpec:
    """What determines an evaluation. `embeddings` and `indexes` have a key for each method that is an embedder: "base",
    "trained", "round_1", "round_2" and so on, and the names in evaluate.embedders.

    Raises:
        ConfigError: evaluate.methods names an unknown method or one without an index, another embedder has the name of
            a method, `num_llm_queries` a data set that is unknown or whose task has no LLM half, demotion looks deeper
            than the search, or passages that are to be labelled do not fit.
    """
    others = set(config.evaluate.embedders)
    if clashes := sorted(filter(is_reserved, others)):
        raise ConfigError(f"evaluate.embedders: {clashes} are methods already. Choose another name.")
    unknown = [method for method in config.evaluate.methods if not is_reserved(method) and method not in others]
    if unknown:
        known = ", ".join([*METHOD_NAMES, *sorted(others), "round_1", "round_2"])
        raise ConfigError(f"evaluate.methods: {unknown} is not known. Choose among {known} and so on.")
    strangers = sorted(set(config.evaluate.num_llm_queries) - set(config.datasets))
    if strangers:
        raise ConfigError(
            f"evaluate.num_llm_queries names {strangers}, but `datasets` defines {sorted(config.datasets)}."
        )
    speechless = [
        name
        for name, count in config.evaluate.num_llm_queries.items()
        if count and config.datasets[name].task not in _task_protocols(config)
    ]
    if speechless:
        raise ConfigError(
            f"evaluate.num_llm_queries asks the LLM about {speechless}, whose tasks are measured against labels alone. "
            "Leave these data sets out."
        )
    # The clusters of k-means are those of the base embedder.
    needed = {"base" if method == "kmeans" else method for method in config.evaluate.methods}
    embedders = set(filter(is_embedder, needed))
    lacking = sorted(embedders - set(indexes))
    if lacking:
        raise ConfigError(f"evaluate.methods: there is no index for {lacking}; leave them out, or train first.")
    head = examples.DEMOTION_DEPTH * config.evaluate.icl_demonstrations
    if config.evaluate.icl_demotion != "none" and config.evaluate.search_depth < head:
        raise ConfigError(
            f"evaluate.icl_demotion chooses among the {head} best examples, but evaluate.search_depth is "
            f"{config.evaluate.search_depth}. Raise it to {head}."
        )
    reading.check_room(config)
    # A table of baselines names more of them than a run compares.
    used = others & set(config.evaluate.methods)
    # Intervals are made by the report; their number of samples changes no table.
    idle = {"bootstrap_samples"} | (set() if config.evaluate.reading == "evidence" else {"score_floor"})
    settings = replace(config.evaluate, embedders={name: config.evaluate.embedders[name] for name in sorted(used)})
    evaluate = {key: value for key, value in identity(settings).items() if key not in idle}
    inputs = {"prepare": prepare.id, "llm": llm.fingerprint}
    for name in sorted(set(embeddings) & needed):
        inputs |= {f"embeddings_{name}": embeddings[name].id, f"index_{name}": indexes[name].id}
    return ArtifactSpec(
        stage="evaluate",
        version=VERSION,
        config={
            "evaluate": evaluate,
            "bm25": identity(config.bm25),
            **asked_identity(llm.fingerprint, config.llm),
            "prompts": PROMPTS_VERSION,
            "seed": config.seed,
            **reading.identity_of(config),
        },
        inputs=inputs,
    )


def run_evaluate(
    config: Config,
    artifact: Artifact,
    client: LLMClient,
    prepare: Artifact,
    embeddings: dict[str, Artifact],
    indexes: dict[str, Artifact],
) -> None:
    """Evaluates a split's queries and commits the artifact in one shard (the client's store keeps the LLM's answers).

    Raises:
        DataError: too many LLM rows failed (the client's limit), or inputs do not fit together.
    """
    started = time.monotonic()
    if artifact.pending(1):
        qrels = relevance_by_query(prepare.read("qrels"))
        queries, llm_ids = _select(prepare, qrels, config.evaluate)
        places = prepare.read("corpus", columns=["doc_id", "pool", "position", "meta"])
        rankings = _found(config, queries, prepare, places, embeddings, indexes)
        run, values = measured_rankings(queries.to_pylist(), qrels, rankings)
        asked_of = [query for query in queries.to_pylist() if query["query_id"] in llm_ids]
        protocols = _protocols(config, prepare)
        asked = _asks(config, protocols, asked_of, prepare, places, rankings)
        asked, passages, labelled = reading.arranged(config, client, asked)
        asked = [bounded(question, config.evaluate.prompt_tokens) for question in asked]
        results = client.answer([request for question in asked for request in question.requests], label="evaluate")
        answers = reading.by_question(asked, results)
        judged = _judge(protocols, answers)
        counts = _count(len(values), judged) + labelled
        tables = {
            "run": table_of("run", run),
            "metrics": table_of("metrics", [row for rows in values for row in rows] + _metric_rows(judged)),
            "answers": pa.Table.from_pylist([_answer_row(*item) for item in judged], schema=_ANSWERS),
        }
        if config.evaluate.reading != "passages":
            passages += reading.vote_rows(answers)
            tables["reading"] = pa.Table.from_pylist(passages, schema=reading.SCHEMA)
        artifact.write_shard(0, tables, counts)
    artifact.commit(1, seconds=time.monotonic() - started)


# --- what is evaluated -----------------------------------------------------------------------------------------------


def _select(prepare: Artifact, qrels: Mapping[str, object], settings: EvaluateConfig) -> tuple[pa.Table, set[str]]:
    """The split's queries that have labels or that the LLM answers, and the ids of the latter."""
    queries = prepare.read("queries")
    queries = queries.filter(pc.equal(queries["split"], settings.split))
    by_dataset: dict[str, list[str]] = defaultdict(list)
    for row in queries.select(["query_id", "dataset"]).to_pylist():
        by_dataset[row["dataset"]].append(row["query_id"])
    llm_ids = {
        query_id
        for dataset, ids in by_dataset.items()
        for query_id in lowest(dataset, ids, settings.num_llm_queries.get(dataset, 0))
    }
    wanted = [query_id in llm_ids or query_id in qrels for query_id in queries["query_id"].to_pylist()]
    return queries.filter(pa.array(wanted, pa.bool_())), llm_ids


def _found(
    config: Config,
    queries: pa.Table,
    prepare: Artifact,
    places: pa.Table,
    embeddings: Mapping[str, Artifact],
    indexes: Mapping[str, Artifact],
) -> dict[str, dict[str, Ranking]]:
    """method -> query id -> ranking, for every method but "none". places: all documents, without their texts."""
    k, ranges = config.evaluate.search_depth, scopes(queries, places)
    query_ids = queries["query_id"].to_pylist()
    result = {}
    for method in config.evaluate.methods:
        if method == "none":
            continue
        started = time.monotonic()
        if method == "random":
            found = random_topk(query_ids, eligible(queries, places, ranges), k, config.seed)
        elif method == "kmeans":
            vectors = to_matrix(embeddings["base"].read("document_embeddings"))
            number = config.evaluate.icl_demonstrations
            found = kmeans_topk(queries, eligible(queries, places, ranges), vectors, number, config.seed)
        elif method == "recency":
            # A chunk of a long text is read with its continuation, which is the chunk after it.
            strides = [2 if task == "lrlm" else 1 for task in queries["task"].to_pylist()]
            found = recency_topk(ranges, strides, k)
        elif method == "bm25":
            texts = document_texts(prepare.read("corpus", columns=["title", "text"]))
            found = bm25_topk(queries["query"].to_pylist(), texts, ranges, k, config.bm25.k1, config.bm25.b)
        else:
            vectors = query_vectors(embeddings[method], query_ids)
            found = search(config, indexes[method], vectors, ranges, k, encoder=encoder_of(embeddings[method]))
        log.info("ranked %d queries by %s in %.1f s", len(query_ids), method, time.monotonic() - started)
        result[method] = dict(zip(query_ids, _rankings(*found, places["doc_id"]), strict=True))
    return result


def _rankings(rows_QK: np.ndarray, scores_QK: np.ndarray, doc_ids: pa.ChunkedArray) -> Iterator[Ranking]:
    """What was found for each query, by the documents' ids instead of their rows."""
    is_found_QK = rows_QK >= 0
    names = iter(doc_ids.take(pa.array(rows_QK[is_found_QK])).to_pylist())
    for scores_K, is_found_K in zip(scores_QK, is_found_QK, strict=True):
        yield [(next(names), score) for score in scores_K[is_found_K].tolist()]


# --- what the LLM makes of it ----------------------------------------------------------------------------------------


def _protocols(config: Config, prepare: Artifact) -> dict[str, Protocol]:
    """The LLM half of each data set whose task has one."""
    settings, by_task = config.evaluate, _task_protocols(config)
    found = {name: by_task[data.task] for name, data in config.datasets.items() if data.task in by_task}
    published = {name: how for name, how in settings.qa_protocols.items() if how != "ours" and name in found}
    queries = prepare.read("queries").to_pylist() if published else []
    for name, how in published.items():
        found[name] = questions.protocol(
            how,
            [query for query in queries if query["dataset"] == name],
            num_passages=settings.qa_passages,
            passage_tokens=settings.qa_passage_tokens,
            match=settings.answer_match,
            seed=config.seed,
        )
    return found


def _task_protocols(config: Config) -> dict[str, Protocol]:
    """The LLM half of each task that has one."""
    settings, document_tokens = config.evaluate, config.llm.max_candidate_tokens
    return {
        "qa": Protocol(
            num_documents=settings.qa_passages,
            request=partial(
                knowledge.request,
                passage_tokens=settings.qa_passage_tokens,
                max_new_tokens=settings.qa_max_new_tokens,
            ),
            judge=partial(knowledge.judge, match=settings.answer_match),
        ),
        "chat": Protocol(
            num_documents=settings.chat_turns,
            request=partial(memory.chat_request, document_tokens=document_tokens),
            judge=memory.judge,
        ),
        "lrlm": Protocol(
            num_documents=settings.lrlm_chunks,
            request=partial(
                memory.text_request, document_tokens=document_tokens, window_tokens=settings.lrlm_window_tokens
            ),
            judge=memory.judge,
        ),
        "icl": Protocol(
            num_documents=settings.icl_demonstrations,
            request=partial(
                examples.request,
                demonstration_tokens=settings.icl_demonstration_tokens,
                max_new_tokens=settings.icl_max_new_tokens,
                protocol=settings.icl_protocol,
                cut=settings.icl_cut,
                option_space=settings.icl_option_space,
            ),
            judge=partial(examples.judge, protocol=settings.icl_protocol),
        ),
    }


def _asks(
    config: Config,
    protocols: Mapping[str, Protocol],
    queries: Sequence[Row],
    prepare: Artifact,
    places: pa.Table,
    rankings: Mapping[str, Mapping[str, Ranking]],
) -> list[Ask]:
    """What is asked about these queries."""
    rankings = _demoted(config, [query for query in queries if query["task"] == "icl"], places, rankings)
    documents = _documents_read(protocols, queries, prepare, rankings)
    found = []
    for dataset, members in groupby(queries, key=lambda query: str(query["dataset"])):
        found += asks(protocols[dataset], [*members], rankings, documents, config.evaluate.methods)
    return found


def _demoted(
    config: Config, queries: Sequence[Row], places: pa.Table, rankings: Mapping[str, Mapping[str, Ranking]]
) -> Mapping[str, Mapping[str, Ranking]]:
    """The rankings with examples of other tasks demoted for these queries, as `icl_demotion` says (methods.md B.9).

    The table `run` holds them as they were retrieved.
    """
    settings = config.evaluate
    if settings.icl_demotion == "none":
        return rankings
    owner_of = dict(zip(places["doc_id"].to_pylist(), owners(places["meta"].to_pylist()), strict=True))
    own = {
        query["query_id"]: query["dataset"]
        if settings.icl_demotion.endswith("test_name")
        else pool_of(query["dataset"])
        for query in queries
    }
    return {
        method: {
            query_id: examples.demoted(found, owner_of, own[query_id], settings.icl_demonstrations)
            if query_id in own
            else found
            for query_id, found in by_query.items()
        }
        for method, by_query in rankings.items()
    }


def _documents_read(
    protocols: Mapping[str, Protocol],
    queries: Sequence[Row],
    prepare: Artifact,
    rankings: Mapping[str, Mapping[str, Ranking]],
) -> dict[str, Row]:
    """The corpus rows that any prompt may contain."""
    read = {
        doc_id
        for query in queries
        for ranking in rankings.values()
        for doc_id, _ in ranking[query["query_id"]][: protocols[query["dataset"]].num_documents]
    }
    return {document["doc_id"]: document for document in prepare.read("corpus", ids=read).to_pylist()}


_Judged = tuple[Ask, LLMResult, Judgement | None]


def _judge(protocols: Mapping[str, Protocol], answers: Sequence[tuple[Ask, Sequence[LLMResult]]]) -> list[_Judged]:
    """Each question with its result and its judgement, None where the LLM failed (the client bounds how many may)."""
    judged: list[_Judged] = []
    for question, of_question in answers:
        result = reading.voted(question, of_question)
        judge = protocols[question.query["dataset"]].judge
        judged.append((question, result, judge(question.query, result) if result.error is None else None))
    return judged


def _count(num_judged_rankings: int, judged: Sequence[_Judged]) -> Counts:
    """One row is a (query, method) measured against labels, or answered by the LLM; labels are counted apart."""
    failed = Counter(f"llm: {result.error[:120]}" for _, result, _ in judged if result.error is not None)
    cached = sum(result.cached for _, result, _ in judged if result.error is None)
    return Counts(
        rows_in=num_judged_rankings + len(judged),
        ok=num_judged_rankings + len(judged) - cached - failed.total(),
        cached=cached,
        quarantined=failed,
        llm_tokens=sum(result.num_computed_tokens for _, result, _ in judged),
        llm_tokens_least=sum(result.num_least_tokens for _, result, _ in judged),
    )


def _metric_rows(judged: Sequence[_Judged]) -> list[Row]:
    rows: list[Row] = []
    for question, _, judgement in judged:
        query = question.query
        if judgement is None:
            continue
        where = {"scenario": SCENARIOS[query["task"]], "dataset": query["dataset"], "query_id": query["query_id"]}
        where["stratum"], values = judgement.stratum, judgement.values
        rows += [{**where, "method": question.method, "measure": name, "value": x} for name, x in values.items()]
    return rows


def _answer_row(question: Ask, result: LLMResult, judgement: Judgement | None) -> Row:
    return {
        "query_id": question.query["query_id"],
        "dataset": question.query["dataset"],
        "method": question.method,
        "doc_ids": [document["doc_id"] for document in question.documents],
        "prompt": "\n\n".join("".join(segment.text for segment in asked.segments) for asked in question.requests),
        "output": judgement.output if judgement is not None else None,
        "num_prompt_tokens": result.num_prompt_tokens,
        "truncated": result.truncated,
        "error": result.error,
    }
