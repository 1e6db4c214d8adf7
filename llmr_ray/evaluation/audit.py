"""The LLM's feedback beside every other ranking of the same candidates: where they disagree, and what to look at.

Everything is computed from finished artifacts when the report is written; no stage runs again. A ranking is a number
for each candidate, or unknown (null): it is never filled in. All training queries of tasks with LLM feedback count.

Legend: M candidates of a query, R rankings beside the LLM's.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
from scipy.stats import binomtest

from llmr_ray.artifacts import Artifact, seed_of
from llmr_ray.config import BM25Config, Config
from llmr_ray.data.scope import scopes
from llmr_ray.data.splits import unit_hash
from llmr_ray.data.text import document_texts
from llmr_ray.evaluation.concordance import (
    affordable_samples,
    alpha,
    alpha_interval,
    alpha_parts,
    intraclass,
    pairs_of,
    relative_ranks,
)
from llmr_ray.evaluation.injection import PATTERNS, suspicions
from llmr_ray.evaluation.significance import estimate
from llmr_ray.feedback.labels import gold_answers, holds_answer
from llmr_ray.frames import PAIR, frame_of
from llmr_ray.index.vectors import pair_similarities
from llmr_ray.mining.bm25 import BM25
from llmr_ray.schemas import PSEUDO

RANKINGS = ("bm25", "base", "trained", "label", "reward_model")
"""What is set beside the LLM's ranking, where it exists."""

STRONG = -1 / 3
"""Gamma at which rankings disagree strongly: of the pairs that both order, two in three the other way round."""

LEAST_ORDERED = 3
"""Pairs that both must order before anything is called strong."""

LENGTH_RATIO = 2.0
"""The LLM's best candidates are on average so many times as long as the rest, or as short."""

ANSWER_TASKS = ("qa", "convsearch")
"""Tasks whose helpful candidates hold the desired output."""

MOST_DOCUMENTS, MOST_PRODUCTS = 200_000, 1_000_000_000
"""Documents, and queries times the documents of their range, up to which BM25 is computed for every candidate."""


MOST_PAIRS = 5_000_000
"""Pairs of a query and a candidate that are audited; of more, those of queries drawn by a hash of the id."""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What is audited.

    pairs: a row per query and candidate, all of a query together: query_id, doc_id, source, llm (-inf: a rule put it
    below all that the LLM scored), rule, and the columns of RANKINGS, null where unknown; relevance is the label as the
    data gives it, `label` has 0 for a candidate that the data of a labelled query does not mention. suspicious: the
    names of the patterns in its text. num_chars: of the text that the LLM reads.
    queries: their rows of `queries`. documents: the candidates' rows of `corpus`. bm25: "all", or "found" where only
    candidates that BM25 itself brought have its score. share: of the queries that are here, 1 unless there are too many
    pairs. unasked: tasks without feedback of the LLM, which are not here.
    """

    pairs: pl.DataFrame
    queries: dict[str, dict[str, Any]]
    documents: dict[str, str]
    bm25: str
    share: float
    unasked: list[str]

    @property
    def rankings(self) -> list[str]:
        """Those of RANKINGS that any pair has."""
        return [name for name in RANKINGS if self.pairs[name].null_count() < self.pairs.height]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What was found about one query.

    taus, gammas: by ranking, NaN where nothing can be said. gains: by ranking, the LLM's own among them, how much
    better than a random candidate its first one is by the LLM's feedback. parts: for `alpha`. flags: filter -> whether
    it holds; filters that cannot be told for the query are absent.
    """

    taus: dict[str, float]
    gains: dict[str, float]
    gammas: dict[str, float]
    parts: dict[str, np.ndarray]
    flags: dict[str, bool]


def can_audit(artifacts: Mapping[str, Artifact]) -> bool:
    """Whether a run has what there is to audit."""
    if "candidates" not in artifacts or "rewards" not in artifacts:
        return False
    return bool(artifacts["rewards"].require()["rows"].get("rewards", 0))


def judged(config: Config, artifacts: Mapping[str, Artifact]) -> Judged:
    """Gathers all rankings of the candidates of the last round.

    Args:
        config: of the run.
        artifacts: "prepare", "candidates" and "rewards"; "embed_base", "embed_trained" and "teach" (the reward model's
            scores) where they exist.
    """
    prepare = artifacts["prepare"]
    queries = prepare.read("queries")
    rewards = frame_of(artifacts["rewards"].read("rewards"), [*PAIR, "reward", "reward_source"])
    rewards = rewards.filter(pl.col("reward_source") != PSEUDO)
    task_of = frame_of(queries, ["query_id", "task"])
    mined = frame_of(artifacts["candidates"].read("candidates"), [*PAIR, "source", "retrieval_score"])
    mined = mined.join(task_of, on="query_id", maintain_order="left")
    asked = rewards.select("query_id").unique().join(task_of, on="query_id")["task"].unique().to_list()
    unasked = sorted(set(mined["task"].unique().to_list()) - set(asked))
    mined = mined.filter(pl.col("task").is_in(asked))
    share = min(1.0, MOST_PAIRS / max(1, mined.height))
    if share < 1:
        drawn = [query_id for query_id in mined["query_id"].unique() if unit_hash("audit", query_id) < share]
        mined = mined.filter(pl.col("query_id").is_in(drawn))
    pairs = mined.join(rewards, on=PAIR, how="left", maintain_order="left")
    is_ruled = pl.col("reward").is_null() & pl.col("reward_source").is_not_null()
    pairs = pairs.with_columns(
        llm=pl.when(is_ruled).then(-math.inf).otherwise(pl.col("reward").cast(pl.Float64)),
        rule=pl.when(is_ruled).then(pl.col("reward_source")),
    )
    # A query's candidates stand together, in the order in which they were mined.
    pairs = pairs.with_columns(pl.col("query_id").rank("dense").alias("_query")).sort("_query", maintain_order=True)
    wanted = queries.filter(pc.is_in(queries["query_id"], value_set=_strings(pairs["query_id"])))
    scores, how = _bm25(pairs, wanted, prepare, config.bm25)
    pairs = pairs.with_columns(bm25=scores)
    pairs = _with_labels(pairs, frame_of(prepare.read("qrels"), [*PAIR, "relevance"]))
    for name in ("base", "trained"):
        vectors = artifacts.get(f"embed_{name}")
        known = _unknown(pairs)
        if vectors is not None:
            cosines = pair_similarities(vectors, pairs["query_id"].to_list(), pairs["doc_id"].to_list())
            known = pl.Series(cosines, dtype=pl.Float64)
        pairs = pairs.with_columns(known.alias(name))
    if "teach" in artifacts:
        taught = frame_of(artifacts["teach"].read("rewards"), [*PAIR, "reward"]).rename({"reward": "reward_model"})
        taught = taught.with_columns(pl.col("reward_model").cast(pl.Float64))
        pairs = pairs.join(taught, on=PAIR, how="left", maintain_order="left")
    else:
        pairs = pairs.with_columns(_unknown(pairs).alias("reward_model"))
    pairs, documents = _with_texts(pairs, prepare)
    return Judged(
        pairs=pairs.drop("_query", "reward", "reward_source"),
        queries={row["query_id"]: row for row in wanted.to_pylist()},
        documents=documents,
        bm25=how,
        share=share,
        unasked=unasked,
    )


def verdicts(audited: Judged) -> dict[str, Verdict]:
    """What is found about each query, in their order."""
    names = audited.rankings
    columns = {name: audited.pairs[name].to_numpy().astype(np.float64) for name in ("llm", *names)}
    lengths_P = audited.pairs["num_chars"].to_numpy().astype(np.float64)
    is_suspicious_P = (audited.pairs["suspicious"].list.len() > 0).to_numpy()
    doc_ids = audited.pairs["doc_id"].to_list()
    ids = audited.pairs["query_id"].to_numpy()
    starts = np.concatenate([[0], np.flatnonzero(ids[1:] != ids[:-1]) + 1, [len(ids)]])
    found = {}
    for start, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        part = slice(start, end)
        llm_M = columns["llm"][part]
        flags = {"injection": bool(is_suspicious_P[part].any())}
        taus, gammas, parts = {}, {}, {}
        gains = {name: gain for name in columns if (gain := _gain(llm_M, columns[name][part])) is not None}
        for name in names:
            other_M = columns[name][part]
            both_M = ~np.isnan(llm_M) & ~np.isnan(other_M)
            if both_M.sum() < 2:
                continue
            pairs = pairs_of(llm_M[both_M], other_M[both_M])
            taus[name], gammas[name] = pairs.tau, pairs.gamma
            parts[name] = alpha_parts(relative_ranks(llm_M[both_M]), relative_ranks(other_M[both_M]))
            if pairs.ordered >= LEAST_ORDERED:
                # Two thirds as a float are a little less or more than as counts.
                flags[f"against_{name}"] = pairs.gamma <= STRONG + 1e-9
        flags |= _length_flags(llm_M, lengths_P[part])
        query = audited.queries[str(ids[start])]
        answers = gold_answers(query["targets"]) if query["task"] in ANSWER_TASKS else []
        if answers and not np.isnan(llm_M).all():
            best = np.flatnonzero(llm_M == np.nanmax(llm_M)) + start
            texts = [audited.documents[doc_ids[place]] for place in best.tolist()]
            flags["answer_absent"] = not any(holds_answer(text, answers) for text in texts)
        found[query["query_id"]] = Verdict(taus=taus, gammas=gammas, gains=gains, parts=parts, flags=flags)
    return found


def filters(audited: Judged) -> list[str]:
    """The names of all filters, in the order in which they are shown."""
    against = [f"against_{name}" for name in audited.rankings]
    return [*against, "answer_absent", "top_longer", "top_shorter", "injection"]


def summary(audited: Judged, found: Mapping[str, Verdict], *, samples: int, seed: int) -> dict[str, Any]:
    """The figures over all queries, as results.json has them.

    Args:
        audited: what was judged.
        found: its verdicts.
        samples, seed: of the bootstrap over queries; samples are fewer where there are very many queries.

    Returns:
        gains: for each task and ranking, the LLM's own last, n (queries) and how much better than a random candidate
        the one that it puts first is, by the LLM's feedback: mean and ci95, in units of the feedback;
        sameness: for each data set how far the LLM's feedback on a candidate is the same whatever is asked: the share
        (value, ci95) of its variance within queries that the candidate alone explains, of n pairs whose candidate was
        judged for several queries (num_documents);
        agreement: for each task and ranking n (queries with a tau), unknown (queries without: fewer than two candidates
        that both ranked, or all equal), tau and alpha with mean (value) and ci95; filters: for each task and filter how
        many of the n queries for which it can be told it holds, with a Wilson interval; num_queries by task; bm25,
        share and unasked as Judged has them; known: the share of pairs that each ranking has a number for.
    """
    tasks = sorted({query["task"] for query in audited.queries.values()})
    members = {task: [name for name in found if audited.queries[name]["task"] == task] for task in tasks}
    agreement = [
        _agreement(task, name, [found[query_id] for query_id in members[task]], samples=samples, seed=seed)
        for task in tasks
        for name in audited.rankings
    ]
    gains = [
        _gained(task, name, [found[query_id] for query_id in members[task]], samples=samples, seed=seed)
        for task in tasks
        for name in (*audited.rankings, "llm")
    ]
    held = []
    for task in tasks:
        for name in filters(audited):
            told = [found[query_id].flags[name] for query_id in members[task] if name in found[query_id].flags]
            if told:
                interval = binomtest(sum(told), len(told)).proportion_ci(method="wilson")
                held.append(
                    {
                        "task": task,
                        "filter": name,
                        "count": sum(told),
                        "n": len(told),
                        "ci95": [float(interval.low), float(interval.high)],
                    }
                )
    return {
        "num_queries": {task: len(ids) for task, ids in members.items()},
        "gains": [row for row in gains if row],
        "sameness": _sameness(audited),
        "agreement": agreement,
        "filters": held,
        "bm25": audited.bm25,
        "share": audited.share,
        "unasked": audited.unasked,
        "known": {name: 1 - audited.pairs[name].null_count() / audited.pairs.height for name in audited.rankings},
    }


def _agreement(task: str, name: str, members: Sequence[Verdict], *, samples: int, seed: int) -> dict[str, Any]:
    taus = np.asarray([verdict.taus[name] for verdict in members if name in verdict.taus])
    taus = taus[np.isfinite(taus)]
    row: dict[str, Any] = {"task": task, "ranking": name, "n": len(taus), "unknown": len(members) - len(taus)}
    parts = [verdict.parts[name] for verdict in members if name in verdict.parts]
    samples = affordable_samples(samples, len(members))
    drawn = seed_of(seed, "audit", task, name)
    tau = estimate([taus], exponential=False, samples=samples, seed=drawn) if len(taus) else None
    row["tau"] = {"mean": tau.mean, "ci95": [tau.low, tau.high]} if tau else None
    value = float(alpha(np.sum(parts, axis=0))) if parts else math.nan
    low, high = alpha_interval(np.stack(parts), samples=samples, seed=drawn) if parts else (math.nan, math.nan)
    is_known = math.isfinite(value) and math.isfinite(low)
    row["alpha"] = {"value": value, "ci95": [low, high], "n": len(parts)} if is_known else None
    return row


def _gain(llm_M: np.ndarray, other_M: np.ndarray) -> float | None:
    """The LLM's feedback on what another ranking puts first, less the mean over all candidates that both know.

    Candidates that a rule judged have no feedback and do not count. None: fewer than two are left.
    """
    both_M = np.isfinite(llm_M) & ~np.isnan(other_M)
    if both_M.sum() < 2:
        return None
    asked, ranked = llm_M[both_M], other_M[both_M]
    return float(asked[ranked == ranked.max()].mean() - asked.mean())


def _gained(task: str, name: str, members: Sequence[Verdict], *, samples: int, seed: int) -> dict[str, Any] | None:
    gains = np.asarray([verdict.gains[name] for verdict in members if name in verdict.gains])
    if not len(gains):
        return None
    samples = affordable_samples(samples, len(gains))
    gain = estimate([gains], exponential=False, samples=samples, seed=seed_of(seed, "gain", task, name))
    return {"task": task, "ranking": name, "n": len(gains), "mean": gain.mean, "ci95": [gain.low, gain.high]}


def _sameness(audited: Judged) -> list[dict[str, Any]]:
    dataset_of = {query_id: query["dataset"] for query_id, query in audited.queries.items()}
    asked = audited.pairs.filter(pl.col("llm").is_finite())
    asked = asked.with_columns(
        dataset=pl.col("query_id").replace_strict(dataset_of, return_dtype=pl.String),
        value=pl.col("llm") - pl.col("llm").mean().over("query_id"),
        group=pl.col("doc_id").rank("dense"),
    )
    found = []
    for dataset in sorted(set(asked["dataset"])):
        own = asked.filter(pl.col("dataset") == dataset)
        same = intraclass(own["value"].to_numpy(), own["group"].to_numpy())
        if same is not None:
            row = {"dataset": dataset, "value": same.value, "ci95": [same.low, same.high]}
            found.append(row | {"num_documents": same.num_groups, "n": same.num_values})
    return found


def _length_flags(llm_M: np.ndarray, lengths_M: np.ndarray) -> dict[str, bool]:
    """Whether the LLM's best candidates are much longer, or much shorter, than those it likes less."""
    known_M = ~np.isnan(llm_M)
    if not known_M.any():
        return {}
    best = llm_M[known_M].max()
    is_best_M = known_M & (llm_M == best)
    rest_M = known_M & ~is_best_M
    if not rest_M.any():
        return {}
    ratio = lengths_M[is_best_M].mean() / max(1.0, lengths_M[rest_M].mean())
    return {"top_longer": bool(ratio >= LENGTH_RATIO), "top_shorter": bool(ratio <= 1 / LENGTH_RATIO)}


def _with_labels(pairs: pl.DataFrame, qrels: pl.DataFrame) -> pl.DataFrame:
    labelled = qrels.select("query_id").unique().with_columns(_labelled=pl.lit(True))
    pairs = pairs.join(qrels, on=PAIR, how="left", maintain_order="left")
    pairs = pairs.join(labelled, on="query_id", how="left", maintain_order="left")
    label = pl.when(pl.col("_labelled").is_not_null()).then(pl.col("relevance").fill_null(0).cast(pl.Float64))
    return pairs.with_columns(label=label).drop("_labelled")


def _with_texts(pairs: pl.DataFrame, prepare: Artifact) -> tuple[pl.DataFrame, dict[str, str]]:
    """The pairs with what their texts look like, and the texts as the LLM reads them."""
    columns = ["doc_id", "title", "text", "continuation"]
    shown = prepare.read("corpus", columns=columns, ids=pairs["doc_id"].unique().to_list())
    continued = zip(document_texts(shown), shown["continuation"].to_pylist(), strict=True)
    texts = [text + (more or "") for text, more in continued]
    doc_ids = shown["doc_id"].to_pylist()
    series = pl.Series(texts, dtype=pl.String)
    told = suspicions(series).with_columns(
        doc_id=pl.Series(doc_ids, dtype=pl.String), num_chars=series.str.len_chars().cast(pl.Int64)
    )
    patterns = pl.concat_list([pl.when(pl.col(name)).then(pl.lit(name)) for name in PATTERNS]).list.drop_nulls()
    told = told.with_columns(suspicious=patterns).select("doc_id", "num_chars", "suspicious")
    return pairs.join(told, on="doc_id", how="left", maintain_order="left"), dict(zip(doc_ids, texts, strict=True))


def _bm25(pairs: pl.DataFrame, queries: pa.Table, prepare: Artifact, settings: BM25Config) -> tuple[pl.Series, str]:
    """BM25's score of each pair, and whether all have one."""
    places = prepare.read("corpus", columns=["doc_id", "pool", "position"])
    ranges = dict(zip(queries["query_id"].to_pylist(), scopes(queries, places).tolist(), strict=True))
    products = sum(end - start for start, end in ranges.values())
    if places.num_rows > MOST_DOCUMENTS or products > MOST_PRODUCTS:
        found = pl.when(pl.col("source") == "bm25").then(pl.col("retrieval_score").cast(pl.Float64))
        return pairs.select(found.alias("bm25"))["bm25"], "found"
    engine = BM25(document_texts(prepare.read("corpus", columns=["title", "text"])), settings.k1, settings.b)
    row_of = {doc_id: row for row, doc_id in enumerate(places["doc_id"].to_pylist())}
    text_of = dict(zip(queries["query_id"].to_pylist(), queries["query"].to_pylist(), strict=True))
    scores = []
    for (query_id,), members in pairs.select(PAIR).group_by(["query_id"], maintain_order=True):
        start, end = ranges[str(query_id)]
        rows = [row_of[doc_id] for doc_id in members["doc_id"].to_list()]
        scores.append(engine.scores_of(text_of[str(query_id)], start, end, rows))
    together = np.concatenate(scores) if scores else np.zeros(0)
    return pl.Series(together, dtype=pl.Float64), "all"


def _unknown(pairs: pl.DataFrame) -> pl.Series:
    return pl.Series([None] * pairs.height, dtype=pl.Float64)


def _strings(column: pl.Series) -> pa.Array:
    return pa.array(column.unique().to_list(), pa.string())
