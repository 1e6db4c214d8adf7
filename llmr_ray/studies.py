"""Studies: one question, several variants of a configuration, one table and one plot.

A study is a YAML file:

    title: What teaches the embedder?
    config: ../llm_r.yaml                  # beside the study's file
    figures: [average score]               # "data set measure", rows of results.json
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

from omegaconf import OmegaConf

from llmr_ray.durable import write_atomic
from llmr_ray.errors import ConfigError
from llmr_ray.evaluation.plots import intervals
from llmr_ray.evaluation.tables import in_order, is_trained, method_name
from llmr_ray.loading import read_yaml

_KEYS = {"title", "config", "figures", "variants"}

Run = Callable[[str, list[str]], dict[str, Any]]
"""Runs a configuration with overrides; returns what results.json holds."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """What a study's file says. variants: name to overrides, in order. figures: (data set, measure)."""

    name: str
    title: str
    config: str
    figures: Sequence[tuple[str, str]]
    variants: Mapping[str, Sequence[str]]


def read_study(path: Path) -> Study:
    """The study in a file.

    Raises:
        ConfigError: the file is missing or lacks something, or two variants would have the same folder.
    """
    if not path.exists():
        raise ConfigError(f"there is no study {path}. Look in conf/studies/.")
    said: Any = OmegaConf.to_container(read_yaml(path))
    if not isinstance(said, dict) or set(said) != _KEYS:
        raise ConfigError(f"{path} must have the keys {sorted(_KEYS)} and no others, as the files in conf/studies/ do.")
    figures = [tuple(str(figure).rsplit(" ", 1)) for figure in said["figures"]]
    if not figures or not all(len(figure) == 2 for figure in figures):
        raise ConfigError(f"{path}: each of `figures` is a data set and a measure, for example 'average score'.")
    variants = {str(name): [str(item) for item in overrides or []] for name, overrides in said["variants"].items()}
    if len({_slug(name) for name in variants}) != len(variants) or not variants:
        raise ConfigError(f"{path}: `variants` are named by different words, and there is at least one.")
    return Study(
        name=path.stem,
        title=str(said["title"]),
        config=str((path.parent / said["config"]).resolve()),
        figures=[(figure[0], figure[1]) for figure in figures],
        variants=variants,
    )


def run_study(study: Study, overrides: Sequence[str], run: Run, folder: Path) -> list[dict[str, Any]]:
    """Runs all variants and writes ``study.json``, ``study.md`` and a ``.svg`` for each figure.

    Args:
        study: what to run.
        overrides: for all variants, before their own.
        run: runs one variant.
        folder: where to write; what is known so far is written after each variant.

    Returns:
        The rows of study.json: variant, dataset, measure, method, mean, ci95, n, delta_vs_base.
    """
    rows: list[dict[str, Any]] = []
    for variant, own in study.variants.items():
        results = run(study.config, [*overrides, *own, f"name={study.name}-{_slug(variant)}"])
        rows += [
            {"variant": variant, **{key: row[key] for key in _COLUMNS}}
            for row in results["rows"]
            if (row["dataset"], row["measure"]) in study.figures
        ]
        _write(study, rows, folder)
    return rows


_COLUMNS = ("dataset", "measure", "method", "mean", "ci95", "n", "delta_vs_base")


def table(study: Study, rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as Markdown, a table for each figure: methods that every variant shares once, then trained embedders."""
    parts = [f"# {study.title}\n"]
    for dataset, measure in study.figures:
        lines = _lines([row for row in rows if (row["dataset"], row["measure"]) == (dataset, measure)])
        parts.append(f"## {dataset}, {measure}\n")
        parts.append("| variant | mean [95% interval] | n | difference to base | p |\n|---|---|---|---|---|")
        for label, row in lines:
            low, high = row["ci95"]
            delta, difference, p = row["delta_vs_base"], "–", "–"
            if delta:
                difference = f"{delta['mean']:+.3f} [{delta['ci95'][0]:+.3f}, {delta['ci95'][1]:+.3f}]"
                p = f"{delta['p']:.3f}" if delta["p"] >= 0.001 else "< .001"
            parts.append(f"| {label} | {row['mean']:.3f} [{low:.3f}, {high:.3f}] | {row['n']} | {difference} | {p} |")
        parts.append("")
    return "\n".join(parts)


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


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
