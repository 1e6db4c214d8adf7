"""From a value per query to the figures of the tables: mean, 95% interval, n, and the difference to the base embedder.

The rows made here are `rows` of results.json; the report and the terminal only show them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from llmr_ray.artifacts import seed_of
from llmr_ray.evaluation.examples import MAIN_MEASURES
from llmr_ray.evaluation.protocols import LOWER_IS_BETTER, RETRIEVAL_MEASURES, SCENARIOS
from llmr_ray.evaluation.significance import estimate, paired_difference

AVERAGE = "average"
"""The data set name of the macro average over data sets (examples)."""

AVERAGE_MEASURE = "score"
"""Its measure: each data set enters with its own main measure."""

_Values = dict[str, dict[str, float]]
"""method -> query id -> value."""


def result_rows(
    metrics: pa.Table,
    tasks: Mapping[str, str],
    methods: Sequence[str],
    *,
    samples: int,
    seed: int,
    artifacts: Mapping[str, dict[str, str]],
) -> list[dict[str, Any]]:
    """Every figure of the tables, by scenario, data set, measure and method.

    Args:
        metrics: the `metrics` table. Values of ``perplexity`` are mean NLLs.
        tasks: data set -> task; data sets come out in this order.
        methods: rows of the tables, in order.
        samples: bootstrap and randomisation samples.
        seed: of the run.
        artifacts: method -> the ids of the artifacts its figures rest on.

    Returns:
        dictionaries with scenario, dataset, task, method, measure, mean, ci95, n, delta_vs_base (None where there is
        nothing to compare), lower_is_better, is_main and artifacts. A difference is method minus base, so for
        perplexity a negative one is better.
    """
    values: dict[tuple[str, str], _Values] = {}
    for row in metrics.to_pylist():
        by_method = values.setdefault((row["dataset"], row["measure"]), {})
        by_method.setdefault(row["method"], {})[row["query_id"]] = row["value"]
    order = {scenario: number for number, scenario in enumerate(dict.fromkeys(SCENARIOS.values()))}
    rows = []
    for dataset in sorted(tasks, key=lambda name: order[SCENARIOS[tasks[name]]]):
        for (owner, measure), by_method in values.items():
            if owner == dataset:
                rows += _rows_of(dataset, tasks[dataset], measure, [by_method], methods, samples, seed, artifacts)
    strata = []
    for dataset in (name for name, task in tasks.items() if task == "icl"):
        main = next((measure for measure in MAIN_MEASURES if (dataset, measure) in values), None)
        if main is not None:
            strata.append(values[dataset, main])
    if strata:
        rows += _rows_of(AVERAGE, "icl", AVERAGE_MEASURE, strata, methods, samples, seed, artifacts)
    return rows


def _rows_of(
    dataset: str,
    task: str,
    measure: str,
    strata: Sequence[_Values],
    methods: Sequence[str],
    samples: int,
    seed: int,
    artifacts: Mapping[str, dict[str, str]],
) -> list[dict[str, Any]]:
    """The figures of one column of a table: one stratum for a data set, one per data set for an average."""
    exponential = measure == "perplexity"
    column_seed = seed_of(seed, "bootstrap", dataset, measure)
    rows = []
    for method in methods:
        if any(not values.get(method) for values in strata):
            continue
        figure = estimate(
            [np.asarray(list(values[method].values())) for values in strata],
            exponential=exponential,
            samples=samples,
            seed=column_seed,
        )
        delta = None
        pairs = [_paired(values[method], values.get("base", {})) for values in strata]
        if method != "base" and all(len(pair) for pair in pairs):
            difference = paired_difference(
                [pair[:, 0] for pair in pairs],
                [pair[:, 1] for pair in pairs],
                exponential=exponential,
                samples=samples,
                seed=column_seed,
            )
            delta = {
                "mean": difference.mean,
                "ci95": [difference.low, difference.high],
                "p": difference.p,
                "n": difference.n,
            }
        rows.append(
            {
                "scenario": SCENARIOS[task],
                "dataset": dataset,
                "task": task,
                "method": method,
                "measure": measure,
                "mean": figure.mean,
                "ci95": [figure.low, figure.high],
                "n": figure.n,
                "delta_vs_base": delta,
                "lower_is_better": measure in LOWER_IS_BETTER,
                "is_main": _is_main(dataset, task, measure),
                "artifacts": artifacts[method],
            }
        )
    return rows


def _paired(method: Mapping[str, float], base: Mapping[str, float]) -> np.ndarray:
    """float64 [N, 2]: the values of the queries that both have."""
    shared = [query_id for query_id in method if query_id in base]
    return np.asarray([[method[query_id], base[query_id]] for query_id in shared]).reshape(-1, 2)


def _is_main(dataset: str, task: str, measure: str) -> bool:
    """Whether a figure stands for its scenario: nDCG, the perplexity of dialogues, the average of examples."""
    if task == "icl":
        return dataset == AVERAGE
    if task in ("chat", "lrlm"):
        return task == "chat" and measure == "perplexity"
    return measure == RETRIEVAL_MEASURES[task][0]
