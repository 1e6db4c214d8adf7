"""Packed batches and oneDNN's linear layers against the transformer's own forward pass, text by text."""

import numpy as np
import pytest
import torch
import transformers
from sentence_transformers import SentenceTransformer
from torch.nn.functional import linear

from llmr_ray.modeling.embedder import Embedder
from llmr_ray.modeling.linear import use_onednn
from llmr_ray.modeling.packed_attention import runs_of
from llmr_ray.modeling.text_model import pack
from tests.tiny import tiny_bert
from tests.tiny_llm import save_model

TOKENS = [[2, 5, 9, 4, 7, 8, 3], [2, 6, 3], [2, 7, 3], [2, 11, 12, 3], [2, 30, 3]]
SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "initializer_range": 0.5,
}
SPECIAL = {"pad_token_id": 0, "cls_token_id": 2, "bos_token_id": 2, "sep_token_id": 3, "eos_token_id": 3}
ENCODERS = {
    "bert": (transformers.BertConfig, transformers.BertModel, {}),
    "roberta": (transformers.RobertaConfig, transformers.RobertaModel, {"pad_token_id": 1}),
    "mpnet": (transformers.MPNetConfig, transformers.MPNetModel, {"pad_token_id": 1}),
    "modernbert": (transformers.ModernBertConfig, transformers.ModernBertModel, {"local_attention": 8} | SPECIAL),
}
PACKED = {"bert", "roberta"}
"""The others have an attention of their own or look near only, so they must be found out and take padded batches."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = {}
    for name, (config, model, changes) in ENCODERS.items():
        folder = tiny_bert(tmp_path_factory.mktemp("model") / name)  # its tokenizer is kept
        torch.manual_seed(3)
        model(config(**SMALL, **changes)).save_pretrained(folder)
        found[name] = folder
    return found


def load(folder, **changes):
    return Embedder(
        folder, max_query_tokens=32, max_document_tokens=32, **{"precision": "float32", "device": "cpu"} | changes
    )


def plain(model, ids):
    """Mean pooling of one text alone, as the transformer itself computes it."""
    hidden = model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long))
    return torch.nn.functional.normalize(hidden.last_hidden_state[0].mean(dim=0), dim=0)


@pytest.mark.parametrize("name", ENCODERS)
def test_embeddings_and_gradient_of_a_batch_are_those_of_its_texts_alone(folders, name):
    """Prevents attention across texts, positions that go on from text to text, and lost or doubled gradient."""
    embedder = load(folders[name])
    model = transformers.AutoModel.from_pretrained(folders[name]).eval()
    expected = torch.stack([plain(model, ids) for ids in TOKENS])
    got = embedder.forward(TOKENS)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    direction = torch.randn(got.shape, generator=torch.Generator().manual_seed(0))
    (got * direction).sum().backward()
    (expected * direction).sum().backward()
    own = dict(embedder.module[0].model.named_parameters())
    wanted = {key: value.grad for key, value in model.named_parameters() if value.grad is not None}
    assert len(wanted) > 10
    largest = max(float(grad.abs().max()) for grad in wanted.values())
    for key, grad in wanted.items():
        torch.testing.assert_close(own[key].grad / largest, grad / largest, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ENCODERS)
def test_only_what_packs_right_is_packed(folders, name):
    """Prevents a silent return to padding where packing works; padding then counts as computed tokens."""
    lengths = [len(ids) for ids in TOKENS]
    assert load(folders[name]).computed_tokens(lengths) == (sum(lengths) if name in PACKED else 5 * max(lengths))


def test_decoders_take_padded_batches(tmp_path):
    """A decoder's tokens look back only."""
    embedder = load(save_model(tmp_path), pooling="last")
    assert embedder.computed_tokens([2, 8]) == 16


def test_a_padded_batch_of_the_packing_transformer_is_masked(folders):
    """Prevents padding from being seen where sentence-transformers itself uses the loaded module."""
    embedder = load(folders["bert"])
    untouched = SentenceTransformer(str(folders["bert"]), device="cpu")
    texts = ["a b c d e f g", "h", "i j"]
    np.testing.assert_allclose(
        embedder.module.encode(texts), untouched.encode(texts, normalize_embeddings=True), atol=1e-6
    )


def test_dropout_reaches_the_attention_of_packed_texts(folders):
    """Prevents a training that leaves out the attention's dropout, or draws other numbers from the same seed."""
    embedder = load(folders["bert"])
    for part in embedder.module.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    for layer in embedder.module[0].model.encoder.layer:
        layer.attention.self.dropout.p = 0.5
    embedder.module.train()

    def drawn(seed):
        torch.manual_seed(seed)
        return embedder.forward(TOKENS).detach()

    torch.testing.assert_close(drawn(1), drawn(1), atol=0, rtol=0)
    assert (drawn(1) - drawn(2)).abs().max() > 1e-3


def test_batches_without_padding_are_filled_with_tokens():
    """Prevents batches cut for a padding that nobody computes, and ones above the budget."""
    lengths = np.clip(np.random.default_rng(0).lognormal(3.2, 0.7, 500).astype(int), 3, 256)
    batches = pack(lengths, 2048, pads=False)
    assert sorted(np.concatenate(batches)) == list(range(500))
    tokens = [int(lengths[rows].sum()) for rows in batches]
    assert max(tokens) <= 2048
    assert min(tokens[:-1]) > 2048 - 256
    assert [list(rows) for rows in pack([50, 3], 10, pads=False)] == [[0], [1]]


def test_runs_are_of_neighbours_of_one_length():
    assert runs_of([5, 5, 3, 5, 1, 1]) == [(2, 5), (1, 3), (1, 5), (2, 1)]


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 24), (2, 5, 24), (1, 24)])
def test_linear_layers_by_onednn_agree_with_pytorch(shape, has_bias):
    """Prevents a transposed gradient, a bias that is dropped, and another result for a strided input."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(24, 40, bias=has_bias)
    values = torch.randn(*shape[:-1], 48)[..., ::2].requires_grad_()
    direction = torch.randn(*shape[:-1], 40)
    wanted = [values, *layer.parameters()]
    expected = torch.autograd.grad((linear(values, layer.weight, layer.bias) * direction).sum(), wanted)
    use_onednn(layer)
    got = layer(values)
    torch.testing.assert_close(got, linear(values, layer.weight, layer.bias), atol=1e-5, rtol=1e-5)
    for a, b in zip(torch.autograd.grad((got * direction).sum(), wanted), expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    layer.weight.requires_grad_(False)
    [alone] = torch.autograd.grad(layer(values).sum(), [values])
    torch.testing.assert_close(alone, layer.weight.sum(dim=0).expand_as(values), atol=1e-5, rtol=1e-5)


def test_linear_layers_under_autocast_stay_pytorchs_own():
    """Prevents float32 products in a bfloat16 run, which would be slower than either."""
    layer = torch.nn.Linear(8, 8)
    use_onednn(layer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.ones(2, 8)).dtype == torch.bfloat16
