"""The gradient on two workers against that on one: norm and direction, for every loss.

The norm alone does not tell: documents gathered without gradient give nearly the right norm in a wrong direction.
"""

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from llmr_ray.config import LoraConfig
from llmr_ray.errors import ConfigError
from llmr_ray.training import checkpoint, objective, step
from llmr_ray.training.gather import agree, gather_with_gradient, place, total
from tests.tiny import tiny_bert
from tests.training_setup import TASKS, awake, groups_table, make_data, make_trainer

CASES = {task: (task,) for task in TASKS} | {"mixed": tuple(TASKS)}
"""qa: graded strict; icl: graded sorted and contrastive with two positives; tool: contrastive; chat: group KL;
convsearch: KL and full contrastive; lrlm: listwise, pairwise and marginal; mixed: all in one batch."""

MEMORY = ("grad_cache", "checkpointing")

LORA = LoraConfig(rank=4)


def gradient(trainer):
    """The gradient of the first step, all parameters in one vector."""
    trainer.train_step()
    return torch.cat([parameter.grad.flatten() for parameter in trainer.names.values()]).numpy()


def make(root, name, where, **changes):
    batching = "mixed" if name == "mixed" else "homogeneous"
    settings = {"max_grad_norm": 0.0, "batching": batching} | changes
    return make_trainer(where, root / "base", root / "data" / name, **settings)


def gathered_without_gradient(rows):
    """The ablation: what `all_gather` alone does."""
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows.detach().contiguous())
    parts[dist.get_rank()] = rows
    return torch.cat(parts)


def worker(rank, world_size, root):
    """Everything that needs a process group, in one start of it."""
    dist.init_process_group("gloo", init_method=f"file://{root}/group", rank=rank, world_size=world_size)
    train(rank, world_size, root)
    # gloo's threads need the interpreter's lock to drop the tensors of the last exchange; a process group that ends
    # before that holds the lock and waits for them, for good. They get it while this waits for the other rank.
    dist.barrier()
    dist.destroy_process_group()


def train(rank, world_size, root):
    """What the workers do; no trainer, whose DDP holds the process group, outlives it."""
    step.PACK_TOKENS["cpu"] = 40  # several passes a step
    assert place() == (rank, world_size)
    assert agree(rank + 7) == 7
    assert total(torch.tensor([rank + 1.0])).tolist() == [3.0]
    found = {name: gradient(make(root, name, root / "two" / name)) for name in CASES}
    for memory in MEMORY:
        found[memory] = gradient(make(root, "mixed", root / "two" / memory, memory=memory))
    found["lora"] = gradient(awake(make(root, "mixed", root / "two" / "lora", lora=LORA)))
    objective.gather_with_gradient = gathered_without_gradient
    found["ablation"] = gradient(make(root, "qa", root / "two" / "ablation"))
    objective.gather_with_gradient = gather_with_gradient
    make(root, "mixed", root / "two" / "run").run()
    leaving = make(root, "mixed", root / "two" / "elastic", checkpoint_interval=0)
    leaving.is_stopping = lambda: rank == 1 and leaving.step == 2
    leaving.run()
    if rank == 0:
        np.savez(root / "two.npz", **found)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gradient")
    base = tiny_bert(folder / "base")
    for name, tasks in CASES.items():
        make_data(folder / "data" / name, base, groups_table(tasks=tasks))
    mp.spawn(worker, args=(2, folder), nprocs=2)
    return folder


def compare(one, two):
    """Norm ratio and cosine, in double precision."""
    one, two = one.astype(np.float64), two.astype(np.float64)
    lengths = np.linalg.norm(one), np.linalg.norm(two)
    return lengths[1] / lengths[0], one @ two / (lengths[0] * lengths[1])


@pytest.mark.parametrize("name", CASES)
def test_two_workers_have_the_gradient_of_one(root, tmp_path, name):
    """Prevents a factor of W or 1/W, which would make the mix of tasks depend on the number of workers."""
    one = gradient(make(root, name, tmp_path))
    ratio, cosine = compare(one, np.load(root / "two.npz")[name])
    assert ratio == pytest.approx(1, abs=1e-5)
    assert cosine > 1 - 1e-6


@pytest.fixture
def small_passes(monkeypatch):
    """Several passes a step, as a large batch has."""
    monkeypatch.setitem(step.PACK_TOKENS, "cpu", 40)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_gradient_in_small_memory_is_the_plain_one(root, tmp_path, small_passes, name, dropout, memory):
    """A pass that draws other random numbers the second time gets a gradient of something that was never embedded."""
    plain = gradient(make(root, name, tmp_path / "plain", dropout=dropout))
    ratio, cosine = compare(plain, gradient(make(root, name, tmp_path / "small", dropout=dropout, memory=memory)))
    assert ratio == pytest.approx(1, abs=1e-5)
    assert cosine > 1 - 1e-6


@pytest.mark.parametrize("memory", MEMORY)
def test_gradient_in_small_memory_of_two_workers_is_that_of_one(root, tmp_path, small_passes, memory):
    """Workers that exchange gradients before the last pass average some passes twice and others never."""
    ratio, cosine = compare(gradient(make(root, "mixed", tmp_path)), np.load(root / "two.npz")[memory])
    assert ratio == pytest.approx(1, abs=1e-5)
    assert cosine > 1 - 1e-6


def test_gradient_of_adapters_on_two_workers_is_that_of_one(root, tmp_path):
    """Prevents workers whose adapters start differently, or are averaged wrongly among weights that are frozen."""
    ratio, cosine = compare(
        gradient(awake(make(root, "mixed", tmp_path, lora=LORA))), np.load(root / "two.npz")["lora"]
    )
    assert ratio == pytest.approx(1, abs=1e-5)
    assert cosine > 1 - 1e-6


def test_ablation_is_seen_in_the_direction(root, tmp_path):
    """Prevents this file from passing whatever the gather does: without gradient the direction is visibly wrong."""
    ratio, cosine = compare(gradient(make(root, "qa", tmp_path)), np.load(root / "two.npz")["ablation"])
    assert cosine < 0.999
    assert 0.5 < ratio < 2


def test_two_workers_train_like_one(root, tmp_path):
    """Prevents batches, pacing or records that depend on the number of workers, over a whole run."""
    make(root, "mixed", tmp_path).run()
    one, two = checkpoint.read_steps(tmp_path), checkpoint.read_steps(root / "two" / "run")
    assert [step["step"] for step in two] == list(range(8))
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=2e-3)
        assert b["learning_rate"] == pytest.approx(a["learning_rate"], rel=2e-3)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=2e-2)
        assert b["reward_margin"] == pytest.approx(a["reward_margin"])
        assert b["dataset"] == a["dataset"]
        assert b["num_false_negatives"] == a["num_false_negatives"]


def test_another_number_of_workers_goes_on_with_the_same_run(root, tmp_path):
    """Prevents a machine that leaves or joins from changing which batches are seen, or how the tasks are paced.

    One of the two workers alone was told to stop, in the third step: both ended after it, with a checkpoint.
    """
    make(root, "mixed", tmp_path).run()
    folder = root / "two" / "elastic"
    assert [step["step"] for step in checkpoint.read_steps(folder)] == [0, 1, 2]
    alone = make(root, "mixed", folder)
    assert alone.step == 3
    alone.run()
    whole, parts = checkpoint.read_steps(tmp_path), checkpoint.read_steps(folder)
    assert [step["step"] for step in parts] == list(range(8))
    for a, b in zip(whole, parts, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=2e-3)
        assert b["learning_rate"] == pytest.approx(a["learning_rate"], rel=2e-3)


def test_alone_the_gather_is_the_identity():
    """Prevents a copy, and a process group being needed, with one worker."""
    rows = torch.ones(2, 3, requires_grad=True)
    assert gather_with_gradient(rows) is rows
    assert place() == (0, 1)
    assert agree(5) == 5


def test_matryoshka_loss_is_the_mean_over_cut_embeddings(root, tmp_path):
    """Prevents cut embeddings that keep their length, whose cosines would not be cosines."""
    trainer = make(root, "tool", tmp_path, matryoshka_dimensions=[4, 8])
    batch = objective.local_batch(
        trainer.data, trainer.plan.block(0), tasks=TASKS, group_size=4, seed=11, rank=0, world_size=1
    )
    with torch.no_grad():
        whole = trainer.encoder([trainer.data.text(int(number)) for number in batch.texts]).double()
    expected = []
    for size in (16, 4, 8):
        cut = whole[:, :size] / whole[:, :size].norm(dim=1, keepdim=True)
        query, docs = cut[torch.from_numpy(batch.query_B)], cut[torch.from_numpy(batch.doc_BG)]
        expected.append(float(objective.batch_loss(query, docs, batch, tasks=TASKS, temperature=0.1)))
    assert trainer.train_step()["loss"] == pytest.approx(np.mean(expected), rel=1e-4)


def test_matryoshka_sizes_must_be_smaller_than_the_embedding(root, tmp_path):
    with pytest.raises(ConfigError, match="16 dimensions"):
        make(root, "tool", tmp_path, matryoshka_dimensions=[8, 16])
