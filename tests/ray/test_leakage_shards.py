"""Leakage over several shards: what actors write together, against the copies that were planted."""

import dataclasses
from pathlib import Path

import pytest

from llmr_ray.artifacts import Artifact
from llmr_ray.config import Config, RuntimeConfig
from llmr_ray.evaluation import leakage_stage
from llmr_ray.evaluation.leakage import IN_DOCUMENT, SAME_TEXT, gravest
from llmr_ray.schemas import table_of
from tests.feedback_world import make_artifact

pytestmark = pytest.mark.ray

NUM_TRAINING, SHARD = 60, 16


def test_copies_in_any_shard_are_found_once(
    tmp_path: Path, local_ray: RuntimeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents actors that cut rows otherwise than the driver counts them, so that some are compared by nobody."""
    monkeypatch.setattr(leakage_stage, "SHARD_ROWS", SHARD)
    common = {"task": "qa", "targets": ["x"], "pool": "p"}
    training = [
        f"what is the {number}th word of the book about {number * number} winters" for number in range(NUM_TRAINING)
    ]
    planted = [0, 15, 16, 17, 31, 32, NUM_TRAINING - 1]
    queries = [
        {"query_id": f"train{number}", "dataset": "one", "split": "train", "query": text} | common
        for number, text in enumerate(training)
    ]
    queries += [
        {"query_id": f"test{number}", "dataset": "other", "split": "test", "query": training[number].upper()} | common
        for number in planted
    ]
    texts = ["nothing", f"Somebody asked: {training[31]}? Nobody knew."]
    documents = [
        {"doc_id": f"d{number}", "pool": "p", "position": number, "task": "qa", "text": text}
        for number, text in enumerate(texts)
    ]
    tables = {"queries": table_of("queries", queries), "corpus": table_of("corpus", documents)}
    prepare = make_artifact(tmp_path, "prepare", tables)
    artifact = Artifact(tmp_path, leakage_stage.leakage_spec(prepare))
    artifact.begin()
    config = Config(runtime=dataclasses.replace(local_ray, artifact_root=str(tmp_path), mine_actors=2))
    leakage_stage.run_leakage(config, artifact, prepare)

    manifest = artifact.require()
    rows_in = len(queries) + len(documents)
    assert manifest["num_shards"] == -(-rows_in // SHARD) > 2
    assert (manifest["counts"]["rows_in"], manifest["counts"]["ok"]) == (rows_in, NUM_TRAINING + len(documents))
    found = gravest(artifact.read("leakage").to_pylist())
    assert [(row["query_id"], row["other_id"]) for row in found if row["kind"] == IN_DOCUMENT] == [("test31", "d1")]
    same = [row for row in found if row["kind"] == SAME_TEXT]
    assert [(row["query_id"], row["other_id"]) for row in same] == [
        (f"test{number}", f"train{number}") for number in sorted(planted, key=str)
    ]
