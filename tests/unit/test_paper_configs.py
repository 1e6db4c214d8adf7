"""LLM-Embedder's paper configurations on an archive of a few rows: they prepare, and measure what the paper did."""

import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import evaluation_world as world
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from llmr_ray import loading
from llmr_ray.artifacts import Artifact
from llmr_ray.assets import Asset
from llmr_ray.config import Config, DatasetConfig, EvaluateConfig, identity
from llmr_ray.data.stage import PrepareWorker, prepare_spec
from llmr_ray.errors import ConfigError
from llmr_ray.evaluation.published import beside_published, differences, published_tables
from llmr_ray.evaluation.results import held_out_tasks, result_rows
from llmr_ray.studies import read_study
from tests import published

CONF = Path(__file__).parents[2] / "conf"
RUNS = ("llm_embedder", "llm_embedder_acl", "llm_embedder_v1", "llm_embedder_released", "llm_embedder_scores")
METHODS = ["none", "bm25", "base", "trained"]


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return published.whole_llm_embedder(tmp_path_factory.mktemp("archive"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("artifacts")


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer folder whose tokens are single characters."""
    folder = tmp_path_factory.mktemp("letters")
    tokenizer = Tokenizer(models.WordLevel({chr(code): code for code in range(128)}, unk_token=chr(0)))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def in_small(path: Path, archive: Path) -> Config:
    """A configuration of the paper over an archive of a few rows, of which many are bad on purpose."""
    whole = loading.load(path)
    sizes = []
    for name, dataset in whole.datasets.items():
        sizes.append(f"datasets.{name}.path={archive}")
        for size in ("num_train", "num_dev", "num_test"):
            sizes.append(f"datasets.{name}.{size}={min(40, getattr(dataset, size))}")
    small = loading.load(path, [*sizes, "prepare.max_bad_fraction=0.5", "evaluate.search_depth=20"])
    return replace(small, evaluate=replace(small.evaluate, methods=METHODS))


def prepared(config: Config, root: Path, archive: Path, letters: Path) -> Artifact:
    """What the stage prepare makes, its shards one after the other; configurations of the same data share it."""
    assets = {str(archive): Asset(name="archive", kind="data", path=archive, fingerprint="archive")}
    assets[config.llm.model] = Asset(name="llm", kind="model", path=letters, fingerprint="letters")
    artifact = Artifact(root, prepare_spec(config, assets))
    if artifact.is_done:
        return artifact
    artifact.begin()
    tasks = sorted({dataset.task for dataset in config.datasets.values()})
    paths = dict.fromkeys(config.datasets, archive)
    worker = PrepareWorker(artifact, tasks, config.datasets, config.prepare, paths, letters)
    for shard in range(len(tasks)):
        worker.run(shard)
    artifact.commit(len(tasks), seconds=1.0)
    return artifact


@pytest.mark.parametrize("name", RUNS)
def test_every_data_set_of_the_paper_is_prepared(name: str, archive: Path, letters: Path, root: Path) -> None:
    """A configuration that loads and is planned, but whose data sets no reader serves, fails on the cluster."""
    config = in_small(CONF / "paper" / f"{name}.yaml", archive)
    queries = prepared(config, root, archive, letters).read("queries").to_pylist()
    found = defaultdict(set)
    for query in queries:
        found[query["dataset"]].add(query["split"])
    for dataset, settings in config.datasets.items():
        assert found[dataset] == {split for split in ("train", "dev", "test") if getattr(settings, f"num_{split}")}
    categories = {json.loads(query["meta"]).get("category") for query in queries if query["task"] == "icl"}
    assert len(categories) == 9
    assert config.runtime.llm_gpus
    assert config.runtime.train_gpus
    windows = [query for query in queries if query["task"] == "lrlm" and query["split"] == "test"]
    # 1,024 tokens of desired outputs in a window of 2,048: the first sees 1,024 before it, the last 1,920.
    lengths = sorted({len(query["context"] + query["query"]) for query in windows})
    assert lengths == [*range(1024, 2048, 128)]


@pytest.fixture(scope="module")
def evaluated(archive: Path, letters: Path, root: Path) -> tuple[Config, list[dict[str, Any]]]:
    """The configuration of the ACL paper, and the figures of its evaluation by a model that answers by rule."""
    config = in_small(CONF / "paper" / "llm_embedder_acl.yaml", archive)
    prepare = prepared(config, root, archive, letters)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llmr_ray.evaluation.stage.search", world.brute_force_search)
        artifact = world.make_evaluation(root, config, prepare, world.FakeClient())
    rows = result_rows(
        artifact.read("metrics"),
        {name: dataset.task for name, dataset in config.datasets.items()},
        METHODS,
        samples=50,
        seed=1,
        artifacts={method: {} for method in METHODS},
        held_out=held_out_tasks(config),
    )
    return config, rows


def test_every_column_of_the_paper_is_measured(evaluated: tuple[Config, list[dict[str, Any]]]) -> None:
    """A run of days that reproduces three tables, but has no figure for most of their columns."""
    config, rows = evaluated
    for table in beside_published(config, rows):
        assert table["missing"] == [], table["name"]
        assert all(figure["same_data"] for figure in table["figures"])
        paper = loading.load(CONF / "paper" / "llm_embedder_acl.yaml")
        told = {entry["what"] for entry in differences(published_tables()[table["name"]], paper)}
        same = ("evaluate", "llm.", "training data", "examples", "further")
        assert not {what for what in told if what.startswith(same)}


def test_every_figure_of_a_study_of_the_paper_can_exist(evaluated: tuple[Config, list[dict[str, Any]]]) -> None:
    """A study over cells of days whose table stays empty, or of which some do not even load. A cell lacks a figure only
    where it says so itself: an LLM of a short context reads no long texts."""
    figures = {(row["dataset"], row["measure"]) for row in evaluated[1]}
    studies = [read_study(path) for path in sorted((CONF / "studies").glob("*.yaml"))]
    of_paper = [study for study in studies if "paper/llm_embedder" in study.config]
    assert of_paper
    for study in of_paper:
        assert set(study.figures) <= figures, study.name
        for cell in study.cells([]):
            asked = loading.load(study.config, cell.settings).evaluate.num_llm_queries
            lacking = {dataset for dataset, _ in study.figures if not asked.get(dataset, 1)}
            assert all(f"evaluate.num_llm_queries.{name}=0" in cell.settings for name in lacking), cell.label


TASKS = CONF / "paper" / "llm_embedder_tasks.yaml"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        # A window that the queries do not hold: evaluation can only cut it.
        (["evaluate.lrlm_window_tokens=4096"], "hold 2048 tokens of recent text"),
        (["datasets.books3.window_tokens=200"], "whole chunks of 128"),
        # Desired outputs take 1,024 tokens of a window that ends with the text.
        (["datasets.books3.window_tokens=1024"], "of at least 1152"),
        # 8 chunks of 256 tokens and the window do not fit.
        (["llm.max_model_tokens=2047"], r"llm\.max_model_tokens is 2047"),
        (["reader.model=x", "reader.max_model_tokens=4094"], r"reader\.max_model_tokens is 4094"),
        (["datasets.books3.window_end=output"], "2176 of window and desired output"),
        (["evaluate.qa_protocols.nq=squad"], "must be one of ours, mmlu, popqa, nq"),
        (["evaluate.qa_protocols.msc=nq"], "no data set of the task qa"),
        (["evaluate.prompt_tokens.lrlm=2048"], "Long texts have evaluate.lrlm_window_tokens"),
        (["evaluate.prompt_tokens.icl=64"], "the answer takes 64 tokens"),
        (["evaluate.reading=evidence"], r"asks \['mmlu', 'nq', 'popqa'\] as published"),
    ],
)
def test_settings_of_evaluation_that_cannot_hold_are_told_at_load(overrides: list[str], message: str) -> None:
    """The report certified a window of 2,048 tokens where the queries held 256."""
    with pytest.raises(ConfigError, match=message):
        loading.load(TASKS, overrides)


def test_a_window_that_is_not_read_needs_no_room() -> None:
    """An LLM with a short context may still answer what is no long text."""
    unasked = [f"evaluate.num_llm_queries.{name}=0" for name in ("arxiv", "books3", "codeparrot", "pg19")]
    assert loading.load(TASKS, ["llm.max_model_tokens=2047", *unasked]).llm.max_model_tokens == 2047


def test_windows_and_protocols_enter_no_id_at_their_defaults() -> None:
    """Data that is prepared would be prepared again, and everything that rests on it be made again."""
    assert not {"window_tokens", "window_end"} & identity(DatasetConfig(task="lrlm")).keys()
    assert identity(DatasetConfig(task="lrlm", window_tokens=2048))["window_tokens"] == 2048
    assert not {"qa_protocols", "prompt_tokens", "icl_option_space"} & identity(EvaluateConfig()).keys()
    assert identity(EvaluateConfig(qa_protocols={"mmlu": "mmlu"}))["qa_protocols"] == {"mmlu": "mmlu"}
