"""The peers of benchmarks/training.py: sentence-transformers' trainer and FlagEmbedding's."""

import contextlib
import tempfile
from typing import Any

from contender import spent
from training_workloads import MAX_TOKENS, SEED, TEMPERATURE, train_config


def variants_of(peer: str, loss: str, batch_size: int) -> dict[str, dict[str, Any]]:
    """A peer's documented ways to batch that leave the loss as it is, by a short name; none: it has not that loss."""
    if peer == "flag_embedding":
        # Its distillation adds the contrastive loss, which is another one.
        parts = {f"sub-batches of {size}": {"sub_batch_size": size} for size in (4, 16)}
        return {} if loss == "distill" else {"whole batch": {}, **parts}
    if loss == "distill":
        # Each query has its own softmax, so small batches that are accumulated have the same gradient and pad less.
        sizes = [size for size in (batch_size, 8, 4, 2, 1) if size <= batch_size]
        return {f"batch {size} x {batch_size // size}": {"size": size} for size in dict.fromkeys(sizes)}
    cached: dict[str, dict[str, Any]] = {f"cached, {size} texts": {"mini_batch_size": size} for size in (4, 16)}
    cached["cached, 1024 tokens"] = {"mini_batch_num_tokens": 1024}
    return {"columns merged": {}, "columns apart": {"apart": True}, **cached}


def optimizer_of(model: Any, config: Any) -> tuple[Any, Any]:
    """Our optimiser and schedule for a peer's model."""
    import torch

    from llmr_ray.training.schedule import warmup_decay
    from llmr_ray.training.step import make_optimizer

    optimizer = make_optimizer(dict(model.named_parameters()), config)
    schedule = {"warmup_fraction": config.warmup_fraction, "schedule": config.schedule}
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warmup_decay(step, num_steps=config.num_steps, **schedule)
    )
    return optimizer, rate


def clock_of(steps: int) -> Any:
    """A callback with the `cost` of training, from before the first batch is made to the end of the last step."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.block = spent()
            self.cost = self.block.__enter__()

        def on_step_end(self, args: Any, state: Any, *others: Any, **kwargs: Any) -> None:
            if state.global_step == steps:
                self.block.__exit__(None, None, None)

    return Clock()


def arguments_of(config: Any, folder: str) -> dict[str, Any]:
    """What both peers' trainers are told alike: transformers' TrainingArguments."""
    return {
        "output_dir": folder,
        "use_cpu": True,
        "max_steps": config.num_steps,
        "max_grad_norm": config.max_grad_norm,
        "dataloader_pin_memory": False,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def sentence_transformers(job: dict[str, Any]) -> dict[str, Any]:
    """Trains with SentenceTransformerTrainer."""
    import torch
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.base.losses.merged_forward import column_merging_disabled
    from sentence_transformers.base.sampler import DefaultBatchSampler
    from torch.utils.data import SequentialSampler

    variant, steps, batch_size = job["variant"], job["steps"], job["batch_size"]
    config = train_config(batch_size, steps)
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = SentenceTransformer(job["model"], device="cpu", local_files_only=True, config_kwargs=no_dropout)
    model.max_seq_length = MAX_TOKENS
    losses: list[torch.Tensor] = []

    class Recording(SentenceTransformerTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            with column_merging_disabled() if "apart" in variant else contextlib.nullcontext():
                loss: Any = super().compute_loss(*args, **kwargs)
            losses.append(loss.detach().clone())
            return loss

    clock, size = clock_of(steps), variant.get("size", batch_size)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Recording(
            model=model,
            args=SentenceTransformerTrainingArguments(
                per_device_train_batch_size=size,
                gradient_accumulation_steps=batch_size // size,
                batch_sampler=lambda dataset, **kwargs: DefaultBatchSampler(SequentialSampler(dataset), **kwargs),
                **arguments_of(config, folder),
            ),
            train_dataset=Dataset.from_list(columns_of(job)),
            loss=peer_loss(job, model),
            optimizers=optimizer_of(model, config),
        )
        trainer.add_callback(clock)
        trainer.train()
    of_step = torch.stack(losses).view(steps, -1).mean(dim=1)
    return {**clock.cost, "losses": of_step.tolist()}


def peer_loss(job: dict[str, Any], model: Any) -> Any:
    """The peer's loss."""
    from sentence_transformers import util
    from sentence_transformers.sentence_transformer import losses

    if job["loss"] == "distill":
        return losses.DistillKLDivLoss(
            model, similarity_fct=util.pairwise_cos_sim, student_temperature=TEMPERATURE, teacher_temperature=1.0
        )
    cached = {name: value for name, value in job["variant"].items() if name.startswith("mini_batch")}
    if cached:
        return losses.CachedMultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE, **cached)
    return losses.MultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE)


def in_order(job: dict[str, Any]) -> list[dict[str, Any]]:
    """The examples in the order in which our trainer takes them."""
    import numpy as np

    from llmr_ray.training.batches import Plan

    config = train_config(job["batch_size"], job["steps"])
    rows = {"data": np.arange(len(job["examples"]))}
    plan = Plan(rows, repeats={}, batch_size=config.global_batch_size, batching=config.batching, seed=SEED)
    return [job["examples"][row] for step in range(job["steps"]) for row in plan.block(step).rows]


def columns_of(job: dict[str, Any]) -> list[dict[str, Any]]:
    """The examples as sentence-transformers has them."""
    return [
        {"query": example["query"]}
        | {f"document{place}": doc for place, doc in enumerate(example["docs"])}
        | ({"label": example["scores"]} if job["loss"] == "distill" else {})
        for example in in_order(job)
    ]


def flag_embedding(job: dict[str, Any]) -> dict[str, Any]:
    """Trains with FlagEmbedding's model, collator and trainer."""
    from FlagEmbedding.abc.finetune.embedder.AbsDataset import AbsEmbedderCollator
    from FlagEmbedding.finetune.embedder.encoder_only.base.modeling import BiEncoderOnlyEmbedderModel
    from FlagEmbedding.finetune.embedder.encoder_only.base.trainer import EncoderOnlyEmbedderTrainer
    from torch.utils.data import SequentialSampler
    from transformers import AutoModel, AutoTokenizer, TrainingArguments

    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    encoder = AutoModel.from_pretrained(
        job["model"], hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, add_pooling_layer=False
    )
    sub_batch_size = job["variant"].get("sub_batch_size", -1)
    model = BiEncoderOnlyEmbedderModel(
        encoder,
        tokenizer=tokenizer,
        temperature=TEMPERATURE,
        sub_batch_size=sub_batch_size,
        sentence_pooling_method="mean",
        normalize_embeddings=True,
    )
    losses: list[Any] = []

    class Recording(EncoderOnlyEmbedderTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            losses.append(loss.detach().clone())
            return loss

        def _get_train_sampler(self, *args: Any) -> Any:
            return SequentialSampler(self.train_dataset)

    config, clock = train_config(job["batch_size"], job["steps"]), clock_of(job["steps"])
    with tempfile.TemporaryDirectory() as folder:
        trainer = Recording(
            model=model,
            args=TrainingArguments(
                per_device_train_batch_size=job["batch_size"],
                remove_unused_columns=False,
                **arguments_of(config, folder),
            ),
            train_dataset=[(example["query"], example["docs"], None) for example in in_order(job)],
            data_collator=AbsEmbedderCollator(
                tokenizer, query_max_len=MAX_TOKENS, passage_max_len=MAX_TOKENS, sub_batch_size=sub_batch_size
            ),
            processing_class=tokenizer,
            optimizers=optimizer_of(model, config),
        )
        trainer.add_callback(clock)
        trainer.train()
    return {**clock.cost, "losses": [float(loss) for loss in losses]}
