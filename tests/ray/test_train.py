"""Training under Ray Train with real worker processes: it learns, survives a kill, and says why it cannot go on."""

import dataclasses
import re
import shutil
import signal
import threading
import time

import psutil
import pytest
import torch
from safetensors.torch import load_file

from llmr_ray.artifacts import Artifact, ArtifactSpec, Counts
from llmr_ray.assets import Asset
from llmr_ray.config import (
    Config,
    DatasetConfig,
    EmbedderConfig,
    LoraConfig,
    RuntimeConfig,
    TaskConfig,
    TaskScore,
    TrainConfig,
)
from llmr_ray.errors import DataError
from llmr_ray.modeling.embedder import Embedder, fingerprint_of
from llmr_ray.training.checkpoint import read_steps
from llmr_ray.training.dataset import read_training_data
from llmr_ray.training.running import data_folders, tokenize
from llmr_ray.training.stage import embedder_recipe, run_train, train_spec
from tests.tiny import tiny_bert
from tests.training_setup import TASKS, groups_table, load

pytestmark = pytest.mark.ray

NUM_STEPS = 120


@pytest.fixture
def problem(tmp_path):
    """A configuration with two workers, a groups artifact of three shards and a base model."""
    config = Config(
        name="test",
        seed=11,
        datasets={f"{task}-set": DatasetConfig(task=task, num_train=24) for task in TASKS},
        tasks={
            task: TaskConfig(
                query_instruction="query: ",
                document_instruction="document: ",
                score=TaskScore(feedback="none" if task == "tool" else "likelihood"),
                train=train,
            )
            for task, train in TASKS.items()
        },
        embedder=EmbedderConfig(max_query_tokens=12, max_document_tokens=16, precision="float32"),
        train=TrainConfig(
            num_steps=NUM_STEPS,
            global_batch_size=8,
            learning_rate=2e-3,
            temperature=0.1,
            checkpoint_interval=5,
            self_paced_interval=10,
            dropout=False,
        ),
        runtime=RuntimeConfig(train_workers=2),
    )
    spec = ArtifactSpec(stage="group", version=1, config={}, inputs={})
    groups = Artifact(tmp_path, spec)
    table = groups_table()
    groups.begin()
    for shard in range(3):
        part = table.slice(50 * shard, 50)
        groups.write_shard(shard, {"groups": part}, Counts(rows_in=part.num_rows, ok=part.num_rows))
    groups.commit(3, seconds=0)
    folder = tiny_bert(tmp_path / "base")
    base = Asset("tiny", "local", folder, fingerprint_of(folder))
    return config, groups, base, tmp_path


def disturb(work, sent):
    """Tells a training worker to stop, as a platform does, then ends processes of training as the kernel would."""
    for number, kind in (
        (signal.SIGTERM, "RayTrainWorker"),
        (signal.SIGKILL, "RayTrainWorker"),
        (signal.SIGKILL, "TrainController"),
    ):
        begun = len(read_steps(work))
        while len(read_steps(work)) < begun + 12:
            time.sleep(0.02)
        found = [
            process
            for process in psutil.Process().children(recursive=True)
            if any(kind in part for part in process.cmdline())
        ]
        found[-1].send_signal(number)
        sent.append(kind)
        found[-1].wait()


def test_shards_are_tokenised_once_whatever_the_number_of_actors(local_ray, problem):
    """Prevents hours of tokenising from being lost to a kill, and data that depends on who made it."""
    config, groups, base, root = problem
    artifact = Artifact(root, train_spec(config, groups, base))
    folders = data_folders(artifact, 3)

    def contents():
        return [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders]

    tokenize(groups, folders, embedder_recipe(config), base, config.runtime, "train")
    before, made = contents(), [folder.stat().st_ino for folder in folders]
    assert len(folders) == 3
    shutil.rmtree(folders[1])
    alone = dataclasses.replace(config, runtime=dataclasses.replace(config.runtime, encode_actors=1))
    tokenize(groups, folders, embedder_recipe(alone), base, alone.runtime, "train")
    assert contents() == before
    assert [folder.stat().st_ino for folder in folders][::2] == made[::2]
    data, whole = read_training_data(folders), groups.read("groups").to_pylist()
    assert [data.query_id(row) for row in range(len(whole))] == [row["query_id"] for row in whole]
    embedder = load(base.path)
    for row in (0, 49, 50, 143):
        texts = embedder.tokenize(whole[row]["docs"], instruction="document: ", max_tokens=16)
        assert [data.text(number).tolist() for number in data.pool_texts(row)] == texts


@pytest.mark.slow
def test_what_is_told_to_stop_or_killed_is_replaced_and_each_step_stands_once(local_ray, problem, capsys):
    """Prevents a worker or controller that dies from ending the run, hanging it, or leaving steps twice or undone."""
    config, groups, base, root = problem
    artifact = Artifact(root, train_spec(config, groups, base))
    artifact.begin()
    sent = []
    threading.Thread(target=disturb, args=((artifact.path / "work").resolve(), sent), daemon=True).start()
    started = time.monotonic()
    run_train(config, artifact, groups, base)
    assert time.monotonic() - started < 500
    assert sent == ["RayTrainWorker", "RayTrainWorker", "TrainController"]
    went_on = re.findall(r"(told to stop|was lost): training goes on from step (\d+)", capsys.readouterr().err)
    assert [why for why, _ in went_on] == ["told to stop", "was lost"]
    assert 12 <= int(went_on[0][1]) < int(went_on[1][1]) < NUM_STEPS
    artifact.verify()
    steps = artifact.read("steps").to_pylist()
    assert [step["step"] for step in steps] == list(range(NUM_STEPS))
    for task in TASKS:
        losses = [step["loss"] for step in steps if step["task"] == task]
        assert sum(losses[-4:]) < 0.9 * sum(losses[:4]), (task, losses)
    assert not (artifact.path / "work").exists()
    embedder = Embedder(artifact.file("embedder"), pooling="auto", max_query_tokens=12, max_document_tokens=16)
    assert embedder.module.prompts["tool-document"] == "document: "
    assert embedder.fingerprint != base.fingerprint


@pytest.mark.slow
def test_divergence_is_said_and_not_tried_again(local_ray, problem):
    """Prevents restarts that repeat what no restart can cure, and a message that stays in a worker's log."""
    config, groups, base, root = problem
    wild = dataclasses.replace(config, train=dataclasses.replace(config.train, learning_rate=1e30))
    artifact = Artifact(root, train_spec(wild, groups, base))
    artifact.begin()
    with pytest.raises(DataError, match="diverged"):
        run_train(wild, artifact, groups, base)
    assert not artifact.is_done


def test_a_finished_shard_is_not_trained_again(local_ray, problem):
    """Prevents hours of training from being repeated when only the commit was lost. One worker, adapters alone."""
    config, groups, base, root = problem
    short = dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, num_steps=2, lora=LoraConfig(rank=2)),
        runtime=dataclasses.replace(config.runtime, train_workers=1),
    )
    artifact = Artifact(root, train_spec(short, groups, base))
    artifact.begin()
    run_train(short, artifact, groups, base)
    before = artifact.read("steps")
    saved, old = (load_file(folder / "model.safetensors") for folder in (artifact.file("embedder"), base.path))
    assert saved.keys() == old.keys()
    assert not all(torch.equal(saved[name], old[name]) for name in old)
    (artifact.path / "manifest.json").unlink()
    started = time.monotonic()
    run_train(short, artifact, groups, base)
    assert time.monotonic() - started < 5
    assert artifact.read("steps").equals(before)
