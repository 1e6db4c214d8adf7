"""Figures of a run as MTEB keeps them: one JSON file for each data set with labels, of the exported rankings."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from llmr_ray.durable import write_atomic
from llmr_ray.errors import DataError
from llmr_ray.evaluation.metrics import retrieval_values

DEPTHS = (1, 3, 5, 10, 20, 100)
MEASURES = {"ndcg": "nDCG", "map": "AP", "recall": "R", "precision": "P", "mrr": "RR"}
"""MTEB's names, and those of ir_measures."""
MAIN = "ndcg_at_10"


def measures(depth: int) -> dict[str, str]:
    """MTEB's name of each measure that rankings of a depth hold, and ir_measures' name of it."""
    return {
        f"{name}_at_{k}": f"{measure}@{k}" for name, measure in MEASURES.items() for k in DEPTHS if k <= max(depth, 10)
    }


def judged_by_dataset(qrels: pa.Table, datasets: Mapping[str, str]) -> dict[str, dict[str, dict[str, int]]]:
    """Relevance by data set, query and document.

    Args:
        qrels: the `qrels` table.
        datasets: query id -> data set, of the evaluated queries; others do not count.
    """
    found: dict[str, dict[str, dict[str, int]]] = defaultdict(lambda: defaultdict(dict))
    for row in qrels.to_pylist():
        if (dataset := datasets.get(row["query_id"])) is not None:
            found[dataset][row["query_id"]][row["doc_id"]] = row["relevance"]
    return found


def dataset_scores(
    run: pa.Table, judged: Mapping[str, Mapping[str, Mapping[str, int]]], method: str, depth: int
) -> dict[str, dict[str, float]]:
    """The mean of every measure over all judged queries of a data set, one without results counting 0.

    Raises:
        DataError: the run has no ranking of the method.
    """
    own = run.filter(pc.equal(run["run_name"], method))
    if not len(own):
        methods = sorted(run["run_name"].unique().to_pylist())
        raise DataError(f"the run has no rankings of '{method}'. Methods: {', '.join(methods)}.")
    rankings: dict[str, list[tuple[int, str, float]]] = defaultdict(list)
    for row in own.to_pylist():
        rankings[row["query_id"]].append((row["rank"], row["doc_id"], row["score"]))
    ordered = {query: [(doc_id, score) for _, doc_id, score in sorted(rows)] for query, rows in rankings.items()}
    names = measures(depth)
    found = {}
    for dataset, of_queries in judged.items():
        values = retrieval_values(of_queries, ordered, list(names.values()))
        found[dataset] = {name: _mean(list(values[measure].values())) for name, measure in names.items()}
    return found


def task_result(
    dataset: str, scores: Mapping[str, float], *, revision: str, split: str, languages: Sequence[str], seconds: float
) -> dict[str, Any]:
    """A data set's figures as MTEB's TaskResult reads them."""
    try:
        mteb_version: str | None = version("mteb")
    except PackageNotFoundError:
        mteb_version = None
    entry = {"hf_subset": "default", "languages": list(languages), "main_score": scores[MAIN], **scores}
    return {
        "task_name": dataset,
        "dataset_revision": revision,
        "mteb_version": mteb_version,
        "scores": {split: [entry]},
        "evaluation_time": seconds,
        "kg_co2_emissions": None,
    }


def write_results(out: Path, results: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Writes a file for each result; returns the number of splits in each."""
    for result in results:
        write_atomic(out / f"{result['task_name']}.json", (json.dumps(result, indent=2) + "\n").encode())
    return {f"{result['task_name']}.json": len(result["scores"]) for result in results}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
