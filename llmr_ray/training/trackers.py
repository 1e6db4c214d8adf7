"""Experiment trackers: TensorBoard, MLflow and Weights & Biases, fed by the driver from the step records.

The records are the truth, whatever a tracker does: they are on disk before it hears of them, a step that is done again
after a failure has the same values, and a tracker that cannot be reached costs a warning and not the run.
"""

import importlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from llmr_ray.errors import ConfigError
from llmr_ray.ticking import ticking
from llmr_ray.training.checkpoint import read_steps

log = logging.getLogger(__name__)

POLL_SECONDS = 10.0

_WHOLE = (
    "learning_rate",
    "grad_norm",
    "padding_fraction",
    "reward_margin",
    "num_false_negatives",
    "uniformity",
    "accuracy",
)
_BY_TASK = ("loss", "self_paced_factor")


class Tracker(Protocol):
    """Takes the values of a step by name."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Records the values of a step."""
        ...

    def look(self, step: int, values: Mapping[str, float]) -> None:
        """Records what an early look found; it comes when later steps are recorded already."""
        ...

    def close(self) -> None:
        """Sends what is left."""
        ...


def values_of(record: Mapping[str, Any]) -> dict[str, float]:
    """A step record as a tracker shows it: losses by task, and what there is of the rest."""
    values = {f"{name}/{record['task']}": record[name] for name in _BY_TASK}
    values |= {name: record[name] for name in _WHOLE if record.get(name) is not None}
    values["tokens_per_second"] = record["num_tokens"] / max(1e-9, record["seconds"])
    return {name: float(value) for name, value in values.items()}


@contextmanager
def tracked(
    names: Sequence[str],
    root: Path,
    *,
    folder: Path,
    run: str,
    run_id: str,
    looks: Callable[[], Sequence[Mapping[str, Any]]] = tuple,
) -> Iterator[None]:
    """Feeds trackers with the steps and early looks of the time the block runs, and with those of before.

    Args:
        names: tensorboard, mlflow or wandb.
        root: where the step records are.
        folder: where trackers that write files put them.
        run: the run's name.
        run_id: names the training for trackers that continue one.
        looks: what early looks have found so far: `step` and `values` by name.

    Raises:
        ConfigError: a tracker is not installed.
    """
    if not names:
        yield
        return
    with ExitStack() as stack:
        trackers: dict[str, Tracker] = {}
        for name in names:
            with _or_warn(name, "opened"):
                trackers[name] = OPENERS[name](folder, run, run_id)
                stack.callback(_close, name, trackers[name])
        failed: set[str] = set()
        sent, shown = -1, set[int]()

        def each(tell: Callable[[Tracker], None]) -> None:
            for name in trackers.keys() - failed:
                with _or_warn(name, "told further", failed):
                    tell(trackers[name])

        def feed() -> None:
            nonlocal sent
            for record in read_steps(root):
                if record["step"] > sent:
                    sent = record["step"]
                    each(partial(_tell_step, record=record))
            for found in looks():
                if found["step"] not in shown:
                    shown.add(found["step"])
                    each(partial(_tell_look, found=found))

        try:
            with ticking(feed, POLL_SECONDS, "trackers"):
                yield
        finally:
            feed()


def _tell_step(tracker: Tracker, record: Mapping[str, Any]) -> None:
    tracker.log(record["step"], values_of(record))


def _tell_look(tracker: Tracker, found: Mapping[str, Any]) -> None:
    tracker.look(found["step"], {f"early_look/{name}": value for name, value in found["values"].items()})


def _close(name: str, tracker: Tracker) -> None:
    with _or_warn(name, "closed"):
        tracker.close()


@contextmanager
def _or_warn(name: str, done: str, failed: set[str] | None = None) -> Iterator[None]:
    """A tracker may fail in any way of its own; only that it is not installed is the user's to mend first."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        log.warning("the tracker %s could not be %s: %r", name, done, error)
        if failed is not None:
            failed.add(name)


class TensorBoard:
    """Event files in ``folder/tensorboard``; written anew each time, because all steps are sent again."""

    def __init__(self, folder: Path, run: str, run_id: str) -> None:
        writer = _module("tensorboardX", "tensorboard").SummaryWriter
        place = folder / "tensorboard"
        for old in place.glob("events.out.tfevents.*"):
            old.unlink()
        self._writer = writer(str(place))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """As in Tracker."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    look = log

    def close(self) -> None:
        """As in Tracker."""
        self._writer.close()


class MLflow:
    """A run of the experiment `run` on the server that MLFLOW_TRACKING_URI names."""

    def __init__(self, folder: Path, run: str, run_id: str) -> None:
        self._mlflow = _module("mlflow", "mlflow")
        self._mlflow.set_experiment(run)
        self._mlflow.start_run(run_name=run_id)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """As in Tracker."""
        self._mlflow.log_metrics(dict(values), step=step)

    look = log

    def close(self) -> None:
        """As in Tracker."""
        self._mlflow.end_run()


class WandB:
    """A run of the project `run`; the same training continues the same run."""

    def __init__(self, folder: Path, run: str, run_id: str) -> None:
        self._run = _module("wandb", "wandb").init(
            project=run, id=run_id.replace("/", "-"), resume="allow", dir=str(folder)
        )
        # Its own step only rises, and a look comes late.
        self._run.define_metric("early_look/*", step_metric="early_look/step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """As in Tracker."""
        self._run.log(dict(values), step=step)

    def look(self, step: int, values: Mapping[str, float]) -> None:
        """As in Tracker."""
        self._run.log({**values, "early_look/step": step})

    def close(self) -> None:
        """As in Tracker."""
        self._run.finish()


OPENERS: dict[str, Callable[[Path, str, str], Tracker]] = {"tensorboard": TensorBoard, "mlflow": MLflow, "wandb": WandB}


def _module(name: str, tracker: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"runtime.trackers names {tracker}, but the package {name} is not installed. Install it, or leave the "
            "tracker out: steps are recorded in any case."
        ) from error
