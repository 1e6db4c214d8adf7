"""docs/paper_vs_code_vs_ours.md: what it names exists, and the values that it gives are those of the files."""

import dataclasses
import re
import typing
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmr_ray import loading
from llmr_ray.config import Config

ROOT = Path(__file__).parents[2]
LEDGER = (ROOT / "docs" / "paper_vs_code_vs_ours.md").read_text()
NAMED = sorted(set(re.findall(r"`([^`\n]+)`", LEDGER)))
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in LEDGER.splitlines() if line.startswith("|")]
TOP = {item.name for item in dataclasses.fields(Config)}
SETTINGS = [name for name in NAMED if re.fullmatch(r"[\w.*]+", name.split(":")[0]) and name.split(".")[0] in TOP]


def exists(path: list[str], kind: Any) -> bool:
    """Whether a path of settings leads anywhere in a type; `*` stands for any name of a task, a data set or a field."""
    if not path:
        return True
    if typing.get_origin(kind) is dict:
        return exists(path[1:], typing.get_args(kind)[1])
    options = typing.get_args(kind) or (kind,)
    (kind,) = (option for option in options if option is not type(None))
    if not dataclasses.is_dataclass(kind):
        return False
    hints = typing.get_type_hints(kind)
    return any(fnmatchcase(name, path[0]) and exists(path[1:], hints[name]) for name in hints)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_that_the_ledger_names_exists(name):
    """A deviation is looked up and turned off by its setting: a name that is gone sends people nowhere."""
    assert exists(name.split(":")[0].split("."), Config)


def test_the_ledger_names_settings():
    """Keeps the test above from passing because nothing is recognised any more."""
    assert len(SETTINGS) > 60
    assert not exists(["tasks", "*", "score", "feedbacks"], Config)
    assert not exists(["train", "seed", "more"], Config)


@pytest.mark.parametrize("name", [name for name in NAMED if re.fullmatch(r"[\w/]+\.(py|yaml)", name)])
def test_a_file_that_the_ledger_names_exists(name):
    assert (ROOT / name).exists() or (ROOT / "llmr_ray" / name).exists()


@pytest.mark.parametrize(("module", "name"), sorted(set(re.findall(r"`([\w/]+\.py)` `(\w+)`", LEDGER))))
def test_a_function_that_the_ledger_names_is_in_its_module(module, name):
    assert re.search(rf"\b(def|class) {name}\b", (ROOT / "llmr_ray" / module).read_text())


def configured() -> list[tuple[str, str, str]]:
    """(configuration, setting, value) of the tables "as configured"."""
    found, files = [], []
    for first, *rest in ROWS:
        if first == "setting":
            files = [cell.strip("`") for cell in rest]
        elif first == "topic":
            files = []
        elif files and first.startswith("`"):
            found += [(file, first.strip("`"), cell) for file, cell in zip(files, rest, strict=True)]
    return found


@pytest.mark.parametrize("file", sorted({file for file, _, _ in configured()}))
def test_values_in_the_ledger_are_those_of_the_configurations(file):
    """Prevents a ledger that says 5e-6 of a file that trains with 5e-5."""
    config = loading.load(ROOT / file)
    for of_file, path, told in configured():
        if of_file != file:
            continue
        value: Any = config
        for name in path.split("."):
            value = value[name] if isinstance(value, dict) else getattr(value, name)
        if isinstance(value, float):
            assert float(told) == value, path
        elif isinstance(value, str):
            assert told == (value or "none"), path
        else:
            assert yaml.safe_load(told) == value, path


def test_the_ledger_has_every_table_of_values():
    """Both papers that have code have one, over all of their files."""
    assert {file for file, _, _ in configured()} >= {
        *(f"conf/paper/llm_embedder{of}.yaml" for of in ("", "_v1", "_acl", "_released", "_scores")),
        "conf/paper/llm_r.yaml",
    }


def leaves(value: Any, path: tuple[str, ...] = ()) -> set[tuple[str, ...]]:
    if not isinstance(value, dict):
        return {path}
    return {leaf for name, inner in value.items() for leaf in leaves(inner, (*path, name))}


def test_every_defect_of_the_released_code_that_is_a_setting_is_in_the_ledger():
    """Prevents a deviation that can be turned on and is recorded nowhere."""
    turned_on = yaml.safe_load((ROOT / "conf" / "paper" / "released_behaviour.yaml").read_text())
    for leaf in leaves(turned_on):
        path = ".".join(("tasks", "*", *leaf[2:]) if leaf[0] == "tasks" else leaf)
        assert f"`{path}`" in LEDGER, path


@pytest.mark.parametrize("file", ["v1", "acl", "released"])
def test_what_sets_the_variants_apart_is_in_the_table_of_their_values(file):
    """Prevents a setting by which one variant differs, and of which the ledger says something else or nothing."""
    of_variant = yaml.safe_load((ROOT / "conf" / "paper" / f"{file}.yaml").read_text())
    told = {path.split(".")[-1] for _, path, _ in configured()} | {name.split(".")[-1] for name in SETTINGS}
    assert {leaf[-1] for leaf in leaves(of_variant)} <= told
