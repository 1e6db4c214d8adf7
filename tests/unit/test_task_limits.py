"""Texts of a task may be embedded shorter than the embedder reads: alike in the index, beside it, and when served."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llmr_ray import loading
from llmr_ray.artifacts import Artifact
from llmr_ray.assets import resolve
from llmr_ray.config import Config
from llmr_ray.errors import ConfigError, DataError
from llmr_ray.index import collection
from llmr_ray.index.snapshot import current, folder_of, read_manifest
from llmr_ray.index.stage import embed_spec
from llmr_ray.index.vectors import to_matrix
from llmr_ray.modeling.embedder import Embedder
from llmr_ray.modeling.encoding import text_encoder
from llmr_ray.serving.models import TextEncoder, encoder_spec
from llmr_ray.serving.settings import ServingSettings
from llmr_ray.task_config import TaskEmbed
from tests import serving_world as world
from tests.tiny import tiny_bert

CONF = Path(__file__).parents[2] / "conf"


def limited(config: Config = world.CONFIG, **limits: int) -> Config:
    """With limits for documents of qa and queries of chat."""
    qa = replace(config.tasks["qa"], embed=TaskEmbed(max_document_tokens=limits.get("qa_document", 0)))
    chat = replace(config.tasks["chat"], embed=TaskEmbed(max_query_tokens=limits.get("chat_query", 0)))
    return replace(config, tasks={"qa": qa, "chat": chat})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("model"))


def encoded(model: Path, texts: list[str], instruction: str, most: int) -> np.ndarray:
    embedder = Embedder(model, max_query_tokens=12, max_document_tokens=16, precision="float32")
    return embedder.encode(texts, instruction=instruction, max_tokens=most, batch_tokens=4096)


def test_each_task_is_cut_at_its_own_limit(model: Path, tmp_path: Path) -> None:
    """Vectors of texts cut otherwise still compare, only worse; nothing but a figure would show it."""
    config = limited(qa_document=7, chat_query=5)
    rows = world.documents(20)
    index = world.index_of(tmp_path, model, rows, config=config)
    embeddings = Artifact.found(tmp_path, index.spec.inputs["embeddings"])
    texts = [" ".join(filter(None, (row["title"], row["text"]))) for row in rows]
    found = to_matrix(embeddings.read("document_embeddings"))
    np.testing.assert_allclose(found, encoded(model, texts, "document : ", 7), atol=1e-5)
    assert np.abs(found - encoded(model, texts, "document : ", 16)).max() > 0.01
    asked = world.queries(12)
    found = to_matrix(embeddings.read("query_embeddings"))
    for task, instruction, most in (("chat", "a a a ", 5), ("qa", "query : ", 12)):
        members = [row for row, query in enumerate(asked) if query["task"] == task]
        told = encoded(model, [asked[row]["query"] for row in members], instruction, most)
        np.testing.assert_allclose(found[members], told, atol=1e-5)
    beside = text_encoder(str(model), config)
    np.testing.assert_allclose(beside(texts, "qa", "document"), encoded(model, texts, "document : ", 7), atol=1e-5)


def test_served_queries_are_cut_as_the_runs_were(model: Path, tmp_path: Path) -> None:
    index = world.index_of(tmp_path, model, world.documents(20), config=limited(chat_query=5))
    collection.create(tmp_path, "docs", index.id, model=str(model))
    folder = folder_of(tmp_path, "docs")
    spec = encoder_spec(tmp_path, read_manifest(folder, current(folder)))
    assert spec.prompt("chat", "query") == ("a a a ", 5)
    assert spec.prompt("qa", "query") == ("query : ", 12)
    assert spec.prompt(None, "query") == ("", 12)
    text = "b c d e f g h"
    served = TextEncoder(spec, ServingSettings(fast=False)).encode([(text, *spec.prompt("chat", "query"))])
    np.testing.assert_allclose(served, encoded(model, [text], "a a a ", 5), atol=1e-5)


def test_documents_cut_otherwise_do_not_join_a_collection(model: Path, tmp_path: Path) -> None:
    """No query fits documents of both cuts."""
    index = world.index_of(tmp_path, model, world.documents(20))
    collection.create(tmp_path, "docs", index.id, model=str(model))
    other = world.index_of(tmp_path, model, world.documents(20, seed=1), config=limited(qa_document=7))
    collection.add_segment(tmp_path, "docs", other.id)
    folder = folder_of(tmp_path, "docs")
    with pytest.raises(DataError, match="in different ways"):
        encoder_spec(tmp_path, read_manifest(folder, current(folder)))


def test_embeddings_without_such_limits_stay_as_they_are(model: Path, tmp_path: Path) -> None:
    """A new setting at its default must not make a corpus of millions be embedded again."""
    prepare = world.index_of(tmp_path, model, world.documents(20))
    plain, same, shorter = (
        embed_spec(config, resolve(str(model)), prepare)
        for config in (world.CONFIG, limited(qa_document=16, chat_query=12), limited(qa_document=7))
    )
    assert "limits" not in plain.config
    assert plain == same != shorter


def test_a_limit_above_the_embedders_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"tasks\.qa\.embed\.max_document_tokens is 999, above embedder"):
        loading.load(CONF / "quickstart.yaml", ["tasks.qa.embed.max_document_tokens=999"])
