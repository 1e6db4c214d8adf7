"""Training under Ray Train: starting the workers, replacing those that die or are told to stop, what each of them does.

Ray Train only launches: what workers resume from are our own verified checkpoints, and it takes no part in a step.
"""

import json
import shutil
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray.train
from ray.exceptions import RayActorError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.backend import Backend
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.train.v2.api.exceptions import TrainingFailedError

from llmr_ray import stopping
from llmr_ray.artifacts import canonical_json
from llmr_ray.config import RuntimeConfig
from llmr_ray.durable import write_atomic
from llmr_ray.errors import ConfigError, DataError, LlmrError, ResourceError
from llmr_ray.training import checkpoint
from llmr_ray.training.dataset import read_training_data
from llmr_ray.training.recipe import Recipe
from llmr_ray.training.speed import body_parameters, gemm_flops

COLLECTIVE_TIMEOUT_SECONDS = 1800
"""Workers wait this long for each other: rank 0 alone verifies and writes checkpoints."""

SPEED_FILE = "speed.json"
"""In the work folder: what `speed.summary` needs besides the step records."""

STOP_FILE = "stop"
"""In the work folder: how the driver asks the workers to stop."""


def fit(
    recipe: Recipe,
    runtime: RuntimeConfig,
    *,
    name: str,
    data: Sequence[Path],
    base: Path,
    work: Path,
    last: checkpoint.Checkpoint | None,
) -> checkpoint.Checkpoint | None:
    """Trains under Ray Train; workers that die or are told to stop are replaced, and so is what directs them.

    Args:
        recipe: what is trained, and how.
        runtime: where.
        name: of the stage, for messages.
        data: folders of the tokenised shards.
        base: the model to start from.
        work: holds checkpoints and step records; on storage that all workers reach.
        last: the newest checkpoint there.

    Returns:
        The newest checkpoint in the end: after the last step, unless the driver is told to stop.

    Raises:
        DataError: training diverged.
        ResourceError: the workers, or what directs them, kept dying.
    """
    stop, step, lost = work / STOP_FILE, last.step if last else 0, 0
    stopping.clear(stop)
    arguments = {
        "recipe": recipe,
        "num_threads": runtime.train_threads,
        "grad_cache": runtime.train_grad_cache,
        "checkpointing": runtime.train_checkpointing,
        "data": data,
        # Absolute, since a worker need not start in this folder.
        "base": str(base.resolve()),
        "work": str(work),
    }

    def ask() -> None:
        done = checkpoint.last_steps(work, 1)
        if not done or done[0]["step"] < step:
            raise KeyboardInterrupt  # the workers still start: there is nothing to save
        stopping.ask(stop)
        said = f"{name}: told to stop; ends after the step at hand with a checkpoint. Once more ends it at once."
        print(said, file=sys.stderr, flush=True)

    with stopping.asking(ask, runtime.stop_seconds) as is_asked:
        while step < recipe.train.num_steps and not is_asked():
            begun: int | None = step
            why = "a worker was told to stop"
            try:
                _fit(runtime, arguments, work)
            except RayActorError as error:
                lost, begun, why = lost + 1, None, "the process that directs it (Ray Train's controller) was lost"
                if lost > runtime.train_max_failures:
                    raise ResourceError(
                        f"training lost the process that directs it (Ray Train's controller) {lost} times, by kills or "
                        "for want of memory. What was trained is kept: run again to continue."
                    ) from error
            last = checkpoint.newest(work)
            step = last.step if last else 0
            if step == begun:
                break  # told to stop before anything could be saved: starting again would lead nowhere
            if step < recipe.train.num_steps and not is_asked():
                print(f"{name}: {why}: training goes on from step {step}", file=sys.stderr, flush=True)
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


def _fit(runtime: RuntimeConfig, arguments: Mapping[str, Any], work: Path) -> None:
    """Trains once; RayActorError when Ray Train's controller is lost, which takes the workers with it."""
    (work / "fault.json").unlink(missing_ok=True)
    shutil.rmtree(work / "ray", ignore_errors=True)
    trainer = TorchTrainer(
        _train_worker,
        train_loop_config=dict(arguments),
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

    from llmr_ray.training.gather import total
    from llmr_ray.training.step import Trainer

    recipe: Recipe = arguments["recipe"]
    torch.set_num_threads(arguments["num_threads"])
    device = get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)

    trainer = Trainer(
        base=Path(arguments["base"]),
        recipe=recipe,
        data=read_training_data(arguments["data"]),
        root=work,
        device=str(device),
        grad_cache=arguments["grad_cache"],
        checkpointing=arguments["checkpointing"],
        is_stopping=lambda: stopping.sigterm_came() or stopping.is_asked(work / STOP_FILE),
    )

    peak = float(total(torch.tensor([gemm_flops(device, getattr(torch, trainer.model.precision))], device=device)))
    if trainer.rank == 0:
        speed = {"num_parameters": body_parameters(trainer.model.module), "peak_flops": peak}
        write_atomic(work / SPEED_FILE, canonical_json(speed).encode())

    def on_step(record: dict[str, Any]) -> None:
        # A report makes all workers wait for each other, so only where a checkpoint does so anyway.
        if trainer.has_checkpoint:
            ray.train.report({name: record[name] for name in ("step", "loss", "learning_rate")})

    trainer.run(on_step)
