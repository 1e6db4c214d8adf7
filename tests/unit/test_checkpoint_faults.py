"""What storage, kills and requests to stop do to checkpoints: nothing wrong is loaded, nothing is lost unsaid."""

import errno
import json
import os
import random
import shutil
import subprocess

import pytest
import torch
from safetensors.torch import load_file

from llmr_ray import durable
from llmr_ray.errors import DataError, ResourceError
from llmr_ray.training import checkpoint
from tests.tiny import tiny_bert
from tests.training_setup import groups_table, make_data, make_trainer


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    root = tmp_path_factory.mktemp("training")
    base = tiny_bert(root / "base")
    return base, make_data(root / "data", base, groups_table())


@pytest.fixture(scope="module")
def finished(setup, tmp_path_factory):
    """An uninterrupted run of 8 steps; it leaves the checkpoints of steps 6 and 8."""
    root = tmp_path_factory.mktemp("whole")
    make_trainer(root, *setup).run()
    return root


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "copy")


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


# --- told to stop ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("told_at", [0, 3, 7])
def test_told_to_stop_it_saves_the_step_at_hand_and_the_result_stays_the_same(setup, finished, tmp_path, told_at):
    """Prevents a preempted run from losing what it did since the last interval, or from ending with other weights."""
    trainer = make_trainer(tmp_path, *setup)
    trainer.is_stopping = lambda: trainer.step == told_at
    trainer.run()
    assert checkpoint.newest(tmp_path).step == told_at + 1
    again = make_trainer(tmp_path, *setup)
    assert again.step == told_at + 1
    again.run()
    weights = [load_file(checkpoint.newest(root).model / "model.safetensors") for root in (finished, tmp_path)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert len(list(tmp_path.glob("ckpt-*"))) <= checkpoint.KEEP


# --- bytes that changed ----------------------------------------------------------------------------------------------


def test_every_flipped_bit_is_found(copy):
    """Prevents weights, optimizer moments or settings that nobody computed: 100 random flips over all files."""
    rng = random.Random(0)
    folder = copy / "ckpt-00000008"
    assert checkpoint.fault_of(folder) is None
    undetected = []
    for number in range(100):
        path = files(folder)[number % len(files(folder))]
        whole = path.read_bytes()
        bit = rng.randrange(8 * len(whole))
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        if checkpoint.fault_of(folder) is None:
            undetected.append((path.name, bit))
        path.write_bytes(whole)
    assert not undetected
    assert checkpoint.fault_of(folder) is None


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_checkpoint_gives_way_to_the_older_one(copy, share):
    """Prevents one file cut short, wherever it is cut, from being loaded or from ending the run."""
    for path in files(copy / "ckpt-00000008"):
        whole = path.read_bytes()
        path.write_bytes(whole[: int(share * len(whole))])
        assert checkpoint.fault_of(copy / "ckpt-00000008"), path
        if path.name != "model.safetensors":
            path.write_bytes(whole)
    assert checkpoint.newest(copy).step == 6
    assert (copy / "quarantine" / "ckpt-00000008").is_dir()


@pytest.mark.parametrize(
    ("manifest", "fault"),
    [(None, "no MANIFEST"), ("", "not JSON"), ("[]", "not JSON"), ({"lost.safetensors": "00"}, "missing")],
)
def test_a_manifest_that_promises_what_is_not_there_counts_as_none(copy, manifest, fault):
    """Prevents a checkpoint whose last write is missing, or that lacks a file, from being taken for a whole one."""
    path = copy / "ckpt-00000008" / checkpoint.MANIFEST
    whole = json.loads(path.read_text())
    path.unlink()
    if manifest is not None:
        path.write_text(json.dumps(whole | manifest) if isinstance(manifest, dict) else manifest)
    assert fault in checkpoint.fault_of(path.parent)
    assert checkpoint.newest(copy).step == 6


def test_a_disk_that_cannot_read_a_checkpoint_gives_way_to_the_older_one(copy, monkeypatch):
    """Prevents a bad sector in one file from ending a run that has another checkpoint."""
    digest = checkpoint.sha256_file

    def broken(path):
        if path.match("ckpt-00000008/optimizer.safetensors"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return digest(path)

    monkeypatch.setattr(checkpoint, "sha256_file", broken)
    assert "optimizer.safetensors cannot be read" in checkpoint.fault_of(copy / "ckpt-00000008")
    assert checkpoint.newest(copy).step == 6


def test_without_a_valid_checkpoint_training_does_not_silently_begin_anew(setup, finished, copy):
    """Prevents days of training from being thrown away, and overwritten, because a disk had a bad day."""
    (copy / "ckpt-00000008" / "state.json").write_text("{}")
    (copy / "ckpt-00000006" / "optimizer.safetensors").unlink()
    before = files(copy)
    for _ in range(2):
        with pytest.raises(DataError, match="--allow-restart") as refused:
            make_trainer(copy, *setup)
        assert "ckpt-00000008 (the bytes of state.json changed)" in str(refused.value)
        assert "ckpt-00000006 (optimizer.safetensors is missing)" in str(refused.value)
        assert files(copy) == before
    assert checkpoint.newest(copy, allow_restart=True) is None
    assert [path.name for path in sorted((copy / "quarantine").iterdir())] == ["ckpt-00000006", "ckpt-00000008"]
    anew = make_trainer(copy, *setup)
    assert anew.step == 0
    anew.run()
    weights = [load_file(checkpoint.newest(root).model / "model.safetensors") for root in (finished, copy)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


# --- kills and full disks --------------------------------------------------------------------------------------------


def die(*_, **__):
    os._exit(9)


@pytest.mark.parametrize(
    ("module", "name"),
    [(checkpoint, "save_file"), (checkpoint, "sha256_file"), (durable, "flush"), (durable, "commit_rename")],
)
def test_a_kill_while_a_checkpoint_is_written_leaves_no_trace(setup, copy, module, name):
    """Prevents a half-written checkpoint from being used, and such folders from piling up kill by kill."""
    trainer = make_trainer(copy, *setup)
    whole = files(copy)
    trainer.step = 9
    for _ in range(2):
        child = os.fork()
        if not child:
            setattr(module, name, die)
            trainer.save()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert len(list(copy.glob("ckpt-*.tmp-*"))) == 2
    assert checkpoint.newest(copy).step == 8
    assert files(copy) == whole


@pytest.fixture
def small_disk(tmp_path):
    """A disk of one megabyte, room for a few tiny checkpoints."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a small disk")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_said_and_nothing_piles_up(setup, small_disk):
    """Prevents tries that fail from filling the disk further, or from costing the checkpoint that is there."""
    trainer = make_trainer(small_disk, *setup)
    trainer.train_step()
    trainer.save()
    whole = files(small_disk)
    disk, ballast = shutil.disk_usage(small_disk), small_disk / "ballast"
    ballast.write_bytes(b"x" * (disk.free - disk.used // 2))
    before = shutil.disk_usage(small_disk).used
    trainer.train_step()
    for _ in range(3):
        with pytest.raises(ResourceError, match=r"ckpt-00000002 could not be written: No space left"):
            trainer.save()
        assert shutil.disk_usage(small_disk).used == before
    ballast.unlink()
    assert files(small_disk) == whole
    trainer.save()
    assert checkpoint.newest(small_disk).step == 2


@pytest.mark.parametrize("code", [errno.EIO, errno.EROFS, errno.ENOSPC])
def test_a_flush_that_fails_is_no_checkpoint(setup, tmp_path, monkeypatch, code):
    """Prevents a checkpoint that the disk never took from counting as one."""
    trainer = make_trainer(tmp_path / "run", *setup)
    trainer.train_step()

    def fail(_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ResourceError, match=os.strerror(code)):
        trainer.save()
    assert not list((tmp_path / "run").glob("ckpt-*"))
