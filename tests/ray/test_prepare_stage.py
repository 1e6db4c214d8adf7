"""The stage prepare through Ray: whatever order shards finish in, the same bytes, and bad data stops it by name."""

import json
from pathlib import Path

import pytest

from llmr_ray.artifacts import Artifact
from llmr_ray.assets import Asset, resolve
from llmr_ray.config import Config, DatasetConfig, PrepareConfig, RuntimeConfig
from llmr_ray.data.scope import scopes
from llmr_ray.data.stage import PrepareWorker, prepare_spec, run_prepare
from llmr_ray.errors import DataError

pytestmark = pytest.mark.ray


def make_data(folder: Path) -> tuple[Config, dict[str, Asset]]:
    """Two tasks with data sets of their own format, and the LLM's place."""
    folder.mkdir()
    corpus = [{"doc_id": n, "title": f"T{n}", "text": f"passage {n}"} for n in range(30)]
    queries = [{"query_id": n, "query": f"question {n}?", "answers": [str(n)], "positives": [n]} for n in range(30)]
    (folder / "corpus.jsonl").write_text("\n".join(map(json.dumps, corpus)))
    (folder / "queries.jsonl").write_text("\n".join(map(json.dumps, queries)))
    sizes = {"num_train": 8, "num_dev": 2, "num_test": 8}
    datasets = {
        "facts": DatasetConfig(task="qa", source="jsonl", path=str(folder), num_documents=20, **sizes),
        "sums": DatasetConfig(task="icl", source="jsonl", path=str(folder / "queries.jsonl"), **sizes),
    }
    config = Config(name="t", datasets=datasets, prepare=PrepareConfig(test_fraction=0.4))
    assets = {dataset.path: resolve(dataset.path) for dataset in datasets.values()}
    assets[config.llm.model] = Asset("llm", "model", folder, "x")
    return config, assets


def test_two_tasks_end_to_end(local_ray: RuntimeConfig, tmp_path: Path) -> None:
    """Tables conform, pools are ranges of the whole corpus, counts balance, and a resumed run gives the same bytes."""
    config, assets = make_data(tmp_path / "data")
    whole = Artifact(tmp_path / "a", prepare_spec(config, assets))
    whole.begin()
    run_prepare(config, whole, assets)
    queries, corpus = whole.read("queries"), whole.read("corpus")
    assert whole.manifest is not None
    assert whole.manifest["counts"]["ok"] == queries.num_rows + corpus.num_rows
    assert set(queries["task"].to_pylist()) == {"qa", "icl"}
    ranges = scopes(queries, corpus)
    assert (ranges[:, 1] > ranges[:, 0]).all()
    assert set(whole.read("qrels")["doc_id"].to_pylist()) <= set(corpus["doc_id"].to_pylist())
    whole.verify()

    resumed = Artifact(tmp_path / "b", prepare_spec(config, assets))
    resumed.begin()
    paths = {name: assets[dataset.path].path for name, dataset in config.datasets.items()}
    PrepareWorker(resumed, ["icl", "qa"], config.datasets, config.prepare, paths, tmp_path).run(1)
    assert resumed.pending(2) == [0]
    run_prepare(config, resumed, assets)
    assert resumed.manifest is not None
    assert resumed.manifest["files"] == whole.manifest["files"]


def test_rotten_data_set_stops_the_stage(local_ray: RuntimeConfig, tmp_path: Path) -> None:
    """The message of a worker's DataError must arrive with the data set, the reasons and the counts."""
    config, assets = make_data(tmp_path / "data")
    path = tmp_path / "data" / "queries.jsonl"
    path.write_text(path.read_text() + "\n" + "\n".join(['{"query": "no answer"}'] * 10))
    artifact = Artifact(tmp_path / "a", prepare_spec(config, assets))
    artifact.begin()
    with pytest.raises(DataError, match=r"10 of \d+ rows are bad.*'missing_field': 10"):
        run_prepare(config, artifact, assets)
    assert not artifact.is_done
