"""Training data on disk, and what a rank takes from the global batch."""

import numpy as np
import pytest
import torch

from llmr_ray.schemas import table_of
from llmr_ray.training import groups
from llmr_ray.training.batches import Plan
from llmr_ray.training.dataset import read_training_data, write_training_data
from llmr_ray.training.objective import local_batch
from llmr_ray.training.step import nearness
from tests.training_setup import TASKS, groups_table


def tokenize(texts, instruction, limit):
    """One number per character."""
    return [[ord(letter) for letter in instruction + text][:limit] for text in texts]


def write(table, folder):
    write_training_data(
        table,
        folder,
        tokenize=tokenize,
        instructions={task: (f"{task}?", f"{task}!") for task in TASKS},
        max_query_tokens=20,
        max_document_tokens=30,
    )
    return read_training_data(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write(groups_table(), tmp_path_factory.mktemp("data") / "data")


def test_texts_come_back_with_their_instruction_and_limit(data):
    """Prevents tokens of another text, a missing instruction, and the query's limit on documents."""
    rows = groups_table().to_pylist()
    for row in (0, 30, 70, 95):
        query, task = rows[row]["query"], rows[row]["task"]
        assert "".join(map(chr, data.text(data.query_text[row]))) == f"{task}?{query}"[:20]
        texts = ["".join(map(chr, data.text(number))) for number in data.pool_texts(row)]
        assert texts == [f"{task}!{doc}"[:30] for doc in rows[row]["docs"]]
        pool = data.pool(row)
        assert pool.is_gold.tolist() == [True] + [False] * 5
        if task == "tool":
            assert pool.rewards is None
        else:
            np.testing.assert_allclose(pool.rewards, rows[row]["rewards"])


def test_equal_texts_have_one_key_and_are_tokenised_once(tmp_path):
    """Prevents a copy under another id from being taken for another document."""
    shared = {"task": "qa", "dataset": "x", "roles": ["gold", "candidate"], "rewards": None}
    rows = [
        {"query_id": "1", "query": "a", "doc_ids": ["d1", "d2"], "docs": ["same", "other"], **shared},
        {"query_id": "2", "query": "same", "doc_ids": ["d3", "d4"], "docs": ["third", "same"], **shared},
    ]
    data = write(table_of("groups", rows), tmp_path / "data")
    assert data.pool(0).keys[0] == data.pool(1).keys[1]
    assert data.pool_texts(0)[0] == data.pool_texts(1)[1]
    assert len(data.token_offsets) - 1 == 5


def test_nearness_is_the_mean_over_pairs():
    """Prevents texts from being compared with themselves, which would hide a collapse behind their number."""
    embedding = torch.nn.functional.normalize(torch.randn(5, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    each = [
        float(torch.exp(-2 * (embedding[i] - embedding[j]).pow(2).sum())) for i in range(5) for j in range(5) if i != j
    ]
    assert nearness(embedding) == pytest.approx(sum(each) / 20, rel=1e-5)
    assert nearness(embedding[:1].expand(7, -1)) == pytest.approx(1)
    assert nearness(embedding[:1]) == 1


def test_a_query_s_peers_ask_for_something_else():
    """Prevents a question asked twice, or one with the same answer, from being pushed away as a negative."""
    positive = np.array([10, 11, 10, 13, 14])
    gold = [np.array([10, 14]), np.array([11])]
    found = groups.peers(positive, gold, np.array([0, 1, 2, 1, 4]), range(2))
    assert found.tolist() == [[False, True, False, True, False], [True, False, True, False, True]]


def test_data_is_written_once_and_whole(tmp_path):
    """Prevents a restarted worker from tokenising again, or from reading what a killed one left."""
    (tmp_path / "data.tmp-0123").mkdir()
    (tmp_path / "data.tmp-0123" / "tokens.npy").write_text("torn")
    write(groups_table(2), tmp_path / "data")
    before = (tmp_path / "data" / "tokens.npy").stat().st_mtime_ns
    write(groups_table(4), tmp_path / "data")
    assert (tmp_path / "data" / "tokens.npy").stat().st_mtime_ns == before
    assert [path.name for path in tmp_path.glob("*.tmp-*")] == ["data.tmp-0123"]


@pytest.mark.parametrize("batching", ["homogeneous", "mixed"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_cut_the_batch_of_one_worker(data, batching, world_size):
    """Prevents groups, masks or rewards that depend on how many workers there are."""
    plan = Plan(data.rows_by("dataset"), repeats={}, batch_size=8, batching=batching, seed=3)

    def take(step, rank, ranks):
        return local_batch(data, plan.block(step), tasks=TASKS, group_size=4, seed=3, rank=rank, world_size=ranks)

    for step in range(6):
        whole, parts = take(step, 0, 1), [take(step, rank, world_size) for rank in range(world_size)]
        for name in ("rewards_BG", "has_rewards_B", "same_BGG", "others_BC"):
            np.testing.assert_array_equal(np.concatenate([getattr(part, name) for part in parts]), getattr(whole, name))
        assert [part.first for part in parts] == [rank * 8 // world_size for rank in range(world_size)]
        assert [task for part in parts for task in part.tasks_B] == whole.tasks_B
        texts = np.concatenate([part.texts[part.doc_BG] for part in parts])
        np.testing.assert_array_equal(texts, whole.texts[whole.doc_BG])
        assert len(np.unique(whole.texts)) == len(whole.texts)
