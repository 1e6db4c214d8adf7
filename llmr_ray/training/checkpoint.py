"""Training checkpoints that survive what storage does to them.

``ckpt-{step:08d}/`` holds the model (a folder as others load it), ``optimizer.safetensors``, ``state.json`` and
``MANIFEST.json`` with the sha256 of every file, written last; the folder itself appears by rename. Where adapters are
trained, ``adapters.safetensors`` has them and the model, merged, is there after the last step alone. The newest
checkpoint that verifies wins: a truncated or flipped file costs one interval and not the run (Ray Train's own recovery
reads the newest checkpoint and never an older one). Where none verifies, training does not silently begin anew. Nothing
here is pickled. ``steps.jsonl`` beside the checkpoints holds one record per step.
"""

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from llmr_ray.artifacts import canonical_json, sha256_file
from llmr_ray.durable import remove, staged, write_atomic
from llmr_ray.errors import DataError

log = logging.getLogger(__name__)

KEEP = 2
MODEL = "model"
MANIFEST = "MANIFEST.json"
ADAPTERS = "adapters.safetensors"
STEPS_FILE = "steps.jsonl"

MAX_RECORD_BYTES = 4096
"""More than the line of any step takes."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint that was verified. `step` is the number of steps taken: the next step to run."""

    folder: Path
    step: int
    state: dict[str, Any]

    @property
    def model(self) -> Path:
        """The model's folder; where adapters are trained, of the last step alone."""
        return self.folder / MODEL

    def restore_adapters(self, adapters: dict[str, torch.nn.Parameter]) -> None:
        """Puts the saved adapters back, by parameter name."""
        tensors = load_file(self.folder / ADAPTERS)
        with torch.no_grad():
            for name, parameter in adapters.items():
                parameter.copy_(tensors[name])

    def restore_optimizer(self, optimizer: torch.optim.Optimizer, names: dict[str, torch.nn.Parameter]) -> None:
        """Puts the saved moments back, by parameter name; DataError when they belong to another model."""
        tensors = load_file(self.folder / "optimizer.safetensors")
        saved = {key.rpartition("/")[0] for key in tensors}
        if saved != set(names):
            odd = sorted(saved ^ set(names))[:3]
            raise DataError(f"{self.folder} holds the optimizer state of another model: {odd}. Move it away.")
        for key, value in tensors.items():
            name, _, entry = key.rpartition("/")
            parameter = names[name]
            # AdamW keeps its step counter on the CPU unless it is fused.
            device = parameter.device if entry != "step" or optimizer.defaults.get("fused") else torch.device("cpu")
            optimizer.state[parameter][entry] = value.to(device)


def save(
    root: Path,
    step: int,
    *,
    save_model: Callable[[Path], None] | None,
    adapters: dict[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    names: dict[str, torch.nn.Parameter],
    state: dict[str, Any],
) -> Path:
    """Writes the checkpoint after `step` steps and deletes all but the newest KEEP. Returns its folder.

    Args:
        root: holds the checkpoints of one run.
        step: steps taken.
        save_model: writes the model into a folder; None: the adapters are all that is new.
        adapters: saved by name; none where the whole model is trained.
        optimizer: its per-parameter tensors are saved.
        names: the trained parameters by name.
        state: what else resuming needs, as JSON values.
    """
    folder = root / f"ckpt-{step:08d}"
    tensors = {
        f"{name}/{entry}": value.detach().cpu().contiguous()
        for name, parameter in names.items()
        for entry, value in optimizer.state[parameter].items()
    }
    with staged(folder) as staging:
        staging.mkdir()
        if save_model is not None:
            save_model(staging / MODEL)
        if adapters:
            weights = {name: parameter.detach().cpu().contiguous() for name, parameter in adapters.items()}
            save_file(weights, staging / ADAPTERS)
        save_file(tensors, staging / "optimizer.safetensors")
        (staging / "state.json").write_text(canonical_json({"step": step, **state}) + "\n")
        files = sorted(path for path in staging.rglob("*") if path.is_file())
        manifest = {str(path.relative_to(staging)): sha256_file(path) for path in files}
        (staging / MANIFEST).write_text(canonical_json(manifest) + "\n")
    for old in _folders(root)[:-KEEP]:
        shutil.rmtree(old)
    return folder


def newest(root: Path, *, allow_restart: bool = False) -> Checkpoint | None:
    """The newest checkpoint that verifies, or None where there is none at all.

    Newer ones that do not verify are moved to ``quarantine/``; what a killed writer left half done is removed. Only one
    process may call it, and only while nobody writes.

    Args:
        root: holds the checkpoints of one run.
        allow_restart: None, too, where there are checkpoints but none verifies.

    Raises:
        DataError: none of the checkpoints verifies; they stay where they are.
    """
    for partial in root.glob("ckpt-*.tmp-*"):
        remove(partial)
    faults: dict[Path, str] = {}
    found = None
    for folder in reversed(_folders(root)):
        fault = fault_of(folder)
        if fault is None:
            found = read(folder)
            break
        faults[folder] = fault
    if faults and found is None and not allow_restart:
        listed = ", ".join(f"{folder.name} ({fault})" for folder, fault in faults.items())
        raise DataError(
            f"none of the checkpoints in {root} is valid: {listed}. Training would begin anew from step 0. Look after "
            "the storage and put the files back if you can; to train anew, run `llmr run CONFIG --allow-restart`, "
            "which moves these to quarantine/."
        )
    for folder, fault in faults.items():
        instead = f"step {found.step} is used" if found else "training begins anew"
        log.warning("checkpoint %s is not valid (%s): moved to quarantine, %s", folder, fault, instead)
        target = root / "quarantine" / folder.name
        target.parent.mkdir(exist_ok=True)
        remove(target)
        folder.rename(target)
    return found


def last_saved(root: Path) -> tuple[int, Path] | None:
    """The step and the model of the newest checkpoint that has one, unverified: for those who only look."""
    folders = [folder for folder in _folders(root) if (folder / MODEL).exists()]
    return (int(folders[-1].name[5:]), folders[-1] / MODEL) if folders else None


def read(folder: Path) -> Checkpoint:
    """Opens a checkpoint that `newest` verified (on every rank, once rank 0 has chosen)."""
    state = json.loads((folder / "state.json").read_text())
    return Checkpoint(folder=folder, step=int(state["step"]), state=state)


def fault_of(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        return f"no {MANIFEST}"
    except ValueError:
        manifest = None
    if not isinstance(manifest, dict):
        return f"{MANIFEST} is not JSON"
    for name, digest in manifest.items():
        try:
            if sha256_file(folder / name) != digest:
                return f"the bytes of {name} changed"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None


def append_step(root: Path, record: Mapping[str, Any]) -> None:
    """Adds one line to the step records."""
    with (root / STEPS_FILE).open("a") as handle:
        handle.write(json.dumps(record) + "\n")


def keep_steps(root: Path, step: int) -> None:
    """Cuts the records back to the steps before `step`, so that a step done again stands once; a torn line goes too."""
    kept = [record for record in read_steps(root) if record["step"] < step]
    write_atomic(root / STEPS_FILE, "".join(json.dumps(record) + "\n" for record in kept).encode())


def read_steps(root: Path) -> list[dict[str, Any]]:
    """The records of the steps done, in order; a last line without its end is not one."""
    path = root / STEPS_FILE
    if not path.exists():
        return []
    return _records(path.read_bytes())


def last_steps(root: Path, count: int) -> list[dict[str, Any]]:
    """The last `count` records or fewer, at a cost that does not grow with the file."""
    path = root / STEPS_FILE
    if not path.exists():
        return []
    with path.open("rb") as handle:
        start = max(0, path.stat().st_size - count * MAX_RECORD_BYTES)
        handle.seek(start)
        if start:
            handle.readline()
        return _records(handle.read())[-count:]


def _records(lines: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines.splitlines(keepends=True) if line.endswith(b"\n")]


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.glob("ckpt-*") if path.is_dir() and path.name[5:].isdigit())
