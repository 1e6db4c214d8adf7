"""The stages group and train.

group: joins candidates, gold documents and rewards into one row per training query, and says of every query left out
why. train: data-parallel training under Ray Train, which replaces workers that die; what they resume from are our own
verified checkpoints, in a folder that all workers reach. A driver or worker that is told to stop leaves a checkpoint.
"""

import json
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.backend import Backend
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.train.v2.api.exceptions import TrainingFailedError

from llmr_ray import cluster, stopping
from llmr_ray.artifacts import SHARD_ROWS, Artifact, ArtifactSpec, Counts, canonical_json
from llmr_ray.assets import Asset
from llmr_ray.config import Config, TaskConfig, identity
from llmr_ray.durable import staged, write_atomic
from llmr_ray.errors import ConfigError, DataError, LlmrError, ResourceError
from llmr_ray.precision import resolve_precision
from llmr_ray.schemas import table_of
from llmr_ray.training import checkpoint
from llmr_ray.training.pools import group_row, join_pools
from llmr_ray.training.progress import train_progress
from llmr_ray.training.trackers import tracked

GROUP_VERSION = 2
TRAIN_VERSION = 3

COLLECTIVE_TIMEOUT_SECONDS = 3600
"""Workers wait this long for each other: rank 0 tokenises the whole training set before the first step."""

STOP_FILE = "stop"
"""In the work folder: how the driver asks the workers to stop."""

STEPS_SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("epoch", pa.int64()),
        ("dataset", pa.string()),
        ("task", pa.string()),
        ("loss", pa.float64()),
        ("learning_rate", pa.float64()),
        ("self_paced_factor", pa.float64()),
        ("grad_norm", pa.float64()),
        ("num_tokens", pa.int64()),
        ("padding_fraction", pa.float64()),
        ("reward_margin", pa.float64()),
        ("num_false_negatives", pa.int64()),
        ("uniformity", pa.float64()),
    ]
)
"""What the artifact keeps of each step: not how long it took, which no rerun could repeat."""


def training_tasks(config: Config) -> dict[str, TaskConfig]:
    """The tasks of the data sets that train.

    Raises:
        ConfigError: a task has no loss, or asks for rewards without feedback that would make them.
    """
    names = sorted({dataset.task for dataset in config.datasets.values() if dataset.num_train})
    for name in names:
        task = config.tasks[name]
        if not task.train.has_loss:
            raise ConfigError(f"task '{name}' has training data but no loss. Set one of its weights in `train`.")
        if task.score.feedback == "none" and task.train.learns_from_rewards:
            raise ConfigError(
                f"task '{name}' trains on rewards (a loss of them, a teacher positive or negatives by reward), but its "
                "score.feedback is none. Set feedback, or train it with contrastive_weight alone."
            )
    return {name: config.tasks[name] for name in names}


# --- group -----------------------------------------------------------------------------------------------------------


def group_spec(config: Config, prepare: Artifact, candidates: Artifact, rewards: Artifact) -> ArtifactSpec:
    """What determines the groups: the inputs, which tasks need rewards or gold documents, and the filters."""
    tasks = {
        name: {"feedback": task.score.feedback, "positive": task.train.positive, "group": identity(task.group)}
        for name, task in training_tasks(config).items()
    }
    return ArtifactSpec(
        stage="group",
        version=GROUP_VERSION,
        config={"tasks": tasks, "shard_rows": SHARD_ROWS},
        inputs={"prepare": prepare.id, "candidates": candidates.id, "rewards": rewards.id},
    )


def run_group(config: Config, artifact: Artifact, prepare: Artifact, candidates: Artifact, rewards: Artifact) -> None:
    """Makes the groups of all training queries.

    A row of the result holds a query's whole pool in the order of the candidates, gold documents that no candidate
    names at its end. Where a task has LLM feedback, documents without a reward are left out (counted in the manifest).
    """
    started = time.monotonic()
    tasks = training_tasks(config)
    queries = prepare.read("queries").select(["query_id", "task", "dataset", "query", "split"])
    queries = queries.filter(pc.equal(queries["split"], "train"))
    corpus = prepare.read("corpus").select(["doc_id", "title", "text"]).combine_chunks()
    pools = join_pools(prepare.read("qrels"), candidates.read("candidates"), rewards.read("rewards"), corpus)
    num_shards = max(1, -(-queries.num_rows // SHARD_ROWS))
    unrewarded = 0
    for shard in range(num_shards):
        part = queries.slice(shard * SHARD_ROWS, SHARD_ROWS)
        rows, skipped = [], Counter[str]()
        for query in part.to_pylist():
            task = tasks.get(query["task"])
            group, without = group_row(query, task, pools.get(query["query_id"]), corpus)
            unrewarded += without
            if isinstance(group, str):
                skipped[group] += 1
            else:
                rows.append(group)
        if shard in artifact.ledger():
            continue
        artifact.write_shard(
            shard,
            {"groups": table_of("groups", rows)},
            Counts(rows_in=part.num_rows, ok=len(rows), skipped=skipped),
        )
    artifact.commit(num_shards, seconds=time.monotonic() - started, extra={"documents_without_reward": unrewarded})


# --- train -----------------------------------------------------------------------------------------------------------


def train_spec(config: Config, groups: Artifact, base: Asset) -> ArtifactSpec:
    """What determines the trained embedder. The number of workers does not: the global batch is fixed."""
    train = identity(config.train)
    del train["checkpoint_interval"]
    return ArtifactSpec(
        stage="train",
        version=TRAIN_VERSION,
        config={
            "seed": config.seed,
            "train": train,
            "pooling": config.embedder.pooling,
            "max_query_tokens": config.embedder.max_query_tokens,
            "max_document_tokens": config.embedder.max_document_tokens,
            "precision": resolve_precision(config.embedder.precision),
            "tasks": {name: identity(task.train) for name, task in training_tasks(config).items()},
            "prompts": saved_prompts(config),
        },
        inputs={"groups": groups.id, "base": base.fingerprint},
    )


def saved_prompts(config: Config) -> dict[str, str]:
    """Prompt names of a saved embedder: ``{task}-query`` and ``{task}-document``; "query" and "document" are qa's."""
    prompts = {}
    for name, task in sorted(config.tasks.items()):
        prompts[f"{name}-query"], prompts[f"{name}-document"] = task.query_instruction, task.document_instruction
    if "qa" in config.tasks:
        prompts["query"], prompts["document"] = prompts["qa-query"], prompts["qa-document"]
    return prompts


def run_train(
    config: Config, artifact: Artifact, groups: Artifact, base: Asset, *, allow_restart: bool = False
) -> None:
    """Trains and commits ``files/embedder`` and the table `steps`.

    Continues from the newest valid checkpoint in the artifact's ``work/`` folder, which must be on storage that all
    workers reach. Deletes that folder once the artifact is committed. On SIGTERM or Ctrl-C the workers end the step at
    hand and write a checkpoint first; when SIGTERM comes to a worker, others then take their place.

    Args:
        config: the run's.
        artifact: to be made.
        groups: the artifact to train on.
        base: the model to start from.
        allow_restart: train anew where there are checkpoints but none is valid.

    Raises:
        DataError: training diverged, there is nothing to train on, or none of the checkpoints is valid.
        ResourceError: the cluster cannot place the workers, or they kept dying.
    """
    started = time.monotonic()
    runtime, work = config.runtime, (artifact.path / "work").resolve()
    work.mkdir(parents=True, exist_ok=True)
    if config.train.num_steps < 1:
        raise ConfigError("train.num_steps is 0: there is nothing to train.")
    if 0 not in artifact.ledger():
        cluster.require(runtime.train_workers, runtime.train_workers if runtime.train_gpus else 0, "train")
        last = checkpoint.newest(work, allow_restart=allow_restart)
        if last is not None:
            print(f"train: goes on from step {last.step}", file=sys.stderr, flush=True)
        checkpoint.keep_steps(work, last.step if last else 0)
        told = tracked(
            runtime.trackers, work, folder=Path(runtime.run_root) / config.name, run=config.name, run_id=artifact.id
        )
        with train_progress(work, config.train.num_steps), told:
            last = _fit_to_end(config, artifact, groups, base, work, last)
        _publish(artifact, work, last, config.train.num_steps, groups.require()["rows"].get("groups", 0))
    steps = artifact.ledger()[0]["rows"]["steps"]
    artifact.commit(1, seconds=time.monotonic() - started, extra={"steps": steps})
    shutil.rmtree(work)


def _fit_to_end(
    config: Config,
    artifact: Artifact,
    groups: Artifact,
    base: Asset,
    work: Path,
    last: checkpoint.Checkpoint | None,
) -> checkpoint.Checkpoint | None:
    """Trains from the checkpoint `last` and returns the one after the last step, unless the driver is told to stop."""
    stop, begun, step = work / STOP_FILE, -1, last.step if last else 0
    stopping.clear(stop)

    def ask() -> None:
        done = checkpoint.last_steps(work, 1)
        if not done or done[0]["step"] < step:
            raise KeyboardInterrupt  # the workers still start: there is nothing to save
        stopping.ask(stop)
        said = "train: told to stop; ends after the step at hand with a checkpoint. Once more ends it at once."
        print(said, file=sys.stderr, flush=True)

    with stopping.asking(ask, config.runtime.stop_seconds) as is_asked:
        # When SIGTERM comes to a worker all end early; others take over, as long as that leads anywhere.
        while begun < step < config.train.num_steps and not is_asked():
            _fit(config, artifact, groups, base, work)
            last = checkpoint.newest(work)
            begun, step = step, last.step if last else 0
            if step < config.train.num_steps and not is_asked():
                said = f"train: a worker was told to stop: training goes on from step {step}"
                print(said, file=sys.stderr, flush=True)
    return last


class _Backend(TorchConfig().backend_cls):  # type: ignore[misc]
    """Torch's, with workers that note SIGTERM. Only a process's main thread can; they train in another one."""

    def on_training_start(self, worker_group: Any, backend_config: Any) -> None:
        super().on_training_start(worker_group, backend_config)
        worker_group.execute(stopping.note_sigterm)


class _TorchConfig(TorchConfig):
    """Torch's, with the backend above."""

    @property
    def backend_cls(self) -> type[Backend]:
        """As in BackendConfig."""
        return _Backend


def _fit(config: Config, artifact: Artifact, groups: Artifact, base: Asset, work: Path) -> None:
    runtime = config.runtime
    (work / "fault.json").unlink(missing_ok=True)
    shutil.rmtree(work / "ray", ignore_errors=True)
    trainer = TorchTrainer(
        _train_worker,
        train_loop_config={
            "settings": config.train,
            "num_threads": runtime.train_threads,
            "grad_cache": runtime.train_grad_cache,
            "checkpointing": runtime.train_checkpointing,
            "spec": artifact.spec.config,
            "tasks": training_tasks(config),
            # Absolute, since a worker need not start in this folder.
            "groups": Artifact(groups.path.resolve().parents[1], groups.spec),
            "base": str(base.path.resolve()),
            "work": str(work),
        },
        torch_config=_TorchConfig(
            backend="nccl" if runtime.train_gpus else "gloo", timeout_s=COLLECTIVE_TIMEOUT_SECONDS
        ),
        scaling_config=ScalingConfig(num_workers=runtime.train_workers, use_gpu=runtime.train_gpus),
        run_config=RunConfig(
            name="fit",
            storage_path=str(work / "ray"),
            failure_config=FailureConfig(max_failures=runtime.train_max_failures),
        ),
    )
    try:
        _apart(trainer.fit)
    except TrainingFailedError as error:
        raise ResourceError(
            f"training failed and {runtime.train_max_failures} restarts did not help: {str(error).splitlines()[0]} "
            "What was trained is kept: run again to continue. runtime.log_workers=true shows the workers' output."
        ) from error
    fault = work / "fault.json"
    if fault.exists():
        record = json.loads(fault.read_text())
        kinds = {kind.__name__: kind for kind in (ConfigError, DataError, ResourceError)}
        raise kinds.get(record["kind"], LlmrError)(record["message"])


def _apart(work: Callable[[], object]) -> None:
    """Does something in a thread of its own: Ray Train takes Ctrl-C away from a main thread that calls it."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True, name="ray-train")
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


def _train_worker(arguments: dict[str, Any]) -> None:
    """What each Ray Train worker runs.

    An error that a restart cannot cure is written down first; restarted workers find it and end, so that the driver
    raises it instead of trying again.
    """
    work = Path(arguments["work"])
    fault = work / "fault.json"
    if fault.exists():
        return
    try:
        _train(arguments, work)
    except LlmrError as error:
        write_atomic(fault, canonical_json({"kind": type(error).__name__, "message": str(error)}).encode())
        raise


def _train(arguments: dict[str, Any], work: Path) -> None:
    import torch

    from llmr_ray.modeling.embedder import Embedder
    from llmr_ray.training.dataset import read_training_data, write_training_data
    from llmr_ray.training.gather import agree
    from llmr_ray.training.step import Trainer

    spec, tasks = arguments["spec"], arguments["tasks"]
    torch.set_num_threads(arguments["num_threads"])
    device = get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)

    def load(folder: Path) -> Embedder:
        return Embedder(
            folder,
            pooling=spec["pooling"],
            max_query_tokens=spec["max_query_tokens"],
            max_document_tokens=spec["max_document_tokens"],
            precision=spec["precision"],
            device=str(device),
        )

    base = Path(arguments["base"])
    if ray.train.get_context().get_world_rank() == 0 and not (work / "data").exists():
        embedder = load(base)
        write_training_data(
            arguments["groups"].read("groups"),
            work / "data",
            tokenize=lambda texts, instruction, limit: embedder.tokenize(
                texts, instruction=instruction, max_tokens=limit
            ),
            instructions={name: (task.query_instruction, task.document_instruction) for name, task in tasks.items()},
            max_query_tokens=spec["max_query_tokens"],
            max_document_tokens=spec["max_document_tokens"],
        )
    agree(0)  # the data is there
    trainer = Trainer(
        base=base,
        load=load,
        data=read_training_data(work / "data"),
        config=arguments["settings"],
        tasks={name: task.train for name, task in tasks.items()},
        seed=spec["seed"],
        prompts=spec["prompts"],
        root=work,
        grad_cache=arguments["grad_cache"],
        checkpointing=arguments["checkpointing"],
        is_stopping=lambda: stopping.sigterm_came() or stopping.is_asked(work / STOP_FILE),
    )

    def on_step(record: dict[str, Any]) -> None:
        # A report makes all workers wait for each other, so only where a checkpoint does so anyway.
        if trainer.has_checkpoint:
            ray.train.report({name: record[name] for name in ("step", "loss", "learning_rate")})

    trainer.run(on_step)


def _publish(
    artifact: Artifact, work: Path, last: checkpoint.Checkpoint | None, num_steps: int, num_groups: int
) -> None:
    """Moves the last checkpoint's embedder into place and writes the shard that names it."""
    steps = checkpoint.read_steps(work)
    if last is None or last.step != num_steps or [record["step"] for record in steps] != list(range(num_steps)):
        raise DataError(
            f"training ended, but {work} holds step {last.step if last else None} of {num_steps} and {len(steps)} step "
            "records. Run again: it continues from the newest valid checkpoint."
        )
    target = artifact.file("embedder")
    with staged(target) as temporary:
        shutil.copytree(last.embedder, temporary)
    files = tuple(str(path.relative_to(artifact.path)) for path in sorted(target.rglob("*")) if path.is_file())
    table = pa.Table.from_pylist(steps, schema=STEPS_SCHEMA)
    artifact.write_shard(0, {"steps": table}, Counts(rows_in=num_groups, ok=num_groups), files=files)
