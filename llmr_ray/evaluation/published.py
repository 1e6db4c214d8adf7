"""Figures of the papers beside those of a run, with what differs between the two, read off the configuration.

published.yaml holds the figures as printed and each paper's set-up. A figure of a run stands beside a published one
where both are of the same data; otherwise beside those of the same task and measure, told to be of other data. Tables
of ablations stand beside studies, variant by variant.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path, PurePath
from typing import Any

from omegaconf import OmegaConf

from llmr_ray.config import Config
from llmr_ray.data.example_tasks import TASKS
from llmr_ray.errors import ConfigError
from llmr_ray.evaluation.results import AVERAGE
from llmr_ray.evaluation.tables import is_trained, method_name, result_of

EXAMPLES = "llm_r_table_10"
"""The table whose columns are the 30 data sets of examples; LLM-Embedder takes the same."""

Row = Mapping[str, Any]
"""An entry of `rows` of results.json."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """A table of a paper.

    columns: name, data, task, measure, and n (test queries) and members (data sets of an average) where the source says
    them. figures: row of the paper -> a value for each column or None, on the paper's scale. variants: of an ablation,
    figures by variant; then `figures` is empty. methods: row of the paper -> method of ours where its name is another,
    and round_2 is the second round's embedder also if that is the last one and called trained. initial: row of the
    model that training starts from. settings: a setting's path -> values that count as the paper's. train: data set ->
    its training queries. stand_ins: whether figures of other data of the same task may stand beside a column.
    """

    name: str
    title: str
    section: str
    scale: float
    columns: list[dict[str, Any]]
    methods: dict[str, str]
    settings: dict[str, list[Any]]
    train: dict[str, int]
    figures: dict[str, list[float | None]] = field(default_factory=dict)
    variants: dict[str, dict[str, list[float | None]]] = field(default_factory=dict)
    initial: str = ""
    stand_ins: bool = True


@cache
def published_tables() -> dict[str, Published]:
    """All tables of published.yaml by name."""
    whole: Any = OmegaConf.to_container(OmegaConf.load(Path(__file__).with_name("published.yaml")))
    tables = {}
    for name, table in whole["tables"].items():
        setup = whole["setups"][table.pop("setup")]
        settings = setup["settings"] | table.pop("settings", {})
        tables[name] = Published(name=name, **table, settings=settings, train=setup["train"])
    return tables


def check_names(names: Sequence[str]) -> None:
    """Raises ConfigError for a name in report.reproduces that no table of a run has."""
    known = [name for name, table in published_tables().items() if not table.variants]
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(
            f"report.reproduces: there is no published table {unknown} of a run. Known: {', '.join(known)}; those of "
            "ablations are named by studies."
        )


def check_variants(reproduces: Mapping[str, Mapping[str, str]]) -> None:
    """Raises ConfigError for a table or a variant in `reproduces` of a study that is not published."""
    known = {name: table.variants for name, table in published_tables().items() if table.variants}
    for name, variants in reproduces.items():
        if name not in known:
            raise ConfigError(f"there is no published table {name} of ablations. Known: {', '.join(known)}.")
        if unknown := [variant for variant in variants.values() if variant not in known[name]]:
            raise ConfigError(f"{name} has no variant {unknown}. Known: {', '.join(known[name])}.")


def beside_published(config: Config, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """For each table that the run is to be set beside: its figures and ours, and what differs.

    Args:
        config: of the run; `report.reproduces` names the tables.
        rows: of results.json.

    Returns:
        for each table name, title, section, figures, missing (its columns for which the run has nothing of the same
        measure) and differences. A figure has `column`, `data` (ours), `measure`, `same_data`, `n`, `published_n`, and
        `methods`: of each the paper's name, ours, and the means on the paper's scale with our interval and the gap. A
        difference has `what`, `ours` and `published` as text.
    """
    check_names(config.report.reproduces)
    return [_beside(published_tables()[name], config, rows) for name in config.report.reproduces]


def beside_study(
    reproduces: Mapping[str, Mapping[str, str]],
    configs: Mapping[str, Config],
    rows: Sequence[Row],
    *,
    reference: str = "",
) -> list[dict[str, Any]]:
    """For each published table of ablations that a study names: its figures and those of the study's variants.

    Args:
        reproduces: table -> variant of the study -> variant of the table.
        configs: of the study's variants that have run; the others are left out.
        rows: as of results.json, each with its `variant`; `ci95` may lack.
        reference: the variant that changes are against, of the table and of the study each by its own.

    Returns:
        for each table name, title, section, missing, differences (those that all of the variants have) and figures. A
        figure is a row of one variant: `variant`, `published_variant`, what `beside_published` has of a figure and of a
        method, and `change`, `published_change`: against the same row of the reference, on the paper's scale, or None.
    """
    check_variants(reproduces)
    told = []
    for name, variants in reproduces.items():
        table = published_tables()[name]
        compared = {
            ours: _beside(
                replace(table, figures=table.variants[theirs]),
                configs[ours],
                [row for row in rows if row["variant"] == ours],
            )
            for ours, theirs in variants.items()
            if ours in configs
        }
        figures = [
            {
                "variant": ours,
                "published_variant": variants[ours],
                **{key: value for key, value in figure.items() if key != "methods"},
                **method,
            }
            for ours, beside in compared.items()
            for figure in beside["figures"]
            for method in figure["methods"]
        ]
        found = [beside["differences"] for beside in compared.values()]
        told.append(
            {
                "name": table.name,
                "title": table.title,
                "section": table.section,
                "figures": _with_changes(figures, reference),
                "missing": _common([beside["missing"] for beside in compared.values()]),
                "differences": _common(found),
            }
        )
    return told


def _common(lists: Sequence[Sequence[Any]]) -> list[Any]:
    """What all lists have, in the order of the first."""
    return [item for item in lists[0] if all(item in other for other in lists[1:])] if lists else []


def _with_changes(figures: Sequence[dict[str, Any]], reference: str) -> list[dict[str, Any]]:
    """Figures with their changes against the same column, data and row of the reference."""

    def place(figure: Mapping[str, Any]) -> tuple[Any, ...]:
        # The result of one variant may be called trained, and of another be a round.
        return figure["column"], figure["data"], figure["published_method"], is_trained(figure["method"])

    of_reference = {place(figure): figure for figure in figures if figure["variant"] == reference}

    def change(figure: Mapping[str, Any], which: str) -> float | None:
        against = of_reference.get(place(figure))
        if against is None or figure["variant"] == reference or figure[which] is None or against[which] is None:
            return None
        return float(figure[which] - against[which])

    return [
        figure | {"change": change(figure, "ours"), "published_change": change(figure, "published")}
        for figure in figures
    ]


def differences(table: Published, config: Config) -> list[dict[str, str]]:
    """What the run's configuration has otherwise than the paper: settings, and the data that train."""
    found = []
    for path, accepted in table.settings.items():
        ours, is_there = _setting(config, path)
        if is_there and not any(_same(ours, value) for value in accepted):
            values = " or ".join(str(value) for value in accepted)
            found.append({"what": path, "ours": _text(ours), "published": values})
    reader = config.reader.model if config.reader is not None else config.llm.model
    accepted = table.settings["llm.model"]
    if config.reader is not None and not any(_same(reader, value) for value in accepted):
        found.append({"what": "reader.model", "ours": reader, "published": str(accepted[0])})
    trained = {name: dataset.num_train for name, dataset in config.datasets.items() if dataset.num_train}
    for name, number in table.train.items():
        # num_train is a limit: where it is above, all that the data set has is taken.
        if trained.get(name, 0) < number:
            ours = f"at most {trained[name]:,} queries" if name in trained else "not trained on"
            found.append({"what": f"training data {name}", "ours": ours, "published": f"{number:,} queries"})
    if further := sorted(set(trained) - set(table.train)):
        told = ", ".join(f"{name} ({trained[name]:,})" for name in further)
        found.append({"what": "further training data", "ours": told, "published": "none"})
    return found


def _beside(table: Published, config: Config, rows: Sequence[Row]) -> dict[str, Any]:
    by_column: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        by_column.setdefault((row["dataset"], row["measure"]), {})[row["method"]] = row
    task_of = {row["dataset"]: row["task"] for row in rows}
    pairs = _pairs(table, {row["method"] for row in rows}, num_rounds=config.rounds)
    figures, missing = [], []
    for place, column in enumerate(table.columns):
        alike = [key for key in by_column if key[1] == column["measure"] and task_of[key[0]] == column["task"]]
        of_data = (column["data"], column["measure"])
        # An average stands in for no single data set, nor a single one for it.
        others = alike if table.stand_ins and "members" not in column else []
        matches = [of_data] if of_data in alike else others
        if not matches:
            missing.append(column["name"])
        for key in matches:
            figures.append(
                {
                    "column": column["name"],
                    "data": key[0],
                    "measure": key[1],
                    "same_data": key == of_data and _same_members(column, config),
                    "n": max(row["n"] for row in by_column[key].values()),
                    "published_n": column.get("n"),
                    "methods": _methods(table, place, by_column[key], pairs),
                }
            )
    told = differences(table, config)
    if (table.initial, "base") in pairs:
        model = f"{method_name('base')} ({config.embedder.model}, instructions of the tasks)"
        told.append(
            {"what": f"row {table.initial}", "ours": model, "published": f"{table.initial}, as its authors run it"}
        )
    averages = [column for column in table.columns if column["data"] == AVERAGE]
    if averages and not _same_members(averages[0], config):
        number = len(_example_sets(config))
        sets = {"ours": f"{number} data sets", "published": f"{averages[0]['members']} data sets"}
        told.append({"what": "examples that are averaged", **sets})
    return {
        "name": table.name,
        "title": table.title,
        "section": table.section,
        "figures": figures,
        "missing": missing,
        "differences": told,
    }


def _pairs(table: Published, measured: Collection[str], *, num_rounds: int) -> list[tuple[str, str]]:
    """Rows of the paper, each with the method of ours that is meant to be the same; none is another's stand-in but the
    base embedder, for the model that training starts from.

    Where training is to give a row, the last round's embedder is the run's result; beside it the released model of that
    name has a row, if it was measured.
    """
    last, result, pairs = f"round_{num_rounds}", result_of(measured), []
    for name in table.figures:
        role = table.methods.get(name, name)
        role = result if role in ("trained", last) else role
        own = [role, name, *(["base"] if name == table.initial else [])]
        found = [method for method in dict.fromkeys(own) if method in measured] or [role]
        pairs += [(name, method) for method in (found if is_trained(role) else found[:1])]
    return pairs


def _methods(
    table: Published, place: int, ours: Mapping[str, Row], pairs: Sequence[tuple[str, str]]
) -> list[dict[str, Any]]:
    """The rows of a column that the paper or the run has."""
    told = []
    for name, method in pairs:
        row, value = ours.get(method), table.figures[name][place]
        if row is None and value is None:
            continue
        mean = row["mean"] * table.scale if row is not None else None
        told.append(
            {
                "published_method": name,
                "method": method,
                "name": method_name(method),
                "published": value,
                "ours": mean,
                "ci95": [edge * table.scale for edge in row["ci95"]] if row is not None and row["ci95"] else None,
                "gap": mean - value if mean is not None and value is not None else None,
            }
        )
    return told


def _example_sets(config: Config) -> set[str]:
    """Data sets of examples that the run is measured on."""
    return {name for name, dataset in config.datasets.items() if dataset.task == "icl" and dataset.num_test}


def _same_members(column: Mapping[str, Any], config: Config) -> bool:
    """Whether an average of ours is over the data sets of the paper's; True for what is no average."""
    if "members" not in column:
        return True
    category = column["data"].removeprefix(AVERAGE).strip()

    def of_category(names: Iterable[str]) -> set[str]:
        return {name for name in names if not category or (name in TASKS and TASKS[name].category == category)}

    theirs = {other["data"] for other in published_tables()[EXAMPLES].columns}
    return of_category(_example_sets(config)) == of_category(theirs)


def _setting(config: Config, path: str) -> tuple[Any, bool]:
    """A setting by its path, and whether the configuration has it: a task that no data set has is none of its, nor is
    an embedder that is not compared."""
    value: Any = config
    for place, name in enumerate(parts := path.split(".")):
        if isinstance(value, dict):
            if name not in value:
                return None, False
            value = value[name]
        else:
            value = getattr(value, name)
        if place == 1 and parts[0] == "tasks" and name not in {item.task for item in config.datasets.values()}:
            return None, False
    compares = parts[:2] == ["evaluate", "embedders"]
    return value, not compares or parts[2] in config.evaluate.methods


def _same(ours: Any, published: Any) -> bool:
    if isinstance(ours, str) and isinstance(published, str):
        # A model in a folder of one's own has the name of that on the hub, without its owner.
        return PurePath(ours).name.lower() == PurePath(published).name.lower()
    return bool(ours == published)


def _text(value: Any) -> str:
    return str(value) if value not in ("", None, {}) else "none"
