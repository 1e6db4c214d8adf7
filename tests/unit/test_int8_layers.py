"""Linear layers in 8 bits: against their own arithmetic in double precision, and what may not change."""

import numpy as np
import pytest
import torch

from llmr_ray import assets
from llmr_ray.errors import ConfigError
from llmr_ray.modeling import int8
from llmr_ray.modeling.embedder import Embedder
from llmr_ray.modeling.int8_kernels import round_rows
from llmr_ray.precision import training_precision
from tests.sentences import TEXTS

LIMITS = {"max_query_tokens": 32, "max_document_tokens": 64}

needs_8_bits = pytest.mark.skipif(not int8.cpu_has(*int8.FAST), reason="this processor lacks fast 8-bit products")


@pytest.fixture(scope="module")
def folder():
    return assets.resolve("minilm-l6").path


def encode(embedder, texts, batch_tokens=512):
    return embedder.encode(texts, instruction="", max_tokens=64, batch_tokens=batch_tokens)


def test_rounding_is_that_of_a_naive_loop():
    """Catches wrong scales, signs and the loss of the largest value, in rows of zeros as well."""
    values = np.random.default_rng(0).normal(size=(7, 50)).astype(np.float32) * 10
    values[3] = 0
    inverse = np.linspace(0.1, 2, 50, dtype=np.float32)
    rounded, scale = np.empty((7, 50), np.int8), np.empty(7, np.float32)
    round_rows(values, inverse, rounded, scale)
    for row in range(7):
        shrunk = [float(value) * float(factor) for value, factor in zip(values[row], inverse, strict=True)]
        step = max(max(map(abs, shrunk)), 1e-12) / 127
        assert scale[row] == pytest.approx(step, rel=1e-6)
        assert all(abs(value / step - told) < 0.501 for value, told in zip(shrunk, rounded[row].tolist(), strict=True))
    assert np.abs(rounded[[0, 1, 2, 4, 5, 6]]).max(axis=1).tolist() == [127] * 6
    assert not rounded[3].any()


@needs_8_bits
def test_a_layer_computes_what_its_rounded_numbers_say():
    """Catches scales that meet the wrong token or output, a forgotten bias, and saturated sums."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(96, 40)
    exact = torch.nn.Linear(96, 40)
    exact.load_state_dict(layer.state_dict())
    input_TI = torch.randn(3, 11, 96) * torch.linspace(0.1, 30, 96)
    module = torch.nn.Sequential(layer)

    def run():
        with torch.no_grad():
            return module(input_TI).flatten(0, 1).numpy()

    int8.quantise(module, run, "a layer")
    largest = input_TI.flatten(0, 1).abs().amax(dim=0).double()
    shrunk = input_TI.double() / largest.sqrt()
    step = shrunk.abs().amax(dim=-1, keepdim=True) / 127
    weight = exact.weight.detach().double() * largest.sqrt()
    weight_step = weight.abs().amax(dim=1, keepdim=True) / 127
    expected = (shrunk / step).round() * step @ ((weight / weight_step).round() * weight_step).T + exact.bias.double()
    with torch.no_grad():
        found = module(input_TI).double()
        assert (found - expected).abs().max() < 0.02 * expected.std()  # a half that is rounded the other way
        assert (found - exact(input_TI)).abs().max() < 0.1 * expected.std()


@needs_8_bits
def test_a_text_is_embedded_alike_in_any_company(folder):
    """Catches scales over a whole batch: served vectors would differ from indexed ones by who asks at the same time."""
    embedder = Embedder(folder, precision="int8", **LIMITS)
    together = encode(embedder, TEXTS)
    alone = np.concatenate([encode(embedder, [text]) for text in TEXTS])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    exact = encode(Embedder(folder, precision="float32", **LIMITS), TEXTS)
    cosines = (together * exact).sum(axis=1)
    assert cosines.min() > 0.99
    assert not np.allclose(together, exact, atol=1e-4), "nothing was rounded"


@needs_8_bits
def test_gradients_and_saved_weights_are_those_of_float32(folder, tmp_path):
    """Catches training on rounded products, and a saved model that lost its weights."""
    embedder, exact = (Embedder(folder, precision=name, device="cpu", **LIMITS) for name in ("int8", "float32"))
    tokens = embedder.tokenize(TEXTS[:2], instruction="", max_tokens=32)
    for model in (embedder, exact):
        model.module.eval()
        model.forward(tokens).sum().backward()
    pairs = zip(embedder.module.parameters(), exact.module.parameters(), strict=True)
    assert all(torch.equal(one.grad, other.grad) for one, other in pairs if other.grad is not None)
    embedder.save(tmp_path / "saved", {})
    again = Embedder(tmp_path / "saved", precision="float32", **LIMITS)
    np.testing.assert_allclose(encode(again, TEXTS), encode(exact, TEXTS), atol=1e-6)


@needs_8_bits
def test_a_model_that_loses_too_much_is_refused(folder, monkeypatch):
    """Catches a quality gate that lets any model pass; the error says what was measured."""
    monkeypatch.setattr(int8, "LEAST_COSINE", 0.9999)
    with pytest.raises(ConfigError, match=r"cosine of 0\.9[0-9]+ .*precision=auto"):
        Embedder(folder, precision="int8", **LIMITS)


def test_without_fast_products_it_is_refused(folder, monkeypatch):
    """Catches wrong sums, silently, on processors that saturate at 16 bits."""
    monkeypatch.setattr(int8, "cpu_has", lambda *words: False)
    with pytest.raises(ConfigError, match="avx512_vnni"):
        Embedder(folder, precision="int8", **LIMITS)


def test_training_is_not_in_8_bits():
    """Catches `torch.int8` as a training's precision."""
    assert training_precision("int8") == training_precision("auto")
    assert training_precision("float32") == "float32"
