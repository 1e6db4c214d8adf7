"""Studies: one question, several variants of a configuration over several seeds, one table and its plots.

A study is a YAML file:

    title: What teaches the embedder?
    config: ../llm_r.yaml                  # beside the study's file
    figures: [average score]               # "data set measure", rows of results.json
    seeds: [42, 43, 44]                    # optional: each variant is trained with each
    reference: reward model                # optional: the variant that the others are compared with, query by query
    against: asked                         # optional: a curve over pairs asked about, requests (of several pairs
                                           # each), or tokens: of the LLM's feedback
    stability: true                        # optional: how steadily the loss of each task fell
    settings: [rounds=1]                   # optional: of all variants
    reproduces:                            # optional: published tables of ablations, variant by variant
      llm_r_ablations: {reward model: iteration 1, scores of the LLM: raw LLM score as teacher}
    variants:
      reward model: []
      scores of the LLM: ['reward_model.model=""']

A cell is a variant with a seed, and a run of its own. Cells share artifacts and the LLM's answers as all runs do, so
each pays only for what it changes: a seed is that of training alone, so what the LLM said is common to all of them.
"""

import re
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
from omegaconf import OmegaConf

from llmr_ray.config import Config
from llmr_ray.errors import ConfigError
from llmr_ray.evaluation.protocols import RETRIEVAL_MEASURES
from llmr_ray.evaluation.published import check_variants
from llmr_ray.evaluation.results import AVERAGE, difference_of_runs, stage_warnings
from llmr_ray.evaluation.stability import stability
from llmr_ray.evaluation.tables import is_trained, result_of
from llmr_ray.frames import frame_of
from llmr_ray.loading import read_yaml

_KEYS = {"title", "config", "figures", "variants"}
_OPTIONAL = {"reference", "against", "seeds", "stability", "settings", "reproduces"}

AGAINST = {"asked": "pairs asked", "requests": "requests to label them", "tokens": "LLM tokens of feedback"}
"""`against`: the pairs that annotators were asked about until the embedder of a round was trained, the requests that
these took, or the tokens of the LLM that the configuration's feedback takes at the most."""

_TRACE_LINES = 20

_At = tuple[str, int | None]
"""A cell's variant and seed."""


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A run of a cell: its configuration, what results.json holds, and the value of each test query (`metrics`).

    steps: the record of training (table `steps`), where there is one. tokens: of the LLM that its feedback takes at the
    most, whoever has paid them.
    """

    config: Config
    results: dict[str, Any]
    metrics: pa.Table
    steps: pa.Table | None = None
    tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A variant with a seed: what is run. seed: None where the study names none."""

    variant: str
    seed: int | None
    settings: list[str]

    @property
    def label(self) -> str:
        """As progress and tables name it."""
        return self.variant if self.seed is None else f"{self.variant}, seed {self.seed}"


Run = Callable[[str, Cell], Finished]
"""Runs a configuration with a cell's settings."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """What a study's file says. variants: name to overrides, in order. figures: (data set, measure). seeds: of
    training; none: that of the configuration. reference: the variant that others are compared with. against: what the
    figures are drawn over; empty: nothing. stability: whether the loss of training is looked at. settings: overrides
    of all variants. reproduces: published table -> variant -> the table's variant that asks the same."""

    name: str
    title: str
    config: str
    figures: Sequence[tuple[str, str]]
    variants: Mapping[str, Sequence[str]]
    seeds: Sequence[int] = ()
    reference: str = ""
    against: str = ""
    stability: bool = False
    settings: Sequence[str] = ()
    reproduces: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def cells(self, overrides: Sequence[str]) -> list[Cell]:
        """What is run, seed by seed: after the first seed the table has a row of every variant.

        Args:
            overrides: for all variants, after the study's and before their own.
        """
        found = []
        seeds: Sequence[int | None] = self.seeds or (None,)
        for seed in seeds:
            for variant, own in self.variants.items():
                # A reward model is trained as well; where there is none its setting changes nothing.
                of_seed = [] if seed is None else [f"train.seed={seed}", f"reward_model.train.seed={seed}"]
                name = f"{self.name}-{slug(variant)}" + ("" if seed is None else f"-seed-{seed}")
                settings = [*self.settings, *overrides, *own, *of_seed, f"name={name}"]
                found.append(Cell(variant=variant, seed=seed, settings=settings))
        return found


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What is known of a study.

    rows: of each cell: variant, seed, dataset, task, measure, method, mean, ci95, n, delta_vs_base, lower_is_better;
        delta_vs_reference (a trained embedder minus what the reference's training with the same seed led to, over the
        queries of both; None where there is no reference, the row is its own, or other_texts); other_texts (whether it
        was tested on other texts than the reference, so that two figures are not of the same test); asked (pairs that
        annotators were asked about until then, or None); requests (that these took, or None); tokens (of the LLM's
        feedback).
    stability: of each cell and task, see evaluation/stability.py.
    warnings: of the stages of each cell: variant, seed, stage, warning.
    failures: of each cell that failed: variant, seed, error, trace.
    missing: labels of the cells that have not run. has_run: whether any cell has run to its end.
    configs: of each variant that has run.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    stability: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[dict[str, Any]] = field(default_factory=list)
    failures: list[dict[str, Any]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    has_run: bool = False
    configs: dict[str, Config] = field(default_factory=dict)


def read_study(path: Path) -> Study:
    """The study in a file.

    Raises:
        ConfigError: the file is missing or lacks something, or two variants would have the same folder.
    """
    if not path.exists():
        raise ConfigError(f"there is no study {path}. Look in conf/studies/.")
    said: Any = OmegaConf.to_container(read_yaml(path))
    if not isinstance(said, dict) or set(said) - _OPTIONAL != _KEYS:
        raise ConfigError(
            f"{path} must have the keys {sorted(_KEYS)}, may have {sorted(_OPTIONAL)}, and no others, as the files in "
            "conf/studies/ do."
        )
    figures = [tuple(str(figure).rsplit(" ", 1)) for figure in said["figures"]]
    if not figures or not all(len(figure) == 2 for figure in figures):
        raise ConfigError(f"{path}: each of `figures` is a data set and a measure, for example 'average score'.")
    variants = {str(name): _overrides(path, overrides) for name, overrides in said["variants"].items()}
    if len({slug(name) for name in variants}) != len(variants) or not variants:
        raise ConfigError(f"{path}: `variants` are named by different words, and there is at least one.")
    reference, against = str(said.get("reference", "")), str(said.get("against", ""))
    if reference and reference not in variants:
        raise ConfigError(f"{path}: `reference` is '{reference}', but must be one of the variants {list(variants)}.")
    if against and against not in AGAINST:
        raise ConfigError(f"{path}: `against` is '{against}', but figures can be drawn over {sorted(AGAINST)} alone.")
    study = Study(
        name=path.stem,
        title=str(said["title"]),
        config=str((path.parent / said["config"]).resolve()),
        figures=[(figure[0], figure[1]) for figure in figures],
        variants=variants,
        reference=reference,
        against=against,
        stability=bool(said.get("stability", False)),
        settings=_overrides(path, said.get("settings")),
        reproduces=_reproduces(path, said.get("reproduces", {}), variants),
    )
    return with_seeds(study, said.get("seeds", []))


def _overrides(path: Path, said: Any) -> list[str]:
    """What a file says to set, one `key=value` each."""
    if not isinstance(said or [], list):
        raise ConfigError(f"{path}: what to set is a list, for example ['rounds=1'], but not {said!r}.")
    return [str(item) for item in said or []]


def _reproduces(path: Path, said: Any, variants: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """The published variants beside which a file's own are to stand."""
    if not isinstance(said, dict) or not all(isinstance(named, dict) for named in said.values()):
        raise ConfigError(f"{path}: `reproduces` has published tables, and for each the study's variants with its own.")
    found = {name: {str(ours): str(theirs) for ours, theirs in named.items()} for name, named in said.items()}
    if unknown := {variant for named in found.values() for variant in named} - set(variants):
        raise ConfigError(f"{path}: `reproduces` names {sorted(unknown)}, but the variants are {list(variants)}.")
    try:
        check_variants(found)
    except ConfigError as error:
        raise ConfigError(f"{path}: `reproduces`: {error}") from error
    return found


def with_seeds(study: Study, seeds: Sequence[Any]) -> Study:
    """The study over other seeds; ConfigError where they are no seeds."""
    if not isinstance(seeds, list) or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise ConfigError(f"the seeds of a study are whole numbers from 0, for example [42, 43, 44], but not {seeds}.")
    if len(set(seeds)) != len(seeds):
        raise ConfigError(f"the seeds {seeds} of the study name one twice: a cell would be compared with itself.")
    return replace(study, seeds=seeds)


def check_figures(study: Study, configs: Sequence[Config]) -> None:
    """Fails on figures that none of the cells can have: of a data set that none names, or of what the LLM answers where
    it answers nothing. How a measure of answers is spelt shows only when there are some (`figures_without_rows`).

    Raises:
        ConfigError: naming them.
    """
    lacking = [f"{dataset} {measure}" for dataset, measure in study.figures if not _may_have(dataset, measure, configs)]
    if lacking:
        raise ConfigError(
            f"study {study.name}: no variant has the figures {lacking}. A figure is of one of the data sets of the "
            "configuration, or an average of its examples; what the LLM answers needs evaluate.num_llm_queries of the "
            "data set."
        )


def _may_have(dataset: str, measure: str, configs: Sequence[Config]) -> bool:
    for config in configs:
        asked = {name for name, number in config.evaluate.num_llm_queries.items() if number}
        if dataset.split(" ")[0] == AVERAGE and any(config.datasets[name].task == "icl" for name in asked):
            return True
        if dataset in config.datasets and measure in RETRIEVAL_MEASURES[config.datasets[dataset].task]:
            return True
        if dataset in config.datasets and dataset in asked:
            return True
    return False


def figures_without_rows(study: Study, outcome: Outcome) -> list[str]:
    """The figures that no cell has, once any has run."""
    found = {(row["dataset"], row["measure"]) for row in outcome.rows}
    lacking = [f"{dataset} {measure}" for dataset, measure in study.figures if (dataset, measure) not in found]
    return lacking if outcome.has_run else []


def run_study(study: Study, overrides: Sequence[str], run: Run, show: Callable[[Outcome], None]) -> Outcome:
    """Runs all cells. One that fails is recorded with what it said, and the others go on; a rerun tries it again.

    Args:
        study: what to run.
        overrides: for all variants, before their own.
        run: runs one cell.
        show: is given what is known so far after each cell.
    """
    done: dict[_At, Finished] = {}
    # Intervals of a cell take seconds, so they are made once, and again only when its reference is there.
    made: dict[tuple[_At, bool], list[dict[str, Any]]] = {}
    failures: list[dict[str, Any]] = []
    outcome, cells = Outcome(), study.cells(overrides)
    for number, cell in enumerate(cells, 1):
        try:
            done[cell.variant, cell.seed] = run(study.config, cell)
        except Exception as error:
            trace = "".join(traceback.format_exception(error)).splitlines()[-_TRACE_LINES:]
            told = {"error": f"{type(error).__name__}: {error}", "trace": trace}
            failures.append({"variant": cell.variant, "seed": cell.seed, **told})
        for at, finished in done.items():
            reference = done.get((study.reference, at[1]))
            if (at, reference is not None) not in made:
                made[at, reference is not None] = _rows(study, at, finished, reference)
        outcome = Outcome(
            rows=[row for at in done for row in made[at, (study.reference, at[1]) in done]],
            stability=[row for at, finished in done.items() for row in _stability(study, at, finished)],
            warnings=[row for at, finished in done.items() for row in _warnings(at, finished)],
            failures=list(failures),
            missing=[other.label for other in cells[number:]],
            has_run=bool(done),
            configs={variant: finished.config for (variant, _), finished in done.items()},
        )
        show(outcome)
    return outcome


_COLUMNS = ("dataset", "task", "measure", "method", "mean", "ci95", "n", "delta_vs_base", "lower_is_better")


def _rows(study: Study, at: _At, finished: Finished, reference: Finished | None) -> list[dict[str, Any]]:
    """The rows of one cell; `reference` is the cell that it is compared with, where that is done."""
    variant, seed = at
    spent = _spent(finished.results)
    rows = [
        {"variant": variant, "seed": seed}
        | {key: row[key] for key in _COLUMNS}
        | {what: taken.get(row["method"]) for what, taken in spent.items()}
        | {"tokens": finished.tokens}
        for row in finished.results["rows"]
        if (row["dataset"], row["measure"]) in study.figures
    ]
    end = None if reference is None else result_of([row["method"] for row in reference.results["rows"]])
    datasets = {row["dataset"] for row in rows}
    elsewhere = {name for name in datasets if reference is not None and _other_texts(finished, reference, name)}
    for row in rows:
        row |= {"delta_vs_reference": None, "other_texts": False}
        itself = variant == study.reference and row["method"] == end
        if reference is None or end is None or not is_trained(row["method"]) or itself:
            continue
        row["other_texts"] = row["dataset"] in elsewhere
        if not row["other_texts"]:
            row["delta_vs_reference"] = difference_of_runs(
                (finished.metrics, row["method"]),
                (reference.metrics, end),
                finished.config,
                dataset=row["dataset"],
                measure=row["measure"],
            )
    return rows


def _other_texts(one: Finished, other: Finished, dataset: str) -> bool:
    """Whether two runs searched other texts for a data set's test queries: those of training queries are in the pool.

    It shows where BM25 and the base embedder both rank the same queries otherwise. One of them alone may be what
    variants differ in.
    """
    if dataset not in one.config.datasets:
        return False
    measures, rankers = RETRIEVAL_MEASURES[one.config.datasets[dataset].task], ("bm25", "base")
    key = ["dataset", "method", "measure", "query_id"]
    is_meant = (pl.col("dataset") == dataset) & pl.col("method").is_in(rankers) & pl.col("measure").is_in(measures)
    told, of_other = (frame_of(run.metrics, [*key, "value"]).filter(is_meant) for run in (one, other))
    moved = told.join(of_other, on=key, suffix="_other").filter(pl.col("value") != pl.col("value_other"))
    return set(moved["method"]) == set(rankers)


def _spent(results: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """What labels took until a method was trained, where they are made in rounds: pairs asked about, and requests."""
    rounds = results.get("labeling", [])
    methods = [f"round_{number}" for number in range(1, len(rounds))] + ["trained"]
    asked = [told["spent"] for told in rounds]
    requests = accumulate(told["requests"] for told in rounds)
    return {"asked": dict(zip(methods, asked, strict=False)), "requests": dict(zip(methods, requests, strict=False))}


def _stability(study: Study, at: _At, finished: Finished) -> list[dict[str, Any]]:
    if not study.stability or finished.steps is None:
        return []
    return [{"variant": at[0], "seed": at[1], **row} for row in stability(finished.steps)]


def _warnings(at: _At, finished: Finished) -> list[dict[str, Any]]:
    return [
        {"variant": at[0], "seed": at[1], "stage": stage, "warning": warning}
        for stage, warning in stage_warnings(finished.results.get("stages", []))
    ]


def slug(name: str) -> str:
    """A name as folders and files have it."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
