"""Checkpoints under faults, and runs that stop and go on."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from llmr_ray.errors import DataError
from llmr_ray.training import checkpoint
from tests.tiny import tiny_bert
from tests.training_setup import groups_table, make_data, make_trainer


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    root = tmp_path_factory.mktemp("training")
    base = tiny_bert(root / "base")
    return base, make_data(root / "data", base, groups_table())


@pytest.fixture(scope="module", params=[False, True], ids=["dropout off", "dropout on"])
def finished(request, setup, tmp_path_factory):
    """An uninterrupted run of 8 steps."""
    root = tmp_path_factory.mktemp("whole")
    trainer = make_trainer(root, *setup, dropout=request.param)
    trainer.run()
    return root, request.param


def weights(root):
    return load_file(checkpoint.newest(root).model / "model.safetensors")


def without_times(root):
    return [{k: v for k, v in step.items() if k != "seconds"} for step in checkpoint.read_steps(root)]


@pytest.mark.parametrize("killed_at", [1, 4, 7])
def test_interrupted_run_ends_with_the_same_weights(setup, finished, tmp_path, killed_at):
    """Prevents a resume that lost the optimiser, the pacing, the plan or the dropout: equal to the last bit."""
    whole, dropout = finished
    trainer = make_trainer(tmp_path, *setup, dropout=dropout)

    def kill(record):
        if record["step"] == killed_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer.run(kill)
    again = make_trainer(tmp_path, *setup, dropout=dropout)
    assert again.step == (killed_at + 1) // 3 * 3 if killed_at < 7 else 8
    again.run()
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(tmp_path)[name]), name
    assert without_times(tmp_path) == without_times(whole)


def test_weights_do_not_depend_on_where_the_data_is_cut(setup, finished, tmp_path):
    """Prevents an order of texts, and so other dropout and rounding, that the shards of the groups decide."""
    whole, dropout = finished
    data = make_data(tmp_path / "data", setup[0], groups_table(), shard_rows=7)
    make_trainer(tmp_path / "run", setup[0], data, dropout=dropout).run()
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(tmp_path / "run")[name]), name
    assert without_times(tmp_path / "run") == without_times(whole)


def test_training_changes_weights_and_leaves_the_pooler_alone(setup, finished):
    """Prevents a run that trains nothing, or one that decays weights no embedding depends on."""
    before, after = load_file(setup[0] / "model.safetensors"), weights(finished[0])
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert [step["step"] for step in checkpoint.read_steps(finished[0])] == list(range(8))


def test_newest_valid_wins_and_spoilt_ones_are_quarantined(finished, tmp_path):
    """Prevents one flipped byte or a half-written folder from ending the run."""
    root = shutil.copytree(finished[0], tmp_path / "copy")
    assert [path.name for path in sorted(root.glob("ckpt-*"))] == ["ckpt-00000006", "ckpt-00000008"]
    with (root / "ckpt-00000008" / "optimizer.safetensors").open("r+b") as handle:
        handle.seek(-3, 2)
        handle.write(b"\x00\xff\x00")
    assert checkpoint.newest(root).step == 6
    assert (root / "quarantine" / "ckpt-00000008").is_dir()


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (lambda folder: (folder / "MANIFEST.json").write_text("{"), "not JSON"),
        (lambda folder: (folder / "state.json").unlink(), "missing"),
        (lambda folder: (folder / "model" / "config.json").write_text("{}"), "changed"),
        (lambda folder: None, None),
    ],
)
def test_faults_are_named(finished, tmp_path, spoil, fault):
    """Prevents a message that does not say which file is bad."""
    folder = shutil.copytree(checkpoint.newest(finished[0]).folder, tmp_path / "copy")
    spoil(folder)
    found = checkpoint.fault_of(folder)
    assert (found is None) if fault is None else fault in found


def test_run_goes_on_from_an_older_checkpoint(setup, finished, tmp_path):
    """Prevents a quarantined checkpoint from leaving steps twice or not at all in the records."""
    root = shutil.copytree(finished[0], tmp_path / "copy")
    (root / "ckpt-00000008" / "model" / "model.safetensors").write_bytes(b"short")
    trainer = make_trainer(root, *setup, dropout=finished[1])
    assert trainer.step == 6
    trainer.run()
    assert without_times(root) == without_times(finished[0])


def test_torn_last_line_is_not_a_step(tmp_path):
    """Prevents a kill in the middle of a write from making the records unreadable."""
    for step in range(3):
        checkpoint.append_step(tmp_path, {"step": step})
    with (tmp_path / checkpoint.STEPS_FILE).open("a") as handle:
        handle.write('{"step": 3, "lo')
    assert [record["step"] for record in checkpoint.read_steps(tmp_path)] == [0, 1, 2]
    checkpoint.keep_steps(tmp_path, 2)
    assert (tmp_path / checkpoint.STEPS_FILE).read_text() == '{"step": 0}\n{"step": 1}\n'


def test_optimizer_state_of_another_model_is_refused(setup, finished, tmp_path):
    """Prevents moments from landing on the wrong parameters."""
    trainer = make_trainer(tmp_path / "new", *setup)
    names = dict(list(trainer.names.items())[1:])
    with pytest.raises(DataError, match="another model"):
        checkpoint.newest(finished[0]).restore_optimizer(trainer.optimizer, names)


def test_divergence_stops_the_run_and_keeps_the_weights(setup, tmp_path):
    """Prevents NaN weights from being saved as a trained model."""
    base, data = setup
    spoilt = shutil.copytree(data, tmp_path / "data")
    for path in spoilt.glob("*/pool.npy"):
        pool = np.load(path)
        pool["reward"] = np.nan
        np.save(path, pool)
    trainer = make_trainer(tmp_path, base, spoilt)
    before = [parameter.detach().clone() for parameter in trainer.names.values()]
    with pytest.raises(DataError, match="diverged"):
        trainer.run()
    assert checkpoint.newest(tmp_path) is None
    trained = trainer.names.values()
    assert all(torch.equal(old, new) for old, new in zip(before, trained, strict=True)) or trainer.step > 0
    assert all(torch.isfinite(parameter).all() for parameter in trained)


@pytest.mark.parametrize("batching", ["homogeneous", "mixed"])
def test_groups_without_any_preference_keep_the_loss_finite(setup, tmp_path, batching):
    """Prevents rewards that are all equal, as those of a sample can be, from making NaN of the weights."""
    base, data = setup
    equal = tmp_path / "equal"
    shutil.copytree(data, equal)
    for path in equal.rglob("pool.npy"):
        pool = np.load(path)
        pool["reward"] = 1.0
        np.save(path, pool)
    trainer = make_trainer(tmp_path, base, equal, batching=batching)
    trainer.run()
    assert all(np.isfinite([step["loss"], step["grad_norm"]]).all() for step in checkpoint.read_steps(tmp_path))
    assert all(torch.isfinite(parameter).all() for parameter in trainer.names.values())


def test_state_is_json_and_tensors_are_safetensors(finished):
    """Prevents pickle from coming back into checkpoints."""
    folder = checkpoint.newest(finished[0]).folder
    suffixes = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert suffixes <= {".json", ".safetensors", ".txt"}
    assert set(json.loads((folder / "state.json").read_text())) == {"step", "self_paced", "seed"}


def test_who_only_looks_gets_the_newest_whole_embedder(tmp_path):
    """Prevents a look at a checkpoint that holds adapters alone."""
    assert checkpoint.last_saved(tmp_path) is None
    (tmp_path / "ckpt-00000004" / "model").mkdir(parents=True)
    (tmp_path / "ckpt-00000008").mkdir()
    assert checkpoint.last_saved(tmp_path) == (4, tmp_path / "ckpt-00000004" / "model")
