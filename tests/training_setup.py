"""A small training problem: queries whose documents share their words, with gold documents and rewards."""

import string
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from llmr_ray.config import TaskTrain, TrainConfig
from llmr_ray.modeling.embedder import Embedder
from llmr_ray.schemas import table_of
from llmr_ray.training.bi_encoder import EmbedderRecipe
from llmr_ray.training.cross_encoder import CrossEncoderRecipe
from llmr_ray.training.dataset import read_training_data, write_shard
from llmr_ray.training.step import Trainer

LETTERS = string.ascii_lowercase

TASKS = {
    "qa": TaskTrain(positive="first", graded_weight=1.0, tie_policy="strict"),
    "icl": TaskTrain(
        positive="teacher", num_positives=2, graded_weight=0.5, contrastive_weight=0.2, tie_policy="sorted"
    ),
    "tool": TaskTrain(positive="random", contrastive_weight=1.0),
    "chat": TaskTrain(positive="teacher", kl_weight=1.0, reward_temperature=0.1),
    "convsearch": TaskTrain(positive="first", kl_weight=1.0, full_contrastive_weight=0.2, reward_form="zscore"),
    "lrlm": TaskTrain(
        positive="teacher", listwise_weight=1.0, pairwise_weight=0.5, marginal_weight=0.3, reward_temperature=0.2
    ),
}


def groups_table(num_queries: int = 24, pool_size: int = 6, tasks: tuple[str, ...] = tuple(TASKS)) -> pa.Table:
    """Query n of each task is two words; a document is the more worth, the more of them it repeats."""
    rows = []
    for task in tasks:
        rng = np.random.default_rng(len(task))
        for number in range(num_queries):
            query = rng.choice(list(LETTERS), 2, replace=False)
            docs, rewards = [], []
            for place in range(pool_size):
                copied = 2 if place == 0 else int(rng.integers(0, 2))
                words = [*query[:copied], *rng.choice(list(LETTERS), int(rng.integers(3, 12)))]
                docs.append(" ".join(words))
                rewards.append(float(copied) + float(rng.normal(0, 0.1)))
            rows.append(
                {
                    "query_id": f"{task}-{number}",
                    "task": task,
                    "dataset": f"{task}-set",
                    "query": " ".join(query),
                    "doc_ids": [f"{task}-{number}-{place}" for place in range(pool_size)],
                    "docs": docs,
                    "roles": ["gold" if place == 0 else "candidate" for place in range(pool_size)],
                    "rewards": None if task == "tool" else rewards,
                    "weights": None,
                }
            )
    return table_of("groups", rows)


def load(folder: Path) -> Embedder:
    """The tiny embedder in float32 on the CPU."""
    return Embedder(
        folder, pooling="auto", max_query_tokens=12, max_document_tokens=16, precision="float32", device="cpu"
    )


def make_data(folder: Path, base: Path, groups: pa.Table, shard_rows: int = 60) -> Path:
    """Writes the training data of `groups`, cut into shards."""
    embedder = load(base)
    for shard, first in enumerate(range(0, groups.num_rows, shard_rows)):
        write_shard(
            groups.slice(first, shard_rows),
            folder / f"{shard:05d}",
            tokenize=lambda texts, instruction, limit: embedder.tokenize(
                texts, instruction=instruction, max_tokens=limit
            ),
            instructions={task: ("query: ", "document: ") for task in TASKS},
            max_query_tokens=12,
            max_document_tokens=16,
        )
    return folder


def make_trainer(root: Path, base: Path, data: Path, *, memory: str = "", **changes: object) -> Trainer:
    """A trainer in `root`, which may save memory by grad_cache or checkpointing; `changes` go to TrainConfig."""
    settings: dict[str, object] = {
        "num_steps": 8,
        "global_batch_size": 8,
        "group_size": 4,
        "learning_rate": 1e-3,
        "temperature": 0.1,
        "checkpoint_interval": 3,
        "self_paced_interval": 3,
        "dropout": False,
    }
    torch.set_num_threads(1)
    root.mkdir(parents=True, exist_ok=True)
    return Trainer(
        base=base,
        recipe=EmbedderRecipe(
            train=TrainConfig(**(settings | changes)),  # type: ignore[arg-type]
            seed=11,
            tasks=TASKS,
            max_query_tokens=12,
            max_document_tokens=16,
            precision="float32",
            prompts={"query": "query: "},
        ),
        data=read_training_data(sorted(data.iterdir())),
        root=root,
        device="cpu",
        grad_cache=memory == "grad_cache",
        checkpointing=memory == "checkpointing",
    )


def awake(trainer: Trainer) -> Trainer:
    """Gives adapters values as training would: while their second matrix is zero, the first one has no gradient."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in trainer.names.items():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return trainer


PAIR_TASKS = tuple(task for task in TASKS if task != "tool")
"""Tasks with rewards."""


def make_pair_data(folder: Path, base: Path, groups: pa.Table, shard_rows: int = 60) -> Path:
    """Writes the training data of a cross-encoder."""
    write = pair_recipe().writer(base)
    for shard, first in enumerate(range(0, groups.num_rows, shard_rows)):
        write(groups.slice(first, shard_rows), folder / f"{shard:05d}")
    return folder


def pair_recipe(**changes: object) -> CrossEncoderRecipe:
    """How the tiny cross-encoder is trained; `changes` go to TrainConfig."""
    settings: dict[str, object] = {
        "num_steps": 8,
        "global_batch_size": 8,
        "group_size": 4,
        "learning_rate": 1e-3,
        "temperature": 1.0,
        "batching": "mixed",
        "self_paced": False,
        "checkpoint_interval": 3,
        "dropout": False,
    }
    return CrossEncoderRecipe(
        train=TrainConfig(**(settings | changes)),  # type: ignore[arg-type]
        seed=11,
        max_tokens=15,
        precision="float32",
        top_positives=2,
        bottom_negatives=4,
    )


def make_pair_trainer(root: Path, base: Path, data: Path, *, memory: str = "", **changes: object) -> Trainer:
    """A trainer of the tiny cross-encoder; see `make_trainer`."""
    torch.set_num_threads(1)
    root.mkdir(parents=True, exist_ok=True)
    return Trainer(
        base=base,
        recipe=pair_recipe(**changes),
        data=read_training_data(sorted(data.iterdir())),
        root=root,
        device="cpu",
        grad_cache=memory == "grad_cache",
        checkpointing=memory == "checkpointing",
    )
