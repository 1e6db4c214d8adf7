"""The models of a server: the embedder of queries as the collection's vectors say, and a cross-encoder."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from llmr_ray.artifacts import sha256_file
from llmr_ray.assets import resolve
from llmr_ray.config import Config
from llmr_ray.errors import ConfigError, DataError
from llmr_ray.index.vectors import SIDES, how_pooled, max_tokens
from llmr_ray.modeling.embedder import fingerprint_of
from llmr_ray.serving.settings import ServingSettings

Prompted = tuple[str, str, int]
"""A text, the instruction before it, and the tokens it is cut to, instruction included."""

MODEL_FILES = "files/embedder"
"""Where a checkpoint has its embedder."""


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """How the vectors of a collection were made, and so how its queries must be.

    encoder: names it, as vectors.encoder_of does. path: the model's folder. pooled: vectors.how_pooled. max_tokens:
    side -> limit of texts of no task, the most of all. prompts: task -> side -> instruction and limit.
    """

    encoder: str
    path: str
    pooled: dict[str, Any]
    max_tokens: dict[str, int]
    prompts: dict[str, dict[str, tuple[str, int]]]

    def prompt(self, task: str | None, side: str) -> tuple[str, int]:
        """Instruction and limit of a task's texts; without a task there is no instruction."""
        return self.prompts[task][side] if task is not None else ("", self.max_tokens[side])


def vector_settings(root: Path, manifest: dict[str, Any]) -> EncoderSpec:
    """Reads how a snapshot's vectors were made; where the embedder lies is left open (`path` is empty).

    Args:
        root: the artifact root.
        manifest: of the snapshot.

    Raises:
        DataError: the segments disagree.
    """
    specs = [_identity(root, segment) for segment in manifest["segments"]]
    config = specs[0]["config"]
    limits = {side: max_tokens(config, None, side) for side in SIDES}
    prompts: dict[str, dict[str, tuple[str, int]]] = {}
    for spec in specs:
        own = spec["config"]
        same = how_pooled(own) == how_pooled(config)
        same &= all(max_tokens(own, None, side) == limits[side] for side in SIDES)
        found = {
            task: {
                side: (instruction, max_tokens(own, task, side)) for side, instruction in zip(SIDES, both, strict=True)
            }
            for task, both in own["instructions"].items()
        }
        if not same or any(prompts.get(task, both) != both for task, both in found.items()):
            raise DataError("the segments of a snapshot were embedded in different ways; no query fits them all.")
        prompts |= found
    return EncoderSpec(
        encoder=manifest["encoder"],
        path="",
        pooled=how_pooled(config),
        max_tokens=limits,
        prompts=prompts,
    )


def encoder_spec(root: Path, manifest: dict[str, Any], embedder: str = "", cache_root: str = "") -> EncoderSpec:
    """How a snapshot's vectors were made, and the checked embedder that made them.

    Args:
        root: the artifact root.
        manifest: of the snapshot.
        embedder: an asset's name or a folder; empty: what the snapshot names.
        cache_root: where assets are kept.

    Raises:
        DataError: the segments disagree, or the weights are not those that made the vectors.
        ResourceError: there is no such embedder.
    """
    made_by = str(_identity(root, manifest["segments"][0])["inputs"]["embedder"])
    folder = _folder(root, made_by, embedder or manifest["model"], cache_root)
    return replace(vector_settings(root, manifest), path=str(folder))


def _identity(root: Path, segment: dict[str, Any]) -> dict[str, Any]:
    path = root / segment["embeddings"] / "config.json"
    if not path.exists():
        raise DataError(f"{path} is missing: the artifacts of a snapshot must stay where they are.")
    spec: dict[str, Any] = json.loads(path.read_text())
    return spec


def _folder(root: Path, made_by: str, embedder: str, cache_root: str) -> Path:
    """The folder of the embedder that made vectors, its weights checked."""
    checkpoint = root / made_by
    is_checkpoint = made_by.startswith("train/")
    if is_checkpoint and embedder == made_by:
        if not (checkpoint / "manifest.json").exists():
            raise DataError(f"{checkpoint}, the checkpoint that the vectors name, is missing. Name serving.embedder.")
        files = json.loads((checkpoint / "manifest.json").read_text())["files"]
        for name, entry in files.items():
            if name.startswith(MODEL_FILES) and sha256_file(checkpoint / name) != entry["sha256"]:
                raise DataError(f"{checkpoint / name} changed since it was committed; its vectors would mean nothing.")
        return (checkpoint / MODEL_FILES).resolve()
    asset = resolve(embedder, cache_root)
    made = checkpoint / MODEL_FILES
    same = (
        made.is_dir() and fingerprint_of(asset.path) == fingerprint_of(made)
        if is_checkpoint
        else (asset.fingerprint == made_by)
    )
    if not same:
        raise DataError(f"serving.embedder is '{embedder}', but another embedder made the vectors of the collection.")
    return asset.path.resolve()


class TextEncoder:
    """The embedder, loaded: texts under any instructions to vectors."""

    def __init__(self, spec: EncoderSpec, settings: ServingSettings) -> None:
        import torch

        from llmr_ray.modeling.embedder import Embedder

        torch.set_num_threads(settings.encode_threads)
        self._batch_tokens = settings.encode_batch_tokens
        self._embedder = Embedder(
            spec.path,
            max_query_tokens=spec.max_tokens["query"],
            max_document_tokens=spec.max_tokens["document"],
            **spec.pooled,
        )
        self.dimension = self._embedder.dimension

    def encode(self, prompted: Sequence[Prompted]) -> np.ndarray:
        """Embeds n texts: float32 [n, D] in their order."""
        tokens: list[list[int]] = [[]] * len(prompted)
        groups: dict[tuple[str, int], list[int]] = {}
        for row, (_, instruction, most) in enumerate(prompted):
            groups.setdefault((instruction, most), []).append(row)
        for (instruction, most), rows in groups.items():
            texts = [prompted[row][0] for row in rows]
            found = self._embedder.tokenize(texts, instruction=instruction, max_tokens=most)
            for row, ids in zip(rows, found, strict=True):
                tokens[row] = ids
        return self._embedder.infer(tokens, self._batch_tokens, np.empty((len(prompted), self.dimension), np.float32))


class PairScorer:
    """A cross-encoder, loaded: pairs of a query and a document to logits."""

    def __init__(self, path: str, settings: ServingSettings) -> None:
        from llmr_ray.modeling.cross_encoder import CrossEncoder

        self._batch_tokens = settings.encode_batch_tokens
        if not (Path(path) / "config.json").exists() or not _has_trained_head(Path(path)):
            raise ConfigError(f"{path} has no trained head of one label, so it cannot rank. Name a cross-encoder.")
        self._model = CrossEncoder(path, max_tokens=settings.reranker_max_tokens)

    def score(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """The logits of n pairs: float32 [n]."""
        queries = {query: np.empty(0, np.int32) for query, _ in pairs}
        for query, ids in zip(queries, self._model.tokenize(list(queries)), strict=True):
            queries[query] = np.asarray(ids, np.int32)
        documents = self._model.tokenize([document for _, document in pairs])
        tokens = [
            self._model.template.pair(queries[query], np.asarray(ids, np.int32))
            for (query, _), ids in zip(pairs, documents, strict=True)
        ]
        return self._model.score(tokens, self._batch_tokens)


def _has_trained_head(path: Path) -> bool:
    """Whether the folder says that it holds a classifier of one label; others would get a head of random weights."""
    config = json.loads((path / "config.json").read_text())
    is_classifier = any("SequenceClassification" in name for name in config.get("architectures") or [])
    return is_classifier and len(config.get("id2label", ())) == 1


def run_reward_model(config: Config, folder: Path) -> str:
    """The folder of a run's reward model for /v1/rerank.

    Raises:
        ConfigError: the run has none, or one that reads the desired output, which no client knows.
    """
    if not config.reward_model.model:
        raise ConfigError("serving.reranker is reward_model, but the run trains none (reward_model.model is empty).")
    if config.reward_model.sees_target:
        raise ConfigError(
            "serving.reranker is reward_model, but the run's reads the desired output of a query, which no client "
            "knows. Train it with reward_model.sees_target=false, or name a cross-encoder's folder."
        )
    return str(folder)
