"""What every trained transformer here has in common: how it is loaded, and how texts of any lengths run through it.

Tensor legend: B texts of a batch, L tokens of its longest text, T tokens of all its texts, n texts of a call.
"""

import logging
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmr_ray.errors import ConfigError, ResourceError
from llmr_ray.precision import resolve_precision

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

Tokens = Sequence[Sequence[int] | np.ndarray]
"""Token ids of texts, best in the order of their lengths."""

PADDING_ALLOWANCE = 0.03
"""A batch is closed when a further text would raise its padding above this share (and above MIN_PADDING tokens)."""
MIN_PADDING = 64
"""Padding tokens that cost no more than starting another batch does."""


def pack(lengths: Sequence[int] | np.ndarray, batch_tokens: int, *, pads: bool = True) -> list[np.ndarray]:
    """Splits texts into batches of similar length: the row numbers of each, longest texts first.

    A batch holds at most `batch_tokens` tokens (one text may exceed it). Where it `pads`, its padding counts, and there
    is little of it: see PADDING_ALLOWANCE. A pure function of the lengths; equal lengths keep their order.
    """
    lengths_n = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-lengths_n, kind="stable")
    batches, start, used = [], 0, 0
    for end, row in enumerate(order):
        width, length, count = int(lengths_n[order[start]]), int(lengths_n[row]), end - start
        padded = width * (count + 1) if pads else used + length
        padding = padded - used - length
        if count and (padded > batch_tokens or padding > max(MIN_PADDING, PADDING_ALLOWANCE * padded)):
            batches.append(order[start:end])
            start, used = end, 0
        used += length
    if len(order):
        batches.append(order[start:])
    return batches


class TextModel(ABC):
    """A transformer that gives each text a row of float32 numbers, for inference and as the module that is trained.

    Weights stay float32; with precision "bfloat16" the transformer runs under autocast, and what is made of its output
    is computed in float32.

    Args:
        path: the model's folder.
        precision: auto, float32 or bfloat16.
        device: "cpu", "cuda", ...; None: CUDA where there is one.
    """

    module: Any
    """All that is trained and saved: a torch module."""
    tokenizer: Any

    def __init__(self, path: str | Path, *, precision: str, device: str | None) -> None:
        import torch

        self.path = Path(path)
        self.precision = resolve_precision(precision)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._position_offset: int | None = None

    @property
    @abstractmethod
    def transformer(self) -> Any:
        """The transformers model within `module`, without what is made of its output."""

    @property
    def heads(self) -> list[Any]:
        """Parts of `module` on top of the transformer that have to be trained even where it has adapters."""
        return []

    @abstractmethod
    def _of_padded(self, features: dict[str, "torch.Tensor"]) -> "torch.Tensor":
        """The result for texts as rows of one width: input_ids and attention_mask [B, L] to [B, ...]."""

    @abstractmethod
    def _of_packed(self, features: dict[str, Any], bounds: "torch.Tensor") -> "torch.Tensor":
        """The result for texts one after the other: input_ids and position_ids [1, T] and their runs to [B, ...].

        `bounds` are the first token of each text and the end of the last: int64 [B + 1].
        """

    def _make_ready(self, longest: int, settings: str) -> None:
        """To be called once module and tokenizer are there.

        Raises:
            ConfigError: the model has no positions for texts of `longest` tokens; it names the `settings`.
        """
        from llmr_ray.modeling.linear import is_faster, use_onednn

        positions = getattr(self.transformer.config, "max_position_embeddings", None)
        if positions is not None and longest > positions:
            raise ConfigError(
                f"{self.path} has {positions} positions, but texts of up to {longest} tokens are asked for. Lower "
                f"{settings}."
            )
        if self.tokenizer.pad_token_id is None:  # decoders: padding is masked, whatever token it is
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.tokenizer.truncation_side = "right"
        self.tokenizer.padding_side = "right"
        if self.device.type == "cpu" and is_faster():
            use_onednn(self.module)
        self._position_offset = self._find_packing()

    def checkpoint_activations(self) -> None:
        """From now on the backward pass computes each layer's activations again instead of keeping them."""
        self.transformer.gradient_checkpointing_enable({"use_reentrant": False})

    def batches(self, lengths: Sequence[int], batch_tokens: int) -> list[np.ndarray]:
        """How texts of these lengths are best cut for `forward`: the row numbers of each batch, see `pack`."""
        return pack(lengths, batch_tokens, pads=self._position_offset is None)

    def computed_tokens(self, lengths: Sequence[int]) -> int:
        """What `forward` computes for a batch of texts of these lengths: tokens, and padding if there is any."""
        return sum(lengths) if self._position_offset is not None else max(lengths) * len(lengths)

    def forward(self, tokens: Tokens) -> "torch.Tensor":
        """The result for one batch, with gradient where it is enabled: float32 [B, ...]."""
        if self._position_offset is None:
            return self._of_padded(self._as_rectangle(tokens))
        return self._of_packed(*self._as_row(tokens, self._position_offset))

    def infer(self, tokens: Tokens, batch_tokens: int, into: np.ndarray) -> np.ndarray:
        """Fills `into`, float32 [n, ...], with the results for n texts in their order, without gradient or dropout."""
        import torch

        if self.module.training:  # asked of every layer, which takes a tenth of the time of a short query
            self.module.eval()
        with torch.inference_mode():
            for rows in self.batches([len(ids) for ids in tokens], batch_tokens):
                into[rows] = self.forward([tokens[row] for row in rows]).cpu().numpy()
        return into

    def _autocast(self) -> AbstractContextManager[Any]:
        import torch

        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bfloat16")

    def _as_rectangle(self, tokens: Tokens) -> dict[str, "torch.Tensor"]:
        import torch

        lengths_B = np.asarray([len(ids) for ids in tokens])
        ids_BL = np.full((len(tokens), int(lengths_B.max())), self.tokenizer.pad_token_id, dtype=np.int64)
        for row, ids in enumerate(tokens):
            ids_BL[row, : len(ids)] = ids
        mask_BL = (np.arange(ids_BL.shape[1]) < lengths_B[:, None]).astype(np.int64)
        return {
            "input_ids": torch.from_numpy(ids_BL).to(self.device),
            "attention_mask": torch.from_numpy(mask_BL).to(self.device),
        }

    def _as_row(self, tokens: Tokens, position_offset: int) -> tuple[dict[str, Any], "torch.Tensor"]:
        import torch

        from llmr_ray.modeling.packed_attention import runs_of

        lengths_B = np.asarray([len(ids) for ids in tokens])
        end_B = lengths_B.cumsum()
        position_T = np.arange(end_B[-1]) - np.repeat(end_B - lengths_B, lengths_B) + position_offset
        ids_T = np.concatenate([np.asarray(ids, dtype=np.int64) for ids in tokens])
        features = {
            "input_ids": torch.from_numpy(ids_T[None]).to(self.device),
            "position_ids": torch.from_numpy(position_T[None]).to(self.device),
            "runs": runs_of(lengths_B.tolist()),
        }
        return features, torch.from_numpy(np.concatenate([[0], end_B])).to(self.device)

    def _find_packing(self) -> int | None:
        """The first position of a text in a packed batch, or None: this transformer needs padding.

        Whatever the architecture, it packs if a few texts then have the results that they have in a padded batch.
        On a GPU, padding costs less than many small calls of attention.
        """
        import torch

        from llmr_ray.modeling.packed_attention import NAME

        model = self.transformer
        if self.device.type != "cpu" or not model.is_backend_compatible():
            return None
        usual = model.config._attn_implementation
        embeddings = getattr(model, "embeddings", None)
        # RoBERTa's kin count positions from the padding token's number on.
        counted_from = getattr(embeddings, "padding_idx", None)
        offset = 0 if counted_from is None else int(counted_from) + 1
        tokens = self.tokenizer(["a b c d", "e", "f g"], truncation=True, max_length=8)["input_ids"]
        precision, self.precision = self.precision, "float32"
        self.module.eval()
        try:
            with torch.no_grad():
                expected = self._of_padded(self._as_rectangle(tokens))
                model.set_attn_implementation(NAME)
                if torch.allclose(self._of_packed(*self._as_row(tokens, offset)), expected, atol=1e-4):
                    return offset
        except (NotImplementedError, TypeError, ValueError, RuntimeError) as error:
            log.debug("%s takes padded batches: %s", self.path, error)
        finally:
            self.precision = precision
        model.set_attn_implementation(usual)
        return None


@contextmanager
def loading(path: Path, what: str) -> Iterator[list[str]]:
    """Surrounds the loading of a model from a folder; its list holds the names of missing weights in the end.

    A folder without some of its weights loads with random ones and a warning, which is kept from the log.

    Raises:
        ResourceError: there is no such folder, or what it holds cannot be loaded safely as `what`.
    """
    import torch
    import transformers

    if not path.is_dir():
        raise ResourceError(f"there is no model folder {path}. Give an asset's name, a local folder or a hub name.")
    # The tokenizer reads this at its first use and would otherwise take every core of the machine.
    os.environ.setdefault("RAYON_NUM_THREADS", str(torch.get_num_threads()))
    logging.getLogger("sentence_transformers").setLevel(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    report = _LoadReport()
    loader = logging.getLogger("transformers.modeling_utils")
    loader.addFilter(report)
    try:
        yield report.missing
    except (OSError, ValueError, KeyError) as error:
        raise ResourceError(
            f"{path} cannot be loaded as {what}: {str(error).splitlines()[0]} It must hold config.json, a "
            "tokenizer and weights in safetensors; pickled weights (pytorch_model.bin) are refused: convert them first."
        ) from error
    finally:
        loader.removeFilter(report)


def require_weights(path: Path, missing: list[str]) -> None:
    """Raises ResourceError if there are missing weights."""
    if missing:
        raise ResourceError(
            f"{path} lacks weights of the model that its config.json describes: {missing[:5]}. They would be "
            "random, and so its results. Get the complete model."
        )


def readable_weights(folder: Path | str) -> None:
    """Gives everyone leave to read the weights, which transformers leaves readable by their owner only."""
    for path in Path(folder).rglob("*.safetensors"):
        path.chmod(0o644)


class _LoadReport(logging.Filter):
    """Reads which weights were missing out of transformers' report, which it keeps from the log."""

    def __init__(self) -> None:
        super().__init__()
        self.missing: list[str] = []

    def filter(self, record: logging.LogRecord) -> bool:
        """Takes load reports in, lets everything else pass."""
        message = record.getMessage()
        if "LOAD REPORT" not in message:
            return True
        self.missing += re.findall(r"^(\S+)\s*\|[^|]*MISSING", message, flags=re.MULTILINE)
        return False
