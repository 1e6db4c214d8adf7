"""A few queries in full: what the LLM rewarded in training, and what is retrieved before and after.

Which queries are shown is decided by a hash of the id, never by how well they look: of the test queries one that
improved and one that got worse, each the first by hash.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from llmr_ray.artifacts import Artifact, sha256_text
from llmr_ray.evaluation.examples import MAIN_MEASURES
from llmr_ray.evaluation.protocols import LOWER_IS_BETTER, POSITIVE_F1, RETRIEVAL_MEASURES, SCENARIOS

SHOWN_CHARACTERS = 500
SHOWN_DOCUMENTS = 3
TRAINING_QUERIES = 2


def training_examples(artifacts: Mapping[str, Artifact]) -> list[dict[str, Any]]:
    """Training queries of each scenario with their candidates, rewards and LLM scores, best reward first.

    Queries whose candidates differ in reward come first; a task trained on labels shows its candidates alone.

    Args:
        artifacts: "prepare" and "candidates" are needed; "rewards" and "llm_scores" are shown where they exist.
    """
    if "candidates" not in artifacts:
        return []
    queries = _by_id(artifacts["prepare"].read("queries"), "query_id", None)
    candidates = artifacts["candidates"].read("candidates")
    rewards = artifacts["rewards"].read("rewards") if "rewards" in artifacts else None
    mined = pc.unique(candidates["query_id"]).to_pylist()
    informative = _informative(rewards)
    chosen = []
    for scenario in dict.fromkeys(SCENARIOS.values()):
        mine = [query_id for query_id in mined if SCENARIOS[queries[query_id]["task"]] == scenario]
        mine.sort(key=lambda query_id: (query_id not in informative, sha256_text(query_id)))
        chosen += mine[:TRAINING_QUERIES]
    rows = _grouped(_of(candidates, chosen))
    reward_of = _pairs(rewards, chosen, "reward")
    scores = artifacts["llm_scores"].read("llm_scores") if "llm_scores" in artifacts else None
    score_of = _pairs(scores, chosen, "llm_score")
    shown = {row["doc_id"] for members in rows.values() for row in members}
    documents = _documents(artifacts["prepare"], shown)
    result = []
    for query_id in chosen:
        entries = [
            {
                "source": row["source"],
                "retrieval_score": row["retrieval_score"],
                "llm_score": score_of.get((query_id, row["doc_id"])),
                "reward": reward_of.get((query_id, row["doc_id"])),
                "text": _document(documents[row["doc_id"]]),
            }
            for row in rows[query_id]
        ]
        entries.sort(key=lambda entry: -entry["reward"] if entry["reward"] is not None else float("inf"))
        result.append({**_query(queries[query_id]), "candidates": entries})
    return result


def test_examples(artifacts: Mapping[str, Artifact], trained: str) -> list[dict[str, Any]]:
    """Test queries of each scenario with what the base and the trained embedder retrieve, and what the LLM answers.

    Args:
        artifacts: "prepare" and "evaluate".
        trained: the method to set beside "base".
    """
    prepare, evaluate = artifacts["prepare"], artifacts["evaluate"]
    metrics = evaluate.read("metrics")
    values: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for row in metrics.filter(pc.is_in(metrics["method"], value_set=pa.array(["base", trained]))).to_pylist():
        if row["measure"] == POSITIVE_F1:  # says nothing about a single query that accuracy does not say
            continue
        values[row["query_id"], row["method"]][row["measure"]] = row["value"]
    both = [query_id for query_id, method in values if method == "base" and (query_id, trained) in values]
    queries = _by_id(prepare.read("queries"), "query_id", set(both))
    chosen = []
    for scenario in dict.fromkeys(SCENARIOS.values()):
        gains = {}
        for query_id in both:
            task = queries[query_id]["task"]
            if SCENARIOS[task] == scenario:
                gains[query_id] = _gain(task, values[query_id, "base"], values[query_id, trained])
        chosen += _one_of_each(gains)
    run = _of(evaluate.read("run"), [query_id for query_id, _ in chosen])
    top = run.filter(pc.less_equal(run["rank"], SHOWN_DOCUMENTS))
    documents = _documents(prepare, top["doc_id"].to_pylist())
    answers = _grouped(_of(evaluate.read("answers"), [query_id for query_id, _ in chosen]))
    relevant = _pairs(prepare.read("qrels"), [query_id for query_id, _ in chosen], "relevance")
    rankings = _grouped(top.sort_by("rank"))
    result = []
    for query_id, change in chosen:
        sides = []
        for method in ("base", trained):
            outputs = [row["output"] for row in answers.get(query_id, []) if row["method"] == method]
            sides.append(
                {
                    "method": method,
                    "values": values[query_id, method],
                    "output": _cut(outputs[0]) if outputs and outputs[0] is not None else None,
                    "documents": [
                        {
                            "text": _document(documents[row["doc_id"]]),
                            "is_relevant": relevant.get((query_id, row["doc_id"]), 0) > 0,
                        }
                        for row in rankings.get(query_id, [])
                        if row["run_name"] == method
                    ],
                }
            )
        result.append({**_query(queries[query_id]), "change": change, "sides": sides})
    return result


def _gain(task: str, base: Mapping[str, float], trained: Mapping[str, float]) -> float:
    """By how much the trained embedder is better on the query's main measure."""
    preferred = (RETRIEVAL_MEASURES[task][0], "perplexity", *MAIN_MEASURES, *base)
    measure = next((name for name in preferred if name in base and name in trained), None)
    if measure is None:
        return 0.0
    gain = trained[measure] - base[measure]
    return -gain if measure in LOWER_IS_BETTER else gain


def _one_of_each(gains: Mapping[str, float]) -> list[tuple[str, str]]:
    """(query id, what changed): the first improved and the first worsened by hash, else the first of all."""
    ordered = sorted(gains, key=sha256_text)
    picked = []
    for change, sign in (("improved", 1), ("worse", -1)):
        picked += [(query_id, change) for query_id in ordered if gains[query_id] * sign > 0][:1]
    return picked or [(query_id, "unchanged") for query_id in ordered[:1]]


def _informative(rewards: pa.Table | None) -> set[str]:
    """Queries whose candidates do not all have the same reward."""
    if rewards is None:
        return set()
    spread = rewards.group_by("query_id").aggregate([("reward", "min"), ("reward", "max")])
    return set(spread.filter(pc.greater(spread["reward_max"], spread["reward_min"]))["query_id"].to_pylist())


def _of(table: pa.Table, query_ids: Sequence[str]) -> pa.Table:
    return table.filter(pc.is_in(table["query_id"], value_set=pa.array(query_ids, pa.string())))


def _documents(prepare: Artifact, ids: Iterable[str]) -> dict[str, dict[str, Any]]:
    return {row["doc_id"]: row for row in prepare.read("corpus", ids=ids).to_pylist()}


def _by_id(table: pa.Table, key: str, ids: set[str] | None) -> dict[str, dict[str, Any]]:
    if ids is not None:
        table = table.filter(pc.is_in(table[key], value_set=pa.array(sorted(ids), pa.string())))
    return {row[key]: row for row in table.to_pylist()}


def _grouped(table: pa.Table) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in table.to_pylist():
        groups[row["query_id"]].append(row)
    return groups


def _pairs(table: pa.Table | None, query_ids: Sequence[str], column: str) -> dict[tuple[str, str], Any]:
    if table is None:
        return {}
    return {(row["query_id"], row["doc_id"]): row[column] for row in _of(table, query_ids).to_pylist()}


def _query(query: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "scenario": SCENARIOS[query["task"]],
        "dataset": query["dataset"],
        "query_id": query["query_id"],
        "query": _cut(query["query"]),
        "targets": [_cut(target) for target in query["targets"][:3]],
        "options": query["options"],
    }


def _document(document: Mapping[str, Any]) -> str:
    return _cut(document["text"] + (document["continuation"] or ""))


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "…"
