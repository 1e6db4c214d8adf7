"""From a value per query to the figures of the tables: mean, 95% interval, n, and the difference to the base embedder.

The rows made here are `rows` of results.json; the report and the terminal only show them.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from llmr_ray.artifacts import seed_of
from llmr_ray.config import Config
from llmr_ray.data.example_tasks import TASKS, pool_of
from llmr_ray.evaluation.examples import main_measure
from llmr_ray.evaluation.protocols import LOWER_IS_BETTER, POSITIVE_F1, RETRIEVAL_MEASURES, SCENARIOS
from llmr_ray.evaluation.questions import MMLU_CATEGORIES
from llmr_ray.evaluation.significance import estimate, paired_difference
from llmr_ray.evaluation.tables import result_of

AVERAGE = "average"
"""The data set name of the macro average over data sets (examples)."""

AVERAGE_MEASURE = "score"
"""Its measure: each data set enters with its own main measure."""

HELD_OUT = "held-out tasks"
"""The average over the examples' data sets that the run did not train on."""

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
    held_out: Collection[str] = (),
    reading: str = "passages",
) -> list[dict[str, Any]]:
    """Every figure of the tables, by scenario, data set, measure and method.

    Examples have averages over data sets besides: over all, over each category of several data sets, and over those
    that are held out. A data set with strata (the subjects of MMLU) is the average over these, and has one over each of
    their categories.

    Args:
        metrics: the `metrics` table. Values of ``perplexity`` and ``F1-positive`` are those of protocols.Judgement.
        tasks: data set -> task; data sets come out in this order.
        methods: rows of the tables, in order.
        samples: bootstrap and randomisation samples.
        seed: of the run.
        artifacts: method -> the ids of the artifacts its figures rest on.
        held_out: data sets that nothing was trained on.
        reading: how the LLM read the passages of questions (evaluate.reading).

    Returns:
        dictionaries with scenario, dataset, task, method, measure, mean, ci95, n, delta_vs_base (method minus base, or
        None), delta_of_result (what training led to minus the method, of main figures), lower_is_better, is_main and
        artifacts; and reading, where the LLM answered questions from passages. For perplexity a negative difference is
        better.
    """
    values: dict[tuple[str, str], _Values] = {}
    parts: dict[tuple[str, str], dict[str, _Values]] = {}
    for row in metrics.to_pylist():
        key, stratum = (row["dataset"], row["measure"]), row.get("stratum")
        by_method = values.setdefault(key, {})
        by_method.setdefault(row["method"], {})[row["query_id"]] = row["value"]
        if stratum is not None:
            of_part = parts.setdefault(key, {}).setdefault(stratum, {})
            of_part.setdefault(row["method"], {})[row["query_id"]] = row["value"]
    order = {scenario: number for number, scenario in enumerate(dict.fromkeys(SCENARIOS.values()))}
    rows = []
    for dataset in sorted(tasks, key=lambda name: order[SCENARIOS[tasks[name]]]):
        for (owner, measure), by_method in values.items():
            if owner != dataset:
                continue
            for figure, of_figure in _figures_of(dataset, by_method, parts.get((owner, measure), {})).items():
                strata = [(measure, part) for part in of_figure]
                rows += _rows_of(figure, tasks[dataset], measure, strata, methods, samples, seed, artifacts)
    mains: dict[str, tuple[str, _Values]] = {}
    for dataset in (name for name, task in tasks.items() if task == "icl"):
        main = main_measure(dataset, [measure for owner, measure in values if owner == dataset])
        if main is not None:
            mains[dataset] = (main, values[dataset, main])
    for name, members in _averages(list(mains), held_out).items():
        strata = [mains[dataset] for dataset in members]
        rows += _rows_of(name, "icl", AVERAGE_MEASURE, strata, methods, samples, seed, artifacts)
    for row in rows:
        if row["task"] == "qa" and row["method"] != "none" and row["measure"] not in RETRIEVAL_MEASURES["qa"]:
            row["reading"] = reading
    return rows


def held_out_tasks(config: Config) -> set[str]:
    """Data sets of examples that this run does not train on, nor on others of their kind."""
    trained = {name for name, dataset in config.datasets.items() if dataset.num_train}
    return {name for name, dataset in config.datasets.items() if dataset.task == "icl" and pool_of(name) not in trained}


def difference_of_runs(
    one: tuple[pa.Table, str], other: tuple[pa.Table, str], config: Config, *, dataset: str, measure: str
) -> dict[str, Any] | None:
    """One figure of a run's method minus that of another run's, over the queries that both have; None without any.

    Args:
        one, other: the `metrics` table of a run, and the method.
        config: of the first run; says which data sets there are and how often is resampled.
        dataset, measure: the figure, as `result_rows` names it.
    """
    parts = []
    for (metrics, method), name in ((one, "trained"), (other, "base")):
        part = metrics.filter(pc.equal(metrics["method"], method))
        if dataset in config.datasets:
            part = part.filter(pc.equal(part["dataset"], dataset))
        names = pa.array([name] * part.num_rows, pa.string())
        parts.append(part.set_column(part.column_names.index("method"), "method", names))
    rows = result_rows(
        # Tables from before there were strata have no such column.
        pa.concat_tables(parts, promote_options="default"),
        {name: settings.task for name, settings in config.datasets.items()},
        ["base", "trained"],
        samples=config.evaluate.bootstrap_samples,
        seed=config.seed,
        artifacts={"base": {}, "trained": {}},
        held_out=held_out_tasks(config),
    )
    found = [row for row in rows if (row["dataset"], row["measure"], row["method"]) == (dataset, measure, "trained")]
    difference: dict[str, Any] | None = found[0]["delta_vs_base"] if found else None
    return difference


def _figures_of(dataset: str, whole: _Values, parts: Mapping[str, _Values]) -> dict[str, list[_Values]]:
    """The figures of a data set by name, each with what it is an average over: the whole, or its parts and besides
    those of each category."""
    if not parts:
        return {dataset: [whole]}
    found = {dataset: [parts[name] for name in sorted(parts)]}
    for name in sorted(parts):
        found.setdefault(f"{dataset} {MMLU_CATEGORIES[name]}", []).append(parts[name])
    return found


def _averages(datasets: Sequence[str], held_out: Collection[str]) -> dict[str, list[str]]:
    """The averages over data sets of examples by name, each with its members."""
    parts: dict[str, list[str]] = {}
    for dataset in datasets:
        if dataset in TASKS:
            parts.setdefault(TASKS[dataset].category, []).append(dataset)
    # Of one data set it would repeat that one's figure, and of all the average.
    averages = {f"{AVERAGE} {name}": part for name, part in parts.items() if 1 < len(part) < len(datasets)}
    outside = [dataset for dataset in datasets if dataset in held_out]
    if 0 < len(outside) < len(datasets):
        averages[f"{AVERAGE} {HELD_OUT}"] = outside
    return averages | ({AVERAGE: list(datasets)} if datasets else {})


def _rows_of(
    dataset: str,
    task: str,
    measure: str,
    strata: Sequence[tuple[str, _Values]],
    methods: Sequence[str],
    samples: int,
    seed: int,
    artifacts: Mapping[str, dict[str, str]],
) -> list[dict[str, Any]]:
    """The figures of one column of a table: one stratum for a data set, one per data set for an average.

    A stratum is the values of a measure.
    """
    exponential, is_main, result = measure == "perplexity", _is_main(dataset, task, measure), result_of(methods)
    column_seed = seed_of(seed, "bootstrap", dataset, measure)
    rows = []
    for method in methods:
        if any(not values.get(method) for _, values in strata):
            continue
        figure = estimate(
            [_parts(name, np.asarray(list(values[method].values()))) for name, values in strata],
            exponential=exponential,
            samples=samples,
            seed=column_seed,
        )
        compared: dict[str, Any] = {"exponential": exponential, "samples": samples, "seed": column_seed}
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
                "delta_vs_base": _difference(strata, method, "base", **compared) if method != "base" else None,
                "delta_of_result": (
                    _difference(strata, result, method, **compared) if is_main and method != result else None
                ),
                "lower_is_better": measure in LOWER_IS_BETTER,
                "is_main": is_main,
                "artifacts": artifacts[method],
            }
        )
    return rows


def _difference(
    strata: Sequence[tuple[str, _Values]], one: str, other: str, *, exponential: bool, samples: int, seed: int
) -> dict[str, Any] | None:
    """One method minus another over the queries that both have; None where a stratum has none."""
    pairs = [_paired(values.get(one, {}), values.get(other, {})) for _, values in strata]
    if not all(len(pair) for pair in pairs):
        return None
    sides = [[_parts(name, pair[:, side]) for (name, _), pair in zip(strata, pairs, strict=True)] for side in (0, 1)]
    return paired_difference(*sides, exponential=exponential, samples=samples, seed=seed).record()


def _parts(measure: str, values: np.ndarray) -> np.ndarray:
    """What is averaged over queries: the values [N], or for F1 its numerator and denominator [N, 2].

    F1 = 2 TP / (2 TP + FP + FN), and a value is 2 (the LLM said the label) + 1 (it is right).
    """
    if measure != POSITIVE_F1:
        return values
    said, meant = np.divmod(values, 2)
    return np.stack([2 * said * meant, said + meant], axis=1)


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


def stage_warnings(stages: Iterable[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """What readers of a run's figures should know: stage and warning, of the `stages` of its results."""
    return [(stage["stage"], warning) for stage in stages for warning in stage.get("warnings", [])]
