"""Trackers are told of every step once, and never cost a run anything."""

import json
import struct
import sys
import time
from types import SimpleNamespace

import pytest
from tensorboardX.proto.event_pb2 import Event

from llmr_ray.errors import ConfigError
from llmr_ray.training import trackers
from llmr_ray.training.checkpoint import append_step
from llmr_ray.training.trackers import tracked, values_of


def record(step, **changes):
    return {
        "step": step,
        "epoch": 0,
        "dataset": "a-set",
        "task": "qa" if step % 2 else "chat",
        "loss": 1.0 / (step + 1),
        "learning_rate": 0.1,
        "self_paced_factor": 1.0,
        "grad_norm": 2.0,
        "num_tokens": 300,
        "padding_fraction": 0.0,
        "reward_margin": None if step % 2 else 0.5,
        "num_false_negatives": 3,
        "uniformity": -1.5,
        "seconds": 0.5,
    } | changes


def scalars(folder):
    """What a TensorBoard would show: {name: {step: value}}, read from the event files record by record."""
    found = {}
    for path in folder.glob("events.out.tfevents.*"):
        data, place = path.read_bytes(), 0
        while place < len(data):
            (length,) = struct.unpack_from("<Q", data, place)
            event = Event.FromString(data[place + 12 : place + 12 + length])
            place += 12 + length + 4
            for value in event.summary.value:
                found.setdefault(value.tag, {})[event.step] = value.simple_value
    return found


def test_tensorboard_holds_every_step_with_losses_by_task(tmp_path):
    append_step(tmp_path, record(0))
    with tracked(["tensorboard"], tmp_path, folder=tmp_path / "run", run="r", run_id="train/1"):
        for step in (1, 2, 3):
            append_step(tmp_path, record(step))
    found = scalars(tmp_path / "run" / "tensorboard")
    assert found["loss/chat"] == pytest.approx({0: 1.0, 2: 1 / 3})
    assert found["loss/qa"] == pytest.approx({1: 0.5, 3: 0.25})
    assert set(found["reward_margin"]) == {0, 2}
    assert set(found["uniformity"]) == {0, 1, 2, 3}
    assert found["tokens_per_second"][1] == pytest.approx(600)


def test_what_early_looks_find_stands_at_its_step(tmp_path):
    """Prevents a look from being missed that ends with the training, and from standing at the step it came in."""
    found_looks = []
    with tracked(
        ["tensorboard"], tmp_path, folder=tmp_path / "run", run="r", run_id="train/1", looks=lambda: found_looks
    ):
        for step in range(3):
            append_step(tmp_path, record(step))
        found_looks += [{"step": 0, "values": {"a-set": 0.25}}, {"step": 2, "values": {"a-set": 0.5, "b-set": 0.75}}]
    found = scalars(tmp_path / "run" / "tensorboard")
    assert found["early_look/a-set"] == {0: 0.25, 2: 0.5}
    assert found["early_look/b-set"] == {2: 0.75}


def test_a_resumed_training_shows_each_step_once(tmp_path):
    """Prevents curves that go back on themselves: the second run's files replace the first's."""
    for steps in ((0, 1, 2), (3,)):
        with tracked(["tensorboard"], tmp_path, folder=tmp_path / "run", run="r", run_id="train/1"):
            for step in steps:
                append_step(tmp_path, record(step))
    assert len([*(tmp_path / "run" / "tensorboard").iterdir()]) == 1
    assert set(scalars(tmp_path / "run" / "tensorboard")["grad_norm"]) == {0, 1, 2, 3}


def test_steps_are_sent_while_training_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "POLL_SECONDS", 0.01)
    heard = []
    monkeypatch.setitem(
        trackers.OPENERS, "wandb", lambda *_: SimpleNamespace(log=lambda *sent: heard.append(sent), close=lambda: None)
    )
    with tracked(["wandb"], tmp_path, folder=tmp_path, run="r", run_id="train/1"):
        append_step(tmp_path, record(0))
        for _ in range(500):
            if heard:
                break
            time.sleep(0.01)
        assert heard == [(0, values_of(record(0)))]


def test_a_tracker_that_fails_is_left_out_and_the_run_goes_on(tmp_path, monkeypatch, caplog):
    """Prevents a server that is down from costing a training of days."""
    heard = []

    def fail(*_):
        raise ConnectionError("server is gone")

    monkeypatch.setitem(trackers.OPENERS, "mlflow", lambda *_: SimpleNamespace(log=fail, close=lambda: None))
    monkeypatch.setitem(
        trackers.OPENERS, "wandb", lambda *_: SimpleNamespace(log=lambda *sent: heard.append(sent), close=lambda: None)
    )
    with tracked(["mlflow", "wandb"], tmp_path, folder=tmp_path, run="r", run_id="train/1"):
        for step in range(3):
            append_step(tmp_path, record(step))
    assert [step for step, _ in heard] == [0, 1, 2]
    assert len([line for line in caplog.messages if "mlflow could not be told further" in line]) == 1


def test_a_tracker_that_cannot_be_reached_costs_a_warning(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise ConnectionError("no server")

    monkeypatch.setitem(trackers.OPENERS, "mlflow", refuse)
    with tracked(["mlflow"], tmp_path, folder=tmp_path, run="r", run_id="train/1"):
        append_step(tmp_path, record(0))
    assert "mlflow could not be opened" in caplog.text


def test_a_tracker_that_is_not_installed_is_said_before_training(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with (
        pytest.raises(ConfigError, match="wandb is not installed"),
        tracked(["wandb"], tmp_path, folder=tmp_path, run="r", run_id="train/1"),
    ):
        pass


def test_values_are_plain_numbers():
    json.dumps(values_of(record(1)), allow_nan=False)
