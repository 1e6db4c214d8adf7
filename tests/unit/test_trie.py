"""Token trees against their definition, and scoring on them against plain forward passes."""

import itertools

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from llmr_ray.errors import ConfigError
from llmr_ray.feedback import engine_tree, tree_attention
from llmr_ray.feedback.engine import EngineSettings, Rival
from llmr_ray.feedback.engine_hf import plain_logprobs
from llmr_ray.feedback.engine_routed import RoutedEngine
from llmr_ray.feedback.engine_tree import TreeScorer
from llmr_ray.feedback.rewards import likelihood
from llmr_ray.feedback.trie import build_tree, packs, trie_min


def random_pairs(rng, count, vocabulary=4):
    """Few token ids and short stems, so that everything shares something with something, up to equal pairs."""
    stems = [tuple(rng.integers(2, 2 + vocabulary, rng.integers(1, 30)).tolist()) for _ in range(3)]
    pairs = []
    for _ in range(count):
        stem = stems[rng.integers(3)]
        prompt = stem[: rng.integers(1, len(stem) + 1)] + tuple(rng.integers(2, 2 + vocabulary, rng.integers(0, 4)))
        pairs.append((tuple(map(int, prompt)), tuple(rng.integers(2, 2 + vocabulary, rng.integers(1, 5)).tolist())))
    return [*pairs, pairs[0]]


def prefixes(pairs):
    return {sequence[:length] for prompt, target in pairs for sequence in [prompt + target[:-1]]
            for length in range(1, len(sequence) + 1)}  # fmt: skip


@pytest.mark.parametrize("seed", range(5))
def test_nodes_are_the_distinct_prefixes(seed):
    """A prefix that stands twice is paid twice; one that is missing gives another sequence's probabilities."""
    pairs = random_pairs(np.random.default_rng(seed), 40)
    tree = build_tree(pairs)
    paths = [tuple(tree.token_T[tree.paths(np.array([node]))].tolist()) for node in range(len(tree))]
    assert len(set(paths)) == len(paths)
    assert set(paths) == prefixes(pairs)
    assert tree.position_T.tolist() == [len(path) - 1 for path in paths]
    assert trie_min(pairs) == len(tree) == len(prefixes(pairs))


@pytest.mark.parametrize("seed", range(3))
def test_predictions_stand_where_their_prefix_ends(seed):
    """Off by one node, each token gets the probability of its neighbour."""
    pairs = random_pairs(np.random.default_rng(seed), 30)
    tree = build_tree(pairs)
    for number, (prompt, target) in enumerate(pairs):
        own = slice(tree.bounds[number], tree.bounds[number + 1])
        assert tree.predict_id_P[own].tolist() == list(target)
        for place, node in enumerate(tree.predict_node_P[own]):
            path = tree.token_T[tree.paths(np.array([node]))].tolist()
            assert path == [*prompt, *target[:place]]


def test_packs_hold_every_pair_once_within_the_budget():
    """A pair left out is never scored; a pack over the budget runs out of memory."""
    pairs = [*random_pairs(np.random.default_rng(1), 60), (tuple(range(2, 80)), (3,))]
    cut = list(packs(pairs, 50))
    assert sorted(itertools.chain.from_iterable(cut)) == list(range(len(pairs)))
    sizes = [trie_min([pairs[number] for number in pack]) for pack in cut]
    assert [size for size, pack in zip(sizes, cut, strict=True) if size > 50 and len(pack) > 1] == []
    assert max(sizes) == 78
    assert list(packs([], 50)) == []
    assert len(build_tree([])) == trie_min([]) == 0


SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
FAMILIES = {
    "llama": LlamaConfig(**SMALL),
    "mistral with a window": MistralConfig(**SMALL, sliding_window=9),
    "qwen2": Qwen2Config(**{key: value for key, value in SMALL.items() if key != "head_dim"}),
    "qwen3": Qwen3Config(**SMALL),
    "gemma": GemmaConfig(**SMALL),
    "gpt-neox": GPTNeoXConfig(**SMALL),
}


def save(config, folder, sharpness=1.0):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.get_output_embeddings().weight.data *= sharpness
    model.save_pretrained(folder)
    return model.eval()


def settings(folder, **changes):
    fields = {
        "path": str(folder),
        "engine": "vllm",
        "dtype": "float32",
        "max_model_tokens": 256,
        "num_threads": 1,
        "kv_cache_gb": 1.0,
        "max_batched_tokens": 90,
        "max_sequences": 8,
    }
    return EngineSettings(**(fields | changes))


@pytest.mark.parametrize("family", FAMILIES)
def test_tree_gives_the_plain_forward_pass(family, tmp_path, monkeypatch):
    """Whatever is shared, packed or cut into blocks, a log-probability is the model's own (within 1e-4)."""
    monkeypatch.setitem(tree_attention.BLOCK_ROWS, "cpu", 16)
    monkeypatch.setattr(engine_tree, "LOGIT_ROWS", 7)
    model = save(FAMILIES[family], tmp_path)
    pairs = random_pairs(np.random.default_rng(3), 40)
    scored = TreeScorer(settings(tmp_path)).likelihood(pairs)
    for (prompt, target), result in zip(pairs, scored, strict=True):
        ids = torch.tensor([*prompt, *target])
        with torch.inference_mode():
            logits = model(input_ids=ids[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected = logits.gather(1, ids[len(prompt) :, None])[:, 0].numpy()
        np.testing.assert_allclose(result.logprobs, expected, atol=1e-4)
    computed = sum(result.num_computed_tokens for result in scored)
    assert trie_min(pairs) <= computed < sum(len(prompt) + len(target) for prompt, target in pairs) / 2


@pytest.mark.parametrize("rank_by", ["mean", "sum"])
@pytest.mark.parametrize("family", FAMILIES)
def test_reading_stops_where_the_comparison_is_settled(family, rank_by, tmp_path, monkeypatch):
    """Every comparison comes out as if all had been read; what was read is the model's own; and less is read."""
    monkeypatch.setitem(tree_attention.BLOCK_ROWS, "cpu", 16)
    monkeypatch.setattr(engine_tree, "FIRST_TOKENS", 2)
    # Outputs that are about equally likely, as those of random weights are, would not be settled early.
    model = save(FAMILIES[family], tmp_path, sharpness=6.0)
    rng = np.random.default_rng(5)
    pairs, rivals = [], []
    for prompt, _ in random_pairs(rng, 6):
        drawn = [tuple(rng.integers(2, 6, length).tolist()) for length in (3, 7, 12, 20, 30)]
        likely = _greedy(model, prompt, 30)
        outputs = [*drawn, likely, drawn[3][:10] + drawn[4], likely[:15] + drawn[1]]
        first = likely[:6] if rng.random() < 0.7 else drawn[1]
        pairs += [(prompt, first), *((prompt, output) for output in outputs)]
        rivals += [None, *[Rival(pair=(prompt, first), rank_by=rank_by)] * len(outputs)]
    scorer = TreeScorer(settings(tmp_path, max_batched_tokens=512))
    scored = scorer.likelihood(pairs, rivals)
    whole = [plain_logprobs(model, *pair).tolist() for pair in pairs]
    for pair, rival, result, expected in zip(pairs, rivals, scored, whole, strict=True):
        logprobs, expected = np.array(result.logprobs), np.array(expected)
        unread = (logprobs == 0) & (expected < -1e-4)
        assert rival or not unread.any()
        assert not logprobs[np.argmax(unread) :].any() or not unread.any()
        np.testing.assert_allclose(logprobs[~unread], expected[~unread], atol=1e-4)
        if rival:
            other = likelihood(whole[pairs.index(rival.pair)], rank_by)
            margin = likelihood(expected.tolist(), rank_by) - other
            assert abs(margin) < 1e-3 or (likelihood(result.logprobs, rank_by) > other) == (margin > 0), pair
    read, everything = (sum(r.num_computed_tokens for r in results) for results in (scored, scorer.likelihood(pairs)))
    assert read < 0.9 * everything, (read, everything)


def _greedy(model, prompt, length):
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        for _ in range(length):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    return tuple(ids[0, len(prompt) :].tolist())


def test_a_model_the_tree_does_not_cover_is_refused(tmp_path, monkeypatch):
    """Capped attention scores left out, or a mask that is wrong, would give plausible numbers."""
    save(Gemma2Config(**SMALL), tmp_path / "capped")
    with pytest.raises(ConfigError, match="caps attention"):
        TreeScorer(settings(tmp_path / "capped"))
    save(FAMILIES["llama"], tmp_path / "llama")
    broken = tree_attention.layout

    def blind(*asked):
        result = broken(*asked)
        for _, _, _, visible in result.blocks:
            visible[:, : visible.shape[1] // 2] = True
        return result

    monkeypatch.setattr(tree_attention, "layout", blind)
    with pytest.raises(ConfigError, match="other log-probabilities"):
        TreeScorer(settings(tmp_path / "llama"))


class FixedEngine:
    """Answers every pair alike."""

    def likelihood(self, pairs, rivals=()):
        return ["engine"] * len(pairs)


def open_failing():
    raise ConfigError("not covered.")


def test_a_model_the_tree_does_not_cover_is_scored_by_the_engine_unless_the_tree_is_demanded():
    """`auto` that ends in an error would make users learn a setting for nothing; a demand that is ignored lies."""
    engine = RoutedEngine(None, 10, FixedEngine, open_failing)
    assert engine.likelihood([1, 2]) == ["engine"] * 2
    assert engine.likelihood([1]) == ["engine"]
    with pytest.raises(ConfigError, match="not covered"):
        RoutedEngine(None, 10, FixedEngine, open_failing, must_take_tree=True).likelihood([1])
