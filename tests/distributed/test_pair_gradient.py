"""The reward model on two workers against one: the gradient, and a whole run."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from llmr_ray.config import LoraConfig
from llmr_ray.training import checkpoint, step
from tests.tiny import tiny_bert
from tests.training_setup import PAIR_TASKS, awake, groups_table, make_pair_data, make_pair_trainer

CASES = {"plain": {}, "grad_cache": {"memory": "grad_cache"}, "lora": {"lora": LoraConfig(rank=4)}}


def gradient(root, where, case):
    """The gradient of the first step, all parameters in one vector."""
    trainer = awake(make_pair_trainer(where, root / "base", root / "data", max_grad_norm=0.0, **CASES[case]))
    trainer.train_step()
    return torch.cat([parameter.grad.flatten() for parameter in trainer.names.values()]).double().numpy()


def worker(rank, world_size, root):
    """Everything that needs a process group, in one start of it."""
    dist.init_process_group("gloo", init_method=f"file://{root}/group", rank=rank, world_size=world_size)
    train(rank, root)
    # As in test_gradient.py: gloo's threads need time to drop their tensors.
    dist.barrier()
    dist.destroy_process_group()


def train(rank, root):
    """What the workers do; no trainer, whose DDP holds the process group, outlives it."""
    step.PACK_TOKENS["cpu"] = 60  # several passes a step
    found = {case: gradient(root, root / "two" / case, case) for case in CASES}
    make_pair_trainer(root / "two" / "run", root / "base", root / "data").run()
    if rank == 0:
        np.savez(root / "two.npz", **found)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    make_pair_data(folder / "data", tiny_bert(folder / "base"), groups_table(tasks=PAIR_TASKS, num_queries=8))
    mp.spawn(worker, args=(2, folder), nprocs=2)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_two_workers_have_the_gradient_of_one(root, tmp_path, case):
    """Prevents a factor of W or 1/W, and groups that depend on the number of workers."""
    one, two = gradient(root, tmp_path, case), np.load(root / "two.npz")[case]
    lengths = np.linalg.norm(one), np.linalg.norm(two)
    assert lengths[1] / lengths[0] == pytest.approx(1, abs=1e-5)
    assert one @ two / (lengths[0] * lengths[1]) > 1 - 1e-6


def test_two_workers_train_like_one(root, tmp_path):
    """Prevents records that depend on the number of workers, over a whole run."""
    make_pair_trainer(tmp_path, root / "base", root / "data").run()
    one, two = checkpoint.read_steps(tmp_path), checkpoint.read_steps(root / "two" / "run")
    assert [record["step"] for record in two] == list(range(8))
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=2e-3)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=2e-2)
        assert b["accuracy"] == pytest.approx(a["accuracy"], abs=0.01)
        assert b["reward_margin"] == pytest.approx(a["reward_margin"])
