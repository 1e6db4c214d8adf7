"""A finished run in another project's format: which artifacts it takes, what it writes, and the card beside it."""

import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from llmr_ray import loading
from llmr_ray.artifacts import Artifact
from llmr_ray.config import Config
from llmr_ray.console import terminal
from llmr_ray.durable import staged, write_atomic
from llmr_ray.errors import ConfigError, DataError
from llmr_ray.evaluation.trec import write_trec
from llmr_ray.export import results
from llmr_ray.export.cards import Provenance, dataset_card, model_card
from llmr_ray.export.training_data import ROW_FORMATS, TrainingRow, training_rows, write_columns, write_rows

COLUMNS, TREC, MTEB, MODEL = "sentence_transformers", "trec", "mteb", "model"
FORMATS = (*ROW_FORMATS, COLUMNS, TREC, MTEB, MODEL)

RESOLVED = "config.resolved.yaml"
"""In a run's folder: the configuration that it had."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is to be exported, and how.

    method: whose rankings `mteb` measures. num_negatives: of `sentence_transformers`, 0: as many as all groups have.
    language: of the data, as MTEB writes it. license_name: of the card.
    """

    form: str
    out: Path
    method: str = "trained"
    num_negatives: int = 0
    language: str = "eng-Latn"
    license_name: str = ""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written: rows of each file (bytes of a model's), and what the format could not hold, by reason."""

    files: dict[str, int]
    left_out: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Finished:
    """The artifacts of a run by the name of their stage, some perhaps not made yet."""

    config: Config
    artifacts: Mapping[str, Artifact]
    base_model: str = ""
    """The hub name of the embedder's base; empty where it has none."""

    def of(self, stage: str) -> Artifact:
        """A finished artifact; DataError says which stage is missing."""
        artifact = self.artifacts[stage]
        if not artifact.is_done:
            raise DataError(
                f"{artifact.id} of the run '{self.config.name}' is not there, so there is nothing to export. Run the "
                f"configuration first, at least to the stage {stage}; or correct runtime.artifact_root "
                f"({self.config.runtime.artifact_root})."
            )
        return artifact


def export_run(path: str, overrides: list[str], wanted: Wanted) -> Exported:
    """Exports from the configuration of a run, or from the folder that it wrote.

    Raises:
        ConfigError: there is no such format.
        DataError: the artifacts that the format takes are not made yet.
    """
    if wanted.form not in FORMATS:
        raise ConfigError(f"there is no format '{wanted.form}'. Formats: {', '.join(FORMATS)}.")
    from llmr_ray.pipeline import Pipeline

    file = Path(path) / RESOLVED if Path(path).is_dir() else Path(path)
    if not file.exists():
        raise ConfigError(f"there is no {file}. Give a run's configuration, or the folder that it wrote (runs/NAME).")
    config = loading.load(file, overrides)
    pipeline = Pipeline(config, terminal(quiet=True))
    base = pipeline.by_name["embed_base"].inputs["embedder"]
    artifacts = {name: stage.artifact for name, stage in pipeline.by_name.items()} | {"prepare": pipeline.prepared}
    finished = Finished(config=config, artifacts=artifacts, base_model=base.name if base.kind == "hub" else "")
    return export(finished, wanted, command=" ".join(["llmr run", path, *overrides]))


def export(finished: Finished, wanted: Wanted, command: str) -> Exported:
    """Writes a format into `wanted.out`; files of the same name are replaced, others stay.

    Args:
        finished: the run.
        wanted: the format.
        command: what repeats the run, for the card.
    """
    if wanted.form == TREC:
        return _trec(finished, wanted)
    if wanted.form == MTEB:
        return _mteb(finished, wanted)
    if wanted.form == MODEL:
        return _model(finished, wanted, command)
    return _training_data(finished, wanted, command)


def _training_data(finished: Finished, wanted: Wanted, command: str) -> Exported:
    groups, prepare = finished.of("group"), finished.of("prepare")
    queries = prepare.read("queries").select(["query_id", "targets"])
    targets = dict(zip(queries["query_id"].to_pylist(), queries["targets"].to_pylist(), strict=True))
    needs_rewards = wanted.form != "tevatron"

    def rows(left_out: Counter[str]) -> Iterable[TrainingRow]:
        return training_rows(_parts(groups), targets, left_out, needs_rewards=needs_rewards)

    left_out: Counter[str] = Counter()
    if wanted.form == COLUMNS:
        # Read twice, counted once.
        passes = iter((Counter[str](), left_out))
        files = write_columns(wanted.out, lambda: rows(next(passes)), wanted.num_negatives)
    else:
        files = write_rows(wanted.out, wanted.form, rows(left_out))
    if not files:
        raise DataError(f"{groups.id} holds no group with a positive and a negative: there is nothing to export.")
    told = {reason: number for reason, number in sorted(left_out.items()) if number}
    of = Provenance(artifacts={"prepare": prepare.id, "group": groups.id}, command=command)
    card = dataset_card(finished.config, wanted.form, files, told, of, license_name=wanted.license_name)
    write_atomic(wanted.out / "README.md", card.encode())
    return Exported(files=files, left_out=told)


def _parts(groups: Artifact) -> Iterable[pa.Table]:
    return map(partial(groups.read, "groups"), range(groups.require()["num_shards"]))


def _trec(finished: Finished, wanted: Wanted) -> Exported:
    evaluated, prepare = finished.of("evaluate"), finished.of("prepare")
    paths = write_trec(wanted.out, evaluated.read("run"), prepare.read("qrels"), _datasets(evaluated, prepare))
    if not paths:
        raise DataError(f"{evaluated.id} ranks no query of a data set with labels: there is nothing to export.")
    return Exported(files={path.name: path.read_bytes().count(b"\n") for path in paths})


def _mteb(finished: Finished, wanted: Wanted) -> Exported:
    evaluated, prepare = finished.of("evaluate"), finished.of("prepare")
    figures = _figures(finished, wanted.method)
    made: list[Mapping[str, Any]] = [
        results.task_result(
            dataset,
            methods[wanted.method],
            revision=prepare.id.rpartition("/")[2],
            split=finished.config.evaluate.split,
            languages=[wanted.language],
            seconds=evaluated.require()["seconds"],
        )
        for dataset, methods in sorted(figures.items())
    ]
    if not made:
        raise DataError(f"{evaluated.id} measures no data set with labels: there is nothing to export.")
    return Exported(files=results.write_results(wanted.out, made))


def _model(finished: Finished, wanted: Wanted, command: str) -> Exported:
    checkpoint = finished.of("train")
    checkpoint.verify()
    folder = checkpoint.file("embedder")
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    for name, path in files.items():
        with staged(wanted.out / name) as whole:
            shutil.copyfile(path, whole)
    figures: dict[str, dict[str, dict[str, float]]] = {}
    methods = [name for name in ("base", "trained") if name in finished.config.evaluate.methods]
    if finished.artifacts["evaluate"].is_done and methods:
        figures = _figures(finished, *methods)
    of = Provenance(artifacts={"train": checkpoint.id}, command=command)
    card = model_card(finished.config, figures, of, base_model=finished.base_model, license_name=wanted.license_name)
    write_atomic(wanted.out / "README.md", card.encode())
    return Exported(files={name: path.stat().st_size for name, path in files.items()})


def _figures(finished: Finished, *methods: str) -> dict[str, dict[str, dict[str, float]]]:
    """By data set with labels, method and measure."""
    evaluated, prepare = finished.of("evaluate"), finished.of("prepare")
    judged = results.judged_by_dataset(prepare.read("qrels"), _datasets(evaluated, prepare))
    run, depth = evaluated.read("run"), finished.config.evaluate.search_depth
    found: dict[str, dict[str, dict[str, float]]] = {}
    for method in methods:
        for dataset, scores in results.dataset_scores(run, judged, method, depth).items():
            found.setdefault(dataset, {})[method] = scores
    return found


def _datasets(evaluated: Artifact, prepare: Artifact) -> dict[str, str]:
    """The data set of each query that was evaluated."""
    measured = set(evaluated.read("metrics")["query_id"].to_pylist())
    queries = prepare.read("queries").select(["query_id", "dataset"]).to_pylist()
    return {row["query_id"]: row["dataset"] for row in queries if row["query_id"] in measured}
