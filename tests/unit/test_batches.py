"""The plan of batches: pure, complete, the same whatever the number of workers."""

from collections import Counter

import numpy as np
import pytest

from llmr_ray.errors import DataError
from llmr_ray.training.batches import MIXED, Plan

ROWS = {"big": np.arange(0, 50), "small": np.arange(50, 53), "twice": np.arange(53, 69)}


def plan(**changes):
    settings = {"repeats": {"twice": 2}, "batch_size": 8, "batching": "homogeneous", "seed": 5} | changes
    return Plan(settings.pop("rows", ROWS), **settings)


def test_blocks_are_homogeneous_and_counted():
    """Prevents mixed tasks in a batch, a lost small data set (trap 12) and a repeat that is not one."""
    made = plan()
    assert made.parts_per_epoch == 6 + 1 + 2 * 2
    blocks = [made.block(step) for step in range(made.parts_per_epoch)]
    assert Counter(block.dataset for block in blocks) == {"big": 6, "small": 1, "twice": 4}
    for block in blocks:
        assert set(block.rows) <= set(ROWS[block.dataset])
        assert len(block.rows) == 8
        assert block.epoch == 0
    used = Counter(int(row) for block in blocks for row in block.rows)
    assert max(used[row] for row in ROWS["big"]) == 1
    assert {used[row] for row in ROWS["twice"]} == {2}
    assert sorted(used[row] for row in ROWS["small"]) == [2, 3, 3]


def test_plan_is_the_same_for_1_2_and_8_workers():
    """Prevents a run whose batches depend on how many workers it has."""
    for step in (0, 7, 40):
        block = plan().block(step)
        for world_size in (1, 2, 8):
            parts = [block.of_rank(rank, world_size) for rank in range(world_size)]
            assert np.concatenate([block.rows[list(part)] for part in parts]).tolist() == block.rows.tolist()


def test_any_step_can_be_asked_for_first():
    """Prevents a resumed run from seeing other batches than an uninterrupted one."""
    steady = plan()
    run = [steady.block(step).rows.tolist() for step in range(40)]
    assert [plan().block(step).rows.tolist() for step in reversed(range(40))] == run[::-1]


def test_epochs_differ_and_the_remainder_gets_its_turn():
    """Prevents the same rows from being dropped for ever."""
    made = plan()
    seen = {int(row) for step in range(made.parts_per_epoch * 12) for row in made.block(step).rows}
    assert seen == set(range(69))
    per = made.parts_per_epoch
    assert [b.dataset for b in map(made.block, range(per))] != [b.dataset for b in map(made.block, range(per, 2 * per))]
    assert made.block(per).epoch == 1
    assert plan(seed=6).block(0).rows.tolist() != made.block(0).rows.tolist()


def test_mixed_draws_from_all_data_sets():
    """Prevents `mixed` from being homogeneous under another name."""
    made = plan(batching=MIXED)
    assert made.parts_per_epoch == (50 + 3 + 32) // 8
    assert {made.block(0).dataset} == {MIXED}
    assert any(len({row // 50 for row in made.block(step).rows}) == 2 for step in range(10))


def test_heterogeneous_blocks_are_made_of_homogeneous_parts():
    """Prevents parts that mix their sources, rows that never come, and a worker with more than one data set."""
    made = plan(batching="heterogeneous", shares=2)
    assert made.parts_per_epoch == 50 // 4 + 1 + 2 * 4  # parts of 4 rows
    blocks = [made.block(step) for step in range(made.parts_per_epoch)]  # two epochs
    used = Counter()
    for block in blocks:
        sources = []
        for rank in range(2):
            rows = block.rows[list(block.of_rank(rank, 2))]
            sources.append({name for name, own in ROWS.items() if set(rows) & set(own)})
            used.update(rows.tolist())
        assert [len(names) for names in sources] == [1, 1]
        assert block.dataset == (MIXED if sources[0] != sources[1] else next(iter(sources[0])))
    assert {block.dataset for block in blocks} > {MIXED}
    assert {used[row] for row in ROWS["twice"]} == {4}
    assert max(used[row] for row in ROWS["big"]) == 2


def test_nothing_to_train_on_is_said():
    """Prevents a division by zero in place of a reason."""
    with pytest.raises(DataError, match="no group"):
        plan(rows={"empty": np.zeros(0, np.int64)})


@pytest.mark.parametrize(
    ("temperature", "expected"),
    [
        (1.0, {"big": 6, "small": 1, "twice": 4}),
        (2.0, {"big": 4.29, "small": 1.75, "twice": 4.95}),  # 6, 1, 2 and 2 blocks, by their square roots
        (1e9, {"big": 2.75, "small": 2.75, "twice": 5.5}),
    ],
)
def test_temperature_favours_small_data_sets(temperature, expected):
    """Prevents a data set of a hundred times the rows from taking a hundred times the steps."""
    made = plan(mix="temperature", mix_temperature=temperature)
    assert made.parts_per_epoch == 11
    shares = Counter(made.block(step).dataset for step in range(11))
    assert shares == {name: pytest.approx(share, abs=1) for name, share in expected.items()}


@pytest.mark.parametrize("mix", ["temperature", "round_robin"])
def test_every_row_has_its_turn_before_any_has_a_second(mix):
    """Prevents epochs that cut a data set short from training on its first rows for ever."""
    made = plan(mix=mix, mix_temperature=5.0)
    blocks = [made.block(step) for step in range(made.parts_per_epoch * 7)]
    of_big = [block.rows for block in blocks if block.dataset == "big"]
    for start in range(0, len(of_big) - 5, 6):  # a pass over 50 rows is 6 blocks of 8
        rows = np.concatenate(of_big[start : start + 6])
        assert len(set(rows.tolist())) == 48
    assert [plan(mix=mix, mix_temperature=5.0).block(step).rows.tolist() for step in (60, 3)] == [
        blocks[step].rows.tolist() for step in (60, 3)
    ]


def test_round_robin_takes_one_of_each_in_turn():
    made = plan(mix="round_robin")
    for step in range(0, 24, 4):
        turn = Counter(made.block(step + place).dataset for place in range(4))
        assert turn == {"big": 1, "small": 1, "twice": 2}


def test_plan_of_the_published_mode_stays_as_it_is():
    """A plan that changes with the code would turn a resumed run into another."""
    assert [int(plan().block(step).rows[0]) for step in range(6)] == [5, 43, 18, 64, 51, 65]
