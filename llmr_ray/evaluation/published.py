"""Figures of the papers beside those of a run, with what differs between the two, read off the configuration.

published.yaml holds the figures as printed and each paper's set-up. A figure of a run stands beside a published one
where both are of the same data; otherwise beside those of the same task and measure, told to be of other data.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePath
from typing import Any

from omegaconf import OmegaConf

from llmr_ray.config import Config
from llmr_ray.data.example_tasks import TASKS
from llmr_ray.errors import ConfigError
from llmr_ray.evaluation.results import AVERAGE
from llmr_ray.evaluation.tables import method_name, result_of

EXAMPLES = "llm_r_table_10"
"""The table whose columns are the 30 data sets of examples; LLM-Embedder takes the same."""

Row = Mapping[str, Any]
"""An entry of `rows` of results.json."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """A table of a paper.

    columns: name, data, task, measure, and n (test queries) and members (data sets of an average) where the source says
    them. methods: row of the paper -> method of ours, where round_2 is the second round's embedder also if that is the
    last one and called trained. figures: row of the paper -> a value for each column or None, on the paper's scale.
    settings: a setting's path -> values that count as the paper's. train: data set -> its training queries. stand_ins:
    whether figures of other data of the same task may stand beside a column.
    """

    name: str
    title: str
    section: str
    scale: float
    columns: list[dict[str, Any]]
    methods: dict[str, str]
    figures: dict[str, list[float | None]]
    settings: dict[str, list[Any]]
    train: dict[str, int]
    stand_ins: bool = True


@cache
def published_tables() -> dict[str, Published]:
    """All tables of published.yaml by name."""
    whole: Any = OmegaConf.to_container(OmegaConf.load(Path(__file__).with_name("published.yaml")))
    tables = {}
    for name, table in whole["tables"].items():
        setup = whole["setups"][table.pop("setup")]
        tables[name] = Published(name=name, **table, settings=setup["settings"], train=setup["train"])
    return tables


def check_names(names: Sequence[str]) -> None:
    """Raises ConfigError for a name in report.reproduces that no table has."""
    if unknown := [name for name in names if name not in published_tables()]:
        known = ", ".join(published_tables())
        raise ConfigError(f"report.reproduces: there is no published table {unknown}. Known: {known}.")


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
                    "methods": _methods(table, place, by_column[key], num_rounds=config.rounds),
                }
            )
    told = differences(table, config)
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


def _methods(table: Published, place: int, ours: Mapping[str, Row], *, num_rounds: int) -> list[dict[str, Any]]:
    """The rows of a column that the paper or the run has. The last round's embedder is the run's result."""
    last, result, told = f"round_{num_rounds}", result_of(ours), []
    for name, method in table.methods.items():
        method = result if method in ("trained", last) else method
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
                "ci95": [edge * table.scale for edge in row["ci95"]] if row is not None else None,
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
    """A setting by its path, and whether the configuration has it: a task that no data set has is none of its."""
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
    return value, True


def _same(ours: Any, published: Any) -> bool:
    if isinstance(ours, str) and isinstance(published, str):
        # A model in a folder of one's own has the name of that on the hub, without its owner.
        return PurePath(ours).name.lower() == PurePath(published).name.lower()
    return bool(ours == published)


def _text(value: Any) -> str:
    return str(value) if value not in ("", None) else "none"
