"""The cross-encoder against transformers and sentence-transformers themselves."""

import numpy as np
import pytest
import sentence_transformers
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import processors

from llmr_ray.errors import ConfigError, ResourceError
from llmr_ray.modeling.cross_encoder import CrossEncoder, PairTemplate, load_tokenizer, tokenize
from tests.tiny import tiny_bert

PAIRS = [("a b c", "d e"), ("a", "f g h i j k l m n"), ("k l k l k l k l k l", "m"), ("a b c", "")]
SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "initializer_range": 0.5,
}
ENCODERS = {
    "bert": (transformers.BertConfig, transformers.BertModel, {}),
    "electra": (transformers.ElectraConfig, transformers.ElectraModel, {"embedding_size": 8}),
    "roberta": (transformers.RobertaConfig, transformers.RobertaModel, {"pad_token_id": 1}),
    "mpnet": (transformers.MPNetConfig, transformers.MPNetModel, {"pad_token_id": 1}),
}
PACKED = {"bert", "electra", "roberta"}
"""MPNet has an attention of its own."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = {}
    for name, (config, model, changes) in ENCODERS.items():
        found[name] = tiny_bert(tmp_path_factory.mktemp("model") / name)  # its tokenizer is kept
        torch.manual_seed(3)
        model(config(**SMALL, **changes)).save_pretrained(found[name])
    return found


def load(folder, **changes):
    return CrossEncoder(folder, **{"max_tokens": 16, "precision": "float32", "device": "cpu"} | changes)


def score(model, pairs=PAIRS):
    lefts, rights = (model.tokenize(list(texts)) for texts in zip(*pairs, strict=True))
    return model.score([model.template.pair(*map(np.asarray, pair)) for pair in zip(lefts, rights, strict=True)], 24)


def theirs(folder, pairs=PAIRS):
    """Transformers alone, with padding."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    lefts, rights = map(list, zip(*pairs, strict=True))
    inputs = tokenizer(lefts, rights, padding=True, truncation="longest_first", return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits[:, 0].numpy()


@pytest.mark.parametrize("separators", [1, 2], ids=["as BERT", "as RoBERTa"])
def test_pairs_are_the_tokenizer_s_own(folders, separators):
    """Prevents a special token that is lost or doubled, and a cut at another place than everyone else's."""
    tokenizer = load_tokenizer(folders["bert"])
    between = " ".join(["[SEP]"] * separators)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair=f"[CLS] $A {between} $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    rng = np.random.default_rng(0)
    for _ in range(300):
        left, right = (" ".join(rng.choice(list("abcdef"), rng.integers(0, 30))) for _ in range(2))
        max_tokens = int(rng.integers(8, 40))
        [expected] = tokenizer([left], [right], truncation="longest_first", max_length=max_tokens)["input_ids"]
        tokens = [np.asarray(ids, np.int32) for ids in tokenize(tokenizer, [left, right])]
        assert PairTemplate.of(tokenizer, max_tokens).pair(*tokens).tolist() == expected, (left, right, max_tokens)


def test_a_tokenizer_without_a_first_token_is_refused(folders):
    """Prevents a head that reads whatever word comes first."""
    tokenizer = load_tokenizer(folders["bert"])
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel()
    with pytest.raises(ResourceError, match="no special token"):
        PairTemplate.of(tokenizer, 16)


@pytest.mark.parametrize("name", ENCODERS)
def test_others_load_what_is_saved_and_compute_the_same_logits(folders, tmp_path, name):
    """Prevents token types, a sigmoid, another limit or a renamed weight in what users take elsewhere."""
    model = load(folders[name])
    ours = score(model)
    assert np.ptp(ours) > 1e-3
    model.save(tmp_path / "saved")
    np.testing.assert_allclose(ours, theirs(tmp_path / "saved"), atol=1e-4)
    library = sentence_transformers.CrossEncoder(str(tmp_path / "saved"), device="cpu")
    np.testing.assert_allclose(ours, library.predict(PAIRS, show_progress_bar=False), atol=1e-4)
    np.testing.assert_allclose(ours, score(load(tmp_path / "saved", head_seed=9)), atol=1e-6)
    assert model.computed_tokens([3, 8]) == (11 if name in PACKED else 16)


def test_logits_and_gradients_of_a_batch_are_those_of_its_pairs_alone(folders):
    """Prevents the head from reading the tokens of a neighbour, and gradient that is lost on the way to it."""
    model = load(folders["bert"])
    tokens = [np.array([2, 5, 9, 3, 7, 8, 3]), np.array([2, 6, 3, 4, 3]), np.array([2, 7, 3, 9, 3])]
    weights = torch.tensor([1.0, -2.0, 0.5])

    def gradients(loss):
        model.module.zero_grad()
        loss.backward()
        return {name: value.grad.clone() for name, value in model.module.named_parameters() if value.grad is not None}

    packed = model.forward(tokens)
    together = gradients((packed * weights).sum())
    rows = [model._of_padded(model._as_rectangle([ids])) for ids in tokens]
    torch.testing.assert_close(packed, torch.cat(rows), atol=1e-5, rtol=0)
    alone = gradients((torch.cat(rows) * weights).sum())
    assert together.keys() == alone.keys()
    assert any("pooler" in name for name in together)
    for name, expected in alone.items():
        torch.testing.assert_close(together[name], expected, atol=1e-4, rtol=1e-4)


def test_a_fresh_head_depends_on_its_seed_alone(folders):
    """Prevents workers whose heads differ, and random numbers taken from whoever else draws them."""
    before = torch.get_rng_state()
    one = score(load(folders["electra"], head_seed=1))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(77)
    np.testing.assert_array_equal(score(load(folders["electra"], head_seed=1)), one)
    assert np.abs(score(load(folders["electra"], head_seed=2)) - one).max() > 1e-3


def test_a_head_of_other_labels_is_replaced(folders, tmp_path):
    """Prevents the logit of one class among three from being taken for a score."""
    model = transformers.BertForSequenceClassification.from_pretrained(folders["bert"], num_labels=3)
    model.save_pretrained(tmp_path)
    load_tokenizer(folders["bert"]).save_pretrained(tmp_path)
    found = load(tmp_path)
    assert found.module.classifier.weight.shape == (1, 16)
    assert score(found).shape == (len(PAIRS),)


def test_an_incomplete_encoder_is_refused(folders, tmp_path):
    """Prevents random weights in the encoder, where only the head may be fresh."""
    model = load(folders["bert"])
    model.save(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["bert.encoder.layer.1.output.dense.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ResourceError, match=r"output\.dense\.weight"):
        load(tmp_path)


def test_pickled_weights_and_missing_folders_are_refused(folders, tmp_path):
    """Prevents code of a downloaded file from being run."""
    model = load(folders["bert"])
    model.save(tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ResourceError, match="pickled"):
        load(tmp_path)
    with pytest.raises(ResourceError, match="no model folder"):
        load(tmp_path / "nowhere")


def test_pairs_must_fit_the_model(folders):
    with pytest.raises(ConfigError, match=r"64 positions.*reward_model\.max_tokens"):
        load(folders["bert"], max_tokens=65)


def test_bfloat16_leaves_logits_that_rank(folders):
    """Prevents logits of three digits: the head's product is made in float32."""
    model = load(folders["bert"], precision="bfloat16")
    logits = model.forward([np.array([2, 5, 9, 3, 7, 3]), np.array([2, 6, 3, 4, 3])])
    assert logits.dtype == torch.float32
    assert not torch.equal(logits.bfloat16().float(), logits)
    np.testing.assert_allclose(score(model), score(load(folders["bert"])), atol=0.2)
