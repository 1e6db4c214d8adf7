"""What the reward model reads and learns from, and its training by the one loop there is."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file

from llmr_ray.artifacts import seed_of
from llmr_ray.config import LoraConfig, TaskScore
from llmr_ray.training import checkpoint, step
from llmr_ray.training.cross_encoder import CrossEncoding
from llmr_ray.training.groups import sample
from llmr_ray.training.pairs import is_held_out, learned_little, left_text, pair_row
from tests.tiny import tiny_bert
from tests.training_setup import PAIR_TASKS, groups_table, make_pair_data, make_pair_trainer

QUERY = {"query_id": "q", "task": "icl", "dataset": "rte", "query": "Is it?", "targets": ["Yes"]}
CORPUS = pa.table(
    {"title": ["T", None, None, None, None], "text": list("abcde"), "continuation": [None, "+", None, None, None]}
)


def found(rewards):
    size = len(rewards)
    return {
        "doc_id": [f"d{n}" for n in range(size)],
        "row": list(range(size)),
        "reward": rewards,
        "judged": [reward is not None for reward in rewards],
        "gold": [True] * size,
    }


def test_the_left_side_is_query_and_desired_output():
    """Prevents a reward model that cannot see the answer, and one that sees it in the study without."""
    assert left_text(QUERY, TaskScore(), sees_target=True, seed=1) == "Is it?\nYes"
    assert left_text(QUERY, TaskScore(), sees_target=False, seed=1) == "Is it?"
    assert left_text({**QUERY, "targets": []}, TaskScore(), sees_target=True, seed=1) is None
    several = {**QUERY, "targets": ["Yes", "Ja", "Oui"]}
    seen = {left_text({**several, "query_id": str(n)}, TaskScore(), sees_target=True, seed=1) for n in range(30)}
    assert len(seen) == 3


def test_pair_rows_hold_what_the_llm_read_and_judged():
    """Prevents texts that only the LLM saw, labels beside its judgement, and rewards that were guessed."""
    row = pair_row(QUERY, "left", found([0.1, 0.4, None, 0.2, 0.3]), CORPUS, top_positives=3)
    assert row["query"] == "left"
    assert row["docs"] == ["T a", "b+", "d", "e"]
    assert row["doc_ids"] == ["d0", "d1", "d3", "d4"]
    assert row["roles"] == ["candidate"] * 4
    assert row["rewards"] == [0.1, 0.4, 0.2, 0.3]


def test_what_a_rule_put_last_is_a_negative_of_the_reward_model():
    """LLM-R's negatives are to a good part examples of other tasks and labels (methods.md B.4, B.5)."""
    pool = found([0.1, 0.4, None, 0.2, 0.3]) | {"judged": [True] * 5}
    row = pair_row(QUERY, "left", pool, CORPUS, top_positives=3)
    assert row["doc_ids"] == ["d0", "d1", "d2", "d3", "d4"]
    assert row["rewards"] == [0.1, 0.4, None, 0.2, 0.3]
    fewer = found([0.1, 0.4, None, None, None]) | {"judged": [True] * 5}
    assert pair_row(QUERY, "left", fewer, CORPUS, top_positives=3) == "too_few_documents"
    assert pair_row(QUERY, "left", found([None] * 5) | {"judged": [True] * 5}, CORPUS, top_positives=3) == "no_rewards"


@pytest.mark.parametrize(
    ("left", "of", "reason"),
    [
        ("left", None, "no_candidates"),
        (None, found([1.0] * 5), "no_target"),
        ("left", found([None] * 5), "no_rewards"),
        ("left", found([1.0] * 5), "below_min_margin"),
        ("left", found([1.0, 2.0, 3.0, None, None]), "too_few_documents"),
    ],
)
def test_queries_that_cannot_train_say_why(left, of, reason):
    """Prevents queries from being lost without a word."""
    assert pair_row(QUERY, left, of, CORPUS, top_positives=3) == reason


def test_held_out_queries_are_a_share_by_key():
    """Prevents a query from being held out while another that gives it away trains."""
    alone = [{"query_id": f"q{n}", "split_key": None} for n in range(2000)]
    held = [is_held_out(query, 0.2) for query in alone]
    assert np.mean(held) == pytest.approx(0.2, abs=0.03)
    assert not any(is_held_out(query, 0.0) for query in alone)
    together = [[is_held_out(query | {"split_key": f"k{n}"}, 0.5) for query in alone[:9]] for n in range(40)]
    assert {len(set(held)) for held in together} == {1}
    assert 5 < sum(held[0] for held in together) < 35


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    root = tmp_path_factory.mktemp("pairs")
    base = tiny_bert(root / "base")
    return base, make_pair_data(root / "data", base, groups_table(tasks=PAIR_TASKS, num_queries=8), shard_rows=15)


def gradients(trainer):
    trainer.train_step()
    return {name: parameter.grad.clone() for name, parameter in trainer.names.items()}


def test_a_step_minimises_the_naive_loss_of_its_groups(setup, tmp_path):
    """Prevents pairs of another query, another cut, or logits in another order than their documents."""
    trainer = make_pair_trainer(tmp_path, *setup)
    rows = {row["query_id"]: row for row in groups_table(tasks=PAIR_TASKS, num_queries=8).to_pylist()}
    block, each = trainer.plan.block(0), []
    for number in block.rows:
        row, pool = rows[trainer.data.query_id(int(number))], trainer.data.pool(int(number))
        places, _ = sample(
            pool,
            size=4,
            positive="teacher",
            negatives="lowest",
            rng=np.random.default_rng(0),
            top_positives=2,
            bottom_negatives=4,
            turn=block.epoch + seed_of(11, "turn", row["query_id"]),
        )
        model = trainer.model
        inputs = [
            model.tokenizer(row["query"], row["docs"][place], truncation="longest_first", max_length=15)["input_ids"]
            for place in places
        ]
        with torch.no_grad():
            logits = torch.cat([model.module(input_ids=torch.tensor([ids])).logits[0] for ids in inputs])
        each.append(float(-torch.log_softmax(logits, dim=0)[0]))
    record = trainer.train_step()
    assert record["loss"] == pytest.approx(np.mean(each), rel=1e-4)
    assert 0 <= record["accuracy"] <= 1
    assert record["padding_fraction"] == 0


def test_the_documents_of_a_query_change_with_the_epoch(setup, tmp_path):
    """Prevents an epoch that never reaches the sampling, as in LLM-R's released cross-encoder."""
    trainer = make_pair_trainer(tmp_path, *setup)
    objective = trainer.objective
    assert isinstance(objective, CrossEncoding)
    blocks = [trainer.plan.block(0)]
    blocks += [type(blocks[0])(dataset="x", epoch=epoch, rows=blocks[0].rows) for epoch in (1, 2)]
    first, second, third = (
        [[batch.tokens[pair].tolist() for pair in pairs] for pairs in batch.pair_BG]
        for batch in map(objective.batch, blocks)
    )
    for a, b, c in zip(first, second, third, strict=True):
        assert a[0] != b[0]
        assert a[0] == c[0]
        assert sorted(a[1:]) != sorted(b[1:])


def test_pairs_do_not_depend_on_where_the_data_is_cut(setup, tmp_path):
    """Prevents an order of pairs, and so other dropout and rounding, that the shards of the groups decide."""
    table = groups_table(tasks=PAIR_TASKS, num_queries=8)
    whole = make_pair_data(tmp_path / "data", setup[0], table)
    trainers = [make_pair_trainer(tmp_path / data.parent.name, setup[0], data) for data in (setup[1], whole)]
    for number in range(4):
        one, other = (trainer.objective.batch(trainer.plan.block(number)) for trainer in trainers)
        assert [ids.tolist() for ids in one.tokens] == [ids.tolist() for ids in other.tokens]
        np.testing.assert_array_equal(one.pair_BG, other.pair_BG)


@pytest.mark.parametrize("memory", ["grad_cache", "checkpointing"])
def test_gradient_in_small_memory_is_the_plain_one(setup, tmp_path, monkeypatch, memory):
    """Prevents a cross-encoder for which only the plain backward pass works."""
    monkeypatch.setitem(step.PACK_TOKENS, "cpu", 60)
    settings = {"dropout": True, "max_grad_norm": 0.0}
    plain = gradients(make_pair_trainer(tmp_path / "plain", *setup, **settings))
    small = gradients(make_pair_trainer(tmp_path / "small", *setup, memory=memory, **settings))
    # Of all, since that of the classifier's bias is 0 but for rounding: it shifts a group's logits alike.
    largest = max(float(expected.abs().max()) for expected in plain.values())
    for name, expected in plain.items():
        torch.testing.assert_close(small[name] / largest, expected / largest, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("lora", [LoraConfig(), LoraConfig(rank=2)], ids=["whole", "adapters"])
def test_interrupted_run_ends_with_the_same_weights(setup, tmp_path, lora):
    """Prevents a resume with another head than the one that was trained."""
    settings = {"dropout": True, "lora": lora}
    make_pair_trainer(tmp_path / "whole", *setup, **settings).run()

    def kill(record):
        if record["step"] == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_pair_trainer(tmp_path / "parts", *setup, **settings).run(kill)
    again = make_pair_trainer(tmp_path / "parts", *setup, **settings)
    assert again.step == 3
    again.run()
    one, two = (
        load_file(checkpoint.newest(tmp_path / name).model / "model.safetensors") for name in ("whole", "parts")
    )
    fresh = make_pair_trainer(tmp_path / "fresh", *setup, **settings).model.module.state_dict()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["classifier.weight"], fresh["classifier.weight"])


def test_a_reward_model_that_still_guesses_is_told():
    """It took a day to see that a second round lost because its teacher said the same of all candidates."""
    rng = np.random.default_rng(2)
    guess, noise = np.log(7), rng.normal(scale=0.05, size=3000)
    # The second round of llm_r.yaml with 120 steps: 1.945 to 1.928.
    chance = np.full(3000, 1 / 7)
    warning = learned_little(guess - np.linspace(0, 0.02, 120) + noise[:120], chance[:120])
    assert warning is not None
    assert "reward_model.train.num_steps" in warning
    # A first round with as many, and a long run that has learned before its first tenth is over.
    assert learned_little(np.where(np.arange(120) < 60, guess, 1.5) + noise[:120], chance[:120]) is None
    assert learned_little(np.where(np.arange(3000) < 200, guess, 1.2) + noise, chance) is None
    assert learned_little(guess + noise, chance) is not None
    assert learned_little(0.5 + noise, np.full(3000, 0.8)) is None, "a trained cross-encoder that goes on"
