"""The embedder: any encoder, loaded, pooled and saved by sentence-transformers, batched here.

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

DECODER = "decoder"
"""The pooling that is none of sentence-transformers': see decoder_step.py."""

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
    """A text encoder, for inference and as the module that is trained. Its output has unit norm unless `similarity` is
    dot.

    Pooling and normalisation are in float32 whatever the precision (bfloat16 weights would turn embeddings by 0.07 rad;
    autocast keeps cosines above 0.9999).

    Args:
        path: a sentence-transformers folder, or a plain transformers folder (mean pooling unless `pooling` says
            otherwise). Weights must be safetensors.
        pooling: auto (what the folder says), cls, mean, last, or decoder (of an encoder-decoder: its decoder's first
            step; cannot be saved).
        similarity: cosine, or dot: embeddings keep their length, whatever the folder says.
        pool_instruction: False: the tokens of an instruction are read and not pooled (Instructor). `tokenize` tells
            them apart: token t that is not to be pooled is given as ~t, a negative number.
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
        similarity: str = "cosine",
        pool_instruction: bool = True,
        max_query_tokens: int,
        max_document_tokens: int,
        precision: str = "auto",
        device: str | None = None,
    ) -> None:
        super().__init__(path, precision=precision, device=device)
        self.pooling, self.pool_instruction = pooling, pool_instruction
        self.module = _load(self.path, self.device, pooling)
        self.tokenizer = self.module.tokenizer
        _set_similarity(self.module, similarity)
        if not pool_instruction:
            _pooling_layer(self.module, "pool_instruction is false").include_prompt = False
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
        """Token ids of ``instruction + text``, special tokens included, cut on the right to `max_tokens`.

        Those that are not to be pooled are negative, see `pool_instruction`: as many as the instruction has alone,
        without a special token at its end (as INSTRUCTOR and sentence-transformers count).
        """
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
        if self.pool_instruction or not instruction:
            return ids
        alone: list[int] = self.tokenizer(instruction)["input_ids"]
        count = len(alone) - (alone[-1] in self.tokenizer.all_special_ids)
        # One token stays to be pooled where a text is cut within its instruction.
        return [[~token for token in row[:-1][:count]] + row[min(count, len(row) - 1) :] for row in ids]

    def _of_padded(self, features: dict[str, "torch.Tensor"]) -> "torch.Tensor":
        ids_BL = features["input_ids"]
        if not self.pool_instruction:
            features["input_ids"] = ids_BL.where(ids_BL >= 0, ~ids_BL)
        with self._autocast():
            features = self.module[0](features)
        if not self.pool_instruction:
            features["attention_mask"] = features["attention_mask"] * (ids_BL >= 0)
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

    def _find_packing(self) -> int | None:
        # Tokens that are not pooled, and the decoder, are told of by the padding mask alone.
        return super()._find_packing() if self.pool_instruction and self.pooling != DECODER else None

    def encode(self, texts: list[str], *, instruction: str, max_tokens: int, batch_tokens: int) -> np.ndarray:
        """Embeds texts for search: float32 [n, D] in input order, unit norm unless the similarity is dot.

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

        Raises:
            ConfigError: the pooling is `decoder`, for which there is no built-in class.
        """
        if self.pooling == DECODER:
            raise ConfigError(
                "an embedder with pooling 'decoder' cannot be saved: no built-in class of sentence-transformers runs a "
                "decoder. It can be compared (evaluate.embedders), not trained."
            )
        self.module.prompts = {"query": "", "document": "", **prompts}
        self.module.save_pretrained(str(folder), create_model_card=False)
        readable_weights(folder)


def _load(path: Path, device: "torch.device", pooling: str) -> "SentenceTransformer":
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer

    from llmr_ray.modeling.decoder_step import DecoderStep

    with loading(path, "an embedder") as missing:
        module = SentenceTransformer(
            str(path), device=str(device), local_files_only=True, model_kwargs={"use_safetensors": True}
        )
        if pooling == DECODER:
            _pooling_layer(module, "pooling is 'decoder'")
            module = SentenceTransformer(modules=[module[0], DecoderStep(path)], device=str(device))
    # No embedding uses BERT's pooler; where a folder lacks it, it would be random weights in every saved model.
    require_weights(path, [name for name in missing if not name.startswith("pooler.")])
    if not isinstance(module[0], Transformer) or not getattr(module.tokenizer, "is_fast", False):
        raise ResourceError(f"{path} is not a transformer with a fast tokenizer, which this embedder needs.")
    if getattr(module[0].model, "pooler", None) is not None:
        module[0].model.pooler = None
    if pooling not in ("auto", DECODER):
        if pooling not in POOLINGS:
            raise ConfigError(f"pooling is '{pooling}', but must be auto, {', '.join(POOLINGS)} or {DECODER}.")
        _pooling_layer(module, f"pooling is '{pooling}'").pooling_mode = POOLINGS[pooling]
    return module.float()


def _pooling_layer(module: "SentenceTransformer", setting: str) -> Any:
    from sentence_transformers.sentence_transformer.modules import Pooling

    found = [part for part in module if isinstance(part, Pooling)]
    if not found:
        raise ConfigError(f"{setting}, but this model has no pooling layer to set.")
    return found[0]


def _set_similarity(module: "SentenceTransformer", similarity: str) -> None:
    from sentence_transformers.base.modules import Normalize

    if similarity not in ("cosine", "dot"):
        raise ConfigError(f"similarity is '{similarity}', but must be cosine or dot.")
    is_normalized = isinstance(module[-1], Normalize)
    if similarity == "cosine" and not is_normalized:
        module.append(Normalize())
    if similarity == "dot":
        if is_normalized:
            del module[-1]
        module.similarity_fn_name = "dot"
