"""Low-rank adapters: what trains, what stays, what is saved; in a BERT and in a decoder."""

import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

from llmr_ray.config import LoraConfig
from llmr_ray.errors import ConfigError
from llmr_ray.modeling.embedder import Embedder
from llmr_ray.training import checkpoint, step
from tests.tiny import tiny_bert
from tests.tiny_llm import save_model
from tests.training_setup import awake, groups_table, load, make_data, make_trainer

LORA = LoraConfig(rank=2, alpha=6)
LORA_DROPOUT = LoraConfig(rank=2, alpha=6, dropout=0.3)
TEXTS = ["a b c", "d", "a a a a a a a a b b b b c c", "e f g h i j"]


@pytest.fixture(scope="module", params=["bert", "decoder"])
def setup(request, tmp_path_factory):
    """Base model and data."""
    root = tmp_path_factory.mktemp(request.param)
    if request.param == "bert":
        base = tiny_bert(root / "base")
    else:
        embedder = Embedder(save_model(root / "llm"), pooling="last", max_query_tokens=12, max_document_tokens=16)
        base = root / "base"
        embedder.save(base, {})
    return base, make_data(root / "data", base, groups_table(num_queries=8))


@pytest.fixture
def small_passes(monkeypatch):
    """Several passes a step, as a large batch has."""
    monkeypatch.setitem(step.PACK_TOKENS, "cpu", 40)


def embed(embedder):
    return embedder.encode(TEXTS, instruction="query: ", max_tokens=16, batch_tokens=64)


def gradients(trainer):
    trainer.train_step()
    return {name: parameter.grad.clone() for name, parameter in trainer.names.items()}


def weights_of(trainer):
    """Copies of the base's weights, under the names they have without adapters."""
    named = trainer.model.module.named_parameters()
    return {name.replace(".base_layer", ""): value.clone() for name, value in named if "lora_" not in name}


def test_first_step_embeds_as_the_base_does(setup, tmp_path):
    """Prevents adapters that disturb the base before they have learned anything."""
    trainer = make_trainer(tmp_path, *setup, lora=LORA)
    np.testing.assert_array_equal(embed(trainer.model), embed(load(setup[0])))
    plain = make_trainer(tmp_path / "plain", *setup)
    assert trainer.train_step()["loss"] == pytest.approx(plain.train_step()["loss"], rel=1e-6)


def test_gradient_is_that_of_the_whole_model_projected(setup, tmp_path):
    """Prevents a wrong scale and gradients that do not arrive: y = W x + s B A x, so at B = 0 dB = s dW A^T, dA = 0."""
    whole = gradients(make_trainer(tmp_path / "whole", *setup, max_grad_norm=0.0))
    trainer = make_trainer(tmp_path / "lora", *setup, lora=LORA, max_grad_norm=0.0)
    first = {name: parameter.detach().clone() for name, parameter in trainer.names.items() if "lora_A" in name}
    found = gradients(trainer)
    assert {name for name in found if "lora_B" not in name} == set(first)
    for name, a_RI in first.items():
        grad_OI = whole[name.replace("lora_A.default.", "")]
        grad_OR = found[name.replace("lora_A", "lora_B")]
        torch.testing.assert_close(grad_OR, 6 / 2 * grad_OI @ a_RI.T, rtol=1e-3, atol=1e-5)
        assert not found[name].any()


@pytest.mark.parametrize("memory", ["grad_cache", "checkpointing"])
@pytest.mark.parametrize("dropout", [False, True])
def test_gradient_in_small_memory_is_the_plain_one(setup, tmp_path, small_passes, dropout, memory):
    """Prevents checkpointed layers behind frozen embeddings from giving no gradient, and dropout drawn anew."""
    settings = {"lora": LORA_DROPOUT, "dropout": dropout, "max_grad_norm": 0.0}
    plain = gradients(awake(make_trainer(tmp_path / "plain", *setup, **settings)))
    small = gradients(awake(make_trainer(tmp_path / "small", *setup, memory=memory, **settings)))
    for name, expected in plain.items():
        assert expected.norm() > 0, name
        torch.testing.assert_close(small[name], expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_adapters_alone_train(setup, tmp_path):
    """Prevents an optimiser, or a step, that holds the frozen weights."""
    trainer = make_trainer(tmp_path, *setup, lora=LORA)
    before = weights_of(trainer)
    for _ in range(3):
        trainer.train_step()
    assert all("lora_A" in name or "lora_B" in name for name in trainer.names)
    held = [parameter for group in trainer.optimizer.param_groups for parameter in group["params"]]
    assert len(held) == len(trainer.names)
    assert set(map(id, held)) == set(map(id, trainer.names.values())) == set(map(id, trainer.optimizer.state))
    for name, value in weights_of(trainer).items():
        assert torch.equal(value, before[name]), name


def test_merged_embedder_is_a_plain_folder_with_the_trained_embeddings(setup, tmp_path, monkeypatch):
    """Prevents a result that needs peft, that lost what was learned, or whose configuration is not the base's."""
    trainer = make_trainer(tmp_path, *setup, lora=LORA, num_steps=3, learning_rate=1e-2)
    for _ in range(3):
        trainer.train_step()
    trained = embed(trainer.model)
    assert np.abs(trained - embed(load(setup[0]))).max() > 1e-2
    trainer.save()
    np.testing.assert_allclose(embed(trainer.model), trained, atol=1e-5)
    folder = checkpoint.newest(tmp_path).model
    monkeypatch.setitem(sys.modules, "peft", None)
    theirs = SentenceTransformer(str(folder), device="cpu").encode(TEXTS, prompt_name="query")
    np.testing.assert_allclose(theirs, trained, atol=1e-5)
    load(setup[0]).save(tmp_path / "base", {})
    assert {path.name for path in folder.rglob("*")} == {path.name for path in (tmp_path / "base").rglob("*")}
    saved, base = (load_file(where / "model.safetensors") for where in (folder, tmp_path / "base"))
    assert {name: value.shape for name, value in saved.items()} == {name: value.shape for name, value in base.items()}
    assert (folder / "config.json").read_text() == (tmp_path / "base" / "config.json").read_text()


@pytest.mark.parametrize("killed_at", [4, 7])
def test_interrupted_run_ends_with_the_same_weights(setup, tmp_path, killed_at):
    """Prevents a resume from the base alone, or from merged weights that get adapters a second time."""
    make_trainer(tmp_path / "whole", *setup, lora=LORA_DROPOUT, dropout=True).run()

    def kill(record):
        if record["step"] == killed_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path / "parts", *setup, lora=LORA_DROPOUT, dropout=True).run(kill)
    again = make_trainer(tmp_path / "parts", *setup, lora=LORA_DROPOUT, dropout=True)
    assert again.step == {4: 3, 7: 8}[killed_at]
    again.run()
    whole, parts = (checkpoint.newest(tmp_path / name).folder for name in ("whole", "parts"))
    for name in ("model/model.safetensors", "adapters.safetensors", "optimizer.safetensors"):
        expected, found = load_file(whole / name), load_file(parts / name)
        assert expected.keys() == found.keys()
        assert all(torch.equal(value, found[key]) for key, value in expected.items()), name
    np.testing.assert_allclose(embed(again.model), embed(load(whole / "model")), atol=1e-5)
    runs = [checkpoint.read_steps(tmp_path / name) for name in ("whole", "parts")]
    one, two = ([{**record, "seconds": None} for record in records] for records in runs)
    assert one == two


def test_checkpoints_on_the_way_hold_adapters_alone(setup, tmp_path):
    """Prevents a checkpoint of billions of weights that never change."""
    trainer = make_trainer(tmp_path, *setup, lora=LORA)
    trainer.run()
    middle, last = sorted(tmp_path.glob("ckpt-*"))
    assert {path.name for path in middle.iterdir()} == {
        "adapters.safetensors",
        "optimizer.safetensors",
        "state.json",
        "MANIFEST.json",
    }
    saved = load_file(middle / "adapters.safetensors")
    assert saved.keys() == trainer.names.keys()
    assert (last / "model").is_dir()


def test_named_layers_alone_get_adapters(setup, tmp_path):
    """Prevents targets that are read as something else than the ends of names."""
    names = {"query", "value"} if "bert" in str(setup[0]) else {"q_proj", "down_proj"}
    trainer = make_trainer(tmp_path, *setup, lora=LoraConfig(rank=2, target_modules=sorted(names)))
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in trainer.names} == names


@pytest.mark.parametrize("targets", [["uery"], ["nothing"], ["LayerNorm"], []])
def test_a_target_that_no_layer_has_is_refused(setup, tmp_path, targets):
    """Prevents a misspelt layer from being left untrained without a word, beside others that exist."""
    known = "query" if "bert" in str(setup[0]) else "gate_proj"
    with pytest.raises(ConfigError, match=known):
        make_trainer(tmp_path, *setup, lora=LoraConfig(rank=2, target_modules=[*targets, *([known] * bool(targets))]))
