"""The figures arranged as in the paper: Table 1 knowledge, Table 2 memory, Table 3 examples and tools."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
"""An entry of `rows` of results.json."""

TITLES = (
    (("knowledge",), "Table 1: knowledge"),
    (("memory",), "Table 2: memory"),
    (("examples", "tools"), "Table 3: examples and tools"),
)

SIGNIFICANT = 0.05

METHOD_NAMES = {
    "none": "None",
    "random": "Random",
    "kmeans": "k-means",
    "bm25": "BM25",
    "recency": "Recency",
    "base": "Base embedder",
    "trained": "Trained embedder",
}
"""Rows of the tables in their order; training rounds stand before "trained"."""

_ROUND = re.compile(r"round_([1-9]\d*)")


def is_reserved(method: str) -> bool:
    """Whether a method's name has a meaning of its own, so that no other embedder may have it."""
    return method in METHOD_NAMES or _round(method) > 0


def is_trained(method: str) -> bool:
    """Whether a method is an embedder that this run trained."""
    return method == "trained" or _round(method) > 0


def is_embedder(method: str) -> bool:
    """Whether a method ranks by an embedder's similarities: the base, a trained one, or one that is only compared."""
    return method == "base" or is_trained(method) or not is_reserved(method)


def method_name(method: str) -> str:
    """What a table calls a method; an embedder that is only compared has the name that the configuration gives it."""
    return METHOD_NAMES.get(method) or (f"Round {_round(method)}" if _round(method) else method)


def in_order(methods: Collection[str]) -> list[str]:
    """Methods as rows of a table: baselines, other embedders, training rounds."""
    rounds = sorted((method for method in methods if _round(method)), key=_round)
    named = [method for method in METHOD_NAMES if method in methods]
    end = len(named) - ("trained" in methods)
    others = sorted(method for method in methods if not is_reserved(method))
    return named[:end] + others + rounds + named[end:]


def result_of(methods: Collection[str]) -> str:
    """The method whose difference to the base embedder is what training brought: "trained", or the last round."""
    rounds = [method for method in methods if _round(method)]
    return "trained" if "trained" in methods or not rounds else max(rounds, key=_round)


def _round(method: str) -> int:
    match = _ROUND.fullmatch(method)
    return int(match[1]) if match else 0


@dataclass(frozen=True, kw_only=True)
class Column:
    """One measure on one data set.

    figures: method -> its row. best: the methods with the best mean.
    """

    scenario: str
    dataset: str
    measure: str
    n: int
    lower_is_better: bool
    is_main: bool
    figures: dict[str, Row]
    best: frozenset[str]


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of the paper: methods down, columns across."""

    title: str
    methods: list[str]
    columns: list[Column]


def tables(rows: Sequence[Row]) -> list[Table]:
    """The paper's tables, those without figures left out.

    Args:
        rows: of results.json, columns and methods in their order of appearance.
    """
    columns: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        columns.setdefault((row["dataset"], row["measure"]), []).append(row)
    arranged = [_column(members) for members in columns.values()]
    result = []
    for scenarios, title in TITLES:
        mine = [column for scenario in scenarios for column in arranged if column.scenario == scenario]
        present = {method for column in mine for method in column.figures}
        if mine:
            result.append(Table(title=title, methods=in_order(present), columns=mine))
    return result


def effect(figure: Row) -> str:
    """How a figure differs from the base embedder's: "better", "worse", or "" where the paired test has p >= 0.05.

    The test decides, not the interval, because a percentile bootstrap of few queries is too narrow.
    """
    delta = figure["delta_vs_base"]
    if delta is None or delta["p"] >= SIGNIFICANT:
        return ""
    return "better" if (delta["mean"] < 0) == figure["lower_is_better"] else "worse"


def p_text(p: float) -> str:
    """``p=0.034``, or ``p<0.001``: a permutation test resolves no less than one over its samples."""
    return "p<0.001" if p < 0.001 else f"p={p:.3f}"


def _column(members: Sequence[Row]) -> Column:
    first = members[0]
    means = [row["mean"] for row in members]
    winner = min(means) if first["lower_is_better"] else max(means)
    return Column(
        scenario=first["scenario"],
        dataset=first["dataset"],
        measure=first["measure"],
        n=max(row["n"] for row in members),
        lower_is_better=first["lower_is_better"],
        is_main=first["is_main"],
        figures={row["method"]: row for row in members},
        best=frozenset(row["method"] for row in members if row["mean"] == winner),
    )
