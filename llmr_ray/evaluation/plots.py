"""Figures of the report as inline SVG that follows the page's text colour, light or dark."""

import io
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from llmr_ray.evaluation.stability import running_mean

_INK = "#010203"
"""Drawn in this colour, then replaced by CSS's currentColor."""

_LINE, _FAINT = "#3987e5", "#9db9d9"

_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "llmr_ray",
    "font.family": "sans-serif",
    "font.size": 9.0,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.titlesize": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
}


def training_curves(steps: Sequence[Mapping[str, Any]]) -> str:
    """Loss (every step, and its running mean) above the learning rate, a column per task.

    Args:
        steps: rows with step, task, loss and learning_rate.
    """
    by_task: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in sorted(steps, key=lambda row: int(row["step"])):
        by_task[row["task"]].append(row)
    with rc_context(_STYLE):
        figure, grid = _grid(2, len(by_task), height=2.0)
        for column, (task, rows) in enumerate(sorted(by_task.items())):
            step = np.asarray([row["step"] for row in rows])
            loss = np.asarray([row["loss"] for row in rows], np.float64)
            top, bottom = grid[0, column], grid[1, column]
            top.plot(step, loss, color=_FAINT, linewidth=0.8, marker=".", markersize=2)
            top.plot(step, running_mean(loss, max(1, len(loss) // 10)), color=_LINE, linewidth=1.6)
            top.set_title(f"{task} ({len(rows)} steps)")
            bottom.plot(step, [row["learning_rate"] for row in rows], color=_LINE, linewidth=1.4)
            bottom.set_xlabel("step")
            bottom.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
            if column == 0:
                top.set_ylabel("loss")
                bottom.set_ylabel("learning rate")
        return _svg(figure)


def look_curves(looks: Sequence[Mapping[str, Any]], measure: str) -> str:
    """What checkpoints reached on development queries, a panel per data set.

    Args:
        looks: `step` and `values`, the mean measure by data set.
        measure: its name.
    """
    datasets = sorted({dataset for look in looks for dataset in look["values"]})
    with rc_context(_STYLE):
        figure, panels = _panels(len(datasets))
        for axes, dataset in zip(panels, datasets, strict=True):
            points = [(look["step"], look["values"][dataset]) for look in looks if dataset in look["values"]]
            axes.plot(*zip(*points, strict=True), color=_LINE, linewidth=1.4, marker=".")
            axes.set_title(dataset)
            axes.set_xlabel("step")
            axes.set_ylabel(measure)
        return _svg(figure)


def reward_histograms(rewards: Mapping[str, Sequence[float]]) -> str:
    """The distribution of rewards, a panel per data set: unit bins for rank rewards, which are whole numbers.

    Args:
        rewards: data set -> rewards of its (query, document) pairs.
    """
    with rc_context(_STYLE):
        figure, panels = _panels(len(rewards))
        for axes, (dataset, values) in zip(panels, sorted(rewards.items()), strict=True):
            array = np.asarray(values, np.float64)
            whole = bool((array == np.round(array)).all())
            bins: Any = np.arange(array.min() - 0.5, array.max() + 1.0) if whole else 30
            axes.hist(array, bins=bins, color=_LINE)
            axes.set_title(f"{dataset} (n={len(array):,})")
            axes.set_xlabel("reward")
        return _svg(figure)


def intervals(figures: Sequence[tuple[str, float, float, float]], measure: str) -> str:
    """Means with their intervals, one below the other.

    Args:
        figures: label, mean, low and high.
        measure: what they are.
    """
    with rc_context(_STYLE):
        # As wide as a row of two: names are long, and numbers of three digits need their room.
        figure, grid = _grid(1, 1, height=0.5 + 0.28 * len(figures), width=5.8)
        axes = grid[0, 0]
        for place, (_, mean, low, high) in enumerate(figures):
            axes.plot([low, high], [place, place], color=_FAINT, linewidth=2.4)
            axes.plot([mean], [place], color=_LINE, marker="o", markersize=5)
        axes.set_yticks(range(len(figures)), [label for label, *_ in figures])
        axes.set_ylim(len(figures) - 0.5, -0.5)
        axes.set_xlabel(measure)
        return _svg(figure)


def heat(rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float | None]], title: str) -> str:
    """A grid of relative changes: warm where there is a gain, cool where there is a loss, empty where nothing is known.

    Args:
        rows, columns: labels.
        values: [R][C], a change as a share of what it is compared with; None: unknown.
        title: what is compared with what.
    """
    grid = np.asarray([[np.nan if value is None else value for value in row] for row in values], np.float64)
    most = max(0.01, float(np.nanmax(np.abs(grid)))) if np.isfinite(grid).any() else 0.01
    with rc_context(_STYLE):
        figure = Figure(figsize=(2.4 + 0.85 * len(columns), 1.2 + 0.34 * len(rows)), layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.subplots()
        axes.patch.set_alpha(0)
        axes.imshow(grid, cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto")
        for (row, column), value in np.ndenumerate(grid):
            if np.isfinite(value):
                # On the darkest cells black would not be read.
                colour = "white" if abs(value) > 0.6 * most else "black"
                axes.text(column, row, f"{100 * value:+.1f}%", ha="center", va="center", color=colour, fontsize=7.5)
        axes.set_xticks(range(len(columns)), list(columns), rotation=30, ha="right")
        axes.set_yticks(range(len(rows)), list(rows))
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.set_title(title)
        return _svg(figure)


_COLOURS = ("#3987e5", "#d97a2b", "#4b9e5f", "#a866c4", "#8a8f99", "#c4485b")


def curves(lines: Mapping[str, Sequence[tuple[float, float, float, float]]], *, over: str, measure: str) -> str:
    """Means with their intervals over a quantity, a line for each name; lines without points are left out. What stands
    at the same quantity is drawn a little apart.

    Args:
        lines: name -> (quantity, mean, low, high), in order.
        over: what the quantity is.
        measure: what the means are.
    """
    with rc_context(_STYLE):
        figure, grid = _grid(1, 1, height=3.0, width=6.4)
        axes = grid[0, 0]
        shown = [(name, points) for name, points in lines.items() if points]
        extent = np.ptp([quantity for _, points in shown for quantity, *_ in points] or [0.0])
        for number, (name, points) in enumerate(shown):
            colour = _COLOURS[number % len(_COLOURS)]
            apart = 0.008 * extent * (number - (len(shown) - 1) / 2)
            quantity, mean, low, high = np.asarray(points, float).T + np.array([[apart], [0], [0], [0]])
            axes.plot(quantity, mean, color=colour, linewidth=1.4, marker="o", markersize=4, label=name)
            axes.vlines(quantity, low, high, color=colour, linewidth=1.0, alpha=0.45)
        axes.set_xlabel(over)
        axes.set_ylabel(measure)
        if shown:
            figure.legend(loc="outside right center", frameon=False)
        return _svg(figure)


def _panels(number: int) -> tuple[Figure, list[Axes]]:
    """That many panels, four in a row."""
    columns = min(4, number)
    figure, grid = _grid(-(-number // columns), columns, height=1.9)
    for axes in grid.flat[number:]:
        axes.set_visible(False)
    return figure, list(grid.flat[:number])


def _grid(rows: int, columns: int, *, height: float, width: float = 2.9) -> tuple[Figure, np.ndarray]:
    """`rows` x `columns` axes, each of this width and height in inches."""
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    figure.patch.set_alpha(0)
    grid: np.ndarray = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        _plain(axes)
    return figure, grid


def _plain(axes: Axes) -> None:
    axes.patch.set_alpha(0)
    axes.locator_params(axis="both", nbins=5)


def _svg(figure: Figure) -> str:
    sink = io.StringIO()
    figure.savefig(sink, format="svg", metadata={"Date": None, "Creator": None})
    text = sink.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Without a fixed size the picture takes the width that the page gives it.
    text = re.sub(r'(<svg [^>]*?) width="([\d.]+)pt" height="[\d.]+pt"', _sized, text, count=1)
    return text.replace(_INK, "currentColor")


def _sized(match: re.Match[str]) -> str:
    return f'{match.group(1)} style="width:100%;max-width:{float(match.group(2)) * 4 / 3:.0f}px;height:auto"'
