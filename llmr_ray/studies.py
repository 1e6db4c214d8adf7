"""Studies: one question, several variants of a configuration, one table and one plot.

A study is a YAML file:

    title: What teaches the embedder?
    config: ../llm_r.yaml                  # beside the study's file
    figures: [average score]               # "data set measure", rows of results.json
    reference: reward model                # optional: the variant that the others are compared with, query by query
    against: asked                         # optional: a curve over the pairs that annotators were asked about
    variants:
      reward model: []
      scores of the LLM: ['reward_model.model=""']

Variants share artifacts and the LLM's answers as all runs do, so each pays only for what it changes.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from omegaconf import OmegaConf

from llmr_ray.config import Config
from llmr_ray.durable import write_atomic
from llmr_ray.errors import ConfigError
from llmr_ray.evaluation.plots import curves, intervals
from llmr_ray.evaluation.results import difference_of_runs
from llmr_ray.evaluation.tables import in_order, is_trained, method_name, result_of
from llmr_ray.loading import read_yaml

_KEYS = {"title", "config", "figures", "variants"}
_OPTIONAL = {"reference", "against"}

ASKED = "asked"
"""`against`: the pairs that annotators were asked about until the embedder of a round was trained."""


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A run of a variant: its configuration, what results.json holds, and the value of each test query (`metrics`)."""

    config: Config
    results: dict[str, Any]
    metrics: pa.Table


Run = Callable[[str, list[str]], Finished]
"""Runs a configuration with overrides."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """What a study's file says. variants: name to overrides, in order. figures: (data set, measure). reference: the
    variant that others are compared with. against: what the figures are drawn over; empty: nothing."""

    name: str
    title: str
    config: str
    figures: Sequence[tuple[str, str]]
    variants: Mapping[str, Sequence[str]]
    reference: str = ""
    against: str = ""


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
    variants = {str(name): [str(item) for item in overrides or []] for name, overrides in said["variants"].items()}
    if len({_slug(name) for name in variants}) != len(variants) or not variants:
        raise ConfigError(f"{path}: `variants` are named by different words, and there is at least one.")
    reference, against = str(said.get("reference", "")), str(said.get("against", ""))
    if reference and reference not in variants:
        raise ConfigError(f"{path}: `reference` is '{reference}', but must be one of the variants {list(variants)}.")
    if against not in ("", ASKED):
        raise ConfigError(f"{path}: `against` is '{against}', but figures can be drawn over '{ASKED}' alone.")
    return Study(
        name=path.stem,
        title=str(said["title"]),
        config=str((path.parent / said["config"]).resolve()),
        figures=[(figure[0], figure[1]) for figure in figures],
        variants=variants,
        reference=reference,
        against=against,
    )


def run_study(study: Study, overrides: Sequence[str], run: Run, folder: Path) -> list[dict[str, Any]]:
    """Runs all variants and writes ``study.json``, ``study.md`` and a ``.svg`` for each figure.

    Args:
        study: what to run.
        overrides: for all variants, before their own.
        run: runs one variant.
        folder: where to write; what is known so far is written after each variant.

    Returns:
        The rows of study.json: variant, dataset, measure, method, mean, ci95, n, delta_vs_base; delta_vs_reference (a
        trained embedder minus what the reference's training led to, over the queries of both; None where there is no
        reference, or the row is its own); asked (pairs that annotators were asked about until then, or None).
    """
    done: dict[str, Finished] = {}
    rows: list[dict[str, Any]] = []
    for variant, own in study.variants.items():
        done[variant] = run(study.config, [*overrides, *own, f"name={study.name}-{_slug(variant)}"])
        rows = [row for name, finished in done.items() for row in _rows(study, name, finished, done)]
        _write(study, rows, folder)
    return rows


_COLUMNS = ("dataset", "measure", "method", "mean", "ci95", "n", "delta_vs_base")


def _rows(study: Study, variant: str, finished: Finished, done: Mapping[str, Finished]) -> list[dict[str, Any]]:
    """The rows of one variant, as far as variants are done."""
    asked = _asked(finished.results)
    rows = [
        {"variant": variant, **{key: row[key] for key in _COLUMNS}, "asked": asked.get(row["method"])}
        for row in finished.results["rows"]
        if (row["dataset"], row["measure"]) in study.figures
    ]
    reference = done.get(study.reference)
    end = None if reference is None else result_of([row["method"] for row in reference.results["rows"]])
    for row in rows:
        row["delta_vs_reference"] = None
        itself = variant == study.reference and row["method"] == end
        if reference is not None and end is not None and is_trained(row["method"]) and not itself:
            row["delta_vs_reference"] = difference_of_runs(
                (finished.metrics, row["method"]),
                (reference.metrics, end),
                finished.config,
                dataset=row["dataset"],
                measure=row["measure"],
            )
    return rows


def _asked(results: Mapping[str, Any]) -> dict[str, int]:
    """Trained method -> pairs that annotators were asked about until then, where labels are made in rounds."""
    spent = [told["spent"] for told in results.get("labeling", [])]
    return {("trained" if number == len(spent) else f"round_{number}"): count for number, count in enumerate(spent, 1)}


def table(study: Study, rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as Markdown, a table for each figure: methods that every variant shares once, then trained embedders."""
    headings = ["variant", "mean [95% interval]", "n", "difference to base", "p"]
    if study.against:
        headings.insert(1, "pairs asked")
    if study.reference:
        headings += [f"difference to {study.reference}", "p"]
    parts = [f"# {study.title}\n"]
    for dataset, measure in study.figures:
        parts.append(f"## {dataset}, {measure}\n")
        parts += [_line(headings), "|---" * len(headings) + "|"]
        for label, row in _lines([row for row in rows if (row["dataset"], row["measure"]) == (dataset, measure)]):
            low, high = row["ci95"]
            cells = [label, f"{row['mean']:.3f} [{low:.3f}, {high:.3f}]", str(row["n"]), *_told(row["delta_vs_base"])]
            if study.against:
                cells.insert(1, "–" if row["asked"] is None else f"{row['asked']:,}")
            if study.reference:
                cells += _told(row["delta_vs_reference"])
            parts.append(_line(cells))
        parts.append("")
    return "\n".join(parts)


def _told(difference: Mapping[str, Any] | None) -> list[str]:
    """A difference with its interval, and its p."""
    if not difference:
        return ["–", "–"]
    low, high = difference["ci95"]
    p = f"{difference['p']:.3f}" if difference["p"] >= 0.001 else "< .001"
    return [f"{difference['mean']:+.3f} [{low:+.3f}, {high:+.3f}]", p]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _lines(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any]]]:
    """Labelled rows: baselines of the first variant, and where another one differs; trained embedders of all."""
    lines: list[tuple[str, Mapping[str, Any]]] = []
    shown: set[tuple[str, float]] = set()
    for method in in_order({row["method"] for row in rows}):
        for row in rows:
            if row["method"] != method or is_trained(method):
                continue
            if (method, row["mean"]) not in shown:
                name = method_name(method)
                again = any(other == method for other, _ in shown)
                lines.append((f"{name} ({row['variant']})" if again else name, row))
                shown.add((method, row["mean"]))
    for variant in dict.fromkeys(row["variant"] for row in rows):
        own = {row["method"]: row for row in rows if row["variant"] == variant}
        trained = [method for method in in_order(own) if is_trained(method)]
        for method in trained:
            label = variant if len(trained) == 1 else f"{variant}: {method_name(method).lower()}"
            lines.append((label, own[method]))
    return lines


def _write(study: Study, rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    record = {"title": study.title, "config": Path(study.config).name, "rows": rows}
    write_atomic(folder / "study.json", (json.dumps(record, indent=1, allow_nan=False) + "\n").encode())
    write_atomic(folder / "study.md", (table(study, rows) + "\n").encode())
    for dataset, measure in study.figures:
        lines = _lines([row for row in rows if (row["dataset"], row["measure"]) == (dataset, measure)])
        if lines:
            drawn = intervals([(label, row["mean"], *row["ci95"]) for label, row in lines], f"{dataset}, {measure}")
            write_atomic(folder / f"{_slug(f'{dataset} {measure}')}.svg", drawn.encode())
        if study.against:
            points = {
                variant: [
                    (row["asked"], row["mean"], *row["ci95"])
                    for _, row in lines
                    if row["variant"] == variant and row["asked"] is not None
                ]
                for variant in study.variants
            }
            drawn = curves(points, over="pairs asked", measure=f"{dataset}, {measure}")
            write_atomic(folder / f"{_slug(f'{dataset} {measure}')}-over-{study.against}.svg", drawn.encode())


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
