"""The embedders of the baselines against the computations of their own code, written with transformers alone.

Every model is one of random weights in the baseline's architecture; settings are those of conf/baselines.yaml.
"""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer, MPNetConfig, MPNetModel, T5EncoderModel, T5Model

from llmr_ray import loading
from llmr_ray.config import ComparedEmbedder, Config, EvaluateConfig
from llmr_ray.errors import ConfigError, ResourceError
from llmr_ray.modeling.embedder import Embedder
from llmr_ray.training.bi_encoder import nested
from tests.tiny import tiny_bert
from tests.tiny_t5 import tiny_t5

CONF = Path(__file__).parents[2] / "conf"
BASELINES = loading.load(CONF / "baselines.yaml").evaluate.embedders
TEXTS = ["a b c", "d", "a a a a a a a a b b b b c c", "e f g h i j", "k l"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return tiny_bert(tmp_path_factory.mktemp("bert") / "bert")


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    return tiny_t5(tmp_path_factory.mktemp("t5") / "t5")


@pytest.fixture(scope="module")
def instructor(tmp_path_factory):
    """As hkunlp/instructor-base: T5 encoder, mean, a linear layer without bias, unit norm."""
    folder = tmp_path_factory.mktemp("instructor")
    encoder = tiny_t5(folder / "encoder", with_decoder=False)
    torch.manual_seed(3)
    parts = [
        Transformer(str(encoder)),
        Pooling(16, "mean"),
        Dense(16, 12, bias=False, activation_function=torch.nn.Identity()),
        Normalize(),
    ]
    SentenceTransformer(modules=parts, device="cpu").save_pretrained(str(folder / "whole"), create_model_card=False)
    return folder / "whole", parts[2].linear.weight.detach(), encoder


@pytest.fixture(scope="module")
def mpnet(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mpnet") / "mpnet"
    tiny_bert(folder)
    torch.manual_seed(4)
    config = MPNetConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=66,
        pad_token_id=0,
        initializer_range=0.5,
    )
    MPNetModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


def ours(folder, of, instruction="", texts=TEXTS, max_tokens=16):
    embedder = Embedder(
        folder,
        pooling=of.pooling,
        similarity=of.similarity,
        pool_instruction=of.pool_instruction,
        max_query_tokens=16,
        max_document_tokens=16,
        precision="float32",
        device="cpu",
    )
    return embedder.encode(texts, instruction=instruction, max_tokens=max_tokens, batch_tokens=40)


def tokens(folder, texts, max_tokens=16):
    """A padded batch, as every one of the originals makes it."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = tokenizer(texts, padding=True, truncation=True, max_length=max_tokens, return_tensors="pt")
    return {"input_ids": found["input_ids"], "attention_mask": found["attention_mask"]}


def masked_mean(hidden_BLD, mask_BL):
    """Contriever's and E5's function."""
    return hidden_BLD.masked_fill(~mask_BL[..., None].bool(), 0.0).sum(dim=1) / mask_BL.sum(dim=1)[..., None]


def hidden_of(folder, texts):
    batch = tokens(folder, texts)
    model = AutoModel.from_pretrained(folder).eval()
    with torch.inference_mode():
        return model(**batch).last_hidden_state, batch["attention_mask"]


@pytest.mark.parametrize("name", ["Contriever", "AAR-Contriever"])
def test_mean_of_tokens_without_normalisation(bert, name):
    """Prevents unit vectors where the length of an embedding is part of the score."""
    of = BASELINES[name]
    found = ours(bert, of, of.query_instructions.get("qa", ""))
    assert of.similarity == "dot"
    np.testing.assert_allclose(found, masked_mean(*hidden_of(bert, TEXTS)).numpy(), atol=1e-5)
    assert np.linalg.norm(found, axis=1).std() > 0.01


def test_first_token_without_normalisation(bert):
    """Prevents RetroMAE's embeddings from being averaged or normalised."""
    found = ours(bert, BASELINES["RetroMAE-BEIR"])
    np.testing.assert_allclose(found, hidden_of(bert, TEXTS)[0][:, 0].numpy(), atol=1e-5)


@pytest.mark.parametrize(("name", "side"), [("BGE", "query"), ("BGE", "document"), ("LLM-Embedder", "query")])
def test_first_token_with_instruction(bert, name, side):
    """Prevents BGE's instruction from standing before documents, and LLM-Embedder's of one task from all."""
    of = BASELINES[name]
    instruction = {"query": of.query_instructions, "document": of.document_instructions}[side].get("tool", "")
    assert (instruction == "") == (side == "document")
    expected = functional.normalize(hidden_of(bert, [instruction + text for text in TEXTS])[0][:, 0])
    np.testing.assert_allclose(ours(bert, of, instruction), expected.numpy(), atol=1e-5)


@pytest.mark.parametrize(("name", "prefix"), [("E5", "query: "), ("LLM-R", ""), ("API-Retriever", "")])
def test_mean_of_tokens_with_normalisation(bert, name, prefix):
    """Prevents E5 without its prefix, and LLM-R, which was trained without, with it."""
    of = BASELINES[name]
    assert of.query_instructions.get("qa", "") == prefix
    expected = functional.normalize(masked_mean(*hidden_of(bert, [prefix + text for text in TEXTS])))
    np.testing.assert_allclose(ours(bert, of, prefix), expected.numpy(), atol=1e-5)


def test_mpnet(mpnet):
    """Prevents an architecture with relative positions of its own from being packed or padded wrongly."""
    expected = functional.normalize(masked_mean(*hidden_of(mpnet, TEXTS)))
    np.testing.assert_allclose(ours(mpnet, BASELINES["SBERT"]), expected.numpy(), atol=1e-5)


def test_one_step_of_the_decoder(t5):
    """Prevents the encoder's mean in place of what AAR's decoder says first (methods.md D), and padding in sight."""
    batch = tokens(t5, TEXTS)
    model = T5Model.from_pretrained(t5).eval()
    with torch.inference_mode():
        start = torch.zeros((len(TEXTS), 1), dtype=torch.long)
        expected = model(**batch, decoder_input_ids=start).last_hidden_state[:, 0]
    found = ours(t5, BASELINES["AAR"])
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)
    assert np.abs(found[0] - found[1]).max() > 1e-2
    unit = ours(t5, dataclasses.replace(BASELINES["AAR"], similarity="cosine"))
    np.testing.assert_allclose(unit, functional.normalize(expected).numpy(), atol=1e-5)


def test_instructor_pools_the_text_alone(instructor):
    """Prevents instruction tokens in the mean: INSTRUCTOR's mask leaves out as many as the instruction has alone,
    without its end token (prepare_input_features)."""
    folder, weight, encoder = instructor
    of = BASELINES["Instructor-original"]
    instruction = "Represent the text for a:"
    batch = tokens(encoder, [instruction + text for text in TEXTS])
    count = tokens(encoder, [instruction])["attention_mask"].sum() - 1
    pooled_BL = batch["attention_mask"].clone()
    pooled_BL[:, :count] = 0
    with torch.inference_mode():
        hidden = T5EncoderModel.from_pretrained(encoder).eval()(**batch).last_hidden_state
        expected = functional.normalize(masked_mean(hidden, pooled_BL) @ weight.T)
        of_all = functional.normalize(masked_mean(hidden, batch["attention_mask"]) @ weight.T)
    assert of.pool_instruction is False
    np.testing.assert_allclose(ours(folder, of, instruction), expected.numpy(), atol=1e-5)
    np.testing.assert_allclose(ours(folder, BASELINES["Instructor"], instruction), of_all.numpy(), atol=1e-5)
    assert (expected - of_all).abs().max() > 1e-2


def test_a_text_cut_within_its_instruction_has_an_embedding(instructor):
    """Prevents a mean over no token: NaN would spoil the index."""
    folder, *_ = instructor
    found = ours(folder, BASELINES["Instructor-original"], "Represent the text for a:", max_tokens=4)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)


def test_an_instruction_not_pooled_is_so_in_bert_and_where_saved(bert, tmp_path):
    """Prevents a saved model whose embeddings differ from those it was trained with."""
    embedder = Embedder(
        bert, pool_instruction=False, max_query_tokens=16, max_document_tokens=16, precision="float32", device="cpu"
    )
    found = embedder.encode(TEXTS, instruction="query: ", max_tokens=16, batch_tokens=40)
    hidden_BLD, mask_BL = hidden_of(bert, ["query: " + text for text in TEXTS])
    mask_BL[:, :3] = 0  # [CLS] query :
    np.testing.assert_allclose(found, functional.normalize(masked_mean(hidden_BLD, mask_BL)).numpy(), atol=1e-5)
    embedder.save(tmp_path / "saved", {"query": "query: "})
    saved = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    np.testing.assert_allclose(saved.encode(TEXTS, prompt_name="query"), found, atol=1e-5)


def test_a_saved_dot_embedder_says_so(bert, tmp_path):
    """Prevents a checkpoint that others normalise, or compare by cosine."""
    of = ComparedEmbedder(pooling="mean", similarity="dot")
    embedder = Embedder(
        bert, pooling="mean", similarity="dot", max_query_tokens=16, max_document_tokens=16, device="cpu"
    )
    embedder.save(tmp_path / "saved", {})
    saved = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert saved.similarity_fn_name == "dot"
    np.testing.assert_allclose(saved.encode(TEXTS), ours(bert, of), atol=1e-5)
    # A folder that normalises does not where its length is to count.
    unit = tmp_path / "unit"
    Embedder(bert, max_query_tokens=16, max_document_tokens=16, device="cpu").save(unit, {})
    np.testing.assert_allclose(ours(unit, of), ours(bert, of), atol=1e-5)


def test_what_does_not_go_together_is_refused(bert, t5, tmp_path):
    """Prevents random decoders, decoders in checkpoints that nobody can load, and a similarity by another name."""
    encoder = tiny_t5(tmp_path / "encoder", with_decoder=False)
    with pytest.raises(ConfigError, match="no encoder-decoder"):
        ours(encoder, BASELINES["AAR"])
    shutil.copy(t5 / "config.json", encoder / "config.json")
    with pytest.raises(ResourceError, match="lacks weights"):
        ours(encoder, BASELINES["AAR"])
    with pytest.raises(ConfigError, match="no encoder-decoder"):
        ours(bert, BASELINES["AAR"])
    with pytest.raises(ConfigError, match="similarity"):
        ours(bert, ComparedEmbedder(similarity="euclidean"))
    embedder = Embedder(t5, pooling="decoder", max_query_tokens=16, max_document_tokens=16, device="cpu")
    with pytest.raises(ConfigError, match="cannot be saved"):
        embedder.save(tmp_path / "saved", {})
    quickstart = CONF / "quickstart.yaml"
    with pytest.raises(ConfigError, match=r"embedder\.pooling is 'decoder'"):
        loading.load(quickstart, ["embedder.pooling=decoder"])
    with pytest.raises(ConfigError, match="margins of cosines"):
        loading.load(CONF / "arl2.yaml", ["embedder.similarity=dot"])


def test_matryoshka_keeps_lengths_where_they_count():
    """Prevents cut embeddings of unit norm beside whole ones of any."""
    whole = torch.tensor([[3.0, 4.0, 12.0]])
    assert nested(whole, [2], unit_norm=False)[1].tolist() == [[3.0, 4.0]]
    assert nested(whole, [2])[1].tolist() == [[pytest.approx(0.6), pytest.approx(0.8)]]


def test_the_table_names_every_baseline_with_what_it_was_trained_with():
    """Prevents a baseline of the papers' tables that cannot be asked for, or one cut shorter on one side by mistake."""
    assert set(BASELINES) >= {
        *("Contriever", "Instructor", "RetroMAE-BEIR", "BGE", "E5", "AAR", "AAR-Contriever", "API-Retriever"),
        *("LLM-R", "LLM-Embedder", "SBERT"),
    }
    tasks = {"qa", "convsearch", "chat", "lrlm", "icl", "tool"}
    for of in BASELINES.values():
        assert set(of.query_instructions) <= tasks
        assert set(of.document_instructions) <= tasks
        assert of.max_query_tokens >= 32
        assert "/" in of.model
    assert loading.load(CONF / "baselines.yaml") == Config(evaluate=EvaluateConfig(embedders=BASELINES))


@pytest.mark.parametrize("name", ["llm_embedder", "llm_r"])
def test_the_papers_configurations_compare_what_their_tables_have(name):
    """Prevents a table of a paper without its baselines."""
    config = loading.load(CONF / "paper" / f"{name}.yaml")
    of_paper = {
        "llm_embedder": {
            *("none", "random", "bm25", "recency", "Instructor", "Contriever", "RetroMAE-BEIR", "BGE", "AAR"),
            *("API-Retriever", "LLM-R", "trained"),
        },
        "llm_r": {"none", "random", "kmeans", "bm25", "E5", "SBERT", "trained"},
    }[name]
    assert of_paper <= set(config.evaluate.methods)
    assert {name for name in config.evaluate.methods if name[0].isupper()} <= set(config.evaluate.embedders)
