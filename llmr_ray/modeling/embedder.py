"""The embedder: any BERT-like encoder, loaded, pooled and saved by sentence-transformers, batched here.

Tensor legend: B texts of a batch, L tokens of its longest text, D embedding size, n texts of a call.
"""

import logging
import os
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmr_ray.artifacts import canonical_json, sha256_file, sha256_text
from llmr_ray.errors import ConfigError, ResourceError
from llmr_ray.precision import resolve_precision

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer

log = logging.getLogger(__name__)

POOLINGS = {"cls": "cls", "mean": "mean", "last": "lasttoken"}
"""Our names of the poolings and those of sentence-transformers; `auto` keeps what the folder says."""

_MODEL_SUFFIXES = {".safetensors", ".json", ".txt", ".model"}
"""What determines embeddings: weights, configuration and tokenizer. Not the README."""

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


def fingerprint_of(folder: Path) -> str:
    """Hex sha256 over (relative name, sha256) of a model folder's weights, configuration and tokenizer files."""
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and path.suffix in _MODEL_SUFFIXES and not path.name.startswith(".")
    )
    return sha256_text(canonical_json([[str(path.relative_to(folder)), sha256_file(path)] for path in files]))


class Embedder:
    """A text encoder with unit-norm output, for inference and as the module that is trained.

    Weights stay float32; with precision "bfloat16" the transformer runs under autocast and pooling and normalisation
    in float32 (bfloat16 weights would turn embeddings by 0.07 rad; autocast keeps cosines above 0.9999).

    Args:
        path: a sentence-transformers folder, or a plain transformers folder (mean pooling unless `pooling` says
            otherwise). Weights must be safetensors.
        pooling: auto (what the folder says), cls, mean or last.
        max_query_tokens: stored in saved models as the limit of queries.
        max_document_tokens: the same for documents.
        precision: auto, float32 or bfloat16.
        device: "cpu", "cuda", ...; None: CUDA where there is one.

    Raises:
        ResourceError: there is no such folder, or it holds no model that can be loaded safely.
        ConfigError: the pooling or precision is unknown or does not fit the model.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        pooling: str = "auto",
        max_query_tokens: int,
        max_document_tokens: int,
        precision: str = "auto",
        device: str | None = None,
    ) -> None:
        import torch

        from llmr_ray.modeling.linear import is_faster, use_onednn

        self.path = Path(path)
        self.precision = resolve_precision(precision)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.module = _load(self.path, self.device)
        _set_pooling(self.module, pooling)
        model: Any = self.module
        longest = max(max_query_tokens, max_document_tokens)
        positions = getattr(model[0].model.config, "max_position_embeddings", None)
        if positions is not None and longest > positions:
            raise ConfigError(
                f"{self.path} has {positions} positions, but texts of up to {longest} tokens are asked for. Lower "
                "embedder.max_query_tokens and embedder.max_document_tokens."
            )
        model.max_seq_length = longest
        model[0].query_length, model[0].document_length = max_query_tokens, max_document_tokens
        self.tokenizer = self.module.tokenizer
        if self.tokenizer.pad_token_id is None:  # decoders: padding is masked, whatever token it is
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.tokenizer.truncation_side = "right"
        self.tokenizer.padding_side = "right"
        if self.device.type == "cpu" and is_faster():
            use_onednn(self.module)
        self._position_offset = self._find_packing()

    @property
    def dimension(self) -> int:
        """D, the length of an embedding."""
        return int(self.module.get_embedding_dimension() or 0)

    @cached_property
    def fingerprint(self) -> str:
        """Changes when the embeddings do: a hash of the folder's weights, configuration and tokenizer files."""
        return fingerprint_of(self.path)

    def checkpoint_activations(self) -> None:
        """From now on the backward pass computes each layer's activations again instead of keeping them."""
        model: Any = self.module
        model[0].model.gradient_checkpointing_enable({"use_reentrant": False})

    def tokenize(self, texts: Sequence[str], *, instruction: str, max_tokens: int) -> list[list[int]]:
        """Token ids of ``instruction + text``, special tokens included, cut on the right to `max_tokens`."""
        if not texts:
            return []
        encoded = self.tokenizer(
            [instruction + text for text in texts],
            truncation=True,
            max_length=max_tokens,
            return_attention_mask=False,
            return_token_type_ids=False,
        )
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    def batches(self, lengths: Sequence[int], batch_tokens: int) -> list[np.ndarray]:
        """How texts of these lengths are best cut for `forward`: the row numbers of each batch, see `pack`."""
        return pack(lengths, batch_tokens, pads=self._position_offset is None)

    def computed_tokens(self, lengths: Sequence[int]) -> int:
        """What `forward` computes for a batch of texts of these lengths: tokens, and padding if there is any."""
        return sum(lengths) if self._position_offset is not None else max(lengths) * len(lengths)

    def forward(self, tokens: Sequence[Sequence[int] | np.ndarray]) -> "torch.Tensor":
        """Embeddings of one batch, with gradient where it is enabled.

        Args:
            tokens: B texts as token ids, best in the order of their lengths.

        Returns:
            float32 [B, D], unit norm.
        """
        import torch

        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bfloat16"):
            if self._position_offset is None:
                features = self._padded(tokens)
            else:
                features = self._packed(tokens, self._position_offset)
        return self._pooled(features)

    def _padded(self, tokens: Sequence[Sequence[int] | np.ndarray]) -> dict[str, "torch.Tensor"]:
        """The transformer's output for texts as rows of one width."""
        import torch

        lengths_B = np.asarray([len(ids) for ids in tokens])
        ids_BL = np.full((len(tokens), int(lengths_B.max())), self.tokenizer.pad_token_id, dtype=np.int64)
        for row, ids in enumerate(tokens):
            ids_BL[row, : len(ids)] = ids
        mask_BL = (np.arange(ids_BL.shape[1]) < lengths_B[:, None]).astype(np.int64)
        features = {
            "input_ids": torch.from_numpy(ids_BL).to(self.device),
            "attention_mask": torch.from_numpy(mask_BL).to(self.device),
        }
        return self.module[0](features)

    def _packed(self, tokens: Sequence[Sequence[int] | np.ndarray], position_offset: int) -> dict[str, "torch.Tensor"]:
        """The transformer's output for texts one after the other, in the form that the pooling layer takes too."""
        import torch

        from llmr_ray.modeling.packed_attention import runs_of

        lengths_B = np.asarray([len(ids) for ids in tokens])
        end_B = lengths_B.cumsum()
        position_T = np.arange(end_B[-1]) - np.repeat(end_B - lengths_B, lengths_B) + position_offset
        ids_T = np.concatenate([np.asarray(ids, dtype=np.int64) for ids in tokens])
        model: Any = self.module[0]
        output = model.model(
            input_ids=torch.from_numpy(ids_T[None]).to(self.device),
            position_ids=torch.from_numpy(position_T[None]).to(self.device),
            runs=runs_of(lengths_B.tolist()),
        )
        starts_and_end = torch.from_numpy(np.concatenate([[0], end_B])).to(self.device)
        return {"token_embeddings": output.last_hidden_state, "cu_seq_lens_q": starts_and_end}

    def _pooled(self, features: dict[str, "torch.Tensor"]) -> "torch.Tensor":
        features["token_embeddings"] = features["token_embeddings"].float()
        for module in list(self.module)[1:]:
            features = module(features)
        return features["sentence_embedding"]

    def _find_packing(self) -> int | None:
        """The first position of a text in a packed batch, or None: this transformer needs padding.

        Whatever the architecture, it packs if a few texts then have the embeddings that they have in a padded batch.
        On a GPU, padding costs less than many small calls of attention.
        """
        import torch

        from llmr_ray.modeling.packed_attention import NAME

        model: Any = self.module[0]
        if self.device.type != "cpu" or not model.model.is_backend_compatible():
            return None
        usual = model.model.config._attn_implementation
        embeddings = getattr(model.model, "embeddings", None)
        # RoBERTa's kin count positions from the padding token's number on.
        counted_from = getattr(embeddings, "padding_idx", None)
        offset = 0 if counted_from is None else int(counted_from) + 1
        tokens = self.tokenize(["a b c d", "e", "f g"], instruction="", max_tokens=8)
        self.module.eval()
        with torch.no_grad():
            expected = self._pooled(self._padded(tokens))
            try:
                model.model.set_attn_implementation(NAME)
                if torch.allclose(self._pooled(self._packed(tokens, offset)), expected, atol=1e-4):
                    return offset
            except (NotImplementedError, TypeError, ValueError, RuntimeError) as error:
                log.debug("%s takes padded batches: %s", self.path, error)
            model.model.set_attn_implementation(usual)
        return None

    def encode(self, texts: list[str], *, instruction: str, max_tokens: int, batch_tokens: int) -> np.ndarray:
        """Embeds texts for search: float32 [n, D], unit norm, in input order.

        Args:
            texts: n texts.
            instruction: put before each text as it is (methods.md A.2.1: it brings its own trailing space).
            max_tokens: longer texts are cut on the right; instruction and special tokens count.
            batch_tokens: tokens of a batch at the most, padding included.
        """
        import torch

        tokens = self.tokenize(texts, instruction=instruction, max_tokens=max_tokens)
        embeddings_nD = np.empty((len(texts), self.dimension), dtype=np.float32)
        self.module.eval()
        with torch.inference_mode():
            for rows in self.batches([len(ids) for ids in tokens], batch_tokens):
                embeddings_nD[rows] = self.forward([tokens[row] for row in rows]).cpu().numpy()
        return embeddings_nD

    def save(self, folder: Path | str, prompts: dict[str, str]) -> None:
        """Writes a folder that ``SentenceTransformer(folder)`` loads with built-in classes alone.

        Args:
            folder: created; the caller makes it atomic.
            prompts: instructions by prompt name, for example "query", "document", "qa-query".
        """
        self.module.prompts = {"query": "", "document": "", **prompts}
        self.module.save_pretrained(str(folder), create_model_card=False)
        for path in Path(folder).rglob("*.safetensors"):
            path.chmod(0o644)  # transformers leaves weights readable by their owner only


class _LoadReport(logging.Filter):
    """Reads which weights were missing out of transformers' report, which it keeps from the log.

    A folder without some of its weights loads with random ones and a warning; a missing pooler does not matter.
    """

    def __init__(self) -> None:
        super().__init__()
        self.missing: list[str] = []

    def filter(self, record: logging.LogRecord) -> bool:
        """Takes load reports in, lets everything else pass."""
        message = record.getMessage()
        if "LOAD REPORT" not in message:
            return True
        names = re.findall(r"^(\S+)\s*\|[^|]*MISSING", message, flags=re.MULTILINE)
        self.missing += [name for name in names if not name.startswith("pooler.")]
        return False


def _load(path: Path, device: "torch.device") -> "SentenceTransformer":
    import torch
    import transformers
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Normalize, Transformer

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
        module = SentenceTransformer(
            str(path), device=str(device), local_files_only=True, model_kwargs={"use_safetensors": True}
        )
    except (OSError, ValueError, KeyError) as error:
        raise ResourceError(
            f"{path} cannot be loaded as an embedder: {str(error).splitlines()[0]} It must hold config.json, a "
            "tokenizer and weights in safetensors; pickled weights (pytorch_model.bin) are refused: convert them first."
        ) from error
    finally:
        loader.removeFilter(report)
    if report.missing:
        raise ResourceError(
            f"{path} lacks weights of the model that its config.json describes: {report.missing[:5]}. They would be "
            "random, and so the embeddings. Get the complete model."
        )
    if not isinstance(module[0], Transformer) or not getattr(module.tokenizer, "is_fast", False):
        raise ResourceError(f"{path} is not a transformer with a fast tokenizer, which this embedder needs.")
    if not isinstance(module[-1], Normalize):
        module.append(Normalize())
    # No embedding uses BERT's pooler; where a folder lacks it, it would be random weights in every saved model.
    if getattr(module[0].model, "pooler", None) is not None:
        module[0].model.pooler = None
    return module.float()


def _set_pooling(module: "SentenceTransformer", pooling: str) -> None:
    from sentence_transformers.sentence_transformer.modules import Pooling

    if pooling == "auto":
        return
    found = [part for part in module if isinstance(part, Pooling)]
    if pooling not in POOLINGS or not found:
        raise ConfigError(
            f"pooling is '{pooling}', but must be auto, {', '.join(POOLINGS)}"
            f"{'' if found else ', and this model has no pooling layer to set'}."
        )
    found[0].pooling_mode = POOLINGS[pooling]
