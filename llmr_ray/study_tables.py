"""What a study writes: one table with intervals, plots, and the same as JSON.

Over several seeds a trained embedder's figure is the mean over seeds with Student's interval, and a difference is
paired by seed: of the same queries and the same draw of training. Baselines do not depend on the seed and keep their
interval over queries, as everything does in a study of one seed.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmr_ray.durable import write_atomic
from llmr_ray.evaluation.plots import curves, heat, intervals
from llmr_ray.evaluation.published import beside_study
from llmr_ray.evaluation.seeds import over_seeds
from llmr_ray.evaluation.tables import in_order, is_trained, method_name
from llmr_ray.studies import AGAINST, Outcome, Study, figures_without_rows, slug

_Row = Mapping[str, Any]


def summary(rows: Sequence[_Row]) -> list[dict[str, Any]]:
    """The rows of cells over seeds: one for each variant, figure and method.

    Of one seed they are its rows. Of several a trained embedder's mean, ci95, delta_vs_base and delta_vs_reference are
    over seeds (evaluation/seeds.py), `p_over_queries` holds the p of each seed's own comparison with the reference, and
    `num_seeds` says how many there are.
    """
    cells: dict[tuple[str, str, str, str], list[_Row]] = {}
    for row in rows:
        cells.setdefault((row["variant"], row["dataset"], row["measure"], row["method"]), []).append(row)
    return [_over_seeds(members) for members in cells.values()]


def _over_seeds(members: Sequence[_Row]) -> dict[str, Any]:
    first = dict(members[0])
    del first["seed"]
    first |= {"num_seeds": len(members), "p_over_queries": []}
    if len(members) == 1 or not is_trained(first["method"]):
        return first
    spread = over_seeds([row["mean"] for row in members]).record()
    first |= {"mean": spread["mean"], "ci95": spread["ci95"], "sd": spread["sd"]}
    for what in AGAINST:
        taken = [row[what] for row in members if row[what] is not None]
        first[what] = round(sum(taken) / len(taken)) if taken else None
    for which in ("delta_vs_base", "delta_vs_reference"):
        known = [row[which] for row in members if row[which]]
        first[which] = over_seeds([delta["mean"] for delta in known]).record() if known else None
    first["p_over_queries"] = [row["delta_vs_reference"]["p"] for row in members if row["delta_vs_reference"]]
    return first


def table(study: Study, outcome: Outcome) -> str:
    """What is known as Markdown, a table for each figure: methods that variants share once, then trained embedders."""
    rows, seeds = summary(outcome.rows), len(study.seeds) > 1
    headings = ["variant", "mean [95% interval]", "n", "difference to base", "p"]
    if study.against:
        headings.insert(1, AGAINST[study.against])
    if study.reference:
        headings += [f"difference to {study.reference}", "p"]
    if study.reference and seeds:
        headings.append("p over queries, by seed")
    if seeds:
        headings.append("seeds")
    parts = [f"# {study.title}\n"]
    if seeds:
        parts.append(
            f"Trained embedders: mean over {len(study.seeds)} training seeds with Student's interval over them, "
            "differences paired by seed. Baselines: interval over queries.\n"
        )
    for dataset, measure in study.figures:
        parts.append(f"## {dataset}, {measure}\n")
        parts += [_line(headings), "|---" * len(headings) + "|"]
        for label, row in _lines([row for row in rows if (row["dataset"], row["measure"]) == (dataset, measure)]):
            cells = [label, _figure(row, ".3f"), str(row["n"]), *_told(row["delta_vs_base"])]
            if study.against:
                spent = _spent(study, row)
                cells.insert(1, "–" if spent is None else f"{spent:,}")
            if study.reference:
                cells += _told(row["delta_vs_reference"])
            if study.reference and seeds:
                cells.append(" ".join(_p(p) for p in row["p_over_queries"]) or "–")
            if seeds:
                cells.append(str(row["num_seeds"]) if is_trained(row["method"]) else "–")
            parts.append(_line(cells))
        parts.append("")
    if elsewhere := list(dict.fromkeys(row["variant"] for row in rows if row["other_texts"])):
        parts.append(
            f"Tested on other texts than {study.reference}, as BM25 and the base embedder show, and so not compared "
            f"with it: {'; '.join(elsewhere)}. Their differences to the base embedder can be.\n"
        )
    if lacking := figures_without_rows(study, outcome):
        parts.append(f"No cell that has run has the figures: {'; '.join(lacking)}.\n")
    for paper in _published(study, rows, outcome):
        parts += _beside(paper, study.reference)
    if outcome.stability:
        parts += _stability(outcome.stability)
    if outcome.warnings:
        parts.append("## Warnings\n\nFigures of these variants may say more of the training than of the variant.\n")
        parts += [f"- {_cell(told)}: {told['stage']}: {told['warning']}" for told in outcome.warnings]
        parts.append("")
    if outcome.failures:
        parts.append("## Failed\n\nThe same command tries these again.\n")
        parts += [f"- {_cell(failure)}: {failure['error']}" for failure in outcome.failures]
        parts.append("")
    if outcome.missing:
        parts.append(f"Not run yet: {'; '.join(outcome.missing)}.\n")
    return "\n".join(parts)


def write(study: Study, outcome: Outcome, folder: Path) -> None:
    """Writes ``study.json``, ``study.md``, a ``.svg`` for each figure, and ``impact.svg`` where there are several."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = summary(outcome.rows)
    record = {"title": study.title, "config": Path(study.config).name, "seeds": list(study.seeds)}
    record |= {"rows": outcome.rows, "summary": rows, "stability": outcome.stability}
    record |= {"published": _published(study, rows, outcome)}
    record |= {"warnings": outcome.warnings, "failures": outcome.failures, "missing": outcome.missing}
    write_atomic(folder / "study.json", (json.dumps(record, indent=1, allow_nan=False) + "\n").encode())
    write_atomic(folder / "study.md", (table(study, outcome) + "\n").encode())
    for dataset, measure in study.figures:
        lines = _lines([row for row in rows if (row["dataset"], row["measure"]) == (dataset, measure)])
        if lines:
            shown = [(label, row["mean"], *_ends(row)) for label, row in lines]
            drawn = intervals(shown, f"{dataset}, {measure}")
            write_atomic(folder / f"{slug(f'{dataset} {measure}')}.svg", drawn.encode())
        if study.against:
            points = {
                variant: [
                    (spent, row["mean"], *_ends(row))
                    for _, row in lines
                    if row["variant"] == variant and (spent := _spent(study, row)) is not None
                ]
                for variant in study.variants
            }
            drawn = curves(points, over=AGAINST[study.against], measure=f"{dataset}, {measure}")
            write_atomic(folder / f"{slug(f'{dataset} {measure}')}-over-{study.against}.svg", drawn.encode())
    if len(study.figures) > 1 and rows:
        write_atomic(folder / "impact.svg", impact(study, rows).encode())


def impact(study: Study, rows: Sequence[_Row]) -> str:
    """Retrievers down, figures across, each cell the relative change against no retrieval (LLM-Embedder, figure 3).

    Against the base embedder where there is no figure without retrieval, as for measures of ranking. Signs are such
    that a gain is warm, also where lower is better.
    """
    figures = [(dataset, measure) for dataset, measure in study.figures]
    of_figure = [_lines([row for row in rows if (row["dataset"], row["measure"]) == figure]) for figure in figures]
    labels = list(dict.fromkeys(label for lines in of_figure for label, _ in lines if label != method_name("none")))
    columns, values = [], []
    for (dataset, measure), lines in zip(figures, of_figure, strict=True):
        methods = {row["method"]: row for _, row in reversed(lines)}
        against = methods.get("none") or methods.get("base")
        columns.append(f"{dataset} {measure}\nagainst {method_name(against['method']).lower() if against else '–'}")
        changes = {label: _change(row, against) for label, row in lines}
        values.append([changes.get(label) for label in labels])
    by_label = [[column[place] for column in values] for place in range(len(labels))]
    return heat(labels, columns, by_label, study.title)


def _change(row: _Row, against: _Row | None) -> float | None:
    if against is None or not against["mean"]:
        return None
    change = float(row["mean"] / against["mean"] - 1)
    return -change if row["lower_is_better"] else change


def _stability(rows: Sequence[_Row]) -> list[str]:
    headings = ["cell", "task", "steps", "loss first", "last", "variance", "noise / loss", "converged at step"]
    parts = ["## How steadily training went\n", _line(headings), "|---" * len(headings) + "|"]
    for row in rows:
        noise, settled = row["relative_noise"], row["convergence_step"]
        numbers = [f"{row[name]:.4f}" for name in ("first_loss", "last_loss", "loss_variance")]
        told = ["–" if noise is None else f"{noise:.3f}", "–" if settled is None else str(settled)]
        parts.append(_line([_cell(row), row["task"], str(row["num_steps"]), *numbers, *told]))
    return [*parts, ""]


def _published(study: Study, rows: Sequence[_Row], outcome: Outcome) -> list[dict[str, Any]]:
    return beside_study(study.reproduces, outcome.configs, rows, reference=study.reference) if outcome.configs else []


def _beside(paper: _Row, reference: str) -> list[str]:
    """A published table of ablations beside the study's figures, column by column, and what differs."""
    headings = ["variant", "published", "row: published / ours", "mean: published", "ours"]
    headings += [f"difference to {reference}: published", "ours"] if reference else []
    parts = [f"## Beside {paper['title']}\n"]
    columns: dict[tuple[str, str, str, bool], list[_Row]] = {}
    for row in paper["figures"]:
        columns.setdefault((row["column"], row["data"], row["measure"], row["same_data"]), []).append(row)
    for (column, data, measure, same_data), members in columns.items():
        other = "" if same_data else ", which is other data"
        parts += [f"{column} beside {data}, {measure}{other}:\n", _line(headings), "|---" * len(headings) + "|"]
        for row in members:
            names = f"{row['published_method']} / {row['name']}"
            ours = "–" if row["ours"] is None else _figure({"mean": row["ours"], "ci95": row["ci95"]}, ".3f")
            cells = [row["variant"], row["published_variant"], names, _or_dash(row["published"], ".3f"), ours]
            changes = [_or_dash(row[which], "+.3f") for which in ("published_change", "change")]
            parts.append(_line(cells + changes if reference else cells))
        parts.append("")
    if paper["missing"]:
        parts.append(f"Not measured: {', '.join(paper['missing'])}.\n")
    if paper["differences"]:
        parts += ["What all variants have otherwise than the paper:\n", _line(["what", "ours", "published"])]
        parts.append("|---|---|---|")
        parts += [_line([row[key] for key in ("what", "ours", "published")]) for row in paper["differences"]]
        parts.append("")
    return parts


def _or_dash(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _cell(row: _Row) -> str:
    return row["variant"] if row["seed"] is None else f"{row['variant']}, seed {row['seed']}"


def _spent(study: Study, row: _Row) -> int | None:
    """What a row's figure is drawn over; only what was trained has cost it."""
    spent: int | None = row[study.against] if is_trained(row["method"]) else None
    return spent


def _ends(row: _Row) -> tuple[float, float]:
    """Of the interval; of no width where one seed of several is there."""
    low, high = row["ci95"] or (row["mean"], row["mean"])
    return low, high


def _figure(row: _Row, form: str) -> str:
    """A mean with its interval."""
    told = format(row["mean"], form)
    if not row["ci95"]:
        return told
    low, high = row["ci95"]
    return f"{told} [{low:{form}}, {high:{form}}]"


def _told(difference: _Row | None) -> list[str]:
    """A difference with its interval, and its p."""
    if not difference:
        return ["–", "–"]
    return [_figure(difference, "+.3f"), "–" if difference["p"] is None else _p(difference["p"])]


def _p(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else "< .001"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _lines(rows: Sequence[_Row]) -> list[tuple[str, _Row]]:
    """Labelled rows: baselines of the first variant, and where another one differs; trained embedders of all."""
    lines: list[tuple[str, _Row]] = []
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
