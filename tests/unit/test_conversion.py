"""Encoders out of ONNX files: against the models that were exported, and onnxruntime where it is the sample asset."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load_file
from transformers import BertModel

from llmr_ray import assets
from llmr_ray.conversion import convert_onnx
from llmr_ray.errors import ResourceError
from llmr_ray.modeling.cross_encoder import CrossEncoder
from llmr_ray.modeling.embedder import Embedder, fingerprint_of
from tests.sentences import TEXTS
from tests.tiny import tiny_bert

TOKENS = [[2, 5, 9, 13, 7, 3], [2, 30, 3], [2, 8, 8, 21, 3]]


class MeanPooled(torch.nn.Module):
    """What a sentence-transformers model computes before it normalises."""

    def __init__(self, encoder: BertModel) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        types_BL = torch.zeros_like(input_ids)
        hidden_BLD = self.encoder(input_ids, attention_mask, types_BL).last_hidden_state
        mask_BL1 = attention_mask[:, :, None].float()
        return (hidden_BLD * mask_BL1).sum(1) / mask_BL1.sum(1)


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> BertModel:
    """Three layers of random weights, no two parameters alike."""
    folder = tiny_bert(tmp_path_factory.mktemp("original"), layers=3)
    model = BertModel.from_pretrained(folder, add_pooling_layer=False, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in model.parameters():
            value += 0.3 * torch.randn(value.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def exported(original, tmp_path_factory) -> onnx.ModelProto:
    """torch's own export, its numbered weights numbered anew, all in another order."""
    path = tmp_path_factory.mktemp("exported") / "m.onnx"
    ids = torch.tensor([[2, 5, 9, 3], [2, 8, 3, 0]])
    texts = (ids, (ids > 0).long())
    names = ["input_ids", "attention_mask"]
    axes = {name: {0: "B", 1: "L"} for name in names}
    encoder = MeanPooled(original).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(encoder, texts, path, input_names=names, dynamic_axes=axes, dynamo=False)
    model = onnx.load(path)
    weights = list(model.graph.initializer)
    np.random.default_rng(0).shuffle(weights)
    for number, weight in enumerate(weights):
        if weight.name.startswith("onnx::"):
            rename(model, weight.name, f"onnx::MatMul_{number}")
    del model.graph.initializer[:]
    model.graph.initializer.extend(weights)
    return model


def rename(model: onnx.ModelProto, name: str, new: str) -> None:
    for weight in model.graph.initializer:
        weight.name = new if weight.name == name else weight.name
    for node in model.graph.node:
        for place, value in enumerate(node.input):
            node.input[place] = new if value == name else value


def convert(model: onnx.ModelProto, folder: Path, like: Path | None = None) -> Path:
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    convert_onnx(folder / "m.onnx", like or tiny_bert(folder / "like", seed=5, layers=2), folder / "converted")
    return folder / "converted"


def test_every_weight_and_embedding_is_the_original_s(original, exported, tmp_path):
    """Catches square weights that are not transposed, or are those of another layer: shapes cannot tell them apart."""
    folder = convert(exported, tmp_path)
    found, expected = load_file(folder / "model.safetensors"), original.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    embedder = Embedder(folder, max_query_tokens=8, max_document_tokens=8, precision="float32", device="cpu")
    embeddings = embedder.infer(TOKENS, 64, np.empty((3, 16), np.float32))
    for row, ids in zip(embeddings, TOKENS, strict=True):
        pooled = MeanPooled(original).eval()(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.int64))[0]
        np.testing.assert_allclose(row, torch.nn.functional.normalize(pooled, dim=0).detach().numpy(), atol=1e-6)
    assert embedder.tokenizer("a b")["input_ids"] == [2, 4, 5, 3]


def test_the_folder_depends_on_nothing_but_the_two_models(exported, tmp_path):
    """A collection refuses documents of an encoder with another fingerprint, even of the same weights."""
    (tmp_path / "again").mkdir()
    first = convert(exported, tmp_path)
    assert fingerprint_of(convert(exported, tmp_path / "again", tmp_path / "like")) == fingerprint_of(first)
    assert json.loads((first / "config.json").read_text())["num_hidden_layers"] == 3
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in first.iterdir())


def half(model: onnx.ModelProto) -> None:
    weight = model.graph.initializer[0]
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight).astype(np.float16), weight.name))


def elsewhere(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].data_location = onnx.TensorProto.EXTERNAL


def nameless(model: onnx.ModelProto) -> None:
    rename(model, "encoder.encoder.layer.1.attention.self.key.bias", "onnx::Add_7")


def foreign(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(3, np.float32), "head.weight"))


def incomplete(model: onnx.ModelProto) -> None:
    rename(model, "encoder.embeddings.LayerNorm.bias", "encoder.embeddings.LayerNorm.beta")


def another_input(model: onnx.ModelProto) -> None:
    model.graph.input.append(onnx.helper.make_tensor_value_info("token_type_ids", onnx.TensorProto.INT64, ["B", "L"]))


def unpooled(model: onnx.ModelProto) -> None:
    last = next(node for node in reversed(model.graph.node) if node.op_type == "LayerNormalization")
    model.graph.output[0].CopyFrom(onnx.helper.make_empty_tensor_value_info(last.output[0]))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (half, r"as FLOAT16 in it.*float32"),
        (elsewhere, r"FLOAT in another file"),
        (nameless, r"adds \[\] to the product.*guess"),
        (foreign, r"no layer of a BERT has: \['head\.weight'\]"),
        (incomplete, r"embeddings\.LayerNorm\.beta is \(16,\), not there; .*bias is missing, not \(16,\) \(2 in all\)"),
        (another_input, r"takes \['attention_mask', 'input_ids', 'token_type_ids'\]"),
        (unpooled, r"has 0 outputs of shape \(2, 16\)"),
    ],
)
def test_what_is_no_plain_encoder_is_refused(
    exported, tmp_path, change: Callable[[onnx.ModelProto], None], told: str
) -> None:
    """A weight left out or guessed would leave a model that loads, runs and means nothing."""
    model = onnx.ModelProto()
    model.CopyFrom(exported)
    change(model)
    with pytest.raises(ResourceError, match=told):
        convert(model, tmp_path)


@pytest.mark.parametrize(
    ("setting", "value", "told"),
    [
        ("hidden_size", 32, "is no BERT with the configuration"),
        ("num_attention_heads", 4, "differ from those of the graph"),
        ("hidden_act", "relu", "differ from those of the graph"),
    ],
)
def test_settings_of_another_family_are_refused(exported, tmp_path, setting, value, told) -> None:
    """Heads and activation leave no trace in the shapes of weights."""
    like = tiny_bert(tmp_path / "like")
    config = json.loads((like / "config.json").read_text())
    (like / "config.json").write_text(json.dumps(config | {setting: value}))
    with pytest.raises(ResourceError, match=told):
        convert(exported, tmp_path, like)


# By onnxruntime 1.32.0 from the package's own file: mean-pooled, of unit norm, the first six numbers of each text and
# the last one's products with all (tests/sentences.py).
FIRST = [
    [0.0075248, 0.0739647, -0.1342271, 0.0052891, -0.011937, 0.0263731],
    [0.0201816, 0.0514853, -0.1131218, 0.0013764, 0.0369362, -0.0122515],
    [-0.0083208, 0.0560492, 0.0068964, 0.0457292, 0.0234667, -0.0756825],
    [-0.0253158, 0.0216633, 0.0540189, -0.0014125, -0.0296763, -0.0438288],
    [0.0363035, 0.0132869, -0.0303853, 0.0805882, -0.0448097, -0.0452001],
]
PRODUCTS = [-0.0281284, -0.1236707, 0.0875628, -0.076906, 1.0]


def test_minilm_l3_embeds_as_onnxruntime_says():
    """The sample asset must be the published model, with the right tokenizer, and start a reward model as well."""
    folder = assets.resolve("minilm-l3").path
    embedder = Embedder(folder, max_query_tokens=128, max_document_tokens=128, precision="float32", device="cpu")
    embeddings = embedder.encode(TEXTS, instruction="", max_tokens=128, batch_tokens=512)
    np.testing.assert_allclose(embeddings[:, :6], FIRST, atol=1e-5)
    np.testing.assert_allclose(embeddings @ embeddings[-1], PRODUCTS, atol=1e-5)


def test_minilm_l3_starts_a_reward_model(tmp_path):
    """The file has no pooler: it must be as new as the head, from the same seed, and saved."""
    folder = assets.resolve("minilm-l3").path

    def score(model: CrossEncoder) -> np.ndarray:
        left, right = (np.asarray(ids) for ids in model.tokenize(["which city?", "Paris"]))
        return model.score([model.template.pair(left, right)], 64)

    first = CrossEncoder(folder, max_tokens=32, head_seed=3, precision="float32", device="cpu")
    again = CrossEncoder(folder, max_tokens=32, head_seed=3, precision="float32", device="cpu")
    assert score(first) == score(again)
    first.save(tmp_path)
    assert score(CrossEncoder(tmp_path, max_tokens=32, precision="float32", device="cpu")) == score(first)
