"""Which published format a file or folder has, and which data sets it holds."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmr_ray.data.example_tasks import TASKS
from llmr_ray.data.files import files_of_splits, has_splits, is_table, read_rows, tables_of
from llmr_ray.data.llm_embedder import FOLDERS
from llmr_ray.data.records import read_lines
from llmr_ray.data.toolbench import instruction_files
from llmr_ray.errors import ConfigError, DataError

_TASK_NAME = re.compile(rb'"task_name"\s*:\s*"([^"]*)"')

_LLM_R_FILES = ("train.jsonl.gz", "passages.jsonl.gz")


@dataclass(frozen=True, kw_only=True)
class DataFiles:
    """A data set as a configuration would name it."""

    name: str
    source: str
    task: str
    path: Path


def recognise(path: Path) -> list[DataFiles]:
    """The data sets of a file or folder.

    Raises:
        ConfigError: its format is none that a reader knows.
        DataError: there is no such file.
    """
    if not path.exists():
        raise DataError(f"there is no {path}.")
    found = _of_file(path) if path.is_file() else _of_folder(path)
    if found is None:
        held = sorted(item.name for item in path.iterdir())[:10] if path.is_dir() else sorted(_first_row(path))
        raise ConfigError(
            f"{path} has none of the formats that are recognised; it holds {held}. Say what it is: --source NAME "
            "--task TASK."
        )
    return found


def name_of(path: Path) -> str:
    """A data set's name from the name of its file or folder."""
    plain = re.sub(r"(\.(jsonl|json|parquet|gz))+$", "", path.resolve().name)
    return re.sub(r"[^\w.-]+", "_", plain) or "data"


def tasks_named(paths: Iterable[Path]) -> list[str]:
    """The tasks of in-context learning that rows of some files name and a reader knows, sorted."""
    named = {match.group(1).decode("utf-8", "replace") for path in paths for match in _matches(path)}
    return sorted(named & set(TASKS))


def _matches(path: Path) -> Iterable[re.Match[bytes]]:
    return (match for line in read_lines(path) if (match := _TASK_NAME.search(line)))


def _of_file(path: Path) -> list[DataFiles] | None:
    if re.search(r"_query\.json(\.gz)?$", path.name):
        return [DataFiles(name=name_of(path), source="toolbench", task="tool", path=path)]
    if not is_table(path):
        return None
    source, task = _of_row(_first_row(path), path.parent)
    if not source:
        return None
    return [DataFiles(name=name_of(path.parent if task == "icl" else path), source=source, task=task, path=path)]


def _of_folder(path: Path) -> list[DataFiles] | None:
    if (path / "corpus.tsv").exists() or instruction_files(path):
        return [DataFiles(name=name_of(path), source="toolbench", task="tool", path=path)]
    if all((path / name).exists() for name in _LLM_R_FILES):
        tables = [path / "train.jsonl.gz", path / "test.jsonl.gz"]
        names = tasks_named(table for table in tables if table.exists())
        return [DataFiles(name=name, source="llm_r", task="icl", path=path) for name in names]
    if archive := _archive(path):
        return archive
    queries = tables_of(path, "queries")
    if queries and tables_of(path, "corpus"):
        is_own = (path / "corpus.jsonl").exists() and (path / "queries.jsonl").exists()
        task = "qa" if _first_row(queries[0]).get("answers") else "convsearch"
        return [DataFiles(name=name_of(path), source="jsonl" if is_own else "mteb", task=task, path=path)]
    if (path / "queries.jsonl").exists():
        return [DataFiles(name=name_of(path), source="jsonl", task="icl", path=path)]
    if not has_splits(path):
        return None
    source, task = _of_row(_first_row(files_of_splits(path)[0][1]), path)
    if source == "llm_embedder" and task == "icl":
        return _icl(path, path)
    return [DataFiles(name=name_of(path), source=source, task=task, path=path)] if source else None


def _archive(path: Path) -> list[DataFiles]:
    """The data sets of LLM-Embedder's archive, or of one of its tasks' folders."""
    found: list[DataFiles] = []
    for task, folders in FOLDERS.items():
        places = [path / folder for folder in folders] + ([path] if path.name in folders else [])
        for place in places:
            datasets = [item for item in sorted(place.iterdir()) if has_splits(item)] if place.is_dir() else []
            for item in datasets:
                if task == "icl":
                    found += _icl(item, path)
                else:
                    found.append(DataFiles(name=item.name, source="llm_embedder", task=task, path=path))
    return found


def _icl(folder: Path, path: Path) -> list[DataFiles]:
    files = [*tables_of(folder, "corpus"), *(file for _, file in files_of_splits(folder))]
    return [DataFiles(name=name, source="llm_embedder", task="icl", path=path) for name in tasks_named(files)]


def _of_row(row: Mapping[str, Any], folder: Path) -> tuple[str, str]:
    """Source and task of rows like this one; empty: none."""
    of_folder = [task for task, names in FOLDERS.items() if folder.parent.name in names]
    said = row.get("task") if row.get("task") in FOLDERS else next(iter(of_folder), None)
    if "positive_passages" in row or "positive_ctxs" in row:
        return "tevatron", "qa"
    if "pos" in row and "scores" in row and "neg" not in row:
        return "kl_rows", "qa"
    if "history" in row:
        return "llm_embedder", "chat"
    if said is not None or "pos_index" in row or "choices" in row:
        return "llm_embedder", str(said or "qa")
    if "query" in row and "pos" in row:
        return "flag_embedding", "qa"
    if "query" in row and "answers" in row:
        return "jsonl", "icl"
    return "", ""


def _first_row(path: Path) -> dict[str, Any]:
    return next((row for _, row in read_rows(path) if isinstance(row, dict)), {})
