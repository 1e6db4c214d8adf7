"""The embedder against sentence-transformers itself, and its batching against what it promises."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModel

from llmr_ray.errors import ConfigError, ResourceError
from llmr_ray.modeling.embedder import Embedder, fingerprint_of
from llmr_ray.modeling.text_model import pack
from llmr_ray.precision import resolve_precision
from tests.tiny import tiny_bert
from tests.tiny_llm import save_model

TEXTS = ["a b c", "d", "", "a a a a a a a a b b b b c c", "e f g h i j", "d", "k l"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_bert(tmp_path_factory.mktemp("model") / "bert")


def load(folder, **changes):
    settings = {"pooling": "auto", "max_query_tokens": 12, "max_document_tokens": 16, "precision": "float32"} | changes
    return Embedder(folder, **settings)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_encode_agrees_with_sentence_transformers(folder, pooling):
    """Prevents a wrong pooling, mask, instruction or order: the oracle is the library's own encode."""
    embedder = load(folder, pooling=pooling)
    ours = embedder.encode(TEXTS, instruction="query: ", max_tokens=16, batch_tokens=32)
    theirs = embedder.module.encode(TEXTS, prompt="query: ", convert_to_numpy=True)
    np.testing.assert_allclose(ours, theirs, atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, atol=1e-6)
    assert ours.dtype == np.float32


def test_long_texts_lose_their_right_end(folder):
    """Prevents truncation from the left and a limit that is not applied: two texts with one head must be equal."""
    embedder = load(folder)
    one, two, other = embedder.encode(
        ["a b c d e f g h", "a b c d i j k l", "b b c d e f g h"], instruction="", max_tokens=6, batch_tokens=64
    )
    np.testing.assert_allclose(one, two, atol=1e-6)
    assert abs(one - other).max() > 1e-3
    assert all(len(ids) <= 6 for ids in embedder.tokenize(TEXTS, instruction="a ", max_tokens=6))


def test_no_texts_give_an_empty_array(folder):
    """Prevents a crash on an empty shard."""
    assert load(folder).encode([], instruction="", max_tokens=8, batch_tokens=64).shape == (0, 16)


def test_bfloat16_keeps_directions(folder):
    """Prevents weights in bfloat16, whose cosines to float32 fall below 0.998."""
    full = load(folder).encode(TEXTS, instruction="", max_tokens=16, batch_tokens=64)
    half = load(folder, precision="bfloat16").encode(TEXTS, instruction="", max_tokens=16, batch_tokens=64)
    assert (full * half).sum(axis=1).min() > 0.999
    assert half.dtype == np.float32


def test_saved_folder_loads_without_this_package(folder, tmp_path):
    """Prevents a checkpoint that needs llmr_ray or remote code, or that lost its prompts, pooling or limits."""
    embedder = load(folder, pooling="cls")
    embedder.save(tmp_path / "saved", {"query": "find: ", "qa-query": "answer: "})
    ours = embedder.encode(["a b", "c d e"], instruction="answer: ", max_tokens=16, batch_tokens=64)
    script = (
        "import sys, numpy as np; sys.modules['llmr_ray'] = None\n"
        "from sentence_transformers import SentenceTransformer\n"
        f"m = SentenceTransformer({str(tmp_path / 'saved')!r}, device='cpu')\n"
        "assert m.prompts['query'] == 'find: ' and m.max_seq_length == 16, (m.prompts, m.max_seq_length)\n"
        f"np.save({str(tmp_path / 'theirs.npy')!r}, m.encode(['a b', 'c d e'], prompt_name='qa-query'))\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path, env={"HF_HUB_OFFLINE": "1"})
    np.testing.assert_allclose(ours, np.load(tmp_path / "theirs.npy"), atol=2e-6)
    assert (tmp_path / "saved" / "model.safetensors").stat().st_mode & 0o044
    assert load(tmp_path / "saved").module[1].pooling_mode == "cls"


def test_fingerprint_follows_content_not_readme(folder, tmp_path):
    """Prevents an index of other weights from passing, and a README edit from invalidating one."""
    import shutil

    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    before = fingerprint_of(copy)
    assert before == fingerprint_of(folder) == load(folder).fingerprint
    (copy / "README.md").write_text("changed")
    assert fingerprint_of(copy) == before
    (copy / "config.json").write_text((copy / "config.json").read_text() + "\n")
    assert fingerprint_of(copy) != before


def test_errors_say_what_to_do(folder, tmp_path):
    """Prevents a silent fallback to another pooling, a hub download, or pickled weights."""
    with pytest.raises(ResourceError, match="no model folder"):
        load(tmp_path / "missing")
    with pytest.raises(ConfigError, match="pooling"):
        load(folder, pooling="max")
    with pytest.raises(ConfigError, match="positions"):
        load(folder, max_document_tokens=4096)
    with pytest.raises(ConfigError, match="precision"):
        resolve_precision("float16")
    assert resolve_precision("auto") in ("float32", "bfloat16")


def test_a_folder_without_some_weights_is_refused(folder, tmp_path):
    """Prevents embeddings from random weights: transformers fills what is missing and only warns."""
    import shutil

    from safetensors.torch import load_file, save_file

    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    weights = load_file(copy / "model.safetensors")
    save_file(
        {name: value for name, value in weights.items() if "layer.1.output" not in name},
        copy / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(ResourceError, match="lacks weights"):
        load(copy)


def test_pack_covers_every_text_once_within_budget_and_with_little_padding():
    """Prevents lost or doubled texts, batches above the budget, and a padded share that wastes the machine."""
    lengths = np.clip(np.random.default_rng(0).lognormal(3.2, 0.7, 2000).astype(int), 3, 256)
    batches = pack(lengths, 2048)
    assert sorted(np.concatenate(batches)) == list(range(2000))
    padded = [int(lengths[rows].max()) * len(rows) for rows in batches]
    assert max(padded) <= 2048
    assert 1 - lengths.sum() / sum(padded) < 0.05
    assert pack([], 10) == []
    assert [list(rows) for rows in pack([50, 3], 10)] == [[0], [1]]


def test_decoder_llm_embeds_by_its_last_token(tmp_path):
    """Prevents padding from being pooled, and a decoder without a padding token from being refused."""
    folder = save_model(tmp_path)
    embedder = Embedder(
        folder, pooling="last", max_query_tokens=32, max_document_tokens=32, precision="float32", device="cpu"
    )
    texts = ["the river", "hello there, how are you doing today?", "a"]
    found = embedder.encode(texts, instruction="Question: ", max_tokens=32, batch_tokens=1000)
    model = AutoModel.from_pretrained(folder).eval()
    for text, vector in zip(texts, found, strict=True):
        ids = torch.tensor([embedder.tokenizer("Question: " + text)["input_ids"]])
        with torch.inference_mode():
            last = model(input_ids=ids).last_hidden_state[0, -1]
        np.testing.assert_allclose(vector, (last / last.norm()).numpy(), atol=1e-5)
    embedder.save(tmp_path / "saved", {})
    again = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    np.testing.assert_allclose(again.encode(["Question: " + text for text in texts]), found, atol=1e-5)
