"""The embedder: any BERT-like encoder, loaded, pooled and saved by sentence-transformers, batched here.

Tensor legend: B texts of a batch, D embedding size, n texts of a call.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmr_ray.artifacts import canonical_json, sha256_file, sha256_text
from llmr_ray.errors import ConfigError, ResourceError
from llmr_ray.modeling.text_model import TextModel, loading, readable_weights, require_weights

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer

POOLINGS = {"cls": "cls", "mean": "mean", "last": "lasttoken"}
"""Our names of the poolings and those of sentence-transformers; `auto` keeps what the folder says."""

_MODEL_SUFFIXES = {".safetensors", ".json", ".txt", ".model"}
"""What determines embeddings: weights, configuration and tokenizer. Not the README."""


def fingerprint_of(folder: Path) -> str:
    """Hex sha256 over (relative name, sha256) of a model folder's weights, configuration and tokenizer files."""
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and path.suffix in _MODEL_SUFFIXES and not path.name.startswith(".")
    )
    return sha256_text(canonical_json([[str(path.relative_to(folder)), sha256_file(path)] for path in files]))


class Embedder(TextModel):
    """A text encoder with unit-norm output, for inference and as the module that is trained.

    Pooling and normalisation are in float32 whatever the precision (bfloat16 weights would turn embeddings by 0.07 rad;
    autocast keeps cosines above 0.9999).

    Args:
        path: a sentence-transformers folder, or a plain transformers folder (mean pooling unless `pooling` says
            otherwise). Weights must be safetensors.
        pooling: auto (what the folder says), cls, mean or last.
        max_query_tokens: stored in saved models as the limit of queries.
        max_document_tokens: the same for documents.
        precision: auto, float32, bfloat16, or int8 (for inference: where a gradient is asked for, it is float32).
        device: "cpu", "cuda", ...; None: CUDA where there is one.

    Raises:
        ResourceError: there is no such folder, or it holds no model that can be loaded safely.
        ConfigError: the pooling or precision is unknown or does not fit the model or the processor.
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
        super().__init__(path, precision=precision, device=device)
        self.module = _load(self.path, self.device)
        self.tokenizer = self.module.tokenizer
        _set_pooling(self.module, pooling)
        longest = max(max_query_tokens, max_document_tokens)
        self._make_ready(longest, "embedder.max_query_tokens and embedder.max_document_tokens")
        self.module.max_seq_length = longest
        self.module[0].query_length, self.module[0].document_length = max_query_tokens, max_document_tokens
        if self.precision == "int8":
            from llmr_ray.modeling.int8 import SAMPLE, quantise

            quantise(
                self.transformer,
                lambda: self.encode(list(SAMPLE), instruction="", max_tokens=min(longest, 64), batch_tokens=1024),
                str(path),
            )

    @property
    def transformer(self) -> Any:
        """The transformers model below pooling and normalisation."""
        return self.module[0].model

    @property
    def dimension(self) -> int:
        """D, the length of an embedding."""
        return int(self.module.get_embedding_dimension() or 0)

    @cached_property
    def fingerprint(self) -> str:
        """Changes when the embeddings do: a hash of the folder's weights, configuration and tokenizer files."""
        return fingerprint_of(self.path)

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

    def _of_padded(self, features: dict[str, "torch.Tensor"]) -> "torch.Tensor":
        with self._autocast():
            features = self.module[0](features)
        return self._pooled(features)

    def _of_packed(self, features: dict[str, Any], bounds: "torch.Tensor") -> "torch.Tensor":
        with self._autocast():
            output = self.transformer(**features)
        return self._pooled({"token_embeddings": output.last_hidden_state, "cu_seq_lens_q": bounds})

    def _pooled(self, features: dict[str, "torch.Tensor"]) -> "torch.Tensor":
        features["token_embeddings"] = features["token_embeddings"].float()
        for module in list(self.module)[1:]:
            features = module(features)
        return features["sentence_embedding"]

    def encode(self, texts: list[str], *, instruction: str, max_tokens: int, batch_tokens: int) -> np.ndarray:
        """Embeds texts for search: float32 [n, D], unit norm, in input order.

        Args:
            texts: n texts.
            instruction: put before each text as it is (methods.md A.2.1: it brings its own trailing space).
            max_tokens: longer texts are cut on the right; instruction and special tokens count.
            batch_tokens: tokens of a batch at the most, padding included.
        """
        tokens = self.tokenize(texts, instruction=instruction, max_tokens=max_tokens)
        return self.infer(tokens, batch_tokens, np.empty((len(texts), self.dimension), dtype=np.float32))

    def save(self, folder: Path | str, prompts: dict[str, str]) -> None:
        """Writes a folder that ``SentenceTransformer(folder)`` loads with built-in classes alone.

        Args:
            folder: created; the caller makes it atomic.
            prompts: instructions by prompt name, for example "query", "document", "qa-query".
        """
        self.module.prompts = {"query": "", "document": "", **prompts}
        self.module.save_pretrained(str(folder), create_model_card=False)
        readable_weights(folder)


def _load(path: Path, device: "torch.device") -> "SentenceTransformer":
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Normalize, Transformer

    with loading(path, "an embedder") as missing:
        module = SentenceTransformer(
            str(path), device=str(device), local_files_only=True, model_kwargs={"use_safetensors": True}
        )
    # No embedding uses BERT's pooler; where a folder lacks it, it would be random weights in every saved model.
    require_weights(path, [name for name in missing if not name.startswith("pooler.")])
    if not isinstance(module[0], Transformer) or not getattr(module.tokenizer, "is_fast", False):
        raise ResourceError(f"{path} is not a transformer with a fast tokenizer, which this embedder needs.")
    if not isinstance(module[-1], Normalize):
        module.append(Normalize())
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
